"""Whether trainings fit their devices, by an estimate of their memory before anything is made; and
what each rank is to hold of them where `parallel.mode` is `auto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.hardware import ALL
from pipeline.config.settings.parallel import Parallel
from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.ledger.attempted import attempted
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.memory import host_now
from pipeline.ledger.numbers import num_bytes
from pipeline.stages.base import BeforeRun, Workload, stages_of
from pipeline.training.ranks import Place, place_in

if TYPE_CHECKING:
    from pipeline.forecast.memory import Spread, TrainingMemory


def check_memory(known: BeforeRun) -> None:
    """Refuse a training that cannot fit its device, by what it takes at least.

    Raises:
        UserError: Naming the stage, and what would fit.
    """
    from pipeline.forecast.memory import remedies

    spread = planned_spread(known.run, known.device)
    have = _room(known.device, spread.ranks)
    if have is None:
        return
    for name, work in _trainings(known):
        found = _needed(known, work, spread, have)
        if found is None or found.total.low <= have:
            continue
        parts = ", ".join(f"{part} {num_bytes(size)}" for part, size in found.parts().items())
        problem = (
            f"its training takes about {num_bytes(found.total.estimate)} of a device's memory"
            f" ({parts}), and {num_bytes(have)} are free"
        )
        tile = device_of(known.device).chunk_bytes
        would = list(remedies(work, known.run.task, spread, have, tile))
        remedy = " or ".join(would) or "a smaller model, or shorter sequences"
        raise UserError(f"stages.{name}", problem, f"give {remedy}")


def with_fitting_mode(known: BeforeRun) -> tuple[BeforeRun, list[str]]:
    """Put the first of `ddp`, `hsdp` and `fsdp` in which all trainings fit their devices in the
    place of `parallel.mode=auto`.

    A mode that a stage's settings do not allow is passed over. Where memory cannot be counted, and
    where nothing else is allowed, it is `ddp`; where nothing fits, the one that takes least.

    Returns:
        What is known, of a run in that mode, and what a reader must know of it.
    """
    run, place = known.run, _place(known.run, known.device)
    if run.parallel.mode is not Parallel.auto or place.size == 1:
        return known, []
    chosen, said = replace(known, run=in_mode(run, Parallel.ddp)), list[str]()
    have = _room(known.device, place.size)
    largest = None if have is None else _largest(chosen, have)
    if have is None or largest is None or largest[0] <= have:
        return chosen, said
    for mode in _sharing(place):
        tried = replace(known, run=in_mode(run, mode))
        if _is_refused(tried):
            continue
        chosen = tried
        said = [
            f"parallel.mode=auto: {mode.value}, as {largest[1]} takes about"
            f" {num_bytes(largest[0])} on a device that holds whole weights, and"
            f" {num_bytes(have)} are free"
        ]
        left = _largest(tried, have)
        if left is None or left[0] <= have:
            break
    return chosen, said


def shared_by_need(known: BeforeRun) -> frozenset[str]:
    """Return the stages whose training fits no device by itself, with whole batches and weights:
    ranks share them, also where `parallel.stages` has others made at once.
    """
    from pipeline.forecast.memory import Spread

    have = _room(known.device, _place(known.run, known.device).size)
    found = (
        (name, None if have is None else _needed(known, work, Spread(), have))
        for name, work in _trainings(known)
    )
    return frozenset(
        name for name, each in found if each is not None and each.total.estimate > (have or 0.0)
    )


def in_mode(run: Run, mode: Parallel) -> Run:
    """Return a run whose ranks hold what `mode` says."""
    return replace(run, parallel=replace(run.parallel, mode=mode))


def planned_spread(run: Run, device: Any) -> Spread:
    """Return how ranks will share a training: those that are there, else those that settings ask
    for.
    """
    from pipeline.forecast.memory import Spread

    place = _place(run, device)
    return Spread.of(run.parallel.mode, place.size, place.on_host)


def planned_ranks(run: Run, device: Any) -> int:
    """Return how many ranks this host will have, by the settings."""
    wanted = run.hardware.devices
    return device_of(device).count() if wanted == ALL else int(wanted)


def _place(run: Run, device: Any) -> Place:
    there = place_in()
    if there is not None:
        return there
    planned = planned_ranks(run, device)
    return Place(size=planned, on_host=planned)


def _sharing(place: Place) -> Iterator[Parallel]:
    """Yield the modes in which ranks hold shares of the weights: layers are better gathered within
    a host than between hosts.
    """
    if 1 < place.on_host < place.size:
        yield Parallel.hsdp
    yield Parallel.fsdp


def _is_refused(known: BeforeRun) -> bool:
    """Return whether a stage's settings do not allow the mode of a run."""
    try:
        for name, stage in stages_of(known.run).items():
            stage.check(f"stages.{name}", known.run)
            stage.refuse_device(f"stages.{name}", known.run, known.device)
    except UserError:
        return True
    return False


def _trainings(known: BeforeRun) -> Iterator[tuple[str, Workload]]:
    """Yield the stages that must train, and with what."""
    for name, stage in stages_of(known.run).items():
        work = attempted(lambda: stage.workload(name, known), lambda _: None)  # noqa: B023
        if work is not None and work.trains and not stage.optional:
            yield name, work


def _largest(known: BeforeRun, have: float) -> tuple[float, str] | None:
    """Return the bytes that the largest training takes on a device, and its stage; None where all
    surely fit.
    """
    spread = planned_spread(known.run, known.device)
    found = ((_needed(known, work, spread, have), name) for name, work in _trainings(known))
    sizes = [(each.total.estimate, name) for each, name in found if each is not None]
    return max(sizes, default=None)


def _needed(known: BeforeRun, work: Workload, spread: Spread, have: float) -> TrainingMemory | None:
    """Return what a training takes on one device; None where it surely fits, or cannot be
    counted.
    """
    from pipeline.forecast.memory import surely_fits, training_memory

    asked = (work, known.run.task, spread)
    if attempted(lambda: surely_fits(*asked, have), lambda _: False):
        return None
    tile = device_of(known.device).chunk_bytes
    return attempted(lambda: training_memory(*asked, tile), lambda _: None)


def _room(device: Any, ranks: int) -> float | None:
    """Return the bytes that a rank can have, on a CPU its share of the host's; None where neither
    is told.
    """
    return attempted(lambda: _free_bytes(device, ranks), lambda _: None)


def _free_bytes(device: Any, ranks: int) -> float | None:
    own = device_of(device)
    if own.counts_memory:
        return float(own.free_bytes()[0])
    if own.kind != "cpu":
        return None
    available = host_now()[1]
    return None if available is None else available / ranks
