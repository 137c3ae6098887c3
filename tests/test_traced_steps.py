"""Sampled steps through torch's real profiler on CPU, its files as Perfetto reads them, and all
that may go wrong.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_assess_models import tiny
from make_result import make_row
from test_gpu_timeline import copy, kernel, launch, step, x
from test_training_loop import batches_for, hooks, settings

from pipeline.config.settings.cost import CostConfig
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.run import Run
from pipeline.config.settings.tracking import LedgerConfig
from pipeline.errors import Preempted
from pipeline.ledger.disturbance import unread as undisturbed
from pipeline.ledger.gpu_timeline import FIGURES, NOT_TRACED, by_device, parse, read_trace
from pipeline.ledger.gpu_usage import unread
from pipeline.ledger.memory import MEMORY
from pipeline.ledger.metrics import TRACED_SHARES, row_summary
from pipeline.ledger.phases import PhaseClock, difference
from pipeline.ledger.record import Spent, gpu_timeline, ledger
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.ledger.traced_steps import StepTracer, sampled_steps, shrink, step_tracer
from pipeline.ledger.values import null
from pipeline.stages.context import Output
from pipeline.tasks.table import Task
from pipeline.training import loop
from pipeline.training.loop import Progress, Reading, train
from pipeline.training.objective import Objective, StepLoss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU_TRACE = {
    "schemaVersion": 1,
    "displayTimeUnit": "ms",
    "host_name": "somewhere",
    "traceName": "/tmp/t.json",
    "traceEvents": [
        step(0, 90, "step 2"),
        launch(50, 1),
        kernel(52, 38, 1),
        step(100, 100, "step 3"),
        launch(110, 2),
        kernel(120, 30, 2),
        launch(130, 3),
        copy(150, 10, 3),
        launch(165, 4),
        kernel(170, 30, 4),
        *[x("cpu_op", f"aten::op{i}", 100 + i / 10, 0.05) for i in range(900)],
        *[x("python_function", f"f{i}.py(1): g", 100 + i / 10, 0.05) for i in range(900)],
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 2, "ts": 110, "pid": 100, "tid": 100},
        {
            "ph": "M",
            "name": "process_name",
            "ts": 0,
            "pid": 100,
            "tid": 0,
            "args": {"name": "python"},
        },
    ],
}
IN_NS = {
    "compute_ns": 60_000,
    "comm_exposed_ns": 0,
    "copy_exposed_ns": 10_000,
    "idle_host_wait_ns": 15_000,
    "idle_launch_gap_ns": 15_000,
    "idle_other_ns": 0,
}


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Models this small wait for their threads longer than they compute where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FakeProfiler:
    """Writes what it is given; can fail at any of its calls, and take time there."""

    def __init__(
        self, trace: Any = None, *, fails: str = "", tick: Callable[[], None] = lambda: None
    ) -> None:
        self.trace, self.fails, self.tick = trace, fails, tick
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.tick()
        if name == self.fails:
            raise RuntimeError(f"CUPTI_ERROR_INSUFFICIENT_PRIVILEGES in {name}\nand a stack")

    def start(self) -> None:
        self._call("start")

    def stop(self) -> None:
        self._call("stop")

    def export_chrome_trace(self, path: str) -> None:
        self._call("export")
        Path(path).write_text(self.trace if isinstance(self.trace, str) else json.dumps(self.trace))


def training(
    folder: Path, tracer: StepTracer, clock: PhaseClock | None = None, **more: Any
) -> Progress:
    clock, model = clock or PhaseClock(), tiny(Task.causal_lm)
    with tracer:
        return train(
            model,
            batches_for(settings()),
            Objective(model, Task.causal_lm, Precision.fp32, CPU, clock),
            settings=settings(eval_every=6),
            precision=PrecisionConfig(name=Precision.fp32),
            folder=folder / "checkpoints",
            clock=clock,
            hooks=hooks(tracer=tracer, **more),
        )


def faked(folder: Path, profiler: FakeProfiler, **more: Any) -> StepTracer:
    return StepTracer(folder, CUDA, [3], make_profiler=lambda device: profiler, **more)


# -- which steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (100, 2, (11, 56)),
        (1000, 4, (11, 258, 506, 753)),
        (100, 0, ()),
        (0, 2, ()),
        (1, 2, ()),
        (2, 2, (2,)),
        (6, 2, (4,)),
        (8, 2, (5, 7)),
    ],
)
def test_sampled_steps_by_hand(total: int, count: int, expected: tuple[int, ...]) -> None:
    assert sampled_steps(total, count) == expected


@given(st.integers(0, 3000), st.integers(0, 12), st.one_of(st.none(), st.integers(1, 400)))
def test_sampled_steps_are_distinct_and_have_a_lead_in(
    total: int, count: int, eval_every: int | None
) -> None:
    found = sampled_steps(total, count, eval_every)
    assert len(found) == len(set(found)) <= count
    assert all(2 <= number <= total for number in found)
    assert bool(found) == (total >= 2 and count >= 1)
    if eval_every is not None and eval_every > 1:
        assert all((number - 1) % eval_every or number == total for number in found)


def test_no_step_is_sampled_right_after_an_evaluation() -> None:
    assert sampled_steps(100, 2, 10) == (12, 56)


# -- through the loop, with torch's profiler ------------------------------------------------------


def perfetto(path: Path) -> list[dict[str, Any]]:
    """Load a trace as Perfetto's JSON importer does, and assert what it needs to draw it."""
    raw = json.loads(gzip.decompress(path.read_bytes()))
    assert isinstance(raw["traceEvents"], list)
    events = [event for event in raw["traceEvents"] if event["ph"] == "X"]
    threads: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        assert event["name"]
        assert event["dur"] >= 0
        start_ns = round(event["ts"] * 1000)
        threads[event["pid"], event["tid"]].append(
            (start_ns, -(start_ns + round(event["dur"] * 1000)))
        )
    for spans in threads.values():  # on one track, slices are nested or apart
        still_open: list[int] = []
        for start_ns, negative_end_ns in sorted(spans):
            while still_open and still_open[-1] <= start_ns:
                still_open.pop()
            # the clock's last digit
            assert not still_open or -negative_end_ns <= still_open[-1] + 1
            still_open.append(-negative_end_ns)
    return events


