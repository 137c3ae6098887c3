"""What a step minimises: hard labels, or hard labels and a teacher. One class per task, one loss
definition for both.

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

from pipeline.config.settings.precision import Precision
from pipeline.data.batches import IGNORE
from pipeline.data.padding import logits_of, read_by
from pipeline.data.prompts import PROMPT_MASK
from pipeline.distillation.cache import TeacherCache
from pipeline.distillation.head import Head, Logits, Taught, head_loss, logits_loss
from pipeline.distillation.hidden import HiddenSignal
from pipeline.distillation.kernels import HeadLoss
from pipeline.distillation.losses import Loss, Sparse, Sums, terms
from pipeline.distillation.on_policy import Writing, write
from pipeline.distillation.relations import RelationSignal, outputs_of
from pipeline.distillation.transform import (
    Transform,
    Unknown,
    as_configured,
    copies,
    near,
    nothing_is_zero,
    prove,
    tolerance,
)
from pipeline.errors import UserError
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import PhaseClock
from pipeline.models.classes import listed, names_in_order, same_in_order
from pipeline.tasks.table import Task
from pipeline.training.precision import arithmetic, compute_dtype

NOT_INPUTS = ("labels", "windows", "lengths", "sampled")  # of a batch: not what the model reads
# Settings of transformers' configs that limit how far back a layer reads.
NARROW = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
    "local_attention",
    "window_size",
)
# kinds of layers, as transformers' configs name them
FULL, SLIDING = "full_attention", "sliding_attention"
EXAMINED = 6  # tokens of a document that a model is examined with
# of what one token makes of those after it: less does not come from a token that is read
UNSEEN = 1e-2
# of hidden states, of the largest one, computed twice in fp32 in other company; 16 bits: 4
# roundings
ALIKE = 1e-4


@dataclass(frozen=True, slots=True)
class Examined:
    """How a language model is to be read: what `examine` found.

    Attributes:
        head: What makes logits of its hidden states; `Unknown`: its own forward pass, in full.
        masked: Whether packed documents are separated by a mask; else by positions, by the model
            itself.
        packs: Whether documents may be packed at all; else each has rows of its own, and the model
            reads tokens alone.
    """

    head: Transform | Unknown
    masked: bool
    packs: bool = True


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen model, the arithmetic it runs in, and how its signal is mixed."""

    model: Any
    precision: Precision
    loss: Loss
    masked: bool = False  # whether packed documents are separated by a mask: see `Examined`
    head: Transform | Unknown | None = None  # likewise; None: as its config says
    packs: bool = True  # likewise


