"""Intervals against published values, scipy, brute force, and simulated truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipeline.compare.statistics import (
    Interval,
    RunSpread,
    Spread,
    _bca_ends,
    _reach,
    abba_saving,
    binary_items_for_power,
    bootstrap_ratio,
    bootstrap_sums,
    discordant_rate,
    items_for_power,
    log_ratio_from_spread,
    look_alpha,
    mean_interval,
    paired_ratio,
    paired_ratio_interval,
    ratio_spread,
    skewed_t_interval,
    sums_spread,
    tango_interval,
    tango_z,
    wilson_interval,
)

# -- Tango ----------------------------------------------------------------------------------------


def pass_probability(
    n: int, discordant: float, difference: float, margin: float, alpha: float = 0.05
) -> float:
    """Return the probability that Tango's lower bound lies above -margin: the sum over all tables
    worth counting.
    """
    critical, total = stats.norm.isf(alpha), 0.0
    # of discordant items, those that only the arm gets right
    share = (discordant + difference) / (2 * discordant)
    first, last = stats.binom.ppf([1e-7, 1 - 1e-7], n, discordant).astype(int)
    for either in range(first, last + 1):
        few, many = 0, either + 1  # Z rises with b: the smallest that passes
        while few < many:
            b = (few + many) // 2
            few, many = (few, b) if tango_z(b, either - b, n, -margin) > critical else (b + 1, many)
        total += stats.binom.pmf(either, n, discordant) * stats.binom.sf(few - 1, either, share)
    return float(total)


# b, c, n, level, low, high: R 4.6.1, PropCIs 0.3.0, scoreci.mp(c, b, n, level), which iterates to
# 1e-7
PROPCIS = [
    (7, 0, 14, 0.95, 0.17703378, 0.73200792),
    (0, 7, 14, 0.95, -0.73200798, -0.17703387),
    (0, 0, 14, 0.95, -0.21531081, 0.21531075),
    (3, 2, 14, 0.95, -0.26107773, 0.38899630),
    (1, 0, 14, 0.95, -0.15926158, 0.31468708),
    (5, 5, 16, 0.95, -0.36750698, 0.36750680),
    (13, 1, 14, 0.95, 0.37062618, 0.97455563),
    (14, 0, 14, 0.95, 0.56937838, 1.0),
    (0, 14, 14, 0.95, -1.0, -0.56937844),
    (1, 1, 2, 0.95, -0.81093764, 0.81093758),
    (25, 12, 200, 0.95, 0.00563550, 0.12694110),
    (7, 0, 14, 0.90, 0.25706768, 0.70121807),
    (0, 0, 14, 0.90, -0.16195488, 0.16195482),
    (2, 9, 20, 0.90, -0.56655054, -0.08405294),
    (10, 3, 50, 0.90, 0.02338053, 0.26074492),
    (25, 12, 200, 0.90, 0.01547646, 0.11644652),
]


@pytest.mark.parametrize(("b", "c", "n", "level", "low", "high"), PROPCIS)
def test_tango_gives_the_values_of_propcis(
    b: int, c: int, n: int, level: float, low: float, high: float
) -> None:
    assert tango_interval(b, c, n, level=level) == pytest.approx((low, high), abs=1e-6)


def test_tango_gives_the_published_interval() -> None:
    """Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33:2850-2875: airway
    hyper-responsiveness.
    """
    assert tango_interval(1, 7, 21, level=0.95) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_without_a_disagreement_has_its_closed_form() -> None:
    z2 = stats.norm.ppf(0.95) ** 2
    assert tango_interval(0, 0, 400) == pytest.approx((-z2 / (400 + z2), z2 / (400 + z2)), abs=1e-9)


@pytest.mark.parametrize(("b", "c", "n"), [(12, 5, 60), (1, 9, 30), (3, 0, 25)])
def test_tango_is_the_inversion_of_its_score_test(b: int, c: int, n: int) -> None:
    """Against Z with the constrained likelihood maximised numerically instead of by the formula, on
    a grid.
    """

    def brute_z(d0: float) -> float:
        # P(only base right); P(only arm right) = q + d0
        q = np.linspace(max(0, -d0), (1 - d0) / 2, 200_001)[1:-1]
        best = q[
            np.argmax(b * np.log(q + d0) + c * np.log(q) + (n - b - c) * np.log1p(-2 * q - d0))
        ]
        return (b - c - n * d0) / math.sqrt(n * (2 * best + d0 - d0**2))

    grid = np.linspace(-0.6, 0.6, 61)
    assert [brute_z(d0) for d0 in grid] == pytest.approx(
        [tango_z(b, c, n, d0) for d0 in grid], abs=2e-3
    )
    low, high = tango_interval(b, c, n)
    assert [tango_z(b, c, n, low), tango_z(b, c, n, high)] == pytest.approx(
        [1.6448536, -1.6448536], abs=1e-6
    )


@pytest.mark.parametrize(("p_arm", "p_base"), [(0.10, 0.10), (0.15, 0.05), (0.02, 0.04)])
def test_tango_covers_the_truth_at_its_level(p_arm: float, p_base: float) -> None:
    """Exact coverage: every table of 60 items, weighted by its probability (no simulation)."""
    n, truth, covered = 60, p_arm - p_base, 0.0
    for b in range(28):
        for c in range(28):
            if abs(tango_z(b, c, n, truth)) <= stats.norm.ppf(0.95):
                covered += stats.multinomial.pmf(
                    [b, c, n - b - c], n, [p_arm, p_base, 1 - p_arm - p_base]
                )
    assert 0.875 <= covered <= 0.94
    low, high = tango_interval(7, 3, n)
    assert (abs(tango_z(7, 3, n, truth)) <= stats.norm.ppf(0.95)) == (low <= truth <= high)


# -- Wilson ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3
    ("k", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(k: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(k, n, level=0.95) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (3, 7), (872, 872), (500, 872)])
def test_wilson_agrees_with_scipy(k: int, n: int) -> None:
    theirs = stats.binomtest(k, n).proportion_ci(0.9, method="wilson")
    assert wilson_interval(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


# -- bootstrap ------------------------------------------------------------------------------------


def _documents(
    seed: int, n: int = 60, sigma: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return bits of an arm, bits of a base and bytes of documents of unequal size; the arm takes
    2% fewer bits.
    """
    rng = np.random.default_rng(seed)
    size = rng.lognormal(6, sigma, n)
    base = size * rng.normal(2.3, 0.3, n)
    return base * rng.normal(0.98, 0.05, n), base, size


