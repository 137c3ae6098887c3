"""Real text that is always there: the interpreter's own library source."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import cache
from pathlib import Path

from pipeline.data.documents import SPLITS, Dataset, Document
from pipeline.data.splits import EMBEDDED_SHARES, assemble, drop_blanks_and_repeats

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "idle_test"}
)
NUM_CLASSES = 6  # of stdlib_labels: the largest packages
PIECE_LINES = 12
PIECES_PER_CLASS = 600  # at most; by split in EMBEDDED_SHARES


@cache
def _library_files() -> tuple[tuple[Path, str], ...]:
    """Return `(relative path, text)` of the library's source files, sorted; they are read once a
    process.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        # site-packages may be vast
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return tuple(
        (path.relative_to(root), path.read_text(encoding="utf-8", errors="replace"))
        for path in sorted(paths)
    )


def _version() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def load_stdlib() -> Dataset:
    """Return the library's files as documents, cut 70/10/20."""
    documents = [Document(text) for _, text in _library_files()]
    return assemble(
        "stdlib", {"train": documents}, key="data", shares=EMBEDDED_SHARES, salt=_version()
    )


def load_stdlib_labels() -> Dataset:
    """Return pieces of the library labelled with the top-level package they come from.

    Pieces of one file share its split: they are not independent. Files fill the test split first,
    then validation, so that every class has its share of pieces in each, however long its files
    are.
    """
    by_package: dict[str, list[tuple[Path, str]]] = {}
    for relative, text in _library_files():
        if len(relative.parts) > 1:
            by_package.setdefault(relative.parts[0], []).append((relative, text))
    sizes = {
        name: sum(len(text) for _, text in files)
        for name, files in by_package.items()
        if len(files) >= 10
    }
    labels = tuple(sorted(sorted(sizes, key=lambda name: -sizes[name])[:NUM_CLASSES]))
    given: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for label, package in enumerate(labels):
        for split, pieces in _pieces_by_split(by_package[package], label).items():
            given[split] += pieces
    distinct = _keep_first_occurrence(given)
    return assemble("stdlib_labels", distinct, key="data", labels=labels, salt=_version())


def _pieces_by_split(files: list[tuple[Path, str]], label: int) -> dict[str, list[Document]]:
    """Cut files, in an order of their content, into pieces, and give whole files to the split that
    still needs some.
    """
    cut = [
        _pieces(name, text, label)
        for name, text in sorted(files, key=lambda file: Document(file[1]).digest)
    ]
    total = min(PIECES_PER_CLASS, sum(map(len, cut)))
    train, validation, test = EMBEDDED_SHARES
    wanted = {
        "test": total * test // 100,
        "validation": total * validation // 100,
        "train": total * train // 100,
    }
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for pieces in cut:
        split = next((name for name, count in wanted.items() if len(parts[name]) < count), "train")
        parts[split] += pieces
    for split, pieces in parts.items():
        pieces.sort(key=lambda piece: piece.digest)  # a cap then takes them from all files
        del pieces[wanted[split] :]
    return parts


def _pieces(name: Path, text: str, label: int) -> list[Document]:
    """Cut a file; its pieces are of one source, and no statistic may take them for independent."""
    lines = [line for line in text.splitlines() if line.strip()]
    starts = range(0, len(lines) - PIECE_LINES + 1, PIECE_LINES)
    return [
        Document("\n".join(lines[start : start + PIECE_LINES]), label, group=name.as_posix())
        for start in starts
    ]


def _keep_first_occurrence(given: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Drop boilerplate that stands in files of several splits or packages (licences) from all but
    the first.
    """
    seen: set[str] = set()
    result: dict[str, list[Document]] = {}
    for split, documents in given.items():
        unique, _ = drop_blanks_and_repeats(documents)
        result[split] = [document for document in unique if document.likeness not in seen]
        seen |= {document.likeness for document in unique}
    return result
