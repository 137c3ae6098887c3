"""How texts of several lengths become one batch: as the model's own tokenizer would pad them.

Shape legend: B rows, T tokens of the longest.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.config import Task

if TYPE_CHECKING:
    import torch

SEGMENTS = "token_type_ids"
SAME_WITHIN = 1e-2  # of the largest logit: 16 bits round to that; padding that is read moves logits by a tenth and more


class Tokens(Protocol):
    """A text as `pipeline.data.encode` makes it.

    Attributes:
        input_ids: int32 (L,).
        token_type_ids: int32 (L,), which of its parts each token is of; None: all of the first.
    """

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def token_type_ids(self) -> np.ndarray | None: ...


@dataclass(frozen=True, slots=True)
class Padding:
    """What a batch is filled up with, and where.

    Attributes:
        token: The token.
        is_left: Whether it goes before the text (XLNet, decoders) and not after.
        segment: Its token type; None: the model reads no token types.
        has_mask: Whether the model can be told what is padding. One that cannot (FNet) needs rows of one length.
        counts_positions: Whether positions are to be given: padding on the left would shift those that a model counts.
    """

    token: int
    is_left: bool = False
    segment: int | None = None
    has_mask: bool = True
    counts_positions: bool = False

    @staticmethod
    def of(tokenizer: Any, model: Any, task: Task) -> Padding:
        """Return how a model's tokenizer pads what this model reads; a language model's scores see no padding.

        A classifier that answers by its first token (BERT) answers by padding where that is on the left, whatever its
        tokenizer says: such a one is padded on the right, which changes no text's answer.
        """
        if task is Task.causal_lm:
            return Padding(tokenizer.pad_token_id)
        reads, names = accepted(type(model)), tokenizer.model_input_names
        left = tokenizer.padding_side == "left"
        found = Padding(
            token=token_of(model, tokenizer.pad_token_id),
            is_left=left,
            segment=tokenizer.pad_token_type_id if SEGMENTS in names and SEGMENTS in reads else None,
            has_mask="attention_mask" in reads,
            counts_positions=left and "position_ids" in reads and not _finds_positions(model),
        )
        if left and not _changes_nothing(found, model):
            return replace(found, is_left=False, counts_positions=False)
        return found


@dataclass(frozen=True, slots=True)
class _Probe:
    """A text to try padding with."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None = None


def _changes_nothing(padding: Padding, model: Any) -> bool:
    """Whether a text gets the same logits, (C,), padded beside a longer one as alone."""
    import torch

    size = model.get_input_embeddings().num_embeddings
    short, long = (_Probe((np.arange(start, start + length) * 5 % size).astype(np.int32))
                   for start, length in ((7, 4), (11, 9)))  # fmt: skip
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        alone, beside = (
            model(**{name: tensor.to(model.device) for name, tensor in read_by(model, pad(rows, padding)).items()})
            for rows in ([short], [short, long])
        )
    model.train(was_training)
    off, scale = (alone.logits[0] - beside.logits[0]).abs().max(), alone.logits.abs().max()
    return bool(off <= SAME_WITHIN * scale)


def token_of(model: Any, pad_id: int) -> int:
    """Return the token to pad with: the model's own, because some classifiers find the last token by it.

    A model that names none gets `pad_id` as its own; without one, it refuses batches.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = pad_id
    return int(config.pad_token_id)


@cache
def accepted(kind: type) -> frozenset[str]:
    """Return the inputs that a class of models names."""
    return frozenset(inspect.signature(kind.forward).parameters)  # pyright: ignore[reportAttributeAccessIssue]


def read_by(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return those tensors of a batch that a model reads: a student's tokenizer may give what its teacher has not."""
    reads = accepted(type(model))
    return {name: tensor for name, tensor in batch.items() if name in reads}


def _finds_positions(model: Any) -> bool:
    """Whether a model counts positions from its padding token on, as RoBERTa does: then padding shifts none."""
    import torch

    return any(
        name.rpartition(".")[2] == "position_embeddings"
        and isinstance(module, torch.nn.Embedding)
        and module.padding_idx is not None
        for name, module in model.named_modules()
    )


def pad(rows: Sequence[Tokens], padding: Padding) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, and `token_type_ids` and `position_ids` where the model has them.

    Each is (B, T) int64. What a model does not read of them, `read_by` leaves out.
    """
    import torch

    lengths = np.array([len(row.input_ids) for row in rows])
    longest = int(lengths.max())
    places = np.arange(longest)
    mask = (places >= longest - lengths[:, None]) if padding.is_left else (places < lengths[:, None])

    def filled(parts: list[np.ndarray], rest: int) -> np.ndarray:
        array = np.full(mask.shape, rest, dtype=np.int64)
        array[mask] = np.concatenate(parts)
        return array

    arrays = {
        "input_ids": filled([row.input_ids for row in rows], padding.token),
        "attention_mask": mask.astype(np.int64),
    }
    if padding.segment is not None:
        arrays[SEGMENTS] = filled([_segments(row) for row in rows], padding.segment)
    if padding.counts_positions:
        arrays["position_ids"] = np.maximum(mask.cumsum(-1) - 1, 0)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _segments(row: Tokens) -> np.ndarray:
    return np.zeros(len(row.input_ids), dtype=np.int32) if row.token_type_ids is None else row.token_type_ids
