"""One attempt at a run: its windows, its journal, its arms so far, and how a stage is made,
assessed or reused.

Every interval that belongs to a stage is a *window*: work (start to committed artifact) or assess
(the artifact reloaded from disk). A row is what the windows of one arm in one attempt took; what no
window covers is overhead.
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config.arms import file_name, is_rung, stage_name
from pipeline.config.settings import Format, Precision, Run, TrainingConfig, VllmCheck
from pipeline.config.text_files import read_bytes
from pipeline.data.completions import file_digest
from pipeline.data.documents import Dataset
from pipeline.errors import BudgetSpent, Preempted, StageFailed
from pipeline.evaluation.serving.engine import EngineResult
from pipeline.evaluation.serving.measure import ServePass
from pipeline.evaluation.serving.vllm_check import Checked, check_vllm
from pipeline.evaluation.serving.vllm_check import installed as vllm_version
from pipeline.evaluation.serving.vllm_check import why_not as vllm_why_not
from pipeline.gate.checks import ITEMS
from pipeline.gate.opening import Gate
from pipeline.ledger import others
from pipeline.ledger.attempted import UNMEASURED, attempted, unmeasured
from pipeline.ledger.booking import Booking, Span, Window, book, device_hours
from pipeline.ledger.cost import priced
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.disturbance import Disturbance, of_device, of_host
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.gpu_usage import Usage
from pipeline.ledger.journal import Journal
from pipeline.ledger.memory import MemoryMeter
from pipeline.ledger.others import Accounts, Load
from pipeline.ledger.peaks import device_name
from pipeline.ledger.phases import PhaseClock, difference, total
from pipeline.ledger.placement import Grant
from pipeline.ledger.record import Spent
from pipeline.ledger.records import ASSESSED, MADE, MAX_BYTES
from pipeline.ledger.values import Value
from pipeline.report.progress import progress_bar
from pipeline.runs.base_model import base_artifact
from pipeline.runs.out_of_memory import explain
from pipeline.runs.recovery import resume
from pipeline.runs.rows import (
    Record,
    Row,
    blank,
    broken_row,
    depends_on,
    hours_in,
    identity,
    made_row,
    make_row,
    moved,
    reused_work,
)
from pipeline.stages.capture import CaptureStage
from pipeline.stages.context import Context, Output
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.recover import RecoverStage
from pipeline.stages.settings import (
    STUDENT_INIT,
    TrainingOverrides,
    read_as,
    student_source,
    training_precision,
    training_settings,
)
from pipeline.store.artifacts import MODEL, Artifact, Store, key_of, make_way, plain, read_json

# part of an assessment's key: raise it when the same settings give other figures
ASSESSMENT_VERSION = 3


@dataclass(slots=True)
class OpenWindow:
    """A window being measured; `elapsed_ns` and `phases_ns` are there once it is closed."""

    start_ns: int
    before: dict[str, int]
    elapsed_ns: int = 0
    phases_ns: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Trace:
    """How far an attempt at a stage came: the step of its last checkpoint, and the last step known
    to be done.
    """

    saved: int = 0
    reached: int = 0
    saved_ns: dict[str, int] = field(default_factory=dict)  # by phase, up to that checkpoint

    @property
    def lost(self) -> int:
        """Steps that have to be done again."""
        return max(0, self.reached - self.saved)


@dataclass(slots=True)
class Attempt:
    """State of this process's attempt at a run.

    Attributes:
        arms: The current seed's artifacts by arm.
        outputs: What stages reported, by arm and seed.
        items: Where the current seed's per-document values lie, by arm.
        rows: Of stage attempts, this run's and reused ones.
        windows: Of all attempts of this run.
        devices: How many this process's attempt is attached to.
        spans: Of this run's earlier attempts, by attempt.
        identity: Whose run this is and what it was made from; on every row.
        placement: Where it stands; on every row.
        grant: What a scheduler gave this job.
        inside_ns: Self times by phase in the windows of this attempt.
        overhead_ns: Device-nanoseconds of earlier attempts outside of windows, by phase.
        compare_ns: Device-nanoseconds of comparison passes, by phase, over all attempts.
        finished_before: Rows of this run's earlier attempts; one whose files were lost since still
            has its hours.
        loads: What others took of the host in the windows of this attempt, by kind, arm and seed.
        traces: How far a stage came in its steps, by arm, seed and attempt.
        resumed: The history of the checkpoint that a stage goes on from, by arm and seed.
        reused_h: Device-hours of work, assessment and comparison that other runs spent and this one
            takes over.
    """

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
    sampler: Sampler
    lock: Any
    devices: int = 1
    arms: dict[str, Artifact] = field(default_factory=dict)
    outputs: dict[tuple[str, int], Output] = field(default_factory=dict)
    items: dict[str, Path] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    spans: dict[int, Span] = field(default_factory=dict)
    reused_h: float = 0.0
    identity: dict[str, Any] = field(default_factory=dict)
    placement: dict[str, Any] = field(default_factory=dict)
    grant: Grant | None = None
    inside_ns: dict[str, int] = field(default_factory=dict)
    overhead_ns: dict[str, int] = field(default_factory=dict)
    compare_ns: dict[str, int] = field(default_factory=dict)
    finished_before: list[Row] = field(default_factory=list)
    loads: dict[tuple[str, str | None, int], list[Load]] = field(default_factory=dict)
    traces: dict[tuple[str, int, int], Trace] = field(default_factory=dict)
    resumed: dict[tuple[str, int], list[dict[str, Any]]] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # by arm, what serving.results declares
    engine: dict[str, EngineResult] = field(default_factory=dict)
    served: ServePass | None = None  # what the comparison pass read
    why_unserved: str | None = None  # why it could not
    gate: Gate | None = None  # of a release check
    disagreeing: list[str] = field(default_factory=list)  # arms that vLLM reads as another model
    memory: MemoryMeter = field(default_factory=MemoryMeter)
    stop_signal: int | None = None
    writer: subprocess.Popen[bytes] | None = None  # delivers the journal to MLflow

    @property
    def seeds(self) -> list[int]:
        """Every arm is made once per seed."""
        return self.run.seeds or [self.run.seed]

    # -- time -------------------------------------------------------------------------------------

    @contextmanager
    def window(
        self, kind: Literal["work", "assess", "compare"], arm: str | None, seed: int
    ) -> Generator[OpenWindow]:
        """Measure a window and journal it. What fails in it is lost; a checkpoint keeps what led to
        it.
        """
        start_ns, before = self.clock.mark()
        opened = OpenWindow(start_ns, before)
        self.journal.write(
            "open",
            kind=kind,
            arm=arm,
            seed=seed,
            attempt=self.number,
            start_ns=start_ns,
            clock_ns=before,
        )
        kept, saved_ns = True, 0
        others_before = self._mark_edge()
        try:
            yield opened
        except BaseException as error:
            kept = isinstance(error, Preempted | BudgetSpent) or kind == "compare"
            if isinstance(error, KeyboardInterrupt) and kind == "work" and arm is not None:
                saved_ns = sum(self.trace(arm, seed, self.number).saved_ns.values())
            raise
        finally:
            load = others.load_between(others_before, self._mark_edge())
            self.loads.setdefault((kind, arm, seed), []).append(load)
            end_ns, after = self.clock.mark()
            opened.elapsed_ns, opened.phases_ns = end_ns - start_ns, difference(after, before)
            self.windows.append(
                Window(
                    kind=kind,
                    arm=arm,
                    seed=seed,
                    attempt=self.number,
                    start_ns=start_ns,
                    end_ns=end_ns,
                    kept_ns=opened.elapsed_ns if kept else saved_ns,
                )
            )
            self.inside_ns = total(self.inside_ns, opened.phases_ns)
            if kind == "compare":
                self.compare_ns = total(
                    self.compare_ns, total(opened.phases_ns, times=self.devices)
                )
            self.journal.write(
                "window",
                arm=arm,
                seed=seed,
                window=plain(self.windows[-1]),
                phases_ns=opened.phases_ns,
                clock_ns=after,
                others=load.to_json(),
            )

    def _mark_edge(self) -> Accounts | str:
        """Read the device at the edge of a window; return the kernel's accounts, or why they cannot
        be read.
        """
        with self.clock.phase("log"):
            self.sampler.mark()
            return others.read()

    def booking(self) -> tuple[Booking, dict[str, int]]:
        """Return where the time of this run went until now, over all its attempts, and its overhead
        by phase.

        Both are in device-nanoseconds. What passed before the clock was there is the interpreter's
        start: `import`.
        """
        now_ns, phases_ns = self.clock.mark()
        span = Span(self.started_ns, now_ns, self.devices)
        booked = book(self.windows, {**self.spans, self.number: span})
        own_ns = total(difference(phases_ns, self.inside_ns), times=self.devices)
        start_ns = booked.overhead_ns - sum(own_ns.values()) - sum(self.overhead_ns.values())
        return booked, total(self.overhead_ns, own_ns, {"import": start_ns})

    def spent_hours(self) -> float:
        """Return the device-hours of this run until now, over all its attempts."""
        now = Span(self.started_ns, self.clock.now_ns(), self.devices)
        return device_hours(sum(span.device_ns for span in (*self.spans.values(), now)))

    def devices_in(self, number: int) -> int:
        """Return how many devices an attempt of this run was attached to."""
        return self.spans[number].devices if number in self.spans else self.devices

    def check_budget(self) -> None:
        """Start nothing that must stop at once.

        Raises:
            BudgetSpent, Preempted: If so.
        """
        limit = self.run.budget.device_hours
        if limit is not None and self.spent_hours() >= limit:
            raise BudgetSpent(f"budget.device_hours: {limit} is spent; raise it to go on from here")
        if self.stop_signal is not None:
            raise Preempted("stopped between stages; the same command goes on from there")

    @contextmanager
    def hold(self, key: str, arm: str) -> Generator[None]:
        """Hold a key's lock; while another process makes what it stands for, this one waits on a
        device it holds.
        """
        with ExitStack() as held:
            with self.clock.phase("comm_wait"):
                what = f"another process that makes {arm}"
                held.enter_context(self.store.lock(key, what, self.check_budget))
            yield

    def _should_stop(self) -> type[Exception] | None:
        limit = self.run.budget.device_hours
        if limit is not None and self.spent_hours() >= limit:
            return BudgetSpent
        return None if self.stop_signal is None else Preempted

    def trace(self, arm: str, seed: int, attempt: int) -> Trace:
        """Return the trace of an attempt at a stage, a new one where there is none."""
        return self.traces.setdefault((arm, seed, attempt), Trace())

    def _synchronise(self) -> None:
        device_of(self.device).synchronise()

    # -- earlier attempts -------------------------------------------------------------------------

    def history(
        self, arm: str, seed: int, step: int, phases_ns: dict[str, int]
    ) -> list[dict[str, Any]]:
        """Return what leads to a checkpoint at `step`: attempts, of any run, each with its time up
        to its last one.
        """
        now = {"run_id": self.run_id, "attempt": self.number, "step": step, "phases_ns": phases_ns}
        return [*self.resumed.get((arm, seed), []), now]

    def _adopt(self, rows: list[Row], *parts: str) -> None:
        """Show rows of other runs that this one builds on, once each, and count `parts` of their
        hours as reused.
        """
        known = {identity(row) for row in self.rows}
        for row in rows:
            if row["reused"] not in (None, self.run_id) and identity(row) not in known:
                self.add({**row, "ledger": priced(row["ledger"], self.run.cost)})  # at today's rate
                self.reused_h += sum(hours_in(row, part) for part in parts)

    # -- what a stage can use ---------------------------------------------------------------------

    def base(self, seed: int) -> Artifact:
        """Return the artifact of `model.*`."""
        return base_artifact(self.run, self.data, seed, self.store, self.clock)

    def why_not(self, stage: Any) -> str | None:
        """Return why a stage cannot be done, or None: what it reads is not there, or this device
        cannot do it.

        It is then an optional one: others were refused before.
        """
        from pipeline.quantization.backend import why_not as why_not_quantize
        from pipeline.training.precision import why_not

        gone = [arm for arm in stage.reads(self.run) if arm not in self.arms]
        if gone:
            return f"{gone[0]} was skipped"
        if isinstance(stage, QuantizeStage):
            if stage.format is Format.auto:
                return None
            unable = self.why_unable(stage) if stage.optional else None
            return (
                why_not_quantize(stage.format, self.device)
                if unable is None
                else unable.partition(": ")[2]
            )
        return (
            why_not(training_precision(stage, self.run), self.device)
            if hasattr(stage, "precision")
            else None
        )

    def may_fail(self, name: str) -> bool:
        """Whether a format that is none for this model leaves the run going: optional, or a rung
        beside others.
        """
        stage = self.run.stages.get(stage_name(name))
        return isinstance(stage, QuantizeStage) and (stage.optional or is_rung(name))

    def _refusing(self, name: str, stage: Any) -> AbstractContextManager[None]:
        """Have what an optional format raises while it is assessed be a refusal too."""
        from pipeline.quantization.backend import refusing

        if (
            not isinstance(stage, QuantizeStage)
            or stage.format is Format.auto
            or not self.may_fail(name)
        ):
            return nullcontext()
        return refusing("what was made", stage.format, f"stages.{name}.format")

    def why_unable(self, stage: QuantizeStage) -> str | None:
        """Return why this device, or the shapes of this model, cannot take a stage's format; None
        where they can.
        """
        from pipeline.quantization.trials import able

        source = self.arms[stage.model].path
        _, reasons = able(
            [stage.format],
            source,
            self.run.task,
            device=self.device,
            choice=stage.choice(),
            key="format",
        )
        return reasons[0] if reasons else None

    def stage_key(self, name: str, stage: Any, inputs: dict[str, Artifact], seed: int) -> str:
        """Return the key of what this stage makes: settings, inputs, data, seed, versions and
        device.
        """
        settings: Any = {
            k: v for k, v in plain(stage).items() if k not in ("optional", "like", "insist")
        }
        for file in ("completions", "calibration"):
            if settings.get(file) is not None:
                settings[file] = file_digest(settings[file])
        if self.gate is not None:
            settings["digest"] = self.gate.releases()[name].artifact.digest
        if isinstance(stage, CaptureStage):
            settings |= {
                **stage.captured(self.run),
                "precision": training_precision(stage, self.run).value,
            }
        if isinstance(stage, QuantizeStage | RecoverStage):
            settings |= plain(stage.searched(self.run))
        if isinstance(stage, TrainingOverrides):
            settings |= {
                "training": plain(training_settings(stage, self.run)),
                "precision": training_precision(stage, self.run).value,
                "loss_scale": self.run.precision.loss_scale,
            }
            if settings["precision"] == Precision.auto.value:
                settings["loss_tolerance"] = self.run.precision.loss_tolerance
            if stage.model == STUDENT_INIT:
                settings["student"] = self._student(inputs)
        return key_of(
            stage=name,
            type=stage.type,
            version=stage.version,
            settings=settings,
            task=self.run.task,
            inputs={arm: artifact.digest for arm, artifact in inputs.items()},
            data=self.data.digest,
            seed=seed,
            matched=self._matched_flops(stage, seed),
            **self.made_on(),
        )

    def _matched_flops(self, stage: Any, seed: int) -> float | None:
        """Return the FLOPs that a stage with `match_compute` may spend; None where there is nothing
        to match.

        Those of the stage named by `like`, with the capture of the cache that it reads: a live
        teacher's are in the stage's own.
        """
        if not getattr(stage, "match_compute", False):
            return None
        arms = [stage.like, getattr(self.run.stages[stage.like], "cache", None)]
        outputs = [self.outputs.get((arm, seed)) for arm in arms if arm is not None]
        known = [None if output is None else _flops_of(output) for output in outputs]
        return None if None in known else sum(flops for flops in known if flops is not None)

    def made_on(self) -> dict[str, Any]:
        """Return what a timing holds for, as a part of keys: torch's release, device, their number,
        and threads.
        """
        import torch

        return {
            "torch": torch.__version__.rpartition(".")[0],
            "device": device_name(self.device),
            "devices": self.devices,
            "threads": self.run.hardware.num_threads,
        }

    def _student(self, inputs: dict[str, Artifact]) -> dict[str, Any]:
        """Return what decides the student's initial weights, however its settings are spelt."""
        from pipeline.models.student import student_identity

        source = None if self.run.student.path is not None else student_source(self.run)
        with self.clock.phase("prepare"):
            path = None if source is None else inputs[source].path
            return {"source": source, **student_identity(self.run.student, path)}

    def assessment_key(self, name: str, stage_key: str, made: Record, seed: int) -> str:
        """Return the key of an assessment: the artifact, the test data, how it is scored, and its
        teacher.
        """
        teacher, unquantized = self._teacher(name), self._unquantized(name)
        recorded = self._recorded(name)
        return key_of(
            made=stage_key,
            artifact=made["artifact"]["digest"],
            data=self.data.digest,
            seed=seed,
            **self._evaluation(),
            teacher=None if teacher is None else self.arms[teacher].digest,
            unquantized=None if unquantized is None else unquantized.digest,
            **({} if recorded is None else {"recorded": file_digest(str(recorded))}),
            **self._vllm(name, made),
        )

    def _evaluation(self) -> dict[str, Any]:
        from pipeline.evaluation.quality.tasks import identity as tasks_identity

        quality = {
            key: value
            for key, value in plain(self.run.quality).items()
            if key not in ("margin", "tasks")
        }
        quality |= tasks_identity(self.run.quality)
        return {
            "quality": quality,
            "sequence_length": self._sequence_length(),
            "version": ASSESSMENT_VERSION,
        }

    def evaluation(self) -> str:
        """Return a digest of how artifacts are scored: values of two evaluations that share it can
        be compared.
        """
        return key_of(task=self.run.task, **self._evaluation())

    def reading(self) -> str:
        """Return a digest of what of that decides a document's values: not the resamples, nor how
        many at once.
        """
        evaluation = self._evaluation()
        for beside in ("bootstrap", "batch_size"):
            evaluation["quality"].pop(beside)
        return key_of(task=self.run.task, **evaluation)

    def _recorded(self, name: str) -> Path | None:
        """Return the per-document values of another evaluation that stand in for an assessment, or
        None.
        """
        path = getattr(self.run, ITEMS.get(name, ""), None) if self.gate is not None else None
        return None if path is None else Path(path).expanduser()

    def _vllm(self, name: str, made: Record) -> dict[str, Any]:
        """Return what the check with vLLM adds to an assessment's key: nothing where it cannot
        run.
        """
        folder = Path(made["artifact"]["path"])
        if not self._wants_vllm(name) or self._why_no_vllm(folder) is not None:
            return {}
        return {"vllm": vllm_version()}

    def _why_no_vllm(self, folder: Path) -> str | None:
        """Return why vLLM cannot read a folder here, or None; a question that fails is a reason,
        too.
        """
        return attempted(
            lambda: vllm_why_not(folder, self.run.task, self.device),
            lambda why: unmeasured("vLLM", why),
        )

    def _wants_vllm(self, name: str) -> bool:
        """Whether vLLM is to load and score an arm's artifact."""
        wanted = self.run.serving.check_vllm
        return wanted is VllmCheck.every or (
            wanted is VllmCheck.quantized and self._is_quantized(name)
        )

    def _is_quantized(self, name: str) -> bool:
        """Whether an arm's artifact is quantized: by its stage, or as it was released."""
        if self.gate is not None and name in self.gate.releases():
            config = read_json(self.gate.releases()[name].artifact.path / "config.json")
            return isinstance(config, dict) and config.get("quantization_config") is not None
        return isinstance(self.run.stages[name], QuantizeStage)

    def _check_vllm(self, name: str, made: Record) -> Checked | None:
        """Have vLLM score an arm's artifact, where that is wanted; a part of its assessment."""
        if not self._wants_vllm(name):
            return None
        check = lambda: check_vllm(
            Path(made["artifact"]["path"]),
            documents=self.data.splits["test"],
            task=self.run.task,
            sequence_length=self._sequence_length(),
            device=self.device,
            clock=self.clock,
            still=self.check_budget,
        )
        return attempted(
            check, lambda why: Checked("failed", unmeasured("agreement with vLLM", why))
        )

    def _tell_vllm(self, name: str, seed: int, assessed: Record) -> None:
        """Say what became of the check of an arm's artifact, made now or found; what disagrees ends
        the run with 3.
        """
        if not self._wants_vllm(name):
            return
        checked = Checked.from_json(assessed.get("vllm") or {"outcome": "not run here"})
        why = self._why_no_vllm(self.arms[name].path)
        # of an assessment that was found: why not now
        if checked.outcome == "not run here" and why is not None:
            checked = Checked("not run here", why)
        arm = f"{name} (seed {seed})" if len(self.seeds) > 1 else name
        print(f"{arm}: {checked.say()}", flush=True)
        self.notes.append(f"{arm}: {checked.say()}")
        if checked.agrees is False:
            self.disagreeing.append(arm)

    def _unquantized(self, name: str) -> Artifact | None:
        """Return what a quantized arm was made from."""
        stage = self.run.stages[name]
        return self.arms[stage.model] if isinstance(stage, QuantizeStage) else None

    def _teacher(self, name: str) -> str | None:
        """Return the arm whose predictions an artifact's are compared with."""
        teacher = next(
            (stage.teacher for stage in self.run.stages.values() if hasattr(stage, "teacher")), None
        )
        return teacher if teacher in self.items and teacher != name else None

    def _sequence_length(self) -> int:
        return self.run.quality.sequence_length or self.run.training.sequence_length

    # -- stages -----------------------------------------------------------------------------------

    def skip(self, name: str, stage: Any, seed: int, why: str) -> None:
        """Record a stage that this device cannot do: a row of nulls with the reason."""
        row = make_row(self, name, stage, seed, Spent(), Output(), "SKIPPED", why)
        blank(row["ledger"], why)
        self.add(row)

    def recall(self, key: str) -> Record | None:
        """Return what is remembered of work with this key, if its artifact is still whole: it is
        hashed.
        """
        with self.clock.phase("prepare"):
            return self.store.recall("keys", key, MADE)

    def recall_assessment(self, key: str, made: Record) -> Record | None:
        """Return what is remembered of an assessment with this key, if its per-document values are
        still there.

        What this run made and another one assessed is assessed again: its row belongs to one run.
        """
        with self.clock.phase("prepare"):
            record = self.store.recall("assessments", key, ASSESSED)
        if record is None or self.run_id == made["run_id"] != record["run_id"]:
            return None
        # wherever the store has been moved to
        items = self.store.root / "assessments" / Path(record["items"]).name
        with self.clock.phase("prepare"):
            sha256 = _items_sha256(items)
        if sha256 is None or sha256 != record["sha256"]:
            return None
        return {
            **record,
            "items": str(items),
            "rows": [moved(row, made["artifact"], items) for row in record["rows"]],
        }

    def make(
        self, name: str, stage: Any, inputs: dict[str, Artifact], seed: int, key: str
    ) -> Record:
        """Do a stage's work inside its window and commit its artifact; return what the store
        remembers of it.
        """
        self.check_budget()
        print(f"{name}{f' (seed {seed})' if len(self.seeds) > 1 else ''}: running", flush=True)
        self.journal.write(
            "stage_start",
            arm=name,
            stage=name,
            type=stage.type,
            seed=seed,
            attempt=self.number,
            params=self._settings(stage),
            depends_on=depends_on(stage, self.run),
        )
        window = None
        try:
            self._warm(stage, inputs)
            self.memory.start(self.device)
            with self.window("work", name, seed) as window:
                artifact, output = self._work(name, stage, inputs, seed, key, window)
                self._synchronise()
        except BaseException as error:
            self.add(broken_row(self, name, stage, seed, window, error))
            raise
        record: Record = {
            "artifact": artifact.to_json(),
            "run_id": self.run_id,
            "attempt": self.number,
            "seed": seed,
            "work_ns": window.elapsed_ns,
            "phases_ns": window.phases_ns,
            "output": output.to_json(),
            "memory": {part: value.to_json() for part, value in self._memory(name, seed).items()},
            "usage": self.usage(name, seed).to_json(),
            "disturbance": self.disturbance(name, seed).to_json(),
            "earlier": [row for row in self.rows if (row["arm"], row["seed"]) == (name, seed)],
        }
        self.store.remember("keys", key, record)
        shutil.rmtree(self.store.root / "checkpoints" / key, ignore_errors=True)
        return record

    def usage(self, arm: str, seed: int) -> Usage:
        """Return what the devices did in the windows of an arm in this attempt, so far."""
        return self._usage_in(arm, seed, "work", "assess")

    def _usage_in(self, arm: str, seed: int, *kinds: str) -> Usage:
        own = [
            w
            for w in self.windows
            if (w.arm, w.seed, w.attempt) == (arm, seed, self.number) and w.kind in kinds
        ]
        return self.sampler.usage(*((window.start_ns, window.end_ns) for window in own))

    def disturbance(self, arm: str, seed: int) -> Disturbance:
        """Return what disturbed the windows of an arm in this attempt, so far."""
        work, assess = (self.loads.get((kind, arm, seed), []) for kind in ("work", "assess"))
        if self.device.type == "cpu":
            return of_host(work, assess)
        return of_device(
            work,
            assess,
            foreign_load=self.usage(arm, seed).foreign_load,
            work_foreign_load=self._usage_in(arm, seed, "work").foreign_load,
            assess_foreign_load=self._usage_in(arm, seed, "assess").foreign_load,
        )

    def _memory(self, arm: str, seed: int) -> dict[str, Value]:
        return self.memory.read(self.device, nvml_peak=self.usage(arm, seed).memory_used_peak_bytes)

    def _settings(self, stage: Any) -> dict[str, Any]:
        """Return the settings in force for a stage: its own, and what it inherits."""
        inherited: dict[str, Any] = {}
        if isinstance(stage, CaptureStage):
            inherited = {
                **stage.captured(self.run),
                "precision": training_precision(stage, self.run).value,
            }
        if isinstance(stage, TrainingOverrides):
            inherited = plain(training_settings(stage, self.run))
            inherited["precision"] = training_precision(stage, self.run).value
            if getattr(stage, "match_compute", False):
                inherited["epochs"] = None
            if getattr(stage, "match_compute", False) or inherited["epochs"] is not None:
                # computed from the matched stage's FLOPs, or from epochs: see compute/steps
                inherited["steps"] = None
        settings = {**plain(stage), **inherited}
        return {name: value for name, value in settings.items() if value is not None}

    def _warm(self, stage: Any, inputs: dict[str, Artifact]) -> None:
        """Do what all arms use as overhead of the run, else the first arm would pay for the others:
        import, encode, and open the device with a first forward and backward pass.
        """
        read = read_as(stage, self.run)
        self._warm_libraries(stage, read)
        if read is None or not inputs:
            return
        from pipeline.data.encode import encode_all
        from pipeline.models.load import example_length, import_model, load_config, load_tokenizer

        source = next(iter(inputs.values())).path
        with self.clock.phase("import"):
            work = "capturing" if isinstance(stage, CaptureStage) else "training"
            importlib.import_module(f"pipeline.stages.{work}")
            import_model(source, self.run.task)
        with self.clock.phase("prepare"):
            _open_device(self.device)
            tokenizer = load_tokenizer(source)
            length = example_length(load_config(source), self.run.task, read.sequence_length)
            encode_all(self.data.splits["train"], tokenizer, self.run.task, max_length=length)

    def _warm_libraries(self, stage: Any, read: TrainingConfig | None) -> None:
        """Import what the stage's format or optimizer needs: else the first arm that uses it would
        pay for the rest.
        """
        from pipeline.quantization.backend import import_library
        from pipeline.training.optimizer import IMPORTED

        with self.clock.phase("import"):
            if getattr(stage, "format", Format.auto) is not Format.auto:
                import_library(stage.format)
            if read is not None and read.optimizer in IMPORTED:
                importlib.import_module(IMPORTED[read.optimizer])

    def _work(
        self,
        name: str,
        stage: Any,
        inputs: dict[str, Artifact],
        seed: int,
        key: str,
        window: OpenWindow,
    ) -> tuple[Artifact, Output]:
        trace = self.trace(name, seed, self.number)

        def journal(event: str, step: int, **fields: Any) -> None:
            trace.reached = max(trace.reached, step)
            self.journal.write(event, arm=name, seed=seed, attempt=self.number, step=step, **fields)

        def phases_ns() -> dict[str, int]:
            return difference(self.clock.mark()[1], window.before)

        def checkpointed(step: int) -> None:
            trace.saved, trace.saved_ns = step, phases_ns()
            journal("checkpoint", step, phases_ns=trace.saved_ns)

        def resumed(step: int, history: list[dict[str, Any]]) -> None:
            if step:
                print(f"{name}: goes on after step {step}", flush=True)
            journal("resume", step, history=history)
            resume(self, name, seed, self.number, step, history)

        with self.store.scratch() as out:
            context = Context(
                run=self.run,
                stage=name,
                seed=seed,
                device=self.device,
                data=self.data,
                clock=self.clock,
                out=out,
                checkpoints=self.store.root / "checkpoints" / key,
                matched=self.outputs.get((getattr(stage, "like", ""), seed)),
                matched_flops=self._matched_flops(stage, seed),
                points=lambda step, values: journal("points", step, values=values),
                history=lambda step: self.history(name, seed, step, phases_ns()),
                checkpointed=checkpointed,
                resumed=resumed,
                should_stop=self._should_stop,
                progress=progress_bar,
                say=self.notes.append,
                released=None if self.gate is None else self.gate.releases()[name].artifact.path,
                traces=self.folder / "traces" / f"{file_name(name)}-seed{seed}",
            )
            with named(self, name, stage, "work"):
                output = stage.run(inputs, context)
            self.notes += output.notes
            with self.clock.phase("checkpoint"):
                digests = {arm: artifact.digest for arm, artifact in inputs.items()}
                manifest = {
                    "recipe": self.run.recipe,
                    "arm": name,
                    "seed": seed,
                    "key": key,
                    "run_id": self.run_id,
                    "settings": plain(stage),
                    "inputs": digests,
                    **output.about,
                }
                return self.store.commit(out, getattr(stage, "makes", MODEL), manifest), output

    def assess(self, name: str, stage: Any, made: Record, seed: int, key: str) -> Record:
        """Score an artifact, reloaded from disk, inside a window of its own; return what the store
        remembers of it.
        """
        from pipeline.evaluation.quality.assess import assess_quality
        from pipeline.evaluation.quality.recorded import take_recorded, write_identity
        from pipeline.models.sixteen_bits import stored_said

        recorded = self._recorded(name)
        said = stored_said(made["artifact"]["path"], self.device)
        if said is not None:
            self.notes.append(f"{name}: {said}")
        items = self.store.root / "assessments" / f"{key}.jsonl"
        for file in (items, items.with_suffix(".predictions.npy")):
            make_way(file)
        teacher = self._teacher(name)
        found = None if teacher is None else self.items[teacher].with_suffix(".predictions.npy")
        unquantized = self._unquantized(name)
        window = None
        try:
            with (
                self.window("assess", name, seed) as window,
                named(self, name, stage, "assess"),
                self._refusing(name, stage),
            ):
                if recorded is not None:
                    quality = take_recorded(
                        recorded, items, self.run.task, self.run.quality, ITEMS[name]
                    )
                else:
                    quality = assess_quality(
                        Path(made["artifact"]["path"]),
                        documents=self.data.splits["test"],
                        task=self.run.task,
                        labels=self.data.labels,
                        config=self.run.quality,
                        sequence_length=self._sequence_length(),
                        device=self.device,
                        items=items,
                        teacher_predictions=found,
                        seed=seed,
                        clock=self.clock,
                        unquantized=None if unquantized is None else unquantized.path,
                    )
                    write_identity(
                        items,
                        data=self.data.digest,
                        split="test",
                        evaluation=self.evaluation(),
                        artifact=made["artifact"]["digest"],
                    )
                checked = self._check_vllm(name, made)
                self._synchronise()
        except BaseException as error:
            self.add(broken_row(self, name, stage, seed, window, error, made))
            raise
        self._adopt(made["earlier"], "work")
        if made["run_id"] != self.run_id:
            self._adopt([reused_work(self, name, stage, seed, made, quality)], "work")
        known = {identity(row) for row in self.rows}
        self.rows += [
            row
            for row in self.finished_before
            if (row["arm"], row["seed"]) == (name, seed) and identity(row) not in known
        ]
        self.add(made_row(self, name, stage, seed, made, window, quality))
        rows = [row for row in self.rows if (row["arm"], row["seed"]) == (name, seed)]
        record: Record = {
            "run_id": self.run_id,
            "items": str(items),
            "sha256": _items_sha256(items),
            "rows": rows,
        }
        if checked is not None:
            record["vllm"] = checked.to_json()
            self.store.annotate(
                Artifact.from_json(made["artifact"]), "checked", {"vllm": record["vllm"]}
            )
        if not any(UNMEASURED in (figure["why_missing"] or "") for figure in quality.values()):
            self.store.remember("assessments", key, record)  # else the same command assesses again
        self.store.annotate(
            Artifact.from_json(made["artifact"]), "assessed", self._assessed(quality)
        )
        return record

    def _assessed(self, quality: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return what artifact.json says of an artifact's quality, and where that was found."""
        kept = ("value", "why_missing", "ci", "n")
        return {
            "quality": {
                key: {name: value.get(name) for name in kept} for key, value in quality.items()
            },
            "data": self.data.digest,
            "split": "test",
            "margin": self.run.quality.margin,
            "device": device_name(self.device),
            "run_id": self.run_id,
        }

    def keep(self, name: str, stage: Any, made: Record, seed: int) -> None:
        """Add the rows of an artifact that is no model, made now or found: nothing of it is
        assessed.
        """
        if made["run_id"] != self.run_id:
            print(f"{name}: reused from {made['run_id']}", flush=True)
            own = {
                **reused_work(self, name, stage, seed, made, {}),
                "artifact": made["artifact"],
                "why": None,
            }
            rows = [*made["earlier"], own]
            self._adopt(
                [{**row, "reused": row["reused"] or made["run_id"]} for row in rows], "work"
            )
            return
        self._adopt(made["earlier"], "work")
        before = [row for row in self.finished_before if (row["arm"], row["seed"]) == (name, seed)]
        # an earlier attempt of this very run, journaled there
        if before and made["attempt"] != self.number:
            self.rows += [{**row, "artifact": made["artifact"]} for row in before]
            return
        self.add(made_row(self, name, stage, seed, made, OpenWindow(0, {}), {}))

    def take(self, name: str, made: Record, assessed: Record | None, seed: int) -> None:
        """Make an artifact, and its assessment where it has one, known to the stages that
        follow.
        """
        self.arms[name], self.outputs[name, seed] = (
            Artifact.from_json(made["artifact"]),
            Output.from_json(made["output"]),
        )
        if assessed is not None:
            self.items[name] = Path(assessed["items"])
            self._tell_vllm(name, seed, assessed)

    def reuse(self, name: str, assessed: Record, seed: int) -> None:
        """Add the rows of work and assessment that were found done: linked to their run, nothing
        spent.
        """
        # an earlier attempt of this very run: spent, and journaled, there
        if assessed["run_id"] == self.run_id:
            self._adopt(assessed["rows"], "work")
            self.rows += [
                row
                for row in assessed["rows"]
                if row["status"] == "FINISHED" and row["reused"] is None
            ]
            return
        print(f"{name}: reused from {assessed['run_id']}", flush=True)
        rows = [{**row, "reused": row["reused"] or assessed["run_id"]} for row in assessed["rows"]]
        self._adopt(rows, "work", "assess")

    # -- rows -------------------------------------------------------------------------------------

    def add(self, row: Row) -> None:
        """Journal a row; it replaces an earlier version of itself."""
        replaced = [index for index, old in enumerate(self.rows) if identity(old) == identity(row)]
        if replaced:
            self.rows[replaced[0]] = row
        else:
            self.rows.append(row)
        self.journal.write("row", row=row)


def _flops_of(output: Output) -> float | None:
    """Return the FLOPs of a stage: counted, else by the rule of thumb."""
    counted = output.counts["model_flops"].value
    return output.flops_by_rule if counted is None else counted


def _open_device(device: Any) -> None:
    """Have libraries and threads of the device start: what they take comes once per process."""
    import torch

    square = torch.ones(64, 64, device=device, requires_grad=True)
    torch.autograd.backward((square @ square).sum())


@contextmanager
def named(attempt: Attempt, arm: str, stage: Any, kind: str) -> Generator[None]:
    """Have a failure say which stage failed, and one for want of memory what to change."""
    try:
        yield
    except StageFailed as error:
        raise StageFailed(f"{_what(arm, stage)}: {error}") from error
    except Exception as error:
        snapshot = attempt.folder / f"oom-{file_name(arm)}-{attempt.number}.json"
        said = explain(
            error, attempt.run, arm, stage, kind, device=attempt.device, snapshot=snapshot
        )
        if said is None:
            raise
        raise StageFailed(f"{_what(arm, stage)}: {said}") from error


def _what(arm: str, stage: Any) -> str:
    return arm if stage is None else f"stage {arm}"


def _items_sha256(items: Path) -> str | None:
    """Return a checksum over per-document values, of tasks too, and first predictions; None where
    any is not there.
    """
    try:
        of_tasks = sorted(items.parent.glob(f"{items.stem}.*.jsonl"))
        files = (items, items.with_suffix(".predictions.npy"), *of_tasks)
        contents = [read_bytes(file, limit=MAX_BYTES) for file in files]
    except OSError:
        return None
    return hashlib.sha256(
        b"".join(hashlib.sha256(content).digest() for content in contents)
    ).hexdigest()
