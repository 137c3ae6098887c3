"""What ranks other than the first do: they wait for what the first one tells them, and do their
share of the stages that are split, and of scoring.

They write nothing but their shards of a teacher's cache: no journal, no checkpoint, no artifact, no
line. What they would leave in a stage's folder is thrown away. A rank that fails by itself says why
and parts, which the first one finds out at its next step. Its process ends after the first one's:
whoever started the ranks would take the run for one that this rank's exit code ended.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config.settings.run import Run, scored_length
from pipeline.data.load import load_dataset
from pipeline.errors import (
    BudgetSpent,
    DeviceLost,
    Exit,
    Preempted,
    StageFailed,
    UserError,
    exit_of,
)
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.numbers import percent
from pipeline.ledger.phases import PhaseClock, difference
from pipeline.ledger.shapes import OutputRecord, RankTime
from pipeline.runs.environment import code_digest
from pipeline.runs.fitting import in_mode
from pipeline.runs.lane import Beside, work_beside
from pipeline.runs.preflight import choose_device, in_precision
from pipeline.runs.signals import noted, on_stop_signal
from pipeline.runs.versions import versions
from pipeline.stages.base import Stage
from pipeline.stages.context import Context, Output
from pipeline.store.artifacts import Artifact, flat, key_of, plain
from pipeline.store.locks import REMEDY, is_held
from pipeline.training.meeting import ranks_named
from pipeline.training.ranks import ALONE, RankLost, Ranks, as_told, join, place_in

if TYPE_CHECKING:
    from pipeline.data.documents import Dataset

Thing = TypeVar("Thing")
MOST_NAMED = 3
"""Settings that a refusal names."""
SAME = {"settings": "command", "code": "checkout", "libraries": "environment"}
"""What ranks have to have alike, and where it comes from."""
SEEN_WITHIN_S = 20.0  # a file of another host; NFS keeps the names in a folder for so long


@dataclass(frozen=True, slots=True)
class Share:
    """A stage that all ranks work on.

    Attributes:
        stage: Its settings.
        checkpoints: Where the first rank keeps them; all see it.
        number: That no other one has.
    """

    name: str
    stage: Stage
    inputs: Mapping[str, Artifact]
    seed: int
    like: OutputRecord | None
    matched_flops: float | None
    checkpoints: Path
    number: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Scoring:
    """An artifact that all ranks score, each its part of the test documents.

    Attributes:
        folder: Of the artifact; all see it.
        unquantized: Of the model that it was quantized from.
    """

    folder: Path
    unquantized: Path | None


@contextmanager
def joined(run: Run, clock: PhaseClock) -> Generator[Ranks]:
    """Meet the other ranks, where there are any; part in the end.

    Raises:
        UserError: If they do not come, or were given other settings or other code.
    """
    place = place_in()
    if place is None:
        yield ALONE
        return
    # torch's own account of connections; of what fails there is an exception
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with clock.phase("import"):
        import torch
    with clock.phase("comm_wait"):
        backend, refusal, counted = None, None, None
        try:
            device = choose_device(run)
        except UserError as error:  # rank 0 speaks for all
            refusal = error
        else:
            backend, counted = device_of(device).collectives, device_of(device).counted_as()
            if device.type == "cpu" and run.hardware.num_threads is None:
                # ranks of a host share its cores
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.on_host))
        ranks = join(
            place,
            backend=backend,
            timeout_seconds=run.parallel.timeout_seconds,
            rendezvous_seconds=run.parallel.rendezvous_seconds,
            refusal=refusal,
            counted=counted,
        )
        try:
            _check_same(run, ranks)
            _check_shared(run, ranks)
        except UserError:
            if not ranks.is_first:
                ranks.await_the_end()
            raise
    try:
        yield ranks
    except BaseException as error:
        # Nothing is asked of the others that one which is lost would have to answer.
        if ranks.is_first and not isinstance(error, RankLost):
            ranks.end(exit_of(error))
        raise
    if ranks.is_first:
        ranks.told(None)
    ranks.leave()


def _check_same(run: Run, ranks: Ranks) -> None:
    """Refuse ranks that are about to do different things."""
    own = {"settings": key_of(run=plain(run)), "code": code_digest(), "libraries": versions()}
    everywhere = ranks.gathered(own)
    for what, remedy in SAME.items():
        others = [rank for rank, each in enumerate(everywhere) if each[what] != everywhere[0][what]]
        if others:
            which = _differing(run, ranks) if what == "settings" else ""
            problem = f"rank 0 and {ranks_named(others)} have different {what}{which}"
            raise UserError("RANK", problem, f"give every rank the same {remedy}")


def _differing(run: Run, ranks: Ranks) -> str:
    """Return the names of settings that ranks do not have in common, in brackets."""
    everywhere = ranks.gathered(flat(plain(run)))
    names = sorted({name for each in everywhere for name in each})
    said = [
        name
        for name in names
        if any(each.get(name) != everywhere[0].get(name) for each in everywhere)
    ]
    more = f" and {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else ""
    return f" ({', '.join(said[:MOST_NAMED])}{more})"


def _check_shared(run: Run, ranks: Ranks) -> None:
    """Refuse a folder that not all ranks see, or whose locks do not hold between hosts.

    Rank 0 leaves a file there and holds its lock while the others look.

    Raises:
        UserError: On every rank.
    """
    root = Path(run.tracking.root).expanduser().absolute()
    # rank 0 waits no longer for an answer
    within_s = min(SEEN_WITHIN_S, run.parallel.timeout_seconds / 2)
    with _left_by_first(root, ranks) as name:
        if name is None:  # it cannot be written to, which rank 0 will refuse
            return
        found = True if ranks.is_first else _found(root / name, within_s)
        everywhere = ranks.gathered((found, socket.gethostname()))
    blind = [rank for rank, (seen, _) in enumerate(everywhere) if seen is None]
    if blind:
        host, other = everywhere[0][1], everywhere[blind[0]][1]
        problem = (
            f"what rank 0 on {host} writes to {root}, {ranks_named(blind)} on {other} cannot see"
        )
        raise UserError("tracking.root", problem, "give a folder that all hosts share")
    unlocked = [rank for rank, (seen, _) in enumerate(everywhere) if seen is False]
    if unlocked:
        problem = f"{root}: a lock that rank 0 holds keeps {ranks_named(unlocked)} not off"
        raise UserError("tracking.root", problem, REMEDY)


@contextmanager
def _left_by_first(root: Path, ranks: Ranks) -> Generator[str | None]:
    """Give the name of a locked file that rank 0 leaves in a folder; None where it cannot."""
    if not ranks.is_first:
        yield ranks.told()
        return
    path, is_new = root / f".ranks-{uuid.uuid4().hex}", not root.exists()
    with ExitStack() as opened:
        if is_new:  # a run that is refused leaves nothing
            opened.callback(_remove_empty, root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(path.open("xb"))
            opened.callback(path.unlink, missing_ok=True)
            is_held(file)
        except OSError:
            yield ranks.told(None)
            return
        yield ranks.told(path.name)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _found(path: Path, within_s: float) -> bool | None:
    """Return whether the lock of a file is held; None: no such file is seen within some seconds."""
    until = time.monotonic() + within_s
    while True:
        try:
            # names of files are kept for seconds by some: listing them asks anew
            if path.name in os.listdir(path.parent):
                with path.open("r+b") as file:
                    return is_held(file)
        except OSError:
            pass
        if time.monotonic() > until:
            return None
        time.sleep(0.1)


def share_of(name: str, stage: Stage, inputs: Mapping[str, Artifact], ctx: Context) -> Share:
    """Return what the first rank tells the others of a stage."""
    like = None if ctx.like is None else ctx.like.to_json()
    return Share(name, stage, inputs, ctx.seed, like, ctx.matched_flops, ctx.checkpoints)


WITHOUT_COLLECTIVES = ("data_wait", "h2d", "optimizer")
"""Phases of a step in which no rank waits for another, whatever the mode: forward and backward
passes gather shares of weights, or send gradients."""


def told_times(
    ranks: Ranks, run: Run, share: Share, done: dict[str, int] | Exception
) -> list[RankTime]:
    """Return, of the first rank, what each did in a stage, by rank. The others leave it there: the
    first one may go on with a stage alone, and fail in it.

    Args:
        done: This rank's self times in it, or what failed here.

    Raises:
        UserError, StageFailed: If another rank failed.
    """
    names = [*WITHOUT_COLLECTIVES, *([] if run.parallel.mode.shards else ["forward"])]
    own = as_told(done, ranks.rank) if isinstance(done, Exception) else _time(ranks, done, names)
    times: list[RankTime] = []
    for each in ranks.left(f"times/{share.number}", own):
        if isinstance(each, Exception):
            raise each
        times.append(each)
    return times


def _time(ranks: Ranks, phases_ns: dict[str, int], local: Sequence[str]) -> RankTime:
    """Return what a rank did; `local` are the phases that no collective can be in."""
    return {
        "rank": ranks.rank,
        "host": socket.gethostname(),
        "phases_ns": phases_ns,
        "local_ns": sum(phases_ns.get(name, 0) for name in local),
    }


@dataclass(slots=True)
class Scorers:
    """The ranks that score an artifact together.

    Attributes:
        times: What each did until all scores were there.
    """

    ranks: Ranks
    clock: PhaseClock
    times: list[RankTime] = field(default_factory=list[RankTime])

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """How many they are."""
        return self.ranks.size

    def shared(self, work: Callable[[], Thing]) -> list[Thing]:
        """Return what the work of every rank gives, by rank, as `Ranks.shared` does."""
        before = self.clock.mark()[1]
        with self.clock.phase("comm_wait"):  # less what the work's own phases take
            found = self.ranks.shared(work)
        # At once: what follows is the first rank's, and the others wait no longer.
        own_ns = difference(self.clock.mark()[1], before)
        self.times = self.ranks.gathered(_time(self.ranks, own_ns, ("eval",)))
        return found


def straggler(times: list[RankTime]) -> str | None:
    """Return which rank the others wait for, in words; None where none is slower by a tenth."""
    if len(times) < 2:
        return None
    ordered = sorted(times, key=lambda each: each["local_ns"])
    slowest, middle = ordered[-1], ordered[(len(ordered) - 1) // 2]["local_ns"]
    if slowest["local_ns"] <= 1.1 * middle or not middle:
        return None
    longer = percent(slowest["local_ns"] / middle - 1)
    return (
        f"rank {slowest['rank']} ({slowest['host']}) takes {longer} longer than the others for what"
        " each does by itself in a step, and all wait for it"
    )


def _silent(*_: Any, **__: Any) -> Any:
    """Show no progress."""
    return nullcontext(lambda *_: None)


def follow(run: Run, ranks: Ranks, clock: PhaseClock) -> int:
    """Do what the first rank says until it says that the run has ended.

    Returns:
        The exit code: the first rank's is the run's.
    """
    signals: list[int] = []
    with on_stop_signal(signals.append):
        if (number := noted()) is not None:
            signals.append(number)
        try:
            data = load_dataset(run.data, run.task)
            device = choose_device(run)
            # what the first one imports before its stages: it would wait for it in the first step
            importlib.import_module("transformers")
            mode, precision = ranks.told()  # what the first one chose
            run = in_precision(in_mode(run, mode), precision)
            while True:
                task = ranks.told()
                if task is None:
                    return Exit.DONE
                with _as_the_first_one_sees_it():
                    if isinstance(task, Scoring):
                        _score(task, run, ranks, device, data, clock)
                    elif isinstance(task, Beside):
                        about = {"run": run, "device": device, "data": data, "clock": clock}
                        work_beside(task, ranks, signals, _silent, **about)
                    else:
                        _work(task, run, ranks, device, data, clock, signals)
        except RankLost as lost:  # the first one has ended, or another rank failed and said why
            code = lost.code
        # The outermost frame: whatever it was, the others must not wait for this rank.
        except BaseException as error:  # noqa: BLE001
            ranks.fail(error)
            code = Exit.REFUSED
        _wait_for_the_end(ranks)
        return code


@contextmanager
def _as_the_first_one_sees_it() -> Generator[None]:
    """Pass over what ends a stage on all ranks at once: the first one decides what follows."""
    try:
        yield
    except DeviceLost:
        raise
    except (UserError, StageFailed, Preempted, BudgetSpent):
        pass


def _wait_for_the_end(ranks: Ranks) -> None:
    """Give the first rank the time to say how the run ended: whoever started the ranks takes the
    exit code of the one that ends first.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks.leave()  # who waits for this one in a step finds out
    ranks.await_the_end()


