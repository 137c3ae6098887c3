"""Scores against plain float64 computations and sklearn, and their independence of batching."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_assess_models import byte_tokenizer, encoded, random_documents, tiny
from sklearn.metrics import accuracy_score
from transformers import BertConfig, BertForSequenceClassification

from pipeline.data.padding import Padding
from pipeline.errors import UserError
from pipeline.evaluation.quality import scoring
from pipeline.evaluation.quality.scoring import (
    cut_windows,
    score_causal,
    score_examples,
    validation_metric,
)
from pipeline.tasks.table import Task

LENGTHS = [2, 40, 7, 1, 33, 90, 12, 25, 3]


@pytest.fixture(scope="module")
def causal():
    return tiny(Task.causal_lm)


@pytest.fixture(scope="module")
def classifier():
    return tiny(Task.sequence_classification)


def score(model, documents, *, sequence_length=128, batch_size=4):
    return score_causal(
        model,
        documents,
        sequence_length=sequence_length,
        batch_size=batch_size,
        device="cpu",
        pad_id=0,
    )


def classify(model, examples, *, batch_size=4):
    padding = Padding.of(byte_tokenizer(), model, Task.sequence_classification)
    return score_examples(
        model,
        examples,
        Task.sequence_classification,
        batch_size=batch_size,
        device="cpu",
        padding=padding,
    )


def float64_logprobs(model, ids: np.ndarray) -> torch.Tensor:
    """Log-probabilities (L, V) of the whole row, model and softmax in float64."""
    with torch.no_grad():
        logits = (
            copy.deepcopy(model)
            .double()(input_ids=torch.tensor(ids.astype(np.int64))[None])
            .logits[0]
        )
    return logits - logits.exp().sum(-1, keepdim=True).log()


def test_bits_tokens_and_predictions_are_those_of_a_plain_float64_computation(causal) -> None:
    documents = random_documents(LENGTHS)
    scores = score(causal, documents)
    first: list[int] = []
    for row, document in enumerate(documents):
        logprobs = float64_logprobs(causal, document.input_ids)
        places = [place for place in range(1, len(document.input_ids)) if document.targets[place]]
        bits = -sum(
            float(logprobs[place - 1, document.input_ids[place]]) for place in places
        ) / math.log(2)
        top = [int(logprobs[place - 1].argmax()) for place in places]
        assert scores.bits[row] == pytest.approx(bits, rel=1e-5, abs=1e-9)
        assert scores.tokens[row] == len(places)
        assert scores.correct[row] == sum(
            t == document.input_ids[p] for t, p in zip(top, places, strict=True)
        )
        assert scores.bytes[row] == document.num_bytes
        first += top
    assert scores.predictions.dtype == np.int32
    assert scores.predictions.tolist() == first
    assert scores.digest.tolist() == [document.digest for document in documents]


def test_a_long_document_is_read_in_windows_that_share_one_token(causal) -> None:
    document, length = random_documents([50])[0], 8
    bits = 0.0
    for place in np.flatnonzero(document.targets):
        start = (place - 1) // length * length  # of the only window that predicts this place
        start = min(start, 49 - length)  # the last one reads as much as the others
        logprobs = float64_logprobs(causal, document.input_ids[start:place])
        bits -= float(logprobs[-1, document.input_ids[place]]) / math.log(2)
    scores = score(causal, [document], sequence_length=length)
    assert scores.bits[0] == pytest.approx(bits, rel=1e-5)
    # more context is another score
    assert abs(scores.bits[0] - score(causal, [document]).bits[0]) > 1e-3


@settings(max_examples=100, deadline=None)
@given(data=st.data(), length=st.integers(1, 9), has_end=st.booleans())
def test_windows_predict_every_target_exactly_once(data, length: int, has_end: bool) -> None:
    stride = data.draw(st.none() | st.integers(1, length))
    masks = data.draw(st.lists(st.lists(st.booleans(), max_size=30), min_size=1, max_size=4))
    documents = [encoded(list(range(1, len(mask) + 2)), targets=[False, *mask]) for mask in masks]
    if has_end:
        ends = [np.arange(len(each.input_ids)) == len(each.input_ids) - 1 for each in documents]
        documents = [
            replace(each, ends=end & each.targets)
            for each, end in zip(documents, ends, strict=True)
        ]
    windows = cut_windows(documents, length, stride)
    predicted = [token for window in windows for token in window.ids[1:][window.scored].tolist()]
    assert predicted == [token for d in documents for token in d.input_ids[d.targets].tolist()]
    assert all(window.scored.any() for window in windows)
    assert all(2 <= len(window.ids) == len(window.scored) + 1 <= length + 1 for window in windows)
    assert [place for window in windows for place in window.places.tolist()] == list(
        range(len(predicted))
    )
    # Every token but a document's first few has at least the context that the stride leaves.
    for window in windows:
        context = 1 + int(np.flatnonzero(window.scored)[0])
        assert window.ids[0] == 1 or context >= length - (stride or length) + 1


def test_renderings_of_one_conversation_are_one_document(causal) -> None:
    one, two, other = random_documents([9, 14, 11])
    two = replace(two, digest=one.digest)
    apart = [score(causal, [each]) for each in (one, two, other)]
    both = score(causal, [one, two, other])
    assert both.digest.tolist() == [one.digest, other.digest]
    for name in ("bits", "bytes", "tokens", "correct"):
        values = [getattr(each, name)[0] for each in apart]
        assert getattr(both, name).tolist() == pytest.approx(
            [values[0] + values[1], values[2]], rel=1e-5
        )
    assert both.predictions.tolist() == [
        token for each in apart for token in each.predictions.tolist()
    ]


def test_ends_stand_apart(causal) -> None:
    document = random_documents([12], is_text=True)[0]
    ends = np.arange(12) == 11
    whole, split = score(causal, [document]), score(causal, [replace(document, ends=ends)])
    assert split.bits[0] + split.end_bits[0] == pytest.approx(whole.bits[0], rel=1e-6)
    assert (split.tokens[0], split.ends[0]) == (10, 1)
    assert split.predictions.tolist() == whole.predictions[:-1].tolist()
    assert (whole.ends[0], whole.end_bits[0]) == (0, 0)


@pytest.mark.parametrize(("batch_size", "length"), [(1, 128), (3, 128), (64, 128), (5, 16)])
def test_batching_and_padding_do_not_change_scores(causal, batch_size: int, length: int) -> None:
    documents = random_documents(LENGTHS)
    alone = [
        score(causal, [document], sequence_length=length, batch_size=1) for document in documents
    ]
    together = score(causal, documents, sequence_length=length, batch_size=batch_size)
    np.testing.assert_allclose(together.bits, [one.bits[0] for one in alone], rtol=1e-5)
    np.testing.assert_array_equal(
        together.predictions, np.concatenate([one.predictions for one in alone])
    )


def test_logits_are_cut_to_the_limit_without_changing_scores(causal, monkeypatch) -> None:
    documents = random_documents(LENGTHS)
    whole, shapes = score(causal, documents, batch_size=64), []
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * 259 * 45)  # 45 positions
    original = torch.Tensor.log_softmax
    monkeypatch.setattr(
        torch.Tensor, "log_softmax", lambda x, dim: shapes.append(x.shape) or original(x, dim)
    )
    calls = []
    handle = causal.register_forward_pre_hook(
        lambda _, __, kw: calls.append(kw["input_ids"].shape), with_kwargs=True
    )
    cut = score(causal, documents, batch_size=64)
    handle.remove()
    assert max(rows for rows, _ in shapes) == 45
    assert [rows * length for rows, length in calls if rows > 1 and rows * length > 45] == []
    np.testing.assert_allclose(cut.bits, whole.bits, rtol=1e-5)
    np.testing.assert_array_equal(cut.predictions, whole.predictions)


def test_every_module_gets_its_training_mode_back(causal) -> None:
    model = copy.deepcopy(causal).train()
    model.model.norm.eval()
    seen = []
    model.register_forward_pre_hook(
        lambda module, _: seen.append((module.training, torch.is_inference_mode_enabled()))
    )
    score(model, random_documents([10]))
    assert seen == [(False, True)]
    assert model.training
    assert not model.model.norm.training
    with pytest.raises(UserError):  # also when scoring ends badly
        score(model, [encoded([1, 259])])
    assert model.training


def test_scoring_leaves_the_model_trainable(causal) -> None:
    model = copy.deepcopy(causal).train()
    score(model, random_documents([10]))
    model(input_ids=torch.tensor([[1, 5, 6]]), labels=torch.tensor([[1, 5, 6]])).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_classification_is_that_of_one_example_at_a_time(classifier) -> None:
    examples = random_documents([12, 3, 40, 8, 8, 25, 5])
    scores = classify(classifier, examples)
    for row, example in enumerate(examples):
        with torch.no_grad():
            ids = torch.tensor(example.input_ids.astype(np.int64))[None]
            logits = copy.deepcopy(classifier).double()(input_ids=ids).logits[0]
        expected = float(logits[example.label] - logits.exp().sum().log())
        assert scores.columns["logprob"][row] == pytest.approx(expected, rel=1e-4)
        assert scores.columns["prediction"][row] == int(logits.argmax())
        assert scores.columns["label"][row] == example.label
    assert scores.columns["correct"].mean() == pytest.approx(
        accuracy_score(scores.columns["label"], scores.columns["prediction"])
    )


def test_an_encoder_does_not_see_padding() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
        initializer_range=0.5,
    )
    model, examples = BertForSequenceClassification(config).eval(), random_documents([12, 3, 40])
    alone = [classify(model, [example]).columns["logprob"][0] for example in examples]
    np.testing.assert_allclose(classify(model, examples).columns["logprob"], alone, rtol=1e-5)


def test_a_classifier_without_a_padding_token_gets_the_tokenizers(classifier) -> None:
    model = copy.deepcopy(classifier)
    model.config.pad_token_id = None
    examples = random_documents([12, 3, 40])
    np.testing.assert_allclose(
        classify(model, examples).columns["logprob"],
        classify(classifier, examples).columns["logprob"],
        rtol=1e-5,
    )
    assert model.config.pad_token_id == 0


def test_a_classifier_is_padded_with_its_own_token(classifier) -> None:
    model = copy.deepcopy(classifier)
    model.config.pad_token_id = 2
    examples = random_documents([12, 3, 40])
    np.testing.assert_allclose(
        classify(model, examples).columns["logprob"],
        classify(classifier, examples).columns["logprob"],
        rtol=1e-5,
    )


def test_validation_metric_is_bits_per_byte_or_accuracy(causal, classifier) -> None:
    documents = random_documents(LENGTHS)
    scores, classes = score(causal, documents, sequence_length=16), classify(classifier, documents)
    more = {"sequence_length": 16, "batch_size": 4, "device": "cpu", "padding": Padding(0)}
    bits_per_byte = validation_metric(causal, documents, Task.causal_lm, **more)
    assert bits_per_byte == pytest.approx(
        scores.bits.sum() / sum(document.num_bytes for document in documents)
    )
    accuracy = validation_metric(classifier, documents, Task.sequence_classification, **more)
    assert accuracy == pytest.approx(
        np.mean([p == d.label for p, d in zip(classes.predictions, documents, strict=True)])
    )


def test_what_model_and_data_cannot_do_together_is_refused(causal, classifier) -> None:
    with pytest.raises(UserError, match=r"model\.path: .*token 259 .*ends at 258"):
        score(causal, [encoded([1, 259, 5])])
    with pytest.raises(UserError, match="token 300"):
        score_causal(
            causal, [encoded([1, 5])], sequence_length=8, batch_size=1, device="cpu", pad_id=300
        )
    with pytest.raises(UserError, match=r"model\.path: it tells 3 classes apart .*class 3"):
        classify(classifier, [encoded([1, 5], label=3)])
    limited = copy.deepcopy(causal)
    limited.config.max_position_embeddings = 9
    assert score(limited, random_documents([50]), sequence_length=9).tokens[0] > 0
    with pytest.raises(UserError, match=r"quality\.sequence_length: 10 tokens .* 9 positions"):
        score(limited, random_documents([50]), sequence_length=10)
    limited = copy.deepcopy(classifier)
    limited.config.max_position_embeddings = 9
    with pytest.raises(UserError, match=r"quality\.sequence_length: 10 tokens"):
        classify(limited, random_documents([10]))


def test_importing_assessment_imports_no_heavy_library() -> None:
    code = (
        "import sys, pipeline.evaluation.quality.assess, pipeline.evaluation.serving.measure\n"
        "print([name for name in ('torch', 'transformers', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
