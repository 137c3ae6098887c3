"""A probe: the first steps of a stage as it will run, to see how long a step takes here.

What a stage reads and other stages have yet to make is stood in for by the given model where that
has the same layers. Nothing of a probe is kept but what it took.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import ProbeRecord
from pipeline.runs.base_model import base_artifact
from pipeline.runs.running import Running
from pipeline.stages.base import Stage, WarmUp, is_base_shaped
from pipeline.stages.context import Context
from pipeline.store.artifacts import Artifact
from pipeline.training.ranks import ALONE

STEPS = 6  # of a probe; the second half is what counts


def seconds(found: ProbeRecord, steps: int, evaluations: int) -> float:
    """Return what a stage takes that was probed."""
    return found["around_s"] + steps * found["step_s"] + evaluations * found["eval_s"]


def probe(running: Running, name: str, stage: Stage) -> ProbeRecord | None:
    """Return what the first steps of a stage take; None where it has none to try, or reads what
    nothing can stand in for.

    Raises:
        Exception: Of any kind, as the stage does.
    """
    session = running.session
    trial = stage.trial(STEPS, session.run)
    roles = stage.inputs(session.run)
    if trial is None or not all(is_base_shaped(arm, session.run) for arm in roles.values()):
        return None
    base = base_artifact(session.run, session.data, session.seeds[0], session.store, session.clock)
    inputs = dict.fromkeys(roles, base)
    trial.warm_up(inputs, WarmUp(session.run, session.data, session.device, session.clock))
    own = device_of(session.device)
    own.synchronise()
    if own.counts_memory:
        own.reset_memory()
    with TemporaryDirectory() as folder:
        return _run(running, name, trial, inputs, Path(folder))


def _run(
    running: Running, name: str, trial: Stage, inputs: dict[str, Artifact], folder: Path
) -> ProbeRecord:
    session, clock = running.session, PhaseClock()
    (folder / "out").mkdir()
    context = Context(
        run=session.run,
        stage=name,
        seed=session.seeds[0],
        device=session.device,
        data=session.data,
        clock=clock,
        out=folder / "out",
        checkpoints=folder / "checkpoints",
        like=None,
        matched_flops=None,
        points=lambda step, values: None,
        history=lambda step: [],
        checkpointed=lambda step: None,
        resumed=lambda step, history: None,
        should_stop=lambda: None,
        progress=lambda *_: nullcontext(_nothing),
        say=lambda text: None,
        ranks=ALONE,
    )
    before = clock.now_ns()
    output = trial.run(inputs, context)
    own = device_of(session.device)
    own.synchronise()
    whole_s = (clock.now_ns() - before) / 1e9
    half, end = output.curve[-2:]
    eval_s = end["eval_seconds"] - half["eval_seconds"]
    step_s = (end["seconds"] - half["seconds"]) / (end["step"] - half["step"])
    around_s = max(0.0, whole_s - end["seconds"] - end["eval_seconds"])
    peak = own.allocator().peak_allocated if own.counts_memory else None
    return {"step_s": step_s, "eval_s": eval_s, "around_s": around_s, "peak_bytes": peak}


def _nothing(*_: Any) -> None:
    """Show no progress."""
