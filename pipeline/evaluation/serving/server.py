"""One loaded artifact that serves batches and times them.

The clock is read only after the device has finished what was asked of it. Prompts are on the device
beforehand, and every generation runs to its full length: a model that likes to stop early would
look cheap.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.settings.serving import Decode
from pipeline.data.padding import read_by, token_of
from pipeline.evaluation.serving.decoding import (
    Decoder,
    graphs_compiled,
    is_timed,
    make_decoder,
    num_graphs,
)
from pipeline.evaluation.serving.fastest import fastest
from pipeline.ledger.attempted import attempted
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.shapes import DecodeProbe
from pipeline.models.load import ends_once, load_model, load_tokenizer
from pipeline.models.sixteen_bits import stored_dtype
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Reading:
    """One batch served.

    Attributes:
        prefill_s: Seconds of reading the prompts, up to and with the first new token (or the
            class).
        decode_s: Seconds of the further new tokens; 0 for classification.
        units: Tokens generated (batch x new), or examples classified (batch).
        working_bytes: Device memory allocated at most, above what was allocated before; None where
            it is not counted.
        how: The way tokens were written; empty for classification.
    """

    prefill_s: float
    decode_s: float
    units: int
    working_bytes: int | None
    how: str = ""

    @property
    def total_s(self) -> float:
        """Seconds of the whole batch."""
        return self.prefill_s + self.decode_s


class Server:
    """Serves one model on one device.

    Args:
        model: In evaluation mode, on `device`.
        now_ns: Monotonic clock, integer nanoseconds.
        decode: How tokens are written after the prompt.

    Attributes:
        probes: How that was found where it is timed, by batch, prompt and new tokens.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        device: torch.device,
        now_ns: Callable[[], int],
        decode: Decode = Decode.dynamic,
    ) -> None:
        self.model, self.task, self.device = model, task, device
        # before the first forward, which may repack quantized weights
        self.weights_bytes = weights_bytes(model)
        self._now_ns, self._decode = now_ns, decode
        self._decoder: tuple[tuple[Any, ...], Decoder] | None = None
        self.probes: dict[tuple[int, ...], DecodeProbe] = {}
        # Only the last position's logits are needed: the others would cost memory that no server
        # spends.
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only: dict[str, int] = {"logits_to_keep": 1} if keeps else {}
        self._end = ends_once(model.config, task)

    @property
    def dtype(self) -> str:
        """The dtype it serves in, as the result names it."""
        quantized = getattr(self.model.config, "quantization_config", None) is not None
        return str(self.model.dtype).removeprefix("torch.") + (
            ", quantized weights" if quantized else ""
        )

    def once(self, prompt_ids: np.ndarray, new: int, *, decode: Decode | None = None) -> Reading:
        """Serve one batch.

        Args:
            prompt_ids: Token ids (batch, prompt), without padding.
            new: Tokens to generate for each; not used by classification.
            decode: Another way of writing tokens than the server's own.
        """
        import torch

        prompt = torch.from_numpy(prompt_ids.astype(np.int64)).to(self.device)
        with torch.inference_mode():
            if not self.task.kind.is_language:
                if self._end is not None:  # prompts are cut anywhere
                    prompt[prompt == self._end] = self._end - 1
                    prompt[:, -1] = self._end
                batch = read_by(
                    self.model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
                )
                before = self._start_memory()
                start = self._finished_ns()
                self.model(**batch)
                end = self._finished_ns()
                return Reading((end - start) / 1e9, 0.0, len(prompt), self._working_bytes(before))
            decoder = self._decoder_for(prompt, new, decode or self._decode)
            decoder.reset()
            graphs = graphs_compiled() if decoder.is_compiled else 0
            before = self._start_memory()
            start = self._finished_ns()
            decoder.prefill(prompt)
            middle = self._finished_ns()
            for _ in range(new - 1):
                decoder.step()
            end = self._finished_ns()
        working = self._working_bytes(before)
        if working is not None:  # what a captured step takes is known from its capture alone
            working = max(decoder.held_bytes + working, decoder.peak_bytes)
        how, anew = decoder.how, graphs_compiled() - graphs if decoder.is_compiled else 0
        if anew:
            how += f", {num_graphs(anew)} compiled while it was read"
        return Reading(
            (middle - start) / 1e9, (end - middle) / 1e9, len(prompt) * new, working, how
        )

    def text(self, prompt_ids: np.ndarray, new: int, decode: Decode | None = None) -> torch.Tensor:
        """Return the greedy tokens (batch, new) of prompts (batch, T), as `once` writes them."""
        import torch

        prompt = torch.from_numpy(prompt_ids.astype(np.int64)).to(self.device)
        with torch.inference_mode():
            decoder = self._decoder_for(prompt, new, decode or self._decode)
            decoder.reset()
            tokens = [decoder.prefill(prompt).clone()]
            tokens += [decoder.step().clone() for _ in range(new - 1)]
        return torch.cat(tokens, dim=1)

    def _decoder_for(self, prompt: torch.Tensor, new: int, decode: Decode) -> Decoder:
        """Return the decoder of this shape, made anew where the last one had another: one at a time
        is in memory.
        """
        asked = (*prompt.shape, new, decode)
        if self._decoder is None or self._decoder[0] != asked:
            # Freed before the new one is made: two caches may not fit.
            self._decoder = None
            self._decoder = asked, self._made(prompt, new, decode)
        return self._decoder[1]

    def _made(self, prompt: torch.Tensor, new: int, decode: Decode) -> Decoder:
        """Return a decoder; the way that a probe found for a shape is not looked for again."""
        shape = (*prompt.shape, new)
        if is_timed(decode, prompt.device):
            if shape not in self.probes:
                found, self.probes[shape] = fastest(
                    self.model, self._last_only, prompt, new, self._now_ns
                )
                return found
            decode = Decode(self.probes[shape]["chosen"])
        return make_decoder(self.model, decode, self._last_only, prompt, new)

    def _finished_ns(self) -> int:
        device_of(self.device).synchronise()
        return self._now_ns()

    def _start_memory(self) -> int | None:
        if not device_of(self.device).counts_memory:
            return None
        return attempted(self._new_peak, lambda _: None)

    def _new_peak(self) -> int:
        own = device_of(self.device)
        own.reset_memory()
        return own.allocator().allocated

    def _working_bytes(self, before: int | None) -> int | None:
        if before is None:
            return None
        peak = lambda: device_of(self.device).allocator().peak_allocated
        return attempted(lambda: peak() - before, lambda _: None)


