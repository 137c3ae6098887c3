"""What a metered command leaves to read: its report, the closing table, a conclusion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.errors import one_line
from pipeline.ledger.metrics import BY_KEY, row_summary
from pipeline.ledger.numbers import count, duration, num_bytes, percent, significant
from pipeline.ledger.shapes import Conclusion, DeviceHours, HoursPart, Result, Row
from pipeline.report import waste
from pipeline.report.blocks import Block, Code, Section, Table, Terms, bullets
from pipeline.report.markdown import WHOLE, opening, sections_text, whole
from pipeline.report.money import cost_of_run, joules, money
from pipeline.report.page import Head, page
from pipeline.report.text import pad, wrap
from pipeline.report.view import Value, device_words, status_word, unit_of

WIDTH = 80
_SMALL_SHARE = 0.005
_FORMS = {
    "s": duration,
    "device-h": lambda v: duration(3600 * v),
    "GPU-h": lambda v: duration(3600 * v),
    "J": joules,
    "B": num_bytes,
    "1": percent,
    "tokens": count,
    "examples": count,
    "steps": count,
    "FLOP": count,
}
_TERMINAL = (
    "compute/device_hours",
    "compute/gpu_hours",
    "compute/energy_j",
    "compute/tokens",
    "compute/steps",
    "compute/goodput",
    "compute/host_peak_rss_bytes",
    "cost/amount",
    "cost/facility_energy_j",
)


def conclude(result: Result) -> Conclusion:
    """Return what the command took, and what became of the time."""
    row = result["rows"][0]
    hours = row["ledger"]["device_hours"]
    taken = duration(3600 * (hours["attached"]["value"] or 0.0))
    said = f"{one_line(row['arm'], 60)} took {taken} of device time on {device_words(result)}"
    if row["why"]:
        ended = f"It ended {row['status']}: {one_line(row['why'])}."
        return {"verdict": f"{said}.", "answers": [ended]}
    if hours["wasted"]["value"] is None:
        unread = one_line(hours["wasted"]["why_missing"])
        unknown = f"None of it is called productive or wasted: {unread}."
        return {"verdict": f"{said}.", "answers": [unknown]}
    shares = ", ".join(
        f"{percent(_share(hours, part))} {part}" for part in ("productive", "support", "wasted")
    )
    apart = "The meter's own time is not in it."
    return {"verdict": f"{said}, of which {shares}.", "answers": [apart]}


def _share(hours: DeviceHours, part: HoursPart) -> float:
    attached = hours["attached"]["value"]
    return (hours[part]["value"] or 0.0) / attached if attached else 0.0


def closing_table(result: Result) -> str:
    """Return the table that the meter prints at its end: lines of at most 80 columns."""
    row = result["rows"][0]
    figures = {
        key: v
        for key, value in row_summary(row).items()
        if key in _TERMINAL and (v := value["value"]) is not None
    }
    lines = [
        (key.rpartition("/")[2].replace("_", " "), _form(key, figures[key], row))
        for key in _TERMINAL
        if key in figures
    ]
    width = max((len(name) for name, _ in lines), default=0)
    head = f"metered: {one_line(row['arm'], 40)}, {status_word(row)}, {device_words(result)}"
    below = [
        *waste.closing_lines(result),
        result["conclusion"]["verdict"],
        *result["conclusion"]["answers"],
        *_doubts(row),
        *result["environment"]["notes"],
    ]
    return "\n".join(
        [
            head,
            "-" * min(WIDTH, len(head)),
            *(f"{pad(name, width)}  {text}" for name, text in lines),
            *(line for text in below for line in wrap(one_line(text), WIDTH, "    ")),
        ]
    )


def is_metered(result: Result) -> bool:
    """Tell whether a result is of a command of somebody else's."""
    return bool(result["rows"]) and all(row["type"] == waste.METERED for row in result["rows"])


