"""The teacher cache on disk: shards that are memory-mapped, a manifest, and what a cache is refused
for.

    manifest.json               what it was made from and with; written last, so that a folder
                                without it is no cache
    shard-00000.safetensors     windows in the order of their numbers; per window its number, its
                                digest, and its part of every column (`sparse.py` has the columns)

A window's digest covers its tokens *and* what was captured for them, so that neither damage nor
another order of windows passes: `check` compares all of it with the windows as the student packs
them, before training.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from pipeline.distillation.losses import Sparse
from pipeline.distillation.sparse import Codec, Columns, Dense, Sampled, TopK
from pipeline.errors import UserError
from pipeline.ledger.numbers import how_many
from pipeline.ledger.shapes import CacheFacts, CacheManifest, CacheShard
from pipeline.store.artifacts import key_of, read_json, sync_path, write_json

FORMAT = 1  # of manifest and shards; raise it when an older cache cannot be read
MANIFEST = "manifest.json"
DIGEST_BYTES = 16
OPEN_SHARDS = 128  # mapped at a time
OWN = ("windows", "digests", "starts")  # columns that are the shard's own

SAME = {
    "sequence_length": "windows of another length (sequence_length {theirs}, not {ours})",
    "tokenizer": "another tokenizer",
    "data": "other data",
    "packing": "documents packed into other windows",
    "teacher": "another teacher",
    "method": "another method ({theirs}, not {ours})",
    "draws": "another number of draws ({theirs}, not {ours})",
    "k": "another k ({theirs}, not {ours})",
    "temperature": "another temperature ({theirs}, not {ours})",
    "precision": "another precision ({theirs}, not {ours})",
}
"""What a cache must have in common with the stage that reads it, and how a difference is said; the
first one is.
"""


class Wanted(TypedDict, total=False):
    """What a stage that reads a cache asks of it, as far as it asks."""

    sequence_length: int
    tokenizer: str
    data: str
    packing: str
    teacher: str
    method: str
    draws: int
    k: int
    temperature: float
    precision: str


class Windows(Protocol):
    """Packed windows or padded examples, by number (`data/batches.py`).

    `rows` gives the numbers of a step's windows, (B,). `read` gives their tensors, (B, T) each.
    `content` gives the bytes that a window's digest is taken over.
    """

    num_rows: int

    def rows(self, step: int) -> np.ndarray: ...
    def read(self, rows: np.ndarray) -> dict[str, Tensor]: ...
    def content(self, row: int) -> bytes: ...


# -- what a cache is made from --------------------------------------------------------------------


def needed(windows: Windows, steps: int, batch_size: int) -> np.ndarray:
    """Return the numbers of the windows that a training reads, (W,) ascending, each once."""
    if steps * batch_size >= windows.num_rows:  # an epoch reads every window
        return np.arange(windows.num_rows)
    return np.unique(np.concatenate([windows.rows(step) for step in range(steps)]))


def packing_digest(windows: Windows) -> str:
    """Return a digest over all windows in their order, 32 hex characters."""
    whole = hashlib.sha256()
    for row in range(windows.num_rows):
        whole.update(windows.content(row))
    return whole.hexdigest()[:32]


# -- shards ---------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_shard(
    path: Path, rows: Sequence[int], contents: Sequence[bytes], parts: Sequence[Columns]
) -> str:
    """Write a shard so that it is whole or not there; return its sha256.

    Args:
        rows: Numbers of the windows.
        contents: The bytes that each consists of.
        parts: What was captured for each: by column, an array whose first dimension counts the
            window's tokens or entries.
    """
    # `_Shard` reads `starts` by this order of columns.
    names = sorted(parts[0])
    sizes = np.array([[len(part[name]) for name in names] for part in parts], dtype=np.int32)
    digests = [_digest(content, part) for content, part in zip(contents, parts, strict=True)]
    tensors = {
        "windows": np.array(rows, dtype=np.int64),
        "digests": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        # (windows + 1, columns): where each window's part of each column begins and the last one
        # ends
        "starts": np.concatenate(
            [np.zeros((1, len(names)), dtype=np.int32), sizes.cumsum(0, dtype=np.int32)]
        ),
        **{name: np.concatenate([part[name] for part in parts]) for name in names},
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    save_file(tensors, temporary)
    sync_path(temporary)
    sha256 = file_sha256(temporary)
    temporary.replace(path)
    sync_path(path.parent)
    return sha256


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, 64 hex characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: bytes, part: Columns) -> bytes:
    """Return the digest of a window together with what was captured for it."""
    whole = hashlib.blake2b(content, digest_size=DIGEST_BYTES)
    for name in sorted(part):
        whole.update(np.ascontiguousarray(part[name]).tobytes())
    return whole.digest()


class _Shard:
    """A shard, mapped into memory: only the parts that are asked for are read."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="numpy")
        self.windows: np.ndarray = self._file.get_tensor("windows")
        self.digests: np.ndarray = self._file.get_tensor("digests")
        self._starts: np.ndarray = self._file.get_tensor("starts")
        names: list[str] = self._file.keys()
        self._columns = {
            name: self._file.get_slice(name) for name in sorted(names) if name not in OWN
        }

    def part(self, slot: int) -> Columns:
        """Return what was captured for the window in a place."""
        first, last = self._starts[slot].tolist(), self._starts[slot + 1].tolist()
        return {
            name: column[first[at] : last[at]]
            for at, (name, column) in enumerate(self._columns.items())
        }


