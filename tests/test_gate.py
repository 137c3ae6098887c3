"""The release gate as CI calls it: one real run per exit code, its record, its looks, and what it
refuses.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from few import few
from here import here
from junitparser import JUnitXml
from quiet import read_truly
from safetensors.torch import load_file, save_file
from test_run import DISTILL

from pipeline.errors import UserError
from pipeline.evaluation.serving import measure as serving
from pipeline.ledger.values import measured, null
from pipeline.runs import assemble, opening
from pipeline.store.artifacts import Store
from pipeline.store.verdicts import as_recorded, checksum, recall, record
from pipeline.tracking.deliver import deliver

GATE = [
    "tracking.charts=false",
    *("recipe=release_check", "policy=smoke", "data.max_documents=40", "quality.max_documents=24"),
    *(
        "quality.bootstrap=1000",
        "policy.load.new=4",
        "policy.load.batch=4",
        "training.sequence_length=64",
    ),
    "policy.blocks=8",  # a test machine is a noisy one
]
MLFLOW = "tracking.mlflow=true"


def crash(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("no time at all")


def said(cwd: Path) -> dict[str, Any]:
    """Return the newest verdict.json."""
    newest = max(
        (cwd / "mlruns/runs").glob("*-release_check-*"), key=lambda path: path.stat().st_mtime_ns
    )
    return json.loads((newest / "verdict.json").read_text())


def by_name(verdict: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in verdict["criteria"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Return a folder with a distillation in it, and artifact digests: teacher, student, and a
    damaged student.
    """
    cwd = tmp_path_factory.mktemp("gate")
    # quality alone is compared
    settings = [each for each in DISTILL if not each.startswith("serving.")]
    done = here(
        cwd,
        *settings,
        "model.shape.layers=6",
        "student.layers=1",
        "~stages.control_steps",
        "~stages.control_compute",
        "tracking.mlflow=false",
        "compare=[{arm: student, base: teacher, on: [quality]}]",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((cwd / "mlruns/latest/result.json").read_text())
    paths = {row["arm"]: Path(row["artifact"]["path"]) for row in result["rows"]}
    damaged = cwd / "damaged"
    shutil.copytree(paths["student"], damaged)
    (damaged / "artifact.json").unlink()
    weights = load_file(damaged / "model.safetensors")
    torch.manual_seed(0)
    name = "model.embed_tokens.weight"  # the output head as well: sure of itself, and wrong
    save_file(
        {**weights, name: 3 * torch.randn_like(weights[name])},
        damaged / "model.safetensors",
        metadata={"format": "pt"},
    )
    return cwd, {**{arm: str(path) for arm, path in paths.items()}, "damaged": str(damaged)}


@pytest.fixture
def project(
    made: tuple[Path, dict[str, str]], tmp_path: Path, empty_store: Path
) -> tuple[Path, dict[str, str]]:
    """Return a folder to run gates in, with an MLflow that has had nothing, and the artifacts: as
    on a CI runner.
    """
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_store, tmp_path / "mlruns/mlflow.db")
    return tmp_path, made[1]


@pytest.fixture(autouse=True)
def _delivered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliver what gates of this process left, when they end: a writer of their own costs seconds
    (`test_sync.py`).
    """

    def deliver_all(_: object, folder: Path, **__: Any) -> None:
        while deliver(folder):
            pass

    monkeypatch.setattr(opening, "start_writer", lambda _: SimpleNamespace(stdin=None))
    monkeypatch.setattr(assemble, "undelivered", deliver_all)


def gate(cwd: Path, candidate: str, baseline: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a release check in this process, without MLflow where `more` does not ask for it."""
    return here(
        cwd, *GATE, f"candidate={candidate}", f"baseline={baseline}", "tracking.mlflow=false", *more
    )


def as_in_ci(
    cwd: Path, candidate: str, baseline: str, *more: str
) -> subprocess.CompletedProcess[str]:
    """Run a release check as CI does: a process of its own, delivered to MLflow."""
    return forked.run(
        cwd, *GATE, f"candidate={candidate}", f"baseline={baseline}", *more, timeout=500
    )


