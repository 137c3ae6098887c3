"""Ranks on this host: `hardware.devices=N` starts N of them through torch's own agent, each with
the same command.

The agent passes signals on, ends the others when one fails, and says how each ended. What the first
rank ends with is the command's exit code: 75 stays 75.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence

from pipeline.config.settings.hardware import ALL
from pipeline.config.settings.run import Run
from pipeline.errors import Exit, UserError
from pipeline.training.ranks import place_in

STARTED = "PIPELINE_STARTED_NS"  # when the command began: its start is part of the run
_said_to: list[int] = []  # standard error of a rank that is silent
ENDED_WITHIN_S = 120  # what a rank has for its checkpoint once it is told to end
# which the agent passes on; at Ctrl-C, which reaches this process alone, it ends ranks by SIGTERM
SIGNALS = "SIGTERM,SIGUSR1,SIGUSR2"


def is_silent(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is a rank, or a task, of which another one speaks."""
    rank = environment.get("RANK") or environment.get("SLURM_PROCID") or "0"
    size = environment.get("WORLD_SIZE") or ""
    if rank.isdecimal() and size.isdecimal() and int(rank) >= int(size):
        return False  # no rank that there is
    return rank.isdecimal() and int(rank) > 0


def fall_silent() -> None:
    """Say nothing from here on: another process speaks."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    _said_to.append(os.dup(sys.stderr.fileno()))
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def speak() -> None:
    """Say errors again: the first of each host does, where the one that speaks for all is not
    there.
    """
    place = place_in()
    if _said_to and place is not None and place.local == 0:
        os.dup2(_said_to.pop(), sys.stderr.fileno())


def ranks_to_start(run: Run) -> int:
    """Return how many ranks this process is to start; 1: it does the run itself.

    Raises:
        UserError: If ranks are started from outside in another number, or halfway.
    """
    place, wanted = place_in(), run.hardware.devices
    _check_accelerate(os.environ)
    if place is not None:
        if wanted not in (1, ALL, place.on_host):
            problem = f"{wanted} asked for, and {place.on_host} ranks are started on this host"
            raise UserError("hardware.devices", problem, "leave it out: who starts ranks says it")
        return 1
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1:
        problem = f"Slurm started {tasks} tasks, and none says which rank it is"
        remedy = (
            "give each RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID"
            " MASTER_ADDR MASTER_PORT, or ask for one task"
        )
        raise UserError("SLURM_NTASKS", problem, remedy)
    return 1 if wanted == 1 else _of_host(wanted, run.hardware.device)


def _check_accelerate(environment: Mapping[str, str]) -> None:
    """Refuse what `accelerate launch` was asked for and would not be done: it tells processes of
    it, and this one takes precision and sharding from its own settings.

    Raises:
        UserError: With the setting that does it.
    """
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        problem = f"{precision} is not heeded: precision is a setting"
        raise UserError("ACCELERATE_MIXED_PRECISION", problem, "give precision=... to the command")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            problem = "is not heeded: how ranks share a training is a setting"
            raise UserError(f"ACCELERATE_USE_{name}", problem, "give parallel.mode=fsdp")
    cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if cpu and place_in(environment) is None:
        print(
            "note: accelerate launch --cpu starts one process; hardware.devices=N starts several",
            flush=True,
        )


def _of_host(wanted: int | str, named: str) -> int:
    """Return how many devices of this host are wanted; a CPU's cores are as many."""
    from pipeline.ledger.devices.table import open_device

    device = open_device(named)
    if device is None:
        return 1  # the run will say so
    if wanted == ALL:
        return device.count()
    have = (os.cpu_count() or 1) if device.kind == "cpu" else device.count()
    if int(wanted) > have:
        raise UserError("hardware.devices", f"{wanted} asked for, {have} there", f"give {have}")
    return int(wanted)


def start_ranks(count: int, args: Sequence[str], started_ns: int) -> int:
    """Run a command line in `count` processes of this host; return the exit code.

    Args:
        args: After `python -m pipeline`.
        started_ns: Monotonic time when this process began.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # it tells of every failure in tables of its own
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[STARTED] = str(started_ns)
    # torch warns of a traversal that finds every weight used; of what fails there is an exception
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"pipeline-{time.time_ns()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        signals_to_handle=SIGNALS,
        shutdown_timeout=ENDED_WITHIN_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pipeline", *args)
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        return codes.get(0, Exit.REFUSED) if codes.get(0, 0) > 0 else Exit.REFUSED
    except SignalException:
        return Exit.PREEMPTED
    except KeyboardInterrupt:  # the first rank says so
        return Exit.INTERRUPTED
    return Exit.DONE
