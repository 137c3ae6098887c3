"""Hydra's and OmegaConf's errors as one line: key, what is wrong, what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from pipeline.config import Run, dotted_keys
from pipeline.errors import Exit, UserError
from pipeline.recipes import Recipe
from pipeline.stages.table import STAGES
from pipeline.validate import did_you_mean

KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
"""OmegaConf's names of types, in words."""


def explain(error: Exception, args: list[str], recipes: dict[str, Recipe]) -> tuple[int, str]:
    """Return the exit code and the line for an error of composing."""
    if isinstance(error, OverrideParseException):
        return Exit.UNPARSABLE, str(UserError(error.override, "cannot be parsed", "write key=value"))
    return Exit.REFUSED, str(_as_user_error(error, args, recipes))


def _as_user_error(error: Exception, args: list[str], recipes: dict[str, Recipe]) -> UserError:
    if isinstance(error, MissingConfigException):
        return _missing_choice(error, recipes)
    sweep = re.search(r"Ambiguous value for argument '([^=']+)=", str(error))
    if sweep:
        return UserError(sweep.group(1), "has several values", "add -m to run one job for each, or quote the value")
    cause = _root(error)
    first, *details = str(cause).splitlines()
    in_details = next((line.split("full_key:")[1].strip() for line in details if "full_key:" in line), "")
    key = in_details or _overridden(error) or "settings"
    given = next((arg.partition("=")[2] for arg in reversed(args) if arg.partition("=")[0].lstrip("+") == key), "?")
    first = re.sub(r"\$VALUE_TYPE", "text", first).replace("$VALUE", given)  # OmegaConf leaves these unfilled
    problem = first[:1].lower() + first[1:]
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = _overridden(error) or key
        return UserError(key, "there is no such setting", did_you_mean(key, _known_keys(args, recipes)))
    if isinstance(cause, ValidationError):
        return _wrong_type(key, problem, given)
    if isinstance(cause, InterpolationKeyError):
        return UserError(key, problem, "name a setting that exists")
    group = re.match(r"Could not override '([^'@]+)", str(error))
    key = group.group(1) if group else key
    return UserError(key, problem, did_you_mean(key, _known_keys(args, recipes)))


def _wrong_type(key: str, problem: str, given: str) -> UserError:
    wanted = re.search(r"could not be converted to (\w+)", problem)
    if wanted and wanted.group(1) in KINDS:
        kind = KINDS[wanted.group(1)]
        return UserError(key, f"{given!r} is not {kind}", f"give {kind}")
    if problem.endswith("is not Optional"):
        return UserError(key, "null is no value for it", f"leave {key} out, or give a value")
    return UserError(key, problem, "give a value of that type")


def _root(error: BaseException) -> BaseException:
    """Return the OmegaConf error that a chain of exceptions started from, else the error itself."""
    found: BaseException = error
    step: BaseException | None = error
    while step is not None:
        if isinstance(step, OmegaConfBaseException):
            found = step
        step = step.__cause__ or step.__context__
    return found


def _overridden(error: Exception) -> str | None:
    match = re.search(r"(?:Could not override|Error merging override) '?([^'=\s]+)", str(error))
    return match.group(1).lstrip("+~") if match else None


def _missing_choice(error: MissingConfigException, recipes: dict[str, Recipe]) -> UserError:
    group, _, choice = str(error.missing_cfg_file or "?").rpartition("/")
    options = list(recipes) if group == "recipe" else [str(option) for option in error.options or []]
    return UserError(group or choice, f"there is no {choice!r}", did_you_mean(choice, options))


def _known_keys(args: list[str], recipes: dict[str, Recipe]) -> list[str]:
    return [*dotted_keys(Run), *_stage_keys(args, recipes)]


def _stage_keys(args: list[str], recipes: dict[str, Recipe]) -> Iterator[str]:
    """Yield `stages.NAME.SETTING` for the recipe on the command line."""
    name = next((arg.partition("=")[2] for arg in args if arg.startswith("recipe=")), "")
    if name not in recipes:
        return
    text = recipes[name].path.read_text(encoding="utf-8")
    for stage, type_name in re.findall(r"/stage@stages\.(\w+):\s*(\w+)", text):
        yield f"stages.{stage}"
        settings: Any = STAGES.get(type_name)
        if settings is not None:
            yield from dotted_keys(settings, f"stages.{stage}.")
