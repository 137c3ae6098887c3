"""Documents from `data.path`: JSONL, CSV, Parquet or text; a file, or a folder with one file per split."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config import DataConfig, Task
from pipeline.data.documents import SPLITS, Dataset, Document
from pipeline.data.splits import assemble
from pipeline.errors import UserError

KEY = "data.path"
SUFFIXES = (".jsonl", ".csv", ".parquet", ".txt")
Row = tuple[str, dict[str, Any]]  # where it stands ("train.jsonl line 3") and its fields


def load_path(config: DataConfig, task: Task) -> Dataset:
    """Load `data.path`.

    Raises:
        UserError: Naming file and line.
    """
    assert config.path is not None
    path = Path(config.path).expanduser()
    files = _split_files(path) if path.is_dir() else {"train": path}
    rows = {split: list(read_rows(file, config.text_field)) for split, file in files.items()}
    return from_rows(path.name, rows, config, task, key=KEY)


def from_rows(name: str, rows: dict[str, list[Row]], config: DataConfig, task: Task, *, key: str) -> Dataset:
    """Turn rows of fields into a dataset; class names come from the labels unless they are numbers."""
    labels = _class_names(rows, config, key) if task is Task.sequence_classification else None
    given = {split: [from_row(row, config, labels, key) for row in part] for split, part in rows.items()}
    return assemble(name, given, key=key, labels=labels)


def _split_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for split in SPLITS:
        found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
        if len(found) > 1:
            raise UserError(KEY, f"{folder} has {found[0].name} and {found[1].name}", "keep one file per split")
        if found:
            files[split] = found[0]
    if "train" not in files:
        raise UserError(KEY, f"{folder} has no train file", f"add train{'|'.join(SUFFIXES)}")
    meant = {*SPLITS, "valid", "val", "dev"}
    stray = [path for path in sorted(folder.iterdir()) if path.stem in meant and path not in files.values()]
    if stray:
        names, endings = ", ".join(SPLITS), ", ".join(SUFFIXES)
        raise UserError(KEY, f"{stray[0]} would not be read", f"name splits {names} and end them {endings}")
    return files


def read_rows(path: Path, text_field: str, key: str = KEY) -> Iterator[Row]:
    """Yield the rows of one file.

    Raises:
        UserError: If the file cannot be read, naming the line.
    """
    if not path.is_file():
        raise UserError(key, f"{path} is not a file", "give a file or a folder of splits")
    if path.suffix == ".parquet":
        yield from _parquet(path, key)
        return
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix not in SUFFIXES:
        raise UserError(key, f"{path.name} has an unknown ending", f"give {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(key, f"{path.name} line {line} is not UTF-8", "save the file as UTF-8") from None
    except OSError as error:
        raise UserError(key, f"{path} cannot be read ({error.strerror})", "check the file") from None
    if not text.strip():
        raise UserError(key, f"{path} is empty", "give a file with documents")
    if path.suffix == ".txt":
        yield from _text(path, text, text_field)
    else:
        yield from readers[path.suffix](path, text, key)


def _jsonl(path: Path, text: str, key: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting as deep
            problem = getattr(error, "msg", str(error))
            raise UserError(key, f"{where} is not JSON ({problem})", "mend that line") from None
        if not isinstance(fields, dict):
            raise UserError(key, f"{where} is not an object", 'write {"text": ...} on each line')
        yield where, fields


def _csv(path: Path, text: str, key: str) -> Iterator[Row]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a field may be a whole document
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in fields or None in fields.values():
                raise UserError(key, f"{where} has another number of columns than the header", "mend that line")
            yield where, dict(fields)
    except csv.Error as error:
        line = reader.reader.line_num  # the DictReader's own lags behind
        raise UserError(key, f"{path.name} line {line}: {error}", "mend that line") from None


def _parquet(path: Path, key: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = str(error).splitlines()[0]
        raise UserError(key, f"{path.name} cannot be read as Parquet ({text})", "write it anew") from None
    for number, fields in enumerate(rows, 1):
        yield f"{path.name} row {number}", fields


def _text(path: Path, text: str, text_field: str) -> Iterator[Row]:
    """Documents are paragraphs where blank lines separate any, else lines."""
    blocks = text.split("\n\n" if "\n\n" in text.strip() else "\n")
    for number, block in enumerate(blocks, 1):
        if block.strip():
            yield f"{path.name} document {number}", {text_field: block.strip("\n")}


def _class_names(rows: dict[str, list[Row]], config: DataConfig, key: str) -> tuple[str, ...]:
    train = {_label(row, config, key) for row in rows["train"]}
    for row in (row for part in rows.values() for row in part):
        label = _label(row, config, key)
        if label not in train:
            problem = f"{row[0]} has label {label!r}, which train does not have"
            raise UserError(key, problem, "give train every label")
    if len(train) == 1:
        raise UserError(key, f"all documents have label {next(iter(train))!r}", "give at least two classes")
    numbers = [label for label in train if isinstance(label, int)]
    if len(numbers) == len(train) and sorted(numbers) != list(range(len(numbers))):
        problem = f"labels run from {min(numbers)} up to {max(numbers)} but there are {len(numbers)}"
        raise UserError(key, problem, "number classes 0, 1, 2, ...")
    return tuple(map(str, sorted(numbers))) if len(numbers) == len(train) else tuple(sorted(map(str, train)))


def _label(row: Row, config: DataConfig, key: str) -> int | str:
    """Return a class number or a class name; CSV has numbers as text."""
    where, fields = row
    if config.label_field not in fields:
        raise UserError(key, f"{where} has no field {config.label_field!r}", _fields_seen(fields, "data.label_field"))
    value = fields[config.label_field]
    if isinstance(value, str) and value.strip():
        return int(value) if value.isdecimal() and len(value) < 10 else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(key, f"{where} has label {value!r}", "give whole numbers or names")
    return value


def _fields_seen(fields: Iterable[str], setting: str) -> str:
    return f"set {setting} to one of {', '.join(map(str, fields))}"


def from_row(row: Row, config: DataConfig, labels: tuple[str, ...] | None, key: str) -> Document:
    """Return the document that a row holds.

    Raises:
        UserError: Naming file and line.
    """
    where, fields = row
    if labels is None and config.messages_field in fields:
        return Document("", messages=_messages(where, fields[config.messages_field], key))
    if config.text_field not in fields:
        raise UserError(key, f"{where} has no field {config.text_field!r}", _fields_seen(fields, "data.text_field"))
    text = fields[config.text_field]
    if not isinstance(text, str):
        raise UserError(key, f"{where}: {config.text_field} is {type(text).__name__}", "give text")
    _refuse_half_characters(where, text, key)
    return Document(text, None if labels is None else labels.index(str(_label(row, config, key))))


def _messages(where: str, raw: Any, key: str) -> tuple[dict[str, Any], ...]:
    good = isinstance(raw, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in raw
    )
    if not good:
        raise UserError(key, f"{where}: messages are not a list of role and content", "write them so")
    turns = tuple(dict(turn) for turn in raw)
    _refuse_half_characters(where, "".join(turn["content"] for turn in turns), key)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(key, f"{where} has no assistant turn", "drop that chat, or add the completion")
    return turns


def _refuse_half_characters(where: str, text: str, key: str) -> None:
    """JSON can spell one half of a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{ord(text[error.start]):04x}"
        raise UserError(key, f"{where} has half a character (\\u{half})", "write the whole pair") from None
