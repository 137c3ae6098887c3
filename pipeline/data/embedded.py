"""Real text that is always there: the interpreter's own library source."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from pipeline.data.documents import Dataset, Document
from pipeline.data.splits import EMBEDDED_SHARES, assemble, drop_blanks_and_repeats, split_of

SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "idle_test"})
NUM_CLASSES = 6  # of stdlib_labels: the largest packages
PIECE_LINES = 12
MAX_PIECES_PER_CLASS = 600


def _library_files() -> list[tuple[Path, str]]:
    """Return `(relative path, text)` of the library's source files, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[Path, str]] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            found.append((relative, path.read_text(encoding="utf-8", errors="replace")))
    return found


def _version() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def load_stdlib() -> Dataset:
    """Return the library's files as documents, cut 70/10/20."""
    documents = [Document(text) for _, text in _library_files()]
    return assemble("stdlib", {"train": documents}, key="data", shares=EMBEDDED_SHARES, salt=_version())


def load_stdlib_labels() -> Dataset:
    """Return pieces of the library labelled with the top-level package they come from.

    Pieces of one file share its split: they are not independent.
    """
    by_package: dict[str, list[tuple[Path, str]]] = {}
    for relative, text in _library_files():
        if len(relative.parts) > 1:
            by_package.setdefault(relative.parts[0], []).append((relative, text))
    sizes = {name: sum(len(text) for _, text in files) for name, files in by_package.items() if len(files) >= 10}
    labels = tuple(sorted(sorted(sizes, key=lambda name: -sizes[name])[:NUM_CLASSES]))
    given: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for label, package in enumerate(labels):
        for split, pieces in _pieces_by_split(by_package[package], label).items():
            given[split] += pieces[:MAX_PIECES_PER_CLASS]
    distinct = _keep_first_occurrence(given)
    return assemble("stdlib_labels", distinct, key="data", labels=labels, salt=_version())


def _pieces_by_split(files: list[tuple[Path, str]], label: int) -> dict[str, list[Document]]:
    """Cut files into pieces; the split is that of the file's content."""
    parts: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for _, text in files:
        split = split_of(Document(text).digest, EMBEDDED_SHARES)
        lines = [line for line in text.splitlines() if line.strip()]
        for start in range(0, len(lines) - PIECE_LINES + 1, PIECE_LINES):
            parts[split].append(Document("\n".join(lines[start : start + PIECE_LINES]), label))
    for pieces in parts.values():  # in an order of their content, so that a cap takes them from all files
        pieces.sort(key=lambda piece: piece.digest)
    return parts


def _keep_first_occurrence(given: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Drop boilerplate that stands in files of several splits or packages (licences) from all but the first."""
    seen: set[str] = set()
    result: dict[str, list[Document]] = {}
    for split, documents in given.items():
        unique, _ = drop_blanks_and_repeats(documents)
        result[split] = [document for document in unique if document.digest not in seen]
        seen |= {document.digest for document in unique}
    return result
