"""A model's last releases in words: a table for a terminal, a section of the gate's report, CSV.

Every function takes a history in the form that verdict.json holds (`gate/history.py`), in which
names are whatever somebody once wrote into the store.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from pipeline.errors import one_line
from pipeline.ledger.metrics import RELATIVE
from pipeline.ledger.numbers import how_many
from pipeline.ledger.shapes import (
    FindingRecord,
    Judgement,
    ReleaseReading,
    ReleaseRecord,
    VerdictHistory,
)
from pipeline.report.blocks import Block, Bullets, Prose, Table
from pipeline.report.chargeback import harmless
from pipeline.report.text import pad

NO_MODEL = "(no registered model)"
HEAD = (
    "date (UTC)",
    "candidate",
    "against",
    "verdict",
    "serving saved",
    "quality",
    "policy",
    "judged",
)
COLUMNS = (
    "model",
    "created",
    "run",
    "version",
    "candidate",
    "baseline",
    "verdict",
    "look",
    "serving_saving",
    "serving_low",
    "serving_high",
    "quality_key",
    "quality_delta",
    "quality_low",
    "quality_high",
    "margin",
    "policy",
    "policy_sha256",
    "data",
    "device",
    "given_again",
    "ways_judged",
)
_SHORT = 8  # characters of a digest


# -- rows -----------------------------------------------------------------------------------------


def cells(row: ReleaseRecord) -> list[str]:
    """Return a release's cells, as plain text."""
    version = row["version"]
    candidate = (
        _digest(row["candidate"]) if version is None else f"v{version} {_digest(row['candidate'])}"
    )
    return [
        one_line(row["created"], 40)[:16].replace("T", " "),
        one_line(candidate, 24),
        _digest(row["baseline"]),
        one_line(row["verdict"], 16),
        _reading(row["serving"], "%"),
        _quality(row),
        one_line(row["policy"], 24) or "-",
        _judged(row),
    ]


def _digest(digest: str | None) -> str:
    return one_line(digest or "-", _SHORT + 3)[:_SHORT]


def _reading(figure: ReleaseReading | None, symbol: str) -> str:
    if figure is None:
        return "-"
    value, low, high = (100 * figure[name] for name in ("value", "low", "high"))
    return f"{value:+.2f}{symbol} [{low:+.2f}, {high:+.2f}]"


def _quality(row: ReleaseRecord) -> str:
    figure = row["quality"]
    if figure is None:
        return "-"
    margin = "" if row["margin"] is None else f" vs -{100 * row['margin']:g}"
    return _reading(figure, "%" if figure["relative"] else " pt") + margin


def _judged(row: ReleaseRecord) -> str:
    """Return how often: looks, answers given again, and other policies, data or devices for the
    same pair.
    """
    said = [look_words(row)]
    said += [f"given again {row['again']}x"] if row["again"] else []
    said += [f"pair judged {row['ways']} ways"] if row["ways"] > 1 else []
    return ", ".join(said)


def look_words(verdict: ReleaseRecord | Judgement) -> str:
    """Return which look gave a verdict; an INVALID one found nothing out, so that the look is still
    to be taken.
    """
    return (
        "no interim analysis counted"
        if verdict["verdict"] == "INVALID"
        else f"look {verdict['look']}"
    )


# -- alarms ---------------------------------------------------------------------------------------


def alarms(history: VerdictHistory) -> list[str]:
    """Return a sentence per alarm."""
    return [_sentence(each) for each in history["findings"] if each["alarm"]]


def remarks(history: VerdictHistory) -> list[str]:
    """Return a sentence per question that raised no alarm: what it came to, or why it cannot be
    answered.
    """
    return [_sentence(each) for each in history["findings"] if not each["alarm"]]


def _sentence(finding: FindingRecord) -> str:
    of = one_line(finding["of"], 80).removeprefix("quality/").replace("_", " ")
    return _step(finding, of) if finding["kind"] == "step" else _drift(finding, of)


