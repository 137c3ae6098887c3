"""precision=auto: who is chosen, that it changes nothing else, that it is booked, and that it is
not done twice.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import tiny
from test_training_loop import CPU, batches_for, run, same, settings, weights

from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.training import Compile, TrainingConfig
from pipeline.errors import UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.stages import precision_choice
from pipeline.stages.precision_choice import Tried, choose_precision, decide
from pipeline.tasks.table import Task
from pipeline.training import compiling
from pipeline.training.objective import Objective

FP32, BF16, PURE, FP16 = Precision.fp32, Precision.bf16, Precision.bf16_pure, Precision.fp16


def tried(precision: Precision, seconds: list[float], losses: list[float]) -> Tried:
    return Tried(precision, seconds, losses)


# -- who is chosen --------------------------------------------------------------------------------


def test_the_fastest_that_tracks_fp32_is_chosen() -> None:
    found = decide(
        [
            tried(FP32, [1.0, 1.1, 0.9], [4.0, 3.0]),
            tried(BF16, [0.5, 0.55, 0.45], [4.001, 3.001]),
            tried(PURE, [0.4, 0.44, 0.36], [4.01, 3.01]),
            tried(FP16, [0.2, 0.22, 0.18], [4.0, 3.5]),
        ],
        ["not tf32: needs a CUDA device"],
        0.005,
    )
    assert found.precision is PURE
    assert [trial["time_ratio"] for trial in found.about["trials"]] == pytest.approx(
        [1, 0.5, 0.4, 0.2]
    )
    assert (
        "fp16 0.20x fp32's time (0.20 to 0.20), refused: its loss lies 7.14% from fp32's, above"
        " 0.5%" in str(found)
    )
    assert str(found).endswith("not tf32: needs a CUDA device")


def test_fp32_stays_where_nothing_is_faster_or_none_tracks_it() -> None:
    slower = [tried(FP32, [1.0, 1.0], [4.0]), tried(BF16, [1.2, 1.3], [4.0])]
    assert decide(slower, [], 0.005).precision is FP32
    astray = [tried(FP32, [1.0, 1.0], [4.0]), tried(BF16, [0.5, 0.5], [math.nan])]
    found = decide(astray, [], 0.005)
    assert found.precision is FP32
    json.dumps(found.about, allow_nan=False)


def test_float8_is_measured_against_what_else_would_do() -> None:
    """A bf16 that strays is no reason to call the float8 that was chosen too slow."""
    found = decide(
        [
            tried(FP32, [1.0, 1.0], [4.0]),
            tried(BF16, [0.5, 0.5], [5.0]),
            tried(Precision.fp8_rowwise, [0.7, 0.7], [4.0]),
        ],
        [],
        0.005,
    )
    assert found.precision is Precision.fp8_rowwise
    assert str(found).endswith("fp8_rowwise 0.70x fp32's time (0.70 to 0.70)")


def test_the_interval_is_the_t_interval_of_log_ratios() -> None:
    """Ratios 0.5, 0.6, 0.7 against 1: by scipy's own interval of their logarithms."""
    from scipy import stats

    logs = [math.log(ratio) for ratio in (0.5, 0.6, 0.7)]
    low, high = stats.t.interval(0.9, 2, loc=sum(logs) / 3, scale=stats.sem(logs))
    ratio = tried(BF16, [0.5, 0.6, 0.7], [1.0]).time_ratio(tried(FP32, [1.0, 1.0, 1.0], [1.0]))
    assert ratio == pytest.approx((math.exp(sum(logs) / 3), math.exp(low), math.exp(high)))


# -- a real probe ---------------------------------------------------------------------------------


def probe(
    model: Any,
    folder: Path,
    clock: PhaseClock,
    *,
    config: TrainingConfig | None = None,
    **more: Any,
) -> precision_choice.Choice:
    objective = Objective(model, Task.causal_lm, Precision.auto, CPU, clock)
    given: dict[str, Any] = {"left_out": [], **more}
    config = config or settings()
    choice = choose_precision(
        model,
        objective,
        batches_for(config),
        config,
        PrecisionConfig(),
        folder=folder,
        clock=clock,
        **given,
    )
    assert objective.precision is Precision.auto
    assert objective.clock is clock
    assert not objective.compiled
    return choice


