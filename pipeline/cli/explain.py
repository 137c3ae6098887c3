"""Hydra's and OmegaConf's errors as one line: key, what is wrong, what would be right."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from pipeline.cli.arguments import as_list, choices, elsewhere, item_type, parses
from pipeline.cli.recipes import GROUPS, Recipe, config_dir, is_shipped, read_recipe, recipe_text
from pipeline.cli.validate import did_you_mean
from pipeline.config.settings.ranges import dotted_keys
from pipeline.config.settings.run import REMOVED, Run
from pipeline.errors import Exit, UserError
from pipeline.stages.table import STAGES

KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
"""OmegaConf's names of types, in words."""


def explain(error: Exception, args: list[str], recipes: dict[str, Recipe]) -> tuple[int, str]:
    """Return the exit code and the line for an error of composing."""
    said = _of_a_list(error, args) or _of_a_group(args)
    if said is not None:
        return Exit.REFUSED, str(said)
    if isinstance(error, OverrideParseException):
        given = str(error.override)
        key, equals, _ = given.partition("=")
        is_of_value = equals and parses(f"{key}=x")  # an interpolation that does not end
        remedy = "close what it opens, or give a plain value" if is_of_value else "write key=value"
        return Exit.UNPARSABLE, str(UserError(given, "cannot be parsed", remedy))
    return Exit.REFUSED, str(as_user_error(error, args, recipes))


def _of_a_list(error: Exception, args: list[str]) -> UserError | None:
    """Return what to say where a list was given without its brackets, item by item, or as something
    else.
    """
    pairs = [
        arg.lstrip("+").partition("=")[::2]
        for arg in args
        if "=" in arg and not arg.startswith("-")
    ]
    for key, value in pairs:
        parent, _, last = key.rpartition(".")
        if item_type(parent) and last.isdecimal():
            return UserError(key, "one item of a list cannot be set", _listed(parent, value))
        is_list = value.startswith("[") and parses(f"{key}={value}")
        if item_type(key) and not is_list and _overridden(error) in (None, key):
            return UserError(key, f"{value!r} is no list", _listed(key, value))
    return None


def _listed(key: str, value: str) -> str:
    is_plain = not is_dataclass(item_type(key)) and value != "null"
    word = as_list(key, value.strip(" '\"[]")) if is_plain else None
    return (
        _list_wanted(key) if word is None else f"write the brackets, quoted for the shell: {word}"
    )


def _list_wanted(key: str) -> str:
    """Return what a setting that is a list takes, as a remedy."""
    if is_dataclass(item_type(key)):
        return "give [] for none, or pairs: [{arm: ..., base: ..., on: [...]}]"
    if names := choices(key):
        return f"give, in brackets, some of {', '.join(names)}"
    is_text = item_type(key) is str
    return "give texts in brackets: [a,b]" if is_text else "give whole numbers in brackets: [1,8]"


def _of_a_group(args: list[str]) -> UserError | None:
    """Return what to say where a group of settings was given a value, and not the name of a
    choice.
    """
    for arg in args:
        key, _, value = arg.partition("=")
        if key in GROUPS and value.startswith(("{", "[")):
            known = sorted(path.stem for path in (config_dir() / key).glob("*.yaml"))
            remedy = (
                f"name one of {', '.join(known)}, or give its settings one by one:"
                f" {key}.SETTING=..."
            )
            return UserError(key, f"{value[:60]!r} is no choice of {key}", remedy)
        if key == "recipe" and value.startswith(("{", "[")):
            return UserError(key, f"{value[:60]!r} is no recipe", "name one: recipe=NAME")
    return None


