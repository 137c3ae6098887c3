"""Cutting splits by content: blanks and repeats go first, and a document in two splits is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from pipeline.data.documents import SPLITS, Dataset, Document
from pipeline.errors import UserError

DEFAULT_SHARES = (90, 5, 5)  # train, validation, test; per cent
EMBEDDED_SHARES = (70, 10, 20)


def drop_blanks_and_repeats(documents: Iterable[Document]) -> tuple[list[Document], list[str]]:
    """Return documents with content, each content once, and notes on what was dropped."""
    kept: dict[str, Document] = {}
    blank = repeated = 0
    for document in documents:
        if document.is_blank:
            blank += 1
        elif document.digest in kept:
            repeated += 1
        else:
            kept[document.digest] = document
    notes = [f"dropped {count} {what} documents" for count, what in ((blank, "blank"), (repeated, "repeated")) if count]
    return list(kept.values()), notes


def split_of(digest: str, shares: tuple[int, int, int]) -> str:
    """Return the split that a content digest falls into; documents added later move none."""
    slot = int(digest[:12], 16) % 100
    return "train" if slot < shares[0] else "validation" if slot < shares[0] + shares[1] else "test"


def cut(documents: list[Document], shares: tuple[int, int, int], missing: list[str]) -> dict[str, list[Document]]:
    """Cut the `missing` splits out of `documents`; what falls to a split that is not missing stays in train."""
    parts: dict[str, list[Document]] = {"train": [], **{name: [] for name in missing}}
    for document in documents:
        name = split_of(document.digest, shares)
        parts[name if name in missing else "train"].append(document)
    return parts


def assemble(
    name: str,
    given: dict[str, list[Document]],
    *,
    key: str,
    shares: tuple[int, int, int] = DEFAULT_SHARES,
    labels: tuple[str, ...] | None = None,
    notes: Iterable[str] = (),
    salt: str = "",
) -> Dataset:
    """Make a dataset from given splits: clean each, cut what is missing from train, refuse shared documents.

    Raises:
        UserError: If a split is empty or a document stands in two.
    """
    said = list(notes)
    clean: dict[str, list[Document]] = {}
    for split, documents in given.items():
        clean[split], dropped = drop_blanks_and_repeats(documents)
        said += [f"{split}: {note}" for note in dropped]
    if "train" not in clean:
        raise UserError(key, "has no train split", "add one")
    _refuse_shared(clean, key)
    missing = [split for split in SPLITS if split not in clean]
    if missing:
        clean |= cut(clean["train"], shares, missing)
        said.append(f"{' and '.join(missing)} cut from train by content hash")
    for split in SPLITS:
        if not clean[split]:
            raise UserError(key, f"the {split} split has no documents", "give more documents, or that split")
    splits = {split: tuple(clean[split]) for split in SPLITS}
    return Dataset(name, _digest(name + salt, splits), splits, labels, tuple(said))


def _refuse_shared(splits: dict[str, list[Document]], key: str) -> None:
    seen: dict[str, tuple[str, int]] = {}
    for split, documents in splits.items():
        for row, document in enumerate(documents, 1):
            other, at = seen.setdefault(document.digest, (split, row))
            if other != split:
                text = " ".join((document.text or str(document.messages)).split())[:40]
                raise UserError(
                    key, f"document {row} of {split} ({text!r}) is document {at} of {other} too", "keep it in one split"
                )


def _digest(salt: str, splits: dict[str, tuple[Document, ...]]) -> str:
    whole = hashlib.sha256(salt.encode())
    for split, documents in splits.items():
        for document in documents:
            whole.update(json.dumps([split, document.digest, document.label]).encode())
    return whole.hexdigest()[:32]
