"""Several runs side by side: what differs in their settings, which of their figures can be
compared, and the same charts as of one run.

Figures that were read on another device, on other data or under another load stand beside each
other in tables, with a caution above, and never in one chart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.settings.tracking import LedgerConfig
from pipeline.errors import UserError, one_line
from pipeline.ledger.numbers import how_many, percent
from pipeline.report import charts, details
from pipeline.report.blocks import Block, Bullets, Prose, Section, Table, bullets
from pipeline.report.headline import badge_of
from pipeline.report.material import Material
from pipeline.report.page import Head
from pipeline.report.sections import answer_of
from pipeline.report.view import Footnotes, primary_key

MAX_RUNS = 20
APART = ("tracking", "budget", "question", "recipe")
"""Settings that change no figure."""
SCORED_BY = ("quality", "task")
"""Settings that decide how quality is read."""
SERVED_BY = ("serving",)
"""Settings that decide how serving is read."""
DISTURBED = LedgerConfig().max_foreign_load or 1.0
"""Share of a window that others took, from which a caution says so."""


@dataclass(frozen=True, slots=True)
class Side:
    """A run to compare.

    Attributes:
        settings: By dotted name; empty: the run left none.
    """

    material: Material
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """By which its figures are told apart."""
        return self.material.name


@dataclass(frozen=True, slots=True)
class Comparable:
    """Which figures of all runs stand in one chart, and what speaks against the others."""

    quality: bool
    hours: bool
    serving: bool
    cautions: Sequence[str]


def check_sides(sides: Sequence[Side]) -> None:
    """Refuse runs that share nothing.

    Raises:
        UserError: Naming the runs.
    """
    keys = {side.name: primary_key(side.material.result) for side in sides}
    if len(set(keys.values())) > 1:
        said = ", ".join(f"{name} in {key.replace('_', ' ')}" for name, key in keys.items())
        raise UserError("RUN", f"these share no quality: {said}", "give runs of one task")


def comparable(sides: Sequence[Side]) -> Comparable:
    """Return which figures can be compared."""
    cautions: list[str] = []

    def alike(what: str, values: Sequence[object], so: str) -> bool:
        shown = [one_line(value, 60) for value in values]
        if len(set(shown)) == 1:
            return True
        said = ", ".join(f"{side.name}: {value}" for side, value in zip(sides, shown, strict=True))
        cautions.append(f"{what} ({said}): {so}.")
        return False

    results = [side.material.result for side in sides]
    device = alike(
        "They ran on different devices",
        [f"{r['device']['count']} x {r['device']['name']}" for r in results],
        "neither hours nor serving can be compared",
    )
    data = alike(
        "They read different data",
        [r["environment"].get("data_digest", "not recorded")[:12] for r in results],
        "quality cannot be compared",
    )
    scored = alike(
        "Quality was read by other settings",
        [_chosen(side, SCORED_BY) for side in sides],
        "quality cannot be compared",
    )
    served = alike(
        "Serving was read by other settings",
        [_chosen(side, SERVED_BY) for side in sides],
        "serving cannot be compared",
    )
    for side, result in zip(sides, results, strict=True):
        if result["status"] != "FINISHED":
            why = f": {one_line(result['why'], 200)}" if result["why"] else ""
            cautions.append(f"{side.name} ended {result['status']}{why}.")
        cautions += [f"{side.name}: {said}." for said in _disturbed(side)]
    return Comparable(data and scored, device, device and served, cautions)


def _chosen(side: Side, groups: Sequence[str]) -> str:
    own = {
        name: value
        for name, value in sorted(side.settings.items())
        if name.partition(".")[0] in groups
    }
    return json.dumps(own, default=str, sort_keys=True) if own else "not recorded"


def _disturbed(side: Side) -> Iterator[str]:
    for row in side.material.result["rows"]:
        load = row["ledger"].get("conditions", {}).get("work_foreign_load", {}).get("value")
        if load is not None and load > DISTURBED:
            arm = one_line(row["arm"], 60)
            yield f"others used {percent(load)} of the machine while {arm} was made"


def differing(sides: Sequence[Side]) -> Table | None:
    """Return the settings that differ, and what the runs were made with; None where none does."""
    about = [{**_environment(side), **_settings(side, sides)} for side in sides]
    names = sorted({name for own in about for name in own if name.partition(".")[0] not in APART})
    body: list[list[str]] = []
    for name in names:
        values = [one_line(own[name], 200) if name in own else "-" for own in about]
        if len(set(values)) > 1:
            body.append([name, *values])
    return Table(("setting", *(side.name for side in sides)), body) if body else None


def _settings(side: Side, sides: Sequence[Side]) -> dict[str, Any]:
    """Return a run's settings, of the stages those alone that all runs have; the others by name."""
    names = [{_stage_in(name) for name in each.settings} - {""} for each in sides]
    shared = set[str].intersection(*names)
    found = {
        name: value
        for name, value in side.settings.items()
        if _stage_in(name) == "" or _stage_in(name) in shared
    }
    apart = sorted({_stage_in(name) for name in side.settings} - {""} - shared)
    return {**found, "stages of this run alone": ", ".join(apart) or "none"} if names else found


