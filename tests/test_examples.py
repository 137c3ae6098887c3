"""The files of `examples/`: what schedulers are handed does what it says, with stand-ins for their
commands.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks_here import PROJECT, free_port
from test_several_ranks import SMALL, result_of

from pipeline.launch.job import Job, Options
from pipeline.launch.needs import Needs
from pipeline.launch.skypilot import text as skypilot_text

EXAMPLES = PROJECT / "examples"
SRUN = """#!/bin/bash
# a task each, as Slurm starts them; the worst exit code is its own
[ "$1" = --kill-on-bad-exit=0 ] && shift
codes=0
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
for task in $(jobs -p); do wait "$task" || { code=$?; [ $code -gt $codes ] && codes=$code; }; done
exit $codes
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$CALLS"
if [ "$1" = show ]; then echo 127.0.0.1; else exit 1; fi  # what follows a requeue is slept through
"""


def job(
    script: str, folder: Path, *args: str, python: str | None = None, tasks: int = 2
) -> subprocess.Popen[str]:
    """Start a batch script with stand-ins for Slurm's commands."""
    commands = folder / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    outside = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    }
    environment = {
        **outside,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": python or sys.executable,
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "CALLS": str(folder / "calls"),
        "PIPELINE_DIR": str(folder),
        "SLURM_JOB_ID": str(free_port() - 20000),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NNODES": "1",
    }
    return subprocess.Popen(
        ["bash", str(EXAMPLES / "slurm" / script), *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def code_of(ended: subprocess.Popen[str], within_s: float = 30) -> int:
    """Return the exit code of a job, once it has ended."""
    ended.communicate(timeout=within_s)
    return ended.returncode


def program(folder: Path, text: str) -> str:
    """Return a program that stands for Python."""
    path = folder / "program"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def requeued(folder: Path) -> list[bool]:
    """Return of each call of scontrol whether it was to queue the job again."""
    return ["requeue" in call for call in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("code", [0, 3, 75])
def test_a_job_ends_with_the_code_of_its_run(code: int, tmp_path: Path) -> None:
    own = program(tmp_path, f"exit {code}")
    assert code_of(job("one_gpu.sbatch", tmp_path, "x", python=own, tasks=1)) == code
    assert requeued(tmp_path) == [False, True][: 1 + (code == 75)]


@pytest.mark.parametrize("code", [0, 75])
def test_ranks_of_a_job_end_with_their_own_code(code: int, tmp_path: Path) -> None:
    own = program(tmp_path, f'[ "$RANK$WORLD_SIZE$LOCAL_RANK" = 020 ] && exit {code}\nexit 0')
    assert code_of(job("many_ranks.sbatch", tmp_path, "x", python=own)) == code
    assert requeued(tmp_path) == [False, True][: 1 + (code == 75)]


@pytest.mark.parametrize("given", [["recipe=baseline", "seed=1"], []])
def test_settings_behind_the_name_take_the_place_of_those_in_the_file(
    given: list[str], tmp_path: Path
) -> None:
    own = program(tmp_path, 'printf "%s\\n" "$@" > "$PIPELINE_DIR/given"')
    assert code_of(job("many_ranks.sbatch", tmp_path, *given, python=own)) == 0
    wanted = given or ["recipe=distill", "parallel.mode=fsdp"]
    assert (tmp_path / "given").read_text().splitlines() == ["-m", "pipeline", *wanted]


@pytest.mark.slow
def test_two_tasks_are_two_ranks_of_one_run(tmp_path: Path) -> None:
    ended = job("many_ranks.sbatch", tmp_path, *SMALL)
    output, errors = ended.communicate(timeout=150)
    assert ended.returncode == 0, errors
    assert output.count("baseline: running") == 1
    assert result_of(tmp_path)["status"] == "FINISHED"


@pytest.mark.distributed
def test_two_hosts_stop_where_one_is_told_to_and_go_on(tmp_path: Path) -> None:
    """Both as SkyPilot starts them, each with one rank, on this machine."""
    script = shell_of_two_hosts(tmp_path)
    first = two_hosts(script, tmp_path)
    until = time.monotonic() + 300
    while not has_checkpoint(tmp_path) and time.monotonic() < until:
        time.sleep(0.2)
    first[1].send_signal(signal.SIGTERM)
    assert [code_of(host, within_s=120) for host in first] == [75, 75]
    assert [code_of(host, within_s=300) for host in two_hosts(script, tmp_path)] == [0, 0]
    result = result_of(tmp_path)
    assert (result["status"], result["run"]["attempts"]) == ("FINISHED", 2)


def shell_of_two_hosts(folder: Path) -> str:
    """Return what each of two hosts runs, with a store and a port of this test's own."""
    settings = (*SMALL, "training.steps=60", "training.checkpoint_every=4", "precision=fp32")
    needs = Needs(devices=1, hosts=2, on_gpu=False)
    made = Job(name="two", settings=settings, needs=needs, options=Options(volume="v"))
    run: str = yaml.safe_load(skypilot_text(made))["run"]
    (folder / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    own = run.replace("/store/", f"{folder}/").replace("29500", str(free_port()))
    assert own.count(str(folder)) == 1
    return own


def two_hosts(script: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Start two hosts."""
    environment = {
        **{name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ},
        "PATH": f"{folder}:/usr/bin:/bin",
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
    }
    return [
        subprocess.Popen(
            ["bash", "-c", script],
            env={**environment, "SKYPILOT_NODE_RANK": str(host)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in (0, 1)
    ]


def has_checkpoint(folder: Path) -> bool:
    """Tell whether the run has left one."""
    journals = folder.glob("mlruns/runs/*/journal.jsonl")
    return any('"e": "checkpoint"' in journal.read_text() for journal in journals)


def test_a_pod_and_a_spot_machine_take_75_for_no_failure() -> None:
    pod: Any = yaml.safe_load((EXAMPLES / "kubernetes/distill.yaml").read_text())
    several: Any = yaml.safe_load((EXAMPLES / "kubernetes/two_hosts.yaml").read_text())
    [ranks] = several["spec"]["replicatedJobs"]
    for spec in (pod["spec"], ranks["template"]["spec"]):
        [container] = spec["template"]["spec"]["containers"]
        own = {"containerName": container["name"], "values": [75]}
        rules = spec["podFailurePolicy"]["rules"]
        assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailJob"]
        assert rules[0]["onExitCodes"] == {**own, "operator": "In"}
        assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert rules[2]["onExitCodes"] == {**own, "operator": "NotIn"}
        assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the policy asks for it
    for name in ("distill", "two_hosts"):
        task: Any = yaml.safe_load((EXAMPLES / f"skypilot/{name}.yaml").read_text())
        assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
        assert task["resources"]["use_spot"] is True
