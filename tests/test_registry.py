"""Versions and the alias `champion`, in real SQLite stores and a real server: one gate promotes,
whoever dies.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from make_journal import end, start, write_run
from make_result import make_row
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

from pipeline.errors import UserError
from pipeline.ledger.journal import Journal
from pipeline.store.verdicts import checksum
from pipeline.tracking import registry
from pipeline.tracking.deliver import deliver
from pipeline.tracking.registry import (
    HOLDER,
    LOCK,
    Candidate,
    NotPromoted,
    Version,
    promote,
    resolve_version,
    run_artifact,
    tag_version,
)

A, B, C = "a" * 32, "b" * 32, "c" * 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder whose store is there already: opening another takes half a second."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture
def uri(store: Path) -> Iterator[str]:
    """A store without registered models."""
    uri = f"sqlite:///{store / 'mlflow.db'}"
    yield uri
    for name in models(uri):
        MlflowClient(uri, uri).delete_registered_model(name)


def candidate(digest: str = A) -> Candidate:
    return Candidate(digest, f"s3://me:hunter2@bucket/{digest}", f"/here/{digest}")


def champion(uri: str, name: str = "m") -> Version | None:
    return resolve_version(uri, name, alias="champion")


def models(uri: str) -> list[str]:
    return [model.name for model in MlflowClient(uri, uri).search_registered_models()]


# -- promoting


def test_the_first_champion_and_the_next(uri: str) -> None:
    assert champion(uri) is None
    first = promote(uri, "m", candidate(A), None, {"verdict": "NO_BASELINE"})
    assert first == champion(uri)
    assert (first.name, first.version, first.digest, first.path) == ("m", "1", A, f"/here/{A}")
    assert first.url == f"s3://bucket/{A}"  # a login comes from the environment
    assert first.tags["verdict"] == "NO_BASELINE"
    second = promote(
        uri,
        "m",
        candidate(B),
        "1",
        {"verdict": "PASS", "savings/training": 0.5, "none": None, "e": ""},
    )
    assert champion(uri) == second
    assert second.tags == {
        "artifact.digest": B,
        "artifact.url": f"s3://bucket/{B}",
        "artifact.path": f"/here/{B}",
        "verdict": "PASS",
        "savings/training": "0.5",
    }
    assert resolve_version(uri, "m", version="1") == first == resolve_version(uri, "m", version=1)
    assert models(uri) == ["m"]  # the lock is gone


@pytest.mark.parametrize("expected", [None, "2", "7"])
def test_a_champion_that_changed_meanwhile_stays(uri: str, expected: str | None) -> None:
    promote(uri, "m", candidate(A), None, {})
    said = (
        "the champion of m is version 1 by now, and the verdict is about"
        f" {'version ' * bool(expected)}"
    )
    with pytest.raises(NotPromoted, match=said) as lost:
        promote(uri, "m", candidate(B), expected, {})
    assert lost.value.reason == str(lost.value)
    assert champion(uri) == resolve_version(uri, "m", version=1)
    # what lost is not registered
    assert len(MlflowClient(uri, uri).search_model_versions("name = 'm'")) == 1
    assert models(uri) == ["m"]


def test_a_champion_that_is_gone_is_another(uri: str) -> None:
    with pytest.raises(
        NotPromoted, match="is no version by now, and the verdict is about version 1"
    ):
        promote(uri, "m", candidate(A), "1", {})
    assert models(uri) == []


def test_the_same_artifact_is_one_version(uri: str) -> None:
    promote(uri, "m", candidate(A), None, {"verdict": "PASS"})
    promote(uri, "m", candidate(B), "1", {})
    again = promote(
        uri, "m", Candidate(A, "s3://other/x", "/there"), "2", {"verdict": "PASS again"}
    )
    assert (again.version, again.url, again.path) == ("1", "s3://other/x", "/there")
    assert again.tags["verdict"] == "PASS again"
    assert champion(uri) == again
    assert promote(uri, "other", candidate(A), None, {}).version == "1"


def test_tags_hold_no_secrets_and_fit(uri: str) -> None:
    version = promote(
        uri, "m", candidate(A), None, {"api_key": "hunter2", "odd*key": "https://me:hunter2@host"}
    )
    assert "hunter2" not in json.dumps(version.tags)
    assert "odd_key" in version.tags
    tag_version(
        uri,
        version,
        {"verdict": "FAIL", "long": "x " * 4500, "verdict.why": "a\nb", "nothing": None},
    )
    found = champion(uri)
    assert found is not None
    assert {name: len(found.tags[name]) for name in ("verdict", "long")} == {
        "verdict": 4,
        "long": 5000,
    }
    assert found.tags["verdict.why"] == "a\nb"
    assert "nothing" not in found.tags
    with pytest.raises(UserError, match=r"^tracking\.uri: MLflow at .* refuses"):
        tag_version(uri, Version("m", "9", A, "", "", "", {}), {"verdict": "x"})


def test_what_breaks_before_the_alias_leaves_the_champion_and_no_lock(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(uri, "m", candidate(A), None, {})

    def fail(*_: Any) -> None:
        raise MlflowException("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", fail)
        with pytest.raises(UserError, match=r"cannot be reached \(connection lost\)"):
            promote(uri, "m", candidate(B), "1", {})
    assert models(uri) == ["m"]
    found = champion(uri)
    assert found is not None
    assert found.digest == A
    assert promote(uri, "m", candidate(B), "1", {}).version == "2"  # registered then, champion now


def test_an_alias_that_was_set_though_the_answer_was_lost_is_a_promotion(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MlflowClient.set_registered_model_alias

    def lost(*args: Any) -> None:
        real(*args)
        raise MlflowException("connection lost")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lost)
    assert promote(uri, "m", candidate(A), None, {}).digest == A


# -- the lock


def hold(uri: str, holder: str = "d" * 32) -> MlflowClient:
    client = MlflowClient(uri, uri)
    client.create_registered_model(f"m{LOCK}", {HOLDER: holder})
    return client


def quick(monkeypatch: pytest.MonkeyPatch, lock_s: float = 0.5, margin_s: float = -60.0) -> None:
    """Let locks count as dead soon; a holder of this test has time all the same."""
    monkeypatch.setattr(registry, "LOCK_S", lock_s)
    monkeypatch.setattr(registry, "MARGIN_S", margin_s)
    monkeypatch.setattr(registry, "POLL_S", 0.05)


def test_a_dead_holder_s_lock_is_taken_over(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    hold(uri)
    started = time.monotonic()
    promote(uri, "m", candidate(A), None, {})
    assert time.monotonic() - started > 0.5  # it was watched for that long
    assert models(uri) == ["m", f"m{LOCK}.{'d' * 32}"]
    monkeypatch.setattr(registry, "LOST_S", -1.0)
    promote(uri, "m", candidate(B), "1", {})
    assert models(uri) == ["m"]  # what is left of it goes later


def test_a_lock_from_long_ago_is_not_waited_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(uri)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + registry.LOST_S + 60)
    started = time.monotonic()
    promote(uri, "m", candidate(A), None, {})
    assert time.monotonic() - started < registry.LOCK_S / 4


def test_a_late_comer_does_not_take_the_new_holder_s_lock_for_the_dead_one_s(uri: str) -> None:
    dead, new = "d" * 32, "e" * 32
    client = hold(uri, dead)
    registry._take_away(client, f"m{LOCK}", dead)
    hold(uri, new)
    registry._take_away(client, f"m{LOCK}", dead)  # had looked before the first took it away
    assert client.get_registered_model(f"m{LOCK}").tags[HOLDER] == new


def test_who_holds_the_lock_is_waited_for_and_not_for_ever(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "PATIENCE_S", 0.2)
    monkeypatch.setattr(registry, "POLL_S", 0.05)
    client = hold(uri)
    with pytest.raises(NotPromoted, match="other gates have been promoting m for 0 s"):
        promote(uri, "m", candidate(A), None, {})
    assert client.get_registered_model(f"m{LOCK}").tags[HOLDER] == "d" * 32
    monkeypatch.setattr(registry, "PATIENCE_S", 60.0)
    threading.Timer(0.3, client.delete_registered_model, [f"m{LOCK}"]).start()
    assert promote(uri, "m", candidate(A), None, {}).version == "1"


def test_who_waits_learns_at_once_that_another_has_won(uri: str) -> None:
    promote(uri, "m", candidate(A), None, {})
    hold(uri)
    with pytest.raises(NotPromoted, match="is version 1 by now"):
        promote(uri, "m", candidate(B), None, {})


def test_a_lock_that_goes_while_mlflow_says_that_it_exists_is_free(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Creating what exists makes MLflow look at it, and its holder may let go in between."""
    client, holder = hold(uri), f"m{LOCK}"
    real = SqlAlchemyStore.get_registered_model

    def gone(self: Any, name: str) -> Any:
        if name == holder:
            monkeypatch.undo()
            client.delete_registered_model(name)
        return real(self, name)

    monkeypatch.setattr(SqlAlchemyStore, "get_registered_model", gone)
    assert promote(uri, "m", candidate(A), None, {}).version == "1"
    assert models(uri) == ["m"]


