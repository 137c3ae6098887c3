"""The output head and its loss, without ever holding a tokens x vocabulary tensor.

For each chunk of tokens the logits are projected once, turned in place into the gradient of the loss with respect to
them, and multiplied back into the gradients of hidden states and head weight; then the chunk is gone. So backward has
nothing left to compute, and memory is bounded by the chunk, not by the batch. Work per token and vocabulary entry is
6 H_student + 2 H_teacher FLOPs, which is what the method needs; with a teacher from a cache (`losses.Sparse`) it is
6 H_student, as without a teacher.

Losses are those of `losses.py`. On CUDA one Triton kernel makes a chunk's gradient (`triton_terms.py`), elsewhere the
same definition in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distillation.losses import Loss, Sparse, Sums, sparse_terms_in_place, terms_in_place

TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""Of a chunk's logits, student's and teacher's together. On CUDA large, for every chunk reads and writes the fp32
gradient of the weight once."""

Terms = Callable[[Tensor, Any, Tensor, Loss, int], Sums]
"""What turns a chunk's logits into their gradient, in place: the contract of `losses.terms_in_place`, where the
teacher's side is its logits or None, and of `losses.sparse_terms_in_place`, where it is `Sparse`."""


@dataclass(frozen=True, slots=True)
class Head:
    """An output projection: weight (V, H) and bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(model: Any) -> Head:
        """Return the output head of a Hugging Face language model."""
        layer = model.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None))

    def to(self, dtype: torch.dtype) -> Head:
        """Return the head in another arithmetic."""
        return Head(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


@dataclass(frozen=True, slots=True)
class Taught:
    """The teacher's side of a batch: hidden states (N, H_t) of the same positions, its head, and its arithmetic."""

    hidden: Tensor
    head: Head
    dtype: torch.dtype


@dataclass(slots=True)
class _Work:
    """What the fused head needs beside the tensors it differentiates."""

    labels: Tensor
    loss: Loss
    vocabulary: int
    dtype: torch.dtype
    taught: Taught | Sparse | None
    terms: Terms


class _FusedHead(torch.autograd.Function):
    """Loss of all tokens, chunk by chunk; gradients are made here and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, ...]:
        exact = torch.promote_types(work.dtype, torch.float32)
        student = Head(weight, bias).to(work.dtype)
        taught = work.taught
        teacher = taught.head.to(taught.dtype) if isinstance(taught, Taught) else None
        sums = Sums(*(torch.zeros((), dtype=exact, device=hidden.device) for _ in range(2)))
        grad_hidden = torch.empty_like(hidden)
        # At least fp32, because rounding every chunk's share to 16 bits biases training.
        grad_weight = torch.zeros_like(weight, dtype=exact)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
        rows = _rows(weight, teacher, work)
        for start in range(0, len(work.labels), rows):
            part = slice(start, start + rows)
            h = hidden[part].to(work.dtype)
            tile = F.linear(h, student.weight, student.bias)
            theirs = _theirs(taught, teacher, part)
            some = work.terms(tile, theirs, work.labels[part], work.loss, work.vocabulary)
            sums.ce.add_(some.ce)
            sums.divergence.add_(some.divergence)
            grad_hidden[part] = tile @ student.weight
            _add_product(grad_weight, tile, h)
            if grad_bias is not None:
                grad_bias += tile.sum(0, dtype=exact)
        ctx.save_for_backward(grad_hidden, grad_weight, *([] if grad_bias is None else [grad_bias]))
        count = max(len(work.labels), 1)
        ctx.count, ctx.dtypes = count, (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums.ce, sums.divergence)
        total = sums.ce if taught is None else sums.weighted(work.loss)
        return total / count, sums.ce, sums.divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, *rest = ctx.saved_tensors
        scale = grads[0] / ctx.count
        weight_dtype, bias_dtype = ctx.dtypes
        grad_bias = (rest[0] * scale).to(bias_dtype) if rest else None
        return grad_hidden * scale, (grad_weight * scale).to(weight_dtype), grad_bias, None


def _theirs(taught: Taught | Sparse | None, head: Head | None, part: slice) -> Tensor | Sparse | None:
    """Return the teacher's side of a chunk: its logits, or the entries of a cache."""
    if isinstance(taught, Sparse):
        return taught.rows(part)
    if taught is None or head is None:
        return None
    return F.linear(taught.hidden[part].to(taught.dtype), head.weight, head.bias)


def _rows(weight: Tensor, teacher: Head | None, work: _Work) -> int:
    """Return how many tokens a chunk holds: a multiple of 64 where it is that large, as matrix units like it."""
    columns = weight.shape[0] * work.dtype.itemsize
    if teacher is not None:
        columns += teacher.weight.shape[0] * teacher.weight.dtype.itemsize
    rows = max(1, TILE_BYTES.get(weight.device.type, TILE_BYTES["cpu"]) // columns)
    return rows - rows % 64 if rows > 64 else rows


def _add_product(total: Tensor, tile: Tensor, h: Tensor) -> None:
    """Add tile.T @ h to `total` without rounding the product to 16 bits."""
    if tile.dtype == total.dtype:
        total.addmm_(tile.T, h)
    elif total.device.type == "cuda":
        torch.addmm(total, tile.T, h, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(tile.T.to(total.dtype), h.to(total.dtype))


def head_loss(
    hidden: Tensor, head: Head, labels: Tensor, *, loss: Loss | None = None, dtype: torch.dtype = torch.float32,
    vocabulary: int | None = None, taught: Taught | Sparse | None = None, terms: Terms | None = None,
) -> tuple[Tensor, Sums]:  # fmt: skip
    """Compute the mean loss over the given tokens from hidden states, chunk by chunk.

    Args:
        hidden: (N, H_s) hidden states of predicted positions only.
        head: The student's output head, (V_s, H_s).
        labels: (N,) token indexes below `vocabulary`.
        loss: What is minimised; None: cross-entropy.
        dtype: Of the matmuls; losses and softmaxes are at least fp32.
        vocabulary: Tokens both models share; columns beyond it are padding of one of them and take no part.
            None: all of the student's.
        taught: The teacher's side: live, or from a cache ((N, K) entries of the same positions, forward KL only);
            None: plain cross-entropy, whatever `loss.ce_weight` says.
        terms: What turns logits into gradients; None: the Triton kernel on CUDA, plain torch elsewhere.

    Returns:
        The mean loss (0-dim, differentiable in `hidden` and the head), and the unweighted sums.
    """
    work = _Work(
        labels=labels, loss=loss or Loss(), vocabulary=vocabulary or head.weight.shape[0], dtype=dtype, taught=taught,
        terms=terms or default_terms(hidden.device, cached=isinstance(taught, Sparse)),
    )  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        value, ce, divergence = _FusedHead.apply(hidden, head.weight, head.bias, work)  # pyright: ignore[reportGeneralTypeIssues]
    return value, Sums(ce, divergence)


def default_terms(device: torch.device, *, cached: bool = False) -> Terms:
    """Return what makes gradients on a device: the kernel where Triton compiles for it, else plain torch.

    Args:
        cached: The teacher is given by the entries of a cache.
    """
    if device.type == "cuda":
        with suppress(ImportError):  # a build of torch that came without Triton
            from pipeline.distillation import triton_terms

            return triton_terms.sparse_terms_in_place if cached else triton_terms.terms_in_place
    return sparse_terms_in_place if cached else terms_in_place
