"""Figures as people read them: durations, counts, percentages. Rounding never turns a figure into
another claim.
"""

from __future__ import annotations

import math

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIME_UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))
_UNIT_FROM = 120.0
"""Seconds and minutes are used up to this many: `93 s` says more than `1.6 min`."""


def significant(x: float, digits: int = 3) -> str:
    """Return `x` with `digits` significant digits, without an exponent from 1e-4 up; integer digits
    are all kept.
    """
    if x == 0:
        return "0"
    # Rounded first: 9.996 is 10.0 with three digits, which has another size.
    size = math.floor(math.log10(abs(float(f"{x:.{digits - 1}e}"))))
    if size < -4:
        return f"{x:.{digits - 1}e}"
    return f"{x:.{max(0, digits - 1 - size)}f}"


def duration(seconds: float) -> str:
    """Return seconds as `0.42 s`, `93.0 s`, `12.4 min` or `3.50 h`."""
    seconds_per_unit, unit = time_unit(seconds)
    return f"{significant(seconds / seconds_per_unit)} {unit}"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit that suits a duration, as (seconds per unit, symbol)."""
    return next(
        ((size, unit) for size, unit in _TIME_UNITS if abs(seconds) >= _UNIT_FROM * size / 60),
        (1.0, "s"),
    )


def in_unit(seconds: float, per_unit: float, decimals: int) -> str:
    """Return seconds in a given unit, without its symbol; what is there but rounds away is `<0.1`,
    never zero.
    """
    smallest = 10.0**-decimals
    if 0 < seconds < smallest * per_unit / 2:
        return f"<{smallest:.{decimals}f}"
    return f"{seconds / per_unit:.{decimals}f}"


def count(n: float) -> str:
    """Return a count with an SI prefix: `950`, `1.2 M`, `35.7 k`."""
    for size, prefix in _SI:
        if abs(n) >= size * 0.9995:  # 999,950 rounds to 1 M, not to 1000 k
            return f"{_trimmed(significant(n / size))} {prefix}"
    return _trimmed(significant(n))


def how_many(n: float | str, one: str, many: str | None = None) -> str:
    """Return a count with what is counted: `1 run`, `3 runs`, `1 rank is left out`.

    Args:
        n: The count, or its text (`count(n)`); a text "1" is one.
        one: What follows a one: a noun, or a clause that has one.
        many: What follows any other count; None: `one` with an s.
    """
    return f"{n} {agreed(n, one, many or f'{one}s')}"


def agreed(n: float | str, one: str, many: str) -> str:
    """Return the word that agrees with a count: `is` with a one, `are` with any other."""
    return one if str(n) == "1" else many


def percent(fraction: float, *, sign: bool = False) -> str:
    """Return a fraction as a percentage: `41%`, `2.1%`, `0.04%`.

    What is below 100% never reads 100%, and zero has no sign.
    """
    x = 100 * fraction
    decimals = 0 if abs(x) >= 99.95 else 1 if abs(x) >= 0.995 else 2
    # 99.996% never reads as 100%.
    while abs(x) < 100 and round(abs(x), decimals) >= 100 and decimals < 6:
        decimals += 1
    return _signed(x, decimals, sign) + "%"


def percents_apart(*fractions: float) -> list[str]:
    """Return fractions as percentages with digits enough, three or more, that no two that differ
    read the same.

    For a figure beside its limit: what is above it never reads as what is allowed, and what is
    there never reads 0.
    """
    return [f"{text}%" for text in apart(*(100 * fraction for fraction in fractions))]


def apart(*numbers: float) -> list[str]:
    """Return numbers with digits enough, three or more, that no two that differ read the same."""
    shown: list[str] = []
    for digits in range(3, 18):
        shown = [significant(x, digits) if math.isfinite(x) else str(x) for x in numbers]
        if len({*shown}) == len({*numbers}):
            break
    return [text if "e" in text else _trimmed(text) for text in shown]


def points(fraction: float, *, sign: bool = False) -> str:
    """Return a difference of two shares in percentage points, without the word: `1.2`."""
    return _signed(100 * fraction, 1 if abs(fraction) >= 0.00995 else 2, sign)


def times(ratio: float) -> str:
    """Return a ratio as `3.4x`; below 10 with one decimal."""
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


def num_bytes(n: float) -> str:
    """Return bytes with a decimal prefix: `12.3 MB`."""
    text = count(n)
    return f"{text}B" if " " in text else f"{text} B"


def _signed(x: float, decimals: int, sign: bool) -> str:
    rounded = f"{x:.{decimals}f}"
    if float(rounded) == 0:
        return "0"
    text = f"{x:+.{decimals}f}" if sign else rounded
    return _trimmed(text)


def _trimmed(text: str) -> str:
    """Drop trailing zeros after the decimal point: `1.20` is `1.2`, `300` stays."""
    return text.rstrip("0").rstrip(".") if "." in text else text
