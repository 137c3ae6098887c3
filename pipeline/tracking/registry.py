"""The gate's side of MLflow's model registry: which artifact a version is, and who may move the
alias `champion`.

A version of ours says in its tags where its artifact lies: `artifact.digest`, `artifact.url`,
`artifact.path`.

MLflow sets an alias whatever it pointed to before. `promote` therefore moves it under a lock of its
own, made of two things that any MLflow server does atomically, since names of registered models are
unique:

- create a registered model `<name>.promotion`, with its holder in a tag: who creates it holds the
  lock;
- rename it to `<name>.promotion.<holder>`: who does that has taken a dead holder's lock away, and
  nobody does it twice.

A holder gives up `MARGIN_S` before its lock counts as dead, and whoever waits measures that time by
its own clock, from when it first saw the holder, so that clocks of two machines are compared only
where they differ by `LOST_S`.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pipeline.config.redaction import redact_value, without_login
from pipeline.errors import UserError
from pipeline.ledger.charge_sources import RUN_TAG
from pipeline.ledger.records import parsed
from pipeline.ledger.shapes import StoredRun, Verdict
from pipeline.ledger.values import from_schema_1
from pipeline.store.artifacts import MODEL
from pipeline.store.waiting import locked
from pipeline.tracking.deliver import (
    MAX_NAME,
    MAX_TAG,
    is_down,
    is_unknown,
    pages,
    quiet,
    store_errors,
    stored,
)
from pipeline.tracking.sqlite_file import runs_tagged, sqlite_file, versions_tagged

if TYPE_CHECKING:
    from pipeline.compare.history import Judged

Tags: TypeAlias = Mapping[str, str | float | None]
"""Of a version, by name; without a value, one is left out."""
CHAMPION = "champion"
GATE, SELFTEST = "gate", "selftest"  # what tags and figures of verdicts and self-tests begin with
VERDICT = f"{GATE}.verdict"  # tag of a run that came to one
DIGEST, URL, PATH = "artifact.digest", "artifact.url", "artifact.path"  # tags of a version
VERSIONS = "mlflow.modelVersions"  # MLflow's tag of a logged model
LOCK, HOLDER = ".promotion", "promotion.holder"
# after which a lock counts as dead; a promotion takes some ten calls, 0.02 s each on SQLite
LOCK_S = 120.0
MARGIN_S = 40.0  # of LOCK_S that the last call is given: it is tried twice for 5 s
LOST_S = 900.0  # a lock this old is dead by any clock
POLL_S = 0.5
PATIENCE_S = 300.0  # how long a promotion waits for others
# how long others may hold a SQLite store: a run's writer has the lowest priority on a busy machine
OPENING_S = 300.0
CONNECT_S = 5.0
MAX_TEXT = 1000  # characters of an error that are looked at: it may hold all that a server answered
MAX_MODEL = 200  # characters of a registered model's name: MLflow's 256 less those of a lock
THERE = ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
"""What creating a model that exists gives: MLflow looks at it to say so, and it may be gone again
by then.
"""
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a registered model, and the artifact that it is.

    Attributes:
        version: Its number, as MLflow writes it.
        url: Of the artifact, where it was uploaded; empty where it was not.
        path: Where the artifact lay on the machine that registered it.
        run_id: MLflow's, of the run that made it; empty where it is not known.
    """

    name: str
    version: str
    digest: str
    url: str
    path: str
    run_id: str
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """The artifact that a promotion registers.

    Attributes:
        url: As `remote.upload` returned it, or empty where there is no `store.url`.
        path: Of its folder.
        run_id: MLflow's, of the run that made it, where that is known.
        model_id: MLflow's, of the logged model that it is.
    """

    digest: str
    url: str
    path: str
    run_id: str | None = None
    model_id: str | None = None


