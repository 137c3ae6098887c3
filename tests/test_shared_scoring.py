"""Scoring and smoothing by several ranks: what is found is what one process finds, each device's
hours are its own, and what fails on one rank ends all.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_assess_models import byte_tokenizer, random_documents, tiny
from ranks_here import PROJECT, forked_ranks

from pipeline.config.settings.quality import QualityConfig
from pipeline.data.padding import Padding
from pipeline.evaluation.quality.assess import read_items
from pipeline.evaluation.quality.parts import (
    even_parts,
    example_rows,
    is_worth_sharing,
    language_rows,
    put_together,
)
from pipeline.evaluation.quality.scoring import score_causal, score_examples
from pipeline.tasks.table import Task

CAUSAL, CLASSES = Task.causal_lm, Task.sequence_classification


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "most", "ranks", "worth"),
    [(64, None, 2, True), (63, None, 2, False), (640, 63, 2, False), (640, None, 1, False)],
)
def test_a_small_assessment_stays_on_one_device(
    documents: int, most: int | None, ranks: int, *, worth: bool
) -> None:
    """Two batches of 16 for each rank."""
    config = QualityConfig(batch_size=16, max_documents=most)
    assert is_worth_sharing(documents, config, ranks) is worth


def test_ranks_read_about_as_many_tokens() -> None:
    tokens = np.random.default_rng(0).permutation(np.geomspace(2, 4000, 300).astype(int))
    parts = even_parts(np.arange(300), tokens, 7)
    assert sorted(np.concatenate(parts)) == list(range(300))
    loads = [int(tokens[part].sum()) for part in parts]
    assert max(loads) - min(loads) <= tokens.min() + 4
    # what slices of the documents in their order would give
    plain = [int(part.sum()) for part in np.array_split(tokens, 7)]
    assert max(plain) - min(plain) > 1000


def conversations() -> list[Any]:
    """Return encoded documents of which some are answers of one: neighbours of one digest."""
    rows = random_documents([9, 30, 4, 17, 5, 21, 12, 3], is_text=True)
    digests = ("a", "b", "b", "c", "d", "d", "d", "e")
    return [
        dataclasses.replace(row, digest=digest) for row, digest in zip(rows, digests, strict=True)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_texts_scored_in_parts_are_those_scored_at_once(ranks: int) -> None:
    """Seven ranks: two have none of the five documents."""
    model, encoded = tiny(CAUSAL), conversations()
    how: dict[str, Any] = {
        "sequence_length": 8,
        "batch_size": 2,
        "device": "cpu",
        "pad_id": 0,
        "stride": 3,
        "other": tiny(CAUSAL, seed=1),
    }
    rows, tokens = language_rows(encoded, 8, 3)
    assert rows.tolist() == [0, 1, 1, 2, 3, 3, 3, 4]
    parts = even_parts(rows, tokens, ranks)
    found = [
        score_causal(
            model, [each for each, row in zip(encoded, rows, strict=True) if row in part], **how
        )
        for part in parts
    ]
    whole, joined = score_causal(model, encoded, **how), put_together(parts, found)
    assert joined.digest.tolist() == ["a", "b", "c", "d", "e"]
    same(joined.columns, whole.columns)
    assert joined.predictions.tolist() == whole.predictions.tolist()
    assert joined.drift is not None
    assert whole.drift is not None
    same(dataclasses.asdict(joined.drift), dataclasses.asdict(whole.drift))


@pytest.mark.parametrize("ranks", [2, 3])
def test_examples_scored_in_parts_are_those_scored_at_once(ranks: int) -> None:
    model, encoded = tiny(CLASSES), random_documents([9, 3, 4])
    how: dict[str, Any] = {
        "batch_size": 2,
        "device": "cpu",
        "padding": Padding.of(byte_tokenizer(), model, CLASSES),
        "other": tiny(CLASSES, seed=1),
    }
    parts = even_parts(*example_rows(encoded), ranks)
    found = [score_examples(model, [encoded[at] for at in part], CLASSES, **how) for part in parts]
    whole, joined = score_examples(model, encoded, CLASSES, **how), put_together(parts, found)
    assert joined.digest.tolist() == whole.digest.tolist()
    same(joined.columns, whole.columns)
    assert joined.drift is not None
    assert whole.drift is not None
    same(dataclasses.asdict(joined.drift), dataclasses.asdict(whole.drift))


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Assert that columns are equal: counts and names exactly, other numbers within 1e-5."""
    assert list(found) == list(wanted)
    for name, column in wanted.items():
        assert found[name].dtype == column.dtype, name
        if column.dtype.kind == "f":
            assert found[name] == pytest.approx(column, rel=1e-5, abs=1e-9), name
        else:
            assert found[name].tolist() == column.tolist(), name


