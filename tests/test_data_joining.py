"""Files of one data set that spell labels, columns and groups each in its own way are joined by
what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from data_layouts import write_file

from pipeline.config.settings.data import DataConfig
from pipeline.data.documents import Dataset
from pipeline.data.files import read_documents
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

LM, CLASSES = Task.causal_lm, Task.sequence_classification
COLOURS = ["red", "green", "blue"]
HUGE = "1" + "0" * 5000  # more digits than Python makes a number of


def load(folder: Path, task: Task = CLASSES, **more: Any) -> Dataset:
    return load_dataset(DataConfig(path=str(folder), **more), task)


def declared(
    path: Path, labels: Sequence[Any], names: Sequence[str], column: str = "label"
) -> None:
    """Write documents whose text ends in the class that is meant, their codes, and what these stand
    for.
    """
    path.parent.mkdir(exist_ok=True)
    rows = [
        {"text": f"{path.stem} {n} {label}", column: list(names).index(label)}
        for n, label in enumerate(labels)
    ]
    feature = {column: {"names": list(names), "_type": "ClassLabel"}}
    meta = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
    write = pq.write_table if path.suffix == ".parquet" else feather.write_feather
    write(pa.Table.from_pylist(rows).replace_schema_metadata(meta), path)


def plain(
    path: Path, labels: Sequence[Any], meant: Sequence[Any] | None = None, column: str = "label"
) -> None:
    """Write documents with labels as they are; what they mean stands at the end of the text."""
    rows = [
        {"text": f"{path.stem} {n} {name}", column: label}
        for n, (label, name) in enumerate(zip(labels, meant or labels, strict=True))
    ]
    write_file(path.parent, path.name, rows)


def right(dataset: Dataset) -> bool:
    """Whether each document has the class that its text ends in."""
    assert dataset.labels is not None
    return all(
        each.label is not None and each.text.endswith(f" {dataset.labels[each.label]}")
        for part in dataset.splits.values()
        for each in part
    )


@pytest.mark.parametrize("ending", [".parquet", ".feather"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_codes_mean_what_their_own_file_declares(tmp_path: Path, split: str, ending: str) -> None:
    declared(tmp_path / f"train{ending}", COLOURS * 20, COLOURS)
    declared(tmp_path / f"{split}{ending}", COLOURS * 4, COLOURS[::-1])
    dataset = load(tmp_path)
    assert dataset.labels == tuple(COLOURS)
    assert right(dataset)
    assert any("blue, green, red: they are joined by name" in note for note in dataset.notes)


def test_shards_that_declare_other_orders_are_joined_by_name(tmp_path: Path) -> None:
    declared(tmp_path / "train-00000-of-00003.parquet", COLOURS * 20, COLOURS)
    declared(tmp_path / "train-00001-of-00003.parquet", COLOURS * 20, COLOURS[::-1])
    declared(
        tmp_path / "train-00002-of-00003.parquet", ["grey", "red"] * 20, ["grey", "red", "never"]
    )
    dataset = load(tmp_path)
    assert dataset.labels == (*COLOURS, "grey", "never")
    assert right(dataset)


def test_splits_of_the_hub_have_each_their_own_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(split: str, names: list[str]) -> Any:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        rows = [
            {"text": f"{split} {n} {COLOURS[n % 3]}", "label": names.index(COLOURS[n % 3])}
            for n in range(60)
        ]
        return datasets.Dataset.from_list(rows, features=features)

    loaded = datasets.DatasetDict(train=part("train", COLOURS), test=part("test", sorted(COLOURS)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    assert right(load_dataset(DataConfig(hub="org/name"), CLASSES))


@pytest.mark.parametrize(
    "test_codes", [[0, 1, 2], ["0", "1", "2"], [0.0, 1.0, 2.0], ["0.0", "1.0", "2.0"], COLOURS]
)
@pytest.mark.parametrize("name", ["test.jsonl", "test.csv"])
def test_codes_or_names_of_a_file_without_a_declaration(
    tmp_path: Path, name: str, test_codes: list[Any]
) -> None:
    declared(tmp_path / "train.feather", COLOURS * 20, COLOURS)
    plain(tmp_path / name, test_codes * 4, COLOURS * 4)
    dataset = load(tmp_path)
    assert dataset.labels == tuple(COLOURS)
    assert right(dataset)
    said = f"{name} has codes: they are read as train.feather declares them"
    assert (said in dataset.notes) == (test_codes is not COLOURS)


@pytest.mark.parametrize("codes", [[0, 1, 2], COLOURS])
def test_classes_that_only_test_declares(tmp_path: Path, codes: list[Any]) -> None:
    plain(tmp_path / "train.jsonl", codes * 20, COLOURS * 20)
    declared(tmp_path / "test.parquet", COLOURS * 4, COLOURS)
    dataset = load(tmp_path)
    assert dataset.labels == tuple(COLOURS)
    assert right(dataset)


def test_a_file_with_single_codes_of_minus_one(tmp_path: Path) -> None:
    declared(tmp_path / "train.parquet", COLOURS * 20, COLOURS)
    plain(tmp_path / "test.csv", [0, -1, 2] * 4, ["red", "none", "blue"] * 4)
    dataset = load(tmp_path)
    assert right(dataset)
    assert "test: dropped 4 documents without a label (-1)" in dataset.notes


@pytest.mark.parametrize(
    ("names", "labels", "said"),
    [
        (
            COLOURS,
            ["red", "mauve"],
            "test.csv line 3 has label 'mauve', and train.parquet declares red, green, blue",
        ),
        (
            COLOURS,
            [0, 3],
            "test.csv line 3 has label '3', and train.parquet declares red, green, blue",
        ),
        (COLOURS, [0, -2], "test.csv line 3 has label '-2', and train.parquet declares"),
        (COLOURS, [0.5, 1], "test.csv line 2 has label '0.5', and train.parquet declares"),
        (COLOURS, ["red", "1"], "test.csv line 3 has label '1', and train.parquet declares"),
        (COLOURS, ["red", HUGE], "test.csv line 3 has label '1000"),
        (["1", "2", "3"], [1, 2], "test.csv line 2: '1' could be that class or the code of '2'"),
    ],
)
def test_labels_that_cannot_be_joined_are_refused(
    tmp_path: Path, names: list[str], labels: Any, said: str
) -> None:
    declared(tmp_path / "train.parquet", names * 20, names)
    text = "".join(f"a {n},{label}\n" for n, label in enumerate(labels))
    (tmp_path / "test.csv").write_text(f"text,label\n{text}")
    with pytest.raises(UserError) as refused:
        load(tmp_path)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_codes_that_two_files_declare_differently_are_refused(tmp_path: Path) -> None:
    declared(tmp_path / "train.parquet", COLOURS * 20, COLOURS)
    declared(tmp_path / "validation.parquet", COLOURS * 4, COLOURS[::-1])
    plain(tmp_path / "test.csv", [0, 2])
    said = (
        r"test\.csv has codes, which train\.parquet declares as red, green, blue and"
        r" validation\.parquet as blue"
    )
    with pytest.raises(UserError, match=said):
        load(tmp_path)
    plain(tmp_path / "test.csv", [1] * 4, ["green"] * 4)  # which both declare alike
    assert right(load(tmp_path))


def test_names_that_are_numbers_are_names_where_they_are_no_codes(tmp_path: Path) -> None:
    declared(tmp_path / "train.parquet", ["1", "2", "3"] * 20, ["1", "2", "3"])
    plain(tmp_path / "test.csv", [1, 2, 3] * 3)
    assert right(load(tmp_path))


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        ([True, False], ["True", "False"], ("false", "true")),
        (["TRUE", "FALSE"], [False, True], ("false", "true")),
        ([3, 5], ["3.0", "5.0"], ("3", "5")),
        (["3.0", "5.0"], ["5", "3"], ("3.0", "5.0")),
        ([0.5, 1], ["0.50", "1.0"], ("0.5", "1")),
    ],
)
def test_a_value_is_one_class_however_its_file_spells_it(
    tmp_path: Path, train: list[Any], test: list[Any], names: tuple[str, ...]
) -> None:
    for split, values in (("train", train), ("test", test)):
        ending = "csv" if isinstance(values[0], str) else "jsonl"
        plain(tmp_path / f"{split}.{ending}", values * 20, [str(value) for value in values] * 20)
    dataset = load(tmp_path)
    assert dataset.labels == names
    for each in dataset.splits["test"]:
        value = each.text.split()[-1]
        assert names[each.label or 0].lower() == value.lower() or float(
            names[each.label or 0]
        ) == float(value)
    assert any(
        note.startswith("a label is one class however its file spells it: ")
        for note in dataset.notes
    )


def test_text_that_one_file_spells_in_two_ways_is_two_classes(tmp_path: Path) -> None:
    plain(tmp_path / "train.csv", ["True", "true", "1", "1.0"] * 20)
    plain(tmp_path / "test.csv", ["true", "True"] * 3)
    dataset = load(tmp_path)
    assert dataset.labels == ("1", "1.0", "True", "true")
    assert right(dataset)


@pytest.mark.parametrize(
    ("train", "test"), [("Label", "label"), ("labels", "label"), ("label", "LABELS")]
)
@pytest.mark.parametrize("declares", [False, True])
def test_a_label_column_of_another_spelling_is_the_label(
    tmp_path: Path, train: str, test: str, declares: bool
) -> None:
    if declares:
        declared(tmp_path / "train.parquet", COLOURS * 20, COLOURS, train)
        declared(tmp_path / "test.parquet", COLOURS * 4, COLOURS[::-1], test)
    else:
        plain(tmp_path / "train.jsonl", COLOURS * 20, column=train)
        plain(tmp_path / "test.tsv", COLOURS * 4, column=test)
    dataset = load(tmp_path)
    assert right(dataset)
    assert len(dataset.splits["test"]) == 12
    assert any(f"column {test!r} is read as {train!r}" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("task", "train", "test", "said"),
    [
        (
            CLASSES,
            {"label": "{n}"},
            {"sentiment": "{n}"},
            "has the label in 'label', and test.jsonl in 'sentiment'",
        ),
        (CLASSES, {"stars": "{n}"}, {"rating": "{n}"}, "the label could be stars or rating"),
        (
            LM,
            {"instruction": "do", "output": "x", "input": "{n}"},
            {"instruction": "do", "output": "x", "context": "{n}"},
            "train.jsonl has the input in 'input', and test.jsonl in 'context'",
        ),
        (
            LM,
            {"prompt": "p", "completion": "x", "passage": "{n}"},
            {"prompt": "p", "completion": "x", "document": "{n}"},
            "train.jsonl has the context in 'passage', and test.jsonl in 'document'",
        ),
    ],
)
def test_a_part_in_another_column_is_refused_and_not_taken_for_absent(
    tmp_path: Path, task: Task, train: dict[str, str], test: dict[str, str], said: str
) -> None:
    for split, row in (("train", train), ("test", test)):
        more = {"text": f"{split} text"} if task is CLASSES else {}
        rows = [
            {**more, **{name: cell.replace("{n}", str(n % 2)) for name, cell in row.items()}}
            for n in range(40)
        ]
        write_file(tmp_path, f"{split}.jsonl", rows)
    with pytest.raises(UserError) as refused:
        load(tmp_path, task)
    assert said in str(refused.value)


def test_a_column_that_some_rows_lack_is_read_where_it_is_spelt_otherwise(tmp_path: Path) -> None:
    for split, name in (("train", "Input"), ("test", "input")):
        rows = [
            {"instruction": "do", "output": f"{split} {n}", name: f"with {n}"} for n in range(40)
        ]
        write_file(tmp_path, f"{split}.jsonl", rows)
    assert all("with" in (each.prompt or "") for each in load(tmp_path, LM).splits["test"])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("test.jsonl", [7.0, 11.0]),
        ("test.csv", [7, 11]),
        ("test.csv", ["7.0", "11.0"]),
        ("test.jsonl", [" 7", "11 "]),
    ],
)
def test_groups_are_one_however_their_file_spells_them(
    tmp_path: Path, name: str, shown: list[Any]
) -> None:
    write_file(
        tmp_path, "train.jsonl", [{"text": f"piece {n}", "book": n % 20} for n in range(200)]
    )
    write_file(tmp_path, name, [{"text": f"other {n}", "book": shown[n % 2]} for n in range(6)])
    dataset = load(tmp_path, LM, group_field="book")
    assert "train: dropped 20 documents of 2 groups that stand in test too" in dataset.notes


@pytest.mark.parametrize(
    ("one", "other"), [("\u00fc", "u\u0308"), (True, "True"), ([1, 2], [1, 2])]
)
def test_groups_of_any_value(tmp_path: Path, one: Any, other: Any) -> None:
    rows = [{"text": f"piece {n}", "who": f"x {n}"} for n in range(60)]
    write_file(tmp_path, "train.jsonl", [*rows, {"text": "shared", "who": one}])
    write_file(
        tmp_path, "test.jsonl", [{"text": "tested", "who": other}, {"text": "own", "who": " "}]
    )
    dataset = load(tmp_path, LM, group_field="who")
    assert "train: dropped 1 document of 1 group that stands in test too" in dataset.notes
    assert dataset.splits["test"][1].group is None


def test_a_file_that_a_stage_names_has_its_own_declaration_and_spelling(tmp_path: Path) -> None:
    declared(tmp_path / "a.parquet", COLOURS * 2, COLOURS[::-1])
    found = read_documents(tmp_path / "a.parquet", DataConfig(), CLASSES, tuple(COLOURS), "key")
    assert [COLOURS[each.label or 0] for each in found] == COLOURS * 2
    plain(tmp_path / "b.csv", ["True", "False"])
    found = read_documents(tmp_path / "b.csv", DataConfig(), CLASSES, ("false", "true"), "key")
    assert [each.label for each in found] == [1, 0]
