"""Attention-relation loss, as in MiniLMv2: match how queries, keys and values relate positions.

With X one layer's queries, cut along their width into A heads X_a of d features, whatever heads
attention itself has (so that models may differ in heads, in width and in key-value heads):

    R_a = softmax(X_a X_a^T / sqrt(d))      over the positions that a position may read
    S = sum over queries, keys, values of   the mean over a and positions t of
                                            KL(R_a,t of the teacher || R_a,t)

Queries and keys are those that the projections give, before rotary positions. Positions count as
for hidden states. The gradient is made by hand, a few rows at a time, so that no more than a few
(A, T, T) tensors live at once; with P and Q both relations, each position's row times its weight,

    dS/dX_a = ((Q - P) + (Q - P)^T) X_a / sqrt(d)

Source: Wang et al. 2021, MiniLMv2, arXiv 2012.15828, section 3.1 and equations 5 to 8.

Shape legend: B rows, T positions, D width of queries (keys, values), A heads, d = D / A.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.numbers import how_many
from pipeline.models.layers import layer_count, layer_stacks

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)
BLOCK_BYTES = 4 * 2**20
"""Of one (rows, A, T, T) tensor, on a CPU."""


class RelationSignal:
    """The relations of one layer of each model: which modules are read, and the loss they take part
    in.

    Args:
        student: The modules that make queries, keys and values (`find_projections`).
        teacher: Those of its teacher.
        heads: A; divides every width.
        weight: Of the signal beside the other parts of the loss.
    """

    def __init__(
        self, student: Sequence[nn.Module], teacher: Sequence[nn.Module], heads: int, weight: float
    ) -> None:
        self.student, self.teacher, self.heads, self.weight = student, teacher, heads, weight

    def __call__(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], may_read: Tensor, weights: Tensor
    ) -> Tensor:
        """Return S, 0-dim, at least fp32.

        Args:
            ours: The student's queries, keys and values, (B, T, D_s) each.
            theirs: The teacher's, (B, T, D_t).
            may_read: (B, T, T) bool: whether a position reads another.
            weights: Of positions, (B, T), summing to 1.
        """
        kinds = zip(ours, theirs, strict=True)
        return torch.stack(
            [relation_divergence(x, y, may_read, weights, self.heads) for x, y in kinds]
        ).sum()

    def flops(self, rows: int, length: int) -> float:
        """Return the FLOPs of both models' relations and of the student's gradient (one product: it
        is symmetric).
        """
        ours, theirs = (sum(_width(each) for each in side) for side in (self.student, self.teacher))
        return (4.0 * ours + 2.0 * theirs) * rows * length**2


def relation_signal(
    student: Any, teacher: Any, *, layer: int | None, heads: int | None, weight: float, key: str
) -> RelationSignal:
    """Return the signal between the student's last layer and one of its teacher's.

    Args:
        layer: Of the teacher, from 0; None: its last.
        heads: None: as many as the teacher's attention has.
        key: Of the stage (`stages.student`), for refusals.

    Raises:
        UserError: If a model has no such layer or projections, or the heads do not cut them.
    """
    weighing = f"{key}.relation_weight"
    ours, theirs = (_layers(model, weighing) for model in (student, teacher))
    chosen = len(theirs) - 1 if layer is None else layer
    if chosen >= len(theirs):
        problem = f"the teacher has no layer {chosen}"
        raise UserError(f"{key}.relation_layer", problem, f"give 0 to {len(theirs) - 1}")
    sides = (
        find_projections(ours[-1], student, weighing),
        find_projections(theirs[chosen], teacher, weighing),
    )
    wanted = heads or teacher.config.get_text_config().num_attention_heads
    widths = {_width(each) for side in sides for each in side}
    if any(width % wanted for width in widths):
        whole = max(
            count for count in range(1, wanted) if not any(width % count for width in widths)
        )
        problem = (
            f"{wanted} heads do not cut queries, keys and values of width"
            f" {', '.join(map(str, sorted(widths)))}"
        )
        raise UserError(f"{key}.relation_heads", problem, f"give {whole}, for one")
    return RelationSignal(sides[0], sides[1], wanted, weight)


def find_projections(layer: nn.Module, model: Any, key: str) -> list[nn.Module]:
    """Return the three modules that make a layer's queries, keys and values.

    Raises:
        UserError: If they are not there one by one under a known name.
    """
    named = [(name.rpartition(".")[2], module) for name, module in layer.named_modules()]
    for names in PROJECTIONS:
        found = [[module for name, module in named if name == wanted] for wanted in names]
        if all(len(modules) == 1 and hasattr(modules[0], "out_features") for modules in found):
            return [modules[0] for modules in found]
    problem = f"{type(model).__name__} has no separate projections of queries, keys and values"
    raise UserError(key, problem, "leave it at 0 for this model")


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Generator[list[Tensor]]:
    """Collect what `modules` give, (B, T, D) each in their order, while their model runs inside.

    The hooks are gone afterwards, so evaluation does not pass them.
    """
    given: list[Any] = [None] * len(modules)

    def keeping(place: int) -> Any:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            given[place] = output

        return keep

    hooks = [module.register_forward_hook(keeping(place)) for place, module in enumerate(modules)]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def relation_divergence(
    student: Tensor, teacher: Tensor, may_read: Tensor, weights: Tensor, heads: int
) -> Tensor:
    """Return one kind's part of S, 0-dim, at least fp32.

    Args:
        student: (B, T, D_s) queries, keys or values; differentiable.
        teacher: (B, T, D_t).
        may_read: (B, T, T) bool. A position that reads none, or only itself, adds 0.
        weights: (B, T).
        heads: Divides D_s and D_t.
    """
    with torch.autocast(student.device.type, enabled=False):
        return _Divergence.apply(student, teacher, may_read, weights, heads)  # pyright: ignore[reportReturnType]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, may_read: Tensor, weights: Tensor, heads: int
    ) -> Tensor:
        exact = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=student.device)
        # fp16 would lose what the loss scale is still to lift
        gradient = torch.empty_like(student, dtype=exact)
        block = device_of(student.device).chunk_bytes or BLOCK_BYTES
        # 4 bytes an fp32 entry of (A, T, T)
        rows = max(1, block // (4 * heads * student.shape[1] ** 2))
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            each = weights[part, None, :, None].to(exact) / heads  # (n, 1, T, 1): a mean over heads
            # (n, A, T, d) and (n, 1, T, T)
            ours, hidden = _split(student[part].to(exact), heads), ~may_read[part, None]
            z, t = _scores(ours, hidden), _scores(_split(teacher[part].to(exact), heads), hidden)
            log_q, log_p = z.log_softmax(-1), t.log_softmax(-1)
            p = log_p.exp()
            total += (torch.linalg.vecdot(p, log_p - log_q) * each[..., 0]).sum()
            slope = log_q.exp_().sub_(p).mul_(each)
            # X stands on both sides of X X^T, so the gradient has the slope and its transpose.
            pull = (slope + slope.mT) @ ours / ours.shape[-1] ** 0.5
            # (n, A, T, d) back to (n, T, D)
            gradient[part] = pull.transpose(1, 2).flatten(2)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0]).to(ctx.dtype), None, None, None, None


def _split(states: Tensor, heads: int) -> Tensor:
    """Cut (B, T, D) into (B, A, T, d)."""
    return states.unflatten(2, (heads, -1)).transpose(1, 2)


def _scores(parts: Tensor, hidden: Tensor) -> Tensor:
    """Return X_a X_a^T / sqrt(d), (B, A, T, T).

    What may not be read gets the least number rather than -inf: a row that reads nothing is then
    the same uniform distribution in both models, whose divergence and gradient are exactly 0.
    """
    # Divided before the product, which keeps its values small.
    scores = parts @ (parts / parts.shape[-1] ** 0.5).mT
    return scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)


def _layers(model: Any, key: str) -> Any:
    stacks = layer_stacks(model, layer_count(model.config))
    if len(stacks) != 1:
        raise UserError(
            key,
            f"{type(model).__name__} has {how_many(len(stacks), 'stack')} of layers",
            "leave it at 0",
        )
    return stacks[0][1]


def _width(module: Any) -> int:
    return int(module.out_features)
