"""Relations of queries, keys and values: against their definition in float64, position by position,
and refusals.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from here import result_in
from make_assess_models import LABELS
from test_distill_cached import TINY
from test_training_loop import CPU, batches_for, settings
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.cli.main import main
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import Compile
from pipeline.data.batches import IGNORE
from pipeline.distillation import relations
from pipeline.distillation.losses import Loss
from pipeline.distillation.relations import RelationSignal, relation_divergence, relation_signal
from pipeline.errors import UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import load_model
from pipeline.stages.distill import DistillStage
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective, Teacher
from pipeline.training.reading import Apart, Examined, document_mask

Batch = dict[str, torch.Tensor]
KEY = "stages.student"
DISTIL = [arg.replace("distill_cached", "distill") for arg in TINY]


def llama(width: int, layers: int, heads: int, groups: int, seed: int) -> Any:
    """Return a language model with fewer key-value heads than heads."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            initializer_range=0.2,
        )
    )


def bert(width: int, layers: int, heads: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = len(LABELS)
    return BertForSequenceClassification(config)


def pair(task: Task) -> tuple[Any, Any]:
    """Return a student of two layers and a wider teacher of four; heads and key-value heads
    differ.
    """
    if task is Task.causal_lm:
        return llama(32, 2, 4, 2, 0), llama(48, 4, 6, 2, 1).eval()
    return bert(32, 2, 4, 0), bert(48, 4, 6, 1).eval()


def objective_for(
    task: Task,
    *,
    weight: float = 0.6,
    heads: int | None = 2,
    layer: int | None = None,
    masked: bool = True,
) -> Objective:
    student, teacher = (model.double() for model in pair(task))
    read = Examined(apart=Apart.mask if masked and task is Task.causal_lm else Apart.positions)
    taught = Teacher(teacher, Precision.fp32, Loss(0.5), read)
    objective = Objective(student, task, Precision.fp32, CPU, PhaseClock(), taught, read=read)
    objective.relations = relation_signal(
        student, teacher, layer=layer, heads=heads, weight=weight, key=KEY
    )
    return objective


def queries_keys_values(model: Any, batch: Batch, layer: int) -> list[torch.Tensor]:
    """Return them from what transformers reports of the layer before, without a hook."""
    if isinstance(model, LlamaForCausalLM):
        mask = document_mask(batch["position_ids"])
        states = model.model(
            batch["input_ids"],
            attention_mask=mask,
            position_ids=batch["position_ids"],
            output_hidden_states=True,
        ).hidden_states
        block: Any = model.model.layers[layer]
        x = block.input_layernorm(states[layer])
        return [getattr(block.self_attn, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    states = model.bert(
        batch["input_ids"], batch["attention_mask"], output_hidden_states=True
    ).hidden_states
    attention = model.bert.encoder.layer[layer].attention.self
    return [getattr(attention, name)(states[layer]) for name in ("query", "key", "value")]


def relation(
    states: torch.Tensor, head: int, heads: int, position: int, read: list[int]
) -> torch.Tensor:
    """Return log R of one position of one row, (T, D) given, over those it may read."""
    size = states.shape[-1] // heads
    part = states[:, head * size : (head + 1) * size]
    return F.log_softmax((part @ part[position] / math.sqrt(size))[read], 0)


def readable(batch: Batch, row: int, position: int) -> list[int]:
    """Return what a position reads: in a packed window what came before in its document, else all
    but padding.
    """
    if "attention_mask" in batch:
        return [at for at, kept in enumerate(batch["attention_mask"][row].tolist()) if kept]
    first = position - int(batch["position_ids"][row, position])
    return list(range(first, position + 1))


def definition(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], batch: Batch, heads: int
) -> torch.Tensor:
    """S, term by term."""
    rows, length = batch["input_ids"].shape
    total = torch.zeros((), dtype=torch.float64)
    if "attention_mask" in batch:
        mask = batch["attention_mask"].double()
        weights = mask / mask.sum(-1, keepdim=True) / rows
    else:
        predicted = (batch["labels"] != IGNORE).double()
        weights = predicted / predicted.sum()
    for row in range(rows):
        for position in range(length):
            if not weights[row, position]:
                continue
            read = readable(batch, row, position)
            for x, y in zip(ours, theirs, strict=True):
                for head in range(heads):
                    q, p = (relation(each[row], head, heads, position, read) for each in (x, y))
                    divergence = F.kl_div(q, p, reduction="sum", log_target=True)
                    total = total + weights[row, position] * divergence / heads
    return total


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("task", list(Task))
def test_loss_and_gradients_are_the_definition(task: Task, layer: int | None) -> None:
    objective = objective_for(task, layer=layer)
    batch = batches_for(settings(), task).batch(0)
    done = objective(batch)
    trained = dict(objective.model.named_parameters())
    found = torch.autograd.grad(done.drawn["relations"], list(trained.values()), allow_unused=True)
    assert objective.teacher is not None
    with torch.no_grad():
        theirs = queries_keys_values(objective.teacher.model, batch, 3 if layer is None else layer)
    wanted = 0.6 * definition(queries_keys_values(objective.model, batch, 1), theirs, batch, 2)
    assert wanted.item() > 0.01
    expected = torch.autograd.grad(wanted, list(trained.values()), allow_unused=True)
    assert done.drawn["relations"].item() == pytest.approx(wanted.item(), rel=1e-6)
    with torch.no_grad():
        objective.relations = None
        assert done.loss.item() == pytest.approx(
            objective(batch).loss.item() + wanted.item(), rel=1e-5
        )
    # Llama's norms compute in fp32 whatever they are given
    tolerance = 1e-4 if task is Task.causal_lm else 1e-6
    for name, mine, theirs_ in zip(trained, found, expected, strict=True):
        assert (mine is None) == (theirs_ is None), name
        if mine is not None:
            torch.testing.assert_close(
                mine, theirs_, rtol=tolerance, atol=tolerance / 100, msg=name
            )
    assert not any(parameter.grad is not None for parameter in objective.teacher.model.parameters())


@pytest.mark.parametrize("block", [1, 10**9])
def test_the_gradient_is_that_of_finite_differences(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(relations, "BLOCK_BYTES", block)  # a row at a time, and all at once
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(2, 5, 8).double().requires_grad_(),
        torch.randn(2, 5, 12).double(),
    )
    may_read = document_mask(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]))[:, 0]
    weights = torch.rand(2, 5).double()
    assert torch.autograd.gradcheck(
        lambda x: 3 * relation_divergence(x, teacher, may_read, weights, 4), student
    )
    assert relation_divergence(teacher, teacher, may_read, weights, 4) == 0
    assert relation_divergence(student, teacher, torch.zeros_like(may_read), weights, 4) == 0


