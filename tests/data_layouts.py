"""Folders of data made on the spot: every format, compression and layout that is read
(docs/data.md).

`write_file` writes rows as one file; `LAYOUTS` makes a folder of a layout; `CELLS` and `ROW_CELLS`
are all that is supported: `(what, make, expect)`, for tests and for the table in the docs.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

Rows = Sequence[dict[str, Any]]

TRAIN = [
    {"text": f"a document of train, number {n}", "label": ("no", "yes")[n % 2]} for n in range(60)
]
TEST = [{"text": f"something tested, at {n}", "label": ("no", "yes")[n % 2]} for n in range(12)]
VALIDATION = [{"text": f"validated: {n} of them", "label": ("no", "yes")[n % 2]} for n in range(10)]


def _delimited(rows: Rows, separator: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys(), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _arrow_stream(rows: Rows) -> bytes:
    table, sink = pa.Table.from_pylist(list(rows)), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _to_buffer(write: Callable[[pa.Table, Any], None]) -> Callable[[Rows], bytes]:
    def made(rows: Rows) -> bytes:
        sink = io.BytesIO()
        write(pa.Table.from_pylist(list(rows)), sink)
        return sink.getvalue()

    return made


FORMATS: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": lambda rows: json.dumps(list(rows), indent=1).encode(),
    ".csv": lambda rows: _delimited(rows, ","),
    ".tsv": lambda rows: _delimited(rows, "\t"),
    ".parquet": _to_buffer(pq.write_table),
    ".feather": _to_buffer(feather.write_feather),
    ".arrow": _arrow_stream,
    ".txt": lambda rows: "\n".join(row["text"] for row in rows).encode(),
    ".label": (
        lambda rows: "".join(f"{row['label']}:finer {row['text']}\n" for row in rows).encode(
            "latin-1"
        )
    ),
}


def _zipped(raw: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("inside", raw)
    return sink.getvalue()


def _zst(raw: bytes) -> bytes:
    return pa.compress(raw, codec="zstd", asbytes=True)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zst,
    ".zip": _zipped,
}


def write_file(folder: Path, name: str, rows: Rows) -> Path:
    """Write rows as the file `name`, whose endings say how."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = next(
        (ending for ending in COMPRESSIONS if ending and name.lower().endswith(ending)), ""
    )
    bare = name.lower().removesuffix(packed)
    raw = next(make for ending, make in FORMATS.items() if bare.endswith(ending))(rows)
    path.write_bytes(COMPRESSIONS[packed](raw))
    return path


def _named(*names: tuple[str, str]) -> Callable[[Path, str], None]:
    """Return what makes a folder of files: names without their ending, and what is in each."""
    parts = {"train": TRAIN, "test": TEST, "validation": VALIDATION}

    def made(folder: Path, ending: str) -> None:
        for name, what in names:
            split, _, piece = what.partition(" ")  # "train 1/3": the first of three pieces
            rows: Rows = parts[split]
            if piece:
                at, count = map(int, piece.split("/"))
                rows = rows[(at - 1) * len(rows) // count : at * len(rows) // count]
            write_file(folder, name + ending, rows)

    return made


def _card(folder: Path, ending: str) -> None:
    _named(("files/a", "train"), ("files/b-1", "test 1/2"), ("files/b-2", "test 2/2"))(
        folder, ending
    )
    (folder / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        f"    path: files/a{ending}\n  - split: test\n    path: files/b-*{ending}\n---\n# Card\n"
    )


def _shards(folder: Path, ending: str) -> None:
    _named(
        *((f"train-0000{at - 1}-of-00003", f"train {at}/3") for at in (1, 2, 3)), ("test", "test")
    )(folder, ending)


LAYOUTS: dict[str, Callable[[Path, str], None]] = {
    "train and test": _named(("train", "train"), ("test", "test")),
    "other names": _named(("training", "train"), ("Testing", "test"), ("DEV", "validation")),
    "valid": _named(("Train", "train"), ("TEST", "test"), ("valid", "validation")),
    "eval": _named(("train", "train"), ("test", "test"), ("eval", "validation")),
    "word of a name": _named(
        ("sst-train", "train"), ("sst-test", "test"), ("sst-val", "validation")
    ),
    "Hub shards": _shards,
    "numbered": _named(("train_1", "train 1/2"), ("train_2", "train 2/2"), ("test", "test")),
    "sub-folders": _named(("train/x", "train"), ("test/y", "test")),
    "sub-folders of parts": _named(
        ("train/part-0", "train 1/2"), ("train/part-1", "train 2/2"), ("test/part-0", "test")
    ),
    "data/": _named(("data/train-00000-of-00001", "train"), ("data/test-00000-of-00001", "test")),
    "Hub card": _card,
}

ONE_SPLIT: dict[str, Callable[[Path, str], None]] = {
    "one file": _named(("anything at all", "train")),
    "parts": _named(*((f"part-{at}", f"train {at + 1}/12") for at in range(12))),
}


def _class_folders(split: str, rows: Rows, ending: str) -> Callable[[Path], None]:
    """Return what writes each row as a file of its own, in a folder of its class."""

    def made(folder: Path) -> None:
        for at, row in enumerate(rows):
            path = folder / split / row["label"] / f"{at}_7{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(row["text"] + "\n")

    return made


def _together(*makers: Callable[[Path], None]) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        for make in makers:
            make(folder)

    return made


def _trec(folder: Path) -> None:
    write_file(folder, "train_5500.label", TRAIN)
    write_file(folder, "TREC_10.label", TEST)


def _one_json(folder: Path) -> None:
    (folder / "everything.json").write_text(
        json.dumps({"version": 2, "train": TRAIN, "test": TEST})
    )


OWN_LAYOUTS: dict[str, Callable[[Path], None]] = {
    "class folders, as aclImdb": _together(
        _class_folders("train", TRAIN, ".txt"), _class_folders("test", TEST, ".txt")
    ),
    "class folders of files without an ending, as the 20 newsgroups": _together(
        _class_folders("news-bydate-train", TRAIN, ""), _class_folders("news-bydate-test", TEST, "")
    ),
    "class folders without splits": _class_folders("", [*TRAIN, *TEST], ".txt"),
    "TREC's question classes": _trec,
    "splits in one JSON file": _one_json,
}
"""Layouts that have formats of their own, with the labels no and yes, for sequence_classification.
"""


def save_to_disk(folder: Path, *, splits: bool) -> None:
    """Save as `datasets` does, a DatasetDict or a Dataset."""
    import datasets

    train = datasets.Dataset.from_list(TRAIN)
    if splits:
        datasets.DatasetDict(train=train, test=datasets.Dataset.from_list(TEST)).save_to_disk(
            folder
        )
    else:
        train.save_to_disk(folder)


# --- rows ----------------------------------------------------------------------------------------


def _chat(**more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "q {n}"},
            {"role": "assistant", "content": "a {n}", **more},
        ]
    }


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