def load(
    folder: Path,
    task: Task,
    device: torch.device | str,
    *,
    labels: tuple[str, ...] | None,
    now_ns: Callable[[], int],
    dtype: torch.dtype | None = None,
    decode: Decode = Decode.auto,
) -> Server:
    """Load an artifact to be served.

    Args:
        folder: A model in Hugging Face layout; a quantized one serves as it is.
        task: What the model is for.
        device: Where to serve.
        labels: Class names.
        now_ns: Monotonic clock, integer nanoseconds.
        dtype: Of an artifact that is stored in fp32; None: fp32, as it was assessed. One that is
            stored in 16 bits is served in them.
        decode: How tokens are written after the prompt.

    Raises:
        UserError: If it cannot be loaded.
    """
    import torch

    device = torch.device(device)
    stored = stored_dtype(folder, device)
    if stored is torch.float32:
        stored = dtype or torch.float32
    model: Any = load_model(folder, task, device=device, labels=labels, dtype=stored)
    if not task.kind.is_language:
        token_of(model, load_tokenizer(folder).pad_token_id)
    return Server(model, task, device, now_ns, decode)


def weights_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers, with the scales that quantized ones
    carry beside them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return sum(_stored_bytes(tensor) + _scale_bytes(tensor) for tensor in tensors)


def _stored_bytes(tensor: Any) -> int:
    """Return the bytes a tensor takes: a subclass (torchao's) names what it holds, and is itself of
    another dtype.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _scale_bytes(tensor: Any) -> int:
    """Return the bytes of a bitsandbytes parameter's scales: `SCB` (int8) or `quant_state` (4
    bits).
    """
    state = getattr(tensor, "quant_state", None)
    scales = [
        getattr(tensor, "SCB", None),
        *([] if state is None else state.as_dict(packed=False).values()),
    ]
    return sum(getattr(scale, "nbytes", 0) for scale in scales)
