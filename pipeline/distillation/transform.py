"""What a model does to the product of its head before it calls it logits.

It may scale it, cap it softly, and leave columns out:

    logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap)

The settings that models keep these figures under are known by name, and their meaning differs:
Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it, MPT ignores its `logit_scale`.
So a config gives *readings*, the likely one first, and `prove` takes the first that is equal to
what the model itself computes. Fresh logits are too small for a cap to be seen, so it looks at
amplified ones as well. A factor that no setting names is not estimated: it could be a parameter,
which would then never be trained.
Source: transformers 5.23, all modeling_*.py that have a causal language model, between `lm_head`
and `logits`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM, Inkling
# Gemma, RecurrentGemma, xLSTM
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SPAN = 256.0  # of amplified logits before the cap: far beyond every cap in use, 15 to 50
TOLERANCE = 1e-3  # of logits, of the largest one; 16-bit weights: 4 roundings
NOISE = 0.05  # standard deviation of what stands in for weights that are all zero


@dataclass(frozen=True, slots=True)
class Transform:
    """What is done to a head's product, element by element.

    Attributes:
        scale: It is multiplied with.
        cap: Largest absolute value, approached by tanh; None: none.
        columns: Logits that the model gives: the first so many; None: as many as the head has.
    """

    scale: float = 1.0
    cap: float | None = None
    columns: int | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing is done to any element."""
        return self.scale == 1 and self.cap is None

    def logits(self, product: Tensor) -> Tensor:
        """Return the logits of a product, both (N, V); the product itself where nothing is done."""
        scaled = product if self.scale == 1 else product * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def slope(self, product: Tensor) -> Tensor | float:
        """Return d logits / d product, (N, V) as the product, or one number for all elements."""
        if self.cap is None:
            return self.scale
        # 1 - tanh^2 would cancel where the cap is near; 4 e / (1 + e)^2 with e = exp(-2 |x|) does
        # not.
        share = (product.abs() * (-2 * self.scale / self.cap)).exp_()
        return share.mul(4 * self.scale).div_(share.add_(1).square_())

    def in_words(self) -> str:
        """Return what is done, `scale 0.0625, soft cap 30`, or nothing."""
        parts = [f"scale {self.scale:g}"] * (self.scale != 1) + [f"soft cap {self.cap or 0:g}"] * (
            self.cap is not None
        )
        return ", ".join(parts)


PLAIN = Transform()


@dataclass(frozen=True, slots=True)
class Unknown:
    """A head that is not known: its model's logits are taken as the model gives them, in full.

    Attributes:
        why: What keeps it from being known.
        columns: Logits of a token.
    """

    why: str
    columns: int


def readings(config: Any) -> Iterator[Transform]:
    """Yield the transforms that a config may stand for, the likeliest first: each setting as it is
    usually meant, then inverted, then without effect.

    Args:
        config: Of a model; the part that is about text is read.
    """
    text = config.get_text_config()
    # One list of possible factors a setting; their product is taken in every combination below.
    scales = [_numbers(text, name, inverse=name in DIVISORS) for name in (*MULTIPLIERS, *DIVISORS)]
    base = _number(text, "dim_model_base")  # MiniCPM: the width that its learning rate was found at
    if base is not None:
        scales.append([base / text.hidden_size, 1.0])
    caps = [[cap, None] for name in CAPS if (cap := _number(text, name)) is not None]
    seen: set[Transform] = set()
    for chosen in itertools.product(*caps, *[each for each in scales if each]):
        cap = next((each for each in chosen[: len(caps)] if each is not None), None)
        scale = 1.0
        for factor in chosen[len(caps) :]:
            assert factor is not None
            scale *= factor
        found = Transform(scale, cap)
        if found not in seen:
            seen.add(found)
            yield found


def _numbers(config: Any, name: str, *, inverse: bool) -> list[float]:
    """Return the factors that a setting may stand for; none where it is not there."""
    given = _number(config, name)
    if given is None:
        return []
    return [1 / given, given, 1.0] if inverse else [given, 1 / given, 1.0]


def _number(config: Any, name: str) -> float | None:
    given = getattr(config, name, None)
    return (
        float(given)
        if isinstance(given, int | float) and not isinstance(given, bool) and given > 0
        else None
    )


def as_configured(model: Any) -> Transform:
    """Return the likeliest reading of a model's config, unproven."""
    return next(readings(model.config))


def prove(model: Any, inputs: dict[str, Tensor]) -> Transform | Unknown:
    """Return the transform with which the head gives the model's own logits, or why there is none
    that is known.

    Args:
        model: A causal language model in evaluation mode; autograd is off.
        inputs: A few tokens, (B, T) each; the model gives finite logits of them, (B, T, V).
    """
    columns = model(**copies(inputs), use_cache=False).logits.shape[-1]
    found = _proven(model, inputs)
    return Unknown(found, columns) if isinstance(found, str) else found


