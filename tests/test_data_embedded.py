"""The embedded datasets: real text of this interpreter, in splits that share nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import once
import pytest

from pipeline.data import embedded
from pipeline.data.documents import Dataset, Document
from pipeline.data.embedded import PIECE_LINES, load_stdlib, load_stdlib_labels
from pipeline.data.tokenizer import embedded_tokenizer


@pytest.fixture(scope="module")
def labelled() -> Dataset:
    return load_stdlib_labels()


def test_every_class_has_its_share_in_every_split(labelled: Dataset) -> None:
    assert labelled.labels is not None
    # one package has one very long file
    for split, least in (("train", 0.4), ("validation", 0.8), ("test", 0.6)):
        counts = Counter(document.label for document in labelled.splits[split])
        assert set(counts) == set(range(len(labelled.labels)))
        assert min(counts.values()) >= least * max(counts.values())


def test_pieces_of_one_file_stay_in_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six packages of twelve files; every line says which file it stands in."""
    files = [
        (
            Path(f"p{package}/f{file}.py"),
            "\n".join(f"p{package} f{file} l{line}" for line in range(40 * (file + 1))),
        )
        for package in range(6)
        for file in range(12)
    ]
    monkeypatch.setattr(embedded, "_library_files", lambda: files)
    where: dict[str, set[str]] = {}
    for split, documents in load_stdlib_labels().splits.items():
        for document in documents:
            lines = document.text.splitlines()
            assert len(lines) == PIECE_LINES
            where.setdefault(" ".join(lines[0].split()[:2]), set()).add(split)
    assert all(len(splits) == 1 for splits in where.values())
    assert len(where) > 40


def test_the_same_interpreter_gives_the_same_digest(
    labelled: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_stdlib_labels().digest == labelled.digest
    monkeypatch.setattr(embedded, "_version", lambda: "9.9.9")
    assert load_stdlib_labels().digest != labelled.digest


def test_stdlib_is_megabytes_of_source_without_its_tests() -> None:
    data = load_stdlib()
    assert sum(len(d.text) for part in data.splits.values() for d in part) > 5e6
    assert data.labels is None
    assert isinstance(data.splits["train"][0], Document)


def test_a_tokenizer_is_trained_once_for_a_content_and_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(once.ENV)
    said = [Document(text=text) for text in ("a house to live in", "a home to house", "one more")]

    def vocabulary(size: int, documents: list[Document] = said) -> dict[str, int]:
        return embedded_tokenizer(documents, size, tmp_path).get_vocab()

    first = vocabulary(270)
    (folder,) = tmp_path.iterdir()
    changed = folder.stat().st_mtime_ns
    assert vocabulary(270) == first
    assert ([folder], folder.stat().st_mtime_ns) == (list(tmp_path.iterdir()), changed)
    assert len(vocabulary(264)) == 264 < len(first)
    assert vocabulary(270, said[:1]) != first
    assert len(list(tmp_path.iterdir())) == 3