def _bootstrapped(arm: np.ndarray, base: np.ndarray, size: np.ndarray, **more: Any) -> Interval:
    """Return the relative difference of two arms with its BCa interval."""
    settings: dict[str, Any] = {"resamples": 400, "seed": 0, **more}
    return bootstrap_sums(
        np.column_stack([arm, base, size]), lambda s: s[..., 0] / s[..., 1] - 1, **settings
    )


def _scipy(columns: tuple[np.ndarray, ...], statistic: Callable[..., Any], method: str) -> Any:
    """Return scipy's interval; `random_state` is the name that every supported scipy knows."""
    settings: dict[str, Any] = {
        "method": method,
        "random_state": np.random.default_rng(2),
        "batch": 2_000,
    }
    settings |= {"paired": True, "vectorized": True, "n_resamples": 20_000, "confidence_level": 0.9}
    return stats.bootstrap(columns, statistic, **settings).confidence_interval


def test_bootstrap_of_a_paired_ratio_agrees_with_scipy() -> None:
    arm, base, size = _documents(0)
    ours = _bootstrapped(arm, base, size, resamples=20_000, seed=1)

    def relative(a: np.ndarray, b: np.ndarray, s: np.ndarray, axis: int = -1) -> np.ndarray:
        return (a.sum(axis) / s.sum(axis)) / (b.sum(axis) / s.sum(axis)) - 1

    theirs = _scipy((arm, base, size), relative, "BCa")
    assert ours.estimate == pytest.approx(float(relative(arm, base, size)), abs=1e-12)
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * width)


