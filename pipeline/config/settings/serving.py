"""`serving.*`: the comparison pass and its load."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from pipeline.config.settings.ranges import positive

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


@dataclass(kw_only=True, slots=True)
class ServingLoad:
    """The load at which serving is measured. A token is the unit of causal_lm, an example of
    classification.
    """

    prompt: int = positive(64)  # tokens in
    new: int = positive(32)  # tokens generated (causal_lm)
    batch: int = positive(8)  # sequences at a time


class Decode(Enum):
    """How tokens are written: with a key-value cache that grows, or one of fixed size whose step is
    captured as a CUDA graph, compiled before that, or neither. `auto`: the fastest of these by a
    short probe on CUDA (`evaluation/serving/fastest.py`), else dynamic.
    """

    auto = "auto"
    dynamic = "dynamic"
    static = "static"
    graph = "graph"
    compile = "compile"


class ServingDtype(Enum):
    """The dtype in which artifacts that are stored in fp32 are served; others are served as they
    are stored.

    `auto`: the fastest that the device has, by a short probe (`evaluation/serving/dtype.py`).
    """

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class VllmCheck(Enum):
    """Which artifacts vLLM, where it is installed, loads and scores beside this project
    (`evaluation/serving/vllm_check.py`).
    """

    quantized = "quantized"
    every = "every"
    never = "never"


@dataclass(kw_only=True, slots=True)
class ServingConfig:
    """The comparison pass."""

    load: ServingLoad = field(default_factory=ServingLoad)
    batches: list[int] = field(default_factory=lambda: [1, 8, 32])  # also shown at these
    blocks: int = field(default=4, metadata={"min": 2})  # of arm, base, base, arm or the reverse
    decode: Decode = Decode.auto  # how tokens are written (causal_lm)
    # student, or an arm that learnt from a teacher: that teacher is served with it as a draft, too
    draft: Optional[str] = None
    draft_tokens: int = positive(4)  # proposed at a time
    dtype: ServingDtype = ServingDtype.auto  # of artifacts that are stored in fp32
    # of `vllm bench`: a file (of the primary arm), or files by arm; shown as declared
    results: Any = None
    # language models that vLLM, where installed, is to load and score too
    check_vllm: VllmCheck = VllmCheck.quantized
    # units to be served; payback's P(net > 0) is read at it
    volume: Optional[float] = positive(None)
    # units a second to be served; the replicas that the arm saves, at it
    rate: Optional[float] = positive(None)
