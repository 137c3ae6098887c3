"""The one training loop: against float64 autograd and torch's own functions, and resumed to the
bit.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from make_assess_models import random_documents, tiny
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.training import Schedule, TrainingConfig
from pipeline.data.batches import IGNORE, PackedBatches, PaddedBatches, num_tokens
from pipeline.data.padding import Padding
from pipeline.distillation.losses import Loss
from pipeline.errors import BudgetSpent, Preempted, StageFailed, UserError
from pipeline.ledger.phases import PhaseClock, difference
from pipeline.tasks.table import Task
from pipeline.training import checkpoint
from pipeline.training import objective as objective_module
from pipeline.training.loop import Hooks, Progress, train
from pipeline.training.objective import (
    Objective,
    Teacher,
    check_tokenizers,
    parameter_hash,
    shared_vocabulary,
)
from pipeline.training.precision import arithmetic, round_weights, why_not
from pipeline.training.reading import (
    Apart,
    Examined,
    as_read_by,
    document_mask,
    examine,
    hidden_states,
)
from pipeline.training.schedule import factor, is_constant
from pipeline.training.selfcheck import check_teacher, gradient_share

CPU = torch.device("cpu")
LENGTHS = [9, 30, 5, 17, 40, 12, 25, 33, 8, 21] * 3


def settings(**changes: Any) -> TrainingConfig:
    given: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "sequence_length": 16,
        "learning_rate": 1e-3,
        "warmup_fraction": 0.0,
        "eval_every": 2,
        **changes,
    }
    return TrainingConfig(**given)


def hooks(**changes: Any) -> Hooks:
    given: dict[str, Any] = {
        "validate": lambda: 1.0,
        "flops": lambda batch: (float(batch["input_ids"].numel()), 0.0),
        "points": lambda step, values: None,
        "checkpointed": lambda step: None,
        "should_stop": lambda: None,
        "advance": lambda step, tokens: None,
        "history": lambda step: [],
        "resumed": lambda step, history: None,
        "say": lambda text: None,
        **changes,
    }
    return Hooks(**given)


def batches_for(config: TrainingConfig, task: Task = Task.causal_lm) -> Any:
    documents = random_documents(LENGTHS, is_text=task is Task.causal_lm)
    if task is Task.causal_lm:
        return PackedBatches(
            documents, sequence_length=config.sequence_length, batch_size=config.batch_size, seed=7
        )
    return PaddedBatches(documents, batch_size=config.batch_size, seed=7, padding=Padding(0))


def run(
    model: Any,
    config: TrainingConfig,
    folder: Path,
    *,
    objective: Objective | None = None,
    task: Task = Task.causal_lm,
    batches: Any = None,
    **more: Any,
) -> Progress:
    clock = PhaseClock()
    objective = objective or Objective(model, task, Precision.fp32, CPU, clock)
    batches = batches or batches_for(config, task)
    return train(
        model,
        batches,
        objective,
        settings=config,
        precision=PrecisionConfig(name=Precision.fp32),
        folder=folder,
        clock=clock,
        hooks=hooks(**more),
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance: float) -> None:
    for name, tensor in a.items():
        torch.testing.assert_close(
            b[name], tensor, msg=name, **(tolerance or {"rtol": 0, "atol": 0})
        )


# -- steps ----------------------------------------------------------------------------------------


def reference_step(model: Any, batch: dict[str, torch.Tensor], config: TrainingConfig) -> None:
    """One step in float64, on materialised logits, with torch's clipping and AdamW."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    torch.optim.AdamW(
        groups, lr=config.learning_rate * factor(0, config), betas=(0.9, 0.95), fused=False
    ).step()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_a_step_is_the_large_batchs_step_in_float64(
    tmp_path: Path, accumulation: int, max_norm: float
) -> None:
    """Micro-batches have unequal numbers of targets: means of means would differ."""
    config = settings(
        steps=1, gradient_accumulation=accumulation, max_grad_norm=max_norm, weight_decay=0.5
    )
    model = tiny(Task.causal_lm).double()
    expected = copy.deepcopy(model).train()
    batch = batches_for(config).batch(0)
    assert len({int((part != IGNORE).sum()) for part in batch["labels"].chunk(4)}) > 1
    reference_step(expected, batch, config)
    run(model, config, tmp_path)
    # Adam's first step is nearly the gradient's sign, so where the gradient is rounding noise it
    # says nothing
    compared = total = 0
    for (name, wanted), found in zip(expected.named_parameters(), model.parameters(), strict=True):
        sound = wanted.grad.abs() > 1e-3 * wanted.grad.abs().max()
        torch.testing.assert_close(found[sound], wanted[sound], rtol=0, atol=2e-6, msg=name)
        compared, total = compared + int(sound.sum()), total + sound.numel()
    assert compared > 0.9 * total
    moved = (expected.lm_head.weight - tiny(Task.causal_lm).double().lm_head.weight).abs().detach()
    assert float(moved.max()) > 0.9 * config.learning_rate


