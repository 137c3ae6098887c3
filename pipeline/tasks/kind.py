"""The contract of a task: what a model is for, and all that differs by that.

A task is one subclass in a file of its own here, and one line in `table.py`. What it does not say
is as `Kind` has it. Everything else asks `task.kind`, and compares no task with another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.tasks.quality import Quality


class Kind:
    """What a task is.

    Attributes:
        unit: What serving and payback count.
        qualities: Its metrics, in the order of result.json.
        primary: The one that decides.
        stands_in: What decides where that one is null; None where nothing does.
        recorded: Columns of a file of per-document values, beside `digest`.
        known_by: A column that only this task's values have.
    """

    unit: str
    qualities: tuple[Quality, ...]
    primary: str
    stands_in: str | None = None
    recorded: tuple[str, ...]
    known_by: str

    def compared(self) -> tuple[Quality, ...]:
        """Return the metrics that two arms are compared on, document by document."""
        return tuple(each for each in self.qualities if each.same is not None)

    def in_policy(self) -> tuple[str, ...]:
        """Return the keys that a gate's policy can ask for."""
        return tuple(each.key for each in self.compared() if each.in_policy)

    def why_wrong(self, row: Mapping[str, Any]) -> str | None:
        """Return why a document's recorded values (finite numbers) cannot be; None where they
        can.
        """
        return None
