"""Artifacts at `store.url`: a folder or any fsspec URL, where `<url>/<digest>/` holds what the
store's folder would.

A download trusts the digest and nothing else: names are checked before anything is written, bytes
before anything is committed. artifact.json is written last, so that a folder without it is no
artifact; no digest covers it, so what it says of ledgers is as trustworthy as whoever may write
there. Files are copied in pieces of `CHUNK` bytes.

Source: https://filesystem-spec.readthedocs.io/en/latest/api.html (AbstractFileSystem).
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote

from pipeline.config.redaction import REDACTED, redact_value, without_login
from pipeline.errors import UserError
from pipeline.store.artifacts import (
    MANIFEST,
    Artifact,
    Store,
    check_room,
    digest_folder,
    read_json,
    sync_path,
)
from pipeline.store.file_names import PICKLE_WEIGHTS, RUNS_CODE

CHUNK = 4 * 2**20  # bytes held at once
MAX_MANIFEST = 16 * 2**20  # bytes; items of an assessment are files of their own
MAX_TEXT = 1000  # characters of an error that are looked at
SHORTEST_SECRET = 3  # characters; a shorter one would blank out half of a message
OWN = ("schema", "kind", "digest", "bytes")  # facts of artifact.json that the store itself writes
_DIGEST = re.compile(r"[0-9a-f]{32}")
_LOGIN = re.compile(r"(?<=://)([^/\s]+)(?=@)")
Facts = dict[str, Any]


def upload(artifact: Artifact, url: str, *, key: str = "store.url") -> str:
    """Copy an artifact to `<url>/<digest>`; return that URL, without a login.

    What lies there whole is left alone; what is half there, or damaged, is mended.

    Args:
        url: A folder, or an fsspec URL: `s3://bucket/models`.
        key: What refusals name.

    Raises:
        UserError: If the artifact is damaged here, holds what nobody would download, or the place
            does not take it.
    """
    place = _Place.of(url, artifact.digest, key)
    files = _local_files(artifact, key)
    there = place.listed()
    wrong = [
        name
        for name, path in files.items()
        if name not in there or place.sha256(name) != _sha256(path)
    ]
    extra = sorted(set(there) - set(files) - {MANIFEST})
    if place.is_vouched() and not wrong and not extra:
        return place.url
    place.remove([MANIFEST, *extra])  # while it is mended, nobody is to take it for whole
    for name in wrong:
        place.write(name, files[name])
    facts = read_json(artifact.path / MANIFEST)
    known: Facts = facts if isinstance(facts, dict) else {}  # a folder given as it lies has none
    own = {
        "schema": 1,
        "kind": artifact.kind,
        "digest": artifact.digest,
        "bytes": artifact.num_bytes,
    }
    place.write_facts({**known, **own})
    return place.url


def download(url: str, digest: str, store: Store, *, key: str = "store.url") -> Artifact:
    """Bring an artifact into the local store, with the facts of its artifact.json; what is there
    whole is not fetched.

    Args:
        url: Where artifacts lie by digest, as given to `upload`.
        digest: 32 hex characters.
        key: What refusals name.

    Raises:
        UserError: If the place cannot be reached, has no such artifact, or what it has is another,
            damaged or unsafe.
    """
    place = _Place.of(url, digest, key)
    with store.lock(f"download-{digest}", "another process that downloads the same"):
        # Within the lock: another process may just have fetched it.
        known = store.find(digest)
        if known is not None:
            return known
        facts = place.facts()
        if facts is None and place.is_local and not Path(place.root).is_dir():
            raise UserError(
                key,
                f"there is no folder {place.root_shown}",
                "check the path, or whether it is mounted",
            )
        if facts is None:
            raise UserError(
                key,
                f"{place.root_shown} holds no artifact {digest}",
                "upload it there, or name one that is there",
            )
        kind = facts["kind"]
        sizes = place.files()
        # Before the first byte, so that a full disk does not end a long download.
        check_room(store.root, sum(sizes.values()), key)
        with store.scratch() as out:
            for name, size in sizes.items():
                place.read(name, out / name, size)
            found, _ = digest_folder(out)
            # The digest was asked for by its name; whoever may write there cannot forge it.
            if found != digest:
                raise place.damaged(f"its bytes have digest {found}")
            return store.commit(
                out, kind, {name: fact for name, fact in facts.items() if name not in OWN}
            )


@dataclass(frozen=True, slots=True)
class _Place:
    """One artifact's folder in a file system of fsspec.

    Attributes:
        fs: The file system.
        root: Path of `url` in it; `folder`, that of the artifact.
        url: Of the artifact, without a login.
        secret: The login in the URL, which no message may hold.
        key: What refusals name.
    """

    fs: Any
    root: str
    folder: str
    url: str
    digest: str
    secret: str
    key: str

    @staticmethod
    def of(url: str, digest: str, key: str) -> _Place:
        """Return the place of an artifact; nothing is asked of it yet.

        Raises:
            UserError: If the URL is none, its protocol takes a library that is not installed, or
                the digest is none.
        """
        from fsspec.core import url_to_fs

        if not _DIGEST.fullmatch(digest):
            raise UserError(
                key, f"{digest[:80]!r} is no digest of an artifact", "give its 32 hex characters"
            )
        login = _LOGIN.search(url)
        secret = "" if login is None else login[1]
        # a signed URL is a secret behind its question mark
        shown = _clean(re.split("[?#]", url)[0], secret)
        if (
            not url.strip()
            or not url.isprintable()
            or ("://" in url and ("?" in url or "#" in url))
        ):
            raise UserError(
                key,
                f"{shown!r} is neither a folder nor a URL of one",
                "write /path, or s3://bucket/path",
            )
        try:
            whole = url if "://" in url or "::" in url else str(Path(url).expanduser().resolve())
            fs, path = url_to_fs(whole)
        except ImportError as error:  # fsspec knows the protocol, and says what to install
            raise UserError(
                key,
                f"{shown} takes a library that is not installed ({_text(error, secret)})",
                "install it",
            ) from None
        except Exception as error:
            raise UserError(
                key,
                f"{shown} cannot be used ({_text(error, secret)})",
                "write /path, or s3://bucket/path",
            ) from error
        root = str(path).rstrip("/")
        return _Place(
            fs,
            root,
            f"{root}/{digest}",
            f"{without_login(whole).rstrip('/')}/{digest}",
            digest,
            secret,
            key,
        )

    @property
    def shown(self) -> str:
        """The artifact's URL, fit for messages."""
        return _clean(self.url, self.secret)

    @property
    def root_shown(self) -> str:
        """The URL under which artifacts lie, fit for messages."""
        return _clean(self.url.rpartition("/")[0], self.secret)

    @contextmanager
    def asking(self) -> Generator[None]:
        """Turn whatever a file system of fsspec raises into one line: each library has errors of
        its own.

        Raises:
            UserError: Naming the place, without a login.
        """
        try:
            yield
        except ImportError as error:
            raise UserError(
                self.key,
                f"{self.root_shown} takes a library that is not installed "
                f"({_text(error, self.secret)})",
                "install it",
            ) from None
        except Exception as error:
            raise UserError(
                self.key,
                f"{self.root_shown} cannot be reached or used ({_text(error, self.secret)})",
                "check address, network and credentials",
            ) from error

    def damaged(self, why: str) -> UserError:
        """Return the refusal of what lies there."""
        return UserError(
            self.key,
            f"{self.shown} is not what it is named after: {why}",
            "remove it and upload the artifact again",
        )

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self.fs, LocalFileSystem)

    def manifest(self) -> bytes | None:
        """Return the content of artifact.json, cut where it is longer than any of ours, or None
        where there is none.
        """
        with self.asking():
            self.fs.invalidate_cache()  # another process may have written since
            try:
                with self.fs.open(f"{self.folder}/{MANIFEST}", "rb") as file:
                    return file.read(MAX_MANIFEST + 1)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def is_vouched(self) -> bool:
        """Whether an artifact.json says that what lies there is whole."""
        raw = self.manifest()
        with suppress(ValueError):
            return raw is not None and bool(_read_facts(raw, self.digest))
        return False

    def facts(self) -> Facts | None:
        """Return the checked artifact.json, or None where there is none.

        Raises:
            UserError: If it cannot be read, or speaks of another artifact.
        """
        raw = self.manifest()
        try:
            return None if raw is None else _read_facts(raw, self.digest)
        except ValueError as error:
            raise self.damaged(f"{MANIFEST} {error}") from None

    def listed(self) -> dict[str, dict[str, Any]]:
        """Return what the file system says of each file that lies there, by name."""
        with self.asking():
            self.fs.invalidate_cache()
            found: dict[str, dict[str, Any]] = self.fs.find(self.folder, detail=True)
            found.pop(self.folder, None)
        return {
            path.removeprefix(f"{self.folder}/"): info
            for path, info in found.items()
            if info["type"] != "directory"
        }

    def files(self) -> dict[str, int]:
        """Return the size in bytes of each file but artifact.json, by its checked name.

        Raises:
            UserError: If a name is unsafe.
        """
        sizes: dict[str, int] = {}
        for name, info in self.listed().items():
            if name == MANIFEST:
                continue
            why = unsafe(name) or (None if info["type"] == "file" else "is no plain file")
            if why is not None:
                raise UserError(
                    self.key,
                    f"{self.shown} has a file {name[:80]!r}, which {why}",
                    "remove it there",
                )
            sizes[name] = info["size"] or 0
        return sizes

    def read(self, name: str, target: Path, size: int) -> None:
        """Copy one file from there; at most `size` bytes, as its place declared them.

        Raises:
            UserError: If it cannot be read, or is longer.
        """
        left = size
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            out = target.open("xb")
        except (FileExistsError, NotADirectoryError):  # an object store may hold both `a` and `a/b`
            raise self.damaged(f"{name} cannot lie beside its other files") from None
        with out:
            for chunk in self._chunks(name):
                left -= len(chunk)
                if left < 0:
                    raise self.damaged(f"{name} is longer than the {size} bytes it is listed with")
                out.write(chunk)

    def sha256(self, name: str) -> str:
        """Return the hash of one file that lies there."""
        whole = hashlib.sha256()
        for chunk in self._chunks(name):
            whole.update(chunk)
        return whole.hexdigest()

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self.asking():
            file: BinaryIO = self.fs.open(f"{self.folder}/{name}", "rb")
        try:
            while True:
                with self.asking():
                    chunk = file.read(CHUNK)
                if not chunk:
                    return
                yield chunk
        finally:
            with suppress(Exception):  # it was read; what closing it says is of no use
                file.close()

    def write(self, name: str, source: Path) -> None:
        """Copy one file there; in a folder of this machine it appears whole."""
        with source.open("rb") as file:
            self._write(name, iter(lambda: file.read(CHUNK), b""))

    def write_facts(self, facts: Facts) -> None:
        """Write artifact.json: what lies there is an artifact from now on."""
        self._write(
            MANIFEST,
            iter([json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False).encode()]),
        )

    def _write(self, name: str, chunks: Iterator[bytes]) -> None:
        with self.asking():
            final = f"{self.folder}/{name}"
            parent = final.rpartition("/")[0]
            if not self.is_local:
                try:
                    file = self.fs.open(final, "wb")
                except FileNotFoundError:  # file servers have folders, object stores none
                    self.fs.makedirs(parent, exist_ok=True)
                    file = self.fs.open(final, "wb")
                with file:
                    for chunk in chunks:
                        file.write(chunk)
                return
            Path(parent).mkdir(parents=True, exist_ok=True)
            # beside the artifact, never inside
            partial = Path(self.root) / f".partial-{uuid.uuid4().hex}"
            try:
                with partial.open("xb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                sync_path(partial)
                # On one disk with its target, so that the rename is atomic.
                partial.replace(final)
            finally:
                partial.unlink(missing_ok=True)

    def remove(self, names: list[str]) -> None:
        """Remove files that lie there; one that does not is no error."""
        for name in names:
            with self.asking(), suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.folder}/{name}")


