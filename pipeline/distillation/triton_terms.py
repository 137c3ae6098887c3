# pyright: basic, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""The losses of `losses.py` as one Triton kernel: a program a token, logits in, their gradient out,
in place.

A program reads its row in blocks, 16 bytes at a time where its columns are filled up to a multiple
of 64 (`head.py` does that): what stands there is read and left out, so that no load needs a mask of
its own. The first pass finds what normalises the softmaxes (of student
and teacher at the temperature, and of the student alone where the hard labels count at another
one), as running maximum and sum; the last writes the gradient. Forward KL needs no pass between;
the others take one for their value and the mean slope sum(q g). All of it is fp32 in registers,
whatever the products are stored in; what a model does to its head's products (`transform.py`) is
done wherever they are read, and its slope multiplied into the gradient. As in `losses.py`, a row's
maximum is taken off before the temperature divides, and mixtures are made in log space.

`TRITON_INTERPRET=1`, set before Triton is imported, runs the same code on a CPU, which is how the
tests read it.
Source: Milakov and Gimelshein 2018, arXiv 1805.02867 (the running softmax).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.config.settings.distillation import Divergence
from pipeline.distillation.losses import Loss, Sparse, Sums
from pipeline.distillation.losses import sparse_terms_in_place as plain_sparse_terms
from pipeline.distillation.transform import PLAIN, Transform

BLOCK = 4096  # logits read at a time, by the kernels that hold little else
# by the others: what a thread holds of two rows, their logarithms and slopes fits its registers
SMALL_BLOCK = 2048
WARPS = 8
# Registers of a thread: two blocks of threads share a multiprocessor. ptxas aims lower by itself,
# and spills. AMD's compiler knows no such limit.
LIMITS = {} if torch.version.hip is not None else {"maxnreg": 128}
FILLED = 64  # columns
KINDS = {divergence: number for number, divergence in enumerate(Divergence)}


def terms_in_place(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    loss: Loss,
    vocabulary: int,
    ours: Transform = PLAIN,
    theirs: Transform = PLAIN,
) -> Sums:
    """Replace the student's products (N, V_s) by the gradient of the summed loss; the contract of
    `losses.terms_in_place`. Sums are fp32.
    """
    count = len(labels)
    ce, divergence = (
        torch.zeros(count, dtype=torch.float32, device=student.device) for _ in range(2)
    )
    if count:
        other = student if teacher is None else teacher
        # The kernel steps through a row by adding 1 to its address.
        assert student.stride(1) == other.stride(1) == 1, "rows must be contiguous"
        kind = -1 if teacher is None else KINDS[loss.divergence]
        readable = min(_filled(vocabulary), student.shape[1], other.shape[1])
        _kernel[(count,)](
            student,
            other,
            labels,
            ce,
            divergence,
            student.stride(0),
            other.stride(0),
            vocabulary,
            readable,
            student.shape[1],
            1.0 if teacher is None else loss.ce_weight,
            loss.temperature,
            1.0 / loss.temperature,
            loss.mixture,
            ours.scale,
            ours.cap or 0.0,
            theirs.scale,
            theirs.cap or 0.0,
            # Constants of compilation: each combination is a kernel of its own without the
            # branches.
            KIND=kind,
            AT_ONE=loss.temperature == 1,
            OURS=_kind_of(ours),
            THEIRS=_kind_of(theirs),
            BLOCK=min(
                _block(kind, ours, theirs, student.dtype.itemsize),
                triton.next_power_of_2(student.shape[1]),
            ),
            num_warps=WARPS,
            **LIMITS,
        )
    return Sums(ce.sum(), divergence.sum())


def _block(kind: int, ours: Transform, theirs: Transform, itemsize: int) -> int:
    """Return how many logits are read at a time, of products of this many bytes each."""
    simple = ours.cap is None and theirs.cap is None and (kind < 0 or (kind == 0 and itemsize < 4))
    return BLOCK if simple else min(BLOCK, SMALL_BLOCK)


