"""The tasks: each line is what users write after `task=`, and the class that knows it."""

from __future__ import annotations

from enum import Enum

from pipeline.tasks.causal_lm import CausalLm
from pipeline.tasks.kind import Kind
from pipeline.tasks.quality import Columns, Quality
from pipeline.tasks.sequence_classification import SequenceClassification


class Task(Enum):
    """What the model is for; decides model class, collation, metrics and the unit that serving
    counts.
    """

    kind: Kind
    # every token of a text is predicted from those before; the default
    causal_lm = "causal_lm", CausalLm()
    # a text, or a pair, has one of the data's classes
    sequence_classification = "sequence_classification", SequenceClassification()

    def __new__(cls, value: str, kind: Kind) -> Task:
        """Make a member that is written as its name, and carries its class."""
        member = object.__new__(cls)
        member._value_ = value
        member.kind = kind
        return member


def kind_of_columns(columns: Columns) -> Kind:
    """Return the task that per-document values are of; the first one where they do not say."""
    first, *others = Task
    return next((task.kind for task in others if task.kind.known_by in columns), first.kind)


QUALITIES: dict[str, Quality] = {
    quality.key: quality for task in Task for quality in task.kind.qualities
}
"""Every task's metrics by key. What two tasks share is one metric, whatever each makes it of."""