def check_left(cwd: Path, outcome: str) -> dict[str, Any]:
    """Compare what a release check left in its folder and in MLflow with how it ended; return its
    verdict.
    """
    verdict = said(cwd)
    folder = cwd / "mlruns/runs" / verdict["run_id"]
    assert verdict["verdict"] == outcome
    assert verdict["line"].startswith(outcome)
    assert verdict["line"] in (folder / "report.md").read_text()
    suite = JUnitXml.fromfile(str(folder / "junit.xml"))
    assert (suite.failures + suite.errors > 0) == (outcome in ("FAIL", "INCONCLUSIVE", "INVALID"))
    run = mlflow_run(cwd, verdict["run_id"])
    assert run.info.status == "FINISHED", "whatever it says of the candidate, it was done"
    assert (run.data.tags["gate.verdict"], run.data.tags["gate.line"]) == (outcome, verdict["line"])
    return verdict


def test_a_student_that_saves_and_keeps_quality_passes_and_its_verdict_is_recorded(project) -> None:
    cwd, paths = project
    done = as_in_ci(cwd, paths["student"], paths["teacher"])
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = check_left(cwd, "PASS")
    read = by_name(verdict)
    assert (verdict["exit_code"], verdict["look"]) == (0, 1)
    assert verdict["line"].startswith("PASS  -")
    assert verdict["line"] in done.stdout
    assert {name: each["outcome"] for name, each in read.items() if each["gating"]} == {
        "quality/bits_per_byte": "PASS",
        "serving": "PASS",
    }
    assert read["training"]["value"]["value"] is not None, (
        "both artifacts carry what their chains took"
    )
    assert read["memory"]["value"]["value"] > 0.3
    assert read["payback"]["unit"] == "token"
    assert verdict["sha256"] == checksum(as_recorded(verdict))
    readings = verdict["readings"]
    again = gate(cwd, paths["student"], paths["teacher"], MLFLOW)
    assert (again.returncode, again.stderr) == (0, ""), (
        "the recorded verdict is fetched without a progress bar"
    )
    assert said(cwd)["recorded"] == verdict["run_id"]
    assert said(cwd)["readings"] == readings, "nothing was measured anew"
    for folder in ("store", "runs"):  # a runner whose mlruns holds nothing but what MLflow tells
        shutil.rmtree(cwd / "mlruns" / folder)
    third = gate(cwd, paths["student"], paths["teacher"], MLFLOW)
    assert third.returncode == 0, third.stderr
    assert said(cwd)["recorded"] == verdict["run_id"]


def mlflow_run(cwd: Path, run_id: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'mlruns/mlflow.db'}")
    experiment = client.get_experiment_by_name("release_check")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`pipeline.run` = '{run_id}'")
    return run


def test_a_damaged_student_fails(project) -> None:
    cwd, paths = project
    done = gate(cwd, paths["damaged"], paths["teacher"], MLFLOW)
    assert done.returncode == 3, done.stderr
    verdict = check_left(cwd, "FAIL")
    assert by_name(verdict)["quality/bits_per_byte"]["outcome"] == "FAIL"
    assert by_name(verdict)["training"]["value"]["why_missing"] == "no ledger: candidate"
    asked = gate(cwd, paths["student"], paths["damaged"], "policy.training=0.1")
    # a baseline without a ledger
    assert by_name(said(cwd))["training"]["outcome"] == "FAIL", asked.stderr


