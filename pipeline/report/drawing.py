"""Charts drawn by matplotlib: as SVG whose colours a page chooses, and as PNG in light colours.

Labels are others' text. They are never read as formulas, and matplotlib escapes what SVG takes as
markup.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import one_line
from pipeline.ledger.numbers import count
from pipeline.report.blocks import Bars, Chart, Curves, Figure, Intervals, Scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """Colours by what they are for, as `#rrggbb`.

    Attributes:
        good: An answer for the arm; `bad` against it, `undecided` neither.
        series: Of arms, stages and phases, by turns.
    """

    ink: str
    muted: str
    grid: str
    good: str
    bad: str
    undecided: str
    series: tuple[str, ...]

    def named(self) -> dict[str, str]:
        """Return the colours by their names in a style sheet."""
        plain = ("ink", "muted", "grid", "good", "bad", "undecided")
        own = {f"--{name}": getattr(self, name) for name in plain}
        return own | {f"--s{number}": color for number, color in enumerate(self.series)}


LIGHT = Palette(
    ink="#1c2127",
    muted="#57606a",
    grid="#d8dee4",
    good="#1a7f37",
    bad="#c0341d",
    undecided="#8a6100",
    series=("#0b65c2", "#b35a00", "#1a7f37", "#8a3ffc", "#a11a53", "#00707a", "#6b5b00", "#5b6470"),
)
"""On white: all but the grid have a contrast of 4.5 and more."""
DARK = Palette(
    ink="#e6edf3",
    muted="#a3adb8",
    grid="#3a424c",
    good="#4ac26b",
    bad="#ff8a73",
    undecided="#e3b341",
    series=("#6cb6ff", "#f0a35e", "#57d37a", "#c297ff", "#ff8fb8", "#4fd1dc", "#d8c25a", "#b1bac4"),
)
"""On a dark page."""
_OF_THE_PAGE = Palette(
    ink="#010203",
    muted="#040506",
    grid="#070809",
    good="#0c0d01",
    bad="#0c0d02",
    undecided="#0c0d03",
    series=tuple(f"#0a0b{number:02x}" for number in range(len(LIGHT.series))),
)
"""Colours that stand for a page's own: a drawing names them, and gets the page's in their place."""
WIDTH_IN = 5.4
"""Of a chart, so that its text is still readable where a phone shows it at two thirds."""
LINE_IN = 0.27
"""Of a line of labels."""
LETTER_IN = 0.078
"""Of a letter of 9 points, on the average."""
LEGEND_IN = 0.19
"""Of a line of a legend."""
TOP_IN = 0.1
LONGEST_LABEL = 40
_MOODS = {"better": "good", "equal": "good", "worse": "bad", "undecided": "undecided"}
MOST_SHOWN = 2.0
"""Saved or cost, as a share of the base: beyond it an interval's end is an arrow, unless a value
lies there.
"""
_MARKERS = "osD^vP*X"
_HEAD = re.compile(r"^.*?(?=<svg )", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_STYLE = re.compile(r"\s*<defs>\s*<style[^>]*>.*?</style>\s*</defs>", re.DOTALL)
_GROUP = re.compile(r'<g id="[^"]*">')


def as_svg(figure: Figure) -> str:
    """Return a chart as an SVG element whose colours are variables of the page."""
    with quietly(figure.name):
        file = io.StringIO()
        canvas = _drawn(figure.chart, _OF_THE_PAGE)
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = _METADATA.sub("", _HEAD.sub("", file.getvalue(), count=1))
    text = _GROUP.sub("<g>", _STYLE.sub("", text))
    for variable, color in _OF_THE_PAGE.named().items():
        text = text.replace(color, f"var({variable})")
    start, rest = text.split(">", 1)
    start = re.sub(r'\s(?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", start)
    return f'{start} aria-hidden="true" focusable="false">{rest}'.replace(
        "xlink:href", "href"
    ).strip()


def as_png(figure: Figure) -> bytes:
    """Return a chart as a PNG on white, 2 pixels a point."""
    with quietly(figure.name):
        file = io.BytesIO()
        canvas = _drawn(figure.chart, LIGHT)
        canvas.savefig(file, format="png", dpi=144, facecolor="white")
    return file.getvalue()


@contextmanager
def quietly(salt: str) -> Generator[None]:
    """Draw without formulas, with ids that no other chart of the page has, and without a word on
    letters that a font lacks.
    """
    from matplotlib import rc_context

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "axes.unicode_minus": False,
        "font.size": 9.0,
        "hatch.linewidth": 0.6,
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _drawn(chart: Chart, colors: Palette) -> Canvas:
    from matplotlib.figure import Figure as Canvas

    # By hand: a layout that is found by trial draws everything twice.
    left, below = _left_in(chart), 0.5 + LEGEND_IN * _legend_lines(chart)
    height = _height_in(chart) + TOP_IN + below
    canvas = Canvas(figsize=(WIDTH_IN, height))
    canvas.subplots_adjust(
        left=left / WIDTH_IN,
        right=1 - 0.12 / WIDTH_IN,
        bottom=below / height,
        top=1 - TOP_IN / height,
    )
    axes = canvas.add_subplot()
    match chart:
        case Intervals():
            _intervals(axes, chart, colors)
        case Scatter():
            _scatter(axes, chart, colors)
        case Bars():
            _bars(axes, chart, colors)
        case Curves():
            _curves(axes, chart, colors)
    _plain(axes, colors)
    return canvas


def _height_in(chart: Chart) -> float:
    """Return the height of what is between the axes, inches."""
    match chart:
        case Intervals():
            return LINE_IN * max(2, len(chart.rows))
        case Bars():
            return LINE_IN * max(2, len(chart.labels))
        case Scatter():
            return 2.6
        case Curves():
            return 2.3


def _left_in(chart: Chart) -> float:
    """Return the room for labels left of the axes, inches."""
    match chart:
        case Intervals():
            labels = [row.label for row in chart.rows]
        case Bars():
            labels = chart.labels
        case _:
            return 0.75
    return 0.2 + LETTER_IN * max((len(short(label)) for label in labels), default=0)


def _legend_lines(chart: Chart) -> int:
    match chart:
        case Scatter():
            return math.ceil(len(chart.points) / 2)
        case Bars():
            return math.ceil(len(chart.parts) / 3)
        case Curves() if len(chart.series) > 1:
            return math.ceil(len(chart.series) / 2)
        case _:
            return 0


def _plain(axes: Axes, colors: Palette) -> None:
    """Leave an axis to the left and below, and nothing that is no data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(colors.muted)
    axes.tick_params(colors=colors.muted, labelcolor=colors.ink)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(colors.ink)


