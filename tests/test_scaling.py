"""The arithmetic of scaling against hand-worked and published values; and its simulation, small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from scaling import (
    CLUSTERS,
    LOST_HOURS,
    appended,
    asked,
    checkpoint,
    compute_seconds,
    daly_seconds,
    ddp,
    fsdp,
    hsdp,
    made_once,
    ring,
    steps_table,
    tokens_to_hide,
    told,
)

H100 = CLUSTERS["DGX H100"]


def test_what_a_ring_sends() -> None:
    """NCCL's tests: an all-reduce of S bytes sends 2 (n - 1) / n S."""
    assert (ring(1, 80.0), ring(2, 80.0), ring(8, 80.0)) == (0.0, 40.0, 70.0)
    assert ddp(1e9, 8, 8).within == 2 * 7 / 8 * 4e9


def test_sharding_all_sends_half_as_much_again() -> None:
    """ZeRO, section 7: 3 parameters in place of 2."""
    for devices in (8, 64, 1024):
        assert fsdp(7e9, devices, 8).within == pytest.approx(1.5 * ddp(7e9, devices, 8).within)


def test_one_host_sends_nothing_between_hosts() -> None:
    assert [scheme(7e9, 8, 8).between for scheme in (ddp, fsdp, hsdp)] == [0.0, 0.0, 0.0]


def test_hybrid_sharding_by_hand() -> None:
    """16 devices on 2 hosts, 1e9 parameters: within a host 7/8 of 12 bytes each, between them half
    of twice 4 bytes.
    """
    found = hsdp(1e9, 16, 8)
    assert (found.within, found.between) == (10.5e9, 4e9)


def test_seconds_by_hand() -> None:
    assert compute_seconds(7e9, 8192, H100) == pytest.approx(0.8697, abs=1e-4)
    assert fsdp(1e9, 16, 8).seconds(H100) == pytest.approx(12e9 * 15 / 16 / 400e9)


def test_tokens_that_hide_what_is_sent() -> None:
    sent_s = fsdp(7e9, 1024, 8).seconds(H100)
    tokens = tokens_to_hide(7e9, sent_s, H100)
    assert compute_seconds(7e9, tokens, H100) == pytest.approx(sent_s)
    rows = steps_table(7e9, tokens, [1024])
    row = next(each for each in rows if (each["cluster"], each["scheme"]) == ("DGX H100", "fsdp"))
    assert row["efficiency_exposed"] == pytest.approx(0.5)
    assert row["efficiency_overlapped"] == pytest.approx(1.0)


def test_checkpoints_as_often_as_loses_least() -> None:
    assert daly_seconds(50.0, 10_000.0) == 950.0
    found = checkpoint(7e9, 1024, H100)
    loss = lambda interval_s: (
        found["save_s"] / (interval_s + found["save_s"])
        + (interval_s / 2 + found["save_s"]) / (found["hours_between_failures"] * 3600)
    )
    assert found["share_lost"] == pytest.approx(loss(found["interval_s"]))
    for factor in (0.5, 2.0):
        assert loss(factor * found["interval_s"]) > found["share_lost"]


def test_failures_are_as_often_as_published() -> None:
    """16,384 devices: one in three hours (The Llama 3 Herd of Models, section 3.3.4)."""
    hours = LOST_HOURS / 16_384
    assert hours == pytest.approx(3.1, abs=0.05)


def test_questions_grow_with_ranks_and_lines_do_not() -> None:
    assert asked(1)["questions_per_s"] == 0
    assert asked(1024)["questions_per_s"] == pytest.approx(1023 * 0.6)


@pytest.mark.slow
def test_simulated_ranks_lose_no_line_and_make_nothing_twice(tmp_path: Path) -> None:
    found = appended(4, 25, tmp_path)
    assert (found["written"], found["whole"]) == (100, 100)
    assert made_once(4, tmp_path / "store") == {"ranks": 4, "made": 1, "found": 3}
    assert told(4) == {"ranks": 4, "heard": 3}
