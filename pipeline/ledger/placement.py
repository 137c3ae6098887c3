"""Where a run stood: node, devices, and what a scheduler granted it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.ledger.devices.table import toolkits
from pipeline.ledger.shapes import Placement, ReportedDevices, Scheduler
from pipeline.ledger.values import Value, declared, null

NOTHING_KNOWN: ReportedDevices = {
    "uuids": [],
    "device_names": [],
    "driver": None,
    "mig": None,
    "exclusive": "unknown",
    "power_limit_w": None,
}
"""What only a device's own library can tell."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a scheduler gave this job.

    Attributes:
        scheduler: Its name.
        job_id: Its number of the job.
        gpus: GPUs of the whole job; None where the scheduler does not say.
    """

    scheduler: str
    job_id: str
    gpus: int | None


def grant(environ: Mapping[str, str] = os.environ) -> Grant | None:
    """Return the scheduler's grant, or None on a bare run.

    Source: sbatch(1), output environment variables: SLURM_GPUS is what `--gpus` asked for the job
    ("8" or "h200:8"), SLURM_GPUS_PER_NODE likewise of each node, SLURM_GPUS_ON_NODE what this node
    has, SLURM_JOB_NUM_NODES how many nodes there are.
    """
    job_id = environ.get("SLURM_JOB_ID")
    if job_id is None:
        return None
    whole, of_each = environ.get("SLURM_GPUS", ""), environ.get("SLURM_GPUS_PER_NODE", "")
    on_node, nodes = environ.get("SLURM_GPUS_ON_NODE", ""), environ.get("SLURM_JOB_NUM_NODES", "1")
    if whole:
        gpus = _asked(whole)
    elif of_each and nodes.isdigit():
        each = _asked(of_each)
        gpus = None if each is None else each * int(nodes)
    else:  # nodes of one job may differ: only a single one is known for sure
        gpus = int(on_node) if on_node.isdigit() and nodes == "1" else None
    return Grant("slurm", job_id, gpus)


def _asked(text: str) -> int | None:
    """Return how many GPUs "8", "h200:8" or "h200:4,a100:2" is; None where it does not say."""
    parts = [part.rpartition(":")[2] for part in text.split(",")]
    return sum(map(int, parts)) if all(part.isdigit() for part in parts) else None


def allocated_hours(attached_h: float, devices: int, granted: Grant | None) -> Value:
    """Return the GPU-hours that a scheduler held for a job while it was attached to `devices` for
    `attached_h`.

    Returns:
        A declared figure (the scheduler states the grant), or null where nobody does.
    """
    if granted is None:
        return null("no scheduler granted this run")
    if granted.gpus is None:
        return null(f"{granted.scheduler} does not say how many GPUs it granted")
    if granted.gpus < devices:  # a job step or another variable: never less than what was used
        return null(f"{granted.scheduler} says {granted.gpus} GPUs where {devices} were used")
    return declared(attached_h / devices * granted.gpus)


def placement(
    device_name: str, devices: int, known: ReportedDevices, granted: Grant | None
) -> Placement:
    """Return the ledger's group `placement`; what could not be read is null.

    Args:
        known: What the device's own library reported (`Reader.placement()`); empty on a CPU run.
    """
    import torch

    scheduler: Scheduler | None = (
        None
        if granted is None
        else {"name": granted.scheduler, "job_id": granted.job_id, "gpus": granted.gpus}
    )
    reported: ReportedDevices = {**NOTHING_KNOWN, "device_names": [device_name] * devices, **known}
    return Placement(
        **reported,
        node=platform.node(),
        count=devices,
        cores=os.cpu_count(),
        scheduler=scheduler,
        torch=torch.__version__,
        **toolkits(),
    )
