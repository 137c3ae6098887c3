"""`python -m pipeline sync [ROOT | RUN_DIR]`: deliver to MLflow what it has not had yet. Running it
again is harmless. Runs in a scheduler's jobs are first completed with what was held for these.

With `--follow` it is the background writer of one run (`tracking/writer.py`), started by the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.redaction import clean_output
from pipeline.ledger.numbers import how_many
from pipeline.store.waiting import waiting_for
from pipeline.tracking.writer import FOLLOW, JOURNAL, NOW, Undelivered, deliver_run, follow

USAGE = "Usage: python -m pipeline sync [ROOT | RUN_DIR]   (default: mlruns)"
IMPORT_S = 5.0  # of processor time that an idle machine needs for importing MLflow, twice


@clean_output()
def main(argv: list[str], _started_ns: int = 0) -> int:
    """Deliver one run, or all runs under a root; return 0, or 1 where MLflow did not take them
    all.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return 0
    if argv and argv[0] == FOLLOW:
        return follow(Path(argv[1]), int(argv[2]), now=NOW in argv)
    place = Path(argv[0] if argv else "mlruns")
    folders = [place] if (place / JOURNAL).is_file() else sorted((place / "runs").glob("*/"))
    if not folders:
        print(f"refused: {place}: holds no runs; name the folder that holds runs/", file=sys.stderr)
        return 1
    from pipeline.runs.jobs import settle
    from pipeline.tracking.deliver import import_mlflow

    with waiting_for("Python to import MLflow", after_s=IMPORT_S):
        import_mlflow()
    failed = False
    for folder in folders:
        if settle(folder):
            print(f"{folder.name}: complete with what the scheduler held until its jobs ended")
        try:
            delivered = deliver_run(folder, look_again=True)
            print(f"{folder.name}: {how_many(delivered, 'event')} delivered")
        except Undelivered as problem:
            failed = True
            print(f"{folder.name}: {problem}; the journal keeps everything", file=sys.stderr)
            if problem.is_down:
                break
    return int(failed)
