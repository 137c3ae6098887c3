"""Does a quantized format decode faster than 16 bits here? Every format beside fp32 and the best 16
bits, by batch.

    python benchmarks/quantized_decode.py [--device cuda] [--shapes 1.2b] [--batches 1 8 32]
    [--blocks 8]
        [--decode graph] [--formats bf16 fp16 int8] [--save]

Llama-shaped models with random weights, quantized by this project (bitsandbytes, torchao) and
served by its own server: prompts first, then token by token from a key-value cache (one that grows,
or of fixed size and captured: `--decode`, by default a captured one on CUDA). bf16 and fp16 come
first. Each format is read against the model in fp32, and against the 16-bit form that was the
fastest of those here at the same batch size, in interleaved blocks. Reported are tokens a second,
the time over each of the two with its 90% interval over blocks, the bytes of weights, and how each
was served. A format that cannot run here is named with the reason; figures are saved after each
format.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import attempt, save_result
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.compare.statistics import abba_saving
from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.config.settings.serving import Decode, ServingConfig, ServingLoad
from pipeline.errors import UserError
from pipeline.evaluation.serving.decoding import chosen
from pipeline.evaluation.serving.measure import measure_interleaved
from pipeline.evaluation.serving.server import Server, load
from pipeline.models.load import save_model
from pipeline.quantization.backend import LIBRARIES, formats, quantize, why_not
from pipeline.tasks.table import Task

LOADS = {"cuda": (512, 128), "cpu": (32, 16)}  # tokens in, tokens out


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
        max_position_embeddings=2048,
    )


SHAPES = {
    "1.2b": _llama(16, 2048, 8192, 128256, 32, 8),
    "124m": _llama(12, 768, 2048, 50304, 12, 12),
    "small": _llama(4, 512, 1536, 8192, 8, 8),
    "tiny": _llama(1, 64, 128, 512, 1, 1),
}
DEFAULTS = {"cuda": ("124m", "1.2b"), "cpu": ("small",)}
WAITS = (Format.int8, Format.int8_dynamic)


def source(config: LlamaConfig, folder: Path, device: torch.device) -> Path:
    """Write the model in fp32."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>")),
        pad_token="<pad>",
    )
    save_model(model, tokenizer, folder)
    return folder


PLAIN = "fp32"


def read(
    servers: dict[str, Server], pair: tuple[str, str], batch: int, blocks: int, device: torch.device
) -> Any:
    """Return the time of the first of a pair over the second's at one batch size, and how both were
    served.
    """
    prompt, new = LOADS[device.type]
    config = ServingConfig(
        load=ServingLoad(prompt=prompt, new=new, batch=batch), batches=[], blocks=blocks
    )
    draw = np.random.default_rng(0)
    prompts = [draw.integers(2, servers[pair[0]].model.config.vocab_size, 4096)]
    read = measure_interleaved(servers, [pair], config=config, prompts=prompts, seed=0)
    seconds, readings = read.seconds, read.readings
    saving = abba_saving(*seconds[pair])
    decode = float(np.mean([reading.decode_s for reading in readings[pair[0]].at_load]))
    return {
        "decode_tokens_per_s": batch * (new - 1) / decode,
        "how": {arm: each.at_load[0].how for arm, each in readings.items()},
        "time_ratio": 1 - saving.estimate,
        "ci": [1 - saving.high, 1 - saving.low],
    }


