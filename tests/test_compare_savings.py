"""Chains, training savings at equal quality, payback: against hand-made numbers and a
simulation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jsonschema
import numpy as np
import pytest
from scipy import stats

from pipeline.compare.savings import (
    ONE_RUN,
    Reading,
    Spend,
    Trained,
    all_in,
    amortise,
    c_opt,
    c_total,
    chain,
    combine_training,
    payback,
    serving_saving,
    shared_past,
    speedup,
    target_metric,
    training_saving,
)
from pipeline.compare.statistics import abba_saving
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.ledger.values import Provenance, Value, estimated, measured, null

SPENDS = {
    spend.arm: spend
    for spend in (
        Spend(arm="base", existing=True),
        Spend(arm="teacher", depends_on=("base",), work_h=4.0, retry_h=1.0, flops=400.0),
        Spend(arm="cache", depends_on=("teacher",), work_h=1.0, flops=100.0),
        Spend(arm="student", depends_on=("teacher", "cache"), work_h=2.0, retry_h=0.5, flops=150.0),
        Spend(arm="control", depends_on=("base",), work_h=10.0, flops=800.0),
        Spend(arm="scratch", work_h=20.0, flops=2000.0),
    )
}


def _save(arm: Trained, base: Trained, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"spends": SPENDS, "margin": 0.01, "lower_is_better": True, **more}
    return training_saving(arm, base, **settings)


# -- chains ---------------------------------------------------------------------------------------


def test_a_chain_lists_each_stage_once_after_what_it_needs() -> None:
    assert chain("student", SPENDS) == ["base", "teacher", "cache", "student"]
    circle = {"a": Spend(arm="a", depends_on=("b",)), "b": Spend(arm="b", depends_on=("a",))}
    assert chain("a", circle) == ["b", "a"]


def test_costs_over_a_chain() -> None:
    assert c_total("student", SPENDS, cancelled=["base"]).value == 7.0
    assert all_in("student", SPENDS, cancelled=["base"]).value == 8.5
    assert c_total("student", SPENDS).why_missing == "existing model: base"
    assert c_total("scratch", SPENDS).value == 20.0


def test_what_both_chains_share_cancels() -> None:
    assert c_opt("student", "teacher", SPENDS).value == 3.0
    assert c_opt("student", "control", SPENDS).value == -3.0  # 7 more, 10 fewer
    assert c_opt("control", "student", SPENDS).value == 3.0
    assert c_opt("student", "student", SPENDS).value == 0.0
    assert c_opt("student", "scratch", SPENDS).why_missing == "existing model: base"
    assert shared_past("student", "control", SPENDS) == ["base"]


def test_amortising_divides_the_named_arms_and_leaves_the_input_alone() -> None:
    shared = amortise(SPENDS, ["teacher", "cache"], 4)
    assert (shared["teacher"].work_h, shared["teacher"].retry_h, shared["cache"].flops) == (
        1.0,
        0.25,
        25.0,
    )
    assert shared["student"] is SPENDS["student"]
    assert SPENDS["teacher"].work_h == 4.0


# -- at the end -----------------------------------------------------------------------------------


def test_saving_at_equal_quality_at_the_end() -> None:
    saving = _save(Trained(arm="student", final=2.02), Trained(arm="control", final=2.0))
    assert saving["value"] == pytest.approx(1 - 7 / 10)
    assert (saving["c_arm"]["value"], saving["c_base"]["value"], saving["c_opt"]["value"]) == (
        7.0,
        10.0,
        -3.0,
    )
    assert (saving["all_in_arm"]["value"], saving["all_in_base"]["value"]) == (8.5, 10.0)
    assert saving["rule"].startswith(
        "equal quality at the end: within margin of the base's 2, Q = 2.02"
    )
    assert saving["rule"].endswith("point estimate only: one run each")
    assert "base (existing model) is in both chains and cancels" in saving["rule"]
    assert saving["ci"] is None


def test_systems_and_algorithmic_parts_multiply_to_the_whole() -> None:
    saving = _save(Trained(arm="student", final=2.0), Trained(arm="control", final=2.0))
    systems, algorithmic = saving["systems"]["value"], saving["algorithmic"]["value"]
    assert algorithmic == pytest.approx(1 - 650 / 800)
    assert systems == pytest.approx(1 - (7 / 650) / (10 / 800))
    assert (1 - systems) * (1 - algorithmic) == pytest.approx(1 - saving["value"])


def test_uncounted_flops_leave_the_saving_and_hide_its_parts() -> None:
    spends = {**SPENDS, "cache": dataclasses.replace(SPENDS["cache"], flops=None)}
    saving = _save(
        Trained(arm="student", final=2.0), Trained(arm="control", final=2.0), spends=spends
    )
    assert saving["value"] == pytest.approx(0.3)
    assert (
        saving["systems"]["why_missing"]
        == saving["algorithmic"]["why_missing"]
        == "FLOPs not counted: cache"
    )
    none = {name: dataclasses.replace(spend, flops=0.0) for name, spend in SPENDS.items()}
    saving = _save(
        Trained(arm="student", final=2.0), Trained(arm="control", final=2.0), spends=none
    )
    assert saving["systems"]["why_missing"] == "no FLOPs were needed"


def test_an_arm_that_is_not_as_good_is_censored_with_its_bound() -> None:
    saving = _save(Trained(arm="student", final=2.03), Trained(arm="control", final=2.0))
    assert (saving["value"], saving["provenance"]) == (None, "unavailable")
    assert (
        saving["why_missing"] == "censored: the arm ended at 2.03 on validation, short of Q = 2.02"
    )
    assert saving["bound"]["value"] == pytest.approx(0.3)  # it needed more than these 7 hours
    assert saving["systems"]["value"] is saving["algorithmic"]["value"] is None
    assert saving["c_arm"]["value"] == 7.0


@pytest.mark.parametrize(("final", "reached"), [(0.79, True), (0.7899, False), (0.95, True)])
def test_accuracy_is_worsened_absolutely(final: float, reached: bool) -> None:
    assert target_metric(0.8, 0.01, lower_is_better=False) == pytest.approx(0.79)
    assert target_metric(2.0, 0.01, lower_is_better=True) == pytest.approx(2.02)
    arms = Trained(arm="student", final=final), Trained(arm="control", final=0.8)
    assert (_save(*arms, lower_is_better=False)["value"] is not None) == reached


@pytest.mark.parametrize("final", [None, float("nan")])
def test_no_validation_reading_no_saving(final: float | None) -> None:
    for pair in (("student", "control"), ("control", "student")):
        finals = {"student": final, "control": 2.0}
        saving = _save(*(Trained(arm=arm, final=finals[arm]) for arm in pair))
        which = "the arm" if pair[0] == "student" else "the base"
        assert saving["why_missing"] == f"{which} has no validation reading"
        assert {saving["c_arm"]["value"], saving["c_base"]["value"]} == {7.0, 10.0}


def test_an_existing_model_in_one_chain_leaves_only_new_spending() -> None:
    saving = _save(Trained(arm="student", final=2.0), Trained(arm="scratch", final=2.0))
    assert saving["why_missing"] == "existing model: base"
    assert saving["new_spend_saving"]["value"] == pytest.approx(1 - 7 / 20)
    assert saving["c_arm"]["value"] is None
    # what handling it took is new
    handled = {**SPENDS, "base": dataclasses.replace(SPENDS["base"], work_h=1.0)}
    saving = _save(
        Trained(arm="student", final=2.0), Trained(arm="scratch", final=2.0), spends=handled
    )
    assert saving["new_spend_saving"]["value"] == pytest.approx(1 - 8 / 20)


def test_a_registered_model_cancels_where_both_chains_have_it_and_is_charged_where_one_has() -> (
    None
):
    """Registering the base of two arms makes neither cheaper; against one made from scratch its
    hours count.
    """
    registered = {**SPENDS, "base": Spend(arm="base", work_h=100.0, flops=0.0, registered="run-1")}
    both = Trained(arm="student", final=2.0), Trained(arm="control", final=2.0)
    saving = _save(*both, spends=registered)
    assert saving["value"] == _save(*both)["value"] == pytest.approx(0.3)
    assert "base (registered model) is in both chains and cancels" in saving["rule"]
    alone = _save(
        Trained(arm="student", final=2.0), Trained(arm="scratch", final=2.0), spends=registered
    )
    assert alone["value"] == pytest.approx(1 - 107 / 20)
    assert "cancels" not in alone["rule"]


def test_a_run_that_two_models_are_registered_with_counts_once() -> None:
    """Teacher and given student came out of one metered run; the same run cancels under whatever
    name it is met.
    """
    past = {"work_h": 100.0, "flops": 5.0, "registered": "run-1"}
    spends = {
        "base": Spend(arm="base", **past),
        "student_init": Spend(arm="student_init", **past),
        "student": Spend(arm="student", depends_on=("base", "student_init"), work_h=7.0, flops=1.0),
        "tuned": Spend(arm="tuned", depends_on=("base",), work_h=10.0, flops=1.0),
        "scratch": Spend(arm="scratch", work_h=200.0, flops=9.0),
    }
    assert c_total("student", spends).value == pytest.approx(107)
    alone = _save(
        Trained(arm="student", final=2.0), Trained(arm="scratch", final=2.0), spends=spends
    )
    assert (alone["value"], alone["algorithmic"]["value"]) == (
        pytest.approx(1 - 107 / 200),
        pytest.approx(1 - 6 / 9),
    )
    assert (
        "base, student_init are registered with one run (run-1), which counts once" in alone["rule"]
    )
    both = _save(Trained(arm="student", final=2.0), Trained(arm="tuned", final=2.0), spends=spends)
    assert both["value"] == pytest.approx(0.3)
    assert both["c_opt"]["value"] == pytest.approx(-3)


def test_a_base_that_cost_nothing_has_no_share() -> None:
    saving = _save(Trained(arm="teacher", final=2.0), Trained(arm="base", final=2.0))
    assert saving["why_missing"] == "the base cost nothing here"
    assert saving["new_spend_saving"]["why_missing"] == "the base cost nothing here"


def test_a_shared_teacher_stands_beside_the_full_figure() -> None:
    arms = Trained(arm="student", final=2.0), Trained(arm="control", final=2.0)
    saving = _save(*arms, teachers=("teacher", "cache"), shared_by=5)
    assert saving["value"] == pytest.approx(0.3)
    assert saving["amortised"]["value"] == pytest.approx(1 - (5 / 5 + 2) / 10)
    assert "amortised" not in _save(*arms)


# -- on the curve ---------------------------------------------------------------------------------


def _curve(arm: str, metrics: list[float], hours: float, *, constant: bool = True) -> Trained:
    """Readings every 100 tokens, `hours` apart."""
    readings = tuple(
        Reading(100 * (i + 1), metric, hours * (i + 1), constant)
        for i, metric in enumerate(metrics)
    )
    return Trained(arm=arm, final=metrics[-1], curve=readings)


# Q = 2.02, first held at 300 tokens, 6 h
BASE_CURVE = _curve("control", [2.5, 2.2, 2.01, 2.015, 2.0], hours=2.0)


def test_saving_at_the_first_of_two_readings_in_a_row() -> None:
    """One reading at Q (at 200 tokens) is noise: the arm holds it from 400 on, its teacher and
    cache added.
    """
    saving = _save(_curve("student", [2.4, 2.02, 2.03, 2.0, 1.9], hours=0.25), BASE_CURVE)
    assert saving["c_base"]["value"] == pytest.approx(6.0)
    assert saving["c_arm"]["value"] == pytest.approx(4 * 0.25 + 5)
    assert saving["value"] == pytest.approx(1 - 6 / 6)
    assert saving["algorithmic"]["value"] == pytest.approx(1 - (500 + 150 * 4 / 5) / (800 * 3 / 5))
    assert saving["rule"].startswith("first of two consecutive evaluations at Q = 2.02")
    assert saving["c_opt"]["value"] == -3.0  # what was spent, to the end


def test_a_curve_that_never_holds_q_is_censored_where_it_stopped() -> None:
    saving = _save(_curve("student", [2.4, 2.3, 2.2], hours=0.25), BASE_CURVE)
    assert saving["why_missing"] == "censored: the arm did not hold Q = 2.02 within 300 tokens"
    assert saving["bound"]["value"] == pytest.approx(1 - 5.75 / 6)


@pytest.mark.parametrize(
    "arm",
    [
        # a point on a cosine is no run of that length
        _curve("student", [2.4, 2.0, 1.9], hours=0.25, constant=False),
        dataclasses.replace(
            _curve("student", [2.4, 2.0, 1.9], hours=0.25),
            # after other tokens
            curve=tuple(Reading(150 * i, 2.0, 0.25 * i, is_constant=True) for i in (1, 2, 3)),
        ),
        dataclasses.replace(_curve("student", [2.0], hours=2.0), final=2.0),
    ],
)
def test_curves_that_cannot_be_laid_over_each_other_are_compared_at_the_end(arm: Trained) -> None:
    saving = _save(arm, BASE_CURVE)
    assert saving["rule"].startswith("equal quality at the end")
    assert saving["value"] == pytest.approx(0.3)


def test_readings_before_the_rate_is_constant_or_after_it_decays_are_no_crossing() -> None:
    """The base's third reading holds Q, but only from the fourth on is its rate constant."""
    late = dataclasses.replace(
        BASE_CURVE,
        curve=tuple(dataclasses.replace(r, is_constant=r.tokens > 300) for r in BASE_CURVE.curve),
    )
    arm = _curve("student", [2.4, 2.0, 1.9, 1.9, 1.9], hours=0.25)
    arm = dataclasses.replace(
        arm, curve=tuple(dataclasses.replace(r, is_constant=r.tokens > 300) for r in arm.curve)
    )
    saving = _save(arm, late)
    assert saving["c_base"]["value"] == pytest.approx(4 * 2.0)
    assert saving["c_arm"]["value"] == pytest.approx(4 * 0.25 + 5)


