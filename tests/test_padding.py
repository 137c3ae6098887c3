"""Batches as the tokenizer would make them: equal to what plain transformers says of each text
alone and of a batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_assess_models import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BigBirdConfig,
    CanineConfig,
    ConvBertConfig,
    DebertaV2Config,
    ElectraConfig,
    FNetConfig,
    FunnelConfig,
    GPT2Config,
    IBertConfig,
    LlamaConfig,
    MPNetConfig,
    NystromformerConfig,
    PreTrainedConfig,
    ReformerConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from pipeline.config.settings.precision import Precision
from pipeline.data.batches import PaddedBatches
from pipeline.data.documents import Document
from pipeline.data.encode import Encoded, encode_all
from pipeline.data.padding import Padding, logits_of, read_by
from pipeline.distillation.losses import Loss
from pipeline.evaluation.quality.scoring import score_examples
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import load_model, save_model
from pipeline.models.weights import keep_attention
from pipeline.tasks.table import Task
from pipeline.training.objective import Objective, Teacher

TASK = Task.sequence_classification
CPU = torch.device("cpu")
SAME: dict[str, Any] = {
    "vocab_size": 259,
    "pad_token_id": 0,
    "num_labels": 3,
    "initializer_range": 0.3,
}
BERT: dict[str, Any] = {
    **SAME,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
}
# By name: the configuration, where it pads, and whether texts begin and end with special tokens of
# two segments.
MODELS: dict[str, tuple[PreTrainedConfig, str, str]] = {
    "xlnet": (XLNetConfig(**SAME, d_model=32, n_layer=2, n_head=2, d_inner=32), "left", "xlnet"),
    "bert": (BertConfig(**BERT), "right", "bert"),
    "bert left": (BertConfig(**BERT), "left", "bert"),
    "electra": (ElectraConfig(**BERT, embedding_size=16), "right", "bert"),
    "deberta": (
        DebertaV2Config(
            **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=2
        ),
        "right",
        "bert",
    ),
    "funnel": (
        FunnelConfig(
            **SAME,
            d_model=32,
            n_head=2,
            d_head=16,
            d_inner=32,
            block_sizes=[1, 1],
            num_decoder_layers=1,
        ),
        "right",
        "funnel",
    ),
    "roberta": (RobertaConfig(**{**BERT, "pad_token_id": 1}), "right", "plain"),
    "roberta left": (RobertaConfig(**{**BERT, "pad_token_id": 1}), "left", "plain"),
    "mpnet": (MPNetConfig(**{**BERT, "pad_token_id": 1}), "right", "plain"),
    "gpt2": (GPT2Config(**SAME, n_embd=32, n_layer=2, n_head=2, n_positions=128), "right", "none"),
    "gpt2 left": (
        GPT2Config(**SAME, n_embd=32, n_layer=2, n_head=2, n_positions=128),
        "left",
        "none",
    ),
    "llama left": (LlamaConfig(**BERT, num_key_value_heads=2), "left", "none"),
    "t5": (
        T5Config(
            **SAME,
            d_model=32,
            d_kv=16,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            eos_token_id=2,
            decoder_start_token_id=0,
        ),
        "right",
        "end",
    ),
    "fnet": (
        FNetConfig(**{key: BERT[key] for key in BERT if key != "num_attention_heads"}),
        "right",
        "bert",
    ),
    "canine": (
        CanineConfig(
            num_labels=3,
            initializer_range=0.3,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            pad_token_id=0,
            downsampling_rate=2,
            num_hash_buckets=64,
            local_transformer_stride=8,
        ),
        "right",
        "bert",
    ),
    "i-bert": (IBertConfig(**{**BERT, "pad_token_id": 1}), "right", "plain"),
    "nystromformer": (
        NystromformerConfig(**BERT, num_landmarks=4, segment_means_seq_len=4, conv_kernel_size=3),
        "right",
        "bert",
    ),
    "convbert left": (
        ConvBertConfig(**BERT, embedding_size=16, conv_kernel_size=5),
        "left",
        "bert",
    ),
    "reformer": (
        ReformerConfig(
            **SAME,
            hidden_size=32,
            attn_layers=["lsh", "local"],
            num_attention_heads=2,
            attention_head_size=16,
            feed_forward_size=32,
            axial_pos_embds=False,
            hash_seed=3,
            max_position_embeddings=128,
            local_attn_chunk_length=16,
            lsh_attn_chunk_length=16,
            num_buckets=4,
            num_hashes=1,
        ),
        "right",
        "none",
    ),
    "big bird": (
        BigBirdConfig(
            **{**BERT, "max_position_embeddings": 256},
            attention_type="block_sparse",
            block_size=2,
            num_random_blocks=1,
        ),
        "right",
        "bert",
    ),
}
BY_LENGTH = (
    "fnet",
    "canine",
    "nystromformer",
    "convbert left",
    "reformer",
    "big bird",
)  # padding changes what they say
TEMPLATES = {
    "bert": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
    "xlnet": ("$A </s> <s>:2", "$A </s> $B:1 </s>:1 <s>:2"),
    "funnel": ("<s>:2 $A </s>", "<s>:2 $A </s> $B:1 </s>:1"),
    "plain": ("<s> $A </s>", "<s> $A </s> $B </s>"),
    "end": ("$A </s>", "$A $B </s>"),
}


def made(name: str) -> tuple[Any, Any]:
    """Return a random classifier and a tokenizer of bytes with its habits."""
    config, side, template = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    keep_attention(model)
    tokenizer = byte_tokenizer()
    if config.pad_token_id == 1:  # RoBERTa's
        tokenizer.pad_token, tokenizer.bos_token = "<s>", "<pad>"
    tokenizer.padding_side = side
    if template in TEMPLATES:
        single, pair = TEMPLATES[template]
        if config.pad_token_id == 1:
            single, pair = single.replace("<s>", "<pad>"), pair.replace("<s>", "<pad>")
        special = [
            (token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<s>", "</s>")
        ]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, pair=pair, special_tokens=special
        )
    if template in ("bert", "xlnet", "funnel"):
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer._pad_token_type_id = 3 if template == "xlnet" else 0
    return model, tokenizer


TEXTS = [
    "a",
    "on the way to it",
    "no",
    "a somewhat longer text than the others, by far",
    "12345",
    "same len one!",
    "same len two!",
]


def plain(
    model: Any, tokenizer: Any, texts: list[str], pairs: list[str] | None = None
) -> torch.Tensor:
    """Return what transformers alone says of each text alone, (D, C)."""
    rows = []
    for at, text in enumerate(texts):
        second = {} if pairs is None else {"text_pair": pairs[at]}
        with torch.no_grad():
            batch = tokenizer(
                [text], **{k: [v] for k, v in second.items()}, padding=True, return_tensors="pt"
            )
            if not Padding.of(tokenizer, model, TASK).has_mask:
                del batch["attention_mask"]
            rows.append(model(**batch).logits)
    return torch.cat(rows).log_softmax(-1)


@pytest.mark.parametrize("name", list(MODELS))
def test_scores_are_those_of_each_text_alone(name: str) -> None:
    model, tokenizer = made(name)
    documents = [
        Document(text, label) for label, text in zip([0, 1, 2, 0, 1, 2, 0], TEXTS, strict=True)
    ]
    encoded = encode_all(documents, tokenizer, TASK, max_length=64)
    padding = Padding.of(tokenizer, model, TASK)
    wanted = plain(model, tokenizer, TEXTS)
    scores = score_examples(model, encoded, TASK, batch_size=4, device="cpu", padding=padding)
    expected = wanted.gather(-1, torch.tensor(scores.columns["label"])[:, None])[:, 0]
    np.testing.assert_allclose(scores.columns["logprob"], expected.numpy(), atol=2e-5)
    assert len(set(np.round(scores.columns["logprob"], 4))) > 4  # texts are told apart at all
    again = score_examples(model, encoded, TASK, batch_size=1, device="cpu", padding=padding)
    np.testing.assert_allclose(again.columns["logprob"], scores.columns["logprob"], atol=2e-5)
    assert padding.one_length is (padding.note is not None)
    assert padding.one_length is (name in BY_LENGTH)


@pytest.mark.parametrize("name", ["xlnet", "bert", "deberta", "gpt2", "funnel", "roberta"])
def test_batches_are_what_the_tokenizer_pads(name: str) -> None:
    model, tokenizer = made(name)
    encoded = encode_all([Document(text, 0) for text in TEXTS], tokenizer, TASK, max_length=64)
    batches = PaddedBatches(
        encoded, batch_size=len(TEXTS), seed=0, padding=Padding.of(tokenizer, model, TASK)
    )
    ours = batches.read(np.arange(len(TEXTS)))
    theirs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert set(theirs) <= set(ours)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", ["xlnet", "bert", "deberta", "electra"])
def test_segments_of_pairs_reach_the_model(name: str) -> None:
    model, tokenizer = made(name)
    pairs = TEXTS[::-1]
    encoded = []
    for text, pair in zip(TEXTS, pairs, strict=True):
        row = tokenizer(text, pair)
        ids, parts = (np.array(row[key], dtype=np.int32) for key in ("input_ids", "token_type_ids"))
        encoded.append(Encoded(ids, ids < 0, 1, 1, text, token_type_ids=parts))
    padding = Padding.of(tokenizer, model, TASK)
    scores = score_examples(model, encoded, TASK, batch_size=3, device="cpu", padding=padding)
    np.testing.assert_allclose(
        scores.columns["logprob"], plain(model, tokenizer, TEXTS, pairs)[:, 1].numpy(), atol=2e-5
    )
    one = [Encoded(each.input_ids, each.targets, 1, 1, each.digest) for each in encoded]
    blind = score_examples(model, one, TASK, batch_size=3, device="cpu", padding=padding)
    assert np.abs(blind.columns["logprob"] - scores.columns["logprob"]).max() > 1e-3


@pytest.mark.parametrize("name", ["xlnet", "gpt2 left", "t5", *BY_LENGTH])
def test_training_sees_what_scoring_sees(name: str) -> None:
    """The loss of a batch is the mean of what is scored, with a teacher of other inputs beside
    it.
    """
    model, tokenizer = made(name)
    encoded = encode_all([Document(text, 1) for text in TEXTS], tokenizer, TASK, max_length=64)
    padding = Padding.of(tokenizer, model, TASK)
    batch = PaddedBatches(encoded, batch_size=len(TEXTS), seed=0, padding=padding).batch(0)
    loss = Objective(model, TASK, Precision.fp32, CPU, PhaseClock())(batch).loss
    scores = score_examples(model, encoded, TASK, batch_size=2, device="cpu", padding=padding)
    assert loss.item() == pytest.approx(-scores.columns["logprob"].mean(), rel=1e-4)
    teacher = Teacher(made("llama left")[0], Precision.fp32, Loss(0.5))
    taught = Objective(model, TASK, Precision.fp32, CPU, PhaseClock(), teacher)(batch).loss
    assert bool(taught.isfinite())


@pytest.mark.parametrize("name", BY_LENGTH)
def test_logits_by_length_are_those_of_each_text_alone_in_its_order(name: str) -> None:
    """Of a model that nobody has tried yet, as a teacher is: another's tokenizer pads."""
    model, tokenizer = made(name)
    encoded = encode_all([Document(text, 1) for text in TEXTS], tokenizer, TASK, max_length=64)
    batch = PaddedBatches(
        encoded, batch_size=len(TEXTS), seed=0, padding=Padding(0, segment=0)
    ).read(np.arange(7))
    del batch["labels"]
    with torch.no_grad():
        found = logits_of(model, batch).log_softmax(-1)
        beside = model(**read_by(model, batch)).logits.log_softmax(-1)
    wanted = plain(model, tokenizer, TEXTS)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    # for longer texts
    assert (beside - wanted).abs().max() > 1e-3 or name in ("reformer", "big bird")


def test_a_model_that_changes_its_attention_for_a_short_text_changes_it_back(
    tmp_path: Path,
) -> None:
    model, tokenizer = made("big bird")
    save_model(model, tokenizer, tmp_path)
    model = load_model(tmp_path, TASK, labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    long, short = torch.arange(3, 90)[None], torch.arange(3, 9)[None]
    with torch.no_grad():
        first = model(input_ids=long).logits
        model(input_ids=short)
        assert torch.equal(model(input_ids=long).logits, first)
