"""Mutated command lines: forty, or a hundred with the slow tests; `make fuzz` has more."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.lines import try_lines


@pytest.mark.parametrize("count", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_mutated_command_lines_end_in_one_line_each(tmp_path: Path, count: int) -> None:
    ends = try_lines(seed=20261128, count=count, cwd=tmp_path)
    assert sum(ends.values()) == count
    assert min(ends.get("0", 0), ends.get("1", 0), ends.get("2", 0)) > 0, ends
