"""Reports as Markdown: report.md, and what MLflow shows as a run's description."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from pipeline.errors import one_line
from pipeline.ledger.attempted import attempted
from pipeline.report.blocks import Block, Bullets, Code, Figure, Prose, Section, Table, Terms
from pipeline.report.drawing import as_png
from pipeline.report.material import Material
from pipeline.report.sections import answer_of, sections_of
from pipeline.report.text import bullet, conclusion_markdown, markdown_text
from pipeline.report.verdict import markdown_line
from pipeline.report.view import device_words

MOST_IN_MLFLOW = 8000
"""Characters of a description that MLflow shows."""
_CUT = "\n*(cut here; the whole report is `report.html` among the run's artifacts)*\n"
_WHOLE = (
    "The whole report, with its charts and what the figures mean: `report.html` beside this file."
)


def markdown_report(material: Material) -> str:
    """Return report.md: the first sections of the report, with their charts as pictures beside
    it.
    """
    first = [section for section in sections_of(material) if section.is_first]
    return _whole([opening(material), sections_text(first, pictures=material.charts), _WHOLE])


def short_form(material: Material, limit: int = MOST_IN_MLFLOW) -> str:
    """Return the same without pictures, cut at a line's end to at most `limit` characters."""
    first = [section for section in sections_of(material) if section.is_first]
    text = _whole([opening(material), sections_text(first)])
    if len(text) <= limit:
        return text
    room = limit - len(_CUT)
    end = text.rfind("\n", 0, max(room, 0))
    return text[:limit] if end < 0 else text[: end + 1] + _CUT


def pictures(material: Material, otherwise: Callable[[str], None]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every picture that report.md shows.

    Args:
        otherwise: Told in a line of each that could not be drawn.
    """
    for section in sections_of(material) if material.charts else ():
        for block in section.blocks:
            if section.is_first and isinstance(block, Figure):
                name = f"{block.name}.png"
                failed = lambda why, name=name: otherwise(f"{name} could not be drawn ({why})")
                drawn = attempted(lambda block=block: as_png(block), failed)
                if drawn is not None:
                    yield name, drawn


def opening(material: Material) -> str:
    """Return what stands before the sections: a gate's verdict, the question and the answer."""
    result, verdict = material.result, material.result["verdict"] or material.verdict
    line = [] if verdict is None else [markdown_line(verdict)]  # a gate's report begins with it
    return _whole(
        [
            *line,
            f"# {markdown_text(result['recipe'])}: {result['status']}",
            f"**Question.** {markdown_text(result['question'])}",
            conclusion_markdown(answer_of(result)),
            f"Run `{_code(result['run_id'])}`, {markdown_text(device_words(result))}.",
        ]
    ).rstrip()


def sections_text(sections: Sequence[Section], *, pictures: bool = False) -> str:
    """Return sections as Markdown.

    Args:
        pictures: Show charts, as files of their names; else they are left out.
    """
    return "\n\n".join(
        "\n".join([f"## {section.title}", "", *_lines(section.blocks, pictures=pictures)])
        for section in sections
        if any(pictures or not isinstance(block, Figure) for block in section.blocks)
    )


def _lines(blocks: Iterable[Block], *, pictures: bool) -> list[str]:
    lines: list[str] = []
    for block in blocks:
        match block:
            case Prose():
                own = [markdown_text(block.text, 4000)]
            case Bullets():
                own = [
                    f"- **{markdown_text(item)}**" if number < block.first else bullet(item)
                    for number, item in enumerate(block.items)
                ]
            case Table():
                own = _table(block)
            case Code():
                # Indented: a fence could be closed by what the command holds, or by a cut.
                own = [f"    {one_line(block.text, 2000)}"]
            case Terms():
                own = [
                    f"- `{name}` ({unit}): {markdown_text(meaning)}"
                    for name, unit, meaning in block.items
                ]
            case Figure() if pictures:
                own = [f"![{markdown_text(block.title)}]({block.name}.png)"]
            case Figure():
                continue
        lines += ["", *own] if lines else own
    return lines


def _table(table: Table) -> list[str]:
    rows = [
        f"| {' | '.join(markdown_text(cell, 300) for cell in cells)} |"
        for cells in (table.head, *table.body)
    ]
    return [rows[0], f"|{' --- |' * len(table.head)}", *rows[1:]]


def _whole(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _code(text: object) -> str:
    return one_line(text, 100).replace("`", "'")
