"""What each part of a recipe brought, from readings with and without it. Arithmetic only.

A part is a stage or a setting that an arm has and its base has not. A coalition is a set of parts;
its arm has these and no other. Two questions are asked of each part:

- leaving it out: the arm with all parts against the arm with all but this one. It says what
  dropping the part would change now.
- its Shapley value: the mean, over all orders in which parts may be added, of what adding this one
  changes. It divides what all parts brought together among them without a rest, and takes the arms
  of all coalitions.

Both are weighted sums of readings whose weights add up to zero. Hours and serving times are read as
logarithms, since savings multiply: shares of shares add up in ln, and 1 - exp of a sum is a saving
again. Bits per byte are read so, too; accuracies as they are.

Intervals are two-sided at the level that is given. Hours: Student's t over seeds, each seed with
and without the part; of one seed, the spread that self-tests recorded, where there is one. Serving:
t over blocks, degrees of freedom by Welch and Satterthwaite. Quality: over documents that all arms
read, as a comparison of two arms has it; over seeds where there are several.

Sources: Shapley (1953), Contributions to the Theory of Games II, 307-317; Lundberg and Lee (2017),
arXiv 1705.07874 (attribution by Shapley values); Satterthwaite (1946), Biometrics Bulletin
2:110-114.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import TypeAlias

import numpy as np

from pipeline.compare import clustered, statistics
from pipeline.compare.clustered import GROUP
from pipeline.compare.quality import MIN_DOCUMENTS, Items, Summands, answer_of, summands
from pipeline.compare.statistics import LEVEL, Floats, RunSpread
from pipeline.ledger.numbers import how_many
from pipeline.tasks.quality import Mean, Quality, Ratio, Share

Coalition: TypeAlias = frozenset[str]
Contrast: TypeAlias = Mapping[Coalition, float]
"""By coalition, the weight of its reading."""
NOT_KNOWN = "not known yet"
MOST_PARTS = 6
"""Whose Shapley values take 64 arms."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a part changed; positive is better: a share saved, or quality gained.

    Attributes:
        value: None where it is not known; `why` then says why.
        ends: Of its interval; None where one reading each has no spread.
    """

    value: float | None
    ends: tuple[float, float] | None = None
    why: str = ""

    def answer(self, margin: float = 0.0) -> str:
        """Return `better`, `equal`, `worse` or `undecided`, by the rule of all comparisons."""
        return "undecided" if self.ends is None else answer_of(*self.ends, margin)


def unknown(why: str) -> Effect:
    """Return an effect that is not known."""
    return Effect(None, None, why)


# -- weights --------------------------------------------------------------------------------------


def coalitions(parts: Sequence[str]) -> list[Coalition]:
    """Return all sets of parts, the empty one first, the whole last."""
    sizes = range(len(parts) + 1)
    return [frozenset(each) for size in sizes for each in combinations(parts, size)]


def without(parts: Sequence[str], part: str) -> Contrast:
    """Return the weights of leaving a part out of the whole."""
    whole = frozenset(parts)
    return {whole: 1.0, whole - {part}: -1.0}


def together(parts: Sequence[str]) -> Contrast:
    """Return the weights of what all parts changed."""
    return {frozenset(parts): 1.0, frozenset(): -1.0}


def shapley(parts: Sequence[str], part: str) -> Contrast:
    """Return the weights of a part's Shapley value: each coalition without it counts with
    |S|! (n - |S| - 1)! / n!, the share of orders in which just these stand before the part.
    """
    n, found = len(parts), dict[Coalition, float]()
    for before in coalitions([each for each in parts if each != part]):
        weight = math.factorial(len(before)) * math.factorial(n - len(before) - 1)
        found[before | {part}] = weight / math.factorial(n)
        found[before] = -weight / math.factorial(n)
    return found


def level_of_each(num_parts: int) -> float:
    """Return the level of each of several intervals that hold together at `LEVEL` (Bonferroni)."""
    return 1 - (1 - LEVEL) / max(1, num_parts)


# -- hours ----------------------------------------------------------------------------------------


def hours_effect(
    contrast: Contrast,
    hours: Mapping[Coalition, Sequence[float]],
    *,
    level: float,
    recorded: RunSpread | None = None,
) -> Effect:
    """Return the share of device-hours that a part saved.

    Args:
        hours: Of each coalition's arm, seed by seed, in device-hours.
        level: Two-sided confidence.
        recorded: How ln(device-hours) of a training varies from run to run on this device; what one
            run each is given as its spread, `statistics.ASSUMED_SPREAD` times.
    """
    read = [np.asarray(hours[each], dtype=np.float64) for each in contrast]
    if any((each <= 0).any() for each in read):
        return unknown("an arm took no device-hours, and nothing is a share of that")
    weights = np.array([*contrast.values()])
    by_seed = weights @ np.log(np.array(read))
    if len(by_seed) > 1:
        return _as_saving(*statistics.mean_interval(by_seed, level=level))
    r = float(by_seed[0])
    if recorded is None:
        return Effect(-math.expm1(r), None, "one run each has no spread; seeds=[0,1,2] gives one")
    sd = statistics.ASSUMED_SPREAD * recorded.sd * math.sqrt(float(weights @ weights))
    half = statistics.t_quantile(level, recorded.degrees) * sd
    return _as_saving(r, r - half, r + half)


def _as_saving(r: float, low: float, high: float) -> Effect:
    """Return 1 - exp(r), which falls where r rises: the ends change places."""
    return Effect(-math.expm1(r), (-math.expm1(high), -math.expm1(low)))


# -- serving --------------------------------------------------------------------------------------


def serving_effect(
    contrast: Contrast, readings: Mapping[tuple[Coalition, Coalition], Floats], *, level: float
) -> Effect:
    """Return the share of serving time that a part saved.

    Args:
        readings: By pair of coalitions, ln(first / second) of each block, shape (blocks,).
        level: Two-sided confidence.
    """
    terms = _terms(contrast, readings)
    if isinstance(terms, str):
        return unknown(terms)
    if len(terms) == 1 and abs(terms[0][0]) == 1:
        ((sign, blocks),) = terms
        saving = statistics.log_saving(sign * blocks, level=level)
        return Effect(saving.estimate, (saving.low, saving.high))
    r = math.fsum(weight * float(blocks.mean()) for weight, blocks in terms)
    variances = [weight**2 * float(b.var(ddof=1)) / len(b) for weight, b in terms]
    total = math.fsum(variances)
    if total == 0:
        return _as_saving(r, r, r)
    degrees = total**2 / math.fsum(
        each**2 / (len(blocks) - 1) for each, (_, blocks) in zip(variances, terms, strict=True)
    )
    half = statistics.t_quantile(level, degrees) * math.sqrt(total)
    return _as_saving(r, r - half, r + half)


def _terms(
    contrast: Contrast, readings: Mapping[tuple[Coalition, Coalition], Floats]
) -> list[tuple[float, Floats]] | str:
    """Return the readings that a contrast is made of, with their weights: of one pair where that is
    all of it, else of each coalition against the empty one.
    """
    own = {each: weight for each, weight in contrast.items() if weight}
    if len(own) == 2:
        first, second = own
        for pair in ((first, second), (second, first)):
            if pair in readings:
                return [(own[pair[0]], readings[pair])]
    none = frozenset[str]()
    against = {each: weight for each, weight in own.items() if each != none}
    missing = [each for each in against if (each, none) not in readings]
    if missing:
        return f"{named(missing[0])} was not served in turns with the base"
    return [(weight, readings[each, none]) for each, weight in against.items()]


def named(coalition: Coalition) -> str:
    """Return a coalition in words."""
    return f"the arm with {', '.join(sorted(coalition))}" if coalition else "the base"


# -- quality --------------------------------------------------------------------------------------


def quality_effect(
    contrast: Contrast,
    items: Sequence[Mapping[Coalition, Items]],
    quality: Quality,
    *,
    level: float,
) -> Effect:
    """Return what a part changed in a quality, oriented so that positive is better: a share of what
    it was for a metric that is relative (bits per byte), else a difference.

    Args:
        items: By seed and coalition, the columns of its documents.
        quality: The metric: a ratio, a mean or a share.
        level: Two-sided confidence.
    """
    own = {each: weight for each, weight in contrast.items() if weight}
    found = [_on_documents({each: one[each] for each in own}, own, quality, level) for one in items]
    failed = next((each for each in found if each.value is None), None)
    if failed is not None or len(found) == 1:
        return failed or found[0]
    values = [each.value for each in found if each.value is not None]
    interval = statistics.mean_interval(values, level=level)
    return Effect(interval.estimate, (interval.low, interval.high))


def _on_documents(
    items: Mapping[Coalition, Items], weights: Contrast, quality: Quality, level: float
) -> Effect:
    parts = _summed(quality)
    if parts is None:
        return unknown(f"{quality.key} is no sum over documents")
    columns = quality.measure.columns
    lacking = [name for each in items.values() for name in columns if name not in each]
    if lacking:
        return unknown(f"an arm has no {lacking[0]!r} per document")
    paired = _paired([*items.values()])
    codes = next((c for each in paired if (c := clustered.group_codes(each)) is not None), None)
    both = [clustered.summed(np.asarray(col), codes) for pair in map(parts, paired) for col in pair]
    table = np.stack([each.astype(np.float64) for each in both], axis=1)  # (n, 2 x arms)
    if len(table) < MIN_DOCUMENTS:
        return unknown(f"{how_many(len(table), 'document')} that all arms read are too few")
    factors, sign = np.array([*weights.values()]), (1 if quality.direction > 0 else -1)

    def figure(sums: Floats) -> Floats:
        ratios = sums[..., 0::2] / sums[..., 1::2]
        if not quality.relative:
            return sign * (ratios @ factors)
        # less is better of all that are: 1 - arm/base, as a comparison of two arms has it
        return -np.expm1(np.log(ratios) @ factors)

    with np.errstate(divide="ignore", invalid="ignore"):
        value, spread = float(figure(table.sum(axis=0))), statistics.sums_spread(table, figure)
    nothing = quality.relative and (table.sum(axis=0) <= 0).any()
    if nothing or not math.isfinite(value) or not math.isfinite(spread.sd):
        return unknown("an arm's readings are not finite, or sum to nothing")
    if spread.sd == 0:
        return Effect(value, None, "all documents read the same, which shows no spread")
    interval = statistics.skewed_t_interval(value, spread, level=level)
    return Effect(value, (interval.low, interval.high))


def _summed(quality: Quality) -> Summands | None:
    """Return what is summed, and what that is divided by; None: the metric is no such ratio."""
    match quality.measure:
        case Ratio() | Mean() as measure:
            return summands(measure)
        case Share(column):
            return lambda items: (items[column] != 0, np.ones(len(items[column])))
        case _:
            return None


def _paired(items: Sequence[Items]) -> list[Items]:
    """Return the documents that all have, in one order."""
    shared = reduce(np.intersect1d, [each["digest"] for each in items])
    found: list[Items] = []
    for each in items:
        order = np.argsort(each["digest"])
        rows = order[np.searchsorted(each["digest"], shared, sorter=order)]
        found.append({name: column[rows] for name, column in each.items()})
    named_by = next((each[GROUP] for each in found if GROUP in each), None)
    return found if named_by is None else [{**each, GROUP: named_by} for each in found]


# -- what a part comes to -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What one question found of a part: each saving is of what there was without it.

    Attributes:
        margin: Loss of quality that still counts as equal.
    """

    hours: Effect
    quality: Effect
    serving: Effect
    margin: float

    def verdict(self) -> tuple[str, str]:
        """Return what it comes to in a word or two, and what to do."""
        if self.hours.value is None and self.serving.value is None and self.quality.value is None:
            return NOT_KNOWN, ""
        saved = [each.answer() for each in (self.hours, self.serving)]
        quality = self.quality.answer(self.margin)
        lost = self.quality.ends is not None and self.quality.ends[1] < -self.margin
        if lost and "better" not in saved:
            return "costs quality", "drop it"
        if lost:
            return "saves, and costs quality", "weigh them"
        if "better" in saved:
            mixed = "worse" in saved
            return ("saves and costs", "weigh them") if mixed else ("pays", "keep it")
        if quality == "better":
            return "better quality", "keep it"
        return ("costs", "drop it") if "worse" in saved else ("undecided", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """What was found of the parts that an arm has and its base has not.

    Attributes:
        says: By part, what it is.
        left_out: By part, what leaving it out of the whole shows.
        shapley: By part, its share of what all brought; empty where arms are missing.
        together: What all parts brought.
        lacking: Coalitions that no run has.
        key: Of the quality.
        runs: That were read.
        level: Of each interval of a column, so that all of it hold together at `LEVEL`.
    """

    arm: str
    base: str
    says: Mapping[str, str]
    left_out: Mapping[str, Effects]
    shapley: Mapping[str, Effects]
    together: Effects
    lacking: Sequence[Coalition]
    key: str
    runs: Sequence[str]
    level: float
    seeds: int
