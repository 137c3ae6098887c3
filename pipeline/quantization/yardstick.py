"""How far a quantized model has moved from its source, on documents of the validation split: never
on test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.compare.figures import value_of
from pipeline.config.settings.run import Run
from pipeline.data.documents import Dataset
from pipeline.data.encode import Encoded, encode_all
from pipeline.data.padding import Padding
from pipeline.evaluation.quality.scoring import score_causal, score_examples
from pipeline.models.load import example_length, load_model, load_tokenizer
from pipeline.models.sixteen_bits import stored_dtype

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Yardstick:
    """The source, in memory, and what others are read on beside it.

    Attributes:
        validation: The documents.
        model: The source.
    """

    source: Path
    run: Run
    data: Dataset
    device: torch.device
    sequence_length: int
    validation: list[Encoded] = field(init=False)
    model: Any = field(init=False)
    _padding: Padding = field(init=False)
    _metric: float = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.load(self.source)
        self.validation = self._encoded()
        self._padding = Padding.of(load_tokenizer(self.source), self.model, self.run.task)
        self._metric = self.score(self.model, self.validation)[0]

    def read(self, folder: Path) -> tuple[float, float]:
        """Return what the model in `folder` loses of the primary quality, and its KL from the
        source.

        The loss is a fraction for bits per byte and a difference for accuracy, above 0 where it is
        worse, infinite where there is none. The KL is in nats a token or example.
        """
        metric, kl = self.score(self.load(folder), self.validation, other=self.model)
        if not math.isfinite(metric):
            return math.inf, kl
        decides = self.run.task.kind.decides
        worse = metric / self._metric - 1 if decides.relative else metric - self._metric
        return -decides.direction * worse, kl

    def load(self, folder: Path) -> Any:
        """Load a model of this data's labels, in the dtype it is stored in."""
        return load_model(
            folder,
            self.run.task,
            device=self.device,
            labels=self.data.labels,
            dtype=stored_dtype(folder, self.device),
        )

    def score(
        self, model: Any, encoded: Sequence[Encoded], other: Any = None
    ) -> tuple[float, float]:
        """Return the primary metric and, with `other`, the KL from it, nats a token or example."""
        more: dict[str, Any] = {
            "batch_size": self.run.quality.batch_size,
            "device": self.device,
            "other": other,
        }
        task = self.run.task
        if task.kind.is_language:
            scores = score_causal(
                model,
                encoded,
                sequence_length=self.sequence_length,
                pad_id=self._padding.token,
                **more,
            )
            count = int(scores.tokens.sum())
        else:
            scores = score_examples(model, encoded, task, padding=self._padding, **more)
            count = len(scores.digest)
        kl = 0.0 if scores.drift is None else float(scores.drift.kl.sum() / count)
        return value_of(task.kind.decides, scores.columns), kl

    def _encoded(self) -> list[Encoded]:
        # By digest: the same documents in every trial and every run.
        documents = sorted(self.data.splits["validation"], key=lambda document: document.digest)
        documents = documents[: self.run.task.kind.validation_documents]
        encoded = encode_all(
            documents,
            load_tokenizer(self.source),
            self.run.task,
            max_length=example_length(self.model.config, self.run.task, self.sequence_length),
            max_bytes=self.run.quality.max_bytes_per_document,
        )
        return [
            each for each in encoded if not self.run.task.kind.is_language or each.targets[1:].any()
        ]
