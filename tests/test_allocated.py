"""What a scheduler held for a run: `sacct` is a program here that prints what the real one did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from here import here, result_in
from make_golden import COMMON
from make_result import make_result, make_row, make_run, value
from reports import whole_report

from pipeline.config.settings.cost import CostConfig
from pipeline.ledger import slurm
from pipeline.ledger.allocated import Attempt, attempts_in, is_settled, mismatches, read_allocated
from pipeline.ledger.charges import RunFacts, charges
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.placement import Grant
from pipeline.ledger.records import RUN, read_record, sealed
from pipeline.ledger.run_cost import run_cost
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.ledger.slurm import Held, Unanswered, read_held
from pipeline.runs.jobs import read_jobs, settle
from pipeline.store.artifacts import write_json
from pipeline.store.locks import lock_at

# Slurm 22.05.8 of Debian 12, `sacct --duplicates -X -P -n`: a job that was preempted, queued again
# and finished; then parts of an array; one without GPUs
PREEMPTED = """\
1|REQUEUED|1796002092|1796002098|6|billing=2,cpu=2,gres/gpu=2,mem=1000M,node=2
1|COMPLETED|1796002104|1796002186|82|billing=2,cpu=2,gres/gpu=2,mem=1000M,node=2
"""
RUNNING = """\
1|REQUEUED|1796002092|1796002098|6|billing=2,cpu=2,gres/gpu=2,mem=1000M,node=2
1|RUNNING|1796002104|Unknown|14|billing=2,cpu=2,gres/gpu=2,mem=1000M,node=2
"""
ARRAY = """\
5|COMPLETED|1796003169|1796003173|4|billing=1,cpu=1,gres/gpu=1,mem=100M,node=1
3|CANCELLED by 0|1796003169|1796003173|4|billing=1,cpu=1,gres/gpu=1,mem=100M,node=1
4|PENDING|Unknown|Unknown|0|
"""
NO_GPU = "4|COMPLETED|1796003169|1796003171|2|billing=1,cpu=1,mem=100M,node=1\n"
FIRST_S, SECOND_S = 1796002092, 1796002104
"""When the preempted job started, each time."""


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have `sacct` print a text, end with a code, or do what a line of shell says."""

    def answer(printed: str = "", *, errors: str = "", code: int = 0, line: str = "") -> Path:
        program = tmp_path / "bin/sacct"
        program.parent.mkdir(exist_ok=True)
        (tmp_path / "printed").write_text(printed)
        (tmp_path / "errors").write_text(errors)
        asked = tmp_path / "asked"
        program.write_text(
            f'#!/bin/sh\necho "$SLURM_TIME_FORMAT $*" >> {asked}\n{line}\n'
            f"cat {tmp_path}/printed\ncat {tmp_path}/errors >&2\nexit {code}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return asked

    return answer


def attempt(number: int, at_s: float, wall_s: float = 5.0, **more: Any) -> Attempt:
    known = {"number": number, "at_s": at_s, "wall_s": wall_s, "devices": 2}
    return Attempt(**{**known, "grant": Grant("slurm", "1", 2), **more})


BOTH = [attempt(1, FIRST_S + 3, 5.0), attempt(2, SECOND_S + 3, 79.0)]


# -- what accounting says --------------------------------------------------------------------------


def test_each_start_of_a_job_is_a_row(sacct: Any) -> None:
    asked = sacct(PREEMPTED)
    assert read_held(["1"]) == [
        Held("1", "REQUEUED", 1796002092, 1796002098, 6, 2),
        Held("1", "COMPLETED", 1796002104, 1796002186, 82, 2),
    ]
    wanted = "%s -j 1 --duplicates -X -P -n -o JobIDRaw,State,Start,End,ElapsedRaw,AllocTRES\n"
    assert asked.read_text() == wanted
    sacct(ARRAY)
    assert read_held(["5", "3"]) == [
        Held("5", "COMPLETED", 1796003169, 1796003173, 4, 1),
        Held("3", "CANCELLED", 1796003169, 1796003173, 4, 1),
    ]
    sacct(NO_GPU + "\nno row of it\n")
    assert [held.gpus for held in read_held(["4"])] == [None]


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("cpu=2,gres/gpu=8,gres/gpu:h200=4,gres/gpu:a100=4", 8),
        ("cpu=2,gres/gpu:h200=4,gres/gpu:a100=2", 6),
        ("gres/gpumem=80G,cpu=1", None),
        ("gres/gpu=many", None),
        ("", None),
    ],
)
def test_gpus_of_a_model_are_not_counted_beside_all(
    tres: str, gpus: int | None, sacct: Any
) -> None:
    sacct(f"1|RUNNING|10|Unknown|3|{tres}\n")
    assert [held.gpus for held in read_held(["1"])] == [gpus]


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ("Slurm accounting storage is disabled\n", "sacct: Slurm accounting storage is disabled"),
        (
            "sacct: error: Sending PersistInit msg: Connection refused\n"
            "sacct: error: Problem talking to the database: Connection refused\n",
            "sacct: Problem talking to the database: Connection refused",
        ),
        ("", "sacct: exit code 1"),
    ],
)
def test_a_refusal_is_a_reason(errors: str, said: str, sacct: Any) -> None:
    sacct(errors=errors, code=1)
    with pytest.raises(Unanswered, match=f"^{said}$"):
        read_held(["1"])


