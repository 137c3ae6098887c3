"""Which way of writing tokens is the fastest for a model, a device and a load: timed.

A captured step saves what starting kernels costs, and a compiled one the traffic between them; but
a format that its library unpacks at every step gains nothing from either, and some formats cannot
be captured at all. So `serving.decode=auto` makes a decoder of each kind, times the two best in
turns, and keeps the faster one. Only a decoder whose logits are those of a growing cache takes
part. What compiling and timing take is part of the warm-up, and stands in the result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.serving import Decode
from pipeline.evaluation.serving.decoding import Decoder, Growing, fixed_decoder
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.shapes import DecodeProbe

if TYPE_CHECKING:
    import torch

WAYS = (Decode.graph, Decode.compile)  # tried against a growing cache, in this order
ROUNDS = 3  # timed readings of each of two, in turns
MOST_STEPS = 32  # of a reading; a longer answer is extrapolated from them
LEAST_SAVED = 0.02  # of a batch's time: what is less may be noise, and the simpler way stays


def fastest(
    model: Any, given: Mapping[str, int], prompt: torch.Tensor, new: int, now_ns: Callable[[], int]
) -> tuple[Decoder, DecodeProbe]:
    """Return the fastest decoder, and how it was found.

    Args:
        model: In evaluation mode, on the prompt's device.
        given: Passed to every call of its forward.
        prompt: Token ids (B, T) to be served.
        new: Tokens to be generated for each.
        now_ns: Monotonic clock, integer nanoseconds.
    """
    started = now_ns()
    best: Decoder = Growing(model.forward, given)
    chosen, seconds, refused = Decode.dynamic, dict[str, float](), list[str]()
    for way in WAYS if new > 1 else ():
        other = fixed_decoder(model, way, given, prompt, new)
        if isinstance(other, str):
            refused.append(other)
            continue
        best_s, other_s = _race(best, other, prompt, new, now_ns)
        seconds |= {chosen.value: best_s, way.value: other_s}
        # Dropped before the next one is made: two caches fit at a time, three may not.
        if other_s < (1 - LEAST_SAVED) * best_s:
            best, chosen = other, way
        del other
    return best, {
        "batch": len(prompt),
        "chosen": chosen.value,
        "how": best.how,
        "seconds": seconds,
        "refused": list(dict.fromkeys(refused)),
        "took_s": (now_ns() - started) / 1e9,
    }


def _race(
    ours: Decoder, theirs: Decoder, prompt: torch.Tensor, new: int, now_ns: Callable[[], int]
) -> tuple[float, float]:
    """Return the median seconds of a batch of each, read in turns after a batch that is not."""
    read: dict[Decoder, list[float]] = {ours: [], theirs: []}
    for number in range(ROUNDS + 1):
        for each in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            batch_s = _batch_s(each, prompt, new, now_ns)
            if number:
                read[each].append(batch_s)
    return statistics.median(read[ours]), statistics.median(read[theirs])


def _batch_s(decoder: Decoder, prompt: torch.Tensor, new: int, now_ns: Callable[[], int]) -> float:
    """Return the seconds of a batch: its prompt, and its steps as some of them went."""
    device, steps = device_of(prompt.device), min(new - 1, MOST_STEPS)

    def finished_ns() -> int:
        device.synchronise()
        return now_ns()

    decoder.reset()
    start = finished_ns()
    decoder.prefill(prompt)
    middle = finished_ns()
    for _ in range(steps):
        decoder.step()
    return (middle - start + (finished_ns() - middle) * (new - 1) / steps) / 1e9


def said(probe: DecodeProbe) -> str:
    """Return what a report says of a probe."""
    times = ", ".join(f"{way} {seconds:.3g} s" for way, seconds in probe["seconds"].items())
    parts = [
        f"serving.decode=auto took {probe['chosen']} ({probe['how']})"
        f" after a probe of {probe['took_s']:.1f} s",
        *([f"a batch of {probe['batch']}: {times}"] if times else []),
        *probe["refused"],
    ]
    return "; ".join(parts)
