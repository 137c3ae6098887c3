"""What to say when memory ran out: how much was asked, how much there was, and what to change
first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.settings import Precision, Run
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
from pipeline.stages.capture import CaptureStage
from pipeline.stages.settings import training_precision, training_settings

ELSEWHERE_SHARE = 0.1  # of the device in other hands; below it is what CUDA itself takes


def explain(
    error: Exception, run: Run, arm: str, stage: Any, kind: str, *, device: Any, snapshot: Path
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


def _smaller(run: Run, arm: str, stage: Any, kind: str) -> str:
    """Return the setting that needs less memory at the smallest loss, with the value to try."""
    if kind == "compare":
        return _smaller_load(run)
    if kind == "assess":
        return _smaller_assessment(run)
    # the teacher reads micro-batches of the stage that it captures for
    if isinstance(stage, CaptureStage):
        return _smaller_training(run, stage.like, run.stages[stage.like])
    if not hasattr(stage, "gradient_accumulation"):
        return "a device with more memory (this stage has no setting that needs less)"
    return _smaller_training(run, arm, stage)


def _smaller_training(run: Run, arm: str, stage: Any) -> str:
    now = training_settings(stage, run)
    parts = [
        n
        for n in range(now.gradient_accumulation + 1, now.batch_size + 1)
        if now.batch_size % n == 0
    ]
    if parts:
        wanted = next((n for n in parts if n >= 2 * now.gradient_accumulation), parts[-1])
        key = _key(run, arm, stage, "gradient_accumulation")
        return f"{key}={wanted} (now {now.gradient_accumulation}; the same batch in smaller parts)"
    length = _key(run, arm, stage, "sequence_length")
    shorter = f"{length}={max(8, now.sequence_length // 2)} (now {now.sequence_length})"
    wide = training_precision(stage, run) in (Precision.fp32, Precision.tf32)
    return f"{shorter}, or precision=bf16" if wide else shorter


def _key(run: Run, arm: str, stage: Any, name: str) -> str:
    """Return the setting that decides: the stage's own, that of the stage it is like, or
    everybody's.
    """
    if getattr(stage, name) is not None:
        return f"stages.{arm}.{name}"
    if stage.like is not None and getattr(run.stages[stage.like], name) is not None:
        return f"stages.{stage.like}.{name}"
    return f"training.{name}"


def _smaller_assessment(run: Run) -> str:
    if run.quality.batch_size > 1:
        return f"quality.batch_size={run.quality.batch_size // 2} (now {run.quality.batch_size})"
    length = run.quality.sequence_length or run.training.sequence_length
    return f"quality.sequence_length={max(8, length // 2)} (now {length})"


def _smaller_load(run: Run) -> str:
    load, batches = run.serving.load.batch, sorted(run.serving.batches)
    if batches and batches[-1] > load:
        fewer = ",".join(map(str, batches[:-1]))
        return f"serving.batches=[{fewer}] (now up to {batches[-1]})"
    return f"serving.load.batch={max(1, load // 2)} (now {load})"
