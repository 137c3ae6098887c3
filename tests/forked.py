"""Commands in processes of their own that begin where imports have ended: a second, where a fresh
one takes seven.

A server that has imported what a run imports, and done nothing else, forks a child for every
command. The child is as fresh as any: its own pid, signals, outputs, folder and environment; only
the time of imports is not in its ledger. What is about imports, or about the interpreter's start,
starts a process from scratch instead.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

IMPORTS = (
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto",
    "pipeline.cli.main",
    "pipeline.runs.loop",
    "pipeline.evaluation.quality.assess",
    "pipeline.stages.training",
    "pipeline.runs.comparison",
    "pipeline.models.student",
    "pipeline.runs.gate_ending",
    "pipeline.runs.assemble",
    "pipeline.quantization.bnb",
    "pipeline.data.embedded",
    "pipeline.data.tokenizer",
    "hydra.utils",
    "rich.progress",
    "torch.utils.flop_counter",
    "transformers.models.auto.tokenization_auto",
)
MAX_REQUEST = 2**20  # bytes


class Forked:
    """A command under way; as much of `subprocess.Popen` as tests ask for."""

    def __init__(
        self, cwd: Path, args: list[str], code: str | None, env: Mapping[str, str]
    ) -> None:
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        request = {"cwd": str(cwd), "args": args, "code": code, "env": dict(env)}
        socket.send_fds(
            _server(),
            [json.dumps(request).encode()],
            [theirs.fileno(), write, self._errors.fileno()],
        )
        theirs.close()
        os.close(write)
        self._status = ours.makefile("rb")
        ours.close()
        self.stdout = os.fdopen(read, encoding="utf-8")
        self.pid = int(self._status.readline())
        self.returncode: int | None = None
        self._ended = threading.Thread(target=self._wait, daemon=True)
        self._ended.start()

    def _wait(self) -> None:
        with self._status:
            self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Return what it wrote to stdout (beyond what was read of it) and stderr, once it has
        ended.
        """
        told: list[str] = []
        reader = threading.Thread(target=lambda: told.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        self._ended.join(timeout)
        if self.returncode is None or not told:
            raise subprocess.TimeoutExpired("forked", timeout)
        self.stdout.close()
        with self._errors:
            self._errors.seek(0)
            return told[0], self._errors.read()


def start(
    cwd: Path, *args: str, code: str | None = None, env: Mapping[str, str] = os.environ
) -> Forked:
    """Start `python -m pipeline ARGS`, or `python -c CODE ARGS`, in a folder and with the
    environment of now, or another one.
    """
    return Forked(cwd, list(args), code, env)


def run(
    cwd: Path, *args: str, code: str | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Return how the command ended."""
    process = start(cwd, *args, code=code)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(args, process.returncode, out, err)


@cache
def _server() -> socket.socket:
    """Return the line to the server of this process, which ends when this process does."""
    ours, theirs = socket.socketpair()
    server = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait(timeout=60)

    atexit.register(end)
    return ours


# -- in the server --------------------------------------------------------------------------------


def _serve(line: socket.socket) -> dict[str, Any]:
    """Fork a watcher for every request, and have that fork the command; return in the command, with
    its request.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for watchers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    while True:
        raw, fds, _, _ = socket.recv_fds(line, MAX_REQUEST, 3)
        if not raw:
            os._exit(0)
        if os.fork():
            for fd in fds:
                os.close(fd)
            continue
        line.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        told = socket.socket(fileno=fds[0])
        if not pid:
            told.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, fd in enumerate(fds[1:], start=1):
                os.dup2(fd, number)
                os.close(fd)
            return json.loads(raw)
        for fd in (1, 2, *fds[1:]):
            os.close(fd)
        told.sendall(b"%d\n" % pid)
        told.sendall(b"%d\n" % os.waitpid(pid, 0)[1])
        os._exit(0)


def _become(request: dict[str, Any]) -> None:
    from once import keep_tokenizers
    from quiet import quiet_unless_asked

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    quiet_unless_asked()
    keep_tokenizers()
    sys.path[0] = ""
    if request["code"] is None:
        sys.argv = ["pipeline", *request["args"]]
        runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *request["args"]]
        exec(request["code"], {"__name__": "__main__"})


if __name__ == "__main__":
    for each in IMPORTS:
        __import__(each)
    assert threading.active_count() == 1, "a fork takes one thread along"
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
