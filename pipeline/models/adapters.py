"""Adapters of peft (LoRA and its kin): merged into the model that they adapt, because a stage takes
whole models.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.ties import part_ties
from pipeline.models.vocabulary import probe

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."  # that peft puts before the names of a base
MERGED_WITHIN = 1e-4  # of the largest logit: fp32 rounds a sum of weights to some 1e-6


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, alone or beside the model that it adapts."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / WEIGHTS).is_file()


def base_of(folder: Path, key: str) -> Path:
    """Return the folder of the model that an adapter adapts: its own, or the one that it names.

    Raises:
        UserError: If that is not at hand.
    """
    if (folder / "config.json").is_file():
        return folder
    try:
        named = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            key, f"{folder / CONFIG} names no base model ({error})", "restore the file"
        ) from None
    base = Path(str(named)).expanduser()
    for place in (base, folder / base):
        if place.is_dir():
            return place
    problem = f"{folder} is an adapter of {named}, which is no folder here"
    raise UserError(key, problem, "merge it into its base (peft's merge_and_unload) and give that")


@contextmanager
def without_adapter(folder: Path) -> Generator[Path]:
    """Give a view of a folder in which transformers sees no adapter: it would load it, and save
    nothing else.
    """
    if not (folder / CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="whole.") as view:
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                (Path(view) / file.name).symlink_to(file.resolve())
        yield Path(view)


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's weights by name; one that replaces a weight of the base has
    that one's name.
    """
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        names: list[str] = weights.keys()
        return {
            name.removeprefix(PREFIX): tuple(weights.get_slice(name).get_shape()) for name in names
        }


def merge(model: Any, folder: Path, key: str, *, renewed: Collection[str] = ()) -> Any:
    """Return `model` with the adapter in `folder` merged into its weights; on the meta device, seen
    to fit it.

    Weights that the base ties are parted where the adapter changes one of them.

    Args:
        renewed: Names of weights that may have other shapes in the adapter, because they are made
            anew: a head.

    Raises:
        UserError: If peft is not installed, the adapter does not fit the model, or the two cannot
            be one model.
    """
    if find_spec("peft") is None:
        raise UserError(
            key, f"{folder} is an adapter, and peft is not installed", "pip install -e '.[quant]'"
        )

    if model.device.type == "meta":
        with _fitting(folder, key):
            _refuse_other_names(_laid_in(model, folder), folder, key, renewed=renewed)
        return model
    from peft import PeftModel

    with _fitting(folder, key):
        adapted: Any = PeftModel.from_pretrained(
            model, folder, ignore_mismatched_sizes=bool(renewed)
        )
        _refuse_other_names(adapted, folder, key, renewed=renewed)
        return _merged(adapted, folder, key)


@contextmanager
def _fitting(folder: Path, key: str) -> Generator[None]:
    """Turn what peft raises for an adapter of another base into one line.

    Raises:
        UserError: Naming the folder.
    """
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            # of what is missing, renamed or tied: all is looked at here
            warnings.simplefilter("ignore", UserWarning)
            yield
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        AttributeError,
        ImportError,
        SafetensorError,
    ) as error:
        text = " ".join(str(error).split())[:240]
        raise UserError(
            key,
            f"the adapter in {folder} does not fit its base ({text})",
            "give the two that belong together",
        ) from error


def _laid_in(model: Any, folder: Path) -> Any:
    """Return a model on the meta device with the places of an adapter in it: numbers cannot be
    loaded there.
    """
    from peft import PeftConfig, get_peft_model

    config: Any = PeftConfig.from_pretrained(str(folder))
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some are computed from the base's numbers
    return get_peft_model(model, config, low_cpu_mem_usage=True)


def _refuse_other_names(adapted: Any, folder: Path, key: str, *, renewed: Collection[str]) -> None:
    """Refuse an adapter that is none to be merged, or has other weights than its settings say of
    this base.

    peft fills what is missing with new weights, and leaves out what it does not know.

    Raises:
        UserError: Naming a weight.
    """
    from peft import get_peft_model_state_dict

    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind: Any = adapted.active_peft_config.peft_type
        problem = (
            f"{folder} is an adapter of kind {getattr(kind, 'value', kind)}, which is no change of"
            " weights"
        )
        raise UserError(key, problem, "give one that can be merged (LoRA and its kin)")
    wanted, allowed = (
        {str(name).removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in found.items()}
        for found in (
            get_peft_model_state_dict(adapted, save_embedding_layers=more) for more in (False, True)
        )
    )
    there, file = shapes_in(folder), folder / WEIGHTS
    lacking = {
        name
        for name, shape in wanted.items()
        if there.get(name, ()) != shape and name not in renewed
    }
    strange = there.keys() - allowed.keys()
    if lacking:
        problem = (
            f"{file} lacks {min(lacking)} in its right shape ({len(lacking)} of the adapter's are"
            " not there)"
        )
        raise UserError(key, problem, "give the whole adapter, and the base that it was trained on")
    if strange:
        problem = (
            f"{file} has weights that its base has no place for: {min(strange)} ({len(strange)} in"
            " all)"
        )
        raise UserError(key, problem, "give the base that it was trained on")


def _merged(adapted: Any, folder: Path, key: str) -> Any:
    """Return the model that an adapter and its base are, as one of plain weights that gives the
    same logits.

    Raises:
        UserError: If it gives others.
    """
    import torch

    base = adapted.get_base_model()
    before = _logits(base)
    _part_adapted(base)
    merged: Any = adapted.merge_and_unload()
    part_ties(merged)
    after = _logits(merged)
    off, scale = float((before - after).abs().max()), float(before.abs().max())
    if not off <= max(MERGED_WITHIN, 8 * torch.finfo(merged.dtype).eps) * scale:
        problem = (
            f"the adapter in {folder} cannot be merged: logits of up to {scale:.2g} change by"
            f" {off:.2g}"
        )
        raise UserError(
            key,
            problem,
            "give an adapter of unquantized weights, or the merged model that you trust",
        )
    return merged


def _logits(model: Any) -> Any:
    """Return what a model says of a few tokens, in fp32."""
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=probe(model).to(model.device)).logits.float()


def _part_adapted(model: Any) -> None:
    """Give each adapted module whose weight others share a copy of its own: merging writes into the
    weight.

    An adapter of a tied head changes the head alone, one of a tied embedding the embedding alone.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    seen = set[int]()
    modules = list(model.modules())
    bases = {
        id(module.get_base_layer()) for module in modules if isinstance(module, BaseTunerLayer)
    }
    owners: list[Any] = [
        module for module in modules if module._parameters.get("weight") is not None
    ]
    shared = [
        weight
        for weight, count in Counter(id(module.weight) for module in owners).items()
        if count > 1
    ]
    adapted = {id(module.weight) for module in owners if id(module) in bases}
    for module in owners:
        weight = module.weight
        if id(weight) not in shared or id(weight) not in adapted:
            continue
        if id(weight) in seen:
            module.weight = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
        seen.add(id(weight))
