"""A figure and where it came from. No reading is not zero: what was not measured is null, with the
reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Prov(StrEnum):
    """Provenance of a figure, best first. A derived figure takes the worst of its inputs."""

    MEASURED = "measured"
    DERIVED = "derived"
    ESTIMATED = "estimated"
    DECLARED = "declared"
    UNAVAILABLE = "unavailable"


_RANK = list(Prov)


@dataclass(frozen=True, slots=True)
class Value:
    """One figure. `v` is None exactly when `why_null` is set and `prov` is unavailable."""

    v: float | int | None
    prov: Prov
    why_null: str | None = None

    def __post_init__(self) -> None:
        is_null = self.v is None
        assert is_null == (self.why_null is not None) == (self.prov is Prov.UNAVAILABLE), self
        assert self.v is None or self.v == self.v, "NaN is not a figure: use null(reason)"

    def to_json(self) -> dict[str, Any]:
        """Return `{"v", "prov", "why_null"}`, the form every figure has in result.json."""
        return {"v": self.v, "prov": str(self.prov), "why_null": self.why_null}

    @staticmethod
    def from_json(raw: dict[str, Any]) -> Value:
        """Read back what `to_json` wrote; further keys (`ci`, `n`) are ignored."""
        return Value(raw["v"], Prov(raw["prov"]), raw["why_null"])


def measured(v: float | int) -> Value:
    """Return a figure read from an instrument or counted."""
    return Value(v, Prov.MEASURED)


def estimated(v: float | int) -> Value:
    """Return a figure from a model of reality (a FLOP formula times a rate, a power limit times
    time).
    """
    return Value(v, Prov.ESTIMATED)


def declared(v: float | int) -> Value:
    """Return a figure somebody stated (a price)."""
    return Value(v, Prov.DECLARED)


def null(why: str) -> Value:
    """Return an unavailable figure; `why` is shown to the reader."""
    return Value(None, Prov.UNAVAILABLE, why)


def derive(compute: Callable[..., float | int], *inputs: Value) -> Value:
    """Compute a figure from others: null if any input is null, else with the worst provenance (at
    best derived).
    """
    missing = next((value for value in inputs if value.v is None), None)
    if missing is not None:
        assert missing.why_null is not None
        return null(missing.why_null)
    prov = max((Prov.DERIVED, *(value.prov for value in inputs)), key=_RANK.index)
    return Value(compute(*(value.v for value in inputs)), prov)
