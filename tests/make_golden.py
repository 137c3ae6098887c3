"""Golden runs: every recipe at toy size, and of its result what no clock decides.

    python tests/make_golden.py          # writes tests/golden/RECIPE.json anew

`test_golden.py` makes the same runs and compares. A change that means to leave figures alone leaves
these files alone.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "golden"
DATA = HERE / "data.jsonl"
COMMON = [
    f"data.path={DATA}",
    "tracking=off",
    "hardware.num_threads=1",
    *(
        "precision=bf16",
        "training.steps=4",
        "training.batch_size=4",
        "training.sequence_length=64",
        "data.vocabulary_size=300",
    ),
    *(
        "model.shape.hidden_size=64",
        "model.shape.heads=1",
        "model.shape.intermediate_size=128",
        "model.shape.layers=2",
    ),
    *("quality.bootstrap=200", "quality.max_bytes_per_document=400"),
    *(
        "serving.blocks=2",
        "serving.load.new=2",
        "serving.load.prompt=8",
        "serving.batches=[1]",
        "serving.dtype=fp32",
    ),
]
TEACHER = "stages.teacher.steps=6"
GIVEN: dict[str, list[str]] = {
    "baseline": [],
    "mixed_precision": [],
    "distill": [TEACHER, "seeds=[0,1]"],
    "distill_cached": [TEACHER],
    "distill_schedules": [TEACHER, "training.steps=8"],
    "distill_signals": [TEACHER, "training.steps=8"],
    "full": [TEACHER],
    "quantize": [],
    "quantize_recover": [
        "stages.reference.steps=60",
        "stages.reference.learning_rate=0.005",
        "stages.quantized.format=fp4",
        "stages.quantized.recover=[lora,qat]",
        "stages.quantized.tolerance=0",
        "stages.quantized.lora.steps=2",
        "stages.quantized.qat.steps=2",
    ],
    "quantize_search": [
        "stages.quantized.candidates=[int8_weight_only,nf4]",
        "stages.quantized.prefer=memory",
        "stages.quantized.tolerance=0.5",
    ],
    "schedules": [
        "stages.plain.steps=8",
        "stages.shallow.steps=4",
        "stages.stacked.steps=4",
        "stages.short_first.start_sequence_length=16",
        "stages.small_batches_first.start_batch_size=2",
    ],
    "release_check": [
        "policy=smoke",
        "policy.load.new=2",
        "policy.load.prompt=8",
        "policy.load.batch=2",
        "policy.blocks=2",
    ],
}
"""Settings by recipe, beside those of all."""
WITHOUT = {
    "release_check": ("serving.", "training.", "model.", "data.vocabulary", "precision="),
    "mixed_precision": ("precision=",),
    "schedules": ("training.steps",),
}
"""Settings of all that are not a recipe's."""
TIMES = re.compile(
    r"(^|_)(s|ns|j|h|hours|tflops)$|_s_|_per_(s$|1k|joule|converged)|speedup|wall|phases"
    r"|device_hours|gpu_hours|energy|memory$|conditions|cost|timeline"
    r"|goodput|mfu|placement|identity|saving|payback|bound|new_spend|systems|less_others"
    r"|c_opt|c_arm|c_base|all_in|rule"
    r"|^(environment|device|run|run_id|question|items|path|settings|serving|meter_valid"
    r"|meter_problems|verdict|notes"
    # of a later schema
    r"|inputs|makes|control|unchanged)$"
)
"""Keys of what a clock decides, or a machine, or where a run lies."""


def timeless(result: Any) -> Any:
    """Return a result without what a clock decides."""
    if isinstance(result, dict):
        return {key: timeless(value) for key, value in result.items() if not TIMES.search(key)}
    if isinstance(result, list):
        return [timeless(each) for each in result]
    return result


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """Return what is compared of a result: its rows, pairs and conclusion, the numbers of the last
    left out.
    """
    found = timeless(
        {key: result[key] for key in ("recipe", "status", "primary_arm", "rows", "comparisons")}
    )
    found["comparisons"] = [
        {
            **pair,
            # schema 1 knew no other
            "base_is": (
                "best_16_bit" if result["comparisons"][at]["base_is"] == "best_16_bit" else None
            ),
            "training": {
                "answered": (
                    (result["comparisons"][at].get("training") or {}).get("value") is not None
                )
            },
        }
        for at, pair in enumerate(found["comparisons"])
    ]
    return found


def golden_run(recipe: str, folder: Path, run: Callable[..., Any]) -> dict[str, Any]:
    """Run a recipe in `folder`; return what is compared of its result.

    Args:
        run: Of `forked.py`, or anything like it.
    """
    more: list[str] = []
    if recipe == "release_check":
        done = run(folder, "recipe=distill", *COMMON, TEACHER)
        assert done.returncode == 0, done.stderr
        rows = json.loads((folder / "mlruns/latest/result.json").read_text())["rows"]
        paths = {row["arm"]: row["artifact"]["path"] for row in rows}
        more = [f"candidate={paths['student']}", f"baseline={paths['teacher']}"]
    without = WITHOUT.get(recipe, ())
    common = [word for word in COMMON if not word.startswith(without)] if without else COMMON
    done = run(folder, f"recipe={recipe}", *common, *GIVEN[recipe], *more)
    assert (folder / "mlruns/runs").is_dir(), done.stderr
    newest = max((folder / "mlruns/runs").iterdir(), key=lambda each: each.stat().st_mtime)
    assert (newest / "result.json").is_file(), done.stderr
    return kept(json.loads((newest / "result.json").read_text()))


def main() -> None:
    from forked import run

    for recipe in sys.argv[1:] or GIVEN:
        with tempfile.TemporaryDirectory() as folder:
            found = golden_run(recipe, Path(folder), run)
        (HERE / f"{recipe}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(recipe, found["status"], [row["status"] for row in found["rows"]])


if __name__ == "__main__":
    main()
