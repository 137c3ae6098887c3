"""Which model drafts for which, and what serving with a draft gives."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capturing import Capturing
from here import here, result_in
from make_assess_models import byte_tokenizer, random_documents, saved, tiny
from reports import whole_report
from test_speculative import SMALL, noisy
from tokenizers import AddedToken

from pipeline.config.arms import Draft
from pipeline.config.settings.run import Comparison, Measure, Run
from pipeline.config.settings.serving import Decode, ServingConfig, ServingLoad
from pipeline.errors import UserError
from pipeline.evaluation.serving import drafting, fastest
from pipeline.evaluation.serving.drafting import FIGURES, Drafted, draft_pass
from pipeline.evaluation.serving.measure import ServePass
from pipeline.evaluation.serving.speculative import GrowingReader, Speculative
from pipeline.ledger.devices import table
from pipeline.ledger.metrics import BY_KEY
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import save_model
from pipeline.runs.keys import serving_key
from pipeline.stages.capture import CaptureStage
from pipeline.stages.distill import DistillStage
from pipeline.stages.drafts import draft_of
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task

PROMPTS = [document.input_ids for document in random_documents([40, 60])]
LOAD = ServingLoad(prompt=9, new=11, batch=2)
DRAFT = Draft("small", "big", 3)


# -- which model drafts ---------------------------------------------------------------------------


def run_of(draft: str | None = "student", **stages: Any) -> Run:
    """Return a recipe in which an arm called `tutor` teaches one called `pupil`."""
    usual = {
        "tutor": TrainStage(model="base"),
        "pupil": DistillStage(model="student_init", teacher="tutor"),
        "small": QuantizeStage(model="pupil"),
        "student": TrainStage(model="student_init", like="pupil"),  # a control, whatever its name
    }
    pair = Comparison(arm="pupil", base="tutor", on=[Measure.quality, Measure.serving])
    serving = ServingConfig(draft=draft, draft_tokens=5)
    return Run(stages={**usual, **stages}, compare=[pair], serving=serving)


@pytest.mark.parametrize(
    ("value", "arm"), [("student", "pupil"), ("pupil", "pupil"), ("small", "small")]
)
def test_a_draft_is_found_by_its_role(value: str, arm: str) -> None:
    assert draft_of(run_of(value)) == Draft(arm, "tutor", 5)


def test_nothing_is_drafted_unless_asked_for() -> None:
    assert draft_of(run_of(None)) is None


def test_a_cache_of_predictions_is_no_student() -> None:
    capture = CaptureStage(teacher="tutor", like="pupil")
    assert draft_of(run_of(capture=capture)) == Draft("pupil", "tutor", 5)


def test_a_name_decides_between_two_students() -> None:
    other = DistillStage(model="student_init", teacher="tutor")
    assert draft_of(run_of("other", other=other)) == Draft("other", "tutor", 5)
    assert draft_of(run_of(student=other, pupil=other)) == Draft("student", "tutor", 5)


def classes(run: Run) -> Run:
    return dataclasses.replace(run, task=Task.sequence_classification)


OTHER = DistillStage(model="student_init", teacher="tutor")
BY_BASE = DistillStage(model="student_init", teacher="base")


@pytest.mark.parametrize(
    ("run", "problem", "remedy"),
    [
        (classes(run_of()), "a classifier generates nothing", "leave it out"),
        (run_of("nobody"), "'nobody' is no arm of this recipe", "give student, e.g. pupil"),
        (run_of("tutor"), "tutor learns from no teacher", "an arm that is distilled"),
        (run_of(pupil=BY_BASE), "the given model itself", "a train stage of 0 steps"),
        (
            dataclasses.replace(run_of(), compare=[]),
            "does not compare tutor, the teacher of pupil, on serving",
            "{arm: pupil, base: tutor, on: [serving]}",
        ),
    ],
)
def test_what_cannot_draft_is_refused(run: Run, problem: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        draft_of(run)
    assert caught.value.key == "serving.draft"
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy


def test_several_students_are_told_apart_by_name() -> None:
    run = run_of(other=OTHER)
    del run.stages["student"]
    with pytest.raises(UserError, match="several arms learn from a teacher") as caught:
        draft_of(run)
    assert caught.value.remedy == "name an arm, e.g. pupil, other"
    run.stages = {"tutor": run.stages["tutor"]}
    with pytest.raises(UserError, match="no arm of this recipe learns from a teacher"):
        draft_of(run)


# -- what it gives --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    big = tiny(Task.causal_lm)
    with torch.no_grad():
        small = noisy(big, 0.3)
    return {
        "big": saved(big, tmp_path_factory.mktemp("big")),
        "small": saved(small, tmp_path_factory.mktemp("small")),
    }


def drafted(
    folders: dict[str, Path], draft: Draft = DRAFT, clock: PhaseClock | None = None, **more: Any
) -> Drafted:
    return draft_pass(
        draft,
        folders,
        task=Task.causal_lm,
        prompts=PROMPTS,
        config=ServingConfig(**{"load": LOAD, **more}),
        device=torch.device("cpu"),
        devices=2,
        clock=clock or PhaseClock(),
    )


def test_serving_with_a_draft_has_its_figures(folders: dict[str, Path]) -> None:
    clock = PhaseClock()
    found = drafted(folders, clock=clock)
    assert set(found.figures) == set(FIGURES)
    assert all(f"serving/{name}" in BY_KEY for name in FIGURES)
    value = {name: figure["value"] or 0.0 for name, figure in found.figures.items()}
    assert 0 < value["draft_acceptance"] < 1
    assert 1 < value["draft_tokens_per_pass"] < 4
    assert value["draft_equal_share"] == 1
    assert value["drafted_device_s_per_1k_units"] > 0
    assert found.record["how"] == found.record["how_without"] == "dynamic cache"
    (line,) = found.record["said"]
    assert line.startswith("big with small as its draft, 3 tokens ahead, one sequence at a time (")
    assert "its text is that of big alone on 8 of 8 prompts" in line
    assert set(clock.read_ns()) == {"model_load", "generate", "other"}


class Paid:
    """A clock that only models move: 10 ms a pass of the big one, 1 ms of the small one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ns = 0
        load = drafting.load

        def loaded(folder: Path, *given: Any, **more: Any) -> Any:
            server = load(folder, *given, **more)
            cost = 10_000_000 if "big" in folder.name else 1_000_000
            forward = server.model.forward

            def paid(*args: Any, **kwargs: Any) -> Any:
                self.ns += cost
                return forward(*args, **kwargs)

            server.model.forward = paid
            return server

        patch.setattr(drafting, "load", loaded)

    def __call__(self) -> int:
        return self.ns


