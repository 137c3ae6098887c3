"""Hub datasets by `data.hub=org/name[@revision]`; a local folder takes the door of `data.path`.
Never remote code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.settings.data import DataConfig
from pipeline.data.arrow_rows import without_absent
from pipeline.data.cells import Table
from pipeline.data.documents import Dataset
from pipeline.data.files import from_tables, load_path
from pipeline.data.mappings import split_names
from pipeline.data.split_names import pick_splits
from pipeline.errors import UserError
from pipeline.store.hub import offline_without_network
from pipeline.store.waiting import waiting_for
from pipeline.tasks.table import Task

KEY = "data.hub"


def load_hub(config: DataConfig, task: Task) -> Dataset:
    """Load a dataset through the library `datasets`.

    Raises:
        UserError: If it cannot be loaded, has no train split, or has two that could be one of ours.
    """
    assert config.hub is not None
    if Path(config.hub).expanduser().exists():
        return load_path(config, task, config.hub, KEY)
    loaded, notes = pick_splits(_downloaded(config), split_names(config), KEY)
    tables = {split: [_table(split, part)] for split, part in loaded.items()}
    return from_tables(config.hub, tables, config, task, key=KEY, notes=notes)


def _downloaded(config: DataConfig) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    assert config.hub is not None
    name, _, revision = config.hub.partition("@")
    unreachable = offline_without_network()
    try:
        with waiting_for(f"the Hugging Face Hub to give {name}"):
            loaded: Any = datasets.load_dataset(name, config.subset, revision=revision or None)
        return {str(split): part for split, part in loaded.items()}
    # RuntimeError: it wants to run a script
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        text = (
            unreachable
            or " ".join(str(error.__cause__ or error).split())[:240]
            or type(error).__name__
        )
        remedy = "check its name, data.subset and the network"
        raise UserError(KEY, f"{config.hub} cannot be loaded ({text})", remedy) from None


def _table(split: str, part: Any) -> Table:
    """Return the rows of a split as they are stored: images and sounds are not decoded."""
    rows = part.with_format("arrow")[:].to_pylist()
    names = {
        name: tuple(feature.names)
        for name, feature in part.features.items()
        if getattr(feature, "names", None)
    }
    return Table(
        [(f"{split} row {number}", without_absent(row)) for number, row in enumerate(rows, 1)],
        class_names=names,
        name=split,
    )
