"""The worked example through the machinery that runs a recipe: stages that only let an injected
clock pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import filelock
import numpy as np
import pytest
import torch
from fake_nvml import FakeNvml
from make_assess_models import SHAPE, saved, tiny

import pipeline.evaluation.quality.assess
import pipeline.runs.comparison
import pipeline.runs.serving_pass
from pipeline.config.settings.model import StudentConfig
from pipeline.config.settings.quantization import Format
from pipeline.config.settings.run import Comparison, Measure, Run
from pipeline.config.settings.training import OptimizerKind
from pipeline.data.documents import Dataset
from pipeline.evaluation.quality.assess import write_items
from pipeline.evaluation.serving.measure import ServePass
from pipeline.ledger.booking import NS_PER_HOUR
from pipeline.ledger.devices.cuda.nvml import Absent, Reader, open_reader
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.values import measured
from pipeline.runs import rows
from pipeline.runs.assemble import disagreements
from pipeline.runs.keys import stage_key
from pipeline.runs.opening import _find_or_make, _taking_over
from pipeline.runs.resume import booked_again, read_past
from pipeline.runs.runner import StageRunner
from pipeline.runs.running import Running
from pipeline.runs.session import Session
from pipeline.runs.stages import run_stages
from pipeline.stages.base import MODEL, STUDENT_SOURCE, TEACHER, Reference, Stage, WarmUp
from pipeline.stages.context import Context, Output
from pipeline.stages.distill import DistillStage
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.train import TrainStage
from pipeline.store.artifacts import Artifact, Store, write_json
from pipeline.tasks.table import Task
from pipeline.training import optimizer

MINUTE_NS = 60 * 10**9


class Killed(BaseException):
    """Stands for SIGKILL: nothing the process does after it is written."""


@dataclass
class Minutes:
    """A clock that stands still until it is told."""

    ns: int = 7_000_000_000_000

    def __call__(self) -> int:
        return self.ns

    def pass_minutes(self, minutes: float) -> None:
        self.ns += int(minutes * MINUTE_NS)


CLOCK = Minutes()
DEVICE = torch.device("cpu")
WORSE: dict[str, float] = {}  # factor on the bits of an arm's test documents


def reading(
    *, tokens: int, metric: float, minutes: float, evaluated: float = 0, constant: int = 0
) -> dict[str, Any]:
    """Return a point of a curve: minutes in steps until there, and in evaluations until there."""
    return {
        "step": tokens,
        "tokens": tokens,
        "metric": metric,
        "seconds": 60.0 * minutes,
        "eval_seconds": 60.0 * evaluated,
        "constant": constant,
    }


@dataclass(kw_only=False)
class FakeStage(Stage):
    """Takes its minutes; on attempts that do not end well, step n is saved after the n-th of
    `checkpoints`.
    """

    minutes: list[float]  # by attempt that reaches it
    needs: list[str] = field(default_factory=list)
    checkpoints: list[float] = field(default_factory=list)  # minutes into the attempt
    resumes: list[int] = field(default_factory=list)  # by attempt: the step it goes on from
    ends: list[str] = field(default_factory=list)  # by attempt: ok, killed, failed
    says: str = ""  # beside its name, in what it makes
    curve: list[dict[str, Any]] = field(
        default_factory=lambda: [reading(tokens=1, metric=2.0, minutes=0)]
    )

    type: ClassVar[str] = "train"
    version: ClassVar[int] = 1

    def references(self, run: Run) -> dict[str, Reference]:
        return {arm: Reference(arm, MODEL) for arm in self.needs}

    def trains(self, run: Run) -> bool:
        return True

    def check(self, key: str, run: Run) -> None:
        pass

    def run(self, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
        tries = (
            int((ctx.checkpoints.parent / f"{ctx.stage}.tries").read_text())
            if self._tried(ctx)
            else 0
        )
        (ctx.checkpoints.parent / f"{ctx.stage}.tries").write_text(str(tries + 1))
        minutes, end = self.minutes[tries], (self.ends or ["ok"] * 9)[tries]
        step = self.resumes[tries] if self.resumes else 0
        ctx.resumed(
            step,
            (
                json.loads((ctx.checkpoints.parent / f"{ctx.stage}.{step}").read_text())
                if step
                else []
            ),
        )
        with ctx.clock.phase("forward"):
            past = 0.0
            for at in [at for at in self.checkpoints if end != "ok" and at < minutes]:
                CLOCK.pass_minutes(at - past)
                past, step = at, step + 1
                (ctx.checkpoints.parent / f"{ctx.stage}.{step}").write_text(
                    json.dumps(ctx.history(step))
                )
                ctx.checkpointed(step)
            CLOCK.pass_minutes(minutes - past)
            ctx.points(step + 3, {})
        if end == "killed":
            raise Killed
        if end == "interrupted":
            raise KeyboardInterrupt
        if end == "failed":
            raise RuntimeError("no luck")
        (ctx.out / "model.txt").write_text(ctx.stage + self.says)
        return Output(counts={"steps_lost": measured(0)}, curve=self.curve)

    def _tried(self, ctx: Context) -> bool:
        return (ctx.checkpoints.parent / f"{ctx.stage}.tries").is_file()


@dataclass
class FakeDistill(FakeStage):
    """Names the teacher whose predictions all arms' are compared with."""

    def learns_from(self) -> str | None:
        return "teacher"