def _stage_in(name: str) -> str:
    """Return the stage that a setting is of; empty: of none."""
    section, _, rest = name.partition(".")
    return rest.partition(".")[0] if section == "stages" else ""


def _environment(side: Side) -> dict[str, Any]:
    result = side.material.result
    device, known = result["device"], result["environment"]
    found: dict[str, Any] = {"device": f"{device['count']} x {device['name']} ({device['kind']})"}
    for name in ("commit", "torch", "transformers", "python", "data_digest"):
        if (value := known.get(name)) is not None:
            found[name] = value
    return found


def page_of(sides: Sequence[Side], command: str) -> tuple[Head, list[Section]]:
    """Return the report over several runs: the head, and the sections."""
    can, table = comparable(sides), differing(sides)
    materials = [side.material for side in sides]
    answers = [
        f"{side.name}: {badge_of(side.material.result)[0]}."
        f" {one_line(answer_of(side.material.result)['verdict'], 1000)}"
        for side in sides
    ]
    head = Head(
        title=f"Comparison of {how_many(len(sides), 'run')}",
        kind="comparison",
        badge=how_many(len(sides), "run").upper(),
        mood="undecided" if can.cautions else "good",
        verdict="Not all of their figures can be compared."
        if can.cautions
        else "Their figures were read alike, and can be compared.",
        answers=answers,
        facts=[
            f"{side.name}: run {one_line(side.material.result['run_id'], 100)}" for side in sides
        ],
        footer="Figures are those of each run's result.json.",
    )
    return head, list(_sections(sides, materials, can, table, command))


def _sections(
    sides: Sequence[Side],
    materials: Sequence[Material],
    can: Comparable,
    table: Table | None,
    command: str,
) -> Iterator[Section]:
    if can.cautions:
        yield Section("cautions", "What cannot be compared", [Bullets(can.cautions)], True)
    same: list[Block] = [Prose("They have the same settings.")]
    yield Section("settings", "What differs", same if table is None else [table], True)
    notes = Footnotes()
    shown: details.Shown = {}
    yield Section("comparisons", "Comparisons of each run", charts.compared(materials), True)
    tables = [
        block
        for side in sides
        for block in (Prose(f"{side.name}:"), *details.arms(side.material.result, notes, shown))
    ]
    together = charts.arms(materials) if can.quality else []
    yield Section("arms", "Arms", [*together, *tables], True)
    both = charts.trade_offs(materials, hours=can.hours, serving=can.serving)
    more: list[tuple[str, str, list[Block]]] = [
        ("trade-offs", "Quality against cost", both if can.quality else []),
        ("hours", "Where the time went", _each_apart(charts.hours, materials, can.hours)),
        ("curves", "While they trained", charts.curves(materials) if can.quality else []),
        ("payback", "When they pay back", charts.payback(materials)),
        ("over-time", "Memory and energy", charts.over_time(materials)),
        ("missing", "Why a figure is missing", bullets([f"{m} {w}" for m, w in notes.reasons()])),
        ("meaning", "What the figures mean", details.definitions(shown)),
    ]
    for name, title, blocks in more:
        if blocks:
            yield Section(name, title, blocks, name in ("trade-offs", "missing"))
    commands = [
        block
        for side in sides
        if (made_by := details.reproduce(side.material.result))
        for block in (Prose(f"{side.name}:"), *made_by)
    ]
    own = [Prose("This page:"), *details.command_block(command)]
    yield Section("command", "How to reproduce", [*own, *commands])


def _each_apart(make: Any, materials: Sequence[Material], together: bool) -> list[Block]:
    if together:
        return make(materials)
    return [block for material in materials for block in make([material])]
