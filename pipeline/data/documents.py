"""What a dataset is: documents in three splits that share none, with a digest of all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """One document: plain text, text with a label, or a chat.

    Attributes:
        text: The text; empty for a chat.
        label: Class index for sequence_classification.
        messages: `(role, content)` pairs of a chat.
    """

    text: str
    label: int | None = None
    messages: tuple[tuple[str, str], ...] | None = None

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it to learn: no text, or an assistant that says nothing."""
        said = [self.text] if self.messages is None else [text for role, text in self.messages if role == "assistant"]
        return not any(text.strip() for text in said)

    @property
    def digest(self) -> str:
        """32 hex characters of the content without the label: what decides splits and repeats."""
        content = self.text if self.messages is None else json.dumps(self.messages, ensure_ascii=False)
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
