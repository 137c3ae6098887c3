"""Figures of a comparison as phrases of an English sentence, true to their sign, interval and
margin.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.compare import figures, statistics
from pipeline.errors import one_line
from pipeline.ledger.metrics import RELATIVE
from pipeline.ledger.numbers import count, how_many, percent, points, times
from pipeline.ledger.shapes import Speedup
from pipeline.report.view import Value, straddles
from pipeline.tasks.table import QUALITIES

QUALITY_WORDS = {key: quality.words or key for key, quality in QUALITIES.items()} | {
    "worst_slice": "loss of the worst slice"
}
ARM_INTERVAL = f"{percent(figures.LEVEL)} interval"
"""Of one arm's quality."""
PAIR_INTERVAL = f"{percent(statistics.LEVEL)} interval"
"""Of a comparison."""
CHEAPER_AS_RATIO = 0.5
"""Serving savings from here on read better as a ratio: `3.4x cheaper`."""


def answer(quality: Value) -> str:
    """Return a comparison's answer; without one, undecided where the interval is missing or holds
    both signs.
    """
    if "answer" in quality:
        return quality["answer"]
    if quality["ci"] is None or straddles(quality):
        return "undecided"
    return "better" if quality["value"] > 0 else "worse"


def quality_verb(key: str, quality: Value) -> str:
    """Say how an arm's quality compares with its base's."""
    if answer(quality) == "equal":
        return f"keeps the quality within {margin(key, quality)} ({signed(key, quality['value'])})"
    if answer(quality) == "undecided":
        return f"is undecided in quality ({evidence(key, quality)})"
    return difference(key, quality["value"])


def difference(key: str, advantage: float) -> str:
    """Return a verb phrase for an arm that is better by `advantage` (worse where negative): `needs
    2.1% more ...`.

    Args:
        key: A quality key; differences of `RELATIVE` ones are fractions of the base, others those
            of shares.
        advantage: Oriented so that higher is better.
    """
    is_better = advantage > 0
    verb = "has"
    if QUALITIES[key].counted:
        verb = "reaches" if is_better else "needs"
    return f"{verb} {amount(key, advantage)} {compared_word(key, advantage)} {QUALITY_WORDS[key]}"


def compared_word(key: str, advantage: float) -> str:
    """Return `fewer` or `more` of what is counted, else `lower` or `higher`."""
    lower, higher = ("fewer", "more") if QUALITIES[key].counted else ("lower", "higher")
    return lower if (advantage > 0) == (QUALITIES[key].direction < 0) else higher


def amount(key: str, advantage: float) -> str:
    """Return the size of a difference: `2.1%`, or `1.2 points` for shares."""
    if key in RELATIVE:
        return percent(abs(advantage))
    text = points(abs(advantage))
    return how_many(text, "point")


def signed(key: str, advantage: float) -> str:
    """Return an oriented difference with its sign, for brackets: `+0.4%`."""
    return (
        percent(advantage, sign=True)
        if key in RELATIVE
        else f"{points(advantage, sign=True)} points"
    )


def margin(key: str, quality: Value) -> str:
    """Return the margin within which two arms count as equal, in words."""
    return (
        f"the margin of {amount(key, quality['margin'])}" if "margin" in quality else "the margin"
    )


def evidence(key: str, quality: Value) -> str:
    """Return what an undecided quality rests on: difference, interval, margin, and how many
    documents would decide.
    """
    ending = f", margin {amount(key, quality['margin'])}" if "margin" in quality else ""
    if needed := quality.get("items_to_decide"):
        ending += (
            f", {rests_on(quality)} where {count(needed)} might"
            f" decide{_of_the_split(quality, needed)}"
        )
    spread = quality.get("why_undecided") or interval(quality, in_points=key not in RELATIVE)
    return f"quality {signed(key, quality['value'])}, {spread}{ending}"


def rests_on(quality: Value) -> str:
    """Return what a quality's interval rests on: test documents, or groups of them."""
    groups = quality.get("groups")
    return (
        how_many(quality.get("n") or "the", "test document")
        if groups is None
        else how_many(groups, "group of test documents", "groups of test documents")
    )


