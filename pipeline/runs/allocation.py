"""What a scheduler held for the run in progress, as it ends."""

from __future__ import annotations

from pipeline.ledger.allocated import attempts_in, mismatches
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.journal import read_events
from pipeline.ledger.shapes import Allocated
from pipeline.ledger.values import null
from pipeline.runs.jobs import read_jobs
from pipeline.runs.running import Running

WHAT = "what the scheduler held"


def allocation(running: Running) -> Allocated:
    """Return what the scheduler says that it holds for a run until now; note where that does not
    agree with the run.
    """
    session, notes = running.session, running.book.notes

    def unread(why: str) -> Allocated:
        notes.append(unmeasured(WHAT, why))
        return {"gpu_hours": null(unmeasured(WHAT, why)).to_json(), "grants": []}

    def read() -> Allocated:
        events = read_events(session.folder / "journal.jsonl", checked=True)
        found = read_jobs(session.folder, events)
        on_gpu = device_of(session.device).kind != "cpu"
        notes.extend(mismatches(found, attempts_in(events), on_gpu=on_gpu))
        return found

    return attempted(read, unread)
