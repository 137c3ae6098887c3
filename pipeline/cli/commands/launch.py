"""`python -m pipeline launch slurm|skypilot|kubernetes recipe=NAME ...`: write an engine's job file
for a run, and hand it to that engine's own client. See `pipeline/launch/`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pipeline.config.redaction import clean_output, redact_override
from pipeline.errors import Exit, Unparsable, UserError, one_line
from pipeline.launch.job import Job, Options, Profile, check_name
from pipeline.launch.needs import Needs, needs_of
from pipeline.launch.table import ENGINES, Engine

USAGE = """Usage: python -m pipeline launch slurm|skypilot|kubernetes recipe=NAME [key=value ...]

Writes the job file of an engine for a run: how many devices, memory and time to ask for. The run's
settings are checked first. The engine queues, places and retries; this command does none of it.

  hardware.devices=N      devices of each host, a process each
  hosts=N                 hosts (default: 1)
  cpus=N                  cores of each process
  memory=GIB              of each host
  budget.wall_seconds=S   what an attempt may last; it ends with 75 before, and is queued again
  profile=reserved|spot   spot: on capacity that can be taken away
  name=NAME               of the job (default: the recipe)
  file=PATH               to write (default: NAME.sbatch, NAME.sky.yaml or NAME.k8s.yaml)
  submit=true             hand it to sbatch, sky jobs launch or kubectl apply, and end with its code
  any setting of a run    recipe, model.path, data.path, training.steps, ...
  --recipe-dir DIR, --config-dir DIR    as for a run

slurm:       partition=NAME  qos=NAME  account=NAME  gpu=MODEL
skypilot:    gpu=MODEL  bucket=NAME (one host)  volume=NAME
kubernetes:  image=NAME:TAG  claim=NAME  queue=NAME  priority=NAME  node=LABEL=VALUE  gpu=RESOURCE

Exit codes: 0 written, 1 refused, 2 command line not parsable; with submit=true, the client's."""
FOLDERS = ("--recipe-dir", "--config-dir")
OPTIONS = tuple(option.name for option in fields(Options))
OWN = ("hosts", "cpus", "memory", "profile", "name", "file", "submit", *OPTIONS)
NAME = r"[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?"
MOST = {"hosts": 4096, "cpus": 1024, "memory": 2**20}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a command line says.

    Attributes:
        given: Settings of the launch, by name.
        settings: Of the run, flags among them.
    """

    engine: Engine
    given: dict[str, str] = field(default_factory=dict[str, str])
    settings: tuple[str, ...] = ()

    def number(self, key: str) -> int | None:
        """Return a setting that is a count; None where it is not given.

        Raises:
            UserError: If it is none.
        """
        text = self.given.get(key)
        if text is None:
            return None
        most = MOST[key]
        if not (text.isascii() and text.isdecimal() and len(text) < 9 and 1 <= int(text) <= most):
            raise UserError(key, f"{one_line(text, 40)!r} is no such number", f"give 1 to {most}")
        return int(text)


@clean_output()
def main(argv: list[str], started_ns: int) -> int:
    """Write a job file; return the exit code, of the engine's client where it was handed on."""
    if not argv or any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE if argv else Exit.UNPARSABLE
    try:
        asked = read(argv)
        code, run = _composed(asked.settings, started_ns)
        if run is None:
            return code
        job = make_job(asked, run, command=_shown(argv))
        return _hand_over(asked.engine, job, submit=_is_to_submit(asked))
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED


def read(argv: Sequence[str]) -> Asked:
    """Return what a command line says.

    Raises:
        UserError: Naming the word at fault.
    """
    engine, pending = ENGINES.get(argv[0]), iter(argv[1:])
    if engine is None:
        word = one_line(argv[0], 40)
        raise Unparsable(word, "is no engine", f"name one of {', '.join(ENGINES)}")
    given: dict[str, str] = {}
    settings: list[str] = []
    for arg in pending:
        if not arg.isprintable():
            raise UserError(
                one_line(arg, 60), "has characters that no line of a file has", "mend it"
            )
        if redact_override(arg) != arg:
            key = one_line(arg.partition("=")[0], 60)
            remedy = "give it to the job as an environment variable"
            raise UserError(key, "holds a secret, and a job file is read by many", remedy)
        name, equals, value = arg.partition("=")
        if name in FOLDERS:
            settings.append(arg if equals else f"{arg}={next(pending, '')}")
        elif name == "--debug" and not equals:
            settings.append(arg)
        elif arg.startswith("-"):
            raise Unparsable(one_line(arg, 60), "is no flag of launch", "--help lists them")
        elif name in OWN:
            given[name] = _value(name, value, engine, argv[0])
        else:
            settings.append(arg)
    return Asked(engine=engine, given=given, settings=tuple(settings))


