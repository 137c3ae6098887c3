"""`make slurm`: a run of two ranks on a real Slurm is preempted, queued again and finished, and
what was held for it is what Slurm's accounting says.

    python tests/slurm/prove.py            # root, Debian; ends with 0, 1, or 77 where it cannot run

Slurm's GPUs are fake and the ranks compute on the CPU. What is proven is the job file, exit code
75, the requeue and the booking. `proof.log` beside this file is what a run of it printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import CannotRun, Cluster, install

PROJECT = Path(__file__).resolve().parents[2]
JOB = PROJECT / "examples/slurm/many_ranks.sbatch"
SETTINGS = [
    f"data.path={PROJECT / 'tests/golden/data.jsonl'}",
    *("recipe=distill", "hardware.device=cpu", "precision=fp32", "hardware.num_threads=1"),
    *("training.steps=300", "training.batch_size=4", "training.sequence_length=64"),
    *("stages.teacher.steps=40", "training.checkpoint_every=20", "data.vocabulary_size=300"),
    *("stages.student.allow_weak_teacher=true", "model.shape.hidden_size=64"),
    *("model.shape.heads=1", "model.shape.intermediate_size=128", "model.shape.layers=2"),
    *("quality.bootstrap=200", "quality.max_bytes_per_document=400", "serving.blocks=2"),
    *("serving.load.new=2", "serving.load.prompt=8", "serving.batches=[1]", "tracking=off"),
]
RANKS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--mem=3000"]
NEEDS_S = 1500  # for the whole of it, on two cores that others use as well
CANNOT = 77
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
PROGRAM = """#!/bin/bash
start="${SLURM_RESTART_COUNT:-0}"
place="of $WORLD_SIZE, local $LOCAL_RANK of $LOCAL_WORLD_SIZE, MASTER_ADDR=$MASTER_ADDR"
echo "$start rank $RANK $place $*" >> TOLD
[ "$start" = 1 ] && exit 0
trap 'echo "$start rank $RANK got USR1" >> TOLD; exit 75' USR1
while :; do sleep 0.2; done
"""
failures: list[str] = []
began = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since the beginning."""
    print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)


def check(what: str, holds: bool) -> None:
    """Say whether something holds; one that does not fails the proof."""
    say(f"{'ok    ' if holds else 'FAILED'} {what}")
    if not holds:
        failures.append(what)


def main() -> int:
    """Prove it; return the exit code."""
    try:
        install()
        with tempfile.TemporaryDirectory(prefix="slurm-") as place:
            os.chmod(place, 0o755)  # MariaDB is another user
            return prove(Path(place))
    except CannotRun as why:
        print(f"SKIPPED: {why}")
        return CANNOT


def prove(place: Path) -> int:
    """Start a cluster below `place`, and do all of it there."""
    cluster = Cluster(place / "cluster")
    work = place / "work"
    work.mkdir()
    try:
        cluster.start()
        say(f"{cluster.run('sinfo', '--version').strip()}: two nodes, two GPUs each, accounting")
        job = submit(cluster, work)
        preempt(cluster, work, job)
        ended(cluster, work, job)
        compare(cluster, work, job)
        limited(cluster, work)
        launched(cluster, work)
    except Exception:
        show_logs(place, work)
        raise
    finally:
        cluster.stop()
    if failures:
        show_logs(place, work)
    said = "all of it holds" if not failures else f"FAILED: {'; '.join(failures)}"
    say(said)
    return 1 if failures else 0


def submit(cluster: Cluster, work: Path) -> str:
    """Queue the shipped batch script, as it is, on partition spot; return the job's number."""
    environment = {
        "PIPELINE_DIR": str(work),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(PROJECT),
        "PIPELINE_MASTER": "127.0.0.1",  # both nodes are this machine
        "OMP_NUM_THREADS": "1",
    }
    words = ["sbatch", "--parsable", f"--chdir={work}", "--partition=spot", *RANKS]
    job = cluster.run(*words, str(JOB), *SETTINGS, **environment).strip()
    say(f"sbatch {' '.join(RANKS)} examples/slurm/many_ranks.sbatch recipe=distill ...: job {job}")
    return job


