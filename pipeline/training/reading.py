"""How a language model is read in training: what keeps packed documents apart, and what gives its
logits.

`examine` finds it out on a few tokens, before a step; the rest of this file reads by it.

Shape legend: B rows, T tokens, V logits, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.training import Attention
from pipeline.distillation.transform import (
    Transform,
    Unknown,
    copies,
    near,
    nothing_is_zero,
    prove,
    tolerance,
)
from pipeline.errors import UserError
from pipeline.ledger.devices.table import device_of
from pipeline.models.attention import (
    DOCUMENTS,
    FULL,
    NARROW,
    SLIDING,
    WINDOW,
    Layer,
    bounds_of,
    layer_of,
)
from pipeline.training.precision import compute_dtype

EXAMINED = 6  # tokens of a document that a model is examined with
# of what one token makes of those after it: less does not come from a token that is read
UNSEEN = 1e-2
# of hidden states, of the largest one, computed twice in fp32 in other company; 16 bits: 4
# roundings
ALIKE = 1e-4
FEWEST = 8  # documents that a batch is filled up to, where few sizes are wanted


class Apart(StrEnum):
    """What keeps one packed document from the next."""

    lengths = "lengths"  # attention that is told where each begins
    mask = "mask"  # which position may read which
    positions = "positions"  # the model itself, by positions that begin anew
    rows = "rows"  # nothing does: each document has rows of its own, and the model reads tokens


@dataclass(frozen=True, slots=True)
class Examined:
    """How a language model is to be read: what `examine` found.

    Attributes:
        head: What makes logits of its hidden states; `Unknown`: its own forward pass, in full.
        apart: What keeps packed documents apart.
        layer: Of its attention, where that is told lengths.
    """

    head: Transform | Unknown = field(default_factory=Transform)
    apart: Apart = Apart.positions
    layer: Layer | None = None

    @property
    def packs(self) -> bool:
        """Whether documents may be packed; else each has rows of its own."""
        return self.apart is not Apart.rows


@dataclass(frozen=True)
class Documents:
    """The packed documents of a batch, as the models that read it are told of them.

    Attributes:
        position_ids: (B, T) on the device; they begin anew with every document.
        bounds: (N + 1,) int32 on the device: see `bounds_of`.
        a_row: Whether every row is one document.
    """

    position_ids: Tensor
    bounds: Tensor
    a_row: bool

    @classmethod
    def of(cls, there: Tensor, here: Tensor, *, few_sizes: bool = False) -> Documents:
        """Return those of a batch whose `position_ids` are there on the device and here on the
        host.

        Args:
            few_sizes: Add empty documents at the end until there is a power of two, so that few
                sizes of `bounds` occur.
        """
        bounds = bounds_of(here)
        count = len(bounds) - 1
        if few_sizes:
            wanted = max(FEWEST, 1 << (count - 1).bit_length())
            bounds = torch.cat([bounds, bounds[-1:].expand(wanted - count)])
        return cls(there, device_of(there.device).send(bounds), count == len(here))

    def vary(self) -> None:
        """Tell torch.compile that there will be more documents, or fewer."""
        torch._dynamo.maybe_mark_dynamic(self.bounds, 0)  # pyright: ignore[reportPrivateUsage]

    @cached_property
    def mask(self) -> Tensor:
        """The `document_mask`, made once for all models that read one."""
        return document_mask(self.position_ids)

    def told(self, model: Any, read: Examined, precision: Precision) -> dict[str, Any]:
        """Return what a model's forward pass is given beside the inputs."""
        if read.apart is Apart.mask:
            return {"attention_mask": as_read_by(model, self.mask)}
        length = self.position_ids.shape[1]
        if read.apart is not Apart.lengths or self.a_row:
            return {}  # attention of a document a row needs nothing
        if not _takes_lengths(model, read, precision, self.position_ids.device):
            return {"allowed": self.mask}
        return lengths(self.bounds, length)


def _takes_lengths(model: Any, read: Examined, precision: Precision, device: torch.device) -> bool:
    """Return whether a model that can be told lengths can be told them now, on this device."""
    assert read.layer is not None
    if read.layer.drops and model.training:  # no kernel for lengths leaves keys out at random
        return False
    return device_of(device).takes_lengths(compute_dtype(precision), read.layer.width)


