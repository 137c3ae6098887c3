"""The losses of a student, each defined once, with its gradient made by hand.

With z the student's logits, y the label, q = softmax(z / T), p = softmax(teacher / T), per
predicted token:

    loss = ce_weight * CE(z, y) + (1 - ce_weight) * T^2 * D(p, q)

    forward_kl          KL(p || q)
    reverse_kl          KL(q || p)
    jsd                 beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q
    skewed_kl           KL(p || alpha p + (1 - alpha) q)
    skewed_reverse_kl   KL(q || alpha q + (1 - alpha) p)

T^2 keeps the gradient's size comparable over temperatures. For each D the gradient with respect to
z is

    T^2 dD/dz = T q (g - sum(q g)),   g = dD/dq up to a constant

    forward_kl  -p/q     reverse_kl  ln(q/p)     jsd  (1 - beta) ln(q/m)
    skewed_kl  -(1 - alpha) p/m     skewed_reverse_kl  ln(q/m) - alpha q/m

The table is read by three paths that must agree: `terms` here (plain torch, any device), the Triton
kernel (`triton_terms.py`), and float64 autograd over the definitions (the tests).

A teacher read from a cache gives p by a few entries (`Sparse`). Forward KL is then cross-entropy
less the entropy that the entries' distribution has, and with the T^2 of above

    sampled entries    D = -sum_i p_i ln q_i - H
                       T^2 dD/dz = T (q - p)
    k largest, rest r  D = -sum_i p_i ln q_i - r ln rho - H
                       T^2 dD/dz = T (q - p) on the entries, T q (1 - r / rho) elsewhere
                       rho = 1 - sum_i q_i, i over the entries

Sampled entries are counts over draws, E[p_i] is the teacher's probability, and D and its gradient
are linear in p: both are unbiased. The k largest with the rest as one bucket are a coarser
distribution: D is a lower bound of the KL (the log-sum inequality), and its gradient is biased; how
the student spreads the rest costs it nothing.

Mixtures are taken in log space, and logits lose their row's maximum before they are divided by T:
nothing underflows or cancels whatever the logits' size. Logits are what `transform.py` makes of a
head's products; the gradient that is returned is that with respect to the products.

A token the teacher rules out (p = 0) costs nothing in the forward divergences and in jsd; in
reverse_kl it costs infinitely much if the student allows it at all, as the definition says. What
has no weight in the loss has no part in it, be it infinite.
Source: Hinton et al. 2015, arXiv 1503.02531 (T^2); Agarwal et al. 2023, arXiv 2306.13649 (jsd); Ko
et al. 2024, arXiv 2402.03898 (skewed); Anshumann et al. 2025, arXiv 2503.16870 (sampled entries
against the k largest).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.settings.distillation import Divergence
from pipeline.distillation.transform import PLAIN, Transform

# of one fp32 block of rows: a handful of such blocks stay in a core's cache
BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True)
class Loss:
    """What is minimised.

    Attributes:
        ce_weight: Of the hard labels, in [0, 1]; the divergence has the rest.
        temperature: T > 0, of the divergence only.
        mixture: beta of `jsd`, alpha of the skewed ones, in (0, 1); the others have none.
    """

    ce_weight: float = 1.0
    divergence: Divergence = Divergence.forward_kl
    temperature: float = 1.0
    mixture: float = 0.5


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over tokens, before weighting (0-dim, fp32 or wider).

    Attributes:
        ce: Cross-entropy against the hard labels, nats.
        divergence: T^2 * D, nats; 0 without a teacher.
    """

    ce: Tensor
    divergence: Tensor

    def weighted(self, loss: Loss) -> Tensor:
        """Return the sum of the loss, nats; a part without weight adds nothing, be it infinite."""
        if loss.ce_weight == 1:
            return self.ce
        if loss.ce_weight == 0:
            return self.divergence
        return loss.ce_weight * self.ce + (1 - loss.ce_weight) * self.divergence


@dataclass(frozen=True, slots=True)
class Sparse:
    """A teacher's distribution at the loss's temperature, by its entries.

    Attributes:
        ids: (N, K) int64, below the vocabulary; a row's entries differ, those of probability 0
            (padding) apart.
        probabilities: (N, K) fp32 or fp64.
        entropy: (N,), nats: H above; it has no gradient.
        residual: (N,) mass beside the entries, r above, where every row has K entries; None: the
            entries are all.
    """

    ids: Tensor
    probabilities: Tensor
    entropy: Tensor
    residual: Tensor | None = None

    def rows(self, part: slice) -> Sparse:
        """Return the distributions of some tokens."""
        residual = None if self.residual is None else self.residual[part]
        return Sparse(self.ids[part], self.probabilities[part], self.entropy[part], residual)

    def to(self, dtype: torch.dtype) -> Sparse:
        """Return the same with its figures in `dtype`."""
        residual = None if self.residual is None else self.residual.to(dtype)
        return Sparse(self.ids, self.probabilities.to(dtype), self.entropy.to(dtype), residual)


