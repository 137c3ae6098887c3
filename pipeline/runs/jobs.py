"""The jobs of a scheduler that a run's attempts were in, and what it says that it held for them.

While a run ends, its own job still lasts: what is known then is until now, and said to be an
estimate. The next attempt asks anew, and so does `python -m pipeline sync`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from pipeline.ledger.allocated import attempts_in, is_settled, read_allocated
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.records import RUN, read_record
from pipeline.ledger.run_cost import paid_for
from pipeline.ledger.shapes import Allocated, Event, LastLine, Result, RunTotals
from pipeline.store.artifacts import write_json
from pipeline.store.locks import lock_at


def jobs_of(folder: Path) -> set[str]:
    """Return the numbers of the jobs that the attempts at a run were in."""
    state = read_record(folder / "run.json", RUN)
    return set(() if state is None else state.get("jobs", ()))


def read_jobs(folder: Path, events: list[Event]) -> Allocated:
    """Return what the scheduler says that it holds, or held, for a run.

    Args:
        events: Of its journal.
    """
    own, others = jobs_of(folder), dict[str, list[str]]()
    for other in sorted(folder.parent.glob("*/")) if own else []:
        if other.name != folder.name:
            for job in own & jobs_of(other):
                others.setdefault(job, []).append(other.name)
    return read_allocated(attempts_in(events), others)


def settle(folder: Path) -> bool:
    """Complete the result and the journal of a run that has ended, once the scheduler knows more
    than it did then.

    Returns:
        Whether anything was learnt. Without an answer, what was known stays.
    """
    from filelock import Timeout

    try:
        with lock_at(folder / ".lock").acquire(timeout=0):
            return _settle(folder)
    except Timeout:  # an attempt is at work, and will ask itself
        return False


def _settle(folder: Path) -> bool:
    from pipeline.report.material import material_of
    from pipeline.report.run_report import short_form
    from pipeline.runs.files import write_files

    events = read_events(folder / "journal.jsonl", checked=True)
    last = events[-1] if events else None
    if last is None or last["e"] != "run_end":
        return False
    before = last["run"].get("allocated")
    if before is None or is_settled(before):
        return False
    found = read_jobs(folder, events)
    if found["gpu_hours"]["value"] is None or found == before:
        return False
    result = cast(Result, json.loads((folder / "result.json").read_text()))
    result["run"] = _with(last["run"], found, events)
    write_json(folder / "result.json", result)
    charts = (folder / "card.png").is_file()
    material = material_of(result, folder, charts=charts)
    if not result.get("is_release_check"):  # a gate's files hold its verdict, which stands
        write_files(folder, material)
    _end_again(folder, last, result["run"], short_form(material))
    return True


def _with(totals: RunTotals, found: Allocated, events: list[Event]) -> RunTotals:
    """Return a run's totals with what was held, and with what that costs."""
    totals = {**totals, "allocated": found}
    money = totals.get("cost")
    if money is None or money["rate"] is None:
        return totals
    return {**totals, "cost": paid_for(money, events, totals)}


def _end_again(folder: Path, last: LastLine, totals: RunTotals, description: str) -> None:
    """Journal the end anew, at the time of the first: no hour passes between."""
    same = {name: value for name, value in last.items() if name != "e"}
    journal = Journal(folder / "journal.jsonl")
    journal.write("run_end", **{**same, "run": totals, "description": description})
    journal.close()
