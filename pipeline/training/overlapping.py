"""Whether a live teacher reads a batch beside its student, on a stream of its own: their own steps
decide.

Neither needs the other until the loss. Where their kernels are too small to fill the device, both
at once take less time than one after the other; where each fills it, nothing is gained. The
arithmetic is the same. What was found stands in the checkpoint, and an attempt that goes on takes
it over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.ledger.devices.table import device_of
from pipeline.ledger.numbers import num_bytes
from pipeline.ledger.shapes import OverlapRecord
from pipeline.training.compiling import LEAST_SAVED, Stopwatch
from pipeline.training.objective import Objective

FIRST = 1  # steps of either way that no time is taken of


def fresh() -> OverlapRecord:
    """Return the record of a training of which nothing is known yet."""
    return {"chosen": None, "why": "", "apart_s": None, "beside_s": None}


def why_not(objective: Objective) -> str | None:
    """Return why a teacher cannot run beside its student, or None where it can be tried."""
    own = device_of(objective.device)
    if objective.teacher is None:
        return "no live teacher"
    if not own.streams:
        return f"no streams on {own.kind}"
    if objective.captured:  # graphs share one pool of memory, and so run in the order of capture
        return "steps are captured as graphs"
    return None


def why_no_room(objective: Objective) -> str | None:
    """Return why there is too little memory for it, or None.

    A step alone takes what its peak has above what stays between steps; a second one beside it
    takes at most as much again.
    """
    own = device_of(objective.device)
    now = own.allocator()
    step = now.peak_allocated - now.allocated
    room = own.free_bytes()[0] + now.reserved - now.peak_allocated
    if room >= step:
        return None
    return f"a step takes up to {num_bytes(step)}, and {num_bytes(room)} are free beside it"


@dataclass(slots=True)
class Overlapping:
    """What the loop asks after every step, once it is settled whether steps are compiled.

    Attributes:
        record: All that stays of it: in the progress, and so in checkpoints.
        is_due: Whether it may be tried yet.
    """

    objective: Objective
    record: OverlapRecord
    is_due: Callable[[], bool]
    _steps: Stopwatch = field(default_factory=lambda: Stopwatch(FIRST))

    @property
    def is_timing(self) -> bool:
        """Whether the step that follows is timed."""
        return self._is_open and self.is_due() and self._steps.is_timing

    @property
    def _is_open(self) -> bool:
        return self.record["chosen"] is None

    def untimed(self, why: str) -> None:
        """Choose nothing by time."""
        if self._is_open:
            self._settle(why, overlaps=False)

    def begin(self) -> None:
        """Take over what was found, or find at once that there is nothing to try."""
        if self._is_open and (why := why_not(self.objective)) is not None:
            self._settle(why, overlaps=False)
        self.objective.overlaps = bool(self.record["chosen"])

    def stepped(self, seconds: float) -> None:
        """Take note of a step; the device was waited for where `is_timing`."""
        if not self._is_open or not self.is_due():
            return
        found = self._steps.median(seconds)
        if found is None:
            return
        if self.record["apart_s"] is None:
            self.record["apart_s"] = found
            if (why := why_not(self.objective) or why_no_room(self.objective)) is not None:
                self._settle(why, overlaps=False)
                return
            self.objective.overlaps, self._steps = True, Stopwatch(FIRST)
            return
        apart, self.record["beside_s"] = self.record["apart_s"], found
        if found < (1 - LEAST_SAVED) * apart:
            self._settle("", overlaps=True)
        else:
            self._settle("it is no faster", overlaps=False)

    def end(self) -> None:
        """Run one after the other from here on."""
        self.objective.overlaps = False

    def _settle(self, why: str, *, overlaps: bool) -> None:
        self.record["chosen"], self.record["why"] = overlaps, why
        self.objective.overlaps = overlaps


def said(record: OverlapRecord) -> str | None:
    """Return what a row says of it; None where nothing was tried."""
    apart, beside = record["apart_s"], record["beside_s"]
    if apart is None:
        return None
    if beside is None:
        return f"teacher and student run one after the other: {record['why']}"
    timed = f"{beside:.3g} s a step beside one another, {apart:.3g} s one after the other"
    if record["chosen"]:
        return f"the teacher runs beside the student, within its phase `forward`: {timed}"
    return f"teacher and student run one after the other: {timed}"
