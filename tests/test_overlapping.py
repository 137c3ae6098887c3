"""Whether a teacher runs beside its student: what is started where, and what decides it.

A CPU has one stream; a device that notes what is asked of it stands in. On a GPU, `test_gpu.py` has
the same losses and gradients come out either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compiling import objective_of
from test_training_loop import batches_for, run, same, settings, weights

from pipeline.ledger.devices import table
from pipeline.ledger.devices.cpu import Cpu
from pipeline.ledger.devices.device import Allocator
from pipeline.ledger.devices.table import KINDS
from pipeline.training import reading
from pipeline.training.compiling import TIMED
from pipeline.training.objective import Objective
from pipeline.training.overlapping import FIRST, Overlapping, fresh, said
from pipeline.training.reading import Apart

MIB = 2**20
happened: list[str] = []


class Streams(Cpu):
    """A CPU that says it has streams, and notes what is started on the second one."""

    streams = True
    free = 100 * MIB

    @contextmanager
    def beside(self) -> Generator[None]:
        happened.append("begins")
        yield
        happened.append("is started")

    def join(self) -> None:
        happened.append("is waited for")

    def allocator(self) -> Allocator:
        kept, peak = 40 * MIB, 60 * MIB
        return Allocator(
            allocated=kept,
            reserved=peak,
            peak_allocated=peak,
            peak_reserved=peak,
            retries=0,
            ooms=0,
        )

    def free_bytes(self) -> tuple[int, int]:
        return self.free, 200 * MIB


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "cpu", Streams)
    monkeypatch.setattr(table, "_opened", {})
    happened.clear()


def overlapping_of(objective: Objective, *, due: bool = True) -> Overlapping:
    return Overlapping(objective, fresh(), is_due=lambda: due)


def take(each: Overlapping, *seconds: float) -> None:
    for one in seconds:
        each.stepped(one)


def test_the_teacher_runs_beside_and_the_loss_waits_for_it() -> None:
    objective = objective_of(taught=True)
    assert objective.teacher is not None
    for model, name in ((objective.teacher.model, "teacher"), (objective.model, "student")):
        model.register_forward_hook(lambda *_, name=name: happened.append(name))
    model = objective.model.base_model
    model.register_forward_hook(lambda *_: happened.append("student"))
    objective.teacher.model.base_model.register_forward_hook(lambda *_: happened.append("teacher"))
    usual = objective.head_loss

    def noted(*given: Any, **more: Any) -> Any:
        happened.append("loss")
        return usual(*given, **more)

    objective.head_loss = noted
    batch = batches_for(settings()).batch(0)
    apart = objective(batch)
    assert happened == ["teacher", "student", "loss"]
    happened.clear()
    objective.overlaps = True
    beside = objective(batch)
    wanted = ["begins", "teacher", "is started", "student", "is waited for", "loss"]
    assert happened == wanted
    assert torch.equal(apart.loss, beside.loss)


@pytest.mark.parametrize(("beside", "chosen"), [(0.8, True), (0.99, False)])
def test_its_own_steps_decide(beside: float, chosen: bool) -> None:
    objective = objective_of(taught=True)
    each = overlapping_of(objective)
    each.begin()
    assert not objective.overlaps
    take(each, *[9.0] * FIRST, *[1.0] * TIMED)
    assert objective.overlaps
    take(each, *[9.0] * FIRST, *[beside] * TIMED)
    assert objective.overlaps is chosen
    assert each.record == {
        "chosen": chosen,
        "why": "" if chosen else "it is no faster",
        "apart_s": 1.0,
        "beside_s": beside,
    }
    text = said(each.record)
    assert text is not None
    assert f"{beside:.3g} s a step beside one another, 1 s one after the other" in text
    assert not each.is_timing
    each.end()
    assert not objective.overlaps


def test_it_waits_until_it_is_known_whether_steps_are_compiled() -> None:
    each = overlapping_of(objective_of(taught=True), due=False)
    each.begin()
    take(each, *[1.0] * 20)
    assert each.record["apart_s"] is None
    assert not each.is_timing


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 20 MiB beyond what stays: as much must be free."""
    monkeypatch.setattr(Streams, "free", 19 * MIB)
    objective = objective_of(taught=True)
    each = overlapping_of(objective)
    each.begin()
    take(each, *[1.0] * (FIRST + TIMED))
    assert each.record["chosen"] is False
    assert each.record["why"] == "a step takes up to 21 MB, and 19.9 MB are free beside it"
    assert said(each.record) == (
        "teacher and student run one after the other: a step takes up to 21 MB, and 19.9 MB are"
        " free beside it"
    )


def test_without_a_teacher_nothing_is_tried() -> None:
    each = overlapping_of(objective_of())
    each.begin()
    assert each.record["chosen"] is False
    assert said(each.record) is None


def test_a_device_without_streams_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, "streams", False)
    each = overlapping_of(objective_of(taught=True))
    each.begin()
    assert (each.record["chosen"], each.record["why"]) == (False, "no streams on cpu")


def test_a_training_finds_it_out_and_gives_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its steps decide, the arithmetic is the same."""
    steps = settings(steps=16)
    ours = objective_of(taught=True)
    progress = run(ours.model, steps, tmp_path / "a", objective=ours)
    assert progress.compiling["chosen"] == "eager"
    assert progress.overlapping["chosen"] is not None
    assert progress.overlapping["beside_s"] is not None
    monkeypatch.setitem(KINDS, "cpu", Cpu)
    other = objective_of(taught=True)
    plain = run(other.model, steps, tmp_path / "b", objective=other)
    assert plain.overlapping["why"] == "no streams on cpu"
    same(weights(ours.model), weights(other.model))


def test_what_was_found_is_taken_over() -> None:
    objective = objective_of(taught=True)
    record = fresh()
    record["chosen"] = True
    Overlapping(objective, record, is_due=lambda: True).begin()
    assert objective.overlaps


def test_captured_steps_do_not_run_beside_anything() -> None:
    """Graphs share one pool of memory: what one frees another takes, in the order of capture."""
    objective = objective_of(taught=True)
    each = overlapping_of(objective)
    each.begin()
    objective.captured = True  # found out meanwhile
    take(each, *[1.0] * (FIRST + TIMED))
    assert (each.record["chosen"], each.record["why"]) == (False, "steps are captured as graphs")
    assert not objective.overlaps


def test_nothing_is_tried_where_no_choice_may_be_by_time(tmp_path: Path) -> None:
    ours = objective_of(taught=True)
    config = settings(deterministic=True)
    progress = run(ours.model, config, tmp_path, objective=ours)
    assert progress.overlapping["apart_s"] is None
    assert "deterministic" in progress.overlapping["why"]


def test_a_mask_that_both_read_is_made_before_the_teacher_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Made beside, it would be read before it is there."""
    objective = objective_of(taught=True)
    objective.read = dataclasses.replace(objective.read, apart=Apart.mask)
    objective.teacher_read = dataclasses.replace(objective.teacher_read, apart=Apart.mask)
    made = reading.document_mask

    def noted(positions: torch.Tensor) -> torch.Tensor:
        happened.append("mask")
        return made(positions)

    monkeypatch.setattr(reading, "document_mask", noted)
    objective.overlaps = True
    objective(batches_for(settings()).batch(0))
    assert happened == ["mask", "begins", "is started", "is waited for"]
