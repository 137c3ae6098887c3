"""Open an attempt at a run: device, data, folder and journal; refuse what cannot be done before
anything is written.

A run is found again by the key of its settings: an unfinished one is resumed as a new attempt, in
the same folder.
"""

from __future__ import annotations

import datetime
import importlib
import os
import secrets
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.compare.quality import MIN_DOCUMENTS
from pipeline.config.arms import BASELINE
from pipeline.config.owner import OWNER
from pipeline.config.redaction import redact_settings
from pipeline.config.settings.run import Run
from pipeline.data.documents import Dataset
from pipeline.data.load import load_dataset
from pipeline.errors import BudgetSpent, UserError
from pipeline.evaluation.serving.decoding import chosen
from pipeline.evaluation.serving.engine import EngineResult, read_results
from pipeline.gate.checks import is_gate
from pipeline.gate.opening import Gate, identify, open_gate
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.cuda.nvml import OF_THE_MODULE
from pipeline.ledger.devices.reader import Absent, Reader
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.foreign import nested_in
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.numbers import how_many
from pipeline.ledger.peaks import device_name
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.placement import NOTHING_KNOWN, Grant, grant, placement
from pipeline.ledger.records import RUN, read_record, sealed, sound_events, tell
from pipeline.ledger.shapes import Identity, Placement, RunEnvironment, RunState
from pipeline.report.forecast import forecast_line
from pipeline.report.tables import WIDTH
from pipeline.report.text import wrap
from pipeline.runs.book import Book
from pipeline.runs.changed import changed
from pipeline.runs.environment import commit
from pipeline.runs.fitting import planned_ranks, shared_by_need
from pipeline.runs.jobs import jobs_of
from pipeline.runs.keys import reading_key, run_keys
from pipeline.runs.preflight import (
    check_decode,
    check_dtype,
    check_models,
    check_releases,
    check_tasks,
    choose_device,
    in_native_precision,
    slow_precision,
)
from pipeline.runs.receipts.signature import load_key
from pipeline.runs.resume import Past, read_past, why_unusable
from pipeline.runs.running import Running
from pipeline.runs.session import Session
from pipeline.runs.timeline import Timeline
from pipeline.stages.base import BeforeRun, stages_of
from pipeline.stages.settings import is_deterministic
from pipeline.store.artifacts import Store, flat, plain, reserve_room, write_json
from pipeline.store.locks import check_locks, lock_at
from pipeline.tracking.deliver import declared_uri
from pipeline.tracking.writer import start_writer
from pipeline.training.ranks import ALONE, Ranks

