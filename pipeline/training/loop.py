"""The one training loop: every stage that trains goes through `train`.

Learning rate and batches are pure functions of the step, so that resuming needs weights, optimizer
and generators only. The loop never waits for the device to read a loss: readings arrive a few steps
late.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.settings.parallel import ParallelConfig
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import num_targets, num_tokens
from pipeline.distillation.losses import Sums
from pipeline.errors import BudgetSpent, StageFailed, one_line
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import (
    CheckpointsRecord,
    CompileRecord,
    HistoryEntry,
    OverlapRecord,
    TrainingState,
)
from pipeline.ledger.traced_steps import StepTracer
from pipeline.training import cadence, checkpoint, compiling, overlapping
from pipeline.training.cadence import Cadence
from pipeline.training.compiling import Compiling
from pipeline.training.float8 import float8_layers
from pipeline.training.objective import Objective, StepLoss
from pipeline.training.optimizer import MasterWeights, make_optimizer, masters_of, set_rate
from pipeline.training.overlapping import Overlapping
from pipeline.training.parallel import Shared, is_sharded, share
from pipeline.training.precision import matmuls
from pipeline.training.prefetch import Batches, made_ahead
from pipeline.training.ranks import ALONE, STOPS, Ranks
from pipeline.training.schedule import is_constant, learning_rate, steps_between_evaluations

# Waiting for every loss would leave the device idle while the host prepares the next step.
LATE = 4  # steps a loss reading may be late on an accelerator; also how far the host may run ahead
# Share of the past in the smoothed loss: one unlucky batch is no divergence.
SMOOTHING = 0.9


@dataclass(slots=True)
class Progress:
    """All state of a training run beside weights, optimizer and generators; plain JSON.

    Counts are over all steps so far; times are integer nanoseconds.
    """

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
    compiling: CompileRecord = field(default_factory=compiling.fresh)
    overlapping: OverlapRecord = field(default_factory=overlapping.fresh)
    checkpoints: CheckpointsRecord = field(default_factory=cadence.fresh)


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls: the stage around it validates, counts FLOPs, journals and stops."""

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
    """Losses of a micro-batch, being copied to the host.

    Attributes:
        values: Mean loss, sums of cross-entropy and divergence over the targets, and the parts of
            the mean named by `drawn`; float32 on the host.
        count: Targets.
        event: The device has passed it when `values` are there; None where there is nothing to wait
            for.
        ce_weight: Of the hard labels in the loss.
        drawn: Names of the loss parts from inside the teacher: `hidden`, `relations`.
        kind: What was read: `text`, or `sampled` from the student.
    """

    step: int
    values: Tensor
    count: int
    event: Any
    ce_weight: float = 1.0
    drawn: tuple[str, ...] = ()
    kind: str = "text"


