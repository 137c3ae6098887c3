"""The closing table of a run: plain text, 80 columns, every null with its reason below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import one_line
from pipeline.ledger.metrics import BY_KEY
from pipeline.ledger.numbers import count, duration, percent, significant
from pipeline.ledger.shapes import Pair, Result, Row
from pipeline.report.money import money_lines
from pipeline.report.phrases import PAIR_INTERVAL
from pipeline.report.text import columns, pad, shorten, wrap
from pipeline.report.view import (
    SERVING_KEY,
    Footnotes,
    arm_rows,
    device_words,
    hours_of,
    hours_word,
    is_finished,
    labels,
    no_figure,
    primary_key,
    quality_direction,
    run_total,
    seeds,
    served_seed,
    status_word,
    straddles,
    unit,
    why_absent,
)
from pipeline.report.waste import closing_lines
from pipeline.tasks.table import QUALITIES

WIDTH = 80
_GAP = 2
_SHOWN_S = 0.01
_SAVED = (("training", "train"), ("serving", "serve"))
"""Kinds of saving, and what heads their columns."""
_LONGEST_ARM = 32
"""Columns an arm's name takes at most, even where the table leaves it more."""


@dataclass(frozen=True, slots=True)
class _Column:
    """A column right of the arm's name: header lines (the last one lowest), and one cell per
    row.
    """

    head: tuple[str, ...]
    cells: tuple[str, ...]

    @property
    def width(self) -> int:
        return max(columns(text) for text in (*self.head, *self.cells))


def closing_table(result: Result) -> str:
    """Return the table of arms and what the run spent, in lines of at most 80 columns."""
    rows, notes = arm_rows(result), Footnotes()
    right = [
        _status(rows, notes),
        _time(result, rows, notes),
        _tokens(rows, notes),
        _quality(result, rows, notes),
        *_serving(result, rows, notes),
        *_savings(result, rows, notes),
    ]
    table = _laid_out(labels(rows), right) if rows else ["(no stage was measured)"]
    return "\n".join([*table, *_below(result, notes)])


def _status(rows: Sequence[Row], notes: Footnotes) -> _Column:
    why = lambda row: "" if is_finished(row) else notes.mark(row["why"] or "no reason recorded")
    return _Column(("status",), tuple(status_word(row) + why(row) for row in rows))


def _time(result: Result, rows: Sequence[Row], notes: Footnotes) -> _Column:
    """What this invocation spent: a reused stage cost it nothing, and its own figure stands below
    the table.
    """
    form = lambda hours: duration(3600 * hours)
    cells = (
        "spent 0" if row["reused"] else notes.show(hours_of(row, result), form) for row in rows
    )
    return _Column(tuple(hours_word(result).replace("-", "- ").split()), tuple(cells))


def _tokens(rows: Sequence[Row], notes: Footnotes) -> _Column:
    return _Column(
        ("tokens",), tuple(notes.show(row["ledger"]["counts"]["tokens"], count) for row in rows)
    )


def _quality(result: Result, rows: Sequence[Row], notes: Footnotes) -> _Column:
    key = primary_key(result)
    quality = QUALITIES.get(key)
    head = (quality and quality.heading) or key.replace("_", " ")
    form = lambda v: significant(v, 4)
    cells = tuple(notes.show(row["quality"].get(key), form, no_figure(row)) for row in rows)
    return _Column((head, *quality_direction(key).split()), cells)


def _serving(result: Result, rows: Sequence[Row], notes: Footnotes) -> list[_Column]:
    known = (row["serving"].get(SERVING_KEY) for row in rows)
    if all(value is None or value["value"] is None for value in known) and not saving_pairs(
        result, "serving"
    ):
        return []
    cells = tuple(
        notes.show(row["serving"].get(SERVING_KEY), significant, no_figure(row)) for row in rows
    )
    symbol = BY_KEY[f"serving/{SERVING_KEY}"].unit
    return [_Column(("serving", symbol, "per 1k", f"{unit(result)}s"), cells)]


def _savings(result: Result, rows: Sequence[Row], notes: Footnotes) -> list[_Column]:
    """Return a column per kind of saving that any comparison was read on; arms it does not speak of
    stay blank.
    """
    found: list[_Column] = []
    for measure, head in _SAVED:
        pairs = saving_pairs(result, measure)
        if pairs:
            cells = [""] * len(rows)
            for arm, pair in pairs.items():
                cells[_first_row(rows, arm)] = _saving(result, pair, measure, notes)
            found.append(_Column(("saved", head), tuple(cells)))
    return found


