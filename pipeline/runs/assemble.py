"""The end of an attempt: result.json, report.md, the closing table, `latest`; written whatever the
end was.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ledger import metrics
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.booking import device_hours
from pipeline.ledger.converged import of_this_run
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.disturbance import COMPARED
from pipeline.ledger.journal import read_events
from pipeline.ledger.records import RUN, read_record, sealed
from pipeline.ledger.run_cost import run_cost
from pipeline.ledger.values import measured, null
from pipeline.report.conclusion import conclude
from pipeline.report.markdown import markdown, short_form
from pipeline.report.tables import WIDTH, closing_table
from pipeline.report.text import wrap
from pipeline.report.verdict import markdown_line, shown_line
from pipeline.report.view import is_finished
from pipeline.runs.attempt import device_name
from pipeline.runs.comparison import note_charges
from pipeline.runs.gate_ending import ended, shown_verdict, write_outputs
from pipeline.store.artifacts import MODEL, free_room, write_json, write_text
from pipeline.tracking.deliver import ui_command
from pipeline.tracking.writer import GATE_S, let_go, undelivered

if TYPE_CHECKING:
    from pipeline.runs.attempt import Attempt

LIBRARIES = ("torch", "transformers", "accelerate", "hydra-core", "safetensors", "numpy")


def finish(attempt: Attempt, status: str, why: str | None) -> Callable[[], str] | None:
    """Write what the run leaves and print its closing lines.

    Returns:
        What waits a bounded time for MLflow and then says what came of it, or None where nothing is
        delivered.
    """
    attempt.sampler.stop()
    free_room(attempt.folder)  # what is written from here on fits, whatever filled the disk
    attempted(
        lambda: note_charges(attempt),
        lambda why: attempt.notes.append(unmeasured("what models cost", why)),
    )
    result = build_result(attempt, status, why)
    write_json(attempt.folder / "result.json", result)
    write_json(attempt.folder / "catalogue.json", metrics.export())
    verdict = ended(attempt, status, why)
    opening = (
        "" if verdict is None or result["verdict"] else f"{markdown_line(verdict)}\n\n"
    )  # a gate that came to none
    write_text(attempt.folder / "report.md", opening + markdown(result))
    state = read_record(attempt.folder / "run.json", RUN) or {}
    end = {
        "status": status,
        "pid": None,
        "spent_device_hours": result["run"]["device_hours"]["total"]["value"],
    }
    write_json(attempt.folder / "run.json", sealed({**state, **end}))
    attempt.journal.write(
        "run_end",
        status=status,
        why=why,
        primary_arm=attempt.run.primary_arm,
        run=result["run"],
        description=short_form(result),
        files=[
            *write_outputs(attempt, verdict),
            "report.md",
            "result.json",
            "catalogue.json",
            "config.json",
            *_traces(attempt),
        ],
    )
    attempt.journal.close()
    made = any(is_finished(row) and row["artifact"]["kind"] == MODEL for row in attempt.rows)
    if status == "FINISHED" and made and attempt.gate is None:
        _point_latest(attempt.folder)
    attempt.lock.release()
    writer = attempt.writer
    if writer is not None:
        let_go(writer)
    # refused before any stage: the refusal says it all
    if not attempt.rows and not result["verdict"]:
        return None
    if verdict is not None:
        print(f"\n{shown_line(verdict)}")
    conclusion = "\n".join(wrap(result["conclusion"], WIDTH))
    print(f"\n{closing_table(result)}\n\n{conclusion}\n\nreport: {attempt.folder / 'report.md'}")
    if writer is None:
        return None
    shown = f"MLflow: {ui_command(attempt.folder.parent.parent, attempt.run.tracking.uri)}"
    wait_s = None if attempt.gate is None else GATE_S
    reported = time.monotonic()

    def deliver() -> str:
        problem = undelivered(writer, attempt.folder, wait_s=wait_s)
        waited = time.monotonic() - reported
        return problem or f"{shown}   (delivered {waited:.1f} s after the report; in no figure)"

    return deliver


def _traces(attempt: Attempt) -> list[str]:
    """Return the traces of this run's steps, as paths in its folder."""
    return sorted(
        str(path.relative_to(attempt.folder)) for path in attempt.folder.glob("traces/*/*.json.gz")
    )


