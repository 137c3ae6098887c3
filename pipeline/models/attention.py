"""Causal attention of packed documents that is told where each begins, and is given no mask.

A dense mask has T x T positions a row, forbids flash attention, and has the products computed that
it throws away. Lengths do none of that: every document is read as if it stood alone.

`DOCUMENTS` is registered with transformers as an attention implementation for which no mask is
made. Where no lengths are given, a row is one document.

Shape legend: B rows, H heads (G of keys), T tokens, K keys, D width of a head, N documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

DOCUMENTS = "documents"
"""The name that transformers knows it by: `model.set_attn_implementation(DOCUMENTS)`."""
# Settings of transformers' configs that limit how far back a layer reads.
WINDOW = "sliding_window"
NARROW = (WINDOW, "attention_chunk_size", "attention_window_size", "local_attention", "window_size")
# kinds of layers, as transformers' configs name them
FULL, SLIDING = "full_attention", "sliding_attention"
_SEEN = "documents_seen"  # the same with a mask, for `layer_of`
# Arguments of a layer's attention that change nothing of what it computes.
HARMLESS = frozenset(
    (
        "cache_position",
        "cu_seq_lens_k",
        "is_causal",
        "max_length_k",
        "max_length_q",
        "position_embeddings",
        "position_ids",
        "use_cache",
    )
)


def bounds_of(position_ids: Tensor) -> Tensor:
    """Return where documents begin, and where the last one ends, (N + 1,) int32, among B * T
    tokens.

    Args:
        position_ids: (B, T) on the CPU; they begin anew with every document. Every row begins one.
    """
    begins = position_ids == 0
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])]).int()


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    allowed: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute a layer's attention as transformers calls it; (B, T, H, D).

    Args:
        query: (B, H, T, D); `key` and `value` have (B, G, K, D), K > T after a cache.
        attention_mask: None, or (B, 1, T, K): then it alone says what is read.
        sliding_window: Tokens that a position reads at most, itself included.
        cu_seq_lens_q: `bounds_of` the batch, on the same device.
        max_length_q: No document is longer.
        allowed: (B, 1, T, K) bool in place of lengths, where no kernel takes them. The window is
            seen to here.
    """
    if attention_mask is None and cu_seq_lens_q is not None and dropout == 0.0:
        query, key, value = _in_autocast(query, key, value)
        window = sliding_window or 0
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if query.device.type == "cpu":
            key, value = (_for_each_head(part, query.shape[1]) for part in (key, value))
            out = document_attention(query, key, value, cu_seq_lens_q, window, scale)[0]
        else:
            assert max_length_q is not None
            out = _varlen(query, key, value, cu_seq_lens_q, max_length_q, window, scale)
        return out, None
    if attention_mask is None:
        attention_mask = _allowed(query, key, allowed, sliding_window)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
    )


def _allowed(
    query: Tensor, key: Tensor, allowed: Tensor | None, window: int | None
) -> Tensor | None:
    """Return which keys are read, of a shape that broadcasts to (B, 1, T, K); None: all earlier
    ones.
    """
    tokens, keys = query.shape[2], key.shape[2]
    if tokens == 1:  # a cache of a window holds the last keys alone
        return None if allowed is None else allowed[..., -keys:]
    if window is None or keys <= window:
        return allowed
    at = torch.arange(keys, device=query.device)
    ahead = at[keys - tokens :, None] - at
    band = (ahead >= 0) & (ahead < window)
    return band[None, None] if allowed is None else allowed & band


def _in_autocast(*parts: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the dtype that attention is computed in: rotary positions leave fp32."""
    device = parts[0].device.type
    if not torch.is_autocast_enabled(device):
        return parts
    dtype = torch.get_autocast_dtype(device)
    return tuple(part.to(dtype) for part in parts)


def _for_each_head(part: Tensor, heads: int) -> Tensor:
    """Return keys or values (B, H, K, D) of those that H heads share, (B, G, K, D)."""
    shared = heads // part.shape[1]
    return part if shared == 1 else part.repeat_interleave(shared, 1)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    window: int,
    scale: float,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, tokens, width = query.shape
    in_line = lambda part: part.transpose(1, 2).flatten(0, 1)
    out: Any = varlen_attn(
        in_line(query),
        in_line(key),
        in_line(value),
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=key.shape[1] != heads,
    )
    return out.view(rows, tokens, heads, width)


# -- whether a model's attention can be this one ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """What is to be known of a model's attention layers.

    Attributes:
        width: Of a head.
        drops: Whether some leave keys out at random in training.
    """

    width: int
    drops: bool


@dataclass(frozen=True, slots=True)
class _Call:
    """A layer's attention, as transformers asked for it."""

    module: Any
    fits: bool
    width: int
    dropout: float
    window: int | None


_calls: list[_Call] = []


def layer_of(model: Any, run: Callable[[], Any], bounds: Tensor) -> Layer | None:
    """Return what a model's attention layers are, or None where this attention is not theirs.

    It is where every layer hands on the lengths, asks for nothing that is not computed here (a soft
    cap, sinks, biases), and names its own window. A window that only a mask would have kept would
    be lost without a word.

    Args:
        run: Runs the model on a few tokens, given `bounds`.
    """
    before = model.config._attn_implementation
    _calls.clear()
    try:
        model.set_attn_implementation(_SEEN)
        run()
        modules = [call.module for call in _calls]
        for module in modules:  # and nothing else: what it drops is drawn by no other part
            module.training = True
        try:
            run()
        finally:
            for module in modules:
                module.training = False
        calls = list(_calls)
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError):
        return None
    finally:
        _calls.clear()
        model.set_attn_implementation(before)
    windows = _windows(model.config)
    fits = windows is not None and all(
        call.fits and call.window == windows(call.module) for call in calls
    )
    widths = {call.width for call in calls}
    if not fits or not calls:
        return None
    return Layer(max(widths), any(call.dropout > 0 for call in calls))