def sparse_terms_in_place(
    student: Tensor,
    teacher: Sparse,
    labels: Tensor,
    loss: Loss,
    vocabulary: int,
    ours: Transform = PLAIN,
    theirs: Transform = PLAIN,
) -> Sums:
    """Do the same where the teacher is given by entries, (N, K); the contract of
    `losses.sparse_terms_in_place`.

    With a rest beside the entries (`top_k`) it is plain torch that does it: what the rest sums up
    to takes a pass over all that is no entry.
    """
    if teacher.residual is not None:
        return plain_sparse_terms(student, teacher, labels, loss, vocabulary, ours, theirs)
    count, entries = teacher.ids.shape
    ce, divergence = (
        torch.zeros(count, dtype=torch.float32, device=student.device) for _ in range(2)
    )
    if count:
        assert student.stride(1) == 1, "rows must be contiguous"
        _sparse_kernel[(count,)](
            student,
            teacher.ids.contiguous(),
            teacher.probabilities.contiguous(),
            labels,
            ce,
            divergence,
            student.stride(0),
            vocabulary,
            min(_filled(vocabulary), student.shape[1]),
            student.shape[1],
            loss.ce_weight,
            loss.temperature,
            1.0 / loss.temperature,
            ours.scale,
            ours.cap or 0.0,
            ENTRIES=entries,
            WIDTH=triton.next_power_of_2(max(entries, 2)),
            AT_ONE=loss.temperature == 1,
            OURS=_kind_of(ours),
            BLOCK=min(BLOCK, triton.next_power_of_2(student.shape[1])),
            num_warps=WARPS,
            **LIMITS,
        )
    return Sums(ce.sum(), loss.temperature**2 * (divergence.sum() - teacher.entropy.float().sum()))


