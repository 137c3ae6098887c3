"""Figures as text: hand-made values, and properties that rounding must keep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger.numbers import (
    agreed,
    apart,
    count,
    duration,
    how_many,
    in_unit,
    num_bytes,
    percent,
    percents_apart,
    points,
    significant,
    time_unit,
    times,
)

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.42, "0.420 s"),
        (93, "93.0 s"),
        (119, "119 s"),
        (120, "2.00 min"),
        (744, "12.4 min"),
        (7200, "2.00 h"),
        (5400, "90.0 min"),
        (4.4e6, "1222 h"),
        (0.00012, "0.000120 s"),
    ],
)
def test_a_duration_takes_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(1e-3, 1e10))
def test_a_duration_reads_back_within_its_last_digit(seconds: float) -> None:
    number, symbol = duration(seconds).split()
    assert float(number) * _UNITS[symbol] == pytest.approx(seconds, rel=6e-3)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.9, "1 k"),
        (1000, "1 k"),
        (35_700, "35.7 k"),
        (999_950, "1 M"),
        (1.2e6, "1.2 M"),
        (3e6, "3 M"),
        (409_600, "410 k"),
        (5e13, "50 T"),
        (7e15, "7000 T"),
        (0.5, "0.5"),
    ],
)
def test_counts_take_an_si_prefix(n: float, text: str) -> None:
    assert count(n) == text


@given(st.integers(1, 10**15))
def test_a_count_reads_back_and_keeps_whole_zeros(n: int) -> None:
    number, _, prefix = count(n).partition(" ")
    assert float(number) * _PREFIXES[prefix] == pytest.approx(n, rel=6e-3)
    assert prefix == "T" or float(number) < 1000


def test_what_is_counted_agrees_with_its_count() -> None:
    assert [how_many(n, "run") for n in (0, 1, 2, 11)] == ["0 runs", "1 run", "2 runs", "11 runs"]
    assert how_many(count(1), "request") == "1 request"
    assert how_many(count(1000), "request") == "1 k requests"
    assert how_many(1, "class is", "classes are") == "1 class is"
    assert how_many(3, "class is", "classes are") == "3 classes are"
    assert [agreed(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]


def test_bytes_take_decimal_prefixes() -> None:
    assert [num_bytes(12_300_000), num_bytes(12)] == ["12.3 MB", "12 B"]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.41, "41%"),
        (0.021, "2.1%"),
        (0.0004, "0.04%"),
        (0.104, "10.4%"),
        (2.4, "240%"),
        (0.0, "0%"),
        (-0.12, "-12%"),
        (-1e-7, "0%"),
        (0.9996, "99.96%"),
        (1.0, "100%"),
        (0.1, "10%"),
        (0.2, "20%"),
    ],
)
def test_percentages(fraction: float, text: str) -> None:
    assert percent(fraction) == text


def test_a_sign_is_shown_where_asked_for_and_never_on_zero() -> None:
    signed = [percent(v, sign=True) for v in (0.021, -0.021, 0.0, -1e-9)]
    assert signed == ["+2.1%", "-2.1%", "0%", "0%"]
    assert [points(0.012, sign=True), points(-0.0004), points(0.01)] == ["+1.2", "-0.04", "1"]


@given(st.floats(-0.9999, 0.9999))
def test_a_part_never_reads_as_the_whole(fraction: float) -> None:
    shown = float(percent(fraction).rstrip("%")) / 100
    assert abs(shown) < 1
    assert shown == pytest.approx(fraction, abs=6e-4)


def test_ratios_have_one_decimal_below_ten() -> None:
    assert [times(3.44), times(1.0), times(9.96), times(120)] == ["3.4x", "1.0x", "10x", "120x"]


@given(st.floats(1e-4, 1e9), st.integers(2, 6))
def test_significant_digits_read_back_as_python_rounds_them(x: float, digits: int) -> None:
    expected = float(f"{x:.{digits - 1}e}")
    assert float(significant(x, digits)) == pytest.approx(expected, rel=10.0 ** (1 - digits))
    assert "e" not in significant(x, digits)


def test_what_is_there_never_rounds_to_zero() -> None:
    assert significant(0.000012) == "1.20e-05"
    assert in_unit(0.5, 60, 1) == "<0.1"
    assert [in_unit(0, 60, 1), in_unit(90, 60, 1)] == ["0.0", "1.5"]
    assert time_unit(5400) == (60.0, "min")


@pytest.mark.parametrize(
    ("fractions", "shown"),
    [
        ((-3e-7, 1e-9), ["-3.00e-05%", "1.00e-07%"]),
        ((0.0, -0.0), ["0%", "0%"]),
        ((0.0, 2e-5), ["0%", "0.002%"]),
        ((0.050001, 0.05), ["5.0001%", "5%"]),
        ((0.5, 0.05), ["50%", "5%"]),
        ((0.0071, 0.005), ["0.71%", "0.5%"]),
        ((float("inf"), 0.01), ["inf%", "1%"]),
    ],
)
def test_a_figure_and_its_limit_can_be_told_apart(
    fractions: tuple[float, ...], shown: list[str]
) -> None:
    assert percents_apart(*fractions) == shown


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_numbers_that_differ_read_differently_and_in_their_order(a: float, b: float) -> None:
    ours, theirs = map(float, apart(a, b))
    assert (ours > theirs) == (a > b)
    assert (ours == theirs) == (a == b)
