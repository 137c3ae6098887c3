"""How many tokens a model reads, and a few of them to try it with."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROBE_TOKENS = 8
UNBOUNDED = 0x110000  # of a model without a vocabulary: characters are its tokens


def vocabulary_of(model: Any) -> int | None:
    """Return how many tokens a model has embeddings for; None where it hashes them, and knows no
    end (CANINE).
    """
    embedding: Any = None
    with suppress(NotImplementedError):
        embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None)
    if size is None and getattr(embedding, "weight", None) is not None:  # I-BERT's own class
        size = len(embedding.weight)
    if size is None:
        size = getattr(model.config.get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


def probe(model: Any) -> torch.Tensor:
    """Return a few different tokens, (1, T), the last of them the end where some model finds
    that.
    """
    import torch

    ids = (torch.arange(PROBE_TOKENS) * 7 + 3).remainder(vocabulary_of(model) or UNBOUNDED)
    end = model.config.get_text_config().eos_token_id
    end = end[0] if isinstance(end, list) and end else end
    if isinstance(end, int) and 0 <= end < (vocabulary_of(model) or UNBOUNDED):
        ids[ids == end] = (end + 1) % (vocabulary_of(model) or UNBOUNDED)
        ids[-1] = end
    return ids[None]