# -- two ranks ------------------------------------------------------------------------------------

PROGRAM = f"""
import runpy
runpy.run_path({str(PROJECT / "tests/programs/scoring_ranks.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left what they found."""
    folder = tmp_path_factory.mktemp("scoring")
    args = (str(folder), str(folder / "found.json"))
    for code, output, errors in forked_ranks(folder, *args, code=PROGRAM):
        assert code == 0, output + errors
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    what: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return what


@pytest.mark.parametrize("what", ["texts", "classes"])
def test_two_ranks_score_what_one_process_does(
    what: str, folder: Path, found: dict[str, Any]
) -> None:
    """With the drift from another model, and the documents in their order."""
    alone, ranks = (folder / what / f"{name}.jsonl" for name in ("alone", "ranks"))
    wanted = read_items(alone)
    # of 23 texts, two are there twice and one document each
    assert len(wanted["digest"]) == {"texts": 21, "classes": 23}[what]
    assert {"kl", "flips", "unquantized"} <= wanted.keys()
    same(read_items(ranks), wanted)
    ours, theirs = (np.load(each.with_suffix(".predictions.npy")) for each in (ranks, alone))
    assert ours.tolist() == theirs.tolist()
    assert [rank for rank, ns in found[what] if ns > 0] == [0, 1]


