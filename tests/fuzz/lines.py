"""Command lines: each is composed or refused in one line, with the right exit code, at once."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import time
from pathlib import Path
from typing import Any

from fuzz.mutate import command_line
from pipeline.cli.main import main
from pipeline.cli.recipes import GROUPS, find_recipes
from pipeline.config.settings.ranges import dotted_keys
from pipeline.config.settings.run import Run
from pipeline.stages.table import STAGES

SLOW_S = 20.0  # of processor time


def all_keys() -> list[str]:
    """Return every setting, groups, settings of stages, and words that are none."""
    stages = [key for stage in STAGES.values() for key in dotted_keys(stage, "stages.student.")]
    return [
        *dotted_keys(Run),
        *stages,
        *GROUPS,
        "recipe",
        "lr",
        "epochs",
        "hydra.verbose",
        "hydra.searchpath",
        "x",
    ]


def try_lines(seed: int, count: int, cwd: Path) -> dict[str, int]:
    """Try `count` command lines; return how many ended in which code.

    Raises:
        AssertionError: Naming a line that ended in a traceback, too late, or in a code without its
            line.
    """
    rng, keys, recipes = random.Random(seed), all_keys(), list(find_recipes([]))
    ends: dict[str, int] = {}
    cwd.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        args = command_line(rng, keys, recipes)
        try:
            code, said = run_line(args, cwd)
        except Exception as error:
            raise AssertionError((seed, number, [arg[:200] for arg in args])) from error
        ends[str(code)] = ends.get(str(code), 0) + 1
        assert code in (0, 1, 2), (seed, number, args, code, said)
    return ends


def run_line(args: list[str], cwd: Path) -> tuple[int, str]:
    """Return exit code and standard error of a command line that is composed, and then not run."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    started = time.process_time()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["pipeline"]
        try:
            code = main(args, started_ns=0, execute=lambda *_: 0)
        except SystemExit as error:  # Hydra's own parser of flags
            code = int(error.code or 0)
        finally:
            sys.argv = before
    said = err.getvalue()
    debug: Any = "--debug" in args
    assert "Traceback" not in said or debug, (args, said)
    assert "crashed:" not in said, (args, said)
    assert code == 0 or said.strip(), args
    assert time.process_time() - started < SLOW_S, args
    return code, said
