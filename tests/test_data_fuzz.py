"""Damaged files of every format: a dataset, or a refusal of one line; never another exception."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
from data_layouts import COMPRESSIONS, FORMATS, LABELLED_CELLS, ROW_CELLS, numbered

from pipeline.config.settings.data import DataConfig
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

PIECES = (
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\n",
    b"\0",
    b"\xff",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"\\ud800",
    b"\t",
    b";",
    b":",
    b'""',
    b"role",
    b"text",
    b"label",
    b"true",
    b"\r",
    b" ",
    b"9" * 50,
)
ROWS = [
    [numbered(row, n, n % 3) for n in range(8)]
    for _, row in (*ROW_CELLS.values(), *LABELLED_CELLS.values())
]

FLAT = [rows for rows in ROWS if all(isinstance(value, str | int) for value in rows[0].values())]
"""Rows that every format can hold."""


def damaged(raw: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 5)):
        at, length = rng.randrange(len(raw) + 1), rng.randint(0, 12)
        raw = (
            raw[:at]
            + rng.choice((rng.choice(PIECES), b"", bytes([rng.randrange(256)])))
            + raw[at + length :]
        )
    return raw[: rng.randrange(len(raw))] if raw and rng.random() < 0.05 else raw


@pytest.mark.parametrize("ending", [ending for ending in FORMATS if ending != ".txt"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, ending: str) -> None:
    rng = random.Random(ending)
    for number in range(40):
        packed = rng.choice(("", "", "", *COMPRESSIONS))
        rows = rng.choice(ROWS if ending.startswith((".json", ".ndjson")) else FLAT)
        if ending == ".label":
            rows = rng.choice([rows for rows in FLAT if {"text", "label"} <= rows[0].keys()])
        raw = FORMATS[ending](rows)
        raw = COMPRESSIONS[packed](damaged(raw, rng))
        path = tmp_path / f"{number}{ending}{packed}"
        path.write_bytes(damaged(raw, rng) if packed and rng.random() < 0.3 else raw)
        for task in Task:
            with contextlib.suppress(UserError):  # which is a line, whatever is in it
                load_dataset(DataConfig(path=str(path)), task)
