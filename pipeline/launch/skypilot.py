"""SkyPilot: a managed job, started again elsewhere where a machine is taken away or at 75.

Source: https://docs.skypilot.co/en/latest/reference/yaml-spec.html, SkyPilot 0.14.1.
"""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.launch.job import (
    STORE,
    Job,
    Profile,
    check_name,
    check_root,
    ranks_of_host,
    require,
    shell_words,
    yaml_text,
)

TAKES = ("gpu", "bucket", "volume")
NAME = r"[A-Za-z0-9][\w.-]*"

TEXT = """\
# {what}. Written by
#   {command}
# Start it in the project's folder, which is copied to the machine: sky jobs launch {file}
# Where a machine is taken away, or the run ends with 75, the job starts again elsewhere and goes on
# from its checkpoints in the store.
name: {name}
num_nodes: {hosts}
resources:
{resources}
  job_recovery:
    strategy: EAGER_NEXT_REGION
    max_restarts_on_errors: 0
    recover_on_exit_codes: [75]
workdir: .
{store}
setup: pip install -e .
run: |
{run}"""
BUCKET = """\
file_mounts:
  /store:
    name: {name}
    mode: MOUNT_CACHED  # a journal is appended to, which MOUNT cannot do
"""
VOLUME = """\
volumes:
  /store: {name}  # one that several hosts can write to
"""
OF_HOST = """\
HOST_RANK=$SKYPILOT_NODE_RANK
MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n1)
"""


def check(job: Job) -> None:
    """Refuse what SkyPilot cannot be asked for.

    Raises:
        UserError: Naming the setting.
    """
    needs, options = job.needs, job.options
    check_root(job)
    if needs.wall_seconds is not None:
        problem = "SkyPilot gives jobs no time limit, and would start one that ends with 75 again"
        raise UserError("budget.wall_seconds", problem, "leave it out")
    if needs.on_gpu:
        why = "SkyPilot asks for GPUs by their model"
        require("gpu", options.gpu, why, "give gpu=H100; sky show-gpus lists them")
    elif options.gpu is not None:
        raise UserError("gpu", "has no effect with hardware.device=cpu", "leave it out")
    for key in TAKES:
        check_name(key, getattr(options, key), NAME, f"{key} of SkyPilot's")
    if needs.hosts > 1:
        why = "the hosts need one store that all can write to"
        require("volume", options.volume, why, "give volume=NAME; sky volumes ls lists them")
        if options.bucket is not None:
            problem = "each host would have a copy of its own of what is written there"
            raise UserError("bucket", problem, "give volume=NAME in its place")
    elif (options.bucket is None) == (options.volume is None):
        problem = "a machine that is taken away must leave its checkpoints somewhere"
        raise UserError("bucket", problem, "give bucket=NAME or volume=NAME, one of them")


def text(job: Job) -> str:
    """Return the task."""
    volume = job.options.volume
    store = VOLUME if volume is not None else BUCKET
    lines = _run(job).splitlines(keepends=True)
    return TEXT.format(
        what=job.what,
        command=job.command,
        file=job.file,
        name=yaml_text(job.name),
        hosts=job.needs.hosts,
        resources="\n".join(f"  {line}" for line in _resources(job)),
        store=store.format(name=yaml_text(volume or job.options.bucket or "")).rstrip("\n"),
        run="".join(f"  {line}" for line in lines),
    )


def client(file: str) -> list[str]:
    """Return the command that hands the file to SkyPilot."""
    return ["sky", "jobs", "launch", "--yes", file]


def _resources(job: Job) -> list[str]:
    needs = job.needs
    spot = "true" if job.profile is Profile.spot else "false"
    return [
        *([f"accelerators: {job.options.gpu}:{needs.devices}"] if needs.on_gpu else []),
        f"use_spot: {spot}",
        (
            "# no cpus: cpus=N says it"
            if needs.cpus is None
            else f"cpus: {needs.cpus * needs.devices}+"
        ),
        (
            "# no memory: memory=GIB says it"
            if needs.memory_gib is None
            else f"memory: {needs.memory_gib}+"
        ),
    ]


def _run(job: Job) -> str:
    settings = (*job.settings, f"tracking.root={STORE}")
    if job.needs.hosts == 1:
        words = (*settings, f"hardware.devices={job.needs.devices}")
        return f"python -m pipeline {shell_words(words)}\n"
    return OF_HOST + ranks_of_host(job, shell_words(settings))
