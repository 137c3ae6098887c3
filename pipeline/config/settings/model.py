"""`model.*` and `student.*`: where the weights come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from pipeline.config.settings.ranges import positive

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string
# "X | None" everywhere.
# ruff: noqa: UP045


@dataclass(kw_only=True, slots=True)
class TinyShape:
    """Shape of the embedded Llama-architecture model. Widths are multiples of 64, so that every
    backend takes them.
    """

    hidden_size: int = positive(192)  # width
    layers: int = positive(4)  # depth
    heads: int = positive(3)  # attention heads
    intermediate_size: int = positive(512)  # width of the feed-forward layers


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The artifact `base`: `path` (a Hugging Face folder or Hub name) or, without one, a model made
    from `shape`.
    """

    path: Optional[str] = None  # a folder or Hub name; null: a model made from `shape`
    revision: Optional[str] = None  # of a Hub name: a branch, tag or commit
    shape: TinyShape = field(default_factory=TinyShape)
    name: str = "model"  # the model_name under which costs add up over runs


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """The student's initial weights, by the first of these that is set: `path`, `config`, `layers`.

    `path` is a folder or Hub name. `config` overrides keys of the source arm's Hugging Face config;
    weights are random. `layers` copies layers of the source arm: `every_2` (every second), a count
    (evenly spread), or a list.
    """

    path: Optional[str] = None  # a folder or Hub name; null: made from the source arm
    revision: Optional[str] = None  # of a Hub name: a branch, tag or commit
    # not null: overrides are merged into it
    config: Optional[dict[str, Any]] = field(default_factory=dict)
    layers: Any = "every_2"  # copied from the source arm: every_2, a count, or a list such as [0,3]
    # the arm copied from; null: the teacher of the first distill stage, else base
    source: Optional[str] = None
