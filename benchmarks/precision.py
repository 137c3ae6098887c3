"""Training one model in every precision, beside transformers' Trainer, and what `precision=auto`
would choose.

    python benchmarks/precision.py [--device cuda] [--shapes 124m 1.3b] [--rounds 5] [--steps 8]
    [--probes 10] [--save]

Models on full windows of random tokens, the same for all; AdamW; blocks of steps take turns in one
process. Arms: this project's loop in each precision that the device can (compiled on CUDA);
transformers' Trainer in fp32 and bf16 as it ships; at GPT-2's shapes nanoGPT's step (nanogpt.py),
compiled on CUDA and under bf16's autocast, and of ours bf16 alone: transformers' GPT-2 has no
linear layers for fp8 to convert. An arm that fails is named with the reason; figures are saved
after each round. Per arm: tokens a second, the time with its ratio to `trainer, bf16`
round by round and its interval, and MFU where the device's peak is known. Each probe starts from
other weights; told is how often its choice is within 3% of the best fixed one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocks import WARM_UP, Block, between, blocks_of, encoded, finish, free, pace, settings_of
from distillation_head import ratio
from distillation_step import Watch
from nanogpt import GPT, optimizer_of
from results import attempt, save_result
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import PackedBatches
from pipeline.ledger.flops import count_flops
from pipeline.ledger.peaks import device_name, peak
from pipeline.ledger.phases import PhaseClock
from pipeline.stages.precision_choice import choose_precision
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective
from pipeline.training.precision import why_not
from pipeline.training.reading import examine

REFERENCE = "trainer, bf16"
NEAR = 1.03  # of the best fixed choice's time


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, its window and its batch."""

    config: LlamaConfig | GPT2Config
    length: int
    batch: int
    fp8_least_width: int = 1024

    def model(self, device: torch.device, seed: int = 0) -> Any:
        """Return a model with random weights in fp32."""
        torch.manual_seed(seed)
        with device:
            if isinstance(self.config, GPT2Config):
                return GPT2LMHeadModel(self.config)
            return LlamaForCausalLM(self.config)

    def documents(self) -> np.ndarray:
        """Return windows of random tokens, (N, T)."""
        draw = np.random.default_rng(0)
        return draw.integers(0, self.config.vocab_size, (16 * self.batch, self.length)).astype(
            np.int64
        )


def _llama(layers: int, width: int, wide: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
        use_cache=False,
        max_position_embeddings=2048,
    )


def _gpt2(layers: int, width: int, vocabulary: int, length: int) -> GPT2Config:
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(
        vocab_size=vocabulary,
        n_layer=layers,
        n_embd=width,
        n_head=width // 64,
        n_positions=length,
        use_cache=False,
        **none,
    )


SHAPES = {
    "124m": Shape(_llama(12, 768, 2048, 50304), 1024, 16, fp8_least_width=768),
    "1.3b": Shape(_llama(24, 2048, 5632, 50304), 2048, 4),
    "gpt2": Shape(_gpt2(12, 768, 50304, 1024), 1024, 16),
    "small": Shape(_llama(4, 256, 512, 4096), 128, 8),
    "tiny": Shape(_gpt2(2, 64, 512, 64), 64, 2),
    "tiny_llama": Shape(_llama(2, 64, 128, 512), 64, 2),
}
DEFAULTS = {"cuda": ("124m", "1.3b"), "cpu": ("small",)}


def batches_of(shape: Shape) -> PackedBatches:
    """Return this project's batches of the documents, one window each."""
    return PackedBatches(
        encoded(shape.documents()), sequence_length=shape.length, batch_size=shape.batch, seed=0
    )


def stepping(shape: Shape) -> Callable[[int], TrainingConfig]:
    """Return settings that do nothing but step, by the number of steps."""
    return partial(settings_of, shape.batch, shape.length, learning_rate=1e-4)


def ours(shape: Shape, device: torch.device, precision: Precision, *, compiled: bool) -> Block:
    """Return blocks of this project's loop."""
    model, batches = shape.model(device), batches_of(shape)
    objective = Objective(
        model, Task.causal_lm, precision, device, PhaseClock(), read=examine(model, device)
    )
    config = PrecisionConfig(name=precision, fp8_least_width=shape.fp8_least_width)
    return blocks_of(objective, batches, config, stepping(shape), compiled=compiled)