def test_a_real_trace_of_a_step_is_there_for_perfetto_and_its_figures_are_null(
    tmp_path: Path,
) -> None:
    tracer = StepTracer(tmp_path / "traces", CPU, [3, 6])
    training(tmp_path, tracer)
    found = tracer.result()
    assert found["traces"] == ["step-000003.json.gz", "step-000006.json.gz"]
    assert {value["why_missing"] for value in found["shares"].values()} == {"a CPU run uses no GPU"}
    assert set(found["shares"]) == set(FIGURES)
    assert (found["steps"], found["notes"]) == ([], [])
    for number in (3, 6):
        path = tmp_path / "traces" / f"step-{number:06d}.json.gz"
        names = {event["name"] for event in perfetto(path)}
        assert {f"step {number - 1}", f"step {number}", "aten::mm"} <= names
        assert f"step {number - 2}" not in names
        assert f"step {number + 1}" not in names
        assert path.stat().st_size < 200_000
        assert read_trace(path).activities == {}
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == found["traces"]


def test_tracing_changes_no_weight_and_no_count(tmp_path: Path) -> None:
    plain = training(tmp_path / "a", StepTracer())
    traced = training(tmp_path / "b", StepTracer(tmp_path / "traces", CPU, [3]))
    assert (traced.smooth, traced.hard, traced.tokens) == (plain.smooth, plain.hard, plain.tokens)


