"""Steps and drift over a model's releases: rates by simulation, reading from a store, hostile
names, the command.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_result import make_run
from reports import recent, verdict_section

from pipeline.cli.commands.history import main
from pipeline.compare.history import (
    Finding,
    Judged,
    between_variance,
    champions,
    count_once,
    drift,
    figure,
    findings,
    from_added,
    pooled_errors,
    step,
    to_added,
)
from pipeline.compare.statistics import abba_saving, look_alpha
from pipeline.gate.history import as_json, history_of, of_verdict
from pipeline.ledger.journal import Journal
from pipeline.report.history import alarms, remarks, to_csv
from pipeline.store.verdicts import as_recorded, checksum
from pipeline.tracking import registry
from pipeline.tracking.deliver import deliver
from pipeline.tracking.registry import Candidate, promote, read_verdicts

# -- simulation -----------------------------------------------------------------------------------

FEW, MANY = 300, 2000
Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray, float]]


def readings(
    earlier: np.ndarray, newest: float, tau: float, shift: float = 0.0, blocks: int = 0
) -> Draw:
    """Readings with these errors, the newest `shift` lower; with `blocks`, errors are estimated
    from so many.
    """
    errors = np.append(earlier, newest)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        truth = rng.normal(0, tau, len(errors))
        truth[-1] -= shift
        if not blocks:
            return rng.normal(truth, errors), errors, np.inf
        read = rng.normal(truth[:, None], errors[:, None] * blocks**0.5, (len(errors), blocks))
        own = read.std(axis=1, ddof=1) / blocks**0.5
        return read.mean(axis=1), *pooled_errors(own, np.full(len(errors), blocks))

    return draw


def alarm_rate(draw: Draw, n: int) -> float:
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(n):
        values, errors, degrees = draw(rng)
        told = step(values, errors, degrees=degrees)
        assert told is not None
        alarms += told.alarm
    return alarms / n


def allowed(n: int, alpha: float = 0.05) -> float:
    return alpha + 2 * (alpha * (1 - alpha) / n) ** 0.5


WITHOUT_A_STEP = {
    "alike": readings(np.ones(10), 1, 0),
    "three": readings(np.ones(3), 1, 0),
    "spread as large as errors": readings(np.ones(4), 1, 1),
    "all spread": readings(np.ones(3), 1, 5),
    "precise newest": readings(np.ones(4), 0.1, 1),
    "coarse newest": readings(np.ones(10), 3, 0.5),
    "unequal": readings(np.tile([0.2, 1, 1, 3], 2), 0.5, 1),
    "blocks": readings(np.ones(6), 1, 0.5, blocks=4),
    "a noisy day": readings(np.ones(10), 3, 0, blocks=4),
}


@pytest.mark.parametrize("name", WITHOUT_A_STEP)
def test_without_a_step_alarms_are_at_most_alpha(name: str) -> None:
    assert alarm_rate(WITHOUT_A_STEP[name], FEW) <= allowed(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_A_STEP)
def test_without_a_step_alarms_are_at_most_alpha_in_2000_histories(name: str) -> None:
    assert alarm_rate(WITHOUT_A_STEP[name], MANY) <= allowed(MANY)


def step_of_3(k: int, tau: float) -> Draw:
    return readings(np.ones(k), 1, tau, shift=3 * ((1 + tau**2) * (1 + 1 / k)) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "tau", "found"), [(3, 0, 0.38), (6, 1, 0.78), (8, 0, 0.80), (8, 1, 0.80), (12, 3, 0.80)]
)
def test_a_step_of_3_standard_errors_is_found(k: int, tau: float, found: float) -> None:
    assert alarm_rate(step_of_3(k, tau), MANY) >= found


def test_a_large_step_is_found_and_a_step_up_is_none() -> None:
    assert alarm_rate(step_of_3(10, 0), FEW) >= 0.75
    assert alarm_rate(readings(np.ones(10), 1, 0, shift=-3), FEW) == 0


def test_step_by_hand() -> None:
    """Earlier 10, 11, 12 with errors of 1: mean 11, spread no larger than the errors. t(0.95, 2) =
    2.92.
    """
    told = step([10, 11, 12, 5], [1, 1, 1, 1])
    assert told is not None
    assert (told.estimate, told.spread, told.earlier) == (-6, 0, 3)
    assert told.high == pytest.approx(-6 + 2.919986 * (1 + 1 / 3) ** 0.5)
    assert told.alarm
    apart = step([0, 10, 20, 5], [1, 1, 1, 1])  # sample variance 100, of which 1 is error
    assert apart is not None
    assert apart.spread**2 == pytest.approx(99)
    assert apart.high == pytest.approx(-5 + 2.919986 * (100 * 4 / 3) ** 0.5)
    assert step([10, 11, 5], [1, 1, 1]) is None
    # an error known from two blocks: t(0.95, 1) = 6.31
    own = step([10, 11, 12, 5], [1, 1, 1, 1], degrees=1)
    assert own is not None
    assert own.high == pytest.approx(-6 + 6.313752 * (1 + 1 / 3) ** 0.5)
    unequal = step([0, 0, 0, -1], [0.1, 1, 1, 1])  # of three, two count for little
    assert unequal is not None
    assert unequal.high == pytest.approx(-1 + 6.313752 * (1 + 1 / 102) ** 0.5)
    exact = step([0.0, 0.0, 0.0, -0.1], [0, 0, 0, 0])
    assert exact is not None
    assert exact.alarm


def test_few_blocks_share_their_spread_by_hand() -> None:
    """Blocks have variances 4, 4 and 36, pooled 44 / 3. The newest keeps its own error where that
    is larger.
    """
    errors, degrees = pooled_errors([1, 1, 3], [4, 4, 4])
    assert (errors[:2], errors[2], degrees) == (pytest.approx([(11 / 3) ** 0.5] * 2), 3, 3)
    errors, degrees = pooled_errors([3, 1, 1], [4, 4, 4])
    assert (errors, degrees) == (pytest.approx([(11 / 3) ** 0.5] * 3), np.inf)


def test_between_variance_solves_its_equation() -> None:
    rng = np.random.default_rng(0)
    values, variances = rng.normal(0, 3, 8), rng.uniform(0.1, 2, 8)
    weights = 1 / (variances + between_variance(values, variances))
    mean = weights @ values / weights.sum()
    assert weights @ (values - mean) ** 2 == pytest.approx(7)


def creep_rate(deltas: np.ndarray, error: float, n: int) -> float:
    rng = np.random.default_rng(2)
    told = (
        drift(rng.normal(deltas, error), np.full(len(deltas), error), margin=0.01) for _ in range(n)
    )
    return float(np.mean([each is not None and each.alarm for each in told]))


@pytest.mark.parametrize(("m", "error"), [(1, 0.003), (1, 0.01), (2, 0.01), (5, 0.003), (20, 0.01)])
def test_without_a_loss_drift_alarms_are_at_most_alpha(m: int, error: float) -> None:
    """A single coarse change sounds at alpha exactly; any best of several starts below it."""
    assert creep_rate(np.zeros(m), error, 3 * MANY) <= allowed(3 * MANY)
    assert creep_rate(np.full(m, 0.002), error, MANY) <= allowed(MANY)


def test_small_losses_one_after_another_are_found() -> None:
    lost = np.full(10, -0.004)  # each well inside a margin of 0.01
    assert [
        creep_rate(lost[:m], 0.003, MANY) >= found for m, found in ((3, 0.5), (5, 0.7), (10, 0.9))
    ] == [True] * 3
    # against the best, not the first
    assert creep_rate(np.array([0.05, *lost]), 0.003, MANY) >= 0.9


def test_drift_by_hand() -> None:
    told = drift([0.02, -0.03, -0.01], [0.003, 0.003, 0.004], margin=0.01)
    assert told is not None
    assert (told.best, told.changes, told.alarm, told.shown) == (1, 2, True, False)
    assert (told.estimate, told.high) == (
        pytest.approx(-0.04),
        pytest.approx(-0.04 + 2.128045 * 0.005),
    )
    unsure = drift([-0.004, -0.004], [0.01, 0.01], margin=0.01)
    assert unsure is not None
    assert (unsure.alarm, unsure.shown) == (False, False)
    inside = drift([-0.004, -0.004], [0.001, 0.001], margin=0.01)  # lost for sure, and forgiven
    assert inside is not None
    assert (inside.high < 0, inside.alarm, inside.shown) == (True, False, False)
    assert drift([-0.004, -0.004], [0.0005, 0.0005], margin=0.01).shown  # type: ignore[union-attr]
    assert drift([0.01, 0.0], [0.01, 0.01], margin=0.01) is None
    assert drift([], [], margin=0.01) is None


def test_a_figure_s_error_is_that_of_the_readings_it_was_made_from() -> None:
    rng = np.random.default_rng(3)
    arm, base = np.exp(rng.normal(-0.2, 0.02, (8, 2))), np.exp(rng.normal(0, 0.02, (8, 2)))
    level = 1 - 2 * look_alpha(0.05, 2)
    read = figure(*abba_saving(arm, base, level=level), level=level, relative=True, blocks=8)
    ratios = np.log(arm / base).mean(axis=1)
    assert read is not None
    plain = ratios.std(ddof=1) / 8**0.5
    assert read.added == pytest.approx(-ratios.mean())
    assert plain <= read.error <= 1.5 * plain  # the interval is wider on the side of a tail
    assert from_added(to_added(0.3), relative=True) == pytest.approx(0.3)
    for broken in ((None, 0, 1), (0.1, float("nan"), 0.2), (0.1, 0.2, 0.0), (0.5, 0.1, 1.0)):
        assert figure(*broken, level=0.9, relative=True, blocks=4) is None
    assert figure(0.1, 0.0, 0.2, level=0.9, relative=True, blocks=1) is None
    assert figure(0.1, 0.0, 0.2, level=float("nan"), relative=False) is None


# -- what is counted ------------------------------------------------------------------------------


def judged(n: int, *, quality: float = -0.001, **changes: Any) -> Judged:
    serving = figure(0.2, 0.18, 0.22, level=0.9392, relative=True, blocks=8)
    read = figure(quality, quality - 0.002, quality + 0.002, level=0.9, relative=True)
    made: dict[str, Any] = {
        "created": f"2026-11-{n + 1:02}T10:00:00+00:00",
        "run": f"run-{n}",
        "model": "m",
        "verdict": "PASS",
        "key": f"key-{n}",
        "look": 1,
        "candidate": f"c{n}",
        "baseline": f"c{n - 1}",
        "policy": "strict",
        "policy_sha256": "p",
        "data": "d",
        "device": "cpu",
        "serving": serving,
        "quality": read,
        "quality_key": "bits_per_byte",
        "margin": 0.01,
    }
    return Judged(**{**made, **changes})


def test_answers_given_again_and_first_looks_count_once_and_other_policies_are_visible() -> None:
    first = judged(1, verdict="INCONCLUSIVE")
    second = replace(
        first, look=2, verdict="PASS", created="2026-11-03T10:00:00+00:00", run="run-2nd"
    )
    again = [replace(second, recorded="run-2nd", run=f"again-{n}") for n in range(3)]
    other = replace(first, key="other", policy="smoke", policy_sha256="q", run="other")
    counted = count_once([*again, other, second, first])
    assert [(each.run, each.again, each.ways) for each in counted] == [
        ("other", 0, 2),
        ("run-2nd", 3, 2),
    ]
    alone = count_once(again)  # the run that reached it was deleted
    assert [(each.verdict, each.again) for each in alone] == [("PASS", 3)]


def test_what_was_invalid_counts_as_no_look(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = judged(3, verdict="INVALID", look=2, created="2026-11-09T10:00:00+00:00", run="lost")
    assert [each.run for each in count_once([judged(3, verdict="INCONCLUSIVE"), lost])] == ["run-3"]
    assert [each.run for each in count_once([lost])] == ["lost"]
    spoilt = a_verdict(2, verdict="INVALID", look=2)
    assert f"({spoilt['policy']['sha256'][:8]}), no interim analysis counted of 2" in "\n".join(
        verdict_section(spoilt)
    )
    assert "| no interim analysis counted |" in "\n".join(
        recent({**history_of(spoilt, None), "why": None})
    )
    write_gate(root, spoilt)
    _, out, _ = run("--root", str(root), capsys=capsys)
    assert "no interim analysis counted" in out
    assert "look 2" not in out
    _, out, _ = run("--root", str(root), "--csv", capsys=capsys)
    (row,) = csv.DictReader(io.StringIO(out, newline=""))
    assert (row["verdict"], row["look"]) == ("INVALID", "")


def test_a_step_is_read_under_one_policy_and_device_one_reading_a_pair() -> None:
    low = figure(0.05, 0.03, 0.07, level=0.9392, relative=True, blocks=8)
    releases = [
        judged(n, serving=figure(0.2 + n / 1e3, 0.18, 0.22, level=0.9392, relative=True, blocks=8))
        for n in range(5)
    ]
    found = {(each.kind, each.of): each for each in findings([*releases, judged(5, serving=low)])}
    told = found["step", "serving"]
    assert told.alarm
    assert told.releases == 5
    assert told.value == pytest.approx(1 - 0.95 / 0.798, abs=1e-3)
    assert not found["step", "quality/bits_per_byte"].alarm
    assert not found["drift", "quality/bits_per_byte"].alarm
    elsewhere = findings([*releases, judged(5, serving=low, device="H200")])
    assert (elsewhere[0].alarm, elsewhere[0].releases) == (False, 0)
    assert "a step takes 3" in str(elsewhere[0].why)
    twice = findings(
        [
            releases[0],
            *(replace(releases[0], key=f"k{n}") for n in range(5)),
            judged(5, serving=low),
        ]
    )
    assert twice[0].releases == 1  # judged six times, one release
    unread = findings([*releases, judged(5, serving=None)])
    assert "has no interval" in str(unread[0].why)
    assert not findings(
        [judged(1, verdict="INVALID"), judged(2, verdict="NO_BASELINE", baseline=None)]
    )


def test_drift_follows_the_champions_back_to_the_best() -> None:
    chain = [judged(n, quality=-0.006) for n in range(4)]
    rejected = [
        judged(n, candidate=f"x{n}", key=f"x{n}", verdict="FAIL", quality=-0.5) for n in range(4)
    ]
    told = findings([each for pair in zip(chain, rejected, strict=True) for each in pair])[-1]
    # c3 has not replaced c2 yet
    assert (told.kind, told.alarm, told.releases, told.since) == ("drift", True, 3, "c-1")
    assert told.value == pytest.approx(1 - 1.006**3)
    assert [each.candidate for each in champions([*rejected, *chain])] == ["c0", "c1", "c2", "c3"]
    itself = judged(9, candidate="c3", baseline="c3", key="itself", quality=0.0)
    assert champions([*chain, itself]) == champions(chain)  # a model against itself hides nothing
    direct = judged(9, candidate="c3", baseline="c-1", key="direct", quality=-0.025)
    failed = findings([*chain, replace(direct, verdict="FAIL")])[-1]
    assert (failed.alarm, failed.releases) == (True, 4)  # judged against the best: the sum stands
    passed = findings([*chain, direct])
    assert (passed[-1].value, passed[-1].releases) == (pytest.approx(-0.025), 1)
    assert not passed[1].alarm  # what c3 reads against an old champion is no release's reading
    ring = [judged(1, baseline="c2"), judged(2, baseline="c1")]
    assert [each.candidate for each in champions(ring)] == ["c1", "c2"]
    assert "no chain of champions" in str(findings([judged(1, verdict="FAIL")])[-1].why)
    broken = findings([chain[0], replace(chain[1], quality=None), *chain[2:]])[-1]
    assert (broken.releases, broken.since) == (2, "c1")  # as far back as it was read
    better = findings([judged(n, quality=0.01) for n in range(3)])[-1]
    assert (better.alarm, better.releases, better.since) == (False, 0, "c2")


# -- the store ------------------------------------------------------------------------------------


def a_verdict(
    n: int, *, model: str | None = "m", saving: float = 0.2, loss: float = 0.001, **changes: Any
) -> dict:
    def criterion(
        name: str, v: float, half: float, level: float, threshold: float, count: int
    ) -> dict[str, Any]:
        return {
            "name": name,
            "outcome": "PASS",
            "gating": True,
            "value": {"value": v, "provenance": "derived", "why_missing": None},
            "ci": [v - half, v + half],
            "level": level,
            "threshold": threshold,
            "unit": "1",
            "n": count,
            "needed": None,
            "why": None,
        }

    side = {
        "model": model,
        "version": None,
        "path": "/p",
        "url": None,
        "charge": None,
        "bytes": 1,
        "reference": "r",
    }
    verdict = {
        "schema": 2,
        "line": f"PASS {n}",
        "verdict": "PASS",
        "exit_code": 0,
        "why": None,
        "criteria": [
            criterion("quality/bits_per_byte", -loss, 0.002, 0.9, -0.01, 400),
            criterion("serving", saving, 0.02, 1 - 2 * look_alpha(0.05, 2), 0.05, 4),
        ],
        "candidate": {**side, "digest": f"{n:032x}", "model": None},
        "baseline": {**side, "digest": f"{n - 1:032x}"},
        "policy": {"name": "strict", "sha256": "a" * 32, "settings": {}},
        "task": "causal_lm",
        "primary": "bits_per_byte",
        "unit": "token",
        "data": "d" * 32,
        "device": {"kind": "cpu", "name": "CPU", "count": 1},
        "key": f"{n + 4096:032x}",
        "look": 1,
        "looks": 2,
        "readings": {},
        "run_id": f"run-{n}",
        "created": f"2026-11-{n + 1:02}T10:00:00+00:00",
    }
    return {**verdict, **changes}


def write_gate(root: Path, verdict: dict[str, Any], baseline: str = "a folder") -> None:
    """Leave a gate's run as it leaves one, and deliver it."""
    folder = root / "runs" / verdict["run_id"]
    folder.mkdir(parents=True)
    more = {"sha256": checksum(as_recorded(verdict)), "promotion": None}
    (folder / "verdict.json").write_text(json.dumps({**verdict, **more}))
    journal = Journal(folder / "journal.jsonl")
    journal.write(
        "run_start",
        run_id=folder.name,
        started_ns=0,
        attempt=1,
        recipe="release_check",
        question="?",
        experiment="release_check",
        tracking_uri=None,
        tags={},
        datasets=[],
        environment={"device": verdict["device"]["name"], "data.digest": verdict["data"]},
        params={
            "task": "causal_lm",
            "baseline": baseline,
            "policy.alpha": 0.05,
            "policy.looks": 2,
            "policy.blocks": 4,
            "policy.metrics.bits_per_byte.margin": 0.01,
            "quality.margin": 0.05,
        },
    )
    journal.write("verdict", verdict=verdict, sha256=more["sha256"])
    journal.write(
        "run_end",
        status="FINISHED",
        why=None,
        primary_arm="candidate",
        run=make_run([]),
        description="x",
        files=["verdict.json"],
    )
    journal.close()
    assert deliver(folder) > 0


