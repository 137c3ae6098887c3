"""From measured windows to the ledger of a row: every second in one class, every figure with its
provenance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config.settings.cost import CostConfig
from pipeline.ledger.cost import money
from pipeline.ledger.devices.table import is_gpu
from pipeline.ledger.disturbance import Disturbance
from pipeline.ledger.gpu_timeline import FIGURES as TRACED
from pipeline.ledger.gpu_timeline import NOT_TRACED
from pipeline.ledger.gpu_usage import FIGURES as USED
from pipeline.ledger.gpu_usage import Usage
from pipeline.ledger.metrics import PRODUCTIVE, WASTE_CAUSES, WASTED
from pipeline.ledger.placement import Grant, allocated_hours
from pipeline.ledger.reconcile import problems
from pipeline.ledger.shapes import (
    Checked,
    Conditions,
    DeviceHours,
    Figures,
    GpuTimelineRecord,
    HoursPart,
    LedgerRecord,
    Measurements,
    RankTime,
    StageTimeline,
)
from pipeline.ledger.values import Value, derive, measured, null

HOUR_NS = 3600 * 10**9
COUNTS = (
    "steps",
    "steps_lost",
    "examples",
    "tokens",
    "target_tokens",
    "model_flops",
    "achieved_tflops",
    "peak_tflops",
    "mfu",
    "goodput",
    "active_parameter_share",
    "distillation_share",
    "distillation_gradient_share",
)


@dataclass(slots=True)
class Spent:
    """Integer nanoseconds of one stage attempt, and the phases they fall into.

    Attributes:
        lost_ns: Part of the work that did not lead to the artifact, booked as retry under
            `lost_as`.
        phases_ns: Self times over work and assessment, without the lost part; they sum to the rest
            exactly.
        alone_ns: Those of them in which one device worked, and all others of the attempt waited.
        others_ns: What other devices did meanwhile, where each told it: their self times together.
        told_ns: Those of `phases_ns` that stand beside them.
        ranks: What each rank told of the work, for readers.
        assess_ranks: What each told of the assessment.
        beside: Among how many ranks the devices were shared out during the work. Its times here are
            its share of all devices' time, that of one rank in so many.
        beside_ns: Those of `phases_ns` that are such shares.
    """

    work_ns: int = 0
    assess_ns: int = 0
    lost_ns: int = 0
    lost_as: str = "failed_attempt"
    phases_ns: dict[str, int] = field(default_factory=dict)
    alone_ns: dict[str, int] = field(default_factory=dict)
    others_ns: dict[str, float] = field(default_factory=dict)
    told_ns: dict[str, int] = field(default_factory=dict)
    ranks: list[RankTime] = field(default_factory=list)
    assess_ranks: list[RankTime] = field(default_factory=list)
    beside: int = 1
    beside_ns: dict[str, int] = field(default_factory=dict)

    @property
    def wall_ns(self) -> int:
        """Nanoseconds that passed."""
        return (self.work_ns + self.lost_ns) * self.beside + self.assess_ns

    @property
    def passed_ns(self) -> dict[str, int]:
        """The self times by phase as they passed on one device."""
        more = self.beside - 1
        return {
            name: ns + more * self.beside_ns.get(name, 0) for name, ns in self.phases_ns.items()
        }

    def add_beside(self, phases_ns: Mapping[str, int]) -> None:
        """Add the self times of work that took one of `beside` ranks: its share of all devices'
        time.
        """
        self.add_phases(phases_ns)
        for name, ns in phases_ns.items():
            self.beside_ns[name] = self.beside_ns.get(name, 0) + ns

    def add_told(self, phases_ns: Mapping[str, int], others: Sequence[Mapping[str, float]]) -> None:
        """Add the self times of a window in which every device told its own.

        Args:
            phases_ns: Of the first device; they fill the window.
            others: Of the others. What is left of the window each of them waited.
        """
        self.add_phases(phases_ns)
        for name, ns in phases_ns.items():
            self.told_ns[name] = self.told_ns.get(name, 0) + ns
        for each in others:
            for name, ns in each.items():
                self.others_ns[name] = self.others_ns.get(name, 0) + ns

    def of_devices(self, devices: int) -> tuple[dict[str, float], float]:
        """Return the self times by phase as those of a device in the mean, and what devices waited
        for others, in nanoseconds of all devices.
        """
        idle = self.idle_ns(devices)
        found: dict[str, float] = {}
        for name in {**self.phases_ns, **self.others_ns}:
            told = self.told_ns.get(name, 0)
            alike = self.phases_ns.get(name, 0) - told - idle.get(name, 0)
            found[name] = alike + (told + self.others_ns.get(name, 0)) / devices
        waited = sum(idle.values())
        if self.others_ns:
            whole = sum(self.told_ns.values()) * (devices - 1)
            waited += max(0, whole - sum(self.others_ns.values())) / devices
        return found, waited

    def add_phases(
        self, phases_ns: Mapping[str, int], alone: Callable[[str], bool] = lambda _: False
    ) -> None:
        """Add the self times of another window.

        Args:
            alone: Tells of a phase whether one device worked in it, and the others waited.
        """
        for name, ns in phases_ns.items():
            self.phases_ns[name] = self.phases_ns.get(name, 0) + ns
            if alone(name):
                self.alone_ns[name] = self.alone_ns.get(name, 0) + ns

    def idle_ns(self, devices: int) -> dict[str, float]:
        """Return by phase, as nanoseconds of all devices, what those that waited are charged
        with.
        """
        return {name: ns * (devices - 1) / devices for name, ns in self.alone_ns.items()}


def by_class(spent: Spent, devices: int) -> tuple[dict[HoursPart, float], dict[str, float]]:
    """Return what became of a row's time, by part, and its waste by cause: nanoseconds of a device
    in the mean.
    """
    total = spent.work_ns + spent.assess_ns + spent.lost_ns
    phases, waited = spent.of_devices(devices)  # a phase is that of the devices that worked
    wasted_by = dict.fromkeys(WASTE_CAUSES, 0.0)
    for phase, cause in WASTED.items():
        wasted_by[cause] += phases.get(phase, 0)
    wasted_by[spent.lost_as] += spent.lost_ns
    wasted_by["idle_rank"] += waited
    wasted = sum(wasted_by.values())
    productive = sum(ns for phase, ns in phases.items() if phase in PRODUCTIVE)
    # The rest, so that the three classes add up to all of the time.
    support = total - wasted - productive
    parts: dict[HoursPart, float] = {
        "attached": total,
        "work": spent.work_ns,
        "assess": spent.assess_ns,
        "retry": spent.lost_ns,
        "productive": productive,
        "support": support,
        "wasted": wasted,
    }
    return parts, wasted_by


def hours(ns: float, devices: int) -> Value:
    """Return device-hours of an interval."""
    return measured(ns * devices / HOUR_NS)


def ledger(
    spent: Spent,
    counts: dict[str, Value],
    *,
    devices: int,
    device_kind: str,
    cost: CostConfig,
    memory: dict[str, Value],
    usage: Usage,
    disturbance: Disturbance,
    is_training: bool,
    seconds_in_steps: float | None,
    peak: Value,
    granted: Grant | None = None,
    truncated: bool = False,
    timeline: StageTimeline | None = None,
) -> Checked:
    """Return the ledger of a row as result.json has it.

    Args:
        timeline: What the device did in traced steps, as `Output.gpu_timeline` has it; empty where
            none was.
        usage: What the devices did in these windows.
        disturbance: What others, a hypervisor or a quota took of them.
        granted: By a scheduler; None on a bare run.
        truncated: The process was killed: its last seconds are unknown.
        peak: Dense TFLOP/s of one device in the arithmetic of this stage.
    """
    parts, wasted_by = by_class(spent, devices)
    total, productive = parts["attached"], parts["productive"]
    device_hours = DeviceHours(
        **{name: hours(ns, devices).to_json() for name, ns in parts.items()},
        wasted_by={cause: hours(ns, devices).to_json() for cause, ns in wasted_by.items() if ns},
    )
    goodput = (
        measured(productive / total) if is_training and total else null("not a training stage")
    )
    traced = gpu_timeline(timeline or {})
    at_work = devices / spent.beside
    in_steps_h = (seconds_in_steps or 0.0) * at_work / 3600
    # The trace speaks of steps only; outside of them nothing is known.
    busy_in_steps = derive(lambda share: share * in_steps_h, Value.from_json(traced["busy"]))
    gpu_hours = _gpu_hours(parts, devices, device_kind, usage, granted, busy_in_steps)
    record: Measurements = {
        "wall_s": measured(spent.wall_ns / 1e9).to_json(),
        "phases_ns": spent.passed_ns,
        "device_hours": device_hours,
        "gpu_hours": gpu_hours,
        "energy_j": usage.energy_j.to_json(),
        "counts": _counts(
            counts, goodput, seconds_in_steps, at_work, peak, is_training=is_training
        ),
        "memory": {name: value.to_json() for name, value in memory.items()},
        "cost": money(
            total * devices / HOUR_NS,
            cost,
            allocated=Value.from_json(gpu_hours["allocated"]),
            energy_j=usage.energy_j,
        ),
        "conditions": _conditions(usage, disturbance, spent, truncated=truncated),
        "gpu_timeline": traced,
    }
    if spent.ranks:
        record["ranks"] = spent.ranks
    if spent.assess_ranks:
        record["assess_ranks"] = spent.assess_ranks
    found = problems(record)
    return {
        **record,
        "meter_valid": not found,
        "meter_problems": [*found, *usage.problems, *traced["notes"]],
    }


def gpu_timeline(timeline: StageTimeline) -> GpuTimelineRecord:
    """Return the group of a row that says what its device did: shares of traced steps, seconds by
    phase, traces.
    """
    shares: Figures = timeline.get("shares") or {
        name: null(NOT_TRACED).to_json() for name in TRACED
    }
    return GpuTimelineRecord(
        **shares,
        phases_s=timeline.get("phases_s", {}),
        traces=timeline.get("traces", []),
        notes=timeline.get("notes", []),
    )


def _overhead(spent: Spent) -> Value:
    """Return the share of the main thread's time that metering and tracking took of what is in
    phases.
    """
    total = sum(spent.phases_ns.values())
    return measured(spent.phases_ns.get("log", 0) / total) if total else null("no time in phases")


def _conditions(
    usage: Usage, disturbance: Disturbance, spent: Spent, *, truncated: bool
) -> Conditions:
    read = {name: getattr(usage, name).to_json() for name in USED if name != "energy_j"}
    return Conditions(
        **{**read, **disturbance.to_json()},
        throttle_reasons=list(usage.throttle_reasons),
        problems=list(usage.problems),
        meter_overhead=_overhead(spent).to_json(),
        truncated=truncated,
    )


def usage_of(record: LedgerRecord) -> Usage:
    """Read back the usage that a ledger was made with."""
    return Usage.from_json({**record["conditions"], "energy_j": record["energy_j"]})


def disturbance_of(record: LedgerRecord) -> Disturbance:
    """Read back the disturbance that a ledger was made with."""
    return Disturbance.from_json(record["conditions"])


def _gpu_hours(
    parts: Mapping[HoursPart, float],
    devices: int,
    kind: str,
    usage: Usage,
    granted: Grant | None,
    busy_in_steps: Value,
) -> Figures:
    """Return GPU-hours by kind. Where nothing was read, traced steps tell how busy steps were: a
    lower bound.
    """
    shown: tuple[HoursPart, ...] = ("attached", "productive", "support", "wasted")
    values: dict[str, Value] = {name: hours(parts[name], devices) for name in shown}
    share_of = lambda share: derive(lambda part, whole: part * whole, share, values["attached"])
    values |= {
        name: share_of(getattr(usage, name)) for name in ("busy", "sm_active", "tensor_active")
    }
    if values["busy"].value is None and busy_in_steps.value is not None:
        values["busy"] = busy_in_steps
    values["allocated"] = allocated_hours(values["attached"].value or 0.0, devices, granted)
    if not is_gpu(kind):
        why = "a CPU run uses no GPU" if kind == "cpu" else f"hours of {kind} are no GPU-hours"
        values = dict.fromkeys(values, null(why))
        if granted is not None and granted.gpus:  # and never touched
            values["allocated"] = allocated_hours(parts["attached"] / HOUR_NS, 1, granted)
    return {name: value.to_json() for name, value in values.items()}


def _counts(
    counts: dict[str, Value],
    goodput: Value,
    seconds_in_steps: float | None,
    devices: float,
    peak: Value,
    *,
    is_training: bool,
) -> Figures:
    nothing = null("the stage did not finish" if is_training else "this stage trains nothing")
    rate = nothing
    if seconds_in_steps:
        seconds = measured(seconds_in_steps)
        rate = derive(
            lambda f, s: f / s / devices / 1e12, counts.get("model_flops", nothing), seconds
        )
    known = {
        **counts,
        "achieved_tflops": rate,
        "peak_tflops": peak,
        "mfu": _mfu(rate, peak),
        "goodput": goodput,
    }
    return {name: known.get(name, nothing).to_json() for name in COUNTS}


def _mfu(rate: Value, peak: Value) -> Value:
    """Return the share of the peak that was achieved; more than all of it is no share: one of the
    two is wrong.
    """
    if rate.value is not None and peak.value is not None and rate.value > peak.value:
        return null(
            f"{rate.value:.4g} TFLOP/s achieved is more than the peak of {peak.value:.4g}:"
            " one of them is wrong"
        )
    return derive(lambda achieved, most: achieved / most, rate, peak)
