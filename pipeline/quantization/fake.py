"""Fake quantization: train a model whose layers compute with the values they will have once
quantized.

Each forward pass rounds a layer's weight as the library would, and, where the format quantizes
activations, the layer's input as its kernel would. Rounding has no slope, so backward passes
through it as if it were not there (straight-through), and the weights that the optimizer moves stay
unrounded. With adapters the weights stay as they are and two narrow matrices are trained whose
product is added to each before it is rounded: what is merged and quantized afterwards is then the
very model that was trained. (Adapters beside a quantized weight are not: rounding their sum takes
most of it back, for what they add is smaller than a step of 4 bits.)
Source: Bengio et al. 2013, arXiv 1308.3432, section 4 (straight-through); Liu et al. 2023, arXiv
2305.17888 (quantization-aware distillation from the unquantized model); Hu et al. 2021, arXiv
2106.09685, section 4.1 (LoRA); Bondarenko et al. 2024, arXiv 2406.06385, section 3 (adapters inside
the rounding); of the formats' own rounding: `bnb.py`, `ao.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.config.settings.quantization import Format
from pipeline.quantization.backend import backend_of
from pipeline.quantization.layers import Layer

# LLM.int8(): input columns that reach it stay as they are. Source: arXiv 2208.07339, section 3.2
OUTLIER = 6.0
INT8_MOST = 127.0
INT8_HALF_RANGE = 127.5  # of -128 to 127
# of a layer's output in norm: rounding inputs to 8 bits makes 6e-3, to 16 bits 4e-4 at most
INT8_NOISE = 2e-3
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Adapters:
    """Size of the adapters: what they add is scaled by `alpha / rank`."""

    rank: int
    alpha: float


class LowRank(nn.Module):
    """Adds the product of two low-rank matrices to a weight (out, in); it is 0 before training."""

    def __init__(self, weight: Tensor, adapters: Adapters) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = adapters.alpha / adapters.rank
        self.down = nn.Parameter(torch.empty(adapters.rank, columns, device=weight.device))
        # Zero, so that training starts from the unchanged model.
        self.up = nn.Parameter(torch.zeros(rows, adapters.rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with what is added to it, of the same shape."""
        # FLOPs are counted there, by token; this product is one a step, and small
        if weight.is_meta:
            return weight + self.up.sum()
        return weight + self.scale * (self.up @ self.down)


