"""Bits per byte against lm-evaluation-harness's own, on real text, by tokenizers of several
kinds.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pipeline.config.settings.model import TinyShape
from pipeline.data.documents import Document
from pipeline.data.encode import encode_all
from pipeline.evaluation.quality.scoring import cut_windows, score_causal
from pipeline.models.load import make_tiny
from pipeline.tasks.table import Task

HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
SHAPE = TinyShape(hidden_size=64, layers=1, heads=2, intermediate_size=64)


def texts() -> list[str]:
    """Return real texts of many lengths: source code and prose of the standard library, and other
    scripts.
    """
    prose = [(inspect.getdoc(each) or "")[:400] for each in (json, textwrap.wrap, Path)]
    code = [inspect.getsource(textwrap.dedent)[:700]]
    others = [
        "שלום עולם, זה מבחן.",
        "مرحبا بالعالم",
        "日本語のテキスト。",
        "🦜🧪 emoji\r\n\ttabs  and   blanks ",
        "a",
    ]
    return [text for text in (*prose, *code, *others) if text.strip()]


def _wrapped(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )


def byte_level(**special: str) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # as GPT-2's: offsets leave blanks out
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=sorted(special.values())
    )
    backend.train_from_iterator(texts(), trainer)
    return _wrapped(backend, **special)


def word_piece(**special: str) -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", *sorted(special.values())]
    )
    backend.train_from_iterator(texts(), trainer)
    return _wrapped(backend, unk_token="[UNK]", **special)


def unigram(**special: str) -> Any:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *sorted(special.values())],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    tokenizer = _wrapped(backend, unk_token="<unk>", **special)
    begin = special.get("bos_token")
    if begin is not None:  # puts its begin token before a text by itself, as Llama's does
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    return tokenizer


TOKENIZERS = {
    "byte-level, begin and end": lambda: byte_level(bos_token="<s>", eos_token="</s>"),
    "byte-level, end alone": lambda: byte_level(eos_token="<|endoftext|>"),
    "WordPiece, end alone": lambda: word_piece(eos_token="[SEP]"),
    "Unigram, adds its begin": lambda: unigram(bos_token="<s>", eos_token="</s>"),
    "Unigram, begin alone": lambda: unigram(bos_token="<s>"),
}


def model_for(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return make_tiny(SHAPE, len(tokenizer), Task.causal_lm, None, tokenizer).eval()


def rolling(model: Any, tokenizer: Any, documents: list[str], max_length: int) -> list[float]:
    """Return what lm-eval finds, in bits."""
    from lm_eval.api.instance import Instance

    # A tokenizer's own begin token would be predicted after the prefix, which is the same token.
    engine = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=2,
        device="cpu",
        add_bos_token=False,
    )
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), number)
        for number, text in enumerate(documents)
    ]
    return [-nats / np.log(2) for nats in engine.loglikelihood_rolling(requests, disable_tqdm=True)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bits_per_byte_of_raw_text_are_those_of_lm_eval(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    model, documents = model_for(tokenizer), texts()
    encoded = encode_all(
        [Document(text) for text in documents], tokenizer, Task.causal_lm, max_length=0
    )
    lengths = [len(each.input_ids) for each in encoded]
    whole = [lengths[0] - 1, lengths[0] - 2]  # a text that ends with a window, and one token before
    for max_length in (17, *whole):
        theirs = rolling(model, tokenizer, documents, max_length)
        scores = score_causal(
            model, encoded, sequence_length=max_length, batch_size=3, device="cpu", pad_id=0
        )
        np.testing.assert_allclose(scores.bits, theirs, rtol=1e-6)
        size = sum(len(text.encode()) for text in documents)
        assert scores.bits.sum() / scores.bytes.sum() == pytest.approx(sum(theirs) / size, rel=1e-6)
        has_end = tokenizer.eos_token is not None
        assert scores.ends.tolist() == [int(has_end)] * len(documents)
        assert bool((scores.end_bits > 0).all()) is has_end


@pytest.mark.parametrize("stride", [1, 3, 7, 16])
def test_a_stride_gives_the_context_that_lm_eval_calls_context_len(stride: int) -> None:
    from lm_eval.utils import get_rolling_token_windows

    tokenizer = TOKENIZERS["byte-level, begin and end"]()
    length = 16
    for text in texts()[-6:]:
        [document] = encode_all([Document(text)], tokenizer, Task.causal_lm, max_length=0)
        inner = document.input_ids[1:-1].tolist()
        theirs = list(
            get_rolling_token_windows(inner, tokenizer.bos_token_id, length, length - stride + 1)
        )
        ours = cut_windows([document], length, stride)
        ours = [
            each
            for each in ours
            if not (each.scored.sum() == 1 and each.ids[-1] == tokenizer.eos_token_id)
        ]
        for window, (context, predicted) in zip(ours, theirs, strict=True):
            text_only = (
                predicted
                if window.ids[-1] != tokenizer.eos_token_id
                else [*predicted, tokenizer.eos_token_id]
            )
            assert window.ids[1:][window.scored].tolist() == text_only
            assert window.ids[: len(context)].tolist() == context