@dataclass(frozen=True, slots=True)
class _Loop:
    """What the steps of one training share; `progress` and `pending` are all that changes.

    Attributes:
        masters: The fp32 weights beside a model that is kept in bf16; None where it is its own.
        shared: How micro-batches are shared among ranks.
        pending: Losses that have not reached the host yet, oldest first.
        latest: The last micro-batch that was computed.
        beside: The checkpoint that is being written while the training goes on.
    """

    model: Any
    masters: MasterWeights | None
    objective: Objective
    optimizer: Any
    scaler: torch.amp.GradScaler
    settings: TrainingConfig
    clock: PhaseClock
    hooks: Hooks
    shared: Shared = field(default_factory=Shared)
    progress: Progress = field(default_factory=Progress)
    pending: deque[Reading] = field(default_factory=deque)
    latest: deque[dict[str, Tensor]] = field(default_factory=lambda: deque(maxlen=1))
    beside: deque[checkpoint.Beside] = field(default_factory=deque)

    @classmethod
    def of(
        cls,
        model: Any,
        objective: Objective,
        settings: TrainingConfig,
        precision: PrecisionConfig,
        clock: PhaseClock,
        hooks: Hooks,
        ranks: Ranks = ALONE,
        parallel: ParallelConfig | None = None,
        shared: Shared | None = None,
    ) -> _Loop:
        """Return the loop of a model before its first step."""
        parallel = parallel or ParallelConfig()
        # under FSDP2 the shares of the weights are fp32, and what is gathered of them bf16
        shards = is_sharded(ranks, parallel.mode)
        masters = None if shards else masters_of(model, objective.precision)
        shared = shared or share(model, objective, ranks, parallel)
        trained = (
            [p for p in model.parameters() if p.requires_grad]
            if masters is None
            else masters.masters
        )
        # Only fp16 needs loss scaling: its exponent is too narrow for small gradients. Disabled,
        # the scaler passes everything through.
        scaler = torch.amp.GradScaler(
            objective.device.type,
            # a rank's loss counts as many times as there are ranks, so that their mean is right
            init_scale=precision.loss_scale / ranks.size,
            enabled=objective.precision is Precision.fp16,
        )
        optimizer = make_optimizer(trained, settings, objective.device)
        return cls(model, masters, objective, optimizer, scaler, settings, clock, hooks, shared)

    @property
    def _saved(self) -> Any:
        """What a checkpoint holds the weights of."""
        return self.masters or self.model

    def resumed(self, folder: Path) -> Progress:
        """Load the newest checkpoint, where there is one, and return how far it is."""
        progress, history = Progress(), list[HistoryEntry]()
        with self.clock.phase("checkpoint"):
            # Batches and learning rate follow from the step, so they are in no checkpoint.
            found = checkpoint.newest(folder, self.hooks.say) if self.ranks.is_first else None
            found = self.ranks.told(found)  # none may find another one
            if found is not None:
                extra = checkpoint.load(found[0], self._saved, self.optimizer, self.ranks)
                self.scaler.load_state_dict(_scaled(extra["scaler"], 1 / self.ranks.size))
                progress, history = Progress(**extra["progress"]), extra["history"]
        with self.clock.phase("log"):
            self.hooks.resumed(progress.step, history)
        return progress

    def save(self, folder: Path, saving: Cadence, *, beside: bool) -> None:
        """Write a checkpoint of now.

        Args:
            beside: The training goes on meanwhile; `complete` completes it.
        """
        from pipeline.store.artifacts import plain

        # Called by `checkpoint.save` after the tensors are on disk, so that the history covers the
        # time that writing them took.
        def extra() -> TrainingState:
            return {
                "progress": plain(self.progress),
                "scaler": _scaled(self.scaler.state_dict(), self.ranks.size),
                "history": self.hooks.history(self.progress.step),
            }

        self.complete(waits=True)
        before = self.clock.now_ns()
        with self.clock.phase("checkpoint"):
            state = checkpoint.state_of(self._saved, self.optimizer, self.ranks)
            now = (folder, self.progress.step, state)
            if beside:
                self.beside.append(checkpoint.Beside(*now, extra(), self.ranks))
            else:
                checkpoint.save(*now, extra, self.ranks)
            # the others take the time that it took the first one
            saving.saved(self.ranks.told((self.clock.now_ns() - before) / 1e9))
        if not beside:
            with self.clock.phase("log"):
                self.hooks.checkpointed(self.progress.step)

    def complete(self, *, waits: bool) -> None:
        """Complete the checkpoint that is being written beside, if all ranks have written it.

        Args:
            waits: Wait until they have. Else they have agreed that it is.
        """
        if not self.beside or not (waits or self.beside[0].is_done):
            return
        written = self.beside.popleft()
        with self.clock.phase("checkpoint"):
            written.complete()
        with self.clock.phase("log"):
            self.hooks.checkpointed(written.step)

    def step(self, batches: Batches) -> None:
        """Take one optimizer step: its micro-batches forward and backward, clip, update."""
        progress, clock = self.progress, self.clock
        self.objective.at(progress.step)
        self.shared.draw_for(progress.step)
        with clock.phase("data_wait"):
            batch = batches.batch(progress.step)
        batch = self.shared.completed(self.objective, batch, progress.step)
        with clock.phase("data_wait"):
            computed, learnt = taught_by(batch, self.settings.gradient_accumulation)
            counts = [num_targets(part) for part in computed]
        for number, part in enumerate(computed, 1):
            # Weighted by targets, the means of the micro-batches add up to the mean of the batch,
            # so that accumulation does not change the gradient.
            self._backward(part, sum(counts), last=number == len(computed))
        self.latest.extend(computed[-1:])
        with clock.phase("optimizer"):
            self._update()
        progress.step += 1
        if "sampled" not in batch:  # what was written was computed, learnt or not
            batch = learnt
        progress.examples += len(batch["labels"])
        progress.tokens += num_tokens(batch)
        progress.target_tokens += sum(counts)
        own, teacher = self.hooks.flops(batch)
        progress.own_flops, progress.flops = (
            progress.own_flops + own,
            progress.flops + own + teacher,
        )
        self.hooks.advance(progress.step, progress.tokens)

    def _backward(self, part: dict[str, Tensor], targets: int, *, last: bool) -> None:
        """Compute this rank's rows of a micro-batch forward and back.

        Args:
            targets: Of the step, over all micro-batches.
            last: Whether it is the last micro-batch of the step.
        """
        precision, device = self.objective.precision, self.objective.device
        # masters take the gradients of every micro-batch, and so want them averaged
        with self.shared.gradients(last=last or self.masters is not None):
            done = self.shared.computed(self.objective, self.shared.own_rows(part))
            with self.clock.phase("backward"), matmuls(precision, device):
                share = self.shared.share(done.count, targets)
                self.scaler.scale(done.loss * share).backward()
                if self.masters is not None:
                    self.masters.take_gradients()
        kind = "sampled" if "sampled" in part else "text"
        done = self._of_all_ranks(done, part)
        with self.clock.phase("backward"):
            self.pending.append(_on_its_way(self.progress.step, done, device, kind))

    def _of_all_ranks(self, done: StepLoss, part: dict[str, Tensor]) -> StepLoss:
        """Return the losses of a micro-batch by those of this rank's rows; on the device, so that
        no rank waits to read them.
        """
        if not self.ranks.several:
            return done
        targets = num_targets(part)
        share = done.count / max(targets, 1)
        means = (done.loss * share, *(part * share for part in done.drawn.values()))
        parts = (done.parts.ce, done.parts.divergence, *means)
        values = torch.stack([part.detach().float() for part in parts])
        with self.clock.phase("comm_wait"):
            self.ranks.add_up(values)
        ce, divergence, loss, *drawn = values
        return replace(
            done,
            loss=loss,
            parts=Sums(ce, divergence),
            count=targets,
            drawn=dict(zip(done.drawn, drawn, strict=True)),
        )

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return self.shared.ranks

    def agreed(self, stop: type[Exception] | None, *, due: bool) -> tuple[Any, bool, bool]:
        """Return why any rank is to stop, whether the first one finds a checkpoint due, and whether
        any still writes the last one.
        """
        writes = any(not each.is_done for each in self.beside)
        if not self.ranks.several:
            return stop, due, writes
        # at once: it is asked each step
        found = self.ranks.largest(STOPS.index(stop), int(due), int(writes))
        return STOPS[found[0]], bool(found[1]), bool(found[2])

    def _update(self) -> None:
        """Clip the gradients and move the weights."""
        set_rate(self.optimizer, learning_rate(self.progress.step, self.settings))
        # Before clipping: `max_grad_norm` is about true gradients, not scaled ones.
        self.scaler.unscale_(self.optimizer)
        stepped = self.model.parameters() if self.masters is None else self.masters.masters
        torch.nn.utils.clip_grad_norm_(stepped, self.settings.max_grad_norm)
        # Skips the update where a gradient is infinite; `update` then lowers the scale.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            self.masters.write_back()

    def read(self, *, drain: bool) -> None:
        """Take the losses that have arrived, or (`drain`) wait for all of them.

        Waiting for the device here is its computing, so it is booked as such.
        """
        # There is a reading for each micro-batch.
        late = LATE * self.settings.gradient_accumulation
        while self.pending and (drain or self.pending[0].event is None or len(self.pending) > late):
            reading = self.pending.popleft()
            if reading.event is not None:
                before = self.clock.now_ns()
                with self.clock.phase("backward"):
                    reading.event.synchronize()
                # The device computes steps meanwhile; evaluations are timed apart.
                self.progress.step_ns += self.clock.now_ns() - before
            with self.clock.phase("log"):
                _account(reading, self.progress, self.settings, self.hooks)


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
    ranks: Ranks = ALONE,
    parallel: ParallelConfig | None = None,
    shared: Shared | None = None,
) -> Progress:
    """Train `model` in place for `settings.steps`, from the newest checkpoint in `folder` on.

    Args:
        ranks: The processes that train together, each of which calls this.
        parallel: How they share it.
        shared: As they share its weights already; who gives it ends it. None: they do from here on,
            until the last step.

    Raises:
        StageFailed: If the loss is NaN or diverges.
        Exception: What `hooks.should_stop` names, after a checkpoint.
    """
    # The optimizer has to exist before a checkpoint can be loaded into it.
    with clock.phase("prepare"), ranks.watched():
        fresh = _Loop.of(
            model, objective, settings, precision, clock, hooks, ranks, parallel, shared
        )
    loop = replace(fresh, progress=fresh.resumed(folder))
    with (
        ranks.watched(),
        _float8(objective, precision, hooks),
        _deterministic(settings, objective),
        made_ahead(batches, loop.progress.step, settings.steps, objective.device) as ahead,
    ):
        ways = _Ways.of(loop)
        loop.model.train()  # before it is compiled: dropout is another graph
        if loop.progress.step < settings.steps:
            ways.begin(lambda: _micro_batch(batches.batch(loop.progress.step), settings))
        try:
            _all_steps(loop, ahead, folder, ways)
        finally:
            ways.end()
            for each in loop.beside:
                each.wait()
    if loop.masters is not None:
        loop.masters.restore()
    if shared is None:
        loop.shared.end()
    return loop.progress


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
    loop = _Loop.of(model, objective, settings, precision, PhaseClock(), hooks)
    seconds, losses = list[float](), list[float]()
    model.train()
    with _float8(objective, precision, hooks):
        for _ in range(min(count, settings.steps)):
            before = now_ns()
            loop.step(batches)
            # A step's time is known only when the device is done. `train` never waits like this.
            device_of(objective.device).synchronise()
            seconds.append((now_ns() - before) / 1e9)
            readings = list(loop.pending)
            loop.pending.clear()
            # Back from means of micro-batches to the mean over the step's targets.
            total = sum(float(reading.values[0]) * reading.count for reading in readings)
            losses.append(total / sum(reading.count for reading in readings))
    if loop.masters is not None:
        loop.masters.restore()
    return seconds, losses


