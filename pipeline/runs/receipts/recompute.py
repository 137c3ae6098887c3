"""The figures of a run made again, by the functions that made them: hours from the journal, quality
from per-document values, comparisons from both and from what they rest on beside.

What needs a file that is not there is a reason in place of a figure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.compare import savings
from pipeline.compare.clustered import group_codes, num_groups
from pipeline.compare.figures import Resampling, mean, share
from pipeline.compare.quality import combine_seeds, compare_items, compared_keys, is_binary
from pipeline.compare.savings import Spend, Tolerance, Trained
from pipeline.config.arms import stage_name
from pipeline.config.text_files import read_bytes
from pipeline.evaluation.quality.assess import Arrays, figures_of, worst_slice
from pipeline.evaluation.serving.measure import ServePass
from pipeline.gate.checks import ITEMS
from pipeline.ledger.attempted import attempted
from pipeline.ledger.booking import Booking, Window, book, device_hours, outside_ns, run_hours
from pipeline.ledger.cost import cost_in, money
from pipeline.ledger.devices.table import is_gpu
from pipeline.ledger.journal import read_events
from pipeline.ledger.metrics import DIRECTION, PRIMARY, RELATIVE, TASK, UNIT, primary_key
from pipeline.ledger.phases import difference, total
from pipeline.ledger.record import Spent, by_class, hours
from pipeline.ledger.records import MAX_BYTES, sound_events
from pipeline.ledger.shapes import (
    ComparedQuality,
    ComparisonBasis,
    Event,
    Pair,
    Row,
    SeedBasis,
    TrainingSaving,
)
from pipeline.ledger.values import Value, derive
from pipeline.runs.receipts.evidence import COMPARED, FOLDER
from pipeline.runs.receipts.figures import OUTSIDE, Members, pair_name, row_name
from pipeline.runs.receipts.receipt import Kept
from pipeline.runs.resume import booked_again, why_unusable
from pipeline.tasks.table import Task

Again = Iterator[tuple[str, Members | str]]
"""By name of a figure, what it is found to be (the members that were made again), or why it could
not be made again.
"""
NOTHING: Members = {"value": None}
"""What values give that a figure cannot be made of."""


def made_again(kept: Kept) -> Again:
    """Yield the figures of a run that its folder lets be made again."""
    items = _Items(kept.folder)
    yield from _tried("run", lambda: _hours(kept))
    yield from _tried("run/reused", lambda: _reused(kept))
    for row in kept.result["rows"]:
        yield from _tried(f"{row_name(row)}/quality", partial(_quality_of, kept, row, items))
        yield from _tried(f"{row_name(row)}/ledger/cost", partial(_money_of, kept, row))
    yield from _spends(kept)
    for pair in kept.result["comparisons"]:
        again = _Pair(kept, pair, items).again
        yield from _tried(pair_name(pair), again)


def _tried(name: str, make: Callable[[], Again]) -> Again:
    """Yield what is made again; where files say what no run writes, why it could not be."""
    problem: list[str] = []
    yield from attempted(lambda: list(make()), problem.append) or ()
    if problem:
        yield name, f"could not be made again ({problem[0]})"


# -- hours ----------------------------------------------------------------------------------------


def _hours(kept: Kept) -> Again:
    """Yield the hours of the run and of its rows, booked from the windows in its journal."""
    try:
        windows, booked = _booked(kept)
    except (AssertionError, KeyError) as error:
        yield "run/device_hours/total", {"value": f"the journal does not close ({error})"}
        return
    parts: Any = run_hours(booked)
    for name in parts:
        yield f"run/device_hours/{name}", _bare(parts[name])
    yield "run/spent", {"value": device_hours(booked.attached_ns)}
    yield OUTSIDE, _outside(kept, booked)
    for row in kept.result["rows"]:
        if row["reused"] is None:
            yield from _hours_of(kept, row, windows)
        else:
            yield from _reused_hours(kept, row)


def _booked(kept: Kept) -> tuple[list[Window], Booking]:
    """Return the windows of all attempts, and what they come to.

    Raises:
        AssertionError: If lines contradict one another.
    """
    attempts = kept.start["attempt"]
    why = why_unusable(kept.events, attempts)
    assert why is None, why
    past = booked_again(kept.events, kept.result["run_id"])
    spans = dict(past.spans)
    spans[attempts] = spans[attempts]._replace(end_ns=kept.booked["end_ns"])
    return list(past.windows), book(past.windows, spans)


def _outside(kept: Kept, booked: Booking) -> Members:
    """Return the phases outside of stages, as result.json has them."""
    last = max(at for at, event in enumerate(kept.events) if event["e"] == "run_start")
    before = booked_again(kept.events[:last], kept.result["run_id"])
    devices = kept.start.get("devices", 1)
    closed = [event for event in kept.events[last:] if event["e"] == "window"]
    inside = total(*(event["phases_ns"] for event in closed))
    own = total(difference(kept.booked["clock_ns"], inside), times=devices)
    compared = (e["phases_ns"] for e in closed if e["window"]["kind"] == "compare")
    return {
        "overhead": outside_ns(booked, before.overhead_ns, own),
        "compare": total(before.compare_ns, *(total(each, times=devices) for each in compared)),
    }


def _hours_of(kept: Kept, row: Row, windows: list[Window]) -> Again:
    """Yield the hours of a row of this run."""
    of = row["arm"], row["seed"], row["attempt"]
    own = [each for each in windows if (each.arm, each.seed, each.attempt) == of]
    if row["status"] == "SKIPPED" or row["ledger"]["wall_s"]["value"] is None:
        return
    devices = _devices_in(kept.events, row["attempt"])
    spent = Spent(
        work_ns=sum(each.kept_ns for each in own if each.kind == "work"),
        assess_ns=sum(each.kept_ns for each in own if each.kind == "assess"),
        lost_ns=sum(each.lost_ns for each in own),
    )
    name = f"{row_name(row)}/ledger"
    parts = {
        "attached": spent.work_ns + spent.assess_ns + spent.lost_ns,
        "work": spent.work_ns,
        "assess": spent.assess_ns,
        "retry": spent.lost_ns,
    }
    simple = devices == 1 and not spent.lost_ns and all(each.beside == 1 for each in own)
    if simple and row["status"] == "FINISHED":  # else what ranks told, or a checkpoint, has a say
        for event in kept.events:
            is_own = event["e"] == "window" and (event["arm"], event["seed"]) == of[:2]
            if event["e"] == "window" and is_own and event["window"]["attempt"] == of[2]:
                spent.add_phases(event["phases_ns"])
        classes, causes = by_class(spent, devices)
        parts |= {part: classes[part] for part in ("productive", "support", "wasted")}
        for cause, ns in causes.items():
            if ns:
                yield f"{name}/device_hours/wasted_by/{cause}", _bare(hours(ns, 1).to_json())
        if spent.phases_ns:
            own_share = spent.phases_ns.get("log", 0) / sum(spent.phases_ns.values())
            yield f"{name}/conditions/meter_overhead", {"value": own_share}
        if parts["attached"] and row["ledger"]["counts"]["goodput"]["value"] is not None:
            yield f"{name}/counts/goodput", {"value": parts["productive"] / parts["attached"]}
    if all(each.beside == 1 for each in own):
        yield f"{name}/wall_s", {"value": parts["attached"] / 1e9}
    for part, ns in parts.items():
        yield f"{name}/device_hours/{part}", _bare(hours(ns, devices).to_json())
        if part in row["ledger"]["gpu_hours"] and is_gpu(kept.result["device"]["kind"]):
            yield f"{name}/gpu_hours/{part}", {"value": hours(ns, devices).value}


def _devices_in(events: list[Event], attempt: int) -> int:
    starts = (event for event in events if event["e"] == "run_start")
    return next(each.get("devices", 1) for each in starts if each["attempt"] == attempt)


def _reused_hours(kept: Kept, row: Row) -> Again:
    """Yield the work of a row that another run finished, where its journal lies beside."""
    path = kept.folder.parent / str(row["reused"]) / "journal.jsonl"
    if row["status"] != "FINISHED" or not path.is_file():
        return
    events = sound_events(read_events(path, checked=True), path)
    if not any(
        event["e"] == "run_start" and event["attempt"] == row["attempt"] for event in events
    ):
        return
    of = row["arm"], row["seed"], row["attempt"]
    windows = booked_again(events, str(row["reused"])).windows
    own = [w.kept_ns for w in windows if (w.arm, w.seed, w.attempt) == of and w.kind == "work"]
    if own:
        figure = hours(sum(own), _devices_in(events, row["attempt"])).to_json()
        yield f"{row_name(row)}/ledger/device_hours/work", _bare(figure)


def _reused(kept: Kept) -> Again:
    """Yield what the run took over from others, by its rows and its comparison pass."""
    if kept.basis is None:
        yield "run/reused", f"{FOLDER}/{COMPARED} is missing, or damaged"
        return
    taken = [row for row in kept.result["rows"] if row["reused"] is not None]
    parts = [row["ledger"]["device_hours"] for row in taken]
    own = [each[part]["value"] or 0.0 for each in parts for part in ("work", "assess")]
    yield "run/reused", {"value": sum(own) + kept.basis["served_elsewhere_h"]}
    if "compare_conditions" in kept.result["run"] and kept.basis["served"] is not None:
        read = kept.basis["served"].get("conditions", {})
        for name in kept.result["run"]["compare_conditions"]:
            if name in read and read[name]["value"] is not None:
                yield f"run/compare_conditions/{name}", _bare(read[name])


def _money_of(kept: Kept, row: Row) -> Again:
    """Yield what a row cost, by its hours and the rate in the settings."""
    record = row["ledger"]
    attached = record["device_hours"]["attached"]["value"]
    if attached is None or record["cost"]["amount"]["value"] is None:
        return
    paid = money(
        attached,
        cost_in(kept.settings),
        allocated=Value.from_json(record["gpu_hours"]["allocated"]),
        energy_j=Value.from_json(record["energy_j"]),
    )
    yield f"{row_name(row)}/ledger/cost/amount", _bare(paid["amount"])


# -- quality --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Items:
    """Per-document values in a run's folder, each file read once."""

    folder: Path
    _read: dict[str, Arrays | str] = field(default_factory=dict[str, "Arrays | str"])

    def of(self, row: Row, key: str) -> Arrays | str:
        """Return the columns of a quality's values, or why they cannot be read."""
        items = row["quality"][key]["items"]
        name = "" if items is None else Path(items).name
        if name not in self._read:
            self._read[name] = items_in(self.folder, row, key)
        return self._read[name]


