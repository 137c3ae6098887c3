"""A quality metric: one entry, in the tuple of its task, holds all that anything knows of it.

The entry says how the figure is made of what scoring keeps of each document (its columns). How such
a figure gets its interval, and how two arms are compared on it, follows from the kind of measure:
`compare/figures.py` and `compare/quality.py` have a function for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Columns = Mapping[str, "np.ndarray[Any, Any]"]
"""What is kept of each document, (D,) each, by name."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """The sum of one column over the sum of another (bits over bytes)."""

    num: str
    den: str

    @property
    def columns(self) -> tuple[str, ...]:
        """What must be known of each document."""
        return self.num, self.den


@dataclass(frozen=True, slots=True)
class PowerOfRatio(Ratio):
    """2 to the power of a ratio: perplexity, of bits over tokens."""


@dataclass(frozen=True, slots=True)
class RatioWhereAny(Ratio):
    """A ratio over the documents whose `den` is above 0; left out where there are none."""


@dataclass(frozen=True, slots=True)
class PlainRatio(Ratio):
    """A ratio without an interval; left out where it is 0."""


@dataclass(frozen=True, slots=True)
class Share:
    """The share of examples where a column is true."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """What must be known of each document."""
        return (self.column,)


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over examples of what `per_example` makes of `columns`, in their order."""

    columns: tuple[str, ...]
    per_example: Callable[..., Any] = lambda column: column


@dataclass(frozen=True, slots=True)
class MacroF1:
    """The mean of F1 over the classes that occur among labels or predictions."""

    columns: tuple[str, ...] = ("label", "prediction")


Measure = Ratio | Share | Mean | MacroF1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A metric of a task.

    Attributes:
        key: In result.json, in a policy, and after `quality/` in MLflow.
        meaning: One line for the catalogue.
        measure: How it is made of the columns.
        direction: +1 where higher is better, -1 where lower is better.
        unit: `1` of a share.
        words: What reports call it; its key where they never do.
        heading: Over a column of it; its key where None.
        counted: Reports say `fewer` and `more` of it, not `lower` and `higher`.
        relative: Differences are fractions of the base (1 - arm / base); else plain ones, which
            reports show in points.
        same: The column that must be the same in both arms of a comparison (what there was to
            predict); None where arms are not compared on it, document by document.
        in_policy: A gate's policy can ask for it.
        right_or_wrong: The column that has 1 where an example was answered right, where the metric
            is made of such answers: what a gate that sees no difference must know.
        why_unknown: Says why columns do not tell it; None where they do.
    """

    key: str
    meaning: str
    measure: Measure
    direction: int
    unit: str = "1"
    words: str = ""
    heading: str | None = None
    counted: bool = False
    relative: bool = False
    same: str | None = None
    in_policy: bool = True
    right_or_wrong: str | None = None
    why_unknown: Callable[[Columns], str | None] = lambda _: None


def agreement(measure: Measure, same: str) -> Quality:
    """Return the metric of a student: how often its first predictions are its teacher's."""
    return Quality(
        key="teacher_agreement",
        words="agreement with the teacher",
        meaning="share of first predictions equal to the teacher's",
        measure=measure,
        direction=1,
        same=same,
        in_policy=False,
    )


def drift(kl: Measure, flips: Measure) -> tuple[Quality, Quality]:
    """Return the metrics of a quantized model: how far it is from what it was made from."""
    return (
        Quality(
            key="kl_to_unquantized",
            words="KL from the unquantized model",
            meaning="KL(unquantized || quantized) a test token or example",
            measure=kl,
            direction=-1,
            unit="nat",
        ),
        Quality(
            key="flips",
            words="changed first predictions",
            meaning="share of first predictions that quantizing changed",
            measure=flips,
            direction=-1,
        ),
    )
