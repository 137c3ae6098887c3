"""Batches made ahead: the same ones in the same order, made while others are used, and no thread
left behind.
"""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from pipeline.training.prefetch import AHEAD, made_ahead

CPU = torch.device("cpu")


class Noting:
    """Batches that note down in which thread, and when, each was made."""

    def __init__(self, fails_at: int = -1, takes_s: float = 0.0) -> None:
        self.made: list[int] = []
        self.threads: set[str] = set()
        self.fails_at, self.takes_s = fails_at, takes_s

    def batch(self, step: int) -> dict[str, Tensor]:
        time.sleep(self.takes_s)
        if step == self.fails_at:
            raise ValueError(f"batch {step} is damaged")
        self.made.append(step)
        self.threads.add(threading.current_thread().name)
        return {"input_ids": torch.full((2, 3), step)}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_every_step_gets_its_own_batch_in_order() -> None:
    source = Noting()
    with made_ahead(source, 5, 12, CPU) as ahead:
        found = [int(ahead.batch(step)["input_ids"][0, 0]) for step in range(5, 12)]
    assert found == source.made == list(range(5, 12))  # none beyond the end, none twice
    assert all(name.startswith("batches") for name in source.threads)
    assert not threads()


def test_the_next_steps_are_made_while_one_is_computed() -> None:
    source = Noting()
    with made_ahead(source, 0, 100, CPU) as ahead:
        ahead.batch(0)
        until = time.monotonic() + 10
        while len(source.made) < 1 + AHEAD and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02)
        assert source.made == list(range(1 + AHEAD))  # and no further: memory is bounded


def test_what_a_batch_raises_comes_out_at_its_step() -> None:
    with made_ahead(Noting(fails_at=2), 0, 10, CPU) as ahead:
        for step in range(2):
            ahead.batch(step)
        with pytest.raises(ValueError, match="batch 2 is damaged"):
            ahead.batch(2)
    assert not threads()


def test_a_loop_that_stops_early_leaves_no_thread() -> None:
    def stopped() -> None:
        with made_ahead(Noting(takes_s=0.01), 0, 1000, CPU) as ahead:
            ahead.batch(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not threads()