def _proven(model: Any, inputs: dict[str, Tensor]) -> Transform | str:
    """Return the transform, or why there is none."""
    body = _body_of(model, inputs)
    if body is None:
        return "it has no body apart from its head that gives hidden states"
    hidden = model.base_model(**copies(inputs), use_cache=False).last_hidden_state
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if (
        weight is None
        or weight.dim() != 2
        or not weight.is_floating_point()
        or weight.shape[1] != hidden.shape[-1]
    ):
        return "it has no output layer whose weights are (vocabulary, hidden size)"
    # Without the bias: amplifying hidden states amplifies the product alone.
    product = F.linear(hidden.to(weight.dtype), weight).float()
    bias = getattr(layer, "bias", None)
    added = 0.0 if bias is None else bias.float()
    given = list(readings(model.config))
    factors = (1.0, SPAN / float(given[0].scale * product.abs().max().clamp(min=1e-6)))
    theirs = [_logits(model, body, inputs, factor) for factor in factors]
    columns = theirs[0].shape[-1]
    if columns > len(weight):
        return f"it gives {columns} logits and its output layer {len(weight)}"
    allowed = tolerance(weight.dtype)
    for each in given:
        ours = [each.logits(factor * product + added)[..., :columns] for factor in factors]
        if all(near(mine, other, allowed) for mine, other in zip(ours, theirs, strict=True)):
            # Such parameters would get no gradient from the fused head.
            if _trains_more(model, body, inputs, layer):
                return "it has parameters between its body and its logits"
            return each if columns == len(weight) else replace(each, columns=columns)
    return (
        "its logits are another function of its hidden states than a product, a scale and a"
        " soft cap"
    )


def copies(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a model may change in place: XGLM moves the positions that it is given."""
    return {name: tensor.clone() for name, tensor in inputs.items()}


def tolerance(dtype: torch.dtype) -> float:
    """Return the share of the largest value that rounding may make a difference of."""
    return max(TOLERANCE, 4 * torch.finfo(dtype).eps)


def near(ours: Tensor, theirs: Tensor, allowed: float) -> bool:
    """Tell whether two tensors differ by rounding only; what is not finite is never near.

    Args:
        allowed: Largest absolute difference, as a share of the largest absolute value of `theirs`.
    """
    return bool((ours - theirs).abs().max() <= allowed * theirs.abs().max())


def _body_of(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Return the module whose hidden states the model's own forward goes on from; None where there
    is none.

    Some models go around their `base_model` to the decoder within it (OPT).
    """
    for body in (model.base_model, model.get_decoder()):
        ran: list[bool] = []
        if body is model:
            continue
        # `ran=ran` binds the list of this round; a closure would see the last one.
        hook = body.register_forward_hook(
            lambda _, __, output, ran=ran: ran.append(
                getattr(output, "last_hidden_state", None) is not None
            )
        )
        try:
            model(**copies(inputs), use_cache=False)
        finally:
            hook.remove()
        # It ran exactly once and gave hidden states.
        if ran == [True]:
            return body
    return None


def _logits(model: Any, body: Any, inputs: dict[str, Tensor], factor: float) -> Tensor:
    """Return the model's own logits where its body gives `factor` times what it does, fp32."""
    with _giving(body, lambda states: states * factor):
        return model(**copies(inputs), use_cache=False).logits.float()


@contextmanager
def _giving(body: Any, change: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Have what follows a model's body read changed hidden states."""

    def changed(_: Any, __: Any, output: Any) -> Any:
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    hook = body.register_forward_hook(changed)
    try:
        yield
    finally:
        hook.remove()


def _trains_more(model: Any, body: Any, inputs: dict[str, Tensor], layer: Any) -> bool:
    """Tell whether logits depend on parameters that are neither the body's nor the output
    layer's.
    """
    known = {id(each) for part in (model.base_model, layer) for each in part.parameters()}
    more = [
        each for each in model.parameters() if id(each) not in known and each.is_floating_point()
    ]
    if not more:
        return False
    wanted = [each.requires_grad for each in more]
    for each in more:
        each.requires_grad_()
    try:
        # Detached states leave only parameters behind the body as a source of gradients.
        with torch.enable_grad(), _giving(body, Tensor.detach):
            logits = model(**copies(inputs), use_cache=False).logits
            if not logits.requires_grad:
                return False
            slopes: Any = torch.autograd.grad(logits.sum(), more, allow_unused=True)
            return any(each is not None for each in slopes)
    finally:
        for each, was in zip(more, wanted, strict=True):
            each.requires_grad_(was)


@contextmanager
def nothing_is_zero(model: Any) -> Generator[None]:
    """Put noise in place of parameters that are all zero, and take it back at the end.

    What a fresh model multiplies with zero (a bias, the last matrix of a residual branch) cannot be
    seen in what it gives, and will be seen once it is trained.
    """
    zero: Sequence[Tensor] = [each for each in model.parameters() if _is_zero(each)]
    # Its own generator: examining a model must not move the training's random numbers.
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in zero:
            each.copy_(NOISE * torch.randn(each.shape, generator=draw))
        try:
            yield
        finally:
            for each in zero:
                each.zero_()


def _is_zero(parameter: Tensor) -> bool:
    if not parameter.is_floating_point() or not parameter.numel() or parameter.is_meta:
        return False
    # The first element spares almost every parameter a pass over all of it.
    return not parameter.flatten()[0] and not parameter.any()
