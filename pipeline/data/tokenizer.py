"""The embedded tokenizer: byte-level BPE trained on the spot from the train split, and kept."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.data.documents import Document
from pipeline.store.artifacts import key_of

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")
SAMPLE_CHARACTERS = 3_000_000


def embedded_tokenizer(documents: Sequence[Document], vocabulary_size: int, cache: Path) -> Any:
    """Return the tokenizer for `documents`, trained once per content, size and library version."""
    from transformers import PreTrainedTokenizerFast

    key = key_of(
        documents=[document.digest for document in documents],
        size=vocabulary_size,
        library=version("tokenizers"),
    )
    folder = cache / key
    if not folder.is_dir():
        _train(documents, vocabulary_size, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _train(documents: Sequence[Document], vocabulary_size: int, folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        _sample(documents),
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    bos, eos, pad = SPECIALS
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,  # pyright: ignore[reportPrivateUsage]
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    temporary = folder.with_name(f".{uuid.uuid4().hex}")
    wrapped.save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was quicker; its tokenizer is the same
        shutil.rmtree(temporary)


def _sample(documents: Sequence[Document]) -> list[str]:
    """Return whole documents, in the order of their digests, up to SAMPLE_CHARACTERS."""
    chosen: list[str] = []
    left = SAMPLE_CHARACTERS
    for document in sorted(documents, key=lambda document: document.digest):
        if left <= 0:
            break
        chosen.append(_words(document))
        left -= len(chosen[-1])
    return chosen


def _words(document: Document) -> str:
    """Return all that a document says, whatever its kind."""
    turns = [str(turn.get("content") or "") for turn in document.messages or ()]
    return "\n".join(
        part for part in (document.prompt, document.text, document.pair, *turns) if part
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of the numbers that a tokenizer gives to its tokens."""
    return key_of(vocabulary=tokenizer.get_vocab())