def preempt(cluster: Cluster, work: Path, job: str) -> None:
    """Queue a job of a higher partition once the student is being trained."""

    def trains() -> bool:
        events = [] if not journals(work) else journal(work)
        return any(event["e"] == "checkpoint" and event["arm"] == "student" for event in events)

    until("the student has a checkpoint", lambda: trains() or state(cluster, job) in OVER)
    check(f"job {job} runs, and its student has a checkpoint", trains())
    words = ["--partition=reserved", "--nodes=2", "--gpus-per-node=2", "--mem=100"]
    other = cluster.run(
        "sbatch", "--parsable", *words, "--output=/dev/null", "--wrap=sleep 3"
    ).strip()
    say(f"job {other} of partition reserved wants all GPUs")
    until("the other job ends", lambda: state(cluster, other) == "COMPLETED")
    starts = cluster.run("scontrol", "show", "job", job)
    check(f"job {job} was queued again, once", "Restarts=1" in starts)


def ended(cluster: Cluster, work: Path, job: str) -> None:
    """Wait for the job, and look at how it ended."""
    until("the job ends", lambda: state(cluster, job) in OVER)
    check(f"job {job} is {state(cluster, job)}", state(cluster, job) == "COMPLETED")
    ends = [event for event in journal(work) if event["e"] == "run_end"]
    check(
        f"attempts ended {[each['status'] for each in ends]}",
        [each["status"] for each in ends] == ["KILLED", "FINISHED"],
    )
    check(
        "the second resumed the student from its checkpoint",
        any(event["e"] == "resume" and event["attempt"] == 2 for event in journal(work)),
    )


def compare(cluster: Cluster, work: Path, job: str) -> None:
    """Compare what the run says was held for it with accounting, by a query of its own."""
    words = ("sacct", "-j", job, "--duplicates", "-X", "--noheader", "--parsable2")
    table = cluster.run(*words, "--format=JobID,State,Elapsed,AllocTRES")
    for line in table.splitlines():
        say(f"sacct: {line}")
    rows = [line.split("|") for line in table.splitlines()]
    elapsed = [seconds(row[2]) for row in rows]
    gpus = [int(row[3].partition("gres/gpu=")[2].partition(",")[0]) for row in rows]

    first = rows[0][1]
    check(f"its first start ended as {first}: its ranks did within the grace", first == "REQUEUED")
    before = allocated(work)
    say(f"result.json as the run ended: {before['gpu_hours']}")
    check("it said so as an estimate", before["gpu_hours"]["provenance"] == "estimated")
    synced = pipeline(cluster, work, "sync")
    say(f"python -m pipeline sync: {synced.stdout.splitlines()[0]}")
    after = allocated(work)
    say(f"result.json after it: {after['gpu_hours']}")
    found = [grant["elapsed_s"] * grant["gpus"] for grant in after["grants"]]
    held = [s * n for s, n in zip(elapsed, gpus, strict=True)]
    check(
        f"allocated by attempt {found} GPU-s, sacct {held}",
        len(found) == len(held) and all(abs(a - b) <= 1 for a, b in zip(found, held, strict=True)),
    )
    total_s = 3600 * after["gpu_hours"]["value"]
    check(f"allocated in all {total_s:.1f} GPU-s", abs(total_s - sum(held)) <= len(held))
    taken = attached(work)
    check(
        f"attached by attempt {[round(each, 1) for each in taken]} device-s, never more",
        len(taken) == len(held) and all(a <= b for a, b in zip(taken, held, strict=True)),
    )
    result = json.loads(results(work)[0].read_text())
    total_h = result["run"]["device_hours"]["total"]["value"]
    check(
        f"attached in result.json {3600 * total_h:.1f} device-s",
        abs(3600 * total_h - sum(taken)) < 2 and total_h <= after["gpu_hours"]["value"],
    )
    notes = [note for note in result["environment"]["notes"] if note.startswith("job ")]
    say(f"notes: {notes}")


