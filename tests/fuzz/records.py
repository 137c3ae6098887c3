"""Records and files: whatever is damaged, what reads it takes it as if absent, or refuses it in one
line.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_assess_models import tiny
from make_result import make_result

from fuzz.mutate import damage, restore
from pipeline.cli.commands import register
from pipeline.cli.recipes import Recipe, config_dir, read_recipe
from pipeline.config.settings.quality import QualityConfig
from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.evaluation.quality import recorded
from pipeline.evaluation.quality.tasks import _load_yaml
from pipeline.evaluation.serving.engine import read_result
from pipeline.gate.references import Places, _of_run
from pipeline.ledger import records
from pipeline.ledger.ranks import read_lives
from pipeline.ledger.records import CHOICE, SHARD, read_record
from pipeline.runs.opening import _check_budget, _find_or_make, _unfinished
from pipeline.runs.past_cost import past_spend
from pipeline.runs.receipts import verify
from pipeline.store import verdicts as gate_record
from pipeline.store.artifacts import Store, digest_folder, facts_of, write_json
from pipeline.tasks.table import Task
from pipeline.tracking.writer import _delivered, waiting
from pipeline.training.checkpoint import load, newest, save, state_of

SLOW_S = 20.0  # of processor time


@dataclass(frozen=True)
class Target:
    """A kind of record.

    Attributes:
        make: Writes a sound one into a folder; returns the files that may be damaged.
        read: Reads what is in the folder, as the product does; returns what it took from it.
        lines: It holds a JSON object a line.
        strict: A damaged one is refused, and never taken for absent.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]
    lines: bool = False
    strict: bool = False


def _wrote(path: Path, content: Any) -> list[Path]:
    write_json(path, content)
    return [path]


# -- run.json --------------------------------------------------------------------------------------


def _run_json(folder: Path) -> list[Path]:
    run = folder / "runs" / "run-1"
    run.mkdir(parents=True)
    line = {"e": "run_start", "t": 1.0, "mono_ns": 5, "attempt": 1, "started_ns": 3}
    (run / "journal.jsonl").write_text(json.dumps(line) + "\n")
    state = {"key": "k", "status": "FAILED", "pid": None, "attempt": 1, "spent_device_hours": 0.5}
    return _wrote(run / "run.json", state)


def _read_run_json(folder: Path) -> Any:
    run = Run(recipe="distill")
    run.budget.device_hours = 9e9
    _check_budget(run, folder, "k")
    state = _unfinished(folder / "runs" / "run-1", "k")
    _, number, lock = _find_or_make(folder, "k", run)
    lock.release()
    return state, number


# -- the store -------------------------------------------------------------------------------------


def _artifact(folder: Path) -> list[Path]:
    store = Store(folder / "store")
    facts = {
        "run_id": "r",
        "device": {"kind": "cpu", "name": "d", "count": 1},
        "work_device_hours": 1.0,
        "retry_device_hours": 0.0,
        "model_flops": 1e9,
    }
    with store.scratch() as out:
        (out / "config.json").write_text("{}")
        artifact = store.commit(
            out, "model", {"arm": "a", "ledger": facts, "charge": {**facts, "existing": []}}
        )
    store.remember("keys", "k", {"artifact": artifact.to_json()})
    return [
        artifact.path / "artifact.json",
        artifact.path / "config.json",
        store.root / "keys" / "k.json",
    ]


def _read_artifact(folder: Path) -> Any:
    store = Store(folder / "store")
    found = []
    for path in sorted((store.root / "artifacts").iterdir()):
        store.find(path.name)
        found.append((facts_of(path).get("arm"), past_spend("a", str(path), "d").work_h))
    return store.recall("keys", "k"), found


def _verdict(folder: Path) -> list[Path]:
    store = Store(folder / "store")
    artifact = gate_record.record(
        store, "k", {"key": "k", "run_id": "r", "verdict": "PASS", "look": 1}
    )
    return [artifact.path / gate_record.FILE, store.root / "verdicts" / "k.json"]


def _checkpoint(folder: Path) -> list[Path]:
    model = tiny(Task.causal_lm)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        save(folder / "c", step, state_of(model, optimizer), lambda: {"history": []})
    return [
        path
        for path in sorted((folder / "c" / "step-000000002").iterdir())
        if path.suffix == ".json"
    ]


