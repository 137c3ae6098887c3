"""Slurm: a batch script, one task a rank, requeued where the run ends with 75.

A task a rank, because srun hands signals to every rank and gives back their own exit code.
Source: sbatch(1), srun(1), scontrol(1) of Slurm 22.05.
"""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.launch.job import Job, Profile, check_name, shell_words
from pipeline.launch.needs import START_S

NAME = r"[A-Za-z0-9][\w.-]*"
TAKES = ("partition", "qos", "account", "gpu")
NOTICE_S = 120  # between Slurm's signal and its time limit

TEXT = """\
#!/bin/bash
# {what}, one task a rank. Written by
#   {command}
# Queue it in the project's folder, which all nodes must see:
#   sbatch {file}
# Settings behind its name take the place of all that stand below, recipe and parallel.mode too.
# Slurm sends USR1 {notice} s before a time limit, and TERM where it takes nodes back: the run stops
# with a checkpoint and 75, is queued again, and goes on.
#SBATCH --job-name={name} --requeue --open-mode=append --output=%x-%j.out
#SBATCH --nodes={hosts} --ntasks-per-node={devices}{gpus} --signal=USR1@{notice}
{lines}
set -u
cd "${{PIPELINE_DIR:-$SLURM_SUBMIT_DIR}}" || exit 1
[ $# -gt 0 ] || set -- {settings}
MASTER_ADDR=${{PIPELINE_MASTER:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)}}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
# shellcheck disable=SC2016  # each task expands its own
srun --kill-on-bad-exit=0 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  exec "$@"' _ "${{PYTHON:-python}}" -m pipeline "$@"
code=$?
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
"""


def check(job: Job) -> None:
    """Refuse what Slurm cannot be asked for.

    Raises:
        UserError: Naming the setting.
    """
    options = job.options
    for key in TAKES:
        check_name(key, getattr(options, key), NAME, f"{key} of Slurm's")
    if options.gpu is not None and not job.needs.on_gpu:
        raise UserError("gpu", "has no effect with hardware.device=cpu", "leave it out")
    if job.profile is Profile.spot and options.partition is None and options.qos is None:
        problem = "Slurm does not say which of its partitions can be preempted"
        raise UserError("profile", problem, "give partition=NAME or qos=NAME, or profile=reserved")


def text(job: Job) -> str:
    """Return the batch script."""
    needs = job.needs
    kind = "" if job.options.gpu is None else f"{job.options.gpu}:"
    return TEXT.format(
        what=job.what,
        command=job.command,
        file=job.file,
        notice=NOTICE_S,
        name=job.name,
        hosts=needs.hosts,
        devices=needs.devices,
        gpus=f" --gpus-per-node={kind}{needs.devices}" if needs.on_gpu else "",
        lines="\n".join(_lines(job)),
        settings=shell_words(job.settings),
    )


def client(file: str) -> list[str]:
    """Return the command that queues the file."""
    return ["sbatch", file]


def _lines(job: Job) -> list[str]:
    needs, options = job.needs, job.options
    named = {key: getattr(options, key) for key in ("partition", "qos", "account")}
    given = [f"--{key}={value}" for key, value in named.items() if value is not None]
    if needs.cpus is not None:
        given.append(f"--cpus-per-task={needs.cpus}")
    if needs.memory_gib is not None:
        given.append(f"--mem={needs.memory_gib}G")
    if needs.wall_seconds is not None:
        given.append(f"--time={_limit(needs.wall_seconds)}")
    unsaid = [
        *(["# no --cpus-per-task: cpus=N says it"] if needs.cpus is None else []),
        *(["# no --mem: memory=GIB says it"] if needs.memory_gib is None else []),
        *(["# no --time: budget.wall_seconds=S says it"] if needs.wall_seconds is None else []),
    ]
    return [*([f"#SBATCH {' '.join(given)}"] if given else []), *unsaid]


def _limit(wall_seconds: float) -> str:
    """Return a time limit in whole minutes, as Slurm counts it: never before the run's own."""
    minutes = -(-int(wall_seconds + START_S) // 60)
    return f"{minutes // 60}:{minutes % 60:02}:00"
