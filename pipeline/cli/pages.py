"""What the commands have in common that write a page: the runs that it is about, and its files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.report.blocks import Section
    from pipeline.report.page import Head


def places_of(reference: str, root: Path) -> list[Path]:
    """Return the folders that a run may be named by, an id, `latest` or a folder, the likeliest
    first.
    """
    name = reference.removeprefix("runs:/")
    if name == "latest":
        return [root / "latest"]
    return [root / "runs" / name, Path(reference).expanduser()]


def write_page(folder: Path, head: Head, sections: Sequence[Section]) -> None:
    """Write report.html, report.md and its pictures, and say where.

    Raises:
        UserError: If they cannot be written.
    """
    from pipeline.report.markdown import pictures_of, sections_markdown
    from pipeline.report.page import page
    from pipeline.store.artifacts import write_bytes, write_text

    try:
        write_text(folder / "report.html", page(head, sections))
        write_text(folder / "report.md", sections_markdown(head, sections))
        said = lambda why: print(f"note: {why}", file=sys.stderr)
        for name, content in pictures_of(sections, said):
            write_bytes(folder / name, content)
    except OSError as error:
        raise UserError(
            "--out", f"{folder} cannot be written ({error.strerror})", "give another folder"
        ) from error
    print(f"\nreport: {folder / 'report.html'}")
