"""What the rows of a data set are: recognised by their columns, and said in one line.

`data.format` forces a shape and `data.columns` says which column has which part; without them the names below decide.
Rows that could be two things are refused, both named, or go by the documented order (docs/data.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import DataFormat, Task
from pipeline.data.cells import FILE, Row, is_missing, value_of
from pipeline.data.chats import COLUMNS as CHAT_COLUMNS
from pipeline.data.chats import is_conversation, is_sharegpt
from pipeline.data.csv_rows import is_data
from pipeline.errors import UserError

PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("texta", "textb"),
    ("sentencea", "sentenceb"),
    ("text", "textpair"),
    ("question", "sentence"),
    ("query", "passage"),
    ("query", "document"),
    ("question", "passage"),
    ("question", "context"),
    ("s1", "s2"),
    ("sent1", "sent2"),
    ("claim", "evidence"),
)
"""Columns of a pair of texts with a label, as data sets name them (`plain_name`)."""
PROMPTS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("question", "response"),
    ("query", "answer"),
    ("input", "output"),
    ("inputs", "targets"),
    ("source", "target"),
    ("problem", "solution"),
    ("user", "assistant"),
    ("instruction", "completion"),
)
"""Columns of a prompt with its completion."""
ALPACA = (("instruction",), ("output", "response"))
CONTEXTS = ("context", "passage", "document")  # read before a question
SYSTEMS = ("system", "systemprompt")
LABELS = (
    "class",
    "target",
    "category",
    "sentiment",
    "stars",
    "rating",
    "score",
    "intent",
    "topic",
    "emotion",
    "coarselabel",
    "labelcoarse",
    "finelabel",
    "labelfine",
    "goldlabel",
    "gold",
    "labelname",
    "labeltext",
)
COARSE = ("coarselabel", "labelcoarse")  # chosen where a finer one stands beside it
ROLES = (
    "text",
    "text_pair",
    "label",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "context",
    "messages",
    "tools",
)
NEEDED = {
    DataFormat.messages: ("messages",),
    DataFormat.sharegpt: ("messages",),
    DataFormat.alpaca: ("instruction", "output"),
    DataFormat.prompt_completion: ("prompt", "completion"),
    DataFormat.text_pair: ("text", "text_pair"),
    DataFormat.text: ("text",),
}
ABOUT = frozenset(
    (
        "id",
        "idx",
        "index",
        "uid",
        "guid",
        "uuid",
        "key",
        "hash",
        "url",
        "link",
        "source",
        "date",
        "time",
        "timestamp",
        "lang",
        "language",
        "license",
        "split",
        "author",
        "user",
        "username",
        "name",
        "file",
        "filename",
        "path",
        "meta",
        "metadata",
        "dataset",
        "subset",
        "model",
        "version",
    )
)
"""Columns that say something about a text and are none."""
LOOKED_AT = 200  # rows that tell what a column holds


@dataclass(frozen=True, slots=True)
class Shape:
    """What rows are, and which column has which part.

    Attributes:
        columns: By role (`ROLES`), the column; those that rows may lack too.
        unread: Columns that nothing reads.
    """

    format: DataFormat
    columns: dict[str, str]
    unread: tuple[str, ...] = ()

    def say(self) -> str:
        """Return it in a line: what is read from where, and what is not."""
        named = [f"{role}: {name}" for role, name in self.columns.items() if role != name]
        kind = self.format.value.replace("_", " ")
        kind = f"{kind} with label" if "label" in self.columns else kind
        also = [role for role in ("system", "context", "tools", "input") if self.columns.get(role) == role]
        parts = [", ".join(named), f"with {', '.join(also)}" if also else ""]
        inside = f" ({'; '.join(part for part in parts if part)})" if any(parts) else ""
        return f"rows are {kind}{inside}" + (f"; not read: {', '.join(self.unread)}" if self.unread else "")


def plain_name(column: str) -> str:
    """Return a column's name as the lists of names have it: `Sentence 1` and `sentence_1` are `sentence1`."""
    return re.sub(r"[^a-z0-9]", "", column.lower())


