"""The fused head against float64 autograd on materialised logits, and a case worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.distillation import head as head_module
from pipeline.distillation.head import Head, distillation_terms, head_loss


def reference(h, w, b, labels, th, tw, tb, temperature, ce_weight, vocabulary):
    """Return the mean loss by float64 autograd, as the definition reads."""
    z = F.linear(h, w, b)[:, :vocabulary]
    ce = F.cross_entropy(z, labels)
    if th is None:
        return ce
    t = F.linear(th, tw, tb)[:, :vocabulary]
    p, log_q = F.softmax(t / temperature, -1), F.log_softmax(z / temperature, -1)
    kl = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    return ce_weight * ce + (1 - ce_weight) * kl


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("chunk", [1, 7 * 4 * 37, 10**9])  # one row, a few rows with a remainder, all at once
def test_loss_and_gradients_equal_float64_autograd(monkeypatch, temperature, ce_weight, teacher, chunk) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    n, v, shared = 17, 37, 33
    h, w, b = (torch.randn(s, dtype=torch.float64) for s in ((n, 12), (v, 12), (v,)))
    th, tw = torch.randn(n, 20, dtype=torch.float64), torch.randn(v + 3, 20, dtype=torch.float64)
    labels = torch.randint(0, shared, (n,))
    leaves = [x.clone().requires_grad_() for x in (h, w, b)]
    expected = reference(*leaves, labels, th if teacher else None, tw, None, temperature, ce_weight, shared)
    wanted = torch.autograd.grad(expected * 3, leaves)

    ours = [x.float().requires_grad_() for x in (h, w, b)]
    loss, parts = head_loss(
        ours[0], Head(ours[1], ours[2]), labels, vocabulary=shared, temperature=temperature, ce_weight=ce_weight,
        teacher_hidden=th.float() if teacher else None, teacher_head=Head(tw.float(), None) if teacher else None,
    )  # fmt: skip
    got = torch.autograd.grad(loss * 3, ours)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (parts.kl.item() > 0) == teacher
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


def test_a_case_worked_by_hand() -> None:
    # Student (1/2, 1/2), teacher (3/4, 1/4), label 0: CE = ln 2; KL = 3/4 ln(3/2) + 1/4 ln(1/2).
    ce, kl, gradient = distillation_terms(
        torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([0]), temperature=1.0, ce_weight=0.5
    )
    assert ce.item() == pytest.approx(math.log(2))
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    torch.testing.assert_close(gradient, torch.tensor([[-0.375, 0.375]]))


def test_extreme_teacher_logits_stay_finite_and_nan_is_not_hidden() -> None:
    logits = torch.zeros(1, 3)
    _, kl, _ = distillation_terms(
        logits, torch.tensor([[0.0, -torch.inf, -1e4]]), torch.tensor([0]), temperature=1.0, ce_weight=0.0
    )
    assert kl.item() == pytest.approx(math.log(3))
    _, kl, _ = distillation_terms(logits * torch.nan, logits, torch.tensor([0]), temperature=1.0, ce_weight=0.0)
    assert math.isnan(kl.item())
