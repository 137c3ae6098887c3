"""One attempt at a run: its folder, its journal, its arms so far, and how a stage is made, reused or skipped.

A run is found again by the key of its settings: an unfinished one goes on as a new attempt, in the same folder.
"""

from __future__ import annotations

import datetime
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Run
from pipeline.data.documents import Dataset
from pipeline.data.load import load_dataset
from pipeline.errors import BudgetSpent, Preempted, UserError
from pipeline.ledger.energy import EnergyMeter
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.phases import PhaseClock, difference
from pipeline.ledger.record import HOUR_NS, Spent, ledger, read_memory, reset_memory
from pipeline.stages.context import Context, Output
from pipeline.stages.settings import training_precision, training_settings
from pipeline.store import Artifact, Store, key_of, plain, read_json, write_json
from pipeline.values import Value, null

HEARTBEAT_S = 5.0  # what SIGKILL can lose
FREE_BYTES = 256 * 2**20  # a run that cannot even leave this much is refused


@dataclass(slots=True)
class Attempt:
    """State of this process's attempt at a run."""

    run: Run
    run_id: str
    number: int
    folder: Path
    store: Store
    journal: Journal
    clock: PhaseClock
    device: Any
    data: Dataset
    command: str
    started_ns: int
    energy: EnergyMeter
    lock: Any
    arms: dict[str, Artifact] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[tuple[str, int], list[dict[str, float]]] = field(default_factory=dict)
    existing: set[str] = field(default_factory=set)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    compare_ns: int = 0
    earlier_ns: int = 0  # of this run's earlier attempts, from process start to their last sign of life
    window_ns: int = 0  # of this attempt's own stage windows and comparison pass
    notes: list[str] = field(default_factory=list)
    stop_signal: int | None = None

    def recover(self, events: list[dict[str, Any]]) -> None:
        """Take over what earlier attempts of this run spent without finishing: their hours are not lost."""
        starts = [index for index, event in enumerate(events) if event["e"] == "run_start"]
        for first, end in zip(starts, [*starts, len(events)][1:], strict=True):
            part = events[first:end]
            self.earlier_ns += part[-1]["mono_ns"] - part[0]["started_ns"]
            self.rows += [e["row"] for e in part if e["e"] == "row" and e["row"]["status"] in ("KILLED", "FAILED")]
            begun = [event for event in part if event["e"] == "stage_start"]
            if begun and not any(e["e"] == "row" for e in part[part.index(begun[-1]) :]):
                self._recover_stage(part[part.index(begun[-1]) :])

    def _recover_stage(self, events: list[dict[str, Any]]) -> None:
        """Book a stage that was killed without a word: kept up to its last checkpoint, lost from there."""
        begun, last = events[0], events[-1]
        saved = [event for event in events if event["e"] == "checkpoint"]
        spent = Spent(lost_ns=last["mono_ns"] - begun["mono_ns"])
        if saved:
            spent.phases_ns = saved[-1]["phases_ns"]
            spent.work_ns = sum(spent.phases_ns.values())
            spent.lost_ns, spent.lost_as = max(0, spent.lost_ns - spent.work_ns), "rollback"
        stage = self.run.stages[begun["arm"]]
        why = "the process was killed; hours up to its last sign of life"
        row = self._row(begun["arm"], stage, begun["seed"], begun["depends_on"], spent, Output(), "KILLED", why)
        self._add({**row, "attempt": begun["attempt"]})

    # -- arms ---------------------------------------------------------------------------------------------------

    def base(self, seed: int) -> Artifact:
        """Return the artifact of `model.*`: a folder or Hub snapshot as it is, or a tiny model made and committed."""
        import torch

        from pipeline.data.tokenizer import embedded_tokenizer
        from pipeline.models import make_tiny, save_model

        if self.run.model.path is not None:
            self.existing.add("base")
            return self._given_base(self.run.model.path)
        key = key_of(what="base", shape=self.run.model.shape, data=self.data.digest, seed=seed, task=self.run.task,
                     vocabulary=self.run.data.vocabulary_size, torch=torch.__version__)  # fmt: skip
        record = self.store.recall("keys", key)
        if record is not None:
            return Artifact.from_json(record["artifact"])
        with self.clock.phase("prepare"), self.store.scratch() as out:
            tokenizer = embedded_tokenizer(
                self.data.splits["train"], self.run.data.vocabulary_size, self.store.root / "tmp"
            )
            torch.manual_seed(seed)
            model = make_tiny(self.run.model.shape, len(tokenizer), self.run.task, self.data.labels, tokenizer)
            save_model(model, tokenizer, out)
            artifact = self.store.commit(out, "model", {"arm": "base", "seed": seed})
        self.store.remember("keys", key, {"artifact": artifact.to_json()})
        return artifact

    def _given_base(self, path: str) -> Artifact:
        from pipeline.models import resolve
        from pipeline.store import digest_folder

        folder = Path(resolve(path, "model.path"))
        if not folder.is_dir():
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            try:
                patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
                folder = Path(snapshot_download(path, revision=self.run.model.revision, allow_patterns=patterns))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
                text = str(error).strip().splitlines()[0]
                raise UserError(
                    "model.path", f"{path} cannot be fetched ({text})", "check the name, or give a folder"
                ) from None
        digest, num_bytes = digest_folder(folder)
        return Artifact(folder.resolve(), "model", digest, num_bytes)

    def why_not(self, stage: Any) -> str | None:
        """Return why this device cannot do a stage; an optional stage is then skipped, another refused.

        Raises:
            UserError: If the stage is not optional.
        """
        from pipeline.training.precision import why_not

        if not hasattr(stage, "precision"):
            return None
        reason = why_not(training_precision(stage, self.run), self.device)
        if reason is not None and not stage.optional:
            raise UserError("precision", reason, "choose fp32 or bf16, or mark the stage optional: true")
        return reason

    def stage_key(self, name: str, stage: Any, inputs: dict[str, Artifact], seed: int) -> str:
        """Return the key of what this stage makes: settings, inputs, data, seed, versions and device."""
        import torch

        settings: Any = {k: v for k, v in plain(stage).items() if k not in ("optional", "like")}
        if hasattr(stage, "like"):
            settings |= {"training": plain(training_settings(stage, self.run)),
                         "precision": training_precision(stage, self.run).value, "student": plain(self.run.student),
                         "loss_scale": self.run.precision.loss_scale}  # fmt: skip
        matched = self.outputs.get(stage.like) if getattr(stage, "match_compute", False) else None
        return key_of(
            stage=name, type=stage.type, version=stage.version, settings=settings, task=self.run.task,
            inputs={arm: artifact.digest for arm, artifact in inputs.items()}, data=self.data.digest, seed=seed,
            matched=None if matched is None else matched.counts["model_flops"].v,
            torch=torch.__version__.rpartition(".")[0], device=device_name(self.device), quality=self.run.quality,
        )  # fmt: skip

    # -- stages -------------------------------------------------------------------------------------------------

    def skip(self, name: str, stage: Any, seed: int, why: str) -> None:
        """Record a stage that this device cannot do: a row of nulls with the reason."""
        row = self._row(name, stage, seed, [], Spent(), Output(), "SKIPPED", why)
        _blank(row["ledger"], why)
        self._add(row)

    def reuse(self, name: str, record: dict[str, Any]) -> None:
        """Take over what an earlier run made: its rows, linked to the original, nothing spent."""
        mine = record["run_id"] == self.run_id  # an earlier attempt of this very run made it: spent, not reused
        known = {(row["arm"], row["seed"], row["attempt"]) for row in self.rows}
        for old in record["rows"]:
            if not mine:
                self._add({**old, "reused": old["reused"] or record["run_id"]})
            elif (old["arm"], old["seed"], old["attempt"]) not in known:
                self.rows.append(old)
        self._take(name, Artifact.from_json(record["artifact"]), _output_from(record["output"]), record["seed"])

    def make(self, name: str, stage: Any, inputs: dict[str, Artifact], seed: int, key: str) -> None:
        """Run a stage inside its window, commit its artifact, assess it reloaded from disk, and record all of it."""
        print(f"{name}: running", flush=True)
        self._check_budget()
        depends = [arm for arm in inputs if arm != "base"]
        self.journal.write("stage_start", arm=name, stage=name, type=stage.type, seed=seed, attempt=self.number,
                           params=plain(stage), depends_on=depends)  # fmt: skip
        spent, before, start = Spent(), self.clock.read_ns(), self.clock.now_ns()
        reset_memory(self.device)
        joules = self.energy.read_mj()
        try:
            artifact, output = self._work(name, stage, inputs, seed, key, before)
        except BaseException as error:
            spent.lost_ns = self.clock.now_ns() - start
            self.window_ns += spent.lost_ns
            kept = isinstance(error, Preempted | BudgetSpent)
            if kept:  # a checkpoint is on disk: the next attempt goes on from here
                spent.work_ns, spent.lost_ns = spent.lost_ns, 0
                spent.phases_ns = difference(self.clock.read_ns(), before)
            status = "KILLED" if kept or isinstance(error, KeyboardInterrupt) else "FAILED"
            self._add(self._row(name, stage, seed, depends, spent, Output(), status, str(error) or "interrupted"))
            raise
        self._synchronise()
        spent.work_ns = self.clock.now_ns() - start
        energy = self.energy.spent(joules, self.energy.read_mj(), spent.work_ns / 1e9)
        memory = read_memory(self.device)
        middle = self.clock.now_ns()
        quality = self._assess(name, artifact, seed)
        spent.assess_ns = self.clock.now_ns() - middle
        spent.work_ns = middle - start
        after = self.clock.read_ns()
        spent.phases_ns = difference(after, before)
        drift = sum(spent.phases_ns.values()) - spent.work_ns - spent.assess_ns
        spent.assess_ns += drift  # the clock's two readings are a few hundred ns apart: one class takes them
        self.window_ns += spent.work_ns + spent.assess_ns
        row = self._row(name, stage, seed, depends, spent, output, "FINISHED", None, memory=memory, energy=energy)
        row |= {"artifact": artifact.to_json(), "quality": quality}
        self._add(row)
        earlier = [old for old in self.rows[:-1] if old["arm"] == name and old["seed"] == seed]
        self.store.remember("keys", key, {
            "artifact": artifact.to_json(), "rows": [*earlier, row], "run_id": self.run_id, "seed": seed,
            "output": _output_to_json(output),
        })  # fmt: skip
        self._take(name, artifact, output, seed)

    def _work(
        self, name: str, stage: Any, inputs: dict[str, Artifact], seed: int, key: str, before: dict[str, int]
    ) -> tuple[Artifact, Output]:
        with self.store.scratch() as out, heartbeat(self.journal):
            context = Context(
                run=self.run, stage=name, seed=seed, device=self.device, data=self.data, clock=self.clock, out=out,
                checkpoints=self.store.root / "checkpoints" / key, matched=self.outputs.get(getattr(stage, "like", "")),
                points=lambda step, values: self.journal.write(
                    "points", arm=name, seed=seed, attempt=self.number, step=step, values=values),
                checkpointed=lambda step: self.journal.write(
                    "checkpoint", arm=name, seed=seed, attempt=self.number, step=step,
                    phases_ns=difference(self.clock.read_ns(), before)),
                should_stop=self._should_stop, progress=progress_bar, say=self.notes.append,
            )  # fmt: skip
            output = stage.run(inputs, context)
            self.notes += output.notes
            with self.clock.phase("checkpoint"):
                manifest = {"recipe": self.run.recipe, "arm": name, "seed": seed, "key": key, "run_id": self.run_id,
                            "settings": plain(stage), "inputs": {arm: a.digest for arm, a in inputs.items()}}  # fmt: skip
                artifact = self.store.commit(out, "model", manifest)
        import shutil

        shutil.rmtree(self.store.root / "checkpoints" / key, ignore_errors=True)
        return artifact, output

    def _take(self, name: str, artifact: Artifact, output: Output, seed: int) -> None:
        self.arms[name], self.outputs[name] = artifact, output
        self.curves[name, seed] = output.curve
        if output.existing:
            self.existing.add(name)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def _assess(self, name: str, artifact: Artifact, seed: int) -> dict[str, Any]:
        from pipeline.assess.quality import assess_quality

        folder = self.store.root / "assessments" / artifact.digest
        folder.mkdir(parents=True, exist_ok=True)
        teacher = next((s.teacher for s in self.run.stages.values() if hasattr(s, "teacher")), None)
        predictions = None
        if teacher in self.arms and teacher != name:
            found = self.store.root / "assessments" / self.arms[teacher].digest / f"{self.data.digest}.predictions.npy"
            predictions = found if found.is_file() else None
        return assess_quality(
            artifact.path, documents=self.data.splits["test"], task=self.run.task, labels=self.data.labels,
            config=self.run.quality,
            sequence_length=self.run.quality.sequence_length or self.run.training.sequence_length,
            device=self.device, items=folder / f"{self.data.digest}.jsonl", teacher_predictions=predictions,
            seed=seed, clock=self.clock,
        )  # fmt: skip

    def _row(
        self, name: str, stage: Any, seed: int, depends: list[str], spent: Spent, output: Output, status: str,
        why: str | None, *, memory: dict[str, Value] | None = None, energy: Value | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "arm": name, "stage": name, "type": stage.type, "seed": seed, "attempt": self.number, "status": status,
            "why": why, "reused": None, "depends_on": depends, "artifact": None, "quality": {}, "serving": {},
            "ledger": ledger(
                spent, output.counts, devices=1, device_kind=self.device.type, cost=self.run.cost,
                memory=memory or read_memory(self.device), energy=energy or null("the stage did not finish"),
                is_training=stage.type != "quantize", seconds_in_steps=output.seconds_in_steps,
            ),
        }  # fmt: skip

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.journal.write("row", row=row)

    # -- stopping -----------------------------------------------------------------------------------------------

    def spent_hours(self) -> float:
        """Return the device-hours of this attempt so far."""
        return (time.monotonic_ns() - self.started_ns) / HOUR_NS

    def _check_budget(self) -> None:
        limit = self.run.budget.device_hours
        if limit is not None and self.spent_hours() >= limit:
            raise BudgetSpent(f"budget.device_hours: {limit} is spent; raise it to go on from here")

    def _should_stop(self) -> type[Exception] | None:
        limit = self.run.budget.device_hours
        if limit is not None and self.spent_hours() >= limit:
            return BudgetSpent
        return None if self.stop_signal is None else Preempted

    # -- comparison pass ----------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Measure the recipe's pairs, in a window of its own."""
        from pipeline.comparison import compare_all

        start = self.clock.now_ns()
        self.comparisons = compare_all(self)
        self.journal.write("serving", rows=[
            {name: row[name] for name in ("arm", "seed", "attempt", "serving")} for row in self.rows if row["serving"]
        ])  # fmt: skip
        self.compare_ns = self.clock.now_ns() - start
        self.window_ns += self.compare_ns
        self.journal.write("comparisons", comparisons=self.comparisons)


