"""report.html of a run."""

from __future__ import annotations

from pipeline.errors import one_line
from pipeline.ledger.numbers import duration
from pipeline.report.headline import badge_of
from pipeline.report.material import Material
from pipeline.report.page import Head, page
from pipeline.report.sections import answer_of, sections_of
from pipeline.report.verdict import shown_line
from pipeline.report.view import device_words, seeds

FOOTER = (
    "Figures are those of result.json beside this file. A dash with a number has its reason under"
    " “Why a figure is missing”."
)


def html_report(material: Material) -> str:
    """Return the page of a run."""
    return page(head_of(material), sections_of(material), charts=material.charts)


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
        title=f"{one_line(result['recipe'], 80)}: {badge}",
        kind=f"{one_line(result['recipe'], 80)}, {result['status']}",
        badge=badge,
        mood=mood,
        verdict=one_line(said["verdict"], 4000),
        answers=[one_line(each, 4000) for each in (*line, *said["answers"])],
        question=one_line(result["question"], 1000),
        facts=[
            f"run {one_line(result['run_id'], 100)}",
            device_words(result),
            f"{len(found)} seed{'' if len(found) == 1 else 's'}",
            *([] if total is None else [f"{duration(3600 * total)} of device time"]),
        ],
        footer=FOOTER,
    )