@pytest.mark.parametrize(
    ("case", "first", "other"),
    [
        (
            "refused by one",
            "UserError: model.path: has no such token (rank 1); give another",
            "UserError: model.path: has no such token; give another",
        ),
        ("failed at one", "StageFailed: rank 1: not finite", "StageFailed: not finite"),
        # no stage may pass over it: the run ends
        ("crashed at one", "RankLost: rank 1 failed: RuntimeError: boom", "RuntimeError: boom"),
        # the first one's caller may take it for a refusal, and goes on
        ("crashed at the first", "KeyError: 'x'", "StageFailed: rank 0 failed: KeyError: 'x'"),
        (
            "refused by all",
            "UserError: data: empty 0; fill it",
            "UserError: data: empty 0 (rank 0); fill it",
        ),
        ("none", "[None, None]", "[None, None]"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(
    case: str, first: str, other: str, found: dict[str, Any]
) -> None:
    assert found[case] == [first, other]


def test_two_ranks_smooth_as_one_process_does(found: dict[str, Any]) -> None:
    """Each looks at its part of seven documents; a maximum of maxima is exact."""
    assert found["smoothed"] < 1e-6


def test_what_the_first_rank_refuses_before_it_looks_is_no_wait_for_others(
    found: dict[str, Any],
) -> None:
    refused = "UserError: stages.small.format: not here; another"
    said = "UserError: stages.small.format: not here (rank 0); another"
    assert found["refused before"] == [refused, said]


def test_ranks_leave_their_times_and_wait_not_for_the_first(found: dict[str, Any]) -> None:
    assert found["times left"] == [
        "rank 1: the loss is no number",
        [{"forward": 20}, {"forward": 21}],
    ]


# -- a run ----------------------------------------------------------------------------------------

SMALL = [
    "tracking.charts=false",
    *("recipe=baseline", "hardware.device=cpu", "precision=fp32"),
    *("training.batch_size=4", "training.steps=2", "training.sequence_length=32"),
    *("data.max_documents=60", "quality.max_documents=8", "quality.batch_size=2"),
    *("quality.bootstrap=200", "tracking.mlflow=false", "serving.blocks=4", "serving.batches=[1]"),
    *("serving.load.prompt=16", "serving.load.new=2", "serving.load.batch=1"),
    *("model.shape.hidden_size=64", "model.shape.layers=1", "model.shape.heads=1"),
]
TWO_HOSTS = """
import os, runpy, socket
host = f"host-{os.environ['RANK']}"
socket.gethostname = lambda: host
"""
RUN = 'runpy.run_module("pipeline", run_name="__main__", alter_sys=True)\n'
CRASHES = """
from pipeline.evaluation.quality import assess
def crash(*args, **more):
    raise RuntimeError("boom")
if os.environ["RANK"] == "1":
    assess.score_causal = crash
"""


def result_in(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "mlruns/latest/result.json").read_text())
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two hosts made and assessed a model."""
    root = tmp_path_factory.mktemp("run")
    for code, output, errors in forked_ranks(root, *SMALL, code=TWO_HOSTS + RUN):
        assert code == 0, output + errors
    return root


def test_an_assessment_by_two_hosts_is_booked_by_each_ones_clock(root: Path) -> None:
    result = result_in(root)
    assert "please report" not in json.dumps(result)
    [row] = result["rows"]
    ledger = row["ledger"]
    assert ledger["meter_problems"] == []
    hours = {
        name: each["value"] for name, each in ledger["device_hours"].items() if "value" in each
    }
    for name, part in (("ranks", "work"), ("assess_ranks", "assess")):
        assert [each["host"] for each in ledger[name]] == ["host-0", "host-1"]
        for each in ledger[name]:
            own_h = sum(each["phases_ns"].values()) / 3.6e12
            assert 0 < own_h <= hours[part] / 2  # of two hosts
    assert all(each["local_ns"] == each["phases_ns"]["eval"] > 0 for each in ledger["assess_ranks"])
    assert hours["attached"] == pytest.approx(hours["work"] + hours["assess"])
    # What the second host does not account for, it waited.
    told = (
        sum(sum(ledger[name][1]["phases_ns"].values()) for name in ("ranks", "assess_ranks"))
        / 3.6e12
    )
    waited = hours["attached"] / 2 - told
    assert ledger["device_hours"]["wasted_by"]["idle_rank"]["value"] == pytest.approx(waited)


def test_a_rank_that_fails_alone_ends_all_in_one_line(root: Path) -> None:
    """The model is there; only the assessment is done anew."""
    code = TWO_HOSTS + CRASHES + RUN
    first, other = forked_ranks(root, *SMALL, "quality.stride=16", code=code)
    assert first[0] == other[0] == 1
    assert said(first[2]) == ["failed: stage baseline: rank 1 failed: RuntimeError: boom"]
    results = [json.loads(path.read_text()) for path in root.glob("mlruns/runs/*/result.json")]
    [result] = [each for each in results if each["status"] != "FINISHED"]
    assert [row["status"] for row in result["rows"]] == ["FAILED"]
    assert result["rows"][0]["ledger"]["device_hours"]["retry"]["value"] > 0


def said(errors: str) -> list[str]:
    """Return what a rank said itself: torch's own lines begin with a bracket."""
    return [line for line in errors.splitlines() if not line.startswith("[")]


@pytest.mark.slow
def test_a_smoothed_model_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    """A whole run of each: the model that both start from is the same, as nothing trains it."""
    recipe = """
defaults:
  - /stage@stages.reference: train
  - /stage@stages.small: quantize
stages:
  reference: {model: base, steps: 0}
  small: {model: reference, format: int8_dynamic, smoothing: 0.5, calibration_documents: 9}
primary_arm: small
allow_no_speedup: true
compare:
  - {arm: small, base: reference, on: [quality]}
"""
    made: list[Any] = []
    for size in (1, 2):
        root = tmp_path / str(size)
        (root / "own").mkdir(parents=True)
        (root / "own/smoothing.yaml").write_text(recipe)
        settings = ["--recipe-dir", "own", "recipe=smoothing", *SMALL[2:]]
        for code, output, errors in forked_ranks(root, *settings, code=TWO_HOSTS + RUN, size=size):
            assert code == 0, output + errors
        result = result_in(root)
        assert "please report" not in json.dumps(result)
        made += [row for row in result["rows"] if row["arm"] == "small"]
    alone, ours = made
    assert ours["artifact"]["digest"] == alone["artifact"]["digest"]
    assert [each["phases_ns"]["calibrate"] > 0 for each in ours["ledger"]["ranks"]] == [True, True]
    value = lambda row: row["quality"]["bits_per_byte"]["value"]
    assert value(ours) == pytest.approx(value(alone), rel=1e-5)