class NotPromoted(Exception):
    """The champion is another than the one the candidate was compared with, or another gate is at
    work.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# -- reading --------------------------------------------------------------------------------------


def resolve_version(
    uri: str,
    name: str,
    *,
    version: str | int | None = None,
    alias: str | None = None,
    key: str = "candidate",
) -> Version | None:
    """Return a version by its number or alias; None where the registered model or the alias does
    not exist.

    Args:
        uri: Of the MLflow store. A SQLite file that is not there yet holds no models, and is not
            made.
        key: The setting at fault, where it is not the store.

    Raises:
        UserError: If the store cannot be reached, the number does not exist, or the version is none
            of ours.
    """
    assert (version is None) != (alias is None)
    check_name(name, key)
    _check_which(version, alias, key)
    if is_empty(uri):
        return None
    with _asking(uri):
        client = _open(uri)
        model = _had(client.get_registered_model, name)
        number = (
            None
            if model is None
            else str(version)
            if version is not None
            else model.aliases.get(alias)
        )
        if number is None:
            return None
        found = _had(client.get_model_version, name, str(number))
    if found is None:
        raise UserError(
            key,
            f"{name} has no version {number}",
            f"see its versions in MLflow at {without_login(uri)}",
        )
    return _version(found, key)


def run_artifact(uri: str, run_id: str, *, key: str = "candidate") -> tuple[Path, str, str]:
    """Return path and digest of the model that an MLflow run stands for, and the pipeline's id of
    its run.

    A stage attempt stands for its own model; a whole run for that of its primary arm's finished
    attempt, of the first seed. The path is that of the machine it ran on.

    Raises:
        UserError: If there is no such run, it is none of ours, or made no model; or the store
            cannot be reached.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", run_id):
        raise UserError(
            key, f"{run_id[:80]!r} is no run id of MLflow", "give its 32 hex characters"
        )
    if is_empty(uri):
        raise _no_run(uri, run_id, key)
    with _asking(uri):
        client = _open(uri)
        run = _had(client.get_run, run_id)
        if run is None or run.info.lifecycle_stage != "active":
            raise _no_run(uri, run_id, key)
        name, is_child, _ = run.data.tags.get(RUN_TAG, "").partition("/")
        if not name:
            raise UserError(
                key, f"MLflow's run {run_id} was not written by this pipeline", "name one that was"
            )
        made = run if is_child else _primary(client, run)
    tags: dict[str, str] = {} if made is None else made.data.tags
    path, digest = tags.get(f"{MODEL}.path", ""), tags.get(f"{MODEL}.digest", "")
    if not path or not re.fullmatch(r"[0-9a-f]{32}", digest):
        raise UserError(
            key,
            f"MLflow's run {run_id} ({name}) made no model",
            "name a run that finished with one",
        )
    return Path(path), digest, name


def _primary(client: Any, parent: Any) -> Any | None:
    """Return the finished attempt of a run's primary arm that made its model: the first seed's, its
    last attempt.
    """
    arm = parent.data.tags.get("primary_arm")
    if not arm:
        return None
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' AND attributes.status = 'FINISHED'"
    children = pages(client.search_runs, [parent.info.experiment_id], query)
    named = re.compile(rf"[^/]*/{re.escape(arm)}(?: seed (\d+)(?: attempt (\d+))?)?")
    found = [
        (int(match[1] or 0), -int(match[2] or 1), child)
        for child in children
        if (match := named.fullmatch(child.data.tags.get(RUN_TAG, "")))
        and f"{MODEL}.digest" in child.data.tags
    ]
    return min(found, key=lambda each: each[:2])[2] if found else None


def _no_run(uri: str, run_id: str, key: str) -> UserError:
    return UserError(
        key, f"MLflow at {without_login(uri)} has no run {run_id}", "check tracking.uri and the id"
    )


