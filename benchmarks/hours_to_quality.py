"""Device-hours to the baseline's final loss: transformers' Trainer, our bf16, and our best recipe.
All is charged.

    python benchmarks/hours_to_quality.py [--size cpu] [--seeds 0 1 2] [--parts] [--save]
    python benchmarks/hours_to_quality.py --size h200 --device cuda --save
    python benchmarks/hours_to_quality.py --size minutes --seeds 0 --save    # on a GPU

All systems train one model from the same first weights on the same windows of the interpreter's
library source (small: at `h200` its 60 M tokens are some twenty epochs), with as many windows a
step. Systems:

- `trainer`: transformers' Trainer with bf16 and its defaults; `trainer_rate`: the same at our
  learning rate, since the default (5e-5) is one for fine-tuning and would make any saving large.
- `ours`: this project's loop in bf16 at a tuned rate, compiled where the size says so.
- the recipe: `ours` with parts put to it by `+`: `auto` (precision by trial), `pure` (bf16_pure) or
  `fp32`; `short` (windows that grow), `stack` (trained half as deep, put twice on itself), `taught`
  (the cached predictions of a half as deep model). `--parts` measures each at full length on seeds
  that nothing else reads; what choosing took is shown and charged to no system, as is the tuning of
  the rate.

Every point is a run planned to its length (`planned_runs.py` has the rule): from the full length
down, all systems in turn, until two in a row are short of every target. Charged: loading, probes,
search, compilation, steps, the shallow model, teacher and capture, checkpoints and saving. Apart:
evaluation (every model is read from disk, in fp32, on the same validation documents). Charged to
none: imports, and the tokens, which all systems share.

On a CPU that others use too, elapsed time says little. Beside it then stands what would have been
saved had every run had the processor to itself (device-hours times the share of it that the process
had): to judge the disturbance by, and no device-hours.

`minutes` is `h200` of an eighth of the steps, few lengths, and nothing compiled, which so few would
not earn back: how the systems stand to one another there is no figure of the full length.

What is finished stays in `--work` by what it depends on, and is not run again; one that was
interrupted goes on. With `--save`, what there is is saved after each run.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from planned_runs import FULL, Planned, Runs, compare, over_seeds, settled, target
from quality_units import HERE, Bench, Size, Unit, measure, parts_of, result_of
from results import save_result

VARIANTS = (
    "ours",
    "ours+pure",
    "ours+fp32",
    "ours+auto",
    "ours+short",
    "ours+stack",
    "ours+taught",
    "ours+fp32+short+stack",
)
PART_SEEDS = (100, 101)  # parts are chosen on these, and what is reported is measured on others
WARM_UP_STEPS = 4
SHARES = (0.125, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
SIZES = {
    "cpu": Size(
        width=64,
        layers=4,
        wide=192,
        vocabulary=1024,
        length=128,
        batch=8,
        steps=96,
        rate=1e-2,
        shares=SHARES,
        recipe="ours+fp32+short+stack",
        compile=False,
        eval_bytes=1024,
        threads=1,
    ),
    "h200": Size(
        width=512,
        layers=8,
        wide=1536,
        vocabulary=4096,
        length=512,
        batch=64,
        steps=1832,
        rate=2e-3,
        shares=SHARES,
        recipe="ours+auto+short+stack",
        compile=True,
        eval_bytes=8192,
    ),
    "minutes": Size(
        width=512,
        layers=8,
        wide=1536,
        vocabulary=4096,
        length=512,
        batch=64,
        steps=240,
        rate=2e-3,
        shares=(0.5, 0.75, 1.0),
        recipe="ours+short+stack",
        compile=False,
        eval_bytes=4096,
    ),
    "check": Size(
        width=64,
        layers=2,
        wide=64,
        vocabulary=300,
        length=32,
        batch=2,
        steps=8,
        rate=1e-2,
        shares=(0.5, 1.0),
        recipe="ours+short+stack",
        compile=False,
        eval_bytes=256,
        max_documents=12,
        threads=1,
    ),
}
ON_GPU = ("h200", "minutes")


# -- ladders --------------------------------------------------------------------------------------


def planned(found: dict[str, Any]) -> Planned:
    """Return a unit's result as the arithmetic wants it."""
    names = ("fraction", "tokens", "metric", "work_h", "retry_h", "flops")
    return Planned(**{name: found[name] for name in names})


