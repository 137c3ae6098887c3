"""Checkpoints that are whole or not there: a temporary folder, a manifest with checksums last, a
rename.

No pickles: weights, optimizer state and generator state are safetensors, the rest is JSON. The
learning rate and the batches are pure functions of the step, so nothing else is needed to resume
exactly.

One process writes its tensors itself. Several write theirs at once, each the share that it holds,
through torch.distributed.checkpoint into safetensors, which another number of ranks, or one
process, reads as well: what a share is of stands in the header of its file. (To import that takes
more than half as long as to import torch: one process does without.)
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import StageFailed, UserError, one_line
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.shapes import TrainingState
from pipeline.store.artifacts import check_room, read_json, sync_path, write_json
from pipeline.training.optimizer import (
    MasterWeights,
    cut_otherwise,
    make_state,
    put_together,
    restore_numbers,
    state_tensors,
)
from pipeline.training.ranks import ALONE, Ranks
from pipeline.training.shares import is_shared

# Where the newest is damaged, the one before it still resumes the run.
KEEP = 2
PARTS = ("model", "optimizer", "generators")
"""What names of tensors begin with; one process has a file of each."""
EXTRA = "extra.json"
FORMAT = 2  # of names and files; what another release wrote otherwise is passed over
FAILURES = 3  # ranks whose reasons are told


def trained_part(model: Any) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model, without a copy, by name: all of it, or the trained
    parameters alone where some are frozen, which are made anew. What is tied is there once.
    """
    if isinstance(model, MasterWeights):
        return model.by_name()
    own = dict(model.named_parameters())
    trained = {name: each.detach() for name, each in own.items() if each.requires_grad}
    return trained if len(trained) < len(own) else {**trained, **_buffers(model)}


def _buffers(model: Any) -> dict[str, Tensor]:
    """Return the buffers that a model is saved with."""
    kept = model.state_dict().keys()
    return {name: each for name, each in model.named_buffers() if name in kept}


def state_of(
    model: Any, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE
) -> dict[str, Tensor]:
    """Return all that a checkpoint holds in tensors, by name, without a copy: what is read into
    them is restored, but for numbers and generators.
    """
    state = {f"model.{name}": each for name, each in trained_part(model).items()}
    state |= {f"optimizer.{name}": each for name, each in state_tensors(optimizer).items()}
    if ranks.is_first:  # several draw by step and rank
        generators = _generator_states(_device_of(model))
        state |= {f"generators.{name}": each for name, each in generators.items()}
    return state


def save(
    folder: Path,
    step: int,
    state: dict[str, Tensor],
    extra: Callable[[], Mapping[str, Any]],
    ranks: Ranks = ALONE,
) -> None:
    """Write a checkpoint of `step`, then prune all but the newest two. Every rank calls it.

    Args:
        extra: Gives plain JSON, asked for after the tensors were written: what it says of time
            spent covers them. The first rank's counts.

    Raises:
        UserError: If the disk has no room for it.
        StageFailed: If a rank cannot write its share.
    """
    temporary = _begun_by_first(folder, state, ranks)
    files = _written(temporary, state, ranks)
    _complete(folder, temporary, step, files, extra, ranks)


class Beside:
    """A checkpoint that a thread writes while the training goes on, from a copy on the host.

    Args:
        extra: What belongs to this moment, as `save` has it.

    Raises:
        UserError: If the disk has no room for it.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        state: dict[str, Tensor],
        extra: Mapping[str, Any],
        ranks: Ranks = ALONE,
    ) -> None:
        self.step = step
        self._folder, self._extra, self._ranks = folder, extra, ranks
        self._temporary = _begun_by_first(folder, state, ranks)
        copy = _copied(self._temporary, state, ranks)
        pool = ThreadPoolExecutor(1, "checkpoint")
        self._files = pool.submit(_written, self._temporary, copy, ranks)
        pool.shutdown(wait=False)

    @property
    def is_done(self) -> bool:
        """Whether this rank's share is written, or has failed to be."""
        return self._files.done()

    def wait(self) -> None:
        """Wait until nothing writes any more, whatever became of it."""
        self._files.exception()

    def complete(self) -> None:
        """Wait until all shares are written, and name the checkpoint. Every rank calls it.

        Raises:
            StageFailed: If a rank could not write its share.
        """
        files = self._files.result()
        _complete(self._folder, self._temporary, self.step, files, lambda: self._extra, self._ranks)


def _begun_by_first(folder: Path, state: dict[str, Tensor], ranks: Ranks) -> Path:
    """Return a new folder to write into, that all ranks see.

    Raises:
        UserError: If the disk has no room for it.
    """
    temporary: Path = ranks.told(_begun(folder) if ranks.is_first else None)
    # Weights and AdamW's two moments, each as large as they are, and one more to spare.
    weights = sum(each.nbytes for name, each in state.items() if name.startswith("model."))
    refused = ranks.told(_why_no_room(folder, 4 * weights) if ranks.is_first else None)
    if refused is not None:
        raise refused
    return temporary


