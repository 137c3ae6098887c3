"""Documents from local files, by one door: `data.path`, a folder given as `data.hub`, and files that stages name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config import DataConfig, Task
from pipeline.data.cells import Row, Table, is_missing, refuse_half_characters, value_of
from pipeline.data.documents import SPLITS, Dataset, Document
from pipeline.data.folders import find_files
from pipeline.data.formats import read_table
from pipeline.data.labels import check_classes, class_name, is_hidden, ordered, renamed, shortened
from pipeline.data.mappings import mapping, split_names
from pipeline.data.rows import document_of
from pipeline.data.shapes import Shape, recognise
from pipeline.data.splits import Rules, assemble
from pipeline.errors import UserError

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
    found = find_files(path, config.subset, split_names(config), key)
    tables = {split: [read_table(file, key) for file in files] for split, files in found.files.items()}
    joined = {split: _joined(parts) for split, parts in tables.items()}
    return from_tables(path.name, joined, config, task, key=key, notes=found.notes)


def _joined(parts: Sequence[Table]) -> Table:
    """Return the rows of several files; what is said of many files is said once, with their number."""
    notes = [note for part in parts for note in part.notes]
    if len(notes) > 4:
        notes = [f"{notes[0]} ({len(notes)} such remarks)"]
    names = parts[0].class_names
    declared = {
        name: classes for name, classes in names.items() if all(part.class_names.get(name) == classes for part in parts)
    }
    return Table([row for part in parts for row in part.rows], notes, declared)


def from_tables(
    name: str, tables: Mapping[str, Table], config: DataConfig, task: Task, *, key: str, notes: Sequence[str] = ()
) -> Dataset:
    """Turn rows of fields, by split, into a dataset.

    Raises:
        UserError: If there is no telling what they are, naming the row.
    """
    if "train" not in tables or not tables["train"].rows:
        raise UserError(key, "the train split has no documents", "give more documents")
    shape = recognise(
        [row for table in tables.values() for row in table.rows],
        config.format,
        mapping(config.columns, "data.columns"),
        task,
        key,
        group=config.group_field,
    )
    said = [*notes, *(note for table in tables.values() for note in table.notes), shape.say()]
    rows = {split: table.rows for split, table in tables.items()}
    labels = _Labels.none()
    if LABEL in shape.columns:
        rows, more = _with_known_labels(rows, shape, tables["train"].class_names)
        labels = _read_labels(rows, shape, tables["train"].class_names, config, key)
        rows = {
            split: [row for row, label in zip(rows[split], labels.by_split[split], strict=True) if label is not None]
            for split in rows
        }
        said += [*more, *labels.notes]
    told: dict[str, None] = {}
    given = {
        split: list(_documents(part, shape, labels.kept(split), config, key, told)) for split, part in rows.items()
    }
    rules = Rules(config.shared_documents, config.conflicting_labels)
    return assemble(name, given, key=key, labels=labels.names, notes=[*said, *told], rules=rules)


def _documents(
    rows: Sequence[Row], shape: Shape, labels: Sequence[int] | None, config: DataConfig, key: str, told: dict[str, None]
) -> Iterator[Document]:
    for number, row in enumerate(rows):
        document = document_of(row, shape, key, told)
        group = None if config.group_field is None else _group(row, config.group_field)
        yield replace(document, label=None if labels is None else labels[number], group=group)


def _group(row: Row, column: str) -> str | None:
    """Return the source that a row names; one without a value is a source of its own."""
    where, fields = row
    value = value_of(fields, column)
    if value is None and column not in fields and "." not in column:
        there = ", ".join(fields)
        raise UserError("data.group_field", f"{where} has no field {column!r}", f"choose one of {there}")
    return None if is_missing(value) or not str(value).strip() else str(value)


# --- labels -----------------------------------------------------------------------------------------------------------


class _Labels:
    """Class names, and the class index of each row; None for a row without a label."""

    def __init__(
        self, names: tuple[str, ...] | None, by_split: Mapping[str, list[int | None]], notes: Sequence[str]
    ) -> None:
        self.names, self.by_split, self.notes = names, by_split, notes

    @classmethod
    def none(cls) -> _Labels:
        return cls(None, {}, ())

    def kept(self, split: str) -> list[int] | None:
        """Return the indices of the rows of a split that have one."""
        return None if self.names is None else [label for label in self.by_split[split] if label is not None]


def _with_known_labels(
    rows: Mapping[str, Sequence[Row]], shape: Shape, declared: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, list[Row]], list[str]]:
    """Leave out splits whose labels are hidden: public test splits have -1, nothing, or no column in their place."""
    column = shape.columns[LABEL]
    cells = {split: [value_of(fields, column) for _, fields in part] for split, part in rows.items()}
    is_class = column not in declared and any(str(cell).strip() == "-1" for cell in cells["train"])
    kept: dict[str, list[Row]] = {}
    notes: list[str] = []
    for split, part in rows.items():
        hides = all(is_hidden(cell) and not (is_class and cell is not None) for cell in cells[split])
        if split != "train" and part and hides:
            notes.append(f"{split} is not read: its {len(part)} rows have no labels")
        else:
            kept[split] = list(part)
    return kept, notes


def _read_labels(
    rows: Mapping[str, Sequence[Row]],
    shape: Shape,
    declared: Mapping[str, tuple[str, ...]],
    config: DataConfig,
    key: str,
) -> _Labels:
    column = shape.columns[LABEL]
    classes = declared.get(column)
    found: dict[str, list[str | None]] = {
        split: [_one_label(row, column, classes, key) for row in part] for split, part in rows.items()
    }
    there = {name for part in found.values() for name in part if name is not None}
    names = list(classes) if classes is not None else ordered(there)
    goes_by = renamed(names, mapping(config.label_map, "data.label_map"))
    labels = tuple(dict.fromkeys(goes_by[name] for name in names))
    in_train = {goes_by[name] for name in found["train"] if name is not None}
    if len(in_train) == 1:
        check_classes(list(in_train), 0, key)
    check_classes(labels, len(found["train"]), key)
    index = {name: labels.index(goes_by[name]) for name in names}
    notes = [
        f"{split}: dropped {part.count(None)} documents without a label (-1)"
        for split, part in found.items()
        if None in part
    ]
    trimmed = sum(
        isinstance(cell := value_of(fields, column), str) and cell != cell.strip()
        for part in rows.values()
        for _, fields in part
    )
    notes += [f"{trimmed} labels had blanks around them, which are no part of a class"] if trimmed else []
    if len(labels) < len(names):
        notes.append(f"data.label_map makes {len(labels)} classes of {len(names)} ({shortened(names)})")
    by_split = {split: [None if name is None else index[name] for name in part] for split, part in found.items()}
    return _Labels(labels, by_split, notes)


def _one_label(row: Row, column: str, classes: tuple[str, ...] | None, key: str) -> str | None:
    """Return the name of a row's class; None where a file that declares its classes says that there is none."""
    where, fields = row
    value = value_of(fields, column)
    if value is None and column not in fields:
        others = ", ".join(fields)
        remedy = f"give a label to each, or choose one of {others} with data.columns={{label: NAME}}"
        raise UserError(key, f"{where} has no field {column!r}", remedy)
    refuse_half_characters(where, value, key)
    if classes is None or not isinstance(value, int) or isinstance(value, bool):
        return class_name(where, value, key)
    if value == -1:
        return None
    if not 0 <= value < len(classes):
        raise UserError(key, f"{where} has label {value}, and {len(classes)} classes are declared", "mend that row")
    return classes[value]


def class_counts(dataset: Dataset) -> dict[str, Counter[int]]:
    """Return how many documents each class has, by split and index."""
    return {
        split: Counter(document.label for document in dataset.splits[split] if document.label is not None)
        for split in SPLITS
    }


# --- files that stages name -----------------------------------------------------------------------------


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
    names = [
        _one_label(row, shape.columns[LABEL], table.class_names.get(shape.columns[LABEL]), key) for row in table.rows
    ]
    known = mapping(config.label_map, "data.label_map")
    found = [known.get(name, name) if name is not None else None for name in names]
    for row, name in zip(table.rows, found, strict=True):
        if name is not None and name not in labels:
            raise UserError(key, f"{row[0]} has label {name!r}", f"the data has {shortened(labels)}")
    return [
        replace(document, label=None if name is None else labels.index(name))
        for document, name in zip(documents, found, strict=True)
    ]
