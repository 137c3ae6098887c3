"""What splits are called, in files, folders and on the Hub, and which of several named parts is
which split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.documents import SPLITS
from pipeline.errors import UserError

WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "development": "validation",
    "test": "test",
    "testing": "test",
}
"""What splits are called; the same list names files, sub-folders and splits on the Hub."""


@dataclass(slots=True)
class Found:
    """Files by split, and what a reader must know of the choice."""

    files: dict[str, list[Path]]
    notes: list[str] = field(default_factory=list)


def split_word(name: str) -> str | None:
    """Return which split a name speaks of, alone or as a word of it (`sst2-test`, `Train_1`); None
    without one.

    Raises:
        ValueError: If it speaks of two.
    """
    words = {WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in WORDS}
    if len(words) > 1:
        raise ValueError(f"speaks of {' and of '.join(sorted(words))}")
    return next(iter(words), None)


def word_or_none(name: str) -> str | None:
    """Return which split a name speaks of; None where it speaks of none, or of two."""
    try:
        return split_word(name)
    except ValueError:
        return None


def pick_splits(
    found: Mapping[str, Any], chosen: Mapping[str, str], key: str
) -> tuple[dict[str, Any], list[str]]:
    """Return which of several named parts is which split, and notes.

    Args:
        found: By the name that the data has for it ("validation_matched").
        chosen: By split, the name that is meant (`data.splits`).

    Raises:
        UserError: If two could be one split, or none is train.
    """
    unknown = next((name for name in chosen.values() if name not in found), None)
    if unknown is not None:
        raise UserError("data.splits", f"there is no {unknown!r}", f"known: {', '.join(found)}")
    picked = {split: [name] for split, name in chosen.items()}
    for name in found:
        split = word_or_none(name)
        if split is not None and split not in chosen and name not in chosen.values():
            picked.setdefault(split, []).append(name)
    if not picked and len(found) == 1:
        picked = {"train": list(found)}
    for split, names in picked.items():
        if len(names) > 1:
            problem = f"{split} could be {names[0]} or {names[1]}"
            raise UserError(key, problem, f"choose with data.splits={{{split}: {names[0]}}}")
    if "train" not in picked:
        problem = f"has no train split; it has {', '.join(map(str, found))}"
        raise UserError(
            key, problem, f"choose one with data.splits={{train: {next(iter(found), '...')}}}"
        )
    splits = {split: found[picked[split][0]] for split in SPLITS if split in picked}
    used = {names[0] for names in picked.values()}
    notes = [f"{split} is {names[0]}" for split, names in picked.items() if names[0] != split]
    rest = [name for name in found if name not in used]
    return splits, [*notes, *([f"not read: {listing(rest)}"] if rest else [])]


def natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts part-2 before part-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def listing(names: Iterable[str], most: int = 8) -> str:
    """Return names in a line, the first ones of many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
