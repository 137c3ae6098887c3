"""What this attempt at a run is: settings, data, device, folder; fixed from its opening to its
end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.settings.run import Run, scored_length
from pipeline.data.documents import Dataset
from pipeline.evaluation.serving.engine import EngineResult
from pipeline.gate.opening import Gate
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.journal import Journal
from pipeline.ledger.memory import MemoryMeter
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.placement import Grant
from pipeline.ledger.shapes import Identity, Placement
from pipeline.stages.base import Stage, stages_of
from pipeline.store.artifacts import Store
from pipeline.training.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One process's attempt at a run.

    Attributes:
        number: Of the attempt, from 1.
        device: The torch device.
        command: The command line, for the report.
        started_ns: Monotonic time when the process began.
        identity: Whose run this is and what it was made from; on every row.
        placement: Where it stands; on every row.
        grant: What a scheduler gave this job.
        devices: How many this run is attached to.
        ranks: The processes that share it; this is the first.
        engine: By arm, what `serving.results` declares.
        gate: Of a release check.
        shared_by_need: Stages that no device can train by itself.
    """

    run: Run
    run_id: str
    number: int
    folder: Path
    store: Store
    journal: Journal
    clock: PhaseClock
    device: Any
    data: Dataset
    command: str
    started_ns: int
    sampler: Sampler
    identity: Identity
    placement: Placement
    grant: Grant | None
    devices: int = 1
    ranks: Ranks = ALONE
    engine: dict[str, EngineResult] = field(default_factory=dict)
    gate: Gate | None = None
    shared_by_need: frozenset[str] = frozenset()
    memory: MemoryMeter = field(default_factory=MemoryMeter)

    @property
    def seeds(self) -> list[int]:
        """Every arm is made once per seed."""
        return self.run.seeds or [self.run.seed]

    @property
    def stages(self) -> dict[str, Stage]:
        """The recipe's stages by name, in the order they run."""
        return stages_of(self.run)

    @property
    def scored_length(self) -> int:
        """Length of a scored window, in tokens."""
        return scored_length(self.run)
