"""The stage types a recipe can place, by name: the one list to extend (`/stage@stages.NAME:
TYPE`).
"""

from __future__ import annotations

from pipeline.stages.capture import CaptureStage
from pipeline.stages.distill import DistillStage
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.release import ReleaseStage
from pipeline.stages.train import TrainStage

Stage = TrainStage | CaptureStage | DistillStage | QuantizeStage | ReleaseStage
STAGES: dict[str, type[Stage]] = {
    "train": TrainStage,
    "capture": CaptureStage,
    "distill": DistillStage,
    "quantize": QuantizeStage,
    "release": ReleaseStage,
}
