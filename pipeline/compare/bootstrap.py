"""Intervals of paired comparisons: BCa bootstrap over items, ABBA log-ratios. Pure functions on arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def paired_bootstrap(
    statistic: Callable[[np.ndarray], float], num_items: int, *, resamples: int, seed: int, level: float = 0.90
) -> tuple[float, float, float]:
    """Return a statistic of paired items and its BCa interval, resampling items (documents) with replacement.

    Args:
        statistic: Takes row numbers (n,), returns the figure over those items of both arms.
        level: Two-sided; 0.90 holds two one-sided 95% bounds.

    Source: Efron 1987, JASA 82:171-185 (bias-corrected and accelerated).
    """
    from scipy.stats import norm

    everything = np.arange(num_items)
    point = statistic(everything)
    generator = np.random.default_rng(seed)
    drawn = np.array([statistic(generator.integers(0, num_items, num_items)) for _ in range(resamples)])
    left_out = np.array([statistic(np.delete(everything, row)) for row in everything])
    deviation = left_out.mean() - left_out
    spread = float((deviation**2).sum()) ** 1.5
    if spread == 0 or np.ptp(drawn) == 0:
        return point, point, point
    acceleration = float((deviation**3).sum()) / (6 * spread)
    below = ((drawn < point).mean() + (drawn <= point).mean()) / 2
    bias = norm.ppf(min(max(below, 1 / resamples), 1 - 1 / resamples))
    z = bias + norm.ppf([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(drawn, norm.cdf(bias + z / (1 - acceleration * z)))
    return point, float(low), float(high)


def mean_interval(values: np.ndarray, level: float = 0.90) -> tuple[float, float, float]:
    """Return the mean of independent readings and its t interval."""
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    half = float(t.ppf((1 + level) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def abba_saving(arm_s: np.ndarray, base_s: np.ndarray, level: float = 0.90) -> tuple[float, float, float]:
    """Return `1 - exp(mean ln(arm/base))` over ABBA blocks with its interval; positive is cheaper.

    Args:
        arm_s: Seconds (blocks, 2) of the first and fourth reading of each block.
        base_s: Seconds (blocks, 2) of the second and third.
    """
    per_block = np.log(arm_s).mean(axis=1) - np.log(base_s).mean(axis=1)
    mean, low, high = mean_interval(per_block, level)
    return 1 - float(np.exp(mean)), 1 - float(np.exp(high)), 1 - float(np.exp(low))
