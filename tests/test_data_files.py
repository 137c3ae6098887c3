"""The same documents from every kind of file, and from a dataset folder through the library
`datasets`.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.settings.data import DataConfig
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

TEXTS = [f'document {number}, with "quotes", é and\na second line' for number in range(60)]
ROWS = [{"text": text, "label": ("no", "yes")[number % 2]} for number, text in enumerate(TEXTS)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def texts(dataset: Any) -> dict[str, list[tuple[str, int | None]]]:
    return {
        split: [(d.text, d.label) for d in documents] for split, documents in dataset.splits.items()
    }


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("task", list(Task))
def test_every_kind_of_file_gives_the_same_documents(
    tmp_path: Path, suffix: str, task: Task
) -> None:
    expected = load_dataset(DataConfig(path=str(write(tmp_path / "a.jsonl", ROWS))), task)
    found = load_dataset(DataConfig(path=str(write(tmp_path / f"a{suffix}", ROWS))), task)
    assert texts(found) == texts(expected)
    assert found.labels == (("no", "yes") if task is Task.sequence_classification else None)
    assert sum(map(len, found.splits.values())) == 60


def test_a_folder_has_one_file_a_split_of_any_kind(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ROWS[:40])
    write(tmp_path / "test.csv", ROWS[40:])
    dataset = load_dataset(DataConfig(path=str(tmp_path)), Task.sequence_classification)
    assert [text for text, _ in texts(dataset)["test"]] == TEXTS[40:]
    assert len(dataset.splits["train"]) + len(dataset.splits["validation"]) == 40
    assert any(
        note.startswith("validation cut from train by content hash") for note in dataset.notes
    )
    write(tmp_path / "test.jsonl", ROWS[40:])
    with pytest.raises(
        UserError, match=r"test could be test\.csv or test\.jsonl; choose with data\.splits"
    ):
        load_dataset(DataConfig(path=str(tmp_path)), Task.sequence_classification)


def test_plain_text_and_byte_order_marks_and_crlf(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf"
        + b"".join(json.dumps({"text": f"t{n}"}).encode() + b"\r\n" for n in range(60))
    )
    dataset = load_dataset(DataConfig(path=str(tmp_path / "a.jsonl")), Task.causal_lm)
    assert {text for part in texts(dataset).values() for text, _ in part} == {
        f"t{n}" for n in range(60)
    }
    (tmp_path / "a.txt").write_text("\n".join(f"line {n}" for n in range(60)))
    dataset = load_dataset(DataConfig(path=str(tmp_path / "a.txt")), Task.causal_lm)
    assert "line 7" in " ".join(text for part in texts(dataset).values() for text, _ in part)


def test_fields_have_the_names_they_are_given(tmp_path: Path) -> None:
    rows = [
        {"headline": row["text"], "sentence": row["text"], "verdict": row["label"]} for row in ROWS
    ]
    path = str(write(tmp_path / "a.jsonl", rows))
    config = DataConfig(path=path, columns={"text": "sentence", "label": "verdict"})
    assert load_dataset(config, Task.sequence_classification).labels == ("no", "yes")
    with pytest.raises(
        UserError, match=r"headline, sentence hold text: say what each is, e\.g\. data\.columns"
    ):
        load_dataset(DataConfig(path=path), Task.causal_lm)
    with pytest.raises(
        UserError,
        match=r"no field 'label'; choose one of verdict with data\.columns=\{text: sentence, label",
    ):
        load_dataset(
            DataConfig(path=path, columns={"text": "sentence"}), Task.sequence_classification
        )
    with pytest.raises(
        UserError, match=r"data\.columns: there is no column 'body'; there are headline, sentence"
    ):
        load_dataset(DataConfig(path=path, columns={"text": "body"}), Task.causal_lm)


def test_chats_keep_their_turns(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
        for n in range(60)
    ]
    dataset = load_dataset(DataConfig(path=str(write(tmp_path / "a.jsonl", rows))), Task.causal_lm)
    first, *_ = dataset.splits["train"]
    assert first.messages is not None
    assert [turn["role"] for turn in first.messages] == ["user", "assistant"]


def test_a_dataset_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the layout of a Hub dataset: what `data.hub=org/name` reads, without the
    network.
    """
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "set@home"  # an @ in a folder's name begins no revision
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:40])
    write(folder / "test.jsonl", ROWS[40:])
    dataset = load_dataset(DataConfig(hub=str(folder)), Task.sequence_classification)
    assert dataset.labels == ("no", "yes")
    assert [text for text, _ in texts(dataset)["test"]] == TEXTS[40:]
    with pytest.raises(
        UserError, match=r"cannot be loaded .*; check its name, data\.subset and the network"
    ) as error:
        load_dataset(DataConfig(hub=str(tmp_path / "nowhere")), Task.causal_lm)
    assert len(str(error.value).splitlines()) == 1


