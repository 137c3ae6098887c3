"""How well a model in memory predicts documents: the core that validation and assessment share.

Shape legend: B rows of a batch, T tokens of a row, V vocabulary, N scored tokens, D documents.

Scores do not depend on how documents are batched (up to fp32 round-off). A language model's padding
stands on the right, where no scored token reads it, so no mask is made of it; a classifier's is
masked, on the side that its tokenizer has it. Every scored token is predicted exactly once, and its
log-probability is taken in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.compare.figures import value_of
from pipeline.data.padding import Padding, pad, read_by
from pipeline.errors import UserError
from pipeline.models.load import check_tokens, positions
from pipeline.models.vocabulary import vocabulary_of
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch

LOGIT_BYTES = 256 * 2**20
"""Fp32 logits held at a time, in bytes: batches are cut to it, and a single longer row is reduced
in chunks of it.
"""


class Scorable(Protocol):
    """One encoded document, as `pipeline.data.encode` makes it.

    Attributes:
        input_ids: int32 (L,).
        token_type_ids: int32 (L,): the part of the text that each token is of; None: all of the
            first.
        targets: bool (L,): the tokens to be predicted. The first token has no context and is never
            scored.
        num_bytes: UTF-8 bytes that the targets stand for, `ends` left out.
        label: Class index; None without one.
        digest: Content digest of the document; neighbours that share it are one document.
        ends: bool (L,): targets that are the end of a text or turn, and stand for no bytes; None:
            none.
        unknown_bytes: Those of `num_bytes` under unknown tokens, or under none.
    """

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def token_type_ids(self) -> np.ndarray | None: ...
    @property
    def targets(self) -> np.ndarray: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def label(self) -> int | None: ...
    @property
    def digest(self) -> str: ...
    @property
    def ends(self) -> np.ndarray | None: ...
    @property
    def unknown_bytes(self) -> int: ...


CAUSAL_COLUMNS = ("bits", "bytes", "tokens", "correct", "end_bits", "ends", "unknown_bytes")


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a model's predictions lie from another's, by document.

    Attributes:
        kl: float64 (D,): KL(other || model) in nats, summed over the document's scored tokens.
        flips: int64 (D,): scored tokens (or 1 for an example) where the two rank another one first.
        other: float64 (D,): the other's bits, or 1.0 where it classifies the example right.
    """

    kl: np.ndarray
    flips: np.ndarray
    other: np.ndarray


@dataclass(frozen=True, slots=True)
class CausalScores:
    """Next-token scores by document, in the order the documents were given. Ends stand apart from
    all else.

    Attributes:
        digest: str (D,).
        bits: float64 (D,): negative log2-probability, summed over the document's scored tokens.
        bytes: int64 (D,): UTF-8 bytes.
        tokens: int64 (D,): scored tokens.
        correct: int64 (D,): scored tokens that the model ranks first.
        predictions: int32 (N,): the first-ranked token at every scored position, document after
            document.
        end_bits: float64 (D,): negative log2-probability of the document's ends (of its text, or of
            turns).
        ends: int64 (D,): how many they are.
        unknown_bytes: int64 (D,): those of `bytes` under unknown tokens, or under none.
        drift: From another model's predictions, where one was given.
    """

    digest: np.ndarray
    bits: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray
    predictions: np.ndarray
    end_bits: np.ndarray
    ends: np.ndarray
    unknown_bytes: np.ndarray
    drift: Drift | None = None

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What is kept of each document, by name: shape (D,) each."""
        return {name: getattr(self, name) for name in CAUSAL_COLUMNS}


@dataclass(frozen=True, slots=True)
class ExampleScores:
    """Scores by example, in the order given.

    Attributes:
        digest: str (D,).
        columns: (D,) each, by name: what the task keeps of an example (`Kind.scored`).
        drift: From another model's predictions, where one was given.
    """

    digest: np.ndarray
    columns: dict[str, np.ndarray]
    drift: Drift | None = None

    @property
    def predictions(self) -> np.ndarray:
        """What the model says of each example, shape (D,), as its task keeps it."""
        return self.columns["prediction"]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of one document that the model reads at once.

    Attributes:
        ids: int32 (T + 1,): T tokens read and, shifted by one, T that may be predicted.
        scored: bool (T,): which of the predicted ones count.
        first: Place of the window's first scored token among all scored tokens.
    """

    ids: np.ndarray
    scored: np.ndarray
    first: int

    @property
    def places(self) -> np.ndarray:
        """Places of the window's scored tokens among all scored tokens, int64 (n,)."""
        return np.arange(self.first, self.first + np.count_nonzero(self.scored))


