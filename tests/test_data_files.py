"""The same documents from every kind of file, and from a dataset folder through the library `datasets`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_assess_models import random_documents

from pipeline.config import DataConfig, Task
from pipeline.data.batches import IGNORE, PackedBatches, PaddedBatches
from pipeline.data.load import load_dataset
from pipeline.errors import UserError

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
    return {split: [(d.text, d.label) for d in documents] for split, documents in dataset.splits.items()}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("task", list(Task))
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, suffix: str, task: Task) -> None:
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
    assert "validation cut from train by content hash" in dataset.notes
    write(tmp_path / "test.jsonl", ROWS[40:])
    with pytest.raises(UserError, match="keep one file per split"):
        load_dataset(DataConfig(path=str(tmp_path)), Task.sequence_classification)


def test_plain_text_and_byte_order_marks_and_crlf(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"".join(json.dumps({"text": f"t{n}"}).encode() + b"\r\n" for n in range(60))
    )
    dataset = load_dataset(DataConfig(path=str(tmp_path / "a.jsonl")), Task.causal_lm)
    assert {text for part in texts(dataset).values() for text, _ in part} == {f"t{n}" for n in range(60)}
    (tmp_path / "a.txt").write_text("\n".join(f"line {n}" for n in range(60)))
    dataset = load_dataset(DataConfig(path=str(tmp_path / "a.txt")), Task.causal_lm)
    assert "line 7" in " ".join(text for part in texts(dataset).values() for text, _ in part)


def test_fields_have_the_names_they_are_given(tmp_path: Path) -> None:
    rows = [{"sentence": row["text"], "gold": row["label"]} for row in ROWS]
    config = DataConfig(path=str(write(tmp_path / "a.jsonl", rows)), text_field="sentence", label_field="gold")
    assert load_dataset(config, Task.sequence_classification).labels == ("no", "yes")
    said = "a.jsonl line 1 has no field '{}'; set data.{} to one of sentence, gold"
    with pytest.raises(UserError, match=said.format("label", "label_field")):
        load_dataset(DataConfig(path=config.path), Task.sequence_classification)
    with pytest.raises(UserError, match=said.format("text", "text_field")):
        load_dataset(DataConfig(path=config.path), Task.causal_lm)


def test_chats_keep_their_turns(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
            for n in range(60)]  # fmt: skip
    dataset = load_dataset(DataConfig(path=str(write(tmp_path / "a.jsonl", rows))), Task.causal_lm)
    (first, *_) = dataset.splits["train"]
    assert first.messages is not None
    assert [role for role, _ in first.messages] == ["user", "assistant"]


def test_a_dataset_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the layout of a Hub dataset: what `data.hub=org/name` reads, without the network."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:40])
    write(folder / "test.jsonl", ROWS[40:])
    dataset = load_dataset(DataConfig(hub=str(folder)), Task.sequence_classification)
    assert dataset.labels == ("no", "yes")
    assert [text for text, _ in texts(dataset)["test"]] == TEXTS[40:]
    with pytest.raises(UserError, match=r"cannot be loaded .*; check its name, data\.subset and the network") as error:
        load_dataset(DataConfig(hub=str(tmp_path / "nowhere")), Task.causal_lm)
    assert len(str(error.value).splitlines()) == 1


def test_a_dataset_folder_that_is_damaged_or_a_program_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    for name, content, said in (
        ("a/train.jsonl", '{"text": ', "JSON parse error"),
        ("b/test.jsonl", '{"text": "a"}', "has no train split; it has test"),
        ("c/c.py", f"open({str(tmp_path / 'ran')!r}, 'w')", "scripts are no longer supported"),
        ("d/notes.bin", "", "No \\(supported\\) data files"),
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
            test=datasets.Dataset.from_list([{"text": f"hidden {n}", "label": -1} for n in range(3)]),
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = Task.sequence_classification
    dataset = load_dataset(DataConfig(hub="org/name@v2", subset="part"), task)
    assert asked == [("org/name", "part", "v2")]
    assert [text for text, _ in texts(dataset)["validation"]] == TEXTS[40:]
    assert all(label is not None and label >= 0 for _, label in texts(dataset)["test"])  # cut from train instead
    assert load_dataset(DataConfig(hub="org/name@v3", subset="part"), task).digest != dataset.digest


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """A byte order mark, CRLF, class numbers as text, a field longer than the csv module's default limit."""
    lines = [f"document {n},{n % 2}" for n in range(100)]
    (tmp_path / "a.csv").write_bytes("\ufefftext,label\r\n".encode() + "\r\n".join(lines).encode())
    dataset = load_dataset(DataConfig(path=str(tmp_path / "a.csv")), Task.sequence_classification)
    assert dataset.labels == ("0", "1")
    assert all(int(text.split()[1]) % 2 == label for part in texts(dataset).values() for text, label in part)
    (tmp_path / "b.csv").write_text("text\n" + "\n".join(f'"{"long " * 40_000}{n}"' for n in range(60)))
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
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(half)])
    for table, said in (
        (pa.table({"text": broken}), "cannot be read as Parquet"),
        (pa.table({"text": pa.array(["a", None])}), "row 2: text is NoneType"),
        (pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), "has no documents"),
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
    (tmp_path / "b.txt").write_text("".join(f"one \x0c \x85 {n}\n" for n in range(90)), encoding="utf-8")
    dataset = load_dataset(DataConfig(path=str(tmp_path / "b.txt")), Task.causal_lm)
    assert {text for part in texts(dataset).values() for text, _ in part} == {f"one \x0c \x85 {n}" for n in range(90)}


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def fail(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\); check the file"):
        load_dataset(DataConfig(path=str(tmp_path / "a.txt")), Task.causal_lm)


