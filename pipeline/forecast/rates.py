"""How long something of a size takes, from how long the like of it took before.

Times are compared as logarithms: a machine that is a third slower is so for short and for long
work. What is expected comes with the interval that Student's t gives for one more reading; with few
readings their spread is taken partly from what is usual at that likeness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.compare.statistics import LEVEL, Interval, t_quantile

PRIOR_READINGS = 5  # readings that the usual spread counts as
NEWEST = 20  # readings that are looked at: a machine changes


def expected(readings: Sequence[float], usual: float) -> Interval:
    """Return what one more reading will be, with a 90% interval.

    Args:
        readings: Positive, the newest last; at least one.
        usual: Spread of their logarithms that is usual at this likeness.
    """
    logs = [math.log(each) for each in readings[-NEWEST:]]
    count = len(logs)
    centre = sum(logs) / count
    squares = PRIOR_READINGS * usual**2 + sum((each - centre) ** 2 for each in logs)
    degrees = PRIOR_READINGS + count - 1
    spread = math.sqrt(squares / degrees * (1 + 1 / count))
    half = t_quantile(LEVEL, degrees) * spread
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def scaled(interval: Interval, by: float) -> Interval:
    """Return an interval in other units."""
    return Interval(*(each * by for each in interval))


def added(parts: Sequence[Interval]) -> Interval:
    """Return the sum of what is expected.

    Errors on one machine go together, but not wholly: half of each part's is taken as common to all
    and half as its own.
    """
    centre = sum(each.estimate for each in parts)
    below = [each.estimate - each.low for each in parts]
    above = [each.high - each.estimate for each in parts]
    return Interval(centre, max(0.0, centre - _joint(below)), centre + _joint(above))


def _joint(sides: Sequence[float]) -> float:
    return math.sqrt(0.5 * sum(sides) ** 2 + 0.5 * sum(each**2 for each in sides))
