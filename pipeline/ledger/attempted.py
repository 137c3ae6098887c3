"""A measurement never kills the work: what cannot be counted, read or checked becomes a reason, and
the run continues.

This is the one place that takes any exception. What is measured is often another's code (a driver,
a profiler, a tracker, a model's own forward pass on made-up inputs), whose failures cannot be
listed beforehand; the model that is being trained meanwhile is worth more than the figure. Every
failure is reported: callers turn the reason into a null.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import BudgetSpent, Preempted, StageFailed, UserError, one_line

Result = TypeVar("Result")
REASON = 300  # characters of a library's message
MEANT = (UserError, StageFailed, BudgetSpent, Preempted)
"""What our own code raises on purpose to refuse or to stop: it passes. So does what is no Exception
(Ctrl-C).
"""


def attempted(measure: Callable[[], Result], otherwise: Callable[[str], Result]) -> Result:
    """Return what was measured, or what stands for it with the reason where measuring failed.

    Args:
        measure: Reads or counts.
        otherwise: Given the reason (a line: type and message of the exception), returns what stands
            in.

    Raises:
        UserError, StageFailed, BudgetSpent, Preempted: As `measure` raises them.
    """
    try:
        return measure()
    except MEANT:
        raise
    except Exception as error:  # noqa: BLE001 (any failure of a measurement: see above)
        return otherwise(reason(error))


UNMEASURED = " could not be measured ("
"""What the reasons of such nulls have in common: a report lists them."""


def unmeasured(what: str, why: str) -> str:
    """Return the reason of a figure that measuring failed to give."""
    return f"{what}{UNMEASURED}{why})"


def reason(error: BaseException) -> str:
    """Return an exception in a line: its type, and what it says first."""
    # Only the first line: libraries add whole tracebacks of their own to a message.
    said = (str(error).strip().splitlines() or [""])[0]
    name = type(error).__name__
    return one_line(f"{name}: {said}" if said else name, REASON)
