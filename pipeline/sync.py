"""`python -m pipeline.sync [ROOT | RUN_DIR]`: deliver to MLflow what it has not had yet. Running it again is harmless.

With `--follow` it is the background writer of one run: started by the run, in a session of its own, at the lowest
priority, it delivers while the run works and ends after it. A slow, dead or frozen MLflow costs the training nothing.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

USAGE = "Usage: python -m pipeline.sync [ROOT | RUN_DIR]   (default: mlruns)"
FOLLOW = "--follow"
INTERVAL_S = 2.0  # between deliveries
LOG = "mlflow.log"  # in the run's folder: why the last delivery failed


def main(argv: list[str]) -> int:
    """Deliver one run, or all runs under a root; return 0, or 1 where MLflow could not be reached."""
    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return 0
    if argv and argv[0] == FOLLOW:
        return follow(Path(argv[1]), int(argv[2]))
    place = Path(argv[0] if argv else "mlruns")
    folders = [place] if (place / "journal.jsonl").is_file() else sorted((place / "runs").glob("*/"))
    if not folders:
        print(f"refused: {place}: holds no runs; name the folder that holds runs/", file=sys.stderr)
        return 1
    for folder in folders:
        count, problem = _try_deliver(folder)
        if problem:
            print(f"{folder.name}: {problem}; the journal keeps everything", file=sys.stderr)
            return 1
        print(f"{folder.name}: {count} events delivered")
    return 0


def follow(run_dir: Path, parent: int) -> int:
    """Deliver a run's journal until it ends or its process is gone, then what other runs left; return 0 or 1."""
    os.nice(19)  # on a small machine the run's own threads come first
    while True:
        ended = os.getppid() != parent or _has_ended(run_dir)  # asked first: what there was by then is delivered now
        problem = _try_deliver(run_dir)[1]
        if ended:
            break
        time.sleep(INTERVAL_S)
    if problem:
        (run_dir / LOG).write_text(problem + "\n", encoding="utf-8")
        return 1
    for other in sorted(run_dir.parent.glob("*/")):
        if _try_deliver(other)[1]:
            break
    return 0


def _has_ended(run_dir: Path) -> bool:
    from pipeline.ledger.journal import read_events

    events = read_events(run_dir / "journal.jsonl")
    return bool(events) and events[-1]["e"] == "run_end"


def _try_deliver(folder: Path) -> tuple[int, str | None]:
    """Deliver; return how many events, and why not where MLflow could not be reached."""
    from pipeline.tracking import deliver, quiet

    quiet()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return deliver(folder), None
    except (MlflowException, SQLAlchemyError, OSError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return 0, f"MLflow cannot be reached ({text})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
