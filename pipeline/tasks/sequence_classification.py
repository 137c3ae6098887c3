"""Classifiers: a text has one of the data's classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.tasks.kind import Kind
from pipeline.tasks.quality import MacroF1, Mean, Quality, Share, agreement, drift

if TYPE_CHECKING:
    from torch import Tensor


class SequenceClassification(Kind):
    """The task `sequence_classification`."""

    word = "classifier"
    remedy = "give a fine-tuned classifier"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    labelled = True
    embedded = "stdlib_labels"
    validation_documents = 256
    rows = "examples"
    unit = "example"
    primary = "accuracy"
    recorded = ("label", "prediction", "correct")
    known_by, finite = "label", "logprob"
    qualities = (
        Quality(
            key="accuracy",
            words="accuracy",
            meaning="share of test examples classified right",
            measure=Share("correct"),
            direction=1,
            same="label",
            right_or_wrong="correct",
        ),
        Quality(
            key="macro_f1",
            words="macro F1",
            meaning="mean over classes of F1 (a class never seen nor predicted is left out)",
            measure=MacroF1(),
            direction=1,
            same="label",
            right_or_wrong="correct",
        ),
        agreement(Share("agree"), same="label"),
        *drift(kl=Mean(("kl",)), flips=Share("flips")),
    )

    def why_wrong(self, row: Mapping[str, Any]) -> str | None:
        """Refuse what contradicts itself."""
        if row.get("correct", 0) not in (0, 1):
            return "correct is neither 0 nor 1"
        known = {"label", "prediction", "correct"} <= set(row)
        if known and (row["label"] == row["prediction"]) != row["correct"]:
            return "correct is not what label and prediction say"
        return None

    def scored(self, logits_BC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Return the true class, the one ranked first, and the true one's log-probability."""
        logprobs_BC = logits_BC.log_softmax(-1)
        prediction = logprobs_BC.argmax(-1)
        return {
            "label": labels_B,
            "prediction": prediction,
            "correct": prediction == labels_B,
            "logprob": logprobs_BC.gather(-1, labels_B[:, None]).squeeze(-1),
        }
