"""Rows to documents, as their shape has them."""

from __future__ import annotations

from typing import Any

from pipeline.config.settings.data import DataFormat
from pipeline.data.cells import Row, first_text, is_missing, refuse_half_characters, value_of
from pipeline.data.chats import is_conversation, messages_of, tools_of
from pipeline.data.documents import Document
from pipeline.data.row_columns import plain_name
from pipeline.data.shapes import Shape
from pipeline.errors import UserError

# Source: Stanford Alpaca, README, "Data Release"; a line break before the response, as its column
# `text` has it.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n###"
    " Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def document_of(row: Row, shape: Shape, key: str, remarks: dict[str, None]) -> Document:
    """Return the document that a row holds, without its label.

    Args:
        remarks: Gets a line for each kind of change, in order.

    Raises:
        UserError: Naming file and line.
    """
    if shape.format in (DataFormat.messages, DataFormat.sharegpt):
        return _chat(row, shape, key, remarks)
    if shape.format is DataFormat.alpaca:
        return _alpaca(row, shape, key)
    if shape.format is DataFormat.prompt_completion:
        return _completion(row, shape, key, remarks)
    text = _text(row, shape, "text", key)
    return Document(
        text, pair=_text(row, shape, "text_pair", key) if "text_pair" in shape.columns else None
    )


def _chat(row: Row, shape: Shape, key: str, remarks: dict[str, None]) -> Document:
    where, fields = row
    raw = _present(row, shape, "messages", key)
    system = value_of(fields, shape.columns.get("system"))
    messages = messages_of(where, raw, key, remarks, system=system)
    tools = tools_of(where, value_of(fields, shape.columns.get("tools")), key, remarks)
    return Document("", messages=messages, tools=tools)


def _alpaca(row: Row, shape: Shape, key: str) -> Document:
    history = row[1].get("history")
    if not is_missing(history) and len(str(history)) > 2:  # "[]" is none
        raise UserError(
            key, f"{row[0]} has a history, which is not understood", "write the turns as messages"
        )
    instruction, output = (_text(row, shape, role, key) for role in ("instruction", "output"))
    given = _optional(row, shape, "input", key)
    wording = WITH_INPUT if given.strip() else WITHOUT_INPUT
    prompt = wording.format(instruction=instruction, input=given)
    system = _optional(row, shape, "system", key)
    return Document(output, prompt=f"{system}\n\n{prompt}" if system.strip() else prompt)


def _completion(row: Row, shape: Shape, key: str, remarks: dict[str, None]) -> Document:
    prompt, completion = (_present(row, shape, role, key) for role in ("prompt", "completion"))
    completion = _first_answer(shape, completion, remarks)
    if is_conversation(completion) or (is_conversation(prompt) and not isinstance(prompt, str)):
        return _conversational(row, shape, prompt, completion, key, remarks)
    prompt, completion = (
        _text(row, shape, "prompt", key),
        _as_text(row, shape, "completion", completion, key),
    )
    names = [plain_name(shape.columns[role]) for role in ("prompt", "completion")]
    if (
        names != ["prompt", "completion"]
        and prompt
        and not prompt[-1].isspace()
        and not completion[:1].isspace()
    ):
        prompt += "\n"
    before = [_optional(row, shape, role, key) for role in ("system", "context")]
    return Document(
        completion, prompt="\n\n".join([*(text for text in before if text.strip()), prompt])
    )


def _first_answer(shape: Shape, completion: Any, remarks: dict[str, None]) -> Any:
    """Return the first of several texts that a question is answered with (SQuAD); anything else as
    it is.
    """
    answer = first_text(completion)
    if answer is None or isinstance(completion, str):
        return completion
    remarks[
        f"{shape.columns['completion']} lists texts: the first is learnt; an empty list is a blank"
        " document"
    ] = None
    return answer


def _conversational(
    row: Row, shape: Shape, prompt: Any, completion: Any, key: str, remarks: dict[str, None]
) -> Document:
    """Return a chat of which only the completion's turns are learnt, as TRL reads prompts of
    messages.
    """
    where, fields = row
    asked = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str) and not is_conversation(prompt)
        else prompt
    )
    said = completion
    if isinstance(completion, str) and not is_conversation(completion):
        said = [{"role": "assistant", "content": completion}]
    system = value_of(fields, shape.columns.get("system"))
    before = messages_of(where, asked, key, remarks, system=system, learns=False)
    before = tuple(
        {**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in before
    )
    return Document(
        "",
        messages=(*before, *messages_of(where, said, key, remarks)),
        tools=tools_of(where, value_of(fields, shape.columns.get("tools")), key, remarks),
    )


def _present(row: Row, shape: Shape, role: str, key: str) -> Any:
    where, fields = row
    name = shape.columns[role]
    value = value_of(fields, name)
    if value is None and name not in fields:
        problem = f"{where} has no field {name!r}, unlike the first row"
        raise UserError(
            key, problem, f"rows are read as {shape.format.value}: give it, or drop that row"
        )
    return value


def _text(row: Row, shape: Shape, role: str, key: str) -> str:
    return _as_text(row, shape, role, _present(row, shape, role, key), key)


def _as_text(row: Row, shape: Shape, role: str, value: Any, key: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(
            key, f"{row[0]}: {shape.columns[role]} is {kind}", "give text, or drop that row"
        )
    refuse_half_characters(row[0], value, key)
    return value


def _optional(row: Row, shape: Shape, role: str, key: str) -> str:
    """Return a text that a row may lack."""
    name = shape.columns.get(role)
    return (
        "" if name is None or is_missing(value_of(row[1], name)) else _text(row, shape, role, key)
    )
