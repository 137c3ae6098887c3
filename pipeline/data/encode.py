"""Documents to tokens: what is read, what is to be predicted, and how many bytes that stands for."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import Task
from pipeline.data.documents import Document
from pipeline.errors import UserError
from pipeline.store import key_of


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded document.

    Attributes:
        input_ids: int32 (L,).
        targets: bool (L,): the tokens to be predicted; never the first.
        num_bytes: UTF-8 bytes of the text that the targets stand for.
        label: Class index; None without one.
        digest: Content digest of the document.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    num_bytes: int
    label: int | None
    digest: str


_KEPT: OrderedDict[str, list[Encoded]] = OrderedDict()
"""What this process encoded last, by what decides it: stages read the same documents again and again."""
KEEP = 6


def encode_all(
    documents: Sequence[Document], tokenizer: Any, task: Task, *, max_length: int, max_bytes: int | None = None
) -> list[Encoded]:
    """Encode documents; the same ones again, by a tokenizer of the same content, come from memory.

    Args:
        max_length: Tokens an example of classification is cut to; causal LM reads documents whole.
        max_bytes: Causal LM reads only the head of longer documents, cut at a character.

    Raises:
        UserError: If a text has no tokens, or a chat cannot be told apart into turns.
    """
    key = key_of(
        documents=[(document.digest, document.label) for document in documents], tokenizer=_content(tokenizer),
        task=task, max_length=max_length, max_bytes=max_bytes,
    )  # fmt: skip
    if key not in _KEPT:
        _KEPT[key] = _encode(documents, tokenizer, task, max_length, max_bytes)
        while len(_KEPT) > KEEP:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(key)
    return list(_KEPT[key])


def _content(tokenizer: Any) -> str:
    """Return all that decides how a tokenizer encodes; a slow one (without a backend) is its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else f"slow {id(tokenizer)}"
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(f"{content}{special}".encode()).hexdigest()


def _encode(
    documents: Sequence[Document], tokenizer: Any, task: Task, max_length: int, max_bytes: int | None
) -> list[Encoded]:
    if task is Task.sequence_classification:
        batch = tokenizer([document.text for document in documents], truncation=True, max_length=max_length)
        ids = batch["input_ids"]
        return [_example(document, row) for document, row in zip(documents, ids, strict=True)]
    texts = [_head(document.text, max_bytes) for document in documents if document.messages is None]
    rows = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    heads = iter(texts)
    return [
        _text(document, next(heads), next(rows), tokenizer) if document.messages is None else _chat(document, tokenizer)
        for document in documents
    ]


def _head(text: str, max_bytes: int | None) -> str:
    raw = text.encode("utf-8", "replace")
    return text if max_bytes is None or len(raw) <= max_bytes else raw[:max_bytes].decode("utf-8", "ignore")


def _text(document: Document, text: str, ids: list[int], tokenizer: Any) -> Encoded:
    if not ids:
        raise UserError("data", f"the text {text[:40]!r} has no tokens", "drop it, or check the tokenizer")
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UserError("model.path", "its tokenizer has neither a begin nor an end token", "add one to it")
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    row = np.array([first, *ids, *last], dtype=np.int32)
    targets = np.ones(len(row), dtype=bool)
    targets[0] = False
    return Encoded(row, targets, len(text.encode("utf-8", "replace")), None, document.digest)


def _example(document: Document, ids: list[int]) -> Encoded:
    row = np.array(ids, dtype=np.int32)
    if not len(row):
        raise UserError("data", f"the text {document.text[:40]!r} has no tokens", "drop it, or check the tokenizer")
    size = len(document.text.encode("utf-8", "replace"))
    return Encoded(row, np.zeros(len(row), dtype=bool), size, document.label, document.digest)


def _chat(document: Document, tokenizer: Any) -> Encoded:
    """Encode a chat; only what the assistant says is predicted.

    Turns are found by growing the conversation: the prompt up to a turn must be a true prefix of the longer one.
    """
    assert document.messages is not None
    if not tokenizer.chat_template:
        raise UserError("data.path", "holds chats but the model has no chat template", "use a chat model, or text")
    turns = [{"role": role, "content": content} for role, content in document.messages]
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    size = 0
    for end, turn in enumerate(turns, 1):
        if turn["role"] == "assistant":
            prompt = _render(tokenizer, turns[: end - 1], prompt=True)
            whole = _render(tokenizer, turns[:end], prompt=False)
            if whole[: len(prompt)] != prompt or prompt[: len(ids)] != ids:
                raise UserError("data.path", "this chat template rewrites earlier turns", "use one-turn chats, or text")
            spans.append((max(len(prompt), 1), len(whole)))
            ids, size = whole, size + len(turn["content"].encode("utf-8", "replace"))
    targets = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        targets[start:end] = True
    return Encoded(np.array(ids, dtype=np.int32), targets, size, None, document.digest)


def _render(tokenizer: Any, turns: list[dict[str, str]], *, prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
