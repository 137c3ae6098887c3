"""`quality.*`: how artifacts are assessed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from pipeline.config.settings.ranges import fraction, positive

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


@dataclass(kw_only=True, slots=True)
class QualityConfig:
    """How artifacts are assessed, and how much worse still counts as equal."""

    margin: float = fraction(0.01)  # relative for bits per byte, absolute for accuracies
    max_documents: Optional[int] = positive(None)  # of the test split, the first by content hash
    # causal_lm reads the head of longer ones
    max_bytes_per_document: Optional[int] = positive(None)
    batch_size: int = positive(16)  # documents scored at a time
    # tokens that a window reads; null: as in training
    sequence_length: Optional[int] = positive(None)
    # tokens predicted by a window after a document's first; null: all it reads
    stride: Optional[int] = positive(None)
    bootstrap: int = field(default=2000, metadata={"min": 200})  # resamples of an interval
    # files of lm-eval tasks with local data (causal_lm): also run
    tasks: list[str] = field(default_factory=list)
