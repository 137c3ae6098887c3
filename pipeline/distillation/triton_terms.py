# pyright: basic, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

"""The losses of `losses.py` as one Triton kernel: a program a token, logits in, their gradient out, in place.

A program reads its row in blocks. The first pass finds what normalises the softmaxes (of student and teacher at the
temperature, and of the student alone where the hard labels count at another one), as running maximum and sum; the
last writes the gradient. Forward KL needs no pass between; the others take one for their value and the mean slope
sum(q g). All of it is fp32 in registers, whatever the logits are stored in.

`TRITON_INTERPRET=1`, set before Triton is imported, runs the same code on a CPU, which is how the tests read it.
Source: Milakov and Gimelshein 2018, arXiv 1805.02867 (the running softmax).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.config import Divergence
from pipeline.distillation.losses import Loss, Sparse, Sums
from pipeline.distillation.losses import sparse_terms_in_place as plain_sparse_terms

BLOCK = 4096  # logits read at a time
WARPS = 8
KINDS = {divergence: number for number, divergence in enumerate(Divergence)}


def terms_in_place(student: Tensor, teacher: Tensor | None, labels: Tensor, loss: Loss, vocabulary: int) -> Sums:
    """Replace the student's logits by the gradient of the summed loss; the contract of `losses.terms_in_place`."""
    count = len(labels)
    ce, divergence = (torch.zeros(count, dtype=torch.float32, device=student.device) for _ in range(2))
    if count:
        other = student if teacher is None else teacher
        assert student.stride(1) == other.stride(1) == 1, "rows must be contiguous"
        _kernel[(count,)](
            student, other, labels, ce, divergence, student.stride(0), other.stride(0), vocabulary, student.shape[1],
            1.0 if teacher is None else loss.ce_weight, loss.temperature, loss.mixture,
            KIND=-1 if teacher is None else KINDS[loss.divergence], AT_ONE=loss.temperature == 1,
            BLOCK=min(BLOCK, triton.next_power_of_2(student.shape[1])), num_warps=WARPS,
        )  # fmt: skip
    return Sums(ce.sum(), divergence.sum())


def sparse_terms_in_place(student: Tensor, teacher: Sparse, labels: Tensor, loss: Loss, vocabulary: int) -> Sums:
    """Do the same where the teacher is given by entries; the contract of `losses.sparse_terms_in_place`.

    With a rest beside the entries (`top_k`) it is plain torch that does it: what the rest sums up to takes a pass over
    all that is no entry.
    """
    if teacher.residual is not None:
        return plain_sparse_terms(student, teacher, labels, loss, vocabulary)
    count, entries = teacher.ids.shape
    ce, divergence = (torch.zeros(count, dtype=torch.float32, device=student.device) for _ in range(2))
    if count:
        assert student.stride(1) == 1, "rows must be contiguous"
        _sparse_kernel[(count,)](
            student, teacher.ids.contiguous(), teacher.probabilities.contiguous(), labels, ce, divergence,
            student.stride(0), vocabulary, student.shape[1], loss.ce_weight, loss.temperature,
            ENTRIES=entries, WIDTH=triton.next_power_of_2(max(entries, 2)), AT_ONE=loss.temperature == 1,
            BLOCK=min(BLOCK, triton.next_power_of_2(student.shape[1])), num_warps=WARPS,
        )  # fmt: skip
    return Sums(ce.sum(), loss.temperature**2 * (divergence.sum() - teacher.entropy.float().sum()))