def stages() -> dict[str, FakeStage]:
    return {
        "teacher": FakeStage([30]),
        "student": FakeStage([6, 16], ["teacher"], [4], [0, 1], ["killed", "ok"]),
        "control_compute": FakeStage([12]),
        "control_steps": FakeStage([9]),
    }


def fake_assessment(folder: Path, *, items: Path, clock: PhaseClock, **_: Any) -> dict[str, Any]:
    with clock.phase("eval"):
        CLOCK.pass_minutes(2)
    worse = WORSE.get((folder / "model.txt").read_text(), 1.0)
    arrays = {
        "digest": np.array(["a", "b"]),
        "bits": worse * np.array([2.0, 4.0]),
        "bytes": np.array([1, 2]),
        "tokens": np.array([1, 2]),
        "correct": np.array([0, 1]),
    }
    write_items(items, arrays)
    np.save(items.with_suffix(".predictions.npy"), np.zeros(2))
    return {"bits_per_byte": {**measured(2.0).to_json(), "ci": None, "n": 2, "items": str(items)}}


def fake_serving(running: Running, pairs: list[tuple[str, str]], order_seed: int = 0) -> ServePass:
    with running.session.clock.phase("generate"):
        CLOCK.pass_minutes(6)
    costs = {arm: 1.0 if arm == "teacher" else 0.6 for pair in pairs for arm in pair}
    # no drift in the mean log-ratio
    blocks = np.ones((4, 2)) * np.array([[1.0], [1.01], [1 / 1.01], [1.0]])
    return ServePass(
        serving={
            arm: {"device_s_per_1k_units": measured(cost).to_json()} for arm, cost in costs.items()
        },
        seconds={
            (arm, base): (costs[arm] * blocks, costs[base] * np.ones((4, 2))) for arm, base in pairs
        },
        how=dict.fromkeys(costs, "float32"),
    )


def no_gpu() -> Reader:
    return Absent("a CPU run uses no GPU")


def open_fake(root: Path, run_id: str, number: int, run: Run, devices: int = 1) -> Running:
    folder = root / "runs" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    events = read_events(folder / "journal.jsonl")
    session = Session(
        run=run,
        run_id=run_id,
        number=number,
        folder=folder,
        store=Store(root / "store"),
        journal=Journal(folder / "journal.jsonl", now_ns=CLOCK),
        clock=PhaseClock(CLOCK),
        device=DEVICE,
        data=Dataset("d", "0" * 32, {"train": [], "validation": [], "test": []}, None),
        command="",
        started_ns=CLOCK.ns,
        sampler=Sampler(no_gpu(), now_ns=CLOCK),
        identity={},
        placement={},
        grant=None,
        devices=devices,
    )
    session.journal.write(
        "run_start", run_id=run_id, started_ns=CLOCK.ns, attempt=number, devices=devices
    )
    return _taking_over(session, read_past(session, events), [], None)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pipeline.evaluation.quality.assess, "assess_quality", fake_assessment)
    # no model there
    monkeypatch.setattr("pipeline.models.sixteen_bits.stored_said", lambda *_: None)
    monkeypatch.setattr(pipeline.runs.serving_pass, "serve", fake_serving)
    monkeypatch.setattr(pipeline.runs.comparison, "other_tokenizers", lambda *_: False)  # likewise
    base = tmp_path / "base"
    base.mkdir()
    monkeypatch.setattr(
        "pipeline.runs.stages.base_artifact", lambda *_: Artifact(base, "model", "b" * 32, 1)
    )
    return tmp_path


def the_run() -> Run:
    pairs = [
        ("control_compute", [Measure.quality, Measure.training]),
        ("teacher", [Measure.serving, Measure.payback]),
    ]
    compare = [Comparison(arm="student", base=base, on=on) for base, on in pairs]
    return Run(recipe="distill", stages=stages(), compare=compare, primary_arm="student")


def invoke(
    root: Path,
    run_id: str,
    number: int,
    run: Run,
    *,
    start: float = 1,
    end: float = 1,
    devices: int = 1,
) -> Running:
    attempt = open_fake(root, run_id, number, run, devices)
    CLOCK.pass_minutes(start)
    try:
        run_stages(attempt)
        pipeline.runs.comparison.compare(attempt)
        CLOCK.pass_minutes(end)
    except Killed:
        pass
    return attempt


