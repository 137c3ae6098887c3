"""Smoothing activations: the scale by hand, the same answers, what quantizing gains, and what is
refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_assess_models import byte_tokenizer, tiny
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from pipeline.config.settings.data import DataConfig
from pipeline.data.documents import Dataset, Document
from pipeline.errors import StageFailed, UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import save_model
from pipeline.quantization import smoothing
from pipeline.quantization.backend import quantize
from pipeline.quantization.calibration import calibration_documents
from pipeline.quantization.smoothing import find_pairs, smooth
from pipeline.stages.quantize import QuantizeStage
from pipeline.tasks.table import Task

KEY = "stages.small.smoothing"


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=2, n_positions=64)
    ).eval()


def opt() -> Any:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=259,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    )
    return OPTForCausalLM(config).eval()


MODELS = {"llama": lambda: tiny(Task.causal_lm).eval(), "gpt2": gpt2, "opt": opt}


def batches(seed: int = 0, num: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (1, 40), generator=draw) for _ in range(num)]


@pytest.mark.parametrize("name", MODELS)
def test_a_smoothed_model_answers_as_before_on_text_it_was_not_calibrated_on(name: str) -> None:
    model = MODELS[name]()
    unseen = batches(seed=9)[0]
    with torch.no_grad():
        before = model(input_ids=unseen).logits
        names = smooth(model, batches(), strength=0.5, key=KEY)
        after = model(input_ids=unseen).logits
    assert len(names) == 4  # two norms in each of two blocks
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_the_scale_is_the_one_of_the_paper() -> None:
    """One norm of ones and one layer: s = sqrt(max|X| / max|W|) by channel, by hand."""
    norm = SimpleNamespace(weight=torch.ones(2), bias=torch.tensor([0.5, 1.0]))
    layer = torch.nn.Linear(2, 3, bias=False)
    layer.weight = torch.nn.Parameter(torch.tensor([[1.0, -4.0], [0.5, 2.0], [0.25, 1.0]]))
    with torch.no_grad():
        smoothing._move(smoothing.Pair("n", norm, (layer,)), torch.tensor([16.0, 1.0]), 0.5)
    assert norm.weight.tolist() == [0.25, 2.0]  # s = sqrt(16/1) = 4 and sqrt(1/4) = 0.5
    assert norm.bias.tolist() == [0.125, 2.0]
    assert layer.weight.tolist() == [[4.0, -2.0], [2.0, 1.0], [1.0, 0.5]]


def test_channels_are_equally_large_in_activations_and_weights_at_one_half() -> None:
    model = MODELS["llama"]()
    pair = find_pairs(model)[0]
    with torch.no_grad():
        pair.norm.weight[5] = 40.0  # an outlier channel
        smooth(model, batches(), strength=0.5, key=KEY)
        largest = smoothing._largest_inputs(model, [pair], batches())[pair.name]
    weights = torch.stack([layer.weight.abs().amax(0) for layer in pair.layers]).amax(0)
    torch.testing.assert_close(largest, weights, rtol=1e-4, atol=1e-5)


def outlying() -> Any:
    """A model whose norms have a few channels a hundred times larger, and whose readers undo it."""
    model = MODELS["llama"]()
    with torch.no_grad():
        for pair in find_pairs(model):
            for channel in (3, 17, 40):
                pair.norm.weight[channel] *= 100
                for layer in pair.layers:
                    layer.weight[:, channel] /= 100
    return model


@pytest.mark.slow
def test_a_model_with_outliers_loses_less_by_int8_activations_when_smoothed(tmp_path: Path) -> None:
    """bitsandbytes keeps outliers in 16 bits by itself; torchao's scale per token has to cover
    them.
    """
    from transformers import AutoModelForCausalLM

    from pipeline.config.settings.quantization import Format

    model = outlying()
    save_model(model, byte_tokenizer(), tmp_path / "source")
    ids = batches(seed=9)[0]
    apart: dict[str, float] = {}
    for name, prepare in {
        "plain": None,
        "smooth": lambda given: smooth(given, batches(), strength=0.5, key=KEY),
    }.items():
        out = tmp_path / name
        quantize(
            tmp_path / "source",
            out,
            Format.int8_dynamic,
            Task.causal_lm,
            device="cpu",
            key=KEY,
            prepare=prepare,
        )
        with torch.no_grad():
            got = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits.log_softmax(-1)
            true = model(input_ids=ids).logits.log_softmax(-1)
        apart[name] = float((true.exp() * (true - got)).sum(-1).mean())
    assert apart["smooth"] < apart["plain"] / 3, apart
    assert not list(tmp_path.glob("smooth.*"))  # what was smoothed and not yet quantized is gone


def test_a_model_whose_norms_are_read_by_others_too_is_refused() -> None:
    config = BertConfig(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
    )
    with pytest.raises(
        UserError, match="BertForSequenceClassification has no layers known to read a norm"
    ):
        smooth(BertForSequenceClassification(config), batches(), strength=0.5, key=KEY)


def test_smoothing_that_changes_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that something else reads as well, as if the table of readers were wrong."""
    monkeypatch.setattr(smoothing, "READS", (("input_layernorm", ("self_attn.q_proj",)),))
    with pytest.raises(StageFailed, match="smoothing changes LlamaForCausalLM"):
        smooth(MODELS["llama"](), batches(), strength=0.5, key=KEY)


# -- what it looks at -----------------------------------------------------------------------------


def dataset() -> Dataset:
    part = lambda name: tuple(Document(f"{name} {number}") for number in range(5))
    return Dataset("made", "0" * 32, {name: part(name) for name in ("train", "validation", "test")})


def run() -> Any:
    return SimpleNamespace(task=Task.causal_lm, data=DataConfig())


def read(path: Path | None, count: int = 32) -> list[str]:
    stage = QuantizeStage(
        smoothing=0.5, calibration=None if path is None else str(path), calibration_documents=count
    )
    return [
        document.text
        for document in calibration_documents(stage, run(), dataset(), "stages.small.calibration")
    ]


def test_by_default_the_first_of_train_are_looked_at() -> None:
    train = sorted(dataset().splits["train"], key=lambda document: document.digest)
    assert read(None, 2) == [document.text for document in train[:2]]


def test_a_file_of_ones_own_is_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b", "c")))
    assert read(file, 2) == ["a", "b"]


def test_what_was_looked_at_is_noted_and_not_what_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b")))
    stage = QuantizeStage(smoothing=0.5, calibration=str(file))
    ctx: Any = SimpleNamespace(run=run(), data=dataset(), stage="small", clock=PhaseClock())
    noted = stage._calibrated(ctx)
    assert noted == {
        "smoothing": 0.5,
        "source": str(file),
        "documents": 2,
        "digest": hashlib.sha256(file.read_bytes()).hexdigest()[:32],
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"first": "a", "second": "b"}], "text"),
        ([{"text": "test 1"}], "a document of it is in the test split"),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b"},
                    ]
                }
            ],
            "holds chats",
        ),
        ([{"text": " "}], "holds no text"),
        (None, "is not a file"),
    ],
)
def test_calibration_that_does_not_fit_is_refused(
    tmp_path: Path, rows: list[Any] | None, said: str
) -> None:
    file = tmp_path / "own.jsonl"
    if rows is not None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        read(file)
    assert error.value.key == "stages.small.calibration"
    assert said in str(error.value)