def limited(cluster: Cluster, work: Path) -> None:
    """Have a time limit come up, with a program in place of Python that says what it is told."""
    program, told = work / "program", work / "told"
    program.write_text(PROGRAM.replace("TOLD", str(told)))
    program.chmod(0o755)
    own = {"PIPELINE_DIR": str(work), "PYTHON": str(program)}
    limits = ["--time=1", "--signal=USR1@55"]
    words = ["sbatch", "--parsable", f"--chdir={work}", *RANKS, *limits, str(JOB)]
    job = cluster.run(*words, **own).strip()
    say(f"job {job} of one minute, USR1 55 s before it is over")
    until("it ends", lambda: state(cluster, job) in OVER)
    lines = sorted(told.read_text().splitlines())
    for line in lines:
        say(f"told: {line}")
    check(f"job {job} is {state(cluster, job)}", state(cluster, job) == "COMPLETED")
    master = "MASTER_ADDR=n1 -m pipeline recipe=distill parallel.mode=fsdp"
    ranks = [f"{start} rank {rank} of 2, local 0 of 1, {master}" for start in "01" for rank in "01"]
    stopped = [f"0 rank {rank} got USR1" for rank in "01"]
    check("both ranks got USR1, and came again", lines == sorted([*ranks, *stopped]))


def launched(cluster: Cluster, work: Path) -> None:
    """Hand a job that `launch` writes to the real sbatch, and see what Slurm understood."""
    words = ["launch", "slurm", "recipe=baseline", "hosts=2", "hardware.devices=2", "cpus=1"]
    words += ["memory=1", "budget.wall_seconds=7200", "profile=spot", "partition=spot"]
    done = pipeline(cluster, work, *words, "submit=true", "name=asked")
    say(f"launch slurm ... submit=true: {' '.join(done.stdout.split())}")
    job = done.stdout.split()[-1]
    told = cluster.run("scontrol", "show", "job", job)
    cluster.run("scancel", job)
    for asked in (
        *("JobName=asked", "Partition=spot", "NumNodes=2", "NumTasks=4", "TimeLimit=02:01:00"),
        *("Requeue=1", "MinMemoryNode=1G", "TresPerNode=gres:gpu:2"),
    ):
        check(f"Slurm understood {asked}", asked in told)


# -- looking ---------------------------------------------------------------------------------------


def until(what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    while not holds():
        if time.monotonic() - began > NEEDS_S:
            raise RuntimeError(f"{what}: not within {NEEDS_S} s")
        time.sleep(0.3)


def state(cluster: Cluster, job: str) -> str:
    """Return a job's state, as the controller has it."""
    told = cluster.run("scontrol", "show", "job", job)
    return told.partition("JobState=")[2].split()[0]


def pipeline(cluster: Cluster, work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the package in the run's folder, outside of any job."""
    own = {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "pipeline", *words]
    done = subprocess.run(
        command, cwd=work, env={**cluster.environment, **own}, capture_output=True, text=True
    )
    check(f"python -m pipeline {words[0]} ended with {done.returncode}", done.returncode == 0)
    return done


def journals(work: Path) -> list[Path]:
    """Return the journals there are: one, where two attempts are one run."""
    return list(work.glob("mlruns/runs/*/journal.jsonl"))


def journal(work: Path) -> list[dict[str, Any]]:
    """Return the run's events; a line that is being written is left out."""
    [path] = journals(work)
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def results(work: Path) -> list[Path]:
    """Return the results there are."""
    return list(work.glob("mlruns/runs/*/result.json"))


def allocated(work: Path) -> dict[str, Any]:
    """Return what the result says that was held."""
    [path] = results(work)
    return json.loads(path.read_text())["run"]["allocated"]


def attached(work: Path) -> list[float]:
    """Return the device-seconds of each attempt, from its journal's own lines."""
    spans: list[list[int]] = []
    for event in journal(work):
        if event["e"] == "run_start":
            spans.append([event["started_ns"], event["mono_ns"], event["devices"]])
        spans[-1][1] = max(spans[-1][1], event["mono_ns"])
    return [(last - first) * devices / 1e9 for first, last, devices in spans]


def seconds(text: str) -> int:
    """Return [days-]hours:minutes:seconds as seconds."""
    days, _, clock = text.rpartition("-")
    hours, minutes, rest = map(int, clock.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest


def show_logs(place: Path, work: Path) -> None:
    """Print the ends of all logs."""
    for log in sorted([*work.glob("*.out"), *place.glob("cluster/log/*")]):
        print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]))


if __name__ == "__main__":
    sys.exit(main())