def test_no_sacct_and_a_silent_one_are_reasons(sacct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unanswered, match=r"^no sacct here$"):
        read_held(["1"])
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.2)
    sacct(line="exec sleep 30")
    with pytest.raises(Unanswered, match=r"^sacct did not answer within 0\.2 s$"):
        read_held(["1"])


# -- what was held for a run -----------------------------------------------------------------------


def test_a_run_was_held_what_all_starts_of_its_job_were(sacct: Any) -> None:
    sacct(PREEMPTED)
    found = read_allocated(BOTH, {})
    assert found["gpu_hours"] == value((6 + 82) * 2 / 3600, "declared")
    assert [(each["attempts"], each["state"]) for each in found["grants"]] == [
        ([1], "REQUEUED"),
        ([2], "COMPLETED"),
    ]
    assert is_settled(found)
    assert mismatches(found, BOTH, on_gpu=True) == []


def test_a_job_that_lasts_is_an_estimate(sacct: Any) -> None:
    sacct(RUNNING)
    found = read_allocated(BOTH, {})
    assert found["gpu_hours"] == value((6 + 14) * 2 / 3600, "estimated")
    assert [each["ended"] for each in found["grants"]] == [True, False]
    assert not is_settled(found)


def test_two_attempts_in_one_start_of_a_job_count_it_once(sacct: Any) -> None:
    sacct(PREEMPTED)
    found = read_allocated([attempt(1, SECOND_S + 3), attempt(2, SECOND_S + 40)], {})
    assert found["gpu_hours"]["value"] == 82 * 2 / 3600
    assert [each["attempts"] for each in found["grants"]] == [[1, 2]]


def test_a_job_with_other_runs_in_it_counts_for_the_time_of_this_one(sacct: Any) -> None:
    sacct(PREEMPTED)
    found = read_allocated(BOTH, {"1": ["another"]})
    assert found["gpu_hours"] == value((5 + 79) * 2 / 3600, "estimated")
    assert {tuple(each["shared_with"]) for each in found["grants"]} == {("another",)}


@pytest.mark.parametrize(
    ("attempts", "why"),
    [
        ([attempt(1, FIRST_S, grant=None)], "no scheduler granted this run"),
        ([*BOTH, attempt(3, SECOND_S, grant=None)], "attempt 3 ran without a scheduler"),
        ([BOTH[0], attempt(2, SECOND_S + 5000)], "job 1: sacct knows of no such job at that time"),
        ([attempt(1, FIRST_S - 90000)], "job 1: sacct knows of no such job at that time"),
        (
            [attempt(1, FIRST_S, grant=Grant("slurm", "11", 2))],
            "job 11: sacct knows of no such job at that time",
        ),
    ],
)
def test_what_is_not_told_is_null(attempts: list[Attempt], why: str, sacct: Any) -> None:
    sacct(PREEMPTED)
    found = read_allocated(attempts, {})["gpu_hours"]
    assert (found["value"], found["why_missing"]) == (None, why)


def test_without_an_answer_every_job_says_why(sacct: Any) -> None:
    sacct(errors="Slurm accounting storage is disabled\n", code=1)
    found = read_allocated(BOTH, {})
    why = "sacct: Slurm accounting storage is disabled"
    assert found["gpu_hours"]["why_missing"] == f"job 1: {why}"
    assert [each["why_missing"] for each in found["grants"]] == [why, why]
    assert not is_settled(found)


