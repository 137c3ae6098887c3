"""`python -m pipeline meter [OPTIONS] -- COMMAND ...`: meter any command into the same ledger and
MLflow.

What it took goes to `mlruns/runs/<run>/` (journal, result.json, report.md) and from there to
MLflow. The command's streams are its own, signals are passed on to it, and its exit code is ours.
One that ignores SIGTERM is waited for, and signalled again with every further signal: its hours
count as well. See `pipeline.phase` for what it can say itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.redaction import clean_output

if TYPE_CHECKING:
    import subprocess

    from pipeline.ledger.shapes import Result
    from pipeline.runs.metering.child import Child
    from pipeline.runs.metering.options import Settings
    from pipeline.runs.metering.run import MeteredRun
    from pipeline.runs.metering.watch import Watch

OUTLIVED = "processes of the command outlive it; what they do is not metered"
OUTLIVED_APART = (
    "processes that the command put into sessions of their own outlive it, and are not metered"
)
HELP = """Usage: python -m pipeline meter [OPTIONS] -- COMMAND [ARGUMENT ...]
       python -m pipeline meter --recover [--root FOLDER]

Meters a command: time, devices, device-hours, energy, what became of the time. Its exit code is
passed on.

  --name NAME            what to call it (default: its program's name)
  --root FOLDER          where runs are kept (default: mlruns)
  --gpus UUID,..|none    GPUs to look at (default: those that it can see); those it uses are counted
  --model-name NAME      the model that its cost counts for
  --team T  --cost-center C  --purpose P   whose it is; needed where PIPELINE_REQUIRE_OWNER=1
  --rate X  --currency EUR  --rate-source TEXT  --rate-date YYYY-MM-DD
                         declared price of a device-hour; one needs all four
  --kill-after SECONDS   SIGKILL that long after the first signal that asked it to end
                         (default: never)
  --no-mlflow            leave MLflow alone
  --recover              end the runs of meters that were killed, and stop

In a Python program, where nothing happens unmetered:
  with pipeline.phase("backward"): ...
  pipeline.count(tokens=n)"""


@clean_output()
def main(argv: list[str], started_ns: int) -> int:
    """Meter one command; return its exit code, or 1 or 2 where there was nothing to meter."""
    from pipeline.errors import Exit, Unparsable, UserError
    from pipeline.runs.metering.child import CannotStart, check_command
    from pipeline.runs.metering.options import ROOT, check_alone, read_options, read_settings, split
    from pipeline.runs.metering.recovery import recover

    own, command = split(argv)
    if any(arg in ("-h", "--help") for arg in own):
        print(HELP)
        return Exit.DONE
    try:
        options = read_options(own)
        if "--recover" in options:
            print(
                "\n".join(f"{name}: ended" for name in recover(Path(options.get("--root", ROOT))))
                or "nothing to end"
            )
            return Exit.DONE
        settings = read_settings(options, command)
        check_command(settings.command[0])
        check_alone()
        recover(settings.root)
        return meter(settings, started_ns)
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        if isinstance(error, CannotStart):
            return error.code
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED


def meter(settings: Settings, started_ns: int) -> int:
    """Run the command to its end and write what it took; return its exit code.

    Raises:
        UserError: If there is nowhere to write, or the command cannot be started after all.
    """
    from pipeline.runs.metering.child import CannotStart, Child, exit_code
    from pipeline.runs.metering.run import MeteredRun
    from pipeline.runs.metering.watch import Watch
    from pipeline.tracking.writer import start_writer

    watch = Watch(settings.gpus)
    run = MeteredRun.open(settings, started_ns)
    child, writer = Child(settings.command, run.environ(), kill_after_s=settings.kill_after_s), None
    with child.signals():  # until all is written
        watch.start(lambda used: run.journal.write("devices", used=used.to_json()))
        run.begin()
        try:
            child.start()
        except CannotStart as error:
            _end(run, child, watch, "FAILED", str(error))
            raise
        run.journal.write("started", pid=child.pid)
        if settings.mlflow:
            writer = start_writer(run.folder)
        code = _wait(child, run)
        try:
            said = _closing(_end(run, child, watch, *_status(code, child)), run.folder)
        # a full disk, a folder that is gone: no reason to call the command failed
        except OSError as error:
            said = (
                f"what it took cannot be written to {run.folder} ({error.strerror}); --recover ends"
                " its run later"
            )
    _say(said)
    if writer is not None:
        _deliver(writer, run.folder)
    return exit_code(code)


def _say(text: str) -> None:
    """Print for whoever still reads: the exit code is the command's, whether anybody does or
    not.
    """
    try:
        print(text, file=sys.stderr)
    except BrokenPipeError:  # what is left in its buffer would turn the exit code into 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _wait(child: Child, run: MeteredRun) -> int:
    from pipeline.ledger.journal import heartbeat

    with heartbeat(run.journal):
        return child.wait()


def _end(run: MeteredRun, child: Child, watch: Watch, status: str, why: str | None) -> Result:
    from pipeline.ledger.foreign import ENV
    from pipeline.ledger.ranks import opened, read_lives
    from pipeline.runs.metering.row import Facts

    lives, _ = read_lives(run.folder, run.start["node"])
    used = watch.stop(child.start_ns, child.end_ns, opened(lives))
    facts = Facts(
        name=run.start["name"],
        status=status,
        why=why,
        start_ns=child.start_ns,
        end_ns=child.end_ns,
        used=used,
        host_peak=child.host_peak,
    )
    daemons = child.daemons(f"{ENV}={run.folder}")
    left = [f"{OUTLIVED_APART}: {', '.join(daemons)}"] if daemons else []
    notes = [*used.notes, *([OUTLIVED] if child.outlived() else []), *left]
    return run.end(facts, now_ns=time.monotonic_ns(), notes=notes)


def _status(code: int, child: Child) -> tuple[str, str | None]:
    """Return how the command ended, and why where it did not finish."""
    if code == 0:
        return "FINISHED", None
    if code < 0:
        return "KILLED", f"ended by {_signal_name(-code)}"
    if child.stopped_by is not None:
        return "KILLED", f"ended with exit code {code} after {_signal_name(child.stopped_by)}"
    return "FAILED", f"exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _closing(result: Result, folder: Path) -> str:
    from pipeline.report.metered import closing_table

    return f"{closing_table(result)}\nreport: {folder / 'report.md'}"


def _deliver(writer: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait a bounded time for the last delivery; a signal meanwhile leaves it to the writer."""
    from pipeline.tracking.writer import undelivered

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    problem = undelivered(writer, folder)
    if problem is not None:
        _say(problem)
