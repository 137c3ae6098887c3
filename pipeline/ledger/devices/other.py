"""Accelerators that torch drives and nothing here knows more of: Intel's, Apple's."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from pipeline.ledger.devices.device import Device

if TYPE_CHECKING:
    import torch


class Other(Device):
    """A device of any kind, by what torch has for all kinds."""

    def __init__(self, at: torch.device) -> None:
        super().__init__(at)
        self.kind = at.type

    @classmethod
    def count(cls) -> int:
        return 1  # torch has named it

    def name(self) -> str:
        """Return what its library calls it; else its kind and its host, never the CPU alone."""
        import torch

        ask: Any = getattr(getattr(torch, self.kind, None), "get_device_name", None)
        host = platform.processor() or platform.machine()
        return str(ask(self.at)) if callable(ask) else f"{self.kind} of {host}"


class Xpu(Other):
    """Intel's GPUs."""

    kind = "xpu"
    numbered = True

    @classmethod
    def count(cls) -> int:
        import torch

        return torch.xpu.device_count()


class Mps(Other):
    """Apple's GPUs."""

    kind = "mps"

    @classmethod
    def count(cls) -> int:
        import torch

        return int(torch.backends.mps.is_available())