def cut_windows(
    encoded: Sequence[Scorable], sequence_length: int, stride: int | None = None
) -> list[Window]:
    """Cut documents into windows of which at most `sequence_length` tokens are read, every target
    predicted once.

    The first window of a document predicts its first `sequence_length` tokens, each further one the
    next `stride`. Where a document is longer than a window, every window but the first reads
    `sequence_length` tokens, so that the first token it predicts has at least `sequence_length -
    stride + 1` tokens of context, and the last window of a document has more. With no stride
    windows share one token. A text's end has a window of its own where it does not fit in, so that
    the text's windows are those of the text alone. Windows without a target are left out.

    Args:
        stride: At most `sequence_length`, which it is by default.

    Source: lm-evaluation-harness, `lm_eval.utils.get_rolling_token_windows` with `context_len` of
    `sequence_length - stride + 1` (`HFLM.loglikelihood_rolling`: 1).
    """
    assert sequence_length >= 1, "a window reads a token"
    assert stride is None or 1 <= stride <= sequence_length, "what no window predicts would be lost"
    windows: list[Window] = []
    first = 0
    for document in encoded:
        for predicted, end in _predicted(document, sequence_length, stride or sequence_length):
            read = max(0, end - sequence_length)
            # A copy, because the next line changes it. Shifted by one: a token is predicted at the
            # place before it.
            scored = document.targets[read + 1 : end + 1].copy()
            # Predicted by an earlier window: here it is context only.
            scored[: predicted - read] = False
            if scored.any():
                windows.append(Window(document.input_ids[read : end + 1], scored, first))
                first += int(np.count_nonzero(scored))
    return windows


