"""The distillation head (output projection and forward KL, forward and backward) beside what others
ship.

    python benchmarks/distillation_head.py [--device cuda] [--shapes 8192,128256,2048,4096 ...]
    [--rounds 20] [--save]

Arms, all on the same weights, hidden states and seed, interleaved in one process: `ours`; `trl`
(its fused ChunkedDivergenceFunction); `liger` (LigerFusedLinearJSDLoss, beta 0; compiled on CUDA,
as it is shipped); `eager` (both logits in full, log-softmax and kl_div by autograd, as trainers
without a fused head do); on CUDA also `ours, torch` (the head without its Triton kernel).
`products` are the four matrix products that the method needs and nothing else, `products, padded`
the same at a vocabulary of the next multiple of 64: the faster one is the ceiling. An arm that
fails, or whose logits in full would not fit into the free memory, is named with the reason; figures
are saved as they come.

Per arm: median time with the ratio to ours (over rounds), share of the ceiling's rate, peak memory
beyond inputs and gradients, and the error of loss and gradients against float64 on a small part. On
a CPU memory is the growth of resident memory in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from results import attempt, save_result
from scipy import stats
from torch import Tensor

from pipeline.distillation.head import Head, Taught, head_loss
from pipeline.distillation.losses import Loss, terms_in_place
from pipeline.ledger.memory import MemoryMeter

SHAPES = {
    "cuda": ((8192, 128256, 2048, 4096), (65536, 50257, 768, 1024)),
    "cpu": ((1024, 50257, 256, 384),),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED = 64  # tokens of the comparison with float64
# of a token and vocabulary entry in the eager arm: per model 16-bit logits (2), fp32 logits (4),
# log-softmax (4); once the divergence (4) and what goes back (4)
EAGER_BYTES = 28
MULTIPLE = 64  # a vocabulary of which matrix products read in wide loads
Arm = Callable[["Inputs"], Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Hidden states (N, H) and heads (V, H) of both models, and labels (N,), which forward KL does
    not look at.
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @staticmethod
    def make(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Inputs:
        tokens, vocabulary, width, teacher_width = shape
        draw = torch.Generator().manual_seed(0)
        there = lambda *size: torch.randn(*size, generator=draw).to(device, dtype)
        return Inputs(
            there(tokens, width).requires_grad_(),
            (there(vocabulary, width) / width**0.5).requires_grad_(),
            there(tokens, teacher_width),
            there(vocabulary, teacher_width) / teacher_width**0.5,
            torch.randint(vocabulary, (tokens,), generator=draw).to(device),
        )

    def part(self, tokens: int, dtype: torch.dtype) -> Inputs:
        """Return the first tokens in another dtype, as leaves of their own."""
        h, w = (x.detach().to(dtype) for x in (self.hidden[:tokens], self.weight))
        return Inputs(
            h.requires_grad_(),
            w.requires_grad_(),
            self.teacher_hidden[:tokens].to(dtype),
            self.teacher_weight.to(dtype),
            self.labels[:tokens],
        )


def ours(x: Inputs, **more: Any) -> Tensor:
    """Return the mean forward KL by this project's head."""
    taught = Taught(x.teacher_hidden, Head(x.teacher_weight, None), x.teacher_hidden.dtype)
    value, _ = head_loss(
        x.hidden,
        Head(x.weight, None),
        x.labels,
        loss=Loss(0.0),
        dtype=x.hidden.dtype,
        taught=taught,
        **more,
    )
    return value


def eager(x: Inputs) -> Tensor:
    """Return it from logits in full."""
    log_q = F.log_softmax(F.linear(x.hidden, x.weight).float(), -1)
    log_p = F.log_softmax(F.linear(x.teacher_hidden, x.teacher_weight).float(), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def exact(x: Inputs) -> Tensor:
    """Return it in the arithmetic of its inputs, for float64."""
    log_q, log_p = (
        F.log_softmax(F.linear(*each), -1)
        for each in ((x.hidden, x.weight), (x.teacher_hidden, x.teacher_weight))
    )
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def arms_of(device: torch.device) -> dict[str, Arm]:
    """Return what can be compared here; peers that are not installed are left out."""
    arms: dict[str, Arm] = {"ours": ours}
    if device.type == "cuda":
        arms["ours, torch"] = lambda x: ours(x, terms=terms_in_place)
    with suppress(ImportError):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        arms["trl"] = lambda x: ChunkedDivergenceFunction.apply(
            x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None, 0.0, 1.0
        )[0].mean()
    with suppress(ImportError):
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=device.type == "cuda")
        arms["liger"] = lambda x: liger(
            x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels
        )
    return {**arms, "eager": eager}


