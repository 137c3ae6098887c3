"""Another kind of device is a file of its own and a line of the table: proven on a copy.

And what differs between kinds of device is asked of their classes alone.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from edited_copy import ROOT, Copy, result_of

from pipeline.ledger.devices import table
from pipeline.ledger.devices.cpu import Cpu
from pipeline.ledger.devices.table import KINDS, device_of, is_device, is_gpu, open_device

CUDA = re.compile(r"""["']cuda|torch\.(?:\w+\.)*cuda\b""")
"""What only makes sense on one kind of device: its name in quotes, and its part of torch."""
ITS_OWN = "pipeline/ledger/devices/cuda"
STANDALONE = "pipeline/quantization/fresh_process.py"
"""Runs without this package, by design: it has the one setting of torch that it copies."""

TOY = '''"""A processor that passes for an accelerator: it has events, and is waited for."""

import time

import torch

from pipeline.ledger.devices.cpu import Cpu


class Event:
    at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, end_event):
        return 1e3 * (end_event.at - self.at)


class Toy(Cpu):
    kind = "toy"
    is_gpu = events = True

    @classmethod
    def place(cls, named):
        return torch.device("cpu")

    def name(self):
        return "Toy 9000"

    def make_event(self):
        return Event()
'''
IMPORT = "from pipeline.ledger.devices.cuda.device import Cuda\n"
LINE = '    "cuda": Cuda,  # NVIDIA\'s\n'


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Add a device to a copy of the package, run a recipe on it, and return its result."""
    copy = Copy.make(tmp_path_factory.mktemp("device"))
    copy.add_file("pipeline/ledger/devices/toy.py", TOY)
    table = "pipeline/ledger/devices/table.py"
    copy.add_lines(table, IMPORT, "from pipeline.ledger.devices.toy import Toy\n")
    copy.add_lines(table, LINE, '    "toy": Toy,\n')
    return result_of(copy.run("recipe=baseline", "hardware.device=toy"))


@pytest.mark.slow
def test_a_run_is_on_the_device_that_was_added(result: dict[str, Any]) -> None:
    assert result["device"] == {"kind": "toy", "name": "Toy 9000", "count": 1}
    (row,) = result["rows"]
    assert (row["status"], row["artifact"]["kind"]) == ("FINISHED", "model")
    assert row["ledger"]["gpu_hours"]["attached"]["value"] > 0
    assert row["ledger"]["placement"]["device_names"] == ["Toy 9000"]


def test_torch_is_asked_of_accelerators_by_their_classes_alone() -> None:
    """Not every kind answers what torch asks of all kinds: Apple's counts no memory, say."""
    asks = re.compile(r"torch\.(?:accelerator|xpu|mps)\b")
    asking = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pipeline").rglob("*.py")
        if asks.search(path.read_text())
    }
    assert {each for each in asking if not each.startswith("pipeline/ledger/devices/")} == set()
    assert "pipeline/ledger/devices/other.py" in asking


def test_cuda_is_named_by_its_own_class_alone() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "pipeline").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if CUDA.search(line)
    }
    assert any(each.startswith(ITS_OWN) for each in found)  # what finds nothing would pass
    allowed = (ITS_OWN, STANDALONE, "pipeline/ledger/devices/table.py")
    assert {each for each in found if not each.startswith(allowed)} == set()


@pytest.mark.parametrize(
    ("named", "is_one"),
    [
        *[("auto", True), ("cpu", True), ("cuda", True), ("cuda:1", True), ("xpu:0", True)],
        *[("mps", True), ("cpu:0", False), ("mps:0", False), ("cuda:", False), ("cuda:x", False)],
        *[("", False), ("gpu", False), ("auto:0", False), ("cuda:0:1", False)],
    ],
)
def test_the_names_of_devices(named: str, is_one: bool) -> None:
    assert is_device(named) == is_one


def test_a_kind_answers_for_the_device_that_it_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand(Cpu):
        kind = "stand"

        @classmethod
        def place(cls, named: str) -> torch.device:
            return torch.device("cpu")

    monkeypatch.setitem(KINDS, "stand", Stand)
    monkeypatch.setattr(table, "_opened", {})
    assert device_of(torch.device("cpu")).kind == "cpu"
    opened = open_device("stand")
    assert opened is not None
    assert (opened.kind, device_of(opened.at).kind) == ("stand", "stand")
    open_device("cpu")  # the next run of this process
    assert device_of(opened.at).kind == "cpu"


def test_a_device_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KINDS["cuda"], "count", classmethod(lambda _: 2))
    monkeypatch.setattr(table, "_opened", {})
    assert open_device("cuda:2") is None
    opened = open_device("cuda:1")
    assert opened is not None
    assert opened.at == torch.device("cuda:1")
    monkeypatch.setattr(KINDS["cuda"], "count", classmethod(lambda _: 0))
    assert open_device("cuda") is None


def test_hours_are_of_gpus_by_kind() -> None:
    assert [is_gpu(kind) for kind in ("cuda", "cpu", "mps", "unheard-of")] == [
        *(True, False, False, False)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_does_not_have_it_says(kind: str) -> None:
    """A flag that is off, and the method that it stands for, agree."""
    device = KINDS[kind](KINDS[kind].place(kind))
    flags = {
        "events": device.make_event,
        "counts_memory": device.allocator,
        "captures": lambda: device.capture(lambda: None, lambda: None),
    }
    for flag, method in flags.items():
        if not getattr(device, flag):
            with pytest.raises(NotImplementedError, match=kind):
                method()
