"""Intervals against published values, scipy, brute force, and simulated truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipeline.compare.statistics import (
    Interval,
    _bca_ends,
    abba_saving,
    bootstrap_ratio,
    bootstrap_sums,
    items_to_decide,
    mean_interval,
    paired_ratio_bootstrap,
    tango_interval,
    tango_z,
    wilson_interval,
)

# -- Tango ----------------------------------------------------------------------------------------------------------

PROPCIS = [  # b, c, n, level, low, high: R 4.6.1, PropCIs 0.3.0, scoreci.mp(c, b, n, level), which iterates to 1e-7
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
def test_tango_gives_the_values_of_propcis(b: int, c: int, n: int, level: float, low: float, high: float) -> None:
    assert tango_interval(b, c, n, level=level) == pytest.approx((low, high), abs=1e-6)


def test_tango_gives_the_published_interval() -> None:
    """Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33:2850-2875: airway hyper-responsiveness."""
    assert tango_interval(1, 7, 21, level=0.95) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_without_a_disagreement_has_its_closed_form() -> None:
    z2 = stats.norm.ppf(0.95) ** 2
    assert tango_interval(0, 0, 400) == pytest.approx((-z2 / (400 + z2), z2 / (400 + z2)), abs=1e-9)


@pytest.mark.parametrize(("b", "c", "n"), [(12, 5, 60), (1, 9, 30), (3, 0, 25)])
def test_tango_is_the_inversion_of_its_score_test(b: int, c: int, n: int) -> None:
    """Against Z with the constrained likelihood maximised numerically instead of by the formula, on a grid."""

    def brute_z(d0: float) -> float:
        q = np.linspace(max(0, -d0), (1 - d0) / 2, 200_001)[1:-1]  # P(only base right); P(only arm right) = q + d0
        best = q[np.argmax(b * np.log(q + d0) + c * np.log(q) + (n - b - c) * np.log1p(-2 * q - d0))]
        return (b - c - n * d0) / math.sqrt(n * (2 * best + d0 - d0**2))

    grid = np.linspace(-0.6, 0.6, 61)
    assert [brute_z(d0) for d0 in grid] == pytest.approx([tango_z(b, c, n, d0) for d0 in grid], abs=2e-3)
    low, high = tango_interval(b, c, n)
    assert [tango_z(b, c, n, low), tango_z(b, c, n, high)] == pytest.approx([1.6448536, -1.6448536], abs=1e-6)


@pytest.mark.parametrize(("p_arm", "p_base"), [(0.10, 0.10), (0.15, 0.05), (0.02, 0.04)])
def test_tango_covers_the_truth_at_its_level(p_arm: float, p_base: float) -> None:
    """Exact coverage: every table of 60 items, weighted by its probability (no simulation)."""
    n, truth, covered = 60, p_arm - p_base, 0.0
    for b in range(28):
        for c in range(28):
            if abs(tango_z(b, c, n, truth)) <= stats.norm.ppf(0.95):
                covered += stats.multinomial.pmf([b, c, n - b - c], n, [p_arm, p_base, 1 - p_arm - p_base])
    assert 0.875 <= covered <= 0.94
    low, high = tango_interval(7, 3, n)
    assert (abs(tango_z(7, 3, n, truth)) <= stats.norm.ppf(0.95)) == (low <= truth <= high)


# -- Wilson ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(k: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(k, n, level=0.95) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (3, 7), (872, 872), (500, 872)])
def test_wilson_agrees_with_scipy(k: int, n: int) -> None:
    theirs = stats.binomtest(k, n).proportion_ci(0.9, method="wilson")
    assert wilson_interval(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


# -- bootstrap ------------------------------------------------------------------------------------------------------


def _documents(seed: int, n: int = 60, sigma: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return bits of an arm, bits of a base and bytes of documents of unequal size; the arm takes 2% fewer bits."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(6, sigma, n)
    base = size * rng.normal(2.3, 0.3, n)
    return base * rng.normal(0.98, 0.05, n), base, size


def _scipy(columns: tuple[np.ndarray, ...], statistic: Callable[..., Any], method: str) -> Any:
    """Return scipy's interval; `random_state` is the name that every supported scipy knows."""
    settings: dict[str, Any] = {"method": method, "random_state": np.random.default_rng(2), "batch": 2_000}
    settings |= {"paired": True, "vectorized": True, "n_resamples": 20_000, "confidence_level": 0.9}
    return stats.bootstrap(columns, statistic, **settings).confidence_interval


def test_paired_ratio_bootstrap_agrees_with_scipy() -> None:
    arm, base, size = _documents(0)
    ours = paired_ratio_bootstrap(arm, base, size, resamples=20_000, seed=1)

    def relative(a: np.ndarray, b: np.ndarray, s: np.ndarray, axis: int = -1) -> np.ndarray:
        return (a.sum(axis) / s.sum(axis)) / (b.sum(axis) / s.sum(axis)) - 1

    theirs = _scipy((arm, base, size), relative, "BCa")
    assert ours.estimate == pytest.approx(float(relative(arm, base, size)), abs=1e-12)
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * width)


def test_bca_differs_from_the_plain_percentile_interval_on_skewed_sums() -> None:
    """So agreement with scipy's BCa is agreement on the correction, not on what both would give without it."""
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
    """A variance from sums: resamples are smaller on average, so the interval without bias correction sits too low."""
    x = np.random.default_rng(8).normal(0, 1, 20)
    variance = lambda s: s[..., 1] / s[..., 2] - (s[..., 0] / s[..., 2]) ** 2
    ours = bootstrap_sums(np.column_stack([x, x**2, np.ones(20)]), variance, resamples=20_000, seed=1)
    theirs = {method: _scipy((x, x), lambda v, _, axis=-1: v.var(axis), method) for method in ("BCa", "percentile")}
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
    beyond = lambda s: -np.abs(s[..., 0] - x.sum())  # 0 for the sample itself, less for every resample
    low, high = bootstrap_sums(x, beyond, resamples=500, seed=0)[1:]
    assert -np.inf < low <= high < 0


