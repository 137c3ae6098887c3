"""How tokens are written: what may be captured, what is compiled, which way is the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from capturing import Capturing
from few import few
from make_assess_models import random_documents, saved, tiny

from pipeline.config.settings.model import TinyShape
from pipeline.config.settings.quantization import Format
from pipeline.config.settings.run import Run
from pipeline.config.settings.serving import Decode, ServingConfig
from pipeline.errors import UserError
from pipeline.evaluation.serving import decoding, fastest
from pipeline.evaluation.serving.decoding import Fixed, Growing, chosen, make_decoder
from pipeline.evaluation.serving.fastest import said
from pipeline.evaluation.serving.measure import draw_prompts
from pipeline.evaluation.serving.server import Server, load
from pipeline.ledger.devices import table
from pipeline.ledger.devices.cuda.device import Cuda
from pipeline.ledger.devices.device import Waits
from pipeline.quantization.backend import LIBRARIES, quantize, why_not
from pipeline.runs.preflight import check_decode
from pipeline.tasks.table import Task

CPU = torch.device("cpu")
PROMPTS = draw_prompts([each.input_ids for each in random_documents([40])], 3, 8, 0)
NEW = 5


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace graphs as ever, and generate no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> type[Capturing]:
    """The CPU as a device that captures graphs."""
    monkeypatch.setattr(table, "_opened", {"cpu": Capturing})
    monkeypatch.setattr(Capturing, "captured", 0)
    monkeypatch.setattr(Capturing, "dry", 0)
    return Capturing


def prompt_of(prompts: np.ndarray = PROMPTS) -> torch.Tensor:
    return torch.from_numpy(prompts.astype(np.int64))


def text_of(decoder: Any, new: int = NEW) -> torch.Tensor:
    decoder.reset()
    tokens = [decoder.prefill(prompt_of()).clone()]
    return torch.cat([*tokens, *(decoder.step().clone() for _ in range(new - 1))], dim=1)


def growing_text(model: Any) -> torch.Tensor:
    return text_of(Growing(model.forward, {}))


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


# -- what may be captured -------------------------------------------------------------------------


def waiting(model: Any) -> Any:
    """Have a layer ask its input for a number at every call, as LLM.int8() looks for outliers."""
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x) if float(x.abs().max()) >= 0 else x
    return model


def test_a_step_that_waits_for_nothing_is_captured_after_a_dry_run(
    capturing: type[Capturing],
) -> None:
    model = tiny(Task.causal_lm)
    decoder = make_decoder(model, Decode.graph, {}, prompt_of(), NEW)
    assert (decoder.how, capturing.dry, capturing.captured) == ("static cache, CUDA graph", 1, 1)
    assert torch.equal(text_of(decoder), growing_text(model))


def test_a_step_that_would_wait_is_never_captured_and_says_so(capturing: type[Capturing]) -> None:
    model = waiting(tiny(Task.causal_lm))
    decoder = make_decoder(model, Decode.graph, {}, prompt_of(), NEW)
    assert decoder.how == (
        "dynamic cache (not graph: a step waits for the device (aten.item.default))"
    )
    assert (capturing.dry, capturing.captured) == (1, 0)
    assert torch.equal(text_of(decoder), growing_text(model))


class FakeCuda:
    """torch.cuda's streams and modes, as far as a capture touches them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.mode, self.stream, self.log = 0, "usual", list[str]()
        self.fails = False
        cuda = torch.cuda
        streams = lambda name: SimpleNamespace(wait_stream=lambda _: None, name=name)
        patch.setattr(cuda, "Stream", lambda: streams("side"))
        patch.setattr(cuda, "current_stream", lambda: streams(self.stream))
        patch.setattr(cuda, "stream", self.noted("side"))
        patch.setattr(cuda, "device", self.noted("device"))
        patch.setattr(cuda, "get_sync_debug_mode", lambda: self.mode)
        patch.setattr(cuda, "set_sync_debug_mode", self.set_mode)
        patch.setattr(cuda, "set_stream", lambda stream: setattr(self, "stream", stream.name))
        patch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        patch.setattr(cuda, "graph", self.graph)
        patch.setattr(Cuda, "_failed", "")

    def noted(self, name: str) -> Callable[..., Any]:
        @contextmanager
        def inside(*_: Any) -> Any:
            self.log.append(name)
            yield

        return inside

    def set_mode(self, mode: Any) -> None:
        self.mode = mode
        self.log.append(f"mode {mode}")

    @contextmanager
    def graph(self, _: Any) -> Any:
        self.log.append("graph")
        self.stream = "of the capture"
        yield
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = "usual"

    def step(self) -> None:
        self.log.append("step")

    def wait(self) -> None:
        """Wait, as an operation does that torch checks."""
        self.step()
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


