"""Stages that need nothing of one another, made at once: each is booked with its rank's time.

The second rank is a call in the same process, and a clock stands still until a stage lets it pass:
what comes out is worked out by hand. `tests/test_several_ranks.py` has it with processes.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from test_running import CLOCK, DEVICE, MINUTE_NS, FakeStage, Killed, minutes, open_fake, root

import pipeline.runs.lane
from pipeline.config.settings.run import Run
from pipeline.errors import Preempted, StageFailed
from pipeline.ledger.journal import read_events
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.values import Value, measured
from pipeline.runs import stages
from pipeline.runs.assemble import disagreements
from pipeline.runs.lane import Beside, Reports, over, work_beside
from pipeline.runs.opening import why_unusable
from pipeline.runs.running import Running
from pipeline.runs.stages import run_stages
from pipeline.stages.context import Output
from pipeline.training.meeting import Meeting
from pipeline.training.ranks import Place, Ranks

__all__ = ["root"]  # a fixture


@dataclass
class Splits(FakeStage):
    """A stage that ranks would share."""

    def is_split(self, run: Run) -> bool:
        return True


@dataclass
class Fails(Splits):
    """Diverges after its minutes."""

    def run(self, inputs: Any, ctx: Any) -> Any:
        with ctx.clock.phase("forward"):
            CLOCK.pass_minutes(self.minutes[0])
        raise StageFailed("diverged")


@dataclass
class Stops(Splits):
    """Asks after its minutes whether it is to stop."""

    def run(self, inputs: Any, ctx: Any) -> Any:
        with ctx.clock.phase("forward"):
            CLOCK.pass_minutes(self.minutes[0])
        time.sleep(0.01)  # what ranks tell is looked at from time to time
        stop = ctx.should_stop()
        assert stop is not None, "rank 1 was told to"
        raise stop("stopped")


@dataclass
class Counted(Splits):
    """Says before what it will take, rightly or not, and after it what it took."""

    plans: float | None = 100.0

    def planned(self, inputs: Any, ctx: Any) -> Output | None:
        return None if self.plans is None else Output(counts={"model_flops": measured(self.plans)})

    def run(self, inputs: Any, ctx: Any) -> Output:
        output = Splits.run(self, inputs, ctx)
        return dataclasses.replace(output, counts={**output.counts, "model_flops": measured(100.0)})


@dataclass
class Matches(Splits):
    """Takes as much as the student."""

    def matched(self, run: Run) -> tuple[str, ...]:
        return ("student",)


class Store:
    """What ranks leave for one another, in this process."""

    def __init__(self) -> None:
        self.left: dict[str, Any] = {}

    def set(self, name: str, value: Any) -> None:
        self.left[name] = value if isinstance(value, bytes) else str(value).encode()

    def get(self, name: str) -> Any:
        return self.left[name]

    def check(self, names: list[str]) -> bool:
        return all(name in self.left for name in names)


@dataclass(frozen=True, slots=True)
class Here(Meeting):
    """Rank 0's meeting; rank 1 does what it is told at once."""

    follow: Callable[[Beside], None] = field(default=lambda _: None)

    def tell(self, name: str, thing: Any) -> None:
        Meeting.tell(self, name, thing)
        if name.startswith("told/") and isinstance(thing[1], Beside):
            self.follow(thing[1])

    def live(self, name: str = "") -> None:
        pass


def silent(*_: Any, **__: Any) -> Any:
    return nullcontext(lambda *_: None)


def two_ranks(running: Running, signals: list[int] | None = None) -> Running:
    """Return a run of two ranks with a device each, of which the second one follows here."""
    session, store = running.session, Store()

    def follow(task: Beside) -> None:
        about = {"run": session.run, "data": session.data, "device": DEVICE}
        second = Ranks(Place(1, 2, 1, 2), meeting=Here(store, 15.0))
        with suppress(Killed):
            work_beside(task, second, signals or [], silent, clock=PhaseClock(CLOCK), **about)

    ranks = Ranks(Place(0, 2, 0, 2), meeting=Here(store, 15.0, follow=follow))
    return dataclasses.replace(running, session=dataclasses.replace(session, ranks=ranks))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.runs.lane, "REPORT_S", 0.001)


def the_run(*, student: FakeStage, control: FakeStage) -> Run:
    run = Run(recipe="distill", stages={"student": student, "control": control})
    run.parallel.stages = True
    return run


