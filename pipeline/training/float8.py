"""Linear layers that multiply in float8 while a model trains (torchao), and plain ones again
afterwards.

Inputs, weights and gradients are cast to 8 bits with a scale for the whole tensor (`tensorwise`) or
for each row (`rowwise`: steadier, slower); what is stored and stepped stays as it was. Casting
costs a pass over each of them, so that only wide layers gain: heads and narrow layers are left
alone. Without torch.compile the casts are not fused.
Source: torchao.float8, its README (speedups by width on H100) and its config.py (recipes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from pipeline.config.settings.precision import Precision
from pipeline.errors import UserError
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.numbers import agreed, how_many

RECIPES = {Precision.fp8_tensorwise: "tensorwise", Precision.fp8_rowwise: "rowwise"}
MULTIPLE = 16  # widths that torch._scaled_mm takes
EMULATE = False  # multiply in fp32 what was rounded to 8 bits: for a device without the kernels


def why_not_float8(precision: Precision, device: torch.device) -> str | None:
    """Return why `device` cannot train in a float8 precision, or None."""
    if find_spec("torchao") is None:
        return f"{precision.value} needs torchao, which is not installed"
    return device_of(device).why_not_precision(precision)


def wide_layers(model: Any, least_width: int) -> tuple[list[str], list[str]]:
    """Return the names of the body's linear layers that float8 takes, and of those that it leaves
    alone.

    A layer is taken where both sides of its shape (out, in) are at least `least_width` and
    multiples of 16.
    """
    linear = [
        (name, layer)
        for name, layer in model.base_model.named_modules()
        if type(layer) is torch.nn.Linear
    ]
    # `_scaled_mm` takes multiples of 16 alone; narrow layers lose more to casting than they gain.
    takes = lambda width: width >= least_width and width % MULTIPLE == 0
    wide = [
        name for name, layer in linear if takes(layer.in_features) and takes(layer.out_features)
    ]
    return wide, [name for name, _ in linear if name not in wide]


@contextmanager
def float8_layers(
    model: Any, precision: Precision, *, least_width: int, say: Callable[[str], None]
) -> Generator[None]:
    """Have the wide layers of `model`'s body multiply in float8 inside, where `precision` says so.

    Raises:
        UserError: If no layer is wide enough.
    """
    if precision not in RECIPES:
        yield
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    wide, narrow = wide_layers(model, least_width)
    # Training in bf16 under the name of fp8 would be a silent fallback.
    if not wide:
        problem = (
            f"{precision.value}: no linear layer has both widths in multiples of {MULTIPLE} from"
            f" {least_width} on"
        )
        raise UserError("precision", problem, "give bf16, or lower precision.fp8_least_width")
    say(
        f"{precision.value}: {how_many(len(wide), 'layer')}, {len(narrow)} linear"
        f" {agreed(len(narrow), 'one', 'ones')} of the body left alone"
        + (f" (the first is {narrow[0]})" if narrow else "")
    )
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(RECIPES[precision]), emulate=EMULATE
    )
    convert_to_float8_training(
        model.base_model, config=config, module_filter_fn=lambda _, name: name in wide
    )
    try:
        yield
    finally:
        # The same parameters again: evaluation, checkpoints and the artifact know plain layers
        # only.
        for name in wide:
            model.base_model.set_submodule(name, _plain(model.base_model.get_submodule(name)))


def _plain(layer: Any) -> torch.nn.Linear:
    """Return a plain layer of the same parameters."""
    # No memory for weights that are replaced on the next line.
    with torch.device("meta"):
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)
