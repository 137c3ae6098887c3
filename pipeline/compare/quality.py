"""Two arms on the same documents: better, worse, equal within the margin, or undecided.

Differences are oriented so that higher is better for the arm. A metric that is `relative` (bits per
byte) is compared as `1 - arm/base` (the margin is a share), others as `arm - base` (accuracies: the
margin is in accuracy). The answer is read off a two-sided 90% interval, whose ends are one-sided
95% bounds, in this order:

- `equal`: the whole interval is within the margin on both sides, whichever side of 0 it lies on.
- `better`: the whole interval is above 0.
- `worse`: the whole interval is below 0; where it reaches above -margin, how much worse is not
  decided.
- `undecided`: anything else, fewer documents than an answer needs, or an interval of no width:
  resampling documents on which two different models happen to agree shows no spread, which is no
  proof that there is none. Macro F1 needs `MIN_CLASS_ITEMS` of the rarest class besides.

Documents are taken as independent unless their items name a `group`: then groups are what is
resampled and counted (`clustered.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.compare import clustered, statistics
from pipeline.compare.clustered import GROUP
from pipeline.compare.statistics import LEVEL, Floats, Interval, Spread
from pipeline.ledger.numbers import agreed, how_many
from pipeline.ledger.shapes import ComparedQuality
from pipeline.ledger.values import Provenance, Value, derive, null
from pipeline.tasks.quality import MacroF1, Mean, Quality, Ratio, Share
from pipeline.tasks.table import kind_of_columns

Items = Mapping[str, npt.NDArray[Any]]
"""What assessment keeps of each document: `digest` and, in the same order, the columns that a
figure needs.
"""

PAIRED_SHARE = 0.95
"""Below this share of common documents two arms were not assessed on the same data."""
MIN_DOCUMENTS = 20
MIN_CLASS_ITEMS = 20
"""Items of the rarest class below which an interval of macro F1 decides nothing, whatever the
number of classes.

Source: simulation through the gate (benchmarks/gate_simulation.py, `floor:`): a model that loses
    15% of a class with 12 items passes in 18% of cases, of a class with 20 in 8%; with this floor
    no setting of 2, 6 or 20 classes passes in more than 5%.
"""
Codes = npt.NDArray[np.int64]
"""(n,): the number of each document's group."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """Of an interval: its two-sided confidence, how a bootstrap resamples, and which documents
    belong together.
    """

    level: float
    resamples: int
    seed: int
    codes: Codes | None = None


_ItemsNeeded = Callable[[float, float], int | None]
"""Maps a margin and an assumed true difference to how many items would decide between them."""
_Found = tuple[Interval, _ItemsNeeded]


def answer_of(low: float, high: float, margin: float) -> str:
    """Return what an oriented interval says (the rule at the top of this file).

    All three are in the metric's own unit: a share of the base for bits per byte, a difference of
    shares for accuracies.
    """
    # Before `better`: a gain within the margin is too small to be called one.
    if -margin < low and high < margin:
        return "equal"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "undecided"


# -- one figure -----------------------------------------------------------------------------------


def _continuous(estimate: float, spread: Spread, settings: _Settings) -> _Found:
    def needed(margin: float, assumed: float) -> int | None:
        return statistics.items_for_power(
            spread, margin=margin, assumed=assumed, level=settings.level
        )

    return statistics.skewed_t_interval(estimate, spread, level=settings.level), needed


Summands = Callable[[Items], tuple[npt.NDArray[Any], npt.NDArray[Any]]]
"""Maps an arm's columns to what is summed, and what the sum is divided by, document by document."""


def _ratios(parts: Summands, quality: Quality, arm: Items, base: Items, how: _Settings) -> _Found:
    """Compare two ratios of sums, over groups where there are any."""
    (ours, den), (theirs, _) = parts(arm), parts(base)
    # Sums of groups take the place of documents; without groups this changes nothing.
    by_group = (clustered.summed(column, how.codes) for column in (ours, theirs, den))
    higher, spread = statistics.paired_ratio(*by_group, relative=quality.relative)
    # Bits per byte: lower is better, so the sign and the sides of the tail change places.
    if quality.direction < 0:
        higher, spread = -higher, spread.reversed()
    return _continuous(higher, spread, how)


