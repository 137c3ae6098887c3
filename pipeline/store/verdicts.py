"""A gate's record: its verdict with a checksum, by key in the store; what was edited is refused,
never believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.ledger.records import parsed
from pipeline.ledger.shapes import Verdict
from pipeline.ledger.values import from_schema_1
from pipeline.store.artifacts import Artifact, Store, read_json

KIND = "verdict"
FILE = "verdict.json"
# in verdict.json, and not part of what is recorded
BESIDE = ("sha256", "promotion", "history", "end")


def canonical(verdict: Mapping[str, Any]) -> bytes:
    """Return the bytes that a verdict's checksum is taken over."""
    return json.dumps(verdict, sort_keys=True, ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "surrogatepass"
    )


def checksum(verdict: Mapping[str, Any]) -> str:
    """Return the checksum that stands beside a verdict wherever it is recorded."""
    return sha256(canonical(verdict)).hexdigest()


def as_recorded(written: Mapping[str, Any]) -> Verdict:
    """Return a verdict in the form that was recorded and checksummed, also from a run that only
    repeated it.
    """
    first = without(written, "recorded", *BESIDE)
    first["run_id"] = written.get("recorded", written["run_id"])
    return first


def without(written: Mapping[str, Any], *names: str) -> Any:
    """Return a verdict without some of what stands in it."""
    return {name: value for name, value in written.items() if name not in names}


def record(store: Store, key: str, verdict: Verdict) -> Artifact:
    """Keep a verdict under its key, as an artifact: its folder is named by what is in it."""
    with store.scratch() as out:
        # The very bytes of the checksum.
        (out / FILE).write_bytes(canonical(verdict))
        artifact = store.commit(out, KIND, {"key": key, "run_id": verdict["run_id"]})
    store.remember("verdicts", key, {"artifact": artifact.to_json(), "sha256": checksum(verdict)})
    return artifact


def recall(store: Store, key: str) -> Verdict | None:
    """Return the verdict recorded under a key, or None.

    Raises:
        UserError: If it is not what was recorded.
    """
    note = store.root / "verdicts" / f"{key}.json"
    if not note.exists():
        return None
    noted: Any = read_json(note)
    artifact = noted.get("artifact") if isinstance(noted, dict) else None
    # written whole or not at all: a look that cannot be read is not forgotten
    if not isinstance(artifact, dict):
        raise _edited(note)
    path = store.root / "artifacts" / str(artifact.get("digest")) / FILE
    verdict, _ = parsed(path)  # as it was written: its checksum is of that
    if not isinstance(verdict, dict) or checksum(verdict) != noted.get("sha256"):
        raise _edited(path)
    # A note that was copied to another key would give a PASS to another comparison.
    if verdict.get("key") != key:
        raise UserError(
            "verdict", f"{note} is of another comparison", "restore it; a verdict is never edited"
        )
    return from_schema_1(verdict)


def _edited(path: Path) -> UserError:
    return UserError(
        "verdict", f"{path} is not what was recorded", "restore it; a verdict is never edited"
    )