def _had(ask: Callable[..., Any], *which: str) -> Any | None:
    """Return what a store has under a name, or None where it says that it has not.

    Only MLflow says RESOURCE_DOES_NOT_EXIST, a proxy's 404 is another. MLflow's client takes an
    empty answer of anybody for an object without a name, which must not read as a model without a
    champion.

    Raises:
        MlflowException: If it says anything else.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = ask(*which)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if which[0] != (found.info.run_id if hasattr(found, "info") else found.name):
        raise MlflowException("what answers there is no MLflow")
    return found


def _champion(client: Any, name: str) -> str | None:
    """Return the number of the version that is champion."""
    model = _had(client.get_registered_model, name)
    number = None if model is None else model.aliases.get(CHAMPION)
    return None if number is None else str(number)


def _version(found: Any, key: str) -> Version:
    tags: dict[str, str] = dict(found.tags)
    digest = tags.get(DIGEST, "")
    if not re.fullmatch(r"[0-9a-f]{32}", digest):
        problem = (
            f"version {found.version} of {found.name} has no tag {DIGEST} with an artifact's digest"
        )
        raise UserError(
            key, problem, "name a version that a release gate registered, or the artifact itself"
        )
    url, path = tags.get(URL, ""), tags.get(PATH, "")
    if not url.isprintable() or not path.isprintable():
        problem = (
            f"version {found.version} of {found.name} has control characters in {URL} or {PATH}"
        )
        raise UserError(key, problem, "correct its tags")
    return Version(found.name, str(found.version), digest, url, path, found.run_id or "", tags)


def find_verdict(uri: str, key: str) -> Verdict | None:
    """Return the latest look recorded under a gate's key, in any experiment; None where there is
    none.

    Raises:
        UserError: If it is not what was recorded, or the store cannot be reached.
    """
    from pipeline.store.verdicts import FILE, as_recorded, checksum

    if is_empty(uri):
        return None
    found: list[Verdict] = []
    with _asking(uri), tempfile.TemporaryDirectory() as folder:
        client = _open(uri)
        for run in _tagged(
            client, f"tags.`{GATE}.key` = '{key}' AND attributes.status = 'FINISHED'"
        ):
            if (
                run.data.tags.get(f"{GATE}.verdict") == "INVALID"
            ):  # does not count as an interim analysis
                continue
            place = Path(client.download_artifacts(run.info.run_id, FILE, folder))
            written, _ = parsed(place)  # as it was written: its checksum is of that
            verdict = (
                as_recorded(written) if isinstance(written, dict) and "run_id" in written else None
            )
            if (
                verdict is None
                or verdict.get("key") != key
                or checksum(verdict) != run.data.tags.get(f"{GATE}.sha256")
            ):
                problem = f"{FILE} of MLflow's run {run.info.run_id} is not what was recorded"
                raise UserError("verdict", problem, "restore it; a verdict is never edited")
            found.append(from_schema_1(verdict))
    return max(found, key=lambda each: each["look"], default=None)


def run_files(uri: str, name: str, wanted: Sequence[str], folder: Path) -> Path | None:
    """Return a folder with files that MLflow keeps of a run; None where it knows no such run.

    Args:
        name: The run's id, of this project's or MLflow's.
        wanted: The files; the first must be there.
        folder: Where they go.

    Raises:
        UserError: If the store cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    if is_empty(uri) or "'" in name:  # which MLflow's queries cannot quote
        return None
    with _asking(uri):
        client = _open(uri)
        found = next(_tagged(client, f"tags.`{RUN_TAG}` = '{name}'"), None)
        if found is None:
            try:
                found = client.get_run(name)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise
        there = {each.path for each in client.list_artifacts(found.info.run_id)}
        if wanted[0] not in there:
            return None
        for each in there.intersection(wanted):
            client.download_artifacts(found.info.run_id, each, str(folder))
        return folder


