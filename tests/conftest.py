"""What several files share: a store of MLflow that costs no migrations, no MLflow of the user's, long files first."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():  # before anything imports Triton: its interpreter runs kernels on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell has what it starts in the background ignore these, and programs inherit that: tests that send them would hang.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
LONGEST = (
    "test_gate", "test_run", "test_faults", "test_quantization", "test_run_formats", "test_sync", "test_meter",
    "test_selftest", "test_recovery", "test_wheel", "test_assess_vllm",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the files that take longest begin first, so that no worker is left alone with one at the end."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def no_mlflow_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from a tracking server that the user's environment names."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


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
