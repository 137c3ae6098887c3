"""Adapters of peft (LoRA and its kin): merged into the model that they adapt, because a stage takes whole models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


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
        raise UserError(key, f"{folder / CONFIG} names no base model ({error})", "restore the file") from None
    base = Path(str(named)).expanduser()
    for place in (base, folder / base):
        if place.is_dir():
            return place
    problem = f"{folder} is an adapter of {named}, which is no folder here"
    raise UserError(key, problem, "merge it into its base (peft's merge_and_unload) and give that")


@contextmanager
def without_adapter(folder: Path) -> Generator[Path]:
    """Give a view of a folder in which transformers sees no adapter: it would load it, and save nothing else."""
    if not (folder / CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="whole.") as view:
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                (Path(view) / file.name).symlink_to(file.resolve())
        yield Path(view)


def merge(model: Any, folder: Path, key: str) -> Any:
    """Return `model` with the adapter in `folder` merged into its weights.

    Raises:
        UserError: If peft is not installed, or the adapter does not fit the model.
    """
    if find_spec("peft") is None:
        raise UserError(key, f"{folder} is an adapter, and peft is not installed", "pip install -e '.[quant]'")
    from peft import PeftModel

    try:
        adapted: Any = PeftModel.from_pretrained(model, folder)
        return adapted.merge_and_unload()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        text = " ".join(str(error).split())[:240]
        raise UserError(key, f"the adapter in {folder} does not fit its base ({text})", "give the two that belong "
                        "together") from error  # fmt: skip