# -- the cache ------------------------------------------------------------------------------------


class TeacherCache:
    """A cache on disk.

    Args:
        folder: Of the artifact.
        key: The setting that named it, for refusals.

    Attributes:
        manifest: What it says of itself.

    Raises:
        UserError: If there is no manifest of this format, or it is damaged.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.manifest = _read_manifest(folder, key)
        self._folder, self._key = folder, key
        self._codec = codec_of(self.manifest)
        self._places: dict[int, tuple[int, int]] = {}
        self._ready: dict[tuple[int, ...], Sparse | Tensor] = {}
        # Each open shard is a file handle and a mapping, so only so many stay open.
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(
            lambda number: _Shard(folder / shard_name(number))
        )

    @property
    def vocabulary(self) -> int:
        """V: how many tokens (or classes) the teacher's distributions are over."""
        return self.manifest["vocabulary"]

    def check(self, expected: Mapping[str, object], windows: Windows, rows: np.ndarray) -> None:
        """Refuse a cache that was made from something else, is damaged, or holds other windows;
        learn where they lie.

        Args:
            expected: What the reader trains with, by the names in `SAME`.
            windows: As the reader packs them.
            rows: Numbers of those it will ask for, shape (W,).

        Raises:
            UserError: One line that says what differs.
        """
        for name, words in SAME.items():
            if name in expected and self.manifest.get(name) != expected[name]:
                text = words.format(theirs=self.manifest.get(name), ours=expected[name])
                raise _refused(self._key, f"the cache was made with {text}")
        # Before windows are compared: this also learns where each one lies.
        for number, entry in enumerate(self.manifest["shards"]):
            self._check_shard(number, entry)
        self._check_windows(windows, rows)

    def _check_shard(self, number: int, entry: CacheShard) -> None:
        name = shard_name(number)
        path = self._folder / name
        if not path.is_file():
            raise _refused(self._key, f"{name} of the cache is missing")
        if file_sha256(path) != entry["sha256"]:
            raise _refused(
                self._key, f"{name} of the cache is damaged: it does not have its checksum"
            )
        try:
            shard: _Shard = self._shard(number)
        except SafetensorError as error:
            raise _refused(self._key, f"{name} of the cache cannot be read ({error})") from error
        self._places |= {int(row): (number, slot) for slot, row in enumerate(shard.windows)}

    def _check_windows(self, windows: Windows, rows: np.ndarray) -> None:
        """Compare every window that will be read with what it was captured for."""
        absent = [row for row in rows.tolist() if row not in self._places]
        if absent:
            raise _refused(
                self._key,
                f"the cache lacks {len(absent)} of the {how_many(len(rows), 'window')} of this"
                f" training (the first: {absent[0]})",
                "have the capture's `like` name this stage",
            )
        for row in rows.tolist():
            number, slot = self._places[row]
            shard = self._shard(number)
            if _digest(windows.content(row), shard.part(slot)) != shard.digests[slot].tobytes():
                raise _refused(
                    self._key,
                    f"window {row} of the cache was captured for other tokens: it is shuffled",
                )

    def target(self, rows: Sequence[int]) -> Sparse | Tensor:
        """Return the teacher's distributions of all predicted tokens of some windows, in order
        (call `check` first).

        Sparse entries of (N, K), or logits (N, C) of examples.
        """
        # Removed when taken: memory holds only what was read ahead.
        ready = self._ready.pop(tuple(rows), None)
        return self._read(rows) if ready is None else ready

    def read_ahead(self, rows: Sequence[int]) -> None:
        """Read what `target` will be asked for, once, while another thread trains."""
        self._ready[tuple(rows)] = self._read(rows)

    def _read(self, rows: Sequence[int]) -> Sparse | Tensor:
        parts = list(self._parts(rows))
        return self._codec.unpack(
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        )

    def _parts(self, rows: Sequence[int]) -> Iterator[Columns]:
        for row in rows:
            number, slot = self._places[row]
            yield self._shard(number).part(slot)


