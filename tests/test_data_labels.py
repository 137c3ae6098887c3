"""Any set of distinct values is a set of classes; what is none is refused by line, and the report
shows them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.settings.data import Conflicting, DataConfig
from pipeline.data.documents import Dataset
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

CLASSES = Task.sequence_classification


def load(folder: Path, labels: list[Any], **more: Any) -> Dataset:
    """Load documents `text 0`, `text 1`, ... with these labels, from JSON lines."""
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(DataConfig(path=str(folder / "a.jsonl"), **more), CLASSES)


def named(dataset: Dataset) -> dict[int, str]:
    """Return the class name of each document by its number."""
    assert dataset.labels is not None
    return {
        int(each.text.split()[1]): dataset.labels[each.label]
        for part in dataset.splits.values()
        for each in part
        if each.label is not None
    }


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ((True, False), ("false", "true")),
        ((0.0, 1.0), ("0", "1")),
        ((3, 1, 2), ("1", "2", "3")),
        ((1, -1), ("-1", "1")),
        ((10, 9, 100), ("9", "10", "100")),
        (("10", "9", "100"), ("9", "10", "100")),
        (("0", "00", "01"), ("0", "00", "01")),
        ((0.5, 1.5, 10), ("0.5", "1.5", "10")),
        (("good", "bad", "Bad"), ("Bad", "bad", "good")),
        ((7, 10**30), ("7", str(10**30))),
        # more digits than Python makes a number of
        (("1" + "0" * 5000, "7"), ("7", "1" + "0" * 5000)),
        (("a b", "a  b"), ("a  b", "a b")),
        (("x", 1), ("1", "x")),
    ],
)
def test_any_distinct_values_are_classes(
    tmp_path: Path, values: tuple[Any, ...], names: tuple[str, ...]
) -> None:
    dataset = load(tmp_path, [values[n % len(values)] for n in range(120)])
    assert dataset.labels == names
    for n, name in named(dataset).items():
        value = values[n % len(values)]
        assert name == {True: "true", False: "false"}.get(value, str(value)) or float(name) == value
    assert any(
        note.startswith(
            f"classes by index, with documents of train/validation/test: 0: {names[0]} ("
        )
        for note in dataset.notes
    )


def test_labels_are_trimmed_and_that_is_said(tmp_path: Path) -> None:
    dataset = load(tmp_path, ["good ", "good", "bad", " bad", "cafe\u0301", "caf\u00e9"] * 20)
    assert dataset.labels == ("bad", "caf\u00e9", "good")
    assert "40 labels had blanks around them, which are no part of a class" in dataset.notes


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([n / 7 for n in range(90)], "labels take 90 values such as"),
        (
            [str(n / 7) for n in range(90)],
            "a quantity, and no classes; choose another column with data.columns",
        ),
        (list(range(90)), "90 documents of train have 90 different labels"),
        (["a", "b", None], "a.jsonl line 3 has no label"),
        (["a", "b", float("nan")], "a.jsonl line 3 has label nan"),
        (["a", "b", "  "], "a.jsonl line 3 has label ' '"),
        (["a", "b", ["a", "b"]], "a.jsonl line 3 has 2 labels; one class"),
        (["a", "a", "a"], "all documents have label 'a'"),
    ],
)
def test_what_is_no_class_is_refused(tmp_path: Path, labels: list[Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        load(tmp_path, labels)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [{"neg": "negative", "0": "bad"}, '{neg: negative, "0": bad}', {"neg": "negative", 0: "bad"}],
)
def test_classes_can_be_renamed_and_keep_their_order(tmp_path: Path, given: Any) -> None:
    dataset = load(tmp_path, ["0", "neg", "zz"] * 40, label_map=given)
    assert dataset.labels == ("bad", "negative", "zz")
    merged = load(tmp_path, ["0", "neg", "zz"] * 40, label_map={"0": "neg"})
    assert merged.labels == ("neg", "zz")
    assert "data.label_map makes 2 classes of 3 (0, neg, zz)" in merged.notes
    with pytest.raises(
        UserError, match=r"data\.label_map: there is no label 'pos'; known: 0, neg, zz"
    ):
        load(tmp_path, ["0", "neg", "zz"] * 40, label_map={"pos": "x"})
    assert merged.digest != dataset.digest != load(tmp_path, ["0", "neg", "zz"] * 40).digest


def test_classes_that_a_file_declares_keep_their_numbers_and_names(tmp_path: Path) -> None:
    """As `datasets` writes them to Parquet; sorted by name they would change places, and -1 is no
    class.
    """
    feature = {"label": {"names": ["up", "down", "never"], "_type": "ClassLabel"}}
    meta = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
    rows = [{"text": f"text {n}", "label": (1, 0, -1)[n % 3]} for n in range(90)]
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(meta), tmp_path / "a.parquet")
    dataset = load_dataset(DataConfig(path=str(tmp_path / "a.parquet")), CLASSES)
    assert dataset.labels == ("up", "down", "never")
    assert {n % 3: name for n, name in named(dataset).items()} == {0: "down", 1: "up"}
    assert "train: dropped 30 documents without a label (-1)" in dataset.notes
    assert any("class never has no document in train" in note for note in dataset.notes)


@pytest.mark.parametrize("hidden", [-1, "-1", None, "absent"])
def test_a_test_split_without_labels_is_said_and_another_is_cut(
    tmp_path: Path, hidden: Any
) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(90)]
    tested = [
        {"text": f"other {n}"} if hidden == "absent" else {"text": f"other {n}", "label": hidden}
        for n in range(9)
    ]
    for name, part in (("train", rows), ("test", tested)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    dataset = load_dataset(DataConfig(path=str(tmp_path)), CLASSES)
    assert "test is not read: its 9 rows have no labels" in dataset.notes
    assert all(each.text.startswith("text") for each in dataset.splits["test"])


def test_minus_one_is_a_class_where_train_has_it(tmp_path: Path) -> None:
    for name, labels in (("train", [-1, 1] * 40), ("test", [-1] * 9)):
        rows = [{"text": f"{name} {n}", "label": label} for n, label in enumerate(labels)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(DataConfig(path=str(tmp_path)), CLASSES)
    assert [each.label for each in dataset.splits["test"]] == [0] * 9


def test_the_cut_is_stratified_and_train_keeps_every_class(tmp_path: Path) -> None:
    labels = ["often"] * 800 + ["seldom"] * 180 + ["once"] + ["twice"] * 2
    dataset = load(tmp_path, labels)
    assert dataset.labels is not None
    counts = {
        split: [sum(each.label == at for each in part) for at in range(4)]
        for split, part in dataset.splits.items()
    }
    assert counts["validation"] == counts["test"] == [40, 0, 9, 0]  # often, once, seldom, twice
    assert counts["train"] == [720, 1, 162, 2]


def test_a_document_more_moves_few(tmp_path: Path) -> None:
    labels = ["abc"[n % 3] for n in range(900)]
    before, after = load(tmp_path, labels), load(tmp_path, [*labels, "a"])
    where = [
        {each.text: split for split, part in dataset.splits.items() for each in part}
        for dataset in (before, after)
    ]
    assert sum(where[0][text] != where[1][text] for text in where[0]) <= 4
    assert load(tmp_path, labels).digest == before.digest


def test_rare_classes_have_documents_in_a_cut_test_by_largest_remainder(tmp_path: Path) -> None:
    dataset = load(tmp_path, [n % 77 for n in range(77 * 10)])
    assert [len(part) for part in dataset.splits.values()] == [770 - 76, 38, 38]


def test_a_text_with_two_labels_is_counted_and_a_rule_decides(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(90)]
    rows += [{"text": "Torn text", "label": "a"}, {"text": "torn  text", "label": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def texts(**more: Any) -> tuple[set[str], tuple[str, ...]]:
        dataset = load_dataset(DataConfig(path=str(tmp_path / "a.jsonl"), **more), CLASSES)
        return {each.text for part in dataset.splits.values() for each in part}, dataset.notes

    kept, notes = texts()
    assert len(kept) == 90
    assert any(
        "dropped 2 documents: 1 text has two labels: 'Torn text' (a and b)" in note
        for note in notes
    )
    kept, notes = texts(conflicting_labels=Conflicting.keep_first)
    assert "Torn text" in kept
    assert "torn  text" not in kept
    with pytest.raises(UserError, match=r"1 text has two labels"):
        texts(conflicting_labels=Conflicting.refuse)


def test_a_class_of_one_document_stays_in_train(tmp_path: Path) -> None:
    """By largest remainder one of the single ones would be tested, and never learnt."""
    dataset = load(tmp_path, ["often"] * 20 + [f"single {n}" for n in range(19)])
    assert {each.label for each in dataset.splits["train"]} == set(range(20))
    assert [each.label for each in dataset.splits["test"]] == [0]
