"""How large a model is, and what it computes and keeps for a token, from its configuration alone.

Products are counted by rule: two operations for each weight that multiplies, and attention by its
width. That is within a few percent of `ledger/flops.py`, which counts every operation of an eager
twin and takes seconds for a large model. Activations are counted by running one layer on tensors
without data.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.config.settings.precision import Precision
from pipeline.ledger.flops import FlopsPerSequence, six_n
from pipeline.models.layers import cut_config, layer_count
from pipeline.models.load import auto_class
from pipeline.tasks.table import Task

THIRTY_TWO = (Precision.fp32, Precision.tf32)
"""Precisions whose activations are in 32 bits; those of others are mostly in 16."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model in numbers.

    Attributes:
        parameters: All of them, tied ones once.
        layers: How many of them there are in the body.
        of_layers: Parameters of the layers.
        of_largest: Parameters of the largest layer, or of the embedding: what sharding gathers at
            once.
        vocabulary: Columns of the head; 0 where it is small.
        width: Of a hidden state.
        per_token: FLOPs of a forward pass for a token, attention left out.
        per_pair: FLOPs of attention for a token that reads another one, all layers together.
    """

    parameters: int
    layers: int
    of_layers: int
    of_largest: int
    vocabulary: int
    width: int
    per_token: float
    per_pair: float

    def flops(self, *, backward: bool) -> FlopsPerSequence:
        """Return the FLOPs of a sequence; a backward pass takes twice a forward one."""
        times = 3 if backward else 1
        return FlopsPerSequence(0.0, self.per_token * times, self.per_pair * times)


def size_of(config: Any, task: Task) -> ModelSize:
    """Return the numbers of a model with this configuration.

    Raises:
        Exception: Of any kind, where transformers cannot make the model.
    """
    return _size_of(_Key(config, task))


def kept_bytes(config: Any, task: Task, precision: Precision, length: int) -> float:
    """Return the bytes that a token leaves for the backward pass, all layers together.

    Args:
        length: Of the sequence it is read in: attention with dropout keeps a square of it.

    Raises:
        Exception: Of any kind, where the model does not run without data.
    """
    return _kept(_Key(config, task), precision, length)


class _Key:
    """A configuration as a key: by what it says, not by which object it is."""

    def __init__(self, config: Any, task: Task) -> None:
        self.config, self.task = config, task
        self._text = f"{type(config).__name__} {config.to_json_string()} {task.value}"

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._text == self._text


@lru_cache(maxsize=64)
def _size_of(key: _Key) -> ModelSize:
    import torch

    config, task = key.config, key.task
    with torch.device("meta"):
        model = auto_class(task).from_config(config)
    text = config.get_text_config()
    layers, width = layer_count(config), int(text.hidden_size)
    heads = getattr(text, "num_attention_heads", None)
    across = width if heads is None else heads * (getattr(text, "head_dim", None) or width // heads)
    of_layers = _of_layers(model, layers)
    embedding = model.get_input_embeddings().weight.numel()
    parameters = sum(each.numel() for each in model.parameters())
    return ModelSize(
        parameters=parameters,
        layers=layers,
        of_layers=of_layers,
        of_largest=max(embedding, of_layers // max(layers, 1)),
        vocabulary=int(text.vocab_size) if task.kind.is_language else 0,
        width=width,
        per_token=six_n(model, _active(model, text), backward=False),
        per_pair=4.0 * layers * across,
    )


def _of_layers(model: Any, layers: int) -> int:
    """Return the parameters of the body's layers: of the lists that are as long as there are
    layers.
    """
    from torch.nn import ModuleList

    stacks = [each for each in model.modules() if isinstance(each, ModuleList)]
    return sum(
        weight.numel() for stack in stacks if len(stack) == layers for weight in stack.parameters()
    )


def _active(model: Any, text: Any) -> dict[str, float]:
    """Return the share of the experts that a token visits, by parameter, as the configuration has
    it; empty without experts.
    """
    chosen = getattr(text, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((found for name in names if (found := getattr(text, name, None))), None)
    if not chosen or not count:
        return {}
    return {
        name: min(1.0, chosen / count)
        for name, weight in model.named_parameters()
        if weight.ndim == 3 or ".experts." in name
    }


@lru_cache(maxsize=64)
def _kept(key: _Key, precision: Precision, length: int) -> float:
    """Return the bytes that a token leaves for the backward pass in all layers.

    What autograd saves of one layer is counted, each storage once, weights and their 16-bit copies
    left out. The layer is read with tensors that have no data (`FakeTensorMode`).
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    task, layers = key.task, layer_count(key.config)
    config = cut_config(key.config, [0], "model") if layers > 1 else key.config
    pure = precision is Precision.bf16_pure
    narrow = precision not in THIRTY_TWO and not pure
    stored: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        stored[storage._cdata] = storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        dtype = torch.bfloat16 if pure else torch.float32
        model: Any = auto_class(task).from_config(config, dtype=dtype).train()
        body = getattr(model, model.base_model_prefix)
        ids = torch.zeros(1, length, dtype=torch.long)
        casting = torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with casting, hooks:
            body(input_ids=ids)
        for weight in model.parameters():
            stored.pop(weight.untyped_storage()._cdata, None)
        # a product keeps the copy of its weight that autocast made
        copies = 2 * sum(
            module.weight.numel()
            for module in body.modules()
            if isinstance(module, torch.nn.Linear) and narrow
        )
    return max(0.0, sum(stored.values()) - copies) / length * layers
