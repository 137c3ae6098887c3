"""The shipped recipes at a size that fills a GPU; fails where GPU-hours or energy are null.

    python benchmarks/recipes_gpu.py [--recipes mixed_precision distill quantize] [--steps 300]
    [--root DIR]

Each recipe runs as a user runs it (`model=h200_124m training=gpu serving=gpu`). What is saved is
what result.json says: per arm GPU-hours, energy, quality, serving; the comparisons; the conclusion.
`--device cpu --tiny` tries the script itself without a GPU and saves nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import save_result

GPU = ["model=h200_124m", "training=gpu", "serving=gpu", "quality=full", "hardware=cuda"]
TINY = [
    "training.steps=4",
    "training.batch_size=4",
    "training.sequence_length=64",
    "data.max_documents=40",
    "model.shape.hidden_size=64",
    "model.shape.heads=1",
    "model.shape.intermediate_size=128",
    "model.shape.layers=2",
    "quality.max_documents=24",
    "quality.bootstrap=200",
    "serving.blocks=2",
    "serving.load.new=4",
    "serving.batches=[1]",
]


def run_recipe(recipe: str, root: Path, settings: list[str]) -> tuple[dict[str, Any], str]:
    """Run one recipe; return its result and what it printed."""
    command = [
        sys.executable,
        "-m",
        "pipeline",
        f"recipe={recipe}",
        f"tracking.root={root}",
        *settings,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = f"$ python {' '.join(command[1:])}\n{done.stdout}{done.stderr}"
    print(log, flush=True)
    if done.returncode:
        sys.exit(f"{recipe} ended with {done.returncode}")
    return json.loads((root / "latest/result.json").read_text()), log


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures worth keeping."""
    kept = ("value", "ci", "n", "why_missing")
    rows = [
        {
            "arm": row["arm"],
            "status": row["status"],
            "why": row["why"],
            "gpu_hours": row["ledger"]["gpu_hours"]["attached"],
            "device_hours": row["ledger"]["device_hours"],
            "energy_j": row["ledger"]["energy_j"],
            "counts": row["ledger"]["counts"],
            "memory": row["ledger"]["memory"],
            "phases_ns": row["ledger"]["phases_ns"],
            "quality": {
                key: {name: value[name] for name in kept} for key, value in row["quality"].items()
            },
            "serving": row["serving"],
        }
        for row in result["rows"]
    ]
    return {
        "conclusion": result["conclusion"],
        "run": result["run"],
        "rows": rows,
        "comparisons": result["comparisons"],
    }


def problems(result: dict[str, Any]) -> list[str]:
    """Return what a GPU run must have and this one has not."""
    found: list[str] = []
    for row in result["rows"]:
        if row["status"] != "FINISHED":
            continue
        ledger = row["ledger"]
        if ledger["gpu_hours"]["attached"]["value"] is None:
            found.append(
                f"{row['arm']}: GPU-hours null: {ledger['gpu_hours']['attached']['why_missing']}"
            )
        if ledger["energy_j"]["value"] is None:
            found.append(f"{row['arm']}: energy null: {ledger['energy_j']['why_missing']}")
        other = ledger["phases_ns"].get("other", 0) / sum(ledger["phases_ns"].values())
        if other >= 0.02:
            found.append(f"{row['arm']}: {other:.1%} of the wall time is in no phase")
    return found


def main() -> None:
    """Run, check and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["mixed_precision", "distill", "quantize"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--root", type=Path, default=None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    settings = (
        [f"hardware={args.device}", *TINY] if args.tiny else [*GPU, f"training.steps={args.steps}"]
    )
    root = args.root or Path(tempfile.mkdtemp())
    figures, logs, missing = {}, [], []
    for recipe in args.recipes:
        result, log = run_recipe(recipe, root, settings)
        figures[recipe] = summary(result)
        logs.append(log)
        missing += [f"{recipe}: {problem}" for problem in problems(result)]
    print("\n".join(missing) or "every GPU figure is there")
    if args.device == "cuda":
        save_result("recipes_gpu", figures, "\n".join([*logs, *missing]))
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