def open_attempt(run: Run, clock: PhaseClock, *, command: str, started_ns: int) -> Attempt:
    """Prepare everything a run needs, refusing what the device or the data cannot do before anything is written.

    Raises:
        UserError: Naming the setting.
    """
    with clock.phase("import"):
        import torch
    with clock.phase("prepare"):
        device = choose_device(run)
        if run.hardware.num_threads is not None:
            torch.set_num_threads(run.hardware.num_threads)
        quiet_libraries()
        data = load_dataset(run.data, run.task)
        root = Path(run.tracking.root).expanduser().resolve()
        _check_writable(root)
        key = key_of(run={k: v for k, v in plain(run).items() if k not in ("tracking", "budget")}, data=data.digest)
        folder, number, lock = _find_or_make(root, key, run)
        journal = Journal(folder / "journal.jsonl")
    attempt = Attempt(
        run=run, run_id=folder.name, number=number, folder=folder, store=Store(root / "store"), journal=journal,
        clock=clock, device=device, data=data, command=command, started_ns=started_ns,
        energy=EnergyMeter(device), lock=lock, notes=list(data.notes),
    )  # fmt: skip
    attempt.recover(read_events(folder / "journal.jsonl"))
    write_json(folder / "run.json", {"key": key, "status": "RUNNING", "pid": os.getpid(), "attempt": number})
    write_json(folder / "config.json", plain(run))
    journal.write(
        "run_start", run_id=folder.name, started_ns=started_ns, attempt=number, recipe=run.recipe,
        question=run.question, experiment=run.tracking.experiment or run.recipe, tracking_uri=run.tracking.uri, params=flat(plain(run)),
        tags={k: v for k, v in asdict(run.tracking).items() if k in ("team", "cost_center", "purpose") and v},
        datasets=[{"name": data.name, "digest": data.digest, "split": split, "num_documents": len(documents)}
                  for split, documents in data.splits.items()],
    )  # fmt: skip
    return attempt


