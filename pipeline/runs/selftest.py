"""The gate's self-test: a model against itself, and one training again and again. What it says is
recorded in MLflow.

The model is loaded twice, as a gate loads its two sides, and both copies serve in every trial; they
change roles from trial to trial, so that a difference between them (where their weights lie) shows
as one and not as a bias. Readings, conditions, looks and criteria are those of a release check;
only the least saving is 0.
"""

from __future__ import annotations

import datetime
import itertools
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.compare.selftest import (
    Look,
    Served,
    Trial,
    false_answers,
    one_trial,
    sum_up,
    training_floor,
    training_spread,
)
from pipeline.compare.verdict import Outcome, disturbed, moved, quality_criterion
from pipeline.config.settings.run import Run, scored_length
from pipeline.errors import BudgetSpent, Exit, Preempted, UserError
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.journal import Journal, heartbeat
from pipeline.ledger.metrics import PRIMARY, TASK
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.records import ENDED, read_record
from pipeline.ledger.shapes import (
    ChargedOn,
    ChargeRecord,
    DtypeRecord,
    EndedResult,
    Figures,
    Quality,
    RunEnvironment,
    SelftestRecord,
    TestedReading,
    TestedServing,
    TestedTraining,
)
from pipeline.ledger.shapes import Dataset as Split
from pipeline.ledger.values import Value, measured, null
from pipeline.runs.signals import on_stop_signal
from pipeline.store.artifacts import Store, facts_of, flat, key_of, plain, write_json, write_text
from pipeline.store.locks import lock_at
from pipeline.tracking.deliver import declared_uri

if TYPE_CHECKING:
    from pipeline.data.documents import Dataset
    from pipeline.evaluation.serving.server import Server
    from pipeline.gate.references import Release

RECIPE = "selftest"
QUESTION = "does the gate answer rightly where both sides are the same?"
REPORT, FILE = "report.md", "selftest.json"
ARM, BASE = "arm", "base"  # the two copies in one trial
LEAST_REPEATS = 3
HOUR_NS = 3600 * 10**9
POLL_S = 0.5
AGAIN = "a self-test has no checkpoints; run it again"


@dataclass(frozen=True, slots=True)
class Options:
    """What a self-test is asked for beside the gate's settings.

    Attributes:
        trials: A/A trials.
        train: Arguments of the training that is repeated; empty: none is.
        repeats: How often.
    """

    trials: int = 20
    train: tuple[str, ...] = ()
    repeats: int = 5


@dataclass(slots=True)
class SelfTest:
    """A self-test at work.

    Attributes:
        compare_ns: Device-nanoseconds of the trials.
        hours: Device-hours of C of every repeated training.
        trained_on: Device and count that the repeated trainings name.
    """

    run: Run
    options: Options
    release: Release
    data: Dataset
    device: Any
    clock: PhaseClock
    folder: Path
    journal: Journal
    lock: Any
    started_ns: int
    trials: list[Trial] = field(default_factory=list[Trial])
    signs: list[int] = field(default_factory=list[int])
    quality: dict[str, TestedReading] = field(default_factory=dict)
    copies: str = ""
    # what it was served in (`evaluation/serving/dtype.py`)
    dtype: DtypeRecord = field(default_factory=DtypeRecord)
    compare_ns: int = 0
    hours: list[float] = field(default_factory=list[float])
    trained_on: ChargedOn | None = None
    stop_signal: int | None = None

    def check(self) -> None:
        """Go no further where a scheduler wants the machine back or the budget is spent.

        Raises:
            BudgetSpent, Preempted: If so.
        """
        if self.stop_signal is not None:
            raise Preempted(f"stopped ({signal.Signals(self.stop_signal).name}): {AGAIN}")
        limit = self.run.budget.device_hours
        if limit is not None and (self.clock.now_ns() - self.started_ns) / HOUR_NS >= limit:
            raise BudgetSpent(f"budget.device_hours: {limit} is spent; raise it for more trials")


