"""Pages of the site that are made while it is built: the reference, and the files of the root.

`mkdocs.yml` names this file as a hook. The reference is read from the settings' dataclasses (each
field's comment, type, default and range), from the catalogue of figures, from the recipes, and
from each command's `--help`. None of it is committed, so that none of it can be out of date.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from pipeline.cli.commands import COMMANDS
from pipeline.cli.main import main
from pipeline.cli.recipes import GROUPS, config_dir, find_recipes
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import TrainingConfig
from pipeline.errors import Exit
from pipeline.ledger.metrics import CATALOGUE, PHASES, PRODUCTIVE, WASTED
from pipeline.report.waste import REMEDIES
from pipeline.stages.table import STAGES

ROOT = Path(__file__).resolve().parent.parent
FROM_ROOT = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "license.txt",
}
"""Files of the root that the site shows, with the names that they have there."""
TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any"}
EXITS = {
    Exit.DONE: ("done, or the gate says PASS", "go on"),
    Exit.REFUSED: ("refused before anything ran, or crashed", "read the one line on stderr"),
    Exit.UNPARSABLE: ("the command line cannot be parsed", "correct it"),
    Exit.FAIL: (
        "the gate says FAIL; or a quantized artifact saves neither time nor memory; or vLLM"
        " computes something else from it",
        "read the report; everything was recorded",
    ),
    Exit.INCONCLUSIVE: (
        "the gate cannot decide on these measurements",
        "run the same command once more, or give as many items as the report names",
    ),
    Exit.INVALID: ("the two cannot be compared as they are", "remove the cause, run again"),
    Exit.NO_BASELINE: (
        "there is no champion yet",
        "`bootstrap=true` makes the candidate the first",
    ),
    Exit.BUDGET_SPENT: ("`budget.device_hours` is spent", "raise it; do not requeue"),
    Exit.PREEMPTED: ("stopped by SIGTERM; a checkpoint is on disk", "run the same command again"),
    Exit.INTERRUPTED: ("stopped by Ctrl-C", "run the same command again"),
}
"""What each exit code means, and what to do then. A code that is missing here stops the build."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the reference: a setting as a user types it."""

    key: str
    type: str
    default: str
    range: str
    meaning: str


# -- what the sources say of a field --------------------------------------------------------------


@cache
def _comments(path: str) -> dict[int, tuple[bool, str]]:
    """Return the comments of a file by line: whether the line holds nothing else, and the text."""
    found: dict[int, tuple[bool, str]] = {}
    with tokenize.open(path) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type == tokenize.COMMENT:
                alone = not token.line[: token.start[1]].strip()
                found[token.start[0]] = (alone, token.string.lstrip("# "))
    return found


@cache
def comments_of(cls: type) -> dict[str, str]:
    """Return what the source says of each name that a class body assigns.

    That is the comment behind it, else the lines of comment above it.
    """
    path = inspect.getsourcefile(cls) or ""
    comments = _comments(path)
    body = next(
        node.body
        for node in ast.walk(ast.parse(Path(path).read_text()))
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )
    found: dict[str, str] = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign | ast.Assign):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        behind = [comments[at][1] for at in _lines(node) if at in comments]
        found[ast.unparse(target)] = " ".join(behind or _above(node.lineno, comments))
    return found


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _above(line: int, comments: dict[int, tuple[bool, str]]) -> list[str]:
    above: list[str] = []
    while comments.get(line - 1, (False, ""))[0]:
        line -= 1
        above.insert(0, comments[line][1])
    return above


def meaning_of(cls: type, name: str) -> str:
    """Return what the source says of a field, where it is declared."""
    owner = next(
        (each for each in cls.__mro__ if name in vars(each).get("__annotations__", {})), cls
    )
    return comments_of(owner).get(name, "")


# -- settings -------------------------------------------------------------------------------------