def test_an_arm_that_reaches_q_only_by_its_decay_is_compared_at_the_end() -> None:
    readings = (
        Reading(100, 2.4, 0.25, True),
        Reading(200, 2.3, 0.5, True),
        Reading(300, 2.0, 0.75, False),
    )
    saving = _save(Trained(arm="student", final=2.0, curve=readings), BASE_CURVE)
    assert saving["rule"].startswith("equal quality at the end")


def test_a_base_that_meets_q_only_at_its_end_is_compared_there() -> None:
    saving = _save(
        _curve("student", [2.0, 2.0], hours=0.25), _curve("control", [2.5, 2.2, 2.0], hours=2.0)
    )
    assert saving["rule"].startswith("equal quality at the end")


def test_identical_noisy_arms_save_nothing_on_average() -> None:
    """Crossing the base's own final noisy value would favour the arm; Q with a margin, held twice,
    does not.
    """
    rng, savings = np.random.default_rng(0), []
    spends = {name: Spend(arm=name, work_h=20.0, flops=1.0) for name in ("a", "b")}
    for _ in range(200):
        a, b = (
            list(2 + 0.6 * np.exp(-np.arange(1, 41) / 8) + rng.normal(0, 0.004, 40))
            for _ in range(2)
        )
        saving = _save(_curve("a", a, hours=0.5), _curve("b", b, hours=0.5), spends=spends)
        if saving["value"] is not None:
            savings.append(saving["value"])
    assert len(savings) > 190
    assert abs(np.mean(savings)) < 0.02


