"""Intervals: how far a figure measured on these documents, in these blocks, may be from the truth.

Each question has its method:

- Right or wrong per item, both arms on the same items: Tango's score interval. It holds its level
  where a plain "difference +- 1.64 standard errors" does not: few items, few disagreements, none at
  all.
- Two arms' ratios of sums over the same documents (bits per byte, token accuracy):
  skewness-corrected t interval of the linearised difference. Documents are of unequal size and
  damage is seldom symmetric: a bootstrap is too short.
- One arm's function of sums over documents (bits per byte, macro F1): BCa bootstrap over documents.
  Tokens of one document err together, so documents are resampled, never tokens.
- The same over groups, where several documents come from one source: what they add is summed by
  group, and groups take the place of documents everywhere (`clustered.py`).
- Readings taken in blocks of four (arm, base, base, arm, or the reverse): skewness-corrected t
  interval over blocks. Within a block a linear drift of the machine adds the same to both arms and
  cancels.

Every interval is two-sided at `level`. At 0.90 each end is a one-sided 95% bound, which is what a
margin is read on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

Floats = npt.NDArray[np.float64]

LEVEL = 0.90
_COUNTS_AT_A_TIME = 2**21  # resampled items held at once, 16 MB an array
# relative spread of replicates below which they differ only by the order of summation
_ROUND_OFF = 1e-12


class Interval(NamedTuple):
    """A point estimate and the two ends of its interval, all in the estimate's unit."""

    estimate: float
    low: float
    high: float


def normal_quantile(level: float) -> float:
    """Return z such that a standard normal lies in (-z, z) with probability `level`."""
    return float(special.ndtri((1 + level) / 2))


def t_quantile(level: float, degrees: float) -> float:
    """Return t such that Student's t with `degrees` of freedom lies in (-t, t) with probability
    `level`.
    """
    return float(special.stdtrit(degrees, (1 + level) / 2))


# -- right or wrong per item ----------------------------------------------------------------------