def _float8(
    objective: Objective, precision: PrecisionConfig, hooks: Hooks
) -> AbstractContextManager[None]:
    """Return what computes the wide layers in float8, where the precision asks for it."""
    return float8_layers(
        objective.model, objective.precision, least_width=precision.fp8_least_width, say=hooks.say
    )


def _micro_batch(batch: dict[str, Tensor], settings: TrainingConfig) -> dict[str, Tensor]:
    """Return the first micro-batch of a batch."""
    return {name: tensor.chunk(settings.gradient_accumulation)[0] for name, tensor in batch.items()}


@dataclass(frozen=True, slots=True)
class _Ways:
    """How steps run, as far as their own times decide it."""

    compiling: Compiling
    overlapping: Overlapping

    @classmethod
    def of(cls, loop: _Loop) -> _Ways:
        """Return those of a training, with what is known of it."""
        found, progress = loop.hooks, loop.progress
        compiled = Compiling(
            loop.settings, loop.objective, progress.compiling, loop.clock, found.say
        )
        overlap = Overlapping(
            loop.objective, progress.overlapping, is_due=lambda: compiled.is_settled
        )
        why = None
        if loop.ranks.several:
            why = "several ranks: each would time its own steps, and choose for itself"
        elif loop.settings.deterministic:
            why = "training.deterministic: no choice by time"
        if why is not None:
            compiled.untimed(why)
            overlap.untimed(why)
        return cls(compiled, overlap)

    @property
    def are_timed(self) -> bool:
        """Whether the step that follows is timed: the device is to be waited for before and
        after it.
        """
        return self.compiling.is_timing or self.overlapping.is_timing

    def begin(self, batch: Callable[[], dict[str, Tensor]]) -> None:
        """Settle before the first step what can be."""
        self.compiling.begin(batch)
        self.overlapping.begin()

    def stepped(self, step: int, seconds: float, batch: dict[str, Tensor]) -> None:
        """Take note of a step."""
        self.overlapping.stepped(seconds)  # first: the other may be settled by this very step
        self.compiling.stepped(step, seconds, batch)

    def end(self) -> None:
        """Run eager, and one after the other, from here on."""
        self.overlapping.end()
        self.compiling.end()


