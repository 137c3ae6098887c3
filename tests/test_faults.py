"""Interruptions of the real command: signals, kills, a spent budget, two processes at once; nothing
lost or doubled.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from forked import Forked, run, start
from here import here

from pipeline.ledger.schema import RESULT_SCHEMA

pytestmark = pytest.mark.faults

SMALL = [
    "tracking.charts=false",
    *(
        "training.batch_size=4",
        "training.sequence_length=64",
        "data.max_documents=40",
        "hardware.num_threads=1",
    ),
    *(
        "model.shape.hidden_size=64",
        "model.shape.heads=1",
        "model.shape.intermediate_size=128",
        "model.shape.layers=2",
    ),
    *(
        "quality.max_documents=24",
        "quality.bootstrap=200",
        "training.eval_documents=1",
        "tracking.mlflow=false",
    ),
]
LONG = [
    *(*SMALL, "training.steps=100000", "training.checkpoint_every=5"),
    "training.compile=never",  # which so many steps would be tried for
]


def wait_for_checkpoint(cwd: Path, process: Forked) -> None:
    deadline = time.monotonic() + 120
    while not list(cwd.glob("mlruns/store/checkpoints/*/step-*")):
        assert process.poll() is None, process.communicate(60)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def results(cwd: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(cwd.glob("mlruns/runs/*/result.json"))]
    for result in found:
        jsonschema.validate(result, RESULT_SCHEMA)
        hours = {name: value["value"] for name, value in result["run"]["device_hours"].items()}
        assert hours.pop("total") == pytest.approx(sum(hours.values()), abs=1e-12)
        for part, phases_ns in result["run"]["phases_device_ns"].items():
            assert sum(phases_ns.values()) / 3600e9 == pytest.approx(hours[part], abs=1e-12)
    return found


def hours(row: dict[str, Any], part: str) -> float:
    return row["ledger"]["device_hours"][part]["value"]


@pytest.mark.slow
def test_ctrl_c_ends_the_run_killed_with_its_hours_and_130(tmp_path: Path) -> None:
    process = start(tmp_path, "recipe=baseline", *LONG)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted; the same command resumes from what is done"
    assert "KILLED" in out
    (result,) = results(tmp_path)
    (row,) = result["rows"]
    assert (result["status"], row["status"]) == ("KILLED", "KILLED")
    assert hours(row, "attached") > 0
    # the untrained base, nothing half-made
    assert not list(tmp_path.glob("mlruns/store/artifacts/*"))[1:]


def test_what_a_killed_process_spent_is_not_lost(tmp_path: Path) -> None:
    """SIGKILL: the next attempt resumes from the checkpoint and shows the first one's hours."""
    process = start(tmp_path, "recipe=baseline", *LONG)
    wait_for_checkpoint(tmp_path, process)
    process.kill()
    process.communicate(timeout=60)
    assert not results(tmp_path)
    process = start(tmp_path, "recipe=baseline", *LONG)
    (journal,) = tmp_path.glob("mlruns/runs/*/journal.jsonl")
    deadline = time.monotonic() + 120
    while journal.read_text().count('"e": "stage_start"') < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    (result,) = results(tmp_path)
    first, second = result["rows"]
    assert (first["attempt"], first["status"]) == (1, "KILLED")
    assert "the process was killed" in first["why"]
    assert hours(first, "work") > 0  # up to the checkpoint
    assert hours(first, "retry") >= 0
    assert first["ledger"]["meter_valid"]
    assert (second["attempt"], second["status"]) == (2, "KILLED")
    assert result["run"]["attempts"] == 2
    work = sum(hours(row, "work") for row in result["rows"])
    assert result["run"]["device_hours"]["work"]["value"] == pytest.approx(work)


DIES = """
import os, signal, sys, time
from pipeline.cli import main as cli
from pipeline.ledger.journal import Journal

write, seen = Journal.write, []

def dying(self, event, **fields):
    seen.append(event)
    if seen.count("checkpoint") == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, event, **fields)

Journal.write = dying
cli.main(sys.argv[1:], started_ns=time.monotonic_ns())
"""


