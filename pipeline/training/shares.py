"""Tensors of which every rank holds a share (torch's DTensor), and whole ones for checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_shared(tensor: Any) -> bool:
    """Return whether a rank holds a share of a tensor alone."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Any) -> Tensor:
    """Return a tensor whole, on the host; one that is shared is gathered from all ranks, each of
    which has to ask.
    """
    return tensor.full_tensor().cpu() if is_shared(tensor) else tensor


def shared_like(held: Any, whole: Tensor) -> Tensor:
    """Return this rank's share of a whole tensor, as it holds another one of its shape."""
    if not is_shared(held):
        return whole
    from torch.distributed.tensor import distribute_tensor

    there = whole.to(held.device)
    # every rank read the same file: nothing is to be sent
    return distribute_tensor(there, held.device_mesh, held.placements, src_data_rank=None)
