"""Rows of Parquet, Arrow and Feather, with the classes that `datasets` declares in a file's
metadata.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.data.cells import Table
from pipeline.errors import UserError


def read_arrow(path: Path, raw: bytes, kind: str, key: str) -> Table:
    import pyarrow as pa

    name = {"parquet": "Parquet", "arrow": "Arrow"}[kind]
    if not raw:
        raise UserError(key, f"{path} is empty", "give a file with documents")
    try:
        table = _arrow_table(pa, raw, kind)
        table.validate(full=True)  # damaged offsets would otherwise be followed
        _refuse_repeated_columns(path, table.column_names, key)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        text = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            key, f"{path.name} cannot be read as {name} ({text})", "write it anew"
        ) from None
    found = [
        (f"{path.name} row {number}", without_absent(fields))
        for number, fields in enumerate(rows, 1)
    ]
    return Table(found, class_names=_class_names(table.schema))


def _arrow_table(pa: Any, raw: bytes, kind: str) -> Any:
    if kind == "parquet":
        import pyarrow.parquet as pq

        return pq.read_table(pa.BufferReader(raw))
    # the file format, compressed or not, and Feather version 1
    if raw.startswith((b"ARROW1", b"FEA1")):
        import pyarrow.feather as feather

        return feather.read_table(pa.BufferReader(raw))
    with pa.ipc.open_stream(pa.BufferReader(raw)) as stream:  # what `datasets` saves
        return stream.read_all()


def _refuse_repeated_columns(path: Path, names: list[str], key: str) -> None:
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise UserError(
            key, f"{path.name} has two columns named {repeated!r}", "rename one, or leave it out"
        )


def without_absent(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose structs have no null fields: Arrow gives every struct of a column the
    fields of all.
    """
    return {
        name: _pruned(value) if isinstance(value, list | dict) else value
        for name, value in fields.items()
    }


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(part) for name, part in value.items() if part is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def _class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """Return the classes that `datasets` keeps in a schema's metadata, by column."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features: dict[str, Any] = info["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {
        name: tuple(map(str, feature["names"]))
        for name, feature in features.items()
        if isinstance(feature, dict)
        and feature.get("_type") == "ClassLabel"
        and feature.get("names")
    }