def _value(name: str, value: str, engine: Engine, called: str) -> str:
    if not value:
        raise UserError(name, "is empty", "leave it out, or give a value")
    if name in OPTIONS and name not in engine.takes:
        raise UserError(name, f"has no effect for {called}", f"it takes {', '.join(engine.takes)}")
    return value


def _is_to_submit(asked: Asked) -> bool:
    text = asked.given.get("submit", "false")
    if text not in ("true", "false"):
        raise UserError("submit", f"{one_line(text, 40)!r} is no answer", "give true or false")
    return text == "true"


def _composed(settings: Sequence[str], started_ns: int) -> tuple[int, Any]:
    """Return the run that settings amount to, checked as a run is up to its device; None with the
    exit code where it is refused.
    """
    from pipeline.cli import main as cli

    found: list[Any] = []

    def keep(run: Any, *_: Any) -> int:
        found.append(run)
        return Exit.DONE

    if all(word.startswith("-") for word in settings):  # it would list the recipes
        raise UserError("recipe", "none is named", "add recipe=NAME; python -m pipeline lists them")
    code = cli.main(list(settings), started_ns=started_ns, execute=keep)
    return code, found[0] if found else None


def make_job(asked: Asked, run: Any, *, command: str) -> Job:
    """Return the job of a composed run, as its engine can be asked for it.

    Raises:
        UserError: Naming the setting that it cannot.
    """
    given = asked.given
    profiles = [each.value for each in Profile]
    profile = given.get("profile", Profile.reserved.value)
    if profile not in profiles:
        raise UserError("profile", f"{one_line(profile, 40)!r} is none", "give spot or reserved")
    name = given.get("name") or str(run.recipe).replace("_", "-").lower()
    check_name("name", name, NAME, "name of lower case letters, digits and hyphens")
    needs = needs_of(
        run,
        hosts=asked.number("hosts") or 1,
        cpus=asked.number("cpus"),
        memory_gib=asked.number("memory"),
        limits_time=asked.engine.limits_time,
    )
    job = Job(
        name=name,
        settings=_settings(asked.settings, needs),
        needs=needs,
        profile=Profile(profile),
        options=Options(**{key: given[key] for key in OPTIONS if key in given}),
        command=command,
        file=given.get("file", name + asked.engine.ending),
    )
    asked.engine.check(job)
    return job


def _settings(words: Sequence[str], needs: Needs) -> tuple[str, ...]:
    """Return the settings of the command in a job: how many ranks there are, the engine says; what
    an attempt may last, the run is told as well.
    """
    keys = [word.lstrip("+").partition("=")[0] for word in words]
    kept = [
        word
        for word, key in zip(words, keys, strict=True)
        if key not in ("hardware.devices", "--debug")
    ]
    if needs.wall_seconds is not None and "budget.wall_seconds" not in keys:
        kept.append(f"budget.wall_seconds={needs.wall_seconds:.0f}")
    return tuple(kept)


def _hand_over(engine: Engine, job: Job, *, submit: bool) -> int:
    """Write the file, and hand it to the engine's client where that is asked for.

    Raises:
        UserError: Before anything is written, if the client is not here or the file cannot be.
    """
    from pipeline.store.artifacts import write_text

    client = engine.client(job.file if job.file[0] != "-" else f"./{job.file}")
    if submit and shutil.which(client[0]) is None:
        problem = f"{client[0]} is not installed here"
        raise UserError("submit", problem, "install the engine's client, or leave submit out")
    path, text = Path(job.file).expanduser(), engine.text(job)
    try:
        if path.exists() and path.read_text() != text:
            problem = f"{one_line(path, 200)} is there, and is another"
            raise UserError("file", problem, "give file=PATH, or remove it")
        write_text(path, text)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        problem = f"{one_line(path, 200)} cannot be written ({why})"
        raise UserError("file", problem, "name another place") from None
    print(f"wrote {job.file}")
    if job.needs.source:
        print(f"asked for: {job.needs.source}")
    if not submit:
        print(f"hand it over: {shlex.join(client)}")
        return Exit.DONE
    sys.stdout.flush()
    # by hand, the environment's own python is taken
    done = subprocess.run(client, env={"PYTHON": sys.executable, **os.environ})
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def _shown(argv: Sequence[str]) -> str:
    """Return the command that writes the file again, on one line."""
    words = [word for word in argv if not word.startswith(("submit=", "--debug"))]
    return one_line(shlex.join(["python", "-m", "pipeline", "launch", *words]), 2000)
