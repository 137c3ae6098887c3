"""What a dataset is: documents in three splits that share none, with a digest of all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """One document: plain text, text (or a pair of texts) with a label, a prompt with its completion, or a chat.

    Attributes:
        text: The text, or the completion of `prompt`; empty for a chat.
        label: Class index for sequence_classification.
        messages: Messages of a chat, whole as the row has them: what the chat template gets.
        tools: Tools that the chat's template is given.
        prompt: What `text` completes; read, and not learnt.
        pair: The second text of a pair (premise and hypothesis).
        group: The source that several documents come from (`data.group_field`); None: a source of its own.
    """

    text: str
    label: int | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    pair: str | None = None
    group: str | None = None

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it to learn: no text, or an assistant that says nothing."""
        if self.messages is None:
            return not self.text.strip()
        said = [turn for turn in self.messages if turn.get("role") == "assistant"]
        return not any(str(turn.get("content") or "").strip() or turn.get("tool_calls") for turn in said)

    @property
    def digest(self) -> str:
        """32 hex characters of the content without the label: what decides splits and repeats."""
        parts = [self.messages, self.tools, self.prompt, self.pair]
        content = self.text
        if any(part is not None for part in parts):
            content = json.dumps([self.text, *parts], ensure_ascii=False, sort_keys=True, default=str)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Documents by split.

    Attributes:
        digest: 32 hex characters over source, content, labels and their order in every split.
        labels: Class names by index; None without labels.
        notes: What loading did that a reader must know ("dropped 3 blank documents"), each said once.
    """

    name: str
    digest: str
    splits: dict[str, tuple[Document, ...]]
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
