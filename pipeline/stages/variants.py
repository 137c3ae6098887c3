"""An arm's recipe with parts of it left out: which parts there are, and what arms that takes.

From an arm one can go back to what it was made of: a quantized model to its source, a student to
its teacher, a training to the weights that it began with. Where that way and the base's part, the
arm's parts begin: the settings in which the first stage differs from the base, and each stage after
it. A stage is left out by having whatever reads it read what stands before it; a setting, by giving
it the base's value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.compare.attribution import MOST_PARTS, Coalition
from pipeline.config.settings.run import Run
from pipeline.errors import UserError, one_line
from pipeline.stages.base import LIKE, TEACHER, settings_of, stages_of

APART = ("optional", LIKE)
"""Settings of a stage that do not change what it makes."""


@dataclass(frozen=True, slots=True)
class Part:
    """What an arm has and its base has not.

    Attributes:
        name: Of the stage or the setting.
        says: What it is, in a few words.
        off: Of a setting, the base's value; None of a stage.
    """

    name: str
    says: str
    is_stage: bool
    off: Any = None


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an arm against its base.

    Attributes:
        root: The stage whose settings differ, or the base where none does.
        each: Settings first, then stages as they follow one another.
    """

    arm: str
    base: str
    root: str
    each: tuple[Part, ...]

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [part.name for part in self.each]

    @property
    def settings(self) -> Coalition:
        """Those that are settings."""
        return frozenset(part.name for part in self.each if not part.is_stage)

    def off(self, coalition: Coalition) -> dict[str, Any]:
        """Return the settings of the root stage that have the base's value in a coalition."""
        return {
            part.name: part.off
            for part in self.each
            if not part.is_stage and part.name not in coalition
        }


def parts_of(run: Run, arm: str, base: str) -> Parts:
    """Return what an arm has and its base has not.

    Raises:
        UserError: If the two have too little in common, or nothing in which they differ.
    """
    for name, key in ((arm, "--arm"), (base, "--base")):
        if name not in stages_of(run):
            known = ", ".join(stages_of(run))
            raise UserError(key, f"{one_line(name, 60)!r} is no arm of this run", f"give {known}")
    ours, theirs = _way(run, arm), _way(run, base)
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    own, other = ours[shared:], theirs[shared:]
    settings: list[Part] = []
    root = base
    if other:
        if len(other) > 1 or not own or not _same_kind(run, own[0], other[0]):
            raise UserError(
                "--base",
                f"{base} is not {arm} with parts left out ({' from '.join(theirs[::-1])} against"
                f" {' from '.join(ours[::-1])})",
                "name a base that differs in settings, or that the arm is made from",
            )
        root, settings = own[0], list(_differing(run, own[0], other[0]))
        own = own[1:]
    stages = [Part(name, f"stage {name} ({stages_of(run)[name].type})", True) for name in own]
    each = (*settings, *stages)
    if not each:
        raise UserError("--arm", f"{arm} and {base} do not differ", "name two arms that do")
    if len(each) > MOST_PARTS:
        names = ", ".join(part.name for part in each)
        raise UserError(
            "--base",
            f"{arm} differs from {base} in {len(each)} parts ({names})",
            f"name a base that is nearer: {MOST_PARTS} parts take {2**MOST_PARTS} arms",
        )
    return Parts(arm, base, root, each)


def _way(run: Run, arm: str) -> list[str]:
    """Return the arms from the first one that an arm was made of, to itself."""
    found = [arm]
    while (before := _before(run, found[0])) is not None and before not in found:
        found.insert(0, before)
    return found


def _before(run: Run, arm: str) -> str | None:
    """Return the arm that stands in a stage's place where it is left out; None: nothing does."""
    stage = stages_of(run)[arm]
    taught = stage.learns_from() if TEACHER in stage.references(run) else None
    for other in (taught, stage.starts_from()):
        if other in stages_of(run):
            return other
    return None


def _same_kind(run: Run, arm: str, base: str) -> bool:
    """Tell whether two stages are of one type and read the same models."""
    ours, theirs = stages_of(run)[arm], stages_of(run)[base]
    alike = ours.inputs(run) == theirs.inputs(run) and ours.matched(run) == theirs.matched(run)
    return type(ours) is type(theirs) and alike


