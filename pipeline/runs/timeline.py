"""Where the time of a run went: windows, spans, and what is left of its budget.

Every interval that belongs to a stage is a *window*: work (start to committed artifact) or assess
(the artifact reloaded from disk). A row is what the windows of one arm in one attempt took; what no
window covers is overhead.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import BudgetSpent, Preempted
from pipeline.ledger import others
from pipeline.ledger.booking import Booking, Span, Window, book, device_hours, outside_ns
from pipeline.ledger.disturbance import Disturbance, of_device, of_host
from pipeline.ledger.gpu_usage import Usage, unread
from pipeline.ledger.others import Accounts, Load
from pipeline.ledger.phases import difference, total
from pipeline.ledger.shapes import HistoryEntry, RankTime
from pipeline.runs.session import Session
from pipeline.store.artifacts import plain

Kind = Literal["work", "assess", "compare"]
BESIDE = "other stages of this run were at work beside it"


@dataclass(slots=True)
class OpenWindow:
    """A window being measured; `elapsed_ns` and `phases_ns` are there once it is closed, `ranks`
    where several did what it is for and told of it.
    """

    start_ns: int
    before: dict[str, int]
    elapsed_ns: int = 0
    phases_ns: dict[str, int] = field(default_factory=dict)
    ranks: list[RankTime] = field(default_factory=list)
    beside: int = 1  # among how many ranks the devices were shared out, as `Window` has it


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a stage that worked beside others; times are its share of all devices'."""

    arm: str
    seed: int
    phases_ns: dict[str, int]
    kept_ns: int


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
class Timeline:
    """The time of a run over all its attempts.

    Attributes:
        windows: Of all attempts of this run.
        spans: Of this run's earlier attempts, by attempt.
        inside_ns: Self times by phase in the windows of this attempt.
        overhead_ns: Device-nanoseconds of earlier attempts outside of windows, by phase.
        compare_ns: Device-nanoseconds of comparison passes, by phase, over all attempts.
        loads: What others took of the host in the windows of this attempt, by kind, arm and seed.
        traces: How far a stage came in its steps, by arm, seed and attempt.
        led: What led to the checkpoint that a stage resumes from, by arm and seed.
        stop_signal: The signal that asked the run to end.
        closed: The last reading of the clock that is booked, and the self times until then.
    """

    session: Session
    windows: list[Window] = field(default_factory=list)
    spans: dict[int, Span] = field(default_factory=dict)
    inside_ns: dict[str, int] = field(default_factory=dict)
    overhead_ns: dict[str, int] = field(default_factory=dict)
    compare_ns: dict[str, int] = field(default_factory=dict)
    loads: dict[tuple[str, str | None, int], list[Load]] = field(default_factory=dict)
    traces: dict[tuple[str, int, int], Trace] = field(default_factory=dict)
    led: dict[tuple[str, int], list[HistoryEntry]] = field(default_factory=dict)
    stop_signal: int | None = None
    closed: tuple[int, dict[str, int]] | None = None

    @contextmanager
    def window(self, kind: Kind, arm: str | None, seed: int) -> Generator[OpenWindow]:
        """Measure a window and journal it. What fails in it is lost; a checkpoint keeps what led to
        it.
        """
        session = self.session
        start_ns, before = session.clock.mark()
        opened = OpenWindow(start_ns, before)
        session.journal.write(
            "open",
            kind=kind,
            arm=arm,
            seed=seed,
            attempt=session.number,
            start_ns=start_ns,
            clock_ns=before,
        )
        kept, saved_ns = True, 0
        # Inside the window on both edges, so that reading the device is charged to what it is read
        # for.
        others_before = self._mark_edge()
        try:
            yield opened
        except BaseException as error:
            # Both stop after a checkpoint, so nothing is lost.
            kept = isinstance(error, Preempted | BudgetSpent) or kind == "compare"
            # Ctrl-C comes at any moment: what counts is the time up to the last checkpoint.
            if isinstance(error, KeyboardInterrupt) and kind == "work" and arm is not None:
                saved_ns = sum(self.trace(arm, seed, session.number).saved_ns.values())
            raise
        finally:
            load = others.load_between(others_before, self._mark_edge())
            self.loads.setdefault((kind, arm, seed), []).append(load)
            # One reading for both, so that phases sum to the window exactly.
            end_ns, after = session.clock.mark()
            opened.elapsed_ns, opened.phases_ns = end_ns - start_ns, difference(after, before)
            closed = Window(
                kind=kind,
                arm=arm,
                seed=seed,
                attempt=session.number,
                start_ns=start_ns,
                end_ns=end_ns,
                kept_ns=opened.elapsed_ns if kept else saved_ns,
            )
            self._close(closed, opened, load, after)

    def _close(
        self, window: Window, opened: OpenWindow, load: Load, clock_ns: dict[str, int]
    ) -> None:
        self.windows.append(window)
        self.inside_ns = total(self.inside_ns, opened.phases_ns)
        if window.kind == "compare":
            own_ns = total(opened.phases_ns, times=self.session.devices)
            self.compare_ns = total(self.compare_ns, own_ns)
        self.session.journal.write(
            "window",
            arm=window.arm,
            seed=window.seed,
            window=plain(window),
            phases_ns=opened.phases_ns,
            clock_ns=clock_ns,
            others=load.to_json(),
        )

    def close_beside(
        self, start_ns: int, before: dict[str, int], ended: Sequence[Ended], ranks: int
    ) -> list[OpenWindow]:
        """Journal the windows of stages that worked side by side since a mark: one after another,
        each as long as its stage's share of all devices' time. What they leave of the time since is
        `idle_rank`, of no window.

        Args:
            ended: With self times that are such shares.
            ranks: Among which the devices were shared out.
        """
        session = self.session
        session.clock.replace(before, total(*(each.phases_ns for each in ended)))
        found: list[OpenWindow] = []
        for each in ended:
            elapsed_ns = sum(each.phases_ns.values())
            opened = OpenWindow(start_ns, before, elapsed_ns, each.phases_ns, beside=ranks)
            of_arm = {"kind": "work", "arm": each.arm, "seed": each.seed}
            session.journal.write(
                "open", **of_arm, attempt=session.number, start_ns=start_ns, clock_ns=before
            )
            start_ns, before = start_ns + elapsed_ns, total(before, each.phases_ns)
            closed = Window(
                kind="work",
                arm=each.arm,
                seed=each.seed,
                attempt=session.number,
                start_ns=opened.start_ns,
                end_ns=start_ns,
                kept_ns=each.kept_ns,
                beside=ranks,
            )
            load = Load(why=BESIDE)
            self.loads.setdefault(("work", each.arm, each.seed), []).append(load)
            self._close(closed, opened, load, before)
            found.append(opened)
        return found

    def _mark_edge(self) -> Accounts | str:
        """Read the device at the edge of a window; return the kernel's accounts, or why they cannot
        be read.
        """
        with self.session.clock.phase("log"):
            self.session.sampler.mark()
            return others.read()

    def trace(self, arm: str, seed: int, attempt: int) -> Trace:
        """Return the trace of an attempt at a stage, a new one where there is none."""
        return self.traces.setdefault((arm, seed, attempt), Trace())

    def history(
        self, arm: str, seed: int, step: int, phases_ns: dict[str, int]
    ) -> list[HistoryEntry]:
        """Return what leads to a checkpoint at `step`: attempts, of any run, each with its time up
        to its last one.
        """
        now: HistoryEntry = {
            "run_id": self.session.run_id,
            "attempt": self.session.number,
            "step": step,
            "phases_ns": phases_ns,
        }
        return [*self.led.get((arm, seed), []), now]

    # -- sums -------------------------------------------------------------------------------------

    def booking(self) -> tuple[Booking, dict[str, int]]:
        """Return where the time of this run went until now, over all its attempts, and its overhead
        by phase.

        Both are in device-nanoseconds.
        """
        session = self.session
        now_ns, phases_ns = self.closed or session.clock.mark()
        span = Span(session.started_ns, now_ns, session.devices)
        booked = book(self.windows, {**self.spans, session.number: span})
        own_ns = total(difference(phases_ns, self.inside_ns), times=session.devices)
        return booked, outside_ns(booked, self.overhead_ns, own_ns)

    def close(self, **facts: str) -> None:
        """Book nothing that comes from now on, and journal so: hours can be booked again from the
        journal alone.

        Args:
            facts: What else is to stand there.
        """
        end_ns, clock_ns = self.closed = self.session.clock.mark()
        self.session.journal.write(
            "booked", attempt=self.session.number, end_ns=end_ns, clock_ns=clock_ns, **facts
        )

    def spent_hours(self) -> float:
        """Return the device-hours of this run until now, over all its attempts."""
        session = self.session
        now = Span(session.started_ns, session.clock.now_ns(), session.devices)
        return device_hours(sum(span.device_ns for span in (*self.spans.values(), now)))

    def devices_in(self, number: int) -> int:
        """Return how many devices an attempt of this run was attached to."""
        return self.spans[number].devices if number in self.spans else self.session.devices

    def usage(self, arm: str, seed: int, *kinds: Kind) -> Usage:
        """Return what the devices did (joules, shares, clocks) in an arm's windows of these kinds
        in this attempt, so far.
        """
        number = self.session.number
        own = [
            each
            for each in self.windows
            if (each.arm, each.seed, each.attempt) == (arm, seed, number)
            and each.kind in (kinds or ("work", "assess"))
        ]
        if any(each.beside > 1 for each in own):
            return unread(BESIDE)
        return self.session.sampler.usage(*((each.start_ns, each.end_ns) for each in own))

    def disturbance(self, arm: str, seed: int) -> Disturbance:
        """Return what disturbed the windows of an arm in this attempt, so far."""
        work, assess = (self.loads.get((kind, arm, seed), []) for kind in ("work", "assess"))
        if self.session.device.type == "cpu":
            return of_host(work, assess)
        return of_device(
            work,
            assess,
            foreign_load=self.usage(arm, seed).foreign_load,
            work_foreign_load=self.usage(arm, seed, "work").foreign_load,
            assess_foreign_load=self.usage(arm, seed, "assess").foreign_load,
        )

    # -- budget and stopping ----------------------------------------------------------------------

    def is_spent(self) -> bool:
        """Return whether `budget.device_hours` is."""
        limit = self.session.run.budget.device_hours
        return limit is not None and self.spent_hours() >= limit

    def is_out_of_wall(self) -> bool:
        """Return whether what is left of `budget.wall_seconds` is wanted for a checkpoint."""
        session, budget = self.session, self.session.run.budget
        if budget.wall_seconds is None:
            return False
        elapsed_s = (session.clock.now_ns() - session.started_ns) / 1e9
        return elapsed_s >= budget.wall_seconds - budget.wall_reserve_seconds

    def check_budget(self) -> None:
        """Start nothing that must stop at once.

        Raises:
            BudgetSpent, Preempted: If so.
        """
        if self.is_spent():
            limit = self.session.run.budget.device_hours
            raise BudgetSpent(
                f"budget.device_hours: {limit} is spent; raise it to resume from here"
            )
        if self.stop_signal is not None or self.is_out_of_wall():
            raise Preempted("stopped between stages; the same command resumes from there")

    def should_stop(self) -> type[Exception] | None:
        """Return what a stage is to end with between two steps, or None."""
        if self.is_spent():
            return BudgetSpent
        stops = self.stop_signal is not None or self.is_out_of_wall()
        return Preempted if stops else None

    @contextmanager
    def hold(self, key: str, what: str) -> Generator[None]:
        """Hold a key's lock; while another process makes what it stands for, this one waits on a
        device it holds.
        """
        with ExitStack() as held:
            # Waste, as waiting is: the device is held meanwhile.
            with self.session.clock.phase("comm_wait"):
                said = f"another process that makes {what}"
                held.enter_context(self.session.store.lock(key, said, self.check_budget))
            yield
