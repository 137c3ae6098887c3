"""Intervals: how far a figure measured on these documents, in these blocks, may be from the truth.

Three questions, three methods:

- Right or wrong per item, both arms on the same items: Tango's score interval. It holds its level where a plain
  "difference +- 1.64 standard errors" does not: few items, few disagreements, none at all.
- A figure that is a function of sums over documents (bits per byte, token accuracy, macro F1): BCa bootstrap over
  documents. Tokens of one document err together, so documents are resampled, never tokens.
- Readings taken in ABBA order (arm, base, base, arm): t interval over blocks. Within a block a linear drift of the
  machine adds the same to both arms and cancels.

Every interval is two-sided at `level`. At 0.90 each end is a one-sided 95% bound, which is what a margin is read on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

Floats = npt.NDArray[np.float64]

LEVEL = 0.90
_COUNTS_AT_A_TIME = 2**21  # resampled items held at once, 16 MB an array
_ROUND_OFF = 1e-12  # relative spread of replicates below which they differ only by the order of summation


class Interval(NamedTuple):
    """A point estimate and the two ends of its interval, all in the estimate's unit."""

    estimate: float
    low: float
    high: float


def normal_quantile(level: float) -> float:
    """Return z such that a standard normal lies in (-z, z) with probability `level`."""
    return float(special.ndtri((1 + level) / 2))


def t_quantile(level: float, degrees: int) -> float:
    """Return t such that Student's t with `degrees` of freedom lies in (-t, t) with probability `level`."""
    return float(special.stdtrit(degrees, (1 + level) / 2))


# -- right or wrong per item ---------------------------------------------------------------------------------------