def test_where_accounting_names_no_gpu_the_environment_may(sacct: Any) -> None:
    sacct(NO_GPU)
    own = attempt(1, 1796003170, 1.0, grant=Grant("slurm", "4", 3))
    assert read_allocated([own], {})["gpu_hours"]["value"] == 2 * 3 / 3600
    unknown = replace(own, grant=Grant("slurm", "4", None))
    found = read_allocated([unknown], {})["gpu_hours"]
    assert found["why_missing"] == "job 4: sacct names no gres/gpu of the job"


@pytest.mark.parametrize(
    ("wall_s", "devices", "granted", "on_gpu", "said"),
    [
        (83.0, 2, 2, True, []),
        (84.0, 2, 2, True, ["job 1: the run was there for 84 s, Slurm says 82 s"]),
        (80.0, 2, 4, True, ["job 1: accounting has 2 GPUs, the job's environment 4"]),
        (80.0, 3, None, True, ["job 1: 3 GPUs used, Slurm says that it held 2"]),
        (80.0, 1, 2, True, ["job 1 holds 2 GPUs, and the run uses 1"]),
        (80.0, 2, 2, False, ["job 1 holds 2 GPUs, and the run uses none"]),
    ],
)
def test_what_does_not_agree_is_named(
    wall_s: float, devices: int, granted: int | None, on_gpu: bool, said: list[str], sacct: Any
) -> None:
    sacct(PREEMPTED)
    grant = Grant("slurm", "1", granted)
    own = [attempt(1, SECOND_S, wall_s, devices=devices, grant=grant)]
    assert mismatches(read_allocated(own, {}), own, on_gpu=on_gpu) == said


# -- in a run's files ------------------------------------------------------------------------------


def write_run(root: Path, name: str, *, jobs: list[str] | None = None) -> Path:
    """Leave a run of two attempts, which ended as its second job lasted."""
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    state = {
        "key": "k",
        "status": "FINISHED",
        "attempt": 2,
        "jobs": ["1"] if jobs is None else jobs,
    }
    write_json(folder / "run.json", sealed(state))
    journal = Journal(folder / "journal.jsonl")
    row = make_row("student")
    totals: dict[str, Any] = make_run([row])
    for number, at_s, last_s in ((1, FIRST_S + 1, 5), (2, SECOND_S + 1, 79)):
        journal.write(
            "run_start",
            t=at_s,
            mono_ns=10**9,
            run_id=name,
            started_ns=0,
            attempt=number,
            devices=2,
            grant={"scheduler": "slurm", "job_id": "1", "gpus": 2},
            recipe="distill",
            params={"cost.per_device_hour": 3.0, "cost.currency": "EUR"},
            tags={},
            environment={},
        )
        if number == 2:
            journal.write("row", t=at_s, mono_ns=2 * 10**9, row=row)
        journal.write(
            "run_end",
            t=at_s + last_s,
            mono_ns=last_s * 10**9,
            status="FINISHED",
            why=None,
            primary_arm="student",
            run=totals | {"allocated": read_jobs(folder, read_events(folder / "journal.jsonl"))},
            description="as it was",
            files=[],
        )
    journal.close()
    result = make_result("distill")
    result["run"] = read_events(folder / "journal.jsonl")[-1]["run"]
    write_json(folder / "result.json", result)
    return folder


def test_attempts_are_read_back_from_the_journal(tmp_path: Path, sacct: Any) -> None:
    sacct(RUNNING)
    folder = write_run(tmp_path, "run-1")
    assert attempts_in(read_events(folder / "journal.jsonl", checked=True)) == [
        attempt(1, FIRST_S + 1, 5.0),
        attempt(2, SECOND_S + 1, 79.0),
    ]


def test_what_was_held_is_completed_once_the_job_has_ended(tmp_path: Path, sacct: Any) -> None:
    sacct(RUNNING)
    folder = write_run(tmp_path, "run-1")
    assert not settle(folder), "nothing new is known"
    sacct(errors="Slurm accounting storage is disabled\n", code=1)
    assert not settle(folder), "what is known stays where nobody answers"
    asked = sacct(PREEMPTED)
    with lock_at(folder / ".lock").acquire():
        assert not settle(folder), "an attempt is at work"
    assert settle(folder)
    result = json.loads((folder / "result.json").read_text())
    jsonschema.validate(result, RESULT_SCHEMA)
    assert result["run"]["allocated"]["gpu_hours"] == value(176 / 3600, "declared")
    assert "Slurm held 2.93 min of GPU time for it (job 1, 2 starts)" in whole_report(folder)
    events = read_events(folder / "journal.jsonl", checked=True)
    last, before = events[-1], events[-2]
    assert (last["e"], last["t"], last["mono_ns"]) == ("run_end", before["t"], before["mono_ns"])
    assert last["run"] == result["run"]
    assert last["description"] != "as it was"
    asked.unlink()
    assert not settle(folder)
    assert not asked.exists(), "what is settled is not asked again"


