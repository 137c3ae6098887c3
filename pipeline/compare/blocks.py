"""The order of readings in time, and whether anything but the two arms moved them.

A block reads arm, base, base, arm or the reverse, so that a drift that is linear over it cancels.
All blocks alike, a disturbance that comes back every fourth reading falls on the same arm each time
(a timer, a neighbour's batch): two equal arms then pass as a saving in 41% of cases. So of every
two blocks one begins with the arm and one with the base, and a recorded seed says which. The two
orders one after the other still beat in time with what comes back every third reading: it falls on
one arm three times of four, and in 25% of cases equal arms pass. So between blocks up to three
readings are taken and discarded, by the same seed, and of many draws the one is taken that periods
mislead least (`draw_design`).

What the order leaves, the readings are tested for: a drift over the pass, and a period. Both tests
permute readings within each arm, so that they call undisturbed ones disturbed no oftener than their
level whatever the noise is like.
Source: Good (2005), Permutation, Parametric and Bootstrap Tests of Hypotheses, chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.compare.statistics import Floats, skewed_reach, t_quantile

ARM_FIRST, BASE_FIRST = "ABBA", "BAAB"  # A is the arm
PERIODS = range(2, 9)
"""Readings after which a disturbance may come back; a longer one is not seen in 16 readings."""
DRIFT_LEVEL, PERIOD_LEVEL = 0.003, 0.004
"""Chance that one look at undisturbed readings is called disturbed: together 0.7%, over two looks
1.4%.
"""
LEAST_DISTURBANCE = 0.01
"""Relative size below which drift and period are left alone: a machine always has some, and the
order cancels it.
"""
DRAWS = 100
WELL_WITHIN = 0.8
"""Share of a look's bound below which one design is as good as another."""
# Pocock's one-sided level of each of two looks at 0.05 in all (`statistics.look_alpha`)
LOOK_ALPHA = 0.0304
MOST_BETWEEN = 3
"""Readings at most that are discarded between two blocks."""
# With the observed order, 2,000: p-values are multiples of 1 / 2,000.
PERMUTATIONS = 1999
LEAST_BLOCKS = 4
"""Fewer blocks show neither."""


@dataclass(frozen=True, slots=True)
class Design:
    """When what is read.

    Attributes:
        orders: By pair, the order of each block.
        gaps: Readings that are discarded before each block; none before the first.
        places: By pair and block, of its four readings: how many readings of any arm came before.
    """

    orders: tuple[tuple[str, ...], ...]
    gaps: tuple[int, ...]
    places: tuple[tuple[tuple[int, ...], ...], ...]


@lru_cache(maxsize=1024)
def draw_design(pairs: int, blocks: int, alone: int, seed: int) -> Design:
    """Draw the blocks of a pass by a seed: of `DRAWS` at random, the one that a disturbance can
    mislead least.

    How far it can mislead is found by trying: of every period up to 16 readings, each place and
    eight phases of a wave take longer, and nothing else moves. What that makes of two equal arms is
    held against the bound of a look (`_misled`). Periods up to `PERIODS` count first; longer ones,
    which four blocks cannot all withstand, by how many mislead.

    Args:
        pairs: That are read in each block.
        blocks: Of a pass.
        alone: Arms in no pair, read twice at the end of a block.
        seed: Of the draw; the same seed gives the same design.
    """
    if not pairs:  # nothing is compared
        return Design((), (0,) * blocks, ())
    rng = np.random.default_rng(seed)
    drawn = [_draw(pairs, blocks, alone, rng) for _ in range(DRAWS)]
    # One block has no spread to hold a disturbance against.
    return drawn[0] if blocks < 2 else min(drawn, key=_misled)


def _draw(pairs: int, blocks: int, alone: int, rng: np.random.Generator) -> Design:
    """Draw orders, of every two blocks in a row one arm-first and one base-first, and gaps."""
    gaps = (0, *rng.integers(0, MOST_BETWEEN + 1, blocks - 1).tolist())
    # Readings before each block: the discarded ones, and those of earlier blocks.
    starts = [sum(gaps[: block + 1]) + block * (4 * pairs + 2 * alone) for block in range(blocks)]
    orders: list[tuple[str, ...]] = []
    for _ in range(pairs):
        firsts = [
            (ARM_FIRST, BASE_FIRST) if rng.integers(2) else (BASE_FIRST, ARM_FIRST)
            for _ in range(0, blocks, 2)
        ]
        orders.append(tuple(order for two in firsts for order in two)[:blocks])
    places = [
        [tuple(range(start + 4 * pair, start + 4 * pair + 4)) for start in starts]
        for pair in range(pairs)
    ]
    return Design(tuple(orders), gaps, tuple(tuple(each) for each in places))


