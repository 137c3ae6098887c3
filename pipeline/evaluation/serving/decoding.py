"""Ways to write token after token: a key-value cache that grows, or one of fixed size, compiled and
captured.

A cache that grows asks for memory and starts every kernel from the host at each token. A cache of
fixed size has the same addresses at every step, so that a step can be captured once as a CUDA graph
and replayed: the host drops out. Whether a model can do so is tried, and what it then predicts is
held against the growing cache before it is believed.

What is compiled is compiled whole, once for each decoder, from code of its own. torch counts
recompilations by code: decoders that shared a model class's would meet its limit of 8 after 8
models or shapes, and from then on run eager without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config.settings.serving import Decode
from pipeline.errors import one_line
from pipeline.ledger.devices.device import Device
from pipeline.ledger.devices.table import device_of

if TYPE_CHECKING:
    import torch

LEAST_ALIKE = 0.99
"""Cosine of the logits of a step with those from a growing cache; arithmetic alone leaves far more
alike.
"""
REASON = 120  # characters of why a way was not taken


class Decoder(Protocol):
    """Writes for one batch at a time.

    Attributes:
        held_bytes: Device memory it keeps between batches.
        peak_bytes: Device memory it took at most while it was made.
        is_compiled: Whether torch compiled its steps.
    """

    held_bytes: int
    peak_bytes: int
    is_compiled: bool

    @property
    def how(self) -> str:
        """What ran, as results name it."""
        ...

    def reset(self) -> None:
        """Forget the batch before."""

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        """Return the first new tokens (B, 1) of `prompt` (B, T)."""
        ...

    def step(self) -> torch.Tensor:
        """Return the next tokens (B, 1)."""
        ...


class Growing:
    """A key-value cache that grows by a token a step; tokens are (B, 1), prompts (B, T).

    Args:
        forward: Of the model.
        given: Passed to every call of it.
        why: Why no other way was taken; empty where none was asked for.
    """

    held_bytes = peak_bytes = 0
    is_compiled = False

    def __init__(self, forward: Any, given: Mapping[str, int], why: str = "") -> None:
        self._forward, self._given = forward, given
        self._how = f"dynamic cache ({why})" if why else "dynamic cache"
        self._cache: Any = None
        self._token: Any = None
        self.logits: Any = None

    @property
    def how(self) -> str:
        return self._how

    def reset(self) -> None:
        self._cache = None

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        return self._feed(prompt)

    def step(self) -> torch.Tensor:
        return self._feed(self._token)

    def _feed(self, ids: torch.Tensor) -> torch.Tensor:
        out = self._forward(
            input_ids=ids, past_key_values=self._cache, use_cache=True, **self._given
        )
        self._cache, self.logits = out.past_key_values, out.logits[:, -1]
        self._token = self.logits.argmax(-1, keepdim=True)
        return self._token


class Fixed:
    """A key-value cache of fixed size; its step captured as a CUDA graph by `capture`.

    The tokens of a step are written where the next one reads them.

    Args:
        model: In evaluation mode.
        prompt: Token ids (B, T) of the shape to be served.
        size: Tokens that the cache holds.
        compiled: Compile the steps after the prompt.
    """

    held_bytes = peak_bytes = 0

    def __init__(
        self,
        model: Any,
        given: Mapping[str, int],
        prompt: torch.Tensor,
        size: int,
        *,
        compiled: bool = False,
    ) -> None:
        import torch
        from transformers import StaticCache

        self._model, self._given = model, given
        self._cache = StaticCache(config=model.config, max_cache_len=size)
        self._token = torch.zeros(len(prompt), 1, dtype=torch.int64, device=prompt.device)
        self.is_compiled, self._graphs, self._is_captured = compiled, 0, False
        self._logits_of = compiled_whole(self._predict) if compiled else self._predict
        self._replay: Callable[[], None] = self._feed_own_token
        self.logits: Any = None

    @property
    def how(self) -> str:
        words = ["static cache"]
        if self.is_compiled:
            words.append(f"compiled ({num_graphs(self._graphs)})")
        return ", ".join([*words, *(["CUDA graph"] if self._is_captured else [])])

    def reset(self) -> None:
        self._cache.reset()

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        self._feed(self._predict, prompt)
        return self._token

    def step(self) -> torch.Tensor:
        self._replay()
        return self._token

    def compile(self) -> None:
        """Compile the step; what `graphs_of` raises passes."""
        self._graphs = graphs_of(self._feed_own_token)

    def capture(self) -> None:
        """Capture a step. What is not allowed in a capture (waiting for the device, say) raises."""
        device = device_of(self._token.device)
        self._replay = device.capture(self._feed_own_token, self.reset)
        self._is_captured = True

    def _feed_own_token(self) -> None:
        self._feed(self._logits_of, self._token)

    def _feed(self, logits_of: Callable[[Any], Any], ids: torch.Tensor) -> None:
        self.logits = logits_of(ids)
        # In place: a captured graph reads and writes fixed addresses.
        self._token.copy_(self.logits.argmax(-1, keepdim=True))

    def _predict(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, V) after the last of some tokens (B, T)."""
        out = self._model.forward(
            input_ids=ids, past_key_values=self._cache, use_cache=True, **self._given
        )
        return out.logits[:, -1]