@contextmanager
def deadly(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Inside, a killed process writes nothing after its death; its last heartbeat is at that
    moment.
    """

    def mute_after_death(journal: Journal, event: str, **fields: Any) -> None:
        if event == "window" and sys.exc_info()[0] is Killed:
            write(journal, "heartbeat")
            dead.append(journal)
        if journal not in dead:
            write(journal, event, **fields)

    dead: list[Journal] = []
    write = Journal.write
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", mute_after_death)
        yield


def killed_then_done(root: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    """Attempt 1 is killed two minutes after the student's checkpoint; its last heartbeat was at
    that moment.
    """
    with deadly(monkeypatch):
        invoke(root, "run-1", 1, the_run())
    CLOCK.pass_minutes(600)  # nobody was attached meanwhile
    return invoke(root, "run-1", 2, the_run())


def minutes(hours: float | None) -> float:
    assert hours is not None
    return 60 * hours


def of_run(running: Running) -> dict[str, float]:
    assert disagreements(running) == []
    booked, overhead_ns = running.timeline.booking()
    assert sum(overhead_ns.values()) == booked.overhead_ns
    assert sum(running.timeline.compare_ns.values()) == booked.compare_ns
    parts = {
        name: getattr(booked, f"{name}_ns")
        for name in ("work", "assess", "retry", "compare", "overhead")
    }
    assert sum(parts.values()) == booked.attached_ns
    return {name: ns / MINUTE_NS for name, ns in parts.items()}


def test_the_worked_example(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = killed_then_done(root, monkeypatch)
    assert of_run(attempt) == {"work": 71, "assess": 8, "retry": 2, "compare": 6, "overhead": 3}
    assert attempt.timeline.booking()[0].attached_ns == 1.5 * NS_PER_HOUR
    assert attempt.timeline.spent_hours() == 1.5
    # the journal alone says the same, what the killed attempt lost among it
    again = booked_again(read_events(root / "runs/run-1/journal.jsonl"), "run-1")
    assert list(again.windows) == attempt.timeline.windows
    assert again.spans[1] == attempt.timeline.spans[1]
    against_control, against_teacher = attempt.book.comparisons
    training = against_control["training"]
    assert minutes(training["c_arm"]["value"]) == pytest.approx(50)
    assert minutes(training["c_base"]["value"]) == pytest.approx(12)
    assert minutes(training["c_opt"]["value"]) == pytest.approx(38)
    assert minutes(training["all_in_arm"]["value"]) == pytest.approx(52)
    assert against_teacher["payback"]["value"] == pytest.approx(3.0e6)


def test_the_start_up_of_a_killed_attempt_keeps_its_phases(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two minutes of preparing before the first stage, three after the teacher's; the kill comes in
    the student.
    """
    run = the_run()
    with deadly(monkeypatch):
        first = open_fake(root, "run-1", 1, run)
        with first.session.clock.phase("prepare"):
            CLOCK.pass_minutes(2)
        teacher = StageRunner._make

        def then_checkpoint(self: StageRunner, name: str, *rest: Any) -> Any:
            made = teacher(self, name, *rest)
            with self.running.session.clock.phase("checkpoint"):
                CLOCK.pass_minutes(3)
            return made

        monkeypatch.setattr(StageRunner, "_make", then_checkpoint)
        with pytest.raises(Killed):
            run_stages(first)
    second = open_fake(root, "run-1", 2, run)
    in_minutes = {name: ns / MINUTE_NS for name, ns in second.timeline.overhead_ns.items()}
    assert in_minutes == {"prepare": 2, "checkpoint": 3}
    of_run(second)


class Board(FakeNvml):
    """A GPU that draws 200 W on the clock of these tests."""

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        return CLOCK.ns * 200 // 1_000_000

    def nvmlGpmSampleGet(self, device: Any, gpmSample: Any) -> Any:
        self.now_ns = CLOCK.ns
        return super().nvmlGpmSampleGet(device, gpmSample)


def test_rows_have_the_joules_of_their_own_windows(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a killed attempt are gone with the process that read them, and said to be."""
    reader = lambda: open_reader(["GPU-1"], nvml=Board(), now_ns=CLOCK)
    monkeypatch.setattr(sys.modules[__name__], "no_gpu", reader)
    attempt = killed_then_done(root, monkeypatch)
    found = {(row["arm"], row["attempt"]): row["ledger"] for row in attempt.book.rows}
    joules = {key: record["energy_j"]["value"] for key, record in found.items()}
    assert joules.pop(("student", 1)) is None
    minutes_of = {
        "teacher": 30 + 2,
        "student": 16 + 2,
        "control_compute": 12 + 2,
        "control_steps": 9 + 2,
    }
    for (arm, _), value in joules.items():
        assert value == pytest.approx(200 * 60 * minutes_of[arm])
    killed = found["student", 1]
    assert killed["energy_j"]["why_missing"] == "the process that read it is gone"
    assert (killed["conditions"]["truncated"], found["student", 2]["conditions"]["truncated"]) == (
        True,
        False,
    )
    assert found["student", 2]["conditions"]["sm_active"]["value"] == pytest.approx(0.4)


def test_wall_clock_jumps_change_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Years forward and back with every reading of the clock on the wall."""
    jumps = itertools.cycle([1e9, 0.0, 4e9, -1e9])
    monkeypatch.setattr("pipeline.ledger.journal.time.time", lambda: next(jumps))
    attempt = killed_then_done(root, monkeypatch)
    assert of_run(attempt) == {"work": 71, "assess": 8, "retry": 2, "compare": 6, "overhead": 3}
    assert json.dumps([row["ledger"] for row in attempt.book.rows]).count("1000000000.0") == 0


def test_rows_are_the_windows_of_their_attempts(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = killed_then_done(root, monkeypatch)
    rows = {(row["arm"], row["attempt"]): row for row in attempt.book.rows}
    killed, done = rows["student", 1], rows["student", 2]
    hours = killed["ledger"]["device_hours"]
    assert killed["status"] == "KILLED"
    assert [minutes(hours[part]["value"]) for part in ("work", "assess", "retry")] == pytest.approx(
        [4, 0, 2]
    )
    assert minutes(hours["wasted_by"]["rollback"]["value"]) == pytest.approx(2)
    assert killed["ledger"]["phases_ns"] == {"forward": 4 * MINUTE_NS}
    hours = done["ledger"]["device_hours"]
    assert [minutes(hours[part]["value"]) for part in ("work", "assess", "retry")] == pytest.approx(
        [16, 2, 0]
    )
    # made by attempt 1 of this very run: not reused
    assert rows["teacher", 1]["status"] == "FINISHED"
    assert rows["teacher", 1]["reused"] is None
    for part in ("work", "assess", "retry"):
        total = sum(row["ledger"]["device_hours"][part]["value"] for row in attempt.book.rows)
        assert minutes(total) == pytest.approx(of_run(attempt)[part])
    assert all(row["ledger"]["meter_valid"] for row in attempt.book.rows)


def test_the_second_run_spends_overhead_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = killed_then_done(root, monkeypatch)
    second = invoke(root, "run-2", 1, the_run())
    assert of_run(second) == {"work": 0, "assess": 0, "retry": 0, "compare": 0, "overhead": 2}
    assert minutes(second.book.reused_h) == pytest.approx(71 + 8 + 6)
    assert {row["reused"] for row in second.book.rows} == {"run-1"}
    assert second.book.comparisons == first.book.comparisons


def test_another_assessment_trains_nothing_again(root: Path) -> None:
    run = the_run()
    run.stages["student"] = FakeStage([20], ["teacher"])
    invoke(root, "run-1", 1, run)
    run.quality.bootstrap += 1
    second = invoke(root, "run-2", 1, run)
    assert of_run(second) == {"work": 0, "assess": 8, "retry": 0, "compare": 0, "overhead": 2}
    assert minutes(second.book.reused_h) == pytest.approx(71 + 6)
    assert [(row["reused"], row["artifact"] is None) for row in second.book.rows] == 4 * [
        ("run-1", True),
        (None, False),
    ]
    for part in ("work", "assess", "retry"):  # what this run spent stands on its own rows
        own = sum(
            row["ledger"]["device_hours"][part]["value"]
            for row in second.book.rows
            if row["reused"] is None
        )
        assert minutes(own) == pytest.approx(of_run(second)[part])
    assert minutes(second.book.comparisons[0]["training"]["c_arm"]["value"]) == pytest.approx(50)
    run.serving.load.batch += 1
    third = invoke(root, "run-3", 1, run)
    assert of_run(third) == {"work": 0, "assess": 0, "retry": 0, "compare": 6, "overhead": 2}
    assert minutes(third.book.reused_h) == pytest.approx(71 + 8)


def test_damaged_items_are_assessed_again(root: Path) -> None:
    run = the_run()
    run.stages["student"] = FakeStage([20], ["teacher"])
    first = invoke(root, "run-1", 1, run)
    items = [row["quality"]["bits_per_byte"]["items"] for row in first.book.rows]
    Path(items[0]).write_text("no JSON")
    Path(items[1]).with_suffix(".predictions.npy").unlink()
    second = invoke(root, "run-2", 1, run)
    assert of_run(second) == {"work": 0, "assess": 4, "retry": 0, "compare": 0, "overhead": 2}
    assert minutes(second.book.reused_h) == pytest.approx(71 + 4 + 6)


def test_a_stage_that_failed_is_retry_and_its_row_says_so(root: Path) -> None:
    run = the_run()
    run.stages["student"] = FakeStage([7, 20], ["teacher"], ends=["failed", "ok"])
    with pytest.raises(RuntimeError, match="no luck"):
        invoke(root, "run-1", 1, run)
    attempt = invoke(root, "run-1", 2, run)
    assert of_run(attempt) == {"work": 71, "assess": 8, "retry": 7, "compare": 6, "overhead": 3}
    assert [(row["arm"], row["status"]) for row in attempt.book.rows][:2] == [
        ("student", "FAILED"),
        ("teacher", "FINISHED"),
    ]
    training = attempt.book.comparisons[0]["training"]
    assert minutes(training["c_arm"]["value"]) == pytest.approx(50)
    assert minutes(training["all_in_arm"]["value"]) == pytest.approx(57)


def test_an_assessment_that_failed_leaves_the_work_standing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        CLOCK.pass_minutes(3)
        raise RuntimeError("out of memory")

    run = the_run()
    run.stages["student"] = FakeStage([20], ["teacher"])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.evaluation.quality.assess, "assess_quality", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            invoke(root, "run-1", 1, run)
    attempt = invoke(root, "run-1", 2, run)
    assert of_run(attempt) == {"work": 71, "assess": 8, "retry": 3, "compare": 6, "overhead": 3}
    assert minutes(attempt.book.comparisons[0]["training"]["c_arm"]["value"]) == pytest.approx(50)
    third = invoke(root, "run-3", 1, run)
    assert minutes(third.book.reused_h) == pytest.approx(71 + 8 + 6)
    assert minutes(third.book.comparisons[0]["training"]["c_arm"]["value"]) == pytest.approx(50)


def test_seeds_are_compared_seed_by_seed(root: Path) -> None:
    run = the_run()
    run.stages = {
        "teacher": FakeStage([30, 30]),
        "student": FakeStage([20, 22], ["teacher"]),
        "control_compute": FakeStage([12, 12]),
        "control_steps": FakeStage([9, 9]),
    }
    run.seeds = [3, 5]
    attempt = invoke(root, "run-1", 1, run)
    assert [row["seed"] for row in attempt.book.rows] == [3, 3, 3, 3, 5, 5, 5, 5]
    training = attempt.book.comparisons[0]["training"]
    assert training["value"] == pytest.approx(1 - math.sqrt((50 / 12) * (52 / 12)))
    assert training["ci"][0] < training["value"] < training["ci"][1]
    assert attempt.book.comparisons[0]["quality"]["bits_per_byte"]["n"] == 2
    assert minutes(attempt.timeline.booking()[0].work_ns / NS_PER_HOUR) == pytest.approx(71 + 73)
    assert "seed 3" in attempt.book.rows[5]["serving"]["device_s_per_1k_units"]["why_missing"]


def test_the_journal_alone_tells_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a third attempt reads back is what the first two booked."""
    attempt = killed_then_done(root, monkeypatch)
    again = open_fake(root, "run-1", 3, the_run())
    assert again.timeline.windows == attempt.timeline.windows
    assert json.dumps(
        [row for row in attempt.book.rows if row["status"] == "KILLED"]
    ) == json.dumps(again.book.rows)


def test_an_attempt_on_fewer_devices_adds_up_with_the_one_before(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed on 4 devices, done on 2: what 4 had made is not taken for what 2 would have, and
    nothing is lost.
    """
    run = the_run()
    run.stages["teacher"], run.stages["student"] = (
        FakeStage([30, 30]),
        FakeStage([6, 16], ["teacher"], [], [], ["killed", "ok"]),
    )
    with deadly(monkeypatch):
        invoke(root, "run-1", 1, run, devices=4)
    attempt = invoke(root, "run-1", 2, run, devices=2)
    assert of_row(attempt, "student", 1) == ("KILLED", [0, 0, 4 * 6], 3)
    assert of_row(attempt, "student", 2)[:2] == ("FINISHED", [2 * 16, 2 * 2, 0])
    assert of_row(attempt, "teacher", 2)[:2] == ("FINISHED", [2 * 30, 2 * 2, 0])
    booked = of_run(attempt)
    assert sum(booked.values()) == pytest.approx(
        4 * (1 + 30 + 2 + 6) + 2 * (1 + 32 + 18 + 14 + 11 + 6 + 1)
    )
    rows = sum(
        minutes(row["ledger"]["device_hours"]["attached"]["value"]) for row in attempt.book.rows
    )
    assert rows == pytest.approx(booked["work"] + booked["assess"] + booked["retry"])


def test_an_arm_that_is_worse_on_test_saved_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation, a sample, called them equal; the test split does not."""
    run = the_run()
    run.stages["student"] = FakeStage([20], ["teacher"])
    monkeypatch.setitem(WORSE, "student", 1.02)
    training = invoke(root, "run-1", 1, run).book.comparisons[0]["training"]
    assert (
        training["why_missing"]
        == "censored: the arm is worse than the base by 0.02 on the test split, margin 0.01"
    )
    assert training["algorithmic"]["value"] is None
    assert training["bound"]["value"] == pytest.approx(1 - 50 / 12)
    monkeypatch.setitem(WORSE, "student", 1.005)
    within = invoke(root / "other", "run-1", 1, run).book.comparisons[0]["training"]
    assert within["value"] == pytest.approx(1 - 50 / 12)


def test_a_damaged_checkpoint_rolls_back_what_it_held(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after 4 and 9 minutes, killed after 11; the second one cannot be read, then the machine
    dies again.
    """
    run = the_run()
    run.stages["student"] = FakeStage(
        [11, 3, 16], ["teacher"], [4, 9], [0, 1, 1], ["killed", "failed", "ok"]
    )
    with deadly(monkeypatch):
        first = invoke(root, "run-1", 1, run)
    assert of_row(open_fake(root, "run-1", 9, run), "student", 1) == ("KILLED", [9, 0, 2], 3)
    with pytest.raises(RuntimeError, match="no luck"):
        invoke(root, "run-1", 2, run)
    third = invoke(root, "run-1", 3, run)
    assert of_row(third, "student", 1) == ("KILLED", [4, 0, 7], 4)
    assert of_row(third, "student", 2) == ("FAILED", [0, 0, 3], 3)
    assert of_row(third, "student", 3) == ("FINISHED", [16, 2, 0], 0)
    assert first.session.run_id == third.session.run_id
    assert of_run(third) | {"overhead": 0} == {
        "work": 71,
        "assess": 8,
        "retry": 10,
        "compare": 6,
        "overhead": 0,
    }
    assert minutes(third.book.comparisons[0]["training"]["c_arm"]["value"]) == pytest.approx(50)
    again = open_fake(root, "run-1", 4, run)
    assert again.timeline.windows == third.timeline.windows
    assert again.book.rows == [row for row in third.book.rows if row["status"] != "FINISHED"]


def test_a_failed_attempt_led_to_what_goes_on_from_its_checkpoint(root: Path) -> None:
    run = the_run()
    run.stages["student"] = FakeStage([7, 16], ["teacher"], [4], [0, 1], ["failed", "ok"])
    with pytest.raises(RuntimeError, match="no luck"):
        invoke(root, "run-1", 1, run)
    attempt = invoke(root, "run-1", 2, run)
    assert of_row(attempt, "student", 1) == ("FAILED", [4, 0, 3], 3)
    assert minutes(attempt.book.comparisons[0]["training"]["c_arm"]["value"]) == pytest.approx(50)


def test_what_ctrl_c_leaves_counts_up_to_the_checkpoint(root: Path) -> None:
    run = the_run()
    run.stages["student"] = FakeStage([6, 16], ["teacher"], [4], [0, 1], ["interrupted", "ok"])
    with pytest.raises(KeyboardInterrupt):
        invoke(root, "run-1", 1, run)
    attempt = open_fake(root, "run-1", 2, run)
    assert of_row(attempt, "student", 1) == ("KILLED", [4, 0, 2], 3)
    assert of_run(attempt)["retry"] == 2
    assert of_row(invoke(root, "run-1", 3, run), "student", 1) == ("KILLED", [4, 0, 2], 3)


def test_what_is_reused_is_priced_at_todays_rate(root: Path) -> None:
    run = the_run()
    run.stages["student"] = FakeStage([20], ["teacher"])
    invoke(root, "run-1", 1, run)
    run.cost.per_device_hour, run.cost.source = 3.0, "a price list"
    teacher = invoke(root, "run-2", 1, run).book.rows[0]
    assert teacher["reused"] == "run-1"
    assert teacher["ledger"]["cost"]["amount"]["value"] == pytest.approx(3.0 * 32 / 60)


def test_going_on_from_another_runs_checkpoint_is_charged_with_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = the_run()
    with deadly(monkeypatch):
        invoke(root, "run-1", 1, run)
    run.quality.bootstrap += 1
    second = invoke(root, "run-2", 1, run)
    assert minutes(second.book.comparisons[0]["training"]["c_arm"]["value"]) == pytest.approx(50)
    assert of_run(second) == {"work": 37, "assess": 8, "retry": 0, "compare": 6, "overhead": 2}
    assert minutes(second.book.reused_h) == pytest.approx(30 + 4)
    rows = [
        (row["arm"], row["reused"], row["status"])
        for row in second.book.rows
        if row["arm"] == "student"
    ]
    assert rows == [("student", "run-1", "KILLED"), ("student", None, "FINISHED")]
    third = invoke(root, "run-3", 1, run)
    assert minutes(third.book.reused_h) == pytest.approx(30 + 4 + 37 + 8 + 6)
    assert minutes(third.book.comparisons[0]["training"]["c_arm"]["value"]) == pytest.approx(50)
    run.quality.bootstrap -= 1
    # finds its student made by run-2, from its own checkpoint
    first = invoke(root, "run-1", 2, run)
    assert minutes(first.book.comparisons[0]["training"]["c_arm"]["value"]) == pytest.approx(50)
    assert minutes(first.book.reused_h) == pytest.approx(37 + 6)
    assert of_run(first)["work"] == 34


def of_row(running: Running, arm: str, number: int) -> tuple[str, list[float], int | None]:
    """Return status, minutes of work, assessment and retry, and the steps lost."""
    row = next(row for row in running.book.rows if (row["arm"], row["attempt"]) == (arm, number))
    hours = row["ledger"]["device_hours"]
    spent = [round(minutes(hours[part]["value"]), 9) for part in ("work", "assess", "retry")]
    return row["status"], spent, row["ledger"]["counts"]["steps_lost"]["value"]


def test_a_store_that_was_moved_is_reused_whole(root: Path) -> None:
    run = the_run()
    run.stages["student"] = FakeStage([20], ["teacher"])
    invoke(root / "here", "run-1", 1, run)
    (root / "here").rename(root / "there")
    second = invoke(root / "there", "run-2", 1, run)
    assert of_run(second) == {"work": 0, "assess": 0, "retry": 0, "compare": 0, "overhead": 2}
    finished = second.book.rows[0]
    places = [finished["artifact"]["path"], finished["quality"]["bits_per_byte"]["items"]]
    assert all(
        Path(place).is_relative_to(root / "there") and Path(place).exists() for place in places
    )


def test_what_is_assessed_again_in_a_later_attempt_was_still_paid_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = the_run()
    with deadly(monkeypatch):
        first = invoke(root, "run-1", 1, run)
    teacher = next(row for row in first.book.rows if row["arm"] == "teacher")
    Path(teacher["quality"]["bits_per_byte"]["items"]).unlink()
    second = invoke(root, "run-1", 2, run)
    assert [row["attempt"] for row in second.book.rows if row["arm"] == "teacher"] == [1, 2]
    booked = of_run(second)
    assert (booked["work"], booked["assess"]) == (71, 10)
    for part in ("work", "assess", "retry"):
        total = sum(row["ledger"]["device_hours"][part]["value"] for row in second.book.rows)
        assert minutes(total) == pytest.approx(booked[part])


def test_a_run_whose_journal_lost_an_attempt_is_not_gone_on_with(tmp_path: Path) -> None:
    run = the_run()
    folder, number, lock = _find_or_make(tmp_path, "k", run)
    lock.release()
    assert number == 1
    write_json(folder / "run.json", {"key": "k", "status": "KILLED", "attempt": 2})
    journal = Journal(folder / "journal.jsonl")
    journal.write("run_start", attempt=2)
    other, number, lock = _find_or_make(tmp_path, "k", run)
    lock.release()
    assert (other == folder, number) == (False, 1)
    (folder / "journal.jsonl").unlink()
    for attempt in (1, 2):
        Journal(folder / "journal.jsonl").write("run_start", attempt=attempt)
    shutil.rmtree(other)
    found, number, lock = _find_or_make(tmp_path, "k", run)
    lock.release()
    assert (found, number) == (folder, 3)


def test_a_run_that_ends_while_its_lock_is_waited_for_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = the_run()
    folder, _, lock = _find_or_make(tmp_path, "k", run)
    lock.release()
    Journal(folder / "journal.jsonl").write("run_start", attempt=1)
    write_json(folder / "run.json", {"key": "k", "status": "RUNNING", "attempt": 1})
    acquire = filelock.FileLock.acquire

    def acquire_late(self: filelock.FileLock, *args: Any, **more: Any) -> Any:
        write_json(folder / "run.json", {"key": "k", "status": "FINISHED", "attempt": 1})
        return acquire(self, *args, **more)

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire_late)
    other, number, _ = _find_or_make(tmp_path, "k", run)
    assert (other == folder, number) == (False, 1)


@pytest.mark.parametrize("change", [{"layers": 2}, {"layers": [1, 3]}, {"source": "teacher"}])
def test_another_spelling_of_the_same_student_has_the_same_key(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    assert student_keys(tmp_path, StudentConfig(**change)) == student_keys(
        tmp_path, StudentConfig()
    )


@pytest.mark.parametrize(
    "change", [{"layers": 1}, {"layers": [0, 1]}, {"config": {"num_hidden_layers": 2}}]
)
def test_another_student_retrains_what_starts_from_it_and_no_teacher(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    teacher, student = student_keys(tmp_path, StudentConfig())
    same, other = student_keys(tmp_path, StudentConfig(**change))
    assert (same, other != student) == (teacher, True)


def test_other_weights_under_the_same_name_are_another_student(tmp_path: Path) -> None:
    given = StudentConfig(path=str(saved(tiny(Task.causal_lm), tmp_path / "given")))
    _, before = student_keys(tmp_path, given)
    saved(tiny(Task.causal_lm, seed=1), tmp_path / "given")
    assert student_keys(tmp_path, given)[1] != before


def student_keys(root: Path, student: StudentConfig) -> tuple[str, str]:
    """Return the keys of a teacher made from base and of a student cut from it."""
    source = root / "source"
    if not source.is_dir():
        saved(tiny(Task.causal_lm, shape=dataclasses.replace(SHAPE, layers=4)), source)
    placed = {"teacher": TrainStage(), "student": DistillStage()}
    attempt = open_fake(
        root, "run", 1, Run(recipe="distill", stages=placed, primary_arm="student", student=student)
    )
    made = Artifact(source, "model", "b" * 32, 1)
    session = attempt.session
    teacher = stage_key(session, "teacher", placed["teacher"], {MODEL: made}, 0, None)
    given = {TEACHER: made, STUDENT_SOURCE: made}
    return teacher, stage_key(session, "student", placed["student"], given, 0, None)


# -- what all arms share --------------------------------------------------------------------------


def test_libraries_of_formats_and_optimizers_are_imported_before_the_first_arm_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first arm that uses one would pay its import for all others."""
    imported: list[Format] = []
    monkeypatch.setattr("pipeline.quantization.backend.import_library", imported.append)
    (tmp_path / "library_of_moments.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(optimizer.IMPORTED, OptimizerKind.adamw_8bit_torchao, "library_of_moments")
    clock = PhaseClock()
    run = Run(recipe="r", primary_arm="a")
    warm = WarmUp(run, Dataset("d", "0" * 32, {}, None), torch.device("cpu"), clock)
    QuantizeStage(format=Format.nf4).warm_up({}, warm)
    TrainStage().warm_up({}, warm)
    assert (imported, "library_of_moments" in sys.modules) == ([Format.nf4], False)
    run.training.optimizer = OptimizerKind.adamw_8bit_torchao
    TrainStage().warm_up({}, warm)
    assert "library_of_moments" in sys.modules
    assert set(clock.mark()[1]) - {"other"} == {"import"}


def test_a_failure_without_words_is_not_called_an_interruption() -> None:
    assert [rows._unsaid(error) for error in (NotImplementedError(), KeyboardInterrupt())] == [
        "NotImplementedError",
        "interrupted",
    ]


def test_another_teacher_has_every_arm_assessed_again(root: Path) -> None:
    """The controls do not read it, and are not made again; but their agreement with it is anew."""
    run = the_run()
    run.stages["teacher"] = FakeStage([30, 30])
    run.stages["student"] = FakeDistill([20, 20], ["teacher"])
    invoke(root, "run-1", 1, run)
    run.stages["teacher"].says = ", taught more"
    second = invoke(root, "run-2", 1, run)
    assert of_run(second) == {"work": 50, "assess": 8, "retry": 0, "compare": 6, "overhead": 2}
    assert minutes(second.book.reused_h) == pytest.approx(12 + 9)


def test_a_point_of_a_curve_is_charged_with_loading_and_preparing(root: Path) -> None:
    """Student: 20 minutes of work, 12 in steps and 2 of evaluation, so that 6 are fixed; control:
    12 less 9 and 1, so that 2 are. Both hold Q at their second reading: 6 + 8, and 2 + 6.
    """

    def curve(*at: float, evaluated: float) -> list[dict[str, Any]]:
        return [
            reading(tokens=n, metric=metric, minutes=m, evaluated=evaluated, constant=1)
            for n, (m, metric) in enumerate(zip(at, (3.0, 2.0, 2.0), strict=True), 1)
        ]

    run = the_run()
    run.stages["student"] = FakeStage([20], ["teacher"], curve=curve(4, 8, 12, evaluated=2))
    run.stages["control_compute"] = FakeStage([12], curve=curve(3, 6, 9, evaluated=1))
    training = invoke(root, "run-1", 1, run).book.comparisons[0]["training"]
    assert training["rule"].startswith("first of two consecutive evaluations")
    assert minutes(training["c_arm"]["value"]) == pytest.approx(30 + 6 + 8)
    assert minutes(training["c_base"]["value"]) == pytest.approx(2 + 6)


def test_goodput_of_a_stage_that_trains_is_its_productive_share(root: Path) -> None:
    """Steps take 22 of the student's minutes, and its assessment 2."""
    run = the_run()
    run.stages["student"] = FakeStage([22], ["teacher"])
    attempt = invoke(root, "run-1", 1, run)
    counts = {row["arm"]: row["ledger"]["counts"] for row in attempt.book.rows}
    assert counts["student"]["goodput"]["value"] == pytest.approx(22 / 24)
    assert counts["teacher"]["goodput"]["value"] == pytest.approx(30 / 32)


def test_rows_that_do_not_add_up_to_the_run_are_reported(root: Path) -> None:
    running = invoke(root, "run-1", 1, the_run_at_once())
    assert disagreements(running) == []
    running.book.rows.pop(0)  # the teacher: 30 minutes of work, 2 of assessment
    work, assess = disagreements(running)
    assert work == (
        "the rows have 0.683333 device-hours of work, the run has 1.18333: please report it"
    )
    assert "of assess" in assess


def the_run_at_once() -> Run:
    """Return the run without the kill."""
    run = the_run()
    run.stages["student"] = FakeStage([20], ["teacher"])
    return run