# -- seeds ----------------------------------------------------------------------------------------


def _seed(hours: float, final: float = 2.0) -> dict[str, Any]:
    spends = {**SPENDS, "student": dataclasses.replace(SPENDS["student"], work_h=hours)}
    return _save(
        Trained(arm="student", final=final), Trained(arm="control", final=2.0), spends=spends
    )


def test_savings_are_averaged_over_seeds() -> None:
    combined = combine_training([_seed(2.0), _seed(1.0), _seed(3.0)])
    logs = np.log([0.7, 0.6, 0.8])
    theirs = stats.ttest_1samp(logs, 0).confidence_interval(0.9)
    assert combined["value"] == pytest.approx(1 - np.exp(logs.mean()))
    assert combined["ci"] == pytest.approx([1 - np.exp(theirs.high), 1 - np.exp(theirs.low)])
    parts = [1 - combined[name]["value"] for name in ("systems", "algorithmic")]
    assert parts[0] * parts[1] == pytest.approx(1 - combined["value"])
    assert combined["c_arm"]["value"] == pytest.approx(7.0)
    assert combined["rule"].endswith("mean of 3 seeds, the first one's Q shown")
    assert "point estimate" not in combined["rule"]
    assert combine_training([_seed(2.0)]) == _seed(2.0)


