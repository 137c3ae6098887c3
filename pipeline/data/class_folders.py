"""Folders whose sub-folders are classes and whose files are documents: `train/pos/0_9.txt`,
`alt.atheism/49960`.

So aclImdb, the 20 newsgroups and many collections of e-mail are kept. They are read so for
sequence_classification alone, where every other file is a text too: a label has no other place
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from pipeline.data.cells import FILE, Table
from pipeline.data.documents import SPLITS
from pipeline.data.formats import kind_of, read_text
from pipeline.data.split_names import listing, word_or_none
from pipeline.errors import UserError
from pipeline.ledger.numbers import how_many

# folders of documents without a class
UNCLASSED = ("unsup", "unsupervised", "unlabeled", "unlabelled")


@dataclass(slots=True)
class ClassFolders:
    """Files by split and class, relative to `root`, and what a reader must know of the choice."""

    root: Path
    files: dict[str, dict[str, list[PurePath]]]
    notes: list[str] = field(default_factory=list[str])

    def read(self, key: str) -> dict[str, Table]:
        """Return the rows of each split: a document is a whole file, in Latin-1 where it is no
        UTF-8 (said).

        Raises:
            UserError: If a file cannot be read.
        """
        return {
            split: self._table(split, self.files[split], key)
            for split in SPLITS
            if split in self.files
        }

    def _table(self, split: str, classes: Mapping[str, Sequence[PurePath]], key: str) -> Table:
        table = Table([], name=split)
        for label, files in classes.items():
            for file in files:
                text = read_text(self.root / file, key, table.notes, latin=True).strip("\n")
                table.rows.append((str(file), {"text": text, "label": label, FILE: str(file)}))
        return table


def class_folders(
    root: Path,
    data: Sequence[PurePath],
    others: Sequence[PurePath],
    chosen: Mapping[str, str],
    key: str,
) -> ClassFolders | None:
    """Return the classes of a folder; None where it is not of this kind.

    Args:
        data: Its data files, relative to it.
        others: Files of unknown kinds; those without an ending are documents where no class has a
            data file.
        chosen: By split, the sub-folder that is meant (`data.splits`).

    Raises:
        UserError: If a split could be two sub-folders.
    """
    if any(kind_of(Path(file))[0] != "text" for file in data):
        return None
    for files in (data, [file for file in others if not file.suffix]):
        places = _places(files, chosen)
        if places is not None:
            found = _by_split(root, places, chosen, key)
            used = {
                file
                for classes in found.files.values()
                for part in classes.values()
                for file in part
            }
            found.notes += _unread([file for file in [*data, *others] if file not in used])
            return found
    return None


def _places(
    files: Iterable[PurePath], chosen: Mapping[str, str]
) -> dict[PurePath, list[PurePath]] | None:
    """Return files by their class folder; None unless all class folders lie at one level, and make
    two classes.
    """
    by_folder: dict[PurePath, list[PurePath]] = {}
    for file in files:
        by_folder.setdefault(file.parent, []).append(file)
    splits = {
        at
        for folder in by_folder
        for at in (folder, *folder.parents)
        if _split_of(at, chosen) is not None
    }
    if splits:
        below = {folder: part for folder, part in by_folder.items() if splits & set(folder.parents)}
        places = {folder: part for folder, part in below.items() if folder not in splits}
        is_level = all(folder.parent in splits for folder in places)
    else:
        places = {folder: part for folder, part in by_folder.items() if folder.name}
        homes = {folder.parent for folder in places}
        if len(homes) > 1:  # files beside the class folders, one level up, are none of them
            places = {folder: part for folder, part in places.items() if folder not in homes}
        is_level = len({folder.parent for folder in places}) == 1
    classes = {folder.name for folder in places if not _is_unclassed(folder)}
    return places if is_level and len(classes) > 1 else None


def _is_unclassed(folder: PurePath) -> bool:
    return folder.name.lower() in UNCLASSED


def _split_of(folder: PurePath, chosen: Mapping[str, str]) -> str | None:
    """Return which split a folder is: by `data.splits`, else by its name."""
    meant = next(
        (split for split, name in chosen.items() if name in (str(folder), folder.name)), None
    )
    return meant or word_or_none(folder.name)


def _by_split(
    root: Path, places: Mapping[PurePath, list[PurePath]], chosen: Mapping[str, str], key: str
) -> ClassFolders:
    found = ClassFolders(root, {})
    homes: dict[str, PurePath] = {}
    for folder in sorted(places):
        home, split = folder.parent, _split_of(folder.parent, chosen) or "train"
        if split in chosen and chosen[split] not in (str(home), home.name):
            continue
        if homes.setdefault(split, home) != home:
            remedy = f"choose with data.splits={{{split}: {home}}}"
            raise UserError(key, f"{split} could be {homes[split]} or {home}", remedy)
        if not _is_unclassed(folder):
            found.files.setdefault(split, {})[folder.name] = sorted(places[folder])
    absent = next((split for split in chosen if split not in found.files), None)
    if absent is not None:
        have = listing(dict.fromkeys(str(folder.parent) for folder in places))
        raise UserError(
            "data.splits", f"there is no folder {chosen[absent]!r} with classes", f"known: {have}"
        )
    if "train" not in found.files:
        problem = f"{root} has no train folder; it has {listing(map(str, homes.values()))}"
        raise UserError(key, problem, "name one of them train")
    said = ", ".join(
        f"{split} {sum(map(len, found.files[split].values()))}"
        for split in SPLITS
        if split in found.files
    )
    found.notes.append(
        f"a class is a sub-folder and a document is a file, of which there are: {said}"
    )
    return found


def _unread(files: Sequence[PurePath]) -> list[str]:
    """Return a note on what is no document of a class; of a folder without classes its name stands
    for its files.
    """
    counts: dict[PurePath, int] = {}
    for file in files:
        name = file.parent if _is_unclassed(file.parent) else file
        counts[name] = counts.get(name, 0) + 1
    known = set(files)
    names = [
        f"{name} ({how_many(count, 'file')} without a class)" if name not in known else str(name)
        for name, count in sorted(counts.items())
    ]
    return [f"not read: {listing(names)}"] if names else []
