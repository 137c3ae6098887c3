"""A forecast in words: one line before a run, a table on demand, and how good forecasts were."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pipeline.ledger.numbers import duration, how_many, num_bytes, percent, significant
from pipeline.ledger.shapes import Expected, ForecastPart, ForecastRecord, ForecastTotal
from pipeline.report.text import pad

TOTALS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("device_hours", "device-hours", significant),
    ("memory_bytes", "memory of a device in training", num_bytes),
    ("host_bytes", "memory of the host", num_bytes),
    ("disk_bytes", "left on disk", num_bytes),
    ("energy_j", "energy", lambda joules: f"{significant(joules / 3600)} Wh"),
)
"""Figures of a whole run: key, words, and how a number is shown."""


def forecast_line(record: ForecastRecord, attempt: int = 1) -> str:
    """Return what a run will take, in one line; of a later attempt, what is left of it."""
    totals = record["totals"]
    hours = totals["device_hours"]["expected"]
    if hours is None:
        return f"forecast: not known yet ({totals['device_hours']['why_missing']})"
    seconds = {end: hours[end] * 3600 / record["devices"] for end in ("value", "low", "high")}
    begins = "forecast" if attempt == 1 else "forecast of what is left"
    said = [
        f"{begins}: {significant(hours['value'], 2)} device-hours"
        f" (90%: {significant(hours['low'], 2)} to {significant(hours['high'], 2)}),"
        f" about {duration(seconds['value'])}"
    ]
    for key, words, shown in TOTALS[1:]:
        found = totals[key]["expected"]
        if found is not None:
            said.append(f"{words} {shown(found['value'])}")
    if record["missing"]:
        said.append(f"without {_listed(record['missing'])}, of which nothing is known here")
    return "; ".join(said)


def forecast_table(record: ForecastRecord) -> list[str]:
    """Return a forecast part by part, and the totals with their intervals."""
    rows = [("part", "seconds", "90% interval", "known from")]
    rows += [
        (part_name(part), *_shown(part["expected_s"], duration), part["source"])
        for part in record["parts"]
    ]
    for key, words, shown in TOTALS:
        total = record["totals"][key]
        why = "" if total["expected"] is not None else total["why_missing"] or ""
        rows.append((words, *_shown(total["expected"], shown), why))
    widths = [max(len(row[at]) for row in rows) for at in range(3)]
    return [
        "  ".join(
            (pad(row[0], widths[0]), *(pad(row[at], widths[at]) for at in (1, 2)), row[3])
        ).rstrip()
        for row in rows
    ]


def part_name(part: ForecastPart) -> str:
    """Return what a part is, in words."""
    if part["arm"] is None:
        return {"compare": "comparison pass", "overhead": "start and report"}[part["what"]]
    seed = "" if not part["seed"] else f" (seed {part['seed']})"
    return f"{part['arm']}{seed}: {part['what']}"


def score_line(record: ForecastRecord) -> str | None:
    """Return how a finished run's hours compare with its forecast; None where either is missing."""
    total = record["totals"]["device_hours"]
    expected, actual = total["expected"], total["actual"]
    if expected is None or not actual:
        return None
    error = percent(actual / expected["value"] - 1, sign=True)
    inside = "inside" if expected["low"] <= actual <= expected["high"] else "outside"
    return (
        f"forecast {significant(expected['value'], 2)} device-hours, spent"
        f" {significant(actual, 2)} ({error}), {inside} the 90% interval"
    )


def record_lines(records: Sequence[ForecastRecord]) -> list[str]:
    """Return how good the forecasts of finished runs were: coverage, error and width."""
    lines: list[str] = []
    for key, words, _ in TOTALS:
        totals = [each["totals"][key] for each in records if key in each["totals"]]
        scored = [found for each in totals if (found := _scored(each)) is not None]
        if not scored:
            continue
        inside = sum(expected["low"] <= actual <= expected["high"] for expected, actual in scored)
        errors = sorted(abs(actual / expected["value"] - 1) for expected, actual in scored)
        widths = sorted(expected["high"] / max(expected["low"], 1e-300) for expected, _ in scored)
        lines.append(
            f"{words}: {inside} of {how_many(len(scored), 'forecast')} inside the 90% interval;"
            f" median error {percent(_median(errors))}; the interval's ends are"
            f" {significant(_median(widths), 2)}x apart (median)"
        )
    return lines or ["no forecast of this store has been scored yet"]


def _scored(total: ForecastTotal) -> tuple[Expected, float] | None:
    expected, actual = total["expected"], total["actual"]
    return None if expected is None or not actual or not expected["value"] else (expected, actual)


def _shown(found: Expected | None, shown: Callable[[float], str]) -> tuple[str, str]:
    if found is None:
        return "not known", ""
    return shown(found["value"]), f"{shown(found['low'])} to {shown(found['high'])}"


def _listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} and {unique[-1]}"


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
