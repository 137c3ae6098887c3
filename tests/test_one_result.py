"""One result, four forms: page, Markdown, terminal and MLflow say the same figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lxml import html
from make_journal import store, write_run
from make_result import ARMS, make_result
from reports import markdown

from pipeline.ledger.numbers import duration, significant
from pipeline.report.material import Material
from pipeline.report.run_report import html_report
from pipeline.report.tables import closing_table
from pipeline.tracking.deliver import deliver

ESCAPED = re.compile(r"\\(.)")


def cells_of_page(result: Any) -> dict[str, list[list[str]]]:
    """Return the tables of each section of report.html that are no chart's data."""
    root = html.document_fromstring(html_report(Material(result, charts=False)))
    found: dict[str, list[list[str]]] = {}
    for section in root.xpath("//section"):
        title = " ".join(section.xpath("./h2")[0].text_content().split())
        for row in section.xpath("./div[@class='wide']/table//tr"):
            cells = [" ".join(cell.text_content().split()) for cell in row.xpath("./*")]
            found.setdefault(title, []).append(cells)
    return found


def cells_of_markdown(result: Any) -> dict[str, list[list[str]]]:
    """Return the same of the Markdown, read as GitHub does."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in markdown(result).splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif line.startswith("|") and not re.fullmatch(r"[|:\- ]+", line):
            cells = [each.strip() for each in re.split(r"(?<!\\)\|", line)[1:-1]]
            plain = [ESCAPED.sub(r"\1", each).replace("&amp;", "&") for each in cells]
            found.setdefault(title, []).append([" ".join(each.split()) for each in plain])
    return found


@pytest.mark.parametrize("recipe", sorted(ARMS))
def test_the_tables_of_page_and_markdown_are_the_same(recipe: str) -> None:
    result = make_result(recipe)
    page, text = cells_of_page(result), cells_of_markdown(result)
    assert len(page) > 3
    assert set(page) <= set(text)
    for title, rows in page.items():
        missing = [row for row in rows if row not in text[title]]
        assert missing == [], title


@pytest.mark.parametrize("recipe", sorted(ARMS))
def test_the_terminal_shows_the_results_figures(recipe: str) -> None:
    result: Any = make_result(recipe)
    lines = {line.split()[0]: line for line in closing_table(result).splitlines() if line.strip()}
    for row in result["rows"]:
        line = lines[row["arm"]]
        hours = row["ledger"]["device_hours"]["attached"]["value"]
        quality = row["quality"]["bits_per_byte"]["value"]
        assert duration(3600 * hours) in line
        assert significant(quality, 4) in line.split()


@pytest.mark.parametrize("recipe", ["distill", "quantize"])
def test_mlflow_holds_the_results_figures(root: Path, recipe: str) -> None:
    """To the bit: every hour by part, quality and serving figure that is not null."""
    rows: Any = make_result(recipe)["rows"]
    deliver(write_run(root, "run-1", rows=rows))
    runs = store(root)[1]
    compared = 0
    for row in rows:
        metrics = runs[row["arm"]].data.metrics
        hours = row["ledger"]["device_hours"]
        expected = {f"compute/{part}_device_hours": hours[part] for part in hours if part in PARTS}
        expected["compute/device_hours"] = hours["attached"]
        for section in ("quality", "serving"):
            expected |= {f"{section}/{name}": figure for name, figure in row[section].items()}
        for key, figure in expected.items():
            if figure["value"] is not None and (key in metrics or not key.startswith("serving/")):
                assert metrics[key] == figure["value"], key
                compared += 1
    assert compared > 8 * len(rows)


PARTS = ("work", "assess", "retry", "productive", "support", "wasted")
