"""The figures of a result, each under one name, whatever it is nested in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from pipeline.ledger.shapes import Event, Result, Row

Members = Mapping[str, Any]
"""A figure without what other figures are nested in it: `value`, `provenance`, `ci`, `n`, ..."""
Named = dict[str, Members]
OUTSIDE = "run/phases_device_ns"
LEFT_OUT = {
    "run/allocated": "the scheduler's accounting, which sync completes after the end",
    "run/cost": "follows from what the scheduler held",
}
"""What a receipt says nothing of: it may change after the run has ended."""
_ON_A_MACHINE = ("items", "why_missing")  # paths; of figures that there are, always null
REL_TOL = 1e-9
"""Relative difference up to which two numbers are one: sums may be taken in another order."""
ABS_TOL = 1e-12
"""The same of differences that cancel; of hours, it is 4 ns."""


def row_name(row: Row) -> str:
    """Return what tells a row from all others of its run."""
    whose = "" if row["reused"] is None else f", of {row['reused']}"
    return f"rows/{row['arm']} (seed {row['seed']}, attempt {row['attempt']}{whose})"


def pair_name(pair: Mapping[str, Any]) -> str:
    """Return what tells a comparison from all others of its run."""
    return f"comparisons/{pair['arm']} against {pair['base']}"


def figures_of(result: Result) -> Named:
    """Return all figures of a result that are not null, by name."""
    found = dict(_in(result["run"], "run"))
    found[OUTSIDE] = dict(result["run"]["phases_device_ns"])
    for row in result["rows"]:
        found |= _in(row, row_name(row))
    for pair in result["comparisons"]:
        found |= _in(pair, pair_name(pair))
    verdict = result["verdict"]
    for each in [] if verdict is None else verdict["criteria"]:
        found |= _in(each, f"verdict/{each['name']}")
    return {name: each for name, each in found.items() if not is_left_out(name)}


def journaled(events: list[Event]) -> Named:
    """Return the figures that the lines of a journal hold, the newest of each."""
    found: Named = {}
    rows: dict[tuple[str, int, int], list[str]] = {}  # of an attempt: this run's, and reused ones
    for event in events:
        match event["e"]:
            case "row":
                row = event["row"]
                name = row_name(row)
                rows.setdefault((row["arm"], row["seed"], row["attempt"]), []).append(name)
                found |= _in(row, name)
            case "serving":
                for served in event["rows"]:
                    of = served["arm"], served["seed"], served["attempt"]
                    for name in rows.get(of, []):
                        found |= _in(served["serving"], f"{name}/serving")
            case "comparisons":
                for pair in event["comparisons"]:
                    found |= _in(pair, pair_name(pair))
            case "verdict":
                for each in event["verdict"]["criteria"]:
                    found |= _in(each, f"verdict/{each['name']}")
            case _:
                pass
    return found


def is_left_out(name: str) -> bool:
    """Whether a receipt says nothing of a figure."""
    return any(name == each or name.startswith(f"{each}/") for each in LEFT_OUT)


def _in(record: Any, name: str) -> Iterator[tuple[str, Members]]:
    """Yield the figures in a record with their names, at any depth."""
    if not isinstance(record, dict):
        return
    if {"value", "provenance"} <= record.keys() and record["value"] is not None:
        own = {key: each for key, each in record.items() if not isinstance(each, dict)}
        yield name, {key: each for key, each in own.items() if key not in _ON_A_MACHINE}
    for key, each in record.items():
        yield from _in(each, f"{name}/{key}")


def differs(said: Any, found: Any) -> bool:
    """Whether two values are not the same, numbers up to `REL_TOL`."""
    if isinstance(said, Mapping) and isinstance(found, Mapping):
        return said.keys() != found.keys() or any(differs(said[key], found[key]) for key in said)
    if isinstance(said, list | tuple) and isinstance(found, list | tuple):
        return len(said) != len(found) or any(
            differs(a, b) for a, b in zip(said, found, strict=True)
        )
    if _is_number(said) and _is_number(found):
        return not math.isclose(float(said), float(found), rel_tol=REL_TOL, abs_tol=ABS_TOL)
    return type(said) is not type(found) or said != found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
