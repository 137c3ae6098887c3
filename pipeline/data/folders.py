"""Which files of a folder make which split: by name, by sub-folder, by a Hub card, or as `datasets`
saves them.

Every data file is used or named. Two readings of a folder are refused, both named.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.data.cards import card_files, saved_files, subset_folder
from pipeline.data.class_folders import ClassFolders, class_folders
from pipeline.data.documents import SPLITS
from pipeline.data.formats import SHOWN, kind_of, refuse_special, stem_of
from pipeline.data.split_names import Found, listing, natural, split_word, word_or_none
from pipeline.data.trec import TEST as TREC_TEST
from pipeline.errors import UserError
from pipeline.ledger.numbers import agreed, how_many

# and as many sub-folders: aclImdb has 100,000 files, and a link to / has no end
MOST_FILES = 200_000
PAPERS = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|requirements|authors)"
    r"([._-].*)?",
    re.IGNORECASE,
)
RECORDS = re.compile(
    r"(dataset_?infos?|dataset_dict|state|croissant|metadata)\.json", re.IGNORECASE
)
SILENT = frozenset(
    [
        ".md",
        ".rst",
        ".py",
        ".ipynb",
        ".sh",
        ".yaml",
        ".yml",
        ".toml",
        ".cfg",
        ".pdf",
        ".html",
        ".lock",
        ".sha256",
        ".md5",
        ".crc",
        ".log",
    ]
)
SHARD = re.compile(
    r"[-_.]?(?P<at>\d+)[-_]of[-_](?P<count>\d+)(?:[-_][0-9a-f]{8,})?$", re.IGNORECASE
)
# part-00000-<id>.c000.snappy, of Spark
PART = re.compile(r"^(?P<stem>.*?part)[-_.]?\d+.*$", re.IGNORECASE)
NUMBER = re.compile(r"[-_.]?\d+$")


def find_files(path: Path, subset: str | None, chosen: Mapping[str, str], key: str) -> Found:
    """Return the data files below `path`, by split.

    Args:
        subset: A configuration of a Hub card, or a sub-folder.
        chosen: By split, the file, sub-folder or stem that is meant (`data.splits`).
        key: The setting that named `path`, for refusals.

    Raises:
        UserError: If a file could be read in two ways or in none, or is no regular file.
    """
    if not path.is_dir():
        for name, given in (("subset", subset), ("splits", chosen)):
            if given:
                raise UserError(
                    f"data.{name}", f"has no effect on one file ({path.name})", "leave it out"
                )
        refuse_special(path, key)
        return Found({"train": [path]}, _beside(path))
    card = card_files(path, subset, chosen, key)
    if card is not None:
        return _with_unread(card, path, key)
    if subset is not None:
        path = subset_folder(path, subset)
    saved = saved_files(path, chosen, key)
    return _by_name(path, chosen, key) if saved is None else _with_unread(saved, path, key)


def find_class_folders(
    path: Path, subset: str | None, chosen: Mapping[str, str], key: str
) -> ClassFolders | None:
    """Return the files of a folder whose sub-folders are classes; None for a file, and for a folder
    of another kind.

    Raises:
        UserError: If a split could be two of its sub-folders.
    """
    if not path.is_dir() or card_files(path, subset, chosen, key) is not None:
        return None
    folder = path if subset is None else subset_folder(path, subset)
    data, others, aside = _listed(folder, key)
    relative = [each.relative_to(folder) for each in data]
    return class_folders(folder, relative, [Path(name) for name in (*others, *aside)], chosen, key)


def only_file(path: Path, key: str) -> tuple[Path, list[str]] | None:
    """Return the one data file that `path` is, or that a folder has, with what else is there; None
    where it has more.

    Raises:
        UserError: If a file is a link to nothing, or no regular file.
    """
    if not path.is_dir():
        return path, []
    first = list(
        islice((each for each in _walk(path, key) if kind_of(each)[0] and not _is_paper(each)), 2)
    )
    if len(first) != 1 or saved_files(path, {}, key) is not None:
        return None
    data, others, aside = _listed(path, key)
    return (data[0], [*others, *aside]) if data else None


def _with_unread(found: Found, folder: Path, key: str) -> Found:
    """Name the data files that a folder has beside those that it names itself."""
    used = {file.resolve() for files in found.files.values() for file in files}
    data, _, aside = _listed(folder, key)
    unread = [
        *(str(file.relative_to(folder)) for file in data if file.resolve() not in used),
        *aside,
    ]
    found.notes += [f"not read: {listing(unread)}"] if unread else []
    return found


def _beside(path: Path) -> list[str]:
    """Return a note where a file named train has other splits beside it, which are not read."""
    if _word_of(path) != "train":
        return []
    others = [
        each.name
        for each in sorted(path.parent.iterdir())
        if each != path and kind_of(each)[0] and _word_of(each) not in (None, "train")
    ]
    return (
        [f"{', '.join(others)} beside {path.name} is not read: give the folder to read all splits"]
        if others
        else []
    )


def _word_of(path: Path) -> str | None:
    return "test" if _is_trec_test(path) else word_or_none(stem_of(path))


def _is_trec_test(path: Path) -> bool:
    return kind_of(path)[0] == "trec" and stem_of(path).lower() == TREC_TEST


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    relative: str
    split: str | None
    # of the shards of one file: where it lies and what it is called without its number
    family: tuple[str, str]
    numbered: bool
    is_shard_of: int | None


def _by_name(folder: Path, chosen: Mapping[str, str], key: str) -> Found:
    data, others, aside = _listed(folder, key)
    if not data:
        more = f"; it has {listing([*others, *aside])}" if others or aside else ""
        raise UserError(
            key, f"{folder} has no data file{more}", f"give files that end with {SHOWN}"
        )
    files = [_described(path, folder, key) for path in data]
    by_split, unread = _chosen(files, chosen) if chosen else _apart(files, folder, key)
    meant = next(
        (name for name in others if word_or_none(Path(name).name) in set(SPLITS) - set(by_split)),
        None,
    )
    if meant is not None:
        raise UserError(
            key,
            f"{folder / meant} would not be read: its ending is unknown",
            f"give one of {SHOWN}",
        )
    for split, members in by_split.items():
        _check_family(split, members, key)
    found = Found(
        {split: [each.path for each in by_split[split]] for split in SPLITS if split in by_split}
    )
    found.notes += [
        _said(split, by_split[split])
        for split in found.files
        if _is_worth_saying(split, by_split[split])
    ]
    if unread or others or aside:
        found.notes.append(f"not read: {listing([*unread, *others, *aside])}")
    return found


def _listed(folder: Path, key: str) -> tuple[list[Path], list[str], list[str]]:
    """Return the data files below a folder, and names: of files of unknown kinds, and of data that
    is set aside.

    What documents a set is left out. Data in a folder whose name begins with `_` is set aside, as
    Spark does it.

    Raises:
        UserError: If one is a link to nothing, or no regular file.
    """
    data: list[Path] = []
    others: list[str] = []
    aside: list[str] = []
    for path in _walk(folder, key):
        if _is_paper(path):
            continue
        is_data, relative = kind_of(path)[0] is not None, path.relative_to(folder)
        if any(part.startswith("_") for part in relative.parts[:-1]):
            aside += [str(relative)] if is_data else []
        elif is_data:
            refuse_special(path, key)
            data.append(path)
        elif path.suffix.lower() not in SILENT and not path.name.startswith("_"):
            if path.is_symlink():
                refuse_special(path, key)
            others.append(str(relative))
    return data, others, aside


def _is_paper(path: Path) -> bool:
    """Whether a file tells of a data set and is none of it."""
    is_paper = PAPERS.fullmatch(path.name) and kind_of(path)[0] in (None, "text")
    return bool(is_paper or RECORDS.fullmatch(path.name))


def _walk(folder: Path, key: str) -> Iterator[Path]:
    """Yield the files below a folder, however deep; a folder that links lead back to once."""
    seen: set[str] = set()
    count = 0
    for at, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:  # a link to where we come from
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(name for name in names if not name.startswith("."))
        count += max(1, len(files))
        if count > MOST_FILES:
            raise UserError(
                key, f"{folder} has more than {MOST_FILES} files", "give the folder of one data set"
            )
        yield from (Path(at, name) for name in files)


def _described(path: Path, folder: Path, key: str) -> _File:
    relative = path.relative_to(folder)
    stem = stem_of(path)
    split, place, bare = _own_split(stem, relative, key), relative.parent, _bare(stem)
    if _is_trec_test(path):
        split = "test"
    if split is None:  # the nearest sub-folder that names one; what lies in it is of one family
        for at in relative.parents:
            split = _own_split(at.name, relative, key)
            if split is not None:
                place, bare = at, ""
                break
    shard = SHARD.search(stem)
    return _File(
        path,
        str(relative),
        split,
        (str(place), bare),
        bare != stem.lower(),
        int(shard.group("count")) if shard else None,
    )


def _own_split(name: str, relative: Path, key: str) -> str | None:
    try:
        return split_word(name)
    except ValueError as error:
        raise UserError(key, f"the name of {relative} {error}", "name it after one split") from None


def _bare(stem: str) -> str:
    """Return what the shards of one file are called without their numbers."""
    part = PART.match(stem)
    if SHARD.search(stem):
        return SHARD.sub("", stem).lower()
    return (part.group("stem") if part else NUMBER.sub("", stem)).lower()


def _apart(files: list[_File], folder: Path, key: str) -> tuple[dict[str, list[_File]], list[str]]:
    """Return files by the split that they name, and those that name none where others do."""
    by_split: dict[str, list[_File]] = {}
    for each in files:
        if each.split is not None:
            by_split.setdefault(each.split, []).append(each)
    if not by_split:
        _check_unnamed(files, folder, key)
        return {"train": files}, []
    if "train" not in by_split:
        problem = f"{folder} has no train file; it has {listing([each.relative for each in files])}"
        raise UserError(key, problem, "name one of them train")
    return by_split, [each.relative for each in files if each.split is None]


def _check_unnamed(files: list[_File], folder: Path, key: str) -> None:
    """Refuse files of which none names a split, unless they are one file, the shards of one, or
    texts.
    """
    first = files[0]
    if all(kind_of(each.path)[0] == "text" for each in files):
        return
    other = next(
        (
            each
            for each in files
            if each.family != first.family or kind_of(each.path) != kind_of(first.path)
        ),
        None,
    )
    if other is not None:
        problem = f"{folder} has {first.relative} and {other.relative}, and neither names a split"
        raise UserError(
            key, problem, f"choose with data.splits={{train: {first.relative}}}, or name one train"
        )


def _chosen(
    files: list[_File], chosen: Mapping[str, str]
) -> tuple[dict[str, list[_File]], list[str]]:
    """Return the files that `data.splits` names, and by their names those of the splits that it
    does not name.
    """
    by_split = {
        split: [each for each in files if _is_meant(each, name)] for split, name in chosen.items()
    }
    for split, found in by_split.items():
        if not found:
            have = ", ".join(each.relative for each in files[:20])
            raise UserError(
                "data.splits", f"there is no file {chosen[split]!r} for {split}", f"known: {have}"
            )
    taken = {each.relative for found in by_split.values() for each in found}
    rest = [each for each in files if each.relative not in taken]
    for each in rest:
        if each.split is not None and each.split not in chosen:
            by_split.setdefault(each.split, []).append(each)
    if "train" not in by_split:
        have = listing(each.relative for each in rest)
        raise UserError("data.splits", "names no train split", f"add train: one of {have}")
    used = {each.relative for found in by_split.values() for each in found}
    return by_split, [each.relative for each in files if each.relative not in used]


def _is_meant(each: _File, name: str) -> bool:
    relative = Path(each.relative)
    names = {each.relative, relative.name, stem_of(relative), str(relative.parent), each.family[1]}
    return name in names or fnmatch.fnmatch(each.relative, name)


def _check_family(split: str, members: list[_File], key: str) -> None:
    """Refuse files of one split that are not the shards of one: two readings, or a shard that is
    missing.
    """
    members.sort(key=lambda each: natural(each.relative))
    first = members[0]
    by_stem: dict[str, _File] = {}
    for each in members:
        same = by_stem.setdefault(
            str(Path(each.relative).parent / stem_of(each.path)).lower(), each
        )
        if same is not each:
            raise _two_readings(split, same, each, key)
        is_shard = each.family == first.family and (
            each.numbered == first.numbered or not each.family[1]
        )
        if each.split is not None and not is_shard:
            raise _two_readings(split, first, each, key)
    counts = {each.is_shard_of for each in members if each.is_shard_of is not None}
    if counts and (len(counts) > 1 or counts != {len(members)}):
        problem = (
            f"{first.relative} is one of {how_many(max(counts), 'shard')}, and {len(members)}"
            f" {agreed(len(members), 'is', 'are')} there"
        )
        raise UserError(key, problem, "get the missing ones")


def _two_readings(split: str, one: _File, other: _File, key: str) -> UserError:
    remedy = f"choose with data.splits={{{split}: {one.relative}}}"
    top = Path(one.relative).parts[0]
    if len(Path(one.relative).parts) > 1 and top != Path(other.relative).parts[0]:
        remedy += f", or with data.subset={top}"
    return UserError(key, f"{split} could be {one.relative} or {other.relative}", remedy)


def _is_worth_saying(split: str, members: list[_File]) -> bool:
    return len(members) > 1 or stem_of(members[0].path) != split


def _said(split: str, members: list[_File]) -> str:
    names = [each.relative for each in members]
    return (
        f"{split} is {listing(names)}"
        if len(names) < 4
        else f"{split} is {len(names)} files, {names[0]} first"
    )
