"""Documents that stand in two splits, documents of one source, and the public layout that has both
kinds of splits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from here import here

from pipeline.config.settings.data import DataConfig, Shared
from pipeline.data.documents import Dataset
from pipeline.data.embedded import load_stdlib_labels
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

LM, CLASSES = Task.causal_lm, Task.sequence_classification


def write(folder: Path, **splits: list[Any]) -> Path:
    for name, rows in splits.items():
        rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(folder: Path, task: Task = LM, **more: Any) -> Dataset:
    return load_dataset(DataConfig(path=str(folder), **more), task)


def texts(dataset: Dataset, split: str) -> set[str]:
    return {document.text for document in dataset.splits[split]}


def test_what_test_has_is_dropped_from_validation_and_train(tmp_path: Path) -> None:
    """Alike are texts that differ in blanks, case or Unicode form."""
    tested = ["Fine wine", "caf\u00e9", "ﬁrst   \u212b", "only test"]
    train = [
        *(f"own {n}" for n in range(40)),
        " fine\twine ",
        "CAFE\u0301",
        "first \u00c5",
        "both valid",
    ]
    write(
        tmp_path,
        test=tested,
        validation=["fine WINE", "both  Valid", "only validation"],
        train=train,
    )
    dataset = load(tmp_path)
    assert texts(dataset, "test") == set(tested)
    assert texts(dataset, "validation") == {"both  Valid", "only validation"}
    assert texts(dataset, "train") == {f"own {n}" for n in range(40)}
    for note in (
        "validation: dropped 1 document that stands in test too",
        "train: dropped 3 documents that stand in test too",
        "train: dropped 1 document that stands in validation too",
    ):
        assert note in dataset.notes
    with pytest.raises(
        UserError,
        match=r"is document 41 of train too; keep it in one split, or give data\.shared_documents",
    ):
        load(tmp_path, shared_documents=Shared.refuse)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ({"prompt": "p {}", "completion": "c"}, {"prompt": "P {}", "completion": " C"}),
        (
            {"premise": "p {}", "hypothesis": "c", "label": 1},
            {"premise": "P {}", "hypothesis": "c ", "label": 0},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "p {}"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            {
                "messages": [
                    {"role": "user", "content": "P  {}"},
                    {"role": "assistant", "content": "c"},
                ]
            },
        ),
    ],
)
def test_every_kind_of_document_can_be_alike(
    tmp_path: Path, train: dict[str, Any], test: dict[str, Any]
) -> None:
    def numbered(row: Any, n: int) -> Any:
        return json.loads(json.dumps(row).replace("{}", str(n)))

    rows = [
        {**numbered(train, n), **({"label": n % 2} if "label" in train else {})} for n in range(60)
    ]
    write(tmp_path, train=rows, test=[numbered(test, n) for n in range(50, 64)])
    dataset = load(tmp_path, CLASSES if "label" in train else LM)
    assert "train: dropped 10 documents that stand in test too" in dataset.notes


def test_a_pair_is_not_its_halves(tmp_path: Path) -> None:
    """The same premise with another hypothesis is another document."""
    rows = [{"premise": f"p {n}", "hypothesis": "yes", "label": n % 2} for n in range(60)]
    write(tmp_path, train=rows, test=[{**row, "hypothesis": "no"} for row in rows[:10]])
    assert not any("stand in" in note for note in load(tmp_path, CLASSES).notes)


def test_a_split_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    write(tmp_path, train=[f"own {n}" for n in range(40)], test=["a", "b"], validation=["a", "b"])
    with pytest.raises(
        UserError, match=r"all 2 documents of validation stand in test too; leave that split out"
    ):
        load(tmp_path)


def test_texts_that_are_alike_stay_together_in_a_cut(tmp_path: Path) -> None:
    write(
        tmp_path,
        train=[f"{word} number {n}" for n in range(300) for word in ("This", "THIS", "this ")],
    )
    dataset = load(tmp_path)
    # not equal to the character: all are learnt from
    assert sum(map(len, dataset.splits.values())) == 900
    assert not any("dropped" in note for note in dataset.notes)
    by_split = [{text.lower() for text in texts(dataset, split)} for split in dataset.splits]
    assert sum(map(len, by_split)) == len(set.union(*by_split))


@pytest.mark.parametrize("labelled", [False, True])
def test_documents_of_one_group_stay_together(tmp_path: Path, labelled: bool) -> None:
    rows = [
        {"text": f"piece {n}", "source": f"book {n % 80}", **({"label": n % 4} if labelled else {})}
        for n in range(800)
    ]
    write(tmp_path, train=rows)
    dataset = load(tmp_path, CLASSES if labelled else LM, group_field="source")
    groups = [{document.group for document in part} for part in dataset.splits.values()]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups)) == 80
    assert not any("not read: source" in note for note in dataset.notes)
    assert dataset.digest != load(tmp_path, CLASSES if labelled else LM).digest


def test_groups_in_two_splits_stay_in_one(tmp_path: Path) -> None:
    rows = [{"text": f"piece {n}", "source": n // 2} for n in range(80)]
    write(
        tmp_path,
        train=rows,
        test=[{"text": "another", "source": 3}, {"text": "own", "source": None}],
    )
    dataset = load(tmp_path, group_field="source")
    assert "train: dropped 2 documents of 1 group that stands in test too" in dataset.notes
    assert [document.group for document in dataset.splits["test"]] == ["3", None]
    with pytest.raises(UserError, match=r"group '3' of test is in train too"):
        load(tmp_path, group_field="source", shared_documents=Shared.refuse)
    with pytest.raises(
        UserError,
        match=r"data\.group_field: train\.jsonl line 1 has no field 'book'; choose one of text",
    ):
        load(tmp_path, group_field="book")


def test_pieces_that_the_product_cuts_are_of_their_file() -> None:
    dataset = load_stdlib_labels()
    groups = [{document.group for document in part} for part in dataset.splits.values()]
    assert None not in set.union(*groups)
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_small_data_has_something_in_every_split(tmp_path: Path) -> None:
    for salt in range(20):
        write(tmp_path, train=[f"{salt} {n}" for n in range(3)])
        assert [len(part) for part in load(tmp_path).splits.values()] == [1, 1, 1]


def trec(
    folder: Path, *, columns: tuple[str, str], count: int = 120, tested: int = 20, shared: int = 4
) -> Path:
    """Write the public TREC layout at small scale: six classes, train and test, some questions in
    both.
    """
    names = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    text, label = columns
    train = [
        {label: names[n % 6], text: f"What is question {n} ?", "fine_label": f"{names[n % 6]}:x"}
        for n in range(count)
    ]
    test = [
        {label: names[n % 6], text: f"Who asked {n} ?", "fine_label": "x"}
        for n in range(tested - shared)
    ]
    return write(folder, train=train, test=[*test, *train[:shared]])


@pytest.mark.parametrize(
    "columns", [("text", "label"), ("text", "coarse_label"), ("question", "label-coarse")]
)
def test_the_public_trec_layout_is_read_as_it_is(tmp_path: Path, columns: tuple[str, str]) -> None:
    dataset = load(trec(tmp_path, columns=columns), CLASSES)
    assert dataset.labels == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert len(dataset.splits["test"]) == 20
    assert "train: dropped 4 documents that stand in test too" in dataset.notes
    assert len(dataset.splits["train"]) + len(dataset.splits["validation"]) == 116


def test_a_run_on_data_of_ones_own_reads_it_whole_and_says_what_it_did(tmp_path: Path) -> None:
    """The profile's limits are of the embedded data; what was dropped and the classes stand in the
    result.
    """
    folder = tmp_path / "trec"
    folder.mkdir()
    trec(folder, columns=("text", "coarse_label"), count=400, tested=200, shared=10)
    done = here(
        tmp_path,
        "recipe=baseline",
        "task=sequence_classification",
        f"data.path={folder}",
        "tracking.mlflow=false",
        "training.epochs=0.1",
        "training.sequence_length=16",
        "quality.bootstrap=200",
        "model.shape.layers=1",
        'data.label_map={NUM: number, "HUM": human}',
        "data.columns.label=coarse_label",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(next(tmp_path.glob("mlruns/runs/*/result.json")).read_text())
    notes = result["environment"]["notes"]
    assert "train: dropped 10 documents that stand in test too" in notes
    assert any("3: human (" in note and "5: number (" in note for note in notes)
    row = result["rows"][0]
    assert row["quality"]["accuracy"]["n"] == 200
    train = next(
        int(note.split(" epochs of ")[1].split()[0]) for note in notes if " epochs of " in note
    )
    steps = -(-train // 160)  # a tenth of them, by 16
    assert f"baseline: 0.1 epochs of {train} examples of train are {steps} steps" in notes
    assert row["ledger"]["counts"]["steps"]["value"] == steps
