"""Steps with something injected: into plain steps under the step tracer, and into the one training
loop.
"""

from __future__ import annotations

import gzip
import json
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from known_load.claims import CLASSES, Readings, Unmeasured
from known_load.device import COPY_BYTES, LEAD, STEP, Device, Plan
from known_load.loads import llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.training import TrainingConfig
from pipeline.ledger.flops import count_flops
from pipeline.ledger.gpu_phases import device_phases
from pipeline.ledger.gpu_timeline import COPIES, read_trace
from pipeline.ledger.peaks import peak
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.traced_steps import StepTracer
from pipeline.tasks.table import Task
from pipeline.training.loop import Hooks, Progress, train
from pipeline.training.objective import Objective
from pipeline.training.reading import examine

SLEEP_S, LOOP_SLEEP_S = 0.050, 0.200  # injected into a step
WARM_STEPS = 2  # of a training, in which libraries set themselves up and may wait
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")
# in which no tensor may be read on the host
DEVICE_PHASES = ("forward", "backward", "optimizer", "teacher")

# -- injected into plain steps --------------------------------------------------------------------


def measure_delays(device: Device, plan: Plan) -> Readings:
    """Trace steps with nothing, a sleep of the host, a copy that waits, and a copy behind
    computing.
    """
    traced(device, lambda: plain_step(device, lambda: None))  # the profiler sets itself up
    return {"steps": [delays(device) for _ in range(plan.repeats)], "copy_bytes": COPY_BYTES}


def delays(device: Device) -> Readings:
    """Return one repetition."""
    slept_ns: list[int] = []

    def sleeps() -> None:
        before_ns = device.now_ns()
        device.sleep(SLEEP_S)
        slept_ns.append(device.now_ns() - before_ns)

    def behind() -> None:
        device.matmuls(30)
        device.copy(aside=True)

    return {
        "control": traced(device, lambda: plain_step(device, lambda: None)),
        "sleep": traced(device, lambda: plain_step(device, sleeps)),
        "pageable": traced(device, lambda: plain_step(device, lambda: device.copy(aside=False))),
        "hidden": traced(device, lambda: plain_step(device, behind)),
        "slept_ns": slept_ns[-1],
    }


def plain_step(device: Device, injected: Callable[[], None]) -> None:
    """Compute, do what is injected on a device that is done, compute."""
    device.matmuls(1)
    device.synchronize()
    injected()
    device.matmuls(1)
    device.synchronize()


def traced(device: Device, step: Callable[[], None]) -> Readings:
    """Return the classes of a step's time, its wall time, and how long the device copied.

    Raises:
        Unmeasured: If the step could not be traced.
    """
    with TemporaryDirectory() as folder:
        tracer, clock, wall_ns = device.tracer(Path(folder)), PhaseClock(), 0
        with tracer:
            for number in (LEAD, STEP):
                if tracer.opens_at(number):
                    tracer.open(clock)
                before_ns = device.now_ns()
                with tracer.annotate(number):
                    step()
                wall_ns = device.now_ns() - before_ns
                if tracer.closes_after(number):
                    tracer.close(number, clock)
        found = tracer.result()
        if not found["steps"] or not found["traces"]:
            raise Unmeasured(
                "; ".join(found["notes"]) or "the trace shows no activity of the device"
            )
        trace = read_trace(Path(folder) / found["traces"][0])
    classes = {name: found["steps"][0][name] for name in CLASSES}
    copies = [each for own in trace.activities.values() for each in own if each.kind == COPIES]
    since_ns = trace.annotations[f"step {STEP}"].start_ns  # the step before it copies as well
    copied_ns = sum(each.end_ns - each.start_ns for each in copies if each.start_ns >= since_ns)
    return {
        **classes,
        "window_ns": sum(classes.values()),
        "wall_ns": wall_ns,
        "copied_ns": copied_ns,
    }


# -- the training loop ----------------------------------------------------------------------------


class Rows:
    """The same batch at every step."""

    def __init__(self, plan: Plan) -> None:
        ids = torch.arange(plan.length).repeat(plan.rows, 1)
        self._batch = {"input_ids": ids, "position_ids": ids, "labels": ids.roll(-1, 1)}

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step."""
        return self._batch


class Noticed(Objective):
    """An objective that calls `before` as a step begins, while the loop waits for its batch: those
    are made ahead.
    """

    before: Callable[[int], None]

    def at(self, step: int) -> None:
        """Begin a step."""
        with self.clock.phase("data_wait"):
            self.before(step)
        super().at(step)


class HostReads(TorchDispatchMode):
    """Notes where a tensor is read on the host while a device would compute; for runs without a
    GPU.
    """

    def __init__(self, clock: PhaseClock) -> None:
        super().__init__()
        self.places: list[str] = []
        self.looks = False
        self._phase, clock.observer = "other", self._enter

    def _enter(self, phase: str) -> None:
        self._phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            self.looks
            and self._phase in DEVICE_PHASES
            and func.name().partition(".")[0] in HOST_READS
        ):
            frames = [
                frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename
            ]
            self.places.append(place(frames[-1].filename, frames[-1].lineno or 0))
        return func(*args, **(kwargs or {}))


def place(filename: str, line: int) -> str:
    """Return a line of a file, the folder's name before it."""
    return f"{Path(filename).parent.name}/{Path(filename).name}:{line}"


