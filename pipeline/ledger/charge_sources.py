"""Where charges are read from: what MLflow holds of runs, and the journals that it was fed from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from pipeline.ledger.charges import OWNER, Charge, Outside, RunFacts
from pipeline.ledger.metrics import WASTED, deciding, row_summary
from pipeline.ledger.shapes import Event, Row, RowLine, RunTotals, StoredRun

HOUR_NS = 3600 * 10**9
SO_FAR_HOURS, SO_FAR_UNTIL = "so_far.device_hours", "so_far.until_ms"
"""Tags of a run that has not ended: device-hours until its last sign of life, and when that was."""
RUN_TAG = "pipeline.run"  # RUN for a parent, RUN/CHILD for a child
Part: TypeAlias = Literal["overhead", "compare"]
PARTS: tuple[Part, ...] = get_args(Part)
Figures = Mapping[str, float | None]


def stored_runs_facts(stored: Iterable[StoredRun]) -> list[RunFacts]:
    """Return the runs of a store, each with its stage attempts."""
    children: dict[str, list[StoredRun]] = {}
    parents: dict[str, StoredRun] = {}
    for run in stored:
        name, is_child, _ = run["tags"][RUN_TAG].partition("/")
        if is_child:
            children.setdefault(name, []).append(run)
        else:
            parents[name] = run
    orphans = {name: _stand_in(found) for name, found in children.items() if name not in parents}
    return [
        _stored_facts(name, run, children.get(name, []))
        for name, run in {**parents, **orphans}.items()
    ]


def _stand_in(children: Sequence[StoredRun]) -> StoredRun:
    """Return a parent for stage attempts whose run is no longer in the store."""
    last = max(children, key=lambda child: child["end_ms"] or 0)
    return {**last, "metrics": {}, "params": {}}


def _stored_facts(name: str, run: StoredRun, children: Sequence[StoredRun]) -> RunFacts:
    metrics, params, tags = run["metrics"], run["params"], run["tags"]
    open_h, until_ms = finite(tags.get(SO_FAR_HOURS)), finite(tags.get(SO_FAR_UNTIL))
    ended_ms = until_ms or run["end_ms"] or run["start_ms"]
    owner = {**_owner(tags), "model_name": tags.get("model_name") or params.get("model.name")}
    currency = _text(params.get("cost.currency"))
    stages = (_stored_stage(name, child, owner, tags, currency) for child in children)
    ended = open_h is None
    return RunFacts(
        run=name,
        owner=owner,
        device=tags.get("device"),
        ended_s=ended_ms / 1e3,
        total_h=metrics.get("compute/run_device_hours") if ended else open_h,
        stages=tuple(stage for stage in stages if stage is not None),
        outside_h=_parts(metrics, "compute/run_{}_device_hours") if ended else {},
        wasted_h=_parts(metrics, "compute/run_{}_wasted_device_hours") if ended else {},
        rate=finite(params.get("cost.per_device_hour")),
        currency=currency,
        converged_at=finite(params.get("cost.converged_at")),
        nested_in=tags.get("nested_in"),
        reused_h=metrics.get("compute/run_reused_device_hours"),
        allocated_h=metrics.get("compute/run_allocated_gpu_hours"),
    )


def _stored_stage(
    run: str,
    child: StoredRun,
    owner: Mapping[str, str | None],
    parent: Mapping[str, str],
    currency: str | None,
) -> Charge | None:
    """Return a stage attempt; None where it left no row: its hours are in the run's `open`."""
    tags = child["tags"]
    own = {name: tags.get(name) or owner.get(name) for name in OWNER}
    return _stage(
        run,
        tags[RUN_TAG].partition("/")[2],
        own,
        tags.get("device") or parent.get("device"),
        (child["end_ms"] or child["start_ms"]) / 1e3,
        tags.get("reused"),
        child["metrics"],
        tags.get("cost.currency") or currency,
        finished="model.digest" in tags,
    )


def _stage(
    run: str,
    what: str,
    owner: Mapping[str, str | None],
    device: str | None,
    ended_s: float,
    reused: str | None,
    figures: Figures,
    currency: str | None,
    *,
    finished: bool,
) -> Charge | None:
    attached_h, amount = figures.get("compute/device_hours"), figures.get("cost/amount")
    if attached_h is None:
        return None
    known: dict[str, Any] = {
        "run": run,
        "what": what,
        "owner": owner,
        "device": device,
        "ended_s": ended_s,
        "currency": None if amount is None else currency,
        "quality": _quality(figures) if finished else None,
    }
    if reused:
        taken_h = figures.get("compute/reused_device_hours")
        return Charge(
            **known,
            device_h=0.0,
            reused_h=attached_h if taken_h is None else taken_h,
            reused_from=reused,
            wasted_h=0.0,
            amount=None if amount is None else 0.0,
            reused_amount=amount,
        )
    return Charge(
        **known,
        device_h=attached_h,
        gpu_h=figures.get("compute/gpu_hours"),
        allocated_gpu_h=figures.get("compute/allocated_gpu_hours"),
        energy_j=figures.get("compute/energy_j"),
        wasted_h=figures.get("compute/wasted_device_hours"),
        amount=amount,
    )


def _quality(figures: Figures) -> tuple[str, float] | None:
    """Return the primary quality, as the catalogue names it."""
    prefix = "quality/"
    read = {
        key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)
    }
    name = deciding([read])
    value = None if name is None else read[name]
    return None if name is None or value is None else (name, value)