def test_on_cuda_the_dry_step_stands_between_the_first_ones_and_the_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda(monkeypatch)
    Cuda(torch.device("cuda")).capture(fake.step, lambda: None)
    log = ["device", "side", "step", "step", "mode error", "step", "mode 0", "graph", "step"]
    assert (fake.log, fake.stream) == (log, "usual")


def test_on_cuda_a_step_that_waits_meets_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    with pytest.raises(Waits, match="waits for the device"):
        Cuda(torch.device("cuda")).capture(fake.wait, lambda: None)
    assert "graph" not in fake.log
    assert fake.mode == 0  # put back
    with pytest.raises(RuntimeError, match="out of memory"), Cuda(torch.device("cuda")).no_waits():
        raise RuntimeError("out of memory")


def test_after_a_capture_that_failed_all_the_same_none_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda(monkeypatch)
    fake.fails = True
    with pytest.raises(RuntimeError, match="previous error"):
        Cuda(torch.device("cuda")).capture(fake.step, lambda: None)
    assert fake.stream == "usual"
    fake.log.clear()
    with pytest.raises(RuntimeError, match="an earlier capture failed in this process"):
        Cuda(torch.device("cuda")).capture(fake.step, lambda: None)
    assert fake.log == []


# -- what is compiled -----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_decoder_is_compiled_for_itself() -> None:
    """One more of another shape meets no limit of recompilations, and none before is lost."""
    model = tiny(Task.causal_lm)
    with torch._dynamo.config.patch(recompile_limit=1):
        made = [
            make_decoder(model, Decode.compile, {}, prompt_of(PROMPTS[:rows]), NEW)
            for rows in (1, 2, 3)
        ]
    assert [each.how for each in made] == ["static cache, compiled (1 graph)"] * 3
    before = decoding.graphs_compiled()
    assert torch.equal(text_of(made[2]), growing_text(model))
    assert decoding.graphs_compiled() == before


def test_a_step_that_torch_runs_eager_is_not_called_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    decoder = make_decoder(tiny(Task.causal_lm), Decode.compile, {}, prompt_of(), NEW)
    assert decoder.how == "dynamic cache (not compile: torch compiled nothing of it)"


def test_a_graph_that_breaks_is_no_compiled_step() -> None:
    decoder = make_decoder(waiting(tiny(Task.causal_lm)), Decode.compile, {}, prompt_of(), NEW)
    assert decoder.how.startswith("dynamic cache (not compile: ")


def test_a_step_that_is_compiled_again_and_again_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = iter(range(100))
    monkeypatch.setattr(decoding, "graphs_compiled", lambda: next(counted))
    decoder = make_decoder(tiny(Task.causal_lm), Decode.compile, {}, prompt_of(), NEW)
    assert decoder.how == "dynamic cache (not compile: torch compiles every step anew)"


def test_what_is_compiled_while_it_is_read_is_told() -> None:
    server = Server(tiny(Task.causal_lm), Task.causal_lm, CPU, time.monotonic_ns, Decode.compile)
    assert server.once(PROMPTS, NEW).how == "static cache, compiled (1 graph)"
    torch._dynamo.reset()  # as another library may
    anew = "static cache, compiled (1 graph), 1 graph compiled while it was read"
    assert server.once(PROMPTS, NEW).how == anew


# -- which is the fastest -------------------------------------------------------------------------


class Clock:
    """Counts what is asked of models: a token costs what its way says."""

    def __init__(self, **costs: float) -> None:
        self.ns, self.costs = 0, costs

    def __call__(self) -> int:
        return self.ns


