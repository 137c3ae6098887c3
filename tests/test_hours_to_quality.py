"""What benchmarks/hours_to_quality.py says, by hand: crossing rule, split, charging; and one small
run of it.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import hours_to_quality as script
import quality_units
from hours_to_quality import SIZES, VARIANTS
from planned_runs import Planned, compare, first_held, over_seeds, settled, target
from quality_units import PARTS, Bench, Unit, charged, parts_of, settings_of

SHARES = (0.25, 0.5, 0.75, 1.0)


def shares(*metrics: float | None, hours: float = 4.0, flops: float = 8e12) -> dict[float, Planned]:
    """Return planned runs whose hours and FLOPs go with their length; None is one that was not
    run.
    """
    return {
        fraction: Planned(
            fraction=fraction,
            tokens=round(1000 * fraction),
            metric=metric,
            work_h=hours * fraction,
            flops=flops * fraction,
        )
        for fraction, metric in zip(SHARES, metrics, strict=True)
        if metric is not None
    }


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ((3.0, 2.5, 2.0, 1.9), 0.75),
        ((3.0, 2.0, 2.5, 1.9), 1.0),  # one alone may be luck
        ((2.0, 2.0, 2.5, 1.9), 0.25),  # two in a row are taken, whatever comes later
        # none comes after the longest: it stands by itself, at Q exactly
        ((3.0, 2.5, 2.1, 2.0), 1.0),
        ((3.0, 2.5, 2.1, 2.01), None),
        ((None, None, 2.0, 1.9), 0.75),  # what was not run is short
        ((2.0, None, 2.0, 1.9), 0.75),  # and so parts what lies beside it
    ],
)
def test_the_first_of_two_consecutive_runs_at_q_is_taken(metrics, expected) -> None:
    held = first_held(shares(*metrics), SHARES, 2.0)
    assert (held and held.fraction) == expected


def test_shorter_runs_are_tried_until_two_in_a_row_are_short() -> None:
    assert not settled(shares(None, None, None, 1.9), SHARES, 2.0)
    assert not settled(shares(None, None, 2.1, 1.9), SHARES, 2.0)
    assert settled(shares(None, 2.2, 2.1, 1.9), SHARES, 2.0)
    assert not settled(shares(None, 2.2, 1.9, 1.9), SHARES, 2.0)
    assert settled(shares(None, None, 2.2, 2.1), SHARES, 2.0)
    assert not settled(shares(None, 2.2, 2.1, 1.9), SHARES, 2.15)  # a looser target may yet be met


def test_a_saving_and_its_split_worked_by_hand() -> None:
    """Base 2.0 at 4 h and 8e12 FLOPs; Q = 2.02. The arm holds it from half of the length: 1.5 h and
    2e12 FLOPs.
    """
    base = shares(3.0, 2.5, 2.1, 2.0)
    arm = shares(3.0, 2.02, 2.0, 1.9, hours=3.0, flops=4e12)
    assert target(base, 0.01) == pytest.approx(2.02)
    found = compare("arm", arm, "base", base, SHARES, 0.01)
    assert found["at"]["arm"] == {"fraction": 0.5, "tokens": 500, "metric": 2.02}
    assert found["at"]["base"]["fraction"] == 1.0
    assert found["value"] == pytest.approx(1 - 1.5 / 4)
    assert found["algorithmic"]["value"] == pytest.approx(1 - 2e12 / 8e12)
    # negative: dearer a FLOP
    assert found["systems"]["value"] == pytest.approx(1 - (1.5 / 2e12) / (4 / 8e12))
    assert (1 - found["systems"]["value"]) * (1 - found["algorithmic"]["value"]) == pytest.approx(
        1 - found["value"]
    )
    assert not found["at_least"]


def test_the_margin_is_given_to_the_base_as_well() -> None:
    """The base itself is within 1% at three quarters of its length: a system against itself saves
    nothing.
    """
    runs = shares(3.0, 2.5, 2.01, 2.0)
    found = compare("arm", runs, "base", runs, SHARES, 0.01)
    assert found["at"]["base"]["fraction"] == found["at"]["arm"]["fraction"] == 0.75
    assert found["value"] == 0


def test_a_target_never_reached_is_null_with_its_bound() -> None:
    base = shares(3.0, 2.5, 2.1, 2.0)
    found = compare("arm", shares(3.0, 2.9, 2.8, 2.7, hours=1.0), "base", base, SHARES, 0.01)
    assert found["value"] is None
    assert found["why_missing"].startswith("censored: the arm ended at 2.7")
    assert found["systems"]["value"] is None
    assert found["algorithmic"]["value"] is None
    assert found["bound"]["value"] == pytest.approx(1 - 1.0 / 4.0)


def test_a_target_that_the_shortest_run_holds_is_a_lower_bound() -> None:
    found = compare(
        "arm", shares(1.9, 1.9, 1.9, 1.9), "base", shares(3.0, 2.5, 2.1, 2.0), SHARES, 0.01
    )
    assert found["at_least"]
    assert found["value"] == pytest.approx(0.75)


def test_nothing_is_said_where_both_hold_the_target_on_the_shortest_run() -> None:
    """A base that hardly learns is within the margin of its end from the start."""
    found = compare(
        "arm", shares(1.9, 1.8, 1.7, 1.6), "base", shares(2.01, 2.01, 2.01, 2.0), SHARES, 0.01
    )
    assert found["value"] is None
    assert found["why_missing"] == "both hold Q = 2.02 on the shortest run there is"
    assert found["bound"]["value"] is None
    assert not found["at_least"]
    assert over_seeds([found, found])["bound"]["value"] is None


def one(
    saving: float | None, systems: float | None = None, bound: float | None = None
) -> dict[str, Any]:
    algorithmic = None if saving is None or systems is None else 1 - (1 - saving) / (1 - systems)
    return {
        "value": saving,
        "why_missing": "censored: short" if saving is None else None,
        "systems": {"value": systems},
        "algorithmic": {"value": algorithmic},
        "bound": {"value": bound},
        "at_least": False,
    }


def test_seeds_are_combined_by_the_mean_of_logarithms() -> None:
    found = over_seeds([one(0.5, 0.2), one(0.75, 0.5), one(0.0, -0.25)])
    logs = [math.log(0.5), math.log(0.25), math.log(1.0)]
    # 1 - (1/8)^(1/3) = 0.5
    assert found["saving"]["value"] == pytest.approx(1 - math.exp(sum(logs) / 3))
    deviation = math.sqrt(sum((each - sum(logs) / 3) ** 2 for each in logs) / 2)
    half = 2.919986 * deviation / math.sqrt(3)  # Student's t, 2 degrees of freedom, 95%
    assert found["saving"]["ci"] == pytest.approx(
        [1 - 0.5 * math.exp(half), 1 - 0.5 * math.exp(-half)], rel=1e-5
    )
    assert (1 - found["systems"]["value"]) * (1 - found["algorithmic"]["value"]) == pytest.approx(
        0.5
    )
    assert found["n"] == 3


def test_one_censored_seed_censors_all() -> None:
    found = over_seeds([one(0.5, 0.2), one(None, bound=0.125)])
    assert found["saving"]["value"] is None
    assert found["saving"]["why_missing"] == "censored: short (in 1 of 2 seeds)"
    assert found["bound"]["value"] == pytest.approx(1 - math.sqrt(0.5 * 0.875))


def row(
    arm: str, work: float, *, retry: float = 0.0, assess: float | None = 0.5, made: bool = True
) -> dict[str, Any]:
    hours = {"work": {"value": work}, "retry": {"value": retry}, "assess": {"value": assess}}
    counts = {"model_flops": {"value": 100 * work}, "tokens": {"value": int(10 * work)}}
    return {
        "arm": arm,
        "artifact": {} if made else None,
        "ledger": {"device_hours": hours, "counts": counts},
    }


def window(arm: str, kind: str, *, evaluation_h: float, kept: bool = True) -> dict[str, Any]:
    phases = {"eval": int(evaluation_h * 3600e9), "forward": int(3600e9)}
    return {
        "e": "window",
        "arm": arm,
        "window": {"kind": kind, "kept_ns": int(kept)},
        "phases_ns": phases,
    }


def test_a_run_is_charged_with_every_stage_and_attempt_and_not_with_evaluation() -> None:
    """A shallow model (2 h) and a teacher cache (1 h) are charged; a broken attempt's hours count,
    its FLOPs do not.
    """
    rows = [
        row("shallow", 2.0),
        row("capture", 1.0, assess=None),
        row("trained", 1.5, retry=0.25, made=False),
        row("trained", 4.0),
    ]
    events = [
        {"e": "open"},
        window("shallow", "work", evaluation_h=0.25),
        window("shallow", "assess", evaluation_h=0.5),
        window("trained", "work", evaluation_h=7, kept=False),
        window("trained", "work", evaluation_h=0.125),
    ]
    found = charged(rows, events)
    assert found["work_h"] == 2.0 + 1.0 + 1.5 + 4.0 - 0.25 - 0.125
    assert found["retry_h"] == 0.25
    assert found["evaluation_h"] == 1.5 + 0.25 + 0.125
    assert found["flops"] == 200 + 100 + 400
    assert found["stages"]["trained"] == {
        "work_h": 5.375,
        "retry_h": 0.25,
        "evaluation_h": 1.125,
        "flops": 400,
        "tokens": 40,
    }
    assert found["phases_s"] == {"eval": 0.375 * 3600, "forward": 2 * 3600}


def test_a_stacked_run_takes_the_steps_of_a_plain_one_and_a_teacher_is_extra() -> None:
    steps = lambda settings: [
        int(each.partition("steps=")[2]) for each in settings if "steps=" in each
    ]
    size = SIZES["cpu"]
    assert steps(settings_of("ours", size, 120)) == [120]
    assert steps(settings_of("ours+stack", size, 120)) == [42, 78]
    assert steps(settings_of("ours+taught", size, 120)) == [42, 120]
    assert "precision=fp32" in settings_of("ours+fp32+short", size, 120)
    assert "training.start_sequence_length=32" in settings_of("ours+fp32+short", size, 120)
    assert "precision=bf16" in settings_of("ours", size, 120)


def test_hours_without_others_are_the_share_of_the_processor_that_a_run_had() -> None:
    found = {"work_h": 2.0, "wall_s": 50.0, "cpu_s": 20.0, "metric": 3.0}
    assert script.undisturbed(found, 1) == {**found, "work_h": pytest.approx(0.8)}
    assert script.undisturbed(found, 2)["work_h"] == pytest.approx(0.4)
    # helpers' threads are no more than all
    assert script.undisturbed({**found, "cpu_s": 60.0}, 1)["work_h"] == 2.0


@pytest.mark.parametrize(
    "system", ["ours+none", "theirs", "ours+auto+pure", "ours+stack+taught", "ours+short+taught"]
)
def test_systems_that_are_none_are_refused(system: str) -> None:
    with pytest.raises(ValueError, match=r"give trainer|exclude"):
        parts_of(system)


def test_what_is_cut_short_leaves_the_runs_that_it_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All systems at full length come first."""
    saved = list[list[tuple[str, float]]]()

    def result_of(_: Bench, unit: Unit) -> dict[str, Any]:
        if unit.fraction < 1:
            raise KeyboardInterrupt
        figures = {"work_h": 1.0, "retry_h": 0.0, "evaluation_h": 0.1, "flops": 1e12}
        return {**asdict(unit), **figures, "tokens": 8, "metric": 2.0, "load": 1.0, "phases_s": {}}

    def save_result(_: str, figures: dict[str, Any], log: str) -> None:
        saved.append([(each["system"], each["fraction"]) for each in figures["units"]])

    monkeypatch.setattr(script, "result_of", result_of)
    monkeypatch.setattr(script, "save_result", save_result)
    monkeypatch.setattr(script, "warm_up", lambda *_: None)
    bench = Bench(SIZES["minutes"], "cpu", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        script.report(bench, ["trainer", "ours"], [0], 0.01, parts=False, save=True)
    assert saved == [[("trainer", 1.0)], [("trainer", 1.0), ("ours", 1.0)]]


def test_sizes_and_variants_are_whole() -> None:
    for size in SIZES.values():
        assert size.shares[-1] == 1
        assert list(size.shares) == sorted(size.shares)
        # as many tokens as it says
        assert all((size.steps * share).is_integer() for share in size.shares)
        parts_of(size.recipe)
    h200 = SIZES["h200"]
    assert h200.steps * h200.batch * h200.length == pytest.approx(60e6, rel=0.001)
    assert {part for variant in VARIANTS for part in parts_of(variant)} == set(PARTS)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers' Trainer
def test_a_small_run_ends_and_does_not_repeat_what_is_finished(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    args = [
        "--size",
        "check",
        "--seeds",
        "0",
        "--systems",
        "trainer",
        "ours+stack",
        "--shares",
        "1",
        "--work",
        str(tmp_path),
    ]
    monkeypatch.setattr(script, "warm_up", lambda *_: None)
    script.main(args)
    first = capsys.readouterr().out
    assert first.count("bits/byte") == 2 + 1
    assert not list(tmp_path.glob("*.part"))
    units = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    whole = {unit["system"]: unit for unit in units}
    assert whole["trainer"]["tokens"] == whole["ours+stack"]["tokens"] == 8 * 2 * 32
    assert set(whole["ours+stack"]["stages"]) == {"shallow", "trained"}
    assert 0 < whole["ours+stack"]["flops"] < whole["trainer"]["flops"]  # half as deep for a while

    def again(*_: Any) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(quality_units, "measure", again)
    script.main(args)
    assert capsys.readouterr().out == first
