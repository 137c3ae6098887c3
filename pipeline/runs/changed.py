"""Which settings of a run differ from their defaults: what a reader of MLflow looks for first."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from pipeline.config.settings.run import Run
from pipeline.stages.base import Stage
from pipeline.store.artifacts import flat, plain


def changed(run: Run) -> list[str]:
    """Return the names of the settings that are not what they are without a recipe, a file or a
    word on the command line; `redact_settings` and `flat` give their values.
    """
    defaults = flat(plain(Run()))
    for name, stage in run.stages.items():
        defaults |= flat(stage_defaults(type(stage)), f"stages.{name}.")
    absent = object()
    return [name for name, value in flat(plain(run)).items() if value != defaults.get(name, absent)]


def stage_defaults(of_type: type[Stage]) -> dict[str, Any]:
    """Return what a stage's settings are where nobody sets them; a setting without a default is
    left out.
    """
    found: dict[str, Any] = {}
    for each in fields(of_type):
        if each.default is not MISSING:
            found[each.name] = plain(each.default)
        elif each.default_factory is not MISSING:
            found[each.name] = plain(each.default_factory())
    return found
