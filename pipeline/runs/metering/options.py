"""What the meter's command line says."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.owner import OWNER, check_owner
from pipeline.config.redaction import redact_value
from pipeline.config.settings.cost import CostConfig
from pipeline.config.settings.ranges import check_ranges
from pipeline.errors import Unparsable, UserError
from pipeline.ledger.cost import check_cost

SEPARATOR = "--"
VALUED = (
    "--name",
    "--root",
    "--gpus",
    "--model-name",
    "--team",
    "--cost-center",
    "--purpose",
    "--rate",
    "--currency",
    "--rate-source",
    "--rate-date",
    "--kill-after",
)
FLAGS = ("--no-mlflow", "--recover")
ROOT = "mlruns"
_OPTIONS = {
    "cost.per_device_hour": "--rate",
    "cost.currency": "--currency",
    "cost.source": "--rate-source",
    "cost.date": "--rate-date",
    "tracking.team": "--team",
    "tracking.cost_center": "--cost-center",
    "tracking.purpose": "--purpose",
}
"""What a recipe's settings are called here."""
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line of the meter says."""

    name: str
    command: tuple[str, ...]
    root: Path = Path(ROOT)
    gpus: tuple[str, ...] | None = None
    model_name: str = "model"
    team: str | None = None
    cost_center: str | None = None
    purpose: str | None = None
    cost: CostConfig = field(default_factory=CostConfig)
    kill_after_s: float | None = None
    mlflow: bool = True

    @property
    def shown(self) -> str:
        """The command to read, without its secrets."""
        pairs = zip(("", *self.command), self.command, strict=False)
        return shlex.join(_without_secret(before, argument) for before, argument in pairs)

    def params(self) -> dict[str, Any]:
        """Return the settings under the names that a recipe's run gives them."""
        return {
            "name": self.name,
            "command": self.shown,
            "model.name": self.model_name,
            "tracking.mlflow": self.mlflow,
            **{f"tracking.{name}": getattr(self, name) for name in OWNER},
            **{
                f"cost.{name}": value
                for name, value in asdict(self.cost).items()
                if name != "teacher_shared_by"
            },
            "kill_after_s": self.kill_after_s,
            "gpus": None if self.gpus is None else ",".join(self.gpus),
        }


def _without_secret(before: str, argument: str) -> str:
    """Return an argument of a command; what follows `--token`, or `=` in one argument, may be a
    secret.
    """
    key, equals, value = argument.partition("=")
    if equals:
        return f"{key}={redact_value(key, value)}"
    return redact_value(before if before.startswith("-") and "=" not in before else "", argument)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the meter's own arguments and the command."""
    if SEPARATOR not in argv:
        return argv, []
    at = argv.index(SEPARATOR)
    return argv[:at], argv[at + 1 :]


def read_options(argv: list[str]) -> dict[str, str]:
    """Return options by name.

    Raises:
        Unparsable: If there is something else, or a value is missing.
        UserError: If a value is blank.
    """
    found: dict[str, str] = {}
    pending = iter(argv)
    for arg in pending:
        name, equals, value = arg.partition("=")
        if name in FLAGS and not equals:
            found[name] = ""
        elif name in VALUED:
            given = value if equals else next(pending, None)
            if given is None:
                raise Unparsable(name, "has no value", f"write {name} VALUE")
            if not given.strip():
                raise UserError(name, "is empty", f"give a value, or leave {name} out")
            found[name] = given
        else:
            raise Unparsable(
                arg,
                "is no option of the meter",
                "write -- before the command; --help lists the options",
            )
    return found


def read_settings(options: dict[str, str], command: list[str]) -> Settings:
    """Return what the options and the command amount to.

    Raises:
        UserError: Naming the option.
    """
    if not command:
        raise Unparsable(
            "command",
            "is missing",
            "write it after --: python -m pipeline meter -- python train.py",
        )
    name = options.get("--name", _program(command))
    if not _NAME.fullmatch(name):
        raise UserError(
            "--name", f"{name!r} is no name", "use letters, digits, and _ . + - in between"
        )
    cost = CostConfig(
        per_device_hour=_number(options, "--rate"),
        currency=options.get("--currency"),
        source=options.get("--rate-source"),
        date=options.get("--rate-date"),
    )
    owner = {name: options.get(_OPTIONS[f"tracking.{name}"]) for name in OWNER}
    _check(cost, owner)
    gpus = options.get("--gpus")
    return Settings(
        name=name,
        command=tuple(command),
        root=Path(options.get("--root", ROOT)),
        gpus=None if gpus is None else () if gpus == "none" else tuple(gpus.split(",")),
        model_name=options.get("--model-name", "model"),
        **owner,
        cost=cost,
        kill_after_s=_number(options, "--kill-after"),
        mlflow="--no-mlflow" not in options,
    )


def _check(cost: CostConfig, owner: dict[str, str | None]) -> None:
    """Refuse what a recipe's run is refused for, by the options as they were typed.

    Raises:
        UserError: Naming the option.
    """
    try:
        check_ranges(cost, "cost.")
        check_cost(cost)
        check_owner(owner, required=False)
    except UserError as error:
        raise UserError(
            *(_as_typed(text) for text in (error.key, error.problem, error.remedy))
        ) from None


def _as_typed(text: str) -> str:
    for setting, option in _OPTIONS.items():
        text = text.replace(setting, option)
    return text


def _number(options: dict[str, str], name: str) -> float | None:
    if name not in options:
        return None
    try:
        value = float(options[name])
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(name, f"{options[name]!r} is no number from 0 up", f"write {name} 2.5")
    return value


def _program(command: list[str]) -> str:
    """Return a name for a command: that of the first Python file in it, else of its program."""
    script = next((arg for arg in command if arg.endswith(".py")), command[0])
    return re.sub(r"[^\w.+-]", "_", Path(script).stem).lstrip("_.+-") or "command"


def check_alone() -> None:
    """Refuse to be started once per rank: every meter would count the whole node.

    Raises:
        UserError: Saying how to start one.
    """
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if "LOCAL_RANK" in os.environ and local.isdecimal() and int(local) > 1:
        raise UserError(
            "meter",
            f"is one of {local} processes that a launcher started here",
            "put it before torchrun",
        )
    if tasks.isdecimal() and int(tasks) > 1:
        raise UserError(
            "meter",
            f"is one of {tasks} tasks on this node",
            "srun --ntasks-per-node=1, ranks below it",
        )
