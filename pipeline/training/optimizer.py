"""AdamW with moments in 32 or 8 bits, master weights of a model in 16, and all of their state as
plain tensors.

Moments in 8 bits are quantized in blocks of 256 by a table of 256 levels that are dense near zero;
tensors below 4,096 elements keep theirs in 32 bits, with torchao also those whose number of
elements is no multiple of 256. They take a quarter of the memory, and a step that unpacks and packs
them.
Source: Dettmers et al. 2022, arXiv 2110.02861; bitsandbytes.optim, torchao.optim.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.training import OptimizerKind, TrainingConfig
from pipeline.ledger.devices.table import device_of
from pipeline.training.shares import is_shared, own_share, place_of, shared_like

# Usual for language models (GPT-3, Llama): torch's 0.999 adapts more slowly in short runs.
BETAS = (0.9, 0.95)
IMPORTED = {
    OptimizerKind.adamw_8bit_bitsandbytes: "bitsandbytes.optim.adamw",
    OptimizerKind.adamw_8bit_torchao: "torchao.optim",
}
"""Where libraries have their AdamW8bit; they take seconds to import."""


def make_optimizer(
    parameters: list[Tensor], settings: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW over `parameters`; biases and norms (one dimension) are not decayed.

    Its moments have the parameters' shapes, in their dtype or in 8 bits.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # torch refuses an empty group.
    groups = [group for group in groups if group["params"]]
    more: dict[str, Any] = {"lr": settings.learning_rate, "betas": BETAS}
    if settings.optimizer in IMPORTED:
        if any(is_shared(parameter) for parameter in parameters):
            _compile_by_share()
        return import_module(IMPORTED[settings.optimizer]).AdamW8bit(groups, **more)
    return torch.optim.AdamW(groups, **more, fused=device_of(device).fused_optimizer)


def _compile_by_share() -> None:
    """Have torch keep no compiled steps on disk: it finds them by the shape of whole weights, of
    which one rank may hold a row more than another (torchao compiles its step; torch 2.13).
    """
    import torch._functorch.config as compiling

    compiling.enable_autograd_cache = False


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; torchao keeps it in a tensor, so that its compiled step need not be
    compiled anew.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# -- master weights -------------------------------------------------------------------------------


class MasterWeights:
    """The fp32 weights of a model that is itself kept in bf16: what is stepped, checkpointed and
    saved.

    A step smaller than half a unit in the last of bf16's 8 bits would be lost on the weights
    themselves. Gradients are added up in fp32, micro-batch by micro-batch. Buffers (rotary
    frequencies) stay in fp32.

    Args:
        model: In fp32; its trained parameters are rounded to bf16 in place.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.own: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        # Copied before rounding, so that the masters keep all 32 bits.
        self.masters: list[Tensor] = [p.detach().clone().requires_grad_() for p in self.own]
        for parameter in self.own:
            parameter.data = parameter.data.bfloat16()

    def take_gradients(self) -> None:
        """Add the model's bf16 gradients to the masters' in fp32, and clear them."""
        for parameter, master in zip(self.own, self.masters, strict=True):
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            # Freed at once, so that only the masters' gradients live on.
            parameter.grad = None

    def write_back(self) -> None:
        """Round the stepped masters into the model."""
        with torch.no_grad():  # one launch for many tensors, where the device has such a kernel
            torch.ops.aten._foreach_copy_(self.own, self.masters)

    def restore(self) -> None:
        """Give the model its weights back in dtype fp32: the masters themselves, not copies."""
        for parameter, master in zip(self.own, self.masters, strict=True):
            parameter.data = master.data

    def by_name(self) -> dict[str, Tensor]:
        """Return the model's state as checkpoints keep it, with its masters in the place of the
        rounded weights, without a copy.
        """
        masters = {id(own): master for own, master in zip(self.own, self.masters, strict=True)}
        named: Iterable[tuple[str, Tensor]] = self.model.named_parameters()
        state: dict[str, Tensor] = {name: masters.get(id(p), p).detach() for name, p in named}
        kept = self.model.state_dict().keys()
        buffers = {name: each for name, each in self.model.named_buffers() if name in kept}
        return {**state, **buffers}


