"""The one training loop: every stage that trains goes through `train`.

Learning rate and batches are pure functions of the step, so that resuming needs weights, optimizer
and generators only. The loop never waits for the device to read a loss: readings arrive a few steps
late.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import num_targets, num_tokens
from pipeline.errors import BudgetSpent, StageFailed
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import HistoryEntry
from pipeline.ledger.traced_steps import StepTracer
from pipeline.training import checkpoint
from pipeline.training.checkpoint import kept_of
from pipeline.training.float8 import float8_layers
from pipeline.training.objective import Objective, StepLoss
from pipeline.training.optimizer import MasterWeights, make_optimizer, masters_of, set_rate
from pipeline.training.precision import matmuls
from pipeline.training.prefetch import Batches, made_ahead
from pipeline.training.schedule import is_constant, learning_rate

LATE = 4  # steps a loss reading may be late on an accelerator; also how far the host may run ahead
SMOOTHING = 0.9


@dataclass(slots=True)
class Progress:
    """All state of a training run beside weights, optimizer and generators; plain JSON."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0  # of them, to be predicted
    flops: float = 0.0  # of model and teacher
    own_flops: float = 0.0  # of the model alone
    step_ns: int = 0  # time in steps: evaluation and checkpoints excluded
    eval_ns: int = 0  # time in evaluations
    # what hard labels have in the loss, summed over the readings of the last tenth
    hard: float = 0.0
    taught: float = 0.0  # what a teacher has
    # loss by what is read: `text`, `sampled`
    smooth: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop asks of its surroundings."""

    validate: Callable[[], float]
    flops: Callable[[dict[str, Tensor]], tuple[float, float]]  # the model's own, its teacher's
    points: Callable[[int, dict[str, float]], None]
    # what led to a checkpoint at this step, for whoever resumes
    history: Callable[[int], list[HistoryEntry]]
    checkpointed: Callable[[int], None]
    # from this step on, with the checkpoint's history
    resumed: Callable[[int, list[HistoryEntry]], None]
    say: Callable[[str], None]
    should_stop: Callable[[], type[Exception] | None]
    advance: Callable[[int, int], None]  # steps done, tokens done
    tracer: StepTracer = field(default_factory=StepTracer)  # of sampled steps; this one traces none


@dataclass(frozen=True, slots=True)
class Reading:
    """What a micro-batch says of the loss, on its way to the host.

    Attributes:
        values: Mean loss, sums of cross-entropy and divergence over the targets, and the parts of
            the mean named by `drawn`; float32 on the host.
        count: Targets.
        event: The device has passed it when `values` are there; None where there is nothing to wait
            for.
        ce_weight: Of the hard labels in the loss.
        drawn: Names of what the teacher's inside has in the loss.
        kind: What was read: `text`, or `sampled` from the student.
    """

    step: int
    values: Tensor
    count: int
    event: Any
    ce_weight: float = 1.0
    drawn: tuple[str, ...] = ()
    kind: str = "text"


def train(
    model: Any,
    batches: Batches,
    objective: Objective,
    *,
    settings: TrainingConfig,
    precision: PrecisionConfig,
    folder: Path,
    clock: PhaseClock,
    hooks: Hooks,
) -> Progress:
    """Train `model` in place for `settings.steps`, going on from the newest checkpoint in `folder`.

    Raises:
        StageFailed: If the loss is NaN or diverges.
        Exception: What `hooks.should_stop` names, after a checkpoint.
    """
    masters = masters_of(model, objective.precision)
    held = masters or kept_of(model)
    trained = (
        [p for p in model.parameters() if p.requires_grad] if masters is None else masters.masters
    )
    optimizer = make_optimizer(trained, settings, objective.device)
    scaler = torch.amp.GradScaler(
        objective.device.type,
        init_scale=precision.loss_scale,
        enabled=objective.precision is Precision.fp16,
    )
    progress = _resume(folder, held, optimizer, scaler, clock, hooks)
    with (
        float8_layers(
            objective.model,
            objective.precision,
            least_width=precision.fp8_least_width,
            say=hooks.say,
        ),
        made_ahead(batches, progress.step, settings.steps, objective.device) as ahead,
    ):
        _all_steps(
            model,
            masters,
            held,
            ahead,
            objective,
            optimizer,
            scaler,
            settings,
            progress,
            folder,
            clock,
            hooks,
        )
    if masters is not None:
        masters.restore()
    return progress


def trial_steps(
    model: Any,
    batches: Batches,
    objective: Objective,
    settings: TrainingConfig,
    precision: PrecisionConfig,
    count: int,
    now_ns: Callable[[], int],
) -> tuple[list[float], list[float]]:
    """Take the first `count` steps as `train` would; return the seconds and the loss of each.

    The model is left as it is after them, in fp32. A loss that is no number is returned as it is.
    """
    masters = masters_of(model, objective.precision)
    trained = (
        [p for p in model.parameters() if p.requires_grad] if masters is None else masters.masters
    )
    optimizer = make_optimizer(trained, settings, objective.device)
    scaler = torch.amp.GradScaler(
        objective.device.type,
        init_scale=precision.loss_scale,
        enabled=objective.precision is Precision.fp16,
    )
    progress, clock, seconds, losses = Progress(), PhaseClock(), list[float](), list[float]()
    hooks = Hooks(
        validate=lambda: 0.0,
        flops=lambda batch: (0.0, 0.0),
        points=lambda step, values: None,
        history=lambda step: [],
        checkpointed=lambda step: None,
        resumed=lambda step, history: None,
        say=lambda text: None,
        should_stop=lambda: None,
        advance=lambda steps, tokens: None,
    )
    model.train()
    with float8_layers(
        objective.model, objective.precision, least_width=precision.fp8_least_width, say=hooks.say
    ):
        for _ in range(min(count, settings.steps)):
            before, pending = now_ns(), deque[Reading]()
            _step(
                model,
                masters,
                batches,
                objective,
                optimizer,
                scaler,
                settings,
                progress,
                pending,
                clock,
                hooks,
            )
            device_of(objective.device).synchronise()
            seconds.append((now_ns() - before) / 1e9)
            counted = sum(reading.count for reading in pending)
            losses.append(
                sum(float(reading.values[0]) * reading.count for reading in pending) / counted
            )
    if masters is not None:
        masters.restore()
    return seconds, losses


def _all_steps(
    model: Any,
    masters: MasterWeights | None,
    held: Any,
    batches: Batches,
    objective: Objective,
    optimizer: Any,
    scaler: Any,
    settings: TrainingConfig,
    progress: Progress,
    folder: Path,
    clock: PhaseClock,
    hooks: Hooks,
) -> None:
    pending: deque[Reading] = deque()
    last_saved = time.monotonic()
    eval_every = steps_between_evaluations(settings)
    model.train()
    while progress.step < settings.steps:
        number = progress.step + 1
        if hooks.tracer.opens_at(number):
            # the profiler would wait for it
            _read(pending, progress, settings, hooks, clock, drain=True)
            hooks.tracer.open(clock)
        before = clock.now_ns()
        with hooks.tracer.annotate(number):
            _step(
                model,
                masters,
                batches,
                objective,
                optimizer,
                scaler,
                settings,
                progress,
                pending,
                clock,
                hooks,
            )
        progress.step_ns += clock.now_ns() - before
        evaluates = number % eval_every == 0 or number == settings.steps
        traced = hooks.tracer.closes_after(number)
        # both would wait for it
        _read(pending, progress, settings, hooks, clock, drain=evaluates or traced)
        if traced:
            hooks.tracer.close(number, clock)
        if evaluates:
            _validate(progress, settings, hooks, clock)
        stop = hooks.should_stop()
        due = time.monotonic() - last_saved > settings.checkpoint_seconds
        if settings.checkpoint_every is not None:
            due = progress.step % settings.checkpoint_every == 0
        if (due or stop is not None) and progress.step < settings.steps:
            _read(pending, progress, settings, hooks, clock, drain=True)
            _save(folder, held, optimizer, scaler, progress, clock, hooks)
            last_saved = time.monotonic()
        if stop is not None:
            where = f"after step {progress.step} of {settings.steps}"
            if stop is BudgetSpent:
                raise stop(f"budget.device_hours is spent {where}; raise it to resume from there")
            raise stop(f"stopped {where}; the same command resumes from there")


def steps_between_evaluations(settings: TrainingConfig) -> int:
    """Return after how many steps each the model is evaluated: five times, unless declared."""
    return settings.eval_every or max(1, math.ceil(settings.steps / 5))


def _resume(
    folder: Path, model: Any, optimizer: Any, scaler: Any, clock: PhaseClock, hooks: Hooks
) -> Progress:
    progress, history = Progress(), list[HistoryEntry]()
    with clock.phase("checkpoint"):
        found = checkpoint.newest(folder, hooks.say)
        if found is not None:
            extra = checkpoint.load(found[0], model, optimizer)
            scaler.load_state_dict(extra["scaler"])
            progress, history = Progress(**extra["progress"]), extra["history"]
    with clock.phase("log"):
        hooks.resumed(progress.step, history)
    return progress


def _step(
    model: Any,
    masters: MasterWeights | None,
    batches: Batches,
    objective: Objective,
    optimizer: Any,
    scaler: Any,
    settings: TrainingConfig,
    progress: Progress,
    pending: deque[Reading],
    clock: PhaseClock,
    hooks: Hooks,
) -> None:
    """Run one optimizer step: its micro-batches forward and backward, clip, update."""
    objective.at(progress.step)
    with clock.phase("data_wait"):
        batch = batches.batch(progress.step)
    batch = objective.completed(batch, progress.step)
    with clock.phase("data_wait"):
        micro = [
            dict(zip(batch, part, strict=True))
            for part in zip(
                *(tensor.chunk(settings.gradient_accumulation) for tensor in batch.values()),
                strict=True,
            )
        ]
        # what has no target would teach nothing
        computed = [part for part in micro if num_targets(part)]
        counts = [num_targets(part) for part in computed]
    for part, count in zip(computed, counts, strict=True):
        done = objective(part)
        with clock.phase("backward"), matmuls(objective.precision, objective.device):
            scaler.scale(done.loss * (count / sum(counts))).backward()
            if masters is not None:
                masters.take_gradients()
            kind = "sampled" if "sampled" in part else "text"
            pending.append(_on_its_way(progress.step, done, objective.device, kind))
    with clock.phase("optimizer"):
        set_rate(optimizer, learning_rate(progress.step, settings))
        scaler.unscale_(optimizer)
        stepped = model.parameters() if masters is None else masters.masters
        torch.nn.utils.clip_grad_norm_(stepped, settings.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if masters is not None:
            masters.write_back()
    progress.step += 1
    # what was written was computed, learnt or not
    if len(computed) < len(micro) and "sampled" not in batch:
        batch = _joined(batch, computed)
    progress.examples += len(batch["labels"])
    progress.tokens += num_tokens(batch)
    progress.target_tokens += sum(counts)
    own, teacher = hooks.flops(batch)
    progress.own_flops, progress.flops = progress.own_flops + own, progress.flops + own + teacher
    hooks.advance(progress.step, progress.tokens)


def _joined(batch: dict[str, Tensor], parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return those micro-batches of a batch that were computed, as one."""
    return {
        name: torch.cat([tensor[:0], *(part[name] for part in parts)])
        for name, tensor in batch.items()
    }


