"""What an artifact costs to run at the declared load, arms interleaved so that drift cancels.

A unit is a generated token (causal_lm) or an example (classification). One reading serves one batch: the prompt
(prefill), then `new` tokens one at a time from the key-value cache (decode).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import ServingConfig, Task
from pipeline.ledger.phases import PhaseClock
from pipeline.models import load_model
from pipeline.values import derive, measured, null

SHORTEST_S = 0.02  # a reading repeats its batch until it is well above the timer's noise


@dataclass(slots=True)
class Server:
    """One loaded artifact and its readings at the declared load."""

    model: Any
    task: Task
    device: Any
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    by_batch: dict[int, float] = field(default_factory=dict)

    def _now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def once(self, prompt: Any, new: int) -> tuple[float, float]:
        """Serve one batch; return seconds of prefill and of decode."""
        import torch

        with torch.inference_mode():
            start = self._now()
            if self.task is Task.sequence_classification:
                _ = self.model(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits
                return self._now() - start, 0.0
            out = self.model(input_ids=prompt, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            middle = self._now()
            for _ in range(new - 1):
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            return middle - start, self._now() - middle

    def read(self, prompt: Any, new: int, repeats: int) -> tuple[float, float]:
        """Return the mean seconds (prefill, decode) of `repeats` batches."""
        readings = [self.once(prompt, new) for _ in range(repeats)]
        return tuple(float(np.mean(part)) for part in zip(*readings, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class ServePass:
    """Figures by arm, and by pair the seconds of both sides: arrays (blocks, 2)."""

    serving: dict[str, dict[str, dict[str, Any]]]
    seconds: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


def serve_pass(
    artifacts: dict[str, Path], pairs: list[tuple[str, str]], *, task: Task, labels: tuple[str, ...] | None,
    prompts: Sequence[np.ndarray], config: ServingConfig, device: Any, devices: int, seed: int, clock: PhaseClock,
) -> ServePass:  # fmt: skip
    """Measure arms at the declared load in ABBA blocks, and at further batch sizes in turn.

    Args:
        artifacts: Folders by arm, of every arm in `pairs`.
        prompts: Encoded documents that prompts are cut from.
    """
    with clock.phase("model_load"):
        servers = {
            arm: Server(load_model(path, task, device=device, labels=labels), task, device)
            for arm, path in artifacts.items()
        }
    new = config.load.new if task is Task.causal_lm else 1
    with clock.phase("generate"):
        prompt = make_prompt(prompts, config.load.batch, config.load.prompt, seed).to(device)
        repeats = {arm: _warm_up(server, prompt, new) for arm, server in servers.items()}
        seconds = {
            pair: abba(*(lambda arm=arm: _book(servers[arm], prompt, new, repeats[arm]) for arm in pair), config.blocks)
            for pair in pairs
        }
        for batch in config.batches:
            sized = make_prompt(prompts, batch, config.load.prompt, seed).to(device)
            for server in servers.values():
                server.by_batch[batch] = sum(server.read(sized, new, 1)) * devices * 1000 / (batch * new)
    return ServePass({arm: _figures(server, config, new, devices) for arm, server in servers.items()}, seconds)


def abba(arm: Any, base: Any, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Call arm, base, base, arm in each block; return the seconds of both, (blocks, 2) each."""
    ours, theirs = np.empty((blocks, 2)), np.empty((blocks, 2))
    for block in range(blocks):
        ours[block, 0], theirs[block, 0] = arm(), base()
        theirs[block, 1], ours[block, 1] = base(), arm()
    return ours, theirs


def _book(server: Server, prompt: Any, new: int, repeats: int) -> float:
    prefill, decode = server.read(prompt, new, repeats)
    server.prefill_s.append(prefill)
    server.decode_s.append(decode)
    return prefill + decode


def _warm_up(server: Server, prompt: Any, new: int) -> int:
    """Serve twice unread; return how often a reading repeats its batch."""
    server.once(prompt, new)
    return max(1, int(np.ceil(SHORTEST_S / max(sum(server.once(prompt, new)), 1e-6))))


def make_prompt(prompts: Sequence[np.ndarray], batch: int, length: int, seed: int) -> Any:
    """Return (batch, length) token ids cut from real documents at seeded places."""
    import torch

    whole = np.concatenate(list(prompts))
    whole = np.tile(whole, -(-(length + 1) // len(whole)))
    starts = np.random.default_rng(seed).integers(0, len(whole) - length, batch)
    return torch.from_numpy(np.stack([whole[start : start + length] for start in starts]).astype(np.int64))


def _figures(server: Server, config: ServingConfig, new: int, devices: int) -> dict[str, dict[str, Any]]:
    prefill, decode = np.array(server.prefill_s), np.array(server.decode_s)
    load, total = config.load, np.array(server.prefill_s) + np.array(server.decode_s)
    per_unit = 1000 * devices / (load.batch * new)
    weights = sum(t.nbytes for t in [*server.model.parameters(), *server.model.buffers()])
    causal = server.task is Task.causal_lm and new > 1
    values = {
        "device_s_per_1k_units": derive(lambda s: s * per_unit, measured(float(total.mean()))),
        "prefill_device_s_per_1k_tokens": derive(
            lambda s: s * 1000 * devices / (load.batch * load.prompt), measured(float(prefill.mean()))),
        "decode_device_s_per_1k_tokens": derive(
            lambda s: s * 1000 * devices / (load.batch * (new - 1)), measured(float(decode.mean())))
        if causal else null("classification decodes nothing"),
        "p50_s": measured(float(np.quantile(total, 0.5))),
        "p95_s": measured(float(np.quantile(total, 0.95))),
        "weights_bytes": measured(weights),
        "peak_bytes": null("several arms are loaded at once in the comparison pass"),
    }  # fmt: skip
    values |= {f"batch_{size}_device_s_per_1k_units": measured(s) for size, s in server.by_batch.items()}
    return {name: value.to_json() for name, value in values.items()}
