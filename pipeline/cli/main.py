"""argv -> Hydra -> a typed `Run` -> exit code. The last place that knows Hydra; it imports no torch
and no MLflow.

Hydra discards what `main` returns and prints its own errors, so codes are decided here, outside of
it.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline.cli.arguments import check_words, elsewhere, for_hydra
from pipeline.cli.commands import COMMANDS
from pipeline.cli.recipes import (
    Recipe,
    config_dir,
    find_choices,
    find_recipes,
    is_shipped,
    read_recipe,
    refuse_code_keys,
)
from pipeline.config.arms import VARIANT
from pipeline.config.redaction import clean_output
from pipeline.errors import (
    LINE,
    BudgetSpent,
    DeviceLost,
    Exit,
    Preempted,
    StageFailed,
    Unparsable,
    UserError,
    one_line,
)
from pipeline.runs.signals import as_the_stop, heed, on_stop_signal
from pipeline.tasks.table import Task

Deliveries = list[Callable[[], str]]
"""What waits for MLflow, and says what came of it."""
Execute = Callable[[Any, str, int, Deliveries], int]
HELP = """Usage: python -m pipeline recipe=NAME [key=value ...] [flags]

Takes a model, applies the stages that a recipe names, measures what each cost in device-hours and
what it did to quality and to serving, writes all of it to MLflow, and says whether it was worth it.

{recipes}

Settings to meet first (all of them: --cfg job):
  model.path=X  data.path=FILE|FOLDER  task={tasks}
  precision=fp32|tf32|bf16|fp16
  student.path=X  student.layers=every_2|N|[0,3]  training.steps=N  training.batch_size=N
  training.sequence_length=N  training.learning_rate=X  seed=N  seeds=[0,1,2]  quality.margin=X
  budget.device_hours=X  serving.load.prompt=N  serving.load.new=N  serving.load.batch=N
  stages.NAME.SETTING=X

Flags:
  -m, --multirun     run every combination of comma-separated values; ends with the worst exit code
  --cfg job          print the composed settings and stop
  --recipe-dir DIR   take recipes (*.yaml) from DIR as well; may be given again
  --config-dir DIR   take choices of a group (DIR/GROUP/NAME.yaml: model=NAME) from DIR as well
  --debug            show the traceback of a refusal or a crash
  --hydra-help       Hydra's own flags

Beside it (each with --help):
  python -m pipeline meter -- COMMAND     measure any training command, in device-hours
  python -m pipeline register             declare what a model cost that was trained before
  python -m pipeline chargeback           what runs cost, by team, purpose, model or another key
  python -m pipeline weekly               one page: budget, waste, forecasts, verdicts, savings
  python -m pipeline history              verdicts of a model's last releases, and alarms
  python -m pipeline selftest model=REF   a release gate against itself: false answers, noise floor
  python -m pipeline attribute RUN        what each stage or setting of an arm brought
  python -m pipeline verify RECEIPT       whether a receipt is true: every figure made again
  python -m pipeline sync                 deliver to MLflow what it has not had yet
  python -m pipeline forecast recipe=NAME what a run will take, before it is started
  python -m pipeline launch ENGINE        write a job file for Slurm, SkyPilot or Kubernetes

