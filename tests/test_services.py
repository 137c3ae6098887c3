"""MLflow as teams run it: a server on PostgreSQL with artifacts on S3. Both are started here, on
loopback: Debian's PostgreSQL, and moto's S3.

Run with `make services-test`, which installs them. MLflow's own client, boto3 and psql tell what
arrived.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from make_journal import everything, own_name, store, write_run
from mlflow import MlflowClient

from pipeline.tracking.deliver import deliver
from pipeline.tracking.registry import Candidate, promote, resolve_version

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]
BUCKET, REGION = "mlflow", "us-east-1"
NOTHING = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """Start PostgreSQL in a folder of its own; yield the address of a database."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or find_spec("psycopg2") is None:
        pytest.skip("PostgreSQL or psycopg2 is not installed: make services-test")
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    # it refuses to run as root
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    os.chown(folder, user.pw_uid, user.pw_gid)
    as_user: dict[str, Any] = {"user": user.pw_uid} if os.geteuid() == 0 else {}
    port = _free_port()
    data = folder / "data"
    subprocess.run(
        [programs[-1] / "initdb", "-D", data, "-U", "mlflow", "-A", "trust", "-N"],
        check=True,
        cwd=folder,
        **NOTHING,
        **as_user,
    )
    server = subprocess.Popen(
        [
            *(programs[-1] / "postgres", "-D", data, "-h", "127.0.0.1"),
            *("-p", str(port), "-k", folder),
        ],
        cwd=folder,
        **NOTHING,
        **as_user,
    )
    try:
        _wait(lambda: _listens(port), server)
        subprocess.run(
            [
                *(programs[-1] / "createdb", "-h", "127.0.0.1", "-p", str(port)),
                *("-U", "mlflow", "runs"),
            ],
            check=True,
        )
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/runs"
    finally:
        server.send_signal(signal.SIGINT)  # disconnects clients
        server.wait(30)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def objects(s3_server: str) -> str:
    """Return the address of an S3 server with a bucket."""
    import boto3

    boto3.client("s3", **_login(s3_server)).create_bucket(Bucket=BUCKET)
    return s3_server


@pytest.fixture(scope="module")
def server(
    postgresql: str, objects: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Start MLflow's server on both; yield its address."""
    port = _free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", postgresql),
        *("--artifacts-destination", f"s3://{BUCKET}/artifacts"),
    ]
    environment = {
        **os.environ,
        "MLFLOW_S3_ENDPOINT_URL": objects,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
    }
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=said, stderr=said
        )
    try:
        _wait(lambda: _answers(port), process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def test_a_run_is_on_postgresql_what_it_is_in_a_file(
    root: Path, server: str, objects: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    folder = write_run(root)
    shutil.copytree(folder, root / "other" / "runs" / folder.name)
    other = root / "other" / "runs" / folder.name
    deliver(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert deliver(other) > 0
    assert deliver(other, look_again=True) == 0
    (other / "mlflow.json").unlink()  # all of it again, with the memory lost
    deliver(other)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert everything(root, server) == everything(root)
    listed = boto3.client("s3", **_login(objects)).list_objects_v2(Bucket=BUCKET)["Contents"]
    names = {each["Key"].rpartition("/artifacts/")[2] for each in listed}
    traces = {
        name.relative_to(folder).as_posix() for name in folder.glob("traces/**/*") if name.is_file()
    }
    assert names == {"report.md", *traces}


def test_the_experiment_and_its_models_are_as_in_a_file(root: Path, server: str) -> None:
    client, runs = store(root, server)
    experiment = client.get_experiment_by_name("distill")
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    parent, student = runs["run-1"], runs["student"]
    (made,) = student.outputs.model_outputs
    assert [each.model_id for each in parent.outputs.model_outputs] == [made.model_id]
    figures = {each.key: each.value for each in client.get_logged_model(made.model_id).metrics}
    assert figures["quality/primary"] == student.data.metrics["quality/primary"]


def test_a_version_has_its_verdict_run_and_model(root: Path, server: str) -> None:
    client, runs = store(root, server)
    student = runs["student"]
    (made,) = student.outputs.model_outputs
    digest = client.get_logged_model(made.model_id).tags["digest"]
    tags = {"gate.verdict": "PASS", "gate.line": "PASS. It serves cheaper, and is as good."}
    promote(server, "small", Candidate(digest, "", "/there"), None, tags)
    found = resolve_version(server, "small", alias="champion")
    assert found is not None
    assert (found.digest, found.run_id) == (digest, student.info.run_id)
    version = client.get_model_version("small", found.version)
    assert (version.tags["gate.verdict"], version.description) == ("PASS", tags["gate.line"])
    again = promote(server, "small", Candidate(digest, "", "/there"), found.version, tags)
    assert again.version == found.version


def test_four_deliveries_at_once_leave_each_run_once(
    root: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"many-{number}" for number in range(4)]
    for name in names:
        write_run(root, name)
    command = [sys.executable, "-m", "pipeline", "sync", str(root)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server}
    started = [subprocess.Popen(command, env=environment, **NOTHING) for _ in range(2)]
    assert [each.wait(200) for each in started] == [0, 0]
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("distill")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    found = [own_name(run) for run in runs if own_name(run).startswith("many-")]
    assert sorted(found) == names


def _login(address: str) -> dict[str, Any]:
    return {
        "endpoint_url": address,
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
        "region_name": REGION,
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _wait(is_up: Any, process: subprocess.Popen[bytes], log: Path | None = None) -> None:
    deadline = time.monotonic() + 180
    while not is_up():
        said = "" if log is None else log.read_text()[-2000:]
        assert process.poll() is None, f"it ended: {said}"
        assert time.monotonic() < deadline, f"it does not answer: {said}"
        time.sleep(0.2)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False
