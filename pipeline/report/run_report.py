"""The report of a run: report.html, report.md, and what MLflow shows as a description."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipeline.errors import one_line
from pipeline.ledger.numbers import duration, how_many
from pipeline.report.headline import badge_of
from pipeline.report.markdown import (
    MOST_IN_MLFLOW,
    WHOLE,
    cut,
    opening,
    pictures_of,
    sections_text,
    whole,
)
from pipeline.report.material import Material
from pipeline.report.page import Head, page
from pipeline.report.sections import answer_of, sections_of, title_of
from pipeline.report.verdict import markdown_line, shown_line
from pipeline.report.view import device_words, seeds

FOOTER = (
    "Figures are those of result.json beside this file. A dash with a number has its reason under"
    " “Why a figure is missing”."
)


def html_report(material: Material) -> str:
    """Return the page of a run."""
    return page(head_of(material), sections_of(material), charts=material.charts)


def markdown_report(material: Material) -> str:
    """Return report.md: the first sections of the report, with their charts as pictures beside
    it.
    """
    first = [section for section in sections_of(material) if section.is_first]
    text = sections_text(first, pictures=material.charts)
    return whole([opening_of(material), text, WHOLE])


def short_form(material: Material, limit: int = MOST_IN_MLFLOW) -> str:
    """Return the same without pictures, cut at a line's end to at most `limit` characters."""
    first = [section for section in sections_of(material) if section.is_first]
    return cut(whole([opening_of(material), sections_text(first)]), limit)


def pictures(material: Material, otherwise: Callable[[str], None]) -> Iterator[tuple[str, bytes]]:
    """Return name and content of every picture that report.md shows.

    Args:
        otherwise: Told in a line of each that could not be drawn.
    """
    return pictures_of(sections_of(material) if material.charts else (), otherwise)


def opening_of(material: Material) -> str:
    """Return what stands before the sections; a gate's report begins with its verdict."""
    result, verdict = material.result, material.result["verdict"] or material.verdict
    line = "" if verdict is None else markdown_line(verdict)
    return opening(result, title_of(result), answer_of(result), line)


def head_of(material: Material) -> Head:
    """Return what the page begins with."""
    result = material.result
    said = answer_of(result)
    badge, mood = badge_of(result)
    verdict = material.verdict or result["verdict"]
    line = [] if verdict is None else [shown_line(verdict)]
    total = result["run"]["device_hours"]["total"]["value"]
    found = seeds(result)
    return Head(
        title=f"{one_line(title_of(result), 80)}: {badge}",
        kind=f"{one_line(title_of(result), 80)}, {result['status']}",
        badge=badge,
        mood=mood,
        verdict=one_line(said["verdict"], 4000),
        answers=[one_line(each, 4000) for each in (*line, *said["answers"])],
        question=one_line(result["question"], 1000),
        facts=[
            f"run {one_line(result['run_id'], 100)}",
            device_words(result),
            how_many(len(found), "seed"),
            *([] if total is None else [f"{duration(3600 * total)} of device time"]),
        ],
        footer=FOOTER,
    )
