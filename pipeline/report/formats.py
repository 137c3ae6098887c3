"""The files that a run leaves for readers: each line is a name, and what writes it.

A format is a module of this folder with a function from a result, and the verdict of a release
check, to the file's text; None where such a run leaves no such file.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.ledger.shapes import NoVerdict, Result, VerdictFile
from pipeline.report.junit import junit_report
from pipeline.report.markdown import markdown_report

Writer = Callable[[Result, VerdictFile | NoVerdict | None], str | None]

WRITERS: dict[str, Writer] = {
    "junit.xml": junit_report,  # of a release check
    "report.md": markdown_report,
}


def files_of(result: Result, verdict: VerdictFile | NoVerdict | None) -> dict[str, str]:
    """Return the text of every file that this run leaves, by name."""
    written = {name: write(result, verdict) for name, write in WRITERS.items()}
    return {name: text for name, text in written.items() if text is not None}
