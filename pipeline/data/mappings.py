"""Settings that are names by names: `data.columns`, `data.splits`, `data.label_map`."""

from __future__ import annotations

from typing import Any

from pipeline.config.settings.data import DataConfig
from pipeline.data.documents import SPLITS
from pipeline.errors import UserError


def mapping(value: Any, key: str) -> dict[str, str]:
    """Return a setting of names by names: an object of a recipe file, or as a command line writes
    it, `{a: b}`.

    Raises:
        UserError: If it is neither.
    """
    if isinstance(value, str):
        import yaml

        try:
            # every scalar stays the text it is written as
            value = yaml.load(value, yaml.BaseLoader)
        except yaml.YAMLError:
            value = None
    if (
        value is None
        or not isinstance(value, dict)
        or any(isinstance(part, dict | list) for part in value.values())
    ):
        raise UserError(key, "is no list of names with their names", "write it {a: b, c: d}")
    return {_as_written(name): _as_written(part) for name, part in value.items()}


def _as_written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def split_names(config: DataConfig) -> dict[str, str]:
    """Return what the data calls each split (`data.splits`).

    Raises:
        UserError: If a split is none of ours.
    """
    names = mapping(config.splits, "data.splits")
    unknown = next((name for name in names if name not in SPLITS), None)
    if unknown is not None:
        raise UserError(
            "data.splits", f"there is no split {unknown!r}", f"known: {', '.join(SPLITS)}"
        )
    return names
