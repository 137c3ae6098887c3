"""Artifacts on disk: committed atomically, addressed by content, found again by the key of what
made them.

store/artifacts/<digest>/   the files and artifact.json
store/keys/<key>.json       what a stage with these settings and inputs made: artifact, rows, times
store/tmp/                  folders being written, each locked by its writer; renamed when whole
store/locks/                one lock per key, so that two processes do not make the same stage twice
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, overload

from pipeline.config.redaction import redact, redact_json
from pipeline.errors import UserError
from pipeline.ledger.records import ANY_ARTIFACT, R, Spec, parsed, read_record, sealed, tell
from pipeline.ledger.records import MANIFEST as MANIFEST_SPEC
from pipeline.ledger.shapes import ArtifactRecord, KnownArtifact
from pipeline.ledger.values import from_schema_1
from pipeline.store.locks import check_locks, is_held, lock_at
from pipeline.store.waiting import waiting_for

MANIFEST = "artifact.json"
CARD, GIVEN_CARD = "README.md", "README.base.md"  # ours; of the model that an artifact is a copy of
CARD_MARK = "---\n# made by model-efficiency-pipeline\n"  # a comment of YAML, how a card begins
MODEL = "model"  # the kind of artifact that can be assessed, served, and shown among models
WAIT_S = 1.0
# in a run's folder: result, report and last lines of the journal
RESERVE, RESERVED_BYTES = ".reserve", 4 * 2**20


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that a stage left.

    Attributes:
        path: Absolute.
        digest: 32 hex characters over the names and contents of all files but artifact.json.
        num_bytes: Of those files.
    """

    path: Path
    kind: str
    digest: str
    num_bytes: int

    def to_json(self) -> ArtifactRecord:
        """Return the form artifacts have in result.json."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "digest": self.digest,
            "bytes": self.num_bytes,
        }

    @staticmethod
    def from_json(raw: ArtifactRecord) -> Artifact:
        """Read back what `to_json` wrote."""
        return Artifact(Path(raw["path"]), raw["kind"], raw["digest"], raw["bytes"])


def digest_folder(folder: Path) -> tuple[str, int]:
    """Return digest and size in bytes of all files below `folder`, artifact.json and a card of ours
    excepted.
    """
    total, whole = 0, hashlib.sha256()
    # Sorted, because a file system lists a folder in any order.
    for path in sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST and not is_card(path, folder)
    ):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        # A name cannot hold a zero byte, so that no two folders give the same text.
        whole.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
        total += path.stat().st_size
    return whole.hexdigest()[:32], total


def is_card(path: Path, folder: Path) -> bool:
    """Whether a file is the card that a run wrote into the folder of an artifact. A README.md of
    anybody else is a file like any other.
    """
    if path != folder / CARD:
        return False
    with path.open("rb") as file:
        return file.read(len(CARD_MARK)) == CARD_MARK.encode()


def digest_given(folder: Path) -> tuple[str, int]:
    """Return `digest_folder` (digest, bytes) of a model that lies elsewhere, read once a process
    for as long as no file changes.
    """
    # Names, sizes and times stand for contents here: hashing gigabytes takes seconds.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _digest_as_seen(
        folder, tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    )


@cache
def _digest_as_seen(folder: Path, _: tuple[tuple[str, int, int], ...]) -> tuple[str, int]:
    return digest_folder(folder)


def key_of(**parts: Any) -> str:
    """Return a 32-character key for settings and digests; equal parts give equal keys on every
    machine.
    """
    return hashlib.sha256(json.dumps(_plain(parts), sort_keys=True).encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


plain = _plain


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as `a.b.c: value`."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def write_json(path: Path, content: Any) -> None:
    """Write JSON, secrets left out, so that a reader sees the old file or the new one, whole."""
    text = json.dumps(redact_json(content), indent=1, ensure_ascii=False, allow_nan=False)
    _write(path, text.encode("utf-8", "replace"))


def write_text(path: Path, text: str) -> None:
    """Write a text, secrets left out, so that a reader sees the old file or the new one, whole."""
    _write(path, redact(text).encode("utf-8", "replace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write what is no text, as it is, so that a reader sees the old file or the new one, whole."""
    _write(path, content)


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a folder that was removed meanwhile is made again."""
    # One try more, where the folder was gone or in the way.
    for is_last in (False, True):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("xb") as file:
                # what nobody holds was left by a kill: `_sweep` removes it
                with suppress(OSError):  # outside of a store there may be no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                # Synced before it is renamed: a crash must not leave an empty file under the final
                # name.
                temporary.replace(path)
            return
        except FileNotFoundError:
            if is_last:
                raise
        # somebody's folder, where a file of ours belongs: kept, under another name
        except IsADirectoryError:
            temporary.unlink(missing_ok=True)
            if is_last:
                raise
            make_way(path)
        # Ctrl-C included: nothing half-written stays behind.
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def make_way(path: Path) -> None:
    """Move aside, and keep, what lies where a file of ours belongs and is none: a folder, a pipe, a
    link.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.moved"))


