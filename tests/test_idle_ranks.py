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
from pipeline.ledger.values import null
from pipeline.runs.rows import by_first, by_first_alone
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
