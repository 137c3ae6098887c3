"""A model whose head is for another task, or that has none, is refused by the setting that names
it, in plain words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from here import here
from make_assess_models import byte_tokenizer, saved, tiny
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from pipeline.errors import UserError
from pipeline.models.heads import refuse_other_head
from pipeline.models.load import check_loads, load_config, save_model
from pipeline.tasks.table import Task

QUICK = (
    "tracking.charts=false",
    "policy=smoke",
    "tracking.mlflow=false",
    "data.max_documents=40",
    "quality.max_documents=8",
)
SMALL = {"vocab_size": 300, "num_attention_heads": 2, "num_hidden_layers": 1}
DISTILBERT = DistilBertConfig(vocab_size=300, dim=32, hidden_dim=32, n_layers=1, n_heads=2)
LABELLED = ("task=sequence_classification", "data=stdlib_labels")


def bert(kind: Any) -> Any:
    return kind(BertConfig(**SMALL, hidden_size=32, intermediate_size=32))


def gpt2(kind: Any) -> Any:
    return kind(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))


def without_ends(model: Any, folder: Path) -> Path:
    """Save a model with a tokenizer that has neither a begin nor an end token, as BERT's."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer, pad_token="<pad>"
    )
    save_model(model, tokenizer, folder)
    return folder


MODELS = {
    "classifier": lambda folder: without_ends(tiny(Task.sequence_classification), folder),
    "distilbert": lambda folder: saved(DistilBertForSequenceClassification(DISTILBERT), folder),
    "writer": lambda folder: saved(tiny(Task.causal_lm), folder),
    "gpt2": lambda folder: saved(gpt2(GPT2LMHeadModel), folder),
    "bare": lambda folder: saved(bert(BertModel), folder),
    "masked": lambda folder: saved(bert(BertForMaskedLM), folder),
    "body": lambda folder: saved(gpt2(GPT2Model), folder),
}


@pytest.mark.parametrize("key", ["candidate", "baseline"])
@pytest.mark.parametrize(
    ("name", "more", "problem", "remedy"),
    [
        (
            "classifier",
            (),
            "is a classifier (LlamaForSequenceClassification)",
            "give task=sequence_classification",
        ),
        (
            "distilbert",
            (),
            "is a classifier (DistilBertForSequenceC",
            "give task=sequence_classification",
        ),
        ("gpt2", LABELLED, "is a language model (GPT2LMHeadModel)", "give task=causal_lm"),
        (
            "bare",
            (),
            (
                "has no head for task=causal_lm: its config.json names BertModel, a body without a"
                " head"
            ),
            "give a causal language model",
        ),
        (
            "bare",
            LABELLED,
            "has no head for task=sequence_classification: its config.json names BertModel, a body",
            "give a fine-tuned classifier",
        ),
        (
            "masked",
            LABELLED,
            "has no head for task=sequence_classification: its config.json names BertForMaskedLM",
            "give a fine-tuned classifier",
        ),
    ],
)
def test_a_release_of_another_task_is_refused_by_its_key(
    tmp_path: Path, key: str, name: str, more: tuple[str, ...], problem: str, remedy: str
) -> None:
    other = "baseline" if key == "candidate" else "candidate"
    right = (
        MODELS["writer"](tmp_path / "right")
        if not more
        else saved(tiny(Task.sequence_classification), tmp_path / "right")
    )
    folder = MODELS[name](tmp_path / name)
    if more:  # the classes of the data, so that the other side is not what is refused
        labels = load_config(right).id2label
        data = tmp_path / "data.jsonl"
        rows = [
            {"text": f"text {n} {n * 7919}", "label": labels[n % len(labels)]} for n in range(60)
        ]
        data.write_text("\n".join(map(json.dumps, rows)))
        more = ("task=sequence_classification", f"data.path={data}")
    done = here(
        tmp_path, "recipe=release_check", f"{key}={folder}", f"{other}={right}", *QUICK, *more
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"refused: {key}: ")
    assert problem in done.stderr
    assert done.stderr.strip().endswith(f"; {remedy}") or name == "bare"
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_tokenizer_without_ends_is_refused_by_the_key_of_its_model(tmp_path: Path) -> None:
    right, odd = (
        saved(tiny(Task.causal_lm), tmp_path / "a"),
        without_ends(tiny(Task.causal_lm, seed=1), tmp_path / "b"),
    )
    done = here(tmp_path, "recipe=release_check", f"candidate={odd}", f"baseline={right}", *QUICK)
    assert done.stderr.startswith(
        "refused: candidate: its tokenizer has neither a begin nor an end token"
    )


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("body", Task.causal_lm),
        ("writer", Task.causal_lm),
        ("distilbert", Task.sequence_classification),
    ],
)
def test_a_model_with_the_right_head_passes(tmp_path: Path, name: str, task: Task) -> None:
    folder = MODELS[name](tmp_path / name)
    refuse_other_head(load_config(folder), task, "candidate", folder)


def test_what_is_trained_may_have_another_head_and_what_is_not_may_not(tmp_path: Path) -> None:
    classifier = saved(tiny(Task.sequence_classification), tmp_path / "model")
    line = (
        "recipe=baseline",
        f"model.path={classifier}",
        "tracking.mlflow=false",
        "data.max_documents=40",
    )
    done = here(tmp_path, *line, "training.steps=0")
    assert "model.path: " in done.stderr
    assert (
        "is a classifier (LlamaForSequenceClassification); give task=sequence_classification"
        in done.stderr
    )


def test_a_body_that_is_to_be_trained_is_told_it_has_no_head(tmp_path: Path) -> None:
    folder = saved(bert(BertModel), tmp_path / "body")
    with pytest.raises(
        UserError, match=r"has no head for task=causal_lm: its config\.json names BertModel, a body"
    ):
        check_loads(str(folder), Task.causal_lm, labels=None, key="student.path", new_head=True)
