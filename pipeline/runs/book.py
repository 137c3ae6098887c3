"""The book of a run: its rows, what they are compared to, and what there is to say beside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.evaluation.serving.measure import ServePass
from pipeline.ledger.cost import priced
from pipeline.ledger.shapes import HoursPart, Pair, Row
from pipeline.runs.rows import hours_in, identity
from pipeline.runs.session import Session
from pipeline.stages.context import Output
from pipeline.store.artifacts import Artifact

Rows = dict[str, Row]
"""By arm, the row that made its artifact, for one seed."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What one arm has come to, for one seed.

    Attributes:
        output: What its stage reported.
        items: Where its per-document values lie; None where it was not assessed.
    """

    artifact: Artifact
    output: Output = field(default_factory=Output)
    items: Path | None = None


@dataclass(slots=True)
class Book:
    """What a run has made and read.

    Attributes:
        arms: By name and seed.
        rows: Of stage attempts, this run's and reused ones.
        finished_before: Rows of this run's earlier attempts; one whose files were lost since still
            has its hours.
        reused_h: Device-hours of work, assessment and comparison that other runs spent and this one
            takes over.
        served: What the comparison pass read; None where there was none.
        served_elsewhere_h: Those of `reused_h` that another run's comparison pass took.
        why_unserved: Why it failed.
        disagreeing: Arms that vLLM reads as another model.
    """

    session: Session
    arms: dict[tuple[str, int], Arm] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    finished_before: list[Row] = field(default_factory=list)
    comparisons: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reused_h: float = 0.0
    served: ServePass | None = None
    served_elsewhere_h: float = 0.0
    why_unserved: str | None = None
    disagreeing: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Journal a row; it replaces an earlier version of itself."""
        replaced = [index for index, old in enumerate(self.rows) if identity(old) == identity(row)]
        if replaced:
            self.rows[replaced[0]] = row
        else:
            self.rows.append(row)
        self.session.journal.write("row", row=row)

    def adopt(self, rows: Iterable[Row], *parts: HoursPart) -> None:
        """Show rows of other runs that this one builds on, once each, and count `parts` of their
        hours as reused.
        """
        known = {identity(row) for row in self.rows}
        for row in rows:
            # Rows of this run are its own hours, not reused ones.
            if row["reused"] not in (None, self.session.run_id) and identity(row) not in known:
                # at today's rate
                self.add({**row, "ledger": priced(row["ledger"], self.session.run.cost)})
                self.reused_h += sum(hours_in(row, part) for part in parts)

    def add_finished_before(self, arm: str, seed: int) -> None:
        """Show the rows of earlier attempts of this run that finished an arm."""
        known = {identity(row) for row in self.rows}
        before = (row for row in self.finished_before if (row["arm"], row["seed"]) == (arm, seed))
        self.rows += [row for row in before if identity(row) not in known]

    def all_rows(self) -> list[Row]:
        """Return the rows, and those of earlier attempts whose arms this one did not come to."""
        known = {identity(row) for row in self.rows}
        return [*self.rows, *(row for row in self.finished_before if identity(row) not in known)]

    def rows_of(self, arm: str, seed: int) -> list[Row]:
        """Return the rows of an arm, for one seed."""
        return [row for row in self.rows if (row["arm"], row["seed"]) == (arm, seed)]

    def finished(self, seed: int) -> Rows:
        """Return the rows of one seed that have an artifact, by arm."""
        own = (row for row in self.rows if row["seed"] == seed)
        return {row["arm"]: row for row in own if row["artifact"] is not None}