def test_equal_arms_save_nothing_over_seeds_however_far_they_spread() -> None:
    """The mean of shares would say -2% at a spread of 20%: E[1 - a/b] = 1 - exp(sd^2)."""
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        hours = np.exp(rng.normal(0, 0.2, (3, 2)))
        per_seed = [
            {**Value(1 - arm / base, Provenance.DERIVED).to_json(), "ci": None, "rule": ONE_RUN}
            for arm, base in hours
        ]
        found.append(combine_training(per_seed)["value"])
    log_ratio, error = np.log1p(-np.array(found)).mean(), 0.2 * math.sqrt(2 / 3 / 300)
    assert abs(log_ratio) < 4 * error
    assert (
        combine_training([{**measured(1.0).to_json(), "rule": ONE_RUN}] * 2)["ci"] is None
    )  # an arm that cost nothing


def test_one_censored_seed_censors_the_mean() -> None:
    combined = combine_training([_seed(2.0), _seed(2.0, final=2.1)])
    assert (combined["value"], combined["ci"]) == (None, None)
    assert (
        combined["why_missing"]
        == "censored: the arm ended at 2.1 on validation, short of Q = 2.02 (in 1 of 2 seeds)"
    )
    saved, bound = _seed(2.0)["value"], _seed(2.0, final=2.1)["bound"]["value"]
    assert combined["bound"]["value"] == pytest.approx(1 - math.sqrt((1 - saved) * (1 - bound)))
    assert combined["new_spend_saving"]["why_missing"] == combined["why_missing"]


