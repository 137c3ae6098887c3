"""A figure and where it came from. No reading is not zero: what was not measured is null, with the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipeline.ledger.shapes import Figure


class Provenance(StrEnum):
    """Provenance of a figure, best first. A derived figure takes the worst of its inputs."""

    MEASURED = "measured"
    DERIVED = "derived"
    ESTIMATED = "estimated"
    DECLARED = "declared"
    UNAVAILABLE = "unavailable"


_RANK = list(Provenance)


@dataclass(frozen=True, slots=True)
class Value:
    """One figure. `value` is None exactly when `why_missing` is set and `provenance` is
    unavailable.
    """

    value: float | int | None
    provenance: Provenance
    why_missing: str | None = None

    def __post_init__(self) -> None:
        is_null = self.value is None
        assert (
            is_null == (self.why_missing is not None) == (self.provenance is Provenance.UNAVAILABLE)
        ), self
        assert self.value is None or not math.isnan(self.value), (
            "NaN is not a figure: use null(reason)"
        )

    def to_json(self) -> Figure:
        """Return `{"value", "provenance", "why_missing"}`, as figures stand in result.json."""
        return {
            "value": self.value,
            "provenance": str(self.provenance),
            "why_missing": self.why_missing,
        }

    @staticmethod
    def from_json(raw: Figure) -> Value:
        """Read back what `to_json` wrote; further keys (`ci`, `n`) are ignored."""
        return Value(raw["value"], Provenance(raw["provenance"]), raw["why_missing"])


def measured(value: float | int) -> Value:
    """Return a figure read from an instrument or counted."""
    return Value(value, Provenance.MEASURED)


def estimated(value: float | int) -> Value:
    """Return a figure from a model of reality (a FLOP formula times a rate, a power limit times
    time).
    """
    return Value(value, Provenance.ESTIMATED)


def declared(value: float | int) -> Value:
    """Return a figure somebody stated (a price)."""
    return Value(value, Provenance.DECLARED)


def null(why: str) -> Value:
    """Return an unavailable figure; `why` is shown to the reader."""
    return Value(None, Provenance.UNAVAILABLE, why)


def derive(compute: Callable[..., float | int], *inputs: Value) -> Value:
    """Compute a figure from others: null if any input is null, else with the worst provenance (at
    best derived).
    """
    missing = next((value for value in inputs if value.value is None), None)
    if missing is not None:
        assert missing.why_missing is not None
        return null(missing.why_missing)
    # Later in the enumeration is worse.
    worst = max((Provenance.DERIVED, *(each.provenance for each in inputs)), key=_RANK.index)
    return Value(compute(*(each.value for each in inputs)), worst)


_SCHEMA_1 = {"v": "value", "prov": "provenance", "why_null": "why_missing"}


def from_schema_1(record: Any) -> Any:
    """Return a record with every figure in today's form.

    Schema 1 wrote `{"v", "prov", "why_null"}`, and a conclusion as one text.
    What is in today's form is returned as it is.
    """
    if isinstance(record, list):
        return [from_schema_1(each) for each in record]
    if not isinstance(record, dict):
        return record
    names = _SCHEMA_1 if "v" in record and "why_null" in record else {}
    found = {names.get(name, name): from_schema_1(each) for name, each in record.items()}
    if found.get("schema") == 1 and ("rows" in found or "criteria" in found):
        found["schema"] = 2  # a result, or a verdict
    if isinstance(conclusion := found.get("conclusion"), str) and "rows" in found:
        found["conclusion"] = {"verdict": conclusion, "answers": []}
    return found
