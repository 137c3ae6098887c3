"""The output head and its loss, without ever holding a tokens x vocabulary tensor.

For each chunk of tokens the logits are projected once, turned in place into the gradient of the
loss with respect to them, and multiplied back into the gradients of hidden states and head weight;
then the chunk is gone. So backward has nothing left to compute, and memory is bounded by the chunk,
not by the batch. Work per token and vocabulary entry is 6 H_student + 2 H_teacher FLOPs, which is
what the method needs; with a teacher from a cache (`losses.Sparse`) it is 6 H_student, as without a
teacher.

What a model does to its head's product before it is called logits (a scale, a soft cap) is done
chunk by chunk, too, and its slope is part of the gradient (`transform.py`). Where a model does
something unknown, its logits are taken as it gives them (`logits_loss`, `Logits`): they are there
in full, and the loss is the same.

Losses are those of `losses.py`. On CUDA one Triton kernel makes a chunk's gradient
(`triton_terms.py`), elsewhere the same definition in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distillation.losses import Loss, Sparse, Sums, sparse_terms_in_place, terms_in_place
from pipeline.distillation.transform import PLAIN, Transform
from pipeline.ledger.devices.table import device_of

TILE_BYTES = 32 * 2**20
"""Of a chunk's logits, student's and teacher's together, on a CPU. A GPU has its own `chunk_bytes`,
which is large: every chunk reads and writes the fp32 gradient of the weight once.
"""

# of a weight's gradient at a time, where it is rounded or multiplied in another dtype
WEIGHT_TILE_BYTES = 4 * 2**20

Terms = Callable[[Tensor, Any, Tensor, Loss, int, Transform, Transform], Sums]
"""What turns a chunk's products into their gradient, in place: the contract of
`losses.terms_in_place`, where the teacher's side is its products or None, and of
`losses.sparse_terms_in_place`, where it is `Sparse`.
"""


@dataclass(frozen=True, slots=True)
class Head:
    """An output projection: weight (V, H), bias (V,) or None, and what makes logits of their
    product.
    """

    weight: Tensor
    bias: Tensor | None
    transform: Transform = PLAIN

    @staticmethod
    def of(model: Any, transform: Transform) -> Head:
        """Return the output head of a Hugging Face language model; `transform.prove` finds the
        transform.
        """
        layer = model.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), transform)

    @property
    def columns(self) -> int:
        """Logits that the model gives for a token: the last dimension of (N, columns)."""
        return self.weight.shape[0] if self.transform.columns is None else self.transform.columns

    def to(self, dtype: torch.dtype, *, multiple: int = 1) -> Head:
        """Return the head with weight and bias in another dtype, and as many rows of zeros below as
        make their number a multiple.
        """
        more = -len(self.weight) % multiple
        bias = None if self.bias is None else _below(self.bias, more, dtype)
        return replace(self, weight=_below(self.weight, more, dtype), bias=bias)

    def products(self, hidden: Tensor) -> Tensor:
        """Return hidden (N, H) times the weights plus the bias, (N, V): not logits yet."""
        return F.linear(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, columns) of hidden states (N, H), fp32 or wider."""
        products = self.products(hidden)[:, : self.columns]
        return self.transform.logits(
            products.to(torch.promote_types(products.dtype, torch.float32))
        )


