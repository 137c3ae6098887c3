"""What single files hold: encodings, separators, headers, kinds of JSON; each fault is named with
its line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings.data import DataConfig
from pipeline.data.documents import Dataset
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

LM, CLASSES = Task.causal_lm, Task.sequence_classification
LINES = [f"caf\u00e9 number {n}" for n in range(60)]


def load(path: Path, content: bytes | str, task: Task = LM, **more: Any) -> Dataset:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_dataset(DataConfig(path=str(path), **more), task)


def texts(dataset: Dataset) -> set[str]:
    return {document.text for part in dataset.splits.values() for document in part}


def refused(path: Path, content: bytes | str, task: Task = LM) -> str:
    with pytest.raises(UserError) as error:
        load(path, content, task)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".json"])
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-8"]
)
def test_encodings_are_told_by_marks_and_zeros(tmp_path: Path, ending: str, encoding: str) -> None:
    whole = {
        ".txt": "\n".join(LINES),
        ".jsonl": "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in LINES),
        ".json": json.dumps([{"text": line} for line in LINES], ensure_ascii=False),
        ".csv": "\n".join(["text", *LINES]),
    }[ending]
    dataset = load(tmp_path / f"a{ending}", whole.encode(encoding))
    assert texts(dataset) == set(LINES)
    said = any("is read as UTF-" in note for note in dataset.notes)
    assert said == (not encoding.startswith("utf-8"))


def test_scripts_without_letters_below_256_are_told_too(tmp_path: Path) -> None:
    lines = [f"\u65e5\u672c\u8a9e\u306e\u6587\u7ae0 {chr(0x4E00 + n)}" for n in range(60)]
    for encoding in ("utf-16-le", "utf-16-be"):
        assert texts(load(tmp_path / "a.txt", "\n".join(lines).encode(encoding))) == set(lines)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ok\ncaf\u00e9\n".encode("latin-1"), "a.txt line 2 is not UTF-8; save the file as UTF-8"),
        (b"\xff\xfeo\x00k\x00\n\x00\x00\xd8x\x00", "a.txt line 2 is not UTF-16"),
        (b"ok\n" + b"\x00\x01\x02" * 99, "a.txt line 2 has NUL bytes"),
        (b"", "a.txt is empty"),
        (b" \n\n", "a.txt is empty"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(tmp_path / "a.txt", content)


def test_a_nul_now_and_then_stays_and_is_said(tmp_path: Path) -> None:
    lines = ["a\0b", *LINES]
    dataset = load(tmp_path / "a.txt", "\n".join(lines))
    assert texts(dataset) == set(lines)
    assert "a.txt has 1 NUL characters in its text" in dataset.notes


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize(
    ("separator", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")]
)
def test_separators_are_told_by_the_first_rows(
    tmp_path: Path, name: str, separator: str, word: str
) -> None:
    """Texts with other separators in them, quoted as a spreadsheet does."""
    rows = [f'"one, two; three | four {n}"{separator}{n % 2}' for n in range(60)]
    dataset = load(tmp_path / name, "\n".join([f"text{separator}label", *rows]), CLASSES)
    assert texts(dataset) == {f"one, two; three | four {n}" for n in range(60)}
    own = {"a.csv": ",", "a.tsv": "\t"}[name]
    assert (f"{name}: columns are separated by {word}" in dataset.notes) == (separator != own)


def test_excel_may_say_what_separates(tmp_path: Path) -> None:
    rows = [f"one, two {n};{n % 2}" for n in range(60)]
    dataset = load(tmp_path / "a.csv", "\n".join(["sep=;", "text;label", *rows]), CLASSES)
    assert texts(dataset) == {f"one, two {n}" for n in range(60)}
    assert "a.csv line 4 has another number of columns" in refused(
        tmp_path / "a.csv", "sep=;\na;b\n1;2\n3\n"
    )
    assert "is empty" in refused(tmp_path / "a.csv", "sep=;\n\n")


def test_one_column_stays_one_column(tmp_path: Path) -> None:
    rows = [f"Well; this is | text {n}" for n in range(60)]
    assert texts(load(tmp_path / "a.csv", "\n".join(["text", *rows]))) == set(rows)


def test_quotes_in_tabs_without_quoting_are_text(tmp_path: Path) -> None:
    """As GLUE's files are written; read with quoting, lines would be swallowed."""
    rows = [
        f'"he said {n}\t{n % 2}' if n % 7 == 0 else f'she said "{n}"\t{n % 2}' for n in range(60)
    ]
    dataset = load(tmp_path / "a.tsv", "\n".join(["text\tlabel", *rows]), CLASSES)
    assert texts(dataset) == {row.split("\t")[0] for row in rows}
    assert "a.tsv: quotes are part of the text" in dataset.notes
    quoted = [f'"he said ""{n}"""\t{n % 2}' for n in range(60)]
    dataset = load(tmp_path / "a.tsv", "\n".join(["text\tlabel", *quoted]), CLASSES)
    assert texts(dataset) == {f'he said "{n}"' for n in range(60)}


