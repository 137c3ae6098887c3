"""The one number of a run, to show elsewhere: a picture of 1200 x 630 and ten lines of Markdown."""

from __future__ import annotations

import io
import textwrap

from pipeline.errors import one_line
from pipeline.ledger.numbers import how_many
from pipeline.report.drawing import LIGHT, quietly
from pipeline.report.headline import badge_of, number_of
from pipeline.report.material import Material
from pipeline.report.sections import answer_of
from pipeline.report.text import code_text, markdown_text
from pipeline.report.view import device_words, seeds

SIZE_PX = 1200, 630
"""As pages show a link to another (Open Graph)."""
_DPI = 100
_PLACES = ((0.87, 15), (0.66, 76), (0.52, 17), (0.45, 17))
"""Height and size of text of the lines above the verdict."""


def card_markdown(material: Material) -> str:
    """Return the number with its interval, and what it rests on, for a README or a pull request."""
    result = material.result
    number, spread, what = number_of(result)
    found = seeds(result)
    lines = [
        f"**{markdown_text(number)}** ({markdown_text(spread)})",
        "",
        f"{markdown_text(what)}. **{markdown_text(badge_of(result)[0])}.**",
        "",
        f"> {markdown_text(answer_of(result)['verdict'], 1000)}",
        "",
        f"Recipe `{code_text(result['recipe'])}`, run `{code_text(result['run_id'])}`,"
        f" {how_many(len(found), 'seed')},"
        f" {markdown_text(device_words(result))}.",
        "",
        f"Made by: `{code_text(result['environment'].get('command') or 'not recorded', 200)}`",
    ]
    return "\n".join(lines) + "\n"


def card_picture(material: Material) -> bytes | None:
    """Return the same as a PNG of 1200 x 630; none where no charts are drawn."""
    if not material.charts:
        return None
    from matplotlib.figure import Figure

    result = material.result
    badge, mood = badge_of(result)
    number, spread, what = number_of(result)
    heads = (f"{one_line(result['recipe'], 40)}   {badge}", number, what, spread)
    colors = (getattr(LIGHT, mood), LIGHT.ink, LIGHT.ink, LIGHT.muted)
    with quietly("card"):
        canvas = Figure(figsize=(SIZE_PX[0] / _DPI, SIZE_PX[1] / _DPI), dpi=_DPI)
        for (height, size), text, color in zip(_PLACES, heads, colors, strict=True):
            bold = "bold" if size != _PLACES[-1][1] or height > 0.6 else "normal"
            canvas.text(0.06, height, text, fontsize=size, color=color, weight=bold, va="center")
        verdict = textwrap.wrap(one_line(answer_of(result)["verdict"], 330), 84)[:4]
        canvas.text(
            0.06, 0.36, "\n".join(verdict), fontsize=16, color=LIGHT.ink, va="top", linespacing=1.5
        )
        facts = f"run {one_line(result['run_id'], 60)}   {one_line(device_words(result), 60)}"
        canvas.text(0.06, 0.07, facts, fontsize=12, color=LIGHT.muted, va="center")
        file = io.BytesIO()
        canvas.savefig(file, format="png", dpi=_DPI, facecolor="white")
    return file.getvalue()
