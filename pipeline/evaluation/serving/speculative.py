"""Text that a small model drafts and a large one verifies: speculative decoding, greedy.

The draft writes a few tokens, one at a time. The verifier reads all of them in one pass, which
tells what it would have written after each; it keeps the longest part that is the same, and adds
one token of its own. So the text is the verifier's greedy text whatever the draft says, up to
rounding: a pass over several tokens may add in another order than a pass over one, and where two
tokens are as likely as each other that can decide. What is saved are passes.

transformers' assisted generation does the same. It is not used here because its loop does work for
every token that the loop of `decoding.py` does not, so that a comparison of the two would be one of
loops.

Source: Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding, section 2;
greedy as in its appendix A.3 and in transformers' `_assisted_decoding`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.evaluation.serving.decoding import compiled_whole, graphs_of, num_graphs
from pipeline.ledger.devices.table import device_of
from pipeline.models.vocabulary import vocabulary_of

if TYPE_CHECKING:
    import torch


class Reader(Protocol):
    """A model with what it has read of one sequence.

    Attributes:
        how: As results name it.
    """

    how: str

    def reset(self) -> None:
        """Forget the sequence before."""

    def read(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        """Read tokens (1, T); return the greedy ones (1, last) after each of the last of them."""
        ...

    def cut(self, tokens: int) -> None:
        """Forget the last tokens."""


class _Model:
    """A model's greedy predictions, of tokens below a limit.

    Args:
        model: In evaluation mode.
        limit: Tokens that it may predict: a vocabulary may be padded beyond another; None: all.
    """

    def __init__(self, model: Any, limit: int | None) -> None:
        self.model, self._limit = model, limit
        self._size = vocabulary_of(model)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def predict(self, ids: torch.Tensor, cache: Any, last: int) -> tuple[torch.Tensor, Any]:
        """Return the greedy tokens (1, last) after the last of some (1, T), and the cache."""
        given = {"logits_to_keep": last} if self._keeps else {}
        # A token that only the other vocabulary has is read as the last one: what is drafted after
        # it is verified all the same.
        known = ids if self._size is None else ids.clamp(max=self._size - 1)
        out = self.model.forward(input_ids=known, past_key_values=cache, use_cache=True, **given)
        return out.logits[:, -last:, : self._limit].argmax(-1), out.past_key_values


class GrowingReader:
    """With a key-value cache that grows, and is cut."""

    def __init__(self, model: Any, limit: int | None, why: str = "") -> None:
        self._predict, self._cache = _Model(model, limit).predict, None
        self.how = f"dynamic cache ({why})" if why else "dynamic cache"

    def reset(self) -> None:
        self._cache = None

    def read(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        is_first = self._cache is None
        tokens, cache = self._predict(ids, self._cache, last)
        # transformers 5.20: windows and states keep what they would drop, until they are cut
        if is_first and hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
        self._cache = cache
        return tokens

    def cut(self, tokens: int) -> None:
        cache: Any = self._cache
        # 0 cuts windows to size, and in earlier releases empties the cache
        if tokens or hasattr(cache, "activate_past_recording"):
            cache.crop(-tokens)


class FixedReader:
    """With a cache of fixed size; reading some numbers of tokens is compiled, or captured as a CUDA
    graph, or both.

    Args:
        size: Tokens that the cache holds.
        prompt: Token ids (1, T) of the shape to be read.
        widths: Numbers of tokens whose reading that is.

    Raises:
        RuntimeError: If the cache cannot be cut, or a pass cannot be compiled or captured.
    """

    def __init__(
        self,
        model: Any,
        limit: int | None,
        prompt: torch.Tensor,
        size: int,
        widths: Sequence[int],
        *,
        compiled: bool = False,
        captured: bool = True,
    ) -> None:
        import torch
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        self._predict = _Model(model, limit).predict
        self._cache = StaticCache(config=model.config, max_cache_len=size)
        if any(type(layer) is not StaticLayer for layer in self._cache.layers):
            raise RuntimeError("a cache with windows or states of fixed size cannot be cut")
        zeros = lambda width: torch.zeros(1, width, dtype=torch.int64, device=prompt.device)
        self._given = {width: zeros(width) for width in widths}
        self._found = {width: zeros(width) for width in widths}
        self._passes: dict[int, Callable[[], None]] = {}
        self.read(prompt, 1)  # makes room for the keys and values
        device, graphs = device_of(prompt.device), 0
        for width in widths:
            step = self._step(width, compiled=compiled)
            if compiled:
                self.reset()
                graphs += graphs_of(step)
            self._passes[width] = device.capture(step, self.reset) if captured else step
        words = ["static cache", *([f"compiled ({num_graphs(graphs)})"] if compiled else [])]
        self.how = ", ".join([*words, *(["CUDA graph"] if captured else [])])

    def reset(self) -> None:
        self._cache.reset()

    def read(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        width = ids.shape[1]
        if width != last or width not in self._passes:
            return self._predict(ids, self._cache, last)[0]
        self._given[width].copy_(ids)
        self._passes[width]()
        return self._found[width].clone()  # the next pass of this width writes there

    def cut(self, tokens: int) -> None:
        # What lies beyond is masked, and written over.
        layers: Any = self._cache.layers
        for layer in layers:
            layer.cumulative_length.sub_(tokens)

    def _step(self, width: int, *, compiled: bool) -> Callable[[], None]:
        """Return what reads the given tokens of a width, and leaves those found."""
        found = lambda ids: self._predict(ids, self._cache, width)[0]
        run = compiled_whole(found) if compiled else found

        def step() -> None:
            self._found[width].copy_(run(self._given[width]))

        return step


@dataclass(frozen=True, slots=True)
class Written:
    """A text, and how it came about.

    Attributes:
        tokens: (1, new).
        drafted: Tokens that the draft proposed.
        accepted: Those of them that the verifier would have written too.
        passes: Of the verifier, after the prompt.
    """

    tokens: torch.Tensor
    drafted: int
    accepted: int
    passes: int


@dataclass(frozen=True, slots=True)
class Speculative:
    """Writes with a draft.

    Attributes:
        verifier: The model whose text it is.
        draft: The model that proposes.
        ahead: Tokens that it proposes at a time, at most.
    """

    verifier: Reader
    draft: Reader
    ahead: int

    @property
    def how(self) -> str:
        """As results name it."""
        return " with a draft in ".join(dict.fromkeys((self.verifier.how, self.draft.how)))

    def write(self, prompt: torch.Tensor, new: int) -> Written:
        """Return `new` tokens after a prompt (1, T), whatever they are: an end of text is one of
        them, as for all that is served here.
        """
        import torch

        self.verifier.reset()
        self.draft.reset()
        # The last token written: neither has read it yet; the draft may lack the one before, too.
        last = self.verifier.read(prompt, 1)
        self.draft.read(prompt, 1)
        unread, written = last, [last]
        count, drafted, accepted, passes = 1, 0, 0, 0
        while count < new:
            ahead = min(self.ahead, new - count - 1)
            proposed = self._proposed(unread, ahead)
            answers = self.verifier.read(torch.cat([last, *proposed], dim=1), ahead + 1)
            same = _num_same(proposed, answers)
            self.verifier.cut(ahead - same)
            self.draft.cut(max(0, ahead - 1 - same))  # the last that it proposed it has not read
            last = answers[:, same : same + 1]
            unread = torch.cat([proposed[-1], last], dim=1) if same == ahead > 0 else last
            written.append(answers[:, : same + 1])
            count, drafted, accepted = count + same + 1, drafted + ahead, accepted + same
            passes += 1
        return Written(torch.cat(written, dim=1), drafted, accepted, passes)

    def _proposed(self, unread: torch.Tensor, ahead: int) -> list[torch.Tensor]:
        """Return tokens (1, 1) that the draft writes after those that it has not read."""
        found: list[torch.Tensor] = []
        for _ in range(ahead):
            unread = self.draft.read(unread, unread.shape[1])[:, -1:]
            found.append(unread)
        return found


def _num_same(proposed: Sequence[torch.Tensor], answers: torch.Tensor) -> int:
    """Return how many of the proposed tokens (1, 1) are those of the verifier (1, ahead + 1), from
    the first on.
    """
    import torch

    if not proposed:
        return 0
    alike = torch.cat(list(proposed), dim=1) == answers[:, : len(proposed)]
    return int(alike.long().cumprod(dim=1).sum())  # the one wait of a round