def terms_in_place(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    loss: Loss,
    vocabulary: int,
    ours: Transform = PLAIN,
    theirs: Transform = PLAIN,
    *,
    compute: Callable[..., tuple[Sums, Tensor]] | None = None,
) -> Sums:
    """Replace the student's products by the gradient of the summed loss with respect to them;
    return the sums.

    The math is in fp32 (fp64 for fp64 products), a block of rows at a time.

    Args:
        student: (N, V_s) products of hidden states and head, overwritten.
        teacher: (N, V_t) the teacher's, or None for plain cross-entropy (`ce_weight` is then taken
            as 1).
        labels: (N,) indexes below `vocabulary`.
        vocabulary: Columns that both have; those beyond it get no gradient.
        ours: What makes logits of the student's products.
        theirs: What makes logits of the teacher's.
        compute: `block_terms`, or what a compiler made of it.
    """

    def block(tile: Tensor, part: slice) -> tuple[Sums, Tensor]:
        taught = None if teacher is None else teacher[part, :vocabulary]
        return (compute or block_terms)(tile, taught, labels[part], loss, ours, theirs)

    return _by_blocks(student, vocabulary, block)


def block_terms(
    tile: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    loss: Loss,
    ours: Transform,
    theirs: Transform,
) -> tuple[Sums, Tensor]:
    """Return the sums and the gradient with respect to products (n, V), in their dtype.

    All of it is element by element or along a row: a compiler makes a few passes of it.
    """
    exact = torch.promote_types(tile.dtype, torch.float32)
    product = tile.to(exact)
    taught = None if teacher is None else theirs.logits(teacher.to(exact))
    sums, gradient = terms(ours.logits(product), taught, labels, loss)
    return sums, _of_products(gradient, product, ours).to(tile.dtype)


def sparse_terms_in_place(
    student: Tensor,
    teacher: Sparse,
    labels: Tensor,
    loss: Loss,
    vocabulary: int,
    ours: Transform = PLAIN,
    theirs: Transform = PLAIN,
) -> Sums:
    """Do what `terms_in_place` does where the teacher is given by entries; forward KL only.

    Args:
        student: (N, V_s) products of hidden states and head, overwritten.
        teacher: Of the same N tokens, at `loss.temperature`.
        labels: (N,) indexes below `vocabulary`.
        vocabulary: Columns that both have; those beyond it get no gradient.
        ours: What makes logits of the student's products.
        theirs: Not looked at: entries are of the teacher's logits.
    """
    exact = torch.promote_types(student.dtype, torch.float32)

    def block(tile: Tensor, part: slice) -> tuple[Sums, Tensor]:
        product = tile.to(exact)
        taught = teacher.rows(part).to(exact)
        sums, gradient = sparse_terms(ours.logits(product), taught, labels[part], loss)
        return sums, _of_products(gradient, product, ours)

    return _by_blocks(student, vocabulary, block)


def _of_products(gradient: Tensor, product: Tensor, ours: Transform) -> Tensor:
    """Return the gradient with respect to products, of that with respect to their logits."""
    return gradient if ours.plain else gradient * ours.slope(product)


