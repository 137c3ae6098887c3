"""What to write in `data.columns` for rows that are not recognised: what is suggested is accepted
when it is followed.

A column is suggested by what its cells hold, in every row, and by its name only among those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.config.settings.data import DataFormat
from pipeline.data.cells import first_text, value_of
from pipeline.data.chats import is_conversation, messages_of
from pipeline.data.labels import check_classes, class_name
from pipeline.data.row_columns import Columns, is_about, mapped_as, plain_name
from pipeline.errors import UserError
from pipeline.tasks.table import Task

ASKING = ("question", "query", "prompt", "instruction", "problem", "input")
ANSWERING = (
    "answer",
    "response",
    "completion",
    "output",
    "reply",
    "solution",
    "target",
    "summary",
    "chosen",
)
"""Words in the names of columns that hold a prompt, or what it is answered with."""
WORSE = ("rejected", "dispreferred")  # the answer of a preference that is not to be learnt


def suggest(
    columns: Columns,
    task: Task,
    mapped: Mapping[str, str],
    label: str | None,
    needed: Sequence[str] = ("text",),
) -> str | None:
    """Return `data.columns` for rows; None where nothing would be accepted.

    Args:
        mapped: What `data.columns` has already; to classify, it stays.
        label: The column that is taken for the label.
        needed: Parts that a classified row must have.
    """
    parts = (
        _learnt(columns) if task.kind.is_language else _classified(columns, mapped, label, needed)
    )
    return None if parts is None else mapped_as(parts)


def _learnt(columns: Columns) -> dict[str, str] | None:
    """Return the parts of a conversation, a prompt with its completion, or a text."""
    texts = text_paths(columns)
    for chat in _chats(columns):
        asked = next(
            (path for path in [*_asking(texts), *_chats(columns, learns=False)] if path != chat),
            None,
        )
        if asked is None or not _only_answers(columns, chat):
            return {"messages": chat}
        return {"prompt": asked, "completion": chat}
    lists = [
        path
        for path in columns.paths()
        if path not in texts and _named(path, ANSWERING) and _answers(columns, path)
    ]
    answer = next((path for path in [*texts, *lists] if _named(path, ANSWERING)), None)
    prompts = [path for path in texts if path != answer]
    if answer is not None and prompts:
        return {"prompt": next(iter(_asking(prompts)), prompts[0]), "completion": answer}
    if len(texts) > 1:
        first = next(iter(_asking(texts)), texts[0])
        return {"prompt": first, "completion": next(path for path in texts if path != first)}
    return {"text": texts[0]} if texts else None


def _classified(
    columns: Columns, mapped: Mapping[str, str], label: str | None, needed: Sequence[str]
) -> dict[str, str] | None:
    """Return the parts of one text or two with a label."""
    found = label or next(iter(label_paths(columns, mapped.values())), None)
    free = text_paths(columns.without([*mapped.values(), found or ""]))
    texts = [path for path in free if not _repeats(columns, path)]
    kept = {role: path for role, path in mapped.items() if role in ("text", "text_pair", "label")}
    lacking = [role for role in ("text", "text_pair") if role not in kept]
    parts = {**kept, **dict(zip(lacking, texts, strict=False))}
    if found is None or not all(role in parts for role in needed):
        return None
    return parts if found == label else {**parts, "label": found}


def suggest_parts(
    columns: Columns, shape: DataFormat, needed: Sequence[str], mapped: Mapping[str, str]
) -> str | None:
    """Return `data.columns` with the parts that a shape lacks; None where no column holds them."""
    free = columns.without(mapped.values())
    if shape in (DataFormat.messages, DataFormat.sharegpt):
        return next((mapped_as({**mapped, "messages": path}) for path in _chats(free)), None)
    texts, parts = text_paths(free), dict(mapped)
    for role in (role for role in needed if role not in mapped):
        fitting = (
            _asking(texts)
            if role in ("prompt", "instruction")
            else [each for each in texts if _named(each, ANSWERING)]
        )
        chosen = next(iter([*fitting, *texts]), None)
        if chosen is None:
            return None
        texts.remove(chosen)
        parts[role] = chosen
    return mapped_as(parts)


def are_read(columns: Columns, shape: DataFormat, parts: Mapping[str, str]) -> bool:
    """Whether the cells of a shape's parts are what it reads, in every row."""
    if shape in (DataFormat.messages, DataFormat.sharegpt):
        return _are_chats(columns, parts["messages"])
    if shape is DataFormat.alpaca:
        return all(columns.are_texts(parts[role]) for role in ("instruction", "output"))
    if shape is not DataFormat.prompt_completion:
        return all(
            columns.are_texts(parts[role]) for role in ("text", "text_pair") if role in parts
        )
    asked, said = parts["prompt"], parts["completion"]
    is_asked = columns.are_texts(asked) or _are_chats(columns, asked, learns=False)
    return is_asked and (_answers(columns, said) or _are_chats(columns, said))


def text_paths(columns: Columns) -> list[str]:
    """Return the columns, and paths into objects, that hold a text in every row; best those that
    are more than names.

    Of a preference, the rejected text is left out where there is another.
    """
    held = [path for path in columns.paths() if columns.are_texts(path)]
    held = [path for path in held if not is_about(path)] or held
    held = [
        path for path in held if len({str(value) for value in columns.values(path)}) > 1
    ] or held
    return columns.wordiest([path for path in held if not _named(path, WORSE)] or held)


def label_paths(columns: Columns, taken: Iterable[str] = ()) -> list[str]:
    """Return the columns and paths that hold classes, best those of fewest."""
    counts = {path: _num_classes(columns, path) for path in columns.without(taken).paths()}
    found = [path for path, count in counts.items() if count]
    return sorted(found, key=lambda path: (is_about(path), counts[path]))


def _repeats(columns: Columns, path: str) -> bool:
    """Whether a column holds few values again and again, as a label does."""
    count = _num_classes(columns, path)
    return 0 < 2 * count <= len(columns.every)


def _num_classes(columns: Columns, path: str) -> int:
    """Return how many classes a column holds; 0 where its cells are none."""
    try:
        names = sorted(
            {class_name(where, value_of(fields, path), "") for where, fields in columns.every}
        )
        check_classes(names, len(columns.every), "")
    except UserError:
        return 0
    return len(names)


def _chats(columns: Columns, *, learns: bool = True) -> list[str]:
    """Return the columns and paths that hold a conversation in every row, the better one of a
    preference first.
    """
    found = [path for path in columns.paths() if _are_chats(columns, path, learns=learns)]
    return [path for path in found if not _named(path, WORSE)] or found


def _are_chats(columns: Columns, path: str, *, learns: bool = True) -> bool:
    return all(_is_chat(value_of(fields, path), learns=learns) for _, fields in columns.every)


def _is_chat(value: Any, *, learns: bool) -> bool:
    try:
        return is_conversation(value) and bool(messages_of("", value, "", {}, learns=learns))
    except UserError:
        return False


def _only_answers(columns: Columns, path: str) -> bool:
    """Whether nobody asks in a conversation: its prompt stands elsewhere."""
    found = (messages_of("", value_of(fields, path), "", {}) for _, fields in columns.rows)
    return all(turn["role"] == "assistant" for turns in found for turn in turns)


def _answers(columns: Columns, path: str) -> bool:
    held = [first_text(value_of(fields, path)) for _, fields in columns.every]
    return any(held) and all(text is not None for text in held)


def _asking(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if _named(path, ASKING)]


def _named(path: str, words: Iterable[str]) -> bool:
    name = plain_name(path)
    return any(word in name for word in words)
