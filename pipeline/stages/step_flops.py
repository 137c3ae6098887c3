"""What the steps of a training take in FLOPs; counting them never ends it.

Where a model cannot be counted, its part is estimated by the rule of thumb (6N, of active
parameters), for one purpose: a control that matches compute needs a number of steps. The figure
itself, `model_flops`, is then null with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.data.batches import IGNORE
from pipeline.distillation.transform import Unknown
from pipeline.ledger.attempted import attempted
from pipeline.ledger.flops import (
    FlopsPerSequence,
    active_parameters,
    count_flops,
    expert_shares,
    six_n,
    suspicion,
)
from pipeline.ledger.numbers import count, percent
from pipeline.ledger.values import Value, estimated, measured, null
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch

    from pipeline.distillation.hidden import HiddenSignal
    from pipeline.distillation.relations import RelationSignal
    from pipeline.stages.context import Output
    from pipeline.training.objective import Objective
    from pipeline.training.prefetch import Batches

PLAIN = (bool, int, float, str)
FEW = 8  # steps that an average is taken over
NOTHING = FlopsPerSequence(0.0, 0.0, 0.0)


@dataclass(slots=True)
class ModelFlops:
    """FLOPs of one model.

    Attributes:
        per_sequence: Counted; else by the rule of thumb.
        why: Why it is not counted; None where it is.
        why_no_rule: Why not even the rule of thumb can be computed; `per_sequence` is zero then.
        shares: Of experts that a token visits, by parameter; empty without experts.
        why_no_shares: Why that is unknown: all experts are then taken as active.
    """

    per_sequence: FlopsPerSequence
    why: str | None = None
    why_no_rule: str | None = None
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    why_no_shares: str | None = None

    @classmethod
    def of(cls, model: Any, task: Task, *, backward: bool) -> ModelFlops:
        """Count a model, whatever becomes of it."""
        found = cls(NOTHING)

        def no_shares(why: str) -> Mapping[str, float]:
            found.why_no_shares = why
            return {}

        def no_rule(why: str) -> FlopsPerSequence:
            found.why_no_rule = why
            return NOTHING

        def by_rule(why: str) -> FlopsPerSequence:
            found.why = why
            per_token = lambda: six_n(model, found.shares, backward=backward)
            return attempted(lambda: FlopsPerSequence(0.0, per_token(), 0.0), no_rule)

        key = attempted(lambda: _structure(model, task, backward=backward), lambda _: None)
        if key in _counted:
            return replace(_counted[key])
        # Before the count: the rule of thumb needs the shares where counting fails.
        found.shares = attempted(lambda: expert_shares(model, task), no_shares)
        found.per_sequence = attempted(lambda: count_flops(model, task, backward=backward), by_rule)
        if key is not None and found.why is None and found.why_no_shares is None:
            _counted[key] = replace(found)
        return found

    def active_share(self, model: Any) -> Value:
        """Return the share of the parameters that a token uses; all of them but for a mixture of
        experts.
        """
        if self.why_no_shares is not None:
            return null(f"which experts a token visits is unknown ({self.why_no_shares})")

        def read() -> Value:
            active, whole = active_parameters(model, self.shares)
            return measured(active / whole)

        return attempted(read, null)

    def said(self, model: Any) -> str | None:
        """Return what to say of a mixture of experts, or None."""
        if not self.shares:
            return None

        def read() -> str:
            active, whole = active_parameters(model, self.shares)
            return (
                f"mixture of experts: a token uses {percent(active / whole)} of the parameters "
                f"({count(active)} of {count(whole)}), and model_flops counts these"
            )

        return attempted(
            read,
            lambda why: f"mixture of experts, whose active parameters cannot be counted ({why})",
        )


_counted: dict[str, ModelFlops] = {}
"""Counts of this process, by structure: the arms of a run are mostly models of one shape, and
counting one takes about as long as a dozen small steps."""


def _structure(model: Any, task: Task, *, backward: bool) -> str | None:
    """Return the digest of all that a count depends on: modules, shapes, what is trained.

    None where a module runs code of its own: hooks, or a `forward` put in the place of its class's.
    """
    modules = list(model.named_modules())
    if any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        for _, module in modules
    ):
        return None
    whole = hashlib.sha256(f"{task} {backward} {model.config.to_json_string()}".encode())
    for name, module in modules:
        # plain attributes decide too: how many experts a token visits, a window, a scale
        plain = {key: value for key, value in vars(module).items() if isinstance(value, PLAIN)}
        plain.pop("training", None)  # a count is of the same mode always
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        whole.update(f"{name} {kind} {sorted(plain.items())}\n".encode())
    places: dict[int, int] = {}  # tied weights have one
    for name, weight in model.named_parameters(remove_duplicate=False):
        place = places.setdefault(id(weight), len(places))
        whole.update(f"{name} {place} {tuple(weight.shape)} {weight.requires_grad}\n".encode())
    return whole.hexdigest()


@dataclass(slots=True)
class StepFlops:
    """What a step takes, as it is computed: all positions, padding too, and heads on the targets.

    A model whose logits are held in full has its head on all positions.

    Attributes:
        own: Of the model that is trained, forward and backward.
        teacher: Of a live teacher's forward pass.
        writing: Of the model's forward pass, where it writes.
        hidden: Where hidden states are compared.
        relations: Where relations are.
        full: Whether the model's logits are held in full, and its teacher's.
        why: Why `model_flops` is null: a part is by the rule of thumb; None where all is counted.
        why_no_rule: Why there is not even that.
    """

    own: FlopsPerSequence
    teacher: FlopsPerSequence | None = None
    writing: FlopsPerSequence | None = None
    hidden: HiddenSignal | None = None
    relations: RelationSignal | None = None
    full: tuple[bool, bool] = (False, False)
    why: str | None = None
    why_no_rule: str | None = None

    @classmethod
    def of(cls, objective: Objective) -> StepFlops:
        """Count the models of an objective."""
        return cls.counted(objective, ModelFlops.of(objective.model, objective.task, backward=True))

    @classmethod
    def counted(cls, objective: Objective, own: ModelFlops) -> StepFlops:
        """Count the models of an objective beside its own, which is counted already."""
        task, teacher = (
            objective.task,
            (None if objective.teacher is None else objective.teacher.model),
        )
        of_teacher = None if teacher is None else ModelFlops.of(teacher, task, backward=False)
        writes = (
            None
            if objective.writing is None
            else ModelFlops.of(objective.model, task, backward=False)
        )
        named = {"the model": own, "its teacher": of_teacher, "the model's writing": writes}
        parts = {name: part for name, part in named.items() if part is not None}
        unread = [
            f"{name} cannot be counted ({part.why})"
            for name, part in parts.items()
            if part.why is not None
        ]
        no_rule = [part.why_no_rule for part in parts.values() if part.why_no_rule is not None]
        return cls(
            own.per_sequence,
            None if of_teacher is None else of_teacher.per_sequence,
            None if writes is None else writes.per_sequence,
            objective.hidden,
            objective.relations,
            full=(isinstance(objective.head, Unknown), isinstance(objective.teacher_head, Unknown)),
            why="; ".join(unread) or None,
            why_no_rule="; ".join(no_rule) or None,
        )

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Return the model's own part, which `match_compute` divides by, and all that a teacher
        adds.
        """
        return attempted(lambda: self._priced(batch), self._unpriced)

    def _priced(self, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        rows, length = batch["input_ids"].shape
        targets = int((batch["labels"] != IGNORE).sum())
        # Positions that each head reads
        ours, theirs = (rows * length if full else targets for full in self.full)
        added = 0.0 if self.teacher is None else self.teacher.batch(rows, length, theirs)
        if self.hidden is not None:
            added += self.hidden.flops(rows * length)
        if self.relations is not None:
            added += self.relations.flops(rows, length)
        if self.writing is not None and "sampled" in batch:
            # A batch is written until its longest row ends, so all rows cost as much.
            new = int(batch["sampled"].max())
            added += rows * self.writing.generation(length - new, new)
        return self.own.batch(rows, length, ours), added

    def _unpriced(self, why: str) -> tuple[float, float]:
        """Note that a batch could not be priced: no sum over the steps is one any more."""
        self.why = self.why_no_rule = self.why_no_rule or f"a batch cannot be counted ({why})"
        return 0.0, 0.0

    def own_per_step(self, text: Batches, steps: int) -> float:
        """Return the FLOPs that a step of text takes without a teacher, the mean of the first few:
        windows are of one length.
        """
        first = [self(text.batch(step))[0] for step in range(min(steps, FEW))]
        return sum(first) / len(first)

    def total(self, flops: float) -> Value:
        """Return `model_flops` from the sum over the steps."""
        return estimated(flops) if self.why is None else null(self.why)

    def add_to(self, output: Output, flops: float) -> Output:
        """Return what a stage reports with what `match_compute` needs where nothing is counted."""
        if self.why_no_rule is not None:
            return replace(output, flops_per_step=None, notes=(*output.notes, *self._said()))
        by_rule = None if self.why is None else flops
        return replace(output, flops_by_rule=by_rule, notes=(*output.notes, *self._said()))

    def _said(self) -> list[str]:
        return [] if self.why is None else [f"model_flops is not known: {self.why}"]


def doubt(own: ModelFlops, model: Any, task: Task, length: int) -> str | None:
    """Return what speaks against a count (`suspicion`), or None; nothing where there is none."""
    if own.why is not None or own.why_no_shares is not None:
        return None
    found = lambda: suspicion(own.per_sequence, model, task, length, own.shares)
    return attempted(found, lambda why: f"model_flops could not be checked against 6N ({why})")
