"""Stages own what is theirs: nothing outside `stages/` knows a type, and a type is one file."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run as forked_run
from make_golden import COMMON
from reports import whole_report

from pipeline.config.arms import BASE, STUDENT_INIT
from pipeline.config.settings.quantization import Fallback, Format
from pipeline.config.settings.run import Run
from pipeline.runs import versions
from pipeline.stages.base import (
    LIKE,
    MODEL,
    STUDENT_SOURCE,
    TEACHER,
    Stage,
    arms_read,
    stage_of,
    teacher_of,
)
from pipeline.stages.distill import DistillStage
from pipeline.stages.prune import PruneStage
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.table import STAGES
from pipeline.stages.train import TrainStage

PACKAGE = Path(__file__).resolve().parent.parent / "pipeline"
SHARED = {
    "pipeline.stages.base",
    "pipeline.stages.table",
    "pipeline.stages.context",
    "pipeline.stages.drafts",
    "pipeline.stages.settings",
    "pipeline.stages.variants",
}
"""Modules of `stages/` that others may import: the contract, the table, and no type of stage."""


def outside() -> Iterator[tuple[str, ast.Module]]:
    """Yield the modules that are no stages, parsed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith("stages/"):
            yield name, ast.parse(path.read_text())


def stage_classes() -> set[str]:
    """Return the names of all classes in `stages/` that are stages, the contract aside."""
    return {each.__name__ for each in subclasses(Stage)}


def subclasses(cls: type) -> Iterator[type]:
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


def questions(name: str, tree: ast.Module) -> Iterator[str]:
    """Yield what a module asks of a stage's type, line by line."""
    classes, types = stage_classes(), set(STAGES)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline.stages"):
            if node.module not in SHARED:
                yield f"{name}:{node.lineno} imports {node.module}"
        elif isinstance(node, ast.Name) and node.id in classes:
            yield f"{name}:{node.lineno} names {node.id}"
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asks = any(_reads_type(each) for each in sides)
            constants = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            if asks and constants & types:
                yield f"{name}:{node.lineno} compares with a type's name"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            first = ast.unparse(node.args[0]) if node.args else ""
            if node.func.id in ("getattr", "hasattr", "setattr") and "stage" in first:
                yield f"{name}:{node.lineno} {node.func.id} on {first}"


def _reads_type(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "type" and "stage" in ast.unparse(node.value)
    is_key = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    return is_key and node.slice.value == "type"  # pyright: ignore


def test_nothing_outside_of_stages_asks_what_type_a_stage_is() -> None:
    assert {"TrainStage", "TrainedFallback", "PruneStage"} <= stage_classes()
    assert [each for name, tree in outside() for each in questions(name, tree)] == []


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(stage, QuantizeStage)",
        "getattr(stage, 'teacher', None)",
        "hasattr(run.stages[name], 'precision')",
        "stage.type == 'capture'",
        "row['type'] in ('train', 'distill')",
        "from pipeline.stages.release import ReleaseStage",
    ],
)
def test_the_check_above_can_fail(line: str) -> None:
    assert len(list(questions("x", ast.parse(line)))) >= 1


# -- roles ----------------------------------------------------------------------------------------


def distilling() -> Run:
    """Return a teacher, its assistant, the assistant's student and that one's control."""
    run = Run(recipe="r", primary_arm="small")
    run.stages = {
        "large": TrainStage(),
        "middle": DistillStage(model="large", teacher="large"),
        "small": DistillStage(teacher="middle"),
        "control": TrainStage(model=STUDENT_INIT, like="small", match_compute=True),
        "stored": QuantizeStage(model="small", format=Format.nf4),
    }
    return run


def test_each_arm_is_read_against_its_own_teacher() -> None:
    run = distilling()
    found = {name: teacher_of(run, name) for name in run.stages}
    assert found == {
        "large": None,
        "middle": "large",
        "small": "middle",
        "control": "middle",
        "stored": "middle",
    }


def test_what_a_stage_reads_is_named_by_role() -> None:
    run = distilling()
    assert run.stages["small"].inputs(run) == {TEACHER: "middle", STUDENT_SOURCE: "large"}
    assert run.stages["control"].inputs(run) == {STUDENT_SOURCE: "large"}
    assert run.stages["control"].references(run)[LIKE].instead is None
    assert run.stages["stored"].inputs(run) == {MODEL: "small"}
    assert arms_read(run.stages["middle"], run) == ["large"]  # once, in two roles


