"""Progressive schedules: growing batches and windows, stacked layers, ramps of the loss; by brute
force and by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_assess_models import saved, tiny
from test_training_loop import CPU, LENGTHS, random_documents, run, settings

from pipeline.config.settings.distillation import Divergence
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import IGNORE, PackedBatches, PaddedBatches
from pipeline.data.padding import Padding
from pipeline.distillation.losses import Loss
from pipeline.errors import UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import load_model
from pipeline.models.student import stack_layers
from pipeline.stages.capture import CaptureStage
from pipeline.stages.distill import DistillStage
from pipeline.stages.teaching import loss_at
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective, Teacher
from pipeline.training.schedule import first_row, ramp, sequence_length


def growing(**changes: Any) -> TrainingConfig:
    given = {"steps": 20, "batch_size": 8, "sequence_length": 16, "growth_fraction": 0.5, **changes}
    return settings(**given)


def packed(config: TrainingConfig) -> PackedBatches:
    return PackedBatches(
        random_documents(LENGTHS, is_text=True),
        sequence_length=config.sequence_length,
        seed=7,
        batch_size=lambda step: first_row(step, config),
        length_at=lambda step: sequence_length(step, config),
    )


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.33, 0.5, 1.0])
@pytest.mark.parametrize("start", [1, 2, 4, 8])
@pytest.mark.parametrize("steps", [1, 3, 20, 101])
def test_batches_double_up_to_their_size_and_no_row_is_left_out(
    steps: int, start: int, fraction: float
) -> None:
    config = growing(steps=steps, start_batch_size=start, growth_fraction=fraction)
    sizes = [first_row(step + 1, config) - first_row(step, config) for step in range(steps + 5)]
    assert first_row(0, config) == 0
    assert sizes == sorted(sizes)
    assert set(sizes) <= {1, 2, 4, 8}
    growth = -(-round(steps * fraction, 6) // 1)
    assert all(size == 8 for size in sizes[int(growth) :])
    if steps * fraction >= 20:
        assert sizes[0] == start


def test_sizes_by_hand() -> None:
    """20 steps, half of them growing: 10 steps in two parts for 2 and 4, then 8."""
    config = growing(start_batch_size=2, start_sequence_length=4)
    assert [first_row(step + 1, config) - first_row(step, config) for step in range(12)] == [
        2
    ] * 5 + [4] * 5 + [8] * 2
    assert [sequence_length(step, config) for step in range(12)] == [4] * 5 + [8] * 5 + [16] * 2
    assert first_row(12, config) == 2 * 5 + 4 * 5 + 8 * 2
    constant = growing()
    assert [first_row(step, constant) for step in (0, 1, 19)] == [0, 8, 152]
    assert sequence_length(0, constant) == 16


def test_every_window_is_read_once_an_epoch_whatever_the_batches_are() -> None:
    config = growing(start_batch_size=2)
    batches = packed(config)
    read = np.concatenate([batches.rows(step) for step in range(200)])
    assert sorted(read[: batches.num_rows]) == list(range(batches.num_rows))
    plain = packed(growing())
    assert read[:160].tolist() == np.concatenate([plain.rows(step) for step in range(20)]).tolist()


def test_shorter_windows_hold_the_same_tokens_and_see_nothing_before_them() -> None:
    config = growing(start_sequence_length=4)
    short, whole = packed(config).batch(0), packed(growing()).batch(0)
    assert short["input_ids"].shape == (8 * 4, 4)
    assert torch.equal(short["input_ids"].reshape(8, 16), whole["input_ids"])
    assert torch.equal(short["labels"].reshape(8, 16), whole["labels"])
    for row, (ids, positions) in enumerate(
        zip(short["input_ids"], short["position_ids"], strict=True)
    ):
        before = whole["position_ids"].reshape(-1, 4)[row]
        begins = [at for at in range(4) if at == 0 or before[at] == 0]
        assert positions.tolist() == [
            at - max(start for start in begins if start <= at) for at in range(len(ids))
        ]
    assert torch.equal(
        packed(config).batch(15)["position_ids"], packed(growing()).batch(15)["position_ids"]
    )


def test_growing_batches_of_examples_pad_to_their_own_longest() -> None:
    config = growing(start_batch_size=4)
    batches = PaddedBatches(
        random_documents(LENGTHS),
        batch_size=lambda step: first_row(step, config),
        seed=7,
        padding=Padding(0),
    )
    assert [len(batches.batch(step)["labels"]) for step in (0, 9, 10)] == [4, 4, 8]


# -- training -------------------------------------------------------------------------------------


def test_a_training_that_grows_counts_what_it_read_and_resumes_to_the_bit(tmp_path: Path) -> None:
    config = growing(
        steps=6, batch_size=4, start_batch_size=1, start_sequence_length=8, checkpoint_every=2
    )
    whole = trained(config, tmp_path / "whole")
    assert whole[1].tokens == 16 * sum(
        first_row(step + 1, config) - first_row(step, config) for step in range(6)
    )
    stops = iter([None, None, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "cut", should_stop=lambda: next(stops))
    resumed = trained(config, tmp_path / "cut")
    assert (resumed[1].tokens, resumed[1].examples) == (whole[1].tokens, whole[1].examples)
    for ours, theirs in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def trained(config: TrainingConfig, folder: Path, **hooks: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    model = tiny(Task.causal_lm)
    return model, run(model, config, folder, batches=packed(config), **hooks)


def test_ramps_are_linear_and_then_stay() -> None:
    assert [ramp(step, 20, 0.5, 4.0, 2.0) for step in (0, 5, 10, 19)] == [4.0, 3.0, 2.0, 2.0]
    assert ramp(0, 20, 0.5, None, 2.0) == 2.0
    assert ramp(0, 20, 0.5, 0.0, 1.0) == 0.0


def test_the_loss_changes_with_the_step() -> None:
    """At a step of its ramp the objective minimises what a constant one with those settings
    would.
    """
    stage = DistillStage(temperature=1.0, start_temperature=3.0, ce_weight=0.2, start_ce_weight=1.0)
    config = growing()
    assert loss_at(stage, config, 5) == Loss(pytest.approx(0.6), Divergence.forward_kl, 2.0)
    assert loss_at(stage, config, 10) == Loss(0.2, Divergence.forward_kl, 1.0)
    model, teacher = tiny(Task.causal_lm), tiny(Task.causal_lm, seed=1).eval()
    batch = packed(config).batch(0)

    def value(loss: Loss, step: int | None = None) -> float:
        taught = Teacher(teacher, Precision.fp32, loss)
        objective = Objective(model, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), taught)
        if step is not None:
            objective.losses = lambda at: loss_at(stage, config, at)
            objective.at(step)
        return objective(batch).loss.item()

    for step in (0, 5, 10):
        assert value(Loss(0.2), step) == pytest.approx(
            value(loss_at(stage, config, step)), rel=1e-6
        )
    assert value(Loss(0.2), 0) != pytest.approx(value(Loss(0.2), 10), rel=1e-3)


# -- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(Task))
def test_a_stacked_model_is_its_layers_on_top_of_one_another(task: Task, tmp_path: Path) -> None:
    source = tiny(task)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    have = source.config.num_hidden_layers
    source = stack_layers(source, 2, "stages.student.stack")
    for name, tensor in source.state_dict().items():
        parts = name.split(".")
        number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            parts[number] = str(int(parts[number]) % have)
        assert torch.equal(tensor, before[".".join(parts)])
    pointers = {
        tensor.data_ptr() for name, tensor in source.named_parameters() if ".layers." in name
    }
    # copies, not the same
    assert len(pointers) == sum(".layers." in name for name, _ in source.named_parameters())
    loaded = load_model(saved(source, tmp_path / "stacked"), task)
    ids = torch.arange(3, 9)[None]
    source.eval()
    assert torch.allclose(loaded(input_ids=ids).logits, source(input_ids=ids).logits, atol=1e-5)
    if task is Task.causal_lm:  # the key-value cache tells the layers apart
        cached = source.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for length in range(6, 10):
            logits = source(input_ids=cached[:, :length], use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == int(cached[0, length])


def test_a_model_of_two_kinds_of_layers_is_no_stack() -> None:
    model = tiny(Task.causal_lm)
    model.more = torch.nn.ModuleList(
        torch.nn.Identity() for _ in range(model.config.num_hidden_layers)
    )
    with pytest.raises(
        UserError, match=r"stages.student.stack: LlamaForCausalLM has 2 stacks of 2 layers"
    ):
        stack_layers(model, 2, "stages.student.stack")


# -- refusals -------------------------------------------------------------------------------------


def refused(task: Task = Task.causal_lm, **student: Any) -> str:
    stages: dict[str, Any] = {
        "teacher": TrainStage(),
        "capture": CaptureStage(teacher="teacher", like="student"),
    }
    stages["student"] = stage = DistillStage(**student)
    with pytest.raises(UserError) as error:
        stage.check(
            "stages.student", Run(recipe="distill", task=task, stages=stages, primary_arm="student")
        )
    return str(error.value)


@pytest.mark.parametrize(
    ("task", "student", "said"),
    [
        (
            Task.causal_lm,
            {"batch_size": 12, "start_batch_size": 5},
            "start_batch_size: 5 doubled again and again",
        ),
        (
            Task.causal_lm,
            {"batch_size": 4, "start_batch_size": 8},
            "8 doubled again and again does not become",
        ),
        (
            Task.causal_lm,
            {"sequence_length": 96, "start_sequence_length": 36},
            "start_sequence_length: 36 doubled",
        ),
        (
            Task.causal_lm,
            {"batch_size": 8, "start_batch_size": 2, "gradient_accumulation": 4},
            "start_batch_size: gradient_accumulation 4 does not divide it",
        ),
        (
            Task.sequence_classification,
            {"start_sequence_length": 64},
            "start_sequence_length: has no effect",
        ),
        (
            Task.causal_lm,
            {"cache": "capture", "start_batch_size": 4},
            "start_batch_size: a cache holds what",
        ),
        (
            Task.causal_lm,
            {"cache": "capture", "start_sequence_length": 32},
            "start_sequence_length: a cache holds",
        ),
        (
            Task.causal_lm,
            {"cache": "capture", "start_temperature": 2.0},
            "start_temperature: a cache has one",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(
    task: Task, student: dict[str, Any], said: str
) -> None:
    assert said in refused(task, **student)


def test_labels_are_kept_where_a_window_is_cut() -> None:
    """The last token of a short window still predicts the one after it."""
    config = growing(start_sequence_length=8)
    labels = packed(config).batch(0)["labels"]
    assert (labels[:, -1] != IGNORE).any()
