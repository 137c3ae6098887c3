"""The gate's criteria by hand, and its promises by simulation through the shipped code, from item
files on.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gate_simulation import documents

from pipeline.compare.statistics import look_alpha
from pipeline.compare.verdict import (
    Criterion,
    Outcome,
    Spread,
    decide,
    disturbed,
    invalid,
    judged,
    memory_criterion,
    payback_criterion,
    quality_criterion,
    serving_criterion,
    training_criterion,
    unread,
)
from pipeline.config.settings.policy import PolicyConfig
from pipeline.config.settings.quality import QualityConfig
from pipeline.evaluation.quality.assess import read_items
from pipeline.evaluation.quality.recorded import take_recorded
from pipeline.ledger.values import Provenance, Value, measured, null
from pipeline.tasks.table import Task

PASS, FAIL, OPEN, INVALID = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.INVALID
DERIVED = Provenance.DERIVED
POLICY = PolicyConfig(min_items=20, min_documents=20)


def criterion(outcome: Outcome, *, gating: bool = True) -> Criterion:
    return Criterion(name="serving", outcome=outcome, value=measured(0.1), gating=gating)


@pytest.mark.parametrize(
    ("outcomes", "worst"),
    [
        ([PASS, PASS], PASS),
        ([PASS, OPEN], OPEN),
        ([OPEN, FAIL, PASS], FAIL),
        ([FAIL, INVALID, OPEN], INVALID),
    ],
)
def test_the_worst_of_what_is_asked_for_decides(outcomes: list[Outcome], worst: Outcome) -> None:
    shown_only = criterion(INVALID, gating=False)
    assert decide([*map(criterion, outcomes), shown_only]) is worst


def test_an_end_on_the_threshold_decides_nothing() -> None:
    assert judged(0.0, 0.1, 0.0) is OPEN
    assert judged(-0.1, 0.0, 0.0) is OPEN
    assert judged(1e-9, 0.1, 0.0) is PASS
    assert judged(-0.2, -1e-9, 0.0) is FAIL


def test_invalid_keeps_the_reading_and_names_the_reasons() -> None:
    made = invalid(criterion(PASS), ["a", "b"])
    assert (made.outcome, made.why, made.value.value) == (INVALID, "a; b", 0.1)
    assert invalid(criterion(PASS), []).outcome is PASS


def test_serving_by_hand() -> None:
    """Blocks that all save exactly a half have no spread; the other way round they cost twice as
    much.
    """
    half, whole = np.full((4, 2), 0.5), np.ones((4, 2))
    saved = serving_criterion(half, whole, minimum=0.2, alpha=0.0304)
    assert (saved.outcome, saved.value.value, saved.ci, saved.n) == (PASS, 0.5, (0.5, 0.5), 4)
    assert serving_criterion(half, whole, minimum=0.6, alpha=0.0304).outcome is FAIL
    assert serving_criterion(whole, half, minimum=None, alpha=0.0304).gating is False
    assert saved.level == pytest.approx(1 - 2 * 0.0304)


def test_memory_is_counted_and_at_least_the_minimum_passes() -> None:
    made = memory_criterion(measured(90), measured(100), of="peak_bytes", minimum=0.1)
    assert (made.outcome, made.ci, made.why) == (PASS, None, "of peak_bytes")
    assert (
        memory_criterion(measured(91), measured(100), of="peak_bytes", minimum=0.1).outcome is FAIL
    )
    assert (
        memory_criterion(null("no"), measured(100), of="peak_bytes", minimum=0.1).outcome is INVALID
    )


def test_training_needs_a_ledger_and_a_spread() -> None:
    hours = (Value(6.0, DERIVED), Value(10.0, DERIVED))
    alone = training_criterion(*hours, None, minimum=0.1, alpha=0.05)
    assert (alone.outcome, alone.value.value, alone.ci) == (OPEN, 0.4, None)
    assert "point estimate only" in (alone.why or "")
    # sd 0.05 over 5 runs, the candidate's twice that: ln 0.6 -+ t(0.95, 4) 0.05 sqrt(5) = -0.5108
    # -+ 2.1318 x 0.1118
    read = training_criterion(*hours, Spread(0.05, 5, "s"), minimum=0.1, alpha=0.05)
    half = 2.1318467863 * 0.05 * math.sqrt(5)
    assert read.ci == pytest.approx((1 - 0.6 * math.exp(half), 1 - 0.6 * math.exp(-half)))
    assert read.outcome is PASS
    missing = training_criterion(
        hours[0], null("no ledger: baseline"), None, minimum=0.1, alpha=0.05
    )
    assert (missing.outcome, missing.why) == (FAIL, "no ledger: baseline")
    assert training_criterion(hours[0], null("x"), None, minimum=None, alpha=0.05).gating is False


@pytest.mark.parametrize(
    ("value", "probability", "within", "outcome"),
    [
        (2e6, 0.97, 1e7, PASS),
        (2e6, 0.5, 1e7, OPEN),
        (2e6, 0.01, 1e7, FAIL),
        (None, 0.0, 1e7, FAIL),
        (2e6, None, None, PASS),
        (None, None, None, FAIL),
    ],
)
def test_payback_is_read_on_the_chance_of_having_paid(
    value: Any, probability: Any, within: Any, outcome: Any
) -> None:
    paid = null("never: not cheaper") if value is None else Value(value, DERIVED)
    chance = null("not declared") if probability is None else Value(probability, DERIVED)
    given = {**paid.to_json(), "unit": "token", "p_net_positive": chance.to_json()}
    assert payback_criterion(given, within=within, alpha=0.05).outcome is outcome


def test_a_payback_that_nobody_knows_is_invalid() -> None:
    unknown = {
        **null("no ledger: base").to_json(),
        "unit": "token",
        "p_net_positive": null("no ledger").to_json(),
    }
    assert payback_criterion(unknown, within=1e6, alpha=0.05).outcome is INVALID
    assert unread("energy", "no counter", 0.1).outcome is INVALID


def test_what_disturbed_a_pass_is_named() -> None:
    quiet = {"throttle_share": null("a CPU").to_json(), "foreign_load": measured(0.01).to_json()}
    assert disturbed(PolicyConfig(), "cpu", quiet) == []
    loud = {"throttle_share": measured(0.5).to_json(), "foreign_load": measured(0.4).to_json()}
    assert disturbed(PolicyConfig(hardware="H200"), "H100", loud) == [
        "measured on H100, and the policy asks for H200",
        "throttled 50% of the time, 5% allowed",
        "others used 40% of the machine, 10% allowed",
    ]
    unknown = {**quiet, "foreign_load": null("no NVML").to_json()}
    assert "unknown (no NVML)" in disturbed(PolicyConfig(), "cpu", unknown)[0]
    assert disturbed(PolicyConfig(max_foreign_load=None), "cpu", unknown) == []


# -- simulation, from item files on ---------------------------------------------------------------

N = 2000
FEW = 60  # of the default suite, where they show that the path works; the rates are the slow one's


def answers(
    rng: np.random.Generator, n: int, delta: float, discordant: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return right-or-wrong answers (n,) of arm and base: the arm better by `delta` in truth,
    `discordant` disagree.
    """
    kind = rng.random(n)
    only_arm, only_base = (discordant + delta) / 2, (discordant - delta) / 2
    base = rng.random(n) < 0.8
    arm = np.where(kind < only_arm, True, np.where(kind < only_arm + only_base, False, base))
    base = np.where(kind < only_arm, False, np.where(kind < only_arm + only_base, True, base))
    return arm, base


