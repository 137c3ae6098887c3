"""Who spent what, from real MLflow stores that journals were delivered to; every sum worked by
hand.
"""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from make_result import make_row, make_run, make_unfinished, null, value
from mlflow import MlflowClient

from pipeline.cli.commands.chargeback import main
from pipeline.ledger.charge_lines import TOTAL, Line, idle, lines
from pipeline.ledger.charge_sources import journal_facts, stage_device, stored_runs_facts
from pipeline.ledger.charges import Charge, RunFacts, charges
from pipeline.ledger.converged import of_this_run, per_converged_model
from pipeline.ledger.journal import Journal, read_events
from pipeline.report.chargeback import COLUMNS, harmless, table, to_csv
from pipeline.tracking import deliver as tracking
from pipeline.tracking.deliver import deliver, stored_runs

HOUR = 3600.0
NOV = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
DAY = 86400.0
NOON = NOV + DAY / 2
PERIOD = ("--from", "2026-11-01", "--to", "2026-12-01")
SMALLEST = [
    "tracking.charts=false",
    *(
        "training.steps=1",
        "training.batch_size=4",
        "training.sequence_length=32",
        "data.max_documents=20",
    ),
    *(
        "model.shape.hidden_size=64",
        "model.shape.heads=1",
        "model.shape.intermediate_size=64",
        "model.shape.layers=1",
    ),
    "training.eval_documents=1",
    *("quality.max_documents=4", "quality.bootstrap=200", "serving.blocks=2", "serving.load.new=1"),
    *("serving.batches=[1]", "hardware.num_threads=1", "tracking.mlflow=false"),
]


