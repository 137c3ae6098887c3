"""A GPU that torch drives as `cuda`."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.config.settings.precision import Precision
from pipeline.errors import one_line
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.cuda.handles import full_uuid
from pipeline.ledger.devices.cuda.nvml import open_reader
from pipeline.ledger.devices.device import Allocator, Device, Event, Waits
from pipeline.ledger.devices.reader import Absent, Reader

if TYPE_CHECKING:
    import torch

CAPABILITY = {
    Precision.tf32: (8, 0),
    Precision.bf16: (8, 0),
    Precision.bf16_pure: (8, 0),
    Precision.fp8_tensorwise: (8, 9),
    Precision.fp8_rowwise: (9, 0),
}
"""Least compute capability that trains in a precision.
Source: CUDA C++ Programming Guide, compute capabilities; torch._scaled_mm (per row: Hopper)."""
WARM_UPS = 2  # runs before a capture: first calls choose kernels and ask for workspaces

CUBLAS_BUFFERS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # 8 of 4 MiB

# Source: torch.nn.attention, its checks before flash attention.
FLASH_CAPABILITY = (8, 0)
WIDEST_FLASH = 256  # of a head
WIDTHS = 8  # of a head, in multiples: elements of a load of 16 bytes


class Cuda(Device):
    """A CUDA device. Every question is asked of this one, whichever is the thread's current one."""

    kind = "cuda"
    is_gpu = True
    numbered = True
    events = True
    counts_memory = True
    pinned = True
    fused_optimizer = True
    triton = True
    wide_products = True
    product_width = 64  # columns, of tensor cores and of loads of 16 bytes
    captures = True
    compiled_and_captured: ClassVar[dict[str, Any]] = {"triton.cudagraphs": True}
    streams = True
    for_vllm = True
    torchao = True
    chunk_bytes = 256 * 2**20
    collectives = "cpu:gloo,cuda:nccl"
    toolkit = "cuda"
    _second: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}  # streams of `beside`
    _failed: ClassVar[str] = ""  # why a capture failed that torch's checks had let pass

    @classmethod
    def count(cls) -> int:
        import torch

        # AMD's answer to the same name
        here = torch.version.hip is None and torch.cuda.is_available()
        return torch.cuda.device_count() if here else 0

    @classmethod
    def opened(cls) -> tuple[str, str] | None:
        """Return UUID and name of the main thread's device once the program has opened one."""
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        try:
            if cuda is None or not cuda.is_initialized():
                return None
            known = cuda.get_device_properties(cuda.current_device())
            return full_uuid(str(known.uuid)), str(known.name)
        except (AttributeError, RuntimeError):  # half imported; a device that fell off the bus
            return None

    @classmethod
    def toolkit_version(cls) -> str | None:
        import torch

        return torch.version.cuda

    def name(self) -> str:
        import torch

        return torch.cuda.get_device_name(self.at)

    def make_current(self) -> None:
        """Have libraries use this one: of a device with a number they would open number 0, too."""
        import torch

        # torch.device("cuda") has no index, whatever its stubs say
        if self.at.index is not None:  # pyright: ignore[reportUnnecessaryComparison]
            torch.cuda.set_device(self.at)

    # -- time -------------------------------------------------------------------------------------

    def synchronise(self) -> None:
        import torch

        torch.cuda.synchronize(self.at)

    def make_event(self) -> Event:
        return _Event(self.at, timed=True)

    def profiler_activity(self) -> Any | None:
        from torch.profiler import ProfilerActivity

        return ProfilerActivity.CUDA

    def counted_as(self) -> str | None:
        """Return its UUID, as NVML has it."""
        return attempted(self._uuid, lambda _: None)

    def reader(
        self, *, others: Sequence[str] = (), now_ns: Callable[[], int] = time.monotonic_ns
    ) -> Reader:
        """Return a reader of what NVML tells of it."""
        return attempted(
            lambda: open_reader(list(dict.fromkeys([self._uuid(), *others])), now_ns=now_ns),
            lambda why: Absent(unmeasured("the GPU's state", why)),
        )

    def _uuid(self) -> str:
        import torch

        return full_uuid(str(torch.cuda.get_device_properties(self.at).uuid))

    # -- copies -----------------------------------------------------------------------------------

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        # out of pageable memory, a copy waits
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self.at, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Event | None]:
        import torch

        there = torch.empty_like(tensor, device="cpu", pin_memory=True)
        there.copy_(tensor, non_blocking=True)
        event = _Event(self.at)
        event.record()
        return there, event

    # -- two things at once -----------------------------------------------------------------------

    @contextmanager
    def beside(self) -> Generator[None]:
        """Start on a second stream.

        Its memory needs no `record_stream`: what is freed there is taken again there alone, after
        the wait that each start begins with, and what it reads is freed after `join`.
        """
        import torch

        with torch.cuda.device(self.at):
            second = self._second_stream()
            second.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(second):
                yield

    def join(self) -> None:
        import torch

        torch.cuda.current_stream(self.at).wait_stream(self._second_stream())

    def _second_stream(self) -> torch.cuda.Stream:
        import torch

        if self.at not in Cuda._second:
            Cuda._second[self.at] = torch.cuda.Stream(self.at)
        return Cuda._second[self.at]

    # -- random numbers ---------------------------------------------------------------------------

    def generators(self) -> list[torch.device]:
        return [self.at]

    def generator_state(self) -> torch.Tensor | None:
        import torch

        return torch.cuda.get_rng_state(self.at)

    def set_generator_state(self, state: torch.Tensor) -> None:
        import torch

        torch.cuda.set_rng_state(state, self.at)

    # -- memory -----------------------------------------------------------------------------------

    def reset_memory(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self.at)
        # retries and failures are counted from here too
        torch.cuda.reset_accumulated_memory_stats(self.at)

    def release_memory(self) -> None:
        import torch

        torch.cuda.empty_cache()

    def allocator(self) -> Allocator:
        import torch

        stats = torch.cuda.memory_stats(self.at)
        return Allocator(
            allocated=stats["allocated_bytes.all.current"],
            reserved=stats["reserved_bytes.all.current"],
            peak_allocated=stats["allocated_bytes.all.peak"],
            peak_reserved=stats["reserved_bytes.all.peak"],
            retries=stats["num_alloc_retries"],
            ooms=stats["num_ooms"],
        )

    def total_bytes(self) -> int:
        import torch

        return torch.cuda.get_device_properties(self.at).total_memory

    def free_bytes(self) -> tuple[int, int]:
        import torch

        return torch.cuda.mem_get_info(self.at)

    def memory_map(self) -> dict[str, Any]:
        import torch

        found: Any = torch.cuda.memory._snapshot()  # pyright: ignore[reportPrivateUsage]
        return found

    # -- arithmetic -------------------------------------------------------------------------------

    def capability(self) -> tuple[int, int] | None:
        import torch

        return torch.cuda.get_device_capability(self.at)

    def why_not_precision(self, precision: Precision) -> str | None:
        have, needed = self.capability(), CAPABILITY.get(precision)
        if needed is None or (have is not None and have >= needed):
            return None
        has = "none" if have is None else f"{have[0]}.{have[1]}"
        return (
            f"{precision.value} needs compute capability {needed[0]}.{needed[1]}, this device has"
            f" {has}"
        )

    def has_units(self, dtype: torch.dtype) -> bool | None:
        import torch

        return dtype is torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)

    def takes_lengths(self, dtype: torch.dtype, width: int) -> bool:
        """Flash attention does, which computes in 16 bits."""
        import torch

        if not attempted(_has_varlen, lambda _: False):
            return False
        fits = dtype in (torch.float16, torch.bfloat16) and width <= WIDEST_FLASH
        fits = fits and width % WIDTHS == 0
        return fits and torch.cuda.get_device_capability(self.at) >= FLASH_CAPABILITY

    def rounds_fp32(self) -> bool:
        import torch

        return torch.backends.cuda.matmul.fp32_precision not in ("ieee", "none")

    @contextmanager
    def matmuls(self, *, tf32: bool) -> Generator[None]:
        import torch

        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before

    def before_deterministic(self) -> None:
        """Give cuBLAS buffers of a fixed size: with others its sums have another order each time.

        Source: cuBLAS, results reproducibility; torch.use_deterministic_algorithms.
        """
        os.environ.setdefault(*CUBLAS_BUFFERS)

    def why_no_compile(self) -> str | None:
        found = importlib.util.find_spec("triton") is not None
        return None if found else "torch.compile needs Triton, which is not installed"

    def capture(self, step: Callable[[], None], prepare: Callable[[], None]) -> Callable[[], None]:
        import torch

        if not self.captures:
            return super().capture(step, prepare)
        if Cuda._failed:
            raise RuntimeError(f"an earlier capture failed in this process ({Cuda._failed})")
        # streams and captures are of the current device
        with torch.cuda.device(self.at):
            return super().capture(step, prepare)

    def captures_refused(self) -> int:
        from torch._dynamo.utils import counters

        return counters["inductor"]["cudagraph_skips"]

    @contextmanager
    def no_waits(self) -> Generator[None]:
        import torch

        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            said = one_line(error, 120)
            if "synchroniz" not in said:
                raise
            raise Waits(f"a step waits for the device ({said})") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _first_runs(self, step: Callable[[], None], prepare: Callable[[], None]) -> None:
        import torch

        # beside the usual stream, as the capture will run
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            super()._first_runs(step, prepare)
        torch.cuda.current_stream().wait_stream(beside)

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        import torch

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                step()
        except Exception as error:
            # Source: torch 2.11, torch/cuda/graphs.py: where ending a capture raises, the stream
            # it was on stays current.
            torch.cuda.set_stream(stream)
            Cuda._failed = one_line(error, 120)
            raise
        return graph.replay

    # -- other processes --------------------------------------------------------------------------

    def alone_in_environment(self) -> dict[str, str]:
        seen = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        index = self.at.index or 0
        return {"CUDA_VISIBLE_DEVICES": seen[index] if index < len(seen) else str(index)}


class _Event:
    """An event in the stream of one device, whichever device is the thread's current one.

    Source: cudaEventElapsedTime resolves about 0.5 us; torch.cuda.Event.
    """

    __slots__ = ("_at", "_event")

    def __init__(self, at: torch.device, *, timed: bool = False) -> None:
        import torch

        self._at, self._event = at, torch.cuda.Event(enable_timing=timed)

    def record(self) -> None:
        import torch

        self._event.record(torch.cuda.current_stream(self._at))

    def query(self) -> bool:
        return self._event.query()

    def synchronize(self) -> None:
        self._event.synchronize()

    def elapsed_time(self, end_event: _Event) -> float:
        return self._event.elapsed_time(end_event._event)


def _has_varlen() -> bool:
    """Return whether torch has attention that takes lengths: from 2.10 on."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None
