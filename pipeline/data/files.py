"""Documents from local files, by one door: `data.path`, a folder given as `data.hub`, and files
that stages name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config.settings.data import DataConfig
from pipeline.data.cells import Row, Table, is_missing, value_of
from pipeline.data.columns import refuse_other_columns, spell_alike
from pipeline.data.documents import SPLITS, Dataset, Document
from pipeline.data.file_labels import Labels, one_label, read_labels, with_known_labels
from pipeline.data.folders import find_class_folders, find_files, only_file
from pipeline.data.formats import read_splits, read_table
from pipeline.data.labels import plainly, shortened, value_name
from pipeline.data.mappings import mapping, split_names
from pipeline.data.rows import document_of
from pipeline.data.shapes import Shape, recognise
from pipeline.data.split_names import listing
from pipeline.data.splits import Rules, assemble
from pipeline.errors import UserError
from pipeline.tasks.table import Task

KEY = "data.path"
LABEL = "label"


def load_path(config: DataConfig, task: Task, place: str, key: str = KEY) -> Dataset:
    """Load a file or a folder.

    Args:
        place: Where it lies.
        key: The setting that named it, for refusals.

    Raises:
        UserError: Naming file and line.
    """
    path = Path(place).expanduser()
    tables, notes = _tables(path, config, task, key)
    return from_tables(path.name, tables, config, task, key=key, notes=notes)


def _tables(
    path: Path, config: DataConfig, task: Task, key: str
) -> tuple[dict[str, list[Table]], list[str]]:
    """Return the files of each split, read, and what is to be said of the choice."""
    chosen = split_names(config)
    inside = None if config.subset is not None else _splits_inside(path, chosen, key)
    if inside is not None:
        return inside
    if task.kind.labelled:
        classes = find_class_folders(path, config.subset, chosen, key)
        if classes is not None:
            return {split: [table] for split, table in classes.read(key).items()}, classes.notes
    found = find_files(path, config.subset, chosen, key)
    return {
        split: [_read(file, path, key) for file in files] for split, files in found.files.items()
    }, found.notes


def _read(file: Path, folder: Path, key: str) -> Table:
    table = read_table(file, key)
    table.name = str(file.relative_to(folder)) if folder in file.parents else file.name
    return table


def _splits_inside(
    path: Path, chosen: Mapping[str, str], key: str
) -> tuple[dict[str, list[Table]], list[str]] | None:
    """Return the splits that one JSON file holds; None where there are more files, or another."""
    only = only_file(path, key)
    held = None if only is None else read_splits(only[0], chosen, key)
    if only is None or held is None:
        return None
    unread = [f"not read: {listing(only[1])}"] if only[1] else []
    return {split: [table] for split, table in held[0].items()}, [*held[1], *unread]


def _remarks(notes: Sequence[str]) -> list[str]:
    """Return what is said of the files of a split: of many it is said once, with their number."""
    return [f"{notes[0]} ({len(notes)} such remarks)"] if len(notes) > 4 else list(notes)


def from_tables(
    name: str,
    tables: Mapping[str, Sequence[Table]],
    config: DataConfig,
    task: Task,
    *,
    key: str,
    notes: Sequence[str] = (),
) -> Dataset:
    """Turn the files of each split, rows of fields, into a dataset.

    Raises:
        UserError: If there is no telling what they are, naming the row.
    """
    if not any(table.rows for table in tables.get("train", ())):
        raise UserError(key, "the train split has no documents", "give more documents")
    files = [table for split in SPLITS for table in tables.get(split, ())]
    said = [
        *notes,
        *(
            note
            for parts in tables.values()
            for note in _remarks([n for part in parts for n in part.notes])
        ),
    ]
    said += _remarks(spell_alike(files))
    shape = recognise(
        [row for parts in tables.values() for table in parts for row in table.rows],
        config.format,
        mapping(config.columns, "data.columns"),
        task,
        key,
        group=config.group_field,
    )
    refuse_other_columns([table for table in files if table.rows], shape, key)
    said.append(shape.say())
    labels = Labels()
    if LABEL in shape.columns:
        tables, more = with_known_labels(tables, shape.columns[LABEL])
        labels = read_labels(
            tables, shape.columns[LABEL], mapping(config.label_map, "data.label_map"), key
        )
        said += [*more, *labels.notes]
    remarks: dict[str, None] = {}
    given = {
        split: list(
            _documents(
                _labelled(parts, labels, split), shape, labels.kept(split), config, key, remarks
            )
        )
        for split, parts in tables.items()
    }
    rules = Rules(config.shared_documents, config.conflicting_labels)
    said = list(dict.fromkeys([*said, *remarks]))
    return assemble(name, given, key=key, labels=labels.names, notes=said, rules=rules)


def _labelled(parts: Sequence[Table], labels: Labels, split: str) -> list[Row]:
    """Return the rows of a split, without those that have no label where labels are read."""
    rows = [row for table in parts for row in table.rows]
    if labels.names is None:
        return rows
    return [
        row for row, label in zip(rows, labels.by_split[split], strict=True) if label is not None
    ]


def _documents(
    rows: Sequence[Row],
    shape: Shape,
    labels: Sequence[int] | None,
    config: DataConfig,
    key: str,
    remarks: dict[str, None],
) -> Iterator[Document]:
    for number, row in enumerate(rows):
        document = document_of(row, shape, key, remarks)
        group = None if config.group_field is None else _group(row, config.group_field)
        yield replace(document, label=None if labels is None else labels[number], group=group)


def _group(row: Row, column: str) -> str | None:
    """Return the source that a row names; one without a value is a source of its own."""
    where, fields = row
    value = value_of(fields, column)
    if value is None and column not in fields and "." not in column:
        there = ", ".join(fields)
        raise UserError(
            "data.group_field", f"{where} has no field {column!r}", f"choose one of {there}"
        )
    return None if is_missing(value) else value_name(value) or None


def class_counts(dataset: Dataset) -> dict[str, Counter[int]]:
    """Return how many documents each class has, by split and index."""
    return {
        split: Counter(
            document.label for document in dataset.splits[split] if document.label is not None
        )
        for split in SPLITS
    }


# --- files that stages name ----------------------------------------------------------------------


def read_rows(path: Path, key: str) -> list[Row]:
    """Return the rows of one file.

    Raises:
        UserError: If the file cannot be read, naming the line.
    """
    return read_table(path, key).rows


def read_documents(
    path: Path, config: DataConfig, task: Task, labels: tuple[str, ...] | None, key: str
) -> list[Document]:
    """Return the documents of one file whose rows are like those of the data.

    Args:
        labels: Class names, where a row must have one of them.
        key: The setting that named the file, for refusals.

    Raises:
        UserError: Naming file and line.
    """
    table = read_table(path, key)
    if not table.rows:
        raise UserError(key, f"{path} has no rows", "give a file with documents")
    shape = recognise(table.rows, config.format, mapping(config.columns, "data.columns"), task, key)
    documents = [document_of(row, shape, key, {}) for row in table.rows]
    if labels is None or LABEL not in shape.columns:
        return documents
    column = shape.columns[LABEL]
    names = [one_label(row, column, table.class_names.get(column), key) for row in table.rows]
    known = mapping(config.label_map, "data.label_map")
    found = [_as_data_has_it(name, known, labels) if name is not None else None for name in names]
    for row, name in zip(table.rows, found, strict=True):
        if name is not None and name not in labels:
            raise UserError(
                key, f"{row[0]} has label {name!r}", f"the data has {shortened(labels)}"
            )
    return [
        replace(document, label=None if name is None else labels.index(name))
        for document, name in zip(documents, found, strict=True)
    ]


def _as_data_has_it(name: str, label_map: Mapping[str, str], labels: Sequence[str]) -> str:
    """Return the class that the label of another file is: as it stands, else by its value (`True`
    and `true`).
    """
    name = label_map.get(name, name)
    alike = [label for label in labels if plainly(label) == plainly(name)]
    return alike[0] if name not in labels and len(alike) == 1 else name
