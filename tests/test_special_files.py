"""What a user names as a file and is none: a pipe, a device, a folder, something without end. One
line, at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest

from pipeline.config.text_files import NotAFile, read_bytes, read_text_file
from pipeline.data.completions import file_digest
from pipeline.errors import UserError
from pipeline.evaluation.quality.recorded import _columns, values_digest
from pipeline.evaluation.quality.tasks import _load_yaml
from pipeline.evaluation.serving.engine import read_result
from pipeline.tasks.table import Task

KINDS = ("pipe", "folder", "/dev/zero", "/dev/random", "/dev/null", "socket")
READERS = {
    "serving.results": lambda path: read_result(path, "serving.results"),
    "candidate_items": lambda path: _columns(path, Task.causal_lm, "candidate_items"),
    "quality.tasks": _load_yaml,
    "recipe": lambda path: read_text_file(path, "recipe", "mend it"),
}


def place(tmp_path: Path, kind: str) -> Path:
    """Return a link to such a thing: links are followed before a look is taken."""
    made = tmp_path / "made"
    if kind == "pipe":
        os.mkfifo(made)
    elif kind == "folder":
        made.mkdir()
    elif kind == "socket":
        with contextlib.chdir(tmp_path), socket.socket(socket.AF_UNIX) as held:
            held.bind("made")
    else:
        made = Path(kind)
    (tmp_path / "link.json").symlink_to(made)
    return tmp_path / "link.json"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = place(tmp_path, kind)  # one that is read waits for a writer, for ever
    for key, read in READERS.items():
        with pytest.raises(UserError, match=r"link\.json(:| is a)") as caught:
            read(path)
        assert caught.value.key == key
    for digest in (lambda: file_digest(str(path)), lambda: values_digest(path)):
        with pytest.raises(OSError, match=r"is a|No such device"):
            digest()


def test_what_is_absurdly_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**40)  # holes: nothing on the disk
    for read in READERS.values():
        with pytest.raises(UserError, match=r"large\.json is larger than [\d,]+ bytes"):
            read(tmp_path / "large.json")


def test_what_grows_while_it_is_read_ends_at_the_limit() -> None:
    assert read_bytes(Path("/proc/self/status"))  # the kernel says it has no bytes
    with pytest.raises(NotAFile, match="larger than 100 bytes"):
        read_bytes(Path("/proc/self/status"), limit=100)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"[" * 100_000, b"{", b"", b"1e999", b"[1, NaN]", b'{"a": 1' + b"0" * 5000],
)
def test_what_is_no_record_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    for key in ("serving.results", "candidate_items"):
        with pytest.raises(UserError, match=r"x\.json"):
            READERS[key](path)