def find_spread(uri: str, device: str, count: int) -> Any | None:
    """Return the spread of repeated trainings on a device that self-tests recorded last; None where
    none did.

    Raises:
        UserError: If the store cannot be reached.
    """
    from pipeline.compare.verdict import Spread

    if is_empty(uri) or "'" in device:  # which MLflow's queries cannot quote
        return None
    with _asking(uri):
        client = _open(uri)
        query = f"tags.`{SELFTEST}.device` = '{device}' AND tags.`{SELFTEST}.devices` = '{count}'"
        for run in _tagged(client, query):
            metrics = run.data.metrics
            sd_log = metrics.get(f"{SELFTEST}/training_sd_log", math.nan)
            runs = metrics.get(f"{SELFTEST}/training_runs", math.nan)
            # what has a t interval
            if math.isfinite(sd_log) and sd_log >= 0 and math.isfinite(runs) and runs >= 2:
                return Spread(sd_log, int(runs), run.data.tags.get(RUN_TAG, run.info.run_name))
    return None


def read_verdicts(uri: str, *, model: str | None = None) -> list[Judged]:
    """Return every verdict that gates have left in a store, those given again too, the newest
    first.

    Tags, figures and settings of the runs say all that a history needs: no file is fetched. Runs
    that were deleted in MLflow are left out.

    Args:
        model: Only of this registered model.

    Raises:
        UserError: If the store cannot be reached.
    """
    if is_empty(uri):
        return []
    file = sqlite_file(uri)
    if file is not None:
        with suppress(sqlite3.Error):
            runs = _about(model, runs_tagged(file, VERDICT))
            versions = versions_tagged(file, _named(runs), DIGEST)
            return [_judged(run, versions) for run in runs]
    with _asking(uri):
        client = _open(uri)
        runs = _about(model, map(stored, _tagged(client, f"tags.`{VERDICT}` LIKE '%'")))
        versions = {name: _versions(client, name) for name in _named(runs)}
    return [_judged(run, versions) for run in runs]


def _about(model: str | None, runs: Iterable[StoredRun]) -> list[StoredRun]:
    return [run for run in runs if model is None or _model_of(run) == model]


def _named(runs: Iterable[StoredRun]) -> set[str]:
    return {name for run in runs if (name := _model_of(run))}


def _model_of(run: StoredRun) -> str | None:
    """Return the registered model that a verdict is about; of the first one, the model that it was
    to be a part of.
    """
    reference = str(run["params"].get("baseline", ""))
    named = reference.removeprefix("models:/").partition("@")[0].partition("/")[0]
    return (
        run["tags"].get(f"{GATE}.model")
        or (named if reference.startswith("models:/") else "")
        or None
    )


def _versions(client: Any, name: str) -> dict[str, int]:
    """Return the newest version's number by artifact; nothing where the name is none."""
    try:
        check_name(name, "model")
    except UserError:
        return {}
    numbers: dict[str, int] = {}
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        for each in page:
            digest = each.tags.get(DIGEST, "")
            numbers[digest] = max(int(each.version), numbers.get(digest, 0))
        token = page.token
        if not token:
            return numbers