class RoundedWeight(nn.Module):
    """Rounds a weight as `fmt` would; the gradient passes through as if it were not rounded."""

    def __init__(self, fmt: Format, dtype: torch.dtype, *, transposed: bool) -> None:
        super().__init__()
        self.fmt, self.dtype, self.transposed = fmt, dtype, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight, of the same shape: (out, in), or (in, out) in GPT-2's
        layers.
        """
        if weight.is_meta:
            return weight
        given = weight.detach().to(self.dtype)  # what the library is given
        rounded = backend_of(self.fmt).round_trip(given.T if self.transposed else given, self.fmt)
        return _straight_through(weight, rounded.T if self.transposed else rounded)


def fake_quantize(
    model: Any,
    layers: Sequence[Layer],
    fmt: Format,
    dtype: torch.dtype,
    adapters: Adapters | None = None,
) -> Callable[[], None]:
    """Have the named `layers` of `model` compute as `fmt` would; return what undoes it and leaves
    what was trained.

    Args:
        layers: As `plan_layers` names them.
        dtype: That unquantized weights have when the library reads them.
        adapters: Trained in place of all weights, which are frozen. Seed torch first.
    """
    if adapters is not None:
        model.requires_grad_(requires_grad=False)
    hooks: list[Any] = []
    modules: list[Any] = [model.get_submodule(layer.name) for layer in layers]
    for module, layer in zip(modules, layers, strict=True):
        if adapters is not None:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, adapters))
        rounded = RoundedWeight(fmt, dtype, transposed=layer.transposed)
        # After the adapters: what is rounded is their sum. With `unsafe` torch does not check shape
        # and dtype at registration.
        parametrize.register_parametrization(module, "weight", rounded, unsafe=True)
        if fmt in ACTIVATIONS:
            hooks.append(_round_inputs(module, ACTIVATIONS[fmt]))

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        for module in modules:
            own = module.parametrizations.weight
            # With adapters, the weight merged with them, before it is rounded.
            trained = own.original if adapters is None else own[0](own.original).detach()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight.data = trained.data

    return undo


def _round_inputs(module: nn.Module, rounding: Callable[[Tensor], Tensor]) -> Any:
    return module.register_forward_pre_hook(
        lambda _, args: (_straight_through(args[0], rounding(args[0].detach())), *args[1:])
    )


class _StraightThrough(torch.autograd.Function):
    """The second value, exactly, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:  # pyright: ignore
        # A copy: autograd would take a returned input for a view of itself.
        return rounded.to(value.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grad, None


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    given: Any = _StraightThrough.apply(value, rounded)
    return given


def int8_by_token(inputs: Tensor) -> Tensor:
    """Round (..., in) to 8-bit integers with a scale for each token, as torchao does.

    Shape and dtype stay; the values are those that 8 bits and the scale can hold.
    """
    # (..., 1): one a token
    scale = inputs.abs().amax(-1, keepdim=True).float().clamp_min(1e-5) / INT8_HALF_RANGE
    return ((inputs / scale).round().clamp(-128, 127) * scale).to(inputs.dtype)


def int8_but_outliers(inputs: Tensor) -> Tensor:
    """Round as LLM.int8() does: in fp16, by token, leaving alone the columns in which any token
    reaches `OUTLIER`.

    A token's scale is that of its largest value below `OUTLIER`, in whatever column that is. Shape
    (..., in) and dtype stay. Left alone where the library does not round on this device
    (`rounds_inputs`).
    """
    if not rounds_inputs(inputs.device.type):
        return inputs
    # (tokens, in)
    flat = inputs.flatten(0, -2)
    halves = flat.half()
    outliers = halves.abs() >= OUTLIER
    columns = outliers.any(0)
    rest = halves.masked_fill(outliers, 0.0).float()
    scale = rest.abs().amax(-1, keepdim=True).clamp_min(1e-5) / INT8_MOST
    rounded = (rest / scale).round().mul(scale).to(inputs.dtype)
    return torch.where(columns, flat, rounded).reshape(inputs.shape)


@lru_cache
def rounds_inputs(device: str) -> bool:
    """Return whether a layer that bitsandbytes quantized to int8 rounds its input on a device, as
    it is served.

    Asked of the library itself, by a small layer: it has changed over versions, and its paths
    differ by device.
    """
    from bitsandbytes.nn.modules import Linear8bitLt

    draw = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(64, 64, generator=draw).to(device) for _ in range(2))
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=OUTLIER)
    layer.load_state_dict({"weight": weight})
    with torch.no_grad():
        served = layer.to(device).eval()(inputs.half()).float()
    # Rounded weights, unrounded inputs: what the library gives where it leaves inputs alone.
    as_it_is = inputs.half().float() @ backend_of(Format.int8).round_trip(weight, Format.int8).T
    return bool((served - as_it_is).norm() > INT8_NOISE * as_it_is.norm())


def float8_by_token(inputs: Tensor) -> Tensor:
    """Round (..., in) to float8 (e4m3) with a scale for each token; shape and dtype stay."""
    largest = torch.finfo(FLOAT8).max
    scale = inputs.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / largest
    return ((inputs / scale).clamp(-largest, largest).to(FLOAT8).float() * scale).to(inputs.dtype)


ACTIVATIONS: dict[Format, Callable[[Tensor], Tensor]] = {
    Format.int8: int8_but_outliers,
    Format.int8_dynamic: int8_by_token,
    Format.float8_dynamic: float8_by_token,
}
"""What formats do to a layer's input; the others leave it alone."""
