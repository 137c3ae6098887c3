"""Folders that say themselves what their files are: what `datasets` saves, and Hub cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.formats import refuse_special
from pipeline.data.split_names import Found, listing, natural, pick_splits
from pipeline.errors import UserError


def saved_files(folder: Path, chosen: Mapping[str, str], key: str) -> Found | None:
    """Return the files of a folder that `save_to_disk` made, of a Dataset or a DatasetDict; None
    for another.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json", key).get("splits")
        if not isinstance(names, list) or not all(_is_plain_name(name) for name in names):
            raise UserError(
                key, f"{folder / 'dataset_dict.json'} names no splits", "save the data anew"
            )
        by_name = {str(name): _arrow_files(folder / str(name), key) for name in names}
        return Found(*pick_splits(by_name, chosen, key))
    if (folder / "state.json").is_file():
        return Found({"train": _arrow_files(folder, key)}, [])
    return None


def _arrow_files(folder: Path, key: str) -> list[Path]:
    listed = _read_json(folder / "state.json", key).get("_data_files")
    names = [each.get("filename") if isinstance(each, dict) else None for each in listed or []]
    if not names or not all(_is_plain_name(name) for name in names):
        raise UserError(key, f"{folder / 'state.json'} names no data files", "save the data anew")
    for name in names:
        refuse_special(folder / str(name), key)
    return [folder / str(name) for name in names]


def _is_plain_name(name: Any) -> bool:
    return (
        isinstance(name, str) and bool(name) and Path(name).name == name and name not in (".", "..")
    )


def _read_json(path: Path, key: str) -> dict[str, Any]:
    refuse_special(path, key)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(key, f"{path} cannot be read ({error})", "save the data anew") from None
    if not isinstance(value, dict):
        raise UserError(key, f"{path} is not an object", "save the data anew")
    return value


def card_files(
    folder: Path, subset: str | None, chosen: Mapping[str, str], key: str
) -> Found | None:
    """Return the files that a Hub card (README.md) names; None where it names none."""
    configs = _card_configs(folder / "README.md")
    if not configs:
        return None
    names = [str(each.get("config_name", "default")) for each in configs]
    wanted = subset if subset is not None else _default_config(configs, names)
    if wanted is None:
        raise UserError(
            "data.subset", f"{folder} has {', '.join(names)}", f"choose one: data.subset={names[0]}"
        )
    if wanted not in names:
        raise UserError("data.subset", f"there is no {wanted!r}", f"known: {', '.join(names)}")
    config = configs[names.index(wanted)]
    base = folder / str(config.get("data_dir") or "")
    by_name = {
        name: _globbed(base, folder, patterns, key) for name, patterns in _patterns(config).items()
    }
    return Found(*pick_splits(by_name, chosen, key))


def _card_configs(card: Path) -> list[dict[str, Any]]:
    """Return the configurations of a card's front matter that name data files."""
    import yaml

    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.DOTALL)
    try:
        front = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return []
    configs = front.get("configs") if isinstance(front, dict) else None
    return [each for each in configs or [] if isinstance(each, dict) and each.get("data_files")]


def _default_config(configs: list[dict[str, Any]], names: list[str]) -> str | None:
    if len(names) == 1:
        return names[0]
    marked = next(
        (name for name, each in zip(names, configs, strict=True) if each.get("default") is True),
        None,
    )
    return marked or ("default" if "default" in names else None)


def _patterns(config: dict[str, Any]) -> dict[str, list[str]]:
    """Return the patterns of a configuration by split: one pattern, a list of them, or splits with
    their paths.
    """
    given = config["data_files"]
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    if isinstance(given, str):
        given = [given]
    found: dict[str, list[str]] = {}
    for each in given:
        split, paths = (
            (each.get("split", "train"), each.get("path"))
            if isinstance(each, dict)
            else ("train", each)
        )
        found.setdefault(str(split), []).extend(
            [paths] if isinstance(paths, str) else list(paths or [])
        )
    return found


def _globbed(base: Path, folder: Path, patterns: list[str], key: str) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        parts = Path(pattern).parts
        if Path(pattern).is_absolute() or ".." in parts:
            raise UserError(
                key, f"its README.md names {pattern!r}, outside of the folder", "mend the card"
            )
        matches = sorted(
            (path for path in base.glob(pattern) if path.is_file()), key=lambda p: natural(str(p))
        )
        if not matches:
            raise UserError(
                key,
                f"its README.md names {pattern!r}, and {folder} has no such file",
                "get that file",
            )
        found += [path for path in matches if path not in found]
    return found


def subset_folder(folder: Path, subset: str) -> Path:
    """Return the sub-folder that `data.subset` names.

    Raises:
        UserError: If there is none.
    """
    if not _is_plain_name(subset) or not (folder / subset).is_dir():
        have = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
        raise UserError(
            "data.subset",
            f"{folder} has no {subset!r}",
            f"it has {listing(have) or 'no sub-folders'}",
        )
    return folder / subset
