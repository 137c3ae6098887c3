"""Batches made ahead, in a thread: while the device computes one step, the host makes the next
ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from pipeline.ledger.devices.table import device_of

AHEAD = 2  # steps made beforehand


class Batches(Protocol):
    """What a training reads: batches as a pure function of the step.

    A batch is a dict of CPU tensors whose first dimension counts its rows: (B, T) tokens, (B,)
    classes.
    """

    def batch(self, step: int) -> dict[str, Tensor]: ...


class Ahead:
    """Batches of consecutive steps, from the thread that makes them; in page-locked memory for a
    CUDA device.
    """

    def __init__(
        self, source: Batches, pool: ThreadPoolExecutor, first: int, end: int, *, pinned: bool
    ) -> None:
        self._source, self._pool, self._end, self._pinned = source, pool, end, pinned
        self._next = first
        self._made: deque[tuple[int, Future[dict[str, Tensor]]]] = deque()

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, and have those after it made; steps are asked for in order,
        each once.

        Raises:
            Exception: What making it raised.
        """
        self._ask_for(step + 1 + AHEAD)
        made_for, made = self._made.popleft()
        assert made_for == step, f"step {step} was asked for after {made_for - 1}"
        return made.result()

    def _ask_for(self, end: int) -> None:
        while self._next < min(end, self._end):
            self._made.append((self._next, self._pool.submit(self._make, self._next)))
            self._next += 1

    def _make(self, step: int) -> dict[str, Tensor]:
        batch = self._source.batch(step)
        return (
            # Copies to the device run beside the host only from page-locked memory.
            {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pinned else batch
        )


@contextmanager
def made_ahead(source: Batches, first: int, end: int, device: torch.device) -> Generator[Ahead]:
    """Give the batches of the steps from `first` until before `end`; the thread is gone
    afterwards.
    """
    own = device_of(device)
    # Page-locked memory is the current device's, and a new thread's is number 0, whatever this
    # one's is.
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=own.make_current)
    try:
        yield Ahead(source, pool, first, end, pinned=own.pinned)
    finally:
        # Batches nobody will ask for are not made; one being made is waited for.
        pool.shutdown(wait=True, cancel_futures=True)