def journal_facts(events: Sequence[Event], run: RunTotals | None = None) -> RunFacts:
    """Return a run as its journal tells it.

    Args:
        events: Of the journal; the first one starts the run.
        run: The totals of a run that is about to end; None: as the journal has them.
    """
    # The newest attempt: its rate may be another than the first one's.
    start = [event for event in events if event["e"] == "run_start"][-1]
    params, tags = start["params"], start["tags"]
    owner = {**_owner(tags), "model_name": params.get("model.name"), "recipe": start["recipe"]}
    ends = [event for event in events if event["e"] == "run_end"]
    totals = ends[-1]["run"] if run is None and has_ended(events) else run
    seen = [event["used"]["name"] for event in events if event["e"] == "devices"]
    device, currency = (
        (seen or [start.get("environment", {}).get("device")])[-1],
        params.get("cost.currency"),
    )
    # A later line of the same row replaces the earlier one.
    rows = {_label(event["row"]): event for event in events if event["e"] == "row"}
    stages = (
        _journal_stage(start["run_id"], what, event, owner, device, currency)
        for what, event in rows.items()
    )
    return RunFacts(
        run=start["run_id"],
        owner=owner,
        device=device,
        ended_s=events[-1]["t"],
        total_h=(
            open_hours(spans(events))
            if totals is None
            else totals["device_hours"]["total"]["value"]
        ),
        stages=tuple(stage for stage in stages if stage is not None),
        outside_h=(
            {}
            if totals is None
            else {name: totals["device_hours"][name]["value"] or 0.0 for name in PARTS}
        ),
        wasted_h={} if totals is None else {name: outside_waste(totals, name) for name in PARTS},
        rate=params.get("cost.per_device_hour"),
        currency=currency,
        converged_at=params.get("cost.converged_at"),
        nested_in=tags.get("nested_in"),
        reused_h=None if totals is None else totals["reused"]["value"],
        allocated_h=(
            None
            if totals is None or "allocated" not in totals
            else totals["allocated"]["gpu_hours"]["value"]
        ),
    )


def _journal_stage(
    run: str,
    what: str,
    event: RowLine,
    owner: Mapping[str, str | None],
    device: str | None,
    currency: str | None,
) -> Charge | None:
    row = event["row"]
    figures = {key: value["value"] for key, value in row_summary(row).items()}
    own = {**owner, **({} if row["reused"] else stage_owner(row))}
    return _stage(
        run,
        what,
        own,
        stage_device(row) or device,
        event["t"],
        row["reused"],
        figures,
        row["ledger"]["cost"]["currency"] or currency,
        finished=row["artifact"] is not None,
    )


def _label(row: Row) -> str:
    return f"{row['arm']} seed {row['seed']} attempt {row['attempt']} of {row['reused']}"


def stage_owner(row: Row) -> dict[str, str]:
    """Return whose a row is, as far as it says so."""
    identity = row["ledger"].get("identity", {})
    return {name: value for name in OWNER if (value := identity.get(name))}


def stage_device(row: Row) -> str | None:
    """Return the device model of a row, several ones joined; None where it does not say. A library
    that does not tell a device's name leaves null in its place.
    """
    names = row["ledger"].get("placement", {}).get("device_names", [])
    return " + ".join(dict.fromkeys(name for name in names if name is not None)) or None


def outside_waste(totals: RunTotals, part: Part) -> float:
    """Return device-hours of overhead or comparison pass that were waste."""
    phases_ns = totals["phases_device_ns"][part]
    return sum(phases_ns.get(phase, 0) for phase in WASTED) / HOUR_NS


def outside_causes(totals: RunTotals) -> dict[str, float]:
    """Return device-hours that were wasted in overhead and comparison pass together, by cause."""
    parts = [totals["phases_device_ns"][part] for part in PARTS]
    return {
        cause: sum(phases_ns.get(phase, 0) for phases_ns in parts) / HOUR_NS
        for phase, cause in WASTED.items()
    }


def spans(events: Iterable[Event], before: Iterable[Sequence[int]] = ()) -> list[list[int]]:
    """Return the attempts of a run, each `[first ns, last ns, devices]` of its own clock.

    Args:
        before: What earlier events gave; these go on from there.
    """
    found = [list(span) for span in before]
    for event in events:
        if event["e"] == "run_start":
            found.append([event["started_ns"], event["mono_ns"], event.get("devices", 1)])
        elif found:
            if event["e"] == "devices":  # a metered command appeared on them
                found[-1][2] = len(event["used"]["ids"])
            # The last sign of life bounds what a killed attempt is charged with.
            found[-1][1] = max(found[-1][1], event["mono_ns"])
    return found


def has_ended(events: Iterable[Event], *, before: bool = False) -> bool:
    """Tell whether a run's newest attempt has ended; `before`: whether it had before these
    events.
    """
    edges = [event["e"] for event in events if event["e"] in ("run_start", "run_end")]
    return edges[-1] == "run_end" if edges else before


def open_hours(attempts: Iterable[Sequence[int]]) -> float:
    """Return the device-hours of attempts."""
    return math.fsum((last - first) * devices / HOUR_NS for first, last, devices in attempts)


def _parts(metrics: Figures, key: str) -> dict[Outside, float]:
    found: dict[Outside, float | None] = {name: metrics.get(key.format(name)) for name in PARTS}
    return {name: value for name, value in found.items() if value is not None}


def _owner(tags: Mapping[str, str]) -> dict[str, str | None]:
    return {name: tags.get(name) for name in OWNER}


def finite(text: str | None) -> float | None:
    """Return the number that a parameter or tag holds; None where it is none."""
    try:
        number = None if text is None else float(text)
        return None if number is None or not math.isfinite(number) else number
    except ValueError:  # "None"
        return None


def _text(text: str | None) -> str | None:
    return None if text in (None, "", "None") else text
