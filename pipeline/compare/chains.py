"""What an arm cost against another: chains of stages, with what both share cancelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.values import Value, derive, measured, null


@dataclass(frozen=True, slots=True)
class Spend:
    """What one arm's own stage cost.

    Attributes:
        depends_on: Arms its artifact was made from.
        work_h: Device-hours of the attempts that led to the artifact.
        retry_h: Device-hours of failed attempts and replayed steps.
        existing: The artifact was there before; what it once cost is unknown.
    """

    depends_on: tuple[str, ...]
    work_h: float
    retry_h: float = 0.0
    flops: float | None = None
    existing: bool = False


def chain(arm: str, spends: Mapping[str, Spend]) -> list[str]:
    """Return the arms that `arm` depends on, itself last, each once."""
    seen: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in seen:
            for before in spends[name].depends_on:
                visit(before)
            seen[name] = None

    visit(arm)
    return list(seen)


def _total(arms: list[str], spends: Mapping[str, Spend], *, retries: bool = False) -> Value:
    unknown = [arm for arm in arms if spends[arm].existing]
    if unknown:
        return null(f"existing model: what {', '.join(unknown)} once cost is unknown")
    return measured(sum(spends[arm].work_h + (spends[arm].retry_h if retries else 0.0) for arm in arms))


def c_total(arm: str, spends: Mapping[str, Spend]) -> Value:
    """Return C(arm): work over its chain, device-hours; null where an existing model is in it."""
    return _total(chain(arm, spends), spends)


def all_in(arm: str, spends: Mapping[str, Spend]) -> Value:
    """Return C(arm) plus retries, device-hours."""
    return _total(chain(arm, spends), spends, retries=True)


def c_opt(arm: str, base: str, spends: Mapping[str, Spend]) -> Value:
    """Return the work that `arm` needed and `base` did not, less the reverse, device-hours; what both share cancels."""
    ours, theirs = chain(arm, spends), chain(base, spends)
    mine = _total([name for name in ours if name not in theirs], spends)
    other = _total([name for name in theirs if name not in ours], spends)
    return derive(lambda a, b: a - b, mine, other)


def saving(arm: str, base: str, spends: Mapping[str, Spend]) -> Value:
    """Return `1 - C(arm) / C(base)`; an existing model in both chains cancels from both."""
    ours, theirs = chain(arm, spends), chain(base, spends)
    shared = [name for name in ours if name in theirs and spends[name].existing]
    mine = _total([name for name in ours if name not in shared], spends)
    other = _total([name for name in theirs if name not in shared], spends)
    if other.v == 0:
        return null(f"{base} cost nothing to train")
    return derive(lambda a, b: 1 - a / b, mine, other)


def payback_units(c_opt_h: Value, base_s_per_unit: Value, arm_s_per_unit: Value) -> Value:
    """Return the units to serve until the extra spending is repaid: 3600 C_opt / (c_base - c_arm)."""
    gain = derive(lambda b, a: b - a, base_s_per_unit, arm_s_per_unit)
    if gain.v is not None and gain.v <= 0:
        return null("never: not cheaper")
    return derive(lambda hours, per_unit: max(0.0, 3600 * hours / per_unit), c_opt_h, gain)