def _written(folder: Path, state: dict[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Write this rank's share of the tensors; return the checksums of its files by name."""
    if ranks.several:
        _write_share(folder, state, ranks)
    else:
        _write_all(folder, state)
    own = f"shard-{ranks.rank + 1:05d}-*" if ranks.several else "*"
    return {path.name: _seal(path) for path in sorted(folder.glob(own))}


def _complete(
    folder: Path,
    temporary: Path,
    step: int,
    files: dict[str, str],
    extra: Callable[[], Mapping[str, Any]],
    ranks: Ranks,
) -> None:
    """Have the first rank complete what all have written."""
    sealed = ranks.gathered(files)
    if ranks.is_first:
        sums = {name: each for some in sealed for name, each in some.items()}
        _finish(folder, temporary, step, sums, extra())
    ranks.told()  # no other finds it before it is there


def _copied(folder: Path, state: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return a copy of this rank's share of the tensors on the host."""
    if not ranks.several:
        return {name: each.detach().to("cpu", copy=True) for name, each in state.items()}
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    return HuggingFaceStorageWriter(f"{folder}").stage(state)


def _begun(folder: Path) -> Path:
    """Return a new folder to write into."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".writing-*"):  # by a killed process: only one at a time trains a stage
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder / f".writing-{uuid.uuid4().hex}"
    temporary.mkdir()
    return temporary


def _why_no_room(folder: Path, num_bytes: int) -> UserError | None:
    try:
        check_room(folder, num_bytes, "tracking.root")
    except UserError as error:
        return error
    return None


def _write_all(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the tensors of one process."""
    for part in PARTS:
        start = f"{part}."
        own = {name: each for name, each in state.items() if name.startswith(start)}
        there = {name: each.contiguous().cpu() for name, each in own.items()}
        save_file(_apart(there), folder / f"{part}.safetensors")


def _write_share(folder: Path, state: dict[str, Tensor], ranks: Ranks) -> None:
    """Write this rank's share of the tensors; what all have is shared out among them."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(f"{folder}", save_distributed=True)
    with _failing_as("written"):
        save(_apart(state), storage_writer=writer, process_group=ranks.files)


def _finish(
    folder: Path, temporary: Path, step: int, sums: dict[str, str], extra: Mapping[str, Any]
) -> None:
    """Complete a checkpoint, give it its name, and drop old ones."""
    write_json(temporary / EXTRA, extra)
    # The manifest comes last: a folder without it is no checkpoint.
    sums = {**sums, EXTRA: _seal(temporary / EXTRA)}
    write_json(temporary / "manifest.json", {"step": step, "format": FORMAT, "sha256": sums})
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
    if manifest.get("format") != FORMAT:
        return "another release wrote it"
    sums: Any = manifest.get("sha256")
    tensors = [] if not isinstance(sums, dict) else [name for name in sums if name != EXTRA]
    if not tensors or EXTRA not in sums:
        return "manifest.json is not whole"
    for name in sorted(sums):
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != sums[name]:
            return f"{name} does not have its checksum"
    return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load(
    path: Path, model: Any, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE
) -> TrainingState:
    """Restore weights, optimizer and random generators; return what was saved as `extra`. Every
    rank calls it, and as many as there are now.
    """
    # Before the weights: making the optimizer's state takes a step, and that decays the weights.
    make_state(optimizer)
    wanted = state_of(model, optimizer)
    if ranks.several or not (path / "model.safetensors").is_file():
        _read_shares(path, wanted, optimizer)
    else:
        saved = {k: v for part in PARTS for k, v in load_file(path / f"{part}.safetensors").items()}
        assert _of(saved, "model") == _of(wanted, "model"), "read by the stage that wrote it"
        with torch.no_grad():
            for name in saved.keys() & wanted.keys():
                wanted[name].copy_(saved[name])
    restore_numbers(optimizer, wanted, "optimizer.")
    if isinstance(model, MasterWeights):
        model.write_back()
    torch.set_rng_state(wanted["generators.cpu"])
    device = _device_of(model)
    if "generators.device" in wanted and device is not None:
        device_of(device).set_generator_state(wanted["generators.device"])
    extra = read_json(path / EXTRA)
    assert extra is not None, "the manifest vouched for it"
    return extra


def _read_shares(path: Path, wanted: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Fill tensors, in place, from what several ranks wrote, or where several are to read it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    there = HuggingFaceStorageReader(f"{path}").read_metadata().state_dict_metadata
    assert _of(there, "model") == _of(wanted, "model"), "read by the stage that wrote it"

    def fill(tensors: dict[str, Tensor]) -> None:
        with _failing_as("read"):  # each rank for itself: all see the same files
            reader = HuggingFaceStorageReader(f"{path}")
            load(tensors, storage_reader=reader, no_dist=True)

    fill({name: each for name, each in wanted.items() if name in there})
    for moment, names in cut_otherwise(optimizer, there, "optimizer."):
        known: Any = {name: there[name] for name in names}
        pieces = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in known.items()}
        fill(pieces)
        put_together(moment, pieces)


@contextmanager
def _failing_as(verb: str) -> Generator[None]:
    """Have what torch.distributed.checkpoint raises be a failure of the stage, on all ranks.

    Raises:
        StageFailed: With what the first ranks said.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # that one rank alone reads is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        found = sorted(error.failures.items())[:FAILURES]
        said = "; ".join(f"rank {rank}: {one_line(why, 120)}" for rank, (why, _) in found)
        raise StageFailed(f"a checkpoint could not be {verb} ({said})") from None


def _of(names: Iterable[str], part: str) -> set[str]:
    return {name for name in names if name.startswith(f"{part}.")}


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory: levels of 8 bits are one tensor for all parameters,
    which safetensors does not write twice.
    """
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, each in state.items():
        place = 0 if is_shared(each) or not each.numel() else each.data_ptr()
        found[name] = each.clone() if place in seen else each
        seen |= {place} - {0}
    return found


def _device_of(model: Any) -> torch.device | None:
    """Return the device that a model is on and that has a generator of its own; None elsewhere."""
    on = (tensor.device for tensor in trained_part(model).values())
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
