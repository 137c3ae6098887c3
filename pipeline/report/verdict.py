"""A release's verdict in words: the one line that stands first everywhere, and the section a
reviewer reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from pipeline.errors import one_line
from pipeline.ledger.devices.table import is_gpu
from pipeline.ledger.metrics import DIRECTION, RELATIVE, TASK
from pipeline.ledger.numbers import agreed, count, duration, how_many
from pipeline.ledger.shapes import (
    Conclusion,
    CriterionRecord,
    Judgement,
    NoVerdict,
    ShownVerdict,
    SideRecord,
)
from pipeline.report.blocks import Block, Bullets, Prose, Table
from pipeline.report.history import look_words
from pipeline.report.text import markdown_text

Ended: TypeAlias = ShownVerdict | NoVerdict
"""What verdict.json holds of a gate, or result.json: a verdict, or that it came to none."""
GAP = "  "
MOST_DECIMALS = 12
DECIDED = "That is decided: the same command again gives this verdict, and measures nothing."
WORDS = {
    "PASS": "passes",
    "FAIL": "fails",
    "INCONCLUSIVE": "is not decided",
    "INVALID": "cannot be judged",
}
SENSE = (
    "Positive is better or cheaper for the candidate. Each end of an interval is a one-sided bound"
    " at the policy's alpha, which the looks at serving and energy share."
)
_TWO_NUMBERS = re.compile(r"\\\[([-+]?[0-9.]+, [-+]?[0-9.]+)\\\](?= vs |$)")
SAVINGS = ("training", "serving", "memory", "energy")


def verdict_line(verdict: Judgement) -> str:
    """Return the verdict in one line: what serving costs, what quality lost against its margin,
    when it pays back.

    Costs are changes (negative is cheaper); quality is positive where the candidate is better.
    """
    parts = [verdict["verdict"]]
    by_name = {each["name"]: each for each in verdict["criteria"]}
    if "serving" in by_name:
        parts.append(_serving(by_name["serving"], verdict))
    first = next(
        (each for each in verdict["criteria"] if each["name"].startswith("quality/")), None
    )
    if first is not None:
        parts.append(_quality(first))
    if "payback" in by_name:
        parts.append(_payback(by_name["payback"], verdict))
    if verdict["why"]:
        parts.append(one_line(verdict["why"], 200))
    behind = [
        one_line(each["name"], 80)
        for each in verdict["criteria"]
        if each["gating"] and each["outcome"] == verdict["verdict"]
    ]
    if behind and verdict["verdict"] != "PASS":
        parts.append(f"because of {', '.join(behind)}")
    parts.append(f"policy {one_line(verdict['policy']['name'], 40)}")
    return GAP.join(parts)


def shown_line(verdict: Ended) -> str:
    """Return the line that a verdict carries, on one line whatever is in it, with the gaps between
    its parts.
    """
    return GAP.join(one_line(part) for part in str(verdict["line"]).split(GAP))


def markdown_line(verdict: Ended) -> str:
    """Return the line as a report begins with it: Markdown, and as it is read where nothing in it
    is Markdown's.

    Brackets around two numbers stay plain: they make a link only before another bracket, and a
    report defines none.
    """
    parts = (markdown_text(part, 400) for part in str(verdict["line"]).split(GAP))
    return GAP.join(_TWO_NUMBERS.sub(r"[\1]", part) for part in parts)


def trouble(verdict: Ended) -> str | None:
    """Return what came in between where a run did not end as its verdict says: a champion not
    moved, a crash.
    """
    end = verdict.get("end")
    if end is None or end["exit_code"] == verdict["exit_code"]:
        return None
    why = (verdict.get("promotion") or {}).get("why")
    return (
        f"not promoted: {one_line(why)}" if why else one_line(end["why"] or "the run did not end")
    )


def end_code(verdict: Ended) -> int:
    """Return the exit code of the run; the verdict's own unless something came in between."""
    end = verdict.get("end")
    return verdict["exit_code"] if end is None else end["exit_code"]


