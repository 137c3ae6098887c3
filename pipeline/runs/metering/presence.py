"""Which GPUs a command may use, and on which of them it appeared; both by NVML, both by UUID.

A process of the command holds a context on a GPU where a process appears that was not there before,
or where memory in use rises by more than a small context takes: in a container the driver may show
no process at all. So whoever else begins on such a GPU meanwhile counts as the command; only a GPU
that is the job's own is told apart from it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.ledger.attempted import attempted
from pipeline.ledger.devices.cuda.questions import memory_used

POLL_S = 0.25  # while a GPU has not been used; afterwards it is not asked any more
# a context takes hundreds of MiB; without one, memory in use hardly moves
CONTEXT_BYTES = 64 * 2**20


def visible(nvml: Any, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return NVML's handles, by UUID, of the GPUs that `CUDA_VISIBLE_DEVICES` leaves to a command,
    in its order.

    Its numbers are taken as NVML's, which is so for GPUs of one model, or with
    CUDA_DEVICE_ORDER=PCI_BUS_ID. As in CUDA, an entry that names no GPU ends the list.
    Source: CUDA C++ Programming Guide, environment variables.
    """
    boards = _boards(nvml)
    known = {uuid: handle for uuid, handle in boards if uuid is not None}
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return known
    chosen: dict[str, Any] = {}
    for entry in (part.strip() for part in named.split(",")):
        uuid = _uuid(entry, [uuid for uuid, _ in boards])
        if uuid is None and entry.startswith("MIG-"):
            handle = attempted(
                lambda entry=entry: nvml.nvmlDeviceGetHandleByUUID(entry), lambda _: None
            )
            if handle is None:
                break
            chosen[entry] = handle
        elif uuid is None:
            break
        else:
            chosen[uuid] = known[uuid]
    return chosen


def _boards(nvml: Any) -> list[tuple[str | None, Any]]:
    """Return UUID and handle of every GPU by its number; None for one that does not answer (it is
    lost, say).
    """

    def read(index: int) -> tuple[str | None, Any]:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return str(nvml.nvmlDeviceGetUUID(handle)), handle

    count = attempted(lambda: int(nvml.nvmlDeviceGetCount()), lambda _: 0)
    return [
        attempted(lambda index=index: read(index), lambda _: (None, None)) for index in range(count)
    ]


def _uuid(entry: str, known: list[str | None]) -> str | None:
    """Return the UUID that an entry names: by number, or by as much of the UUID as tells it from
    the others.
    """
    if entry.isdecimal():
        return known[int(entry)] if int(entry) < len(known) else None
    found = [
        uuid
        for uuid in known
        if uuid is not None and entry.startswith("GPU-") and uuid.startswith(entry)
    ]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class _State:
    """Who is on a GPU, and how much memory is in use; None where NVML does not tell."""

    pids: frozenset[int]
    memory_bytes: int | None


@dataclass(slots=True)
class Presence:
    """Looks for the command on its GPUs, in the background.

    Args:
        nvml: The pynvml module, initialised.
        handles: By UUID.
        found: Called with a GPU's UUID when the command has appeared on it.
    """

    nvml: Any
    handles: Mapping[str, Any]
    found: Callable[[str], None] = lambda _: None
    used: set[str] = field(default_factory=set)
    _before: dict[str, _State] = field(default_factory=dict)
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Note down who is there already, and look from now on."""
        self._before = {uuid: self._state(handle) for uuid, handle in self.handles.items()}
        self._thread = threading.Thread(target=self._run, name="gpu-presence", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Look once at every GPU that has not been used yet."""
        for uuid in [uuid for uuid in self.handles if uuid not in self.used]:
            now, before = self._state(self.handles[uuid]), self._before[uuid]
            # Either is enough: containers often hide pids, small contexts hardly show in memory.
            if now.pids - before.pids or _grew(before.memory_bytes, now.memory_bytes):
                self.used.add(uuid)
                self.found(uuid)

    def _run(self) -> None:
        while len(self.used) < len(self.handles) and not self._done.wait(POLL_S):
            self.look()

    def _state(self, handle: Any) -> _State:
        nvml = self.nvml
        running = lambda: frozenset[int](
            each.pid for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        )
        # MIG and vGPU tell none: memory must do
        pids = attempted(running, lambda _: frozenset[int]())
        memory = attempted(lambda: memory_used(nvml, handle), lambda _: None)
        return _State(pids, memory)


def _grew(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and now - before > CONTEXT_BYTES
