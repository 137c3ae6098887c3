"""What earlier attempts at a run left behind: their hours, read back from the journal, and their
checkpoints.

A killed process wrote no row and closed no window: both are made here, up to its last sign of life.
What counts of it is what led to the checkpoint that the next attempt resumes from; a checkpoint
says itself what led to it. `Past` is what all of that comes to: returned anew by every function,
changed by none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline.ledger.booking import Span, Window
from pipeline.ledger.phases import difference, total
from pipeline.ledger.record import HOUR_NS, Spent, disturbance_of, usage_of
from pipeline.ledger.shapes import Event, HistoryEntry, Opened, Row, Started
from pipeline.ledger.values import Value, measured
from pipeline.runs.rows import Read, by_first, by_first_alone, identity, make_row, unread_for
from pipeline.runs.running import Running
from pipeline.runs.session import Session
from pipeline.runs.timeline import Trace
from pipeline.stages.base import stage_of
from pipeline.stages.context import Output
from pipeline.store.artifacts import plain

GONE = "the process that read it is gone"
UNFINISHED = ("KILLED", "FAILED")


@dataclass(frozen=True, slots=True)
class Past:
    """What was spent before, by the checkpoints in use.

    Attributes:
        windows: Of all attempts of this run so far.
        spans: Of its earlier attempts, by attempt.
        traces: How far a stage came in its steps, by arm, seed and attempt.
        led: What led to the checkpoint that a stage resumes from, by arm and seed.
        rows: Of unfinished attempts, and of what was taken over from other runs.
        finished: Rows of earlier attempts that finished.
        changed: Those of `rows` that no journal has in this form yet.
        overhead_ns: Device-nanoseconds of earlier attempts outside of windows, by phase.
        compare_ns: Of their comparison passes, by phase.
        reused_h: Device-hours that other runs spent and this one takes over.
    """

    windows: tuple[Window, ...] = ()
    spans: Mapping[int, Span] = field(default_factory=dict)
    traces: Mapping[tuple[str, int, int], Trace] = field(default_factory=dict)
    led: Mapping[tuple[str, int], list[HistoryEntry]] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    finished: tuple[Row, ...] = ()
    changed: tuple[Row, ...] = ()
    overhead_ns: dict[str, int] = field(default_factory=dict)
    compare_ns: dict[str, int] = field(default_factory=dict)
    reused_h: float = 0.0

    def trace(self, arm: str, seed: int, attempt: int) -> Trace:
        """Return a copy of the trace of an attempt at a stage, a new one where there is none."""
        return replace(self.traces.get((arm, seed, attempt), Trace()))

    def with_trace(self, arm: str, seed: int, attempt: int, trace: Trace) -> Past:
        """Return the past with this trace."""
        return replace(self, traces={**self.traces, (arm, seed, attempt): trace})

    def with_row(self, row: Row) -> Past:
        """Return the past with a row in the place of an earlier version of itself."""
        others = [each for each in self.rows if identity(each) != identity(row)]
        at = next(
            (n for n, each in enumerate(self.rows) if identity(each) == identity(row)), len(others)
        )
        return replace(self, rows=(*others[:at], row, *others[at:]), changed=(*self.changed, row))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Who reads a journal: the next attempt at the run, which makes rows of what has none; or,
    without a session, somebody who asks for its hours alone.
    """

    run_id: str
    session: Session | None = None


def read_past(session: Session, events: list[Event]) -> Past:
    """Return what earlier attempts of this run spent: hours of a killed process are not lost."""
    return _read(_Reader(session.run_id, session), events)


def booked_again(events: list[Event], run_id: str) -> Past:
    """Return windows, spans and overhead of a run by its whole journal, its last attempt among
    them. No row is made: all of them are in the journal.
    """
    return _read(_Reader(run_id), events)


def _read(reader: _Reader, events: list[Event]) -> Past:
    rows = [event["row"] for event in events if event["e"] == "row"]
    # A row is journaled anew when it changes: the last version counts.
    newest = {
        (row["arm"], row["seed"], row["attempt"]): row for row in rows if row["reused"] is None
    }
    past = Past(
        rows=tuple(row for row in newest.values() if row["status"] in UNFINISHED),
        finished=tuple(row for row in newest.values() if row["status"] == "FINISHED"),
    )
    for part in _by_attempt(events):
        past = _with_attempt(reader, past, part, set(newest))
    return past


