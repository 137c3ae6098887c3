"""Rows of JSON and JSON lines, by the standard library, which can name a line; a repeated key is
refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.data.cells import Row
from pipeline.data.split_names import word_or_none
from pipeline.errors import UserError


class _Repeated(ValueError):
    """An object has a key twice."""


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _Repeated(f"the key {name!r} stands twice in one object")
    return fields


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_repeats)


def read_json_lines(path: Path, text: str, key: str, notes: list[str]) -> list[Row]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    whole = _whole_json(text, lines[0][1])
    if whole is not None:
        notes.append(f"{path.name} is one JSON document, not a line each")
        return _rows_in(path, whole, key)
    return [_json_line(path, number, line, key) for number, line in lines]


def _json_line(path: Path, number: int, line: str, key: str) -> Row:
    where = f"{path.name} line {number}"
    try:
        fields = _loads(line)
    except _Repeated as error:
        raise UserError(key, f"{where}: {error}", "keep one of them") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting as deep
        problem = getattr(error, "msg", str(error))
        raise UserError(key, f"{where} is not JSON ({problem})", "mend that line") from None
    if not isinstance(fields, dict):
        raise UserError(key, f"{where} is not an object", 'write {"text": ...} on each line')
    return where, fields


def _whole_json(text: str, first: str) -> Any:
    """Return what a file of JSON lines holds where it is one array, or one object over several
    lines; else None.
    """
    if first.lstrip()[:1] not in ("[", "{"):
        return None
    if first.lstrip().startswith("{") and _is_json(first):
        return None
    try:
        value = _loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) or _is_list_of(value, dict) else None


def _is_json(text: str) -> bool:
    try:
        _loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_json(path: Path, text: str, key: str, notes: list[str]) -> list[Row]:
    try:
        value = _loads(text)
    except _Repeated as error:
        raise UserError(
            key, f"{path.name} line {_line_of_repeat(text)}: {error}", "keep one of them"
        ) from None
    except json.JSONDecodeError as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and lines[0].lstrip().startswith("{") and _is_json(lines[0]):
            notes.append(f"{path.name} has a JSON object on each line")
            return read_json_lines(path, text, key, notes)
        raise UserError(
            key, f"{path.name} line {error.lineno} is not JSON ({error.msg})", "mend that line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            key, f"{path.name} is not JSON that can be read ({error})", "mend the file"
        ) from None
    return _rows_in(path, value, key)


def split_rows(
    path: Path, text: str, chosen: Iterable[str], key: str
) -> dict[str, list[Row]] | None:
    """Return the rows by name of an object that holds several splits, `{"train": [...], "test":
    [...]}`; else None.

    Args:
        chosen: Names of splits beside those that name themselves.
    """
    names = {json.loads(name) for name in re.findall(r'("[^"\\\n]{1,80}")\s*:\s*[\[{]', text)}
    if len({name for name in names if word_or_none(name) or name in chosen}) < 2:
        return None  # it need not be parsed twice
    try:
        value = _loads(text)
    except (ValueError, RecursionError):
        return None
    held = (
        {name: part for name, part in value.items() if _holds_rows(part)}
        if isinstance(value, dict)
        else {}
    )
    if len([name for name in held if word_or_none(name) or name in chosen]) < 2:
        return None
    return {
        name: _rows_in(path, part, key, f" {name}") if part else [] for name, part in held.items()
    }


def _holds_rows(part: Any) -> bool:
    """Whether a part of an object is rows: a list of objects, which may be empty, or columns."""
    if isinstance(part, dict):
        return bool(part) and all(isinstance(cells, list) for cells in part.values())
    return part == [] or _is_list_of(part, dict)


def _rows_in(path: Path, value: Any, key: str, part: str = "") -> list[Row]:
    """Return the rows of one JSON document, or of a part: an array, an object with one array of
    rows, or columns.
    """
    remedy = 'write an array of objects, or {"data": [...]}'
    if isinstance(value, dict):
        value = _rows_of_object(path, value, key, remedy)
    if not isinstance(value, list):
        raise UserError(key, f"{path.name} is not an array of rows", remedy)
    for number, fields in enumerate(value, 1):
        if not isinstance(fields, dict):
            raise UserError(
                key,
                f"{path.name}{part} row {number} is not an object",
                'write {"text": ...} for each',
            )
    return [(f"{path.name}{part} row {number}", fields) for number, fields in enumerate(value, 1)]


def _rows_of_object(path: Path, value: dict[str, Any], key: str, remedy: str) -> Any:
    holders = [name for name, part in value.items() if _is_list_of(part, dict)]
    # one row, whose messages these are
    fields = {name for name in holders if _is_chat(value[name])}
    if len(holders) == 1 and not fields:
        return value[holders[0]]
    if "data" in holders:
        return value["data"]
    if len(holders) > 1 and not fields:
        both = " and under ".join(map(repr, holders[:2]))
        raise UserError(key, f"{path.name} has rows under {both}", "write one file for each split")
    lengths = {len(part) if isinstance(part, list) else -1 for part in value.values()}
    if not fields and len(lengths) == 1 and lengths.isdisjoint({-1, 0}):
        names = list(value)
        return [dict(zip(names, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if any(isinstance(part, str) for part in value.values()) or fields:
        return [value]
    raise UserError(key, f"{path.name} has no array of rows", remedy)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _is_chat(value: list[Any]) -> bool:
    return all({"role", "content"} <= set(item) or {"from", "value"} <= set(item) for item in value)


def _line_of_repeat(text: str) -> int:
    """Return the line at which an object has a key for the second time, in text that is JSON
    otherwise.
    """
    seen: list[set[str]] = []
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"(\s*:)?|[{}]', text):
        if token.group() == "{":
            seen.append(set())
        elif token.group() == "}":
            seen.pop()
        elif token.group(1):
            name = json.loads(token.group()[: -len(token.group(1))])
            if name in seen[-1]:
                return text.count("\n", 0, token.start()) + 1
            seen[-1].add(name)
    return 1
