"""Activation checkpointing changes memory alone: losses, gradients, FLOPs and what is saved stay as
they are.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import saved, tiny
from test_distill_cached import TINY
from test_on_policy import left_padded, writing
from test_relations import KEY, objective_for
from test_training_loop import CPU, batches_for, run, settings, weights
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from pipeline.cli.main import main
from pipeline.config.settings.precision import Precision
from pipeline.distillation.hidden import HiddenSignal, layer_pairs
from pipeline.distillation.on_policy import write
from pipeline.errors import UserError
from pipeline.ledger.flops import count_flops
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import load_model
from pipeline.tasks.table import Task
from pipeline.training.activations import checkpoint_activations
from pipeline.training.objective import Objective

SETTING = "training.activation_checkpointing"


def gradients(
    objective: Objective, batch: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Return loss, gradients, and how many tensors of activations the step kept for its backward
    pass.
    """
    kept: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    objective.model.train()
    torch.manual_seed(3)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(batch).loss
    loss.backward()
    found = {
        name: each.grad
        for name, each in objective.model.named_parameters()
        if each.grad is not None
    }
    return loss.item(), found, len(kept)


def computes_again(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def signalled(task: Task) -> Objective:
    """Return an objective that reads relations and hidden states of student and teacher."""
    objective = objective_for(task)
    torch.manual_seed(0)
    objective.hidden = HiddenSignal(layer_pairs(None, 2, 4, KEY), (32, 48), 0.5).double()
    return objective


def plain(kind: str, precision: Precision = Precision.fp32) -> Objective:
    torch.manual_seed(0)
    if kind == "dropout":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=2, n_positions=64)
        )
        assert model.config.resid_pdrop > 0
    else:
        model = tiny(Task[kind])
    task = Task.causal_lm if kind == "dropout" else Task[kind]
    return Objective(model, task, precision, CPU, PhaseClock())


MAKES = {
    "causal_lm": lambda: plain("causal_lm"),
    "bf16": lambda: plain("causal_lm", Precision.bf16),
    "sequence_classification": lambda: plain("sequence_classification"),
    "dropout": lambda: plain("dropout"),
    "signals of a causal_lm": lambda: signalled(Task.causal_lm),
    "signals of a classifier": lambda: signalled(Task.sequence_classification),
}


@pytest.mark.parametrize("kind", MAKES)
def test_losses_and_gradients_are_equal_to_the_bit(kind: str) -> None:
    without, with_it = MAKES[kind](), MAKES[kind]()
    batch = batches_for(settings(), without.task).batch(0)
    wanted, expected, all_kept = gradients(without, batch)
    checkpoint_activations(with_it.model, SETTING)
    loss, found, kept = gradients(with_it, batch)
    assert loss == wanted
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert kept < all_kept  # else nothing was dropped, and the test says nothing


def test_training_and_saving_are_the_same(tmp_path: Path) -> None:
    without, with_it = tiny(Task.causal_lm), tiny(Task.causal_lm)
    checkpoint_activations(with_it, SETTING)
    for name, model in (("a", without), ("b", with_it)):
        run(model, settings(), tmp_path / name)
    for name, weight in weights(without).items():
        assert torch.equal(weight, with_it.state_dict()[name]), name
    folders = [
        saved(model, tmp_path / f"saved-{name}") for name, model in (("a", without), ("b", with_it))
    ]
    assert (folders[0] / "config.json").read_bytes() == (folders[1] / "config.json").read_bytes()
    assert not computes_again(load_model(folders[1], Task.causal_lm))


def test_flops_are_without_what_is_computed_again() -> None:
    model = tiny(Task.causal_lm).train()
    before = count_flops(copy.deepcopy(model), Task.causal_lm, backward=True)
    checkpoint_activations(model, SETTING)
    assert count_flops(model, Task.causal_lm, backward=True) == before
    assert computes_again(model)


def test_a_student_writes_the_same() -> None:
    model = tiny(Task.causal_lm).train()
    prompts, mask = left_padded([5, 6, 7, 8], [9, 10])
    expected = write(model, prompts, mask, writing(), 0)
    checkpoint_activations(model, SETTING)
    found = write(model, prompts, mask, writing(), 0)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert model.training


def test_a_model_that_cannot_is_refused_by_name() -> None:
    model = tiny(Task.causal_lm)
    model.supports_gradient_checkpointing = False
    with pytest.raises(
        UserError, match=rf"^{SETTING}: LlamaForCausalLM cannot compute its layers again; set it to"
    ):
        checkpoint_activations(model, SETTING)


@pytest.mark.parametrize("key", [SETTING, "stages.baseline.activation_checkpointing"])
def test_a_recipe_asks_for_it_by_the_setting_that_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """The model is one that cannot: what refuses it is what the recipe reached, before the first
    step.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    tiny_run = [arg for arg in TINY if not arg.startswith(("recipe", "stages"))]
    assert main(["recipe=baseline", *tiny_run, f"{key}=true"], started_ns=0) == 1
    assert f"{key}: LlamaForCausalLM cannot compute its layers again" in capsys.readouterr().err
