"""Where benchmarks leave what they measured: JSON and raw log, with all that the figures depend
on.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
T = TypeVar("T")


def attempt(call: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what a call gave, or None and in one line what ended it: one arm never ends the
    others.
    """
    try:
        return call(), None
    # Compilers and devices fail in their own ways: Triton's errors are plain exceptions.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        said = str(error).strip().partition("\n")[0]
        return None, f"{type(error).__name__}: {said}"


LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate", "hydra-core", "mlflow")


def save_result(script: str, figures: dict[str, Any], log: str, *, part: str = "") -> Path:
    """Write `results/<script>-<device>-<date>.json` and `.log`; return the JSON's path.

    Args:
        part: Of what the script measures, where it has several: `<script>-<part>-...`.
    """
    device = describe_device()
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    name = re.sub(r"[^a-z0-9]+", "-", device["short"].lower()).strip("-")
    path = RESULTS / f"{'-'.join(filter(None, (script, part, name, date)))}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "script": script,
        "date": date,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **_source(script),
        "device": device,
        "libraries": _libraries(),
        "figures": figures,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".log").write_text(log.rstrip() + "\n", encoding="utf-8")
    print(f"saved {path}")
    return path


@cache
def describe_device() -> dict[str, Any]:
    """Return the device by name; of GPUs UUID, driver and power limit too."""
    query = "name,uuid,driver_version,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        rows = [
            dict(zip(query.split(","), line.split(", "), strict=True))
            for line in done.stdout.splitlines()
        ]
    except (FileNotFoundError, subprocess.CalledProcessError):
        rows = []
    cores = os.cpu_count()
    if rows:
        return {"short": rows[0]["name"], "gpus": rows, "cores": cores}
    return {
        "short": f"cpu-{cores}",
        "name": _processor(),
        "machine": platform.machine(),
        "cores": cores,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _source(script: str) -> dict[str, Any]:
    """Return the commit, whether the tree differs from it, and the digest of the script; without
    git or its folder neither of the first two is known.
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    text = (Path(__file__).parent / f"{script}.py").read_bytes()
    return {
        "commit": commit or os.environ.get("BENCHMARK_COMMIT"),
        "dirty": None if changed is None else bool(changed),
        "script_sha256": hashlib.sha256(text).hexdigest(),
    }


def _git(*args: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
