"""What each part of an arm brought, in words: for a terminal, and as sections of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.compare.attribution import NOT_KNOWN, Attribution, Effect, Effects, named
from pipeline.compare.statistics import LEVEL
from pipeline.errors import one_line
from pipeline.ledger.metrics import RELATIVE
from pipeline.ledger.numbers import how_many, percent, significant
from pipeline.ledger.shapes import Result
from pipeline.report.blocks import (
    Block,
    Bullets,
    Code,
    Figure,
    Interval,
    Intervals,
    Prose,
    Section,
    Table,
)
from pipeline.report.page import Head
from pipeline.report.tables import WIDTH
from pipeline.report.text import wrap

HEAD = ("part", "training hours", "quality", "serving time", "comes to")
COLUMNS = ("hours", "quality", "serving")
NO_USE = 100.0  # times: an interval this wide says nothing
LEFT_OUT = "What leaving each part out would change"
SHARES = "What each part brought, of all together"


def sentence(found: Attribution) -> str:
    """Return what all parts come to, in one sentence."""
    said: list[str] = []
    for name, effects in found.left_out.items():
        word, advice = effects.verdict()
        what = _decided(effects)
        said.append(f"{one_line(name, 40)} {what or word}{f': {advice}' if advice else ''}")
    return "; ".join(said) + "."


def _decided(effects: Effects) -> str:
    """Return the savings and costs of a part that are decided, in words."""
    said: list[str] = []
    for what, effect in (("training", effects.hours), ("serving", effects.serving)):
        if effect.value is not None and effect.answer() in ("better", "worse"):
            verb = "saves" if effect.value > 0 else "costs"
            said.append(f"{verb} {percent(abs(effect.value))} of {what}")
    quality = effects.quality
    if quality.ends is not None and quality.ends[1] < -effects.margin:
        said.append("loses quality beyond the margin")
    return " and ".join(said)


def terminal(found: Attribution) -> list[str]:
    """Return the lines of a terminal."""
    lines = [
        f"what each part of {one_line(found.arm, 60)} brought, beside {one_line(found.base, 60)}:"
    ]
    for name, effects in found.left_out.items():
        word, advice = effects.verdict()
        said = f"{word}, {advice}" if advice else word
        lines += ["", f"{one_line(found.says[name], 100)}: {said}"]
        if word != NOT_KNOWN:
            lines += _lines("without it", effects, found.key)
        if name in found.shapley:
            lines += _lines("its share of all", found.shapley[name], found.key)
    lines += ["", "all together:", *_lines("", found.together, found.key), ""]
    return [
        each
        for line in [*lines, *notes(found)]
        for each in (wrap(line, WIDTH, "    ") if line else [""])
    ]


def _lines(how: str, effects: Effects, key: str) -> Iterator[str]:
    cells = _cells(effects, key)
    for what, cell in zip(("training", "quality", "serving"), cells, strict=True):
        yield f"  {f'{how}, ' if how else ''}{what}: {cell}"


def notes(found: Attribution) -> list[str]:
    """Return what has to be said of these figures."""
    said = [
        "Positive is saved, or gained. Hours are of each arm's whole chain, quality is"
        f" {found.key.replace('_', ' ')} on the test split, serving is read in turns with the"
        f" base. The intervals of a column hold together at {percent(LEVEL)}"
        f" (each at {percent(found.level)}, for as many parts); {how_many(found.seeds, 'seed')}."
        " What a part comes to rests on leaving it out."
    ]
    if found.lacking:
        arms = "; ".join(named(each) for each in found.lacking)
        lacking = how_many(len(found.lacking), "of them does", "of them do")
        said.append(
            f"Shapley values take the arms of all sets of parts. {lacking} not exist yet:"
            f" {one_line(arms, 600)}."
        )
    return said


def page_of(found: Attribution, result: Result, command: str) -> tuple[Head, list[Section]]:
    """Return the head and the sections of a page."""
    words = {effects.verdict()[0] for effects in found.left_out.values()}
    good, bad = words <= {"pays", "better quality"}, bool({"costs", "costs quality"} & words)
    head = Head(
        title=f"What the parts of {one_line(found.arm, 60)} brought",
        kind="attribution",
        badge="ALL PAY" if good else "SOME COST" if bad else "NOT ALL DECIDED",
        mood="good" if good else "bad" if bad else "undecided",
        verdict=sentence(found),
        facts=[
            f"{one_line(found.arm, 60)} beside {one_line(found.base, 60)}",
            *(f"run {one_line(each, 100)}" for each in found.runs),
            one_line(result["device"]["name"], 100),
        ],
        footer="Figures are made of the files of the runs that are named above.",
    )
    return head, list(_sections(found, command))


def _sections(found: Attribution, command: str) -> Iterator[Section]:
    by_part = {**found.left_out, "all together": found.together}
    yield Section("left-out", LEFT_OUT, _table(found, by_part), True)
    if found.shapley:
        whole = {**found.shapley, "all together": found.together}
        yield Section("shares", SHARES, _table(found, whole, verdicts=False), True)
    yield Section("charts", "Intervals", list(_charts(found)))
    yield Section("notes", "What the figures mean", [Bullets(notes(found))], True)
    yield Section("command", "How to reproduce", [Code(command)])


def _table(
    found: Attribution, effects: Mapping[str, Effects], *, verdicts: bool = True
) -> list[Block]:
    body = [
        [
            one_line(found.says.get(name, name), 100),
            *_cells(each, found.key),
            *([_verdict(name, each, found)] if verdicts else []),
        ]
        for name, each in effects.items()
    ]
    return [Table(HEAD if verdicts else HEAD[:-1], body)]


def _verdict(name: str, effects: Effects, found: Attribution) -> str:
    if name not in found.says:
        return ""
    word, advice = effects.verdict()
    return f"{word}: {advice}" if advice else word


def _cells(effects: Effects, key: str) -> list[str]:
    return [
        _shown(effects.hours, "%"),
        _shown(effects.quality, "%" if key in RELATIVE else " pt"),
        _shown(effects.serving, "%"),
    ]


def _shown(effect: Effect, symbol: str) -> str:
    if effect.value is None:
        return f"- ({one_line(effect.why, 200)})"
    value, ends = effect.value, effect.ends
    if symbol == "%" and min((value, *(ends or ()))) < -1:  # -640% of what there was: 7.4 times it
        value, symbol, shown = 1 - value, " times", lambda share: significant(share, 2)
        ends = None if ends is None else (1 - ends[1], 1 - ends[0])
        word = "" if value < 1 else " as much"
    else:
        value, word, shown = 100 * value, "", lambda share: f"{share:+.1f}"
        ends = None if ends is None else (100 * ends[0], 100 * ends[1])
    said = f"{shown(value)}{symbol}{word}"
    if ends is not None and symbol == " times" and ends[1] > NO_USE * max(ends[0], 1e-9):
        return f"{said} (its interval is too wide to say anything: more seeds or blocks would tell)"
    if ends is None:
        return f"{said} (no interval: {one_line(effect.why, 200)})"
    return f"{said} [{shown(ends[0])}, {shown(ends[1])}]"


def _charts(found: Attribution) -> Iterator[Block]:
    """Yield a chart of each figure: leaving out, and the shares of all where they are known."""
    in_points = found.key not in RELATIVE
    axes = {
        "hours": "device-hours saved, share of those without it",
        "quality": "quality gained, " + ("points" if in_points else "share of that without it"),
        "serving": "serving time saved, share of that without it",
    }
    for column in COLUMNS:
        rows: list[Interval] = []
        for how, by_part in (("without it", found.left_out), ("its share", found.shapley)):
            for name, effects in by_part.items():
                effect: Effect = getattr(effects, column)
                margin = effects.margin if column == "quality" else None
                symbol = " pt" if column == "quality" and in_points else "%"
                rows.append(
                    Interval(
                        label=f"{one_line(name, 40)}, {how}",
                        value=effect.value,
                        ends=effect.ends,
                        shown=_shown(effect, symbol),
                        margin=margin,
                        mood=effect.answer(margin or 0.0),
                    )
                )
        if any(row.value is not None for row in rows):
            table = Table(("part", axes[column]), [[row.label, row.shown] for row in rows])
            yield Figure(
                name=f"attribution-{column}",
                title=HEAD[1 + COLUMNS.index(column)].capitalize(),
                says="Right of the line is better.",
                chart=Intervals(axis=axes[column], rows=rows),
                table=table,
            )
        else:
            yield Prose(f"{HEAD[1 + COLUMNS.index(column)].capitalize()}: nothing is known.")