def _judged(run: StoredRun, versions: Mapping[str, Mapping[str, int]]) -> Judged:
    """Return the verdict that a run's tags, figures and settings tell of; a figure without an
    interval is None.
    """
    from pipeline.compare.history import Judged, figure
    from pipeline.compare.statistics import look_alpha
    from pipeline.ledger.metrics import PRIMARY, RELATIVE, deciding
    from pipeline.tasks.table import Task

    tags, params, metrics = run["tags"], run["params"], run["metrics"]
    said = {
        name.removeprefix(f"{GATE}."): value
        for name, value in tags.items()
        if name.startswith(f"{GATE}.")
    }
    task = next((task for task in Task if task.value == params.get("task")), next(iter(Task)))
    prefix = f"{GATE}/quality/"
    read = {
        key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)
    }
    primary = deciding([read], task) or PRIMARY[task]
    alpha, looks = (
        _number(params.get("policy.alpha")) or math.nan,
        int(_number(params.get("policy.looks")) or 1),
    )
    is_policy = 0 < alpha < 0.5 and looks in (1, 2)  # another release's may be none
    look = int(_number(said.get("look")) or 1)
    ends = [
        [metrics.get(f"{GATE}/{name}{end}") for end in ("", "_low", "_high")]
        for name in ("serving", f"quality/{primary}")
    ]
    began = datetime.fromtimestamp(run["start_ms"] / 1000, UTC).isoformat(timespec="seconds")
    margin = _number(params.get(f"policy.metrics.{primary}.margin"))
    model = _model_of(run)
    number = versions.get(model or "", {}).get(said.get("candidate.digest", ""))
    return Judged(
        created=_moment(said.get("created")) or began,
        run=tags.get(RUN_TAG, run["id"]),
        model=model,
        verdict=said["verdict"],
        key=said.get("key", ""),
        look=look,
        candidate=said.get("candidate.digest", ""),
        baseline=said.get("baseline.digest"),
        version=None if number is None else str(number),
        policy=said.get("policy", ""),
        policy_sha256=said.get("policy.sha256", ""),
        data=tags.get("data.digest", ""),
        device=tags.get("device", ""),
        recorded=said.get("recorded"),
        quality_key=primary,
        serving=figure(
            *ends[0],
            level=1 - 2 * (look_alpha(alpha, looks) if is_policy else math.nan),
            relative=True,
            blocks=int(_number(params.get("policy.blocks")) or 0) * look,
        ),
        quality=figure(*ends[1], level=1 - 2 * alpha, relative=primary in RELATIVE),
        margin=margin if margin is not None else _number(params.get("quality.margin")),
    )


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _moment(text: str | None) -> str | None:
    """Return a time in UTC, as verdicts have it; None where it is none."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return None if found.tzinfo is None else found.astimezone(UTC).isoformat(timespec="seconds")


def _tagged(client: Any, query: str) -> Iterator[Any]:
    """Yield runs of all experiments, the newest first."""
    experiments = [each.experiment_id for each in pages(client.search_experiments)]
    if experiments:
        yield from pages(
            client.search_runs, experiments, query, order_by=["attributes.start_time DESC"]
        )


# -- writing --------------------------------------------------------------------------------------


def tag_version(uri: str, version: Version, tags: Tags) -> None:
    """Write tags on a version; those without a value are left out.

    Raises:
        UserError: If the store cannot be reached, or refuses.
    """
    with _asking(uri):
        client = _open(uri)
        for name, value in _tags(tags).items():
            client.set_model_version_tag(version.name, version.version, name, value)


def promote(
    uri: str,
    name: str,
    candidate: Candidate,
    expected: str | None,
    tags: Tags,
    *,
    key: str = "candidate",
) -> Version:
    """Register an artifact as a version of `name` and make it the champion, if the champion still
    is `expected`.

    A version with the same digest is taken instead of another new one. Killed anywhere, it leaves
    the old champion or the new one; the next promotion then waits until the lock counts as dead.

    Args:
        expected: Number of the version that the candidate was compared with; None where there was
            no champion.
        tags: What else the version is to say, of the verdict.

    Raises:
        NotPromoted: If the champion is another, or another gate promotes and does not end.
        UserError: If the store cannot be reached, or refuses.
    """
    check_name(name, key)
    assert re.fullmatch(r"[0-9a-f]{32}", candidate.digest)
    with _asking(uri):
        client = _open(uri)
        candidate = _as_logged(client, candidate)  # before the lock, which is held for a few calls
        with _held(client, name, expected) as lock:
            _compare(_champion(client, name), expected, name)
            number = _register(client, name, candidate, tags)
            _compare(_champion(client, name), expected, name)
            lock.check()
            _move(client, name, number)
            found = client.get_model_version(name, number)
        _name_on_model(client, candidate, name, number)
    return _version(found, key)


def _as_logged(client: Any, candidate: Candidate) -> Candidate:
    """Return a candidate with the logged model that it is and the run that made it, where this
    store has them: the UI links a version to both.
    """
    from mlflow.exceptions import MlflowException

    if candidate.run_id is not None:
        return candidate
    experiments = [each.experiment_id for each in pages(client.search_experiments)]
    try:
        found = client.search_logged_models(
            experiments, filter_string=f"tags.digest = '{candidate.digest}'", max_results=1
        )
    except (MlflowException, NotImplementedError) as error:
        if not is_unknown(error):
            raise
        return candidate  # a server from before logged models
    if not found:
        return candidate
    return replace(candidate, run_id=found[0].source_run_id, model_id=found[0].model_id)


def _name_on_model(client: Any, candidate: Candidate, name: str, number: str) -> None:
    """Have a logged model name the version that it became, as a server does by itself."""
    if candidate.model_id is None:
        return
    had = client.get_logged_model(candidate.model_id).tags.get(VERSIONS)
    known = json.loads(had) if had else []
    own = {"name": name, "version": int(number)}
    if not any(each["name"] == name and int(each["version"]) == int(number) for each in known):
        client.set_logged_model_tags(candidate.model_id, {VERSIONS: json.dumps([*known, own])})


def _compare(champion: str | None, expected: str | None, name: str) -> None:
    if champion != expected:
        said = [
            "no version" if number is None else f"version {number}"
            for number in (champion, expected)
        ]
        raise NotPromoted(
            f"the champion of {name} is {said[0]} by now, and the verdict is about {said[1]}"
        )


def _register(client: Any, name: str, candidate: Candidate, tags: Tags) -> str:
    """Return the number of the version that is this artifact, made if there is none."""
    own = {
        DIGEST: candidate.digest,
        URL: without_login(candidate.url),
        PATH: candidate.path,
        **tags,
    }
    if _had(client.get_registered_model, name) is None:
        with _already_there():
            client.create_registered_model(name)
    query = f"name = '{name}' AND tags.`{DIGEST}` = '{candidate.digest}'"
    known = [
        each for each in client.search_model_versions(query, max_results=1000) if each.name == name
    ]
    if known:
        number = str(max(int(each.version) for each in known))
        for tag, value in _tags(own).items():
            client.set_model_version_tag(name, number, tag, value)
        return number
    # A server refuses sources that are paths of its own machine, and nothing but the tags is read
    # here.
    source = f"artifact:///{candidate.digest}"
    linked = {} if candidate.model_id is None else {"model_id": candidate.model_id}
    made = client.create_model_version(
        name,
        source,
        candidate.run_id,
        tags=_tags(own),
        description=_tags({"line": tags.get(f"{GATE}.line")}).get("line"),
        await_creation_for=0,
        **linked,
    )
    return str(made.version)


def _move(client: Any, name: str, number: str) -> None:
    """Set the alias; where the answer is lost, it is asked whether it was set."""
    try:
        client.set_registered_model_alias(name, CHAMPION, number)
    except store_errors():
        if _champion(client, name) != number:
            raise


def _tags(tags: Tags) -> dict[str, str]:
    """Return tags as MLflow takes them: clean names, no secrets, nothing empty, nothing longer than
    its limit.
    """
    clean = {
        re.sub(r"[^\w\-. :/]", "_", name)[:MAX_NAME]: redact_value(name, str(value))[:MAX_TAG]
        for name, value in tags.items()
        if value is not None
    }
    return {name: value for name, value in clean.items() if value}


# -- the lock of a promotion ----------------------------------------------------------------------


@dataclass(slots=True)
class _Lock:
    """The registered model `<name>.promotion`, while it names us.

    Attributes:
        since: When it was asked for, monotonic seconds: earlier than any other can have seen it.
    """

    client: Any
    name: str
    holder: str
    since: float = field(default_factory=time.monotonic)

    def take(self) -> bool:
        """Create it; tell whether it is ours."""
        from mlflow.exceptions import MlflowException

        self.since = time.monotonic()
        try:
            self.client.create_registered_model(
                self.name,
                {HOLDER: self.holder},
                "A release gate is moving an alias; removed when it has.",
            )
            return True
        except MlflowException as error:
            if error.error_code not in THERE:
                raise
            # a retried request finds its own work
            found = _had(self.client.get_registered_model, self.name)
            return found is not None and found.tags.get(HOLDER) == self.holder

    def check(self) -> None:
        """Make sure that nobody can have taken it away, and that nobody can until the alias is set.

        Raises:
            NotPromoted: If it took too long.
        """
        found = _had(self.client.get_registered_model, self.name)
        late = time.monotonic() - self.since > LOCK_S - MARGIN_S
        if late or found is None or found.tags.get(HOLDER) != self.holder:
            raise NotPromoted(
                f"registering took longer than {LOCK_S - MARGIN_S:.0f} s, and another gate may be"
                " promoting"
            )

    def release(self) -> None:
        """Remove it, if it still is ours; one that may count as dead is left to whoever takes it
        over.
        """
        if time.monotonic() - self.since < LOCK_S - MARGIN_S / 2:
            found = _had(self.client.get_registered_model, self.name)
            if found is not None and found.tags.get(HOLDER) == self.holder:
                self.client.delete_registered_model(self.name)


@contextmanager
def _held(client: Any, name: str, expected: str | None) -> Generator[_Lock]:
    """Hold the lock of a model's champion.

    Raises:
        NotPromoted: If the champion changes meanwhile, or others hold it for too long.
    """
    lock = _Lock(client, name + LOCK, uuid.uuid4().hex)
    deadline = time.monotonic() + PATIENCE_S
    other, seen = "", 0.0
    while not lock.take():
        _compare(_champion(client, name), expected, name)
        found = _had(client.get_registered_model, lock.name)
        if found is None:
            continue
        now, holder = time.monotonic(), str(found.tags.get(HOLDER, "unknown"))
        if holder != other:
            other, seen = holder, now
        # without its holder it was read while it went away: its age is another one's
        lost = HOLDER in found.tags and time.time() - found.creation_timestamp / 1000 > LOST_S
        if now - seen > LOCK_S or lost:
            _take_away(client, lock.name, holder)
        elif now > deadline:
            raise NotPromoted(f"other gates have been promoting {name} for {PATIENCE_S:.0f} s")
        else:
            time.sleep(POLL_S)
    try:
        yield lock
    finally:
        with suppress(*store_errors()):  # left behind, it counts as dead in a while
            lock.release()
            _sweep(client, lock.name)


def _take_away(client: Any, lock: str, holder: str) -> None:
    """Rename a dead holder's lock; of several that try, one does."""
    from mlflow.exceptions import MlflowException

    _sweep(client, lock)
    try:
        client.rename_registered_model(lock, f"{lock}.{re.sub('[^0-9a-f]', '', holder)[:32]}")
    except MlflowException as error:
        if is_down(error):
            raise


