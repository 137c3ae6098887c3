"""What each part of an arm brought, read off the runs that have the arms with and without it.

Device-hours are those of an arm's whole chain, spent or reused, as comparisons charge them; quality
is read on the documents that all arms have in common; serving on readings that were taken in turns
with the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compare import attribution
from pipeline.compare.attribution import Attribution, Coalition, Contrast, Effect, Effects, unknown
from pipeline.compare.quality import Items
from pipeline.compare.savings import Spend, Tolerance, c_total, chain
from pipeline.compare.statistics import Floats, RunSpread, block_log_ratios
from pipeline.errors import UserError, one_line
from pipeline.evaluation.serving.measure import ServePass
from pipeline.ledger.metrics import PRIMARY
from pipeline.ledger.shapes import Row
from pipeline.ledger.values import Value
from pipeline.runs.receipts.evidence import COMPARED, FOLDER
from pipeline.runs.receipts.receipt import Kept, NotThere, read_kept
from pipeline.runs.receipts.recompute import items_in
from pipeline.stages.variants import Parts
from pipeline.tasks.table import QUALITIES, Task

NONE = frozenset[str]()


@dataclass(frozen=True, slots=True)
class Member:
    """Where a coalition's arm stands: a run that has ended, and its name there."""

    kept: Kept
    arm: str


Members = Mapping[Coalition, Member]


def read_run(folder: Path) -> Kept:
    """Read a run that has ended well.

    Raises:
        UserError: If a file that its figures rest on is missing, or it did not finish.
    """
    try:
        kept = read_kept(folder)
    except NotThere as error:
        raise UserError("RUN", f"{folder.name}: {error}", "give another run") from None
    if kept.result["status"] != "FINISHED" or kept.basis is None:
        why = one_line(kept.result["why"] or f"{FOLDER}/{COMPARED} is missing", 200)
        problem = f"{folder.name} has no comparisons to read ({why})"
        raise UserError("RUN", problem, "give a run that finished")
    return kept


def has_arm(kept: Kept, arm: str) -> bool:
    """Tell whether a run made an arm's model with every seed."""
    assert kept.basis is not None
    return all(arm in _rows(kept, each["seed"]) for each in kept.basis["seeds"])


def attribute(parts: Parts, members: Members, recorded: RunSpread | None) -> Attribution:
    """Return what each part of an arm brought.

    Args:
        members: By coalition, the arm that has it, as far as there are any; the base's and the
            whole arm's among them.
        recorded: How device-hours of a training vary on this device, by the store's self-tests.
    """
    names, whole = parts.names, members[frozenset(parts.names)].kept
    settings, task = whole.settings, Task(whole.settings["task"])
    level = attribution.level_of_each(len(names))
    reader = _Reader(members, QUALITIES[PRIMARY[task]], level, recorded)
    margin = float(settings["quality"]["margin"])
    lacking = [each for each in attribution.coalitions(names) if each not in members]

    def effects(contrast: Contrast) -> Effects:
        missing = [each for each in contrast if each not in members]
        why = [f"{attribution.named(missing[0])} does not exist yet"] if missing else []
        why = why or [
            said for each in contrast if (said := _other_models(members[each].kept, whole))
        ]
        if why:
            nothing = unknown(why[0])
            return Effects(hours=nothing, quality=nothing, serving=nothing, margin=margin)
        elsewhere = [said for each in contrast if (said := _elsewhere(members[each].kept, whole))]
        timed = unknown(elsewhere[0]) if elsewhere else None
        return Effects(
            hours=timed or reader.hours(contrast),
            quality=reader.quality_of(contrast),
            serving=timed or reader.serving(contrast),
            margin=margin,
        )

    return Attribution(
        arm=parts.arm,
        base=parts.base,
        says={part.name: part.says for part in parts.each},
        left_out={name: effects(attribution.without(names, name)) for name in names},
        shapley={}
        if lacking
        else {name: effects(attribution.shapley(names, name)) for name in names},
        together=effects(attribution.together(names)),
        lacking=lacking,
        key=PRIMARY[task],
        runs=list(dict.fromkeys(each.kept.result["run_id"] for each in members.values())),
        level=level,
        seeds=len(whole.basis["seeds"]) if whole.basis is not None else 0,
    )


def _other_models(kept: Kept, whole: Kept) -> str | None:
    """Return why the arms of two runs are no variants of one recipe, or None."""
    data = [each.result["environment"].get("data_digest") for each in (kept, whole)]
    if data[0] != data[1]:
        return f"{kept.result['run_id']} read other data"
    if kept.booked["release"] != whole.booked["release"]:
        return f"{kept.result['run_id']} was made by another release"
    return None


