"""The student writes, its teacher judges: what is sampled, what counts, what it takes, and that it
resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from here import result_in
from make_assess_models import random_documents, tiny
from test_distill_cached import TINY
from test_training_loop import CPU, run, settings
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.cli.main import main
from pipeline.config.settings.distillation import Divergence
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import Compile
from pipeline.data.batches import IGNORE, PackedBatches, num_tokens
from pipeline.data.encode import Encoded
from pipeline.data.prompts import PROMPT_MASK, PartlySampled, Prompts
from pipeline.distillation.losses import Loss
from pipeline.distillation.on_policy import Writing, write
from pipeline.errors import UserError
from pipeline.ledger.flops import count_flops
from pipeline.ledger.phases import PhaseClock
from pipeline.stages.distill import DistillStage
from pipeline.stages.step_flops import StepFlops
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective, Teacher
from pipeline.training.reading import Apart, Examined

END = 2
DISTIL = [arg.replace("distill_cached", "distill") for arg in TINY]


def writing(**changes: Any) -> Writing:
    given: dict[str, Any] = {
        "length": 6,
        "temperature": 1.0,
        "vocabulary": 259,
        "ends": [END],
        "seed": 5,
    }
    return Writing(**{**given, **changes})


def left_padded(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


PROMPTS = left_padded([10, 11, 12, 13, 14], [20], [30, 31, 32])


def model_of(kind: str) -> Any:
    """Return a model with rotary positions, or with learned ones (which left padding would
    shift).
    """
    if kind == "rotary":
        return tiny(Task.causal_lm).eval()
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ).eval()


@pytest.mark.parametrize("kind", ["rotary", "learned"])
def test_at_a_low_temperature_it_writes_what_transformers_generates(kind: str) -> None:
    """Each prompt alone and without padding, by `generate`; the batch is padded."""
    model = model_of(kind)
    batch = write(model, *PROMPTS, writing(temperature=1e-4, ends=[]), step=0)
    for row, length in enumerate(PROMPTS[1].sum(-1).tolist()):
        prompt = PROMPTS[0][row, -length:][None]
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=6,
            min_new_tokens=6,
            pad_token_id=0,
        )
        assert batch["input_ids"][row, : length + 6].tolist() == expected[0].tolist()


def test_what_it_writes_has_the_students_distribution() -> None:
    """4,000 first tokens against the model's own probabilities, at a temperature, over the
    vocabulary shared.
    """
    model = tiny(Task.causal_lm).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # or all tokens are alike
    prompt = torch.tensor([[10, 11, 12]])
    batch = write(
        model,
        prompt.repeat(4000, 1),
        torch.ones(4000, 3, dtype=torch.long),
        writing(length=1, temperature=1.5, vocabulary=40),
        step=3,
    )
    with torch.no_grad():
        expected = (model(prompt).logits[0, -1, :40] / 1.5).softmax(-1)
    found = torch.bincount(batch["input_ids"][:, 3], minlength=40)[:40] / 4000
    assert found.sum() == 1
    # total variation of so many draws is about 0.04
    assert (found - expected).abs().sum() / 2 < 0.06
    assert expected.max() > 0.1


def test_nothing_counts_after_its_end() -> None:
    model = tiny(Task.causal_lm).eval()
    ends = list(range(0, 259, 3))  # a third of all tokens: rows end at different places
    batch = write(model, *PROMPTS, writing(length=12, ends=ends), step=1)
    again = write(model, *PROMPTS, writing(length=12, ends=[]), step=1)
    assert set(batch["sampled"].tolist()) != {12}
    assert batch["input_ids"].shape[1] == 5 + int(batch["sampled"].max())
    for row, asked in enumerate(PROMPTS[1].sum(-1).tolist()):
        said = int(batch["sampled"][row])
        whole = batch["input_ids"][row, : asked + said]
        assert whole.tolist() == again["input_ids"][row, : asked + said].tolist()
        answer = whole[asked:].tolist()
        assert [token in ends for token in answer] == [False] * (said - 1) + [answer[-1] in ends]
        assert said == 12 or answer[-1] in ends
        assert batch["lengths"][row] == asked + said
        expected = [IGNORE] * (asked - 1) + answer
        labels = batch["labels"][row].tolist()
        assert labels == expected + [IGNORE] * (len(labels) - len(expected))
        rest = batch["position_ids"][row, asked + said :].tolist()
        assert batch["position_ids"][row, : asked + said].tolist() == list(range(asked + said))
        assert rest == list(range(len(rest)))
    assert num_tokens(batch) == int(batch["lengths"].sum())


def test_the_same_step_writes_the_same_and_moves_no_generator() -> None:
    model = tiny(Task.causal_lm).train()
    state = torch.get_rng_state()
    batches = [
        write(model, *PROMPTS, writing(seed=seed), step)
        for seed, step in ((5, 2), (5, 2), (5, 3), (6, 2))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    same = [torch.equal(batches[0]["input_ids"], other["input_ids"]) for other in batches[1:]]
    assert same == [True, False, False]


def objective_for(**changes: Any) -> Objective:
    student, teacher = tiny(Task.causal_lm), tiny(Task.causal_lm, seed=1).eval()
    teacher.requires_grad_(requires_grad=False)
    read = Examined(apart=Apart.mask)
    taught = Teacher(teacher, Precision.fp32, Loss(**{"ce_weight": 0.5, **changes}), read)
    objective = Objective(
        student, Task.causal_lm, Precision.fp32, CPU, PhaseClock(), taught, read=read
    )
    objective.writing = writing()
    return objective


@pytest.mark.parametrize("divergence", [Divergence.forward_kl, Divergence.reverse_kl])
def test_the_loss_is_the_divergence_over_what_was_written(divergence: Divergence) -> None:
    """Row by row, without padding, by autograd; the hard labels (its own words) have no part."""
    objective = objective_for(divergence=divergence)
    assert objective.teacher is not None
    batch = objective.completed({"input_ids": PROMPTS[0], PROMPT_MASK: PROMPTS[1]}, 0)
    done = objective(batch)
    parameters = list(objective.model.parameters())
    found = torch.autograd.grad(done.loss, parameters)
    parts: list[torch.Tensor] = []
    for row, (asked, whole) in enumerate(
        zip(PROMPTS[1].sum(-1).tolist(), batch["lengths"].tolist(), strict=True)
    ):
        ids = batch["input_ids"][row, :whole][None]
        q, p = (
            each(ids).logits[0, asked - 1 : -1].log_softmax(-1)
            for each in (objective.model, objective.teacher.model)
        )
        a, b = (p, q) if divergence is Divergence.forward_kl else (q, p)
        parts.append((a.exp() * (a - b)).sum(-1))
    expected = torch.cat(parts).mean()
    assert done.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert done.ce_weight == 0
    assert done.count == int(batch["sampled"].sum())
    for mine, theirs in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    assert objective.clock.read_ns()["generate"] > 0


def test_flops_of_writing_are_what_torch_counts() -> None:
    """On the device, eager; the rotary angles that the counter sees, and no forward pass needs, are
    few.
    """
    model = tiny(Task.causal_lm).eval()
    model.set_attn_implementation("eager")
    ids, mask = torch.full((3, 9), 7), torch.ones(3, 9, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        write(model, ids, mask, writing(length=5, ends=[]), 0)
    counted = 3 * count_flops(model, Task.causal_lm, backward=False).generation(9, 5)
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_sampled_step_takes_its_writing_too() -> None:
    objective = objective_for()
    flops = StepFlops.of(objective)
    batch = objective.completed({"input_ids": PROMPTS[0], PROMPT_MASK: PROMPTS[1]}, 0)
    text = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    (own, added), (own_text, added_text) = flops(batch), flops(text)
    assert flops.writing is not None
    new = int(batch["sampled"].max())
    assert own == own_text
    assert added - added_text == pytest.approx(
        3 * flops.writing.generation(batch["input_ids"].shape[1] - new, new)
    )


# -- prompts --------------------------------------------------------------------------------------


def document(length: int, targets: list[int], start: int = 100) -> Encoded:
    mask = np.zeros(length, dtype=bool)
    mask[targets] = True
    return Encoded(
        np.arange(start, start + length, dtype=np.int32), mask, length, None, str(length)
    )


def test_prompts_are_what_precedes_the_last_answer() -> None:
    chat = document(20, [4, 5, 6, 14, 15, 16, 17])
    prompts = Prompts([chat], longest=30, batch_size=1, seed=0)
    assert prompts.batch(0)["input_ids"][0].tolist() == list(range(100, 114))
    assert Prompts([chat], longest=3, batch_size=1, seed=0).batch(7)["input_ids"][0].tolist() == [
        111,
        112,
        113,
    ]


def test_plain_text_is_asked_from_a_place_that_the_step_draws() -> None:
    text = document(200, list(range(1, 200)))
    prompts = Prompts([text], longest=10, batch_size=1, seed=0)
    starts = [int(prompts.batch(step)["input_ids"][0, 0]) - 100 for step in range(40)]
    assert len(set(starts)) > 25
    assert all(0 <= start <= 189 for start in starts)
    assert all(prompts.batch(step)["input_ids"].shape == (1, 10) for step in range(5))
    assert torch.equal(
        prompts.batch(3)["input_ids"],
        Prompts([text], longest=10, batch_size=1, seed=0).batch(3)["input_ids"],
    )
    short = Prompts([document(7, list(range(1, 7)))], longest=10, batch_size=1, seed=0).batch(0)[
        "input_ids"
    ]
    assert short.tolist() == [[100, 101, 102]]  # half of what is there, its end left out


def test_rows_are_padded_on_the_left_and_all_are_asked() -> None:
    documents = [document(6, [5], 100), document(9, [8], 200), document(1, [], 300)]
    batch = Prompts(documents, longest=30, batch_size=2, seed=0).batch(0)
    rows = {
        tuple(ids[mask == 1].tolist())
        for ids, mask in zip(batch["input_ids"], batch[PROMPT_MASK], strict=True)
    }
    assert rows == {tuple(range(100, 105)), tuple(range(200, 208))}
    assert batch[PROMPT_MASK].sum(-1).sort().values.tolist() == [5, 8]
    assert bool((batch[PROMPT_MASK].diff(dim=-1) >= 0).all())
    with pytest.raises(UserError, match="no document is long enough"):
        Prompts([document(1, [])], longest=30, batch_size=2, seed=0)


def test_the_share_of_steps_is_the_one_asked_for() -> None:
    documents = random_documents([20, 30, 40] * 5)
    text = PackedBatches(documents, sequence_length=16, batch_size=2, seed=0)
    prompts = Prompts(documents, longest=8, batch_size=2, seed=0)
    for share, least, most in ((0.0, 0, 0), (0.3, 250, 350), (1.0, 1000, 1000)):
        mixed = PartlySampled(text, prompts, share, 7)
        assert least <= sum(mixed.is_sampled(step) for step in range(1000)) <= most
    mixed = PartlySampled(text, prompts, 0.5, 7)
    kinds = [PROMPT_MASK in mixed.batch(step) for step in range(20)]
    assert kinds == [mixed.is_sampled(step) for step in range(20)]
    assert 0 < sum(kinds) < 20


# -- training -------------------------------------------------------------------------------------


def mixed_batches(share: float) -> PartlySampled:
    documents = random_documents([9, 30, 5, 17, 40, 12, 25, 33, 8, 21] * 3)
    text = PackedBatches(documents, sequence_length=16, batch_size=4, seed=7)
    return PartlySampled(text, Prompts(documents, longest=10, batch_size=4, seed=7), share, 7)


def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    def trained(folder: Path, **hooks: Any) -> Any:
        objective = objective_for()
        config = settings(checkpoint_every=2, gradient_accumulation=2)
        progress = run(
            objective.model,
            config,
            folder,
            objective=objective,
            batches=mixed_batches(0.7),
            **hooks,
        )
        return objective.model, progress

    whole, first = trained(tmp_path / "whole")
    kinds = [mixed_batches(0.7).is_sampled(step) for step in range(6)]
    # of both kinds before the cut, and after it
    assert (sum(kinds[:4]), kinds[4:]) == (2, [False, True])
    stops = iter([None, None, None, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", should_stop=lambda: next(stops))
    resumed, second = trained(tmp_path / "cut")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    assert (first.tokens, first.smooth, first.taught) == (
        second.tokens,
        second.smooth,
        second.taught,
    )
    assert set(first.smooth) == {"text", "sampled"}


def test_losses_of_text_and_of_samples_are_not_held_against_each_other(tmp_path: Path) -> None:
    """A divergence near 0 (its own teacher) between losses of 5 nats is no divergence of the
    training.
    """
    objective = objective_for(ce_weight=1.0)
    assert objective.teacher is not None
    objective.teacher.model.load_state_dict(objective.model.state_dict())
    config = settings(steps=12, learning_rate=1e-6, divergence_factor=1.5)
    progress = run(
        objective.model, config, tmp_path, objective=objective, batches=mixed_batches(0.5)
    )
    assert progress.smooth["sampled"] < 0.01 < progress.smooth["text"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"on_policy_length": 4},
            "stages.student.on_policy_length: has no effect without on_policy",
        ),
        (
            {"on_policy_temperature": 2.0},
            "stages.student.on_policy_temperature: has no effect without on_policy",
        ),
        (
            {"on_policy": 0.5, "on_policy_length": 128},
            "on_policy_length: 128 leaves no prompt in sequence_length 128",
        ),
        (
            {"on_policy": 0.5, "cache": "x"},
            "stages.student.on_policy: the teacher judges what only then is written",
        ),
        ({"on_policy": 0.5, "completions": "x"}, "stages.student.on_policy: the teacher judges"),
        (
            {"on_policy": 0.5, "compile": Compile.always},
            "stages.student.on_policy: writing would compile anew",
        ),
        (
            {"on_policy": 0.5, "start_batch_size": 4},
            "stages.student.start_batch_size: is of steps that read text",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        DistillStage(**changes).check("stages.student", Run(stages={"teacher": TrainStage()}))


def test_classifiers_write_nothing() -> None:
    with pytest.raises(UserError, match=r"stages.student.on_policy: a classifier writes nothing"):
        DistillStage(on_policy=0.5).check("stages.student", Run(task=Task.sequence_classification))


@pytest.mark.slow
def test_a_recipe_has_its_student_write_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = [
        "stages.student.on_policy=1",
        "stages.student.on_policy_length=8",
        "stages.student.allow_weak_teacher=true",
    ]
    assert main([*DISTIL, *wanted], started_ns=0) == 0, capsys.readouterr().err
    rows = {row["arm"]: row["ledger"] for row in result_in(tmp_path)["rows"]}
    student, control = rows["student"], rows["control_steps"]
    assert student["phases_ns"]["generate"] > 0
    counts = student["counts"]
    assert (
        counts["distillation_share"]["value"],
        counts["distillation_gradient_share"]["value"],
    ) == (1.0, 1.0)
    # a step of text, whatever the student's own steps took
    per_step = control["counts"]["model_flops"]["value"] / 4
    bought = rows["control_compute"]["counts"]["steps"]["value"]
    assert bought == pytest.approx(counts["model_flops"]["value"] / per_step, abs=1)


@pytest.mark.slow
def test_the_recipe_of_all_signals_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = [arg.replace("distill_cached", "distill_signals") for arg in TINY]
    arms = ("student", "hidden_states", "relations", "on_policy")
    wanted = [f"stages.{arm}.allow_weak_teacher=true" for arm in arms]
    assert main([*recipe, *wanted, "stages.on_policy.on_policy=0.5"], started_ns=0) == 0, (
        capsys.readouterr().err
    )
    result = result_in(tmp_path)
    rows = {row["arm"]: row["ledger"] for row in result["rows"]}
    shares = {arm: rows[arm]["counts"]["distillation_share"]["value"] for arm in arms}
    assert all(0 < share < 1 for share in shares.values())
    assert len(set(shares.values())) == 4
    assert "generate" in rows["on_policy"]["phases_ns"]
    assert "generate" not in rows["relations"]["phases_ns"]
    assert [each["arm"] for each in result["comparisons"]] == list(arms[1:])