def _below(tensor: Tensor, more: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype with rows of zeros added at the end; itself where that is all."""
    if not more:
        return tensor.to(dtype)
    padded = tensor.new_zeros((len(tensor) + more, *tensor.shape[1:]), dtype=dtype)
    padded[: len(tensor)] = tensor
    return padded


@dataclass(frozen=True, slots=True)
class Taught:
    """The teacher's side of a batch: hidden states (N, H_t) of the same positions, its head, and
    its arithmetic.
    """

    hidden: Tensor
    head: Head
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits (N, V) as a model itself gives them: of a teacher whose head is unknown."""

    values: Tensor

    @property
    def columns(self) -> int:
        """Logits of a token."""
        return self.values.shape[1]


@dataclass(slots=True)
class _Work:
    """What the fused head needs beside the tensors it differentiates."""

    labels: Tensor
    loss: Loss
    vocabulary: int
    dtype: torch.dtype
    taught: Taught | Sparse | Logits | None
    terms: Terms
    transform: Transform = PLAIN
    trains: bool = True  # whether any gradient will be asked for
    rows: int | None = None  # tokens of a chunk; None: what the device's chunks hold

    def mean(self, sums: Sums) -> Tensor:
        """Return the mean loss."""
        total = sums.ce if self.taught is None else sums.weighted(self.loss)
        return total / max(len(self.labels), 1)


class _FusedHead(torch.autograd.Function):
    """Loss of all tokens, chunk by chunk; gradients are made here and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work
    ) -> tuple[Tensor, ...]:
        exact = torch.promote_types(work.dtype, torch.float32)
        # Converted once, not once a chunk. A vocabulary of 50,257 is filled up: an odd dimension
        # would slow every product, and every load of the kernel.
        width = device_of(hidden.device).product_width
        student = Head(weight, bias).to(work.dtype, multiple=width)
        teacher = None
        if isinstance(work.taught, Taught):
            teacher = work.taught.head.to(work.taught.dtype, multiple=width)
        sums = Sums(*(torch.zeros((), dtype=exact, device=hidden.device) for _ in range(2)))
        # Frozen parts (a trained adapter beside a frozen head) get no gradient and hold no memory
        # for one.
        for_hidden, for_weight, for_bias = (
            wanted and work.trains for wanted in ctx.needs_input_grad[:3]
        )
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        # At least fp32, because rounding every chunk's share to 16 bits biases training.
        grad_weight = torch.zeros_like(student.weight, dtype=exact) if for_weight else None
        grad_bias = (
            torch.zeros_like(student.bias, dtype=exact)
            if student.bias is not None and for_bias
            else None
        )
        rows = _rows(student.weight, teacher, work)
        for start in range(0, len(work.labels), rows):
            part = slice(start, start + rows)
            h = hidden[part].to(work.dtype)  # (n, H_s): n rows of this chunk
            tile = student.products(h)  # (n, V_s), filled up
            theirs, done = _theirs(work.taught, teacher, part)
            # Afterwards `tile` holds the gradient with respect to the products, not the products.
            some = work.terms(
                tile, theirs, work.labels[part], work.loss, work.vocabulary, work.transform, done
            )
            sums.ce.add_(some.ce)
            sums.divergence.add_(some.divergence)
            # Frees the teacher's chunk before the products below ask for memory.
            del theirs
            if grad_hidden is not None:
                grad_hidden[part] = tile @ student.weight  # (n, H_s)
            if grad_weight is not None:
                if rows >= len(work.labels) and not _has_wide_products(tile, grad_weight):
                    # One product is rounded once, as autocast would; converting takes longer.
                    grad_weight.copy_(tile.T @ h)
                else:
                    _add_product(grad_weight, tile, h)
            if grad_bias is not None:
                grad_bias += tile.sum(0, dtype=exact)
        # These are of the summed loss; `backward` divides by the count and multiplies by what comes
        # from above, such as the loss scale of fp16.
        own = (None if each is None else each[: len(weight)] for each in (grad_weight, grad_bias))
        ctx.save_for_backward(grad_hidden, *own)
        ctx.count = max(len(work.labels), 1)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        # The sums are readings for the log; only the mean is trained on.
        ctx.mark_non_differentiable(sums.ce, sums.divergence)
        return work.mean(sums), sums.ce, sums.divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0] / ctx.count
        # What is asked for once is scaled where it is, and autograd then takes it over: no second
        # gradient of the size of the weight is made.
        once = not _is_kept()
        return (
            *(
                None if each is None else _scaled(each, scale, dtype, in_place=once)
                for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ),
            None,
        )


class _GivenLogits(torch.autograd.Function):
    """The same loss of logits that are there already; their gradient takes their size once more."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, work: _Work) -> tuple[Tensor, ...]:
        exact = torch.promote_types(logits.dtype, torch.float32)
        teacher = (
            work.taught.head.to(work.taught.dtype) if isinstance(work.taught, Taught) else None
        )
        sums = Sums(*(torch.zeros((), dtype=exact, device=logits.device) for _ in range(2)))
        gradient = torch.empty_like(logits)
        # (V, N): `_rows` finds the vocabulary in the first dimension, as in a head's weight.
        rows = _rows(logits.T, teacher, work)
        for start in range(0, len(work.labels), rows):
            part = slice(start, start + rows)
            # The gradient is made in a copy: autograd still needs the logits as they are.
            tile = gradient[part].copy_(logits[part])
            theirs, done = _theirs(work.taught, teacher, part)
            some = work.terms(
                tile, theirs, work.labels[part], work.loss, work.vocabulary, PLAIN, done
            )
            sums.ce.add_(some.ce)
            sums.divergence.add_(some.divergence)
        ctx.save_for_backward(gradient)
        ctx.count = max(len(work.labels), 1)
        ctx.mark_non_differentiable(sums.ce, sums.divergence)
        return work.mean(sums), sums.ce, sums.divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grads[0] / ctx.count), None


def _theirs(
    taught: Taught | Sparse | Logits | None, head: Head | None, part: slice
) -> tuple[Any, Transform]:
    """Return the teacher's side of a chunk and what makes logits of it: its products, logits, or a
    cache's entries.
    """
    if isinstance(taught, Sparse):
        return taught.rows(part), PLAIN
    if isinstance(taught, Logits):
        return taught.values[part], PLAIN
    if taught is None or head is None:
        return None, PLAIN
    return head.products(taught.hidden[part].to(taught.dtype)), head.transform


