"""One of several stages that are made at once, each by one rank (`parallel.stages=true`).

A rank makes its stage alone, from the first step to the artifact in the store, and reports
meanwhile to rank 0, which alone writes the journal and decides when all stop.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.config.arms import file_name
from pipeline.config.settings.run import Run
from pipeline.errors import BudgetSpent, Preempted, StageFailed, UserError
from pipeline.ledger.attempted import attempted
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.memory import MemoryMeter
from pipeline.ledger.phases import PhaseClock, difference
from pipeline.ledger.shapes import Figures, HistoryEntry, OutputRecord
from pipeline.runs.out_of_memory import failing_on, snapshot_file
from pipeline.stages.base import Stage, WarmUp
from pipeline.stages.context import Context, Output
from pipeline.store.artifacts import Artifact, Store
from pipeline.training.meeting import Meeting
from pipeline.training.ranks import Ranks

if TYPE_CHECKING:
    from pipeline.data.documents import Dataset

REPORT_S = 1.0  # between two reports of a rank, and two looks of rank 0 at them
EXPECTED = (UserError, StageFailed, Preempted, BudgetSpent, KeyboardInterrupt)
STOPS: dict[str, type[Exception]] = {each.__name__: each for each in (Preempted, BudgetSpent)}
"""What rank 0 may say that all are to stop with."""

Report = tuple[str, tuple[Any, ...]]
"""What happened, and with what: `points` (step, values), `checkpoint` (step, phases_ns), `resumed`
(step, history), `say` (text), `signal` (number), `ended` (`Worked`).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A stage as its rank is told of it.

    Attributes:
        ranks: Among which the devices are shared out: its time counts as one part in so many.
        key: Of the stage.
        run_id: Of the run.
        attempt: At the run.
        like: What the stage reported that it is like.
        led: What led to the checkpoint that it resumes from, as far as this run knows.
        checkpoints: Of the stage's key.
        store: Where artifacts are.
        folder: Of the run.
        manifest: What artifact.json says of it.
    """

    name: str
    stage: Stage
    inputs: Mapping[str, Artifact]
    seed: int
    ranks: int
    key: str
    run_id: str
    attempt: int
    like: OutputRecord | None
    matched_flops: float | None
    led: list[HistoryEntry]
    checkpoints: Path
    store: Path
    folder: Path
    manifest: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Beside:
    """Stages that are made at once, by the rank of each.

    Attributes:
        name: Under which ranks leave their reports.
    """

    lanes: tuple[Lane, ...]
    name: str


@dataclass(frozen=True, slots=True)
class Worked:
    """What became of a stage.

    Attributes:
        phases_ns: Self times of its rank while it worked.
        host: Of that rank.
        artifact: None where it failed, or was stopped.
        error: Why.
    """

    phases_ns: dict[str, int]
    host: str
    memory: Figures = field(default_factory=dict)
    artifact: Artifact | None = None
    output: OutputRecord | None = None
    error: BaseException | None = None


def share_of(phases_ns: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Return the self times of one rank as its part of all devices' time."""
    return {name: ns // ranks for name, ns in phases_ns.items() if ns // ranks}


def work(
    lane: Lane,
    *,
    run: Run,
    device: Any,
    data: Dataset,
    clock: PhaseClock,
    report: Callable[..., None],
    should_stop: Callable[[], type[Exception] | None],
    progress: Callable[..., Any],
) -> Worked:
    """Make a stage's artifact, alone.

    Args:
        report: Takes what happened, and with what; see `Report`.

    Raises:
        Exception: What is no failure of the stage's own.
    """
    lane.stage.warm_up(lane.inputs, WarmUp(run, data, device, clock))
    memory = MemoryMeter()
    memory.start(device)
    before, host = clock.mark()[1], socket.gethostname()
    taken = lambda: difference(clock.mark()[1], before)
    context = _context(lane, run, device, data, clock, report, should_stop, progress, taken)
    snapshot = snapshot_file(lane.folder, lane.name, lane.attempt)
    store = Store(lane.store)
    try:
        with store.scratch() as context.out:
            with failing_on(device, run, snapshot, lane.name, "work", lane.stage):
                output = lane.stage.run(lane.inputs, context)
            with clock.phase("checkpoint"):
                manifest = {**lane.manifest, **output.about}
                artifact = store.commit(context.out, lane.stage.makes, manifest)
            with failing_on(device, run, snapshot, lane.name, "work", lane.stage):
                device_of(device).synchronise()
    except EXPECTED as error:
        return Worked(taken(), host, error=error)
    for note in output.notes:
        report("say", note)
    read = {part: value.to_json() for part, value in memory.read(device).items()}
    return Worked(taken(), host, read, artifact, output.to_json())


def planned(
    lane: Lane, *, run: Run, device: Any, data: Dataset, clock: PhaseClock
) -> Output | None:
    """Return what a stage will report of its FLOPs, without doing it; None where that is not known
    before, or could not be found out.
    """
    silent = lambda *_: None
    with TemporaryDirectory() as folder:
        context = _context(
            lane, run, device, data, clock, silent, silent, lambda *_: nullcontext(silent), dict
        )
        context.out = Path(folder) / "out"
        context.out.mkdir()
        return attempted(lambda: lane.stage.planned(lane.inputs, context), lambda _: None)


def _context(
    lane: Lane,
    run: Run,
    device: Any,
    data: Dataset,
    clock: PhaseClock,
    report: Callable[..., None],
    should_stop: Callable[[], type[Exception] | None],
    progress: Callable[..., Any],
    taken: Callable[[], dict[str, int]],
) -> Context:
    led = [*lane.led]

    def history(step: int) -> list[HistoryEntry]:
        now: HistoryEntry = {
            "run_id": lane.run_id,
            "attempt": lane.attempt,
            "step": step,
            "phases_ns": share_of(taken(), lane.ranks),
            "beside": lane.ranks,
        }
        return [*led, now]

    def resumed(step: int, history: list[HistoryEntry]) -> None:
        led[:] = history
        report("resumed", step, history)

    return Context(
        run=run,
        stage=lane.name,
        seed=lane.seed,
        device=device,
        data=data,
        clock=clock,
        out=lane.folder,  # `work` gives another one
        checkpoints=lane.checkpoints,
        like=None if lane.like is None else Output.from_json(lane.like),
        matched_flops=lane.matched_flops,
        points=lambda step, values: report("points", step, values),
        history=history,
        checkpointed=lambda step: report("checkpoint", step, share_of(taken(), lane.ranks)),
        resumed=resumed,
        should_stop=should_stop,
        progress=progress,
        say=lambda text: report("say", text),
        traces=lane.folder / "traces" / f"{file_name(lane.name)}-seed{lane.seed}",
    )


# -- between ranks --------------------------------------------------------------------------------


@dataclass(slots=True)
class Reporter:
    """Leaves what happens to a rank's stage where rank 0 looks, a few times a second at most."""

    meeting: Meeting
    name: str
    rank: int
    _waiting: list[Report] = field(default_factory=list)
    _left: int = 0
    _at: float = 0.0

    def __call__(self, what: str, *about: Any) -> None:
        """Report; what only readers wait for is gathered for a second."""
        self._waiting.append((what, about))
        if what != "points" or time.monotonic() - self._at >= REPORT_S:
            self.leave()

    def leave(self) -> None:
        """Leave what is waiting.

        Raises:
            RuntimeError: If rank 0 cannot be reached.
        """
        if self._waiting:
            self.meeting.tell(f"{self.name}/{self.rank}/{self._left}", self._waiting)
            self._left, self._waiting = self._left + 1, []
        self._at = time.monotonic()


@dataclass(slots=True)
class Reports:
    """What the ranks have reported, as rank 0 takes it."""

    meeting: Meeting
    name: str
    _taken: dict[int, int] = field(default_factory=dict)

    def of(self, rank: int) -> list[Report]:
        """Return what a rank has reported since the last call."""
        found: list[Report] = []
        while True:
            number = self._taken.get(rank, 0)
            left = self.meeting.found(f"{self.name}/{rank}/{number}")
            if left is None:
                return found
            self._taken[rank] = number + 1
            found += left

    def stop(self, kind: type[Exception]) -> None:
        """Have all ranks stop."""
        self.meeting.put(_stop(self.name), kind.__name__)


def _stop(name: str) -> str:
    return f"{name}/stop"


def over(name: str) -> str:
    """Return under which name rank 0 says that all stages have ended."""
    return f"{name}/over"


def alive(name: str, rank: int) -> str:
    """Return under which name a rank gives signs of life while it makes a stage."""
    return f"{name}/{rank}/alive"


@contextmanager
def _stopping(meeting: Meeting, name: str, signals: list[int], report: Reporter) -> Generator[Any]:
    """Give what a training asks between two steps: a signal to this rank, or what rank 0 says."""
    said: list[type[Exception]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(REPORT_S) and not said:
            kind = STOPS.get(meeting.get(_stop(name)) or "")
            said.extend([] if kind is None else [kind])

    def should_stop() -> type[Exception] | None:
        if signals and not said:
            report("signal", signals[-1])
            said.append(Preempted)
        return said[-1] if said else None

    thread = threading.Thread(target=look, daemon=True, name="stop")
    thread.start()
    try:
        yield should_stop
    finally:
        ended.set()
        thread.join()


def _tell_of_signals(name: str, meeting: Meeting, rank: int, signals: list[int]) -> None:
    """Have a rank that makes no stage tell the first one of a signal, from beside what it waits
    for, until all stages have ended.
    """

    def look() -> None:
        report = Reporter(meeting, name, rank)
        with suppress(RuntimeError):  # the first one is gone: who waits for it finds out
            while meeting.get(over(name)) is None:
                if signals:
                    report("signal", signals[-1])
                    return
                time.sleep(REPORT_S)

    threading.Thread(target=look, daemon=True, name="signals").start()


def work_beside(
    task: Beside, ranks: Ranks, signals: list[int], progress: Callable[..., Any], **about: Any
) -> None:
    """Make the stage of a rank other than the first, and report what becomes of it.

    Args:
        signals: That this rank was sent.
        about: `run`, `device`, `data` and `clock`, as `work` takes them.
    """
    rank, meeting = ranks.rank, ranks.meeting
    if meeting is None:
        return
    if rank >= len(task.lanes):
        _tell_of_signals(task.name, meeting, rank, signals)
        return
    meeting.live(alive(task.name, rank))
    report = Reporter(meeting, task.name, rank)
    with _stopping(meeting, task.name, signals, report) as should_stop:
        worked = work(
            task.lanes[rank], report=report, should_stop=should_stop, progress=progress, **about
        )
    report("ended", worked)
    if isinstance(worked.error, KeyboardInterrupt):
        raise worked.error
