"""A killed run with one damaged file, some dozen times; `make fuzz` does it hundreds of times."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_running import root

from fuzz.worlds import try_worlds

__all__ = ["root"]


def test_a_killed_run_is_gone_on_with_whatever_is_damaged(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = try_worlds(root, seed=20261128, count=16, monkeypatch=monkeypatch)
    assert sum(ends.values()) == 16, ends