Exit codes: 0 done or PASS, 1 refused or crashed, 2 command line not parsable, 3 FAIL (a release; a
quantized artifact that saves neither time nor memory, or that vLLM reads as another model),
4 INCONCLUSIVE, 5 INVALID, 6 NO_BASELINE, 7 budget spent, 75 preempted (run the same command again),
130 interrupted.""".replace("{tasks}", "|".join(task.value for task in Task))


TAKE_A_VALUE = frozenset({"--cfg", "-c", "--package", "-p", "--info", "-i"})
FOLDERS = {"--recipe-dir": "--recipe-dir", "--config-dir": "--config-dir", "-cd": "--config-dir"}
OWN_SETTINGS = "settings of one's own are recipes: --recipe-dir DIR"
REFUSED_FLAGS = {
    **dict.fromkeys(("--config-path", "-cp", "--config-name", "-cn"), OWN_SETTINGS),
    "--experimental-rerun": "it would run what a pickle says: give the command line again",
}
COMPOSING = (
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    NotImplementedError,
)
"""What Hydra lets through, beside its own errors, where settings are of a kind that it did not
expect.
"""
HYDRA_FLAGS = TAKE_A_VALUE | {
    "--multirun",
    "-m",
    "--run",
    "-r",
    "--resolve",
    "--hydra-help",
    "--version",
    "--shell-completion",
    "-sc",
}


@clean_output()
def main(argv: list[str], *, started_ns: int, execute: Execute | None = None) -> int:
    """Run one command line.

    Args:
        argv: The arguments after the program's name.
        started_ns: `time.monotonic_ns()` when the process began, for the ledger.
        execute: What is done with the composed run, its command line, that time, and a list for
            what is to be waited for in the end; None: it is run.

    Returns:
        The exit code.
    """
    debug = "--debug" in argv
    try:
        folders, rest = _take_folders([arg for arg in argv if arg != "--debug"])
        recipes = find_recipes(folders["--recipe-dir"])
        if not rest:
            print(
                f"{_recipe_list(recipes)}\n\nRun one with: python -m pipeline recipe=NAME   (--help"
                " for more)"
            )
            return Exit.DONE
        if "--help" in rest or "-h" in rest:
            print(HELP.format(recipes=_recipe_list(recipes)))
            return Exit.DONE
        _check_command(rest, recipes)
        flags, settings = _apart(rest)
        _check_overrides(flags, settings, recipes)
        choices = find_choices(folders["--config-dir"])
        rest = [*flags, *settings]  # where Hydra's parser wants them
        command = shown_command(rest, folders["--recipe-dir"], folders["--config-dir"])
        _tell_hydra(_asked_for(rest, recipes), choices)
        execute = execute or partial(_execute, argv=argv)
        return _compose_and_run(rest, recipes, started_ns, debug, command=command, execute=execute)
    except UserError as error:
        heed(error)
        code = _refuse(error, debug)
        code = Exit.UNPARSABLE if isinstance(error, Unparsable) else code
        _tell_of_gate(argv, str(error), code)
        return code
    except OSError as error:  # a name that no disk takes
        if error.strerror is None:
            raise
        return _refuse(_unlooked(error, argv), debug)
    except KeyboardInterrupt as error:
        return _say(error, Exit.INTERRUPTED, debug)


def _unlooked(error: OSError, args: Sequence[str]) -> UserError:
    """Return what to say of a place that cannot be looked at, by the argument that names it."""
    name = str(error.filename or "")
    key = next((arg.partition("=")[0] for arg in args if name and name in arg), "settings")
    return UserError(
        one_line(key, 80),
        f"{one_line(name, 80)} cannot be read ({error.strerror})",
        "name another place",
    )


def _take_folders(argv: list[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the folders that flags of ours name, by flag, and the other arguments.

    Raises:
        UserError: If a flag names no folder.
    """
    folders: dict[str, list[Path]] = {flag: [] for flag in FOLDERS.values()}
    rest: list[str] = []
    pending = iter(argv)
    for arg in pending:
        flag, equals, named = arg.partition("=")
        if flag not in FOLDERS:
            rest.append(arg)
            continue
        folder = named if equals else next(pending, "")
        if not folder:
            raise UserError(flag, "names no folder", "add one")
        folders[FOLDERS[flag]].append(Path(os.path.expanduser(folder)))
    return folders, rest


def _check_command(args: list[str], recipes: dict[str, Recipe]) -> None:
    """Refuse a first word that is nearly the name of a command or a recipe, and say which.

    Raises:
        Unparsable: With what was meant.
    """
    word, after = args[0], args[1] if len(args) > 1 else ""
    if word in recipes or not re.fullmatch(r"[a-z][\w-]*", word) or after.startswith("="):
        return
    near = difflib.get_close_matches(word, [*COMMANDS, *recipes], n=1, cutoff=0.6)
    if near:
        meant = near[0] if near[0] in COMMANDS else f"recipe={near[0]}"
        raise Unparsable(
            word, "is no command and no setting", f"did you mean python -m pipeline {meant}?"
        )


def _apart(args: list[str]) -> tuple[list[str], list[str]]:
    """Return flags, each followed by its value, and settings.

    Raises:
        Unparsable: If there is no such flag.
    """
    names = [arg.partition("=")[0] for arg in args if arg.startswith("-")]
    refused = next((name for name in names if name in REFUSED_FLAGS), None)
    if refused is not None:
        raise UserError(refused, "is not for use here", REFUSED_FLAGS[refused])
    unknown = next(
        (arg for arg in args if arg.startswith("-") and arg.partition("=")[0] not in HYDRA_FLAGS),
        None,
    )
    if unknown is not None:
        raise Unparsable(
            unknown,
            "there is no such flag",
            elsewhere(unknown) or "--help and --hydra-help list them",
        )
    flags: list[str] = []
    settings: list[str] = []
    before = ""
    for arg in args:
        is_flag = arg.startswith("-") or (before in TAKE_A_VALUE and "=" not in arg)
        (flags if is_flag else settings).append(arg)
        before = arg
    return flags, settings


