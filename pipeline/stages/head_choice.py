"""Which kernel computes a stage's head: the one that is named, or on CUDA the fastest of those that
are right, in chunks of the length that is fastest there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config.settings.distillation import Divergence, HeadKernel
from pipeline.config.settings.training import TrainingConfig
from pipeline.distillation.head import Taught
from pipeline.distillation.kernels import (
    NOT_FOR_LIGER,
    fastest,
    in_turns,
    in_words,
    kernel_of,
    why_not,
)
from pipeline.distillation.transform import Unknown
from pipeline.errors import UserError
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.records import HEAD, read_record
from pipeline.ledger.shapes import HeadChoice
from pipeline.store.artifacts import write_json
from pipeline.training.objective import Objective, columns_of
from pipeline.training.ranks import ALONE, Ranks

FILE = "head.json"
ROWS = (512, 1024, 2048, 4096)  # tokens of a chunk that are tried
MEMORY = 0.1  # of what is free, that a chunk's logits may take
SKEWED = (Divergence.skewed_kl, Divergence.skewed_reverse_kl)


def choose_head(
    key: str,
    wanted: HeadKernel,
    objective: Objective,
    batches: Any,
    settings: TrainingConfig,
    *,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> HeadChoice | None:
    """Have `objective` use a kernel; return what was chosen where there was a choice.

    Probes are for devices with Triton: elsewhere Liger's chunked loss, the one other kernel, has
    never been the faster one (benchmarks/distillation_head.py), and a run would pay for finding
    that out again.

    Args:
        key: Of the setting, for who must change it.
        folder: Of the stage's checkpoints: what was chosen stays there, and an attempt that goes on
            takes it over.
        ranks: Each chooses the same: where there are several, nothing is chosen by its time.

    Raises:
        UserError: If Liger is wanted for models of two vocabularies, or whose logits are more than
            a product.
    """
    if not objective.task.kind.is_language:
        return None
    if wanted is HeadKernel.liger and objective.teacher is not None:
        _refuse_for_liger(key, objective, objective.teacher.model)
    if isinstance(objective.head, Unknown):
        no_effect = f"head={wanted.value} has no effect: logits are held in full"
        said = None if wanted is HeadKernel.auto else no_effect
        return None if said is None else {"kernel": "the model's own", "rows": None, "said": said}
    if not device_of(objective.device).triton:
        if wanted is not HeadKernel.auto:
            objective.head_loss = kernel_of(wanted)
        return None
    path = None if folder is None else folder / FILE
    kept = None
    if path is not None and ranks.is_first:
        kept = read_record(path, HEAD, so="the head's kernel is chosen anew")
    kept = ranks.told(kept)
    untimed = "training.deterministic" if settings.deterministic else "several ranks"
    if kept is not None:
        found = kept
    elif settings.deterministic or ranks.several:
        found = _untimed(wanted, objective, untimed)
    else:
        found = probe_heads(objective, batches, settings, wanted)
    objective.head_loss = kernel_of(HeadKernel(found["kernel"]), found["rows"])
    if path is not None and ranks.is_first:
        write_json(path, dict(found))
    return found


def _untimed(wanted: HeadKernel, objective: Objective, why: str) -> HeadChoice:
    """Return the kernel that is named, else this project's own, in chunks of the usual length."""
    if wanted is HeadKernel.auto:
        has_own = why_not(HeadKernel.triton, objective.device) is None
        wanted = HeadKernel.triton if has_own else HeadKernel.torch
    said = f"the head's kernel is {wanted.value}, untimed: {why}"
    return {"kernel": wanted.value, "rows": None, "said": said}


def _refuse_for_liger(key: str, objective: Objective, teacher: Any) -> None:
    """Refuse heads that Liger's loss does not compute."""
    remedy = "use auto or torch"
    for model, head in ((objective.model, objective.head), (teacher, objective.teacher_head)):
        if isinstance(head, Unknown):
            raise UserError(
                key, f"{NOT_FOR_LIGER}; those of {type(model).__name__} are not", remedy
            )
        if not head.plain:
            problem = f"{NOT_FOR_LIGER}; {type(model).__name__} has {head.in_words()} after it"
            raise UserError(key, problem, remedy)
    sizes = [
        columns_of(objective.model, objective.head),
        columns_of(teacher, objective.teacher_head),
    ]
    if sizes[0] != sizes[1]:
        raise UserError(
            key, f"Liger takes one vocabulary, student and teacher have {sizes}", remedy
        )


