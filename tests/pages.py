"""What README.md and docs/ hold that can be checked: commands, files to write, names of settings.

A block that needs what a test has not says so in the page, above the block:

    <!-- needs: hub -->         a model or data set of the Hub: a local one is put in its place
    <!-- needs: gpu -->         a GPU: `hardware.device=cpu`
    <!-- needs: server -->      an MLflow server: a store in a file
    <!-- needs: scheduler -->   a job file: its shell syntax is checked, and its command
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "console")
NEEDS = ("hub", "gpu", "server", "scheduler")
PROGRAM = ["python", "-m", "pipeline"]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    needs: str
    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a page: its words, `python -m pipeline` and variables before it apart.

    Attributes:
        words: Of another program all words; of the pipeline what follows its name.
    """

    page: str
    line: int
    needs: str
    is_ours: bool
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def page_paths() -> list[Path]:
    """Return the pages whose commands are checked."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks() -> Iterator[Block]:
    """Yield the fenced blocks of all pages."""
    for path in page_paths():
        text = path.read_text()
        for found in BLOCK.finditer(text):
            line = text.count("\n", 0, found.start(3)) + 1
            page = path.relative_to(ROOT).as_posix()
            yield Block(page, line, found[1] or "", found[2], found[3])


@cache
def commands() -> tuple[Command, ...]:
    """Return every command of the pages' shell blocks."""
    return tuple(
        command for block in blocks() if block.language in SHELL for command in _commands_of(block)
    )


def _commands_of(block: Block) -> Iterator[Command]:
    text = block.text.replace("\\\n", " ")
    continued = block.text.split("\n")
    for number, line in enumerate(text.split("\n")):
        at = block.line + _folded(continued, number)
        for words in _parts(shlex.split(line.removeprefix("$ "), comments=True)):
            while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.DOTALL):
                words = words[1:]
            if words[:1] == ["srun"]:
                words = words[1:]
            is_ours = words[:3] == PROGRAM
            if words:
                given = tuple(words[3:] if is_ours else words)
                yield Command(block.page, at, block.needs, is_ours, given)


def _parts(words: list[str]) -> Iterator[list[str]]:
    """Yield the commands of a line that `&&` joins."""
    while "&&" in words:
        at = words.index("&&")
        yield words[:at]
        words = words[at + 1 :]
    yield words


def _folded(lines: list[str], number: int) -> int:
    """Return the line at which a command begins, given its number among lines that are joined."""
    at = 0
    for _ in range(number):
        while lines[at].endswith("\\"):
            at += 1
        at += 1
    return at


def files_of_pages() -> dict[str, str]:
    """Return the files that pages show whole: YAML whose first line is a comment with its name."""
    found: dict[str, str] = {}
    for block in blocks():
        named = re.match(r"# ([\w/.-]+\.yaml)\b", block.text)
        if block.language == "yaml" and named:
            found[named[1]] = block.text
    return found


def code_spans() -> Iterator[tuple[str, str]]:
    """Yield page and text of every `code` in running text."""
    for path in page_paths():
        text = BLOCK.sub("", path.read_text())
        for span in re.findall(r"`([^`\n]+)`", text):
            yield path.relative_to(ROOT).as_posix(), span