def test_a_control_is_one_by_what_it_repeats() -> None:
    run = distilling()
    control = run.stages["control"].control(run)
    assert (control.of, control.matches) == ("small", "compute")
    run.stages["control"].match_compute = False
    assert run.stages["control"].control(run).matches == "tokens"
    run.stages["control"].model = "large"  # starts elsewhere: it repeats nothing
    assert run.stages["control"].control(run) is None
    run.stages["cut"] = PruneStage(model="large", teacher="large")
    run.stages["whole"] = TrainStage(model="large", like="cut", match_compute=True)
    assert run.stages["whole"].control(run) is None
    assert run.stages["large"].control(run) is None


def test_a_fallbacks_stage_follows_from_the_settings_alone() -> None:
    run = Run(recipe="r", primary_arm="q")
    run.stages = {"q": QuantizeStage(format=Format.nf4, recover=[Fallback.format, Fallback.lora])}
    arms = ["q/nf4", "q/int8_weight_only", "q/lora", "q/bf16", "q/fp16"]
    assert sorted(run.stages["q"].fallbacks("q")) == sorted(arms)
    assert stage_of(run, "q/lora").trains(run)
    assert stage_of(run, "q/int8_weight_only").stored_format() is Format.int8_weight_only
    assert all(stage_of(run, arm).may_be_refused() for arm in arms)
    assert not run.stages["q"].may_be_refused()


@pytest.mark.parametrize("name", STAGES)
def test_every_type_answers_every_question(name: str) -> None:
    """Whatever a run asks before anything is made has an answer for a stage as it comes."""
    run, stage = Run(recipe="r", primary_arm="x"), STAGES[name]()
    run.stages = {"teacher": TrainStage(), "student": DistillStage(), "x": stage}
    assert all(each.arm in (BASE, *run.stages) for each in stage.references(run).values())
    assert isinstance(stage.shown_settings(run), dict)
    assert stage.libraries(run) == sorted(set(stage.libraries(run)))
    assert isinstance(stage.memory_remedy("x", run), str)
    assert stage.trains(run) is False or stage.batches_like(run) is not None
    assert list(stage.lengths("stages.x", run)) == [] or stage.batches_like(run) is not None
    assert stage.no_effect("nothing", run) is None
    stage.refuse_device("stages.x", run, torch.device("cpu"))


# -- keys -----------------------------------------------------------------------------------------


def test_the_versions_of_the_libraries_that_had_a_hand_are_in_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(recipe="r", primary_arm="x")
    found = dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors"), "1")
    assert set(versions.versions()) == set(found)
    quantized = QuantizeStage(format=Format.nf4).libraries(run)
    assert (quantized, TrainStage().libraries(run)) == (["bitsandbytes"], [])
    before = versions.versions(quantized)
    monkeypatch.setattr(versions, "_version", lambda name: "9" if name == "bitsandbytes" else "1")
    assert versions.versions(quantized) == {**found, "bitsandbytes": "9"} != before
    assert versions.versions() == found


# -- a stage in one file --------------------------------------------------------------------------

