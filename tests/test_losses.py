"""The losses against float64 autograd over their definitions, peers' functions, and cases worked by
hand.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.settings.distillation import Divergence
from pipeline.distillation import losses
from pipeline.distillation.losses import Loss, Sums, terms, terms_in_place

CASES = [
    Loss(weight, divergence, temperature, mixture)
    for divergence, weight, temperature in itertools.product(
        Divergence, (0.0, 0.3, 1.0), (1.0, 2.5)
    )
    for mixture in (
        (0.1, 0.7) if divergence not in (Divergence.forward_kl, Divergence.reverse_kl) else (0.5,)
    )
]


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Return sum(a ln(a/b)) as the definition reads, where a is nowhere 0."""
    return (a * (a.log() - b.log())).sum()


def definition(z: Tensor, t: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Return the summed loss, by the words of the module's head."""
    q, p, share = (
        F.softmax(z / loss.temperature, -1),
        F.softmax(t / loss.temperature, -1),
        loss.mixture,
    )
    value = {
        Divergence.forward_kl: lambda: kl(p, q),
        Divergence.reverse_kl: lambda: kl(q, p),
        Divergence.jsd: lambda: (
            share * kl(p, share * p + (1 - share) * q)
            + (1 - share) * kl(q, share * p + (1 - share) * q)
        ),
        Divergence.skewed_kl: lambda: kl(p, share * p + (1 - share) * q),
        Divergence.skewed_reverse_kl: lambda: kl(q, share * q + (1 - share) * p),
    }[loss.divergence]()
    hard = F.cross_entropy(z, labels, reduction="sum")
    return loss.ce_weight * hard + (1 - loss.ce_weight) * loss.temperature**2 * value


def batch(
    rows: int = 7, columns: int = 33, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows * columns)
    logits = (3 * torch.randn(rows, columns, dtype=torch.float64).to(dtype) for _ in range(2))
    return (*logits, torch.randint(0, columns, (rows,)))


@pytest.mark.parametrize("loss", CASES)
def test_values_and_gradients_equal_float64_autograd(loss: Loss) -> None:
    z, t, labels = batch()
    z.requires_grad_()
    expected = definition(z, t, labels, loss)
    (wanted,) = torch.autograd.grad(expected, z)
    sums, gradient = terms(z.detach(), t, labels, loss)
    assert sums.weighted(loss).item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss", CASES)
def test_fp32_is_as_near_as_fp32_can_be(loss: Loss) -> None:
    z, t, labels = batch(50, 400)
    exact_sums, exact = terms(z, t, labels, loss)
    sums, gradient = terms(z.float(), t.float(), labels, loss)
    assert sums.weighted(loss).item() == pytest.approx(exact_sums.weighted(loss).item(), rel=2e-5)
    torch.testing.assert_close(gradient.double(), exact, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 3, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_becomes_its_gradient_block_by_block(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    """Padding of either vocabulary takes no part: it gets no gradient, and what it holds changes
    nothing.
    """
    monkeypatch.setattr(losses, "BLOCK_BYTES", rows * 4 * 29)
    z, t, labels = batch(11, 33, dtype=dtype)
    labels %= 29
    loss = Loss(0.3, Divergence.jsd, 2.0, 0.4)
    tile, theirs = z.clone(), torch.cat([t[:, :29], torch.full((11, 9), 1e4, dtype=dtype)], 1)
    sums = terms_in_place(tile, theirs, labels, loss, 29)
    expected, gradient = terms(z[:, :29].float(), t[:, :29].float(), labels, loss)
    assert sums.ce.item() == pytest.approx(expected.ce.item(), rel=1e-5)
    assert sums.divergence.item() == pytest.approx(expected.divergence.item(), rel=1e-5)
    torch.testing.assert_close(tile[:, :29], gradient.to(dtype))
    assert not tile[:, 29:].any()


def test_without_a_teacher_it_is_cross_entropy_whatever_the_weight() -> None:
    z, _, labels = batch()
    z.requires_grad_()
    expected = F.cross_entropy(z, labels, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, z)
    for weight in (0.0, 0.4):
        sums, gradient = terms(z.detach(), None, labels, Loss(weight))
        assert (sums.ce.item(), sums.divergence.item()) == (pytest.approx(expected.item()), 0)
        torch.testing.assert_close(gradient, wanted)


def test_no_tokens_have_no_loss() -> None:
    for teacher in (None, torch.zeros(0, 5)):
        tile = torch.zeros(0, 5)
        sums = terms_in_place(tile, teacher, torch.zeros(0, dtype=torch.long), Loss(0.5), 5)
        assert (sums.ce.item(), sums.divergence.item()) == (0, 0)


def test_cases_worked_by_hand() -> None:
    """Student (1/2, 1/2), teacher (3/4, 1/4), label 0; the mixture at 1/2 is (5/8, 3/8)."""
    z, t, labels = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([0])
    ln = math.log
    by_hand = {
        Divergence.forward_kl: 0.75 * ln(1.5) + 0.25 * ln(0.5),
        Divergence.reverse_kl: 0.5 * ln(2 / 3) + 0.5 * ln(2),
        Divergence.jsd: (
            (0.75 * ln(6 / 5) + 0.25 * ln(2 / 3)) / 2 + (0.5 * ln(4 / 5) + 0.5 * ln(4 / 3)) / 2
        ),
        Divergence.skewed_kl: 0.75 * ln(6 / 5) + 0.25 * ln(2 / 3),
        Divergence.skewed_reverse_kl: 0.5 * ln(4 / 5) + 0.5 * ln(4 / 3),
    }
    for divergence, value in by_hand.items():
        sums, _ = terms(z, t, labels, Loss(0.5, divergence))
        assert sums.ce.item() == pytest.approx(ln(2))
        assert sums.divergence.item() == pytest.approx(value, rel=1e-5)
    _, gradient = terms(z, t, labels, Loss(0.5))
    torch.testing.assert_close(gradient, torch.tensor([[-0.375, 0.375]]))


@pytest.mark.parametrize("divergence", list(Divergence))
def test_a_token_that_the_teacher_rules_out(divergence: Divergence) -> None:
    """0 ln 0 is 0. Reverse KL alone charges a student that allows the token, without end."""
    teacher = torch.tensor([[0.0, -torch.inf, -1e4]])
    sums, gradient = terms(torch.zeros(1, 3), teacher, torch.tensor([0]), Loss(0.0, divergence))
    if divergence is Divergence.reverse_kl:
        assert sums.divergence.item() == torch.inf
        return
    assert torch.isfinite(sums.divergence)
    assert torch.isfinite(gradient).all()
    if divergence is Divergence.forward_kl:
        assert sums.divergence.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("divergence", list(Divergence))
def test_logits_of_any_size_are_finite_and_nan_is_not_hidden(divergence: Divergence) -> None:
    z, t, labels = batch(4, 9, dtype=torch.float32)
    sums, gradient = terms(1e4 * z, 1e4 * t.roll(1, 0), labels, Loss(0.5, divergence))
    assert torch.isfinite(sums.ce)
    assert torch.isfinite(gradient).all()
    sums, _ = terms(z * torch.nan, t, labels, Loss(0.5, divergence))
    assert math.isnan(sums.divergence.item())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("divergence", "beta"), [("forward_kl", 0.0), ("jsd", 0.3), ("reverse_kl", 1.0)]
)
def test_it_equals_trl_and_liger_but_for_the_factor_of_temperature(
    divergence: str, beta: float, temperature: float
) -> None:
    """Neither multiplies by T^2, so a temperature makes their gradients smaller. In TRL beta is the
    teacher's share.
    """
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed").GKDTrainer
    liger = pytest.importorskip(
        "liger_kernel.chunked_loss.jsd_loss", reason="Liger is not installed"
    )
    z, t, labels = batch(6, 40, dtype=torch.float32)
    loss = Loss(0.0, Divergence(divergence), temperature, beta or 0.5)
    sums, _ = terms(z, t, labels, loss)
    ours = sums.divergence.item() / temperature**2
    theirs = gkd.generalized_jsd_loss(
        z[None], t[None], beta=beta, temperature=temperature, reduction="sum"
    )
    assert ours == pytest.approx(theirs.item(), rel=1e-4)
    value = liger.LigerFusedLinearJSDFunction.distillation_loss_fn(
        z / temperature, t / temperature, beta=beta
    )
    assert ours == pytest.approx(value.item(), rel=1e-4)


SPANS = [(span, temperature) for span in (1e2, 1e3, 1e4) for temperature in (1.0, 0.3, 0.1)]


def far_apart(span: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits over a span, with a few tokens at the top of each row that are near to each
    other.
    """
    draw = torch.Generator().manual_seed(int(span / temperature))
    rows, columns = 12, 40

    def logits(first: int) -> Tensor:
        found = span * torch.rand(rows, columns, generator=draw, dtype=torch.float64) - span / 2
        top = temperature * torch.randn(rows, 4, generator=draw, dtype=torch.float64)
        found[:, first : first + 4] = span / 2 + 10 + top
        found[::3, first + 6] = span / 2 + 10 - 60 * temperature  # what one model all but rules out
        return found.float().double()

    z, t = logits(0), logits(2)
    t[:4, :2] = z[:4, :2] = span / 2 + 10
    return z, t, torch.randint(0, 6, (rows,), generator=draw)


def exact(z: Tensor, t: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return the sum of the divergence and the gradient of the weighted loss, by float64 autograd
    in log space.
    """
    z = z.clone().requires_grad_()
    log_q, log_p = F.log_softmax(z / loss.temperature, -1), F.log_softmax(t / loss.temperature, -1)
    a = loss.mixture
    mix = lambda one, other: torch.logaddexp(one + math.log(a), other + math.log1p(-a))
    kl = lambda one, other: (one.exp() * (one - other)).sum()
    value = {
        Divergence.forward_kl: lambda: kl(log_p, log_q),
        Divergence.reverse_kl: lambda: kl(log_q, log_p),
        Divergence.jsd: (
            lambda: a * kl(log_p, mix(log_p, log_q)) + (1 - a) * kl(log_q, mix(log_p, log_q))
        ),
        Divergence.skewed_kl: lambda: kl(log_p, mix(log_p, log_q)),
        Divergence.skewed_reverse_kl: lambda: kl(log_q, mix(log_q, log_p)),
    }[loss.divergence]() * loss.temperature**2
    hard = F.cross_entropy(z, labels, reduction="sum")
    total = loss.ce_weight * hard + (1 - loss.ce_weight) * value
    return value.detach(), torch.autograd.grad(total, z)[0]


def check_far_apart(run: Any, divergence: Divergence, span: float, temperature: float) -> None:
    """Compare value and gradient of fp32 code, called as `terms_in_place` is, with float64."""
    z, t, labels = far_apart(span, temperature)
    for weight in (0.0, 0.5):
        loss = Loss(weight, divergence, temperature, 0.3)
        value, wanted = exact(z, t, labels, loss)
        tile = z.float()
        sums = run(tile, t.float(), labels, loss, z.shape[1])
        assert sums.divergence.item() == pytest.approx(value.item(), rel=1e-5)
        assert (tile.double() - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize(("span", "temperature"), SPANS)
@pytest.mark.parametrize("divergence", list(Divergence))
def test_logits_far_apart_are_right(
    divergence: Divergence, span: float, temperature: float
) -> None:
    """Mixtures in log space: neither model's probabilities may underflow the other's share in
    them.
    """
    check_far_apart(terms_in_place, divergence, span, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize(
    "divergence", [Divergence.jsd, Divergence.skewed_kl, Divergence.skewed_reverse_kl]
)
def test_ordinary_logits_over_a_large_vocabulary_are_finite(
    divergence: Divergence, temperature: float
) -> None:
    torch.manual_seed(0)
    z, t = (5 * torch.randn(2, 152_064) for _ in range(2))
    labels, loss = torch.tensor([0, 1]), Loss(0.0, divergence, temperature)
    sums, gradient = terms(z, t, labels, loss)
    value, wanted = exact(z.double(), t.double(), labels, loss)
    assert sums.divergence.item() == pytest.approx(value.item(), rel=1e-4)
    assert (gradient.double() - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7


@pytest.mark.parametrize("divergence", list(Divergence))
def test_an_infinite_part_without_weight_has_no_part_in_the_loss(divergence: Divergence) -> None:
    """Labels alone (weight 1) beside a teacher that rules out what the student allows, and the
    other way round.
    """
    z, t, labels = batch(5, 9, dtype=torch.float32)
    t[:, 3:] = -torch.inf
    loss = Loss(1.0, divergence)
    tile = z.clone()
    sums = terms_in_place(tile, t, labels, loss, 9)
    hard = F.cross_entropy(z, labels, reduction="sum")
    assert sums.weighted(loss).item() == pytest.approx(hard.item(), rel=1e-6)
    torch.testing.assert_close(tile, terms(z, None, labels, loss)[1])
    assert math.isfinite(Sums(torch.tensor(torch.inf), sums.ce).weighted(Loss(0.0)).item())