@pytest.mark.slow
def test_too_few_documents_decide_nothing_and_say_how_many_would(project) -> None:
    cwd, paths = project
    done = gate(cwd, paths["student"], paths["teacher"], "policy.min_documents=400", MLFLOW)
    assert done.returncode == 4, done.stderr
    assert "note: the models are scored on the embedded demonstration data (stdlib)" in done.stdout
    read = by_name(check_left(cwd, "INCONCLUSIVE"))["quality/bits_per_byte"]
    assert (read["outcome"], read["needed"]) == ("INCONCLUSIVE", 400)
    again = gate(cwd, paths["student"], paths["teacher"], "policy.min_documents=400")
    assert again.returncode == 4
    first = said(cwd)
    assert first["recorded"], "no further look would give it more documents"
    same = (
        "quality.bootstrap=900",
        "quality.batch_size=5",
        "policy.name=another",
        "serving.decode=dynamic",
        "policy.metrics.accuracy.margin=0.2",
    )
    alike = gate(cwd, paths["student"], paths["teacher"], "policy.min_documents=400", *same)
    assert alike.returncode == 4, alike.stderr
    assert said(cwd)["recorded"] == first["recorded"], (
        "what decides nothing is no way to further looks"
    )
    other = gate(
        cwd,
        paths["student"],
        paths["teacher"],
        "policy.min_documents=300",
        "quality.max_documents=23",
    )
    assert other.returncode == 4, other.stderr
    assert "recorded" not in said(cwd)
    assert said(cwd)["readings"] == first["readings"], (
        "another policy judges what was read, and reads nothing anew"
    )


