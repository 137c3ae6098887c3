"""Which precision trains this model, with this batch, on this device the fastest, and as well as
fp32.

Every precision that the device can do takes the same first steps from the same weights, in turns,
on the very path that training takes: compiled, where the training will be or may be. Those whose
loss stays within a tolerance of fp32's may be chosen; the fastest is. Weights and generators are as
before afterwards, so that a training with the choice is, bit for bit, one that was given it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.compare.statistics import mean_interval
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.training import Compile, TrainingConfig
from pipeline.errors import UserError, one_line
from pipeline.ledger.attempted import attempted
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.numbers import percents_apart
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.records import CHOICE, read_record
from pipeline.ledger.shapes import PrecisionChoice, PrecisionTrial
from pipeline.store.artifacts import write_json
from pipeline.training.compiling import as_compiled, may_compile, pays
from pipeline.training.float8 import RECIPES, wide_layers
from pipeline.training.loop import trial_steps
from pipeline.training.objective import Objective
from pipeline.training.precision import why_not
from pipeline.training.prefetch import Batches

STEPS = 4  # of a trial, the first of which are not timed
WARM_UP = 1
ROUNDS = 6  # trials of each precision, unless the time is up
# the most that a probe takes: seconds, or a share of the stage's estimate
LEAST_S, SHARE = 60.0, 0.01
FILE = "precision.json"
Trials = Callable[[Sequence["Tried"], Callable[[], int], int], None]
"""Takes trials of precisions by a clock, at most so many of each."""


@dataclass(slots=True)
class Tried:
    """One precision's trials.

    Attributes:
        seconds: A timed step of each round.
        losses: Of the first round's steps.
    """

    precision: Precision
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def apart(self, reference: Tried) -> float:
        """Return the mean distance of its losses from the reference's, as a share of the mean of
        those; infinite for NaN.
        """
        ours, theirs = np.array(self.losses), np.array(reference.losses)
        # Step by step, so that losses above and below fp32's do not cancel.
        apart = float(np.abs(ours - theirs).mean() / np.abs(theirs).mean())
        return apart if math.isfinite(apart) else math.inf

    def time_ratio(self, reference: Tried) -> tuple[float, float, float]:
        """Return its seconds a step over the reference's, the mean of log-ratios over rounds, with
        a t interval at 90%.
        """
        count = min(len(self.seconds), len(reference.seconds))
        logs = np.log(np.array(self.seconds[:count]) / np.array(reference.seconds[:count]))
        if count < 2:
            return math.exp(float(logs[0])), 0.0, math.inf
        interval = mean_interval(logs)
        return math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a probe found; `about` is its plain JSON form."""

    precision: Precision
    about: PrecisionChoice

    def __str__(self) -> str:
        return f"precision {self.precision.value}: " + "; ".join(self.about["said"])


def decide(tried: Sequence[Tried], refused: Sequence[str], tolerance: float) -> Choice:
    """Choose the fastest of those whose loss tracks fp32's, the first of `tried`."""
    reference, said = tried[0], list[str]()
    best, best_ratio, trials = reference, 1.0, list[PrecisionTrial]()
    others = [
        each
        for each in tried
        if each.precision not in RECIPES and each.apart(reference) <= tolerance
    ]
    # The fastest without float8: what float8 is held against in what is said below.
    usual = min((each.time_ratio(reference)[0] for each in others), default=1.0)
    for each in tried:
        distance, (ratio, low, high) = each.apart(reference), each.time_ratio(reference)
        holds = distance <= tolerance
        if holds and ratio < best_ratio:
            best, best_ratio = each, ratio
        trials.append(
            {
                "precision": each.precision.value,
                "time_ratio": ratio,
                "loss_apart": distance if holds else None,
                "ci": [low, high] if math.isfinite(high) else None,
                "rounds": len(each.seconds),
            }
        )
        if each is not reference:
            ends = f" ({low:.2f} to {high:.2f})" if math.isfinite(high) else ""
            lies, limit = percents_apart(distance, tolerance)
            lost = "" if holds else f", refused: its loss lies {lies} from fp32's, above {limit}"
            if holds and each.precision in RECIPES and ratio >= usual:
                lost = f", refused: no faster than without float8 ({usual:.2f}x)"
            said.append(f"{each.precision.value} {ratio:.2f}x fp32's time{ends}{lost}")
    return Choice(
        best.precision,
        {
            "chosen": best.precision.value,
            "loss_tolerance": tolerance,
            "trials": trials,
            "not_tried": list(refused),
            "said": [*said, *refused],
        },
    )


