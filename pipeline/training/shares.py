"""Tensors of which every rank holds a share (torch's DTensor)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_shared(tensor: Any) -> bool:
    """Return whether a rank holds a share of a tensor alone."""
    return hasattr(tensor, "full_tensor")


def whole_of(tensor: Any) -> Tensor:
    """Return a tensor that ranks share put together: all of them ask for it."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def own_share(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor, without a copy: all of it where it is not shared."""
    with torch.no_grad():
        return tensor.to_local() if is_shared(tensor) else tensor


def place_of(tensor: Any) -> str:
    """Return which of how many shares this rank holds: `@0-of-2`."""
    mesh = tensor.device_mesh
    place, shares = 0, 1
    for at, (coordinate, placement) in enumerate(
        zip(mesh.get_coordinate(), tensor.placements, strict=True)
    ):
        if placement.is_shard():
            place, shares = place * mesh.size(at) + coordinate, shares * mesh.size(at)
    return f"@{place}-of-{shares}"


def shared_like(held: Any, whole: Tensor) -> Tensor:
    """Return a whole tensor cut as this rank holds another one of its shape."""
    if not is_shared(held):
        return whole
    from torch.distributed.tensor import distribute_tensor

    there = whole.to(held.device)
    # every rank read the same file: nothing is to be sent
    return distribute_tensor(there, held.device_mesh, held.placements, src_data_rank=None)