@dataclass(slots=True)
class _Columns:
    """The columns of some rows, in order, with what they hold."""

    rows: Sequence[Row]
    names: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Columns:
        kinds = dict.fromkeys(tuple(fields) for _, fields in rows)  # all rows have few kinds of columns
        names = list(dict.fromkeys(name for names in kinds for name in names))
        return cls(rows[:LOOKED_AT], names[:1] if names == ["text", FILE] else names)  # a text file has one column

    def find(self, *plain: str) -> str | None:
        """Return the first column that goes by one of some plain names."""
        by_name = {plain_name(name): name for name in reversed(self.names)}
        return next((by_name[name] for name in plain if name in by_name), None)

    def values(self, name: str) -> list[Any]:
        return [fields[name] for _, fields in self.rows if not is_missing(fields.get(name))]

    def conversations(self) -> list[str]:
        return [
            name
            for name in self.names
            if plain_name(name) in CHAT_COLUMNS and any(map(is_conversation, self.values(name)))
        ]

    def texts(self, *, without: Iterable[str | None]) -> list[str]:
        """Return the columns that hold texts: several words, or where none does, words."""
        held = [
            name
            for name in self.names
            if name not in without
            and plain_name(name) not in ABOUT
            and any(_is_words(value) for value in self.values(name))
        ]
        several = [name for name in held if any(" " in str(value).strip() for value in self.values(name))]
        return several or held


def _is_words(value: Any) -> bool:
    return isinstance(value, str) and any(character.isalpha() for character in value)


def recognise(
    rows: Sequence[Row],
    wanted: DataFormat,
    mapped: Mapping[str, str],
    task: Task,
    key: str,
    *,
    group: str | None = None,
) -> Shape:
    """Return the shape of rows; what their columns hold is told by the first ones.

    Args:
        wanted: `data.format`.
        mapped: `data.columns`.
        group: `data.group_field`.

    Raises:
        UserError: If there is none, or more than one.
    """
    columns = _Columns.of(rows)
    if not columns.names:
        raise UserError(key, f"{rows[0][0]} has no fields", "give each row a text")
    _check_mapped(mapped, columns)
    label = _label_column(columns, mapped, key) if task is Task.sequence_classification else None
    wanted = _implied(mapped, wanted)
    if wanted is DataFormat.auto:
        wanted, parts = _choose(columns, mapped, label, task, rows[0][0], key)
    else:
        wanted, parts = _forced(wanted, columns, mapped, label)
    _check_task(wanted, parts, task)
    if task is Task.sequence_classification:
        if label is None:
            raise _no_label(columns, rows[0][0], parts, key)
        parts = {**parts, "label": label}
    read = {*parts.values(), FILE, group}
    return Shape(wanted, parts, tuple(name for name in columns.names if name not in read))


def _forced(
    wanted: DataFormat, columns: _Columns, mapped: Mapping[str, str], label: str | None
) -> tuple[DataFormat, dict[str, str]]:
    """Return the parts of a shape that a setting names; how turns are spelt tells messages and ShareGPT apart."""
    chats = (DataFormat.messages, DataFormat.sharegpt)
    for shape in chats if wanted in chats else (wanted,):
        parts = _parts(shape, columns, mapped, label)
        if parts is not None:
            return shape, parts
    raise _does_not_fit(wanted, columns, mapped)


def _check_mapped(mapped: Mapping[str, str], columns: _Columns) -> None:
    for role, name in mapped.items():
        if role not in ROLES:
            raise UserError("data.columns", f"there is no part {role!r}", f"known: {', '.join(ROLES)}")
        if name not in columns.names and not any(value_of(fields, name) is not None for _, fields in columns.rows):
            raise UserError("data.columns", f"there is no column {name!r}", f"there are {', '.join(columns.names)}")


IMPLIED = (
    (DataFormat.messages, ("messages", "tools")),
    (DataFormat.alpaca, ("instruction", "output", "input")),
    (DataFormat.prompt_completion, ("prompt", "completion")),
    (DataFormat.text_pair, ("text_pair",)),
    (DataFormat.text, ("text",)),
)


def _implied(mapped: Mapping[str, str], wanted: DataFormat) -> DataFormat:
    """Return the shape that `data.columns` speaks of, where `data.format` names none."""
    if wanted is not DataFormat.auto:
        return wanted
    meant = [shape for shape, roles in IMPLIED if any(role in mapped for role in roles)]
    if DataFormat.text_pair in meant and DataFormat.text in meant:
        meant.remove(DataFormat.text)
    if len(meant) > 1:
        both = " and ".join(shape.value for shape in meant[:2])
        raise UserError(
            "data.columns", f"speaks of {both}", f"name the parts of one, or give data.format={meant[0].value}"
        )
    return meant[0] if meant else DataFormat.auto