def items_in(folder: Path, row: Row, key: str) -> Arrays | str:
    """Return the columns of per-document values that a run's folder has of a row's quality, or why
    they cannot be read.
    """
    items = row["quality"][key]["items"]
    if items is None:
        return "no per-document values were kept"
    return _columns(folder / FOLDER / Path(items).name)


def _columns(path: Path) -> Arrays | str:
    try:
        text = read_bytes(path, limit=MAX_BYTES).decode()
        rows = [json.loads(line) for line in text.splitlines()]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}
    except FileNotFoundError:
        return f"{FOLDER}/{path.name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # not the values that figures were made of


def _quality_of(kept: Kept, row: Row, items: _Items) -> Again:
    """Yield the qualities of a row, with their intervals."""
    task, resamples = Task(kept.settings["task"]), kept.settings["quality"]["bootstrap"]
    recorded = kept.result.get("is_release_check") and kept.settings.get(ITEMS.get(row["arm"], ""))
    seed = 0 if recorded else row["seed"]
    for key, figure in row["quality"].items():
        name = f"{row_name(row)}/quality/{key}"
        if figure["value"] is None:
            continue
        columns = items.of(row, key)
        if isinstance(columns, str):
            yield name, columns
        elif key.startswith(TASK):
            values = columns.get(key.rpartition("/")[2])
            if values is None:
                yield name, NOTHING
                continue
            value, ci = (share if is_binary(values) else mean)(values, Resampling(resamples, seed))
            yield name, _read_on(columns, value, ci)
        elif key == "worst_slice":
            yield name, {"value": worst_slice(columns, None)[1]}
        elif key in {quality.key for quality in task.kind.qualities}:
            found = _figures(task, columns, resamples, seed).get(key)
            yield name, NOTHING if found is None else _read_on(columns, *found, grouped=True)


