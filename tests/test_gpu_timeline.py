"""What a GPU did in a traced step: by hand-made traces, and against a reference that looks at every
microsecond.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger.gpu_timeline import (
    FIGURES,
    NO_GPU,
    Classes,
    Span,
    by_device,
    classify,
    parse,
    read_trace,
    step_window,
    summary,
)
from pipeline.ledger.values import Provenance

NCCL = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"


def x(
    cat: str, name: str, ts: float, dur: float, *, pid: int = 100, tid: int = 100, **args: Any
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": ts,
        "dur": dur,
        "pid": pid,
        "tid": tid,
        "args": args,
    }


def step(ts: float, dur: float, name: str = "step 7") -> dict[str, Any]:
    return x("user_annotation", name, ts, dur)


def launch(ts: float, correlation: int, dur: float = 2, **more: Any) -> dict[str, Any]:
    return x("cuda_runtime", "cudaLaunchKernel", ts, dur, correlation=correlation, **more)


def kernel(
    ts: float,
    dur: float,
    correlation: int = 0,
    *,
    name: str = GEMM,
    cat: str = "kernel",
    device: int = 0,
    stream: int = 7,
) -> dict[str, Any]:
    return x(
        cat,
        name,
        ts,
        dur,
        pid=device,
        tid=stream,
        device=device,
        stream=stream,
        correlation=correlation,
    )


def copy(ts: float, dur: float, correlation: int = 0, **more: Any) -> dict[str, Any]:
    return kernel(
        ts, dur, correlation, name="Memcpy HtoD (Pinned -> Device)", cat="gpu_memcpy", **more
    )


def us(window: tuple[int, int], *events: dict[str, Any], device: int = 0) -> dict[str, int]:
    """Return the classes of a window in microseconds, without those that are zero."""
    span = Span(window[0] * 1000, window[1] * 1000)
    found = classify(parse({"traceEvents": list(events)}), span, device)
    assert found.window_ns == span.end_ns - span.start_ns
    return {
        name: getattr(found, name) // 1000 for name in Classes.__slots__ if getattr(found, name)
    }


# -- busy -----------------------------------------------------------------------------------------


def test_communication_behind_computing_is_not_exposed() -> None:
    events = [kernel(0, 60), kernel(40, 50, name=NCCL, stream=13)]
    assert us((0, 90), *events) == {"compute_ns": 60, "comm_exposed_ns": 30}


def test_a_copy_is_exposed_only_where_nothing_else_runs() -> None:
    events = [
        kernel(10, 20),
        copy(0, 40, stream=14),
        kernel(30, 5, name=NCCL, stream=13),
        kernel(40, 2, cat="gpu_memset", name="Memset (Device)"),
    ]
    assert us((0, 42), *events) == {"copy_exposed_ns": 17, "compute_ns": 20, "comm_exposed_ns": 5}


def test_kernels_of_several_streams_count_once() -> None:
    assert us((0, 30), kernel(0, 20), kernel(5, 10, stream=8), kernel(10, 20, stream=9)) == {
        "compute_ns": 30
    }


def test_a_kernel_across_an_edge_counts_with_its_part() -> None:
    assert us((10, 20), kernel(0, 12), kernel(18, 50)) == {"compute_ns": 4, "idle_other_ns": 6}


def test_devices_are_told_apart() -> None:
    events = [kernel(0, 10), kernel(0, 4, device=1), launch(2, 5), kernel(8, 2, 5, device=1)]
    assert us((0, 10), *events) == {"compute_ns": 10}
    assert us((0, 10), *events, device=1) == {"compute_ns": 6, "idle_launch_gap_ns": 4}
    assert list(by_device(parse({"traceEvents": [step(0, 10), *events]}), "step 7")) == [0, 1]


@pytest.mark.parametrize(
    ("name", "communicates"),
    [
        (NCCL, True),
        ("ncclKernel_Broadcast_RING_LL_Sum_int8_t", True),
        ("one_shot_all_reduce_kernel<bf16>", True),
        ("void cross_device_reduce_1stage<nv_bfloat16, 8>", True),
        (GEMM, False),
        ("reduce_kernel<512, 1, float>", False),
        ("triton_red_fused_sum_0", False),
        ("indexing_scatter_gather_elementwise", False),
    ],
)
def test_kernels_that_communicate_are_known_by_name(name: str, communicates: bool) -> None:
    assert us((0, 5), kernel(0, 5, name=name)) == {
        "comm_exposed_ns" if communicates else "compute_ns": 5
    }


def test_what_is_no_device_activity_is_not_counted() -> None:
    events = [
        kernel(0, 4),
        x("gpu_user_annotation", "step 7", 0, 50, pid=0, tid=7, device=0),
        x("cuda_sync", "Context Sync", 0, 50, pid=0, tid=-1, device=0),
        x("cpu_op", "aten::mm", 0, 50),
        x("overhead", "Activity Buffer Request", 0, 50, device=0),
        {"ph": "i", "cat": "kernel", "name": "no length", "ts": 3, "pid": 0, "tid": 7},
    ]
    assert us((0, 50), *events) == {"compute_ns": 4, "idle_other_ns": 46}


# -- idle -----------------------------------------------------------------------------------------


def test_idle_is_split_where_the_launch_begins() -> None:
    """The figure of the module: busy until 10, launched at 24, begins at 30."""
    events = [kernel(0, 10), launch(24, 1), kernel(30, 5, 1)]
    assert us((0, 35), *events) == {
        "compute_ns": 15,
        "idle_host_wait_ns": 14,
        "idle_launch_gap_ns": 6,
    }


def test_a_kernel_that_was_queued_already_leaves_no_wait_for_the_host() -> None:
    assert us((0, 16), launch(2, 1), kernel(0, 10), kernel(11, 5, 1)) == {
        "compute_ns": 15,
        "idle_launch_gap_ns": 1,
    }


def test_a_launch_that_ends_in_the_gap_is_waited_for_as_a_launch() -> None:
    events = [kernel(0, 10), launch(8, 1, dur=9), kernel(18, 2, 1)]
    assert us((0, 20), *events) == {"compute_ns": 12, "idle_launch_gap_ns": 8}


def test_a_launch_after_its_kernel_is_a_clock_that_is_off_and_all_the_gap_is_the_hosts() -> None:
    assert us((0, 20), launch(13, 1), kernel(12, 8, 1)) == {
        "compute_ns": 8,
        "idle_host_wait_ns": 12,
    }


def test_idle_that_nothing_ends_is_other() -> None:
    assert us((0, 20), launch(0, 1), kernel(0, 5, 1), launch(12, 2)) == {
        "compute_ns": 5,
        "idle_other_ns": 15,
    }


def test_a_kernel_after_the_window_says_why_its_end_was_idle() -> None:
    events = [kernel(0, 5), launch(12, 1), kernel(30, 5, 1)]
    assert us((0, 20), *events) == {
        "compute_ns": 5,
        "idle_host_wait_ns": 7,
        "idle_launch_gap_ns": 8,
    }


@pytest.mark.parametrize("correlation", [0, 99])
def test_a_kernel_that_no_call_is_known_for_says_nothing(correlation: int) -> None:
    events = [kernel(0, 5), launch(2, 0), launch(7, 3), kernel(15, 5, correlation)]
    assert us((0, 20), *events) == {"compute_ns": 10, "idle_other_ns": 10}


def test_a_driver_call_inside_a_runtime_call_is_one_launch() -> None:
    driver = x("cuda_driver", "cuLaunchKernelEx", 8, 1, correlation=1)
    expected = {"idle_host_wait_ns": 5, "idle_launch_gap_ns": 7, "compute_ns": 3}
    assert us((0, 15), driver, launch(5, 1, dur=6), kernel(12, 3, 1)) == expected
    triton = {"idle_host_wait_ns": 8, "idle_launch_gap_ns": 4, "compute_ns": 3}
    assert us((0, 15), driver, kernel(12, 3, 1)) == triton


def test_kernels_of_a_graph_belong_to_the_one_call() -> None:
    graph = x("cuda_runtime", "cudaGraphLaunch", 4, 3, correlation=9)
    events = [graph, kernel(10, 5, 9), kernel(16, 5, 9), kernel(22, 5, 9)]
    assert us((0, 27), *events) == {
        "idle_host_wait_ns": 4,
        "idle_launch_gap_ns": 8,
        "compute_ns": 15,
    }


def test_of_two_kernels_that_end_a_gap_the_first_asked_for_says_why() -> None:
    events = [
        kernel(0, 2),
        launch(4, 1),
        launch(9, 2),
        kernel(10, 5, 2, stream=8),
        kernel(10, 5, 1),
    ]
    assert us((0, 15), *events) == {
        "compute_ns": 7,
        "idle_host_wait_ns": 2,
        "idle_launch_gap_ns": 6,
    }


def test_a_kernel_without_length_ends_a_gap() -> None:
    events = [launch(6, 1), kernel(8, 0, 1), launch(17, 2), kernel(20, 1, 2)]
    assert us((0, 21), *events) == {
        "idle_host_wait_ns": 6 + 9,
        "idle_launch_gap_ns": 2 + 3,
        "compute_ns": 1,
    }


# -- windows --------------------------------------------------------------------------------------


def test_a_step_on_a_slow_device_begins_and_ends_when_the_device_does() -> None:
    """The host is in the step from 100 to 130; the device is at the step before until 140, and done
    at 200.
    """
    events = [launch(90, 1), kernel(92, 48, 1), step(100, 30), launch(110, 2), kernel(141, 59, 2)]
    trace = parse({"traceEvents": events})
    assert step_window(trace, "step 7", 0) == Span(140_000, 200_000)
    found = by_device(trace, "step 7")[0]
    assert found == Classes(compute_ns=59_000, idle_launch_gap_ns=1_000)


def test_a_step_on_a_slow_host_is_as_long_as_the_host_takes() -> None:
    events = [launch(80, 1), kernel(82, 3, 1), step(100, 50), launch(120, 2), kernel(125, 10, 2)]
    found = by_device(parse({"traceEvents": events}), "step 7")[0]
    assert found == Classes(
        compute_ns=10_000, idle_host_wait_ns=20_000, idle_launch_gap_ns=5_000, idle_other_ns=15_000
    )


def test_older_work_that_outlives_the_step_leaves_the_hosts_window() -> None:
    events = [launch(90, 1), kernel(92, 900, 1, stream=8), step(100, 50)]
    assert step_window(parse({"traceEvents": events}), "step 7", 0) == Span(100_000, 150_000)


def test_annotations_may_be_nested_and_the_outermost_of_one_name_counts() -> None:
    events = [
        step(20, 5),
        step(0, 100, "ProfilerStep#3"),
        step(10, 40),
        step(12, 6, "forward"),
        step(30, 2),
    ]
    trace = parse({"traceEvents": events})
    assert step_window(trace, "step 7", 0) == Span(10_000, 50_000)
    assert step_window(trace, "ProfilerStep#3", 0) == Span(0, 100_000)
    with pytest.raises(KeyError, match="step 8"):
        step_window(trace, "step 8", 0)


@given(
    host=st.integers(2, 60),
    device=st.integers(1, 90),
    wait=st.integers(0, 40),
    count=st.integers(1, 12),
)
def test_one_step_of_lead_in_shows_a_step_as_in_a_long_row(
    host: int, device: int, wait: int, count: int
) -> None:
    """Equal steps, each `wait` of data loading and `count` launches: the window is the period of an
    endless row.
    """
    events: list[dict[str, Any]] = []
    free = now = correlation = 0
    ends: list[int] = []
    for number in range(8):
        begin, now = now, now + wait
        for _ in range(count):
            correlation += 1
            events.append(launch(now, correlation, dur=1))
            now += host
            begins = max(now, free)
            events.append(kernel(begins, device, correlation))
            free = begins + device
        events.append(step(begin, now - begin, f"step {number}"))
        ends.append(max(now, free))
    found = by_device(parse({"traceEvents": events}), "step 1")[0]
    period = max(wait + count * host, count * device)
    assert ends[-1] - ends[-2] == period
    assert found.window_ns == period * 1000
    assert found.compute_ns == count * device * 1000


# -- against a reference --------------------------------------------------------------------------

KINDS = {"compute": GEMM, "comm_exposed": NCCL, "copy_exposed": "Memcpy"}
activity = st.tuples(
    st.integers(0, 60),
    st.integers(0, 15),
    st.sampled_from(list(KINDS)),
    st.one_of(st.none(), st.integers(-5, 60)),
    st.integers(0, 1),
)


def reference(
    window: tuple[int, int], activities: list[tuple[int, int, str, int | None]]
) -> dict[str, int]:
    """Look at every microsecond on its own."""
    counted: dict[str, int] = {}
    for now in range(*window):
        running = [kind for start, dur, kind, _ in activities if start <= now < start + dur]
        name = next((kind for kind in KINDS if kind in running), None)
        if name is None:
            following = [(start, launched) for start, _, _, launched in activities if start > now]
            first = min((start for start, _ in following), default=None)
            asked = [
                launched for start, launched in following if start == first and launched is not None
            ]
            name = (
                "idle_other"
                if not asked
                else "idle_launch_gap"
                if min(asked) <= now
                else "idle_host_wait"
            )
        counted[f"{name}_ns"] = counted.get(f"{name}_ns", 0) + 1
    return counted


@given(
    st.lists(activity, max_size=14),
    st.integers(0, 50),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_classes_close_and_agree_with_every_microsecond(
    drawn: list[tuple[int, int, str, int | None, int]],
    start: int,
    length: int,
    order: random.Random,
) -> None:
    events: list[dict[str, Any]] = []
    for number, (at, dur, kind, launched, device) in enumerate(drawn, 1):
        cat = "gpu_memcpy" if kind == "copy_exposed" else "kernel"
        events.append(
            kernel(at, dur, number, name=KINDS[kind], cat=cat, device=device, stream=number)
        )
        if launched is not None:
            events.append(launch(launched, number))
    order.shuffle(events)
    for device in (0, 1):
        own = [
            (at, dur, kind, launched) for at, dur, kind, launched, where in drawn if where == device
        ]
        assert us((start, start + length), *events, device=device) == reference(
            (start, start + length), own
        )


# -- reading and summing up -----------------------------------------------------------------------


def test_nanoseconds_of_a_late_clock_are_exact(tmp_path: Path) -> None:
    """At 4.4 * 10^12 us a float times 1000 lies up to half a nanosecond beside the truth."""
    line = (
        '{{"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": {}.{:03}, "dur":'
        " 0.{:03}}}"
    )
    lines = [
        line.format(4_450_000_000_000 + number, number, 1 + number % 999) for number in range(1000)
    ]
    text = f'{{"traceEvents": [{", ".join(lines)}]}}'
    (tmp_path / "t.json").write_text(text)
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("t.json", "t.json.gz"):
        found = read_trace(tmp_path / name).activities[0]
        assert [(each.start_ns, each.end_ns) for each in found] == [
            (
                4_450_000_000_000_000 + 1001 * number,
                4_450_000_000_000_000 + 1001 * number + 1 + number % 999,
            )
            for number in range(1000)
        ]


@pytest.mark.parametrize("raw", [{}, {"traceEvents": 3}])
def test_what_is_no_trace_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="a trace has a list `traceEvents`"):
        read_trace(tmp_path / "t.json")


def test_shares_are_of_step_wall_time_over_steps_and_devices() -> None:
    first = Classes(compute_ns=60, comm_exposed_ns=10, idle_host_wait_ns=30)
    second = Classes(compute_ns=180, copy_exposed_ns=10, idle_launch_gap_ns=8, idle_other_ns=2)
    found = summary([{0: first, 1: first}, {0: second, 1: first}])
    assert tuple(found) == FIGURES
    assert {name: value.value for name, value in found.items()} == pytest.approx(
        {
            "traced_steps": 2,
            "compute": 360 / 500,
            "comm_exposed": 30 / 500,
            "copy_exposed": 10 / 500,
            "idle_host_wait": 90 / 500,
            "idle_launch_gap": 8 / 500,
            "idle_other": 2 / 500,
            "busy": 400 / 500,
        }
    )
    assert {value.provenance for name, value in found.items() if name != "busy"} == {
        Provenance.MEASURED
    }
    assert found["busy"].provenance is Provenance.ESTIMATED


def test_a_trace_without_activity_is_not_an_idle_step() -> None:
    found = summary([{0: Classes(compute_ns=60, idle_other_ns=40)}, {}])
    assert (found["traced_steps"].value, found["compute"].value) == (1, 0.6)


def test_without_a_gpu_or_a_traced_step_every_figure_says_why() -> None:
    assert {value.why_missing for value in summary([]).values()} == {"no step was traced"}
    assert {value.why_missing for value in summary([], why_none=NO_GPU).values()} == {
        "a CPU run uses no GPU"
    }
    assert {value.value for value in summary([{}]).values()} == {None}
