"""Names of arms: that of a stage, or of one of its fallbacks: `int8`, `int8/lora`."""

from __future__ import annotations

from dataclasses import dataclass

BASE = "base"
"""The model of `model.*`, which is there before any stage."""
STUDENT_INIT = "student_init"
"""The student's initial weights, as `student.*` describes them."""
BEST_16_BIT = "best_16_bit"
"""As the base of a comparison: the arm that has the same source in the 16-bit form that suits this
device best.
"""
RESERVED = (BASE, STUDENT_INIT, BEST_16_BIT)
CANDIDATE, BASELINE = "candidate", "baseline"
"""The two arms of a release check, and the settings that refer to their artifacts."""


VARIANT = "attribute_"
"""What the recipes begin with that `attribute` writes, of a run's own settings."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An arm that drafts for another one.

    Attributes:
        arm: The arm that drafts.
        of: The arm that verifies, whose text it is.
        tokens: That are drafted at a time.
    """

    arm: str
    of: str
    tokens: int


def stage_name(arm: str) -> str:
    """Return the stage that an arm is, or is a fallback of."""
    return arm.partition("/")[0]


def is_fallback(arm: str) -> bool:
    """Return whether an arm is a fallback."""
    return "/" in arm


def file_name(arm: str) -> str:
    """Return an arm's name where `/` and blanks may not stand: in names of files and of MLflow's
    models.
    """
    return arm.replace("/", "-").replace(" ", "-")