@triton.jit
def _running(top, total, x):
    """Take a block into a running maximum and sum of exponentials; all of it may be ruled out (-inf)."""
    higher = tl.maximum(top, tl.max(x, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)


@triton.jit
def _log_ratio(probability, above, below):
    """Return above - below where there is any probability, else 0."""
    return tl.where(probability == 0.0, 0.0, above - below)


@triton.jit
def _slope(q, p, log_q, log_p, share, KIND: tl.constexpr):
    """Return dD/dq up to a constant, for all but forward KL."""
    if KIND == 1:
        slope = _log_ratio(q, log_q, log_p)
    elif KIND == 2:
        slope = (1.0 - share) * _log_ratio(q, log_q, tl.log(share * p + (1.0 - share) * q))
    elif KIND == 3:
        slope = tl.where(p == 0.0, 0.0, -(1.0 - share) * p / (share * p + (1.0 - share) * q))
    else:
        m = share * q + (1.0 - share) * p
        slope = _log_ratio(q, log_q, tl.log(m)) - tl.where(q == 0.0, 0.0, share * q / m)
    return slope


@triton.jit
def _value(q, p, log_q, log_p, share, KIND: tl.constexpr):
    """Return D's summands."""
    if KIND == 0:
        value = p * _log_ratio(p, log_p, log_q)
    elif KIND == 1:
        value = q * _log_ratio(q, log_q, log_p)
    elif KIND == 2:
        log_m = tl.log(share * p + (1.0 - share) * q)
        value = share * p * _log_ratio(p, log_p, log_m) + (1.0 - share) * q * _log_ratio(q, log_q, log_m)
    elif KIND == 3:
        value = p * _log_ratio(p, log_p, tl.log(share * p + (1.0 - share) * q))
    else:
        value = q * _log_ratio(q, log_q, tl.log(share * q + (1.0 - share) * p))
    return value


@triton.jit
def _kernel(
    student, teacher, labels, ce_out, divergence_out, student_stride, teacher_stride, vocabulary, columns,
    ce_weight, temperature, share,
    KIND: tl.constexpr, AT_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    label = tl.load(labels + row)
    own = tl.load(student + label).to(tl.float32)
    top, total = float("-inf"), 0.0
    top_q, total_q = float("-inf"), 0.0
    top_p, total_p = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        z = tl.load(student + at, mask=inside, other=float("-inf")).to(tl.float32)
        top, total = _running(top, total, z)
        if KIND >= 0:
            t = tl.load(teacher + at, mask=inside, other=float("-inf")).to(tl.float32) / temperature
            top_p, total_p = _running(top_p, total_p, t)
            if not AT_ONE:
                top_q, total_q = _running(top_q, total_q, z / temperature)
    log_sum = top + tl.log(total)
    tl.store(ce_out + row, log_sum - own)
    log_sum_q, log_sum_p = log_sum, log_sum
    if KIND >= 0:
        log_sum_p = top_p + tl.log(total_p)
        if not AT_ONE:
            log_sum_q = top_q + tl.log(total_q)

    value, mean = 0.0, 0.0
    if KIND > 0:
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < vocabulary
            log_q = tl.load(student + at, mask=inside, other=float("-inf")).to(tl.float32) / temperature - log_sum_q
            log_p = tl.load(teacher + at, mask=inside, other=float("-inf")).to(tl.float32) / temperature - log_sum_p
            q, p = tl.exp(log_q), tl.exp(log_p)
            value += tl.sum(tl.where(inside, _value(q, p, log_q, log_p, share, KIND), 0.0), 0)
            mean += tl.sum(tl.where(inside, q * _slope(q, p, log_q, log_p, share, KIND), 0.0), 0)

    scale = (1.0 - ce_weight) * temperature
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        z = tl.load(student + at, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = ce_weight * (tl.exp(z - log_sum) - tl.where(at == label, 1.0, 0.0))
        if KIND >= 0:
            log_q = z / temperature - log_sum_q
            log_p = tl.load(teacher + at, mask=inside, other=float("-inf")).to(tl.float32) / temperature - log_sum_p
            q, p = tl.exp(log_q), tl.exp(log_p)
            if KIND == 0:
                value += tl.sum(tl.where(inside, _value(q, p, log_q, log_p, share, KIND), 0.0), 0)
                gradient += scale * (q - p)
            else:
                gradient += scale * q * (_slope(q, p, log_q, log_p, share, KIND) - mean)
        tl.store(student + at, tl.where(inside, gradient, 0.0), mask=at < columns)
    tl.store(divergence_out + row, temperature * temperature * value)


@triton.jit
def _sparse_kernel(
    student, ids, probabilities, labels, ce_out, divergence_out, student_stride, vocabulary, columns,
    ce_weight, temperature,
    ENTRIES: tl.constexpr, WIDTH: tl.constexpr, AT_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    label = tl.load(labels + row)
    own = tl.load(student + label).to(tl.float32)
    entry = tl.arange(0, WIDTH)
    p = tl.load(probabilities + row * ENTRIES + entry, mask=entry < ENTRIES, other=0.0).to(tl.float32)
    given = p > 0.0  # what pads a row has no probability, and may name a token twice
    at_entry = tl.load(ids + row * ENTRIES + entry, mask=entry < ENTRIES, other=0)
    z_entry = tl.load(student + at_entry, mask=given, other=0.0).to(tl.float32)
    top, total = float("-inf"), 0.0
    top_q, total_q = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(student + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        top, total = _running(top, total, z)
        if not AT_ONE:
            top_q, total_q = _running(top_q, total_q, z / temperature)
    log_sum = top + tl.log(total)
    log_sum_q = log_sum
    if not AT_ONE:
        log_sum_q = top_q + tl.log(total_q)
    tl.store(ce_out + row, log_sum - own)
    tl.store(divergence_out + row, tl.sum(tl.where(given, p * (log_sum_q - z_entry / temperature), 0.0), 0))

    scale = (1.0 - ce_weight) * temperature
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        z = tl.load(student + at, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = ce_weight * (tl.exp(z - log_sum) - tl.where(at == label, 1.0, 0.0))
        gradient += scale * tl.exp(z / temperature - log_sum_q)
        tl.store(student + at, tl.where(inside, gradient, 0.0), mask=at < columns)
    tl.debug_barrier()  # other threads have written these places just now
    gradient = ce_weight * (tl.exp(z_entry - log_sum) - tl.where(at_entry == label, 1.0, 0.0))
    gradient += scale * (tl.exp(z_entry / temperature - log_sum_q) - p)
    tl.store(student + at_entry, gradient, mask=given)