# -- serving and payback --------------------------------------------------------------------------


def _blocks(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 0.6 * np.exp(rng.normal(0, 0.05, (4, 2))), np.exp(rng.normal(0, 0.05, (4, 2)))


def test_serving_saving_has_the_form_of_the_result() -> None:
    saving, interval = serving_saving(*_blocks()), abba_saving(*_blocks())
    assert (saving["value"], saving["ci"], saving["blocks"]) == (
        interval.estimate,
        [interval.low, interval.high],
        4,
    )
    assert saving["value"] == pytest.approx(0.4, abs=0.05)


def _saving(v: float, half: float = 0.01) -> dict[str, Any]:
    return {
        **Value(v, Provenance.DERIVED).to_json(),
        "ci": [v - half, v + half],
        "blocks": 4,
        "sd_log": half,
    }


@pytest.mark.parametrize(
    ("c_opt_h", "units"), [(2.0, 2.0 * 3600 / 0.4e-3), (0.0, 0.0), (-3.0, 0.0)]
)
def test_payback_units(c_opt_h: float, units: float) -> None:
    result = payback(measured(c_opt_h), measured(1e-3), _saving(0.4), unit="token")
    assert result["value"] == pytest.approx(units)
    assert result["unit"] == "token"
    assert result["p_net_positive"]["why_missing"] == "serving.volume is not declared"


@pytest.mark.parametrize("saving", [0.0, -0.2])
@pytest.mark.parametrize("spent", [measured(2.0), measured(-2.0), null("existing model: base")])
def test_an_arm_that_is_not_cheaper_never_pays_back(spent: Value, saving: float) -> None:
    assert (
        payback(spent, measured(1e-3), _saving(saving), unit="example")["why_missing"]
        == "never: not cheaper"
    )


def test_one_slow_reading_makes_no_payback_of_a_cost_and_no_cost_of_a_saving() -> None:
    """One reading of the arm was held up: its mean is above the base's (1.01), its mean log-ratio
    is not (-0.14).
    """
    arm, base = np.full((4, 2), 0.7), np.ones((4, 2))
    arm[0] = 3.0, 0.9
    for ours, theirs in ((arm, base), (base, arm)):
        saving, c_base = serving_saving(ours, theirs), measured(float(theirs.mean()) / 1000)
        result = payback(measured(2.0), c_base, saving, unit="token")
        assert (saving["value"] > 0) == (ours is arm) == (ours.mean() > theirs.mean())
        assert (result["why_missing"] == "never: not cheaper") == (saving["value"] <= 0)
        if ours is arm:
            assert result["value"] == pytest.approx(2.0 * 3600 / (c_base.value * saving["value"]))


def test_unknown_spending_has_no_payback() -> None:
    serving = serving_saving(*_blocks())
    result = payback(
        null("existing model: base"), measured(1e-3), serving, unit="token", volume=1e9
    )
    assert (
        result["why_missing"] == result["p_net_positive"]["why_missing"] == "existing model: base"
    )


def test_a_payback_is_no_better_known_than_what_it_is_made_of() -> None:
    assert (
        payback(estimated(1.0), measured(1e-3), _saving(0.4), unit="token")["provenance"]
        == "estimated"
    )


def test_replicas_are_whole_ones() -> None:
    """2,500 units a second at 1 ms are 2.5 devices, so 3; at 0.6 ms 1.5, so 2. At 400 a second one
    serves either.
    """
    saving = serving_saving(0.6 * np.ones((4, 2)), np.ones((4, 2)))
    found = [
        payback(measured(1.0), measured(1e-3), saving, unit="token", rate=rate)["replicas_saved"]
        for rate in (2500.0, 400.0, None)
    ]
    assert [value["value"] for value in found] == [1, 0, None]
    assert found[2]["why_missing"] == "serving.rate is not declared"


def _probability(c_opt_h: float, volume: float, saving: dict[str, Any]) -> float:
    return payback(measured(c_opt_h), measured(1e-3), saving, unit="token", volume=volume)[
        "p_net_positive"
    ]["value"]


@pytest.mark.parametrize("share", [0.35, 0.40, 0.42])
def test_probability_of_a_net_gain_is_that_of_a_simulation(share: float) -> None:
    """Serving 10 M tokens at 1 ms must save `share` to repay c_opt; r is t-distributed with 3
    degrees of freedom.
    """
    arm, base = _blocks()
    r = (np.log(arm) - np.log(base)).mean(axis=1)
    drawn = r.mean() + r.std(ddof=1) / 2 * np.random.default_rng(1).standard_t(3, 200_000)
    net = 1e7 * 1e-3 * (1 - np.exp(drawn)) - share * 1e4
    assert _probability(share * 1e4 / 3600, 1e7, serving_saving(arm, base)) == pytest.approx(
        (net > 0).mean(), abs=0.005
    )


def test_probability_at_the_edges() -> None:
    saving = serving_saving(*_blocks())
    # all of the base's serving would have to be saved
    assert _probability(1e4 / 3600, 1e7, saving) == 0.0
    assert _probability(-1.0, 1e7, saving) > 0.99
    certain = _saving(0.4, half=0.0)
    assert [_probability(share * 1e4 / 3600, 1e7, certain) for share in (0.3, 0.5)] == [1.0, 0.0]


# -- form -----------------------------------------------------------------------------------------


def test_every_form_fits_the_schema() -> None:
    schema = {
        **RESULT_SCHEMA["properties"]["comparisons"]["items"],
        "$defs": RESULT_SCHEMA["$defs"],
    }
    for final in (2.0, 2.5, None):
        comparison = {
            "arm": "student",
            "base": "control",
            "on": ["training", "serving", "payback"],
            "quality": {},
            "speedup": None,
            "training": _save(
                Trained(arm="student", final=final), Trained(arm="control", final=2.0), shared_by=2
            ),
            "serving": serving_saving(*_blocks()),
            "payback": payback(measured(1.0), measured(1e-3), _saving(0.4), unit="token"),
        }
        jsonschema.validate(comparison, schema)
        jsonschema.validate(
            {**comparison, "training": combine_training([_seed(2.0), _seed(1.0)])}, schema
        )


# -- does a format pay at all ---------------------------------------------------------------------


def _served(weights: float, peak: float | None = None) -> dict[str, Any]:
    counted = null("a CPU has no device memory to count") if peak is None else measured(peak)
    return {"weights_bytes": measured(weights).to_json(), "peak_bytes": counted.to_json()}


@pytest.mark.parametrize(
    ("ci", "arm", "base", "saves_time", "memory", "no_speedup"),
    [
        ([0.01, 0.2], _served(100), _served(100), True, 0.0, False),  # time alone
        ([-0.2, -0.1], _served(50), _served(100), False, 0.5, False),  # memory alone
        # undecided, and 4% are rounding
        ([-0.1, 0.1], _served(96), _served(100), False, 0.04, True),
        ([-0.1, 0.1], _served(95), _served(100), False, 0.05, False),
        # weights are not what is allocated
        ([-0.2, -0.1], _served(50, 99), _served(100, 100), False, 0.01, True),
        ([-0.2, -0.1], _served(100, 110), _served(100, 100), False, -0.1, True),
        (None, _served(100), _served(100), False, 0.0, True),  # a point estimate shows nothing
    ],
)
def test_an_artifact_that_saves_neither_time_nor_memory_is_marked(
    ci: list[float] | None, arm: Any, base: Any, saves_time: bool, memory: float, no_speedup: bool
) -> None:
    found = speedup({"value": 0.05, "ci": ci}, arm, base)
    assert found["memory"]["value"] == pytest.approx(memory)
    assert found["memory"]["of"] == (
        "weights_bytes" if arm["peak_bytes"]["value"] is None else "peak_bytes"
    )
    assert (found["saves_time"], found["no_speedup"]) == (saves_time, no_speedup)
    jsonschema.validate(
        found,
        RESULT_SCHEMA["properties"]["comparisons"]["items"]["properties"]["speedup"]
        | {"$defs": RESULT_SCHEMA["$defs"]},
    )