def test_bca_differs_from_the_plain_percentile_interval_on_skewed_sums() -> None:
    """So agreement with scipy's BCa is agreement on the correction, not on what both would give
    without it.
    """
    _, base, size = _documents(3, n=25)
    columns = np.column_stack([base * size, size])
    ratio = lambda s: s[..., 0] / s[..., 1]
    ours = bootstrap_sums(columns, ratio, resamples=20_000, seed=1)
    ends = {}
    for method in ("BCa", "percentile"):
        statistic = lambda a, b, axis=-1: a.sum(axis) / b.sum(axis)
        ends[method] = _scipy((columns[:, 0], columns[:, 1]), statistic, method)
    width = ends["BCa"].high - ends["BCa"].low
    assert (ours.low, ours.high) == pytest.approx(tuple(ends["BCa"]), abs=0.03 * width)
    assert abs(ours.high - ends["percentile"].high) > 0.06 * width


def test_bias_correction_agrees_with_scipy_on_a_biased_statistic() -> None:
    """A variance from sums: resamples are smaller on average, so the interval without bias
    correction sits too low.
    """
    x = np.random.default_rng(8).normal(0, 1, 20)
    variance = lambda s: s[..., 1] / s[..., 2] - (s[..., 0] / s[..., 2]) ** 2
    ours = bootstrap_sums(
        np.column_stack([x, x**2, np.ones(20)]), variance, resamples=20_000, seed=1
    )
    theirs = {
        method: _scipy((x, x), lambda v, _, axis=-1: v.var(axis), method)
        for method in ("BCa", "percentile")
    }
    width = theirs["BCa"].high - theirs["BCa"].low
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs["BCa"]), abs=0.03 * width)
    assert ours.low - theirs["percentile"].low > 0.1 * width


def test_replicates_that_tie_with_the_estimate_count_half_as_scipy_counts_them() -> None:
    """7 of 60: about one resample in six gives the very same share."""
    x = np.zeros(60)
    x[:7] = 1
    ours = bootstrap_ratio(x, np.ones(60), resamples=20_000, seed=1)
    theirs = _scipy((x, x), lambda v, _, axis=-1: v.mean(axis), "BCa")
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=1e-9)


def test_an_estimate_beyond_every_replicate_still_has_a_finite_interval() -> None:
    x = np.random.default_rng(0).normal(0, 1, (30, 1))
    # 0 for the sample itself, less for every resample
    beyond = lambda s: -np.abs(s[..., 0] - x.sum())
    low, high = bootstrap_sums(x, beyond, resamples=500, seed=0)[1:]
    assert -np.inf < low <= high < 0


def test_absolute_difference_and_single_arm() -> None:
    arm, base, size = _documents(1)
    absolute = paired_ratio_interval(arm, base, size, relative=False)
    one = bootstrap_ratio(arm, size, resamples=500, seed=0)
    assert absolute.estimate == pytest.approx(
        arm.sum() / size.sum() - base.sum() / size.sum(), abs=1e-12
    )
    assert one.estimate == pytest.approx(arm.sum() / size.sum(), abs=1e-12)
    assert one.low < one.estimate < one.high


def test_pairing_narrows_the_interval() -> None:
    arm, base, size = _documents(2)
    paired = paired_ratio_interval(arm, base, size)
    alone = bootstrap_ratio(arm, size, resamples=1000, seed=0)
    assert paired.high - paired.low < 0.75 * (alone.high - alone.low) / alone.estimate


