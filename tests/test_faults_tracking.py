"""MLflow servers that answer wrongly: nothing is lost, nothing crashes, and what is wrong is said
in a line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from few import few
from forked import run, start
from make_journal import store, write_run
from mlflow import MlflowClient

from pipeline.cli.commands.sync import main

pytestmark = pytest.mark.faults

Answer = Callable[[BaseHTTPRequestHandler], None]


def _say(status: int, body: bytes, kind: str = "application/json", **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def _hang_up(request: BaseHTTPRequestHandler) -> None:
    request.connection.close()


def _cut_off(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b'{"experiment": ')
    request.connection.close()


WRONG: dict[str, Answer] = {
    "500": _say(500, b"Internal Server Error", "text/plain"),
    "500 in JSON": _say(
        500, b'{"error_code": "INTERNAL_ERROR", "message": "the database is on fire"}'
    ),
    "503": _say(503, b"<html>upstream</html>", "text/html"),
    "429": _say(429, b"slow down", "text/plain", Retry_After="1"),
    "401": _say(401, b"", "text/plain", WWW_Authenticate='Basic realm="mlflow"'),
    "403": _say(403, b'{"error_code": "PERMISSION_DENIED", "message": "not you"}'),
    "a login page": _say(200, b"<html><title>Log in</title></html>", "text/html"),
    "nothing": _say(200, b""),
    "no JSON": _say(200, b"\xff\xfe\x00garbage"),
    "a list": _say(200, b"[]"),
    "null": _say(200, b"null"),
    "an empty object": _say(200, b"{}"),
    "another shape": _say(200, b'{"experiment": 7, "run": "x", "experiments": {"a": 1}}'),
    "unknown enum": _say(
        200, b'{"experiment": {"experiment_id": "1", "lifecycle_stage": "eaten"}, "run": {}}'
    ),
    "a redirect to itself": _say(302, b"", Location="/api/2.0/mlflow/experiments/get-by-name"),
    "hangs up": _hang_up,
    "cut off": _cut_off,
}


@contextmanager
def server(answer: Answer) -> Generator[str]:
    """A server on this machine that gives every request the same answer; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
            answer(self)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.handle_error = lambda *_: None  # type: ignore[method-assign]  # it hung up on purpose
    thread = threading.Thread(target=served.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{served.server_address[1]}"
    finally:
        served.shutdown()
        served.server_close()
        thread.join()


@pytest.mark.parametrize("kind", few(list(WRONG), 6))
def test_a_server_that_answers_wrongly_is_a_line_and_the_rest_comes_later(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(root)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    with server(WRONG[kind]) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert main([str(folder)]) == 1
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("waiting for ")
    ]
    assert len(lines) == 1
    assert lines[0].startswith("run-1: MLflow ")
    assert lines[0].endswith("; the journal keeps everything")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main([str(folder)]) == 0
    assert store(root)[1]["run-1"].info.status == "FINISHED"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


SMALL = (
    "tracking.charts=false",
    "recipe=baseline",
    "training.batch_size=4",
    "training.sequence_length=64",
    "data.max_documents=40",
    "hardware.num_threads=1",
    "model.shape.hidden_size=64",
    "model.shape.heads=1",
    "model.shape.intermediate_size=128",
    "model.shape.layers=2",
    "quality.max_documents=24",
    "quality.bootstrap=200",
    "training.eval_documents=1",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["500", "a login page", "hangs up"])
def test_a_run_ends_well_whatever_the_server_answers(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(WRONG[kind]) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        done = run(tmp_path, *SMALL, "training.steps=10")
    assert done.returncode == 0, done.stderr
    assert "MLflow " in done.stdout
    assert "delivers the rest" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    database = f"sqlite:///{tmp_path / 'mlruns/mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert main([str(tmp_path / "mlruns")]) == 0
    # the recipe and its one stage
    assert [run.info.status for run in _runs(database)] == ["FINISHED"] * 2


def _runs(uri: str) -> list[Any]:
    client = MlflowClient(tracking_uri=uri)
    return list(client.search_runs([item.experiment_id for item in client.search_experiments()]))


class RealServer:
    """MLflow's own server on this machine, with a database below a folder."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.uri, self.database = f"http://127.0.0.1:{port}", f"sqlite:///{folder / 'server.db'}"
        self._command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
            "--backend-store-uri",
            self.database,
            "--default-artifact-root",
            str(folder / "artifacts"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                # its workers with it; the group is its own
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealServer]:
    served = RealServer(tmp_path)
    served.begin()
    yield served
    served.kill()


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _forward(uri: str, delay_s: float) -> Answer:
    """Hand a request on to a real server, and its answer back, slowly."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        time.sleep(delay_s)
        kind = {"Content-Type": request.headers.get("Content-Type") or "application/json"}
        asked = Request(uri + request.path, data=request.body, headers=kind, method=request.command)  # type: ignore[attr-defined]
        try:
            with urlopen(asked, timeout=60) as answered:
                status, body = answered.status, answered.read()
        except HTTPError as error:
            status, body = error.code, error.read()
        _say(status, body)(request)

    return answer


@pytest.mark.slow
def test_a_slow_server_slows_no_training(
    tmp_path: Path, real: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(_forward(real.uri, 1.0)) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        done = run(tmp_path, *SMALL, "training.steps=20")
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    (path,) = tmp_path.glob("mlruns/runs/*/result.json")
    result = json.loads(path.read_text())
    phases_ns = {**result["rows"][0]["ledger"]["phases_ns"]}
    assert phases_ns.get("log", 0) < 1e9  # one answer of the server takes longer
    monkeypatch.setenv("MLFLOW_TRACKING_URI", real.uri)
    assert main([str(tmp_path / "mlruns")]) == 0
    assert [run.info.status for run in _runs(real.database)] == ["FINISHED"] * 2


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_run_loses_and_doubles_nothing(
    tmp_path: Path, real: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", real.uri)
    training = start(tmp_path, *SMALL, "training.steps=100000")
    try:
        wait_until(lambda: bool(list(tmp_path.glob("mlruns/runs/*/mlflow.json"))))
        real.kill()
        training.send_signal(signal.SIGTERM)
        out, err = training.communicate(timeout=300)
    finally:
        training.kill()
    assert training.returncode == 75, err
    assert "delivers the rest" in out
    real.begin()
    assert main([str(tmp_path / "mlruns")]) == 0
    assert main([str(tmp_path / "mlruns")]) == 0  # again: nothing changes
    runs = _runs(real.database)
    assert [run.info.status for run in runs] == ["KILLED"] * 2
    (child,) = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    client = MlflowClient(tracking_uri=real.database)
    steps = [point.step for point in client.get_metric_history(child.info.run_id, "train/loss")]
    assert sorted(steps) == sorted(set(steps))
    journal = next(tmp_path.glob("mlruns/runs/*/journal.jsonl")).read_text().splitlines()
    points = [json.loads(line) for line in journal if _is_json(line)]
    told = {each["step"] for each in points if each["e"] == "points" and "loss" in each["values"]}
    assert set(steps) == told
