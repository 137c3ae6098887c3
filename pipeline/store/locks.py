"""Locks by files: who holds one keeps every other process off it, and the kernel frees it when its
holder dies.

Not every storage has them: Lustre mounted without `flock` and NFS without its lock daemon refuse
them, and some file systems in user space grant them to everybody. A folder there is refused, since
two commands would write one journal.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

NOW = fcntl.LOCK_EX | fcntl.LOCK_NB
REMEDY = (
    "mount it with locks (Lustre: flock, NFS: without nolock), or give a folder of this host, and"
    " share artifacts by store.url"
)
_sound: set[int] = set()
"""Storages (as `st_dev`) whose locks have been tried in this process."""


def lock_at(path: Path) -> Any:
    """Return the lock, not yet held, that the file at `path` is.

    Returns:
        A `filelock.FileLock`.

    Raises:
        UserError: If the storage there keeps nobody off.
    """
    from filelock import FileLock

    check_locks(path.parent)
    return FileLock(path)


def check_locks(folder: Path, key: str = "tracking.root") -> None:
    """Refuse a folder where locks do not work; one that cannot be written to is let pass.

    Args:
        key: The setting that names it.

    Raises:
        UserError: If locks fail there, or two holders of one are not kept apart.
    """
    with suppress(OSError):  # what else is wrong with the folder, its user will find
        storage = os.stat(folder).st_dev
        if storage not in _sound:
            why = why_no_locks(folder)
            if why is not None:
                raise UserError(key, f"{folder}: {why}", REMEDY)
            _sound.add(storage)


def why_no_locks(folder: Path) -> str | None:
    """Return why locks of files in a folder hold nobody off; None where they do.

    Raises:
        OSError: If no file can be made there.
    """
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as first,
        open(first.name, "r+b") as second,
    ):
        try:
            fcntl.flock(first, NOW)
        except OSError as error:
            return f"its storage has no locks of files ({error.strerror})"
        return None if is_held(second) else "its locks of files keep nobody off"


def is_held(file: Any) -> bool:
    """Tell whether somebody else holds the lock of an open file; else it is taken.

    The file has to be open for writing: NFS takes an exclusive lock for no other.
    """
    try:
        fcntl.flock(file, NOW)
    except OSError:  # BlockingIOError; of some file systems PermissionError
        return True
    return False
