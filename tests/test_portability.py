"""Another type of device without rewrites: recipes run on an accelerator that the tests compile.

It is none of the kinds that the package knows by name: torch calls it `ersatz`. What ran there is
never taken for what ran on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from test_faults import SMALL

HERE = Path(__file__).resolve().parent / "accelerator"
ROOT = HERE.parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def built() -> Path:
    """Return the folder of the compiled accelerator: once a source and release of torch."""
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {missing[0]} is here, which compiles the accelerator")
    source = (HERE / "backend.cpp").read_bytes() + torch.__version__.encode()
    name = f"ersatz-{os.getuid()}-{hashlib.sha256(source).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir(), name)
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not list(folder.glob("*.so")):
            command = [sys.executable, str(HERE / "build.py"), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder


def start(cwd: Path, built: Path | None, *words: str) -> dict[str, Any]:
    """Run a recipe, with the accelerator or without it; return its result."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if built is not None:
        environment |= {"ERSATZ": str(built), "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words, *SMALL, "precision=fp32"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((cwd / "mlruns/latest/result.json").read_text())
    return found


def operations(built: Path) -> int:
    """Return how many operations the processes of so far did on the device."""
    return sum(int(path.read_text()) for path in built.glob("used/*"))


def test_a_recipe_runs_there_and_is_never_taken_for_one_of_the_cpu(
    built: Path, tmp_path: Path
) -> None:
    before = operations(built)
    result = start(tmp_path, built, "recipe=baseline")
    assert operations(built) > before + 1000
    assert result["device"]["kind"] == "ersatz"
    assert result["device"]["name"].startswith("ersatz")
    (row,) = result["rows"]
    assert (row["status"], row["reused"]) == ("FINISHED", None)
    assert row["ledger"]["placement"]["device_names"] == [result["device"]["name"]]
    hours = row["ledger"]["gpu_hours"]["attached"]
    assert hours["value"] is None
    assert hours["why_missing"]
    peak = next(value for name, value in row["ledger"]["memory"].items() if "peak" in name)
    assert "ersatz" in (peak["why_missing"] or "")

    again = start(tmp_path, built, "recipe=baseline")
    assert [each["reused"] for each in again["rows"]] == [result["run_id"]]

    on_cpu = start(tmp_path, None, "recipe=baseline")
    assert on_cpu["device"]["kind"] == "cpu"
    assert [each["reused"] for each in on_cpu["rows"]] == [None]
    here, there = (
        each["rows"][0]["quality"]["bits_per_byte"]["value"] for each in (on_cpu, result)
    )
    assert here == pytest.approx(there, rel=1e-2)  # other kernels round otherwise

    told = start(tmp_path, built, "recipe=baseline", "hardware.device=cpu")
    assert told["device"]["kind"] == "cpu"
    assert [each["reused"] for each in told["rows"]] == [on_cpu["run_id"]]


def test_a_student_is_distilled_there(built: Path, tmp_path: Path) -> None:
    before = operations(built)
    result = start(tmp_path, built, "recipe=distill", "stages.student.allow_weak_teacher=true")
    assert operations(built) > before + 1000
    assert result["device"]["kind"] == "ersatz"
    assert {row["status"] for row in result["rows"]} == {"FINISHED"}
    assert {row["arm"] for row in result["rows"]} >= {"teacher", "student"}
