"""The stage types a recipe can place, by name: the one list to extend (`/stage@stages.NAME: TYPE`)."""

from __future__ import annotations

from pipeline.stages.distill import DistillStage
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.train import TrainStage

Stage = TrainStage | DistillStage | QuantizeStage
STAGES: dict[str, type[Stage]] = {"train": TrainStage, "distill": DistillStage, "quantize": QuantizeStage}