def prompts_told(
    model: Any, read: Examined, precision: Precision, mask: Tensor
) -> Callable[[Tensor], dict[str, Any]] | None:
    """Return what tells prompts padded on the left from their padding, as `on_policy.write` asks
    for it; None: their mask does.

    Args:
        mask: (B, P) on the host: 1 where a prompt is.
    """
    if read.apart is not Apart.lengths:
        return None
    rows, length = mask.shape
    # Padding is a document of its own that nothing else reads.
    positions = torch.arange(length).repeat(rows, 1)
    padding = length - mask.sum(-1)
    positions -= torch.where(positions < padding[:, None], 0, padding[:, None])

    def told(now: Tensor) -> dict[str, Any]:
        keys = now.bool()[:, None, None]
        if now.shape[-1] > length:  # after the prompt: one query a row
            return {"allowed": keys}
        there = device_of(now.device).send(positions)
        return Documents.of(there, positions).told(model, read, precision)

    return told


def lengths(bounds: Tensor, longest: int) -> dict[str, Any]:
    """Return the arguments by which transformers' models hand lengths to their attention."""
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def read_inputs(inputs: dict[str, Tensor], read: Examined) -> dict[str, Tensor]:
    """Return what of a batch a model reads: where it takes no packed documents, tokens alone, as it
    is served.
    """
    return inputs if read.packs else {"input_ids": inputs["input_ids"]}


def hidden_states(
    model: Any, inputs: dict[str, Tensor], told: Mapping[str, Any] | None = None
) -> Tensor:
    """Return the hidden states that the output head reads, (B, T, H).

    Args:
        inputs: `input_ids` and `position_ids`, (B, T); positions begin anew with every document.
        told: See `Documents.told`. Without a mask, a model whose attention is not ours finds the
            documents in the positions, and reads on the host whether there are several: every step
            would wait for the device.
    """
    return run(model.base_model, inputs, told).last_hidden_state


def full_logits(
    model: Any, inputs: dict[str, Tensor], told: Mapping[str, Any] | None = None
) -> Tensor:
    """Return the model's own logits of all positions, (B, T, V); `told` as `hidden_states` has
    it.
    """
    return run(model, inputs, told).logits


def run(
    module: Any, inputs: dict[str, Tensor], told: Mapping[str, Any] | None, *, every: bool = False
) -> Any:
    """Return what a model, or its body, gives out; with `every` layer's states."""
    more: dict[str, Any] = dict(told or {})
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


