"""From a run's journal to MLflow; it needs no more than mlflow-skinny. Beside it `registry.py`
alone imports mlflow.

Delivery is idempotent: runs are found again by tag before they are made, and metrics carry the
journal's times, so that delivering twice changes nothing. Nothing here runs inside the training
process's step loop.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev
from typing import Any

from pipeline.config.arms import file_name, is_fallback, stage_name
from pipeline.config.redaction import redact_value, without_login
from pipeline.errors import one_line
from pipeline.ledger.charge_sources import (
    PARTS,
    RUN_TAG,
    SO_FAR_HOURS,
    SO_FAR_UNTIL,
    has_ended,
    open_hours,
    outside_causes,
    outside_waste,
    spans,
    stage_device,
    stage_owner,
)
from pipeline.ledger.charges import OWNER
from pipeline.ledger.journal import read_first, read_new
from pipeline.ledger.metrics import BY_KEY, in_seconds, primary_key, row_summary
from pipeline.ledger.records import DELIVERED, read_record, tell
from pipeline.ledger.shapes import (
    ArmAttempt,
    ArtifactRecord,
    ComparisonsLine,
    Dataset,
    Delivered,
    DeliveryState,
    DevicesSeen,
    Event,
    Figure,
    Figures,
    FirstLine,
    ForecastTotal,
    LastLine,
    LedgerRecord,
    Moment,
    OfAttempt,
    Pair,
    Points,
    Row,
    RowLine,
    RunTotals,
    SelftestLine,
    ServingLine,
    StageStarted,
    Started,
    StoredRun,
    Verdict,
    VerdictLine,
)
from pipeline.ledger.values import null
from pipeline.report.waste import advice
from pipeline.store.artifacts import MODEL, write_json
from pipeline.store.locks import lock_at
from pipeline.store.waiting import locked, waiting_for
from pipeline.tracking.sqlite_file import runs_between, sqlite_file
from pipeline.tracking.views import link, set_up

MAX_BATCH, MAX_PARAMS, MAX_TAGS = 1000, 100, 100  # of one log_batch; MLflow's own limits
# characters; MLflow's limits
MAX_PARAM, MAX_TAG, MAX_DESCRIPTION, MAX_DIGEST, MAX_NAME = 6000, 5000, 8000, 36, 250
STATE = "mlflow.json"  # in a run's folder: how far it was delivered
KEPT = ("task", "model.name", "quality.margin", "seed")
"""Parameters of a parent that are read back, or looked for, even where they are the defaults."""
POLICY, CANDIDATE = "policy.", "candidate"  # a gate's parent has all of its policy, no other any
TOLD_ELSEWHERE = ("recipe", "question", "compare", "primary_arm", "tracking.")
"""Settings that a tag or the report has, or that change no figure."""
UNTOLD = (*TOLD_ELSEWHERE, "stages.", POLICY)
"""Settings that the tag `changed` leaves out: also those that are the recipe's own."""
FIRST = ("quality/primary", "compute/device_seconds", "compute/device_hours")
MAX_CHANGED = 500  # characters of that tag
LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` serves
SO_FAR_S = 60.0  # between two notes of what a run took that has not ended


def store_uri(root: Path, declared: str | None) -> str:
    """Return the tracking URI: MLFLOW_TRACKING_URI, else the declared one, else SQLite under
    `root`.
    """
    return (
        os.environ.get("MLFLOW_TRACKING_URI")
        or declared
        or f"sqlite:///{root.resolve() / 'mlflow.db'}"
    )


def declared_uri(setting: str | None) -> str | None:
    """Return the URI to note down for later deliveries; a login in it comes from the environment
    then.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or setting
    return None if uri is None else without_login(uri)


def ui_command(root: Path, declared: str | None = None) -> str:
    """Return the command that opens the MLflow UI on this store."""
    uri = without_login(store_uri(root, declared))
    return f"open {uri}" if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def view_address(run_dir: Path, declared: str | None = None) -> str | None:
    """Return where the UI shows a delivered run's experiment with its core figures; None where that
    is not known.
    """
    known = read_record(run_dir / STATE, DELIVERED, so="its place in MLflow is not known")
    experiment = None if known is None else known.get("experiment")
    if experiment is None:
        return None
    uri = without_login(store_uri(run_dir.parent.parent, declared))
    return link(uri.rstrip("/") if uri.startswith("http") else LOCAL, experiment)


def deliver(run_dir: Path, *, look_again: bool = False) -> int:
    """Deliver what MLflow has not had of a run; return the number of events delivered.

    Args:
        run_dir: The run's folder, with its journal.
        look_again: Ask the store for a run that was delivered whole, too, and fill a store that has
            lost it.

    Raises:
        mlflow.exceptions.MlflowException: If the store cannot be reached, or refuses.
    """
    journal = run_dir / "journal.jsonl"
    # A run's writer and `pipeline sync` may meet here.
    with (
        locked(run_dir / ".mlflow.lock", f"another process that delivers {run_dir.name}"),
        ExitStack() as stack,
    ):
        start = read_first(journal)
        if start is None or start["e"] != "run_start":
            return 0
        known = read_record(run_dir / STATE, DELIVERED, so="all of the run is delivered again")
        state = _state(known)
        events, offset = read_new(journal, state["offset"])
        dead = _last(events, state)["e"] != "run_end" and _is_free(run_dir / ".lock")
        # a run writes its end before it lets go, and another may have taken it up: look again
        if dead:
            more, offset = read_new(journal, offset)
            events += more
            dead = _last(events, state)["e"] != "run_end" and _is_free(run_dir / ".lock")
        last = _last(events, state)
        if not events and not (dead and not state["dead"]) and not look_again:
            return 0
        root = run_dir.parent.parent
        uri = store_uri(root, start["tracking_uri"])
        # Processes that open a fresh store race its migrations.
        stack.enter_context(
            locked(root / ".mlflow.lock", f"another process that writes to the store of {root}")
        )
        with waiting_for(f"MLflow at {without_login(uri)} to answer"):
            client, experiment = _open(root, uri, start)
        if not uri.startswith("sqlite"):
            stack.close()  # a server orders its writers itself
        if state["parent"] is not None:
            stage = _lifecycle(client, state["parent"])
            if stage == "deleted" and not events:
                return 0  # what was thrown away in the UI stays away
            if stage != "active":  # a store deleted or changed since: it gets all of the run
                state = _state()
                events, offset = read_new(journal, 0)
        stack.enter_context(waiting_for(f"MLflow at {without_login(uri)} to take {run_dir.name}"))
        state["experiment"] = experiment
        delivery = _Delivery(client, experiment, run_dir, start, state)
        delivery.events(events)
        if dead:
            delivery.end_open_runs("KILLED", last["t"])
        delivery.note_so_far(events, last, dead=dead)
        write_json(
            run_dir / STATE, {**delivery.state, "offset": offset, "last": last, "dead": dead}
        )
        return len(events)


def _last(events: list[Event], state: DeliveryState) -> Moment:
    """Return the last line of a journal: of its first one, `deliver` has seen that it is there."""
    if events:
        return {"e": events[-1]["e"], "t": events[-1]["t"]}
    assert state["last"] is not None, "nothing new: so it was delivered before"
    return state["last"]


def _state(known: Delivered | None = None) -> DeliveryState:
    """Return how far a run was delivered, with nothing left out; None: not at all."""
    known = known or {"offset": 0, "last": None}
    return {
        "offset": known["offset"],
        "last": known["last"],
        "dead": known.get("dead", False),
        "parent": known.get("parent"),
        "children": known.get("children", {}),
        "arms": known.get("arms", {}),
        "spans": known.get("spans", []),
        "ended": known.get("ended", False),
        "noted": known.get("noted"),
        "experiment": known.get("experiment"),
    }


def _is_free(lock: Path) -> bool:
    """Tell whether no process holds the lock of a run."""
    from filelock import Timeout

    try:
        with lock_at(lock).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _open(root: Path, uri: str, start: FirstLine) -> tuple[Any, str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    if os.environ.get("MLFLOW_EXPERIMENT_ID"):
        found = client.get_experiment(os.environ["MLFLOW_EXPERIMENT_ID"])
    else:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or start["experiment"]
        found = client.get_experiment_by_name(name)
        if found is None:
            where = (root / "artifacts").resolve().as_uri() if uri.startswith("sqlite") else None
            found = client.get_experiment(client.create_experiment(name, artifact_location=where))
    set_up(client, found)
    return client, found.experiment_id


def _lifecycle(client: Any, run: str) -> str | None:
    """Return `active`, `deleted`, or None where the store does not know the run."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


@dataclass(slots=True)
class _Delivery:
    """One delivery of a run's events. `state` is kept between deliveries."""

    client: Any
    experiment: str
    run_dir: Path
    start: FirstLine
    state: DeliveryState
    parent: str = field(init=False)

    def __post_init__(self) -> None:
        name = self.start["run_id"]
        self.parent = self.state["parent"] or self._run(
            _parent_name(self.start), {RUN_TAG: name}, self.start["t"]
        )
        self.state["parent"] = self.parent

    def events(self, events: list[Event]) -> None:
        """Deliver events: curves first, since a row ends its child."""
        for event in events:
            if event["e"] == "stage_start":
                self._child(event, event["t"])
        for group in _points(events):
            self._curve(self._child(group[0], group[0]["t"]), group)
        handlers: dict[str, Callable[[Any], None]] = {
            "run_start": self._run_start,
            "stage_start": self._stage_start,
            "row": self._row,
            "devices": self._devices,
            "serving": self._serving,
            "comparisons": self._comparisons,
            "verdict": self._verdict,
            "selftest": self._selftest,
            "run_end": self._run_end,
        }
        for event in events:
            if event["e"] in handlers:
                with self._whatever_its_shape(event):
                    handlers[event["e"]](event)

    @contextmanager
    def _whatever_its_shape(self, event: Event) -> Generator[None]:
        """Have a damaged line of the journal, which is said, keep no other from being delivered."""
        try:
            yield
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            problem = f"a line {event['e']!r}: {type(error).__name__}: {error}"
            tell(
                self.run_dir / "journal.jsonl", one_line(problem, 200), "that line is not delivered"
            )

    def end_open_runs(self, status: str, at: float) -> None:
        """Give parent and children that still count as running their end."""
        for run in (*self.state["children"].values(), self.parent):
            if self.client.get_run(run).info.status == "RUNNING":
                self.client.set_terminated(run, status=status, end_time=int(at * 1000))

    def note_so_far(self, events: list[Event], last: Moment, *, dead: bool) -> None:
        """Note what a run took until its last sign of life, for whoever adds up hours before it has
        ended, or after it was killed and never taken up again.
        """
        from mlflow.entities import RunTag

        self.state["spans"] = spans(events, self.state["spans"])
        self.state["ended"] = has_ended(events, before=self.state["ended"])
        wanted = dead or any(event["e"] in ("run_start", "row") for event in events)
        wanted = wanted or last["t"] - (self.state["noted"] or 0.0) >= SO_FAR_S
        if self.state["ended"] or not self.state["spans"] or not wanted:
            return
        tags = {
            SO_FAR_HOURS: repr(open_hours(self.state["spans"])),
            SO_FAR_UNTIL: str(int(last["t"] * 1000)),
        }
        self.client.log_batch(self.parent, tags=[RunTag(key, value) for key, value in tags.items()])
        self.state["noted"] = last["t"]

    # -- runs -------------------------------------------------------------------------------------

    def _run(self, name: str, tags: dict[str, str], at: float) -> str:
        """Return the MLflow run with this tag, made if there is none."""
        found = self._find(tags[RUN_TAG])
        if found is not None:
            return found
        all_tags = {**tags, "mlflow.runName": name}
        return self.client.create_run(
            self.experiment, start_time=int(at * 1000), tags=all_tags
        ).info.run_id

    def _find(self, tag: str) -> str | None:
        found = self.client.search_runs(
            [self.experiment], f"tags.`{RUN_TAG}` = '{tag}'", max_results=1
        )
        return found[0].info.run_id if found else None

    def _child(self, attempt: OfAttempt, at: float, elsewhere: str | None = None) -> str:
        """Return the child of an attempt at a stage, begun at `at`."""
        name = _child_name(attempt, elsewhere)
        if name not in self.state["children"]:
            tags = {
                RUN_TAG: f"{self.start['run_id']}/{name}",
                "mlflow.parentRunId": self.parent,
                "run": self.start["run_id"].rpartition("-")[2],
                "arm": attempt["arm"],
                **_owner(self.start),
            }
            shown = _shown_name(self.start["recipe"], attempt, elsewhere)
            self.state["children"][name] = self._run(shown, tags, at)
        return self.state["children"][name]

    # -- events -----------------------------------------------------------------------------------

    def _run_start(self, event: FirstLine) -> None:
        self.client.update_run(self.parent, status="RUNNING")
        if event["attempt"] == 1:  # parameters cannot change, and the next attempt's are the same
            self._settings(self.parent, _parent_params(event))
            self._datasets(self.parent, event["datasets"])
        self._tags(
            self.parent,
            {
                **event.get("environment", {}),
                **event["tags"],
                **_owner(event),
                "question": event["question"],
                "changed": _changed(event),
            },
        )

    def _devices(self, event: DevicesSeen) -> None:
        """Say what a metered command runs on while no row does."""
        self._tags(self.parent, {"device": event["used"]["name"]})

    def _stage_start(self, event: StageStarted) -> None:
        self._settings(
            self._child(event, event["t"]),
            {**event["params"], "type": event["type"], "seed": event["seed"]},
        )

    def _row(self, event: RowLine) -> None:
        """Log a stage attempt: its figures, a tag for every null, its model's place and digest, its
        status.
        """
        row = event["row"]
        elsewhere = row["reused"] if row["artifact"] is None else None
        child, figures = self._child(row, event["t"], elsewhere), row_summary(row)
        artifact = row["artifact"]
        model = None
        if artifact is not None and artifact["kind"] == MODEL:
            model = self._model(child, row, artifact)
        read_on = self._read_on() if row["quality"] else None
        if read_on is not None:
            self._datasets(child, [read_on])
        self._values(child, figures, event["t"], None if row["reused"] else model)
        tags = {name: row[name] for name in ("type", "status", "why", "reused")}
        tags |= {"device": stage_device(row), "cost.currency": row["ledger"]["cost"]["currency"]}
        tags |= {} if row["reused"] else stage_owner(row)
        if row["reused"]:
            tags["reused.mlflow_run"] = self._find(f"{row['reused']}/{_child_name(row)}")
        tags |= {"waste": "; ".join(advice(row)), **_doubts(row["ledger"])}
        key = primary_key([row["quality"]])
        if key is not None:
            tags["quality_key"] = key
            self._tags(self.parent, {"quality_key": key})
        if artifact is not None:
            kind = artifact["kind"]
            tags |= {f"{kind}.path": artifact["path"], f"{kind}.digest": artifact["digest"]}
        self._tags(child, tags)
        status = "FINISHED" if row["status"] == "SKIPPED" else row["status"]
        self.client.set_terminated(child, status=status, end_time=int(event["t"] * 1000))
        core = {
            key: value["value"]
            for key, value in figures.items()
            if key in BY_KEY and BY_KEY[key].core
        }
        finished = row["status"] == "FINISHED" and not is_fallback(row["arm"])
        self.state["arms"].setdefault(stage_name(row["arm"]), {})[_child_name(row, elsewhere)] = {
            "seed": row["seed"],
            "finished": finished,
            "core": core,
            "model": model,
        }

    def _serving(self, event: ServingLine) -> None:
        for row in event["rows"]:
            values = {
                f"serving/{name}": value
                for name, value in row["serving"].items()
                if f"serving/{name}" in BY_KEY
            }
            attempts = self.state["arms"].get(stage_name(row["arm"]), {})
            model = (
                attempts[_child_name(row)].get("model") if _child_name(row) in attempts else None
            )
            self._values(self._child(row, event["t"]), values, event["t"], model)

    def _comparisons(self, event: ComparisonsLine) -> None:
        self._of_arms(
            self.start["params"].get("primary_arm"), event["t"]
        )  # the UI's list begins so
        self._values(self.parent, dict(_savings(event["comparisons"])), event["t"])
        judged = [
            (pair["arm"], speedup)
            for pair in event["comparisons"]
            if (speedup := pair["speedup"]) is not None
        ]
        useless = list(dict.fromkeys(arm for arm, speedup in judged if speedup["no_speedup"]))
        self._tags(self.parent, {"no_speedup": ", ".join(useless) or ("none" if judged else "")})

    def _verdict(self, event: VerdictLine) -> None:
        """Tag the run with a gate's verdict, and log what each criterion read."""
        verdict = event["verdict"]
        sides = {
            f"{side}.digest": (verdict[side] or {}).get("digest")
            for side in ("candidate", "baseline")
        }
        model = (verdict["baseline"] or {}).get("model") or verdict["candidate"]["model"]
        tags = {
            **{name: verdict[name] for name in ("verdict", "line", "key", "look", "created")},
            **sides,
            "sha256": event["sha256"],
            "model": model,
            "policy": verdict["policy"]["name"],
            "policy.sha256": verdict["policy"]["sha256"],
            "recorded": verdict.get("recorded"),
        }
        self._tags(self.parent, {f"gate.{name}": value for name, value in tags.items()})
        self._values(self.parent, dict(_criteria(verdict)), event["t"])

    def _selftest(self, event: SelftestLine) -> None:
        """Tag the run with what a self-test was made of and on, and log what it came to
        (`runs/selftest.py`).
        """
        self._tags(
            self.parent, {f"selftest.{name}": value for name, value in event["tags"].items()}
        )
        self._values(
            self.parent,
            {f"selftest/{name}": value for name, value in event["values"].items()},
            event["t"],
        )

    def _run_end(self, event: LastLine) -> None:
        """End the parent: core keys of the primary arm, run totals, report, true status."""
        hours = event["run"]["device_hours"]
        values = {
            "compute/run_device_hours": hours["total"],
            "compute/run_device_seconds": in_seconds(hours["total"]),
            "compute/run_spent_device_hours": event["run"]["spent"],
            "compute/run_reused_device_hours": event["run"]["reused"],
            **_outside(event["run"]),
            **_foreseen(event.get("forecast")),
        }
        self._of_arms(event["primary_arm"], event["t"])
        self._values(self.parent, values, event["t"])
        description = event["description"][:MAX_DESCRIPTION]
        self._tags(self.parent, {"why": event["why"], "primary_arm": event["primary_arm"]})
        # of an earlier attempt
        passed = [*([] if event["why"] else ["why"]), SO_FAR_HOURS, SO_FAR_UNTIL]
        for name in set(passed) & set(self.client.get_run(self.parent).data.tags):
            self.client.delete_tag(self.parent, name)
        self.client.set_tag(self.parent, "mlflow.note.content", description)
        for name in event["files"]:
            if (self.run_dir / name).is_file():
                folder = Path(name).parent
                below = None if folder == Path() else str(folder)
                self.client.log_artifact(self.parent, str(self.run_dir / name), below)
        self.client.set_terminated(
            self.parent, status=event["status"], end_time=int(event["t"] * 1000)
        )
        self.end_open_runs("FAILED" if event["status"] == "FAILED" else "KILLED", event["t"])

    def _of_arms(self, primary_arm: str | None, at: float) -> None:
        """Give the parent the core figures and the models of its primary arm, and what each arm is
        read by.
        """
        primary = list(self.state["arms"].get(primary_arm or "", {}).values())
        core = {**_core(primary), **_spread(primary), **_by_arm(self.state["arms"])}
        self._values(self.parent, {key: derived(value) for key, value in core.items()}, at)
        made = {each.get("model") for each in primary if each["finished"]}
        self._link(self.parent, {model for model in made if model is not None})

    # -- what runs hold ---------------------------------------------------------------------------

    def _curve(self, run: str, events: list[Points]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(f"train/{name}", value, int(event["t"] * 1000), event["step"])
            for event in events
            for name, value in event["values"].items()
            if value is not None
        ]
        for first in range(0, len(metrics), MAX_BATCH):
            self.client.log_batch(run, metrics=metrics[first : first + MAX_BATCH])

    def _settings(self, run: str, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [
            Param(_name(key), redact_value(key, str(value))[:MAX_PARAM])
            for key, value in settings.items()
        ]
        for first in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(run, params=params[first : first + MAX_PARAMS])

    def _tags(self, run: str, tags: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        said = [
            RunTag(_name(key), redact_value(key, str(value))[:MAX_TAG])
            for key, value in tags.items()
            if value
        ]
        for first in range(0, len(said), MAX_TAGS):
            self.client.log_batch(run, tags=said[first : first + MAX_TAGS])

    def _read_on(self) -> Dataset | None:
        """Return the split that quality is read on."""
        return next((each for each in self.start["datasets"] if each["split"] == "test"), None)

    def _datasets(self, run: str, datasets: list[Dataset]) -> None:
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    _dataset_name(item),
                    item["digest"][:MAX_DIGEST],
                    "local",
                    json.dumps({"uri": item["name"]}),
                    profile=json.dumps({"num_documents": item["num_documents"]}),
                ),
                tags=[InputTag("mlflow.data.context", item["split"])],
            )
            for item in datasets
        ]
        self.client.log_inputs(run, datasets=inputs)

    def _model(self, run: str, row: Row, artifact: ArtifactRecord) -> str | None:
        """Show the artifact among MLflow's models, as an output of its run; the files stay where
        they are. Return its id there, or None.

        A reused artifact is the model of the run that made it, and not shown twice.
        """
        from mlflow.exceptions import MlflowException

        path, digest = artifact["path"], artifact["digest"]
        try:
            known = self.client.search_logged_models(
                [self.experiment], filter_string=f"tags.digest = '{digest}'"
            )
            own = (model for model in known if row["reused"] or model.source_run_id == run)
            model = next(own, None)
            if model is None:
                name = f"{file_name(row['arm'])}-{digest[:8]}"
                model = self.client.create_logged_model(
                    self.experiment,
                    name=name,
                    source_run_id=run,
                    model_type=row["type"],
                    tags={
                        "mlflow.model.isExternal": "true",
                        "path": path,
                        "digest": digest,
                        "arm": row["arm"],
                        "seed": str(row["seed"]),
                        "recipe": self.start["recipe"],
                    },
                )
            self.client.finalize_logged_model(model.model_id, "READY")
            self._link(run, {model.model_id})
            return model.model_id
        except (MlflowException, NotImplementedError) as error:
            if not is_unknown(error):
                raise
            self.client.set_tag(run, "model.linked", "no: this MLflow server has no logged models")
            return None

    def _link(self, run: str, models: set[str]) -> None:
        """Make models outputs of a run, those that are not."""
        from mlflow.entities import LoggedModelOutput

        if not models:
            return
        outputs = self.client.get_run(run).outputs
        had = {output.model_id for output in (outputs.model_outputs if outputs else [])}
        new = [LoggedModelOutput(model, 0) for model in sorted(models - had)]
        if new:
            self.client.log_outputs(run, new)

    def _values(
        self, run: str, values: Mapping[str, Figure], at: float, model: str | None = None
    ) -> None:
        """Log summary figures: once, without a step; a figure that is null is absent, and its tag
        says why.

        Args:
            model: MLflow's id of the model that they are of, too, read on the test split.
        """
        from mlflow.entities import Metric, RunTag

        had = self.client.get_run(run).data
        read_on = self._read_on()
        of_model: dict[str, Any] = {} if model is None else {"model_id": model, "run_id": run}
        if model is not None and read_on is not None:
            of_model["dataset_name"] = _dataset_name(read_on)
            of_model["dataset_digest"] = read_on["digest"][:MAX_DIGEST]
        metrics = [
            Metric(key, value["value"], int(at * 1000), 0, **(of_model if _of_model(key) else {}))
            for key, value in values.items()
            if value["value"] is not None and had.metrics.get(key) != value["value"]
        ]
        metrics.sort(key=lambda metric: _place(metric.key))
        nulls = {
            f"null.{key}": value["why_missing"]
            for key, value in values.items()
            if value["value"] is None
        }
        tags = [RunTag(_name(key), (why or "")[:MAX_TAG]) for key, why in nulls.items()]
        for first in range(0, max(len(metrics), len(tags)), MAX_TAGS):
            part = slice(first, first + MAX_TAGS)
            self.client.log_batch(run, metrics=metrics[part], tags=tags[part])
        for metric in metrics:
            if f"null.{metric.key}" in had.tags:  # an earlier attempt did not have it
                self.client.delete_tag(run, f"null.{metric.key}")


def _child_name(attempt: OfAttempt, elsewhere: str | None = None) -> str:
    """Return a child's name: the arm, with what tells it from the arm's other children.

    Args:
        elsewhere: The run that did the work, where it led to this run's own row.
    """
    number = f" attempt {attempt['attempt']}" if attempt["attempt"] > 1 else ""
    name = (
        f"{attempt['arm']} seed {attempt['seed']}{number}"
        if attempt["seed"] or number
        else attempt["arm"]
    )
    return name if elsewhere is None else f"{name} of {elsewhere}"


def _parent_name(start: FirstLine) -> str:
    """Return what the UI calls a run: its recipe, the arm that it is about, and the end of its id.

    Names are for readers; a run is found by its tag.
    """
    arm = start["params"].get("primary_arm")
    about = f"{start['recipe']}/{arm}" if arm else start["recipe"]
    return f"{about} {start['run_id'].rpartition('-')[2]}"[:MAX_NAME]


def _shown_name(recipe: str, attempt: OfAttempt, elsewhere: str | None) -> str:
    """Return what the UI calls a stage attempt: recipe, arm and seed, and what else tells it from
    the arm's others.
    """
    number = f" attempt {attempt['attempt']}" if attempt["attempt"] > 1 else ""
    of = "" if elsewhere is None else f" of {elsewhere.rpartition('-')[2]}"
    return f"{recipe}/{attempt['arm']} s{attempt['seed']}{number}{of}"[:MAX_NAME]


def _parent_params(start: FirstLine) -> dict[str, Any]:
    """Return the settings that a parent shows: those that differ from their defaults, and those
    that are read back. All of them are in config.json; a journal of an older release does not tell.
    """
    params = start["params"]
    if "changed" not in start:
        return params
    is_gate = params.get(CANDIDATE) is not None
    kept = {*start["changed"], *KEPT}
    return {
        key: value
        for key, value in params.items()
        if (is_gate if key.startswith(POLICY) else key in kept)
        and not key.startswith(TOLD_ELSEWHERE)
    }


def _changed(start: FirstLine) -> str:
    """Return what was asked for beside the recipe's own, in one line."""
    names = (name for name in start.get("changed", ()) if not name.startswith(UNTOLD))
    said = ", ".join(
        f"{name}={redact_value(name, str(start['params'].get(name)))}" for name in names
    )
    return said[:MAX_CHANGED]


def _dataset_name(item: Dataset) -> str:
    """Return a split's name: MLflow takes splits of one name and digest for one data set."""
    return f"{item['name'][: MAX_NAME - 20]} {item['split']}"


def _place(key: str) -> int:
    """Return where a figure stands among others: the UI lists them as they came."""
    return FIRST.index(key) if key in FIRST else len(FIRST)


def _of_model(key: str) -> bool:
    """Tell whether a figure is one of the model, and not of the run that made it."""
    return key.startswith(("quality/", "serving/")) or (key in BY_KEY and BY_KEY[key].core)


def _doubts(record: LedgerRecord) -> dict[str, str]:
    """Return what speaks against a row's figures, or explains them."""
    conditions = record.get("conditions", {})
    return {
        "throttled_by": ", ".join(conditions.get("throttle_reasons", [])),
        "truncated": "True" if conditions.get("truncated") else "",
        "meter_problems": "; ".join(record["meter_problems"]),
        "meter_valid": "" if record["meter_valid"] else "False",
    }


def _owner(start: Started) -> dict[str, str]:
    """Return whose a run is, for its tags and those of its children."""
    named = {
        **start["tags"],
        "model_name": start["params"].get("model.name"),
        "recipe": start["recipe"],
    }
    return {name: str(named[name])[:MAX_TAG] for name in OWNER if named.get(name)}


def derived(value: float) -> Figure:
    """Return a figure that is computed from others."""
    return {"value": value, "provenance": "derived", "why_missing": None}


def _outside(run: RunTotals) -> Figures:
    """Return what a run took outside of stages, what of it was waste, and the cost of its model if
    that is known.
    """
    found = {f"compute/run_{part}_device_hours": run["device_hours"][part] for part in PARTS}
    found |= {
        f"compute/run_{part}_wasted_device_hours": derived(outside_waste(run, part))
        for part in PARTS
    }
    found |= {
        f"compute/run_wasted_{cause}_device_hours": derived(hours)
        for cause, hours in outside_causes(run).items()
    }
    if "allocated" in run:
        found["compute/run_allocated_gpu_hours"] = run["allocated"]["gpu_hours"]
    if "cost" in run:  # a run of an older release has none
        found["cost/run_amount"] = run["cost"]["amount"]
    compared = run.get("compare_conditions", {})
    for name in ("foreign_load", "throttle_share"):
        if name in compared:
            found[f"compute/run_compare_{name}"] = compared[name]
    converged = run.get("per_converged_model")
    if converged is not None:
        found["compute/per_converged_model_device_hours"] = converged["device_hours"]
        found["cost/per_converged_model"] = converged["amount"]
    return found


def _foreseen(total: ForecastTotal | None) -> Figures:
    """Return what a run was expected to take and came to; nothing where nobody asked."""
    if total is None:
        return {}
    key, expected = "forecast/device_hours", total["expected"]
    if expected is None:
        return {key: null(total["why_missing"] or "not known").to_json()}
    ends = {f"{key}_{end}": derived(expected[end]) for end in ("low", "high")}
    came_to = (
        null("the run did not finish, or took a part over").to_json()
        if total["actual"] is None
        else derived(total["actual"])
    )
    estimated: Figure = {**derived(expected["value"]), "provenance": "estimated"}
    return {key: estimated, **ends, "forecast/actual_device_hours": came_to}


def _name(key: str) -> str:
    """Return a key with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:MAX_NAME]


def is_unknown(error: Exception) -> bool:
    """Tell whether a server from before logged models does not know what it was asked for."""
    return (
        isinstance(error, NotImplementedError)
        or getattr(error, "error_code", None) == "ENDPOINT_NOT_FOUND"
    )


def _points(events: list[Event]) -> Iterator[list[Points]]:
    """Group curve points by the child they belong to."""
    groups: dict[str, list[Points]] = {}
    for event in events:
        if event["e"] == "points":
            groups.setdefault(_child_name(event), []).append(event)
    yield from groups.values()


def _core(attempts: list[ArmAttempt]) -> dict[str, float]:
    """Return an arm's core figures: hours of all its attempts, quality of the finished one; the
    mean over seeds.
    """
    seeds: dict[int, dict[str, float | None]] = {}
    for attempt in (attempt for attempt in attempts if attempt["finished"]):
        seeds[attempt["seed"]] = dict(attempt["core"])
    for seed, core in seeds.items():
        for key in (key for key in core if key.startswith("compute/")):
            core[key] = sum(
                attempt["core"].get(key) or 0.0 for attempt in attempts if attempt["seed"] == seed
            )
    columns = {
        key: [core.get(key) for core in seeds.values()] for key in next(iter(seeds.values()), {})
    }
    return {
        key: sum(have) / len(have)
        for key, column in columns.items()
        if len(have := [value for value in column if value is not None]) == len(column)
    }


def _seeds(attempts: list[ArmAttempt], key: str) -> list[float]:
    """Return a figure of an arm's finished attempts, seed by seed; hours are of all attempts."""
    of_each = {each["seed"] for each in attempts if each["finished"]}
    cores = (_core([each for each in attempts if each["seed"] == seed]) for seed in of_each)
    return [core[key] for core in cores if key in core]


def _spread(attempts: list[ArmAttempt]) -> dict[str, float]:
    """Return the standard deviations over seeds of what an arm is read by; nothing of one seed."""
    found = {key: _seeds(attempts, key) for key in ("quality/primary", "compute/device_seconds")}
    return {f"{key}_sd": stdev(values) for key, values in found.items() if len(values) > 1}


def _by_arm(arms: Mapping[str, Mapping[str, ArmAttempt]]) -> dict[str, float]:
    """Return quality and device-seconds of each arm, and their spread over seeds: what the parent
    says of the arms that are not its own.
    """
    found: dict[str, float] = {}
    for arm, by_name in arms.items():
        attempts = list(by_name.values())
        core, spread = _core(attempts), _spread(attempts)
        for section, key in (("quality", "quality/primary"), ("compute", "compute/device_seconds")):
            if key in core:
                found[f"{section}/arms/{_name(arm)}"] = core[key]
            if f"{key}_sd" in spread:
                found[f"{section}/arms/{_name(arm)}_sd"] = spread[f"{key}_sd"]
    return found


def _criteria(verdict: Verdict) -> Iterator[tuple[str, Figure]]:
    """Yield what criteria read, with the ends of their intervals; what is INVALID has none that
    means anything.
    """
    for each in verdict["criteria"]:
        yield f"gate/{each['name']}", each["value"]
        ends = () if each["outcome"] == "INVALID" else each["ci"] or ()
        for end, bound in zip(("low", "high"), ends, strict=False):
            yield f"gate/{each['name']}_{end}", derived(bound)


def _savings(comparisons: list[Pair]) -> Iterator[tuple[str, Figure]]:
    for pair in comparisons:
        prefix = f"savings/{pair['arm']}_vs_{pair['base']}"
        for name in ("training", "serving", "payback"):
            saving = pair[name]
            if saving is not None:
                yield f"{prefix}/{name}", saving
        if pair["speedup"] is not None:
            yield f"{prefix}/memory", pair["speedup"]["memory"]
        for key, value in pair["quality"].items():
            yield f"{prefix}/{key}", value


def store_errors() -> tuple[type[Exception], ...]:
    """Return what a store raises that is down, refuses, or whose driver is not installed
    (PostgreSQL's, MySQL's).
    """
    from google.protobuf.json_format import ParseError
    from mlflow.exceptions import MlflowException

    try:
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:  # mlflow-skinny has servers only
        return (MlflowException, ParseError, OSError, ImportError)
    return (MlflowException, ParseError, SQLAlchemyError, OSError, ImportError)


def is_down(error: Exception) -> bool:
    """Tell a store that cannot be reached from one that answers and refuses."""
    from google.protobuf.json_format import ParseError

    if isinstance(error, ParseError):  # it is up, and answers nonsense
        return False
    return getattr(error, "error_code", "INTERNAL_ERROR") in (
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
    )


def import_mlflow() -> None:
    """Import all that a delivery needs; mlflow-skinny has no SQL store, and then no SQLite store is
    written to.
    """
    from importlib import import_module

    quiet()
    for name in (
        "mlflow",
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.store.model_registry.sqlalchemy_store",
    ):
        with suppress(ImportError):
            import_module(name)


def quiet() -> None:
    """Keep MLflow from blocking for minutes on a dead server, and from chattering."""
    import logging

    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)


def stored_runs(uri: str, start_ms: int, end_ms: int) -> tuple[list[StoredRun], int]:
    """Return the pipeline's runs that a period touches, each with all its stage attempts, and how
    many others it had.

    Runs that were deleted in the UI are among them: spent is spent. Each stands there once.

    Args:
        uri: Of the store.
        start_ms: UTC, milliseconds since 1970; runs that ended before are left out.
        end_ms: Runs that began then or later are left out.
    """
    file, found = sqlite_file(uri), None
    if file is not None:
        with suppress(sqlite3.Error):
            found = runs_between(file, start_ms, end_ms)
    found = _asked_for(uri, start_ms, end_ms) if found is None else found
    own = [run for run in found if RUN_TAG in run["tags"]]
    # of a run that was deleted and delivered anew, the latter
    own.sort(key=lambda run: run["active"])
    return list({run["tags"][RUN_TAG]: run for run in own}.values()), len(found) - len(own)


def _asked_for(uri: str, start_ms: int, end_ms: int) -> list[StoredRun]:
    """Return what `runs_between` does, of any store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    began = f"attributes.start_time < {end_ms}"
    found = [
        *_search(client, f"{began} AND attributes.end_time >= {start_ms}"),
        *_search(client, f"{began} AND attributes.status = 'RUNNING'"),
    ]
    names = {run["tags"].get(RUN_TAG, "/") for run in found if run["start_ms"] < start_ms}
    for name in sorted(name for name in names if "/" not in name):
        found += _search(client, f"tags.`{RUN_TAG}` LIKE '{name}/%'")
    return list({run["id"]: run for run in found}.values())


def _search(client: Any, query: str) -> Iterator[StoredRun]:
    """Yield runs of all experiments, page by page."""
    from mlflow.entities import ViewType

    experiments = [
        item.experiment_id for item in pages(client.search_experiments, view_type=ViewType.ALL)
    ]
    for first in range(0, len(experiments), MAX_PARAMS):
        part = experiments[first : first + MAX_PARAMS]
        for run in pages(client.search_runs, part, query, run_view_type=ViewType.ALL):
            yield stored(run)


def stored(run: Any) -> StoredRun:
    """Return a run of MLflow's client as this project reads it."""
    info, data = run.info, run.data
    return {
        "id": info.run_id,
        "status": info.status,
        "start_ms": info.start_time,
        "end_ms": info.end_time,
        "active": info.lifecycle_stage == "active",
        "metrics": dict(data.metrics),
        "params": dict(data.params),
        "tags": dict(data.tags),
    }


def pages(search: Callable[..., Any], *args: Any, **more: Any) -> Iterator[Any]:
    """Yield what one of the client's searches finds, page by page."""
    token = None
    while True:
        page = search(*args, max_results=MAX_BATCH, page_token=token, **more)
        yield from page
        token = page.token
        if not token:
            return
