"""Formats and precisions as a user asks for them: what pays is kept and charged, what does not is
said.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from here import here, result_in
from mlflow import MlflowClient
from reports import whole_report
from test_run import DISTILL, TINY

import pipeline.quantization.backend


@pytest.fixture(autouse=True)
def _no_reloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the proof of the reload, which starts processes and has tests of its own."""
    monkeypatch.setattr(
        pipeline.quantization.backend, "check_bit_equal", lambda *args, **more: None
    )


@pytest.mark.slow
def test_a_format_that_saves_neither_time_nor_memory_ends_the_run_with_3(tmp_path: Path) -> None:
    """One small matrix of all in int8: reported in full, and the exit code says so, unless it is
    asked to be silent.

    The same command again finds all done and ends alike.
    """
    settings = (
        "recipe=quantize",
        "~stages.nf4",
        "~stages.bf16",
        "~stages.fp16",
        "compare=[{arm: int8, base: reference, on: [quality, serving]}]",
        "stages.int8.include=[model.layers.0.self_attn.k_proj]",
        *TINY,
    )
    for allow, code in (("false", 3), ("true", 0)):
        done = here(
            tmp_path, *settings, f"allow_no_speedup={allow}", f"tracking.mlflow={allow == 'false'}"
        )
        assert done.returncode == code, done.stderr
        assert ("no_speedup: int8: neither time nor memory is saved" in done.stderr) is (code == 3)
        assert "neither time nor memory is saved)" in " ".join(done.stdout.split())
        result = result_in(tmp_path)
        assert result["status"] == "FINISHED"
        (pair,) = result["comparisons"]
        assert pair["speedup"]["no_speedup"] is True
        assert 0 < pair["speedup"]["memory"]["value"] < 0.05
    report = whole_report(tmp_path / "mlruns/latest")
    assert "no_speedup: saves neither time nor memory" in report
    assert "What quantizing changed" in report
    assert "int8: vLLM: not run here (vLLM is not installed)" in done.stdout
    assert "int8: vLLM: not run here" in report
    assert "reference: vLLM" not in report
    artifact = json.loads(Path(result["rows"][1]["artifact"]["path"], "artifact.json").read_text())
    assert artifact["quantization"]["quantized_layers"] == 1
    assert artifact["assessed"]["quality"]["bits_per_byte"]["ci"] is not None
    told = artifact["checked"]["vllm"]
    assert (told["outcome"], told["why"]) == ("not run here", "vLLM is not installed")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns/mlflow.db'}")
    (parent,) = [
        run for run in client.search_runs(["1"]) if "mlflow.parentRunId" not in run.data.tags
    ]
    assert (parent.data.tags["no_speedup"], parent.info.status) == ("int8", "FINISHED")


@pytest.mark.slow
def test_a_search_that_finds_nothing_cheaper_leaves_the_model_and_is_charged(
    tmp_path: Path,
) -> None:
    """On a CPU NF4 is smaller and slower: sought for time the model stays as it is, and the trial
    was work.
    """
    settings = (
        "recipe=quantize_search",
        "~stages.bf16",
        "stages.quantized.candidates=[nf4]",
        "tracking.mlflow=false",
        # embeddings stay in fp32: a large one would cost more than 16 bits do
        "data.vocabulary_size=300",
        "stages.quantized.tolerance=1",
        *TINY,
    )
    done = here(tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    result = result_in(tmp_path)
    reference, quantized = result["rows"]
    assert quantized["artifact"]["digest"] == reference["artifact"]["digest"]
    assert quantized["quality"]["flips"]["value"] == 0
    (pair,) = result["comparisons"]
    # what two readings of one artifact differ by is noise
    for figure in (pair["serving"], pair["payback"]):
        assert (figure["value"], figure["why_missing"]) == (None, "both are the same artifact")
    assert pair["speedup"]["no_speedup"]
    why = "nothing that holds the tolerance saves time"
    # timings say whether 16 bits, which are read against, save time themselves
    whys = [why, *(f"{why} over {form}, the best 16-bit form" for form in ("bf16", "fp16"))]
    assert quantized["unchanged"]["as"] == "reference"
    assert quantized["unchanged"]["why"] in whys
    assert reference["unchanged"] is None
    said = result["conclusion"]
    assert said["verdict"].startswith("No format pays: quantized stays as the unquantized model is")
    assert said["answers"][0].startswith("quantized reaches ")
    assert "gainst" not in " ".join(said["answers"])
    phases = quantized["ledger"]["phases_ns"]
    assert phases["search"] > 0.5 * sum(
        ns for name, ns in phases.items() if name not in ("eval", "model_load")
    )
    assert quantized["ledger"]["device_hours"]["work"]["value"] * 3600e9 > phases["search"]
    notes = " ".join(result["environment"]["notes"])
    assert "quantized: tried nf4: loses" in notes
    assert "quantized: stays as reference is: nothing that holds the tolerance saves time" in notes
    again = here(tmp_path, *settings, "stages.quantized.prefer=memory")
    assert again.returncode == 0, again.stderr
    found = result_in(tmp_path)["rows"][-1]
    about = json.loads(Path(found["artifact"]["path"], "artifact.json").read_text())
    assert about["quantization"]["format"] == "nf4"
    assert found["unchanged"] is None
    assert about["search"]["trials"][0]["memory_ratio"] < 1
    assert found["recovery"] == {}  # no fallback was tried
    assert found["artifact"]["bytes"] < reference["artifact"]["bytes"]


@pytest.mark.slow
def test_a_precision_found_by_trial_is_charged_and_inherited(tmp_path: Path) -> None:
    """Student and control of the same settings train in one precision; the trials are the student's
    work.
    """
    done = here(tmp_path, *DISTILL, "precision=auto", "tracking.mlflow=false")
    assert done.returncode == 0, done.stderr
    result = result_in(tmp_path)
    rows = {row["arm"]: row for row in result["rows"]}
    assert rows["teacher"]["ledger"]["phases_ns"]["search"] > 0
    assert rows["student"]["ledger"]["phases_ns"]["search"] > 0
    assert rows["control_steps"]["ledger"]["phases_ns"].get("search", 0) == 0
    about = {
        arm: json.loads(Path(row["artifact"]["path"], "artifact.json").read_text())["precision"]
        for arm, row in rows.items()
    }
    assert (
        about["control_steps"]["chosen"]
        == about["control_compute"]["chosen"]
        == about["student"]["chosen"]
    )
    notes = " ".join(result["environment"]["notes"])
    assert f"student: precision {about['student']['chosen']}: bf16 " in notes
    assert f"control_steps: precision {about['student']['chosen']}: as student has it" in notes
    assert "not tf32: tf32 needs a CUDA device" in notes