def _step(finding: FindingRecord, of: str) -> str:
    if finding["why"]:
        return f"no step in {of} can be judged: {one_line(finding['why'], 200)}"
    unit = _unit(finding)
    said = (
        f"candidate {_digest(finding['candidate'])} reads"
        f" {_percent(finding['value']):+.2f}{unit} against the mean of"
        f" {how_many(finding['releases'], 'earlier release')}"
        f" ({_percent(finding['level']):g}% bound {_percent(finding['high']):+.2f}{unit})"
    )
    if finding["alarm"]:
        return f"ALARM: {of} has stepped down: {said}"
    return f"no step down in {of}: {said}"


def _drift(finding: FindingRecord, of: str) -> str:
    if finding["why"]:
        return f"no drift in {of} can be judged: {one_line(finding['why'], 200)}"
    if not finding["releases"]:
        return f"no drift in {of}: the newest champion is the best"
    unit, ends = _unit(finding), [_percent(finding[name]) for name in ("low", "high")]
    said = (
        f"the champion reads {_percent(finding['value']):+.2f}{unit} [{ends[0]:+.2f},"
        f" {ends[1]:+.2f}] against {_digest(finding['since'])},"
        f" {how_many(finding['releases'], 'change')} ago, where a loss of"
        f" {_percent(finding['margin']):g}{unit} is allowed"
    )
    if finding["alarm"]:
        return (
            f"ALARM: {of} has drifted: {said}; judge the next release against that one:"
            f" baseline={one_line(finding['since'], 32)}"
        )
    return f"no drift in {of}: {said}" + (
        "" if finding["shown"] else "; a loss beyond it is not excluded"
    )


def _percent(share: float | None) -> float:
    """Return a figure of a finding in per cent; one that gives no reason why not has them all."""
    assert share is not None
    return 100 * share


def _unit(finding: FindingRecord) -> str:
    shares = finding["of"] == "serving" or finding["of"].removeprefix("quality/") in RELATIVE
    return "%" if shares else " pt"


# -- terminal, Markdown, CSV ----------------------------------------------------------------------


def table(history: VerdictHistory) -> list[str]:
    """Return the lines of a terminal's table."""
    rows = [list(HEAD), *(cells(row) for row in history["releases"])]
    widths = [max(len(row[index]) for row in rows) for index in range(len(HEAD))]
    return ["  ".join(map(pad, row, widths)).rstrip() for row in rows]


def recent(history: VerdictHistory) -> list[Block]:
    """Return what a report says of the last releases; alarms stand first."""
    if history["why"] and len(history["releases"]) < 2:
        return [Prose(f"Nothing to show: {one_line(history['why'], 300)}.")]
    total, shown = history["of"], len(history["releases"])
    loud = alarms(history)
    said = [*loud, *remarks(history), *([history["why"]] if history["why"] else [])]
    named = one_line(history["model"] or NO_MODEL, 200)
    order = f"{named}: {shown} of {total}, each against the champion of its day, the newest last."
    return [
        *([Bullets(said, first=len(loud))] if said else []),
        Prose(order),
        Table(HEAD, [cells(row) for row in history["releases"]]),
    ]


def to_csv(histories: Sequence[VerdictHistory]) -> str:
    """Return all releases as CSV (RFC 4180): numbers are numbers, what is not known is empty, no
    cell is a formula.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in (row for history in histories for row in history["releases"]):
        serving, quality = row["serving"] or {}, row["quality"] or {}
        values = (
            row["model"] or NO_MODEL,
            row["created"],
            row["run"],
            row["version"],
            row["candidate"],
            row["baseline"],
            row["verdict"],
            None if row["verdict"] == "INVALID" else row["look"],
            *(serving.get(name) for name in ("value", "low", "high")),
            row["quality_key"],
            *(quality.get(name) for name in ("value", "low", "high")),
            row["margin"],
            row["policy"],
            row["policy_sha256"],
            row["data"],
            row["device"],
            row["again"],
            row["ways"],
        )
        writer.writerow([harmless(value) if isinstance(value, str) else value for value in values])
    return text.getvalue()
