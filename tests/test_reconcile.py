"""A ledger that does not close says so: every rule is broken once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_result import make_empty_ledger, make_ledger, null, value

from pipeline.config.settings.cost import CostConfig
from pipeline.ledger.disturbance import unread as undisturbed
from pipeline.ledger.gpu_usage import unread
from pipeline.ledger.metrics import PHASES
from pipeline.ledger.reconcile import problems
from pipeline.ledger.record import Spent, ledger


def _closed() -> dict[str, Any]:
    return make_ledger(30, 2, retry_min=0, gpu=True)


def _add(path: str, hours: float) -> Callable[[dict[str, Any]], None]:
    group, name = path.split("/")

    def change(record: dict[str, Any]) -> None:
        record[group][name] = value((record[group][name]["value"] or 0.0) + hours)

    return change


def _nested(**hours: float) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["gpu_hours"].update({name: value(v) for name, v in hours.items()})


def _phase(ns: int) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["phases_ns"].update(forward=record["phases_ns"]["forward"] + ns)


BROKEN: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_add("device_hours/work", 1 / 3600), "work + assess + retry is not attached: +1 s"),
    (
        _add("device_hours/support", -2 / 3600),
        "productive + support + wasted is not attached: -2 s",
    ),
    (_phase(10**9), "phases do not close: +1 s"),
    (_nested(tensor_active=0.3, sm_active=0.2), "tensor_active is more than sm_active: 360 s"),
    (_nested(sm_active=0.3, busy=0.2), "sm_active is more than busy: 360 s"),
    (_nested(busy=1.0), "busy is more than attached"),
    (_nested(allocated=0.1), "attached is more than allocated"),
    (_nested(tensor_active=0.3, busy=0.2), "tensor_active is more than busy"),
    (
        lambda record: record["device_hours"].update(wasted_by={"rollback": value(0.0)}),
        "its causes is not wasted",
    ),
    (lambda record: record.update(energy_j=value(-1.0)), "energy_j is negative"),
]


@pytest.mark.parametrize(("change", "said"), BROKEN)
def test_every_rule_names_its_failure(change: Callable[[dict[str, Any]], None], said: str) -> None:
    record = _closed()
    assert problems(record) == []
    change(record)
    assert any(problem.startswith(said) for problem in problems(record)), problems(record)


def test_instruments_may_differ_by_a_percent_or_a_second() -> None:
    record = _closed()
    attached = record["gpu_hours"]["attached"]["value"]
    _nested(busy=attached * 1.009, sm_active=0.5, tensor_active=0.5 * 1.009)(record)
    assert problems(record) == []
    short = make_ledger(0.01, 0, gpu=True)
    _nested(busy=short["gpu_hours"]["attached"]["value"] + 0.9 / 3600)(short)
    assert problems(short) == []


def test_nulls_contradict_nothing() -> None:
    assert problems(make_empty_ledger("skipped")) == []
    record = _closed()
    for name in ("productive", "support", "wasted"):
        record["device_hours"][name] = null("the program reports no phases")
    assert problems(record) == []


@given(
    st.dictionaries(st.sampled_from(PHASES), st.integers(0, 10**15), max_size=6),
    st.integers(0, 10**15),
    st.floats(0, 1),
    st.integers(1, 64),
)
def test_what_the_ledger_writes_always_closes(
    phases: dict[str, int], lost_ns: int, part: float, devices: int
) -> None:
    kept_ns = sum(phases.values())
    work_ns = int(kept_ns * part)
    record = ledger(
        Spent(work_ns, kept_ns - work_ns, lost_ns, "rollback", phases),
        {},
        devices=devices,
        device_kind="cuda",
        cost=CostConfig(),
        memory={},
        disturbance=undisturbed("-"),
        usage=unread("not read"),
        is_training=True,
        seconds_in_steps=None,
        peak=_nothing(),
    )
    assert record["meter_valid"], record["meter_problems"]
    wasted_by = record["device_hours"]["wasted_by"]
    if lost_ns:
        assert wasted_by["rollback"]["value"] == pytest.approx(lost_ns * devices / 3600e9)
    broken = copy.deepcopy(record)
    broken["phases_ns"]["other"] = broken["phases_ns"].get("other", 0) + 10**9
    assert (problems(broken) != []) == bool(kept_ns + lost_ns)


def test_every_minute_of_a_row_is_in_one_class() -> None:
    """Two devices, an hour each: 30 minutes of steps, 6 of loading, 6 in no phase, 8 assessed, 10
    lost.
    """
    minute = 60 * 10**9
    phases = {"forward": 20, "backward": 10, "model_load": 6, "other": 6, "eval": 8}
    record = ledger(
        Spent(
            work_ns=42 * minute,
            assess_ns=8 * minute,
            lost_ns=10 * minute,
            lost_as="rollback",
            phases_ns={name: minutes * minute for name, minutes in phases.items()},
        ),
        {},
        devices=2,
        device_kind="cuda",
        cost=CostConfig(),
        memory={},
        disturbance=undisturbed("-"),
        usage=unread("not read"),
        is_training=True,
        seconds_in_steps=None,
        peak=_nothing(),
    )
    hours = dict(record["device_hours"])
    causes = {name: each["value"] for name, each in hours.pop("wasted_by").items()}
    assert causes == pytest.approx({"unattributed": 0.2, "rollback": 20 / 60})
    assert {name: each["value"] for name, each in hours.items()} == pytest.approx(
        {
            "attached": 2.0,
            "work": 1.4,
            "assess": 16 / 60,
            "retry": 20 / 60,
            "productive": 1.0,
            "support": 28 / 60,
            "wasted": 32 / 60,
        }
    )
    assert record["counts"]["goodput"]["value"] == pytest.approx(0.5)


def _nothing() -> Any:
    from pipeline.ledger.values import null as no

    return no("not read")
