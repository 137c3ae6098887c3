"""What a step minimises: hard labels, or hard labels and a teacher. One class per task, one loss definition for both.

Shape legend: B rows, T tokens, N predicted tokens, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.classes import folded, names_in_order
from pipeline.config import Precision, Task
from pipeline.data.batches import IGNORE
from pipeline.data.padding import read_by
from pipeline.data.prompts import PROMPT_MASK
from pipeline.distillation.cache import TeacherCache
from pipeline.distillation.head import Head, Taught, head_loss
from pipeline.distillation.hidden import HiddenSignal
from pipeline.distillation.kernels import HeadLoss
from pipeline.distillation.losses import Loss, Sparse, Sums, terms
from pipeline.distillation.on_policy import Writing, write
from pipeline.distillation.relations import RelationSignal, outputs_of
from pipeline.errors import UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.training.precision import arithmetic, compute_dtype

NOT_INPUTS = ("labels", "windows", "lengths", "sampled")  # of a batch: not what the model reads
HEAD_TOLERANCE = 1e-3  # of fp32 logits against head(hidden); a soft cap or a logit scale is far beyond it


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen model, the arithmetic it runs in, and how its signal is mixed."""

    model: Any
    precision: Precision
    loss: Loss
    masked: bool = False  # whether packed documents are told apart by a mask: see `check_body`


@dataclass(frozen=True, slots=True)
class CachedTeacher:
    """What a teacher once said, and how its signal is mixed. Batches then name their rows: `windows`, (B,)."""

    cache: TeacherCache
    loss: Loss