def as_user_error(error: Exception, args: list[str], recipes: dict[str, Recipe]) -> UserError:
    """Return an error of composing as a refusal."""
    if isinstance(error, MissingConfigException):
        return _missing_choice(error, recipes)
    sweep = re.search(r"Ambiguous value for argument '([^=']+)=", str(error))
    if sweep:
        return UserError(sweep.group(1), "has several values", "add -m to run one job for each")
    cause = _root(error)
    first, *details = str(cause).splitlines() or [type(cause).__name__]
    in_details = next(
        (line.split("full_key:")[1].strip() for line in details if "full_key:" in line), ""
    )
    key = _overridden(error) or in_details or _only_key(args) or "settings"
    given = next(
        (
            arg.partition("=")[2]
            for arg in reversed(args)
            if arg.partition("=")[0].lstrip("+") == key
        ),
        "?",
    )
    # OmegaConf leaves these unfilled
    first = re.sub(r"\$VALUE_TYPE", "text", first).replace("$VALUE", given)
    problem = first[:1].lower() + first[1:]
    absent = re.search(r"Environment variable '([^']*)' not found", str(cause))
    if absent:
        where = next((arg.partition("=")[0] for arg in args if absent.group(1) in arg), key)
        remedy = f"set it, or give a default: ${{oc.env:{absent.group(1)},DEFAULT}}"
        return UserError(where, f"there is no environment variable {absent.group(1)}", remedy)
    if isinstance(cause, InterpolationResolutionError):
        return UserError(
            key,
            f"{given!r} leads nowhere ({problem})",
            "name a setting that exists, and holds such a value",
        )
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        if key in GROUPS:  # a group that a choice of was not made, or a value given for a whole one
            return UserError(
                key, problem, f"name a choice of {key}, or give its settings one by one"
            )
        stage = key.split(".")[1] if key.startswith("stages.") else ""
        former = key.replace(f".{stage}.", ".*.", 1) if stage else key
        if former in REMOVED:
            now = REMOVED[former].replace("NAME", given if given.isidentifier() else "NAME")
            now = now.replace("*", stage)
            return UserError(key, "is no setting any more", f"give {shlex.quote(now)}")
        if key.startswith("stages."):
            return _no_stage(key, args, recipes) or _no_setting_of_stage(key, args, recipes)
        said = elsewhere(key)
        return UserError(
            key, "there is no such setting", said or did_you_mean(key, _known_keys(args, recipes))
        )
    if isinstance(cause, ValidationError):
        known = _known_keys(args, recipes)
        parents = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
        value = next((each for each in reversed(parents) if each in known), None)
        if key not in known and value is not None and _overridden(error) == key:
            return UserError(key, f"{value} has no settings of its own", did_you_mean(key, known))
        in_a_file = None if _overridden(error) else _of_a_recipe(args, recipes)
        if in_a_file is not None:
            return in_a_file
        return _wrong_type(key, problem, given)
    left_out = re.match(r"Could not delete from config\. '(stages\.\w+)'", str(error))
    absent_stage = _no_stage(f"~{left_out.group(1)}", args, recipes) if left_out else None
    if absent_stage is not None:
        return absent_stage
    group = re.match(r"Could not override '([^'@]+)", str(error))
    if group:
        return UserError(
            group.group(1), problem, did_you_mean(group.group(1), _known_keys(args, recipes))
        )
    if not isinstance(cause, OmegaConfBaseException | HydraException):
        return UserError(
            key,
            f"is of no kind that a setting has ({problem})",
            "--cfg job shows what each looks like",
        )
    return UserError(key, problem, "--cfg job shows what each setting looks like")


def _only_key(args: list[str]) -> str | None:
    """Return the one setting beside the recipe that was given, where there is just one."""
    keys = [
        arg.partition("=")[0] for arg in args if "=" in arg and not arg.startswith(("-", "recipe="))
    ]
    return keys[0] if len(set(keys)) == 1 else None


def _wrong_type(key: str, problem: str, given: str) -> UserError:
    wanted = re.search(r"could not be converted to (\w+)", problem)
    if wanted and wanted.group(1) in KINDS:
        kind = KINDS[wanted.group(1)]
        return UserError(key, f"{given!r} is not {kind}", f"give {kind}")
    if "is not a valid bool" in problem:
        return UserError(key, f"{given!r} is not {KINDS['Boolean']}", f"give {KINDS['Boolean']}")
    if item_type(key) and "is not a ListConfig" in problem:
        return UserError(key, f"{given!r} is no list", _list_wanted(key))
    if item_type(key) and "is not a subclass of" in problem:
        item = problem.rpartition("value: ")[2]
        item = "null" if item == "None" else repr(item)
        return UserError(key, f"{item} is nothing that this list holds", _list_wanted(key))
    if problem.endswith("is not Optional"):
        return UserError(key, "null is no value for it", f"leave {key} out, or give a value")
    return UserError(key, problem, "give a value of that type")


def _of_a_recipe(args: list[str], recipes: dict[str, Recipe]) -> UserError | None:
    """Return the refusal of the first setting of a recipe's file that is of another type; OmegaConf
    names no key.

    The files are those that the command line names and those they build on, but for what ships.
    """
    named = list(_files_asked_for(args, recipes))
    types = {name: kind for _, settings in named for name, kind in _stage_types(settings)}
    for recipe, settings in named:
        for key, value in () if is_shipped(recipe) else _leaves(settings):
            problem = _why_not_typed(key, value, types)
            if problem is not None:
                refusal = _wrong_type(key, problem, str(value))
                return UserError(key, f"{refusal.problem} (in {recipe.path})", refusal.remedy)
    return None


def _files_asked_for(
    args: list[str], recipes: dict[str, Recipe]
) -> Iterator[tuple[Recipe, dict[str, Any]]]:
    ahead = [arg.partition("=")[2] for arg in args if arg.lstrip("+").startswith("recipe=")]
    seen: set[str] = set()
    while ahead:
        for name in re.findall(r"[\w.-]+", ahead.pop()):
            if name in recipes and name not in seen:
                seen.add(name)
                settings = read_recipe(recipes[name])
                ahead.append(str(settings.get("defaults", "")))
                yield recipes[name], settings