@pytest.mark.parametrize(
    "tracer",
    [
        StepTracer(),
        StepTracer(None, CUDA, [3]),
        step_tracer(Path("x"), CPU, total=100, count=2),
        step_tracer(None, CUDA, total=100, count=2),
        step_tracer(Path("x"), CUDA, total=100, count=0),
    ],
)
def test_by_default_nothing_is_traced(tracer: StepTracer) -> None:
    assert not any(
        tracer.opens_at(number) or tracer.closes_after(number) for number in range(1, 101)
    )
    found = tracer.result()
    assert found["traces"] == []
    assert {value["value"] for value in found["shares"].values()} == {None}
    whys = {value["why_missing"] for value in found["shares"].values()}
    assert whys <= {"a CPU run uses no GPU", "no step was traced"}


def test_on_a_gpu_the_sampled_steps_and_their_lead_in_are_traced() -> None:
    tracer = step_tracer(Path("x"), CUDA, total=100, count=2, eval_every=10)
    assert [number for number in range(1, 101) if tracer.opens_at(number)] == [11, 12, 55, 56]


# -- what it costs, and where that is booked ------------------------------------------------------


def test_the_profilers_time_is_logging_and_no_time_in_steps(tmp_path: Path) -> None:
    now = [0]

    def tick() -> None:
        now[0] += 10**9

    clock = PhaseClock(lambda: now[0])
    profiler = FakeProfiler(GPU_TRACE, tick=tick)
    before = clock.read_ns()
    progress = training(tmp_path, faked(tmp_path, profiler), clock)
    assert profiler.calls == ["start", "stop", "export"]
    assert difference(clock.read_ns(), before) == {"log": 3 * 10**9}
    assert (progress.step, progress.step_ns) == (6, 0)


