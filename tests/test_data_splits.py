"""Splits by content, and what files are refused for."""

from __future__ import annotations

import json

import pytest

from pipeline.config import DataConfig, Task
from pipeline.data.load import load_dataset
from pipeline.errors import UserError


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def digests(dataset, split) -> set[str]:
    return {document.digest for document in dataset.splits[split]}


def test_missing_splits_are_cut_by_content_and_stay_when_documents_are_added(tmp_path) -> None:
    rows = [{"text": f"document {index}"} for index in range(300)]
    small = load_dataset(DataConfig(path=jsonl(tmp_path / "a.jsonl", rows[:200])), Task.causal_lm)
    large = load_dataset(
        DataConfig(path=jsonl(tmp_path / "b.jsonl", [*rows[::-1], rows[0], {"text": " "}])), Task.causal_lm
    )
    assert sum(len(part) for part in large.splits.values()) == 300
    assert digests(small, "test")
    assert digests(small, "validation")
    assert digests(small, "test") <= digests(large, "test")
    assert digests(large, "train").isdisjoint(digests(large, "test") | digests(large, "validation"))
    assert small.digest != large.digest
    assert "train: dropped 1 blank documents" in large.notes


def test_a_document_in_two_splits_is_refused(tmp_path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}"} for i in range(9)])
    jsonl(tmp_path / "test.jsonl", [{"text": "new"}, {"text": "t4"}])
    with pytest.raises(UserError, match=r"document 2 of test \('t4'\) is document 5 of train too"):
        load_dataset(DataConfig(path=str(tmp_path)), Task.causal_lm)


@pytest.mark.parametrize(
    ("content", "task", "problem"),
    [
        ("", Task.causal_lm, "is empty"),
        ('{"text": "a"}\n{"text": \n', Task.causal_lm, "line 2 is not JSON"),
        ('{"text": "a"}\n[1]\n', Task.causal_lm, "line 2 is not an object"),
        ('{"txt": "a"}\n', Task.causal_lm, "no field 'text'; set data.text_field to one of txt"),
        ('{"text": 3}\n', Task.causal_lm, "text is int"),
        ('{"text": "a"}\n', Task.sequence_classification, "no field 'label'"),
        ('{"text": "a", "label": 0.5}\n', Task.sequence_classification, "label 0.5"),
        ('{"text": "a", "label": 0}\n{"text": "b", "label": 7}\n', Task.sequence_classification, "labels run up to 7"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', Task.causal_lm, "no assistant turn"),
        ('{"text": "a"}\n', Task.causal_lm, "split has no documents"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_by_line(tmp_path, content, task, problem) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"^data\.path: ") as refused:
        load_dataset(DataConfig(path=str(path)), task)
    assert problem in str(refused.value)


def test_bytes_that_are_not_utf8_are_refused_by_line(tmp_path) -> None:
    (tmp_path / "x.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        load_dataset(DataConfig(path=str(tmp_path / "x.txt")), Task.causal_lm)


def test_the_embedded_data_is_real_and_its_splits_share_nothing() -> None:
    for name, task in (("stdlib", Task.causal_lm), ("stdlib_labels", Task.sequence_classification)):
        dataset = load_dataset(DataConfig(name=name), task)
        parts = [digests(dataset, split) for split in ("train", "validation", "test")]
        assert min(map(len, parts)) >= 40
        assert sum(map(len, parts)) == len(set.union(*parts))
    assert dataset.labels is not None
    assert {document.label for document in dataset.splits["test"]} == set(range(len(dataset.labels)))
