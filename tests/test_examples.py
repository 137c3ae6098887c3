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


def code_of(ended: subprocess.Popen[str]) -> int:
    """Return the exit code of a job, once it has ended."""
    ended.communicate(timeout=30)
    return ended.returncode


def stand_in(folder: Path, code: int) -> str:
    """Return a program that ends with `code`, after it was told to stop where that is 75."""
    program = folder / "program"
    waits = "trap 'exit 75' USR1; touch started; for _ in $(seq 600); do sleep 0.05; done"
    program.write_text(f"#!/bin/bash\n{waits if code == 75 else ''}\nexit {code}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_ends_with_the_code_of_its_run(code: int, tmp_path: Path) -> None:
    ended = job("one_gpu.sbatch", tmp_path, "x", python=stand_in(tmp_path, code), tasks=1)
    assert code_of(ended) == code
    assert not (tmp_path / "calls").exists()


def test_a_job_that_is_to_stop_passes_it_on_and_is_requeued(tmp_path: Path) -> None:
    ended = job("one_gpu.sbatch", tmp_path, "x", python=stand_in(tmp_path, 75), tasks=1)
    until = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.05)
    ended.send_signal(signal.SIGTERM)
    assert code_of(ended) == 75
    assert (tmp_path / "calls").read_text().startswith("requeue ")


@pytest.mark.parametrize("code", [0, 75])
def test_ranks_of_a_job_end_with_their_own_code(code: int, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(
        f'#!/bin/bash\n[ "$RANK$WORLD_SIZE$LOCAL_RANK" = 020 ] && exit {code}\nexit 0\n'
    )
    program.chmod(0o755)
    ended = job("many_ranks.sbatch", tmp_path, "x", python=str(program))
    assert code_of(ended) == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["requeue" in each for each in calls] == [False, True][: 1 + (code == 75)]


@pytest.mark.slow
def test_two_tasks_are_two_ranks_of_one_run(tmp_path: Path) -> None:
    ended = job("many_ranks.sbatch", tmp_path, *SMALL)
    output, errors = ended.communicate(timeout=150)
    assert ended.returncode == 0, errors
    assert output.count("baseline: running") == 1
    assert result_of(tmp_path)["status"] == "FINISHED"


def test_a_pod_and_a_spot_machine_take_75_for_no_failure() -> None:
    pod: Any = yaml.safe_load((EXAMPLES / "kubernetes/distill.yaml").read_text())
    [container] = pod["spec"]["template"]["spec"]["containers"]
    rules = {
        rule["action"]: rule.get("onExitCodes") for rule in pod["spec"]["podFailurePolicy"]["rules"]
    }
    assert rules["FailJob"] == {
        "containerName": container["name"],
        "operator": "NotIn",
        "values": [75],
    }
    ignored = [
        rule for rule in pod["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"
    ]
    assert ignored[0]["onExitCodes"]["values"] == [75]
    assert pod["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # the policy asks for it
    task: Any = yaml.safe_load((EXAMPLES / "skypilot/distill.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert "hardware.devices=all" in task["run"]
    assert "hardware.devices=all" in container["command"]
