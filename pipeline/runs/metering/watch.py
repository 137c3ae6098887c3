"""What a metered command runs on: the GPUs it may use, those it used, and what they did
meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from pipeline.errors import UserError
from pipeline.ledger.attempted import attempted
from pipeline.ledger.devices.cuda.device import Cuda
from pipeline.ledger.devices.cuda.handles import initialised
from pipeline.ledger.devices.cuda.nvml import open_reader
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.gpu_usage import FIGURES, SHARED_MODULE, Usage, unread
from pipeline.ledger.others import Load, Others
from pipeline.ledger.peaks import device_name
from pipeline.ledger.shapes import DevicesUsed, ReportedDevices
from pipeline.ledger.values import derive, null
from pipeline.runs.metering.presence import Presence, visible

SUMS = ("energy_j", "energy_integral_j", "power_w_mean")
EXTREMES = {"memory_used_peak_bytes": max, "temperature_c_max": max, "sm_clock_mhz_min": min}
"""What of a usage adds up over devices, and what does not; the rest is the mean of the devices."""
NOT_TOLD_APART = "not known of another program: which processes on a GPU are its own"
UNKNOWN_GPU = "GPU of unknown model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """The devices a command used.

    Attributes:
        kind: As the device classes name it.
        name: Exact model name, of the first one.
        ids: UUIDs of GPUs in the order the command sees them; one name for a CPU host.
        usage: What was read of all of them; None where nobody read, or is there to tell.
        placement: What the devices' library reported of them.
        load: What others took of the host's processors meanwhile; None where nobody is there to
            tell.
        notes: What a reader must know.
    """

    kind: str
    name: str
    ids: tuple[str, ...]
    usage: Usage | None = None
    placement: ReportedDevices = field(default_factory=ReportedDevices)
    load: Load | None = None
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many."""
        return len(self.ids)

    def read(self) -> Usage:
        """Return what was read of them, nulls with the reason where nothing was."""
        why = "a CPU run uses no GPU" if self.kind == "cpu" else "the process that read it is gone"
        return unread(why) if self.usage is None else self.usage

    def to_json(self) -> DevicesUsed:
        """Return what `from_json` reads back; usage belongs to a whole run and is left out."""
        return {"kind": self.kind, "name": self.name, "ids": list(self.ids)}

    @staticmethod
    def from_json(raw: DevicesUsed) -> Used:
        """Read back what `to_json` wrote."""
        return Used(kind=raw["kind"], name=raw["name"], ids=tuple(raw["ids"]))


def cpu_host(*notes: str) -> Used:
    """Return the CPU host as the one device it is."""
    return Used(
        kind="cpu",
        name=device_name(SimpleNamespace(type="cpu")),
        ids=(os.uname().nodename,),
        notes=notes,
    )


def as_reported(opened: Mapping[str, str | None], why: str) -> Used:
    """Return the GPUs that ranks say they opened, by UUID with their names; the host where they
    opened none.

    Args:
        why: Nothing else is known of them.
    """
    if not opened:
        return cpu_host()
    names = [name or UNKNOWN_GPU for name in opened.values()]
    return Used(
        kind=Cuda.kind,
        name=names[0],
        ids=tuple(opened),
        usage=unread(why),
        placement={"device_names": [*names]},
    )