def _on_its_way(step: int, done: StepLoss, device: torch.device, kind: str = "text") -> Reading:
    """Send what a micro-batch says to the host without waiting; `item()` would wait for all that
    was launched since.
    """
    parts = (done.loss, done.parts.ce, done.parts.divergence, *done.drawn.values())
    values = torch.stack([part.detach().float() for part in parts])
    how = (done.ce_weight, tuple(done.drawn), kind)
    there, event = device_of(device).fetch(values)
    return Reading(step, there, done.count, event, *how)


def _read(
    pending: deque[Reading],
    progress: Progress,
    settings: TrainingConfig,
    hooks: Hooks,
    clock: PhaseClock,
    *,
    drain: bool,
) -> None:
    """Take the losses that have arrived; waiting for the device here is its computing, so it is
    booked as such.
    """
    while pending and (
        drain or pending[0].event is None or len(pending) > LATE * settings.gradient_accumulation
    ):
        reading = pending.popleft()
        if reading.event is not None:
            before = clock.now_ns()
            with clock.phase("backward"):
                reading.event.synchronize()
            progress.step_ns += clock.now_ns() - before
        with clock.phase("log"):
            _account(reading, progress, settings, hooks)


def _part(weight: float, value: float) -> float:
    """Return what a part adds to the loss: nothing without a weight, be it infinite."""
    return weight * value if weight else 0.0


