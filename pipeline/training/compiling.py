"""Whether a training runs compiled: its own steps decide.

torch.compile takes from seconds to minutes, which a short training never gets back. So `auto` times
a few steps as they are, compiles where the steps that are left could earn it back, times a few
more, and stays with what is faster. Where the device captures graphs of its kernels (CUDA graphs)
and every step has one shape, compiled steps are then tried as graphs: starting hundreds of small
kernels costs the host more than a captured step does. Every step counts: none is taken twice. What
was found stands in the checkpoint, and an attempt that goes on takes it over.

Compiled is what a step calls: the body of the model, that of its teacher, and the terms of the loss
where plain torch computes them. Validation, and all that comes after the last step, runs eager.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.config.settings.training import Compile, TrainingConfig
from pipeline.distillation.head import head_loss
from pipeline.distillation.kernels import compiled_head
from pipeline.distillation.transform import Unknown
from pipeline.errors import one_line
from pipeline.ledger.attempted import attempted
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import CompileRecord
from pipeline.training.objective import Objective
from pipeline.training.precision import matmuls

FIRST = 2  # steps that no time is taken of: buffers are made, kernels chosen
TIMED = 3  # steps that are timed, eager and compiled
EXPECTED_S = 20.0  # to compile, before it was tried: a model of four layers takes as long on a CPU
MOST_SAVED = 0.4  # of a step, at best: where even that would not earn it back, nothing is tried
LEAST_SAVED = 0.02  # of a step: what is less may be noise, and eager code is simpler to look into
RECORDED = 3  # runs until a graph is replayed: one as it is, one that is captured, and that
MOST_GRAPHS = 16  # a model that is compiled for every other shape spends its time compiling


# What torch times: a graph, and its gradient where that is compiled later.
OF_A_STEP = ("_compile.compile_inner", "compile_fx.<locals>.bw_compiler")
COMPILED, CAPTURED = "compiled", "captured"  # what a record says was chosen; else eager


def may_compile(objective: Objective) -> bool:
    """Return whether what an objective calls can be compiled: hooks are not seen inside a graph,
    and what a student writes has every length.
    """
    return objective.writing is None and objective.relations is None


def pays(step_s: float, steps: int) -> bool:
    """Return whether compiling could earn back what it takes over these steps."""
    return MOST_SAVED * step_s * steps > EXPECTED_S


@contextmanager
def as_compiled(
    objective: Objective, settings: TrainingConfig, *, captured: bool = False
) -> Generator[None]:
    """Have all that a step calls compiled inside, each at its first call.

    Args:
        captured: Have the bodies' kernels captured as graphs, one for each shape.
    """
    grows = _grows(settings)
    more = {"options": device_of(objective.device).compiled_and_captured} if captured else {}
    bodies = _bodies(objective)
    usual = objective.head_loss
    for body in bodies:
        # None: torch takes a shape as fixed until it meets another
        body.compile(dynamic=True if grows else None, **more)
    if usual is head_loss and not device_of(objective.device).triton:
        objective.head_loss = compiled_head()
    objective.compiled, objective.captured = True, captured
    try:
        yield
    finally:
        for body in bodies:
            body._compiled_call_impl = None  # torch has no public way back
        objective.head_loss = usual
        objective.compiled = objective.captured = False


def _grows(settings: TrainingConfig) -> bool:
    return settings.start_sequence_length is not None or settings.start_batch_size is not None


def may_capture(objective: Objective, settings: TrainingConfig) -> bool:
    """Return whether compiled steps can be tried as graphs: all have one shape, and a gradient is
    read before the next one is computed in its place.
    """
    one_shape = objective.task.kind.is_language and not _grows(settings)
    once = settings.gradient_accumulation == 1
    return device_of(objective.device).captures and one_shape and once


def _bodies(objective: Objective) -> list[Any]:
    """Return the modules that a step calls."""
    models = [(objective.model, objective.head)]
    if objective.teacher is not None:
        models.append((objective.teacher.model, objective.teacher_head))
    is_language = objective.task.kind.is_language
    return [
        model.base_model if is_language and not isinstance(head, Unknown) else model
        for model, head in models
    ]


def graphs_so_far() -> tuple[int, int]:
    """Return how many graphs this process has compiled, and how often one broke off."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def seconds_so_far() -> float:
    """Return how long this process has compiled graphs in all; a graph for another shape is
    compiled in the step that meets it.
    """
    from torch._dynamo.utils import compilation_time_metrics

    return sum(sum(compilation_time_metrics.get(name, ())) for name in OF_A_STEP)


def fresh() -> CompileRecord:
    """Return the record of a training of which nothing is known yet."""
    return {
        "chosen": None,
        "why": "",
        "at_step": None,
        "eager_s": None,
        "compiled_s": None,
        "captured_s": None,
        "compile_s": None,
        "graphs": 0,
        "breaks": 0,
        "recompiled": 0,
    }


