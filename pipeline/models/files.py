"""The files of a model that become an artifact: whole, and none that could run code."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.models.load import check_model_folder, load_tokenizer
from pipeline.store.artifacts import MANIFEST, read_json
from pipeline.store.file_names import HUB_FILES, PICKLE_WEIGHTS

INDEX = "model.safetensors.index.json"


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model, none that could run code.

    Raises:
        UserError: Without safetensors weights, all of them, or without a tokenizer.
    """
    check_model_folder(folder, "path")
    index = read_json(folder / INDEX)
    if (folder / INDEX).exists():
        parts = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
            raise UserError("path", f"{folder / INDEX} names no files", "save the model again")
        absent = sorted(set(parts.values()) - {path.name for path in folder.iterdir()})
        if absent:
            raise UserError(
                "path", f"{folder} lacks {absent[0]}, which {INDEX} names", "copy the whole folder"
            )
    for path in sorted(folder.glob("*.safetensors")):
        _check_whole(path)
    load_tokenizer(folder, key="path")
    return sorted(
        {
            path
            for pattern in HUB_FILES
            for path in folder.glob(pattern)
            if path.is_file() and path.name not in (MANIFEST, *PICKLE_WEIGHTS)
        }
    )


def _check_whole(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            "path", f"{path} is no whole safetensors file ({error})", "save the model again"
        ) from None
