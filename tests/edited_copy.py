"""A copy of the package with the edits that CONTRIBUTING.md lists, and what a recipe leaves there.

What such a list says is proven only where exactly its edits are made: `add_file` and `add_lines`
are all that a test has, and neither can change or remove what stands there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from test_wheel import SMALL

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Copy:
    """A copy of the package, and a folder to run it in."""

    root: Path
    work: Path

    @classmethod
    def make(cls, folder: Path) -> Copy:
        """Copy what a checkout needs to run recipes."""
        copy = cls(folder / "copy", folder / "work")
        for name in ("pipeline", "configs", "recipes"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy.root / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy.root)
        copy.work.mkdir()
        return copy

    def add_file(self, name: str, text: str) -> None:
        """Add a file."""
        path = self.root / name
        assert not path.exists()
        path.write_text(text)

    def add_lines(self, name: str, after: str, added: str) -> None:
        """Add lines to a file, after a line that stands there once."""
        path = self.root / name
        text = path.read_text()
        assert text.count(after) == 1, f"{name}: {after!r} stands there {text.count(after)} times"
        path.write_text(text.replace(after, after + added))

    def start(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m pipeline` with these words at toy size."""
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *SMALL, *words],
            cwd=self.work,
            env={**os.environ, "PYTHONPATH": str(self.root)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def run(self, *words: str) -> Path:
        """Do the same, and return the folder that the run leaves."""
        done = self.start(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        written = re.search(r"(\S+)/report\.(?:html|md)", done.stdout)
        assert written is not None, done.stdout
        return Path(written.group(1))


def result_of(folder: Path) -> dict[str, Any]:
    """Return the result of a run."""
    return json.loads((folder / "result.json").read_text())
