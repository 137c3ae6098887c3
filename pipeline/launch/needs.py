"""What a run needs of a machine, as an engine is asked for it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.settings.hardware import ALL
from pipeline.config.settings.run import Run
from pipeline.errors import UserError, one_line

GIB = 2**30
START_S = (
    60  # that a host may take until the run begins: a time limit counts them, the run does not
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a run needs. None: not known, and the engine is not asked for it.

    Attributes:
        devices: Of each host.
        hosts: How many.
        on_gpu: Whether its devices are GPUs; a CPU run asks for none.
        cpus: Cores of each device's process.
        memory_bytes: Of each host, beside what its devices have.
        wall_seconds: What one attempt may last, from the start of the run's own process.
    """

    devices: int = 1
    hosts: int = 1
    on_gpu: bool = True
    cpus: int | None = None
    memory_bytes: int | None = None
    wall_seconds: float | None = None

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.devices * self.hosts

    @property
    def memory_gib(self) -> int | None:
        """Memory of each host in whole GiB, rounded up."""
        return None if self.memory_bytes is None else -(-self.memory_bytes // GIB)


def needs_of(run: Run, *, hosts: int, cpus: int | None, memory_gib: int | None) -> Needs:
    """Return what a composed run needs, as far as settings say it.

    Raises:
        UserError: If they leave open how many devices a host is to have.
    """
    wanted = run.hardware.devices
    if wanted == ALL:
        problem = "no engine can be asked for all devices of a host that it has yet to choose"
        raise UserError("hardware.devices", problem, "give a number")
    kind = run.hardware.device.partition(":")
    if kind[1]:
        problem = f"{one_line(run.hardware.device, 40)} is one device of this host"
        raise UserError("hardware.device", problem, "an engine chooses it: leave the number out")
    return Needs(
        devices=int(wanted),
        hosts=hosts,
        on_gpu=kind[0] != "cpu",
        cpus=cpus,
        memory_bytes=None if memory_gib is None else memory_gib * GIB,
        wall_seconds=run.budget.wall_seconds,
    )