def _rows(weight: Tensor, teacher: Head | None, work: _Work) -> int:
    """Return how many tokens a chunk holds: a multiple of 64 where it is that large, as matrix
    units like it.
    """
    if work.rows is not None:
        return work.rows
    # Bytes of one token's logits
    columns = weight.shape[0] * work.dtype.itemsize
    if teacher is not None:
        columns += teacher.weight.shape[0] * teacher.weight.dtype.itemsize
    rows = max(1, (device_of(weight.device).chunk_bytes or TILE_BYTES) // columns)
    return rows - rows % 64 if rows > 64 else rows


def _weight_parts(weight: Tensor) -> list[slice]:
    """Return rows of a weight that are worked on at a time, so that what is made beside them stays
    small.
    """
    # 4 bytes an fp32 entry
    rows = max(1, WEIGHT_TILE_BYTES // (4 * weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _has_wide_products(tile: Tensor, total: Tensor) -> bool:
    """Return whether tile.T @ h can be had in the dtype of `total` without converting either."""
    return tile.dtype == total.dtype or device_of(total.device).wide_products


def _add_product(total: Tensor, tile: Tensor, h: Tensor) -> None:
    """Add tile.T @ h to `total` without rounding the product to 16 bits."""
    if tile.dtype == total.dtype:
        total.addmm_(tile.T, h)
    elif device_of(total.device).wide_products:
        torch.addmm(total, tile.T, h, out_dtype=total.dtype, out=total)
    else:
        # No kernel gives an fp32 product of 16-bit matrices here: convert, a part of the weight at
        # a time.
        wide = h.to(total.dtype)
        for part in _weight_parts(total):
            total[part].addmm_(tile[:, part].T.to(total.dtype), wide)


def _is_kept() -> bool:
    """Return whether the graph that is differentiated is kept for another time; torch tells its own
    compilers so.
    """
    asked: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # pyright: ignore
    return asked is None or asked()


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """Return `gradient * scale` in `dtype`; a matrix of another one is rounded a part at a time."""
    if gradient.dtype == dtype and in_place:
        return gradient.mul_(scale)
    if gradient.dtype == dtype or gradient.dim() != 2:
        return (gradient * scale).to(dtype)
    rounded = torch.empty_like(gradient, dtype=dtype)
    for part in _weight_parts(gradient):
        rounded[part] = gradient[part] * scale
    return rounded


def head_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    loss: Loss | None = None,
    dtype: torch.dtype = torch.float32,
    vocabulary: int | None = None,
    taught: Taught | Sparse | Logits | None = None,
    terms: Terms | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Sums]:
    """Compute the mean loss over the given tokens from hidden states, chunk by chunk.

    Args:
        hidden: (N, H_s) hidden states of predicted positions only.
        head: The student's output head, (V_s, H_s). Parts that need no gradient get none, and none
            is held for them.
        labels: (N,) token indexes below `vocabulary`.
        loss: What is minimised; None: cross-entropy.
        dtype: Of the matmuls; losses and softmaxes are at least fp32.
        vocabulary: Tokens both models share; columns beyond it are padding of one of them and take
            no part. None: all of the student's.
        taught: The teacher's side: live, its logits, or from a cache ((N, K) entries of the same
            positions, forward KL only); None: plain cross-entropy, whatever `loss.ce_weight` says.
        terms: What turns logits into gradients; None: the Triton kernel on CUDA, plain torch
            elsewhere.
        rows: Tokens of a chunk; None: what `Device.chunk_bytes` holds.

    Returns:
        The mean loss (0-dim, differentiable in `hidden` and the head), and the unweighted sums.
    """
    work = _Work(
        labels=labels,
        loss=loss or Loss(),
        vocabulary=vocabulary or head.columns,
        dtype=dtype,
        taught=taught,
        terms=terms or default_terms(hidden.device, cached=isinstance(taught, Sparse)),
        transform=head.transform,
        trains=torch.is_grad_enabled(),
        rows=rows,
    )
    # `dtype` says what is rounded; autocast would round the fp32 sums as well.
    with torch.autocast(hidden.device.type, enabled=False):
        value, ce, divergence = _FusedHead.apply(hidden, head.weight, head.bias, work)  # pyright: ignore[reportGeneralTypeIssues]
    return value, Sums(ce, divergence)


def logits_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    loss: Loss | None = None,
    vocabulary: int | None = None,
    taught: Taught | Sparse | Logits | None = None,
) -> tuple[Tensor, Sums]:
    """Compute what `head_loss` does from logits (N, V) in full, as a model itself gives them.

    They, and their gradient beside them, are all that is held in full.
    """
    work = _Work(
        labels=labels,
        loss=loss or Loss(),
        vocabulary=vocabulary or logits.shape[1],
        dtype=logits.dtype,
        taught=taught,
        terms=default_terms(logits.device, cached=isinstance(taught, Sparse)),
    )
    # As in `head_loss`.
    with torch.autocast(logits.device.type, enabled=False):
        value, ce, divergence = _GivenLogits.apply(logits, work)  # pyright: ignore[reportGeneralTypeIssues]
    return value, Sums(ce, divergence)


def default_terms(device: torch.device, *, cached: bool = False) -> Terms:
    """Return what makes gradients on a device: the kernel where Triton compiles for it, else plain
    torch.

    Args:
        cached: The teacher is given by the entries of a cache.
    """
    if device_of(device).triton:
        with suppress(ImportError):  # a build of torch that came without Triton
            from pipeline.distillation import triton_terms

            return triton_terms.sparse_terms_in_place if cached else triton_terms.terms_in_place
    return sparse_terms_in_place if cached else terms_in_place
