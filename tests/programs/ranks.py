"""A rank of a training in a test: `ranks.py FILE CASE ...`, started once a rank with RANK set.

Rank 0 writes to FILE, as JSON by case, how far the weights that all ranks trained are from those of
one process with the whole batch, as a share of how far that one moved them.
"""

from __future__ import annotations

import copy
import json
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch.distributed import fsdp

sys.path.insert(0, str(Path(__file__).parent.parent))
from make_assess_models import LABELS, random_documents, saved, tiny
from test_teacher_cache import context
from test_training_loop import LENGTHS, batches_for, hooks, settings

from pipeline.config.settings.parallel import Parallel, ParallelConfig
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.quantization import Format
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import OptimizerKind, TrainingConfig
from pipeline.data.batches import IGNORE, PackedBatches
from pipeline.data.prompts import PartlySampled, Prompts
from pipeline.distillation.hidden import HiddenSignal, WithProjections
from pipeline.distillation.losses import Loss
from pipeline.distillation.on_policy import Writing
from pipeline.errors import Preempted
from pipeline.ledger.phases import PhaseClock
from pipeline.quantization.fake import Adapters, fake_quantize
from pipeline.quantization.layers import EVERY_LAYER, plan_layers
from pipeline.stages.context import Output
from pipeline.stages.distill import DistillStage
from pipeline.store.artifacts import Artifact
from pipeline.tasks.table import Task
from pipeline.training import parallel
from pipeline.training.holding import Holding
from pipeline.training.loop import Progress, train
from pipeline.training.objective import Objective, Teacher
from pipeline.training.parallel import Shared, layers_in
from pipeline.training.precision import round_weights
from pipeline.training.ranks import ALONE, Ranks, join, place_in
from pipeline.training.reading import examine, read_alike
from pipeline.training.schedule import first_row, sequence_length
from pipeline.training.shares import is_shared, own_share

CPU = torch.device("cpu")
STEPS = 5
HERE = Holding(CPU)


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


def made(task: Task, held: Holding, **which: Any) -> tuple[Any, Any]:
    """Return a model and how it is read, as a stage has them."""
    model = held.made(lambda: tiny(task, **which))
    if not task.kind.is_language:
        return model, None
    read = held.found(lambda: examine(model, CPU))
    if held.is_apart:
        read_alike(model, read)
    return model, read


def objective_of(
    task: Task, precision: Precision, *, taught: bool, how: str | None = None, held: Holding = HERE
) -> Objective:
    """Return what is minimised.

    Args:
        held: Who makes the models.
        how: What is trained: `frozen` (all but the embeddings), `adapters`, `rounded` (all weights,
            as int8 would round them), `inside` (with projections of hidden states), or `writes`
            (a student that writes); None: all weights.
    """
    model, own = made(task, held)
    if how == "frozen":
        model.get_input_embeddings().weight.requires_grad_(requires_grad=False)
    if how in ("adapters", "rounded"):
        layers = plan_layers(model.config, task, key="format", choice=EVERY_LAYER).quantize
        adapters = Adapters(rank=4, alpha=8.0) if how == "adapters" else None
        torch.manual_seed(5)
        fake_quantize(model, layers, Format.int8_weight_only, torch.float32, adapters)
    teacher = None
    if taught:
        other, read = made(task, held, seed=1)
        other.eval().requires_grad_(requires_grad=False)
        frozen_in = Precision.bf16 if precision is Precision.bf16 else Precision.fp32
        round_weights(other, frozen_in)
        teacher = Teacher(other, frozen_in, Loss(0.5, temperature=2.0), read)
    objective = Objective(model, task, precision, CPU, PhaseClock(), teacher, read=own)
    if how == "inside":
        torch.manual_seed(6)
        width, depth = model.config.hidden_size, model.config.num_hidden_layers
        pairs = [(layer, layer) for layer in range(depth)]
        objective.hidden = HiddenSignal(pairs, (width, width), 0.5)
    if how == "writes":
        objective.writing = Writing(
            length=6, temperature=1.0, vocabulary=257, ends=[10, 32, 101], seed=3
        )
    return objective


