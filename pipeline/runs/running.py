"""A run in progress: what it is, where its time went, and what it has made."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

from pipeline.runs.book import Book
from pipeline.runs.session import Session
from pipeline.runs.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Running:
    """The three parts of a run in progress, and what its end has to release.

    Attributes:
        lock: Of the run's folder.
        writer: The process that delivers the journal to MLflow, or None.
    """

    session: Session
    timeline: Timeline
    book: Book
    lock: Any
    writer: subprocess.Popen[bytes] | None = None
