"""Artifacts at `store.url`: whole or not there, verified, and nothing taken from a place that means
harm.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileOpener
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

from pipeline.errors import UserError
from pipeline.store import remote
from pipeline.store.artifacts import MANIFEST, Artifact, Store, digest_folder, key_of
from pipeline.store.remote import download, unsafe, upload

FILES = {"config.json": "{}", "sub/model.safetensors": "abc" * 1000}
FACTS = {
    "arm": "student",
    "run_id": "r",
    "ledger": {"work_device_hours": 1.5},
    "assessed": {"accuracy": [0.5, None]},
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def commit(store: Store, files: dict[str, str] = FILES, **facts: Any) -> Artifact:
    with store.scratch() as out:
        return store.commit(write(out, files), "model", {**FACTS, **facts})


@pytest.fixture
def here(tmp_path: Path) -> Store:
    return Store(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> Store:
    return Store(tmp_path / "there")


@pytest.fixture(params=["folder", "file://", "memory://", "s3://"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3://":
        yield f"{request.getfixturevalue('s3')}/models/"
        return
    place = f"memory://{uuid.uuid4().hex}/models/"
    yield {
        "folder": f"{tmp_path}/far/away",
        "file://": f"file://{tmp_path}/far",
        "memory://": place,
    }[request.param]
    MemoryFileSystem.store.clear()


def content(url: str) -> dict[str, bytes]:
    fs, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(path): fs.cat_file(name) for name in fs.find(path)}


def put(url: str, name: str, data: bytes) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
    fs.pipe_file(f"{path}/{name}", data)


def nothing_left(store: Store) -> bool:
    return not list((store.root / "tmp").iterdir()) and not list(
        (store.root / "artifacts").iterdir()
    )


def test_what_is_uploaded_comes_down_on_another_machine_with_its_facts(
    here: Store, there: Store, url: str
) -> None:
    artifact = commit(here)
    at = upload(artifact, url)
    assert at == f"{url.rstrip('/')}/{artifact.digest}"
    assert set(content(at)) == {"/config.json", "/sub/model.safetensors", f"/{MANIFEST}"}
    got = download(url, artifact.digest, there)
    assert got.path == (there.root / "artifacts" / artifact.digest).resolve()
    assert (got.kind, got.digest, got.num_bytes) == ("model", artifact.digest, artifact.num_bytes)
    assert (got.path / MANIFEST).read_text() == (artifact.path / MANIFEST).read_text()
    assert not list((there.root / "tmp").iterdir())


def test_uploading_again_writes_nothing(
    here: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = commit(here)
    at = upload(artifact, url)
    monkeypatch.setattr(remote._Place, "_write", lambda *_: pytest.fail("it is whole"))
    monkeypatch.setattr(remote._Place, "remove", lambda *_: pytest.fail("it is whole"))
    assert upload(artifact, url) == at


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (MANIFEST, b'{"digest": "of another"}'),
        (MANIFEST, b"{"),
        ("config.json", b"[]"),
        ("config.json", b""),
        ("extra", b"x"),
        ("evil.py", b"x"),
        ("sub/artifact.json", b"{}"),
    ],
)
def test_what_is_damaged_is_mended(
    here: Store, there: Store, url: str, name: str, data: bytes
) -> None:
    artifact = commit(here)
    at = upload(artifact, url)
    whole = content(at)
    put(at, name, data)
    assert content(at) != whole
    with pytest.raises(UserError, match=r"^store\.url: "):
        download(url, artifact.digest, there)
    assert nothing_left(there)
    upload(artifact, url)
    assert content(at) == whole


def test_an_upload_that_breaks_off_anywhere_is_no_artifact_until_it_is_whole(
    here: Store, there: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = commit(here)
    real, base = remote._Place._write, url.rstrip("/")
    for broken in range(3):
        left, url = broken, f"{base}/{broken}"

        def breaking(*args: Any) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(remote._Place, "_write", breaking)
            with pytest.raises(KeyboardInterrupt):
                upload(artifact, url)
        with pytest.raises(
            UserError, match=rf"(holds no artifact {artifact.digest}|there is no folder)"
        ):
            download(url, artifact.digest, there)
        assert nothing_left(there)
        upload(artifact, url)
        assert download(url, artifact.digest, Store(there.root / url[-1])).digest == artifact.digest


def test_what_is_being_mended_is_no_artifact_meanwhile(
    here: Store, there: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = commit(here)
    put(upload(artifact, url), "config.json", b"damaged")

    def look(*_: Any) -> None:
        with pytest.raises(UserError, match="holds no artifact"):
            download(url, artifact.digest, there)
        raise KeyboardInterrupt

    monkeypatch.setattr(remote._Place, "write", look)
    with pytest.raises(KeyboardInterrupt):
        upload(artifact, url)


def test_nothing_is_fetched_that_is_here_and_whole(here: Store, tmp_path: Path) -> None:
    artifact = commit(here)
    assert download(f"{tmp_path}/nowhere", artifact.digest, here) == artifact
    url = f"{tmp_path}/far"
    upload(artifact, url)
    (artifact.path / "config.json").write_text("damaged")
    assert download(url, artifact.digest, here) == artifact
    assert (artifact.path / "config.json").read_text() == "{}"


def test_an_artifact_that_is_damaged_here_is_not_uploaded(here: Store, tmp_path: Path) -> None:
    artifact = commit(here)
    (artifact.path / "config.json").write_text("damaged")
    with pytest.raises(
        UserError,
        match=r"^candidate: .* is damaged \(its bytes have digest .*nothing was uploaded$",
    ):
        upload(artifact, str(tmp_path / "far"), key="candidate")
    assert not (tmp_path / "far").exists()


def test_a_model_that_lies_elsewhere_is_uploaded_without_facts(
    there: Store, tmp_path: Path
) -> None:
    folder = write(tmp_path / "given", FILES)
    artifact = Artifact(folder, "model", *digest_folder(folder))
    url = f"{tmp_path}/far"
    upload(artifact, url)
    got = download(url, artifact.digest, there)
    assert json.loads((got.path / MANIFEST).read_text()) == {
        "schema": 1,
        "kind": "model",
        "digest": artifact.digest,
        "bytes": artifact.num_bytes,
    }


def test_a_copy_of_the_store_s_folder_is_a_place_too(here: Store, there: Store) -> None:
    artifact = commit(here)
    assert download(f"{here.root}/artifacts", artifact.digest, there).digest == artifact.digest


# -- places that mean harm


EVIL = {
    "../evil": "leads out",
    "sub/../../evil": "leads out",
    "/etc/evil": "leads out",
    "a//b": "leads out",
    "./a": "leads out",
    "a\nb": "no disk",
    "a\x1b[2Jb": "no disk",
    "a\x00b": "no disk",
    "a\\b": "no disk",
    "\u202eb": "no disk",
    "x" * 300: "no disk",
    "/".join(["y" * 90] * 12): "no disk",
    "pytorch_model.bin": "run code",
    "model.pt": "run code",
    "sub/modeling.py": "run code",
    "a.PKL": "run code",
    "sub/artifact.json": "digest covers",
}


@pytest.mark.parametrize("name", EVIL)
def test_names_that_do_harm_are_refused_before_anything_is_written(
    there: Store, tmp_path: Path, name: str
) -> None:
    """The bytes would even match: a digest covers what lies there, and says nothing of what is
    safe.
    """
    digest = key_of(name=name)
    folder = f"/bucket-{digest}/{digest}"
    manifest = {"schema": 1, "kind": "model", "digest": digest, "bytes": 1}
    MemoryFileSystem.store.clear()
    fs = MemoryFileSystem(skip_instance_cache=True)
    fs.pipe_file(f"{folder}/{MANIFEST}", json.dumps(manifest).encode())
    stored = fs.store[f"{folder}/{MANIFEST}"]
    # as an object store would have it, whose keys are any text
    fs.store[f"{folder}/{name}"] = stored
    listed = {f"{folder}/{name}": {"name": name, "size": 1, "type": "file"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "find", lambda *_, **__: listed)
        with pytest.raises(
            UserError, match=rf"^store\.url: .* has a file .*{EVIL[name]}"
        ) as refused:
            download(f"memory:/{folder.rpartition('/')[0]}", digest, there)
    MemoryFileSystem.store.clear()
    assert str(refused.value).isprintable()
    assert nothing_left(there)
    assert not (tmp_path / "evil").exists()


def test_common_names_are_fine() -> None:
    names = (
        "config.json",
        "model-00001-of-00002.safetensors",
        "sub/é.txt",
        "chat_template.jinja",
        ".gitattributes",
    )
    assert [unsafe(name) for name in names] == [None] * len(names)


BAD_MANIFESTS = {
    "not json": b"\xff\xfe{",
    "cut": b'{"kind": "model"',
    "list": b"[]",
    "deep": b"[" * 100_000,
    "nan": b'{"kind": "model", "digest": "DIGEST", "x": NaN}',
    "huge": b'{"kind": "model", "digest": "DIGEST", "x": 1e999}',
    "surrogate": b'{"kind": "model", "digest": "DIGEST", "x": "\\ud800"}',
    "another": b'{"kind": "model", "digest": "0"}',
    "no kind": b'{"digest": "DIGEST"}',
    "odd kind": b'{"kind": "\\u001b[2J", "digest": "DIGEST"}',
}


@pytest.mark.parametrize("raw", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_an_artifact_json_that_is_none_or_another_s_is_refused(
    here: Store, there: Store, tmp_path: Path, raw: bytes
) -> None:
    artifact, url = commit(here), f"{tmp_path}/far"
    put(upload(artifact, url), MANIFEST, raw.replace(b"DIGEST", artifact.digest.encode()))
    with pytest.raises(
        UserError, match=r"is not what it is named after: artifact\.json "
    ) as refused:
        download(url, artifact.digest, there)
    assert str(refused.value).isprintable()
    assert nothing_left(there)


def test_an_artifact_json_without_end_is_not_read_to_its_end(
    here: Store, there: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MAX_MANIFEST", 100)
    artifact, url = commit(here), f"{tmp_path}/far"
    put(upload(artifact, url), MANIFEST, b" " * 101)
    with pytest.raises(UserError, match="is longer than 100 bytes"):
        download(url, artifact.digest, there)


def test_facts_cannot_speak_for_the_store(here: Store, there: Store, tmp_path: Path) -> None:
    artifact, url = commit(here), f"{tmp_path}/far"
    at = upload(artifact, url)
    facts = json.loads((artifact.path / MANIFEST).read_text())
    put(at, MANIFEST, json.dumps({**facts, "bytes": 7, "schema": 99}).encode())
    got = download(url, artifact.digest, there)
    assert json.loads((got.path / MANIFEST).read_text()) == facts


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_only_plain_files_are_read(here: Store, there: Store, tmp_path: Path, kind: str) -> None:
    artifact, url = commit(here), f"{tmp_path}/far"
    odd = Path(upload(artifact, url)) / "odd"
    odd.symlink_to("/dev/zero") if kind == "link" else os.mkfifo(odd)
    with pytest.raises(UserError, match="'odd', which is no plain file"):
        download(url, artifact.digest, there)
    assert nothing_left(there)


def test_a_name_that_is_file_and_folder_at_once_is_refused(
    there: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = "a" * 32
    put(
        f"memory://both/{digest}",
        MANIFEST,
        json.dumps({"kind": "model", "digest": digest}).encode(),
    )
    put(f"memory://both/{digest}", "a", b"x")
    info = {"size": 1, "type": "file"}
    names = {f"/both/{digest}/a": info, f"/both/{digest}/a/b": info}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: names)
    with pytest.raises(UserError, match="cannot lie beside its other files"):
        download("memory://both", digest, there)
    assert nothing_left(there)


def test_a_file_that_grows_while_it_is_read_is_cut_off(
    here: Store, there: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, url = commit(here), f"{tmp_path}/far"
    upload(artifact, url)
    # without end
    monkeypatch.setattr(remote._Place, "_chunks", lambda *_: iter(lambda: b"x" * 1000, b""))
    with pytest.raises(UserError, match="is longer than the 2 bytes it is listed with"):
        download(url, artifact.digest, there)
    assert nothing_left(there)


def test_more_than_the_disk_takes_is_refused_before_it_is_fetched(
    here: Store, there: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, url = commit(here), f"{tmp_path}/far"
    upload(artifact, url)
    monkeypatch.setattr(remote._Place, "files", lambda *_: {"config.json": 2**60})
    with pytest.raises(UserError, match=r"^store\.url: .* MiB free, this needs"):
        download(url, artifact.digest, there)
    assert nothing_left(there)


def test_a_disk_that_fills_up_meanwhile_is_said_as_such(
    here: Store, there: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, url = commit(here), f"{tmp_path}/far"
    upload(artifact, url)
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "xb" and there.root in self.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"^tracking\.root: the disk of .* is full"):
        download(url, artifact.digest, there)
    assert nothing_left(there)


# -- places that do not answer


def test_a_place_that_holds_it_not_or_is_not_there_is_named(there: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"^baseline: {tmp_path}/empty holds no artifact aaaa"):
        download(f"{tmp_path}/empty", "a" * 32, there, key="baseline")
    with pytest.raises(
        UserError, match=rf"there is no folder {tmp_path}/absent; check the path, or whether it is"
    ):
        download(f"{tmp_path}/absent", "a" * 32, there)
    with pytest.raises(UserError, match="memory://none holds no artifact"):
        download("memory://none", "a" * 32, there)


def test_a_bucket_that_is_not_there_and_a_server_that_is_gone_are_named(
    here: Store, there: Store, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = commit(here)
    with pytest.raises(
        UserError, match=r"s3://nobody-s/models cannot be reached or used \(.*bucket does not exist"
    ):
        upload(artifact, "s3://nobody-s/models")
    with pytest.raises(UserError, match="s3://nobody-s/models holds no artifact"):
        download("s3://nobody-s/models", artifact.digest, there)
    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for ask in (lambda: upload(artifact, s3), lambda: download(s3, artifact.digest, there)):
        with pytest.raises(
            UserError,
            match=rf"^store\.url: {s3} cannot be reached or used \(EndpointConnectionError",
        ):
            ask()
    assert nothing_left(there)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "neither a folder nor"),
        (" ", "neither a folder nor"),
        ("a\nb", "neither a folder nor"),
        ("foo://me:hunter2@b", r"foo://b cannot be used \(ValueError: Protocol not known"),
        ("https://h/x?X-Amz-Signature=hunter2", "neither a folder nor"),
        ("~nosuchuser/x", "cannot be used"),
        (
            "sftp://me:hunter2@h/x",
            r"sftp://h/x takes a library that is not installed \(.*paramiko.*\); install it$",
        ),
    ],
)
def test_what_is_no_place_is_refused_without_its_secret(here: Store, url: str, said: str) -> None:
    artifact = commit(here)
    for ask in (lambda: upload(artifact, url), lambda: download(url, "a" * 32, here)):
        with pytest.raises(UserError, match=said) as refused:
            ask()
        assert "hunter2" not in str(refused.value)
        assert str(refused.value).isprintable()


@pytest.mark.parametrize("digest", ["", "../../etc", "A" * 32, "a" * 31, "a" * 32 + "\n"])
def test_a_digest_is_32_hex_characters(here: Store, digest: str) -> None:
    with pytest.raises(UserError, match="is no digest of an artifact"):
        download("memory://x", digest, here)


class Unreachable(Exception):
    """As of a library whose errors are no OSError."""


@pytest.mark.parametrize("call", ["find", "open"])
def test_whatever_a_library_raises_is_one_line_without_the_login(
    here: Store, there: Store, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    artifact, url = commit(here), "memory://me:hunter2@bucket"
    upload(artifact, url)

    def fail(*_: Any, **__: Any) -> None:
        raise Unreachable("no route\nto memory://me:hunter2@bucket, password hunter2, \x1b[31m")

    monkeypatch.setattr(MemoryFileSystem, call, fail)
    for ask in (lambda: upload(artifact, url), lambda: download(url, artifact.digest, there)):
        with pytest.raises(
            UserError, match=r"memory://bucket cannot be reached or used \(Unreachable: "
        ) as refused:
            ask()
        assert "hunter2" not in str(refused.value)
        assert str(refused.value).isprintable()
    assert nothing_left(there)
    MemoryFileSystem.store.clear()


def test_the_url_that_is_noted_down_holds_no_login(here: Store) -> None:
    artifact = commit(here)
    assert (
        upload(artifact, "memory://me:hunter2@bucket/x") == f"memory://bucket/x/{artifact.digest}"
    )
    MemoryFileSystem.store.clear()


def test_reading_that_breaks_off_leaves_nothing(
    here: Store, there: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, url = commit(here), f"{tmp_path}/far"
    upload(artifact, url)
    real, read = LocalFileOpener.read, []

    def fail(self: Any, *args: Any) -> bytes:
        read.append(1)
        if len(read) > 2:
            raise ConnectionResetError("gone")
        return real(self, *args)

    monkeypatch.setattr(LocalFileOpener, "read", fail)
    with pytest.raises(
        UserError, match=r"cannot be reached or used \(ConnectionResetError: gone\)"
    ):
        download(url, artifact.digest, there)
    assert nothing_left(there)


# -- memory, processes


def test_files_are_copied_in_pieces(
    here: Store, there: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 2**16)
    monkeypatch.setattr(remote, "MAX_MANIFEST", 2**20)
    artifact, url = (
        commit(here, {"config.json": "{}", "model.safetensors": "x" * 2**25}),
        f"{tmp_path}/far",
    )
    tracemalloc.start()
    try:
        upload(artifact, url)
        upload(artifact, url)
        download(url, artifact.digest, there)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


UPLOAD = """
import sys
from pathlib import Path
from pipeline.store import remote
from pipeline.store.artifacts import Store
at = {"manifest": "write_facts", "file": "write"}[sys.argv[3]]
real = getattr(remote._Place, at)
def hang(self, *args):
    print("ready", flush=True); sys.stdin.readline()
    real(self, *args)
setattr(remote._Place, at, hang)
store = Store(Path(sys.argv[1]))
(digest,) = [path.name for path in (store.root / "artifacts").iterdir()]
print(remote.upload(store.find(digest), sys.argv[2]))
"""


@pytest.mark.faults
@pytest.mark.parametrize("where", ["file", "manifest"])
def test_a_process_killed_while_it_uploads_leaves_what_the_next_one_finishes(
    here: Store, there: Store, tmp_path: Path, where: str
) -> None:
    artifact, url = commit(here), f"{tmp_path}/far"
    command = [sys.executable, "-c", UPLOAD, str(here.root), url, where]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    with pytest.raises(UserError, match=r"holds no artifact|there is no folder"):
        download(url, artifact.digest, there)
    upload(artifact, url)
    assert download(url, artifact.digest, there).digest == artifact.digest