def _shares(
    in_arm: npt.NDArray[np.bool_], in_base: npt.NDArray[np.bool_], how: _Settings
) -> _Found:
    """Compare the share of examples that are true."""
    if how.codes is not None:
        return _grouped_share(in_arm, in_base, how.codes, how)
    b, c, n = int((in_arm & ~in_base).sum()), int((in_base & ~in_arm).sum()), len(in_arm)

    def needed(margin: float, assumed: float) -> int | None:
        discordant = max(statistics.discordant_rate(b, c, n), abs(assumed))
        return statistics.binary_items_for_power(
            discordant, margin=margin, assumed=assumed, level=how.level
        )

    return Interval((b - c) / n, *statistics.tango_interval(b, c, n, level=how.level)), needed


def _grouped_share(
    in_arm: npt.NDArray[np.bool_], in_base: npt.NDArray[np.bool_], codes: Codes, settings: _Settings
) -> _Found:
    """Compare the shares of right items over groups. What decides is counted in groups."""
    interval, spread, (b, c, n) = clustered.paired_share(
        in_arm,
        in_base,
        codes,
        resamples=settings.resamples,
        seed=settings.seed,
        level=settings.level,
    )

    def needed(margin: float, assumed: float) -> int | None:
        linear = statistics.items_for_power(
            spread, margin=margin, assumed=assumed, level=settings.level
        )
        discordant = max(statistics.discordant_rate(b, c, n), abs(assumed))
        items = statistics.binary_items_for_power(
            discordant, margin=margin, assumed=assumed, level=settings.level
        )
        return (
            None
            if linear is None or items is None
            else max(linear, math.ceil(items * spread.n / n))
        )

    return interval, needed


def is_binary(values: npt.ArrayLike) -> bool:
    """Whether every score is 0 or 1; of any shape."""
    return bool(np.isin(values, (0, 1)).all())


def _macro_f1(arm: Items, base: Items, settings: _Settings) -> _Found:
    """Compare macro F1 over examples or groups: the outer ends of the bootstrap's interval and the
    linearised one's.
    """
    classes = np.unique(np.concatenate([arm["label"], arm["prediction"], base["prediction"]]))
    times, codes, rarest = None, settings.codes, rarest_class(arm, base)
    if codes is None:  # few kinds of items: counting them is as good as listing all, and quicker
        places = [
            np.searchsorted(classes, each)
            for each in (arm["label"], arm["prediction"], base["prediction"])
        ]
        shape = (len(classes),) * 3
        kinds, times = np.unique(np.ravel_multi_index(places, shape), return_counts=True)
        label, ours, theirs = (classes[each] for each in np.unravel_index(kinds, shape))
        arm, base = {"label": label, "prediction": ours}, {"label": label, "prediction": theirs}
    # (n, 2 * 3 * C)
    columns = np.concatenate([_f1_columns(items, classes) for items in (arm, base)], axis=1)
    columns = clustered.summed(columns, codes)

    def difference(sums: Floats) -> Floats:
        of_arm, of_base = np.split(sums, 2, axis=-1)
        return macro_f1(of_arm) - macro_f1(of_base)

    bca = statistics.bootstrap_sums(
        columns,
        difference,
        resamples=settings.resamples,
        seed=settings.seed,
        level=settings.level,
        times=times,
    )
    spread = statistics.sums_spread(columns, difference, times=times)
    linear, planned = _continuous(bca.estimate, spread, settings)

    def needed(margin: float, assumed: float) -> int | None:
        items = planned(margin, assumed)
        return (
            None
            if items is None or rarest[1] == 0
            else max(items, _until_floor(rarest[1], spread.n))
        )

    return Interval(bca.estimate, min(bca.low, linear.low), max(bca.high, linear.high)), needed


def rarest_class(arm: Items, base: Items) -> tuple[Any, int]:
    """Return the class with the fewest items, of those that are labelled or predicted, and how many
    it has.
    """
    classes = np.unique(np.concatenate([arm["label"], arm["prediction"], base["prediction"]]))
    counts = (arm["label"][:, None] == classes).sum(axis=0)
    rarest = int(np.argmin(counts))
    return classes[rarest].item(), int(counts[rarest])


_SHARE_ERRORS, _COUNT_ERRORS = 0.84, 1.28
"""Standard errors by which the rarest class is taken to be rarer, and to come out seldomer, when
planning.
"""


