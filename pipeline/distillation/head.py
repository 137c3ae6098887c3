"""The output head and its loss, without ever holding a tokens x vocabulary tensor.

For each chunk of tokens the logits are projected once, turned into loss and gradient in fp32, and multiplied back
into the gradients of hidden states and head weight; then the chunk's logits are gone. So backward has nothing left
to compute, and memory is bounded by the chunk, not by the batch.

One definition of the loss serves training and distillation, per predicted token:

    loss = ce_weight * CE(z_s, y) + (1 - ce_weight) * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))

averaged over the predicted tokens. T^2 keeps the gradient's size comparable over temperatures.
Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of one fp32 logits tile; a few such tiles live at a time


@dataclass(frozen=True, slots=True)
class LossParts:
    """Sums over the predicted tokens of one batch, before weighting (0-dim fp32 tensors).

    Attributes:
        ce: Cross-entropy against the hard labels, nats.
        kl: T^2 * KL(teacher || student), nats; 0 without a teacher.
    """

    ce: Tensor
    kl: Tensor


def distillation_terms(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, *, temperature: float, ce_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss sums and the gradient of their weighted sum, in fp32.

    Args:
        student_logits: (N, V_s).
        teacher_logits: (N, V_t) with V_t = V_s, or None for plain cross-entropy (ce_weight is then taken as 1).
        labels: (N,) class or token indexes.
        temperature: T > 0.
        ce_weight: In [0, 1].

    Returns:
        Sum of CE, sum of T^2 * KL, and the gradient with respect to the student's logits (N, V_s).
    """
    logits = student_logits.float()
    log_q = F.log_softmax(logits, dim=-1)
    ce = F.nll_loss(log_q, labels, reduction="sum")
    weight = ce_weight if teacher_logits is not None else 1.0
    gradient = log_q.exp()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    gradient *= weight
    if teacher_logits is None:
        return ce, torch.zeros_like(ce), gradient
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    log_q_t = log_q if temperature == 1.0 else F.log_softmax(logits / temperature, dim=-1)
    p = log_p.exp()
    kl = temperature**2 * torch.where(p == 0, 0.0, p * (log_p - log_q_t)).sum()  # 0 * (-inf - x) is 0 in a KL
    gradient += (1 - weight) * temperature * (log_q_t.exp() - p)
    return ce, kl, gradient


class _FusedHead(torch.autograd.Function):
    """Loss of all tokens, chunk by chunk; gradients are made here and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, ...]:
        count = max(len(work.labels), 1)
        dtype = work.dtype
        head = weight.to(dtype)
        teacher_head = None if work.teacher_weight is None else work.teacher_weight.to(work.teacher_dtype)
        ce, kl = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        # fp32, because rounding every chunk's share to 16 bits biases training.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(work.labels), rows):
            part = slice(start, start + rows)
            h = hidden[part].to(dtype)
            logits = F.linear(h, head, None if bias is None else bias.to(dtype))
            teacher_logits = None if teacher_head is None else work.teacher_logits(part, teacher_head)
            some_ce, some_kl, gradient = distillation_terms(
                logits[:, : work.vocabulary], teacher_logits, work.labels[part],
                temperature=work.temperature, ce_weight=work.ce_weight,
            )  # fmt: skip
            ce += some_ce
            kl += some_kl
            gradient = F.pad(gradient, (0, logits.shape[1] - work.vocabulary))
            tile = gradient.to(dtype)
            grad_hidden[part] = (tile @ head).to(grad_hidden.dtype)
            grad_weight += (tile.T @ h).float()
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        weight_ce = work.ce_weight if teacher_head is not None else 1.0
        ctx.save_for_backward(grad_hidden, grad_weight, *([] if grad_bias is None else [grad_bias]))
        ctx.count, ctx.dtypes = count, (weight.dtype, None if bias is None else bias.dtype)
        loss = (weight_ce * ce + (1 - weight_ce) * kl) / count
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, *rest = ctx.saved_tensors
        scale = grads[0] / ctx.count
        weight_dtype, bias_dtype = ctx.dtypes
        grad_bias = (rest[0] * scale).to(bias_dtype) if rest else None
        return grad_hidden * scale, (grad_weight * scale).to(weight_dtype), grad_bias, None


@dataclass(slots=True)
class _Work:
    """What the fused head needs beside the tensors it differentiates."""

    labels: Tensor
    vocabulary: int
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    temperature: float
    ce_weight: float

    def teacher_logits(self, part: slice, head: Tensor) -> Tensor:
        assert self.teacher_hidden is not None
        bias = None if self.teacher_bias is None else self.teacher_bias.to(head.dtype)
        return F.linear(self.teacher_hidden[part].to(head.dtype), head, bias)[:, : self.vocabulary]


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


def head_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    vocabulary: int | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    teacher_dtype: torch.dtype | None = None,
    temperature: float = 1.0,
    ce_weight: float = 1.0,
) -> tuple[Tensor, LossParts]:
    """Compute the mean loss over the given tokens from hidden states, chunk by chunk.

    Args:
        hidden: (N, H_s) hidden states of predicted positions only.
        head: The student's output head, (V_s, H_s).
        labels: (N,) token indexes below `vocabulary`.
        dtype: Of the matmuls; losses and softmaxes are fp32.
        vocabulary: Tokens both models share; columns beyond it are padding of one of them and take no part.
            None: all of the student's.
        teacher_hidden: (N, H_t), of the same positions.
        teacher_head: The teacher's output head, (V_t, H_t).
        teacher_dtype: Of the teacher's matmul; None: as `dtype`.
        temperature: T > 0.
        ce_weight: Weight of the hard labels in [0, 1]; 1 - ce_weight is the teacher's. Without a teacher it is 1.

    Returns:
        The mean loss (0-dim, differentiable in `hidden` and the head), and the unweighted sums.
    """
    work = _Work(
        labels=labels, vocabulary=vocabulary or head.weight.shape[0], dtype=dtype,
        teacher_dtype=teacher_dtype or dtype, teacher_hidden=teacher_hidden,
        teacher_weight=None if teacher_head is None else teacher_head.weight,
        teacher_bias=None if teacher_head is None else teacher_head.bias,
        temperature=temperature, ce_weight=ce_weight,
    )  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        loss, ce, kl = _FusedHead.apply(hidden, head.weight, head.bias, work)  # pyright: ignore[reportGeneralTypeIssues]
    return loss, LossParts(ce, kl)
