"""Whether two models count text in the same tokens."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.tokenizer import tokenizer_digest
from pipeline.models.load import load_tokenizer
from pipeline.tasks.table import Task

OTHER_TOKENIZER = "the two have other tokenizers: a token is not the same amount of text"


def other_tokenizers(task: Task, arm: Path, base: Path) -> bool:
    """Return whether two language models read text as other tokens: seconds per token are then of
    other texts.
    """
    if not task.kind.is_language:  # an example is one, whatever its tokens
        return False
    ours, theirs = (tokenizer_digest(load_tokenizer(folder)) for folder in (arm, base))
    return ours != theirs
