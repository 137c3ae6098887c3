"""How good an artifact is: reloaded from disk, scored on test documents, per-document values kept.

Intervals are two-sided at 95% and treat documents as the independent items, never the tokens inside
one: Wilson's interval where a document is right or wrong, the BCa bootstrap over documents
elsewhere. Documents of one group come from one source and count as one (`compare/clustered.py`).
Perplexity's interval is the exponential of its exponent's.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from pipeline.compare.clustered import GROUP, group_codes, num_groups
from pipeline.compare.figures import Figure, Resampling, figure_of, mean, share
from pipeline.compare.quality import is_binary
from pipeline.config.settings.quality import QualityConfig
from pipeline.data.documents import Document
from pipeline.data.encode import Encoded, encode_all
from pipeline.data.padding import Padding
from pipeline.errors import StageFailed, UserError
from pipeline.evaluation.quality.parts import (
    Scores,
    Sharing,
    even_parts,
    example_rows,
    language_rows,
    put_together,
)
from pipeline.evaluation.quality.scoring import score_causal, score_examples
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.metrics import PRIMARY, TASK
from pipeline.ledger.numbers import how_many
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import Quality, QualityFigure
from pipeline.ledger.values import measured, null
from pipeline.models.load import example_length, load_model, load_tokenizer
from pipeline.models.sixteen_bits import stored_dtype
from pipeline.models.weights import first_not_finite
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch

    from pipeline.evaluation.quality.tasks import TaskScores

DRIFT_COLUMNS = ("kl", "flips", "unquantized")
QUARTERS = ("easiest quarter", "second quarter", "third quarter", "hardest quarter")

Arrays = dict[str, np.ndarray]


def assess_quality(
    folder: Path,
    *,
    documents: Sequence[Document],
    task: Task,
    labels: tuple[str, ...] | None,
    config: QualityConfig,
    sequence_length: int,
    device: torch.device | str,
    items: Path,
    teacher_predictions: Path | None,
    seed: int,
    clock: PhaseClock,
    unquantized: Path | None = None,
    scorers: Sharing | None = None,
) -> Quality:
    """Score the artifact in `folder` on test documents.

    Args:
        folder: A model in Hugging Face layout; loaded anew, in the dtype it is stored in, because
            what is assessed is what ships.
        documents: The test split; the first `config.max_documents` by content digest are read.
        task: What the model is for.
        labels: Class names of the data.
        config: Batch size, limits, resamples.
        sequence_length: Tokens of a window (causal_lm), or that an example is cut to.
        device: Where to score.
        items: Where per-document values go (JSONL); first predictions go beside it as
            `<stem>.predictions.npy`. Both appear whole or not at all.
        teacher_predictions: The predictions file of the teacher on the same documents, for
            agreement.
        seed: Of the bootstrap.
        clock: Books model_load, prepare and eval.
        unquantized: The folder of the model that this one was quantized from, which it is to stay
            close to.
        scorers: The ranks that score it together: the others call `score_folder`. None: this
            process alone.

    Returns:
        By quality key: a value with its interval `ci`, its number of documents `n`, and the path of
            the `items`. Of `config.tasks` (`tasks.py`) each has the key `task/<task>/<metric>`,
            documents and items of its own.

    Raises:
        UserError: If model and data do not fit, or no document holds anything to score.
        StageFailed: If an output is not finite: nothing that can be read as a model is in the
            folder.
    """
    loaded, scores = score_folder(
        folder,
        documents=documents,
        task=task,
        labels=labels,
        config=config,
        sequence_length=sequence_length,
        device=device,
        clock=clock,
        unquantized=unquantized,
        scorers=scorers,
    )
    model, tokenizer, encoded = loaded.model, loaded.tokenizer, loaded.encoded
    with clock.phase("eval"):
        predictions = scores.predictions
        arrays = {"digest": scores.digest, **scores.columns, **_groups(encoded)}
        # Before anything is written: NaN outputs are no assessment.
        _check_finite(folder, model, arrays[task.kind.finite])
        agreement = (
            None
            if teacher_predictions is None
            else _agreement(predictions, teacher_predictions, arrays)
        )
        if isinstance(agreement, np.ndarray):
            arrays["agree"] = agreement
        if scores.drift is not None:
            drift = (scores.drift.kl, scores.drift.flips, scores.drift.other)
            arrays |= dict(zip(DRIFT_COLUMNS, drift, strict=True))
        _write_predictions(items.with_name(f"{items.stem}.predictions.npy"), predictions)
        write_items(items, arrays)
        figures = figures_of(task, arrays, resamples=config.bootstrap, seed=seed)
        figures |= read_shares(task, encoded, loaded.num_chosen, len(documents))
    if isinstance(agreement, str):
        figures["teacher_agreement"] = null(agreement), None
    num_documents, groups = len(arrays["digest"]), num_groups(group_codes(arrays))
    entries = entries_of(task, figures, num_documents, items, groups)
    if unquantized is not None:
        name, change, count = worst_slice(arrays, labels)
        entries["worst_slice"] = {**entry_of((measured(change), None), count, items), "slice": name}
    if config.tasks:
        with clock.phase("eval"):
            entries |= attempted(
                lambda: _of_tasks(model, tokenizer, config, items, seed),
                lambda why: _no_tasks(config, items, why),
            )
    return entries


@dataclass(frozen=True, slots=True)
class Loaded:
    """An artifact in memory, and the documents it is scored on.

    Attributes:
        other: The model that it was quantized from; None where it is read against none.
        encoded: What is scored.
        num_chosen: Documents that were chosen; some may hold nothing to score.
    """

    model: Any
    other: Any
    tokenizer: Any
    encoded: list[Encoded]
    num_chosen: int


def score_folder(
    folder: Path,
    *,
    documents: Sequence[Document],
    task: Task,
    labels: tuple[str, ...] | None,
    config: QualityConfig,
    sequence_length: int,
    device: torch.device | str,
    clock: PhaseClock,
    unquantized: Path | None,
    scorers: Sharing | None,
) -> tuple[Loaded, Scores]:
    """Return the artifact in `folder`, and the scores of all documents; arguments are those of
    `assess_quality`. Of several ranks each scores its part, and all have the scores of all.

    Raises:
        UserError: If model and data do not fit, or no document holds anything to score.
    """

    def load() -> Loaded:
        with clock.phase("model_load"):
            model, tokenizer = _as_stored(folder, task, device, labels), load_tokenizer(folder)
            other = None if unquantized is None else _as_stored(unquantized, task, device, labels)
        with clock.phase("prepare"):
            chosen = choose_documents(documents, config.max_documents)
            length = example_length(model.config, task, sequence_length)
            encoded = encode_all(
                chosen, tokenizer, task, max_length=length, max_bytes=config.max_bytes_per_document
            )
            return Loaded(model, other, tokenizer, _scorable(encoded, task), len(chosen))

    def score(loaded: Loaded, encoded: Sequence[Encoded]) -> Scores:
        model, padding = loaded.model, Padding.of(loaded.tokenizer, loaded.model, task)
        more: dict[str, Any] = {"batch_size": config.batch_size, "device": device}
        more["other"] = loaded.other
        with clock.phase("eval"):
            if not task.kind.is_language:
                return score_examples(model, encoded, task, padding=padding, **more)
            more |= {"stride": config.stride, "pad_id": padding.token}
            return score_causal(model, encoded, sequence_length=sequence_length, **more)

    if scorers is None:
        loaded = load()
        return loaded, score(loaded, loaded.encoded)
    kept: list[tuple[Loaded, list[np.ndarray]]] = []

    def own_part() -> Scores:
        loaded = load()
        with clock.phase("prepare"):
            rows, tokens = (
                language_rows(loaded.encoded, sequence_length, config.stride)
                if task.kind.is_language
                else example_rows(loaded.encoded)
            )
            parts = even_parts(rows, tokens, scorers.size)
            is_own = np.isin(rows, parts[scorers.rank])
        kept.append((loaded, parts))
        return score(
            loaded, [each for each, own in zip(loaded.encoded, is_own, strict=True) if own]
        )

    found = scorers.shared(own_part)
    [(loaded, parts)] = kept
    return loaded, put_together(parts, found)


def _of_tasks(model: Any, tokenizer: Any, config: QualityConfig, items: Path, seed: int) -> Quality:
    """Run `config.tasks`; return their qualities by key."""
    from pipeline.evaluation.quality.tasks import run_tasks

    found: Quality = {}
    for scores in run_tasks(model, tokenizer, config):
        found |= _task_entries(
            scores, task_items(items, scores.name), resamples=config.bootstrap, seed=seed
        )
    return found


def _no_tasks(config: QualityConfig, items: Path, why: str) -> Quality:
    """Return nulls with the reason for the metrics of lm-eval's tasks; the other figures stay."""
    from pipeline.evaluation.quality.tasks import asked_metrics

    nothing = null(unmeasured("lm-eval's tasks", why)), None
    return {
        f"{TASK}{task}/{metric}": entry_of(nothing, 0, items)
        for task, metric in asked_metrics(config)
    }


