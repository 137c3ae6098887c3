"""Programs of others under the meter, as real processes: what they took, how they ended, what a
killed meter left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from make_journal import own_name
from mlflow import MlflowClient

from pipeline.cli.commands.meter import HELP, main
from pipeline.ledger.journal import read_events
from pipeline.ledger.ranks import IDLE, apportion, merge, read_lives
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.runs.metering.recovery import recover
from pipeline.tracking.deliver import deliver

PROGRAMS = Path(__file__).parent / "programs"
PYTHON = sys.executable
S = 10**9


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PIPELINE_"))]:
        monkeypatch.delenv(name)


def start(
    root: Path, *args: str | Path, options: tuple[str, ...] = ("--no-mlflow",)
) -> subprocess.Popen[str]:
    command = [
        PYTHON,
        "-m",
        "pipeline",
        "meter",
        "--root",
        str(root),
        *options,
        "--",
        *map(str, args),
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def run(
    root: Path, *args: str | Path, options: tuple[str, ...] = ("--no-mlflow",), said: str = ""
) -> tuple[int, str, str]:
    process = start(root, *args, options=options)
    out, err = process.communicate(said, timeout=120)
    return process.returncode, out, err


def folder_of(root: Path) -> Path:
    (folder,) = (root / "runs").iterdir()
    return folder


def result_of(folder: Path) -> dict[str, Any]:
    """Return a result that is valid, and whose books close."""
    result = json.loads((folder / "result.json").read_text())
    Draft202012Validator(RESULT_SCHEMA).validate(result)
    (row,) = result["rows"]
    assert row["ledger"]["meter_problems"] == []
    hours = {name: value["value"] for name, value in result["run"]["device_hours"].items()}
    assert hours["total"] == pytest.approx(
        hours["work"] + hours["retry"] + hours["overhead"], rel=1e-12
    )
    outside = sum(result["run"]["phases_device_ns"]["overhead"].values())
    assert hours["overhead"] == pytest.approx(outside / 3600e9, rel=1e-12)
    assert (folder / "report.md").read_text().startswith(f"# {row['arm']}: {result['status']}")
    return result


def ledger_of(folder: Path) -> dict[str, Any]:
    return result_of(folder)["rows"][0]["ledger"]


def until(what: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found
    return found


# -- programs that end well -----------------------------------------------------------------------


def test_the_meter_itself_imports_nothing_heavy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metered command would wait for it, and its hours would not tell."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    code, _, said = run(tmp_path, "true")
    rows = [row.rpartition("|")[2].strip() for row in said.splitlines() if "|" in row]
    imported = {row.partition(".")[0] for row in rows}
    assert code == 0
    assert "pipeline" in imported  # the listing was read
    assert imported.isdisjoint({"torch", "transformers", "mlflow", "numpy"})


@pytest.mark.slow
def test_a_plain_torch_script_reaches_mlflow_with_its_phases(root: Path) -> None:
    options = (
        "--name",
        "probe",
        "--team",
        "vision",
        "--model-name",
        "m1",
        "--rate",
        "2",
        "--rate-source",
        "list",
        "--rate-date",
        "2026-11-23",
        "--currency",
        "EUR",
    )
    code, out, err = run(root, PYTHON, PROGRAMS / "plain.py", options=options)
    assert (code, out.startswith("loss 0.")) == (0, True), err
    assert err.startswith("metered: probe, done, 1 CPU host\n")
    folder = folder_of(root)
    ledger = ledger_of(folder)
    counted = {
        name: ledger["counts"][name]["value"]
        for name in ("tokens", "examples", "steps", "model_flops")
    }
    assert counted == {
        "tokens": 20 * 512,
        "examples": 20 * 64,
        "steps": 20,
        "model_flops": 20 * 6 * 512,
    }
    assert {"forward", "backward", "optimizer", "prepare", "other"} <= set(ledger["phases_ns"])
    assert ledger["cost"]["amount"]["value"] == pytest.approx(
        2 * ledger["device_hours"]["attached"]["value"]
    )
    assert ledger["energy_j"]["value"] is None
    assert ledger["memory"]["nvml_peak_bytes"]["why_missing"] == "a CPU run uses no GPU"
    assert ledger["memory"]["host_peak_rss_bytes"]["value"] > 5e7
    assert ledger["identity"]["team"] == "vision"
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("meter")
    assert experiment is not None
    runs = {own_name(each): each for each in client.search_runs([experiment.experiment_id])}
    assert {name: each.info.status for name, each in runs.items()} == {
        folder.name: "FINISHED",
        "probe": "FINISHED",
    }
    parent, child = runs[folder.name].data, runs["probe"].data
    assert child.metrics["compute/tokens"] == 20 * 512
    assert parent.metrics["compute/device_hours"] == ledger["device_hours"]["attached"]["value"]
    assert (parent.tags["team"], parent.params["model.name"], child.tags["type"]) == (
        "vision",
        "m1",
        "metered",
    )
    assert child.tags["null.compute/gpu_hours"] == "a CPU run uses no GPU"


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_every_second_and_token_of_torchrun_once(tmp_path: Path, world: int) -> None:
    code, _, err = run(
        tmp_path,
        PYTHON,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world}",
        PROGRAMS / "gloo.py",
    )
    assert code == 0, err
    folder = folder_of(tmp_path)
    ledger = ledger_of(folder)
    lives, notes = read_lives(folder, os.uname().nodename)
    assert (sorted(life.rank for life in lives), notes) == (list(range(world)), [])
    assert ledger["counts"]["tokens"]["value"] == 5 * sum(100 + rank for rank in range(world))
    assert ledger["counts"]["steps"]["value"] == 5
    (window,) = [
        event["window"] for event in read_events(folder / "journal.jsonl") if event["e"] == "window"
    ]
    elapsed = window["end_ns"] - window["start_ns"]
    assert sum(ledger["phases_ns"].values()) == elapsed
    assert ledger["device_hours"]["attached"]["value"] == elapsed / 3600e9
    # by another way: every rank's own sums, and what no rank covers
    covered = sum(life.end_ns - life.start_ns for life in lives)
    last = max(life.end_ns for life in lives)
    idle = sum(last - life.end_ns for life in lives)
    by_hand = {"other": world * elapsed - covered - idle, IDLE: idle}
    for life in lives:
        for name, ns in life.phases_ns.items():
            by_hand[name] = by_hand.get(name, 0) + ns
    assert merge(lives, window["start_ns"], window["end_ns"], ["host"]) == apportion(
        by_hand, elapsed
    )
    assert ledger["phases_ns"]["comm_wait"] > 0
    assert ledger["device_hours"]["wasted_by"]["idle_rank"]["value"] * 3600 == pytest.approx(
        idle / world / S, abs=1e-6
    )
    assert idle / S > 0.2  # the last rank ended 0.3 s before the others


def test_a_program_that_says_nothing_is_not_called_waste(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, "cat", "-", said="a\nb")
    assert (code, out) == (0, "a\nb")
    result = result_of(folder_of(tmp_path))
    ledger = result["rows"][0]["ledger"]
    silent = {
        "value": None,
        "provenance": "unavailable",
        "why_missing": "the program reports no phases",
    }
    assert [ledger["device_hours"][name] for name in ("productive", "support", "wasted")] == [
        silent
    ] * 3
    assert ledger["counts"]["goodput"] == silent
    assert (
        ledger["device_hours"]["work"]["value"] == ledger["device_hours"]["attached"]["value"] > 0
    )
    assert "the program reports no phases" in err


def test_a_meter_inside_a_meter_says_where_it_stands(tmp_path: Path) -> None:
    inner = (
        "-m",
        "pipeline",
        "meter",
        "--name",
        "inner",
        "--root",
        str(tmp_path / "inner"),
        "--no-mlflow",
        "--",
    )
    program = (
        "import time, pipeline\nwith pipeline.phase('eval'):"
        " time.sleep(0.05)\npipeline.count(tokens=1)"
    )
    code, _, err = run(tmp_path / "outer", PYTHON, *inner, PYTHON, "-c", program)
    assert code == 0, err
    outside, inside = folder_of(tmp_path / "outer"), folder_of(tmp_path / "inner")
    assert not list((outside / "ranks").iterdir())
    assert ledger_of(outside)["counts"]["tokens"]["value"] is None
    assert ledger_of(inside)["counts"]["tokens"]["value"] == 1
    assert read_events(inside / "journal.jsonl")[0]["tags"] == {"nested_in": outside.name}
    assert ledger_of(inside)["wall_s"]["value"] < ledger_of(outside)["wall_s"]["value"]


# -- programs that do not -------------------------------------------------------------------------


def test_a_crash_passes_its_code_on_and_its_hours_are_lost(tmp_path: Path) -> None:
    code, _, _ = run(tmp_path, PYTHON, PROGRAMS / "crash.py")
    result = result_of(folder_of(tmp_path))
    ledger = result["rows"][0]["ledger"]
    assert (code, result["status"], result["why"]) == (7, "FAILED", "exit code 7")
    hours = {
        name: value["value"]
        for name, value in ledger["device_hours"].items()
        if name != "wasted_by"
    }
    assert hours["attached"] == hours["retry"] == hours["wasted"] > 0 == hours["work"]
    assert list(ledger["device_hours"]["wasted_by"]) == ["failed_attempt"]
    assert (ledger["counts"]["steps_lost"]["value"], ledger["counts"]["tokens"]["value"]) == (
        3,
        None,
    )


@pytest.mark.parametrize("code", [0, 5])
def test_the_exit_code_is_the_command_s_where_nothing_can_be_written(
    tmp_path: Path, code: int
) -> None:
    root = tmp_path / "root"
    found, _, err = run(root, "sh", "-c", f"mv {root} {root}-away; touch {root}; exit {code}")
    assert found == code, err
    assert err.startswith("what it took cannot be written to "), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("code", [0, 5])
def test_the_exit_code_is_the_command_s_where_nobody_reads(tmp_path: Path, code: int) -> None:
    process = start(tmp_path, "sh", "-c", f"read line; exit {code}")
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    process.communicate("go on\n", timeout=60)
    assert process.returncode == code
    assert result_of(folder_of(tmp_path))["status"] == ("FINISHED" if code == 0 else "FAILED")


@pytest.mark.parametrize(("number", "code"), [("TERM", 143), ("KILL", 137), ("SEGV", 139)])
def test_an_end_by_a_signal_is_told_as_shells_do(tmp_path: Path, number: str, code: int) -> None:
    assert run(tmp_path, "sh", "-c", f"kill -{number} $$")[0] == code
    result = result_of(folder_of(tmp_path))
    assert (result["status"], result["why"]) == ("KILLED", f"ended by SIG{number}")
    # the meter saw all of it
    assert result["rows"][0]["ledger"]["conditions"]["truncated"] is False


@pytest.mark.faults
def test_one_that_ignores_sigterm_is_waited_for_and_told_again(tmp_path: Path) -> None:
    process = start(tmp_path, PYTHON, PROGRAMS / "stubborn.py")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in (1, 2, 3):
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == f"no {number}\n"
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    ledger = ledger_of(folder_of(tmp_path))
    assert ledger["phases_ns"]["forward"] > 0
    assert ledger["device_hours"]["work"]["value"] > 0


@pytest.mark.faults
@pytest.mark.parametrize("number", ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2"])
def test_signals_reach_the_command(tmp_path: Path, number: str) -> None:
    """SIGQUIT too: it would end the meter and leave the command to go on unmetered."""
    process = start(
        tmp_path,
        "sh",
        "-c",
        f"trap 'exit 33' {number}; echo ready; for i in $(seq 400); do sleep 0.05; done",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, f"SIG{number}"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 33, err
    assert result_of(folder_of(tmp_path))["status"] == (
        "FAILED" if number.startswith("USR") else "KILLED"
    )


@pytest.mark.faults
def test_kill_after_ends_the_whole_group(tmp_path: Path) -> None:
    shell = f"{PYTHON} {PROGRAMS / 'stubborn.py'} & trap '' TERM; wait"
    process = start(tmp_path, "sh", "-c", shell, options=("--no-mlflow", "--kill-after", "0.2"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)  # returns when nobody holds its output any more
    assert process.returncode == 137
    result = result_of(folder_of(tmp_path))
    assert (result["status"], result["why"]) == ("KILLED", "ended by SIGKILL")
    assert result["environment"]["notes"] == [
        "1 rank ended without a last word: up to 2 s of it are booked as other"
    ]


def test_ctrl_c_on_a_terminal_reaches_the_command_once(tmp_path: Path) -> None:
    # Short sleeps: a signal between Python's look for one and the call that sleeps is seen after
    # the sleep only.
    program = "import time\ntry:\n  print('ready', flush=True)\n  while True: time.sleep(0.05)\n"
    program += (
        "except KeyboardInterrupt:\n  print('caught-it')\n  time.sleep(0.3)\n  print('went-on')\n"
    )
    program += "  raise SystemExit(3)"
    metered = [
        PYTHON,
        "-m",
        "pipeline",
        "meter",
        "--root",
        str(tmp_path),
        "--no-mlflow",
        "--",
        PYTHON,
        "-c",
        program,
    ]
    terminal = f"import pty, os, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn({metered!r})))"
    process = subprocess.Popen(
        [PYTHON, "-c", terminal], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert b"ready" in process.stdout.readline()
    process.stdin.write(b"\x03")
    process.stdin.flush()
    shown = process.communicate(timeout=120)[0]
    assert process.returncode == 3
    assert (shown.count(b"caught-it"), shown.count(b"went-on")) == (1, 1)
    result = result_of(folder_of(tmp_path))
    assert (result["status"], result["why"]) == ("KILLED", "ended with exit code 3 after SIGINT")


def test_nohup_holds_for_the_command_too(tmp_path: Path) -> None:
    program = "import signal; print(signal.getsignal(signal.SIGHUP))"
    ignored = (
        f"trap '' HUP; exec {PYTHON} -m pipeline meter --root {tmp_path} --no-mlflow -- {PYTHON} -c"
        f" '{program}'"
    )
    done = subprocess.run(["sh", "-c", ignored], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr  # SIG_IGN


# -- a meter that is killed -----------------------------------------------------------------------


@pytest.mark.faults
def test_a_killed_meter_loses_at_most_a_heartbeat(root: Path) -> None:
    program = (
        "import time, pipeline\nwith pipeline.phase('forward'):\n  while True: time.sleep(0.05)"
    )
    process = start(root, PYTHON, "-c", program)
    folder = until(lambda: next((root / "runs").glob("*/ranks/*.json"), None)).parent.parent
    journal = folder / "journal.jsonl"
    pid = until(
        lambda: [event["pid"] for event in read_events(journal) if event["e"] == "started"]
    )[0]
    opened = next(event for event in read_events(journal) if event["e"] == "open")
    time.sleep(2.3)  # one flush of the rank
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    try:
        assert recover(root) == []  # the command goes on
    finally:
        os.kill(pid, signal.SIGKILL)
    ended_ns = time.monotonic_ns()
    assert until(lambda: recover(root)) == [folder.name]
    assert recover(root) == []
    result = result_of(folder)
    ledger = result["rows"][0]["ledger"]
    assert (result["status"], result["why"]) == (
        "KILLED",
        "the meter was killed; hours up to its last sign of life",
    )
    assert ledger["conditions"]["truncated"] is True
    lost_s = (ended_ns - opened["start_ns"]) / S - ledger["wall_s"]["value"]
    assert 0 <= lost_s <= 10
    assert ledger["wall_s"]["value"] > 1.5
    assert ledger["device_hours"]["retry"]["value"] == ledger["device_hours"]["attached"]["value"]
    deliver(folder)
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("meter")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {each.info.status for each in runs} == {"KILLED"}
    # then, not now
    assert all(each.info.end_time < time.time() * 1000 - lost_s * 900 for each in runs)


def test_the_next_meter_ends_what_a_killed_one_left_elsewhere_too(tmp_path: Path) -> None:
    run(tmp_path, "true")
    folder = folder_of(tmp_path)
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["e"] in ("run_start", "stage_start", "open")]
    journal = folder / "journal.jsonl"
    for name in ("result.json", "report.md"):
        (folder / name).unlink()
    write = lambda: journal.write_text("".join(json.dumps(line) + "\n" for line in kept))
    kept[0]["node"] = "another-node"
    write()
    # it may be alive there: a shared folder need not share its locks
    assert recover(tmp_path) == []
    for line in kept:
        line["t"] -= 3600
    write()
    run(tmp_path, "true")
    assert result_of(folder)["status"] == "KILLED"


# -- what is refused ------------------------------------------------------------------------------

PRICED = ["--rate", "2", "--rate-source", "list", "--rate-date", "2026-11-23", "--currency", "EUR"]
REFUSED: list[tuple[list[str], int, str]] = [
    ([], 2, "command: is missing; write it after --: python -m pipeline meter -- python train.py"),
    (
        ["python", "train.py"],
        2,
        "python: is no option of the meter; write -- before the command; --help lists the",
    ),
    (["--name"], 2, "--name: has no value; write --name VALUE"),
    (
        ["--name", "a b", "--", "true"],
        1,
        "--name: 'a b' is no name; use letters, digits, and _ . + - in between",
    ),
    (
        ["--rate", "cheap", "--", "true"],
        1,
        "--rate: 'cheap' is no number from 0 up; write --rate 2.5",
    ),
    (["--rate=0", "--", "true"], 1, "--rate: 0.0 is out of range; give a number greater than 0"),
    ([*PRICED[2:], "--", "true"], 1, "--rate: is missing; give the rate, or leave --currency out"),
    (
        ["--rate=2", "--", "true"],
        1,
        "--rate-source: a rate without its source is a guess; say where the rate comes",
    ),
    (
        [*PRICED[:4], "--", "true"],
        1,
        "--rate-date: a rate without its date is a guess; say when the source said so",
    ),
    (
        [*PRICED[:6], "--", "true"],
        1,
        "--currency: a rate without its currency is no price; give its three letters",
    ),
    (
        [*PRICED[:6], "--currency=euro", "--", "true"],
        1,
        "--currency: 'euro' is none; give its three letters, e.g. EUR",
    ),
    (
        ["--kill-after=-1", "--", "true"],
        1,
        "--kill-after: '-1' is no number from 0 up; write --kill-after 2.5",
    ),
    (
        ["--", "no-such-program"],
        127,
        "no-such-program: is no command here; check the name, or PATH",
    ),
    (
        ["--", str(PROGRAMS / "plain.py")],
        126,
        f"{PROGRAMS / 'plain.py'}: is not executable; name its interpreter first",
    ),
    (
        ["--root", "/dev/null/x", "--", "true"],
        1,
        "--root: /dev/null/x cannot be written to (Not a directory); give",
    ),
]


@pytest.mark.parametrize(("argv", "code", "said"), REFUSED)
def test_refusals_are_one_line_and_leave_nothing(
    argv: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv, started_ns=0) == code
    err = capsys.readouterr().err
    assert err.startswith(f"refused: {said}"), err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--root", "--team", "--model-name"])
def test_a_blank_value_is_refused(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([option, " ", "--", "true"], started_ns=0) == 1
    assert (
        capsys.readouterr().err
        == f"refused: {option}: is empty; give a value, or leave {option} out\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_required_owner_is_required_of_a_metered_command_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELINE_REQUIRE_OWNER", "1")
    assert main(["--team", "vision", "--", "true"], started_ns=0) == 1
    said = (
        "refused: --cost-center, --purpose: not given, and every run needs an owner here; give"
        " --cost-center=...\n"
    )
    assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []
    owner = ("--no-mlflow", "--team", "vision", "--cost-center", "4711", "--purpose", "release")
    assert run(tmp_path, "true", options=owner)[0] == 0


def test_what_the_system_cannot_start_leaves_a_failed_run(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    code, _, err = run(tmp_path / "root", script)
    assert (code, err) == (
        127,
        (
            f"refused: {script}: cannot be started (No such file or directory); check its first "
            "line and its format\n"
        ),
    )
    assert result_of(folder_of(tmp_path / "root"))["status"] == "FAILED"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
            "meter: is one of 8 processes that a launcher started here; put",
        ),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
            "meter: is one of 8 tasks on this node; srun --ntasks-per-node=1",
        ),
    ],
)
def test_one_meter_a_node(
    environ: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["--", "true"], started_ns=0) == 1
    assert capsys.readouterr().err.startswith(f"refused: {said}")


def test_secrets_of_the_command_stay_out_of_every_file(tmp_path: Path) -> None:
    secrets = ("--token", "s3cr3t-a", "--hub.api_key=s3cr3t-b", "https://me:s3cr3t-c@host/x")
    code, _, err = run(tmp_path, "true", *secrets)
    assert (code, "s3cr3t" in err) == (0, False)
    files = [path for path in folder_of(tmp_path).rglob("*") if path.is_file()]
    assert not [path for path in files if "s3cr3t" in path.read_text()]
    assert "[redacted]" in (folder_of(tmp_path) / "report.md").read_text()


def test_help_and_recover_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], started_ns=0) == 0
    assert capsys.readouterr().out == HELP + "\n"
    assert main(["--recover", "--root", str(tmp_path)], started_ns=0) == 0
    assert capsys.readouterr().out == "nothing to end\n"


@pytest.mark.parametrize("how", ["setsid", "double fork"])
def test_a_daemon_that_left_its_session_is_mentioned(tmp_path: Path, how: str) -> None:
    """It has no parent left, and a group of its own: what it inherited says whose it is."""
    once = "import os, sys, time\nif os.fork():\n    os._exit(0)\nos.setsid()\n"
    twice = once + "if os.fork():\n    os._exit(0)\n"
    pid_file = tmp_path / "pid"
    daemon = (
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\nos.close(0); os.close(1);"
        " os.close(2)\ntime.sleep(60)\n"
    )
    script = tmp_path / "daemon.py"
    script.write_text(
        "import subprocess, sys, time, os\nsubprocess.run([sys.executable, '-c',"
        f" {(once if how == 'setsid' else twice) + daemon!r}])\nwhile not"
        f" os.path.exists({str(pid_file)!r}) or not open({str(pid_file)!r}).read():"
        " time.sleep(0.05)\n"
    )
    try:
        code, _, err = run(tmp_path / "mlruns", PYTHON, script)
        pid = int(pid_file.read_text())
        assert code == 0, err
        notes = result_of(folder_of(tmp_path / "mlruns"))["environment"]["notes"]
        said = [
            note
            for note in notes
            if note.startswith("processes that the command put into sessions of their own")
        ]
        assert len(said) == 1
        assert f"({pid})" in said[0]
        assert said[0] in (folder_of(tmp_path / "mlruns") / "report.md").read_text().replace(
            "\\", ""
        )
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_what_others_took_stands_on_the_row_of_a_command(tmp_path: Path) -> None:
    assert run(tmp_path, PYTHON, "-c", "import time; time.sleep(0.7)")[0] == 0
    conditions = ledger_of(folder_of(tmp_path))["conditions"]
    load = conditions["work_foreign_load"]
    assert (load["value"] is None) == (load["why_missing"] is not None)
    assert load["value"] is None or 0 <= load["value"] <= 1
    assert conditions["host_foreign_load"] == load
    assert conditions["assess_foreign_load"]["value"] is None
