"""The run that metering a command leaves: folder, journal, row, result.

It has the journal of a recipe's run, with one attempt and one arm of type `metered`, so that
MLflow, chargeback and `pipeline register` take it as they take any other.
"""

from __future__ import annotations

import datetime
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.owner import OWNER
from pipeline.config.settings.cost import CostConfig
from pipeline.errors import UserError
from pipeline.ledger import metrics
from pipeline.ledger.booking import Booking, Span, Window, book, run_hours
from pipeline.ledger.foreign import ENV, RANKS, nested_in
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.numbers import how_many
from pipeline.ledger.placement import Grant, grant
from pipeline.ledger.ranks import read_lives, restarts
from pipeline.ledger.run_cost import run_cost
from pipeline.ledger.shapes import (
    Environment,
    Identity,
    Metered,
    MeteredParams,
    MeteredStart,
    Result,
    Row,
    RunTotals,
)
from pipeline.ledger.values import measured
from pipeline.report.markdown import MOST_IN_MLFLOW, cut
from pipeline.report.metered import conclude, report_markdown, report_page
from pipeline.runs.metering.options import Settings
from pipeline.runs.metering.row import Facts, make_row
from pipeline.store.artifacts import plain, read_json, write_json, write_text
from pipeline.store.locks import check_locks, lock_at
from pipeline.tracking.deliver import declared_uri

RECIPE, TYPE = "meter", "metered"
QUESTION = "what did this command take?"
FILES = ("report.md", "report.html", "result.json", "catalogue.json", "config.json")


@dataclass(slots=True)
class MeteredRun:
    """A run in the making. Times are monotonic, in nanoseconds.

    Attributes:
        start: The journal's first event, from which a killed meter's run can be ended, too.
    """

    folder: Path
    journal: Journal
    lock: Any
    start: Metered

    @staticmethod
    def open(settings: Settings, started_ns: int) -> MeteredRun:
        """Make the run's folder and begin its journal.

        Raises:
            UserError: If there is nowhere to write.
        """
        folder, lock = _make_folder(settings.root)
        identity: Identity = {
            "team": settings.team,
            "cost_center": settings.cost_center,
            "purpose": settings.purpose,
            "model_name": settings.model_name,
            "run": folder.name,
            "recipe": RECIPE,
            "commit": _commit(),
            "parent": nested_in().get("nested_in"),
        }
        start: MeteredStart = {
            "run_id": folder.name,
            "started_ns": started_ns,
            "attempt": 1,
            "devices": 1,
            "recipe": RECIPE,
            "question": QUESTION,
            "experiment": RECIPE,
            "tracking_uri": declared_uri(None),
            "params": MeteredParams(**settings.params()),
            "tags": {
                **{name: value for name in OWNER if (value := identity.get(name))},
                **nested_in(),
            },
            "datasets": [],
            "environment": {"mlflow.source.git.commit": identity.get("commit")},
            "identity": identity,
            "cost": plain(settings.cost),
            "name": settings.name,
            "node": platform.node(),
            "grant": plain(_node_grant()),
        }
        run = MeteredRun(folder, Journal(folder / "journal.jsonl"), lock, start)
        state = {
            "key": f"{RECIPE} {folder.name}",
            "status": "RUNNING",
            "pid": os.getpid(),
            "attempt": 1,
        }
        write_json(folder / "run.json", state)
        write_json(folder / "config.json", settings.params())
        run.journal.write("run_start", **start)
        run.journal.write(
            "stage_start",
            arm=settings.name,
            stage=settings.name,
            type=TYPE,
            seed=0,
            attempt=1,
            params={"command": settings.shown},
            depends_on=[],
        )
        return run

    def environ(self) -> dict[str, str]:
        """Return the command's environment: ours, and where its ranks write to."""
        return {**os.environ, ENV: str(self.folder)}

    def begin(self) -> None:
        """Note down that the command is about to begin."""
        now_ns = time.monotonic_ns()
        self.journal.write(
            "open", kind="work", arm=self.start["name"], seed=0, attempt=1, start_ns=now_ns
        )

    def end(
        self, facts: Facts, *, now_ns: int, t: float | None = None, notes: Sequence[str] = ()
    ) -> Result:
        """Write the row, the result and the report, and let go of the run; return the result.

        Args:
            facts: Of the command.
            now_ns: Monotonic time of the run's end.
            t: Wall time to note down; None: now. A run that ended long ago did not end now.
        """
        at = {} if t is None else {"t": t, "mono_ns": now_ns}
        lives, said = read_lives(self.folder, self.start["node"])
        row = make_row(self.start, facts, lives)
        again = restarts(lives)
        said += (
            [
                f"ranks were started again {how_many(again, 'time')}: counts include what was"
                " replayed"
            ]
            if again
            else []
        )
        # What failed led to nothing: all of it is retry.
        kept_ns = facts.elapsed_ns if facts.status == "FINISHED" else 0
        window = Window(
            kind="work",
            arm=facts.name,
            seed=0,
            start_ns=facts.start_ns,
            end_ns=facts.end_ns,
            kept_ns=kept_ns,
        )
        booked = book([window], {1: Span(self.start["started_ns"], now_ns, facts.used.count)})
        self.journal.write(
            "window",
            arm=facts.name,
            seed=0,
            window=plain(window),
            phases_ns=row["ledger"]["phases_ns"],
            **at,
        )
        self.journal.write("row", row=row, **at)
        totals = _totals(booked, facts, self.start)
        events = read_events(self.folder / "journal.jsonl")
        totals["cost"] = run_cost(events, totals, CostConfig(**self.start["cost"]))
        result = self._result(facts, row, totals, [*notes, *said])
        write_json(self.folder / "result.json", result)
        write_json(self.folder / "catalogue.json", metrics.export())
        write_text(self.folder / "report.md", report_markdown(result))
        write_text(self.folder / "report.html", report_page(result))
        state = {**(read_json(self.folder / "run.json") or {}), "status": facts.status, "pid": None}
        write_json(self.folder / "run.json", state)
        self.journal.write(
            "run_end",
            status=facts.status,
            why=facts.why,
            primary_arm=facts.name,
            run=result["run"],
            description=cut(report_markdown(result), MOST_IN_MLFLOW),
            files=FILES,
            **at,
        )
        self.journal.close()
        self.lock.release()
        return result

    def _result(self, facts: Facts, row: Row, run: RunTotals, notes: list[str]) -> Result:
        environment: Environment = {
            "command": self.start["params"]["command"],
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "commit": self.start["identity"].get("commit"),
            "notes": notes,
        }
        result: Result = {
            "schema": 2,
            "run_id": self.folder.name,
            "recipe": RECIPE,
            "question": QUESTION,
            "status": facts.status,
            "why": facts.why,
            "primary_arm": facts.name,
            "device": {"kind": facts.used.kind, "name": facts.used.name, "count": facts.used.count},
            "environment": environment,
            "run": run,
            "rows": [row],
            "comparisons": [],
            "verdict": None,
            "conclusion": {"verdict": "", "answers": []},
        }
        return {**result, "conclusion": conclude(result)}