def _filled(vocabulary: int) -> int:
    """Return the columns that a row has at least where `head.py` filled it up."""
    return -(-vocabulary // FILLED) * FILLED


def _kind_of(transform: Transform) -> int:
    """Return what the kernel has to do to a product: 0 nothing, 1 scale it, 2 scale and cap it."""
    return 0 if transform.plain else 1 if transform.cap is None else 2


@triton.jit
def _logits(product, inside, scale, cap, DONE: tl.constexpr):
    """Return the logits of products, and -inf where there is no column."""
    logits = product
    if DONE > 0:
        logits = product * scale
    if DONE > 1:
        # tanh by an exponential that cannot overflow
        share = tl.exp(-2.0 * tl.abs(logits) / cap)
        size = cap * (1.0 - share) / (1.0 + share)
        logits = tl.where(logits < 0.0, -size, size)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def _slope_of_logits(product, scale, cap, DONE: tl.constexpr):
    """Return d logits / d product."""
    slope = tl.full(product.shape, 1.0, tl.float32)
    if DONE > 0:
        slope = slope * scale
    if DONE > 1:
        # 1 - tanh^2 without cancellation, as in `Transform.slope`
        share = tl.exp(-2.0 * tl.abs(product * scale) / cap)
        slope = slope * 4.0 * share / ((1.0 + share) * (1.0 + share))
    return slope


@triton.jit
def _read(pointer, at, vocabulary, readable, scale, cap, DONE: tl.constexpr):
    """Return the logits at some columns, and -inf beyond the vocabulary."""
    product = tl.load(pointer + at, mask=at < readable, other=0.0).to(tl.float32)
    return _logits(product, at < vocabulary, scale, cap, DONE)


@triton.jit
def _lift(top):
    """Return what to take off a row: its maximum, but 0 where all of it is ruled out so far."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _highest(top, x):
    return tl.maximum(top, tl.max(x, 0))


@triton.jit
def _carried(total, top, higher, cold):
    """Return a running sum of exponentials under a new maximum; `cold` is 1 / temperature."""
    return total * tl.exp((top - _lift(higher)) * cold)


@triton.jit
def _exp_sum(x, higher, cold):
    return tl.sum(tl.exp((x - _lift(higher)) * cold), 0)


@triton.jit
def _where(probability, value):
    """Return a value where there is any probability, else 0."""
    return tl.where(probability == 0.0, 0.0, value)


@triton.jit
def _log_mixture(share, log_a, log_b):
    """Return log(share a + (1 - share) b) without underflow."""
    left, right = log_a + tl.log(share), log_b + tl.log(1.0 - share)
    high, low = tl.maximum(left, right), tl.minimum(left, right)
    return tl.where(high == float("-inf"), high, high + tl.log(1.0 + tl.exp(low - high)))


@triton.jit
def _slope(q, p, log_q, log_p, share, KIND: tl.constexpr):
    """Return dD/dq up to a constant, for all but forward KL."""
    if KIND == 1:
        slope = _where(q, log_q - log_p)
    elif KIND == 2:
        slope = (1.0 - share) * _where(q, log_q - _log_mixture(share, log_p, log_q))
    elif KIND == 3:
        slope = -(1.0 - share) * _where(p, tl.exp(log_p - _log_mixture(share, log_p, log_q)))
    else:
        ratio = log_q - _log_mixture(share, log_q, log_p)
        slope = _where(q, ratio - share * tl.exp(ratio))
    return slope


@triton.jit
def _value(q, p, log_q, log_p, share, KIND: tl.constexpr):
    """Return D's summands."""
    if KIND == 0:
        value = p * _where(p, log_p - log_q)
    elif KIND == 1:
        value = q * _where(q, log_q - log_p)
    elif KIND == 2:
        log_m = _log_mixture(share, log_p, log_q)
        value = share * p * _where(p, log_p - log_m) + (1.0 - share) * q * _where(q, log_q - log_m)
    elif KIND == 3:
        value = p * _where(p, log_p - _log_mixture(share, log_p, log_q))
    else:
        value = q * _where(q, log_q - _log_mixture(share, log_q, log_p))
    return value


@triton.jit
def _kernel(
    student,
    teacher,
    labels,
    ce_out,
    divergence_out,
    student_stride,
    teacher_stride,
    vocabulary,
    readable,
    columns,
    ce_weight,
    temperature,
    cold,
    share,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    KIND: tl.constexpr,
    AT_ONE: tl.constexpr,
    OURS: tl.constexpr,
    THEIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: rows times the vocabulary go beyond 2^31.
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    label = tl.load(labels + row)
    # The label's logit is read now, because the last pass overwrites the row.
    own = _logits(tl.load(student + label).to(tl.float32), True, scale, cap, OURS)
    top, total, total_q = float("-inf"), 0.0, 0.0
    top_p, total_p = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = _read(student, at, vocabulary, readable, scale, cap, OURS)
        higher = _highest(top, z)
        total = _carried(total, top, higher, 1.0) + _exp_sum(z, higher, 1.0)
        if KIND >= 0:
            if not AT_ONE:
                total_q = _carried(total_q, top, higher, cold) + _exp_sum(z, higher, cold)
            t = _read(teacher, at, vocabulary, readable, teacher_scale, teacher_cap, THEIRS)
            higher_p = _highest(top_p, t)
            total_p = _carried(total_p, top_p, higher_p, cold) + _exp_sum(t, higher_p, cold)
            top_p = higher_p
        top = higher
    log_total = tl.log(total)
    tl.store(ce_out + row, log_total - (own - top))
    log_total_q, log_total_p = log_total, log_total
    if KIND >= 0:
        log_total_p = tl.log(total_p)
        if not AT_ONE:
            log_total_q = tl.log(total_q)

    # Second pass: the value of D, and sum(q g), which every entry of the gradient needs.
    value, mean = 0.0, 0.0
    if KIND > 0:
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < vocabulary
            log_q = (
                _read(student, at, vocabulary, readable, scale, cap, OURS) - top
            ) * cold - log_total_q
            t = _read(teacher, at, vocabulary, readable, teacher_scale, teacher_cap, THEIRS)
            log_p = (t - top_p) * cold - log_total_p
            q, p = tl.exp(log_q), tl.exp(log_p)
            value += tl.sum(tl.where(inside, _value(q, p, log_q, log_p, share, KIND), 0.0), 0)
            mean += tl.sum(tl.where(inside, q * _slope(q, p, log_q, log_p, share, KIND), 0.0), 0)

    # Last pass, over all columns: those beyond the shared vocabulary are set to 0.
    weight = (1.0 - ce_weight) * temperature
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        product = tl.load(student + at, mask=at < readable, other=0.0).to(tl.float32)
        z = _logits(product, inside, scale, cap, OURS) - top
        gradient = ce_weight * (tl.exp(z - log_total) - tl.where(at == label, 1.0, 0.0))
        if KIND >= 0:
            log_q = z * cold - log_total_q
            t = _read(teacher, at, vocabulary, readable, teacher_scale, teacher_cap, THEIRS)
            log_p = (t - top_p) * cold - log_total_p
            q, p = tl.exp(log_q), tl.exp(log_p)
            if KIND == 0:
                value += tl.sum(tl.where(inside, _value(q, p, log_q, log_p, share, KIND), 0.0), 0)
                taught = q - p
            else:
                taught = q * (_slope(q, p, log_q, log_p, share, KIND) - mean)
            # an infinite divergence that has no weight has no part in the gradient
            if weight != 0.0:
                gradient += weight * taught
        gradient = gradient * _slope_of_logits(product, scale, cap, OURS)
        tl.store(student + at, tl.where(inside, gradient, 0.0), mask=at < columns)
    tl.store(divergence_out + row, temperature * temperature * value)


@triton.jit
def _sparse_kernel(
    student,
    ids,
    probabilities,
    labels,
    ce_out,
    divergence_out,
    student_stride,
    vocabulary,
    readable,
    columns,
    ce_weight,
    temperature,
    cold,
    scale,
    cap,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    AT_ONE: tl.constexpr,
    OURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # As in `_kernel`.
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    label = tl.load(labels + row)
    own = _logits(tl.load(student + label).to(tl.float32), True, scale, cap, OURS)
    entry = tl.arange(0, WIDTH)
    p = tl.load(probabilities + row * ENTRIES + entry, mask=entry < ENTRIES, other=0.0).to(
        tl.float32
    )
    given = p > 0.0  # what pads a row has no probability, and may name a token twice
    at_entry = tl.load(ids + row * ENTRIES + entry, mask=entry < ENTRIES, other=0)
    # Read before the row is overwritten: the entries' gradient is written last, from these.
    product_entry = tl.load(student + at_entry, mask=given, other=0.0).to(tl.float32)
    top, total, total_q = float("-inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = _read(student, at, vocabulary, readable, scale, cap, OURS)
        higher = _highest(top, z)
        total = _carried(total, top, higher, 1.0) + _exp_sum(z, higher, 1.0)
        if not AT_ONE:
            total_q = _carried(total_q, top, higher, cold) + _exp_sum(z, higher, cold)
        top = higher
    log_total = tl.log(total)
    log_total_q = log_total
    if not AT_ONE:
        log_total_q = tl.log(total_q)
    tl.store(ce_out + row, log_total - (own - top))
    z_entry = _logits(product_entry, given, scale, cap, OURS) - top
    log_q_entry = z_entry * cold - log_total_q
    tl.store(divergence_out + row, -tl.sum(tl.where(given, p * log_q_entry, 0.0), 0))

    # The whole row as if no token were an entry (p = 0); the entries are put right afterwards.
    weight = (1.0 - ce_weight) * temperature
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        product = tl.load(student + at, mask=at < readable, other=0.0).to(tl.float32)
        z = _logits(product, inside, scale, cap, OURS) - top
        gradient = ce_weight * (tl.exp(z - log_total) - tl.where(at == label, 1.0, 0.0))
        gradient += weight * tl.exp(z * cold - log_total_q)
        gradient = gradient * _slope_of_logits(product, scale, cap, OURS)
        tl.store(student + at, tl.where(inside, gradient, 0.0), mask=at < columns)
    tl.debug_barrier()  # other threads have written these places just now
    gradient = ce_weight * (tl.exp(z_entry - log_total) - tl.where(at_entry == label, 1.0, 0.0))
    gradient += weight * (tl.exp(log_q_entry) - p)
    tl.store(
        student + at_entry, gradient * _slope_of_logits(product_entry, scale, cap, OURS), mask=given
    )