def unsafe(name: str) -> str | None:
    """Return what is wrong with the name of a file relative to its artifact, or None."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of its folder"
    if (
        not name.isprintable()
        or "\\" in name
        or len(name) > 1000
        or any(len(part.encode()) > 255 for part in parts)
    ):
        return "no disk should hold"
    # Such a file would be in no checksum, at any depth.
    if parts[-1] == MANIFEST:
        return "no digest covers"
    if parts[-1] in PICKLE_WEIGHTS or PurePosixPath(parts[-1]).suffix.lower() in RUNS_CODE:
        return "can run code"
    return None


def _local_files(artifact: Artifact, key: str) -> dict[str, Path]:
    """Return the files of an artifact by name, after its bytes proved to be those of its digest.

    Raises:
        UserError: If it is damaged, or holds what `download` would refuse.
    """
    found = digest_folder(artifact.path)[0] if artifact.path.is_dir() else "none"
    if found != artifact.digest:
        raise UserError(
            key,
            f"{artifact.path} is damaged (its bytes have digest {found}, not {artifact.digest})",
            "make it again; nothing was uploaded",
        )
    paths = sorted(path for path in artifact.path.rglob("*") if path.is_file())
    files = {path.relative_to(artifact.path).as_posix(): path for path in paths}
    files.pop(MANIFEST, None)
    for name in files:
        why = unsafe(name)
        if why is not None:
            raise UserError(
                key, f"{artifact.path} has a file {name[:80]!r}, which {why}", "leave it out"
            )
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_facts(raw: bytes, digest: str) -> Facts:
    """Return the content of an artifact.json that could be written here, too.

    Raises:
        ValueError: If it is none, or that of another artifact.
    """
    if len(raw) > MAX_MANIFEST:
        raise ValueError(f"is longer than {MAX_MANIFEST} bytes")
    try:
        facts: Any = json.loads(raw, parse_constant=_refuse_constant)
        json.dumps(facts, ensure_ascii=False, allow_nan=False).encode()  # 1e999, lone surrogates
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    if not isinstance(facts, dict) or facts.get("digest") != digest:
        raise ValueError("speaks of another artifact")
    if not isinstance(facts.get("kind"), str) or not re.fullmatch("[a-z_]{1,40}", facts["kind"]):
        raise ValueError("names no kind of artifact")
    return facts


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _clean(text: str, secret: str) -> str:
    """Return text without the login of the URL, and without what looks like a secret."""
    text = without_login(text)
    password = secret.partition(":")[2]
    # Libraries print the password as typed or decoded.
    for part in (secret, password, unquote(password)):
        text = text.replace(part, REDACTED) if len(part) >= SHORTEST_SECRET else text
    return redact_value("", text)


def _text(error: Exception, secret: str) -> str:
    """Return one printable line of what went wrong."""
    said = "".join(char if char.isprintable() else " " for char in str(error)[:MAX_TEXT])
    said = _clean(said, secret)[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
