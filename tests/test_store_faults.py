"""The store under a run's feet: removed, full, damaged, and littered by kills; what was trained is
not lost.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from here import here
from test_faults import SMALL, hours, results

from pipeline.config.settings.run import Run
from pipeline.errors import Exit
from pipeline.ledger.journal import Journal
from pipeline.runs import gate_ending as ending
from pipeline.runs.assessor import Assessor
from pipeline.runs.gate_ending import exit_code
from pipeline.store.artifacts import Store, check_room, disk_full, write_json

BASELINE = ["recipe=baseline", *SMALL, "training.steps=6"]


def test_a_store_that_is_removed_while_a_stage_trains_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, removed = Journal.write, []

    def removing(self: Journal, event: str, **fields: Any) -> None:
        write(self, event, **fields)
        if event == "points" and not removed:
            removed.append(event)
            shutil.rmtree(tmp_path / "mlruns/store")

    monkeypatch.setattr(Journal, "write", removing)
    done = here(tmp_path, *BASELINE)
    assert (done.returncode, removed) == (0, ["points"]), done.stderr
    (result,) = results(tmp_path)
    (row,) = result["rows"]
    assert (row["status"], hours(row, "retry")) == ("FINISHED", 0)
    assert Path(row["artifact"]["path"]).is_dir()


@pytest.mark.slow
def test_a_stage_whose_input_was_removed_says_so_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["recipe=mixed_precision", *SMALL, "training.steps=2"]
    remember, removed = Store.remember, []

    def removing(self: Store, group: str, key: str, record: dict[str, Any]) -> None:
        remember(self, group, key, record)
        if group == "assessments" and not removed:
            removed.append(key)
            shutil.rmtree(self.root / "artifacts")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "remember", removing)
        done = here(tmp_path, *args)
    assert done.returncode == 1
    assert "the artifact of base, is gone; the same command makes it again" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    again = here(tmp_path, *args)
    assert again.returncode == 0, again.stderr
    assert "is damaged (it is gone) and is made again" in again.stdout


def test_a_damaged_artifact_that_is_made_again_is_said(tmp_path: Path) -> None:
    assert here(tmp_path, *BASELINE).returncode == 0
    (result,) = results(tmp_path)
    path = Path(result["rows"][0]["artifact"]["path"])
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 255]))
    done = here(tmp_path, *BASELINE)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count(
            f"{path} is damaged (its bytes are not those of its digest) and is made again"
        )
        == 1
    )
    assert [row["reused"] for row in results(tmp_path)[-1]["rows"]] == [None]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_in_training_ends_the_run_failed_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write, failed = Journal.write, []

    def full(self: Journal, event: str, **fields: Any) -> None:
        if event == "points" and not failed:
            failed.append(event)
            raise OSError(number, os.strerror(number))
        write(self, event, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", full)
        done = here(tmp_path, *BASELINE)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"tracking.root: the disk of {tmp_path / 'mlruns'}" in done.stderr
    assert "MiB left) and start the same command again: it resumes" in done.stderr
    (folder,) = tmp_path.glob("mlruns/runs/*")
    assert json.loads((folder / "run.json").read_text())["status"] == "FAILED"
    assert not (folder / ".reserve").exists()
    assert here(tmp_path, *BASELINE).returncode == 0
    (result,) = results(tmp_path)
    assert result["run"]["attempts"] == 2


def test_what_a_disk_lacks_is_said_in_numbers(tmp_path: Path) -> None:
    line = str(disk_full(tmp_path / "not" / "there"))
    assert line.startswith(
        f"tracking.root: the disk of {tmp_path}/not/there is full; free some room (it has "
    )
    with pytest.raises(
        ValueError, match="this needs 1073741824 MiB; free some room; the same command then resumes"
    ):
        check_room(tmp_path, 2**50, "tracking.root")


KILLED = """
import os, sys
from pathlib import Path
from pipeline.store.artifacts import write_json
os.fsync = lambda _: os.kill(os.getpid(), 9)
write_json(Path(sys.argv[1]), {"a": 1})
"""


def test_what_a_kill_left_half_written_is_swept_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "keys" / "k.json")], check=False
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "keys").glob(".k.json.*")
    held = tmp_path / "assessments" / ".x.json.0123456789abcdef0123456789abcdef"
    with held.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Store(tmp_path)
        assert not left.exists()
        assert held.exists()
    Store(tmp_path)
    assert not held.exists()
    store.remember("keys", "k", {"a": 1})
    assert store.recall("keys", "k") == {"a": 1}


def test_what_is_written_has_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640


def test_a_folder_where_a_record_belongs_makes_way_and_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "keys" / "k.json").mkdir()
    (tmp_path / "keys" / "k.json" / "somebody's").touch()
    assert store.recall("keys", "k") is None
    store.remember("keys", "k", {"a": 1})
    assert store.recall("keys", "k") == {"a": 1}
    (moved,) = (tmp_path / "keys").glob("k.json.*.moved")
    assert (moved / "somebody's").exists()


# -- a release that vLLM reads as another model ---------------------------------------------------


@pytest.mark.parametrize(
    ("code", "promoted", "disagrees", "ends"),
    [
        (0, None, [], Exit.DONE),
        (0, None, ["candidate"], Exit.FAIL),
        (0, True, [], Exit.DONE),
        (0, False, [], Exit.REFUSED),
        (0, False, ["candidate"], Exit.REFUSED),
        (4, None, ["candidate"], 4),
    ],
)
def test_a_pass_that_vllm_reads_as_another_model_is_no_success(
    code: int, promoted: bool | None, disagrees: list[str], ends: int
) -> None:
    promotion = None if promoted is None else {"done": promoted}
    gate: Any = SimpleNamespace(verdict={"exit_code": code}, promotion=promotion)
    assert exit_code(gate, disagrees) == ends


def test_what_vllm_reads_as_another_model_is_not_promoted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    candidate = SimpleNamespace(url=None, model="m", version="1")
    gate: Any = SimpleNamespace(candidate=candidate, baseline=None, promotion=None)
    run = Run(candidate="x", baseline="models:/m@champion")
    running: Any = SimpleNamespace(
        book=SimpleNamespace(disagreeing=["candidate"]), session=SimpleNamespace(run=run)
    )
    ending._promote(running, gate, {})
    assert gate.promotion["done"] is False
    assert (
        "not promoted: vLLM reads another model from the folder of candidate"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "bitsandbytes"}}])
def test_a_quantized_candidate_is_checked_as_a_quantized_arm_is(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    write_json(tmp_path / "config.json", config)
    release = SimpleNamespace(artifact=SimpleNamespace(path=tmp_path))
    gate = SimpleNamespace(releases=lambda: {"candidate": release})
    running: Any = SimpleNamespace(session=SimpleNamespace(gate=gate, run=Run()))
    assert Assessor(running, 0)._is_quantized("candidate") is bool(config)