def compiled_whole(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function compiled as one graph, whose recompilations count for it alone.

    What breaks a graph raises at its first call: a step in pieces is neither fast nor captured.
    """
    import torch

    def called(ids: Any) -> Any:
        return function(ids)

    own: Any = FunctionType(
        called.__code__.replace(), called.__globals__, closure=called.__closure__
    )
    return torch.compile(own, dynamic=False, fullgraph=True)


def graphs_compiled() -> int:
    """Return how many graphs torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def graphs_of(step: Callable[[], None]) -> int:
    """Run a compiled step twice; return how many graphs torch made of it.

    Raises:
        RuntimeError: If torch compiled nothing of it, or does so again at every step.
    """
    before = graphs_compiled()
    step()
    graphs = graphs_compiled() - before
    step()
    if not graphs:
        raise RuntimeError("torch compiled nothing of it")
    if graphs_compiled() - before > graphs:
        raise RuntimeError("torch compiles every step anew")
    return graphs


def num_graphs(number: int) -> str:
    """Return a number of graphs in words."""
    return f"{number} graph{'' if number == 1 else 's'}"


def chosen(decode: Decode, device: torch.device) -> Decode:
    """Return what `auto` stands for on a device where nothing is timed; anything else as it is."""
    if decode is not Decode.auto:
        return decode
    return Decode.graph if device_of(device).captures else Decode.dynamic


def is_timed(decode: Decode, device: torch.device) -> bool:
    """Return whether the way that tokens are written is one that a probe finds (`fastest.py`)."""
    return decode is Decode.auto and device_of(device).captures


def make_decoder(
    model: Any, decode: Decode, given: Mapping[str, int], prompt: torch.Tensor, new: int
) -> Decoder:
    """Return the decoder asked for, or one with a growing cache that says why it is not that.

    Args:
        model: In evaluation mode, on the prompt's device.
        given: Passed to every call of its forward.
        prompt: Token ids (B, T) of the kind to be served.
        new: Tokens to be generated for each.
    """
    decode = chosen(decode, prompt.device)
    if decode is Decode.dynamic or new == 1:
        return Growing(model.forward, given)
    made = fixed_decoder(model, decode, given, prompt, new)
    return Growing(model.forward, given, made) if isinstance(made, str) else made


def fixed_decoder(
    model: Any, decode: Decode, given: Mapping[str, int], prompt: torch.Tensor, new: int
) -> Fixed | str:
    """Return the decoder of fixed size that was asked for, or why there is none; arguments as
    `make_decoder` takes them.
    """
    # transformers' own mark of models with a static cache
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"{type(model).__name__} has no static cache"
    captured = device_of(prompt.device).captures and decode is not Decode.static
    try:
        return _fixed(
            model, given, prompt, new, compiled=decode is Decode.compile, captured=captured
        )
    # Kernels refuse capture and compilation in their own ways.
    except Exception as error:  # noqa: BLE001
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"not {decode.value}: {one_line(first, REASON)}"


def _fixed(
    model: Any,
    given: Mapping[str, int],
    prompt: torch.Tensor,
    new: int,
    *,
    compiled: bool,
    captured: bool,
) -> Fixed:
    import torch

    own = device_of(prompt.device)
    before = _start_peak(own) if own.counts_memory else 0
    decoder = Fixed(model, given, prompt, prompt.shape[1] + new, compiled=compiled)
    decoder.prefill(prompt)  # makes room for the keys and values
    if compiled:
        decoder.compile()
    if captured:
        decoder.capture()
    # Once more from the start, to have logits to compare.
    decoder.reset()
    decoder.prefill(prompt)
    decoder.step()
    if own.counts_memory:
        now = own.allocator()
        decoder.peak_bytes, decoder.held_bytes = now.peak_allocated - before, now.allocated - before
    growing = Growing(model.forward, given)
    growing.prefill(prompt)
    growing.step()
    alike = (
        torch.nn.functional.cosine_similarity(
            decoder.logits.float(), growing.logits.float(), dim=-1
        )
        .min()
        .item()
    )
    # `not ... >=` also catches NaN.
    if not alike >= LEAST_ALIKE:
        raise RuntimeError(f"its predictions are not those of a growing cache (cosine {alike:.3f})")
    return decoder


def _start_peak(device: Device) -> int:
    device.reset_memory()
    return device.allocator().allocated