@pytest.mark.parametrize("what", ["late", "taken over", "gone"])
def test_who_lost_the_lock_sets_no_alias(
    uri: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    promote(uri, "m", candidate(A), None, {})
    real, client = registry._register, MlflowClient(uri, uri)

    def slow(*args: Any) -> str:
        number = real(*args)
        if what == "late":
            quick(monkeypatch, 0.0, 0.0)
        else:
            client.delete_registered_model(f"m{LOCK}")
        if what == "taken over":
            hold(uri)
        return number

    monkeypatch.setattr(registry, "_register", slow)
    with pytest.raises(NotPromoted, match="took longer than"):
        promote(uri, "m", candidate(B), "1", {})
    found = champion(uri)
    assert found is not None
    assert found.version == "1"
    locks = [name for name in models(uri) if LOCK in name]
    # another's, or one that may be another's by now
    assert locks == ([] if what == "gone" else [f"m{LOCK}"])


def test_a_human_who_moves_the_alias_meanwhile_is_heeded(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(uri, "m", candidate(A), None, {})
    promote(uri, "m", candidate(B), "1", {})
    real = registry._register

    def meanwhile(*args: Any) -> str:
        number = real(*args)
        MlflowClient(uri, uri).set_registered_model_alias("m", "champion", "1")
        return number

    monkeypatch.setattr(registry, "_register", meanwhile)
    with pytest.raises(
        NotPromoted, match="is version 1 by now, and the verdict is about version 2"
    ):
        promote(uri, "m", candidate(C), "2", {})
    assert models(uri) == ["m"]


LOST_S = 6.0  # seconds after which a gate of these tests takes a lock for dead by the clock

GATE = """
import sys, time
from pipeline.tracking import registry
from pipeline.tracking.registry import Candidate, NotPromoted, promote
uri, digest = sys.argv[1], sys.argv[2] * 32
registry.LOST_S, registry.POLL_S = float(sys.argv[3]), 0.02
if sys.argv[4:]:
    def hang(*_):
        print("ready", flush=True); time.sleep(600)
    setattr(registry, sys.argv[4], hang)
registry.resolve_version(uri, "warm", alias="champion")
print("open", flush=True)
for name in sys.stdin:
    try:
        promote(uri, name.strip(), Candidate(digest, "", "/p"), None, {"by": digest})
        print("won", flush=True)
    except NotPromoted as error:
        print("lost", flush=True)
"""


def gate(uri: str, letter: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", GATE, uri, letter, str(LOST_S), *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def race(uri: str, letters: str, prefix: str) -> None:
    """Let gates promote at once: ten models without a champion, and two that a gate died over."""
    names, dead = (
        [f"{prefix}{number}" for number in range(10)],
        [f"{prefix}dead{number}" for number in range(2)],
    )
    client = MlflowClient(uri, uri)
    for name in dead:
        client.create_registered_model(f"{name}{LOCK}", {HOLDER: "d" * 32})
    died = time.monotonic()
    gates = [gate(uri, letter) for letter in letters]
    try:
        assert [hear(each) for each in gates] == ["open"] * len(gates)
        for name in (*names, *dead):
            if name == dead[0]:
                time.sleep(max(0.0, died + LOST_S + 0.5 - time.monotonic()))
            for each in gates:
                say(each, name)
            said = [hear(each) for each in gates]
            assert sorted(said) == ["lost"] * (len(gates) - 1) + ["won"], name
            found = champion(uri, name)
            assert found is not None
            assert found.digest == letters[said.index("won")] * 32
    finally:
        for each in gates:
            each.kill()
            each.communicate()
    left = {name for name in models(uri) if name.startswith(prefix)}
    assert (
        {*names, *dead} <= left <= {*names, *dead, *(f"{name}{LOCK}.{'d' * 32}" for name in dead)}
    )


@pytest.mark.slow
def test_of_two_gates_at_once_exactly_one_promotes(uri: str) -> None:
    race(uri, "ab", "m")


@pytest.mark.slow
@pytest.mark.faults
def test_a_gate_killed_between_registering_and_promoting_leaves_the_old_champion(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(uri, "old", candidate(A), None, {})
    killed = gate(uri, "b", "_move")
    assert hear(killed) == "open"
    say(killed, "m")
    assert hear(killed) == "ready"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    client = MlflowClient(uri, uri)
    assert champion(uri) is None
    (registered,) = client.search_model_versions("name = 'm'")
    assert registered.tags["artifact.digest"] == B
    assert f"m{LOCK}" in models(uri)
    quick(monkeypatch)
    assert promote(uri, "m", candidate(B), None, {}).version == str(registered.version)
    assert f"m{LOCK}" not in models(uri)


# -- what is not there, what does not answer


def test_none_is_said_only_where_there_is_none(uri: str, store: Path) -> None:
    assert champion(uri) is None
    assert resolve_version(uri, "m", version=3) is None
    client = MlflowClient(uri, uri)
    client.create_registered_model("m")
    assert champion(uri) is None
    with pytest.raises(
        UserError, match=r"^baseline: m has no version 3; see its versions in MLflow at sqlite"
    ):
        resolve_version(uri, "m", version=3, key="baseline")
    client.create_model_version("m", "s3://b/x")
    client.set_registered_model_alias("m", "champion", "1")
    with pytest.raises(UserError, match=r"candidate: version 1 of m has no tag artifact\.digest"):
        champion(uri)
    client.set_model_version_tag("m", "1", "artifact.digest", A)
    client.set_model_version_tag("m", "1", "artifact.url", "s3://b\x1b[2J")
    with pytest.raises(UserError, match="has control characters"):
        champion(uri)
    client.delete_registered_model("m")
    assert champion(uri) is None
    assert champion(f"sqlite:///{store}/fresh.db") is None
    assert not (store / "fresh.db").exists()  # reading makes no store


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "a:1",
        "",
        " ",
        "..",
        "a\nb",
        "a\x1b[2J",
        "it's",
        'a"b',
        "x" * 201,
        "m%",
        "m.promotion",
        f"m.promotion.{A}",
    ],
)
def test_names_that_mlflow_or_the_lock_cannot_take_are_refused(uri: str, name: str) -> None:
    for ask in (lambda: champion(uri, name), lambda: promote(uri, name, candidate(), None, {})):
        with pytest.raises(UserError, match=r"^candidate: ") as refused:
            ask()
        assert str(refused.value).isprintable()


def test_odd_names_that_mlflow_takes_work(uri: str) -> None:
    for name in ("ünï code", "a.b-c_d", "50 percent", "_"):
        assert promote(uri, name, candidate(), None, {}) == champion(uri, name)


@pytest.mark.parametrize("version", ["0", "-1", "1.0", "x", "9" * 12, "1 OR 1", "٣"])
def test_numbers_that_are_none_are_refused(uri: str, version: str) -> None:
    with pytest.raises(UserError, match="is no version's number; write models:/name/3"):
        resolve_version(uri, "m", version=version)


@pytest.mark.parametrize("alias", ["", "a b", "a/b", "é", "x" * 256])
def test_aliases_that_are_none_are_refused(uri: str, alias: str) -> None:
    with pytest.raises(UserError, match="is no alias; write models:/name@champion"):
        resolve_version(uri, "m", alias=alias)


def test_stores_that_are_none_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_text("no database")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    refused = {
        f"http://me:hunter2@127.0.0.1:{port}": "cannot be reached (NewConnectionError(",
        f"postgresql://me:hunter2@127.0.0.1:{port}/x": "cannot be reached (",
        "file:///tmp/mlruns": "refuses (The filesystem tracking backend",
        "foo://x": "refuses (",
        f"sqlite:///{tmp_path}/garbage.db": "garbage.db is no SQLite database",
        f"sqlite:///{tmp_path}": "is no SQLite database",
        f"sqlite:///{tmp_path}/no/such.db": f"there is no folder {tmp_path}/no",
    }
    for uri, said in refused.items():
        started = time.monotonic()
        for ask in (
            lambda uri=uri: champion(uri),
            lambda uri=uri: promote(uri, "m", candidate(), None, {}),
        ):
            with pytest.raises(UserError) as error:
                ask()
            assert str(error.value).startswith("tracking.uri: ")
            assert said in str(error.value)
            assert "hunter2" not in str(error.value)
        assert time.monotonic() - started < 15


def test_a_store_that_another_process_opens_for_too_long_is_said(
    uri: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "OPENING_S", 0.1)
    with (
        FileLock(store / ".mlflow.lock"),
        pytest.raises(UserError, match=r"has held .*/\.mlflow\.lock for 0 s"),
    ):
        champion(uri)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    said = r"^tracking\.uri: .*cannot be reached .*timed out"
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match=said):
        champion(f"http://127.0.0.1:{silent.getsockname()[1]}")


class Other(BaseHTTPRequestHandler):
    """Something on the server's port that is no MLflow."""

    status, body = 404, b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def other_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<html>not here</html>"),
        (404, b'{"detail": "Not Found"}'),
        (404, b'{"error_code": 404}'),
        (200, b""),
        (200, b"{}"),
        (200, b"<html>log in</html>"),
        (200, b'{"registered_model": {"name": "another"}}'),
        (401, b"no"),
        (200, b"x" * 2**20),
        (500, b"x" * 2**20),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
        (503, b"busy"),
        (200, b"OK"),
    ],
)
def test_whatever_else_answers_is_never_taken_for_a_store_without_a_champion(
    other_server: str, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes
) -> None:
    monkeypatch.setattr(Other, "status", status)
    monkeypatch.setattr(Other, "body", body)
    for ask in (
        lambda: champion(other_server),
        lambda: resolve_version(other_server, "m", version=1),
        lambda: run_artifact(other_server, A),
        lambda: promote(other_server, "m", candidate(), None, {}),
    ):
        with pytest.raises(UserError, match=rf"^tracking\.uri: MLflow at {other_server} "):
            ask()