@pytest.mark.parametrize(
    ("wanted", "expected_s", "compiled"),
    [
        (Compile.never, 0.0, [False]),
        (Compile.auto, 1e9, [False]),
        (Compile.auto, 0.0, [False, True]),
        (Compile.always, 1e9, [True]),
    ],
)
def test_steps_are_tried_as_the_training_will_run(
    wanted: Compile,
    expected_s: float,
    compiled: list[bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` tries compiled steps too where the training is long enough to be compiled."""
    seen: list[bool] = []

    def trial(model: Any, batches: Any, objective: Objective, *rest: Any) -> Any:
        seen.append(objective.compiled)
        return [1.0] * precision_choice.STEPS, [4.0] * precision_choice.STEPS

    monkeypatch.setattr(precision_choice, "trial_steps", trial)
    monkeypatch.setattr(compiling, "EXPECTED_S", expected_s)
    choice = probe(tiny(Task.causal_lm), tmp_path, PhaseClock(), config=settings(compile=wanted))
    assert [key for key, _ in itertools.groupby(seen)] == compiled
    assert ("all of them compiled" in choice.about["said"]) is compiled[-1]


def test_a_compiler_that_fails_leaves_the_eager_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial(model: Any, batches: Any, objective: Objective, *rest: Any) -> Any:
        if objective.compiled:
            raise RuntimeError("no compiler here")
        return [1.0] * precision_choice.STEPS, [4.0] * precision_choice.STEPS

    monkeypatch.setattr(precision_choice, "trial_steps", trial)
    choice = probe(
        tiny(Task.causal_lm), tmp_path, PhaseClock(), config=settings(compile=Compile.always)
    )
    assert choice.precision is Precision.fp32
    assert choice.about["said"][-1] == "not compiled: RuntimeError: no compiler here"


def test_a_probe_leaves_weights_generators_and_books_as_they_were_but_for_the_search(
    tmp_path: Path,
) -> None:
    model, clock = tiny(Task.causal_lm), PhaseClock()
    before, state = weights(model), torch.get_rng_state()
    choice = probe(model, tmp_path, clock)
    same(before, weights(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        parameter.grad is None and parameter.dtype is torch.float32
        for parameter in model.parameters()
    )
    booked = {name for name, ns in clock.mark()[1].items() if ns and name != "other"}
    assert booked == {"search"}
    assert {trial["precision"] for trial in choice.about["trials"]} == {"fp32", "bf16", "bf16_pure"}
    apart = {trial["precision"]: trial["loss_apart"] for trial in choice.about["trials"]}
    assert apart["fp32"] == 0
    assert all(0 < apart[name] < 0.005 for name in ("bf16", "bf16_pure"))
    assert any("not fp16" in each for each in choice.about["not_tried"])


def test_a_training_that_chose_is_one_that_was_told(tmp_path: Path) -> None:
    chosen, told = tiny(Task.causal_lm), tiny(Task.causal_lm)
    torch.manual_seed(5)
    precision = probe(chosen, tmp_path / "probe", PhaseClock()).precision
    run(
        chosen,
        settings(),
        tmp_path / "chosen",
        objective=Objective(chosen, Task.causal_lm, precision, CPU, PhaseClock()),
    )
    torch.manual_seed(5)
    run(
        told,
        settings(),
        tmp_path / "told",
        objective=Objective(told, Task.causal_lm, precision, CPU, PhaseClock()),
    )
    same(weights(told), weights(chosen))


def test_what_an_attempt_chose_the_next_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = probe(tiny(Task.causal_lm), tmp_path, PhaseClock())
    monkeypatch.setattr(precision_choice, "_try_all", lambda *_: pytest.fail("probed again"))
    again = probe(tiny(Task.causal_lm), tmp_path, PhaseClock())
    assert (again.precision, again.about) == (first.precision, first.about)


def test_a_probe_ends_when_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_choice, "LEAST_S", 1e-9)
    choice = probe(tiny(Task.causal_lm), tmp_path, PhaseClock())
    assert {trial["rounds"] for trial in choice.about["trials"]} == {1}
    assert {trial["ci"] for trial in choice.about["trials"]} == {None}


def test_a_precision_that_does_not_fit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(precision_choice, "trial_steps", full)
    with pytest.raises(UserError, match="precision: fp32 does not fit"):
        probe(tiny(Task.causal_lm), tmp_path, PhaseClock())


def test_what_a_stage_cannot_take_is_not_tried(tmp_path: Path) -> None:
    choice = probe(tiny(Task.causal_lm), tmp_path, PhaseClock(), left_out=[PURE])
    assert PURE.value not in {trial["precision"] for trial in choice.about["trials"]}