def _serving(criterion: CriterionRecord, verdict: Judgement) -> str:
    device = "GPU-s" if is_gpu(verdict["device"]["kind"]) else "device-s"
    what = f"{device}/1k {verdict['unit']}s"
    saving = criterion["value"]["value"]
    if saving is None:
        return f"{what} unknown"
    decimals = _decimals(criterion)
    return f"{_signed(-saving, decimals)}% {what}{_ends(criterion['ci'], decimals, turned=True)}"


def _quality(criterion: CriterionRecord) -> str:
    key = criterion["name"].removeprefix("quality/")
    symbol, name = ("%" if key in RELATIVE else " pt"), one_line(key.replace("_", " "), 80)
    if not key.startswith(TASK) and DIRECTION[key] < 0:
        name = f"quality ({name})"
    if criterion["value"]["value"] is None:
        return f"{name} unknown"
    decimals = _decimals(criterion)
    delta = _signed(criterion["value"]["value"], decimals)
    margin = _exact(criterion["threshold"] or 0.0)
    return (
        f"{name} {delta}{symbol}{_ends(criterion['ci'], decimals)} vs margin"
        f" {margin}{_unseen(criterion)}"
    )


def _unseen(criterion: CriterionRecord) -> str:
    """Return, for the verdict's line, which damage a PASS cannot have seen."""
    words = unseen_words(criterion) if criterion["outcome"] == "PASS" else None
    return "" if words is None else f" ({words})"


def _decimals(criterion: CriterionRecord) -> int:
    """Return the decimals of percentages at which value and ends read on the side of the threshold
    that they are on.
    """
    value, threshold = criterion["value"]["value"], criterion["threshold"] or 0.0
    shares = [*(criterion["ci"] or ()), *([] if value is None else [value])]
    limit = float(_exact(threshold))
    for decimals in range(len(_exact(threshold).partition(".")[2]), MOST_DECIMALS):
        if all(
            _side_of(round(100 * share, decimals), limit) == _side_of(share, threshold)
            for share in shares
        ):
            return decimals
    return MOST_DECIMALS


def _side_of(x: float, limit: float) -> int:
    return (x > limit) - (x < limit)


def _exact(share: float) -> str:
    """Return a threshold in per cent as the policy states it, however many decimals that takes:
    `-1.0`, `+0.25`.
    """
    text = f"{100 * share:+.10f}".rstrip("0")
    text = text + "0" if text.endswith(".") else text
    return text.lstrip("+-") if float(text) == 0 else text


def _signed(share: float, decimals: int) -> str:
    """Return a share in per cent with its sign; what rounds to nothing has none."""
    text = f"{100 * share:+.{decimals}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def _ends(ci: list[float] | None, decimals: int, *, turned: bool = False) -> str:
    if ci is None:
        return ""
    low, high = (-ci[1], -ci[0]) if turned else ci
    return f" [{_signed(low, decimals)}, {_signed(high, decimals)}]"


def _payback(criterion: CriterionRecord, verdict: Judgement) -> str:
    units = criterion["value"]["value"]
    if units is None:
        never = str(criterion["value"]["why_missing"]).startswith("never")
        return "never pays back" if never else "payback unknown"
    return (
        "pays back at once"
        if units == 0
        else f"pays back after {how_many(count(units), verdict['unit'])}"
    )


# -- the conclusion, and the section of the report ------------------------------------------------


def release_conclusion(verdict: ShownVerdict) -> Conclusion:
    """Return what a release check says: its answer, then a sentence per criterion that was asked
    for, and what to do next.
    """
    if verdict["verdict"] == "NO_BASELINE":
        why = f"Nothing was compared: {one_line(verdict['why'])}."
        return {"verdict": why, "answers": _promoted(verdict)}
    asked = [each for each in verdict["criteria"] if each["gating"]]
    behind = [_title(each) for each in asked if each["outcome"] == verdict["verdict"]]
    on = f" on {', '.join(behind)}" if behind and verdict["verdict"] != "PASS" else ""
    criteria = (criterion_words(each) for each in asked)
    return {
        "verdict": f"The candidate {WORDS[verdict['verdict']]}{on}.",
        "answers": [*(f"{text[:1].upper()}{text[1:]}." for text in criteria), *_next(verdict)],
    }


