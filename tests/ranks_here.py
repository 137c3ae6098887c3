"""Starting the ranks of a test: one process each, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
from forked import Forked

PROJECT = Path(__file__).parent.parent


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return what tells a process which rank it is, as torchrun does."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {
        **outside,
        "RANK": f"{rank}",
        "WORLD_SIZE": f"{size}",
        "LOCAL_RANK": f"{rank}",
        "LOCAL_WORLD_SIZE": f"{size}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{PROJECT}",
    }


def start(
    commands: Sequence[Sequence[str]],
    cwd: Path,
    *,
    port: int | None = None,
    size: int | None = None,
) -> list[subprocess.Popen[str]]:
    """Start one rank for each command, which begins after `python`.

    Args:
        size: Ranks that there are said to be; None: as many as commands.
    """
    port = free_port() if port is None else port
    more: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=rank_environment(rank, size or len(commands), port),
            **more,
        )
        for rank, command in enumerate(commands)
    ]


def ended(
    processes: Sequence[subprocess.Popen[str]], timeout: float = 150
) -> list[tuple[int, str, str]]:
    """Return how each rank ended: exit code, output, errors."""
    found: list[tuple[int, str, str]] = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=timeout)
            found.append((process.returncode, output, errors))
    finally:
        for process in processes:
            process.kill()
    return found


def forked_ranks(
    cwd: Path, *args: str, code: str | None = None, size: int = 2, timeout: float = 200
) -> list[tuple[int, str, str]]:
    """Return how each rank of a command ended that begins where imports have ended
    (`tests/forked.py`).
    """
    port = free_port()
    ranks: list[Forked] = []
    for rank in range(size):
        environment = rank_environment(rank, size, port)
        ranks.append(forked.start(cwd, *args, code=code, env=environment))
    found: list[tuple[int, str, str]] = []
    try:
        for rank in ranks:
            output, errors = rank.communicate(timeout)
            assert rank.returncode is not None
            found.append((rank.returncode, output, errors))
    finally:
        for rank in ranks:
            rank.kill()
    return found