def test_waiting_for_the_device_is_time_in_steps_and_an_evaluation_begins_on_an_idle_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps of 80 ms on a device, asked for in no time: the host waits for each reading, and
    nowhere else.
    """
    now, free = [0], [0]

    class Event:
        def __init__(self) -> None:
            free[0] = max(free[0], now[0]) + 80_000_000
            self.passed_ns = free[0]

        def synchronize(self) -> None:
            now[0] = max(now[0], self.passed_ns)

    def on_its_way(step: int, done: StepLoss, device: torch.device, _: str) -> Reading:
        return Reading(step, torch.tensor([1.0, 2.0, 0.0]), done.count, Event())

    def validate() -> float:
        assert now[0] == free[0], "the evaluation would be charged with waiting for steps"
        now[0] += 10**9
        return 1.0

    monkeypatch.setattr(loop, "_on_its_way", on_its_way)
    clock = PhaseClock(lambda: now[0])
    # waits, as torch's does
    profiler = FakeProfiler(GPU_TRACE, tick=lambda: now.__setitem__(0, max(*now, *free) + 5))
    before = clock.read_ns()
    progress = training(tmp_path, faked(tmp_path, profiler), clock, validate=validate)
    assert (progress.step_ns, progress.eval_ns) == (6 * 80_000_000, 10**9)
    assert difference(clock.read_ns(), before) == {
        "backward": 6 * 80_000_000,
        "eval": 10**9,
        "log": 15,
    }


# -- a GPU's trace --------------------------------------------------------------------------------


def test_a_traced_step_on_a_gpu_has_shares_and_a_resumed_run_reads_them_back(
    tmp_path: Path,
) -> None:
    tracer = faked(tmp_path / "traces", FakeProfiler(GPU_TRACE))
    training(tmp_path, tracer)
    found = tracer.result()
    assert found["steps"] == [{"step": 3, "device": 0, **IN_NS}]
    shares = {name: value["value"] for name, value in found["shares"].items()}
    assert shares == pytest.approx(
        {
            "traced_steps": 1,
            "compute": 0.6,
            "comm_exposed": 0,
            "copy_exposed": 0.1,
            "idle_host_wait": 0.15,
            "idle_launch_gap": 0.15,
            "idle_other": 0,
            "busy": 0.7,
        }
    )
    later = StepTracer(tmp_path / "traces", CUDA, [3])
    assert later.result() == found


def test_a_file_that_cannot_be_read_back_is_said(tmp_path: Path) -> None:
    (tmp_path / "step-000003.json.gz").write_bytes(b"torn")
    found = StepTracer(tmp_path, CUDA, [3]).result()
    assert found["shares"]["compute"]["why_missing"] == "no step was traced"
    assert found["notes"][0].startswith("step-000003.json.gz cannot be read back (BadGzipFile: ")


def test_a_trace_without_device_activity_is_no_idle_device(tmp_path: Path) -> None:
    host_only = {"traceEvents": [step(0, 90, "step 3"), launch(50, 1)]}
    tracer = faked(tmp_path / "traces", FakeProfiler(host_only))
    training(tmp_path, tracer)
    whys = {value["why_missing"] for value in tracer.result()["shares"].values()}
    assert whys == {"traces hold no activity of the device: CUPTI gave none"}


# -- what may go wrong ----------------------------------------------------------------------------

BROKEN = {
    "start": FakeProfiler(fails="start"),
    "stop": FakeProfiler(fails="stop"),
    "export": FakeProfiler(fails="export"),
    "no JSON": FakeProfiler('{"traceEvents": ['),
    "no trace": FakeProfiler({}),
    "no step": FakeProfiler({"traceEvents": [kernel(0, 1)]}),
    "no length": FakeProfiler(
        {"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "ts": 1}]}
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_profiler_that_does_not_work_is_a_reason_and_the_training_goes_on(
    tmp_path: Path, what: str
) -> None:
    tracer = StepTracer(
        tmp_path / "traces", CUDA, [3, 5], make_profiler=lambda device: BROKEN[what]
    )
    progress = training(tmp_path, tracer)
    assert progress.step == 6
    found = tracer.result()
    assert len(found["notes"]) == 1
    assert found["notes"][0].startswith("steps could not be traced (")
    assert "and a stack" not in found["notes"][0]
    assert {value["why_missing"] for value in found["shares"].values()} == {found["notes"][0]}
    assert BROKEN[what].calls.count("start") == 1


def test_a_training_that_stops_in_between_leaves_no_profiler_running(tmp_path: Path) -> None:
    profiler = FakeProfiler(GPU_TRACE)
    asked = iter([None, Preempted])
    with pytest.raises(Preempted):
        training(tmp_path, faked(tmp_path, profiler), should_stop=lambda: next(asked))
    assert profiler.calls == ["start", "stop"]


# -- small files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit_bytes", "left_out"),
    [(10**6, ["python_function"]), (2000, ["python_function", "ac2g", "cpu_op"])],
)
def test_a_trace_is_made_small_and_says_what_was_left_out(
    limit_bytes: int, left_out: list[str]
) -> None:
    small = shrink(GPU_TRACE, limit_bytes)
    assert small is not None
    assert len(small) <= limit_bytes
    raw = json.loads(gzip.decompress(small))
    assert raw["otherData"] == {"left_out": left_out}
    assert {event.get("cat") for event in raw["traceEvents"]}.isdisjoint(left_out)
    assert by_device(parse(raw), "step 3") == by_device(parse(GPU_TRACE), "step 3")
    assert "somewhere" not in json.dumps(raw)
    assert raw["displayTimeUnit"] == "ms"


def test_a_trace_that_stays_too_large_is_not_kept_and_its_figures_are(tmp_path: Path) -> None:
    assert shrink(GPU_TRACE, 100) is None
    tracer = faked(tmp_path / "traces", FakeProfiler(GPU_TRACE), limit_bytes=100)
    training(tmp_path, tracer)
    found = tracer.result()
    assert found["notes"] == ["the trace of step 3 is not kept: more than 100 bytes"]
    assert found["traces"] == []
    assert found["shares"]["busy"]["value"] == pytest.approx(0.7)


# -- where it goes --------------------------------------------------------------------------------


def test_an_output_carries_the_timeline_and_an_older_one_has_none(tmp_path: Path) -> None:
    tracer = faked(tmp_path / "traces", FakeProfiler(GPU_TRACE))
    training(tmp_path, tracer)
    output = Output(gpu_timeline={**tracer.result(), "phases_s": {"forward": 0.5}})
    raw = json.loads(json.dumps(output.to_json()))
    assert Output.from_json(raw) == output
    del raw["gpu_timeline"]
    assert Output.from_json(raw).gpu_timeline == {}


def test_a_row_says_what_its_device_did(tmp_path: Path) -> None:
    """Busy for 70 us of a traced step of 100 us; 30 s in steps on two devices are then 42 busy
    device-seconds.
    """
    tracer = faked(tmp_path / "traces", FakeProfiler(GPU_TRACE))
    training(tmp_path, tracer)
    record = ledger(
        Spent(work_ns=60 * 10**9, phases_ns={"forward": 57 * 10**9, "log": 3 * 10**9}),
        {},
        devices=2,
        device_kind="cuda",
        cost=CostConfig(),
        memory={name: null("-") for name in MEMORY},
        disturbance=undisturbed("-"),
        usage=unread("no NVML here"),
        is_training=True,
        seconds_in_steps=30.0,
        peak=null("-"),
        timeline={**tracer.result(), "phases_s": {"forward": 0.5}},
    )
    record |= {"identity": {}, "placement": {}}
    jsonschema.validate(
        record,
        {
            **RESULT_SCHEMA["properties"]["rows"]["items"]["properties"]["ledger"],
            "$defs": RESULT_SCHEMA["$defs"],
        },
    )
    assert record["gpu_hours"]["busy"] == {
        "value": pytest.approx(42 / 3600),
        "provenance": "estimated",
        "why_missing": None,
    }
    assert record["gpu_timeline"]["idle_host_wait"]["value"] == pytest.approx(0.15)
    assert record["conditions"]["meter_overhead"]["value"] == 0.05
    assert record["gpu_timeline"]["traces"] == ["step-000003.json.gz"]
    figures = row_summary({**make_row("student"), "ledger": record})
    assert figures["compute/traced_busy_share"]["value"] == pytest.approx(0.7)
    assert figures["compute/traced_idle_launch_gap_share"]["value"] == pytest.approx(0.15)
    assert sum(
        figures[f"compute/traced_{name}_share"]["value"] for name, *_ in TRACED_SHARES[1:]
    ) == pytest.approx(1)


def test_a_trace_that_failed_is_a_problem_of_the_meter_and_no_invalid_row(tmp_path: Path) -> None:
    tracer = faked(tmp_path / "traces", FakeProfiler(fails="start"))
    training(tmp_path, tracer)
    group = gpu_timeline({**tracer.result(), "phases_s": {}})
    assert group["notes"] == [group["busy"]["why_missing"]]
    assert "could not be traced" in group["notes"][0]
    assert gpu_timeline({})["busy"]["why_missing"] == NOT_TRACED


def test_what_is_looked_at_is_in_no_run_key() -> None:
    from pipeline.runs.keys import UNKEYED

    assert isinstance(Run().ledger, LedgerConfig)
    assert "ledger" in UNKEYED


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no kernels to trace")
def test_on_a_real_gpu_classes_close_and_computing_is_seen(tmp_path: Path) -> None:
    clock, model = PhaseClock(), tiny(Task.causal_lm).to(CUDA)
    tracer = StepTracer(tmp_path / "traces", CUDA, [4])
    with tracer:
        train(
            model,
            batches_for(settings()),
            Objective(model, Task.causal_lm, Precision.fp32, CUDA, clock),
            settings=settings(eval_every=6),
            precision=PrecisionConfig(name=Precision.fp32),
            folder=tmp_path / "checkpoints",
            clock=clock,
            hooks=hooks(tracer=tracer),
        )
    found = tracer.result()
    assert found["notes"] == []
    assert found["shares"]["compute"]["value"] > 0
    perfetto(tmp_path / "traces" / "step-000004.json.gz")
