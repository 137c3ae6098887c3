"""Open an attempt at a run: device, data, folder and journal; refuse what cannot be done before
anything is written.

A run is found again by the key of its settings: an unfinished one goes on as a new attempt, in the
same folder.
"""

from __future__ import annotations

import datetime
import importlib
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.compare.quality import MIN_DOCUMENTS
from pipeline.config.owner import OWNER
from pipeline.config.redaction import redact_settings
from pipeline.config.settings import Run
from pipeline.data.documents import Dataset
from pipeline.data.load import load_dataset
from pipeline.errors import BudgetSpent, UserError
from pipeline.evaluation.serving.decoding import chosen
from pipeline.evaluation.serving.engine import read_results
from pipeline.gate.checks import is_gate
from pipeline.gate.opening import identify, open_gate
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.cuda.nvml import OF_THE_MODULE
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.foreign import nested_in
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.placement import NOTHING_KNOWN, grant, placement
from pipeline.ledger.records import RUN, read_record, sealed, sound_events, tell
from pipeline.runs.attempt import Attempt, device_name
from pipeline.runs.preflight import (
    check_calibration,
    check_completions,
    check_decode,
    check_dtype,
    check_formats,
    check_heads,
    check_models,
    check_precisions,
    check_releases,
    check_tasks,
    choose_device,
)
from pipeline.runs.recovery import recover, why_unusable
from pipeline.stages.release import BASELINE
from pipeline.store.artifacts import Store, key_of, plain, reserve_room, write_json
from pipeline.tracking.deliver import declared_uri
from pipeline.tracking.writer import start_writer

UNKEYED = (
    "tracking",
    "budget",
    "ledger",
    "allow_no_speedup",
)  # settings that change neither what is made nor how good it is
LOCK_S = 1.0  # a delivery to MLflow holds a run's lock for a moment
FREE_BYTES = 256 * 2**20  # a run that cannot even leave this much is refused


