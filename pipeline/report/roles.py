"""Words for arms: by the role an arm alone has in a run, else by its name.

A role is what a stage says of its models, what stages were given and what comparisons say of their
bases. It never follows from what
an arm is called, so a recipe with other names for its arms is reported in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.arms import BASE, BEST_16_BIT, is_fallback
from pipeline.errors import one_line
from pipeline.ledger.shapes import Pair, Result

CONTROLS = {
    "compute_control": "control with equal compute",
    "tokens_control": "control with equal tokens",
}
"""What a base is to the arm that it is a control of."""
_NAME_LIMIT = 60
"""Characters of an arm's name in a sentence."""


def role_word(result: Result, arm: str) -> str | None:
    """Return an arm's role where no other arm of the run has it, else None."""
    return next((word for word, arms in _roles(result) if arms == {arm}), None)


def _roles(result: Result) -> Iterator[tuple[str, set[str]]]:
    """Yield every role with the arms that have it; where an arm has two, the first one names it."""
    rows = [row for row in result["rows"] if not is_fallback(row["arm"])]
    words = {row["arm"]: word for row in rows if (word := row.get("word"))}
    for word in dict.fromkeys(words.values()):
        yield word, {arm for arm, each in words.items() if each == word}
    taught = {
        row["arm"]: row.get("inputs", {})["teacher"]
        for row in rows
        if "teacher" in row.get("inputs", {}) and row.get("makes") == "model"
    }
    yield "student", set(taught) - set(words)
    yield "teacher", set(taught.values())
    yield "teacher cache", {row["arm"] for row in rows if row.get("makes") == "teacher_cache"}
    for base_is, word in CONTROLS.items():
        yield word, _bases(result, base_is)
    yield "unquantized model", _bases(result, "source")
    yield "given model", {BASE}
    yield "model", {row["arm"] for row in rows} | {result["primary_arm"]}


def own_word(result: Result, arm: str) -> str | None:
    """Return what the stage that made an arm calls its models, where that is no role of a run's."""
    return next(
        (word for row in result["rows"] if row["arm"] == arm and (word := row.get("word"))), None
    )


def _bases(result: Result, base_is: str) -> set[str]:
    return {pair["base"] for pair in result["comparisons"] if pair.get("base_is") == base_is}


def arm_name(arm: str) -> str:
    """Return an arm's name on one line, cut where it is very long."""
    return one_line(arm, _NAME_LIMIT)


def arm_word(result: Result, arm: str) -> str:
    """Return an arm without an article: `teacher`, `int8`."""
    return role_word(result, arm) or arm_name(arm)


def subject(result: Result, arm: str) -> str:
    """Return an arm as a sentence's subject: `the teacher`, `int8`."""
    role = role_word(result, arm)
    return arm_name(arm) if role is None else f"the {role}"


def base_words(result: Result, pair: Pair) -> str:
    """Return the base of a comparison, by what it is to the arm."""
    base_is = pair.get("base_is")
    if base_is in CONTROLS:
        return f"the {CONTROLS[base_is]}"
    if base_is == "teacher":
        return "its teacher"
    if base_is == BEST_16_BIT:
        return "the best 16-bit form of the same model"
    dtypes = (pair["serving"] or {}).get("dtypes")
    served = f" (served in {dtypes['base']})" if pair["speedup"] and dtypes else ""
    return subject(result, pair["base"]) + served
