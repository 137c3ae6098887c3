"""AdamW with moments in 32 or 8 bits, master weights of a model in 16, and all of their state as
plain tensors.

Moments in 8 bits are quantized in blocks of 256 by a table of 256 levels that are dense near zero;
tensors below 4,096 elements keep theirs in 32 bits, with torchao also those whose number of
elements is no multiple of 256. They take a quarter of the memory, and a step that unpacks and packs
them.
Source: Dettmers et al. 2022, arXiv 2110.02861; bitsandbytes.optim, torchao.optim.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.training import OptimizerKind, TrainingConfig
from pipeline.ledger.devices.table import device_of
from pipeline.training.shares import gathered, is_shared, shared_like

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
        return import_module(IMPORTED[settings.optimizer]).AdamW8bit(groups, **more)
    return torch.optim.AdamW(groups, **more, fused=device_of(device).fused_optimizer)


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

    # -- as a checkpoint sees the model -----------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's state with its masters in the place of the rounded weights."""
        # By address, not by name: a tied weight has two names and one master.
        by_place = {
            own.data_ptr(): master for own, master in zip(self.own, self.masters, strict=True)
        }
        state: dict[str, Tensor] = self.model.state_dict()
        return {name: by_place.get(tensor.data_ptr(), tensor) for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor], *, strict: bool) -> None:
        """Fill masters and buffers from what `state_dict` gave, and round."""
        own = self.state_dict()
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)
        self.write_back()

    def tie_weights(self) -> None:
        """Leave tied weights as they are: they were never parted."""


def masters_of(model: Any, precision: Precision) -> MasterWeights | None:
    """Return the master weights that `precision` wants beside the model; None where the model holds
    them itself.
    """
    return MasterWeights(model) if precision is Precision.bf16_pure else None


# -- state as plain tensors -----------------------------------------------------------------------


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all state of an optimizer by name, numbers as tensors, tensor subclasses as what they
    hold.
    """
    found: dict[str, Tensor] = {}
    for name, holder, key in _leaves(optimizer):
        held = holder[key]
        found[name] = gathered(held.detach() if isinstance(held, Tensor) else torch.as_tensor(held))
    return found


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Restore what `state_tensors` gave. The weights are to be loaded after it: state is made by a
    step of zeros.
    """
    if not saved:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Optimizers make their state in their first step. Zeros leave the moments at 0.
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found = list(_leaves(optimizer))
    assert {name for name, _, _ in found} == saved.keys(), (
        "a checkpoint is read by the stage that wrote it"
    )
    for name, holder, key in found:
        if isinstance(holder[key], Tensor):
            holder[key].copy_(shared_like(holder[key], saved[name]))
        else:
            holder[key] = saved[name].item()


def _leaves(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any, str]]:
    """Yield name, holder and key of every number and plain tensor in the state, parameter by
    parameter.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        yield from _below(f"{index}", optimizer.state.get(parameter, {}))


def _below(name: str, entries: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for key, value in entries.items():
        # A tensor subclass, such as torchao's 8-bit moments: safetensors takes plain tensors only.
        if hasattr(value, "__tensor_flatten__") and not is_shared(value):
            inner = {each: getattr(value, each) for each in value.__tensor_flatten__()[0]}
            yield from _below(f"{name}.{key}", inner)
        else:
            yield f"{name}.{key}", entries, key