def test_an_index_without_a_name_is_no_text(tmp_path: Path) -> None:
    """As pandas writes it."""
    rows = [f"{n},a text {n},{n % 2}" for n in range(60)]
    dataset = load(tmp_path / "a.csv", "\n".join([",sentence,label", *rows]), CLASSES)
    assert "rows are text with label (text: sentence); not read: column 1" in dataset.notes


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,label,text\na,1,b\n", "a.csv has two columns named 'text'"),
        ("a.csv", "text, text \na,b\n", "a.csv has two columns named 'text'"),
        (
            "a.csv",
            "I really liked this one,1\nI did not,0\n",
            "reads like a row of data; add a first line",
        ),
        ("a.csv", "fine,1\nbad,0\n", "reads like a row of data"),
        (
            "a.tsv",
            "#1 String\t#2 String\na b\tc d\n",
            'data.columns={prompt: "#1 String", completion: "#2 String"}',
        ),
        ("a.tsv", "Nothing to see in this film at all\nA second row\n", "reads like a row of data"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b", "text": "c"}\n',
            "line 2: the key 'text' stands twice in one object",
        ),
        ("a.jsonl", '{"text": "a", "m": {"x": 1, "x": 2}}\n', "line 1: the key 'x' stands twice"),
        (
            "a.json",
            '[{"text": "a"},\n {"text": "b",\n "text": "c"}]',
            "a.json line 3: the key 'text' stands twice",
        ),
        ("a.json", '[{"text": "a"},\n {"text": "b"]', "a.json line 2 is not JSON"),
        (
            "a.json",
            '{"a": [{"text": "a"}], "b": [{"text": "b"}]}',
            "has rows under 'a' and under 'b'",
        ),
        ("a.json", '{"version": 1}', "a.json has no array of rows"),
        ("a.json", "[1, 2]", "a.json row 1 is not an object"),
        ("a.json", '"text"', "a.json is not an array of rows"),
        ("a.json", "[" * 100_000, "a.json is not JSON that can be read"),
        ("a.jsonl", "{}\n", "a.jsonl line 1 has no fields"),
        ("a.jsonl", "[1]\n[2]\n", "a.jsonl line 1 is not an object"),
    ],
)
def test_faults_are_named_with_their_line(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    assert said in refused(tmp_path / name, content)


ROWS = [{"text": line} for line in LINES]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", json.dumps(ROWS), None),
        ("a.json", json.dumps({"data": ROWS}), None),
        ("a.json", json.dumps({"version": "1.1", "rows": ROWS}), None),
        ("a.json", json.dumps({"text": LINES}), None),
        ("a.json", "\n".join(map(json.dumps, ROWS)), "a.json has a JSON object on each line"),
        ("a.jsonl", json.dumps(ROWS), "a.jsonl is one JSON document, not a line each"),
        ("a.jsonl", json.dumps(ROWS, indent=2), "a.jsonl is one JSON document, not a line each"),
        (
            "a.ndjson",
            json.dumps({"data": ROWS}, indent=2),
            "a.ndjson is one JSON document, not a line each",
        ),
    ],
)
def test_kinds_of_json(tmp_path: Path, name: str, content: str, said: str | None) -> None:
    dataset = load(tmp_path / name, content)
    assert texts(dataset) == set(LINES)
    assert said is None or said in dataset.notes


def test_numbers_beside_the_text_may_be_as_large_as_json_allows(tmp_path: Path) -> None:
    rows = [{"text": line, "id": 10**4000, "x": float("inf")} for line in LINES]
    assert texts(load(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))) == set(LINES)
