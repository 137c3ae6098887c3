"""Weights that a model ties, and files that hold them apart."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any


def part_ties(model: Any) -> None:
    """Have a model's configuration say that its weights are not tied, where some that it ties are
    apart.

    transformers loads both ends of a tie that a file holds with other values, leaves them apart,
    and leaves `tie_word_embeddings` true: whatever is built from that configuration, or asked to
    tie again, is another model.
    """
    import torch

    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    ends = {
        target: (model.get_parameter_or_buffer(target), model.get_parameter_or_buffer(source))
        for target, source in ties.items()
    }
    if all(target is source for target, source in ends.values()):
        return
    for name, (target, source) in ends.items():
        # the flag is one for all ties, and two names of one tensor cannot be saved without it
        if target is source:
            parent, _, own = name.rpartition(".")
            trains = target.requires_grad
            setattr(
                model.get_submodule(parent),
                own,
                torch.nn.Parameter(target.detach().clone(), trains),
            )
    for module in model.modules():
        config = getattr(module, "config", None)
        for each in () if config is None else (config, config.get_text_config()):
            each.tie_word_embeddings = False
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = {}


def differs_in_ties(folder: Path, ties: Mapping[str, str]) -> bool:
    """Whether a folder's weights hold both ends of a tie, and hold them with other values.

    Args:
        ties: The name of a weight by that of another which is to be the same.
    """
    import torch
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in sorted(folder.glob("*.safetensors"))
        ]
        # `keys()`: what safetensors opens is no mapping.
        where = {str(name): weights for weights in opened for name in weights.keys()}  # noqa: SIM118
        return any(
            not torch.equal(where[target].get_tensor(target), where[source].get_tensor(source))
            for target, source in ties.items()
            if target in where and source in where
        )
