"""Groups of documents, blocks in random order, disturbance tests, rare damage, spreads: by hand and
by simulation.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import gate_simulation as simulated

from pipeline.compare import quality
from pipeline.compare.blocks import disturbances as found_in
from pipeline.compare.blocks import draw_design, in_time
from pipeline.compare.clustered import effective_items, group_codes, share_interval, summed
from pipeline.compare.figures import macro_f1
from pipeline.compare.quality import MIN_CLASS_ITEMS, compare_items
from pipeline.compare.statistics import (
    RunSpread,
    Spread,
    bootstrap_sums,
    own_spread,
    smallest_visible_damage,
    sums_spread,
    tango_interval,
    wilson_interval,
)
from pipeline.compare.verdict import Outcome, quality_criterion
from pipeline.config.settings.policy import PolicyConfig
from pipeline.config.settings.quality import QualityConfig
from pipeline.errors import UserError
from pipeline.evaluation.quality.assess import figures_of, read_items, write_items
from pipeline.evaluation.quality.recorded import take_recorded
from pipeline.report.verdict import needed_words, unseen_words
from pipeline.tasks.table import Task

POLICY = PolicyConfig(min_items=50, min_documents=50)


# -- every promise of the simulation, with few runs -----------------------------------------------

FEW = 60
simulated.DESIGNS = 6  # orders of blocks that are tried
SURE = 1e-4  # chance that a kept promise fails here, for one scenario


def loss_of_a_million(draw: Any) -> float:
    """Return the true loss of macro F1 well enough for few runs."""
    arm, base = draw(np.random.default_rng(5), 1_000_000)
    return macro_f1(base) - macro_f1(arm)


simulated.true_loss = loss_of_a_million


@pytest.mark.slow
@pytest.mark.parametrize("scenario", simulated.scenarios(), ids=lambda each: each.name)
def test_the_gate_keeps_what_it_promises(scenario: simulated.Scenario) -> None:
    """Fewer than 1 in 10,000 of these would fail by chance if the promise is kept exactly."""
    read = simulated.run(scenario, FEW, seed=1)
    if scenario.kind == "power":
        assert stats.binom.cdf(read.get("PASS", 0), FEW, simulated.LEAST_POWER) > SURE, (
            simulated.line(read)
        )
        return
    assert stats.binom.sf(read.get("PASS", 0) - 1, FEW, simulated.MOST_FALSE) > SURE, (
        simulated.line(read)
    )
    if scenario.kind == "clean":
        assert stats.binom.sf(read.get("INVALID", 0) - 1, FEW, simulated.MOST_INVALID) > SURE, (
            simulated.line(read)
        )


@pytest.mark.parametrize(
    "setting", [each for each in simulated.floor_settings() if each["expected"] == 20][:4]
)
def test_the_floor_of_macro_f1_holds(setting: dict[str, Any]) -> None:
    read = simulated.by_floor(setting, FEW, seed=1)
    false = round(read["false_pass"][str(MIN_CLASS_ITEMS)] * FEW)
    assert stats.binom.sf(false - 1, FEW, simulated.MOST_FALSE) > SURE, read


def test_pieces_taken_as_independent_would_pass_far_too_often() -> None:
    """The same draws without their groups: what the simulation is there to find."""
    passed = 0
    for number in range(FEW):
        sides = simulated.answers(np.random.default_rng(number), 100, 0.02, 0.1)
        alone = [
            {name: column for name, column in side.items() if name != "group"} for side in sides
        ]
        passed += (
            simulated.judged("accuracy", (alone[0], alone[1]), 0.02, number).outcome is Outcome.PASS
        )
    assert passed / FEW > 0.15


# -- groups ---------------------------------------------------------------------------------------


def items(group: list[Any], **columns: list[Any]) -> dict[str, np.ndarray]:
    digest = np.array([f"d{i:03d}" for i in range(len(group))])
    return {
        "digest": digest,
        "group": np.array(group, dtype=object),
        **{k: np.array(v) for k, v in columns.items()},
    }


def test_groups_are_numbered_as_they_occur_and_documents_without_one_are_their_own() -> None:
    codes = group_codes(items(["b", "a", None, "b", None, 3, "3"]))
    assert codes is not None
    assert codes.tolist() == [0, 1, 2, 0, 3, 4, 4]
    assert group_codes(items(["a", "b", None])) is None  # a document each
    assert group_codes({"digest": np.arange(3)}) is None
    assert summed([1.0, 2.0, 3.0, 4.0], np.array([0, 1, 0, 1])).tolist() == [4.0, 6.0]
    assert summed(np.ones((4, 2)), np.array([0, 0, 0, 1])).tolist() == [[3, 3], [1, 1]]


def test_effective_items_by_hand() -> None:
    """Four groups of 5, of which items are all alike: 4 items. No spread to see: groups.
    Independent: all.
    """
    sizes = np.full(4, 5.0)
    assert effective_items(sizes, 0.25, Spread(4, 0.5, 3.0, 0, 0)) == 4
    assert effective_items(sizes, 0.0, Spread(4, 0.0, 3.0, 0, 0)) == 4
    assert effective_items(sizes, 0.25, Spread(4, 0.1, 3.0, 0, 0)) == 20  # at most all
    assert effective_items(np.array([9.0, 1.0]), 0.0, Spread(2, 0.0, 1.0, 0, 0)) == pytest.approx(
        100 / 82
    )


def test_pieces_that_are_copies_of_their_group_say_no_more_than_one_of_them() -> None:
    """Each document ten times over, in a group: intervals are those of the documents alone."""
    rng = np.random.default_rng(0)
    n, num_bytes = 80, np.exp(rng.normal(6, 0.5, 80))
    bits = [num_bytes * rng.normal(2.3, 0.2, n) for _ in range(2)]
    right = [(rng.random(n) < 0.8).astype(int) for _ in range(2)]
    label = rng.integers(0, 3, n)
    for key, columns in (
        ("bits_per_byte", [{"bits": each, "bytes": num_bytes} for each in bits]),
        (
            "accuracy",
            [
                {
                    "label": label,
                    "prediction": np.where(each, label, (label + 1) % 3),
                    "correct": each,
                }
                for each in right
            ],
        ),
    ):
        alone = [{"digest": np.arange(n), **each} for each in columns]
        tenfold = [
            {
                "digest": np.arange(10 * n),
                "group": np.repeat(np.arange(n), 10),
                **{name: np.repeat(column, 10) for name, column in each.items()},
            }
            for each in columns
        ]
        one, ten = (compare_items(key, *sides, margin=0.02) for sides in (alone, tenfold))
        assert (ten["n"], ten["groups"], one["groups"]) == (10 * n, n, None)
        assert ten["value"] == pytest.approx(one["value"])
        assert (
            ten["smallest_visible_damage"]
            == one["smallest_visible_damage"]
            == smallest_visible_damage(n)
        )
        if key == "bits_per_byte":
            assert ten["ci"] == pytest.approx(one["ci"])
            assert ten["items_to_decide"] == one["items_to_decide"]
        else:  # the outer ends of three intervals, of which one is that of the items alone
            assert ten["ci"][0] <= one["ci"][0] + 1e-9
            assert ten["ci"][1] >= one["ci"][1] - 1e-9
            assert ten["ci"][1] - ten["ci"][0] < 1.15 * (one["ci"][1] - one["ci"][0])


def test_where_no_item_differs_groups_count_as_items() -> None:
    right = [1] * 60
    sides = [
        items(
            [f"g{i // 6}" for i in range(60)],
            label=[1] * 60,
            prediction=right,
            correct=right,
            logprob=[-0.1 * side] * 60,
        )
        for side in (1, 2)
    ]
    read = compare_items("accuracy", *sides, margin=0.02)
    assert read["ci"] == pytest.approx(list(tango_interval(0, 0, 10)))
    assert read["items_to_decide"] > 10
    codes = group_codes(sides[0])
    assert codes is not None
    assert share_interval(np.ones(60), codes, resamples=200, seed=0, level=0.95) == wilson_interval(
        10, 10, level=0.95
    )


def test_the_floor_counts_groups_and_says_so() -> None:
    rng = np.random.default_rng(0)
    sides = simulated.bits(rng, 40, -0.2)
    read = quality_criterion("bits_per_byte", *sides, POLICY, margin=0.01)
    assert (read.outcome, read.n, read.groups) == (Outcome.INCONCLUSIVE, 400, 40)
    assert "40 groups of items, and the policy decides nothing on fewer than 50" in (read.why or "")
    assert (
        quality_criterion(
            "bits_per_byte", *simulated.bits(rng, 60, -0.2), POLICY, margin=0.01
        ).outcome
        is Outcome.PASS
    )


def test_one_group_has_no_spread_and_other_groups_are_not_compared() -> None:
    columns = {"bits": [1.0, 2.0, 3.0], "bytes": [1, 1, 1]}
    one = items(["a", "a", "a"], **columns)
    assert (
        "3 documents of one group"
        in compare_items("bits_per_byte", one, one, margin=0.1)["why_missing"]
    )
    two, other = items(["a", "a", "b"], **columns), items(["a", "b", "b"], **columns)
    assert "other groups" in compare_items("bits_per_byte", two, other, margin=0.1)["why_missing"]
    renamed, bare = (
        items(["x", "x", "y"], **columns),
        {k: v for k, v in two.items() if k != "group"},
    )
    for base in (renamed, bare):
        assert compare_items("bits_per_byte", two, base, margin=0.1)["groups"] == 2
    assert compare_items("bits_per_byte", bare, two, margin=0.1)["groups"] == 2


def test_groups_travel_in_item_files_and_in_those_of_other_evaluations(tmp_path: Path) -> None:
    rows = [
        {
            "digest": f"d{i}",
            "label": 1,
            "prediction": i % 3 != 0,
            "correct": i % 3 != 0,
            "group": None if i == 0 else i // 5,
        }
        for i in range(30)
    ]
    rows = [
        {**row, "prediction": int(row["prediction"]), "correct": int(row["correct"])}
        for row in rows
    ]
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = take_recorded(
        given,
        tmp_path / "kept.jsonl",
        Task.sequence_classification,
        QualityConfig(bootstrap=200),
        "k",
    )
    assert (found["accuracy"]["n"], found["accuracy"]["groups"]) == (30, 7)
    kept = read_items(tmp_path / "kept.jsonl")
    write_items(tmp_path / "again.jsonl", kept)
    assert read_items(tmp_path / "again.jsonl")["group"].tolist() == [row["group"] for row in rows]
    alone = figures_of(
        Task.sequence_classification,
        {k: v for k, v in kept.items() if k != "group"},
        resamples=200,
        seed=0,
    )["accuracy"]
    assert alone[1] == wilson_interval(20, 30, level=0.95)
    given.write_text(json.dumps({**rows[0], "group": ["a"]}) + "\n")
    with pytest.raises(UserError, match="group is neither a number nor a text"):
        take_recorded(
            given, tmp_path / "kept.jsonl", Task.sequence_classification, QualityConfig(), "k"
        )


# -- kinds of items, rare damage, floors ----------------------------------------------------------


def test_counting_kinds_of_items_is_as_good_as_listing_them() -> None:
    rng = np.random.default_rng(3)
    kinds, times = (
        np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 2.0]]),
        np.array([30, 12, 7]),
    )
    listed = np.repeat(kinds, times, axis=0)[rng.permutation(49)]
    ratio = lambda sums: sums[..., 0] / sums[..., 2]
    one = bootstrap_sums(listed, ratio, resamples=20_000, seed=0)
    other = bootstrap_sums(kinds, ratio, resamples=20_000, seed=0, times=times)
    assert other.estimate == pytest.approx(one.estimate)
    assert [other.low, other.high] == pytest.approx([one.low, one.high], abs=0.006)
    assert sums_spread(kinds, ratio, times=times) == pytest.approx(sums_spread(listed, ratio))


@pytest.mark.parametrize("n", [20, 400, 2000])
def test_the_smallest_visible_damage_is_in_the_sample_19_times_of_20(n: int) -> None:
    share = smallest_visible_damage(n)
    assert (1 - share) ** n == pytest.approx(0.05)
    assert share == pytest.approx(3 / n, rel=0.1)


def test_damage_that_is_too_rare_is_said() -> None:
    assert (
        unseen_words({"smallest_visible_damage": smallest_visible_damage(400)})
        == "damage in fewer than 1 of 134 documents would not be seen"
    )
    grouped = {"smallest_visible_damage": smallest_visible_damage(400), "groups": 400}
    assert "1 of 134 groups of documents" in (unseen_words(grouped) or "")
    assert unseen_words({}) is None


def test_no_more_documents_are_asked_for_than_the_split_has_without_saying_so() -> None:
    read = {"needed": 827, "n": 160, "groups": None, "available": 500}
    assert (
        needed_words(read)
        == "827 items would decide, and the test split has only 500: more test data is needed"
    )
    assert (
        needed_words({**read, "needed": 300})
        == "300 items would decide: the test split has 500, of which 160 were read"
    )
    assert needed_words({**read, "available": None}) == "827 items would decide"
    assert needed_words({**read, "groups": 16, "available": 50}).startswith(
        "827 groups of items would decide, and"
    )


def test_macro_f1_of_a_rare_class_is_not_decided_and_says_what_it_takes() -> None:
    rng = np.random.default_rng(0)
    sides = simulated.classes(rng, 600, num_classes=6, rare=0.01, lost=0.0)
    have = int((sides[0]["label"] == 0).sum())
    read = quality_criterion("macro_f1", *sides, POLICY, margin=0.2, resamples=200)
    assert 0 < have < MIN_CLASS_ITEMS
    assert read.outcome is Outcome.INCONCLUSIVE
    assert f"class 0, the rarest, has {have} of the {MIN_CLASS_ITEMS} items" in (read.why or "")
    assert read.needed is not None
    assert read.needed > 600 * MIN_CLASS_ITEMS / have
    assert quality_criterion("accuracy", *sides, POLICY, margin=0.2).outcome is Outcome.PASS
    gone = [{name: column[side["label"] > 0] for name, column in side.items()} for side in sides]
    gone[0]["prediction"] = np.where(
        np.arange(len(gone[0]["digest"])) == 0, 0, gone[0]["prediction"]
    )
    # predicted, and nowhere labelled
    unknown = compare_items("macro_f1", gone[0], gone[1], margin=0.2, resamples=200)
    assert (unknown["answer"], unknown["items_to_decide"]) == ("undecided", None)
    assert quality.MIN_CLASS_ITEMS == MIN_CLASS_ITEMS


# -- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [2, 4, 5, 8])
def test_of_every_two_blocks_one_begins_with_the_arm(blocks: int) -> None:
    designs = [draw_design(2, blocks, 1, seed) for seed in range(6)]
    for design in designs:
        for orders in design.orders:
            assert all(
                sorted(orders[at : at + 2]) == ["ABBA", "BAAB"] for at in range(0, blocks - 1, 2)
            )
        assert len(design.gaps) == blocks
        taken = [
            place for block in range(blocks) for pair in design.places for place in pair[block]
        ]
        assert taken == sorted(set(taken))  # each reading has its own place
    assert draw_design(2, blocks, 1, 3) == designs[3]
    assert blocks < 4 or len({(design.orders, design.gaps) for design in designs}) > 1


def test_readings_stand_as_they_were_taken() -> None:
    readings, is_arm = in_time([[1, 4], [6, 7]], [[2, 3], [5, 8]], ["ABBA", "BAAB"])
    assert readings.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert is_arm.tolist() == [True, False, False, True, False, True, True, False]


def read_by(design: Any, taken: Any) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """Return what two equal arms read where the t-th reading takes `taken(t)`."""
    orders, places = design.orders[0], np.array(design.places[0])
    seconds = np.vectorize(taken)(places).astype(float)
    is_arm = np.array([[letter == "A" for letter in order] for order in orders])
    return seconds[is_arm].reshape(-1, 2), seconds[~is_arm].reshape(-1, 2), orders, places.tolist()


def test_drift_and_period_are_found_and_small_ones_left_alone() -> None:
    rng, design = np.random.default_rng(0), draw_design(1, 8, 0, 0)
    noise = lambda: math.exp(0.002 * rng.standard_normal())
    found = lambda taken, **more: found_in(*read_by(design, taken), **more)
    assert found(lambda _: noise()) == []
    assert found(lambda _: 1.0) == []  # readings without any noise
    assert found(lambda t: noise() * 1.02**t)[0].startswith("readings drifted: they rose by")
    assert found(lambda t: noise() * 0.98**t)[0].startswith("readings drifted: they fell by")
    assert (
        found(lambda t: noise() * (1.1 if t % 4 == 0 else 1.0))
        == ["readings repeat every 4: they differ by 10.1% with their place in it"]
        or "repeat every" in found(lambda t: noise() * (1.1 if t % 4 == 0 else 1.0))[0]
    )
    assert found(lambda t: noise() * (1.1 if t % 4 == 0 else 1.0), least=0.2) == []
    # too few blocks to tell
    assert found_in(*(side[:2] for side in read_by(design, lambda t: 1.02**t))) == []


@pytest.mark.parametrize("period", [2, 3, 4, 5, 6, 7, 8])
def test_no_period_alone_makes_a_difference_of_equal_arms(period: int) -> None:
    """Every place in the period, without noise, for several seeds: the serving criterion decides
    nothing.
    """
    from pipeline.compare.verdict import serving_criterion

    for seed in range(3):
        for place in range(period):
            slow = lambda t, place=place: 1.5 if t % period == place else 1.0
            arm, base, _, _ = read_by(draw_design(1, 4, 0, seed), slow)
            made = serving_criterion(arm, base, minimum=0.0, alpha=0.0304)
            assert made.outcome is Outcome.INCONCLUSIVE, (seed, place, made.ci)


# -- spreads of training --------------------------------------------------------------------------


def test_the_spread_of_ones_own_runs_counts_where_it_is_larger() -> None:
    recorded = RunSpread(0.05, 4)
    assert own_spread(recorded, [1.0])[0] == RunSpread(0.1, 4)
    assert own_spread(recorded, [], assumed=1.0) == (recorded, "taken as recorded")
    wide = [1.0, 1.3, 0.7, 1.1]
    mine, how = own_spread(recorded, wide)
    assert mine == RunSpread(pytest.approx(np.std(np.log(wide), ddof=1)), 3)
    assert "larger" in how
    close = [1.0, 1.01, 1.0, 1.005]
    pooled, how = own_spread(recorded, close)
    sd = np.std(np.log(close), ddof=1)
    assert pooled == RunSpread(pytest.approx(math.sqrt((3 * sd**2 + 4 * 0.05**2) / 7)), 7)
    assert "pooled" in how
    assert own_spread(RunSpread(0.0, 4), wide)[0].sd > 0
    assert own_spread(RunSpread(0.0, 4), [1.0, 1.0, 1.0])[0] == RunSpread(0.0, 6)
