"""The benchmark of reports, at toy size: its store is one that the command reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/reports.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["weekly", "--runs", "12", "--repeats", "1"], "12 runs, a store of "),
        (["report", "--arms", "3", "--seeds", "2", "--repeats", "1"], "3 arms x 2 seeds: "),
    ],
)
def test_each_part_says_what_it_measured(argv: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