def undisturbed(found: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return a unit's result with the device-hours it would have had with the processor to
    itself.
    """
    share = min(1.0, found["cpu_s"] / (found["wall_s"] * threads))
    return {**found, "work_h": found["work_h"] * share}


def shorten(
    bench: Bench,
    systems: Sequence[str],
    seed: int,
    margin: float,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, dict[float, dict[str, Any]]]:
    """Run every system from the full length down, in turn, each until its loosest target is out of
    reach; `keep` is given each result as it comes.
    """
    shares = bench.size.shares
    found: dict[str, dict[float, dict[str, Any]]] = {system: {} for system in systems}
    for fraction in reversed(shares):
        for at, system in enumerate(systems):
            if fraction < FULL:
                targets = [target(_runs(found[base]), margin) for base in systems[: at + 1]]
                if settled(_runs(found[system]), shares, max(targets)):
                    continue
            unit = Unit(system, seed, fraction, round(fraction * bench.size.steps))
            found[system][fraction] = each = result_of(bench, unit)
            print(said(each), flush=True)
            keep(each)
    return found


def said(found: dict[str, Any]) -> str:
    """Return one unit's figures in a line."""
    search = found["phases_s"].get("search", 0.0)
    return (
        f"seed {found['seed']:3} {found['system']:24} {found['fraction']:6.1%}"
        f" {found['tokens']:12,} tokens {found['metric']:.4f} bits/byte"
        f" {found['work_h'] * 3600:9.2f} device-s (search {search:.1f}) + evaluation"
        f" {found['evaluation_h'] * 3600:.1f}; load {found['load']:.1f}"
    )


def _runs(found: dict[float, dict[str, Any]]) -> Runs:
    return {fraction: planned(each) for fraction, each in found.items()}


def compare_all(
    by_seed: dict[int, dict[str, dict[float, dict[str, Any]]]],
    systems: Sequence[str],
    shares: Sequence[float],
    margin: float,
) -> list[dict[str, Any]]:
    """Return every system against every one before it, seed by seed and over seeds."""
    pairs = [(arm, base) for at, arm in enumerate(systems) for base in systems[:at]]
    found: list[dict[str, Any]] = []
    for arm, base in pairs:
        per_seed = {
            seed: compare(arm, _runs(each[arm]), base, _runs(each[base]), shares, margin)
            for seed, each in by_seed.items()
        }
        found.append(
            {"arm": arm, "base": base, **over_seeds(list(per_seed.values())), "per_seed": per_seed}
        )
    return found


def without_others(
    bench: Bench, by_seed: Any, systems: Sequence[str], margin: float
) -> list[dict[str, Any]]:
    """Return the comparisons as if every run had had the processor to itself; none on an
    accelerator.
    """
    threads = bench.size.threads
    if threads is None:
        return []
    alone = {
        seed: {
            system: {fraction: undisturbed(one, threads) for fraction, one in runs.items()}
            for system, runs in each.items()
        }
        for seed, each in by_seed.items()
    }
    return compare_all(alone, systems, bench.size.shares, margin)


def table(
    systems: Sequence[str],
    by_seed: dict[int, Any],
    comparisons: list[dict[str, Any]],
    alone: list[dict[str, Any]],
) -> str:
    """Return the figures in lines: full lengths, then savings."""
    loads = [
        one["load"] for each in by_seed.values() for runs in each.values() for one in runs.values()
    ]
    lines = [
        f"load average of the machine, {os.cpu_count()} cores: {statistics.median(loads):.1f},"
        f" {max(loads):.1f} at most"
    ]
    lines.append(
        f"{'at full length':24} {'bits/byte':>10} {'device-s':>10} {'evaluation':>10} {'TFLOP':>10}"
    )
    for system in systems:
        full = [each[system][FULL] for each in by_seed.values()]
        mean = {
            name: statistics.mean(one[name] for one in full)
            for name in ("metric", "work_h", "evaluation_h", "flops")
        }
        lines.append(
            f"{system:24} {mean['metric']:10.4f} {mean['work_h'] * 3600:10.2f} "
            f"{mean['evaluation_h'] * 3600:10.2f} {mean['flops'] / 1e12:10.3f}"
        )
    lines.append(
        f"{'to the final loss of':24} {'by':24} {'device-hours saved':>32} {'systems':>9}"
        f" {'algorithmic':>11}  share of the tokens, arm/base, by seed"
    )
    for each in comparisons:
        at = ", ".join(
            f"{one['at']['arm']['fraction']:.1%}/{one['at']['base']['fraction']:.1%}"
            for one in each["per_seed"].values()
        )
        split = [
            "" if each[name]["value"] is None else f"{each[name]['value']:+.1%}"
            for name in ("systems", "algorithmic")
        ]
        lines.append(
            f"{each['base']:24} {each['arm']:24} {_saving(each):>32} {split[0]:>9} {split[1]:>11} "
            f" {at}"
        )
    if alone:
        lines.append("the same, had every run had the processor to itself (no device-hours):")
    lines += [f"{each['base']:24} {each['arm']:24} {_saving(each):>32}" for each in alone]
    return "\n".join(lines)


def _saving(each: dict[str, Any]) -> str:
    value = each["saving"]
    if value["value"] is None:
        bound = each["bound"]["value"]
        return "both on the shortest run" if bound is None else f"censored, below {bound:+.1%}"
    ends = "" if value["ci"] is None else f" ({value['ci'][0]:+.1%} to {value['ci'][1]:+.1%})"
    return f"{'>= ' if each['at_least'] else ''}{value['value']:+.1%}{ends}"


def measure_parts(bench: Bench, seeds: Sequence[int]) -> dict[str, Any]:
    """Return every part at full length beside `ours`: what a recipe is chosen by."""
    found: dict[str, Any] = {}
    for seed in seeds:
        for system in VARIANTS:
            each = result_of(bench, Unit(system, seed, FULL, bench.size.steps))
            print(said(each), flush=True)
            found.setdefault(system, []).append(each)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--device", help="cpu or cuda; null takes what the size is for")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--systems", nargs="+", help="in order: each is compared with all before it"
    )
    parser.add_argument("--recipe", help="ours with parts put to it by +")
    parser.add_argument(
        "--shares", nargs="+", type=float, help="shares of the full length, the last 1"
    )
    parser.add_argument("--rate", type=float, help="learning rate of all systems but `trainer`")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--parts", action="store_true", help="measure every part too")
    parser.add_argument("--work", type=Path, default=HERE.parent / "mlruns/hours_to_quality")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    given = {
        "recipe": args.recipe,
        "rate": args.rate,
        "compile": args.compile,
        "shares": args.shares and tuple(sorted(args.shares)),
    }
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    systems = args.systems or ["trainer", "trainer_rate", "ours", size.recipe]
    for system in systems:
        if not system.startswith("trainer"):
            parts_of(system)
    bench = Bench(
        size, args.device or ("cuda" if args.size in ON_GPU else "cpu"), args.work.resolve()
    )
    report(bench, systems, args.seeds, args.margin, parts=args.parts, save=args.save)