def probe_heads(
    objective: Objective,
    batches: Any,
    settings: TrainingConfig,
    wanted: HeadKernel = HeadKernel.auto,
) -> HeadChoice:
    """Time what is there on the first micro-batch: the kernels where none is named, then chunks of
    the fastest one; return what was found. No generator and no weight changes.
    """
    with objective.clock.phase("search"):
        inputs, asked = _asked_of_head(objective, batches, settings)
        chosen, said = wanted, list[str]()
        if wanted is HeadKernel.auto:
            kernels = {
                name: kernel_of(name)
                for name in (HeadKernel.torch, HeadKernel.triton, HeadKernel.liger)
                if why_not(name, objective.device) is None
                and not (name is HeadKernel.liger and _is_not_ligers(objective))
            }
            chosen, found = fastest(kernels, *inputs, **asked)
            said.append(in_words(chosen, found))
        rows, seconds = _fastest_rows(chosen, objective.device, inputs, asked)
        if rows is not None:
            others = ", ".join(f"{n} {1e3 * s:.3g} ms" for n, s in seconds.items() if n != rows)
            said.append(f"chunks of {rows} tokens ({1e3 * seconds[rows]:.3g} ms; {others})")
    return {"kernel": chosen.value, "rows": rows, "said": "; ".join(said) or None}


def _fastest_rows(
    kernel: HeadKernel, device: torch.device, inputs: Any, asked: dict[str, Any]
) -> tuple[int | None, dict[int, float]]:
    """Return the tokens of a chunk that take the least time, and the seconds of each number tried.

    Small chunks read and write the fp32 gradient of the weight more often; large ones take memory,
    of which a share of what is free is given to them.
    """
    own = device_of(device)
    if kernel is HeadKernel.liger or not own.counts_memory:
        return None, {}
    hidden, head, labels = inputs
    taught = asked["taught"]
    columns = len(head.weight) + (len(taught.head.weight) if isinstance(taught, Taught) else 0)
    row_bytes = columns * asked["dtype"].itemsize
    most = min(len(labels), int(MEMORY * own.free_bytes()[0] / row_bytes))
    fitting = [rows for rows in ROWS if rows <= most]
    if len(fitting) < 2:
        return None, {}
    able = {rows: kernel_of(kernel, rows) for rows in fitting}
    in_turns(able, hidden, head, labels, **asked)  # memory is asked for the first time
    seconds = in_turns(able, hidden, head, labels, **asked)
    return min(seconds, key=lambda rows: seconds[rows]), seconds


def _is_not_ligers(objective: Objective) -> bool:
    skewed = objective.loss is not None and objective.loss.divergence in SKEWED
    return skewed or objective.cached is not None


def _asked_of_head(
    objective: Objective, batches: Any, settings: TrainingConfig
) -> tuple[Any, dict[str, Any]]:
    """Return what the objective asks of its head on the first micro-batch; no generator and no
    weight changes.
    """
    asked: list[tuple[Any, dict[str, Any]]] = []
    usual = objective.head_loss

    def noting(*inputs: Any, **settings: Any) -> Any:
        asked.append((inputs, settings))
        return usual(*inputs, **settings)

    # A micro-batch: the shape that the head will meet.
    rows = settings.batch_size // settings.gradient_accumulation
    batch = {name: tensor[:rows] for name, tensor in batches.batch(0).items()}
    objective.head_loss = noting
    # The probe must leave the training as it was, dropout's random numbers included.
    with device_of(objective.device).kept_generators(), torch.no_grad():
        objective(batch)
    objective.head_loss = usual
    (hidden, head, labels), more = asked[0]
    assert more["taught"] is not None
    return (hidden.detach(), head, labels), more
