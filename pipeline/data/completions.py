"""Saved completions of any model, to train a student on: rows of prompt and completion, or of chat
`messages`.

Sequence-level distillation: the student learns what the teacher wrote, no teacher is loaded, and
any model that can be asked will do. Only what was completed is predicted. What the completions cost
is not in this run's ledger.
Source: Kim and Rush 2016, arXiv 1606.07947, section 3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.settings.data import DataConfig
from pipeline.config.text_files import open_file
from pipeline.data.cells import Row, refuse_half_characters
from pipeline.data.chats import messages_of, tools_of
from pipeline.data.documents import Dataset, Document
from pipeline.data.encode import Encoded, encode_all
from pipeline.data.files import read_rows
from pipeline.data.mappings import mapping
from pipeline.errors import UserError
from pipeline.tasks.table import Task


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what a model made of it; as a chat, `document` holds both."""

    prompt: str
    completion: str
    document: Document


def read_completions(path: str, config: DataConfig, key: str) -> list[Completion]:
    """Read a file of any format (`data/formats.py`).

    Args:
        config: Names the column of `messages`.
        key: The setting that named the file, for refusals.

    Raises:
        UserError: Naming the line at fault.
    """
    file = Path(path).expanduser()
    messages = mapping(config.columns, "data.columns").get("messages", "messages")
    found = [_completion(row, messages, key) for row in read_rows(file, key)]
    if not found:
        raise UserError(
            key,
            f"{file} has no completion",
            'write {"prompt": ..., "completion": ...} on each line',
        )
    return found


def _completion(row: Row, messages: str, key: str) -> Completion:
    where, fields = row
    if fields.get(messages) is not None:
        turns = messages_of(where, fields[messages], key, {})
        return Completion(
            "",
            "",
            Document("", messages=turns, tools=tools_of(where, fields.get("tools"), key, {})),
        )
    for name in ("prompt", "completion"):
        if not isinstance(fields.get(name), str):
            problem = (
                f"{where} has no {name}" if name not in fields else f"{where}: {name} is no text"
            )
            raise UserError(
                key, problem, 'write {"prompt": ..., "completion": ...}, or {"messages": [...]}'
            )
    if not fields["completion"].strip():
        raise UserError(key, f"{where} has an empty completion", "drop that line")
    prompt, completion = fields["prompt"], fields["completion"]
    refuse_half_characters(where, prompt + completion, key)
    return Completion(prompt, completion, Document(completion, prompt=prompt))


def check_apart(completions: Sequence[Completion], data: Dataset, key: str) -> None:
    """Refuse completions that hold what the student will be measured on; blanks and case make no
    difference.

    Raises:
        UserError: If one is, with its prompt or alone, a document of validation or test, or
            completes one's prompt.
    """
    kept: dict[str, str] = {}
    for split in ("validation", "test"):
        for document in data.splits[split]:
            kept[document.likeness] = split
            if document.prompt:
                kept[Document(document.prompt).likeness] = split
    for number, each in enumerate(completions, 1):
        texts = (each.prompt + each.completion, each.completion, each.prompt)
        parts = [Document(text) for text in texts if text.strip()]
        found = (kept.get(document.likeness) for document in (each.document, *parts))
        split = next((name for name in found if name is not None), None)
        if split is not None:
            raise UserError(key, f"completion {number} holds a document of {split}", "leave it out")


def encode_completions(completions: Sequence[Completion], tokenizer: Any) -> list[Encoded]:
    """Encode completions; a token that joins prompt and completion belongs to the completion.

    Raises:
        UserError: If the model has no chat template for chats.
    """
    return encode_all(
        [each.document for each in completions], tokenizer, Task.causal_lm, max_length=0
    )


def file_digest(path: str) -> str:
    """Return what decides whether two files of completions are the same, 32 hex characters."""
    with open_file(Path(path).expanduser()) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
