"""Students cut from teachers, heads of other sizes, what is saved and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import LABELS, byte_tokenizer, saved, tiny
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.config.settings.model import StudentConfig, TinyShape
from pipeline.errors import UserError
from pipeline.models.load import load_model, load_tokenizer, make_tiny, save_model
from pipeline.models.student import choose_layers, make_student
from pipeline.tasks.table import Task

SHAPE = TinyShape(hidden_size=64, layers=6, heads=2, intermediate_size=64)


def bert(folder: Path, num_labels: int = 2) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=num_labels,
    )
    save_model(BertForSequenceClassification(config), byte_tokenizer(), folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 9, 30]])).logits


@pytest.mark.parametrize(
    ("spec", "total", "kept"),
    [
        ("every_2", 6, [1, 3, 5]),
        ("every_3", 7, [2, 5]),
        (3, 12, [3, 7, 11]),
        (1, 5, [4]),
        (4, 4, [0, 1, 2, 3]),
        ([0, 3], 4, [0, 3]),
    ],
)
def test_which_layers_are_kept(spec: Any, total: int, kept: list[int]) -> None:
    assert choose_layers(spec, total) == kept


@pytest.mark.parametrize("spec", ["every_9", "every_0", "all", 0, 7, -1, [6], [], True, None, 2.5])
def test_layers_that_are_not_there_are_refused(spec: Any) -> None:
    with pytest.raises(UserError, match=r"student\.layers.*6 layers; give every_2"):
        choose_layers(spec, 6)


@pytest.mark.parametrize(
    ("make", "task", "stack"),
    [
        (
            lambda folder: saved(tiny(Task.causal_lm, shape=SHAPE), folder),
            Task.causal_lm,
            "model.layers",
        ),
        (lambda folder: bert(folder, 3), Task.sequence_classification, "bert.encoder.layer"),
    ],
)
def test_a_student_of_layers_has_its_teachers_weights(
    tmp_path: Path, make: Any, task: Task, stack: str
) -> None:
    source = make(tmp_path / "teacher")
    labels = LABELS if task is Task.sequence_classification else None
    teacher = load_model(source, task, labels=labels, new_head=True)
    student, tokenizer = make_student(StudentConfig(layers="every_2"), source, task, labels)
    ours, theirs = student.get_submodule(stack), teacher.get_submodule(stack)
    assert len(ours) == len(theirs) // 2 == student.config.num_hidden_layers
    for index, layer in enumerate(ours):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, theirs[2 * index + 1].state_dict()[name])
    rest = {
        name: tensor for name, tensor in student.state_dict().items() if not name.startswith(stack)
    }
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
    with pytest.raises(
        UserError, match=r"student\.config\.num_layerz: LlamaConfig has no such key"
    ):
        make_student(StudentConfig(config={"num_layerz": 1}), source, Task.causal_lm, None)


def test_a_student_by_path_brings_its_own_tokenizer(tmp_path: Path) -> None:
    source = saved(tiny(Task.causal_lm), tmp_path / "t")
    other = saved(tiny(Task.causal_lm, seed=5), tmp_path / "s")
    student, tokenizer = make_student(StudentConfig(path=str(other)), source, Task.causal_lm, None)
    assert torch.equal(logits(student), logits(load_model(other, Task.causal_lm)))
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()


def test_a_head_that_would_stay_random_is_refused(tmp_path: Path) -> None:
    folder, task = bert(tmp_path / "model", num_labels=3), Task.sequence_classification
    load_model(folder, task, labels=("0", "1", "2"))
    change_weights(
        folder, lambda weights: {name: t for name, t in weights.items() if "classifier" not in name}
    )
    with pytest.raises(
        UserError,
        match="no classification head for these classes, and 0 steps would leave it random",
    ):
        load_model(folder, task, labels=("0", "1", "2"))


def test_a_head_of_another_size_is_made_anew_and_the_body_kept(tmp_path: Path) -> None:
    source = bert(tmp_path, num_labels=2)
    model: Any = load_model(source, Task.sequence_classification, labels=LABELS, new_head=True)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.classifier.weight.shape == (3, 64)
    before: Any = load_model(source, Task.sequence_classification)
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, before.bert.embeddings.word_embeddings.weight
    )


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

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        image_size=32,
    )
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.path: .* cannot be loaded") as error:
        load_model(tmp_path, Task.causal_lm)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (TinyShape(hidden_size=100), "100 is not a multiple of 64"),
        (TinyShape(hidden_size=192, heads=5), "5 heads"),
        (TinyShape(intermediate_size=65), "65 is not a multiple of 64"),
    ],
)
def test_a_shape_that_kernels_cannot_take_is_refused(shape: TinyShape, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_tiny(shape, 259, Task.causal_lm, None, byte_tokenizer())


def change_weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "model.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()},
        file,
        {"format": "pt"},
    )


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.layers.1.mlp.up_proj.weight", "absent"),
        ("model.layers.1.mlp.up_proj.weight", "narrow"),
        ("model.embed_tokens.weight", "narrow"),
    ],
)
def test_weights_that_would_be_random_are_refused(
    tmp_path: Path, task: Task, name: str, how: str
) -> None:
    folder = saved(tiny(task), tmp_path)

    def change(weights: dict[str, Any]) -> dict[str, Any]:
        tensor = weights.pop(name)
        return weights if how == "absent" else {**weights, name: tensor[:, :8]}

    change_weights(folder, change)
    with pytest.raises(
        UserError, match=rf"model\.path: the weights in .* lack {name} in its right shape \(1 of"
    ):
        load_model(folder, task, labels=LABELS if task is Task.sequence_classification else None)


def test_a_language_model_needs_its_head_and_a_classifier_may_get_a_new_one(tmp_path: Path) -> None:
    """An encoder saved without a head is what most fine-tuning starts from."""
    config = BertConfig(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    save_model(BertModel(config, add_pooling_layer=False), byte_tokenizer(), tmp_path / "b")
    model = load_model(tmp_path / "b", Task.sequence_classification, labels=LABELS, new_head=True)
    assert logits(model).shape == (1, 3)
    untied = tiny(Task.causal_lm)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    folder = saved(untied, tmp_path / "l")
    change_weights(
        folder, lambda weights: {name: t for name, t in weights.items() if name != "lm_head.weight"}
    )
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        load_model(folder, Task.causal_lm)


@pytest.mark.parametrize("cut", [0, 5, 5000])
def test_a_truncated_weights_file_is_refused(tmp_path: Path, cut: int) -> None:
    folder = saved(tiny(Task.causal_lm), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"model\.path: the model in .* cannot be loaded"):
        load_model(folder, Task.causal_lm)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: [], "is not an object; restore the file"),
        (lambda config: None, "is not an object; restore the file"),
        (lambda config: {}, "Should have a `model_type` key"),
        (lambda config: {**config, "model_type": "of-tomorrow"}, "model type `of-tomorrow`"),
        (lambda config: {**config, "hidden_size": "wide"}, "expected int, got str"),
        (
            lambda config: {**config, "num_attention_heads": 7},
            "not a multiple of the number of attention heads",
        ),
        (lambda config: {**config, "hidden_act": "sigh"}, "sigh"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    tmp_path: Path, change: Any, said: str
) -> None:
    folder = saved(tiny(Task.causal_lm), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    with pytest.raises(UserError, match=r"^model\.path: ") as refused:
        load_model(folder, Task.causal_lm)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 600


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    """Trained as one, it would read the answer: BERT's logits at a place depend on the tokens after
    it.
    """
    config = BertConfig(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    save_model(BertForMaskedLM(config), byte_tokenizer(), tmp_path)
    with pytest.raises(
        UserError, match=r"is an encoder \(bert\), which sees the tokens that it is to predict"
    ):
        load_model(tmp_path, Task.causal_lm)
    edited = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**edited, "is_decoder": True}))
    model = load_model(tmp_path, Task.causal_lm)
    other = model(input_ids=torch.tensor([[1, 5, 9, 31]])).logits
    assert torch.equal(other[:, :3], logits(model)[:, :3])


def test_a_tokenizer_that_is_damaged_gone_or_wants_code_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny(Task.causal_lm), tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(
        UserError, match=r"its tokenizer in .* cannot be loaded .*put its tokenizer files beside"
    ):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"its tokenizer in .* cannot be loaded .*put its tokenizer files beside"
    ):
        load_tokenizer(folder)
    wants = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(wants))
    with pytest.raises(
        UserError, match="wants to run code of its own; use a model that transformers has"
    ):
        load_tokenizer(folder)


def test_a_folder_that_is_not_there_is_told_from_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    from pipeline.config.settings.model import ModelConfig
    from pipeline.runs.base_model import _given

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("pipeline.store.hub._known", {})  # what another test of this process found
    monkeypatch.chdir(tmp_path)
    for path in ("./model", "/nowhere/model", "a/b/c", "~/no such"):
        with pytest.raises(UserError, match="is not a folder"):
            load_model(path, Task.causal_lm)
    said = (
        r"there is no folder org/name here, and the Hub did not give a model of that name \(.*;"
        r" check the name"
    )
    for load in (
        lambda: load_model("org/name", Task.causal_lm),
        lambda: load_tokenizer("org/name"),
        lambda: _given("org/name", ModelConfig(path="org/name")),
    ):
        with pytest.raises(UserError, match=said) as refused:
            load()
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(UserError, match="there is no folder a b here"):
        _given("a b", ModelConfig(path="a b"))


def test_a_classifier_pads_with_its_tokenizers_token(tmp_path: Path) -> None:
    """GPT-2 names no padding and reads the last token before it: padded rows must equal rows
    alone.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=259,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    save_model(GPT2LMHeadModel(config), byte_tokenizer(), tmp_path / "source")
    by_layers, _ = make_student(
        StudentConfig(), tmp_path / "source", Task.sequence_classification, LABELS
    )
    given = StudentConfig(config={"n_layer": 1})
    by_config, _ = make_student(given, tmp_path / "source", Task.sequence_classification, LABELS)
    for model in (by_layers, by_config):
        short, long = [7, 8, 9], [7, 8, 9, 10, 11]
        batch = torch.tensor([[*short, 0, 0], long])
        mask = (batch != 0).long()
        together = model(input_ids=batch, attention_mask=mask).logits
        alone = model(input_ids=torch.tensor([short])).logits
        torch.testing.assert_close(together[:1], alone)