def _figures(task: Task, columns: Arrays, resamples: int, seed: int) -> Mapping[str, Any]:
    try:
        return figures_of(task, columns, resamples=resamples, seed=seed)
    # other values than were kept
    except (ValueError, LookupError, TypeError, ArithmeticError, AssertionError):
        return {}


def _read_on(
    columns: Arrays, value: Value, ci: tuple[float, float] | None, *, grouped: bool = False
) -> Members:
    found: dict[str, Any] = {
        "value": value.value,
        "provenance": str(value.provenance),
        "ci": None if ci is None else list(ci),
        "n": len(columns["digest"]),
    }
    groups = num_groups(group_codes(columns)) if grouped else None
    return found if groups is None else {**found, "groups": groups}


# -- comparisons ----------------------------------------------------------------------------------


def _spends(kept: Kept) -> Again:
    """Yield hours that comparisons charge and rows do not have: none, unless one of the two was
    changed. What given models cost before stands in no row.
    """
    if kept.result.get("is_release_check") or kept.basis is None:
        return
    for each in kept.basis["seeds"]:
        for spend in each["spends"]:
            own = [
                row["ledger"]["device_hours"]
                for row in kept.result["rows"]
                if row["seed"] == each["seed"] and stage_name(row["arm"]) == spend["arm"]
            ]
            of_stage = spend["arm"] in kept.settings["stages"] and own
            for part in ("work", "retry") if of_stage else ():
                name = f"{FOLDER}/{COMPARED}: {part} of {spend['arm']} (seed {each['seed']})"
                said = spend[f"{part}_h"]  # pyright: ignore
                yield name, {"value": sum(h[part]["value"] or 0.0 for h in own), "said": said}


