"""Splits by content, and what files are refused for."""

from __future__ import annotations

import json

import pytest

from pipeline.config.settings.data import DataConfig, Shared
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

LM, CLASSES = Task.causal_lm, Task.sequence_classification


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def digests(dataset, split) -> set[str]:
    return {document.digest for document in dataset.splits[split]}


def test_missing_splits_are_cut_by_content_and_stay_when_documents_are_added(tmp_path) -> None:
    rows = [{"text": f"document {index}"} for index in range(300)]
    small = load_dataset(DataConfig(path=jsonl(tmp_path / "a.jsonl", rows[:200])), Task.causal_lm)
    large = load_dataset(
        DataConfig(path=jsonl(tmp_path / "b.jsonl", [*rows[::-1], rows[0], {"text": " "}])),
        Task.causal_lm,
    )
    assert sum(len(part) for part in large.splits.values()) == 300
    assert digests(small, "test")
    assert digests(small, "validation")
    assert digests(small, "test") <= digests(large, "test")
    assert digests(large, "train").isdisjoint(digests(large, "test") | digests(large, "validation"))
    assert small.digest != large.digest
    assert "train: dropped 1 blank document" in large.notes


def test_a_document_in_two_splits_is_refused_where_that_is_asked_for(tmp_path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}"} for i in range(9)])
    jsonl(tmp_path / "test.jsonl", [{"text": "new"}, {"text": "t4"}])
    with pytest.raises(UserError, match=r"document 2 of test \('t4'\) is document 5 of train too"):
        load_dataset(DataConfig(path=str(tmp_path), shared_documents=Shared.refuse), Task.causal_lm)


@pytest.mark.parametrize(
    ("content", "task", "problem"),
    [
        ("", LM, "is empty"),
        ('{"text": "a"}\n{"text": \n', LM, "line 2 is not JSON"),
        ('{"text": "a"}\n[1]\n', LM, "line 2 is not an object"),
        ('{"txt": "a b"}\n', LM, "split has no documents"),
        (
            '{"title": "a b", "body": "c d"}\n',
            LM,
            "no field 'text', and title, body are no shape that is known",
        ),
        ('{"text": "a"}\n{"txt": "a"}\n', LM, "line 2 has no field 'text', unlike the first row"),
        ('{"text": 3}\n', LM, "text is int"),
        ('{"text": "a"}\n', CLASSES, "no field 'label'"),
        ('{"text": "a", "label": 0.5}\n', CLASSES, "all documents have label '0.5'"),
        ('{"text": "a", "label": null}\n', CLASSES, "line 1 has no label"),
        ('{"text": "a", "label": NaN}\n', CLASSES, "line 1 has label nan"),
        ('{"text": "a", "label": [0, 2]}\n', CLASSES, "line 1 has 2 labels"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', LM, "no assistant turn"),
        ('{"messages": "x"}\n', LM, "line 1: messages are not a list of role and content"),
        ('{"text": "a"}\n', LM, "split has no documents"),
        ('{"text": "a"}\n{"text": "\\ud83d"}\n', LM, "line 2 has half a character (\\ud83d)"),
        (
            '{"messages": [{"role": "assistant", "content": "\\udc00"}]}\n',
            LM,
            "line 1 has half a character",
        ),
        ("[" * 100_000, LM, "line 1 is not JSON (maximum recursion depth"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", LM, "line 1 is not JSON (Exceeds the limit"),
        ('{"text": "a", "label": true}\n', CLASSES, "all documents have label 'true'"),
        ('{"text": "a", "label": " "}\n', CLASSES, "label ' '"),
        ('{"text": "a", "label": "x"}\n', CLASSES, "all documents have label 'x'"),
        ('{"text": "a", "label": {"x": 1}}\n', CLASSES, "line 1 has 1 label"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, content, task, problem) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"^data\.path: ") as refused:
        load_dataset(DataConfig(path=str(path)), task)
    assert problem in str(refused.value)


@pytest.mark.parametrize(("train", "test"), [((0, 1), 2), (("no", "yes"), "zz")])
def test_a_label_that_only_the_test_split_has_is_said_and_its_documents_are_scored(
    tmp_path, train, test
) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": train[i % 2]} for i in range(60)])
    jsonl(
        tmp_path / "test.jsonl",
        [{"text": "new", "label": train[0]}, {"text": "newer", "label": test}],
    )
    dataset = load_dataset(DataConfig(path=str(tmp_path)), Task.sequence_classification)
    assert dataset.labels == (*map(str, train), str(test))
    assert [document.label for document in dataset.splits["test"]] == [0, 2]
    assert any(
        note.startswith(f"class {test} has no document in train; 1 of test are of it")
        for note in dataset.notes
    )


def test_a_chat_in_which_the_assistant_says_nothing_is_blank(tmp_path) -> None:
    turns = [
        ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": ("a", " ")[i % 2]})
        for i in range(120)
    ]
    rows = [{"messages": list(pair)} for pair in turns]
    dataset = load_dataset(DataConfig(path=jsonl(tmp_path / "a.jsonl", rows)), Task.causal_lm)
    assert "train: dropped 60 blank documents" in dataset.notes
    assert sum(map(len, dataset.splits.values())) == 60


def test_a_smaller_or_spoilt_dataset_has_another_digest(tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(200)])
    load = lambda **more: load_dataset(DataConfig(path=path, **more), Task.sequence_classification)
    whole, few, spoilt = load(), load(max_documents=5), load(shuffle_labels=True)
    assert len({whole.digest, few.digest, load(max_documents=6).digest, spoilt.digest}) == 4
    assert [len(part) for part in few.splits.values()] == [5, 5, 5]
    assert few.digest == load(max_documents=5).digest
    texts = lambda data: [document.text for document in data.splits["train"]]
    labels = lambda data: [document.label for document in data.splits["train"]]
    assert texts(spoilt) == texts(whole)
    assert sorted(labels(spoilt)) == sorted(labels(whole))
    assert labels(spoilt) != labels(whole)
    assert spoilt.splits["test"] == whole.splits["test"]


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
    assert {document.label for document in dataset.splits["test"]} == set(
        range(len(dataset.labels))
    )
