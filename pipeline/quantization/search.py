"""Search: which format is the cheapest to serve of those that hold the quality.

Every candidate is tried as a whole. Where none holds the tolerance, the cheapest that missed it is
mixed: the layers that suffer most by it stay as they are, one, two, four and so on, until it holds.
Sixteen bits come first, as a format like others and as what the others are read against: a format
of 8 or 4 bits pays where it is cheaper than fp32 and than the 16-bit forms that hold the tolerance.
How much a layer suffers is measured: KL of the model with this one layer quantized from the model
with none. What the tried formats do to quality is read on validation, and the test split has the
last word, later. Everything here is the stage's work and charged to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.config.settings.quantization import SIXTEEN_BITS, Format, Prefer
from pipeline.errors import StageFailed, UserError
from pipeline.ledger.numbers import apart, how_many, percents_apart
from pipeline.ledger.shapes import FormatTrial


@dataclass(frozen=True, slots=True)
class Trial:
    """One format, whole or mixed, on validation and at the declared load.

    Attributes:
        exclude: Names of the layers left as they are.
        loss: By how much the primary metric is worse than the unquantized model's: relative for
            bits per byte, absolute for accuracy.
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
        """Return what the search makes small: seconds or bytes over the unquantized model's."""
        return self.time_ratio if prefer is Prefer.time else self.memory_ratio

    def to_json(self) -> FormatTrial:
        """Return the form it has in artifact.json; what is no number is null."""
        return {
            "format": self.fmt.value,
            "exclude": list(self.exclude),
            "loss": finite(self.loss),
            "kl": finite(self.kl),
            "time_ratio": self.time_ratio,
            "memory_ratio": self.memory_ratio,
        }

    def say(self, tolerance: float) -> str:
        """Return the trial in words, with what decides legible: the loss beside its limit, ratios
        beside 1.
        """
        mixed = f" but {how_many(len(self.exclude), 'layer')}" if self.exclude else ""
        loss, most = percents_apart(self.loss, tolerance)
        time, memory = (apart(ratio, 1.0)[0] for ratio in (self.time_ratio, self.memory_ratio))
        return (
            f"{self.fmt.value}{mixed}: loses {loss} where {most} is allowed, takes {time}x the time"
            f" and {memory}x the weights"
        )


def finite(number: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return number if math.isfinite(number) else None


@dataclass(frozen=True, slots=True)
class Found:
    """How a search ended.

    Attributes:
        best: The cheapest trial that holds the tolerance and saves something; None: the model stays
            as it is.
        trials: All, in order.
        why: Why there is no best, or what ended the search early.
        missed: The cheapest trial that would save something had it held the tolerance; None where
            one did hold.
        refused: Formats that this model turned out not to run in, with the reason.
    """

    best: Trial | None
    trials: tuple[Trial, ...]
    why: str
    missed: Trial | None = None
    refused: tuple[str, ...] = ()


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
    refused: list[str] = field(default_factory=list)

    def run(self, candidates: Sequence[Format], beside: Sequence[Format] = ()) -> Found:
        """Try `candidates` whole, then mix where none of them holds.

        Args:
            candidates: What may be kept, in this order.
            beside: 16-bit formats that are tried first, only to read the others against.
        """
        # `all` stops at the first that the budget did not allow.
        complete = all(self._try(fmt, ()) for fmt in (*beside, *candidates))
        # What is no cheaper as a whole is none either with layers left alone.
        missed = [trial for trial in self.trials if not self._holds(trial) and self._pays(trial)]
        if self._best(candidates) is None:
            # The cheapest first: the first mix that holds is likely to be the best one.
            for trial in sorted(missed, key=self._cost):
                complete = complete and self._mix(trial.fmt)
                if self._best(candidates) is not None or not complete:
                    break
        best = self._best(candidates)
        saving = [trial for trial in self.trials if self._pays(trial) and trial.fmt in candidates]
        nearest = None if best is not None else min(saving, key=self._cost, default=None)
        return Found(
            best,
            tuple(self.trials),
            self._why(best, complete=complete),
            nearest,
            tuple(self.refused),
        )

    def _try(self, fmt: Format, exclude: tuple[str, ...]) -> bool:
        """Measure one; return whether the budget allowed it. A model may turn out not to run in a
        format.
        """
        if self.spent():
            return False
        try:
            self.trials.append(self.measure(fmt, exclude))
        except (UserError, StageFailed) as error:
            self._refuse(fmt, error)
        return True

    def _refuse(self, fmt: Format, error: UserError | StageFailed) -> None:
        self.refused.append(
            f"{fmt.value}: {error.problem if isinstance(error, UserError) else error}"
        )

    def _mix(self, fmt: Format) -> bool:
        """Leave ever more layers alone until the format holds or no longer pays; return whether the
        budget did.
        """
        try:
            names = tuple(self.sensitive(fmt))
        except (UserError, StageFailed) as error:
            self._refuse(fmt, error)
            return True
        count = 1
        # Doubling takes log2(layers) trials; one layer more at a time would spend the budget.
        while count < len(names):
            tried = len(self.trials)
            if not self._try(fmt, names[:count]):
                return False
            if (
                len(self.trials) == tried
                or self._holds(self.trials[-1])
                or not self._pays(self.trials[-1])
            ):
                return True
            count *= 2
        return True

    def _cost(self, trial: Trial) -> float:
        return trial.cost(self.prefer)

    def _holds(self, trial: Trial) -> bool:
        return trial.loss <= self.tolerance

    def _pays(self, trial: Trial) -> bool:
        """Whether a trial is cheaper than fp32 and, where it is no 16-bit form itself, than those
        that hold.
        """
        return self._cost(trial) < (1 if trial.fmt in SIXTEEN_BITS else self._limit()[0])

    def _limit(self) -> tuple[float, str]:
        """Return the least cost of what is not quantized, and what has it: fp32, or a 16-bit form
        that holds.
        """
        forms = [trial for trial in self.trials if trial.fmt in SIXTEEN_BITS and self._holds(trial)]
        return min([(1.0, "fp32"), *((self._cost(trial), trial.fmt.value) for trial in forms)])

    def _best(self, candidates: Sequence[Format]) -> Trial | None:
        holding = [trial for trial in self.trials if trial.fmt in candidates and self._holds(trial)]
        return min((trial for trial in holding if self._pays(trial)), key=self._cost, default=None)

    def _why(self, best: Trial | None, *, complete: bool) -> str:
        ended = "" if complete else "the budget of the search is spent"
        if best is not None or ended:
            return ended
        if any(self._holds(trial) for trial in self.trials):
            against = self._limit()[1]
            said = f"nothing that holds the tolerance saves {self.prefer.value}"
            return said if against == "fp32" else f"{said} over {against}, the best 16-bit form"
        return "nothing holds the tolerance"