@pytest.mark.slow
def test_a_process_killed_before_its_checkpoint_is_journaled_is_gone_on_with(
    tmp_path: Path,
) -> None:
    args = ["recipe=baseline", *SMALL, "training.steps=30", "training.checkpoint_every=5"]
    for _ in range(2):
        assert run(tmp_path, *args, code=DIES).returncode == -signal.SIGKILL
    done = here(tmp_path, *args)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 20" in done.stdout
    (result,) = results(tmp_path)
    assert [row["status"] for row in result["rows"]] == ["KILLED", "KILLED", "FINISHED"]
    assert all(hours(row, "work") > 0 for row in result["rows"])
    assert [hours(row, "retry") for row in result["rows"]] == [0, 0, 0]


@pytest.mark.slow
def test_two_processes_that_start_the_same_train_it_once(tmp_path: Path) -> None:
    args = ["recipe=baseline", *SMALL, "training.steps=30"]
    both = [start(tmp_path, *args) for _ in range(2)]
    ended = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    first, second = results(tmp_path)
    assert first["run_id"] != second["run_id"]
    rows = [result["rows"][0] for result in (first, second)]
    assert rows[0]["artifact"] == rows[1]["artifact"]
    made = [row for row in rows if row["reused"] is None]
    reused = [row for row in rows if row["reused"] is not None]
    assert len(made) == len(reused) == 1
    assert reused[0]["reused"] in {first["run_id"], second["run_id"]}


def test_a_spent_budget_exits_7_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    args = ["recipe=baseline", *SMALL, "training.steps=60"]
    done = here(tmp_path, *args, "budget.device_hours=0.0000001")
    assert done.returncode == 7
    assert "budget.device_hours: 1e-07 is spent" in done.stderr
    (before,) = results(tmp_path)
    # said before anything more is spent
    done = here(tmp_path, *args, "budget.device_hours=0.0000001")
    assert (done.returncode, results(tmp_path)) == (7, [before])
    again = here(tmp_path, *args, "budget.device_hours=1")
    assert again.returncode == 0, again.stderr
    (result,) = results(tmp_path)
    assert result["run"]["attempts"] == 2
    assert result["rows"][-1]["status"] == "FINISHED"


def test_the_same_command_of_another_owner_is_a_run_of_its_own(tmp_path: Path) -> None:
    """What the first owner spent on starting up is not the second one's."""
    args = ["recipe=baseline", *SMALL, "training.steps=20"]
    assert (
        here(tmp_path, *args, "tracking.team=red", "budget.device_hours=0.0000001").returncode == 7
    )
    (before,) = results(tmp_path)
    done = here(tmp_path, *args, "tracking.team=blue")
    assert done.returncode == 0, done.stderr
    assert before in results(tmp_path)
    (second,) = [result for result in results(tmp_path) if result != before]
    assert second["run"]["attempts"] == 1
    assert {row["ledger"]["identity"]["team"] for row in second["rows"]} == {"blue"}


@pytest.mark.slow
def test_a_multirun_ends_with_its_worst_code_and_runs_all(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "-m",
        "recipe=baseline",
        *SMALL,
        "training.steps=40",
        "precision=fp32",
        "training.learning_rate=1e9,-1,1e-3",
    )
    assert done.returncode == 1
    assert "lower training.learning_rate" in done.stderr
    # refused, and the others run
    assert "training.learning_rate: -1.0 is out of range" in done.stderr
    assert sorted(result["status"] for result in results(tmp_path)) == ["FAILED", "FINISHED"]
    assert "Traceback" not in done.stderr
    overhead = [result["run"]["device_hours"]["total"]["value"] for result in results(tmp_path)]
    assert max(overhead) < sum(overhead)  # the second job's clock starts where the first ended


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_a_signal_ends_the_whole_multirun(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The scheduler, or Ctrl-C, wants the machine back, not the next job of the sweep."""
    process = start(tmp_path, "recipe=baseline", "-m", *LONG, "seed=0,1")
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert len(err.splitlines()) == 1, err
    assert out.count("baseline: running") == 1
    assert [result["status"] for result in results(tmp_path)] == ["KILLED"]


@pytest.mark.slow
def test_a_signal_between_the_jobs_of_a_multirun_ends_it_too(tmp_path: Path) -> None:
    process = start(
        tmp_path, "-m", "recipe=baseline", *SMALL, "training.steps=2", "seed=0,1,2,3,4,5,6,7"
    )
    while "#1 : " not in (line := process.stdout.readline()):  # Hydra begins the second job
        assert process.poll() is None, line
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert len(results(tmp_path)) <= 2
