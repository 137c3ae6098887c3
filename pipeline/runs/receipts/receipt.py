"""receipt.json: what was measured, on what, and digests of all that it was made from.

It is made of the files of a run's folder alone, so that whoever has them can make it again. The
journal is taken up to its last line `booked`: what follows is delivery.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from pipeline.config.text_files import read_bytes
from pipeline.ledger.journal import read_lines
from pipeline.ledger.json_schema import Schema, why_not
from pipeline.ledger.records import (
    BASIS,
    MAX_BYTES,
    RECEIPT_VERSION,
    parsed,
    sound_events,
    why_damaged,
)
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.ledger.shapes import Booked, ComparisonBasis, Event, FirstLine, Receipt, Result
from pipeline.ledger.values import from_schema_1
from pipeline.runs.receipts.evidence import COMPARED, FOLDER
from pipeline.runs.receipts.figures import LEFT_OUT, figures_of
from pipeline.store.artifacts import MODEL, write_text

FILE, SIGNATURE = "receipt.json", "receipt.json.sig"


class NotThere(Exception):
    """A file of a run's folder is missing, or is not what it was: its name, and why."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path.name}: {why}")
        self.path, self.why = path, why


@dataclass(frozen=True, slots=True)
class Kept:
    """The files of a run's folder that a receipt is made of.

    Attributes:
        journal: Up to its last line `booked`, as bytes and as sound lines.
        after: The lines that follow.
        settings: What config.json says, and its digest.
        files: Digests of what lies in evidence/, by name.
        basis: Of the comparisons; None where it is missing or damaged.
    """

    folder: Path
    journal: bytes
    events: list[Event]
    after: list[Event]
    result: Result
    settings: dict[str, Any]
    settings_sha256: str
    files: dict[str, str]
    basis: ComparisonBasis | None

    @property
    def start(self) -> FirstLine:
        """The first line of the last attempt."""
        return [each for each in self.events if each["e"] == "run_start"][-1]

    @property
    def booked(self) -> Booked:
        """The line that the journal is taken up to."""
        return cast(Booked, self.events[-1])


def read_kept(folder: Path) -> Kept:
    """Read the files of a run that has ended.

    Raises:
        NotThere: If one is missing, or damaged.
    """
    journal = _bytes(folder / "journal.jsonl")
    events, end = _until_booked(journal, folder)
    result = _json(folder / "result.json")
    why = why_not(result, RESULT_SCHEMA)
    if why is not None:
        raise NotThere(folder / "result.json", why)
    settings = _bytes(folder / "config.json")
    place = folder / FOLDER
    files = {
        each.name: sha256(_bytes(each)).hexdigest()
        for each in sorted(place.glob("*"))
        if each.is_file() and not each.name.startswith(".")
    }
    basis = from_schema_1(parsed(place / COMPARED)[0])
    return Kept(
        folder=folder,
        journal=journal[:end],
        events=events,
        after=sound_events(read_lines(journal[end:], checked=True), folder / "journal.jsonl"),
        result=result,
        settings=_json(folder / "config.json"),
        settings_sha256=sha256(settings).hexdigest(),
        files=files,
        basis=None if why_damaged(basis, BASIS) is not None else basis,
    )


def _until_booked(journal: bytes, folder: Path) -> tuple[list[Event], int]:
    """Return the sound lines of a journal up to its last line `booked`, and where that ends."""
    end, at = 0, 0
    for line in journal.split(b"\n"):
        at += len(line) + 1
        # what is parsed again below is parsed here only where it may be such a line
        if b"booked" in line and any(e["e"] == "booked" for e in read_lines(line, checked=True)):
            end = at
    path = folder / "journal.jsonl"
    events = sound_events(read_lines(journal[:end], checked=True), path)
    known = {event["e"] for event in events}
    if not {"run_start", "booked"} <= known:
        raise NotThere(path, "it does not say when the run ended")
    return events, end


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, limit=MAX_BYTES)
    except OSError as error:
        raise NotThere(path, error.strerror or str(error)) from None


def _json(path: Path) -> Any:
    record, why = parsed(path)
    if why is None and record is None:
        raise NotThere(path, "No such file")
    if why is not None or not isinstance(record, dict):
        raise NotThere(path, why or "it is no object")
    return record


def make_receipt(kept: Kept) -> Receipt:
    """Return the receipt of a run by the files in its folder."""
    result, start, booked = kept.result, kept.start, kept.booked
    made = [
        (row, artifact)
        for row in result["rows"]
        if row["status"] == "FINISHED" and (artifact := row["artifact"]) is not None
    ]
    return {
        "schema": RECEIPT_VERSION,
        "run_id": result["run_id"],
        "recipe": result["recipe"],
        "question": result["question"],
        "created": datetime.fromtimestamp(booked["t"], UTC).isoformat(timespec="seconds"),
        "release": booked["release"],
        "commit": start["environment"].get("mlflow.source.git.commit"),
        "task": kept.settings["task"],
        "primary_arm": result["primary_arm"],
        "seeds": kept.settings["seeds"] or [kept.settings["seed"]],
        "device": {
            "kind": result["device"]["kind"],
            "name": result["device"]["name"],
            "count": result["device"]["count"],
        },
        "data": {
            "name": start["datasets"][0]["name"] if start["datasets"] else "",
            "digest": start["environment"].get("data.digest", ""),
            "splits": {each["split"]: each["num_documents"] for each in start["datasets"]},
        },
        "digests": {
            "journal": {"bytes": len(kept.journal), "sha256": sha256(kept.journal).hexdigest()},
            "result": result_digest(result),
            "settings": kept.settings_sha256,
            "schema": booked["schema"],
            "evidence": kept.files,
        },
        "artifacts": [
            {
                "arm": row["arm"],
                "seed": row["seed"],
                "kind": artifact["kind"],
                "digest": artifact["digest"],
                "bytes": artifact["bytes"],
            }
            for row, artifact in made
        ],
        "figures": {name: dict(each) for name, each in figures_of(result).items()},
        "left_out": LEFT_OUT,
    }


def write_receipt(folder: Path) -> bytes:
    """Write the receipt of a run that has its result, and return it as it lies there.

    Raises:
        NotThere: If a file that it is made of is missing.
        OSError: If it cannot be written.
    """
    receipt = make_receipt(read_kept(folder))
    text = json.dumps(receipt, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(folder / FILE, text + "\n")
    return read_bytes(folder / FILE)


def why_none(result: Result) -> str | None:
    """Return why a run leaves no receipt, or None: it vouches for models of runs that finished."""
    if result["status"] != "FINISHED":
        why = "" if result["why"] is None else f": {result['why']}"
        return f"the run ended {result['status']}{why}"
    kinds = [row["artifact"]["kind"] for row in result["rows"] if row["artifact"] is not None]
    return None if MODEL in kinds else "the run made no model"


def result_digest(result: Result) -> str:
    """Return a digest of a result without what may change after the end (`LEFT_OUT`)."""
    late = {name.partition("/")[2] for name in LEFT_OUT}
    run = {name: each for name, each in result["run"].items() if name not in late}
    return _digest({**result, "run": run})


def schema_digest(schema: Schema = RESULT_SCHEMA) -> str:
    """Return a digest of the schema of result.json."""
    return _digest(schema)


def _digest(record: Any) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