def self_test(run: Run, options: Options, *, started_ns: int) -> int:
    """Test the gate that a composed release check would be, and record what came out; return the
    exit code.

    Args:
        run: `recipe=release_check` with the same reference on both sides.
        options: How often, and which training.
        started_ns: Monotonic time when the process began.

    Raises:
        UserError, BudgetSpent, Preempted: If it cannot be done, or not to its end; what it took is
            recorded all the same.
    """
    from pipeline.tracking.writer import GATE_S, start_writer, undelivered

    test = _open(run, options, started_ns)
    writer = start_writer(test.folder) if run.tracking.mlflow else None
    status, why = "FAILED", "crashed"
    result: SelftestRecord | None = None
    try:
        with (
            heartbeat(test.journal),
            on_stop_signal(lambda number: setattr(test, "stop_signal", number)),
        ):
            _measure(test)
            _train(test)
        result = _result(test)
        status, why = "FINISHED", None
    except (UserError, BudgetSpent) as problem:
        why = str(problem)
        raise
    except Preempted as stop:
        status, why = "KILLED", str(stop)
        raise
    except KeyboardInterrupt:
        status, why = "KILLED", "interrupted"
        raise KeyboardInterrupt(f"interrupted: {AGAIN}") from None
    finally:
        _end(test, result, status, why)
        said = None if writer is None else undelivered(writer, test.folder, wait_s=GATE_S)
        if said is not None:
            print(said, file=sys.stderr)
    from pipeline.report.selftest import lines

    assert result is not None, "what ended otherwise has raised"
    print("\n".join(["", *lines(result)]))
    return result["exit_code"]


def _open(run: Run, options: Options, started_ns: int) -> SelfTest:
    """Find the model, refuse what cannot be served here, and begin a run of its own."""
    from pipeline.config.redaction import redact_settings
    from pipeline.data.load import load_dataset
    from pipeline.gate.references import Places, resolve
    from pipeline.runs.opening import quiet_libraries
    from pipeline.runs.preflight import check_decode, check_releases, check_tasks, choose_device

    clock, root = PhaseClock(), Path(run.tracking.root).expanduser().resolve()
    with _writable(root):
        store = Store(root / "store")
    release = resolve(
        str(run.candidate), "model", Places(root, store, run.tracking.uri, run.store.url)
    )
    if release is None:
        raise UserError(
            "model", f"there is no {run.candidate}", "name a version that is registered"
        )
    data = load_dataset(run.data, run.task)
    device = choose_device(run)
    if run.hardware.num_threads is not None:
        import torch

        torch.set_num_threads(run.hardware.num_threads)
    check_decode(run, device)
    quiet_libraries()
    asked = check_tasks(run, clock)
    check_releases(run, data, {"model": release.artifact.path}, clock, asked)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = root / "runs" / f"{stamp}-{RECIPE}-{secrets.token_hex(2)}"
    lock = lock_at(folder / ".lock")  # free, it would say that this process is gone
    with _writable(root):
        folder.mkdir(parents=True)
        lock.acquire(timeout=0)
        journal = Journal(folder / "journal.jsonl", now_ns=clock.now_ns)
    test = SelfTest(run, options, release, data, device, clock, folder, journal, lock, started_ns)
    settings = redact_settings({**plain(run), RECIPE: plain(options)})
    write_json(folder / "config.json", settings)
    _journal_start(test, flat(settings))
    return test


