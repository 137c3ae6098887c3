"""From `data.*` to a dataset."""

from __future__ import annotations

import dataclasses
import random

from pipeline.config.settings.data import DataConfig
from pipeline.data.documents import Dataset, Document
from pipeline.data.files import class_counts
from pipeline.data.labels import class_notes
from pipeline.errors import UserError
from pipeline.tasks.table import Task


def load_dataset(config: DataConfig, task: Task) -> Dataset:
    """Load what `data.*` names: `path`, else `hub`, else the embedded `name`.

    Raises:
        UserError: If it cannot be used, naming file and line where there is one.
    """
    dataset = _load(config, task)
    if config.max_documents is not None:
        dataset = _first(dataset, config.max_documents)
    if dataset.labels is not None and (config.path is not None or config.hub is not None):
        notes = class_notes(dataset.labels, class_counts(dataset))
        dataset = dataclasses.replace(dataset, notes=(*dataset.notes, *notes))
    return _shuffled_labels(dataset) if config.shuffle_labels else dataset


def _load(config: DataConfig, task: Task) -> Dataset:
    if config.path is not None:
        from pipeline.data.files import load_path

        return load_path(config, task, config.path)
    if config.hub is not None:
        from pipeline.data.hub import load_hub

        return load_hub(config, task)
    from pipeline.data.embedded import load_stdlib, load_stdlib_labels

    embedded = {"stdlib": load_stdlib, "stdlib_labels": load_stdlib_labels}
    if config.name not in embedded:
        raise UserError(
            "data.name", f"there is no {config.name!r}", f"known: {', '.join(embedded)}"
        )
    return embedded[config.name]()


def _first(dataset: Dataset, count: int) -> Dataset:
    splits = {
        name: tuple(sorted(documents, key=lambda document: document.digest)[:count])
        for name, documents in dataset.splits.items()
    }
    return _with(dataset, splits, f"max_documents={count}")


def _shuffled_labels(dataset: Dataset) -> Dataset:
    """Permute the labels of train: a model can learn nothing from them."""
    train = dataset.splits["train"]
    labels = [document.label for document in train]
    random.Random(0).shuffle(labels)
    shuffled = tuple(
        dataclasses.replace(document, label=label)
        for document, label in zip(train, labels, strict=True)
    )
    return _with(dataset, {**dataset.splits, "train": shuffled}, "train labels are shuffled")


def _with(dataset: Dataset, splits: dict[str, tuple[Document, ...]], note: str) -> Dataset:
    from pipeline.store.artifacts import key_of

    digest = key_of(source=dataset.digest, change=note)
    return dataclasses.replace(dataset, splits=splits, digest=digest, notes=(*dataset.notes, note))
