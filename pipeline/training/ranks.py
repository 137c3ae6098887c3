"""The processes of a run that train together.

Rank 0 runs the recipe: it alone decides, writes and reports. The others follow it
(`runs/following.py`): they do their share of the stages that are split. RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_* say who is who, whoever set them: this project's own
launcher, torchrun, accelerate, or one scheduler task a rank.

Two groups connect them. Tensors of steps go through the group that torch makes for the device, in
which a rank that does not answer is an error after `parallel.timeout_seconds`. What rank 0 tells
the others goes through one of its own on the hosts, in which they may wait for days.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from pipeline.errors import BudgetSpent, DeviceLost, Preempted, StageFailed, UserError, one_line

Thing = TypeVar("Thing")
FAILED = "failed"  # what the first rank that failed says of it
PATIENCE = timedelta(days=30)  # of ranks that wait for what rank 0 tells them
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
START_ALL = (
    "start all ranks by hardware.devices=N, torchrun, or one scheduler task a rank; or unset"
    f" {', '.join(NAMES)}"
)


class RankLost(DeviceLost):
    """Another rank does not answer any more."""


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
    on_host = environment.get("LOCAL_WORLD_SIZE") or str(size)
    if size < 1 or not 0 <= rank < size:
        raise UserError("RANK", f"{rank} is no rank of WORLD_SIZE={size}", START_ALL)
    if size == 1:
        return None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(missing[0], f"is not set, and WORLD_SIZE={size}", START_ALL)
    there = int(on_host) if on_host.isdecimal() else size
    return Place(rank, size, rank % there if local is None else local, there)


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
        control: The group by which rank 0 tells the others; None: it is alone.
        hosts: How many there are.
    """

    place: Place = Place()
    control: Any = None
    hosts: int = 1

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
        _answered(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return [int(each) for each in found.tolist()]

    def add_up(self, values: Any) -> None:
        """Replace a tensor by its sum over all ranks, where it is."""
        if self.several:
            import torch.distributed as dist

            _answered(lambda: dist.all_reduce(values))

    def meet(self) -> None:
        """Wait until all are here."""
        self.largest(0)

    # -- what rank 0 tells ------------------------------------------------------------------------

    def told(self, thing: Any = None) -> Any:
        """Return what rank 0 gives; the others wait for it."""
        held: list[Any] = [thing]
        if self.several:
            import torch
            import torch.distributed as dist

            _answered(
                lambda: dist.broadcast_object_list(
                    held, src=0, group=self.control, device=torch.device("cpu")
                )
            )
        return held[0]

    def gathered(self, thing: Thing) -> list[Thing]:
        """Return what every rank gives, by rank."""
        found: list[Any] = [thing]
        if self.several:
            import torch.distributed as dist

            found = [None] * self.size
            _answered(lambda: dist.all_gather_object(found, thing, group=self.control))
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
                raise lost(error) from error
            raise

    def fail(self, error: BaseException) -> None:
        """Say why this rank ends, for the first one to tell."""
        if self.several:
            with suppress(RuntimeError):
                said = f"rank {self.rank} failed: {type(error).__name__}: {one_line(error, 160)}"
                _store().set(FAILED, said)

    def leave(self) -> None:
        """Part."""
        if self.several:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()


ALONE = Ranks()
STOPS: tuple[type[Exception] | None, ...] = (None, Preempted, BudgetSpent)
"""Why work stops between two steps; where ranks differ, the last of these wins."""


def agreed_stop(stop: type[Exception] | None, ranks: Ranks) -> type[Exception] | None:
    """Return why all are to stop, where any rank has a reason."""
    return STOPS[ranks.largest(STOPS.index(stop))[0]] if ranks.several else stop


def _answered(ask: Any) -> None:
    """Ask all ranks.

    Raises:
        RankLost: If one does not answer.
    """
    try:
        ask()
    except RuntimeError as error:
        raise lost(error) from error


def lost(error: RuntimeError) -> RankLost:
    """Return what an error between ranks amounts to: what the one that failed said, if it did."""
    said = None
    with suppress(RuntimeError):
        if _store().check([FAILED]):
            said = _store().get(FAILED).decode()
    if said is not None:
        return RankLost(f"{said}; the same command goes on from the last checkpoint")
    told = one_line(error, 120)
    return RankLost(
        f"a rank does not answer any more ({told}); the same command goes on from the last"
        " checkpoint"
    )


def _is_of_others(error: RuntimeError) -> bool:
    """Return whether an error comes from the connection with other ranks, by what gloo and NCCL
    say.
    """
    said = str(error)
    return any(
        word in said for word in ("onnection", "peer", "imed out", "timeout", "NCCL", "gloo")
    )


def _store() -> Any:
    """Return what torch's ranks keep beside them: it outlives their groups."""
    import torch.distributed.distributed_c10d as torchs

    return torchs._get_default_store()  # pyright: ignore[reportPrivateUsage]


def join(place: Place, *, backend: str, timeout_seconds: float) -> Ranks:
    """Meet the other ranks.

    Args:
        backend: Of torch.distributed, for tensors: see `Device.collectives`.

    Raises:
        UserError: If they do not come.
    """
    import torch.distributed as dist

    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # a port in use, a name unknown, ranks that are not
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        problem = f"{place.size} ranks do not meet at {where} ({one_line(error, 120)})"
        raise UserError("MASTER_ADDR", problem, "check that all are started, and the port") from (
            error
        )
    ranks = Ranks(place, control)
    return Ranks(place, control, len(set(ranks.gathered(socket.gethostname()))))
