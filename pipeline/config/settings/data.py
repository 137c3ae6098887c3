"""`data.*`: where documents come from, and what becomes of those that stand twice."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from pipeline.config.settings.ranges import positive
from pipeline.tasks.table import Task

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


class DataFormat(Enum):
    """What the rows of a data set are (`data/rows.py`, docs/data.md). `auto` tells by the names of
    the columns.
    """

    auto = "auto"
    text = "text"  # a text; with a label where the task is sequence_classification
    text_pair = "text_pair"  # two texts with a label
    prompt_completion = "prompt_completion"  # only the completion is learnt
    alpaca = "alpaca"  # instruction, input, output
    sharegpt = "sharegpt"  # turns of `from` and `value`
    messages = "messages"  # turns of `role` and `content`


class Shared(Enum):
    """What becomes of a document that stands in two splits."""

    drop = "drop"  # test keeps it; validation keeps what train has too
    refuse = "refuse"


class Conflicting(Enum):
    """What becomes of a text that has two labels in one split."""

    drop = "drop"  # every copy: nothing says which label is right
    keep_first = "keep_first"
    refuse = "refuse"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where documents come from: `path` (file or folder), else `hub` (a Hub dataset or a local
    one), else `name`.

    `splits`, `columns` and `label_map` are written `{a: b, c: d}`; keys may be quoted.
    """

    name: str = "stdlib"  # embedded: stdlib, stdlib_labels
    path: Optional[str] = None  # a file or folder; docs/data.md has the rules
    hub: Optional[str] = None  # org/name, or org/name@revision
    subset: Optional[str] = None  # a configuration of a Hub data set, or a sub-folder
    # {validation: validation_matched}: what the data calls a split
    splits: Any = field(default_factory=dict)
    # forces what rows are read as; auto: by their columns
    format: DataFormat = DataFormat.auto
    # {text: body, label: stars}: which column has which part
    columns: Any = field(default_factory=dict)
    # {neg: negative, 0: bad}: names of classes, by the data's
    label_map: Any = field(default_factory=dict)
    group_field: Optional[str] = None  # a column: documents that share its value are of one source
    shared_documents: Shared = Shared.drop  # documents that stand in two splits
    conflicting_labels: Conflicting = Conflicting.drop  # texts with two labels
    task: Task = Task.causal_lm  # what `task` defaults to
    max_documents: Optional[int] = positive(None)  # per split, the first by content hash
    vocabulary_size: int = field(default=1024, metadata={"min": 300})  # of the embedded tokenizer
    shuffle_labels: bool = False  # a control: quality must fall to chance
