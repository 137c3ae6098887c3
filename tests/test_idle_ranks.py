"""Devices that wait while the first rank works alone are waste with a name; hours still add up."""

from __future__ import annotations

import pytest

from pipeline.config.settings.cost import CostConfig
from pipeline.config.settings.parallel import Parallel
from pipeline.config.settings.run import Run
from pipeline.ledger.disturbance import unread as disturbance_unread
from pipeline.ledger.gpu_usage import unread as usage_unread
from pipeline.ledger.memory import unread
from pipeline.ledger.record import Spent, ledger
from pipeline.ledger.shapes import RankTime
from pipeline.ledger.values import null
from pipeline.runs.following import straggler
from pipeline.runs.rows import _of_other_devices, by_first, by_first_alone
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.train import TrainStage

HOUR = 3_600_000_000_000


def hours_of(spent: Spent, devices: int) -> dict[str, float]:
    why = "not read"
    record = ledger(
        spent,
        {},
        devices=devices,
        device_kind="cuda",
        cost=CostConfig(),
        memory=unread(why),
        usage=usage_unread(why),
        disturbance=disturbance_unread(why),
        is_training=True,
        seconds_in_steps=None,
        peak=null(why),
    )
    found = record["device_hours"]
    parts = ("attached", "work", "assess", "productive", "support", "wasted")
    hours = {name: found[name]["value"] or 0.0 for name in parts}
    return {**hours, **{name: each["value"] or 0.0 for name, each in found["wasted_by"].items()}}


def a_training(devices: int) -> dict[str, float]:
    """Two hours of steps, one of validation by the first rank; then an hour of assessment."""
    spent = Spent(work_ns=3 * HOUR, assess_ns=HOUR)
    run = Run()
    spent.add_phases({"forward": 2 * HOUR, "eval": HOUR}, by_first(run, TrainStage()))
    spent.add_phases({"eval": HOUR}, by_first_alone)
    return hours_of(spent, devices)


def test_of_four_devices_three_wait_while_one_validates_and_assesses() -> None:
    found = a_training(4)
    assert found["attached"] == 16
    assert found["productive"] == 8  # two hours of four devices
    assert found["support"] == 2  # two hours of one
    assert found["idle_rank"] == found["wasted"] == 6  # and of the three others
    assert found["productive"] + found["support"] + found["wasted"] == found["attached"]


def test_one_device_never_waits_for_itself() -> None:
    found = a_training(1)
    assert "idle_rank" not in found
    assert (found["productive"], found["support"], found["wasted"]) == (2, 2, 0)


@pytest.mark.parametrize(
    ("stage", "mode", "alone"),
    [
        (TrainStage(), Parallel.ddp, {"eval", "checkpoint", "log"}),
        (TrainStage(), Parallel.fsdp, {"checkpoint", "log"}),
        (QuantizeStage(), Parallel.ddp, {"eval", "checkpoint", "log", "forward", "prepare"}),
    ],
)
def test_what_the_first_rank_does_alone(
    stage: TrainStage | QuantizeStage, mode: Parallel, alone: set[str]
) -> None:
    run = Run()
    run.parallel.mode = mode
    is_alone = by_first(run, stage)
    phases = ("forward", "prepare", "eval", "checkpoint", "log")
    assert {phase for phase in phases if is_alone(phase)} == alone


# -- where each device told what it did -----------------------------------------------------------


def told(devices: int, *others: dict[str, float]) -> dict[str, float]:
    """Three hours of the first device: two of steps, one of saving; and what others told."""
    spent = Spent(work_ns=3 * HOUR)
    spent.add_told({"forward": 2 * HOUR, "checkpoint": HOUR}, others)
    return hours_of(spent, devices)


def test_each_device_is_booked_by_its_own_timeline() -> None:
    slow, fast = {"forward": 2 * HOUR}, {"forward": HOUR, "comm_wait": HOUR}
    found = told(3, slow, fast)
    assert found["attached"] == 9
    assert found["productive"] == 5  # 2 + 2 + 1
    assert found["comm_exposed"] == 1  # the fast one waited in a step
    assert found["support"] == 1
    assert found["idle_rank"] == 2  # both waited while the first one saved
    assert found["productive"] + found["support"] + found["wasted"] == pytest.approx(9)


def test_work_that_was_told_and_an_assessment_by_the_first_one_add_up() -> None:
    spent = Spent(work_ns=3 * HOUR, assess_ns=HOUR)
    spent.add_told({"forward": 3 * HOUR}, [{"forward": 2 * HOUR}])
    spent.add_phases({"eval": HOUR}, by_first_alone)
    found = hours_of(spent, 2)
    assert (found["productive"], found["support"], found["idle_rank"]) == (5, 1, 2)
    assert found["attached"] == 8


def ranks(*local: int) -> list[RankTime]:
    return [
        {"rank": at, "host": f"host-{at // 2}", "phases_ns": {"forward": ns}, "local_ns": ns}
        for at, ns in enumerate(local)
    ]


def test_the_rank_that_others_wait_for_is_named() -> None:
    assert straggler(ranks(100, 100, 100, 134)) == (
        "rank 3 (host-1) takes 34% longer than the others for what each does by itself in a step,"
        " and all wait for it"
    )
    assert straggler(ranks(100, 104, 98, 107)) is None
    assert straggler(ranks(100)) is None


def test_on_hosts_of_cpus_a_device_is_a_host() -> None:
    each = _of_other_devices(ranks(1, 3, 10, 20), on_hosts=True)
    assert each == [{"forward": 15}]
    assert _of_other_devices(ranks(1, 3), on_hosts=False) == [{"forward": 3}]