def test_bootstrap_is_deterministic_and_the_same_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arm, base, size = _documents(4, n=64)
    whole = _bootstrapped(arm, base, size, resamples=400, seed=7)
    assert _bootstrapped(arm, base, size, resamples=400, seed=7) == whole
    assert _bootstrapped(arm, base, size, resamples=400, seed=8) != whole
    monkeypatch.setattr("pipeline.compare.statistics._COUNTS_AT_A_TIME", 64 * 16)
    assert _bootstrapped(arm, base, size, resamples=400, seed=7) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_arms_that_differ_by_round_off_alone_have_an_interval_of_no_width(factor: float) -> None:
    _, base, size = _documents(5, n=37)
    for interval in (
        _bootstrapped(factor * base, base, size),
        paired_ratio_interval(factor * base, base, size),
    ):
        assert interval == pytest.approx((factor - 1,) * 3, abs=1e-12)
        assert interval.low == interval.high == interval.estimate


def test_bca_covers_the_truth_at_about_its_level() -> None:
    """400 samples of 200 documents whose true ratio is known: 90% nominal, 4 standard errors are 6
    points.
    """
    covered = 0
    for trial in range(400):
        arm, base, size = _documents(trial, n=200, sigma=0.5)
        low, high = _bootstrapped(arm, base, size, resamples=500, seed=trial)[1:]
        covered += low <= 0.98 - 1 <= high
    assert 0.84 <= covered / 400 <= 0.96


# -- a handful of readings ------------------------------------------------------------------------


def test_mean_interval_agrees_with_scipy() -> None:
    values = np.array([0.03, 0.05, -0.01, 0.02])
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert mean_interval(values) == pytest.approx(
        (values.mean(), theirs.low, theirs.high), abs=1e-12
    )
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_abba_saving_by_hand() -> None:
    """Blocks with ln(arm/base) = ln 0.5 and ln 0.6 exactly: r is their mean, half the range is t
    times the error.
    """
    arm, base = np.array([[1.0, 4.0], [0.6, 0.6]]), np.array([[2.0, 8.0], [1.0, 1.0]])
    saving = abba_saving(arm, base)
    r, error = (math.log(0.5) + math.log(0.6)) / 2, (math.log(0.6) - math.log(0.5)) / 2
    t = stats.t.ppf(0.95, 1)
    assert saving == pytest.approx(
        (1 - math.exp(r), 1 - math.exp(r + t * error), 1 - math.exp(r - t * error))
    )


def test_abba_order_cancels_a_linear_drift_and_sequential_order_does_not() -> None:
    """Equal arms on a machine that slows by 0.5% a run. In sequence, five runs each, that looks
    like 2.5%.
    """
    rng = np.random.default_rng(0)
    interleaved, sequential = [], []
    for _ in range(200):
        noise = np.exp(rng.normal(0, 0.002, 20))
        seconds = (1 + 0.005 * np.arange(20)) * noise
        blocks = seconds[:16].reshape(4, 4)  # arm, base, base, arm
        interleaved.append(abba_saving(blocks[:, [0, 3]], blocks[:, [1, 2]]).estimate)
        sequential.append(1 - seconds[:5].mean() / seconds[5:10].mean())
    assert np.mean(interleaved) == pytest.approx(0, abs=4e-4)
    # 5 runs of 0.5%, over a base that has slowed
    assert np.mean(sequential) == pytest.approx(0.0242, abs=2e-3)


# -- paired ratios --------------------------------------------------------------------------------


def test_a_paired_ratio_without_skewness_has_the_t_interval() -> None:
    """Equal sizes, mirrored pairs of differences: what is left is t with Satterthwaite's
    degrees.
    """
    half = np.random.default_rng(0).normal(0, 1, 50)
    x = np.concatenate([half, -half])
    estimate, spread = ratio_spread(x + 3.0, np.ones(100), np.ones(100))
    kurtosis = stats.kurtosis(x, fisher=False)
    assert estimate == pytest.approx(3.0)
    assert spread == pytest.approx((100, x.std(ddof=1) / 0.99, min(200 / (kurtosis - 1), 99), 0, 0))
    reach = stats.t.ppf(0.95, spread.degrees) * spread.sd / 10
    assert skewed_t_interval(estimate, spread) == pytest.approx((3, 3 - reach, 3 + reach))


