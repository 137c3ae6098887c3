"""report.html: one file with all of it. It asks no network for anything and runs no script but its
own, which sorts tables.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pipeline.errors import one_line
from pipeline.ledger.attempted import attempted
from pipeline.report.blocks import Block, Figure, Section
from pipeline.report.drawing import DARK, LIGHT, as_svg

if TYPE_CHECKING:
    from jinja2 import Template


MOST = 4000
"""Characters of one text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a page begins with.

    Attributes:
        kind: Of page, in a word or two.
        badge: The answer in a word.
        mood: `good`, `bad` or `undecided`.
        verdict: The answer in one sentence; `answers` are what it rests on.
        facts: Run, device, date.
        is_dense: Whether it is to fit one screen: small, in two columns where there is room.
    """

    title: str
    kind: str
    badge: str
    mood: str
    verdict: str
    answers: Sequence[str] = ()
    question: str = ""
    facts: Sequence[str] = ()
    footer: str = ""
    is_dense: bool = False


@dataclass(frozen=True, slots=True)
class Drawn:
    """A chart as SVG, or why there is none."""

    svg: Any
    why: str


def page(head: Head, sections: Sequence[Section], *, charts: bool = True) -> str:
    """Return a page. Everything that others wrote is shown as text.

    Args:
        charts: Draw them; else their data alone is shown.
    """
    from markupsafe import Markup

    script = _text("report.js")
    shown = [
        {
            "name": section.name,
            "title": section.title,
            "blocks": [
                (type(block).__name__, block, _drawn(block, charts=charts))
                for block in section.blocks
            ],
        }
        for section in sections
    ]
    return _template().render(
        head=head,
        sections=shown,
        light=LIGHT.named(),
        dark=DARK.named(),
        style=Markup(_text("report.css")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _drawn(block: Block, *, charts: bool) -> Drawn | None:
    """Return a chart drawn; whatever goes wrong, its table is there. None: it is no chart."""
    from markupsafe import Markup

    if not isinstance(block, Figure):
        return None
    if not charts:
        return Drawn(None, "tracking.charts=false")
    why: list[str] = []
    svg = attempted(lambda: Markup(as_svg(block)), why.append)
    return Drawn(svg, one_line("; ".join(why), 200))


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(_text("report.html.j2"))


def _plain(value: object) -> object:
    """Return what is written into the page without control and invisible characters."""
    from markupsafe import Markup

    return (
        value if isinstance(value, Markup) or not isinstance(value, str) else one_line(value, MOST)
    )


def _text(name: str) -> str:
    return files("pipeline.report").joinpath("templates", name).read_text(encoding="utf-8")
