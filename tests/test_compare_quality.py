"""Two arms on the same documents: orientation, answers, refusals, seeds."""

from __future__ import annotations

from typing import Any

import jsonschema
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from pipeline.compare.quality import (
    answer_of,
    combine_seeds,
    compare_items,
    compared_keys,
    macro_f1_interval,
)
from pipeline.compare.statistics import (
    Interval,
    items_for_power,
    paired_ratio,
    paired_ratio_interval,
    tango_interval,
)
from pipeline.ledger.metrics import QUALITY_KEYS
from pipeline.ledger.schema import RESULT_SCHEMA

Arrays = dict[str, np.ndarray]


def _language(seed: int, *, n: int = 80, gain: float = 0.0, noise: float = 0.01) -> Arrays:
    """Return items of a language model: the documents are the same for every seed, its bits are
    `gain` lower.
    """
    documents, rng = np.random.default_rng(99), np.random.default_rng(seed)
    tokens = documents.integers(50, 400, n)
    size = (tokens * documents.uniform(2.5, 3.5, n)).astype(int)
    bits = size * documents.uniform(2.0, 2.6, n) * (1 - gain) * rng.normal(1, noise, n)
    correct = np.minimum(tokens, (tokens * (0.4 + gain) + rng.normal(0, 2, n)).astype(int))
    digest = np.array([f"{index:032x}" for index in range(n)])
    return {"digest": digest, "bits": bits, "bytes": size, "tokens": tokens, "correct": correct}


def _labels(seed: int, *, n: int = 400, right: float = 0.8) -> Arrays:
    documents, rng = np.random.default_rng(5), np.random.default_rng(seed)
    label = documents.integers(0, 3, n)
    prediction = np.where(rng.random(n) < right, label, rng.integers(0, 3, n))
    digest = np.array([f"{index:032x}" for index in range(n)])
    return {
        "digest": digest,
        "label": label,
        "prediction": prediction,
        "correct": prediction == label,
    }


def _compare(key: str, arm: Arrays, base: Arrays, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"margin": 0.01, "resamples": 500, "seed": 0, **more}
    return compare_items(key, arm, base, **settings)


# -- figures --------------------------------------------------------------------------------------


def test_bits_per_byte_is_the_relative_reduction() -> None:
    arm, base = _language(1, gain=0.05), _language(2)
    result = _compare("bits_per_byte", arm, base)
    ratio = (arm["bits"].sum() / arm["bytes"].sum()) / (base["bits"].sum() / base["bytes"].sum())
    assert result["value"] == pytest.approx(1 - ratio, abs=1e-12)
    assert result["ci"][0] < result["value"] < result["ci"][1]
    assert (result["answer"], result["n"], result["provenance"]) == ("better", 80, "derived")
    assert _compare("bits_per_byte", base, arm)["answer"] == "worse"


def test_accuracy_is_tangos_interval_of_the_disagreements() -> None:
    arm, base = _labels(1, right=0.85), _labels(2, right=0.8)
    result = _compare("accuracy", arm, base)
    b = int(np.sum(arm["correct"] & ~base["correct"]))
    c = int(np.sum(base["correct"] & ~arm["correct"]))
    assert result["value"] == pytest.approx(
        arm["correct"].mean() - base["correct"].mean(), abs=1e-12
    )
    assert result["ci"] == pytest.approx(tango_interval(b, c, 400))


def test_macro_f1_is_that_of_scikit_learn() -> None:
    arm, base = _labels(1, right=0.9), _labels(2, right=0.6)
    arm["prediction"][:3] = 7  # a class that is predicted and never right counts
    theirs = [
        f1_score(items["label"], items["prediction"], average="macro") for items in (arm, base)
    ]
    result = _compare("macro_f1", arm, base)
    assert result["value"] == pytest.approx(theirs[0] - theirs[1], abs=1e-12)
    assert result["ci"][0] < result["value"] < result["ci"][1]
    assert macro_f1_interval(
        arm["label"], arm["prediction"], resamples=200, seed=0
    ).estimate == pytest.approx(theirs[0])