def _as_stored(
    folder: Path, task: Task, device: torch.device | str, labels: tuple[str, ...] | None
) -> Any:
    """Load an artifact as it is served: in the dtype it is stored in, where this device computes in
    that.
    """
    return load_model(
        folder, task, device=device, labels=labels, dtype=stored_dtype(folder, device)
    )


def task_items(items: Path, task: str) -> Path:
    """Return where the per-document values of an lm-eval task lie, beside those of the test
    documents.
    """
    return items.with_name(f"{items.stem}.{task}.jsonl")


def _task_entries(scores: TaskScores, items: Path, *, resamples: int, seed: int) -> Quality:
    """Keep the scores of a task's documents, and return its figures by quality key."""
    write_items(items, {"digest": scores.digest, "responses": scores.responses, **scores.scores})
    figures: dict[str, Figure] = {name: (null(why), None) for name, why in scores.left_out.items()}
    how = Resampling(resamples, seed)
    for name, values in scores.scores.items():
        figures[name] = (share if is_binary(values) else mean)(values, how)
    num_documents = len(scores.digest)
    return {
        f"{TASK}{scores.name}/{name}": entry_of(each, num_documents, items)
        for name, each in figures.items()
    }


def worst_slice(arrays: Arrays, labels: tuple[str, ...] | None) -> tuple[str, float, int]:
    """Return the slice that quantizing hurts most: its name, by how much, and its number of
    documents.

    Slices are the true classes, or for texts the quarters of documents by what a byte of them cost
    the unquantized model. By how much: relative increase of bits per byte, or loss of accuracy;
    below zero where even the worst gains.
    """
    found: list[tuple[str, float, int]] = []
    if "label" in arrays:
        for label in np.unique(arrays["label"]):
            own = arrays["label"] == label
            change = float(arrays["unquantized"][own].mean() - arrays["correct"][own].mean())
            found.append((f"class {labels[label] if labels else label}", change, int(own.sum())))
    else:
        # By the unquantized model, so that both are read on the same slices.
        ranked = np.argsort(arrays["unquantized"] / arrays["bytes"], kind="stable")
        for name, own in zip(QUARTERS, np.array_split(ranked, len(QUARTERS)), strict=True):
            if len(own):
                change = float(arrays["bits"][own].sum() / arrays["unquantized"][own].sum() - 1)
                found.append((name, change, len(own)))
    return max(found, key=lambda slice: slice[1])