@dataclass(slots=True)
class Stopwatch:
    """The median time of a few steps.

    Args:
        first: Steps that are not timed.
    """

    first: int
    _times: list[float] = field(default_factory=list)
    _seen: int = 0

    @property
    def is_timing(self) -> bool:
        """Whether the step that follows is timed."""
        return self._seen >= self.first

    def median(self, seconds: float) -> float | None:
        """Take note of a step; return the median once there are enough."""
        if self.is_timing:
            self._times.append(seconds)
        self._seen += 1
        return statistics.median(self._times) if len(self._times) == TIMED else None


@dataclass(slots=True)
class Compiling:
    """What the loop asks after every step.

    Attributes:
        settings: Of the training.
        record: All that stays of it: in the progress, and so in checkpoints.
        clock: Books what compiling takes.
        say: Tells whoever watches.
    """

    settings: TrainingConfig
    objective: Objective
    record: CompileRecord
    clock: PhaseClock
    say: Callable[[str], None]
    _steps: Stopwatch = field(default_factory=lambda: Stopwatch(FIRST))
    _inside: AbstractContextManager[None] | None = None
    _before: tuple[int, int] = (0, 0)  # graphs and breaks of this process when it was compiled
    _first: int = 0  # graphs that its first micro-batch took
    _spent: float = 0.0  # seconds that this process had compiled, when they were last booked

    @property
    def is_timing(self) -> bool:
        """Whether the step that follows is timed: the device is to be waited for before and
        after it.
        """
        return self._steps.is_timing and self._may_change

    @property
    def is_settled(self) -> bool:
        """Whether steps run from here on as they do now."""
        return not self._may_change

    @property
    def _may_change(self) -> bool:
        return self.record["chosen"] is None

    def untimed(self, why: str) -> None:
        """Choose nothing by time: eager, unless settings say otherwise."""
        if self._may_change and self.settings.compile is Compile.auto:
            self._settle("eager", why)

    def begin(self, batch: Callable[[], dict[str, Tensor]]) -> None:
        """Compile before the first step, where that is settled."""
        wanted = self.settings.compile
        if self.record["chosen"] is None and wanted is not Compile.always:
            if wanted is Compile.never:
                self._settle("eager", "training.compile=never")
            elif not may_compile(self.objective):
                self._settle("eager", "hooks read it, or what it writes has every length")
        chosen = self.record["chosen"]
        if chosen is None:  # an attempt that was stopped while it timed steps: times are taken anew
            self.record["eager_s"] = self.record["compiled_s"] = self.record["captured_s"] = None
        if chosen in (COMPILED, CAPTURED) or (chosen is None and wanted is Compile.always):
            first = batch()
            self._compile(first, self.record["at_step"] or 0)
            if chosen == CAPTURED and self._inside is not None:
                self._capture(first)

    def stepped(self, step: int, seconds: float, batch: dict[str, Tensor]) -> None:
        """Take note of a step.

        Args:
            step: How many were taken.
            seconds: Of this one; the device was waited for where `is_timing`.
            batch: A micro-batch of it.
        """
        self._watch(step)
        if not self._may_change:
            return
        found = self._steps.median(seconds)
        if found is None:
            return
        if self._inside is None:
            self.record["eager_s"] = found
            if not pays(found, self.settings.steps - step):
                self._settle("eager", "too short for compiling to pay")
                return
            self._compile(batch, step)
            self._steps = Stopwatch(FIRST - 1)  # the first one may compile a little more
        elif self.record["compiled_s"] is None:
            self._compare_compiled(found, batch)
        else:
            self._compare_captured(found, batch)

    def _compare_compiled(self, found: float, batch: dict[str, Tensor]) -> None:
        """Take note of a compiled step's seconds: stay with it, or not, or try more."""
        eager, self.record["compiled_s"] = self.record["eager_s"], found
        assert eager is not None
        if found >= (1 - LEAST_SAVED) * eager:
            self._give_up(f"it is no faster ({found:.3g} s a step, {eager:.3g} s eager)")
        elif may_capture(self.objective, self.settings):
            self._capture(batch)
            self._steps = Stopwatch(FIRST - 1)
        else:
            self._settle(COMPILED, "")

    def _compare_captured(self, found: float, batch: dict[str, Tensor]) -> None:
        """Take note of a captured step's seconds, and stay with it or not."""
        compiled, self.record["captured_s"] = self.record["compiled_s"], found
        assert compiled is not None
        if found < (1 - LEAST_SAVED) * compiled:
            self._settle(CAPTURED, "")
        else:
            self._again(batch)
            if self._may_change:
                self._settle(COMPILED, "")

    def end(self) -> None:
        """Run eager from here on."""
        if self._inside is not None:
            self._note_graphs()
            self._inside.__exit__(None, None, None)
            self._inside = None

    def eager(self) -> AbstractContextManager[Any]:
        """Return what validation runs in: a shape that is met once is not worth a graph."""
        if self._inside is None:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _compile(self, batch: dict[str, Tensor], step: int) -> None:
        self.record["at_step"] = step
        why = self._enter(batch)
        if why is not None:
            self._give_up(why)
        elif self.settings.compile is Compile.always:
            self._settle(COMPILED, "training.compile=always")

    def _capture(self, batch: dict[str, Tensor]) -> None:
        """Have compiled steps captured as graphs; they stay as they are where that fails."""
        # a capture that fails leaves torch unable to go on: what waits is not captured
        with device_of(self.objective.device).no_waits():
            why = attempted(lambda: _run_once(self.objective, batch), lambda why: why)
        if why is None:
            own = device_of(self.objective.device)
            before = own.captures_refused()
            self.end()
            why = self._enter(batch, captured=True)
            if why is None and own.captures_refused() > before:
                why = "torch did not capture all of it"
        if why is not None:
            self.say(f"steps go on compiled, without CUDA graphs: {why}")
            self._again(batch)
            if self._may_change:
                self._settle(COMPILED, f"no CUDA graphs: {why}")

    def _again(self, batch: dict[str, Tensor]) -> None:
        """Go back from captured steps to compiled ones; torch kept their code."""
        if self.objective.captured or self._inside is None:
            self.end()
            torch.compiler.reset()  # else the graphs' memory stays
            device_of(self.objective.device).release_memory()
            if (why := self._enter(batch)) is not None:
                self._give_up(why)

    def _enter(self, batch: dict[str, Tensor], *, captured: bool = False) -> str | None:
        """Compile what a step calls; return why that failed, or None."""
        started, spent = time.perf_counter(), self.record["compile_s"] or 0.0
        with self.clock.phase("compile"):
            self._inside = as_compiled(self.objective, self.settings, captured=captured)
            self._inside.__enter__()
            self._before = graphs_so_far()
            try:
                for _ in range(RECORDED if captured else 1):
                    _run_once(self.objective, batch)
                device_of(self.objective.device).synchronise()
            # Compilers fail in their own ways; a device that is lost fails the next step too.
            except Exception as error:  # noqa: BLE001
                return one_line(error, 160) or type(error).__name__
            finally:
                self.record["compile_s"] = spent + time.perf_counter() - started
        self._note_graphs()
        self._first, self.record["recompiled"] = self.record["graphs"], 0
        self._spent = seconds_so_far()
        return None

    def compiled_ns(self) -> int:
        """Return how long the last step compiled: a shape that it met first. It is booked so, and
        is no time of a step.
        """
        if self._inside is None:
            return 0
        before, self._spent = self._spent, seconds_so_far()
        moved = self.clock.rebook(int(1e9 * (self._spent - before)), "forward", "compile")
        self.record["compile_s"] = (self.record["compile_s"] or 0.0) + moved / 1e9
        return moved

    def _note_graphs(self) -> None:
        graphs, breaks = graphs_so_far()
        self.record["graphs"] = graphs - self._before[0]
        self.record["breaks"] = breaks - self._before[1]
        self.record["recompiled"] = self.record["graphs"] - self._first

    def _watch(self, step: int) -> None:
        """Go on eager where a model is compiled again and again."""
        if self._inside is None:
            return
        self._note_graphs()
        if self.record["graphs"] > MOST_GRAPHS:
            self._give_up(f"{self.record['graphs']} graphs after {step} steps, and no end")

    def _give_up(self, why: str) -> None:
        self.end()
        self._settle("eager", why)
        self.say(f"it goes on without torch.compile: {why}")

    def _settle(self, chosen: str, why: str) -> None:
        self.record["chosen"], self.record["why"] = chosen, why