def from_checkpoint(
    running: Running, arm: str, seed: int, step: int, history: list[HistoryEntry]
) -> None:
    """Have the run in progress book what came before as the checkpoint that a stage resumes from
    has it.
    """
    session, timeline, book = running.session, running.timeline, running.book
    now = Past(
        windows=tuple(timeline.windows),
        spans=timeline.spans,
        traces=timeline.traces,
        led=timeline.led,
        rows=tuple(book.rows),
        reused_h=book.reused_h,
    )
    reader = _Reader(session.run_id, session)
    past = _resumed(reader, now, arm, seed, session.number, step, history)
    timeline.windows, timeline.spans = list(past.windows), dict(past.spans)
    # the trace of this attempt is being written to: it stays the same object
    own = timeline.trace(arm, seed, session.number)
    own.saved = own.reached = step
    timeline.traces |= {key: each for key, each in past.traces.items() if key[2] != session.number}
    timeline.led = dict(past.led)
    book.reused_h = past.reused_h
    for row in past.changed:
        book.add(row)


def _by_attempt(events: list[Event]) -> list[list[Event]]:
    starts = [index for index, event in enumerate(events) if event["e"] == "run_start"]
    ends = [*starts, len(events)][1:]
    return [events[first:end] for first, end in zip(starts, ends, strict=True)]


def why_unusable(events: list[Event], attempts: int) -> str | None:
    """Return what keeps the journal of an unfinished run from being resumed, or None.

    A kill tears the last line of a process, which is passed over. Anything else that is missing
    would make a run that says less than it took, or books a second twice.

    Args:
        events: That are sound, each for itself.
        attempts: How many times the run was started.
    """
    starts = [index for index, event in enumerate(events) if event["e"] == "run_start"]
    if [_start(events[index:])["attempt"] for index in starts] != list(range(1, attempts + 1)):
        return "its attempts are not all there"
    reasons = (_why_attempt_unusable(part) for part in _by_attempt(events))
    return next((why for why in reasons if why is not None), None)


def _why_attempt_unusable(events: list[Event]) -> str | None:
    number, at_ns, last_ns = _start(events)["attempt"], _started_ns(events), _last_ns(events)
    opened: Opened | None = None
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


def _saved_ns(opened: Opened | None, events: list[Event]) -> int:
    """Return when the last checkpoint of a window that was open at the end was made."""
    if opened is None:
        return 0
    saved = [event for event in events[events.index(opened) :] if event["e"] == "checkpoint"]
    return opened["start_ns"] + (sum(saved[-1]["phases_ns"].values()) if saved else 0)


def _with_attempt(
    reader: _Reader, past: Past, events: list[Event], written: set[tuple[str, int, int]]
) -> Past:
    """Return the past with one more attempt.

    Args:
        written: Arm, seed and attempt of the rows that its process wrote.
    """
    events = _with_torn(events)
    start = _start(events)
    number = start["attempt"]
    devices = start.get("devices", 1)  # before it was journaled, a process drove one
    span = Span(_started_ns(events), _last_ns(events), devices)
    past = replace(past, spans={**past.spans, number: span})
    for event in events:
        past = _with_trace(past, event)
        if event["e"] == "resume":
            of_arm = event["arm"], event["seed"]
            past = _resumed(reader, past, *of_arm, number, event["step"], event["history"])
    closed = [event for event in events if event["e"] == "window"]
    windows = [Window(**event["window"]) for event in closed]
    opened = [event for event in events if event["e"] == "open"]
    # One window is open at a time, so only the last one can be left over.
    if len(opened) > len(closed):
        windows.append(_closed(opened[-1], events))
    past = _with_outside(replace(past, windows=(*past.windows, *windows)), number, events)
    arms = ((event["arm"], event["seed"]) for event in opened if event["arm"] is not None)
    for arm, seed in dict.fromkeys(arms):
        if reader.session is not None and (arm, seed, number) not in written:
            past = _with_killed_row(reader.session, past, arm, seed, number, events)
    return past