def begun(root: Path, run: Run, number: int = 1) -> Running:
    running = two_ranks(open_fake(root, "run-1", number, run, devices=2))
    for holder in (running.timeline, running.book):
        holder.session = running.session
    CLOCK.pass_minutes(1)
    return running


def of_rows(running: Running, part: str) -> dict[tuple[str, int], float]:
    return {
        (row["arm"], row["attempt"]): round(
            minutes(row["ledger"]["device_hours"][part]["value"] or 0.0), 6
        )
        for row in running.book.all_rows()
    }


def total(running: Running, part: str) -> float:
    booked, _ = running.timeline.booking()
    return getattr(booked, f"{part}_ns") / MINUTE_NS


def test_each_stage_is_booked_with_its_ranks_time(root: Path) -> None:
    """Rank 1 takes 10 minutes and then, as rank 0 sees it, rank 0 takes 6: 16 minutes on two
    devices, of which 10 + 6 are work. Each assessment takes 2 minutes on both.
    """
    run = the_run(student=Splits([6]), control=Splits([10]))
    running = begun(root, run)
    run_stages(running)
    assert of_rows(running, "work") == {("student", 1): 6, ("control", 1): 10}
    assert of_rows(running, "assess") == {("student", 1): 4, ("control", 1): 4}
    assert total(running, "work") == 16
    _, overhead_ns = running.timeline.booking()
    assert overhead_ns["idle_rank"] == 16 * MINUTE_NS
    assert total(running, "attached") == 2 * (1 + 16 + 4)
    assert disagreements(running) == []
    for row, took in zip(running.book.rows, (6, 10), strict=True):
        ledger = row["ledger"]
        assert ledger["meter_valid"], ledger["meter_problems"]
        assert ledger["wall_s"]["value"] == 60 * (took + 2)
        assert ledger["phases_ns"]["forward"] == took * MINUTE_NS
        [told] = ledger["ranks"]
        assert told["phases_ns"]["forward"] == took * MINUTE_NS
        energy = Value.from_json(ledger["energy_j"])
        assert energy.why_missing == "other stages of this run were at work beside it"
    assert [row["ledger"]["ranks"][0]["rank"] for row in running.book.rows] == [0, 1]
    # the journal alone tells the same
    events = read_events(running.session.folder / "journal.jsonl")
    assert why_unusable(events, 1) is None
    again = open_fake(root, "run-1", 2, run, devices=2)
    assert total(again, "work") == 16


def test_what_was_made_at_once_is_found_again(root: Path) -> None:
    run = the_run(student=Splits([6]), control=Splits([10]))
    run_stages(begun(root, run))
    running = two_ranks(open_fake(root, "run-2", 1, run, devices=2))
    for holder in (running.timeline, running.book):
        holder.session = running.session
    run_stages(running)
    assert total(running, "work") == 0
    assert of_rows(running, "work") == {("student", 1): 6, ("control", 1): 10}
    assert {row["reused"] for row in running.book.rows} == {"run-1"}
    assert minutes(running.book.reused_h) == pytest.approx(16 + 8)


def test_what_needs_another_waits_for_its_turn(root: Path) -> None:
    """A stage alone is no wave: all ranks share it."""
    run = the_run(student=Splits([6]), control=Splits([10], needs=["student"]))
    running = begun(root, run)
    names = [set(stages._ready(stages._runner(running, 0)))]
    assert names == [{"student"}]


def test_what_matches_another_is_made_beside_it_by_a_count_before(root: Path) -> None:
    run = the_run(student=Counted([6]), control=Matches([10]))
    running = begun(root, run)
    run_stages(running)
    assert of_rows(running, "work") == {("student", 1): 6, ("control", 1): 10}
    assert total(running, "work") == 16  # found made at its turn


def test_a_count_that_was_wrong_is_told_and_the_stage_is_made_again(root: Path) -> None:
    running = begun(root, the_run(student=Counted([6], plans=90.0), control=Matches([10, 8])))
    with pytest.raises(StageFailed, match=r"control: its steps match 90 FLOPs .* 100 were spent"):
        run_stages(running)
    assert disagreements(running) == []
    run = the_run(student=Counted([6], plans=90.0), control=Matches([10, 8]))
    again = open_fake(root, "run-1", 2, run, devices=2)
    run_stages(again)
    assert of_rows(again, "work")["control", 2] == 16  # 8 minutes, of both devices
    assert disagreements(again) == []


