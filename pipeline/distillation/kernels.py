"""Which code computes the distillation head: three kernels of one contract, and a probe that takes
the fastest.

    torch    the head of `head.py` with gradients in plain torch: any device
    triton   the same with one Triton kernel per chunk: CUDA
    liger    the chunked loss of the Liger library, where it is installed: forward_kl, reverse_kl
             and jsd, with models of one vocabulary. Liger scales no divergence by T^2, so that is
             handed to it as a weight; it sums the gradient of the weight in the weight's own dtype,
             where ours is fp32. It knows no scale and no soft cap after the head, and is refused to
             models that have one

Each is called like `head.head_loss`. Where there are several, `fastest` times them on the tensors
of a real micro-batch, leaves out those that stray from the definition, and says what it found.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.config.settings.distillation import Divergence, HeadKernel
from pipeline.distillation.head import Head, Taught, Terms, head_loss
from pipeline.distillation.losses import (
    Loss,
    Sparse,
    Sums,
    block_terms,
    sparse_terms_in_place,
    terms_in_place,
)
from pipeline.distillation.transform import Transform
from pipeline.ledger.devices.table import device_of

Name = TypeVar("Name")
HeadLoss = Callable[..., tuple[Tensor, Sums]]
"""The contract of `head.head_loss`."""
# Liger's JSD loss at the ends of its beta is a plain KL.
# jsd has its own; Liger has no skewed ones
LIGER_BETA = {Divergence.forward_kl: 0.0, Divergence.reverse_kl: 1.0}
NOT_FOR_LIGER = "Liger computes logits that are a plain product of head and hidden states"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""How far a gradient may be from the definition in fp32 logits, relative in norm: some roundings of
the dtype.
"""
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Probed:
    """What was found for one kernel.

    Attributes:
        seconds: Median of forward and backward of the head on one micro-batch.
        error: The largest relative error among the loss and its gradients.
        why_not: Why it cannot be taken, or None.
    """

    seconds: float
    error: float
    why_not: str | None


def why_not(kernel: HeadKernel, device: torch.device) -> str | None:
    """Return why this device or installation cannot run a kernel, or None."""
    if kernel is HeadKernel.triton and (
        not device_of(device).triton or find_spec("triton") is None
    ):
        return "the Triton kernel needs a CUDA device and triton"
    if kernel is HeadKernel.liger and find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    return None


def kernel_of(kernel: HeadKernel, rows: int | None = None) -> HeadLoss:
    """Return the head loss that a kernel computes; `auto` is what `head.default_terms` takes.

    Its arguments have the shapes and dtypes of `head.head_loss`.

    Args:
        rows: Tokens of a chunk, where the kernel is ours.
    """
    if kernel is HeadKernel.torch:
        return _by(terms_in_place, sparse_terms_in_place, rows)
    if kernel is HeadKernel.triton:
        from pipeline.distillation import triton_terms

        return _by(triton_terms.terms_in_place, triton_terms.sparse_terms_in_place, rows)
    if kernel is HeadKernel.liger:
        return liger_head_loss
    return head_loss if rows is None else partial(head_loss, rows=rows)


def compiled_head() -> HeadLoss:
    """Return the head of plain torch with what it does to a block of products compiled."""
    compute = torch.compile(block_terms, dynamic=True)
    return _by(partial(terms_in_place, compute=compute), sparse_terms_in_place)


def _by(live: Terms, cached: Terms, rows: int | None = None) -> HeadLoss:
    """Return the head loss by the code for live teachers and for cached ones."""

    def compute(*inputs: Any, taught: Any = None, **settings: Any) -> tuple[Tensor, Sums]:
        terms = cached if isinstance(taught, Sparse) else live
        return head_loss(*inputs, taught=taught, terms=terms, rows=rows, **settings)

    return compute


