"""Search: which format is the cheapest to serve of those that hold the quality.

Every candidate is tried as a whole. Where none holds the tolerance, the cheapest that missed it is mixed: the layers
that suffer most by it stay in 16 bits, one, two, four and so on, until it holds. How much a layer suffers is measured:
KL of the model with this one layer quantized from the model with none. What the tried formats do to quality is read on
validation, and the test split has the last word, later. Everything here is the stage's work and charged to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Format, Prefer


@dataclass(frozen=True, slots=True)
class Trial:
    """One format, whole or mixed, on validation and at the declared load.

    Attributes:
        exclude: Names of the layers kept in 16 bits.
        loss: By how much the primary metric is worse than the unquantized model's: relative for bits per byte,
            absolute for accuracy.
        kl: From the unquantized model, nats a token or example.
        time_ratio: Seconds to serve the load over the unquantized model's.
        memory_ratio: Bytes of weights over the unquantized model's.
    """

    fmt: Format
    exclude: tuple[str, ...]
    loss: float
    kl: float
    time_ratio: float
    memory_ratio: float

    def cost(self, prefer: Prefer) -> float:
        """Return what the search makes small; below 1 is a saving."""
        return self.time_ratio if prefer is Prefer.time else self.memory_ratio

    def to_json(self) -> dict[str, Any]:
        """Return the form it has in artifact.json."""
        return {"format": self.fmt.value, "exclude": list(self.exclude), "loss": self.loss, "kl": self.kl,
                "time_ratio": self.time_ratio, "memory_ratio": self.memory_ratio}  # fmt: skip

    def __str__(self) -> str:
        mixed = f" but {len(self.exclude)} layers" if self.exclude else ""
        return (f"{self.fmt.value}{mixed}: loses {self.loss:.2%}, takes {self.time_ratio:.2f}x the time and "
                f"{self.memory_ratio:.2f}x the weights")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """How a search ended.

    Attributes:
        best: The cheapest trial that holds the tolerance and saves something; None: the model stays as it is.
        trials: All, in order.
        why: Why there is no best, or what ended the search early.
    """

    best: Trial | None
    trials: tuple[Trial, ...]
    why: str

    def nearest(self, prefer: Prefer) -> Trial | None:
        """Return the cheapest trial that would save something had it held the tolerance; None where one did hold."""
        saving = [trial for trial in self.trials if trial.cost(prefer) < 1]
        return None if self.best is not None else min(saving, key=lambda trial: trial.cost(prefer), default=None)


@dataclass(slots=True)
class Searcher:
    """One search.

    Args:
        measure: Tries a format with some layers kept in 16 bits.
        sensitive: Returns the names of the layers of a format, the one that suffers most first.
        tolerance: The largest `Trial.loss` that counts as kept.
        prefer: What to save.
        spent: Whether the budget is, asked before every trial.
    """

    measure: Callable[[Format, tuple[str, ...]], Trial]
    sensitive: Callable[[Format], Sequence[str]]
    tolerance: float
    prefer: Prefer
    spent: Callable[[], bool]
    trials: list[Trial] = field(default_factory=list)

    def run(self, candidates: Sequence[Format]) -> Found:
        """Try `candidates` whole, then mix where none of them holds."""
        complete = all(self._try(fmt, ()) is not None for fmt in candidates)
        # What is no cheaper as a whole is none either with layers left alone.
        missed = [trial for trial in self.trials if not self._holds(trial) and trial.cost(self.prefer) < 1]
        if self._best() is None:
            for trial in sorted(missed, key=lambda trial: trial.cost(self.prefer)):
                complete = complete and self._mix(trial.fmt)
                if self._best() is not None or not complete:
                    break
        best = self._best()
        return Found(best, tuple(self.trials), self._why(best, complete=complete))

    def _try(self, fmt: Format, exclude: tuple[str, ...]) -> Trial | None:
        if self.spent():
            return None
        self.trials.append(self.measure(fmt, exclude))
        return self.trials[-1]

    def _mix(self, fmt: Format) -> bool:
        """Leave ever more layers alone until the format holds or no longer pays; return whether the budget did."""
        names = tuple(self.sensitive(fmt))
        count = 1
        while count < len(names):
            trial = self._try(fmt, names[:count])
            if trial is None:
                return False
            if self._holds(trial) or trial.cost(self.prefer) >= 1:
                return True
            count *= 2
        return True

    def _holds(self, trial: Trial) -> bool:
        return trial.loss <= self.tolerance

    def _best(self) -> Trial | None:
        holding = [trial for trial in self.trials if self._holds(trial) and trial.cost(self.prefer) < 1]
        return min(holding, key=lambda trial: trial.cost(self.prefer), default=None)

    def _why(self, best: Trial | None, *, complete: bool) -> str:
        ended = "" if complete else "the budget of the search is spent"
        if best is not None or ended:
            return ended
        if any(self._holds(trial) for trial in self.trials):
            return f"nothing that holds the tolerance saves {self.prefer.value}"
        return "nothing holds the tolerance"
