"""The student's initial weights: layers copied from its source, a changed configuration, or a model
that is given.

What is cut or stacked is built from its own configuration and proven by a reload
(`models/layers.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.model import StudentConfig
from pipeline.errors import UserError
from pipeline.ledger.numbers import how_many
from pipeline.models.layers import COUNTS, check_layers, layer_count, per_layer, with_layers
from pipeline.models.load import (
    auto_class,
    from_config,
    load_config,
    load_model,
    load_tokenizer,
    text_config_of,
)
from pipeline.store.artifacts import digest_given
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_layers(spec: Any, num_layers: int) -> list[int]:
    """Return the indexes of the layers a student keeps.

    Args:
        spec: `every_n` keeps layers n-1, 2n-1, ...; a count spreads that many evenly, the last one
            included; a list names them.

    Raises:
        UserError: If it names none, or one that is not there.
    """
    key, remedy = "student.layers", f"give every_2, a count up to {num_layers}, or a list of layers"
    if (
        isinstance(spec, str)
        and spec.startswith("every_")
        and spec[6:].isdigit()
        and int(spec[6:]) > 0
    ):
        every = int(spec[6:])
        chosen = list(range(every - 1, num_layers, every))
    elif isinstance(spec, int) and not isinstance(spec, bool) and 0 < spec <= num_layers:
        chosen = [((index + 1) * num_layers) // spec - 1 for index in range(spec)]
    elif isinstance(spec, list) and all(
        isinstance(item, int) and 0 <= item < num_layers for item in spec
    ):
        chosen = list(spec)
        if len(set(chosen)) < len(chosen):
            raise UserError(key, f"{spec!r} names a layer twice", remedy)
    else:
        raise UserError(key, f"{spec!r} fits no model of {how_many(num_layers, 'layer')}", remedy)
    if not chosen:
        raise UserError(key, f"{spec!r} keeps none of {how_many(num_layers, 'layer')}", remedy)
    return chosen


def student_config(student: StudentConfig, source: str | Path, task: Task) -> Any:
    """Return the configuration that the student will have, before any of it is made.

    Args:
        source: Folder or Hub name of the model that layers, configuration and tokenizer are copied
            from.

    Raises:
        UserError: Naming the setting that fits no model.
    """
    if student.path is not None:
        return load_config(student.path, revision=student.revision, key="student.path")
    base = load_config(source, key="student.source")
    if student.config:
        return _changed_config(base, student.config, task)
    chosen = choose_layers(student.layers, layer_count(base))
    return check_layers(base, task, chosen, "student.layers")


def student_identity(student: StudentConfig, source: Path | None) -> dict[str, Any]:
    """Return what decides the student's initial weights beside its source and the seed; part of
    artifacts' keys.

    Args:
        source: Folder that layers and configuration are copied from; None where `student.path` is
            set.
    """
    if student.path is not None:
        folder = Path(student.path).expanduser()
        return {
            "given": (
                digest_given(folder)[0] if folder.is_dir() else [student.path, student.revision]
            )
        }
    assert source is not None
    if student.config:
        return {"config": student.config}
    return {
        "layers": choose_layers(
            student.layers, layer_count(load_config(source, key="student.source"))
        )
    }


def make_student(
    config: StudentConfig,
    source: Path,
    task: Task,
    labels: tuple[str, ...] | None,
    *,
    new_head: bool = True,
    scratch: Path | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Make the student's initial weights (seed torch first) and its tokenizer.

    Args:
        source: Folder of the arm that layers, configuration and tokenizer are copied from.
        new_head: Whether a given student's head may be made anew, because it is trained afterwards.
        scratch: Where it may be saved for a moment; null: the system's folder for such files.

    Raises:
        UserError: If the settings fit no model.
    """
    if config.path is not None:
        key = "student.path"
        model = load_model(
            config.path, task, labels=labels, revision=config.revision, key=key, new_head=new_head
        )
        return model, load_tokenizer(config.path, revision=config.revision, key=key)
    tokenizer = load_tokenizer(source, key="student.source")
    if config.config:
        changed = _changed_config(load_config(source, key="student.source"), config.config, task)
        if task.kind.labelled:
            changed.get_text_config().pad_token_id = tokenizer.pad_token_id
        return from_config(changed, task, labels), tokenizer
    model = load_model(source, task, labels=labels, key="student.source", new_head=new_head)
    chosen = choose_layers(config.layers, layer_count(model.config))
    return with_layers(model, chosen, "student.layers", scratch=scratch), tokenizer


def stack_layers(
    model: PreTrainedModel, times: int, key: str, *, scratch: Path | None = None
) -> PreTrainedModel:
    """Return `model` grown to `times` its depth: all its layers, and copies of them on top.

    Raises:
        UserError: If it has no one stack of layers.

    Source: Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking", PMLR 97,
    section 4; for language models Du et al. 2024, arXiv 2405.15319, where this way of growing did
    best.
    """
    return with_layers(model, stacked(model.config, times), key, scratch=scratch)


def stacked(config: Any, times: int) -> list[int]:
    """Return the layers of a model that is stacked `times` times."""
    have = layer_count(config)
    return [at % have for at in range(times * have)]


def _changed_config(base: Any, changes: dict[str, Any], task: Task) -> Any:
    """Return `base` with keys changed, tried out on the meta device: it must make a model that
    runs.

    Raises:
        UserError: If a key is unknown or the values fit no model.
    """
    import torch

    text = base.get_text_config()
    raw = text.to_dict()
    for name, value in changes.items():
        if name in ("model_type", "architectures", "auto_map"):
            raise UserError(
                f"student.config.{name}",
                "a student is of its source's architecture",
                "give another as student.path",
            )
        if not hasattr(text, name):
            raise UserError(
                f"student.config.{name}", f"{type(text).__name__} has no such key", "check its name"
            )
        if name in COUNTS:
            if isinstance(value, int) and value < 1:
                raise UserError(
                    f"student.config.{name}", f"{value} is no number of layers", "give at least 1"
                )
            for each in set(per_layer(text)) - set(changes):
                raw.pop(each, None)  # one a layer; made anew from the other keys
    try:
        config = text_config_of(base, {**raw, **changes})
        with torch.device("meta"):
            ids = torch.zeros(1, 2, dtype=torch.long)
            auto_class(task).from_config(config)(input_ids=ids)
    except Exception as error:  # what a value breaks, each architecture says in its own way
        text_of_error = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            "student.config",
            f"{changes} makes no {type(base).__name__} that runs ({text_of_error})",
            "change a value",
        ) from error
    return config