# -- runs


def at(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


def delivered(root: Path, name: str, **more: Any) -> str:
    deliver(write_run(root, **more))
    client = MlflowClient(at(root))
    experiment = client.get_experiment_by_name("distill")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`pipeline.run` = '{name}'")
    return runs[0].info.run_id


def test_a_run_stands_for_its_primary_arm_s_model_and_a_stage_for_its_own(root: Path) -> None:
    student = make_row("student")["artifact"]
    parent = delivered(root, "run-1")
    assert run_artifact(at(root), parent) == (Path(student["path"]), student["digest"], "run-1")
    client = MlflowClient(at(root))
    experiment = client.get_run(parent).info.experiment_id
    for arm in ("teacher", "student"):
        (child,) = client.search_runs([experiment], f"tags.`pipeline.run` = 'run-1/{arm}'")
        artifact = make_row(arm)["artifact"]
        assert run_artifact(at(root), child.info.run_id) == (
            Path(artifact["path"]),
            artifact["digest"],
            "run-1",
        )


def test_of_seeds_and_attempts_the_first_seed_s_last_finished_one_counts(root: Path) -> None:
    def row(seed: int, attempt: int, letter: str, status: str = "FINISHED") -> dict[str, Any]:
        made = make_row("student", seed=seed, attempt=attempt, status=status)
        made["artifact"] = {**make_row("student")["artifact"], "digest": letter * 32}
        return made

    folder = root / "runs" / "run-1"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    start(journal, "run-1")
    rows = [
        row(1, 1, "1"),
        row(0, 1, "2", "KILLED"),
        row(0, 2, "3"),
        make_row("teacher"),
        make_row("student/lora"),
    ]
    for each in rows:
        journal.write("row", row=each)
    end(journal, rows)
    deliver(folder)
    client = MlflowClient(at(root))
    experiment = client.get_experiment_by_name("distill")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`pipeline.run` = 'run-1'")
    assert run_artifact(at(root), parent.info.run_id)[1] == "3" * 32


def test_runs_that_stand_for_no_model_are_refused(root: Path) -> None:
    unended = delivered(root, "run-2", run_id="run-2", ended=False)
    with pytest.raises(
        UserError, match=rf"^candidate: MLflow's run {unended} \(run-2\) made no model"
    ):
        run_artifact(at(root), unended)
    client = MlflowClient(at(root))
    foreign = client.create_run(client.create_experiment("theirs")).info.run_id
    with pytest.raises(UserError, match="was not written by this pipeline"):
        run_artifact(at(root), foreign)
    client.delete_run(unended)
    for run_id in (unended, C):
        with pytest.raises(UserError, match=f"has no run {run_id}"):
            run_artifact(at(root), run_id)
        with pytest.raises(UserError, match=f"has no run {run_id}"):
            run_artifact(f"sqlite:///{root}/fresh.db", run_id)
    for name in ("", "run-2", "../x", "A" * 32):
        with pytest.raises(UserError, match="is no run id of MLflow"):
            run_artifact(at(root), name)


# -- a real server


@pytest.mark.parametrize(
    ("edit", "tagged"),
    [({}, "k"), ({"verdict": "PASS"}, "k"), ({}, "another"), ({"run_id": None}, "k"), (None, "k")],
)
def test_a_verdict_that_mlflow_holds_is_believed_only_as_it_was_recorded_and_for_its_key(
    root: Path, edit: dict[str, Any] | None, tagged: str
) -> None:
    """A file in its place that was edited, or tags copied to another comparison's run."""
    verdict = {"run_id": "r", "key": "k", "look": 1, "verdict": "FAIL"}
    client = MlflowClient(at(root))
    sums = {"gate.key": tagged, "gate.verdict": "FAIL", "gate.sha256": checksum(verdict)}
    run = client.create_run(
        client.create_experiment("release_check", str(root / "kept")), tags=sums
    )
    written = {
        name: value for name, value in {**verdict, **(edit or {})}.items() if value is not None
    }
    client.log_text(run.info.run_id, "[]" if edit is None else json.dumps(written), "verdict.json")
    client.set_terminated(run.info.run_id)
    if (edit, tagged) == ({}, "k"):
        assert registry.find_verdict(at(root), "k") == verdict
        assert registry.find_verdict(at(root), "never asked") is None
    else:
        with pytest.raises(UserError, match="is not what was recorded"):
            registry.find_verdict(at(root), tagged)


def test_a_verdict_of_an_earlier_schema_is_believed_as_it_was_written(root: Path) -> None:
    """Its checksum is of the file, and what is read of it has today's names."""
    saving = {"v": 0.1, "prov": "measured", "why_null": None}
    verdict = {"run_id": "r", "key": "k", "look": 1, "verdict": "FAIL", "saving": saving}
    client = MlflowClient(at(root))
    sums = {"gate.key": "k", "gate.verdict": "FAIL", "gate.sha256": checksum(verdict)}
    experiment = client.create_experiment("release_check", str(root / "kept"))
    run = client.create_run(experiment, tags=sums)
    client.log_text(run.info.run_id, json.dumps(verdict), "verdict.json")
    client.set_terminated(run.info.run_id)
    found = registry.find_verdict(at(root), "k")
    assert found is not None
    assert found["saving"] == {"value": 0.1, "provenance": "measured", "why_missing": None}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "2",
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "a"),
    ]
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=nothing, stderr=nothing, start_new_session=True)
    try:
        _until_it_answers(f"http://127.0.0.1:{port}/api/2.0/mlflow/registered-models/search")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _until_it_answers(url: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.slow
def test_a_server_does_as_a_file_does(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert champion(server) is None
    first = promote(
        server, "m", Candidate(A, f"/folder/{A}", f"/here/{A}", C), None, {"verdict": "NO_BASELINE"}
    )
    assert (first.url, first.run_id) == (f"/folder/{A}", C)
    assert champion(server) == first
    with pytest.raises(NotPromoted):
        promote(server, "m", candidate(B), None, {})
    assert promote(server, "m", candidate(B), "1", {}).version == "2"
    assert promote(server, "m", candidate(A), "2", {}).version == "1"
    tag_version(server, first, {"verdict": "PASS"})
    found = resolve_version(server, "m", version=1)
    assert found is not None
    assert found.tags["verdict"] == "PASS"
    with pytest.raises(UserError, match="m has no version 9"):
        resolve_version(server, "m", version=9)
    with pytest.raises(UserError, match="has no run"):
        run_artifact(server, A)
    quick(monkeypatch)
    hold(server)
    assert promote(server, "m", candidate(B), "1", {}).version == "2"
    assert models(server) == ["m", f"m{LOCK}.{'d' * 32}"]


@pytest.mark.slow
def test_of_three_gates_at_one_server_exactly_one_promotes(server: str) -> None:
    race(server, "abc", "race")
