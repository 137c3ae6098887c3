"""What a step minimises: hard labels, or hard labels and a teacher. One class per task, one loss
definition for both.

Shape legend: B rows, T tokens, N predicted tokens, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from pipeline.distillation.on_policy import Split, Writing, write
from pipeline.distillation.relations import RelationSignal, outputs_of
from pipeline.distillation.transform import Transform, Unknown, as_configured
from pipeline.errors import UserError
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.phases import PhaseClock
from pipeline.models.classes import listed, names_in_order, same_in_order
from pipeline.tasks.table import Task
from pipeline.training.precision import arithmetic, compute_dtype
from pipeline.training.reading import Documents, Examined, prompts_told, read_inputs, run
from pipeline.training.shares import whole_of

HASHED = 2**22  # words of a tensor at a time
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_MULTIPLIER = -7046029254386353131  # the golden ratio's bits, as Fibonacci hashing takes them
NOT_INPUTS = ("labels", "windows", "lengths", "sampled")  # of a batch: not what the model reads


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen model, the arithmetic it runs in, and how its signal is mixed."""

    model: Any
    precision: Precision
    loss: Loss
    read: Examined | None = None  # how it is to be read; None: as its config says


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
        read: Examined | None = None,
    ) -> None:
        self.model, self.task, self.precision = model, task, precision
        self.read = _read(model, task, read)
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
        # set by `training.compiling`, which also compiles what is called, or has it captured
        self.compiled = self.captured = False
        self.overlaps = False  # set by `training.overlapping`: the teacher runs beside the model
        self.vocabulary: int | None = None
        self.teacher_read = Examined()
        if self.teacher is not None:
            self.teacher_read = _read(self.teacher.model, task, self.teacher.read)
            # Distributions are compared over the tokens that both models have.
            self.vocabulary = shared_vocabulary(
                model, self.teacher.model, task, self.head, self.teacher_head
            )
        if self.cached is not None:
            self.vocabulary = self.cached.cache.vocabulary

    @property
    def head(self) -> Transform | Unknown:
        """What makes logits of the model's hidden states."""
        return self.read.head

    @property
    def teacher_head(self) -> Transform | Unknown:
        """What makes logits of the teacher's; nothing is done to them where there is none."""
        return self.teacher_read.head

    def at(self, step: int) -> None:
        """Use the loss of this step from now on: temperature and weights may change over a
        training.
        """
        if self.losses is not None:
            self.loss = self.losses(step)
        if self.captured:  # what the graphs of the last step gave out may be overwritten
            torch.compiler.cudagraph_mark_step_begin()

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

    def completed(
        self, batch: dict[str, Tensor], step: int, split: Split | None = None
    ) -> dict[str, Tensor]:
        """Return a batch as it is; one of prompts with what the model writes after them.

        Args:
            split: How several write the rows; None: this process writes all.
        """
        if PROMPT_MASK not in batch:
            return batch
        assert self.writing is not None
        with self.clock.phase("generate"), arithmetic(self.precision, self.device):
            prompts, mask = (self._send(batch[name]) for name in ("input_ids", PROMPT_MASK))
            own = batch[PROMPT_MASK] if split is None else batch[PROMPT_MASK][split.rows]
            told = prompts_told(self.model, self.read, self.precision, own)
            return write(self.model, prompts, mask, self.writing, step, told, split)

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
            with self.clock.phase("h2d"):
                documents = Documents.of(
                    inputs["position_ids"], batch["position_ids"], few_sizes=self.captured
                )
                if self.compiled:
                    documents.vary()
            return self._causal(inputs, documents, keep_there, targets, said, loss)
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
        documents: Documents,
        keep: Tensor,
        targets: Tensor,
        said: Sparse | None,
        loss: Loss | None,
    ) -> StepLoss:
        teacher, taught, theirs = self.teacher, said, _Inside()
        every = self.hidden is not None
        # before the teacher starts beside the model: what both are told is made once
        told = documents.told(self.model, self.read, self.precision)
        if teacher is not None:
            told_it = documents.told(teacher.model, self.teacher_read, teacher.precision)
            with self._taught_by(teacher):
                with self._reading(teacher.model) as theirs.projected:
                    given = self._given(teacher.model, self.teacher_read, inputs, told_it)
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
                given = self._given(self.model, self.read, inputs, told)
            self._join()
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
            may_read = None if self.relations is None else documents.mask[:, 0]
            return self._drawn(
                done, ours, theirs, may_read, each.reshape(inputs["input_ids"].shape)
            )

    @contextmanager
    def _taught_by(self, teacher: Teacher) -> Generator[None]:
        """Compute inside as a teacher does, beside the model where that was found faster."""
        own = device_of(self.device)
        with (
            self.clock.phase("teacher"),
            own.beside() if self.overlaps else nullcontext(),
            torch.no_grad(),
            arithmetic(teacher.precision, self.device),
        ):
            yield

    def _join(self) -> None:
        """Have the loss wait for what the teacher says."""
        if self.overlaps:
            device_of(self.device).join()

    def _given(
        self, model: Any, read: Examined, inputs: dict[str, Tensor], told: dict[str, Any]
    ) -> Any:
        """Return what a language model's body gives out, or all of it where its head is unknown;
        with every layer's states where they are wanted.

        Args:
            told: Of the packed documents.
        """
        module = model if isinstance(read.head, Unknown) else model.base_model
        return run(module, read_inputs(inputs, read), told, every=self.hidden is not None)

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
            with self._taught_by(teacher):
                with self._reading(teacher.model) as theirs.projected:
                    teacher_logits, theirs.states = self._read(teacher.model, inputs)
                teacher_logits = teacher_logits[keep]
        with self.clock.phase("forward"), arithmetic(self.precision, self.device):
            ours = _Inside()
            with self._reading(self.model) as ours.projected:
                logits, ours.states = self._read(self.model, inputs)
            self._join()
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


def _read(model: Any, task: Task, read: Examined | None) -> Examined:
    """Return how a model is to be read; one that was not examined is taken at its config's word."""
    if read is None:
        return Examined(_head(model, task, None))
    return read


def _head(model: Any, task: Task, head: Transform | Unknown | None) -> Transform | Unknown:
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
    """Return a digest of the bits of all parameters and buffers: equal before and after, the model
    was frozen.

    Each tensor is summed up where it lies, and one number of each comes to the host: a teacher of
    8 GB is not copied there to be looked at.
    """
    state = sorted(model.state_dict().items())
    sums = [_sum_of_bits(whole_of(tensor.detach())) for _, tensor in state]
    values = torch.stack([each.to(sums[0].device) for each in sums]).tolist() if sums else []
    said = "".join(f"{name}={value};" for (name, _), value in zip(state, values, strict=True))
    return hashlib.sha256(said.encode()).hexdigest()


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, each word times an odd number of its place, modulo 2^64: a
    word that changes, or changes places, changes it. 0-dim int64, where the tensor is.
    """
    words = tensor.contiguous().flatten().view(_WORDS[tensor.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), HASHED):
        part = words[start : start + HASHED].to(torch.int64)
        place = torch.arange(start, start + len(part), device=tensor.device)
        # int64 wraps around, in any order to the same sum
        total += (part * (place * _MULTIPLIER).bitwise_or_(1)).sum()
    return total
