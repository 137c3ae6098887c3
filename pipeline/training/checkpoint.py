"""Checkpoints that are whole or not there: a temporary folder, a manifest with checksums last, a
rename.

No pickles: weights, optimizer state and generator state are safetensors, the rest is JSON. The
learning rate and the batches are pure functions of the step, so nothing else is needed to resume
exactly.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.ledger.devices.table import device_of
from pipeline.ledger.shapes import TrainingState
from pipeline.store.artifacts import check_room, read_json, sync_path, write_json
from pipeline.training.optimizer import load_state, state_tensors

# Where the newest is damaged, the one before it still resumes the run.
KEEP = 2
FILES = {"model.safetensors", "optimizer.safetensors", "generators.safetensors", "extra.json"}


class TrainedPart:
    """The parameters of a model that are trained, as checkpoints keep them: the frozen ones are
    made anew.
    """

    def __init__(self, model: Any) -> None:
        self._trained = {
            name: each for name, each in model.named_parameters() if each.requires_grad
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the parameters by name, each in its own dtype and shape, without a copy."""
        return {name: each.detach() for name, each in self._trained.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor], *, strict: bool) -> None:
        """Take the parameters over, in place; `load` has compared their names."""
        with torch.no_grad():
            for name, value in state.items():
                self._trained[name].copy_(value)

    def tie_weights(self) -> None:
        """Do nothing: what is tied is one parameter here."""


def kept_of(model: Any) -> Any:
    """Return what a checkpoint holds of a model: all of it, or its trained part where some of it is
    frozen.
    """
    return model if all(each.requires_grad for each in model.parameters()) else TrainedPart(model)


@dataclass(frozen=True, slots=True)
class Tensors:
    """All that a checkpoint holds in tensors, on the host, by name."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    generators: dict[str, torch.Tensor]


def tensors_of(model: Any, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the tensors of now. Where ranks share them, each has to ask."""
    weights = {
        name: tensor.detach().contiguous().cpu()
        for name, tensor in _unshared(model.state_dict()).items()
    }
    return Tensors(weights, _optimizer_tensors(optimizer), _generator_states(_device_of(model)))


def save(folder: Path, step: int, tensors: Tensors, extra: Callable[[], Mapping[str, Any]]) -> None:
    """Write a checkpoint of `step`, then prune all but the newest two.

    Args:
        extra: Gives plain JSON, asked for after the tensors were written: what it says of time
            spent covers them.

    Raises:
        UserError: If the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".writing-*"):  # by a killed process: only one at a time trains a stage
        shutil.rmtree(left, ignore_errors=True)
    # Weights and AdamW's two moments, each as large as they are, and one more to spare.
    check_room(folder, 4 * sum(each.nbytes for each in tensors.model.values()), "tracking.root")
    temporary = folder / f".writing-{uuid.uuid4().hex}"
    temporary.mkdir()
    save_file(tensors.model, temporary / "model.safetensors")
    save_file(tensors.optimizer, temporary / "optimizer.safetensors")
    save_file(tensors.generators, temporary / "generators.safetensors")
    sums = {path.name: _seal(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / "extra.json", extra())
    # The manifest comes last: a folder without it is no checkpoint.
    sums["extra.json"] = _seal(temporary / "extra.json")
    write_json(temporary / "manifest.json", {"step": step, "sha256": sums})
    sync_path(temporary)
    final = folder / f"step-{step:09d}"
    # A damaged checkpoint of this step may stand there, and a rename replaces no full folder.
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    # A rename is durable only when the folder that names it is.
    sync_path(folder)
    for old in _folders(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path, say: Callable[[str], None] = lambda _: None) -> tuple[Path, int] | None:
    """Return folder and step of the newest checkpoint whose checksums hold, or None; `say` gets
    of damaged ones.
    """
    for path in reversed(_folders(folder)):
        damage = _damage(path)
        if damage is None:
            return path, _step(path)
        say(f"checkpoint of step {_step(path)} is damaged ({damage}) and passed over")
    return None


def _damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("step") != _step(path):
        return "manifest.json is not whole"
    sums: Any = manifest.get("sha256")
    if not isinstance(sums, dict) or set(sums) != FILES:
        return "manifest.json is not whole"
    for name in sorted(FILES):
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != sums[name]:
            return f"{name} does not have its checksum"
    return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Restore weights, optimizer and random generators; return what was saved as `extra`."""
    # Before the weights: making the optimizer's state takes a step, and that decays the weights.
    load_state(optimizer, load_file(path / "optimizer.safetensors"))
    saved = load_file(path / "model.safetensors")
    assert saved.keys() == _unshared(model.state_dict()).keys(), (
        "a checkpoint is read by the stage that wrote it"
    )
    model.load_state_dict(saved, strict=False)  # tied weights were saved once
    model.tie_weights()
    generators = load_file(path / "generators.safetensors")
    torch.set_rng_state(generators["cpu"])
    device = _device_of(model)
    if "device" in generators and device is not None:
        device_of(device).set_generator_state(generators["device"])
    extra = read_json(path / "extra.json")
    assert extra is not None, "the manifest vouched for it"
    return extra


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the second name of tied weights; loading ties them again."""
    # Tied weights share their memory, and so their address.
    seen: dict[int, str] = {}
    return {name: t for name, t in state.items() if seen.setdefault(t.data_ptr(), name) == name}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state_tensors(optimizer).items():
        there = tensor.contiguous().cpu()
        # Levels of 8 bits are one tensor for all parameters, which safetensors does not write
        # twice.
        tensors[name] = there.clone() if there.data_ptr() in seen else there
        seen.add(there.data_ptr())
    return tensors


def _device_of(model: Any) -> torch.device | None:
    """Return the device that a model is on and that has a generator of its own; None elsewhere."""
    on = (tensor.device for tensor in model.state_dict().values())
    return next((device for device in on if device_of(device).generators()), None)


def _generator_states(device: torch.device | None) -> dict[str, torch.Tensor]:
    """Return the states of the generators that a training draws from: the CPU's, and its own
    device's.
    """
    states = {"cpu": torch.get_rng_state()}
    own = None if device is None else device_of(device).generator_state()
    if own is not None:
        states["device"] = own
    return states


def _folders(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder` by step, whole or not."""
    return sorted(
        (path for path in folder.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()),
        key=_step,
    )


def _seal(path: Path) -> str:
    """Have the disk hold a file; return its checksum."""
    sync_path(path)
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