def _predicted(document: Scorable, length: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield what each window of a document predicts: after the token at the first place, up to that
    at the second.
    """
    last = len(document.input_ids) - 1
    has_end = document.ends is not None and bool(document.ends[-1])
    text = last - 1 if has_end and last > length else last
    done = 0
    while done < text:
        end = min(text, done + (stride if done else length))
        yield done, end
        done = end
    if text < last:
        yield text, last


def score_causal(
    model: Any,
    encoded: Sequence[Scorable],
    *,
    sequence_length: int,
    batch_size: int,
    device: torch.device | str,
    pad_id: int,
    stride: int | None = None,
    other: Any = None,
) -> CausalScores:
    """Score every target token of `encoded` once.

    Args:
        model: A causal LM (not wrapped for distribution); its training mode is restored afterwards.
        encoded: Documents; those longer than a window are cut.
        sequence_length: Tokens that a window reads.
        batch_size: Windows at a time, fewer where their fp32 logits would exceed `LOGIT_BYTES`.
        device: Where the model is.
        pad_id: Any token of the model's vocabulary.
        stride: Tokens that windows beyond a document's first predict: see `cut_windows`.
        other: A model of the same vocabulary, on the same device, to measure the drift from.

    Raises:
        UserError: If a token lies beyond the model's embedding, or a window is longer than its
            positions.
    """
    windows = cut_windows(encoded, sequence_length, stride)
    check_vocabulary(model, (window.ids for window in windows), pad_id)
    _check_positions(model, max((len(window.scored) for window in windows), default=0))
    # The first token has no context to be predicted from.
    scored = [int(np.count_nonzero(document.targets[1:])) for document in encoded]
    columns = {name: np.zeros(sum(scored), dtype) for name, dtype in TOKEN_COLUMNS.items()}
    with scoring_mode(model), nullcontext() if other is None else scoring_mode(other):
        for batch in _batches(windows, batch_size, int(model.config.get_text_config().vocab_size)):
            places = np.concatenate([window.places for window in batch])
            for name, values in _score_windows(model, batch, device, pad_id, other).items():
                columns[name][places] = values
    number = document_numbers(encoded)  # of the document that each is of
    owner = np.repeat(number, scored)  # document of every scored token
    is_end = np.concatenate([np.zeros(0, dtype=bool), *map(_scored_ends, encoded)])
    size = int(number[-1]) + 1 if len(number) else 0
    of_text = lambda values: np.bincount(owner[~is_end], values[~is_end], minlength=size)
    by_document = lambda values: np.bincount(number, values, minlength=size).astype(np.int64)
    drift = None
    if other is not None:
        flips = of_text(columns["flips"]).astype(np.int64)
        drift = Drift(of_text(columns["kl"]), flips, of_text(columns["other_nats"]) / math.log(2))
    return CausalScores(
        # One digest a document: where its number first occurs.
        digest=np.array([document.digest for document in encoded])[np.diff(number, prepend=-1) > 0],
        bits=of_text(columns["nats"]) / math.log(2),
        bytes=by_document([document.num_bytes for document in encoded]),
        tokens=np.bincount(owner[~is_end], minlength=size),
        correct=of_text(columns["hits"]).astype(np.int64),
        predictions=columns["top"][~is_end],
        end_bits=np.bincount(owner[is_end], columns["nats"][is_end], minlength=size) / math.log(2),
        ends=np.bincount(owner[is_end], minlength=size),
        unknown_bytes=by_document([document.unknown_bytes for document in encoded]),
        drift=drift,
    )


def document_numbers(encoded: Sequence[Scorable]) -> np.ndarray:
    """Return the number of the document that each is of, int64 (E,): neighbours of one digest are
    of one document.
    """
    digests = [document.digest for document in encoded]
    fresh = [at == 0 or digest != digests[at - 1] for at, digest in enumerate(digests)]
    return np.cumsum(fresh, dtype=np.int64) - 1


def _scored_ends(document: Scorable) -> np.ndarray:
    """Return which of a document's scored tokens are ends, bool (n,)."""
    scored = document.targets[1:]
    return (
        np.zeros(int(np.count_nonzero(scored)), dtype=bool)
        if document.ends is None
        else document.ends[1:][scored]
    )


TOKEN_COLUMNS: dict[str, npt.DTypeLike] = {
    "nats": float,
    "top": np.int32,
    "hits": bool,
    "kl": float,
    "flips": bool,
    "other_nats": float,
}


def _score_windows(
    model: Any, batch: Sequence[Window], device: torch.device | str, pad_id: int, other: Any
) -> dict[str, np.ndarray]:
    """Return `TOKEN_COLUMNS` of the batch's scored tokens, row after row: (n,) each; the last three
    with `other`.
    """
    import torch

    ids = pad_right([window.ids[:-1] for window in batch], pad_id, device)  # (B, T)
    # No mask: what stands before padding cannot read it, and attention without one is faster.
    read = {"input_ids": ids, "use_cache": False}
    logits_BTV = model(**read).logits
    theirs_BTV = None if other is None else other(**read).logits
    rows = np.repeat(np.arange(len(batch)), [np.count_nonzero(window.scored) for window in batch])
    columns = np.concatenate([np.flatnonzero(window.scored) for window in batch])
    row, column = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
    target = torch.from_numpy(
        np.concatenate([window.ids[1:][window.scored] for window in batch]).astype(np.int64)
    )
    target = target.to(device)
    # 4 bytes an fp32 logit
    chunk = max(1, LOGIT_BYTES // (4 * logits_BTV.shape[-1]))
    parts: list[dict[str, torch.Tensor]] = []
    for at in range(0, len(rows), chunk):
        part = slice(at, at + chunk)
        # fp32 before the softmax: in 16 bits, log-probabilities have two or three digits.
        logprobs_nV = logits_BTV[row[part], column[part]].float().log_softmax(-1)
        found = _read(logprobs_nV, target[part])
        if theirs_BTV is not None:
            theirs_nV = theirs_BTV[row[part], column[part]].float().log_softmax(-1)
            found |= {
                "kl": divergence(theirs_nV, logprobs_nV),
                "other_nats": _read(theirs_nV, target[part])["nats"],
                "flips": theirs_nV.argmax(-1) != found["top"],
            }
        parts.append(found)
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def _read(logprobs_nV: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    top = logprobs_nV.argmax(-1)
    return {
        "nats": -logprobs_nV.gather(-1, target[:, None]).squeeze(-1),
        "top": top,
        "hits": top == target,
    }


def divergence(theirs_nV: torch.Tensor, ours_nV: torch.Tensor) -> torch.Tensor:
    """Return KL(theirs || ours) in nats (n,), of log-probabilities (n, V)."""
    return (theirs_nV.exp() * (theirs_nV - ours_nV)).sum(-1)


def score_examples(
    model: Any,
    encoded: Sequence[Scorable],
    task: Task,
    *,
    batch_size: int,
    device: torch.device | str,
    padding: Padding,
    other: Any = None,
) -> ExampleScores:
    """Score every example of `encoded` (labels must be there), and measure the drift from `other`,
    if given.

    A model that has classes which the data lacks may answer with one of them: their numbers follow
    the data's.

    Raises:
        UserError: If a token lies beyond the model's embedding, or a label beyond its classes.
    """
    import torch

    label = np.array([example.label for example in encoded], dtype=np.int64)
    if task.kind.has_classes and len(label) and label.max() >= model.config.num_labels:
        raise UserError(
            "model.path",
            f"it tells {model.config.num_labels} classes apart and the data has a class"
            f" {label.max()}",
            "use a model with a class for every label",
        )
    check_vocabulary(model, (example.input_ids for example in encoded), padding.token)
    _check_positions(model, max((len(example.input_ids) for example in encoded), default=0))
    columns: dict[str, np.ndarray] = {}
    kl, theirs = np.zeros(len(label)), np.zeros(len(label), dtype=np.int64)
    with scoring_mode(model), nullcontext() if other is None else scoring_mode(other):
        for part in _example_batches(encoded, batch_size, padding):
            batch = pad([encoded[index] for index in part], padding)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}  # (B, T) each
            logits_BC = model(**read_by(model, batch)).logits.float()
            true = torch.from_numpy(label[part]).to(device)
            for name, values in task.kind.scored(logits_BC, true).items():
                found = values.cpu().numpy()
                wide = float if values.is_floating_point() else found.dtype
                columns.setdefault(name, np.zeros(len(label), wide))[part] = found
            if other is not None:
                theirs_BC = other(**read_by(other, batch)).logits.float().log_softmax(-1)
                kl[part] = divergence(theirs_BC, logits_BC.log_softmax(-1)).cpu().numpy()
                theirs[part] = theirs_BC.argmax(-1).cpu().numpy()
    drift = None
    if other is not None:
        flips = (theirs != columns["prediction"]).astype(np.int64)
        drift = Drift(kl, flips, (theirs == label).astype(float))
    digests = np.array([example.digest for example in encoded])
    return ExampleScores(digest=digests, columns=columns, drift=drift)


def validation_metric(
    model: Any,
    encoded: Sequence[Scorable],
    task: Task,
    *,
    sequence_length: int,
    batch_size: int,
    device: torch.device | str,
    padding: Padding,
) -> float:
    """Return the task's primary metric of a model in memory: bits per byte (ends left out), or
    accuracy.

    The figure is NaN where the model's outputs are: a diverged model is the caller's to notice.
    """
    more: dict[str, Any] = {"batch_size": batch_size, "device": device}
    if task.kind.is_language:
        scores = score_causal(
            model, encoded, sequence_length=sequence_length, pad_id=padding.token, **more
        )
    else:
        scores = score_examples(model, encoded, task, padding=padding, **more)
    return value_of(task.kind.decides, scores.columns)


@contextmanager
def scoring_mode(model: Any) -> Generator[None]:
    """Run the body in evaluation and inference mode; every module gets back the training mode it
    had.
    """
    import torch

    # Each by itself: a frozen part may have been in evaluation mode before.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def pad_right(rows: Sequence[np.ndarray], pad_id: int, device: torch.device | str) -> torch.Tensor:
    """Return `rows` as one int64 (B, T) tensor padded on the right."""
    import torch

    lengths = np.array([len(row) for row in rows])
    inside = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(inside.shape, pad_id, dtype=np.int64)
    ids[inside] = np.concatenate(rows)
    return torch.from_numpy(ids).to(device)


def check_vocabulary(model: Any, rows: Iterable[np.ndarray], pad_id: int) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        UserError: Naming the first such token and the size of the embedding.
    """
    largest = max((int(row.max()) for row in rows if len(row)), default=0)
    size = vocabulary_of(model)
    if size is not None:
        check_tokens(max(largest, pad_id), size)


def _example_batches(
    encoded: Sequence[Scorable], batch_size: int, padding: Padding
) -> Iterator[np.ndarray]:
    """Yield the numbers of examples, longest first; of one length where padding changes what a
    model says.
    """
    lengths = np.array([len(example.input_ids) for example in encoded])
    # Stable, so that batches are the same every time.
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        end = min(at + batch_size, len(order))
        if padding.one_length:
            end = at + int((lengths[order[at:end]] == lengths[order[at]]).sum())
        yield order[at:end]
        at = end


def _check_positions(model: Any, longest: int) -> None:
    limit = positions(model.config)
    if limit is not None and longest > limit:
        raise UserError(
            "quality.sequence_length",
            f"{longest} tokens are to be read at once and the model has {limit} positions",
            f"give at most {limit}, here or as training.sequence_length",
        )


def _batches(
    windows: Sequence[Window], batch_size: int, vocabulary_size: int
) -> Iterator[Sequence[Window]]:
    """Yield windows longest first, so that a batch holds little padding and its fp32 logits stay in
    `LOGIT_BYTES`.
    """
    ordered = sorted(windows, key=lambda window: -len(window.ids))
    at = 0
    while at < len(ordered):
        row_bytes = 4 * vocabulary_size * len(ordered[at].scored)
        rows = min(batch_size, max(1, LOGIT_BYTES // row_bytes))
        yield ordered[at : at + rows]
        at += rows