def criterion_words(criterion: CriterionRecord) -> str:
    """Return what a criterion came to, with its reading and what speaks against it."""
    return f"{_title(criterion)} {WORDS[criterion['outcome']]}{_because(criterion)}"


def _title(criterion: CriterionRecord) -> str:
    return one_line(criterion["name"].removeprefix("quality/").replace("_", " "), 80)


def _because(criterion: CriterionRecord) -> str:
    reading = _reading(criterion)
    why = (
        f": {one_line(criterion['why'])}"
        if criterion["why"] and criterion["outcome"] in ("INVALID", "FAIL")
        else ""
    )
    if criterion["outcome"] == "INCONCLUSIVE":
        why = f" ({one_line(criterion['why'])})" if criterion["why"] else ""
        why += f", {needed_words(criterion)}" if criterion["needed"] else ""
    limit = _limit(criterion)
    asked = "" if limit == "-" else f" against {limit}"
    return f" at {reading}{asked}{why}" if reading != "-" else why


def needed_words(criterion: Mapping[str, Any], needed: int | None = None) -> str:
    """Return how many items would decide, and what that means where the test split has fewer, or
    has not been read.

    Args:
        criterion: A criterion, or a comparison of one quality: `n`, `groups`, `available`.
        needed: Items that would decide; None: the criterion's own `needed`.
    """
    number: int = criterion["needed"] if needed is None else needed
    groups, split = criterion.get("groups"), criterion.get("available")
    what = ("item", "items") if groups is None else ("group of items", "groups of items")
    said = f"{how_many(number, *what)} would decide"
    if split is None:
        return said
    if number > split:
        return f"{said}, and the test split has only {split}: more test data is needed"
    read = criterion["n"] if groups is None else groups
    return (
        said
        if split <= read
        else f"{said}: the test split has {split}, of which {read}"
        f" {agreed(read, 'was', 'were')} read"
    )


def unseen_words(criterion: Mapping[str, Any]) -> str | None:
    """Return which damage is too rare for these documents to show, or None where no sample was
    read.
    """
    share = criterion.get("smallest_visible_damage")
    if share is None:
        return None
    what = "documents" if criterion.get("groups") is None else "groups of documents"
    return f"damage in fewer than 1 of {math.floor(1 / share)} {what} would not be seen"


def _next(verdict: ShownVerdict) -> list[str]:
    """Return what became of the champion, and what the next invocation would do."""
    if recorded := verdict.get("recorded"):
        again = (
            f"This is the verdict of run {one_line(recorded)}, given again: nothing was"
            " measured anew."
        )
        return [again, *_promoted(verdict)]
    names = {
        each["name"]
        for each in verdict["criteria"]
        if each["gating"] and each["outcome"] == "INCONCLUSIVE"
    }
    if verdict["verdict"] == "INVALID":
        return [
            "Remove the cause and run the same command again: an INVALID run does not count as an"
            " interim analysis."
        ]
    if verdict["verdict"] != "INCONCLUSIVE":
        return _promoted(verdict)
    if names & {"serving", "energy", "payback"} and verdict["look"] < verdict["looks"]:
        return [
            f"Look {verdict['look']} of {verdict['looks']}: the same command again measures as many"
            " blocks more."
        ]
    return [f"No further look would help: give {_what_would_decide(names)}."]


def _what_would_decide(undecided: Collection[str]) -> str:
    """Return what to give where the looks are used up, by the criteria that are undecided."""
    ways = [
        ("more test data", any(name.startswith("quality/") for name in undecided)),
        ("a policy with more policy.blocks", bool({"serving", "energy", "payback"} & {*undecided})),
        ("repeated runs of one training (selftest train=...)", "training" in undecided),
        ("another candidate", True),
    ]
    *first, last = [way for way, is_fit in ways if is_fit]
    return f"{', '.join(first)}, or {last}" if first else last


