"""The contract of a task: what a model is for, and all that differs by that.

A task is one subclass in a file of its own here, and one line in `table.py`. What it does not say
is as `Kind` has it. Everything else asks `task.kind`, and compares no task with another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.tasks.quality import Quality

if TYPE_CHECKING:
    from torch import Tensor


class Kind:
    """What a task is.

    Attributes:
        word: What a model of it is called: `language model`, `classifier`.
        remedy: What to give in place of a model that is none.
        auto_class: The class of transformers that loads such models.
        heads: How the names of such models' classes end.
        labelled: A document is an example with a label, read in padded batches; else a text, read
            in windows.
        is_language: Every token of a text is predicted from those before, and serving writes.
        has_classes: What it predicts is a distribution over outputs that have names, tokens or
            classes: what distillation, quantization and agreement are read on.
        embedded: The embedded data set that is for it.
        validation_documents: How many a reading during training looks at, unless declared.
        rows: What training draws: `windows`, `examples`.
        unit: What serving and payback count.
        qualities: Its metrics, in the order of result.json.
        primary: The one that decides.
        stands_in: What decides where that one is null; None where nothing does.
        recorded: Columns of a file of per-document values, beside `digest`.
        known_by: A column that only this task's values have.
        finite: The column that shows whether a model's outputs are finite.
    """

    word: str
    remedy: str
    auto_class: str
    heads: tuple[str, ...]
    labelled: bool
    is_language: bool = False
    has_classes: bool = True
    embedded: str
    validation_documents: int
    rows: str
    unit: str
    qualities: tuple[Quality, ...]
    primary: str
    stands_in: str | None = None
    recorded: tuple[str, ...]
    known_by: str
    finite: str

    @property
    def decides(self) -> Quality:
        """The metric that decides."""
        return next(each for each in self.qualities if each.key == self.primary)

    def compared(self) -> tuple[Quality, ...]:
        """Return the metrics that two arms are compared on, document by document."""
        return tuple(each for each in self.qualities if each.same is not None)

    def in_policy(self) -> tuple[str, ...]:
        """Return the keys that a gate's policy can ask for."""
        return tuple(each.key for each in self.compared() if each.in_policy)

    def why_wrong(self, row: Mapping[str, Any]) -> str | None:
        """Return why a document's recorded values (finite numbers) cannot be; None where they
        can.
        """
        return None

    # -- of examples with a label ---------------------------------------------------------------

    def configure(self, config: Any, labels: tuple[str, ...]) -> None:
        """Have a model's configuration say what its outputs are; by default one for every label."""
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}

    def loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Return the sum over examples of what training minimises, 0-dim.

        Asked only of a task without classes: the loss of those that have some may mix in what a
        teacher says (`distillation/losses.py`).
        """
        raise NotImplementedError

    def scored(self, logits_BC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Return what is kept of each example, (B,) each, by column: what `qualities` are made of.

        Args:
            logits_BC: fp32.
            labels_B: int64: the place of each label among the data's.
        """
        raise NotImplementedError
