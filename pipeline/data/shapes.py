"""What the rows of a data set are: recognised by their columns, and said in one line.

`data.format` forces a shape and `data.columns` says which column has which part; without them the
names below decide. Rows that could be two things are refused, both named, or go by the documented
order (docs/data.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.settings.data import DataFormat
from pipeline.data.cells import FILE, Row, value_of
from pipeline.data.chats import is_conversation, is_sharegpt
from pipeline.data.csv_rows import is_data
from pipeline.data.row_columns import Columns, mapped_as, plain_name, unread
from pipeline.data.suggestions import are_read, label_paths, suggest, suggest_parts
from pipeline.errors import UserError
from pipeline.tasks.table import Task

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
    ("question", "answers"),
    ("query", "response"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "answers"),
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
TOOLS = ("tools", "functions")
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
CLASSIFIED = (DataFormat.text_pair, DataFormat.text)
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


@dataclass(frozen=True, slots=True)
class Shape:
    """What rows are, and which column has which part.

    Attributes:
        columns: By role (`ROLES`), the column; those that rows may lack too.
        unread: Columns that nothing reads, and paths to what is not read of a column that is read
            in part.
    """

    format: DataFormat
    columns: dict[str, str]
    unread: tuple[str, ...] = ()

    def say(self) -> str:
        """Return it in a line: what is read from where, and what is not."""
        named = [f"{role}: {name}" for role, name in self.columns.items() if role != name]
        kind = self.format.value.replace("_", " ")
        kind = f"{kind} with label" if "label" in self.columns else kind
        also = [
            role
            for role in ("system", "context", "tools", "input")
            if self.columns.get(role) == role
        ]
        parts = [", ".join(named), f"with {', '.join(also)}" if also else ""]
        inside = f" ({'; '.join(part for part in parts if part)})" if any(parts) else ""
        return f"rows are {kind}{inside}" + (
            f"; not read: {', '.join(self.unread)}" if self.unread else ""
        )


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
    columns = Columns.of(rows)
    if not columns.names:
        raise UserError(key, f"{rows[0][0]} has no fields", "give each row a text")
    _check_mapped(mapped, columns)
    label = _label_column(columns, mapped, key) if task.kind.labelled else None
    given = wanted
    wanted = _implied(mapped, wanted, columns)
    if wanted is DataFormat.auto:
        wanted, parts = _choose(columns, mapped, label, task, rows[0][0], key)
    else:
        wanted, parts = _forced(wanted, columns, mapped, label)
    if task.kind.labelled and wanted not in CLASSIFIED:
        raise _not_classified(wanted, parts, columns, mapped, label, task, given)
    if wanted is DataFormat.text_pair and task.kind.is_language:
        raise _not_learnt(parts, columns, mapped, given)
    if parts is None:
        raise _does_not_fit(wanted, columns, mapped, task, label)
    if task.kind.labelled:
        if label is None:
            raise _no_label(columns, rows[0][0], parts, mapped, key)
        parts = {**parts, "label": label}
    return Shape(wanted, parts, unread(columns, [*parts.values(), FILE, group]))


def _forced(
    wanted: DataFormat, columns: Columns, mapped: Mapping[str, str], label: str | None
) -> tuple[DataFormat, dict[str, str] | None]:
    """Return the parts of a shape that a setting names, None where rows lack one.

    How turns are spelt tells messages and ShareGPT apart.
    """
    chats = (DataFormat.messages, DataFormat.sharegpt)
    for shape in chats if wanted in chats else (wanted,):
        parts = _parts(shape, columns, mapped, label)
        if parts is not None:
            return shape, parts
    return wanted, None


def _check_mapped(mapped: Mapping[str, str], columns: Columns) -> None:
    for role, name in mapped.items():
        if role not in ROLES:
            raise UserError(
                "data.columns", f"there is no part {role!r}", f"known: {', '.join(ROLES)}"
            )
        if name not in columns.names and not any(
            value_of(fields, name) is not None for _, fields in columns.rows
        ):
            raise UserError(
                "data.columns",
                f"there is no column {name!r}",
                f"there are {', '.join(columns.names)}",
            )


IMPLIED = (
    (DataFormat.messages, ("messages", "tools")),
    (DataFormat.alpaca, ("instruction", "output", "input")),
    (DataFormat.prompt_completion, ("prompt", "completion")),
    (DataFormat.text_pair, ("text_pair",)),
    (DataFormat.text, ("text",)),
)


def _implied(mapped: Mapping[str, str], wanted: DataFormat, columns: Columns) -> DataFormat:
    """Return the shape that `data.columns` speaks of, where `data.format` names none."""
    if wanted is not DataFormat.auto:
        return wanted
    meant = [shape for shape, roles in IMPLIED if any(role in mapped for role in roles)]
    if DataFormat.text_pair in meant and DataFormat.text in meant:
        meant.remove(DataFormat.text)
    if len(meant) > 1:
        both = " and ".join(shape.value for shape in meant[:2])
        whole = next(
            (shape for shape in meant if _parts(shape, columns, mapped, mapped.get("label"))), None
        )
        remedy = "name the parts of one" + (
            f", or give data.format={whole.value}" if whole is not None else ""
        )
        raise UserError("data.columns", f"speaks of {both}", remedy)
    return meant[0] if meant else DataFormat.auto


def _label_column(columns: Columns, mapped: Mapping[str, str], key: str) -> str | None:
    if "label" in mapped:
        return mapped["label"]
    columns = columns.without(mapped.values())
    exact = columns.find("label", "labels")
    if exact is not None:
        return exact
    found = [name for name in columns.names if plain_name(name) in LABELS and columns.values(name)]
    coarse = [name for name in found if plain_name(name) in COARSE]
    if len(found) > 1 and not coarse:
        problem = f"the label could be {found[0]} or {found[1]}"
        best = next((name for name in found if name in label_paths(columns)), found[0])
        chosen = {**mapped, "label": best}
        is_known = any(_parts(shape, columns, chosen, best) for shape in CLASSIFIED)
        written = None if is_known else suggest(columns, Task.sequence_classification, chosen, best)
        if is_known or written is not None:  # else what is refused is that there is no text
            raise UserError(key, problem, f"choose with {written or mapped_as(chosen)}")
        return best
    return (coarse or found or [None])[0]


def _no_label(
    columns: Columns, where: str, parts: Mapping[str, str], mapped: Mapping[str, str], key: str
) -> UserError:
    others = label_paths(columns, parts.values())
    written = mapped_as({**mapped, "label": "NAME"})
    remedy = (
        f"choose one of {', '.join(others)} with {written}" if others else "give a label to each"
    )
    return UserError(key, f"{where} has no field 'label'", remedy)


def _choose(
    columns: Columns, mapped: Mapping[str, str], label: str | None, task: Task, where: str, key: str
) -> tuple[DataFormat, dict[str, str]]:
    """Return the shape that fits; conversations and Alpaca come before others, whose texts they
    render themselves.
    """
    order = CLASSIFIED if task.kind.labelled else tuple(NEEDED)
    fits = {
        shape: parts
        for shape in order
        if (parts := _parts(shape, columns, mapped, label)) is not None
    }
    first = next(iter(fits), None)
    if first is None:
        raise _no_shape(columns, mapped, label, task, where, key)
    rivals = [shape for shape in fits if shape is not first and shape is not DataFormat.sharegpt]
    own_text = "text" in {plain_name(name) for name in fits[first].values()}
    rival = next(
        (shape for shape in rivals if plain_name(fits[shape].get("text", "")) == "text"), None
    )
    if (
        rival is not None
        and not own_text
        and first not in (DataFormat.messages, DataFormat.sharegpt, DataFormat.alpaca)
    ):
        shown = [f"{shape.value} ({', '.join(fits[shape].values())})" for shape in (first, rival)]
        read = [shape for shape in (first, rival) if are_read(columns, shape, fits[shape])]
        remedy = (
            "choose with"
            f" {' or '.join(f'data.format={shape.value}' for shape in read or (first, rival))}"
        )
        raise UserError(key, f"rows could be {shown[0]} or {shown[1]}", remedy)
    return first, fits[first]


def _parts(
    shape: DataFormat, columns: Columns, mapped: Mapping[str, str], label: str | None
) -> dict[str, str] | None:
    """Return the columns of a shape by role; None where rows do not fit it."""
    found: dict[str, str | None]
    free = columns.without(mapped.values()).readable()  # a column has one part
    if shape in (DataFormat.messages, DataFormat.sharegpt):
        found = _chat_parts(shape, free, mapped)
    elif shape is DataFormat.alpaca:
        found = {
            "instruction": free.find(*ALPACA[0]),
            "output": free.find(*ALPACA[1]),
            "input": free.find("input", "context"),
            "system": free.find(*SYSTEMS),
        }
    elif shape is DataFormat.prompt_completion:
        found = _completion_parts(free, mapped)
    elif shape is DataFormat.text_pair:
        found = _pair(free, PAIRS, ("text", "text_pair"), mapped)
    else:
        found = {"text": _text_column(columns.without(mapped.values()), mapped, label)}
    own = {role: name for role, name in mapped.items() if role in found}
    parts = {role: name for role, name in {**found, **own}.items() if name is not None}
    return parts if all(role in parts for role in NEEDED[shape]) else None


def _completion_parts(columns: Columns, mapped: Mapping[str, str]) -> dict[str, str | None]:
    """Return the parts of a prompt with its completion; as messages they have tools, as texts a
    context.
    """
    pair = _pair(columns, PROMPTS, ("prompt", "completion"), mapped)
    cells = [value for name in pair.values() if name is not None for value in columns.values(name)]
    is_chat = any(map(is_conversation, cells))
    rest = {"tools": columns.find(*TOOLS)} if is_chat else {"context": columns.find(*CONTEXTS)}
    return {**pair, **rest, "system": columns.find(*SYSTEMS)}


def _chat_parts(
    shape: DataFormat, columns: Columns, mapped: Mapping[str, str]
) -> dict[str, str | None]:
    name = mapped.get("messages")
    if name is None:
        found = columns.conversations()
        if len(found) > 1:
            problem = f"the messages could be {found[0]} or {found[1]}"
            raise UserError(
                "data.columns",
                problem,
                f"choose with {mapped_as({**mapped, 'messages': found[0]})}",
            )
        name = found[0] if found else columns.find("messages")
    cells = [] if name is None else [value_of(fields, name) for _, fields in columns.rows]
    if name is not None and (shape is DataFormat.sharegpt) != any(map(is_sharegpt, cells)):
        name = None
    return {"messages": name, "tools": columns.find(*TOOLS), "system": columns.find(*SYSTEMS)}


def _pair(
    columns: Columns,
    known: Sequence[tuple[str, str]],
    roles: tuple[str, str],
    mapped: Mapping[str, str],
) -> dict[str, str | None]:
    """Return the two columns of a pair, the first known one; a mapped column is the other's
    partner.
    """
    given = [mapped.get(role) for role in roles]
    for names in known:
        both = [given[at] or columns.find(names[at]) for at in (0, 1)]
        if all(both) and both[0] != both[1]:
            return dict(zip(roles, both, strict=True))
    return dict(zip(roles, given, strict=True))


def _text_column(columns: Columns, mapped: Mapping[str, str], label: str | None) -> str | None:
    if "text" in mapped:
        return mapped["text"]
    known = columns.readable().find("text")
    if known is not None:
        return known
    labels = [name for name in columns.names if plain_name(name) in (*LABELS, "label", "labels")]
    held = columns.texts(without=[label, *labels])
    is_one = (
        len(held) == 1
        and not any(map(is_data, columns.names))
        and not any(map(columns.hides_text, columns.names))
    )
    return held[0] if is_one else None


def _no_shape(
    columns: Columns, mapped: Mapping[str, str], label: str | None, task: Task, where: str, key: str
) -> UserError:
    """Return the refusal of rows that are nothing known; it names every column that holds text, and
    loses none.
    """
    names = ", ".join(columns.names)
    suggested = suggest(columns, task, mapped, label)
    if task.kind.labelled and len(columns.conversations()) < 2:
        fits = {shape: _parts(shape, columns, {}, label) for shape in NEEDED}
        other = next((shape for shape, parts in fits.items() if parts is not None), None)
        if other is not None:
            auto = DataFormat.auto
            return _not_classified(other, fits[other], columns, mapped, label, task, auto)
    if any(map(is_data, columns.names)):
        problem = f"{where}: the columns are named {names}, which reads like a row of data"
        remedy = "add a first line with the names of the columns"
        return UserError(
            key, problem, f"{remedy}, or name them with {suggested}" if suggested else remedy
        )
    problem = f"{where} has no field 'text', and {names} are no shape that is known"
    if suggested is None:
        also = " and a label" if task.kind.labelled and label is None else ""
        return UserError(
            key, problem, f"no column holds text in every row: give each row a text{also}"
        )
    texts = columns.wordiest(
        path for path in columns.paths() if columns.are_texts(path) and path != label
    )
    held = f"{', '.join(texts)} hold text: " if len(texts) > 1 else ""
    return UserError(
        key, problem, f"{held}say what each is, e.g. {suggested}; what is not named is not read"
    )


def _does_not_fit(
    shape: DataFormat, columns: Columns, mapped: Mapping[str, str], task: Task, label: str | None
) -> UserError:
    problem = (
        f"{shape.value} needs {' and '.join(NEEDED[shape])}, and the columns are"
        f" {', '.join(columns.names)}"
    )
    if task.kind.labelled:
        suggested = suggest(columns, task, mapped, label, NEEDED[shape])
    else:
        suggested = suggest_parts(columns, shape, NEEDED[shape], mapped)
    remedy = (
        "no other column holds that: give another shape"
        if suggested is None
        else f"name them with {suggested}"
    )
    return UserError("data.format", problem, remedy)


def _not_learnt(
    parts: Mapping[str, str] | None, columns: Columns, mapped: Mapping[str, str], given: DataFormat
) -> UserError:
    """Return the refusal of pairs of texts to learn from; what it suggests would be accepted."""
    named = (
        f"{parts['text']} and {parts['text_pair']}"
        if parts is not None
        else "the texts of text_pair"
    )
    label = mapped.get("label") or columns.find("label", "labels")
    is_read = (
        parts is not None
        and label in label_paths(columns)
        and are_read(columns, DataFormat.text_pair, parts)
    )
    remedies = ["task=sequence_classification"] if is_read else []
    suggested = suggest(columns, Task.causal_lm, {}, None)
    if suggested is not None and given is DataFormat.auto:
        remedies.append(suggested)
    remedy = f"give {', or '.join(remedies)}" if remedies else "take another shape"
    return UserError("task", f"{named} are a pair, which causal_lm does not read", remedy)


def _not_classified(
    shape: DataFormat,
    parts: Mapping[str, str] | None,
    columns: Columns,
    mapped: Mapping[str, str],
    label: str | None,
    task: Task,
    given: DataFormat,
) -> UserError:
    """Return the refusal of what has no label to learn; what it suggests would be accepted."""
    remedies = ["task=causal_lm"] if parts is not None and are_read(columns, shape, parts) else []
    suggested = suggest(columns, task, mapped, label)
    if suggested is not None and given is DataFormat.auto:
        remedies.append(suggested)
    remedy = f"give {', or '.join(remedies)}" if remedies else "give texts with a label"
    return UserError("task", f"rows are {shape.value}, which {task.value} does not read", remedy)
