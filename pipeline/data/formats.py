"""One local file to rows of fields, whatever its format and compression; every fault is named with
file and line.

JSON, JSON lines, CSV and TSV are read by the standard library, which can name a line; Parquet,
Arrow and Feather by pyarrow. Nothing is unpickled, imported or run.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pipeline.config.text_files import open_file, why_no_file
from pipeline.data.arrow_rows import read_arrow
from pipeline.data.cells import FILE, Row, Table
from pipeline.data.csv_rows import read_csv
from pipeline.data.json_rows import read_json, read_json_lines, split_rows
from pipeline.data.split_names import pick_splits
from pipeline.data.trec import read_trec
from pipeline.errors import UserError
from pipeline.ledger.numbers import how_many

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "text",
    ".label": "trec",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
SHOWN = ".json .jsonl .ndjson .csv .tsv .parquet .arrow .feather .txt"
"""The endings, as refusals list them."""
SHOWN_COMPRESSIONS = " ".join(COMPRESSIONS)
LFS = b"version https://git-lfs.github.com/spec/"
PICKLED = [".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib", ".h5"]
NUL_SHARE = 0.01  # of the characters; a text with more is none, or in another encoding


def kind_of(path: Path) -> tuple[str | None, str]:
    """Return a file's format (a value of `FORMATS`; None where its ending is unknown) and its
    compression or "".
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (FORMATS.get(suffixes[-1]) if suffixes else None), packed


def stem_of(path: Path) -> str:
    """Return a file's name without the endings that say how it is written: `a.b.jsonl.gz` is
    `a.b`.
    """
    name = path.name
    if Path(name).suffix.lower() in COMPRESSIONS:
        name = Path(name).stem
    return Path(name).stem if Path(name).suffix.lower() in FORMATS else name


def read_table(path: Path, key: str) -> Table:
    """Read one file.

    Args:
        key: The setting that named it, for refusals.

    Raises:
        UserError: If it cannot be read, naming file and line.
    """
    table = _read(path, key)
    table.name = path.name
    return table


def _read(path: Path, key: str) -> Table:
    kind, packed = kind_of(path)
    refuse_special(path, key)
    if kind is None:
        raise _unknown_ending(path, key)
    raw = _unpacked(path, packed, key)
    if kind in ("parquet", "arrow"):
        return read_arrow(path, raw, kind, key)
    notes: list[str] = []
    text = _decoded(path, raw, notes, key, latin=kind == "trec")
    if not text.strip():
        raise UserError(key, f"{path} is empty", "give a file with documents")
    readers: dict[str, Callable[[Path, str, str, list[str]], list[Row]]] = {
        "jsonl": read_json_lines,
        "json": read_json,
        "csv": read_csv,
        "tsv": partial(read_csv, expected="\t"),
        "text": _text,
        "trec": read_trec,
    }
    return Table(readers[kind](path, text, key, notes), notes)


def read_text(path: Path, key: str, notes: list[str], *, latin: bool = False) -> str:
    """Return the text of one file, whatever its ending.

    Args:
        latin: Whether a text that is no UTF-8 is read as Latin-1, which is said, and not refused.

    Raises:
        UserError: If it cannot be read.
    """
    refuse_special(path, key)
    return _decoded(path, _unpacked(path, kind_of(path)[1], key), notes, key, latin=latin)


def read_splits(
    path: Path, chosen: Mapping[str, str], key: str
) -> tuple[dict[str, Table], list[str]] | None:
    """Return the tables of a JSON file that holds the rows of several splits, with notes; None for
    another file.

    Args:
        chosen: By split, the name that is meant (`data.splits`).

    Raises:
        UserError: If two could be one split.
    """
    if kind_of(path)[0] != "json":
        return None
    notes: list[str] = []
    found = split_rows(path, read_text(path, key, notes), chosen.values(), key)
    if found is None:
        return None
    picked, more = pick_splits(found, chosen, key)
    notes.append(f"{path.name} holds {', '.join(picked)}")
    return {split: Table(rows, name=f"{split} of {path.name}") for split, rows in picked.items()}, [
        *notes,
        *more,
    ]


