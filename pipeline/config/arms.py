"""Names of arms: that of a stage, or of one of its rungs of recovery: `int8`, `int8/lora`."""

from __future__ import annotations

BEST_16_BIT = "best_16_bit"
"""As the base of a comparison: the arm that has the same source in the 16-bit form that suits this
device best.
"""


def stage_name(arm: str) -> str:
    """Return the stage that an arm is, or is a rung of."""
    return arm.partition("/")[0]


def is_rung(arm: str) -> bool:
    """Return whether an arm is a rung."""
    return "/" in arm


def file_name(arm: str) -> str:
    """Return an arm's name where `/` and blanks may not stand: in names of files and of MLflow's
    models.
    """
    return arm.replace("/", "-").replace(" ", "-")
