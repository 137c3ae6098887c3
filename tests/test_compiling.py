"""Whether a training runs compiled: what is compiled, when it is tried, and what is said of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from make_assess_models import tiny
from test_training_loop import CPU, batches_for, run, same, settings, weights

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.training import Compile, TrainingConfig
from pipeline.distillation.hidden import HiddenSignal
from pipeline.distillation.losses import Loss
from pipeline.ledger.devices import table
from pipeline.ledger.devices.cpu import Cpu
from pipeline.ledger.devices.table import KINDS
from pipeline.ledger.phases import PhaseClock
from pipeline.tasks.table import Task
from pipeline.training import compiling
from pipeline.training.compiling import MOST_GRAPHS, Compiling, as_compiled, fresh, said
from pipeline.training.objective import Objective, Teacher
from pipeline.training.reading import Documents, examine


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace graphs and their gradients as ever, and generate no code."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def objective_of(*, taught: bool = False, seed: int = 0) -> Objective:
    model = tiny(Task.causal_lm, seed=seed)
    teacher = None
    if taught:
        other = tiny(Task.causal_lm, seed=1).eval()
        other.requires_grad_(requires_grad=False)
        teacher = Teacher(other, Precision.fp32, Loss(0.5), examine(other, CPU))
    read = examine(model, CPU)
    clock = PhaseClock()
    return Objective(model, Task.causal_lm, Precision.fp32, CPU, clock, teacher, read=read)


def compiling_of(config: TrainingConfig, objective: Objective, lines: list[str]) -> Compiling:
    return Compiling(config, objective, fresh(), PhaseClock(), lines.append)


def gradients(objective: Objective) -> list[torch.Tensor]:
    loss = objective(batches_for(settings()).batch(0)).loss
    return list(torch.autograd.grad(loss, list(objective.model.parameters())))


@pytest.mark.parametrize("taught", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_is_compiled_gives_the_same_gradients(taught: bool) -> None:
    """In fp64, so that nothing but rounding is left."""
    objective = objective_of(taught=taught)
    objective.model.double()
    if objective.teacher is not None:
        objective.teacher.model.double()
    wanted = gradients(objective)
    with as_compiled(objective, settings()):
        found = gradients(objective)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("taught", "graphs"), [pytest.param(False, 2, marks=pytest.mark.slow), (True, 3)]
)
def test_all_that_a_step_calls_is_compiled(taught: bool, graphs: int, tmp_path: Path) -> None:
    """The body, its teacher's, and the terms of the loss; nothing breaks off."""
    compiled = objective_of(taught=taught)
    config = settings(compile=Compile.always)
    found = run(compiled.model, config, tmp_path, objective=compiled).compiling
    assert (found["chosen"], found["at_step"]) == ("compiled", 0)
    assert (found["graphs"], found["breaks"], found["recompiled"]) == (graphs, 0, 0)
    assert said(found) is not None
    # what comes after the last step runs eager
    assert compiled.model.base_model._compiled_call_impl is None
    assert not compiled.compiled