def _recipe_list(recipes: dict[str, Recipe]) -> str:
    width = max(map(len, recipes), default=0)
    return "\n".join(
        ["Recipes:", *(f"  {name:<{width}}  {recipe.question}" for name, recipe in recipes.items())]
    )


def _check_overrides(flags: list[str], settings: list[str], recipes: dict[str, Recipe]) -> None:
    named = [arg.partition("=")[2] for arg in settings if arg.startswith("recipe=")]
    if any(not name.strip("'\" ") for name in named):
        raise UserError("recipe", "is empty", f"name one of {', '.join(recipes)}")
    check_words(settings)
    bare = next((arg for arg in settings if "=" not in arg and not arg.startswith("~")), None)
    if bare is not None:
        raise Unparsable(
            bare,
            "cannot be parsed",
            f"write recipe={bare}" if bare in recipes else "write key=value",
        )
    inspecting = any(
        arg.startswith(("--cfg", "-c", "--hydra-help", "--info", "-i", "--version"))
        for arg in flags
    )
    if not named and not inspecting:
        keys = [arg.partition("=")[0] for arg in settings]
        misspelt = difflib.get_close_matches("recipe", keys, n=1, cutoff=0.6)
        if misspelt:
            raise UserError(misspelt[0], "there is no such setting", "did you mean recipe?")
        raise UserError("recipe", "none is named", f"add recipe= and one of {', '.join(recipes)}")


def _tell_of_gate(args: Sequence[str], line: str, code: int) -> None:
    """Tell GitHub of a release check that was refused before it was composed."""
    if "recipe=release_check" in args:
        from pipeline.report.github import tell_refusal

        tell_refusal(f"refused: {line}", code)


def _refuse(error: UserError, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"refused: {error}", file=sys.stderr)
    return Exit.REFUSED


def _compose_and_run(
    args: list[str],
    recipes: dict[str, Recipe],
    started_ns: int,
    debug: bool,
    *,
    command: str,
    execute: Execute,
) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come out to us; we print one line
    # torch's profiler announces every trace, on our terminal
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from pipeline.cli.explain import as_user_error, explain
    from pipeline.cli.left_out import names_left_out
    from pipeline.cli.no_effect import check_given
    from pipeline.gate.checks import is_gate
    from pipeline.report.github import refusals_reported

    codes: list[int] = []
    # waited for once all jobs are done: the next one's clock is running
    deliveries: Deliveries = []
    overrides = for_hydra(args, sweeps="-m" in args or "--multirun" in args)
    given = {arg.partition("=")[0].lstrip("+~") for arg in args}

    def typed(cfg: DictConfig) -> Any:
        try:
            run = _typed(
                cfg, given, lambda error: as_user_error(error, args, recipes), names_left_out(args)
            )
        except OSError as error:
            if error.strerror is None:
                raise
            raise _unlooked(error, args) from error
        with refusals_reported(is_gate(run)):
            check_given(run, _given(args, recipes.get(run.recipe)))
        return run

    def one(cfg: DictConfig) -> None:
        # what passed before belongs to the first job of a multirun alone
        since_ns = time.monotonic_ns() if codes else started_ns
        codes.append(_guarded(lambda: execute(typed(cfg), command, since_ns, deliveries), debug))
        # the machine is wanted back, not this job alone
        if codes[-1] in (Exit.PREEMPTED, Exit.INTERRUPTED):
            raise _SweepStopped(codes[-1])

    try:
        # multirun, --cfg and the like are Hydra's application's
        if any(arg.startswith("-") for arg in args):
            sys.argv = [sys.argv[0], *overrides]
            with on_stop_signal(_stop_sweep):
                hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(
                    one
                )()
        else:  # composed once; the application would do it twice
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
                cfg = hydra.compose("config", overrides=overrides)
            one(cfg)
    except _SweepStopped as stop:
        return stop.code
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, *COMPOSING) as error:
        heed(error)
        if debug:
            traceback.print_exception(error)
        code, line = explain(error, args, recipes)
        print(f"refused: {one_line(line, LINE)}", file=sys.stderr)
        _tell_of_gate(args, line, code)
        return code
    except OSError as error:  # Hydra makes its own folder below the root before the job begins
        problem = f"{error.filename} cannot be made ({error.strerror})"
        return _refuse(UserError("tracking.root", problem, "give a folder to write to"), debug)
    finally:
        with on_stop_signal(lambda _: None):
            for line in dict.fromkeys(wait() for wait in deliveries):
                print(line, flush=True)
    return max(codes, default=Exit.DONE, key=_badness)


