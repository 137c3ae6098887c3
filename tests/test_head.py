"""The fused head against float64 autograd on materialised logits, and against peers' heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_losses import definition
from torch import Tensor

from pipeline.config.settings.distillation import Divergence
from pipeline.distillation import head as head_module
from pipeline.distillation.head import Head, Taught, head_loss
from pipeline.distillation.losses import Loss, Sums, terms_in_place
from pipeline.distillation.transform import Transform
from pipeline.ledger.devices.cpu import Cpu


def reference(h, w, b, labels, th, tw, tb, loss, vocabulary):
    """Return the mean loss by float64 autograd, as the definition reads."""
    z = F.linear(h, w, b)[:, :vocabulary]
    if th is None:
        return F.cross_entropy(z, labels)
    return definition(z, F.linear(th, tw, tb)[:, :vocabulary], labels, loss) / len(labels)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("teacher", [False, True])
# one row, a few rows with a remainder, all at once
@pytest.mark.parametrize("tile", [1, 7 * 4 * 77, 10**9])
def test_loss_and_gradients_equal_float64_autograd(
    monkeypatch, temperature, ce_weight, teacher, tile
) -> None:
    monkeypatch.setattr(head_module, "TILE_BYTES", tile)
    torch.manual_seed(0)
    n, v, shared = 17, 37, 33
    h, w, b = (torch.randn(s, dtype=torch.float64) for s in ((n, 12), (v, 12), (v,)))
    th, tw = torch.randn(n, 20, dtype=torch.float64), torch.randn(v + 3, 20, dtype=torch.float64)
    labels = torch.randint(0, shared, (n,))
    loss = Loss(ce_weight, Divergence.forward_kl, temperature)
    leaves = [x.clone().requires_grad_() for x in (h, w, b)]
    expected = reference(*leaves, labels, th if teacher else None, tw, None, loss, shared)
    wanted = torch.autograd.grad(expected * 3, leaves)

    ours = [x.float().requires_grad_() for x in (h, w, b)]
    taught = Taught(th.float(), Head(tw.float(), None), torch.float32) if teacher else None
    value, sums = head_loss(
        ours[0], Head(ours[1], ours[2]), labels, vocabulary=shared, loss=loss, taught=taught
    )
    got = torch.autograd.grad(value * 3, ours)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (sums.divergence.item() > 0) == teacher
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", list(Divergence))
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, divergence: Divergence) -> None:
    """Every gradient against finite differences, in float64 throughout, over several chunks."""
    monkeypatch.setattr(head_module, "TILE_BYTES", 2 * 2 * 8 * 11)
    torch.manual_seed(1)
    h, w, b, th, tw = (
        torch.randn(s, dtype=torch.float64) for s in ((5, 4), (11, 4), (11,), (5, 6), (11, 6))
    )
    labels = torch.randint(0, 11, (5,))

    def mean_loss(*leaves: Tensor) -> Tensor:
        taught = Taught(th, Head(tw, None), torch.float64)
        loss = Loss(0.3, divergence, 1.5, 0.4)
        return head_loss(
            leaves[0],
            Head(leaves[1], leaves[2]),
            labels,
            loss=loss,
            dtype=torch.float64,
            taught=taught,
        )[0]

    assert torch.autograd.gradcheck(mean_loss, [leaf.requires_grad_() for leaf in (h, w, b)])


def test_the_gradient_of_the_weight_is_not_rounded_chunk_by_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bf16 tiles, 64 chunks: what each adds is kept in fp32, so that the sum is as good as one
    product in fp32.
    """
    torch.manual_seed(2)
    h, w, labels = torch.randn(64, 16), torch.randn(50, 16) / 4, torch.randint(0, 50, (64,))
    found: list[Tensor] = []

    def remembering(tile: Tensor, *rest):
        sums = terms_in_place(tile, *rest)
        found.append(tile.clone())
        return sums

    monkeypatch.setattr(head_module, "TILE_BYTES", 1)
    leaf = w.clone().requires_grad_()
    value, _ = head_loss(h, Head(leaf, None), labels, dtype=torch.bfloat16, terms=remembering)
    value.backward()
    exact = torch.cat(found).double().T @ h.bfloat16().double() / 64
    assert len(found) == 64
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_the_weight_is_rounded_once_where_one_chunk_holds_all() -> None:
    """As autocast's own product is: no nearer to fp32, and no farther from it."""
    torch.manual_seed(2)
    h, w, labels = torch.randn(64, 16), torch.randn(50, 16) / 4, torch.randint(0, 50, (64,))
    leaf, plain = (w.clone().requires_grad_() for _ in range(2))
    value, _ = head_loss(h, Head(leaf, None), labels, dtype=torch.bfloat16)
    value.backward()
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(h, plain)
    F.cross_entropy(logits.float(), labels).backward()
    exact = w.double().requires_grad_()
    products = h.bfloat16().double() @ exact.bfloat16().double().T
    F.cross_entropy(products, labels).backward()
    assert leaf.grad is not None
    assert plain.grad is not None
    assert exact.grad is not None
    ours, theirs = ((each.grad.double() - exact.grad).norm() for each in (leaf, plain))
    assert ours < 1.1 * theirs
    assert ours / exact.grad.norm() < 2**-8


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_none_is_held(
    monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    torch.manual_seed(4)
    leaves = {"hidden": torch.randn(6, 8), "weight": torch.randn(20, 8), "bias": torch.randn(20)}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    made: list[Tensor] = []
    add = head_module._add_product
    monkeypatch.setattr(
        head_module, "_add_product", lambda total, *rest: (made.append(total), add(total, *rest))
    )
    head = Head(leaves["weight"], leaves["bias"])
    value, _ = head_loss(leaves["hidden"], head, torch.arange(6))
    held = [None if each is None else each.shape for each in value.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert held == [None if name == frozen else leaf.shape for name, leaf in leaves.items()]
    assert bool(made) == (frozen != "weight")
    value.backward()
    plain = {
        name: leaf.detach().clone().requires_grad_(name != frozen) for name, leaf in leaves.items()
    }
    F.cross_entropy(F.linear(*plain.values()), torch.arange(6)).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name == frozen)
        if name != frozen:
            torch.testing.assert_close(leaf.grad, plain[name].grad)


def test_a_loss_that_is_only_read_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        head_module, "_add_product", lambda *_: pytest.fail("nobody will ask for this gradient")
    )
    h, w = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    with torch.no_grad():
        value, _ = head_loss(h, Head(w, None), torch.arange(6))
    assert value.item() == pytest.approx(F.cross_entropy(h @ w.T, torch.arange(6)).item(), rel=1e-5)