def open_attempt(run: Run, clock: PhaseClock, *, command: str, started_ns: int) -> Attempt:
    """Prepare everything a run needs, refusing what the device or the data cannot do before
    anything is written.

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
            if gate.baseline is None:
                run = without_baseline(run)
        compared = (
            {}
            if gate is None
            else {arm: side.artifact.digest for arm, side in gate.releases().items()}
        )
        settings = {name: value for name, value in plain(run).items() if name not in UNKEYED}
        config = key_of(
            run=settings, data=data.digest, **({"compared": compared} if compared else {})
        )
        owner = {name: getattr(run.tracking, name) for name in OWNER}
        # nobody goes on with a run that another owner has paid for so far
        key = key_of(config=config, owner=owner)
        _check_budget(run, root, key)
    with clock.phase("import"):
        import torch

        from pipeline.runs.assemble import commit
    with clock.phase("prepare"):
        device = choose_device(run)
        if run.hardware.num_threads is not None:
            torch.set_num_threads(run.hardware.num_threads)
        check_precisions(run, device)
        check_heads(run, device)
        check_formats(run, device)
        check_decode(run, device)
        check_dtype(run, device)
        check_completions(run, data)
        check_calibration(run, data)
    with clock.phase("import"):
        # else who looks into a folder pays
        importlib.import_module("transformers.models.auto.configuration_auto")
    with clock.phase("prepare"):
        quiet_libraries()
        _check_writable(root)
        engine = read_results(run)
        asked = check_tasks(run, clock)
        store = Store(root / "store")
    if gate is None:
        of_models = check_models(run, data, store, clock, device, asked)
    else:
        folders = {arm: side.artifact.path for arm, side in gate.releases().items()}
        of_models = check_releases(run, data, folders, clock, asked)
    with clock.phase("prepare"):
        folder, number, lock = _find_or_make(root, key, run)
        events = sound_events(
            read_events(folder / "journal.jsonl", checked=True), folder / "journal.jsonl"
        )
        journal = Journal(folder / "journal.jsonl", now_ns=clock.now_ns)
    with _or_nothing(folder, number, lock):
        attempt = Attempt(
            run=run,
            run_id=folder.name,
            number=number,
            folder=folder,
            store=store,
            journal=journal,
            clock=clock,
            device=device,
            data=data,
            command=command,
            started_ns=started_ns,
            sampler=Sampler(device_of(device).reader(), interval_s=run.ledger.sample_seconds),
            lock=lock,
            engine=engine,
            gate=gate,
            notes=[
                *data.notes,
                *of_models,
                *_few_documents(run, data),
                *(
                    f"serving of {arm} by an engine is as {each.source} says"
                    for arm, each in engine.items()
                ),
            ],
        )
        attempt.identity = {
            **owner,
            "model_name": run.model.name,
            "run": folder.name,
            "recipe": run.recipe,
            "config": config,
            "commit": commit(),
            "data": data.digest,
        }
        attempt.sampler.start()
        attempt.grant = attempted(grant, lambda why: _unread(attempt, "the scheduler's grant", why))
        attempt.placement = attempted(
            lambda: placement(
                device_name(device),
                attempt.devices,
                attempt.sampler.reader.placement(),
                attempt.grant,
            ),
            lambda why: (
                _unread(attempt, "the placement", why)
                or {**NOTHING_KNOWN, "count": attempt.devices}
            ),
        )
        if attempt.placement.get("power_scope") == "module":
            attempt.notes.append(OF_THE_MODULE)
        reserve_room(folder)
        state = {"key": key, "status": "RUNNING", "pid": os.getpid(), "attempt": number}
        write_json(folder / "run.json", sealed(state))
        settings = redact_settings(plain(run))
        write_json(folder / "config.json", settings)
        journal.write(
            "run_start",
            run_id=folder.name,
            started_ns=started_ns,
            clock_ns=clock.mark()[1],
            attempt=number,
            devices=attempt.devices,
            recipe=run.recipe,
            question=run.question,
            experiment=run.tracking.experiment or run.recipe,
            tracking_uri=declared_uri(run.tracking.uri),
            params=flat(settings),
            tags={k: v for k, v in settings["tracking"].items() if k in OWNER and v} | nested_in(),
            environment={
                "device": device_name(device),
                "data.digest": data.digest,
                "mlflow.source.git.commit": attempt.identity["commit"],
            },
            datasets=[
                {
                    "name": data.name,
                    "digest": data.digest,
                    "split": split,
                    "num_documents": len(documents),
                }
                for split, documents in data.splits.items()
            ],
        )
        if gate is not None:
            with clock.phase("log"):
                identify(
                    gate,
                    run,
                    data=data.digest,
                    device=device_name(device),
                    evaluation=attempt.reading(),
                    decode=chosen(run.serving.decode, device),
                )
    recover(attempt, events)
    for note in attempt.notes:
        print(f"note: {note}", flush=True)
    if run.tracking.mlflow:
        attempt.writer = attempted(
            lambda: start_writer(folder),
            lambda why: _unread(attempt, "what MLflow is to be told", why),
        )
    return attempt


def _unread(attempt: Attempt, what: str, why: str) -> None:
    """Note that something beside the work could not be read or done."""
    attempt.notes.append(unmeasured(what, why))


def without_baseline(run: Run) -> Run:
    """Return a gate's settings where there is nothing to be compared with; the given ones stay as
    they are.
    """
    stages = {name: stage for name, stage in run.stages.items() if name != BASELINE}
    return replace(run, stages=stages, compare=[])


@contextmanager
def _or_nothing(folder: Path, number: int, lock: Any) -> Generator[None]:
    """Remove the folder of a run that could not even begin."""
    try:
        yield
    except BaseException:
        lock.release()
        if number == 1:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_budget(run: Run, root: Path, key: str) -> None:
    """Stop before anything is spent where the run that would be gone on with has spent its budget.

    Raises:
        BudgetSpent: If so.
    """
    limit = run.budget.device_hours
    if limit is None:
        return
    for folder in (root / "runs").glob("*/"):
        spent = (_unfinished(folder, key) or {}).get("spent_device_hours") or 0.0
        if spent >= limit:
            raise BudgetSpent(
                f"budget.device_hours: {limit} is spent ({spent:.3g} by {folder.name}); raise it to"
                " go on"
            )


def _few_documents(run: Run, data: Dataset) -> list[str]:
    """Return what to know of a test split that is read in part, or that is too small to decide
    anything.
    """
    have, most = len(data.splits["test"]), run.quality.max_documents
    read = have if most is None else min(have, most)
    said = f"quality is read on {read} of {have} test documents"
    found = [f"{said} (quality.max_documents={most})"] if read < have else []
    if read < MIN_DOCUMENTS:
        found.append(
            f"{said}; fewer than {MIN_DOCUMENTS} decide no comparison: give more data, or a test"
            " file"
        )
    return found


def _unfinished(folder: Path, key: str) -> dict[str, Any] | None:
    """Return the state of a run with this key that has not ended well, or None."""
    state = read_record(folder / "run.json", RUN, so="that run is not gone on with")
    return (
        state
        if state is not None and state["key"] == key and state["status"] != "FINISHED"
        else None
    )


def _find_or_make(root: Path, key: str, run: Run) -> tuple[Path, int, Any]:
    """Return the folder of the unfinished run with this key and the attempt's number, or a new
    one.
    """
    from filelock import FileLock, Timeout

    for folder in sorted((root / "runs").glob("*/"), reverse=True):
        if _unfinished(folder, key) is None:
            continue
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=LOCK_S)
        except Timeout:
            continue  # another process is at it; this one is a run of its own
        state = _unfinished(folder, key)
        if state is None:  # it ended while we waited for its lock
            lock.release()
            continue
        journal = folder / "journal.jsonl"
        why = why_unusable(
            sound_events(read_events(journal, checked=True), journal), state["attempt"]
        )
        if why is None:
            return folder, state["attempt"] + 1, lock
        tell(journal, why, "that run is not gone on with")
        lock.release()  # a run that says less than it took is none
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = root / "runs" / f"{stamp}-{run.recipe}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".lock")
    lock.acquire(timeout=0)
    return folder, 1, lock


def _check_writable(root: Path) -> None:
    from pipeline.store.artifacts import check_room

    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "tracking.root",
            f"{root} cannot be made ({error.strerror})",
            "give a folder to write to",
        ) from None
    if not os.access(root, os.W_OK):
        raise UserError("tracking.root", f"{root} is not writable", "give a folder to write to")
    check_room(root, FREE_BYTES, "tracking.root")


def quiet_libraries() -> None:
    """Silence progress bars and chatter of libraries; what matters is said by this package,
    once.
    """
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # what a build lacks; what torch finds old in torchao
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|bitsandbytes|torchao|peft)(\.|$)"
    )


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as `a.b.c: value`."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result
