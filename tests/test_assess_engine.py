"""Files as `vllm bench` writes them, read as declared figures; and a run that shows them beside
what it measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from here import here, result_in
from reports import whole_report
from test_run import TINY

import pipeline.quantization.backend
from pipeline.errors import UserError
from pipeline.evaluation.serving.engine import read_result
from pipeline.ledger.metrics import BY_KEY
from pipeline.ledger.values import Provenance

# The keys of `vllm bench serve --save-result`, with --metric-percentiles 95,99.
SERVE: dict[str, Any] = {
    "date": "20261120-101500",
    "backend": "vllm",
    "label": None,
    "model_id": "exports/int8",
    "tokenizer_id": "x",
    "num_prompts": 200,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 8,
    "duration": 20.0,
    "completed": 200,
    "failed": 0,
    "total_input_tokens": 102400,
    "total_output_tokens": 25600,
    "request_throughput": 10.0,
    "request_goodput": None,
    "output_throughput": 1280.0,
    "total_token_throughput": 6400.0,
    "mean_ttft_ms": 41.0,
    "median_ttft_ms": 40.0,
    "std_ttft_ms": 3.0,
    "p95_ttft_ms": 50.0,
    "p99_ttft_ms": 60.0,
    "mean_tpot_ms": 5.5,
    "median_tpot_ms": 5.0,
    "std_tpot_ms": 0.1,
    "p95_tpot_ms": 6.0,
    "p99_tpot_ms": 7.0,
}
THROUGHPUT = {
    "elapsed_time": 4.0,
    "num_requests": 100,
    "total_num_tokens": 64000,
    "requests_per_second": 25.0,
    "tokens_per_second": 16000.0,
}
LATENCY = {
    "avg_latency": 0.51,
    "latencies": [0.5, 0.52],
    "percentiles": {"10": 0.5, "50": 0.5, "99": 0.52},
}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            SERVE,
            {
                "output_tokens_per_s": 1280.0,
                "tokens_per_s": 6400.0,
                "requests_per_s": 10.0,
                "ttft_p50_s": 0.040,
                "ttft_p95_s": 0.050,
                "ttft_p99_s": 0.060,
                "tpot_p50_s": 0.005,
                "tpot_p95_s": 0.006,
                "tpot_p99_s": 0.007,
                "requests": 200,
                "tokens_in": 102400,
                "tokens_out": 25600,
                "max_concurrency": 8,
            },
        ),
        ({**SERVE, "request_rate": 4.0}, {"request_rate": 4.0, "ttft_p50_s": 0.040}),
        (THROUGHPUT, {"tokens_per_s": 16000.0, "requests_per_s": 25.0, "requests": 100}),
        (LATENCY, {"batch_p50_s": 0.5, "batch_p99_s": 0.52}),
    ],
)
def test_what_the_engine_says_is_declared_in_our_units(
    tmp_path: Path, content: Any, expected: dict
) -> None:
    figures = read_result(written(tmp_path / "bench.json", content), "serving.results").figures
    assert {value.provenance for value in figures.values()} == {Provenance.DECLARED}
    assert {f"serving/{name}" for name in figures} <= set(BY_KEY)
    found = {name.removeprefix("engine_"): value.value for name, value in figures.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert len(expected) < 3 or set(found) == set(expected)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is no JSON"),
        (
            json.dumps(SERVE) + "\n" + json.dumps(SERVE),
            "holds several results; give one with a single result",
        ),
        ([1], "holds no result of `vllm bench`"),
        (
            {"median_ttft_ms": None, "output_throughput": "fast", "request_throughput": True},
            "holds no result",
        ),
        ({**SERVE, "completed": 0}, "no request was completed"),
        (
            {**SERVE, "output_throughput": -9},
            "output_tokens_per_s is negative; run the benchmark again",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        read_result(written(tmp_path / "bench.json", content), "serving.results")
    assert caught.value.key == "serving.results"
    assert problem in str(caught.value)


def test_requests_that_failed_are_told(tmp_path: Path) -> None:
    found = read_result(
        written(tmp_path / "bench.json", {**SERVE, "failed": 997}), "serving.results"
    )
    assert found.source.endswith(", 997 requests failed")
    assert (
        "requests failed"
        not in read_result(written(tmp_path / "bench.json", {**SERVE, "failed": 0}), "x").source
    )


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("serving.results=none.json", "serving.results: none.json: No such file or directory"),
        ("serving.results={int9: bench.json}", "serving.results: 'int9' is no arm of this recipe"),
        ("serving.results={int8: 3}", "serving.results.int8: 3 is no file"),
        ("serving.decode=graph", "serving.decode: graph needs CUDA, this run is on cpu"),
        ("serving.decode=fast", "serving.decode"),
    ],
)
def test_a_run_is_refused_before_any_work(tmp_path: Path, setting: str, problem: str) -> None:
    done = here(tmp_path, "recipe=quantize", setting)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1), done.stderr
    assert problem in done.stderr
    assert not (tmp_path / "mlruns" / "runs").exists()


@pytest.mark.slow
def test_a_run_shows_declared_figures_apart_and_says_how_it_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # has its tests
    monkeypatch.setattr(
        pipeline.quantization.backend, "check_bit_equal", lambda *args, **more: None
    )
    written(tmp_path / "bench.json", SERVE)
    settings = (
        *(
            "recipe=quantize",
            "~stages.nf4",
            "~stages.bf16",
            "~stages.fp16",
            "serving.decode=static",
            *TINY,
            "serving.batches=[]",
            "tracking.mlflow=false",
        ),
        "compare=[{arm: int8, base: reference, on: [quality, serving]}]",
    )
    done = here(tmp_path, *settings, "serving.results={int8: bench.json}")
    assert done.returncode == 0, done.stderr
    result, report = result_in(tmp_path), whole_report(tmp_path / "mlruns/latest")
    rows = {row["arm"]: row["serving"] for row in result["rows"]}
    assert rows["int8"]["engine_output_tokens_per_s"] == {
        "value": 1280.0,
        "provenance": "declared",
        "why_missing": None,
    }
    assert not any(name.startswith("engine_") for name in rows["reference"])
    assert rows["reference"]["dynamic_cache_device_s_per_1k_units"]["value"] > 0
    assert rows["reference"]["units_per_joule"]["why_missing"] == "a CPU run uses no GPU"
    how = result["comparisons"][0]["serving"]["how"]
    assert how == "float32, quantized weights, static cache against float32, static cache"
    assert "## Serving, declared" in report
    assert f"int8 against reference: {how}" in report
    assert (
        "serving of int8 by an engine is as bench.json, model_id exports/int8, date 20261120-101500"
        " says" in report
    )
    before = {arm: serving["device_s_per_1k_units"] for arm, serving in rows.items()}
    # of the primary arm; nothing is measured anew
    again = here(tmp_path, *settings, "serving.results=bench.json")
    assert again.returncode == 0, again.stderr
    rows = {row["arm"]: row["serving"] for row in result_in(tmp_path)["rows"]}
    assert rows["int8"]["engine_requests"]["value"] == 200
    assert {arm: serving["device_s_per_1k_units"] for arm, serving in rows.items()} == before
