"""`training.*`: the loop that every stage that trains shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from pipeline.config.settings.ranges import at_least_0, fraction, positive
from pipeline.errors import UserError, one_line

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


AUTO = "auto"  # of checkpoint_every


class OptimizerKind(Enum):
    """AdamW, and what its two moments are kept in (`training/optimizer.py`)."""

    adamw = "adamw"
    adamw_8bit_bitsandbytes = "adamw_8bit_bitsandbytes"
    adamw_8bit_torchao = "adamw_8bit_torchao"


class Compile(Enum):
    """Whether a training runs compiled (torch.compile). `auto`: where its own first steps show that
    what is left is long enough to earn it back.
    """

    auto = "auto"
    always = "always"
    never = "never"


class Attention(Enum):
    """What keeps packed documents apart. `auto`: `lengths`, where model and device take them, else
    `mask` or what the model itself does.
    """

    auto = "auto"
    lengths = "lengths"  # attention is told where each document begins
    mask = "mask"  # every position is told what it may read


class Schedule(Enum):
    """Learning-rate schedule after the warm-up."""

    cosine = "cosine"
    constant_then_decay = "constant_then_decay"


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """One training loop serves every stage; these are its settings."""

    steps: int = at_least_0(100)  # optimizer steps; 0 uses the model as it is
    # passes over train; they then say how many steps there are
    epochs: Optional[float] = positive(None)
    batch_size: int = positive(16)  # sequences (or examples) of one optimizer step
    gradient_accumulation: int = positive(1)  # micro-batches that batch_size is cut into
    sequence_length: int = field(default=128, metadata={"min": 8})  # tokens
    learning_rate: float = positive(3e-3)  # its peak, after the warm-up
    weight_decay: float = at_least_0(0.1)  # of AdamW, on weights of two dimensions or more
    warmup_fraction: float = fraction(0.05)  # of the steps
    schedule: Schedule = Schedule.cosine  # of the learning rate, after the warm-up
    decay_fraction: float = fraction(0.2)  # of the steps, for constant_then_decay
    max_grad_norm: float = positive(1.0)  # gradients are clipped to it
    # steps between validation readings; null: a fifth of the steps
    eval_every: Optional[int] = positive(None)
    # validation documents a reading; null: 32 texts, or 256 examples
    eval_documents: Optional[int] = positive(None)
    # steps; auto: computed from what one takes; null: every checkpoint_seconds
    checkpoint_every: Any = None
    # between two checkpoints; with auto, until the first
    checkpoint_seconds: float = positive(60.0)
    # written from a copy on the host while the training goes on; it waits for the copy alone
    checkpoint_beside: bool = False
    # mean time between ends without warning, for checkpoint_every=auto: 3 hours
    preempted_every_seconds: float = positive(10800.0)
    # loss over its own best average
    divergence_factor: float = field(default=4.0, metadata={"above": 1})
    compile: Compile = Compile.auto  # torch.compile
    attention: Attention = Attention.auto  # between packed documents, of causal_lm
    # the same bits each time: kernels that give them alone, and nothing is chosen by its time
    deterministic: bool = False
    optimizer: OptimizerKind = OptimizerKind.adamw  # what holds the two moments
    # backward computes each layer again, so that memory holds one at a time
    activation_checkpointing: bool = False
    # doubled until it is batch_size; null: that from the start
    start_batch_size: Optional[int] = positive(None)
    # likewise, of causal_lm
    start_sequence_length: Optional[int] = field(default=None, metadata={"min": 8})
    # of the steps, until all is full size
    growth_fraction: float = field(default=0.5, metadata={"above": 0, "max": 1})


def check_checkpoint_every(value: Any, key: str) -> None:
    """Refuse what is no number of steps, and not `auto`.

    Raises:
        UserError: Naming the setting.
    """
    if value is None or value == AUTO:
        return
    remedy = f"give 1, 2, ..., {AUTO} or null"
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(key, f"{one_line(value, 40)!r} is not a whole number", remedy)
    if value < 1:
        raise UserError(key, f"{value} is out of range", remedy)
