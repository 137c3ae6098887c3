"""What ranks hold where nobody says it: whole weights where those fit, else shares of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from pipeline.config.settings.parallel import Parallel
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import OptimizerKind
from pipeline.forecast.memory import Spread, training_memory
from pipeline.runs import fitting
from pipeline.runs.fitting import check_memory, planned_spread, shared_by_need, with_fitting_mode
from pipeline.stages.base import BeforeRun
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task
from pipeline.training.ranks import Place

WIDE = LlamaConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
)
FOUR_ON_TWO_HOSTS = Place(0, 4, 0, 2)


def known_of(mode: Parallel = Parallel.auto, **settings: Any) -> BeforeRun:
    run = Run()
    data: Any = None  # nobody reads it
    run.parallel.mode = mode
    run.stages = {"plain": TrainStage(precision=Precision.fp32, **settings)}
    run.training.batch_size, run.training.sequence_length = 4, 32
    return BeforeRun(run, data, torch.device("cpu"), "", WIDE)


def needed(known: BeforeRun, spread: Spread) -> float:
    work = TrainStage.workload(known.run.stages["plain"], "plain", known)
    assert work is not None
    return training_memory(work, Task.causal_lm, spread).total.estimate


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give four ranks of two hosts so many bytes each."""

    def having(each: float, place: Place | None = FOUR_ON_TWO_HOSTS) -> None:
        size = 1 if place is None else place.size
        monkeypatch.setattr(fitting, "place_in", lambda: place)
        monkeypatch.setattr(fitting, "host_now", lambda: (None, int(each * size)))

    return having


@pytest.mark.parametrize(
    ("spread", "mode"),
    [(Spread(4), Parallel.ddp), (Spread(4, 2), Parallel.hsdp), (Spread(4, 4), Parallel.fsdp)],
)
def test_the_first_mode_in_which_all_trainings_fit(
    spread: Spread, mode: Parallel, host: Any
) -> None:
    known = known_of()
    host(needed(known, spread) + 1)
    found, said = with_fitting_mode(known)
    assert found.run.parallel.mode is mode
    assert planned_spread(found.run, known.device) == spread
    check_memory(found)
    if mode is Parallel.ddp:
        assert said == []
    else:
        assert said[0].startswith(f"parallel.mode=auto: {mode.value}, as plain takes about ")


def test_one_host_has_nothing_between_hosts(host: Any) -> None:
    known = known_of()
    host(needed(known, Spread(4, 2)) + 1, Place(0, 4, 0, 4))
    assert with_fitting_mode(known)[0].run.parallel.mode is Parallel.fsdp


def test_what_fits_in_no_mode_is_refused_in_the_smallest(host: Any) -> None:
    known = known_of()
    host(needed(known, Spread(4, 4)) / 2)
    found, _ = with_fitting_mode(known)
    assert found.run.parallel.mode is Parallel.fsdp
    with pytest.raises(Exception, match=r"stages\.plain: its training takes about"):
        check_memory(found)


def test_a_mode_that_settings_do_not_allow_is_passed_over(host: Any) -> None:
    """bitsandbytes steps no shares of weights."""
    known = known_of(optimizer=OptimizerKind.adamw_8bit_bitsandbytes)
    host(needed(known, Spread(4, 4)) + 1)
    assert with_fitting_mode(known)[0].run.parallel.mode is Parallel.ddp


@pytest.mark.parametrize("mode", [Parallel.ddp, Parallel.fsdp])
def test_a_mode_that_is_named_stays(mode: Parallel, host: Any) -> None:
    known = known_of(mode)
    host(1.0)
    assert with_fitting_mode(known) == (known, [])


def test_what_fits_no_device_by_itself_is_shared_by_need(host: Any) -> None:
    known = known_of()
    for room, shared in ((0.9, {"plain"}), (1.1, set[str]())):
        host(room * needed(known, Spread()))
        assert shared_by_need(known) == shared


def test_one_process_shares_nothing_out(host: Any) -> None:
    known = known_of()
    host(1.0, None)
    assert with_fitting_mode(known) == (known, [])


def test_where_memory_is_not_told_ranks_hold_whole_weights(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = known_of()
    host(1.0)
    monkeypatch.setattr(fitting, "host_now", lambda: (None, None))
    found, said = with_fitting_mode(known)
    assert (found.run.parallel.mode, said) == (Parallel.ddp, [])
    assert dataclasses.replace(found.run.parallel, mode=Parallel.auto) == known.run.parallel
