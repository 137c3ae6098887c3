"""The GPU that is loaded: matmuls, one spinning thread, copies, and the pipeline's own meter over
them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from known_load.claims import Unmeasured
from torch.utils.flop_counter import FlopCounterMode

from pipeline.ledger.devices.reader import Reader, Reading
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.peaks import device_name
from pipeline.ledger.traced_steps import StepTracer

SIZE = 8192  # of the square matrices
COPY_BYTES = 256 * 2**20
LEAD, STEP = 1, 2  # the step before a traced one, and that one


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how often; seconds."""

    repeats: int = 3
    warm_s: float = 6.0  # of full load, before anything is read
    # of a load before its first window: power is read as the mean of the last second
    lead_s: float = 2.0
    window_s: float = 8.0
    once_s: float = 4.0  # of N matmuls
    rest_s: float = 3.0  # before a window of N matmuls
    settle_s: float = 20.0  # at most, until the power of an idle board stands
    spin_s: float = 5.0
    steps: int = 30  # of a training
    rows: int = 16
    length: int = 256


TINY = Plan(
    repeats=1, warm_s=1.0, window_s=5.2, once_s=3.2, rest_s=1.0, steps=12, rows=4, length=64
)


class Device(Protocol):
    """A GPU that can be loaded in known ways.

    Attributes:
        name: As torch gives it.
        at: Where torch computes.
        size: Of its square matrices.
        readings: All that its sampler read.
    """

    name: str
    at: torch.device
    size: int
    sampler: Sampler
    readings: list[Reading]

    def open(self) -> None: ...
    def close(self) -> None: ...
    def now_ns(self) -> int: ...
    def sleep(self, seconds: float) -> None: ...
    def matmuls(self, count: int) -> None: ...
    def synchronize(self) -> None: ...
    def counted_flops(self, count: int) -> int: ...
    def seconds_of(self, count: int) -> float: ...
    def spin(self, seconds: float) -> Callable[[], bool]: ...
    def threads_of_spin(self) -> int: ...
    def copy(self, *, aside: bool) -> None: ...
    def tracer(self, folder: Path) -> StepTracer: ...


class Recorder:
    """A reader that keeps all that it read."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self.readings = reader, list[Reading]()
        self.uuids, self.why = reader.uuids, reader.why

    def read(self) -> tuple[Reading, ...]:
        """Read, and keep it."""
        found = self._reader.read()
        self.readings += found
        return found

    def placement(self) -> dict[str, Any]:
        """Return what the driver tells of the devices."""
        return self._reader.placement()

    def close(self) -> None:
        """End the reading."""
        self._reader.close()


class Cuda:
    """The first CUDA device."""

    def __init__(self, size: int = SIZE) -> None:
        self.at, self.size = torch.device("cuda", 0), size
        self.name = device_name(self.at)
        recorder = Recorder(device_of(self.at).reader())
        self.sampler, self.readings = Sampler(recorder), recorder.readings
        self._a, self._b = (
            torch.randn(size, size, device=self.at, dtype=torch.bfloat16) for _ in range(2)
        )
        self._out = torch.empty_like(self._a)
        self._pageable = torch.ones(COPY_BYTES, dtype=torch.uint8)
        self._pinned, self._there = self._pageable.pin_memory(), self._pageable.to(self.at)
        self._aside, self._cycles_per_s = torch.cuda.Stream(self.at), 0.0

    def open(self) -> None:
        """Begin to read."""
        self.sampler.start()

    def close(self) -> None:
        """Read a last time."""
        self.sampler.stop()

    def now_ns(self) -> int:
        """Return the monotonic clock."""
        return time.monotonic_ns()

    def sleep(self, seconds: float) -> None:
        """Let the host do nothing."""
        time.sleep(seconds)

    def matmuls(self, count: int) -> None:
        """Ask for products of square matrices of random numbers."""
        for _ in range(count):
            torch.mm(self._a, self._b, out=self._out)

    def synchronize(self) -> None:
        """Wait until all is done."""
        torch.cuda.synchronize(self.at)

    def counted_flops(self, count: int) -> int:
        """Return the FLOPs of so many products as torch counts them while they are asked for."""
        with FlopCounterMode(display=False) as counter:
            self.matmuls(count)
        return counter.get_total_flops()

    def seconds_of(self, count: int) -> float:
        """Return what so many products take on the device."""
        return self._timed(lambda: self.matmuls(count))

    def _timed(self, work: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def spin(self, seconds: float) -> Callable[[], bool]:
        """Start one thread that spins for about so long; what is returned tells whether it still
        does.
        """
        if not self._cycles_per_s:
            self._timed(lambda: _spin(10**8))  # until the clock has risen
            self._cycles_per_s = 10**9 / self._timed(lambda: _spin(10**9))
        done = torch.cuda.Event()
        _spin(int(seconds * self._cycles_per_s))
        done.record()
        return lambda: not done.query()

    def threads_of_spin(self) -> int:
        """Return how many threads the spinning kernel has, as the profiler saw it launched."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            _spin(10**6)
            self.synchronize()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_bytes())["traceEvents"]
        return threads(events)

    def copy(self, *, aside: bool) -> None:
        """Copy to the device: out of pageable memory, or out of pinned memory in a stream of its
        own.
        """
        if not aside:
            self._there.copy_(self._pageable)
            return
        with torch.cuda.stream(self._aside):
            self._there.copy_(self._pinned, non_blocking=True)

    def tracer(self, folder: Path) -> StepTracer:
        """Return a tracer of `STEP`."""
        return StepTracer(folder, self.at, (STEP,))


def threads(events: list[dict[str, Any]]) -> int:
    """Return how many threads the widest kernel of a trace has.

    Raises:
        Unmeasured: If the trace shows no kernel.
    """
    kernels = [event["args"] for event in events if event.get("cat") == "kernel"]
    if not kernels:
        raise Unmeasured("the trace shows no kernel")
    return max(math.prod(args["grid"]) * math.prod(args["block"]) for args in kernels)


def _spin(cycles: int) -> None:
    """Launch one block of one thread that reads the clock until so many cycles have passed
    (ATen/cuda/Sleep.cu).
    """
    torch.cuda._sleep(cycles)  # pyright: ignore[reportPrivateUsage]
