"""What a dataset is: documents in three splits that share none, with a digest of all of it."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """One document: plain text, text (or a pair of texts) with a label, a prompt with its
    completion, or a chat.

    Attributes:
        text: The text, or the completion of `prompt`; empty for a chat.
        label: Class index for sequence_classification.
        messages: Messages of a chat, whole as the row has them: what the chat template gets.
        tools: Tools that the chat's template is given.
        prompt: What `text` completes; read, and not learnt.
        pair: The second text of a pair (premise and hypothesis).
        group: The source that several documents come from (`data.group_field`); None: a source of
            its own.
    """

    text: str
    label: int | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    pair: str | None = None
    group: str | None = None
    # once it was asked for
    _digest: str | None = field(default=None, init=False, repr=False, compare=False)
    _likeness: str | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it to learn: no text, or an assistant that says nothing."""
        if self.messages is None:
            return not self.text.strip()
        said = [
            turn
            for turn in self.messages
            if turn.get("role") == "assistant" and turn.get("weight", 1)
        ]
        return not any(
            str(turn.get("content") or "").strip() or turn.get("tool_calls") for turn in said
        )

    @property
    def digest(self) -> str:
        """32 hex characters of the content without the label: what decides splits and repeats."""
        if self._digest is None:
            object.__setattr__(self, "_digest", self._hashed())
        return self._digest or ""

    def _hashed(self) -> str:
        parts = [self.messages, self.tools, self.prompt, self.pair]
        content = self.text
        if any(part is not None for part in parts):
            content = json.dumps(
                [self.text, *parts], ensure_ascii=False, sort_keys=True, default=str
            )
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @property
    def likeness(self) -> str:
        """32 hex characters of the content without blanks, case and Unicode form: documents that
        share it are alike.
        """
        if self._likeness is None:
            object.__setattr__(self, "_likeness", self._hashed_plainly())
        return self._likeness or ""

    def _hashed_plainly(self) -> str:
        parts = [self.text, self.prompt or "", self.pair or "", *_said(self.messages or ())]
        whole = "\x1f".join(" ".join(part.split()) for part in parts if part)
        if not whole.isascii():
            whole = unicodedata.normalize("NFKC", whole)
        return hashlib.sha256(whole.casefold().encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _said(messages: Iterable[dict[str, Any]]) -> Iterator[str]:
    for turn in messages:
        yield str(turn.get("role"))
        for name in sorted(turn.keys() - {"role", "weight"}):
            value = turn[name]
            yield (
                value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
            )


@dataclass(frozen=True, slots=True)
class Dataset:
    """Documents by split.

    Attributes:
        digest: 32 hex characters over source, content, labels and their order in every split.
        labels: Class names by index; None without labels.
        notes: What loading did that a reader must know ("dropped 3 blank documents"), each said
            once.
    """

    name: str
    digest: str
    splits: dict[str, tuple[Document, ...]]
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def num_documents(documents: Sequence[Document], *, grouped: bool) -> int:
    """Return how many documents, or groups of them, there are in all."""
    if not grouped:
        return len(documents)
    groups = {
        ("group", each.group) if each.group is not None else ("own", each.digest)
        for each in documents
    }
    return len(groups)