def test_what_nobody_can_count_before_is_waited_for(root: Path) -> None:
    running = begun(root, the_run(student=Counted([6], plans=None), control=Matches([10])))
    runners = {0: stages._runner(running, 0)}
    [(name, stage)] = stages._ready(runners[0]).items()
    assert name == "student"
    assert stages._matching(runners, [stages._lane(runners[0], name, stage)]) == []


def test_what_fits_no_device_by_itself_is_shared(root: Path) -> None:
    running = begun(root, the_run(student=Splits([6]), control=Splits([10])))
    session = dataclasses.replace(running.session, shared_by_need=frozenset({"control"}))
    running = dataclasses.replace(running, session=session)
    assert set(stages._ready(stages._runner(running, 0))) == {"student"}


def test_a_stage_that_fails_ends_the_run_and_keeps_the_other(root: Path) -> None:
    running = begun(root, the_run(student=Splits([6]), control=Fails([10])))
    with pytest.raises(StageFailed, match="stage control: diverged"):
        run_stages(running)
    assert of_rows(running, "work") == {("student", 1): 6, ("control", 1): 0}
    assert of_rows(running, "retry") == {("student", 1): 0, ("control", 1): 10}
    states = {row["arm"]: row["status"] for row in running.book.rows}
    assert states == {"student": "FINISHED", "control": "FAILED"}
    assert disagreements(running) == []
    assert all(row["ledger"]["meter_valid"] for row in running.book.rows)


def test_stages_that_are_killed_together_keep_what_their_checkpoints_have(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is killed after 10 minutes, with a checkpoint of the fourth; rank 0 after 6, with one
    of the third. They lasted 16 minutes of two devices: each stage is charged with 16, and keeps 4
    and 3.
    """
    student = Splits([6, 5], checkpoints=[3], resumes=[0, 1], ends=["killed", "ok"])
    control = Splits([10, 7], checkpoints=[4], resumes=[0, 1], ends=["killed", "ok"])

    def dies(self: Any, *_: Any, **__: Any) -> Any:
        self.running.session.journal.write("heartbeat")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stages._AtOnce, "_await_all", lambda *_, **__: None)
        patch.setattr(stages._AtOnce, "_book", dies)
        killed = begun(root, the_run(student=student, control=control))
        with pytest.raises(Killed):
            run_stages(killed)
    events = read_events(killed.session.folder / "journal.jsonl")
    assert why_unusable(events, 1) is None
    CLOCK.pass_minutes(600)  # nobody was attached meanwhile
    running = begun(root, the_run(student=student, control=control), number=2)
    run_stages(running)
    assert of_rows(running, "work") == {
        **{("student", 1): 3, ("control", 1): 4},
        **{("student", 2): 5, ("control", 2): 7},
    }
    retried = of_rows(running, "retry")
    assert retried == {
        **{("student", 1): 13, ("control", 1): 12},
        **{("student", 2): 0, ("control", 2): 0},
    }
    assert total(running, "attached") == 2 * (1 + 16) + 2 * (1 + 12 + 4)
    assert disagreements(running) == []
    assert all(row["ledger"]["meter_valid"] for row in running.book.all_rows())


def test_a_signal_to_another_rank_stops_all_and_loses_nothing(root: Path) -> None:
    """Rank 1 says that it was told to stop; rank 0's stage is asked between its steps."""
    run = the_run(student=Stops([6, 1]), control=Stops([10, 1]))
    running = begun(root, run)
    running = two_ranks(running, signals=[signal.SIGTERM])
    for holder in (running.timeline, running.book):
        holder.session = running.session
    with pytest.raises(Preempted):
        run_stages(running)
    assert running.timeline.stop_signal == signal.SIGTERM
    assert of_rows(running, "work") == {("student", 1): 6, ("control", 1): 10}
    assert {row["status"] for row in running.book.rows} == {"KILLED"}
    assert disagreements(running) == []


def test_a_rank_without_a_stage_tells_of_its_signals_until_all_have_ended() -> None:
    meeting = Meeting(dist.HashStore(), patience_s=5.0)
    signals: list[int] = []
    ranks = Ranks(Place(2, 3), meeting=meeting)
    task = Beside((), "beside/0")
    work_beside(task, ranks, signals, progress=lambda *_: None)
    reports = Reports(meeting, "beside/0")
    assert reports.of(2) == []
    signals.append(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while not (found := reports.of(2)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == [("signal", (signal.SIGTERM,))]
    work_beside(task, ranks, [], progress=lambda *_: None)
    meeting.put(over("beside/0"), "1")
    for thread in [each for each in threading.enumerate() if each.name == "signals"]:
        thread.join(30)
        assert not thread.is_alive()