# -- batches --------------------------------------------------------------------------------------------------------

LENGTHS = [9, 30, 5, 17, 40, 12, 25, 33, 8, 21, 2, 64]


def test_packing_reads_every_token_once_an_epoch_and_crosses_no_boundary() -> None:
    documents = random_documents(LENGTHS)
    packed = PackedBatches(documents, sequence_length=14, batch_size=1, seed=3)
    everything = np.concatenate([document.input_ids for document in documents])
    assert packed.num_rows == len(everything) // 14
    rows = [row for step in range(packed.num_rows) for row in zip(*packed.batch(step).values(), strict=True)]
    seen = sorted(tuple(ids.tolist()) for ids, _, _ in rows)
    windows = everything[: packed.num_rows * 14].reshape(-1, 14)
    assert seen == sorted(tuple(window.tolist()) for window in windows)
    following = {}  # (document, position) -> what is predicted there
    place = [(number, at) for number, document in enumerate(documents) for at in range(len(document.input_ids))]
    for number, document in enumerate(documents):
        for at in range(len(document.input_ids) - 1):
            if document.targets[at + 1]:
                following[number, at] = int(document.input_ids[at + 1])
    by_window = {tuple(window.tolist()): place[14 * index : 14 * index + 14] for index, window in enumerate(windows)}
    for ids, labels, positions in rows:
        places = by_window[tuple(ids.tolist())]
        assert labels.tolist() == [following.get(where, IGNORE) for where in places]
        restarts = [0, *(i for i in range(1, 14) if places[i][0] != places[i - 1][0])]
        expected = [i - max(start for start in restarts if start <= i) for i in range(14)]
        assert positions.tolist() == expected


def test_batches_are_a_function_of_seed_and_step() -> None:
    documents = random_documents(LENGTHS)

    def make(seed: int) -> PackedBatches:
        return PackedBatches(documents, sequence_length=14, batch_size=2, seed=seed)

    ids = lambda batches, step: batches.batch(step)["input_ids"].tolist()
    late = make(3)
    assert ids(late, 5) == ids(make(3), 5)  # without having read the steps before
    assert ids(late, 5) != ids(make(4), 5)
    epochs = [ids(late, step) for step in range(2 * late.num_rows // 2)]
    assert epochs[: late.num_rows // 2] != epochs[late.num_rows // 2 :]


def test_padding_is_on_the_right_and_masked() -> None:
    documents = random_documents([5, 9, 3])
    batch = PaddedBatches(documents, batch_size=3, seed=0, pad_id=0).batch(0)
    by_length = {len(document.input_ids): document for document in documents}
    for ids, mask, label in zip(*batch.values(), strict=True):
        document = by_length[int(mask.sum())]
        length = len(document.input_ids)
        assert ids.tolist() == [*document.input_ids.tolist(), *[0] * (9 - length)]
        assert mask.tolist() == [1] * length + [0] * (9 - length)
        assert int(label) == document.label


def test_less_than_one_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="all of train is 5 tokens, less than one sequence"):
        PackedBatches(random_documents([5]), sequence_length=14, batch_size=2, seed=0)
