"""Splits: blanks and repeats go, what stands in two splits stays in one, and missing splits are cut
by content.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.settings.data import Conflicting, Shared
from pipeline.data.documents import SPLITS, Dataset, Document
from pipeline.errors import UserError
from pipeline.ledger.numbers import agreed, how_many

Shares = tuple[int, int, int]
"""Of train, validation and test, in per cent."""
DEFAULT_SHARES: Shares = (90, 5, 5)
EMBEDDED_SHARES: Shares = (70, 10, 20)
# what stands in two splits stays in the one that comes first here
KEPT_FIRST = ("test", "validation", "train")


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes of documents that cannot all stay: `data.shared_documents`,
    `data.conflicting_labels`.
    """

    shared: Shared = Shared.drop
    conflicting: Conflicting = Conflicting.drop


def drop_blanks_and_repeats(documents: Iterable[Document]) -> tuple[list[Document], list[str]]:
    """Return documents with content, each content once, and notes on what was dropped.

    A repeat is the same to the character: texts that differ in a blank are two texts to learn.
    """
    kept: dict[str, Document] = {}
    blank = repeated = 0
    for document in documents:
        if document.is_blank:
            blank += 1
        elif document.digest in kept:
            repeated += 1
        else:
            kept[document.digest] = document
    notes = [
        f"dropped {how_many(count, f'{what} document')}"
        for count, what in ((blank, "blank"), (repeated, "repeated"))
        if count
    ]
    return list(kept.values()), notes


def settle_conflicts(
    documents: Sequence[Document], rule: Conflicting, labels: Sequence[str], key: str
) -> tuple[list[Document], list[str]]:
    """Return documents of which none has two labels, and notes; texts that differ in blanks or case
    are alike.

    Raises:
        UserError: If the rule is to refuse them, naming one.
    """
    if not labels:
        return list(documents), []
    given: dict[str, dict[int | None, None]] = {}
    for document in documents:
        given.setdefault(document.likeness, {})[document.label] = None
    torn = {likeness: list(found) for likeness, found in given.items() if len(found) > 1}
    if not torn:
        return list(documents), []
    example = next(document for document in documents if document.likeness in torn)
    names = [labels[label] for label in torn[example.likeness] if label is not None]
    torn_said = how_many(len(torn), "text has two labels:", "texts have two labels, such as")
    shown = f"{torn_said} {_opening(example)!r} ({' and '.join(names)})"
    if rule is Conflicting.refuse:
        raise UserError(key, shown, "keep one of them, or give data.conflicting_labels=drop")
    if rule is Conflicting.drop:
        kept = [document for document in documents if document.likeness not in torn]
        copies = len(documents) - len(kept)
        return kept, [
            f"dropped {how_many(copies, 'document')}: {shown}; data.conflicting_labels=keep_first"
            " keeps the first"
        ]
    kept = [
        each
        for each in documents
        if each.likeness not in torn or each.label == torn[each.likeness][0]
    ]
    dropped = how_many(len(documents) - len(kept), "document")
    return kept, [f"dropped {dropped}: {shown}; the first label counts"]


def split_of(digest: str, shares: Shares) -> str:
    """Return the split that a content digest falls into; documents added later move none."""
    slot = int(digest[:12], 16) % 100
    return "train" if slot < shares[0] else "validation" if slot < shares[0] + shares[1] else "test"


def cut(
    documents: Sequence[Document], shares: Shares, missing: Sequence[str]
) -> dict[str, list[Document]]:
    """Cut the `missing` splits out of `documents`; what falls to a split that is not missing stays
    in train.

    Documents of one group, and those that are alike, stay together. With labels, each class gives
    its share of each split, and train keeps one of every class; the order within a class is that of
    the hashes, so that a document added later moves few.
    """
    units: dict[str, list[Document]] = {}
    for document in documents:
        units.setdefault(_unit(document), []).append(document)
    hashes = {name: _unit_hash(members) for name, members in units.items()}
    if any(document.label is not None for document in documents):
        placed = _stratified(units, hashes, shares, missing)
    else:
        placed = {name: split_of(digest, shares) for name, digest in hashes.items()}
        _fill_empty(placed, hashes, missing)
    parts: dict[str, list[Document]] = {"train": [], **{name: [] for name in missing}}
    for document in documents:
        name = placed[_unit(document)]
        parts[name if name in missing else "train"].append(document)
    return parts