def products(x: Inputs, rows: int = 2048) -> None:
    """Do the matrix products that the method needs, some rows at a time, and nothing else."""
    with torch.no_grad():
        for start in range(0, len(x.hidden), rows):
            h, th = x.hidden[start : start + rows], x.teacher_hidden[start : start + rows]
            tile = h @ x.weight.T
            th @ x.teacher_weight.T
            tile @ x.weight
            tile.T @ h


def flops(x: Inputs) -> float:
    """Return the FLOPs of those products: 6 H_student + 2 H_teacher a token and vocabulary
    entry.
    """
    per_entry = 6 * x.hidden.shape[1] + 2 * x.teacher_hidden.shape[1]
    return float(per_entry) * x.hidden.shape[0] * x.weight.shape[0]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the wall seconds of a call whose work the device has finished."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - start


def once(arm: Arm, x: Inputs) -> None:
    """Go forward and backward, with gradients from nothing."""
    x.hidden.grad = x.weight.grad = None
    arm(x).backward()


def errors(arm: Arm, x: Inputs) -> dict[str, float]:
    """Return relative errors of loss and gradients against float64 on a part of the tokens."""
    part, wanted = x.part(CHECKED, x.hidden.dtype), x.part(CHECKED, torch.float64)
    value, reference = arm(part), exact(wanted)
    value.backward()
    reference.backward()
    found = {"loss": abs(value.item() - reference.item()) / reference.item()}
    for name, ours_, theirs in (
        ("hidden", part.hidden, wanted.hidden),
        ("weight", part.weight, wanted.weight),
    ):
        assert ours_.grad is not None
        assert theirs.grad is not None
        found[name] = ((ours_.grad.double() - theirs.grad).norm() / theirs.grad.norm()).item()
    return found


def peak_bytes(arm: Arm, x: Inputs) -> int:
    """Return the memory that one call takes at most, beyond inputs and gradients."""
    gradients = x.hidden.numel() * x.hidden.itemsize + x.weight.numel() * x.weight.itemsize
    if x.hidden.device.type == "cuda":
        once(arm, x)  # compiles, picks its kernels
        x.hidden.grad = x.weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(arm, x)
        return torch.cuda.max_memory_allocated() - before - gradients
    once(arm, x.part(8, x.hidden.dtype))  # libraries start their threads and take their buffers
    meter = MemoryMeter()
    meter.start(x.hidden.device)
    # set back just now: what is resident
    before = meter.read(x.hidden.device)["host_peak_rss_bytes"].value
    once(arm, x)
    after = meter.read(x.hidden.device)["host_peak_rss_bytes"].value
    assert before is not None, "this kernel tells no peak of a process"
    assert after is not None
    return int(after - before) - gradients


