"""Adapters on a quantized model (LoRA), and the unquantized model that the two together stand for.

The layers stay as the format left them and are not trained; beside each, two narrow matrices are, whose product adds to
it. Serving should not pay for these, so they are added to the weights and the sum is quantized again, which rounds
once more: a merged model is another one than was trained, and it is that one that is read and assessed.
Source: Hu et al. 2021, arXiv 2106.09685, section 4.1 (LoRA); Dettmers et al. 2023, arXiv 2305.14314 (on a quantized
base). The adapters are peft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.quantization.backend import Backend

ADAPTER = "recovery"


def add_adapters(model: Any, names: Sequence[str], *, rank: int, alpha: float) -> None:
    """Freeze `model` and put adapters, in fp32, on its linear layers `names`; in place. Seed torch first."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(requires_grad=False)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names), lora_dropout=0.0)  # pyright: ignore
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def what_adapters_add(model: Any) -> dict[str, Tensor]:
    """Return what the adapters add to each layer's weight, (out, in) in fp32, by the layer's name."""
    from peft.tuners.lora import LoraLayer

    found: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    with torch.no_grad():
        return {
            name: (layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight) * layer.scaling[ADAPTER]
            for name, layer in found
        }


def merge(plain: Any, quantized: Any, added: dict[str, Tensor], backend: Backend) -> None:
    """Make `plain`, in place, the unquantized model that `quantized` and its adapters stand for.

    Args:
        plain: Of the same architecture, in fp32.
        quantized: Just loaded and never run: running may repack weights (`bnb.py`).
        added: By layer, as `what_adapters_add` gives it.
    """
    from transformers.pytorch_utils import Conv1D

    theirs = {name: module for name, module in quantized.named_modules() if backend.is_quantized(module)}
    with torch.no_grad():
        for name, module in theirs.items():
            weight = backend.dequantize(module).float()
            weight = weight + added[name].to(weight.device) if name in added else weight
            own = plain.get_submodule(name)
            own.weight.copy_(weight.T if isinstance(own, Conv1D) else weight)
        rest = dict(quantized.named_parameters())
        for name, parameter in plain.named_parameters():
            if name.removesuffix(".weight") not in theirs:
                parameter.copy_(rest[name])