def test_runs_in_one_job_know_of_one_another(tmp_path: Path, sacct: Any) -> None:
    sacct(PREEMPTED)
    folder = write_run(tmp_path, "run-1")
    write_run(tmp_path, "run-2")
    write_run(tmp_path, "run-3", jobs=["11"])
    found = read_jobs(folder, read_events(folder / "journal.jsonl"))
    assert [each["shared_with"] for each in found["grants"]] == [["run-2"], ["run-2"]]
    assert found["gpu_hours"]["value"] == pytest.approx((5 + 79) * 2 / 3600)


def test_a_state_says_which_jobs_a_run_was_in(tmp_path: Path, sacct: Any) -> None:
    sacct(PREEMPTED)
    folder = write_run(tmp_path, "run-1")
    state = read_record(folder / "run.json", RUN)
    assert state is not None
    assert state.get("jobs") == ["1"]


@pytest.mark.slow
def test_a_run_in_a_job_says_what_is_held_for_it(
    tmp_path: Path, sacct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sacct(line='echo "7|RUNNING|$(($(date +%s) - 3600))|Unknown|3600|cpu=1,gres/gpu=4"')
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "h200:4")
    done = here(tmp_path, "recipe=baseline", *COMMON)
    assert done.returncode == 0, done.stderr
    result = result_in(tmp_path)
    assert result["run"]["allocated"]["gpu_hours"] == value(4.0, "estimated")
    [grant] = result["run"]["allocated"]["grants"]
    assert (grant["job_id"], grant["attempts"], grant["gpus"]) == ("7", [1], 4)
    assert "job 7 holds 4 GPUs, and the run uses none" in result["environment"]["notes"]
    hours = result["rows"][0]["ledger"]
    held, attached = hours["gpu_hours"]["allocated"], hours["device_hours"]["attached"]
    assert held["value"] == pytest.approx(4 * attached["value"])
    assert (
        "Slurm held 4.00 h of GPU time for it (job 7, 1 start, which had not ended yet)"
        in whole_report(tmp_path / "mlruns/latest")
    )


# -- money -----------------------------------------------------------------------------------------


def facts(**more: Any) -> RunFacts:
    known = {"run": "r", "owner": {}, "device": "H200", "ended_s": 0.0, "stages": ()}
    return RunFacts(**{**known, "total_h": 2.0, "outside_h": {"overhead": 2.0}, **more})


def test_what_was_held_and_not_attached_is_a_charge() -> None:
    first, held = charges(facts(allocated_h=2.5, rate=3.0, currency="EUR"))
    assert (first.what, first.device_h, first.amount) == ("overhead", 2.0, 6.0)
    assert (held.what, held.device_h, held.allocated_gpu_h, held.amount) == ("held", 0, 0.5, 1.5)
    assert [each.what for each in charges(facts(allocated_h=None))] == ["overhead"]
    assert [each.what for each in charges(facts(allocated_h=1.9))] == ["overhead"]


def test_a_run_costs_what_was_held_for_it(tmp_path: Path, sacct: Any) -> None:
    """The row and its outside: 22 and 3 minutes on one GPU; the job had two for two hours."""
    sacct(f"1|COMPLETED|{FIRST_S}|{FIRST_S + 7200}|7200|gres/gpu=2\n")
    folder = write_run(tmp_path, "run-1")
    events = read_events(folder / "journal.jsonl")
    totals = events[-1]["run"]
    cost = CostConfig(per_device_hour=3.0, currency="EUR", source="a list", date="2026-11-01")
    row = events[-2]["row"]
    row["ledger"]["cost"] = {"amount": value(3.0 * 22 / 60, "estimated"), "currency": "EUR"}
    assert run_cost(events, totals, cost)["amount"]["value"] == pytest.approx(3.0 * 4)
    without = {name: part for name, part in totals.items() if name != "allocated"}
    assert run_cost(events, without, cost)["amount"]["value"] < 3.0
