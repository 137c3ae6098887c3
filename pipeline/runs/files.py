"""The files that a run leaves for readers, written into its folder."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.report.formats import files_of
from pipeline.report.material import Material
from pipeline.store.artifacts import write_bytes, write_text


def write_files(folder: Path, material: Material) -> list[str]:
    """Write them and return their names. What cannot be made is said, and keeps nothing else from
    being written.
    """
    names: list[str] = []
    for name, content in files_of(material, lambda why: print(f"note: {why}", file=sys.stderr)):
        if isinstance(content, bytes):
            write_bytes(folder / name, content)
        else:
            write_text(folder / name, content)
        names.append(name)
    return names
