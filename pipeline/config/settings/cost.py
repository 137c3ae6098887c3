"""`cost.*`: rates in money."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from pipeline.config.settings.ranges import at_least_0, positive

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


class CostKind(Enum):
    """Whose the devices are. What a cloud asks for a device-hour has its power in it; an owned
    device's may not.
    """

    rented = "rented"
    owned = "owned"


@dataclass(kw_only=True, slots=True)
class CostConfig:
    """Money is shown only where a rate is declared, with its currency, source and date. There are
    no defaults.
    """

    kind: Optional[CostKind] = None  # rented or owned devices
    # what the cloud asks, or what an owned device-hour is put at
    per_device_hour: Optional[float] = positive(None)
    currency: Optional[str] = None  # three letters: EUR
    source: Optional[str] = None  # a price list, a contract, the ledger of a data centre
    date: Optional[str] = None  # on which the source said so: 2026-11-23
    # facility energy over the devices' own
    pue: Optional[float] = field(default=None, metadata={"min": 1})
    # of owned devices whose rate leaves power out
    energy_price_per_kwh: Optional[float] = at_least_0(None)
    # of the electricity: CO2 equivalent is shown only where it is declared
    co2_g_per_kwh: Optional[float] = at_least_0(None)
    co2_source: Optional[str] = None  # who publishes it, and for when
    # quality/primary from which the model of this model.name has converged
    converged_at: Optional[float] = None
    # models that share the teacher's cost; the full figure stays beside it
    teacher_shared_by: int = positive(1)
