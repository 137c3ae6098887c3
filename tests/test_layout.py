"""How the source is laid out: the width of a line, and a formatter that is never switched off."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipeline", "tests", "benchmarks", "docs")
WIDEST = 100
PRAGMA = re.compile(r"\s+# (?:noqa: \w+|(?:type|pyright): ignore(?:\[[\w-]+\])?)$")
"""What a checker reads can stand nowhere but at its line's end; the formatter does not count it."""
SWITCHED_OFF = re.compile(r"#\s*fmt:\s*(?:skip|off)|#\s*yapf:\s*disable")


def sources() -> list[Path]:
    """Return every Python file of the project."""
    return sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))


def complaints(text: str) -> list[str]:
    """Return what is wrong with the layout of a file, line by line."""
    found: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if (width := len(PRAGMA.sub("", line))) > WIDEST:
            found.append(f"line {number}: {width} characters")
        if SWITCHED_OFF.search(line):
            found.append(f"line {number}: switches the formatter off")
    return found


def test_no_line_is_wide_and_the_formatter_is_never_switched_off() -> None:
    files = sources()
    assert len(files) > 300  # what finds nothing would pass
    wrong = {str(path.relative_to(ROOT)): complaints(path.read_text()) for path in files}
    assert {path: found for path, found in wrong.items() if found} == {}


@pytest.mark.parametrize("line", ["x" * 101, "# fmt" + ": skip", "x = 1  #fmt" + ":off"])
def test_the_checks_above_can_fail(line: str) -> None:
    assert complaints("x = 1\n" + line)[0].startswith("line 2: ")
    assert complaints("x" * 100 + "  # noqa: E501") == []