@contextmanager
def heartbeat(journal: Journal) -> Iterator[None]:
    """Leave a sign of life every few seconds, so that a killed process's hours are known."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            journal.write("heartbeat")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _find_or_make(root: Path, key: str, run: Run) -> tuple[Path, int, Any]:
    """Return the folder of the unfinished run with this key and the attempt's number, or a new one."""
    from filelock import FileLock, Timeout

    for folder in sorted((root / "runs").glob("*/"), reverse=True):
        state = read_json(folder / "run.json")
        if not isinstance(state, dict) or state["key"] != key or state["status"] == "FINISHED":
            continue
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue  # another process is at it; this one is a run of its own
        return folder, state["attempt"] + 1, lock
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = root / "runs" / f"{stamp}-{run.recipe}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".lock")
    lock.acquire(timeout=0)
    return folder, 1, lock


def _check_writable(root: Path) -> None:
    from pipeline.store import check_room

    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "tracking.root", f"{root} cannot be made ({error.strerror})", "give a folder to write to"
        ) from None
    if not os.access(root, os.W_OK):
        raise UserError("tracking.root", f"{root} is not writable", "give a folder to write to")
    check_room(root, FREE_BYTES, "tracking.root")


def choose_device(run: Run) -> Any:
    """Return the device to run on.

    Raises:
        UserError: If there is no such device, or not as many as asked for.
    """
    import torch

    wanted = run.hardware.device
    if wanted == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        wanted = "cpu" if found is None else str(found)
    device = torch.device(wanted)
    have = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= have):
        raise UserError("hardware.device", f"there is no {wanted} here", "give auto or cpu")
    if run.hardware.devices > have:
        raise UserError("hardware.devices", f"{run.hardware.devices} asked for, {have} there", f"give {have}")
    if run.hardware.devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("hardware.devices", "one process drives one device in this release", "give 1")
    return device


