"""Rows that are not recognised: every setting that a refusal suggests is followed, and accepted."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from data_layouts import numbered
from hydra.core.override_parser.overrides_parser import OverridesParser

from pipeline.config.settings.data import DataConfig, DataFormat
from pipeline.data.documents import Dataset
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

LM, CLASSES = Task.causal_lm, Task.sequence_classification
ASKED = {"role": "user", "content": "ask {n}"}
SAID, WORSE = (
    {"role": "assistant", "content": "say {n}"},
    {"role": "assistant", "content": "bad {n}"},
)
SQUAD = {"id": "i{n}", "title": "a b", "context": "the sky {n}", "question": "which one {n}?"}

ROWS: dict[str, tuple[dict[str, Any], str | None]] = {
    "a preference of messages": (
        {"chosen": [ASKED, SAID], "rejected": [ASKED, WORSE]},
        "{messages: chosen}",
    ),
    "a preference, the worse one first": (
        {"rejected": [ASKED, WORSE], "chosen": [ASKED, SAID]},
        "{messages: chosen}",
    ),
    "a preference with its prompt in it": (
        {"prompt": "ask {n}", "chosen": [ASKED, SAID], "rejected": [ASKED, WORSE]},
        "{messages: chosen}",
    ),
    "a preference with its prompt beside it": (
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [WORSE]},
        "{prompt: prompt, completion: chosen}",
    ),
    "a preference of answers": (
        {"prompt": "ask {n}", "chosen": [SAID], "rejected": [WORSE]},
        "{prompt: prompt, completion: chosen}",
    ),
    "a preference of texts": (
        {"prompt": "ask {n}", "chosen": "say {n}", "rejected": "bad {n}"},
        "{prompt: prompt, completion: chosen}",
    ),
    "a preference of whole texts": (
        {"chosen": "Q: {n}? A: yes", "rejected": "Q: {n}? A: no"},
        "{text: chosen}",
    ),
    "messages inside": ({"id": 1, "sample": {"turns": [ASKED, SAID]}}, "{messages: sample.turns}"),
    "messages as JSON": ({"log": json.dumps([ASKED, SAID])}, "{messages: log}"),
    "ShareGPT": (
        {"log": [{"from": "human", "value": "q {n}"}, {"from": "gpt", "value": "a"}]},
        "{messages: log}",
    ),
    "a text inside": ({"meta": {"body": "some words {n}", "url": "u{n}"}}, "{text: meta.body}"),
    "a text far inside": ({"a": {"b": {"c": "some words {n}", "d": 5}}, "n": 4}, "{text: a.b.c}"),
    "a text inside text": ({"text": {"body": "some words {n}", "size": 3}}, "{text: text.body}"),
    "a prompt inside": (
        {"prompt": {"value": "ask me {n}"}, "completion": "say it {n}"},
        "{prompt: prompt.value, completion: completion}",
    ),
    "two texts inside": (
        {"doc": {"headline": "h h {n}", "body": "b b {n}"}},
        "{prompt: doc.headline, completion: doc.body}",
    ),
    "names that need quotes": (
        {"the head: line": "h h {n}", "K\u00f6rper": "b b {n}"},
        '{prompt: "the head: line", completion: "K\u00f6rper"}',
    ),
    "names that are values": (
        {"null": "h h {n}", "7": "b b {n}"},
        '{prompt: "null", completion: "7"}',
    ),
    "names with quotes and blanks": ({'a "b" ': "h h {n}", "1.50": "b b {n}"}, None),
    "an answer of another name": (
        {**SQUAD, "gold_answer": "it is {n}"},
        "{prompt: question, completion: gold_answer}",
    ),
    "answers of another name": (
        {**SQUAD, "gold_answers": ["it is {n}", "that"]},
        "{prompt: question, completion: gold_answers}",
    ),
    "a question with its context alone": (
        {"id": "{n}", "context": "the sky {n}", "question": "which {n} is it?"},
        "{prompt: question, completion: context}",
    ),
    "a pair": (
        {"premise": "it rains {n}", "hypothesis": "it is wet {n}"},
        "{prompt: premise, completion: hypothesis}",
    ),
    "about a text alone": ({"name": "no text {n}", "size": 4}, "{text: name}"),
    "no text": ({"n": 1, "m": [1, 2], "o": {"p": 3}}, None),
    "a row for a header": ({"I loved it so very much": "a b {n}", "1": 3}, None),
    "a text and a prompt": ({"text": "t t {n}", "question": "q q {n}", "answer": "a a {n}"}, None),
    "two conversations": (
        {"messages": [ASKED, SAID], "chat": [ASKED, SAID]},
        "{messages: messages}",
    ),
}
"""A row with `{n}` for its number, and what is to be suggested of it for causal_lm where only one
thing is right.
"""


CELLS: list[dict[str, Any]] = [{}, {"label": 1}, {"stars": 1, "topic": "b"}, {"kind": "x"}]


def rows_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [numbered(row, n) for n in range(40)]


def load(folder: Path, rows: list[dict[str, Any]], task: Task, **more: Any) -> Dataset:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(DataConfig(path=str(folder / "a.jsonl"), **more), task)


def refusal(folder: Path, rows: list[dict[str, Any]], task: Task, **more: Any) -> str:
    """Return why rows are refused; empty where they are read."""
    try:
        load(folder, rows, task, **more)
    except UserError as error:
        return str(error)
    return ""


def settings_in(said: str) -> list[dict[str, Any]]:
    """Return every setting that a refusal speaks of, as a command line would give it."""
    found: list[dict[str, Any]] = [{"task": Task(name)} for name in re.findall(r"task=(\w+)", said)]
    found += [{"format": DataFormat(name)} for name in re.findall(r"data\.format=(\w+)", said)]
    for text in re.findall(r'data\.columns=\{(?:"(?:\\"|[^"])*"|[^}])*\}', said):
        choices = re.search(r"choose one of (.*) with", said)
        names = choices[1].split(", ") if choices else ["NAME"]
        assert "NAME" not in text or choices, said
        for name in names:
            value = OverridesParser.create().parse_override(text.replace("NAME", name)).value()
            found.append({"columns": value})
    return found


def follow(folder: Path, rows: list[dict[str, Any]], task: Task, **given: Any) -> int:
    """Load rows with each setting that their refusal suggests; return how many there were."""
    said = refusal(folder, rows, task, **given)
    for more in settings_in(said):
        again = refusal(folder, rows, more.pop("task", task), **{**given, **more})
        assert again == "", f"{said} -> {more} -> {again}"
    return len(settings_in(said))


@pytest.mark.parametrize("what", ROWS)
def test_what_is_suggested_is_accepted(tmp_path: Path, what: str) -> None:
    row, wanted = ROWS[what]
    said = refusal(tmp_path, rows_of(row), LM)
    assert said
    assert wanted is None or f"data.columns={wanted}" in said
    assert follow(tmp_path, rows_of(row), LM) >= (what != "no text")


@pytest.mark.parametrize(("what", "cell"), list(product(ROWS, CELLS)))
def test_what_is_suggested_to_classify_is_accepted(
    tmp_path: Path, what: str, cell: dict[str, Any]
) -> None:
    rows = rows_of({**ROWS[what][0], **cell})
    for n, row in enumerate(rows):
        row |= {name: f"{value}{n % 3}" for name, value in cell.items()}
    follow(tmp_path, rows, CLASSES)


@pytest.mark.parametrize("shape", [shape for shape in DataFormat if shape is not DataFormat.auto])
@pytest.mark.parametrize("what", ROWS)
def test_what_is_suggested_for_a_shape_is_accepted(
    tmp_path: Path, what: str, shape: DataFormat
) -> None:
    follow(tmp_path, rows_of(ROWS[what][0]), LM, format=shape)


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": "head"},
        {"completion": "meta.body"},
        {"text_pair": "head"},
        {"instruction": "head", "completion": "meta.body"},
        {"output": "head"},
        {"label": "size"},
        {"text": "head"},
        {"messages": "head"},
    ],
)
@pytest.mark.parametrize("task", Task)
def test_what_is_suggested_beside_a_mapping_keeps_it(
    tmp_path: Path, task: Task, given: dict[str, str]
) -> None:
    rows = [
        {**row, "size": n % 3}
        for n, row in enumerate(rows_of({"head": "h h {n}", "meta": {"body": "b b {n}"}}))
    ]
    follow(tmp_path, rows, task, columns=given)


def test_a_column_that_lacks_text_in_a_late_row_is_not_suggested(tmp_path: Path) -> None:
    rows = [{"lead": f"l l {n}", "body": f"b b {n}", "tail": f"t t {n}"} for n in range(300)]
    rows[250]["lead"] = None  # behind those that are looked at first
    assert "{prompt: body, completion: tail}" in refusal(tmp_path, rows, LM)
    assert follow(tmp_path, rows, LM) == 1


def test_a_label_that_names_every_row_is_not_suggested(tmp_path: Path) -> None:
    rows = [
        {"text": f"t t {n}", "code": f"c{n}", "same": 1, "size": n % 4, "none": None}
        for n in range(60)
    ]
    assert "choose one of size with data.columns={label: NAME}" in refusal(tmp_path, rows, CLASSES)


@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        (
            {"query": "q {n}", "passage": "p {n}"},
            {"prompt": "query", "completion": "passage"},
            "q {n}\n",
        ),
        (
            {"context": "c {n}", "fact": "f {n}"},
            {"prompt": "context", "completion": "fact"},
            "c {n}\n",
        ),
        (
            {"ask": "q {n}", "document": {"x": "p {n}", "y": "z"}},
            {"prompt": "ask", "completion": "document.x"},
            "q {n}\n",
        ),
        ({"do": "d {n}", "system": "s {n}"}, {"prompt": "do", "completion": "system"}, "d {n}\n"),
        (
            {"context": "c {n}", "system": "s {n}", "out": "o {n}"},
            {"prompt": "system", "completion": "out"},
            "c {n}\n\ns {n}\n",
        ),
    ],
)
def test_a_mapped_column_is_read_as_nothing_else(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], prompt: str
) -> None:
    dataset = load(tmp_path, rows_of(row), LM, columns=columns)
    prompts = {document.prompt for part in dataset.splits.values() for document in part}
    assert prompts == {prompt.replace("{n}", str(n)) for n in range(40)}


def test_a_mapped_input_of_alpaca_and_a_mapped_label_are_read_as_nothing_else(
    tmp_path: Path,
) -> None:
    rows = rows_of({"instruction": "do {n}", "input": "in {n}"})
    dataset = load(tmp_path, rows, LM, columns={"output": "input"})
    assert all(
        "### Input" not in str(each.prompt) for part in dataset.splits.values() for each in part
    )
    rows = [{"label": f"about {n}", "text": ("a", "b")[n % 2]} for n in range(40)]
    dataset = load(tmp_path, rows, CLASSES, columns={"text": "label", "label": "text"})
    assert dataset.labels == ("a", "b")
    said = refusal(
        tmp_path, [{"label": f"about {n}"} for n in range(40)], CLASSES, columns={"text": "label"}
    )
    assert "has no field 'label'" in said


SQUAD_ANSWERS = [
    {"text": ["it is {n}", "that"], "answer_start": [4, 9]},
    ["it is {n}", "that"],
    [{"text": "it is {n}", "answer_start": 4}, {"text": "that", "answer_start": 9}],
]


@pytest.mark.parametrize("answers", SQUAD_ANSWERS)
def test_the_first_answer_of_a_question_is_learnt_after_its_context(
    tmp_path: Path, answers: Any
) -> None:
    rows = rows_of({**SQUAD, "answers": answers})
    rows.append(
        {**rows[0], "question": "nobody knows?", "answers": type(answers)()}
        if isinstance(answers, list)
        else {**rows[0], "question": "nobody knows?", "answers": {"text": [], "answer_start": []}}
    )
    dataset = load(tmp_path, rows, LM)
    found = {(each.prompt, each.text) for part in dataset.splits.values() for each in part}
    assert found == {(f"the sky {n}\n\nwhich one {n}?\n", f"it is {n}") for n in range(40)}
    assert (
        "rows are prompt completion (prompt: question, completion: answers; with context); not"
        " read: id, title" in (dataset.notes)
    )
    assert (
        "answers lists texts: the first is learnt; an empty list is a blank document"
        in dataset.notes
    )
    assert "train: dropped 1 blank document" in dataset.notes


def test_a_list_of_texts_can_be_reached_into(tmp_path: Path) -> None:
    rows = rows_of({**SQUAD, "replies": {"text": ["it is {n}"], "n": 1}})
    dataset = load(tmp_path, rows, LM, columns={"prompt": "question", "completion": "replies.text"})
    assert {each.text for part in dataset.splits.values() for each in part} == {
        f"it is {n}" for n in range(40)
    }
    assert any(note.endswith("not read: id, title, replies.n") for note in dataset.notes)


@pytest.mark.parametrize(
    ("row", "more", "unread"),
    [
        ({"meta": {"body": "b {n}"}}, {"columns": {"text": "meta.body"}}, ""),
        (
            {"meta": {"body": "b {n}", "url": "u", "by": {"name": "x", "age": 3}}},
            {"columns": {"text": "meta.body"}},
            "; not read: meta.url, meta.by.name, meta.by.age",
        ),
        (
            {"text": "t {n}", "from": {"book": "{n}", "page": 4}, "id": 1},
            {"group_field": "from.book"},
            "; not read: from.page, id",
        ),
        (
            {"text": "t {n}", "meta.body": "b {n}", "meta": {"body": "c"}},
            {"columns": {"text": "meta.body"}},
            "; not read: text, meta",
        ),
        (
            {"prompt": [ASKED], "completion": [SAID], "tools": [], "context": "c"},
            {},
            "; not read: context",
        ),
        ({"prompt": "p {n}", "completion": "c", "tools": []}, {}, "; not read: tools"),
        ({"text": "t {n}", "be": "b"}, {"columns": {"system": "be"}}, "; not read: be"),
    ],
)
def test_what_is_said_to_be_unread_is_what_is_not_read(
    tmp_path: Path, row: dict[str, Any], more: dict[str, Any], unread: str
) -> None:
    notes = load(tmp_path, rows_of(row), LM, **more).notes
    said = next(note for note in notes if note.startswith("rows are"))
    assert said.partition("; not read")[2] == unread.partition("; not read")[2]


def test_tools_beside_a_prompt_of_messages_are_read_under_the_name_they_have(
    tmp_path: Path,
) -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    dataset = load(
        tmp_path, rows_of({"prompt": [ASKED], "completion": [SAID], "functions": [tool]}), LM
    )
    assert {len(each.tools or ()) for part in dataset.splits.values() for each in part} == {1}
