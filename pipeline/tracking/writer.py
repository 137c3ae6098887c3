"""The background writer of one run: from its journal to MLflow while the run works; what the run
waits for at its end.

A slow, dead or frozen MLflow costs the training nothing. Importing MLflow is most of the writer's
work (2.4 of 2.5 s of processor time), so a thread at the lowest priority does that. Deliveries are
short and hold locks, so they run at normal priority: whoever waits for a lock never waits for a
process that gets no processor time.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from pipeline.ledger.journal import read_events, read_first
from pipeline.ledger.records import DELIVERED, read_record
from pipeline.store.waiting import waiting_for
from pipeline.tracking.deliver import STATE

# NOW: the run has ended and waits, so that imports run at normal priority too
FOLLOW, NOW = "--follow", "--now"
INTERVAL_S, DYING_S = 2.0, 0.2  # between deliveries; the same for a run that is about to be no more
# of an import at the lowest priority once the run has ended; then it starts anew at normal priority
GRACE_S = 1.0
# a run waits this long for its writer: a fresh SQLite store takes its migrations out of it
DELIVERY_S = 60.0
# a gate waits longer: what it found must be known to the next one, on whatever machine
GATE_S = 300.0
# MLflow's client on an answer of another shape
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)
# in a run's folder; the log says why the last delivery failed
JOURNAL, LOG = "journal.jsonl", "mlflow.log"


def waiting(root: Path) -> list[str]:
    """Return the runs under a root whose journals are longer than what was delivered of them."""
    folders = [
        folder for folder in sorted((root / "runs").glob("*/")) if (folder / JOURNAL).is_file()
    ]
    return [
        folder.name for folder in folders if (folder / JOURNAL).stat().st_size > _delivered(folder)
    ]


def _delivered(folder: Path) -> int:
    state = read_record(folder / STATE, DELIVERED, so="all of the run is delivered again")
    return 0 if state is None else state["offset"]


# -- the run's side of its writer -----------------------------------------------------------------


def start_writer(run_dir: Path) -> subprocess.Popen[bytes]:
    """Start the background writer of this process's run: in a session of its own, so that Ctrl-C
    does not reach it.
    """
    command = [sys.executable, "-m", "pipeline", "sync", FOLLOW, str(run_dir), str(os.getpid())]
    with (run_dir / LOG).open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )


def let_go(writer: subprocess.Popen[bytes]) -> None:
    """Close the writer's input, which tells it that the run has ended: it looks once more and
    ends.
    """
    if writer.stdin is not None:
        writer.stdin.close()


def undelivered(
    writer: subprocess.Popen[bytes], run_dir: Path, *, wait_s: float | None = None
) -> str | None:
    """Wait a bounded time for the last delivery of a run that has ended; return what to say where
    it failed, or None.

    An interrupt ends the waiting, and not the writer.
    """
    wait_s = DELIVERY_S if wait_s is None else wait_s
    again = f"`python -m pipeline sync {run_dir.parent.parent}` delivers the rest"
    try:
        let_go(writer)
        with waiting_for("MLflow to take the last figures of this run"):
            code = writer.wait(wait_s)
    except subprocess.TimeoutExpired:
        return (
            f"MLflow has not taken all of this run within {wait_s:.0f} s; its writer continues, and"
            f" {again}"
        )
    except KeyboardInterrupt:
        return f"not waiting for MLflow; its writer continues, and {again}"
    if not code:
        return None
    log = run_dir / LOG
    said = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return (
        f"{next((line for line in reversed(said) if line), 'the writer to MLflow crashed')};"
        f" {again}"
    )


# -- the writer -----------------------------------------------------------------------------------


def follow(run_dir: Path, parent: int, *, now: bool = False) -> int:
    """Deliver a run's journal until it ends or its process is gone; meanwhile what other runs left.
    Return 0 or 1.

    The run holds the other end of our standard input: it is closed when the run has ended, or is
    about to be no more.

    Args:
        run_dir: The run's folder.
        parent: The run's process id.
        now: Import MLflow at normal priority: somebody waits for it.
    """
    if not now:
        _import_in_background(run_dir, parent)
    others = (
        folder
        for folder in sorted(run_dir.parent.glob("*/"))
        if folder != run_dir and _is_wanted(folder)
    )
    closed = False
    while True:
        gone = os.getppid() != parent  # asked first: what there was by then is delivered now
        ended = gone or (closed and _has_ended(run_dir))
        problem = None
        try:
            deliver_run(run_dir)
            other = None if ended else next(others, None)
            if other is not None:
                deliver_run(other)
        except Undelivered as error:
            problem, other = str(error), None
        if ended:
            break
        if closed:  # a process that dies lets go of its lock later than of this
            time.sleep(DYING_S)
        elif other is None:
            closed = _has_closed(sys.stdin.fileno(), INTERVAL_S)
    if problem is not None:
        print(problem, file=sys.stderr)
    return int(problem is not None)


def _import_in_background(run_dir: Path, parent: int) -> None:
    """Import MLflow at the lowest priority; where the run ends meanwhile, start this program anew
    at normal priority.

    Linux counts priorities by thread, and only an administrator may raise one again. So a thread
    takes the lowest, and a program that is started anew by the main thread begins with the main
    thread's.
    """
    if sys.platform != "linux":
        return
    thread = threading.Thread(target=_import_at_lowest_priority, daemon=True, name="import")
    thread.start()
    while thread.is_alive():
        gone = os.getppid() != parent
        if gone or _is_closed(sys.stdin.fileno()):
            # nobody waits for the writer of a run that was killed
            thread.join(0 if gone else GRACE_S)
            if thread.is_alive() and not gone:
                _weigh_session(0)
                again = [
                    sys.executable,
                    "-m",
                    "pipeline",
                    "sync",
                    FOLLOW,
                    str(run_dir),
                    str(parent),
                    NOW,
                ]
                os.execv(sys.executable, again)
        thread.join(DYING_S)
    _weigh_session(0)


def _import_at_lowest_priority() -> None:
    """Step back and import what a delivery needs: on a small machine the run's own threads come
    first.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    _weigh_session(19)
    from pipeline.tracking.deliver import import_mlflow

    import_mlflow()


