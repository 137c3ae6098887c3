"""A rank of a training in a test: `ranks.py FILE CASE ...`, started once a rank with RANK set.

Rank 0 writes to FILE, as JSON by case, how far the weights that all ranks trained are from those of
one process with the whole batch, as a share of how far that one moved them.
"""

from __future__ import annotations

import copy
import json
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from make_assess_models import tiny
from test_training_loop import batches_for, hooks, settings

from pipeline.config.settings.parallel import Parallel, ParallelConfig
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.data.batches import IGNORE
from pipeline.distillation.losses import Loss
from pipeline.errors import Preempted
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training.loop import Progress, train
from pipeline.training.objective import Objective, Teacher
from pipeline.training.parallel import Shared
from pipeline.training.ranks import ALONE, Ranks, join, place_in
from pipeline.training.reading import examine

CPU = torch.device("cpu")
STEPS = 5


class Uneven:
    """Batches of which the first rows have few targets, and one row of a batch has none."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        batch = dict(self._source.batch(step))
        labels = batch["labels"].clone()
        for row in range(len(labels) // 2):
            labels[row, : 12 - 4 * row] = IGNORE
        if step == 1:
            labels[: len(labels) // 2] = IGNORE  # all that a rank has
        batch["labels"] = labels
        return batch


def objective_of(task: Task, precision: Precision, *, taught: bool) -> Objective:
    model = tiny(task)
    language = task.kind.is_language
    teacher = None
    if taught:
        other = tiny(task, seed=1).eval().requires_grad_(requires_grad=False)
        read = examine(other, CPU) if language else None
        teacher = Teacher(other, Precision.fp32, Loss(0.5, temperature=2.0), read)
    own = examine(model, CPU) if language else None
    return Objective(model, task, precision, CPU, PhaseClock(), teacher, read=own)


def trained(
    ranks: Ranks,
    folder: Path,
    mode: Parallel = Parallel.ddp,
    *,
    task: Task = Task.causal_lm,
    taught: bool = False,
    precision: Precision = Precision.fp32,
    changes: dict[str, Any] | None = None,
    stop_after: int | None = None,
) -> tuple[Objective, Progress]:
    """Train from the same weights on the same batches."""
    config = settings(**{"steps": STEPS, "learning_rate": 1e-2, **(changes or {})})
    objective = objective_of(task, precision, taught=taught)
    batches = batches_for(config, task)
    taken = iter(range(100))
    # one rank alone is asked to
    stops = stop_after if ranks.rank == ranks.size - 1 else None
    given = hooks(should_stop=lambda: Preempted if next(taken) + 1 == stops else None)
    progress = train(
        objective.model,
        Uneven(batches) if task is Task.causal_lm else batches,
        objective,
        settings=config,
        precision=PrecisionConfig(name=precision),
        folder=folder,
        clock=PhaseClock(),
        hooks=given,
        ranks=ranks,
        parallel=ParallelConfig(mode=mode),
    )
    return objective, progress


def weights(model: Any) -> torch.Tensor:
    return torch.cat([each.detach().flatten().double() for each in model.parameters()])


def apart(found: torch.Tensor, wanted: torch.Tensor, start: torch.Tensor) -> float:
    return float((found - wanted).norm() / (wanted - start).norm())


def compare(ranks: Ranks, folder: Path, **how: Any) -> dict[str, Any]:
    """Compare a training by all ranks with one by this process alone."""
    mode = how.pop("mode")
    objective, progress = trained(ranks, folder / "ranks", mode, **how)
    alone, wanted = trained(ALONE, folder / f"alone-{ranks.rank}", **how)
    task = how.get("task", Task.causal_lm)
    found = {
        "apart": apart(*(weights(each) for each in (objective.model, alone.model, tiny(task)))),
        "tokens": [progress.tokens, wanted.tokens],
        "loss": [progress.smooth, wanted.smooth],
        "classes": sorted({type(each).__name__ for each in objective.model.modules()}),
        "dtype": str(next(objective.model.parameters()).dtype),
    }
    everywhere = ranks.gathered(weights(objective.model))
    found["same_on_all"] = all(torch.equal(each, everywhere[0]) for each in everywhere)
    return found


def resumed(
    ranks: Ranks, folder: Path, *, first: Parallel, then: Parallel, alone: bool = False
) -> dict[str, Any]:
    """Compare a training that was stopped after 3 steps and went on with one that was not.

    Args:
        alone: One process goes on with it.
    """
    with suppress(Preempted):
        trained(ranks, folder / "ranks", first, taught=True, stop_after=3)
    ranks.meet()
    went_on, _ = trained(ALONE if alone else ranks, folder / "ranks", then, taught=True)
    whole, _ = trained(ranks, folder / "whole", then, taught=True)
    found, wanted = weights(went_on.model), weights(whole.model)
    return {
        "apart": apart(found, wanted, weights(tiny(Task.causal_lm))),
        "equal": torch.equal(found, wanted),
    }


def without_sums(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What forgetting to average gradients would give."""
    usual = Shared.gradients
    with patch.object(Shared, "gradients", lambda self, *, last: usual(self, last=False)):
        return compare(ranks, folder, mode=Parallel.ddp)


def averaged_by_rank(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What the mean of the ranks' means would give."""
    with patch.object(Shared, "share", lambda self, own, total: 1.0):
        return compare(ranks, folder, mode=Parallel.ddp)


def case(**how: Any) -> Callable[[Ranks, Path], dict[str, Any]]:
    return lambda ranks, folder: compare(ranks, folder, **copy.deepcopy(how))


CASES: dict[str, Callable[[Ranks, Path], dict[str, Any]]] = {
    "ddp": case(mode=Parallel.ddp),
    "ddp, taught": case(mode=Parallel.ddp, taught=True),
    "ddp, in parts": case(mode=Parallel.ddp, changes={"gradient_accumulation": 2}),
    "ddp, bf16_pure": case(mode=Parallel.ddp, precision=Precision.bf16_pure),
    "ddp, classes": case(mode=Parallel.ddp, task=Task.sequence_classification, taught=True),
    "fsdp": case(mode=Parallel.fsdp),
    "fsdp, taught": case(mode=Parallel.fsdp, taught=True),
    "fsdp, in parts": case(mode=Parallel.fsdp, changes={"gradient_accumulation": 2}),
    "fsdp, bf16_pure": case(mode=Parallel.fsdp, precision=Precision.bf16_pure),
    "hsdp, taught": case(mode=Parallel.hsdp, taught=True),
    "ddp, resumed": partial(resumed, first=Parallel.ddp, then=Parallel.ddp),
    "fsdp, resumed": partial(resumed, first=Parallel.fsdp, then=Parallel.fsdp),
    "ddp, resumed as fsdp": partial(resumed, first=Parallel.ddp, then=Parallel.fsdp),
    "fsdp, resumed alone": partial(resumed, first=Parallel.fsdp, then=Parallel.ddp, alone=True),
    "without sums": without_sums,
    "averaged by rank": averaged_by_rank,
}


def main() -> None:
    place = place_in()
    assert place is not None
    torch.set_num_threads(1)
    if place.size == 4:  # as if on two hosts
        socket.gethostname = lambda: f"host-{place.rank // 2}"
    ranks = join(place, backend="gloo", timeout_seconds=60)
    file, names = Path(sys.argv[1]), sys.argv[2:]
    found = {name: CASES[name](ranks, file.parent / name.replace(", ", "-")) for name in names}
    if ranks.is_first:
        file.write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
