"""Strings that others chose (arm names, reasons, commands) made safe for a terminal and for
Markdown.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable

from pipeline.errors import one_line
from pipeline.ledger.shapes import Conclusion

_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$]|(?<![^\W_])_|_(?![^\W_])")
"""Underscores inside a word are no emphasis (GitHub flavoured Markdown, section 6.2):
`control_compute` stays.
"""
_BLOCK = re.compile(r"^(?=[#+=-])|(?<=^)(\d+)(?=[.)])")
"""What would begin a heading, a list or a rule inside a list item (CommonMark, chapter 4 and 5)."""
LONGEST = 4000
"""Characters of a sentence."""
ELLIPSIS = ".."
NO_BREAK = "\N{NO-BREAK SPACE}"


def markdown_text(text: object, limit: int = 1000) -> str:
    """Return `text` so that Markdown shows it literally, inside a table cell or a paragraph."""
    literal = one_line(text, limit).replace("&", "&amp;")
    return _MARKDOWN.sub(lambda match: "\\" + match.group(), literal)


def code_text(text: object, limit: int = 100) -> str:
    """Return `text` so that it can stand between two backticks of Markdown."""
    return one_line(text, limit).replace("`", "'")


def bullet(text: object) -> str:
    """Return `text` as a Markdown list item that holds it literally."""
    literal = markdown_text(text, LONGEST)
    return "- " + _BLOCK.sub(lambda match: match.group() + "\\", literal)


def conclusion_lines(conclusion: Conclusion, width: int) -> list[str]:
    """Return a conclusion for a terminal: the verdict, then a bullet for each answer."""
    verdict = wrap(one_line(conclusion["verdict"], LONGEST), width)
    answers = (f"- {one_line(text, LONGEST)}" for text in conclusion["answers"])
    return verdict + [line for text in answers for line in wrap(text, width, "  ")]


def conclusion_markdown(conclusion: Conclusion) -> str:
    """Return a conclusion for a report: a paragraph, then a list of the answers."""
    verdict = f"**Conclusion.** {markdown_text(conclusion['verdict'], LONGEST)}"
    return "\n".join([verdict, "", *map(bullet, conclusion["answers"])]).rstrip()


def columns(text: str) -> int:
    """Return how many terminal columns `text` takes: two for wide characters, none for combining
    ones.
    """
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Fill `text` up with spaces to `width` terminal columns."""
    fill = " " * (width - columns(text))
    return fill + text if right else text + fill


def shorten(names: Iterable[str], width: int) -> list[str]:
    """Return the names at `width` columns at most, cut in the middle; names that become alike get a
    number.
    """
    short: list[str] = []
    for name in names:
        candidate, number = _cut_middle(name, width), 1
        while candidate in short:
            number += 1
            candidate = _head(name, width - len(f"~{number}")) + f"~{number}"
        short.append(candidate)
    return short


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Break `text` into lines of `width` columns at most, the further ones indented; never at a
    NO_BREAK space.
    """
    # textwrap counts characters, not columns
    limit = width if columns(text) == len(text) else width // 2
    lines = textwrap.wrap(text, limit, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace(NO_BREAK, " ") for line in lines]


def _cut_middle(name: str, width: int) -> str:
    if columns(name) <= width:
        return name
    tail_width = (width - len(ELLIPSIS)) // 2
    tail = _head(name[::-1], tail_width)[::-1]
    return _head(name, width - len(ELLIPSIS) - tail_width) + ELLIPSIS + tail


def _head(name: str, width: int) -> str:
    """Return the longest start of `name` that fits into `width` columns."""
    while columns(name) > width:
        name = name[:-1]
    return name