def report(
    bench: Bench,
    systems: Sequence[str],
    seeds: Sequence[int],
    margin: float,
    *,
    parts: bool,
    save: bool,
) -> dict[str, Any]:
    """Measure all, print it, and save it if asked to."""
    bench.work.mkdir(parents=True, exist_ok=True)
    (bench.work / "base").mkdir(exist_ok=True)
    warm_up(bench, systems, seeds[0])
    chosen = measure_parts(bench, PART_SEEDS) if parts else {}
    units = list[dict[str, Any]]()

    def figures(comparisons: list[Any], alone: list[Any], lines: str = "") -> dict[str, Any]:
        found = {
            "size": asdict(bench.size),
            "margin": margin,
            "systems": list(systems),
            "comparisons": comparisons,
            "undisturbed": alone,
            "units": units,
            "parts": chosen,
        }
        if save:
            everything = [*(each for runs in chosen.values() for each in runs), *units]
            save_result("hours_to_quality", found, "\n".join([*map(said, everything), lines]))
        return found

    def keep(each: dict[str, Any]) -> None:
        units.append(each)
        figures([], [])  # a run that is cut short leaves what it has

    by_seed = {seed: shorten(bench, systems, seed, margin, keep) for seed in seeds}
    comparisons = compare_all(by_seed, systems, bench.size.shares, margin)
    alone = without_others(bench, by_seed, systems, margin)
    lines = table(systems, by_seed, comparisons, alone)
    print(lines, flush=True)
    return figures(comparisons, alone, lines)


def warm_up(bench: Bench, systems: Sequence[str], seed: int) -> None:
    """Run a few steps of every system: the first of a process pays for threads and libraries."""
    if bench.size.compile:  # every unit has a process of its own
        return
    for system in systems:
        unit = Unit(system, seed, 0.0, WARM_UP_STEPS)
        if not bench.folder(unit).with_suffix(".json").is_file():
            measure(bench, unit)
            bench.folder(unit).with_suffix(".json").unlink()


if __name__ == "__main__":
    main()
