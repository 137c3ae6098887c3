"""Reports of results that tests make: no folder, no journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.report import markdown as module
from pipeline.report import run_report
from pipeline.report.history import recent as blocks_of_history
from pipeline.report.material import Material
from pipeline.report.sections import sections_of
from pipeline.report.verdict import verdict_blocks


def markdown(result: Any) -> str:
    """Return all sections of a report as Markdown, without its pictures."""
    material = Material(result)
    return f"{run_report.opening_of(material)}\n\n{module.sections_text(sections_of(material))}\n"


def whole_report(folder: Path) -> str:
    """Return all sections of the report of a run that lies in a folder."""
    assert (folder / "report.md").is_file()
    assert (folder / "report.html").is_file()
    return markdown(json.loads((folder / "result.json").read_text()))


def short_form(result: Any, limit: int = module.MOST_IN_MLFLOW) -> str:
    """Return the short form."""
    return run_report.short_form(Material(result), limit)


def verdict_section(verdict: Any) -> list[str]:
    """Return the lines of a verdict, and of the releases before it."""
    history = verdict.get("history")
    lines = module.block_lines(verdict_blocks(verdict))
    return lines if not history else [*lines, "", *recent(history)]


def recent(history: Any) -> list[str]:
    """Return the lines on a model's last releases."""
    return module.block_lines(blocks_of_history(history))
