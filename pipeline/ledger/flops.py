"""FLOPs a method needs, counted once on an eager, unquantized twin on the meta device: no memory, no recompute.

A transformer's matmul FLOPs for one sequence of T tokens are exactly c + a T + b T^2 (heads on one position, linear
layers, attention). Three counts fix the polynomial, and every batch is then priced by arithmetic.
Source of the convention: PaLM, arXiv 2204.02311, appendix B (a multiply-add is 2 FLOPs; attention counted in full).
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from pipeline.config import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

POINTS = (8, 16, 24)  # sequence lengths at which the twin is counted


@dataclass(frozen=True, slots=True)
class FlopsPerSequence:
    """FLOPs of one sequence of T tokens: `constant + linear * T + square * T^2`."""

    constant: float
    linear: float
    square: float

    def __call__(self, num_tokens: int) -> float:
        """Return the FLOPs of one sequence of `num_tokens`."""
        return self.constant + self.linear * num_tokens + self.square * num_tokens**2


def count_flops(config: PreTrainedConfig, task: Task, *, backward: bool) -> FlopsPerSequence:
    """Count a model's matmul FLOPs per sequence.

    Args:
        config: The model's configuration; a quantization entry is ignored (the twin is unquantized).
        backward: Count the forward and backward pass, else the forward pass only.
    """
    import torch

    twin_config = copy.deepcopy(config)
    if hasattr(twin_config, "quantization_config"):
        delattr(twin_config, "quantization_config")
    with torch.device("meta"):
        twin = _twin(twin_config, task)
    counts = [_count_once(twin, length, backward=backward) for length in POINTS]
    return _fit(counts)


def _twin(config: PreTrainedConfig, task: Task) -> Any:
    import transformers

    kind = {
        Task.causal_lm: transformers.AutoModelForCausalLM,
        Task.sequence_classification: transformers.AutoModelForSequenceClassification,
    }[task]
    return kind.from_config(config, attn_implementation="eager").train()


def _count_once(twin: Any, length: int, *, backward: bool) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, length, dtype=torch.long, device="meta")}
    inputs["attention_mask"] = torch.ones(1, 1, length, length, device="meta")  # 4D: nothing inspects its values
    chatter = logging.getLogger("torch.utils.flop_counter")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with FlopCounterMode(display=False) as counter:
            logits = twin(**inputs, **_no_cache(twin)).logits
            if backward:
                logits.sum().backward()
    finally:
        chatter.setLevel(level)
    return counter.get_total_flops()


def _no_cache(twin: Any) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(twin.config, "use_cache") else {}


def _fit(counts: list[int]) -> FlopsPerSequence:
    """Solve for the polynomial through the three counts, exactly."""
    (x0, x1, x2), (y0, y1, y2) = map(Fraction, POINTS), map(Fraction, counts)
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    square = (second - first) / (x2 - x0)
    linear = first - square * (x0 + x1)
    return FlopsPerSequence(float(y0 - linear * x0 - square * x0**2), float(linear), float(square))
