"""Where the weights of a training lie before ranks share them.

Under `fsdp` and `hsdp` no device ever holds a whole model: the first rank makes it in its host's
memory, finds out there what is to be known of it, and gives each rank its share
(`training/parallel.py`). The others have the same modules without weights, on torch's meta device,
and read no file. What the first rank makes at random (a new head) is everybody's.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from pipeline.config.settings.parallel import Parallel
from pipeline.errors import UserError, one_line
from pipeline.training.ranks import ALONE, Ranks

Thing = TypeVar("Thing")
HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Holding:
    """Who holds whole weights until they are shared, and where.

    Attributes:
        device: Where a model is made.
        ranks: Of which the first alone has weights; alone: each process has its own.
    """

    device: torch.device
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, ranks: Ranks, mode: Parallel, device: torch.device) -> Holding:
        """Return who holds the weights of a training on `device`."""
        return cls(HOST, ranks) if ranks.several and mode.shards else cls(device)

    @property
    def is_apart(self) -> bool:
        """Whether a rank other than the first has no weights."""
        return self.ranks.several

    def found(self, find: Callable[[], Thing]) -> Thing:
        """Return what is found by who has the weights.

        Raises:
            Exception: What `find` raises, on all ranks (`Ranks.shared`).
        """
        found: list[Any] = self.ranks.shared(lambda: find() if self.ranks.is_first else None)
        return found[0]

    def made(self, make: Callable[[], Thing]) -> Thing:
        """Return what is made: a model, or a tuple with one. On a rank without weights, its
        parameters are on the meta device; those that are tied are so there, and buffers have their
        values.

        Raises:
            UserError: If its modules cannot be told to the other ranks.
            Exception: What `make` raises, on all ranks.
        """
        if not self.is_apart:
            return make()
        made: list[Thing] = []

        def told() -> bytes:
            made.append(make())
            return _without_weights(made[0])

        said = self.found(told)
        # what the first rank of this very run says, as all that ranks tell one another
        return made[0] if made else pickle.loads(said)


def _without_weights(thing: Any) -> bytes:
    """Return a pickle of modules, their parameters without values."""
    into = io.BytesIO()
    try:
        _WithoutWeights(into, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        problem = (
            f"the modules of this model cannot be told to other ranks ({one_line(error, 120)})"
        )
        raise UserError("parallel.mode", problem, "use ddp") from error
    return into.getvalue()


class _WithoutWeights(pickle.Pickler):
    """Pickles parameters as their shapes; one that is met twice (tied) stays one."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Parameter):
            return _on_meta, (tuple(obj.shape), obj.dtype, obj.requires_grad)
        return NotImplemented


def _on_meta(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)
