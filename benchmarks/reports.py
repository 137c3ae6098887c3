"""How long reports take to be made, and how large they are.

    python benchmarks/reports.py weekly [--runs 300] [--repeats 5] [--save]
    python benchmarks/reports.py report [--arms 20] [--seeds 5] [--repeats 3] [--save]

`weekly`: a SQLite store of MLflow with runs of five stage attempts each, every tenth one a release
check, and their folders. One run of each kind is delivered by the project; the others are copies of
it in the store's tables under their own ids and times. The command is timed as a process of its
own, its start included; beside it one that only starts Python and one that imports MLflow.

`report`: a result of made-up figures with many arms and seeds and a curve of 200 points for each;
seconds of writing report.html with its charts, bytes of it, and seconds until Chromium has opened
it (none where Chromium, its driver or selenium is missing).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from results import save_result

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from make_result import make_pair, make_quality, make_result, make_row, make_saving  # noqa: E402
from make_verdict import make_verdict  # noqa: E402

from pipeline.ledger.journal import Journal  # noqa: E402
from pipeline.report.material import Curve, Material, Stretch  # noqa: E402
from pipeline.report.run_report import html_report  # noqa: E402
from pipeline.tracking.deliver import deliver, import_mlflow  # noqa: E402

MOST_S, MOST_BYTES, MOST_OPENING_S = 5.0, 5_000_000, 2.0
"""What the command may take on today's machines, what a page may hold, and how soon it is open."""
DAY_S = 86400.0
NOW = 1_796_000_000.0  # 2026-11-30, from which the store's runs count back
GATES = 10  # of so many runs one is a release check
ARMS = ("teacher", "student", "control_steps", "control_compute", "student_int8")
POLICY = {"policy.alpha": 0.05, "policy.looks": 2, "policy.blocks": 4}
POINTS = 200
TABLES = ("tags", "params", "latest_metrics", "metrics")


# -- a store of many runs -------------------------------------------------------------------------


def write_run(root: Path, run_id: str, *, is_gate: bool) -> Path:
    """Write a run's folder, and deliver it."""
    folder = root / "runs" / run_id
    folder.mkdir(parents=True)
    rows = [make_row(arm, gpu=True) for arm in ARMS]
    result = make_result(rows=rows, run_id=run_id, gpu=True)
    journal = Journal(folder / "journal.jsonl")
    journal.write(
        "run_start",
        run_id=run_id,
        started_ns=0,
        attempt=1,
        recipe="release_check" if is_gate else "distill",
        question="?",
        experiment="benchmark",
        tracking_uri=None,
        tags={"team": "vision"},
        environment={"device": "NVIDIA H200"},
        params={
            "model.name": "m",
            "budget.device_hours": 4.0,
            "task": "sequence_classification",
            **(POLICY if is_gate else {}),
        },
        datasets=[],
        t=NOW,
        mono_ns=0,
    )
    for row in rows:
        journal.write("row", row=row, t=NOW, mono_ns=1)
    if is_gate:
        journal.write("verdict", verdict=make_verdict(run_id=run_id), sha256="0" * 64, t=NOW)
    expected = {"value": 1.8, "low": 1.5, "high": 2.1}
    journal.write(
        "run_end",
        status="FINISHED",
        why=None,
        primary_arm="student",
        run=result["run"],
        description="",
        files=[],
        forecast={"expected": expected, "why_missing": None, "actual": 1.9},
        t=NOW,
        mono_ns=2,
    )
    journal.close()
    deliver(folder)
    return folder


def fill(root: Path, num_runs: int) -> None:
    """Make a store of so many runs over seven days."""
    import_mlflow()
    patterns = {kind: write_run(root, f"first-{kind}", is_gate=kind) for kind in (False, True)}
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        for number in range(len(patterns), num_runs):
            pattern = patterns[number % GATES == 0]
            name = f"20261124-000000-distill-{number:04x}"
            back_ms = round(7 * DAY_S * 1000 * number / num_runs)
            copy_run(database, pattern.name, name, back_ms)
            shutil.copytree(pattern, root / "runs" / name)


def copy_run(database: sqlite3.Connection, pattern: str, name: str, back_ms: int) -> None:
    """Copy a run and its stage attempts in the tables, `back_ms` earlier."""
    query = "SELECT run_uuid, value FROM tags WHERE key = 'pipeline.run'"
    old = {run: tag for run, tag in database.execute(query) if tag.partition("/")[0] == pattern}
    new = {run: uuid.uuid4().hex for run in old}
    for run, tag in old.items():
        for table in ("runs", *TABLES):
            insert_copy(database, table, run, new[run])
        database.execute(
            "UPDATE runs SET start_time = start_time - ?, end_time = end_time - ?"
            " WHERE run_uuid = ?",
            (back_ms, back_ms, new[run]),
        )
        changed = {"pipeline.run": name + tag.removeprefix(pattern)}
        parent = next(run for run, tag in old.items() if tag == pattern)
        if run != parent:
            changed["mlflow.parentRunId"] = new[parent]
        else:
            # no verdict is given again
            changed |= {"gate.key": uuid.uuid4().hex, "gate.candidate.digest": uuid.uuid4().hex}
        for key, value in changed.items():
            database.execute(
                "UPDATE tags SET value = ? WHERE run_uuid = ? AND key = ?", (value, new[run], key)
            )


def insert_copy(database: sqlite3.Connection, table: str, run: str, copy: str) -> None:
    """Insert a run's rows of a table once more, as another run's."""
    columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
    taken = ", ".join("?" if each == "run_uuid" else f'"{each}"' for each in columns)
    database.execute(
        f"INSERT INTO {table} SELECT {taken} FROM {table} WHERE run_uuid = ?", (copy, run)
    )