def _score(
    task: Scoring, run: Run, ranks: Ranks, device: Any, data: Dataset, clock: PhaseClock
) -> None:
    from pipeline.evaluation.quality.assess import score_folder

    score_folder(
        task.folder,
        documents=data.splits["test"],
        task=run.task,
        labels=data.labels,
        config=run.quality,
        sequence_length=scored_length(run),
        device=device,
        clock=clock,
        unquantized=task.unquantized,
        scorers=Scorers(ranks, clock),
    )


def _work(
    task: Share,
    run: Run,
    ranks: Ranks,
    device: Any,
    data: Dataset,
    clock: PhaseClock,
    signals: list[int],
) -> None:
    with tempfile.TemporaryDirectory() as out:
        context = Context(
            run=run,
            stage=task.name,
            seed=task.seed,
            device=device,
            data=data,
            clock=clock,
            out=Path(out),
            checkpoints=task.checkpoints,
            like=None if task.like is None else Output.from_json(task.like),
            matched_flops=task.matched_flops,
            points=lambda step, values: None,
            history=lambda step: [],
            checkpointed=lambda step: None,
            resumed=lambda step, history: None,
            should_stop=lambda: Preempted if signals else None,
            progress=_silent,
            say=lambda _: None,
            ranks=ranks,
        )
        before = clock.mark()[1]
        try:
            task.stage.run(task.inputs, context)
        except (UserError, StageFailed) as error:
            if not isinstance(error, DeviceLost):
                told_times(ranks, run, task, error)  # the first one may know nothing of it
            raise
        told_times(ranks, run, task, difference(clock.mark()[1], before))