def test_compiling_is_booked_and_moves_no_random_number(tmp_path: Path) -> None:
    objective = objective_of()
    clock = objective.clock
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    each = Compiling(settings(compile=Compile.always), objective, fresh(), clock, print)
    each.begin(lambda: batches_for(settings()).batch(0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in objective.model.parameters())
    assert clock.read_ns()["compile"] / 1e9 == pytest.approx(each.record["compile_s"], rel=0.2)
    assert clock.read_ns().get("forward", 0) == 0
    each.end()


def test_a_short_training_is_left_alone(tmp_path: Path) -> None:
    progress = run(tiny(Task.causal_lm), settings(steps=7), tmp_path)
    found = progress.compiling
    assert (found["chosen"], found["why"]) == ("eager", "too short for compiling to pay")
    assert found["eager_s"] is not None
    assert said(found) is None


def stepped(each: Compiling, seconds: Callable[[int], float], steps: int) -> None:
    batch = batches_for(settings()).batch(0)
    for step in range(1, steps + 1):
        each.stepped(step, seconds(step), batch)


@pytest.mark.parametrize(("after", "chosen"), [(0.7, "compiled"), (0.99, "eager")])
def test_its_own_steps_decide(after: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager steps take a second here, compiled ones what the parameter says."""
    monkeypatch.setattr(compiling, "_run_once", lambda *_: None)
    lines: list[str] = []
    objective = objective_of()
    each = compiling_of(settings(steps=500), objective, lines)
    each.begin(lambda: {})
    stepped(each, lambda step: 1.0 if step <= 5 else 30.0 if step == 6 else after, 9)
    assert each.record["chosen"] == chosen
    assert (each.record["eager_s"], each.record["compiled_s"]) == (1.0, after)
    assert each.record["at_step"] == 5
    assert objective.compiled is (chosen == "compiled")
    text = said(each.record)
    assert text is not None
    if chosen == "compiled":
        assert not lines
        assert "0.7 s a step, 1 s eager: 1.43x" in text
    else:
        assert lines == [f"it goes on without torch.compile: {each.record['why']}"]
        assert each.record["why"].startswith("it is no faster")
    each.end()


def test_what_the_steps_that_are_left_cannot_earn_back_is_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0.4 of what is left at most is saved, and 20 s are expected to be spent."""
    monkeypatch.setattr(compiling, "_run_once", lambda *_: None)
    for steps, tried in ((54, False), (56, True)):
        objective = objective_of()
        each = compiling_of(settings(steps=steps), objective, [])
        stepped(each, lambda _: 1.0, 5)
        assert (each.record["at_step"] is not None) is tried
        each.end()


def test_a_compiler_that_fails_leaves_the_training_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend=broken))
    lines: list[str] = []
    plain, other = objective_of(), objective_of()
    run(plain.model, settings(), tmp_path / "a", objective=plain)
    config = settings(compile=Compile.always)
    progress = run(other.model, config, tmp_path / "b", objective=other, say=lines.append)
    same(weights(plain.model), weights(other.model))
    assert progress.compiling["chosen"] == "eager"
    assert "Tried to allocate 2.00 GiB" in progress.compiling["why"]
    assert lines == [f"it goes on without torch.compile: {progress.compiling['why']}"]