@dataclass(frozen=True, slots=True)
class _Pair:
    """A comparison that is made again."""

    kept: Kept
    pair: Pair
    items: _Items

    @property
    def basis(self) -> ComparisonBasis:
        """What it rests on."""
        assert self.kept.basis is not None
        return self.kept.basis

    def again(self) -> Again:
        """Yield its figures."""
        name, pair = pair_name(self.pair), self.pair
        if self.kept.basis is None:
            yield name, f"{FOLDER}/{COMPARED} is missing, or damaged"
            return
        quality = self._quality()
        if isinstance(quality, str):
            if pair["quality"] or pair["training"]:
                yield f"{name}/quality", quality
        else:
            for key, said in pair["quality"].items():
                read = quality.get(key)
                if read is not None and read["value"] is not None:
                    # how many documents there are in all is known to the data alone
                    found = {k: v for k, v in read.items() if k not in ("available", "why_missing")}
                    yield f"{name}/quality/{key}", found
                elif said["value"] is not None:
                    yield f"{name}/quality/{key}", NOTHING
            if pair["training"] is not None:
                yield from _nested(f"{name}/training", self._training(quality))
        if pair["serving"] is not None and pair["serving"]["value"] is not None:
            serving = self._serving()
            yield f"{name}/serving", serving
        if pair["payback"] is not None:
            yield from self._payback(f"{name}/payback")

    def _rows(self, seed: int) -> dict[str, Row]:
        own = (row for row in self.kept.result["rows"] if row["seed"] == seed)
        return {row["arm"]: row for row in own if row["artifact"] is not None}

    def _quality(self) -> dict[str, ComparedQuality] | str:
        """Compare the two arms on all qualities that both have, or say what is missing."""
        settings, pair = self.kept.settings["quality"], self.pair
        how = {"margin": settings["margin"], "resamples": settings["bootstrap"]}
        primary = PRIMARY[Task(self.kept.settings["task"])]
        by_key: dict[str, list[ComparedQuality]] = {}
        for each in self.basis["seeds"]:
            rows = self._rows(each["seed"])
            sides = [rows[pair["arm"]], rows[pair["base"]]]
            ours, theirs = (self.items.of(row, primary) for row in sides)
            if isinstance(ours, str) or isinstance(theirs, str):
                return str(ours if isinstance(ours, str) else theirs)
            for key in compared_keys(ours, theirs):
                read = compare_items(key, ours, theirs, seed=each["seed"], **how)
                by_key.setdefault(key, []).append(read)
            for key in [key for key in pair["quality"] if key.startswith(TASK)]:
                ours, theirs = (self.items.of(row, key) for row in sides)
                if isinstance(ours, str) or isinstance(theirs, str):
                    return str(ours if isinstance(ours, str) else theirs)
                metric = key.rpartition("/")[2]
                read = compare_items(metric, ours, theirs, seed=each["seed"], **how)
                by_key.setdefault(key, []).append(read)
        return {
            key: combine_seeds(per_seed, is_share=key not in RELATIVE)
            for key, per_seed in by_key.items()
        }

    def _spends(self, each: SeedBasis) -> dict[str, Spend]:
        return {raw["arm"]: Spend.from_json(raw) for raw in each["spends"]}

    def _training(self, quality: dict[str, ComparedQuality]) -> TrainingSaving:
        task, settings = Task(self.kept.settings["task"]), self.kept.settings
        allowed, sides = self.basis["tolerance"], (self.pair["arm"], self.pair["base"])
        per_seed: list[TrainingSaving] = []
        for each in self.basis["seeds"]:
            trained = {raw["arm"]: Trained.from_json(raw) for raw in each["trained"]}
            arm, base = (trained[side] for side in sides)
            saving = savings.training_saving(
                arm,
                base,
                self._spends(each),
                margin=settings["quality"]["margin"],
                lower_is_better=DIRECTION[PRIMARY[task]] < 0,
                teachers={*self.basis["teachers"]} - {*sides},
                shared_by=settings["cost"]["teacher_shared_by"],
                tolerance=Tolerance(allowed["most"], allowed["what"], allowed["is_shared"]),
            )
            per_seed.append(saving)
        combined = savings.combine_training(per_seed)
        decides = primary_key([quality], task)
        return combined if decides is None else savings.unless_worse(combined, quality[decides])

    def _served(self) -> ServePass | None:
        raw = self.basis["served"]
        served = None if raw is None else ServePass.from_json(raw)
        known = served is not None and (self.pair["arm"], self.pair["base"]) in served.seconds
        return served if known else None

    def _serving(self) -> Members | str:
        """Return the saving of serving, where one is shown."""
        served = self._served()
        if served is None:
            return "the readings of the comparison pass were not kept"
        read: Mapping[str, Any] = served.saving((self.pair["arm"], self.pair["base"]))
        own = {key: each for key, each in read.items() if not isinstance(each, dict)}
        return {key: each for key, each in own.items() if key != "why_missing"}

    def _payback(self, name: str) -> Again:
        served, settings = self._served(), self.kept.settings
        if served is None:
            return
        pair, serving = self.pair, self.pair["serving"]
        if serving is None:  # it is read on payback alone
            serving = served.saving((pair["arm"], pair["base"]))
        extra = [
            savings.c_opt(pair["arm"], pair["base"], self._spends(each))
            for each in self.basis["seeds"]
        ]
        found = savings.payback(
            derive(lambda *hours: float(np.mean(hours)), *extra),
            served.per_unit(pair["base"]),
            serving,
            unit=UNIT[Task(settings["task"])],
            volume=settings["serving"]["volume"],
            rate=settings["serving"]["rate"],
        )
        yield from _nested(name, found)


def _nested(name: str, record: Mapping[str, Any]) -> Again:
    """Yield a figure, and those nested in it, that are not null."""
    if record.get("value") is not None:
        own = {key: each for key, each in record.items() if not isinstance(each, dict)}
        yield name, {key: each for key, each in own.items() if key != "why_missing"}
    for key, each in record.items():
        if isinstance(each, dict):
            yield from _nested(f"{name}/{key}", each)


def _bare(figure: Mapping[str, Any]) -> Members:
    return {"value": figure["value"], "provenance": figure["provenance"]}