def test_absolute_difference_and_single_arm() -> None:
    arm, base, size = _documents(1)
    absolute = paired_ratio_bootstrap(arm, base, size, relative=False, resamples=500, seed=0)
    one = bootstrap_ratio(arm, size, resamples=500, seed=0)
    assert absolute.estimate == pytest.approx(arm.sum() / size.sum() - base.sum() / size.sum(), abs=1e-12)
    assert one.estimate == pytest.approx(arm.sum() / size.sum(), abs=1e-12)
    assert one.low < one.estimate < one.high


def test_pairing_narrows_the_interval() -> None:
    arm, base, size = _documents(2)
    paired = paired_ratio_bootstrap(arm, base, size, resamples=1000, seed=0)
    alone = bootstrap_ratio(arm, size, resamples=1000, seed=0)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low) / alone.estimate


def test_bootstrap_is_deterministic_and_the_same_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    arm, base, size = _documents(4, n=64)
    whole = paired_ratio_bootstrap(arm, base, size, resamples=400, seed=7)
    assert paired_ratio_bootstrap(arm, base, size, resamples=400, seed=7) == whole
    assert paired_ratio_bootstrap(arm, base, size, resamples=400, seed=8) != whole
    monkeypatch.setattr("pipeline.compare.statistics._COUNTS_AT_A_TIME", 64 * 16)
    assert paired_ratio_bootstrap(arm, base, size, resamples=400, seed=7) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_arms_that_differ_by_round_off_alone_have_an_interval_of_no_width(factor: float) -> None:
    _, base, size = _documents(5, n=37)
    interval = paired_ratio_bootstrap(factor * base, base, size, resamples=300, seed=0)
    assert interval == pytest.approx((factor - 1,) * 3, abs=1e-12)
    assert interval.low == interval.high == interval.estimate


def test_bca_covers_the_truth_at_about_its_level() -> None:
    """400 samples of 200 documents whose true ratio is known: 90% nominal, 4 standard errors are 6 points."""
    covered = 0
    for trial in range(400):
        arm, base, size = _documents(trial, n=200, sigma=0.5)
        low, high = paired_ratio_bootstrap(arm, base, size, resamples=500, seed=trial)[1:]
        covered += low <= 0.98 - 1 <= high
    assert 0.84 <= covered / 400 <= 0.96


# -- a handful of readings ------------------------------------------------------------------------------------------


def test_mean_interval_agrees_with_scipy() -> None:
    values = np.array([0.03, 0.05, -0.01, 0.02])
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert mean_interval(values) == pytest.approx((values.mean(), theirs.low, theirs.high), abs=1e-12)
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_abba_saving_by_hand() -> None:
    """Blocks with ln(arm/base) = ln 0.5 and ln 0.6 exactly: r is their mean, half the range is t times the error."""
    arm, base = np.array([[1.0, 4.0], [0.6, 0.6]]), np.array([[2.0, 8.0], [1.0, 1.0]])
    saving = abba_saving(arm, base)
    r, error = (math.log(0.5) + math.log(0.6)) / 2, (math.log(0.6) - math.log(0.5)) / 2
    t = stats.t.ppf(0.95, 1)
    assert saving == pytest.approx((1 - math.exp(r), 1 - math.exp(r + t * error), 1 - math.exp(r - t * error)))


def test_abba_order_cancels_a_linear_drift_and_sequential_order_does_not() -> None:
    """Equal arms on a machine that slows by 0.5% a run. In sequence, five runs each, that looks like 2.5%."""
    rng = np.random.default_rng(0)
    interleaved, sequential = [], []
    for _ in range(200):
        noise = np.exp(rng.normal(0, 0.002, 20))
        seconds = (1 + 0.005 * np.arange(20)) * noise
        blocks = seconds[:16].reshape(4, 4)  # arm, base, base, arm
        interleaved.append(abba_saving(blocks[:, [0, 3]], blocks[:, [1, 2]]).estimate)
        sequential.append(1 - seconds[:5].mean() / seconds[5:10].mean())
    assert np.mean(interleaved) == pytest.approx(0, abs=4e-4)
    assert np.mean(sequential) == pytest.approx(0.0242, abs=2e-3)  # 5 runs of 0.5%, over a base that has slowed


# -- items to decide ------------------------------------------------------------------------------------------------


def test_items_to_decide_is_where_the_bound_reaches_the_margin() -> None:
    """No difference, 10% discordant: 1.645 sqrt(0.1 / n) = 0.01 at n = 2,706; Tango's is a little wider at 2,000."""
    interval = Interval(0.0, *tango_interval(100, 100, 2000))
    needed = items_to_decide(interval, 2000, margin=0.01)
    assert needed is not None
    assert needed == pytest.approx(0.1 * (1.6449 / 0.01) ** 2, rel=0.02)
    low, _ = tango_interval(round(0.05 * needed), round(0.05 * needed), needed)
    assert low == pytest.approx(-0.01, rel=0.02)


def test_no_number_of_items_decides_a_difference_that_sits_on_the_margin() -> None:
    assert items_to_decide(Interval(-0.25, -0.5, 0.0), 400, margin=0.25) is None


def test_an_interval_whose_leave_one_outs_are_all_alike_has_no_acceleration() -> None:
    ends = _bca_ends(0.5, np.linspace(0.2, 0.8, 101), np.full(9, 0.5), 0.9)
    np.testing.assert_allclose(ends, (0.23, 0.77), atol=1e-9)  # the plain percentiles
