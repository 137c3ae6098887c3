"""Another quality metric is one entry, another report format a module and a line: proven on a copy.

CONTRIBUTING.md lists these edits; they are made to a copy of the package, which then runs.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from edited_copy import Copy, result_of

from pipeline.evaluation.quality.assess import read_items

METRIC = """        Quality(
            key="log_loss",
            words="log loss",
            meaning="mean of -ln(probability of the true class)",
            measure=Mean(("logprob",), lambda logprob: -logprob),
            direction=-1,
            unit="nat",
            relative=True,
            same="label",
        ),
"""
BEFORE_IT = "    qualities = (\n"
CSV = '''"""arms.csv: a line an arm, with its quality, for a spreadsheet."""

import csv
import io


def csv_report(material):
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("arm", "metric", "value"))
    writer.writerows(
        (row["arm"], key, quality["value"])
        for row in material.result["rows"]
        for key, quality in row["quality"].items()
    )
    return file.getvalue()
'''
CLASSIFIED = ("task=sequence_classification", "data=stdlib_labels")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Add a metric and a format, and compare two arms there."""
    copy = Copy.make(tmp_path_factory.mktemp("metric"))
    copy.add_lines("pipeline/tasks/sequence_classification.py", BEFORE_IT, METRIC)
    copy.add_file("pipeline/report/arms_csv.py", CSV)
    formats = "pipeline/report/formats.py"
    before = "from pipeline.report.junit import junit_report\n"
    copy.add_lines(formats, before, "from pipeline.report.arms_csv import csv_report\n")
    copy.add_lines(formats, '    "report.md": markdown_report,\n', '    "arms.csv": csv_report,\n')
    weak = "stages.student.allow_weak_teacher=true"
    return copy.run("recipe=distill", "student.layers=1", weak, *CLASSIFIED)


@pytest.fixture(scope="module")
def result(run: Path) -> dict[str, Any]:
    return result_of(run)


@pytest.mark.slow
def test_every_arm_has_the_metric_with_its_interval(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        found = row["quality"]["log_loss"]
        items = read_items(Path(row["quality"]["accuracy"]["items"]))
        assert found["value"] == pytest.approx(-float(items["logprob"].mean()))
        low, high = found["ci"]
        assert low < found["value"] < high


@pytest.mark.slow
def test_arms_are_compared_on_it(result: dict[str, Any]) -> None:
    levels = {row["arm"]: row["quality"]["log_loss"]["value"] for row in result["rows"]}
    compared = [pair for pair in result["comparisons"] if pair["quality"]]
    assert compared
    for pair in compared:
        found = pair["quality"]["log_loss"]
        assert found["value"] == pytest.approx(1 - levels[pair["arm"]] / levels[pair["base"]])
        assert math.isfinite(found["ci"][0])


@pytest.mark.slow
def test_the_report_shows_it_and_the_catalogue_says_what_it_is(run: Path) -> None:
    assert "log_loss" in (run / "report.html").read_text()
    assert '"quality/log_loss"' in (run / "catalogue.json").read_text()


@pytest.mark.slow
def test_the_format_is_written_beside_the_report(run: Path, result: dict[str, Any]) -> None:
    lines = list(csv.DictReader((run / "arms.csv").read_text().splitlines()))
    assert {line["arm"] for line in lines} == {row["arm"] for row in result["rows"]}
    assert "log_loss" in {line["metric"] for line in lines}