def test_a_dataset_folder_that_is_damaged_or_a_program_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    for name, content, said in (
        ("a/train.jsonl", '{"text": ', "train.jsonl line 1 is not JSON"),
        ("b/test.jsonl", '{"text": "a"}', "has no train file; it has test.jsonl"),
        ("c/c.py", f"open({str(tmp_path / 'ran')!r}, 'w')", "has no data file"),
        ("d/notes.bin", "", "has no data file; it has notes.bin"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"^data\.hub: .*{said}") as refused:
            load_dataset(DataConfig(hub=str((tmp_path / name).parent)), Task.causal_lm)
        assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_the_revision_asked_for_is_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **more: Any) -> Any:
        asked.append((*args, more["revision"]))
        return datasets.DatasetDict(
            train=datasets.Dataset.from_list(ROWS[:40]),
            valid=datasets.Dataset.from_list(ROWS[40:]),
            test=datasets.Dataset.from_list(
                [{"text": f"hidden {n}", "label": -1} for n in range(3)]
            ),
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = Task.sequence_classification
    dataset = load_dataset(DataConfig(hub="org/name@v2", subset="part"), task)
    assert asked == [("org/name", "part", "v2")]
    assert [text for text, _ in texts(dataset)["validation"]] == TEXTS[40:]
    # cut from train instead
    assert all(label is not None and label >= 0 for _, label in texts(dataset)["test"])
    assert load_dataset(DataConfig(hub="org/name@v3", subset="part"), task).digest != dataset.digest


def test_class_names_of_a_hub_dataset_keep_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted by name they would change places."""
    import datasets

    rows = [{"text": f"text {n}", "label": n % 2} for n in range(60)]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["up", "down"])}
    )
    loaded = datasets.DatasetDict(train=datasets.Dataset.from_list(rows, features=features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    dataset = load_dataset(DataConfig(hub="org/name"), Task.sequence_classification)
    assert dataset.labels == ("up", "down")
    assert all(
        label == int(text.split()[1]) % 2
        for split in texts(dataset).values()
        for text, label in split
    )


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """A byte order mark, CRLF, class numbers as text, a field longer than the csv module's default
    limit.
    """
    lines = [f"document {n},{n % 2}" for n in range(100)]
    (tmp_path / "a.csv").write_bytes("\ufefftext,label\r\n".encode() + "\r\n".join(lines).encode())
    dataset = load_dataset(DataConfig(path=str(tmp_path / "a.csv")), Task.sequence_classification)
    assert dataset.labels == ("0", "1")
    assert all(
        int(text.split()[1]) % 2 == label
        for part in texts(dataset).values()
        for text, label in part
    )
    (tmp_path / "b.csv").write_text(
        "text\n" + "\n".join(f'"{"long " * 40_000}{n}"' for n in range(60))
    )
    dataset = load_dataset(DataConfig(path=str(tmp_path / "b.csv")), Task.causal_lm)
    assert {len(text) > 200_000 for part in texts(dataset).values() for text, _ in part} == {True}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('text\nfine\n"open', "line 3: unexpected end of data"),
        ("text,label\na,1\nb\n", "line 3 has another number of columns than the header"),
        ("text\na,b\n", "line 2 has another number of columns than the header"),
        ("text,label\n", "the train split has no documents"),
        ("text,label\na,1\nb,\n", "line 3 has label ''"),
    ],
)
def test_csv_that_is_not_whole_is_refused_by_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    task = Task.sequence_classification if "label" in content else Task.causal_lm
    with pytest.raises(UserError, match=said):
        load_dataset(DataConfig(path=str(tmp_path / "a.csv")), task)


def test_parquet_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    offsets, half = np.array([0, 2], np.int32).tobytes(), b"\xff\xfe"
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(half)]
    )
    for table, said in (
        (pa.table({"text": broken}), "cannot be read as Parquet"),
        (pa.table({"text": pa.array(["a", None])}), "row 2: text is null"),
        (
            pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}),
            "has no documents",
        ),
    ):
        pq.write_table(table, path)
        task = Task.sequence_classification if "label" in table.column_names else Task.causal_lm
        with pytest.raises(UserError, match=said):
            load_dataset(DataConfig(path=str(path)), task)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load_dataset(DataConfig(path=str(path)), Task.causal_lm)


def test_text_is_cut_at_blank_lines_or_else_at_line_ends_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(
        b"".join(b"head %d\r\nbody\x0cand \xe2\x80\xa8 more\r\n\r\n\r\n" % n for n in range(90))
    )
    dataset = load_dataset(DataConfig(path=str(tmp_path / "a.txt")), Task.causal_lm)
    found = {text for part in texts(dataset).values() for text, _ in part}
    assert found == {f"head {n}\nbody\x0cand \u2028 more" for n in range(90)}
    (tmp_path / "b.txt").write_text(
        "".join(f"one \x0c \x85 {n}\n" for n in range(90)), encoding="utf-8"
    )
    dataset = load_dataset(DataConfig(path=str(tmp_path / "b.txt")), Task.causal_lm)
    assert {text for part in texts(dataset).values() for text, _ in part} == {
        f"one \x0c \x85 {n}" for n in range(90)
    }


def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")

    def fail(*_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipeline.data.formats.open_file", fail)
    with pytest.raises(
        UserError, match=r"a\.txt cannot be read \(Permission denied\); check the file"
    ):
        load_dataset(DataConfig(path=str(tmp_path / "a.txt")), Task.causal_lm)
