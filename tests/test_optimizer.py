"""Moments in 8 bits and master weights: against torch's AdamW and fp32, resumed to the bit, and
refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import tiny
from test_training_loop import CPU, run, same, settings, weights

from pipeline.config.settings.model import TinyShape
from pipeline.config.settings.parallel import Parallel
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import OptimizerKind, TrainingConfig
from pipeline.errors import Preempted, UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.stages.distill import DistillStage
from pipeline.stages.settings import check_training
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective
from pipeline.training.optimizer import MasterWeights, make_optimizer, set_rate, state_tensors

BITSANDBYTES, TORCHAO = OptimizerKind.adamw_8bit_bitsandbytes, OptimizerKind.adamw_8bit_torchao
# torchao compiles its step: half a minute
COMPILED = (
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),
)
KINDS = [BITSANDBYTES, pytest.param(TORCHAO, marks=COMPILED)]
# matrices above 4,096 elements
WIDE = TinyShape(hidden_size=128, layers=2, heads=2, intermediate_size=256)


def model(seed: int = 0) -> Any:
    return tiny(Task.causal_lm, seed=seed, shape=WIDE)


def bf16_pure(given: Any) -> Objective:
    return Objective(given, Task.causal_lm, Precision.bf16_pure, CPU, PhaseClock())


# -- moments in 8 bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bit_moments_follow_adamw_and_take_a_quarter(
    tmp_path: Path, kind: OptimizerKind
) -> None:
    """Ten steps end far closer to AdamW's weights than the start is, and the loss falls alike."""
    ends: dict[OptimizerKind, Any] = {}
    losses: dict[OptimizerKind, list[float]] = {}
    start = weights(model())
    for each in (OptimizerKind.adamw, kind):
        ends[each], said = model(), losses.setdefault(each, [])
        config = settings(steps=10, optimizer=each, learning_rate=3e-3)
        run(
            ends[each],
            config,
            tmp_path / each.value,
            points=lambda _, values, said=said: (
                said.append(values["loss"]) if "loss" in values else None
            ),
        )
    apart = moved = 0.0
    for name, tensor in weights(ends[kind]).items():
        apart += float((tensor - ends[OptimizerKind.adamw].state_dict()[name]).square().sum())
        moved += float((tensor - start[name]).square().sum())
    assert apart < 0.05 * moved
    assert losses[kind][-1] < losses[kind][0] - 0.3
    assert losses[kind][-1] == pytest.approx(losses[OptimizerKind.adamw][-1], rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_in_8_bits_is_a_quarter_of_adamws(kind: OptimizerKind) -> None:
    sizes: dict[OptimizerKind, int] = {}
    for each in (OptimizerKind.adamw, kind):
        given = torch.nn.Linear(512, 1024)
        optimizer = make_optimizer(list(given.parameters()), settings(optimizer=each), CPU)
        given(torch.ones(1, 512)).sum().backward()
        optimizer.step()
        # levels are shared by all tensors
        tensors = {t.data_ptr(): t for t in state_tensors(optimizer).values()}
        sizes[each] = sum(tensor.nbytes for tensor in tensors.values())
    assert 0.24 < sizes[kind] / sizes[OptimizerKind.adamw] < 0.28


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_in_8_bits_is_bit_equal(tmp_path: Path, kind: OptimizerKind) -> None:
    config = settings(optimizer=kind)
    whole = model()
    run(whole, config, tmp_path / "whole")
    asked = iter([None] * 2 + [Preempted] * 9)
    with pytest.raises(Preempted):
        run(model(), config, tmp_path / "cut", should_stop=lambda: next(asked))
    resumed = model(seed=99)
    torch.manual_seed(12345)
    run(resumed, config, tmp_path / "cut")
    same(weights(whole), weights(resumed))


def test_the_rate_is_set_where_it_is_a_number_and_where_it_is_a_tensor() -> None:
    kept = torch.tensor(1.0)
    optimizer = type("Optimizer", (), {"param_groups": [{"lr": 1.0}, {"lr": kept}]})()
    set_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[1]["lr"] is kept
    assert kept.item() == 0.25


# -- master weights -------------------------------------------------------------------------------


def test_the_model_is_in_bf16_while_it_trains_and_in_fp32_afterwards(tmp_path: Path) -> None:
    given, seen = model(), set[torch.dtype]()
    handle = given.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda layer, args, out: seen.update({layer.weight.dtype, args[0].dtype, out.dtype})
    )
    run(given, settings(), tmp_path, objective=bf16_pure(given))
    handle.remove()
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in given.state_dict().values()} == {torch.float32}
    assert given.lm_head.weight is given.model.embed_tokens.weight  # tied weights stay so
    rounded = {name: tensor.bfloat16().float() for name, tensor in given.state_dict().items()}
    assert any(
        not torch.equal(tensor, rounded[name]) for name, tensor in given.state_dict().items()
    )