@dataclass(frozen=True, slots=True)
class CachedTeacher:
    """What a teacher once said, and how its signal is mixed. Batches then name their rows:
    `windows`, (B,).
    """

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
        drawn: The weighted parts of the mean that come from inside the teacher, by name: `hidden`,
            `relations`.
    """

    loss: Tensor
    parts: Sums
    count: int
    ce_weight: float = 1.0
    drawn: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """Computes the loss of a batch for one task, with or without a teacher."""

    def __init__(
        self,
        model: Any,
        task: Task,
        precision: Precision,
        device: torch.device,
        clock: PhaseClock,
        teacher: Teacher | CachedTeacher | None = None,
        *,
        masked: bool = False,
        packs: bool = True,
        head: Transform | Unknown | None = None,
    ) -> None:
        self.model, self.task, self.precision, self.masked, self.packs = (
            model,
            task,
            precision,
            masked,
            packs,
        )
        self.head = _head(model, task, head)
        self.device, self.clock = device, clock
        self.teacher = teacher if isinstance(teacher, Teacher) else None
        self.cached = teacher if isinstance(teacher, CachedTeacher) else None
        self.loss = None if teacher is None else teacher.loss
        self.hidden: HiddenSignal | None = None
        self.relations: RelationSignal | None = None
        self.writing: Writing | None = None
        # by step, where the loss changes over the training
        self.losses: Callable[[int], Loss] | None = None
        self.head_loss: HeadLoss = head_loss
        self.vocabulary: int | None = None
        self.teacher_head: Transform | Unknown = Transform()
        if self.teacher is not None:
            self.teacher_head = _head(self.teacher.model, task, self.teacher.head)
            # Distributions are compared over the tokens that both models have.
            self.vocabulary = shared_vocabulary(
                model, self.teacher.model, task, self.head, self.teacher_head
            )
        if self.cached is not None:
            self.vocabulary = self.cached.cache.vocabulary

    def at(self, step: int) -> None:
        """Use the loss of this step from now on: temperature and weights may change over a
        training.
        """
        if self.losses is not None:
            self.loss = self.losses(step)

    def full_logits(self, tokens: int) -> list[str]:
        """Return what is to be said of models whose logits are held in full, by the positions of a
        micro-batch.
        """
        said: list[str] = []
        if isinstance(self.head, Unknown):
            said.append(
                full_logits_note(self.model, self.head, tokens, self.precision, trained=True)
            )
        if self.teacher is not None and isinstance(self.teacher_head, Unknown):
            said.append(
                full_logits_note(
                    self.teacher.model, self.teacher_head, tokens, self.teacher.precision
                )
            )
        return said

    def completed(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return a batch as it is; one of prompts with what the model writes after them."""
        if PROMPT_MASK not in batch:
            return batch
        assert self.writing is not None
        with self.clock.phase("generate"), arithmetic(self.precision, self.device):
            prompts, mask = (self._send(batch[name]) for name in ("input_ids", PROMPT_MASK))
            return write(self.model, prompts, mask, self.writing, step)

    def __call__(self, batch: dict[str, Tensor]) -> StepLoss:
        """Return the loss of `batch`.

        Args:
            batch: CPU tensors as the batches give them: `input_ids`, (B, T) int64, and what the
                task has beside them; `labels` are (B, T) with `IGNORE` where nothing is predicted,
                or (B,) of examples; with a cache also `windows`, (B,).
        """
        said = None
        if self.cached is not None:
            with self.clock.phase("data_wait"):
                said = self.cached.cache.target(batch["windows"].tolist())
        with self.clock.phase("h2d"):
            # (B * T,)
            labels = batch["labels"].flatten()
            # (N,): positions with a target. The head sees no others.
            keep = (labels != IGNORE).nonzero().flatten()  # on the host: no synchronisation later
            inputs = {
                name: self._send(tensor) for name, tensor in batch.items() if name not in NOT_INPUTS
            }
            keep_there, targets = self._send(keep), self._send(labels[keep])
            said = self._send_said(said)
        loss = self.loss
        if loss is not None and "sampled" in batch:  # what it wrote itself is no label to learn
            loss = replace(loss, ce_weight=0.0)
        if self.task.kind.is_language:
            assert not isinstance(said, Tensor)
            return self._causal(inputs, keep_there, targets, said, loss)
        assert not isinstance(said, Sparse)
        if not self.task.kind.has_classes:
            return self._numbers(inputs, keep_there, targets)
        return self._classes(inputs, keep_there, targets, said, loss)

    def _send_said(self, said: Sparse | Tensor | None) -> Sparse | Tensor | None:
        """Send what a cache holds of a batch."""
        if not isinstance(said, Sparse):
            return None if said is None else self._send(said)
        residual = None if said.residual is None else self._send(said.residual)
        return Sparse(
            self._send(said.ids), self._send(said.probabilities), self._send(said.entropy), residual
        )

    def _send(self, tensor: Tensor) -> Tensor:
        return device_of(self.device).send(tensor)

    def _causal(
        self,
        inputs: dict[str, Tensor],
        keep: Tensor,
        targets: Tensor,
        said: Sparse | None,
        loss: Loss | None,
    ) -> StepLoss:
        teacher, taught, theirs = self.teacher, said, _Inside()
        every = self.hidden is not None
        with self.clock.phase("forward"):
            wanted = (
                self.masked
                or (teacher is not None and teacher.masked)
                or self.relations is not None
            )
            mask = document_mask(inputs["position_ids"]) if wanted else None  # one for both models
        if teacher is not None:
            with (
                self.clock.phase("teacher"),
                torch.no_grad(),
                arithmetic(teacher.precision, self.device),
            ):
                with self._reading(teacher.model) as theirs.projected:
                    read = mask if teacher.masked else None
                    theirs_in = read_inputs(inputs, packs=teacher.packs)
                    given = _given(teacher.model, self.teacher_head, theirs_in, read, every=every)
                theirs.states = given.hidden_states if every else ()
                if isinstance(self.teacher_head, Unknown):
                    # (N, V)
                    taught = Logits(given.logits.flatten(0, 1)[keep])
                else:
                    # (N, H_t)
                    hidden = given.last_hidden_state.flatten(0, 1)[keep]
                    head = Head.of(teacher.model, self.teacher_head)
                    taught = Taught(hidden, head, compute_dtype(teacher.precision))
        with self.clock.phase("forward"), arithmetic(self.precision, self.device):
            ours = _Inside()
            with self._reading(self.model) as ours.projected:
                ours_in = read_inputs(inputs, packs=self.packs)
                given = _given(
                    self.model, self.head, ours_in, mask if self.masked else None, every=every
                )
            ours.states = given.hidden_states if every else ()
            more: dict[str, Any] = {"vocabulary": self.vocabulary, "taught": taught, "loss": loss}
            if isinstance(self.head, Unknown):
                mean, parts = logits_loss(given.logits.flatten(0, 1)[keep], targets, **more)
            else:
                hidden, head = (
                    given.last_hidden_state.flatten(0, 1)[keep],
                    Head.of(self.model, self.head),
                )
                dtype = compute_dtype(self.precision)
                mean, parts = self.head_loss(hidden, head, targets, dtype=dtype, **more)
            done = StepLoss(mean, parts, len(targets), 1.0 if loss is None else loss.ce_weight)
            if self.hidden is None and self.relations is None:
                return done
            # Weights of positions, (B, T), summing to 1: the signals from inside count the same
            # positions as the loss.
            each = torch.zeros(inputs["input_ids"].numel(), device=self.device)
            each[keep] = 1 / max(len(targets), 1)
            # (B, 1, T, T) without the dimension of heads
            may_read = None if mask is None else mask[:, 0]
            return self._drawn(
                done, ours, theirs, may_read, each.reshape(inputs["input_ids"].shape)
            )

    def _read(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return a classifier's logits (B, C), and its states where they are wanted; those are of
        padded batches.
        """
        if self.hidden is None and self.relations is None:
            return logits_of(model, inputs), ()
        more = {} if self.hidden is None else {"output_hidden_states": True}
        given = model(**read_by(model, inputs), **more)
        return given.logits, given.hidden_states if more else ()

    def _reading(self, model: Any) -> AbstractContextManager[Sequence[Tensor]]:
        """Have the projections be read that relations are made of; nothing where they are not
        wanted.
        """
        if self.relations is None:
            return nullcontext([])
        return outputs_of(self.relations.student if model is self.model else self.relations.teacher)

    def _drawn(
        self,
        done: StepLoss,
        ours: _Inside,
        theirs: _Inside,
        may_read: Tensor | None,
        weights: Tensor,
    ) -> StepLoss:
        """Return the loss with the parts for hidden states and attention relations added."""
        drawn: dict[str, Tensor] = {}
        if self.hidden is not None:
            drawn["hidden"] = self.hidden.weight * self.hidden(ours.states, theirs.states, weights)
        if self.relations is not None:
            assert may_read is not None
            said = self.relations(ours.projected, theirs.projected, may_read, weights)
            drawn["relations"] = self.relations.weight * said
        return replace(done, loss=done.loss + sum(drawn.values()), drawn=drawn)

    def _numbers(self, inputs: dict[str, Tensor], keep: Tensor, targets: Tensor) -> StepLoss:
        """Return the loss of a task without classes: its own, which no teacher has a part in."""
        with self.clock.phase("forward"), arithmetic(self.precision, self.device):
            logits = logits_of(self.model, inputs)[keep]
            total = self.task.kind.loss(logits.float(), targets)
        parts = Sums(total.detach(), torch.zeros_like(total))
        return StepLoss(total / len(targets), parts, len(targets))

    def _classes(
        self,
        inputs: dict[str, Tensor],
        keep: Tensor,
        targets: Tensor,
        said: Tensor | None,
        loss: Loss | None,
    ) -> StepLoss:
        teacher, teacher_logits, theirs = self.teacher, said, _Inside()
        if teacher is not None:
            with (
                self.clock.phase("teacher"),
                torch.no_grad(),
                arithmetic(teacher.precision, self.device),
            ):
                with self._reading(teacher.model) as theirs.projected:
                    teacher_logits, theirs.states = self._read(teacher.model, inputs)
                teacher_logits = teacher_logits[keep]
        with self.clock.phase("forward"), arithmetic(self.precision, self.device):
            ours = _Inside()
            with self._reading(self.model) as ours.projected:
                logits, ours.states = self._read(self.model, inputs)
            logits = logits[keep]
            if teacher_logits is not None:  # of its classes, those of the student come first
                teacher_logits = teacher_logits[:, : logits.shape[1]]
            mixed = loss or Loss()
            with torch.no_grad():
                said_of = None if teacher_logits is None else teacher_logits.float()
                sums, gradient = terms(logits.float(), said_of, targets, mixed)
            value = sums.weighted(mixed) / len(targets)
            # The value of the loss with the gradient just made: one definition serves both tasks.
            surrogate = (logits.float() * (gradient / len(targets))).sum()
            done = StepLoss(
                surrogate + (value - surrogate).detach(), sums, len(targets), mixed.ce_weight
            )
            if self.hidden is None and self.relations is None:
                return done
            mask = inputs["attention_mask"]
            # Every example weighs the same, however many tokens it has.
            each, valid = mask.float() / mask.sum(-1, keepdim=True), mask.bool()
            # (B, T, T)
            may_read = valid[:, :, None] & valid[:, None, :]
            return self._drawn(done, ours, theirs, may_read, each / len(each))


@dataclass(slots=True)
class _Inside:
    """What one model computed on the way: the states of each layer, and the projections (queries,
    keys, values) of the layer that relations are read from.
    """

    states: Sequence[Tensor] = ()
    projected: Sequence[Tensor] = ()


def read_inputs(inputs: dict[str, Tensor], *, packs: bool) -> dict[str, Tensor]:
    """Return what of a batch a model reads: where it takes no packed documents, tokens alone, as it
    is served.
    """
    return inputs if packs else {"input_ids": inputs["input_ids"]}


def hidden_states(model: Any, inputs: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """Return the hidden states that the output head reads, (B, T, H).

    Args:
        inputs: `input_ids` and `position_ids`, (B, T); positions begin anew with every document.
        mask: Their `document_mask`. Without one, transformers finds the documents in the positions,
            and reads on the host whether there are several: every step would wait for the device.
    """
    return _run(model.base_model, inputs, mask, every=False).last_hidden_state


def full_logits(model: Any, inputs: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """Return the model's own logits of all positions, (B, T, V); of inputs and mask as
    `hidden_states` has them.
    """
    return _run(model, inputs, mask, every=False).logits


def _given(
    model: Any,
    head: Transform | Unknown,
    inputs: dict[str, Tensor],
    mask: Tensor | None,
    *,
    every: bool,
) -> Any:
    """Return what the model's body gives out, or all of it where its head is unknown; with `every`
    layer's states.
    """
    return _run(model if isinstance(head, Unknown) else model.base_model, inputs, mask, every=every)


def _run(module: Any, inputs: dict[str, Tensor], mask: Tensor | None, *, every: bool) -> Any:
    more: dict[str, Any] = {} if mask is None else {"attention_mask": _as_read_by(module, mask)}
    more |= {"output_hidden_states": True} if every else {}
    return module(**copies(inputs), **more, use_cache=False)


def document_mask(position_ids: Tensor) -> Tensor:
    """Return which position may read which: itself and earlier ones of its document, (B, 1, T, T)
    bool.
    """
    # Positions begin anew with each document, so every 0 starts one: (B, T) numbers of documents.
    document = (position_ids == 0).cumsum(-1)
    # (B, T, T); its lower triangle leaves out later tokens.
    same = document[:, :, None] == document[:, None, :]
    return same.tril_()[:, None]


def _as_read_by(module: Any, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """Return a mask in the form that a model takes: by kind of layer where it has several, added
    where it is eager.

    Attention that transformers computes eagerly adds its mask to the scores; a bool would add 0 and
    1.
    """
    config = module.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    is_eager = module.config._attn_implementation == "eager"
    if len(kinds) < 2:
        return _added(mask) if is_eager else mask
    masks: dict[str, Tensor] = {
        kind: _within(mask, config.sliding_window) if kind == SLIDING else mask for kind in kinds
    }
    return {kind: _added(each) for kind, each in masks.items()} if is_eager else masks


def _within(mask: Tensor, window: int) -> Tensor:
    """Return a mask of which a position reads the last `window` positions alone, itself
    included.
    """
    at = torch.arange(mask.shape[-1], device=mask.device)
    return mask & (at[:, None] - at[None, :] < window)


def _added(mask: Tensor) -> Tensor:
    """Return what is added to scores in place of a bool mask, fp32."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(
        ~mask, torch.finfo(torch.float32).min
    )


