"""The row of a metered command: its time by what its ranks said, its devices by what their library
said.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.settings.cost import CostConfig
from pipeline.ledger.devices.table import toolkit_names
from pipeline.ledger.disturbance import Disturbance, of_device, of_host
from pipeline.ledger.disturbance import unread as disturbance_unread
from pipeline.ledger.memory import unread
from pipeline.ledger.placement import NOTHING_KNOWN, Grant
from pipeline.ledger.ranks import Life, apportion, counts, merge
from pipeline.ledger.reconcile import problems
from pipeline.ledger.record import Spent, ledger
from pipeline.ledger.shapes import (
    Checked,
    HoursPart,
    Metered,
    Placement,
    ReportedDevices,
    Row,
    Scheduler,
)
from pipeline.ledger.values import Value, null
from pipeline.runs.metering.watch import Used

SILENT = "the program reports no phases"
NOT_TOLD = "not known of another program"
DISTILLED = ("distillation_share", "distillation_gradient_share")
ENDED_BADLY = "the command did not finish"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a command that ended.

    Attributes:
        status: FINISHED, FAILED or KILLED.
        why: None where it finished.
        start_ns: On the host's monotonic clock.
        used: Its devices.
        host_peak: Resident bytes of its largest process at most.
        truncated: The meter was killed: what came after its last sign of life is unknown.
    """

    name: str
    status: str
    why: str | None
    start_ns: int
    end_ns: int
    used: Used
    host_peak: Value
    truncated: bool = False

    @property
    def elapsed_ns(self) -> int:
        """Nanoseconds of the command's life."""
        return self.end_ns - self.start_ns


_OF_PHASES: tuple[HoursPart, ...] = ("productive", "support", "wasted")


def make_row(start: Metered, facts: Facts, lives: Sequence[Life]) -> Row:
    """Return the row of a metered command.

    What failed, or was killed, led to nothing that this meter knows of: its hours are retry, by
    `failed_attempt`.
    """
    record = (
        _finished(start, facts, lives) if facts.status == "FINISHED" else _lost(start, facts, lives)
    )
    found = problems(record)
    return {
        "arm": facts.name,
        "stage": facts.name,
        "type": "metered",
        "seed": 0,
        "attempt": 1,
        "status": facts.status,
        "why": facts.why,
        "reused": None,
        "depends_on": [],
        "artifact": None,
        "quality": {},
        "recovery": {},
        "serving": {},
        "ledger": {
            **record,
            "identity": start["identity"],
            "placement": _placement(start, facts),
            "meter_valid": not found,
            "meter_problems": [*found, *facts.used.read().problems],
        },
    }


def _finished(start: Metered, facts: Facts, lives: Sequence[Life]) -> Checked:
    timeline = (
        merge(lives, facts.start_ns, facts.end_ns, facts.used.ids)
        if lives
        else {"other": facts.elapsed_ns}
    )
    # A row has the phases of one device; its hours multiply by their number.
    per_device = apportion(timeline, facts.elapsed_ns)
    spent = Spent(
        work_ns=facts.elapsed_ns, phases_ns={name: ns for name, ns in per_device.items() if ns}
    )
    record = _ledger(start, facts, spent, {**counts(lives), "steps_lost": null(NOT_TOLD)})
    if not lives:
        _silence(record)
    return record


def _lost(start: Metered, facts: Facts, lives: Sequence[Life]) -> Checked:
    found = dict.fromkeys(counts(lives), null(ENDED_BADLY))
    return _ledger(
        start,
        facts,
        Spent(lost_ns=facts.elapsed_ns),
        {**found, "steps_lost": counts(lives)["steps"]},
    )


def _ledger(start: Metered, facts: Facts, spent: Spent, found: Mapping[str, Value]) -> Checked:
    why = "the allocator's statistics are the program's own"
    memory = {**unread(why), "host_peak_rss_bytes": facts.host_peak}
    memory["nvml_peak_bytes"] = facts.used.read().memory_used_peak_bytes
    record = ledger(
        spent,
        {**dict.fromkeys(DISTILLED, null(NOT_TOLD)), **found},
        devices=facts.used.count,
        device_kind=facts.used.kind,
        cost=CostConfig(**start["cost"]),
        memory=memory,
        usage=facts.used.read(),
        disturbance=_disturbance(facts.used),
        is_training=True,
        seconds_in_steps=None,
        peak=null(NOT_TOLD),
        granted=_granted(start),
        truncated=facts.truncated,
    )
    for name in ("achieved_tflops", "mfu"):
        record["counts"][name] = null("the program's seconds in steps are not known").to_json()
    return record


def _disturbance(used: Used) -> Disturbance:
    """Return what others took of the command's devices; its whole life is work, and nothing is
    assessed.
    """
    if used.load is None:
        return disturbance_unread("the process that read it is gone")
    if used.kind == "cpu":
        return of_host([used.load], [])
    foreign = used.read().foreign_load
    return of_device(
        [used.load],
        [],
        foreign_load=foreign,
        work_foreign_load=foreign,
        assess_foreign_load=null("a metered command is not assessed"),
    )


def _granted(start: Metered) -> Grant | None:
    granted = start.get("grant")
    return None if granted is None else Grant(**granted)


def _silence(record: Checked) -> None:
    """Call nothing wasted, or productive, of a program that does not say what it did."""
    silent = null(SILENT).to_json()
    of_devices, of_gpus = record["device_hours"], record["gpu_hours"]
    for name in _OF_PHASES:
        if of_devices[name]["value"] is not None:
            of_devices[name] = silent
        if of_gpus[name]["value"] is not None:
            of_gpus[name] = silent
    record["device_hours"]["wasted_by"] = {}
    record["counts"]["goodput"] = silent


def _placement(start: Metered, facts: Facts) -> Placement:
    granted = start.get("grant")
    scheduler: Scheduler | None = (
        None if granted is None else {**granted, "name": granted["scheduler"]}
    )
    uuids = [] if facts.used.kind == "cpu" else list(facts.used.ids)
    reported: ReportedDevices = {
        **NOTHING_KNOWN,
        "device_names": [facts.used.name] * facts.used.count,
        "uuids": uuids,
        **facts.used.placement,
    }
    return Placement(
        **reported,
        node=start["node"],
        count=facts.used.count,
        cores=os.cpu_count(),
        scheduler=scheduler,
        torch=None,
        **dict.fromkeys(toolkit_names()),
    )