def _with_torn(events: list[Event]) -> list[Event]:
    """Return the lines of an attempt with windows of the stages that worked side by side when its
    process was killed: each took its share of the time until the last sign of life, and keeps
    what led to its last checkpoint.
    """
    begun = next((event for event in reversed(events) if event["e"] == "beside"), None)
    if begun is None:
        return events
    after = events[events.index(begun) + 1 :]
    of = lambda event: (event["arm"], event["seed"])
    closed = {of(event): event["window"] for event in after if event["e"] == "window"}
    torn = [of(each) for each in begun["arms"] if of(each) not in closed]
    if not torn:
        return events
    # one of them may have been opened, to be closed at once
    events = [
        event
        for event in events
        if not (event["e"] == "open" and of(event) in torn and event in after)
    ]
    last_ns, start_ns = _last_ns(events), begun["start_ns"]
    start_ns = max((window["end_ns"] for window in closed.values()), default=start_ns)
    elapsed_ns = (last_ns - begun["start_ns"]) // begun["ranks"]
    for arm, seed in torn:
        saved = [
            event for event in after if event["e"] == "checkpoint" and of(event) == (arm, seed)
        ]
        phases_ns = saved[-1]["phases_ns"] if saved else {}
        window = Window(
            kind="work",
            arm=arm,
            seed=seed,
            attempt=begun["attempt"],
            start_ns=start_ns,
            end_ns=start_ns + elapsed_ns,
            kept_ns=min(elapsed_ns, sum(phases_ns.values())),
            beside=begun["ranks"],
        )
        line = {"t": events[-1]["t"], "mono_ns": last_ns, "arm": arm, "seed": seed}
        opened = {**line, "e": "open", "kind": "work", "attempt": begun["attempt"]}
        ended = {**line, "e": "window", "window": plain(window), "phases_ns": phases_ns}
        events = [*events, {**opened, "start_ns": start_ns}, ended]  # pyright: ignore
        start_ns += elapsed_ns
    return events


def _with_trace(past: Past, event: Event) -> Past:
    if event["e"] != "points" and event["e"] != "checkpoint" and event["e"] != "resume":
        return past
    of_arm = event["arm"], event["seed"], event["attempt"]
    trace = past.trace(*of_arm)
    trace.reached = max(trace.reached, event["step"])
    # A point says that a step was done; only checkpoints and resumes say what is secured.
    if event["e"] != "points":
        trace.saved = event["step"]
    return past.with_trace(*of_arm, trace)


def _start(events: list[Event]) -> Started:
    """Return the first line of an attempt."""
    first = events[0]
    assert first["e"] == "run_start", "attempts are cut there"
    return first


def _started_ns(events: list[Event]) -> int:
    start = _start(events)
    return start.get("started_ns", start["mono_ns"])


def _closed(opened: Opened, events: list[Event]) -> Window:
    """Close a window that was open when the process was killed: kept up to its last checkpoint."""
    end_ns = _last_ns(events)
    kept_ns = end_ns - opened["start_ns"] if opened["kind"] == "compare" else 0
    saved = [event for event in events[events.index(opened) :] if event["e"] == "checkpoint"]
    if saved and opened["kind"] == "work":
        # Phases sum to the time of the window until the checkpoint.
        kept_ns = sum(saved[-1]["phases_ns"].values())
    return Window(
        kind=opened["kind"],
        arm=opened["arm"],
        seed=opened["seed"],
        attempt=opened["attempt"],
        start_ns=opened["start_ns"],
        end_ns=end_ns,
        kept_ns=kept_ns,
    )


def _last_ns(events: list[Event]) -> int:
    """Return when a process was last heard of; a line may once have been stamped before it waited
    for its turn.
    """
    return max(event["mono_ns"] for event in events)