@contextmanager
def _deterministic(settings: TrainingConfig, objective: Objective) -> Generator[None]:
    """Have every kernel give the same bits each time inside, where that is asked for.

    Raises:
        StageFailed: If there is no such kernel for something.
    """
    if not settings.deterministic:
        yield
        return
    try:
        with device_of(objective.device).deterministic():
            yield
    except RuntimeError as error:
        said = one_line(error, 160)
        if "deterministic" not in said:
            raise
        problem = f"a kernel that gives the same bits each time is missing ({said})"
        raise StageFailed(f"{problem}; training.deterministic=false trains without") from error


def _all_steps(loop: _Loop, batches: Batches, folder: Path, ways: _Ways) -> None:
    """Take every step that is left, with the evaluations and checkpoints that fall due.

    Raises:
        StageFailed: If the loss is NaN or diverges.
        Exception: What `hooks.should_stop` names, after a checkpoint.
    """
    settings, progress, hooks, clock = loop.settings, loop.progress, loop.hooks, loop.clock
    saving = Cadence.of(settings, progress.checkpoints, clock.now_ns)
    eval_every = steps_between_evaluations(settings)
    while progress.step < settings.steps:
        number = progress.step + 1
        if hooks.tracer.opens_at(number):
            # Readings on their way belong to steps before the trace.
            loop.read(drain=True)
            hooks.tracer.open(clock)
        if ways.are_timed:  # what was launched before belongs to the steps before
            _wait(loop)
        before = clock.now_ns()
        with hooks.tracer.annotate(number):
            loop.step(batches)
        if ways.are_timed:
            _wait(loop)
        taken_ns = clock.now_ns() - before - ways.compiling.compiled_ns()
        progress.step_ns += taken_ns
        evaluates = number % eval_every == 0 or number == settings.steps
        traced = hooks.tracer.closes_after(number)
        # Evaluation and trace wait for the device. Draining first books that wait as computing of
        # the steps, where it belongs.
        loop.read(drain=evaluates or traced)
        if traced:
            hooks.tracer.close(number, clock)
        if evaluates:
            if loop.ranks.is_first or loop.shared.is_sharded:
                with ways.compiling.eager(), loop.shared.whole():
                    _validate(progress, settings, hooks, clock)
            with clock.phase("comm_wait"):
                loop.ranks.told()  # the others wait for the first one
        if loop.latest:
            ways.stepped(number, taken_ns / 1e9, loop.latest[0])
        due = loop.ranks.is_first and saving.is_due(progress.step)
        with clock.phase("comm_wait") if loop.ranks.several else nullcontext():
            stop, due, writes = loop.agreed(hooks.should_stop(), due=due)
        if not writes:
            loop.complete(waits=False)
        # After the last step the artifact itself is written; a checkpoint would be waste.
        if ((due and not writes) or stop is not None) and progress.step < settings.steps:
            loop.read(drain=True)
            loop.save(folder, saving, beside=settings.checkpoint_beside and stop is None)
        if stop is not None:
            where = f"after step {progress.step} of {settings.steps}"
            if stop is BudgetSpent:
                raise stop(f"budget.device_hours is spent {where}; raise it to resume from there")
            raise stop(f"stopped {where}; the same command resumes from there")
    loop.complete(waits=True)  # nothing writes into the folder any more


