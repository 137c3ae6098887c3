"""One run of `hours_to_quality.py`: a system planned to a length, what it is charged with, and its
loss.

Nothing here chooses what is run or says what it means: a result stays valid as long as this file,
the recipes beside it and `pipeline/` are what they were.

    python benchmarks/quality_units.py JSON

runs one unit in a process of its own, as `result_of` starts it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPES = HERE / "hours_to_quality_recipes"
PARTS = ("auto", "pure", "fp32", "short", "stack", "taught")
PRECISIONS = {"auto": "auto", "pure": "bf16_pure", "fp32": "fp32"}
SHALLOW = 0.35  # of the steps, that the shallow model takes
SHORTEST = 4  # windows begin at this part of their length
HOUR_NS = 3600e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is trained, for how long, and which recipe is put beside it.

    Attributes:
        shares: Shares of `steps` to which runs are planned, rising; the last is 1.
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
    shares: tuple[float, ...]
    recipe: str
    compile: bool
    eval_bytes: int
    max_documents: int | None = None
    threads: int | None = None


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
        size = {
            name: value
            for name, value in asdict(self.size).items()
            if name not in ("shares", "recipe")
        }
        about = {
            "unit": asdict(unit),
            "size": size,
            "device": _device_name(self.device),
            **_versions(),
        }
        return (
            self.work / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
        )


# -- what a unit depends on -----------------------------------------------------------------------


def _device_name(device: str) -> str:
    import torch

    from pipeline.ledger.peaks import device_name

    return device_name(torch.device(device))


@lru_cache
def _versions() -> dict[str, str]:
    """Return the digest of all code that a figure comes from, and the libraries."""
    files = sorted(
        [
            *HERE.parent.glob("pipeline/**/*.py"),
            *HERE.parent.glob("configs/**/*.yaml"),
            *RECIPES.iterdir(),
            HERE / "quality_units.py",
        ]
    )
    digest = hashlib.sha256(
        b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
    ).hexdigest()
    return {
        "source": digest,
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


def _data_config(size: Size) -> Any:
    from pipeline.config.settings.data import DataConfig

    return DataConfig(vocabulary_size=size.vocabulary, max_documents=size.max_documents)


@lru_cache
def _data(size: Size) -> Any:
    from pipeline.data.load import load_dataset
    from pipeline.tasks.table import Task

    return load_dataset(_data_config(size), Task.causal_lm)


def base_model(bench: Bench, seed: int) -> Path:
    """Return the first weights of a seed with their tokenizer, on disk: the same for every
    system.
    """
    import torch

    from pipeline.config.settings.model import TinyShape
    from pipeline.data.tokenizer import embedded_tokenizer
    from pipeline.models.load import make_tiny, save_model
    from pipeline.tasks.table import Task

    size = bench.size
    made = hashlib.sha256(
        repr(
            (size.width, size.layers, size.wide, size.vocabulary, seed, _data(size).digest)
        ).encode()
    )
    folder = bench.work / "base" / made.hexdigest()[:20]
    if folder.is_dir():
        return folder
    tokenizer = embedded_tokenizer(
        _data(size).splits["train"], size.vocabulary, bench.work / "tokenizers"
    )
    shape = TinyShape(
        hidden_size=size.width,
        layers=size.layers,
        heads=size.width // 64,
        intermediate_size=size.wide,
    )
    torch.manual_seed(seed)
    temporary = folder.with_suffix(".new")
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(
        make_tiny(shape, len(tokenizer), Task.causal_lm, None, tokenizer), tokenizer, temporary
    )
    temporary.rename(folder)
    return folder


def _encoded(size: Size, base: Path, split: str, max_bytes: int | None = None) -> list[Any]:
    from pipeline.data.encode import encode_all
    from pipeline.models.load import load_tokenizer
    from pipeline.tasks.table import Task

    documents = sorted(_data(size).splits[split], key=lambda document: document.digest)
    return encode_all(
        documents if max_bytes else _data(size).splits[split],
        load_tokenizer(base),
        Task.causal_lm,
        max_length=size.length,
        max_bytes=max_bytes,
    )


# -- ours -----------------------------------------------------------------------------------------


def parts_of(system: str) -> list[str]:
    """Return the parts of one of our systems.

    Raises:
        ValueError: For a name that is none, or parts that exclude one another.
    """
    name, *parts = system.split("+")
    unknown = [part for part in parts if part not in PARTS]
    if name != "ours" or unknown:
        raise ValueError(
            f"{system}: give trainer, trainer_rate, or ours with parts ({', '.join(PARTS)}) put to"
            " it by +"
        )
    for one, two in (
        ("auto", "pure"),
        ("auto", "fp32"),
        ("pure", "fp32"),
        ("stack", "taught"),
        ("short", "taught"),
    ):
        if one in parts and two in parts:
            raise ValueError(f"{system}: {one} and {two} exclude one another")
    return parts


def settings_of(system: str, size: Size, steps: int) -> list[str]:
    """Return recipe and overrides of one of our systems, planned to `steps`; the shallow model's
    are among them.
    """
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
        return [
            "recipe=taught",
            *settings,
            f"stages.shallow.steps={shallow}",
            f"stages.trained.steps={steps}",
        ]
    return ["recipe=plain", *settings, f"stages.trained.steps={steps}"]


def run_ours(bench: Bench, unit: Unit, base: Path, root: Path) -> tuple[dict[str, Any], Path]:
    """Run one of our systems through its recipe; return what it is charged with, and its model."""
    from pipeline.cli.main import main
    from pipeline.ledger.journal import read_events

    size = bench.size
    settings = [
        *settings_of(unit.system, size, unit.steps),
        f"model.path={base}",
        f"data.vocabulary_size={size.vocabulary}",
        f"training.batch_size={size.batch}",
        f"training.sequence_length={size.length}",
        f"seed={unit.seed}",
        f"training.compile={'always' if size.compile else 'never'}",
        "training.eval_every=1000000",
        "training.eval_documents=1",
        "quality.max_documents=2",
        "quality.max_bytes_per_document=256",
        "quality.bootstrap=200",
        f"hardware.device={bench.device}",
        "tracking=off",
        f"tracking.root={root / 'mlruns'}",
    ]
    settings += [] if size.max_documents is None else [f"data.max_documents={size.max_documents}"]
    settings += [] if size.threads is None else [f"hardware.num_threads={size.threads}"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(["--recipe-dir", str(RECIPES), *settings], started_ns=time.monotonic_ns())
    if code:
        raise SystemExit(f"{unit}: ended with {code}\n{printed.getvalue()[-4000:]}")
    result = json.loads((root / "mlruns/latest/result.json").read_text())
    took = charged(
        result["rows"], read_events(root / "mlruns/runs" / result["run_id"] / "journal.jsonl")
    )
    artifact = next(
        row["artifact"]
        for row in reversed(result["rows"])
        if row["arm"] == "trained" and row["artifact"]
    )
    about = json.loads((Path(artifact["path"]) / "artifact.json").read_text())
    took |= {
        # what a teacher read is charged, but the length of the run is that of the model
        "tokens": sum(
            stage["tokens"]
            for name, stage in took["stages"].items()
            if name == "trained" or (name == "shallow" and "stack" in unit.system)
        ),
        "precision": about.get("precision", {}).get("chosen"),
    }
    return took, Path(artifact["path"])


# -- what a run is charged with -------------------------------------------------------------------


def charged(
    rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what a recipe's rows took, stage by stage and in all: what its model is charged with.

    Every stage that the rows name counts, reused ones at what they once took. Evaluation stands
    apart: the assessment, and what training read on validation (a compiled model compiles for it
    anew).

    Args:
        events: Of the run's journal; its windows say what part of the work was evaluation.
    """
    stages: dict[str, dict[str, float]] = {}
    for row in rows:
        hours, counts = row["ledger"]["device_hours"], row["ledger"]["counts"]
        nothing = {"work_h": 0.0, "retry_h": 0.0, "evaluation_h": 0.0, "flops": 0.0, "tokens": 0}
        stage = stages.setdefault(row["arm"], nothing)
        for name, part in (("work_h", "work"), ("retry_h", "retry"), ("evaluation_h", "assess")):
            stage[name] += hours[part]["value"] or 0.0
        # an attempt that led nowhere counted what another one counts again
        if row["artifact"] is not None:
            stage["flops"], stage["tokens"] = (
                counts["model_flops"]["value"],
                counts["tokens"]["value"],
            )
    phases_ns: dict[str, int] = {}
    for event in work_windows(events):
        evaluated_h = event["phases_ns"].get("eval", 0) / HOUR_NS
        stages[event["arm"]]["work_h"] -= evaluated_h
        stages[event["arm"]]["evaluation_h"] += evaluated_h
        for name, spent_ns in event["phases_ns"].items():
            phases_ns[name] = phases_ns.get(name, 0) + spent_ns
    names = ("work_h", "retry_h", "evaluation_h", "flops")
    whole = {name: math.fsum(stage[name] for stage in stages.values()) for name in names}
    return {
        **whole,
        "stages": stages,
        "phases_s": {name: each / 1e9 for name, each in phases_ns.items()},
    }