def examine(model: Any, device: torch.device) -> Examined:
    """Find out on a few tokens how a model's logits and packed documents are to be had; the model
    stays as it is.

    Documents are packed where that changes nothing: where the model gives the same of tokens with
    positions as without, and where a mask or the positions keep one document from the next. Any
    other model reads a document a row.

    Raises:
        UserError: If its logits are not finite, if it gives others each time, or if it reads later
            tokens.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            document = _document(model, 11, device)
            alone = read_inputs(document, packs=False)
            _check_logits(model, alone)
            with nothing_is_zero(model):
                if _takes_positions(model, document):
                    head = prove(model, document)
                    masked = _documents_are_masked(model, head, device)
                    if masked is not None:
                        return Examined(head, masked)
                _check_reads_back(model, alone)
                return Examined(prove(model, alone), masked=False, packs=False)
    finally:
        model.train(training)


def _document(model: Any, start: int, device: torch.device) -> dict[str, Tensor]:
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(start, start + EXAMINED, device=device).remainder(size)
    return {"input_ids": ids[None], "position_ids": torch.arange(EXAMINED, device=device)[None]}


def _check_logits(model: Any, document: dict[str, Tensor]) -> None:
    """Refuse a model of whose own logits nothing can be learnt."""
    # Twice, to notice a model that draws at random even in evaluation mode.
    first, second = (full_logits(model, document) for _ in range(2))
    # A model may rule single tokens out with -inf, but not all of a row.
    if first.isnan().any() or first.isinf().all(-1).any():
        problem = f"{type(model).__name__} gives logits that are no numbers for ordinary tokens"
        raise UserError("model.path", problem, "check its weights: some may be NaN or infinite")
    if not near(first, second, tolerance(first.dtype)):
        raise UserError(
            "model.path",
            f"{type(model).__name__} gives other logits each time",
            "use another model",
        )


def _takes_positions(model: Any, document: dict[str, Tensor]) -> bool:
    """Return whether a model gives the same logits of tokens with their positions as it does
    without.
    """
    plain = full_logits(model, read_inputs(document, packs=False))
    try:
        placed = full_logits(model, document)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError):
        return False
    return near(placed, plain, tolerance(plain.dtype))


def _check_reads_back(model: Any, document: dict[str, Tensor]) -> None:
    """Refuse a model that reads later tokens: behind a document stands padding."""
    ids = document["input_ids"]
    # More tokens behind the same document must not change what stands before them.
    padded = {"input_ids": torch.cat([ids, ids.flip(-1)], -1)}
    alone, before = full_logits(model, document), full_logits(model, padded)[:, : ids.shape[1]]
    if not near(before, alone, max(ALIKE, tolerance(alone.dtype))):
        problem = f"{type(model).__name__} reads later tokens of a row: nothing is left to predict"
        raise UserError("model.path", problem, "use a causal language model")


def _documents_are_masked(
    model: Any, head: Transform | Unknown, device: torch.device
) -> bool | None:
    """Return whether a mask tells two packed documents apart: the second then is as it is alone.

    Positions that begin anew do it otherwise: False; None where neither does.
    """
    read = full_logits if isinstance(head, Unknown) else hidden_states
    # Two documents of other tokens, packed into one row.
    each = [_document(model, start, device) for start in (3, 11)]
    pair = {name: torch.cat([document[name] for document in each], -1) for name in each[0]}
    alone = torch.cat([read(model, document) for document in each], 1)
    allowed = _unseen(model, read, each[1], alone)

    def by_mask() -> bool:
        positions = pair["position_ids"]
        right, shifted = (
            # The mask of shifted positions puts the boundary in the wrong place. Where it gives the
            # same, the model does not look at masks.
            _masked(model, read, pair, document_mask(each))
            for each in (positions, positions.roll(1))
        )
        equal = [each is not None and near(each, alone, allowed) for each in (right, shifted)]
        return equal == [True, False]  # it is right, and looks at the mask

    def by_positions() -> bool:
        return near(read(model, pair), alone, allowed)

    kinds = _kinds(model.config)
    if kinds == {FULL} and by_mask():
        return True
    if by_positions():
        return False
    return True if kinds == {FULL, SLIDING} and by_mask() else None  # one mask a kind of layer


def _unseen(
    model: Any, read: Callable[..., Tensor], document: dict[str, Tensor], alone: Tensor
) -> float:
    """Return the share of the largest value that two readings may differ by though no token more is
    read.

    Small beside what the first token of a document makes of the others, and no smaller than
    rounding.
    """
    # Change the first token and see how far its influence goes.
    other = document["input_ids"].clone()
    other[:, 0] = other[:, -1]
    changed = read(model, {**document, "input_ids": other})
    made = (changed - alone[:, EXAMINED:])[:, 1:].abs().max() / alone.abs().max()
    rounding = torch.finfo(alone.dtype).eps
    return max(32 * rounding, min(max(ALIKE, 4 * rounding), UNSEEN * float(made)))


def _kinds(config: Any) -> set[str]:
    """Return what kinds of layers a mask of ours can serve: those that see all, and those that see
    a window.

    Empty where there are others: chunks, or a window in every layer of a model that names no kinds.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [FULL])
    narrow = [name for name in NARROW if getattr(text, name, None)]
    if kinds == {FULL} and not narrow:
        return kinds
    return kinds if kinds == {FULL, SLIDING} and narrow in ([], ["sliding_window"]) else set()


