"""The head's kernels, compiled for GPUs that are not here: what they take of a multiprocessor, and
how they read.

Triton's own ptxas compiles without a device. A spill, or a load of two bytes where sixteen would
do, costs more than any test on a CPU can show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.distillation.transform import Transform

pytest.importorskip("triton", reason="Triton is not installed")
PROJECT = Path(__file__).parent.parent
ARCHITECTURES = (80, 89, 90, 100, 120)
DIVERGENCES = range(-1, 5)  # none, and the numbers of `KINDS`
TRANSFORMS = ((0, 0), (1, 1), (2, 2), (0, 2), (2, 0))
"""What is done to the student's and the teacher's products: see `triton_terms._kind_of`."""
CAPPED = 2
OTHER_LOADS = 2  # of a row: its label's logit; entries, which lie anywhere


def dense() -> list[tuple[str, dict[str, Any], str]]:
    from pipeline.distillation import triton_terms

    found: list[tuple[str, dict[str, Any], str]] = []
    for dtype in ("bf16", "fp32"):
        for kind in DIVERGENCES:
            for at_one in (True, False):
                for ours, theirs in TRANSFORMS:
                    if kind < 0 and (theirs or not at_one):
                        continue  # there is no teacher
                    both = [Transform(cap=1.0 if t == CAPPED else None) for t in (ours, theirs)]
                    constants = {
                        "KIND": kind,
                        "AT_ONE": at_one,
                        "OURS": ours,
                        "THEIRS": theirs,
                        "BLOCK": triton_terms._block(kind, *both, 2 if dtype == "bf16" else 4),
                    }
                    found.append(("_kernel", constants, dtype))
    return found


def sparse() -> list[tuple[str, dict[str, Any], str]]:
    return [
        (
            "_sparse_kernel",
            {"ENTRIES": 12, "WIDTH": 16, "AT_ONE": at_one, "OURS": ours, "BLOCK": 4096},
            dtype,
        )
        for dtype in ("bf16", "fp32")
        for at_one in (True, False)
        for ours in range(3)
    ]


CASES = [(arch, *each) for arch in ARCHITECTURES for each in (*dense(), *sparse())]
CHUNK = 29  # compiled by one process
USUAL = {"KIND": 0, "AT_ONE": False, "OURS": 0, "THEIRS": 0, "BLOCK": 4096}
HARDEST = {"KIND": 3, "AT_ONE": False, "OURS": 2, "THEIRS": 2, "BLOCK": 2048}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(-(-len(CASES) // CHUNK)))
def test_no_kernel_spills_or_reads_a_logit_by_itself(number: int, tmp_path: Path) -> None:
    check(CASES[number * CHUNK : (number + 1) * CHUNK], tmp_path)


def test_the_usual_and_the_hardest_kernel_do_not(tmp_path: Path) -> None:
    """The rest of them is slow."""
    cases = [(90, "_kernel", USUAL, "bf16"), (100, "_kernel", HARDEST, "fp32"), CASES[-1]]
    assert all(case in CASES for case in cases)
    check(cases, tmp_path)


def check(cases: list[tuple[int, str, dict[str, Any], str]], folder: Path) -> None:
    for case, found in zip(cases, compiled(cases, folder), strict=True):
        assert found["spilled"] == 0, (case, found)
        assert found["registers"] <= 128, (case, found)
        assert found["wide"] >= 2, (case, found)
        assert found["scalar"] <= OTHER_LOADS, (case, found)
        constants = case[2]
        if CAPPED not in (constants["OURS"], constants.get("THEIRS")):
            assert found["divisions"] == 0, (case, found)


def test_a_row_that_is_not_filled_up_is_read_logit_by_logit(tmp_path: Path) -> None:
    """What the test above would see."""
    [[arch, kernel, constants, dtype]] = CASES[:1]
    [found] = compiled([(arch, kernel, constants, dtype)], tmp_path, aligned=False)
    assert found["scalar"] > OTHER_LOADS
    assert found["wide"] == 0


def compiled(
    cases: list[tuple[int, str, dict[str, Any], str]], folder: Path, *, aligned: bool = True
) -> list[dict[str, int]]:
    """Compile kernels in a process where they are no Python; return what came of each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(PROJECT),
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "UNFILLED": "" if aligned else "1",
    }
    done = subprocess.run(
        [sys.executable, str(PROJECT / "tests/programs/compile_kernels.py"), json.dumps(cases)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