def _stage_types(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the stages that a recipe names, each with its settings' class."""
    for each in settings.get("defaults") or []:
        for group, kind in each.items() if isinstance(each, dict) else ():
            if str(kind) in STAGES:
                yield str(group).rpartition("@")[2], STAGES[str(kind)]


def _leaves(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a file by their full keys, groups of settings before what they hold."""
    ahead: list[tuple[str, Any]] = [
        (name, value) for name, value in settings.items() if name != "defaults"
    ]
    while ahead:
        key, value = ahead.pop(0)
        yield key, value
        if isinstance(value, dict):
            ahead[:0] = [(f"{key}.{name}", each) for name, each in value.items()]


def _why_not_typed(key: str, value: Any, types: dict[str, Any]) -> str | None:
    """Return what OmegaConf says of a value that is not of its setting's type; None of one that is,
    or a group.
    """
    from omegaconf import OmegaConf

    if isinstance(value, dict) and value:
        return None  # its settings come one by one
    stage = next((name for name in types if key.startswith(f"{name}.")), None)
    schema: Any = OmegaConf.structured(Run if stage is None else types[stage])
    held: Any = value
    for name in reversed((key if stage is None else key.removeprefix(f"{stage}.")).split(".")):
        held = {name: held}
    try:
        OmegaConf.merge(schema, OmegaConf.create(held))
    except ValidationError as error:
        first = (str(error).splitlines() or [""])[0]
        first = first.replace("$VALUE_TYPE", type(value).__name__).replace("$VALUE", str(value))
        return first[:1].lower() + first[1:]
    except OmegaConfBaseException:  # another fault than a type's, which has its own line
        return None
    return None


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
    options = (
        list(recipes) if group == "recipe" else [str(option) for option in error.options or []]
    )
    return UserError(group or choice, f"there is no {choice!r}", did_you_mean(choice, options))


def _known_keys(args: list[str], recipes: dict[str, Recipe]) -> list[str]:
    return [*dotted_keys(Run), *_stage_keys(args, recipes)]


def _no_stage(key: str, args: list[str], recipes: dict[str, Recipe]) -> UserError | None:
    """Return the refusal of a stage that a recipe does not place, or that the command line leaves
    out; else None.
    """
    name = key.split(".")[1]
    if not key.startswith("~") and f"~stages.{name}" in args:
        return UserError(key, f"~stages.{name} leaves this stage out", "give one of the two")
    for recipe in _recipes_of(args):
        known = [
            stage
            for stage in stages_placed(recipe, args, recipes)
            if f"~stages.{stage}" not in args
        ]
        if known and name not in known:
            close = did_you_mean(name, known)
            meant = f"{close} " if close.startswith("did you mean") else ""
            return UserError(
                key,
                f"recipe={recipe} has no stage {name!r}",
                f"{meant}its stages: {', '.join(known)}",
            )
    return None


def _no_setting_of_stage(key: str, args: list[str], recipes: dict[str, Recipe]) -> UserError:
    """Return the refusal of a setting that a stage does not have, with what it is called there."""
    stage, name = key.rpartition(".")[::2]
    here = re.match(r"it is training\.(\w+)=", elsewhere(f"training.{name}") or "")
    known = _known_keys(args, recipes)
    own = f"{stage}.{here.group(1)}" if here else ""
    said = f"it is {own}=... here" if own in known else did_you_mean(key, known)
    return UserError(key, "there is no such setting", said)


def _recipes_of(args: list[str]) -> list[str]:
    """Return the recipes that a command line names: one, or those of a multirun."""
    named = next((arg.partition("=")[2] for arg in args if arg.startswith("recipe=")), "")
    return [name.strip("'\" ") for name in named.split(",")]


def stages_placed(recipe: str, args: list[str], recipes: dict[str, Recipe]) -> dict[str, str]:
    """Return the type of each stage by name, of a recipe with those that it builds on, and of the
    command line.
    """
    found: dict[str, str] = {}
    seen: list[str] = []
    ahead = [recipe]
    while ahead:
        name = ahead.pop()
        if name not in recipes or name in seen:
            continue
        seen.append(name)
        text = recipe_text(recipes[name])
        found = dict(re.findall(r"/stage@stages\.(\w+):\s*(\w+)", text)) | found
        ahead += re.findall(r"^\s*-\s*(?:/?recipe:\s*)?([\w.-]+)\s*(?:#.*)?$", text, re.MULTILINE)
    placed = re.findall(r"^\+stage@stages\.(\w+)=(\w+)$", "\n".join(args), re.MULTILINE)
    return found | dict(placed)


def _stage_keys(args: list[str], recipes: dict[str, Recipe]) -> Iterator[str]:
    """Yield `stages.NAME.SETTING` for the recipes on the command line."""
    placed = [
        each
        for recipe in _recipes_of(args)
        for each in stages_placed(recipe, args, recipes).items()
    ]
    for stage, type_name in dict(placed).items():
        yield f"stages.{stage}"
        settings: Any = STAGES.get(type_name)
        if settings is not None:
            yield from dotted_keys(settings, f"stages.{stage}.")