def _totals(booked: Booking, facts: Facts, start: Metered) -> RunTotals:
    """Return the run's device-hours: the command's, and as overhead the meter's own before and
    after it.
    """
    hours = run_hours(booked)
    before_ns = (facts.start_ns - start["started_ns"]) * facts.used.count
    overhead = {"prepare": before_ns, "log": booked.overhead_ns - before_ns}
    return {
        "attempts": 1,
        "device_hours": hours,
        "phases_device_ns": {"overhead": overhead, "compare": {}},
        "spent": hours["total"],
        "reused": measured(0.0).to_json(),
    }


def _node_grant() -> Grant | None:
    """Return what a scheduler granted this job on this node, which is all that a meter sees."""
    environ = dict(os.environ)
    if environ.get("SLURM_GPUS_ON_NODE"):
        environ["SLURM_JOB_NUM_NODES"], environ["SLURM_GPUS"] = "1", ""
    return grant(environ)


def _make_folder(root: Path) -> tuple[Path, Any]:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    runs = root.expanduser().resolve() / "runs"
    folder = runs / f"{stamp}-{RECIPE}-{secrets.token_hex(2)}"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        check_locks(runs, "--root")
        (folder / RANKS).mkdir(parents=True)
    except OSError as error:
        raise UserError(
            "--root", f"{root} cannot be written to ({error.strerror})", "give another folder"
        ) from None
    lock = lock_at(folder / ".lock")
    lock.acquire(timeout=0)
    return folder, lock


def _commit() -> str | None:
    """Return the git commit of the folder that the command runs in."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