def read_json(path: Path) -> Any | None:
    """Return the JSON in `path`, or None where there is no such file, it is no file, or it is not
    whole.
    """
    return from_schema_1(parsed(path)[0])


def facts_of(folder: Path) -> Mapping[str, Any]:
    """Return what the artifact.json in a folder says; nothing where there is none, or it is
    damaged.
    """
    return read_record(folder / MANIFEST, MANIFEST_SPEC) or {}


class Store:
    """The content-addressed store below `mlruns/store`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._make_folders()
        check_locks(self.root)
        self._sweep()

    def _make_folders(self) -> None:
        """Make what is missing: somebody may remove the store while a stage trains for hours."""
        for name in (
            "artifacts",
            "keys",
            "tmp",
            "tokenizers",
            "locks",
            "checkpoints",
            "assessments",
        ):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def scratch(self) -> Generator[Path]:
        """Give an empty folder to write an artifact into; what is left of it afterwards is removed.

        Raises:
            UserError: If the disk fills up meanwhile.
        """
        self._make_folders()
        folder = self.root / "tmp" / uuid.uuid4().hex
        lock = folder.with_suffix(".lock")
        try:
            with lock_at(lock):
                folder.mkdir()
                yield folder
        except Exception as error:
            if not says_full(error):
                raise
            raise disk_full(self.root) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what killed processes were writing: the lock of such a folder is free."""
        from filelock import Timeout

        for lock in (self.root / "tmp").glob("*.lock"):
            # Without waiting: a lock that somebody holds marks a folder in use.
            with suppress(Timeout), lock_at(lock).acquire(timeout=0):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        for left in self.root.glob("*/.*.json.*"):
            with suppress(OSError), left.open("r+b") as file:
                if not is_held(file):  # who writes holds it
                    left.unlink()

    @contextmanager
    def lock(
        self,
        key: str,
        what: str = "another process that makes the same",
        check: Callable[[], None] = lambda: None,
    ) -> Generator[None]:
        """Hold the lock of one key; another process that makes the same thing waits and then finds
        it made.

        Args:
            key: Of what is made.
            what: Who is waited for, as `waiting_for` says it.
            check: Called every second while another process holds the lock; may raise to give up.
        """
        from filelock import Timeout

        self._make_folders()
        lock = lock_at(self.root / "locks" / f"{key}.lock")
        with waiting_for(what):
            while True:
                try:
                    # In short waits, so that `check` can end it (a budget, a signal).
                    lock.acquire(timeout=WAIT_S)
                    break
                except Timeout:
                    check()
        try:
            yield
        finally:
            lock.release()

    def commit(self, folder: Path, kind: str, manifest: Mapping[str, Any]) -> Artifact:
        """Turn a written folder into an artifact: sync it, then rename it to its digest in one
        step.
        """
        self._make_folders()
        digest, num_bytes = digest_folder(folder)
        write_json(
            folder / MANIFEST,
            {"schema": 1, "kind": kind, "digest": digest, "bytes": num_bytes, **manifest},
        )
        # Contents first, then the rename: what has its name is on disk.
        _sync(folder)
        final = self._place(folder, digest)
        sync_path(final.parent)
        return Artifact(final.resolve(), kind, digest, num_bytes)

    def annotate(self, artifact: Artifact, topic: str, facts: Any) -> None:
        """Add what was found out about an artifact to its artifact.json; one that lies elsewhere is
        left as it is.
        """
        if artifact.path.parent == self.root.resolve() / "artifacts":
            self.revise(artifact, lambda manifest: {**manifest, topic: facts})

    def put_card(self, artifact: Artifact, text: str) -> bool:
        """Write the card of an artifact of this store, which is in no digest.

        Args:
            text: That begins with `CARD_MARK`.

        Returns:
            Whether it was written: a README.md of somebody else stays.
        """
        path = artifact.path / CARD
        if artifact.path.parent != self.root.resolve() / "artifacts":
            return False
        with self.lock(f"manifest-{artifact.digest}"), self.scratch() as out:
            if path.exists() and not is_card(path, artifact.path):
                return False
            write_text(out / CARD, text)
            (out / CARD).replace(path)
        return True

    def revise(
        self, artifact: Artifact, change: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        """Change artifact.json, which is in no digest: one process at a time, and whole for every
        reader.

        Args:
            change: Given what artifact.json says, returns what it is to say; may raise to leave it
                alone.
        """
        path = artifact.path / MANIFEST
        # Written elsewhere: whoever takes the artifact's digest meanwhile would find one file too
        # many in its folder.
        with self.lock(f"manifest-{artifact.digest}"), self.scratch() as out:
            manifest = read_json(path)
            if not isinstance(manifest, dict):  # damaged meanwhile: it is made again
                return
            changed = change(manifest)
            if changed != manifest:
                write_json(out / MANIFEST, changed)
                (out / MANIFEST).replace(path)

    def _place(self, folder: Path, digest: str) -> Path:
        """Rename `folder` to its digest; the same content lies there already, or something damaged
        makes way.
        """
        final = self.root / "artifacts" / digest
        while True:
            try:
                # Fails where a folder with files lies there: that decides who was first.
                return folder.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
            if _is_whole(final, digest):
                return final
            # Moved away in one step, so that no reader meets a half-removed artifact.
            damaged = self.root / "tmp" / uuid.uuid4().hex
            with suppress(FileNotFoundError):  # another process was quicker
                final.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)

    def find(self, digest: str) -> Artifact | None:
        """Return the artifact of this digest, if it is here and whole."""
        path = self.root / "artifacts" / digest
        manifest = read_record(path / MANIFEST, MANIFEST_SPEC)
        if manifest is None or manifest["digest"] != digest:
            return None
        found, num_bytes = digest_folder(path)
        return (
            Artifact(path.resolve(), manifest["kind"], digest, num_bytes)
            if found == digest
            else None
        )

    @overload
    def recall(self, group: str, key: str) -> KnownArtifact | None: ...

    @overload
    def recall(self, group: str, key: str, spec: Spec[R]) -> R | None: ...

    def recall(self, group: str, key: str, spec: Spec[Any] = ANY_ARTIFACT) -> Any:
        """Return what was recorded under `key`, if it and its artifact (where it has one) are still
        whole.

        The artifact is looked for in this store, wherever the store has been moved to since.

        Args:
            spec: What a record of this kind says; another one is damaged, which is said.
        """
        record = read_record(
            self.root / group / f"{key}.json", spec, so="what it recorded is done again"
        )
        raw = None if record is None else record.get("artifact")
        if record is None or raw is None:
            return record
        path = self.root / "artifacts" / raw["digest"]
        if _is_whole(path, raw["digest"]):
            return {**record, "artifact": {**raw, "path": str(path.resolve())}}
        tell(
            path,
            "it is gone" if not path.exists() else "its bytes are not those of its digest",
            "is made again",
        )
        return None

    def remember(self, group: str, key: str, record: Mapping[str, Any]) -> None:
        """Record something under `key`, atomically, with a checksum."""
        write_json(self.root / group / f"{key}.json", sealed(redact_json(record)))


