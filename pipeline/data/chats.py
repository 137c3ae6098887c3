"""A conversation as rows spell it (OpenAI, TRL, ShareGPT) to messages as chat templates take them.

What is understood is kept or mapped, and said once; what is not is refused by name, so that nothing
is lost silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.data.cells import first_text, is_missing, refuse_half_characters
from pipeline.errors import UserError

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "assistant_response": "assistant",
    "developer": "system",
    "instructions": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT whose value is a call, as JSON."""
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""Fields that chat templates know."""
LEARNT = ("weight", "train", "loss")  # whether a turn is learnt: 0 or false says that it is not
UNREAD = frozenset(
    (
        "id",
        "idx",
        "index",
        "turn",
        "turn_id",
        "message_id",
        "timestamp",
        "created_at",
        "create_time",
        "date",
        "model",
        "lang",
        "language",
        "tokens",
        "num_tokens",
        "token_count",
        "hash",
    )
)
TEXT_PARTS = ("text", "input_text", "output_text")
COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
"""Columns that hold a conversation."""


def is_conversation(value: Any) -> bool:
    """Whether a cell holds turns, as objects or as their JSON; answers of SQuAD are none."""
    turns = _parsed(value)
    return bool(turns) and _is_list_of_objects(turns) and first_text(turns) is None


def is_sharegpt(value: Any) -> bool:
    """Whether the turns of a conversation are spelt `from` and `value`."""
    turns: Any = _parsed(value)
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and "from" in turn for turn in turns
    )


def _parsed(value: Any) -> Any:
    """Return what a cell of JSON holds: in CSV, and where a column of objects would have no one
    type.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def messages_of(
    where: str,
    raw: Any,
    key: str,
    remarks: dict[str, None],
    *,
    system: Any = None,
    learns: bool = True,
) -> tuple[dict[str, Any], ...]:
    """Return the messages of a conversation, each with `role` and `content`.

    Args:
        where: The row, for refusals.
        remarks: Gets a line for each kind of change, in order.
        system: What a column beside the conversation says to the system.
        learns: Whether an assistant must speak in it.

    Raises:
        UserError: Naming the row, the message and the field.
    """
    turns = _parsed(raw)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(
            key, f"{where}: messages are not a list of role and content", "write them so"
        )
    refuse_half_characters(where, turns, key)
    found = [
        _message(f"{where}: message {number}", turn, key, remarks)
        for number, turn in enumerate(turns, 1)
    ]
    if isinstance(system, str) and system.strip() and (not found or found[0]["role"] != "system"):
        found.insert(0, {"role": "system", "content": system})
        remarks["the system column is the first message"] = None
    if learns and not any(turn["role"] == "assistant" for turn in found):
        raise UserError(
            key, f"{where} has no assistant turn", "drop that chat, or add the completion"
        )
    return tuple(found)


def _message(
    where: str, turn: Mapping[str, Any], key: str, remarks: dict[str, None]
) -> dict[str, Any]:
    fields = {name: value for name, value in turn.items() if value is not None}
    spelt = fields.pop("role", None) or fields.pop("from", None)
    fields.pop("from", None)
    role = ROLES.get(spelt.strip().lower()) if isinstance(spelt, str) else None
    if role is None:
        problem = f"{where} has the role {spelt!r}" if spelt is not None else f"{where} has no role"
        raise UserError(key, problem, "give system, user, assistant or tool")
    if spelt != role:
        remarks[f"the role {spelt} is read as {role}"] = None
    content_name = next((name for name in ("content", "value", "text") if name in turn), None)
    content = fields.pop(content_name, None) if content_name is not None else None
    message: dict[str, Any] = {"role": role}
    if str(spelt).lower() in CALLS:
        message |= {"content": "", "tool_calls": _calls(where, content, key)}
    else:
        message |= _content(where, content, key, remarks)
    message |= _other_fields(where, fields, key, remarks)
    if content_name is None and not message.keys() & {
        "tool_calls",
        "reasoning_content",
        "reasoning",
        "thinking",
    }:
        raise UserError(key, f"{where} has no content", "write role and content")
    return message