def _sweep(client: Any, lock: str) -> None:
    """Remove what `_take_away` left long ago: until then its name keeps late comers from doing it
    again.
    """
    for model in client.search_registered_models(f"name LIKE '{lock}.%'", max_results=100):
        old = time.time() - model.last_updated_timestamp / 1000 > LOST_S
        if old and re.fullmatch(rf"{re.escape(lock)}\.[0-9a-f]*", model.name):
            client.delete_registered_model(model.name)


@contextmanager
def _already_there() -> Generator[None]:
    """Pass over that something exists by now."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in THERE:
            raise


# -- the store ------------------------------------------------------------------------------------


def check_name(name: str, key: str) -> None:
    """Refuse a registered model's name that MLflow does not take, or that a promotion's lock could
    have.

    Raises:
        UserError: Saying which character is at fault.
    """
    bad = next((char for char in name if char in "/:'\"`\\%" or not char.isprintable()), None)
    if bad is not None:
        raise UserError(
            key, f"{name[:80]!r} has {bad!r} in it", "name a registered model without / : % quotes"
        )
    if not name.strip() or name in (".", "..") or len(name) > MAX_MODEL:
        raise UserError(
            key,
            f"{name[:80]!r} cannot name a registered model",
            f"give 1 to {MAX_MODEL} characters",
        )
    if re.search(rf"{re.escape(LOCK)}(\.[0-9a-f]*)?$", name):
        raise UserError(
            key, f"{name} is named as the lock of a promotion", f"choose a name without {LOCK}"
        )


def _check_which(version: str | int | None, alias: str | None, key: str) -> None:
    """Refuse what cannot be the number of a version, or an alias.

    Raises:
        UserError: Saying what it would have to be.
    """
    if version is not None and not re.fullmatch(r"[1-9]\d{0,8}", str(version), re.ASCII):
        raise UserError(
            key, f"{str(version)[:80]!r} is no version's number", "write models:/name/3"
        )
    if alias is not None and not re.fullmatch(r"[\w\-]{1,255}", alias, re.ASCII):
        raise UserError(key, f"{alias[:80]!r} is no alias", f"write models:/name@{CHAMPION}")


def is_empty(uri: str) -> bool:
    """Whether a store has yet to be made, which no one is to do who only reads.

    Raises:
        UserError: If the folder that would hold it is not there, either.
    """
    file = sqlite_file(uri)
    # MLflow would make it, and call an unmounted disk empty
    if file is not None and not file.parent.is_dir():
        raise UserError(
            "tracking.uri",
            f"there is no folder {file.parent}",
            "check the path, or whether it is mounted",
        )
    return file is not None and (not file.exists() or (file.is_file() and file.stat().st_size == 0))


@contextmanager
def _asking(uri: str) -> Generator[None]:
    """Turn what a store raises into one line.

    Raises:
        UserError: Naming the store, without a login.
    """
    quiet()
    try:
        yield
    except (*store_errors(), ImportError) as error:  # a database takes a driver
        # of urllib3's, which come nested
        first = str(error).split("\n")[0].rpartition("(Caused by ")[2]
        text = " ".join(first[:MAX_TEXT].split()) or type(error).__name__
        said = "cannot be reached" if is_down(error) else "refuses"
        where = redact_value("", without_login(uri))
        raise UserError(
            "tracking.uri",
            f"MLflow at {where} {said} ({redact_value('', without_login(text))[:200]})",
            "check the address, the network and MLFLOW_TRACKING_URI",
        ) from error


def _open(uri: str) -> Any:
    """Return a client whose store is there and migrated: processes that open a fresh one at once
    would break it.
    """
    from filelock import Timeout
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is None:
        _knock(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    if not is_empty(uri) and not _is_database(file):  # MLflow would try for two minutes
        raise UserError("tracking.uri", f"{file} is no SQLite database", "name one, or a server")
    try:
        lock, what = (
            file.parent / ".mlflow.lock",
            f"another process that writes to the store of {file.parent}",
        )
        with locked(lock, what, timeout_s=OPENING_S):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_registered_models(max_results=1)
            client.search_experiments(max_results=1)
    except Timeout:
        raise UserError(
            "tracking.uri",
            f"another process has held {file.parent}/.mlflow.lock for {OPENING_S:.0f} s",
            "wait for it to end",
        ) from None
    return client


def _is_database(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as start:
        return start.read(16) == b"SQLite format 3\0"


def _knock(uri: str) -> None:
    """Try the port of a database server: MLflow itself would try for two minutes.

    Raises:
        OSError: If nobody answers.
    """
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(uri)
    port = PORTS.get(parts.scheme.partition("+")[0])
    if port is not None and parts.hostname:
        with socket.create_connection((parts.hostname, parts.port or port), CONNECT_S):
            pass
