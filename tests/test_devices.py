"""The device that a run was given is the one that is read, whichever is the thread's current one;
and its name.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.settings.quantization import Fallback
from pipeline.config.settings.run import Comparison, Run
from pipeline.evaluation.serving.decoding import Fixed
from pipeline.ledger import gpu_phases
from pipeline.ledger.peaks import device_name
from pipeline.ledger.phases import PhaseClock
from pipeline.runs.assessor import Assessor
from pipeline.runs.opening import without_baseline
from pipeline.runs.runner import StageRunner
from pipeline.stages.table import STAGES
from pipeline.training import checkpoint, loop

SECOND = torch.device("cuda:1")


class Stream:
    def __init__(self, device: Any) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        assert other.device == self.device


class Event:
    """Records in the current device's stream, as torch's does, unless it is told another."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.stream: Any = None

    def record(self, stream: Any = None) -> None:
        self.stream = stream or Stream(torch.device("cuda:0"))

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        assert self.stream.device == end.stream.device
        return 5.0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two devices, of which the first is current unless `torch.cuda.device` says another."""
    now = SimpleNamespace(current=torch.device("cuda:0"), asked=[])

    @contextmanager
    def device(chosen: Any) -> Any:
        before, now.current = now.current, chosen
        yield
        now.current = before

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: Stream(device or now.current)
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(device or now.current))
    return now


def test_phases_are_timed_in_the_runs_own_stream(cuda: SimpleNamespace) -> None:
    clock = PhaseClock()
    with gpu_phases.device_phases(clock, SECOND) as phases:
        assert phases is not None
        with clock.phase("forward"):
            pass
        with clock.phase("backward"):
            pass
        devices = {event._event.stream.device for event, _ in phases._pending}
        assert devices == {SECOND}
        phases.finish(lambda: None)
        assert phases.phases_s()["forward"] == pytest.approx(0.005)


def test_a_loss_on_its_way_is_waited_for_in_its_own_stream(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: plain(tensor))
    parts = SimpleNamespace(ce=torch.tensor(2.0), divergence=torch.tensor(3.0))
    done: Any = SimpleNamespace(
        loss=torch.tensor(1.0), parts=parts, drawn={}, count=4, ce_weight=1.0
    )
    reading = loop._on_its_way(0, done, SECOND)
    assert reading.event._event.stream.device == SECOND


def test_the_generator_of_the_models_device_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda device="cuda": asked.append(device) or torch.zeros(1)
    )
    weight: Any = SimpleNamespace(device=SECOND, requires_grad=True)
    weight.detach = lambda: weight
    model = SimpleNamespace(
        named_parameters=lambda: [("w", weight)], named_buffers=lambda: [], state_dict=lambda: {}
    )
    assert set(checkpoint._generator_states(checkpoint._device_of(model))) == {"cpu", "device"}
    assert asked == [SECOND]
    on_cpu = torch.nn.Linear(2, 2)
    assert set(checkpoint._generator_states(checkpoint._device_of(on_cpu))) == {"cpu"}


def test_a_step_is_captured_on_the_models_device(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    @contextmanager
    def noted(*_: Any) -> Any:
        seen.append(cuda.current)
        yield

    monkeypatch.setattr(torch.cuda, "stream", noted)
    monkeypatch.setattr(torch.cuda, "graph", noted)
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: seen.append(cuda.current))
    decoder: Any = object.__new__(Fixed)
    decoder._token = SimpleNamespace(device=SECOND)
    decoder.reset = decoder._feed_own_token = lambda: None
    decoder.capture()
    assert seen == 4 * [SECOND]  # first runs, a dry one and back, the capture
    assert cuda.current == torch.device("cuda:0")


@pytest.mark.parametrize("kind", ["mps", "xpu", "hpu"])
def test_an_accelerator_is_not_named_after_the_cpu(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = device_name(SimpleNamespace(type="cpu"))
    monkeypatch.setattr(
        torch, "xpu", SimpleNamespace(get_device_name=lambda _: "Intel Data Center GPU Max 1550")
    )
    named = device_name(SimpleNamespace(type=kind))
    assert named != cpu
    assert named.startswith("Intel Data" if kind == "xpu" else f"{kind} of ")


# -- what counts as training ----------------------------------------------------------------------


def test_what_trains_has_a_goodput_and_nothing_else_has() -> None:
    """A release takes a model over: its goodput is no measured zero."""
    run = Run()
    run.stages = {name: stage() for name, stage in STAGES.items()}
    run.stages["capture"].like = run.stages["train"].like = "distill"
    fallback = run.stages["quantize"] = STAGES["quantize"](recover=[Fallback.lora])
    stages = {**run.stages, **fallback.fallbacks("quantize")}
    trains = {name for name, stage in stages.items() if stage.trains(run)}
    assert trains == {"train", "distill", "prune", "quantize/lora"}


# -- settings and phases --------------------------------------------------------------------------


def test_a_gate_without_a_champion_leaves_its_settings_alone() -> None:
    run = Run(
        stages={"candidate": 1, "baseline": 2},
        compare=[Comparison(arm="candidate", base="baseline")],
    )  # pyright: ignore
    left = without_baseline(run)
    assert (set(left.stages), left.compare) == ({"candidate"}, [])
    assert (set(run.stages), len(run.compare)) == ({"candidate", "baseline"}, 1)


def test_looking_whether_an_artifact_is_whole_is_preparing() -> None:
    """Hashing gigabytes takes minutes: they were `other`, which asks to be reported."""
    now = [0]

    def recall(*_: str) -> None:
        now[0] += 90

    clock = PhaseClock(lambda: now[0])
    session = SimpleNamespace(clock=clock, store=SimpleNamespace(recall=recall), run_id="r")
    running: Any = SimpleNamespace(session=session)
    assert StageRunner(running, 0).recall("key") is None
    assert Assessor(running, 0)._recall("key", {}) is None
    assert clock.read_ns() == {"other": 0, "prepare": 180}