def test_seconds_and_saving_by_hand(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft that is the model: of 11 tokens, 10 in rounds of 3 + 1, 3 + 1 and 1 + 1."""
    paid = Paid(monkeypatch)
    same = {"big": folders["big"], "small": folders["big"].parent / "small"}
    saved(tiny(Task.causal_lm), same["small"])
    found = drafted(same, clock=PhaseClock(paid))
    figures = {name: figure["value"] for name, figure in found.figures.items()}
    with_s, without_s = (1 + 3) * 0.010 + (1 + 3 + 3 + 1) * 0.001, 11 * 0.010
    assert figures == {
        "draft_acceptance": 1.0,
        "draft_tokens_per_pass": pytest.approx(10 / 3),
        "drafted_device_s_per_1k_units": pytest.approx(with_s * 2 * 1000 / 11),
        "undrafted_device_s_per_1k_units": pytest.approx(without_s * 2 * 1000 / 11),
        "draft_saving": pytest.approx(1 - with_s / without_s),
        "draft_equal_share": 1.0,
    }
    assert found.record["saving"] == pytest.approx([1 - with_s / without_s] * 3)


def test_a_text_that_is_not_the_models_own_is_told(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = Speculative.write, []

    def once_wrong(self: Speculative, prompt: torch.Tensor, new: int) -> Any:
        written = plain(self, prompt, new)
        if not any(torch.equal(prompt, each) for each in seen):
            seen.append(prompt)
        if torch.equal(prompt, seen[0]):
            written.tokens[0, -1] += 1
        return written

    monkeypatch.setattr(Speculative, "write", once_wrong)
    found = drafted(folders)
    assert found.figures["draft_equal_share"]["value"] == 7 / 8
    assert (
        "big alone on 7 of 8 prompts, elsewhere a pass over several tokens rounds"
        in (found.record["said"][0])
    )


def test_on_a_device_with_graphs_both_are_captured(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_opened", {"cpu": Capturing})
    found = drafted(folders, decode=Decode.graph)
    assert found.record["how"] == found.record["how_without"] == "static cache, CUDA graph"
    assert found.figures["draft_equal_share"]["value"] == 1
    grown = drafted(folders, decode=Decode.dynamic)
    assert grown.record["how"] == "dynamic cache"
    assert found.figures["draft_acceptance"] == grown.figures["draft_acceptance"]


@pytest.mark.slow
def test_with_a_draft_passes_run_as_the_fastest_way_without_does(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_opened", {"cpu": Capturing})
    # a clock on which compiled and captured steps are free
    monkeypatch.setattr(fastest, "_race", lambda *_: (1.0, 0.5))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = drafted(folders, decode=Decode.auto)
    assert found.record["how_without"] == "static cache, compiled (1 graph), CUDA graph"
    assert found.record["how"] == (
        "static cache, compiled (1 graph), CUDA graph with a draft in static cache, compiled (2"
        " graphs), CUDA graph"
    )
    assert found.figures["draft_equal_share"]["value"] == 1
    assert found.record["said"][1].startswith("big alone: serving.decode=auto took compile")


def test_a_draft_with_another_tokenizer_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("twenty")])
    save_model(tiny(Task.causal_lm, shape=SMALL), tokenizer, tmp_path / "small")
    found = drafted({**folders, "small": tmp_path / "small"})
    assert {figure["value"] for figure in found.figures.values()} == {None}
    (why,) = {figure["why_missing"] for figure in found.figures.values()}
    assert why == (
        "small has another tokenizer, so that what it drafts is other text: draft with a model that"
        " has the tokenizer of big"
    )
    assert found.record["said"] == [f"big was not served with small as its draft: {why}"]


def test_what_leaves_nothing_to_draft_or_does_not_fit_is_null(folders: dict[str, Path]) -> None:
    one = drafted(folders, load=ServingLoad(prompt=9, new=1, batch=2))
    assert one.record["why"] == "one new token is prefill"
    two = drafted(folders, load=ServingLoad(prompt=9, new=2, batch=2))
    assert two.figures["draft_acceptance"]["why_missing"] == "two new tokens leave none to draft"
    assert two.figures["draft_tokens_per_pass"]["value"] == 1
    long = drafted(folders, load=ServingLoad(prompt=2040, new=30, batch=2))
    assert long.record["why"] == "small has 2048 positions, prompt and answer are 2070 tokens"


def test_a_model_that_cannot_be_verified_is_null_with_its_reason(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError("this cache cannot be cut")

    monkeypatch.setattr(GrowingReader, "cut", refuse)
    found = drafted(folders)
    assert found.record["why"] == (
        "serving with a draft could not be measured (NotImplementedError: this cache cannot be cut)"
    )


def test_a_record_is_read_back(folders: dict[str, Path]) -> None:
    record = json.loads(json.dumps(drafted(folders).record))
    served = ServePass({}, {}, {}, draft=record)
    assert ServePass.from_json(json.loads(json.dumps(served.to_json()))).draft == record
    older = {**served.to_json()}
    del older["draft"]  # of a release before there were drafts
    assert ServePass.from_json(older).draft is None


def test_a_pass_without_a_draft_keeps_the_key_it_had() -> None:
    def key(**serving: Any) -> str:
        run = Run(serving=ServingConfig(**serving))
        data = SimpleNamespace(digest="d")
        session: Any = SimpleNamespace(
            gate=None, run=run, data=data, device=torch.device("cpu"), devices=1
        )
        return serving_key(session, [], {}, Decode.dynamic)

    assert key() == key(draft_tokens=9)
    assert len({key(), key(draft="student"), key(draft="student", draft_tokens=9)}) == 3


# -- a run ----------------------------------------------------------------------------------------

TINY = [
    "tracking.charts=false",
    *("recipe=distill", "~stages.control_steps", "~stages.control_compute"),
    "compare=[{arm: student, base: teacher, on: [quality, serving]}]",
    *("tracking.mlflow=false", "stages.teacher.steps=2", "training.steps=2"),
    *("training.batch_size=4", "training.sequence_length=64", "training.eval_every=2"),
    *("data.max_documents=30", "data.vocabulary_size=300", "model.shape.hidden_size=64"),
    *("model.shape.layers=2", "model.shape.heads=1", "model.shape.intermediate_size=64"),
    *("quality.max_documents=5", "quality.bootstrap=200", "serving.batches=[]"),
    *("serving.blocks=2", "serving.load.new=6", "serving.load.prompt=8", "serving.dtype=fp32"),
]


@pytest.mark.slow
def test_a_run_shows_what_a_draft_saves(tmp_path: Path) -> None:
    done = here(tmp_path, *TINY, "serving.draft=student", "serving.draft_tokens=2")
    assert done.returncode == 0, done.stderr
    result, report = result_in(tmp_path), whole_report(tmp_path / "mlruns/latest")
    rows = {row["arm"]: row["serving"] for row in result["rows"]}
    assert rows["teacher"]["draft_equal_share"]["value"] == 1
    assert rows["teacher"]["drafted_device_s_per_1k_units"]["provenance"] == "derived"
    assert not any("draft" in name for name in rows["student"])
    (note,) = [line for line in report.splitlines() if "as its draft" in line]
    assert note.startswith("- serving: teacher with student as its draft, 2 tokens ahead")
    assert "with a draft" in report


def test_a_draft_that_no_recipe_has_is_refused_before_any_work(tmp_path: Path) -> None:
    done = here(tmp_path, "recipe=quantize", "serving.draft=student")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1)
    assert "serving.draft: no arm of this recipe learns from a teacher; leave it out" in done.stderr
    assert not (tmp_path / "mlruns" / "runs").exists()
