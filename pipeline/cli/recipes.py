"""Where configs and recipes lie, what each recipe asks, and what a recipe may say. Imports nothing
heavy at once: the list must print immediately.

Recipes are data. A recipe file, whoever wrote it, holds settings of `Run`, and `defaults` that
place stages or choose from groups that ship. What would have a library run code, or would carry the
environment into a run, is refused by file and key, at any depth.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.text_files import NotAFile, read_bytes, read_text_file
from pipeline.config.yaml_files import MAX_BYTES, check_growth
from pipeline.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]  # the folder pipeline/
REMEDY = "start from a copy of a shipped recipe"
GROUPS = (
    "model",
    "student",
    "data",
    "precision",
    "hardware",
    "training",
    "quality",
    "serving",
    "cost",
    "policy",
    "tracking",
)
"""Folders of `configs/`, each with the settings of one field of `Run`."""
CODE = ("hydra", "auto_map", "trust_remote_code", "custom_pipelines")
"""Keys by which Hydra and transformers learn which code to run; `_target_` and its kin are
recognised by shape.
"""
ODD_TO_OMEGACONF = (ValueError, TypeError, AssertionError, AttributeError, RecursionError)
"""What OmegaConf lets through, beside its own errors, where a text is no settings."""
TAGS = ("str", "int", "float", "bool", "null", "map", "seq", "merge")
_STAGE = re.compile(r"/stage@stages\.([A-Za-z]\w*)", re.ASCII)
_CHOICE = re.compile(r"(?:override\s+)?/?([a-z_]+)")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PLAIN = re.compile(r"\$\{\.*[A-Za-z_][\w.\[\]]*\}")
"""An interpolation that names another setting, and nothing else."""


def _shipped(name: str) -> Path:
    """Return the folder `name` of the checkout, else the copy that a wheel carries inside the
    package.
    """
    checkout = PACKAGE.parent / name
    return checkout if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE / f"_{name}"


def config_dir() -> Path:
    """Return the folder of `config.yaml` and its groups."""
    return _shipped("configs")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe file and the question in its first comment line."""

    name: str
    path: Path
    question: str


def find_recipes(extra: list[Path]) -> dict[str, Recipe]:
    """Return the shipped recipes and those of `--recipe-dir`, by name; a user's recipe wins over a
    shipped one.

    Raises:
        UserError: If a folder named by `--recipe-dir` is not there.
    """
    for folder in extra:
        if not folder.is_dir():
            raise UserError(
                "--recipe-dir", f"{folder} is not a folder", "name a folder of recipe files"
            )
    files = [
        path for folder in (_shipped("recipes"), *extra) for path in sorted(folder.glob("*.yaml"))
    ]
    return {path.stem: Recipe(path.stem, path, _question(path)) for path in files}


def is_shipped(recipe: Recipe) -> bool:
    """Tell whether a recipe came with this package."""
    return recipe.path.parent == _shipped("recipes")


def _question(path: Path) -> str:
    """Return the first comment line; a file that cannot be read says why when it is asked for."""
    try:
        text = read_bytes(path, limit=MAX_BYTES).decode("utf-8", errors="replace")
    except NotAFile as error:
        return f"(no recipe: {error})"
    except OSError as error:
        return f"(no recipe: {error.strerror})"
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
        if line and not line.startswith("#"):
            break
    return "(no question in its first comment line)"


# -- what a recipe may say ------------------------------------------------------------------------


def recipe_text(recipe: Recipe) -> str:
    """Return the text of a recipe.

    Raises:
        UserError: If it cannot be read, or is no file of a recipe's size.
    """
    return read_text_file(recipe.path, "recipe", REMEDY, limit=MAX_BYTES)


