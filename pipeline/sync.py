"""`python -m pipeline.sync [ROOT | RUN_DIR]`: deliver to MLflow what it has not had yet. Running it again is harmless.

A run starts this in a process of its own, so that a slow, dead or frozen MLflow costs the training nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

USAGE = "Usage: python -m pipeline.sync [ROOT | RUN_DIR]   (default: mlruns)"


def main(argv: list[str]) -> int:
    """Deliver one run, or all runs under a root; return 0, or 1 where MLflow could not be reached."""
    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return 0
    place = Path(argv[0] if argv else "mlruns")
    folders = [place] if (place / "journal.jsonl").is_file() else sorted((place / "runs").glob("*/"))
    if not folders:
        print(f"refused: {place}: holds no runs; name the folder that holds runs/", file=sys.stderr)
        return 1
    from pipeline.tracking import deliver, quiet

    quiet()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for folder in folders:
        try:
            count = deliver(folder)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            text = str(error).strip().splitlines()[0][:200]
            print(f"{folder.name}: MLflow cannot be reached ({text}); the journal keeps everything", file=sys.stderr)
            return 1
        print(f"{folder.name}: {count} events delivered")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
