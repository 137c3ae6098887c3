"""What each part brought, against definitions, other programs' intervals and made-up games."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipeline.compare.attribution import (
    Coalition,
    Contrast,
    Effect,
    Effects,
    coalitions,
    hours_effect,
    level_of_each,
    quality_effect,
    serving_effect,
    shapley,
    together,
    unknown,
    without,
)
from pipeline.compare.quality import compare_items
from pipeline.compare.statistics import RunSpread
from pipeline.tasks.table import QUALITIES

NONE = frozenset[str]()
BITS, ACCURACY = QUALITIES["bits_per_byte"], QUALITIES["accuracy"]


def set_of(*names: str) -> Coalition:
    return frozenset(names)


def worth(contrast: Contrast, game: dict[Coalition, float]) -> float:
    return math.fsum(weight * game[each] for each, weight in contrast.items())


# -- weights --------------------------------------------------------------------------------------


def test_the_glove_game_is_divided_as_published() -> None:
    """One left glove and two right ones: a pair is worth 1 (Shapley and Shubik)."""
    players = ["left", "right", "other right"]
    game = {each: float("left" in each and len(each) > 1) for each in coalitions(players)}
    values = [worth(shapley(players, each), game) for each in players]
    assert values == pytest.approx([2 / 3, 1 / 6, 1 / 6])


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_a_value_is_the_mean_over_all_orders(num: int) -> None:
    players = [f"p{n}" for n in range(num)]
    draw = np.random.default_rng(num)
    game = {each: float(draw.normal()) for each in coalitions(players)}
    orders = list(permutations(players))
    for player in players:
        added: list[float] = []
        for order in orders:
            before = frozenset(order[: order.index(player)])
            added.append(game[before | {player}] - game[before])
        assert worth(shapley(players, player), game) == pytest.approx(np.mean(added))
    shares = math.fsum(worth(shapley(players, each), game) for each in players)
    assert shares == pytest.approx(worth(together(players), game))


def test_leaving_out_reads_two_arms() -> None:
    assert without(["a", "b"], "a") == {set_of("a", "b"): 1.0, set_of("b"): -1.0}


# -- hours ----------------------------------------------------------------------------------------


def hours_of(seeds: int = 1, noise: float = 0.0) -> dict[Coalition, list[float]]:
    """Hours of a recipe whose part `short` saves 30% and whose part `int8` costs 12%."""
    draw = np.random.default_rng(5)
    found: dict[Coalition, list[float]] = {}
    for each in coalitions(["short", "int8"]):
        hours = 10 * (0.7 if "short" in each else 1.0) * (1.12 if "int8" in each else 1.0)
        found[each] = list(hours * np.exp(noise * draw.standard_normal(seeds)))
    return found


@pytest.mark.parametrize("question", [without, shapley])
def test_parts_that_multiply_keep_their_savings(question: Any) -> None:
    read = {
        name: hours_effect(question(["short", "int8"], name), hours_of(), level=0.9)
        for name in ("short", "int8")
    }
    assert read["short"].value == pytest.approx(0.3)
    assert read["int8"].value == pytest.approx(-0.12)
    assert read["short"].ends is None
    assert "seeds=[0,1,2]" in read["short"].why
    assert read["short"].answer() == "undecided"


def test_seeds_give_students_interval() -> None:
    hours = hours_of(seeds=4, noise=0.05)
    found = hours_effect(without(["short", "int8"], "short"), hours, level=0.95)
    logs = np.log(hours[set_of("short", "int8")]) - np.log(hours[set_of("int8")])
    low, high = stats.t.interval(0.95, 3, logs.mean(), stats.sem(logs))
    assert found.value == pytest.approx(1 - math.exp(logs.mean()))
    assert found.ends == pytest.approx((1 - math.exp(high), 1 - math.exp(low)))
    assert found.answer() == "better"


def test_one_seed_takes_twice_the_recorded_spread_of_each_of_its_arms() -> None:
    spread = RunSpread(0.02, 4)
    found = hours_effect(without(["short"], "short"), hours_of(), level=0.9, recorded=spread)
    half = stats.t.ppf(0.95, 4) * 2 * 0.02 * math.sqrt(2)
    r = math.log(0.7)
    assert found.ends == pytest.approx((1 - math.exp(r + half), 1 - math.exp(r - half)))


def test_of_no_hours_there_is_no_share() -> None:
    hours = {NONE: [0.0], set_of("a"): [1.0]}
    assert "no device-hours" in hours_effect(without(["a"], "a"), hours, level=0.9).why


# -- serving --------------------------------------------------------------------------------------


def blocks(*shape: int, around: float, seed: int) -> Any:
    return around + 0.05 * np.random.default_rng(seed).standard_normal(*shape)


def test_two_arms_that_were_read_against_the_base_are_held_apart_as_welch_does() -> None:
    one, other = blocks(6, around=-0.5, seed=0), blocks(9, around=-0.2, seed=1)
    both, int8 = set_of("short", "int8"), set_of("int8")
    readings = {(both, NONE): one, (int8, NONE): other}
    found = serving_effect(without(["short", "int8"], "short"), readings, level=0.9)
    test: Any = stats.ttest_ind(one, other, equal_var=False)
    ends = test.confidence_interval(0.9)
    assert found.value == pytest.approx(1 - math.exp(one.mean() - other.mean()))
    assert found.ends == pytest.approx((1 - math.exp(ends.high), 1 - math.exp(ends.low)))


@pytest.mark.parametrize("turned", [False, True])
def test_two_arms_that_were_read_in_turns_need_no_base(turned: bool) -> None:
    both, int8 = set_of("short", "int8"), set_of("int8")
    logs = blocks(8, around=-0.3, seed=2)
    readings = {(int8, both): -logs} if turned else {(both, int8): logs}
    found = serving_effect(without(["short", "int8"], "short"), readings, level=0.9)
    assert found.value == pytest.approx(1 - math.exp(logs.mean()))
    assert found.ends is not None
    assert found.ends[0] < 1 - math.exp(logs.mean()) < found.ends[1]


def test_an_arm_that_was_not_served_is_named() -> None:
    readings = {(set_of("a"), NONE): blocks(4, around=0.0, seed=3)}
    found = serving_effect(shapley(["a", "b"], "a"), readings, level=0.9)
    assert found.why == "the arm with a, b was not served in turns with the base"


# -- quality --------------------------------------------------------------------------------------


def documents(
    num: int, *factors: float, seed: int = 0, noise: float = 0.05
) -> list[dict[str, Any]]:
    """Items of arms that take so many times the bits of a document."""
    draw = np.random.default_rng(seed)
    size = draw.integers(200, 2000, num)
    bits = size * np.exp(0.3 * draw.standard_normal(num))
    found: list[dict[str, Any]] = []
    for factor in factors:
        own = bits * factor * np.exp(noise * draw.standard_normal(num))
        order = draw.permutation(num)  # documents are found by their digest
        columns = {"digest": np.array([f"d{n:05}" for n in range(num)]), "bits": own, "bytes": size}
        found.append({name: column[order] for name, column in columns.items()})
    return found


def test_leaving_one_part_out_is_the_comparison_of_two_arms() -> None:
    base, arm = documents(300, 1.0, 0.97)
    items = {NONE: base, set_of("a"): arm}
    found = quality_effect(without(["a"], "a"), [items], BITS, level=0.9)
    said = compare_items("bits_per_byte", arm, base, margin=0.01)
    assert found.value == pytest.approx(said["value"])
    assert found.ends == pytest.approx(said["ci"], abs=2e-4)


def test_qualities_that_are_shares_are_differences() -> None:
    draw = np.random.default_rng(1)
    digest = np.array([f"d{n}" for n in range(400)])
    base, arm = (
        {"digest": digest, "correct": (draw.random(400) < share).astype(np.int64)}
        for share in (0.6, 0.7)
    )
    found = quality_effect(
        without(["a"], "a"), [{NONE: base, set_of("a"): arm}], ACCURACY, level=0.9
    )
    test: Any = stats.ttest_rel(arm["correct"], base["correct"])
    ends = test.confidence_interval(0.9)
    assert found.value == pytest.approx(arm["correct"].mean() - base["correct"].mean())
    assert found.ends == pytest.approx((ends.low, ends.high), abs=2e-3)


def test_a_share_of_all_is_found_with_the_confidence_that_is_said() -> None:
    """Parts that add 1% and 2% of bits alone, and 5% together."""
    parts, truth = ["a", "b"], 1 - math.sqrt(1.01 * 1.05 / 1.02)
    factors = {NONE: 1.0, set_of("a"): 1.01, set_of("b"): 1.02, set_of("a", "b"): 1.05}
    inside = 0
    for seed in range(200):
        items = dict(zip(factors, documents(120, *factors.values(), seed=seed), strict=True))
        found = quality_effect(shapley(parts, "a"), [items], BITS, level=0.9)
        assert found.ends is not None
        inside += found.ends[0] <= truth <= found.ends[1]
    assert stats.binomtest(inside, 200, 0.9).pvalue > 0.001


def test_seeds_are_the_spread_where_there_are_several() -> None:
    per_seed: list[dict[Coalition, Any]] = []
    for seed, factor in enumerate((0.95, 0.97, 0.96)):
        base, arm = documents(200, 1.0, factor, seed=seed)
        per_seed.append({NONE: base, set_of("a"): arm})
    found = quality_effect(without(["a"], "a"), per_seed, BITS, level=0.9)
    each = [quality_effect(without(["a"], "a"), [one], BITS, level=0.9).value for one in per_seed]
    ends = stats.t.interval(0.9, 2, np.mean(each), stats.sem(each))  # pyright: ignore
    assert found.ends == pytest.approx(ends)


def test_documents_of_one_source_are_counted_once() -> None:
    base, arm = documents(200, 1.0, 0.97, noise=0.0)
    apart = quality_effect(without(["a"], "a"), [{NONE: base, set_of("a"): arm}], BITS, level=0.9)
    for items in (base, arm):
        items["group"] = np.array([f"g{int(each[1:]) // 50}" for each in items["digest"]])
    grouped = quality_effect(without(["a"], "a"), [{NONE: base, set_of("a"): arm}], BITS, level=0.9)
    assert apart.value is not None
    assert "4 documents that all arms read are too few" in grouped.why


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arm: arm.pop("bits"), "an arm has no 'bits' per document"),
        (lambda arm: arm["bits"].fill(math.nan), "not finite"),
        (lambda arm: arm["bits"].fill(0.0), "not finite, or sum to nothing"),
        (lambda arm: arm.update({k: v[:5] for k, v in arm.items()}), "5 documents"),
    ],
)
def test_readings_that_are_none_are_said(change: Any, said: str) -> None:
    base, arm = documents(50, 1.0, 0.9)
    change(arm)
    found = quality_effect(without(["a"], "a"), [{NONE: base, set_of("a"): arm}], BITS, level=0.9)
    assert found.value is None
    assert said in found.why


def test_two_arms_that_read_the_same_show_no_spread() -> None:
    base, _ = documents(50, 1.0, 0.9)
    found = quality_effect(without(["a"], "a"), [{NONE: base, set_of("a"): base}], BITS, level=0.9)
    assert (found.value, found.ends) == (0.0, None)
    assert "no spread" in found.why


# -- what it comes to -----------------------------------------------------------------------------

SAVES, COSTS, OPEN = Effect(0.3, (0.2, 0.4)), Effect(-0.12, (-0.2, -0.1)), Effect(0.0, (-0.1, 0.1))
SAME, LOST, GAINED = Effect(0.0, (-0.005, 0.005)), Effect(-0.1, (-0.2, -0.05)), SAVES


@pytest.mark.parametrize(
    ("hours", "serving", "quality", "said"),
    [
        (SAVES, OPEN, SAME, ("pays", "keep it")),
        (OPEN, SAVES, unknown("?"), ("pays", "keep it")),
        (SAVES, COSTS, SAME, ("saves and costs", "weigh them")),
        (SAVES, OPEN, LOST, ("saves, and costs quality", "weigh them")),
        (COSTS, OPEN, SAME, ("costs", "drop it")),
        (OPEN, OPEN, LOST, ("costs quality", "drop it")),
        (COSTS, OPEN, GAINED, ("better quality", "keep it")),
        (OPEN, unknown("?"), SAME, ("undecided", "")),
        (Effect(0.9, None, "one run"), OPEN, SAME, ("undecided", "")),
    ],
)
def test_a_part_comes_to_what_its_intervals_say(
    hours: Effect, serving: Effect, quality: Effect, said: tuple[str, str]
) -> None:
    effects = Effects(hours=hours, quality=quality, serving=serving, margin=0.01)
    assert effects.verdict() == said


def test_intervals_of_several_parts_hold_together() -> None:
    assert [level_of_each(each) for each in (1, 2, 5)] == pytest.approx([0.9, 0.95, 0.98])
