"""Hidden states drawn to a teacher's: the definition by float64 autograd, positions, layer maps,
resuming, refusals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from here import here, result_in
from make_assess_models import tiny
from test_distill_cached import TINY
from test_training_loop import CPU, batches_for, run, settings

from pipeline.cli.main import main
from pipeline.config.settings.model import TinyShape
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.data.batches import IGNORE
from pipeline.distillation.hidden import HiddenSignal, WithProjections, layer_pairs
from pipeline.distillation.losses import Loss
from pipeline.errors import UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import load_model
from pipeline.models.student import choose_layers
from pipeline.stages.distill import DistillStage
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective, Teacher
from pipeline.training.reading import Apart, Examined, document_mask
from pipeline.training.selfcheck import gradient_share

WIDE = TinyShape(hidden_size=128, layers=4, heads=2, intermediate_size=128)
KEY = "stages.student.layer_map"
DISTIL = [arg.replace("distill_cached", "distill") for arg in TINY]


def objective_for(
    task: Task,
    *,
    weight: float = 0.7,
    ce_weight: float = 0.3,
    double: bool = False,
    masked: bool = False,
    pairs: Any = None,
) -> Objective:
    model, teacher = tiny(task), tiny(task, seed=1, shape=WIDE).eval()
    torch.manual_seed(5)
    signal = HiddenSignal(pairs or layer_pairs(None, 2, 4, KEY), (64, 128), weight)
    if double:
        model, teacher, signal = model.double(), teacher.double(), signal.double()
    read = Examined(apart=Apart.mask if masked else Apart.positions)
    taught = Teacher(teacher, Precision.fp32, Loss(ce_weight), read)
    objective = Objective(model, task, Precision.fp32, CPU, PhaseClock(), taught, read=read)
    objective.hidden = signal
    return objective


def definition(objective: Objective, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """S by its definition, layer by layer and position by position."""
    assert objective.teacher is not None
    assert objective.hidden is not None
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if objective.task is Task.causal_lm:
        inputs |= {"attention_mask": document_mask(batch["position_ids"])}
    ours, theirs = (
        each.base_model(**inputs, output_hidden_states=True).hidden_states
        for each in (objective.model, objective.teacher.model)
    )
    parts = []
    for (student, teacher), projection in zip(
        objective.hidden.pairs, objective.hidden.projections, strict=True
    ):
        apart = (projection(ours[student + 1]) - theirs[teacher + 1].detach()).pow(2).mean(-1)
        if objective.task is Task.causal_lm:
            parts.append(apart[batch["labels"] != IGNORE].mean())
        else:
            rows = [
                row[mask == 1].mean()
                for row, mask in zip(apart, batch["attention_mask"], strict=True)
            ]
            parts.append(torch.stack(rows).mean())
    return torch.stack(parts).mean()


@pytest.mark.parametrize("task", list(Task))
def test_loss_and_gradients_are_the_definition(task: Task) -> None:
    objective = objective_for(task, double=True, masked=task is Task.causal_lm)
    assert objective.hidden is not None
    batch = batches_for(settings(), task).batch(0)
    trained = [*objective.model.parameters(), *objective.hidden.parameters()]
    done = objective(batch)
    found = torch.autograd.grad(done.loss, trained, allow_unused=True)
    signal, objective.hidden = objective.hidden, None
    without = objective(batch).loss
    objective.hidden = signal
    expected = without + 0.7 * definition(objective, batch)
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)
    assert done.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(done.drawn) == ["hidden"]
    assert done.drawn["hidden"].item() == pytest.approx((expected - without).item(), rel=1e-5)
    assert any(grad is not None for grad in found[-2:])
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_padding_and_other_documents_change_nothing() -> None:
    task = Task.sequence_classification
    objective, batch = objective_for(task), batches_for(settings(), task).batch(0)
    other = {
        **batch,
        "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 99),
    }
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    objective.model.config.pad_token_id = None if objective.model.config.pad_token_id is None else 0
    ours, theirs = objective(batch).drawn["hidden"], objective(other).drawn["hidden"]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_micro_batches_add_up_to_their_batch() -> None:
    objective, batch = objective_for(Task.causal_lm), batches_for(settings()).batch(0)
    whole = objective(batch)
    parts = [
        objective({name: tensor.chunk(2)[at] for name, tensor in batch.items()}) for at in (0, 1)
    ]
    summed = sum(part.drawn["hidden"].item() * part.count for part in parts)
    assert summed / whole.count == pytest.approx(whole.drawn["hidden"].item(), rel=1e-5)


def test_equal_widths_need_no_projection() -> None:
    signal = HiddenSignal([(0, 0)], (64, 64), 1.0)
    assert (list(signal.parameters()), signal.flops(10)) == ([], 0.0)
    mapped = HiddenSignal([(0, 0), (1, 3)], (64, 128), 1.0)
    assert mapped.flops(10) == 3 * 2 * 64 * 128 * 2 * 10
    state = (torch.ones(1, 2, 64), torch.full((1, 2, 64), 3.0))
    zero = (torch.zeros(1, 2, 64), torch.zeros(1, 2, 64))
    assert signal(state, zero, torch.tensor([[0.5, 0.5]])).item() == pytest.approx(9.0)


@pytest.mark.parametrize(("ours", "theirs"), [(2, 4), (3, 12), (4, 6), (4, 4), (6, 4), (1, 5)])
def test_layers_are_spread_as_they_are_copied(ours: int, theirs: int) -> None:
    pairs = layer_pairs(None, ours, theirs, KEY)
    assert [student for student, _ in pairs] == list(range(ours))
    assert pairs[-1][1] == theirs - 1
    if theirs % ours == 0:
        assert [teacher for _, teacher in pairs] == choose_layers(ours, theirs)


def test_layer_maps_that_are_named() -> None:
    assert layer_pairs("last", 2, 4, KEY) == [(1, 3)]
    assert layer_pairs([0, 2], 2, 4, KEY) == [(0, 0), (1, 2)]
    for spec in ([0], [0, 4], "first", [0, 1.5], [True, 1], 3):
        with pytest.raises(
            UserError, match=r"stages.student.layer_map: .* maps no 2 layers onto 4"
        ):
            layer_pairs(spec, 2, 4, KEY)


def test_the_share_of_the_gradient_counts_them() -> None:
    """By autograd over the parts alone."""
    objective = objective_for(Task.causal_lm, weight=0.7, ce_weight=0.3)
    batch = batches_for(settings()).batch(0)
    share = gradient_share(objective, batch)
    signal, loss = objective.hidden, objective.loss
    assert signal is not None
    assert loss is not None
    parameters = list(objective.model.parameters())
    norms = []
    for divergence, hidden in ((True, True), (False, False)):
        objective.loss, objective.hidden = Loss(0.0 if divergence else 1.0), None
        value = objective(batch).loss * (0.7 if divergence else 0.3)
        if hidden:
            objective.hidden = signal
            value = value + 0.7 * definition(objective, batch)
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        norms.append(torch.stack([each.norm() for each in grads if each is not None]).norm())
    assert share == pytest.approx((norms[0] / sum(norms)).item(), rel=1e-3)


def test_projections_train_with_the_student_and_resume_to_the_bit(tmp_path: Path) -> None:
    def trained(folder: Path, **hooks: Any) -> Any:
        torch.manual_seed(3)
        objective = objective_for(Task.causal_lm)
        assert objective.hidden is not None
        both = WithProjections(objective.model, objective.hidden)
        before = [each.detach().clone() for each in objective.hidden.parameters()]
        run(both, settings(checkpoint_every=2), folder, objective=objective, **hooks)
        assert not any(
            torch.equal(old, new)
            for old, new in zip(before, objective.hidden.parameters(), strict=True)
        )
        return both

    whole = trained(tmp_path / "whole")
    stops = iter([None, None, None, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", should_stop=lambda: next(stops))
    resumed = trained(tmp_path / "cut")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(
            ("task=sequence_classification", "data=stdlib_labels", "data.max_documents=60"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_recipe_draws_them_and_ships_the_student_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = [
        "stages.student.hidden_weight=2",
        "stages.student.allow_weak_teacher=true",
        "student.config={hidden_size: 128, head_dim: 64}",
    ]
    assert main([*DISTIL, *wanted, *more], started_ns=0) == 0, capsys.readouterr().err
    student = next(row for row in result_in(tmp_path)["rows"] if row["arm"] == "student")
    assert 0 < student["ledger"]["counts"]["distillation_share"]["value"] < 1
    task = Task.sequence_classification if more else Task.causal_lm
    model = load_model(student["artifact"]["path"], task)
    assert not [name for name in model.state_dict() if "projection" in name]
    curve = [
        event
        for event in (tmp_path / "mlruns/latest/journal.jsonl").read_text().splitlines()
        if '"hidden"' in event
    ]
    assert curve


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["student.layers=2"], "stages.student.layer_map: [0] maps no 2 layers onto 4; give last"),
        (["stages.student.model=base"], "stages.student.layer_map: [0] maps no 4 layers onto 4"),
        (["student.layers=2", "stages.student.layer_map=[0,9]"], "[0, 9] maps no 2 layers onto 4"),
    ],
)
def test_a_map_that_fits_no_such_layers_is_refused_before_anything_is_made(
    tmp_path: Path, more: list[str], said: str
) -> None:
    wanted = ["stages.student.hidden_weight=1", "stages.student.layer_map=[0]"]
    wanted = [*wanted, "model.shape.layers=4", *more]
    done = here(tmp_path, *DISTIL, *wanted)
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr
    assert not list((tmp_path / "mlruns").glob("runs/*"))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"layer_map": "last"}, "layer_map: has no effect without hidden_weight"),
        (
            {"hidden_weight": 1.0, "cache": "capture"},
            "hidden_weight: needs what a teacher computes inside",
        ),
        (
            {"hidden_weight": 1.0, "completions": __file__},
            "hidden_weight: needs what a teacher computes inside",
        ),
    ],
)
def test_settings_that_contradict_are_refused(stage: dict[str, Any], said: str) -> None:
    student = DistillStage(**stage)
    placed: dict[str, Any] = {"teacher": TrainStage(), "student": student}
    with pytest.raises(UserError, match=said):
        student.check("stages.student", Run(recipe="distill", stages=placed, primary_arm="student"))