def measure(
    name: str,
    device: torch.device,
    batches: list[int],
    blocks: int,
    decode: Decode,
    asked: list[Format],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Return the figures of the formats asked for at one shape: over fp32, and over the best 16-bit
    form of each batch size; `keep` is given what there is as it comes.
    """
    found: dict[str, Any] = {"formats": {}, "best_16_bit": {}, "not_here": {}}
    with tempfile.TemporaryDirectory() as root:
        plain = source(SHAPES[name], Path(root, "source"), device)

        def served(folder: Path) -> Server:
            return load(
                folder,
                Task.causal_lm,
                device,
                labels=None,
                now_ns=time.perf_counter_ns,
                decode=decode,
            )

        servers = {PLAIN: served(plain)}
        for fmt in in_order(asked):
            folder = Path(root, fmt.value)
            why = made(fmt, plain, folder, device)
            if why is None:
                figures = partial(
                    figures_of, fmt, folder, served, servers, found, batches, blocks, device
                )
                each, why = attempt(figures)
                found["formats"] |= {} if each is None else {fmt.value: each}
            if why is not None:
                found["not_here"][fmt.value] = why
            if device.type == "cuda":
                torch.cuda.empty_cache()
            keep(found)
    return found


def in_order(asked: list[Format]) -> list[Format]:
    """Return formats in the order of their trials, those last that wait for the host in a step: a
    capture of one is known to have broken what came after it.
    """
    return sorted(asked, key=lambda fmt: fmt in WAITS)


def figures_of(
    fmt: Format,
    folder: Path,
    served: Callable[[Path], Server],
    servers: dict[str, Server],
    found: dict[str, Any],
    batches: list[int],
    blocks: int,
    device: torch.device,
) -> dict[str, Any]:
    """Return the figures of one format; a 16-bit one stays in `servers`, those after it are read
    against the fastest of them.
    """
    here = {**servers, fmt.value: served(folder)}
    each: dict[str, Any] = {
        "library": LIBRARIES[Format(fmt)],
        "weights_ratio": here[fmt.value].weights_bytes / here[PLAIN].weights_bytes,
        "batches": {
            size: read(_two(here, fmt.value, PLAIN), (fmt.value, PLAIN), size, blocks, device)
            for size in batches
        },
    }
    halves = {name: server for name, server in servers.items() if name != PLAIN}
    if fmt in SIXTEEN_BITS:
        servers[fmt.value] = here[fmt.value]
    elif halves:
        best = {size: fastest(found["formats"], halves, size) for size in batches}
        found["best_16_bit"] = best
        each["over_16_bit"] = {
            size: read(here, (fmt.value, best[size]), size, blocks, device) for size in batches
        }
    return each


def _two(servers: dict[str, Server], *names: str) -> dict[str, Server]:
    return {name: servers[name] for name in names}


def made(fmt: Format, plain: Path, folder: Path, device: torch.device) -> str | None:
    """Quantize into `folder`; return why that cannot be here."""
    why = why_not(fmt, device)
    if why is None:
        try:
            quantize(plain, folder, fmt, Task.causal_lm, device=device, key="format", prove=False)
        except UserError as error:
            why = error.problem
    return why


def fastest(figures: dict[str, Any], halves: dict[str, Server], size: int) -> str:
    """Return the 16-bit form that took the least of fp32's time at a batch size."""
    return min(halves, key=lambda fmt: figures[fmt]["batches"][size]["time_ratio"])


def table(name: str, found: dict[str, Any], batches: list[int]) -> str:
    """Return the figures in lines: the ratios over fp32, then those over the best 16-bit form."""
    head = f"{'format':20} {'weights':>8} " + " ".join(
        f"{f'batch {batch}':>20}" for batch in batches
    )
    lines = [f"{name}: time over fp32's [90% interval]", head]
    for fmt, each in found["formats"].items():
        lines.append(f"{fmt:20} {each['weights_ratio']:8.2f} " + _cells(each["batches"]))
    if found["best_16_bit"]:
        best = ", ".join(f"{fmt} at batch {size}" for size, fmt in found["best_16_bit"].items())
        lines += [f"{name}: time over the best 16-bit form's ({best})", head]
        plain = {
            size: 1.0 / found["formats"][fmt]["batches"][size]["time_ratio"]
            for size, fmt in found["best_16_bit"].items()
        }
        lines.append(
            f"{PLAIN:20} {1.0:8.2f} " + " ".join(f"{plain[size]:>20.2f}" for size in batches)
        )
        for fmt, each in found["formats"].items():
            if "over_16_bit" in each:
                lines.append(
                    f"{fmt:20} {each['weights_ratio']:8.2f} " + _cells(each["over_16_bit"])
                )
    ways = {
        (arm, way)
        for r in found["formats"].values()
        for b in r["batches"].values()
        for arm, way in b["how"].items()
    }
    lines += [f"{arm}: served with {way}" for arm, way in sorted(ways)]
    return "\n".join(
        [*lines, *(f"{fmt}: not here: {why}" for fmt, why in found["not_here"].items())]
    )


def _cells(by_batch: dict[int, Any]) -> str:
    cells = [
        f"{r['time_ratio']:.2f} [{r['ci'][0]:.2f}, {r['ci'][1]:.2f}]" for r in by_batch.values()
    ]
    return " ".join(f"{cell:>20}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--decode", type=Decode, choices=Decode)  # auto: timed, minutes a format
    parser.add_argument("--formats", nargs="+", type=Format, choices=formats(), default=formats())
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    decode = args.decode or chosen(Decode.auto, device)
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name in args.shapes or DEFAULTS[device.type]:

        def keep(figures: dict[str, Any], name: str = name) -> None:
            found[name] = figures
            if args.save:
                told = [*lines, table(name, figures, args.batches)]
                save_result("quantized_decode", found, "\n".join(told))

        found[name] = measure(name, device, args.batches, args.blocks, decode, args.formats, keep)
        lines.append(table(name, found[name], args.batches))
        print(lines[-1], flush=True)
    if not all(each["formats"] for each in found.values()):
        sys.exit("no format was measured")


if __name__ == "__main__":
    main()
