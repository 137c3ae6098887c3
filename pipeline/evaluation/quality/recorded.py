"""What per-document values were read on: a note beside them, and values that another evaluation
recorded.

Beside `NAME.jsonl` lies `NAME.about.json`: `data` (digest of the data), `split`, `evaluation` (a
digest of how it was read) and `artifact` (whose values they are). Two sets of values are compared
only where the first three are equal.
"""

from __future__ import annotations

import json
import math
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.compare.clustered import GROUP, group_codes, num_groups
from pipeline.config.settings.quality import QualityConfig
from pipeline.config.text_files import read_bytes, read_text_file
from pipeline.errors import UserError, one_line
from pipeline.evaluation.quality.assess import Arrays, entries_of, figures_of
from pipeline.ledger.metrics import PRIMARY
from pipeline.ledger.shapes import ItemsNote, Quality, QualityFigure
from pipeline.ledger.values import null
from pipeline.store.artifacts import read_json, write_json
from pipeline.tasks.table import Task

MAX_ITEMS = 2**31  # bytes of a file of per-document values
IDENTITY = ("data", "split", "evaluation")


def about(items: Path) -> Path:
    """Return where the note of per-document values lies."""
    return items.with_name(f"{items.stem}.about.json")


def write_identity(items: Path, **facts: str) -> None:
    """Write the note of per-document values."""
    write_json(about(items), {"schema": 1, **facts})


def read_identity(items: Path) -> ItemsNote | None:
    """Return the note of per-document values; None where data, split or evaluation is missing from
    it.
    """
    note = read_json(about(items))
    return note if _says_all(note) else None


def _says_all(note: Any) -> bool:
    return isinstance(note, dict) and all(isinstance(note.get(key), str) for key in IDENTITY)


def values_digest(items: Path) -> str:
    """Return a digest of per-document values that depends neither on the order of lines nor on how
    JSON is spelt.
    """
    content = read_bytes(items, limit=MAX_ITEMS)
    try:
        rows = [
            json.dumps(json.loads(line), sort_keys=True)
            for line in content.splitlines()
            if line.strip()
        ]
    except (ValueError, RecursionError):  # refused when they are read
        rows = [content.hex()]
    return sha256("\n".join(sorted(rows)).encode()).hexdigest()


def take_recorded(given: Path, path: Path, task: Task, config: QualityConfig, key: str) -> Quality:
    """Take over values that another evaluation recorded; return their figures, as `assess_quality`
    returns its own.

    Args:
        given: The file.
        path: Where it is kept, with the note beside it.
        key: The setting that names it.

    Raises:
        UserError: If the file cannot be read as such values.
    """
    columns = _columns(given, task, key)
    shutil.copyfile(given, path)
    # A note of what lay here before must not vouch for these values.
    about(path).unlink(missing_ok=True)
    if about(given).is_file():
        shutil.copyfile(about(given), about(path))
    known = [name for name in task.kind.recorded if name in columns]
    finite = np.isfinite(np.array([columns[name] for name in known], dtype=np.float64)).all()
    # the values stay, so that a comparison can say what is wrong with them
    if not known or not finite:
        why = "a document's value is not finite" if known else "no column of this task"
        return {
            PRIMARY[task]: {
                **null(why).to_json(),
                "ci": None,
                "n": None,
                "items": str(path) if known else None,
            }
        }
    figures = figures_of(task, columns, resamples=config.bootstrap, seed=0)
    groups = num_groups(group_codes(columns))
    found = entries_of(task, figures, len(columns["digest"]), path, groups)
    lacking: QualityFigure = {
        **null("no column that it is made of").to_json(),
        "ci": None,
        "n": None,
        "items": str(path),
    }
    return {PRIMARY[task]: lacking, **found}


def _columns(path: Path, task: Task, key: str) -> Arrays:
    remedy = f"give JSONL with digest, {', '.join(task.kind.recorded)} for every document"
    text = read_text_file(path, key, remedy, limit=MAX_ITEMS)
    try:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(
            key, f"{path} cannot be read ({str(error).splitlines()[0]})", remedy
        ) from None
    if not rows:
        raise UserError(key, f"{path} holds no documents", remedy)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("digest"), str):
            raise UserError(key, f"{path}, line {number} has no digest", remedy)
        wrong = _why_wrong(row, task)
        if wrong is not None:
            raise UserError(key, f"{path}, line {number}: {wrong}", remedy)
        if set(row) != set(rows[0]):
            raise UserError(key, f"{path}, line {number} has other keys than line 1", remedy)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _why_wrong(row: dict[str, Any], task: Task) -> str | None:
    """Return what no document can read, or None; what is not finite is for the comparison to
    say.
    """
    for name, value in row.items():
        if name == GROUP and value is None:  # a source of its own
            continue
        whole = (
            isinstance(value, int)
            # Integers beyond it are not exact as float64.
            and abs(value) < 2**53
            and (name == "correct" or not isinstance(value, bool))
        )
        numeric = whole or isinstance(value, float)
        if name in task.kind.recorded and not numeric:
            return f"{name} is no number"
        if not isinstance(value, int | float | str):  # a column of lists is none
            return f"{one_line(name, 80)} is neither a number nor a text"
    if not all(math.isfinite(row.get(name, 0)) for name in task.kind.recorded):
        return None
    return task.kind.why_wrong(row)