def test_a_skewed_end_by_hand() -> None:
    """Skewness 2 over 16 documents is a = 0.5: t + 0.5 (1 + 2 t^2) / 6 + 5 * 0.25 t^3 / 27 standard
    errors upwards.
    """
    t = stats.t.ppf(0.95, 15)
    interval = skewed_t_interval(1.0, Spread(16, 4.0, 15.0, 2.0, 0.0))
    assert interval == pytest.approx((1.0, 1.0 - t, 1.0 + t + (1 + 2 * t**2) / 12 + 5 / 108 * t**3))


def test_own_skewness_is_the_samples_and_pooled_is_that_of_a_weighted_sum() -> None:
    rng = np.random.default_rng(1)
    x = rng.exponential(1, 4000)
    _, equal = ratio_spread(x, np.ones(4000), np.ones(4000))
    assert equal.skewness == pytest.approx(1.5 * stats.skew(x), rel=0.01)
    assert equal.skewness_down == 0
    sizes = np.repeat([1.0, 20.0], [3998, 2])
    # the two that weigh most show no deviation at all
    few_large = sizes * np.where(sizes > 1, x.mean(), x)
    _, unequal = ratio_spread(few_large, sizes, sizes)
    assert unequal.skewness > 1.3 * stats.skew(few_large - x.mean() * sizes) > 0


def test_spread_of_the_negative_is_reversed() -> None:
    arm, base, size = _documents(6)
    (up, spread), (down, mirrored) = (
        ratio_spread(arm - base, base, size),
        ratio_spread(base - arm, base, size),
    )
    assert down == pytest.approx(-up)
    assert mirrored == pytest.approx(spread.reversed())
    low, high = skewed_t_interval(up, spread)[1:]
    assert skewed_t_interval(down, mirrored) == pytest.approx((-up, -high, -low))


@pytest.mark.parametrize("relative", [True, False])
def test_paired_ratio_interval_ignores_order_and_units(relative: bool) -> None:
    """Any order of documents; bits and bytes in any unit: a share does not move, a difference moves
    with its unit.
    """
    arm, base, size = _documents(7)
    whole = paired_ratio_interval(arm, base, size, relative=relative)
    order = np.random.default_rng(0).permutation(len(arm))
    assert paired_ratio_interval(
        arm[order], base[order], size[order], relative=relative
    ) == pytest.approx(whole)
    scaled = paired_ratio_interval(8 * arm, 8 * base, size / 1024, relative=relative)
    assert scaled == pytest.approx(np.array(whole) * (1 if relative else 8 * 1024))


def test_wider_levels_contain_narrower_ones() -> None:
    arm, base, size = _documents(8)
    intervals = [
        paired_ratio_interval(arm, base, size, level=level) for level in (0.5, 0.8, 0.9, 0.94, 0.99)
    ]
    for inner, outer in pairwise(intervals):
        assert outer.low < inner.low < inner.estimate < inner.high < outer.high


def test_the_linearised_error_is_the_bootstraps() -> None:
    """Many documents of moderate size: both give the same interval, so neither is off by a
    factor.
    """
    arm, base, size = _documents(9, n=4000, sigma=0.5)
    linear, bootstrap = (
        paired_ratio_interval(arm, base, size),
        _bootstrapped(arm, base, size, resamples=4000),
    )
    width = bootstrap.high - bootstrap.low
    assert (linear.low, linear.high) == pytest.approx(
        (bootstrap.low, bootstrap.high), abs=0.05 * width
    )


