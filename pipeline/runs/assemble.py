"""The end of an attempt: result.json, report.md, the closing table, `latest`; written whatever the
end was.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from pipeline.config.arms import VARIANT
from pipeline.errors import UserError
from pipeline.ledger import metrics
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.booking import device_hours, run_hours
from pipeline.ledger.converged import of_this_run
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.disturbance import COMPARED
from pipeline.ledger.journal import read_events
from pipeline.ledger.peaks import device_name
from pipeline.ledger.records import RUN, read_record, sealed
from pipeline.ledger.run_cost import run_cost
from pipeline.ledger.shapes import Figures, HoursPart, Result, RunTotals
from pipeline.ledger.values import measured, null
from pipeline.report.conclusion import conclude
from pipeline.report.github import MOST_BYTES
from pipeline.report.material import material_of
from pipeline.report.run_report import short_form
from pipeline.report.tables import WIDTH, closing_table
from pipeline.report.text import conclusion_lines
from pipeline.report.verdict import shown_line
from pipeline.runs.allocation import allocation
from pipeline.runs.charges import note_charges
from pipeline.runs.comparison import basis
from pipeline.runs.environment import environment, release
from pipeline.runs.files import write_files
from pipeline.runs.forecasting import scored
from pipeline.runs.gate_ending import ended, shown_verdict, write_outputs
from pipeline.runs.receipts.cards import write_cards
from pipeline.runs.receipts.evidence import keep_evidence
from pipeline.runs.receipts.receipt import (
    FILE,
    SIGNATURE,
    read_kept,
    schema_digest,
    why_none,
    write_receipt,
)
from pipeline.runs.receipts.signature import load_key, sign
from pipeline.runs.rows import hours_in
from pipeline.runs.running import Running
from pipeline.store.artifacts import MODEL, free_room, write_bytes, write_json
from pipeline.tracking.deliver import ui_command, view_address
from pipeline.tracking.writer import GATE_S, let_go, undelivered


def finish(running: Running, status: str, why: str | None) -> Callable[[], str] | None:
    """Write what the run leaves and print its closing lines.

    Returns:
        What waits a bounded time for MLflow and then says what came of it, or None where nothing is
        delivered.
    """
    running.session.sampler.stop()
    free_room(running.session.folder)  # what is written from here on fits, whatever filled the disk
    running.timeline.close(release=release(), schema=schema_digest())
    attempted(
        lambda: note_charges(running),
        lambda why: running.book.notes.append(unmeasured("what models cost", why)),
    )
    running.book.notes += disagreements(running)
    result = build_result(running, status, why)
    write_json(running.session.folder / "result.json", result)
    write_json(running.session.folder / "catalogue.json", metrics.export())
    verdict = ended(running, status, why)
    material = material_of(
        result, running.session.folder, verdict, charts=running.session.run.tracking.charts
    )
    files = [*write_files(running.session.folder, material), *leave_receipt(running, result)]
    state = read_record(running.session.folder / "run.json", RUN)
    end = {
        "status": status,
        "pid": None,
        "spent_device_hours": result["run"]["device_hours"]["total"]["value"],
    }
    # After the result: a run that says FINISHED has its result on disk.
    write_json(running.session.folder / "run.json", sealed({**(state or {}), **end}))
    forecast = result.get("forecast")
    foreseen = {} if forecast is None else {"forecast": forecast["totals"]["device_hours"]}
    running.session.journal.write(
        "run_end",
        status=status,
        why=why,
        primary_arm=running.session.run.primary_arm,
        run=result["run"],
        **foreseen,
        description=short_form(material),
        files=[
            *write_outputs(running, verdict, short_form(material, MOST_BYTES)),
            *files,
            "result.json",
            "catalogue.json",
            "config.json",
            *_traces(running),
        ],
    )
    running.session.journal.close()
    made = any(
        row["status"] == "FINISHED"
        and row["artifact"] is not None
        and row["artifact"]["kind"] == MODEL
        for row in running.book.rows
    )
    own = not running.session.run.recipe.startswith(VARIANT)  # what the user ran last
    if status == "FINISHED" and made and own and running.session.gate is None:
        _point_latest(running.session.folder)
    # Only now may another attempt, or a delivery, take this folder.
    running.lock.release()
    writer = running.writer
    if writer is not None:
        let_go(writer)
    # refused before any stage: the refusal says it all
    if not running.book.rows and not result["verdict"]:
        return None
    if verdict is not None:
        print(f"\n{shown_line(verdict)}")
    conclusion = "\n".join(conclusion_lines(result["conclusion"], WIDTH))
    print(
        f"\n{closing_table(result)}\n\n{conclusion}\n\nreport:"
        f" {running.session.folder / 'report.html'}"
    )
    if writer is None:
        return None
    shown = (
        "MLflow:"
        f" {ui_command(running.session.folder.parent.parent, running.session.run.tracking.uri)}"
    )
    wait_s = None if running.session.gate is None else GATE_S
    reported = time.monotonic()

    def deliver() -> str:
        problem = undelivered(writer, running.session.folder, wait_s=wait_s)
        waited = time.monotonic() - reported
        if problem:
            return problem
        address = view_address(running.session.folder, running.session.run.tracking.uri)
        there = "" if address is None else f"\n  core figures: {address}"
        return f"{shown}   (delivered {waited:.1f} s after the report; in no figure){there}"

    return deliver


def leave_receipt(running: Running, result: Result) -> list[str]:
    """Write the receipt of a run that made a model, with what proves it; return the names of files
    that are delivered.
    """
    folder = running.session.folder
    if why_none(result) is not None:
        return []

    def write() -> list[str]:
        (folder / SIGNATURE).unlink(missing_ok=True)
        keep_evidence(folder, result["rows"], basis(running))
        content = write_receipt(folder)
        attempted(lambda: cards(content), lambda why: failed("README.md of models", why))
        return [FILE, *(signed(content) if key is not None else [])]

    def cards(content: bytes) -> list[str]:
        sha256 = hashlib.sha256(content).hexdigest()
        left = write_cards(read_kept(folder), json.loads(content), sha256, running.session.store)
        for arm in left:
            print(f"note: {arm}: its artifact has a README.md, which stays; no card was written")
        return left

    def signed(content: bytes) -> list[str]:
        def write() -> list[str]:
            own = load_key(Path(str(key)).expanduser(), "tracking.sign_with")
            write_bytes(folder / SIGNATURE, sign(content, own).encode())
            return [SIGNATURE]

        try:  # the key was there when the run began
            return attempted(write, lambda why: failed(SIGNATURE, why))
        except UserError as problem:
            return failed(SIGNATURE, str(problem))

    def failed(name: str, why: str) -> list[str]:
        print(f"note: {name} could not be written ({why})", file=sys.stderr)
        return []

    key = running.session.run.tracking.sign_with
    return attempted(write, lambda why: failed(FILE, why))


def _traces(running: Running) -> list[str]:
    """Return the traces of this run's steps, as paths in its folder."""
    return sorted(
        str(path.relative_to(running.session.folder))
        for path in running.session.folder.glob("traces/*/*.json.gz")
    )


