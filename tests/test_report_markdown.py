"""report.md, read back with an independent Markdown reader."""

from __future__ import annotations

import re

import jsonschema
import pytest
from make_result import (
    ARMS,
    make_ledger,
    make_pair,
    make_quality,
    make_result,
    make_row,
    make_saving,
    make_unfinished,
    null,
    value,
)
from markdown_it import MarkdownIt
from markdown_it.token import Token
from reports import markdown, short_form

from pipeline.ledger.metrics import BY_KEY
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.report.conclusion import conclude

HOSTILE = [
    "a|b",
    "two\nlines",
    "\x1b[31mred\x1b[0m",
    "# head",
    "`tick`",
    "<b>x</b>",
    "[l](http://u)",
    "x" * 400,
]


def _parse(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def _text(token: Token) -> str:
    return "".join(child.content for child in token.children or [])


def _tables(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of the table under each heading, cells as a reader shows them."""
    tables: dict[str, list[list[str]]] = {}
    title, in_cell = "", False
    tokens = _parse(text)
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            title = _text(tokens[number + 1])
        elif token.type == "table_open":
            tables[title] = []
        elif token.type == "tr_open":
            tables[title].append([])
        in_cell = token.type in ("th_open", "td_open") or (in_cell and token.type == "inline")
        if token.type == "inline" and in_cell:
            tables[title][-1].append(_text(token))
    return tables


def _headings(text: str) -> list[str]:
    tokens = _parse(text)
    return [
        _text(tokens[number + 1])
        for number, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


@pytest.mark.parametrize("recipe", list(ARMS))
def test_question_and_conclusion_come_first(recipe: str) -> None:
    result = make_result(recipe)
    text = markdown(result)
    paragraphs = [_text(token) for token in _parse(text) if token.type == "inline"]
    assert paragraphs[:3] == [
        f"{recipe}: FINISHED",
        "Question. is it worth it?",
        f"Conclusion. {conclude(result)['verdict']}",
    ]


def test_sections_come_in_a_reviewers_order() -> None:
    rows = [make_row("teacher", reused="abc123"), *(make_row(arm) for arm in ARMS["distill"][1:])]
    assert _headings(markdown(make_result(rows=rows)))[1:] == [
        "Comparisons",
        "Arms",
        "Where the time went",
        "Waste by cause",
        "What would change this answer",
        "What else used the machine",
        "Notes",
        "Why a figure is missing",
        "Device and environment",
        "What the figures mean",
        "How to reproduce",
    ]


def test_arms_carry_figures_and_intervals() -> None:
    table = _tables(markdown(make_result("distill")))["Arms"]
    assert [row[0] for row in table[1:]] == list(ARMS["distill"])
    assert table[2] == ["student", "done", "22.0 min", "410 k", "2.272 [2.252, 2.292]", "0.600"]


def test_comparisons_carry_interval_n_margin_and_answer() -> None:
    result = make_result("distill")
    result["comparisons"][2]["serving"]["blocks"] = 4
    result["comparisons"][2]["payback"]["p_net_positive"] = value(0.93, "estimated")
    jsonschema.validate(result, RESULT_SCHEMA)
    table = _tables(markdown(result))["Comparisons"][1:]
    compute, steps = ["student", "control_compute"], ["student", "control_steps"]
    assert table[0] == [*compute, "bits per byte", "-10%", "[-10.4%, -9.6%]", "520", "1%", "worse"]
    assert table[1] == [*compute, "training saving", "-[1]", "", "", "", ""]
    assert table[2] == [*steps, "bits per byte", "+2%", "[+1.6%, +2.4%]", "520", "1%", "better"]
    assert table[4] == ["student", "teacher", "serving saving", "+40%", "[+38%, +42%]", "4", "", ""]
    assert table[5] == [
        "student",
        "teacher",
        "payback",
        "3 M tokens",
        "",
        "",
        "",
        "P(net > 0) = 93%",
    ]


def test_a_training_saving_shows_what_it_is_made_of() -> None:
    more = {
        "systems": value(0.3),
        "algorithmic": null("FLOPs unknown"),
        "c_arm": value(0.5),
        "c_opt": value(0.25),
    }
    pair = make_pair("bf16", "fp32", training={**make_saving(0.41), **more})
    result = make_result("mixed_precision", comparisons=[pair])
    jsonschema.validate(result, RESULT_SCHEMA)
    text = markdown(result)
    figures = {row[2]: row[3] for row in _tables(text)["Comparisons"][1:]}
    assert figures == {
        "training saving": "+41%",
        "training: systems part": "+30%",
        "training: algorithmic part": "-[1]",
        "training: C(arm)": "30.0 min",
        "training: C_opt": "15.0 min",
    }
    assert "FLOPs unknown" in text


def test_accuracy_differs_by_points() -> None:
    pair = make_pair("int8", "reference", quality=make_quality(-0.012, "worse", key="accuracy"))
    table = _tables(markdown(make_result("quantize", comparisons=[pair])))["Comparisons"]
    assert table[1][2:5] == ["accuracy", "-1.2 points", "[-1.6 points, -0.8 points]"]


def test_the_time_of_a_stage_is_shown_by_class_cause_and_phase() -> None:
    row = make_row("baseline")
    row["ledger"]["phases_ns"]["log"] = 1  # too small for a share of its own
    table = _tables(markdown(make_result("baseline", rows=[row])))["Where the time went"]
    phases = "forward 45%, backward 35%, eval 15%, data_wait 5%, rest 0%"
    assert table[1] == ["baseline", "80%", "15%", "5%", "data_wait 36.0 s", phases]


def test_every_null_has_its_reason() -> None:
    rows = [
        make_row("fp32", serving={}),
        make_unfinished("bf16", "FAILED", "diverged"),
        make_unfinished("tf32", "SKIPPED", "no TF32 here"),
    ]
    pairs = [make_pair(arm, "fp32", quality={}, training=None) for arm in ("bf16", "tf32", "fp16")]
    result = make_result("mixed_precision", rows=rows, comparisons=pairs)
    text = markdown(result)
    marks = {
        mark
        for table in _tables(text).values()
        for row in table
        for cell in row
        for mark in re.findall(r"-(\[\d+\])", cell)
    }
    items = [_text(token) for token in _parse(text) if token.type == "inline"]
    reasons = dict(item.split(" ", 1) for item in items if re.match(r"\[\d+\] ", item))
    assert marks == set(reasons)
    assert {"diverged", "no TF32 here", "tf32 was skipped: no TF32 here", "fp16 did not run"} < set(
        reasons.values()
    )
    read_on = {
        (row[0], row[2]): reasons[row[3].removeprefix("-")]
        for row in _tables(text)["Comparisons"][1:]
    }
    assert read_on["fp16", "training saving"] == read_on["fp16", "quality"] == "fp16 did not run"
    assert len(read_on) == 6


def test_notes_name_what_a_reader_must_know() -> None:
    rows = [
        make_row("fp32", reused="abc123"),
        make_unfinished("bf16", "SKIPPED", "no bf16"),
        make_row("tf32"),
    ]
    rows[2]["ledger"] |= {"meter_valid": False, "meter_problems": ["phases miss 3 s"]}
    environment = {"notes": ["smoke: 20 documents"]}
    result = make_result(
        "mixed_precision", rows=rows, environment=environment, status="FAILED", why="disk full"
    )
    result["run"]["attempts"] = 3
    text = markdown(result)
    for note in (
        "FAILED: disk full",
        "fp32 reused from run abc123: spent 0 here",
        "bf16 was skipped: no bf16",
        "tf32: the meter says phases miss 3 s",
        "tf32: its figures do not reconcile",
        "the run took 3 attempts",
        "smoke: 20 documents",
    ):
        assert f"- {note}" in text


def test_a_reused_row_spends_nothing() -> None:
    table = _tables(
        markdown(make_result("baseline", rows=[make_row("baseline", reused="abc123")]))
    )["Arms"]
    assert table[1][1:3] == ["reused", "spent 0, reused 12.0 min"]


def test_every_figure_shown_is_defined() -> None:
    text = markdown(make_result("distill"))
    definitions = text.split("## What the figures mean")[1]
    for key in (
        "compute/device_hours",
        "compute/tokens",
        "quality/bits_per_byte",
        "serving/device_s_per_1k_units",
        "savings/training",
        "savings/serving",
        "savings/payback_units",
        "compute/wasted_device_hours",
    ):
        assert f"- `{key}` (" in definitions
        assert BY_KEY[key].meaning in definitions
    assert "compute/gpu_hours" not in definitions
    assert "- `compute/gpu_hours` (GPU-h): " in markdown(make_result("distill", gpu=True))


def test_energy_money_and_weights_are_shown_where_there_are_any() -> None:
    row, other = make_row("baseline"), make_row("other")
    row["ledger"]["energy_j"] = value(12_300)
    row["ledger"]["cost"] = {
        "amount": value(1.5, "declared"),
        "currency": "USD",
        "facility_energy_j": value(14_760, "declared"),
    }
    row["serving"]["weights_bytes"] = value(4_200_000)
    text = markdown(make_result("baseline", rows=[row, other]))
    head, first, second = _tables(text)["Arms"]
    assert head[6:] == ["weights", "energy", "facility energy", "cost"]
    assert first[6:] == ["4.2 MB", "12.3 kJ", "14.8 kJ", "1.50 USD"]
    assert all(cell.startswith("-[") for cell in second[6:])
    assert "`cost/amount`" in text


def test_what_traced_steps_show_has_a_section_of_its_own() -> None:
    result = make_result("baseline", gpu=True)
    assert "traced steps" not in markdown(result)
    shares = {
        "busy": 0.8,
        "compute": 0.7,
        "comm_exposed": 0.0,
        "copy_exposed": 0.1,
        "idle_host_wait": 0.15,
        "idle_launch_gap": 0.05,
        "idle_other": 0.0,
    }
    result["rows"][0]["ledger"]["gpu_timeline"] = {
        **{name: value(share) for name, share in shares.items()},
        "traced_steps": value(3),
        "phases_s": {},
        "traces": ["step-000011.json.gz"],
        "notes": [],
    }
    text = markdown(result)
    assert "| baseline | 3 | 80% | 70% | 0% | 10% | 15% | 5% | 0% |" in text
    assert "compute/traced_idle_host_wait_share" in text


def test_what_the_model_took_until_it_converged_stands_below_the_arms() -> None:
    result = make_result("baseline")
    told = {
        "device_hours": value(2.0),
        "amount": value(4.03, "estimated"),
        "currency": "EUR",
        "run": "r3",
    }
    result["run"]["per_converged_model"] = told
    text = markdown(result)
    assert "Until its model converged: 2.00 h of device time, 4.03 EUR; reached in run r3." in text
    assert (
        "`compute/per_converged_model_device_hours` (device-h): all runs under one model.name"
        in text
    )
    result["run"]["per_converged_model"] = {
        **told,
        "device_hours": null("no quality declared: cost.converged_at"),
    }
    assert "converged" not in markdown(result)


def test_the_command_is_shown_as_it_was() -> None:
    command = "python -m pipeline recipe=distill 'model.path=a|b' ```"
    tokens = _parse(markdown(make_result(environment={"command": command, "notes": []})))
    assert [token.content for token in tokens if token.type == "code_block"] == [f"{command}\n"]
    assert "How to reproduce" not in markdown(make_result(environment={"notes": []}))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_break_no_table(name: str) -> None:
    rows = [make_row("fp32"), make_row(name), make_unfinished(f"{name}2", "FAILED", name)]
    pairs = [
        make_pair(name, "fp32", quality=make_quality(0.02, "better"), training=null(name, ci=None))
    ]
    result = make_result("mixed_precision", rows=rows, comparisons=pairs) | {
        "question": name,
        "recipe": name,
        "run_id": name,
        "device": {"kind": "cuda", "name": name, "count": 1},
        "environment": {"torch": name, f"{name}2": name, "notes": [name]},
    }
    text = markdown(result)
    tables = _tables(text)
    assert [len(table) for table in tables.values()] == [3, 4, 3, 5, 4, 4]
    assert all(len(row) == len(table[0]) for table in tables.values() for row in table)
    allowed = {"text", "strong_open", "strong_close", "code_inline"}
    assert {child.type for token in _parse(text) for child in token.children or []} <= allowed
    assert "html_block" not in {token.type for token in _parse(text)}
    assert len(_headings(text)) == 10
    assert "\x1b" not in text


def test_two_seeds_are_two_rows_each() -> None:
    rows = [make_row(arm, seed=seed) for seed in (0, 1) for arm in ARMS["quantize"]]
    tables = _tables(markdown(make_result("quantize", rows=rows)))
    assert [row[0] for row in tables["Arms"][1:]] == [
        f"{arm} s{seed}" for seed in (0, 1) for arm in ARMS["quantize"]
    ]


def test_a_run_without_any_finished_row_still_reports() -> None:
    nothing = markdown(make_result("distill", rows=[], status="FAILED", why="no data"))
    assert "No stage was measured: the run ended FAILED: no data." in nothing
    assert "- FAILED: no data" in nothing
    skipped = [make_unfinished(arm, "SKIPPED", "no device") for arm in ARMS["distill"]]
    text = markdown(make_result("distill", rows=skipped))
    assert "Where the time went" not in text
    assert text.count("was skipped: no device") >= 4


def test_a_stage_that_failed_before_anything_was_measured_is_named_with_its_reason() -> None:
    """A row of zeros: the stage's window had not opened when its data was refused."""
    row = make_unfinished("teacher", "FAILED", "data.path: holds chats")
    row["ledger"] |= {"device_hours": make_ledger(0, 0)["device_hours"], "wall_s": value(0)}
    result = make_result(
        "distill", rows=[row], comparisons=[], status="FAILED", why="data.path: holds chats"
    )
    jsonschema.validate(result, RESULT_SCHEMA)
    text = markdown(result)
    tables = _tables(text)
    assert tables["Arms"][1][:3] == ["teacher", "FAILED", "0 s"]
    assert tables["Where the time went"][1] == [
        "teacher",
        "0%",
        "0%",
        "0%",
        "nothing",
        "no phase recorded",
    ]
    assert "teacher FAILED: data.path: holds chats." in text


def test_the_levels_of_the_intervals_are_stated() -> None:
    text = markdown(make_result("distill"))
    tables = _tables(text)
    assert tables["Arms"][0][4] == "bits per byte (lower better) [95% interval]"
    assert tables["Comparisons"][0][4] == "90% interval"
    assert "Each end of a 90% interval is a one-sided 95% bound" in text


def test_n_is_explained_for_one_seed_and_for_several() -> None:
    text = markdown(make_result("distill"))
    assert "n counts test documents, of serving blocks of four readings." in text
    rows = [make_row(arm, seed=seed) for seed in (0, 1, 2) for arm in ARMS["distill"]]
    for row in rows[4:]:
        row["serving"] = {
            "device_s_per_1k_units": null("serving is measured on the artifacts of seed 0")
        }
    pair = make_pair("student", "teacher", training=make_saving(0.1), serving=make_saving(0.4))
    pair["serving"]["blocks"] = 4
    text = markdown(make_result("distill", rows=rows, comparisons=[pair]))
    assert "Each figure stands once for all 3 seeds" in text
    assert "n counts the seeds" in text
    assert "serving is read on the artifacts of seed 0, and its n counts blocks." in text
    assert [row[5] for row in _tables(text)["Comparisons"][1:]] == ["3", "4"]


def test_serving_is_shown_at_every_batch_where_it_was_read() -> None:
    assert "Serving" not in _headings(markdown(make_result("distill")))
    rows = [make_row("reference"), make_row("int8"), make_row("nf4")]
    rows[0]["serving"] |= {
        "prefill_device_s_per_1k_tokens": value(0.1),
        "decode_device_s_per_1k_tokens": value(0.9),
        "p50_s": value(0.2),
        "p95_s": value(0.25),
        "peak_bytes": null("a CPU has no device memory to count"),
        "weights_bytes": value(4e6),
        "batch_32_device_s_per_1k_units": value(0.25),
        "batch_1_device_s_per_1k_units": value(4.0),
        "batch_8_device_s_per_1k_units": value(1.0),
    }
    rows[1]["serving"] |= {"batch_8_device_s_per_1k_units": value(0.5)}
    rows[2]["serving"] = {
        "device_s_per_1k_units": null("the recipe does not compare this arm on serving")
    }
    result = make_result("quantize", rows=rows)
    jsonschema.validate(result, RESULT_SCHEMA)
    text = markdown(result)
    table = _tables(text)["Serving"]
    mark = next(cell for cell in table[2] if cell.startswith("-"))
    assert table == [
        ["arm", "prefill", "decode", "p50", "p95", "batch 1", "batch 8", "batch 32"],
        [
            "reference",
            "0.100",
            "0.900",
            "0.200 s",
            "0.250 s",
            "4.00 (250)",
            "1.00 (1 k)",
            "0.250 (4 k)",
        ],
        ["int8", *[mark] * 5, "0.500 (2 k)", mark],
    ]
    assert "device-seconds per 1,000 tokens (tokens per device-second in brackets)" in text
    for key in (
        "serving/prefill_device_s_per_1k_tokens",
        "serving/decode_device_s_per_1k_tokens",
        "serving/p95_s",
    ):
        assert f"- `{key}` (" in text


def test_the_short_form_ends_at_a_line_and_keeps_the_limit() -> None:
    rows = [make_row(arm, seed=seed) for seed in range(20) for arm in ARMS["full"]]
    result = make_result("full", rows=rows)
    whole = markdown(result)
    for limit in (8000, 1700, 3217):
        short = short_form(result, limit)
        kept = short[: short.index("\n*(cut here")]
        assert len(short) <= limit
        assert whole.startswith(kept)
        assert kept.endswith("\n")
        assert len(short) > limit - 700
    assert short_form(result).startswith("# full: FINISHED\n\n**Question.**")


def test_a_report_that_fits_is_not_cut() -> None:
    result = make_result("baseline")
    whole = short_form(result, 10_000)
    assert short_form(result, len(whole)) == whole
    assert _headings(whole)[1:] == ["Arms", "How to reproduce"]
    assert short_form(result, 10) == whole[:10]
