"""`tracking.*`, `store.*`, `budget.*`, `ledger.*`: where figures go, and what is recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from pipeline.config.settings.ranges import at_least_0, fraction, positive

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


@dataclass(kw_only=True, slots=True)
class StoreConfig:
    """Where artifacts can be reached from other machines."""

    # a folder, or any fsspec URL (s3://bucket/prefix); artifacts lie there by digest
    url: Optional[str] = None


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where the run's figures go. `MLFLOW_TRACKING_URI` wins over `uri`; null is SQLite under
    `root`.
    """

    root: str = "mlruns"  # the folder that holds everything a run leaves
    mlflow: bool = True  # false: journal and reports only
    uri: Optional[str] = None  # of an MLflow server or store; null: SQLite under `root`
    # false: no charts in report.html, no pictures beside it; a run ends seconds earlier
    charts: bool = True
    # file of an ed25519 key of OpenSSH, without a passphrase: receipt.json is signed with it
    sign_with: Optional[str] = None
    experiment: Optional[str] = None  # null: the recipe's name
    team: Optional[str] = None  # who pays, on every run and row
    cost_center: Optional[str] = None  # likewise
    purpose: Optional[str] = None  # likewise: what the run is for
    # refuse a run without these three; PIPELINE_REQUIRE_OWNER=1 does for all runs
    require_owner: bool = False


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """A ceiling on what this run may spend."""

    # a run that has spent them ends with exit code 7
    device_hours: Optional[float] = positive(None)
    # that a scheduler gives this attempt; it stops with a checkpoint and exit code 75 before
    wall_seconds: Optional[float] = positive(None)
    wall_reserve_seconds: float = positive(60.0)  # before wall_seconds are over


@dataclass(kw_only=True, slots=True)
class LedgerConfig:
    """What is looked at beside time. Nothing here changes what is trained, so that it is in no
    key.
    """

    traced_steps: int = at_least_0(2)  # of each training, on a GPU; 0: none
    sample_seconds: float = positive(1.0)  # between two readings of a GPU's counters
    # of a window that others took; more: no saving of time is shown
    max_foreign_load: Optional[float] = fraction(0.1)