def timed(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Have each step cost milliseconds by its way."""
    plain = Growing.step

    def grown(self: Growing) -> torch.Tensor:
        clock.ns += int(clock.costs["dynamic"] * 1e6)
        return plain(self)

    def fixed(self: Fixed) -> torch.Tensor:
        clock.ns += int(clock.costs["compile" if self.is_compiled else "graph"] * 1e6)
        self._replay()
        return self._token

    monkeypatch.setattr(Growing, "step", grown)
    monkeypatch.setattr(Fixed, "step", fixed)


@pytest.mark.parametrize(
    ("costs", "chosen_way", "how"),
    [
        ((3.0, 1.0, 0.5), "compile", "static cache, compiled (1 graph), CUDA graph"),
        ((3.0, 1.0, 0.99), "graph", "static cache, CUDA graph"),
        ((3.0, 4.0, 5.0), "dynamic", "dynamic cache"),
        ((3.0, 4.0, 2.0), "compile", "static cache, compiled (1 graph), CUDA graph"),
    ],
)
def test_auto_takes_the_fastest_and_says_what_each_took(
    costs: tuple[float, float, float],
    chosen_way: str,
    how: str,
    capturing: type[Capturing],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(**dict(zip(("dynamic", "graph", "compile"), costs, strict=True)))
    timed(monkeypatch, clock)
    server = Server(tiny(Task.causal_lm), Task.causal_lm, CPU, clock, Decode.auto)
    assert server.once(PROMPTS, NEW).how == how
    (probe,) = server.probes.values()
    assert (probe["chosen"], probe["how"], probe["batch"]) == (chosen_way, how, 3)
    steps = NEW - 1
    assert probe["seconds"][chosen_way] == pytest.approx(
        clock.costs[chosen_way] * steps / 1000, rel=1e-6
    )
    assert probe["took_s"] > 0
    assert said(probe).startswith(f"serving.decode=auto took {chosen_way} ({how}) after a probe of")


def test_a_way_that_cannot_be_taken_is_told_and_the_next_one_tried(
    capturing: type[Capturing],
) -> None:
    model = waiting(tiny(Task.causal_lm))
    server = Server(model, Task.causal_lm, CPU, time.monotonic_ns, Decode.auto)
    assert server.once(PROMPTS, NEW).how == "dynamic cache"
    (probe,) = server.probes.values()
    assert [each.partition(":")[0] for each in probe["refused"]] == ["not graph", "not compile"]
    assert "not graph: a step waits for the device" in said(probe)
    assert probe["seconds"] == {}


def test_a_decoder_that_writes_something_else_takes_no_part(
    capturing: type[Capturing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fixed, "step", lambda self: self.logits.neg_())
    server = Server(tiny(Task.causal_lm), Task.causal_lm, CPU, time.monotonic_ns, Decode.auto)
    assert server.once(PROMPTS, NEW).how == "dynamic cache"
    (probe,) = server.probes.values()
    assert all("not those of a growing cache" in each for each in probe["refused"])


def test_a_shape_is_probed_once(
    capturing: type[Capturing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest, "WAYS", (Decode.graph,))
    server = Server(tiny(Task.causal_lm), Task.causal_lm, CPU, time.monotonic_ns, Decode.auto)
    for rows in (3, 3, 2, 3):
        server.once(PROMPTS[:rows], NEW)
    assert [shape[0] for shape in server.probes] == [3, 2]
    assert capturing.captured >= 2


def test_a_cpu_has_nothing_to_time() -> None:
    server = Server(tiny(Task.causal_lm), Task.causal_lm, CPU, time.monotonic_ns, Decode.auto)
    assert server.once(PROMPTS, NEW).how == "dynamic cache"
    assert server.probes == {}
    assert chosen(Decode.auto, CPU) is Decode.dynamic


def test_where_nothing_is_timed_auto_is_a_graph(capturing: type[Capturing]) -> None:
    """In gates and self-tests, whose two sides must be served alike."""
    assert chosen(Decode.auto, CPU) is Decode.graph


# -- quantized formats ----------------------------------------------------------------------------

# as int4 and fp8 need it
WIDE = TinyShape(hidden_size=128, layers=1, heads=2, intermediate_size=256)


# bitsandbytes' own, where torch traces it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("fmt", few(sorted(LIBRARIES, key=lambda fmt: fmt.value), 2))
def test_a_format_is_compiled_and_writes_the_same(fmt: Format, tmp_path: Path) -> None:
    if why := why_not(fmt, CPU):
        pytest.skip(why)
    source = saved(tiny(Task.causal_lm, shape=WIDE), tmp_path / "source")
    out, key = tmp_path / "out", "stages.small.format"
    with torch.inference_mode(mode=False):
        quantize(source, out, fmt, Task.causal_lm, device=CPU, key=key, prove=False)
        server = load(out, Task.causal_lm, CPU, labels=None, now_ns=time.monotonic_ns)
    decoder = make_decoder(server.model, Decode.compile, {}, prompt_of(), NEW)
    assert decoder.how == "static cache, compiled (1 graph)"
    assert torch.equal(text_of(decoder), growing_text(server.model))


# -- what this device cannot do -------------------------------------------------------------------


def asked(decode: Decode) -> Run:
    return Run(serving=ServingConfig(decode=decode))


def test_a_way_that_this_device_does_not_have_is_refused() -> None:
    check_decode(asked(Decode.auto), CPU)
    check_decode(asked(Decode.compile), CPU)
    with pytest.raises(UserError, match=r"serving\.decode: graph needs CUDA, this run is on cpu"):
        check_decode(asked(Decode.graph), CPU)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(UserError, match=r"compile: torch\.compile needs a C") as caught:
            check_decode(asked(Decode.compile), CPU)
        check_decode(asked(Decode.auto), CPU)  # it compiles nothing on a CPU
    assert caught.value.remedy == "install it, or give auto"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"compile: torch\.compile needs Triton"):
        check_decode(asked(Decode.compile), torch.device("cuda"))