def _is_whole(folder: Path, digest: str) -> bool:
    manifest = read_json(folder / MANIFEST)
    return (
        isinstance(manifest, dict) and manifest.get("digest") == digest == digest_folder(folder)[0]
    )


def copy_model(source: Path, out: Path) -> None:
    """Copy a model's files, but what a run said of them; a README.md of somebody else gets a name
    of its own, since the copy may have a card.
    """
    for file in source.iterdir():
        if file.is_file() and file.name != MANIFEST and not is_card(file, source):
            name = GIVEN_CARD if file.name == CARD else file.name
            shutil.copyfile(file, out / name)


def bring(source: Path, target: Path) -> None:
    """Link weights, which trainers replace rather than rewrite; copy what is small, or lies on
    another disk.
    """
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)
    else:
        shutil.copyfile(source, target)


class DiskFull(UserError):
    """There is no room left: no fault of what was being written, optional as it may be."""


def disk_full(folder: Path) -> DiskFull:
    """Return what to say of a disk that filled up: which, what is left on it, and that nothing is
    to be done twice.
    """
    # The folder itself may not have been made yet.
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free / 2**20
    remedy = (
        f"free some room (it has {free:.0f} MiB left) and start the same command again: it resumes"
    )
    return DiskFull("tracking.root", f"the disk of {folder} is full", remedy)


def says_full(error: BaseException) -> bool:
    """Whether a disk or quota is full; safetensors has an error class of its own that only says so
    in words.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    number = error.errno if isinstance(error, OSError) else None
    return number in full or any(f"(os error {code})" in str(error) for code in full)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_path(path)
    sync_path(folder)


def sync_path(folder: Path) -> None:
    """Have the disk hold a file, or a folder's list of files, before anything vouches for it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reserve_room(folder: Path) -> None:
    """Keep as much of the disk as the end of a run writes, so that a run which a full disk ends can
    still say so.
    """
    with (folder / RESERVE).open("wb") as file:
        # Blocks on disk; a sparse file would reserve nothing.
        os.posix_fallocate(file.fileno(), 0, RESERVED_BYTES)


def free_room(folder: Path) -> None:
    """Give back what was reserved."""
    (folder / RESERVE).unlink(missing_ok=True)


def check_room(folder: Path, num_bytes: int, key: str) -> None:
    """Refuse to start writing what cannot fit.

    Raises:
        UserError: If the disk of `folder` has less than `num_bytes` free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        need, have = num_bytes / 2**20, free / 2**20
        problem = f"{folder} has {have:.0f} MiB free, this needs {need:.0f} MiB"
        raise UserError(key, problem, "free some room; the same command then resumes")