def _differing(run: Run, arm: str, base: str) -> Iterator[Part]:
    ours, theirs = stages_of(run)[arm], stages_of(run)[base]
    own, other = ours.shown_settings(run), theirs.shown_settings(run)
    for name in dict.fromkeys([*own, *other]):
        value, off = own.get(name), other.get(name)
        if name in APART or value == off:
            continue
        if theirs.no_effect(name, run) is not None:  # comes with another that is a part
            continue
        instead = "without" if off is None else f"not {one_line(off, 40)}"
        said = f"{name}={one_line(value, 40)}, {instead}" if value is not None else f"no {name}"
        yield Part(name, said, False, off)


# -- arms -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewStage:
    """A stage that a recipe has to place.

    Attributes:
        settings: As plain values, all of them.
    """

    type: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Placed:
    """An arm, and the settings by which its run differs from the one that is looked at."""

    arm: str
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(slots=True)
class Arms:
    """Where the arms of coalitions stand.

    Attributes:
        new: Stages that the recipe lacks, by name, in the order in which they have to stand.
    """

    run: Run
    parts: Parts
    new: dict[str, NewStage] = field(default_factory=dict[str, NewStage])

    def place(self, coalition: Coalition) -> Placed:
        """Return the arm that has these parts and no other."""
        parts = self.parts
        places, changes = dict[str, str](), dict[str, Any]()
        on = coalition & parts.settings
        at = parts.root
        if not on:  # the base's first stage is the arm's without any of these settings
            at = places[parts.root] = parts.base
        elif on != parts.settings:
            first = stages_of(self.run)[parts.root]
            off = {**settings_of(first), **parts.off(coalition)}
            at = places[parts.root] = self._named(parts.root, NewStage(first.type, off))
        for part in parts.each:
            if part.is_stage:
                if part.name in coalition:
                    at = self._copy(part.name, places, changes)
                places[part.name] = at
        return Placed(at, changes)

    def _copy(self, name: str, places: dict[str, str], changes: dict[str, Any]) -> str:
        """Return a stage that reads what stands in the place of what `name` reads.

        What it reads by a setting of the whole run goes into `changes`.
        """
        stage, reads = stages_of(self.run)[name], dict[str, str]()
        for each in stage.references(self.run).values():
            if not each.reads or each.arm not in stages_of(self.run):
                continue
            if each.arm not in places:
                places[each.arm] = self._copy(each.arm, places, changes)
            there = places[each.arm]
            if there != each.arm and "." in each.setting:
                changes[each.setting] = there
            elif there != each.arm:
                reads[each.setting] = there
        if not reads:
            return name
        return self._named(name, NewStage(stage.type, {**settings_of(stage), **reads}))

    def _named(self, name: str, wanted: NewStage) -> str:
        """Return the name of a stage like `name` with other settings: one that is there, or a new
        one.
        """
        for other, known in {**self._known(), **self.new}.items():
            if _alike(known, wanted):
                return other
        number = 2
        while (own := f"{name}_{number}") in self.new or own in stages_of(self.run):
            number += 1
        self.new[own] = wanted
        return own

    def _known(self) -> dict[str, NewStage]:
        stages = stages_of(self.run)
        return {name: NewStage(each.type, settings_of(each)) for name, each in stages.items()}


def _alike(one: NewStage, other: NewStage) -> bool:
    names = {*one.settings, *other.settings} - {*APART}
    same = all(one.settings.get(name) == other.settings.get(name) for name in names)
    return one.type == other.type and same


def needed(run: Run, new: Mapping[str, NewStage], wanted: Sequence[str]) -> list[str]:
    """Return the stages that arms rest on: the recipe's in its order, then new ones.

    Args:
        wanted: Arms, new ones too.
    """
    found, pending, stages = set[str](), list(wanted), stages_of(run)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        if name in new:
            pending += [value for value in new[name].settings.values() if isinstance(value, str)]
            found.add(name)
        elif name in stages:
            pending += [each.arm for each in stages[name].references(run).values()]
            found.add(name)
    return [name for name in (*stages, *new) if name in found]
