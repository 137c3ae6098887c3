"""Memory: a fake allocator, the kernel's high-water mark, and the one line that says what to
change.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_running
import torch
from make_result import make_result, make_row, value
from reports import markdown
from test_running import FakeStage, fake_assessment, fake_serving, invoke, minutes, of_run, the_run

import pipeline.evaluation.quality.assess
import pipeline.runs.comparison
from pipeline.cli.main import main
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.errors import DeviceLost, StageFailed
from pipeline.ledger import memory
from pipeline.ledger.memory import MEMORY, ON_DEVICE, MemoryMeter, asked_bytes, unread
from pipeline.ledger.values import Provenance, measured
from pipeline.runs.out_of_memory import explain
from pipeline.stages.context import Context, Output
from pipeline.stages.distill import DistillStage
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.train import TrainStage
from pipeline.store.artifacts import Artifact

GPU = torch.device("cuda")
CPU = torch.device("cpu")
GB = 10**9


class FakeCuda:
    """What torch.cuda says of a device of 80 GB; `events` are the calls that change something."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, free: int | None = 1 * GB, **stats: int
    ) -> None:
        self.events: list[str] = []
        self.stats = {
            "allocated_bytes.all.peak": 60 * GB,
            "reserved_bytes.all.peak": 75 * GB,
            "allocated_bytes.all.current": 60 * GB,
            "reserved_bytes.all.current": 75 * GB,
            "num_alloc_retries": 3,
            "num_ooms": 1,
            **stats,
        }
        self.free = free
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: self.stats)
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.mem_get_info)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GB)
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        for name in ("reset_peak_memory_stats", "reset_accumulated_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda _, name=name: self.events.append(name))
        blocks = [{"address": 1, "size": 512, "state": "inactive"}]
        snapshot = {
            "segments": [{"segment_pool_id": (0, 0), "blocks": blocks}],
            "device_traces": [[]],
        }
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: snapshot)
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)

    def mem_get_info(self, _: Any) -> tuple[int, int]:
        if self.free is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.free, 80 * GB


def proc(folder: Path, *, peak_kb: int = 4096, now_kb: int = 2048) -> Path:
    (folder / "self").mkdir(parents=True, exist_ok=True)
    (folder / "self" / "clear_refs").touch()
    (folder / "self" / "status").write_text(
        f"Name:\tpython\nVmHWM:\t{peak_kb} kB\nVmRSS:\t{now_kb} kB\n"
    )
    (folder / "meminfo").write_text("MemTotal:  16000 kB\nMemAvailable:  1000 kB\n")
    return folder


# -- the ledger's group ---------------------------------------------------------------------------


def test_a_devices_memory_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda, meter = FakeCuda(monkeypatch), MemoryMeter(proc(tmp_path) / "self")
    meter.start(GPU)
    assert cuda.events == ["reset_peak_memory_stats", "reset_accumulated_memory_stats"]
    assert (tmp_path / "self" / "clear_refs").read_text() == "5\n"
    found = meter.read(GPU, nvml_peak=measured(77 * GB))
    assert {name: value.value for name, value in found.items()} == {
        "peak_allocated_bytes": 60 * GB,
        "peak_reserved_bytes": 75 * GB,
        "fragmentation": pytest.approx(0.2),
        "alloc_retries": 3,
        "ooms": 1,
        "headroom_bytes": 5 * GB,
        "total_bytes": 80 * GB,
        "nvml_peak_bytes": 77 * GB,
        "host_peak_rss_bytes": 4096 * 1024,
    }
    assert tuple(found) == MEMORY
    assert {name for name, value in found.items() if value.provenance is Provenance.DERIVED} == {
        "fragmentation",
        "headroom_bytes",
    }


def test_no_reading_is_null_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda, meter = FakeCuda(monkeypatch), MemoryMeter(proc(tmp_path) / "self")
    meter.start(GPU)
    assert meter.read(GPU)["nvml_peak_bytes"].why_missing == "NVML's memory was not sampled"
    cuda.stats |= {"allocated_bytes.all.peak": 0, "reserved_bytes.all.peak": 0}
    assert meter.read(GPU)["fragmentation"].why_missing == "nothing was allocated on the device"
    on_cpu = meter.read(CPU)
    assert {on_cpu[name].why_missing for name in ON_DEVICE} == {"a cpu run: no CUDA allocator"}
    assert on_cpu["host_peak_rss_bytes"].value == 4096 * 1024
    assert unread("gone")["ooms"].why_missing == "gone"
    assert tuple(unread("gone")) == MEMORY


