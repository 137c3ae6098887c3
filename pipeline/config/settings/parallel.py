"""`parallel.*`: how the processes of a run share a training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pipeline.config.settings.ranges import positive


class Parallel(Enum):
    """What each rank holds. `auto`: the first of `ddp`, `hsdp` (several hosts) and `fsdp` in which
    trainings fit their devices.
    """

    auto = "auto"
    ddp = "ddp"  # the whole model; gradients are averaged
    fsdp = "fsdp"  # a share of every layer (FSDP2); gathered when it is computed
    hsdp = "hsdp"  # as fsdp within a host, and as ddp between hosts

    @property
    def shards(self) -> bool:
        """Whether a rank holds a part of the weights alone."""
        return self in (Parallel.fsdp, Parallel.hsdp)


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How ranks (one process a device) share a training."""

    mode: Parallel = Parallel.auto  # what each rank holds
    # stages that need nothing of one another are made at once, each by one rank
    stages: bool = False
    # with fsdp and hsdp, weights and moments lie in the host's memory until a layer is computed
    offload: bool = False
    # a rank that does not answer for so long in a step ends the run
    timeout_seconds: float = positive(600.0)
    rendezvous_seconds: float = positive(600.0)  # that all ranks have to come, at the start