LOCK_S = 1.0  # a delivery to MLflow holds a run's lock for a moment
FREE_BYTES = 256 * 2**20  # a run that cannot even leave this much is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is known of a run before anything of it is written.

    Attributes:
        root: `tracking.root`.
        config: Digest of the settings and the data.
        key: By which the run is found again.
        known: What stages are told of the given model; None in a release check.
        notes: What a reader must know of data, models and settings.
    """

    run: Run
    root: Path
    data: Dataset
    device: Any
    store: Store
    config: str
    key: str
    gate: Gate | None
    engine: dict[str, EngineResult]
    known: BeforeRun | None
    notes: list[str]


def prepare(run: Run, clock: PhaseClock) -> Prepared:
    """Refuse what the device, the models or the data cannot do.

    Raises:
        UserError: Naming the setting.
    """
    root = Path(run.tracking.root).expanduser().resolve()
    owner = {name: getattr(run.tracking, name) for name in OWNER}
    if run.tracking.sign_with is not None:
        load_key(Path(run.tracking.sign_with).expanduser(), "tracking.sign_with")
    with clock.phase("prepare"):
        data = load_dataset(run.data, run.task)
        gate = _open_gate(run, root, clock) if is_gate(run) else None
        if gate is not None and gate.baseline is None:
            run = without_baseline(run)
        released = {} if gate is None else gate.releases()
        digests = {arm: side.artifact.digest for arm, side in released.items()}
        config, key = run_keys(run, data.digest, owner, digests)
        # Before torch is imported: a requeued job whose budget is spent ends at once.
        _check_budget(run, root, key)
    run, device, said = _open_device(run, clock)
    with clock.phase("prepare"):
        quiet_libraries()
        _check_writable(root)
        store = Store(root / "store")
        engine = read_results(run)
        asked = check_tasks(run, clock)
    known = None
    if gate is None:
        of_models, known = check_models(run, data, store, clock, device, asked)
        run = known.run  # with a `parallel.mode` that fits
    else:
        folders = {arm: side.artifact.path for arm, side in released.items()}
        of_models = check_releases(run, data, folders, clock, asked)
    notes = [
        *data.notes,
        *said,
        *_demonstration(run, data),
        *of_models,
        *_few_documents(run, data),
        *_engines(engine),
        *slow_precision(run, device),
    ]
    return Prepared(
        run=run,
        root=root,
        data=data,
        device=device,
        store=store,
        config=config,
        key=key,
        gate=gate,
        engine=engine,
        known=known,
        notes=notes,
    )


def open_run(
    run: Run, clock: PhaseClock, *, command: str, started_ns: int, ranks: Ranks = ALONE
) -> Running:
    """Prepare everything a run needs, refusing what the device or the data cannot do before
    anything is written.

    Args:
        ranks: The processes that share the run; this is the first.

    Raises:
        UserError: Naming the setting.
    """
    ready = prepare(run, clock)
    run, device, notes = ready.run, ready.device, [*ready.notes]
    with clock.phase("prepare"):
        folder, number, lock = _find_or_make(ready.root, ready.key, run)
        path = folder / "journal.jsonl"
        events = sound_events(read_events(path, checked=True), path)
        journal = Journal(path, now_ns=clock.now_ns)
    with _or_nothing(folder, number, lock):
        sampler = Sampler(_reader(device, ranks), interval_s=run.ledger.sample_seconds)
        sampler.start()
        granted, placed = _placement(device, _devices(device, ranks), sampler, notes)
        session = Session(
            run=run,
            run_id=folder.name,
            number=number,
            folder=folder,
            store=ready.store,
            journal=journal,
            clock=clock,
            device=device,
            data=ready.data,
            command=command,
            started_ns=started_ns,
            sampler=sampler,
            identity=_identity(run, folder, ready.config, ready.data),
            placement=placed,
            grant=granted,
            devices=_devices(device, ranks),
            ranks=ranks,
            engine=ready.engine,
            gate=ready.gate,
            shared_by_need=_shared_by_need(ready.known, ranks),
        )
        reserve_room(folder)
        state = {"key": ready.key, "status": "RUNNING", "pid": os.getpid(), "attempt": number}
        jobs = jobs_of(folder) | ({granted.job_id} if granted is not None else set())
        write_json(folder / "run.json", sealed({**state, "jobs": sorted(jobs)}))
        _journal_start(session)
        if ready.gate is not None:
            _identify(session, ready.gate)
    running = _taking_over(session, read_past(session, events), notes, lock)
    _say_forecast(running, ready.known)
    for note in notes:
        print(f"note: {note}", flush=True)
    return _delivered(running) if run.tracking.mlflow else running


@contextmanager
def opened_aside(run: Run, clock: PhaseClock) -> Generator[tuple[Running, BeforeRun | None]]:
    """Open a run that is not to be: nothing of it stays but what its models are made from.

    Raises:
        UserError: As `open_run` does.
    """
    ready = prepare(run, clock)
    with TemporaryDirectory() as aside:
        folder = Path(aside) / "runs" / "forecast"
        folder.mkdir(parents=True)
        session = Session(
            run=ready.run,
            run_id=folder.name,
            number=1,
            folder=folder,
            store=ready.store,
            journal=Journal(folder / "journal.jsonl", now_ns=clock.now_ns),
            clock=clock,
            device=ready.device,
            data=ready.data,
            command="",
            started_ns=clock.now_ns(),
            sampler=Sampler(Absent("nothing is measured")),
            identity=_identity(ready.run, folder, ready.config, ready.data),
            placement={**NOTHING_KNOWN, "count": 1},
            grant=None,
            devices=planned_devices(ready.run, ready.device),
            engine=ready.engine,
            gate=ready.gate,
        )
        yield Running(session, Timeline(session), Book(session), lock=None), ready.known


def _shared_by_need(known: BeforeRun | None, ranks: Ranks) -> frozenset[str]:
    at_once = known is not None and ranks.several and known.run.parallel.stages
    return shared_by_need(known) if known is not None and at_once else frozenset()


def planned_devices(run: Run, device: Any) -> int:
    """Return how many devices a run will be attached to on this host: a CPU host is one."""
    return 1 if device.type == "cpu" else planned_ranks(run, device)


def _reader(device: Any, ranks: Ranks) -> Reader:
    """Return a reader of the counters of all ranks' devices; those of some would stand for all."""
    own = device_of(device)
    if not ranks.several or device.type == "cpu":  # a host's own
        return own.reader()
    if ranks.hosts > 1:
        return Absent(f"it was on {ranks.hosts} hosts, and counters are read of one alone")
    known = [name for name in ranks.counted if name is not None]
    if len(known) < ranks.size:
        return Absent(f"counters of several {own.kind} devices are not read yet")
    return own.reader(others=known)