def _misled(design: Design) -> tuple[float, float]:
    """Return how near a disturbance of a short period comes to a false answer, and which share of
    longer ones do.
    """
    worst, longer = WELL_WITHIN, 0.0
    for orders, places in zip(design.orders, design.places, strict=True):
        signs = np.array([[1.0 if letter == "A" else -1.0 for letter in order] for order in orders])
        ratio = [
            _share_of_bound(period, signs, np.array(places))
            for period in range(2, 2 * PERIODS[-1] + 1)
        ]
        worst = max(worst, *(float(each.max()) for each in ratio[: len(PERIODS)]))
        longer += float(np.mean(np.concatenate(ratio[len(PERIODS) :]) > WELL_WITHIN))
    return worst, longer


def _share_of_bound(period: int, signs: Floats, places: npt.NDArray[np.int64]) -> Floats:
    """Return |t| of two equal arms over the bound of a look, for each disturbance of a period:
    (disturbances,).
    """
    phases = np.arange(8) * math.pi / 8
    spikes = places % period == np.arange(period)[:, None, None]
    waves = np.sin(2 * math.pi * places / period + phases[:, None, None])
    # Arm less base, the mean of a block's two pairs: what the disturbance makes of equal arms.
    effects = (np.concatenate([spikes, waves]) * signs).sum(axis=2) / 2  # (disturbances, blocks)
    n, mean = effects.shape[1], effects.mean(axis=1)
    around = effects - mean[:, None]
    # A disturbance that hits every block alike leaves no spread: the floor avoids 0 / 0.
    variance = np.maximum(np.mean(around**2, axis=1), 1e-18)
    skewness = -np.sign(mean) * np.mean(around**3, axis=1) / variance**1.5
    t = np.abs(mean) / np.sqrt(variance / (n - 1))
    bound = skewed_reach(t_quantile(1 - 2 * LOOK_ALPHA, n - 1), skewness, n)
    # What cancels exactly misleads nobody.
    return np.where(np.abs(mean) < 1e-9, 0.0, t / bound)


def in_time(
    arm: npt.ArrayLike, base: npt.ArrayLike, orders: Sequence[str]
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return the readings as they were taken, shape (4 x blocks,), and which of them are the arm's.

    Args:
        arm: (blocks, 2): the arm's two readings of each block.
        base: (blocks, 2): the base's.
        orders: Of each block, `ABBA` or `BAAB`.
    """
    arm, base = np.asarray(arm, dtype=np.float64), np.asarray(base, dtype=np.float64)
    assert arm.shape == base.shape == (len(orders), 2), (arm.shape, base.shape, len(orders))
    # (blocks, 4)
    is_arm = np.array([[letter == "A" for letter in order] for order in orders], dtype=bool)
    readings = np.empty(is_arm.shape)
    # Row by row a mask fills places in time order, as the readings of each block are stored.
    readings[is_arm], readings[~is_arm] = arm.ravel(), base.ravel()
    return readings.ravel(), is_arm.ravel()


def disturbances(
    arm: npt.ArrayLike,
    base: npt.ArrayLike,
    orders: Sequence[str],
    places: Sequence[Sequence[int]] | None = None,
    *,
    least: float = LEAST_DISTURBANCE,
) -> list[str]:
    """Return what moved the readings of one look beside the arms: a drift, a period, or nothing.

    Args:
        arm: (blocks, 2): the arm's two readings of each block in seconds (or joules), positive.
        base: (blocks, 2): the base's.
        orders: Of each block.
        places: Of the four readings of each block among all that were taken; None: one after the
            other.
        least: Relative size below which a drift or a period is left alone.
    """
    if len(orders) < LEAST_BLOCKS:
        return []
    readings, is_arm = in_time(arm, base, orders)
    logs, ranks = np.log(readings), np.empty(len(readings))
    # Within each arm, so that a true difference between the arms is no disturbance.
    for side in (is_arm, ~is_arm):
        logs[side] -= np.median(logs[side])
        ranks[side] = _ranks(logs[side])
    time = np.arange(len(logs)) if places is None else np.asarray(places, dtype=np.int64).ravel()
    assert time.shape == logs.shape, (time.shape, logs.shape)
    time -= time[0]
    chance = _chance(tuple(is_arm.tolist()), tuple(time.tolist()))
    return [*_drift(logs, ranks, time, chance, least), *_period(logs, ranks, time, chance, least)]


def _ranks(values: Floats) -> Floats:
    """Return ranks scaled to a mean of 0 and a variance of 1; equal values share theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    spread = float(ranks.std())
    return (ranks - ranks.mean()) / spread if spread > 0 else np.zeros(len(values))


@dataclass(frozen=True, slots=True)
class _Chance:
    """What shuffled ranks give, each sorted: what observed ones are held against.

    Attributes:
        drift: (PERMUTATIONS,): size of the correlation with time.
        between: (periods, PERMUTATIONS): sum of squares between the places of each period.
        seldom: (PERMUTATIONS,): the smallest p-value over periods.
    """

    drift: Floats
    between: Floats
    seldom: Floats


@lru_cache(maxsize=64)
def _chance(is_arm: tuple[bool, ...], times: tuple[int, ...]) -> _Chance:
    """Return what ranks shuffled within each arm give; it depends on when each was read alone."""
    # A fixed seed: the same readings give the same answer every time.
    mask, rng = np.array(is_arm), np.random.default_rng(0)
    shuffled = np.empty((PERMUTATIONS, len(mask)))
    for side in (mask, ~mask):
        ranks = _ranks(np.arange(np.count_nonzero(side), dtype=np.float64))
        shuffled[:, side] = rng.permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1)
    time = np.array(times)
    between = np.stack([_between(shuffled, time, period) for period in PERIODS])
    ordered = np.sort(between, axis=1)
    at_least = [_at_least(own, values) for own, values in zip(ordered, between, strict=True)]
    seldom = np.min(at_least, axis=0) / PERMUTATIONS
    return _Chance(np.sort(np.abs(shuffled @ (time - time.mean()))), ordered, np.sort(seldom))


