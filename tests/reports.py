"""Reports of results that tests make: no folder, no journal."""

from __future__ import annotations

from typing import Any

from pipeline.report import markdown as module
from pipeline.report.material import Material
from pipeline.report.sections import sections_of


def markdown(result: Any) -> str:
    """Return all sections of a report as Markdown, without its pictures."""
    material = Material(result)
    return f"{module.opening(material)}\n\n{module.sections_text(sections_of(material))}\n"


def short_form(result: Any, limit: int = module.MOST_IN_MLFLOW) -> str:
    """Return the short form."""
    return module.short_form(Material(result), limit)