def test_counts_are_those_of_the_batches(tmp_path: Path) -> None:
    texts = PackedBatches(
        random_documents(LENGTHS, is_text=True), sequence_length=16, batch_size=4, seed=7
    )
    progress = run(tiny(Task.causal_lm), settings(), tmp_path, batches=texts)
    assert (progress.step, progress.examples, progress.tokens) == (6, 24, 6 * 4 * 16)
    assert progress.target_tokens == sum(
        int((texts.batch(step)["labels"] != IGNORE).sum()) for step in range(6)
    )
    assert progress.flops == progress.tokens
    assert [reading["step"] for reading in progress.curve] == [2, 4, 6]
    assert [reading["tokens"] for reading in progress.curve] == [128, 256, 384]
    padded = run(
        tiny(Task.sequence_classification),
        settings(),
        tmp_path / "c",
        task=Task.sequence_classification,
    )
    batches = batches_for(settings(), Task.sequence_classification)
    assert padded.tokens == sum(
        int(batches.batch(step)["attention_mask"].sum()) for step in range(6)
    )


class WithoutTargets:
    """Batches of four windows of which the last two, a micro-batch of their own, have no target."""

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        batch = batches_for(settings()).batch(step)
        batch["labels"][2:] = IGNORE
        return batch


def test_only_what_is_computed_is_counted(tmp_path: Path) -> None:
    calls: list[int] = []
    model = tiny(Task.causal_lm)
    model.register_forward_pre_hook(lambda module, given: calls.append(1))
    model.model.register_forward_pre_hook(
        lambda module, given, named: calls.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    progress = run(
        model, settings(steps=2, gradient_accumulation=2), tmp_path, batches=WithoutTargets()
    )
    assert calls == [2, 2]  # rows of the micro-batches that went through the model
    batches = [WithoutTargets().batch(step) for step in range(2)]
    assert progress.examples == 4
    assert progress.flops == 4 * 16
    first = [{name: tensor[:2] for name, tensor in batch.items()} for batch in batches]
    assert progress.tokens == sum(map(num_tokens, first))
    assert progress.target_tokens == sum(
        int((batch["labels"] != IGNORE).sum()) for batch in batches
    )


# -- resuming -------------------------------------------------------------------------------------


def interrupted(folder: Path, config: TrainingConfig, at: int) -> Any:
    """Train until step `at`, stop with a checkpoint, and go on with a new model object."""
    asked = iter([None] * (at - 1) + [Preempted] * 9)
    with pytest.raises(Preempted, match=f"stopped after step {at} of 6; the same command resumes"):
        run(tiny(Task.causal_lm), config, folder, should_stop=lambda: next(asked))
    model = tiny(Task.causal_lm, seed=99)
    torch.manual_seed(12345)
    return model, run(model, config, folder)


def test_a_spent_budget_says_to_raise_it(tmp_path: Path) -> None:
    with pytest.raises(
        BudgetSpent, match=r"^budget\.device_hours is spent after step 1 of 6; raise it to resume"
    ):
        run(tiny(Task.causal_lm), settings(), tmp_path, should_stop=lambda: BudgetSpent)


def test_a_resumed_training_is_bit_equal_to_one_that_never_stopped(tmp_path: Path) -> None:
    whole = tiny(Task.causal_lm)
    progress = run(whole, settings(), tmp_path / "whole")
    model, resumed = interrupted(tmp_path / "cut", settings(), 3)
    same(weights(whole), weights(model))
    timeless = lambda p: [{k: v for k, v in r.items() if "seconds" not in k} for r in p.curve]
    assert timeless(resumed) == timeless(progress)
    assert (resumed.tokens, resumed.examples, resumed.flops) == (
        progress.tokens,
        progress.examples,
        progress.flops,
    )
    assert (resumed.hard, resumed.smooth) == (progress.hard, progress.smooth)


def test_dropout_draws_after_a_resume_what_it_would_have_drawn(tmp_path: Path) -> None:
    """The one thing of a step that no batch and no weight holds is where the generators are."""

    def drawing() -> Any:
        torch.manual_seed(7)
        shape = GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=2, n_positions=64)
        assert shape.resid_pdrop > 0
        return GPT2LMHeadModel(shape)

    whole = drawing()
    run(whole, settings(), tmp_path / "whole")
    asked = iter([None] * 2 + [Preempted] * 9)
    with pytest.raises(Preempted):
        run(drawing(), settings(), tmp_path / "cut", should_stop=lambda: next(asked))
    model = drawing()
    torch.manual_seed(12345)
    run(model, settings(), tmp_path / "cut")
    same(weights(whole), weights(model))


