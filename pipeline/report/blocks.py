"""What a report is made of, before it is a page, a Markdown file or a terminal's text.

A section has a title and blocks. Texts are plain: whoever renders them escapes what its form takes
as markup. A chart is the data that it shows; `drawing.py` draws it, and its table says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list.

    Attributes:
        first: How many of its items stand out, from the first.
    """

    items: Sequence[str]
    first: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """A table; each row has a cell for each column."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Code:
    """A command to copy, in one line."""

    text: str


@dataclass(frozen=True, slots=True)
class Terms:
    """Terms, each with its unit and its meaning."""

    items: Sequence[tuple[str, str, str]]


# -- charts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A line of a chart of intervals.

    Attributes:
        label: What it is of.
        value: The figure; None: it is not known, and the line says `shown`.
        ends: Of its interval; None: there is none.
        margin: How far below zero still counts as equal; None: there is no margin.
        shown: The figure in words.
        mood: What it comes to: `better`, `equal`, `worse` or `undecided`; empty: it is no answer.
    """

    label: str
    value: float | None
    ends: tuple[float, float] | None
    shown: str
    margin: float | None = None
    mood: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """Figures with their intervals, one below the other, on one axis.

    Attributes:
        axis: What is read along it, with its unit.
        zero: Whether the axis has a line at zero, which is what is compared.
    """

    axis: str
    rows: Sequence[Interval]
    zero: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of two figures, each with the ends of its interval where it has one."""

    label: str
    x: float
    y: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """Points in a plane.

    Attributes:
        best: Numbers of the points that no other is better than in both.
        joined: Pairs of points that cannot be told apart in what `y` says.
        lower_is_better: Whether less of `y` is better, so that the axis is turned round.
    """

    x_axis: str
    y_axis: str
    points: Sequence[Point]
    best: Sequence[int] = ()
    joined: Sequence[tuple[int, int]] = ()
    lower_is_better: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of every bar: its size in each, and what it is (`productive`, `support`, `wasted`)."""

    name: str
    sizes: Sequence[float]
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars made of parts, one below the other."""

    axis: str
    labels: Sequence[str]
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A curve, and how far it may lie from it.

    Attributes:
        low: The lower end at each point; with `high`, a band.
        steps: Whether a value holds until the next one.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    steps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Curves over one axis.

    Attributes:
        level: A line across at this height, for instance where something has paid for itself.
    """

    x_axis: str
    y_axis: str
    series: Sequence[Series]
    log_x: bool = False
    level: float | None = None


Chart: TypeAlias = Intervals | Scatter | Bars | Curves


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with its title, what it shows in one sentence, and its data as a table.

    Attributes:
        name: Of its file, where it has one: letters and hyphens.
    """

    name: str
    title: str
    says: str
    chart: Chart
    table: Table


Block: TypeAlias = Prose | Bullets | Table | Code | Terms | Figure


def bullets(items: Sequence[str]) -> list[Block]:
    """Return a list as blocks; nothing where it is empty."""
    return [Bullets(items)] if items else []


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report.

    Attributes:
        name: By which it is linked to: letters and hyphens.
        is_first: Whether it belongs to the short form that a pull request shows.
    """

    name: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple[Block, ...])
    is_first: bool = False
