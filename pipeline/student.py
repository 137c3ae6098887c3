"""The student's initial weights: layers copied from its source, a changed configuration, or a model that is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import StudentConfig, Task
from pipeline.errors import UserError
from pipeline.models import auto_class, from_config, load_config, load_errors, load_model, load_tokenizer
from pipeline.store import digest_given

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def layer_count(config: PreTrainedConfig) -> int:
    """Return the number of transformer layers a configuration declares.

    Raises:
        UserError: If it declares none under the names known.
    """
    for name in LAYER_COUNT_KEYS:
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise UserError("student.layers", f"{type(config).__name__} names no layer count", "give student.path instead")


def layer_stacks(model: PreTrainedModel, total: int) -> list[tuple[Any, str, Any]]:
    """Return every list of `total` modules in a model: its parent, its name there, and itself."""
    import torch

    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == total
    ]


def choose_layers(spec: Any, num_layers: int) -> list[int]:
    """Return the indexes of the layers a student keeps.

    Args:
        spec: `every_n` keeps layers n-1, 2n-1, ...; a count spreads that many evenly, the last one included;
            a list names them.

    Raises:
        UserError: If it names none, or one that is not there.
    """
    key, remedy = "student.layers", f"give every_2, a count up to {num_layers}, or a list of layers"
    if isinstance(spec, str) and spec.startswith("every_") and spec[6:].isdigit() and int(spec[6:]) > 0:
        every = int(spec[6:])
        chosen = list(range(every - 1, num_layers, every))
    elif isinstance(spec, int) and not isinstance(spec, bool) and 0 < spec <= num_layers:
        chosen = [((index + 1) * num_layers) // spec - 1 for index in range(spec)]
    elif isinstance(spec, list) and all(isinstance(item, int) and 0 <= item < num_layers for item in spec):
        chosen = list(spec)
        if len(set(chosen)) < len(chosen):
            raise UserError(key, f"{spec!r} names a layer twice", remedy)
    else:
        raise UserError(key, f"{spec!r} fits no model of {num_layers} layers", remedy)
    if not chosen:
        raise UserError(key, f"{spec!r} keeps none of {num_layers} layers", remedy)
    return chosen


def student_config(student: StudentConfig, source: str | Path, task: Task) -> Any:
    """Return the configuration that the student will have, before any of it is made.

    Args:
        source: Folder or Hub name of the model that layers, configuration and tokenizer are copied from.

    Raises:
        UserError: Naming the setting that fits no model.
    """
    if student.path is not None:
        return load_config(student.path, revision=student.revision, key="student.path")
    base = load_config(source, key="student.source")
    if student.config:
        return _changed_config(base, student.config, task)
    choose_layers(student.layers, layer_count(base))
    return base


def student_identity(student: StudentConfig, source: Path | None) -> dict[str, Any]:
    """Return what decides the student's initial weights beside its source and the seed; part of artifacts' keys.

    Args:
        source: Folder that layers and configuration are copied from; None where `student.path` is set.
    """
    if student.path is not None:
        folder = Path(student.path).expanduser()
        return {"given": digest_given(folder)[0] if folder.is_dir() else [student.path, student.revision]}
    assert source is not None
    if student.config:
        return {"config": student.config}
    return {"layers": choose_layers(student.layers, layer_count(load_config(source, key="student.source")))}


def make_student(
    config: StudentConfig, source: Path, task: Task, labels: tuple[str, ...] | None
) -> tuple[PreTrainedModel, Any]:
    """Make the student's initial weights (seed torch first) and its tokenizer.

    Args:
        source: Folder of the arm that layers, configuration and tokenizer are copied from.

    Raises:
        UserError: If the settings fit no model.
    """
    if config.path is not None:
        key = "student.path"
        model = load_model(config.path, task, labels=labels, revision=config.revision, key=key)
        return model, load_tokenizer(config.path, revision=config.revision, key=key)
    tokenizer = load_tokenizer(source, key="student.source")
    if config.config:
        changed = _changed_config(load_config(source, key="student.source"), config.config, task)
        if task is Task.sequence_classification:
            changed.get_text_config().pad_token_id = tokenizer.pad_token_id
        return from_config(changed, task, labels), tokenizer
    return _keep_layers(load_model(source, task, labels=labels, key="student.source"), config.layers), tokenizer


def _changed_config(base: Any, changes: dict[str, Any], task: Task) -> Any:
    """Return `base` with keys changed, tried out on the meta device: it must make a model that runs.

    Raises:
        UserError: If a key is unknown or the values fit no model.
    """
    import torch

    raw = base.to_dict()
    for name, value in changes.items():
        if name in ("model_type", "architectures", "auto_map"):
            raise UserError(
                f"student.config.{name}", "a student is of its source's architecture", "give another as student.path"
            )
        if not hasattr(base, name):
            raise UserError(f"student.config.{name}", f"{type(base).__name__} has no such key", "check its name")
        if name in LAYER_COUNT_KEYS:
            raw.pop("layer_types", None)  # one a layer; made anew from the other keys
            if isinstance(value, int) and value < 1:
                raise UserError(f"student.config.{name}", f"{value} is no number of layers", "give at least 1")
    try:
        config = type(base).from_dict({**raw, **changes})
        with torch.device("meta"):
            ids = torch.zeros(1, 2, dtype=torch.long)
            auto_class(task).from_config(config)(input_ids=ids)
    except (*load_errors(), TypeError, RuntimeError, ArithmeticError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            "student.config", f"{changes} makes no {type(base).__name__} that runs ({text})", "change a value"
        ) from error
    return config


def _keep_layers(model: PreTrainedModel, spec: Any) -> PreTrainedModel:
    """Cut `model` down to the chosen layers, in place of a copy: the source lies on disk."""
    chosen = choose_layers(spec, layer_count(model.config))
    return _rearrange(model, chosen, "student.layers")


def stack_layers(model: PreTrainedModel, times: int, key: str) -> None:
    """Grow `model`, in place, to `times` its depth: all its layers, and copies of them on top.

    Raises:
        UserError: If it has no one stack of layers.

    Source: Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking", PMLR 97, section 4; for language
    models Du et al. 2024, arXiv 2405.15319, where this way of growing did best.
    """
    have = layer_count(model.config)
    _rearrange(model, [at % have for at in range(times * have)], key)


def _rearrange(model: PreTrainedModel, chosen: list[int], key: str) -> PreTrainedModel:
    """Give `model` the layers that are named, in order; one that is named again is a copy."""
    import copy

    import torch

    total = layer_count(model.config)
    lists = layer_stacks(model, total)
    if len(lists) != 1:
        raise UserError(key, f"{type(model).__name__} has {len(lists)} stacks of {total} layers", "give student.path")
    parent, name, layers = lists[0]
    taken: Any = layers
    fresh = [copy.deepcopy(taken[at]) if at in chosen[:place] else taken[at] for place, at in enumerate(chosen)]
    setattr(parent, name, torch.nn.ModuleList(fresh))
    for index, layer in enumerate(fresh):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the key-value cache is addressed by it
                module.layer_idx = index
    for count_key in LAYER_COUNT_KEYS:
        if isinstance(getattr(model.config, count_key, None), int):
            setattr(model.config, count_key, len(chosen))
    if isinstance(getattr(model.config, "layer_types", None), list):
        model.config.layer_types = [model.config.layer_types[index] for index in chosen]
    with torch.device("meta"):
        rebuilt = set(type(model)(model.config).state_dict())
    if odd := rebuilt ^ set(model.state_dict()):  # ModernBERT's first layer lacks a norm, for one
        raise UserError(
            key, f"{chosen} put a layer where its architecture wants another kind ({min(odd)})",
            "give a list that keeps layer 0 first, or student.path",
        )  # fmt: skip
    return model