def _windows(config: Any) -> Callable[[Any], int | None] | None:
    """Return what window a layer should have, by its module; None where its config limits layers in
    another way.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if any(getattr(text, name, None) for name in NARROW if name != WINDOW):
        return None
    window = getattr(text, WINDOW, None)
    if getattr(text, "use_sliding_window", True) is False:  # Qwen2 keeps the number beside it
        window = None
    if kinds is None:
        return lambda module: window
    by_kind = {FULL: None, SLIDING: window}
    if not set(kinds) & set(by_kind):
        return None

    def of(module: Any) -> int | None:
        index = getattr(module, "layer_idx", None)
        return -1 if index is None else by_kind.get(kinds[index], -1)

    return of


def _seen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Note a call, and compute something of its shape."""
    is_set = lambda given: given is not None and given is not False
    fits = (
        attention_mask is None
        and cu_seq_lens_q is not None
        and getattr(module, "is_causal", True)
        and more.get("is_causal") is not False
        and not any(name not in HARMLESS and is_set(given) for name, given in more.items())
        and query.shape[2] == key.shape[2]
        and query.shape[1] % key.shape[1] == 0
        and query.shape[-1] == value.shape[-1]
    )
    _calls.append(_Call(module, fits, query.shape[-1], dropout, sliding_window))
    return attend(module, query, key, value, None, scaling=scaling)


# -- on the CPU: torch's own flash attention, document after document ------------------------------
#
# An operator of its own, because a compiler cannot see how many documents there are: to it this is
# one step.

_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
STEPS = (16, 32, 64, 128, 192, 256)
"""Tokens that short documents are filled up to, so that many are computed at once."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows, queries and keys that are computed at once: all of a document, or as many queries as
    its window has tokens.

    Attributes:
        band: Added to its scores, (T, K); None: it is causal and no more.
    """

    rows: slice
    queries: slice
    keys: slice
    band: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Group:
    """Short documents that are computed at once, filled up behind their ends.

    Attributes:
        tokens: (N, T) int64 among B * T: what stands where; behind an end, the last token again,
            which no earlier one reads.
        inside: (N, T) bool: what is of a document.
        own: int64: the tokens that are, one after the other.
    """

    tokens: Tensor
    inside: Tensor
    own: Tensor


@lru_cache(maxsize=16)
def _plan(ends: tuple[int, ...], tokens: int, window: int) -> tuple[_Part | _Group, ...]:
    """Return what is computed at once, of documents with these bounds in rows of `tokens`."""
    if len(ends) - 1 == ends[-1] // tokens and not 0 < window < tokens:
        whole = slice(0, tokens)
        return (_Part(slice(None), whole, whole),)
    parts: list[_Part | _Group] = []
    short: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(ends):
        length = end - start
        size = next((step for step in STEPS if length <= step), None)
        if size is not None and not 0 < window < length:
            short.setdefault(size, []).append((start, end))
        else:
            parts += _parts(start, end, tokens, window)
    for size, documents in short.items():
        if len(documents) > 1:
            parts.append(_group(documents, size))
        else:
            parts += _parts(*documents[0], tokens, window)
    return tuple(parts)