def masters_of(model: Any, precision: Precision) -> MasterWeights | None:
    """Return the master weights that `precision` wants beside the model; None where the model holds
    them itself.
    """
    return MasterWeights(model) if precision is Precision.bf16_pure else None


# -- state as plain tensors -----------------------------------------------------------------------


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all state of an optimizer by name, without a copy: numbers as tensors, tensor
    subclasses as what they hold. No tensor is without a dimension.
    """
    found: dict[str, Tensor] = {}
    for name, holder, key in _leaves(optimizer):
        held = holder[key]
        tensor = held.detach() if isinstance(held, Tensor) else torch.as_tensor(held)
        found[name] = tensor if tensor.ndim else tensor.view(1)
    return found


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer make its state, which it does in its first step, and leave it at zero. What
    is stepped may decay by it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def restore_numbers(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], prefix: str
) -> None:
    """Take over what is no tensor from what `state_tensors` gave, with `prefix` before its names;
    tensors were read in place.
    """
    for name, holder, key in _leaves(optimizer):
        if not isinstance(holder[key], Tensor):
            holder[key] = state[f"{prefix}{name}"].item()


def cut_otherwise(
    optimizer: torch.optim.Optimizer, there: Iterable[str], prefix: str
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield every moment that a checkpoint holds in other pieces than this rank does, with their
    names: blocks of 8 bits end where the share of a rank did.

    Args:
        there: Names in the checkpoint: those of `state_tensors`, with `prefix` before them.
    """
    saved: dict[str, list[str]] = {}
    for name in there:
        base = _PIECE.sub("", name)
        saved.setdefault(base, []).append(name)
    for name, entries, key in _moments(optimizer):
        found = saved.get(f"{prefix}{name}", [])
        wanted = {f"{prefix}{each}" for each, _, _ in _parts(optimizer, name, entries, key)}
        if not wanted <= set(found):
            yield entries[key], found


def put_together(moment: Tensor, pieces: Mapping[str, Tensor]) -> None:
    """Fill a moment, in place, from the pieces that another number of ranks kept of it."""
    by_rank: dict[int, dict[str, Tensor]] = {}
    for name, piece in pieces.items():
        found = _PIECE.search(name)
        part, rank = (found["part"], found["rank"]) if found is not None else (None, None)
        by_rank.setdefault(int(rank or 0), {})[part or ""] = piece
    whole = torch.cat([_in_32_bits(parts) for _, parts in sorted(by_rank.items())])
    with torch.no_grad():
        own_share(moment).copy_(own_share(shared_like(moment, whole)))


# of a moment in 8 bits: what it consists of, and of which rank's share
_PIECE = re.compile(r"(?:\.(?P<part>codes|scale|qmap))?(?:@(?P<rank>\d+)-of-\d+)?$")


def _in_32_bits(parts: Mapping[str, Tensor]) -> Tensor:
    if "codes" not in parts:
        return parts[""]
    codes, scale = parts["codes"], parts["scale"]
    levels = parts["qmap"][codes.long()].view(len(scale), -1)
    return (levels * scale.view(-1, 1)).view(codes.shape)


def _leaves(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any, str]]:
    """Yield name, holder and key of every number and plain tensor in the state, parameter by
    parameter.
    """
    for name, entries, key in _moments(optimizer):
        yield from _parts(optimizer, name, entries, key)


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any], str]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        entries = optimizer.state.get(parameter, {})
        for key in entries:
            yield f"{index}.{key}", entries, key


def _parts(
    optimizer: torch.optim.Optimizer, name: str, entries: dict[str, Any], key: str
) -> Iterator[tuple[str, Any, str]]:
    held: Any = entries[key]
    place = ""
    if is_shared(held) and not isinstance(optimizer, torch.optim.AdamW):
        # a rank's share has blocks of its own, or is too small for 8 bits: no slice of one whole
        held, place = own_share(held), place_of(held)
    if hasattr(held, "__tensor_flatten__") and not is_shared(held):
        # A tensor subclass, such as torchao's 8-bit moments: safetensors takes plain tensors only.
        for part in held.__tensor_flatten__()[0]:
            yield f"{name}.{part}{place}", {part: getattr(held, part)}, part
    elif place:
        yield f"{name}{place}", {key: held}, key
    else:
        yield name, entries, key
