"""What disturbed the windows of a row: others on its device, a hypervisor, a quota. What was not
read is null.

`foreign_load` is of the device whose time the row counts: on a CPU the share of the cores that
others took, by the kernel's accounts; on a GPU what its library tells of other processes. No GPU
ever takes the CPU's figure for its own: where nothing reads it (MIG, another vendor, a library that
fails), it is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pipeline.ledger.others import Load, stolen, taken, throttled
from pipeline.ledger.shapes import Figures
from pipeline.ledger.values import Value, derive, null

MUCH = 0.1
"""Share that others may take before times are no longer compared; `ledger.max_foreign_load` and a
policy's default.
"""
NOT_RECORDED = "not recorded by the release that measured it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """Shares of the windows of one row, each in [0, 1].

    Attributes:
        foreign_load: Of the row's device, that others took, over all its windows.
        work_foreign_load: The same while the stage worked.
        assess_foreign_load: The same while its artifact was assessed.
        host_foreign_load: Of the host's cores, that others took.
        steal_share: Of the host's cores, that a hypervisor took.
        cpu_throttle_share: Of the periods of a control group's quota in which it was used up.
    """

    foreign_load: Value
    work_foreign_load: Value
    assess_foreign_load: Value
    host_foreign_load: Value
    steal_share: Value
    cpu_throttle_share: Value

    def to_json(self) -> Figures:
        """Return what `from_json` reads back."""
        return {name: getattr(self, name).to_json() for name in FIGURES}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Disturbance:
        """Read back what `to_json` wrote; an older release wrote less."""
        lacking = null(NOT_RECORDED).to_json()
        values = {name: Value.from_json(raw.get(name, lacking)) for name in FIGURES}
        return Disturbance(**values)


FIGURES = tuple(item.name for item in fields(Disturbance))
ADDED = FIGURES[1:]
"""What older rows lack: `foreign_load` has always been there."""
COMPARED = (
    "throttle_share",
    "foreign_load",
    "host_foreign_load",
    "steal_share",
    "cpu_throttle_share",
)
"""What is known of the comparison pass, which belongs to no row."""


def unread(why: str) -> Disturbance:
    """Return the disturbance of windows in which nothing was read."""
    figures = {name: null(why) for name in FIGURES}
    return Disturbance(**figures)


def of_host(work: Sequence[Load], assess: Sequence[Load]) -> Disturbance:
    """Return what disturbed a run on the host's processors."""
    both = [*work, *assess]
    return Disturbance(
        foreign_load=taken(both),
        work_foreign_load=taken(work),
        assess_foreign_load=taken(assess),
        host_foreign_load=taken(both),
        steal_share=stolen(both),
        cpu_throttle_share=throttled(both),
    )


def of_device(
    work: Sequence[Load],
    assess: Sequence[Load],
    *,
    foreign_load: Value,
    work_foreign_load: Value,
    assess_foreign_load: Value,
) -> Disturbance:
    """Return what disturbed a run on an accelerator: three shares from its own library."""
    both = [*work, *assess]
    return Disturbance(
        foreign_load=foreign_load,
        work_foreign_load=work_foreign_load,
        assess_foreign_load=assess_foreign_load,
        host_foreign_load=taken(both),
        steal_share=stolen(both),
        cpu_throttle_share=throttled(both),
    )


def mean(parts: Sequence[tuple[Value, float]]) -> Value:
    """Return the mean of shares weighted by hours; null where one that weighs anything is."""
    # A stage that took no time has no share, known or not.
    known = [(value, hours) for value, hours in parts if hours > 0]
    if not known:
        return null("no time was measured")
    whole = sum(hours for _, hours in known)
    weighted = lambda *shares: (
        sum(share * hours for share, (_, hours) in zip(shares, known, strict=True)) / whole
    )
    return derive(weighted, *(value for value, _ in known))