def _parts(start: int, end: int, tokens: int, window: int) -> Iterator[_Part]:
    row = slice(start // tokens, start // tokens + 1)
    first, last = start % tokens, start % tokens + end - start
    step = window if 0 < window < last - first else last - first
    for at in range(first, last, step):
        to = min(at + step, last)
        keys = slice(max(first, at - window + 1) if window else first, to)
        yield _Part(row, slice(at, to), keys, _band(slice(at, to), keys, window))


def _band(queries: slice, keys: slice, window: int) -> Tensor | None:
    if queries.start == keys.start and (not window or queries.stop - keys.start <= window):
        return None
    ahead = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(keys.start, keys.stop)
    hidden = (ahead < 0) | (ahead >= window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _group(documents: Sequence[tuple[int, int]], size: int) -> _Group:
    starts, ends = (torch.tensor(each)[:, None] for each in zip(*documents, strict=True))
    places = starts + torch.arange(min(size, int((ends - starts).max())))
    inside = places < ends
    return _Group(torch.minimum(places, ends - 1), inside, places[inside])


def _gathered(part: Tensor, group: _Group) -> Tensor:
    """Return what a group reads of (B, H, T, D), or of (B, T, H, D) transposed: (N, H, T, D)."""
    flat = part.transpose(1, 2).flatten(0, 1)
    return flat[group.tokens].transpose(1, 2)


@torch.library.custom_op("pipeline::document_attention", mutates_args=())
def document_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention (B, T, H, D) of documents, and the logarithms of its sums (B, T, H).

    Args:
        query: (B, H, T, D) on the CPU, as `key` and `value`.
        bounds: See `bounds_of`.
        window: Tokens that a position reads at most, itself included; 0: all of its document.
        scale: Of the scores.
    """
    count, heads, tokens, _ = query.shape
    out = query.new_empty(count, tokens, heads, value.shape[-1])
    exact = torch.promote_types(query.dtype, torch.float32)
    sums = query.new_empty(count, tokens, heads, dtype=exact)
    flat, flat_sums = out.flatten(0, 1), sums.flatten(0, 1)
    for part in _plan(tuple(bounds.tolist()), tokens, window):
        if isinstance(part, _Group):
            three = (_gathered(each, part) for each in (query, key, value))
            given, logs = _forward(*three, 0.0, True, scale=scale)
            flat[part.own] = given.transpose(1, 2)[part.inside]
            flat_sums[part.own] = logs.transpose(1, 2)[part.inside]
            continue
        rows, queries = part.rows, part.queries
        three = (query[rows, :, queries], key[rows, :, part.keys], value[rows, :, part.keys])
        band = None if part.band is None else part.band.to(query.dtype)
        given, logs = _forward(*three, 0.0, band is None, attn_mask=band, scale=scale)
        out[rows, queries], sums[rows, queries] = given.transpose(1, 2), logs.transpose(1, 2)
    return out, sums


@document_attention.register_fake
def _shapes(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    rows, heads, tokens, _ = query.shape
    out = query.new_empty(rows, tokens, heads, value.shape[-1])
    dtype = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty(rows, tokens, heads, dtype=dtype)


@torch.library.custom_op("pipeline::document_attention_backward", mutates_args=())
def _document_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    bounds: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the attention (B, T, H, D)."""
    tokens = query.shape[2]
    # (B, T, H, D) in memory, as the products that these are made of have them
    grads = [torch.zeros_like(each.transpose(1, 2)).contiguous() for each in (query, key, value)]
    for part in _plan(tuple(bounds.tolist()), tokens, window):
        if isinstance(part, _Group):
            three = (_gathered(each, part) for each in (query, key, value))
            four = (_gathered(each.transpose(1, 2), part) for each in (out, sums[..., None]))
            slope = _gathered(gradient.transpose(1, 2), part)
            # what stands behind an end has no part in the loss
            slope = slope.masked_fill(~part.inside[:, None, :, None], 0)
            given, logs = four
            found = _backward(slope, *three, given, logs[..., 0], 0.0, True, scale=scale)
            for grad, new in zip(grads, found, strict=True):
                grad.flatten(0, 1)[part.own] = new.transpose(1, 2)[part.inside]
            continue
        rows, queries = part.rows, part.queries
        band = None if part.band is None else part.band.to(query.dtype)
        found = _backward(
            gradient[rows, queries].transpose(1, 2),
            query[rows, :, queries],
            key[rows, :, part.keys],
            value[rows, :, part.keys],
            out[rows, queries].transpose(1, 2),
            sums[rows, queries].transpose(1, 2),
            0.0,
            band is None,
            attn_mask=band,
            scale=scale,
        )
        for grad, places, new in zip(grads, (queries, part.keys, part.keys), found, strict=True):
            grad[rows, places] += new.transpose(1, 2)  # parts of a window share keys
    for_query, for_key, for_value = (grad.transpose(1, 2) for grad in grads)
    return for_query, for_key, for_value


@_document_attention_backward.register_fake
def _gradient_shapes(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    bounds: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    like = [torch.empty_like(each.transpose(1, 2).contiguous()) for each in (query, key, value)]
    return like[0].transpose(1, 2), like[1].transpose(1, 2), like[2].transpose(1, 2)


def _kept(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)
    ctx.mark_non_differentiable(output[1])


def _differentiated(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, sums, bounds = ctx.saved_tensors
    found = _document_attention_backward(
        gradient, query, key, value, out, sums, bounds, ctx.window, ctx.scale
    )
    return *found, None, None, None


document_attention.register_autograd(_differentiated, setup_context=_kept)
AttentionInterface.register(DOCUMENTS, attend)
AttentionInterface.register(_SEEN, _seen)