def _of_the_split(quality: Value, needed: int) -> str:
    """Say where the test split has fewer documents than would decide."""
    split = quality.get("available")
    return f" and the split has only {count(split)}" if split is not None and needed > split else ""


def interval(value: Value, *, in_points: bool = False) -> str:
    """Return the interval of a comparison's figure: `90% interval -1.8% to +1.0%`."""
    if value["ci"] is None:
        return "no interval"
    low, high = ((points if in_points else percent)(bound, sign=True) for bound in value["ci"])
    return f"{PAIR_INTERVAL} {low} to {high}{' points' if in_points else ''}"


_AS_GOOD = "as good on validation (within the margin)"


def training_verb(saving: Value, charged_too: Sequence[str] = ()) -> str:
    """Say what an arm's training cost against its base's, and which other stages (a teacher) are
    charged with it.

    What is equal there is the metric on validation, within the margin; the test split has clauses
    of its own.
    """
    v = saving["value"]
    included = f", {' and '.join(charged_too)} included" if charged_too else ""
    if straddles(saving):
        return _undecided(f"training cost{included}", saving)
    if v > 0:
        return f"is {_AS_GOOD} for {percent(v)} fewer device-hours{included}{_basis(saving)}"
    if v == 0:
        return f"is {_AS_GOOD} for the same device-hours{included}{_basis(saving)}"
    more = f"{percent(-v)} more" if v > -1 else f"{times(1 - v)} as many"
    return f"costs {more} device-hours to be {_AS_GOOD}{included}{_basis(saving)}"


def serving_verb(saving: Value) -> str:
    """Say what an arm costs to serve against its base."""
    v = saving["value"]
    if straddles(saving):
        return _undecided("serving cost", saving)
    if moved := saving.get("disturbed"):
        return (
            f"{_undisturbed(v, saving)} (read on a disturbed machine: {one_line('; '.join(moved))})"
        )
    return _undisturbed(v, saving)


def _undisturbed(v: float, saving: Value) -> str:
    if v > 0:
        return (
            f"serves {times(1 / (1 - v)) if v >= CHEAPER_AS_RATIO else percent(v)}"
            f" cheaper{_basis(saving)}"
        )
    if v == 0:
        return f"serves at the same cost{_basis(saving)}"
    return (
        f"costs {f'{percent(-v)} more' if v > -1 else f'{times(1 - v)} as much'} to"
        f" serve{_basis(saving)}"
    )


def memory_verbs(speedup: Speedup | None) -> list[str]:
    """Say what a quantized arm's memory is against its source's; nothing where that is not
    judged.
    """
    if speedup is None or speedup["memory"]["value"] is None:
        return []
    v, what = (
        speedup["memory"]["value"],
        {"peak_bytes": "memory", "weights_bytes": "memory for weights"},
    )
    said = f"needs {percent(abs(v))} {'less' if v >= 0 else 'more'} {what[speedup['memory']['of']]}"
    return [
        said + (" (no speedup: neither time nor memory is saved)" if speedup["no_speedup"] else "")
    ]


def _undecided(what: str, saving: Value) -> str:
    return (
        f"is undecided in {what} (saving {percent(saving['value'], sign=True)}, {interval(saving)})"
    )


def _basis(saving: Value) -> str:
    return "" if saving["ci"] is not None else " (point estimate, no interval)"


def never_pays(payback: Value) -> bool:
    """Tell whether the figure is null because the arm is not cheaper, which is an answer."""
    return payback["value"] is None and payback["why_missing"].startswith("never")


def payback_verb(payback: Value, serving: Value | None) -> str:
    """Say when an arm has paid for itself; a payback that rests on an undecided saving is said
    to.
    """
    if never_pays(payback) and serving is not None and straddles(serving):
        return "would not pay back if the point estimate of its saving held"
    if never_pays(payback):
        return (
            "never pays back"
            f" ({one_line(payback['why_missing']).partition(':')[2].strip() or 'not cheaper'})"
        )
    units = how_many(count(payback["value"]), payback["unit"])
    if serving is not None and straddles(serving):
        return f"would pay back after {units} if the point estimate of its saving held"
    if payback["value"] == 0:
        return f"pays back from the first {payback['unit']}"
    return f"has paid for itself after {units}"