def _label_column(columns: _Columns, mapped: Mapping[str, str], key: str) -> str | None:
    if "label" in mapped:
        return mapped["label"]
    exact = columns.find("label", "labels")
    if exact is not None:
        return exact
    found = [name for name in columns.names if plain_name(name) in LABELS and columns.values(name)]
    coarse = [name for name in found if plain_name(name) in COARSE]
    if len(found) > 1 and not coarse:
        problem = f"the label could be {found[0]} or {found[1]}"
        raise UserError(key, problem, f"choose with {mapped_as(label=found[0])}")
    return (coarse or found or [None])[0]


def _no_label(columns: _Columns, where: str, parts: Mapping[str, str], key: str) -> UserError:
    others = [name for name in columns.names if name not in parts.values()]
    remedy = (
        f"choose one of {', '.join(others)} with data.columns={{label: NAME}}" if others else "give a label to each"
    )
    return UserError(key, f"{where} has no field 'label'", remedy)


def _choose(
    columns: _Columns, mapped: Mapping[str, str], label: str | None, task: Task, where: str, key: str
) -> tuple[DataFormat, dict[str, str]]:
    """Return the shape that fits; conversations and Alpaca come before others, whose texts they render themselves."""
    order = (DataFormat.text_pair, DataFormat.text) if task is Task.sequence_classification else tuple(NEEDED)
    fits = {shape: parts for shape in order if (parts := _parts(shape, columns, mapped, label)) is not None}
    first = next(iter(fits), None)
    if first is None:
        raise _no_shape(columns, label, task, where, key)
    rivals = [shape for shape in fits if shape is not first and shape is not DataFormat.sharegpt]
    own_text = "text" in {plain_name(name) for name in fits[first].values()}
    rival = next((shape for shape in rivals if plain_name(fits[shape].get("text", "")) == "text"), None)
    if (
        rival is not None
        and not own_text
        and first not in (DataFormat.messages, DataFormat.sharegpt, DataFormat.alpaca)
    ):
        shown = [f"{shape.value} ({', '.join(fits[shape].values())})" for shape in (first, rival)]
        remedy = f"choose with data.format={first.value} or data.format={rival.value}"
        raise UserError(key, f"rows could be {shown[0]} or {shown[1]}", remedy)
    return first, fits[first]


def _parts(shape: DataFormat, columns: _Columns, mapped: Mapping[str, str], label: str | None) -> dict[str, str] | None:
    """Return the columns of a shape by role; None where rows do not fit it."""
    found: dict[str, str | None]
    if shape in (DataFormat.messages, DataFormat.sharegpt):
        found = _chat_parts(shape, columns, mapped)
    elif shape is DataFormat.alpaca:
        found = {
            "instruction": columns.find(*ALPACA[0]),
            "output": columns.find(*ALPACA[1]),
            "input": columns.find("input", "context"),
            "system": columns.find(*SYSTEMS),
        }
    elif shape is DataFormat.prompt_completion:
        found = {
            **_pair(columns, PROMPTS, ("prompt", "completion"), mapped),
            "context": columns.find(*CONTEXTS),
            "system": columns.find(*SYSTEMS),
        }
    elif shape is DataFormat.text_pair:
        found = _pair(columns, PAIRS, ("text", "text_pair"), mapped)
    else:
        found = {"text": _text_column(columns, mapped, label)}
    own = {role: name for role, name in mapped.items() if role in found or role in ("tools", "system", "context")}
    parts = {role: name for role, name in {**found, **own}.items() if name is not None}
    return parts if all(role in parts for role in NEEDED[shape]) else None


def _chat_parts(shape: DataFormat, columns: _Columns, mapped: Mapping[str, str]) -> dict[str, str | None]:
    name = mapped.get("messages")
    if name is None:
        found = columns.conversations()
        if len(found) > 1:
            problem = f"the messages could be {found[0]} or {found[1]}"
            raise UserError("data.columns", problem, f"choose with {mapped_as(messages=found[0])}")
        name = found[0] if found else columns.find("messages")
    cells = [] if name is None else [value_of(fields, name) for _, fields in columns.rows]
    if name is not None and (shape is DataFormat.sharegpt) != any(map(is_sharegpt, cells)):
        name = None
    return {"messages": name, "tools": columns.find("tools", "functions"), "system": columns.find(*SYSTEMS)}