def _by_blocks(
    student: Tensor, vocabulary: int, block: Callable[[Tensor, slice], tuple[Sums, Tensor]]
) -> Sums:
    """Replace products by their gradient, on a CPU a few rows at a time; sum up what `block` says
    of its rows.
    """
    exact = torch.promote_types(student.dtype, torch.float32)
    ce, divergence = (torch.zeros((), dtype=exact, device=student.device) for _ in range(2))
    # Padding of the vocabulary takes no part in the softmax, so its gradient is 0.
    student[:, vocabulary:] = 0
    # A CPU is bound by memory, so a block should stay in its cache. An accelerator takes all rows
    # at once.
    rows = (
        max(1, BLOCK_BYTES // (4 * vocabulary))
        if student.device.type == "cpu"
        else max(1, len(student))
    )
    for start in range(0, len(student), rows):
        part = slice(start, start + rows)
        # A view: writing to it below writes into `student`. (n, V)
        tile = student[part, :vocabulary]
        sums, gradient = block(tile, part)
        ce += sums.ce
        divergence += sums.divergence
        tile.copy_(gradient)
    return Sums(ce, divergence)


def terms(
    student: Tensor, teacher: Tensor | None, labels: Tensor, loss: Loss
) -> tuple[Sums, Tensor]:
    """Return the sums and the gradient of the summed loss with respect to the student's logits.

    Args:
        student: (N, V) logits, fp32 or fp64.
        teacher: (N, V) logits of the same dtype, or None for plain cross-entropy.
        labels: (N,) indexes.
    """
    weight = 1.0 if teacher is None else loss.ce_weight
    # Hard labels count at temperature 1, whatever the temperature of the divergence.
    at_one = _Softmax.of(student)
    ce = -at_one.log_of(labels[:, None]).sum()
    if teacher is None:
        return Sums(ce, torch.zeros_like(ce)), _hard(at_one, labels, 1.0)
    of_q = at_one if loss.temperature == 1 else _Softmax.of(student, loss.temperature)
    value, gradient = _divergence(of_q, _Softmax.of(teacher, loss.temperature), loss)
    sums = Sums(ce, loss.temperature**2 * value)
    if weight == 1:
        return sums, _hard(at_one, labels, 1.0)
    # T, not T^2: the derivative of softmax(z / T) brings a factor 1 / T.
    gradient *= (1 - weight) * loss.temperature
    if weight > 0:
        gradient += _hard(at_one, labels, weight)
    return sums, gradient


def sparse_terms(
    student: Tensor, teacher: Sparse, labels: Tensor, loss: Loss
) -> tuple[Sums, Tensor]:
    """Return the sums and the gradient of the summed loss with respect to the student's logits.

    Args:
        student: (N, V) logits, fp32 or fp64.
        teacher: Of the same tokens, at `loss.temperature`, in the same dtype.
        labels: (N,) indexes.
    """
    assert loss.divergence is Divergence.forward_kl, "entries give no other divergence"
    at_one = _Softmax.of(student)
    of_q = at_one if loss.temperature == 1 else _Softmax.of(student, loss.temperature)
    value, gradient = (
        _sampled(of_q, teacher) if teacher.residual is None else _with_rest(of_q, teacher)
    )
    sums = Sums(
        -at_one.log_of(labels[:, None]).sum(), loss.temperature**2 * (value - teacher.entropy.sum())
    )
    if loss.ce_weight == 1:
        return sums, _hard(at_one, labels, 1.0)
    # T, not T^2, as in `terms`.
    gradient *= (1 - loss.ce_weight) * loss.temperature
    if loss.ce_weight > 0:
        gradient += _hard(at_one, labels, loss.ce_weight)
    return sums, gradient


def _sampled(of_q: _Softmax, teacher: Sparse) -> tuple[Tensor, Tensor]:
    """Return -sum(p ln q) and q - p, (N, V)."""
    p = teacher.probabilities
    value = -(p * _where(p, of_q.log_of(teacher.ids))).sum()
    return value, (of_q.shares * of_q.inverse).scatter_add_(1, teacher.ids, -p)


def _with_rest(of_q: _Softmax, teacher: Sparse) -> tuple[Tensor, Tensor]:
    """Return -sum(p ln q) - sum(r ln rho), and its gradient: q - p on the entries, q (1 - r / rho)
    elsewhere.

    rho is kept as a logarithm, summed up over what it consists of: 1 - sum(q) would cancel, and it
    may be too small for a number of 32 bits. A row's gradient sums to zero, so that its largest
    part, where q and p may cancel, is what the others leave.
    """
    p, ids, residual = teacher.probabilities, teacher.ids, teacher.residual
    assert residual is not None
    # (N, 1)
    r = residual[:, None]
    # (N, V): entries drop out of the sum, because exp(-inf) is 0.
    elsewhere = of_q.shifted.scatter(1, ids, -torch.inf)
    # of what the shares beside the entries sum up to
    log_rest = elsewhere.logsumexp(-1, keepdim=True)
    # (N, K)
    log_q = of_q.log_of(ids)
    value = -(p * _where(p, log_q)).sum() - (r * _where(r, log_rest - of_q.log_total)).sum()
    of_rest = torch.where(r == 0, 0.0, (elsewhere - log_rest).exp_() * r)
    gradient = (of_q.shares * of_q.inverse).sub_(of_rest)
    gradient.scatter_(1, ids, log_q.exp() - p)
    # The most probable entry: set to 0, then to minus the sum of the others.
    first = ids.gather(1, p.argmax(-1, keepdim=True))
    gradient.scatter_(1, first, 0.0)
    return value, gradient.scatter_(1, first, -gradient.sum(-1, keepdim=True))


@dataclass(frozen=True, slots=True)
class _Softmax:
    """A softmax at a temperature, by what it is made of: one exponential serves all that follows.

    Attributes:
        shifted: (N, V): (x - max) / T. What is left of logits that are large alike keeps all of its
            digits.
        shares: (N, V): exp(shifted).
        inverse: (N, 1): 1 / sum(shares).
        log_total: (N, 1): log(sum(shares)).
    """

    shifted: Tensor
    shares: Tensor
    inverse: Tensor
    log_total: Tensor

    @staticmethod
    def of(logits: Tensor, temperature: float = 1.0) -> _Softmax:
        shifted = logits - logits.amax(-1, keepdim=True)
        if temperature != 1:
            shifted /= temperature
        shares = shifted.exp()
        total = shares.sum(-1, keepdim=True)
        return _Softmax(shifted, shares, total.reciprocal(), total.log())

    def log_of(self, ids: Tensor) -> Tensor:
        """Return the log-probabilities (N, K) of some tokens."""
        return self.shifted.gather(1, ids) - self.log_total


def _hard(softmax: _Softmax, labels: Tensor, weight: float) -> Tensor:
    gradient = softmax.shares * (softmax.inverse * weight)
    # softmax minus one-hot
    gradient[torch.arange(len(labels), device=labels.device), labels] -= weight
    return gradient


def _divergence(of_q: _Softmax, of_p: _Softmax, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return the sum of D over tokens and q (g - sum(q g)), (N, V)."""
    if loss.divergence is Divergence.forward_kl:
        return _forward_kl(of_q, of_p)
    q, p = of_q.shares * of_q.inverse, of_p.shares * of_p.inverse
    log_q, log_p = of_q.shifted - of_q.log_total, of_p.shifted - of_p.log_total
    # beta or alpha of the table above
    share = loss.mixture
    if loss.divergence is Divergence.reverse_kl:
        ratio = _where(q, log_q - log_p)
        value, slope = (q * ratio).sum(), ratio
    elif loss.divergence is Divergence.jsd:
        log_m = _log_mixture(share, log_p, log_q)
        ratio = _where(q, log_q - log_m)
        value = share * (p * _where(p, log_p - log_m)).sum() + (1 - share) * (q * ratio).sum()
        slope = (1 - share) * ratio
    elif loss.divergence is Divergence.skewed_kl:
        log_m = _log_mixture(share, log_p, log_q)
        ratio = _where(p, log_p - log_m)
        value, slope = (p * ratio).sum(), -(1 - share) * _where(p, ratio.exp())
    else:
        log_m = _log_mixture(share, log_q, log_p)
        ratio = _where(q, log_q - log_m)
        value, slope = (q * ratio).sum(), ratio - share * _where(q, ratio.exp())
    # The softmax's Jacobian times dD/dq. Constants in the slope drop out, because q sums to 1.
    return value, q * (slope - (q * slope).sum(-1, keepdim=True))


def _log_mixture(share: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log(share a + (1 - share) b); in this space neither underflows."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _forward_kl(of_q: _Softmax, of_p: _Softmax) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) and q - p with few passes: sum(p (ln p - ln q)) up to the totals."""
    # The totals of both softmaxes are constants of a row, so they are added once a row below, not
    # once an entry here.
    apart = torch.linalg.vecdot(of_p.shares, of_p.shifted - of_q.shifted)[:, None] * of_p.inverse
    value = (apart - of_p.log_total + of_q.log_total).sum()
    # A token ruled out by the teacher: 0 * inf is no number, 0 * log 0 is 0. Asking whether there
    # is one would have an accelerator waited for, and a compiler's graph break off.
    unasked = value.device.type != "cpu" or torch.compiler.is_compiling()
    if unasked or not torch.isfinite(value):
        p = of_p.shares * of_p.inverse
        value = (p * _where(p, of_p.shifted - of_p.log_total - of_q.shifted + of_q.log_total)).sum()
    gradient = of_q.shares * of_q.inverse
    return value, gradient.addcmul_(of_p.shares, of_p.inverse.expand_as(of_p.shares), value=-1)


def _where(probability: Tensor, value: Tensor) -> Tensor:
    """Return a value where there is any probability, else 0 (where it is weighted with 0)."""
    return torch.where(probability == 0, 0.0, value)
