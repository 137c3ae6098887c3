"""Classifiers: a text has one of the data's classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.tasks.kind import Kind
from pipeline.tasks.quality import MacroF1, Mean, Quality, Share, agreement, drift


class SequenceClassification(Kind):
    """The task `sequence_classification`."""

    unit = "example"
    primary = "accuracy"
    recorded = ("label", "prediction", "correct")
    known_by = "label"
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
