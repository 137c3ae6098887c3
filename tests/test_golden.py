"""Golden runs: what no clock decides stays as it was, recipe by recipe (`make_golden.py` says how
they are made).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from forked import run
from make_golden import GIVEN, HERE, golden_run

from pipeline.ledger.values import from_schema_1

QUICK = ("baseline", "distill")
NEAR = 2e-3  # of a figure, where the processor rounds as the one that made the golden runs
# of a figure elsewhere: a few steps of training pass on how a processor rounds products
NEAR_ELSEWHERE = 2e-2
DIGESTS = ("digest", "bytes")  # of artifacts: equal where the processor is
# What a few documents decide: one that flips moves the ends of intervals, the documents a planner
# asks for, and which of slices that are nearly alike is the worst.
BY_A_FEW = ("ci", "of_ci", "items_to_decide", "slice", "worst_slice", "why_undecided")


def differences(
    found: Any, golden: Any, where: str = "", *, same_processor: bool = True
) -> list[str]:
    """Return where two results differ, each with both values."""
    left_out = DIGESTS if same_processor else (*DIGESTS, *BY_A_FEW)
    if isinstance(golden, dict) and isinstance(found, dict):
        keys = [key for key in golden.keys() | found.keys() if key not in left_out]
        return [
            each
            for key in sorted(keys)
            for each in differences(
                found.get(key), golden.get(key), f"{where}.{key}", same_processor=same_processor
            )
        ]
    if isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        pairs = zip(found, golden, strict=True)
        return [
            each
            for at, pair in enumerate(pairs)
            for each in differences(*pair, f"{where}[{at}]", same_processor=same_processor)
        ]
    numbers = all(
        isinstance(each, float | int) and not isinstance(each, bool) for each in (found, golden)
    )
    near, near_zero = (NEAR, NEAR**2) if same_processor else (NEAR_ELSEWHERE, NEAR_ELSEWHERE)
    if numbers and math.isclose(found, golden, rel_tol=near, abs_tol=near_zero):
        return []
    return [] if found == golden else [f"{where}: {found!r}, was {golden!r}"]


def without(result: dict[str, Any], arms: set[str]) -> dict[str, Any]:
    """Return a result without arms that one of two processors has no units for."""
    rows = [row for row in result["rows"] if row["arm"] not in arms]
    pairs = [pair for pair in result["comparisons"] if not {pair["arm"], pair["base"]} & arms]
    return {**result, "rows": rows, "comparisons": pairs}


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in GIVEN],
)
def test_what_no_clock_decides_is_as_it_was(recipe: str, tmp_path: Path) -> None:
    golden = from_schema_1(json.loads((HERE / f"{recipe}.json").read_text()))
    found = golden_run(recipe, tmp_path, run)
    unable = {
        row["arm"] for each in (found, golden) for row in each["rows"] if row["status"] == "SKIPPED"
    }
    same_processor = _first_digest(found) == _first_digest(golden)
    if not same_processor:
        # Which formats are worth a trial depends on its units, and what is chosen on the trials.
        others = (_trials(found) ^ _trials(golden)) | {
            arm for arm, made in _formats(found).items() if made != _formats(golden).get(arm)
        }
        unable |= others | {arm.partition("/")[0] for arm in others}
    assert len(unable) < len(golden["rows"])
    assert not differences(
        without(found, unable), without(golden, unable), same_processor=same_processor
    )


def _first_digest(result: dict[str, Any]) -> str:
    """Return the digest of the first model: equal where products are rounded alike."""
    return next(row["artifact"]["digest"] for row in result["rows"] if row["artifact"])


def _formats(result: dict[str, Any]) -> dict[str, str | None]:
    """Return what format each arm was settled in, where any was."""
    return {row["arm"]: (row.get("quantization") or {}).get("format") for row in result["rows"]}


def _trials(result: dict[str, Any]) -> set[str]:
    """Return the arms that are trials within a stage."""
    return {row["arm"] for row in result["rows"] if "/" in row["arm"]}


def test_a_figure_that_moves_is_seen() -> None:
    golden = from_schema_1(json.loads((HERE / "distill.json").read_text()))
    moved = from_schema_1(json.loads((HERE / "distill.json").read_text()))
    moved["rows"][1]["quality"]["bits_per_byte"]["value"] *= 1.01
    moved["rows"][0]["ledger"]["counts"]["tokens"]["value"] += 64
    del moved["comparisons"][0]
    found = differences(moved, golden)
    assert len(found) == 3
    assert found[0].startswith(".comparisons")