class _SweepStopped(BaseException):
    """No job of a multirun is to follow; no `Exception`, which Hydra would take for a failed job
    and go on.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _stop_sweep(_: int) -> None:
    """Have a scheduler's signal that comes between jobs, or while one opens, end the multirun as
    preempted.
    """
    raise _SweepStopped(Exit.PREEMPTED)


def _badness(code: int) -> int:
    """Order exit codes so that a multirun ends with the worst: interrupted, crashed, then the rest
    by number.
    """
    return {int(Exit.INTERRUPTED): 1000, int(Exit.REFUSED): 900}.get(code, code)


def _tell_hydra(recipes: list[Recipe], choices: dict[tuple[str, str], dict[Any, Any]]) -> None:
    """Make the schema, the stages' settings, `recipes` and a user's `choices` of groups known to
    Hydra.

    Raises:
        UserError: If a recipe holds anything but settings.
    """
    from hydra.core.config_store import ConfigStore

    _tell_hydra_the_schema()
    store = ConfigStore.instance()
    for recipe in recipes:
        store.store(group="recipe", name=recipe.name, package="_global_", node=read_recipe(recipe))
    for (group, name), settings in choices.items():
        store.store(group=group, name=name, node=settings)


@cache
def _tell_hydra_the_schema() -> None:
    """Make the settings of runs and stages known to Hydra; they are the same for every command."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from pipeline.config.settings.run import Run
    from pipeline.stages.table import STAGES

    OmegaConf.register_new_resolver("embedded", _embedded, replace=True)
    OmegaConf.register_new_resolver("of_path", _of_path, replace=True)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=Run)
    for type_name, stage in STAGES.items():
        store.store(group="stage", name=type_name, node=stage)


def _embedded(value: Any, *, _root_: Any) -> Any:
    """Return a limit of a profile where the data is the embedded one: people's own is read
    whole.
    """
    return value if _root_.data.path is None and _root_.data.hub is None else None


def _of_path(value: Any, *, _root_: Any) -> Any:
    """Return the name of a profile's own model, or that of the folder or Hub name that is given in
    its place: its costs add up under it.
    """
    path = _root_.model.path
    return value if path is None else str(path).rstrip("/").rpartition("/")[2] or value


def _asked_for(args: list[str], recipes: dict[str, Recipe]) -> list[Recipe]:
    """Return the recipes that a command line may speak of: parsing all of them takes a third of the
    start.

    Those that it names, and those that these build on in turn; all that can be read where it names
    none plainly, for Hydra's own word on that. What is wrong with a recipe that nobody asked for
    stops no other one.
    """
    chosen = [
        arg.partition("=")[2]
        for arg in args
        if arg.lstrip("+").partition("=")[0].partition("@")[0] == "recipe"
    ]
    found: dict[str, Recipe] = {}
    ahead = [" ".join(chosen)]
    while ahead and "(" not in ahead[0]:  # Hydra has functions: recipe=glob(*)
        names = {word.removesuffix(".yaml") for word in re.findall(r"[\w.-]+", ahead.pop())}
        named = [recipe for name, recipe in recipes.items() if name in names and name not in found]
        found |= {recipe.name: recipe for recipe in named}
        ahead += [str(read_recipe(recipe).get("defaults", "")) for recipe in named]
    return list(found.values()) or [recipe for recipe in recipes.values() if _can_be_read(recipe)]


def _can_be_read(recipe: Recipe) -> bool:
    try:
        read_recipe(recipe)
    except UserError:
        return False
    return True


def _given(args: list[str], recipe: Recipe | None) -> set[str]:
    """Return the settings that a user gave: on the command line, and in a recipe that does not
    ship, unless another command wrote it.
    """
    from pipeline.cli.no_effect import given_keys, recipe_keys

    given = given_keys([arg for arg in args if not arg.startswith("-")])
    if recipe is None or is_shipped(recipe) or recipe.name.startswith(VARIANT):
        return given
    return given | recipe_keys(read_recipe(recipe))