def choose_documents(documents: Sequence[Document], max_documents: int | None) -> list[Document]:
    """Return the first documents by content digest: a sample that neither order nor source of the
    data decides.
    """
    return sorted(documents, key=lambda document: document.digest)[:max_documents]


def _scorable(encoded: list[Encoded], task: Task) -> list[Encoded]:
    """Drop what has nothing to predict (a chat whose only answer is empty)."""
    if task.kind.is_language:
        encoded = [
            document for document in encoded if document.num_bytes and document.targets.any()
        ]
    if not encoded:
        raise UserError(
            "data", "no test document holds anything to score", "give a test split with text"
        )
    return encoded


def _check_finite(folder: Path, model: Any, readings: np.ndarray) -> None:
    num_bad = int(np.count_nonzero(~np.isfinite(readings)))
    if num_bad:
        name = first_not_finite(model)
        why = "" if name is None else f": the weights {name} are not"
        raise StageFailed(
            f"{folder}: outputs are not finite on {num_bad} of"
            f" {how_many(len(readings), 'test document')}{why}"
        )


# -- figures --------------------------------------------------------------------------------------


def _groups(encoded: Sequence[Encoded]) -> Arrays:
    """Return the column of groups, where some document names one; the others are a source of their
    own.
    """
    if all(document.group is None for document in encoded):
        return {}
    return {GROUP: np.array([document.group for document in encoded], dtype=object)}


