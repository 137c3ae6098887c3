"""The Triton kernel, run by Triton's interpreter on a CPU, against the plain definition."""

from __future__ import annotations

import pytest
import torch
from few import few
from test_losses import CASES, SPANS, batch, check_far_apart, exact
from test_sparse import sparse_definition

from pipeline.config.settings.distillation import Divergence
from pipeline.distillation.losses import Loss, Sparse
from pipeline.distillation.losses import sparse_terms_in_place as plain_sparse
from pipeline.distillation.losses import terms_in_place as plain
from pipeline.distillation.transform import Transform

kernel = pytest.importorskip("pipeline.distillation.triton_terms", reason="Triton is not installed")
if not kernel.triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles for a GPU here: see the tests marked gpu", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of masked lanes


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, the last one not full."""
    monkeypatch.setattr(kernel, "BLOCK", 16)


def compare(
    loss: Loss, *, teacher: bool = True, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> None:
    z, t, labels = batch(5, 40, dtype=dtype)
    z, t, labels = scale * z, scale * t[:, :37], labels % 33
    wanted, got = z.clone(), z.clone()
    expected = plain(wanted, t if teacher else None, labels, loss, 33)
    sums = kernel.terms_in_place(got, t if teacher else None, labels, loss, 33)
    assert sums.ce.item() == pytest.approx(expected.ce.item(), rel=1e-5)
    assert sums.divergence.item() == pytest.approx(expected.divergence.item(), rel=1e-4, abs=1e-5)
    close = {torch.float32: (1e-4, 1e-6), torch.bfloat16: (2**-7, 2**-12)}[dtype]
    torch.testing.assert_close(got, wanted, rtol=close[0], atol=close[1])


@pytest.mark.parametrize("loss", few(CASES, 8))
def test_it_equals_the_definition(loss: Loss) -> None:
    compare(loss)


@pytest.mark.parametrize("divergence", list(Divergence))
def test_it_equals_the_definition_on_bf16_tiles(divergence: Divergence) -> None:
    compare(Loss(0.3, divergence, 2.0, 0.4), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "divergence", [each for each in Divergence if each is not Divergence.reverse_kl]
)
def test_it_equals_the_definition_on_extreme_logits(divergence: Divergence) -> None:
    compare(Loss(0.3, divergence, 1.0, 0.4), scale=300.0)


@pytest.mark.parametrize("divergence", [None, *Divergence])
def test_what_fills_a_row_up_is_read_and_left_out(divergence: Divergence | None) -> None:
    """Whatever stands there: 64 columns are read where 33 are of the vocabulary."""
    z, t, labels = batch(5, 33, dtype=torch.float32)
    loss = Loss() if divergence is None else Loss(0.3, divergence, 2.0, 0.4)
    filled, theirs = (torch.full((5, 64), torch.nan) for _ in range(2))
    filled[:, :33], theirs[:, :33] = z, t
    labels = labels % 33
    teacher = None if divergence is None else theirs
    sums = kernel.terms_in_place(filled, teacher, labels, loss, 33)
    expected = plain(z, None if divergence is None else t, labels, loss, 33)
    assert sums.ce.item() == pytest.approx(expected.ce.item(), rel=1e-5)
    torch.testing.assert_close(filled[:, :33], z, rtol=1e-4, atol=1e-6)
    assert not filled[:, 33:].any()


def test_it_equals_the_definition_without_a_teacher() -> None:
    compare(Loss(0.0), teacher=False)


@pytest.mark.parametrize(("span", "temperature"), few([SPANS[0], SPANS[4], SPANS[-1]], 1))
@pytest.mark.parametrize("divergence", list(Divergence))
def test_logits_far_apart_are_right(
    divergence: Divergence, span: float, temperature: float
) -> None:
    check_far_apart(kernel.terms_in_place, divergence, span, temperature)


def test_an_infinite_divergence_without_weight_has_no_part_in_the_gradient() -> None:
    for divergence in Divergence:
        z, t, labels = batch(5, 40, dtype=torch.float32)
        t[:, 3:] = -torch.inf
        wanted, got = z.clone(), z.clone()
        plain(wanted, None, labels, Loss(), 40)
        sums = kernel.terms_in_place(got, t, labels, Loss(1.0, divergence), 40)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        assert torch.isfinite(sums.weighted(Loss(1.0)))


TRANSFORMS = [Transform(0.2), Transform(cap=4.0), Transform(1.5, 6.0)]


@pytest.mark.parametrize("ours", TRANSFORMS)
@pytest.mark.parametrize("divergence", list(Divergence))
def test_scales_and_caps_equal_float64_autograd(divergence: Divergence, ours: Transform) -> None:
    """Of both sides, each with its own: gradients with respect to products, over several blocks."""
    theirs, loss = Transform(0.7, 9.0), Loss(0.3, divergence, 2.0, 0.4)
    z, t, labels = batch(5, 40)
    z = (4 * z).requires_grad_()
    logits = ours.logits(z)
    value, slope = exact(logits.detach(), theirs.logits(t), labels, loss)
    (wanted,) = torch.autograd.grad(logits, z, slope)
    for run in (plain, kernel.terms_in_place):
        tile = z.detach().float()
        sums = run(tile, t.float(), labels, loss, 40, ours, theirs)
        assert sums.divergence.item() == pytest.approx(value.item(), rel=1e-5)
        torch.testing.assert_close(tile.double(), wanted, rtol=1e-4, atol=1e-6)


def test_no_rows_are_no_launch() -> None:
    sums = kernel.terms_in_place(
        torch.zeros(0, 5), None, torch.zeros(0, dtype=torch.long), Loss(), 5
    )
    assert (sums.ce.item(), sums.divergence.item()) == (0, 0)


def test_a_block_that_is_ruled_out_whole_leaves_numbers() -> None:
    """The first block holds nothing but -inf: the running maximum begins there."""
    z, t, labels = batch(2, 40, dtype=torch.float32)
    t[:, :20] = -torch.inf
    wanted, got = z.clone(), z.clone()
    expected, sums = (
        run(tile, t, labels, Loss(0.2), 40)
        for run, tile in ((plain, wanted), (kernel.terms_in_place, got))
    )
    assert sums.divergence.item() == pytest.approx(expected.divergence.item(), rel=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


# -- a cached teacher -----------------------------------------------------------------------------


def entries(rows: int, columns: int, width: int, *, residual: bool = False) -> Sparse:
    """Return entries of which some pad their row: without probability, and naming token 0 again."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(columns, generator=draw)[:width] for _ in range(rows)])
    p = torch.rand(rows, width, generator=draw)
    if not residual:
        p[:, width // 2 + 1 :] = 0
        ids[:, width // 2 + 1 :] = ids[:, :1]
    rest = torch.rand(rows, generator=draw)
    p /= (p.sum(-1) + (rest if residual else 0))[:, None]
    return Sparse(ids, p, torch.rand(rows, generator=draw), 1 - p.sum(-1) if residual else None)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("ours", TRANSFORMS)
def test_entries_meet_the_students_scale_and_cap(ours: Transform, *, residual: bool) -> None:
    z, _, labels = batch(5, 40)
    z = (4 * z).requires_grad_()
    teacher, loss = entries(5, 40, 12, residual=residual), Loss(0.3, temperature=2.0)
    expected = sparse_definition(ours.logits(z), teacher.to(torch.float64), labels, loss)
    (wanted,) = torch.autograd.grad(expected, z)
    for run in (plain_sparse, kernel.sparse_terms_in_place):
        tile = z.detach().float()
        sums = run(tile, teacher, labels, loss, 40, ours)
        assert sums.weighted(loss).item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(tile.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("ce_weight", "scale", "width"),
    [(0.0, 1.0, 12), (0.3, 1.0, 5), (0.3, 300.0, 12), (1.0, 1.0, 1)],
)
def test_a_cached_teacher_equals_the_definition(
    ce_weight: float, scale: float, width: int, temperature: float, *, residual: bool
) -> None:
    z, _, labels = batch(5, 40, dtype=torch.float32)
    teacher, loss = (
        entries(5, 33, width, residual=residual),
        Loss(ce_weight, temperature=temperature),
    )
    labels = labels % 33
    labels[0] = teacher.ids[0, 0]  # the label is an entry, too
    wanted, got = scale * z, scale * z
    expected = plain_sparse(wanted, teacher, labels, loss, 33)
    sums = kernel.sparse_terms_in_place(got, teacher, labels, loss, 33)
    assert sums.ce.item() == pytest.approx(expected.ce.item(), rel=1e-5)
    assert sums.divergence.item() == pytest.approx(expected.divergence.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert not got[:, 33:].any()


def test_a_cached_teacher_on_bf16_tiles() -> None:
    z, _, labels = batch(5, 40, dtype=torch.bfloat16)
    teacher, wanted, got = entries(5, 40, 12), z.clone(), z.clone()
    plain_sparse(wanted, teacher, labels, Loss(0.4), 40)
    kernel.sparse_terms_in_place(got, teacher, labels, Loss(0.4), 40)
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-12)
