"""Whole steps of distillation beside a peer's trainer: tokens a second, memory, and that both
compute the same loss.

    python benchmarks/distillation_step.py [--device cuda] [--shapes gpt2 llama1b] [--rounds 5]
    [--steps 8] [--arms ours trl] [--batches 16 32] [--save]

Documents of many lengths, the same for all; forward KL alone; AdamW; counted are tokens of
documents, padding is not. Arms, in blocks of steps that take turns in one process, each with the
batch size (of those that fit) at which it was the fastest:

- `ours`: this project's loop, packed windows, its head (compiled on CUDA);
- `ours, eager head`, `ours, liger head`: the same loop, with logits in full, and with
  LigerFusedLinearJSDLoss;
- `trl`: GKDTrainer(lmbda=0, beta=0) with the settings it ships with (activations are recomputed)
  and its default batch;
- `trl, tuned`: without recomputing, examples of like length together, at its best batch.

An arm that fails is named with the reason; figures are saved after each round.

Per arm: median over rounds, with the ratio to ours round by round and its interval; peak memory
beyond models, gradients and optimizer state on CUDA, the growth of resident memory of a process of
its own on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from blocks import WARM_UP, Block, blocks_of, encoded, finish, free, pace, settings_of
from distillation_head import ratio
from results import attempt, save_result
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from pipeline.config.settings.distillation import HeadKernel
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.data.batches import PackedBatches
from pipeline.distillation.head import Head, Taught
from pipeline.distillation.kernels import kernel_of, why_not
from pipeline.distillation.losses import Loss, Sums
from pipeline.ledger.memory import MemoryMeter
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective, Teacher
from pipeline.training.reading import examine

DOCUMENTS = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """Two models, the longest document, and the batch sizes to try."""

    student: Any
    teacher: Any
    length: int
    batches: tuple[int, ...]

    def models(self, device: torch.device) -> tuple[Any, Any]:
        """Return student and frozen teacher, fp32, the same each time."""
        torch.manual_seed(0)
        with device:
            student, teacher = (_model(config) for config in (self.student, self.teacher))
        return student, teacher.requires_grad_(requires_grad=False).eval()


def _model(config: Any) -> Any:
    return GPT2LMHeadModel(config) if isinstance(config, GPT2Config) else LlamaForCausalLM(config)


def _gpt2(layers: int, width: int) -> GPT2Config:
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, use_cache=False, **none)


def _llama(
    layers: int, width: int, wide: int, vocabulary: int, heads: int, groups: int
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
        use_cache=False,
        max_position_embeddings=2048,
    )


LLAMA_1B = _llama(16, 2048, 8192, 128256, 32, 8)
SHAPES = {
    "gpt2": Shape(_gpt2(12, 768), _gpt2(24, 1024), 1024, (8, 16, 32, 64)),  # GPT-2 medium to GPT-2
    "llama1b": Shape(LLAMA_1B, LLAMA_1B, 1024, (4, 8, 16, 32)),
    "small": Shape(
        _llama(2, 256, 512, 8192, 4, 4), _llama(4, 256, 512, 8192, 4, 4), 128, (4, 8, 16)
    ),
    "tiny": Shape(_llama(1, 64, 128, 512, 2, 2), _llama(2, 64, 128, 512, 2, 2), 64, (2,)),
    "gpt2_vocabulary": Shape(
        _llama(2, 128, 256, 50257, 2, 2), _llama(4, 192, 384, 50257, 3, 3), 128, (4, 8)
    ),
}
DEFAULTS = {"cuda": ("gpt2", "llama1b"), "cpu": ("small", "gpt2_vocabulary")}


def documents(shape: Shape) -> list[np.ndarray]:
    """Return token ids of documents, log-normal in length: half are shorter than a third of the
    longest.
    """
    draw = np.random.default_rng(0)
    lengths = np.clip(
        draw.lognormal(np.log(shape.length / 3), 0.8, DOCUMENTS).astype(int), 8, shape.length
    )
    return [
        draw.integers(3, shape.student.vocab_size, length).astype(np.int32) for length in lengths
    ]


def eager_head(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    dtype: torch.dtype,
    vocabulary: int | None = None,
    taught: Any = None,
    loss: Loss | None = None,
) -> tuple[Tensor, Sums]:
    """Return the mean forward KL from logits in full, as trainers without a fused head do."""
    assert isinstance(taught, Taught)
    log_q = F.log_softmax(F.linear(hidden, head.weight).float(), -1)
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(taught.hidden, taught.head.weight).float(), -1)
    value = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    zero = value.detach() * 0
    return value, Sums(zero, value.detach() * len(labels))


def ours(
    shape: Shape, device: torch.device, batch: int, head: Any, *, compiled: bool = False
) -> Block:
    """Return blocks of this project's loop."""
    student, teacher = shape.models(device)
    precision = Precision.bf16 if device.type == "cuda" else Precision.fp32
    batches = PackedBatches(
        encoded(documents(shape)), sequence_length=shape.length, batch_size=batch, seed=0
    )
    read = [examine(model, device) for model in (student, teacher)]
    objective = Objective(
        student,
        Task.causal_lm,
        precision,
        device,
        PhaseClock(),
        Teacher(teacher, precision, Loss(0.0), read[1]),
        read=read[0],
    )
    objective.head_loss = head
    settings = partial(settings_of, batch, shape.length)
    return blocks_of(
        objective, batches, PrecisionConfig(name=precision), settings, compiled=compiled
    )


