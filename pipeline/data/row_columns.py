"""The columns of rows: their names, and what their cells hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.data.cells import FILE, Row, first_text, is_missing, value_of
from pipeline.data.chats import COLUMNS as CHAT_COLUMNS
from pipeline.data.chats import is_conversation

ABOUT = frozenset(
    (
        "id",
        "idx",
        "index",
        "uid",
        "guid",
        "uuid",
        "key",
        "hash",
        "url",
        "link",
        "source",
        "date",
        "time",
        "timestamp",
        "lang",
        "language",
        "license",
        "split",
        "author",
        "user",
        "username",
        "name",
        "file",
        "filename",
        "path",
        "meta",
        "metadata",
        "dataset",
        "subset",
        "model",
        "version",
    )
)
"""Columns that say something about a text and are none."""
LOOKED_AT = 200  # rows that tell what a column holds


def plain_name(column: str) -> str:
    """Return a column's name as the lists of names have it: `Sentence 1` and `sentence_1` are
    `sentence1`.
    """
    return re.sub(r"[^a-z0-9]", "", column.lower())


@dataclass(slots=True)
class Columns:
    """The columns of some rows, in order, with what they hold.

    Attributes:
        rows: The first ones, which tell what is what.
        names: Columns of all rows.
        every: All rows: what is suggested must hold for each.
    """

    rows: Sequence[Row]
    names: list[str] = field(default_factory=list)
    every: Sequence[Row] = ()

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Columns:
        # all rows have few kinds of columns
        kinds = dict.fromkeys(tuple(fields) for _, fields in rows)
        names = list(dict.fromkeys(name for names in kinds for name in names))
        # A text file has one column.
        return cls(rows[:LOOKED_AT], names[:1] if names == ["text", FILE] else names, rows)

    def without(self, taken: Iterable[str]) -> Columns:
        """Return the columns that have no part yet; of a taken path (`meta.body`), its column is
        taken too.
        """
        roots = {root_of(path, self.names) for path in taken}
        return replace(self, names=[name for name in self.names if name not in roots])

    def readable(self) -> Columns:
        """Return the columns but for those of objects alone, which are read by a path into them."""
        return replace(self, names=[name for name in self.names if not self._holds_objects(name)])

    def _holds_objects(self, name: str) -> bool:
        held = self.values(name)
        return bool(held) and all(
            isinstance(value, dict) and first_text(value) is None for value in held
        )

    def find(self, *plain: str) -> str | None:
        """Return the first column that goes by one of some plain names."""
        by_name = {plain_name(name): name for name in reversed(self.names)}
        return next((by_name[name] for name in plain if name in by_name), None)

    def values(self, path: str) -> list[Any]:
        found = (value_of(fields, path) for _, fields in self.rows)
        return [value for value in found if not is_missing(value)]

    def paths(self) -> list[str]:
        """Return every column, or where it has objects the paths to what is in them
        (`meta.body`).
        """
        return [path for name in self.names for path in self.within(name) if name != FILE]

    def within(self, path: str) -> Iterator[str]:
        """Yield the paths to what a column or a path holds: itself, or what is in its objects."""
        inside = dict.fromkeys(
            key for value in self.values(path) if isinstance(value, dict) for key in value
        )
        # else no path leads there
        keys = [key for key in inside if isinstance(key, str) and key and "." not in key]
        if not keys:
            yield path
        for key in keys:
            yield from self.within(f"{path}.{key}")

    def conversations(self) -> list[str]:
        return [
            name
            for name in self.names
            if plain_name(name) in CHAT_COLUMNS and any(map(is_conversation, self.values(name)))
        ]

    def texts(self, *, without: Iterable[str | None]) -> list[str]:
        """Return the columns that hold texts: several words, or where none does, words."""
        return self.wordiest(
            name
            for name in self.names
            if name not in without and not is_about(name) and any(map(_is_words, self.values(name)))
        )

    def hides_text(self, name: str) -> bool:
        """Whether a column holds conversations, or texts inside its objects, and is not about a
        text.
        """
        held = [] if is_about(name) else self.values(name)
        if any(map(is_conversation, held)):
            return True
        inside = [path for path in self.within(name) if path != name and not is_about(path)]
        return any(
            " " in value.strip()
            for path in inside
            for value in self.values(path)
            if _is_words(value)
        )

    def wordiest(self, paths: Iterable[str]) -> list[str]:
        """Return those of some paths that hold several words, or where none does, all."""
        held = list(paths)
        several = [
            path for path in held if any(" " in str(value).strip() for value in self.values(path))
        ]
        return several or held

    def are_texts(self, path: str) -> bool:
        """Whether every row has a text there, and some row words."""
        cells = [value_of(fields, path) for _, fields in self.every]
        return all(isinstance(cell, str) for cell in cells) and any(map(_is_words, cells))


def root_of(path: str, names: Iterable[str]) -> str:
    """Return the column that a path leads into: itself, where a column has its name."""
    return path if path in names else path.split(".")[0]


def is_about(path: str) -> bool:
    """Whether a column or path says something about a text (`ABOUT`)."""
    return plain_name(path.rpartition(".")[2]) in ABOUT


def unread(columns: Columns, read: Iterable[str | None]) -> tuple[str, ...]:
    """Return the columns that nothing reads; of one that is read in part, the paths to the rest."""
    paths = [path for path in read if path is not None]
    inside = [path for path in paths if path not in columns.names]
    found: list[str] = []
    for name in columns.names:
        if name in paths:
            continue
        if not any(path.startswith(f"{name}.") for path in inside):
            found.append(name)
            continue
        for path in columns.within(name):
            if not any(path == each or path.startswith(f"{each}.") for each in inside):
                found.append(path)
    return tuple(found)


def _is_words(value: Any) -> bool:
    return isinstance(value, str) and any(character.isalpha() for character in value)


def mapped_as(parts: Mapping[str, str]) -> str:
    """Return `data.columns` as a command line would set it, names quoted where Hydra and YAML need
    it.
    """
    return (
        f"data.columns={{{', '.join(f'{role}: {_quoted(name)}' for role, name in parts.items())}}}"
    )


def _quoted(name: str) -> str:
    is_plain = re.fullmatch(r"[A-Za-z_]([\w ./-]*[\w./-])?", name, re.ASCII) is not None
    # Hydra reads these as no text
    is_value = name.lower() in ("null", "true", "false", "inf", "nan")
    if is_plain and not is_value:
        return name
    escaped = name.replace('"', '\\"')  # Hydra takes every other character as it is
    return f'"{escaped}"'
