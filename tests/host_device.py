"""A device of torch that is neither CPU nor GPU: torch's own slot for foreign ones, in Python.

Its tensors are boxes around tensors of the host, so it computes as the CPU does, and its lack of
autocast leaves it fp32. Registering it is for the life of a process: tests do so in processes of
their own, where `run` below stands for the command.
Source: torch.utils.backend_registration and torch's test_privateuseone_python_backend.py.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as trees
from torch.utils import backend_registration

from pipeline.cli.main import main
from pipeline.ledger.devices.device import Device
from pipeline.ledger.devices.table import KINDS
from pipeline.training import loop

NAME = "hostone"
_libraries: list[Any] = []  # what is registered lives as long as they


class Boxed(torch.Tensor):
    """A tensor of the device, with the one of the host that it stands for."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Boxed:
        box: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        box.raw = raw
        return box

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def storage(self) -> Any:
        return self.raw.storage()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))


def _unboxed(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.raw if isinstance(value, Boxed) else value


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute on the host; what comes of it is on the device, unless it was sent to the host or
    came from there.
    """
    fail_if_lost()
    given = [each for each in trees.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    boxes = {id(each.raw): each for each in given if isinstance(each, Boxed)}
    hosts = {id(each) for each in given if not isinstance(each, Boxed)}
    to = kwargs.get("device")
    to_host = to is not None and torch.device(to).type == "cpu"
    plain, named = trees.tree_map(_unboxed, (args, kwargs))

    def boxed(made: Any) -> Any:
        if not isinstance(made, torch.Tensor) or id(made) in hosts or to_host:
            return made
        return boxes[id(made)] if id(made) in boxes else Boxed(made)

    return trees.tree_map(boxed, op(*plain, **named))


def _copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _unboxed(target).copy_(_unboxed(source))
    return target


class Event:
    """An event of a device that has done everything at once."""

    at_s = 0.0

    def record(self) -> None:
        self.at_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: Any) -> float:
        return 1e3 * (end_event.at_s - self.at_s)


class HostOne(Device):
    """The device, as the pipeline asks of it; once `lost`, it fails at all that it is asked."""

    kind = NAME
    lost: ClassVar[bool] = False
    is_gpu = events = True
    own: ClassVar[torch.Generator] = torch.Generator()
    waits: ClassVar[int] = 0

    @classmethod
    def count(cls) -> int:
        return 1

    def name(self) -> str:
        fail_if_lost()
        return "Host One"

    def synchronise(self) -> None:
        fail_if_lost()
        type(self).waits += 1

    def make_event(self) -> Event:
        return Event()

    def generators(self) -> list[torch.device]:
        return [self.at]

    def generator_state(self) -> torch.Tensor:
        return self.own.get_state()

    def set_generator_state(self, state: torch.Tensor) -> None:
        self.own.set_state(state)


def fail_if_lost() -> None:
    if HostOne.lost:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nand a page of advice")


class _Module(backend_registration._DummyBackendModule):
    """torch.hostone"""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return HostOne.own.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        HostOne.own.set_state(state)


def register() -> None:
    """Make this process one that has the device."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    own.impl("_copy_from", _copied, "PrivateUse1")
    _libraries.extend((every, own))
    # Else `Module.to` gives tied weights a box each, where devices of C++ keep them tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    KINDS[NAME] = HostOne


def lose_in_step(number: int) -> None:
    """Lose the device in the middle of a training step, counted over all of the process."""
    step, seen = loop._Loop._backward, [0]

    def losing(self: Any, *args: Any, **more: Any) -> None:
        seen[0] += 1
        HostOne.lost = seen[0] >= number
        step(self, *args, **more)

    loop._Loop._backward = losing  # type: ignore[method-assign]


def run() -> int:
    """Run a command line in this process: what `main` ends with."""
    register()
    if (number := os.environ.get("LOSE_IN_STEP")) is not None:
        lose_in_step(int(number))
    return main(sys.argv[1:], started_ns=time.monotonic_ns())
