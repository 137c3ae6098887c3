"""What several files share: a store of MLflow that costs no migrations, no MLflow of the user's, a
server of S3, long files first.
"""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import once
import pytest
from hypothesis import HealthCheck, settings
from quiet import quiet

# before anything imports Triton: its interpreter runs kernels on the CPU
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell has what it starts in the background ignore these, and programs inherit that: tests that
# send them would hang.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
# how fast a machine is decides no test
settings.register_profile(
    "any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any_machine")
QUIETLY = (
    "tracking.mlflow=false",
    "tracking.charts=false",
    *("cost.kind=rented", "cost.per_device_hour=2", "cost.currency=EUR"),
    *("cost.source=list", "cost.date=2026-11-23"),
)
LONGEST = (
    "test_docs",
    "test_verdict",
    "test_faults_disk",
    "test_distill_cached",
    "test_quantization",
    "test_faults_tracking",
    "test_gate",
    "test_golden",
    "test_gate_simulation",
    "test_run",
    "test_cli",
    "test_selftest",
    "test_stage_contract",
    "test_sync",
    "test_recovery",
    "test_optional_formats",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take a part of the files: `--part 1/3` is every third one, from the second on."""
    parser.addoption("--part", default="0/1", help="K/N: of N parts of the test files, the K-th")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have the files that take longest begin first, so that no worker is left alone with one at the
    end; of several parts of the files, keep one.
    """
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
    part, parts = (int(each) for each in str(config.getoption("--part")).split("/"))
    places = {name: at for at, name in enumerate(sorted({item.path.stem for item in items}))}
    gone = [item for item in items if places[item.path.stem] % parts != part]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if places[item.path.stem] % parts == part]


@pytest.fixture(autouse=True)
def no_mlflow_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from a tracking server that the user's environment names."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(autouse=True, scope="session")
def quiet_machine() -> None:
    """Have every test read an idle machine: others work on this one. `test_others.py` reads the
    true accounts.
    """
    quiet()


@pytest.fixture(autouse=True, scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have the embedded tokenizer trained once by all workers together."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ[once.ENV] = str(shared / "tokenizers")
    once.keep_tokenizers()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store after its migrations, which take seconds; made once and copied."""
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("empty-store")
    MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    """A folder `mlruns` whose store is there already."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="session")
def receipted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small distillation with its receipt, in a root of its own; to be copied."""
    from here import here
    from test_run import DISTILL

    cwd = tmp_path_factory.mktemp("receipted")
    alone = ["~stages.control_steps", "~stages.control_compute"]
    pair = "{arm: student, base: teacher, on: [quality, training, serving, payback]}"
    done = here(cwd, *DISTILL, *alone, f"compare=[{pair}]", *QUIETLY)
    assert done.returncode == 0, done.stderr
    return (cwd / "mlruns/latest").resolve()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A server that speaks S3's protocol on this machine; its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of its own there, found as on any machine: by the environment."""
    import boto3
    from s3fs import S3FileSystem

    for name, value in {
        "ENDPOINT_URL": s3_server,
        "ACCESS_KEY_ID": "key",
        "SECRET_ACCESS_KEY": "hunter2",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = f"models-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}"
    S3FileSystem.clear_instance_cache()