def test_sums_spread_of_a_ratio_is_its_own() -> None:
    arm, base, size = _documents(10, n=500, sigma=0.5)
    spread = sums_spread(np.column_stack([arm, base]), lambda s: s[..., 0] / s[..., 1] - 1)
    assert spread.sd == pytest.approx(paired_ratio(arm, base, size)[1].sd, rel=0.01)


def test_one_document_that_holds_everything_gives_a_finite_interval() -> None:
    interval = paired_ratio_interval([10.0, 0.0, 0.0], [8.0, 0.0, 0.0], [9.0, 1e-9, 1e-9])
    assert np.isfinite(interval).all()


# -- one run each, and two looks ------------------------------------------------------------------


def test_a_saving_of_single_runs_by_hand() -> None:
    half = stats.t.ppf(0.95, 4) * 0.02 * math.sqrt(2)
    saving = log_ratio_from_spread(
        6.0, 10.0, arm_spread=RunSpread(0.02, 4), base_spread=RunSpread(0.02, 4)
    )
    assert saving == pytest.approx((0.4, 1 - 0.6 * math.exp(half), 1 - 0.6 * math.exp(-half)))
    assert log_ratio_from_spread(
        6.0, 10.0, arm_spread=RunSpread(0.0, 2), base_spread=RunSpread(0.0, 2)
    ) == pytest.approx((0.4, 0.4, 0.4))


def test_a_saving_of_single_runs_covers_the_truth_at_its_level() -> None:
    rng, covered, trials = np.random.default_rng(0), 0, 4000
    for _ in range(trials):
        repeats, arm, base = (
            rng.normal(0, 0.03, 4),
            math.exp(rng.normal(0, 0.03)) * 0.7,
            math.exp(rng.normal(0, 0.03)),
        )
        spread = RunSpread(float(repeats.std(ddof=1)), 3)
        low, high = log_ratio_from_spread(arm, base, arm_spread=spread, base_spread=spread)[1:]
        covered += low <= 0.3 <= high
    assert covered / trials == pytest.approx(0.9, abs=0.015)  # 3 standard errors


def test_two_looks_have_pococks_levels() -> None:
    """Pocock (1977), table 1, and Jennison and Turnbull (2000), table 2.1, K = 2: constants 2.178,
    1.875, 2.772.
    """
    for two_sided, constant in ((0.05, 2.178), (0.10, 1.875), (0.01, 2.772)):
        assert look_alpha(two_sided / 2, 2) == pytest.approx(stats.norm.sf(constant), rel=5e-3)
    assert round(look_alpha(0.05, 2), 4) == 0.0304
    assert look_alpha(0.05, 1) == 0.05


def test_two_looks_keep_the_level_of_normal_statistics() -> None:
    z = np.random.default_rng(0).normal(0, 1, (400_000, 2))
    critical = stats.norm.isf(look_alpha(0.05, 2))
    assert (
        (z[:, 0] > critical) | (z.sum(axis=1) / math.sqrt(2) > critical)
    ).mean() == pytest.approx(0.05, abs=1e-3)


def test_two_looks_of_4_and_8_blocks_exceed_the_level_a_little() -> None:
    """t of 3 and 7 degrees of freedom are less alike than normal statistics: 5.3% false passes, not
    5.0%.
    """
    r = np.random.default_rng(0).normal(0, 1, (200_000, 8))
    alpha, passed = look_alpha(0.05, 2), np.zeros(len(r), dtype=bool)
    for blocks in (4, 8):
        seen = r[:, :blocks]
        low = seen.mean(axis=1) - stats.t.isf(alpha, blocks - 1) * seen.std(
            axis=1, ddof=1
        ) / math.sqrt(blocks)
        assert low[0] == pytest.approx(mean_interval(seen[0], level=1 - 2 * alpha).low)
        passed |= low > 0
    assert passed.mean() == pytest.approx(0.0527, abs=1.5e-3)


