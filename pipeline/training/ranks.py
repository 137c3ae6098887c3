"""The processes of a run that train together.

Rank 0 runs the recipe: it alone decides, writes and reports. The others follow it
(`runs/following.py`): they do their share of the stages that are split. RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_* say who is who, whoever set them: this project's own
launcher, torchrun, accelerate, or one scheduler task a rank.

Groups connect them: one for tensors of steps, as torch makes it for the device, one of the hosts
for what all give (`gathered`), and one of them for the thread that writes a checkpoint. In all, a
rank that does not answer is an error after `parallel.timeout_seconds`. What rank 0 tells the others
goes through torch's store. It may work alone for days: they wait as long as it gives signs of life
(`training/meeting.py`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import (
    BudgetSpent,
    DeviceLost,
    Exit,
    Preempted,
    StageFailed,
    UserError,
    one_line,
)
from pipeline.ledger.numbers import how_many
from pipeline.training.meeting import FirstGone, meet, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.training.meeting import Meeting

Thing = TypeVar("Thing")
FAILED = "failed"  # what the first rank that failed says of it
READY_ASKED_S = 5.0  # between two looks whether one of those that are waited for has failed
PARTED_WITHIN_S = 3.0  # what ranks have to hear that a run ends; they keep the store no longer
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
START_ALL = (
    "start all ranks by hardware.devices=N, torchrun, or one scheduler task a rank; or unset"
    f" {', '.join(NAMES)}"
)


class RankLost(DeviceLost):
    """Another rank does not answer any more.

    Attributes:
        code: What this one ends with.
    """

    code: int = Exit.REFUSED


class Parted(RankLost):
    """The first rank has ended the run."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the first rank ends with exit code {code}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank a process is, as its environment says.

    Attributes:
        rank: Of all.
        size: Of all ranks.
        local: Among the ranks of its host.
        on_host: Ranks of its host.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    on_host: int = 1


