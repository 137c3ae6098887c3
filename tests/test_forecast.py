"""Forecasts: what a run will take, from what earlier ones took, a probe, or FLOPs; and their score.

Sizes are compared with the count of an eager twin, memory with torch's profiler, intervals with
simulated readings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from transformers import BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, Qwen3Config

from pipeline.cli.commands import forecast as command
from pipeline.cli.main import main
from pipeline.config.settings.parallel import Parallel
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import TrainingConfig
from pipeline.forecast import speed
from pipeline.forecast.memory import LEAST, MOST, Spread, remedies, training_memory
from pipeline.forecast.past import FILE, Past, settings_key
from pipeline.forecast.rates import added, expected
from pipeline.forecast.sizes import kept_bytes, size_of
from pipeline.launch.needs import Needs, needs_of
from pipeline.ledger.flops import count_flops
from pipeline.ledger.journal import read_events
from pipeline.ledger.records import FORECAST, read_record, sealed
from pipeline.ledger.shapes import ForecastPart, ForecastRecord
from pipeline.report.forecast import forecast_line, forecast_table, record_lines, score_line
from pipeline.runs.forecasting import _Forecaster, _part
from pipeline.stages.base import Workload
from pipeline.store.artifacts import write_json
from pipeline.tasks.table import Task

LM, CLASSES = Task.causal_lm, Task.sequence_classification
LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=1024,
)
CONFIGS = {
    "llama": (LLAMA, LM),
    "gpt2": (
        GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=512, bos_token_id=0, eos_token_id=0),
        LM,
    ),
    "qwen3": (
        Qwen3Config(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
        ),
        LM,
    ),
    "bert": (
        BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        ),
        CLASSES,
    ),
    "distilbert": (DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=128), CLASSES),
}


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", few(list(CONFIGS), 1))
def test_flops_of_a_configuration_are_those_of_the_counted_twin(name: str) -> None:
    config, task = CONFIGS[name]
    size, counted = size_of(config, task), count_flops(config, task, backward=True)
    for length in (64, 256):
        ours = size.flops(backward=True)(length)
        assert ours == pytest.approx(counted(length), rel=0.1 if task is CLASSES else 0.02)


def test_parameters_are_those_of_the_model() -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(LLAMA)
    size = size_of(LLAMA, LM)
    assert size.parameters == sum(each.numel() for each in model.parameters())
    assert size.of_layers == sum(each.numel() for each in model.model.layers.parameters())
    assert (size.layers, size.width, size.vocabulary) == (2, 64, 512)


def test_a_token_leaves_less_in_sixteen_bits() -> None:
    wide, narrow = (kept_bytes(LLAMA, LM, each, 128) for each in (Precision.fp32, Precision.bf16))
    assert 0.4 * wide < narrow < 0.9 * wide


@pytest.mark.parametrize(("rate", "largest"), [(1e8, 128), (1e9, 256), (1e14, 4096)])
def test_a_device_is_not_kept_busy_to_find_out_how_slow_it_is(
    rate: float, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of 16 bits may be computed without units for them: 4096 wide it took minutes."""
    sides: list[int] = []

    def product(matrix: torch.Tensor, _: Any) -> float:
        sides.append(len(matrix))
        return 2.0 * len(matrix) ** 3 / rate

    monkeypatch.setattr(speed, "_of_product", product)
    assert speed.device_rate.__wrapped__(torch.device("meta")) == pytest.approx(rate)
    assert sides[-1] == largest


def test_what_a_probe_held_is_the_forecast_of_memory(tmp_path: Path) -> None:
    """Of one device: several ranks have a part of its batches each."""
    record = {"step_s": 0.1, "eval_s": 0.1, "around_s": 1.0, "peak_bytes": 3 * 2**30}
    (tmp_path / "probes").mkdir()
    write_json(tmp_path / "probes" / "k.json", sealed(record))

    def peaks(several: bool) -> dict[str, Any]:
        session = SimpleNamespace(
            ranks=SimpleNamespace(several=several), store=SimpleNamespace(root=tmp_path)
        )
        running: Any = SimpleNamespace(session=session)
        nothing: Any = None
        parts = [
            _part(what, arm, 0, {"settings": key}, None)
            for what, arm, key in (("work", "a", "k"), ("work", "b", "none"), ("assess", "a", "k"))
        ]
        return _Forecaster(running, None, nothing, probes=False)._peaks_of_probes(parts)

    assert list(peaks(several=False)) == ["a"]
    found = peaks(several=False)["a"]
    assert found.estimate == found.low == 3 * 2**30 < found.high
    assert peaks(several=True) == {}