def test_token_accuracy_and_agreement_weigh_documents_by_their_tokens() -> None:
    arm, base = _language(1, gain=0.03), _language(2)
    result = _compare("next_token_accuracy", arm, base)
    assert result["value"] == pytest.approx(
        (arm["correct"].sum() - base["correct"].sum()) / arm["tokens"].sum(), abs=1e-12
    )
    agreeing = [{**items, "agree": items["correct"]} for items in (arm, base)]
    assert _compare("teacher_agreement", *agreeing)["ci"] == result["ci"]


def test_documents_are_paired_by_digest_whatever_their_order() -> None:
    arm, base = _language(1, gain=0.02), _language(2)
    order = np.random.default_rng(0).permutation(80)
    shuffled = {name: column[order] for name, column in base.items()}
    assert _compare("bits_per_byte", arm, shuffled) == _compare("bits_per_byte", arm, base)


def test_documents_without_a_token_to_predict_are_left_out() -> None:
    arm, base = _language(1, gain=0.03), _language(2)
    expected = _compare(
        "next_token_accuracy", *({k: v[1:] for k, v in items.items()} for items in (arm, base))
    )
    for items in (arm, base):
        items["tokens"][0] = items["correct"][0] = 0
    assert _compare("next_token_accuracy", arm, base) == expected


def test_keys_that_both_arms_carry() -> None:
    arm, base = _language(1), _language(2)
    assert compared_keys(arm, base) == ("bits_per_byte", "next_token_accuracy")
    assert (
        compared_keys({**arm, "agree": arm["correct"]}, {**base, "agree": base["correct"]})[-1]
        == "teacher_agreement"
    )
    assert compared_keys(_labels(1), _labels(2)) == ("accuracy", "macro_f1")
    assert set(compared_keys(arm, base)) | set(compared_keys(_labels(1), _labels(2))) < set(
        QUALITY_KEYS
    )


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (0.001, 0.011, "better"),
        (-0.011, -0.001, "worse"),
        (0.001, 0.005, "equal"),  # however surely it lies above 0
        (-0.005, -0.001, "equal"),
        (-0.009, 0.009, "equal"),
        (0.0, 0.0, "equal"),
        (-0.009, 0.011, "undecided"),
        (-0.011, 0.009, "undecided"),
        (-0.01, 0.009, "undecided"),  # the margin itself is outside
        (-0.5, 0.5, "undecided"),
    ],
)
def test_answer_is_read_off_the_interval(low: float, high: float, answer: str) -> None:
    assert answer_of(low, high, 0.01) == answer


@pytest.mark.parametrize("key", ["bits_per_byte", "next_token_accuracy"])
def test_an_arm_is_equal_to_itself(key: str) -> None:
    arm = _language(1)
    result = _compare(key, arm, {name: column.copy() for name, column in arm.items()})
    assert (result["value"], result["ci"], result["answer"]) == (0.0, [0.0, 0.0], "equal")


def test_a_few_equal_examples_do_not_make_equal_classifiers() -> None:
    """60 of 60 the same still leaves differences up to 4% possible; 400 of 400 leave less than
    1%.
    """
    few, many = _labels(1, n=60), _labels(1, n=400)
    assert _compare("accuracy", few, few)["answer"] == "undecided"
    assert _compare("accuracy", few, few)["items_to_decide"] > 60
    assert _compare("accuracy", many, many)["answer"] == "equal"