def of_trl(shape: Shape, device: torch.device, batch: int | None, **settings: Any) -> Block:
    """Return blocks of TRL's trainer; `batch` None leaves its own."""
    trainer = make_trl(shape, device, batch, **settings)

    def block(steps: int) -> tuple[float, int]:
        watch = Watch(device, steps)
        trainer.add_callback(watch)
        trainer.args.max_steps = WARM_UP + steps
        trainer.data_collator.by_batch.clear()
        trainer.train()
        trainer.remove_callback(watch)
        read = trainer.data_collator.by_batch[WARM_UP : WARM_UP + steps]
        return watch.seconds, sum(read)

    return block


def make_trl(shape: Shape, device: torch.device, batch: int | None, **settings: Any) -> Any:
    """Return its trainer: forward KL on given text."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = shape.models(device)
    rows = [{"input_ids": ids.tolist(), "length": len(ids)} for ids in documents(shape)]
    more = {} if batch is None else {"per_device_train_batch_size": batch}
    config = GKDConfig(
        output_dir=tempfile.mkdtemp(),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=1,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        dataloader_num_workers=0,
        max_length=shape.length,
        **more,
        **settings,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
        ),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{{ messages }}",
    )
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        data_collator=Padding(),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


class Padding:
    """Pads a batch to its longest document, and counts what is no padding, batch by batch."""

    def __init__(self) -> None:
        self.by_batch: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for at, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[at, :size] = labels[at, :size] = torch.tensor(row["input_ids"])
            mask[at, :size] = 1
        self.by_batch.append(int(mask.sum()))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Watch(TrainerCallback):
    """Times the steps of a block after its warm-up."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self._device, self._steps, self._edges = device, steps, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (WARM_UP, WARM_UP + self._steps):
            finish(self._device)
            self._edges.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds of the steps after the warm-up."""
        start, end = self._edges
        return end - start


def arms_of(shape: Shape, device: torch.device) -> dict[str, list[Callable[[], Block]]]:
    """Return by arm how to make its blocks, one for each batch size to try; what is not installed
    is left out.
    """
    compiled = device.type == "cuda"
    kernel = HeadKernel.triton if compiled else HeadKernel.torch
    heads: dict[str, Any] = {"ours": kernel_of(kernel), "ours, eager head": eager_head}
    if why_not(HeadKernel.liger, device) is None:
        heads["ours, liger head"] = kernel_of(HeadKernel.liger)
    arms: dict[str, list[Callable[[], Block]]] = {
        name: [
            lambda head=head, batch=batch: ours(shape, device, batch, head, compiled=compiled)
            for batch in shape.batches
        ]
        for name, head in heads.items()
    }
    if find_spec("trl") is not None:
        arms["trl"] = [lambda: of_trl(shape, device, None)]
        grouped = {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False}
        arms["trl, tuned"] = [
            lambda batch=batch: of_trl(shape, device, batch, **grouped) for batch in shape.batches
        ]
    return arms


def shape_of(name: str, sizes: Sequence[int] | None) -> Shape:
    """Return a shape by name, with other batch sizes to try where they are given."""
    return SHAPES[name] if sizes is None else replace(SHAPES[name], batches=tuple(sizes))


def fastest(candidates: list[Callable[[], Block]], steps: int) -> tuple[Callable[[], Block], int]:
    """Return the candidate that reads most tokens a second, of those that fit, and its place."""
    if len(candidates) == 1:
        return candidates[0], 0
    rates: list[float] = []
    for make in candidates:
        try:
            taken, tokens = make()(steps)
            rates.append(tokens / taken)
        except torch.OutOfMemoryError:
            break
        finally:
            free()
    best = rates.index(max(rates))
    return candidates[best], best


def agreement(shape: Shape, device: torch.device) -> float | None:
    """Return how far, relatively, our loss lies from that of TRL's trainer on the same documents;
    None without it.
    """
    if find_spec("trl") is None:
        return None
    trainer = make_trl(shape, device, 4, gradient_checkpointing=False)
    rows = [{"input_ids": ids.tolist()} for ids in documents(shape)[:4]]
    padded = {name: tensor.to(device) for name, tensor in Padding()(rows).items()}
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    ):
        theirs = float(trainer.compute_loss(trainer.model, padded))
    student, teacher = shape.models(device)
    precision = Precision.bf16 if device.type == "cuda" else Precision.fp32
    read = [examine(model, device) for model in (student, teacher)]
    objective = Objective(
        student,
        Task.causal_lm,
        precision,
        device,
        PhaseClock(),
        Teacher(teacher, precision, Loss(0.0), read[1]),
        read=read[0],
    )
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        done = objective(
            {"input_ids": ids, "labels": labels, "position_ids": torch.arange(ids.shape[1])[None]}
        )
        total, count = total + float(done.parts.divergence), count + done.count
    return abs(total / count - theirs) / theirs


def peak_bytes(block: Block, device: torch.device) -> int:
    """Return the memory that steps take at most, beyond what they find and leave."""
    block(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(2)
        return torch.cuda.max_memory_allocated() - before
    meter = MemoryMeter()
    meter.start(device)
    before = meter.read(device)["host_peak_rss_bytes"].value
    block(2)
    after = meter.read(device)["host_peak_rss_bytes"].value
    assert before is not None, "this kernel tells no peak of a process"
    assert after is not None
    return int(after - before)


def peak_elsewhere(shape: str, sizes: Sequence[int], arm: str, place: int) -> int:
    """Return `peak_bytes` from a process of its own: resident memory only ever grows."""
    command = [
        sys.executable,
        __file__,
        "--device",
        "cpu",
        "--shapes",
        shape,
        "--batches",
        *map(str, sizes),
        "--peak-of",
        arm,
        "--place",
        str(place),
    ]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def measure(
    name: str,
    device: torch.device,
    rounds: int,
    steps: int,
    keep: Callable[[dict[str, Any]], None],
    *,
    asked: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the figures of all arms at one shape; `keep` is given what there is as it comes.

    Args:
        asked: Arms; None takes all.
        sizes: Batch sizes to try; None takes the shape's.
    """
    shape, chosen = shape_of(name, sizes), dict[str, tuple[Callable[[], Block], int]]()
    arms = arms_of(shape, device)
    failed: dict[str, str | None] = {arm: "not installed" for arm in asked or () if arm not in arms}
    for arm in arms if asked is None else (arm for arm in arms if arm in asked):
        best, why = attempt(partial(fastest, arms[arm], steps))
        if best is None:
            failed[arm] = why
        else:
            chosen[arm] = best
    rates: dict[str, list[float]] = {arm: [] for arm in chosen}
    peaks, blocks = dict[str, int | None](), dict[str, Block]()
    together = device.type == "cpu" or name == "gpt2"  # a GPU holds all of them
    found: dict[str, Any] = {"agreement": None, "arms": {}, "not_here": failed}
    for number in range(rounds):
        for arm in sorted(rates, reverse=bool(number % 2)):
            taken, why = attempt(partial(pace, arm, chosen[arm][0], blocks, steps))
            if taken is None:
                failed[arm] = why
                del rates[arm]
            else:
                rates[arm].append(1 / taken)
                if number == 0:
                    peaks[arm], _ = attempt(
                        partial(peak_bytes, blocks[arm], device)
                        if device.type == "cuda"
                        else partial(peak_elsewhere, name, shape.batches, arm, chosen[arm][1])
                    )
            if taken is None or not together:
                blocks.pop(arm, None)
            free()
        found["arms"] = {
            arm: figures_of(arm, shape, rates, peaks[arm], chosen[arm][1]) for arm in rates
        }
        keep(found)
    blocks.clear()
    found["agreement"], why = attempt(partial(agreement, shape, device))
    if why is not None:
        failed["agreement"] = why
    return found