def refuse_special(path: Path, key: str) -> None:
    """Refuse what is no regular file: opening a pipe waits for ever, and a device has no end.

    Raises:
        UserError: Naming what it is.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(key, f"{path} is a link to nothing", "mend the link, or remove it")
    if not path.exists():
        raise UserError(key, f"{path} is not a file", "give a file or a folder of splits")
    why = why_no_file(path)
    if why is not None:
        raise UserError(key, f"{path} {why}", "give a file or a folder of splits")


def _unknown_ending(path: Path, key: str) -> UserError:
    suffix = path.suffix.lower()
    if suffix in (".tar", ".tgz", ".7z", ".rar") or ".tar" in [
        each.lower() for each in path.suffixes
    ]:
        return UserError(key, f"{path.name} is an archive", "unpack it and give the folder")
    if suffix in PICKLED:
        return UserError(
            key,
            f"{path.name} may hold a program, and is never opened",
            f"save it as one of {SHOWN}",
        )
    if suffix in (".xlsx", ".xls", ".ods"):
        return UserError(key, f"{path.name} is a spreadsheet", "save it as CSV")
    known = f"{SHOWN.replace(' ', ', ')} (also with {SHOWN_COMPRESSIONS.replace(' ', ', ')})"
    return UserError(key, f"{path.name} has an unknown ending", f"give one of {known}")


def _unpacked(path: Path, packed: str, key: str) -> bytes:
    try:
        with open_file(path) as file:
            raw = file.read()
    except OSError as error:
        raise UserError(
            key, f"{path} cannot be read ({error.strerror})", "check the file"
        ) from None
    if raw.startswith(LFS):
        raise UserError(
            key, f"{path.name} is a Git LFS pointer, not the data", "run git lfs pull there"
        )
    unpack = {
        ".gz": gzip.decompress,
        ".bz2": bz2.decompress,
        ".xz": lzma.decompress,
        ".zst": _unzst,
        ".zip": _unzip,
    }
    if not packed:
        return raw
    try:
        return unpack[packed](raw)
    except (
        OSError,
        EOFError,
        ValueError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        RuntimeError,
        NotImplementedError,
    ) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(key, f"{path.name} cannot be unpacked ({text})", "write it anew") from None


def _unzst(raw: bytes) -> bytes:
    import pyarrow as pa

    with pa.CompressedInputStream(pa.py_buffer(raw), "zstd") as stream:
        return stream.read()


def _unzip(raw: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = [
            name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name
        ]
        if len(names) != 1:
            raise ValueError(
                f"it holds {how_many(len(names), 'file')}; unpack it and give the folder"
            )
        return archive.read(names[0])


MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def _decoded(path: Path, raw: bytes, notes: list[str], key: str, *, latin: bool) -> str:
    """Return the text of a file: UTF-8, or UTF-16 and UTF-32 where a byte order mark or its zero
    bytes say so.

    Args:
        latin: Whether the file is of a kind that is older than UTF-8: then it is Latin-1 where it
            is no UTF-8.
    """
    mark, encoding = next(
        ((mark, name) for mark, name in MARKS if raw.startswith(mark)), (b"", None)
    )
    encoding = encoding or _encoding_by_zeros(raw) or "utf-8"
    try:
        text = raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if latin and encoding == "utf-8":
            notes.append(f"{path.name} is no UTF-8, and is read as LATIN-1")
            return _universal_newlines(raw.decode("latin-1"))
        line = raw[len(mark) :][: error.start].count("\n".encode(encoding)) + 1
        name = encoding.upper().removesuffix("-LE").removesuffix("-BE")
        raise UserError(
            key, f"{path.name} line {line} is not {name}", "save the file as UTF-8"
        ) from None
    zeros = text.count("\0")
    if zeros > NUL_SHARE * len(text):
        line = text[: text.index("\0")].count("\n") + 1
        problem = (
            f"{path.name} line {line} has NUL bytes: this is no text, or in an unknown encoding"
        )
        raise UserError(key, problem, "save the file as UTF-8")
    if zeros:
        notes.append(f"{path.name} has {zeros} NUL characters in its text")
    if encoding != "utf-8":
        notes.append(f"{path.name} is read as {encoding.upper()}")
    return _universal_newlines(text)


def _encoding_by_zeros(raw: bytes) -> str | None:
    """Return which UTF-16 bytes are without a mark, by where their zero bytes stand; a text in
    UTF-8 has none.

    Letters below U+0100 leave the high byte zero, and so do blanks and line ends in every script.
    """
    head = raw[: 64 * 1024]
    if len(raw) % 2:
        return None
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) <= NUL_SHARE * len(head) / 2 or max(even, odd) < 4 * min(even, odd):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _universal_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _text(path: Path, text: str, key: str, notes: list[str]) -> list[Row]:
    """Documents are paragraphs where blank lines separate any, else lines."""
    del key
    paragraphs = "\n\n" in text.strip()
    blocks = text.split("\n\n" if paragraphs else "\n")
    notes.append(f"{path.name}: a document is a {'paragraph' if paragraphs else 'line'}")
    return [
        (f"{path.name} document {number}", {"text": block.strip("\n"), FILE: path.name})
        for number, block in enumerate(blocks, 1)
        if block.strip()
    ]