def _until_floor(rarest: int, n: int) -> int:
    """Return how many items (or groups) hold `MIN_CLASS_ITEMS` of the rarest class in 9 cases of
    10.

    Args:
        rarest: How many `n` items hold; 1 or more.
        n: Items (or groups).
    """
    if rarest >= MIN_CLASS_ITEMS:
        return n
    share = (rarest - _SHARE_ERRORS * math.sqrt(rarest)) / n
    # of x - 1.28 sqrt(x) = floor
    root = (_COUNT_ERRORS + math.sqrt(_COUNT_ERRORS**2 + 4 * MIN_CLASS_ITEMS)) / 2
    return math.ceil(root**2 / share)


def _f1_columns(items: Items, classes: npt.NDArray[Any]) -> Floats:
    """Return what every example adds to the counts of `macro_f1`: (n, 3C)."""
    labelled, predicted = (
        items["label"][:, None] == classes,
        items["prediction"][:, None] == classes,
    )
    return np.concatenate([labelled & predicted, labelled, predicted], axis=1).astype(np.float64)


def macro_f1(counts: Floats) -> Floats:
    """Return the mean F1 over the classes that occur as label or as prediction.

    Args:
        counts: (..., 3C): by class, examples labelled and predicted so; labelled so; predicted so.
    """
    hits, labelled, predicted = np.split(counts, 3, axis=-1)
    occurs = labelled + predicted > 0
    # F1 = 2 TP / (labelled + predicted). A class that occurs in neither is left out of the mean.
    f1 = np.divide(2 * hits, labelled + predicted, out=np.zeros_like(hits), where=occurs)
    return f1.sum(axis=-1) / occurs.sum(axis=-1)


def macro_f1_interval(
    label: npt.ArrayLike,
    prediction: npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
    level: float = LEVEL,
    codes: Codes | None = None,
) -> Interval:
    """Return one arm's macro F1 with its BCa interval over examples, or over groups.

    Args:
        label: (n,): true classes.
        prediction: (n,): predicted classes.
        resamples: Bootstrap resamples.
        seed: Of the resampling.
        level: Two-sided confidence.
        codes: (n,): the group of each example; None where each is a source of its own.
    """
    items = {"label": np.asarray(label), "prediction": np.asarray(prediction)}
    by_item = _f1_columns(items, np.unique(np.concatenate([items["label"], items["prediction"]])))
    columns = clustered.summed(by_item, codes)
    return statistics.bootstrap_sums(columns, macro_f1, resamples=resamples, seed=seed, level=level)


def summands(measure: Ratio | Mean) -> Summands:
    """Return what a mean or a ratio is made of."""
    if isinstance(measure, Ratio):
        return lambda items: (items[measure.num], items[measure.den])

    def values(items: Items) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        found = np.asarray(measure.per_example(*(items[name] for name in measure.columns)))
        return found, np.ones(len(found), dtype=np.int64)

    return values


def _compare(quality: Quality, arm: Items, base: Items, how: _Settings) -> _Found:
    """Return the oriented difference with its interval, and how many items decide.

    A mean is a share of examples where each is right or wrong, in both arms.
    """
    match quality.measure:
        case Share(column):
            assert quality.direction > 0, "arms are compared on the share of what is right"
            return _shares(arm[column].astype(bool), base[column].astype(bool), how)
        case MacroF1():
            return _macro_f1(arm, base, how)
        case Ratio() | Mean() as measure:
            parts = summands(measure)
            ours, theirs = parts(arm)[0], parts(base)[0]
            # Scores of 0 and 1 get Tango's interval, which holds its level for few disagreements.
            is_share = isinstance(measure, Mean) and quality.direction > 0 and not quality.relative
            if is_share and is_binary(ours) and is_binary(theirs):
                return _shares(ours.astype(bool), theirs.astype(bool), how)
            return _ratios(parts, quality, arm, base, how)


def _metrics(items: Items) -> dict[str, Quality]:
    """Return what such items are compared on, by key."""
    if "responses" in items:  # of an lm-eval task: every other column is a metric
        scores = [name for name in items if name not in ("digest", "responses", GROUP)]
        return {name: _score(name) for name in scores}
    return {quality.key: quality for quality in kind_of_columns(items).compared()}


def _read(quality: Quality) -> tuple[str, ...]:
    """Return the columns that a comparison reads: the metric's own, and what must be the same."""
    same = () if quality.same in (None, "digest") else (quality.same,)
    return tuple(dict.fromkeys((*quality.measure.columns, *same)))


def _score(name: str) -> Quality:
    """Return an lm-eval task's metric: the mean of scores."""
    return Quality(key=name, meaning="", measure=Mean((name,)), direction=1, same="digest")