def _devices(device: Any, ranks: Ranks) -> int:
    """Return how many devices a run is attached to: a host is one, however many ranks share it."""
    return ranks.hosts if device.type == "cpu" else ranks.size


def _demonstration(run: Run, data: Dataset) -> list[str]:
    """Return which data a gate scores on where nobody named any."""
    named = run.data.path is not None or run.data.hub is not None
    if named or not is_gate(run) or (run.candidate_items and run.baseline_items):
        return []
    return [
        f"the models are scored on the embedded demonstration data ({data.name}): name your own"
        " with data.path"
    ]


def _engines(engine: Mapping[str, EngineResult]) -> list[str]:
    """Return what is taken from engines' own measurements of serving."""
    return [
        f"serving of {arm} by an engine is as {each.source} says" for arm, each in engine.items()
    ]


def _identity(run: Run, folder: Path, config: str, data: Dataset) -> Identity:
    """Return what the run was made from, and whose it is."""
    return {
        "model_name": run.model.name,
        "run": folder.name,
        "recipe": run.recipe,
        "config": config,
        "commit": commit(),
        "data": data.digest,
        "team": run.tracking.team,
        "cost_center": run.tracking.cost_center,
        "purpose": run.tracking.purpose,
    }


def _say_forecast(running: Running, known: BeforeRun | None) -> None:
    """Print what the run will take, and keep it in its folder."""
    with running.session.clock.phase("import"):  # what the stages import first of all
        from pipeline.runs.forecasting import foresee, keep

    def say() -> str:
        forecast = foresee(running, known)
        keep(running, forecast)
        line = forecast_line(forecast.record, running.session.number)
        return "\n".join(wrap(line, WIDTH, "    "))

    with running.session.clock.phase("prepare"):
        print(
            attempted(say, lambda why: unmeasured("forecast: what it will take", why)), flush=True
        )


def _delivered(running: Running) -> Running:
    """Return the run with the process that delivers its journal to MLflow."""
    writer = attempted(
        lambda: start_writer(running.session.folder),
        lambda why: running.book.notes.append(unmeasured("what MLflow is given", why)),
    )
    return replace(running, writer=writer)


def _open_gate(run: Run, root: Path, clock: PhaseClock) -> Gate:
    _check_writable(root)
    with clock.phase("log"):
        return open_gate(run, root, Store(root / "store"))


def _open_device(run: Run, clock: PhaseClock) -> tuple[Run, Any, list[str]]:
    """Return the device, after refusing what it cannot do; the run with a precision that suits it,
    and what is to be said of that.
    """
    with clock.phase("import"):
        import torch
    with clock.phase("prepare"):
        device = choose_device(run)
        run, said = in_native_precision(run, device)
        if any(is_deterministic(stage, run) for stage in stages_of(run).values()):
            device_of(device).before_deterministic()
        if run.hardware.num_threads is not None:
            torch.set_num_threads(run.hardware.num_threads)
        for name, stage in stages_of(run).items():
            stage.refuse_device(f"stages.{name}", run, device)
        check_decode(run, device)
        check_dtype(run, device)
    with clock.phase("import"):
        # else who looks into a folder pays
        importlib.import_module("transformers.models.auto.configuration_auto")
    return run, device, said


def _placement(
    device: Any, devices: int, sampler: Sampler, notes: list[str]
) -> tuple[Grant | None, Placement]:
    """Return what a scheduler gave this job, and where it stands; what cannot be read is noted."""

    def unread(what: str, why: str) -> None:
        notes.append(unmeasured(what, why))

    def nothing_known(why: str) -> Placement:
        unread("the placement", why)
        return {**NOTHING_KNOWN, "count": devices}

    granted = attempted(grant, lambda why: unread("the scheduler's grant", why))
    placed = attempted(
        lambda: placement(device_name(device), devices, sampler.reader.placement(), granted),
        nothing_known,
    )
    if placed.get("power_scope") == "module":
        notes.append(OF_THE_MODULE)
    return granted, placed


