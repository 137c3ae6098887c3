"""Batches as a pure function of (seed, step): resuming at a step needs no iterator state.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch

from pipeline.data.encode import Encoded
from pipeline.data.padding import Padding, pad
from pipeline.errors import UserError

IGNORE = -100  # torch's ignore_index


FirstRow = Callable[[int], int]
"""How many rows the steps before a step read: what makes batches of one size, or growing ones."""


class _Shuffled:
    """Row numbers of each step: epochs are permutations seeded with (seed, epoch), read one after another."""

    def __init__(self, num_rows: int, first_row: FirstRow, seed: int) -> None:
        self.num_rows, self.first_row, self.seed = num_rows, first_row, seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)

    def rows(self, step: int) -> np.ndarray:
        places = np.arange(self.first_row(step), self.first_row(step + 1))
        return np.array([self._order(int(place // self.num_rows))[place % self.num_rows] for place in places])


def _places(batch_size: int | FirstRow) -> FirstRow:
    return batch_size if callable(batch_size) else (lambda step: step * batch_size)


def shuffled_rows(num_rows: int, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Return which rows a step reads, (B,), every row once an epoch."""
    return _Shuffled(num_rows, _places(batch_size), seed).rows


class PackedBatches:
    """Documents laid end to end and cut into windows of exactly `sequence_length`, boundaries respected.

    An epoch reads every window once; the rest at the end, shorter than a window, is never read.

    `position_ids` restart at every document and window, which is how a model tells documents apart; a label is the
    next token of the same document, or IGNORE.
    """

    def __init__(
        self, encoded: Sequence[Encoded], *, sequence_length: int, batch_size: int | FirstRow, seed: int,
        length_at: Callable[[int], int] | None = None,
    ) -> None:  # fmt: skip
        ids = np.concatenate([item.input_ids for item in encoded])
        labels = np.concatenate([_next_tokens(item) for item in encoded])
        starts = np.concatenate([np.arange(len(item.input_ids)) for item in encoded])
        self.num_rows = len(ids) // sequence_length
        if not self.num_rows:
            raise UserError(
                "data", f"all of train is {len(ids)} tokens, less than one sequence", "give more, or a shorter length"
            )
        shape = (self.num_rows, sequence_length)
        used = self.num_rows * sequence_length
        self._ids, self._labels = ids[:used].reshape(shape), labels[:used].reshape(shape)
        self._positions = np.minimum(starts[:used].reshape(shape), np.arange(sequence_length))
        self._shuffled = _Shuffled(self.num_rows, _places(batch_size), seed)
        self._length_at = length_at or (lambda _: sequence_length)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return `input_ids, labels, position_ids`, each (B, T) int64.

        Where windows are shorter at this step, each is cut into several, (B T / t, t): the same tokens, less context.
        """
        whole = self.read(self.rows(step))
        length = self._length_at(step)
        if length == whole["input_ids"].shape[1]:
            return whole
        short = {name: tensor.reshape(-1, length) for name, tensor in whole.items()}
        return {**short, "position_ids": torch.minimum(short["position_ids"], torch.arange(length))}

    def rows(self, step: int) -> np.ndarray:
        """Return the numbers of the windows of a step, in order, (B,)."""
        return self._shuffled.rows(step)

    def read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return windows by number, as `batch` does."""
        arrays = {"input_ids": self._ids, "labels": self._labels, "position_ids": self._positions}
        return {name: torch.from_numpy(array[rows].astype(np.int64)) for name, array in arrays.items()}

    def content(self, row: int) -> bytes:
        """Return all that a window consists of; the same bytes are the same window."""
        return b"".join(array[row].tobytes() for array in (self._ids, self._labels, self._positions))


def _next_tokens(item: Encoded) -> np.ndarray:
    following = np.full(len(item.input_ids), IGNORE, dtype=np.int32)
    following[:-1] = np.where(item.targets[1:], item.input_ids[1:], IGNORE)
    return following


def num_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Return how many tokens a batch holds, padding left out."""
    if "lengths" in batch:
        return int(batch["lengths"].sum())
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


class PaddedBatches:
    """Examples of classification, padded to the longest of the batch."""

    def __init__(self, encoded: Sequence[Encoded], *, batch_size: int | FirstRow, seed: int, padding: Padding) -> None:
        self.num_rows = len(encoded)
        self._encoded, self._padding = encoded, padding
        self._shuffled = _Shuffled(self.num_rows, _places(batch_size), seed)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return what `pad` does, (B, T), and `labels` (B,), int64."""
        return self.read(self.rows(step))

    def rows(self, step: int) -> np.ndarray:
        """Return the numbers of the examples of a step, in order, (B,)."""
        return self._shuffled.rows(step)

    def content(self, row: int) -> bytes:
        """Return all that an example consists of; the same bytes are the same example."""
        item = self._encoded[row]
        segments = b"" if item.token_type_ids is None else item.token_type_ids.tobytes()
        return item.input_ids.tobytes() + segments + str(item.label).encode()

    def read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return examples by number, as `batch` does."""
        items = [self._encoded[row] for row in rows]
        return {**pad(items, self._padding), "labels": torch.tensor([item.label for item in items])}