def a_row(
    arm: str = "student",
    *,
    owner: dict[str, str] | None = None,
    rate: float | None = None,
    currency: str = "EUR",
    device: str = "NVIDIA H200",
    gpu: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Return a row of 22 minutes (the student's) that says whose it is, where it ran and what it
    cost.
    """
    row = make_row(arm, gpu=gpu, **changes)
    record = row["ledger"]
    record["identity"], record["placement"] = (
        owner or {"team": "vision"},
        {"device_names": [device]},
    )
    if rate is not None and record["device_hours"]["attached"]["value"] is not None:
        amount = rate * record["device_hours"]["attached"]["value"]
        record["cost"] = {"amount": value(amount, "estimated"), "currency": currency}
    return row


def write_run(
    root: Path,
    run_id: str,
    rows: list[dict[str, Any]],
    *,
    at: float = NOON,
    team: str | None = "vision",
    model: str = "m1",
    rate: float | None = None,
    currency: str = "EUR",
    ended: bool = True,
    status: str = "FINISHED",
    device: str = "NVIDIA H200",
    alive_h: float = 2.0,
    devices: int = 1,
    converged_at: float | None = None,
    alive: bool = False,
    tags: dict[str, str] | None = None,
    minutes: tuple[float, float] = (6, 3),
) -> Path:
    """Write and deliver a run: a row a minute up to `at`, where it ends; else its last sign of life
    is then.
    """
    folder = root / "runs" / run_id
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    began = at - 60.0 * (len(rows) + 1)
    journal.write(
        "run_start",
        run_id=run_id,
        started_ns=0,
        attempt=1,
        devices=devices,
        recipe="distill",
        question="?",
        experiment="distill",
        tracking_uri=None,
        tags={**({"team": team} if team else {}), **(tags or {})},
        environment={"device": device},
        datasets=[],
        t=began,
        mono_ns=0,
        params={
            "model.name": model,
            "cost.per_device_hour": rate,
            "cost.currency": None if rate is None else currency,
            "cost.converged_at": converged_at,
        },
    )
    for index, row in enumerate(rows, 1):
        journal.write("row", row=row, t=began + 60.0 * index, mono_ns=index)
    if ended:
        run = make_run(rows, compare_min=minutes[0], overhead_min=minutes[1])
        journal.write(
            "run_end",
            status=status,
            why=None,
            primary_arm="student",
            run=run,
            description="",
            files=[],
            t=at,
            mono_ns=len(rows) + 1,
        )
    else:
        journal.write("heartbeat", t=at, mono_ns=round(alive_h * 3600e9))
    journal.close()
    with FileLock(folder / ".lock") if alive else nullcontext():
        deliver(folder)
    return folder


def report(root: Path, *args: str, now: float = NOV + 40 * DAY) -> list[dict[str, str]]:
    """Run the command; return its CSV's rows."""
    file = root / "out.csv"
    assert main([*PERIOD, "--root", str(root), "--csv", str(file), *args], now_s=lambda: now) == 0
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def hours(rows: list[dict[str, str]], group: str, column: str = "device_hours") -> float:
    return math.fsum(float(row[column]) for row in rows if row["group"] == group)


# -- what is counted ------------------------------------------------------------------------------


def test_the_lines_of_a_run_add_up_to_all_it_was_attached(root: Path) -> None:
    """Student 22 min and teacher 32 min, comparison 6, overhead 3: 63 min, as result.json and
    MLflow's parent say.
    """
    rows = [a_row("teacher"), a_row("student")]
    write_run(root, "run-1", rows)
    assert make_run(rows)["device_hours"]["total"]["value"] == pytest.approx(63 / 60)
    (stored,) = stored_runs_facts(stored_runs(f"sqlite:///{root / 'mlflow.db'}", 0, round(2e12))[0])
    assert {charge.what: round(charge.device_h * 60, 6) for charge in charges(stored)} == {
        "teacher": 32,
        "student": 22,
        "overhead": 3,
        "compare": 6,
    }
    parent = MlflowClient(f"sqlite:///{root / 'mlflow.db'}").search_runs(
        ["1"], "tags.`pipeline.run` = 'run-1'"
    )[0]
    total = parent.data.metrics["compute/run_device_hours"]
    assert math.fsum(charge.device_h for charge in charges(stored)) == total
    group, whole = report(root)
    assert [group["kind"], whole["kind"]] == ["group", "total"]
    assert (group["group"], group["device"], group["currency"], group["runs"]) == (
        "vision",
        "NVIDIA H200",
        "",
        "1",
    )
    assert float(group["device_hours"]) == float(whole["device_hours"]) == total
    assert float(group["gpu_hours"]) == pytest.approx(63 / 60)
    # 5% of the stages' 54 min, and the overhead, which is all import
    assert float(group["wasted_device_hours"]) == pytest.approx((0.05 * 54 + 3) / 60)
    assert float(group["waste_share"]) == pytest.approx((0.05 * 54 + 3) / 63)
    assert group["energy_kwh"] == group["amount"] == group["allocated_gpu_hours"] == ""
    assert float(group["energy_unread_device_hours"]) == total


def test_what_mlflow_has_not_had_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(root, "run-1", [a_row()])
    report(root)
    assert "have more to tell" not in capsys.readouterr().out
    journal = Journal(folder / "journal.jsonl")
    journal.write("heartbeat", t=NOON + 1, mono_ns=9)
    journal.close()
    report(root)
    assert f"1 run under {root} has more to tell than MLflow has had" in capsys.readouterr().out


def test_a_comparison_pass_that_was_taken_over_is_reused_too() -> None:
    stage = Charge(
        run="r", what="student", owner={}, device="H200", ended_s=1.0, device_h=0.0, reused_h=2.0
    )
    facts = RunFacts(
        run="r",
        owner={},
        device="H200",
        ended_s=2.0,
        total_h=0.5,
        stages=(stage,),
        outside_h={"overhead": 0.5},
        rate=3.0,
        currency="EUR",
        reused_h=2.25,
    )
    found = {
        charge.what: (charge.device_h, charge.reused_h, charge.reused_amount)
        for charge in charges(facts)
    }
    assert found == {
        "student": (0.0, 2.0, None),
        "overhead": (0.5, 0.0, None),
        "reused comparison": (0.0, 0.25, 0.75),
    }


def test_a_group_that_stands_twice_is_explained(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(root, "run-1", [a_row(rate=3.0)], rate=3.0)
    report(root)
    assert "more than one line" not in capsys.readouterr().out
    write_run(root, "run-2", [a_row()], at=NOON + DAY)
    report(root)
    assert (
        "- vision stands on more than one line: each currency has one, and so have hours without a"
        " rate\n"
    ) in capsys.readouterr().out


def test_a_reused_stage_is_not_counted_twice(root: Path) -> None:
    write_run(root, "run-1", [a_row(rate=3.0)], rate=3.0)
    write_run(
        root,
        "run-2",
        [a_row(rate=3.0, reused="run-1")],
        rate=3.0,
        team="speech",
        minutes=(0, 3),
        at=NOON + DAY,
    )
    found = report(root)
    assert hours(found, "vision") == pytest.approx((22 + 9) / 60)
    assert hours(found, "speech") == pytest.approx(3 / 60)
    assert hours(found, "speech", "reused_device_hours") == pytest.approx(22 / 60)
    assert hours(found, "speech", "amount") == pytest.approx(3.0 * 3 / 60)
    assert hours(found, TOTAL, "amount") == pytest.approx(3.0 * (22 + 9 + 3) / 60)
    children = MlflowClient(f"sqlite:///{root / 'mlflow.db'}").search_runs(
        ["1"], "tags.reused = 'run-1'"
    )
    metrics = children[0].data.metrics
    assert (metrics["compute/spent_device_hours"], metrics["compute/device_hours"]) == (
        0.0,
        pytest.approx(22 / 60),
    )
    assert metrics["compute/reused_device_hours"] == pytest.approx(22 / 60)
    # whose run it is; the hours' owner is the original's
    assert children[0].data.tags["team"] == "speech"


def test_failed_and_killed_attempts_are_charged(root: Path) -> None:
    """A killed attempt of 20 min, a failed one of 10, all of it retry, in a run that failed."""
    rows = []
    for attempt, (status, minutes) in enumerate((("KILLED", 20), ("FAILED", 10)), 1):
        row = a_row(status=status, attempt=attempt, artifact=None, quality={})
        for name in ("attached", "retry", "wasted"):
            row["ledger"]["device_hours"][name] = value(minutes / 60)
        for name in ("work", "assess", "productive", "support"):
            row["ledger"]["device_hours"][name] = value(0.0)
        rows.append(row)
    rows.append(make_unfinished("control_steps", "SKIPPED", "no such device"))
    write_run(root, "run-1", rows, status="FAILED", minutes=(0, 3))
    group, _ = report(root)
    assert float(group["device_hours"]) == pytest.approx(33 / 60)
    assert float(group["wasted_device_hours"]) == pytest.approx(33 / 60)
    assert float(group["waste_share"]) == pytest.approx(1.0)


@pytest.mark.parametrize("alive", [False, True])
def test_a_run_without_an_end_counts_up_to_its_last_sign_of_life(root: Path, alive: bool) -> None:
    """Two devices for 2 hours; a stage of 22 device-minutes had ended; nobody knows what the rest
    was.
    """
    write_run(root, "run-1", [a_row()], ended=False, devices=2, alive=alive)
    group, _ = report(root)
    assert float(group["device_hours"]) == pytest.approx(4.0)
    assert float(group["gpu_hours"]) == pytest.approx(4.0)
    assert float(group["waste_unknown_device_hours"]) == pytest.approx(4.0 - 22 / 60)
    assert float(group["waste_share"]) == pytest.approx(0.05)


def test_a_run_that_was_killed_and_goes_on_is_counted_by_its_end(root: Path) -> None:
    folder = write_run(root, "run-1", [a_row()], ended=False, alive_h=1.0)
    assert hours(report(root), "vision") == pytest.approx(1.0)
    start = read_events(folder / "journal.jsonl")[0]
    journal = Journal(folder / "journal.jsonl")
    again = {name: item for name, item in start.items() if name != "e"}
    journal.write("run_start", **{**again, "attempt": 2, "t": NOON + HOUR, "mono_ns": 0})
    run = make_run([a_row()], overhead_min=60)
    journal.write(
        "run_end",
        status="FINISHED",
        why=None,
        primary_arm="student",
        run=run,
        description="",
        files=[],
        t=NOON + 2 * HOUR,
        mono_ns=5,
    )
    deliver(folder)
    assert hours(report(root), "vision") == pytest.approx((22 + 6 + 60) / 60)


def test_a_living_run_is_noted_once_a_minute_and_with_every_row(root: Path) -> None:
    folder = write_run(root, "run-1", [], ended=False, alive_h=1.0, alive=True)
    told: list[float] = []
    for second, event in ((30, "heartbeat"), (61, "heartbeat"), (62, "row")):
        journal = Journal(folder / "journal.jsonl")
        row = {"row": a_row()} if event == "row" else {}
        journal.write(event, t=NOON + second, mono_ns=round((HOUR + second) * 1e9), **row)
        with FileLock(folder / ".lock"):
            deliver(folder)
        told.append(hours(report(root), "vision") * HOUR - HOUR)
    assert told == pytest.approx([0, 61, 62], abs=1e-3)


def test_a_meter_that_was_killed_is_charged_on_the_devices_it_saw(root: Path) -> None:
    """It has no row yet: device model and count are what it noted down when the command appeared on
    them.
    """
    folder = write_run(root, "killed", [], ended=False, device="", alive=True)
    journal = Journal(folder / "journal.jsonl")
    used = {"kind": "cuda", "name": "NVIDIA H200", "ids": ["GPU-1", "GPU-2"]}
    journal.write("devices", used=used, t=NOON, mono_ns=round(2 * HOUR * 1e9))
    journal.close()
    deliver(folder)
    group = next(line for line in report(root) if line["kind"] == "group")
    assert (group["device"], float(group["device_hours"])) == ("NVIDIA H200", pytest.approx(4))


def test_runs_inside_a_metered_run_are_its_own_seconds(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(root, "outer", [a_row()], minutes=(0, 3))
    write_run(root, "inner", [a_row()], tags={"nested_in": "outer"})
    write_run(root, "lone", [a_row()], tags={"nested_in": "of another store"}, minutes=(0, 0))
    assert hours(report(root), "vision") == pytest.approx((25 + 22) / 60)
    assert "1 run inside a metered run is part of it" in capsys.readouterr().out


def silent_row(**more: Any) -> dict[str, Any]:
    """Return the row of a metered program that reports no phases."""
    row = a_row("baseline", **more)
    unknown = null("the program reports no phases")
    row["ledger"]["device_hours"] |= dict.fromkeys(("productive", "support", "wasted"), unknown) | {
        "wasted_by": {}
    }
    return row


def test_what_tells_no_waste_has_none_rather_than_zero(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The meter's own seconds, which do tell, do not speak for the program's."""
    write_run(root, "silent", [silent_row()], minutes=(0, 3))
    group, total = report(root)
    for line in (group, total):
        assert (line["wasted_device_hours"], line["waste_share"]) == ("", "")
        assert float(line["waste_unknown_device_hours"]) == pytest.approx(
            float(line["device_hours"])
        )
    assert "do not tell waste" in capsys.readouterr().out


def test_a_metered_program_s_waste_is_what_the_runs_inside_it_tell(root: Path) -> None:
    inner, outer = a_row("control_steps"), silent_row()
    write_run(root, "outer", [outer], minutes=(0, 0))
    write_run(root, "inner", [inner], tags={"nested_in": "outer"}, minutes=(0, 0))
    inner_h, outer_h = (
        row["ledger"]["device_hours"]["attached"]["value"] for row in (inner, outer)
    )
    wasted_h = inner["ledger"]["device_hours"]["wasted"]["value"]
    group, _ = report(root)
    assert float(group["wasted_device_hours"]) == pytest.approx(wasted_h)
    assert float(group["waste_unknown_device_hours"]) == pytest.approx(outer_h - inner_h)
    assert float(group["waste_share"]) == pytest.approx(wasted_h / inner_h)


@pytest.mark.slow
def test_a_recipe_under_a_meter_is_charged_once(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are real: a metered command that is a recipe, in one store."""
    folders = lambda: {path.name for path in (root / "runs").iterdir()}
    python = [sys.executable, "-m"]
    command = [
        *python,
        "pipeline",
        "meter",
        "--root",
        str(root),
        "--no-mlflow",
        "--team",
        "vision",
        "--",
        *python,
        "pipeline",
        "recipe=baseline",
        f"tracking.root={root}",
        "tracking.team=vision",
        *SMALLEST,
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (outer,), (inner,) = (
        [name for name in folders() if word in name] for word in ("-meter-", "-baseline-")
    )
    assert read_events(root / "runs" / inner / "journal.jsonl")[0]["tags"]["nested_in"] == outer
    for name in (outer, inner):
        deliver(root / "runs" / name)
    runs = {
        name: json.loads((root / "runs" / name / "result.json").read_text())["run"]
        for name in (outer, inner)
    }
    totals = {name: run["device_hours"]["total"]["value"] for name, run in runs.items()}
    assert 0 < totals[inner] < totals[outer]
    now = time.time()
    days = [str(datetime.fromtimestamp(now + shift * DAY, UTC).date()) for shift in (0, 1)]
    assert (
        main(
            [
                "--from",
                days[0],
                "--to",
                days[1],
                "--root",
                str(root),
                "--csv",
                str(root / "out.csv"),
            ]
        )
        == 0
    )
    with (root / "out.csv").open(encoding="utf-8", newline="") as opened:
        assert hours(list(csv.DictReader(opened)), "vision") == pytest.approx(totals[outer])
    assert "1 run inside a metered run is part of it" in capsys.readouterr().out


def test_what_was_deleted_in_the_ui_is_spent_all_the_same_and_once(root: Path) -> None:
    folder = write_run(root, "run-1", [a_row()])
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    for run in client.search_runs(["1"]):
        client.delete_run(run.info.run_id)
    assert hours(report(root), "vision") == pytest.approx(31 / 60)
    journal = Journal(folder / "journal.jsonl")  # goes on, and so is delivered anew
    start = {
        name: item for name, item in read_events(folder / "journal.jsonl")[0].items() if name != "e"
    }
    journal.write("run_start", **{**start, "attempt": 2})
    run = make_run([a_row()], overhead_min=60)
    journal.write(
        "run_end",
        status="FINISHED",
        why=None,
        primary_arm="student",
        run=run,
        description="",
        files=[],
        t=NOON,
        mono_ns=5,
    )
    deliver(folder)
    assert len(client.search_runs(["1"])) == 2
    assert hours(report(root), "vision") == pytest.approx(88 / 60)


HOURS = st.floats(0, 100)
STAGE = st.builds(
    Charge,
    run=st.just("r"),
    what=st.just("s"),
    owner=st.just({}),
    device=st.just("H200"),
    ended_s=st.just(0.0),
    device_h=HOURS,
    gpu_h=st.one_of(st.none(), HOURS),
    allocated_gpu_h=st.one_of(st.none(), HOURS),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(STAGE, max_size=5),
    HOURS,
    st.one_of(st.just({}), st.fixed_dictionaries({"overhead": HOURS, "compare": HOURS})),
)
def test_charges_add_up_to_the_run_whatever_its_parts_say(
    stages: list[Charge], rest_h: float, outside: Any
) -> None:
    total_h = math.fsum([*(stage.device_h for stage in stages), rest_h])
    run = RunFacts(
        run="r",
        owner={},
        device=None,
        ended_s=0.0,
        total_h=total_h,
        stages=tuple(stages),
        outside_h=outside,
    )
    assert math.fsum(charge.device_h for charge in charges(run)) == pytest.approx(total_h)


def test_runs_of_other_programs_are_left_out_and_said(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    run = client.create_run("0", start_time=round(NOON * 1000))
    client.set_terminated(run.info.run_id, end_time=round(NOON * 1000) + 5)
    assert report(root) == []
    said = capsys.readouterr().out
    assert "no run spent anything in this period" in said
    assert "1 run of another program was left out" in said


def test_a_large_store_is_read_page_by_page(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By MLflow's client, as servers are."""
    for number in range(3):
        write_run(root, f"run-{number}", [a_row("teacher"), a_row()], minutes=(0, 0))
    before = report(root)
    monkeypatch.setattr(tracking, "sqlite_file", lambda _: None)
    monkeypatch.setattr(tracking, "MAX_BATCH", 2)
    assert report(root) == before
    assert hours(before, "vision") == pytest.approx(3 * 54 / 60)


# -- periods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
@pytest.mark.parametrize(
    ("at", "counted"),
    [(NOV - 0.001, 0), (NOV, 1), (NOV + 30 * DAY - 0.001, 1), (NOV + 30 * DAY, 0)],
)
def test_days_are_utc_and_the_last_one_is_not_in_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, zone: str, at: float, counted: int
) -> None:
    """Only overhead of 3 minutes, which belongs to the run's end."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        write_run(root, "run-1", [], at=at, minutes=(0, 3))
        assert hours(report(root), "vision") == pytest.approx(counted * 3 / 60)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_run_over_the_edge_is_charged_where_each_part_ended(root: Path) -> None:
    """The teacher's row is at 23:59 in October; the student's and the rest are November's. No hour
    gets lost.
    """
    write_run(root, "run-1", [a_row("teacher"), a_row()], at=NOV + 60.0)
    file = root / "out.csv"
    october = main(["--from=2026-10-01", "--to=2026-11-01", f"--root={root}", f"--csv={file}"])
    with file.open() as opened:
        first = list(csv.DictReader(opened))
    assert october == 0
    assert hours(first, "vision") == pytest.approx(32 / 60)
    assert hours(report(root), "vision") == pytest.approx((22 + 9) / 60)


# -- groups, money, capacity ----------------------------------------------------------------------


def test_currencies_and_device_models_are_never_added(root: Path) -> None:
    write_run(root, "a", [a_row(rate=3.0)], rate=3.0, minutes=(0, 0))
    write_run(
        root, "b", [a_row(rate=2.0, currency="USD")], rate=2.0, currency="USD", minutes=(0, 0)
    )
    write_run(root, "c", [a_row(device="NVIDIA A100")], device="NVIDIA A100", minutes=(0, 0))
    write_run(
        root,
        "d",
        [a_row(rate=3.0, owner={"cost_center": "4711"})],
        team=None,
        rate=3.0,
        minutes=(0, 0),
    )
    found = report(root)
    told = {
        (row["group"], row["device"], row["currency"]): (
            row["amount"] and round(float(row["amount"]), 3)
        )
        for row in found
    }
    assert told == {
        ("(no team)", "NVIDIA H200", "EUR"): 1.1,
        ("vision", "NVIDIA A100", ""): "",
        ("vision", "NVIDIA H200", "EUR"): 1.1,
        ("vision", "NVIDIA H200", "USD"): 0.733,
        (TOTAL, "NVIDIA A100", ""): "",
        (TOTAL, "NVIDIA H200", "EUR"): 2.2,
        (TOTAL, "NVIDIA H200", "USD"): 0.733,
    }
    assert len(found) == 7
    by_center = report(root, "--by", "cost_center")
    assert {row["group"] for row in by_center} == {"4711", "(no cost_center)", "total"}


def test_overhead_is_held_and_paid_as_its_stages_were(root: Path) -> None:
    """Granted 4 GPUs where 1 was used, at 2.50: 22 + 3 minutes cost 4 x 25/60 x 2.50."""
    row = a_row()
    row["ledger"]["gpu_hours"]["allocated"] = value(4 * 22 / 60, "declared")
    row["ledger"]["cost"] = {"amount": value(2.5 * 4 * 22 / 60, "declared"), "currency": "EUR"}
    row["ledger"]["energy_j"] = value(7.2e6)
    write_run(root, "run-1", [row], rate=2.5, minutes=(0, 3))
    group, _ = report(root)
    assert float(group["allocated_gpu_hours"]) == pytest.approx(4 * 25 / 60)
    assert float(group["amount"]) == pytest.approx(2.5 * 4 * 25 / 60)
    assert float(group["energy_kwh"]) == 2.0
    assert float(group["energy_unread_device_hours"]) == pytest.approx(3 / 60)


def test_idle_capacity_is_a_line_of_its_own(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(root, "run-1", [a_row()], ended=False, alive_h=10.0)
    found = report(root, "--capacity", "2")
    assert found[-1]["group"] == "idle capacity"
    assert float(found[-1]["device_hours"]) == pytest.approx(2 * 30 * 24 - 10)
    assert hours(found, TOTAL) == pytest.approx(10)  # idle is in no total
    assert hours(report(root, "--capacity", "2", now=NOV + DAY), "idle capacity") == pytest.approx(
        2 * 24 - 10
    )
    capsys.readouterr()
    assert [row["kind"] for row in report(root, "--capacity", "1", now=NOV + HOUR)] == [
        "group",
        "total",
    ]
    assert "more was used than was declared" in capsys.readouterr().out
    write_run(root, "run-2", [a_row(device="NVIDIA A100")], device="NVIDIA A100")
    capsys.readouterr()  # a delivery that a busy machine holds up says so
    assert main([*PERIOD, "--root", str(root), "--capacity", "2"]) == 1
    assert (
        capsys.readouterr().err
        == "refused: --capacity: there are 2 device models; write 'NVIDIA A100=2'\n"
    )
    found = report(root, "--capacity", "NVIDIA A100=2")
    assert hours(found, "idle capacity") == pytest.approx(2 * 30 * 24 - 31 / 60)


def test_the_table_says_what_is_not_known(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(root, "run-1", [a_row()], team="\x1b[31mred\nteam", minutes=(6, 3))
    report(root)
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "device-hours have no declared rate: money -" in said
    assert "device-hours have no energy reading" in said
    assert all(len(line) < 140 for line in said.splitlines())


def test_hours_of_two_device_models_are_not_added_in_a_note(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(root, "run-1", [a_row()], minutes=(6, 3))
    write_run(root, "run-2", [a_row(device="NVIDIA A100")], device="NVIDIA A100", minutes=(6, 3))
    report(root)
    said = "device-hours (0.517 on NVIDIA A100, 0.517 on NVIDIA H200) have no declared rate"
    assert said in capsys.readouterr().out


# -- lines and CSV --------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
AMOUNT = st.one_of(st.none(), st.floats(0, 1e6))
CHARGES = st.lists(
    st.builds(
        Charge,
        run=st.sampled_from("abc"),
        what=st.just("s"),
        owner=st.fixed_dictionaries({"team": st.one_of(st.none(), TEXT)}),
        device=st.sampled_from([None, "H200", "A100"]),
        ended_s=st.just(0.0),
        device_h=st.floats(1e-3, 1e6),
        gpu_h=AMOUNT,
        reused_h=st.floats(0, 10),
        energy_j=AMOUNT,
        wasted_h=AMOUNT,
        amount=AMOUNT,
        currency=st.sampled_from([None, "EUR", "USD"]),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(CHARGES)
def test_lines_add_up_to_the_totals_and_these_to_the_charges(spent: list[Charge]) -> None:
    found = lines(spent, "team")
    for name in ("device_h", "reused_h", "gpu_h", "energy_kwh", "amount", "wasted_h"):
        known = lambda kind, name=name: [
            v for line in found if line.kind == kind if (v := getattr(line, name)) is not None
        ]
        scale = 3.6e6 if name == "energy_kwh" else 1.0
        wanted = [
            v / scale
            for charge in spent
            if (v := getattr(charge, "energy_j" if scale > 1 else name)) is not None
        ]
        assert math.fsum(known("group")) == pytest.approx(math.fsum(wanted))
        assert math.fsum(known(TOTAL)) == pytest.approx(math.fsum(wanted))
        assert bool(known(TOTAL)) == bool(wanted)  # of nothing known, nothing is 0
    assert all(line.waste_share is None or 0 <= line.waste_share <= 1 for line in found)
    if found:
        assert len(table(found)) == len(found) + 1


@settings(max_examples=60, deadline=None)
@given(CHARGES)
def test_csv_can_be_read_back_and_holds_no_formula(spent: list[Charge]) -> None:
    found = lines(spent, "team")
    rows = list(csv.reader(io.StringIO(to_csv(found), newline="")))
    assert rows[0] == list(COLUMNS)
    assert all(len(row) == len(COLUMNS) for row in rows)
    for line, row in zip(found, rows[1:], strict=True):
        cells = dict(zip(COLUMNS, row, strict=True))
        assert float(cells["device_hours"]) == line.device_h
        assert (cells["amount"] == "") == (line.amount is None)
        assert not cells["group"].lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("  =1", "'  =1"),
        ("\uff1d1", "'\uff1d1"),
        ("\x00=1", "'=1"),
        ("\u200b=1", "'=1"),
        ("vision", "vision"),
        ('a "b", c', 'a "b", c'),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_no_cell_is_a_formula(text: str, cell: str) -> None:
    assert harmless(text) == cell
    line = Line(kind="group", group=text, device="H200", currency="EUR")
    assert next(csv.DictReader(io.StringIO(to_csv([line]), newline="")))["group"] == cell


def test_a_negative_number_stays_one_and_idle_is_never_negative() -> None:
    line = Line(kind="group", group="a", device="H200", currency="EUR", device_h=1.0, amount=-2.5)
    assert ",-2.5," in to_csv([line])
    assert to_csv([line]).endswith("\r\n")
    total = Line(
        kind=TOTAL, group=TOTAL, device="H200", currency="", device_h=5.0, allocated_gpu_h=20.0
    )
    assert idle([total], "H200", 1, 10.0)[0] is None  # held for longer than it was there
    held, _ = idle([total], "H200", 3, 10.0)
    assert held is not None
    assert held.device_h == 10.0


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "--from: is missing"),
        (["--from", "2026-11-01"], 2, "--to: is missing"),
        (["--from"], 2, "--from: has no value"),
        ([*PERIOD, "--verbose"], 2, "--verbose: is no option of chargeback"),
        (["--from", "2026-13-01", "--to", "2026-12-01"], 1, "--from: '2026-13-01' is no day"),
        (["--from", "yesterday", "--to", "2026-12-01"], 1, "--from: 'yesterday' is no day"),
        (["--from", "2026-12-01", "--to", "2026-12-01"], 1, "--to: 2026-12-01 is not after --from"),
        ([*PERIOD, "--by", "colour"], 1, "--by: 'colour' is nothing to group by"),
        ([*PERIOD, "--capacity", "-3"], 1, "--capacity: '-3' is no number of devices"),
        ([*PERIOD, "--capacity", "H200=many"], 1, "--capacity: 'H200=many' is no number"),
        ([*PERIOD, "--csv", "nowhere/out.csv"], 1, "--csv: 'nowhere/out.csv' lies in no folder"),
        ([*PERIOD], 1, "--root: there is no store"),
        ([*PERIOD, "--uri", "sqlite:///none.db"], 1, "--uri: there is no store"),
        ([*PERIOD, "--uri", "sqlite://"], 1, "--uri: there is no store"),
    ],
)
def test_refusals_are_one_line_and_make_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == code
    line = capsys.readouterr().err
    assert line.startswith(f"refused: {said}")
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "holds no MLflow store"), (b"no database" * 99, "cannot be read")]
)
def test_a_file_that_is_no_store_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    assert main([*PERIOD, "--root", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err
    assert (tmp_path / "mlflow.db").read_bytes() == content


def test_an_empty_store_has_spent_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(root) == []
    assert "no run spent anything" in capsys.readouterr().out
    assert hours(report(root, "--capacity", "1"), "idle capacity") == 720
    assert main([*PERIOD, "--root", str(root), "--csv", str(root)]) == 1
    assert capsys.readouterr().err.startswith("refused: --csv:")


def test_a_server_that_does_not_answer_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(list(PERIOD)) == 1
    assert capsys.readouterr().err.startswith("refused: --uri: the store does not answer (")


def test_a_store_whose_driver_is_not_installed_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert main([*PERIOD, "--uri", "postgresql+psycopg://me:s3cr3t@host/store"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("refused: --uri: the store does not answer (")
    assert (err.count("\n"), "s3cr3t" in err) == (1, False)


# -- cost per converged model ---------------------------------------------------------------------


def good(bits: float, **changes: Any) -> dict[str, Any]:
    return a_row(quality={"bits_per_byte": value(bits, ci=None, n=1, items=None)}, **changes)


def test_a_converged_model_cost_all_that_came_before(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trial 1 (22 + 9 min) is not good enough. Trial 2 fails (33 min). Trial 3: start-up 3 and
    teacher 32 before the student (22) gets there; its comparison pass (6), a later stage and all of
    trial 4 come too late. 31 + 33 + 57 = 121 min. Another model's run does not count.
    """
    lost = a_row("teacher", status="FAILED", artifact=None, quality={}, rate=2.0)
    folder = write_run(root, "r1", [good(2.4, rate=2.0)], at=NOON, converged_at=2.2, rate=2.0)
    write_run(
        root,
        "r2",
        [lost],
        at=NOON + HOUR,
        rate=2.0,
        minutes=(0, 1),
        converged_at=2.2,
        status="FAILED",
    )
    facts = lambda: [
        journal_facts(read_events(path)) for path in sorted(root.glob("runs/*/journal.jsonl"))
    ]
    early = per_converged_model(facts(), 2.2)
    assert (
        early.device_hours.why_missing
        == early.amount.why_missing
        == "not reached yet: best bits_per_byte 2.4 of 2.2"
    )
    rows = [
        good(2.5, arm="teacher", rate=2.0),
        good(2.2, rate=2.0),
        a_row("control_steps", rate=2.0),
    ]
    folder = write_run(root, "r3", rows, at=NOON + 2 * HOUR, rate=2.0, converged_at=2.2)
    write_run(root, "r4", [good(2.0, rate=2.0)], at=NOON + 3 * HOUR, rate=2.0, converged_at=2.2)
    write_run(root, "x", [good(2.0, rate=2.0)], at=NOON - HOUR, rate=2.0, model="m2")
    own = [each for each in facts() if each.owner["model_name"] == "m1"]
    told = per_converged_model(own, 2.2)
    assert told.device_hours.value == pytest.approx(121 / 60)
    assert told.amount.value == pytest.approx(2.0 * 121 / 60)
    assert (told.amount.provenance, told.currency, told.run) == ("estimated", "EUR", "r3")
    stored = stored_runs_facts(stored_runs(f"sqlite:///{root / 'mlflow.db'}", 0, round(2e12))[0])
    again = per_converged_model([each for each in stored if each.owner["model_name"] == "m1"], 2.2)
    assert again.device_hours.value == pytest.approx(told.device_hours.value)
    assert again.amount.value == pytest.approx(told.amount.value)
    ended = read_events(folder / "journal.jsonl")[-1]["run"]
    assert of_this_run(folder, ended, 2.2, "m1").device_hours.value == pytest.approx(
        told.device_hours.value
    )
    assert (
        of_this_run(folder, ended, None, "m1")
        .to_json()["device_hours"]["why_missing"]
        .startswith("no quality declared")
    )
    capsys.readouterr()
    report(root, "--by", "model_name")
    said = capsys.readouterr().out
    assert "m1 until converged: 2.017 device-hours, 4.033 EUR, reached in r3" in said
    assert "m2 until converged: - (no quality declared: cost.converged_at)" in said


def test_a_model_made_under_a_meter_converged_there_and_cost_the_meter_s_hours(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The meter's 12 + 9 min hold those of the run inside, which has the artifact; 22 + 9 came
    before.
    """
    write_run(root, "r0", [good(2.4)], at=NOON, converged_at=2.2)
    write_run(root, "outer", [a_row("sft", quality={}, artifact=None)], at=NOON + 2 * HOUR)
    folder = write_run(
        root, "inner", [good(2.1)], at=NOON + HOUR, converged_at=2.2, tags={"nested_in": "outer"}
    )
    taken = pytest.approx((31 + 12 + 9) / 60)
    ended = read_events(folder / "journal.jsonl")[-1]["run"]
    told = of_this_run(folder, ended, 2.2, "m1")
    assert (told.device_hours.value, told.run) == (taken, "inner")
    capsys.readouterr()
    report(root, "--by", "model_name")
    assert "m1 until converged: 0.867 device-hours" in capsys.readouterr().out


def test_what_was_taken_over_from_another_model_is_not_free() -> None:
    owner = {"model_name": "m1"}
    taken = Charge(
        run="r1",
        what="student",
        owner=owner,
        device="H200",
        ended_s=1.0,
        device_h=0.0,
        reused_h=5.0,
        reused_from="r0",
        quality=("accuracy", 0.9),
        amount=0.0,
        reused_amount=10.0,
        currency="EUR",
    )
    run = RunFacts(
        run="r1",
        owner=owner,
        device="H200",
        ended_s=2.0,
        total_h=0.5,
        stages=(taken,),
        rate=2.0,
        currency="EUR",
    )
    told = per_converged_model([run], 0.9)
    assert (told.device_hours.value, told.amount.value) == (5.5, 11.0)
    made = Charge(run="r0", what="student", owner=owner, device="H200", ended_s=0.5, device_h=5.0)
    first = RunFacts(run="r0", owner=owner, device="H200", ended_s=0.6, total_h=5.0, stages=(made,))
    told = per_converged_model([run, first], 0.9)
    assert told.device_hours.value == 5.5
    assert told.amount.why_missing == "5 device-hours have no rate"


def test_money_of_two_currencies_makes_no_cost_of_a_model() -> None:
    paid = [
        Charge(
            run=f"r{n}",
            what="s",
            owner={},
            device="H200",
            ended_s=n,
            device_h=1.0,
            amount=1.0,
            currency=currency,
            quality=("accuracy", 0.5 + n / 10),
        )
        for n, currency in enumerate(("EUR", "USD"))
    ]
    runs = [
        RunFacts(run=c.run, owner={}, device="H200", ended_s=9.0, total_h=1.0, stages=(c,))
        for c in paid
    ]
    told = per_converged_model(runs, 0.6)
    assert told.device_hours.value == 2.0
    assert told.amount.why_missing == "paid in EUR and USD, which do not add up"
    assert (
        per_converged_model(runs, 0.7).device_hours.why_missing
        == "not reached yet: best accuracy 0.6 of 0.7"
    )
    assert (
        per_converged_model([], 0.7).device_hours.why_missing
        == "not reached yet: no artifact was assessed"
    )


@pytest.mark.parametrize(
    ("names", "said"), [([None, "NVIDIA H200"], "NVIDIA H200"), ([None], None)]
)
def test_a_device_that_does_not_tell_its_name_breaks_no_charge(
    names: list[str | None], said: str | None
) -> None:
    row: Any = make_row("student")
    row["ledger"]["placement"] = {"device_names": names}
    assert stage_device(row) == said
