"""What the pipeline asks of a device. All that differs between kinds of device is asked here.

A kind is a class of its own in this folder and a line in `table.py`. What it does not override is
what any device of torch does: it is waited for through `torch.accelerator`, it has no events, no
counters and no statistics of memory, and figures that need them are null with a reason.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pipeline.config.settings.precision import Precision
from pipeline.ledger.devices.reader import Absent, Reader

if TYPE_CHECKING:
    import torch


class Event(Protocol):
    """A mark in a device's stream of work, as `torch.Event` is one."""

    def record(self) -> None:
        """Put it into the stream."""

    def query(self) -> bool:
        """Tell without waiting whether the device has passed it."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has passed it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return milliseconds of device time between two events that the device has passed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocator:
    """Statistics of torch's allocator on a device, in bytes; peaks and counts since the last reset.

    Attributes:
        allocated: In tensors of this process, now.
        reserved: Held by torch, now.
        retries: How often it gave back what it held for nothing, and asked again.
        ooms: How often that did not suffice. Either is None where torch does not count it.
    """

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int
    retries: int | None
    ooms: int | None


NAMES = {Precision.fp16: "fp16 with loss scaling"}
"""What a precision is called where its name alone would not tell what is missing."""
EVERYWHERE = (Precision.native, Precision.auto, Precision.fp32, Precision.bf16, Precision.bf16_pure)
"""What any device of torch trains in, slowly or not."""


WARM_UPS = 2  # runs of a step before its capture


class Waits(RuntimeError):
    """A step waits for the device, and so cannot be captured."""


class Device(ABC):
    """One device that this process computes on.

    Args:
        at: Where torch puts its tensors.
    """

    kind: str
    """As settings (`hardware.device`) and results name it."""
    is_gpu: ClassVar[bool] = False  # its device-hours are GPU-hours
    numbered: ClassVar[bool] = False  # a process can see several: kind:1
    events: ClassVar[bool] = False  # `make_event` works
    counts_memory: ClassVar[bool] = False  # `allocator` and what else is said of memory
    torchao: ClassVar[bool] = False  # torchao's formats are known to work on it
    pinned: ClassVar[bool] = False  # copies from page-locked memory do not wait
    fused_optimizer: ClassVar[bool] = False  # torch's AdamW has one kernel for all parameters
    triton: ClassVar[bool] = False  # Triton, and with it torch.compile, makes kernels for it
    wide_products: ClassVar[bool] = False  # torch multiplies 16 bits into an fp32 result
    captures: ClassVar[bool] = False  # `capture` works
    # options of torch.compile that have compiled code captured; where `captures`
    compiled_and_captured: ClassVar[dict[str, Any]] = {}
    streams: ClassVar[bool] = False  # what is started `beside` other work runs at the same time
    for_vllm: ClassVar[bool] = False  # vLLM's usual builds, and all its quantized formats, run here
    # products with a dimension that is no multiple of it are slow
    product_width: ClassVar[int] = 1
    chunk_bytes: ClassVar[int | None] = None  # of a temporary tensor; None: what suits a CPU
    # what torch.distributed connects such devices, and their hosts, by
    collectives: ClassVar[str] = "gloo"
    toolkit: ClassVar[str | None] = None  # what results call the library that torch was built with

    def __init__(self, at: torch.device) -> None:
        self.at = at

    # -- which one --------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def count(cls) -> int:
        """Return how many devices of this kind the process sees."""

    @classmethod
    def place(cls, named: str) -> torch.device:
        """Return where torch puts the tensors of a device, as `hardware.device` names it."""
        import torch

        return torch.device(named)

    @classmethod
    def opened(cls) -> tuple[str, str] | None:
        """Return identity and name of the device that another program's torch has opened, if any.

        Asked inside that program, which has imported torch or not: it is not imported here.
        """
        return None

    @classmethod
    def toolkit_version(cls) -> str | None:
        """Return the release of `toolkit` that torch was built with."""
        return None

    @abstractmethod
    def name(self) -> str:
        """Return its exact model name."""

    def make_current(self) -> None:  # noqa: B027 - most kinds have one device
        """Have libraries that ask for no device use this one."""

    # -- time -------------------------------------------------------------------------------------

    def synchronise(self) -> None:
        """Wait until it has done all that was asked of it."""
        import torch

        torch.accelerator.synchronize(self.at)

    def answers(self) -> bool:
        """Tell whether it still works. After some errors it fails at all that it is asked."""
        try:
            self.synchronise()
        except RuntimeError:
            return False
        return True

    def make_event(self) -> Event:
        """Return a new event that is timed; where `events`."""
        raise NotImplementedError(f"{self.kind} has no events")

    def profiler_activity(self) -> Any | None:
        """Return what torch's profiler records of it; None where it records nothing."""
        return None

    def counted_as(self) -> str | None:
        """Return the name by which a reader of several devices knows it; None where there is no
        such reader.
        """
        return None

    def reader(
        self, *, others: Sequence[str] = (), now_ns: Callable[[], int] = time.monotonic_ns
    ) -> Reader:
        """Return a reader of its counters.

        Args:
            others: Further devices of this host to read with it, as `counted_as` names them.
        """
        return Absent(f"no counters of {self.kind} devices are read yet")

    # -- copies -----------------------------------------------------------------------------------

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the host on the device, without waiting where that can be."""
        return tensor.to(self.at)

    def fetch(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Event | None]:
        """Return a small tensor for the host, and the event after which its values are there.

        Without an event it is the tensor itself: reading it waits.
        """
        return tensor, None

    # -- two things at once -----------------------------------------------------------------------

    @contextmanager
    def beside(self) -> Generator[None]:
        """Have what is started inside run beside what is started after it, until `join`; it begins
        when all that was started before is done.
        """
        yield

    def join(self) -> None:  # noqa: B027 - nothing runs beside
        """Have what is started from here on wait for all that was started `beside`. The host does
        not wait.
        """

    # -- random numbers ---------------------------------------------------------------------------

    def generators(self) -> list[torch.device]:
        """Return the devices that have a random generator beside the host's own."""
        return []

    @contextmanager
    def kept_generators(self) -> Generator[None]:
        """Have random numbers drawn inside be drawn again afterwards: the host's, and its own."""
        import torch

        state, own = torch.get_rng_state(), self.generator_state()
        try:
            yield
        finally:
            torch.set_rng_state(state)
            if own is not None:
                self.set_generator_state(own)

    def generator_state(self) -> torch.Tensor | None:
        """Return the state of its own generator; None where it has none."""
        return None

    def set_generator_state(self, state: torch.Tensor) -> None:
        """Set the state that `generator_state` gave."""
        raise NotImplementedError(f"{self.kind} has no generator of its own")

    # -- memory; where `counts_memory` ------------------------------------------------------------

    def why_no_memory(self) -> str:
        """Return why a row has no figures of its memory; where not `counts_memory`."""
        return f"a {self.kind} run: torch keeps no peaks of memory on it"

    def release_memory(self) -> None:  # noqa: B027 - nothing is held
        """Give the driver back what torch holds for nothing."""

    def reset_memory(self) -> None:  # noqa: B027 - nothing is counted
        """Count peaks, retries and failures anew."""

    def allocator(self) -> Allocator:
        """Return what torch's allocator counted."""
        raise NotImplementedError(f"torch counts no memory on {self.kind}")

    def total_bytes(self) -> int:
        """Return how much memory it has."""
        raise NotImplementedError(f"torch counts no memory on {self.kind}")

    def free_bytes(self) -> tuple[int, int]:
        """Return what its driver can still give, and how much memory it has.

        Raises:
            RuntimeError: After some errors no driver answers any more.
        """
        raise NotImplementedError(f"torch counts no memory on {self.kind}")

    def memory_map(self) -> dict[str, Any]:
        """Return the allocator's segments and blocks, as torch's viewer takes them."""
        raise NotImplementedError(f"torch counts no memory on {self.kind}")

    # -- arithmetic -------------------------------------------------------------------------------

    def why_not_precision(self, precision: Precision) -> str | None:
        """Return why a model cannot train in a precision on it, or None where it can."""
        if precision in EVERYWHERE:
            return None
        return f"{NAMES.get(precision, precision.value)} needs a CUDA device, this is {self.kind}"

    def capability(self) -> tuple[int, int] | None:
        """Return the compute capability that kernels ask for; None where there is no such thing."""
        return None

    def has_units(self, dtype: torch.dtype) -> bool | None:
        """Return whether it multiplies this dtype faster than fp32; None: only trying tells."""
        return None

    def takes_lengths(self, dtype: torch.dtype, width: int) -> bool:
        """Return whether attention in this dtype, of heads of this width, can be told where
        documents begin; else it needs a mask.
        """
        return False

    def rounds_fp32(self) -> bool:
        """Return whether fp32 matrices are multiplied with less than fp32's precision now."""
        return False

    @contextmanager
    def matmuls(self, *, tf32: bool) -> Generator[None]:
        """Multiply fp32 matrices in tf32 or in IEEE fp32 inside."""
        yield

    def before_deterministic(self) -> None:  # noqa: B027 - most kinds need nothing
        """Set before the first product of a process what `deterministic` needs."""

    @contextmanager
    def deterministic(self) -> Generator[None]:
        """Compute inside with kernels alone that give the same bits each time.

        What has no such kernel raises RuntimeError, with the operator's name.
        """
        import torch

        before = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        memory: Any = torch.utils.deterministic
        filled = memory.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        # every new tensor would be filled with NaN, to show who reads it too early
        memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)
            memory.fill_uninitialized_memory = filled

    def why_no_compile(self) -> str | None:
        """Return why torch.compile makes no code for it here; None where nothing speaks against
        it.
        """
        return None

    def capture(self, step: Callable[[], None], prepare: Callable[[], None]) -> Callable[[], None]:
        """Return what replays `step`, each run of which `prepare` comes before.

        It is captured only where a run of it in which nothing may wait passes: a capture that fails
        leaves torch's allocator and streams in a state that no later work of the process survives.

        Raises:
            Waits: If the step waits for the device.
            NotImplementedError: Where not `captures`.
        """
        if not self.captures:
            raise NotImplementedError(f"{self.kind} captures no graphs")
        self._first_runs(step, prepare)
        prepare()
        with self.no_waits():
            step()
        prepare()
        return self._captured(step)

    def captures_refused(self) -> int:
        """Return how often torch compiled something to be captured, and then did not capture it."""
        return 0

    @contextmanager
    def no_waits(self) -> Generator[None]:
        """Have what waits for the device raise `Waits` inside, as far as torch sees it."""
        yield

    def _first_runs(self, step: Callable[[], None], prepare: Callable[[], None]) -> None:
        """Run a step as it is: first calls choose kernels and ask for workspaces."""
        for _ in range(WARM_UPS):
            prepare()
            step()

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture a step that waits for nothing."""
        raise NotImplementedError(f"{self.kind} captures no graphs")

    # -- other processes --------------------------------------------------------------------------

    def alone_in_environment(self) -> dict[str, str]:
        """Return what shows a child process this device alone."""
        return {}
