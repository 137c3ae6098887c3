"""The closing table, read back from its text."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
from make_result import (
    ARMS,
    make_pair,
    make_quality,
    make_result,
    make_row,
    make_saving,
    make_unfinished,
    null,
    value,
)

from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.report.money import money_lines
from pipeline.report.tables import closing_table
from pipeline.report.text import columns
from pipeline.report.view import labels


def _cells(result: dict[str, Any]) -> dict[str, list[str]]:
    """Return the table's rows by arm: what stands between the rule and the text below."""
    lines = closing_table(result).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("---")) + 1
    rows = [re.split(r"\s{2,}", line) for line in lines[start : start + len(result["rows"])]]
    return {cells[0]: cells[1:] for cells in rows}


def _no_wider_than_80(text: str) -> bool:
    return all(columns(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("recipe", list(ARMS))
def test_the_builder_makes_valid_results_and_the_table_shows_every_arm(
    recipe: str, gpu: bool
) -> None:
    result = make_result(recipe, gpu=gpu)
    jsonschema.validate(result, RESULT_SCHEMA)
    assert list(_cells(result)) == list(ARMS[recipe])
    assert _no_wider_than_80(closing_table(result))


def test_unfinished_rows_of_the_builder_are_valid() -> None:
    for status in ("SKIPPED", "FAILED", "KILLED"):
        jsonschema.validate(
            make_result(rows=[make_unfinished("teacher", status, "why")]), RESULT_SCHEMA
        )


def test_the_worked_example_adds_up() -> None:
    rows = [make_row(arm) for arm in ARMS["distill"]]
    rows[1]["ledger"]["device_hours"]["retry"] = value(2 / 60)
    text = closing_table(make_result("distill", rows=rows))
    assert "spent 90.0 min, reused 0 s; run total 90.0 min = work 71.0 + assess 8.0 +" in text
    assert "retry 2.0 + compare 6.0 + overhead 3.0" in text


def test_cells_carry_the_figures() -> None:
    cells = _cells(make_result("distill"))
    assert cells["teacher"] == ["done", "32.0 min", "410 k", "2.204", "1.00"]
    assert cells["student"] == ["done", "22.0 min", "410 k", "2.272", "0.600", "-[1]", "+40%"]
    assert "[1] censored: 200 steps" in closing_table(make_result("distill")).splitlines()


def test_heads_name_unit_and_direction() -> None:
    words = " ".join(closing_table(make_result("distill")).split("---")[0].split())
    for word in ("bits/byte", "lower", "better", "device-s", "per 1k", "tokens", "hours"):
        assert word in words
    rows = [make_row("baseline", key="accuracy")]
    head = closing_table(make_result("baseline", rows=rows)).split("---")[0]
    assert "accuracy" in head
    assert "higher" in head
    assert "examples" in head


@pytest.mark.parametrize(
    ("gpu", "words"), [(False, "device-hours (1 CPU host)"), (True, "GPU-hours (1 x NVIDIA H200)")]
)
def test_hours_are_called_gpu_hours_on_gpus_only(gpu: bool, words: str) -> None:
    text = closing_table(make_result("baseline", gpu=gpu))
    assert words in text
    assert ("GPU" in text) == gpu


def test_gpu_hours_are_read_from_the_gpu_ledger() -> None:
    row = make_row("baseline", gpu=True)
    row["ledger"]["gpu_hours"]["attached"] = null("NVML lost permission")
    text = closing_table(make_result("baseline", gpu=True, rows=[row]))
    assert "-[1]" in text
    assert "[1] NVML lost permission" in text


def test_a_reused_row_spends_nothing_and_keeps_its_figure() -> None:
    rows = [make_row("reference", reused="abc123"), make_row("int8"), make_row("nf4")]
    result = make_result("quantize", rows=rows)
    assert _cells(result)["reference"][:2] == ["reused", "spent 0"]
    text = closing_table(result)
    assert "reused: reference 12.0 min (run abc123)" in text
    assert "spent 33.0 min, reused 12.0 min; run total 33.0 min = work 20.0 + assess 4.0" in text


def test_work_of_another_run_stands_with_the_row_that_assessed_it() -> None:
    work = {"status": "FINISHED", "artifact": None, "reused": "abc123", "why": "the work alone"}
    arms = ("teacher", "control_compute")
    rows = [row for arm in arms for row in (make_row(arm, **work), make_row(arm))]
    result = make_result("distill", rows=rows)
    table, below = closing_table(result).split("device-hours (1 CPU host)")
    assert re.findall(r"^(teacher|control\S*) +(\S+) ", table, re.MULTILINE) == [
        (arm, "assessed") for arm in arms
    ]
    assert re.search(r"reused: teacher [\d.]+ min \(run abc123\), control_compute", below)
    assert labels(rows) == [
        "teacher earlier",
        "teacher",
        "control_compute earlier",
        "control_compute",
    ]


def test_an_arm_that_went_on_from_another_runs_checkpoint_is_this_runs_own() -> None:
    begun = make_unfinished("teacher", "KILLED", "up to its checkpoint of step 30", reused="abc123")
    table = closing_table(make_result("distill", rows=[begun, make_row("teacher", attempt=2)]))
    assert (
        re.findall(r"^teacher.*? (done|assessed|KILLED|killed|reused) ", table, re.MULTILINE)[-1]
        == "done"
    )
    assert "assessed" not in table


def test_every_null_has_its_reason_below_and_each_reason_once() -> None:
    rows = [
        make_row("fp32", serving={}),
        make_unfinished("bf16", "FAILED", "diverged at step 12"),
        make_unfinished("tf32", "SKIPPED", "no TF32 here"),
    ]
    text = closing_table(make_result("mixed_precision", rows=rows))
    table, below = text.split("device-hours (1 CPU host)")
    marks = set(re.findall(r"\[\d+\]", table))
    reasons = dict(re.findall(r"^(\[\d+\]) (.+)$", below, re.MULTILINE))
    assert marks == set(reasons)
    assert {"diverged at step 12", "no TF32 here"} <= set(reasons.values())
    assert len(set(reasons.values())) == len(reasons)
    assert not re.search(r"-(?!\[|-|\w)", table.split("\n", 6)[-1])  # no bare dash without a mark


def test_status_words() -> None:
    rows = [
        make_unfinished(arm, status, "why")
        for arm, status in (
            ("teacher", "SKIPPED"),
            ("student", "FAILED"),
            ("control_steps", "KILLED"),
        )
    ]
    cells = _cells(make_result("distill", rows=rows))
    assert [cells[arm][0] for arm in cells] == ["skipped[1]", "FAILED[1]", "KILLED[1]"]


def test_savings_name_their_base_and_mark_what_is_not_decided() -> None:
    pairs = [
        make_pair("bf16", "fp32", training=make_saving(0.41)),
        make_pair("tf32", "fp32", training=make_saving(0.01, 0.05)),
        make_pair("fp16", "bf16", training=make_saving(-0.12)),
        # a second base: the first comparison stands
        make_pair("bf16", "fp16", training=make_saving(0.9)),
    ]
    result = make_result("mixed_precision", comparisons=pairs)
    cells = _cells(result)
    assert [cells[arm][-1] for arm in ("bf16", "tf32", "fp16")] == ["+41%", "+1%?", "-12%"]
    assert "train: bf16, tf32 against fp32; train: fp16 against bf16" in " ".join(
        closing_table(result).split()
    )


def test_a_recipe_without_savings_has_no_such_columns() -> None:
    assert "saved" not in closing_table(make_result("baseline"))
    quality_only = [make_pair("int8", "reference", quality=make_quality(0.02, "better"))]
    assert "saved" not in closing_table(make_result("quantize", comparisons=quality_only))


def test_two_seeds_are_two_rows_and_the_saving_stands_once() -> None:
    rows = [make_row(arm, seed=seed) for seed in (0, 1) for arm in ARMS["distill"]]
    result = make_result("distill", rows=rows)
    text, cells = closing_table(result), _cells(result)
    assert _no_wider_than_80(text)
    assert len(cells) == 8
    assert cells["student s0"][-1] == "+40%"
    assert cells["student s1"][-1] == "0.600"


def test_what_a_saving_of_several_seeds_speaks_of_is_said() -> None:
    rows = [make_row(arm, seed=seed) for seed in (2, 0, 1) for arm in ARMS["distill"]]
    for row in rows:
        row["serving"] = (
            row["serving"] if row["seed"] == 2 else {"device_s_per_1k_units": null("of seed 2")}
        )
    said = "train is the geometric mean of 3 seeds, serve is seed 2's, each is shown once per arm"
    assert said in " ".join(closing_table(make_result("distill", rows=rows)).split())
    assert "seeds" not in closing_table(make_result("distill"))
    rows = [make_row(arm, seed=seed) for seed in (0, 1) for arm in ARMS["mixed_precision"]]
    text = " ".join(closing_table(make_result("mixed_precision", rows=rows)).split())
    assert "train is the geometric mean of 2 seeds, shown once per arm)" in text


def test_the_level_of_the_intervals_is_stated() -> None:
    assert "? its 90% interval holds both signs" in " ".join(
        closing_table(make_result("distill")).split()
    )


def test_attempts_are_told_apart() -> None:
    rows = [make_unfinished("baseline", "FAILED", "diverged"), make_row("baseline", attempt=2)]
    assert list(_cells(make_result("baseline", rows=rows))) == ["baseline #1", "baseline #2"]


@pytest.mark.parametrize(
    "name",
    ["a|b", "two\nlines", "x" * 300, "\x1b[31mred\x1b[0m", "模型" * 40, "a_very_long_name" * 3],
)
def test_hostile_names_keep_the_width(name: str) -> None:
    rows = [
        make_row("fp32"),
        make_row(name),
        make_unfinished(f"{name}2", "FAILED", f"{name} {name}"),
    ]
    pairs = [make_pair(name, "fp32", training=make_saving(-3.4, 9), serving=make_saving(0.9996))]
    text = closing_table(make_result("mixed_precision", rows=rows, comparisons=pairs))
    assert _no_wider_than_80(text)
    assert "\x1b" not in text
    assert len(re.findall(r"^\S.*(?:done|FAILED\[)", text, re.MULTILINE)) == 3


def test_the_widest_figures_still_fit() -> None:
    rows = []
    for number in range(12):  # every cell a null of its own, two-digit marks
        row = make_unfinished(f"stage_number_{number}_of_many", "SKIPPED", f"reason {number}")
        row["ledger"]["device_hours"]["attached"] = null(f"time {number}")
        rows.append(row)
    pairs = [
        make_pair(row["arm"], "base", training=make_saving(-12.34, 99), serving=None)
        for row in rows
    ]
    text = closing_table(make_result("mixed_precision", rows=rows, comparisons=pairs))
    assert _no_wider_than_80(text)
    assert len({line.split()[0] for line in text.splitlines() if "skipped[" in line}) == 12


def test_a_run_that_measured_no_stage_still_closes() -> None:
    text = closing_table(make_result("distill", rows=[], status="FAILED", why="no data"))
    assert "(no stage was measured)" in text
    assert "run total 9.00 min = work 0.00 + assess 0.00 + retry 0.00 + compare 6.00" in " ".join(
        text.split()
    )
    assert "saved" not in text


def test_money_of_the_run_stands_below_the_table() -> None:
    result = make_result(
        "distill", rows=[make_row("teacher"), make_row("student"), make_row("old", reused="r0")]
    )
    for row, amount, joules in zip(
        result["rows"], (1.5, 2.53, 9.0), (12_000, 2_760, 9e9), strict=True
    ):
        row["ledger"]["cost"] = {
            "amount": value(amount, "estimated"),
            "currency": "EUR",
            "facility_energy_j": value(joules, "declared"),
        }
    told = {
        "device_hours": null("not reached yet: best accuracy 0.6 of 0.7"),
        "amount": null("-"),
        "currency": None,
        "run": None,
    }
    result["run"]["per_converged_model"] = told
    assert money_lines(result) == [
        "cost of the stages made here 4.03 EUR",
        "facility energy of the stages made here 14.8 kJ",
        "its model has not converged: not reached yet: best accuracy 0.6 of 0.7",
    ]
    text = closing_table(result)
    assert all(line in text.splitlines() for line in money_lines(result))
    told |= {"device_hours": value(2.0), "amount": null("1 device-hours have no rate"), "run": "r3"}
    took = (
        "until its model converged: 2.00 h of device time, cost unknown (1 device-hours have no"
        " rate)"
    )
    assert money_lines(result)[-1] == f"{took}; reached in run r3"
    rate = {"per_device_hour": 2.5, "kind": "rented", "source": "price list", "date": "2026-11-01"}
    cost = {
        "amount": value(4.5, "estimated"),
        "currency": "EUR",
        "rate": rate,
        "basis": "attached hours",
    }
    result["run"]["cost"] = cost
    said = (
        "cost of this run 4.50 EUR: 2.50 EUR per device-hour (rented, price list, 2026-11-01) x"
        " attached hours"
    )
    assert money_lines(result)[0] == said
    cost["amount"] = null("0.5 device-hours were charged at no rate")
    assert (
        "cost of this run - (0.5 device-hours were charged at no rate): 2.50 EUR"
        in money_lines(result)[0]
    )
    result["rows"][0]["ledger"]["cost"]["amount"] = null("no rate declared")
    # a part is not shown as the whole
    assert not any("cost of the stages" in line for line in money_lines(result))


def test_where_nobody_declared_anything_there_is_no_word_of_money() -> None:
    assert money_lines(make_result("distill")) == []
    old = make_result("distill", rows=[make_row("teacher")])
    del old["rows"][0]["ledger"]["cost"]["facility_energy_j"]
    assert money_lines(old) == []
    jsonschema.validate(old, RESULT_SCHEMA)


def test_small_parts_of_the_sum_do_not_read_as_zero() -> None:
    result = make_result("baseline")
    result["run"]["device_hours"]["retry"] = value(0.5 / 3600)
    result["run"]["device_hours"]["compare"] = null("no comparison pass")
    text = closing_table(result)
    assert "retry <0.1" in text
    assert "compare -[1]" in text
    assert "[1] no comparison pass" in text
