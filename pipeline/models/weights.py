"""What a model folder's weights hold, beside what its class takes of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.models.heads import no_head
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Buffers that older versions of transformers stored, and that every version computes from the
# configuration.
_COMPUTED = re.compile(
    r"(rotary_emb\.inv_freq|(^|\.)position_ids|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)$"
)
_OTHER_TASKS = (
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForNextSentencePrediction",
    "AutoModelForMultipleChoice",
    "AutoModelForImageTextToText",
)
SHOWN = 3  # names of a note


def refuse_incomplete(
    model: Any,
    info: dict[str, Any],
    task: Task,
    key: str,
    path: object,
    *,
    new_head: bool,
    brought: Collection[str] = (),
) -> str | None:
    """Refuse weights that transformers would replace by random ones; a classifier's head and pooler
    may be new.

    Args:
        brought: Names of the weights that an adapter brings, and that its base may lack.

    Returns:
        What of the head is new; None where nothing is.

    Raises:
        UserError: Naming a weight that is not there.
    """
    gone = {str(name) for name in info["missing_keys"]} | {
        str(entry[0]) for entry in info["mismatched_keys"]
    }
    gone -= set(brought)
    body = f"{model.base_model_prefix}."
    lacking = {name for name in gone if name.startswith(body) and "pooler" not in name}
    lacking = lacking if task.kind.labelled else gone
    named = next(iter(model.config.architectures or []), None)
    has_one = named is None or named.endswith(task.kind.heads)  # says so, and lacks it: damaged
    if lacking and not has_one and not any(name.startswith(body) for name in lacking):
        raise UserError(key, no_head(named, task, path), task.kind.remedy)
    if lacking:
        first = min(lacking)
        problem = (
            f"the weights in {path} lack {first} in its right shape ({len(lacking)} of the model's"
            " are not there)"
        )
        raise UserError(key, problem, "give a whole model, of a class that fits the task")
    if gone and not new_head:
        problem = (
            f"{path} has no classification head for these classes, and 0 steps would leave it"
            " random"
        )
        raise UserError(key, problem, "give a fine-tuned classifier, or train it: steps above 0")
    return min(gone, default=None)


def refuse_unexpected(
    model: Any, config: Any, unexpected: Iterable[str], task: Task, key: str, path: object
) -> str | None:
    """Refuse weights that the model's class has no place for: without them it would be another
    model.

    Heads of other tasks, and what reads images, are left out, as loading for a task always does.

    Args:
        config: Of the folder; a language model may have taken a part of it.

    Returns:
        A note of what is left out; None where nothing is.

    Raises:
        UserError: Naming a weight.
    """
    names = {str(name) for name in unexpected if not _COMPUTED.search(str(name))}
    if not names:
        return None
    strange = {name for name in names if task.kind.is_language or _is_of_this_model(name, model)}
    strange = strange and strange - _of_other_tasks(config)
    if strange:
        kind = type(model).__name__
        problem = (
            f"{path} has weights that {kind} has no place for: {min(strange)} ({len(strange)} in"
            " all)"
        )
        raise UserError(
            key, problem, "give the configuration that they were trained with, or leave them out"
        )
    shown = sorted(names)[:SHOWN]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{key}: weights of other tasks are left out: {', '.join(shown)}{more}"


def _is_of_this_model(name: str, model: Any) -> bool:
    """Whether a weight is named as one of the body's (with or without its prefix) or of the model's
    own head.
    """
    first = name.partition(".")[0]
    own = {child for child, _ in model.named_children()} | {
        child for child, _ in model.base_model.named_children()
    }
    return first in own or first == model.base_model_prefix


def _of_other_tasks(config: Any) -> set[str]:
    """Return the names of all weights that models of this configuration have for any task."""
    import copy

    import torch
    import transformers

    found = set[str]()
    for name in _OTHER_TASKS:
        kind: Any = getattr(transformers, name)
        if type(config) not in kind._model_mapping:
            continue
        with torch.device("meta"):
            other = kind.from_config(copy.deepcopy(config))
        own = other.base_model_prefix if name == "AutoModel" else ""
        weights = list(other.state_dict())
        found |= {*weights, *(f"{own}.{weight}" for weight in weights if own)}
    return found


def name_body(model: Any) -> None:
    """Have `base_model` give a model's body: Llama 4's text model names it as only the multimodal
    model has it.
    """
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"


def keep_attention(model: Any) -> None:
    """Have a model that changes its attention for a short text (BigBird) read the next one as it is
    configured.

    It would keep the changed one, so that what it says of a text depended on those that it had read
    before.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if hasattr(module, "set_attention_type") and not any(
            name.startswith(f"{outer}.") for outer in found
        ):
            found.append(name)
            module.register_forward_pre_hook(partial(_restore_attention, module.attention_type))


def _restore_attention(kind: Any, module: Any, _inputs: Any) -> None:
    if module.attention_type != kind:
        module.set_attention_type(kind)


def first_not_finite(model: Any) -> str | None:
    """Return the name of a weight that holds a NaN or an infinity; None where all are numbers."""
    import torch

    for name, tensor in model.state_dict().items():
        plain = (
            type(tensor) is torch.Tensor
            and tensor.is_floating_point()
            and tensor.element_size() > 1
        )
        if plain and tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
            return str(name)
    return None


def refuse_not_finite(model: Any, key: str, path: object) -> None:
    """Refuse weights that no training could mend.

    Raises:
        UserError: Naming the weight.
    """
    name = first_not_finite(model)
    if name is not None:
        raise UserError(
            key, f"{path}: {name} holds values that are not finite", "restore its weights"
        )


def check_finite(folder: Path, key: str) -> None:
    """Refuse a folder whose weights are not all finite; they are read one by one.

    Raises:
        UserError: Naming the weight.
    """
    import torch
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                tensor = weights.get_tensor(name)
                wide = tensor.is_floating_point() and tensor.element_size() > 1
                if wide and not bool(torch.isfinite(tensor).all()):
                    raise UserError(
                        key,
                        f"{file}: {name} holds values that are not finite",
                        "restore its weights",
                    )


def renew_head(model: PreTrainedModel) -> None:
    """Give a classifier's head new random weights, as its architecture draws them (seed torch
    first).
    """
    names = head_parameters(model)
    for name in sorted({name.rpartition(".")[0] for name in names}):
        module: Any = model.get_submodule(name)
        for part in (module, *module.parameters(recurse=False)):
            part._is_hf_initialized = False
        model._initialize_weights(module)  # pyright: ignore[reportPrivateUsage]


def head_parameters(model: Any) -> list[str]:
    """Return the names of the parameters whose shape is the number of classes."""
    import copy

    import torch

    config = copy.deepcopy(model.config)
    config.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        wider = type(model)(config)
    shapes = {name: tensor.shape for name, tensor in wider.named_parameters()}
    return [name for name, tensor in model.named_parameters() if shapes[name] != tensor.shape]


def share_as_written(folder: Path) -> None:
    """Give weight files the permissions of the files beside them: safetensors lets nobody else read
    what it writes.
    """
    mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def weights_bytes(folder: Path) -> int:
    """Return the bytes of the weight files (`*.safetensors`) in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