def written(path: Path, right: np.ndarray) -> Path:
    rows = (
        {"digest": f"{i:06d}", "label": 1, "prediction": int(each), "correct": int(each)}
        for i, each in enumerate(right)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def through_files(tmp_path: Path, arm: np.ndarray, base: np.ndarray, margin: float) -> Criterion:
    """Return the criterion on accuracy, from files as the gate takes them."""
    given = [
        written(tmp_path / f"{name}.jsonl", right) for name, right in (("arm", arm), ("base", base))
    ]
    return read_back("accuracy", given, Task.sequence_classification, margin)


def read_back(metric: str, given: list[Path], task: Task, margin: float) -> Criterion:
    sides = []
    for path in given:
        kept = path.with_name(f"kept_{path.name}")
        take_recorded(path, kept, task, QualityConfig(bootstrap=200), "candidate_items")
        sides.append(read_items(kept))
    return quality_criterion(metric, *sides, POLICY, margin=margin)


def bits_through_files(
    folder: Path, rng: np.random.Generator, shape: str, n: int, worse: float
) -> Criterion:
    """Return the criterion on bits per byte of `n` documents of unequal sizes; the arm takes
    `worse` more in truth.
    """
    arm, base, size = documents(rng, shape, n, 1.0, worse)
    given = []
    for name, bits in (("arm", arm), ("base", base)):
        rows = (
            {"digest": f"{i:06d}", "bits": b, "bytes": int(s), "tokens": 9, "correct": 4}
            for i, (b, s) in enumerate(zip(bits.tolist(), size, strict=True))
        )
        given.append(folder / f"{name}.jsonl")
        given[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_back("bits_per_byte", given, Task.causal_lm, 0.01)


@pytest.mark.parametrize("runs", [FEW, pytest.param(N, marks=pytest.mark.slow)])
@pytest.mark.parametrize("discordant", [0.03, 0.2])
def test_a_model_at_the_margin_passes_at_most_6_percent(
    tmp_path: Path, runs: int, discordant: float
) -> None:
    rng = np.random.default_rng(runs)
    passed = sum(
        through_files(tmp_path, *answers(rng, 400, -0.02, discordant), margin=0.02).outcome is PASS
        for _ in range(runs)
    )
    assert passed / runs <= 0.06 + 2 * math.sqrt(0.06 * 0.94 / runs) * (runs < N)


@pytest.mark.parametrize("runs", [FEW, pytest.param(N, marks=pytest.mark.slow)])
def test_equal_models_fail_at_most_alpha_of_the_time_and_pass_where_the_planner_said(
    tmp_path: Path, runs: int
) -> None:
    rng = np.random.default_rng(runs + 1)
    right = np.ones(200, dtype=bool)
    arm, base = right.copy(), right.copy()
    arm[:10] = base[10:20] = False  # a pilot that disagrees on 10% and finds no difference
    pilot = through_files(tmp_path, arm, base, margin=0.02)
    assert pilot.outcome is OPEN
    assert pilot.needed is not None
    found = [
        through_files(tmp_path, *answers(rng, pilot.needed, 0.0, 0.1), margin=0.02).outcome
        for _ in range(runs)
    ]
    slack = 2 * math.sqrt(0.8 * 0.2 / runs)
    assert found.count(PASS) / runs >= 0.8 - slack * (runs < N)
    assert found.count(FAIL) / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


SKEWED = ["normal", "damage to a tail", "5% damaged"]


@pytest.mark.parametrize("runs", [FEW, pytest.param(N, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SKEWED)
def test_bits_of_skewed_documents_at_the_margin_pass_at_most_6_percent(
    tmp_path: Path, runs: int, shape: str
) -> None:
    rng = np.random.default_rng(runs + 2)
    passed = sum(
        bits_through_files(tmp_path, rng, shape, 400, 0.01).outcome is PASS for _ in range(runs)
    )
    assert passed / runs <= 0.06 + 2 * math.sqrt(0.06 * 0.94 / runs) * (runs < N)


@pytest.mark.parametrize("runs", [FEW // 3, pytest.param(N, marks=pytest.mark.slow)])
def test_documents_of_an_equal_model_pass_where_the_planner_said_and_fail_at_most_alpha(
    tmp_path: Path, runs: int
) -> None:
    rng, outcomes = np.random.default_rng(runs + 3), list[Outcome]()
    while len(outcomes) < runs:
        pilot = bits_through_files(tmp_path, rng, "normal", 60, 0.0)
        # one that reads worse than the margin plans to fail what it read, however close that is to
        # the margin
        if (
            pilot.outcome is OPEN
            and pilot.needed is not None
            and (pilot.value.value or 0.0) > -0.01
        ):
            outcomes.append(bits_through_files(tmp_path, rng, "normal", pilot.needed, 0.0).outcome)
    assert outcomes.count(PASS) / runs >= 0.8 - 2 * math.sqrt(0.8 * 0.2 / runs) * (runs < N)
    assert outcomes.count(FAIL) / runs <= 0.05


def two_looks(
    rng: np.random.Generator, saving: float, minimum: float, drift: float
) -> tuple[Outcome, list[float]]:
    """Return what the two-look rule says of readings that drift, and the saving read at every
    look.
    """
    alpha, arm, base, read = look_alpha(0.05, 2), [], [], []
    for look in (1, 2):
        steps = np.arange(16).reshape(4, 4) + 16 * (look - 1)
        noise = np.exp(drift * steps + 0.01 * rng.standard_normal((4, 4)))
        arm.append((1 - saving) * noise[:, [0, 3]])
        base.append(noise[:, [1, 2]])
        made = serving_criterion(
            np.concatenate(arm), np.concatenate(base), minimum=minimum, alpha=alpha
        )
        read.append(made.value.value or 0.0)
        if made.outcome is not OPEN:
            break
    return made.outcome, read


@pytest.mark.parametrize("runs", [FEW * 5, pytest.param(N, marks=pytest.mark.slow)])
@pytest.mark.parametrize("drift", [0.0, 0.005])
def test_two_looks_hold_alpha_and_drift_leaves_no_bias(runs: int, drift: float) -> None:
    rng = np.random.default_rng(runs + int(drift * 1000))
    at_minimum = [two_looks(rng, 0.1, 0.1, drift) for _ in range(runs)]
    passed = sum(outcome is PASS for outcome, _ in at_minimum)
    assert passed / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)
    first = np.array([read[0] for _, read in at_minimum])
    assert abs(first.mean() - 0.1) <= 4 * first.std() / math.sqrt(runs)
    inside = [two_looks(rng, 0.13, 0.1, drift)[0] for _ in range(FEW)]
    assert inside.count(PASS) / FEW >= 0.8
