"""Sparse targets: the losses against float64 autograd, draws against the distribution, and the
bytes they take.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_losses import batch, definition
from torch import Tensor

from pipeline.config.settings.distillation import Divergence
from pipeline.distillation import head as head_module
from pipeline.distillation import losses
from pipeline.distillation.head import Head, Taught, head_loss
from pipeline.distillation.losses import Loss, Sparse, sparse_terms, sparse_terms_in_place
from pipeline.distillation.sparse import SPARE_BYTES, TOKEN_BYTES, Sampled, TopK, entry_bytes

LOSSES = [
    Loss(weight, Divergence.forward_kl, temperature)
    for weight, temperature in itertools.product((0.0, 0.3, 1.0), (1.0, 2.5))
]
VOCABULARIES = [33, 1024, 50_257, 152_064]


def target(rows: int, columns: int, *, residual: bool) -> Sparse:
    """Return entries with padding among them, or entries and a rest."""
    torch.manual_seed(rows + columns)
    ids = torch.stack([torch.randperm(columns)[:5] for _ in range(rows)])
    p = torch.rand(rows, 5, dtype=torch.float64)
    if not residual:
        # of every second token, two entries are padding
        p[:, 3:] *= torch.arange(rows)[:, None] % 2
        ids[p == 0] = 0
    rest = (
        torch.rand(rows, dtype=torch.float64)
        if residual
        else torch.zeros(rows, dtype=torch.float64)
    )
    total = p.sum(-1) + rest
    p, rest = p / total[:, None], rest / total
    return Sparse(ids, p, torch.rand(rows, dtype=torch.float64), rest if residual else None)


def sparse_definition(z: Tensor, teacher: Sparse, labels: Tensor, loss: Loss) -> Tensor:
    """Return the summed loss on the densified target, by the words of `distillation/losses.py`:
    the rest is one bucket.
    """
    p = torch.zeros_like(z).scatter_add(1, teacher.ids, teacher.probabilities)
    q = F.softmax(z / loss.temperature, -1)
    value = -(p * q.log()).sum() - teacher.entropy.sum()
    if teacher.residual is not None:
        elsewhere = torch.ones_like(z).scatter(1, teacher.ids, 0.0)
        value = value - (teacher.residual * (q * elsewhere).sum(-1).log()).sum()
    hard = F.cross_entropy(z, labels, reduction="sum")
    return loss.ce_weight * hard + (1 - loss.ce_weight) * loss.temperature**2 * value


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_equal_float64_autograd(loss: Loss, residual: bool) -> None:
    z, _, labels = batch()
    teacher = target(*z.shape, residual=residual)
    z.requires_grad_()
    expected = sparse_definition(z, teacher, labels, loss)
    (wanted,) = torch.autograd.grad(expected, z)
    sums, gradient = sparse_terms(z.detach(), teacher, labels, loss)
    assert sums.weighted(loss).item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_entries_that_are_all_of_the_distribution_give_the_dense_loss(temperature: float) -> None:
    z, t, labels = batch()
    loss = Loss(0.3, Divergence.forward_kl, temperature)
    p = F.softmax(t / temperature, -1)
    everything = Sparse(torch.arange(33).expand(7, 33), p, torch.special.entr(p).sum(-1))
    sums, gradient = sparse_terms(z, everything, labels, loss)
    dense, wanted = losses.terms(z, t, labels, loss)
    assert sums.weighted(loss).item() == pytest.approx(
        definition(z, t, labels, loss).item(), rel=1e-10
    )
    assert sums.ce.item() == pytest.approx(dense.ce.item())
    torch.testing.assert_close(gradient, wanted)


def test_the_rest_as_one_bucket_worked_by_hand() -> None:
    """Student (1/2, 1/4, 1/4), teacher 3/4 on the first and 1/4 beside it: the bucket's own rate is
    1/2.
    """
    z = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    p, rest = torch.tensor([[0.75]]), torch.tensor([0.25])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    teacher = Sparse(torch.tensor([[0]]), p, torch.tensor([entropy]), rest)
    sums, gradient = sparse_terms(z, teacher, torch.tensor([0]), Loss(0.0))
    assert sums.divergence.item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5
    )
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0.125, 0.125]]))


def test_extreme_logits_stay_finite_and_a_rest_that_the_student_rules_out_is_dear() -> None:
    z, _, labels = batch(4, 9, dtype=torch.float32)
    for residual in (False, True):
        teacher = target(4, 9, residual=residual).to(torch.float32)
        sums, gradient = sparse_terms(1e4 * z, teacher, labels, Loss(0.5))
        assert torch.isfinite(sums.ce)
        assert torch.isfinite(sums.divergence)
        assert torch.isfinite(gradient).all()
    sums, _ = sparse_terms(z * torch.nan, teacher, labels, Loss(0.5))
    assert math.isnan(sums.divergence.item())


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_becomes_its_gradient_block_by_block(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype
) -> None:
    monkeypatch.setattr(losses, "BLOCK_BYTES", rows * 4 * 29)
    z, _, labels = batch(11, 33, dtype=dtype)
    labels %= 29
    loss = Loss(0.3, Divergence.forward_kl, 2.0)
    teacher = target(11, 29, residual=True).to(torch.float32)
    tile = z.clone()
    sums = sparse_terms_in_place(tile, teacher, labels, loss, 29)
    expected, gradient = sparse_terms(z[:, :29].float(), teacher, labels, loss)
    assert sums.ce.item() == pytest.approx(expected.ce.item(), rel=1e-5)
    assert sums.divergence.item() == pytest.approx(expected.divergence.item(), rel=1e-5)
    torch.testing.assert_close(tile[:, :29], gradient.to(dtype))
    assert not tile[:, 29:].any()


@pytest.mark.parametrize("residual", [False, True])
def test_the_head_takes_entries_chunk_by_chunk(
    monkeypatch: pytest.MonkeyPatch, residual: bool
) -> None:
    monkeypatch.setattr(head_module, "TILE_BYTES", 3 * 4 * 37)  # three rows a chunk
    torch.manual_seed(0)
    h, w = torch.randn(17, 12, dtype=torch.float64), torch.randn(37, 12, dtype=torch.float64)
    labels, loss = torch.randint(0, 33, (17,)), Loss(0.3, Divergence.forward_kl, 2.0)
    teacher = target(17, 33, residual=residual)
    leaves = [x.clone().requires_grad_() for x in (h, w)]
    expected = sparse_definition(F.linear(*leaves)[:, :33], teacher, labels, loss) / 17
    wanted = torch.autograd.grad(expected, leaves)
    ours = [x.float().requires_grad_() for x in (h, w)]
    value, sums = head_loss(
        ours[0],
        Head(ours[1], None),
        labels,
        vocabulary=33,
        loss=loss,
        taught=teacher.to(torch.float32),
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums.divergence.item() != 0
    for mine, theirs in zip(torch.autograd.grad(value, ours), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("theirs", [0.3, 1e-3, 1e-9])
@pytest.mark.parametrize("rest", [1e-2, 1e-6, 1e-8, 1e-10, 1e-12, 1e-60])
def test_a_student_surer_than_its_teacher_is_told_so_exactly(
    rest: float, theirs: float, temperature: float
) -> None:
    """Down to a rest that fp32 has no number for: the gradient within 1e-3 of float64's, the value
    not clamped.
    """
    draw = torch.Generator().manual_seed(3)
    columns, rows = 50, 6
    ids = torch.stack([torch.randperm(columns, generator=draw)[:5] for _ in range(rows)])
    q = torch.rand(rows, columns, generator=draw, dtype=torch.float64)
    inside = torch.zeros_like(q).scatter(1, ids, 1.0).bool()
    total = lambda part: (q * part).sum(-1, keepdim=True)
    q = torch.where(inside, (1 - rest) * q / total(inside), rest * q / total(~inside))
    z = (temperature * q.log() + 3.0).requires_grad_()
    p = torch.rand(rows, 5, generator=draw, dtype=torch.float64)
    residual = torch.full((rows,), theirs, dtype=torch.float64)
    p = (1 - theirs) * p / p.sum(-1, keepdim=True)
    entropy = torch.special.entr(p).sum(-1) + torch.special.entr(residual)
    teacher, labels = Sparse(ids, p, entropy, residual), ids[:, 0]
    loss = Loss(0.0, temperature=temperature)
    log_q = F.log_softmax(z / temperature, -1)
    log_rest = log_q.masked_fill(inside, -torch.inf).logsumexp(-1)
    value = -(p * log_q.gather(1, ids)).sum() - (residual * log_rest).sum() - entropy.sum()
    (wanted,) = torch.autograd.grad(temperature**2 * value, z)
    sums, gradient = sparse_terms(z.detach().float(), teacher.to(torch.float32), labels, loss)
    assert sums.divergence.item() == pytest.approx(
        temperature**2 * value.item(), rel=1e-4, abs=1e-6
    )
    assert (gradient.double() - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize(("rest", "theirs"), [(1e-12, 1e-9), (1e-9, 1e-7), (1e-30, 1e-12)])
def test_two_sure_models_differ_by_what_they_leave(rest: float, theirs: float) -> None:
    """Both give one token nearly everything: 1 - 1e-9 is no number of fp32, and the gradient is no
    noise.
    """
    ids = torch.tensor([[7, 3, 11]])
    few = torch.tensor([1 - 3e-8, 2e-8, 1e-8], dtype=torch.float64)
    q = torch.full((1, 40), rest / 37, dtype=torch.float64)
    q[0, ids[0]] = few * (1 - rest)
    z = q.log().requires_grad_()
    p, residual = (
        (few.flip(0).roll(1) * (1 - theirs))[None],
        torch.tensor([theirs], dtype=torch.float64),
    )
    teacher = Sparse(ids, p, torch.zeros(1, dtype=torch.float64), residual)
    log_q = F.log_softmax(z, -1)
    inside = torch.zeros_like(q).scatter(1, ids, 1.0).bool()
    value = (
        -(p * log_q.gather(1, ids)).sum()
        - theirs * log_q.masked_fill(inside, -torch.inf).logsumexp(-1).sum()
    )
    (wanted,) = torch.autograd.grad(value, z)
    _, gradient = sparse_terms(z.detach().float(), teacher.to(torch.float32), ids[:, 0], Loss(0.0))
    assert (gradient.double() - wanted).norm() <= 1e-3 * wanted.norm()


# -- draws ----------------------------------------------------------------------------------------


def drawn(
    codec: Sampled | TopK, logits: Tensor, seed: int = 0
) -> tuple[dict[str, np.ndarray], Sparse]:
    """Return the packed columns of tokens, and what is read back from them."""
    uniforms = torch.from_numpy(np.random.default_rng(seed).random((len(logits), codec.draws)))
    columns = codec.pack({name: part.numpy() for name, part in codec.of(logits, uniforms).items()})
    return columns, codec.unpack(columns)


def dense(teacher: Sparse, vocabulary: int) -> Tensor:
    return torch.zeros(len(teacher.ids), vocabulary).scatter_add_(
        1, teacher.ids, teacher.probabilities
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_unbiased_and_vary_less_than_independent_ones(temperature: float) -> None:
    torch.manual_seed(0)
    logits, trials = (2 * torch.randn(3, 40)).repeat_interleave(4000, 0), 4000
    p = F.softmax(logits[::trials] / temperature, -1)
    _, teacher = drawn(Sampled(12, 40, temperature), logits)
    estimates = dense(teacher, 40).reshape(3, trials, 40)
    assert torch.equal(estimates.sum(-1).round(decimals=5), torch.ones(3, trials))
    error = (estimates.mean(1) - p).abs()
    independent = p * (1 - p) / 12
    assert (error < 5 * (independent / trials).sqrt() + 1e-6).all()
    assert (estimates.var(1).sum(-1) < 0.8 * independent.sum(-1)).all()
    counts = estimates * 12
    assert ((counts - 12 * p[:, None]).abs() < 2).all()
    assert counts.max() > 1  # repeats were merged into counts


def test_the_reported_divergence_and_the_gradient_are_unbiased() -> None:
    """Over 4,000 draws of each token the means are the dense ones, within four standard errors."""
    torch.manual_seed(1)
    trials, loss = 4000, Loss(0.0)
    student, teacher_logits = torch.randn(1, 60), 2 * torch.randn(1, 60)
    labels = torch.zeros(trials, dtype=torch.long)
    _, teacher = drawn(Sampled(12, 60, 1.0), teacher_logits.repeat(trials, 1))
    each = torch.stack(
        [
            sparse_terms(student, teacher.rows(slice(n, n + 1)), labels[:1], loss)[0].divergence
            for n in range(trials)
        ]
    )
    exact, wanted = losses.terms(student, teacher_logits, labels[:1], loss)
    assert (each.mean() - exact.divergence).abs() < 4 * each.std() / math.sqrt(trials)
    _, gradient = sparse_terms(student.repeat(trials, 1), teacher, labels, loss)
    assert (gradient.mean(0) - wanted[0]).abs().max() < 4 * gradient.std(0).max() / math.sqrt(
        trials
    )


def test_top_k_is_biased_and_a_lower_bound() -> None:
    torch.manual_seed(2)
    student, logits, labels = (
        torch.randn(50, 300),
        2 * torch.randn(50, 300),
        torch.zeros(50, dtype=torch.long),
    )
    _, teacher = drawn(TopK(8, 300, 1.0), logits)
    sums, gradient = sparse_terms(student, teacher, labels, Loss(0.0))
    exact, wanted = losses.terms(student, logits, labels, Loss(0.0))
    assert 0 < sums.divergence < 0.98 * exact.divergence
    torch.testing.assert_close(
        gradient.gather(1, teacher.ids), wanted.gather(1, teacher.ids), atol=1e-3, rtol=1e-2
    )
    assert (gradient - wanted).abs().max() > 1e-3  # beside them it differs


def test_what_was_packed_is_read_back() -> None:
    torch.manual_seed(3)
    for vocabulary in VOCABULARIES:
        logits = 4 * torch.randn(20, vocabulary)
        sampled = Sampled(64, vocabulary, 1.0)
        raw = sampled.of(logits, torch.from_numpy(np.random.default_rng(0).random((20, 64))))
        _, teacher = drawn(sampled, logits)
        for row in range(20):
            ids, counts = raw["ids"][row].unique(return_counts=True)
            there = teacher.probabilities[row] > 0
            assert torch.equal(teacher.ids[row][there], ids.long())
            torch.testing.assert_close(teacher.probabilities[row][there], counts / 64)
        torch.testing.assert_close(
            teacher.entropy, torch.special.entr(F.softmax(logits, -1)).sum(-1)
        )
        _, top = drawn(TopK(9, vocabulary, 1.0), logits)
        expected = F.softmax(logits, -1).topk(9)
        assert torch.equal(top.ids, expected.indices)
        torch.testing.assert_close(top.probabilities, expected.values, rtol=2e-3, atol=1e-7)
        torch.testing.assert_close(top.probabilities.sum(-1) + top.residual, torch.ones(20))


def test_tokens_the_teacher_rules_out_are_never_drawn() -> None:
    logits = torch.full((500, 6), -torch.inf)
    logits[:, [1, 4]] = 0.0
    _, teacher = drawn(Sampled(12, 6, 1.0), logits)
    assert set(teacher.ids[teacher.probabilities > 0].tolist()) == {1, 4}
    torch.testing.assert_close(teacher.entropy, torch.full((500,), math.log(2)))


@pytest.mark.parametrize("vocabulary", [*VOCABULARIES, 300_000])
def test_the_defaults_take_at_most_72_bytes_a_token_at_any_vocabulary(vocabulary: int) -> None:
    """Flat distributions: no two draws fall together, the worst there is."""
    logits = torch.zeros(40, vocabulary)
    for codec in (
        Sampled(Sampled.most(vocabulary), vocabulary, 1.0),
        TopK(TopK.most(vocabulary), vocabulary, 1.0),
    ):
        columns, _ = drawn(codec, logits)
        size = sum(column.nbytes for column in columns.values()) / 40
        assert size <= TOKEN_BYTES - SPARE_BYTES
        more = dataclasses.replace(
            codec, **{"draws" if isinstance(codec, Sampled) else "k": codec.most(vocabulary) + 1}
        )
        larger = (
            sum(column.nbytes for column in drawn(more, logits)[0].values()) / 40
            if vocabulary > 40
            else 99
        )
        assert larger > TOKEN_BYTES - SPARE_BYTES  # none is left out that would fit
    assert Sampled.most(152_064) == 21
    assert Sampled.most(1024) == 32
    assert entry_bytes(152_064, 6) == 3


def test_a_live_teacher_needs_its_own_terms() -> None:
    """Entries and logits are told apart by their type, and the default terms follow."""
    h, w = torch.randn(4, 8), torch.randn(10, 8)
    labels = torch.zeros(4, dtype=torch.long)
    p = F.softmax(F.linear(h, w), -1)
    everything = Sparse(torch.arange(10).expand(4, 10), p, torch.special.entr(p).sum(-1))
    live = Taught(h, Head(w, None), torch.float32)
    values = [
        head_loss(h, Head(w + 1, None), labels, loss=Loss(0.5), taught=taught)[0]
        for taught in (everything, live)
    ]
    torch.testing.assert_close(*values)