def test_the_hosts_peak_is_the_stages_or_none(tmp_path: Path) -> None:
    meter = MemoryMeter(proc(tmp_path) / "self")
    assert meter.read(CPU)["host_peak_rss_bytes"].why_missing == "its reading was never started"
    (tmp_path / "self" / "clear_refs").unlink()
    (tmp_path / "self" / "clear_refs").mkdir()  # cannot be written to
    meter.start(CPU)
    said = meter.read(CPU)["host_peak_rss_bytes"].why_missing
    assert said == "the process's peak cannot be set back to one stage's (Is a directory)"
    proc(tmp_path / "other")
    (tmp_path / "other" / "self" / "status").write_text("Name:\tpython\n")
    meter = MemoryMeter(tmp_path / "other" / "self")
    meter.start(CPU)
    assert meter.read(CPU)["host_peak_rss_bytes"].why_missing == "the kernel states no VmHWM"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_what_was_held_before_a_stage_is_not_its_peak() -> None:
    """On the real kernel: 400 MB held and given back before the start, 200 MB within."""
    gc.collect()  # or what earlier tests left is given back meanwhile
    meter = MemoryMeter()
    before = bytearray(400_000_000)
    held = memory._status_bytes(Path("/proc/self"), "VmRSS")
    del before
    meter.start(CPU)
    start = meter.read(CPU)["host_peak_rss_bytes"].value
    within = bytearray(200_000_000)
    del within
    peak = meter.read(CPU)["host_peak_rss_bytes"].value
    assert held is not None
    if start is None or peak is None:
        pytest.skip("this kernel does not let the peak be set back")
    assert start <= held - 300_000_000
    assert start + 100_000_000 <= peak <= held - 100_000_000


# -- one line, with what to change ----------------------------------------------------------------


def oom(asked: str = "4.00 GiB") -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total capacity of ..."
    )


def said(
    error: Exception, stage: Any, kind: str, folder: Path, device: Any = GPU, run: Run | None = None
) -> str:
    run = run or Run(stages={"student": stage})
    line = explain(error, run, "student", stage, kind, device=device, snapshot=folder / "oom.json")
    assert line is not None
    assert "\n" not in line
    return line


def test_the_size_asked_for_is_read_from_the_message() -> None:
    assert asked_bytes(oom("4.00 GiB")) == 4 * 2**30
    assert asked_bytes(oom("512 bytes")) == 512
    assert (
        asked_bytes(
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000 bytes."
            )
        )
        == 8000
    )
    assert asked_bytes(RuntimeError("no figure here")) is None


def test_the_line_says_what_was_asked_and_what_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeCuda(monkeypatch, **{"allocated_bytes.all.current": 74 * GB})
    assert (
        said(oom(), TrainStage(), "work", tmp_path)
        == "out of GPU memory: 4.29 GB asked for, 1 GB free of 80 GB; torch holds 75 GB, 74 GB of"
        " it in tensors, other processes and CUDA itself 4 GB; first:"
        " training.gradient_accumulation=2 (now 1; the same batch in smaller parts); memory"
        f" map: {tmp_path / 'oom.json'}"
    )
    kept = json.loads((tmp_path / "oom.json").read_text())
    assert kept["history_recorded"] is False
    assert kept["snapshot"]["segments"][0]["blocks"][0]["state"] == "inactive"


def test_fragments_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeCuda(monkeypatch)  # 15 GB are held in pieces, and 4.29 GB did not fit
    advice = (
        "first: PYTORCH_ALLOC_CONF=expandable_segments:True in the environment (15 GB are held in"
        " pieces too small)"
    )
    assert advice in said(oom(), TrainStage(), "work", tmp_path)
    # more than all pieces together
    assert "expandable" not in said(oom("20.00 GiB"), TrainStage(), "work", tmp_path)
    assert "expandable" not in said(
        torch.OutOfMemoryError("CUDA error: out of memory"), TrainStage(), "work", tmp_path
    )
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    assert "first: training.gradient_accumulation=2" in said(oom(), TrainStage(), "work", tmp_path)


def test_other_processes_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held = {"allocated_bytes.all.current": 40 * GB, "reserved_bytes.all.current": 40 * GB}
    FakeCuda(monkeypatch, **held)
    line = said(oom(), TrainStage(), "work", tmp_path)
    assert "other processes and CUDA itself 39 GB" in line
    assert (
        "first: end what else runs on this device, or take another one (hardware.device); then"
        " training" in line
    )