# -- memory ---------------------------------------------------------------------------------------


def work(config: Any = LLAMA, precision: Precision = Precision.fp32, **changes: Any) -> Workload:
    settings = TrainingConfig(**{"batch_size": 8, "sequence_length": 64, "steps": 4, **changes})
    return Workload(config=config, precision=precision, batches=settings, trains=True)


def test_what_adam_keeps_is_sixteen_bytes_for_each_parameter() -> None:
    found, size = training_memory(work(), LM, Spread()), size_of(LLAMA, LM)
    assert found.weights + found.gradients + found.moments == 16 * size.parameters


def test_ranks_that_share_weights_hold_a_share_of_them() -> None:
    alone = training_memory(work(), LM, Spread())
    averaged = training_memory(work(), LM, Spread(4))
    shared = training_memory(work(), LM, Spread(4, 4))
    assert averaged.moments == alone.moments == 4 * shared.moments
    assert averaged.gradients == 2 * alone.gradients  # a buffer to send
    assert averaged.activations == pytest.approx(alone.activations / 4)


def test_a_mode_says_over_how_many_ranks_weights_are_cut() -> None:
    assert Spread.of(Parallel.ddp, 8, 4) == Spread(8, 1)
    assert Spread.of(Parallel.fsdp, 8, 4) == Spread(8, 8)
    assert Spread.of(Parallel.hsdp, 8, 4) == Spread(8, 4)


def test_what_is_small_beside_what_there_is_is_not_counted() -> None:
    from pipeline.forecast.memory import surely_fits

    for changes in ({}, {"batch_size": 64}, {"sequence_length": 512}):
        needed = training_memory(work(**changes), LM, Spread()).total.high
        assert not surely_fits(work(**changes), LM, Spread(), needed)
        assert surely_fits(work(**changes), LM, Spread(), 100 * needed)


def test_each_remedy_makes_it_fit_by_itself() -> None:
    big = work(batch_size=64)
    whole = training_memory(big, LM, Spread()).total.estimate
    fixed = training_memory(work(batch_size=1, sequence_length=8), LM, Spread()).total.estimate
    have = (whole + fixed) / 2
    named = list(remedies(big, LM, Spread(), have))
    parts = int(named[0].removeprefix("training.gradient_accumulation="))
    smaller = work(batch_size=64, gradient_accumulation=parts)
    assert training_memory(smaller, LM, Spread()).total.estimate <= have
    assert "training.activation_checkpointing=true" in named
    assert list(remedies(big, LM, Spread(), 0)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "changes"),
    [
        ("llama", Precision.fp32, {"gradient_accumulation": 4}),
        ("gpt2", Precision.fp32, {"activation_checkpointing": True}),
        ("qwen3", Precision.fp32, {}),
        ("llama", Precision.bf16_pure, {}),
    ],
)
def test_the_estimate_of_memory_holds_what_torch_counts(
    name: str, precision: Precision, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = wide(CONFIGS[name][0])
    asked = work(config, precision, sequence_length=128, steps=2, eval_every=100, **changes)
    found, counted = training_memory(asked, LM, Spread()).total, peak_of(asked, tmp_path)
    assert found.low <= counted <= found.high, f"{found.estimate / counted:.2f}"


def wide(config: Any) -> Any:
    """Return the same architecture at a size where tensors outweigh all that is beside them."""
    names = config.attribute_map
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 2048}
    sizes |= {} if "n_embd" in names.values() else {"intermediate_size": 768}
    given = {k: v for k, v in config.to_dict().items() if k != "layer_types"}  # one for each layer
    return type(config)(**{**given, **{names.get(k, k): v for k, v in sizes.items()}})


