"""What the pipeline raises when it refuses something, and the exit codes a caller can rely on."""

from __future__ import annotations

import re
import unicodedata
from enum import IntEnum

LINE = 2000  # characters: what others chose, and exceptions of libraries, can be pages
_ANSI = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-_]")


def one_line(text: object, limit: int = 400) -> str:
    """Return `text` on one line, without escape sequences, control or invisible characters, cut at
    `limit`.
    """
    visible = (
        c
        for c in _ANSI.sub("", str(text))
        if c.isspace() or not unicodedata.category(c).startswith("C")
    )
    plain = " ".join("".join(visible).split())
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


class Exit(IntEnum):
    """Exit codes of `python -m pipeline` (docs/release-check.md says what to do about each)."""

    DONE = 0
    REFUSED = 1
    UNPARSABLE = 2
    FAIL = (
        # a release fails its policy, or an artifact saves nothing or reads differently in vLLM; all
        # of it is there
        3
    )
    INCONCLUSIVE = 4
    INVALID = 5
    NO_BASELINE = 6
    BUDGET_SPENT = 7
    PREEMPTED = 75
    INTERRUPTED = 130


class UserError(ValueError):
    """Something the user can mend: printed as one line, never as a traceback.

    Args:
        key: The setting or file at fault, as the user would type it (`training.steps`,
            `data.path`).
        problem: What is wrong with it.
        remedy: What would be right.
    """

    def __init__(self, key: str, problem: str, remedy: str) -> None:
        super().__init__(key, problem, remedy)
        self.key, self.problem, self.remedy = key, problem, remedy

    def __str__(self) -> str:
        return one_line(f"{self.key}: {self.problem}; {self.remedy}", LINE)


class Unparsable(UserError):
    """An argument that is no setting at all."""


class StageFailed(RuntimeError):
    """A stage that started and could not finish (divergence, an artifact that does not survive a
    reload).
    """


class DeviceLost(StageFailed):
    """The device answers no more: nothing else can be done on it in this process."""


class Preempted(Exception):
    """The scheduler asked for the machine back; a checkpoint is on disk and the same command goes
    on from it.
    """


class BudgetSpent(Exception):
    """`budget.device_hours` is used up; a checkpoint is on disk, and requeueing would only spend
    more.
    """


def exit_of(error: BaseException | None) -> Exit:
    """Return what a run ends with that an exception ended."""
    known = {
        Preempted: Exit.PREEMPTED,
        BudgetSpent: Exit.BUDGET_SPENT,
        KeyboardInterrupt: Exit.INTERRUPTED,
    }
    return next((code for kind, code in known.items() if isinstance(error, kind)), Exit.REFUSED)
