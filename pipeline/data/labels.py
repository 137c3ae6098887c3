"""Labels as the data has them to classes: any set of distinct values is a set of classes.

A class is its name. Text is trimmed and kept as it is ("0" and "00" are two classes); a whole
number, true and false are written as JSON does, so that 1, 1.0 and "1" are one class.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pipeline.errors import UserError
from pipeline.ledger.numbers import how_many

UNLABELLED = -1  # what public data sets write where a label is hidden
MANY = 20  # distinct values; more of them, where they are no classes, are a quantity
SHOWN = 30  # classes in a note


def class_name(where: str, value: Any, key: str) -> str:
    """Return the name of the class that a cell holds.

    Raises:
        UserError: If it holds none, naming the row.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, str) and value.strip():
        return unicodedata.normalize("NFC", value.strip())
    if isinstance(value, list | dict):
        raise UserError(
            key,
            f"{where} has {how_many(len(value), 'label')}",
            "one class for each document is read",
        )
    shown = "no label" if value is None else f"label {value!r}"
    raise UserError(key, f"{where} has {shown}", "give whole numbers or names, or drop that row")


def plainly(name: str) -> str:
    """Return what a text is as a value: `True` is `true`, `1.0` is `1`; the text itself where it is
    no value.

    Files without types (CSV, TSV) hold the words of the program that wrote them, and pandas writes
    a column of whole numbers with a gap in it as `1.0`.
    """
    if name.lower() in ("true", "false"):
        return name.lower()
    if re.fullmatch(r"-?(0|[1-9]\d{0,15})\.\d{1,20}", name):
        return class_name("", Decimal(name), "")
    return name


def value_name(value: Any) -> str:
    """Return the name of any value, the same for all spellings of it: 1, 1.0, "1" and " 1.0" are
    one.
    """
    if isinstance(value, bool | int | float | Decimal | str):
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return plainly(class_name("", value, "")) if str(value).strip() else ""
    return (
        json.dumps(value, sort_keys=True, default=str)
        if isinstance(value, list | dict)
        else str(value)
    )


def is_hidden(value: Any) -> bool:
    """Whether a cell says that there is a label, and not which."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or str(value).strip() in ("", "-1", "-1.0")
    )


def ordered(names: Iterable[str]) -> list[str]:
    """Return classes in the order of their indices: numbers by value, names by alphabet."""
    names = set(names)
    if all(re.fullmatch(r"0|-?[1-9]\d*", name) for name in names):
        return sorted(names, key=Decimal)
    if all(re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", name) for name in names):
        return sorted(names, key=lambda name: (Decimal(name), name))  # 1 and 1.0 of one file
    return sorted(names)


def check_classes(names: Sequence[str], num_documents: int, key: str) -> None:
    """Refuse labels that are no classes: all alike, a quantity, or one for almost every document.

    Raises:
        UserError: Saying which.
    """
    if len(names) == 1:
        raise UserError(key, f"all documents have label {names[0]!r}", "give at least two classes")
    if len(names) <= MANY:
        return
    choose = "choose another column with data.columns={label: NAME}"
    if any(re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", name) for name in names):
        problem = (
            f"labels take {len(names)} values such as {names[len(names) // 2]}: a quantity, and no"
            " classes"
        )
        raise UserError(key, problem, choose)
    if len(names) > num_documents / 2:
        documents = how_many(num_documents, "document of train has", "documents of train have")
        problem = f"{documents} {how_many(len(names), 'different label')}"
        raise UserError(key, problem, choose)


def renamed(names: Sequence[str], label_map: Mapping[str, str]) -> dict[str, str]:
    """Return the name that each class goes by (`data.label_map`).

    Raises:
        UserError: If it renames a class that is not there.
    """
    unknown = next((name for name in label_map if name not in names), None)
    if unknown is not None:
        raise UserError(
            "data.label_map", f"there is no label {unknown!r}", f"known: {shortened(names)}"
        )
    return {name: label_map.get(name, name) for name in names}


def shortened(names: Sequence[str], most: int = SHOWN) -> str:
    """Return names in a line, the first ones of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def class_notes(labels: Sequence[str], counts: Mapping[str, Counter[int]]) -> list[str]:
    """Return what to know of classes: their order, how many documents each has, and which train
    lacks.

    Args:
        counts: Documents by split and class index.
    """
    shown = [
        f"{at}: {name} ({'/'.join(str(counts[split][at]) for split in counts)})"
        for at, name in enumerate(labels)
    ]
    notes = [f"classes by index, with documents of {'/'.join(counts)}: {shortened(shown)}"]
    absent = [name for at, name in enumerate(labels) if not counts["train"][at]]
    if absent:
        tested = sum(counts["test"][at] for at, name in enumerate(labels) if name in absent)
        is_are = (
            f"class {absent[0]} has" if len(absent) == 1 else f"classes {shortened(absent)} have"
        )
        notes.append(
            f"{is_are} no document in train; {tested} of test are of it and are scored like the"
            " others"
        )
    return notes