def figures_of(
    arm: str, shape: Shape, rates: dict[str, list[float]], peak: int | None, place: int
) -> dict[str, Any]:
    """Return the figures of one arm so far."""
    pace = {each: [1 / rate for rate in found] for each, found in rates.items()}
    beside = arm != "ours" and "ours" in pace
    return {
        "tokens_per_s": statistics.median(rates[arm]),
        "all_tokens_per_s": rates[arm],
        "peak_bytes": peak,
        "batch": None if arm == "trl" else shape.batches[place],
        "times_ours": ratio(pace[arm], pace["ours"]) if beside else None,
    }


def table(name: str, found: dict[str, Any]) -> str:
    """Return the figures in lines."""
    apart, absent = found["agreement"], found["not_here"]
    lines = [
        f"{name}: losses of ours and TRL apart by {'unknown' if apart is None else f'{apart:.1e}'}",
        f"{'arm':18} {'tokens/s':>12} {'time, times ours':>24} {'batch':>6} {'peak':>10}",
    ]
    for arm, each in found["arms"].items():
        times, peak = each["times_ours"], each["peak_bytes"]
        said = (
            ""
            if times is None
            else f"{times['ratio']:.2f} [{times['low']:.2f}, {times['high']:.2f}]"
        )
        batch = "its own" if each["batch"] is None else each["batch"]
        lines.append(
            f"{arm:18} {each['tokens_per_s']:12,.0f} {said:>24} {batch:>7}"
            f" {'' if peak is None else f'{peak / 2**20:7.0f}MiB'}"
        )
    return "\n".join([*lines, *(f"{arm}: not here: {why}" for arm, why in absent.items())])


def main() -> None:
    """Measure, print, and save where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--arms", nargs="+", help="of those below; default: all")
    parser.add_argument("--batches", nargs="+", type=int, help="sizes to try; default: the shape's")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device(args.device)
    names = args.shapes or DEFAULTS[device.type]
    if args.peak_of:
        shape = shape_of(names[0], args.batches)
        print(peak_bytes(arms_of(shape, device)[args.peak_of][args.place](), device))
        return
    found = dict[str, Any]()

    def save() -> None:
        if args.save:
            figures = {"rounds": args.rounds, "steps": args.steps, "shapes": found}
            text = "\n\n".join(table(name, each) for name, each in found.items())
            save_result("distillation_step", figures, "\n\n".join([text, json.dumps(found)]))

    for name in names:

        def keep(figures: dict[str, Any], name: str = name) -> None:
            found[name] = figures
            save()

        found[name] = measure(
            name, device, args.rounds, args.steps, keep, asked=args.arms, sizes=args.batches
        )
        print(table(name, found[name]), flush=True)
        save()
    if any("ours" not in each["arms"] for each in found.values()):
        sys.exit("ours was not measured")


if __name__ == "__main__":
    main()
