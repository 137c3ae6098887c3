"""In which order stages come to their rows: seed after seed, as the recipe has them. With
`parallel.stages=true` stage after stage, each for all seeds; those that need nothing of one another
are made at once before, each by one rank, and are found made when their turn comes.

While ranks work on stages of their own, each stage is booked with the time of its rank. What ranks
wait until the slowest has ended is `idle_rank`, of no stage.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.arms import BASE
from pipeline.errors import BudgetSpent, Preempted, StageFailed
from pipeline.ledger.shapes import HistoryEntry, RankTime
from pipeline.report.progress import progress_bar
from pipeline.runs.base_model import base_artifact
from pipeline.runs.book import Arm
from pipeline.runs.keys import stage_key
from pipeline.runs.lane import (
    REPORT_S,
    Beside,
    Lane,
    Reports,
    Worked,
    alive,
    over,
    planned,
    share_of,
    work,
)
from pipeline.runs.resume import from_checkpoint
from pipeline.runs.rows import broken_row, made_row
from pipeline.runs.runner import StageRunner
from pipeline.runs.running import Running
from pipeline.runs.timeline import Ended
from pipeline.stages.base import Stage, WarmUp, arms_read
from pipeline.stages.context import Output
from pipeline.training.meeting import Meeting


def run_stages(running: Running) -> None:
    """Bring every stage of the recipe to its row, for every seed."""
    session, runners = running.session, dict[int, StageRunner]()
    names = list(session.stages)
    turns = [(seed, name) for seed in session.seeds for name in names]
    at_once = session.run.parallel.stages and session.ranks.several
    if at_once:
        turns.sort(key=lambda turn: names.index(turn[1]))
    for seed in session.seeds if at_once else ():
        runners[seed] = _runner(running, seed)
    for seed, name in turns:
        if at_once:
            _make_at_once(running, runners)
        elif seed not in runners:
            runners[seed] = _runner(running, seed)
        runner, stage = runners[seed], session.stages[name]
        settled = stage.settle(name, runner.attempts(name, stage))
        if settled is not None:
            runner.attempt(name, settled)


def _runner(running: Running, seed: int) -> StageRunner:
    session = running.session
    if session.gate is None:
        base = base_artifact(session.run, session.data, seed, session.store, session.clock)
        running.book.arms[BASE, seed] = Arm(base)
    return StageRunner(running, seed)


def _make_at_once(running: Running, runners: dict[int, StageRunner]) -> None:
    """Make the artifacts of the stages that can be made now, one by each rank; of a single one, all
    ranks share the work at its turn.
    """
    ready = [
        (runner, name, stage)
        for runner in runners.values()
        for name, stage in _ready(runner).items()
    ]
    # what was made is left to its turn, before anything is planned for it, or hashed
    lanes = _unmade([_lane(*each) for each in ready], runners)
    if lanes and len(lanes) < running.session.ranks.size:
        lanes += _matching(runners, lanes)
    if len(lanes) < 2:
        return
    with ExitStack() as held:
        # in one order for everybody: who waits for one holds none that comes after it
        for lane in sorted(lanes, key=lambda each: each.key):
            held.enter_context(running.timeline.hold(lane.key, lane.name))
        lanes = _unmade(lanes, runners)[: running.session.ranks.size]
        if len(lanes) > 1:
            running.timeline.check_budget()
            meeting = running.session.ranks.meeting
            assert meeting is not None, "there are several ranks"
            _AtOnce(running, runners, lanes, meeting, f"beside/{uuid.uuid4().hex}").make()


def _unmade(lanes: list[Lane], runners: dict[int, StageRunner]) -> list[Lane]:
    return [lane for lane in lanes if runners[lane.seed].remembered(lane.key) is None]


def _matching(runners: dict[int, StageRunner], lanes: list[Lane]) -> list[Lane]:
    """Return the stages whose steps are to match the FLOPs of stages that are about to be made:
    those are counted before.
    """
    found: list[Lane] = []
    for seed, runner in runners.items():
        session = runner.running.session
        others = {lane.name: lane for lane in lanes if lane.seed == seed}
        for name, stage in _ready(runner, frozenset(others)).items():
            wanted = {*stage.matched(session.run)} & set(others)
            if name in others or not wanted:
                continue
            about: dict[str, Any] = {"device": session.device, "data": session.data}
            plans = {
                arm: planned(others[arm], run=session.run, clock=session.clock, **about)
                for arm in wanted
            }
            known = {arm: plan for arm, plan in plans.items() if plan is not None}
            if known.keys() == wanted:
                found.append(_lane(runner, name, stage, known))
    return found


def _ready(runner: StageRunner, made: frozenset[str] = frozenset()) -> dict[str, Stage]:
    """Return the stages that all ranks would share, whose models are there and which none has made
    yet. One that may be refused, that tries fallbacks, or that fits no device by itself waits for
    its turn; so does one whose steps are to match the FLOPs of another.

    Args:
        made: Arms whose FLOPs count as known.
    """
    session, arms = runner.running.session, runner.running.book.arms
    found: dict[str, Stage] = {}
    for name, stage in session.stages.items():
        wanted = {*arms_read(stage, session.run), *({*stage.matched(session.run)} - made)}
        there = all((arm, runner.seed) in arms for arm in wanted)
        alone = stage.optional or stage.may_be_refused() or stage.fallbacks(name)
        alone = alone or name in session.shared_by_need
        if (name, runner.seed) in arms or alone or not there or not stage.is_split(session.run):
            continue
        if runner.unavailable(name, stage) is None:
            found[name] = stage
    return found


def _lane(
    runner: StageRunner, name: str, stage: Stage, plans: Mapping[str, Output] | None = None
) -> Lane:
    """Return what a rank is told of a stage.

    Args:
        plans: What stages that it matches will report of their FLOPs.
    """
    session, seed = runner.running.session, runner.seed
    inputs, matched = runner.inputs(name, stage), runner.matched_flops(stage, plans)
    key = stage_key(session, name, stage, inputs, seed, matched)
    like = runner.like(stage, plans)
    return Lane(
        name=name,
        stage=stage,
        inputs=inputs,
        seed=seed,
        ranks=session.ranks.size,
        key=key,
        run_id=session.run_id,
        attempt=session.number,
        like=None if like is None else like.to_json(),
        matched_flops=matched,
        led=runner.running.timeline.led.get((name, seed), []),
        checkpoints=runner.checkpoints(name, stage, inputs, key, matched),
        store=session.store.root,
        folder=session.folder,
        manifest=runner.manifest(name, stage, inputs, key),
    )


@dataclass(slots=True)
class _AtOnce:
    """Stages under way, as rank 0 sees them, which makes the first one itself."""

    running: Running
    runners: dict[int, StageRunner]
    lanes: list[Lane]
    meeting: Meeting
    name: str
    worked: dict[int, Worked] = field(default_factory=dict)
    _looked: float = 0.0
    _seen: dict[int, tuple[str | None, float]] = field(default_factory=dict)
    _reports: Reports = field(init=False)

    def __post_init__(self) -> None:
        self._reports = Reports(self.meeting, self.name)

    def make(self) -> None:
        """Make the artifacts; keep what that took.

        Raises:
            Exception: Why one of them was not made; the others are kept.
        """
        session = self.running.session
        for lane in self.lanes:
            self.runners[lane.seed].announce(lane.name, lane.stage)
        first = self.lanes[0]
        shared = WarmUp(session.run, session.data, session.device, session.clock)
        first.stage.warm_up(first.inputs, shared)
        start_ns, before = session.clock.mark()
        session.journal.write(
            "beside",
            attempt=session.number,
            start_ns=start_ns,
            ranks=session.ranks.size,
            arms=[{"arm": lane.name, "seed": lane.seed} for lane in self.lanes],
            clock_ns=before,
        )
        broken: BaseException | None = None
        try:
            session.ranks.told(Beside(tuple(self.lanes), self.name))
            self.worked[0] = work(
                first,
                run=session.run,
                device=session.device,
                data=session.data,
                clock=session.clock,
                report=lambda what, *about: self._take(0, what, *about),
                should_stop=self._should_stop,
                progress=progress_bar,
            )
            # Ctrl-C while this rank worked stops the others too
            self._await_all(stopped=isinstance(self.worked[0].error, KeyboardInterrupt))
        # Ctrl-C and signals too: what was spent is charged.
        except BaseException as error:  # noqa: BLE001
            broken = error
            with suppress(Exception):
                self._await_all(stopped=True)
        finally:
            self.meeting.put(over(self.name), "1")
        made = self._book(start_ns, before, broken)
        errors = [each.error for each in self.worked.values() if each.error is not None]
        if broken is not None or errors:
            raise broken or errors[0]
        self._check_plans()
        self.running.book.notes.append(
            f"{', '.join(made)} were made at once (parallel.stages): each by one of"
            f" {session.ranks.size} ranks, whose time it is booked with"
        )

    def _check_plans(self) -> None:
        """Refuse a stage that has matched what another one was to spend, and did not.

        Raises:
            StageFailed: Naming it.
        """
        told = [(lane, self.worked[rank].output) for rank, lane in enumerate(self.lanes)]
        for lane in self.lanes:
            spent = {
                other.name: Output.from_json(output)
                for other, output in told
                if output is not None and other.seed == lane.seed
            }
            found = self.runners[lane.seed].matched_flops(lane.stage, spent)
            if found != lane.matched_flops:
                raise StageFailed(
                    f"stage {lane.name}: its steps match {lane.matched_flops:.6g} FLOPs that were"
                    f" planned, and {found or 0.0:.6g} were spent; the same command makes it again,"
                    " after what it matches"
                )

    # -- while they work --------------------------------------------------------------------------

    def _should_stop(self) -> type[Exception] | None:
        """Look after the others, from time to time; return what a stage is to end with, or None."""
        if time.monotonic() - self._looked >= REPORT_S:
            self._look()
        return self.running.timeline.should_stop()

    def _look(self) -> None:
        """Take what ranks report, and say when all are to stop.

        Raises:
            RankLost: If one does not answer any more.
        """
        self._looked = time.monotonic()
        for rank in range(1, self.running.session.ranks.size):
            for what, about in self._reports.of(rank):
                self._take(rank, what, *about)
            if rank < len(self.lanes) and rank not in self.worked:
                self._check_alive(rank)
        stop = self.running.timeline.should_stop()
        if stop is not None:
            self._reports.stop(stop)

    def _check_alive(self, rank: int) -> None:
        now, (seen, since) = (
            self.meeting.get(alive(self.name, rank)),
            self._seen.get(rank, ("", self._looked)),
        )
        if now != seen:
            since = self._looked
        self._seen[rank] = now, since
        said = self.running.session.ranks.failure()
        patience_s = self.meeting.patience_s
        if said is not None or self._looked - since > patience_s:
            silent = f"rank {rank} gave no sign of life for {patience_s:.0f} s"
            raise self.running.session.ranks.lost(RuntimeError(silent))

    def _await_all(self, *, stopped: bool = False) -> None:
        """Wait until every rank has ended its stage."""
        if stopped:
            self._reports.stop(self.running.timeline.should_stop() or Preempted)
        with self.running.session.clock.phase("comm_wait"):
            while len(self.worked) < len(self.lanes):
                self._look()
                time.sleep(REPORT_S / 10)

    def _take(self, rank: int, what: str, *about: Any) -> None:
        """Book what a rank reports; one without a stage, of signals alone."""
        if what == "signal":
            [self.running.timeline.stop_signal] = about
            return
        lane, session, timeline = self.lanes[rank], self.running.session, self.running.timeline
        of_arm = {"arm": lane.name, "seed": lane.seed, "attempt": lane.attempt}
        trace = timeline.trace(lane.name, lane.seed, lane.attempt)
        if what == "ended":
            [self.worked[rank]] = about
        elif what == "say":
            self.running.book.notes += about
        elif what == "points":
            step, values = about
            trace.reached = max(trace.reached, step)
            session.journal.write("points", **of_arm, step=step, values=values)
        elif what == "checkpoint":
            trace.saved, trace.saved_ns = about
            trace.reached = max(trace.reached, trace.saved)
            session.journal.write(
                "checkpoint", **of_arm, step=trace.saved, phases_ns=trace.saved_ns
            )
        else:
            assert what == "resumed", what
            self._resumed(lane, *about)

    def _resumed(self, lane: Lane, step: int, history: list[HistoryEntry]) -> None:
        if step:
            print(f"{lane.name}: resuming from step {step}", flush=True)
        of_arm = {"arm": lane.name, "seed": lane.seed, "attempt": lane.attempt}
        self.running.session.journal.write("resume", **of_arm, step=step, history=history)
        from_checkpoint(self.running, lane.name, lane.seed, step, history)

    # -- when all have ended ----------------------------------------------------------------------

    def _book(
        self, start_ns: int, before: dict[str, int], broken: BaseException | None
    ) -> list[str]:
        """Book what each stage took, and add its row; return those that were made."""
        session, timeline, book = (self.running.session, self.running.timeline, self.running.book)
        ranks = session.ranks.size
        passed_ns = session.clock.mark()[0] - start_ns
        ended: list[Ended] = []
        for rank, lane in enumerate(self.lanes):
            worked = self.worked.get(rank)
            # of a rank that did not say what it did
            phases = {"other": passed_ns} if worked is None else worked.phases_ns
            share = share_of(phases, ranks)
            error = broken if worked is None else worked.error
            saved_ns = timeline.trace(lane.name, lane.seed, lane.attempt).saved_ns
            ended.append(Ended(lane.name, lane.seed, share, _kept_ns(share, saved_ns, error)))
        made: list[str] = []
        for rank, window in enumerate(timeline.close_beside(start_ns, before, ended, ranks)):
            lane, worked = self.lanes[rank], self.worked.get(rank)
            if worked is None or worked.artifact is None or worked.output is None:
                error = broken if worked is None else worked.error
                assert error is not None, lane.name
                book.add(broken_row(timeline, lane.name, lane.stage, lane.seed, window, error))
                continue
            told: RankTime = {
                "rank": rank,
                "host": worked.host,
                "phases_ns": worked.phases_ns,
                "local_ns": sum(worked.phases_ns.values()),
            }
            record = self.runners[lane.seed].remember(
                lane.name,
                lane.key,
                window,
                lane.checkpoints,
                worked.artifact,
                worked.output,
                worked.memory,
                [told],
            )
            made.append(lane.name)
            # until its turn comes, when it is assessed
            book.add(made_row(timeline, lane.name, lane.stage, lane.seed, record, None, {}))
        return made


def _kept_ns(
    phases_ns: dict[str, int], saved_ns: dict[str, int], error: BaseException | None
) -> int:
    """Return how much of a stage's time counts: all of it where it was made or a checkpoint was its
    last step, that until the last one where Ctrl-C came.
    """
    whole = sum(phases_ns.values())
    if error is None or isinstance(error, Preempted | BudgetSpent):
        return whole
    return min(whole, sum(saved_ns.values())) if isinstance(error, KeyboardInterrupt) else 0
