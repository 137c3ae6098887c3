"""AMD's GPUs: torch drives them under CUDA's name, and their counters are AMD's own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.precision import Precision
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.cuda.amd_smi import open_reader
from pipeline.ledger.devices.cuda.device import Cuda
from pipeline.ledger.devices.device import EVERYWHERE
from pipeline.ledger.devices.reader import Absent, Reader

if TYPE_CHECKING:
    import torch

TRAINS = (*EVERYWHERE, Precision.fp16)


class Rocm(Cuda):
    """An AMD device. What nobody has tried on one it says that it does not have."""

    kind = "rocm"
    wide_products = False
    captures = False
    streams = False
    for_vllm = False
    torchao = False
    toolkit = "rocm"

    @classmethod
    def drives(cls) -> bool:
        """Tell whether this torch was built for AMD's devices."""
        import torch

        return torch.version.hip is not None

    @classmethod
    def count(cls) -> int:
        import torch

        return torch.cuda.device_count() if cls.drives() and torch.cuda.is_available() else 0

    @classmethod
    def place(cls, named: str) -> torch.device:
        import torch

        return torch.device("".join(("cuda", *named.partition(":")[1:])))

    @classmethod
    def opened(cls) -> tuple[str, str] | None:
        return None  # as CUDA's: a program's torch is one or the other

    @classmethod
    def toolkit_version(cls) -> str | None:
        import torch

        return torch.version.hip

    def reader(
        self, *, others: Sequence[str] = (), now_ns: Callable[[], int] = time.monotonic_ns
    ) -> Reader:
        """Return a reader of what AMD SMI tells of it."""
        return attempted(
            lambda: open_reader(self._address(), now_ns=now_ns),
            lambda why: Absent(unmeasured("the GPU's state", why)),
        )

    def _address(self) -> str:
        """Return where it is on its bus: libraries number devices in different orders."""
        import torch

        known: Any = torch.cuda.get_device_properties(self.at)
        return f"{known.pci_domain_id:04x}:{known.pci_bus_id:02x}:{known.pci_device_id:02x}.0"

    def capability(self) -> tuple[int, int] | None:
        return None  # torch tells AMD's generations in the same form, which is not CUDA's

    def why_not_precision(self, precision: Precision) -> str | None:
        if precision not in TRAINS:
            return f"{precision.value} is not known to work on AMD's devices"
        return None

    def takes_lengths(self, dtype: torch.dtype, width: int) -> bool:
        return False

    def alone_in_environment(self) -> dict[str, str]:
        seen = [each for each in os.environ.get("HIP_VISIBLE_DEVICES", "").split(",") if each]
        index = self.at.index or 0
        return {"HIP_VISIBLE_DEVICES": seen[index] if index < len(seen) else str(index)}
