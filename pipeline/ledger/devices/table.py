"""Every kind of device, and which one a torch device is. Another kind is a line here."""

from __future__ import annotations

import re
from typing import Any

from pipeline.ledger.devices.cpu import Cpu
from pipeline.ledger.devices.cuda.device import Cuda
from pipeline.ledger.devices.cuda.rocm import Rocm
from pipeline.ledger.devices.device import Device
from pipeline.ledger.devices.other import Mps, Other, Xpu

KINDS: dict[str, type[Device]] = {
    "cpu": Cpu,  # a host
    "cuda": Cuda,  # NVIDIA's
    "rocm": Rocm,  # AMD's, which torch calls cuda as well
    "xpu": Xpu,  # Intel's
    "mps": Mps,  # Apple's
}
AUTO = "auto"
_opened: dict[str, type[Device]] = {}
"""The kind that this process opened, by torch's name: a kind may compute where another one does."""


def is_device(named: str) -> bool:
    """Tell whether a text names a device, here or elsewhere: `auto`, `cpu`, `cuda:1`."""
    kind, colon, number = named.partition(":")
    if named == AUTO:
        return True
    if kind not in KINDS or not colon:
        return kind in KINDS
    return KINDS[kind].numbered and re.fullmatch(r"\d+", number) is not None


def open_device(named: str) -> Device | None:
    """Return a device as `hardware.device` names it; None where there is no such device.

    `auto` takes the accelerator that torch finds, else the CPU.
    """
    import torch

    if named == AUTO:
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        named = "cpu" if found is None else str(found)
    kind = _kind(named.partition(":")[0])
    if (int(named.partition(":")[2] or 0)) >= kind.count():
        return None
    device = kind(kind.place(named))
    _opened.clear()
    _opened[device.at.type] = kind
    return device


def device_of(at: Any) -> Device:
    """Return the device that a torch device is."""
    return (_opened.get(at.type) or _kind(at.type))(at)


def _kind(name: str) -> type[Device]:
    """Return the kind of torch's or our own name; a name that two kinds answer to is that of the
    one that this torch drives.
    """
    kind = KINDS.get(name, Other)
    return Rocm if kind is Cuda and Rocm.drives() else kind


def is_gpu(kind: str) -> bool:
    """Tell whether the device-hours of a kind, as a result names it, are GPU-hours."""
    return kind in KINDS and KINDS[kind].is_gpu


def toolkit_names() -> list[str]:
    """Return what `toolkits` names, without torch: importing it takes seconds."""
    return [kind.toolkit for kind in KINDS.values() if kind.toolkit is not None]


def toolkits() -> dict[str, str | None]:
    """Return the releases of the libraries that torch was built with for its devices, by name."""
    return {
        kind.toolkit: kind.toolkit_version() for kind in KINDS.values() if kind.toolkit is not None
    }
