"""Labels of several files to one list of classes: each file's codes by its own declaration, then
joined by name.

A code is a number that stands for a name, which only the file that declares names can tell. Two
files may declare the same names in another order, so that a code is never carried from one
declaration to another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.cells import Row, Table, refuse_half_characters, value_of
from pipeline.data.labels import (
    UNLABELLED,
    check_classes,
    class_name,
    is_hidden,
    ordered,
    plainly,
    renamed,
    shortened,
)
from pipeline.errors import UserError
from pipeline.ledger.numbers import how_many

CODE = re.compile(r"-?(0|[1-9]\d{0,30})")


@dataclass(frozen=True, slots=True)
class Labels:
    """Class names, and the class index of each row by split; None for a row without a label."""

    names: tuple[str, ...] | None = None
    by_split: Mapping[str, list[int | None]] = field(default_factory=dict[str, list[int | None]])
    notes: Sequence[str] = ()

    def kept(self, split: str) -> list[int] | None:
        """Return the indices of the rows of a split that have one."""
        return (
            None
            if self.names is None
            else [label for label in self.by_split[split] if label is not None]
        )


@dataclass(slots=True)
class _File:
    """The labels of one file: by row the name of its class, None without one; which names no text
    spelt.
    """

    table: Table
    declared: tuple[str, ...] | None
    labels: list[str | None]
    typed: set[str]

    def there(self) -> dict[str, None]:
        return dict.fromkeys(
            [*(self.declared or ()), *(name for name in self.labels if name is not None)]
        )

    def row_of(self, name: str) -> str:
        return self.table.rows[self.labels.index(name)][0]


def with_known_labels(
    tables: Mapping[str, Sequence[Table]], column: str
) -> tuple[dict[str, Sequence[Table]], list[str]]:
    """Leave out splits whose labels are hidden: public test splits have -1, nothing, or no column
    in their place.
    """
    is_class = any(
        str(cell).strip() == "-1"
        for table in tables["train"]
        if column not in table.class_names
        for cell in _cells(table, column)
    )
    kept: dict[str, Sequence[Table]] = {}
    notes: list[str] = []
    for split, parts in tables.items():
        count = sum(len(table.rows) for table in parts)
        if (
            split != "train"
            and count
            and all(_hides(table, column, is_class=is_class) for table in parts)
        ):
            notes.append(
                f"{split} is not read: its"
                f" {how_many(count, 'row has no label', 'rows have no labels')}"
            )
        else:
            kept[split] = parts
    return kept, notes


def _hides(table: Table, column: str, *, is_class: bool) -> bool:
    shown = is_class and column not in table.class_names
    return all(
        is_hidden(cell) and not (shown and cell is not None) for cell in _cells(table, column)
    )


def _cells(table: Table, column: str) -> list[Any]:
    return [value_of(fields, column) for _, fields in table.rows]


def read_labels(
    tables: Mapping[str, Sequence[Table]], column: str, label_map: Mapping[str, str], key: str
) -> Labels:
    """Return the classes of all files and the class of each row.

    Args:
        tables: The files of each split.
        label_map: `data.label_map`.

    Raises:
        UserError: If a row has no label, or names of files cannot be joined.
    """
    by_split = {
        split: [_file(table, column, key) for table in parts] for split, parts in tables.items()
    }
    files = [each for parts in by_split.values() for each in parts]
    notes = [*_spell_alike(files), *_read_codes(files, by_split["train"], key)]
    names = _all_names(files)
    goes_by = renamed(names, label_map)
    labels = tuple(dict.fromkeys(goes_by[name] for name in names))
    found = {
        split: [name for each in parts for name in each.labels] for split, parts in by_split.items()
    }
    in_train = {goes_by[name] for name in found["train"] if name is not None}
    if len(in_train) == 1:
        check_classes(list(in_train), 0, key)
    check_classes(labels, len(found["train"]), key)
    notes += [
        f"{split}: dropped {how_many(part.count(None), 'document')} without a label (-1)"
        for split, part in found.items()
        if None in part
    ]
    notes += _trimmed(files, column)
    if len(labels) < len(names):
        notes.append(
            f"data.label_map makes {how_many(len(labels), 'class', 'classes')} of {len(names)}"
            f" ({shortened(names)})"
        )
    index = {name: labels.index(goes_by[name]) for name in names}
    return Labels(
        labels,
        {
            split: [None if name is None else index[name] for name in part]
            for split, part in found.items()
        },
        notes,
    )


def _file(table: Table, column: str, key: str) -> _File:
    declared = table.class_names.get(column)
    labels = [one_label(row, column, declared, key) for row in table.rows]
    cells = _cells(table, column)
    pairs = zip(labels, cells, strict=True)
    typed = {
        name
        for name, cell in pairs
        if name is not None and declared is None and not isinstance(cell, str)
    }
    return _File(table, declared, labels, typed)


def one_label(row: Row, column: str, classes: tuple[str, ...] | None, key: str) -> str | None:
    """Return the name of a row's class; None where a file that declares its classes says that there
    is none.

    Raises:
        UserError: If it has no label, or a code that is not declared, naming the row.
    """
    where, fields = row
    value = value_of(fields, column)
    if value is None and column not in fields:
        others = ", ".join(fields)
        remedy = (
            f"give a label to each, or choose one of {others} with data.columns={{label: NAME}}"
        )
        raise UserError(key, f"{where} has no field {column!r}", remedy)
    refuse_half_characters(where, value, key)
    name = class_name(where, value, key)
    if classes is None or isinstance(value, str | bool) or not CODE.fullmatch(name):
        return name
    if int(name) == UNLABELLED:
        return None
    if not 0 <= int(name) < len(classes):
        raise UserError(
            key,
            f"{where} has label {name}, and"
            f" {how_many(len(classes), 'class is', 'classes are')} declared",
            "mend that row",
        )
    return classes[int(name)]


def _trimmed(files: Iterable[_File], column: str) -> list[str]:
    cells = (cell for each in files for cell in _cells(each.table, column))
    count = sum(isinstance(cell, str) and cell != cell.strip() for cell in cells)
    said = how_many(count, "label had blanks around it", "labels had blanks around them")
    return [f"{said}, which are no part of a class"] if count else []


# --- one spelling --------------------------------------------------------------------------------


def _spell_alike(files: Sequence[_File]) -> list[str]:
    """Give a value one name in all files, and return a note: JSON's true is `True` in a CSV file of
    pandas.

    Text that one file spells in two ways has two meanings there, and is left.
    """
    spelt: dict[str, dict[str, None]] = {}
    apart: set[str] = set()
    for each in files:
        for name in each.there():
            spelt.setdefault(plainly(name), {})[name] = None
        texts = Counter(plainly(name) for name in each.there() if name not in each.typed)
        apart |= {plain for plain, count in texts.items() if count > 1}
    one: dict[str, str] = {}
    for plain, names in spelt.items():
        if len(names) > 1 and plain not in apart:
            one |= dict.fromkeys(names, _preferred(names, files))
    for each in files:
        each.labels = [one.get(name, name) if name is not None else None for name in each.labels]
        each.declared = each.declared and tuple(one.get(name, name) for name in each.declared)
    other = {old: new for old, new in one.items() if old != new}
    said = ", ".join(f"{old!r} is {new!r}" for old, new in other.items())
    return [f"a label is one class however its file spells it: {said}"] if said else []


def _preferred(names: Iterable[str], files: Sequence[_File]) -> str:
    """Return the spelling that is declared, else that of a value, else the first one."""
    declared = {name for each in files for name in each.declared or ()}
    typed = {name for each in files for name in each.typed}
    return min(names, key=lambda name: (name not in declared, name not in typed))


# --- codes and names -----------------------------------------------------------------------------


def _read_codes(files: Sequence[_File], train: Sequence[_File], key: str) -> list[str]:
    """Read the codes of files that declare nothing by what the others declare; return notes.

    Raises:
        UserError: If a file has codes that the others declare differently, or a label that train
            does not declare.
    """
    declaring = [each for each in files if each.declared]
    if not declaring:
        return []
    notes = _other_orders(declaring)
    for each in files:
        if each.declared or not any(name is not None for name in each.labels):
            continue
        names = list(each.there())
        meant = _meant(each, names, declaring, key)
        if meant is not None:
            each.labels = [meant[name] if name is not None else None for name in each.labels]
            notes.append(
                f"{each.table.name} has codes: they are read as {declaring[0].table.name} declares"
                " them"
            )
        elif any(other.declared for other in train):
            _refuse_undeclared(each, names, declaring, key)
    return notes


def _meant(
    each: _File, names: Sequence[str], declaring: Sequence[_File], key: str
) -> dict[str, str | None] | None:
    """Return what the codes of a file stand for; None where its labels are names."""
    known = {name for other in declaring for name in other.declared or ()}
    if not all(CODE.fullmatch(plainly(name)) for name in names):
        return None
    codes = {name: int(plainly(name)) for name in names}
    are_names = set(names) <= known
    first = declaring[0].declared or ()
    if any(not UNLABELLED <= code < len(first) for code in codes.values()):
        if are_names:
            return None
        _refuse_undeclared(each, names, declaring, key, most=len(first))
    meant = {name: None if code == UNLABELLED else first[code] for name, code in codes.items()}
    if are_names and all(name == code for name, code in meant.items()):
        return None
    example = next((name for name in names if meant[name] not in (None, name)), None)
    if are_names and example is not None:
        problem = (
            f"{each.row_of(example)}: {example!r} could be that class or the code of"
            f" {meant[example]!r}"
        )
        raise UserError(
            key, problem, "write the names of classes as words, or declare them in that file too"
        )
    for other in declaring:
        theirs = other.declared or ()
        if any(
            code >= len(theirs) or theirs[code] != first[code]
            for code in codes.values()
            if code >= 0
        ):
            problem = (
                f"{each.table.name} has codes, which {declaring[0].table.name} declares as"
                f" {shortened(first)} and {other.table.name} as {shortened(theirs)}"
            )
            raise UserError(key, problem, f"write names in {each.table.name}")
    return meant


def _refuse_undeclared(
    each: _File, names: Sequence[str], declaring: Sequence[_File], key: str, most: int | None = None
) -> None:
    """Refuse a label that no file declares.

    Args:
        most: How many codes are declared, where the labels are codes.
    """
    known = list(dict.fromkeys(name for other in declaring for name in other.declared or ()))
    if most is None:
        odd = next((name for name in names if name not in known), None)
    else:
        odd = next(name for name in names if not UNLABELLED <= int(plainly(name)) < most)
    if odd is not None:
        problem = (
            f"{each.row_of(odd)} has label {odd!r}, and {declaring[0].table.name} declares"
            f" {shortened(known)}"
        )
        raise UserError(key, problem, "give a declared name or its code, or mend the declaration")


def _other_orders(declaring: Sequence[_File]) -> list[str]:
    first = declaring[0]
    other = next((each for each in declaring if each.declared != first.declared), None)
    if other is None:
        return []
    theirs = f"{other.table.name} {shortened(other.declared or ())}"
    return [
        f"{first.table.name} declares {shortened(first.declared or ())}, {theirs}: they are joined"
        " by name"
    ]


def _all_names(files: Sequence[_File]) -> list[str]:
    """Return classes in the order of their declarations; those that none declares after them."""
    declared = dict.fromkeys(name for each in files for name in each.declared or ())
    there = {name for each in files for name in each.labels if name is not None}
    return [*declared, *ordered(there - set(declared))]