def peak_elsewhere(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return `peak_bytes` from a process of its own: resident memory only ever grows."""
    command = [
        sys.executable,
        __file__,
        "--device",
        "cpu",
        "--dtype",
        next(each for each, torchs in DTYPES.items() if torchs is dtype),
        "--peak-of",
        name,
        "--shapes",
        ",".join(map(str, shape)),
    ]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def ratio(theirs: list[float], mine: list[float]) -> dict[str, float]:
    """Return how many times as long as ours they take: median over rounds, with its 95%
    order-statistic interval.
    """
    ratios = [other / own for other, own in zip(theirs, mine, strict=True)]
    interval = stats.quantile_test(ratios, q=1.0, p=0.5).confidence_interval(0.95)
    return {
        "ratio": statistics.median(ratios),
        "low": float(interval.low),
        "high": float(interval.high),
    }


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def does_not_fit(shape: tuple[int, ...], free: int) -> str | None:
    """Return why logits in full are not tried with so many bytes free."""
    needed = EAGER_BYTES * shape[0] * shape[1]
    if needed <= free:
        return None
    return f"logits in full take about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def padded(x: Inputs) -> Inputs:
    """Return inputs whose vocabulary is the next multiple of `MULTIPLE`."""
    more = -len(x.weight) % MULTIPLE
    wide = lambda weight: F.pad(weight.detach(), (0, 0, 0, more))
    return replace(x, weight=wide(x.weight), teacher_weight=wide(x.teacher_weight))


def measure(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Return the figures of all arms at one shape; `keep` is given what there is as it comes."""
    x, arms = Inputs.make(shape, device, dtype), arms_of(device)
    failed = dict[str, str]()
    if why := does_not_fit(shape, free_bytes(device)):
        failed["eager"] = why
    calls: dict[str, Callable[[], Any]] = {
        name: partial(once, arm, x) for name, arm in arms.items() if name not in failed
    }
    calls["products"] = partial(products, x)
    if len(x.weight) % MULTIPLE:
        calls["products, padded"] = partial(products, padded(x))
    times = timed(calls, device, rounds, failed)
    x.hidden.grad = x.weight.grad = None
    found: dict[str, Any] = {"not_here": failed, "all_s": times}
    keep(found)
    tops = {
        name: flops(x) / statistics.median(each)
        for name, each in times.items()
        if name.startswith("products")
    }
    for name, top in tops.items():
        found[name] = {"median_s": statistics.median(times[name]), "tflops": top / 1e12}
    for name in (name for name in arms if name in times):
        figures = partial(figures_of, name, arms[name], x, times, max(tops.values(), default=0.0))
        found[name], why = attempt(figures)
        if why is not None:
            failed[name] = why
            del found[name]
        keep(found)
    return found


def timed(
    calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int, failed: dict[str, str]
) -> dict[str, list[float]]:
    """Return the seconds of each call by round, in turns; one that fails leaves, with the reason in
    `failed`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):  # the first compiles, and counts for nothing
        for name in sorted(times, reverse=bool(number % 2)):
            taken, why = attempt(partial(seconds, calls[name], device))
            if taken is None:
                failed[name] = why or ""
                del times[name]
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            elif number >= 0:
                times[name].append(taken)
    return times


def figures_of(
    name: str, arm: Arm, x: Inputs, times: dict[str, list[float]], ceiling: float
) -> dict[str, Any]:
    """Return the figures of one arm whose times are known."""
    shape = (len(x.hidden), *x.weight.shape, x.teacher_weight.shape[1])
    median, cuda = statistics.median(times[name]), x.hidden.device.type == "cuda"
    return {
        "median_s": median,
        "share_of_ceiling": flops(x) / median / ceiling if ceiling else None,
        "times_ours": ratio(times[name], times["ours"]) if _beside_ours(name, times) else None,
        "peak_bytes": peak_bytes(arm, x) if cuda else peak_elsewhere(name, shape, x.hidden.dtype),
        "error": errors(arm, x),
    }


def _beside_ours(name: str, times: dict[str, list[float]]) -> bool:
    return name != "ours" and "ours" in times


def table(shape: tuple[int, ...], found: dict[str, Any]) -> str:
    """Return the figures in lines."""
    lines = [
        f"tokens, vocabulary, student and teacher width: {shape}",
        (
            f"{'arm':12} {'median':>10} {'times ours':>24} {'of ceiling':>10} {'peak':>10}"
            f" {'weight error':>12}"
        ),
    ]
    for name, each in found.items():
        if "tflops" in each:
            lines.insert(1, f"{name} alone: {each['tflops']:.2f} TFLOP/s")
        elif "error" in each:
            times, share = each["times_ours"], each["share_of_ceiling"]
            said = (
                ""
                if times is None
                else f"{times['ratio']:.2f} [{times['low']:.2f}, {times['high']:.2f}]"
            )
            lines.append(
                f"{name:12} {1e3 * each['median_s']:8.1f}ms {said:>24}"
                f" {'' if share is None else f'{share:.0%}':>10}"
                f" {each['peak_bytes'] / 2**20:7.0f}MiB {each['error']['weight']:12.1e}"
            )
    return "\n".join([*lines, *(f"{arm}: not here: {why}" for arm, why in _left_out(found))])


def _left_out(found: dict[str, Any]) -> list[tuple[str, str]]:
    return list(found.get("not_here", {}).items())


def main() -> None:
    """Measure, print, and save where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", help="tokens,vocabulary,student width,teacher width")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on CUDA, else fp32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    wanted = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    dtype = DTYPES[wanted]
    shapes = [tuple(map(int, each.split(","))) for each in args.shapes or ()] or SHAPES[device.type]
    if args.peak_of:
        print(peak_bytes(arms_of(device)[args.peak_of], Inputs.make(shapes[0], device, dtype)))
        return
    figures: dict[str, Any] = {}
    texts: list[str] = []

    def save() -> None:
        if args.save:
            content = {"dtype": str(dtype), "rounds": args.rounds, "shapes": figures}
            save_result("distillation_head", content, "\n\n".join([*texts, json.dumps(figures)]))

    for shape in shapes:

        def keep(found: dict[str, Any], name: str = ",".join(map(str, shape))) -> None:
            figures[name] = found
            save()

        texts.append(table(shape, measure(shape, device, dtype, args.rounds, keep)))
        print(texts[-1], flush=True)
        save()
    if any("error" not in each.get("ours", {}) for each in figures.values()):
        sys.exit("ours was not measured")


if __name__ == "__main__":
    main()
