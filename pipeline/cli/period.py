"""A period of the MLflow store, as `chargeback` and `weekly` read it: its days, the store that is
there, the runs that it touches, and what has to be said of those that are left out.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config.redaction import redact_value
from pipeline.errors import UserError, one_line
from pipeline.ledger.charges import OWNER, RunFacts
from pipeline.ledger.numbers import agreed, how_many
from pipeline.ledger.shapes import StoredRun
from pipeline.tracking.writer import waiting

_SQLITE = re.compile(r"sqlite(?:\+\w+)?://(?:/(?P<path>[^?]*))?")
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


def day_of(name: str, text: str) -> float:
    """Return when a day begins (UTC), in seconds since 1970.

    Raises:
        UserError: Naming the option.
    """
    try:
        if _DAY.fullmatch(text):
            return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        pass
    raise UserError(name, f"{text!r} is no day", "write it as 2026-11-01; days are UTC")


def key_of_groups(text: str | None) -> str:
    """Return what `--by` groups by; the team, where nothing is said.

    Raises:
        UserError: If there is no such key.
    """
    by = "model_name" if text == "model" else OWNER[0] if text is None else text
    if by not in OWNER:
        raise UserError("--by", f"{by!r} is nothing to group by", f"give {', '.join(OWNER)}")
    return by


def store_of(root: str | None, uri: str | None) -> str:
    """Return the URI of a store that is there; asking for what was spent makes none.

    Raises:
        UserError: If it is none.
    """
    from pipeline.tracking.deliver import store_uri

    typed = f"sqlite:///{Path(root).expanduser().resolve() / 'mlflow.db'}" if root else None
    found = uri or typed or store_uri(Path("mlruns"), None)
    file = _SQLITE.match(found)
    if file:
        _check_file(Path(file["path"] or ""), "--uri" if uri else "--root")
    return found


TABLES = ("alembic_version", "experiments", "runs", "tags", "params", "latest_metrics")
"""What a store of MLflow has, at least."""


def _check_file(path: Path, key: str) -> None:
    remedy = "name the folder that holds mlflow.db, or deliver with python -m pipeline sync"
    if not path.is_file():
        raise UserError(key, f"there is no store {path}", remedy)
    try:
        with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as database:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            remedy = "try again when the writer is done"
        raise UserError(key, f"{path} cannot be read ({error})", remedy) from None
    if not set(TABLES) <= names:  # MLflow would make its own in there
        raise UserError(key, f"{path} holds no MLflow store", remedy)


def runs_between(uri: str, start_s: float, end_s: float) -> tuple[list[StoredRun], list[str]]:
    """Return the runs of a store that a period touches, with all their stage attempts, and what is
    to be said of the others.

    Args:
        start_s: UTC, seconds since 1970; `end_s` is no part of the period.

    Raises:
        UserError: If the store does not answer.
    """
    from pipeline.tracking.deliver import quiet, store_errors, stored_runs

    quiet()
    try:
        stored, num_others = stored_runs(uri, int(start_s * 1000), int(end_s * 1000))
    except store_errors() as error:
        text = redact_value("", one_line(error, 200))
        raise UserError(
            "--uri", f"the store does not answer ({text})", "see that it runs, and try again"
        ) from None
    deleted = sum(not run["active"] for run in stored)
    return stored, [
        *counted(
            deleted,
            "run or stage was deleted in the UI; what it spent is spent",
            "runs and stages were deleted in the UI; what they spent is spent",
        ),
        *counted(
            num_others,
            "run of another program was left out",
            "runs of other programs were left out",
        ),
    ]


def inside_others(inside: Sequence[str]) -> list[str]:
    """Return what is to be said of runs inside metered ones, by their ids."""
    return counted(
        len(inside),
        "run inside a metered run is part of it",
        "runs inside a metered run are part of it",
    )


def counted(num: int, one: str, many: str) -> list[str]:
    """Return the note on so many runs; none on none."""
    return [how_many(num, one, many)] if num else []


def behind(root: Path) -> list[str]:
    """Return what to say where journals beside the store hold what it has not had."""
    late = waiting(root)
    rest = f"more to tell than MLflow has had: python -m pipeline sync {root}"
    return counted(len(late), f"run under {root} has {rest}", f"runs under {root} have {rest}")


def lower_bounds(runs: Sequence[RunFacts]) -> list[str]:
    """Return what is to be said of runs whose parts and whole do not agree."""
    silent = sum(run.total_h is None for run in runs)
    more = sum((run.rest_h or 0.0) < -1e-6 for run in runs)
    return [
        *counted(
            silent,
            "run does not say what it took outside of stages: a lower bound",
            "runs do not say what they took outside of stages: a lower bound",
        ),
        *(
            [
                f"the stages of {how_many(more, 'run')} hold more than"
                f" {agreed(more, 'it', 'they')} took: {agreed(more, 'its', 'their')} stages are"
                " counted"
            ]
            if more
            else []
        ),
    ]