def peak_of(asked: Workload, folder: Path) -> int:
    """Return the most bytes in tensors in a training's steps, by torch's profiler."""
    from test_training_loop import hooks
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM

    from pipeline.config.settings.precision import PrecisionConfig
    from pipeline.ledger.phases import PhaseClock
    from pipeline.training.activations import checkpoint_activations
    from pipeline.training.loop import train
    from pipeline.training.objective import Objective
    from pipeline.training.reading import examine

    settings, device = asked.batches, torch.device("cpu")
    assert settings is not None

    class Windows:
        def batch(self, step: int) -> dict[str, torch.Tensor]:
            ids = torch.randint(
                5, asked.config.vocab_size, (settings.batch_size, settings.sequence_length)
            )
            places = torch.arange(settings.sequence_length).expand_as(ids).contiguous()
            return {"input_ids": ids, "labels": ids.clone(), "position_ids": places}

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = AutoModelForCausalLM.from_config(asked.config)
        if settings.activation_checkpointing:
            checkpoint_activations(model, "training.activation_checkpointing")
        read = examine(model, device, settings.attention)
        objective = Objective(model, LM, asked.precision, device, PhaseClock(), read=read)
        train(
            model,
            Windows(),
            objective,
            settings=settings,
            precision=PrecisionConfig(name=asked.precision),
            folder=folder,
            clock=PhaseClock(),
            hooks=hooks(),
        )
    held = most = 0
    for event in profiled.profiler.kineto_results.events():  # pyright: ignore
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most > 0
    return most


# -- intervals ------------------------------------------------------------------------------------


def test_nine_in_ten_of_the_next_readings_lie_inside() -> None:
    draw = np.random.default_rng(0)
    for count, spread in ((1, 0.15), (3, 0.15), (12, 0.2)):
        inside = 0
        for _ in range(2_000):
            logs = draw.normal(2.0, spread, count + 1)
            found = expected([math.exp(each) for each in logs[:-1]], 0.15)
            inside += found.low <= math.exp(logs[-1]) <= found.high
        assert 0.86 < inside / 2_000 < 0.96, (count, spread)


def test_more_readings_make_a_narrower_interval() -> None:
    widths = [expected([1.0, 1.1, 0.9, 1.05][:count], 0.5) for count in (1, 2, 4)]
    ratios = [each.high / each.low for each in widths]
    assert ratios == sorted(ratios, reverse=True)


def test_a_sum_is_narrower_than_its_parts_laid_end_to_end() -> None:
    part = expected([1.0], 0.3)
    whole = added([part, part])
    assert whole.estimate == 2 * part.estimate
    assert 2 * part.low < whole.low < whole.estimate < whole.high < 2 * part.high


# -- what is learnt from earlier runs -------------------------------------------------------------


def part(actual: float | None = None, flops: float | None = 100.0, **like: str) -> ForecastPart:
    return {
        "what": "work",
        "arm": "student",
        "seed": 0,
        "like": like,
        "flops": flops,
        "expected_s": None,
        "source": "",
        "actual_s": actual,
    }


def record(*parts: ForecastPart, **totals: Any) -> ForecastRecord:
    return {
        "settings": "same",
        "device": "cpu",
        "devices": 1,
        "parts": [*parts],
        "missing": [],
        "totals": totals,
    }


ANY = ("settings", "model", "kind")


def test_the_most_alike_parts_decide() -> None:
    past = Past(
        [
            record(part(10.0, settings="a", model="m", kind="k")),
            record(part(40.0, flops=200.0, settings="b", model="m", kind="k")),
            record(part(900.0, flops=300.0, settings="c", model="n", kind="k")),
        ]
    )
    same = past.foresee(part(settings="a", model="m", kind="k"), *ANY)
    assert same is not None
    assert same.seconds.estimate == pytest.approx(10.0)
    assert same.source == "1 run with the same settings"
    # by size: 0.1 and 0.2 seconds for a FLOP, whose geometric mean is 0.1414
    model = past.foresee(part(flops=1000.0, settings="x", model="m", kind="k"), *ANY)
    assert model is not None
    assert model.seconds.estimate == pytest.approx(1000 * math.sqrt(0.1 * 0.2))
    assert model.source == "2 runs of this model"
    kind = past.foresee(part(settings="x", model="y", kind="k"), *ANY)
    assert kind is not None
    assert kind.source == "3 runs of this kind"
    assert past.foresee(part(settings="x", model="y", kind="z"), *ANY) is None
    assert past.foresee(part(flops=None, settings="x", model="m", kind="k"), *ANY) is None


