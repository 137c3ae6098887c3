"""A GPU made up for the tests of known load: virtual time, a board that draws power, traces as a
profiler exports them.

Its faults break one reading each. What it is asked for is `gpu_known_load.Device`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fake_nvml import FakeNvml, Gpu

from pipeline.ledger.devices.cuda.nvml import Reading, open_reader
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.traced_steps import StepTracer

IDLE_W, FULL_W, SPIN_W = 110.0, 660.0, 130.0
CALL_S = 5e-6  # from a call on the host to its start on the device
COPY_S = 0.010


class _Board(FakeNvml):
    """Tells power as the mean of the last second, as boards do."""

    def __init__(self) -> None:
        super().__init__(Gpu(power_w=IDLE_W, busy=0))
        self.integral_scale = 1.0
        self._past: list[tuple[int, float]] = []  # moments, and the energy at each
        self._joules = 0.0

    def pass_time(self, seconds: float) -> None:
        self._past.append((self.now_ns, self._joules))
        super().pass_time(seconds)
        self._joules += self.gpus[0].power_w * seconds
        self._past = [each for each in self._past if each[0] > self.now_ns - 3 * 10**9]

    def nvmlDeviceGetFieldValues(self, handle: Gpu, fieldIds: list[tuple[int, int]]) -> Any:
        """Tells the power of now, as a driver with this field does; `integral_scale` breaks it."""
        watts = handle.power_w * self.integral_scale
        return [
            SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=int(watts * 1000)))
            for _ in fieldIds
        ]

    def nvmlDeviceGetPowerUsage(self, handle: Gpu) -> int:
        moments = [each for each in self._past if each[0] <= self.now_ns - 10**9] or self._past[:1]
        if not moments:
            return int(handle.power_w * 1000)
        then_ns, joules = moments[-1]
        return int(
            (self._joules - joules) / ((self.now_ns - then_ns) / 1e9) * 1000 * self.integral_scale
        )


class _Profiler:
    """Exports what the device did since `start`."""

    def __init__(self, gpu: Simulated) -> None:
        self._gpu = gpu

    def start(self) -> None:
        self._gpu.events = []

    def stop(self) -> None:
        pass

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text(json.dumps({"traceEvents": self._gpu.events}))


class _Tracer(StepTracer):
    """Marks steps on the simulated clock."""

    gpu: Simulated

    def annotate(self, number: int) -> AbstractContextManager[Any]:
        return self.gpu.annotated(f"step {number}")


class Simulated:
    """A GPU whose every figure is known.

    Args:
        integral_scale: Of power readings; 1 agrees with the counter.
        fade: Watts that a second of full load adds to its power: twice the work is then more than
            twice the energy.
        spin_busy, spin_sm: Percent that the board states while one thread spins.
        threads: Of the spinning kernel.
        spin_share: Of the time asked for that it spins.
        copy_late_s: Of a copy that no activity in the trace accounts for.
        hides: Whether a copy in another stream runs beside computing.
    """

    name, at, size = "NVIDIA H200", torch.device("cpu"), 8192

    def __init__(
        self,
        *,
        integral_scale: float = 1.0,
        fade: float = 0.0,
        spin_busy: int = 100,
        spin_sm: float = 0.76,
        threads: int = 1,
        spin_share: float = 1.0,
        copy_late_s: float = 0.0,
        hides: bool = True,
    ) -> None:
        self._fade, self._busy, self._sm, self._threads = fade, spin_busy, spin_sm, threads
        self._spin_share, self._late_s, self._hides = spin_share, copy_late_s, hides
        self.nvml = _Board()
        self.nvml.integral_scale = integral_scale
        self._reader = open_reader(["GPU-1"], nvml=self.nvml, now_ns=self.nvml.clock)
        self.readings: list[Reading] = []
        self.sampler = Sampler(self._reader, now_ns=self.nvml.clock)
        self.events: list[dict[str, Any]] = []
        self._mm_s = 2 * self.size**3 / 700e12
        self._free_ns = self.nvml.now_ns  # when the device will be done
        self._work_w, self._loaded_s, self._calls = FULL_W, 0.0, 0

    def open(self) -> None:
        self._tick()

    def close(self) -> None:
        self._tick()

    def _tick(self) -> None:
        self.sampler.tick()
        self.readings += self._reader.read()[:1]

    def now_ns(self) -> int:
        return self.nvml.now_ns

    def _pass(self, until_ns: int) -> None:
        """Let time pass in pieces of a tenth of a second, read once a second."""
        gpu = self.nvml.gpus[0]
        while self.nvml.now_ns < until_ns:
            works = self.nvml.now_ns < self._free_ns
            edge_ns = min(until_ns, self._free_ns) if works else until_ns
            second = self.nvml.now_ns // 10**9
            end_ns = min(edge_ns, self.nvml.now_ns + 10**8, (second + 1) * 10**9)
            spins = self._work_w == SPIN_W
            gpu.power_w = (
                IDLE_W
                if not works
                else self._work_w + (0 if spins else self._fade * self._loaded_s)
            )
            gpu.busy = 0 if not works else self._busy if spins else 100
            gpu.metrics["NVML_GPM_METRIC_SM_UTIL"] = (
                0.0 if not works else self._sm if spins else 99.0
            )
            self._loaded_s = self._loaded_s + (end_ns - self.nvml.now_ns) / 1e9 if works else 0.0
            self.nvml.pass_time((end_ns - self.nvml.now_ns) / 1e9)
            if self.nvml.now_ns // 10**9 > second:
                self._tick()

    def sleep(self, seconds: float) -> None:
        self._pass(self.nvml.now_ns + round(seconds * 1e9))

    def synchronize(self) -> None:
        self._pass(self._free_ns)

    def _launch(self, cat: str, name: str, seconds: float, *, aside: bool = False) -> None:
        self._calls += 1
        start_ns = max(self.nvml.now_ns + round(CALL_S * 1e9), 0 if aside else self._free_ns)
        end_ns = start_ns + round(seconds * 1e9)
        self._free_ns = max(self._free_ns, end_ns)
        self._event(
            "cuda_runtime",
            "cudaLaunchKernel",
            self.nvml.now_ns,
            self.nvml.now_ns + 1000,
            self._calls,
            100,
        )
        self._event(cat, name, start_ns, end_ns, self._calls, 0)

    def _event(
        self, cat: str, name: str, start_ns: int, end_ns: int, correlation: int, pid: int
    ) -> None:
        args = {"correlation": correlation, **({"device": 0, "stream": 7} if pid == 0 else {})}
        self.events.append(
            {
                "ph": "X",
                "cat": cat,
                "name": name,
                "ts": start_ns / 1e3,
                "dur": (end_ns - start_ns) / 1e3,
                "pid": pid,
                "tid": 1,
                "args": args,
            }
        )

    def matmuls(self, count: int) -> None:
        self._work_w = FULL_W
        self._launch("kernel", "gemm", count * self._mm_s)

    def counted_flops(self, count: int) -> int:
        return 2 * self.size**3 * count

    def seconds_of(self, count: int) -> float:
        self.matmuls(count)
        self.synchronize()
        return count * self._mm_s

    def spin(self, seconds: float) -> Callable[[], bool]:
        self._work_w = SPIN_W
        self._launch("kernel", "spin", seconds * self._spin_share)
        return lambda: self.nvml.now_ns < self._free_ns

    def threads_of_spin(self) -> int:
        return self._threads

    def copy(self, *, aside: bool) -> None:
        self._launch("gpu_memcpy", "Memcpy HtoD", COPY_S, aside=aside and self._hides)
        if not aside:
            self.synchronize()
            self._pass(self.nvml.now_ns + round(self._late_s * 1e9))

    @contextmanager
    def annotated(self, name: str) -> Generator[None]:
        start_ns = self.nvml.now_ns
        yield
        self._event("user_annotation", name, start_ns, self.nvml.now_ns, 0, 100)

    def tracer(self, folder: Path) -> StepTracer:
        tracer = _Tracer(
            folder, torch.device("cuda"), (2,), make_profiler=lambda device: _Profiler(self)
        )
        tracer.gpu = self
        return tracer