def _at_least(ordered: Floats, values: Floats | float) -> npt.NDArray[np.int64]:
    """Return how many of `ordered` are as large as each of `values`, equal up to round-off."""
    return len(ordered) - np.searchsorted(ordered, np.asarray(values) - 1e-9)


def _drift(
    logs: Floats, ranks: Floats, time: npt.NDArray[np.int64], chance: _Chance, least: float
) -> list[str]:
    """Test the correlation of ranks with time (Spearman's, within arms)."""
    centred = time - time.mean()
    if (1 + _at_least(chance.drift, abs(float(ranks @ centred)))) / (
        1 + PERMUTATIONS
    ) > DRIFT_LEVEL:
        return []
    # Least-squares slope times the pass: the relative change from its first to its last reading.
    change = float(centred @ logs / (centred @ centred)) * float(time[-1] - time[0])
    if abs(change) < least:
        return []
    return [
        f"readings drifted: they {'rose' if change > 0 else 'fell'} by"
        f" {abs(math.expm1(change)):.1%} over the pass"
    ]


def _period(
    logs: Floats, ranks: Floats, time: npt.NDArray[np.int64], chance: _Chance, least: float
) -> list[str]:
    """Test whether readings at the same place of any period are alike.

    Each period has a p-value; the smallest is held against the smallest of shuffled readings.
    """
    found = [float(_between(ranks[None], time, period)[0]) for period in PERIODS]
    counts = [
        _at_least(ordered, value) for ordered, value in zip(chance.between, found, strict=True)
    ]
    seldom = [float(1 + count) / (1 + PERMUTATIONS) for count in counts]
    as_small = np.searchsorted(chance.seldom, min(seldom) + 1e-12)
    if (1 + as_small) / (1 + PERMUTATIONS) > PERIOD_LEVEL:
        return []
    period = PERIODS[int(np.argmin(seldom))]
    means = [float(logs[time % period == place].mean()) for place in np.unique(time % period)]
    size = max(means) - min(means)
    if size < least:
        return []
    return [
        f"readings repeat every {period}: they differ by {math.expm1(size):.1%} with their place"
        " in it"
    ]


def _between(rows: Floats, time: npt.NDArray[np.int64], period: int) -> Floats:
    """Return the sum of squares between the places of a period, by row: (r,) of (r, n)."""
    places = time % period == np.unique(time % period)[:, None]  # (places that were read, n)
    return ((rows @ places.T) ** 2 / places.sum(axis=1)).sum(axis=1)
