"""What a run needs of a machine, as an engine is asked for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.settings.hardware import ALL
from pipeline.config.settings.run import Run
from pipeline.errors import UserError, one_line
from pipeline.forecast.past import Past, settings_key
from pipeline.forecast.rates import expected
from pipeline.ledger.numbers import how_many

GIB = 2**30
OF_TIME, OF_MEMORY = 0.15, 0.1  # usual spread of the logarithm, from run to run
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
        source: What of it is known from earlier runs, as a sentence; empty where nothing is.
    """

    devices: int = 1
    hosts: int = 1
    on_gpu: bool = True
    cpus: int | None = None
    memory_bytes: int | None = None
    wall_seconds: float | None = None
    source: str = ""

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.devices * self.hosts

    @property
    def memory_gib(self) -> int | None:
        """Memory of each host in whole GiB, rounded up."""
        return None if self.memory_bytes is None else -(-self.memory_bytes // GIB)


def needs_of(
    run: Run, *, hosts: int, cpus: int | None, memory_gib: int | None, limits_time: bool = True
) -> Needs:
    """Return what a composed run needs: as its settings say it, else as earlier runs with these
    settings took it.

    Args:
        limits_time: Whether a limit of time is to be asked for.

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
    said = Needs(
        devices=int(wanted),
        hosts=hosts,
        on_gpu=kind[0] != "cpu",
        cpus=cpus,
        memory_bytes=None if memory_gib is None else memory_gib * GIB,
        wall_seconds=run.budget.wall_seconds,
    )
    return _foreseen(run, said, limits_time=limits_time)


def _foreseen(run: Run, said: Needs, *, limits_time: bool) -> Needs:
    """Return the needs with what settings leave open filled in from earlier runs."""
    past = Past.read(Path(run.tracking.root).expanduser())
    # a host of CPUs counts as one device, however many ranks share it
    devices = said.ranks if said.on_gpu else said.hosts
    took = past.wall_seconds(settings_key(run), devices)
    held = past.totals(settings_key(run), "host_bytes")
    found, known = said, list[str]()
    if said.wall_seconds is None and took and limits_time:
        found = replace(found, wall_seconds=math.ceil(expected(took, OF_TIME).high))
        known.append(f"time ({how_many(len(took), 'run')})")
    if said.memory_bytes is None and held:
        each = expected(held, OF_MEMORY).high
        found = replace(found, memory_bytes=math.ceil(each * said.devices))
        known.append(f"memory ({how_many(len(held), 'run')})")
    if not known:
        return found
    source = f"{' and '.join(known)} by earlier runs with these settings, the upper end of 90%"
    return replace(found, source=source)
