"""`training.deterministic`: the same bits each time, and nothing chosen by its time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import tiny
from test_training_loop import CPU, batches_for, run, same, settings, weights

from pipeline.config.settings.distillation import HeadKernel
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import TrainingConfig
from pipeline.errors import StageFailed, UserError
from pipeline.ledger.devices.cuda.device import Cuda
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import PhaseClock
from pipeline.stages import head_choice
from pipeline.stages.settings import check_training
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective


def without_such_a_kernel() -> torch.Tensor:
    """Call an operator of which torch says that it has none, on any device."""
    values = torch.zeros(3)
    return values.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_only_inside_and_as_before_afterwards() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with device_of(CPU).deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        with pytest.raises(RuntimeError, match="deterministic"):
            without_such_a_kernel()
    assert torch.are_deterministic_algorithms_enabled() is before
    assert torch.utils.deterministic.fill_uninitialized_memory is filled
    without_such_a_kernel()


@pytest.mark.parametrize("wanted", [True, False])
def test_steps_run_with_such_kernels_where_it_is_asked_for(wanted: bool, tmp_path: Path) -> None:
    seen: set[bool] = set()
    model = tiny(Task.causal_lm)
    model.register_forward_pre_hook(
        lambda *_: seen.add(torch.are_deterministic_algorithms_enabled())
    )
    inner = model.base_model
    inner.register_forward_pre_hook(
        lambda *_: seen.add(torch.are_deterministic_algorithms_enabled())
    )
    run(model, settings(deterministic=wanted), tmp_path)
    assert seen == {wanted}


def test_it_changes_no_bit_where_kernels_are_such_anyway(tmp_path: Path) -> None:
    models = [tiny(Task.causal_lm) for _ in range(2)]
    for number, model in enumerate(models):
        run(model, settings(deterministic=bool(number)), tmp_path / str(number))
    same(*map(weights, models))


def test_a_kernel_that_is_missing_ends_the_stage_with_the_remedy(tmp_path: Path) -> None:
    model = tiny(Task.causal_lm)
    model.base_model.register_forward_pre_hook(lambda *_: without_such_a_kernel() and None)
    with pytest.raises(StageFailed, match=r"put_.*; training\.deterministic=false trains without"):
        run(model, settings(deterministic=True), tmp_path)


def test_another_error_is_left_as_it_is(tmp_path: Path) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    model = tiny(Task.causal_lm)
    model.base_model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        run(model, settings(deterministic=True), tmp_path)


def test_a_precision_found_by_trial_is_refused() -> None:
    asked = Run(
        training=TrainingConfig(deterministic=True), precision=PrecisionConfig(name=Precision.auto)
    )
    with pytest.raises(UserError, match=r"^precision: auto takes .*name a precision"):
        check_training(TrainStage(), "stages.baseline", asked)


@pytest.mark.parametrize(
    ("has_triton", "kernel"), [(True, HeadKernel.triton), (False, HeadKernel.torch)]
)
def test_no_head_is_timed(
    has_triton: bool, kernel: HeadKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(device_of(CPU)), "triton", True)
    why = None if has_triton else "it is not installed"
    monkeypatch.setattr(head_choice, "why_not", lambda *_: why)
    monkeypatch.setattr(head_choice, "probe_heads", lambda *_: pytest.fail("timed"))
    model = tiny(Task.causal_lm)
    objective = Objective(model, Task.causal_lm, Precision.fp32, CPU, PhaseClock())
    config = settings(deterministic=True)
    found = head_choice.choose_head(
        "stages.student.head", HeadKernel.auto, objective, batches_for(config), config
    )
    assert found is not None
    assert (found["kernel"], found["rows"]) == (kernel.value, None)


def test_cublas_gets_buffers_of_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is one of the two that torch accepts; a user's own stays."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    device = Cuda(torch.device("cuda"))
    device.before_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    device.before_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