def _masked(
    model: Any, read: Callable[..., Tensor], pair: dict[str, Tensor], mask: Tensor
) -> Tensor | None:
    """Return what a model makes of two documents under a mask; None where it takes none of this
    shape or type.
    """
    try:
        return read(model, pair, mask)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return None


def full_logits_note(
    model: Any, head: Unknown, tokens: int, precision: Precision, *, trained: bool = False
) -> str:
    """Return what is said of a model whose logits are held in full, with the memory that they take.

    Args:
        tokens: Positions of a micro-batch.
        trained: Whether their gradient is held as well.
    """
    size = tokens * head.columns * compute_dtype(precision).itemsize * (2 if trained else 1)
    what = "logits and their gradient" if trained else "logits"
    return (
        f"{type(model).__name__}: {what} are held in full, {size / 2**20:,.0f} MiB a micro-batch at"
        f" least, because {head.why}"
    )


def _head(model: Any, task: Task, head: Transform | Unknown | None) -> Transform | Unknown:
    """Return how a model's logits are to be had; one that was not examined is taken at its config's
    word.
    """
    return as_configured(model) if head is None and task.kind.is_language else head or Transform()


def columns_of(model: Any, head: Transform | Unknown) -> int:
    """Return how many logits a language model gives of a token: the last dimension of (B, T, V)."""
    return head.columns if isinstance(head, Unknown) else Head.of(model, head).columns


