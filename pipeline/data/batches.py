"""Batches as a pure function of (seed, step): resuming at a step needs no iterator state.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from pipeline.data.encode import Encoded
from pipeline.data.padding import Padding, pad
from pipeline.errors import UserError
from pipeline.ledger.numbers import agreed, how_many

IGNORE = -100  # torch's ignore_index
OPEN_WINDOWS = 64  # of conversations, that a further one may still go into


FirstRow = Callable[[int], int]
"""How many rows the steps before a step read: what makes batches of one size, or growing ones."""


class _Shuffled:
    """Row numbers of each step: epochs are permutations seeded with (seed, epoch), read one after
    another.
    """

    def __init__(self, num_rows: int, first_row: FirstRow, seed: int) -> None:
        self.num_rows, self.first_row, self.seed = num_rows, first_row, seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)

    def rows(self, step: int) -> np.ndarray:
        places = np.arange(self.first_row(step), self.first_row(step + 1))
        return np.array(
            [self._order(int(place // self.num_rows))[place % self.num_rows] for place in places]
        )


def _places(batch_size: int | FirstRow) -> FirstRow:
    return batch_size if callable(batch_size) else (lambda step: step * batch_size)


def shuffled_rows(num_rows: int, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Return which rows a step reads, (B,), every row once an epoch."""
    return _Shuffled(num_rows, _places(batch_size), seed).rows


class PackedBatches:
    """Documents in windows of exactly `sequence_length` tokens, boundaries respected; each window
    learns something.

    Texts are laid end to end and cut; the rest at their end, shorter than a window, is never read.
    A conversation, or a prompt with its completion, begins in a window that has room for all of it:
    see `conversation_pieces` for what is longer than one. What such windows have left is padding.
    An epoch reads every window once.

    With `apart`, for models that would read from one document into the next, a window holds one
    document, or a stretch of one that is longer; the rest of it is padding.

    `position_ids` restart at every document and window, which is how a model tells documents apart;
    a label is the next token of the same document, or IGNORE.

    Attributes:
        packing: What packing did, as counts.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        *,
        sequence_length: int,
        batch_size: int | FirstRow,
        seed: int,
        length_at: Callable[[int], int] | None = None,
        apart: bool = False,
    ) -> None:
        texts = [item for item in encoded if _is_text(item)]
        others = [item for item in encoded if not _is_text(item)]
        self.packing = Packing()
        if apart:
            windows = _one_a_row(encoded, sequence_length, self.packing)
        else:
            windows = [
                *_laid_out(texts, sequence_length),
                *_placed(others, sequence_length, self.packing),
            ]
        windows = [window for window in windows if (window.labels != IGNORE).any()]
        self.num_rows = len(windows)
        if not self.num_rows:
            size = sum(len(item.input_ids) for item in encoded)
            raise UserError(
                "data",
                f"all of train is {size} tokens, less than one sequence",
                "give more, or a shorter length",
            )
        self._ids = np.stack([window.ids for window in windows])
        self._labels = np.stack([window.labels for window in windows])
        self._positions = np.stack([window.positions for window in windows])
        self._lengths = np.array([window.length for window in windows])
        self._is_padded = bool((self._lengths < sequence_length).any())
        self._shuffled = _Shuffled(self.num_rows, _places(batch_size), seed)
        self._length_at = length_at or (lambda _: sequence_length)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return `input_ids, labels, position_ids`, each (B, T) int64, and where windows are padded
        `lengths`, (B,).

        Where windows are shorter at this step, each is cut into several, (B T / t, t): the same
        tokens, less context. Pieces that would learn nothing are left out.
        """
        whole = self.read(self.rows(step))
        length = self._length_at(step)
        full = whole["input_ids"].shape[1]
        if length == full:
            return whole
        lengths = whole.pop("lengths", None)
        short = {name: tensor.reshape(-1, length) for name, tensor in whole.items()}
        short["position_ids"] = torch.minimum(short["position_ids"], torch.arange(length))
        if lengths is not None:
            starts = torch.arange(0, full, length)
            short["lengths"] = (lengths[:, None] - starts).clamp(0, length).flatten()
        learns = (short["labels"] != IGNORE).any(1)
        return (
            short
            if bool(learns.all())
            else {name: tensor[learns] for name, tensor in short.items()}
        )

    def rows(self, step: int) -> np.ndarray:
        """Return the numbers of the windows of a step, in order, (B,)."""
        return self._shuffled.rows(step)

    def read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return windows by number, as `batch` does."""
        arrays = {"input_ids": self._ids, "labels": self._labels, "position_ids": self._positions}
        arrays |= {"lengths": self._lengths} if self._is_padded else {}
        return {
            name: torch.from_numpy(array[rows].astype(np.int64)) for name, array in arrays.items()
        }

    def content(self, row: int) -> bytes:
        """Return all that a window consists of; the same bytes are the same window."""
        return b"".join(
            array[row].tobytes() for array in (self._ids, self._labels, self._positions)
        )


@dataclass(slots=True)
class Packing:
    """What became of conversations, as counts.

    Attributes:
        conversations: All of them; of texts nothing is counted.
        shortened: Conversations longer than a window, the oldest `tokens_unread` of which an answer
            does not see.
        answers_cut: Answers that do not fit in a window with a quarter of it for their prompt;
            `targets_cut` of their tokens are not learnt.
        padding: Tokens of padding in all windows of conversations (with `apart`, in all windows),
            of `window_tokens`.
    """

    conversations: int = 0
    shortened: int = 0
    tokens_unread: int = 0
    answers_cut: int = 0
    targets_cut: int = 0
    padding: int = 0
    window_tokens: int = 0

    def notes(self) -> list[str]:
        """Return a sentence for whatever was cut."""
        said: list[str] = []
        if self.shortened:
            said.append(
                f"{self.shortened} of {how_many(self.conversations, 'conversation')}"
                f" {agreed(self.shortened, 'is', 'are')} longer than a window: the oldest"
                f" {how_many(self.tokens_unread, 'token is', 'tokens are')} not seen by"
                f" {agreed(self.shortened, 'its', 'their')} answers"
            )
        if self.answers_cut:
            said.append(
                f"{how_many(self.answers_cut, 'answer is', 'answers are')} longer than a window:"
                f" {self.targets_cut} of {agreed(self.answers_cut, 'its', 'their')} tokens"
                f" {agreed(self.targets_cut, 'is', 'are')} not learnt; raise"
                " training.sequence_length"
            )
        return said


@dataclass(frozen=True, slots=True)
class _Window:
    """What is read at once: int32 (T,) each, and how many of the tokens are no padding."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    length: int


