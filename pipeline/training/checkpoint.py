"""Checkpoints that are whole or not there: a temporary folder, a manifest with checksums last, a rename.

No pickles: weights, optimizer state and generator state are safetensors, the rest is JSON. The learning rate and the
batches are pure functions of the step, so nothing else is needed to go on exactly.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.store import check_room, read_json, write_json

KEEP = 2


def save(folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> None:
    """Write a checkpoint of `step`, then prune all but the newest two.

    Raises:
        UserError: If the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in _unshared(model.state_dict()).items()}
    check_room(folder, 4 * sum(tensor.nbytes for tensor in weights.values()), "tracking.root")
    temporary = folder / f".writing-{uuid.uuid4().hex}"
    temporary.mkdir()
    save_file(weights, temporary / "model.safetensors")
    save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
    save_file(_generator_states(), temporary / "generators.safetensors")
    write_json(temporary / "extra.json", extra)
    sums = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / "manifest.json", {"step": step, "sha256": sums})
    final = folder / f"step-{step:09d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    for old in _folders(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> tuple[Path, int] | None:
    """Return folder and step of the newest checkpoint whose checksums hold, or None."""
    for path in reversed(_folders(folder)):
        manifest = read_json(path / "manifest.json")
        if isinstance(manifest, dict) and all(
            (path / name).is_file() and _sha256(path / name) == total for name, total in manifest["sha256"].items()
        ):
            return path, manifest["step"]
    return None


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights, optimizer and random generators; return what was saved as `extra`."""
    model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    model.tie_weights()
    tensors = load_file(path / "optimizer.safetensors")
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generators = load_file(path / "generators.safetensors")
    torch.set_rng_state(generators["cpu"])
    if "device" in generators:
        torch.cuda.set_rng_state(generators["device"])
    extra = read_json(path / "extra.json")
    assert isinstance(extra, dict), "the manifest vouched for it"
    return extra


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the second name of tied weights; loading ties them again."""
    seen: dict[int, str] = {}
    return {name: t for name, t in state.items() if seen.setdefault(t.data_ptr(), name) == name}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().contiguous().cpu()
        for index, entries in state.items()
        for key, value in entries.items()
    }


def _generator_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["device"] = torch.cuda.get_rng_state()
    return states


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