def _read_checkpoint(folder: Path) -> Any:
    said: list[str] = []
    found = newest(folder / "c", said.append)
    assert found is not None, "the one before is whole"
    model = tiny(Task.causal_lm)
    return found[1], load(found[0], model, torch.optim.AdamW(model.parameters())), said


# -- what other commands read ----------------------------------------------------------------------


def _result(folder: Path) -> list[Path]:
    return _wrote(folder / "runs" / "run-1" / "result.json", make_result(run_id="run-1"))


def _read_result(folder: Path) -> Any:
    found: list[Any] = []
    for read in (
        lambda: register.find_run(folder, "latest").name,
        lambda: register.read_charge(folder / "runs" / "run-1").to_json(),
        lambda: _of_run(
            folder / "runs" / "run-1", "run-1", "candidate", Places(folder, Store(folder / "store"))
        ),
    ):
        with contextlib.suppress(UserError):
            found.append(read())
    return found


def _delivery(folder: Path) -> list[Path]:
    run = folder / "runs" / "run-1"
    run.mkdir(parents=True)
    (run / "journal.jsonl").write_text('{"e": "run_start"}\n')
    return _wrote(
        run / "mlflow.json",
        {
            "offset": 7,
            "last": {"e": "row", "t": 1.0},
            "dead": False,
            "parent": "p",
            "children": {"a": "c"},
            "arms": {"a": {"x": {}}},
            "spans": [[1, 2, 1]],
            "ended": False,
            "noted": 1.0,
        },
    )


def _rank(folder: Path) -> list[Path]:
    life = {
        "schema": 1,
        "host": "h",
        "pid": 3,
        "rank": 0,
        "world_size": 1,
        "local_rank": 0,
        "start_ns": 5,
        "end_ns": 9,
        "device": None,
        "device_name": None,
        "phases_ns": {"forward": 4},
        "counts": {"steps": 1},
        "ended": True,
    }
    return _wrote(folder / "ranks" / "h-3-5.json", life)


def _engine(folder: Path) -> list[Path]:
    return _wrote(
        folder / "vllm.json",
        {
            "output_throughput": 5.5,
            "completed": 3,
            "median_ttft_ms": 2.0,
            "model_id": "m",
            "date": "d",
            "percentiles": {"50": 1.0},
            "failed": 0,
        },
    )


def _items(folder: Path) -> list[Path]:
    rows = [
        {"digest": f"{n:032x}", "bits": 1.5 * n, "bytes": 3, "tokens": 2, "correct": n % 2}
        for n in range(6)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / "items.jsonl"]


def _read_items(folder: Path) -> Any:
    config = QualityConfig(bootstrap=200)
    taken = recorded.take_recorded(
        folder / "items.jsonl", folder / "kept.jsonl", Task.causal_lm, config, "candidate_items"
    )
    return taken, recorded.values_digest(folder / "kept.jsonl")


def _note(folder: Path) -> list[Path]:
    recorded.write_identity(
        folder / "items.jsonl", data="d", split="test", evaluation="e", artifact="a"
    )
    return [recorded.about(folder / "items.jsonl")]


def _choice(folder: Path) -> list[Path]:
    return _wrote(
        folder / "x.json", {"chosen": "bf16", "said": ["a"], "trials": [{"x": 1}], "not_tried": []}
    )


def _shard(folder: Path) -> list[Path]:
    history = [{"run_id": "r", "attempt": 1, "step": 6, "phases_ns": {"capture": 5}}]
    counts = {
        "windows": 1,
        "tokens": 2,
        "read": 2,
        "bytes": 3,
        "flops": 4.0,
        "capture_ns": 5,
        "step": 6,
    }
    return _wrote(folder / "x.json", {"sha256": "a", **counts, "history": history})


def _recipe(folder: Path) -> list[Path]:
    shutil.copyfile(config_dir().parent / "recipes" / "distill.yaml", folder / "mine.yaml")
    (folder / "json.yaml").write_text(
        json.dumps(
            {
                "primary_arm": "a",
                "stages": {"a": {"steps": 3}},
                "compare": [{"arm": "a", "base": "b", "on": ["quality"]}],
                "defaults": [{"/stage@stages.a": "train"}],
            }
        )
    )
    return [folder / "mine.yaml", folder / "json.yaml"]