def test_extreme_states_and_bf16_stay_finite() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6, 8) * 1e3, torch.randn(1, 6, 8) * 1e3
    may_read, weights = torch.ones(1, 6, 6, dtype=torch.bool).tril(), torch.full((1, 6), 1 / 6)
    for dtype in (torch.float32, torch.bfloat16):
        x = student.clone().to(dtype).requires_grad_()
        value = relation_divergence(x, teacher.to(dtype), may_read, weights, 2)
        value.backward()
        assert value.dtype is torch.float32
        assert x.grad is not None
        assert torch.isfinite(value)
        assert torch.isfinite(x.grad).all()


def test_padding_and_micro_batches_change_nothing() -> None:
    task = Task.sequence_classification
    objective, batch = objective_for(task), batches_for(settings(), task).batch(0)
    value = objective(batch).drawn["relations"].item()
    other = {
        **batch,
        "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 99),
    }
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    assert objective(other).drawn["relations"].item() == pytest.approx(value, rel=1e-9)
    wider = {name: F.pad(batch[name], (0, 7)) for name in ("input_ids", "attention_mask")}
    assert objective({**batch, **wider}).drawn["relations"].item() == pytest.approx(value, rel=1e-9)
    for each in Task:
        objective, batch = objective_for(each), batches_for(settings(), each).batch(0)
        whole = objective(batch)
        parts = [
            objective({name: tensor.chunk(2)[at] for name, tensor in batch.items()})
            for at in (0, 1)
        ]
        summed = sum(part.drawn["relations"].item() * part.count for part in parts)
        assert summed / whole.count == pytest.approx(whole.drawn["relations"].item(), rel=1e-6)


