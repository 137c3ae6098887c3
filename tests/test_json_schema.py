"""Our part of JSON Schema against the library `jsonschema`, on results that are right and on
mutated ones.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import jsonschema
import pytest
from make_result import make_result

from pipeline.ledger.json_schema import why_not
from pipeline.ledger.schema import RESULT_SCHEMA

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "x",
    [],
    {},
    [None],
    {"value": None},
    10**6,
    "measured",
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every value below one."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [at, *(place for key, item in items for place in places(item, (*at, key)))]


def mutated(record: Any, rng: random.Random) -> Any:
    """Return a copy with one value replaced, dropped, doubled or renamed."""
    record = copy.deepcopy(record)
    place = rng.choice(places(record)[1:])
    owner = record
    for key in place[:-1]:
        owner = owner[key]
    what = rng.randrange(4)
    if what == 0 and isinstance(owner, dict):
        del owner[place[-1]]
    elif what == 1 and isinstance(owner, dict):
        owner[f"{place[-1]}x"] = owner.pop(place[-1])
    elif what == 2 and isinstance(owner, list):
        owner.append(owner[place[-1]])
    else:
        owner[place[-1]] = rng.choice(ODD)
    return record


def test_what_is_right_is_right() -> None:
    assert why_not(make_result(), RESULT_SCHEMA) is None


@pytest.mark.parametrize("seed", range(4))
def test_it_answers_as_the_library_does(seed: int) -> None:
    rng, validator = random.Random(seed), jsonschema.Draft202012Validator(RESULT_SCHEMA)
    answers = []
    for _ in range(60):
        record = mutated(make_result(), rng)
        ours = why_not(record, RESULT_SCHEMA)
        assert (ours is None) == validator.is_valid(record), (
            ours,
            next(validator.iter_errors(record), None),
        )
        answers.append(ours is None)
    assert 0 < sum(answers) < 60


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 2**63, -(2**70)])
def test_numbers_that_no_clock_counts_to_are_none(number: float) -> None:
    assert why_not(number, {"type": "number"}) == "it is no number"
    assert (
        why_not({"a": [0, number]}, {"properties": {"a": {"items": {"type": "number"}}}})
        == "a[1] is no number"
    )