@pytest.mark.slow
def test_a_gate_that_is_stopped_while_it_serves_ends_with_75_and_no_verdict(
    project, monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd, paths = project
    blocks: list[Any] = []

    def first_prompts(*given: Any) -> Any:
        blocks.append(given)
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(*given)

    draw = serving.draw_prompts
    monkeypatch.setattr(serving, "draw_prompts", first_prompts)
    done = gate(cwd, paths["student"], paths["teacher"], "policy.blocks=1000")
    assert done.returncode == 75, done.stderr
    assert len(blocks) < 4
    assert (said(cwd)["verdict"], said(cwd)["exit_code"]) == (None, 75)
    assert not list((cwd / "mlruns/store").glob("verdicts/*"))


@pytest.mark.slow
def test_a_second_look_adds_blocks_and_a_third_gives_the_recorded_verdict(project) -> None:
    cwd, paths = project
    same = (paths["student"], paths["student"], "policy.serving=0")
    looks = []
    for _ in range(3):
        done = gate(cwd, *same)
        verdict = said(cwd)
        looks.append(
            (
                verdict["look"],
                len(verdict["readings"]["candidate_s"]),
                verdict.get("recorded") is not None,
            )
        )
        assert done.returncode == verdict["exit_code"]
        # an A/A that happens to be told apart: alpha of the time
        if verdict["verdict"] != "INCONCLUSIVE":
            pytest.skip(f"decided at look {verdict['look']}: {verdict['line']}")
    assert looks == [(1, 8, False), (2, 16, False), (2, 16, True)]


@pytest.mark.slow
@pytest.mark.faults
def test_a_disturbed_machine_and_other_hardware_are_invalid(
    project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel's true accounts, with a true program beside it."""
    read_truly(monkeypatch)
    cwd, paths = project
    code = (
        "import time; end = time.monotonic() + 580\nwhile time.monotonic() < end: sum(range(10**6))"
    )
    # an orphan: no child of this process, so that its work is somebody else's
    command = f"{sys.executable} -c '{code}' >/dev/null 2>&1 & echo $!"
    busy = int(
        subprocess.run(["sh", "-c", command], cwd=cwd, check=True, stdout=subprocess.PIPE).stdout
    )
    try:
        done = as_in_ci(
            cwd,
            paths["student"],
            paths["teacher"],
            "policy.max_foreign_load=0.02",
            "policy.load.new=16",
            "policy.load.batch=8",
            "policy.blocks=2",
        )
    finally:
        os.kill(busy, signal.SIGKILL)
    assert done.returncode == 5, done.stderr
    assert "others used" in by_name(check_left(cwd, "INVALID"))["serving"]["why"]
    # how long a window takes is the machine's matter
    monkeypatch.setattr("pipeline.ledger.others.SHORTEST_S", 3600.0)
    short = gate(
        cwd,
        paths["student"],
        paths["teacher"],
        "policy.max_foreign_load=0.9",
        "policy.load.new=2",
        "policy.load.batch=1",
        "policy.load.prompt=8",
        "policy.blocks=2",
    )
    assert short.returncode == 5, short.stderr
    assert "unknown (window shorter than 3600 s)" in by_name(said(cwd))["serving"]["why"]
    elsewhere = gate(cwd, paths["student"], paths["teacher"], "policy.hardware=NVIDIA H200")
    assert elsewhere.returncode == 5, elsewhere.stderr
    assert "and the policy asks for NVIDIA H200" in by_name(said(cwd))["serving"]["why"]
    assert said(cwd)["look"] == 1, "an INVALID run does not count"


@pytest.mark.slow
def test_without_a_champion_there_is_nothing_to_compare_and_bootstrap_makes_the_first(
    project, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    cwd, paths = project
    champion = "models:/student@champion"
    done = gate(cwd, paths["teacher"], champion, MLFLOW)
    assert done.returncode == 6, done.stderr
    check_left(cwd, "NO_BASELINE")
    url = f"store.url={s3}/releases"
    first = gate(cwd, paths["teacher"], champion, "bootstrap=true", url, MLFLOW)
    assert first.returncode == 0, first.stderr
    assert (said(cwd)["verdict"], said(cwd)["promotion"]["version"]) == ("NO_BASELINE", "1")
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'mlruns/mlflow.db'}")
    version = client.get_model_version_by_alias("student", "champion")
    assert version.tags["artifact.digest"] == Path(paths["teacher"]).name
    shutil.rmtree(cwd / "mlruns/store")
    shutil.rmtree(cwd / "mlruns/runs")
    # from another machine
    client.set_model_version_tag("student", "1", "artifact.path", "/nowhere")
    arms = (f"candidate={paths['student']}", f"baseline={champion}", "promote=true", url)
    with monkeypatch.context() as patch:
        patch.setattr(serving, "measure_interleaved", crash)
        crashed = here(cwd, *GATE, *arms)
    assert crashed.returncode == 1
    assert "crashed: ZeroDivisionError: no time at all (--debug shows where)" in crashed.stderr
    (folder,) = {path.parent for path in (cwd / "mlruns/runs").glob("*-release_check-*/junit.xml")}
    (suite,) = JUnitXml.fromfile(str(folder / "junit.xml"))
    assert (suite.errors, said(cwd)["exit_code"]) == (1, 1)
    assert mlflow_run(cwd, folder.name).info.status == "FAILED"
    assert str(client.get_model_version_by_alias("student", "champion").version) == "1"
    passed = gate(cwd, paths["student"], champion, "promote=true", url, MLFLOW)
    assert passed.returncode == 0, passed.stderr
    assert said(cwd)["verdict"] == "PASS"
    assert str(client.get_model_version_by_alias("student", "champion").version) == "2"
    failed = gate(cwd, paths["damaged"], champion, "promote=true", url, MLFLOW)
    assert failed.returncode in (3, 4), failed.stderr
    assert str(client.get_model_version_by_alias("student", "champion").version) == "2"


@pytest.mark.slow
@pytest.mark.faults
def test_of_two_gates_that_promote_at_once_one_moves_the_champion(project, s3: str) -> None:
    from mlflow import MlflowClient

    cwd, paths = project
    champion, url = "models:/student@champion", f"store.url={s3}/releases"
    first = gate(cwd, paths["teacher"], champion, "bootstrap=true", url, MLFLOW)
    assert first.returncode == 0, first.stderr
    arms = (f"candidate={paths['student']}", f"baseline={champion}", "promote=true", url)
    both = [forked.start(cwd, *GATE, *arms) for _ in range(2)]
    ended = [process.communicate(timeout=900) for process in both]
    codes = sorted(process.returncode or 0 for process in both)
    assert codes[0] == 0, ended
    # the later one finds itself champion, or another champion than it measured
    assert codes[1] in (0, 1), ended
    assert not [err for _, err in ended if "Traceback" in err]
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'mlruns/mlflow.db'}")
    version = client.get_model_version_by_alias("student", "champion")
    assert version.tags["artifact.digest"] == Path(paths["student"]).name
    assert len(client.search_model_versions("name = 'student'")) == 2
    # the lock is let go
    assert not client.search_registered_models(filter_string="name = 'student.promotion'")


# -- refusals and hostile input -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (("candidate=x",), "baseline: is not given"),
        (("baseline=x",), "candidate: is not given"),
        (("candidate=nowhere", "baseline=nowhere"), "baseline: there is no nowhere"),
        (("candidate=x", "baseline=models:/../../etc@champion"), "names no version of a model"),
        (("candidate=x", r"baseline='a\u0007b'"), "there is no"),
        (("candidate=x", f"baseline={'a' * 300}"), "cannot be read (File name too long)"),
        (("candidate=x", f"baseline={'a' * 5000}"), "is no reference"),
        (
            ("candidate=x", "baseline=x", "candidate_items='\x1b[31mx'"),
            "candidate_items: x does not exist",
        ),
        (("candidate=x", "baseline=x", "candidate_items=" + "x" * 300), "does not exist"),
        (("candidate=x", "baseline=00000000000000000000000000000000"), "has no run 0000"),
        (
            ("candidate=x", "baseline=x", "policy.metrics={acuracy: {margin: 0.1}}"),
            "there is no such metric",
        ),
        (("candidate=x", "baseline=x", "policy.metrics.accuracy.direction=lower"), "say higher"),
        (
            ("candidate=x", "baseline=x", "policy.metrics.accuracy.margin=nan"),
            "policy.metrics.accuracy.margin",
        ),
        (
            ("candidate=x", "baseline=x", "policy.serving=null", "~policy.metrics.bits_per_byte"),
            "asks for nothing",
        ),
        (("candidate=x", "baseline=x", "serving.load.prompt=9"), "the policy's"),
        (
            ("candidate=x", "baseline=x", "candidate_items=nowhere"),
            "candidate_items: nowhere does not exist",
        ),
        (("candidate=x", "baseline=x", "seeds=[0,1]"), "seeds: has no effect here"),
        (("candidate=x$y é", "baseline=x$y é"), "baseline: there is no x$y é"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(
    tmp_path: Path, settings: tuple[str, ...], problem: str
) -> None:
    done = here(tmp_path, *GATE, *settings)
    assert "\x1b" not in done.stderr
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1), done.stderr
    assert problem in done.stderr


def test_a_load_that_no_model_takes_names_the_policys_setting(project) -> None:
    cwd, paths = project
    done = gate(cwd, paths["student"], paths["teacher"], "policy.load.prompt=1000000")
    assert done.returncode == 1
    assert done.stderr.startswith("refused: policy.load.prompt: "), done.stderr


def test_settings_of_a_gate_are_refused_elsewhere(tmp_path: Path) -> None:
    done = here(tmp_path, "recipe=baseline", "promote=true")
    assert done.returncode == 1
    assert "promote: has no effect in recipe=baseline" in done.stderr


def test_other_bytes_than_vouched_for_are_refused(project, tmp_path: Path) -> None:
    cwd, paths = project
    altered = tmp_path / "altered"
    shutil.copytree(paths["student"], altered)
    (altered / "config.json").write_text((altered / "config.json").read_text() + " ")
    done = gate(cwd, str(altered), paths["teacher"])
    assert done.returncode == 1
    assert "holds other bytes than its artifact.json vouches for" in done.stderr


@pytest.mark.slow
def test_after_a_disturbed_machine_the_same_command_measures_anew(
    project, monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd, paths = project
    arms = (paths["student"], paths["teacher"])
    busy = {"throttle_share": null("a CPU").to_json(), "foreign_load": measured(0.5).to_json()}
    monkeypatch.setattr(serving, "machine_conditions", lambda *_: busy)
    assert gate(cwd, *arms, "policy.max_foreign_load=0.1").returncode == 5
    readings = said(cwd)["readings"]["candidate_s"]
    monkeypatch.setattr(
        serving, "machine_conditions", lambda *_: {**busy, "foreign_load": measured(0.0).to_json()}
    )
    assert gate(cwd, *arms, "policy.max_foreign_load=0.9").returncode == 0
    assert said(cwd)["readings"]["candidate_s"] == readings, (
        "another policy takes it for a measurement"
    )
    assert gate(cwd, *arms, "policy.max_foreign_load=0.4").returncode == 0
    assert said(cwd)["readings"]["candidate_s"] != readings


@pytest.mark.parametrize("hours", [-5.0, "lots", float("nan"), True])
def test_a_charge_that_nothing_can_have_cost_is_refused(
    project, tmp_path: Path, hours: Any
) -> None:
    cwd, paths = project
    cheap = tmp_path / "cheap"
    shutil.copytree(paths["student"], cheap)
    manifest = json.loads((cheap / "artifact.json").read_text())
    manifest["charge"]["work_device_hours"] = hours
    (cheap / "artifact.json").write_text(json.dumps(manifest))
    done = gate(
        cwd, str(cheap), paths["teacher"], "policy.payback_units=1000000", "tracking.mlflow=false"
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "has a charge that nothing can have cost: work_device_hours is" in done.stderr


def test_only_a_registered_version_can_be_replaced_as_champion(project) -> None:
    cwd, paths = project
    done = gate(cwd, paths["student"], paths["teacher"], "promote=true")
    assert done.returncode == 1
    assert (
        "is no registered version, and a PASS replaces the champion that it was compared with"
        in done.stderr
    )


def test_a_verdict_edited_by_hand_is_refused(project) -> None:
    cwd, paths = project
    arms = (paths["damaged"], paths["teacher"])
    assert gate(cwd, *arms).returncode == 3
    (kept,) = (cwd / "mlruns/store/artifacts").glob("*/verdict.json")
    kept.write_text(kept.read_text().replace('"verdict": "FAIL"', '"verdict": "PASS"'))
    done = gate(cwd, *arms)
    assert done.returncode == 1
    assert "is not what was recorded" in done.stderr
    (note,) = (cwd / "mlruns/store/verdicts").glob("*.json")
    for cut in (note.read_text()[:40], "[]", "null"):
        note.write_text(cut)
        done = gate(cwd, *arms)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert f"{note} is not what was recorded" in done.stderr, (
            "a look that cannot be read is not forgotten"
        )


def test_a_verdict_on_another_comparison_is_refused(project) -> None:
    cwd, _ = project
    store = Store(cwd / "mlruns/store")
    record(store, "a" * 32, {"key": "a" * 32, "verdict": "PASS", "run_id": "r"})
    shutil.copy(store.root / f"verdicts/{'a' * 32}.json", store.root / f"verdicts/{'b' * 32}.json")
    assert recall(store, "a" * 32) is not None
    with pytest.raises(UserError, match="is of another comparison"):
        recall(store, "b" * 32)


# -- values that another evaluation recorded ------------------------------------------------------


def recorded(path: Path, rows: list[dict[str, Any]], **facts: str) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    note = {"data": "d1", "split": "test", "evaluation": "e1", **facts}
    path.with_name(f"{path.stem}.about.json").write_text(json.dumps(note))
    return path


def rows(bits: float, n: int = 30) -> list[dict[str, Any]]:
    return [
        {
            "digest": f"{i:032x}",
            "bits": bits * (100 + i) * (1 + 0.01 * (i % 7)),
            "bytes": 100 + i,
            "tokens": 50,
            "correct": 20 + i % 5,
        }
        for i in range(n)
    ]


NAN = [{**row, "bits": float("nan")} if i == 3 else row for i, row in enumerate(rows(2.0))]


@pytest.mark.parametrize(
    ("candidate", "baseline", "code", "why"),
    few(
        [
            ((rows(2.0), {}), (rows(2.0), {"data": "d2"}), 5, "other data: d1 against d2"),
            ((rows(2.0), {"evaluation": "e2"}), (rows(2.0), {}), 5, "other evaluation settings"),
            ((rows(2.0), {"artifact": "f" * 32}), (rows(2.0), {}), 5, "values are of artifact"),
            ((NAN, {}), (rows(2.0), {}), 5, "no finite reading of 1 of 30 documents"),
            (
                (rows(2.0), {}),
                ([{k: v for k, v in row.items() if k != "bits"} for row in rows(2.0)], {}),
                5,
                "bits",
            ),
            ((rows(2.0)[:20], {}), (rows(2.0), {}), 5, "only 20 of 30 documents"),
            (
                (rows(2.0), {}),
                (rows(2.0), {}),
                5,
                "both sides have the same values, and no note says whose they are",
            ),
            ((rows(2.1)[::-1], {}), (rows(2.0), {}), 0, None),
            ((rows(3.0), {}), (rows(2.0), {}), 3, None),
            (([], {}), (rows(2.0), {}), 1, "holds no documents"),
            ((rows(-2.0), {}), (rows(2.0), {}), 1, "line 1: bits is below 0"),
            (
                ([{**row, "bits": True} for row in rows(2.0)], {}),
                (rows(2.0), {}),
                1,
                "line 1: bits is no number",
            ),
            (
                ([{**row, "bits": 10**400} for row in rows(2.0)], {}),
                (rows(2.0), {}),
                1,
                "line 1: bits is no number",
            ),
            (
                ([{**row, "correct": 51} for row in rows(2.0)], {}),
                (rows(2.0), {}),
                1,
                "more tokens are correct",
            ),
            (
                ([{**row, "more": [1]} for row in rows(2.0)], {}),
                (rows(2.0), {}),
                1,
                "neither a number nor a text",
            ),
        ],
        5,
    ),
)
def test_recorded_values_are_compared_only_where_they_can_be(
    project, candidate: Any, baseline: Any, code: int, why: str | None
) -> None:
    cwd, paths = project
    files = [
        recorded(cwd / f"{name}.jsonl", values, **facts)
        for name, (values, facts) in (("candidate", candidate), ("baseline", baseline))
    ]
    run = as_in_ci if "other data" in (why or "") else gate
    done = run(
        cwd,
        paths["student"],
        paths["teacher"],
        f"candidate_items={files[0]}",
        f"baseline_items={files[1]}",
        "policy.serving=null",
        "policy.blocks=2",
        "tracking.mlflow=false",
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "demonstration data" not in done.stdout  # values of others' data are compared
    verdict = said(cwd)
    if why is not None:
        read = by_name(verdict).get("quality/bits_per_byte", {})
        assert why in (read.get("why") or verdict["why"])


@pytest.mark.slow
def test_the_same_values_with_another_note_are_another_comparison(project) -> None:
    cwd, paths = project
    files = [
        recorded(cwd / f"{name}.jsonl", rows(bits))
        for name, bits in (("candidate", 2.01), ("baseline", 2.0))
    ]
    arms = (
        paths["student"],
        paths["teacher"],
        f"candidate_items={files[0]}",
        f"baseline_items={files[1]}",
        "policy.serving=null",
        "policy.blocks=2",
        "tracking.mlflow=false",
    )
    assert gate(cwd, *arms).returncode == 0
    recorded(files[0], [dict(reversed(row.items())) for row in rows(2.01)[::-1]])
    assert gate(cwd, *arms).returncode == 0
    assert said(cwd)["recorded"], "in another order they are the same values"
    recorded(files[0], rows(2.01), data="d2")
    assert gate(cwd, *arms).returncode == 5
    assert "other data: d2 against d1" in by_name(said(cwd))["quality/bits_per_byte"]["why"]
