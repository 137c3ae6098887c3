"""Which linear layers a model has, which of them are quantized, and how many bytes its weights take
on disk.

A mixture of experts keeps all experts of a block in one module, as parameters of three dimensions
(experts, out, in). Such a module counts as one layer here, *fused experts*: most of the model's
parameters lie in these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.models.load import embedding_of, from_config
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer, or the fused experts of a block.

    Attributes:
        name: Of the module inside the model.
        in_features: Width of the weight's inputs.
        out_features: Width of its outputs.
        transposed: Whether the weight lies (in, out), as GPT-2's does.
        weights: How many numbers its weight holds, or those of all experts.
        fused: Of fused experts, the names of their parameters (experts, out, in); empty for a
            linear layer.
        known: Whether fused experts are computed by transformers' own loop over (out, in) weights,
            which a library that quantizes single weights can take.
    """

    name: str
    in_features: int
    out_features: int
    transposed: bool = False
    weights: int = 0
    fused: tuple[str, ...] = ()
    known: bool = False

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
    """A model's layers, in its own order: those to quantize, and those to leave in 16 or 32 bits.

    Attributes:
        parameters: How many numbers all of the model's parameters hold, shared ones counted once.
    """

    quantize: tuple[Layer, ...]
    keep: tuple[Layer, ...]
    parameters: int = 0

    @property
    def quantized_parameters(self) -> int:
        """How many of the parameters are quantized."""
        return sum(layer.weights for layer in self.quantize)


def plan_layers(
    config: PreTrainedConfig,
    task: Task,
    *,
    key: str,
    choice: Choice = EVERY_LAYER,
    fuses: bool = False,
    spares_fp32: bool = False,
) -> LayerPlan:
    """Return what would be quantized, read off a twin on the meta device: no weight is loaded.

    Refusals name settings beside `key` (`stages.int8.format` -> `stages.int8.include`).

    Args:
        fuses: Whether the format takes fused experts; else they are among what is kept.
        spares_fp32: Whether the library leaves alone what the model keeps in fp32 whatever its
            dtype.

    Raises:
        UserError: If the architecture cannot do the task or has nothing to quantize, a pattern
            matches no layer, none is left, or the head cannot be quantized because it is the
            embedding.
    """
    twin = make_twin(config, task, key)
    plan = _split(twin, fuses=fuses, spared=_kept_in_fp32(twin) if spares_fp32 else ())
    if not plan.quantize:
        raise UserError(
            key, f"{type(twin).__name__} has no linear layers to quantize", "leave this stage out"
        )
    return _choose(plan, choice, _head_of(twin), key.rpartition(".")[0])


def make_twin(config: PreTrainedConfig, task: Task, key: str) -> Any:
    """Return a model of this configuration that holds no weights, on the meta device.

    Raises:
        UserError: If the architecture cannot do the task.
    """
    import torch

    try:
        with torch.device("meta"):
            return from_config(config, task, None)
    except ValueError as error:
        problem = f"{type(config).__name__} cannot do {task.value} ({str(error).splitlines()[0]})"
        raise UserError(key, problem, "quantize a model made for this task") from error


def count_parameters(model: Any) -> int:
    """Return how many numbers a model's parameters hold, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _head_of(model: Any) -> str | None:
    """Return the name of the output head; None where it shares its weight with the embedding or
    there is none.
    """
    head, embedding = model.get_output_embeddings(), embedding_of(model)
    if head is None or head.weight is getattr(embedding, "weight", None):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _choose(plan: LayerPlan, choice: Choice, head: str | None, stage: str) -> LayerPlan:
    body = [layer.name for layer in plan.quantize]
    if choice.head and head is None:
        problem = (
            "the model's head is its embedding, or it has none: neither library's formats hold an"
            " embedding"
        )
        raise UserError(f"{stage}.quantize_head", problem, "leave it out")
    for name, patterns in (("include", choice.include), ("exclude", choice.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layer in body):
                raise UserError(
                    f"{stage}.{name}",
                    f"{pattern!r} matches no linear layer of the body",
                    f"name layers such as {body[-1]} (* stands for anything)",
                )
    chosen = {
        layer
        for layer in body
        if _matches(layer, choice.include or ("*",)) and not _matches(layer, choice.exclude)
    }
    if choice.head and head is not None:
        chosen.add(head)
    if not chosen:
        raise UserError(f"{stage}.exclude", "no layer is left to quantize", "exclude fewer layers")
    layers = (*plan.quantize, *plan.keep)
    return LayerPlan(
        tuple(layer for layer in layers if layer.name in chosen),
        tuple(layer for layer in layers if layer.name not in chosen),
        plan.parameters,
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def abbreviate(names: Sequence[str], most: int = 6) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _kept_in_fp32(model: Any) -> set[str]:
    """Return the names of modules that a model keeps in fp32, as transformers' quantizers match
    them.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept: list[str] = list(model._keep_in_fp32_modules or ())
    return {
        name for name, _ in model.named_modules() if kept and not should_convert_module(name, kept)
    }


def _split(model: Any, *, fuses: bool, spared: Collection[str]) -> LayerPlan:
    """Sort layers: quantize linear ones of the body, and fused experts where that can be; keep
    heads and tied weights.

    The library's own list of heads is not used: it names the last *parameter*, which for a head
    with a bias is no module (`classifier.bias`), and so a two-class head of BERT would be
    quantized.
    """
    body, head = (
        {id(module) for module in model.base_model.modules()},
        model.get_output_embeddings(),
    )
    # How many modules share a weight: a tied one cannot be quantized for one of them alone.
    owners = Counter(
        id(module.weight)
        for module in model.modules()
        if getattr(module, "weight", None) is not None
    )
    quantize: list[Layer] = []
    keep: list[Layer] = []
    for name, module in model.named_modules():
        layer = _linear(name, module)
        if layer is not None:
            can = id(module) in body and module is not head and owners[id(module.weight)] == 1
        else:
            layer = _experts(name, module)
            can = fuses and layer is not None and layer.known
        if layer is not None:
            (quantize if can and name not in spared else keep).append(layer)
    return LayerPlan(tuple(quantize), tuple(keep), count_parameters(model))


def _linear(name: str, module: Any) -> Layer | None:
    """Describe a linear layer; None for what is none (a subclass has its own forward)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return Layer(
            name, module.weight.shape[0], module.weight.shape[1], True, module.weight.numel()
        )
    if type(module) is torch.nn.Linear:
        return Layer(name, module.in_features, module.out_features, weights=module.weight.numel())
    return None


def _experts(name: str, module: Any) -> Layer | None:
    """Describe fused experts; None for any other module.

    `is_transposed` is what transformers notes on experts that it can compute in several ways
    (`transformers.integrations.moe.use_experts_implementation`).
    """
    own = {key: each for key, each in module.named_parameters(recurse=False) if each.dim() == 3}
    if not own or not isinstance(getattr(module, "num_experts", None), int):
        return None
    first = next(iter(own.values()))
    transposed = getattr(module, "is_transposed", None)
    outputs, inputs = first.shape[1:] if not transposed else reversed(first.shape[1:])
    return Layer(
        name,
        inputs,
        outputs,
        bool(transposed),
        sum(each.numel() for each in own.values()),
        fused=tuple(own),
        known=transposed is False,
    )