def build_result(running: Running, status: str, why: str | None) -> Result:
    """Return result.json's content."""
    totals = _totals(running)
    totals["allocated"] = allocation(running)
    result: Result = {
        "schema": 2,
        "run_id": running.session.run_id,
        "recipe": running.session.run.recipe,
        "question": running.session.run.question,
        "status": status,
        "why": why,
        "primary_arm": running.session.run.primary_arm,
        "is_release_check": running.session.gate is not None,
        "conclusion": {"verdict": "", "answers": []},
        "device": {
            "kind": device_of(running.session.device).kind,
            "name": device_name(running.session.device),
            "count": running.session.devices,
        },
        "environment": environment(
            running.session.command, running.session.data, running.book.notes
        ),
        "run": totals,
        "rows": running.book.all_rows(),
        "comparisons": running.book.comparisons,
        "verdict": shown_verdict(ended(running, status, why)),
    }
    declared, model = running.session.run.cost.converged_at, running.session.run.model.name
    result["run"]["per_converged_model"] = of_this_run(
        running.session.folder, result["run"], declared, model
    ).to_json()
    events = read_events(running.session.folder / "journal.jsonl")
    result["run"]["cost"] = run_cost(events, result["run"], running.session.run.cost)
    result["conclusion"] = conclude(result)
    forecast = attempted(
        lambda: scored(running, result),
        lambda why: running.book.notes.append(unmeasured("the forecast's score", why)),
    )
    if forecast is not None:
        result["forecast"] = forecast
    return result


def _totals(running: Running) -> RunTotals:
    """Return the run's device-hours over all its attempts; overhead is what no window took."""
    booked, overhead_ns = running.timeline.booking()
    hours = run_hours(booked)
    totals: RunTotals = {
        "attempts": running.session.number,
        "device_hours": hours,
        "phases_device_ns": {"overhead": overhead_ns, "compare": running.timeline.compare_ns},
        "spent": hours["total"],
        "reused": measured(running.book.reused_h).to_json(),
    }
    compared = _compared(running)
    if compared is not None:
        totals["compare_conditions"] = compared
    return totals


def disagreements(running: Running) -> list[str]:
    """Return what the rows and the run's totals say differently of the same hours: nothing, unless
    there is a fault in this package.

    Rows are summed as they are written; totals are booked from the windows.
    """
    booked, _ = running.timeline.booking()
    own = [row for row in running.book.all_rows() if row["reused"] is None]
    found: list[str] = []
    totals: dict[HoursPart, int] = {
        "work": booked.work_ns,
        "assess": booked.assess_ns,
        "retry": booked.retry_ns,
    }
    for part, total_ns in totals.items():
        of_rows, of_run = sum(hours_in(row, part) for row in own), device_hours(total_ns)
        if not math.isclose(of_rows, of_run, rel_tol=1e-6, abs_tol=1e-9):
            found.append(
                f"the rows have {of_rows:.6g} device-hours of {part}, the run has {of_run:.6g}:"
                " please report it"
            )
    return found


def _compared(running: Running) -> Figures | None:
    """Return what the machine was like during the comparison pass; nothing where there was none."""
    if running.book.served is None:
        return None
    lacking = null("not recorded by the release that measured it").to_json()
    return {name: running.book.served.conditions.get(name, lacking) for name in COMPARED}


def _point_latest(folder: Path) -> None:
    link = folder.parent.parent / "latest"
    temporary = link.with_name(f".latest-{uuid.uuid4().hex}")
    temporary.symlink_to(folder.relative_to(link.parent))
    try:
        # A link cannot be changed in place: a new one takes its name in one step.
        temporary.replace(link)
    except OSError as error:
        temporary.unlink()
        print(f"note: {link} is not a link of ours and stays as it is ({error.strerror})")