def test_predictions_that_happen_to_agree_do_not_make_equal_classifiers() -> None:
    """Resampling examples on which both arms predict the same has no spread; that they differ shows
    elsewhere.
    """
    arm = {**_labels(1, n=24), "logprob": np.full(24, -0.2)}
    base = {**arm, "logprob": np.full(24, -0.3)}
    result = _compare("macro_f1", arm, base)
    assert (result["value"], result["ci"], result["answer"]) == (0.0, None, "undecided")
    assert "the same on all 24 documents" in result["why_undecided"]
    same = _compare("macro_f1", arm, {name: column.copy() for name, column in arm.items()})
    assert (same["ci"], same["answer"]) == ([0.0, 0.0], "equal")


def test_too_few_documents_are_undecided_and_say_how_many_would_do() -> None:
    arm, base = _language(1, n=12, gain=0.2), _language(2, n=12)
    result = _compare("bits_per_byte", arm, base)
    assert result["ci"][0] > 0
    assert (result["answer"], result["items_to_decide"]) == ("undecided", 20)
    assert _compare("bits_per_byte", arm, base, min_documents=10)["answer"] == "better"


def test_two_arms_of_equal_quality_rarely_differ() -> None:
    """A/A: both ends together may be wrong 10% of the time; of 200, 35 would be 3.5 standard errors
    above that.
    """
    answers = [
        _compare(
            "next_token_accuracy",
            _language(trial, n=60),
            _language(10_000 + trial, n=60),
            resamples=300,
        )["answer"]
        for trial in range(200)
    ]
    assert sum(answer in ("better", "worse") for answer in answers) <= 35


# -- refusals -------------------------------------------------------------------------------------


def test_a_damaged_reading_is_null_with_its_reason() -> None:
    arm, base = _language(1), _language(2)
    arm["bits"][[3, 5]] = [np.nan, np.inf]
    result = _compare("bits_per_byte", arm, base)
    assert result["why_missing"] == "the arm has no finite reading of 2 of 80 documents"
    assert (result["value"], result["provenance"], result["ci"], result["answer"]) == (
        None,
        "unavailable",
        None,
        "undecided",
    )
    assert "the base has no finite" in _compare("bits_per_byte", base, arm)["why_missing"]
    labels = {**_labels(1), "logprob": np.full(400, np.nan)}
    assert "no finite reading of 400" in _compare("accuracy", labels, _labels(2))["why_missing"]


def test_arms_on_other_documents_are_not_compared() -> None:
    arm, base = _language(1), _language(2)
    base["digest"] = np.array([*base["digest"][:75], *(f"f{index:031x}" for index in range(5))])
    assert (
        _compare("bits_per_byte", arm, base)["why_missing"]
        == "only 75 of 80 documents were assessed in both arms"
    )
    base["digest"][75] = arm["digest"][75]  # 76 of 80 are 95%
    assert _compare("bits_per_byte", arm, base)["n"] == 76


def test_arms_that_count_otherwise_are_not_compared() -> None:
    arm, base = _language(1), _language(2)
    base["tokens"] = base["tokens"] + 1  # another tokenizer
    assert (
        _compare("next_token_accuracy", arm, base)["why_missing"]
        == "the arms count other tokens in the same documents"
    )
    assert _compare("bits_per_byte", arm, base)["value"] is not None


def test_what_cannot_be_compared_says_why() -> None:
    arm, base = _language(1), _language(2)
    assert (
        "perplexity is not compared: read bits_per_byte"
        in _compare("perplexity", arm, base)["why_missing"]
    )
    assert (
        _compare("teacher_agreement", arm, base)["why_missing"]
        == "the arm has no 'agree' per document"
    )
    one = {name: column[:1] for name, column in arm.items()}
    assert _compare("bits_per_byte", one, one)["why_missing"] == "1 document has no spread"


@pytest.mark.parametrize("key", ["bits_per_byte", "next_token_accuracy", "accuracy", "macro_f1"])
def test_a_wider_level_gives_a_wider_interval(key: str) -> None:
    arms = (
        (_labels(1), _labels(2))
        if key in ("accuracy", "macro_f1")
        else (_language(1), _language(2))
    )
    usual, default, wide = (
        _compare(key, *arms, **more)["ci"] for more in ({"level": 0.9}, {}, {"level": 0.9392})
    )
    assert usual == default
    assert wide[0] < usual[0] < usual[1] < wide[1]