def _account(reading: Reading, progress: Progress, settings: TrainingConfig, hooks: Hooks) -> None:
    """Book one loss reading; stop on NaN and on divergence."""
    step, (loss, ce_sum, divergence_sum, *more) = reading.step, reading.values.tolist()
    ce, divergence = ce_sum / reading.count, divergence_sum / reading.count
    drawn = dict(zip(reading.drawn, more, strict=True))
    if not math.isfinite(loss):
        raise StageFailed(
            f"the loss is {loss} at step {step + 1}; lower training.learning_rate or use"
            " precision=bf16 or fp32"
        )
    _check_course(step, loss, reading.kind, progress, settings)
    if step + 1 > 0.9 * settings.steps:
        progress.hard += _part(reading.ce_weight, ce)
        progress.taught += _part(1 - reading.ce_weight, divergence) + sum(drawn.values())
    rate = learning_rate(step, settings)
    # of its own samples it is the student's entropy
    said = {"ce": ce} if reading.kind == "text" else {}
    hooks.points(
        step + 1, {"loss": loss, **said, "divergence": divergence, "learning_rate": rate, **drawn}
    )


def _check_course(
    step: int, loss: float, kind: str, progress: Progress, settings: TrainingConfig
) -> None:
    """Stop where the loss, smoothed, is far above the best it was; losses of one kind are
    compared.
    """
    before = progress.smooth.get(kind, loss)
    smooth = progress.smooth[kind] = SMOOTHING * before + (1 - SMOOTHING) * loss
    best = progress.best[kind] = min(progress.best.get(kind, smooth), smooth)
    if smooth > settings.divergence_factor * max(best, 0.05):
        raise StageFailed(
            f"the loss diverged: {smooth:.3g} at step {step + 1} after a best of {best:.3g}; "
            "lower training.learning_rate or raise training.divergence_factor"
        )


