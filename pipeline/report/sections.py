"""The sections of a report, in the order of reading; `blocks.py` says what they are made of."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.ledger.shapes import Conclusion, Result
from pipeline.report import charts, details
from pipeline.report.blocks import Block, Section, bullets
from pipeline.report.conclusion import conclude
from pipeline.report.history import recent
from pipeline.report.material import Material
from pipeline.report.metered import is_metered
from pipeline.report.metered import sections as metered_sections
from pipeline.report.verdict import verdict_blocks
from pipeline.report.view import Footnotes


def sections_of(material: Material) -> list[Section]:
    """Return the sections of a run's report that have anything to say."""
    if is_metered(material.result):
        return metered_sections(material.result)
    result, notes, one = material.result, Footnotes(), [material]
    shown: details.Shown = {}  # catalogue keys of the figures shown, in order
    of = lambda make: make(result, notes, shown)
    verdict = result["verdict"]
    history = None if verdict is None else verdict.get("history")
    first = [
        ("verdict", "Verdict", [] if verdict is None else verdict_blocks(verdict)),
        ("releases", "The last releases", [] if history is None else recent(history)),
        ("comparisons", "Comparisons", [*charts.compared(one), *of(details.comparisons)]),
        ("arms", "Arms", [*charts.arms(one), *of(details.arms)]),
        ("trade-offs", "Quality against cost", charts.trade_offs(one)),
    ]
    more: list[tuple[str, str, Sequence[Block]]] = [
        ("hours", "Where the time went", [*charts.hours(one), *of(details.times)]),
        ("waste", "Waste by cause", of(details.waste_table)),
        ("curves", "While it trained", charts.curves(one)),
        ("payback", "When it pays back", charts.payback(one)),
        ("over-time", "Memory and energy", charts.over_time(one)),
        ("open", "What would change this answer", bullets(charts.open_questions(result))),
        ("tasks", "lm-eval tasks", of(details.tasks)),
        ("drift", "What quantizing changed", of(details.drift)),
        ("recovery", "What recovery brought", of(details.recovery)),
        ("serving", "Serving", of(details.serving)),
        ("engine", "Serving, declared", of(details.engine)),
        ("traced", "What the device did in traced steps", of(details.traced)),
        ("disturbance", "What else used the machine", of(details.disturbance)),
        ("notes", "Notes", details.remarks(result)),
    ]
    reasons = [f"{mark} {why}" for mark, why in notes.reasons()]
    last = [
        ("missing", "Why a figure is missing", bullets(reasons)),
        ("environment", "Device and environment", details.environment(result)),
        ("meaning", "What the figures mean", details.definitions(shown)),
        ("command", "How to reproduce", details.reproduce(result)),
    ]
    short = {name for name, _, _ in first} | {"notes", "missing", "command"}
    return [
        Section(name, title, blocks, name in short)
        for name, title, blocks in (*first, *more, *last)
        if blocks
    ]


def title_of(result: Result) -> str:
    """Return what a report is of: a recipe, or a command that was metered."""
    return result["rows"][0]["arm"] if is_metered(result) else result["recipe"]


def answer_of(result: Result) -> Conclusion:
    """Return what a run answers, in the words of this release."""
    return result["conclusion"] if is_metered(result) else conclude(result)
