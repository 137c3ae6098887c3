"""Rows: what one arm's windows in one attempt took, as result.json holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.settings.precision import Precision
from pipeline.config.settings.run import Run
from pipeline.errors import BudgetSpent, Preempted
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.disturbance import Disturbance
from pipeline.ledger.disturbance import unread as disturbance_unread
from pipeline.ledger.gpu_usage import Usage
from pipeline.ledger.gpu_usage import unread as usage_unread
from pipeline.ledger.memory import MEMORY, unread
from pipeline.ledger.peaks import device_name, peak
from pipeline.ledger.record import Spent, ledger
from pipeline.ledger.shapes import (
    ArtifactRecord,
    Figures,
    HoursPart,
    Made,
    Quality,
    QualityFigure,
    QuantizationRecord,
    RankTime,
    Row,
    Unchanged,
)
from pipeline.ledger.values import Value, measured, null
from pipeline.runs.session import Session
from pipeline.runs.timeline import OpenWindow, Timeline
from pipeline.stages.base import Stage, made_arms_read
from pipeline.stages.context import Output

NEVER = "not read when the artifact was made"
LOST = "the quantized model's loss is no number"
BY_FIRST = ("checkpoint", "eval", "log")  # phases of a split stage that the first rank does
ELSEWHERE = "measured while the artifact was made; see that row"


@dataclass(frozen=True, slots=True)
class Read:
    """What was read of a device while an arm's windows were open, beside the clock."""

    memory: dict[str, Value]
    usage: Usage
    disturbance: Disturbance


def unread_for(why: str) -> Read:
    """Return what is on a row where nothing could be read, with the reason."""
    return Read(unread(why), usage_unread(why), disturbance_unread(why))


def make_row(
    session: Session,
    name: str,
    stage: Stage,
    seed: int,
    spent: Spent,
    output: Output,
    status: str,
    why: str | None,
    *,
    read: Read,
    devices: int,
    number: int | None = None,
    reused: str | None = None,
    truncated: bool = False,
) -> Row:
    """Return the row of a stage attempt from what it spent.

    Args:
        devices: That the attempt was attached to. Only what was made on as many devices is reused:
            their number is part of a stage's key.
        number: Of the attempt; this session's unless given.
        reused: The run that spent it, if not this one.
    """
    run = session.run
    control = stage.control(run)
    return {
        "arm": name,
        "stage": name,
        "type": stage.type,
        "seed": seed,
        "attempt": number or session.number,
        "status": status,
        "why": why,
        "reused": reused,
        "depends_on": made_arms_read(stage, run),
        "inputs": stage.inputs(run),
        "makes": stage.makes,
        "word": stage.word,
        "control": None if control is None else {"of": control.of, "matches": control.matches},
        "artifact": None,
        "quality": {},
        "recovery": _recovery(output),
        "quantization": _quantization(output),
        "serving": {},
        "unchanged": _unchanged(stage, output) if status == "FINISHED" else None,
        "ledger": {
            "identity": session.identity,
            "placement": session.placement,
            **ledger(
                spent,
                output.counts,
                devices=devices,
                device_kind=device_of(session.device).kind,
                cost=run.cost,
                memory=read.memory,
                usage=read.usage,
                disturbance=read.disturbance,
                is_training=stage.trains(run),
                seconds_in_steps=output.seconds_in_steps,
                peak=attempted(
                    lambda: _peak(session, stage, output),
                    lambda why: null(unmeasured("the peak rate", why)),
                ),
                granted=session.grant,
                truncated=truncated,
                timeline=output.gpu_timeline,
            ),
        },
    }


def by_first(run: Run, stage: Stage) -> Callable[[str], bool]:
    """Return what tells of a phase of a stage's work whether the first rank does it while the
    others wait.
    """
    if not stage.is_split(run):
        return lambda _: True
    # where ranks share the weights, each evaluates
    return lambda phase: phase in BY_FIRST and not (phase == "eval" and run.parallel.mode.shards)


def by_first_alone(_: str) -> bool:
    """Tell so of every phase of an assessment that is not shared."""
    return True


def made_spent(session: Session, stage: Stage, made: Made) -> Spent:
    """Return what the work on an artifact took in this attempt; that of an earlier attempt, or of
    another run, stands on that one's row.
    """
    spent = Spent()
    if is_of_this_attempt(session, made):
        _add_work(spent, session, stage, made)
    return spent


def _add_work(spent: Spent, session: Session, stage: Stage, made: Made) -> None:
    """Add what the work on an artifact took."""
    spent.work_ns = made["work_ns"]
    spent.ranks = made.get("ranks", [])
    spent.beside = made.get("beside", 1)
    if spent.beside > 1:
        spent.add_beside(made["phases_ns"])
        return
    _add_window(spent, session, made["phases_ns"], spent.ranks, by_first(session.run, stage))


