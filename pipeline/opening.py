"""Open an attempt at a run: device, data, folder and journal; refuse what cannot be done before anything is written.

A run is found again by the key of its settings: an unfinished one goes on as a new attempt, in the same folder.
"""

from __future__ import annotations

import datetime
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.assess.engine import read_results
from pipeline.attempt import Attempt, device_name
from pipeline.compare.quality import MIN_DOCUMENTS
from pipeline.config import Run
from pipeline.data.documents import Dataset
from pipeline.data.load import load_dataset
from pipeline.errors import BudgetSpent, UserError
from pipeline.gate.checks import is_gate
from pipeline.gate.opening import identify, open_gate
from pipeline.ledger.foreign import nested_in
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.nvml import reader_for
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.placement import grant, placement
from pipeline.preflight import (
    check_calibration,
    check_completions,
    check_decode,
    check_formats,
    check_heads,
    check_models,
    check_precisions,
    check_releases,
    check_tasks,
    choose_device,
)
from pipeline.recovery import recover
from pipeline.redact import redact_settings
from pipeline.stages.release import BASELINE
from pipeline.store import Store, key_of, plain, read_json, write_json
from pipeline.sync import start_writer
from pipeline.tracking import declared_uri
from pipeline.validate import OWNER

UNKEYED = (
    "tracking",
    "budget",
    "ledger",
    "allow_no_speedup",
)  # settings that change neither what is made nor how good it is
LOCK_S = 1.0  # a delivery to MLflow holds a run's lock for a moment
FREE_BYTES = 256 * 2**20  # a run that cannot even leave this much is refused


def open_attempt(run: Run, clock: PhaseClock, *, command: str, started_ns: int) -> Attempt:
    """Prepare everything a run needs, refusing what the device or the data cannot do before anything is written.

    Raises:
        UserError: Naming the setting.
    """
    root = Path(run.tracking.root).expanduser().resolve()
    with clock.phase("prepare"):
        data = load_dataset(run.data, run.task)
        gate = None
        if is_gate(run):
            _check_writable(root)
            with clock.phase("log"):
                gate = open_gate(run, root, Store(root / "store"))
            if gate.baseline is None:  # nothing to be compared with
                del run.stages[BASELINE]
                run.compare = []
        compared = {} if gate is None else {arm: side.artifact.digest for arm, side in gate.releases().items()}
        settings = {name: value for name, value in plain(run).items() if name not in UNKEYED}
        key = key_of(run=settings, data=data.digest, **({"compared": compared} if compared else {}))
        _check_budget(run, root, key)
    with clock.phase("import"):
        import torch

        from pipeline.assemble import commit
    with clock.phase("prepare"):
        device = choose_device(run)
        if run.hardware.num_threads is not None:
            torch.set_num_threads(run.hardware.num_threads)
        check_precisions(run, device)
        check_heads(run, device)
        check_formats(run, device)
        check_decode(run, device)
        check_completions(run, data)
        check_calibration(run, data)
        quiet_libraries()
        _check_writable(root)
    engine = read_results(run)
    asked = check_tasks(run, clock)
    store = Store(root / "store")
    if gate is None:
        check_models(run, data, store, clock, device, asked)
    else:
        check_releases(run, data, {arm: side.artifact.path for arm, side in gate.releases().items()}, clock)