def _elsewhere(kept: Kept, whole: Kept) -> str | None:
    """Return why the times of two runs cannot be compared, or None."""
    ours, theirs = kept.result["device"], whole.result["device"]
    if (ours["name"], ours["count"]) == (theirs["name"], theirs["count"]):
        return None
    return f"{kept.result['run_id']} ran on {ours['count']} x {one_line(ours['name'], 60)}"


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads contrasts off the runs of coalitions."""

    members: Members
    quality: Any
    level: float
    recorded: RunSpread | None

    def hours(self, contrast: Contrast) -> Effect:
        """Return the share of device-hours that was saved."""
        read: dict[Coalition, list[float]] = {}
        given = [_given(self.members[each]) for each in contrast]
        # what was there before cancels where all arms rest on it
        shared = set[str].intersection(*given)
        for coalition in contrast:
            found = self._of_chain(self.members[coalition], shared)
            if isinstance(found, str):
                return unknown(found)
            read[coalition] = found
        if len({len(each) for each in read.values()}) > 1:
            return unknown("the runs have other seeds")
        return attribution.hours_effect(contrast, read, level=self.level, recorded=self.recorded)

    def _of_chain(self, member: Member, shared: set[str]) -> list[float] | str:
        """Return the device-hours of an arm's chain by seed, without what cancels, or why they
        cannot be compared.
        """
        basis = member.kept.basis
        assert basis is not None
        allowed = Tolerance(**basis["tolerance"])
        hours: list[float] = []
        for each in basis["seeds"]:
            spends = {raw["arm"]: Spend.from_json(raw) for raw in each["spends"]}
            if member.arm not in spends:
                return f"{member.arm} has no hours (seed {each['seed']})"
            for name in chain(member.arm, spends):
                load = spends[name].foreign_load
                loud = None if load is None or name in shared else allowed.too_much(load)
                if loud is not None:
                    return f"{loud} while {name} was made"
            total = c_total(member.arm, spends, cancelled=shared)
            if total.value is None:
                return total.why_missing or "not known"
            hours.append(total.value)
        return hours

    def serving(self, contrast: Contrast) -> Effect:
        """Return the share of serving time that was saved."""
        own = [each for each, weight in contrast.items() if weight]
        readings: dict[tuple[Coalition, Coalition], Floats] = {}
        for first in own:
            for second in {*own, NONE} - {first}:
                blocks = self._blocks(first, second)
                if isinstance(blocks, str):
                    return unknown(blocks)
                if blocks is not None:
                    readings[first, second] = blocks
        return attribution.serving_effect(contrast, readings, level=self.level)

    def _blocks(self, first: Coalition, second: Coalition) -> Floats | str | None:
        """Return ln(first / second) of each block of a pass that has both; None where none does; or
        why its times cannot be compared.
        """
        for kept in (self.members[first].kept, self.members[second].kept):
            raw = None if kept.basis is None else kept.basis["served"]
            arms = self._name_in(kept, first), self._name_in(kept, second)
            if raw is None or None in arms:
                continue
            served = ServePass.from_json(raw)
            pair = (str(arms[0]), str(arms[1]))
            if pair not in served.seconds:
                continue
            loud = _loud(kept, served)
            return loud or block_log_ratios(*served.seconds[pair])
        return None

    def _name_in(self, kept: Kept, coalition: Coalition) -> str | None:
        """Return what a run calls a coalition's arm, where it has the very same model."""
        member = self.members[coalition]
        if member.kept is kept:
            return member.arm
        digest = _digest(member.kept, member.arm)
        return member.arm if digest is not None and _digest(kept, member.arm) == digest else None

    def quality_of(self, contrast: Contrast) -> Effect:
        """Return what changed in the primary quality."""
        by_seed: list[dict[Coalition, Items]] = []
        for coalition, weight in contrast.items():
            found = _items(self.members[coalition], self.quality.key) if weight else []
            if isinstance(found, str):
                return unknown(found)
            for at, items in enumerate(found):
                if len(by_seed) <= at:
                    by_seed.append({})
                by_seed[at][coalition] = items
        if len({len(each) for each in by_seed}) > 1:
            return unknown("the runs have other seeds")
        return attribution.quality_effect(contrast, by_seed, self.quality, level=self.level)


def _given(member: Member) -> set[str]:
    """Return the arms of a chain whose models were there before."""
    assert member.kept.basis is not None
    raw = member.kept.basis["seeds"][0]["spends"]
    spends = {each["arm"]: Spend.from_json(each) for each in raw}
    own = (spends[name] for name in chain(member.arm, spends)) if member.arm in spends else ()
    return {spend.arm for spend in own if spend.existing or spend.registered}


def _loud(kept: Kept, served: ServePass) -> str | None:
    """Return what others took while serving was read, where it was too much."""
    assert kept.basis is not None
    if "foreign_load" not in served.conditions:
        return None
    allowed = Tolerance(**kept.basis["tolerance"])
    said = allowed.too_much(Value.from_json(served.conditions["foreign_load"]))
    return None if said is None else f"{said} while serving was measured"


def _rows(kept: Kept, seed: int) -> dict[str, Row]:
    own = (row for row in kept.result["rows"] if row["seed"] == seed)
    return {row["arm"]: row for row in own if row["artifact"] and row["status"] == "FINISHED"}


def _digest(kept: Kept, arm: str) -> str | None:
    assert kept.basis is not None
    row = _rows(kept, kept.basis["seeds"][0]["seed"]).get(arm)
    return None if row is None or row["artifact"] is None else row["artifact"]["digest"]


def _items(member: Member, key: str) -> list[Items] | str:
    """Return an arm's values per document, seed by seed."""
    found: list[Items] = []
    basis = member.kept.basis
    assert basis is not None
    for each in basis["seeds"]:
        row = _rows(member.kept, each["seed"]).get(member.arm)
        if row is None or key not in row["quality"]:
            return f"{member.arm} has no {key} (seed {each['seed']})"
        items = items_in(member.kept.folder, row, key)
        if isinstance(items, str):
            return f"{member.arm}: {items}"
        found.append(items)
    return found