def test_pure_bf16_trains_as_fp32_does_and_bf16_alone_would_not(tmp_path: Path) -> None:
    """Rates so small that a bf16 weight never moves: with master weights it goes where fp32's
    goes.
    """
    config = settings(steps=6, learning_rate=1e-5, weight_decay=0.0)
    start, fp32, pure = weights(model()), model(), model()
    run(fp32, config, tmp_path / "fp32")
    run(pure, config, tmp_path / "pure", objective=bf16_pure(pure))
    name = "model.layers.0.mlp.up_proj.weight"
    step = fp32.state_dict()[name] - start[name]
    own = pure.state_dict()[name] - start[name]
    assert float(torch.nn.functional.cosine_similarity(step.flatten(), own.flatten(), dim=0)) > 0.9
    alone = start[name].bfloat16()
    assert (
        torch.equal(alone + step.bfloat16(), alone)
        or float(((alone + step.bfloat16()) != alone).float().mean()) < 0.2
    )


def test_a_resumed_pure_bf16_training_is_bit_equal(tmp_path: Path) -> None:
    whole = model()
    run(whole, settings(), tmp_path / "whole", objective=bf16_pure(whole))
    asked, cut = iter([None] * 2 + [Preempted] * 9), model()
    with pytest.raises(Preempted):
        run(
            cut,
            settings(),
            tmp_path / "cut",
            objective=bf16_pure(cut),
            should_stop=lambda: next(asked),
        )
    resumed = model(seed=99)
    run(resumed, settings(), tmp_path / "cut", objective=bf16_pure(resumed))
    same(weights(whole), weights(resumed))


def test_micro_batches_add_up_in_fp32() -> None:
    """256 gradients of 1 and then one of 1/2: bf16 has no 256.5."""
    given = torch.nn.Linear(1, 1, bias=False)
    masters = MasterWeights(given)
    for value in (256.0, 0.5):
        given.weight.grad = torch.full((1, 1), value, dtype=torch.bfloat16)
        masters.take_gradients()
    assert masters.masters[0].grad is not None
    assert masters.masters[0].grad.item() == 256.5
    assert given.weight.grad is None


# -- refusals -------------------------------------------------------------------------------------


def refused(stage: Any, monkeypatch: pytest.MonkeyPatch | None = None, **training: Any) -> str:
    run = Run(training=TrainingConfig(**training))
    run.stages = {"student": stage, "teacher": TrainStage()}
    with pytest.raises(UserError) as error:
        check_training(stage, "stages.student", run)
    return str(error.value)


def test_8_bits_over_several_devices_and_without_their_library_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(training=TrainingConfig(optimizer=BITSANDBYTES))
    run.stages = {"student": TrainStage()}
    run.parallel.mode = Parallel.fsdp
    with pytest.raises(UserError, match=r"adamw_8bit_bitsandbytes steps no shares of weights"):
        check_training(TrainStage(), "stages.student", run)
    run.parallel.mode = Parallel.ddp
    check_training(TrainStage(), "stages.student", run)
    monkeypatch.setattr("pipeline.stages.settings.find_spec", lambda name: None)
    assert "adamw_8bit_torchao needs torchao, which is not installed" in refused(
        TrainStage(), optimizer=TORCHAO
    )


@pytest.mark.parametrize("name", ["hidden_weight", "relation_weight"])
def test_signals_that_want_fp32_are_refused_in_pure_bf16(name: str) -> None:
    stage = DistillStage(precision=Precision.bf16_pure, **{name: 0.1})
    assert "stages.student.precision: bf16_pure has nothing in fp32" in refused(stage)