def _is_text(item: Encoded) -> bool:
    return bool(item.targets[1:].all())


def _next_tokens(item: Encoded) -> np.ndarray:
    following = np.full(len(item.input_ids), IGNORE, dtype=np.int32)
    following[:-1] = np.where(item.targets[1:], item.input_ids[1:], IGNORE)
    return following


def _laid_out(texts: Sequence[Encoded], length: int) -> Iterator[_Window]:
    """Yield texts, laid end to end and cut."""
    if not texts:
        return
    ids = np.concatenate([item.input_ids for item in texts])
    labels = np.concatenate([_next_tokens(item) for item in texts])
    starts = np.concatenate([np.arange(len(item.input_ids)) for item in texts])
    shape = (len(ids) // length, length)
    used = shape[0] * length
    positions = np.minimum(starts[:used].reshape(shape), np.arange(length))
    for row in zip(ids[:used].reshape(shape), labels[:used].reshape(shape), positions, strict=True):
        yield _Window(*row, length)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a conversation that fits in a window.

    Attributes:
        ids: int32 (n,): tokens read.
        labels: int32 (n,): the token after each, or IGNORE.
    """

    ids: np.ndarray
    labels: np.ndarray


def conversation_pieces(item: Encoded, length: int, packing: Packing) -> list[Piece]:
    """Return what is read of a conversation: all of it up to its last target, in one piece where it
    fits.

    Of a longer one, each answer is read whole with as much of what precedes it as fits, several
    answers at once where they fill at most half of a window. An answer that leaves no room for any
    of its prompt loses its end: a quarter of the window (or all of the prompt, where it is shorter)
    is kept for what it answers.

    Args:
        length: Tokens of a window.
        packing: Counts what is cut.
    """
    labels = _next_tokens(item)
    answers = _answers(labels)
    packing.conversations += 1
    if not answers:
        return []
    last = answers[-1][1]
    if last <= length:
        return [Piece(item.input_ids[:last], labels[:last])]
    packing.shortened += 1
    pieces: list[Piece] = []
    while answers:
        begin, end = answers[0]
        number = 1
        while number < len(answers) and (
            answers[number][1] <= length or answers[number][1] - begin <= length // 2
        ):
            end = answers[number][1]
            number += 1
        answers = answers[number:]
        start = max(0, end - length)
        # the answer alone does not fit: at `begin` stands the token before its first one
        if start > begin:
            start = max(0, begin + 1 - max(1, length // 4))
            packing.answers_cut += 1
            packing.targets_cut += int((labels[start + length : end] != IGNORE).sum())
            end = start + length
        packing.tokens_unread += start
        own = labels[start:end].copy()
        own[: begin - start] = IGNORE  # answers of an earlier piece are context here
        pieces.append(Piece(item.input_ids[start:end], own))
    return pieces


def _answers(labels: np.ndarray) -> list[tuple[int, int]]:
    """Return the stretches [begin, end) of places at which a target is predicted."""
    edges = np.flatnonzero(np.diff((labels != IGNORE).astype(np.int8), prepend=0, append=0))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _placed(conversations: Sequence[Encoded], length: int, packing: Packing) -> list[_Window]:
    """Return windows of conversations: each goes where it leaves the least room, of the windows
    begun last.
    """
    begun: list[list[Piece]] = []
    room: list[int] = []
    for item in conversations:
        for piece in conversation_pieces(item, length, packing):
            size = len(piece.ids)
            looked_at = range(max(0, len(room) - OPEN_WINDOWS), len(room))
            best = min(
                (at for at in looked_at if room[at] >= size), key=lambda at: room[at], default=None
            )
            if best is None:
                best = len(begun)
                begun.append([])
                room.append(length)
            begun[best].append(piece)
            room[best] -= size
    packing.padding, packing.window_tokens = sum(room), length * len(room)
    return [_joined(pieces, length) for pieces in begun]


def _one_a_row(encoded: Sequence[Encoded], length: int, packing: Packing) -> list[_Window]:
    """Return windows of one document each, or of a stretch of one, whose last token predicts what
    follows.
    """
    pieces: list[Piece] = []
    for item in encoded:
        if not _is_text(item):
            pieces += conversation_pieces(item, length, packing)
            continue
        labels = _next_tokens(item)
        starts = range(0, len(item.input_ids), length)
        pieces += [
            Piece(item.input_ids[at : at + length], labels[at : at + length]) for at in starts
        ]
    packing.padding = sum(length - len(piece.ids) for piece in pieces)
    packing.window_tokens = length * len(pieces)
    return [_joined([piece], length) for piece in pieces]


def _joined(pieces: Sequence[Piece], length: int) -> _Window:
    """Return pieces side by side, and behind them padding, which is a document of its own without a
    target.
    """
    used = sum(len(piece.ids) for piece in pieces)
    parts = [*(len(piece.ids) for piece in pieces), length - used]
    ids, labels = np.zeros(length, dtype=np.int32), np.full(length, IGNORE, dtype=np.int32)
    ids[:used] = np.concatenate([piece.ids for piece in pieces])
    labels[:used] = np.concatenate([piece.labels for piece in pieces])
    return _Window(ids, labels, np.concatenate([np.arange(part) for part in parts]), used)


def num_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Return how many tokens a batch holds, padding left out."""
    if "lengths" in batch:
        return int(batch["lengths"].sum())
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def num_targets(batch: dict[str, torch.Tensor]) -> int:
    """Return how many tokens of a batch are to be predicted; an example of classification has one
    label.
    """
    return int((batch["labels"] != IGNORE).sum())


class PaddedBatches:
    """Examples of classification, padded to the longest of the batch."""

    def __init__(
        self, encoded: Sequence[Encoded], *, batch_size: int | FirstRow, seed: int, padding: Padding
    ) -> None:
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
