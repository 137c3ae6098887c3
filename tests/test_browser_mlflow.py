"""MLflow's UI over a real run, in a real Chromium: `make browser-test`.

What is asked daily is on the page that the run's last line leads to.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, complaints
from here import here
from mlflow import MlflowClient
from test_run import DISTILL, TINY

from pipeline.tracking.views import ALWAYS, ARMS, link

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
PATIENCE_S = 240.0
TRAINING = "workflowType=machine_learning"


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A store with a run of two seeds, and one that takes all of it over."""
    cwd = tmp_path_factory.mktemp("ui")
    (cwd / "mlruns").mkdir()
    (cwd / "mlruns/mlflow.db").write_bytes(empty_store.read_bytes())
    for _ in range(2):
        done = here(cwd, *DISTILL, *TINY, "seeds=[0,1]", "training.compile=never")
        assert done.returncode == 0, done.stderr
    return cwd / "mlruns"


@pytest.fixture(scope="module")
def server(delivered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start `mlflow ui` over the store; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{delivered / 'mlflow.db'}"),
    ]
    with log.open("w") as out:
        ui = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            assert ui.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        ui.terminate()
        ui.wait(30)


@pytest.fixture(scope="module")
def runs(delivered: Path) -> dict[str, Any]:
    """Return what the store has, by the tags that runs are found by."""
    client = MlflowClient(tracking_uri=f"sqlite:///{delivered / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    return {run.data.tags["pipeline.run"]: run for run in client.search_runs(experiments)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium"), 1700, 1400) as found:
        yield found


def opened(browser: Any, address: str, *texts: str) -> str:
    """Open a page, wait until it shows texts, and return all that it shows."""
    complaints(browser)
    browser.get("about:blank")
    browser.get(address)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        shown = browser.execute_script("return document.body.innerText") or ""
        if all(each in shown for each in texts):
            return shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)


def experiment(runs: dict[str, Any]) -> str:
    return next(iter(runs.values())).info.experiment_id


def parents(runs: dict[str, Any]) -> list[Any]:
    """Return the runs that are no stage of another, the oldest first."""
    return [runs[name] for name in sorted(runs) if "/" not in name]


def stages_of(runs: dict[str, Any], parent: Any) -> list[Any]:
    whose = parent.data.tags["pipeline.run"]
    return [run for name, run in runs.items() if name.startswith(f"{whose}/")]


def comparison(server: str, runs: list[Any]) -> str:
    query = urllib.parse.urlencode(
        {
            "runs": json.dumps([run.info.run_id for run in runs]),
            "experiments": json.dumps([runs[0].info.experiment_id]),
        }
    )
    return f"{server}/#/compare-runs?{query}&{TRAINING}"


def test_the_list_shows_names_and_core_figures(
    browser: Any, server: str, runs: dict[str, Any]
) -> None:
    parent = parents(runs)[0]
    seconds = parent.data.metrics["compute/device_seconds"]
    shown = opened(browser, link(server, experiment(runs)), parent.info.run_name)
    for heading in ("quality/primary", "compute/device_seconds", "compute/device_hours"):
        assert heading in shown
    assert "Model training" in shown
    assert "Evaluation runs" not in shown
    assert "NaN" not in shown
    figures = [float(each) for each in shown.split() if each.replace(".", "", 1).isdigit()]
    assert any(abs(each / seconds - 1) < 0.01 for each in figures), shown


def test_charts_stand_in_sections_and_have_marks(
    browser: Any, server: str, runs: dict[str, Any]
) -> None:
    address = f"{link(server, experiment(runs))}&compareRunsMode=CHART"
    shown = opened(browser, address, "Core figures\n(5)", "Parallel Coordinates")
    assert "compute/device_seconds" in shown
    marks = "return document.querySelectorAll('.js-plotly-plot .point').length"
    deadline = time.monotonic() + PATIENCE_S
    while browser.execute_script(marks) < 4 * len(parents(runs)):  # three bars and a point each
        assert time.monotonic() < deadline, browser.execute_script(marks)
        time.sleep(0.5)


def test_no_run_lacks_what_parallel_coordinates_show(runs: dict[str, Any]) -> None:
    """A run that lacks one of the axes is left out of the chart."""
    assert len(runs) == 2 * (1 + 4 * 2)
    assert all(set(ALWAYS) <= set(run.data.metrics) for run in runs.values())


def test_arms_stand_with_their_seeds_together(
    browser: Any, server: str, runs: dict[str, Any]
) -> None:
    shown = opened(browser, link(server, experiment(runs), ARMS), "arm: student")
    assert "arm: control_steps" in shown


def test_a_run_has_its_report_parameters_and_models(
    browser: Any, server: str, runs: dict[str, Any]
) -> None:
    parent = parents(runs)[0]
    address = f"{server}/#/experiments/{experiment(runs)}/runs/{parent.info.run_id}?{TRAINING}"
    shown = opened(browser, address, parent.info.run_name, "training.steps")
    assert "Conclusion" in shown
    assert parent.data.params["training.steps"] == "4"
    assert len(parent.data.params) < 40


def test_runs_compare_without_a_gap(browser: Any, server: str, runs: dict[str, Any]) -> None:
    shown = opened(
        browser, comparison(server, parents(runs)), "compute/device_hours", "quality/primary"
    )
    assert [line for line in shown.splitlines() if "NaN" in line] == []


def test_a_gap_between_arms_has_its_reason(browser: Any, server: str, runs: dict[str, Any]) -> None:
    """A teacher has no share of its loss from a teacher: its tag says so. What is not served says
    it once, and only a student can agree with its teacher.
    """
    arms = stages_of(runs, parents(runs)[0])
    keys = {key for run in arms for key in run.data.metrics} - {"quality/teacher_agreement"}
    lacking: set[tuple[str, str]] = set()
    for run in arms:
        said = {name.removeprefix("null.") for name in run.data.tags if name.startswith("null.")}
        for key in keys - set(run.data.metrics) - said:
            if not (key.startswith("serving/") and "serving/device_s_per_1k_units" in said):
                lacking.add((run.info.run_name, key))
    assert lacking == set()
    opened(browser, comparison(server, arms), "compute/device_hours")