def wilson_interval(k: int, n: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's score interval of the proportion k/n.

    Source: Newcombe (1998), Statistics in Medicine 17:857-872, method 3.
    """
    assert 0 <= k <= n, (k, n)
    assert n > 0
    z2 = normal_quantile(level) ** 2
    centre = (k + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)
    return (0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half)


def tango_z(b: int, c: int, n: int, d0: float) -> float:
    """Return Tango's score statistic of the hypothesis that the paired difference of proportions is `d0`.

    `q` is the likelihood's best estimate under `d0` of the probability that only the base is right.

    Source: Tango (1998), Statistics in Medicine 17:891-908.
    """
    distance = b - c - n * d0
    if distance == 0:
        return 0.0
    quadratic, linear, constant = 2 * n, d0 * (2 * n - b + c) - (b + c), -c * d0 * (1 - d0)
    root = math.sqrt(max(0.0, linear * linear - 4 * quadratic * constant))
    q = (root - linear) / (2 * quadratic)
    variance = n * (2 * q + d0 * (1 - d0))
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def tango_interval(b: int, c: int, n: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Return the score interval of (b - c) / n, the paired difference of two proportions.

    Args:
        b: Items that only the arm gets right.
        c: Items that only the base gets right.
        n: All items.
        level: Two-sided confidence.

    Source: Tango (1998), Statistics in Medicine 17:891-908.
    """
    assert b >= 0 <= c, (b, c)
    assert b + c <= n > 0, (b, c, n)
    z, estimate = normal_quantile(level), (b - c) / n

    def excess(d0: float, target: float) -> float:
        return min(max(tango_z(b, c, n, d0), -1e6), 1e6) - target  # brentq takes no infinity

    def root(start: float, end: float, target: float) -> float:
        return cast(float, optimize.brentq(excess, start, end, args=(target,), xtol=1e-12))

    low = -1.0 if c == n else root(-1.0, estimate, z)
    high = 1.0 if b == n else root(estimate, 1.0, -z)
    return low, high


# -- functions of sums over documents -------------------------------------------------------------------------------


def bootstrap_sums(
    columns: npt.ArrayLike,
    statistic: Callable[[Floats], Floats],
    *,
    resamples: int,
    seed: int,
    level: float = LEVEL,
) -> Interval:
    """Return a function of sums over documents with its BCa bootstrap interval.

    Rows are resampled whole, so columns that belong to one document (both arms' bits, its bytes) stay paired.

    Few documents of very unequal size make it too narrow, as they make every bootstrap: simulated with log-normal sizes
    (sigma 1), the 90% interval of a paired ratio covers 80% with 20 documents, 83% with 50, 87% with 400; with sigma
    0.5, 84%, 86% and 90%. Hence the floors on the number of documents.

    Args:
        columns: (n, k): what each of n documents adds to each of k sums; n >= 2.
        statistic: Maps sums (..., k) to figures (...).
        resamples: Bootstrap resamples; the ends of a 90% interval need 1,000 or more.
        seed: Of the resampling: the same seed and n draw the same documents.
        level: Two-sided confidence.

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 14.3.
    """
    columns = np.asarray(columns, dtype=np.float64)
    assert columns.ndim == 2, columns.shape
    assert len(columns) >= 2, "one document has no spread"
    total = columns.sum(axis=0)
    estimate = float(statistic(total))
    replicates = statistic(_resampled_sums(columns, resamples, seed))
    left_out = statistic(total - columns)
    return Interval(estimate, *_bca_ends(estimate, replicates, left_out, level))


def _resampled_sums(columns: Floats, resamples: int, seed: int) -> Floats:
    """Return sums over documents drawn with replacement, (resamples, k), a bounded number of draws at a time."""
    n, k = columns.shape
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, k))
    rows_at_a_time = max(1, _COUNTS_AT_A_TIME // n)
    for start in range(0, resamples, rows_at_a_time):
        rows = min(rows_at_a_time, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times_drawn = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        sums[start : start + rows] = times_drawn.astype(np.float64) @ columns
    return sums


def _bca_ends(estimate: float, replicates: Floats, left_out: Floats, level: float) -> tuple[float, float]:
    """Return the bias-corrected and accelerated ends.

    Replicates that differ by round-off alone (arms that score every document the same) give an interval of no width:
    otherwise the order of summation would decide which of two equal arms is better.
    """
    if np.ptp(replicates) <= _ROUND_OFF * max(1.0, abs(estimate)):
        return estimate, estimate
    count = len(replicates)
    below = (np.sum(replicates < estimate) + np.sum(replicates <= estimate)) / (2 * count)
    bias = special.ndtri(np.clip(below, 0.5 / count, 1 - 0.5 / count))
    influence = left_out.mean() - left_out
    spread = np.sum(influence**2)  # 0 where leaving any one out changes nothing: macro F1 of a few, all alike
    acceleration = np.sum(influence**3) / (6 * spread**1.5) if spread > 0 else 0.0
    shifted = bias + np.array([-1.0, 1.0]) * normal_quantile(level)
    low, high = np.quantile(replicates, special.ndtr(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def bootstrap_ratio(
    num: npt.ArrayLike, den: npt.ArrayLike, *, resamples: int, seed: int, level: float = LEVEL
) -> Interval:
    """Return sum(num) / sum(den) of one arm (bits per byte, token accuracy) with its BCa interval over documents.

    Args:
        num: (n,): what each document adds above.
        den: (n,): what it adds below; all positive.
        resamples: Bootstrap resamples.
        seed: Of the resampling.
        level: Two-sided confidence.
    """
    columns = np.column_stack([num, den])
    assert (columns[:, 1] > 0).all(), "a document that adds nothing below the line carries no information"
    return bootstrap_sums(columns, lambda s: s[..., 0] / s[..., 1], resamples=resamples, seed=seed, level=level)


def paired_ratio_bootstrap(
    num_arm: npt.ArrayLike,
    num_base: npt.ArrayLike,
    den: npt.ArrayLike,
    *,
    relative: bool = True,
    resamples: int,
    seed: int,
    level: float = LEVEL,
) -> Interval:
    """Return how sum(num) / sum(den) differs between two arms on the same documents, with its BCa interval.

    Args:
        num_arm: (n,): the arm's share above, document by document (bits, tokens predicted right).
        num_base: (n,): the base's, in the same order of documents.
        den: (n,): below, the same for both (bytes, tokens); all positive.
        relative: ratio_arm / ratio_base - 1 if true, else ratio_arm - ratio_base.
        resamples: Bootstrap resamples.
        seed: Of the resampling.
        level: Two-sided confidence.
    """
    columns = np.column_stack([num_arm, num_base, den])
    assert (columns[:, 2] > 0).all(), "a document that adds nothing below the line carries no information"
    difference: Callable[[Floats], Floats] = (  # den cancels in the relative difference
        (lambda s: s[..., 0] / s[..., 1] - 1) if relative else (lambda s: (s[..., 0] - s[..., 1]) / s[..., 2])
    )
    return bootstrap_sums(columns, difference, resamples=resamples, seed=seed, level=level)


# -- a handful of repeated readings ---------------------------------------------------------------------------------


def mean_interval(values: npt.ArrayLike, *, level: float = LEVEL) -> Interval:
    """Return the mean of two or more values with its t interval."""
    values = np.asarray(values, dtype=np.float64)
    assert values.size >= 2, "one value has no spread"
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size)
    half = t_quantile(level, values.size - 1) * error
    return Interval(mean, mean - half, mean + half)


def abba_saving(arm_seconds: npt.ArrayLike, base_seconds: npt.ArrayLike, *, level: float = LEVEL) -> Interval:
    """Return 1 - exp(r), the share of the base's time that the arm saves, with r the mean ln(arm/base) over blocks.

    The interval is a t interval of r, carried through 1 - exp(r), which falls where r rises: the ends change places.

    Args:
        arm_seconds: (blocks, 2): first and last reading of each block (arm, base, base, arm).
        base_seconds: (blocks, 2): the two readings between them. Blocks >= 2.
        level: Two-sided confidence.
    """
    arm, base = np.asarray(arm_seconds, dtype=np.float64), np.asarray(base_seconds, dtype=np.float64)
    assert arm.shape == base.shape == (len(arm), 2), (arm.shape, base.shape)
    r = mean_interval((np.log(arm) - np.log(base)).mean(axis=1), level=level)
    return Interval(-math.expm1(r.estimate), -math.expm1(r.high), -math.expm1(r.low))


def items_to_decide(interval: Interval, n: int, *, margin: float, level: float = LEVEL) -> int | None:
    """Return how many items would decide whether a difference lies above -margin, if it stays what it is now.

    Normal approximation: the standard error is read off the interval's width and shrinks with 1/sqrt(items), and the
    bound clears -margin when |estimate + margin| exceeds z of them. The estimate itself will move, so this is the
    number with even odds of deciding, not a guarantee.

    Returns:
        Items in all (not in addition to `n`); None where the estimate sits on -margin, which no number decides.
    """
    half = (interval.high - interval.low) / 2
    distance = abs(interval.estimate + margin)
    return None if distance == 0 else math.ceil(n * (half / distance) ** 2)


def look_alpha(alpha: float, looks: int) -> float:
    return 0.0304 if looks == 2 and alpha == 0.05 else alpha / looks


def log_ratio_from_spread(log_ratio: float, *, sd: float, runs: int, level: float = LEVEL) -> Interval:
    half = t_quantile(level, runs - 1) * sd * math.sqrt(2)
    return Interval(-math.expm1(log_ratio), -math.expm1(log_ratio + half), -math.expm1(log_ratio - half))