def shared_vocabulary(
    student: Any,
    teacher: Any,
    task: Task,
    ours: Transform | Unknown | None = None,
    theirs: Transform | Unknown | None = None,
) -> int:
    """Return how many outputs both models share; inside one family they may differ by padding.

    Args:
        ours: The student's head, where it was examined.
        theirs: The teacher's.

    Raises:
        UserError: If a classifier has classes that its teacher lacks.
    """
    if task.kind.labelled:
        own, taught = names_in_order(student), names_in_order(teacher)
        if len(own) > len(taught) or not same_in_order(student, teacher, len(own)):
            problem = (
                f"has {len(own)} classes, its teacher {len(taught)}: {listed(student)} against"
                f" {listed(teacher)}"
            )
            raise UserError("student", problem, "use models of the same classes")
        return len(own)
    return min(
        columns_of(student, _head(student, task, ours)),
        columns_of(teacher, _head(teacher, task, theirs)),
    )


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse a teacher that numbers tokens differently.

    Raises:
        UserError: Naming the first token that differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    # The differing token of the lowest number: the same one every time.
    token = next(iter(sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])))[0]
    raise UserError(
        "student.path",
        f"its tokenizer differs from the teacher's (token {token!r}: {ours.get(token)} against"
        f" {theirs.get(token)})",
        "use a student of the teacher's family",
    )


def parameter_hash(model: Any) -> str:
    """Return a SHA-256 over the bytes of all parameters and buffers: equal before and after, the
    model was frozen.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode())
        # As bytes, because numpy has no bfloat16.
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
