"""What a run shows of itself while a stage takes its steps: `report/progress.py` shows it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.forecast.past import FILE
from pipeline.ledger.attempted import attempted
from pipeline.ledger.numbers import duration, percent, significant
from pipeline.ledger.records import FORECAST, read_record
from pipeline.ledger.shapes import ForecastRecord
from pipeline.runs.running import Running


@dataclass(slots=True)
class Live:
    """Where a run stands, in words; see `report.progress.About`.

    Attributes:
        loss: Of the last step that told of one.
    """

    running: Running
    arm: str
    seed: int
    loss: float | None = None
    _cpu: tuple[float, float] = field(
        default_factory=lambda: (time.monotonic(), time.process_time())
    )
    _forecast: ForecastRecord | None = None

    def __post_init__(self) -> None:
        path = self.running.session.folder / FILE
        self._forecast = attempted(
            lambda: read_record(path, FORECAST, so="no time left is shown"), lambda _: None
        )

    def read(self, values: Mapping[str, float | None]) -> None:
        """Take over what a step read."""
        loss = values.get("loss")
        self.loss = self.loss if loss is None else loss

    def of_stage(self) -> Sequence[str]:
        """Return loss, phase, and how busy the device is."""
        return attempted(self._of_stage, lambda _: ())

    def of_run(self, left_s: float | None) -> Sequence[str]:
        """Return device-hours spent, against forecast and budget, and the time left."""
        return attempted(lambda: self._of_run(left_s), lambda _: ())

    def _of_stage(self) -> Sequence[str]:
        busy = self._busy()
        return [
            *([] if self.loss is None else [f"loss {significant(self.loss, 4)}"]),
            self.running.session.clock.current,
            *([] if busy is None else [busy]),
        ]

    def _busy(self) -> str | None:
        """Return the share of the device that was in use of late: counters of an accelerator, the
        processor time of this process on a CPU.
        """
        session = self.running.session
        if session.device.type != "cpu":
            share = session.sampler.busy()
            return None if share is None else f"{session.device.type} {percent(share)} busy"
        now, used = time.monotonic(), time.process_time()
        before, self._cpu = self._cpu, (now, used)
        wall_s = (now - before[0]) * (os.cpu_count() or 1)
        return None if wall_s <= 0 else f"cpu {percent(min(1.0, (used - before[1]) / wall_s))} busy"

    def _of_run(self, left_s: float | None) -> Sequence[str]:
        session = self.running.session
        spent_h = self.running.timeline.spent_hours()
        said = [f"{duration(3600 * spent_h)} spent"]
        if self._forecast is not None:
            whole = self._forecast["totals"]["device_hours"]["expected"]
            if whole is not None:
                ends = (duration(3600 * whole[end]) for end in ("low", "high"))
                said.append(f"forecast {' to '.join(ends)}")
        if limit := session.run.budget.device_hours:
            said.append(f"{percent(spent_h / limit)} of the budget")
        after_s = self._after_s()
        if left_s is not None and after_s is not None:
            said.append(f"{duration(left_s + after_s)} left")
        return said

    def _after_s(self) -> float | None:
        """Return what is expected of the parts of the run that have not begun; None where one of
        them is not foreseen.
        """
        if self._forecast is None or self._forecast["missing"]:
            return None
        done = {(row["arm"], row["seed"]) for row in self.running.book.rows}
        left = 0.0
        for part in self._forecast["parts"]:
            own = part["arm"] is not None and (part["arm"], part["seed"]) == (self.arm, self.seed)
            over = (part["arm"], part["seed"]) in done
            if part["what"] == "overhead" or over or (own and part["what"] == "work"):
                continue
            if part["expected_s"] is None:
                return None
            left += part["expected_s"]["value"]
        return left
