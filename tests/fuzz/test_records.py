"""Each kind of record, damaged some dozen times; `make fuzz` does it thousands of times."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.records import TARGETS, try_records

SLOW = {"checkpoint": 6, "result.json": 15, "candidate_items": 15}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_records_are_absent_or_refused(name: str, tmp_path: Path) -> None:
    count = SLOW.get(name, 40)
    ends = try_records(name, seed=20261128, count=count, folder=tmp_path)
    assert sum(ends.values()) == count
    assert ends["the same"] < count