def short(label: str) -> str:
    """Return a label that leaves room for a chart, without what cannot be seen."""
    label = one_line(label)
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 2]}.."


def _intervals(axes: Axes, chart: Intervals, colors: Palette) -> None:
    places = range(len(chart.rows))
    for at, row in enumerate(chart.rows):
        color = getattr(colors, _MOODS.get(row.mood, ""), colors.series[0])
        if row.margin is not None:
            axes.plot(
                [-row.margin] * 2,
                [at - 0.4, at + 0.4],
                color=colors.bad,
                linewidth=1.2,
                ls=(0, (3, 2)),
            )
        if row.value is None:
            place = 0.02
            axes.text(
                place,
                at,
                "not known",
                color=colors.muted,
                va="center",
                transform=axes.get_yaxis_transform(),
            )
            continue
        if row.ends is not None:
            axes.plot(row.ends, [at, at], color=color, linewidth=2.2, solid_capstyle="butt")
        axes.plot(
            [row.value],
            [at],
            marker="o",
            color=color,
            markersize=6,
            linestyle="none",
            markerfacecolor=color if row.ends is not None else "none",
        )
    if chart.zero:
        from matplotlib.ticker import MaxNLocator

        axes.axvline(0.0, color=colors.muted, linewidth=1.0)
        _cut_off(axes, chart, colors.muted)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda v, _: f"{100 * v:+.3g}" if v else "0")
        _name_x(axes, f"{chart.axis}, %" if "points" not in chart.axis else chart.axis)
    else:
        _name_x(axes, chart.axis)
    axes.set_yticks(list(places), [short(row.label) for row in chart.rows])
    axes.set_ylim(len(chart.rows) - 0.4, -0.6)
    axes.grid(axis="x", color=colors.grid, linewidth=0.6)
    axes.set_axisbelow(True)


def _cut_off(axes: Axes, chart: Intervals, color: str) -> None:
    """End the axis where intervals say nothing any more; those that go on have an arrow there."""
    known = [row.value for row in chart.rows if row.value is not None]
    if "points" in chart.axis:
        return
    left, right = axes.get_xlim()
    ends = [max(left, min(-MOST_SHOWN, *known)), min(right, max(MOST_SHOWN, *known))]
    axes.set_xlim(*ends)
    for at, row in enumerate(chart.rows):
        for end, marker, beyond in (
            (ends[0], "<", row.ends is not None and row.ends[0] < ends[0]),
            (ends[1], ">", row.ends is not None and row.ends[1] > ends[1]),
        ):
            if beyond:
                axes.plot([end], [at], marker=marker, markersize=6, color=color, clip_on=False)