def measure_loop(device: Device, plan: Plan) -> Readings:
    """Read where steps of the loop wait that are neither traced nor evaluated.

    On a GPU torch tells, which knows its own operations (reads of a tensor, copies that block). A
    CPU never waits: there it is noted where tensors are read on the host while a GPU would compute.
    """
    if device.at.type != "cuda":
        places = host_reads(device, plan)
    else:
        places = waits(device, plan, "error")
        places += waits(device, plan, "warn") if places else []
    return {"places": sorted(set(places)), "said": " ".join(sorted(set(places))) or None}


def host_reads(device: Device, plan: Plan) -> list[str]:
    """Return where steps on a CPU read a tensor on the host while a GPU would compute."""
    clock = PhaseClock()
    with HostReads(clock) as reads:

        def look(step: int) -> None:
            reads.looks = step >= WARM_STEPS

        training(device, plan, clock, look, lambda: look(-1))
    return reads.places


def waits(device: Device, plan: Plan, mode: str) -> list[str]:
    """Return where torch says that an operation made the host wait: the first (`error`) or all
    (`warn`).
    """
    allow = lambda: torch.cuda.set_sync_debug_mode("default")
    forbid = lambda step: torch.cuda.set_sync_debug_mode(mode) if step >= WARM_STEPS else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            training(device, plan, PhaseClock(), forbid, allow)
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return [place(frame.filename, frame.lineno or 0)]
        finally:
            allow()
    return [
        place(each.filename, each.lineno)
        for each in said
        if "synchronizing CUDA operation" in str(each.message)
    ]


def training(
    device: Device,
    plan: Plan,
    clock: PhaseClock,
    before: Callable[[int], None],
    validate: Callable[[], object],
    *,
    advance: Callable[[], None] = lambda: None,
    tracer: StepTracer | None = None,
) -> Progress:
    """Train a small Llama through the one loop; it evaluates at the end."""
    model = llama().to(device.at)
    each = count_flops(model, Task.causal_lm, backward=True).batch(
        plan.rows, plan.length, plan.rows * plan.length
    )
    hooks = Hooks(
        validate=lambda: (validate(), 0.0)[1],
        flops=lambda batch: (each, 0.0),
        points=lambda step, values: None,
        history=lambda step: [],
        checkpointed=lambda step: None,
        resumed=lambda step, history: None,
        say=print,
        should_stop=lambda: None,
        advance=lambda step, tokens: advance(),
        tracer=tracer or StepTracer(),
    )
    read = examine(model, device.at)
    objective = Noticed(model, Task.causal_lm, Precision.bf16, device.at, clock, read=read)
    objective.before = before
    with TemporaryDirectory() as folder:
        return train(
            model,
            Rows(plan),
            objective,
            settings=TrainingConfig(
                steps=plan.steps,
                eval_every=plan.steps,
                batch_size=plan.rows,
                sequence_length=plan.length,
            ),
            precision=PrecisionConfig(name=Precision.bf16),
            folder=Path(folder),
            clock=clock,
            hooks=hooks,
        )


def measure_loop_timeline(device: Device, plan: Plan) -> Readings:
    """Trace two steps of the loop, the second with a host that slept for its batch."""
    if device.at.type != "cuda":
        return {"skipped": "a CPU has no timeline of a GPU"}
    # libraries set themselves up
    training(device, plan, PhaseClock(), lambda step: None, lambda: None)
    return {
        "runs": [loop_timeline(device, plan) for _ in range(plan.repeats)],
        "peak": peak(device.name, "bf16").to_json(),
    }


def loop_timeline(device: Device, plan: Plan) -> Readings:
    """Return one repetition.

    Raises:
        Unmeasured: If the steps could not be traced.
    """
    first, second = plan.steps // 2, plan.steps - 4
    slept_ns: list[int] = []

    def sleeps(step: int) -> None:
        if step + 1 == second:
            before_ns = time.monotonic_ns()
            time.sleep(LOOP_SLEEP_S)
            slept_ns.append(time.monotonic_ns() - before_ns)

    with TemporaryDirectory() as folder:
        tracer, clock = StepTracer(Path(folder), device.at, (first, second)), PhaseClock()
        with tracer, device_phases(clock, device.at) as phases:
            assert phases is not None
            before_ns = time.monotonic_ns()
            progress = training(
                device, plan, clock, sleeps, lambda: None, advance=phases.resolve, tracer=tracer
            )
            phases.finish(device.synchronize)
            wall_s = (time.monotonic_ns() - before_ns) / 1e9
        found = tracer.result()
        steps = {step["step"]: step for step in found["steps"]}
        if set(steps) != {first, second}:
            raise Unmeasured(
                "; ".join(found["notes"]) or "the traces show no activity of the device"
            )
        waiting = [name for path in found["traces"] for name in waiting_calls(Path(folder) / path)]
    return {
        "slept_ns": slept_ns[0],
        "steps": found["steps"],
        "waits": waiting,
        "notes": found["notes"],
        "host_wait_gain_ns": steps[second]["idle_host_wait_ns"] - steps[first]["idle_host_wait_ns"],
        "phases_s": phases.phases_s(),
        "host_phases_ns": clock.read_ns(),
        "wall_s": wall_s,
        "flops": progress.flops,
        "step_s": progress.step_ns / 1e9,
    }


def waiting_calls(path: Path) -> list[str]:
    """Return the calls inside the steps of a trace in which the host waits for the device."""
    events = [
        event
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        if event["ph"] == "X"
    ]
    steps = [
        event
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("step ")
    ]
    calls = [
        event for event in events if event.get("cat") == "cuda_runtime" and event["name"] in WAITS
    ]
    return [
        call["name"]
        for call in calls
        if any(step["ts"] <= call["ts"] < step["ts"] + step["dur"] for step in steps)
    ]