def wilson_interval(k: float, n: float, *, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's score interval of the proportion k/n: two shares in [0, 1].

    Args:
        k: Successes; of effective items (`clustered.py`) not whole.
        n: Items.
        level: Two-sided confidence.

    Source: Newcombe (1998), Statistics in Medicine 17:857-872, method 3.
    """
    assert 0 <= k <= n, (k, n)
    assert n > 0
    z2 = normal_quantile(level) ** 2
    centre = (k + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)
    # Exactly 0 and 1 at the edges, where rounding could leave the range of a share.
    return (0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half)


def _variance_at(d0: float, only_arm: float, only_base: float) -> float:
    """Return the variance of one item's difference under `d0`, given the shares where one arm alone
    is right.

    `q` is the likelihood's best estimate under `d0` of the probability that only the base is right.
    """
    linear, constant = (
        d0 * (2 - only_arm + only_base) - (only_arm + only_base),
        -only_base * d0 * (1 - d0),
    )
    # The larger root of 2 q^2 + linear q + constant = 0. The floor guards against rounding.
    q = (math.sqrt(max(0.0, linear * linear - 8 * constant)) - linear) / 4
    return 2 * q + d0 * (1 - d0)


def tango_z(b: float, c: float, n: float, d0: float) -> float:
    """Return Tango's score statistic of the hypothesis that the paired difference of proportions is
    `d0`.

    Source: Tango (1998), Statistics in Medicine 17:891-908.
    """
    distance = b - c - n * d0
    if distance == 0:
        return 0.0
    variance = n * _variance_at(d0, b / n, c / n)
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def tango_interval(b: float, c: float, n: float, *, level: float = LEVEL) -> tuple[float, float]:
    """Return the score interval of (b - c) / n, the paired difference of two proportions.

    Args:
        b: Items that only the arm gets right; of effective items (`clustered.py`) not whole.
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

    # The statistic falls as d0 rises and is 0 at the estimate, so each side of it holds one root.
    low = -1.0 if c == n else root(-1.0, estimate, z)
    high = 1.0 if b == n else root(estimate, 1.0, -z)
    return low, high


def smallest_visible_damage(n: int, *, level: float = LEVEL) -> float:
    """Return the share of documents that must be damaged for `n` of them to hold a damaged one, at
    one-sided `level`.

    Rarer damage leaves no trace in more than 1 - (1 + level) / 2 of all samples, and no method sees
    what is not there: 1 - 0.05^(1/n), about 3/n. Documents that come from one source are damaged
    together: `n` is then the number of sources.

    Args:
        n: Independent documents, or groups of them.
        level: Two-sided confidence of the interval that is read beside it.

    Source: Hanley and Lippman-Hand (1983), JAMA 249:1743-1745 (the rule of three).
    """
    assert n > 0
    # 1 - alpha^(1/n); `expm1` keeps the digits of a share that is close to 0.
    return float(-math.expm1(math.log((1 - level) / 2) / n))


# -- functions of sums over documents -------------------------------------------------------------


def bootstrap_sums(
    columns: npt.ArrayLike,
    statistic: Callable[[Floats], Floats],
    *,
    resamples: int,
    seed: int,
    level: float = LEVEL,
    times: npt.NDArray[np.int64] | None = None,
) -> Interval:
    """Return a function of sums over documents with its BCa bootstrap interval.

    Rows are resampled whole, so columns that belong to one document (both arms' bits, its bytes)
    stay paired.

    Few documents of very unequal size make it too narrow, as they make every bootstrap: simulated
    with log-normal sizes (sigma 1), the 90% interval of a paired ratio covers 80% with 20
    documents, 83% with 50, 87% with 400; with sigma 0.5, 84%, 86% and 90%. Hence the floors on the
    number of documents.

    Args:
        columns: (n, k): what each of n documents adds to each of k sums; n >= 2. With `times`, each
            kind of document.
        statistic: Maps sums (..., k) to figures (...).
        resamples: Bootstrap resamples; the ends of a 90% interval need 1,000 or more.
        seed: Of the resampling: the same seed and n draw the same documents.
        level: Two-sided confidence.
        times: How many documents there are of each kind, where many are alike: the same
            distribution, drawn faster.

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 14.3.
    """
    columns = np.asarray(columns, dtype=np.float64)
    assert columns.ndim == 2, columns.shape
    assert (len(columns) if times is None else times.sum()) >= 2, "one document has no spread"
    if times is None:
        total, drawn = columns.sum(axis=0), _resampled_sums(columns, resamples, seed)
    else:
        # Drawing n documents of a few kinds is drawing how many there are of each.
        counts = np.random.default_rng(seed).multinomial(
            times.sum(), times / times.sum(), size=resamples
        )
        total, drawn = times @ columns, counts.astype(np.float64) @ columns
    estimate, replicates = float(statistic(total)), statistic(drawn)
    left_out = _each(statistic(total - columns), times)
    return Interval(estimate, *_bca_ends(estimate, replicates, left_out, level))


def _each(by_kind: Floats, times: npt.NDArray[np.int64] | None) -> Floats:
    """Return a figure of each document from those of each kind."""
    return by_kind if times is None else np.repeat(by_kind, times)


def _resampled_sums(columns: Floats, resamples: int, seed: int) -> Floats:
    """Return sums over documents drawn with replacement, (resamples, k), a bounded number of draws
    at a time.
    """
    n, k = columns.shape
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, k))
    rows_at_a_time = max(1, _COUNTS_AT_A_TIME // n)
    for start in range(0, resamples, rows_at_a_time):
        rows = min(rows_at_a_time, resamples - start)
        # Each resample has numbers of its own, so that one `bincount` serves all of them.
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times_drawn = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        # A product with counts instead of a gather: no (rows, n, k) array is made.
        sums[start : start + rows] = times_drawn.astype(np.float64) @ columns
    return sums


def _bca_ends(
    estimate: float, replicates: Floats, left_out: Floats, level: float
) -> tuple[float, float]:
    """Return the bias-corrected and accelerated ends.

    Replicates that differ by round-off alone (arms that score every document the same) give an
    interval of no width: otherwise the order of summation would decide which of two equal arms is
    better.
    """
    if np.ptp(replicates) <= _ROUND_OFF * max(1.0, abs(estimate)):
        return estimate, estimate
    count = len(replicates)
    # Ties count half, because a few kinds of documents give many equal replicates.
    below = (np.sum(replicates < estimate) + np.sum(replicates <= estimate)) / (2 * count)
    # Clipped: with all replicates on one side the bias would be infinite.
    bias = special.ndtri(np.clip(below, 0.5 / count, 1 - 0.5 / count))
    influence = left_out.mean() - left_out
    # 0 where leaving any one out changes nothing: macro F1 of a few, all alike
    spread = np.sum(influence**2)
    acceleration = np.sum(influence**3) / (6 * spread**1.5) if spread > 0 else 0.0
    # Both ends at once: (2,)
    shifted = bias + np.array([-1.0, 1.0]) * normal_quantile(level)
    low, high = np.quantile(replicates, special.ndtr(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def bootstrap_ratio(
    num: npt.ArrayLike, den: npt.ArrayLike, *, resamples: int, seed: int, level: float = LEVEL
) -> Interval:
    """Return sum(num) / sum(den) of one arm (bits per byte, token accuracy) with its BCa interval
    over documents, in the unit of num over that of den.

    Args:
        num: (n,): what each document adds above.
        den: (n,): what it adds below; all positive.
        resamples: Bootstrap resamples.
        seed: Of the resampling.
        level: Two-sided confidence.
    """
    columns = np.column_stack([num, den])
    assert (columns[:, 1] > 0).all(), (
        "a document that adds nothing below the line carries no information"
    )
    return bootstrap_sums(
        columns, lambda s: s[..., 0] / s[..., 1], resamples=resamples, seed=seed, level=level
    )


# -- paired ratios of sums over documents ---------------------------------------------------------

_OWN_SKEWNESS = 1.5
"""Factor on the sample's own skewness, which falls short where it rests on a few large documents
(simulated).
"""


class Spread(NamedTuple):
    """How a ratio of sums varies over documents, as far as its interval and the planning of a
    larger sample need.

    Attributes:
        n: Documents it was read on.
        sd: Standard deviation of what one document adds to n times the estimate, in the estimate's
            unit.
        degrees: Effective degrees of freedom of `sd`.
        skewness: Of what one document adds, towards high values: what makes the upper end too low.
        skewness_down: The same towards low values.
    """

    n: int
    sd: float
    degrees: float
    skewness: float
    skewness_down: float

    def scaled(self, n: int) -> Spread:
        """Return the spread that `n` documents of the same kind would show."""
        return self._replace(n=n, degrees=self.degrees * n / self.n)

    def reversed(self) -> Spread:
        """Return the spread of the estimate's negative."""
        return self._replace(skewness=self.skewness_down, skewness_down=self.skewness)


def ratio_spread(
    num: npt.ArrayLike, below: npt.ArrayLike, sizes: npt.ArrayLike
) -> tuple[float, Spread]:
    """Return sum(num) / sum(below) and how it varies over documents.

    Linearised: a document moves the ratio by e = num - ratio * below, here over 1 - its share below
    (leave-one-out). Degrees of freedom: Satterthwaite's 2n / (kurtosis - 1), n for normal e.
    Skewness: the larger of the sample's own (times 1.5) and that of a sum whose documents weigh as
    these do while e / size is skewed alike in all of them. The second sees what the first misses:
    damage in a share of the documents that hit no large one by chance.

    Args:
        num: (n,): what each document adds above; n >= 2.
        below: (n,): what it adds below; the sum is positive.
        sizes: (n,): bytes or tokens of each document; all positive.

    Source: Satterthwaite (1946), Biometrics Bulletin 2:110-114, with Var(s^2) = sd^4 (kurtosis - 1)
    / n; the pooled skewness is that of a weighted sum of independent terms, its factor and the 1.5
    by simulation.
    """
    num, below, sizes = (np.asarray(values, dtype=np.float64) for values in (num, below, sizes))
    n = num.size
    assert num.shape == below.shape == sizes.shape == (n,), (num.shape, below.shape, sizes.shape)
    assert n >= 2, "one document has no spread"
    assert (sizes > 0).all(), "a document that adds nothing below the line carries no information"
    assert below.sum() > 0, below.sum()
    ratio, share = float(num.sum() / below.sum()), below / below.sum()
    # The ratio's derivative with respect to one document, times n
    residual = (num - ratio * below) / below.mean()
    # A document that makes up much of the sum pulls the ratio towards itself, so its residual is
    # too small. The cap keeps one huge document from dividing by almost 0.
    moved = residual / (1 - np.minimum(share, 0.5))
    moved -= moved.mean()
    sd = float(np.sqrt(np.mean(moved**2) * n / (n - 1)))
    # Arms that read the same differ by the order of summation alone.
    if sd <= _ROUND_OFF * max(1.0, float(np.abs(num).sum() / below.sum())):
        return ratio, Spread(n, 0.0, float(n - 1), 0.0, 0.0)
    scaled = moved / np.sqrt(np.mean(moved**2))
    own, pooled = float(np.mean(scaled**3)), _pooled_skewness(residual, sizes)
    # Satterthwaite's, held between 1 and n - 1. `2 / n` guards against a kurtosis of 1.
    degrees = min(max(2 * n / max(float(np.mean(scaled**4)) - 1, 2 / n), 1.0), n - 1.0)
    # Never below 0: skewness widens an end, and narrows none.
    up, down = (max(sign * _OWN_SKEWNESS * own, sign * pooled, 0.0) for sign in (1, -1))
    return ratio, Spread(n, sd, degrees, up, down)


def _pooled_skewness(residual: Floats, sizes: Floats) -> float:
    """Return the skewness that one document adds if residual / size has the same skewness in all
    (weighted by size).
    """
    weights = sizes / sizes.mean()
    rates = residual / weights
    variance = float(np.mean(weights * rates**2))
    skewness = float(np.mean(weights * rates**3)) / variance**1.5
    return skewness * float(np.mean(weights**3)) / float(np.mean(weights**2)) ** 1.5


def _reach(spread: Spread, skewness: float, level: float) -> float:
    """Return how far one end lies from the estimate: t, and more towards the side of a tail, never
    less.
    """
    t = t_quantile(level, spread.degrees)
    if not math.isfinite(t):  # next to no degrees of freedom
        return math.inf if spread.sd > 0 else 0.0
    return float(skewed_reach(t, np.float64(skewness), spread.n)) * spread.sd / math.sqrt(spread.n)


def skewed_t_interval(estimate: float, spread: Spread, *, level: float = LEVEL) -> Interval:
    """Return the interval of an estimate whose spread over documents is known.

    Source: Johnson (1978), JASA 73:536-544; Hall (1992), JRSS B 54:221-228.
    """
    # A tail towards low values makes the lower end too high, so it belongs to that end.
    below, above = (
        _reach(spread, skewness, level) for skewness in (spread.skewness_down, spread.skewness)
    )
    return Interval(estimate, estimate - below, estimate + above)


def paired_ratio(
    num_arm: npt.ArrayLike, num_base: npt.ArrayLike, den: npt.ArrayLike, *, relative: bool = True
) -> tuple[float, Spread]:
    """Return how sum(num) / sum(den) differs between two arms on the same documents, and that
    difference's spread.

    Args:
        num_arm: (n,): the arm's share above, document by document (bits, tokens predicted right).
        num_base: (n,): the base's, in the same order of documents.
        den: (n,): below, the same for both (bytes, tokens); all positive.
        relative: ratio_arm / ratio_base - 1 if true, else ratio_arm - ratio_base.
    """
    arm, base = np.asarray(num_arm, dtype=np.float64), np.asarray(num_base, dtype=np.float64)
    # den cancels in the relative difference
    return ratio_spread(arm - base, base if relative else den, den)


def paired_ratio_interval(
    num_arm: npt.ArrayLike,
    num_base: npt.ArrayLike,
    den: npt.ArrayLike,
    *,
    relative: bool = True,
    level: float = LEVEL,
) -> Interval:
    """Return `paired_ratio` with its skewness-corrected t interval.

    Why not the bootstrap: an arm exactly at the margin passes a one-sided 95% bound too often.
    Passes in % and width against Student's t, simulated at 400 documents with log-normal sizes
    (3,000 to 8,000 runs each, standard errors 0.2 to 0.4), for relative differences by document
    that are

    =================================  =====  ===============  ===============  ===============
    differences                        sigma  BCa              bootstrap-t      this
    =================================  =====  ===============  ===============  ===============
    normal                             0.5     5.6 (0.99)       5.3 (1.00)       4.5 (1.01)
    normal                             1       5.5 (0.99)       5.3 (1.01)       4.4 (1.07)
    exponential                        1       7.7 (1.10)       7.0 (1.14)       3.3 (1.35)
    log-normal                         0.5     7.8 (1.15)       7.5 (1.19)       5.2 (1.34)
    log-normal                         1       8.1 (1.18)       7.7 (1.25)       3.4 (1.86)
    Student's t of 3 degrees           1       7.9 (0.99)       7.3 (1.01)       3.9 (1.15)
    growing with log size              1       8.1 (1.13)       7.5 (1.19)       5.2 (1.52)
    growing and exponential            1       9.3 (1.15)       8.7 (1.23)       5.0 (1.61)
    damage in 5% of the documents      0.5     8.6 (1.35)       6.7 (1.55)       4.0 (1.94)
    damage in 5% of the documents      1      13.9 (1.42)      12.1 (1.74)       1.3 (3.82)
    normal, less in long documents     1       5.4 (0.99)       5.0 (1.00)       4.3 (1.03)
    =================================  =====  ===============  ===============  ===============

    Beyond that it gives way too: differences that grow with log size pass 8.2% at sigma 1.5 with
    400 documents (BCa 16.5%), 7.1% at sigma 1 with 50.

    Args:
        num_arm: (n,): the arm's share above, document by document (bits, tokens predicted right).
        num_base: (n,): the base's, in the same order of documents.
        den: (n,): below, the same for both (bytes, tokens); all positive.
        relative: ratio_arm / ratio_base - 1 if true, else ratio_arm - ratio_base.
        level: Two-sided confidence.
    """
    return skewed_t_interval(*paired_ratio(num_arm, num_base, den, relative=relative), level=level)


def sums_spread(
    columns: npt.ArrayLike,
    statistic: Callable[[Floats], Floats],
    *,
    times: npt.NDArray[np.int64] | None = None,
) -> Spread:
    """Return how a function of sums over documents varies, from its values with each document left
    out.

    Args:
        columns: (n, k): what each of n documents adds to each of k sums; n >= 2. With `times`, each
            kind of document.
        statistic: Maps sums (..., k) to figures (...).
        times: How many documents there are of each kind.

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 11 (jackknife).
    """
    columns = np.asarray(columns, dtype=np.float64)
    total = columns.sum(axis=0) if times is None else times @ columns
    left_out = _each(statistic(total - columns), times)
    # Pseudo-values as a mean of documents of equal weight
    ones = np.ones(len(left_out))
    return ratio_spread((len(left_out) - 1) * (left_out.mean() - left_out), ones, ones)[1]


# -- a handful of repeated readings ---------------------------------------------------------------


def mean_interval(values: npt.ArrayLike, *, level: float = LEVEL) -> Interval:
    """Return the mean of two or more values, shape (n,), with its t interval in their unit."""
    values = np.asarray(values, dtype=np.float64)
    assert values.size >= 2, "one value has no spread"
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size)
    half = t_quantile(level, values.size - 1) * error
    return Interval(mean, mean - half, mean + half)


def skewed_mean_interval(values: npt.ArrayLike, *, level: float = LEVEL) -> Interval:
    """Return the mean of a handful of values with its t interval, wider on the side of a tail,
    never narrower.

    As `skewed_t_interval`, with the sample's own skewness and n - 1 degrees of freedom. Simulated
    for two looks at 4 and 8 normal blocks of equal arms, each at one-sided 0.0304 (400,000 runs):
    4.3% false answers a side, where the plain t interval gives 5.3%; a difference of 1.5 standard
    deviations of a block is found in 95% of cases, by the plain one in 97%.

    Args:
        values: (n,), n >= 2.
        level: Two-sided confidence.

    Source: Johnson (1978), JASA 73:536-544; Hall (1992), JRSS B 54:221-228.
    """
    values = np.asarray(values, dtype=np.float64)
    assert values.size >= 2, "one value has no spread"
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    around = values - values.mean()
    variance = float(np.mean(around**2))
    skewness = float(np.mean(around**3)) / variance**1.5 if variance > 0 else 0.0
    spread = Spread(
        values.size, sd, float(values.size - 1), max(skewness, 0.0), max(-skewness, 0.0)
    )
    return skewed_t_interval(mean, spread, level=level)


def skewed_reach(t: float, skewness: Floats | np.float64, n: int) -> Floats:
    """Return how many standard errors one end lies from the mean of `n` values, given their
    skewness towards it.

    With a = skewness / sqrt(n): `t + a (1 + 2 t^2) / 6 + 5 a^2 t^3 / 27`, the inverse of Hall's
    cubic transformation to second order (the first is Johnson's), which has no pole where samples
    are small.
    """
    a = np.maximum(skewness, 0.0) / math.sqrt(n)
    with np.errstate(over="ignore"):  # next to no degrees of freedom: infinitely far
        at = a * t  # multiplied in this order nothing overflows to a number that is none
        # Only `t` is left where the sample is not skewed.
        return t + a / 6 + at * t / 3 + 5 / 27 * at * at * t


def block_log_ratios(arm_seconds: npt.ArrayLike, base_seconds: npt.ArrayLike) -> Floats:
    """Return ln(arm/base) of each block, the mean of its two pairs of readings.

    Args:
        arm_seconds: Shape (blocks, 2), seconds; of joules it is used alike.
        base_seconds: The same of the base.

    Returns:
        Shape (blocks,), without a unit.
    """
    arm, base = (
        np.asarray(arm_seconds, dtype=np.float64),
        np.asarray(base_seconds, dtype=np.float64),
    )
    assert arm.shape == base.shape == (len(arm), 2), (arm.shape, base.shape)
    return (np.log(arm) - np.log(base)).mean(axis=1)


def abba_saving(
    arm_seconds: npt.ArrayLike, base_seconds: npt.ArrayLike, *, level: float = LEVEL
) -> Interval:
    """Return 1 - exp(r), the share of the base's time that the arm saves, with r the mean
    ln(arm/base) over blocks.

    The interval is r's (`skewed_mean_interval`), carried through 1 - exp(r), which falls where r
    rises: the ends change places.

    Args:
        arm_seconds: (blocks, 2): the arm's two readings of each block, in the order they were
            taken.
        base_seconds: (blocks, 2): the base's. Blocks >= 2.
        level: Two-sided confidence.
    """
    return log_saving(block_log_ratios(arm_seconds, base_seconds), level=level)


def log_saving(log_ratios: npt.ArrayLike, *, level: float = LEVEL) -> Interval:
    """Return 1 - exp(mean) of two or more ln(arm/base), a share of the base, with the interval of
    `skewed_mean_interval`.
    """
    r = skewed_mean_interval(log_ratios, level=level)
    return Interval(-math.expm1(r.estimate), -math.expm1(r.high), -math.expm1(r.low))


class RunSpread(NamedTuple):
    """How ln(device-hours) of one training varies from run to run: `sd` with its degrees of
    freedom.
    """

    sd: float
    degrees: float


ASSUMED_SPREAD = 2.0
"""Times the recorded spread that a training may have whose own nobody has seen: see `own_spread`.
"""
LEAST_RUNS = 3
"""Runs of one training from which its own spread is tested."""
SPREAD_TEST_LEVEL = 0.5
"""One-sided level of the F test that a training varies more than what is recorded: so high that it
misses little.
"""


def own_spread(
    recorded: RunSpread, hours: Sequence[float], *, assumed: float = ASSUMED_SPREAD
) -> tuple[RunSpread, str]:
    """Return the spread to take for one side of a comparison of single runs, and how it was come
    to.

    What self-tests recorded is the spread of another training. Of a training that varies twice as
    much it is half the truth, and 8% to 14% of answers would be false. So with `LEAST_RUNS` runs of
    its own or more the two spreads are tested (F test): its own is taken where it is larger, both
    pooled where it is not. With fewer nothing is known of it, and `assumed` times the recorded
    spread is taken. Simulated false answers (200,000 runs, 5 or 10 recorded runs, 3 to 5 own ones,
    spreads 1, 2 and 4 times the recorded): at most 5.8%.

    Args:
        recorded: Of repeated runs of one training on this device.
        hours: Device-hours of this side's own runs, the released one included.
        assumed: Times the recorded spread that a side without them may have; 1 for the training
            that was repeated.

    Source: Snedecor and Cochran (1980), Statistical Methods, sections 6.10 to 6.12 (F test, pooled
    variance); level and factor by simulation (`benchmarks/gate_simulation.py`).
    """
    if len(hours) < LEAST_RUNS:
        how = (
            f"taken as {assumed:g} times the recorded one" if assumed != 1 else "taken as recorded"
        )
        return recorded._replace(sd=assumed * recorded.sd), how
    own = RunSpread(float(np.log(np.asarray(hours, dtype=np.float64)).std(ddof=1)), len(hours) - 1)
    larger = own.sd > 0 and (recorded.sd == 0 or _is_larger(own, recorded))
    if larger:
        return own, f"that of its own {len(hours)} runs, larger than the recorded one"
    # Pooled variance, each weighted by its degrees of freedom
    degrees = own.degrees + recorded.degrees
    pooled = math.sqrt((own.degrees * own.sd**2 + recorded.degrees * recorded.sd**2) / degrees)
    return RunSpread(pooled, degrees), f"pooled with that of its own {len(hours)} runs"


def _is_larger(own: RunSpread, recorded: RunSpread) -> bool:
    ratio = (own.sd / recorded.sd) ** 2
    return float(special.fdtrc(own.degrees, recorded.degrees, ratio)) < SPREAD_TEST_LEVEL


def log_ratio_from_spread(
    arm: float, base: float, *, arm_spread: RunSpread, base_spread: RunSpread, level: float = LEVEL
) -> Interval:
    """Return the saving 1 - arm/base of one run each, with the interval that the spreads of such
    runs allow.

    ln(arm/base) has the variance of both together. Its half-width is t standard deviations, t with
    the smaller of the two degrees of freedom (both spreads may rest on the same recorded runs),
    carried through 1 - exp, which changes the ends' places.

    Args:
        arm: The arm's device-hours (any unit, the base's).
        base: The base's.
        arm_spread: Of ln(device-hours) of such trainings as the arm's.
        base_spread: Of such as the base's.
        level: Two-sided confidence.
    """
    assert arm > 0 < base, (arm, base)
    r, sd = math.log(arm / base), math.hypot(arm_spread.sd, base_spread.sd)
    half = t_quantile(level, min(arm_spread.degrees, base_spread.degrees)) * sd
    return Interval(-math.expm1(r), -math.expm1(r + half), -math.expm1(r - half))


def look_alpha(alpha: float, looks: int) -> float:
    """Return the one-sided level of each look that keeps `alpha` over all of them.

    Two looks, the second at twice the data of the first: their statistics have correlation
    sqrt(1/2), and the level is that of c with P(Z1 < c, Z2 < c) = 1 - alpha. For normal statistics;
    t statistics of 4 and 8 blocks are less alike, so that 0.05 becomes 0.0527 (simulated, 2,000,000
    runs).

    Args:
        alpha: One-sided, over all looks; in (0, 0.5).
        looks: Planned looks: 1 or 2.

    Source: Pocock (1977), Biometrika 64:191-199; Owen (1956), Annals of Mathematical Statistics
    27:1075-1090.
    """
    assert 0 < alpha < 0.5, alpha
    assert looks in (1, 2), looks
    if looks == 1:
        return alpha
    rho = math.sqrt(0.5)
    # P(Z1 < c, Z2 < c) = Phi(c) - 2 T(c, slope), with Owen's T
    slope = math.sqrt((1 - rho) / (1 + rho))

    def excess(c: float) -> float:
        return float(special.ndtr(c) - 2 * special.owens_t(c, slope)) - (1 - alpha)

    # equal looks; looks that never coincide
    ends = (-float(special.ndtri(alpha)), -float(special.ndtri(alpha / 2)))
    return float(special.ndtr(-cast(float, optimize.brentq(excess, *ends, xtol=1e-12))))


# -- how many items a decision takes --------------------------------------------------------------

POWER = 0.8
_PILOT_ERRORS = 2.0
"""Standard errors by which the pilot's variance is taken larger when planning."""
_PILOT_SKEWNESS = 2.0
"""Factor on the pilot's skewness when planning: a larger sample meets rarer documents."""


def items_for_power(
    spread: Spread,
    *,
    margin: float,
    assumed: float = 0.0,
    power: float = POWER,
    level: float = LEVEL,
) -> int | None:
    """Return how many documents decide, with probability `power`, whether a difference lies above
    -margin.

    A model truly at `assumed` > -margin then passes (the lower end is above -margin) with that
    probability; one below -margin fails. The pilot's spread is itself an estimate: its variance is
    taken 2 standard errors larger, its skewness twice. Simulated for 0.8, planned from 400
    documents, a model that is no worse passes 80% to 92%; 78% where the difference grows with the
    length of log-normal documents of sigma 1. A pilot of 100 documents has not seen a
    tail: with differences that are log-normal, or skewed with sigma 1, it passes 70% to 78%.

    Args:
        spread: Of the oriented difference (higher is better) in a finished comparison.
        margin: Difference that is still accepted.
        assumed: The true difference to plan for; 0 is a model that is no worse.
        power: Probability of deciding.
        level: Two-sided confidence of the interval.

    Returns:
        Documents in all (not in addition to the pilot's); None where `assumed` sits on -margin.
    """
    distance, z = assumed + margin, float(special.ndtri(power))
    if distance == 0:
        return None
    skewness = _PILOT_SKEWNESS * (spread.skewness_down if distance > 0 else spread.skewness)
    sd = spread.sd * math.sqrt(1 + _PILOT_ERRORS * math.sqrt(2 / spread.degrees))

    # how far the bound, on the worst day that counts, lies on the wrong side
    def excess(n: int) -> float:
        return (
            _reach(spread._replace(sd=sd).scaled(n), skewness, level)
            + z * sd / math.sqrt(n)
            - abs(distance)
        )

    if excess(2) <= 0:
        return 2
    # Doubling until enough, then halving the gap: the excess falls as n grows.
    few, many = 2, 4
    while excess(many) > 0:
        few, many = many, 2 * many
    while many - few > 1:
        half = (few + many) // 2
        few, many = (few, half) if excess(half) <= 0 else (half, many)
    return many


def binary_items_for_power(
    discordant: float,
    *,
    margin: float,
    assumed: float = 0.0,
    power: float = POWER,
    level: float = LEVEL,
) -> int | None:
    """Return how many right-or-wrong items decide, with probability `power`, whether a difference
    lies above -margin.

    Tango's statistic has one variance at the margin and another at the truth. Half an item either
    way is added, since counts move in steps.

    Args:
        discordant: Probability that exactly one arm is right; at least |assumed|. See
            `discordant_rate`.
        margin: Difference of proportions that is still accepted.
        assumed: The true difference to plan for; 0 is a model that is no worse.
        power: Probability of deciding.
        level: Two-sided confidence of the interval.

    Returns:
        Items in all; None where `assumed` sits on -margin.

    Source: Tango (1998), Statistics in Medicine 17:891-908, section 5; Connett, Smith and McHugh
    (1987), Statistics in Medicine 6:59-68 (the step).
    """
    assert 0 < margin < 1, margin
    assert abs(assumed) <= discordant <= 1, (assumed, discordant)
    distance, z = abs(assumed + margin), float(special.ndtri(power))
    if distance == 0:
        return None
    # The test's variance is the one at the margin; the power's is the one at the truth.
    at_margin = math.sqrt(
        _variance_at(-margin, (discordant + assumed) / 2, (discordant - assumed) / 2)
    )
    at_truth = math.sqrt(max(0.0, discordant - assumed**2))
    return math.ceil(
        ((normal_quantile(level) * at_margin + z * at_truth) / distance) ** 2 + 1 / distance
    )


def discordant_rate(b: float, c: float, n: float) -> float:
    """Return the share of items on which exactly one arm is right, one standard error up, never 0:
    for planning.

    Args:
        b: Items that only the arm gets right.
        c: Items that only the base gets right.
        n: All items.
    """
    # Half an item is added, so that no disagreement in the pilot is not taken for none ever.
    rate = (b + c + 0.5) / (n + 1)
    return min(1.0, rate + math.sqrt(rate * (1 - rate) / n))