def _with_outside(past: Past, number: int, events: list[Event]) -> Past:
    """Return the past with the phases of overhead and comparison; of a process that was killed,
    those up to its last mark.
    """
    span = past.spans[number]
    windows = [window for window in past.windows if window.attempt == number]
    compared = [
        total(event["phases_ns"], times=span.devices)
        for event in events
        if event["e"] == "window" and event["window"]["kind"] == "compare"
    ]
    compared_ns = (
        sum(window.elapsed_ns for window in windows if window.kind == "compare") * span.devices
    )
    # Of a pass that was killed: its time is known, its phases are not.
    torn_ns = compared_ns - sum(sum(phases.values()) for phases in compared)
    compare_ns = total(past.compare_ns, *compared, {"other": torn_ns})
    ended = next((event["run"] for event in reversed(events) if event["e"] == "run_end"), None)
    # it had summed up the attempts before it, too
    if ended is not None and "phases_device_ns" in ended:
        known_ns = difference(ended["phases_device_ns"]["overhead"], past.overhead_ns)
    else:
        known_ns = total(_outside_until_last_mark(span, events), times=span.devices)
    overhead_ns = span.device_ns - sum(window.elapsed_ns for window in windows) * span.devices
    # What no mark covers is waste, `unattributed`, and not dropped.
    lost_ns = {"other": overhead_ns - sum(known_ns.values())}
    return replace(
        past, compare_ns=compare_ns, overhead_ns=total(past.overhead_ns, known_ns, lost_ns)
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


def _with_killed_row(
    session: Session, past: Past, arm: str, seed: int, number: int, events: list[Event]
) -> Past:
    """Return the past with the row that a killed process could not write, from its windows."""
    # Steps after the checkpoint will be replayed.
    spent = Spent(lost_as="rollback")
    for window in past.windows:
        if (window.arm, window.seed, window.attempt) == (arm, seed, number):
            spent.work_ns += window.kept_ns if window.kind == "work" else 0
            spent.assess_ns += window.kept_ns if window.kind == "assess" else 0
            spent.lost_ns += window.lost_ns
    own = [event for event in events if (event.get("arm"), event.get("seed")) == (arm, seed)]
    at_work = by_first(session.run, stage_of(session.run, arm))
    for event in own:
        beside = event["window"].get("beside", 1) if event["e"] == "window" else 1
        if event["e"] == "window" and beside > 1:
            spent.beside = beside
            spent.add_beside(event["phases_ns"])
        elif event["e"] == "window":
            is_work = event["window"]["kind"] == "work"
            spent.add_phases(event["phases_ns"], at_work if is_work else by_first_alone)
    saved = [event for event in own if event["e"] == "checkpoint"]
    if saved and not spent.phases_ns:
        spent.add_phases(saved[-1]["phases_ns"], at_work)
    # Nothing to resume from: the whole attempt was in vain.
    if not spent.work_ns:
        spent.lost_as = "failed_attempt"
    why = "the process was killed; hours up to its last sign of life"
    row = _unfinished_row(session, past, arm, seed, number, spent, "KILLED", why, truncated=True)
    return past.with_row(row)


def _resumed(
    reader: _Reader,
    past: Past,
    arm: str,
    seed: int,
    number: int,
    step: int,
    history: list[HistoryEntry],
) -> Past:
    """Return the past as the checkpoint that attempt `number` resumes from has it.

    Where a newer checkpoint was damaged, the steps from this one on are rolled back. Where another
    run wrote it, that run's time up to here is reused.

    Args:
        step: Of the checkpoint; 0 without one.
        history: What led to it, as `Timeline.history` gave it.
    """
    trace = past.trace(arm, seed, number)
    trace.saved = trace.reached = step
    past = past.with_trace(arm, seed, number, trace)
    past = replace(past, led={**past.led, (arm, seed): history})
    by_attempt = {(entry["run_id"], entry["attempt"]): entry for entry in history}
    for index, window in enumerate(past.windows):
        of_arm = (window.kind, window.arm, window.seed) == ("work", arm, seed)
        if of_arm and window.attempt < number:
            past = _rebooked(reader, past, index, by_attempt.get((reader.run_id, window.attempt)))
    for (run_id, other), entry in by_attempt.items():
        if run_id != reader.run_id and reader.session is not None:
            past = _taken_over(reader.session, past, arm, seed, run_id, other, entry)
    return past


def _rebooked(reader: _Reader, past: Past, index: int, entry: HistoryEntry | None) -> Past:
    """Return the past with a window of an unfinished attempt as the checkpoint in use has it, and
    its row corrected.
    """
    window = past.windows[index]
    assert window.arm is not None
    of_arm = window.arm, window.seed, window.attempt
    rows = [row for row in past.rows if identity(row) == (*of_arm, None)]
    trace = past.trace(*of_arm)
    # It resumes from where this attempt ended: its window is booked rightly already.
    was_its_last = entry is not None and entry["step"] == trace.saved
    if not rows or rows[0]["status"] not in UNFINISHED or (was_its_last and window.kept_ns):
        return past
    phases_ns = {} if entry is None else entry["phases_ns"]
    kept_ns = sum(phases_ns.values())
    # A process that is killed between writing a checkpoint and journaling it was alive longer than
    # its journal says.
    end_ns = max(window.end_ns, window.start_ns + kept_ns)
    booked = replace(window, kept_ns=kept_ns, end_ns=end_ns)
    if booked == window:
        return past
    span = past.spans[window.attempt]
    # A window has to lie inside its attempt.
    span = span._replace(end_ns=max(span.end_ns, booked.end_ns))
    trace.saved = 0 if entry is None else entry["step"]
    windows = (*past.windows[:index], booked, *past.windows[index + 1 :])
    past = replace(past, windows=windows, spans={**past.spans, window.attempt: span})
    past = past.with_trace(*of_arm, trace)
    if reader.session is None:
        return past
    spent = _spent(booked.kept_ns, phases_ns, booked.beside)
    spent.lost_ns, spent.lost_as = booked.lost_ns, "rollback"
    row, record = rows[0], rows[0]["ledger"]
    read = Read(
        {name: Value.from_json(value) for name, value in record["memory"].items()},
        usage_of(record),
        disturbance_of(record),
    )
    return past.with_row(
        _unfinished_row(
            reader.session,
            past,
            *of_arm,
            spent,
            row["status"],
            row["why"],
            read=read,
            truncated=record["conditions"]["truncated"],
        )
    )


def _taken_over(
    session: Session, past: Past, arm: str, seed: int, run_id: str, number: int, entry: HistoryEntry
) -> Past:
    """Return the past with the part of another run's attempt that led to the checkpoint, as
    reused.
    """
    # Resumed a second time: those hours are counted already.
    if (arm, seed, number, run_id) in {identity(row) for row in past.rows}:
        return past
    kept_ns = sum(entry["phases_ns"].values())
    spent = _spent(kept_ns, entry["phases_ns"], entry.get("beside", 1))
    why = f"up to its checkpoint of step {entry['step']}"
    row = _unfinished_row(
        session, past, arm, seed, number, spent, "KILLED", why, reused=run_id, lost=0
    )
    return replace(past, reused_h=past.reused_h + spent.work_ns / HOUR_NS).with_row(row)


def _spent(work_ns: int, phases_ns: dict[str, int], beside: int) -> Spent:
    spent = Spent(work_ns=work_ns, beside=beside)
    if beside > 1:
        spent.add_beside(phases_ns)
    else:
        spent.add_phases(phases_ns)
    return spent


def _unfinished_row(
    session: Session,
    past: Past,
    arm: str,
    seed: int,
    number: int,
    spent: Spent,
    status: str,
    why: str | None,
    *,
    reused: str | None = None,
    lost: int | None = None,
    read: Read | None = None,
    truncated: bool = False,
) -> Row:
    steps = past.trace(arm, seed, number).lost if lost is None else lost
    known = number in past.spans and reused is None
    return make_row(
        session,
        arm,
        stage_of(session.run, arm),
        seed,
        spent,
        Output(counts={"steps_lost": measured(steps)}),
        status,
        why,
        read=read or unread_for(GONE),
        devices=past.spans[number].devices if known else session.devices,
        number=number,
        reused=reused,
        truncated=truncated,
    )
