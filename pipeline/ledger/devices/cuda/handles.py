"""NVML's handles: the library, ready, and a device by its UUID, slices of a board included."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.ledger.attempted import attempted, unmeasured


def initialised(nvml: Any = None) -> tuple[Any, str]:
    """Return NVML, ready, with an empty text; else None and why not."""

    def ready() -> tuple[Any, str]:
        library = nvml
        if library is None:
            try:
                import pynvml as library
            except ImportError:
                return None, "nvidia-ml-py is not installed"
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            return None, f"no NVIDIA driver to ask ({error})"
        return library, ""

    return attempted(ready, lambda why: (None, unmeasured("the GPU's state", why)))


def find(nvml: Any, uuid: str) -> tuple[str, Any]:
    """Return a device's UUID as NVML knows it, and its handle.

    Torch tells a slice's UUID without its prefix. One board that fell off its bus may hide the
    others from a search by UUID: they are then looked for one by one.

    Raises:
        NVMLError: If no such device can be opened.
    """
    try:
        return uuid, nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
            return uuid, _by_number(nvml, uuid, error)
        if not uuid.startswith("GPU-"):
            raise
        slice_uuid = f"MIG-{uuid.removeprefix('GPU-')}"
        return slice_uuid, nvml.nvmlDeviceGetHandleByUUID(slice_uuid)


def _by_number(nvml: Any, uuid: str, error: Exception) -> Any:
    for number in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            if nvml.nvmlDeviceGetUUID(handle) == uuid:
                return handle
        except nvml.NVMLError:
            continue
    raise error


@dataclass(frozen=True, slots=True)
class Slice:
    """A MIG slice's place.

    Attributes:
        board: Handle of its board.
        instance: Number of its GPU instance, which activity is counted by.
        alone: Whether it is all of that instance; None where NVML does not tell.
    """

    board: Any
    instance: int
    alone: bool | None


def slice_of(nvml: Any, uuid: str, handle: Any) -> Slice | None:
    """Return where a MIG slice is; None for what is no slice, or does not tell its board."""

    def alone() -> bool:
        has = nvml.nvmlDeviceGetAttributes_v2(handle)
        return has.computeInstanceSliceCount == has.gpuInstanceSliceCount

    def place() -> Slice:
        return Slice(
            nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle),
            nvml.nvmlDeviceGetGpuInstanceId(handle),
            attempted(alone, lambda _: None),
        )

    return attempted(place, lambda _: None) if uuid.startswith("MIG-") else None


def full_uuid(uuid: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a UUID as torch tells it with its prefix: `MIG-` where the environment names such a
    slice, else `GPU-`.
    """
    if uuid.startswith(("GPU-", "MIG-")):
        return uuid
    visible = [entry.strip() for entry in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return f"MIG-{uuid}" if f"MIG-{uuid}" in visible else f"GPU-{uuid}"
