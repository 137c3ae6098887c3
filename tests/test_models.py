"""Students cut from teachers, heads of other sizes, what is saved and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import LABELS, byte_tokenizer, saved, tiny
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from pipeline.config import StudentConfig, Task, TinyShape
from pipeline.errors import UserError
from pipeline.models import choose_layers, load_model, load_tokenizer, make_student, make_tiny, save_model

SHAPE = TinyShape(hidden_size=64, layers=6, heads=2, intermediate_size=64)


def bert(folder: Path, num_labels: int = 2) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=259, hidden_size=64, num_hidden_layers=4, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=64, num_labels=num_labels)  # fmt: skip
    save_model(BertForSequenceClassification(config), byte_tokenizer(), folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 9, 30]])).logits


@pytest.mark.parametrize(
    ("spec", "total", "kept"),
    [("every_2", 6, [1, 3, 5]), ("every_3", 7, [2, 5]), (3, 12, [3, 7, 11]), (1, 5, [4]), (4, 4, [0, 1, 2, 3]),
     ([0, 3], 4, [0, 3])],
)  # fmt: skip
def test_which_layers_are_kept(spec: Any, total: int, kept: list[int]) -> None:
    assert choose_layers(spec, total) == kept


@pytest.mark.parametrize("spec", ["every_9", "every_0", "all", 0, 7, -1, [6], [], True, None, 2.5])
def test_layers_that_are_not_there_are_refused(spec: Any) -> None:
    with pytest.raises(UserError, match=r"student\.layers.*6 layers; give every_2"):
        choose_layers(spec, 6)


@pytest.mark.parametrize(("make", "task", "stack"), [
    (lambda folder: saved(tiny(Task.causal_lm, shape=SHAPE), folder), Task.causal_lm, "model.layers"),
    (lambda folder: bert(folder, 3), Task.sequence_classification, "bert.encoder.layer"),
])  # fmt: skip
def test_a_student_of_layers_has_its_teachers_weights(tmp_path: Path, make: Any, task: Task, stack: str) -> None:
    source = make(tmp_path / "teacher")
    labels = LABELS if task is Task.sequence_classification else None
    teacher = load_model(source, task, labels=labels)
    student, tokenizer = make_student(StudentConfig(layers="every_2"), source, task, labels)
    ours, theirs = student.get_submodule(stack), teacher.get_submodule(stack)
    assert len(ours) == len(theirs) // 2 == student.config.num_hidden_layers
    for index, layer in enumerate(ours):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, theirs[2 * index + 1].state_dict()[name])
    rest = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith(stack)}
    assert rest
    assert all(torch.equal(tensor, teacher.state_dict()[name]) for name, tensor in rest.items())
    save_model(student, tokenizer, tmp_path / "student")
    again = load_model(tmp_path / "student", task, labels=labels)
    assert torch.equal(logits(again), logits(student.eval()))


def test_a_student_generates_with_its_cache_after_layers_are_gone(tmp_path: Path) -> None:
    source = saved(tiny(Task.causal_lm, shape=SHAPE), tmp_path)
    student, _ = make_student(StudentConfig(layers=[0, 4]), source, Task.causal_lm, None)
    ids = torch.tensor([[5, 6, 7]])
    cached = student.eval().generate(ids, max_new_tokens=8, do_sample=False)
    plain = student.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_a_student_by_configuration_is_random_and_checked(tmp_path: Path) -> None:
    source = saved(tiny(Task.causal_lm), tmp_path)
    given = StudentConfig(config={"num_hidden_layers": 1, "intermediate_size": 64})
    torch.manual_seed(1)
    student, _ = make_student(given, source, Task.causal_lm, None)
    assert len(student.model.layers) == 1
    assert student.model.layers[0].mlp.up_proj.weight.shape[0] == 64
    with pytest.raises(UserError, match=r"student\.config\.num_layerz: LlamaConfig has no such key"):
        make_student(StudentConfig(config={"num_layerz": 1}), source, Task.causal_lm, None)


def test_a_student_by_path_brings_its_own_tokenizer(tmp_path: Path) -> None:
    source = saved(tiny(Task.causal_lm), tmp_path / "t")
    other = saved(tiny(Task.causal_lm, seed=5), tmp_path / "s")
    student, tokenizer = make_student(StudentConfig(path=str(other)), source, Task.causal_lm, None)
    assert torch.equal(logits(student), logits(load_model(other, Task.causal_lm)))
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()


def test_a_head_of_another_size_is_made_anew_and_the_body_kept(tmp_path: Path) -> None:
    source = bert(tmp_path, num_labels=2)
    model: Any = load_model(source, Task.sequence_classification, labels=LABELS)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.classifier.weight.shape == (3, 64)
    before: Any = load_model(source, Task.sequence_classification)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, before.bert.embeddings.word_embeddings.weight)


def test_tied_weights_stay_one_after_saving(tmp_path: Path) -> None:
    model = tiny(Task.causal_lm)
    again: Any = load_model(saved(model, tmp_path), Task.causal_lm)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model.eval()))


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=259, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    save_model(GPT2LMHeadModel(config), tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"
    tokenizer.eos_token = None
    save_model(GPT2LMHeadModel(config), tokenizer, tmp_path)
    with pytest.raises(UserError, match="neither padding nor end token; add a pad_token"):
        load_tokenizer(tmp_path)


def test_a_model_for_another_task_is_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.path: .* cannot be loaded") as error:
        load_model(tmp_path, Task.causal_lm)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("shape", "said"),
    [(TinyShape(hidden_size=100), "100 is not a multiple of 64"), (TinyShape(hidden_size=192, heads=5), "5 heads"),
     (TinyShape(intermediate_size=65), "65 is not a multiple of 64")],
)  # fmt: skip
def test_a_shape_that_kernels_cannot_take_is_refused(shape: TinyShape, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_tiny(shape, 259, Task.causal_lm, None, byte_tokenizer())
