"""Another task is a file of its own and a line of the table: proven on a copy.

The toy reads a rating, 1 to 5, off a text: regression on one number. Its labels are the data's
classes in order of their numbers; the model has a single output.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited_copy import ROOT, Copy, result_of

from pipeline.evaluation.quality.assess import read_items
from pipeline.tasks.kind import Kind
from pipeline.tasks.table import Task

FILE = '''"""Ratings: a number from 1 up is read off a text; the loss is the squared error."""

from pipeline.tasks.kind import Kind
from pipeline.tasks.quality import Mean, Quality


class Rating(Kind):
    """The task `rating`."""

    word = "rater"
    remedy = "give a model with a single output"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    labelled = True
    has_classes = False
    embedded = "stdlib_labels"
    validation_documents = 64
    rows = unit = "example"
    primary = "mean_squared_error"
    recorded = ("rating", "prediction")
    known_by, finite = "rating", "prediction"
    qualities = (
        Quality(
            key="mean_squared_error",
            words="mean squared error",
            meaning="mean over test examples of (prediction - rating)^2",
            measure=Mean(("rating", "prediction"), lambda rating, said: (said - rating) ** 2),
            direction=-1,
            relative=True,
            same="rating",
        ),
    )

    def configure(self, config, labels):
        """Have one output, which is a number."""
        config.num_labels, config.problem_type = 1, "regression"

    def loss(self, logits_BC, labels_B):
        """Return the sum of squared errors."""
        return (logits_BC[:, 0] - (labels_B + 1)).square().sum()

    def scored(self, logits_BC, labels_B):
        """Return the rating and what the model says."""
        return {"rating": labels_B + 1, "prediction": logits_BC[:, 0]}
'''
TABLE = "pipeline/tasks/table.py"
IMPORT = "from pipeline.tasks.quality import Columns, Quality\n"
LINE = '    sequence_classification = "sequence_classification", SequenceClassification()\n'
ASKED = re.compile(r"task is (?:not )?Task\.|Task\.\w+:")
"""A task compared with another, or a table of tasks outside theirs."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Add a task to a copy of the package, with data for it."""
    copy = Copy.make(tmp_path_factory.mktemp("task"))
    copy.add_file("pipeline/tasks/rating.py", FILE)
    copy.add_lines(TABLE, IMPORT, "from pipeline.tasks.rating import Rating\n")
    copy.add_lines(TABLE, LINE, '    rating = "rating", Rating()\n')
    draw = np.random.default_rng(0)
    lines = [
        {"text": f"{number} " + "good " * rating + "bad " * (5 - rating), "label": str(rating)}
        for number, rating in enumerate(draw.integers(1, 6, 120).tolist())
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (copy.work / "ratings.jsonl").write_text(text)
    return copy


@pytest.fixture(scope="module")
def result(copy: Copy) -> dict[str, Any]:
    return result_of(copy.run("recipe=baseline", "task=rating", "data.path=ratings.jsonl"))


@pytest.mark.slow
def test_the_task_trains_and_is_assessed_on_its_metric(result: dict[str, Any]) -> None:
    (row,) = result["rows"]
    assert (row["status"], row["artifact"]["kind"]) == ("FINISHED", "model")
    found = row["quality"]["mean_squared_error"]
    items = read_items(Path(found["items"]))
    expected = (items["prediction"] - items["rating"]) ** 2
    assert set(items["rating"].tolist()) <= {1, 2, 3, 4, 5}
    assert found["value"] == pytest.approx(expected.mean())
    assert found["ci"][0] < found["value"] < found["ci"][1]
    assert "mean squared error" in str(result["conclusion"])


@pytest.mark.slow
def test_the_model_that_it_made_has_one_output(result: dict[str, Any], copy: Copy) -> None:
    (row,) = result["rows"]
    digest = row["artifact"]["digest"]
    (config,) = (copy.work / "mlruns/store").rglob(f"*{digest}*/config.json")
    said = json.loads(config.read_text())
    assert (len(said["id2label"]), said["problem_type"]) == (1, "regression")


def test_what_needs_a_distribution_is_refused(copy: Copy) -> None:
    done = copy.start("recipe=distill", "task=rating", "data.path=ratings.jsonl")
    said = "reads what models predict as a distribution, and rating has none"
    assert (done.returncode, said in done.stderr) == (1, True)


def test_no_task_is_asked_by_name_outside_the_table() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "pipeline").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if ASKED.search(line)
    ]
    assert found == []
    assert ASKED.search("if run.task is not Task.causal_lm:")
    assert ASKED.search("    Task.causal_lm: 32,")


@pytest.mark.parametrize("task", Task)
def test_a_task_says_all_that_is_asked_of_it(task: Task) -> None:
    kind = task.kind
    told = {"word", "remedy", "auto_class", "heads", "labelled", "embedded", "rows", "unit"}
    told |= {"validation_documents", "primary", "recorded", "known_by", "finite", "qualities"}
    assert {name for name in told if not hasattr(kind, name)} == set()
    keys = [each.key for each in kind.qualities]
    assert len(set(keys)) == len(keys)
    assert kind.decides.same is not None, "arms are compared on what decides"
    assert kind.stands_in is None or kind.stands_in in keys


def test_what_a_task_does_not_give_it_says() -> None:
    logits, labels = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    for asked in (Kind().loss, Kind().scored):
        with pytest.raises(NotImplementedError):
            asked(logits, labels)
    with pytest.raises(NotImplementedError):  # its loss may mix in what a teacher says
        Task.sequence_classification.kind.loss(logits, labels)