def _weigh_session(niceness: int) -> None:
    """Set how Linux weighs this process's session, which it may do before it weighs threads.
    Anybody may raise it.
    """
    if os.getsid(0) != os.getpid():  # a terminal's session is not ours to slow down
        return
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness), encoding="ascii")


def _is_closed(stream: int) -> bool:
    """Tell whether the other end of a pipe is closed, and leave it for the next to find."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return any(event & (select.POLLHUP | select.POLLIN) for _, event in poll.poll(0))


def _has_ended(run_dir: Path) -> bool:
    events = read_events(run_dir / JOURNAL)
    return bool(events) and events[-1]["e"] == "run_end"


def _has_closed(stream: int, seconds: float) -> bool:
    """Wait until the other end of a pipe is closed, at most some seconds; tell whether it is."""
    readable, _, _ = select.select([stream], [], [], seconds)
    return bool(readable) and not os.read(stream, 1)


def _is_wanted(folder: Path) -> bool:
    """Tell whether a run was to go to MLflow; one that was not goes there by an explicit sync
    alone.
    """
    start = read_first(folder / JOURNAL)
    return start is not None and bool(start.get("params", {}).get("tracking.mlflow", True))


class Undelivered(Exception):
    """MLflow did not take a run.

    Args:
        error: What its client raised.
        said: What MLflow did, as a verb.
        is_down: Whether it cannot be reached at all, so that the next run would fare no better.
    """

    def __init__(self, error: Exception, said: str, *, is_down: bool = False) -> None:
        from pipeline.config.redaction import redact_value

        self.is_down = is_down
        text = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        super().__init__(f"MLflow {said} ({redact_value('', text)[:200]})")


def deliver_run(folder: Path, *, look_again: bool = False) -> int:
    """Deliver; return how many events.

    Raises:
        Undelivered: If MLflow did not take them.
    """
    from pipeline.tracking.deliver import deliver, is_down, quiet, store_errors

    quiet()
    try:
        return deliver(folder, look_again=look_again)
    except store_errors() as error:
        down = is_down(error)
        raise Undelivered(
            error, "cannot be reached" if down else "refuses", is_down=down
        ) from error
    except UNREADABLE as error:
        raise Undelivered(error, "answers what its client cannot read") from error