def build_result(attempt: Attempt, status: str, why: str | None) -> dict[str, Any]:
    """Return result.json's content."""
    result: dict[str, Any] = {
        "schema": 2,
        "run_id": attempt.run_id,
        "recipe": attempt.run.recipe,
        "question": attempt.run.question,
        "status": status,
        "why": why,
        "primary_arm": attempt.run.primary_arm,
        "conclusion": "",
        "device": {
            "kind": device_of(attempt.device).kind,
            "name": device_name(attempt.device),
            "count": attempt.devices,
        },
        "environment": environment(attempt),
        "run": _totals(attempt),
        "rows": attempt.rows,
        "comparisons": attempt.comparisons,
        "verdict": shown_verdict(ended(attempt, status, why)),
    }
    declared, model = attempt.run.cost.converged_at, attempt.run.model.name
    result["run"]["per_converged_model"] = of_this_run(
        attempt.folder, result["run"], declared, model
    ).to_json()
    events = read_events(attempt.folder / "journal.jsonl")
    result["run"]["cost"] = run_cost(events, result["run"], attempt.run.cost)
    result["conclusion"] = conclude(result)
    return result


def _totals(attempt: Attempt) -> dict[str, Any]:
    """Return the run's device-hours over all its attempts; overhead is what no window took."""
    booked, overhead_ns = attempt.booking()
    parts = {
        "total": booked.attached_ns,
        "work": booked.work_ns,
        "assess": booked.assess_ns,
        "retry": booked.retry_ns,
        "compare": booked.compare_ns,
        "overhead": booked.overhead_ns,
    }
    hours = {name: measured(device_hours(ns)).to_json() for name, ns in parts.items()}
    phases = {"overhead": overhead_ns, "compare": attempt.compare_ns}
    return {
        "attempts": attempt.number,
        "device_hours": hours,
        "phases_device_ns": phases,
        "spent": hours["total"],
        "reused": measured(attempt.reused_h).to_json(),
        **_compared(attempt),
    }


def _compared(attempt: Attempt) -> dict[str, Any]:
    """Return what the machine was like during the comparison pass; nothing where there was none."""
    if attempt.served is None:
        return {}
    lacking = null("not recorded by the release that measured it").to_json()
    return {
        "compare_conditions": {
            name: attempt.served.conditions.get(name, lacking) for name in COMPARED
        }
    }


def environment(attempt: Attempt) -> dict[str, Any]:
    """Return with what and how the figures were made."""
    return {
        "command": attempt.command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        **{name: _version(name) for name in LIBRARIES},
        "commit": commit(),
        "data": attempt.data.name,
        "data_digest": attempt.data.digest,
        "notes": list(dict.fromkeys(attempt.notes)),
    }


def commit() -> str | None:
    """Return the git commit of the checkout this package lies in; None for an installed wheel."""
    top = Path(__file__).resolve().parents[2]
    if not (top / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(top),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]

    def described() -> str | None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None

    return attempted(described, lambda _: None)  # no git on this machine


def _version(name: str) -> str | None:
    return attempted(lambda: version(name), lambda _: None)


def _point_latest(folder: Path) -> None:
    link = folder.parent.parent / "latest"
    temporary = link.with_name(f".latest-{uuid.uuid4().hex}")
    temporary.symlink_to(folder.relative_to(link.parent))
    try:
        temporary.replace(link)
    except OSError as error:
        temporary.unlink()
        print(f"note: {link} is not a link of ours and stays as it is ({error.strerror})")