def qwen(folder: Path) -> Path:
    config = Qwen2Config(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    save_model(Qwen2ForCausalLM(config), byte_tokenizer(), folder)
    return folder


def test_a_kind_per_layer_follows_the_number_of_layers(tmp_path: Path) -> None:
    source = qwen(tmp_path / "q")
    for given in (StudentConfig(config={"num_hidden_layers": 2}), StudentConfig(layers=[0, 3])):
        student, tokenizer = make_student(given, source, Task.causal_lm, None)
        assert len(student.config.layer_types) == 2
        save_model(student, tokenizer, tmp_path / "s")
        assert torch.equal(
            logits(load_model(tmp_path / "s", Task.causal_lm)), logits(student.eval())
        )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 0}, r"student\.config\.num_hidden_layers: 0 is no number of layers"),
        ({"num_hidden_layers": 1.5}, "expected int, got float"),
        ({"hidden_size": "wide"}, "expected int, got str"),
        ({"num_attention_heads": 7}, "not a multiple"),
        # fewer than key-value heads
        ({"num_attention_heads": 1}, "makes no LlamaConfig that runs"),
        ({"num_attention_heads": 0}, "makes no LlamaConfig that runs"),
        ({"hidden_act": "sigh"}, r"makes no LlamaConfig that runs \('sigh'\)"),
    ],
)
def test_a_student_that_could_not_run_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    source = saved(tiny(Task.causal_lm), tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        make_student(StudentConfig(config=config), source, Task.causal_lm, None)
    assert refused.value.key.startswith("student.config")


def test_layers_that_would_not_load_again_are_refused(tmp_path: Path) -> None:
    """ModernBERT's first layer has one norm less than the others, so only layer 0 can stand
    first.
    """
    config = ModernBertConfig(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    save_model(ModernBertForMaskedLM(config), byte_tokenizer(), tmp_path)
    task = Task.sequence_classification
    with pytest.raises(
        UserError, match=r"student\.layers: \[1, 3\] put a layer .* keeps layer 0 first"
    ):
        make_student(StudentConfig(), tmp_path, task, LABELS)
    student, _ = make_student(StudentConfig(layers=[0, 3]), tmp_path, task, LABELS)
    assert student.config.num_hidden_layers == 2
    with pytest.raises(UserError, match=r"\[0, 0\] names a layer twice"):
        make_student(StudentConfig(layers=[0, 0]), tmp_path, task, LABELS)