def read_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a recipe holds, with its name and its question.

    Raises:
        UserError: Naming the file and the key, if it holds anything else.
    """
    settings = read_settings(recipe.path, recipe_text(recipe))
    # YAML 1.1 reads a bare `on` as true; in a comparison it is a key.
    compare = settings.get("compare") or []
    if not isinstance(compare, list):
        raise _refused(
            recipe.path, "compare", "is no list of pairs", "give [{arm: ..., base: ..., on: [...]}]"
        )
    settings["compare"] = [
        (
            {"on" if key is True else key: value for key, value in pair.items()}
            if isinstance(pair, dict)
            else pair
        )
        for pair in compare
    ]
    _check_keys(recipe.path, settings)
    _check_defaults(recipe.path, settings.get("defaults", []))
    refuse_code(
        {name: value for name, value in settings.items() if name != "defaults"}, str(recipe.path)
    )
    return {**settings, "recipe": recipe.name, "question": recipe.question}


def read_settings(path: Path, text: str) -> dict[Any, Any]:
    """Return what a YAML file says.

    Raises:
        UserError: If it is no YAML, holds no settings, has tags that make objects, or aliases that
            multiply it.
    """
    return copy.deepcopy(_parsed(path, text))


@lru_cache(maxsize=64)
def _parsed(path: Path, text: str) -> dict[Any, Any]:
    """Parse a YAML file; one command asks several times for the recipes that it names."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        check_growth(path, text, "recipe", REMEDY)
        _check_tags(path, text)
        node = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, *ODD_TO_OMEGACONF) as error:
        if isinstance(error, UserError):
            raise
        said = " ".join(str(error).split())
        raise UserError("recipe", f"{path} is not valid YAML ({said})", "mend the file") from None
    if not isinstance(node, dict) or all(value is None for value in node.values()):
        raise UserError("recipe", f"{path} holds no settings", REMEDY)
    return dict(node)


def _check_tags(path: Path, text: str) -> None:
    """Refuse tags, which make objects."""
    import yaml

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        tag = getattr(event, "tag", None)
        if tag is not None and tag.removeprefix("tag:yaml.org,2002:") not in TAGS:
            raise _refused(path, tag, "is a tag, which makes an object", "write plain settings")


def _check_keys(path: Path, settings: dict[Any, Any]) -> None:
    """Refuse what is no field of `Run`, beside `defaults`."""
    from pipeline.cli.validate import did_you_mean
    from pipeline.config.settings.run import Run

    known = [item.name for item in fields(Run)]
    for key in settings:
        _check_key(path, str(key), key)
        if key not in (*known, "defaults"):
            raise _refused(
                path, str(key), "there is no such setting", did_you_mean(str(key), known)
            )


def _check_defaults(path: Path, defaults: Any) -> None:
    """Refuse what neither places a stage nor chooses from a group that ships, nor builds on another
    recipe.
    """
    from pipeline.stages.table import STAGES

    if not isinstance(defaults, list):
        raise _refused(path, "defaults", "is no list", "write - /stage@stages.NAME: TYPE")
    for entry in defaults:
        if isinstance(entry, str) and _NAME.fullmatch(entry):  # another recipe, or _self_
            continue
        if not isinstance(entry, dict) or len(entry) != 1:
            raise _refused(
                path, "defaults", f"{entry!r} chooses nothing", "write - /stage@stages.NAME: TYPE"
            )
        ((group, choice),) = entry.items()
        group = str(group)
        named = isinstance(choice, str) and _NAME.fullmatch(choice)
        if _STAGE.fullmatch(group):
            if not named or choice not in STAGES:
                problem = f"{choice!r} is no type of stage"
                raise _refused(path, f"defaults: {group}", problem, f"known: {', '.join(STAGES)}")
            continue
        if group.startswith("/stage@stages."):
            remedy = "use English letters, digits and _, a letter first"
            raise _refused(path, f"defaults: {group}", "is no name for a stage", remedy)
        chosen = _CHOICE.fullmatch(group)
        if (
            chosen is None
            or chosen.group(1) not in (*GROUPS, "recipe")
            or not (named or choice is None)
        ):
            known = ", ".join(GROUPS)
            raise _refused(
                path,
                f"defaults: {group}",
                "is no group that a recipe may choose from",
                f"known: {known}",
            )


