"""Who waits for longer than two seconds reads for what."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from pipeline.store import waiting
from pipeline.store.waiting import locked, waiting_for


def test_a_long_wait_says_for_what_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "EVERY_S", 0.05)
    with waiting_for("the server to answer", after_s=0.05):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("waiting for the server to answer (") for line in lines)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""  # it is over


def test_a_short_wait_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), waiting_for("nothing"):
        _ = 1 / 0
    assert capsys.readouterr().err == ""


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_that_another_process_holds_is_waited_for_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Timeout), locked(lock, "another process", timeout_s=waiting.AFTER_S + 0.5):
        raise AssertionError("it was held")
    assert capsys.readouterr().err.startswith("waiting for another process (2 s so far)")
    holder.communicate("\n", timeout=60)
    with locked(lock, "nobody"), pytest.raises(Timeout):
        FileLock(lock).acquire(timeout=0)
    FileLock(lock).acquire(timeout=0)  # let go of


@pytest.mark.slow
def test_a_slow_hub_is_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig

    from pipeline.errors import UserError
    from pipeline.models.load import load_config

    def slow(*_: object, **__: object) -> None:
        time.sleep(waiting.AFTER_S + 0.3)
        raise OSError("no route to host")

    monkeypatch.setattr(AutoConfig, "from_pretrained", slow)
    monkeypatch.setattr("pipeline.store.hub._why_unreachable", lambda _: None)
    monkeypatch.setattr("pipeline.store.hub._known", {})
    with pytest.raises(UserError, match="no route to host"):
        load_config("somebody/some-model")
    assert capsys.readouterr().err.startswith(
        "waiting for the Hugging Face Hub to give somebody/some-model (2 s"
    )