def test_flops_are_what_torch_counts() -> None:
    student, teacher = pair(Task.sequence_classification)
    signal = relation_signal(student, teacher, layer=None, heads=4, weight=1.0, key=KEY)
    ours, theirs = (
        [torch.randn(3, 10, 32) for _ in range(3)],
        [torch.randn(3, 10, 48) for _ in range(3)],
    )
    may_read, weights = torch.ones(3, 10, 10, dtype=torch.bool), torch.full((3, 10), 1 / 30)
    with FlopCounterMode(display=False) as counter:
        signal(ours, theirs, may_read, weights)
    assert signal.flops(3, 10) == counter.get_total_flops()


def test_models_that_do_not_fit_are_refused() -> None:
    student, teacher = pair(Task.causal_lm)

    def made(**changes: Any) -> RelationSignal:
        return relation_signal(
            student, teacher, **{"layer": None, "heads": None, "weight": 1.0, "key": KEY, **changes}
        )

    with pytest.raises(
        UserError, match=r"stages.student.relation_heads: 6 heads do not cut .* give 4, for one"
    ):
        made()
    with pytest.raises(
        UserError, match=r"stages.student.relation_layer: the teacher has no layer 4; give 0 to 3"
    ):
        made(heads=2, layer=4)
    fused = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(
        UserError, match=r"relation_weight: GPT2LMHeadModel has no separate projections"
    ):
        relation_signal(fused, fused, layer=None, heads=2, weight=1.0, key=KEY)
    named_otherwise = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=16)
    )
    signal = relation_signal(
        named_otherwise, named_otherwise, layer=None, heads=None, weight=1.0, key=KEY
    )
    assert [each.out_features for each in signal.student] == [16, 16, 16]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"relation_heads": 2},
            "stages.student.relation_heads: has no effect without relation_weight",
        ),
        (
            {"relation_layer": 0},
            "stages.student.relation_layer: has no effect without relation_weight",
        ),
        (
            {"relation_weight": 1.0, "cache": "x"},
            "stages.student.relation_weight: needs what a teacher computes",
        ),
        (
            {"relation_weight": 1.0, "completions": "x"},
            "stages.student.relation_weight: needs what a teacher computes",
        ),
        (
            {"relation_weight": 1.0, "compile": Compile.always},
            "stages.student.relation_weight: what a compiled model",
        ),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        DistillStage(**changes).check("stages.student", Run())


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
@pytest.mark.slow
def test_a_recipe_draws_them_beside_hidden_states(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = [
        f"stages.student.{name}"
        for name in ("hidden_weight=1", "relation_weight=1", "relation_heads=2")
    ]
    assert (
        main([*DISTIL, *wanted, "stages.student.allow_weak_teacher=true", *more], started_ns=0) == 0
    ), capsys.readouterr().err
    student = next(row for row in result_in(tmp_path)["rows"] if row["arm"] == "student")
    assert 0 < student["ledger"]["counts"]["distillation_share"]["value"] < 1
    load_model(
        student["artifact"]["path"], Task.sequence_classification if more else Task.causal_lm
    )
    journal = (tmp_path / "mlruns/latest/journal.jsonl").read_text().splitlines()
    assert [line for line in journal if '"relations"' in line and '"hidden"' in line]
