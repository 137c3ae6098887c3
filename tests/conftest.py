"""Fixtures that several files share: a store of MLflow that costs no migrations, and no MLflow of the user's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():  # before anything imports Triton: its interpreter runs kernels on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
