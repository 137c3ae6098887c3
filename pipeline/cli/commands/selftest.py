"""`python -m pipeline selftest model=REF`: a model against itself through the release gate. See
`runs/selftest.py`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.config.redaction import clean_output
from pipeline.errors import Exit, Unparsable, UserError

USAGE = """Usage: python -m pipeline selftest model=REF [n=20] [policy=smoke|strict]
                                   [train="recipe=baseline ..."] [repeats=5] [root=mlruns]
                                   [key=value ...]

  model=REF       what candidate= and baseline= take in a release check: a folder, a run,
                  models:/NAME@champion
  n=20            trials of the model against itself, at the policy's load, blocks and looks; least
                  saving 0
  train="..."     a training to repeat in fresh folders: its spread is what release checks read
                  training savings with
  repeats=5       how often (3 or more)
  root=mlruns     tracking.root; any other setting of recipe=release_check may follow

It reports false answers with intervals, the least serving saving that can be distinguished from 0,
and the chance to find others.
Exit codes: 0 no more false answers than alpha allows, 3 more of them (binomial test, one-sided 1%,
for PASS and FAIL each; one of quality is too many), 5 every trial INVALID, 1 refused or crashed,
7 budget spent, 75 preempted and 130 interrupted (nothing is kept: run it again)."""
OWN = ("model", "n", "train", "repeats", "root")
FIXED = (
    "recipe",
    "candidate",
    "baseline",
    "promote",
    "bootstrap",
    "candidate_items",
    "baseline_items",
    "seeds",
)
MOST_TRIALS, MOST_REPEATS = 10_000, 1000


@clean_output()
def main(argv: list[str], started_ns: int) -> int:
    """Run a self-test; return its exit code."""
    from pipeline.cli import main as cli
    from pipeline.runs.selftest import Options, self_test

    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE
    try:
        given, rest = _apart(argv)
        options = _options(given, Options)
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED
    if options.train:  # refused, if it is, before anything is measured
        code = cli.main(list(options.train), started_ns=started_ns, execute=lambda *_: Exit.DONE)
        if code != Exit.DONE:
            return code
    root = [f"tracking.root={given['root']}"] if "root" in given else []
    sides = [f"{side}={given['model']}" for side in ("candidate", "baseline")]
    debug = [arg for arg in rest if arg == "--debug"]
    settings = [arg for arg in rest if arg != "--debug"]
    return cli.main(
        [*debug, "recipe=release_check", *sides, *root, *settings],
        started_ns=started_ns,
        execute=lambda run, _, since_ns, __: self_test(run, options, started_ns=since_ns),
    )


def _apart(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the self-test's own settings, and those of the release check that it is."""
    given: dict[str, str] = {}
    rest: list[str] = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        if arg == "--debug":
            rest.append(arg)
        elif arg.startswith("-") or not equals:
            raise Unparsable(arg, "is no setting of selftest", "--help lists them")
        elif name in FIXED:
            raise UserError(name, "has no effect in a self-test", "leave it out")
        elif name in OWN:
            given[name] = value
        else:
            rest.append(arg)
    if not given.get("model", "").strip():
        raise UserError(
            "model", "is not given", "give model=REF: a folder, a run's id, models:/NAME@champion"
        )
    return given, rest


def _options(given: dict[str, str], options: Any) -> Any:
    if "repeats" in given and "train" not in given:
        raise UserError("repeats", "has no effect without train=", 'add train="recipe=..."')
    return options(
        trials=_count("n", given.get("n", "20"), 1, MOST_TRIALS),
        train=_training(given),
        repeats=_count("repeats", given.get("repeats", "5"), 3, MOST_REPEATS),
    )


def _count(key: str, text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and least <= int(text) <= most):
        raise UserError(key, f"{text[:40]!r} is no such number", f"give {least} to {most}")
    return int(text)


def _training(given: dict[str, str]) -> tuple[str, ...]:
    if "train" not in given:
        return ()
    try:
        words = shlex.split(given["train"])
    except ValueError as error:
        raise UserError(
            "train", f"cannot be read ({error})", 'write train="recipe=baseline training.steps=20"'
        ) from None
    names = [word.partition("=")[0] for word in words]
    if "recipe" not in names:
        raise UserError(
            "train", "names no recipe", 'write train="recipe=baseline training.steps=20"'
        )
    barred = next(
        (
            name
            for name in names
            if (name.startswith(("-", "tracking")) and name != "tracking.charts")
            or name in ("seeds", "candidate")
        ),
        None,
    )
    if barred is not None:
        raise UserError(
            "train", f"{barred} has no place in it", "each repeat gets a fresh folder, and one seed"
        )
    return tuple(words)
