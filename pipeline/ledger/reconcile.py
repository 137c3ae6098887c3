"""What must hold between the figures of one ledger. A failure invalidates the ledger and names
itself.

Source of the rules: every second in one class and booked once; shares of a GPU's time are nested (a
tensor core that works is an SM that works, an SM that works is a GPU that is busy, and so on up to
what the scheduler granted).
"""

from __future__ import annotations

from itertools import pairwise

from pipeline.ledger.shapes import HOURS, Figures, Measurements

HOUR_S = 3600.0
CLOSE_S = 1e-6
"""Sums of hours are sums of the same integer nanoseconds: only the rounding of floats may tell them
apart.
"""
NESTED_SHARE, NESTED_S = 0.01, 1.0
"""Hours that come from different instruments may contradict each other by this much, whichever is
larger.
"""
_NESTED = ("tensor_active", "sm_active", "busy", "attached", "allocated")


def problems(ledger: Measurements) -> list[str]:
    """Return what does not hold, each in a few words; empty where the ledger closes.

    Args:
        ledger: As a row of result.json has it; nulls are no contradiction.
    """
    return [*_sums(ledger), *_phases(ledger), *_shares(ledger["gpu_hours"]), *_signs(ledger)]


def _sums(ledger: Measurements) -> list[str]:
    hours = {name: ledger["device_hours"][name]["value"] for name in HOURS}
    causes = [value["value"] for value in ledger["device_hours"]["wasted_by"].values()]
    return [
        *_sum(
            "attached",
            hours["attached"],
            "work + assess + retry",
            [hours[n] for n in ("work", "assess", "retry")],
        ),
        *_sum(
            "attached",
            hours["attached"],
            "productive + support + wasted",
            [hours[n] for n in ("productive", "support", "wasted")],
        ),
        *(
            _sum("wasted", hours["wasted"], "its causes", causes)
            if hours["wasted"] is not None
            else []
        ),
    ]


def _sum(name: str, whole: float | None, words: str, parts: list[float | None]) -> list[str]:
    known = [part for part in parts if part is not None]
    if whole is None or len(known) < len(parts):
        return []
    off_s = HOUR_S * (sum(known) - whole)
    return (
        []
        if abs(off_s) <= CLOSE_S + 1e-12 * HOUR_S * abs(whole)
        else [f"{words} is not {name}: {off_s:+.6g} s"]
    )


def _phases(ledger: Measurements) -> list[str]:
    """Check phases against work and assessment: what was lost has none."""
    hours, wall = ledger["device_hours"], ledger["wall_s"]["value"]
    attached, work, assess = (hours[name]["value"] for name in ("attached", "work", "assess"))
    if not attached or work is None or assess is None:
        return []
    if wall is None or hours["wasted"]["value"] is None:
        return []
    # Phases cover what was kept; they are of one device, as wall time is.
    kept_s = wall * (work + assess) / attached
    off_s = sum(ledger["phases_ns"].values()) / 1e9 - kept_s
    return [] if abs(off_s) <= CLOSE_S + 1e-9 * kept_s else [f"phases do not close: {off_s:+.6g} s"]


def _shares(gpu_hours: Figures) -> list[str]:
    """Check that shares are nested, each against the next one that was read."""
    known = ((name, gpu_hours[name]["value"]) for name in _NESTED)
    read = [(name, value) for name, value in known if value is not None]
    return [
        f"{inner} is more than {outer}: {HOUR_S * (small - large):.3g} s"
        for (inner, small), (outer, large) in pairwise(read)
        if small - large > max(NESTED_SHARE * large, NESTED_S / HOUR_S)
    ]


def _signs(ledger: Measurements) -> list[str]:
    figures = {
        **{name: ledger["device_hours"][name] for name in HOURS},
        **{
            f"wasted by {name}": value
            for name, value in ledger["device_hours"]["wasted_by"].items()
        },
        "wall_s": ledger["wall_s"],
        "energy_j": ledger["energy_j"],
    }
    return [
        f"{name} is negative"
        for name, value in figures.items()
        if value["value"] is not None and value["value"] < 0
    ]
