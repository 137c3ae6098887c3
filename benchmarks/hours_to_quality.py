"""Device-hours to the baseline's final loss: transformers' Trainer, our bf16, and our best recipe. All is charged.

    python benchmarks/hours_to_quality.py [--size cpu] [--seeds 0 1 2] [--parts] [--save]
    python benchmarks/hours_to_quality.py --size h200 --device cuda --save

All systems train one model from the same first weights on the same windows of the interpreter's library source (small:
at `h200` its 60 M tokens are some twenty epochs), with as many windows a step. Systems:

- `trainer`: transformers' Trainer with bf16 and its defaults; `trainer_rate`: the same at our learning rate, since the
  default (5e-5) is one for fine-tuning and would make any saving large.
- `ours`: this project's loop in bf16 at a tuned rate, compiled where the size says so.
- the recipe: `ours` with parts put to it by `+`: `auto` (precision by trial), `pure` (bf16_pure) or `fp32`; `short`
  (windows that grow), `stack` (trained half as deep, put twice on itself), `taught` (the cached predictions of a half
  as deep model). `--parts` measures each at full length on seeds that nothing else reads; what choosing took is shown
  and charged to no system, as is the tuning of the rate.

Every point is a run planned to its length (`planned_runs.py` has the rule): from the full length down, all systems in
turn, until two in a row are short of every target. Charged: loading, probes, search, compilation, steps, the shallow
model, teacher and capture, checkpoints and saving. Apart: evaluation (every model is read from disk, in fp32, on the
same validation documents). Charged to none: imports, and the tokens, which all systems share.

On a CPU that others use too, elapsed time says little. Beside it then stands what would have been saved had every run
had the processor to itself (device-hours times the share of it that the process had): to judge the disturbance by, and
no device-hours.

What is finished stays in `--work` by what it depends on, and is not run again; one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from planned_runs import FULL, HOUR_NS, Planned, Runs, charged, compare, over_seeds, settled, target
from results import save_result

HERE = Path(__file__).parent
RECIPES = HERE / "hours_to_quality_recipes"
PARTS = ("auto", "pure", "fp32", "short", "stack", "taught")
VARIANTS = (
    "ours", "ours+pure", "ours+fp32", "ours+auto", "ours+short", "ours+stack", "ours+taught", "ours+fp32+short+stack",
)  # fmt: skip
PRECISIONS = {"auto": "auto", "pure": "bf16_pure", "fp32": "fp32"}
PART_SEEDS = (100, 101)  # parts are chosen on these, and what is reported is measured on others
SHALLOW = 0.35  # of the steps, that the shallow model takes
SHORTEST = 4  # windows begin at this part of their length
WARM_UP_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is trained, for how long, and which recipe is put beside it.

    Attributes:
        rungs: Shares of `steps` to which runs are planned, rising; the last is 1.
        rate: Learning rate of all systems but `trainer`.
        recipe: The best one, of what `--parts` showed.
        eval_bytes: Of each validation document that is read.
        threads: Of a CPU.
    """

    width: int
    layers: int
    wide: int
    vocabulary: int
    length: int
    batch: int
    steps: int
    rate: float
    rungs: tuple[float, ...]
    recipe: str
    compile: bool
    eval_bytes: int
    max_documents: int | None = None
    threads: int | None = None


