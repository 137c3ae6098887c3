"""What every run of a tiny recipe would make anew is made once for all tests: the embedded
tokenizer.

Its key says what it is trained on, so that a copy is what training it again would give.
`test_data_embedded.py` has it trained.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from pipeline.data import tokenizer
from pipeline.data.documents import Document

ENV = "PIPELINE_TEST_TOKENIZERS"
"""In the environment, of forked commands too: the folder that tokenizers are kept in."""
TRAIN = tokenizer._train


def _train_or_copy(documents: Sequence[Document], vocabulary_size: int, folder: Path) -> None:
    if ENV not in os.environ:
        TRAIN(documents, vocabulary_size, folder)
        return
    kept = Path(os.environ[ENV]) / folder.name
    if not kept.is_dir():
        TRAIN(documents, vocabulary_size, kept)
    temporary = folder.with_name(f".{uuid.uuid4().hex}")
    shutil.copytree(kept, temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(temporary)


def keep_tokenizers() -> None:
    """Have this process copy a tokenizer that was trained before."""
    tokenizer._train = _train_or_copy
