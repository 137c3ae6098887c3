"""Waste by cause: shares against hand-made hours, advice at and below its threshold, nothing
counted twice.
"""

from __future__ import annotations

from typing import Any

import pytest
from make_result import make_result, make_row, make_unfinished, null, value
from reports import markdown

from pipeline.ledger.metrics import WASTE_CAUSES
from pipeline.report import metered
from pipeline.report.tables import WIDTH, closing_table
from pipeline.report.waste import (
    REMEDIES,
    advice,
    causes,
    closing_lines,
    outside,
    table_body,
    total,
)


def _row(
    wasted_by: dict[str, float],
    *,
    attached: float = 1.0,
    rate: float | None = None,
    arm: str = "student",
    **changes: Any,
) -> Any:
    """Return a row of `attached` device-hours of which `wasted_by` were lost."""
    row = make_row(arm, **changes)
    hours = row["ledger"]["device_hours"]
    hours["attached"], hours["assess"] = value(attached), value(0.0)
    hours["wasted"] = value(sum(wasted_by.values()))
    hours["wasted_by"] = {cause: value(v) for cause, v in wasted_by.items()}
    row["ledger"]["phases_ns"] = {"forward": round(attached * 3600e9)}
    if rate is not None:
        row["ledger"]["cost"] = {"amount": value(rate * attached, "derived"), "currency": "EUR"}
    return row


def _result(
    rows: list[Any],
    *,
    overhead: dict[str, float] | None = None,
    compare: dict[str, float] | None = None,
) -> Any:
    """Return a result with these rows, and device-hours by phase outside of stages."""
    result = make_result(rows=rows)
    outside_h = {"overhead": overhead or {}, "compare": compare or {}}
    own = sum(
        row["ledger"]["device_hours"]["attached"]["value"] or 0.0
        for row in rows
        if not row["reused"]
    )
    result["run"]["device_hours"]["total"] = value(
        own + sum(sum(part.values()) for part in outside_h.values())
    )
    result["run"]["phases_device_ns"] = {
        part: {phase: round(v * 3600e9) for phase, v in phases.items()}
        for part, phases in outside_h.items()
    }
    return result


def test_every_cause_has_a_remedy() -> None:
    assert set(WASTE_CAUSES) <= set(REMEDIES)


@pytest.mark.parametrize("cause", WASTE_CAUSES)
def test_advice_begins_at_its_threshold(cause: str) -> None:
    threshold = REMEDIES[cause].threshold
    at = _row({cause: max(threshold, 0.001)})
    assert [each.advice for each in causes(at)] == [REMEDIES[cause].here]
    below = _row({cause: threshold - 0.0001})
    assert not any(each.advice for each in causes(below))


def test_a_metered_program_gets_advice_that_it_can_follow() -> None:
    row = _row({"data_wait": 0.31}, type="metered")
    assert advice(row) == ["data_wait 31%: raise num_workers of the data loader"]
    assert advice(_row({"data_wait": 0.31})) == [
        "data_wait 31%: raise batch_size (training.* or the stage's own): fewer, larger batches"
    ]


def test_shares_hours_and_money_are_those_of_the_row() -> None:
    found = causes(_row({"data_wait": 0.5, "rollback": 1.0}, attached=4.0, rate=2.0))
    assert [(each.name, each.share, each.device_hours, each.money) for each in found] == [
        ("rollback", 0.25, 1.0, 2.0),
        ("data_wait", 0.125, 0.5, 1.0),
    ]
    assert causes(_row({"data_wait": 0.5}))[0].money is None


def test_evaluation_is_advised_on_without_the_assessment_that_it_shares_its_phase_with() -> None:
    row = _row({})
    hour = round(3600e9)
    row["ledger"]["phases_ns"] = {"forward": round(0.7 * hour), "eval": round(0.3 * hour)}
    assert [(each.name, each.kind, each.share) for each in causes(row)] == [
        ("eval", "support", pytest.approx(0.3))
    ]
    row["ledger"]["device_hours"]["assess"] = value(0.2)
    assert causes(row) == []


def test_a_stage_without_steps_is_given_no_advice_on_evaluations() -> None:
    """Quantizing proves what it wrote; no setting makes that shorter."""
    row = _row({})
    row["ledger"]["phases_ns"] = {"convert": round(0.2 * 3600e9), "eval": round(0.8 * 3600e9)}
    assert [each.name for each in causes(row)] == ["eval"]
    row["ledger"]["counts"]["goodput"] = null("this stage takes no steps")
    assert causes(row) == []


def test_what_the_device_shows_is_advised_on_and_not_added() -> None:
    row = _row({"data_wait": 0.1})
    row["ledger"]["gpu_timeline"] = {
        "idle_launch_gap": value(0.4),
        "idle_host_wait": value(0.05),
        "copy_exposed": null("-"),
    }
    row["ledger"]["conditions"] = {"throttle_share": value(0.5)}
    assert [(each.name, each.kind, each.device_hours) for each in causes(row)] == [
        ("data_wait", "wasted", 0.1),
        ("throttled", "of samples", None),
        ("idle_launch_gap", "of traced steps", None),
    ]
    assert total(_result([row])).device_hours == 0.1