def compared_keys(arm_items: Items, base_items: Items) -> tuple[str, ...]:
    """Return the quality keys that both arms carry the columns of."""
    both = set(arm_items) & set(base_items)
    return tuple(
        key for key, quality in _metrics(arm_items).items() if both.issuperset(_read(quality))
    )


# -- one comparison -------------------------------------------------------------------------------


def pair(arm_items: Items, base_items: Items) -> tuple[Items, Items]:
    """Return both arms' items of the documents they share, in the same order (by digest)."""
    # Both index arrays follow the sorted digests, which puts the arms into one order.
    _, in_arm, in_base = np.intersect1d(
        arm_items["digest"], base_items["digest"], return_indices=True
    )
    return _select(arm_items, in_arm), _select(base_items, in_base)


def _codes(arm: Items, base: Items) -> Codes | str | None:
    """Return the groups of paired documents, None where each is a source of its own, or why the two
    sides disagree.

    One side's groups speak for both where the other names none.
    """
    ours, theirs = (clustered.group_codes(items) for items in (arm, base))
    if GROUP in arm and GROUP in base and not _alike(ours, theirs):
        return "the arms put the same documents into other groups"
    return ours if GROUP in arm else theirs


def _alike(ours: Codes | None, theirs: Codes | None) -> bool:
    """Tell whether both are the same partition: groups are numbered as they occur."""
    return ours is theirs if ours is None or theirs is None else np.array_equal(ours, theirs)


def _select(items: Items, rows: npt.NDArray[Any]) -> Items:
    return {name: column[rows] for name, column in items.items()}


def _why_no_items(items: Items) -> str | None:
    """Return why a file of items cannot be paired with any other; None where it can."""
    if "digest" not in items:
        return "has no 'digest' per document"
    num_documents = len(items["digest"])
    if num_documents == 0:
        return "has no documents"
    if short := next(
        (name for name, column in items.items() if np.shape(column) != (num_documents,)), None
    ):
        return f"has {np.shape(items[short])} readings of {short!r} for {num_documents} documents"
    num_distinct = len(np.unique(items["digest"]))
    if num_distinct < num_documents:
        digests = how_many(num_distinct, "digest")
        return f"counts documents twice: {num_documents} readings of {digests}"
    return None


def _why_not(quality: Quality, arm: Items, base: Items, num_documents: int) -> str | None:
    """Return why paired items do not allow the comparison; None where they do."""
    num_paired, measure, same = len(arm["digest"]), quality.measure, quality.same or "digest"
    columns = _read(quality)
    if num_paired < PAIRED_SHARE * num_documents:
        return (
            f"only {num_paired} of {how_many(num_documents, 'document')}"
            f" {agreed(num_paired, 'was', 'were')} assessed in both arms"
        )
    for side, items in (("arm", arm), ("base", base)):
        missing = [name for name in columns if name not in items]
        if missing:
            return f"the {side} has no {missing[0]!r} per document"
        # logprob: the class ranked first looks sound where every logit is NaN
        readings = np.array(
            [items[name] for name in (*columns, "logprob") if name in items], dtype=np.float64
        )
        num_bad = int((~np.isfinite(readings)).any(axis=0).sum())
        if num_bad:
            documents = how_many(num_paired, "document")
            return f"the {side} has no finite reading of {num_bad} of {documents}"
    if not np.array_equal(arm[same], base[same]):
        return f"the arms count other {same} in the same documents"
    unknown = next((why for each in (arm, base) if (why := quality.why_unknown(each))), None)
    if unknown is not None:
        return unknown
    if not quality.relative or not isinstance(measure, Ratio | Mean):
        return None
    total = summands(measure)(base)[0].sum()
    nothing = f"the base's {measure.columns[0]} sum to 0 or less, which nothing compares to"
    return nothing if total <= 0 else None


