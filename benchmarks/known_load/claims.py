"""What is claimed of a meter under known load: figures from readings, and the bounds they must lie
within.

Readings are plain JSON by section, as `loads.py` and `steps.py` make them. A bound holds where
every repetition lies within it; what could not be measured has not held.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.ledger.gpu_timeline import SHARES
from pipeline.ledger.values import Value

Readings = dict[str, Any]
CLASSES = tuple(f"{name}_ns" for name in SHARES)  # of a step's time


class Unmeasured(RuntimeError):
    """A reading that is not there; the message says why."""


SPREAD: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "least": min,
    "most": max,
}


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a figure may lie; both ends belong to it unless `above`."""

    least: float
    most: float
    above: bool = False

    def holds(self, figure: float) -> bool:
        """Tell whether a figure lies within."""
        return (figure > self.least if self.above else figure >= self.least) and figure <= self.most

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{self.least:g}"
        return f"{'(' if self.above else '['}{self.least:g}, {self.most:g}]"


@dataclass(frozen=True, slots=True)
class Check:
    """One claim: a figure of each repetition, from the readings of its section, and its bound."""

    section: str
    name: str
    bound: Bound
    figures: Callable[[Readings], list[float]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a check: `pass`, `FAIL` or `skip`, the latter only where there is no GPU."""

    check: Check
    state: str
    figures: list[float] = field(default_factory=list[float])
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it without its arithmetic."""
        spread = {name: each(self.figures) for name, each in SPREAD.items()} if self.figures else {}
        return {
            "check": self.check.name,
            "section": self.check.section,
            "bound": str(self.check.bound),
            "state": self.state,
            "n": len(self.figures),
            **spread,
            "why": self.why,
        }

    def __str__(self) -> str:
        shown = self.why or "" if self.figures else self.why or "no repetition"
        if self.figures:
            mean, least, most = (each(self.figures) for each in SPREAD.values())
            shown = f"{mean:.5g} [{least:.5g}, {most:.5g}] n={len(self.figures)} {shown}".rstrip()
        return f"{self.state:<5}{self.check.name:<66}{self.check.bound!s:<16}{shown}"


def value(figure: Mapping[str, Any]) -> float:
    """Return a figure as the ledger writes it.

    Raises:
        Unmeasured: If it is null.
    """
    if figure["value"] is None:
        raise Unmeasured(figure["why_missing"])
    return float(figure["value"])


def mfu(flops: float, seconds: float, rate: Mapping[str, Any]) -> float:
    """Return the share of a peak in TFLOP/s."""
    return flops / seconds / 1e12 / value(rate)


def doubled(energy: Readings) -> list[float]:
    """Return, per repetition, joules above context-idle of twice the work over those of the
    work.
    """
    idle_w = statistics.fmean(
        value(window["energy_j"]) / window["seconds"] for window in energy["idle"]
    )
    above = lambda window: value(window["energy_j"]) - idle_w * window["seconds"]
    return [above(pair["twice"]) / above(pair["once"]) for pair in energy["doubling"]]


def counter_over_integral(windows: Iterable[Readings]) -> list[float]:
    """Return the energy counter's joules over those of integrated power."""
    return [value(window["energy_j"]) / value(window["energy_integral_j"]) for window in windows]


def gain(each: Readings, delay: str, name: str) -> float:
    """Return by how many nanoseconds a class of a step's time grew with a delay; `window_ns` is the
    whole step.
    """
    return each[delay][name] - each["control"][name]


def elsewhere(each: Readings) -> float:
    """Return the largest change that a host's sleep brought to a class that is not the host's, over
    its length.
    """
    others = [name for name in each["control"] if name in CLASSES and name != "idle_host_wait_ns"]
    return max(abs(gain(each, "sleep", name)) for name in others) / each["slept_ns"]


def hidden(each: Readings) -> float:
    """Return the exposed part of a copy behind computing.

    Raises:
        Unmeasured: If the trace shows no copy.
    """
    if not each["hidden"]["copied_ns"]:
        raise Unmeasured("the trace shows no copy")
    return each["hidden"]["copy_exposed_ns"] / each["hidden"]["copied_ns"]


LOADS = ("idle", "half", "full")
SHOWN = (
    "power_w_mean",
    "busy",
    "sm_active",
    "tensor_active",
    "sm_clock_mhz_mean",
    "throttle_share",
)
EXACTLY_1, NONE, SHARE = Bound(1, 1), Bound(0, 0), Bound(0, 1, above=True)
WITHIN_5 = Bound(0.95, 1.05)
CHECKS = (
    Check(
        "flops",
        "FLOPs of a matmul, counted / known",
        EXACTLY_1,
        lambda r: [r["counted"] / r["known"]],
    ),
    Check(
        "flops",
        "FLOPs of a transformer, ledger / torch's counter on the device",
        EXACTLY_1,
        lambda r: [r["ledger"] / r["counter"]],
    ),
    Check(
        "flops",
        "FLOPs of a transformer, ledger less by hand",
        NONE,
        lambda r: [r["ledger"] - r["by_hand"]],
    ),
    Check(
        "flops",
        "MFU of matmuls",
        SHARE,
        lambda r: [mfu(r["known"], s, r["peak"]) for s in r["seconds"]],
    ),
    Check("energy", "energy above context-idle, 2N / N matmuls", Bound(1.9, 2.1), doubled),
    *(
        Check(
            "energy",
            f"energy, counter / integrated power, {load}",
            WITHIN_5,
            lambda r, load=load: counter_over_integral(r[load]),
        )
        for load in LOADS
    ),
    Check("spin", "threads of the spinning kernel", EXACTLY_1, lambda r: [r["threads"]]),
    Check(
        "spin",
        "it spins until the window's end",
        EXACTLY_1,
        lambda r: [float(w["lasted"]) for w in r["windows"]],
    ),
    Check(
        "spin",
        "utilization as NVML has it",
        Bound(0.95, 1),
        lambda r: [value(w["busy"]) for w in r["windows"]],
    ),
    Check(
        "spin",
        "SM activity as GPM has it",
        Bound(0, 0.02, above=True),
        lambda r: [value(w["sm_active"]) for w in r["windows"]],
    ),
    Check(
        "delays",
        "host sleep in a step: gain of idle_host_wait / sleep",
        Bound(0.98, 1.02),
        lambda r: [
            gain(each, "sleep", "idle_host_wait_ns") / each["slept_ns"] for each in r["steps"]
        ],
    ),
    Check(
        "delays",
        "host sleep in a step: largest change elsewhere / sleep",
        Bound(0, 0.02),
        lambda r: [elsewhere(each) for each in r["steps"]],
    ),
    Check(
        "delays",
        "all classes of that step / its wall time",
        Bound(0.995, 1.005),
        lambda r: [each["sleep"]["window_ns"] / each["sleep"]["wall_ns"] for each in r["steps"]],
    ),
    Check(
        "delays",
        "pageable copy: gain of copy_exposed / gain of the step",
        Bound(0.9, 1.1),
        lambda r: [
            gain(each, "pageable", "copy_exposed_ns") / gain(each, "pageable", "window_ns")
            for each in r["steps"]
        ],
    ),
    Check(
        "delays",
        "copy behind computing: exposed / copied",
        Bound(0, 0.05),
        lambda r: [hidden(each) for each in r["steps"]],
    ),
    Check(
        "loop",
        "places where a step of the loop waits for the device",
        NONE,
        lambda r: [float(len(r["places"]))],
    ),
    Check(
        "loop_timeline",
        "calls that wait for the device in traced steps",
        NONE,
        lambda r: [float(len(each["waits"])) for each in r["runs"]],
    ),
    Check(
        "loop_timeline",
        "sleep in data loading: gain of idle_host_wait / sleep",
        Bound(0.9, 1.1),
        lambda r: [each["host_wait_gain_ns"] / each["slept_ns"] for each in r["runs"]],
    ),
    Check(
        "loop_timeline",
        "device time by phase, sum / wall time",
        Bound(0.98, 1.02),
        lambda r: [sum(each["phases_s"].values()) / each["wall_s"] for each in r["runs"]],
    ),
    Check(
        "loop_timeline",
        "MFU of the training",
        SHARE,
        lambda r: [mfu(each["flops"], each["step_s"], r["peak"]) for each in r["runs"]],
    ),
)


def judge(readings: Readings) -> list[Outcome]:
    """Return what became of the checks of the sections that were read."""
    return [
        outcome(check, readings[check.section]) for check in CHECKS if check.section in readings
    ]


def outcome(check: Check, section: Readings) -> Outcome:
    """Hold a section's readings against a bound."""
    if "skipped" in section:
        return Outcome(check, "skip", why=section["skipped"])
    if "failed" in section:
        return Outcome(check, "FAIL", why=section["failed"])
    try:
        figures = check.figures(section)
    except Unmeasured as missing:
        return Outcome(check, "FAIL", why=f"not measured: {missing}")
    except ZeroDivisionError:
        return Outcome(check, "FAIL", why="not measured: its divisor is zero")
    holds = bool(figures) and all(map(check.bound.holds, figures))
    return Outcome(check, "pass" if holds else "FAIL", figures, section.get("said"))


def remarks(readings: Readings) -> list[str]:
    """Return figures without a bound that are worth a line."""
    lines: list[str] = []
    if "seconds" in (flops := readings.get("flops", {})):
        rates = [flops["known"] / seconds / 1e12 for seconds in flops["seconds"]]
        mean, least, most = (each(rates) for each in SPREAD.values())
        lines.append(f"matmuls: {mean:.1f} TFLOP/s [{least:.1f}, {most:.1f}] n={len(rates)}")
    for load in LOADS:
        for window in readings.get("energy", {}).get(load, []):
            found = {name: Value.from_json(window[name]).value for name in SHOWN}
            lines.append(
                f"{load}: "
                + " ".join(f"{name}={v if v is None else round(v, 3)}" for name, v in found.items())
            )
    return lines
