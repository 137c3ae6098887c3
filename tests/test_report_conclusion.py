"""The conclusion: a verdict line and one answer a bullet, with better, worse, equal, undecided and
null arms.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from forked import run
from make_golden import COMMON
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
from markdown_it import MarkdownIt

from pipeline.ledger.values import from_schema_1
from pipeline.report.conclusion import conclude, turned
from pipeline.report.phrases import difference, evidence
from pipeline.report.roles import arm_word
from pipeline.report.text import conclusion_lines, conclusion_markdown

RECIPES = Path(__file__).parents[1] / "recipes"
NEVER = null("never: not cheaper", unit="token")
CENSORED = null("censored: not reached in 200 steps", ci=None)


def _answers(result: dict[str, Any]) -> str:
    """Return the answers of a conclusion as one text."""
    return " ".join(conclude(result)["answers"])


def _with(recipe: str, *pairs: dict[str, Any], **changes: Any) -> str:
    return _answers(make_result(recipe, comparisons=list(pairs), **changes))


def _distill(
    compute: dict[str, Any], steps: dict[str, Any], serving: dict[str, Any], payback: dict[str, Any]
) -> str:
    teacher = make_pair(
        "student", "teacher", quality=make_quality(-0.1, "worse"), serving=serving, payback=payback
    )
    return _with(
        "distill",
        make_pair("student", "control_steps", quality=steps),
        teacher,
        make_pair("student", "control_compute", quality=compute, training=CENSORED),
    )


def test_distill_that_lost_to_its_compute_control() -> None:
    # The control's bits are 1 / 1.1 of the student's: 9.1% fewer; serving at 1 - 0.706 = 0.294 of
    # the cost is 3.4x.
    text = _distill(
        make_quality(-0.1, "worse"),
        make_quality(0.021, "better"),
        make_saving(0.706),
        value(1.2e6, unit="token"),
    )
    assert text == (
        "Given the same FLOPs without a teacher (the control with equal compute), the same model"
        " reaches 9.1% fewer bits per byte than the distilled student (the student's -10%, 90%"
        " interval -10.4% to -9.6% over 520 test documents). Training saving not measurable here:"
        " censored: not reached in 200 steps. At equal tokens (the control with equal tokens)"
        " distillation adds 2.1% (fewer bits per byte, 90% interval +1.7% to +2.5% over 520 test"
        " documents). Against its teacher, the student needs 10% more bits per byte, serves 3.4x"
        " cheaper and has paid for itself after 1.2 M tokens. One seed."
    )


def test_distill_that_won_against_its_compute_control() -> None:
    text = _distill(
        make_quality(0.05, "better"), make_quality(-0.03, "worse"), make_saving(-0.12), NEVER
    )
    assert text.startswith(
        "Given the same FLOPs without a teacher (the control with equal compute), the same model"
        " needs 5.3% more bits"
    )
    assert "distillation costs 3% (more bits per byte, 90% interval -3.4% to -2.6% over" in text
    assert "costs 12% more to serve and never pays back (not cheaper)" in text
    assert "serves" not in text
    assert "paid for itself" not in text


def test_distill_undecided_gives_its_intervals() -> None:
    undecided = make_quality(-0.004, "undecided", half=0.014)
    text = _distill(undecided, undecided, make_saving(0.005, half=0.025), value(9e7, unit="token"))
    interval = "quality -0.4%, 90% interval -1.8% to +1%, margin 1%)"
    assert text.startswith(
        "Given the same FLOPs without a teacher (the control with equal compute), whether the same"
        " model does better"
    )
    assert text.count(interval) == 2
    assert f"better than the distilled student is undecided (the student's {interval}" in text
    assert "what distillation adds is undecided" in text
    assert "is undecided in serving cost (saving +0.5%, 90% interval -2% to +3%)" in text
    assert "would pay back after 90 M tokens if the point estimate of its saving held" in text
    assert "has paid" not in text


def test_what_too_few_documents_leave_undecided_says_how_many_might_decide() -> None:
    """Ten documents decide nothing, even where their interval lies beyond the margin."""
    (figure,) = make_quality(-0.084, "undecided").values()
    few = {"bits_per_byte": {**figure, "n": 10, "items_to_decide": 20}}
    text = _distill(few, few, make_saving(0.1), NEVER)
    assert text.count("margin 1%, 10 test documents where 20 might decide)") == 2


def test_the_margin_of_a_share_is_in_points() -> None:
    (undecided,) = make_quality(0.067, "undecided", key="accuracy", half=0.2).values()
    assert (
        evidence("accuracy", undecided)
        == "quality +6.7 points, 90% interval -13.3 to +26.7 points, margin 1 point"
    )


def test_distill_within_the_margin_of_its_controls() -> None:
    equal = make_quality(0.002, "equal")
    text = _distill(equal, equal, make_saving(0.1), value(0, unit="token"))
    expected = (
        "the same model does as well as the distilled student, within the margin of 1% (the"
        " student's quality +0.2%)"
    )
    assert expected in text
    assert (
        "At equal tokens (the control with equal tokens) distillation changes nothing beyond the"
        " margin of 1%" in text
    )
    assert "serves 10% cheaper and pays back from the first token" in text


@pytest.mark.parametrize(
    ("side", "role"),
    [
        ("control_compute", "the control with equal compute"),
        ("student", "the student"),
        ("control_steps", "the control with equal tokens"),
    ],
)
def test_a_missing_arm_is_named_once_with_its_reason(side: str, role: str) -> None:
    rows = [
        make_row(arm) if arm != side else make_unfinished(arm, "FAILED", "diverged")
        for arm in ARMS["distill"]
    ]
    text = _answers(make_result("distill", rows=rows))
    assert text.count(f"{role} FAILED: diverged") == 1
    assert "not measurable here" in text
    if side != "control_steps":
        assert text.startswith("The student against the control with equal compute: not measur")


def test_a_control_with_other_flops_or_tokens_is_not_called_equal() -> None:
    rows = [make_row(arm) for arm in ARMS["distill"]]
    rows[2]["ledger"]["counts"]["tokens"] = value(204_800)  # control_steps: half of the student's
    # control_compute: 0.8 of the student's
    rows[3]["ledger"]["counts"]["model_flops"] = value(8e12)
    text = _answers(make_result("distill", rows=rows))
    assert text.startswith("Given 0.80x the FLOPs without a teacher")
    assert "At 0.50x the tokens (the control with equal tokens)" in text


@pytest.mark.parametrize(
    ("quality", "serving", "payback", "expected"),
    [
        (
            make_quality(0.002, "equal"),
            make_saving(0.3),
            value(3e6, unit="token"),
            (
                "keeps the quality within the margin of 1% (+0.2%), serves 30% cheaper and has paid"
                " for itself after 3 M tokens"
            ),
        ),
        (
            make_quality(-0.05, "worse"),
            make_saving(-0.12),
            NEVER,
            (
                "needs 5% more bits per byte, costs 12% more to serve and never pays back (not"
                " cheaper)"
            ),
        ),
        (
            make_quality(0.05, "better"),
            make_saving(-2.4),
            NEVER,
            (
                "reaches 5% fewer bits per byte, costs 3.4x as much to serve and never pays back"
                " (not cheaper)"
            ),
        ),
        (
            make_quality(0.001, "undecided", half=0.02),
            make_saving(-0.01, half=0.03),
            NEVER,
            (
                "is undecided in quality (quality +0.1%, 90% interval -1.9% to +2.1%, margin 1%),"
                " is undecided in serving cost (saving -1%, 90% interval -4% to +2%) and would not"
                " pay back if the point estimate of its saving held"
            ),
        ),
        (
            make_quality(0.002, "equal"),
            make_saving(0.0, None),
            value(3e6, unit="example"),
            (
                "serves at the same cost (point estimate, no interval) and has paid for itself"
                " after 3 M examples"
            ),
        ),
    ],
)
def test_quantize_in_every_sign(
    quality: dict[str, Any], serving: dict[str, Any], payback: dict[str, Any], expected: str
) -> None:
    pair = make_pair("int8", "reference", quality=quality, serving=serving, payback=payback)
    text = _with("quantize", pair)
    assert text.startswith("Against the unquantized model, int8 ")
    assert expected in text


def test_a_training_cost_says_which_other_stages_it_holds() -> None:
    text = _with(
        "distill", make_pair("student", "control_compute", training=make_saving(-2.4, None))
    )
    assert (
        "3.4x as many device-hours to be as good on validation (within the margin), teacher"
        " included (point estimate" in text
    )
    text = _with("full", make_pair("student_int8", "baseline", training=make_saving(0.0, 0.05)))
    assert "is undecided in training cost, teacher and student included (saving" in text
    text = _with("full", make_pair("student_int8", "student", training=make_saving(0.4)))
    assert "for 40% fewer device-hours." in text


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (
            make_saving(0.41),
            "is as good on validation (within the margin) for 41% fewer device-hours.",
        ),
        (make_saving(0.41, None), "for 41% fewer device-hours (point estimate, no interval)"),
        (
            make_saving(-0.12),
            "costs 12% more device-hours to be as good on validation (within the margin)",
        ),
        (
            make_saving(-2.4),
            "costs 3.4x as many device-hours to be as good on validation (within the margin)",
        ),
        (make_saving(0.0, None), "for the same device-hours"),
        (
            make_saving(0.01, 0.05),
            "is undecided in training cost (saving +1%, 90% interval -4% to +6%)",
        ),
        (CENSORED, "Training saving not measurable here: censored: not reached in 200 steps"),
        (None, "Training saving not measurable here: not recorded"),
    ],
)
def test_mixed_precision_in_every_sign(training: dict[str, Any] | None, expected: str) -> None:
    text = _with(
        "mixed_precision",
        make_pair("bf16", "fp32", quality=make_quality(0.001, "equal"), training=training),
    )
    assert text.startswith("Against fp32, bf16 keeps the quality within the margin of 1%")
    assert expected in text


def test_skipped_precisions_are_named_with_their_reason() -> None:
    rows = [
        make_row("fp32"),
        make_row("bf16"),
        make_unfinished("tf32", "SKIPPED", "no TF32 on this device"),
        make_unfinished("fp16", "KILLED", "preempted"),
    ]
    text = _answers(make_result("mixed_precision", rows=rows))
    assert (
        "tf32 against fp32: not measurable here: tf32 was skipped: no TF32 on this device" in text
    )
    assert "fp16 was killed: preempted" in text
    assert "tf32 trains" not in text


def test_a_skipped_stage_that_no_comparison_speaks_of_is_named() -> None:
    rows = [make_row("fp32"), make_row("bf16"), make_unfinished("fp16", "SKIPPED", "no scaler")]
    pair = make_pair("bf16", "fp32", quality=make_quality(0.001, "equal"))
    assert _with("mixed_precision", pair, rows=rows).endswith(
        "fp16 was skipped: no scaler. One seed."
    )


def test_full_says_each_arm_against_its_base() -> None:
    text = _answers(make_result("full"))
    assert text.count("Against baseline, ") == 3
    for part in (
        "the teacher keeps",
        "for 41% fewer",
        "the student needs",
        "3.3x cheaper",
        "costs 3.4x as much to serve",
    ):
        assert part in text


def test_every_comparison_is_an_answer_of_its_own_with_its_base() -> None:
    unmeasured = make_pair("int8", "reference", serving=null("no counter", ci=None))
    nf4 = make_pair("nf4", "reference", serving=make_saving(0.3))
    said = conclude(make_result("quantize", comparisons=[unmeasured, nf4]))
    assert said["answers"] == [
        "int8 against the unquantized model: serving saving not measurable here: no counter.",
        "Against the unquantized model, nf4 serves 30% cheaper.",
        "One seed.",
    ]
    assert said["verdict"] == "int8 could not be compared in serving cost."


def test_without_anything_to_compare_the_primary_arm_is_stated() -> None:
    said = conclude(make_result("quantize", comparisons=[make_pair("int8", "reference")]))
    assert said["verdict"].startswith("int8 reaches 2.200 bits per byte (95% interval ")
    assert said["answers"][0].startswith("It took ")
    text = _with(
        "quantize", rows=[make_row("reference"), make_unfinished("int8", "FAILED", "no kernel")]
    )
    assert text == "int8: not measurable here: it FAILED: no kernel. One seed."


def test_baseline_states_cost_and_quality() -> None:
    said = conclude(make_result("baseline"))
    assert said["verdict"] == (
        "The model reaches 2.200 bits per byte (95% interval 2.180 to 2.220) on the test split."
    )
    assert said["answers"] == [
        "It took 12.0 min of device time on 1 CPU host and 410 k tokens of training.",
        "One seed.",
    ]


def _pruned(**changes: Any) -> dict[str, Any]:
    """Return a result of a pruned model beside its control; `changes` are of its row."""
    inputs = {"model": "reference", "teacher": "reference"}
    rows = [
        make_row("reference"),
        make_row("pruned", inputs=inputs, **{"word": "pruned model", **changes}),
        make_row("longer"),
    ]
    pairs = [
        make_pair("pruned", "longer", quality=make_quality(0.001, "equal"))
        | {"base_is": "compute_control"},
        make_pair("pruned", "reference", serving=make_saving(0.3)) | {"base_is": "teacher"},
    ]
    return make_result("distill", primary_arm="pruned", rows=rows, comparisons=pairs)


def test_an_arm_is_called_by_the_word_of_its_own_stage() -> None:
    said = conclude(_pruned())
    assert said["verdict"].startswith("The pruned model serves 30% cheaper than its teacher")
    assert said["answers"][0].startswith(
        "Against the control with equal compute, the pruned model keeps the quality within"
    )
    assert "student" not in str(said)
    assert "istill" not in str(said)
    both = _pruned()
    taught = {"model": "student_init", "teacher": "reference"}
    both["rows"].append(make_row("small", inputs=taught))  # beside it, the only student
    assert [arm_word(both, arm) for arm in ("pruned", "small")] == ["pruned model", "student"]
    # a result of a release that recorded no such word
    assert "the distilled student" in str(conclude(_pruned(word=None)))


def test_baseline_with_nulls_gives_their_reasons() -> None:
    row = make_row(
        "baseline", quality={"accuracy": null("no test split", ci=None, n=None, items=None)}
    )
    row["ledger"]["device_hours"]["attached"] = null("the clock stopped")
    text = _answers(make_result("baseline", rows=[row]))
    assert "has no accuracy: not measurable here: no test split" in text
    assert "Its cost: not measurable here: the clock stopped" in text


def test_a_reused_baseline_is_not_free() -> None:
    text = _answers(make_result("baseline", rows=[make_row("baseline", reused="abc123")]))
    assert (
        "It took 12.0 min of device time on 1 CPU host and 410 k tokens of training in run abc123,"
        " now reused" in text
    )


def test_accuracy_is_compared_in_points() -> None:
    pairs = [
        make_pair("int8", "reference", quality=make_quality(-0.012, "worse", key="accuracy")),
        make_pair("nf4", "reference", quality=make_quality(0.01, "better", key="accuracy")),
    ]
    rows = [make_row(arm, key="accuracy") for arm in ARMS["quantize"]]
    text = _with("quantize", *pairs, rows=rows)
    assert "int8 has 1.2 points lower accuracy" in text
    assert "nf4 has 1 point higher accuracy" in text


def test_distillation_of_a_classifier_adds_points() -> None:
    pair = make_pair(
        "student", "control_steps", quality=make_quality(0.015, "better", key="accuracy")
    )
    assert (
        "distillation adds 1.5 points (accuracy, 90% interval +1.1 to +1.9 points over 520"
        in _with("distill", pair)
    )


def test_what_distillation_added_is_said_over_seeds_where_there_are_several() -> None:
    rows = [make_row(arm, seed=seed) for seed in (0, 1, 2) for arm in ARMS["distill"]]
    pair = make_pair("student", "control_steps", quality=make_quality(0.02, "better"))
    said = _with("distill", pair, rows=rows)
    assert "(fewer bits per byte, 90% interval +1.6% to +2.4% over 3 seeds)" in said


@pytest.mark.parametrize(("arm", "base"), [(2.272, 2.067), (2.0, 2.5)])
def test_a_turned_difference_is_that_of_the_swapped_pair(arm: float, base: float) -> None:
    assert turned("bits_per_byte", 1 - arm / base) == pytest.approx(1 - base / arm)
    assert turned("accuracy", arm - base) == base - arm


def test_perplexity_and_agreement_read_as_english() -> None:
    assert difference("perplexity", -0.02) == "has 2% higher perplexity"
    assert difference("teacher_agreement", 0.03) == "has 3 points higher agreement with the teacher"


def test_an_answer_that_is_not_stated_follows_from_the_interval() -> None:
    quality = make_quality(0.02, "better")
    del quality["bits_per_byte"]["answer"], quality["bits_per_byte"]["margin"]
    pair = make_pair("int8", "reference", quality=quality)
    assert "reaches 2% fewer" in _with("quantize", pair)
    quality["bits_per_byte"]["ci"] = [-0.01, 0.05]
    assert "is undecided in quality (quality +2%, 90% interval -1% to +5%)" in _with(
        "quantize", pair
    )
    quality["bits_per_byte"]["ci"] = None
    assert "is undecided in quality (quality +2%, no interval)" in _with("quantize", pair)


def test_an_existing_model_leaves_the_saving_of_new_spending() -> None:
    training = null("existing model", ci=None, new_spend_saving=value(0.4, "derived"))
    text = _with("full", make_pair("student", "baseline", training=training))
    assert text.startswith(
        "The student against baseline: training saving not measurable here: existing model"
    )
    assert "(counting new spending alone it saves 40%)" in text
    training["new_spend_saving"] = value(-0.4, "derived")
    assert "it costs 40% more)" in _with(
        "full", make_pair("student", "baseline", training=training)
    )


def test_seeds_are_counted_once() -> None:
    rows = [make_row(arm, seed=seed) for seed in (0, 1) for arm in ARMS["distill"]]
    text = _answers(make_result("distill", rows=rows))
    assert text.endswith(" 2 seeds.")
    assert _answers(make_result("distill")).count("One seed") == 1


def test_a_seed_that_failed_is_named_beside_the_one_that_did_not() -> None:
    rows = [make_row("baseline"), make_unfinished("baseline", "FAILED", "diverged", seed=1)]
    assert _answers(make_result("baseline", rows=rows)).endswith(
        "The model of seed 1 FAILED: diverged. One seed."
    )


def test_a_retried_stage_is_not_called_missing_and_its_cost_is_all_it_took() -> None:
    failed = {
        **make_row("baseline"),
        "status": "FAILED",
        "why": "diverged",
        "artifact": None,
        "quality": {},
    }
    text = _answers(make_result("baseline", rows=[failed, make_row("baseline", attempt=2)]))
    assert "diverged" not in text
    alone = _answers(make_result("baseline", rows=[make_row("baseline")]))
    taken = [float(re.search(r"It took ([\d.]+) min", said).group(1)) for said in (text, alone)]  # type: ignore[union-attr]
    assert taken[0] == pytest.approx(2 * taken[1])


@pytest.mark.parametrize("recipe", list(ARMS))
def test_nothing_is_claimed_where_nothing_finished(recipe: str) -> None:
    rows = [make_unfinished(arm, "SKIPPED", "no device") for arm in ARMS[recipe]]
    said = conclude(make_result(recipe, rows=rows))
    text = " ".join([said["verdict"], *said["answers"]])
    assert said["verdict"] == ("No stage finished, so nothing can be said about cost or quality.")
    assert "%" not in text
    assert text.count("was skipped: no device") == len(ARMS[recipe])


def test_a_reason_that_ended_the_run_is_said_once() -> None:
    rows = [make_unfinished("baseline", "FAILED", "data.path: no such file")]
    text = _answers(
        make_result("baseline", rows=rows, status="FAILED", why="data.path: no such file")
    )
    assert text.endswith("The model FAILED: data.path: no such file. The run ended FAILED.")
    text = _answers(make_result("baseline", rows=rows, status="FAILED", why="disk full"))
    assert text.endswith(
        "The model FAILED: data.path: no such file. The run ended FAILED: disk full."
    )


def test_a_run_that_ended_early_says_so() -> None:
    text = _answers(make_result("distill", rows=[], status="KILLED", why="budget spent"))
    assert text.endswith("The run ended KILLED: budget spent.")


def test_a_comparison_with_the_given_model_needs_no_row_of_it() -> None:
    pair = make_pair("reference", "base", quality=make_quality(0.05, "better"))
    assert _with("quantize", pair).startswith(
        "Against the given model, reference reaches 5% fewer bits per byte"
    )


def test_hostile_names_and_reasons_stay_on_one_line() -> None:
    name = "evil\n\x1b[31m" + "x" * 300
    rows = [make_row("fp32"), make_unfinished(name, "FAILED", "line 1\nline 2\x1b[2J")]
    text = _with("mixed_precision", make_pair(name, "fp32", quality={}), rows=rows)
    assert "\n" not in text
    assert "\x1b" not in text
    assert "FAILED: line 1 line 2" in text
    assert len(text) < 500


KEPT = {"as": "teacher", "why": "nothing is within the tolerance"}


def test_a_model_that_stays_as_it_is_is_compared_with_nothing() -> None:
    pairs = [
        make_pair("int8", "nf4", serving=make_saving(0.38), quality=make_quality(0.2, "better"))
    ]
    rows = [
        make_row("reference"),
        make_row("nf4"),
        make_row("int8", unchanged=KEPT, quantization=None),
    ]
    said = conclude(make_result("quantize", comparisons=pairs, rows=rows))
    assert said["verdict"] == (
        "No format pays: int8 stays as teacher is (nothing is within the tolerance)."
    )
    assert said["answers"][0].startswith("int8 reaches 2.2")
    text = " ".join(said["answers"])
    assert "38%" not in text
    assert "gainst" not in text


def test_other_arms_are_compared_beside_a_model_that_stays_as_it_is() -> None:
    pairs = [make_pair(arm, "reference", serving=make_saving(0.38)) for arm in ("int8", "nf4")]
    rows = [
        make_row("reference"),
        make_row("int8"),
        make_row("nf4", unchanged={**KEPT, "as": "reference"}),
    ]
    text = _with("quantize", *pairs, rows=rows)
    assert text.startswith(
        "No format pays: nf4 stays as the unquantized model is (nothing is within the tolerance)."
        " Against the unquantized model, int8 serves 38% cheaper."
    )
    assert "nf4 serves" not in text


def test_a_model_that_stays_as_it_is_in_one_seed_is_said_to() -> None:
    rows = [make_row(arm, seed=seed) for seed in (0, 1) for arm in ("reference", "nf4", "int8")]
    rows[-1]["unchanged"] = {**KEPT, "as": "reference"}
    text = _with("quantize", make_pair("int8", "reference", serving=make_saving(0.2)), rows=rows)
    assert text.startswith(
        "No format pays: int8 of seed 1 stays as the unquantized model is (nothing is within the"
        " tolerance). "
    )
    assert "int8 serves 20% cheaper" in text


def test_a_fallback_that_found_nothing_is_no_conclusion() -> None:
    rows = [
        make_row("reference"),
        make_row("int8/search", type="quantize", unchanged=KEPT),
        make_row("int8"),
    ]
    said = conclude(make_result("quantize", rows=rows))
    assert "No format pays" not in " ".join([said["verdict"], *said["answers"]])


# -- the verdict line -----------------------------------------------------------------------------
def _verdict(recipe: str, *pairs: dict[str, Any], **changes: Any) -> str:
    return conclude(make_result(recipe, comparisons=list(pairs), **changes))["verdict"]


def _student(**measures: Any) -> dict[str, Any]:
    return make_pair("student", "teacher", **measures)


def _compute(quality: dict[str, Any]) -> dict[str, Any]:
    return make_pair("student", "control_compute", quality=quality)


EQUAL = make_quality(0.002, "equal")
UNDECIDED = make_quality(0.001, "undecided", half=0.02)


@pytest.mark.parametrize(
    ("quality", "said"),
    [
        (EQUAL, ", but plain training with the same compute does as well."),
        (make_quality(-0.1, "worse"), ", but plain training with the same compute does better."),
        (make_quality(0.1, "better"), ", and plain training with the same compute does worse."),
        (
            UNDECIDED,
            ", but whether plain training with the same compute does as well is undecided.",
        ),
        (
            {"bits_per_byte": null("no test split", ci=None)},
            ", but it could not be compared with plain training with the same compute.",
        ),
    ],
)
def test_the_verdict_says_what_the_same_compute_would_have_bought(
    quality: dict[str, Any], said: str
) -> None:
    teacher = _student(quality=EQUAL, serving=make_saving(0.45))
    start = "The student serves 45% cheaper than its teacher at equal quality"
    assert _verdict("distill", _compute(quality), teacher) == start + said


def test_the_verdict_says_that_a_control_is_missing_or_had_other_compute() -> None:
    pairs = _compute(EQUAL), _student(quality=EQUAL, serving=make_saving(0.45))
    rows = [make_row(arm) for arm in ARMS["distill"]]
    rows[3]["ledger"]["counts"]["model_flops"] = value(8e12)
    said = _verdict("distill", *pairs, rows=rows)
    assert said.endswith(", but plain training with 0.80x the compute does as well.")
    rows[3] = make_unfinished("control_compute", "FAILED", "diverged")
    pairs[0]["quality"] = {}
    said = _verdict("distill", *pairs, rows=rows)
    assert said.endswith(
        "at equal quality, but it could not be compared with plain training with the same compute."
    )


@pytest.mark.parametrize(
    ("measures", "said"),
    [
        (
            {"quality": UNDECIDED, "serving": make_saving(0.01, half=0.05)},
            "is undecided in serving cost against its teacher with its quality undecided",
        ),
        (
            {"quality": make_quality(-0.1, "worse"), "serving": make_saving(-0.12)},
            "costs 12% more to serve than its teacher at worse quality (10% more bits per byte)",
        ),
        (
            {"quality": make_quality(0.1, "better"), "serving": make_saving(-2.4, None)},
            "costs 3.4x as much to serve as its teacher (point estimate) at better quality (10%"
            " fewer bits per byte)",
        ),
        (
            {"serving": {**make_saving(0.706), "disturbed": ["load 9"]}},
            "serves 3.4x cheaper than its teacher (read on a disturbed machine)",
        ),
        (
            {"quality": {"bits_per_byte": null("no split", ci=None)}, "serving": make_saving(0.2)},
            "serves 20% cheaper than its teacher with its quality not measurable here",
        ),
        (
            {"quality": EQUAL, "serving": null("no counter", ci=None)},
            "could not be compared in serving cost at equal quality",
        ),
        ({"quality": EQUAL}, "is as good as its teacher"),
        ({"quality": UNDECIDED}, "is undecided in quality against its teacher"),
        ({"quality": make_quality(-0.1, "worse")}, "needs 10% more bits per byte than its teacher"),
    ],
)
def test_the_verdict_in_every_sign(measures: dict[str, Any], said: str) -> None:
    assert _verdict("distill", _student(**measures)) == f"The student {said}."


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (make_saving(0.41), "bf16 needs 41% fewer device-hours than fp32"),
        (make_saving(-0.12), "bf16 needs 12% more device-hours than fp32"),
        (make_saving(-2.4), "bf16 needs 3.4x as many device-hours as fp32"),
        (make_saving(0.0, None), "bf16 needs as many device-hours as fp32 (point estimate)"),
        (make_saving(0.01, 0.05), "bf16 is undecided in training cost against fp32"),
        (CENSORED, "bf16 could not be compared in training cost"),
    ],
)
def test_the_verdict_on_training_in_every_sign(training: dict[str, Any], said: str) -> None:
    pair = make_pair("bf16", "fp32", quality=EQUAL, training=training)
    assert _verdict("mixed_precision", pair).startswith(f"{said} at equal quality")


def test_the_verdict_reads_a_format_against_sixteen_bits_and_its_quality_against_its_source() -> (
    None
):
    best = {**make_pair("int8", "bf16", serving=make_saving(0.2)), "base_is": "best_16_bit"}
    source = make_pair("int8", "reference", quality=EQUAL, serving=make_saving(0.5))
    rows = [make_row(arm) for arm in (*ARMS["quantize"], "bf16")]
    assert _verdict("quantize", source, best, rows=rows) == (
        "int8 serves 20% cheaper than the best 16-bit form of the same model at equal quality."
    )
    other = make_pair("int8", "nf4", quality=make_quality(0.1, "better"))
    assert _verdict("quantize", other, best, rows=rows).endswith(
        "at better quality than nf4 (10% fewer bits per byte)."
    )


def test_the_verdict_of_an_arm_or_a_base_that_is_missing() -> None:
    rows = [make_row("fp32"), make_unfinished("bf16", "SKIPPED", "no BF16 here")]
    pair = make_pair("bf16", "fp32", quality=EQUAL)
    said = _verdict("mixed_precision", pair, rows=rows)
    assert said == "The question is not answered: bf16 was skipped."
    rows = [make_row("bf16"), make_unfinished("fp32", "FAILED", "diverged")]
    said = _verdict("mixed_precision", pair, rows=rows)
    assert said == "The question is not answered: fp32 is missing."


def test_the_verdict_of_a_model_without_quality() -> None:
    row = make_row("baseline", quality={"accuracy": null("no test split", ci=None)})
    said = _verdict("baseline", rows=[row])
    assert said == "The model is trained, but its accuracy could not be measured."


def test_a_conclusion_of_schema_1_is_read_as_a_verdict() -> None:
    old = make_result(schema=1, conclusion="int8 serves 20% cheaper; one seed.")
    assert from_schema_1(old)["conclusion"] == {
        "verdict": "int8 serves 20% cheaper; one seed.",
        "answers": [],
    }
    assert from_schema_1(make_result())["conclusion"] == make_result()["conclusion"]


def test_a_conclusion_is_a_paragraph_and_a_list_on_a_terminal_and_in_markdown() -> None:
    said = {"verdict": "word " * 20 + "end.", "answers": ["an *answer* " * 10, "# One seed."]}
    lines = conclusion_lines(said, 80)
    assert [line[:2] for line in lines] == ["wo", "wo", "- ", "  ", "- "]
    assert max(map(len, lines)) <= 80
    shown = MarkdownIt("commonmark").render(conclusion_markdown(said))
    assert shown.count("<p>") == 1
    assert shown.count("<li>") == 2
    assert "<em>" not in shown
    assert "<h1>" not in shown


# -- names ----------------------------------------------------------------------------------------
OTHER_NAMES = {
    "teacher": "sage",
    "student": "small",
    "control_steps": "alone_a",
    "control_compute": "alone_b",
}


def _renamed(record: Any, names: dict[str, str]) -> Any:
    """Return a record in which every text that is the name of an arm is another."""
    if isinstance(record, dict):
        return {
            key: each if key == "base_is" else _renamed(each, names) for key, each in record.items()
        }
    if isinstance(record, list):
        return [_renamed(each, names) for each in record]
    return names.get(record, record) if isinstance(record, str) else record


@pytest.mark.parametrize("missing", [None, *ARMS["distill"]])
def test_a_conclusion_goes_by_roles_whatever_arms_are_called(missing: str | None) -> None:
    rows = [
        make_row(arm) if arm != missing else make_unfinished(arm, "FAILED", "diverged")
        for arm in ARMS["distill"]
    ]
    result = make_result("distill", rows=rows)
    assert conclude(_renamed(result, OTHER_NAMES)) == conclude(result)


@pytest.mark.slow
def test_a_recipe_with_other_names_for_its_arms_has_the_same_conclusion(tmp_path: Path) -> None:
    """The recipe is copied, and run; its result is told again under the names of the original."""
    recipe = (RECIPES / "distill.yaml").read_text()
    for old, new in OTHER_NAMES.items():
        recipe = re.sub(rf"\b{old}\b(?!: [$a-z_]+[,}}])", new, recipe)
    (tmp_path / "mine.yaml").write_text(recipe)
    more = ["stages.sage.steps=6", f"--recipe-dir={tmp_path}"]
    done = run(tmp_path, "recipe=mine", *COMMON, *more)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "mlruns/latest/result.json").read_text())
    assert {row["arm"] for row in result["rows"]} == set(OTHER_NAMES.values())
    back = {new: old for old, new in OTHER_NAMES.items()}
    said = json.dumps(result["conclusion"])
    assert not any(re.search(rf"\b{name}\b", said) for name in OTHER_NAMES.values())
    assert conclude(_renamed(result, back)) == result["conclusion"]
    assert "plain training with" in result["conclusion"]["verdict"]
