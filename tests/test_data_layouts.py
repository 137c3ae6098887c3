"""Every format, compression and layout of a folder; every file is used or named, and two readings
are refused.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from data_layouts import (
    COMPRESSIONS,
    FORMATS,
    LAYOUTS,
    ONE_SPLIT,
    OWN_LAYOUTS,
    TEST,
    TRAIN,
    VALIDATION,
    save_to_disk,
    write_file,
)

from pipeline.config.settings.data import DataConfig
from pipeline.data.documents import Dataset
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

LM, CLASSES = Task.causal_lm, Task.sequence_classification


def load(path: Path, task: Task = LM, **more: Any) -> Dataset:
    return load_dataset(DataConfig(path=str(path), **more), task)


def texts(dataset: Dataset, *splits: str) -> set[str]:
    return {document.text for split in splits for document in dataset.splits[split]}


def of(rows: Any) -> set[str]:
    return {row["text"] for row in rows}


@pytest.mark.parametrize("packed", COMPRESSIONS)
@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("upper", [False, True])
def test_every_format_compressed_or_not_in_any_case(
    tmp_path: Path, ending: str, packed: str, upper: bool
) -> None:
    name = f"my data [1]{ending}{packed}"
    path = write_file(tmp_path, name.upper() if upper else name, TRAIN)
    task = LM if ending == ".txt" else CLASSES
    for place in (path, tmp_path):
        dataset = load(place, task)
        assert texts(dataset, "train", "validation", "test") == of(TRAIN)
        assert dataset.labels == (None if task is LM else ("no", "yes"))
    assert f"train is {path.name}" in load(tmp_path, task).notes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", [".jsonl", ".CSV", ".parquet", ".json.gz"])
def test_every_layout_of_a_folder(tmp_path: Path, layout: str, ending: str) -> None:
    LAYOUTS[layout](tmp_path, ending)
    for name in (
        "README",
        "LICENSE",
        ".gitattributes",
        "dataset_infos.json",
        ".cache/x.jsonl",
        "_SUCCESS",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    dataset = load(tmp_path, CLASSES)
    assert texts(dataset, "test") == of(TEST)
    given = layout in ("other names", "valid", "eval", "word of a name")
    assert texts(dataset, "train") | (set() if given else texts(dataset, "validation")) == of(TRAIN)
    assert not given or texts(dataset, "validation") == of(VALIDATION)
    assert not any("not read" in note for note in dataset.notes)


@pytest.mark.parametrize("layout", ONE_SPLIT)
@pytest.mark.parametrize("ending", [".jsonl", ".tsv.bz2"])
def test_files_that_name_no_split_are_train(tmp_path: Path, layout: str, ending: str) -> None:
    ONE_SPLIT[layout](tmp_path, ending)
    assert texts(load(tmp_path, CLASSES), "train", "validation", "test") == of(TRAIN)


@pytest.mark.parametrize("key", ["path", "hub"])
@pytest.mark.parametrize("layout", OWN_LAYOUTS)
def test_every_layout_that_has_a_format_of_its_own(tmp_path: Path, layout: str, key: str) -> None:
    OWN_LAYOUTS[layout](tmp_path)
    (tmp_path / "README.txt").write_text("what this is")
    dataset = load_dataset(DataConfig(**{key: str(tmp_path)}), CLASSES)
    assert dataset.labels == ("no", "yes")
    expected = {row["text"]: row["label"] for row in (*TRAIN, *TEST)}
    assert {
        each.text: dataset.labels[each.label or 0]
        for part in dataset.splits.values()
        for each in part
    } == expected
    assert layout == "class folders without splits" or texts(dataset, "test") == of(TEST)


@pytest.mark.parametrize("key", ["path", "hub"])
@pytest.mark.parametrize("splits", [False, True])
def test_what_datasets_saves_is_read(tmp_path: Path, splits: bool, key: str) -> None:
    save_to_disk(tmp_path / "saved", splits=splits)
    dataset = load_dataset(DataConfig(**{key: str(tmp_path / "saved")}), CLASSES)
    assert texts(dataset, "train", "validation", *([] if splits else ["test"])) == of(TRAIN)
    if splits:
        assert texts(dataset, "test") == of(TEST)


def test_formats_may_be_mixed_over_splits(tmp_path: Path) -> None:
    write_file(tmp_path, "train.parquet", TRAIN)
    write_file(tmp_path, "val.tsv", VALIDATION)
    write_file(tmp_path, "test.json", TEST)
    dataset = load(tmp_path, CLASSES)
    assert [texts(dataset, split) for split in ("train", "validation", "test")] == [
        of(TRAIN),
        of(VALIDATION),
        of(TEST),
    ]


def test_shards_are_read_in_their_order(tmp_path: Path) -> None:
    for at in range(12):
        write_file(tmp_path, f"train_{at}.jsonl", TRAIN[5 * at : 5 * at + 5])
    write_file(tmp_path, "test.jsonl", TEST)
    write_file(tmp_path, "validation.jsonl", VALIDATION)
    assert [document.text for document in load(tmp_path).splits["train"]] == [
        row["text"] for row in TRAIN
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["test.jsonl", "test.csv"], "test could be test.csv or test.jsonl"),
        (["test.jsonl", "test.jsonl.gz"], "test could be test.jsonl or test.jsonl.gz"),
        (["val.jsonl", "dev.jsonl"], "validation could be dev.jsonl or val.jsonl"),
        (
            ["validation_matched.jsonl", "validation_mismatched.jsonl"],
            "validation could be validation_matched.jsonl",
        ),
        (["test.jsonl", "test/part-0.jsonl"], "test could be test.jsonl or test/part-0.jsonl"),
        (["data/train.jsonl"], "train could be data/train.jsonl or train.jsonl"),
        (["train_1.jsonl"], "train could be train.jsonl or train_1.jsonl"),
        (
            ["test-00000-of-00002.jsonl"],
            "test-00000-of-00002.jsonl is one of 2 shards, and 1 is there",
        ),
        (
            ["traintest.jsonl", "train-test.jsonl"],
            "the name of train-test.jsonl speaks of test and of train",
        ),
    ],
)
def test_two_readings_are_refused_and_both_named(
    tmp_path: Path, names: list[str], said: str
) -> None:
    for name in ("train.jsonl", *names):
        write_file(tmp_path, name, TEST)
    with pytest.raises(UserError) as refused:
        load(tmp_path)
    assert said in str(refused.value)


def test_splits_can_be_chosen_by_name(tmp_path: Path) -> None:
    write_file(tmp_path, "train.jsonl", TRAIN)
    write_file(tmp_path, "validation_matched.jsonl", VALIDATION)
    write_file(tmp_path, "validation_mismatched.jsonl", TEST)
    for name in ("validation_matched", "validation_matched.jsonl"):
        dataset = load(tmp_path, splits={"validation": name})
        assert texts(dataset, "validation") == of(VALIDATION)
        assert "not read: validation_mismatched.jsonl" in dataset.notes
    mixed = load(
        tmp_path, splits={"validation": "*_matched.jsonl", "test": "validation_mismatched"}
    )
    assert texts(mixed, "test") == of(TEST)
    with pytest.raises(
        UserError, match=r"data\.splits: there is no file 'dev' for validation; known: train\.jsonl"
    ):
        load(tmp_path, splits={"validation": "dev"})
    with pytest.raises(
        UserError, match=r"data\.splits: there is no split 'valid'; known: train, validation, test"
    ):
        load(tmp_path, splits={"valid": "dev"})


def test_files_that_name_no_split_beside_some_that_do_are_named(tmp_path: Path) -> None:
    write_file(tmp_path, "train.jsonl", TRAIN)
    write_file(tmp_path, "extra.jsonl", TEST)
    (tmp_path / "numbers.xlsx").write_bytes(b"x")
    dataset = load(tmp_path)
    assert "not read: extra.jsonl, numbers.xlsx" in dataset.notes
    assert texts(dataset, "train", "validation", "test") == of(TRAIN)


def test_a_copy_beside_a_split_is_named_and_one_in_its_place_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path, "train.jsonl", TRAIN)
    (tmp_path / "train.jsonl.bak").write_text("old")
    assert "not read: train.jsonl.bak" in load(tmp_path).notes
    (tmp_path / "test.xlsx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"test\.xlsx would not be read: its ending is unknown"):
        load(tmp_path)
    write_file(tmp_path, "test.csv", TEST)
    assert "not read: test.xlsx, train.jsonl.bak" in load(tmp_path).notes


def test_files_of_which_none_names_a_split_are_refused_unless_they_are_texts(
    tmp_path: Path,
) -> None:
    write_file(tmp_path / "rows", "raw.jsonl", TRAIN)
    write_file(tmp_path / "rows", "clean.jsonl", TEST)
    with pytest.raises(
        UserError, match=r"clean\.jsonl and raw\.jsonl, and neither names a split; choose with"
    ):
        load(tmp_path / "rows")
    assert texts(
        load(tmp_path / "rows", splits={"train": "raw"}), "train", "validation", "test"
    ) == of(TRAIN)
    for at in range(30):
        write_file(tmp_path / "books", f"book of {at}.txt", TRAIN[2 * at : 2 * at + 2])
    dataset = load(tmp_path / "books", group_field="file")
    assert texts(dataset, "train", "validation", "test") == of(TRAIN)
    by_split = [{document.group for document in part} for part in dataset.splits.values()]
    assert sum(map(len, by_split)) == len(set.union(*by_split)) == 30  # no book is in two splits


def test_a_file_given_alone_says_what_lies_beside_it(tmp_path: Path) -> None:
    path = write_file(tmp_path, "train.jsonl", TRAIN)
    write_file(tmp_path, "test.csv", TEST)
    assert any("test.csv beside train.jsonl is not read" in note for note in load(path).notes)


@pytest.mark.parametrize("name", ["test.jsonl", "test", "sub/test.parquet"])
def test_a_link_to_nothing_that_is_named_as_data_is_refused(tmp_path: Path, name: str) -> None:
    write_file(tmp_path, "train.jsonl", TRAIN)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"{name} is a link to nothing"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path: Path, name: str) -> None:
    write_file(tmp_path, "train.parquet", TRAIN)
    os.mkfifo(tmp_path / name)
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=rf"{name} is a pipe, not a file"):
            load(place)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "train.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer",
        ),
        (
            "train.jsonl.gz",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer",
        ),
        ("train.jsonl.gz", b"not gzip", "train.jsonl.gz cannot be unpacked"),
        ("train.jsonl.zst", b"not zstd", "train.jsonl.zst cannot be unpacked"),
        ("train.jsonl.xz", b"not xz", "train.jsonl.xz cannot be unpacked"),
        ("train.jsonl.bz2", b"not bz2", "train.jsonl.bz2 cannot be unpacked"),
        ("train.jsonl.zip", b"not zip", "train.jsonl.zip cannot be unpacked"),
        (
            "train.jsonl.gz",
            gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9],
            "train.jsonl.gz cannot be unpacked",
        ),
        ("train.pkl", b"", "train.pkl may hold a program"),
        ("train.tar.gz", b"", "train.tar.gz is an archive"),
        ("train.xlsx", b"", "train.xlsx is a spreadsheet"),
        ("train.xml", b"", "train.xml has an unknown ending"),
        ("train.feather", b"ARROW1 and then nothing", "cannot be read as Arrow"),
        ("train.arrow", b"nothing", "cannot be read as Arrow"),
        ("train.parquet", b"", "is empty"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        load(tmp_path / name)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("card", "subset", "said"),
    [
        (
            "- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n",
            None,
            "has a, b",
        ),
        ("- config_name: a\n  data_files: a.jsonl\n", "c", "there is no 'c'; known: a"),
        ("- config_name: a\n  data_files: ../a.jsonl\n", None, "outside of the folder"),
        ("- config_name: a\n  data_files: gone-*.jsonl\n", None, "has no such file"),
    ],
)
def test_a_hub_card_that_leaves_a_choice_or_leads_nowhere(
    tmp_path: Path, card: str, subset: str | None, said: str
) -> None:
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    with pytest.raises(UserError) as refused:
        load(tmp_path, subset=subset)
    assert said in str(refused.value)


def test_a_subset_is_a_configuration_of_the_card_or_a_folder(tmp_path: Path) -> None:
    write_file(tmp_path, "one/train.jsonl", TRAIN)
    write_file(tmp_path, "two/train.jsonl", TEST)
    with pytest.raises(
        UserError, match=r"train could be one/train\.jsonl or two/train\.jsonl; .*data\.subset=one"
    ):
        load(tmp_path)
    assert texts(load(tmp_path, subset="one"), "train", "validation", "test") == of(TRAIN)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: {train: one/*.jsonl}\n"
        "- config_name: second\n  default: true\n  data_files: [two/train.jsonl]\n---\n"
    )
    assert texts(load(tmp_path, subset="first"), "train", "validation", "test") == of(TRAIN)
    assert texts(load(tmp_path), "train", "validation", "test") == of(TEST)


def test_saved_folders_name_files_inside_them_alone(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "a", splits=False)
    state = json.loads((tmp_path / "a/state.json").read_text())
    for name in ("../secret.arrow", "/etc/passwd", 3):
        (tmp_path / "a/state.json").write_text(
            json.dumps({**state, "_data_files": [{"filename": name}]})
        )
        with pytest.raises(UserError, match="names no data files"):
            load(tmp_path / "a")


def test_hub_splits_are_chosen_like_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """MNLI's splits, with hidden labels in its tests; IMDB's third split is named."""
    import datasets

    hidden = [{**row, "label": -1} for row in TEST]
    rows = [{**row, "label": n % 2} for n, row in enumerate(TRAIN)]
    valid = [{**row, "label": n % 2} for n, row in enumerate(VALIDATION)]
    parts = {
        "train": rows,
        "validation_matched": valid,
        "validation_mismatched": valid,
        "test_matched": hidden,
        "unsupervised": hidden,
    }
    loaded = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    with pytest.raises(
        UserError,
        match=r"data\.hub: validation could be validation_matched or validation_mismatched",
    ):
        load_dataset(DataConfig(hub="org/name"), CLASSES)
    dataset = load_dataset(
        DataConfig(hub="org/name", splits={"validation": "validation_matched"}), CLASSES
    )
    assert texts(dataset, "validation") == of(VALIDATION)
    assert "not read: validation_mismatched, unsupervised" in dataset.notes
    assert "test is not read: its 12 rows have no labels" in dataset.notes
    assert texts(dataset, "train", "test") == of(TRAIN)


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("depth", [4, 5, 9])
def test_a_split_that_lies_deep_is_read(tmp_path: Path, depth: int, task: Task) -> None:
    write_file(tmp_path, "train.jsonl", TRAIN)
    write_file(tmp_path, "/".join("abcdefghi"[:depth]) + "/val.csv", VALIDATION)
    assert texts(load(tmp_path, task), "validation") == of(VALIDATION)


def test_data_that_is_set_aside_or_that_a_folder_does_not_name_is_named(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "train.jsonl", TRAIN)
    write_file(tmp_path / "a", "_temporary/0/test.jsonl", TEST)
    assert "not read: _temporary/0/test.jsonl" in load(tmp_path / "a").notes
    save_to_disk(tmp_path / "b", splits=False)
    write_file(tmp_path / "b", "test.jsonl", TEST)
    assert "not read: test.jsonl" in load(tmp_path / "b").notes
    write_file(tmp_path / "c", "first.jsonl", TRAIN)
    write_file(tmp_path / "c", "deep/second.jsonl", TEST)
    (tmp_path / "c/README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files: first.jsonl\n---\n"
    )
    assert "not read: deep/second.jsonl" in load(tmp_path / "c").notes


def test_a_folder_of_too_many_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.folders.MOST_FILES", 20)
    for at in range(21):
        (tmp_path / f"a/{at}").mkdir(parents=True)
    with pytest.raises(UserError, match="has more than 20 files"):
        load(tmp_path)


# --- class folders, TREC, one JSON file ----------------------------------------------------------


def _write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def _mail(split: str, ending: str = ".txt", classes: str = "ham spam") -> dict[str, str | bytes]:
    return {
        f"{split}/{name}/{at}{ending}": f"{split} {name} letter {at}\n\nits second paragraph\n"
        for name in classes.split()
        for at in range(30)
    }


def test_what_is_no_document_of_a_class_is_named(tmp_path: Path) -> None:
    _write(tmp_path, **_mail("box/train", classes="ham spam unsup"), **_mail("box/test"))
    _write(
        tmp_path,
        **{
            "box/words.vocab": "a",
            "box/er.txt": "1",
            "box/train/urls_ham.txt": "http",
            "box/README": "x",
        },
    )
    dataset = load(tmp_path, CLASSES)
    assert dataset.labels == ("ham", "spam")
    assert all(
        f" {dataset.labels[each.label or 0]} " in each.text for each in dataset.splits["test"]
    )
    # a file, and no paragraph of it
    assert "box/test ham letter 3\n\nits second paragraph" in texts(dataset, "test")
    said = (
        "not read: box/er.txt, box/train/unsup (30 files without a class), box/train/urls_ham.txt,"
        " box/words.vocab"
    )
    assert said in dataset.notes
    assert (
        "a class is a sub-folder and a document is a file, of which there are: train 60, test 60"
        in dataset.notes
    )
    grouped = load(tmp_path, CLASSES, group_field="file")
    assert {each.group for each in grouped.splits["test"]} >= {"box/test/ham/3.txt"}


def test_class_folders_of_a_split_are_chosen(tmp_path: Path) -> None:
    _write(tmp_path, **_mail("train"), **_mail("dev_a"), **_mail("dev_b"))
    with pytest.raises(
        UserError,
        match=r"validation could be dev_a or dev_b; choose with data\.splits=\{validation",
    ):
        load(tmp_path, CLASSES)
    dataset = load(tmp_path, CLASSES, splits={"validation": "dev_b"})
    assert all(text.startswith("dev_b") for text in texts(dataset, "validation"))
    with pytest.raises(UserError, match=r"data\.splits: there is no folder 'dev_c' with classes"):
        load(tmp_path, CLASSES, splits={"validation": "dev_c"})


@pytest.mark.parametrize(
    "more",
    [
        {"rows.jsonl": "{}"},  # a file of rows: the texts beside it are not documents of classes
        {"ham/deeper/1.txt": "a"},  # two levels
    ],
)
def test_texts_in_folders_that_could_be_something_else_are_no_classes(
    tmp_path: Path, more: dict[str, str]
) -> None:
    with pytest.raises(UserError):
        load(_write(tmp_path, **_mail(".", classes="ham spam"), **more), CLASSES)


def test_class_folders_are_texts_for_a_language_model(tmp_path: Path) -> None:
    dataset = load(_write(tmp_path, **_mail("train"), **_mail("test")))
    assert "its second paragraph" in texts(dataset, "test", "train")
    assert dataset.labels is None


def test_old_texts_are_latin_1(tmp_path: Path) -> None:
    _write(
        tmp_path / "a", **_mail("train", ""), **{"train/ham/old": "d\xe9j\xe0 vu".encode("latin-1")}
    )
    dataset = load(tmp_path / "a", CLASSES)
    assert "d\xe9j\xe0 vu" in texts(dataset, "train", "validation", "test")
    assert "old is no UTF-8, and is read as LATIN-1" in dataset.notes
    (tmp_path / "b.txt").write_bytes("d\xe9j\xe0 vu".encode("latin-1"))
    with pytest.raises(UserError, match=r"b\.txt line 1 is not UTF-8"):
        load(tmp_path / "b.txt")


def test_trec_has_two_classes_for_a_line_and_the_coarse_one_is_read(tmp_path: Path) -> None:
    lines = [
        f"{('LOC:city', 'LOC:other', 'HUM:ind', 'ENTY:other')[n % 4]} Where is number {n} ?"
        for n in range(80)
    ]
    path = tmp_path / "train_1000.label"
    path.write_bytes(("\n".join(lines) + "\nHUM:ind Who was Andr\xe9 ?\n").encode("latin-1"))
    dataset = load(path, CLASSES)
    assert dataset.labels == ("ENTY", "HUM", "LOC")
    assert "Who was Andr\xe9 ?" in texts(dataset, "train", "validation", "test")
    assert "rows are text with label; not read: fine_label" in dataset.notes
    finer = load(path, CLASSES, columns={"label": "fine_label"})
    assert finer.labels == ("ENTY:other", "HUM:ind", "LOC:city", "LOC:other")
    assert load(path).labels is None
    write_file(tmp_path, "TREC_10.label", TEST)
    assert any(
        "TREC_10.label beside train_1000.label is not read" in note
        for note in load(path, CLASSES).notes
    )
    path.write_text("LOC:city Where ?\n1 2 3\n")
    with pytest.raises(UserError, match=r"train_1000\.label line 2 is not CLASS:finer text"):
        load(path, CLASSES)


@pytest.mark.parametrize("whole", [False, True])
def test_splits_in_one_json_file(tmp_path: Path, whole: bool) -> None:
    parts = {
        "training": TRAIN,
        "dev_a": VALIDATION,
        "dev_b": TEST,
        "test": {name: [row[name] for row in TEST] for name in TEST[0]},
        "authors": [{"name": "a"}],
    }
    path = tmp_path / "all.json"
    path.write_text(json.dumps(parts))
    place = tmp_path if whole else path
    with pytest.raises(
        UserError, match=r"validation could be dev_a or dev_b; choose with data\.splits"
    ):
        load(place, CLASSES)
    dataset = load(place, CLASSES, splits={"validation": "dev_a"})
    given = [texts(dataset, split) for split in ("train", "validation", "test")]
    assert given == [of(TRAIN), of(VALIDATION), of(TEST)]
    assert {"all.json holds train, validation, test", "not read: dev_b, authors"} <= set(
        dataset.notes
    )
    path.write_text(json.dumps({**parts, "dev_a": [], "dev_b": 0}))
    with pytest.raises(UserError, match="the validation split has no documents"):
        load(place, CLASSES)
    path.write_text(json.dumps({"test": TEST, "dev": VALIDATION}))
    with pytest.raises(UserError, match="has no train split; it has test, dev"):
        load(place, CLASSES)


def test_a_fault_in_one_json_file_is_named_with_its_split(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b"}]
    (tmp_path / "all.json").write_text(json.dumps({"train": TRAIN, "validation": rows}))
    with pytest.raises(UserError, match=r"all\.json validation row 2 has no field 'label'"):
        load(tmp_path, CLASSES)
