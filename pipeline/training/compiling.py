"""Whether a training runs compiled: its own steps decide.

torch.compile takes from seconds to minutes, which a short training never gets back. So `auto` times
a few steps as they are, compiles where the steps that are left could earn it back, times a few
more, and stays with what is faster. Every step counts: none is taken twice. What was found stands
in the checkpoint, and an attempt that goes on takes it over.

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
MOST_GRAPHS = 16  # a model that is compiled for every other shape spends its time compiling


def may_compile(objective: Objective) -> bool:
    """Return whether what an objective calls can be compiled: hooks are not seen inside a graph,
    and what a student writes has every length.
    """
    return objective.writing is None and objective.relations is None


def pays(step_s: float, steps: int) -> bool:
    """Return whether compiling could earn back what it takes over these steps."""
    return MOST_SAVED * step_s * steps > EXPECTED_S


@contextmanager
def as_compiled(objective: Objective, settings: TrainingConfig) -> Generator[None]:
    """Have all that a step calls compiled inside, each at its first call."""
    grows = settings.start_sequence_length is not None or settings.start_batch_size is not None
    bodies = _bodies(objective)
    usual = objective.head_loss
    for body in bodies:
        # None: torch takes a shape as fixed until it meets another
        body.compile(dynamic=True if grows else None)
    if usual is head_loss and not device_of(objective.device).triton:
        objective.head_loss = compiled_head()
    objective.compiled = True
    try:
        yield
    finally:
        for body in bodies:
            body._compiled_call_impl = None  # torch has no public way back
        objective.head_loss, objective.compiled = usual, False


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


def fresh() -> CompileRecord:
    """Return the record of a training of which nothing is known yet."""
    return {
        "chosen": None,
        "why": "",
        "at_step": None,
        "eager_s": None,
        "compiled_s": None,
        "compile_s": None,
        "graphs": 0,
        "breaks": 0,
        "recompiled": 0,
    }


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
    _times: list[float] = field(default_factory=list)
    _seen: int = 0  # steps since times are taken
    _inside: AbstractContextManager[None] | None = None
    _before: tuple[int, int] = (0, 0)  # graphs and breaks of this process when it was compiled
    _first: int = 0  # graphs that its first micro-batch took

    @property
    def is_timing(self) -> bool:
        """Whether the step that follows is timed: the device is to be waited for before and
        after it.
        """
        timed = self._seen + 1 > FIRST and len(self._times) < TIMED
        return timed and self._may_change

    @property
    def _may_change(self) -> bool:
        return self.settings.compile is Compile.auto and self.record["chosen"] is None

    def begin(self, batch: Callable[[], dict[str, Tensor]]) -> None:
        """Compile before the first step, where that is settled."""
        wanted = self.settings.compile
        if self.record["chosen"] is None and wanted is not Compile.always:
            if wanted is Compile.never:
                self._settle("eager", "training.compile=never")
            elif not may_compile(self.objective):
                self._settle("eager", "hooks read it, or what it writes has every length")
        chosen = self.record["chosen"]
        if chosen == "compiled" or (chosen is None and wanted is Compile.always):
            self._compile(batch(), 0)

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
        timed = self.is_timing
        self._seen += 1
        if timed:
            self._times.append(seconds)
        if len(self._times) < TIMED:
            return
        found = statistics.median(self._times)
        if self._inside is None:
            self.record["eager_s"] = found
            if not pays(found, self.settings.steps - step):
                self._settle("eager", "too short for compiling to pay")
                return
            self._compile(batch, step)
            self._seen, self._times = FIRST - 1, []  # the first one may compile a little more
            return
        self.record["compiled_s"] = found
        eager = self.record["eager_s"]
        assert eager is not None
        if found < (1 - LEAST_SAVED) * eager:
            self._settle("compiled", "")
        else:
            self._give_up(f"it is no faster ({found:.3g} s a step, {eager:.3g} s eager)")

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
        started = time.perf_counter()
        self.record["at_step"] = step
        with self.clock.phase("compile"):
            self._inside = as_compiled(self.objective, self.settings)
            self._inside.__enter__()
            self._before = graphs_so_far()
            try:
                _run_once(self.objective, batch)
                device_of(self.objective.device).synchronise()
            # Compilers fail in their own ways; a device that is lost fails the next step too.
            except Exception as error:  # noqa: BLE001
                self._give_up(one_line(error, 160) or type(error).__name__)
                return
            finally:
                self.record["compile_s"] = time.perf_counter() - started
        self._note_graphs()
        self._first, self.record["recompiled"] = self.record["graphs"], 0
        if self.settings.compile is Compile.always:
            self._settle("compiled", "training.compile=always")

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
    try:
        with torch.random.fork_rng():
            loss = objective(batch).loss
            with matmuls(objective.precision, objective.device):
                loss.backward()
    finally:
        objective.clock = usual
        objective.model.zero_grad(set_to_none=True)


def said(record: CompileRecord) -> str | None:
    """Return what a row says of it; None where nothing was tried."""
    if record["at_step"] is None:
        return None
    took, graphs = f"{record['compile_s'] or 0:.0f} s to compile", record["graphs"]
    parts = [took, f"graphs: {graphs}, breaks: {record['breaks']}"]
    if record["recompiled"]:
        parts.append(f"compiled for other shapes: {record['recompiled']}")
    if record["chosen"] != "compiled":
        return f"not compiled ({record['why']}); {'; '.join(parts)}"
    eager, compiled = record["eager_s"], record["compiled_s"]
    if eager is not None and compiled is not None:
        parts.insert(0, f"{compiled:.3g} s a step, {eager:.3g} s eager: {eager / compiled:.2f}x")
    return f"compiled after step {record['at_step']}; {'; '.join(parts)}"