class Watch:
    """Watches the GPUs that a command may use.

    Args:
        asked: UUIDs from the command line, none to watch no GPU; None: what the environment leaves
            visible.
        nvml: The pynvml module; None imports it.

    Raises:
        UserError: If a GPU that is asked for is not there, or cannot be looked for.
    """

    def __init__(
        self,
        asked: Sequence[str] | None,
        environ: Mapping[str, str] = os.environ,
        *,
        nvml: Any = None,
    ) -> None:
        self._nvml: Any
        self._nvml, self._why = (None, "no GPU is watched") if asked == () else initialised(nvml)
        # hours and money of a device that nobody can find would be made up
        if asked and self._nvml is None:
            raise UserError(
                "--gpus",
                f"{asked[0]} cannot be confirmed: {self._why}",
                "leave --gpus out, or give none",
            )
        self._handles = {} if self._nvml is None else _handles(self._nvml, asked, environ)
        # One sampler a GPU, because which of them the command will use is not known yet.
        self._samplers = {
            uuid: Sampler(open_reader([uuid], nvml=self._nvml)) for uuid in self._handles
        }
        self._presence: Presence | None = None
        self._others = Others()

    def start(self, found: Callable[[Used], None] = lambda _: None) -> None:
        """Begin to read.

        Args:
            found: Called with the devices in use whenever the command appears on another one.
        """
        self._others = Others()
        if self._nvml is None or not self._handles:
            found(cpu_host())
        else:
            self._presence = Presence(self._nvml, self._handles, lambda _: found(self._used(())))
            self._presence.start()
            for sampler in self._samplers.values():
                sampler.start()

    def stop(self, start_ns: int, end_ns: int, opened: Mapping[str, str | None]) -> Used:
        """Return what was used between two times.

        Args:
            opened: GPUs that ranks say they opened, by UUID, with their names.
        """
        load = self._others.load()
        return replace(self._stopped(start_ns, end_ns, opened), load=load)

    def _stopped(self, start_ns: int, end_ns: int, opened: Mapping[str, str | None]) -> Used:
        if self._presence is None:
            return as_reported(opened, self._why)
        self._presence.stop()
        try:
            used = self._used(opened)
            placements = [
                self._samplers[uuid].reader.placement()
                for uuid in used.ids
                if uuid in self._samplers
            ]
        finally:
            for sampler in self._samplers.values():
                sampler.stop()
        if used.kind == "cpu":
            return used
        usage = over_devices([self._samplers[uuid].usage((start_ns, end_ns)) for uuid in used.ids])
        return replace(used, usage=usage, placement=_joined(placements))

    def _used(self, opened: Iterable[str]) -> Used:
        """Return the devices in use so far."""
        assert self._presence is not None
        ids = tuple(
            uuid for uuid in self._handles if uuid in self._presence.used or uuid in set(opened)
        )
        if not ids:
            return cpu_host(
                f"{len(self._handles)} GPUs were visible to the command, and none was used"
            )
        name = attempted(
            lambda: str(self._nvml.nvmlDeviceGetName(self._handles[ids[0]])), lambda _: UNKNOWN_GPU
        )
        return Used(kind=Cuda.kind, name=name, ids=ids)


def _handles(nvml: Any, asked: Sequence[str] | None, environ: Mapping[str, str]) -> dict[str, Any]:
    if asked is None:
        return visible(nvml, environ)
    found: dict[str, Any] = {}
    for uuid in asked:
        try:
            found[uuid] = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            known = ", ".join(visible(nvml, {})) or "none"
            raise UserError(
                "--gpus", f"NVML does not know {uuid} ({error})", f"name some of {known}"
            ) from None
    return found


def over_devices(usages: Sequence[Usage]) -> Usage:
    """Return the usage of several devices, each read by a sampler of its own, as that of one
    window.
    """
    if len(usages) == 1:  # nothing is derived
        return replace(usages[0], foreign_load=null(NOT_TOLD_APART))
    figures = {
        name: derive(_together(name), *(getattr(usage, name) for usage in usages))
        for name in FIGURES
    }
    figures["foreign_load"] = null(NOT_TOLD_APART)
    if figures["module_energy_j"].value is not None:
        figures["module_energy_j"] = null(SHARED_MODULE)
    return Usage(
        **figures,
        throttle_reasons=tuple(
            sorted({each for usage in usages for each in usage.throttle_reasons})
        ),
        problems=tuple(dict.fromkeys(each for usage in usages for each in usage.problems)),
    )


def _together(name: str) -> Callable[..., float]:
    """Return how a figure of each device becomes one of all."""
    if name in SUMS:
        return lambda *values: sum(values)
    return EXTREMES.get(name, lambda *values: sum(values) / len(values))


def _joined(placements: Sequence[ReportedDevices]) -> ReportedDevices:
    """Return what the devices' library reported, device by device where it tells of each."""
    joined: ReportedDevices = {**placements[0]}
    if "uuids" in joined:
        joined["uuids"] = [uuid for each in placements for uuid in each.get("uuids", [])]
    if "device_names" in joined:
        joined["device_names"] = [
            name for each in placements for name in each.get("device_names", [])
        ]
    if joined.get("power_limit_w") is not None:
        joined["power_limit_w"] = [
            limit for each in placements for limit in each.get("power_limit_w") or []
        ]
    return joined