def _add_assessment(spent: Spent, session: Session, window: OpenWindow) -> None:
    """Add the phases of an assessment."""
    spent.assess_ranks = window.ranks
    _add_window(spent, session, window.phases_ns, window.ranks, by_first_alone)


def _add_window(
    spent: Spent,
    session: Session,
    phases_ns: dict[str, int],
    ranks: list[RankTime],
    alone: Callable[[str], bool],
) -> None:
    """Add the phases of a window: by device, where ranks told them; else those in which one device
    works `alone` are waited for by the others.
    """
    others = _of_other_devices(ranks, on_hosts=session.device.type == "cpu")
    if len(others) == session.devices - 1 > 0:
        spent.add_told(phases_ns, others)
    else:
        spent.add_phases(phases_ns, alone)


def _of_other_devices(ranks: list[RankTime], *, on_hosts: bool) -> list[dict[str, float]]:
    """Return the self times of each device but the first.

    Args:
        on_hosts: A host is one device, whose time is that of its ranks in the mean.
    """
    if not on_hosts:
        return [dict(each["phases_ns"]) for each in ranks[1:]]
    hosts: dict[str, list[RankTime]] = {}
    for each in ranks:
        hosts.setdefault(each["host"], []).append(each)
    return [
        {
            name: sum(each["phases_ns"].get(name, 0) for each in there) / len(there)
            for name in {name for each in there for name in each["phases_ns"]}
        }
        for there in list(hosts.values())[1:]
    ]


def is_of_this_attempt(session: Session, made: Made) -> bool:
    """Return whether an artifact was made in this attempt."""
    return (made["run_id"], made["attempt"]) == (session.run_id, session.number)


def made_row(
    timeline: Timeline,
    name: str,
    stage: Stage,
    seed: int,
    made: Made,
    assess: OpenWindow | None,
    quality: Quality,
) -> Row:
    """Return the row of an artifact that was made, and assessed in `assess` where it is one to be
    assessed.
    """
    session = timeline.session
    spent = made_spent(session, stage, made)
    if assess is not None:
        spent.assess_ns = assess.elapsed_ns
        _add_assessment(spent, session, assess)
    # Peaks are of a process: those of another one stand on its own row.
    memory = memory_of(made) if is_of_this_attempt(session, made) else unread(ELSEWHERE)
    read = Read(memory, timeline.usage(name, seed), timeline.disturbance(name, seed))
    row = make_row(
        session,
        name,
        stage,
        seed,
        spent,
        Output.from_json(made["output"]),
        "FINISHED",
        None,
        read=read,
        devices=session.devices,
    )
    return {**row, "artifact": made["artifact"], "quality": quality}


def reused_work(
    session: Session, name: str, stage: Stage, seed: int, made: Made, quality: Quality
) -> Row:
    """Return the row of work that another run did, where this one assesses what it made."""
    why = "the work alone, of another run; this one assessed what it made"
    unsaid: QualityFigure = {**null(why).to_json(), "ci": None, "n": None, "items": None}
    never = unread_for(NEVER)
    read = Read(
        memory_of(made),
        Usage.from_json(made["usage"]) if "usage" in made else never.usage,
        Disturbance.from_json(made["disturbance"]) if "disturbance" in made else never.disturbance,
    )
    spent = Spent()
    _add_work(spent, session, stage, made)
    row = make_row(
        session,
        name,
        stage,
        seed,
        spent,
        Output.from_json(made["output"]),
        "FINISHED",
        why,
        read=read,
        devices=session.devices,
        number=made["attempt"],
        reused=made["run_id"],
    )
    return {**row, "quality": dict.fromkeys(quality, unsaid)}


def broken_row(
    timeline: Timeline,
    name: str,
    stage: Stage,
    seed: int,
    window: OpenWindow | None,
    error: BaseException,
    made: Made | None = None,
) -> Row:
    """Return the row of a stage attempt that did not come to its end, with the hours it took all
    the same.
    """
    session = timeline.session
    trace = timeline.trace(name, seed, session.number)
    spent = Spent() if made is None else made_spent(session, stage, made)
    alone = by_first(session.run, stage) if made is None else by_first_alone
    kept = isinstance(error, Preempted | BudgetSpent)
    if window is not None:
        spent.beside, spent.assess_ranks = max(spent.beside, window.beside), window.ranks

    def add(phases_ns: dict[str, int], ranks: list[RankTime]) -> None:
        if window is not None and window.beside > 1:
            spent.add_beside(phases_ns)
        else:
            _add_window(spent, session, phases_ns, ranks, alone)

    if window is not None and kept:  # a checkpoint is on disk: the next attempt resumes from it
        if made is None:
            spent.work_ns += window.elapsed_ns
        else:
            spent.assess_ns += window.elapsed_ns
        add(window.phases_ns, window.ranks)
    elif window is not None:
        spent.lost_ns = window.elapsed_ns
        # the last checkpoint is there to resume from
        if made is None and isinstance(error, KeyboardInterrupt):
            spent.work_ns, spent.lost_as = sum(trace.saved_ns.values()), "rollback"
            spent.lost_ns -= spent.work_ns
            add(trace.saved_ns, [])
    status = "KILLED" if kept or isinstance(error, KeyboardInterrupt) else "FAILED"
    output = Output(counts={"steps_lost": measured(trace.lost)})
    return live_row(
        timeline, name, stage, seed, spent, output, status, str(error) or _unsaid(error)
    )