def batches_of(config: TrainingConfig, task: Task, how: str | None) -> Any:
    """Return batches of which the first rows have few targets; of a student that writes, prompts in
    two of three steps; of sizes that may grow.
    """
    if task is not Task.causal_lm:
        return batches_for(config, task)
    documents = random_documents(LENGTHS, is_text=True)
    text = PackedBatches(
        documents,
        sequence_length=config.sequence_length,
        batch_size=partial(first_row, settings=config),
        seed=7,
        length_at=lambda step: sequence_length(step, config),
    )
    if how != "writes":
        return Uneven(text)
    prompts = Prompts(documents, longest=8, batch_size=config.batch_size, seed=7)
    return PartlySampled(text, prompts, 0.67, 7)


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
    how: str | None = None,
    offload: bool = False,
    loss_scale: float = 2.0**10,
    resumed: Callable[[int], None] = lambda step: None,
) -> tuple[Objective, Progress]:
    """Train from the same weights on the same batches."""
    config = settings(**{"steps": STEPS, "learning_rate": 1e-2, **(changes or {})})
    held = Holding.of(ranks, mode, CPU)
    objective = objective_of(task, precision, taught=taught, how=how, held=held)
    model: Any = objective.model
    if objective.hidden is not None:
        model = WithProjections(model, objective.hidden)
    taken = iter(range(100))
    # one rank alone is asked to
    stops = stop_after if ranks.rank == ranks.size - 1 else None
    given = hooks(
        should_stop=lambda: Preempted if next(taken) + 1 == stops else None,
        resumed=lambda step, history: resumed(step),
    )
    progress = train(
        model,
        batches_of(config, task, how),
        objective,
        settings=config,
        precision=PrecisionConfig(name=precision, loss_scale=loss_scale),
        folder=folder,
        clock=PhaseClock(),
        hooks=given,
        ranks=ranks,
        parallel=ParallelConfig(mode=mode, offload=offload and ranks.several),
    )
    return objective, progress


def weights(model: Any) -> torch.Tensor:
    return torch.cat([each.detach().flatten().double() for each in model.parameters()])


