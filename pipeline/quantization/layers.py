"""Which linear layers a model has, which of them are quantized, and how many bytes its weights take on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Task
from pipeline.errors import UserError
from pipeline.models import from_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: `name` inside the model, the widths of its weight, and whether that lies (in, out) as GPT-2's."""

    name: str
    in_features: int
    out_features: int
    transposed: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.in_features} -> {self.out_features})"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which linear layers are to be quantized.

    Attributes:
        include: Patterns of names as in a shell (`*.mlp.*`); empty: every layer of the body.
        exclude: Patterns of names that are left alone all the same.
        head: Whether the output head is quantized as well.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    head: bool = False


EVERY_LAYER = Choice()


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """A model's linear layers, in its own order: those to quantize, and those to leave in 16 or 32 bits."""

    quantize: tuple[Layer, ...]
    keep: tuple[Layer, ...]


def plan_layers(config: PreTrainedConfig, task: Task, *, key: str, choice: Choice = EVERY_LAYER) -> LayerPlan:
    """Return what would be quantized, read off a twin on the meta device: no weight is loaded.

    Refusals name settings beside `key` (`stages.int8.format` -> `stages.int8.include`).

    Raises:
        UserError: If the architecture cannot do the task or has nothing to quantize, a pattern matches no layer, none
            is left, or the head cannot be quantized because it is the embedding.
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
    return _choose(plan, choice, _head_of(twin), key.rpartition(".")[0])


def _head_of(model: Any) -> str | None:
    """Return the name of the output head; None where it shares its weight with the embedding or there is none."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _choose(plan: LayerPlan, choice: Choice, head: str | None, stage: str) -> LayerPlan:
    body = [layer.name for layer in plan.quantize]
    if choice.head and head is None:
        problem = "the model's head is its embedding, or it has none: neither library's formats hold an embedding"
        raise UserError(f"{stage}.quantize_head", problem, "leave it out")
    for name, patterns in (("include", choice.include), ("exclude", choice.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layer in body):
                raise UserError(f"{stage}.{name}", f"{pattern!r} matches no linear layer of the body",
                                f"name layers such as {body[-1]} (* stands for anything)")  # fmt: skip
    chosen = {
        layer for layer in body
        if _matches(layer, choice.include or ("*",)) and not _matches(layer, choice.exclude)
    }  # fmt: skip
    if choice.head and head is not None:
        chosen.add(head)
    if not chosen:
        raise UserError(f"{stage}.exclude", "no layer is left to quantize", "exclude fewer layers")
    layers = (*plan.quantize, *plan.keep)
    return LayerPlan(
        tuple(layer for layer in layers if layer.name in chosen),
        tuple(layer for layer in layers if layer.name not in chosen),
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def abbreviate(names: Sequence[str], most: int = 6) -> str:
    """Return names as a line can hold them: the first few, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


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
        layer = _linear(name, module)
        if layer is None:
            continue
        in_body = id(module) in body and module is not head and owners[id(module.weight)] == 1
        (quantize if in_body else keep).append(layer)
    return LayerPlan(tuple(quantize), tuple(keep))


def _linear(name: str, module: Any) -> Layer | None:
    """Describe a linear layer; None for what is none (a subclass has its own forward)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return Layer(name, module.weight.shape[0], module.weight.shape[1], transposed=True)
    if type(module) is torch.nn.Linear:
        return Layer(name, module.in_features, module.out_features)
    return None


def weights_bytes(folder: Path) -> int:
    """Return the bytes of the weight files (`*.safetensors`) in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