def timed(command: Sequence[str], repeats: int) -> list[float]:
    """Return the seconds that a process took, each time."""
    taken: list[float] = []
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environ = {**os.environ, "PYTHONPATH": paths}
    for _ in range(repeats):
        began = time.perf_counter()
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        taken.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    return taken


def weekly(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return what the command takes over a store, and the lines that say it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        began = time.perf_counter()
        fill(root, args.runs)
        made_s = time.perf_counter() - began
        day = lambda at: time.strftime("%Y-%m-%d", time.gmtime(at))
        period = ("--from", day(NOW - 7 * DAY_S), "--to", day(NOW + DAY_S))
        python = [sys.executable]
        commands = {
            "weekly": [*python, "-m", "pipeline", "weekly", *period, "--root", folder],
            "start of Python": [*python, "-c", "pass"],
            "import of MLflow": [*python, "-c", "import mlflow"],
        }
        seconds = {name: timed(command, args.repeats) for name, command in commands.items()}
        page = (root / "weekly" / day(NOW - 7 * DAY_S) / "report.html").read_text()
        size = (root / "mlflow.db").stat().st_size
    assert f"in {args.runs} runs" in page, "the page speaks of another number of runs"
    figures = {"runs": args.runs, "seconds": seconds, "store_bytes": size, "made_s": made_s}
    lines = [
        f"{name}: {statistics.median(taken):.2f} s ({min(taken):.2f} to {max(taken):.2f},"
        f" n={len(taken)})"
        for name, taken in seconds.items()
    ]
    median_s = statistics.median(seconds["weekly"])
    said = "within" if median_s < MOST_S else "BEYOND"
    lines.append(f"{args.runs} runs, a store of {size / 1e6:.1f} MB: {said} {MOST_S:g} s")
    return figures, lines


# -- a large report -------------------------------------------------------------------------------


def large(num_arms: int, num_seeds: int) -> Material:
    """Return what a run of many arms and seeds leaves, with curves."""
    arms = [f"arm_{number:02d}" for number in range(num_arms)]
    stages = [(arm, seed) for arm in arms for seed in range(num_seeds)]
    rows = [make_row(arm, gpu=True, seed=seed) for arm, seed in stages]
    pairs = [
        make_pair(
            arm,
            arms[0],
            quality=make_quality(0.001 * number, "equal"),
            serving=make_saving(0.02 * number),
        )
        for number, arm in enumerate(arms)
        if number
    ]
    result: Any = make_result(gpu=True, rows=rows, comparisons=pairs, primary_arm=arms[-1])
    at = [hour / POINTS for hour in range(1, POINTS + 1)]
    curves = [
        Curve(arm, seed, {"loss": [(hour, 2 + math.exp(-9 * hour) + 0.01 * seed) for hour in at]})
        for arm, seed in stages
    ]
    stretches = [
        Stretch("work", arm, seed, number, number + 1) for number, (arm, seed) in enumerate(stages)
    ]
    return Material(result, None, curves, stretches)


def report(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return what a large report takes to write and holds, and the lines that say it."""
    material = large(args.arms, args.seeds)
    seconds: list[float] = []
    text = ""
    for _ in range(args.repeats):
        began = time.perf_counter()
        text = html_report(material)
        seconds.append(time.perf_counter() - began)
    size = len(text.encode())
    opening = opened(text, args.repeats)
    figures = {
        "arms": args.arms,
        "seeds": args.seeds,
        "bytes": size,
        "seconds": seconds,
        "opening_s": opening,
    }
    said = "below" if size < MOST_BYTES else "NOT BELOW"
    lines = [
        f"report.html of {args.arms} arms x {args.seeds} seeds: {size / 1e6:.2f} MB, {said}"
        f" {MOST_BYTES / 1e6:g} MB",
        f"written in {statistics.median(seconds):.2f} s ({min(seconds):.2f} to"
        f" {max(seconds):.2f}, n={len(seconds)}; the first draws with cold caches)",
    ]
    if opening:
        soon = "within" if statistics.median(opening) < MOST_OPENING_S else "NOT WITHIN"
        lines.append(
            f"open in Chromium after {statistics.median(opening):.2f} s ({min(opening):.2f} to"
            f" {max(opening):.2f}, n={len(opening)}), {soon} {MOST_OPENING_S:g} s"
        )
    return figures, lines


def opened(text: str, repeats: int) -> list[float]:
    """Return the seconds from asking for a page until all of it is loaded and laid out; nothing
    where there is no browser.
    """
    import pytest
    from browser import chromium

    wait = (
        "const done = arguments[arguments.length - 1];"
        "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())));"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.html")
        file.write_text(text, encoding="utf-8")
        try:
            with chromium(Path(folder, "profile")) as browser:
                found: list[float] = []
                for _ in range(repeats):
                    browser.get("about:blank")
                    browser.get(file.as_uri())
                    found.append(browser.execute_async_script(wait) / 1000)
                return found
        except pytest.skip.Exception as why:
            print(f"note: {why}", file=sys.stderr)
            return []


PARTS: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], list[str]]]] = {
    "weekly": weekly,
    "report": report,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="How long reports take, and how large they are.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--arms", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    figures, lines = PARTS[args.part](args)
    print("\n".join(lines))
    if args.save:
        save_result("reports", figures, "\n".join([*lines, json.dumps(figures)]), part=args.part)


if __name__ == "__main__":
    main()
