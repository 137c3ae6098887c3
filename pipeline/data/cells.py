"""What readers of files hand on: rows of fields, where each stands, and what was said of the
file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pipeline.errors import UserError

Row = tuple[str, dict[str, Any]]
"""Where a row stands ("train.jsonl line 3") and its fields."""
FILE = "file"  # the column that says which file a text stands in


@dataclass(slots=True)
class Table:
    """The rows of one file.

    Attributes:
        name: What the file is called in notes and refusals.
        notes: What a reader must know of how it was read.
        class_names: Names of classes by column, where the file declares them.
    """

    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    name: str = ""

    def columns(self) -> list[str]:
        """Return the names of its columns, in order."""
        # all rows have few kinds of columns
        kinds = dict.fromkeys(tuple(fields) for _, fields in self.rows)
        return list(dict.fromkeys(name for names in kinds for name in names))


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def refuse_half_characters(where: str, value: Any, key: str) -> None:
    """Refuse text that JSON spelt with one half of a surrogate pair, which is no character and has
    no bytes.

    Args:
        value: A text, or lists and objects with texts in them.

    Raises:
        UserError: Naming the row.
    """
    for text in texts_in(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            _refuse_half(where, text[error.start], key)


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in nested lists and objects, keys included, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from texts_in(name)
            yield from texts_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_in(part)


def _refuse_half(where: str, half: str, key: str) -> NoReturn:
    raise UserError(
        key, f"{where} has half a character (\\u{ord(half):04x})", "write the whole pair"
    )


def value_of(fields: Mapping[str, Any], column: str | None) -> Any:
    """Return a cell by its column, or by a path of names with dots into objects; None where it is
    not there.
    """
    if column is None:
        return None
    if column in fields:
        return fields[column]
    found: Any = fields
    for name in column.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def first_text(value: Any) -> str | None:
    """Return a text, or the first of several that a cell holds; None where it holds none.

    Several are a list of texts, or the answers of SQuAD: `{"text": [...], "answer_start": [...]}`,
    or a list of such objects with one text each. An empty list is an empty text: a question that
    has no answer.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        texts = value.get("text")
        return first_text(texts) if isinstance(texts, list) else None
    if not isinstance(value, list) or any(
        isinstance(each, dict) and not _is_answer(each) for each in value
    ):
        return None
    texts = [each["text"] if isinstance(each, dict) else each for each in value]
    return next(iter(texts), "") if all(isinstance(each, str) for each in texts) else None


def _is_answer(value: dict[Any, Any]) -> bool:
    """Whether an object is one answer of SQuAD, and no message."""
    return "text" in value and not value.keys() & {"role", "from", "type"}
