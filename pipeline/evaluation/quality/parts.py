"""Scoring by several ranks: when it is worth it, who scores which documents, and how their scores
become those of one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from pipeline.config.settings.quality import QualityConfig
from pipeline.evaluation.quality.scoring import (
    CAUSAL_COLUMNS,
    CausalScores,
    Drift,
    ExampleScores,
    Scorable,
    cut_windows,
    document_numbers,
)

Thing = TypeVar("Thing")
Scores = CausalScores | ExampleScores
LEAST_BATCHES = 2  # of a rank: for less, each would load a model that it hardly uses


class Sharing(Protocol):
    """The ranks that score together; each calls `shared` with its own part of the work."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def shared(self, work: Callable[[], Thing]) -> list[Thing]:
        """Return what the work of every rank gives, by rank."""
        ...


def is_worth_sharing(num_documents: int, config: QualityConfig, ranks: int) -> bool:
    """Return whether so many documents have `LEAST_BATCHES` for every rank, where there are
    several; a document is taken for one window.
    """
    read = min(num_documents, config.max_documents or num_documents)
    return ranks > 1 and read >= LEAST_BATCHES * config.batch_size * ranks


def language_rows(
    encoded: Sequence[Scorable], sequence_length: int, stride: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of scores that each of `encoded` is of, and the tokens that are read for it:
    int64 (E,) each.
    """
    tokens = [
        sum(len(window.scored) for window in cut_windows([document], sequence_length, stride))
        for document in encoded
    ]
    return document_numbers(encoded), np.array(tokens, dtype=np.int64)


def example_rows(encoded: Sequence[Scorable]) -> tuple[np.ndarray, np.ndarray]:
    """Return the same of examples: each has a row of its own."""
    tokens = [len(example.input_ids) for example in encoded]
    return np.arange(len(encoded)), np.array(tokens, dtype=np.int64)


def even_parts(rows: np.ndarray, tokens: np.ndarray, size: int) -> list[np.ndarray]:
    """Return the rows of scores that each rank makes, ascending, so that all read about as many
    tokens.

    The longest first, each to the rank that has least so far: no rank then has more than 4/3 of
    what the best sharing would give it. Equal arguments give equal parts.

    Args:
        rows: That each encoded document is of, int64 (E,).
        tokens: Of each, int64 (E,).
        size: How many ranks.

    Source: Graham 1969, SIAM J. Appl. Math. 17(2), 416-429 (longest processing time first).
    """
    of_row = np.bincount(rows, tokens)
    parts: list[list[int]] = [[] for _ in range(size)]
    loads = [(0.0, rank) for rank in range(size)]
    for row in np.argsort(-of_row, kind="stable"):
        load, rank = heapq.heappop(loads)
        parts[rank].append(int(row))
        heapq.heappush(loads, (load + float(of_row[row]), rank))
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


def put_together(parts: Sequence[np.ndarray], found: Sequence[Scores]) -> Scores:
    """Return the scores of all documents, in their order, from those of parts.

    Args:
        parts: The rows that each of `found` holds, in its order.
    """
    for part, scores in zip(parts, found, strict=True):
        assert len(part) == len(scores.digest), "a document was torn apart, or two became one"
    order = np.argsort(np.concatenate(parts))
    drift = None
    drifts = [each.drift for each in found if each.drift is not None]
    if drifts:
        drift = Drift(*(_columns(drifts, order, name) for name in ("kl", "flips", "other")))
    # Texts without a target are left out, so that a rank may have none.
    digest = _columns([each for each in found if len(each.digest)], order, "digest")
    if isinstance(found[0], CausalScores):
        of_text = [each for each in found if isinstance(each, CausalScores)]
        columns = {name: _columns(of_text, order, name) for name in CAUSAL_COLUMNS}
        return CausalScores(
            digest=digest, predictions=_predictions(of_text, order), drift=drift, **columns
        )
    own = [each.columns for each in found if isinstance(each, ExampleScores)]
    made = {name: np.concatenate([each[name] for each in own])[order] for name in own[0]}
    return ExampleScores(digest=digest, columns=made, drift=drift)


def _columns(parts: Sequence[object], order: np.ndarray, name: str) -> np.ndarray:
    return np.concatenate([getattr(part, name) for part in parts])[order]


def _predictions(found: Sequence[CausalScores], order: np.ndarray) -> np.ndarray:
    """Return the predictions of all documents, (N,): each has as many as scored tokens."""
    by_document = [
        own
        for each in found
        # what is left behind the last document is none
        for own in np.split(each.predictions, np.cumsum(each.tokens))[:-1]
    ]
    return np.concatenate([by_document[row] for row in order])