# -- how many items -------------------------------------------------------------------------------


def test_items_are_planned_from_a_pilot_that_one_document_decides() -> None:
    """Two documents of such a kind would have next to no degrees of freedom, and no end that a
    float can hold.
    """
    for skewness in (0.0, 26.0):
        spread = Spread(60, 0.15, 0.25, skewness, skewness)
        assert (items_for_power(spread, margin=0.01) or 0) > 1000
    assert 1e100 < _reach(Spread(2, 0.15, 1e-4, 0.0, 0.0), 0.0, 0.9) <= math.inf


def test_items_for_power_of_a_normal_mean_is_the_textbook_number() -> None:
    """sd 0.1, margin 0.01: ((1.6449 + 0.8416) * 0.1 / 0.01)^2 = 618.3, and 6% for the pilot's own
    error at 2,000.
    """
    spread = Spread(2000, 0.1, 1999.0, 0.0, 0.0)
    assert items_for_power(spread, margin=0.01) == pytest.approx(
        618.3 * (1 + 2 * math.sqrt(2 / 1999)), rel=0.005
    )
    # as far below the margin as 0 is above it
    fails = items_for_power(spread, margin=0.01, assumed=-0.02)
    assert fails == items_for_power(spread, margin=0.01)
    assert items_for_power(spread, margin=0.01, assumed=-0.01) is None


def test_more_is_needed_for_less() -> None:
    spread = Spread(400, 0.1, 300.0, 1.0, 4.0)
    needed = items_for_power(spread, margin=0.01)
    assert needed is not None
    assert (items_for_power(spread.reversed(), margin=0.01) or 0) < needed  # the tail is what costs
    for harder in ({"margin": 0.005}, {"power": 0.9}, {"level": 0.95}, {"assumed": -0.005}):
        assert (items_for_power(spread, **{"margin": 0.01, **harder}) or 0) > needed
        assert (
            binary_items_for_power(0.1, **{"margin": 0.01, **harder}) or 0
        ) > binary_items_for_power(0.1, margin=0.01)
    assert items_for_power(spread._replace(sd=1e-9), margin=0.01) == 2


@pytest.mark.parametrize(
    ("discordant", "margin"), [(0.02, 0.01), (0.05, 0.01), (0.2, 0.03), (0.1, 0.02), (0.01, 0.01)]
)
def test_binary_items_pass_an_equal_arm_4_times_in_5(discordant: float, margin: float) -> None:
    """Exact: every table of the planned number of items, weighted by its probability. Nor are many
    items to spare.
    """
    n = binary_items_for_power(discordant, margin=margin)
    assert n is not None
    assert pass_probability(n, discordant, 0.0, margin) >= 0.8
    assert pass_probability(round(0.75 * n), discordant, 0.0, margin) < 0.8


@pytest.mark.parametrize("n", [100, 400, 1000])
@pytest.mark.parametrize("discordant", [1.0, 1.5, 3.0, 8.0])
@pytest.mark.parametrize("margin", [0.01, 0.02])
def test_an_arm_on_the_margin_passes_at_most_6_percent(
    n: int, discordant: float, margin: float
) -> None:
    """Exact, down to discordant items that are all losses."""
    assert pass_probability(n, discordant * margin, -margin, margin) <= 0.06


def test_discordant_rate_is_never_0() -> None:
    assert 0.001 < discordant_rate(0, 0, 400) < 0.01
    assert 0.05 < discordant_rate(10, 10, 400) < 0.07
    assert discordant_rate(2, 0, 2) == 1.0


# -- details --------------------------------------------------------------------------------------


def test_an_interval_whose_leave_one_outs_are_all_alike_has_no_acceleration() -> None:
    ends = _bca_ends(0.5, np.linspace(0.2, 0.8, 101), np.full(9, 0.5), 0.9)
    np.testing.assert_allclose(ends, (0.23, 0.77), atol=1e-9)  # the plain percentiles