@dataclass(frozen=True, slots=True)
class StepLoss:
    """What a micro-batch says of the loss.

    Attributes:
        loss: The mean, differentiable.
        parts: Unweighted sums over the targets.
        count: Targets.
        ce_weight: That `parts` were mixed with.
        drawn: The weighted parts of the mean that come from inside the teacher, by name: `hidden`, `relations`.
    """

    loss: Tensor
    parts: Sums
    count: int
    ce_weight: float = 1.0
    drawn: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """Computes the loss of a batch for one task, with or without a teacher."""

    def __init__(
        self, model: Any, task: Task, precision: Precision, device: torch.device, clock: PhaseClock,
        teacher: Teacher | CachedTeacher | None = None, *, masked: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.task, self.precision, self.masked = model, task, precision, masked
        self.device, self.clock = device, clock
        self.teacher = teacher if isinstance(teacher, Teacher) else None
        self.cached = teacher if isinstance(teacher, CachedTeacher) else None
        self.loss = None if teacher is None else teacher.loss
        self.hidden: HiddenSignal | None = None
        self.relations: RelationSignal | None = None
        self.writing: Writing | None = None
        self.losses: Callable[[int], Loss] | None = None  # by step, where the loss changes over the training
        self.head_loss: HeadLoss = head_loss
        self.vocabulary = None if self.teacher is None else shared_vocabulary(model, self.teacher.model, task)
        if self.cached is not None:
            self.vocabulary = self.cached.cache.vocabulary

    def at(self, step: int) -> None:
        """Minimise what is minimised at this step from now on."""
        if self.losses is not None:
            self.loss = self.losses(step)

    def completed(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return a batch as it is, or where it holds prompts, what the model writes after them."""
        if PROMPT_MASK not in batch:
            return batch
        assert self.writing is not None
        with self.clock.phase("generate"), arithmetic(self.precision, self.device):
            prompts, mask = (self._send(batch[name]) for name in ("input_ids", PROMPT_MASK))
            return write(self.model, prompts, mask, self.writing, step)

    def __call__(self, batch: dict[str, Tensor]) -> StepLoss:
        """Return the loss of `batch` (CPU tensors as the batches give them)."""
        said = None
        if self.cached is not None:
            with self.clock.phase("data_wait"):
                said = self.cached.cache.target(batch["windows"].tolist())
        with self.clock.phase("h2d"):
            labels = batch["labels"].flatten()
            keep = (labels != IGNORE).nonzero().flatten()  # on the host: no synchronisation later
            inputs = {name: self._send(tensor) for name, tensor in batch.items() if name not in NOT_INPUTS}
            keep_there, targets = self._send(keep), self._send(labels[keep])
            said = self._send_said(said)
        loss = self.loss
        if loss is not None and "sampled" in batch:  # what it wrote itself is no label to learn
            loss = replace(loss, ce_weight=0.0)
        if self.task is Task.causal_lm:
            assert not isinstance(said, Tensor)
            return self._causal(inputs, keep_there, targets, said, loss)
        assert not isinstance(said, Sparse)
        return self._classes(inputs, keep_there, targets, said, loss)

    def _send_said(self, said: Sparse | Tensor | None) -> Sparse | Tensor | None:
        """Send what a cache holds of a batch."""
        if not isinstance(said, Sparse):
            return None if said is None else self._send(said)
        residual = None if said.residual is None else self._send(said.residual)
        return Sparse(self._send(said.ids), self._send(said.probabilities), self._send(said.entropy), residual)

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()  # out of pageable memory, a copy waits
        return pinned.to(self.device, non_blocking=True)

    def _causal(
        self, inputs: dict[str, Tensor], keep: Tensor, targets: Tensor, said: Sparse | None, loss: Loss | None
    ) -> StepLoss:
        teacher, taught, theirs = self.teacher, said, _Inside()
        every = self.hidden is not None
        with self.clock.phase("forward"):
            wanted = self.masked or (teacher is not None and teacher.masked) or self.relations is not None
            mask = document_mask(inputs["position_ids"]) if wanted else None  # one for both models
        if teacher is not None:
            with self.clock.phase("teacher"), torch.no_grad(), arithmetic(teacher.precision, self.device):
                with self._reading(teacher.model) as theirs.projected:
                    given = _body(teacher.model, inputs, mask if teacher.masked else None, every=every)
                theirs.states = given.hidden_states
                hidden = given.last_hidden_state.flatten(0, 1)[keep]
                taught = Taught(hidden, Head.of(teacher.model), compute_dtype(teacher.precision))
        with self.clock.phase("forward"), arithmetic(self.precision, self.device):
            ours = _Inside()
            with self._reading(self.model) as ours.projected:
                given = _body(self.model, inputs, mask if self.masked else None, every=every)
            ours.states = given.hidden_states
            hidden = given.last_hidden_state.flatten(0, 1)[keep]
            mean, parts = self.head_loss(
                hidden, Head.of(self.model), targets, dtype=compute_dtype(self.precision),
                vocabulary=self.vocabulary, taught=taught, loss=loss,
            )  # fmt: skip
            done = StepLoss(mean, parts, len(targets), 1.0 if loss is None else loss.ce_weight)
            if self.hidden is None and self.relations is None:
                return done
            each = torch.zeros(inputs["input_ids"].numel(), device=self.device)
            each[keep] = 1 / max(len(targets), 1)
            may_read = None if mask is None else mask[:, 0]
            return self._drawn(done, ours, theirs, may_read, each.reshape(inputs["input_ids"].shape))

    def _reading(self, model: Any) -> AbstractContextManager[Sequence[Tensor]]:
        """Have the projections be read that relations are made of; nothing where they are not wanted."""
        if self.relations is None:
            return nullcontext([])
        return outputs_of(self.relations.student if model is self.model else self.relations.teacher)

    def _drawn(
        self, done: StepLoss, ours: _Inside, theirs: _Inside, may_read: Tensor | None, weights: Tensor
    ) -> StepLoss:
        """Return the loss with the parts that the teacher's inside has in it."""
        drawn: dict[str, Tensor] = {}
        if self.hidden is not None:
            drawn["hidden"] = self.hidden.weight * self.hidden(ours.states, theirs.states, weights)
        if self.relations is not None:
            assert may_read is not None
            said = self.relations(ours.projected, theirs.projected, may_read, weights)
            drawn["relations"] = self.relations.weight * said
        return replace(done, loss=done.loss + sum(drawn.values()), drawn=drawn)

    def _classes(
        self, inputs: dict[str, Tensor], keep: Tensor, targets: Tensor, said: Tensor | None, loss: Loss | None
    ) -> StepLoss:
        teacher, teacher_logits, theirs = self.teacher, said, _Inside()
        more = {} if self.hidden is None else {"output_hidden_states": True}
        if teacher is not None:
            with self.clock.phase("teacher"), torch.no_grad(), arithmetic(teacher.precision, self.device):
                with self._reading(teacher.model) as theirs.projected:
                    given = teacher.model(**read_by(teacher.model, inputs), **more)
                theirs.states = given.hidden_states if more else ()
                teacher_logits = given.logits[keep]
        with self.clock.phase("forward"), arithmetic(self.precision, self.device):
            ours = _Inside()
            with self._reading(self.model) as ours.projected:
                given = self.model(**read_by(self.model, inputs), **more)
            ours.states = given.hidden_states if more else ()
            logits = given.logits[keep]
            if teacher_logits is not None:  # of its classes, those of the student come first
                teacher_logits = teacher_logits[:, : logits.shape[1]]
            mixed = loss or Loss()
            with torch.no_grad():
                said_of = None if teacher_logits is None else teacher_logits.float()
                sums, gradient = terms(logits.float(), said_of, targets, mixed)
            value = sums.weighted(mixed) / len(targets)
            # The value of the loss with the gradient just made: one definition serves both tasks.
            surrogate = (logits.float() * (gradient / len(targets))).sum()
            done = StepLoss(surrogate + (value - surrogate).detach(), sums, len(targets), mixed.ce_weight)
            if self.hidden is None and self.relations is None:
                return done
            mask = inputs["attention_mask"]
            each, valid = mask.float() / mask.sum(-1, keepdim=True), mask.bool()
            may_read = valid[:, :, None] & valid[:, None, :]
            return self._drawn(done, ours, theirs, may_read, each / len(each))


@dataclass(slots=True)
class _Inside:
    """What one model computed on the way: each layer's states, and the projections of the layer that is read."""

    states: Sequence[Tensor] = ()
    projected: Sequence[Tensor] = ()


def hidden_states(model: Any, inputs: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """Return the hidden states that the output head reads, (B, T, H).

    Args:
        inputs: `input_ids` and `position_ids`, (B, T); positions begin anew with every document.
        mask: Their `document_mask`. Without one, transformers finds the documents in the positions, and reads on the
            host whether there are several: every step would wait for the device.
    """
    return _body(model, inputs, mask, every=False).last_hidden_state


def _body(model: Any, inputs: dict[str, Tensor], mask: Tensor | None, *, every: bool) -> Any:
    """Return what the model's body gives out; with `every` layer's states as `hidden_states`."""
    more: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    more |= {"output_hidden_states": True} if every else {}
    return model.base_model(**inputs, **more, use_cache=False)


def document_mask(position_ids: Tensor) -> Tensor:
    """Return which position may read which: itself and earlier ones of its document, (B, 1, T, T) bool."""
    document = (position_ids == 0).cumsum(-1)
    same = document[:, :, None] == document[:, None, :]
    return same.tril_()[:, None]


def check_body(model: Any, device: torch.device) -> bool:
    """Refuse a model whose logits are not head(hidden states), or that reads across packed documents.

    Returns:
        Whether `hidden_states` may mask documents for this model: it takes such a mask as it is, and has no layer that
        sees less than all that is before it.

    Raises:
        UserError: If it caps or scales its logits, or does not restart attention where `position_ids` do.
    """
    head = Head.of(model)
    size = min(head.weight.shape[0], model.get_input_embeddings().weight.shape[0])
    first, second = (torch.arange(start, start + 6, device=device).remainder(size) for start in (3, 11))
    pair = {
        "input_ids": torch.cat([first, second])[None],
        "position_ids": torch.arange(6, device=device).repeat(2)[None],
    }
    alone = {"input_ids": second[None], "position_ids": torch.arange(6, device=device)[None]}
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        single, packed = hidden_states(model, alone), hidden_states(model, pair)
        logits = model(**alone).logits
        ours = torch.nn.functional.linear(single, head.weight, head.bias)
        near = HEAD_TOLERANCE * single.abs().max()
        masked = _sees_all(model.config) and _takes_mask(model, pair, torch.cat([packed[:, :6], single], 1), near)
    model.train(training)
    scale = logits.abs().max().clamp(min=1e-6)
    if (logits - ours).abs().max() > HEAD_TOLERANCE * scale:
        raise UserError("model.path", f"{type(model).__name__} changes its logits after the head", "use another model")
    if (packed[:, 6:] - single).abs().max() > near:
        raise UserError("model.path", f"{type(model).__name__} reads across packed documents", "use another model")
    return masked


def _sees_all(config: Any) -> bool:
    """Tell whether no layer looks at a window or chunk only: one mask for all layers would widen it."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    narrow = any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return kinds == {"full_attention"} and not narrow


def _takes_mask(model: Any, pair: dict[str, Tensor], wanted: Tensor, near: Tensor) -> bool:
    try:
        found = hidden_states(model, pair, document_mask(pair["position_ids"]))
    except (RuntimeError, TypeError, ValueError):  # a mask of another shape or type is wanted
        return False
    return bool((found - wanted).abs().max() <= near)


def shared_vocabulary(student: Any, teacher: Any, task: Task) -> int:
    """Return how many outputs both models share; inside one family they may differ by padding.

    Raises:
        UserError: If a classifier has classes that its teacher lacks.
    """
    if task is Task.sequence_classification:
        ours, theirs = names_in_order(student), names_in_order(teacher)
        same = len(ours) == len(theirs)
        if not same and list(map(folded, ours)) != [folded(name) for name in theirs[: len(ours)]]:
            problem = f"has {len(ours)} classes, its teacher {len(theirs)}"
            raise UserError("student", problem, "use models of the same classes")
        return len(ours)
    return min(Head.of(student).weight.shape[0], Head.of(teacher).weight.shape[0])


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse a teacher that numbers tokens differently.

    Raises:
        UserError: Naming the first token that differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    token = next(iter(sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])))[0]
    raise UserError(
        "student.path",
        f"its tokenizer differs from the teacher's (token {token!r}: {ours.get(token)} against {theirs.get(token)})",
        "use a student of the teacher's family",
    )


def parameter_hash(model: Any) -> str:
    """Return a SHA-256 over all parameters and buffers: equal before and after, the model was frozen."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
