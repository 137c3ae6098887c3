"""Full disks, damaged files and jumping clocks: the command says what is wrong, and the same one
goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import run, start
from here import here
from test_faults import SMALL, hours, results

pytestmark = [pytest.mark.faults, pytest.mark.slow]

FULL_AT_THE_END = """
import json, os, sys, time
from pathlib import Path
from pipeline.runs import assemble
from pipeline.cli import main as cli

real, filler = assemble.build_result, Path("filler")

def fill():
    with filler.open("wb") as file:
        for size in (2**20, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
                    file.flush()
            except OSError:
                continue

def full(*args):
    result = real(*args)
    if not filler.exists():
        fill()
    return result

assemble.build_result = full
codes = []
for _ in range(2):
    codes.append(cli.main(sys.argv[1:], started_ns=time.monotonic_ns()))
    filler.write_bytes(b"")  # there is room again
print("codes", json.dumps(codes))
"""


def _in_a_small_disk(
    out: Path, code: str, *args: str, num_mib: int
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a file system of its own of this size; what it leaves is copied to
    `out`.
    """
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    disk = out.parent / "disk"
    disk.mkdir()
    out.mkdir()
    inner = (
        f'mount -t tmpfs -o size={num_mib}m tmpfs "$1" || exit 99; cd "$1"; out=$2; shift 2; '
        '"$@"; code=$?; cp -r . "$out"; exit $code'
    )
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        inner,
        "sh",
        str(disk),
        str(out),
        sys.executable,
        "-c",
        code,
        *args,
    ]
    there = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=there, timeout=600, check=False
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip("no file system can be mounted here")
    return done


def test_a_disk_that_is_full_at_the_end_loses_nothing_that_was_made(tmp_path: Path) -> None:
    args = ["recipe=baseline", *SMALL, "training.steps=10"]
    done = _in_a_small_disk(tmp_path / "out", FULL_AT_THE_END, *args, num_mib=300)
    assert "Traceback" not in done.stderr, done.stderr
    (codes,) = [line for line in done.stdout.splitlines() if line.startswith("codes")]
    assert codes == "codes [1, 0]", done.stderr
    assert (
        len([line for line in done.stderr.splitlines() if "disk" in line or "No space" in line])
        == 1
    )
    (result,) = results(tmp_path / "out")
    assert result["status"] == "FINISHED"
    assert sum(hours(row, "work") for row in result["rows"]) > 0


