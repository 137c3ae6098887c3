"""With what and how the figures of a run were made."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.data.documents import Dataset
from pipeline.ledger.attempted import attempted

LIBRARIES = ("torch", "transformers", "accelerate", "hydra-core", "safetensors", "numpy")


def environment(command: str, data: Dataset, notes: Sequence[str]) -> dict[str, Any]:
    """Return with what and how the figures were made."""
    return {
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        **{name: _version(name) for name in LIBRARIES},
        "commit": commit(),
        "data": data.name,
        "data_digest": data.digest,
        "notes": list(dict.fromkeys(notes)),
    }


def commit() -> str | None:
    """Return the git commit of the checkout this package lies in; None for an installed wheel."""
    top = Path(__file__).resolve().parents[2]
    # Else git would find a repository above, such as one that holds the virtual environment.
    if not (top / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(top),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]

    def described() -> str | None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None

    return attempted(described, lambda _: None)  # no git on this machine


def _version(name: str) -> str | None:
    return attempted(lambda: version(name), lambda _: None)
