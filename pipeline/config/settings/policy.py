"""`policy.*`: what `recipe=release_check` asks of a release."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from pipeline.config.settings.ranges import at_least_0, fraction, positive
from pipeline.config.settings.serving import ServingDtype, ServingLoad

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


class Direction(Enum):
    """Which way a quality improves, as a policy states it; it must be the catalogue's."""

    higher = "higher"
    lower = "lower"


@dataclass(kw_only=True, slots=True)
class MetricRule:
    """A quality that a release must keep: no worse than the champion by more than `margin`."""

    # relative for bits per byte, absolute for shares (0.01 is a point)
    margin: float = at_least_0(0.01)
    direction: Optional[Direction] = None  # null: the catalogue's


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """What `recipe=release_check` asks of a release; its hash is part of every verdict. Null:
    shown, and not asked for.

    Least savings are shares of the champion's cost; 0 asks for no dearer, -0.05 lets a release be
    5% dearer.
    """

    name: str = "custom"  # shown in the verdict
    # by quality key; those of another task are left out
    metrics: dict[str, MetricRule] = field(default_factory=dict)
    # least saving of C, the work of the chain
    training: Optional[float] = field(default=None, metadata={"max": 1})
    # least saving of device-seconds at `load`
    serving: Optional[float] = field(default=None, metadata={"max": 1})
    # least saving of peak memory at `load`
    memory: Optional[float] = field(default=None, metadata={"max": 1})
    # least saving of joules per unit at `load`
    energy: Optional[float] = field(default=None, metadata={"max": 1})
    # units after which the release must have paid for itself
    payback_units: Optional[float] = positive(None)
    load: ServingLoad = field(default_factory=ServingLoad)
    # of the sides that are stored in fp32; one for both, kept over the looks
    dtype: ServingDtype = ServingDtype.auto
    # of a false PASS, one-sided, per criterion
    alpha: float = field(default=0.05, metadata={"above": 0, "max": 0.25})
    blocks: int = field(default=4, metadata={"min": 2})  # of four readings, in one look
    # the second is taken where the first decides nothing
    looks: int = field(default=2, metadata={"min": 1, "max": 2})
    # right-or-wrong items; fewer decide nothing
    min_items: int = field(default=100, metadata={"min": 2})
    min_documents: int = field(default=400, metadata={"min": 2})  # documents of other qualities
    hardware: Optional[str] = None  # exact name of the device that serving is measured on
    # of the serving pass spent throttled; more is no measurement
    max_throttle_share: float = fraction(0.05)
    # of the machine used by others meanwhile; null: not looked at
    max_foreign_load: Optional[float] = fraction(0.1)
    # drift or period of the readings, relative; null: not tested
    max_disturbance: Optional[float] = fraction(0.01)
