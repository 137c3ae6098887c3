"""The worked example: one GPU, a student killed once, two controls; every minute booked, every
figure by hand.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compare.savings import (
    Spend,
    Trained,
    all_in,
    c_opt,
    c_total,
    payback,
    serving_saving,
    training_saving,
)
from pipeline.ledger.booking import Booking, Span, Window, book, device_hours
from pipeline.ledger.values import measured

MINUTE_NS = 60_000_000_000
DEPENDS = {"teacher": (), "student": ("teacher",), "control_compute": (), "control_steps": ()}

TIMELINE: list[tuple[int, str, str | None, int, int]] = [
    # attempt, kind, arm, minutes, minutes kept
    (1, "overhead", None, 1, 0),
    (1, "work", "teacher", 30, 30),
    (1, "assess", "teacher", 2, 2),
    (1, "work", "student", 6, 4),  # killed 2 minutes after its checkpoint
    (2, "overhead", None, 1, 0),
    (2, "work", "student", 16, 16),  # replays those 2 minutes, goes on for 14
    (2, "assess", "student", 2, 2),
    (2, "work", "control_compute", 12, 12),
    (2, "assess", "control_compute", 2, 2),
    (2, "work", "control_steps", 9, 9),
    (2, "assess", "control_steps", 2, 2),
    (2, "compare", None, 6, 6),
    (2, "overhead", None, 1, 0),
]


def _lay_out(
    timeline: list[tuple[int, str, str | None, int, int]],
) -> tuple[list[Window], dict[int, Span]]:
    """Put intervals one after another; every attempt has a clock of its own."""
    windows: list[Window] = []
    spans: dict[int, Span] = {}
    for attempt, kind, arm, minutes, kept in timeline:
        origin, start, _ = spans.get(attempt, Span(attempt * 10**15, attempt * 10**15))
        end = start + minutes * MINUTE_NS
        spans[attempt] = Span(origin, end)
        if kind != "overhead":
            purpose: Literal["work", "assess", "compare"] = kind  # pyright: ignore[reportAssignmentType]
            windows.append(
                Window(
                    kind=purpose,
                    arm=arm,
                    seed=0,
                    attempt=attempt,
                    start_ns=start,
                    end_ns=end,
                    kept_ns=kept * MINUTE_NS,
                )
            )
    return windows, spans


@pytest.fixture
def run_1() -> Booking:
    return book(*_lay_out(TIMELINE))


@pytest.fixture
def spends(run_1: Booking) -> dict[str, Spend]:
    return {
        arm: Spend(
            arm=arm,
            depends_on=DEPENDS[arm],
            work_h=device_hours(time.work_ns),
            retry_h=device_hours(time.retry_ns),
        )
        for (arm, _), time in run_1.arms.items()
    }


def _minutes(hours: float | int | None) -> float:
    assert hours is not None
    return 60 * hours


def test_ninety_minutes_are_booked_once_each(run_1: Booking) -> None:
    parts = run_1.work_ns, run_1.assess_ns, run_1.retry_ns, run_1.compare_ns, run_1.overhead_ns
    assert [ns / MINUTE_NS for ns in parts] == [71, 8, 2, 6, 3]
    assert sum(parts) == run_1.attached_ns == 90 * MINUTE_NS
    assert device_hours(run_1.attached_ns) == 1.5


def test_the_student_books_what_led_to_its_artifact(run_1: Booking) -> None:
    student = run_1.arms["student", 0]
    assert (student.work_ns, student.retry_ns, student.assess_ns) == (
        20 * MINUTE_NS,
        2 * MINUTE_NS,
        2 * MINUTE_NS,
    )
    controls = [run_1.arms[arm, 0] for arm in ("control_compute", "control_steps")]
    assert sum(time.work_ns for time in controls) == 21 * MINUTE_NS
    assert sum(time.assess_ns for time in controls) == 4 * MINUTE_NS


def test_costs_of_the_arms(spends: dict[str, Spend]) -> None:
    assert _minutes(c_total("student", spends).value) == pytest.approx(50)
    assert _minutes(c_total("control_compute", spends).value) == pytest.approx(12)
    assert _minutes(all_in("student", spends).value) == pytest.approx(52)
    assert _minutes(c_opt("student", "teacher", spends).value) == pytest.approx(20)
    assert _minutes(c_opt("student", "control_compute", spends).value) == pytest.approx(38)


def test_payback_of_the_student(spends: dict[str, Spend]) -> None:
    # device-seconds per 1,000 tokens, read in blocks
    teacher, student = np.full((4, 2), 1.0), np.full((4, 2), 0.6)
    per_token = lambda served: measured(float(served.mean()) / 1000)
    saving = serving_saving(student, teacher)
    against_teacher = payback(
        c_opt("student", "teacher", spends), per_token(teacher), saving, unit="token"
    )
    assert against_teacher["value"] == pytest.approx(3.0e6)
    none = serving_saving(student, student)
    against_control = payback(
        c_opt("student", "control_compute", spends), per_token(student), none, unit="token"
    )
    assert against_control["why_missing"] == "never: not cheaper"


def test_the_second_invocation_spends_overhead_and_saves_the_rest(
    run_1: Booking, spends: dict[str, Spend]
) -> None:
    """Run 2 finds everything done. What it reuses is never free and never counted twice; savings do
    not change.
    """
    run_2 = book(*_lay_out([(1, "overhead", None, 1, 0)]))
    assert run_2.attached_ns == run_2.overhead_ns == MINUTE_NS
    assert (run_2.work_ns, run_2.reusable_ns) == (0, 0)
    assert run_1.reusable_ns == (71 + 8 + 6) * MINUTE_NS
    # 50 of 12 minutes: the student lost to what its compute would have bought, four times over
    arms = Trained(arm="student", final=2.0), Trained(arm="control_compute", final=2.0)
    saving = training_saving(*arms, spends, margin=0.01, lower_is_better=True)
    assert saving["value"] == pytest.approx(1 - 50 / 12)


# -- booking in general ---------------------------------------------------------------------------


def test_a_failed_attempt_that_kept_nothing_is_all_retry() -> None:
    booking = book(*_lay_out([(1, "work", "student", 7, 0), (2, "work", "student", 9, 9)]))
    assert booking.arms["student", 0].retry_ns == 7 * MINUTE_NS
    assert booking.arms["student", 0].work_ns == 9 * MINUTE_NS
    assert booking.overhead_ns == 0


def test_an_assessment_that_failed_is_retry_and_seeds_stay_apart() -> None:
    windows, spans = _lay_out([(1, "assess", "student", 3, 0), (1, "work", "student", 5, 5)])
    other = Window(kind="work", arm="student", seed=1, attempt=2, start_ns=0, end_ns=4, kept_ns=4)
    booking = book([*windows, other], {**spans, 2: Span(0, 10)})
    assert booking.arms["student", 0].retry_ns == 3 * MINUTE_NS
    assert booking.arms["student", 0].assess_ns == 0
    assert booking.arms["student", 1].work_ns == 4
    assert booking.overhead_ns == 6


def test_a_run_that_goes_on_with_another_number_of_devices_still_adds_up() -> None:
    windows, spans = _lay_out(TIMELINE)
    booking = book(windows, {1: spans[1]._replace(devices=4), 2: spans[2]._replace(devices=2)})
    minutes = lambda ns: ns / MINUTE_NS
    assert minutes(booking.arms["teacher", 0].work_ns) == 4 * 30
    assert minutes(booking.arms["student", 0].work_ns) == 4 * 4 + 2 * 16
    assert minutes(booking.arms["student", 0].retry_ns) == 4 * 2
    assert minutes(booking.compare_ns) == 2 * 6
    assert minutes(booking.overhead_ns) == 4 * 1 + 2 * 2
    assert minutes(booking.attached_ns) == 4 * 39 + 2 * 51


def _window(start: int, end: int, kept: int, *, attempt: int = 1, arm: str | None = "a") -> Window:
    return Window(kind="work", arm=arm, attempt=attempt, start_ns=start, end_ns=end, kept_ns=kept)


def test_a_window_of_no_length_may_touch_others_in_any_order() -> None:
    """A clock that has not ticked between two windows gives them the same start."""
    empty, whole = _window(0, 0, 0), _window(0, 10, 10)
    for windows in ([empty, whole], [whole, empty], [whole, _window(10, 10, 0)]):
        assert book(windows, {1: Span(0, 10)}).work_ns == 10


@pytest.mark.parametrize(
    "windows",
    [
        [_window(0, 6, 6), _window(5, 9, 4)],  # a nanosecond twice
        [_window(0, 11, 11)],  # longer than its attempt
        [_window(0, 6, 7)],  # keeps more than it lasted
        [_window(0, 6, 6, arm=None)],  # work of nobody
        [_window(0, 6, 6, attempt=2)],  # of no attempt
    ],
)
def test_windows_that_do_not_fit_are_a_bug(windows: list[Window]) -> None:
    with pytest.raises(AssertionError):
        book(windows, {1: Span(0, 10)})


@given(
    st.lists(
        st.tuples(
            st.integers(1, 3),
            st.sampled_from(["work", "assess", "compare", "overhead"]),
            st.sampled_from(["a", "b"]),
            st.integers(0, 10**12),
            st.floats(0, 1),
        ),
        max_size=20,
    )
)
def test_every_nanosecond_is_booked_exactly_once(
    parts: list[tuple[int, str, str, int, float]],
) -> None:
    clock, windows, devices = {1: 0, 2: 0, 3: 0}, [], {1: 1, 2: 8, 3: 3}
    booked: dict[str, int] = {"work": 0, "assess": 0, "compare": 0, "overhead": 0, "retry": 0}
    for attempt, kind, arm, length, share in parts:
        kept = length if kind in ("compare", "overhead") else int(share * length)
        start, clock[attempt] = clock[attempt], clock[attempt] + length
        booked[kind] += kept * devices[attempt]
        booked["retry"] += (length - kept) * devices[attempt]
        if kind != "overhead":
            windows.append(
                Window(
                    kind=kind,
                    arm=None if kind == "compare" else arm,
                    attempt=attempt,  # pyright: ignore[reportArgumentType]
                    start_ns=start,
                    end_ns=clock[attempt],
                    kept_ns=kept,
                )
            )
    booking = book(
        reversed(windows),
        {attempt: Span(0, end, devices[attempt]) for attempt, end in clock.items()},
    )
    found = (
        booking.work_ns,
        booking.assess_ns,
        booking.compare_ns,
        booking.overhead_ns,
        booking.retry_ns,
    )
    assert found == tuple(booked.values())
    assert (
        sum(found)
        == booking.attached_ns
        == sum(end * devices[attempt] for attempt, end in clock.items())
    )
