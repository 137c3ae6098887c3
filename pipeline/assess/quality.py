"""How good an artifact is: reloaded from disk, scored on the test split, per-example values kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.assess.scoring import CausalScores, ClassificationScores, score_causal, score_classification
from pipeline.config import QualityConfig, Task
from pipeline.data.documents import Document
from pipeline.data.encode import encode_all
from pipeline.ledger.phases import PhaseClock
from pipeline.models import load_model, load_tokenizer
from pipeline.values import measured, null

LEVEL = 0.95
Arrays = dict[str, np.ndarray]


def assess_quality(
    folder: Path, *, documents: Sequence[Document], task: Task, labels: tuple[str, ...] | None, config: QualityConfig,
    sequence_length: int, device: Any, items: Path, teacher_predictions: Path | None, seed: int, clock: PhaseClock,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Score the artifact in `folder` on test documents.

    Args:
        items: Where per-example values go (JSONL); first predictions go beside it as `.predictions.npy`.
        teacher_predictions: Those of the teacher on the same documents, for agreement.

    Returns:
        By quality key: a value with its 95% interval `ci`, its number of items `n`, and the path of the items.
    """
    with clock.phase("model_load"):
        model, tokenizer = load_model(folder, task, device=device, labels=labels), load_tokenizer(folder)
    with clock.phase("prepare"):
        chosen = sorted(documents, key=lambda document: document.digest)[: config.max_documents]
        encoded = encode_all(
            chosen, tokenizer, task, max_length=sequence_length, max_bytes=config.max_bytes_per_document
        )
    with clock.phase("eval"):
        more: dict[str, Any] = {"batch_size": config.batch_size, "device": device, "pad_id": tokenizer.pad_token_id}
        if task is Task.causal_lm:
            scores = score_causal(model, encoded, sequence_length=sequence_length, **more)
            predictions, arrays = scores.predictions, _causal_arrays(scores)
        else:
            classified = score_classification(model, encoded, **more)
            predictions, arrays = classified.prediction, _class_arrays(classified)
        np.save(items.with_suffix(".predictions.npy"), predictions)
        agreement = _agreement(predictions, teacher_predictions, arrays.get("tokens"))
        if isinstance(agreement, np.ndarray):
            arrays["agree"] = agreement
        _write_items(items, arrays)
        figures = _figures(task, arrays)
        result = {key: _value(statistic, arrays, config.bootstrap, seed, items) for key, statistic in figures.items()}
    if isinstance(agreement, str):
        result["teacher_agreement"] = {**null(agreement).to_json(), "ci": None, "n": None, "items": None}
    return result


def _causal_arrays(scores: CausalScores) -> Arrays:
    return {name: getattr(scores, name) for name in ("digest", "bits", "bytes", "tokens", "correct")}


def _class_arrays(scores: ClassificationScores) -> Arrays:
    return {name: getattr(scores, name) for name in ("digest", "label", "prediction", "correct")}


def _agreement(predictions: np.ndarray, teacher: Path | None, tokens: np.ndarray | None) -> np.ndarray | str | None:
    """Return per-document counts of predictions equal to the teacher's, a reason why not, or None without a teacher."""
    if teacher is None:
        return None
    theirs = np.load(teacher)
    if len(theirs) != len(predictions):
        return "the teacher reads other tokens"
    equal = (theirs == predictions).astype(np.int64)
    if tokens is None:
        return equal
    return np.add.reduceat(equal, np.concatenate([[0], np.cumsum(tokens)[:-1]]))


def _figures(task: Task, arrays: Arrays) -> dict[str, Callable[[Arrays], float]]:
    """Return the statistics of the task: functions of per-document arrays, so that documents can be resampled."""
    figures: dict[str, Callable[[Arrays], float]]
    if task is Task.causal_lm:
        figures = {
            "bits_per_byte": lambda a: a["bits"].sum() / a["bytes"].sum(),
            "perplexity": lambda a: 2 ** (a["bits"].sum() / a["tokens"].sum()),
            "next_token_accuracy": lambda a: a["correct"].sum() / a["tokens"].sum(),
        }
    else:
        figures = {"accuracy": lambda a: a["correct"].mean(), "macro_f1": macro_f1}
    if "agree" in arrays:
        per = "tokens" if task is Task.causal_lm else None
        figures["teacher_agreement"] = lambda a: a["agree"].sum() / (len(a["agree"]) if per is None else a[per].sum())
    return figures


def macro_f1(arrays: Arrays) -> float:
    """Return the mean F1 over classes that occur among labels or predictions."""
    label, prediction = arrays["label"], arrays["prediction"]
    size = int(max(label.max(), prediction.max())) + 1
    hits = np.bincount(label[label == prediction], minlength=size)
    present = np.bincount(label, minlength=size) + np.bincount(prediction, minlength=size)
    return float((2 * hits[present > 0] / present[present > 0]).mean())


def _value(
    statistic: Callable[[Arrays], float], arrays: Arrays, resamples: int, seed: int, items: Path
) -> dict[str, Any]:
    """Return the figure with a percentile bootstrap interval over documents."""
    count = len(arrays["digest"])
    generator = np.random.default_rng(seed)
    drawn: list[float] = []
    for _ in range(resamples):
        rows = generator.integers(0, count, count)
        drawn.append(statistic({name: array[rows] for name, array in arrays.items() if name != "digest"}))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = measured(float(statistic(arrays)))
    return {**value.to_json(), "ci": [float(low), float(high)], "n": count, "items": str(items)}


def _write_items(path: Path, arrays: Arrays) -> None:
    names = list(arrays)
    rows = zip(*(arrays[name].tolist() for name in names), strict=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    temporary.replace(path)


def read_items(path: Path) -> Arrays:
    """Return the per-example arrays that `assess_quality` kept."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
