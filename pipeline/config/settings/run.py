"""The whole of a composed run: every group of settings, its stages and its comparisons.

Defaults live in this package once; YAML in `configs/` and `recipes/` holds deltas.
`OmegaConf.to_object` turns a composed config into `Run`; nothing below `cli/main.py` sees a
DictConfig.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from pipeline.config.settings.cost import CostConfig
from pipeline.config.settings.data import DataConfig
from pipeline.config.settings.hardware import HardwareConfig
from pipeline.config.settings.model import ModelConfig, StudentConfig
from pipeline.config.settings.parallel import ParallelConfig
from pipeline.config.settings.policy import PolicyConfig
from pipeline.config.settings.precision import PrecisionConfig
from pipeline.config.settings.quality import QualityConfig
from pipeline.config.settings.ranges import MAX_SEED
from pipeline.config.settings.serving import ServingConfig
from pipeline.config.settings.tracking import (
    BudgetConfig,
    LedgerConfig,
    StoreConfig,
    TrackingConfig,
)
from pipeline.config.settings.training import TrainingConfig
from pipeline.tasks.table import Task

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


class Measure(Enum):
    """What a comparison of two arms is read on."""

    quality = "quality"
    training = "training"
    serving = "serving"
    payback = "payback"


REMOVED = {
    "data.text_field": "data.columns={text: NAME}",
    "data.label_field": "data.columns={label: NAME}",
    "data.messages_field": "data.columns={messages: NAME}",
    "stages.*.insist": "stages.*.allow_weak_teacher=true",
}
"""Settings of earlier releases, and what says the same now; `*` stands for a stage's name."""


@dataclass(kw_only=True, slots=True)
class Comparison:
    """A pair of arms and what it is read on."""

    arm: str = "???"  # the stage that is judged
    base: str = "???"  # the stage, or best_16_bit, that it is judged against
    on: list[Measure] = field(default_factory=list)  # what it is judged on


@dataclass(kw_only=True, slots=True)
class Run:
    """One composed run: what a recipe and the overrides amount to."""

    recipe: str = ""  # its name
    question: str = ""  # what the recipe answers: its first comment line
    task: Task = Task.causal_lm  # what the model is for; follows from an embedded data set
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    candidate: Optional[str] = None  # recipe=release_check: what is to be released
    baseline: Optional[str] = None  # and what it is measured against
    # per-document values of another evaluation; null: assessed here
    candidate_items: Optional[str] = None
    baseline_items: Optional[str] = None  # likewise
    promote: bool = False  # a PASS moves the alias `champion`
    bootstrap: bool = False  # without a champion, the candidate becomes it
    # of initial weights, batches and draws
    seed: int = field(default=0, metadata={"min": 0, "max": MAX_SEED})
    seeds: Optional[list[int]] = None  # runs every arm once per seed; null: [seed]
    stages: dict[str, Any] = field(default_factory=dict)  # by name, in order
    compare: list[Comparison] = field(default_factory=list)  # pairs of arms
    # else a quantized arm that saves neither time nor memory ends the run with 3
    allow_no_speedup: bool = False
    primary_arm: str = ""  # the arm that the run is about: its figures stand on the MLflow run


def scored_length(run: Run) -> int:
    """Return the tokens of a window that is scored, where a document has as many."""
    return run.quality.sequence_length or run.training.sequence_length