def compare_items(
    key: str,
    arm_items: Items,
    base_items: Items,
    *,
    margin: float,
    min_documents: int = MIN_DOCUMENTS,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> ComparedQuality:
    """Compare two arms on one quality key, document by document.

    Args:
        key: One of `metrics.QUALITY_KEYS`; of an lm-eval task's items, the metric.
        arm_items: The arm's columns by name, each (n,). Language models: `digest`, `bits`, `bytes`,
            `tokens`, `correct` and perhaps `agree` (tokens); classifiers: `digest`, `label`,
            `prediction`, `correct` and perhaps `agree` (0/1) and `logprob`; lm-eval tasks:
            `digest`, `responses` (a digest of what was answered) and a score by metric. Documents
            are paired by `digest`, whatever their order. `group`, where it is there, names the
            source that a document shares with others.
        base_items: The base's.
        margin: Difference that still counts as equal: relative for bits per byte, absolute for the
            others.
        min_documents: Fewer are always `undecided`; where documents have groups, fewer groups.
        level: Two-sided confidence; each end is a one-sided bound at (1 + level) / 2.
        resamples: Bootstrap resamples (macro F1, and shares over groups, alone have any).
        seed: Of the resampling.

    Returns:
        A value with `ci` (two-sided, at `level`), `n` (documents paired), `groups` (that they form;
        None where each is a source of its own), `margin`, `answer` and `items_to_decide`: the
        documents in all, or groups where there are any, on which an undecided arm would be told, 4
        times in 5, not to be worse than the margin if it is no worse at all, or to be worse if it
        is as it looks now (`_items_to_decide`); None where that is known. `smallest_visible_damage`
        is the share of documents (groups) below which damage would not be in the sample.
        `why_undecided` says why there is no interval, or why it decides nothing. Null where the
        arms cannot be compared.
    """
    for side, items in (("arm", arm_items), ("base", base_items)):
        if why := _why_no_items(items):
            return _null(f"the {side} {why}", 0, margin)
    metrics = _metrics(arm_items)
    quality = metrics.get(key)
    if quality is None:
        return _null(f"{key} is not compared: read {' or '.join(metrics)}", 0, margin)
    arm, base = pair(arm_items, base_items)
    why = _why_not(quality, arm, base, max(len(arm_items["digest"]), len(base_items["digest"])))
    measure = quality.measure
    if why is None and isinstance(measure, Ratio):  # a document of one token has none to predict
        arm, base = (_select(each, each[measure.den] > 0) for each in (arm, base))
    num_paired, codes = len(arm["digest"]), _codes(arm, base)
    if why is None and isinstance(codes, str):
        why = codes
    if why is not None or isinstance(codes, str):
        return _null(why or "", num_paired, margin)
    groups = clustered.num_groups(codes)
    counted = num_paired if groups is None else groups
    if counted < 2:
        one = (
            how_many(num_paired, "document has", "documents have")
            if groups is None
            else how_many(num_paired, "document of one group has", "documents of one group have")
        )
        return _null(f"{one} no spread", num_paired, margin)
    interval, needed = _compare(quality, arm, base, _Settings(level, resamples, seed, codes))
    visible = statistics.smallest_visible_damage(counted, level=level)
    # Equal in every recorded column, not only in the one compared: the same model twice.
    one_model = _agree(arm, base, tuple(arm))
    # Two different models that agree by chance: no spread is no proof of equality.
    if interval.low == interval.high and _agree(arm, base, _read(quality)) and not one_model:
        why = (
            f"both arms read the same on all {num_paired} documents, so that resampling them shows"
            " no spread"
        )
        blind = _without_interval(interval.estimate, num_paired, margin, why)
        return {**blind, "groups": groups, "smallest_visible_damage": visible}
    items = _items_to_decide(needed, interval, counted, margin, min_documents)
    compared = _compared(interval, num_paired, counted, margin, min_documents, items)
    read: ComparedQuality = {**compared, "groups": groups, "smallest_visible_damage": visible}
    if isinstance(measure, MacroF1) and not one_model:
        return _unless_too_few_of_a_class(read, arm, base, counted)
    return read


def _unless_too_few_of_a_class(
    read: ComparedQuality, arm: Items, base: Items, counted: int
) -> ComparedQuality:
    """Return a comparison of macro F1, undecided where the rarest class has too few items, with how
    many would do.
    """
    name, have = rarest_class(arm, base)
    if have >= MIN_CLASS_ITEMS:
        return read
    why = (
        f"class {name}, the rarest, has {have} of the {MIN_CLASS_ITEMS} items that macro F1 needs"
        " to be decided"
    )
    return {
        **read,
        "answer": "undecided",
        "why_undecided": why,
        "items_to_decide": _until_floor(have, counted) if have else None,
    }


def _items_to_decide(
    needed: _ItemsNeeded, interval: Interval, n: int, margin: float, least: int
) -> int:
    """Return how many items would decide an undecided comparison; 0 where its lower end is known to
    clear -margin.

    Planned for an arm that is no worse; for what the estimate says where that contradicts it: where
    it lies below -margin, or where these items should already have been enough. An end that fewer
    items than `least` show is not known: few of them look clear by chance, and so many need not be
    enough the next time.
    """
    if n < least and margin > 0 and interval.estimate >= -margin:
        return max(least, needed(margin, 0.0) or 0)
    if margin <= 0 or interval.low > -margin or interval.high < -margin:
        return 0
    if interval.estimate >= -margin and (items := needed(margin, 0.0)) is not None and items > n:
        return items
    return needed(margin, interval.estimate) or 0


def _agree(arm: Items, base: Items, columns: Sequence[str]) -> bool:
    """Tell whether the arms agree on every document; in all that is recorded, to the bit, they are
    one model.
    """
    return all(np.array_equal(arm[name], base[name]) for name in columns if name in base)


def _without_interval(estimate: float, n: int, margin: float, why: str) -> ComparedQuality:
    return {**_undecided(Value(estimate, Provenance.DERIVED), n, margin), "why_undecided": why}


def _null(why: str, n: int, margin: float) -> ComparedQuality:
    return _undecided(null(why), n, margin)


def _undecided(value: Value, n: int, margin: float) -> ComparedQuality:
    return {
        **value.to_json(),
        "ci": None,
        "n": n,
        "margin": margin,
        "answer": "undecided",
        "items_to_decide": None,
    }


def _compared(
    interval: Interval, n: int, counted: int, margin: float, min_documents: int, items: int
) -> ComparedQuality:
    """Return the answer; `counted` are the documents or groups that it rests on."""
    answer = (
        answer_of(interval.low, interval.high, margin) if counted >= min_documents else "undecided"
    )
    items = max(items, min_documents)
    return {
        **Value(interval.estimate, Provenance.DERIVED).to_json(),
        "ci": [interval.low, interval.high],
        "n": n,
        "margin": margin,
        "answer": answer,
        "items_to_decide": items if answer in ("undecided", "worse") and items > counted else None,
    }


def _counted(result: ComparedQuality) -> int:
    """Return what a comparison's interval rests on: groups where documents have any, else
    documents.
    """
    groups = result.get("groups")
    return result["n"] if groups is None else groups


def combine_seeds(
    per_seed: Sequence[ComparedQuality], *, is_share: bool, min_documents: int = MIN_DOCUMENTS
) -> ComparedQuality:
    """Return the mean of one key's comparison over seeds, with a t interval (seeds are the pairs).

    It speaks of the recipe on these documents: what other seeds would give. Three seeds usually
    decide nothing.

    Args:
        per_seed: Results of `compare_items`, arm and base of the same seed each.
        is_share: Whether the figure is a difference of shares, which lies between -1 and 1.
        min_documents: A seed with fewer leaves the whole `undecided`.

    Returns:
        The same form with `n` the number of seeds; with one seed, that seed's result as it is.
    """
    if len(per_seed) == 1:
        return {**per_seed[0]}
    margin = per_seed[0]["margin"]
    assert all(result["margin"] == margin for result in per_seed), "one margin for all seeds"
    mean = derive(
        lambda *deltas: float(np.mean(deltas)), *(Value.from_json(result) for result in per_seed)
    )
    if mean.value is None:
        num_null = sum(result["value"] is None for result in per_seed)
        return _null(
            f"{num_null} of {len(per_seed)} seeds: {mean.why_missing}", len(per_seed), margin
        )
    interval = statistics.mean_interval(
        [result["value"] for result in per_seed if result["value"] is not None]
    )
    if (
        is_share
        and interval.low == interval.high
        and not all(result["answer"] == "equal" for result in per_seed)
    ):
        why = f"all {len(per_seed)} seeds read the same, which shows no spread"
        return _without_interval(interval.estimate, len(per_seed), margin, why)
    interval = (
        # A t interval of few seeds may reach beyond what a difference of shares can be.
        Interval(interval.estimate, max(interval.low, -1.0), min(interval.high, 1.0))
        if is_share
        else interval
    )
    answer = answer_of(interval.low, interval.high, margin)
    if any(_counted(result) < min_documents or result.get("why_undecided") for result in per_seed):
        answer = "undecided"
    return {
        **mean.to_json(),
        "ci": [interval.low, interval.high],
        "n": len(per_seed),
        "margin": margin,
        "answer": answer,
        "items_to_decide": None,
    }