def test_a_full_temporary_folder_is_no_reason_to_fail(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pipeline.cli import main as cli
os.environ["TMPDIR"] = os.getcwd() + "/full"
os.mkdir("full")
os.system("mount -t tmpfs -o size=4k tmpfs full; head -c 4096 /dev/zero > full/x 2>/dev/null; true")
sys.exit(cli.main(sys.argv[1:], started_ns=time.monotonic_ns()))
"""
    args = ["recipe=quantize", *SMALL, "stages.reference.steps=4"]
    done = _in_a_small_disk(tmp_path / "out", code, *args, num_mib=400)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr


JUMPS = """
import sys, time
from pipeline.cli import main as cli

real, begun = time.time, time.time()
jumps = (0, 86_400, -86_400, -10 * 365 * 86_400, 0)

def jumping():
    passed = real() - begun
    return real() + jumps[int(passed * 2) % len(jumps)]

time.time = jumping
sys.exit(cli.main(sys.argv[1:], started_ns=time.monotonic_ns()))
"""


def test_a_wall_clock_that_jumps_changes_no_figure(tmp_path: Path) -> None:
    before = time.monotonic()
    done = run(
        tmp_path, "recipe=baseline", *SMALL, "training.steps=40", "tracking.mlflow=true", code=JUMPS
    )
    elapsed_h = (time.monotonic() - before) / 3600
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (result,) = results(tmp_path)
    total = result["run"]["device_hours"]["total"]["value"]
    assert 0 < total <= elapsed_h
    assert all(0 < hours(row, "work") <= total for row in result["rows"])


CACHED = [
    "recipe=distill_cached",
    *SMALL,
    "stages.teacher.steps=4",
    "stages.student.steps=6",
    "stages.student.allow_weak_teacher=true",
    "model.shape.layers=2",
]


def test_a_damaged_teacher_cache_is_made_again_and_said(tmp_path: Path) -> None:
    done = here(tmp_path, *CACHED)
    assert done.returncode == 0, done.stderr
    (first,) = results(tmp_path)
    (cache,) = [
        row["artifact"]
        for row in first["rows"]
        if (row["artifact"] or {}).get("kind") == "teacher_cache"
    ]
    shard = max(
        Path(cache["path"]).rglob("*"),
        key=lambda path: path.stat().st_size if path.is_file() else 0,
    )
    shard.chmod(0o644)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    again = here(tmp_path, *CACHED, "seed=0")
    assert again.returncode == 0, again.stderr
    assert "damaged" in again.stdout + again.stderr
    second = results(tmp_path)[-1]
    (made,) = [
        row for row in second["rows"] if (row["artifact"] or {}).get("kind") == "teacher_cache"
    ]
    assert made["reused"] is None
    assert made["artifact"]["digest"] == cache["digest"]


@pytest.mark.parametrize(
    "content", [b"", b"SQLite format 3\0" + b"\xff" * 5000, b"no database", b"{}"]
)
def test_a_damaged_store_of_mlflow_ends_no_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns/mlflow.db").write_bytes(content)
    done = run(tmp_path, "recipe=baseline", *SMALL, "training.steps=4", "tracking.mlflow=true")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (result,) = results(tmp_path)
    assert result["status"] == "FINISHED"
    assert "MLflow" in done.stdout


@pytest.mark.parametrize("damage", ["gone", "empty", "torn", "a list", "null", "a folder"])
def test_a_damaged_result_stops_no_later_command(tmp_path: Path, damage: str) -> None:
    args = ["recipe=baseline", *SMALL, "training.steps=4"]
    assert here(tmp_path, *args).returncode == 0
    (path,) = tmp_path.glob("mlruns/runs/*/result.json")
    content = path.read_text()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_text(
            {"empty": "", "torn": content[: len(content) // 2], "a list": "[1]", "null": "null"}[
                damage
            ]
        )
    again = here(tmp_path, *args)
    assert again.returncode == 0, again.stderr
    assert "Traceback" not in again.stderr
    newest = max(tmp_path.glob("mlruns/runs/*"), key=lambda folder: folder.stat().st_mtime_ns)
    row = json.loads((newest / "result.json").read_text())["rows"][0]
    assert row["reused"] is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_while_torch_compiles_is_gone_on_with(
    tmp_path: Path, number: signal.Signals
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a compiler on a CPU")
    args = ["recipe=baseline", *SMALL, "training.steps=6", "training.compile=always"]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")
    try:
        process = start(tmp_path, *args)
        deadline = time.monotonic() + 200
        while not list((tmp_path / "inductor").rglob("*.cpp")):
            assert process.poll() is None, process.communicate(60)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=200)
        assert process.returncode == (75 if number == signal.SIGTERM else -9), err
        done = run(tmp_path, *args)
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert done.returncode == 0, done.stderr
    (result,) = results(tmp_path)
    assert result["status"] == "FINISHED"
    assert {row["status"] for row in result["rows"]} == {"KILLED", "FINISHED"}


def test_eight_processes_with_one_command_train_once(tmp_path: Path) -> None:
    args = ["recipe=baseline", *SMALL, "training.steps=10", "tracking.mlflow=true"]
    processes = [start(tmp_path, *args) for _ in range(8)]
    ended = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, ended
    assert not [err for _, err in ended if "Traceback" in err]
    rows: list[dict[str, Any]] = [result["rows"][0] for result in results(tmp_path)]
    assert len(rows) == 8
    assert len([row for row in rows if row["reused"] is None]) == 1
    assert len({row["artifact"]["digest"] for row in rows}) == 1
