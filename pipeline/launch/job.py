"""A job, as every engine is told of it: settings, needs, and what the engine alone asks for."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from pipeline.errors import UserError, one_line
from pipeline.launch.needs import Needs
from pipeline.ledger.numbers import how_many

PORT = 29500  # of the first rank, where hosts are of this job alone
STORE = "/store/mlruns"  # where a host is another at each attempt: on what outlives it
TAKEN = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # no text to YAML 1.1


class Profile(Enum):
    """Which capacity a job is for."""

    spot = "spot"  # preemptible: what is lost is done again
    reserved = "reserved"  # held until the job ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What engines ask for beside a run's own needs; each takes some of them. None: not given."""

    partition: str | None = None  # Slurm's
    qos: str | None = None  # Slurm's
    account: str | None = None  # Slurm's: who pays
    gpu: str | None = None  # its model (Slurm, SkyPilot) or the name of its resource (Kubernetes)
    bucket: str | None = None  # SkyPilot: holds the store, for one host
    volume: str | None = None  # SkyPilot: holds the store, for several hosts
    image: str | None = None  # Kubernetes: with Python and this package
    claim: str | None = None  # Kubernetes: the persistent volume claim that holds the store
    queue: str | None = None  # Kubernetes: of Kueue
    priority: str | None = None  # Kubernetes: the pods' priority class
    node: str | None = None  # Kubernetes: LABEL=VALUE of the nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job to write a file for.

    Attributes:
        name: In lower case letters, digits and hyphens.
        settings: Of `python -m pipeline`, each a word; without `hardware.devices`.
        command: That the file is written by, for its first lines; one line.
        file: Its name, as the engine's client is given it.
    """

    name: str
    settings: tuple[str, ...]
    needs: Needs
    profile: Profile = Profile.reserved
    options: Options = field(default_factory=Options)
    command: str = ""
    file: str = ""

    @property
    def what(self) -> str:
        """The devices, in words."""
        needs = self.needs
        kind = "GPU" if needs.on_gpu else "process"
        each = how_many(needs.devices, kind) if needs.on_gpu else _processes(needs.devices)
        return each if needs.hosts == 1 else f"{needs.hosts} hosts, {each} each"


def _processes(count: int) -> str:
    return "one CPU process" if count == 1 else f"{count} CPU processes"


def shell_words(words: Sequence[str]) -> str:
    """Return words as a shell reads them back, whatever stands in them."""
    return " ".join(map(shlex.quote, words))


def yaml_text(text: str) -> str:
    """Return a text as a YAML scalar that is read back as it is, plain where that is safe."""
    plain = re.fullmatch(r"[A-Za-z][\w-]*(?:[=./][\w./=-]*)?", text, re.ASCII)
    if plain and text.lower() not in TAKEN:
        return text
    return json.dumps(text, ensure_ascii=False)


def require(key: str, value: str | None, problem: str, remedy: str) -> str:
    """Return an option that an engine cannot do without.

    Raises:
        UserError: If it is not given.
    """
    if value is None:
        raise UserError(key, problem, remedy)
    return value


def check_name(key: str, value: str | None, pattern: str, meant: str) -> None:
    """Refuse an option that its engine would read as something else.

    Raises:
        UserError: If so.
    """
    if value is not None and not re.fullmatch(pattern, value, re.ASCII):
        raise UserError(key, f"{one_line(value, 60)!r} is no {meant}", "give its name")


def check_root(job: Job) -> None:
    """Refuse a store of one's own, where an engine mounts one.

    Raises:
        UserError: If so.
    """
    if any(word.partition("=")[0] == "tracking.root" for word in job.settings):
        raise UserError(
            "tracking.root", f"is {STORE} there, on what outlives a host", "leave it out"
        )


RANKS_OF_HOST = """\
export MASTER_ADDR MASTER_PORT={port} WORLD_SIZE={ranks} LOCAL_WORLD_SIZE={devices}
ranks=() code=0
trap 'kill -TERM "${{ranks[@]}}"' TERM
for LOCAL_RANK in {numbers}; do
  export LOCAL_RANK RANK=$((HOST_RANK * {devices} + LOCAL_RANK))
  python -m pipeline {settings} &
  ranks+=($!)
done
for rank in "${{ranks[@]}}"; do
  wait "$rank"
  ended=$?
  while kill -0 "$rank" 2>/dev/null; do  # a signal ended the wait, and not the rank
    wait "$rank"
    ended=$?
  done
  case $code in 0 | 75) [ $ended = 0 ] || code=$ended ;; esac
done
exit $code
"""
"""A process for each device of a host, told which rank it is: torchrun would turn their 75 into 1.
Before it, a file sets HOST_RANK and MASTER_ADDR.
"""


def ranks_of_host(job: Job, settings: str) -> str:
    """Return the shell lines that start the ranks of a host, and end with their exit code.

    Args:
        settings: Of the job, as the shell reads them.
    """
    needs = job.needs
    return RANKS_OF_HOST.format(
        port=PORT,
        ranks=needs.ranks,
        devices=needs.devices,
        numbers=" ".join(map(str, range(needs.devices))),
        settings=settings,
    )
