"""Columns of the files of one data set: one spelling of a name, and one column for a part.

Each file is written by its own program: `Label` of one is `label` of another. A column that only
some files have must not be taken for absent in the others where it stands there under another name.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.cells import Table, value_of
from pipeline.data.row_columns import plain_name
from pipeline.data.shapes import CONTEXTS, LABELS, SYSTEMS, Shape
from pipeline.errors import UserError

PLURAL = {"labels": "label"}  # the one column of a known name that has two
ELSEWHERE = {
    "label": ("label", "labels", *LABELS),
    "system": SYSTEMS,
    "context": CONTEXTS,
    "input": ("input", *CONTEXTS),
    "tools": ("tools", "functions"),
}
"""Parts that a row may lack, and what their columns are called."""


def spell_alike(tables: Sequence[Table]) -> list[str]:
    """Give columns whose names differ in letter case, blanks and `_` the name that the first file
    has; return notes.
    """
    notes: list[str] = []
    first: dict[str, str] = {}
    seen: set[str] = set()
    for table in tables:
        columns = table.columns()
        renamed = _renamed(columns, first, seen)
        if renamed:
            _rename(table, renamed)
            said = ", ".join(f"{old!r} is read as {new!r}" for old, new in renamed.items())
            notes.append(f"{table.name}: column {said}")
        for name in columns:
            new = renamed.get(name, name)
            seen.add(new)
            first.setdefault(_known_as(new), new)
    return notes


def _known_as(name: str) -> str:
    plain = plain_name(name) if name.isascii() else ""
    return PLURAL.get(plain, plain) or name


def _renamed(columns: Sequence[str], first: dict[str, str], seen: set[str]) -> dict[str, str]:
    """Return new names of columns; none where two of a file would get one name."""
    found = {
        name: first[_known_as(name)]
        for name in columns
        if name not in seen and first.get(_known_as(name), name) not in (name, *columns)
    }
    return {old: new for old, new in found.items() if list(found.values()).count(new) == 1}


def _rename(table: Table, names: dict[str, str]) -> None:
    table.rows = [
        (where, {names.get(name, name): cell for name, cell in row.items()})
        for where, row in table.rows
    ]
    table.class_names = {
        names.get(name, name): classes for name, classes in table.class_names.items()
    }


def refuse_other_columns(tables: Sequence[Table], shape: Shape, key: str) -> None:
    """Refuse a file that has a part in another column than the files before it: the part would pass
    for absent.

    Raises:
        UserError: Naming both columns.
    """
    columns = [table.columns() for table in tables]
    for role, known in ELSEWHERE.items():
        column = shape.columns.get(role)
        if column is None:
            continue
        has = [_has(table, names, column) for table, names in zip(tables, columns, strict=True)]
        taken = {name for names, there in zip(columns, has, strict=True) if there for name in names}
        taken |= set(shape.columns.values())
        for table, names, there in zip(tables, columns, has, strict=True):
            other = next(
                (name for name in names if plain_name(name) in known and name not in taken), None
            )
            if not there and other is not None:
                problem = (
                    f"{tables[has.index(True)].name} has the {role} in {column!r}, and {table.name}"
                    f" in {other!r}"
                )
                raise UserError(key, problem, "give both columns one name")


def _has(table: Table, columns: Sequence[str], column: str) -> bool:
    return column in columns or any(
        value_of(fields, column) is not None for _, fields in table.rows
    )
