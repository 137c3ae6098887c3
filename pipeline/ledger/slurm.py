"""What Slurm's accounting says that it held for a job: one row for each time that it started.

Source: sacct(1) of Slurm 22.05. A job that is queued again keeps its number, and `--duplicates`
shows each start of it; `ElapsedRaw` is in seconds, of a job that still runs until now; `AllocTRES`
names `gres/gpu` where the site lists it in AccountingStorageTRES.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.errors import one_line

TIMEOUT_S = 10.0  # a run waits no longer for an answer
FIELDS = ("JobIDRaw", "State", "Start", "End", "ElapsedRaw", "AllocTRES")
GPU = "gres/gpu"


@dataclass(frozen=True, slots=True)
class Held:
    """Devices that Slurm held for one start of a job.

    Attributes:
        state: As Slurm names it.
        start_s: UTC, seconds since 1970.
        end_s: Likewise; None while it lasts.
        elapsed_s: Seconds from its start to its end, or until now.
        gpus: Of all its nodes; None where accounting names none.
    """

    job_id: str
    state: str
    start_s: int
    end_s: int | None
    elapsed_s: int
    gpus: int | None


class Unanswered(Exception):
    """Accounting does not say: the reason is the message."""


def read_held(job_ids: Iterable[str]) -> list[Held]:
    """Return all starts of jobs, as `sacct` knows them.

    Raises:
        Unanswered: If it is not here, refuses, or takes longer than `TIMEOUT_S`.
    """
    command = ["sacct", "-j", ",".join(sorted(set(job_ids))), "--duplicates", "-X", "-P", "-n"]
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [*command, "-o", ",".join(FIELDS)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except FileNotFoundError:
        raise Unanswered("no sacct here") from None
    except subprocess.TimeoutExpired:
        raise Unanswered(f"sacct did not answer within {TIMEOUT_S:g} s") from None
    except OSError as error:
        raise Unanswered(f"sacct cannot be run ({error.strerror})") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Unanswered(f"sacct: {one_line(said.removeprefix('sacct: error: '), 200)}")
    rows = (line.split("|") for line in done.stdout.splitlines())
    return [held for row in rows if (held := _held(row)) is not None]


def _held(row: Sequence[str]) -> Held | None:
    """Return a row as it is meant; None for a job that has not started, or what is no row."""
    if len(row) != len(FIELDS):
        return None
    job_id, state, start, end, elapsed, tres = row
    if not (start.isdecimal() and elapsed.isdecimal()):
        return None
    words = state.split() or ["unknown"]  # CANCELLED by 0
    ended = int(end) if end.isdecimal() else None
    return Held(job_id, words[0], int(start), ended, int(elapsed), _gpus(tres))


def _gpus(tres: str) -> int | None:
    """Return the GPUs in `AllocTRES`: those of a model stand beside all of them, or alone."""
    parts = (each.partition("=") for each in tres.split(","))
    counts = {name: count for name, _, count in parts}
    own = [counts[GPU]] if GPU in counts else []
    found = own or [count for name, count in counts.items() if name.startswith(f"{GPU}:")]
    return sum(map(int, found)) if found and all(each.isdecimal() for each in found) else None