ROW_CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {"text": "t {n}"}),
    "one column of another name": ("text", {"content": "t {n}"}),
    "prompt, completion": ("prompt completion", {"prompt": "p {n}", "completion": " c {n}"}),
    "prompt, response": ("prompt completion", {"prompt": "p {n}", "response": "c {n}"}),
    "question, answer": ("prompt completion", {"question": "p {n}", "answer": "c {n}"}),
    "query, response": ("prompt completion", {"query": "p {n}", "response": "c {n}"}),
    "input, output": ("prompt completion", {"input": "p {n}", "output": "c {n}"}),
    "prompt, completion of messages": (
        "prompt completion",
        {
            "prompt": [{"role": "user", "content": "p {n}"}],
            "completion": [{"role": "assistant", "content": "c"}],
        },
    ),
    "instruction, input, output": (
        "alpaca",
        {"instruction": "do {n}", "input": "in", "output": "out {n}"},
    ),
    "instruction, output": ("alpaca", {"instruction": "do {n}", "output": "out {n}"}),
    "instruction, context, response": (
        "alpaca",
        {"instruction": "do {n}", "context": "", "response": "out {n}"},
    ),
    "conversations of from, value": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q {n}"}, {"from": "gpt", "value": "a"}]},
    ),
    "conversations with system, tools": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q {n}"},
                {"from": "function_call", "value": '{"name": "f"}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "system": "s",
            "tools": "[]",
        },
    ),
    "messages": ("messages", _chat()),
    "messages with reasoning_content": ("messages", _chat(reasoning_content="hm")),
    "messages with thinking": ("messages", _chat(thinking="hm")),
    "messages with tool_calls and tools": (
        "messages",
        {**_chat(tool_calls=[CALL], content=None), "tools": [{"type": "function", "function": {}}]},
    ),
    "messages with weight": (
        "messages",
        {"messages": [*_chat(weight=0)["messages"], *_chat(weight=1)["messages"]]},
    ),
    "messages of parts": ("messages", _chat(content=[{"type": "text", "text": "a {n}"}])),
    "messages of other roles": (
        "messages",
        {"messages": [{"role": "human", "content": "q {n}"}, {"role": "model", "content": "a"}]},
    ),
    "messages as JSON": ("messages", {"messages": json.dumps(_chat()["messages"])}),
}
"""For causal_lm: what the note calls the rows, and a row with `{n}` for its number."""

LABELLED_CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "text, label": ("text with label", {"text": "t {n}", "label": None}),
    "sentence, label": ("text with label", {"sentence": "t {n}", "label": None}),
    "idx, review, sentiment": ("text with label", {"idx": 0, "review": "t {n}", "sentiment": None}),
    **{
        ", ".join(pair): (
            "text pair with label",
            {pair[0]: "t {n}", pair[1]: "u {n}", "label": None},
        )
        for pair in (
            ("premise", "hypothesis"),
            ("sentence1", "sentence2"),
            ("question", "sentence"),
            ("text_a", "text_b"),
            ("question1", "question2"),
            ("Text 1", "Text 2"),
            ("text", "text_pair"),
            ("query", "passage"),
        )
    },
}
"""For sequence_classification; null stands for the label."""


def numbered(row: Any, n: int, label: Any = None) -> Any:
    """Return a row of `ROW_CELLS` or `LABELLED_CELLS` with its number, and its label in place of
    null.
    """
    if isinstance(row, dict):
        return {
            name: label if value is None and name in ("label", "sentiment") else numbered(value, n)
            for name, value in row.items()
        }
    if isinstance(row, list):
        return [numbered(value, n) for value in row]
    return row.replace("{n}", str(n)) if isinstance(row, str) else row