def test_no_checkpoint_holds_a_pickle(tmp_path: Path) -> None:
    run(tiny(Task.causal_lm), settings(checkpoint_every=2), tmp_path)
    names = {path.name for path in tmp_path.glob("step-*/*")}
    assert names == {
        "model.safetensors",
        "optimizer.safetensors",
        "generators.safetensors",
        "extra.json",
        "manifest.json",
    }


def test_a_checkpoint_is_of_its_moment_however_late_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of step 2 is written after step 5 alone, where a last one follows it."""
    whole = tiny(Task.causal_lm)
    run(whole, settings(), tmp_path / "whole")
    usual, later, saved = checkpoint._written, threading.Event(), list[int]()

    def late(*given: Any) -> Any:
        assert later.wait(60)
        return usual(*given)

    def advance(step: int, _: int) -> None:
        if step == 5:
            later.set()

    monkeypatch.setattr(checkpoint, "_written", late)
    config = settings(checkpoint_every=2, checkpoint_beside=True)
    asked = iter([None] * 4 + [Preempted])
    cut = tmp_path / "cut"
    with pytest.raises(Preempted):
        run(
            tiny(Task.causal_lm),
            config,
            cut,
            should_stop=lambda: next(asked),
            advance=advance,
            checkpointed=saved.append,
        )
    assert saved == [2, 5]  # at step 4 one was due, and was being written
    shutil.rmtree(cut / "step-000000005")
    model, resumed = tiny(Task.causal_lm, seed=9), list[int]()
    run(model, config, cut, resumed=lambda step, _: resumed.append(step))
    assert resumed == [2]
    same(weights(whole), weights(model))
    assert not list(cut.glob(".writing-*"))


def damage_flip(step: Path) -> None:
    raw = bytearray((step / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (step / "model.safetensors").write_bytes(raw)


def damage_truncate(step: Path) -> None:
    raw = (step / "optimizer.safetensors").read_bytes()
    (step / "optimizer.safetensors").write_bytes(raw[: len(raw) // 2])


DAMAGES: list[Callable[[Path], Any]] = [
    damage_flip,
    damage_truncate,
    lambda step: (step / "extra.json").unlink(),
    lambda step: (step / "manifest.json").write_text("{"),
    lambda step: (step / "manifest.json").unlink(),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    whole = tiny(Task.causal_lm)
    run(whole, settings(checkpoint_every=2), tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        "step-000000002",
        "step-000000004",
    ]
    damage(tmp_path / "step-000000004")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1] == 2
    model = tiny(Task.causal_lm, seed=99)
    said: list[str] = []
    resumed: list[int] = []

    run(
        model,
        settings(checkpoint_every=2),
        tmp_path,
        say=said.append,
        resumed=lambda step, _: resumed.append(step),
    )
    same(weights(whole), weights(model))
    assert resumed == [2]
    assert len(said) == 1
    assert re.fullmatch(r"checkpoint of step 4 is damaged \(.+\) and passed over", said[0])
    for step in tmp_path.glob("step-*"):
        damage(step)
    assert checkpoint.newest(tmp_path) is None


def test_a_half_written_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(Task.causal_lm), settings(checkpoint_every=2), tmp_path)
    assert checkpoint.newest(tmp_path) is None


def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    from pipeline.store import artifacts as store

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(10, 9, 5))
    with pytest.raises(UserError, match="has 0 MiB free"):
        run(tiny(Task.causal_lm), settings(checkpoint_every=2), tmp_path)


# -- stopping -------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_with_its_step(tmp_path: Path) -> None:
    model = tiny(Task.causal_lm)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(
        StageFailed,
        match=r"the loss is nan at step 1; lower training.learning_rate or use precision",
    ):
        run(model, settings(), tmp_path)


def test_a_loss_that_grows_stops_with_what_it_was(tmp_path: Path) -> None:
    config = settings(steps=60, learning_rate=3.0, max_grad_norm=1e9, divergence_factor=1.2)
    with pytest.raises(
        StageFailed, match=r"the loss diverged: .* after a best of .*; lower training.learning_rate"
    ):
        run(tiny(Task.causal_lm), config, tmp_path)


# -- schedule -------------------------------------------------------------------------------------


def test_the_rate_of_every_step_by_hand() -> None:
    cosine = settings(steps=10, warmup_fraction=0.2, schedule=Schedule.cosine)
    half = 0.1 + 0.45 * (1 + math.cos(math.pi * 4 / 8))
    assert [factor(step, cosine) for step in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, half])
    assert half == pytest.approx(0.55)
    stable = settings(
        steps=10, warmup_fraction=0.2, decay_fraction=0.4, schedule=Schedule.constant_then_decay
    )
    assert [factor(step, stable) for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )
    assert [step for step in range(11) if is_constant(step, stable)] == [2, 3, 4, 5, 6]
    assert not any(is_constant(step, cosine) for step in range(11))


# -- objective ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.5), (2.0, 0.25), (3.0, 0.0)])
def test_distillation_through_whole_models_is_the_definition(
    task: Task, temperature: float, ce_weight: float
) -> None:
    """Forward KL(teacher || student) times T squared, mixed with cross-entropy; in float64, with
    its gradient.
    """
    model, teacher = tiny(task).double(), tiny(task, seed=1).double().eval()
    loss = Loss(ce_weight, temperature=temperature)
    objective = Objective(
        model, task, Precision.fp32, CPU, PhaseClock(), Teacher(teacher, Precision.fp32, loss)
    )
    batch = batches_for(settings(), task).batch(0)
    done = objective(batch)
    done.loss.backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.zero_grad()
    keep = (batch["labels"] != IGNORE).flatten()
    # with a cache, boundaries are not looked for
    packed = {"use_cache": False} if task is Task.causal_lm else {}
    z = model(**inputs, **packed).logits.flatten(0, -2)[keep]
    with torch.no_grad():
        t = teacher(**inputs, **packed).logits.flatten(0, -2)[keep]
    ce = F.cross_entropy(z, batch["labels"].flatten()[keep])
    p = F.softmax(t / temperature, -1)
    kl = (p * (p.log() - F.log_softmax(z / temperature, -1))).sum(-1).mean() * temperature**2
    expected = ce_weight * ce + (1 - ce_weight) * kl
    expected.backward()
    # the loss is taken in fp32
    assert done.loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
def test_the_share_of_the_gradient_is_that_of_both_parts_alone(ce_weight: float) -> None:
    """By autograd over the definition; 0 and 1 where one of the two has no weight. The objective is
    left as it was.
    """
    task = Task.causal_lm
    model, teacher = tiny(task), tiny(task, seed=1).eval()
    taught = Teacher(teacher, Precision.fp32, Loss(ce_weight))
    objective = Objective(model, task, Precision.fp32, CPU, PhaseClock(), taught)
    batch = batches_for(settings(), task).batch(0)
    share = gradient_share(objective, batch)
    assert objective.loss is taught.loss
    keep = (batch["labels"] != IGNORE).flatten()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    z, t = (
        each(**inputs, use_cache=False).logits.flatten(0, -2)[keep] for each in (model, teacher)
    )
    parts = [
        (1 - ce_weight)
        * F.kl_div(z.log_softmax(-1), t.detach().softmax(-1), reduction="batchmean"),
        ce_weight * F.cross_entropy(z, batch["labels"].flatten()[keep]),
    ]
    found = (
        torch.autograd.grad(part, list(model.parameters()), retain_graph=True) for part in parts
    )
    norms = [torch.stack([gradient.norm() for gradient in gradients]).norm() for gradients in found]
    assert share == pytest.approx((norms[0] / (norms[0] + norms[1])).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("metric", "theirs", "start"),
    [("bits_per_byte", 3.1, 3.0), ("accuracy", 0.5, 0.5), ("bits_per_byte", float("nan"), 3.0)],
)
def test_a_teacher_that_knows_no_more_is_refused(metric: str, theirs: float, start: float) -> None:
    with pytest.raises(
        StageFailed, match=r"no better than the student's .* stages.student.allow_weak_teacher=true"
    ):
        check_teacher("stages.student", metric, theirs, start)
    check_teacher("stages.student", "bits_per_byte", 2.9, 3.0)
    check_teacher("stages.student", "accuracy", 0.6, 0.5)


@pytest.mark.parametrize("apart", [Apart.lengths, Apart.mask, Apart.positions])
def test_a_packed_batch_has_the_loss_of_its_documents_alone(apart: Apart) -> None:
    """Nothing is read across a boundary, and no first token of a document is predicted from the one
    before.
    """
    documents = random_documents([7, 12, 13])
    model = tiny(Task.causal_lm).eval()
    batch = PackedBatches(documents, sequence_length=32, batch_size=1, seed=0).batch(0)
    read = examine(model, CPU) if apart is Apart.lengths else Examined(apart=apart)
    assert read.apart is apart
    done = Objective(model, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), read=read)(batch)
    total, count = 0.0, 0
    for document in documents:
        ids = torch.from_numpy(document.input_ids).long()[None]
        log_p = F.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
        chosen = torch.from_numpy(document.targets[1:])
        total -= float(log_p.detach().gather(1, ids[0, 1:, None])[:, 0][chosen].sum())
        count += int(chosen.sum())
    assert done.count == count
    assert done.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_documents_are_masked_where_attention_was_asked_for_by_name_and_sees_all() -> None:
    """A layer that sees a window only would see more with one mask for all layers; that model is
    told positions.
    """
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "head_dim": 16,
    }
    for sliding, apart in ((None, Apart.mask), (4, Apart.positions)):
        config = MistralConfig(**shape, sliding_window=sliding)
        model = MistralForCausalLM._from_config(config, attn_implementation="eager")
        # it adds its mask to the scores: truth values would be read as 0 and 1
        assert examine(model.eval(), CPU).apart is apart
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("window", [3, 128])
def test_a_model_of_two_kinds_of_layers_that_reads_no_positions_gets_a_mask_of_each_kind(
    window: int,
) -> None:
    """GPT-OSS computes attention eagerly, mixes layers that see all with layers of a window, and
    has experts.
    """
    config = transformers.GptOssConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    assert examine(model, CPU).apart is Apart.mask
    parts = [torch.randint(3, 50, (1, length)) for length in (8, 5)]
    positions = torch.cat([torch.arange(8), torch.arange(5)])[None]
    with torch.no_grad():
        alone = torch.cat(
            [model.base_model(part, use_cache=False).last_hidden_state for part in parts], 1
        )
        inputs = {"input_ids": torch.cat(parts, 1), "position_ids": positions}
        packed, shifted = (
            hidden_states(model, inputs, {"attention_mask": as_read_by(model, document_mask(at))})
            for at in (positions, positions.roll(1))
        )
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert (shifted - alone).abs().max() > 1e-3


def test_the_mask_of_documents() -> None:
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    )
    found = document_mask(positions)
    assert found.shape == (2, 1, 5, 5)
    torch.testing.assert_close(found[0, 0], expected.bool())
    torch.testing.assert_close(found[1, 0], torch.ones(5, 5).tril().bool())


def test_padding_of_one_family_is_left_out_and_other_classes_are_refused() -> None:
    model, teacher = tiny(Task.causal_lm), tiny(Task.causal_lm, seed=1)
    teacher.resize_token_embeddings(320)
    assert shared_vocabulary(model, teacher, Task.causal_lm) == 259
    few, many = tiny(Task.sequence_classification), tiny(Task.sequence_classification)
    many.config.num_labels = 7
    with pytest.raises(UserError, match="has 3 classes, its teacher 7"):
        shared_vocabulary(few, many, Task.sequence_classification)


def test_a_teacher_with_other_tokens_is_refused_naming_one() -> None:
    from make_assess_models import byte_tokenizer

    other = byte_tokenizer()
    other.add_tokens(["extra"])
    check_tokenizers(byte_tokenizer(), byte_tokenizer())
    with pytest.raises(UserError, match=r"token 'extra': None against 259"):
        check_tokenizers(byte_tokenizer(), other)


def test_the_hash_of_a_model_sees_one_changed_bit() -> None:
    model = tiny(Task.causal_lm)
    before = parameter_hash(model)
    assert parameter_hash(copy.deepcopy(model)) == before
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-7
    assert parameter_hash(model) != before


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
)
def test_a_hash_sees_every_bit_and_its_place(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective_module, "HASHED", 7)  # a tensor has several parts
    words = torch.arange(-10, 10).to(torch.float32).to(dtype)
    swapped, moved = words.clone(), words.clone()
    swapped[[3, 12]] = words[[12, 3]]
    moved.view(torch.uint8)[0] ^= 1

    def of(tensor: torch.Tensor) -> str:
        module = torch.nn.Module()
        module.register_buffer("words", tensor)
        return parameter_hash(module)

    assert of(words.clone()) == of(words)
    assert len({of(words), of(swapped), of(moved), of(words[:-1])}) == 4


# -- precision ------------------------------------------------------------------------------------


def test_what_a_cpu_cannot_do_has_its_reason() -> None:
    assert why_not(Precision.fp32, CPU) is None
    assert why_not(Precision.bf16, CPU) is None
    assert why_not(Precision.fp16, CPU) == "fp16 with loss scaling needs a CUDA device, this is cpu"
    assert why_not(Precision.tf32, CPU) == "tf32 needs a CUDA device, this is cpu"


@pytest.mark.parametrize(
    ("capability", "refused"),
    [
        ((7, 0), {"tf32", "bf16", "bf16_pure"}),
        ((7, 5), {"tf32", "bf16", "bf16_pure"}),
        ((8, 0), set()),
        ((9, 0), set()),
    ],
)
def test_what_a_gpu_can_do_follows_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: set[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda")
    assert {
        p.value
        for p in Precision
        if why_not(p, device) is not None and not p.value.startswith("fp8")
    } == refused


def test_bf16_multiplies_in_bf16_and_keeps_its_weights_in_fp32(tmp_path: Path) -> None:
    with arithmetic(Precision.bf16, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    with arithmetic(Precision.fp32, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    model = tiny(Task.causal_lm)
    objective = Objective(model, Task.causal_lm, Precision.bf16, CPU, PhaseClock())
    run(model, settings(), tmp_path, objective=objective)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain = tiny(Task.causal_lm)
    run(plain, settings(), tmp_path / "fp32")
    gap = max(
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
    assert 0 < gap < 0.02


@pytest.mark.parametrize("marker", ["forward", "backward"])
def test_a_deleted_phase_marker_grows_other(tmp_path: Path, marker: str) -> None:
    """What no marker claims is waste with no name; it cannot vanish."""

    class Deaf(PhaseClock):
        def phase(self, name: str) -> AbstractContextManager[None]:
            return nullcontext() if name == marker else super().phase(name)

    now = [0]

    def take(milliseconds: int) -> None:
        now[0] += 1_000_000 * milliseconds

    found: list[dict[str, int]] = []
    for clock in (PhaseClock(lambda: now[0]), Deaf(lambda: now[0])):
        model = tiny(Task.causal_lm)
        model.model.register_forward_pre_hook(lambda *_: take(3))
        model.get_input_embeddings().weight.register_hook(lambda _: take(5))
        before = clock.read_ns()
        train(
            model,
            batches_for(settings()),
            Objective(model, Task.causal_lm, Precision.fp32, CPU, clock),
            settings=settings(steps=4),
            precision=PrecisionConfig(name=Precision.fp32),
            folder=tmp_path / str(len(found)),
            clock=clock,
            hooks=hooks(),
        )
        found.append(difference(clock.read_ns(), before))
    expected = {"forward": 4 * 3_000_000, "backward": 4 * 5_000_000}
    assert found[0] == expected
    assert found[1] == {"other": expected.pop(marker), **expected}


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2", "classifier"])
def test_a_teachers_rounded_weights_compute_the_same_to_the_bit(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=2, n_positions=64)
        )
    elif kind == "untied":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=259,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                tie_word_embeddings=False,
            )
        )
    else:
        model = tiny(Task.sequence_classification if kind == "classifier" else Task.causal_lm)
    model.eval().requires_grad_(requires_grad=False)
    ids = torch.randint(3, 259, (2, 20))

    def logits(precision: Precision) -> torch.Tensor:
        with torch.no_grad(), arithmetic(precision, CPU):
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    size = lambda: sum(parameter.nbytes for parameter in model.parameters())
    exact, expected, before = logits(Precision.fp32), logits(Precision.bf16), size()
    round_weights(model, Precision.fp32)
    assert (size(), torch.equal(logits(Precision.fp32), exact)) == (before, True)
    round_weights(model, Precision.bf16)
    assert torch.equal(logits(Precision.bf16), expected)
    assert not torch.equal(exact, expected)
    rounded = [parameter for parameter in model.parameters() if parameter.dtype is torch.bfloat16]
    embedding = model.get_input_embeddings().weight
    assert embedding.dtype is torch.float32
    assert before - size() == sum(parameter.numel() * 2 for parameter in rounded)
    assert len(rounded) >= 8
