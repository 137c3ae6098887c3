"""The gate against itself: rates by simulation, a real tiny self-test on a CPU, what it leaves in
MLflow, refusals.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from here import here
from mlflow import MlflowClient
from scipy import stats
from test_run import TINY

from pipeline.cli.commands.selftest import main
from pipeline.compare.selftest import (
    Look,
    Trial,
    false_answers,
    noise_floor,
    one_trial,
    power,
    sum_up,
    training_floor,
    training_spread,
)
from pipeline.compare.verdict import Outcome, training_criterion
from pipeline.evaluation.serving.measure import Interleaved
from pipeline.ledger.values import measured
from pipeline.report.selftest import lines, markdown
from pipeline.runs import selftest as gate_selftest
from pipeline.tracking.registry import find_spread

FEW, MANY = 400, 20_000
ALPHA, BLOCKS = 0.05, 4

# -- simulation -----------------------------------------------------------------------------------


def looks_of(
    rng: np.random.Generator, *, sd: float = 0.01, saving: float = 0.0, drift: float = 0.0
) -> Look:
    """Blocks of lognormal readings, arm base base arm, on a machine that slows down by `drift` a
    reading.
    """
    taken = 0

    def look() -> tuple[np.ndarray, np.ndarray, list[str]]:
        nonlocal taken
        order = drift * (taken + np.arange(4 * BLOCKS)).reshape(BLOCKS, 4)
        taken += 4 * BLOCKS
        log = rng.normal(0, sd, (BLOCKS, 4)) + order
        log[:, [0, 3]] += np.log1p(-saving)
        return np.exp(log[:, [0, 3]]), np.exp(log[:, [1, 2]]), []

    return look


def outcomes(n: int, *, looks: int = 2, **machine: float) -> list[Trial]:
    rng = np.random.default_rng(7)
    return [one_trial(looks_of(rng, **machine), alpha=ALPHA, looks=looks) for _ in range(n)]


# of the two looks at 4 and 8 blocks, by simulation: less than alpha, because of the skewness'
# correction
SIZE = 0.0430


def check_false_answers(n: int, **machine: float) -> None:
    trials = outcomes(n, **machine)
    most = SIZE + 2 * (SIZE * (1 - SIZE) / n) ** 0.5
    for outcome in (Outcome.PASS, Outcome.FAIL):
        assert sum(trial.outcome is outcome for trial in trials) / n <= most
    assert not sum_up(trials, [1] * n, alpha=ALPHA, blocks=BLOCKS, looks=2).too_many


@pytest.mark.parametrize("drift", [0.0, 0.005])
def test_a_model_against_itself_is_answered_falsely_at_most_as_alpha_allows(drift: float) -> None:
    check_false_answers(FEW, drift=drift)


@pytest.mark.slow
@pytest.mark.parametrize("drift", [0.0, 0.005])
def test_a_model_against_itself_in_20_000_trials(drift: float) -> None:
    check_false_answers(MANY, drift=drift)


def test_the_scale_of_the_noise_changes_no_answer() -> None:
    quiet, loud = (outcomes(FEW, sd=sd) for sd in (0.001, 0.03))
    assert [trial.outcome for trial in quiet] == [trial.outcome for trial in loud]


@pytest.mark.parametrize("looks", [1, 2])
def test_the_noise_floor_is_found_as_often_as_it_says(looks: int) -> None:
    sd_log = 0.01  # of a block: mean of two differences of readings with 0.01 each
    floor = noise_floor(sd_log, alpha=ALPHA, blocks=BLOCKS, looks=looks)
    assert power(floor, sd_log, alpha=ALPHA, blocks=BLOCKS, looks=looks) == pytest.approx(
        0.8, abs=0.001
    )
    trials = outcomes(FEW, looks=looks, saving=floor)
    assert sum(trial.outcome is Outcome.PASS for trial in trials) / FEW == pytest.approx(
        0.8, abs=0.05
    )
    told = sum_up(trials, [1] * FEW, alpha=ALPHA, blocks=BLOCKS, looks=looks)
    assert told.sd_log == pytest.approx(sd_log, rel=0.05)
    assert told.noise_floor == pytest.approx(floor, rel=0.05)
    assert told.passes.too_many  # as if it were A/A: a gate that is wrong this often is found out


def test_power_is_alpha_at_nothing_and_one_where_nothing_is_noisy() -> None:
    assert power(0.0, 0.01, alpha=ALPHA, blocks=BLOCKS, looks=2) == pytest.approx(SIZE, abs=0.003)
    curve = [
        power(each, 0.01, alpha=ALPHA, blocks=BLOCKS, looks=2)
        for each in (0.002, 0.005, 0.01, 0.02)
    ]
    assert curve == sorted(curve)
    assert (
        power(0.1, 0.0, alpha=ALPHA, blocks=2, looks=1),
        power(0.0, 0.0, alpha=ALPHA, blocks=2, looks=1),
    ) == (1, 0)
    assert noise_floor(0.0, alpha=ALPHA, blocks=2, looks=1) == 0
    # against the noncentral t, which has no such correction
    one = power(0.01, 0.01, alpha=ALPHA, blocks=6, looks=1)
    plain = stats.nct.sf(stats.t.isf(ALPHA, 5), 5, -np.log1p(-0.01) / 0.01 * 6**0.5)
    assert plain - 0.08 < one < plain


def test_one_trial_takes_the_second_look_where_the_first_decides_nothing() -> None:
    taken: list[int] = []

    def look(*ratios: float, disturbed: tuple[str, ...] = ()) -> Look:
        def read() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
            taken.append(1)
            arm = np.repeat(np.array(ratios)[:, None], 2, axis=1)
            return arm, np.ones_like(arm), disturbed

        return read

    open_ = look(0.99, 1.01, 1.0, 1.002)
    assert (one_trial(open_, alpha=ALPHA, looks=2).looks, len(taken)) == (2, 2)
    assert one_trial(open_, alpha=ALPHA, looks=1).outcome is Outcome.INCONCLUSIVE
    taken.clear()
    passed = one_trial(look(0.9, 0.91, 0.905, 0.9), alpha=ALPHA, looks=2)
    assert (passed.outcome, passed.looks, len(taken)) == (Outcome.PASS, 1, 1)
    assert one_trial(look(1.1, 1.09, 1.1, 1.11), alpha=ALPHA, looks=2).outcome is Outcome.FAIL
    noisy = one_trial(
        look(0.9, 0.91, 0.905, 0.9, disturbed=("others used 50%",)), alpha=ALPHA, looks=2
    )
    assert (noisy.outcome, noisy.why) == (Outcome.INVALID, "others used 50%")


def test_false_answers_are_held_against_alpha() -> None:
    assert false_answers(4, 20, 0.05).chance == pytest.approx(stats.binom.sf(3, 20, 0.05))
    assert [false_answers(k, 20, 0.05).too_many for k in (0, 4, 5)] == [False, False, True]
    assert false_answers(1, 1, 0.0).too_many
    assert (false_answers(0, 0, 0.05).ci, false_answers(0, 0, 0.05).too_many) == (None, False)
    rng = np.random.default_rng(0)
    called = np.mean(
        [false_answers(int(k), 20, 0.05).too_many for k in rng.binomial(20, 0.05, MANY)]
    )
    assert called <= 0.01


def test_copies_that_differ_show_and_invalid_trials_say_nothing() -> None:
    rng = np.random.default_rng(1)
    signs = [1 if n % 2 == 0 else -1 for n in range(10)]
    trials = [
        Trial(Outcome.INCONCLUSIVE, sign * 0.05 + rng.normal(0, 0.01, 8), 2) for sign in signs
    ]
    trials.append(Trial(Outcome.INVALID, np.full(8, 9.0), 1, "throttled"))
    told = sum_up(trials, [*signs, 1], alpha=ALPHA, blocks=BLOCKS, looks=2)
    assert told.copies is not None
    assert told.copies.estimate == pytest.approx(0.05, abs=0.01)
    assert told.copies.low > 0
    assert (told.passes.n, told.outcomes["INVALID"]) == (10, 1)
    assert told.sd_log == pytest.approx(0.01, rel=0.3)  # around each trial's own mean
    silent = sum_up(trials[-1:], [1], alpha=ALPHA, blocks=BLOCKS, looks=2)
    assert (silent.passes.n, silent.noise_floor, silent.sd_log) == (0, None, None)


def test_the_spread_of_trainings_is_what_the_training_criterion_takes() -> None:
    hours = [1.0, 1.02, 0.98, 1.01]
    sd_log = training_spread(hours)
    assert sd_log == pytest.approx(np.std(np.log(hours), ddof=1))
    floor = training_floor(sd_log, 4, alpha=ALPHA)
    from pipeline.compare.verdict import Spread

    judge = lambda saving: training_criterion(
        measured(1 - saving), measured(1.0), Spread(sd_log, 4, "r"), minimum=0.0, alpha=ALPHA
    )
    assert [judge(floor + each).outcome for each in (-1e-6, 1e-6)] == [
        Outcome.INCONCLUSIVE,
        Outcome.PASS,
    ]


# -- a real one -----------------------------------------------------------------------------------

SMALL = [
    "tracking.charts=false",
    *("policy=smoke", "policy.load.prompt=16", "policy.load.new=4", "policy.load.batch=2"),
    *("data.max_documents=40", "quality.max_documents=24", "quality.bootstrap=200"),
    "training.sequence_length=64",
]
TRAIN = ["recipe=baseline", *TINY]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder with a trained model, and a store."""
    cwd = tmp_path_factory.mktemp("selftest")
    done = here(cwd, *TRAIN, "tracking.mlflow=false")
    assert done.returncode == 0, done.stderr
    (cwd / "mlruns/mlflow.db").write_bytes(empty_store.read_bytes())
    return cwd