def test_a_device_that_answers_nothing_any_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeCuda(monkeypatch, free=None, **{"allocated_bytes.all.current": 75 * GB})

    def refuse() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda.memory, "_snapshot", refuse)
    line = said(oom(), TrainStage(), "work", tmp_path)
    assert (
        "4.29 GB asked for, what is free is unknown; torch holds 75 GB, 75 GB of it in tensors;"
        " first: train" in line
    )
    assert "no memory map was written (CUDA error: an illegal" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        (TrainStage(), "training.gradient_accumulation=2 (now 1;"),
        (TrainStage(gradient_accumulation=2), "stages.student.gradient_accumulation=4 (now 2;"),
        (DistillStage(like="other"), "stages.other.gradient_accumulation=8 (now 4;"),
        (
            TrainStage(batch_size=9, gradient_accumulation=3),
            "stages.student.gradient_accumulation=9 (now 3;",
        ),
        (TrainStage(batch_size=1), "training.sequence_length=64 (now 128);"),
        (
            TrainStage(batch_size=1, sequence_length=512),
            "stages.student.sequence_length=256 (now 512);",
        ),
        (
            TrainStage(batch_size=1, precision=Precision.fp32),
            "training.sequence_length=64 (now 128), or precision=bf16;",
        ),
        (QuantizeStage(), "a device with more memory (this stage has no setting that needs less);"),
    ],
)
def test_training_in_smaller_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: Any, advice: str
) -> None:
    FakeCuda(monkeypatch, **{"allocated_bytes.all.current": 75 * GB})
    run = Run(stages={"student": stage, "other": TrainStage(gradient_accumulation=4)})
    assert f"first: {advice}" in said(oom(), stage, "work", tmp_path, run=run)


def test_assessment_and_serving_in_smaller_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeCuda(monkeypatch, **{"allocated_bytes.all.current": 75 * GB})
    run = Run()
    line = lambda kind: said(oom(), None, kind, tmp_path, run=run)
    assert "first: quality.batch_size=8 (now 16);" in line("assess")
    run.quality.batch_size = 1
    assert "first: quality.sequence_length=64 (now 128);" in line("assess")
    assert "first: serving.batches=[1,8] (now up to 32);" in line("compare")
    run.serving.batches = [1, 8]
    assert "first: serving.load.batch=4 (now 8);" in line("compare")


def test_the_host_runs_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "pipeline.runs.out_of_memory.host_now", lambda: memory.host_now(proc(tmp_path / "proc"))
    )
    torchs = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000"
        " bytes."
    )
    assert (
        said(torchs, TrainStage(), "work", tmp_path, CPU)
        == "out of host memory: 8 kB asked for, this process holds 2.1 MB, the machine has 1.02 MB"
        " left; first: training.gradient_accumulation=2 (now 1; the same batch in smaller parts)"
    )
    # the device's settings would not help
    line = said(MemoryError(), TrainStage(), "work", tmp_path, GPU)
    assert line.startswith("out of host memory: an allocation failed, this process holds 2.1 MB")
    assert line.endswith("first: data.max_documents=10000")


def test_another_error_is_not_explained(tmp_path: Path) -> None:
    for error in (
        RuntimeError("out of memory"),
        ValueError("x"),
        RuntimeError("CUDA error: misaligned address"),
    ):
        assert (
            explain(error, Run(), "a", TrainStage(), "work", device=GPU, snapshot=tmp_path / "x")
            is None
        )
    mps: Any = SimpleNamespace(type="mps")
    assert said(oom(), TrainStage(), "work", tmp_path, mps).startswith(
        "out of mps memory: 4.29 GB asked for; first: "
    )
    assert not list(tmp_path.iterdir())


# -- inside a run ---------------------------------------------------------------------------------


