"""What a stage is given to work with, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ledger.shapes import About, HistoryEntry, OutputRecord, StageTimeline
from pipeline.ledger.values import Value
from pipeline.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    import torch

    from pipeline.config.settings.run import Run
    from pipeline.data.documents import Dataset
    from pipeline.ledger.phases import PhaseClock


@dataclass(frozen=True, slots=True)
class Output:
    """What a stage reports beside the files it left in `Context.out`.

    Attributes:
        counts: Keys of the ledger's `counts` (steps, tokens, examples, model_flops, ...).
        flops_per_step: Of the stage's own model, teacher excluded; what `match_compute` divides by.
        flops_by_rule: All FLOPs by the rule of thumb, where they cannot be counted: what
            `match_compute` then matches.
        curve: Validation readings: step, tokens, metric, seconds in steps until then, seconds in
            evaluations (its own included), and 1.0 where the learning rate was constant.
        seconds_in_steps: Time in training steps, evaluation and checkpoints excluded.
        existing: The stage did nothing: its artifact is the model it was given.
        notes: What a reader must know, said once.
        gpu_timeline: What the device did, in plain JSON, empty where nothing was looked at:
            `shares` of step time on traced steps (figures by name), `steps` (their classes in ns),
            `traces` (file names below `Context.traces`), `notes`, and `phases_s` (device seconds by
            host phase, of this attempt).
        about: Facts that go into artifact.json, in plain JSON by topic.
    """

    counts: dict[str, Value] = field(default_factory=dict)
    flops_per_step: float | None = None
    flops_by_rule: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds_in_steps: float | None = None
    existing: bool = False
    notes: tuple[str, ...] = ()
    gpu_timeline: StageTimeline = field(default_factory=StageTimeline)
    about: About = field(default_factory=About)

    def to_json(self) -> OutputRecord:
        """Return what `from_json` reads back; notes are said once and not kept."""
        return {
            "counts": {name: value.to_json() for name, value in self.counts.items()},
            "curve": self.curve,
            "flops_per_step": self.flops_per_step,
            "flops_by_rule": self.flops_by_rule,
            "seconds_in_steps": self.seconds_in_steps,
            "existing": self.existing,
            "gpu_timeline": self.gpu_timeline,
            "about": self.about,
        }

    @staticmethod
    def from_json(raw: OutputRecord) -> Output:
        """Read back what `to_json` wrote."""
        return Output(
            counts={name: Value.from_json(value) for name, value in raw["counts"].items()},
            flops_per_step=raw["flops_per_step"],
            flops_by_rule=raw.get("flops_by_rule"),
            curve=raw["curve"],
            seconds_in_steps=raw["seconds_in_steps"],
            existing=raw["existing"],
            gpu_timeline=raw.get("gpu_timeline", {}),
            about=raw["about"],
        )


@dataclass(slots=True)
class Context:
    """What a stage works with. It neither times nor logs itself: the clock and the journal are the
    run's.
    """

    run: Run
    stage: str
    seed: int
    device: torch.device
    data: Dataset
    clock: PhaseClock
    out: Path  # an empty folder for the artifact
    checkpoints: Path  # of this stage's key; survives the process
    like: Output | None  # of the stage named by `like`
    matched_flops: float | None  # that it may spend, where it matches other stages
    points: Callable[[int, dict[str, float]], None]  # curves, by step
    # what led to a checkpoint at this step: goes into it
    history: Callable[[int], list[HistoryEntry]]
    checkpointed: Callable[[int], None]  # a checkpoint of this step is on disk
    # the stage resumes from this step; its checkpoint's history
    resumed: Callable[[int, list[HistoryEntry]], None]
    should_stop: Callable[[], type[Exception] | None]  # asked between steps
    progress: Callable[..., Any]  # progress bar: (description, total, unit) -> context manager
    say: Callable[[str], None]
    ranks: Ranks = ALONE  # that do the stage together; each is given a context of its own
    traces: Path | None = None  # where traces of sampled steps go; None: no step is traced
