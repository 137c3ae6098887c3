"""A step never waits for the device: what a host reads of a tensor is counted.

On a GPU `torch.cuda.set_sync_debug_mode` finds every wait (`test_gpu.py`). Here a stand-in counts
the operators that would be one: they give a number, or a shape, that depends on values.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from make_assess_models import tiny
from test_training_loop import CPU, batches_for, hooks, settings
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.settings.distillation import Divergence
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.distillation.losses import Loss
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training.loop import _Loop
from pipeline.training.objective import Objective, Teacher
from pipeline.training.reading import examine

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Waits(TorchDispatchMode):
    """Counts operators by which a host reads values of a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(WAITS):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def step_of(*, taught: bool, precision: Precision, accumulation: int) -> _Loop:
    model = tiny(Task.causal_lm)
    teacher = None
    if taught:
        other = tiny(Task.causal_lm, seed=1).eval().requires_grad_(requires_grad=False)
        # forward_kl asks on a CPU whether its value is finite, and nowhere else
        loss = Loss(0.5, Divergence.jsd, 2.0)
        teacher = Teacher(other, Precision.fp32, loss, examine(other, CPU))
    read = examine(model, CPU)
    objective = Objective(model, Task.causal_lm, precision, CPU, PhaseClock(), teacher, read=read)
    config = settings(gradient_accumulation=accumulation)
    return _Loop.of(
        model, objective, config, PrecisionConfig(name=precision), PhaseClock(), hooks()
    )


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16, Precision.bf16_pure])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_reads_nothing_of_the_device(
    taught: bool, precision: Precision, accumulation: int
) -> None:
    loop = step_of(taught=taught, precision=precision, accumulation=accumulation)
    batches = batches_for(loop.settings)
    loop.step(batches)  # the optimizer makes its state
    with Waits() as waits:
        loop.step(batches)
    # on the host, before anything is sent: which positions have a target, where documents begin
    assert waits.found.pop("nonzero") == 2 * accumulation
    # likewise: how many targets there are, asked for the choice of micro-batches and their weights
    assert waits.found.pop("_local_scalar_dense") == 2 * accumulation
    assert not waits.found


def test_a_wait_is_seen(tmp_path: Path) -> None:
    """A loss that is read where it is made."""
    loop = step_of(taught=False, precision=Precision.fp32, accumulation=1)
    batches = batches_for(loop.settings)
    loop.step(batches)
    with Waits() as usual:
        loop.step(batches)
    right = loop.objective.head_loss

    def reading(*args: Any, **more: Any) -> Any:
        found = right(*args, **more)
        assert float(found[0].detach()) > 0
        return found

    loop.objective.head_loss = reading
    with Waits() as more:
        loop.step(batches)
    assert more.found["_local_scalar_dense"] == usual.found["_local_scalar_dense"] + 1