def _content(where: str, content: Any, key: str, remarks: dict[str, None]) -> dict[str, Any]:
    """Return `content` as text, and with it what parts of another type say."""
    if is_missing(content):
        return {"content": ""}
    if isinstance(content, str):
        return {"content": content}
    if isinstance(content, dict) and "type" in content:
        content = [content]
    if not isinstance(content, list):
        raise UserError(key, f"{where}: content is {type(content).__name__}", "give text")
    texts: list[str] = []
    thoughts: list[str] = []
    for given in content:
        part: Any = {"text": given} if isinstance(given, str) else given
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind in TEXT_PARTS:
            text = part.get("text", part.get("content"))
        elif kind in ("thinking", "reasoning"):
            text = part.get("thinking", part.get("reasoning", part.get("text")))
        else:
            raise UserError(
                key,
                f"{where} has a part of type {kind!r}",
                "only text is read: drop that chat or part",
            )
        if not isinstance(text, str):
            raise UserError(
                key, f"{where}: a part of type {kind!r} has no text", "write it as text"
            )
        (texts if kind in TEXT_PARTS else thoughts).append(text)
    remarks["content in parts is joined"] = None
    return {
        "content": "".join(texts),
        **({"reasoning_content": "".join(thoughts)} if thoughts else {}),
    }


def _other_fields(
    where: str, fields: dict[str, Any], key: str, remarks: dict[str, None]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in KEPT:
            if value not in ("", []):
                found[name] = value
        elif name in LEARNT:
            found["weight"] = _weight(where, name, value, key)
            if name != "weight":
                remarks[f"{name}: false in a message means that it is not learnt"] = None
        elif name == "function_call":
            found["tool_calls"] = _calls(where, value, key)
            remarks["function_call is read as tool_calls"] = None
        elif name in UNREAD:
            remarks[f"not read in messages: {name}"] = None
        elif value not in ("", [], {}):
            remedy = (
                f"known: role, content, {', '.join(KEPT)}, {', '.join(LEARNT)}; drop it from the"
                " file"
            )
            raise UserError(key, f"{where} has a field {name!r} that is not understood", remedy)
    if "tool_calls" in found and not _is_list_of_objects(found["tool_calls"]):
        raise UserError(
            key,
            f"{where}: tool_calls are no list of calls",
            "write them as OpenAI's interface does",
        )
    return found


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _weight(where: str, name: str, value: Any, key: str) -> int:
    if value not in (0, 1):  # true and false are among them
        raise UserError(
            key, f"{where}: {name} is {value!r}", "give 1, or 0 for a turn that is not to be learnt"
        )
    return int(value)


def _calls(where: str, content: Any, key: str) -> list[dict[str, Any]]:
    """Return calls spelt as JSON with `name` and `arguments`, as OpenAI's interface has them."""
    calls = _parsed(content)
    calls = [calls] if isinstance(calls, dict) else calls
    if not _is_list_of_objects(calls) or not all(
        isinstance(call.get("name"), str) for call in calls
    ):
        raise UserError(
            key, f"{where} is a call that cannot be read", 'write {"name": ..., "arguments": {...}}'
        )
    return [{"type": "function", "function": dict(call)} for call in calls]


def tools_of(
    where: str, raw: Any, key: str, remarks: dict[str, None]
) -> tuple[dict[str, Any], ...] | None:
    """Return a row's tools: a list of objects, or its JSON; None without any.

    Raises:
        UserError: Naming the row.
    """
    if is_missing(raw) or raw in ("", []):
        return None
    tools = _parsed(raw)
    if not _is_list_of_objects(tools):
        raise UserError(
            key, f"{where}: tools are no list of objects", "write them as OpenAI's interface does"
        )
    refuse_half_characters(where, tools, key)
    found = [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in tools
    ]
    if found != tools:
        remarks["tools get the form of OpenAI's interface"] = None
    return tuple(found) or None
