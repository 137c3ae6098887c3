"""Artifacts: whole or not there, addressed by content, made once however many processes want
them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from pipeline.errors import Preempted, UserError
from pipeline.store import artifacts as store_module
from pipeline.store.artifacts import (
    MANIFEST,
    Artifact,
    Store,
    check_room,
    digest_folder,
    key_of,
    read_json,
    write_json,
)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


FILES = {"config.json": "{}", "sub/weights.bin": "abc"}


def test_the_digest_is_of_names_and_contents_only(tmp_path: Path) -> None:
    one = digest_folder(write(tmp_path / "one", FILES))
    assert one == digest_folder(write(tmp_path / "two", dict(reversed(FILES.items()))))
    assert one[1] == 5
    write(tmp_path / "two", {MANIFEST: "anything"})
    assert one == digest_folder(tmp_path / "two")
    for other in (
        {**FILES, "config.json": "{ }"},
        {"config.json": "{}", "weights.bin": "abc"},
        {**FILES, "x": ""},
    ):
        assert digest_folder(write(tmp_path / key_of(other=other), other))[0] != one[0]


def test_a_committed_artifact_lies_at_its_digest_with_its_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.scratch() as out:
        artifact = store.commit(write(out, FILES), "model", {"arm": "a"})
    assert artifact.path == (tmp_path / "artifacts" / artifact.digest).resolve()
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    assert manifest == {
        "schema": 1,
        "kind": "model",
        "digest": artifact.digest,
        "bytes": 5,
        "arm": "a",
    }
    assert not list((tmp_path / "tmp").iterdir())
    with store.scratch() as out:  # the same content again
        assert store.commit(write(out, FILES), "model", {"arm": "b"}) == artifact
    assert len(list((tmp_path / "artifacts").iterdir())) == 1


def test_what_fails_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        write(out, FILES)
        raise RuntimeError

    store = Store(tmp_path)
    with pytest.raises(RuntimeError), store.scratch() as out:
        fail(out)
    assert not list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "artifacts").iterdir())


def test_a_record_whose_artifact_is_damaged_or_gone_is_no_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.scratch() as out:
        artifact = store.commit(write(out, FILES), "model", {})
    store.remember("keys", "k", {"artifact": artifact.to_json(), "seed": 1})
    assert store.recall("keys", "other") is None
    record = store.recall("keys", "k")
    assert record is not None
    assert record["seed"] == 1
    (artifact.path / "sub/weights.bin").write_text("abd")
    assert store.recall("keys", "k") is None
    (tmp_path / "keys/k.json").write_text('{"artifact": ')
    assert store.recall("keys", "k") is None


def test_a_reader_sees_the_old_json_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a/b.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"x": 1}
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]
    assert read_json(tmp_path / "none.json") is None


def test_keys_follow_content_and_not_order_or_process(tmp_path: Path) -> None:
    assert key_of(a=1, b=[1, 2]) == key_of(b=(1, 2), a=1)
    assert key_of(a=1) != key_of(a=1.5)
    assert key_of(a=None) != key_of(a="None")
    code = "from pipeline.store.artifacts import key_of; print(key_of(a=1, b={'y': 2, 'x': 'é'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == key_of(b={"x": "é", "y": 2}, a=1)


HOLD = """
import sys, time
from pathlib import Path
from pipeline.store.artifacts import Store
with Store(Path(sys.argv[1])).lock("k"):
    print("held", flush=True)
    time.sleep(1)
    Path(sys.argv[1], "done").touch()