def liger_head_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    loss: Loss | None,
    dtype: torch.dtype,
    vocabulary: int | None,
    taught: Any,
) -> tuple[Tensor, Sums]:
    """Compute `head_loss` by Liger's chunked loss; compiled on CUDA, as it is shipped.

    Shapes are those of `head_loss`: hidden (N, H_s), labels (N,), `taught.hidden` (N, H_t).

    Raises:
        ValueError: If the models' vocabularies differ: Liger would give padding a probability. If a
            model changes the product of its head, or gives logits only.
    """
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    assert loss is not None
    if not isinstance(taught, Taught):
        raise ValueError(NOT_FOR_LIGER)
    for each in (head, taught.head):
        if not each.transform.plain:
            raise ValueError(f"{NOT_FOR_LIGER} ({each.transform.in_words()})")
    size = head.weight.shape[0]
    if not size == taught.head.weight.shape[0] == (vocabulary or size):
        raise ValueError(f"vocabularies of {size} and {taught.head.weight.shape[0]} tokens")
    student, teacher = head.to(dtype), taught.head.to(dtype)
    call = LigerFusedLinearJSDLoss(
        weight_hard_loss=loss.ce_weight,
        # T^2 has to come in here, because Liger leaves it out.
        weight_soft_loss=(1 - loss.ce_weight) * loss.temperature**2,
        beta=LIGER_BETA.get(loss.divergence, loss.mixture),
        temperature=loss.temperature,
        compiled=device_of(hidden.device).triton,
        return_soft_hard_loss=True,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        value, soft, hard = call(
            hidden.to(dtype),
            student.weight,
            taught.hidden.to(dtype),
            teacher.weight,
            labels,
            student.bias,
            teacher.bias,
        )
    count = len(labels)
    # Liger returns means; the contract wants sums.
    return value, Sums(hard.detach() * count, soft.detach() * count * loss.temperature**2)


def fastest(
    kernels: Mapping[HeadKernel, HeadLoss],
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    **settings: Any,
) -> tuple[HeadKernel, dict[HeadKernel, Probed]]:
    """Time forward and backward of kernels on one micro-batch, in turns; return the fastest that is
    right.

    Args:
        kernels: At least `torch`, which is the definition here, in fp32 logits whatever the others'
            dtype.
        hidden: (N, H), head and labels (N,), settings: As `head_loss` takes them.
    """
    # fp32 whatever the others compute in: the yardstick of their errors
    right = _gradients(
        kernels[HeadKernel.torch], hidden, head, labels, **{**settings, "dtype": torch.float32}
    )
    allowed = TOLERANCE[settings["dtype"]]
    found: dict[HeadKernel, Probed] = {}
    able: dict[HeadKernel, HeadLoss] = {}
    for name, kernel in kernels.items():
        try:
            error = _error(_gradients(kernel, hidden, head, labels, **settings), right)
        # does not take these shapes, or does not compile
        except (ValueError, RuntimeError, ImportError) as problem:
            found[name] = Probed(float("nan"), float("nan"), " ".join(str(problem).split())[:200])
            continue
        able[name] = kernel
        found[name] = Probed(
            0.0, error, None if error <= allowed else f"off by {error:.1e}, {allowed:g} allowed"
        )
    # The comparison above has run every kernel once, so compiling is in none of these times.
    seconds = in_turns(able, hidden, head, labels, **settings)
    found |= {
        name: Probed(each, found[name].error, found[name].why_not) for name, each in seconds.items()
    }
    right_ones = [name for name in seconds if found[name].why_not is None]
    # Without any kernel within the tolerance, the definition itself is taken.
    return min(right_ones, key=lambda name: found[name].seconds, default=HeadKernel.torch), found


def in_turns(
    kernels: Mapping[Name, HeadLoss], hidden: Tensor, head: Head, labels: Tensor, **settings: Any
) -> dict[Name, float]:
    """Return the median seconds of forward and backward of each, taken in turns; arguments as
    `fastest` has them.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in kernels}
    names = list(kernels)
    for number in range(ROUNDS):
        # Every other round goes backwards, so that a drift of the clock rate favours no kernel.
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(_seconds(kernels[name], hidden, head, labels, **settings))
    return {name: statistics.median(each) for name, each in seconds.items()}


def _gradients(
    kernel: HeadLoss, hidden: Tensor, head: Head, labels: Tensor, **settings: Any
) -> list[Tensor]:
    """Return loss, and gradients of hidden states and head, as fp32."""
    found = _forward_and_backward(kernel, _leaves(hidden, head), head.transform, labels, **settings)
    return [each.detach().float() for each in found]


def _leaves(hidden: Tensor, head: Head) -> list[Tensor]:
    return [
        each.detach().clone().requires_grad_()
        for each in (hidden, head.weight, head.bias)
        if each is not None
    ]


def _forward_and_backward(
    kernel: HeadLoss, leaves: list[Tensor], transform: Transform, labels: Tensor, **settings: Any
) -> list[Tensor]:
    hidden, weight, *bias = leaves
    with torch.enable_grad():
        value, _ = kernel(
            hidden, Head(weight, bias[0] if bias else None, transform), labels, **settings
        )
        return [value, *torch.autograd.grad(value, leaves)]


def _error(found: list[Tensor], right: list[Tensor]) -> float:
    errors = [
        # The floor avoids 0 / 0 where a gradient is exactly 0.
        (ours - theirs).norm() / theirs.norm().clamp(min=1e-12)
        for ours, theirs in zip(found, right, strict=True)
    ]
    worst = float(torch.stack(errors).max())
    return worst if worst == worst else float("inf")  # NaN is off by more than anything


def _seconds(
    kernel: HeadLoss, hidden: Tensor, head: Head, labels: Tensor, **settings: Any
) -> float:
    finish = device_of(hidden.device).synchronise
    leaves = _leaves(hidden, head)
    finish()
    before = time.perf_counter()
    _forward_and_backward(kernel, leaves, head.transform, labels, **settings)
    finish()
    return time.perf_counter() - before


def in_words(chosen: HeadKernel, found: Mapping[HeadKernel, Probed]) -> str:
    """Return what a probe found: `head: triton (1.31 ms a micro-batch; torch 4.02 ms, liger off by
    0.1)`.
    """
    others = [
        f"{name.value} {probed.why_not or f'{1e3 * probed.seconds:.3g} ms'}"
        for name, probed in found.items()
        if name is not chosen
    ]
    rest = f"; {', '.join(others)}" if others else ""
    return f"head: {chosen.value} ({1e3 * found[chosen].seconds:.3g} ms a micro-batch{rest})"