def _validate(
    progress: Progress, settings: TrainingConfig, hooks: Hooks, clock: PhaseClock
) -> None:
    before = clock.now_ns()
    with clock.phase("eval"):
        metric = attempted(hooks.validate, lambda why: _unread(progress.step, why, hooks))
    progress.eval_ns += clock.now_ns() - before
    if metric is None:
        return
    reading = {
        "step": progress.step,
        "tokens": progress.tokens,
        "metric": metric,
        "seconds": progress.step_ns / 1e9,
        "eval_seconds": progress.eval_ns / 1e9,
        "constant": float(is_constant(progress.step, settings)),
    }
    progress.curve.append(reading)
    with clock.phase("log"):
        hooks.points(progress.step, {"validation": metric})


def _unread(step: int, why: str, hooks: Hooks) -> None:
    """Say that a validation reading failed: the curve lacks it, and the training continues."""
    hooks.say(unmeasured(f"validation after step {step}", why))


def _save(
    folder: Path,
    model: Any,
    optimizer: Any,
    scaler: Any,
    progress: Progress,
    clock: PhaseClock,
    hooks: Hooks,
) -> None:
    from pipeline.store.artifacts import plain

    def extra() -> dict[str, Any]:
        return {
            "progress": plain(progress),
            "scaler": scaler.state_dict(),
            "history": hooks.history(progress.step),
        }

    with clock.phase("checkpoint"):
        checkpoint.save(folder, progress.step, model, optimizer, extra)
    with clock.phase("log"):
        hooks.checkpointed(progress.step)