def test_the_level_of_right_or_wrong_is_tangos() -> None:
    arm, base = _labels(1, right=0.85), _labels(2, right=0.8)
    b, c = (
        int(np.sum(arm["correct"] & ~base["correct"])),
        int(np.sum(base["correct"] & ~arm["correct"])),
    )
    assert _compare("accuracy", arm, base, level=0.99)["ci"] == pytest.approx(
        tango_interval(b, c, 400, level=0.99)
    )


def test_macro_f1_reaches_beyond_the_bootstrap_where_examples_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The outer ends of two intervals: t with few degrees of freedom reaches beyond what a resample
    has seen.
    """
    arm, base = _labels(1, n=24, right=0.9), _labels(2, n=24, right=0.5)
    outer = _compare("macro_f1", arm, base)["ci"]
    monkeypatch.setattr(
        "pipeline.compare.statistics.skewed_t_interval", lambda v, _, level: Interval(v, v, v)
    )
    bca = _compare("macro_f1", arm, base)["ci"]
    assert outer[0] <= bca[0] < bca[1] <= outer[1]
    assert outer != bca


def test_skewed_bits_keep_their_tail_on_the_losing_side() -> None:
    """Damage in a few documents: more bits there, so the oriented interval reaches further down
    than up.
    """
    base = _language(2, n=400)
    hit = np.random.default_rng(0).random(400) < 0.03
    arm = {**base, "bits": base["bits"] * np.where(hit, 1.3, 0.999)}
    higher = paired_ratio_interval(arm["bits"], base["bits"], base["bytes"])
    result = _compare("bits_per_byte", arm, base)
    assert result["ci"] == pytest.approx([-higher.high, -higher.low])
    assert result["value"] - result["ci"][0] > 1.1 * (result["ci"][1] - result["value"])


def test_files_of_items_that_cannot_be_paired_say_why() -> None:
    arm, base = _language(1), _language(2)
    nothing = {name: column[:0] for name, column in arm.items()}
    assert _compare("bits_per_byte", nothing, base)["why_missing"] == "the arm has no documents"
    assert _compare("bits_per_byte", nothing, nothing)["why_missing"] == "the arm has no documents"
    assert _compare("bits_per_byte", arm, nothing)["why_missing"] == "the base has no documents"
    bare = {name: column for name, column in arm.items() if name != "digest"}
    assert (
        _compare("bits_per_byte", bare, base)["why_missing"]
        == "the arm has no 'digest' per document"
    )
    twice = {name: np.concatenate([column, column[:3]]) for name, column in base.items()}
    expected = "counts documents twice: 83 readings of 80 digests"
    assert _compare("bits_per_byte", arm, twice)["why_missing"] == f"the base {expected}"
    assert _compare("bits_per_byte", twice, twice)["why_missing"] == f"the arm {expected}"
    short = {**arm, "bits": arm["bits"][:70]}
    assert (
        _compare("bits_per_byte", short, base)["why_missing"]
        == "the arm has (70,) readings of 'bits' for 80 documents"
    )
    silent = {**base, "bits": np.zeros(80)}
    assert (
        "the base's bits sum to 0 or less" in _compare("bits_per_byte", arm, silent)["why_missing"]
    )


def test_an_undecided_arm_is_told_how_many_documents_decide() -> None:
    """For an arm that is no worse; for what the estimate says where that lies below the margin or
    these were enough.
    """
    arm, base = _language(1, n=40, noise=0.03), _language(2, n=40, noise=0.03)
    undecided = _compare("bits_per_byte", arm, base)
    assert (undecided["answer"], undecided["value"] > -0.01) == ("undecided", True)
    _, spread = paired_ratio(arm["bits"], base["bits"], arm["bytes"])
    assert undecided["items_to_decide"] == items_for_power(spread.reversed(), margin=0.01)
    assert undecided["items_to_decide"] != items_for_power(
        spread.reversed(), margin=0.01, assumed=undecided["value"]
    )
    worse = _compare(
        "bits_per_byte", _language(1, n=40, gain=-0.013, noise=0.02), _language(2, n=40, noise=0.02)
    )
    assert worse["ci"][0] < -0.01 < worse["ci"][1]
    assert worse["items_to_decide"] > 40
    assert _compare("bits_per_byte", arm, base, margin=0.5)["items_to_decide"] is None


# -- seeds ----------------------------------------------------------------------------------------


def test_seeds_are_averaged_with_a_t_interval() -> None:
    gains = (0.050, 0.055, 0.045)
    per_seed = [
        _compare("bits_per_byte", _language(s, gain=g), _language(50 + s))
        for s, g in enumerate(gains)
    ]
    combined = combine_seeds(per_seed, is_share=False)
    deltas = [result["value"] for result in per_seed]
    theirs = stats.ttest_1samp(deltas, 0).confidence_interval(0.9)
    assert combined["value"] == pytest.approx(np.mean(deltas))
    assert combined["ci"] == pytest.approx([theirs.low, theirs.high])
    assert (combined["n"], combined["answer"]) == (3, "better")
    assert combine_seeds(per_seed[:1], is_share=False) == per_seed[0]


def test_seeds_that_disagree_or_are_too_small_decide_nothing() -> None:
    gains = (0.05, -0.05)
    per_seed = [
        _compare("bits_per_byte", _language(s, gain=g), _language(50 + s))
        for s, g in enumerate(gains)
    ]
    assert combine_seeds(per_seed, is_share=False)["answer"] == "undecided"
    small = [
        _compare("bits_per_byte", _language(s, n=12, gain=0.2), _language(50 + s, n=12))
        for s in range(3)
    ]
    assert combine_seeds(small, is_share=False)["ci"][0] > 0
    assert combine_seeds(small, is_share=False)["answer"] == "undecided"


def test_seeds_that_read_the_same_show_no_spread() -> None:
    arm, base = _labels(1, n=60), _labels(1, n=60)
    base["correct"] = np.roll(base["correct"], 1)  # as many right, of other examples
    seed = _compare("accuracy", arm, base)
    assert (seed["value"], seed["answer"]) == (0.0, "undecided")
    combined = combine_seeds([seed, seed, seed], is_share=True)
    assert (combined["value"], combined["ci"], combined["answer"]) == (0.0, None, "undecided")
    assert "3 seeds read the same" in combined["why_undecided"]
    equal = _compare("accuracy", _labels(1), _labels(1))
    assert combine_seeds([equal, equal], is_share=True)["answer"] == "equal"


def test_a_null_seed_makes_the_whole_null() -> None:
    good, bad = (
        _compare("bits_per_byte", _language(1), _language(2)),
        _compare("perplexity", _language(1), _language(2)),
    )
    combined = combine_seeds([good, bad], is_share=False)
    assert combined["value"] is None
    assert combined["why_missing"].startswith("1 of 2 seeds: perplexity")


def test_results_fit_the_schema() -> None:
    found = {
        key: _compare(key, _labels(1), _labels(2)) for key in ("accuracy", "macro_f1", "perplexity")
    }
    found["bits_per_byte"] = combine_seeds(
        [_compare("bits_per_byte", _language(1), _language(2)) for _ in range(2)], is_share=False
    )
    comparison = {
        "arm": "a",
        "base": "b",
        "on": ["quality"],
        "speedup": None,
        "training": None,
        "serving": None,
        "payback": None,
    }
    schema = {
        **RESULT_SCHEMA["properties"]["comparisons"]["items"],
        "$defs": RESULT_SCHEMA["$defs"],
    }
    jsonschema.validate({**comparison, "quality": found}, schema)