def _first_row(rows: Sequence[Row], arm: str) -> int:
    """Return where an arm's saving stands, which is over all seeds: its first row with an artifact,
    else its first.
    """
    own = [index for index, row in enumerate(rows) if row["arm"] == arm]
    return next((index for index in own if is_finished(rows[index])), own[0])


def saving_pairs(result: Result, measure: str) -> dict[str, Pair]:
    """Return, by arm of the table, the first comparison that is read on `training` or `serving`."""
    arms = {row["arm"] for row in result["rows"]}
    pairs: dict[str, Pair] = {}
    for pair in result["comparisons"]:
        if measure in pair["on"] and pair["arm"] in arms:
            pairs.setdefault(pair["arm"], pair)
    return pairs


def _saving(result: Result, pair: Pair, measure: str, notes: Footnotes) -> str:
    value = pair[measure]
    text = notes.show(value, lambda v: percent(v, sign=True), why_absent(result, pair))
    return text + ("?" if value and value["value"] is not None and straddles(value) else "")


def _laid_out(names: list[str], right: list[_Column]) -> list[str]:
    """Return header and rows; the arm's name takes what the figures leave of the width."""
    left = WIDTH - sum(column.width + _GAP for column in right)
    arms = shorten(names, min(left, _LONGEST_ARM))
    width = max(columns(text) for text in (*arms, "arm"))
    gap = " " * _GAP
    height = max(len(column.head) for column in right)
    heads = [("",) * (height - len(column.head)) + column.head for column in right]

    def line(first: str, cells: list[str]) -> str:
        padded = [
            pad(text, right[index].width, right=index > 0) for index, text in enumerate(cells)
        ]
        return gap.join([pad(first, width), *padded]).rstrip()

    return [
        *(line("", [head[number] for head in heads]) for number in range(height - 1)),
        line("arm", [head[-1] for head in heads]),
        "-" * (width + sum(column.width + _GAP for column in right)),
        *(line(arm, [column.cells[number] for column in right]) for number, arm in enumerate(arms)),
    ]


def _below(result: Result, notes: Footnotes) -> list[str]:
    """Return what stands under the table: bases, what was reused, the run's sum, reasons of nulls,
    verdict.
    """
    run = result["run"]
    time = lambda hours: duration(3600 * hours)
    spent = f"spent {notes.show(run['spent'], time)}, reused {notes.show(run['reused'], time)}"
    total = f"run total {run_total(result, notes)}"
    paragraphs = [
        f"{hours_word(result)} ({device_words(result)}): elapsed time x devices used",
        *_bases(result),
        *_reused(result, notes),
        f"{spent}; {total}",
        *money_lines(result),
        *closing_lines(result),
        *(f"{mark} {why}" for mark, why in notes.reasons()),
    ]
    return [line for text in paragraphs for line in wrap(text, WIDTH, "    ")]


def _bases(result: Result) -> list[str]:
    parts: list[str] = []
    for measure, head in _SAVED:
        by_base: dict[str, list[str]] = {}
        for arm, pair in saving_pairs(result, measure).items():
            by_base.setdefault(one_line(pair["base"], 60), []).append(one_line(arm, 60))
        parts += [f"{head}: {', '.join(arms)} against {base}" for base, arms in by_base.items()]
    legend = f"positive is cheaper, ? its {PAIR_INTERVAL} holds both signs{_over_seeds(result)}"
    return [f"saved, {'; '.join(parts)} ({legend})"] if parts else []


def _over_seeds(result: Result) -> str:
    """Return what savings speak of where every arm was made with several seeds; each stands beside
    its first row.
    """
    num_seeds, served = len(seeds(result)), served_seed(result)
    if num_seeds < 2:
        return ""
    meant = {
        "training": f"train is the geometric mean of {num_seeds} seeds",
        "serving": "serve is not measured" if served is None else f"serve is seed {served}'s",
    }
    said = [meant[measure] for measure, _ in _SAVED if saving_pairs(result, measure)]
    return f"; {', '.join(said)}, {'each is ' if len(said) > 1 else ''}shown once per arm"


def _reused(result: Result, notes: Footnotes) -> list[str]:
    time = lambda hours: duration(3600 * hours)
    reused = [row for row in result["rows"] if row["reused"]]
    parts = [
        f"{name} {notes.show(hours_of(row, result), time)} (run {one_line(row['reused'], 40)})"
        for name, row in zip(labels(reused), reused, strict=True)
    ]
    known_h = sum(
        row["ledger"]["device_hours"][part]["value"] or 0.0
        for row in reused
        for part in ("work", "assess")
    )
    rest_h = (result["run"]["reused"]["value"] or 0.0) - known_h
    if rest_h * 3600 >= _SHOWN_S:
        parts.append(f"comparison pass {time(rest_h)}")
    return [f"reused: {', '.join(parts)}"] if parts else []
