"""Files that a user names, read as text: regular ones of a sane size, whatever else carries the
name.

A pipe has nobody write to it for hours, a device gives bytes for ever: both are refused before a
byte is read.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from pipeline.errors import UserError

MAX_BYTES = 64 * 2**20  # of a file that is read whole; data files have readers of their own
PIECE = 2**20  # bytes
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class NotAFile(OSError):
    """What lies there is no regular file, or an absurdly large one."""


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading, links followed; nothing else is waited for.

    Raises:
        NotAFile: If it is a folder, a pipe, a device or a socket.
        OSError: If it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in its name
        raise NotAFile(str(error)) from None
    kind = next((name for is_kind, name in _KINDS if is_kind(os.fstat(handle).st_mode)), None)
    if kind is not None:
        os.close(handle)
        raise NotAFile(f"is {kind}, not a file")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, *, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file, links followed.

    Raises:
        NotAFile: If it is a folder, a pipe, a device or a socket, or longer than `limit` bytes.
        OSError: If it cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        pieces, left = list[bytes](), limit + 1 if size <= limit else 0
        # By its size, and then piece by piece: what the kernel makes up has none, and what is asked
        # for is allocated.
        while left > 0 and (piece := file.read(min(left, size + 1 if not pieces else PIECE))):
            pieces.append(piece)
            left -= len(piece)
        if left <= 0:
            raise NotAFile(f"is larger than {limit:,} bytes")
    return b"".join(pieces)


def why_no_file(path: Path) -> str | None:
    """Return why what lies there cannot be read as a file, or None."""
    try:
        open_file(path).close()
    except NotAFile as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def read_text_file(path: Path, key: str, remedy: str, *, limit: int = MAX_BYTES) -> str:
    """Return the text of a file that the setting `key` names; a byte order mark is no text.

    Raises:
        UserError: If it cannot be read, is no regular file, is too large, or is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit).decode("utf-8-sig")
    except NotAFile as error:
        raise UserError(key, f"{path} {error}", remedy) from None
    except OSError as error:
        raise UserError(key, f"{path}: {error.strerror}", remedy) from None
    except UnicodeDecodeError as error:
        raise UserError(
            key, f"{path} cannot be read: it is not UTF-8 (byte {error.start})", remedy
        ) from None