def _run_once(objective: Objective, batch: dict[str, Tensor]) -> None:
    """Run a micro-batch forward and back, so that all is compiled; weights, gradients and random
    numbers stay.
    """
    usual, objective.clock = objective.clock, PhaseClock()  # all of it is compiling
    parts = [part for part in (objective.model, objective.hidden) if part is not None]
    trained = [each for part in parts for each in part.parameters() if each.requires_grad]
    try:
        with device_of(objective.device).kept_generators():
            loss = objective(batch).loss
            with matmuls(objective.precision, objective.device):
                # not `backward`: a gradient that stays would be added to the next step's
                torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        objective.clock = usual


def said(record: CompileRecord) -> str | None:
    """Return what a row says of it; None where nothing was tried."""
    if record["at_step"] is None:
        return None
    took, graphs = f"{record['compile_s'] or 0:.0f} s to compile", record["graphs"]
    parts = [took, f"graphs: {graphs}, breaks: {record['breaks']}"]
    if record["recompiled"]:
        parts.append(f"compiled for other shapes: {record['recompiled']}")
    if record["chosen"] not in (COMPILED, CAPTURED):
        return f"not compiled ({record['why']}); {'; '.join(parts)}"
    eager, compiled = record["eager_s"], record["compiled_s"]
    if eager is not None and compiled is not None:
        parts.insert(0, f"{compiled:.3g} s a step, {eager:.3g} s eager: {eager / compiled:.2f}x")
    captured = record["captured_s"]
    if compiled is not None and captured is not None:
        parts.insert(0, f"{captured:.3g} s a step as CUDA graphs: {compiled / captured:.2f}x")
    how = "compiled, as CUDA graphs," if record["chosen"] == CAPTURED else "compiled"
    return f"{how} after step {record['at_step']}; {'; '.join(parts)}"
