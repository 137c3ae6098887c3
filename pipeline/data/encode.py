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
        group: The source that it shares with others; None: a source of its own.
        token_type_ids: int32 (L,): the part of the text that each token is of; None: all of the first.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    num_bytes: int
    label: int | None
    digest: str
    group: str | None = None
    token_type_ids: np.ndarray | None = None


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
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template, tokenizer.model_input_names]
    return hashlib.sha256(f"{content}{special}".encode()).hexdigest()


def _encode(
    documents: Sequence[Document], tokenizer: Any, task: Task, max_length: int, max_bytes: int | None
) -> list[Encoded]:
    if task is Task.sequence_classification:
        batch = tokenizer([document.text for document in documents], truncation=True, max_length=max_length)
        ids = batch["input_ids"]
        parts = batch["token_type_ids"] if "token_type_ids" in batch else [[] for _ in ids]
        return [_example(*each) for each in zip(documents, ids, parts, strict=True)]
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
    return Encoded(row, targets, len(text.encode("utf-8", "replace")), None, document.digest, document.group)


def _example(document: Document, ids: list[int], parts: list[int]) -> Encoded:
    row = np.array(ids, dtype=np.int32)
    if not len(row):
        raise UserError("data", f"the text {document.text[:40]!r} has no tokens", "drop it, or check the tokenizer")
    size = len(document.text.encode("utf-8", "replace"))
    nothing = np.zeros(len(row), dtype=bool)
    segments = np.array(parts, dtype=np.int32) if any(parts) else None
    return Encoded(row, nothing, size, document.label, document.digest, document.group, segments)


def _chat(document: Document, tokenizer: Any) -> Encoded:
    """Encode a chat; only what the assistant says is predicted, the template's end of its turn included.

    Turns are found by growing the conversation: the text up to a turn must begin the whole. A token that joins the
    end of the prompt with the beginning of an answer belongs to the answer.
    """
    assert document.messages is not None
    if not tokenizer.chat_template:
        raise UserError("data.path", "holds chats but the model has no chat template", "use a chat model, or text")
    turns = list(document.messages)
    ends = [end for end, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
    whole = _render(tokenizer, turns[: ends[-1]], prompt=False)
    ids = _tokens(tokenizer, whole)
    targets = np.zeros(len(ids), dtype=bool)
    for end in ends:
        prompt = _render(tokenizer, turns[: end - 1], prompt=True)
        said = _render(tokenizer, turns[:end], prompt=False)
        if not (said.startswith(prompt) and whole.startswith(said)):
            raise UserError("data.path", "this chat template rewrites earlier turns", "use one-turn chats, or text")
        begin = common_length(ids, _tokens(tokenizer, prompt))
        targets[begin : common_length(ids, _tokens(tokenizer, said))] = True
    targets[:1] = False
    if not targets.any():
        raise UserError("data.path", f"the chat {turns[0]['content'][:40]!r} has nothing to predict", "drop it")
    size = sum(len(turns[end - 1]["content"].encode("utf-8", "replace")) for end in ends)
    return Encoded(np.array(ids, dtype=np.int32), targets, size, None, document.digest, document.group)


def _render(tokenizer: Any, turns: list[dict[str, Any]], *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        first = turns[0]["content"][:40] if turns else ""
        problem = f"the model's chat template refuses the chat {first!r} ({error})"
        raise UserError("data.path", problem, "drop that chat, or use another model") from None


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def common_length(one: list[int], other: list[int]) -> int:
    """Return how many tokens two sequences begin alike with."""
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
                min(len(one), len(other)))  # fmt: skip