"""


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with store.lock("another key"):
        assert not (tmp_path / "done").exists()
    with store.lock("k"):
        assert (tmp_path / "done").exists()
    other.communicate(timeout=120)


def committed(store: Store, key: str = "k") -> Artifact:
    with store.scratch() as out:
        artifact = store.commit(write(out, FILES), "model", {"arm": "a"})
    store.remember("keys", key, {"artifact": artifact.to_json()})
    return artifact


def test_an_artifact_is_whole_while_something_is_noted_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file half-written among its own would change its digest: another process would make it
    again.
    """
    store = Store(tmp_path)
    artifact = committed(store)
    seen: list[bool] = []

    def looking(path: Path, content: dict[str, str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "fsync", lambda _: seen.append(Store(tmp_path).recall("keys", "k") is not None)
            )
            write_json(path, content)

    monkeypatch.setattr(store_module, "write_json", looking)
    store.annotate(artifact, "assessed", {"loss": 1.0})
    assert seen == [True]
    assert read_json(artifact.path / MANIFEST)["assessed"] == {"loss": 1.0}
    assert not list((tmp_path / "tmp").iterdir())


def test_two_notes_about_an_artifact_at_once_are_both_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = committed(store)
    other = threading.Thread(target=Store(tmp_path).annotate, args=(artifact, "charge", 2))

    def slowly(manifest: dict[str, Any]) -> dict[str, Any]:
        other.start()
        other.join(timeout=0.3)  # it has to wait
        return {**manifest, "assessed": 1}

    store.revise(artifact, slowly)
    other.join()
    manifest = read_json(artifact.path / MANIFEST)
    assert (manifest["assessed"], manifest["charge"], manifest["arm"]) == (1, 2, "a")


@pytest.mark.parametrize("name", [MANIFEST, "sub/weights.bin"])
@pytest.mark.parametrize("content", [None, "", '{"digest": "of another"}'])
def test_a_damaged_artifact_is_made_again_in_its_place(
    tmp_path: Path, name: str, content: str | None
) -> None:
    store = Store(tmp_path)
    artifact = committed(store)
    if content is None:
        (artifact.path / name).unlink()
    else:
        (artifact.path / name).write_text(content)
    assert store.recall("keys", "k") is None
    assert committed(store) == artifact
    assert store.recall("keys", "k") == {"artifact": artifact.to_json()}
    assert digest_folder(artifact.path)[0] == artifact.digest
    assert not list((tmp_path / "tmp").iterdir())


def test_a_store_that_was_moved_still_has_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact = committed(Store(Path("here")))
    assert artifact.path.is_absolute()
    (tmp_path / "here").rename(tmp_path / "there")
    record = Store(Path("there")).recall("keys", "k")
    assert record is not None
    found = Artifact.from_json(record["artifact"])
    assert (found.digest, found.path) == (
        artifact.digest,
        tmp_path / "there/artifacts" / artifact.digest,
    )
    assert (found.path / "config.json").is_file()
    shutil.rmtree(found.path)
    assert Store(Path("there")).recall("keys", "k") is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_disk_that_fills_up_is_said_and_nothing_is_left(tmp_path: Path, error: Exception) -> None:
    store = Store(tmp_path)

    def fail(out: Path) -> None:
        write(out, FILES)
        raise error

    with (
        pytest.raises(UserError, match=r"tracking\.root: the disk of .* is full; free some room"),
        store.scratch() as out,
    ):
        fail(out)
    assert not list((tmp_path / "tmp").iterdir())


def test_a_commit_that_cannot_be_renamed_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = digest_folder(write(tmp_path / "same", FILES))[0]
    (tmp_path / "artifacts" / digest).write_text("a file lies where the folder should")
    with pytest.raises(NotADirectoryError), store.scratch() as out:
        store.commit(write(out, FILES), "model", {})


def test_room_is_checked_before_writing(tmp_path: Path) -> None:
    check_room(tmp_path, 1, "tracking.root")
    with pytest.raises(
        UserError, match=r"tracking\.root: .* MiB free, this needs 1073741824 MiB; free some room"
    ):
        check_room(tmp_path, 2**50, "tracking.root")


COMMIT = """
import sys
from pathlib import Path
from pipeline.store import artifacts as module
place = module.Store._place
def hang(*args):
    if sys.argv[2] == "before":
        print("ready", flush=True); sys.stdin.readline()
    final = place(*args)
    if sys.argv[2] == "after":
        print("ready", flush=True); sys.stdin.readline()
    return final
module.Store._place = hang
store = module.Store(Path(sys.argv[1]))
with store.scratch() as out:
    (out / "sub").mkdir()
    (out / "config.json").write_text("{}")
    (out / "sub/weights.bin").write_text("abc")
    print(store.commit(out, "model", {"arm": "a"}).digest)
"""


def start(root: Path, where: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMIT, str(root), where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.faults
@pytest.mark.parametrize(("where", "artifacts"), [("before", 0), ("after", 1)])
def test_a_process_killed_around_its_commit_leaves_a_whole_artifact_or_none(
    tmp_path: Path, where: str, artifacts: int
) -> None:
    process = start(tmp_path, where)
    held = Store(tmp_path)  # a store opened meanwhile sweeps nothing that is being written
    assert len(list((tmp_path / "tmp").iterdir())) == 2 - artifacts
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    left = list((tmp_path / "artifacts").iterdir())
    assert len(left) == artifacts
    assert all(
        digest_folder(folder)[0] == folder.name and read_json(folder / MANIFEST) for folder in left
    )
    assert held.recall("keys", "k") is None
    store = Store(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())  # what the killed process was writing is gone
    assert len(list((tmp_path / "artifacts").iterdir())) == artifacts
    assert committed(store).digest == digest_folder(write(tmp_path / "same", FILES))[0]


@pytest.mark.faults
def test_two_processes_may_commit_the_same_content_at_once(tmp_path: Path) -> None:
    both = [start(tmp_path, "before") for _ in range(2)]
    said = {process.communicate("go\n", timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = (tmp_path / "artifacts").iterdir()
    assert said == {folder.name} == {digest_folder(folder)[0]}
    assert not list((tmp_path / "tmp").iterdir())


def test_another_process_that_mends_the_artifact_first_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    artifact = committed(store)
    (artifact.path / "config.json").write_text("damaged")
    whole = store_module._is_whole
    seen: list[bool] = []

    def and_gone(folder: Path, digest: str) -> bool:
        seen.append(whole(folder, digest))
        shutil.rmtree(folder)  # as if the other had just moved it away
        return seen[-1]

    monkeypatch.setattr(store_module, "_is_whole", and_gone)
    with store.scratch() as out:
        assert store.commit(write(out, FILES), "model", {}) == artifact
    assert seen == [False]
    assert whole(artifact.path, artifact.digest)


def test_a_key_that_another_process_holds_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits is asked every second, and may give up; the key is free afterwards."""
    monkeypatch.setattr(store_module, "WAIT_S", 0.01)
    asked: list[int] = []

    def give_up_the_third_time() -> None:
        asked.append(len(asked))
        if len(asked) == 3:
            raise Preempted("stopped")

    store, other = Store(tmp_path), Store(tmp_path)
    with store.lock("k"), pytest.raises(Preempted), other.lock("k", check=give_up_the_third_time):
        pytest.fail("the key was held")
    assert len(asked) == 3
    with other.lock("k", check=lambda: pytest.fail("the key is free")):
        pass
