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

from pipeline.ledger.devices.table import device_of
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch

SEGMENTS = "token_type_ids"
ONE_LENGTH = "reads_one_length"  # where a model keeps what was found of it
# of the largest logit: sums of fp32 are rounded otherwise in a batch, by 1e-6 to 1e-5
SAME_WITHIN = 1e-4
SAME_WITHIN_ROUNDED = 1e-2  # where weights or products have 16 bits or fewer
# tokens of the texts that padding is tried with: some models read in chunks of 64
PROBES = (3, 4, 9, 33, 150)


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
        has_mask: Whether the model can be told what is padding.
        one_length: Whether the rows of a batch must be of one length: the model cannot be told what
            is padding (FNet), or answers otherwise beside it all the same (Reformer hashes it,
            Nystromformer averages over it).
        counts_positions: Whether positions are to be given: padding on the left would shift those
            that a model counts.
    """

    token: int
    is_left: bool = False
    segment: int | None = None
    has_mask: bool = True
    one_length: bool = False
    counts_positions: bool = False

    @staticmethod
    def of(tokenizer: Any, model: Any, task: Task) -> Padding:
        """Return how a model's tokenizer pads what this model reads; a language model's scores see
        no padding.

        A classifier that answers by its first token (BERT) answers by padding where that is on the
        left, whatever its tokenizer says: such a one is padded on the right, which changes no
        text's answer.
        """
        if task.kind.is_language:
            return Padding(tokenizer.pad_token_id)
        reads, names = accepted(type(model)), tokenizer.model_input_names
        left = tokenizer.padding_side == "left"
        found = Padding(
            token=token_of(model, tokenizer.pad_token_id),
            is_left=left,
            segment=(
                tokenizer.pad_token_type_id if SEGMENTS in names and SEGMENTS in reads else None
            ),
            has_mask="attention_mask" in reads,
            counts_positions=left and "position_ids" in reads and not _finds_positions(model),
        )
        same = found.has_mask and _changes_nothing(found, model)
        if left and not same:
            found = replace(found, is_left=False, counts_positions=False)
            same = found.has_mask and _changes_nothing(found, model)
        found = replace(found, one_length=not same)
        found.note_on(model)
        return found

    def note_on(self, model: Any) -> None:
        """Have a model keep what was found of it, or of another one with its weights."""
        vars(model)[ONE_LENGTH] = self.one_length

    @property
    def note(self) -> str | None:
        """What a reader must know; None where there is nothing."""
        if not self.one_length:
            return None
        return (
            "what the model says of a text changes with padding beside it: texts of one length are"
            " read at a time"
        )


@dataclass(frozen=True, slots=True)
class _Probe:
    """A text to try padding with."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None = None


def _changes_nothing(padding: Padding, model: Any) -> bool:
    """Whether texts get the same logits, (C,), padded beside longer ones as alone.

    A model that does not run on such texts has nothing to be compared, and is taken to be one that
    does not.
    """
    import torch

    if any(getattr(module, "attention_type", None) == "block_sparse" for module in model.modules()):
        return False  # the longest text of a batch decides how all of it are read
    rows = _probes(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            alone = torch.cat([_said(model, [row], padding) for row in rows])
            beside = _said(model, rows, padding)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ):
        return False
    finally:
        model.train(was_training)
    return bool((alone - beside).abs().max() <= _rounding(model) * alone.abs().max())


def _probes(model: Any) -> list[_Probe]:
    """Return texts of several lengths, each with the end token where an encoder-decoder wants
    it.
    """
    from pipeline.models.load import ends_once, positions
    from pipeline.models.vocabulary import vocabulary_of
    from pipeline.tasks.table import Task

    size, limit = vocabulary_of(model) or 256, positions(model.config) or max(PROBES)
    end, fill = (
        ends_once(model.config, Task.sequence_classification),
        model.config.get_text_config().pad_token_id,
    )
    rows: list[_Probe] = []
    for length in sorted({min(length, limit) for length in PROBES}):
        ids = (np.arange(length, dtype=np.int32) * 5 + 7 * length) % size
        ids[(ids == end) | (ids == fill)] = min(9, size - 1)
        if end is not None:
            ids[-1] = end
        rows.append(_Probe(ids.astype(np.int32)))
    return rows


def _said(model: Any, rows: Sequence[Tokens], padding: Padding) -> torch.Tensor:
    batch = {name: tensor.to(model.device) for name, tensor in pad(rows, padding).items()}
    return model(**read_by(model, batch)).logits.float()


def _rounding(model: Any) -> float:
    """Return by how much of the largest logit a batch may round otherwise than a text alone."""
    import torch

    exact = (
        model.dtype in (torch.float32, torch.float64)
        and getattr(model.config, "quantization_config", None) is None
    )
    exact = exact and not device_of(model.device).rounds_fp32()
    return SAME_WITHIN if exact else SAME_WITHIN_ROUNDED


def wants_one_length(model: Any) -> bool:
    """Whether a classifier is to read texts of one length at a time; tried once, as padded on the
    right.
    """
    if ONE_LENGTH not in vars(model):
        token = model.config.get_text_config().pad_token_id or 0
        padding = Padding(token, segment=0 if SEGMENTS in accepted(type(model)) else None)
        has_mask = "attention_mask" in accepted(type(model))
        vars(model)[ONE_LENGTH] = not (has_mask and _changes_nothing(padding, model))
    return vars(model)[ONE_LENGTH]


def logits_of(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a classifier's logits of a padded batch, (B, C): of each length by itself where the
    model wants that.
    """
    import torch

    lengths = batch["attention_mask"].sum(-1)
    if bool((lengths == batch["attention_mask"].shape[1]).all()) or not wants_one_length(model):
        return model(**read_by(model, batch)).logits
    places, parts = list[torch.Tensor](), list[torch.Tensor]()
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        columns = batch["attention_mask"][rows[0]].nonzero().flatten()
        some = {name: tensor[rows][:, columns] for name, tensor in read_by(model, batch).items()}
        parts.append(model(**some).logits)
        places.append(rows)
    return torch.cat(parts)[torch.cat(places).argsort()]


def token_of(model: Any, pad_id: int) -> int:
    """Return the token to pad with: the model's own, because some classifiers find the last token
    by it.

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
    """Return those tensors of a batch that a model reads: a student's tokenizer may give what its
    teacher has not.
    """
    reads = accepted(type(model))
    return {name: tensor for name, tensor in batch.items() if name in reads}


def _finds_positions(model: Any) -> bool:
    """Whether a model counts positions from its padding token on, as RoBERTa does: then padding
    shifts none.
    """
    import torch

    return any(
        name.rpartition(".")[2] == "position_embeddings"
        and isinstance(module, torch.nn.Embedding)
        and module.padding_idx is not None
        for name, module in model.named_modules()
    )


def pad(rows: Sequence[Tokens], padding: Padding) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, and `token_type_ids` and `position_ids` where the
    model has them.

    Each is (B, T) int64. What a model does not read of them, `read_by` leaves out.
    """
    import torch

    lengths = np.array([len(row.input_ids) for row in rows])
    longest = int(lengths.max())
    places = np.arange(longest)
    mask = (
        (places >= longest - lengths[:, None]) if padding.is_left else (places < lengths[:, None])
    )

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
    return (
        np.zeros(len(row.input_ids), dtype=np.int32)
        if row.token_type_ids is None
        else row.token_type_ids
    )
