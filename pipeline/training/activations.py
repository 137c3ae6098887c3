"""Activation checkpointing: less memory for about a third more computing, and the same gradients.

Each layer keeps its input alone, and the backward pass computes the rest again. When it helps:
where the batch or the length that is wanted does not fit otherwise. `model_flops` stay those of the
method: the second time does not count.
Source: Chen et al. 2016, arXiv 1604.06174; `torch.utils.checkpoint`, non-reentrant.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import UserError


def checkpoint_activations(model: Any, key: str) -> None:
    """Have `model` keep its layers' inputs alone while it trains.

    Args:
        model: A transformers model.
        key: The setting that asks for it.

    Raises:
        UserError: If the model cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            key, f"{type(model).__name__} cannot compute its layers again", "set it to false"
        )
    # the other kind loses the gradient where a layer's input needs none
    how = {"use_reentrant": False}
    # its newer name; where both are, the old one warns
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
