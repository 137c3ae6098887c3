"""The losses of a student, each defined once, with its gradient made by hand.

With z the student's logits, y the label, q = softmax(z / T), p = softmax(teacher / T), per predicted token:

    loss = ce_weight * CE(z, y) + (1 - ce_weight) * T^2 * D(p, q)

    forward_kl          KL(p || q)
    reverse_kl          KL(q || p)
    jsd                 beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q
    skewed_kl           KL(p || alpha p + (1 - alpha) q)
    skewed_reverse_kl   KL(q || alpha q + (1 - alpha) p)

T^2 keeps the gradient's size comparable over temperatures. For each D the gradient with respect to z is

    T^2 dD/dz = T q (g - sum(q g)),   g = dD/dq up to a constant

    forward_kl  -p/q     reverse_kl  ln(q/p)     jsd  (1 - beta) ln(q/m)
    skewed_kl  -(1 - alpha) p/m     skewed_reverse_kl  ln(q/m) - alpha q/m

The table is read by three paths that must agree: `terms` here (plain torch, any device), the Triton kernel
(`triton_terms.py`), and float64 autograd over the definitions (the tests).

A teacher read from a cache gives p by a few entries (`Sparse`). Forward KL is then cross-entropy less the entropy that
the entries' distribution has, and with the T^2 of above

    sampled entries    D = -sum_i p_i ln q_i - H                    T^2 dD/dz = T (q - p)
    k largest, rest r  D = -sum_i p_i ln q_i - r ln rho - H         T^2 dD/dz = T (q - p) on the entries,
                       rho = 1 - sum_i q_i (i over the entries)                 T q (1 - r / rho) elsewhere

Sampled entries are counts over draws, E[p_i] is the teacher's probability, and D and its gradient are linear in p: both
are unbiased. The k largest with the rest as one bucket are a coarser distribution: D is a lower bound of the KL
(the log-sum inequality), and its gradient is biased; how the student spreads the rest costs it nothing.

A token the teacher rules out (p = 0) costs nothing in the forward divergences and in jsd; in reverse_kl it costs
infinitely much if the student allows it at all, as the definition says.
Source: Hinton et al. 2015, arXiv 1503.02531 (T^2); Agarwal et al. 2023, arXiv 2306.13649 (jsd); Ko et al. 2024,
arXiv 2402.03898 (skewed); Anshumann et al. 2025, arXiv 2503.16870 (sampled entries against the k largest).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Divergence

BLOCK_BYTES = 2 * 2**20  # of one fp32 block of rows: a handful of such blocks stay in a core's cache


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
        """Return the sum of the loss."""
        return loss.ce_weight * self.ce + (1 - loss.ce_weight) * self.divergence


@dataclass(frozen=True, slots=True)
class Sparse:
    """A teacher's distribution at the loss's temperature, by its entries.

    Attributes:
        ids: (N, K) int64, below the vocabulary; a row's entries differ, those of probability 0 (padding) apart.
        probabilities: (N, K) fp32 or fp64.
        entropy: (N,), nats: H above; it has no gradient.
        residual: (N,) mass beside the entries, r above, where every row has K entries; None: the entries are all.
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


def terms_in_place(student: Tensor, teacher: Tensor | None, labels: Tensor, loss: Loss, vocabulary: int) -> Sums:
    """Replace the student's logits by the gradient of the summed loss with respect to them; return the sums.

    The math is in fp32 (fp64 for fp64 logits), a block of rows at a time.

    Args:
        student: (N, V_s) logits, overwritten.
        teacher: (N, V_t) logits, or None for plain cross-entropy (`ce_weight` is then taken as 1).
        labels: (N,) indexes below `vocabulary`.
        vocabulary: Columns that both have; those beyond it get no gradient.
    """
    exact = torch.promote_types(student.dtype, torch.float32)

    def block(logits: Tensor, part: slice) -> tuple[Sums, Tensor]:
        taught = None if teacher is None else teacher[part, :vocabulary].to(exact)
        return terms(logits, taught, labels[part], loss)

    return _by_blocks(student, vocabulary, exact, block)


