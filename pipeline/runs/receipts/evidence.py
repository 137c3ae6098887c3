"""What a run keeps in its own folder so that its figures can be made again there: per-document
values, and what comparisons rest on. The store may be gone, or on another machine.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from pipeline.ledger.shapes import ComparisonBasis, Row
from pipeline.store.artifacts import write_json

FOLDER = "evidence"
COMPARED = "compared.json"


def keep_evidence(folder: Path, rows: Iterable[Row], basis: ComparisonBasis) -> None:
    """Write it below a run's folder.

    Args:
        rows: Of the result.
        basis: Of its comparisons.

    Raises:
        OSError: If a file is gone, or cannot be written.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    for items in items_of_rows(rows):
        _bring(items, place / items.name)
    write_json(place / COMPARED, basis)


def items_of_rows(rows: Iterable[Row]) -> list[Path]:
    """Return the files of per-document values that rows name, each once."""
    named = (figure["items"] for row in rows for figure in row["quality"].values())
    return [Path(each) for each in dict.fromkeys(named) if each is not None]


def _bring(source: Path, target: Path) -> None:
    """Link a file, which is replaced and never rewritten; copy it where it lies on another disk."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