def work_windows(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the windows in which stages worked, of those that were not lost."""
    windows = [event for event in events if event["e"] == "window"]
    return [
        event
        for event in windows
        if event["window"]["kind"] == "work" and event["window"]["kept_ns"] > 0
    ]


# -- transformers' Trainer ------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _rows_for_trainer(size: Size, base: Path) -> Any:
    """Return the very windows that our loop reads, as a user has them after tokenizing and
    grouping.
    """
    import numpy as np
    from datasets import Dataset

    from pipeline.data.batches import PackedBatches

    packed = PackedBatches(
        _encoded(size, base, "train"), sequence_length=size.length, batch_size=size.batch, seed=0
    )
    ids = packed.read(np.arange(packed.num_rows))["input_ids"].numpy()
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def run_trainer(bench: Bench, unit: Unit, base: Path, root: Path) -> tuple[dict[str, Any], Path]:
    """Run transformers' Trainer in bf16 as it ships; return what it is charged with, and its model.

    What would only cost it time is off: its checkpoints, its log and its progress bar. Windows that
    do not fill a batch at the end of an epoch are left out, so that it reads as many tokens as the
    others.
    """
    from transformers import (
        AutoModelForCausalLM,
        PrinterCallback,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from pipeline.ledger.flops import count_flops
    from pipeline.tasks.table import Task

    size, out = bench.size, root / "trainer"
    more = {"learning_rate": size.rate} if unit.system == "trainer_rate" else {}
    rows = _rows_for_trainer(size, base)
    _synchronise(bench.device)
    before = time.monotonic_ns()
    set_seed(unit.seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    args = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=size.batch,
        bf16=True,
        max_steps=unit.steps,
        seed=unit.seed,
        use_cpu=bench.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=bench.device != "cpu",
        **more,
    )
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
        "work_h": work_h,
        "retry_h": 0.0,
        "evaluation_h": 0.0,
        "flops": unit.steps * flops,
        "tokens": unit.steps * tokens,
        "stages": {},
        "phases_s": {},
        "precision": "bf16",
    }
    return took, out


# -- one unit -------------------------------------------------------------------------------------


def _synchronise(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def read_validation(bench: Bench, base: Path, folder: Path) -> float:
    """Return the validation bits per byte of a model on disk, in fp32: by one path for every
    system.
    """
    import torch

    from pipeline.config.settings.precision import Precision
    from pipeline.data.padding import Padding
    from pipeline.evaluation.quality.scoring import validation_metric
    from pipeline.models.load import load_model, load_tokenizer
    from pipeline.tasks.table import Task
    from pipeline.training.precision import arithmetic

    device, size = torch.device(bench.device), bench.size
    model = load_model(folder, Task.causal_lm, device=device)
    with arithmetic(Precision.fp32, device):
        return validation_metric(
            model,
            _encoded(size, base, "validation", size.eval_bytes),
            Task.causal_lm,
            sequence_length=size.length,
            batch_size=16,
            device=device,
            padding=Padding.of(load_tokenizer(base), model, Task.causal_lm),
        )


def prepare(bench: Bench, base: Path) -> None:
    """Have done what is charged to none: imports, tokens, threads, the device's context."""
    import torch

    from pipeline.data import encode
    from pipeline.runs.opening import quiet_libraries

    encode.KEEP = 32  # a later run finds its tokens in memory, as they are charged to none
    quiet_libraries()
    if bench.size.threads is not None:
        torch.set_num_threads(bench.size.threads)
    square = torch.ones(64, 64, device=bench.device, requires_grad=True)
    torch.autograd.backward((square @ square).sum())
    _rows_for_trainer(bench.size, base)


def measure(bench: Bench, unit: Unit) -> dict[str, Any]:
    """Run a unit in this process, or go on with it; leave its result on disk, whole or not at
    all.
    """
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
        **asdict(unit),
        **took,
        "metric": metric,
        "evaluation_h": took["evaluation_h"] + (time.monotonic_ns() - before) / HOUR_NS,
        "wall_s": wall_s,
        "cpu_s": busy_s,
        "load": os.getloadavg()[0],
        "commit": _commit(),
    }
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
    done = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def result_of(bench: Bench, unit: Unit) -> dict[str, Any]:
    """Return what a unit took: from disk where it is finished, else by running it.

    Where the size compiles, in a process of its own with empty caches of kernels: what compiling
    costs a user is charged every time.
    """
    path = bench.folder(unit).with_suffix(".json")
    if not path.is_file():
        if bench.size.compile:
            caches = {
                name: str(bench.folder(unit).with_suffix(".part") / name.lower())
                for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
            }
            given = json.dumps(
                {
                    "unit": asdict(unit),
                    "size": asdict(bench.size),
                    "device": bench.device,
                    "work": str(bench.work),
                }
            )
            subprocess.run(
                [sys.executable, __file__, given], check=True, env={**os.environ, **caches}
            )
        else:
            measure(bench, unit)
    return json.loads(path.read_text())


def _unit_of(given: str) -> tuple[Bench, Unit]:
    raw = json.loads(given)
    raw["size"]["shares"] = tuple(raw["size"]["shares"])
    return Bench(Size(**raw["size"]), raw["device"], Path(raw["work"])), Unit(**raw["unit"])


if __name__ == "__main__":
    measure(*_unit_of(sys.argv[1]))