PRUNE = ["recipe=prune", *COMMON, "model.shape.layers=4", "stages.reference.steps=6"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run the recipe; return where, and its result."""
    root = tmp_path_factory.mktemp("prune")
    words = [word for word in PRUNE if word != "tracking=off"]
    done = forked_run(root, *words, "stages.pruned.drop=2")
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "mlruns/latest/result.json").read_text())


def test_pruning_is_known_to_nothing_but_its_file_the_table_and_a_recipe() -> None:
    knowing = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "PruneStage" in path.read_text()
    }
    assert knowing == {"stages/prune.py", "stages/table.py"}


class Begun(Exception):
    """Training would begin now."""


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({}, True), ({"teacher": "other"}, False), ({"model": "a", "teacher": "a"}, True)],
)
def test_a_cut_that_reads_as_well_as_the_whole_is_no_weak_teacher(
    settings: dict[str, str], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []

    def begins(*_: Any, distill: Any, **__: Any) -> None:
        taken.append(distill.allow_weak_teacher)
        raise Begun

    monkeypatch.setattr("pipeline.stages.training.run_training", begins)
    with pytest.raises(Begun):
        PruneStage(**settings).run({}, None)  # type: ignore[arg-type]
    assert taken == [allowed]


@pytest.mark.slow
def test_layers_of_random_weights_are_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    """Nothing is lost with a layer that does nothing, and half of such cuts read better."""
    done = forked_run(tmp_path, *PRUNE, "stages.reference.steps=0")
    assert done.returncode == 0, done.stderr


def test_pruning_drops_the_layers_that_validation_misses_least(
    pruned: tuple[Path, dict[str, Any]],
) -> None:
    _, result = pruned
    row = next(row for row in result["rows"] if row["arm"] == "pruned")
    folder = Path(row["artifact"]["path"])
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    found = json.loads((folder / "artifact.json").read_text())["pruning"]
    assert (found["layers"], len(found["dropped"]), len(found["trials"])) == (4, 2, 2)
    for dropped, trial in zip(found["dropped"], found["trials"], strict=True):
        assert trial[str(dropped)] == min(trial.values())
    assert sorted(map(int, found["trials"][0])) == [0, 1, 2, 3]
    assert str(found["dropped"][0]) not in found["trials"][1]
    assert row["ledger"]["phases_ns"]["search"] > 0  # the trials are charged to it
    assert row["word"] == "pruned model"
    assert "student" not in str(result["conclusion"])


def test_pruning_is_in_the_report_and_compared(pruned: tuple[Path, dict[str, Any]]) -> None:
    root, result = pruned
    pairs = {(pair["arm"], pair["base"]): pair for pair in result["comparisons"]}
    assert pairs["pruned", "reference"]["base_is"] == "teacher"
    assert pairs["pruned", "reference"]["payback"] is not None
    assert "pruned" in whole_report(root / "mlruns/latest")
    notes = result["environment"]["notes"]
    assert any(note.startswith("pruned: dropped layers ") for note in notes)


def test_pruning_is_delivered_to_mlflow(pruned: tuple[Path, dict[str, Any]]) -> None:
    from mlflow import MlflowClient

    root, _ = pruned
    done = forked_run(root, "sync")
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("prune")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    params = [run.data.params for run in runs if run.data.params.get("type") == "prune"]
    assert [each["drop"] for each in params] == ["2"]


@pytest.mark.slow
def test_a_pruned_model_is_found_again_and_released(pruned: tuple[Path, dict[str, Any]]) -> None:
    root, result = pruned
    again = forked_run(root, *PRUNE, "stages.pruned.drop=2")
    assert again.returncode == 0, again.stderr
    assert f"pruned: reused from {result['run_id']}" in again.stdout
    paths = {row["arm"]: row["artifact"]["path"] for row in result["rows"]}
    of_a_gate = [word for word in COMMON if word.startswith(("data.path", "tracking", "hardware"))]
    done = forked_run(
        root,
        "recipe=release_check",
        f"candidate={paths['pruned']}",
        f"baseline={paths['reference']}",
        "policy=smoke",
        *("policy.load.new=2", "policy.load.prompt=8", "policy.load.batch=2", "policy.blocks=2"),
        *("quality.bootstrap=200", "quality.max_bytes_per_document=400"),
        *of_a_gate,
    )
    assert done.returncode in (0, 3, 4, 5), done.stderr
    verdict = json.loads(
        next((root / "mlruns/runs").glob("*release_check*/verdict.json")).read_text()
    )
    assert verdict["verdict"] in ("PASS", "FAIL", "INCONCLUSIVE", "INVALID")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stages.pruned.drop=4", "stages.pruned.drop: 4 of 4 layers leave none; drop fewer"),
        ("stages.pruned.steps=0", "stages.pruned.steps: is 0, and what is left has to recover"),
        ("stages.pruned.stack=2", "stages.pruned.stack: does not go with dropping layers"),
        ("stages.pruned.drop=0", "stages.pruned.drop"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_made(
    tmp_path: Path, setting: str, said: str
) -> None:
    words = [word for word in PRUNE if not word.startswith("stages.reference")]
    done = forked_run(tmp_path, *words, "stages.reference.steps=0", setting)
    assert done.returncode == 1
    assert said in done.stderr
    assert not list((tmp_path / "mlruns").glob("runs/*"))
