"""Which linear layers a model has, which of them are quantized, and how many bytes its weights take on disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Task
from pipeline.errors import UserError
from pipeline.models import from_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: `name` inside the model, and the widths of its weight."""

    name: str
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.name} ({self.in_features} -> {self.out_features})"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """A model's linear layers, in its own order: those to quantize, and those to leave in 16 or 32 bits."""

    quantize: tuple[Layer, ...]
    keep: tuple[Layer, ...]


def plan_layers(config: PreTrainedConfig, task: Task, *, key: str) -> LayerPlan:
    """Return what would be quantized, read off a twin on the meta device: no weight is loaded.

    Raises:
        UserError: If the architecture cannot do the task, or has nothing to quantize.
    """
    import torch

    try:
        with torch.device("meta"):
            twin = from_config(config, task, None)
    except ValueError as error:
        problem = f"{type(config).__name__} cannot do {task.value} ({str(error).splitlines()[0]})"
        raise UserError(key, problem, "quantize a model made for this task") from error
    plan = _split(twin)
    if not plan.quantize:
        raise UserError(key, f"{type(twin).__name__} has no linear layers to quantize", "leave this stage out")
    return plan


def _split(model: Any) -> LayerPlan:
    """Sort linear layers: quantize those of the body, keep heads and tied weights.

    The library's own list of heads is not used: it names the last *parameter*, which for a head with a bias is no
    module (`classifier.bias`), and so a two-class head of BERT would be quantized.
    """
    body, head = {id(module) for module in model.base_model.modules()}, model.get_output_embeddings()
    owners = Counter(id(module.weight) for module in model.modules() if getattr(module, "weight", None) is not None)
    quantize: list[Layer] = []
    keep: list[Layer] = []
    for name, module in model.named_modules():
        shape = _linear_shape(module)
        if shape is None:
            continue
        in_body = id(module) in body and module is not head and owners[id(module.weight)] == 1
        (quantize if in_body else keep).append(Layer(name, *shape))
    return LayerPlan(tuple(quantize), tuple(keep))


def _linear_shape(module: Any) -> tuple[int, int] | None:
    """Return `(in_features, out_features)`, or None for what is no linear layer (a subclass has its own forward)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):  # GPT-2's linear layer, with a transposed weight
        return module.weight.shape[0], module.weight.shape[1]
    return (module.in_features, module.out_features) if type(module) is torch.nn.Linear else None


def weights_bytes(folder: Path) -> int:
    """Return the bytes of the weight files (`*.safetensors`) in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
