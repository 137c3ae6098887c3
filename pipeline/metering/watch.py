"""What a metered command runs on: the GPUs it may use, those it used, and what they did meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pipeline.ledger.peaks import device_name
from pipeline.values import Value, null

SHARES = ("busy", "sm_active", "tensor_active")


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """The devices a command used.

    Attributes:
        kind: `cuda` or `cpu`.
        name: Exact model name of one of them.
        ids: UUIDs of GPUs in the order the command sees them; one name for a CPU host.
        figures: energy_j (of all of them), shares of the time, peak memory; what was not read is null.
        placement: What the device's library told of them.
    """

    kind: str
    name: str
    ids: tuple[str, ...]
    figures: Mapping[str, Value] = field(default_factory=dict)
    placement: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many."""
        return len(self.ids)

    def figure(self, name: str) -> Value:
        """Return a figure, null where it was not read."""
        return self.figures.get(name, null("the device was not sampled"))

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads back; figures belong to a whole run and are left out."""
        return {"kind": self.kind, "name": self.name, "ids": list(self.ids), "placement": dict(self.placement)}

    @staticmethod
    def from_json(raw: Mapping[str, Any] | None) -> Used:
        """Read back what `to_json` wrote; None: a CPU host."""
        if raw is None:
            return cpu_host()
        return Used(kind=raw["kind"], name=raw["name"], ids=tuple(raw["ids"]), placement=raw["placement"])


def cpu_host() -> Used:
    """Return the CPU host as the one device it is."""
    return Used(kind="cpu", name=device_name(SimpleNamespace(type="cpu")), ids=(os.uname().nodename,))


class Watch:
    """Watches the GPUs that a command may use.

    Args:
        asked: UUIDs from the command line; None: what the environment leaves visible.
    """

    def __init__(self, asked: Iterable[str] | None, environ: Mapping[str, str] = os.environ) -> None:
        self._asked = None if asked is None else tuple(asked)
        self._environ = environ

    def start(self) -> None:
        """Begin to read."""

    def stop(self, start_ns: int, end_ns: int, reported: Iterable[str]) -> Used:
        """Return what was used between two times.

        Args:
            reported: UUIDs of GPUs that ranks say they opened.
        """
        return cpu_host()
