"""The stage types that a recipe can place (`/stage@stages.NAME: TYPE`): the one list to extend."""

from __future__ import annotations

from pipeline.stages.base import Stage
from pipeline.stages.capture import CaptureStage
from pipeline.stages.distill import DistillStage
from pipeline.stages.prune import PruneStage
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.release import ReleaseStage
from pipeline.stages.train import TrainStage

STAGES: dict[str, type[Stage]] = {
    "train": TrainStage,
    "capture": CaptureStage,
    "distill": DistillStage,
    "quantize": QuantizeStage,
    "prune": PruneStage,
    "release": ReleaseStage,
}