def test_reused_and_skipped_rows_waste_nothing_here() -> None:
    rows = [
        _row({"rollback": 0.5}, reused="abc123"),
        make_unfinished("fp16", "SKIPPED", "no fp16 here"),
    ]
    assert [causes(row) for row in rows] == [[], []]
    assert [line[0] for line in table_body(_result(rows, overhead={"other": 1}))] == [
        "outside stages",
        "the run",
    ]


def test_a_program_without_phases_is_not_said_to_waste() -> None:
    row = _row({})
    row["ledger"]["device_hours"]["wasted"] = null("the program reports no phases")
    assert causes(row) == []
    assert total(_result([row])) is None
    assert closing_lines(_result([row])) == []
    assert "Waste by cause" not in markdown(_result([row]))


def test_the_last_line_sums_the_run() -> None:
    rows = [
        _row({"data_wait": 0.1}, rate=2.0),
        _row({"rollback": 0.3}, attached=2.5, rate=2.0, arm="other"),
    ]
    result = _result(
        rows, overhead={"import": 0.1, "log": 0.2}, compare={"other": 0.05, "generate": 0.15}
    )
    body = table_body(result)
    assert [(line[0], line[1], line[4]) for line in body] == [
        ("student", "data_wait", "10% of its stage"),
        ("other", "rollback", "12% of its stage"),
        ("outside stages", "import", "2.5% of the run"),
        ("comparison pass", "unattributed", "1.2% of the run"),
        ("the run", "all of it", "13.8% of the run"),
    ]
    assert body[-1][3:6] == ["33.0 min", "13.8% of the run", "1.10 EUR"]
    rows[0]["ledger"]["cost"] = rows[1]["ledger"]["cost"] = {
        "amount": null("no rate declared"),
        "currency": None,
    }
    assert table_body(result)[-1][5] == ""


def test_what_is_wasted_here_is_paid_at_what_this_run_paid() -> None:
    """Another run's hours, on devices held in another way, were 8.00 an hour; this one's are
    2.00.
    """
    reused, skipped = (
        _row({}, rate=8.0, reused="abc123"),
        make_unfinished("fp16", "SKIPPED", "no fp16 here"),
    )
    result = _result(
        [reused, skipped, _row({"data_wait": 0.1}, rate=2.0)], overhead={"import": 0.1}
    )
    assert [line[5] for line in table_body(result)] == ["0.200 EUR", "0.200 EUR", "0.400 EUR"]
    only_reused = _result([reused], overhead={"import": 0.1})
    assert [line[5] for line in table_body(only_reused)] == ["", ""]
    unpriced = _result([skipped, _row({"data_wait": 0.1}, rate=2.0)])
    assert table_body(unpriced)[-1][5] == "0.200 EUR"


def test_start_up_is_advised_on_where_a_stage_ran() -> None:
    ran = _result([_row({})], overhead={"import": 0.2})
    assert (
        "  outside stages: import 16.7% of the run (12.0 min): make more arms in one run"
        in "\n".join(closing_lines(ran))
    )
    all_reused = _result([_row({}, reused="abc123")], overhead={"import": 0.2})
    assert [cause.advice for _, cause in outside(all_reused)] == [None]


def test_the_closing_lines_name_what_to_try_in_80_columns() -> None:
    result = _result([_row({"data_wait": 0.31, "unattributed": 0.001})])
    text = closing_table(result)
    assert "wasted 31.1% of this run (18.7 min of 60.0 min):" in text
    assert "  student: data_wait 31% of its stage (18.6 min): raise batch_size" in text
    assert all(len(line) <= WIDTH for line in text.split("\n"))
    slow, quick = (
        _row({"unattributed": 0.05 * hours}, attached=hours) for hours in (1.0, 1 / 3600)
    )
    # 3 min; 50 ms
    assert ["report it" in str(causes(row)[0].advice) for row in (slow, quick)] == [True, False]
    assert closing_lines(_result([_row({"unattributed": 0.004})])) == [
        "wasted 0.4% of this run (14.4 s of 60.0 min)"
    ]


def test_every_share_says_what_it_is_of() -> None:
    """The same seconds are one share of a metered command and another of the run, which has the
    meter's time in it.
    """
    row = _row({"import": 0.4}, attached=0.5, type="metered", arm="train")
    result = _result([row], overhead={"log": 0.3})
    first, *causes_said = closing_lines(result)
    assert first == "wasted 50% of this run (24.0 min of 48.0 min):"
    assert causes_said[0].startswith(
        "  train: import 80% of the command (24.0 min): do more per process"
    )
    said = metered.conclude(result)
    assert said["verdict"].startswith("train took 30.0 min of device time")
    assert said["verdict"].endswith(", 80% wasted.")
    assert said["answers"] == ["The meter's own time is not in it."]
    assert all(line[4].endswith((" of the command", " of the run")) for line in table_body(result))
    gpu = _row({"data_wait": 0.2})
    gpu["ledger"]["gpu_timeline"] = {"idle_launch_gap": value(0.3)}
    assert {(cause.kind, cause.of) for cause in causes(gpu)} == {
        ("wasted", " of its stage"),
        ("of traced steps", ""),
    }
