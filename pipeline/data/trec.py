"""The question classes of TREC as published: a line is `DESC:manner How did serfdom develop ?`, in
Latin-1.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.data.cells import Row
from pipeline.errors import UserError

LINE = re.compile(r"(?P<coarse>\w+):(?P<fine>\S+)\s+(?P<text>.*\S)\s*")
TEST = "trec_10"  # the name of its test split, which has no word for it


def read_trec(path: Path, text: str, key: str, notes: list[str]) -> list[Row]:
    """Return the rows of a `.label` file: the class before the colon is the label, the finer one
    another column.

    Source: cogcomp.seas.upenn.edu/Data/QA/QC (Li and Roth, 2002).
    """
    notes.append(f"{path.name}: a line is CLASS:finer text, as TREC has it")
    return [
        _row(path, number, line, key)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _row(path: Path, number: int, line: str, key: str) -> Row:
    where = f"{path.name} line {number}"
    found = LINE.fullmatch(line)
    if found is None:
        raise UserError(
            key, f"{where} is not CLASS:finer text, as TREC writes .label files", "mend that line"
        )
    coarse, fine = found["coarse"], found["fine"]
    return where, {"text": found["text"], "label": coarse, "fine_label": f"{coarse}:{fine}"}