@pytest.fixture
def faked(root: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A run whose stages, assessments and comparison are made up, on a device of 80 GB."""
    monkeypatch.setattr(pipeline.evaluation.quality.assess, "assess_quality", fake_assessment)
    # no model there
    monkeypatch.setattr("pipeline.models.sixteen_bits.stored_said", lambda *_: None)
    monkeypatch.setattr("pipeline.runs.serving_pass.serve", fake_serving)
    monkeypatch.setattr("pipeline.runs.comparison.other_tokenizers", lambda *_: False)
    monkeypatch.setattr(
        "pipeline.runs.stages.base_artifact", lambda *_: Artifact(root, "model", "b" * 32, 1)
    )
    monkeypatch.setattr(test_running, "DEVICE", GPU)
    return FakeCuda(monkeypatch)


def test_a_device_that_is_lost_ends_the_run_though_its_stage_is_optional(
    root: Path, monkeypatch: pytest.MonkeyPatch, faked: FakeCuda
) -> None:
    """What comes after it could not be done either: its rows would blame other stages."""

    def lost(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    class Dropped(FakeStage):
        def run(self, inputs: Any, ctx: Context) -> Output:
            monkeypatch.setattr(torch.cuda, "synchronize", lost)
            lost()
            return super().run(inputs, ctx)

        def may_be_refused(self) -> bool:
            return True

    run = the_run()
    run.stages["student"] = Dropped([6, 16], ["teacher"], [4], [0, 1], ["failed", "ok"])
    with pytest.raises(DeviceLost, match=r"^stage student: the cuda device was lost \(Accel"):
        invoke(root, "run-1", 1, run)
    assert not list(root.rglob("oom-*.json"))


def test_a_stage_without_memory_fails_in_one_line_and_loses_nothing(
    root: Path, faked: FakeCuda
) -> None:
    """The student runs out 6 min in, 4 after its checkpoint was made; the same command resumes from
    that checkpoint.
    """

    class Hungry(FakeStage):
        def run(self, inputs: Any, ctx: Context) -> Output:
            try:
                return super().run(inputs, ctx)
            except RuntimeError as error:
                raise oom() from error

    run = the_run()
    run.stages["student"] = Hungry([6, 16], ["teacher"], [4], [0, 1], ["failed", "ok"])
    with pytest.raises(StageFailed) as caught:
        invoke(root, "run-1", 1, run)
    line = str(caught.value)
    assert line.startswith(
        "stage student: out of GPU memory: 4.29 GB asked for, 1 GB free of 80 GB; torch holds 75 GB"
    )
    (snapshot,) = root.rglob("oom-*.json")
    assert line.endswith(f"memory map: {snapshot}")
    assert snapshot.name == "oom-student-1.json"
    attempt = invoke(root, "run-1", 2, run)
    assert of_run(attempt) == {"work": 71, "assess": 8, "retry": 2, "compare": 6, "overhead": 3}
    failed = next(row for row in attempt.book.rows if row["status"] == "FAILED")
    assert failed["why"] == line
    assert minutes(failed["ledger"]["device_hours"]["retry"]["value"]) == pytest.approx(2)
    assert failed["ledger"]["memory"]["ooms"]["value"] == 1
    assert len(list(root.rglob("oom-*.json"))) == 1  # none where memory sufficed


def test_from_the_command_line_it_is_one_line_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pipeline.stages.training as stage

    def no_room(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000 bytes."
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "train", no_room)
    documents = [
        json.dumps({"text": f"document {number}, long enough to be one"}) for number in range(80)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(documents))
    code = main(
        ["recipe=baseline", "tracking.mlflow=false", "training.steps=2", "data.path=d.jsonl"],
        started_ns=0,
    )
    line = capsys.readouterr().err.strip()
    assert (code, len(line.splitlines())) == (1, 1)
    assert line.startswith(
        "failed: stage baseline: out of host memory: 8 kB asked for, this process holds "
    )
    assert "; first: training.gradient_accumulation=2 (now 1;" in line
    (result,) = tmp_path.glob("mlruns/runs/*/result.json")
    (row,) = json.loads(result.read_text())["rows"]
    assert (row["status"], row["why"]) == ("FAILED", line.removeprefix("failed: "))
    assert row["ledger"]["device_hours"]["retry"]["value"] > 0


def test_the_report_shows_device_memory_where_it_was_measured() -> None:
    rows = [make_row("baseline")]
    assert "device memory" not in markdown(make_result("baseline", rows=rows))
    rows[0]["ledger"]["memory"] |= {
        "peak_reserved_bytes": value(75 * GB),
        "headroom_bytes": value(5 * GB),
    }
    report = markdown(make_result("baseline", rows=rows))
    assert "| device memory | left of it |" in report
    assert "| 75 GB | 5 GB |" in report.replace("\N{NO-BREAK SPACE}", " ")
    assert "`compute/memory_headroom_bytes` (B)" in report