@contextmanager
def _writable(root: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        problem = f"{root} cannot be written to ({error.strerror})"
        raise UserError("root", problem, "give a folder to write to") from None


def _journal_start(test: SelfTest, params: Mapping[str, Any]) -> None:
    """Write the journal's first line."""
    from pipeline.config.owner import OWNER
    from pipeline.ledger.foreign import nested_in
    from pipeline.ledger.peaks import device_name

    run, data = test.run, test.data
    owner = {name: value for name in OWNER if (value := getattr(run.tracking, name))}
    environment: RunEnvironment = {"device": device_name(test.device), "data.digest": data.digest}
    split: Split = {
        "name": data.name,
        "digest": data.digest,
        "split": "test",
        "num_documents": len(data.splits["test"]),
    }
    test.journal.write(
        "run_start",
        run_id=test.folder.name,
        started_ns=test.started_ns,
        attempt=1,
        devices=1,
        recipe=RECIPE,
        question=QUESTION,
        experiment=run.tracking.experiment or RECIPE,
        tracking_uri=declared_uri(run.tracking.uri),
        params=params,
        tags=owner | nested_in(),
        environment=environment,
        datasets=[split],
    )


# -- a model against itself -----------------------------------------------------------------------


def _measure(test: SelfTest) -> None:
    """Judge the loaded copies again and again, then what they predict."""
    from pipeline.data.encode import encode_all
    from pipeline.ledger.gpu_sampler import Sampler
    from pipeline.models.load import load_tokenizer
    from pipeline.runs.serving_pass import PROMPT_DOCUMENTS

    run, policy = test.run, test.run.policy
    path = test.release.artifact.path
    documents = test.data.splits["test"][:PROMPT_DOCUMENTS]
    encoded = encode_all(
        documents, load_tokenizer(path), run.task, max_length=max(512, run.serving.load.prompt)
    )
    sampler, start_ns = Sampler(device_of(test.device).reader()), test.clock.now_ns()
    sampler.start()
    try:
        look = _looks(test, [item.input_ids for item in encoded], sampler)
        for number in range(test.options.trials):
            test.check()
            trial = one_trial(look(number), alpha=policy.alpha, looks=policy.looks)
            test.trials.append(trial)
            test.signs.append(1 if number % 2 == 0 else -1)
            print(f"trial {number + 1} of {test.options.trials}: {trial.outcome}", flush=True)
    finally:
        sampler.stop()
        test.compare_ns = test.clock.now_ns() - start_ns
    test.check()
    test.quality = _quality(test)


def _looks(test: SelfTest, prompts: Sequence[Any], sampler: Any) -> Callable[[int], Look]:
    """Load both copies; return what measures the looks of a trial with them."""
    from pipeline.evaluation.serving.decoding import chosen
    from pipeline.evaluation.serving.dtype import choose_dtype
    from pipeline.evaluation.serving.measure import (
        check_load,
        machine_conditions,
        measure_interleaved,
    )
    from pipeline.evaluation.serving.server import load
    from pipeline.ledger.others import Others

    run = test.run
    copies: list[Server] = []
    choice = choose_dtype(
        run.policy.dtype,
        {ARM: test.release.artifact.path},
        task=run.task,
        labels=test.data.labels,
        prompts=prompts,
        config=run.serving,
        device=test.device,
        clock=test.clock,
        check=test.check,
    )
    test.dtype = choice.to_json()
    with test.clock.phase("model_load"):
        for _ in range(2):
            copies.append(
                load(
                    test.release.artifact.path,
                    run.task,
                    test.device,
                    labels=test.data.labels,
                    now_ns=test.clock.now_ns,
                    # timed apart, two copies could be served in two ways
                    decode=chosen(run.serving.decode, test.device),
                    dtype=choice.dtype,
                )
            )
    for server in copies:
        check_load(server, run.serving.load, prompts)

    def of(number: int) -> Look:
        # Roles change from trial to trial, so that where a copy lies in memory favours no side.
        first, second = copies if number % 2 == 0 else copies[::-1]
        # A seed for every look of every trial: no two draw the same order.
        taken = itertools.count(number * run.policy.looks)

        def look() -> tuple[Any, Any, list[str]]:
            with test.clock.phase("generate"):
                others, start_ns = Others(), test.clock.now_ns()
                sampler.mark()
                read = measure_interleaved(
                    {ARM: first, BASE: second},
                    [(ARM, BASE)],
                    config=run.serving,
                    prompts=prompts,
                    seed=number,
                    check=test.check,
                    order_seed=next(taken),
                )
                sampler.mark()
                conditions = machine_conditions(
                    sampler, (start_ns, test.clock.now_ns()), others, test.device.type
                )
            arm, base = read.seconds[ARM, BASE]
            beside = moved(run.policy, arm, base, read.orders[ARM, BASE], read.places[ARM, BASE])
            return arm, base, [*disturbed(run.policy, _device(test), conditions), *beside]

        return look

    return of


def _device(test: SelfTest) -> str:
    from pipeline.ledger.peaks import device_name

    return device_name(test.device)


def _quality(test: SelfTest) -> dict[str, TestedReading]:
    """Score the artifact twice and compare it with itself on each quality that the policy asks
    for.
    """
    from pipeline.evaluation.quality.assess import assess_quality, read_items
    from pipeline.gate.checks import gating_metrics

    run, policy = test.run, test.run.policy
    asked = gating_metrics(policy, run.task)
    if not asked:
        return {}
    sides = [
        assess_quality(
            test.release.artifact.path,
            documents=test.data.splits["test"],
            task=run.task,
            labels=test.data.labels,
            config=run.quality,
            sequence_length=scored_length(run),
            device=test.device,
            items=test.folder / f"copy-{number}.jsonl",
            teacher_predictions=None,
            seed=0,
            clock=test.clock,
        )
        for number in (1, 2)
    ]
    found: dict[str, TestedReading] = {}
    for key in asked:
        held_by = key if key.startswith(TASK) else PRIMARY[run.task]
        items = [path for side in sides if (path := _items_of(side, held_by)) is not None]
        if len(items) < len(sides):
            continue
        arm, base = map(read_items, items)
        read = quality_criterion(
            key,
            arm,
            base,
            policy,
            margin=policy.metrics[key].margin,
            resamples=run.quality.bootstrap,
        )
        found[key] = {
            "outcome": read.outcome.value,
            "value": read.value.value,
            "n": read.n,
            "why": read.why,
        }
    return found


def _items_of(quality: Quality, key: str) -> Path | None:
    """Return where the per-document values of a quality lie, if there are any."""
    items = quality[key]["items"] if key in quality else None
    return None if not items else Path(items)


# -- one training again and again -----------------------------------------------------------------


def _train(test: SelfTest) -> None:
    """Repeat the training, each time in a fresh root: nothing is reused."""
    if not test.options.train:
        return
    _free_device(test.device)
    root = test.folder.parent.parent
    for number in range(1, test.options.repeats + 1):
        test.check()
        said = f"repeat {number} of {test.options.repeats}"
        print(f"training, {said}", flush=True)
        place = Path(tempfile.mkdtemp(prefix="selftest-", dir=root))
        try:
            hours, device = _one_training(test.options.train, place, said, test.check)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        test.hours.append(hours)
        test.trained_on = device
        test.journal.write("repeat", number=number, device_hours=hours, device=device)


def _free_device(device: Any) -> None:
    """Give the device's memory back: the trainings run in processes of their own."""
    import gc

    gc.collect()
    device_of(device).release_memory()


def _one_training(
    args: Sequence[str], root: Path, said: str, check: Callable[[], None]
) -> tuple[float, ChargedOn]:
    """Run a recipe to its end; return C of its primary arm, in device-hours, and the device that it
    names.

    Args:
        check: Asked meanwhile; where it raises, the training is killed.

    Raises:
        UserError: If it does not end well, or trained nothing.
    """
    code, err = _run(
        [sys.executable, "-m", "pipeline", *args, "tracking=off", f"tracking.root='{root}'"], check
    )
    if code not in (Exit.DONE, Exit.FAIL):  # a format that saves nothing was trained all the same
        last = " ".join((err.strip().splitlines() or [""])[-1].split())
        problem = f"{said} ended with exit code {code} ({last[:200]})"
        raise UserError("train", problem, "run it alone first: python -m pipeline ...")
    charge = _charge(read_record(root / "latest" / "result.json", ENDED))
    hours = (None if charge is None else charge["work_device_hours"]) or 0.0
    if charge is None or hours <= 0:
        raise UserError(
            "train", f"{said} trained nothing", "name a recipe whose primary arm is trained"
        )
    return hours, charge.get("device", {})


def _run(command: list[str], check: Callable[[], None]) -> tuple[int, str]:
    """Run a program until it ends, or until `check` raises; return its exit code and what it said
    on stderr.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while True:
                check()
                with suppress(subprocess.TimeoutExpired):
                    err = process.communicate(timeout=POLL_S)[1]
                    return process.returncode, err
        except BaseException:
            process.kill()
            raise


def _charge(result: EndedResult | None) -> ChargeRecord | None:
    """Return what the primary artifact's chain took, as a gate will read it from its
    artifact.json.
    """
    made = [
        artifact
        for row in ([] if result is None else result["rows"])
        if row["arm"] == (result or {}).get("primary_arm") and (artifact := row["artifact"])
    ]
    return facts_of(Path(made[0]["path"])).get("charge") if made else None


# -- what it came to ------------------------------------------------------------------------------


def _result(test: SelfTest) -> SelftestRecord:
    policy = test.run.policy
    served = sum_up(
        test.trials, test.signs, alpha=policy.alpha, blocks=policy.blocks, looks=policy.looks
    )
    answered = [
        each for each in test.quality.values() if each["outcome"] in (Outcome.PASS, Outcome.FAIL)
    ]
    quality = false_answers(
        sum(each["outcome"] == Outcome.FAIL for each in answered), len(answered), 0.0
    )
    too_many = served.too_many or quality.too_many
    # Every trial was INVALID: nothing was learnt about the gate.
    silent = served.passes.n == 0
    code = Exit.FAIL if too_many else Exit.INVALID if silent else Exit.DONE
    return {
        "schema": 2,
        "run_id": test.folder.name,
        "exit_code": int(code),
        "too_many": too_many,
        "model": {
            "reference": test.release.reference,
            "digest": test.release.artifact.digest,
            "name": test.release.model,
            "version": test.release.version,
        },
        "policy": {
            "name": policy.name,
            "sha256": key_of(policy=policy),
            "alpha": policy.alpha,
            "blocks": policy.blocks,
            "looks": policy.looks,
            "load": plain(policy.load),
        },
        "device": {"kind": device_of(test.device).kind, "name": _device(test), "count": 1},
        "data": test.data.digest,
        "dtype": {"asked": test.dtype.get("asked"), "served": test.dtype.get("served")},
        "serving": _served_json(served, test.trials),
        "quality": {"false": quality.to_json(), "read": test.quality},
        "training": _training_json(test),
        "device_hours": (test.clock.now_ns() - test.started_ns) / HOUR_NS,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _served_json(served: Served, trials: Sequence[Trial]) -> TestedServing:
    return {
        "outcomes": served.outcomes,
        "false_pass": served.passes.to_json(),
        "false_fail": served.fails.to_json(),
        "sd_log": served.sd_log,
        "copies": None if served.copies is None else list(served.copies),
        "noise_floor": served.noise_floor,
        "power": [list(each) for each in served.power],
        "trials": [
            {
                "outcome": each.outcome.value,
                "looks": each.looks,
                "why": each.why,
                "log_ratios": each.log_ratios.tolist(),
            }
            for each in trials
        ],
    }


def _training_json(test: SelfTest) -> TestedTraining | None:
    if test.trained_on is None:
        return None
    sd_log, runs = training_spread(test.hours), len(test.hours)
    return {
        "device_hours": test.hours,
        "sd_log": sd_log,
        "runs": runs,
        "device": test.trained_on,
        "floor": training_floor(sd_log, runs, alpha=test.run.policy.alpha),
    }


def _end(test: SelfTest, result: SelftestRecord | None, status: str, why: str | None) -> None:
    """Write what there is, and what it took; MLflow gets it from the journal."""
    from pipeline.report.selftest import lines, markdown

    files: list[str] = []
    if result is not None:
        write_json(test.folder / FILE, result)
        write_text(test.folder / REPORT, markdown(result))
        files = [FILE, REPORT]
        test.journal.write("selftest", tags=_tags(result), values=_values(result))
    total_ns = test.clock.now_ns() - test.started_ns
    rest_ns = max(total_ns - test.compare_ns, 0)
    parts = {
        "total": total_ns,
        "work": 0,
        "assess": 0,
        "retry": 0,
        "compare": test.compare_ns,
        "overhead": rest_ns,
    }
    hours = {name: measured(ns / HOUR_NS).to_json() for name, ns in parts.items()}
    totals = {
        "attempts": 1,
        "device_hours": hours,
        "phases_device_ns": {"overhead": {}, "compare": {}},
        "spent": hours["total"],
        "reused": measured(0.0).to_json(),
    }
    shown = f"{status}: {why}" if result is None else "\n".join(lines(result))
    test.journal.write(
        "run_end",
        status=status,
        why=why,
        primary_arm=None,
        run=totals,
        description=shown,
        files=files,
    )
    test.journal.close()
    test.lock.release()


def _tags(result: SelftestRecord) -> dict[str, str | int | None]:
    """Return the tags that a gate finds a spread by, and what was tested."""
    training = result["training"]
    device = result["device"] if training is None else training["device"]
    model = result["model"]["name"] or result["model"]["digest"]
    return {
        "device": device.get("name"),
        "devices": device.get("count"),
        "model": model,
        "digest": result["model"]["digest"],
        "policy": result["policy"]["name"],
        "policy.sha256": result["policy"]["sha256"],
        "answer": "too many false answers" if result["too_many"] else "as alpha allows",
    }


def _values(result: SelftestRecord) -> Figures:
    serving, quality, training = result["serving"], result["quality"]["false"], result["training"]
    false = serving["false_pass"]["count"] + serving["false_fail"]["count"]
    counted = {
        "serving_n": serving["false_pass"]["n"],
        "serving_false": false,
        "serving_false_pass": serving["false_pass"]["count"],
        "serving_false_fail": serving["false_fail"]["count"],
        "serving_invalid": serving["outcomes"]["INVALID"],
        "quality_n": quality["n"],
        "quality_false": quality["count"],
        "device_hours": result["device_hours"],
    }
    unjudged = null("no trial could be judged")
    spreads = {"serving_sd_log": serving["sd_log"], "noise_floor": serving["noise_floor"]}
    fields = {
        name: unjudged if value is None else measured(value) for name, value in spreads.items()
    }
    if training is not None:
        fields |= {
            f"training_{name}": measured(training[name]) for name in ("sd_log", "runs", "floor")
        }
    values: dict[str, Value] = {
        **{name: measured(value) for name, value in counted.items()},
        **fields,
    }
    return {name: value.to_json() for name, value in values.items()}