def _journal_start(session: Session) -> None:
    """Write the settings, and the journal's first line of this attempt."""
    run, data, device = session.run, session.data, device_name(session.device)
    settings = redact_settings(plain(run))
    write_json(session.folder / "config.json", settings)
    environment: RunEnvironment = {
        "device": device,
        "data.digest": data.digest,
        "mlflow.source.git.commit": session.identity.get("commit"),
    }
    session.journal.write(
        "run_start",
        run_id=session.run_id,
        started_ns=session.started_ns,
        clock_ns=session.clock.mark()[1],
        attempt=session.number,
        devices=session.devices,
        grant=None if session.grant is None else asdict(session.grant),
        recipe=run.recipe,
        question=run.question,
        experiment=run.tracking.experiment or run.recipe,
        tracking_uri=declared_uri(run.tracking.uri),
        params=flat(settings),
        changed=changed(run),
        tags={k: v for k, v in settings["tracking"].items() if k in OWNER and v} | nested_in(),
        environment=environment,
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


def _identify(session: Session, gate: Gate) -> None:
    run, device = session.run, session.device
    with session.clock.phase("log"):
        identify(
            gate,
            run,
            data=session.data.digest,
            device=device_name(device),
            evaluation=reading_key(session),
            decode=chosen(run.serving.decode, device),
        )


def _taking_over(session: Session, past: Past, notes: list[str], lock: Any) -> Running:
    """Return the run in progress, with what earlier attempts at it spent."""
    timeline = Timeline(
        session,
        windows=list(past.windows),
        spans=dict(past.spans),
        traces=dict(past.traces),
        led=dict(past.led),
        overhead_ns=dict(past.overhead_ns),
        compare_ns=dict(past.compare_ns),
    )
    book = Book(
        session,
        rows=list(past.rows),
        finished_before=list(past.finished),
        reused_h=past.reused_h,
        notes=notes,
    )
    for row in past.changed:
        book.add(row)
    return Running(session, timeline, book, lock)


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
        # The folder of an earlier attempt holds its hours and stays.
        if number == 1:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_budget(run: Run, root: Path, key: str) -> None:
    """Stop before anything is spent where the run that would be resumed has spent its budget.

    Raises:
        BudgetSpent: If so.
    """
    limit = run.budget.device_hours
    if limit is None:
        return
    for folder in (root / "runs").glob("*/"):
        state = _unfinished(folder, key)
        spent = (None if state is None else state.get("spent_device_hours")) or 0.0
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
    said = f"quality is read on {read} of {how_many(have, 'test document')}"
    found = [f"{said} (quality.max_documents={most})"] if read < have else []
    if read < MIN_DOCUMENTS:
        found.append(
            f"{said}; fewer than {MIN_DOCUMENTS} decide no comparison: give more data, or a test"
            " file"
        )
    return found


def _unfinished(folder: Path, key: str) -> RunState | None:
    """Return the state of a run with this key that has not ended well, or None."""
    state = read_record(folder / "run.json", RUN, so="that run is not resumed")
    return (
        state
        if state is not None and state["key"] == key and state["status"] != "FINISHED"
        else None
    )


def _find_or_make(root: Path, key: str, run: Run) -> tuple[Path, int, Any]:
    """Return the folder of the unfinished run with this key and the attempt's number, or a new
    one.
    """
    from filelock import Timeout

    # Names begin with the time: the newest first.
    for folder in sorted((root / "runs").glob("*/"), reverse=True):
        if _unfinished(folder, key) is None:
            continue
        lock = lock_at(folder / ".lock")
        try:
            lock.acquire(timeout=LOCK_S)
        except Timeout:
            continue  # another process is at it; this one is a run of its own
        # Read again under the lock: what was read before may be out of date.
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
        tell(journal, why, "that run is not resumed")
        lock.release()  # a run that says less than it took is none
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = root / "runs" / f"{stamp}-{run.recipe}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    lock = lock_at(folder / ".lock")
    # Nobody else knows the folder yet.
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
    check_locks(root)
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
    # what a build lacks; what torch finds old in torchao; that int8 casts, at every layer
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|bitsandbytes|torchao|peft)(\.|$)"
    )