def _reading(criterion: CriterionRecord) -> str:
    """Return value and interval of a criterion, in its own sense (positive is better), or `-`."""
    value = criterion["value"]["value"]
    if value is None:
        return "-"
    if criterion["name"] == "payback":
        return how_many(count(value), str(criterion["unit"]))
    symbol = "%" if _is_share_of_base(criterion["name"]) else " pt"
    decimals = _decimals(criterion)
    return f"{_signed(value, decimals)}{symbol}{_ends(criterion['ci'], decimals)}"


def _is_share_of_base(name: str) -> bool:
    return name in SAVINGS or name.removeprefix("quality/") in RELATIVE


INDEPENDENT = (
    "Documents are taken as independent of one another. Where several come from one source (pages"
    " of a document, turns of a user), name the field that tells which as data.group_field:"
    " intervals are too narrow otherwise."
)


def _assumed(criteria: Sequence[CriterionRecord]) -> list[Block]:
    """Return the assumption that intervals over documents rest on, where no groups are known."""
    read = [
        each for each in criteria if each["name"].startswith("quality/") and each["ci"] is not None
    ]
    return [Prose(INDEPENDENT)] if read and all(each.get("groups") is None for each in read) else []


def verdict_blocks(verdict: ShownVerdict) -> list[Block]:
    """Return what a reviewer reads: criteria, both sides, what comes next."""
    head = ("criterion", "outcome", "reading", "threshold", "n", "asked for", "note")
    named = {"candidate": verdict["candidate"], "baseline": verdict["baseline"]}
    decided = verdict["verdict"] in ("PASS", "FAIL") and not verdict.get("recorded")
    criteria = verdict["criteria"]
    facts = [
        *(_side(name, side) for name, side in named.items() if side is not None),
        f"policy {verdict['policy']['name']} ({verdict['policy']['sha256'][:8]}), "
        f"{look_words(verdict)} of {verdict['looks']}",
        *_next(verdict),
        *([DECIDED] if decided else []),
    ]
    table = [Table(head, [_cells(each) for each in criteria]), Prose(SENSE), *_assumed(criteria)]
    return [*(table if criteria else []), Bullets(facts)]


def counted_words(criterion: Mapping[str, Any]) -> str:
    """Return what a reading rests on: `400`, or `4000 in 400 groups`."""
    if criterion.get("n") is None:
        return "-"
    groups = criterion.get("groups")
    return (
        str(criterion["n"])
        if groups is None
        else f"{criterion['n']} in {how_many(groups, 'group')}"
    )


def _limit(criterion: CriterionRecord) -> str:
    """Return the threshold that a policy asks for, or `-`."""
    threshold = criterion["threshold"]
    if threshold is None or not criterion["gating"]:
        return "-"
    if criterion["name"] == "payback":
        return how_many(count(threshold), str(criterion["unit"]))
    return _exact(threshold) + ("%" if _is_share_of_base(criterion["name"]) else " pt")


def _cells(criterion: CriterionRecord) -> list[str]:
    note = [
        criterion["why"] or "",
        needed_words(criterion) if criterion["needed"] else "",
        unseen_words(criterion) or "",
    ]
    return [
        _title(criterion),
        criterion["outcome"],
        _reading(criterion),
        _limit(criterion),
        counted_words(criterion),
        "yes" if criterion["gating"] else "shown only",
        "; ".join(text for text in note if text),
    ]


def _side(name: str, side: SideRecord) -> str:
    version = f", version {side['version']} of {side['model']}" if side["version"] else ""
    hours = (side["charge"] or {}).get("work_device_hours")
    cost = ", no ledger" if hours is None else f", took {duration(3600 * hours)} of device time"
    return f"{name}: {side['reference']}, artifact {side['digest']}{version}{cost}"


def _promoted(verdict: ShownVerdict) -> list[str]:
    promotion = verdict.get("promotion")
    if promotion is None:
        return []
    if promotion["done"]:
        return [
            f"{one_line(promotion['model'])} version {one_line(promotion['version'])} is champion"
            " now."
        ]
    return [f"Not promoted: {one_line(promotion['why'])}."]