def settings_of(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting below a settings class, as a user types it."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        inner = next((each for each in (hint, *get_args(hint)) if _is_settings(each)), None)
        if inner is hint:
            yield from settings_of(inner, f"{key}.")
            continue
        meaning = meaning_of(cls, field.name) or _inherited(field.name, prefix)
        yield Setting(key, _type(hint), _default(field), _range(field.metadata), meaning)
        if inner is not None:
            each = f"{key}.KEY." if str(hint).startswith("dict") else f"{key}[]."
            yield from settings_of(inner, each)


def _inherited(name: str, prefix: str) -> str:
    """Return what stands for the comment of a stage's own training setting."""
    training = {field.name for field in dataclasses.fields(TrainingConfig)}
    if not prefix.startswith("stages."):
        return ""
    if name == "precision":
        return "as `precision.name`, of this stage"
    if name == "optional":
        return "skipped with its reason where this device cannot do it"
    return f"as `training.{name}`, of this stage" if name in training else ""


def _is_settings(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _type(hint: Any) -> str:
    args = get_args(hint)
    if NoneType in args:
        return f"{_type(args[0])}, or null"
    if str(hint).startswith("list"):
        return f"list of {_type(args[0])}"
    if str(hint).startswith("dict"):
        return f"{_type(args[1])} by name"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"[{hint.__name__}](#choice-{hint.__name__.lower()})"
    return TYPES.get(hint, "settings")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    if field.default in (dataclasses.MISSING, "???"):
        return "to be given"
    value = field.default.value if isinstance(field.default, Enum) else field.default
    words = {None: "null", True: "true", False: "false", "": "empty"}
    # 1 equals True: only what is none of them is looked up by itself
    known = value is None or isinstance(value, bool) or value == ""
    return words[value] if known else f"`{value}`"


def _range(limits: Any) -> str:
    above, low, high = (limits.get(name) for name in ("above", "min", "max"))
    parts = [
        f"above {above}" if above is not None else "",
        f"at least {low}" if low is not None else "",
        f"at most {high}" if high is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def _choices(cls: type) -> Iterator[type[Enum]]:
    """Yield the choices that settings below a class offer."""
    for hint in get_type_hints(cls).values():
        for each in (hint, *get_args(hint)):
            if isinstance(each, type) and issubclass(each, Enum):
                yield each
            elif _is_settings(each):
                yield from _choices(each)


def settings_page() -> str:
    """Return the page of all settings."""
    groups = {
        field.name: hint
        for field in dataclasses.fields(Run)
        if _is_settings(hint := get_type_hints(Run)[field.name])
    }
    own = [each for each in settings_of(Run) if each.key.split(".")[0] not in groups]
    parts = [
        "# Settings",
        (
            "Every setting with its type, default and range, as the code declares them. Give one on"
            " the command line (`training.steps=500`) or in a recipe of your own. `python -m"
            " pipeline recipe=NAME --cfg job` prints what a run would use: a recipe and the"
            " [choices of groups](recipes.md#groups) may set another default."
        ),
        "## Of a run",
        _settings_table(own),
    ]
    for name, cls in groups.items():
        parts += [f"## {name}", _text(inspect.getdoc(cls) or "")]
        parts += [_settings_table(settings_of(cls, f"{name}."))]
    parts += [
        "## Stages",
        (
            "A recipe places stages: `/stage@stages.NAME: TYPE`. `NAME` is the stage's name in the"
            " recipe. The training settings of a stage default to null, and are then those of"
            " `training.*`."
        ),
    ]
    for name, stage in STAGES.items():
        module = inspect.getdoc(inspect.getmodule(stage)) or ""
        card = " ".join(module.split())
        parts += [f"### Stage `{name}`", _text(card)]
        parts += [_settings_table(settings_of(stage, "stages.NAME."))]
    parts += ["## Choices"]
    used = {each for cls in (Run, *STAGES.values()) for each in _choices(cls)}
    for choice in sorted(used, key=lambda each: each.__name__):
        title = f"### {choice.__name__} {{ #choice-{choice.__name__.lower()} }}"
        parts += [title, _text(inspect.getdoc(choice) or "")]
        comments = comments_of(choice)
        rows = [(f"`{each.value}`", _text(comments.get(each.name, ""))) for each in choice]
        parts += [_table(("value", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _settings_table(settings: Any) -> str:
    rows = [
        (f"`{each.key}`", each.type, each.default, each.range, _text(each.meaning))
        for each in settings
    ]
    return _table(("setting", "type", "default", "range", "meaning"), rows)


# -- figures, commands, recipes -------------------------------------------------------------------


def metrics_page() -> str:
    """Return the page of all figures."""
    parts = [
        "# Metrics",
        (
            "Every figure that a run records. The key is what MLflow shows; its last part is the"
            " name in `result.json`. *Of* says what has one: a row (a stage attempt), the run, or a"
            " comparison of two arms. A core figure is never null on a run that finished and made"
            " a model."
        ),
    ]
    better = {1: "higher", -1: "lower", 0: ""}
    for section in dict.fromkeys(metric.section for metric in CATALOGUE):
        rows = [
            (
                f"`{metric.key}`",
                "no unit" if metric.unit == "1" else metric.unit,
                metric.scope,
                better[metric.direction],
                "yes" if metric.core else "",
                _text(metric.meaning),
            )
            for metric in CATALOGUE
            if metric.section == section
        ]
        parts += [f"## {section}"]
        parts += [_table(("key", "unit", "of", "better", "core", "meaning"), rows)]
    parts += [
        "## Phases",
        (
            "What the host was doing. Every nanosecond of a stage belongs to one phase, and every"
            " phase to one class."
        ),
        _table(("phase", "class"), [(f"`{phase}`", _class_of(phase)) for phase in PHASES]),
    ]
    rows = [
        (f"`{cause}`", f"{each.threshold:.0%}", _text(each.here), _text(each.elsewhere))
        for cause, each in REMEDIES.items()
    ]
    header = ("cause", "from", "in a recipe", "in a metered program")
    parts += [
        "## Waste, and the first thing to try",
        "A cause is advised on where it takes this share of its stage or more.",
        _table(header, rows),
    ]
    return "\n\n".join(parts) + "\n"


def _class_of(phase: str) -> str:
    """Return whether a phase is productive, support or wasted, and as what."""
    if phase in PRODUCTIVE:
        return "productive"
    return f"wasted, as `{WASTED[phase]}`" if phase in WASTED else "support"


def commands_page() -> str:
    """Return the page of commands: what each prints with `--help`, and the exit codes."""
    parts = ["# Commands and exit codes", "## python -m pipeline", _fence(_help([]))]
    for name, what in COMMANDS.items():
        parts += [f"## {name}", f"{_text(what.capitalize())}.", _fence(_help([name]))]
    rows = [(str(code.value), *map(_text, EXITS[code])) for code in Exit]
    parts += [
        "## Exit codes",
        _table(("code", "meaning", "what to do"), rows),
        (
            "A multirun (`-m`) ends with the worst code of its jobs. [The release"
            " check](../release-check.md#exit-codes) has more on its own codes."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _help(words: list[str]) -> str:
    """Return what a command prints with `--help`."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if words:
            module = importlib.import_module(f"pipeline.cli.commands.{words[0]}")
            module.main(["--help"], 0)
        else:
            main(["--help"], started_ns=0)
    return said.getvalue()


def recipes_page() -> str:
    """Return the page of recipes and of the groups' choices."""
    parts = [
        "# Recipes and groups",
        (
            "A recipe is a file of settings that places stages and names the pairs of arms to"
            " compare. Copy one, change it, and pass its folder: `--recipe-dir DIR`."
        ),
    ]
    for name, recipe in find_recipes([]).items():
        text = (ROOT / "recipes" / f"{name}.yaml").read_text()
        parts += [f"## {name}", _text(recipe.question), _fence(text, "yaml")]
    parts += [
        "## Groups",
        (
            "`GROUP=NAME` on the command line chooses a file of `configs/`, which holds settings of"
            " that group."
        ),
    ]
    rows: list[tuple[str, ...]] = []
    for group in GROUPS:
        for path in sorted((config_dir() / group).glob("*.yaml")):
            lines = path.read_text().splitlines()
            said = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
            held = ", ".join(f"`{line}`" for line in lines if line and not line.startswith("#"))
            rows.append((f"`{group}={path.stem}`", _text(said) or held))
    return "\n\n".join([*parts, _table(("choice", "what it is"), rows)]) + "\n"


# -- Markdown -------------------------------------------------------------------------------------


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(text: str) -> str:
    """Return a comment or docstring as Markdown: what would be markup is escaped, code is not."""
    parts = " ".join(text.split()).split("`")
    plain = [re.sub(r"([\\*_|<\[\]#])", r"\\\1", part) for part in parts[::2]]
    code = [f"`{part}`".replace("|", "\\|") for part in parts[1::2]]
    return "".join(piece for pair in zip(plain, [*code, ""], strict=False) for piece in pair)


def _fence(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.strip()}\n```"


def root_page(name: str) -> str:
    """Return a file of the root as a page: links among these files lead to the site's pages."""
    text = (ROOT / name).read_text()
    for file, page in FROM_ROOT.items():
        text = text.replace(f"]({file}", f"]({page}")
    return text.replace("](docs/", "](")


PAGES = {
    "reference/settings.md": settings_page,
    "reference/metrics.md": metrics_page,
    "reference/commands.md": commands_page,
    "reference/recipes.md": recipes_page,
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here to those of `docs/`: called by MkDocs."""
    from mkdocs.structure.files import File

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    for name, path in FROM_ROOT.items():
        files.append(File.generated(config, path, content=root_page(name)))
    return files
