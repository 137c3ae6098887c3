"""Ranks on two hosts, and what becomes of a run when a rank, a host or the link between them goes.

`make distributed` runs this. It takes minutes and needs root, for network namespaces.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from ranks_here import PROJECT
from two_hosts import TwoHosts, ended, two_hosts, until, why_not

from pipeline.ledger.journal import read_events

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
SMALL = [
    *("-m", "pipeline", "hardware.device=cpu", "hardware.num_threads=1", "precision=fp32"),
    *("model.shape.hidden_size=64", "model.shape.heads=1", "model.shape.intermediate_size=128"),
    *("model.shape.layers=2", "training.batch_size=4", "training.sequence_length=32"),
    *("data.max_documents=40", "quality.max_documents=20", "quality.bootstrap=200"),
    *("tracking.charts=false", "tracking.mlflow=false"),
    *("serving.blocks=4", "serving.batches=[1]"),
    *("serving.load.prompt=16", "serving.load.new=2", "serving.load.batch=1"),
]
SECONDS = 40  # what ranks have to answer
LONG = [
    *(*SMALL, "recipe=baseline", "training.steps=200", "training.checkpoint_every=10"),
    *("training.eval_every=200", f"parallel.timeout_seconds={SECONDS}"),
]
CHECKPOINT = "mlruns/store/checkpoints/*/step-*/manifest.json"


@pytest.fixture
def hosts() -> Generator[TwoHosts]:
    why = why_not()
    if why is not None:
        pytest.skip(why)
    with two_hosts() as found:
        yield found


def run_of(root: Path) -> Path:
    """Return the folder of the one run that there is."""
    [folder] = (root / "mlruns/runs").glob("*/")
    return folder


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def hours(result: dict[str, Any]) -> float:
    total: float = result["run"]["device_hours"]["total"]["value"]
    return total


# -- without faults --------------------------------------------------------------------------------


def test_hsdp_over_two_hosts_trains_what_one_process_does(hosts: TwoHosts, tmp_path: Path) -> None:
    """Two ranks a host share the weights; hosts average. The test of four ranks, on real hosts."""
    command = [str(PROJECT / "tests/programs/ranks.py"), str(tmp_path / "found"), "hsdp, taught"]
    for process in hosts.start(command, tmp_path, size=4):
        code, output, errors = ended(process)
        assert code == 0, output + errors
    found = read(tmp_path / "found")["hsdp, taught"]
    assert found["apart"] < 1e-4
    assert found["only_first_is_whole"]


@pytest.mark.parametrize(
    ("recipe", "mode", "size"), [("baseline", "hsdp", 4), ("distill", "fsdp", 2)]
)
def test_a_recipe_over_two_hosts_is_booked_on_both(
    recipe: str, mode: str, size: int, hosts: TwoHosts, tmp_path: Path
) -> None:
    steps = ["training.steps=6", f"recipe={recipe}", f"parallel.mode={mode}"]
    if recipe == "distill":
        steps += ["stages.teacher.steps=4", "stages.student.allow_weak_teacher=true"]
    begun = time.monotonic()
    processes = hosts.start([*SMALL, *steps], tmp_path, size=size)
    found = [ended(process) for process in processes]
    elapsed_h = (time.monotonic() - begun) / 3600
    assert [code for code, _, _ in found] == [0] * size, found
    assert [output + errors for _, output, errors in found[1:]] == [""] * (size - 1)
    result = read(run_of(tmp_path) / "result.json")
    assert result["status"] == "FINISHED"
    assert result["device"]["count"] == 2  # each a host
    assert all(row["status"] == "FINISHED" for row in result["rows"])
    assert 0 < hours(result) <= 2 * elapsed_h


# -- faults ----------------------------------------------------------------------------------------


def begin(hosts: TwoHosts, root: Path) -> list[subprocess.Popen[str]]:
    """Start a run by a rank on each host; return them once there is a checkpoint."""
    processes = hosts.start(LONG, root)
    until(root, CHECKPOINT, processes[0])
    return processes


def goes_on(hosts: TwoHosts, root: Path, elapsed_s: float, status: str) -> None:
    """Check that the same command goes on, and that nothing is lost or charged twice.

    Args:
        elapsed_s: That the first attempt lasted, by another clock.
        status: Of its row.
    """
    folder = run_of(root)
    seen = [event["mono_ns"] for event in read_events(folder / "journal.jsonl")]
    lived_s = (seen[-1] - seen[0]) / 1e9
    begun = time.monotonic()
    found = [ended(process) for process in hosts.start(LONG, root)]
    assert [code for code, _, _ in found] == [0, 0], found
    assert "resuming from step" in found[0][1]
    elapsed_s += time.monotonic() - begun
    result = read(folder / "result.json")
    assert result["status"] == "FINISHED"
    assert run_of(root) == folder
    assert read(folder / "run.json")["attempt"] == 2
    first, last = result["rows"]
    assert (first["status"], last["status"]) == (status, "FINISHED")
    assert (first["attempt"], last["attempt"]) == (1, 2)
    parts = result["run"]["device_hours"]
    names = ("work", "assess", "retry", "compare", "overhead")
    assert sum(parts[name]["value"] for name in names) == pytest.approx(hours(result))
    # two hosts, and no second of either that did not pass; none of the first attempt is missing
    assert hours(result) * 3600 <= 2 * elapsed_s
    assert hours(result) * 3600 >= 2 * lived_s
    assert lived_s > 0


@pytest.mark.parametrize(
    ("rank", "number"),
    [(0, signal.SIGTERM), (0, signal.SIGUSR1), (1, signal.SIGTERM), (1, signal.SIGUSR1)],
)
def test_a_signal_at_any_rank_ends_all_with_75(
    rank: int, number: signal.Signals, hosts: TwoHosts, tmp_path: Path
) -> None:
    begun = time.monotonic()
    processes = begin(hosts, tmp_path)
    processes[rank].send_signal(number)
    found = [ended(process) for process in processes]
    assert [code for code, _, _ in found] == [75, 75], found
    assert len(found[0][2].splitlines()) == 1
    assert read(run_of(tmp_path) / "run.json")["status"] == "KILLED"
    goes_on(hosts, tmp_path, time.monotonic() - begun, "KILLED")


def test_a_rank_that_is_killed_ends_all(hosts: TwoHosts, tmp_path: Path) -> None:
    begun = time.monotonic()
    processes = begin(hosts, tmp_path)
    processes[1].kill()
    code, _, errors = ended(processes[0])
    assert code == 1
    assert "a rank does not answer any more" in errors
    assert len(errors.splitlines()) == 1
    folder = run_of(tmp_path)
    assert read(folder / "run.json")["status"] == read(folder / "result.json")["status"] == "FAILED"
    goes_on(hosts, tmp_path, time.monotonic() - begun, "FAILED")


def test_the_first_rank_that_is_killed_ends_all(hosts: TwoHosts, tmp_path: Path) -> None:
    """Nobody can write a result: the next attempt reads the hours from the journal."""
    begun = time.monotonic()
    processes = begin(hosts, tmp_path)
    processes[0].kill()
    code, output, errors = ended(processes[1])
    assert (code, output, errors) == (1, "", "")
    assert read(run_of(tmp_path) / "run.json")["status"] == "RUNNING"
    goes_on(hosts, tmp_path, time.monotonic() - begun, "KILLED")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_all_in_time(rank: int, hosts: TwoHosts, tmp_path: Path) -> None:
    begun = time.monotonic()
    processes = begin(hosts, tmp_path)
    processes[rank].send_signal(signal.SIGSTOP)
    assert ended(processes[1 - rank])[0] == 1
    processes[rank].send_signal(signal.SIGCONT)  # it finds that it was left alone
    assert ended(processes[rank])[0] == 1
    folder = run_of(tmp_path)
    assert read(folder / "run.json")["status"] == read(folder / "result.json")["status"] == "FAILED"
    goes_on(hosts, tmp_path, time.monotonic() - begun, "FAILED")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_is_gone_ends_all_in_time(lost: int, hosts: TwoHosts, tmp_path: Path) -> None:
    """Its network goes first: nobody is told that its processes ended."""
    begun = time.monotonic()
    processes = begin(hosts, tmp_path)
    hosts.cut()
    processes[lost].kill()
    assert ended(processes[1 - lost])[0] == 1
    status = read(run_of(tmp_path) / "run.json")["status"]
    assert status == ("FAILED" if lost else "RUNNING")
    hosts.mend()
    goes_on(hosts, tmp_path, time.monotonic() - begun, "FAILED" if lost else "KILLED")


def test_a_partition_ends_both_sides_in_time(hosts: TwoHosts, tmp_path: Path) -> None:
    begun = time.monotonic()
    processes = begin(hosts, tmp_path)
    hosts.cut()
    found = [ended(process) for process in processes]
    assert [code for code, _, _ in found] == [1, 1], found
    assert len(found[0][2].splitlines()) == 1
    folder = run_of(tmp_path)
    assert read(folder / "run.json")["status"] == read(folder / "result.json")["status"] == "FAILED"
    hosts.mend()
    goes_on(hosts, tmp_path, time.monotonic() - begun, "FAILED")


# -- bad input -------------------------------------------------------------------------------------


def test_a_folder_that_not_all_hosts_see_is_refused(hosts: TwoHosts, tmp_path: Path) -> None:
    folders = [tmp_path / letter for letter in "ab"]
    for folder in folders:
        folder.mkdir()
    found = [ended(process) for process in hosts.start(LONG, folders)]
    assert [code for code, _, _ in found] == [1, 1]
    a, b = (hosts.host(rank, 2) for rank in range(2))
    assert found[0][2] == (
        f"refused: tracking.root: what rank 0 on {a} writes to {folders[0]}/mlruns, rank 1 on {b}"
        " cannot see; give a folder that all hosts share\n"
    )
    assert found[1][1:] == ("", "")
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_host_without_rank_0_says_so(hosts: TwoHosts, tmp_path: Path) -> None:
    """It never came; who would speak for all is not there."""
    command = [*LONG, "parallel.rendezvous_seconds=5"]
    [process] = hosts.start(command, tmp_path, only=[1])
    code, output, errors = ended(process)
    assert (code, output) == (1, "")
    assert errors.startswith("refused: MASTER_ADDR: rank 0 does not answer at 10.77.0.1:")
    assert len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_hosts_that_see_no_network_between_them_say_so(hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.cut()
    command = [*LONG, "parallel.rendezvous_seconds=5"]
    found = [ended(process) for process in hosts.start(command, tmp_path)]
    assert [code for code, _, _ in found] == [1, 1]
    assert "rank 1 did not come within 5 s" in found[0][2]
    assert "rank 0 does not answer at" in found[1][2]
    assert [len(errors.splitlines()) for _, _, errors in found] == [1, 1]
    assert list(tmp_path.iterdir()) == []
