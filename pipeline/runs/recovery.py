"""What earlier attempts at a run left behind: their hours, read back from the journal, and their
checkpoints.

A killed process wrote no row and closed no window: both are made here, up to its last sign of life.
What counts of it is what led to the checkpoint that the next attempt goes on from; a checkpoint
says itself what led to it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pipeline.ledger.booking import Span, Window
from pipeline.ledger.disturbance import Disturbance
from pipeline.ledger.disturbance import unread as disturbance_unread
from pipeline.ledger.gpu_usage import Usage
from pipeline.ledger.gpu_usage import unread as usage_unread
from pipeline.ledger.memory import unread
from pipeline.ledger.phases import difference, total
from pipeline.ledger.record import HOUR_NS, Spent, disturbance_of, usage_of
from pipeline.ledger.values import Value, measured
from pipeline.runs.rows import make_row
from pipeline.stages.context import Output
from pipeline.stages.recover import stage_of

if TYPE_CHECKING:
    from pipeline.runs.attempt import Attempt

GONE = "the process that read it is gone"
UNFINISHED = ("KILLED", "FAILED")
Event = dict[str, Any]


def recover(attempt: Attempt, events: list[Event]) -> None:
    """Take over what earlier attempts of this run spent: hours of a killed process are not lost."""
    rows = [event["row"] for event in events if event["e"] == "row"]
    by_identity = {
        (row["arm"], row["seed"], row["attempt"]): row for row in rows if row["reused"] is None
    }
    attempt.rows += [row for row in by_identity.values() if row["status"] in UNFINISHED]
    attempt.finished_before = [row for row in by_identity.values() if row["status"] == "FINISHED"]
    starts = [index for index, event in enumerate(events) if event["e"] == "run_start"]
    for first, end in zip(starts, [*starts, len(events)][1:], strict=True):
        _recover_attempt(attempt, events[first:end], set(by_identity))


def why_unusable(events: list[Event], attempts: int) -> str | None:
    """Return what keeps the journal of an unfinished run from being gone on with, or None.

    A kill tears the last line of a process, which is passed over. Anything else that is missing
    would make a run that says less than it took, or books a second twice.

    Args:
        events: That are sound, each for itself.
        attempts: How many times the run was started.
    """
    starts = [index for index, event in enumerate(events) if event["e"] == "run_start"]
    if [events[index]["attempt"] for index in starts] != list(range(1, attempts + 1)):
        return "its attempts are not all there"
    parts = (
        events[first:end] for first, end in zip(starts, [*starts, len(events)][1:], strict=True)
    )
    return next((why for part in parts if (why := _why_attempt_unusable(part)) is not None), None)


def _why_attempt_unusable(events: list[Event]) -> str | None:
    number, at_ns, last_ns = events[0]["attempt"], _started_ns(events), _last_ns(events)
    opened: Event | None = None
    for event in events:
        if event.get("attempt", number) != number:
            return f"attempt {number} speaks of another one"
        if event["e"] == "open":
            if opened is not None or event["start_ns"] < at_ns:
                return f"a window of attempt {number} began before the one before it ended"
            opened = event
        elif event["e"] == "window":
            window = event["window"]
            if opened is None or any(
                window[name] != opened[name] for name in ("kind", "arm", "seed", "start_ns")
            ):
                return f"a window of attempt {number} ended that had not begun"
            if (window["kind"] == "compare") != (window["arm"] is None) or window[
                "attempt"
            ] != number:
                return f"a window of attempt {number} is of no arm"
            if not window["start_ns"] + window["kept_ns"] <= window["end_ns"] <= last_ns:
                return f"a window of attempt {number} is longer than its process lived"
            opened, at_ns = None, window["end_ns"]
    return (
        None
        if at_ns <= last_ns and _saved_ns(opened, events) <= last_ns
        else f"attempt {number} ended early"
    )


def _saved_ns(opened: Event | None, events: list[Event]) -> int:
    """Return when the last checkpoint of a window that was open at the end was made."""
    if opened is None:
        return 0
    saved = [event for event in events[events.index(opened) :] if event["e"] == "checkpoint"]
    return opened["start_ns"] + (sum(saved[-1]["phases_ns"].values()) if saved else 0)


def _recover_attempt(
    attempt: Attempt, events: list[Event], written: set[tuple[str, int, int]]
) -> None:
    number = events[0]["attempt"]
    devices = events[0].get("devices", 1)  # before it was journaled, a process drove one
    attempt.spans[number] = Span(_started_ns(events), _last_ns(events), devices)
    for event in events:
        _trace(attempt, event)
        if event["e"] == "resume":
            resume(attempt, event["arm"], event["seed"], number, event["step"], event["history"])
    closed = [event for event in events if event["e"] == "window"]
    attempt.windows += [Window(**event["window"]) for event in closed]
    opened = [event for event in events if event["e"] == "open"]
    if len(opened) > len(closed):
        _recover_window(attempt, opened[-1], events)
    _recover_outside(attempt, number, events)
    for arm, seed in dict.fromkeys(
        (event["arm"], event["seed"]) for event in opened if event["arm"] is not None
    ):
        if (arm, seed, number) not in written:
            _recover_row(attempt, arm, seed, number, events)


def _trace(attempt: Attempt, event: Event) -> None:
    if event["e"] not in ("points", "checkpoint", "resume"):
        return
    trace = attempt.trace(event["arm"], event["seed"], event["attempt"])
    trace.reached = max(trace.reached, event["step"])
    if event["e"] != "points":
        trace.saved = event["step"]


def _started_ns(events: list[Event]) -> int:
    return events[0].get("started_ns", events[0]["mono_ns"])


def _recover_window(attempt: Attempt, opened: Event, events: list[Event]) -> None:
    """Close a window that was open when the process was killed: kept up to its last checkpoint."""
    end_ns = _last_ns(events)
    kept_ns = end_ns - opened["start_ns"] if opened["kind"] == "compare" else 0
    saved = [event for event in events[events.index(opened) :] if event["e"] == "checkpoint"]
    if saved and opened["kind"] == "work":
        kept_ns = sum(saved[-1]["phases_ns"].values())
    attempt.windows.append(
        Window(
            **{name: opened[name] for name in ("kind", "arm", "seed", "attempt", "start_ns")},
            end_ns=end_ns,
            kept_ns=kept_ns,
        )
    )


def _last_ns(events: list[Event]) -> int:
    """Return when a process was last heard of; a line may once have been stamped before it waited
    for its turn.
    """
    return max(event["mono_ns"] for event in events)


def _recover_outside(attempt: Attempt, number: int, events: list[Event]) -> None:
    """Take over the phases of overhead and comparison; of a process that was killed, those up to
    its last mark.
    """
    span = attempt.spans[number]
    windows = [window for window in attempt.windows if window.attempt == number]
    compared = [
        total(event["phases_ns"], times=span.devices)
        for event in events
        if event["e"] == "window" and event["window"]["kind"] == "compare"
    ]
    compared_ns = (
        sum(window.elapsed_ns for window in windows if window.kind == "compare") * span.devices
    )
    torn_ns = compared_ns - sum(sum(phases.values()) for phases in compared)
    attempt.compare_ns = total(attempt.compare_ns, *compared, {"other": torn_ns})
    ended = next((event["run"] for event in reversed(events) if event["e"] == "run_end"), None)
    # it had summed up the attempts before it, too
    if ended is not None and "phases_device_ns" in ended:
        known_ns = difference(ended["phases_device_ns"]["overhead"], attempt.overhead_ns)
    else:
        known_ns = total(_outside_until_last_mark(span, events), times=span.devices)
    overhead_ns = span.device_ns - sum(window.elapsed_ns for window in windows) * span.devices
    attempt.overhead_ns = total(
        attempt.overhead_ns, known_ns, {"other": overhead_ns - sum(known_ns.values())}
    )


def _outside_until_last_mark(span: Span, events: list[Event]) -> dict[str, int]:
    """Return the self times outside of windows when the clock was last journaled, with the
    interpreter's start.

    What came later, up to the last sign of life, is in the window that was open, or in no phase
    that is known.
    """
    marked = [event for event in events if "clock_ns" in event]
    if not marked:
        return {}
    last = marked[-1]
    at_ns = {"open": last.get("start_ns"), "window": last.get("window", {}).get("end_ns")}.get(
        last["e"]
    )
    closed = [event["phases_ns"] for event in marked if event["e"] == "window"]
    outside = difference(last["clock_ns"], total(*closed))
    started_ns = (
        (last["mono_ns"] if at_ns is None else at_ns)
        - span.start_ns
        - sum(last["clock_ns"].values())
    )
    return total(outside, {"import": max(0, started_ns)})


def _recover_row(attempt: Attempt, arm: str, seed: int, number: int, events: list[Event]) -> None:
    """Write the row that a killed process could not write, from its windows."""
    spent = Spent(lost_as="rollback")
    for window in attempt.windows:
        if (window.arm, window.seed, window.attempt) == (arm, seed, number):
            spent.work_ns += window.kept_ns if window.kind == "work" else 0
            spent.assess_ns += window.kept_ns if window.kind == "assess" else 0
            spent.lost_ns += window.lost_ns
    own = [event for event in events if (event.get("arm"), event.get("seed")) == (arm, seed)]
    for event in own:
        if event["e"] == "window":
            spent.add_phases(event["phases_ns"])
    saved = [event for event in own if event["e"] == "checkpoint"]
    if saved and not spent.phases_ns:
        spent.phases_ns = saved[-1]["phases_ns"]
    if not spent.work_ns:
        spent.lost_as = "failed_attempt"
    why = "the process was killed; hours up to its last sign of life"
    _unfinished_row(attempt, arm, seed, number, spent, "KILLED", why, truncated=True)


def resume(
    attempt: Attempt, arm: str, seed: int, number: int, step: int, history: list[Event]
) -> None:
    """Book what came before by the checkpoint that attempt `number` goes on from.

    Where a newer checkpoint was damaged, the steps from this one on are rolled back. Where another
    run wrote it, that run's time up to here is reused.

    Args:
        step: Of the checkpoint; 0 without one.
        history: What led to it, as `Attempt.history` gave it.
    """
    trace = attempt.trace(arm, seed, number)
    trace.saved = trace.reached = step
    attempt.resumed[arm, seed] = history
    led = {(entry["run_id"], entry["attempt"]): entry for entry in history}
    for index, window in enumerate(attempt.windows):
        if (window.kind, window.arm, window.seed) == (
            "work",
            arm,
            seed,
        ) and window.attempt < number:
            attempt.windows[index] = _rebook(
                attempt, window, led.get((attempt.run_id, window.attempt))
            )
    for (run_id, other), entry in led.items():
        if run_id != attempt.run_id:
            _take_over(attempt, arm, seed, run_id, other, entry)


def _rebook(attempt: Attempt, window: Window, entry: Event | None) -> Window:
    """Return a window of an unfinished attempt with what the checkpoint in use makes of it, and
    correct its row.
    """
    assert window.arm is not None
    identity = (window.arm, window.seed, window.attempt, None)
    rows = [
        row
        for row in attempt.rows
        if (row["arm"], row["seed"], row["attempt"], row["reused"]) == identity
    ]
    trace = attempt.trace(window.arm, window.seed, window.attempt)
    was_its_last = entry is not None and entry["step"] == trace.saved
    if not rows or rows[0]["status"] not in UNFINISHED or (was_its_last and window.kept_ns):
        return window
    phases_ns = {} if entry is None else entry["phases_ns"]
    kept_ns = sum(phases_ns.values())
    # A process that is killed between writing a checkpoint and journaling it was alive longer than
    # its journal says.
    booked = dataclasses.replace(
        window, kept_ns=kept_ns, end_ns=max(window.end_ns, window.start_ns + kept_ns)
    )
    if booked == window:
        return window
    span = attempt.spans[window.attempt]
    attempt.spans[window.attempt] = span._replace(end_ns=max(span.end_ns, booked.end_ns))
    trace.saved = 0 if entry is None else entry["step"]
    spent = Spent(booked.kept_ns, 0, booked.lost_ns, "rollback", phases_ns)
    record = rows[0]["ledger"]
    memory = {name: Value.from_json(value) for name, value in record["memory"].items()}
    _unfinished_row(
        attempt,
        window.arm,
        window.seed,
        window.attempt,
        spent,
        rows[0]["status"],
        rows[0]["why"],
        memory=memory,
        usage=usage_of(record),
        disturbance=disturbance_of(record),
        truncated=record["conditions"]["truncated"],
    )
    return booked


def _take_over(
    attempt: Attempt, arm: str, seed: int, run_id: str, number: int, entry: Event
) -> None:
    """Show the part of another run's attempt that led to the checkpoint, as reused."""
    known = {(row["arm"], row["seed"], row["attempt"], row["reused"]) for row in attempt.rows}
    if (arm, seed, number, run_id) in known:
        return
    spent = Spent(work_ns=sum(entry["phases_ns"].values()), phases_ns=entry["phases_ns"])
    why = f"up to its checkpoint of step {entry['step']}"
    attempt.reused_h += spent.work_ns / HOUR_NS
    _unfinished_row(attempt, arm, seed, number, spent, "KILLED", why, reused=run_id, lost=0)


def _unfinished_row(
    attempt: Attempt,
    arm: str,
    seed: int,
    number: int,
    spent: Spent,
    status: str,
    why: str,
    *,
    reused: str | None = None,
    lost: int | None = None,
    memory: dict[str, Value] | None = None,
    usage: Usage | None = None,
    disturbance: Disturbance | None = None,
    truncated: bool = False,
) -> None:
    steps = attempt.trace(arm, seed, number).lost if lost is None else lost
    output = Output(counts={"steps_lost": measured(steps)})
    row = make_row(
        attempt,
        arm,
        stage_of(attempt.run, arm),
        seed,
        spent,
        output,
        status,
        why,
        number=number,
        reused=reused,
        memory=memory or unread(GONE),
        usage=usage or usage_unread(GONE),
        disturbance=disturbance or disturbance_unread(GONE),
        truncated=truncated,
    )
    attempt.add(row)
