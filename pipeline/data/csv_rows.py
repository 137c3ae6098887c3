"""Rows of CSV and TSV, by the standard library: the separator is told by the first rows, and
nothing is skipped.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.cells import Row
from pipeline.errors import UserError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
LOOKED_AT = 50  # rows of a CSV file that a separator must fit
NAME_CHARACTERS, NAME_WORDS = 60, 5  # a longer name of a column is a row of data


def read_csv(
    path: Path, text: str, key: str, notes: list[str], *, expected: str = ","
) -> list[Row]:
    """Return the rows of a file with a header.

    Args:
        notes: Gets what a reader must know of how it was read.
        expected: What separates columns, unless it leaves one column and another separator fits.

    Raises:
        UserError: Naming the line.
    """
    declared = re.match(r"sep=(.)\n", text)  # as Excel writes it for itself
    skipped = 0 if declared is None else 1
    text = text[0 if declared is None else declared.end() :]
    separator = _separator(text, expected) if declared is None else declared.group(1)
    if separator != expected:
        notes.append(
            f"{path.name}: columns are separated by {SEPARATORS.get(separator, repr(separator))}"
        )
    quoting = csv.QUOTE_MINIMAL
    if separator == "\t" and _quotes_are_text(text):
        quoting = csv.QUOTE_NONE
        notes.append(f"{path.name}: quotes are part of the text")
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a field may be a whole document
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, quoting=quoting
    )
    try:
        records = [(reader.line_num + skipped, record) for record in reader if record]
    except csv.Error as error:
        raise UserError(
            key, f"{path.name} line {reader.line_num + skipped}: {error}", "mend that line"
        ) from None
    if not records:
        raise UserError(key, f"{path} is empty", "give a file with documents")
    names = _header(path, records[0][1], key)
    return list(_csv_rows(path, names, records[1:], key))


def _csv_rows(
    path: Path, names: list[str], records: list[tuple[int, list[str]]], key: str
) -> Iterator[Row]:
    for line, cells in records:
        where = f"{path.name} line {line}"
        if len(cells) != len(names):
            raise UserError(
                key, f"{where} has another number of columns than the header", "mend that line"
            )
        yield where, dict(zip(names, cells, strict=True))


def _header(path: Path, cells: list[str], key: str) -> list[str]:
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise UserError(
            key, f"{path.name} has two columns named {repeated!r}", "rename one, or leave it out"
        )
    return names


def is_data(name: str) -> bool:
    """Whether the name of a column reads like a cell of data: the file has no header."""
    return (
        len(name) > NAME_CHARACTERS
        or len(name.split()) >= NAME_WORDS
        or bool(re.fullmatch(r"[-+.\d]+", name))
    )


def _separator(text: str, expected: str) -> str:
    """Return what separates columns: `expected`, unless it leaves one column and another separator
    fits all rows.
    """
    head = text[: 256 * 1024]
    if _columns(head, expected):
        return expected
    found = {other: _columns(head, other) for other in SEPARATORS if other != expected}
    best = max(found, key=lambda other: found[other])
    return best if found[best] else expected


def _columns(head: str, separator: str) -> int:
    """Return how many columns the first rows have alike; 0 where they differ, or are of one
    column.
    """
    counts: list[int] = []
    try:
        for record in csv.reader(io.StringIO(head, newline=""), delimiter=separator):
            if record:
                counts.append(len(record))
            if len(counts) > LOOKED_AT:
                break
    except csv.Error:  # an open quote, or a field as long as the sample
        pass
    if not counts or counts[0] < 2:
        return 0
    # a wrong separator occurs in texts, now and then; the right one is in every row
    alike = sum(count == counts[0] for count in counts[:LOOKED_AT])
    return (
        counts[0] if separator in (",", "\t") or alike >= max(1, len(counts[:LOOKED_AT]) - 1) else 0
    )


def _quotes_are_text(text: str) -> bool:
    """Whether a file of tabs is written without quoting: each line is a row, and some quote is not
    a pair around.
    """
    if '"' not in text:
        return False
    lines = [line.split("\t") for line in text.split("\n") if line]
    if any(len(cells) != len(lines[0]) for cells in lines):
        return False
    quoted = (cell for cells in lines for cell in cells if cell.startswith('"'))
    return not all(re.fullmatch(r'"(?:[^"]|"")*"', cell) for cell in quoted)