def choose_precision(
    model: Any,
    objective: Objective,
    batches: Batches,
    settings: TrainingConfig,
    config: PrecisionConfig,
    *,
    left_out: Sequence[Precision],
    folder: Path,
    clock: PhaseClock,
) -> Choice:
    """Return the precision to train in, found by trial, or by an earlier attempt at the same stage.

    Args:
        model: What the loop will train, in fp32 and on its device.
        left_out: Precisions that this stage cannot take.
        folder: Of the stage's checkpoints: what was chosen stays there, so that an attempt that
            goes on does not choose anew.
        clock: Books all of it as `search`.
    """
    kept = read_record(folder / FILE, CHOICE, so="the precision is chosen anew")
    if kept is not None and kept["chosen"] in {each.value for each in Precision}:
        return Choice(Precision(kept["chosen"]), kept)
    with clock.phase("search"):
        able = [p for p in Precision if p not in (Precision.native, Precision.auto, *left_out)]
        reasons = {
            p: why_not(p, objective.device) or _too_narrow(p, objective, config) for p in able
        }
        refused = [f"not {p.value}: {why}" for p, why in reasons.items() if why is not None]
        tried = [Tried(p) for p, why in reasons.items() if why is None]
        trials = partial(_try_all, model, objective, batches, settings, config)
        choice = _decided(trials, tried, refused, objective, settings, config, clock.now_ns)
        write_json(folder / FILE, json.loads(json.dumps(choice.about)))
    return choice


def _decided(
    trials: Trials,
    tried: list[Tried],
    refused: list[str],
    objective: Objective,
    settings: TrainingConfig,
    config: PrecisionConfig,
    now_ns: Callable[[], int],
) -> Choice:
    """Return what trials say: of compiled steps, where the training will run compiled or its length
    makes that worth a try.
    """
    certain = settings.compile is Compile.always and may_compile(objective)
    if not certain:
        trials(tried, now_ns, ROUNDS)
        step_s = min(float(np.mean(each.seconds)) for each in tried)
        wanted = settings.compile is Compile.auto and pays(step_s, settings.steps)
        if not wanted or not may_compile(objective):
            return decide(tried, refused, config.loss_tolerance)
    again = [Tried(each.precision) for each in tried]
    why = attempted(lambda: _try_compiled(trials, again, objective, settings, now_ns), str)
    if why is None:
        choice = decide(again, refused, config.loss_tolerance)
        choice.about["said"].append("all of them compiled")
        return choice
    if certain:
        trials(tried, now_ns, ROUNDS)
    return decide(tried, [*refused, f"not compiled: {one_line(why, 160)}"], config.loss_tolerance)


def _try_compiled(
    trials: Trials,
    tried: list[Tried],
    objective: Objective,
    settings: TrainingConfig,
    now_ns: Callable[[], int],
) -> None:
    with as_compiled(objective, settings):
        for each in tried:  # a graph for each; no time is taken of what that needs
            trials([Tried(each.precision)], now_ns, 1)
        trials(tried, now_ns, ROUNDS)


def _too_narrow(precision: Precision, objective: Objective, config: PrecisionConfig) -> str | None:
    if precision in RECIPES and not wide_layers(objective.model, config.fp8_least_width)[0]:
        return f"no linear layer is {config.fp8_least_width} wide (precision.fp8_least_width)"
    return None


def _try_all(
    model: Any,
    objective: Objective,
    batches: Batches,
    settings: TrainingConfig,
    config: PrecisionConfig,
    tried: Sequence[Tried],
    now_ns: Callable[[], int],
    rounds: int,
) -> None:
    started_ns, limit_s = now_ns(), LEAST_S
    # A copy of all weights: every trial starts from the same ones.
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    usual = objective.precision, objective.clock
    objective.clock = PhaseClock()  # what happens in here is a search, whatever it does
    try:
        for number in range(rounds):
            # a drift of the machine meets all alike
            for each in tried if number % 2 == 0 else reversed(tried):
                objective.precision = each.precision
                with device_of(objective.device).kept_generators():
                    seconds, losses = trial_steps(
                        model, batches, objective, settings, config, STEPS, now_ns
                    )
                _restore(model, before)
                # The first step compiles and allocates.
                each.seconds.append(float(np.mean(seconds[WARM_UP:])))
                # Of the first round alone: the others repeat the same steps.
                each.losses = each.losses or losses
                limit_s = max(limit_s, SHARE * settings.steps * each.seconds[-1])
            # Rounds take about as long as each other: the next one would go beyond the limit.
            if (now_ns() - started_ns) / 1e9 > limit_s * (number + 1) / (number + 2):
                return
    except torch.OutOfMemoryError as error:
        problem = f"{objective.precision.value} does not fit, and all that can be chosen must"
        raise UserError(
            "precision", problem, "name a precision, or give training.gradient_accumulation=2"
        ) from error
    finally:
        objective.precision, objective.clock = usual


def _restore(model: Any, before: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(before[name])
    model.zero_grad(set_to_none=True)
