"""Loads whose FLOPs, joules and width are known: matmuls, idling, half of the time, one spinning
thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from known_load.claims import Readings
from known_load.device import Device, Plan
from torch.utils.flop_counter import FlopCounterMode

from pipeline.ledger.flops import count_flops
from pipeline.ledger.peaks import peak
from pipeline.tasks.table import Task

# of matmuls at a time: many in the second that power is the mean of, out of step with 100 ms
# samples
BURST_S = 0.023
# of idling at both ends of a window of N matmuls: the counter's lag then meets idle power
PAD_S = 1.0


def window(device: Device, work: Callable[[], object]) -> Readings:
    """Return the usage of the device while `work` lasts, as the ledger has it."""
    start_ns = device.now_ns()
    device.sampler.mark()
    work()
    device.sampler.mark()
    end_ns = device.now_ns()
    return {
        "seconds": (end_ns - start_ns) / 1e9,
        **device.sampler.usage((start_ns, end_ns)).to_json(),
    }


def keep_busy(device: Device, seconds: float, duty: float, burst: int) -> None:
    """Multiply in bursts, for this share of the time."""
    end_ns = device.now_ns() + seconds * 1e9
    while (before_ns := device.now_ns()) < end_ns:
        device.matmuls(burst)
        device.synchronize()
        if duty < 1:
            device.sleep((device.now_ns() - before_ns) / 1e9 * (1 / duty - 1))


def settle(device: Device, plan: Plan) -> bool:
    """Wait until the power of an idle board stands: five readings in a row within 3%. Return
    whether it does.
    """
    watts: list[float | None] = []
    for _ in range(round(plan.settle_s)):
        device.sleep(1.0)
        device.sampler.tick()
        watts.append(device.readings[-1].power_w if device.readings else None)
        last = [each for each in watts[-5:] if each is not None]
        if len(last) == 5 and max(last) < 1.03 * min(last):
            return True
    return False


def matmul_s(device: Device, warm_s: float) -> float:
    """Return seconds of a matmul on a device that is warm."""
    device.seconds_of(10)
    each = device.seconds_of(20) / 20
    return device.seconds_of(max(20, round(warm_s / each))) / max(20, round(warm_s / each))


def measure_flops(device: Device, plan: Plan) -> Readings:
    """Read the FLOPs of known work, and how fast it was."""
    matmul_s(device, plan.warm_s / 2)
    count = 50
    return {
        "counted": device.counted_flops(count),
        "known": 2 * device.size**3 * count,
        "seconds": [device.seconds_of(count) for _ in range(plan.repeats)],
        "peak": peak(device.name, "bf16").to_json(),
        **transformer_flops(device.at),
    }


def transformer_flops(at: torch.device, rows: int = 2, length: int = 100) -> Readings:
    """Return the FLOPs of a training step of a small Llama: as the ledger counts, as torch does,
    and by hand.
    """
    model = llama().to(at)
    model.set_attn_implementation("eager")
    ids = torch.zeros(rows, length, dtype=torch.long, device=at)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    config, ledger = model.config, count_flops(model, Task.causal_lm, backward=True)
    width, wide = config.hidden_size, config.intermediate_size
    per_token = config.num_hidden_layers * (4 * width**2 + 3 * width * wide + 2 * width * length)
    by_hand = 3 * 2 * rows * length * (per_token + width * config.vocab_size)
    # some releases multiply these as matrices
    angles = 2 * rows * length * (width // config.num_attention_heads // 2)
    counted = rows * ledger(length)
    return {
        "ledger": counted,
        "counter": counter.get_total_flops(),
        "by_hand": by_hand + (angles if counted == by_hand + angles else 0),
    }


def llama() -> Any:
    """Return a small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
    )


def measure_energy(device: Device, plan: Plan) -> Readings:
    """Read joules of steady loads, and of N and 2N matmuls."""
    each_s = matmul_s(device, plan.warm_s)
    found: Readings = {
        "full": steady(device, plan, 1.0, each_s),
        "half": steady(device, plan, 0.5, each_s),
    }
    found["settled"] = settle(device, plan)
    found["idle"] = [
        window(device, lambda: device.sleep(plan.window_s)) for _ in range(plan.repeats)
    ]
    return {**found, "matmul_s": each_s, "doubling": doubling(device, plan, each_s)}


def steady(device: Device, plan: Plan, duty: float, each_s: float) -> list[Readings]:
    """Return windows in the midst of a load."""
    burst = max(1, round(BURST_S / each_s))
    keep_busy(device, plan.lead_s, duty, burst)
    return [
        window(device, lambda: keep_busy(device, plan.window_s, duty, burst))
        for _ in range(plan.repeats)
    ]


def doubling(device: Device, plan: Plan, each_s: float) -> list[Readings]:
    """Return windows of N and of 2N matmuls, in turns of both orders, so that drift meets both
    alike.
    """
    count = max(1, round(plan.once_s / each_s))

    def work(times: int) -> None:
        device.sleep(PAD_S)
        device.matmuls(times * count)
        device.synchronize()
        device.sleep(PAD_S)

    pairs: list[Readings] = []
    for number in range(plan.repeats):
        pair: Readings = {"matmuls": count}
        for name in ("once", "twice") if number % 2 == 0 else ("twice", "once"):
            device.sleep(plan.rest_s)
            pair[name] = window(device, lambda name=name: work(1 + (name == "twice")))
        pairs.append(pair)
    return pairs


def measure_spin(device: Device, plan: Plan) -> Readings:
    """Read what a board says of itself while one thread spins."""
    threads, windows = device.threads_of_spin(), list[Readings]()
    for _ in range(plan.repeats):
        spins = device.spin(plan.lead_s + plan.spin_s + 1.5)
        device.sleep(plan.lead_s)
        windows.append(window(device, lambda: device.sleep(plan.spin_s)))
        windows[-1]["lasted"] = spins()
        device.synchronize()
    return {"threads": threads, "windows": windows}