def _read_recipes(folder: Path) -> Any:
    found: list[Any] = []
    for name in ("mine", "json"):
        with contextlib.suppress(UserError):
            found.append(read_recipe(Recipe(name, folder / f"{name}.yaml", "?")))
    return found


def _task(folder: Path) -> list[Path]:
    (folder / "x.yaml").write_text(
        json.dumps({"task": "x", "dataset_path": "json", "metric_list": [{"metric": "acc"}]})
    )
    return [folder / "x.yaml"]


def _receipt(folder: Path) -> list[Path]:
    sha256, figure = "0" * 64, {"value": 1.5, "provenance": "measured", "ci": [1.0, 2.0]}
    receipt = {
        "schema": 1,
        **dict.fromkeys(("run_id", "recipe", "question", "created", "release", "task"), "x"),
        "commit": None,
        "primary_arm": "a",
        "seeds": [0],
        "device": {"kind": "cpu", "name": "c", "count": 1},
        "data": {"name": "d", "digest": "e", "splits": {"test": 3}},
        "digests": {
            "journal": {"bytes": 7, "sha256": sha256},
            **dict.fromkeys(("result", "settings", "schema"), sha256),
            "evidence": {"f": sha256},
        },
        "artifacts": [{"arm": "a", "seed": 0, "kind": "model", "digest": "0" * 32, "bytes": 5}],
        "figures": {"run/spent": figure},
        "left_out": {"run/cost": "later"},
    }
    return _wrote(folder / "receipt.json", receipt)


TARGETS: dict[str, Target] = {
    "run.json": Target(_run_json, _read_run_json),
    "artifact.json, keys": Target(_artifact, _read_artifact),
    "verdict": Target(
        _verdict, lambda folder: gate_record.recall(Store(folder / "store"), "k"), strict=True
    ),
    "checkpoint": Target(_checkpoint, _read_checkpoint),
    "result.json": Target(_result, _read_result),
    "mlflow.json": Target(
        _delivery, lambda folder: (_delivered(folder / "runs" / "run-1"), waiting(folder))
    ),
    "ranks": Target(_rank, lambda folder: read_lives(folder, "h")),
    "serving.results": Target(
        _engine, lambda folder: read_result(folder / "vllm.json", "serving.results")
    ),
    "candidate_items": Target(_items, _read_items, lines=True),
    "about.json": Target(_note, lambda folder: recorded.read_identity(folder / "items.jsonl")),
    "precision.json": Target(_choice, lambda folder: read_record(folder / "x.json", CHOICE)),
    "shard.json": Target(_shard, lambda folder: read_record(folder / "x.json", SHARD)),
    "receipt.json": Target(_receipt, lambda folder: verify.read_receipt(folder / "receipt.json")),
    "recipes": Target(_recipe, _read_recipes),
    "quality.tasks": Target(_task, lambda folder: _load_yaml(folder / "x.yaml")),
}


def try_records(name: str, seed: int, count: int, folder: Path) -> dict[str, int]:
    """Damage a kind of record `count` times; return how often it was read, refused and taken for
    what it was.

    Raises:
        AssertionError: Where something else than a refusal of one line came of it, or it took too
            long.
    """
    target, rng = TARGETS[name], random.Random(f"{name} {seed}")
    sound, work = folder / "sound", folder / "work"
    sound.mkdir(parents=True)
    files = target.make(sound)
    restore(sound, work)
    with contextlib.redirect_stdout(io.StringIO()):
        whole = target.read(work)
    assert whole is not None, f"the sound {name} is not read"
    ends = {"read": 0, "refused": 0, "the same": 0}
    for number in range(count):
        restore(sound, work)
        path = work / rng.choice(files).relative_to(sound)
        how = damage(path, rng, lines=target.lines)
        what, started = (name, seed, number, path.name, how), time.process_time()
        records._reported.clear()
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                found = target.read(work)
            assert not target.strict or found in (whole, None), what
            ends["the same" if found == whole else "read"] += 1
        except UserError:
            ends["refused"] += 1
        except Exception as error:
            raise AssertionError(what) from error
        assert all(line.startswith("note: ") for line in said.getvalue().splitlines()), (
            what,
            said.getvalue(),
        )
        assert time.process_time() - started < SLOW_S, what
    assert digest_folder(sound)[1] > 0
    return ends
