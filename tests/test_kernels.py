"""Kernels of the distillation head: one contract for ours and Liger's, and the probe between
them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import tiny
from make_heads import made
from test_head import reference
from test_training_loop import CPU, batches_for, settings
from torch import Tensor

from pipeline.config.settings.distillation import Divergence, HeadKernel
from pipeline.config.settings.precision import Precision
from pipeline.distillation import head as head_module
from pipeline.distillation import kernels
from pipeline.distillation.head import Head, Taught, head_loss
from pipeline.distillation.kernels import fastest, in_words, kernel_of, liger_head_loss, why_not
from pipeline.distillation.losses import Loss, Sparse, Sums, terms_in_place
from pipeline.errors import UserError
from pipeline.ledger.devices.cpu import Cpu
from pipeline.ledger.phases import PhaseClock
from pipeline.stages import head_choice
from pipeline.stages.head_choice import choose_head, probe_heads
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective, Teacher
from pipeline.training.reading import examine

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not HAS_LIGER, reason="liger-kernel is not installed")
N, V, H, H_T = 23, 37, 12, 20


def inputs(vocabulary: int = V) -> tuple[Tensor, Head, Tensor, Taught]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H), torch.randn(V, H) / H**0.5
    taught = Taught(
        torch.randn(N, H_T), Head(torch.randn(vocabulary, H_T) / H_T**0.5, None), torch.float32
    )
    return hidden, Head(weight, None), torch.randint(V, (N,)), taught


@needs_liger
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    "divergence", [Divergence.forward_kl, Divergence.reverse_kl, Divergence.jsd]
)
def test_liger_computes_the_same_loss(
    divergence: Divergence, temperature: float, ce_weight: float
) -> None:
    """Value, both sums and both gradients, against float64 autograd over the definition."""
    hidden, head, labels, taught = inputs()
    loss = Loss(ce_weight, divergence, temperature, 0.3)
    leaves = [each.clone().requires_grad_() for each in (hidden, head.weight)]
    value, sums = liger_head_loss(
        leaves[0],
        Head(leaves[1], None),
        labels,
        loss=loss,
        dtype=torch.float32,
        vocabulary=V,
        taught=taught,
    )
    wide = [each.double().requires_grad_() for each in (hidden, head.weight)]
    expected = reference(
        *wide, None, labels, taught.hidden.double(), taught.head.weight.double(), None, loss, V
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, wide), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)
    _, ours = head_loss(hidden, head, labels, loss=loss, taught=taught)
    assert sums.ce.item() == pytest.approx(ours.ce.item(), rel=1e-4)
    assert sums.divergence.item() == pytest.approx(ours.divergence.item(), rel=1e-4)


@needs_liger
def test_liger_is_not_given_padded_vocabularies() -> None:
    hidden, head, labels, taught = inputs(vocabulary=V + 3)
    with pytest.raises(ValueError, match="vocabularies of 37 and 40"):
        liger_head_loss(
            hidden, head, labels, loss=Loss(0.5), dtype=torch.float32, vocabulary=V, taught=taught
        )


def slow(*args: Any, **more: Any) -> tuple[Tensor, Sums]:
    for _ in range(20):
        head_loss(*args, **more)
    return head_loss(*args, **more)


def wrong(*args: Any, **more: Any) -> tuple[Tensor, Sums]:
    value, sums = head_loss(*args, **more)
    return value * 1.01, sums


def refusing(*_: Any, **__: Any) -> tuple[Tensor, Sums]:
    raise ValueError("not these shapes")


def test_the_fastest_kernel_that_is_right_is_taken() -> None:
    hidden, head, labels, taught = inputs()
    more = {"loss": Loss(0.3), "dtype": torch.float32, "vocabulary": V, "taught": taught}
    named = {HeadKernel.torch: slow, HeadKernel.triton: head_loss, HeadKernel.liger: wrong}
    chosen, found = fastest(named, hidden, head, labels, **more)
    assert chosen is HeadKernel.triton
    assert found[HeadKernel.triton].seconds < found[HeadKernel.torch].seconds
    assert "off by" in str(found[HeadKernel.liger].why_not)
    assert in_words(chosen, found).startswith("head: triton (")
    assert "liger off by 1.0e-02, 0.0001 allowed" in in_words(chosen, found)
    chosen, found = fastest(
        {HeadKernel.torch: slow, HeadKernel.liger: refusing}, hidden, head, labels, **more
    )
    assert (chosen, found[HeadKernel.liger].why_not) == (HeadKernel.torch, "not these shapes")


def test_a_kernel_that_gives_nan_is_not_taken() -> None:
    hidden, head, labels, taught = inputs()
    broken = lambda *args, **more: (head_loss(*args, **more)[0] * float("nan"), None)
    more = {"loss": Loss(0.3), "dtype": torch.float32, "vocabulary": V, "taught": taught}
    chosen, found = fastest(
        {HeadKernel.torch: slow, HeadKernel.triton: broken}, hidden, head, labels, **more
    )
    assert chosen is HeadKernel.torch
    assert "off by inf" in str(found[HeadKernel.triton].why_not)


def objective_for(**teacher: Any) -> Objective:
    model, taught = tiny(Task.causal_lm), tiny(Task.causal_lm, seed=1).eval()
    return Objective(
        model,
        Task.causal_lm,
        Precision.fp32,
        CPU,
        PhaseClock(),
        Teacher(taught, Precision.fp32, Loss(0.3, **teacher)),
    )


@needs_liger
def test_the_probe_reads_a_real_micro_batch_and_changes_nothing() -> None:
    objective, config = objective_for(), settings(gradient_accumulation=2)
    batches = batches_for(config)
    before, state = (
        torch.random.get_rng_state(),
        [p.detach().clone() for p in objective.model.parameters()],
    )
    expected = objective(batches.batch(0)).loss.item()
    with objective.clock.phase("other"):
        said = probe_heads(objective, batches, config)["said"]
    assert said is not None
    assert {"torch", "liger"} <= set(
        said.replace(":", " ").replace("(", " ").replace(";", " ").split()
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(
        torch.equal(old, new) for old, new in zip(state, objective.model.parameters(), strict=True)
    )
    assert objective(batches.batch(0)).loss.item() == pytest.approx(expected, rel=1e-5)
    assert objective.clock.read_ns()["search"] > 0


def test_a_cpu_needs_no_probe_and_a_named_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batches = objective_for(), batches_for(settings())
    assert (
        choose_head("stages.student.head", HeadKernel.auto, objective, batches, settings()) is None
    )
    assert objective.head_loss is head_loss
    used: list[str] = []

    def noting(*args: Any, **more: Any) -> tuple[Tensor, Sums]:
        used.append("liger")
        return head_loss(*args, **more)

    monkeypatch.setattr(kernels, "liger_head_loss", noting)
    assert (
        choose_head("stages.student.head", HeadKernel.liger, objective, batches, settings()) is None
    )
    objective(batches.batch(0))
    assert used == ["liger"]


def test_chunks_are_as_long_as_is_fastest_and_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for a device with Triton: lengths that fit its free memory are timed in turns; an
    attempt that goes on takes over what was found.
    """
    objective, config = objective_for(), settings(batch_size=16, sequence_length=64)
    batches = batches_for(config)
    tried: list[list[int]] = []

    def timed(able: dict[int, Any], *inputs: Any, **asked: Any) -> dict[int, float]:
        tried.append(list(able))
        values = [each(*inputs, **asked)[0].item() for each in able.values()]
        assert values == pytest.approx([values[0]] * len(values))
        return {rows: 1.0 + abs(rows - 32) for rows in able}

    monkeypatch.setattr(Cpu, "triton", True)
    monkeypatch.setattr(Cpu, "counts_memory", True)
    row_bytes = 2 * 259 * 4  # student's and teacher's logits of a token, fp32
    free = int(100 * row_bytes / head_choice.MEMORY)
    monkeypatch.setattr(Cpu, "free_bytes", lambda _: (free, 2 * free))
    monkeypatch.setattr(head_choice, "ROWS", (8, 32, 64, 128))
    monkeypatch.setattr(head_choice, "in_turns", timed)
    monkeypatch.setattr(head_module, "default_terms", lambda *_, **__: terms_in_place)
    given: Any = ("stages.s.head", HeadKernel.torch, objective, batches, config)
    found = choose_head(*given, folder=tmp_path)
    assert tried == [[8, 32, 64]] * 2  # 128 do not fit; the first turn asks for memory
    assert found == {
        "kernel": "torch",
        "rows": 32,
        "said": "chunks of 32 tokens (1e+03 ms; 8 2.5e+04 ms, 64 3.3e+04 ms)",
    }
    chunks: list[int] = []
    add = head_module._add_product
    monkeypatch.setattr(
        head_module,
        "_add_product",
        lambda total, tile, h: (chunks.append(len(h)), add(total, tile, h)),
    )
    objective(batches.batch(0))
    assert max(chunks) == 32
    assert choose_head(*given, folder=tmp_path) == found
    assert len(tried) == 2
    # where there is no room to choose, the device's own chunks stay
    monkeypatch.setattr(Cpu, "free_bytes", lambda _: (free // 20, free))
    other = choose_head(*given)
    assert other == {"kernel": "torch", "rows": None, "said": None}


def test_liger_is_refused_where_vocabularies_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_for()
    assert objective.teacher is not None
    objective.teacher.model.resize_token_embeddings(objective.model.config.vocab_size + 8)
    with pytest.raises(UserError, match=r"stages.student.head: Liger takes one vocabulary"):
        choose_head(
            "stages.student.head", HeadKernel.liger, objective, batches_for(settings()), settings()
        )


@needs_liger
@pytest.mark.parametrize(
    ("student", "teacher"), [("gemma3", "llama"), ("llama", "cohere2"), ("bert", "llama")]
)
def test_liger_is_refused_where_logits_are_more_than_a_product(student: str, teacher: str) -> None:
    """By name in the settings; and `auto` leaves it out, with that reason, where a head is
    known.
    """
    models = made(student), made(teacher, seed=1)
    examined = [examine(each, CPU) for each in models]
    taught = Teacher(models[1], Precision.fp32, Loss(0.3), examined[1])
    objective = Objective(
        models[0], Task.causal_lm, Precision.fp32, CPU, PhaseClock(), taught, read=examined[0]
    )
    with pytest.raises(
        UserError, match=r"stages.s.head: Liger computes .* plain product"
    ) as refusal:
        choose_head("stages.s.head", HeadKernel.liger, objective, None, settings())
    assert {"gemma3": "soft cap 20", "llama": "scale 0.5", "bert": "Bert"}[student] in str(
        refusal.value
    )
    if student != "bert":
        hidden, labels = torch.randn(5, 32), torch.arange(5)
        heads = [Head.of(each, known.head) for each, known in zip(models, examined, strict=True)]
        more = {"loss": Loss(0.3), "dtype": torch.float32, "vocabulary": 99}
        live = Taught(torch.randn(5, 32), heads[1], torch.float32)
        named = {HeadKernel.torch: kernel_of(HeadKernel.torch), HeadKernel.liger: liger_head_loss}
        chosen, found = fastest(named, hidden, heads[0], labels, taught=live, **more)
        assert chosen is HeadKernel.torch
        assert "plain product" in str(found[HeadKernel.liger].why_not)


def test_a_kernel_has_no_effect_where_logits_are_held_in_full() -> None:
    model = made("bert")
    own = examine(model, CPU)
    objective = Objective(model, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), read=own)
    found = choose_head("stages.s.head", HeadKernel.torch, objective, None, settings())
    assert found is not None
    assert found["said"] == "head=torch has no effect: logits are held in full"
    assert choose_head("stages.s.head", HeadKernel.auto, objective, None, settings()) is None


def test_what_a_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA" in str(why_not(HeadKernel.triton, CPU))
    assert why_not(HeadKernel.torch, CPU) is None
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert "pip install liger-kernel" in str(why_not(HeadKernel.liger, CPU))
    assert kernel_of(HeadKernel.auto) is head_loss


def test_a_named_kernel_reads_a_cached_teacher_too() -> None:
    hidden, head, labels = torch.randn(6, 8), Head(torch.randn(20, 8), None), torch.arange(6)
    p = torch.rand(6, 3)
    said = Sparse(torch.arange(3).repeat(6, 1), p / p.sum(-1, keepdim=True), torch.rand(6))
    more: dict[str, Any] = {"taught": said, "loss": Loss(0.4)}
    expected, _ = head_loss(hidden, head, labels, **more)
    assert kernel_of(HeadKernel.torch)(hidden, head, labels, **more)[0].item() == pytest.approx(
        expected.item()
    )
