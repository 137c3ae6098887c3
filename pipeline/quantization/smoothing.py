"""Smooth activations before quantizing: move their outliers into the weights that read them.

A few channels of a norm's output are far larger than the rest, and a scale that covers them leaves
little for the others. Each channel j is divided by `s_j = max|X_j|^a / max|W_j|^(1-a)` in the
norm's own weight, and the columns of the layers that read it are multiplied by it: the model
computes the same, its activations and weights are equally hard to quantize. `max|X_j|` is what
calibration documents give. Only layers that read a norm directly can be smoothed.
Source: Xiao et al. 2022, arXiv 2211.10438, sections 4 and 4.1 (a = 0.5).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageFailed, UserError

if TYPE_CHECKING:
    import torch

# By block: a norm, and the layers that read nothing but its output. Of Llama's kin (Mistral, Qwen),
# GPT-2, and OPT.
READS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("ln_1", ("attn.c_attn",)),
    ("ln_2", ("mlp.c_fc",)),
    ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("final_layer_norm", ("fc1",)),
)
SMALLEST = 1e-5  # of a maximum, so that a dead channel divides by nothing tiny; the authors' own
# of the largest logit: fp32 round-off over a deep model, and no wrong pairing of layers
SAME_WITHIN = 1e-3


@dataclass(frozen=True, slots=True)
class Pair:
    """A norm and the layers that read it."""

    name: str
    norm: Any
    layers: tuple[Any, ...]


def find_pairs(model: Any) -> list[Pair]:
    """Return what can be smoothed, in the model's order; norms have weights of shape (H,)."""
    pairs: list[Pair] = []
    for name, block in model.named_modules():
        for norm, readers in READS:
            layers = [_at(block, reader) for reader in readers]
            found = _at(block, norm)
            if (
                found is not None
                and getattr(found, "weight", None) is not None
                and None not in layers
            ):
                pairs.append(Pair(f"{name}.{norm}", found, tuple(layers)))
    return pairs


def check_smoothable(model: Any, key: str) -> list[Pair]:
    """Return what can be smoothed.

    Raises:
        UserError: If that is nothing.
    """
    pairs = find_pairs(model)
    if not pairs:
        problem = f"{type(model).__name__} has no layers known to read a norm and nothing else"
        raise UserError(key, problem, "leave it out: of Llama's kin, GPT-2 and OPT they are known")
    return pairs


def _at(module: Any, path: str) -> Any | None:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


Largest = dict[str, "torch.Tensor"]
"""max|X_j| (H,) of what the layers of each pair read, by the pair's name, on the host."""


def smooth(
    model: Any,
    batches: Sequence[torch.Tensor],
    *,
    strength: float,
    key: str,
    everywhere: Callable[[Callable[[], Largest]], list[Largest]] = lambda look: [look()],
) -> list[str]:
    """Smooth `model` in place; return the names of the norms that were smoothed.

    Args:
        model: In evaluation mode and fp32.
        batches: Token ids of calibration documents, (1, T) each, on the model's device.
        strength: The exponent a: 0 leaves activations as they are, 1 makes all their channels
            equal.
        everywhere: Looks at the activations, and returns what was found here and by whoever looks
            at other documents meanwhile.

    Raises:
        UserError: If no layer is known to read a norm alone.
        StageFailed: If the smoothed model does not compute what the model did.
    """
    import torch

    pairs = check_smoothable(model, key)
    with torch.no_grad():
        before = model(input_ids=batches[0]).logits
        found = everywhere(lambda: _largest_inputs(model, pairs, batches))
        for pair in pairs:
            largest = torch.stack([each[pair.name] for each in found]).amax(0)
            _move(pair, largest.to(pair.norm.weight.device), strength)
        after = model(input_ids=batches[0]).logits
    apart = float((after - before).abs().max() / before.abs().max())
    if not apart <= SAME_WITHIN:
        raise StageFailed(
            f"{key}: smoothing changes {type(model).__name__} (logits move by {apart:.2g} of the"
            " largest)"
        )
    return [pair.name for pair in pairs]


def largest_inputs(model: Any, batches: Sequence[torch.Tensor], *, key: str) -> Largest:
    """Return what `smooth` looks at, for whoever smooths this model.

    Raises:
        UserError: If no layer is known to read a norm alone.
    """
    import torch

    with torch.no_grad():
        return _largest_inputs(model, check_smoothable(model, key), batches)


def _largest_inputs(model: Any, pairs: Sequence[Pair], batches: Sequence[torch.Tensor]) -> Largest:
    seen: Largest = {}
    with _watched(pairs, seen):
        for ids in batches:
            model(input_ids=ids)
    return {name: values.cpu() for name, values in seen.items()}


@contextmanager
def _watched(pairs: Sequence[Pair], seen: dict[str, torch.Tensor]) -> Generator[None]:
    def note(name: str, inputs: torch.Tensor) -> None:
        largest = inputs.detach().flatten(0, -2).abs().amax(0)
        seen[name] = largest if name not in seen else seen[name].maximum(largest)

    with ExitStack() as hooks:
        for pair in pairs:
            # All layers of a pair read the same input: one of them is enough.
            handle = pair.layers[0].register_forward_pre_hook(
                lambda _, args, name=pair.name: note(name, args[0])
            )
            hooks.callback(handle.remove)
        yield


def _move(pair: Pair, largest: torch.Tensor, strength: float) -> None:
    """Divide the norm by s and multiply the columns of its readers, which lie in rows in GPT-2's
    layers.
    """
    import torch

    # all but the input's
    axes = [0 if isinstance(layer, torch.nn.Linear) else 1 for layer in pair.layers]
    weight = torch.stack(
        [layer.weight.abs().amax(axis) for layer, axis in zip(pair.layers, axes, strict=True)]
    )
    # (H,); the largest weight over all readers, which share the norm and so the scale.
    scale = largest.clamp_min(SMALLEST) ** strength / weight.amax(0).clamp_min(SMALLEST) ** (
        1 - strength
    )
    pair.norm.weight.div_(scale)
    if getattr(pair.norm, "bias", None) is not None:
        pair.norm.bias.div_(scale)
    for layer, axis in zip(pair.layers, axes, strict=True):
        layer.weight.mul_(scale.unsqueeze(axis))
