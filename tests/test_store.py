"""Artifacts: whole or not there, addressed by content, made once however many processes want them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.store import MANIFEST, Store, digest_folder, key_of, read_json, write_json


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
    for other in ({**FILES, "config.json": "{ }"}, {"config.json": "{}", "weights.bin": "abc"}, {**FILES, "x": ""}):
        assert digest_folder(write(tmp_path / key_of(other=other), other))[0] != one[0]


def test_a_committed_artifact_lies_at_its_digest_with_its_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.scratch() as out:
        artifact = store.commit(write(out, FILES), "model", {"arm": "a"})
    assert artifact.path == (tmp_path / "artifacts" / artifact.digest).resolve()
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    assert manifest == {"schema": 1, "kind": "model", "digest": artifact.digest, "bytes": 5, "arm": "a"}
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
    assert read_json(tmp_path / "none.json") is None


def test_keys_follow_content_and_not_order_or_process(tmp_path: Path) -> None:
    assert key_of(a=1, b=[1, 2]) == key_of(b=(1, 2), a=1)
    assert key_of(a=1) != key_of(a=1.5)
    assert key_of(a=None) != key_of(a="None")
    code = "from pipeline.store import key_of; print(key_of(a=1, b={'y': 2, 'x': 'é'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == key_of(b={"x": "é", "y": 2}, a=1)


HOLD = """
import sys, time
from pathlib import Path
from pipeline.store import Store
with Store(Path(sys.argv[1])).lock("k"):
    print("held", flush=True)
    time.sleep(1)
    Path(sys.argv[1], "done").touch()
"""


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with store.lock("another key"):
        assert not (tmp_path / "done").exists()
    with store.lock("k"):
        assert (tmp_path / "done").exists()
    other.communicate(timeout=30)