def _pair(
    columns: _Columns, known: Sequence[tuple[str, str]], roles: tuple[str, str], mapped: Mapping[str, str]
) -> dict[str, str | None]:
    """Return the two columns of a pair, the first known one; a mapped column is the other's partner."""
    given = [mapped.get(role) for role in roles]
    for names in known:
        both = [given[at] or columns.find(names[at]) for at in (0, 1)]
        if all(both) and both[0] != both[1]:
            return dict(zip(roles, both, strict=True))
    return dict(zip(roles, given, strict=True))


def _text_column(columns: _Columns, mapped: Mapping[str, str], label: str | None) -> str | None:
    if "text" in mapped:
        return mapped["text"]
    known = columns.find("text")
    if known is not None:
        return known
    labels = [name for name in columns.names if plain_name(name) in (*LABELS, "label", "labels")]
    held = columns.texts(without=[label, *labels])
    is_one = len(held) == 1 and not any(map(is_data, columns.names))
    return held[0] if is_one else None


def _no_shape(columns: _Columns, label: str | None, task: Task, where: str, key: str) -> UserError:
    """Return the refusal of rows that are nothing known; it names every column that holds text, and loses none."""
    names = ", ".join(columns.names)
    if task is Task.sequence_classification:
        other = next((shape for shape in NEEDED if _parts(shape, columns, {}, label) is not None), None)
        if other is not None:
            return _wrong_task(other)
    unnamed = next((name for name in columns.names if is_data(name)), None)
    if unnamed is not None:
        problem = f"{where}: the columns are named {names}, which reads like a row of data"
        remedy = "add a first line with the names of the columns, or name them with data.columns={text: NAME}"
        return UserError(key, problem, remedy)
    texts = columns.texts(without=[label])
    problem = f"{where} has no field 'text', and {names} are no shape that is known"
    if len(texts) < 2:
        example = mapped_as(text=(texts or columns.names)[0])
        return UserError(key, problem, f"say what they are, e.g. {example}")
    first, second = texts[:2]
    example = mapped_as(prompt=first, completion=second)
    if task is Task.sequence_classification:
        example = mapped_as(text=first, text_pair=second)
    said = f"{', '.join(texts)} hold text: say what each is, e.g. {example}; what is not named is not read"
    return UserError(key, problem, said)


def mapped_as(**columns: str) -> str:
    """Return `data.columns` as a command line would set it, names quoted where YAML needs it."""
    quoted = {
        role: name if re.fullmatch(r"\w[\w ./-]*", name) else json.dumps(name, ensure_ascii=False)
        for role, name in columns.items()
    }
    return f"data.columns={{{', '.join(f'{role}: {name}' for role, name in quoted.items())}}}"


def _does_not_fit(shape: DataFormat, columns: _Columns, mapped: Mapping[str, str]) -> UserError:
    lacking = [role for role in NEEDED[shape] if role not in mapped]
    problem = f"{shape.value} needs {' and '.join(NEEDED[shape])}, and the columns are {', '.join(columns.names)}"
    named = ", ".join(f"{role}: NAME" for role in lacking or NEEDED[shape])
    return UserError("data.format", problem, f"name them with data.columns={{{named}}}")


def _check_task(shape: DataFormat, parts: Mapping[str, str], task: Task) -> None:
    classifies = task is Task.sequence_classification
    if shape is DataFormat.text_pair and not classifies:
        problem = f"{parts['text']} and {parts['text_pair']} are a pair, which causal_lm does not read"
        other = mapped_as(prompt=parts["text"], completion=parts["text_pair"])
        raise UserError("task", problem, f"give task=sequence_classification, or {other}")
    if classifies and shape not in (DataFormat.text, DataFormat.text_pair):
        raise _wrong_task(shape)


def _wrong_task(shape: DataFormat) -> UserError:
    remedy = "give task=causal_lm, or data.columns={text: NAME, label: NAME}"
    return UserError("task", f"rows are {shape.value}, which sequence_classification does not read", remedy)
