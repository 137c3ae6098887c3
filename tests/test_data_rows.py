"""What rows are: recognised by their columns and said, forced and mapped by settings, refused where
unclear.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_layouts import CALL, LABELLED_CELLS, ROW_CELLS, numbered

from pipeline.config.settings.data import DataConfig, DataFormat
from pipeline.data.documents import Dataset, Document
from pipeline.data.load import load_dataset
from pipeline.errors import UserError
from pipeline.tasks.table import Task

LM, CLASSES = Task.causal_lm, Task.sequence_classification


def jsonl(folder: Path, rows: list[Any], name: str = "a.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def load(folder: Path, rows: list[Any], task: Task = LM, **more: Any) -> Dataset:
    return load_dataset(DataConfig(path=jsonl(folder, rows), **more), task)


def first(dataset: Dataset) -> Document:
    """Return the document of row 0, whichever split it is in."""
    every = [document for part in dataset.splits.values() for document in part]
    return next(each for each in every if " 0" in f"{each.text}{each.prompt}{each.messages} ")


def refused(folder: Path, rows: list[Any], task: Task = LM, **more: Any) -> str:
    with pytest.raises(UserError) as error:
        load(folder, rows, task, **more)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("columns", ROW_CELLS)
def test_rows_of_every_shape_are_recognised_and_said(tmp_path: Path, columns: str) -> None:
    kind, row = ROW_CELLS[columns]
    dataset = load(tmp_path, [numbered(row, n) for n in range(40)])
    assert sum(map(len, dataset.splits.values())) == 40
    assert any(note.startswith(f"rows are {kind}") for note in dataset.notes)
    assert not any("not read" in note for note in dataset.notes)
    found = first(dataset)
    assert (found.messages is None) == ("messages" not in columns and kind != "sharegpt")


@pytest.mark.parametrize("columns", LABELLED_CELLS)
def test_labelled_rows_of_every_shape(tmp_path: Path, columns: str) -> None:
    kind, row = LABELLED_CELLS[columns]
    dataset = load(tmp_path, [numbered(row, n, n % 3) for n in range(60)], CLASSES)
    assert any(note.startswith(f"rows are {kind}") for note in dataset.notes)
    assert dataset.labels == ("0", "1", "2")
    found = first(dataset)
    assert (found.text, found.pair, found.label) == ("t 0", "u 0" if "pair" in kind else None, 0)


@pytest.mark.parametrize(
    ("row", "prompt", "text"),
    [
        # as they are: the data has its own blanks
        ({"prompt": "p", "completion": "c 0"}, "p", "c 0"),
        ({"question": "p", "answer": "c 0"}, "p\n", "c 0"),
        ({"question": "p ", "answer": "c 0"}, "p ", "c 0"),
        ({"context": "k", "question": "p", "answer": "c 0"}, "k\n\np\n", "c 0"),
        ({"system_prompt": "s", "question": "p", "response": "c 0"}, "s\n\np\n", "c 0"),
        ({"system_prompt": "", "question": "p", "response": "c 0"}, "p\n", "c 0"),
    ],
)
def test_prompts_and_what_stands_before_them(
    tmp_path: Path, row: dict[str, str], prompt: str, text: str
) -> None:
    found = first(load(tmp_path, [row, *({**row, list(row)[-1]: f"x{n}"} for n in range(30))]))
    assert (found.prompt, found.text) == (prompt, text)


def test_alpaca_has_the_published_wording(tmp_path: Path) -> None:
    """Source: github.com/tatsu-lab/stanford_alpaca, README "Data Release"; its column `text` has
    the line break.
    """
    rows = [
        {"instruction": "Add.", "input": "1 1" if n else "", "output": f"{n} 0"}
        for n in (0, *range(2, 40))
    ]
    dataset = load(tmp_path, rows)
    prompts = {document.prompt for part in dataset.splits.values() for document in part}
    assert prompts == {
        (
            "Below is an instruction that describes a task. Write a response that appropriately"
            " completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
        ),
        (
            "Below is an instruction that describes a task, paired with an input that provides"
            " further context. Write a response that appropriately completes the request.\n\n###"
            " Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
        ),
    }


@pytest.mark.parametrize(
    ("row", "task", "said"),
    [
        (
            {"title": "a b", "body": "c d"},
            LM,
            (
                "title, body hold text: say what each is, e.g. data.columns={prompt: title,"
                " completion: body}"
            ),
        ),
        (
            {"title": "a b", "body": "c d", "label": 1},
            CLASSES,
            "data.columns={text: title, text_pair: body}",
        ),
        (
            {"text": "a", "question": "b", "answer": "c"},
            LM,
            (
                "rows could be prompt_completion (question, answer) or text "
                "(text); choose with data.format=prompt_completion or "
            ),
        ),
        (
            {"text": "a", "premise": "b", "hypothesis": "c", "label": 1},
            CLASSES,
            "rows could be text_pair (premise",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}],
                "chat": [{"role": "user", "content": "a"}],
            },
            LM,
            "the messages could be messages or chat",
        ),
        (
            {"premise": "a", "hypothesis": "b"},
            LM,
            "give data.columns={prompt: premise, completion: hypothesis}",
        ),
        (
            {"instruction": "a", "output": "b", "label": 1},
            CLASSES,
            "rows are alpaca, which sequence_classification does",
        ),
        ({"text": "a", "stars": 1, "topic": "b"}, CLASSES, "the label could be stars or topic"),
        (
            {"I loved it so very much": "a", "1": "b"},
            LM,
            "which reads like a row of data; add a first line with the",
        ),
        ({"n": 1, "m": 2}, LM, "and n, m are no shape that is known"),
        ({"instruction": "a", "output": "b", "history": [["q", "a"]]}, LM, "line 1 has a history"),
    ],
)
def test_what_is_unclear_is_refused_and_every_column_named(
    tmp_path: Path, row: dict[str, Any], task: Task, said: str
) -> None:
    assert said in refused(tmp_path, [row], task)


def test_structured_shapes_come_before_the_text_they_were_rendered_to(tmp_path: Path) -> None:
    row = {"instruction": "i", "input": "", "output": "o {n}", "text": "Below ... {n}"}
    dataset = load(tmp_path, [numbered(row, n) for n in range(40)])
    assert "rows are alpaca (with input); not read: text" in dataset.notes
    forced = load(tmp_path, [numbered(row, n) for n in range(40)], format=DataFormat.text)
    assert "rows are text; not read: instruction, input, output" in forced.notes
    ultra = {"prompt": "p", "prompt_id": "x", "messages": ROW_CELLS["messages"][1]["messages"]}
    dataset = load(tmp_path, [numbered(ultra, n) for n in range(40)])
    assert "rows are messages; not read: prompt, prompt_id" in dataset.notes


def test_a_shape_can_be_forced_and_its_parts_mapped(tmp_path: Path) -> None:
    rows = [{"Headline": f"h {n}", "meta": {"body": f"b {n}"}, "stars": n % 2} for n in range(60)]
    pair = load(tmp_path, rows, CLASSES, columns={"text": "Headline", "text_pair": "meta.body"})
    assert (first(pair).text, first(pair).pair) == ("h 0", "b 0")
    asked = load(tmp_path, rows, columns={"prompt": "Headline", "completion": "meta.body"})
    assert (first(asked).prompt, first(asked).text) == ("h 0\n", "b 0")
    turns = [
        {"chosen": row["messages"]}
        for row in (numbered(ROW_CELLS["messages"][1], n) for n in range(40))
    ]
    assert first(load(tmp_path, turns, columns={"messages": "chosen"})).messages is not None
    assert "data.format: alpaca needs instruction and output" in refused(
        tmp_path, rows, format=DataFormat.alpaca
    )
    assert "there is no part 'txt'; known: text," in refused(
        tmp_path, rows, columns={"txt": "Headline"}
    )


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "narrator", "content": "x"}, "message 1 has the role 'narrator'"),
        ({"content": "x"}, "message 1 has no role"),
        ({"role": "user"}, "message 1 has no content"),
        ({"role": "user", "content": 3}, "message 1: content is int"),
        (
            {"role": "user", "content": "x", "emotion": "sad"},
            "message 1 has a field 'emotion' that is not understood",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "has a part of type 'image_url'",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio"}]},
            "has a part of type 'input_audio'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "a part of type 'text' has no text"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "message 1: weight is 0.5"),
        (
            {"role": "assistant", "content": "x", "tool_calls": "f()"},
            "message 1: tool_calls are no list of calls",
        ),
        ({"from": "function_call", "value": "f()"}, "message 1 is a call that cannot be read"),
        ("text", "messages are not a list of role and content"),
    ],
)
def test_what_is_not_understood_in_a_message_is_refused_by_name(
    tmp_path: Path, turn: Any, said: str
) -> None:
    rest = [{"role": "assistant", "content": "a"}]
    good = {"messages": [{"role": "user", "content": "q"}, *rest]}
    assert said in refused(tmp_path, [good, {"messages": [turn, *rest]}])


def test_messages_keep_all_that_a_template_can_use(tmp_path: Path) -> None:
    turns = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "q "}, "0"], "id": "7"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [CALL],
            "reasoning_content": "hm",
            "train": False,
        },
        {"role": "function", "content": "1", "name": "f", "tool_call_id": "c1"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "a"}],
        },
    ]
    rows = [
        {
            "messages": [*turns, {"role": "assistant", "content": f"end {n}"}],
            "functions": [{"name": "f"}],
        }
        for n in range(40)
    ]
    dataset = load(tmp_path, rows)
    found = first(dataset)
    assert found.messages == (
        {"role": "system", "content": "d"},
        {"role": "user", "content": "q 0"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [CALL],
            "reasoning_content": "hm",
            "weight": 0,
        },
        {"role": "tool", "content": "1", "name": "f", "tool_call_id": "c1"},
        {"role": "assistant", "content": "a", "reasoning_content": "so"},
        {"role": "assistant", "content": "end 0"},
    )
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)
    for said in (
        "the role developer is read as system",
        "content in parts is joined",
        "tools get the form of OpenAI's interface",
        "not read in messages: id",
    ):
        assert dataset.notes.count(said) == 1


def test_sharegpt_calls_become_tool_calls(tmp_path: Path) -> None:
    _, row = ROW_CELLS["conversations with system, tools"]
    found = first(load(tmp_path, [numbered(row, n) for n in range(40)]))
    assert found.messages is not None
    assert [turn["role"] for turn in found.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "f"}}]


def test_a_conversation_that_is_asked_is_not_learnt(tmp_path: Path) -> None:
    """Of a prompt of messages with its completion, only the completion is learnt, as in TRL."""
    asked = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    rows = [
        {"prompt": asked, "completion": [{"role": "assistant", "content": f"c {n}"}]}
        for n in range(40)
    ]
    found = first(load(tmp_path, rows))
    assert [turn.get("weight") for turn in found.messages or ()] == [None, 0, None, None]


def test_a_chat_of_which_nothing_is_learnt_is_blank(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a {n}", "weight": 0},
        ]
    }
    rows = [numbered(row, n) for n in range(40)] + [
        numbered(ROW_CELLS["messages"][1], n) for n in range(40)
    ]
    assert "train: dropped 40 blank documents" in load(tmp_path, rows).notes


def test_structs_of_parquet_lose_the_nulls_that_arrow_adds(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q {n}"},
                {"role": "assistant", "content": "a", "reasoning_content": "hm"},
            ]
        }
        for n in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = first(load_dataset(DataConfig(path=str(tmp_path / "a.parquet")), LM))
    assert found.messages == tuple(rows[0]["messages"])


def test_columns_that_only_later_rows_have_are_seen(tmp_path: Path) -> None:
    row = ROW_CELLS["messages"][1]
    rows = [numbered(row, n) for n in range(300)] + [
        {**numbered(row, 300), "tools": [{"type": "function"}]}
    ]
    dataset = load(tmp_path, rows)
    assert "rows are messages (with tools)" in dataset.notes
    assert sum(each.tools is not None for part in dataset.splits.values() for each in part) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a\ud83d"},
        {"prompt": "a", "completion": "\udc00"},
        {"instruction": "\udc00", "output": "b"},
        {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "\udc00"}]},
        {"messages": [{"role": "assistant", "content": "a"}], "tools": [{"name": "\udc00"}]},
    ],
)
def test_half_characters_are_refused_wherever_they_stand(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    assert "line 1 has half a character" in refused(tmp_path, [row])
    assert "half a character" in refused(
        tmp_path, [{"text": "a", "label": "\udc00"}, {"text": "b", "label": "c"}], CLASSES
    )