def refuse_code(settings: Any, where: str) -> None:
    """Refuse settings that name code, or that read anything but other settings, at any depth.

    Args:
        where: The file, as refusals name it.

    Raises:
        UserError: Naming file and key.
    """
    for key, value in _leaves(settings, ""):
        _check_key(where, key, key.rpartition(".")[2])
        if isinstance(value, str):
            _check_text(where, key, value)


def refuse_code_keys(settings: Any, where: str) -> None:
    """Refuse keys that name code in what a user typed; what it reads is the user's own.

    Raises:
        UserError: Naming the key.
    """
    named = next((key for key, _ in _leaves(settings, "") if names_code(key)), None)
    if named is not None:
        raise UserError(named, f"names code, and {where} are data", "leave it out")


def names_code(key: object) -> bool:
    """Tell whether a key, by its last part, is one that Hydra or transformers take for the name of
    code to run.
    """
    name = str(key).rpartition(".")[2].strip()
    return name in CODE or (
        len(name) > 2 and name.startswith("_") and name.endswith("_") and name != "_self_"
    )


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield every key with what stands there; of collections the key alone, with None."""
    if isinstance(value, dict):
        yield key, None
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        yield key, None
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, value


def _check_key(where: Path | str, full: str, key: object) -> None:
    if names_code(key):
        raise _refused(where, full, "names code, and a recipe is data", "leave it out")
    if "${" in str(key):
        raise _refused(where, full, "is a key that is computed", "write the key itself")


def _check_text(where: Path | str, key: str, text: str) -> None:
    """Refuse an interpolation that is not `${another.setting}`."""
    at = text.find("${")
    while at >= 0:
        plain = _PLAIN.match(text, at)
        if plain is None or re.split(r"[.\[\]]", plain.group()[2:-1].lstrip("."))[0] == "hydra":
            raise _refused(where, key, *_why_not_read(text[at:], key))
        at = text.find("${", plain.end())


def _why_not_read(text: str, key: str) -> tuple[str, str]:
    environment = re.match(r"\$\{\s*(?:oc\.)?env\s*:\s*['\"]?([\w-]*)", text)
    if environment is not None:
        name = environment.group(1)
        problem = f"wants the environment variable {name}, and a recipe reads none"
        return problem, f'pass it on the command line: {key}="${name}"'
    return (
        f"{text[:60]!r} computes a value, and a recipe is data",
        "write the value, or ${another.setting}",
    )


def _refused(where: Path | str, key: str, problem: str, remedy: str) -> UserError:
    return UserError("recipe", f"{where}: {key}: {problem}", remedy)


# -- a user's own choices of a group --------------------------------------------------------------


def find_choices(folders: list[Path]) -> dict[tuple[str, str], dict[Any, Any]]:
    """Return the settings in `--config-dir DIR/GROUP/NAME.yaml`, by group and name.

    Raises:
        UserError: If a folder is not there, a file lies where no group is, hides a choice that
            ships, or holds anything but settings of its group.
    """
    found: dict[tuple[str, str], dict[Any, Any]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                "--config-dir", f"{folder} is not a folder", "name a folder of GROUP/NAME.yaml"
            )
        for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
            group = path.parent.relative_to(folder).as_posix()
            if group not in GROUPS or path.suffix != ".yaml":
                known = ", ".join(GROUPS)
                raise UserError(
                    "--config-dir", f"{path} is of no group", f"put it into one of {known}"
                )
            if (config_dir() / group / path.name).is_file():
                raise UserError(
                    "--config-dir",
                    f"{path} hides the {path.stem} that ships",
                    "give it another name",
                )
            found[group, path.stem] = _read_choice(path, group)
    return found


def _read_choice(path: Path, group: str) -> dict[Any, Any]:
    from pipeline.cli.validate import did_you_mean
    from pipeline.config.settings.run import Run

    settings = read_settings(path, read_text_file(path, "--config-dir", REMEDY, limit=MAX_BYTES))
    refuse_code(settings, str(path))
    known = [item.name for item in fields(getattr(Run(), group))]
    for key in settings:
        if key not in known:
            raise _refused(
                path, str(key), f"is no setting of {group}", did_you_mean(str(key), known)
            )
    return settings