@pytest.mark.slow
def test_a_self_test_on_a_cpu_reaches_mlflow_and_feeds_the_training_criterion(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    roots: list[Path] = []

    def pretend(command: list[str], _: Any) -> tuple[int, str]:
        """Leave the run that was made before, its hours changed by 1% from repeat to repeat."""
        assert command[:3] == [sys.executable, "-m", "pipeline"]
        assert command[3:-2] == TRAIN
        assert command[-2] == "tracking=off"
        roots.append(Path(command[-1].removeprefix("tracking.root=").strip("'")))
        result = json.loads((place / "mlruns/latest/result.json").read_text())
        made = next(
            row["artifact"] for row in result["rows"] if row["arm"] == result["primary_arm"]
        )
        manifest = json.loads(Path(made["path"], "artifact.json").read_text())
        manifest["charge"]["work_device_hours"] = 0.01 * 1.01 ** len(roots)
        made["path"] = str(roots[-1] / "model")
        for name, content in (("model/artifact.json", manifest), ("latest/result.json", result)):
            (roots[-1] / name).parent.mkdir()
            (roots[-1] / name).write_text(json.dumps(content))
        return 0, ""

    monkeypatch.setattr(gate_selftest, "_run", pretend)
    before = sorted(path.name for path in (place / "mlruns").iterdir())
    assert (
        main(
            ["model=latest", "n=3", *SMALL, f"train={' '.join(TRAIN)}", "repeats=3"],
            time.monotonic_ns(),
        )
        == 0
    )
    assert sorted(
        path.name for path in (place / "mlruns").iterdir() if path.name != "artifacts"
    ) == sorted({*before, ".mlflow.lock"} - {"artifacts"})  # the repeats' folders are gone
    assert len(set(roots)) == 3
    (folder,) = (place / "mlruns/runs").glob("*-selftest-*")
    result = json.loads((folder / "selftest.json").read_text())
    said = capsys.readouterr().out
    assert "OK: " in said
    assert "noise floor: a serving saving of " in said
    assert sum(result["serving"]["outcomes"].values()) == 3
    assert result["quality"]["read"]["bits_per_byte"]["value"] == 0
    assert result["serving"]["false_pass"]["n"] == 3 - result["serving"]["outcomes"]["INVALID"]
    assert all(
        len(trial["log_ratios"]) == 4 * trial["looks"] for trial in result["serving"]["trials"]
    )
    store = f"sqlite:///{place / 'mlruns/mlflow.db'}"
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("selftest")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    training = result["training"]
    assert training["device_hours"] == pytest.approx([0.0101, 0.010201, 0.01030301])
    assert training["sd_log"] == pytest.approx(np.log(1.01))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["selftest/training_sd_log"] == pytest.approx(training["sd_log"])
    assert run.data.metrics["selftest/serving_n"] == result["serving"]["false_pass"]["n"]
    assert run.data.metrics["selftest/noise_floor"] == pytest.approx(
        result["serving"]["noise_floor"]
    )
    assert run.data.metrics["selftest/quality_false"] == 0
    taken = run.data.metrics["compute/run_device_hours"]
    assert taken >= run.data.metrics["compute/run_compare_device_hours"] > 0
    assert run.data.tags["selftest.model"] == result["model"]["digest"]
    assert run.data.tags["selftest.devices"] == str(training["device"]["count"])
    spread = find_spread(store, training["device"]["name"], training["device"]["count"])
    assert (spread.sd_log, spread.runs, spread.source) == (
        pytest.approx(training["sd_log"]),
        3,
        folder.name,
    )
    assert find_spread(store, training["device"]["name"], 8) is None
    assert find_spread(store, "another's", 1) is None


@pytest.mark.slow
def test_a_self_test_without_training_or_mlflow_can_be_stopped_by_its_budget(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    args = ["model=latest", *SMALL, "tracking=off", "root=mlruns"]
    assert main([*args, "n=1"], time.monotonic_ns()) == 0
    assert "training: not repeated" in capsys.readouterr().out
    assert main([*args, "n=1", "budget.device_hours=1e-9"], time.monotonic_ns()) == 7
    newest = max(
        (place / "mlruns/runs").glob("*-selftest-*"), key=lambda path: path.stat().st_mtime_ns
    )
    events = [json.loads(line) for line in (newest / "journal.jsonl").read_text().splitlines()]
    assert (events[-1]["e"], events[-1]["status"]) == ("run_end", "FAILED")
    assert events[-1]["run"]["device_hours"]["total"]["value"] > 0


def test_a_gate_that_answers_falsely_ends_with_3_and_a_disturbed_one_with_5(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arm, whichever copy it is, is read 5% too fast: a harness that favours one side."""
    from pipeline.evaluation.serving import measure as serving

    monkeypatch.chdir(place)
    rng = np.random.default_rng(0)

    def favours_the_arm(servers: Any, pairs: Any, **_: Any) -> Any:
        arm, base = np.exp(rng.normal(-0.05, 0.005, (4, 2))), np.exp(rng.normal(0, 0.005, (4, 2)))
        orders, places = ["ABBA"] * 4, np.arange(16).reshape(4, 4).tolist()
        return Interleaved({pairs[0]: (arm, base)}, {}, {pairs[0]: orders}, {pairs[0]: places}, {})

    monkeypatch.setattr(serving, "measure_interleaved", favours_the_arm)
    args = ["model=latest", "n=5", *SMALL, "tracking=off"]
    assert main(args, time.monotonic_ns()) == 3
    assert "FALSE ANSWERS: " in capsys.readouterr().out
    assert main([*args, "policy.hardware=H200"], time.monotonic_ns()) == 5
    said = capsys.readouterr().out
    assert "NOTHING JUDGED: " in said
    assert "the policy asks for H200" in said


@pytest.mark.slow
def test_a_self_test_as_a_user_runs_it(place: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "selftest",
        "model=latest",
        "n=20",
        *SMALL,
        f"train={' '.join(TRAIN)}",
        "repeats=3",
        "tracking=off",
    ]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "training: device-hours of 3 runs" in done.stdout
    newest = max(
        (place / "mlruns/runs").glob("*-selftest-*"), key=lambda path: path.stat().st_mtime_ns
    )
    result = json.loads((newest / "selftest.json").read_text())
    # charged, the repeats in it
    assert result["device_hours"] > sum(result["training"]["device_hours"]) > 0


# -- words and refusals ---------------------------------------------------------------------------


def test_names_are_harmless_in_a_report() -> None:
    trial = Trial(Outcome.INVALID, np.zeros(4), 1, "x\x1b[2J\n# <b>")
    answers = false_answers(0, 0, 0.05).to_json()
    result = {
        "too_many": False,
        "device_hours": 0.1,
        "training": None,
        "device": {"name": "=\x1b[31mGPU"},
        "model": {"name": "a\n# b", "digest": "d" * 32},
        "policy": {"name": "`p`", "blocks": 4, "looks": 2, "alpha": 0.05},
        "serving": {
            "outcomes": {"INCONCLUSIVE": 0, "INVALID": 1},
            "false_pass": answers,
            "false_fail": answers,
            "noise_floor": None,
            "copies": None,
            "power": [],
            "trials": [{"outcome": "INVALID", "why": trial.why}],
        },
        "quality": {"false": answers, "read": {}},
    }
    text = "\n".join(lines(result))
    assert "\x1b" not in text
    assert "NOTHING JUDGED: a # b dddddddd" in text
    assert "\\`p\\`" in markdown(result)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 1, "model: is not given"),
        (["model= "], 1, "model: is not given"),
        (["latest"], 2, "latest: is no setting of selftest"),
        (["model=latest", "--multirun"], 2, "--multirun: is no setting of selftest"),
        (["model=latest", "n=0"], 1, "n: '0' is no such number; give 1 to 10000"),
        (["model=latest", "n=²"], 1, "n: '²' is no such number"),
        (["model=latest", "repeats=4"], 1, "repeats: has no effect without train="),
        (
            ["model=latest", "train=recipe=baseline", "repeats=2"],
            1,
            "repeats: '2' is no such number; give 3",
        ),
        (["model=latest", "train=training.steps=4"], 1, "train: names no recipe"),
        (
            ["model=latest", "train=recipe='baseline"],
            1,
            "train: cannot be read (No closing quotation)",
        ),
        (
            ["model=latest", "train=recipe=baseline tracking.root=x"],
            1,
            "train: tracking.root has no place in it",
        ),
        (["model=latest", "train=-m recipe=baseline"], 1, "train: -m has no place in it"),
        (["model=latest", "train=recipe=baseline training.stepz=4"], 1, "training.stepz: "),
        (["model=latest", "promote=true"], 1, "promote: has no effect in a self-test"),
        (["model=latest", "recipe=distill"], 1, "recipe: has no effect in a self-test"),
        (["model=latest", "policy.serveng=0"], 1, "policy.serveng: "),
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
    assert main(args, time.monotonic_ns()) == code
    line = capsys.readouterr().err
    assert line.startswith(f"refused: {said}")
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reference", ["nowhere", "models:/none@champion", "latest"])
def test_a_model_that_is_not_there_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reference: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"model={reference}", "policy=smoke", "tracking=off"], time.monotonic_ns()) == 1
    line = capsys.readouterr().err
    assert line.startswith("refused: model: ")
    assert line.count("\n") == 1


@pytest.mark.slow
def test_a_training_that_fails_is_told_and_what_it_took_is_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(
        gate_selftest, "_run", lambda *_: (1, "warning\nfailed: loss is not\x1b finite\n")
    )
    assert (
        main(
            ["model=latest", "n=1", *SMALL, "tracking=off", f"train={' '.join(TRAIN)}"],
            time.monotonic_ns(),
        )
        == 1
    )
    assert (
        "train: repeat 1 of 5 ended with exit code 1 (failed: loss is not"
        in capsys.readouterr().err
    )
    assert not list((place / "mlruns").glob("selftest-*"))


@pytest.mark.slow
def test_a_stopped_self_test_takes_its_training_with_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training that has a scheduler send SIGTERM to the self-test, and would go on for ten
    minutes.
    """
    training = tmp_path / "python"
    training.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nkill -TERM $PPID\nexec sleep 600\n")
    training.chmod(0o755)
    monkeypatch.chdir(place)
    monkeypatch.setattr(
        gate_selftest, "sys", type("", (), {"executable": str(training), "stderr": sys.stderr})
    )
    assert (
        main(
            ["model=latest", "n=1", *SMALL, "tracking=off", f"train={' '.join(TRAIN)}"],
            time.monotonic_ns(),
        )
        == 75
    )
    assert (
        capsys.readouterr().err
        == "stopped (SIGTERM): a self-test has no checkpoints; run it again\n"
    )
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert not list((place / "mlruns").glob("selftest-*"))
    newest = max(
        (place / "mlruns/runs").glob("*-selftest-*"), key=lambda path: path.stat().st_mtime_ns
    )
    ended = json.loads((newest / "journal.jsonl").read_text().splitlines()[-1])
    assert (ended["status"], ended["why"][:18]) == ("KILLED", "stopped (SIGTERM):")


def test_a_spread_without_an_interval_is_none(root: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    made = client.create_experiment("selftest")
    for runs, sd_log in ((4, 0.02), (1, 0.5), (5, float("nan"))):
        run = client.create_run(made, tags={"selftest.device": "H200", "selftest.devices": "1"})
        client.log_metric(run.info.run_id, "selftest/training_runs", runs)
        client.log_metric(run.info.run_id, "selftest/training_sd_log", sd_log)
    spread = find_spread(f"sqlite:///{root / 'mlflow.db'}", "H200", 1)
    assert (spread.sd_log, spread.runs) == (0.02, 4)