def _unit(document: Document) -> str:
    return f"group {document.group}" if document.group is not None else document.likeness


def _unit_hash(members: Sequence[Document]) -> str:
    if members[0].group is not None:
        return hashlib.sha256(members[0].group.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return min(document.digest for document in members)


def _fill_empty(placed: dict[str, str], hashes: Mapping[str, str], missing: Sequence[str]) -> None:
    """Give a missing split that no hash fell into the unit of the last hash, where there are enough
    for all.
    """
    for split in missing:
        rest = sorted(
            (name for name, at in placed.items() if at not in missing),
            key=lambda name: hashes[name],
        )
        if split not in placed.values() and len(rest) > 1:
            placed[rest[-1]] = split


def _stratified(
    units: Mapping[str, Sequence[Document]],
    hashes: Mapping[str, str],
    shares: Shares,
    missing: Sequence[str],
) -> dict[str, str]:
    """Return the split of each unit: of every class as many documents as its share, by the order of
    the hashes.
    """
    strata: dict[int, list[str]] = {}
    for name, members in units.items():
        counts = Counter(document.label for document in members if document.label is not None)
        most = max(counts.values(), default=0)
        strata.setdefault(
            min((at for at, count in counts.items() if count == most), default=-1), []
        ).append(name)
    for names in strata.values():
        names.sort(key=lambda name: hashes[name])
    placed = dict.fromkeys(units, "train")
    left = strata
    for split in (name for name in KEPT_FIRST if name in missing):
        quotas = _quotas(
            {at: sum(len(units[name]) for name in names) for at, names in strata.items()},
            shares[SPLITS.index(split)],
        )
        left = {at: _take(names, units, quotas[at], split, placed) for at, names in left.items()}
    return placed


def _quotas(sizes: Mapping[int, int], share: int) -> dict[int, int]:
    """Return how many documents each class gives, by largest remainders; in all, the share of all,
    and at least one.
    """
    quotas = {at: size * share // 100 for at, size in sizes.items()}
    wanted = max(1, round(sum(sizes.values()) * share / 100))
    by_remainder = sorted(sizes, key=lambda at: (-(sizes[at] * share % 100), -sizes[at], at))
    for at in by_remainder[: max(0, wanted - sum(quotas.values()))]:
        quotas[at] += 1
    return quotas


def _take(
    names: Sequence[str],
    units: Mapping[str, Sequence[Document]],
    quota: int,
    split: str,
    placed: dict[str, str],
) -> list[str]:
    """Give the first units of a class to a split until its quota is met, but for the last; return
    the others.
    """
    taken = number = 0
    while number < len(names) - 1 and taken < quota:
        placed[names[number]] = split
        taken += len(units[names[number]])
        number += 1
    return list(names[number:])


def assemble(
    name: str,
    given: dict[str, list[Document]],
    *,
    key: str,
    shares: Shares = DEFAULT_SHARES,
    labels: tuple[str, ...] | None = None,
    notes: Iterable[str] = (),
    salt: str = "",
    rules: Rules | None = None,
) -> Dataset:
    """Make a dataset from given splits: clean each, keep what two share in one, cut what is missing
    from train.

    Raises:
        UserError: If a split is empty, or a rule refuses what is there.
    """
    rules = rules or Rules()
    said = list(notes)
    clean: dict[str, list[Document]] = {}
    for split, documents in given.items():
        kept, dropped = settle_conflicts(documents, rules.conflicting, labels or (), key)
        clean[split], more = drop_blanks_and_repeats(kept)
        said += [f"{split}: {note}" for note in (*dropped, *more)]
    if "train" not in clean:
        raise UserError(key, "has no train split", "add one")
    for split in given:
        if not clean[split]:
            raise UserError(
                key,
                f"the {split} split has no documents",
                "give more documents, or leave that split out",
            )
    said += _keep_apart(clean, rules.shared, key)
    missing = [split for split in SPLITS if split not in clean]
    if missing:
        clean |= cut(clean["train"], shares, missing)
        by_what = "content hash" if labels is None else "content hash, each class by its share"
        said.append(f"{' and '.join(missing)} cut from train by {by_what}")
        said += _keep_apart(clean, Shared.drop, key)  # alike, in two groups
    for split in SPLITS:
        if not clean[split]:
            raise UserError(
                key, f"the {split} split has no documents", "give more documents, or that split"
            )
    splits = {split: tuple(clean[split]) for split in SPLITS}
    classes = "" if labels is None else json.dumps(labels)
    return Dataset(name, _digest(name + salt + classes, splits), splits, labels, tuple(said))


def _keep_apart(splits: dict[str, list[Document]], rule: Shared, key: str) -> list[str]:
    """Drop from validation and train what stands in test, and from train what stands in validation;
    return notes.

    Documents are shared where they are alike, or where their groups are.

    Raises:
        UserError: If the rule is to refuse them, or none is left in a split.
    """
    if rule is Shared.refuse:
        _refuse_shared(splits, key)
    notes: list[str] = []
    order = [split for split in KEPT_FIRST if split in splits]
    for place, split in enumerate(order):
        for first in order[:place]:
            notes += _drop_shared(splits, split, first, key)
    return notes


def _drop_shared(splits: dict[str, list[Document]], split: str, first: str, key: str) -> list[str]:
    alike = {document.likeness for document in splits[first]}
    groups = {document.group for document in splits[first]} - {None}
    same_text = [document for document in splits[split] if document.likeness in alike]
    rest = [document for document in splits[split] if document.likeness not in alike]
    same_group = [document for document in rest if document.group in groups]
    kept = [document for document in rest if document.group not in groups]
    notes: list[str] = []
    if same_text:
        dropped = how_many(len(same_text), "document that stands", "documents that stand")
        notes.append(f"{split}: dropped {dropped} in {first} too")
    if same_group:
        count = len({document.group for document in same_group})
        groups_said = how_many(count, "group that stands", "groups that stand")
        notes.append(
            f"{split}: dropped {how_many(len(same_group), 'document')} of {groups_said} in {first}"
            " too"
        )
    if splits[split] and not kept:
        num = len(splits[split])
        every = agreed(num, "the one document", f"all {num} documents")
        problem = f"{every} of {split} {agreed(num, 'stands', 'stand')} in {first} too"
        remedy = (
            "give other documents"
            if split == "train"
            else "leave that split out: it is then cut from train"
        )
        raise UserError(key, problem, remedy)
    splits[split] = kept
    return notes


def _refuse_shared(splits: Mapping[str, Sequence[Document]], key: str) -> None:
    seen: dict[str, tuple[str, int]] = {}
    remedy = "keep it in one split, or give data.shared_documents=drop"
    for split, documents in splits.items():
        for row, document in enumerate(documents, 1):
            other, at = seen.setdefault(document.likeness, (split, row))
            if other != split:
                raise UserError(
                    key,
                    f"document {row} of {split} ({_opening(document)!r}) is document {at} of"
                    f" {other} too",
                    remedy,
                )
    groups: dict[str, str] = {}
    for split, documents in splits.items():
        for document in documents:
            if document.group is not None and groups.setdefault(document.group, split) != split:
                raise UserError(
                    key,
                    f"group {document.group!r} of {split} is in {groups[document.group]} too",
                    remedy,
                )


def _opening(document: Document) -> str:
    return " ".join((document.text or str(document.messages)).split())[:40]


def _digest(salt: str, splits: dict[str, tuple[Document, ...]]) -> str:
    whole = hashlib.sha256(salt.encode())
    for split, documents in splits.items():
        for document in documents:
            grouped = [] if document.group is None else [document.group]
            whole.update(json.dumps([split, document.digest, document.label, *grouped]).encode())
    return whole.hexdigest()[:32]
