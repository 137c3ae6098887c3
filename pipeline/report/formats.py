"""The files that a run leaves for readers: each line is a name, and what writes it.

A format is a module of this folder with a function from what a run left to the file's content; None
where such a run leaves no such file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipeline.ledger.attempted import attempted
from pipeline.report.card import card_markdown, card_picture
from pipeline.report.junit import junit_report
from pipeline.report.material import Material
from pipeline.report.run_report import html_report, markdown_report, pictures

Content = str | bytes
Writer = Callable[[Material], Content | None]

WRITERS: dict[str, Writer] = {
    "junit.xml": junit_report,  # of a release check
    "report.html": html_report,
    "report.md": markdown_report,
    "card.md": card_markdown,
    "card.png": card_picture,
}


def files_of(material: Material, otherwise: Callable[[str], None]) -> Iterator[tuple[str, Content]]:
    """Yield name and content of every file that this run leaves.

    Args:
        otherwise: Told in a line of each that could not be written; the others are.
    """
    for name, write in WRITERS.items():
        content = attempted(lambda write=write: write(material), _not_written(name, otherwise))
        if content is not None:
            yield name, content
    yield from pictures(material, otherwise)


def _not_written(name: str, otherwise: Callable[[str], None]) -> Callable[[str], None]:
    return lambda why: otherwise(f"{name} could not be written ({why})")
