"""How far a quantized model has moved from its source, on documents of the validation split: never
on test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings import Run, Task
from pipeline.data.documents import Dataset
from pipeline.data.encode import Encoded, encode_all
from pipeline.data.padding import Padding
from pipeline.evaluation.quality.scoring import score_causal, score_classification
from pipeline.models.load import example_length, load_model, load_tokenizer
from pipeline.models.sixteen_bits import stored_dtype

if TYPE_CHECKING:
    import torch

# of validation, by content digest
DOCUMENTS = {Task.causal_lm: 32, Task.sequence_classification: 256}


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
        is_language = self.run.task is Task.causal_lm
        return (metric / self._metric - 1 if is_language else self._metric - metric), kl

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
        """Return the primary metric and, with `other`, the KL from it."""
        more: dict[str, Any] = {
            "batch_size": self.run.quality.batch_size,
            "device": self.device,
            "other": other,
        }
        if self.run.task is Task.causal_lm:
            scores = score_causal(
                model,
                encoded,
                sequence_length=self.sequence_length,
                pad_id=self._padding.token,
                **more,
            )
            metric, count = scores.bits.sum() / scores.bytes.sum(), scores.tokens.sum()
        else:
            scores = score_classification(model, encoded, padding=self._padding, **more)
            metric, count = scores.correct.mean(), len(scores.correct)
        return float(metric), 0.0 if scores.drift is None else float(scores.drift.kl.sum() / count)

    def _encoded(self) -> list[Encoded]:
        documents = sorted(self.data.splits["validation"], key=lambda document: document.digest)
        documents = documents[: DOCUMENTS[self.run.task]]
        encoded = encode_all(
            documents,
            load_tokenizer(self.source),
            self.run.task,
            max_length=example_length(self.model.config, self.run.task, self.sequence_length),
            max_bytes=self.run.quality.max_bytes_per_document,
        )
        return [
            each
            for each in encoded
            if self.run.task is not Task.causal_lm or each.targets[1:].any()
        ]
