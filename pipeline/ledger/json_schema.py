"""Whether a value is what a JSON Schema says: the part of the standard that the schemas of this
project use.

Source: JSON Schema 2020-12, https://json-schema.org/draft/2020-12/json-schema-validation; the tests
hold it against the library `jsonschema`, which reads every result in them and is not needed to run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]
_IS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and float(value).is_integer(),
    "number": lambda value: _is_number(value),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def why_not(value: Any, schema: Schema, defs: Schema | None = None, at: str = "") -> str | None:
    """Return what is wrong with a value, and where; None where it is as the schema says.

    Numbers are finite and below 2^63: what JSON cannot hold, or no clock counts to, is none.

    Args:
        defs: What `$ref` refers to; None: the schema's own `$defs`.
    """
    known: Schema = schema.get("$defs", {}) if defs is None else defs
    if "$ref" in schema:
        return why_not(value, known[schema["$ref"].rpartition("/")[2]], known, at)
    where = at or "it"
    for check in (_type, _choice, _number, _text, _array, _object, _combined):
        said = check(value, schema, known, where)
        if said is not None:
            return said
    return None


def _is_number(value: Any) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and (abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value))


def _type(value: Any, schema: Schema, _: Schema, at: str) -> str | None:
    kinds = schema.get("type")
    if kinds is None or any(
        _IS[kind](value) for kind in ([kinds] if isinstance(kinds, str) else kinds)
    ):
        return None
    return f"{at} is no {kinds if isinstance(kinds, str) else ' or '.join(kinds)}"


def _choice(value: Any, schema: Schema, _: Schema, at: str) -> str | None:
    allowed = (
        schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    )
    if allowed is None or any(
        # In Python `True == 1`, in JSON it is not.
        value == each and isinstance(value, bool) == isinstance(each, bool)
        for each in allowed
    ):
        return None
    return f"{at} is {str(value)[:40]!r}"


def _number(value: Any, schema: Schema, _: Schema, at: str) -> str | None:
    if "minimum" in schema and _is_number(value) and value < schema["minimum"]:
        return f"{at} is {value}"
    if "maximum" in schema and _is_number(value) and value > schema["maximum"]:
        return f"{at} is {value}"
    return None


def _text(value: Any, schema: Schema, _: Schema, at: str) -> str | None:
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        return f"{at} is {value[:40]!r}"
    return None


def _array(value: Any, schema: Schema, defs: Schema, at: str) -> str | None:
    if not isinstance(value, list):
        return None
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
        return f"{at} has {len(value)} items"
    if "items" not in schema:
        return None
    reasons = (
        why_not(item, schema["items"], defs, f"{at}[{index}]") for index, item in enumerate(value)
    )
    return next((reason for reason in reasons if reason is not None), None)


def _object(value: Any, schema: Schema, defs: Schema, at: str) -> str | None:
    if not isinstance(value, dict):
        return None
    lacking = next((name for name in schema.get("required", ()) if name not in value), None)
    if lacking is not None:
        return f"{at} has no {lacking}"
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, item in value.items():
        below = str(name) if at == "it" else f"{at}.{name}"
        if "propertyNames" in schema and why_not(name, schema["propertyNames"], defs) is not None:
            return f"{below} is not known"
        rule = known.get(name, others)
        if rule is False:
            return f"{below} is not known"
        said = None if rule is True else why_not(item, rule, defs, below)
        if said is not None:
            return said
    return None


def _combined(value: Any, schema: Schema, defs: Schema, at: str) -> str | None:
    for each in schema.get("allOf", ()):
        said = why_not(value, each, defs, at)
        if said is not None:
            return said
    for name, right in (("anyOf", lambda count: count >= 1), ("oneOf", lambda count: count == 1)):
        if name not in schema:
            continue
        reasons = [why_not(value, each, defs, at) for each in schema[name]]
        if not right(reasons.count(None)):
            return reasons[-1] or f"{at} is two things at once"
    return None
