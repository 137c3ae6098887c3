"""With what and how the figures of a run were made."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from pipeline.data.documents import Dataset
from pipeline.ledger.attempted import attempted
from pipeline.ledger.shapes import Environment


def environment(command: str, data: Dataset, notes: Sequence[str]) -> Environment:
    """Return with what and how the figures were made."""
    return {
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "accelerate": _version("accelerate"),
        "hydra-core": _version("hydra-core"),
        "safetensors": _version("safetensors"),
        "numpy": _version("numpy"),
        "commit": commit(),
        "data": data.name,
        "data_digest": data.digest,
        "notes": list(dict.fromkeys(notes)),
    }


def release() -> str:
    """Return the release of this package."""
    return _version("model-efficiency-pipeline") or "unknown"


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


@cache
def code_digest() -> str:
    """Return a digest of the sources of this package, committed or not."""
    package, whole = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        whole.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return whole.hexdigest()


def _version(name: str) -> str | None:
    return attempted(lambda: version(name), lambda _: None)