def flat(saved: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([saved[name].flatten().double() for name in sorted(saved)])


def apart(found: torch.Tensor, wanted: torch.Tensor, start: torch.Tensor) -> float:
    return float((found - wanted).norm() / (wanted - start).norm())


def compare(ranks: Ranks, folder: Path, **how: Any) -> dict[str, Any]:
    """Compare a training by all ranks with one by this process alone."""
    mode = how.pop("mode")
    objective, progress = trained(ranks, folder / "ranks", mode, **how)
    alone, wanted = trained(ALONE, folder / f"alone-{ranks.rank}", **how)
    task, precision = how.get("task", Task.causal_lm), how.get("precision", Precision.fp32)
    begun = objective_of(task, precision, taught=how.get("taught", False), how=how.get("how"))
    models = (objective.model, alone.model, begun.model)
    has_none = mode.shards and not ranks.is_first
    found = {
        "apart": None if has_none else apart(*map(weights, models)),
        "tokens": [progress.tokens, wanted.tokens],
        "loss": [progress.smooth, wanted.smooth],
        "classes": sorted({type(each).__name__ for each in objective.model.modules()}),
        "dtype": str(next(objective.model.parameters()).dtype),
    }
    if mode.shards:
        whole = ranks.gathered([not each.is_meta for each in objective.model.parameters()])
        found["only_first_is_whole"] = all(whole[0]) and not any(map(any, whole[1:]))
    else:
        everywhere = ranks.gathered(weights(objective.model))
        found["same_on_all"] = all(torch.equal(each, everywhere[0]) for each in everywhere)
    return found


def whole_bytes(model: Any) -> int:
    """Return the bytes of the parameters that this rank holds whole."""
    return sum(
        each.nbytes for each in model.parameters() if not is_shared(each) and not each.is_meta
    )


def watched(ranks: Ranks, folder: Path, *, mode: Parallel) -> dict[str, Any]:
    """Return what ranks hold whole while the weights of a student and its teacher are shared, and
    what they hold before the first step.
    """
    told: dict[str, list[int]] = {"student": [], "teacher": []}
    then: dict[str, Any] = {}
    models: dict[str, Any] = {}
    usual, share_all = fsdp.fully_shard, parallel.share

    def note() -> None:
        for name, model in models.items():
            told[name].append(whole_bytes(model))

    def noting(module: Any, **how: Any) -> Any:
        note()  # what is whole is about to be shared
        return usual(module, **how)

    def begun(model: Any, objective: Objective, *more: Any) -> Shared:
        assert objective.teacher is not None
        models.update(student=objective.model, teacher=objective.teacher.model)
        if not ranks.is_first:  # no weights were made, or read, on the others
            note()
        return share_all(model, objective, *more)

    def at_first_step(step: int) -> None:
        model = models["student"]
        own = [own_share(each).nbytes for each in model.parameters()]
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        then.update(
            whole={name: whole_bytes(each) for name, each in models.items()},
            share=sum(own) / sum(each.nbytes for each in tiny(Task.causal_lm).parameters()),
            tied=ends[0].weight is ends[1].weight,
        )

    with patch.object(fsdp, "fully_shard", noting), patch("pipeline.training.loop.share", begun):
        trained(ranks, folder / "watched", mode, taught=True, resumed=at_first_step)
    fresh = dict(tiny(Task.causal_lm).named_buffers())
    then["buffers"] = {
        name: torch.equal(each, fresh[name]) for name, each in models["student"].named_buffers()
    }
    layer = sum(each.nbytes for each in layers_in(tiny(Task.causal_lm))[0].parameters())
    rest = sum(each.nbytes for each in tiny(Task.causal_lm).parameters()) - 2 * layer
    return {"ranks": ranks.gathered({**then, "told": told}), "layer": layer, "rest": rest}


def staged(
    ranks: Ranks, folder: Path, *, mode: Parallel, task: Task = Task.causal_lm
) -> dict[str, Any]:
    """Distil as the stage does, by all ranks and by the first one alone; what others than the first
    are given as files of weights cannot be read.
    """
    if ranks.is_first:
        student = tiny(task)
        with torch.no_grad():  # so that its teacher is the better one
            student.get_input_embeddings().weight.mul_(2)
        saved(student, folder / "base")
        saved(tiny(task, seed=1), folder / "teacher")
        for name in ("base", "teacher"):
            shutil.copytree(folder / name, folder / "bare" / name)
            (folder / "bare" / name / "model.safetensors").write_text("no weights")
    ranks.meet()
    # two random classifiers may be as good as one another
    stage = DistillStage(model="base", allow_weak_teacher=not task.kind.is_language)
    given = random_documents(LENGTHS, is_text=task.kind.is_language)

    def run(ranks: Ranks, at: Path, out: str) -> Output:
        run = Run(
            task=task,
            training=TrainingConfig(steps=STEPS, batch_size=4, sequence_length=16),
            stages={"student": stage},
            precision=PrecisionConfig(name=Precision.fp32),
            parallel=ParallelConfig(mode=mode),
        )
        splits = {"train": [], "validation": []}
        labels = LABELS if task.kind.labelled else None
        data = SimpleNamespace(digest="d" * 32, labels=labels, splits=splits)
        ctx = context(folder / out, run, "student", data=data, ranks=ranks)
        folders = {"model": at / "base", "teacher": at / "teacher"}
        inputs = {name: Artifact(path, "model", "", 0) for name, path in folders.items()}
        return stage.run(inputs, ctx)

    with patch("pipeline.stages.training.encode_all", lambda *_, **__: given):
        ours = run(ranks, folder if ranks.is_first else folder / "bare", f"ranks-{ranks.rank}")
        ranks.meet()
        if not ranks.is_first:
            return {}
        alone = run(ALONE, folder, "alone")
    begun, found, wanted = (
        load_file(folder / name / "model.safetensors")
        for name in ("base", "ranks-0/out", "alone/out")
    )
    return {
        "apart": apart(*map(flat, (found, wanted, begun))),
        "names": [sorted(found), sorted(wanted)],
        "saved_by_others": [path.name for path in (folder / "ranks-1/out").iterdir()],
        "share": [each.counts["distillation_gradient_share"].value for each in (ours, alone)],
    }


def resumed(
    ranks: Ranks,
    folder: Path,
    *,
    first: Parallel,
    then: Parallel,
    alone: bool = False,
    begun_alone: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Compare a training that was stopped after 3 steps and went on with one that was not.

    Args:
        alone: One process goes on with it.
        begun_alone: One process began it.
    """
    how = {"taught": True, **how}
    if not begun_alone or ranks.is_first:
        with suppress(Preempted):
            trained(ALONE if begun_alone else ranks, folder / "ranks", first, stop_after=3, **how)
    ranks.meet()
    files = sorted(path.name for path in max((folder / "ranks").glob("step-*")).iterdir())
    ranks.meet()
    went_on, _ = trained(ALONE if alone else ranks, folder / "ranks", then, **how)
    whole, _ = trained(ranks, folder / "whole", then, **how)
    if then.shards and not ranks.is_first:
        return {}
    found, wanted = weights(went_on.model), weights(whole.model)
    return {
        "apart": apart(found, wanted, weights(tiny(Task.causal_lm))),
        "equal": torch.equal(found, wanted),
        "files": files,
    }


def begun(ranks: Ranks, folder: Path, **how: Any) -> dict[str, Any]:
    """Stop a training after 3 steps; return the files of its checkpoint."""
    with suppress(Preempted):
        trained(ranks, folder, Parallel.fsdp, taught=True, stop_after=3, **how)
    ranks.meet()
    return {"files": sorted(path.name for path in max(folder.glob("step-*")).iterdir())}


def gone_on(ranks: Ranks, folder: Path, *, at: str, **how: Any) -> dict[str, Any]:
    """Compare a training that other ranks began, in the folder `at` beside, with a whole one."""
    resumed: list[int] = []
    went_on, _ = trained(
        ranks, folder.parent / at, Parallel.fsdp, taught=True, resumed=resumed.append, **how
    )
    whole, _ = trained(ranks, folder / "whole", Parallel.fsdp, taught=True, **how)
    assert resumed == [3]
    if not ranks.is_first:
        return {}
    start = weights(tiny(Task.causal_lm))
    return {"apart": apart(weights(went_on.model), weights(whole.model), start)}


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


GROWING: dict[str, Any] = {
    "batch_size": 8,
    "start_batch_size": 2,
    "start_sequence_length": 8,
    "growth_fraction": 0.9,
}
IN_8_BITS: dict[str, Any] = {"optimizer": OptimizerKind.adamw_8bit_torchao}
WRITTEN_BESIDE: dict[str, Any] = {"checkpoint_every": 1, "checkpoint_beside": True}
CASES: dict[str, Callable[[Ranks, Path], dict[str, Any]]] = {
    "fsdp, watched": partial(watched, mode=Parallel.fsdp),
    "fsdp, staged": partial(staged, mode=Parallel.fsdp),
    "fsdp, staged, classes": partial(staged, mode=Parallel.fsdp, task=Task.sequence_classification),
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
    "fsdp, frozen": case(mode=Parallel.fsdp, how="frozen"),
    "fsdp, adapters": case(mode=Parallel.fsdp, taught=True, how="adapters"),
    "fsdp, rounded": case(mode=Parallel.fsdp, taught=True, how="rounded"),
    "fsdp, inside": case(mode=Parallel.fsdp, taught=True, how="inside"),
    "fsdp, writes": case(mode=Parallel.fsdp, taught=True, how="writes"),
    "ddp, writes": case(mode=Parallel.ddp, taught=True, how="writes"),
    "fsdp, bf16": case(mode=Parallel.fsdp, taught=True, precision=Precision.bf16),
    "fsdp, fp16": case(mode=Parallel.fsdp, precision=Precision.fp16),
    "fsdp, fp16 that overflows": case(
        mode=Parallel.fsdp, precision=Precision.fp16, loss_scale=2.0**21
    ),
    "fsdp, offload": case(mode=Parallel.fsdp, taught=True, offload=True),
    "fsdp, growing": case(mode=Parallel.fsdp, changes=GROWING),
    "fsdp, clipped": case(mode=Parallel.fsdp, changes={"max_grad_norm": 0.05}),
    "fsdp, 8 bits": case(mode=Parallel.fsdp, changes=IN_8_BITS),
    "fsdp, 8 bits, resumed": partial(
        resumed, first=Parallel.fsdp, then=Parallel.fsdp, changes=IN_8_BITS
    ),
    "fsdp, 8 bits, resumed alone": partial(
        resumed, first=Parallel.fsdp, then=Parallel.ddp, alone=True, changes=IN_8_BITS
    ),
    "alone, 8 bits, resumed as fsdp": partial(
        resumed, first=Parallel.ddp, then=Parallel.fsdp, begun_alone=True, changes=IN_8_BITS
    ),
    "alone, resumed as fsdp": partial(
        resumed, first=Parallel.ddp, then=Parallel.fsdp, begun_alone=True
    ),
    "fsdp, begun": begun,
    "fsdp, 8 bits, begun": partial(begun, changes=IN_8_BITS),
    "fsdp, gone on": partial(gone_on, at="fsdp"),
    "fsdp, 8 bits, gone on": partial(gone_on, at="fsdp, 8 bits", changes=IN_8_BITS),
    "hsdp, resumed": partial(resumed, first=Parallel.hsdp, then=Parallel.hsdp),
    "hsdp, 8 bits, resumed": partial(
        resumed, first=Parallel.hsdp, then=Parallel.hsdp, changes=IN_8_BITS
    ),
    "ddp, resumed": partial(resumed, first=Parallel.ddp, then=Parallel.ddp),
    "fsdp, resumed": partial(resumed, first=Parallel.fsdp, then=Parallel.fsdp),
    "ddp, resumed beside": partial(
        resumed, first=Parallel.ddp, then=Parallel.ddp, changes=WRITTEN_BESIDE
    ),
    "fsdp, resumed beside": partial(
        resumed, first=Parallel.fsdp, then=Parallel.fsdp, changes=WRITTEN_BESIDE
    ),
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
