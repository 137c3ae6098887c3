"""Whether a model folder has a head for the task, told by the class that its config.json names.

A head that nothing trains has to be there: a released classifier read as a language model, or a
body without a head, would else be refused for whatever of it comes up first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.adapters import is_adapter
from pipeline.tasks.table import Task

OTHER = "For"  # of any other task: ForMaskedLM, ForTokenClassification


def refuse_other_head(config: Any, task: Task, key: str, path: str | Path) -> None:
    """Refuse a model whose head is for another task, or that has none, where no step trains one.

    An adapter passes: its config.json, where it has one, is its base's.

    Raises:
        UserError: Naming `key`, and the task that the model is for.
    """
    named = next(iter(getattr(config, "architectures", None) or []), None)
    if named is None or is_adapter(str(Path(path).expanduser())):
        return
    if named.endswith(task.kind.heads):
        return
    other = next((each for each in Task if named.endswith(each.kind.heads)), None)
    if other is not None:
        raise UserError(key, f"{path} is a {other.kind.word} ({named})", f"give task={other.value}")
    if not task.kind.is_language or not _writes_without_naming_it(config):
        raise UserError(key, no_head(named, task, path), task.kind.remedy)


def no_head(named: str | None, task: Task, path: object) -> str:
    """Say that a folder has no head for a task, and what its config.json says it is instead."""
    said = "" if named is None else f": its config.json names {named}"
    what = f"{said}, a body without a head" if named is not None and OTHER not in named else said
    return f"{path} has no head for task={task.value}{what}"


def _writes_without_naming_it(config: Any) -> bool:
    """Whether a body is a language model all the same: its head is its embedding, which it has."""
    return bool(
        getattr(config.get_text_config(), "tie_word_embeddings", False)
    ) and not _is_encoder(config)


def _is_encoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
