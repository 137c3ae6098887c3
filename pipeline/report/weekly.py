"""One page on what a period's GPU time went to: spent against budget, waste by cause, how good
forecasts were, what gates said, savings over releases. `ledger/weekly.py` has the arithmetic.

It is to be read in a minute, so lists are cut, and what was cut is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import one_line
from pipeline.ledger.numbers import agreed, how_many, percent, significant
from pipeline.ledger.shapes import ReleaseRecord, VerdictHistory
from pipeline.ledger.weekly import (
    NOT_TOLD,
    Declared,
    Foreseen,
    Loss,
    OwnBudgets,
    Spent,
    by_device,
    together,
)
from pipeline.report.blocks import (
    Block,
    Bullets,
    Figure,
    Interval,
    Intervals,
    Prose,
    Section,
    Table,
    bullets,
)
from pipeline.report.history import HEAD, NO_MODEL, alarms, cells
from pipeline.report.money import money
from pipeline.report.page import Head
from pipeline.report.text import pad, wrap
from pipeline.report.waste import first_thing

MOST_GROUPS = 6
MOST_CAUSES = 5
MOST_RELEASES = 6
MOST_CHARTS = 2
LAST = 10
"""Releases of a model that its chart shows."""
SHOWN = 5  # names in a sentence
WIDTH = 80
ALL = "all"
NOTHING = "No run spent anything in this period."
NO_BUDGET = "No budget is declared, neither by --budget nor by a run (budget.device_hours)."
_CHART_NAMES = ("savings", "savings-other")
_NAME = 60  # characters of a name


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """What is known of a period.

    Attributes:
        first: Its first day (UTC), as 2026-11-01; `until` is the day after its last one.
        by: What groups are by.
        budget_h: Device-hours that all may spend in it; None: not declared.
        budgets_h: The same by group.
        own: What runs declared themselves.
        histories: Of every model that was judged before the period's end, all releases.
        notes: What has to be said of what was read.
    """

    first: str
    until: str
    by: str
    spent: Sequence[Spent]
    budget_h: float | None = None
    budgets_h: Mapping[str, float] = field(default_factory=dict[str, float])
    own: Declared = field(default_factory=Declared)
    losses: Sequence[Loss] = ()
    foreseen: Foreseen | None = None
    histories: Sequence[VerdictHistory] = ()
    notes: Sequence[str] = ()

    @property
    def spending(self) -> list[Spent]:
        """What was spent, without those who only reused."""
        return [each for each in self.spent if each.device_h > 0]

    @property
    def devices(self) -> list[Spent]:
        """What was spent on each device model."""
        return by_device(self.spending, ALL)


def page_of(period: Period) -> tuple[Head, list[Section]]:
    """Return the page: its head, and the sections."""
    badge, mood, said = _against_budget(period)
    head = Head(
        title=f"GPU time from {period.first} until before {period.until}",
        kind=f"GPU time from {period.first} until before {period.until} (UTC), by {period.by}",
        badge=badge,
        mood=mood,
        verdict=f"{_spent_words(period)} {said}".strip(),
        is_dense=True,
        footer="Read from MLflow alone. Hours of different device models, and money of different"
        " currencies, are never added.",
    )
    sections = (
        Section("spent", "Spent against budget", _spent(period), True),
        Section("waste", "Waste by cause", _waste(period), True),
        Section("forecasts", "Forecasts", _forecasts(period.foreseen), True),
        Section("verdicts", "Gate verdicts", _verdicts(period), True),
        Section("savings", "Savings over releases", _savings(period.histories), True),
        Section("notes", "Notes", bullets(_notes(period)), True),
    )
    return head, [section for section in sections if section.blocks]


# -- spent against budget -------------------------------------------------------------------------


def _spent_words(period: Period) -> str:
    parts = [
        f"{_h(each.device_h)} device-hours on {_name(each.device)} in"
        f" {how_many(len(each.runs), 'run')}"
        for each in period.devices
    ]
    return f"{'; '.join(parts)}." if parts else NOTHING


def _against_budget(period: Period) -> tuple[str, str, str]:
    """Return badge, mood and sentence on what was spent against what was allowed."""
    if period.budget_h is not None:
        return _against_total(period, period.budget_h)
    if period.budgets_h:
        return _against_groups(period)
    own = {each.device: period.own.of(each.device) for each in period.devices}
    said = [
        f"{f'On {_name(device)} ' if len(own) > 1 else ''}{_own_words(each)}."
        for device, each in own.items()
        if each.num
    ]
    if not said and period.own.num_mixed:
        return "NOT COMPARED", "undecided", "No budget that a run declared can be compared."
    if not said:
        return "NO BUDGET", "undecided", NO_BUDGET
    over = any(each.spent_h > each.allowed_h for each in own.values() if each.num)
    return (*_answer(over=over), " ".join(said))


def _answer(*, over: bool) -> tuple[str, str]:
    return ("OVER BUDGET", "bad") if over else ("WITHIN BUDGET", "good")


def _against_total(period: Period, allowed_h: float) -> tuple[str, str, str]:
    devices = period.devices
    if len(devices) > 1:
        why = (
            f"The budget of {_h(allowed_h)} device-hours is not compared: hours of"
            f" {len(devices)} device models are not added."
        )
        return "NOT COMPARED", "undecided", why
    hours = devices[0].device_h if devices else 0.0
    return (*_answer(over=hours > allowed_h), f"{_of(hours, allowed_h)} allowed device-hours.")


def _against_groups(period: Period) -> tuple[str, str, str]:
    over: list[str] = []
    apart: list[str] = []
    silent: list[str] = []
    for group, allowed_h in period.budgets_h.items():
        own = [each for each in period.spending if each.group == group]
        if not own:
            silent.append(group)
        if len(own) > 1:
            apart.append(group)
        elif own and own[0].device_h > allowed_h:
            over.append(group)
    num, total = len(over), len(period.budgets_h) - len(apart)
    named = f": {_listed(over)}" if over else ""
    said = [f"{num} of {how_many(total, 'group')} with a budget spent more than that{named}."]
    if apart:
        why = "Not compared, as hours of different device models are not added"
        said.append(f"{why}: {_listed(apart)}.")
    if silent:
        said.append(f"Nothing was spent by {_listed(silent)}.")
    if len(silent) == len(period.budgets_h):
        return "NOT COMPARED", "undecided", " ".join(said)
    if apart and not over:
        return "NOT ALL COMPARED", "undecided", " ".join(said)
    return (*_answer(over=bool(over)), " ".join(said))


def _own_words(own: OwnBudgets) -> str:
    none = "" if not own.num_without else f"; {how_many(own.num_without, 'run')} had none"
    return (
        f"{_of(own.spent_h, own.allowed_h)} allowed device-hours in {how_many(own.num, 'run')}"
        f" that had a budget{none}"
    )


def _spent(period: Period) -> list[Block]:
    shown = list(_cut(period.spending, period.budgets_h))
    silent = [each for each in period.budgets_h if each not in {s.group for s in period.spending}]
    totals = period.devices if len(period.spending) > 1 else []
    priced = any(each.amounts for each in period.spending)
    rows = [(each, _of_group(period, each)) for each in shown]
    rows += [(each, _of_all(period, each)) for each in totals]
    body = [_row(each, allowed, priced=priced) for each, allowed in rows]
    for group in silent:
        allowed = f"{_of(0.0, period.budgets_h[group])}"
        body.append([_name(group), "-", "0", "0", allowed, *(["-"] if priced else [])])
    if not body:
        return [Prose(NOTHING)]
    head = (period.by, "device", "runs", "device-hours", "against budget")
    return [Table((*head, *(["money"] if priced else [])), body)]


def _cut(found: Sequence[Spent], named: Container[str]) -> Iterator[Spent]:
    """Yield the largest groups and those that are named, and the others together, by device
    model.
    """
    rest = [each for each in found[MOST_GROUPS:] if each.group not in named]
    if len(rest) <= 1:
        yield from found
        return
    yield from (each for each in found if each not in rest)
    for device in sorted({each.device for each in rest}):
        same = [each for each in rest if each.device == device]
        yield together(same, how_many(len(same), "other"))


def _row(each: Spent, allowed: str, *, priced: bool) -> list[str]:
    return [
        _name(each.group),
        _name(each.device),
        str(len(each.runs)),
        _h(each.device_h),
        allowed,
        *([_money(each)] if priced else []),
    ]


def _of_group(period: Period, each: Spent) -> str:
    """Return what a group spent on a device model of what it may."""
    if period.budget_h is not None:
        return _of(each.device_h, period.budget_h) if len(period.spending) == 1 else "-"
    if period.budgets_h:
        alone = sum(own.group == each.group for own in period.spending) == 1
        allowed_h = period.budgets_h.get(each.group) if alone else None
        return "-" if allowed_h is None else _of(each.device_h, allowed_h)
    return _own_cell(period.own.by_place.get((each.group, each.device), OwnBudgets()))


def _of_all(period: Period, each: Spent) -> str:
    """Return what all spent on a device model of what they may."""
    if period.budget_h is not None:
        return _of(each.device_h, period.budget_h) if len(period.devices) == 1 else "-"
    return "-" if period.budgets_h else _own_cell(period.own.of(each.device))


def _own_cell(own: OwnBudgets) -> str:
    none = "" if not own.num_without else f", {own.num_without} without"
    said = f"{_of(own.spent_h, own.allowed_h)} in {how_many(own.num, 'run')}{none}"
    return said if own.num else "-"


def _money(each: Spent) -> str:
    said = [money(amount, one_line(name, 8)) for name, amount in each.amounts.items()]
    if said and each.unpriced_h > 0:
        said.append(f"{_h(each.unpriced_h)} h unpriced")
    return ", ".join(said) or "-"


# -- waste ----------------------------------------------------------------------------------------


def _waste(period: Period) -> list[Block]:
    if not period.spending:
        return []
    blocks: list[Block] = [
        Prose(" ".join(_wasted_words(each, len(period.devices) > 1) for each in period.devices))
    ]
    shown, rest = period.losses[:MOST_CAUSES], period.losses[MOST_CAUSES:]
    several = len({each.device for each in period.losses}) > 1
    if shown:
        head = ("cause", *(["device"] if several else []), "device-hours", "share")
        body = [_loss_row(each, several=several) for each in shown]
        blocks.append(Table((*head, "most in", "first thing to try"), body))
    if rest:
        listed = ", ".join(
            f"{each.cause} {_h(each.device_h)}{f' on {_name(each.device)}' if several else ''}"
            for each in rest
        )
        blocks.append(Prose(f"Not shown: {listed}."))
    return blocks


def _wasted_words(each: Spent, several: bool) -> str:
    on = f" on {_name(each.device)}" if several else ""
    if each.wasted_h is None or each.known_h <= 0:
        return f"No stage{on} tells its waste."
    share = percent(min(each.wasted_h / each.known_h, 1.0))
    return (
        f"{_h(each.wasted_h)} of the {_h(each.known_h)} device-hours{on} whose waste is known"
        f" were wasted: {share}."
    )


def _loss_row(each: Loss, *, several: bool) -> list[str]:
    advice = (
        None
        if each.cause == NOT_TOLD
        else first_thing(
            each.cause,
            each.share,
            each.device_h,
            is_metered=each.is_metered,
            has_ranks=each.has_ranks,
        )
    )
    return [
        each.cause,
        *([_name(each.device)] if several else []),
        _h(each.device_h),
        percent(each.share),
        f"{_name(each.stage)}, {_name(each.run)}",
        advice or "-",
    ]


# -- forecasts ------------------------------------------------------------------------------------


def _forecasts(found: Foreseen | None) -> list[Block]:
    if found is None:
        return []
    return [
        Prose(
            f"Forecasts covered {found.covered} of {how_many(found.num, 'run')} (90% is what they"
            f" claim), median error {percent(found.error)}, median width {percent(found.width)}:"
            " of the parts that were foretold, as far as every one of them ended."
        )
    ]


# -- verdicts -------------------------------------------------------------------------------------


def _verdicts(period: Period) -> list[Block]:
    judged = [(history, each) for history in period.histories for each in _within(period, history)]
    if not judged:
        return [Prose("No gate judged a release in this period.")] if period.histories else []
    counts = Counter(each["verdict"] for _, each in judged)
    said = ", ".join(f"{num} {one_line(name, 16)}" for name, num in counts.most_common())
    loud = [
        f"{_model(history)}: {each}"
        for history in period.histories
        if any(own is history for own, _ in judged)
        for each in alarms(history)
    ]
    judged.sort(key=lambda each: each[1]["created"])
    shown = judged[-MOST_RELEASES:]
    blocks: list[Block] = [
        Prose(f"{how_many(len(judged), 'release')}: {said}."),
        *([Bullets(loud, first=len(loud))] if loud else []),
        Table(
            ("model", "release", "verdict", "serving saved", "quality change against margin"),
            [_release_row(history, each) for history, each in shown],
        ),
    ]
    if len(shown) < len(judged):
        earlier = how_many(len(judged) - len(shown), "earlier release")
        blocks.append(Prose(f"Not shown: {earlier} (python -m pipeline history)."))
    return blocks


def _within(period: Period, history: VerdictHistory) -> list[ReleaseRecord]:
    """Return the releases of a period, after which none is known; days compare as text."""
    return [each for each in history["releases"] if each["created"] >= period.first]


def _release_row(history: VerdictHistory, each: ReleaseRecord) -> list[str]:
    shown = dict(zip(HEAD, cells(each), strict=True))
    own = ("candidate", "verdict", "serving saved", "quality")
    return [_model(history), *(shown[name] for name in own)]


def _model(history: VerdictHistory) -> str:
    return _name(history["model"] or NO_MODEL)


def _savings(histories: Sequence[VerdictHistory]) -> list[Block]:
    """Return a chart per model: what serving its last releases saved, the newest last."""
    read: list[tuple[VerdictHistory, list[ReleaseRecord]]] = []
    for history in histories:
        known = [each for each in history["releases"] if each["serving"] is not None]
        if history["model"] is not None and known:
            read.append((history, known[-LAST:]))
    read.sort(key=lambda each: each[1][-1]["created"], reverse=True)
    blocks: list[Block] = [
        _chart(name, *each) for name, each in zip(_CHART_NAMES, read[:MOST_CHARTS], strict=False)
    ]
    if len(read) > MOST_CHARTS:
        more = how_many(len(read) - MOST_CHARTS, "other model")
        blocks.append(Prose(f"Not shown: {more} (python -m pipeline history)."))
    return blocks


def _chart(name: str, history: VerdictHistory, releases: Sequence[ReleaseRecord]) -> Figure:
    rows: list[Interval] = []
    for each in releases:
        figure, shown = each["serving"], dict(zip(HEAD, cells(each), strict=True))
        assert figure is not None, "those without a reading were left out"
        low, high = figure["low"], figure["high"]
        rows.append(
            Interval(
                label=f"{shown['date (UTC)'][:10]} {shown['candidate']}",
                value=figure["value"],
                ends=(low, high),
                shown=shown["serving saved"],
                mood="better" if low > 0 else "worse" if high < 0 else "undecided",
            )
        )
    return Figure(
        name=name,
        title=f"Serving saved by releases of {_model(history)}",
        says="Each against the champion of its day, the newest last. Right of zero it is cheaper.",
        chart=Intervals(axis="cheaper to serve by, share of the champion's cost", rows=rows),
        table=Table(
            ("release", "serving saved", "verdict"),
            [
                [row.label, row.shown, one_line(each["verdict"], 16)]
                for row, each in zip(rows, releases, strict=True)
            ],
        ),
    )


# -- notes ----------------------------------------------------------------------------------------


def _notes(period: Period) -> list[str]:
    priced = any(each.amounts for each in period.spending)
    parts = [
        (lambda each: each.unpriced_h if priced else 0.0, "have no declared rate: money leaves"),
        (lambda each: each.device_h - each.known_h, "do not tell waste: shares leave"),
    ]
    said = [
        f"{_h(hours)} device-hours on {_name(each.device)} {text} them out"
        for read, text in parts
        for each in period.devices
        if (hours := read(each)) > 1e-9
    ]
    said += [
        f"{_h(each.reused_h)} device-hours on {_name(each.device)} were reused: they were spent"
        " earlier, and count there"
        for each in by_device(period.spent, ALL)
        if each.reused_h > 0
    ]
    said += [
        f"{_h(each.device_h)} wasted device-hours on {_name(each.device)} are of runs that do not"
        " tell their cause, as those of older releases"
        for each in period.losses
        if each.cause == NOT_TOLD
    ]
    if period.budget_h is None and not period.budgets_h:
        said += _own_notes(period.own)
    return [*said, *period.notes]


def _own_notes(own: Declared) -> list[str]:
    said: list[str] = []
    if own.over:
        names = ", ".join(_name(each) for each in own.over[:SHOWN])
        more = f" and {len(own.over) - SHOWN} more" if len(own.over) > SHOWN else ""
        runs = how_many(len(own.over), "run")
        whose = agreed(len(own.over), "its own budget", "their own budgets")
        said.append(f"{runs} took more than {whose}: {names}{more}")
    if own.num_earlier:
        whole = agreed(own.num_earlier, "all that it took counts", "all that they took counts")
        runs = how_many(own.num_earlier, "run with a budget", "runs with a budget")
        said.append(f"{runs} began before the period: {whole} against it")
    if own.num_mixed:
        runs = how_many(own.num_mixed, "run with a budget", "runs with a budget")
        said.append(f"{runs} used several device models, whose hours are not added: left out")
    return said


# -- words ----------------------------------------------------------------------------------------


def _h(hours: float) -> str:
    return significant(hours)


def _of(hours: float, allowed_h: float) -> str:
    return f"{_h(hours)} of {_h(allowed_h)}"


def _name(text: str) -> str:
    return one_line(text, _NAME)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(_name, names[:SHOWN])) + more


# -- terminal -------------------------------------------------------------------------------------


def text_lines(head: Head, sections: Iterable[Section]) -> list[str]:
    """Return the page as a terminal shows it: without charts."""
    lines = [*wrap(head.kind, WIDTH), "", *wrap(f"{head.badge}: {head.verdict}", WIDTH)]
    for section in sections:
        own = [line for block in section.blocks for line in _block_lines(block)]
        if own:
            lines += ["", f"{section.title}:", *own]
    return lines


def _block_lines(block: Block) -> list[str]:
    match block:
        case Prose():
            return [f"  {line}" for line in wrap(block.text, WIDTH - 2)]
        case Bullets():
            items = [wrap(f"- {item}", WIDTH - 2, "  ") for item in block.items]
            return [f"  {line}" for item in items for line in item]
        case Table():
            rows = [list(block.head), *map(list, block.body)]
            widths = [max(len(row[at]) for row in rows) for at in range(len(block.head))]
            return [f"  {'  '.join(map(pad, row, widths)).rstrip()}" for row in rows]
        case _:
            return []
