"""Fake quantization: train a model whose layers compute with the values they will have once quantized.

Each forward pass rounds a layer's weight as the library would, and, where the format quantizes activations, the layer's
input as its kernel would. Rounding has no slope, so backward passes through it as if it were not there
(straight-through), and the weights that the optimizer moves stay unrounded.
Source: Bengio et al. 2013, arXiv 1308.3432, section 4 (straight-through); Liu et al. 2023, arXiv 2305.17888
(quantization-aware distillation from the unquantized model); of the formats' own rounding: `bnb.py`, `ao.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.config import Format
from pipeline.quantization.backend import backend_of
from pipeline.quantization.layers import Layer

OUTLIER = 6.0  # LLM.int8(): input columns that reach it stay as they are. Source: arXiv 2208.07339, section 3.2
INT8_MOST = 127.0
FLOAT8 = torch.float8_e4m3fn


class RoundedWeight(nn.Module):
    """Gives a weight as `fmt` would leave it; the gradient is that of the weight itself."""

    def __init__(self, fmt: Format, dtype: torch.dtype, *, transposed: bool) -> None:
        super().__init__()
        self.fmt, self.dtype, self.transposed = fmt, dtype, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight, of the same shape: (out, in), or (in, out) in GPT-2's layers."""
        if weight.is_meta:  # FLOPs are counted there
            return weight
        given = weight.detach().to(self.dtype)  # what the library is given
        rounded = backend_of(self.fmt).round_trip(given.T if self.transposed else given, self.fmt)
        return _straight_through(weight, rounded.T if self.transposed else rounded)


def fake_quantize(model: Any, layers: Sequence[Layer], fmt: Format, dtype: torch.dtype) -> Callable[[], None]:
    """Have the named `layers` of `model` compute as `fmt` would; return what undoes it and leaves their weights.

    Args:
        layers: As `plan_layers` names them.
        dtype: That unquantized weights have when the library reads them.
    """
    hooks: list[Any] = []
    modules: list[Any] = [model.get_submodule(layer.name) for layer in layers]
    activations = ACTIVATIONS.get(fmt)
    for module, layer in zip(modules, layers, strict=True):
        rounded = RoundedWeight(fmt, dtype, transposed=layer.transposed)
        parametrize.register_parametrization(module, "weight", rounded, unsafe=True)
        if activations is not None:
            rounding: Callable[[Tensor], Tensor] = activations
            hooks.append(module.register_forward_pre_hook(
                lambda _, args, rounding=rounding: (_straight_through(args[0], rounding(args[0].detach())), *args[1:])
            ))  # fmt: skip

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        for module in modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

    return undo


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded.to(value.dtype) - value).detach()


def int8_by_token(inputs: Tensor) -> Tensor:
    """Round (..., in) to 8-bit integers with a scale for each token."""
    scale = inputs.abs().amax(-1, keepdim=True).float().clamp_min(1e-5) / INT8_MOST
    return ((inputs / scale).round().clamp(-INT8_MOST, INT8_MOST) * scale).to(inputs.dtype)


def int8_but_outliers(inputs: Tensor) -> Tensor:
    """Round as LLM.int8() does: by token, leaving alone the columns in which any token reaches `OUTLIER`."""
    flat = inputs.flatten(0, -2)
    columns = (flat.abs() >= OUTLIER).any(0)
    rounded = int8_by_token(flat.masked_fill(columns, 0.0))
    return torch.where(columns, flat, rounded).reshape(inputs.shape)


def float8_by_token(inputs: Tensor) -> Tensor:
    """Round (..., in) to float8 (e4m3) with a scale for each token."""
    largest = torch.finfo(FLOAT8).max
    scale = inputs.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / largest
    return ((inputs / scale).clamp(-largest, largest).to(FLOAT8).float() * scale).to(inputs.dtype)


ACTIVATIONS: dict[Format, Callable[[Tensor], Tensor]] = {
    Format.int8: int8_but_outliers, Format.int8_dynamic: int8_by_token, Format.float8_dynamic: float8_by_token,
}  # fmt: skip
"""What formats do to a layer's input; the others leave it alone."""