RUNGS = (0.125, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
SIZES = {
    "cpu": Size(width=64, layers=4, wide=192, vocabulary=1024, length=128, batch=8, steps=96, rate=1e-2, rungs=RUNGS,
                recipe="ours+fp32+short+stack", compile=False, eval_bytes=1024, threads=1),
    "h200": Size(width=512, layers=8, wide=1536, vocabulary=4096, length=512, batch=64, steps=1832, rate=2e-3,
                 rungs=RUNGS, recipe="ours+auto+short+stack", compile=True, eval_bytes=8192),
    "check": Size(width=64, layers=2, wide=64, vocabulary=300, length=32, batch=2, steps=8, rate=1e-2,
                  rungs=(0.5, 1.0), recipe="ours+short+stack", compile=False, eval_bytes=256, max_documents=12,
                  threads=1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unit:
    """One run of one system, planned to a fraction of the full length."""

    system: str
    seed: int
    fraction: float
    steps: int


@dataclass(frozen=True, slots=True)
class Bench:
    """What units are run with."""

    size: Size
    device: str
    work: Path

    def folder(self, unit: Unit) -> Path:
        """Return where a unit's result lies: by all that it depends on."""
        size = {name: value for name, value in asdict(self.size).items() if name not in ("rungs", "recipe")}
        about = {"unit": asdict(unit), "size": size, "device": _device_name(self.device), **_versions()}
        return self.work / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]


# -- what a unit depends on -----------------------------------------------------------------------------------------


def _device_name(device: str) -> str:
    import torch

    from pipeline.ledger.peaks import device_name

    return device_name(torch.device(device))


@lru_cache
def _versions() -> dict[str, str]:
    """Return the digest of all code that a figure comes from, and the libraries."""
    files = sorted([*HERE.parent.glob("pipeline/**/*.py"), *HERE.parent.glob("configs/**/*.yaml"), *RECIPES.iterdir(),
                    HERE / "hours_to_quality.py"])  # fmt: skip
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    return {"source": digest, **{name: version(name) for name in ("torch", "transformers", "accelerate")}}


def _data_config(size: Size) -> Any:
    from pipeline.config import DataConfig

    return DataConfig(vocabulary_size=size.vocabulary, max_documents=size.max_documents)


@lru_cache
def _data(size: Size) -> Any:
    from pipeline.config import Task
    from pipeline.data.load import load_dataset

    return load_dataset(_data_config(size), Task.causal_lm)


def base_model(bench: Bench, seed: int) -> Path:
    """Return the first weights of a seed with their tokenizer, on disk: the same for every system."""
    import torch

    from pipeline.config import Task, TinyShape
    from pipeline.data.tokenizer import embedded_tokenizer
    from pipeline.models import make_tiny, save_model

    size = bench.size
    made = hashlib.sha256(
        repr((size.width, size.layers, size.wide, size.vocabulary, seed, _data(size).digest)).encode()
    )
    folder = bench.work / "base" / made.hexdigest()[:20]
    if folder.is_dir():
        return folder
    tokenizer = embedded_tokenizer(_data(size).splits["train"], size.vocabulary, bench.work / "tokenizers")
    shape = TinyShape(hidden_size=size.width, layers=size.layers, heads=size.width // 64, intermediate_size=size.wide)
    torch.manual_seed(seed)
    temporary = folder.with_suffix(".new")
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(make_tiny(shape, len(tokenizer), Task.causal_lm, None, tokenizer), tokenizer, temporary)
    temporary.rename(folder)
    return folder


def _encoded(size: Size, base: Path, split: str, max_bytes: int | None = None) -> list[Any]:
    from pipeline.config import Task
    from pipeline.data.encode import encode_all
    from pipeline.models import load_tokenizer

    documents = sorted(_data(size).splits[split], key=lambda document: document.digest)
    return encode_all(
        documents if max_bytes else _data(size).splits[split], load_tokenizer(base), Task.causal_lm,
        max_length=size.length, max_bytes=max_bytes,
    )  # fmt: skip


# -- ours -----------------------------------------------------------------------------------------------------------


def parts_of(system: str) -> list[str]:
    """Return the parts of one of our systems.

    Raises:
        ValueError: For a name that is none, or parts that exclude one another.
    """
    name, *parts = system.split("+")
    unknown = [part for part in parts if part not in PARTS]
    if name != "ours" or unknown:
        raise ValueError(
            f"{system}: give trainer, trainer_rate, or ours with parts ({', '.join(PARTS)}) put to it by +"
        )
    for one, two in (("auto", "pure"), ("auto", "fp32"), ("pure", "fp32"), ("stack", "taught"), ("short", "taught")):
        if one in parts and two in parts:
            raise ValueError(f"{system}: {one} and {two} exclude one another")
    return parts


def settings_of(system: str, size: Size, steps: int) -> list[str]:
    """Return recipe and overrides of one of our systems, planned to `steps`; the shallow model's are among them."""
    parts = parts_of(system)
    precision = next((PRECISIONS[part] for part in parts if part in PRECISIONS), "bf16")
    shallow = max(1, round(SHALLOW * steps))
    settings = [f"precision={precision}", f"training.learning_rate={size.rate}"]
    if "short" in parts:
        settings.append(f"training.start_sequence_length={size.length // SHORTEST}")
    if "stack" in parts:
        return [
            "recipe=stacked",
            *settings,
            f"stages.shallow.steps={shallow}",
            f"stages.trained.steps={steps - shallow}",
        ]
    if "taught" in parts:
        return ["recipe=taught", *settings, f"stages.shallow.steps={shallow}", f"stages.trained.steps={steps}"]
    return ["recipe=plain", *settings, f"stages.trained.steps={steps}"]


def run_ours(bench: Bench, unit: Unit, base: Path, root: Path) -> tuple[dict[str, Any], Path]:
    """Run one of our systems through its recipe; return what it is charged with, and its model."""
    from pipeline.cli import main
    from pipeline.ledger.journal import read_events

    size = bench.size
    settings = [
        *settings_of(unit.system, size, unit.steps), f"model.path={base}", f"data.vocabulary_size={size.vocabulary}",
        f"training.batch_size={size.batch}", f"training.sequence_length={size.length}", f"seed={unit.seed}",
        f"training.compile={str(size.compile).lower()}", "training.eval_every=1000000", "training.eval_documents=1",
        "quality.max_documents=2", "quality.max_bytes_per_document=256", "quality.bootstrap=200",
        f"hardware.device={bench.device}", "tracking=off", f"tracking.root={root / 'mlruns'}",
    ]  # fmt: skip
    settings += [] if size.max_documents is None else [f"data.max_documents={size.max_documents}"]
    settings += [] if size.threads is None else [f"hardware.num_threads={size.threads}"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(["--recipe-dir", str(RECIPES), *settings], started_ns=time.monotonic_ns())
    if code:
        raise SystemExit(f"{unit}: ended with {code}\n{printed.getvalue()[-4000:]}")
    result = json.loads((root / "mlruns/latest/result.json").read_text())
    took = charged(result["rows"], read_events(root / "mlruns/runs" / result["run_id"] / "journal.jsonl"))
    artifact = next(row["artifact"] for row in reversed(result["rows"]) if row["arm"] == "trained" and row["artifact"])
    about = json.loads((Path(artifact["path"]) / "artifact.json").read_text())
    took |= {
        # what a teacher read is charged, but the length of the run is that of the model
        "tokens": sum(stage["tokens"] for name, stage in took["stages"].items()
                      if name == "trained" or (name == "shallow" and "stack" in unit.system)),
        "precision": about.get("precision", {}).get("chosen"),
    }  # fmt: skip
    return took, Path(artifact["path"])


# -- transformers' Trainer --------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _rows_for_trainer(size: Size, base: Path) -> Any:
    """Return the very windows that our loop reads, as a user has them after tokenizing and grouping."""
    import numpy as np
    from datasets import Dataset

    from pipeline.data.batches import PackedBatches

    packed = PackedBatches(_encoded(size, base, "train"), sequence_length=size.length, batch_size=size.batch, seed=0)
    ids = packed.read(np.arange(packed.num_rows))["input_ids"].numpy()
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def run_trainer(bench: Bench, unit: Unit, base: Path, root: Path) -> tuple[dict[str, Any], Path]:
    """Run transformers' Trainer in bf16 as it ships; return what it is charged with, and its model.

    What would only cost it time is off: its checkpoints, its log and its progress bar. Windows that do not fill a batch
    at the end of an epoch are left out, so that it reads as many tokens as the others.
    """
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

    from pipeline.config import Task
    from pipeline.ledger.flops import count_flops

    size, out = bench.size, root / "trainer"
    more = {"learning_rate": size.rate} if unit.system == "trainer_rate" else {}
    rows = _rows_for_trainer(size, base)
    _synchronise(bench.device)
    before = time.monotonic_ns()
    set_seed(unit.seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    args = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=size.batch, bf16=True, max_steps=unit.steps, seed=unit.seed,
        use_cpu=bench.device == "cpu", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        dataloader_drop_last=True, dataloader_pin_memory=bench.device != "cpu", **more,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    trainer.save_model(str(out))
    _synchronise(bench.device)
    work_h = (time.monotonic_ns() - before) / HOUR_NS
    tokens = size.batch * size.length  # a step's, each of them predicted
    flops = count_flops(model, Task.causal_lm, backward=True).batch(size.batch, size.length, tokens)
    took = {
        "work_h": work_h, "retry_h": 0.0, "evaluation_h": 0.0, "flops": unit.steps * flops, "tokens": unit.steps * tokens,
        "stages": {}, "phases_s": {}, "precision": "bf16",
    }  # fmt: skip
    return took, out


# -- one unit ---------------------------------------------------------------------------------------------------------


def _synchronise(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def read_validation(bench: Bench, base: Path, folder: Path) -> float:
    """Return the validation bits per byte of a model on disk, in fp32: by one path for every system."""
    import torch

    from pipeline.assess.scoring import validation_metric
    from pipeline.config import Precision, Task
    from pipeline.models import load_model, load_tokenizer
    from pipeline.training.precision import arithmetic

    device, size = torch.device(bench.device), bench.size
    model = load_model(folder, Task.causal_lm, device=device)
    with arithmetic(Precision.fp32, device):
        return validation_metric(
            model, _encoded(size, base, "validation", size.eval_bytes), Task.causal_lm, sequence_length=size.length,
            batch_size=16, device=device, pad_id=load_tokenizer(base).pad_token_id,
        )  # fmt: skip


def prepare(bench: Bench, base: Path) -> None:
    """Have done what is charged to none: imports, tokens, threads, the device's context."""
    import torch

    from pipeline.data import encode
    from pipeline.opening import quiet_libraries

    encode.KEEP = 32  # a later run finds its tokens in memory, as they are charged to none
    quiet_libraries()
    if bench.size.threads is not None:
        torch.set_num_threads(bench.size.threads)
    square = torch.ones(64, 64, device=bench.device, requires_grad=True)
    torch.autograd.backward((square @ square).sum())
    _rows_for_trainer(bench.size, base)


def measure(bench: Bench, unit: Unit) -> dict[str, Any]:
    """Run a unit in this process, or go on with it; leave its result on disk, whole or not at all."""
    folder = bench.folder(unit)
    base = base_model(bench, unit.seed)
    prepare(bench, base)
    run = run_trainer if unit.system.startswith("trainer") else run_ours
    root = folder.with_suffix(".part")
    root.mkdir(parents=True, exist_ok=True)
    wall, busy = time.monotonic(), time.process_time()
    took, model = run(bench, unit, base, root)
    wall_s, busy_s = time.monotonic() - wall, time.process_time() - busy
    before = time.monotonic_ns()
    metric = read_validation(bench, base, model)
    found = {
        **asdict(unit), **took, "metric": metric,
        "evaluation_h": took["evaluation_h"] + (time.monotonic_ns() - before) / HOUR_NS,
        "wall_s": wall_s, "cpu_s": busy_s, "load": os.getloadavg()[0], "commit": _commit(),
    }  # fmt: skip
    write_whole(folder.with_suffix(".json"), found)
    shutil.rmtree(root)
    return found


def write_whole(path: Path, content: Any) -> None:
    """Write JSON so that it is there whole or not at all."""
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _commit() -> str:
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def result_of(bench: Bench, unit: Unit) -> dict[str, Any]:
    """Return what a unit took: from disk where it is finished, else by running it.

    Where the size compiles, in a process of its own with empty caches of kernels: what compiling costs a user is
    charged every time.
    """
    path = bench.folder(unit).with_suffix(".json")
    if not path.is_file():
        if bench.size.compile:
            caches = {name: str(bench.folder(unit).with_suffix(".part") / name.lower())
                      for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}  # fmt: skip
            given = json.dumps({"unit": asdict(unit), "size": asdict(bench.size), "device": bench.device,
                                "work": str(bench.work)})  # fmt: skip
            subprocess.run([sys.executable, __file__, "--unit", given], check=True, env={**os.environ, **caches})
        else:
            measure(bench, unit)
    return json.loads(path.read_text())


def _unit_of(given: str) -> tuple[Bench, Unit]:
    raw = json.loads(given)
    raw["size"]["rungs"] = tuple(raw["size"]["rungs"])
    return Bench(Size(**raw["size"]), raw["device"], Path(raw["work"])), Unit(**raw["unit"])


# -- ladders ----------------------------------------------------------------------------------------------------------


def planned(found: dict[str, Any]) -> Planned:
    """Return a unit's result as the arithmetic wants it."""
    names = ("fraction", "tokens", "metric", "work_h", "retry_h", "flops")
    return Planned(**{name: found[name] for name in names})


def undisturbed(found: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return a unit's result with the device-hours it would have had with the processor to itself."""
    share = min(1.0, found["cpu_s"] / (found["wall_s"] * threads))
    return {**found, "work_h": found["work_h"] * share}


def climb_down(
    bench: Bench, systems: Sequence[str], seed: int, margin: float
) -> dict[str, dict[float, dict[str, Any]]]:
    """Run every system from the full length down, in turn, each until its loosest target is out of reach."""
    ladder = bench.size.rungs
    found: dict[str, dict[float, dict[str, Any]]] = {system: {} for system in systems}
    for fraction in reversed(ladder):
        for at, system in enumerate(systems):
            if fraction < FULL:
                targets = [target(_runs(found[base]), margin) for base in systems[: at + 1]]
                if settled(_runs(found[system]), ladder, max(targets)):
                    continue
            unit = Unit(system, seed, fraction, round(fraction * bench.size.steps))
            found[system][fraction] = each = result_of(bench, unit)
            print(said(each), flush=True)
    return found


def said(found: dict[str, Any]) -> str:
    """Return one unit's figures in a line."""
    search = found["phases_s"].get("search", 0.0)
    return (
        f"seed {found['seed']:3} {found['system']:24} {found['fraction']:6.1%} {found['tokens']:12,} tokens "
        f"{found['metric']:.4f} bits/byte {found['work_h'] * 3600:9.2f} device-s (search {search:.1f}) + "
        f"evaluation {found['evaluation_h'] * 3600:.1f}; load {found['load']:.1f}"
    )


def _runs(found: dict[float, dict[str, Any]]) -> Runs:
    return {fraction: planned(each) for fraction, each in found.items()}


def compare_all(
    by_seed: dict[int, dict[str, dict[float, dict[str, Any]]]], systems: Sequence[str], ladder: Sequence[float],
    margin: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return every system against every one before it, seed by seed and over seeds."""
    pairs = [(arm, base) for at, arm in enumerate(systems) for base in systems[:at]]
    found: list[dict[str, Any]] = []
    for arm, base in pairs:
        per_seed = {
            seed: compare(arm, _runs(each[arm]), base, _runs(each[base]), ladder, margin)
            for seed, each in by_seed.items()
        }
        found.append({"arm": arm, "base": base, **over_seeds(list(per_seed.values())), "per_seed": per_seed})
    return found


def without_others(bench: Bench, by_seed: Any, systems: Sequence[str], margin: float) -> list[dict[str, Any]]:
    """Return the comparisons as if every run had had the processor to itself; none on an accelerator."""
    threads = bench.size.threads
    if threads is None:
        return []
    alone = {seed: {system: {fraction: undisturbed(one, threads) for fraction, one in runs.items()}
                    for system, runs in each.items()} for seed, each in by_seed.items()}  # fmt: skip
    return compare_all(alone, systems, bench.size.rungs, margin)


def table(
    systems: Sequence[str], by_seed: dict[int, Any], comparisons: list[dict[str, Any]], alone: list[dict[str, Any]]
) -> str:
    """Return the figures in lines: full lengths, then savings."""
    loads = [one["load"] for each in by_seed.values() for runs in each.values() for one in runs.values()]
    lines = [
        f"load average of the machine, {os.cpu_count()} cores: {statistics.median(loads):.1f}, {max(loads):.1f} at most"
    ]
    lines.append(f"{'at full length':24} {'bits/byte':>10} {'device-s':>10} {'evaluation':>10} {'TFLOP':>10}")
    for system in systems:
        full = [each[system][FULL] for each in by_seed.values()]
        mean = {
            name: statistics.mean(one[name] for one in full) for name in ("metric", "work_h", "evaluation_h", "flops")
        }
        lines.append(f"{system:24} {mean['metric']:10.4f} {mean['work_h'] * 3600:10.2f} "
                     f"{mean['evaluation_h'] * 3600:10.2f} {mean['flops'] / 1e12:10.3f}")  # fmt: skip
    lines.append(f"{'to the final loss of':24} {'by':24} {'device-hours saved':>32} {'systems':>9} {'algorithmic':>11}"
                 "  share of the tokens, arm/base, by seed")  # fmt: skip
    for each in comparisons:
        at = ", ".join(f"{one['at']['arm']['fraction']:.1%}/{one['at']['base']['fraction']:.1%}"
                       for one in each["per_seed"].values())  # fmt: skip
        split = ["" if each[name]["v"] is None else f"{each[name]['v']:+.1%}" for name in ("systems", "algorithmic")]
        lines.append(f"{each['base']:24} {each['arm']:24} {_saving(each):>32} {split[0]:>9} {split[1]:>11}  {at}")
    if alone:
        lines.append("the same, had every run had the processor to itself (no device-hours):")
    lines += [f"{each['base']:24} {each['arm']:24} {_saving(each):>32}" for each in alone]
    return "\n".join(lines)


def _saving(each: dict[str, Any]) -> str:
    value = each["saving"]
    if value["v"] is None:
        bound = each["bound"]["v"]
        return f"censored, below {bound:+.1%}"
    ends = "" if value["ci"] is None else f" ({value['ci'][0]:+.1%} to {value['ci'][1]:+.1%})"
    return f"{'>= ' if each['at_least'] else ''}{value['v']:+.1%}{ends}"


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
    parser.add_argument("--systems", nargs="+", help="in order: each is compared with all before it")
    parser.add_argument("--recipe", help="ours with parts put to it by +")
    parser.add_argument("--rungs", nargs="+", type=float, help="shares of the full length, the last 1")
    parser.add_argument("--rate", type=float, help="learning rate of all systems but `trainer`")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--parts", action="store_true", help="measure every part too")
    parser.add_argument("--work", type=Path, default=HERE.parent / "mlruns/hours_to_quality")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.unit is not None:
        measure(*_unit_of(args.unit))
        return
    size = SIZES[args.size]
    given = {"recipe": args.recipe, "rate": args.rate, "compile": args.compile,
             "rungs": args.rungs and tuple(sorted(args.rungs))}  # fmt: skip
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    systems = args.systems or ["trainer", "trainer_rate", "ours", size.recipe]
    for system in systems:
        if not system.startswith("trainer"):
            parts_of(system)
    bench = Bench(size, args.device or ("cuda" if args.size == "h200" else "cpu"), args.work.resolve())
    report(bench, systems, args.seeds, args.margin, parts=args.parts, save=args.save)


def report(
    bench: Bench, systems: Sequence[str], seeds: Sequence[int], margin: float, *, parts: bool, save: bool
) -> dict[str, Any]:
    """Measure all, print it, and save it if asked to."""
    bench.work.mkdir(parents=True, exist_ok=True)
    (bench.work / "base").mkdir(exist_ok=True)
    warm_up(bench, systems, seeds[0])
    chosen = measure_parts(bench, PART_SEEDS) if parts else {}
    by_seed = {seed: climb_down(bench, systems, seed, margin) for seed in seeds}
    comparisons = compare_all(by_seed, systems, bench.size.rungs, margin)
    alone = without_others(bench, by_seed, systems, margin)
    lines = table(systems, by_seed, comparisons, alone)
    print(lines, flush=True)
    units = [each for ladder in by_seed.values() for runs in ladder.values() for each in runs.values()]
    figures = {"size": asdict(bench.size), "margin": margin, "systems": list(systems), "comparisons": comparisons,
               "undisturbed": alone,
               "units": units, "parts": chosen}  # fmt: skip
    if save:
        everything = [*(each for runs in chosen.values() for each in runs), *units]
        save_result("hours_to_quality", figures, "\n".join([*map(said, everything), lines]))
    return figures


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
