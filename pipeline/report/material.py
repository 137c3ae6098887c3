"""What the report of a run is made of: its result, and what its journal says of time.

Journals have readings by step, and when each stage was at work. Both are put on an axis of hours
here: device-hours of a stage for its curves, hours of the run for what was drawn and held then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.redaction import redact_json
from pipeline.ledger.journal import read_events
from pipeline.ledger.shapes import Event, NoVerdict, Result, VerdictFile

HOUR_NS = 3600 * 10**9
Stage = tuple[str, int]
"""An arm and a seed."""


@dataclass(slots=True)
class Curve:
    """What was read while a stage trained.

    Attributes:
        values: By name, pairs of device-hours of the stage until then and the value. Hours of steps
            that were lost count, their readings do not.
    """

    arm: str
    seed: int
    values: dict[str, list[tuple[float, float]]] = field(
        default_factory=dict[str, list[tuple[float, float]]]
    )


@dataclass(frozen=True, slots=True)
class Stretch:
    """A window of a run, in hours since its first attempt began; attempts follow one another.

    Attributes:
        kind: `work`, `assess` or `compare`.
        arm: None: it is of no stage.
    """

    kind: str
    arm: str | None
    seed: int
    start_h: float
    end_h: float


@dataclass(frozen=True, slots=True)
class Material:
    """What a run left for its report.

    Attributes:
        verdict: Of a release check, or why it came to none; None: the run is no release check.
        name: By which figures of several runs are told apart; empty: it is the only one.
        charts: Whether charts are drawn; their tables are there without.
    """

    result: Result
    verdict: VerdictFile | NoVerdict | None = None
    curves: Sequence[Curve] = ()
    stretches: Sequence[Stretch] = ()
    name: str = ""
    charts: bool = True


def material_of(
    result: Result,
    folder: Path,
    verdict: VerdictFile | NoVerdict | None = None,
    *,
    name: str = "",
    charts: bool = True,
) -> Material:
    """Return what a report is made of, secrets left out.

    Args:
        folder: Of the run, with its journal; what a stage of another run left is looked for beside
            it.
    """
    result, verdict = redact_json(result), redact_json(verdict)
    events = read_events(folder / "journal.jsonl")
    devices = result["device"]["count"]
    curves = {(each.arm, each.seed): each for each in curves_of(events, devices)}
    for run in dict.fromkeys(row["reused"] for row in result["rows"] if row["reused"]):
        there = folder.parent / run / "journal.jsonl"
        earlier = {(each.arm, each.seed): each for each in curves_of(read_events(there), devices)}
        for row in result["rows"]:
            key = row["arm"], row["seed"]
            if row["reused"] == run and key in earlier:
                curves.setdefault(key, earlier[key])
    shown = [
        curves[key]
        for key in dict.fromkeys((r["arm"], r["seed"]) for r in result["rows"])
        if key in curves
    ]
    return Material(result, verdict, shown, stretches_of(events), name, charts)


def curves_of(events: Iterable[Event], devices: int) -> list[Curve]:
    """Return the curves of every stage that trained, in the order in which they began.

    Args:
        devices: Of the run; where stages work side by side, each has one.
    """
    curves: dict[Stage, Curve] = {}
    spent_ns: dict[Stage, int] = {}  # of windows that were closed
    began: dict[Stage, tuple[int, int]] = {}  # of a window that is open: when, and on how many
    steps: dict[Stage, list[tuple[str, int]]] = {}  # which reading is of which step
    last_ns = 0  # the attempt's last sign of life
    for event in events:
        match event["e"]:
            case "run_start":
                for key, (start_ns, on) in began.items():  # what was open ended with the attempt
                    spent_ns[key] = spent_ns.get(key, 0) + on * max(0, last_ns - start_ns)
                began.clear()
            case "open" if event["kind"] == "work" and event["arm"] is not None:
                began[event["arm"], event["seed"]] = event["start_ns"], devices
            case "beside":
                for each in event["arms"]:
                    began[each["arm"], each["seed"]] = event["start_ns"], 1
            case "window" if event["window"]["kind"] == "work" and event["arm"] is not None:
                key, window = (event["arm"], event["seed"]), event["window"]
                spent_ns[key] = spent_ns.get(key, 0) + devices * (
                    window["end_ns"] - window["start_ns"]
                )
                began.pop(key, None)
            case "resume":
                _drop_lost(curves, steps, (event["arm"], event["seed"]), event["step"])
            case "points":
                key = event["arm"], event["seed"]
                if key not in began:
                    continue
                start_ns, on = began[key]
                hours = (spent_ns.get(key, 0) + on * (event["mono_ns"] - start_ns)) / HOUR_NS
                curve = curves.setdefault(key, Curve(*key))
                for name, value in event["values"].items():
                    if value is not None:
                        curve.values.setdefault(name, []).append((hours, value))
                        steps.setdefault(key, []).append((name, event["step"]))
            case _:
                pass
        last_ns = event["mono_ns"]
    return list(curves.values())


def _drop_lost(
    curves: dict[Stage, Curve], steps: dict[Stage, list[tuple[str, int]]], key: Stage, step: int
) -> None:
    """Leave out the readings of steps that a stage goes back behind, which it takes again."""
    if key not in curves:
        return
    kept: dict[str, list[tuple[float, float]]] = {}
    at: dict[str, int] = {}
    for name, number in steps[key]:
        place = at.get(name, 0)
        at[name] = place + 1
        if number <= step:
            kept.setdefault(name, []).append(curves[key].values[name][place])
    curves[key].values = kept
    steps[key] = [each for each in steps[key] if each[1] <= step]


def stretches_of(events: Iterable[Event]) -> list[Stretch]:
    """Return the windows of a run, in the order in which they were closed."""
    found: list[Stretch] = []
    before_ns, began_ns, last_ns = 0, 0, 0  # of earlier attempts; of this one
    for event in events:
        if event["e"] == "run_start":
            before_ns += last_ns - began_ns
            began_ns = last_ns = event["started_ns"]
        last_ns = max(last_ns, event["mono_ns"])
        if event["e"] == "window":
            window = event["window"]
            start_h, end_h = (
                (before_ns + window[end] - began_ns) / HOUR_NS for end in ("start_ns", "end_ns")
            )
            found.append(Stretch(window["kind"], event["arm"], event["seed"], start_h, end_h))
    return found