def _typed(
    cfg: Any,
    given: Collection[str],
    explained: Callable[[Exception], UserError],
    left_out: Sequence[str],
) -> Any:
    """Return a composed configuration as the `Run` that it amounts to; say what goes with a stage
    that was left out.

    Args:
        given: The settings of the command line.
        explained: Turns what OmegaConf raises into a refusal.
        left_out: Stages that the command line leaves out.

    Raises:
        UserError: Naming the setting that lacks a value, names code, or cannot work.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from pipeline.cli.left_out import leave_out
    from pipeline.cli.validate import check_types, validate
    from pipeline.gate.checks import is_gate
    from pipeline.report.github import refusals_reported
    from pipeline.stages.settings import settle_epochs

    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        settings = OmegaConf.to_container(cfg)
        run: Any = None if missing else OmegaConf.to_object(cfg)
    except (OmegaConfBaseException, *COMPOSING) as error:
        raise explained(error) from error
    if missing:
        raise UserError(missing[0], "has no value", f"give one: {missing[0]}=...")
    refuse_code_keys(settings, "settings")
    check_types(run)
    with refusals_reported(is_gate(run)):
        note = leave_out(run, left_out)
        settle_epochs(run, given)
        validate(run)
    if note is not None:
        print(f"note: {note}", flush=True)
    return run


def _execute(
    run: Any, command: str, started_ns: int, deliveries: Deliveries, *, argv: Sequence[str]
) -> int:
    from hydra.core.hydra_config import HydraConfig

    from pipeline.cli.ranks import ranks_to_start, speak, start_ranks
    from pipeline.runs.loop import execute
    from pipeline.training.meeting import FirstMissing
    from pipeline.training.ranks import place_in

    count = ranks_to_start(run)
    if place_in() is not None and HydraConfig.initialized():
        # a rank whose job fails is waited for by the others, which are at the same job still
        problem = "several jobs do not go with ranks that were started from outside"
        raise UserError("--multirun", problem, "give hardware.devices=N, or a command for each job")
    if count > 1:
        return start_ranks(count, _of_this_job(argv), started_ns)
    try:
        return execute(run, command=command, started_ns=started_ns, deliveries=deliveries)
    except FirstMissing:
        speak()
        raise


def _of_this_job(argv: Sequence[str]) -> list[str]:
    """Return the arguments by which another process runs this job: of a multirun, this one
    alone.
    """
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return list(argv)
    folders, rest = _take_folders(list(argv))
    named = [f"{flag}={folder}" for flag, each in folders.items() for folder in each]
    debug = ["--debug"] if "--debug" in rest else []
    return [*named, *debug, *HydraConfig.get().overrides.task]


def shown_command(
    args: list[str], recipe_dirs: Sequence[Path] = (), config_dirs: Sequence[Path] = ()
) -> str:
    """Return the command line to repeat a run with, secrets left out."""
    import shlex

    from pipeline.config.redaction import redact_override

    named = [("--recipe-dir", folder) for folder in recipe_dirs] + [
        ("--config-dir", each) for each in config_dirs
    ]
    folders = [word for flag, folder in named for word in (flag, str(folder))]
    return shlex.join(["python", "-m", "pipeline", *folders, *map(redact_override, args)])


def _guarded(call: Any, debug: bool) -> int:
    """Run one job and turn how it ended into an exit code and one line."""
    try:
        with as_the_stop():
            return call()
    except UserError as error:
        return _refuse(error, debug)
    except BudgetSpent as error:
        return _say(error, Exit.BUDGET_SPENT, debug)
    except Preempted as error:
        return _say(error, Exit.PREEMPTED, debug)
    except DeviceLost as error:
        # the next job of a multirun would be in this process as well
        raise _SweepStopped(_say(error, Exit.REFUSED, debug)) from error
    except StageFailed as error:
        return _say(error, Exit.REFUSED, debug)
    except KeyboardInterrupt as error:
        return _say(error, Exit.INTERRUPTED, debug)
    except OSError as error:
        from pipeline.store.artifacts import disk_full, says_full

        if not says_full(error):
            return _say(error, Exit.REFUSED, debug)
        return _refuse(disk_full(Path(error.filename or ".")), debug)
    # The outermost frame: a crash becomes one line and exit 1.
    except Exception as error:  # noqa: BLE001
        return _say(error, Exit.REFUSED, debug)


def _say(error: BaseException, code: Exit, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    text = one_line(error, LINE) or type(error).__name__
    known = isinstance(error, BudgetSpent | Preempted | StageFailed | KeyboardInterrupt)
    text = f"failed: {text}" if isinstance(error, StageFailed) else text
    line = text if known else f"crashed: {type(error).__name__}: {text} (--debug shows where)"
    if code is Exit.INTERRUPTED and not str(error):
        line = "interrupted; the same command resumes from what is done"
    print(line, file=sys.stderr)
    return code