def live_row(
    timeline: Timeline,
    name: str,
    stage: Stage,
    seed: int,
    spent: Spent,
    output: Output,
    status: str,
    why: str | None,
) -> Row:
    """Return a row with what the device says now."""
    session = timeline.session
    read = Read(
        session.memory.read(session.device),
        timeline.usage(name, seed),
        timeline.disturbance(name, seed),
    )
    return make_row(
        session, name, stage, seed, spent, output, status, why, read=read, devices=session.devices
    )


def skipped_row(timeline: Timeline, name: str, stage: Stage, seed: int, why: str) -> Row:
    """Return the row of a stage that this device cannot do: nulls with the reason."""
    row = live_row(timeline, name, stage, seed, Spent(), Output(), "SKIPPED", why)
    blank(row["ledger"], why)
    return row


def _unsaid(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__


def identity(row: Row) -> tuple[Any, ...]:
    """Return what tells a row from all others of a run."""
    return row["arm"], row["seed"], row["attempt"], row["reused"]


def artifact_of(row: Row) -> ArtifactRecord:
    """Return the artifact of a row that has one."""
    assert row["artifact"] is not None, row["arm"]
    return row["artifact"]


def items_of(row: Row, key: str) -> Path:
    """Return where the per-document values of a quality of a row lie, which has some."""
    items = row["quality"][key]["items"]
    assert items is not None, key
    return Path(items)


def hours_in(row: Row, part: HoursPart) -> float:
    """Return a part of a row's device-hours; 0 where it is null."""
    return Value.from_json(row["ledger"]["device_hours"][part]).value or 0.0


def moved(row: Row, artifact: ArtifactRecord, items: Path) -> Row:
    """Return a finished row with the paths that its files have now."""
    if row["artifact"] is None:
        return row
    quality: Quality = {
        key: (
            figure
            if figure["items"] is None
            else {**figure, "items": str(items.with_name(Path(figure["items"]).name))}
        )
        for key, figure in row["quality"].items()
    }
    return {**row, "artifact": artifact, "quality": quality}


def blank(record: Any, why: str) -> None:
    """Turn every figure of a ledger, at any depth, into a null with one reason."""
    for name, value in record.items():
        if isinstance(value, dict) and "why_missing" in value:
            record[name] = null(why).to_json()
        elif isinstance(value, dict):
            blank(value, why)


def _recovery(output: Output) -> Figures:
    """Return what a fallback loses on validation; empty for other stages."""
    read = output.about.get("recovery")
    if read is None:
        return {}
    found = {name: read[name] for name in ("loss", "kl")}
    return {
        name: (null(LOST) if value is None else measured(value)).to_json()
        for name, value in found.items()
    }


def _quantization(output: Output) -> QuantizationRecord | None:
    """Return the format of what a stage made, and how much of the model is in it; null where
    nothing was quantized.
    """
    made = output.about.get("quantization")
    if made is None or "quantized_share" not in made:
        return None
    return {
        "format": made["format"],
        "layers": made["quantized_layers"],
        "share": measured(made["quantized_share"]).to_json(),
    }


def _unchanged(stage: Stage, output: Output) -> Unchanged | None:
    """Return which model a stage left as it is though it was to change it, and why; else None."""
    why = stage.left_unchanged(output)
    return None if why is None else {"as": stage.starts_from() or "", "why": why}


def memory_of(made: Made) -> dict[str, Value]:
    """Return what was read while an artifact was made; an older release read less."""
    never = null(NEVER).to_json()
    return {part: Value.from_json(made["memory"].get(part, never)) for part in MEMORY}


def _peak(session: Session, stage: Stage, output: Output) -> Value:
    """Return the peak rate of one of this run's devices in the arithmetic a stage trains in."""
    named = stage.precisions("", session.run)
    if not named:
        return null("this stage trains nothing")
    in_force, found = named[0].precision, output.about.get("precision")
    if in_force is not Precision.auto:
        chosen = in_force.value
    elif found is None:
        return null("no precision was chosen yet")
    else:
        chosen = found["chosen"]
    precision = chosen.partition("_")[0]  # bf16_pure, fp8_rowwise: of the same products
    declared = getattr(session.run.hardware.peak_tflops, precision)
    return peak(device_name(session.device), precision, declared)