def sections(result: Result) -> list[Section]:
    """Return the sections of the report."""
    row = result["rows"][0]
    figures = row_summary(row)
    known = {
        key: (v, value["provenance"])
        for key, value in figures.items()
        if (v := value["value"]) is not None and key in BY_KEY
    }
    taken = [[key, _form(key, v, row), provenance or ""] for key, (v, provenance) in known.items()]
    found = [
        Section("took", "What it took", _table(("figure", "value", "how it is known"), taken)),
        Section("hours", "Where the time went", _phases(row)),
        Section("waste", "Waste by cause", _table(waste.HEAD, waste.table_body(result))),
        Section("notes", "Notes", bullets(_notes(result))),
        Section("missing", "Why a figure is missing", bullets(_missing(figures))),
        Section("command", "Command", [Code(result["environment"]["command"])]),
        Section(
            "meaning",
            "What the figures mean",
            [Terms([(key, unit_of(key), BY_KEY[key].meaning) for key in known])],
        ),
    ]
    return [replace(each, is_first=True) for each in found if each.blocks]


def report_markdown(result: Result) -> str:
    """Return report.md of a metered command."""
    title, said = result["rows"][0]["arm"], result["conclusion"]
    return whole([opening(result, title, said), sections_text(sections(result)), WHOLE])


def report_page(result: Result) -> str:
    """Return report.html of a metered command."""
    row, said = result["rows"][0], result["conclusion"]
    head = Head(
        title=f"{one_line(row['arm'], 80)}: {result['status']}",
        kind="metered command",
        badge=result["status"],
        mood="good" if result["status"] == "FINISHED" else "bad",
        verdict=said["verdict"],
        answers=said["answers"],
        question=result["question"],
        facts=[f"run {one_line(result['run_id'], 100)}", device_words(result)],
    )
    return page(head, sections(result))


def _form(key: str, v: float, row: Row) -> str:
    if key == "cost/amount":
        return money(v, row["ledger"]["cost"]["currency"])
    form = _FORMS.get(BY_KEY[key].unit)
    text = f"{significant(v)} {BY_KEY[key].unit}" if form is None else form(v)
    return f"{text} of {_hours_of(key)}" if BY_KEY[key].unit in ("device-h", "GPU-h") else text


def _hours_of(key: str) -> str:
    return "GPU time" if BY_KEY[key].unit == "GPU-h" else "device time"


def _phases(row: Row) -> list[Block]:
    """Return the phases, largest first; what is too small to read is summed up."""
    if row["ledger"]["device_hours"]["wasted"]["value"] is None:
        return []
    phases: dict[str, int] = row["ledger"]["phases_ns"]
    total = math.fsum(phases.values())
    if not total:
        return []
    shown = {
        name: ns
        for name, ns in sorted(phases.items(), key=lambda item: -item[1])
        if ns / total >= _SMALL_SHARE
    }
    rest = total - sum(shown.values())
    lines = {**shown, **({"rest": rest} if rest else {})}
    body = [[name, duration(ns / 1e9), percent(ns / total)] for name, ns in lines.items()]
    return _table(("phase", "time, mean of the devices", "share"), body)


def _notes(result: Result) -> list[str]:
    row = result["rows"][0]
    lines = [f"{result['status']}: {result['why']}"] if result["why"] else []
    cost = cost_of_run(result["run"].get("cost"))
    return [
        *lines,
        *([] if cost is None else [cost]),
        *_doubts(row),
        *result["environment"]["notes"],
    ]


def _doubts(row: Row) -> list[str]:
    return [f"the meter says {problem}" for problem in row["ledger"]["meter_problems"]]


def _missing(figures: Mapping[str, Value]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for key, value in figures.items():
        if value["value"] is None:
            by_reason.setdefault(value["why_missing"], []).append(key)
    return [f"{', '.join(keys)}: {why}" for why, keys in by_reason.items()]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[Block]:
    return [Table(head, body)] if body else []
