"""Tiny models and a hand-made tokenizer for the tests of `pipeline.evaluation`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pipeline.config.settings.model import TinyShape
from pipeline.data.encode import Encoded
from pipeline.models.load import make_tiny, save_model
from pipeline.tasks.table import Task

SHAPE = TinyShape(hidden_size=64, layers=2, heads=2, intermediate_size=128)
LABELS = ("up", "down", "flat")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte: 0 pads, 1 begins, 2 ends, 3 to 258 are the
    bytes.
    """
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {
        symbol: 3 + place
        for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny(task: Task, *, seed: int = 0, shape: TinyShape = SHAPE) -> Any:
    """Return a model with random weights."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    labels = LABELS if task is Task.sequence_classification else None
    return make_tiny(shape, len(tokenizer), task, labels, tokenizer)


def saved(model: Any, folder: Path) -> Path:
    """Save a model with the byte tokenizer and return its folder."""
    save_model(model, byte_tokenizer(), folder)
    return folder


def encoded(ids: list[int], *, targets: list[bool] | None = None, label: int | None = None) -> Any:
    """Return what encoding gives: by default every token but the first is a target, of one byte
    each.
    """
    chosen = np.array([False] + [True] * (len(ids) - 1) if targets is None else targets)
    row = np.array(ids, dtype=np.int32)
    return Encoded(row, chosen, int(chosen.sum()), label, f"{abs(hash(tuple(ids))):032x}")


def random_documents(lengths: list[int], *, seed: int = 0, is_text: bool = False) -> list[Any]:
    """Return encoded documents of random bytes, with random labels; with random targets, or all
    that texts have.
    """
    rng = np.random.default_rng(seed)
    share = 1.0 if is_text else 0.8
    return [
        encoded(
            rng.integers(3, 259, length).tolist(),
            targets=[False, *(rng.random(length - 1) < share).tolist()],
            label=int(rng.integers(len(LABELS))),
        )
        for length in lengths
    ]
