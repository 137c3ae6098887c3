"""Ranks become one timeline: every second stands once, whatever lives the ranks had."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger.ranks import (
    IDLE,
    NOT_COUNTED,
    Life,
    apportion,
    counts,
    lanes,
    merge,
    read_lives,
    restarts,
)

S = 10**9


def life(start_ns: int, end_ns: int, *, phases: dict[str, int] | None = None, **more: Any) -> Life:
    whole = {"forward": end_ns - start_ns}
    return Life(
        start_ns=start_ns, end_ns=end_ns, phases_ns=whole if phases is None else phases, **more
    )


def test_two_ranks_of_a_cpu_host_share_it() -> None:
    """10 s, two ranks: one from 2 to 8, one from 4 to 6. By hand, in halves of a second."""
    lives = [
        life(2 * S, 8 * S, rank=0, phases={"forward": 4 * S, "backward": 2 * S}),
        life(4 * S, 6 * S, rank=1, phases={"comm_wait": 2 * S}),
    ]
    assert merge(lives, 0, 10 * S, ["host"]) == {
        "forward": 2 * S,
        "backward": S,
        "comm_wait": S,
        IDLE: S,
        "other": (2 + 2) * S // 2 + (4 + 2) * S // 2,
    }


def test_ranks_of_gpus_have_one_each() -> None:
    lives = [life(0, 10, rank=0, device="GPU-a"), life(0, 6, rank=1, device="GPU-b", world_size=2)]
    lives[0] = life(0, 10, rank=0, device="GPU-a", world_size=2)
    assert merge(lives, 0, 10, ["GPU-b", "GPU-a"]) == {"forward": 16, IDLE: 4}


def test_a_gpu_without_a_rank_is_other_unless_one_rank_drives_all() -> None:
    first = life(0, 10, rank=0, local_rank=0, world_size=2)
    assert merge([first], 0, 10, ["GPU-a", "GPU-b"]) == {"forward": 10, "other": 10}
    alone = life(0, 10, device="GPU-b")
    assert merge([alone], 0, 10, ["GPU-a", "GPU-b"]) == {"forward": 20}


def test_restarts_share_a_lane_and_the_pause_between_is_other() -> None:
    lives = [life(1, 4, rank=1), life(6, 9, rank=1), life(1, 4, rank=0), life(6, 10, rank=0)]
    assert [[(one.start_ns, one.end_ns) for one in lane] for lane in lanes(lives)] == [
        [(1, 4), (6, 10)],
        [(1, 4), (6, 9)],
    ]
    assert restarts(lives) == 1
    merged = merge(lives, 0, 10, ["host"])
    assert merged == apportion({"forward": 13, "other": 6, IDLE: 1}, 10)


def test_a_smaller_world_after_a_restart_leaves_an_idle_rank() -> None:
    lives = [life(0, 4, rank=0), life(0, 4, rank=1), life(4, 10, rank=0)]
    assert merge(lives, 0, 10, ["host"]) == {"forward": 7, IDLE: 3}


def test_programs_at_the_same_time_under_one_rank_have_lanes_of_their_own() -> None:
    assert len(lanes([life(0, 6), life(2, 8), life(6, 9)])) == 2


def test_a_life_that_outlasts_the_command_is_cut_in_proportion() -> None:
    long = life(5, 25, phases={"forward": 16, "eval": 4})
    assert merge([long, life(30, 40), life(-9, -2)], 0, 15, ["host"]) == {
        "other": 5,
        "forward": 8,
        "eval": 2,
    }


def test_a_life_of_no_length_at_the_commands_end_leaves_nobody_idle() -> None:
    assert merge([life(0, 2, rank=0), life(10, 10, rank=1)], 0, 10, ["host"]) == merge(
        [life(0, 2)], 0, 10, ["host"]
    )


LIVES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 40),
        st.integers(0, 20),
        st.integers(0, 2),
        st.integers(1, 3),
    ),
    max_size=7,
)


@given(LIVES, st.integers(1, 60), st.integers(1, 3))
def test_every_tick_of_every_device_stands_once(
    raw: list[tuple[int, ...]], end: int, num_devices: int
) -> None:
    """Against a simulation that walks through the ticks one by one."""
    devices = [f"GPU-{index}" for index in range(num_devices)]
    lives = [
        life(
            start,
            start + length,
            rank=rank,
            device=f"GPU-{gpu % num_devices}",
            world_size=4,
            phases={"forward": length // part, "eval": length - length // part},
        )
        for rank, start, length, gpu, part in raw
    ]
    merged = merge(lives, 0, end, devices)
    assert sum(merged.values()) == end * num_devices
    assert min(merged.values()) > 0
    inside = [one for one in lives if one.start_ns < end]
    if any(one.end_ns > end for one in inside):
        return  # cut lives: their shares are a test of their own
    last = max((one.end_ns for one in inside), default=0)
    exact: dict[str, Fraction] = {}
    for device in devices if num_devices > 1 else [None]:
        own = lanes(one for one in inside if device in (None, one.device))
        for lane in own:
            for tick in range(end):
                at = [one for one in lane if one.start_ns <= tick < one.end_ns]
                assert len(at) <= 1
                what = "life" if at else IDLE if lane[-1].end_ns <= tick < last else "other"
                exact[what] = exact.get(what, Fraction(0)) + Fraction(1, len(own))
        if not own:
            exact["other"] = exact.get("other", Fraction(0)) + end
    booked = {"life": merged.get("forward", 0) + merged.get("eval", 0)} | {
        n: merged.get(n, 0) for n in (IDLE, "other")
    }
    for what, ticks in booked.items():
        # whole nanoseconds: two parts, one rounding each
        assert abs(ticks - exact.get(what, 0)) <= 2 * num_devices


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**15), min_size=1),
    st.integers(0, 10**16),
)
def test_apportioning_is_exact_and_fair(parts: dict[str, int], whole: int) -> None:
    found = apportion(parts, whole)
    assert sum(found.values()) == whole
    if have := sum(parts.values()):
        assert all(
            abs(found.get(name, 0) - Fraction(part * whole, have)) < 1
            for name, part in parts.items()
        )


def test_counts_are_summed_over_ranks_and_steps_are_those_of_one() -> None:
    lives = [
        life(0, 1, rank=0, counts={"tokens": 10, "steps": 3}),
        life(2, 3, rank=0, counts={"tokens": 5, "steps": 2}),
        life(0, 1, rank=1, counts={"tokens": 10, "steps": 3, "flops": 7.5}),
    ]
    found = counts(lives)
    assert {name: value.value for name, value in found.items()} == {
        "tokens": 25,
        "steps": 5,
        "model_flops": 7.5,
        "examples": None,
    }
    assert found["examples"].why_missing == NOT_COUNTED
    assert found["model_flops"].provenance == "declared"


def _raw(**changes: Any) -> dict[str, Any]:
    return {
        "host": "n1",
        "rank": None,
        "local_rank": None,
        "world_size": None,
        "device": None,
        "device_name": None,
        "start_ns": 5,
        "end_ns": 9,
        "phases_ns": {"forward": 4},
        "counts": {},
        "ended": True,
        **changes,
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_raw(), None),
        (
            _raw(host="n2"),
            "1 rank reported from another host, or torn; it is left out: meter each node",
        ),
        (_raw(phases_ns={"forward": 3}), "1 rank's phases do not sum to its life; it is left out"),
        (_raw(phases_ns={"thinking": 4}), "1 rank's phases do not sum to its life; it is left out"),
        (
            _raw(ended=False),
            "1 rank ended without a last word: up to 2 s of it are booked as other",
        ),
        ("{", "1 rank reported from another host, or torn; it is left out: meter each node"),
    ],
)
def test_what_ranks_left_is_read_with_its_flaws_said(
    tmp_path: Path, content: Any, said: str | None
) -> None:
    (tmp_path / "ranks").mkdir()
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "ranks" / "n1-7-5.json").write_text(text)
    lives, notes = read_lives(tmp_path, "n1")
    assert notes == ([] if said is None else [said])
    assert lives == ([] if said and "left out" in said else [life(5, 9, ended=said is None)])
