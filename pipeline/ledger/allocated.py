"""What a scheduler held for a run over all its attempts, and whether that agrees with what the run
was attached to.

Each start of a job counts once, from the scheduler's grant to its release. Where other runs were in
the same job, this run has its own time of it, so that nothing counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.ledger.charge_sources import spans
from pipeline.ledger.numbers import how_many
from pipeline.ledger.placement import Grant
from pipeline.ledger.reconcile import NESTED_S, NESTED_SHARE
from pipeline.ledger.shapes import Allocated, Event, Granted
from pipeline.ledger.slurm import Held, Unanswered, read_held
from pipeline.ledger.values import Value, declared, estimated, null

HOUR_S = 3600.0
APART_S = 60  # that the clocks of two hosts may differ by
NO_GRANT = "no scheduler granted this run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt at a run, as its journal tells of it.

    Attributes:
        at_s: A moment of it: UTC, seconds since 1970.
        wall_s: How long it lasted, or has lasted until its last line.
        devices: That it was attached to.
    """

    number: int
    at_s: float
    wall_s: float
    devices: int
    grant: Grant | None


def attempts_in(events: Sequence[Event]) -> list[Attempt]:
    """Return the attempts that a journal tells of."""
    starts = [event for event in events if event["e"] == "run_start"]
    found: list[Attempt] = []
    for start, (first_ns, last_ns, devices) in zip(starts, spans(events), strict=True):
        granted = start.get("grant")
        found.append(
            Attempt(
                number=start["attempt"],
                at_s=start["t"],
                wall_s=(last_ns - first_ns) / 1e9,
                devices=devices,
                grant=None if granted is None else Grant(**granted),
            )
        )
    return found


def read_allocated(attempts: Sequence[Attempt], others: Mapping[str, Sequence[str]]) -> Allocated:
    """Return what the scheduler says that it held for a run; null, with the reason, where it does
    not say.

    Args:
        others: By number of a job, the other runs that were in it.
    """
    jobs = {attempt.grant.job_id for attempt in attempts if attempt.grant is not None}
    if not jobs:
        return {"gpu_hours": null(NO_GRANT).to_json(), "grants": []}
    try:
        held = read_held(jobs)
    except Unanswered as why:
        grants = [_untold(each, str(why)) for each in attempts if each.grant is not None]
    else:
        grants = _grants(attempts, held, others)
    bare = [attempt.number for attempt in attempts if attempt.grant is None]
    return {"gpu_hours": _total(grants, bare).to_json(), "grants": grants}


def is_settled(allocated: Allocated) -> bool:
    """Return whether nothing more is to be learnt: all that was held has been released."""
    return all(grant["ended"] for grant in allocated["grants"])


def mismatches(allocated: Allocated, attempts: Sequence[Attempt], *, on_gpu: bool) -> list[str]:
    """Return what scheduler and run say differently, or is held and not used; each in a sentence's
    words.
    """
    return [
        problem
        for grant in allocated["grants"]
        if grant["elapsed_s"] is not None
        for problem in _mismatches(
            grant, [each for each in attempts if each.number in grant["attempts"]], on_gpu=on_gpu
        )
    ]


def _mismatches(grant: Granted, own: Sequence[Attempt], *, on_gpu: bool) -> list[str]:
    job, held_s, gpus = f"job {grant['job_id']}", grant["elapsed_s"] or 0.0, grant["gpus"]
    wall_s = math.fsum(attempt.wall_s for attempt in own)
    found: list[str] = []
    if wall_s - held_s > max(NESTED_SHARE * held_s, NESTED_S) and not grant["shared_with"]:
        found.append(f"{job}: the run was there for {wall_s:.0f} s, Slurm says {held_s:.0f} s")
    if gpus is None:
        return found
    said = {each.grant.gpus for each in own if each.grant is not None} - {None, gpus}
    found += [
        f"{job}: accounting has {how_many(gpus, 'GPU')}, the job's environment {other}"
        for other in sorted(filter(None, said))
    ]
    used = max(attempt.devices for attempt in own) if on_gpu else 0
    if used > gpus:
        found.append(f"{job}: {how_many(used, 'GPU')} used, Slurm says that it held {gpus}")
    elif used < gpus:
        found.append(f"{job} holds {how_many(gpus, 'GPU')}, and the run uses {used or 'none'}")
    return found


def _grants(
    attempts: Sequence[Attempt], held: Sequence[Held], others: Mapping[str, Sequence[str]]
) -> list[Granted]:
    """Return each start of a job once, with the attempts that were in it."""
    of_start: dict[Held, list[Attempt]] = {}
    untold: list[Granted] = []
    for attempt in attempts:
        found = _at(attempt, held)
        if found is not None:
            of_start.setdefault(found, []).append(attempt)
        elif attempt.grant is not None:
            untold.append(_untold(attempt, "sacct knows of no such job at that time"))
    told = [_granted(start, own, others.get(start.job_id, [])) for start, own in of_start.items()]
    return sorted([*told, *untold], key=lambda grant: grant["attempts"])


def _at(attempt: Attempt, held: Iterable[Held]) -> Held | None:
    """Return the start of its job that an attempt was in: a number may be that of an older job."""
    if attempt.grant is None:
        return None
    own = [each for each in held if each.job_id == attempt.grant.job_id]

    def apart_s(each: Held) -> float:
        after = 0.0 if each.end_s is None else attempt.at_s - each.end_s
        return max(each.start_s - attempt.at_s, after, 0.0)

    nearest = min(own, key=lambda each: (apart_s(each), -each.start_s), default=None)
    return nearest if nearest is not None and apart_s(nearest) <= APART_S else None


def _granted(held: Held, own: Sequence[Attempt], others: Sequence[str]) -> Granted:
    known = [each.grant.gpus for each in own if each.grant is not None]
    gpus = held.gpus if held.gpus is not None else known[0]
    # the others have the rest of it, and nobody what lay between
    elapsed_s = math.fsum(each.wall_s for each in own) if others else float(held.elapsed_s)
    return {
        "scheduler": "slurm",
        "job_id": held.job_id,
        "attempts": [each.number for each in own],
        "state": held.state,
        "ended": held.end_s is not None,
        "elapsed_s": elapsed_s,
        "gpus": gpus,
        "shared_with": sorted(others),
        "why_missing": None if gpus is not None else "sacct names no gres/gpu of the job",
    }


def _untold(attempt: Attempt, why: str) -> Granted:
    assert attempt.grant is not None
    return {
        "scheduler": attempt.grant.scheduler,
        "job_id": attempt.grant.job_id,
        "attempts": [attempt.number],
        "state": None,
        "ended": False,
        "elapsed_s": None,
        "gpus": attempt.grant.gpus,
        "shared_with": [],
        "why_missing": why,
    }


def _total(grants: Sequence[Granted], bare: Sequence[int]) -> Value:
    """Return the GPU-hours of all grants: estimated while one lasts, or where a job was shared."""
    untold = next((grant for grant in grants if grant["why_missing"] is not None), None)
    if untold is not None:
        return null(f"job {untold['job_id']}: {untold['why_missing']}")
    if bare:
        return null(f"attempt {bare[0]} ran without a scheduler")
    hours = math.fsum((each["elapsed_s"] or 0.0) * (each["gpus"] or 0) for each in grants) / HOUR_S
    sure = all(grant["ended"] and not grant["shared_with"] for grant in grants)
    return declared(hours) if sure else estimated(hours)
