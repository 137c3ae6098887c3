"""The host timeline closes to the nanosecond, for any nesting, also when something raises."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger.metrics import PHASES
from pipeline.ledger.phases import PhaseClock, difference


class Clock:
    """Time that only the test moves."""

    def __init__(self) -> None:
        self.ns = 5

    def __call__(self) -> int:
        return self.ns


trees = st.recursive(
    st.tuples(st.sampled_from(PHASES), st.integers(0, 10**9), st.booleans(), st.just([])),
    lambda child: st.tuples(
        st.sampled_from(PHASES), st.integers(0, 10**9), st.booleans(), st.lists(child, max_size=4)
    ),
    max_leaves=12,
)


def walk(tree: tuple, clock: PhaseClock, now: Clock, expected: dict[str, int]) -> None:
    name, ns, raises, children = tree
    with contextlib.suppress(ZeroDivisionError), clock.phase(name):
        now.ns += ns
        expected[name] = expected.get(name, 0) + ns
        for child in children:
            walk(child, clock, now, expected)
        if raises:
            raise ZeroDivisionError


@given(trees)
def test_self_times_sum_to_the_wall_time(tree: tuple) -> None:
    now = Clock()
    clock = PhaseClock(now)
    expected: dict[str, int] = {}
    walk(tree, clock, now, expected)
    now.ns += 7  # outside any phase
    expected["other"] = expected.get("other", 0) + 7
    read = clock.read_ns()
    assert sum(read.values()) == now.ns - 5
    assert {k: v for k, v in read.items() if v} == {k: v for k, v in expected.items() if v}


def test_an_unmarked_delay_is_other_and_nothing_else() -> None:
    now = Clock()
    clock = PhaseClock(now)
    with clock.phase("forward"):
        now.ns += 10
    before = clock.read_ns()
    now.ns += 1000
    assert difference(clock.read_ns(), before) == {"other": 1000}


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="'lunch' is not one of"), PhaseClock().phase("lunch"):
        pass