def as_read_by(module: Any, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """Return a `document_mask` in the form that a model takes: by kind of layer where it has
    several, added where it is eager.

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


def examine(model: Any, device: torch.device, attention: Attention = Attention.auto) -> Examined:
    """Find out on a few tokens how a model's logits and packed documents are to be had.

    Documents are packed where that changes nothing: where the model gives the same of tokens with
    positions as without, and where lengths, a mask or the positions keep one document from the
    next. Any other model reads a document a row. A model that can be told lengths has
    `pipeline.models.attention` from here on; else it stays as it is.

    Args:
        attention: `mask` tells no model lengths.

    Raises:
        UserError: If its logits are not finite, if it gives others each time, or if it reads later
            tokens.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            document = _document(model, 11, device)
            alone = {"input_ids": document["input_ids"]}
            _check_logits(model, alone)
            with nothing_is_zero(model):
                if _takes_positions(model, document):
                    head = prove(model, document)
                    found = _kept_apart(model, head, device, attention)
                    if found is not None:
                        return found
                _check_reads_back(model, alone)
                return Examined(prove(model, alone), Apart.rows)
    finally:
        model.train(training)


def read_alike(model: Any, read: Examined) -> None:
    """Have a model without weights be read as another rank, which has them, found it is."""
    if read.layer is not None:
        model.set_attn_implementation(DOCUMENTS)


def check_attention(
    model: Any,
    read: Examined,
    precision: Precision,
    device: torch.device,
    attention: Attention,
    key: str,
) -> None:
    """Refuse a way to keep documents apart that a model to be trained does not have.

    Args:
        key: Of the setting that wants it.

    Raises:
        UserError: Naming it.
    """
    name = type(model).__name__
    if attention is Attention.mask and read.apart is not Apart.mask:
        problem = f"mask: {name} looks at none, or reads a window that one of ours would widen"
        raise UserError(key, problem, "give auto")
    if attention is not Attention.lengths:
        return
    why = None
    if read.layer is None:
        why = "its layers do not hand them on, or compute more than attention by them does"
    elif read.layer.drops:
        why = "it leaves keys out at random, which no kernel for lengths does"
    elif not device_of(device).takes_lengths(compute_dtype(precision), read.layer.width):
        why = f"no kernel for them takes heads of {read.layer.width}"
    if why is not None:
        raise UserError(key, f"lengths: {name} cannot be told them: {why}", "give auto")


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
    plain = full_logits(model, {"input_ids": document["input_ids"]})
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


def _kept_apart(
    model: Any, head: Transform | Unknown, device: torch.device, attention: Attention
) -> Examined | None:
    """Return how two packed documents are kept apart, so that the second is as it is alone.

    Lengths do it where attention can be told them, else a mask where the model looks at one, else
    positions that begin anew; None where nothing does.
    """
    read = full_logits if isinstance(head, Unknown) else hidden_states
    # Two documents of other tokens, packed into one row.
    each = [_document(model, start, device) for start in (3, 11)]
    pair = {name: torch.cat([document[name] for document in each], -1) for name in each[0]}
    alone = torch.cat([read(model, document) for document in each], 1)
    allowed = _unseen(model, read, each[1], alone)

    def told(by: Callable[[Tensor], dict[str, Any]]) -> bool:
        positions = pair["position_ids"]
        # Shifted, the boundary is in the wrong place. A model that gives the same then was not told
        # of it.
        right, shifted = (
            _tried(model, read, pair, by(each)) for each in (positions, positions.roll(1))
        )
        equal = [each is not None and near(each, alone, allowed) for each in (right, shifted)]
        return equal == [True, False]

    def by_lengths(layer: Layer) -> Callable[[Tensor], dict[str, Any]]:
        own = Examined(head, Apart.lengths, layer)
        return lambda at: Documents.of(at, at.cpu()).told(model, own, Precision.fp32)

    def by_mask() -> bool:
        return told(lambda at: {"attention_mask": as_read_by(model, document_mask(at))})

    def by_positions() -> bool:
        return near(read(model, pair), alone, allowed)

    layer = None
    if attention is not Attention.mask:
        layer = _given_lengths(model, lambda layer: told(by_lengths(layer)), pair)
    if layer is not None:
        return Examined(head, Apart.lengths, layer)
    kinds = _kinds(model.config)
    wanted = attention is Attention.mask and kinds == {FULL, SLIDING}
    if (kinds == {FULL} or wanted) and by_mask():
        return Examined(head, Apart.mask)
    if by_positions():
        return Examined(head, Apart.positions)
    if kinds == {FULL, SLIDING} and by_mask():  # one mask a kind of layer
        return Examined(head, Apart.mask)
    return None


def _given_lengths(
    model: Any, works: Callable[[Layer], bool], pair: dict[str, Tensor]
) -> Layer | None:
    """Give a model attention that is told lengths; None, and the model as it was, where that is not
    its own attention.
    """
    before = model.config._attn_implementation
    # What was asked for by name stays: sdpa is what transformers takes unasked.
    if before not in ("sdpa", DOCUMENTS) or not model._can_set_attn_implementation():
        return None
    bounds = bounds_of(pair["position_ids"].cpu()).to(pair["position_ids"].device)
    told = lengths(bounds, pair["position_ids"].shape[-1])
    layer = layer_of(model, lambda: run(model, pair, told), bounds)
    if layer is not None:
        model.set_attn_implementation(DOCUMENTS)
        if works(layer):
            return layer
        model.set_attn_implementation(before)
    return None


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
    return kinds if kinds == {FULL, SLIDING} and narrow in ([], [WINDOW]) else set()


def _tried(
    model: Any, read: Callable[..., Tensor], pair: dict[str, Tensor], told: dict[str, Any]
) -> Tensor | None:
    """Return what a model makes of two documents that it is told of; None where it takes no such
    thing, or not of this shape or type.
    """
    try:
        return read(model, pair, told)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return None
