"""A store of MLflow in a SQLite file, read without MLflow: importing its client takes four seconds,
and what is asked of a whole store takes a tenth of one.

Only what reports ask is read here, and nothing is written. The tables are those that MLflow 1.0 to
3.x have in common; a file whose tables are others, or that is locked, is left to MLflow's own
client (`sqlite3.Error`).

Source: mlflow/store/tracking/dbmodels/models.py and mlflow/store/model_registry/dbmodels/models.py.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path

from pipeline.ledger.charge_sources import RUN_TAG
from pipeline.ledger.shapes import StoredRun

BUSY_S = 5.0  # how long a writer may hold the file
_PAIRS = "SELECT run_uuid, key, value FROM {}"
_RUN = "SELECT run_uuid, status, start_time, end_time, lifecycle_stage FROM runs "


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None where it is another one."""
    scheme, _, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if scheme.partition("+")[0] == "sqlite" and path else None


def runs_between(file: Path, start_ms: int, end_ms: int) -> list[StoredRun]:
    """Return the runs that began before `end_ms` and had not ended before `start_ms`, and all stage
    attempts of those of them that are the pipeline's.

    Args:
        start_ms: UTC, milliseconds since 1970.

    Raises:
        sqlite3.Error: If the file is no such store, or is locked.
    """
    with _opened(file) as database:
        touched = "WHERE start_time < ? AND (end_time >= ? OR status = 'RUNNING')"
        ids = [row[0] for row in database.execute(_RUN + touched, (end_ms, start_ms))]
        named = "SELECT run_uuid, value FROM tags WHERE key = ?"
        names: dict[str, str] = dict(database.execute(named, (RUN_TAG,)))
        parents = {name for each in ids if (name := names.get(each)) and "/" not in name}
        inside = (each for each, name in names.items() if name.partition("/")[0] in parents)
        return _stored(database, {*ids, *inside})


def runs_tagged(file: Path, tag: str) -> list[StoredRun]:
    """Return the runs that have a tag, the newest first; without those that were deleted.

    Raises:
        sqlite3.Error: If the file is no such store, or is locked.
    """
    query = (
        "SELECT run_uuid FROM runs JOIN tags USING (run_uuid) JOIN experiments USING"
        " (experiment_id) WHERE tags.key = ? AND runs.lifecycle_stage = 'active'"
        " AND experiments.lifecycle_stage = 'active'"
    )
    with _opened(file) as database:
        found = _stored(database, [row[0] for row in database.execute(query, (tag,))])
    return sorted(found, key=lambda run: (-run["start_ms"], run["id"]))


def versions_tagged(file: Path, names: Collection[str], tag: str) -> dict[str, dict[str, int]]:
    """Return of registered models, by name, the newest version's number by a tag's value.

    Raises:
        sqlite3.Error: If the file is no such store, or is locked.
    """
    query = (
        "SELECT name, tags.value, MAX(version) FROM model_version_tags AS tags"
        " JOIN model_versions AS versions USING (name, version)"
        " WHERE tags.key = ? AND versions.current_stage IS NOT 'Deleted_Internal'"
        " AND name IN (SELECT value FROM json_each(?)) GROUP BY name, tags.value"
    )
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    with _opened(file) as database:
        for name, value, version in database.execute(query, (tag, json.dumps([*names]))):
            found[name][value] = version
    return found


@contextmanager
def _opened(file: Path) -> Generator[sqlite3.Connection]:
    """Open a store to read; what others write meanwhile is not seen."""
    database = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", timeout=BUSY_S, uri=True)
    try:
        database.execute("BEGIN")
        yield database
    finally:
        database.close()


def _stored(database: sqlite3.Connection, ids: Collection[str]) -> list[StoredRun]:
    """Return runs with all that they hold."""
    listed = json.dumps(sorted(ids))
    where = " WHERE run_uuid IN (SELECT value FROM json_each(?))"
    found: dict[str, StoredRun] = {}
    for run, status, start_ms, end_ms, stage in database.execute(_RUN + where, (listed,)):
        found[run] = {
            "id": run,
            "status": status,
            "start_ms": start_ms,
            "end_ms": end_ms,
            "active": stage == "active",
            "metrics": {},
            "params": {},
            "tags": {},
        }
    read = "SELECT run_uuid, key, value, is_nan FROM latest_metrics" + where
    for run, key, value, is_nan in database.execute(read, (listed,)):
        found[run]["metrics"][key] = math.nan if is_nan else value
    for run, key, value in database.execute(_PAIRS.format("params") + where, (listed,)):
        found[run]["params"][key] = value
    for run, key, value in database.execute(_PAIRS.format("tags") + where, (listed,)):
        found[run]["tags"][key] = value or ""
    return list(found.values())
