"""What to say when memory ran out or the device was lost: what happened, what to change first."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.arms import file_name
from pipeline.config.settings.run import Run, scored_length
from pipeline.errors import DeviceLost, StageFailed
from pipeline.ledger.attempted import reason
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.memory import (
    Pressure,
    asked_bytes,
    host_now,
    is_of_device,
    is_of_host,
    read_pressure,
    write_snapshot,
)
from pipeline.ledger.numbers import num_bytes
from pipeline.runs.running import Running
from pipeline.stages.base import Stage

ELSEWHERE_SHARE = 0.1  # of the device in other hands; below it is what CUDA itself takes


@contextmanager
def failing_as(
    running: Running, arm: str, kind: str, stage: Stage | None = None
) -> Generator[None]:
    """Have a failure say which stage failed; one for want of memory, or of the device, what to
    change.
    """
    session = running.session
    snapshot = snapshot_file(session.folder, arm, session.number)
    with failing_on(session.device, session.run, snapshot, arm, kind, stage):
        yield


def snapshot_file(folder: Path, arm: str, attempt: int) -> Path:
    """Return where the allocator's map goes when a device's memory runs out."""
    return folder / f"oom-{file_name(arm)}-{attempt}.json"


@contextmanager
def failing_on(
    device: Any, run: Run, snapshot: Path, arm: str, kind: str, stage: Stage | None
) -> Generator[None]:
    """Do as `failing_as` does, on a rank that knows its own device alone."""
    what = arm if stage is None else f"stage {arm}"
    try:
        yield
    except StageFailed as error:
        raise type(error)(f"{what}: {error}") from error
    except Exception as error:
        said = explain(error, run, arm, stage, kind, device=device, snapshot=snapshot)
        if said is None and is_lost(error, device):
            raise DeviceLost(f"{what}: {lost_words(error, device)}") from error
        if said is None:
            raise
        raise StageFailed(f"{what}: {said}") from error


def explain(
    error: Exception,
    run: Run,
    arm: str,
    stage: Stage | None,
    kind: str,
    *,
    device: Any,
    snapshot: Path,
) -> str | None:
    """Return one line on an error that says memory ran out, or None for any other error.

    Args:
        kind: What was being done: `work` on a stage, `assess` of its artifact, or `compare`
            (serving).
        device: The run's device.
        snapshot: Where the allocator's map goes, if it was the device's memory.
    """
    first = _smaller(run, arm, stage, kind)
    if is_of_device(error):
        if not device_of(device).counts_memory:
            kind = device_of(device).kind
            return f"out of {kind} memory: {_wanted(asked_bytes(error))}; first: {first}"
        pressure = read_pressure(error, device)
        kept = _keep(snapshot, device)
        return f"{_device_words(pressure)}; first: {_first(pressure, first)}; {kept}"
    if is_of_host(error):
        return (
            f"{_host_words(error)}; first:"
            f" {first if device.type == 'cpu' else _fewer_documents(run)}"
        )
    return None


def is_lost(error: Exception, device: Any) -> bool:
    """Return whether a device answers no more since an error, which is then the device's."""
    return isinstance(error, RuntimeError) and not device_of(device).answers()


def lost_words(error: Exception, device: Any) -> str:
    """Return one line on an error after which the device answers no more."""
    return (
        f"the {device_of(device).kind} device was lost ({reason(error)}); first: the same command"
        " again, which goes on from the last checkpoint; where it happens again, another device"
        " (hardware.device)"
    )


def _wanted(asked: int | None) -> str:
    return "an allocation failed" if asked is None else f"{num_bytes(asked)} asked for"


def _device_words(now: Pressure) -> str:
    free = "what is free is unknown"
    if now.free is not None and now.total is not None:
        free = f"{num_bytes(now.free)} free of {num_bytes(now.total)}"
    held = f"torch holds {num_bytes(now.reserved)}, {num_bytes(now.allocated)} of it in tensors"
    others = (
        ""
        if now.elsewhere is None
        else f", other processes and CUDA itself {num_bytes(now.elsewhere)}"
    )
    return f"out of GPU memory: {_wanted(now.asked)}, {free}; {held}{others}"


def _first(now: Pressure, smaller: str) -> str:
    """Return the first thing to try, by what was measured."""
    # Enough memory is there, in pieces: a smaller batch would only hide that.
    if now.is_fragmented and not now.expandable:
        pieces = f"{num_bytes(now.unused)} are held in pieces too small"
        return f"PYTORCH_ALLOC_CONF=expandable_segments:True in the environment ({pieces})"
    if (
        now.elsewhere is not None
        and now.total is not None
        and now.elsewhere > ELSEWHERE_SHARE * now.total
    ):
        return (
            "end what else runs on this device, or take another one (hardware.device); then"
            f" {smaller}"
        )
    return smaller


def _keep(snapshot: Path, device: Any) -> str:
    try:
        write_snapshot(snapshot, device)
    except (OSError, RuntimeError) as error:
        return f"no memory map was written ({error})"
    return f"memory map: {snapshot}"


def _host_words(error: Exception) -> str:
    held, available = host_now()
    known = [
        _wanted(asked_bytes(error)),
        *([] if held is None else [f"this process holds {num_bytes(held)}"]),
        *([] if available is None else [f"the machine has {num_bytes(available)} left"]),
    ]
    return f"out of host memory: {', '.join(known)}"


def _fewer_documents(run: Run) -> str:
    most = run.data.max_documents
    return (
        "data.max_documents=10000"
        if most is None
        else f"data.max_documents={max(1, most // 2)} (now {most})"
    )


def _smaller(run: Run, arm: str, stage: Stage | None, kind: str) -> str:
    """Return the setting that needs less memory at the smallest loss, with the value to try."""
    if kind == "compare":
        return _smaller_load(run)
    if kind == "assess":
        return _smaller_assessment(run)
    assert stage is not None
    return stage.memory_remedy(arm, run)


def _smaller_assessment(run: Run) -> str:
    if run.quality.batch_size > 1:
        return f"quality.batch_size={run.quality.batch_size // 2} (now {run.quality.batch_size})"
    length = scored_length(run)
    return f"quality.sequence_length={max(8, length // 2)} (now {length})"


def _smaller_load(run: Run) -> str:
    load, batches = run.serving.load.batch, sorted(run.serving.batches)
    if batches and batches[-1] > load:
        fewer = ",".join(map(str, batches[:-1]))
        return f"serving.batches=[{fewer}] (now up to {batches[-1]})"
    return f"serving.load.batch={max(1, load // 2)} (now {load})"
