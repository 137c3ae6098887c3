"""One arm's figure of a quality metric, with its interval over documents: a function per measure.

Intervals are two-sided at 95%: Wilson's where a document is right or wrong, the BCa bootstrap over
documents, or groups of them (`clustered.py`), elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.compare import clustered
from pipeline.compare.clustered import num_groups
from pipeline.compare.quality import macro_f1_interval
from pipeline.compare.statistics import bootstrap_ratio, wilson_interval
from pipeline.ledger.values import Value, measured, null
from pipeline.tasks.quality import (
    MacroF1,
    Mean,
    PlainRatio,
    PowerOfRatio,
    Quality,
    Ratio,
    RatioWhereAny,
    Share,
)

LEVEL = 0.95
LARGEST_EXPONENT = 1023.0  # 2**1024 is not a float64
Columns = Mapping[str, npt.NDArray[Any]]
Ends = tuple[float, float] | None
Figure = tuple[Value, Ends]
"""A figure with its interval; None where one document has no spread, or the figure is null."""


@dataclass(frozen=True, slots=True)
class Resampling:
    """Of an interval: how often and from what seed documents are drawn, and which belong together.

    Attributes:
        codes: (D,): the group of each document; None where each is a source of its own.
    """

    resamples: int
    seed: int
    codes: npt.NDArray[np.int64] | None = None


def figure_of(quality: Quality, columns: Columns, how: Resampling) -> Figure | None:
    """Return a metric of documents; None where it is left out, for want of columns or of anything
    to read it on.
    """
    measure = quality.measure
    if not set(columns).issuperset(measure.columns):
        return None
    if why := quality.why_unknown(columns):
        return null(why), None
    first, last = (columns[measure.columns[at]] for at in (0, -1))
    match measure:
        case RatioWhereAny():
            any_of, apart = last > 0, Resampling(how.resamples, how.seed)  # groups are of all
            return _measured(*ratio(first[any_of], last[any_of], apart)) if any_of.any() else None
        case PlainRatio():
            part = float(first.sum() / last.sum()) if first.any() else None
            return None if part is None else (measured(part), None)
        case PowerOfRatio():
            return _power_of_2(*ratio(first, last, how))
        case Ratio():
            return _measured(*ratio(first, last, how))
        case Share():
            return share(first, how)
        case Mean():
            return mean(_each(measure, columns), how)
        case MacroF1():
            return _macro_f1(first, last, how)


def _each(measure: Mean, columns: Columns) -> npt.NDArray[Any]:
    return np.asarray(measure.per_example(*(columns[name] for name in measure.columns)))


def value_of(quality: Quality, columns: Columns) -> float:
    """Return a metric of documents without an interval: what is read during training.

    It is NaN where the columns are. Only for measures that may be a task's primary one.
    """
    measure = quality.measure
    if isinstance(measure, Ratio):
        return float(columns[measure.num].sum() / columns[measure.den].sum())
    assert isinstance(measure, Share | Mean), "the primary metric is a ratio, a share or a mean"
    is_share = isinstance(measure, Share)
    return float((columns[measure.column] if is_share else _each(measure, columns)).mean())


def ratio(num: npt.NDArray[Any], den: npt.NDArray[Any], how: Resampling) -> tuple[float, Ends]:
    """Return sum(num) / sum(den), of shape (D,) each, and its interval over documents or groups."""
    num, den = clustered.summed(num, how.codes), clustered.summed(den, how.codes)
    # One document or group cannot be resampled.
    if len(num) == 1:
        return float(num[0] / den[0]), None
    interval = bootstrap_ratio(num, den, resamples=how.resamples, seed=how.seed, level=LEVEL)
    return interval.estimate, (interval.low, interval.high)


def mean(values: npt.NDArray[Any], how: Resampling) -> Figure:
    """Return the mean over examples, shape (D,), with its interval."""
    return _measured(*ratio(values, np.ones(len(values), dtype=np.int64), how))


def _measured(value: float, ci: Ends) -> Figure:
    return measured(value), ci


def _power_of_2(exponent: float, ci: Ends) -> Figure:
    """Return perplexity from bits per token; both ends keep their coverage, because the power is
    monotone.
    """
    low, high = ci or (exponent, exponent)
    if max(exponent, high) > LARGEST_EXPONENT:
        return null(f"2**{exponent:.0f} is beyond the range of a float"), None
    ends = None if ci is None else (math.pow(2, low), math.pow(2, high))
    return measured(math.pow(2, exponent)), ends


def share(right: npt.NDArray[Any], how: Resampling) -> Figure:
    """Return the share of examples that are not 0, with its interval."""
    k, n = int(np.count_nonzero(right)), len(right)
    if how.codes is None:
        return measured(k / n), wilson_interval(k, n, level=LEVEL)
    if num_groups(how.codes) == 1:
        return measured(k / n), None
    return measured(k / n), clustered.share_interval(
        right != 0, how.codes, resamples=how.resamples, seed=how.seed, level=LEVEL
    )


def _macro_f1(label: npt.NDArray[Any], prediction: npt.NDArray[Any], how: Resampling) -> Figure:
    if len(label) == 1 or num_groups(how.codes) == 1:
        return measured(macro_f1({"label": label, "prediction": prediction})), None
    interval = macro_f1_interval(
        label, prediction, resamples=how.resamples, seed=how.seed, level=LEVEL, codes=how.codes
    )
    return measured(interval.estimate), (interval.low, interval.high)


def macro_f1(columns: Columns) -> float:
    """Return the mean F1, a fraction, over the classes that occur among `label` or `prediction`."""
    label, prediction = columns["label"], columns["prediction"]
    size = int(max(label.max(), prediction.max())) + 1
    hits = np.bincount(label[label == prediction], minlength=size)
    occurs = np.bincount(label, minlength=size) + np.bincount(prediction, minlength=size)
    return float((2 * hits[occurs > 0] / occurs[occurs > 0]).mean())