def _scaled(scaler: dict[str, Any], factor: float) -> dict[str, Any]:
    """Return the state of a gradient scaler with another scale: that of all ranks in checkpoints,
    that of one in use.
    """
    return {name: v * factor if name == "scale" else v for name, v in scaler.items()}


def _wait(loop: _Loop) -> None:
    """Wait for the device, which computes the steps meanwhile."""
    with loop.clock.phase("backward"):
        device_of(loop.objective.device).synchronise()


def taught_by(
    batch: dict[str, Tensor], accumulation: int
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the micro-batches of a batch that have a target, and these as one batch: others would
    teach nothing, and are not computed.

    Each tensor (B, ...) is cut along its rows into `accumulation` parts.
    """
    cut = (tensor.chunk(accumulation) for tensor in batch.values())
    micro = [dict(zip(batch, part, strict=True)) for part in zip(*cut, strict=True)]
    parts = [part for part in micro if num_targets(part)]
    if len(parts) == len(micro):
        return parts, batch
    joined = {
        # `tensor[:0]` keeps shape and dtype where no part is left
        name: torch.cat([tensor[:0], *(part[name] for part in parts)])
        for name, tensor in batch.items()
    }
    return parts, joined


def _on_its_way(step: int, done: StepLoss, device: torch.device, kind: str = "text") -> Reading:
    """Start the copy of a micro-batch's losses to the host without waiting for it; `item()` would
    wait for all that was launched since.
    """
    parts = (done.loss, done.parts.ce, done.parts.divergence, *done.drawn.values())
    # One tensor means one copy to the host.
    values = torch.stack([part.detach().float() for part in parts])
    how = (done.ce_weight, tuple(done.drawn), kind)
    there, event = device_of(device).fetch(values)
    return Reading(step, there, done.count, event, *how)


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
    # The teacher's share of the loss is reported as it ends, not as it began.
    if step + 1 > 0.9 * settings.steps:
        progress.hard += _part(reading.ce_weight, ce)
        progress.taught += _part(1 - reading.ce_weight, divergence) + sum(drawn.values())
    rate = learning_rate(step, settings)
    # On its own samples the student's cross-entropy estimates its entropy: no quality to plot.
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
    # The floor keeps the noise of a loss near 0 from counting as divergence.
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