def test_a_run_that_did_not_end_teaches_nothing() -> None:
    past = Past([record(part(None, settings="a", model="m", kind="k"))])
    assert past.foresee(part(settings="a", model="m", kind="k"), *ANY) is None


def test_the_past_is_read_from_the_runs_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, each in (("1", record(part(10.0, settings="a"))), ("2", record())):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_json(tmp_path / "runs" / name / FILE, sealed(each))
    (tmp_path / "runs/3").mkdir()
    (tmp_path / "runs/4").mkdir()
    (tmp_path / "runs/4" / FILE).write_text('{"parts": 3}')
    assert len(Past.read(tmp_path, but="2").records) == 1
    assert "forecasts do without it" in capsys.readouterr().out


def test_a_job_asks_for_what_earlier_runs_took(tmp_path: Path) -> None:
    run = Run(recipe="baseline")
    run.hardware.device, run.tracking.root = "cuda", str(tmp_path)
    assert needs_of(run, hosts=1, cpus=None, memory_gib=None).wall_seconds is None
    for name, seconds in (("1", 100.0), ("2", 110.0)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        each = record(part(seconds), part(20.0), host_bytes=total(1, 1, 1, 3 * 2.0**30))
        write_json(tmp_path / "runs" / name / FILE, sealed({**each, "settings": settings_key(run)}))
    found = needs_of(run, hosts=1, cpus=None, memory_gib=None)
    assert found.wall_seconds is not None
    assert 130 < found.wall_seconds < 200  # above both, and not by much
    assert found.memory_gib in (4, 5)
    assert "time (2 runs) and memory (2 runs) by earlier runs" in found.source
    # what the settings say stays; an engine without limits is asked for none
    assert needs_of(run, hosts=1, cpus=None, memory_gib=8).memory_gib == 8
    assert needs_of(run, hosts=1, cpus=None, memory_gib=8, limits_time=False).wall_seconds is None
    run.training.steps += 1
    assert needs_of(run, hosts=1, cpus=None, memory_gib=None) == Needs(on_gpu=True)


# -- in words -------------------------------------------------------------------------------------


def total(value: float, low: float, high: float, actual: float | None = None) -> dict[str, Any]:
    span = {"value": value, "low": low, "high": high}
    return {"expected": span, "why_missing": None, "actual": actual}


def nothing(why: str) -> dict[str, Any]:
    return {"expected": None, "why_missing": why, "actual": None}


def whole(hours: dict[str, Any]) -> ForecastRecord:
    return record(
        part(settings="a"),
        device_hours=hours,
        memory_bytes=total(2e9, 1.7e9, 2.5e9),
        host_bytes=nothing("not known"),
        disk_bytes=nothing("not known"),
        energy_j=nothing("no counter"),
    )


def test_the_line_has_hours_interval_time_and_what_is_left_out() -> None:
    found = whole(total(0.5, 0.4, 0.7))
    found["missing"] = ["the comparison pass", "starting and reporting"]
    assert forecast_line(found) == (
        "forecast: 0.50 device-hours (90%: 0.40 to 0.70), about 30.0 min; memory of a device in"
        " training 2 GB; without the comparison pass and starting and reporting, of which nothing"
        " is known here"
    )
    assert forecast_line(whole(nothing("no part of it is known here yet"))) == (
        "forecast: not known yet (no part of it is known here yet)"
    )
    lines = forecast_table(found)
    assert lines[0].split() == ["part", "seconds", "90%", "interval", "known", "from"]
    assert lines[-1].endswith("no counter")


@pytest.mark.parametrize(
    ("actual", "said"),
    [(0.6, "+20%), inside the 90% interval"), (0.8, "+60%), outside the 90% interval")],
)
def test_a_finished_run_is_compared_with_its_forecast(actual: float, said: str) -> None:
    line = score_line(whole(total(0.5, 0.4, 0.7, actual)))
    assert line is not None
    assert line.endswith(said)


def test_the_record_has_coverage_error_and_width() -> None:
    scored: Sequence[ForecastRecord] = [
        whole(total(1.0, 0.5, 2.0, 1.1)),
        whole(total(1.0, 0.5, 2.0, 3.0)),
        whole(total(1.0, 0.5, 2.0)),
    ]
    assert record_lines(scored)[0] == (
        "device-hours: 1 of 2 forecasts inside the 90% interval; median error 105%; the interval's"
        " ends are 4.0x apart (median)"
    )
    assert record_lines([]) == ["no forecast of this store has been scored yet"]


# -- as a user runs it ----------------------------------------------------------------------------

TINY = [
    "tracking.charts=false",
    *("recipe=baseline", "precision=fp32", "hardware.device=cpu", "tracking.mlflow=false"),
    *("training.steps=14", "training.batch_size=4", "training.sequence_length=64"),
    *("data.max_documents=40", "data.vocabulary_size=512", "training.eval_documents=1"),
    *("model.shape.hidden_size=64", "model.shape.heads=1", "model.shape.layers=2"),
    *("model.shape.intermediate_size=128", "quality.max_documents=8", "quality.bootstrap=200"),
]


@pytest.mark.slow
def test_a_run_is_foreseen_scored_and_learnt_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main([*TINY], 0) == 0
    probed = capsys.readouterr().out
    assert "a probe of its first steps" in probed
    assert "start and report" in probed
    assert not list(Path("mlruns").glob("runs/*"))  # nothing is recorded
    assert main([*TINY], started_ns=0) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("forecast: ")
    assert "without starting and reporting, of which nothing" in " ".join(printed.split())
    folder = Path("mlruns/latest").resolve()
    kept = read_record(folder / FILE, FORECAST)
    result = json.loads((folder / "result.json").read_text())
    assert kept is not None
    assert result["forecast"] == kept
    last = read_events(folder / "journal.jsonl", checked=True)[-1]
    assert last["e"] == "run_end"
    assert last.get("forecast") == kept["totals"]["device_hours"]
    row = result["rows"][0]["ledger"]["device_hours"]
    actual = {part["what"]: part["actual_s"] for part in kept["parts"]}
    assert actual["work"] == pytest.approx(row["work"]["value"] * 3600)
    assert actual["assess"] == pytest.approx(row["assess"]["value"] * 3600)
    disk = kept["totals"]["disk_bytes"]
    assert disk["expected"]["low"] <= disk["actual"] <= disk["expected"]["high"]
    # another seed: nothing is reused, all is known
    assert command.main([*TINY, "seed=1", "--json"], 0) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["missing"] == []
    assert {part["source"] for part in again["parts"]} == {"1 run with the same settings"}
    # the same run once more: what is done costs nothing
    assert command.main([*TINY, "--json"], 0) == 0
    assert [part["what"] for part in json.loads(capsys.readouterr().out)["parts"]] == ["overhead"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Usage: python -m pipeline forecast"),
        (["--fast", "recipe=baseline"], "refused: --fast: is no flag of forecast"),
        (["training.steps=3"], "refused: recipe: none is named"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_with_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words, 0) == 2
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


@pytest.mark.slow
def test_a_training_that_cannot_fit_is_refused_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    needed = training_memory(work(sequence_length=1024, batch_size=64), LM, Spread()).total
    monkeypatch.setattr(
        "pipeline.runs.fitting.host_now", lambda: (None, int(needed.estimate * LEAST / MOST))
    )
    words = [*TINY, "training.sequence_length=1024", "training.batch_size=64"]
    assert main(words, started_ns=0) == 1
    said = capsys.readouterr().err
    assert said.startswith("refused: stages.baseline: its training takes about ")
    assert "training.gradient_accumulation=" in said
    assert not list(Path("mlruns").glob("runs/*"))
