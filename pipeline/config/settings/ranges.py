"""Ranges that a field of the settings declares, and the check of them.

Nothing in this package imports torch: a refusal must be quick.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import field
from typing import Any

from pipeline.errors import UserError

MAX_SEED = 2**32 - 1  # what numpy's generators take as well as torch's
MAX_WHOLE = 2**63 - 1  # what a tensor's size, or a column of a store, can hold


def positive(default: Any) -> Any:
    """Declare a field that must be greater than zero (or null where its type allows it)."""
    return field(default=default, metadata={"above": 0})


def at_least_0(default: Any) -> Any:
    """Declare a field that must not be negative."""
    return field(default=default, metadata={"min": 0})


def fraction(default: Any) -> Any:
    """Declare a field in [0, 1]."""
    return field(default=default, metadata={"min": 0, "max": 1})


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Refuse a number outside the range its field declares.

    Raises:
        UserError: Naming the full key, the value and the range.
    """
    for item in dataclasses.fields(settings):
        value, key = getattr(settings, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        _check_numbers(value, key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        low, high, above = (item.metadata.get(name) for name in ("min", "max", "above"))
        if above is not None and not value > above:
            raise UserError(key, f"{value} is out of range", f"give a number greater than {above}")
        if low is not None and not value >= low:
            raise UserError(key, f"{value} is out of range", f"give a number of at least {low}")
        if high is not None and not value <= high:
            raise UserError(key, f"{value} is out of range", f"give a number of at most {high}")


def _check_numbers(value: Any, key: str) -> None:
    """Refuse what no machine counts to, in lists and dictionaries too.

    Raises:
        UserError: Naming the full key.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            _check_numbers(item, f"{key}.{name}")
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item, key)
    elif isinstance(value, int) and abs(value) > MAX_WHOLE:
        raise UserError(
            key, f"a number of {len(str(abs(value)))} digits is out of range", "give one below 2^63"
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            key, f"{value} is no number to work with", "give a finite one, or leave it out"
        )


def dotted_keys(settings: Any, prefix: str = "") -> Iterator[str]:
    """Yield every setting below a settings class as `a.b.c`."""
    for item in dataclasses.fields(settings):
        yield f"{prefix}{item.name}"
        factory = item.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            yield from dotted_keys(factory, f"{prefix}{item.name}.")