@pytest.mark.parametrize("chosen", ["compiled", "eager"])
def test_an_attempt_that_goes_on_takes_over_what_was_found(chosen: str, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    objective = objective_of()
    count = iter(range(100))
    config = settings(steps=6, compile=Compile.always if chosen == "compiled" else Compile.never)
    with pytest.raises(Stopped):
        run(
            objective.model,
            config,
            tmp_path,
            objective=objective,
            should_stop=lambda: Stopped if next(count) == 2 else None,
        )
    again = objective_of(seed=4)
    auto = dataclasses.replace(config, compile=Compile.auto)
    progress = run(again.model, auto, tmp_path, objective=again)
    assert progress.compiling["chosen"] == chosen
    assert (progress.compiling["at_step"] == 0) is (chosen == "compiled")


@pytest.mark.slow
def test_shapes_that_grow_share_their_graphs(tmp_path: Path) -> None:
    config = settings(steps=6, sequence_length=32, start_sequence_length=8, compile=Compile.always)
    objective = objective_of()
    lengths = [8, 16, 32]
    whole = batches_for(config)

    class Growing:
        def batch(self, step: int) -> dict[str, torch.Tensor]:
            length = lengths[min(step // 2, len(lengths) - 1)]
            return {
                name: tensor[:, :length].contiguous() for name, tensor in whole.batch(step).items()
            }

    progress = run(objective.model, config, tmp_path, objective=objective, batches=Growing())
    assert progress.compiling["chosen"] == "compiled"
    assert progress.compiling["recompiled"] <= 1


def test_a_model_compiled_again_and_again_goes_on_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_run_once", lambda *_: None)
    lines: list[str] = []
    objective = objective_of()
    each = compiling_of(settings(compile=Compile.always), objective, lines)
    each.begin(lambda: batches_for(settings()).batch(0))
    first = compiling.graphs_so_far()
    monkeypatch.setattr(
        compiling, "graphs_so_far", lambda: (first[0] + MOST_GRAPHS + 1, first[1] + 3)
    )
    each.stepped(1, 1.0, {})
    assert each.record["chosen"] == "eager"
    assert each.record["breaks"] == 3
    assert not objective.compiled
    assert lines


def test_validation_compiles_nothing(tmp_path: Path) -> None:
    objective = objective_of()
    seen: list[int] = []

    def validate() -> float:
        before = compiling.graphs_so_far()[0]
        for length in (3, 7, 11):  # shapes that no step has
            objective.model(input_ids=torch.arange(3, 3 + length)[None])
        seen.append(compiling.graphs_so_far()[0] - before)
        return 1.0

    config = settings(compile=Compile.always)
    progress = run(objective.model, config, tmp_path, objective=objective, validate=validate)
    assert seen == [0, 0, 0]
    assert progress.compiling["graphs"] == 2


def test_what_is_read_with_hooks_is_not_compiled() -> None:
    objective = objective_of()
    objective.relations = object()  # pyright: ignore[reportAttributeAccessIssue]
    each = compiling_of(settings(), objective, [])
    each.begin(lambda: {})
    assert each.record["chosen"] == "eager"
    assert "hooks" in each.record["why"]


# -- as CUDA graphs: a CPU with a capture of its own stands in -------------------------------------


class Capturing(Cpu):
    """A CPU that says it captures."""

    captures = True
    compiled_and_captured: ClassVar[dict[str, Any]] = {"as": "graphs"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Have bodies note how they are compiled, and nothing be compiled or run."""
    found: list[dict[str, Any]] = []
    monkeypatch.setitem(KINDS, "cpu", Capturing)
    monkeypatch.setattr(table, "_opened", {})
    monkeypatch.setattr(compiling, "_run_once", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: found.append(given))
    return found


@pytest.mark.parametrize(("after", "chosen"), [(0.5, "captured"), (0.69, "compiled")])
def test_compiled_steps_are_tried_as_graphs(
    after: float, chosen: str, asked: list[dict[str, Any]]
) -> None:
    """An eager step takes a second here, a compiled one 0.7, a captured one what the parameter
    says.
    """
    lines: list[str] = []
    objective = objective_of()
    each = compiling_of(settings(steps=500), objective, lines)
    each.begin(lambda: {})
    stepped(each, lambda step: 1.0 if step <= 5 else 0.7 if step <= 9 else after, 13)
    assert each.record["chosen"] == chosen
    found = [each.record[name] for name in ("eager_s", "compiled_s", "captured_s")]
    assert found == [1.0, 0.7, after]
    assert objective.captured is (chosen == "captured")
    as_graphs = {"dynamic": None, "options": {"as": "graphs"}}
    # compiled, then as graphs, and where those are no faster, compiled again
    wanted = [{"dynamic": None}, as_graphs, {"dynamic": None}]
    assert asked == wanted[: 2 if chosen == "captured" else 3]
    text = said(each.record)
    assert text is not None
    assert f"{after} s a step as CUDA graphs: {0.7 / after:.2f}x" in text
    assert text.startswith("compiled, as CUDA graphs, after") is (chosen == "captured")
    each.end()
    assert not objective.captured


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),
        ({"start_sequence_length": 8, "sequence_length": 16}, False),
        ({"start_batch_size": 2, "batch_size": 4}, False),
        ({"gradient_accumulation": 2}, False),
    ],
)
@pytest.mark.usefixtures("asked")
def test_only_steps_of_one_shape_are_captured(changes: dict[str, int], may: bool) -> None:
    assert compiling.may_capture(objective_of(), settings(**changes)) is may


def test_a_device_without_graphs_is_not_asked_for_them() -> None:
    assert not compiling.may_capture(objective_of(), settings())


@pytest.mark.parametrize(
    "refusal", ["a wait in the dry run", "torch captures nothing", "the capture fails"]
)
def test_a_step_that_cannot_be_captured_stays_compiled(
    refusal: str, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0

    def run_once(*_: Any) -> None:
        nonlocal runs
        runs += 1
        if refusal == "a wait in the dry run" and runs == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if refusal == "the capture fails" and runs == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(compiling, "_run_once", run_once)
    if refusal == "torch captures nothing":
        skips = iter(range(10))
        monkeypatch.setattr(Capturing, "captures_refused", lambda _: next(skips))
    lines: list[str] = []
    objective = objective_of()
    each = compiling_of(settings(steps=500), objective, lines)
    stepped(each, lambda step: 1.0 if step <= 5 else 0.7, 9)
    assert each.record["chosen"] == "compiled"
    assert objective.compiled
    assert not objective.captured
    assert len(lines) == 1
    assert lines[0].startswith("steps go on compiled, without CUDA graphs: ")
    assert each.record["why"].startswith("no CUDA graphs: ")
    assert asked[-1] == {"dynamic": None}
    each.end()


def test_captured_steps_are_taken_over(asked: list[dict[str, Any]]) -> None:
    record = {**fresh(), "chosen": "captured", "at_step": 5, "compiled_s": 0.7, "captured_s": 0.5}
    objective = objective_of()
    each = Compiling(settings(), objective, record, PhaseClock(), print)  # pyright: ignore[reportArgumentType]
    each.begin(lambda: {})
    assert objective.captured
    assert asked[-1]["options"] == {"as": "graphs"}
    each.end()


def test_documents_of_captured_steps_have_few_sizes() -> None:
    """Empty documents behind the last one, up to a power of two."""
    positions = torch.cat([torch.arange(n) for n in (3, 2, 4, 7)])[None]
    documents = Documents.of(positions, positions, few_sizes=True)
    assert documents.bounds.tolist() == [0, 3, 5, 9, 16, 16, 16, 16, 16]
    assert not documents.a_row
    many = torch.zeros(1, 9, dtype=torch.int64)
    assert len(Documents.of(many, many, few_sizes=True).bounds) == 17
    assert len(Documents.of(many, many).bounds) == 10


def test_nothing_is_chosen_by_time_where_all_is_to_be_the_same(tmp_path: Path) -> None:
    progress = run(tiny(Task.causal_lm), settings(steps=7, deterministic=True), tmp_path)
    assert progress.compiling["chosen"] == "eager"
    assert "deterministic" in progress.compiling["why"]
    assert progress.compiling["eager_s"] is None


def test_a_trial_that_was_stopped_takes_its_times_anew(asked: list[dict[str, Any]]) -> None:
    """What another attempt timed is no time of the steps that this one takes."""
    record = {**fresh(), "at_step": 5, "eager_s": 1.0, "compiled_s": 0.7}
    each = Compiling(settings(steps=500), objective_of(), record, PhaseClock(), print)  # pyright: ignore[reportArgumentType]
    each.begin(lambda: {})
    assert each.record["eager_s"] is None
    stepped(each, lambda step: 2.0 if step <= 5 else 1.0, 9)
    assert (each.record["eager_s"], each.record["compiled_s"]) == (2.0, 1.0)
    each.end()


def test_when_it_was_compiled_is_kept(asked: list[dict[str, Any]]) -> None:
    record = {**fresh(), "chosen": "compiled", "at_step": 5, "eager_s": 1.0, "compiled_s": 0.7}
    each = Compiling(settings(), objective_of(), record, PhaseClock(), print)  # pyright: ignore[reportArgumentType]
    each.begin(lambda: {})
    assert each.record["at_step"] == 5
    each.end()


def test_compiling_leaves_no_gradient_behind() -> None:
    """Of what is trained beside the model too: it would be added to the next step's."""
    objective = objective_of(taught=True)
    assert objective.teacher is not None
    widths = (objective.model.config.hidden_size, objective.teacher.model.config.hidden_size)
    objective.hidden = HiddenSignal([(0, 0)], widths, 1.0)
    objective.hidden.requires_grad_()
    compiling._run_once(objective, batches_for(settings()).batch(0))
    trained = [*objective.model.parameters(), *objective.hidden.parameters()]
    assert all(each.grad is None for each in trained)


def test_a_shape_that_is_compiled_within_a_step_is_booked_as_compiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0]
    clock = PhaseClock(lambda: now[0])
    spent = [10.0]
    monkeypatch.setattr(compiling, "_run_once", lambda *_: None)
    monkeypatch.setattr(compiling, "seconds_so_far", lambda: spent[0])
    each = Compiling(settings(compile=Compile.always), objective_of(), fresh(), clock, print)
    assert each.compiled_ns() == 0  # nothing is compiled yet
    each.begin(lambda: {})
    with clock.phase("forward"):
        now[0] += 5 * 10**9
    spent[0] += 3.0
    assert each.compiled_ns() == 3 * 10**9
    phases = clock.read_ns()
    assert (phases["forward"], phases["compile"]) == (2 * 10**9, 3 * 10**9)
    assert each.compiled_ns() == 0
    spent[0] += 9.0  # no more than there is
    assert each.compiled_ns() == 2 * 10**9
    each.end()
