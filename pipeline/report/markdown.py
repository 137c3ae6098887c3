"""Sections of a report as Markdown, and what stands before and after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from pipeline.errors import one_line
from pipeline.ledger.attempted import attempted
from pipeline.ledger.shapes import Conclusion, Result
from pipeline.report.blocks import Block, Bullets, Code, Figure, Prose, Section, Table, Terms
from pipeline.report.drawing import as_png
from pipeline.report.page import Head
from pipeline.report.text import bullet, code_text, conclusion_markdown, markdown_text
from pipeline.report.view import device_words

MOST_IN_MLFLOW = 8000
"""Characters of a description that MLflow shows."""
_CUT = "\n*(cut here; the whole report is `report.html` among the run's artifacts)*\n"
WHOLE = (
    "The whole report, with its charts and what the figures mean: `report.html` beside this file."
)


def pictures_of(
    sections: Iterable[Section], otherwise: Callable[[str], None]
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the pictures of the sections that stand in a short form."""
    for section in sections:
        for block in section.blocks:
            if section.is_first and isinstance(block, Figure):
                name = f"{block.name}.png"
                failed = lambda why, name=name: otherwise(f"{name} could not be drawn ({why})")
                drawn = attempted(lambda block=block: as_png(block), failed)
                if drawn is not None:
                    yield name, drawn


def sections_markdown(head: Head, sections: Sequence[Section]) -> str:
    """Return the Markdown form of a page: what it begins with, and the sections of its short
    form.
    """
    first = [section for section in sections if section.is_first]
    said = [bullet(each) for each in head.answers]
    return whole(
        [
            f"# {markdown_text(head.title)}",
            f"**{markdown_text(head.verdict)}**",
            "\n".join(said),
            sections_text(first, pictures=True),
            WHOLE,
        ]
    )


def opening(result: Result, title: str, said: Conclusion, line: str = "") -> str:
    """Return what stands before the sections: the question and the answer.

    Args:
        line: In Markdown, which the report begins with.
    """
    return whole(
        [
            line,
            f"# {markdown_text(title)}: {result['status']}",
            f"**Question.** {markdown_text(result['question'])}",
            conclusion_markdown(said),
            f"Run `{code_text(result['run_id'])}`, {markdown_text(device_words(result))}.",
        ]
    ).rstrip()


def cut(text: str, limit: int) -> str:
    """Return a report cut at a line's end to at most `limit` characters."""
    if len(text) <= limit:
        return text
    room = limit - len(_CUT)
    end = text.rfind("\n", 0, max(room, 0))
    return text[:limit] if end < 0 else text[: end + 1] + _CUT


def sections_text(sections: Sequence[Section], *, pictures: bool = False) -> str:
    """Return sections as Markdown.

    Args:
        pictures: Show charts, as files of their names; else they are left out.
    """
    return "\n\n".join(
        "\n".join([f"## {section.title}", "", *block_lines(section.blocks, pictures=pictures)])
        for section in sections
        if any(pictures or not isinstance(block, Figure) for block in section.blocks)
    )


def block_lines(blocks: Iterable[Block], *, pictures: bool = False) -> list[str]:
    """Return the lines of blocks."""
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


def whole(parts: Sequence[str]) -> str:
    """Return the parts of a report that there are, one after the other."""
    return "\n\n".join(part for part in parts if part) + "\n"