def of_trainer(shape: Shape, device: torch.device, *, bf16: bool) -> Block:
    """Return blocks of transformers' Trainer with its own defaults."""
    from datasets import Dataset

    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in shape.documents()]
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=shape.batch,
        bf16=bf16,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=1,
        use_cpu=device.type == "cpu",
    )
    trainer = Trainer(model=shape.model(device), args=args, train_dataset=Dataset.from_list(rows))
    trainer.remove_callback(PrinterCallback)

    def block(steps: int) -> tuple[float, int]:
        watch = Watch(device, steps)
        trainer.add_callback(watch)
        trainer.args.max_steps = WARM_UP + steps
        trainer.train()
        trainer.remove_callback(watch)
        return watch.seconds, steps * shape.batch * shape.length

    return block


def of_nanogpt(shape: Shape, device: torch.device) -> Block:
    """Return blocks of nanoGPT's step with its data on the device: compiled on CUDA, under bf16's
    autocast.
    """
    torch.manual_seed(0)
    config = shape.config
    assert isinstance(config, GPT2Config)
    with device:
        model = GPT(
            config.vocab_size, config.n_positions, config.n_layer, config.n_head, config.n_embd
        )
    forward: Any = torch.compile(model) if device.type == "cuda" else model
    optimizer = optimizer_of(model, learning_rate=1e-4)
    data = torch.from_numpy(shape.documents()).to(device)

    def block(steps: int) -> tuple[float, int]:
        edges: list[tuple[float, int]] = []
        for step in range(1, WARM_UP + steps + 1):
            ids = data[(step * shape.batch) % len(data) :][: shape.batch]
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(ids[:, :-1], ids[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step in (WARM_UP, WARM_UP + steps):
                finish(device)
                edges.append((time.perf_counter(), step * shape.batch * shape.length))
        return between(edges)

    return block


def arms_of(shape: Shape, device: torch.device) -> dict[str, Callable[[], Block]]:
    """Return by arm how to make its blocks."""
    cuda, gpt2 = device.type == "cuda", isinstance(shape.config, GPT2Config)
    able = [
        each for each in Precision if each is not Precision.auto and why_not(each, device) is None
    ]
    arms: dict[str, Callable[[], Block]] = {
        f"ours, {each.value}": partial(ours, shape, device, each, compiled=cuda)
        for each in ([Precision.bf16] if gpt2 else able)
    }
    arms |= {
        f"trainer, {name}": partial(of_trainer, shape, device, bf16=name == "bf16")
        for name in ("fp32", "bf16")
    }
    return arms | ({"nanogpt, bf16": partial(of_nanogpt, shape, device)} if gpt2 else {})


def probes(shape: Shape, device: torch.device, count: int) -> list[dict[str, Any]]:
    """Return what `precision=auto` chooses from other weights each time, and what that took."""
    found: list[dict[str, Any]] = []
    for seed in range(count):
        model = shape.model(device, seed)
        objective = Objective(
            model, Task.causal_lm, Precision.auto, device, PhaseClock(), read=examine(model, device)
        )
        config = PrecisionConfig(name=Precision.auto, fp8_least_width=shape.fp8_least_width)
        before = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            choice = choose_precision(
                model,
                objective,
                batches_of(shape),
                stepping(shape)(1000),
                config,
                left_out=[],
                folder=Path(folder),
                clock=objective.clock,
            )
        found.append({"seed": seed, "seconds": time.perf_counter() - before, **choice.about})
        free()
    return found


def measure(
    name: str,
    device: torch.device,
    rounds: int,
    steps: int,
    num_probes: int,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Return the figures of all arms at one shape; `keep` is given what there is as it comes."""
    shape = SHAPES[name]
    arms = arms_of(shape, device)
    together = device.type == "cpu" or name == "gpt2"  # a GPU holds all of them
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}  # a token
    blocks, failed = dict[str, Block](), dict[str, str]()
    flops = count_flops(shape.model(torch.device("cpu")), Task.causal_lm, backward=True)
    per_token = flops.batch(1, shape.length, shape.length - 1) / shape.length
    found: dict[str, Any] = {}
    for number in range(rounds):
        for arm in sorted(seconds, reverse=bool(number % 2)):
            taken, why = attempt(partial(pace, arm, arms[arm], blocks, steps))
            if taken is None:
                failed[arm] = why or ""
                del seconds[arm]
            else:
                seconds[arm].append(taken)
            if taken is None or not together:
                blocks.pop(arm, None)
            free()
        found = {
            "arms": {
                arm: _figures(arm, each, seconds.get(REFERENCE), per_token, device)
                for arm, each in seconds.items()
            },
            "not_here": failed,
            "probes": [],
        }
        keep(found)
    if not num_probes:
        return found
    blocks.clear()
    free()
    chosen = probes(shape, device, num_probes)
    eager = _fixed_eager(shape, device, rounds, steps) if device.type == "cuda" else seconds
    near = sum(_is_near(each["chosen"], eager) for each in chosen)
    return {**found, "probes": chosen, "near_the_best": near}


def _fixed_eager(
    shape: Shape, device: torch.device, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Return seconds a token of every precision without compiling, which is what a probe tries."""
    able = [
        each for each in Precision if each is not Precision.auto and why_not(each, device) is None
    ]
    seconds: dict[str, list[float]] = {f"ours, {each.value}": [] for each in able}
    for _ in range(rounds):
        for each in able:
            taken, tokens = ours(shape, device, each, compiled=False)(steps)
            seconds[f"ours, {each.value}"].append(taken / tokens)
            free()
    return seconds


def _is_near(chosen: str, seconds: dict[str, list[float]]) -> bool:
    medians = {
        arm: statistics.median(each) for arm, each in seconds.items() if arm.startswith("ours, ")
    }
    return medians[f"ours, {chosen}"] <= NEAR * min(medians.values())


def _figures(
    arm: str,
    seconds: list[float],
    reference: list[float] | None,
    per_token: float,
    device: torch.device,
) -> dict[str, Any]:
    rates = [1 / each for each in seconds]
    beside = reference is not None and arm != REFERENCE
    arithmetic = arm.partition(", ")[2].partition("_")[0]
    top = peak(device_name(device), arithmetic).value
    return {
        "tokens_per_s": statistics.median(rates),
        "all_tokens_per_s": rates,
        "times_reference": ratio(seconds, reference) if beside else None,
        "mfu": None if top is None else statistics.median(rates) * per_token / (top * 1e12),
    }


def table(name: str, found: dict[str, Any]) -> str:
    """Return the figures in lines."""
    lines = [f"{name}:", f"{'arm':22} {'tokens/s':>12} {'time, times ' + REFERENCE:>30} {'MFU':>7}"]
    for arm, each in found["arms"].items():
        times, mfu = each["times_reference"], each["mfu"]
        shown = (
            ""
            if times is None
            else f"{times['ratio']:.2f} [{times['low']:.2f}, {times['high']:.2f}]"
        )
        lines.append(
            f"{arm:22} {each['tokens_per_s']:12,.0f} {shown:>30}"
            f" {'' if mfu is None else f'{mfu:.1%}':>7}"
        )
    lines += [f"{arm}: not here: {why}" for arm, why in found["not_here"].items()]
    chosen = [each["chosen"] for each in found["probes"]]
    taken = [each["seconds"] for each in found["probes"]]
    if chosen:
        near = f"{found['near_the_best']} of {len(chosen)} within 3% of the best"
        lines.append(
            f"precision=auto chose {', '.join(chosen)}: {near}; a probe took"
            f" {statistics.median(taken):.1f} s"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--probes", type=int, default=10)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name in args.shapes or DEFAULTS[device.type]:

        def keep(figures: dict[str, Any], name: str = name) -> None:
            found[name] = figures
            if args.save:
                told = [*lines, table(name, figures)]
                save_result("precision", found, "\n".join(told))

        found[name] = measure(name, device, args.rounds, args.steps, args.probes, keep)
        lines.append(table(name, found[name]))
        print(lines[-1], flush=True)
    if args.save:
        save_result("precision", found, "\n".join(lines))
    if any("ours, bf16" not in each["arms"] for each in found.values()):
        sys.exit("ours in bf16 was not measured")


if __name__ == "__main__":
    main()