def _scatter(axes: Axes, chart: Scatter, colors: Palette) -> None:
    for a, b in chart.joined:
        ends = chart.points[a], chart.points[b]
        axes.plot(
            [each.x for each in ends],
            [each.y for each in ends],
            color=colors.muted,
            linewidth=1.0,
            ls=(0, (4, 3)),
        )
    for number, point in enumerate(chart.points):
        color = colors.series[number % len(colors.series)]
        if point.y_ends is not None:
            axes.plot([point.x] * 2, point.y_ends, color=color, linewidth=1.4)
        axes.plot(
            [point.x],
            [point.y],
            marker=_MARKERS[number % len(_MARKERS)],
            color=color,
            markersize=7,
            linestyle="none",
            label=short(point.label),
            markerfacecolor=color if number in chart.best else "none",
        )
    _name_x(axes, chart.x_axis)
    axes.set_ylabel(chart.y_axis)
    axes.set_xlim(left=0.0)
    if chart.lower_is_better:
        axes.invert_yaxis()
    axes.grid(color=colors.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(axes, colors, len(chart.points))


def _bars(axes: Axes, chart: Bars, colors: Palette) -> None:
    places = list(range(len(chart.labels)))
    left = [0.0] * len(places)
    largest = max((sum(part.sizes[at] for part in chart.parts) for at in places), default=0.0)
    scale, symbol = _scale(largest)
    for number, part in enumerate(chart.parts):
        sizes = [size * scale for size in part.sizes]
        axes.barh(
            places,
            sizes,
            left=left,
            height=0.62,
            color=colors.series[number % len(colors.series)],
            edgecolor=colors.ink,
            linewidth=0.3,
            hatch="////" if part.kind == "wasted" else None,
            label=part.name.replace("_", " "),
            alpha=1.0,
        )
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(places, [short(label) for label in chart.labels])
    axes.set_ylim(len(places) - 0.4, -0.6)
    _name_x(axes, f"{chart.axis}, as {symbol}")
    axes.grid(axis="x", color=colors.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(axes, colors, len(chart.parts), columns=3)


def _scale(largest_h: float) -> tuple[float, str]:
    """Return what hours are multiplied by to be read easily, and the unit that gives."""
    seconds = 3600 * largest_h
    return (
        (3600.0, "seconds")
        if seconds < 120
        else (60.0, "minutes")
        if seconds < 7200
        else (1.0, "hours")
    )


def _curves(axes: Axes, chart: Curves, colors: Palette) -> None:
    is_hours = "hours" in chart.x_axis
    largest = max((x for each in chart.series for x in each.x), default=0.0)
    scale, symbol = _scale(largest) if is_hours else (1.0, "")
    heights = [abs(y) for each in chart.series for y in each.y]
    tall, tall_symbol = _scale(max(heights, default=0.0)) if "hours" in chart.y_axis else (1.0, "")
    for number, each in enumerate(chart.series):
        color = colors.series[number % len(colors.series)]
        x = [value * scale for value in each.x]
        axes.plot(
            x,
            [value * tall for value in each.y],
            color=color,
            linewidth=1.6,
            label=short(each.label),
            drawstyle="steps-post" if each.steps else "default",
            ls=("-", "--", "-.", ":")[(number // len(colors.series)) % 4],
            marker="o" if len(x) == 1 else None,
        )
        if each.low is not None and each.high is not None:
            low, high = ([value * tall for value in end] for end in (each.low, each.high))
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    if chart.level is not None:
        axes.axhline(chart.level, color=colors.muted, linewidth=1.0)
    if chart.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: count(value))
    _name_x(axes, chart.x_axis.replace("hours", symbol, 1) if is_hours else chart.x_axis)
    axes.set_ylabel(chart.y_axis.replace("hours", tall_symbol, 1) if tall_symbol else chart.y_axis)
    axes.grid(color=colors.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    if len(chart.series) > 1:
        _legend(axes, colors, len(chart.series))


def _name_x(axes: Axes, text: str) -> None:
    """Name the axis so that a long name goes on to the left, where labels leave it room."""
    axes.set_xlabel(text, x=1.0, ha="right")


def _legend(axes: Axes, colors: Palette, entries: int, columns: int = 2) -> None:
    """Name the marks below the axes, where they cover nothing."""
    canvas: Any = axes.figure
    canvas.legend(
        loc="lower center",
        ncols=min(entries, columns),
        frameon=False,
        labelcolor=colors.ink,
        fontsize=8.5,
        borderaxespad=0.2,
        labelspacing=0.3,
    )