def uri(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Five releases of m, the last a step down that was given again; one of another model with a
    hostile name.
    """
    root = tmp_path_factory.mktemp("released")
    (root / "mlflow.db").write_bytes(empty_store.read_bytes())
    for n in range(1, 5):
        write_gate(root, a_verdict(n, saving=0.2 + n / 1000))
    last = a_verdict(5, saving=0.02, verdict="FAIL")
    write_gate(root, last)
    write_gate(root, {**last, "run_id": "run-5b", "recorded": "run-5"})
    hostile = "=cmd|'/c calc'!A1\x1b[2J\n`<script>`"
    write_gate(
        root,
        a_verdict(
            7,
            model=hostile,
            policy={"name": "=1+1|x", "sha256": "b", "settings": {}},
            created="not a time\x1b[31m",
        ),
    )
    write_gate(root, a_verdict(8, model=None))
    first = a_verdict(9, model=None, verdict="NO_BASELINE", baseline=None, criteria=[], key="")
    write_gate(root, first, baseline="models:/newer@champion")
    promote(uri(root), "m", Candidate(f"{4:032x}", "", "/p"), None, {})
    return root


def test_a_file_is_read_as_mlflow_s_client_reads_it(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_verdicts(uri(released))
    assert len(found) == 9
    assert [each.version for each in found if each.version] == ["1"]
    monkeypatch.setattr(registry, "sqlite_file", lambda _: None)
    assert found == read_verdicts(uri(released))


def test_what_the_store_tells_is_what_the_verdict_said(released: Path) -> None:
    found = {each.run: each for each in read_verdicts(uri(released))}
    assert len(found) == 9
    assert (found["run-9"].model, found["run-9"].verdict) == ("newer", "NO_BASELINE")
    assert (
        history_of({**a_verdict(9, model=None), "run_id": "x"}, uri(released), model="newer")["of"]
        == 2
    )
    for n in (1, 4):
        told, said = found[f"run-{n}"], of_verdict(a_verdict(n, saving=0.2 + n / 1000))
        assert replace(told, version=None, serving=None, quality=None) == replace(
            said, serving=None, quality=None
        )
        for ours, theirs in ((told.serving, said.serving), (told.quality, said.quality)):
            assert ours is not None is not theirs
            assert (ours.value, ours.low, ours.high) == (theirs.value, theirs.low, theirs.high)
            assert (ours.error, ours.blocks) == (pytest.approx(theirs.error), theirs.blocks)
    assert found["run-4"].version == "1"
    assert found["run-5b"].recorded == "run-5"


def test_the_gate_s_own_verdict_joins_the_history_once(released: Path) -> None:
    verdict = a_verdict(6, saving=0.01, verdict="FAIL", baseline=a_verdict(5)["baseline"])
    told = history_of(verdict, uri(released), last=3)
    assert (told["of"], len(told["releases"]), told["why"]) == (6, 3, None)
    assert [each["run"] for each in told["releases"]] == ["run-4", "run-5", "run-6"]
    assert told["releases"][1]["again"] == 1
    json.dumps(told, allow_nan=False)
    text = "\n".join(recent(told))
    assert text.startswith("- no step down in serving")
    assert (
        "v1 00000000 | 00000000 | PASS | +20.40% \\[+18.40, +22.40\\] | -0.10% \\[-0.30, +0.10\\]"
        " vs -1 |" in text
    )
    known = history_of(a_verdict(4, saving=0.204), uri(released))  # the store has had it already
    assert known["of"] == 5


def test_a_history_never_stands_in_a_verdict_s_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = history_of(a_verdict(1), "http://127.0.0.1:9")
    assert "cannot be reached" in down["why"]
    assert recent(down)[-1].startswith(
        "Nothing to show: tracking.uri: MLflow at http://127.0.0.1:9 cannot be reached"
    )
    # the first of all
    assert history_of(a_verdict(1), f"sqlite:///{tmp_path / 'none.db'}")["of"] == 1
    assert "keeps out" in history_of(a_verdict(1), None)["why"]
    first = a_verdict(1, verdict="NO_BASELINE", baseline=None, criteria=[], key="")
    first["candidate"]["model"] = "m"
    assert "2026-11-02 10:00 | 00000000 | - | NO_BASELINE | - | - | strict | look 1 |" in "\n".join(
        recent(history_of(first, f"sqlite:///{tmp_path / 'none.db'}"))
    )
    assert "names a registered model" in history_of(a_verdict(1, model=None), None)["why"]


def test_an_invalid_reading_has_no_interval_in_the_store(root: Path) -> None:
    verdict = a_verdict(1)
    verdict["criteria"][1] |= {"outcome": "INVALID", "why": "others used 50% of the machine"}
    write_gate(root, verdict)
    assert [each.serving for each in (*read_verdicts(uri(root)), of_verdict(verdict))] == [
        None,
        None,
    ]


# -- the command ----------------------------------------------------------------------------------


def run(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(list(args))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_lists_models_and_ends_with_3_on_an_alarm_only_where_asked(
    released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--root", str(released), "--model", "m"]
    code, out, _ = run(*args, "--last", "2", capsys=capsys)
    assert code == 0
    assert out.startswith("m: 2 of 5 releases, the newest last\n")
    alarm = (
        r"- ALARM: serving has stepped down: candidate 00000000 reads -\S+% against the mean of 4"
    )
    assert re.search(rf"{alarm} earlier releases \(\d+% bound -\S+%\)\n", out)
    assert "look 1, given again 1x" in out
    assert "no step down in bits per byte: " in out
    assert run(*args, "--fail-on-alarm", capsys=capsys)[0] == 3
    code, out, err = run(*args, "--fail-on-alarm", "--csv", capsys=capsys)
    assert (code, err.count("ALARM")) == (3, 1)
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert [float(row["serving_saving"]) for row in rows] == pytest.approx(
        [0.201, 0.202, 0.203, 0.204, 0.02]
    )


def test_a_drift_is_a_sentence() -> None:
    told = Finding(
        kind="drift",
        of="quality/bits_per_byte",
        alarm=True,
        value=-0.02,
        low=-0.03,
        high=-0.01,
        level=0.9,
        margin=0.01,
        releases=1,
        since="c1c1c1c1c1",
        candidate="c2",
        shown=False,
    )
    history: Any = {"findings": [asdict(told)]}
    reads = "the champion reads -2.00% [-3.00, -1.00] against c1c1c1c1, 1 change ago, where a loss"
    assert alarms(history) == [
        f"ALARM: bits per byte has drifted: {reads} of 1% is allowed; judge the next release"
        " against that one: baseline=c1c1c1c1c1"
    ]
    history = {"findings": [asdict(replace(told, alarm=False, releases=2))]}
    (said,) = remarks(history)
    assert said.startswith("no drift in bits per byte: the champion reads -2.00% ")
    assert "2 changes ago" in said
    assert said.endswith("; a loss beyond it is not excluded")


def test_hostile_names_reach_neither_terminal_nor_spreadsheet_nor_markdown(
    released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("--root", str(released), capsys=capsys)
    assert code == 0
    assert "\x1b" not in out
    assert out.index("=cmd|") < out.index("m: 5 of 5") < out.index("(no registered model): 1 of 1")
    _, out, _ = run("--root", str(released), "--csv", capsys=capsys)
    cells = [cell for row in csv.reader(io.StringIO(out, newline="")) for cell in row]
    assert any(cell.startswith("'=cmd|") for cell in cells)
    assert not any(cell.startswith(("=", "@", "+")) for cell in cells)
    hostile = [
        each
        for each in count_once(read_verdicts(uri(released)))
        if (each.model or "").startswith("=")
    ]
    history = {"model": hostile[0].model, **as_json(hostile, 5), "why": "x\n# y"}
    text = "\n".join(recent(history))
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "\n# y" not in text
    assert "\r\n" in to_csv([history])


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--verbose"], 2, "--verbose: is no option of history"),
        (["--last"], 2, "--last: has no value"),
        (["--csv=x"], 2, "--csv: takes no value"),
        (["--last", "0"], 1, "--last: '0' is no number of releases"),
        (["--last", "²"], 1, "--last: '²' is no number of releases"),
        (["--root", "nowhere"], 1, "--root: there is no folder nowhere"),
        ([], 1, "tracking.uri: there is no folder"),
        (["--root", "."], 1, "--root: there is no MLflow store"),
        (
            ["--uri", "http://127.0.0.1:9"],
            1,
            "tracking.uri: MLflow at http://127.0.0.1:9 cannot be reached",
        ),
    ],
)
def test_refusals_are_one_line_and_make_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found, out, err = run(*args, capsys=capsys)
    assert (found, out) == (code, "")
    assert err.startswith(f"refused: {said}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_nobody_judged_is_refused_and_an_empty_store_is_not(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--root", str(root), capsys=capsys)[:2] == (0, "no gate has judged a release here\n")
    code, _, err = run("--root", str(root), "--model", "m'\x1b", capsys=capsys)
    assert code == 1
    assert err.startswith('refused: --model: no verdict names "m\'"')