def _agreement(
    predictions: np.ndarray, teacher_predictions: Path, arrays: Arrays
) -> np.ndarray | str:
    """Return how many of each document's first predictions equal the teacher's, int64 (D,), or why
    that is unknown.
    """
    teacher = np.load(teacher_predictions)
    if len(teacher) != len(predictions):
        return (
            f"the teacher has {how_many(len(teacher), 'prediction')} on these documents, not"
            f" {len(predictions)}: other tokens"
        )
    equal = predictions == teacher
    if "tokens" not in arrays:
        return equal.astype(np.int64)
    owner = np.repeat(np.arange(len(arrays["tokens"])), arrays["tokens"])  # document of every token
    return np.bincount(owner, equal, minlength=len(arrays["tokens"])).astype(np.int64)


def figures_of(task: Task, arrays: Arrays, *, resamples: int, seed: int) -> dict[str, Figure]:
    """Return the figures that per-document columns give, those that they lack the columns of left
    out.
    """
    codes = group_codes(arrays) if "digest" in arrays else None
    how = Resampling(resamples, seed, codes)
    return {
        quality.key: found
        for quality in task.kind.qualities
        if (found := figure_of(quality, arrays, how)) is not None
    }


def read_shares(
    task: Task, encoded: Sequence[Encoded], num_chosen: int, num_documents: int
) -> dict[str, Figure]:
    """Return what share of the test split was read: of its documents, and of the text of those."""
    cut = sum(each.unread_bytes > 0 or each.unread_tokens > 0 for each in encoded)
    if task.kind.is_language:
        name, unread, read = "read_bytes", "unread_bytes", sum(each.num_bytes for each in encoded)
    else:
        name, unread, read = (
            "read_tokens",
            "unread_tokens",
            sum(len(each.input_ids) for each in encoded),
        )
    left = sum(getattr(each, unread) for each in encoded)
    shares = {
        name: read / (read + left),
        "cut_documents": cut / num_chosen,
        "read_documents": num_chosen / num_documents,
    }
    return {key: (measured(share), None) for key, share in shares.items()}


def entries_of(
    task: Task,
    figures: Mapping[str, Figure],
    num_documents: int,
    items: Path,
    groups: int | None = None,
) -> Quality:
    """Return figures as rows hold them; the primary one names the per-document values even where it
    is null.
    """
    entries = {
        key: entry_of(figure, num_documents, items, groups) for key, figure in figures.items()
    }
    if PRIMARY[task] in entries:
        entries[PRIMARY[task]]["items"] = str(items)
    return entries


def entry_of(
    figure: Figure, num_documents: int, items: Path, groups: int | None = None
) -> QualityFigure:
    """Return a figure as rows hold it; `groups` are those that the documents form, where they form
    any.
    """
    value, ci = figure
    if value.value is None:
        return {**value.to_json(), "ci": None, "n": None, "items": None}
    entry: QualityFigure = {
        **value.to_json(),
        "ci": None if ci is None else list(ci),
        "n": num_documents,
        "items": str(items),
    }
    if groups is not None:
        entry["groups"] = groups
    return entry


# -- per-document values --------------------------------------------------------------------------


def write_items(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one JSON object per document; the file appears whole or stays as it was.

    Args:
        arrays: By column, shape (D,) each.
    """
    rows = zip(*(column.tolist() for column in arrays.values()), strict=True)
    with _replacing(path) as file:
        file.writelines(
            json.dumps(dict(zip(arrays, row, strict=True))).encode() + b"\n" for row in rows
        )


def read_items(path: Path) -> Arrays:
    """Return the per-document columns that `assess_quality` kept, in its order.

    Of a language model: `digest, bits, bytes, tokens, correct`, `end_bits, ends` (of ends of text
    or turns, which are in none of the others), `unknown_bytes` (of `bytes`) and, with a teacher,
    `agree` (tokens). Of a classifier: `digest, label, prediction, correct, logprob` and, with a
    teacher, `agree` (0 or 1). Of a quantized model also `kl` (nats), `flips`, and `unquantized`:
    the bits, or whether right, of the model that it was made from. Where documents name one,
    `group`: the source that a document shares with others, null for one of its own.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _write_predictions(path: Path, predictions: np.ndarray) -> None:
    with _replacing(path) as file:
        np.save(file, predictions, allow_pickle=False)


@contextmanager
def _replacing(path: Path) -> Generator[IO[bytes]]:
    """Give a file that takes the place of `path` when the body ends well, and vanishes when it does
    not.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
