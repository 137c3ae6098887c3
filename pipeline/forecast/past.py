"""What earlier runs of this store took, part by part, and what their forecasts had said.

Every run leaves `forecast.json` in its folder: what was expected of each part of it, and once it is
over what each part took. Those records are all that a forecast learns from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.compare.statistics import Interval
from pipeline.config.settings.run import Run
from pipeline.forecast.rates import expected, scaled
from pipeline.ledger.numbers import agreed
from pipeline.ledger.records import FORECAST, read_record
from pipeline.ledger.shapes import ForecastPart, ForecastRecord
from pipeline.store.artifacts import key_of, plain

FILE = "forecast.json"
NEWEST = 100  # runs whose records are read
LIKENESS = (
    ("settings", ("run with the same settings", "runs with the same settings"), 0.15),
    ("model", ("run of this model", "runs of this model"), 0.35),
    ("kind", ("run of this kind", "runs of this kind"), 0.8),
)
"""How alike parts are, the most alike first: key of a record, words, and the usual spread of the
logarithm of what they take for their size."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a part is expected to take.

    Attributes:
        seconds: Of wall time.
        source: What it is known from.
    """

    seconds: Interval
    source: str


class Past:
    """The finished parts of earlier runs, and their scores."""

    def __init__(self, records: Sequence[ForecastRecord]) -> None:
        self.records = records
        self._parts = [part for each in records for part in each["parts"]]

    @classmethod
    def read(cls, root: Path, *, but: str = "") -> Past:
        """Return the past of a store.

        Args:
            root: `tracking.root`.
            but: A run whose record is not of the past.
        """
        folders = sorted((root / "runs").glob("*/"), key=lambda folder: folder.name)
        found = (
            read_record(folder / FILE, FORECAST, so="forecasts do without it")
            for folder in folders[-NEWEST:]
            if folder.name != but
        )
        return cls([each for each in found if each is not None])

    def foresee(self, part: ForecastPart, *keys: str) -> Foreseen | None:
        """Return what a part is expected to take by the parts that are most like it; None where
        none was.

        Args:
            keys: Of the likenesses that count.
        """
        for key, words, usual in LIKENESS:
            if key not in keys:
                continue
            alike = [
                each
                for each in self._parts
                if each["actual_s"] and key in part["like"] and _same(each, part, key)
            ]
            found = _by_size(alike, part, usual) if key != "settings" else _of_each(alike, usual)
            if found is not None:
                count = agreed(len(alike), f"1 {words[0]}", f"{len(alike)} {words[1]}")
                return Foreseen(found, count)
        return None

    def totals(self, settings: str, key: str) -> list[float]:
        """Return what a figure came to in runs with these settings, on whatever device."""
        found = (
            each["totals"][key]["actual"]
            for each in self.records
            if each["settings"] == settings and key in each["totals"]
        )
        return [each for each in found if each]

    def wall_seconds(self, settings: str, devices: int) -> list[float]:
        """Return how long runs with these settings lasted that did all of it on as many devices,
        in seconds.
        """
        whole: list[float] = []
        for each in self.records:
            took = [part["actual_s"] for part in each["parts"]]
            if (each["settings"], each["devices"]) == (settings, devices) and None not in took:
                whole.append(sum(seconds or 0.0 for seconds in took))
        return [each for each in whole if each]


def settings_key(run: Run) -> str:
    """Return a digest of the settings that decide what a run computes, wherever it is done."""
    left_out = ("tracking", "budget", "ledger", "hardware", "parallel", "cost", "store")
    return key_of(run={name: each for name, each in plain(run).items() if name not in left_out})[
        :16
    ]


def _same(one: ForecastPart, other: ForecastPart, key: str) -> bool:
    return one["what"] == other["what"] and one["like"].get(key) == other["like"][key]


def _of_each(alike: Iterable[ForecastPart], usual: float) -> Interval | None:
    seconds = [each["actual_s"] for each in alike if each["actual_s"]]
    return expected(seconds, usual) if seconds else None


def _by_size(alike: Iterable[ForecastPart], part: ForecastPart, usual: float) -> Interval | None:
    """Return what a part takes at the rate of others: seconds for its FLOPs."""
    size = part["flops"]
    if size is None:
        return None
    rates = [
        each["actual_s"] / each["flops"] for each in alike if each["actual_s"] and each["flops"]
    ]
    return scaled(expected(rates, usual), size) if rates else None