def _read_manifest(folder: Path, key: str) -> CacheManifest:
    """Return the manifest of a cache.

    Raises:
        UserError: If there is none of this format, or it is damaged.
    """
    found: Any = read_json(folder / MANIFEST)
    if _format_of(found) != FORMAT:
        raise _refused(
            key,
            f"{folder} has no manifest of format {FORMAT}: the capture did not end, or is older",
        )
    # Removed before it is compared: the digest does not cover itself.
    if found.pop("digest", None) != key_of(**found):
        raise _refused(key, f"{MANIFEST} of the cache is damaged: it does not have its digest")
    return found


def _format_of(manifest: Any) -> Any:
    return manifest.get("format") if isinstance(manifest, dict) else None


def codec_of(facts: CacheFacts) -> Codec:
    """Return what packs and unpacks the distributions of a cache, by what its manifest says."""
    draws, k, temperature = facts["draws"], facts["k"], facts["temperature"]
    if facts["method"] == Sampled.method:
        assert draws is not None
        assert temperature is not None
        return Sampled(draws, facts["vocabulary"], temperature)
    if facts["method"] == TopK.method:
        assert k is not None
        assert temperature is not None
        return TopK(k, facts["vocabulary"], temperature)
    return Dense(facts["vocabulary"])


def write_manifest(folder: Path, facts: CacheFacts, shards: Sequence[CacheShard]) -> CacheManifest:
    """Write the manifest of a cache whose shards are all there, and return it.

    Args:
        facts: What it was made from and with.
        shards: By number: `sha256`, `windows`, `tokens`, `bytes`.
    """
    import transformers

    first = _Shard(folder / shard_name(0)).part(0)
    num_tokens, num_bytes = (sum(shard[name] for shard in shards) for name in ("tokens", "bytes"))
    manifest: CacheManifest = {
        "format": FORMAT,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **facts,
        "columns": {name: str(column.dtype) for name, column in sorted(first.items())},
        "windows": sum(shard["windows"] for shard in shards),
        "tokens": num_tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / num_tokens,
        "shards": list(shards),
    }
    seal_manifest(folder, manifest)
    return manifest


def seal_manifest(folder: Path, manifest: CacheManifest) -> None:
    """Write a manifest with a digest of what it says."""
    write_json(folder / MANIFEST, {**manifest, "digest": key_of(**manifest)})


def place(source: Path, target: Path) -> None:
    """Give a finished shard a second name in the artifact's folder; a copy where the disk has no
    links.
    """
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())
        sync_path(target)


def _refused(
    key: str, problem: str, remedy: str = "capture it anew, or name another cache"
) -> UserError:
    return UserError(key, problem, remedy)