def sparse_terms_in_place(student: Tensor, teacher: Sparse, labels: Tensor, loss: Loss, vocabulary: int) -> Sums:
    """Do what `terms_in_place` does where the teacher is given by entries; forward KL only.

    Args:
        student: (N, V_s) logits, overwritten.
        teacher: Of the same N tokens, at `loss.temperature`.
        labels: (N,) indexes below `vocabulary`.
        vocabulary: Columns that both have; those beyond it get no gradient.
    """
    exact = torch.promote_types(student.dtype, torch.float32)

    def block(logits: Tensor, part: slice) -> tuple[Sums, Tensor]:
        return sparse_terms(logits, teacher.rows(part).to(exact), labels[part], loss)

    return _by_blocks(student, vocabulary, exact, block)


def _by_blocks(
    student: Tensor, vocabulary: int, exact: torch.dtype, block: Callable[[Tensor, slice], tuple[Sums, Tensor]]
) -> Sums:
    """Replace logits by their gradient, on a CPU a few rows at a time; sum up what `block` says of its rows."""
    ce, divergence = (torch.zeros((), dtype=exact, device=student.device) for _ in range(2))
    student[:, vocabulary:] = 0
    rows = max(1, BLOCK_BYTES // (4 * vocabulary)) if student.device.type == "cpu" else max(1, len(student))
    for start in range(0, len(student), rows):
        part = slice(start, start + rows)
        logits = student[part, :vocabulary]
        sums, gradient = block(logits.to(exact), part)
        ce += sums.ce
        divergence += sums.divergence
        logits.copy_(gradient)
    return Sums(ce, divergence)


def terms(student: Tensor, teacher: Tensor | None, labels: Tensor, loss: Loss) -> tuple[Sums, Tensor]:
    """Return the sums and the gradient of the summed loss with respect to the student's logits.

    Args:
        student: (N, V) logits, fp32 or fp64.
        teacher: (N, V) logits of the same dtype, or None for plain cross-entropy.
        labels: (N,) indexes.
    """
    weight = 1.0 if teacher is None else loss.ce_weight
    at_one = _Softmax.of(student) if teacher is None or weight > 0 or loss.temperature == 1 else None
    if at_one is None:
        log_likelihood = F.log_softmax(student, -1).gather(1, labels[:, None])
    else:
        log_likelihood = student.gather(1, labels[:, None]) - at_one.log_sum
    ce = -log_likelihood.sum()
    if teacher is None:
        assert at_one is not None
        return Sums(ce, torch.zeros_like(ce)), _hard(at_one, labels, 1.0)
    hot = at_one if loss.temperature == 1 else None
    values, gradient = _divergence(student, teacher, loss, hot)
    gradient *= (1 - weight) * loss.temperature
    if weight > 0:
        assert at_one is not None
        gradient += _hard(at_one, labels, weight)
    return Sums(ce, loss.temperature**2 * values), gradient


def sparse_terms(student: Tensor, teacher: Sparse, labels: Tensor, loss: Loss) -> tuple[Sums, Tensor]:
    """Return the sums and the gradient of the summed loss with respect to the student's logits.

    Args:
        student: (N, V) logits, fp32 or fp64.
        teacher: Of the same tokens, at `loss.temperature`, in the same dtype.
        labels: (N,) indexes.
    """
    assert loss.divergence is Divergence.forward_kl, "entries give no other divergence"
    weight, temperature, ids = loss.ce_weight, loss.temperature, teacher.ids
    z = student if temperature == 1 else student / temperature
    of_q = _Softmax.of(z)
    at_one = of_q if temperature == 1 else _Softmax.of(student)
    ce = (at_one.log_sum - student.gather(1, labels[:, None])).sum()
    p = teacher.probabilities
    value = (p * _log_ratio(p, of_q.log_sum, z.gather(1, ids))).sum() - teacher.entropy.sum()
    taught = (1 - weight) * temperature
    scale, pull = torch.full_like(of_q.inverse, taught), -taught * p
    if teacher.residual is not None:
        more, share = _rest(of_q, ids, teacher.residual)
        value = value + more
        scale -= taught * share
        pull += taught * share * of_q.shares.gather(1, ids) * of_q.inverse
    if temperature == 1:  # one softmax serves both parts, in one pass
        scale += weight
    gradient = of_q.shares * (of_q.inverse * scale)
    gradient.scatter_add_(1, ids, pull)
    if temperature == 1:
        gradient[torch.arange(len(labels), device=labels.device), labels] -= weight
    elif weight > 0:
        gradient += _hard(at_one, labels, weight)
    return Sums(ce, temperature**2 * value), gradient


def _rest(of_q: _Softmax, ids: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return -sum(r ln rho) and r / rho, (N, 1); rho is summed up, since 1 - sum(q_i) would cancel."""
    r = residual[:, None]
    others = of_q.shares.scatter(1, ids, 0.0).sum(-1, keepdim=True)
    rho = (others * of_q.inverse).clamp_min(torch.finfo(r.dtype).tiny)
    return (r * _log_ratio(r, torch.zeros_like(r), rho.log())).sum(), r / rho


@dataclass(frozen=True, slots=True)
class _Softmax:
    """Unnormalised probabilities with what normalises them: one exponential serves all that follows.

    Attributes:
        shares: (N, V): exp(x - max).
        inverse: (N, 1): 1 / sum(shares).
        log_sum: (N, 1): log(sum(exp(x))).
    """

    shares: Tensor
    inverse: Tensor
    log_sum: Tensor

    @staticmethod
    def of(logits: Tensor) -> _Softmax:
        top = logits.amax(-1, keepdim=True)
        shares = (logits - top).exp_()
        total = shares.sum(-1, keepdim=True)
        return _Softmax(shares, total.reciprocal(), top + total.log())


def _hard(softmax: _Softmax, labels: Tensor, weight: float) -> Tensor:
    gradient = softmax.shares * (softmax.inverse * weight)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= weight
    return gradient


def _divergence(student: Tensor, teacher: Tensor, loss: Loss, hot: _Softmax | None) -> tuple[Tensor, Tensor]:
    """Return the sum of D over tokens and q (g - sum(q g)), (N, V)."""
    temperature = loss.temperature
    z, t = (student, teacher) if temperature == 1 else (student / temperature, teacher / temperature)
    of_q, of_p = hot or _Softmax.of(z), _Softmax.of(t)
    if loss.divergence is Divergence.forward_kl:
        return _forward_kl(z, t, of_q, of_p)
    q, p = of_q.shares * of_q.inverse, of_p.shares * of_p.inverse
    log_q, log_p = z - of_q.log_sum, t - of_p.log_sum
    share = loss.mixture
    if loss.divergence is Divergence.reverse_kl:
        ratio = _log_ratio(q, log_q, log_p)
        value, slope = (q * ratio).sum(), ratio
    elif loss.divergence is Divergence.jsd:
        log_m = (share * p + (1 - share) * q).log()
        ratio = _log_ratio(q, log_q, log_m)
        value = share * (p * _log_ratio(p, log_p, log_m)).sum() + (1 - share) * (q * ratio).sum()
        slope = (1 - share) * ratio
    elif loss.divergence is Divergence.skewed_kl:
        m = share * p + (1 - share) * q
        value = (p * _log_ratio(p, log_p, m.log())).sum()
        slope = -(1 - share) * _quotient(p, m)
    else:
        m = share * q + (1 - share) * p
        ratio = _log_ratio(q, log_q, m.log())
        value, slope = (q * ratio).sum(), ratio - share * _quotient(q, m)
    return value, q * (slope - (q * slope).sum(-1, keepdim=True))


def _forward_kl(z: Tensor, t: Tensor, of_q: _Softmax, of_p: _Softmax) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) and q - p with few passes over the logits: sum(p (t - z)) less the difference of log-sums."""
    apart = torch.linalg.vecdot(of_p.shares, t - z)[:, None] * of_p.inverse
    value = (apart - of_p.log_sum + of_q.log_sum).sum()
    # A token ruled out by the teacher: 0 * inf is no number, 0 * log 0 is 0. Elsewhere than here, asking would wait.
    if value.device.type != "cpu" or not torch.isfinite(value):
        p = of_p.shares * of_p.inverse
        value = (p * _log_ratio(p, t - of_p.log_sum, z - of_q.log_sum)).sum()
    gradient = of_q.shares * of_q.inverse
    return value, gradient.addcmul_(of_p.shares, of_p.inverse.expand_as(of_p.shares), value=-1)


def _log_ratio(probability: Tensor, log_above: Tensor, log_below: Tensor) -> Tensor:
    """Return log_above - log_below where there is any probability, else 0 (where the ratio is weighted with 0)."""
    return torch.where(probability == 0, 0.0, log_above - log_below)


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(above == 0, 0.0, above / below)
