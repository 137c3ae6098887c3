"""The artifact `base`: the model of `model.*`, given as a folder or Hub name, or made on the
spot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.settings.model import ModelConfig
from pipeline.config.settings.run import Run
from pipeline.data.documents import Dataset
from pipeline.ledger.phases import PhaseClock
from pipeline.models.adapters import CONFIG as ADAPTER
from pipeline.runs.versions import versions
from pipeline.store.artifacts import Artifact, Store, copy_model, digest_given, key_of
from pipeline.store.file_names import HUB_FILES
from pipeline.store.waiting import waiting_for
from pipeline.tasks.table import Task


def base_artifact(run: Run, data: Dataset, seed: int, store: Store, clock: PhaseClock) -> Artifact:
    """Return the given model where it lies, or the tiny model of `model.shape`, made and committed
    once per seed.

    What an adapter and its base make, or the language part of a multimodal model, is committed as a
    model of its own.

    Raises:
        UserError: If the given model cannot be had.
    """
    if run.model.path is not None:
        with clock.phase("prepare"):
            folder = _given(run.model.path, run.model)
        if is_remade(folder, run.task):
            return _remade(folder, run, store, clock)
        with clock.phase("prepare"):
            digest, num_bytes = digest_given(folder)
        return Artifact(folder.resolve(), "model", digest, num_bytes)
    return _tiny(run, data, seed, store, clock)


def _tiny(run: Run, data: Dataset, seed: int, store: Store, clock: PhaseClock) -> Artifact:
    import torch

    from pipeline.data.tokenizer import embedded_tokenizer
    from pipeline.models.load import make_tiny, save_model

    key = key_of(
        what="base",
        version=2,
        shape=run.model.shape,
        data=data.digest,
        seed=seed,
        task=run.task,
        vocabulary=run.data.vocabulary_size,
        libraries=versions(),
    )
    with clock.phase("prepare"), store.lock(key):
        record = store.recall("keys", key)
        if record is not None and (known := record.get("artifact")) is not None:
            return Artifact.from_json(known)
        with store.scratch() as out:
            tokenizer = embedded_tokenizer(
                data.splits["train"], run.data.vocabulary_size, store.root / "tokenizers"
            )
            # Right before the weights are drawn, so that nothing drawn before changes them.
            torch.manual_seed(seed)
            model = make_tiny(run.model.shape, len(tokenizer), run.task, data.labels, tokenizer)
            save_model(model, tokenizer, out)
            artifact = store.commit(out, "model", {"arm": "base", "seed": seed})
        store.remember("keys", key, {"artifact": artifact.to_json()})
    return artifact


def is_remade(folder: Path, task: Task) -> bool:
    """Whether a local folder is no plain model for the task: an adapter is in it, or more than a
    language model.
    """
    if (folder / ADAPTER).is_file():
        return True
    from pipeline.models.load import is_taken_in_part, load_config

    return task.kind.is_language and folder.is_dir() and is_taken_in_part(load_config(folder), task)


def _remade(folder: Path, run: Run, store: Store, clock: PhaseClock) -> Artifact:
    """Return the plain model that a folder stands for, made once per content."""
    from pipeline.models.adapters import base_of, is_adapter
    from pipeline.models.load import load_config, load_model, load_tokenizer, save_model

    adapter = is_adapter(folder)
    whole = base_of(folder, "model.path") if adapter else folder
    key = key_of(
        what="remade",
        version=2,
        given=digest_given(folder)[0],
        base=digest_given(whole)[0],
        task=run.task,
    )
    with clock.phase("prepare"), store.lock(key):
        record = store.recall("keys", key)
        if record is not None and (known := record.get("artifact")) is not None:
            return Artifact.from_json(known)
        with store.scratch() as out:
            if adapter or not (folder / ADAPTER).is_file():
                model: Any = load_model(folder, run.task)
                save_model(
                    model.to(load_config(folder).dtype or model.dtype), load_tokenizer(folder), out
                )
            else:  # what is left of one that was merged
                copy_model(folder, out)
                (out / ADAPTER).unlink()
            artifact = store.commit(out, "model", {"arm": "base", "made_from": folder.name})
        store.remember("keys", key, {"artifact": artifact.to_json()})
    return artifact


def _given(path: str, model: ModelConfig) -> Path:
    from pipeline.models.load import not_on_hub, resolve

    folder = Path(resolve(path, "model.path"))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with waiting_for(f"the Hugging Face Hub to give {path}"):
            return Path(snapshot_download(path, revision=model.revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise not_on_hub("model.path", path, str(error).strip().split("\n")[0]) from None