def test_a_gradient_is_rounded_to_16_bits_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fp32 has of it is multiplied and rounded a few rows at a time: no second matrix in 32
    bits.
    """
    monkeypatch.setattr(head_module, "WEIGHT_TILE_BYTES", 3 * 4 * 8)
    h, w = torch.randn(9, 8).bfloat16(), torch.randn(20, 8).bfloat16().requires_grad_()
    value, _ = head_loss(h, Head(w, None), torch.arange(9), dtype=torch.bfloat16)
    value.backward()
    wide = w.detach().float().requires_grad_()
    F.cross_entropy(h.float() @ wide.T, torch.arange(9)).backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.bfloat16
    assert (w.grad.float() - wide.grad).norm() < 1e-2 * wide.grad.norm()


def test_no_predicted_token_has_no_loss_and_no_gradient() -> None:
    h, w = torch.zeros(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    value, _ = head_loss(h, Head(w, None), torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert w.grad is not None
    assert not w.grad.any()


def test_it_equals_trls_fused_head() -> None:
    fused = pytest.importorskip("trl.kernels.chunked_divergence", reason="TRL is not installed")
    torch.manual_seed(3)
    h, w, th, tw = (torch.randn(s) for s in ((9, 8), (40, 8), (9, 12), (40, 12)))
    for beta, divergence in ((0.0, "forward_kl"), (0.3, "jsd"), (1.0, "reverse_kl")):
        theirs, ours = ([x.clone().requires_grad_() for x in (h, w)] for _ in range(2))
        per_token, _ = fused.ChunkedDivergenceFunction.apply(*theirs, None, th, tw, None, beta, 1.0)
        per_token.mean().backward()
        loss = Loss(0.0, Divergence(divergence), 1.0, beta or 0.5)
        taught = Taught(th, Head(tw, None), torch.float32)
        value, _ = head_loss(
            ours[0], Head(ours[1], None), torch.zeros(9, dtype=torch.long), loss=loss, taught=taught
        )
        value.backward()
        assert value.item() == pytest.approx(per_token.mean().item(), rel=1e-5)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


# -- a vocabulary that is filled up ---------------------------------------------------------------


@pytest.mark.parametrize("divergence", [None, *Divergence])
@pytest.mark.parametrize("columns", [None, 45])
def test_rows_of_zeros_below_a_head_change_nothing(
    divergence: Divergence | None, columns: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU an odd vocabulary is filled up to a multiple of 64, of the student and of its
    teacher, each to its own.
    """
    torch.manual_seed(6)
    labels = torch.randint(0, 40, (9,))
    given = {
        "hidden": torch.randn(9, 8, dtype=torch.float64),
        "weight": torch.randn(50, 8, dtype=torch.float64),
        "bias": torch.randn(50, dtype=torch.float64),
    }
    theirs = Head(torch.randn(131, 6, dtype=torch.float64), torch.randn(131, dtype=torch.float64))
    taught = Taught(torch.randn(9, 6, dtype=torch.float64), theirs, torch.float64)
    loss = Loss() if divergence is None else Loss(0.4, divergence, 2.0, 0.3)

    def of(width: int) -> tuple[Tensor, list[Tensor], list[int]]:
        monkeypatch.setattr(Cpu, "product_width", width)
        leaves = {name: each.clone().requires_grad_() for name, each in given.items()}
        seen: list[int] = []

        def noting(tile: Tensor, *rest: Any) -> Sums:
            seen.append(tile.shape[1])
            return terms_in_place(tile, *rest)

        value, _ = head_loss(
            leaves["hidden"],
            Head(leaves["weight"], leaves["bias"], Transform(1.3, 20.0, columns)),
            labels,
            loss=loss,
            dtype=torch.float64,
            vocabulary=columns or 50,
            taught=None if divergence is None else taught,
            terms=noting,
        )
        value.backward()
        grads = [each.grad for each in leaves.values()]
        assert all(grad is not None for grad in grads)
        return value.detach(), [grad for grad in grads if grad is not None], seen

    wanted, grads, narrow = of(1)
    found, filled, wide = of(64)
    assert set(narrow) == {50}
    assert set(wide) == {64}
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for ours, plain in zip(filled, grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_no_second_gradient_of_the_size_of_the_weight_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that was summed up is scaled where it is and becomes `weight.grad`; a graph that is
    kept is left as it was.
    """
    made: list[Tensor] = []
    add = head_module._add_product
    monkeypatch.setattr(
        head_module, "_add_product", lambda total, *rest: (made.append(total), add(total, *rest))
    )
    hidden, labels = torch.randn(6, 8), torch.arange(6)
    leaf = torch.randn(20, 8, requires_grad=True)
    value, _ = head_loss(hidden, Head(leaf, None), labels)
    value.backward()
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() == made[0].data_ptr()
    value, _ = head_loss(hidden, Head(leaf, None), labels)
    first, second = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, leaf.grad)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