def device_name(device: Any) -> str:
    """Return the device's exact model name; for a CPU, the processor's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{named} x{os.cpu_count()}"


def quiet_libraries() -> None:
    """Silence progress bars and chatter of libraries; what matters is said by this package, once."""
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|bitsandbytes|torchao)(\.|$)")


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as `a.b.c: value`."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show progress: a bar on a terminal, a plain line every ten seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    start = last = time.monotonic()
    console = Console()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, rate="")
            yield lambda step, tokens: bar.update(
                task, completed=step, rate=f"{tokens / max(time.monotonic() - start, 1e-9):,.0f} tok/s"
            )
        return

    def line(step: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10:
            last = now
            left = (now - start) / step * (total - step)
            print(f"{what}: step {step}/{total}, {tokens / (now - start):,.0f} tok/s, {left:.0f} s left", flush=True)

    yield line


def _blank(record: dict[str, Any], why: str) -> None:
    """Turn every value of a ledger into a null with one reason."""
    for name, value in record.items():
        if isinstance(value, dict) and "why_null" in value:
            record[name] = null(why).to_json()
        elif isinstance(value, dict):
            _blank(value, why)


def _output_to_json(output: Output) -> dict[str, Any]:
    return {
        "counts": {name: value.to_json() for name, value in output.counts.items()}, "curve": output.curve,
        "flops_per_step": output.flops_per_step, "seconds_in_steps": output.seconds_in_steps,
        "existing": output.existing,
    }  # fmt: skip


def _output_from(raw: dict[str, Any]) -> Output:
    return Output(**{**raw, "counts": {name: Value.from_json(value) for name, value in raw["counts"].items()}})