def place_in(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return which rank this process is; None where it is alone.

    Raises:
        UserError: If the environment says so in part, or of no rank that there is.
    """
    if not any(name in environment for name in ("RANK", "WORLD_SIZE")):
        return None
    size, rank = _number("WORLD_SIZE", environment), _number("RANK", environment)
    local = _number("LOCAL_RANK", environment) if "LOCAL_RANK" in environment else None
    there = _number("LOCAL_WORLD_SIZE", environment) if "LOCAL_WORLD_SIZE" in environment else size
    if size < 1 or rank >= size:
        raise UserError("RANK", f"{rank} is no rank of WORLD_SIZE={size}", START_ALL)
    if size == 1:
        return None
    if not 1 <= there <= size:
        problem = f"{there} ranks on this host, and WORLD_SIZE={size}"
        raise UserError("LOCAL_WORLD_SIZE", problem, START_ALL)
    if local is not None and local >= there:
        problem = f"{local} is none of {how_many(there, 'rank')} on this host"
        raise UserError("LOCAL_RANK", problem, START_ALL)
    _check_meeting_place(size, environment)
    return Place(rank, size, rank % there if local is None else local, there)


def _check_meeting_place(size: int, environment: Mapping[str, str]) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(missing[0], f"is not set, and WORLD_SIZE={size}", START_ALL)
    port = _number("MASTER_PORT", environment)
    if not 0 < port < 2**16:
        raise UserError("MASTER_PORT", f"{port} is no port", "give one from 1 to 65535")


def _number(name: str, environment: Mapping[str, str]) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        said = "is empty" if not value else f"{one_line(value, 20)!r} is no number"
        raise UserError(name, said, START_ALL)
    return int(value)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together; alone, all of it is at once.

    Attributes:
        place: Which rank it is.
        control: The group of the hosts; None: it is alone.
        hosts: How many there are.
        meeting: Where ranks leave texts for one another; None: it is alone.
        files: The same as `control`, for the thread that writes a checkpoint.
        counted: By rank, the name by which counters of its device are read; see
            `Device.counted_as`.
    """

    place: Place = Place()
    control: Any = None
    hosts: int = 1
    meeting: Meeting | None = None
    files: Any = None
    counted: tuple[str | None, ...] = ()
    _turns: Iterator[int] = field(default_factory=count)  # what was told, and is
    _assemblies: Iterator[int] = field(default_factory=count)

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.place.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.place.size

    @property
    def is_first(self) -> bool:
        """Whether it is the one that decides, writes and reports."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    # -- what all do at once ----------------------------------------------------------------------

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest of each number over all ranks."""
        if not self.several:
            return list(numbers)
        import torch
        import torch.distributed as dist

        found = torch.tensor(numbers, dtype=torch.int64)
        self._answered(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return [int(each) for each in found.tolist()]

    def add_up(self, values: Any) -> None:
        """Replace a tensor by its sum over all ranks, where it is."""
        if self.several:
            import torch.distributed as dist

            self._answered(lambda: dist.all_reduce(values))

    def meet(self) -> None:
        """Wait until all are here."""
        self.largest(0)

    def assemble(self) -> None:
        """Wait until all are ready for what they do at once: one may read its model for longer
        than steps are waited for.

        Raises:
            RankLost: If one has failed, or is not ready within `parallel.rendezvous_seconds`.
        """
        if self.meeting is None:
            return
        ready = f"ready/{next(self._assemblies)}"
        self.meeting.put(f"{ready}/{self.rank}", "")
        if self.is_first:
            self._await(self.meeting, [f"{ready}/{rank}" for rank in range(self.size)])
        self.told()

    def left(self, name: str, thing: Thing) -> list[Thing]:
        """Leave a thing for the first rank, which returns those of all, by rank, once they are
        there. The others return nothing and do not wait: it may be at work alone for long, or fail.

        Args:
            name: Under which nothing else is left.

        Raises:
            RankLost: If one has failed, or leaves nothing within `parallel.rendezvous_seconds`.
        """
        meeting = self.meeting
        if meeting is None:
            return [thing]
        if not self.is_first:
            self._answered(lambda: meeting.tell(f"{name}/{self.rank}", thing))
            return []
        names = [f"{name}/{rank}" for rank in range(1, self.size)]
        self._await(meeting, names)
        found = [thing]
        self._answered(lambda: found.extend(map(meeting.taken, names)))
        return found

    def _await(self, meeting: Meeting, names: Sequence[str]) -> None:
        """Wait, as the first rank, until the others have left what they are to."""
        until = time.monotonic() + meeting.within_s
        while not meeting.all_left(names, READY_ASKED_S):
            if meeting.get(FAILED) is not None or time.monotonic() > until:
                waited = f"{meeting.within_s:.0f} s (parallel.rendezvous_seconds)"
                raise self.lost(RuntimeError(f"not all came to what they share within {waited}"))

    def shared(self, work: Callable[[], Thing]) -> list[Thing]:
        """Return what the work of every rank gives, by rank, once all are through with theirs.

        What fails on one fails on all: no rank waits for what another one will not give.

        Raises:
            UserError, StageFailed: Where a rank refuses or fails in this way.
            RankLost: Where a rank other than the first fails in any other way; there, its own.
        """
        if not self.several:
            return [work()]
        done: Any = None
        error: Exception | None = None
        try:
            done = work()
        except DeviceLost:
            raise
        # What a library raises may be a refusal: the first rank's caller knows.
        except Exception as failed:  # noqa: BLE001
            error = failed
        self.assemble()
        found = self.gathered((done, None if error is None else as_told(error, self.rank)))
        first = found[0][1]
        if error is not None and (self.is_first or first is None):
            raise error
        for _, said in found:
            if said is not None:
                raise said
        return [given for given, _ in found]

    # -- what rank 0 tells ------------------------------------------------------------------------

    def told(self, thing: Any = None) -> Any:
        """Return what rank 0 gives; the others wait for it.

        Raises:
            RankLost: If it is gone.
            Parted: If it has ended the run.
        """
        meeting = self.meeting
        if meeting is None:
            return thing
        name = f"told/{next(self._turns)}"
        if self.is_first:
            self._answered(lambda: meeting.tell(name, (None, thing)))
            return thing
        try:
            code, thing = meeting.told(name)
        except FirstGone as error:
            raise self.lost(error) from error
        if code is not None:
            meeting.put(_parted(self.rank), "")
            raise Parted(code)
        return thing

    def gathered(self, thing: Thing) -> list[Thing]:
        """Return what every rank gives, by rank."""
        found: list[Any] = [thing]
        if self.several:
            import torch.distributed as dist

            found = [None] * self.size
            self._answered(lambda: dist.all_gather_object(found, thing, group=self.control))
        return found

    @contextmanager
    def watched(self) -> Generator[None]:
        """Have what fails inside because another rank has failed say so.

        Raises:
            RankLost: In place of torch's own error.
        """
        try:
            yield
        except StageFailed:
            raise
        except RuntimeError as error:
            if self.several and _is_of_others(error):
                raise self.lost(error) from error
            raise

    def _answered(self, ask: Any) -> None:
        """Ask all ranks.

        Raises:
            RankLost: If one does not answer.
        """
        try:
            ask()
        except RuntimeError as error:
            raise self.lost(error) from error

    def failure(self) -> str | None:
        """Return what the first rank that failed said of it; None where none has."""
        return None if self.meeting is None else self.meeting.get(FAILED)

    def lost(self, error: RuntimeError) -> RankLost:
        """Return what an error between ranks amounts to: what the one that failed said, if it
        did.
        """
        said = self.failure()
        if said is not None:
            return RankLost(f"{said}; the same command goes on from the last checkpoint")
        told = one_line(error, 120)
        return RankLost(
            f"a rank does not answer any more ({told}); the same command goes on from the last"
            " checkpoint"
        )

    def fail(self, error: BaseException) -> None:
        """Say why this rank ends, for the first one to tell."""
        if self.meeting is not None:
            said = f"rank {self.rank} failed: {type(error).__name__}: {one_line(error, 160)}"
            self.meeting.put(FAILED, said)

    def await_the_end(self) -> None:
        """Wait until the first rank has ended, or gives no sign of life any more."""
        if self.meeting is not None:
            self.meeting.await_the_end()

    def end(self, code: int) -> None:
        """Have the others end as the first one does, where they wait for what it tells them."""
        if self.meeting is not None:
            with suppress(RuntimeError):
                self.meeting.tell(f"told/{next(self._turns)}", (int(code), None))
                self.meeting.all_left(map(_parted, range(1, self.size)), PARTED_WITHIN_S)

    def leave(self) -> None:
        """Part."""
        if self.several:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()


ALONE = Ranks()
STOPS: tuple[type[Exception] | None, ...] = (None, Preempted, BudgetSpent)
"""Why work stops between two steps; where ranks differ, the last of these wins."""


def _parted(rank: int) -> str:
    return f"parted/{rank}"


def as_told(error: Exception, rank: int) -> Exception:
    """Return what the other ranks raise where one has failed: the run goes on without what the
    first one refuses, and ends where another rank fails by itself.
    """
    if isinstance(error, UserError):
        return UserError(error.key, f"{error.problem} (rank {rank})", error.remedy)
    if isinstance(error, StageFailed):
        return StageFailed(f"rank {rank}: {error}")
    said = f"rank {rank} failed: {type(error).__name__}: {one_line(error, 160)}"
    return StageFailed(said) if rank == 0 else RankLost(said)


def agreed_stop(stop: type[Exception] | None, ranks: Ranks) -> type[Exception] | None:
    """Return why all are to stop, where any rank has a reason."""
    return STOPS[ranks.largest(STOPS.index(stop))[0]] if ranks.several else stop


def _is_of_others(error: RuntimeError) -> bool:
    """Return whether an error comes from the connection with other ranks, by what gloo and NCCL
    say.
    """
    said = str(error)
    return any(
        word in said for word in ("onnection", "peer", "imed out", "timeout", "NCCL", "gloo")
    )


def join(
    place: Place,
    *,
    backend: str | None,
    timeout_seconds: float,
    rendezvous_seconds: float | None = None,
    refusal: UserError | None = None,
    counted: str | None = None,
) -> Ranks:
    """Meet the other ranks.

    Args:
        backend: Of torch.distributed, for tensors: see `Device.collectives`. None: with `refusal`.
        rendezvous_seconds: Which they have to come. None: as many as to answer.
        refusal: Why this rank cannot take part; rank 0 says so, and all end.
        counted: The name by which counters of this rank's device are read.

    Raises:
        UserError: If they do not come, or one of them cannot take part.
    """
    import torch.distributed as dist

    meeting = meet(
        place.rank,
        place.size,
        within_s=rendezvous_seconds or timeout_seconds,
        patience_s=timeout_seconds,
        refusal=refusal,
    )
    timeout = timedelta(seconds=timeout_seconds)
    about: dict[str, Any] = {"rank": place.rank, "world_size": place.size, "timeout": timeout}
    try:
        dist.init_process_group(backend, store=meeting.store, **about)
        control, files = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    except (RuntimeError, ValueError) as error:  # hosts that see the port, and not one another
        problem = (
            f"{place.size} ranks meet at {where()} and cannot connect to one another"
            f" ({one_line(error, 120)})"
        )
        remedy = "name the network that joins the hosts: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        raise UserError("MASTER_ADDR", problem, remedy) from error
    ranks = Ranks(place, control, 1, meeting)
    everywhere = ranks.gathered((socket.gethostname(), counted))
    hosts = len({host for host, _ in everywhere})
    return Ranks(place, control, hosts, meeting, files, tuple(name for _, name in everywhere))
