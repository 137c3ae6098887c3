"""A hundred mutated command lines; `make fuzz` tries thousands."""

from __future__ import annotations

from pathlib import Path

from fuzz.lines import try_lines


def test_a_hundred_command_lines_end_in_one_line_each(tmp_path: Path) -> None:
    ends = try_lines(seed=20261128, count=100, cwd=tmp_path)
    assert sum(ends.values()) == 100
    assert min(ends.get("0", 0), ends.get("1", 0), ends.get("2", 0)) > 0, ends
