"""What a model that torchao has quantized needs once it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def leave_inference_mode(model: Any) -> None:
    """Have the fused experts of a quantized model compute outside of `torch.inference_mode`, in
    place.

    torchao's tensors cannot be indexed by expert inside of it ("Cannot set version_counter for
    inference tensor").
    """
    from torchao.utils import TorchAOBaseTensor

    for module in model.modules():
        own = module.parameters(recurse=False)
        if any(isinstance(each, TorchAOBaseTensor) and each.dim() == 3 for each in own):
            module.forward = _outside(module.forward)


def _outside(forward: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @wraps(forward)
    def computed(*args: Any, **more: Any) -> Any:
        with torch.inference_mode(mode=False), torch.no_grad():
            return forward(*args, **more)

    return computed
