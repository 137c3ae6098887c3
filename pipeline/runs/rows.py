"""Rows: what one arm's windows in one attempt took, as result.json holds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings import Precision, Run
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
from pipeline.ledger.values import Value, measured, null
from pipeline.stages.context import Output
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.settings import BASE, training_precision

if TYPE_CHECKING:
    from pipeline.runs.attempt import Attempt, OpenWindow

Row = dict[str, Any]
Record = dict[str, Any]
"""What the store remembers of work or of an assessment; plain JSON."""
TRAINING = ("train", "distill", "recover")
"""Types of stages that train: of these goodput is the share of productive time, of others it is
null.
"""
NEVER = "not read when the artifact was made"
LOST = "the quantized model's loss is no number"
ELSEWHERE = "measured while the artifact was made; see that row"


def depends_on(stage: Any, run: Run) -> list[str]:
    """Return the arms that a stage reads; the given model is none."""
    return [arm for arm in stage.reads(run) if arm != BASE]


def make_row(
    attempt: Attempt,
    name: str,
    stage: Any,
    seed: int,
    spent: Spent,
    output: Output,
    status: str,
    why: str | None,
    *,
    number: int | None = None,
    reused: str | None = None,
    memory: dict[str, Value] | None = None,
    usage: Usage | None = None,
    disturbance: Disturbance | None = None,
    truncated: bool = False,
) -> Row:
    """Return the row of a stage attempt from what it spent; `reused` is the run that spent it, if
    not this one.

    Only what was made on as many devices is reused: their number is part of a stage's key.
    """
    number = number or attempt.number
    devices = attempt.devices if reused else attempt.devices_in(number)
    return {
        "arm": name,
        "stage": name,
        "type": stage.type,
        "seed": seed,
        "attempt": number,
        "status": status,
        "why": why,
        "reused": reused,
        "depends_on": depends_on(stage, attempt.run),
        "artifact": None,
        "quality": {},
        "recovery": _recovery(output),
        "quantization": _quantization(output),
        "serving": {},
        "unchanged": _unchanged(stage, output) if status == "FINISHED" else None,
        "ledger": (
            {"identity": attempt.identity, "placement": attempt.placement}
            | ledger(
                spent,
                output.counts,
                devices=devices,
                device_kind=device_of(attempt.device).kind,
                cost=attempt.run.cost,
                memory=memory or attempt.memory.read(attempt.device),
                usage=usage or attempt.usage(name, seed),
                disturbance=disturbance or attempt.disturbance(name, seed),
                is_training=stage.type in TRAINING,
                seconds_in_steps=output.seconds_in_steps,
                peak=attempted(
                    lambda: _peak(attempt, stage, output),
                    lambda why: null(unmeasured("the peak rate", why)),
                ),
                granted=attempt.grant,
                truncated=truncated,
                timeline=output.gpu_timeline,
            )
        ),
    }


def made_row(
    attempt: Attempt,
    name: str,
    stage: Any,
    seed: int,
    made: Record,
    assess: OpenWindow,
    quality: dict[str, Any],
) -> Row:
    """Return the finished row. Work of an earlier attempt, or of another run, stands on that one's
    row.
    """
    spent = Spent(assess_ns=assess.elapsed_ns)
    spent.add_phases(assess.phases_ns)
    memory = unread(ELSEWHERE)
    if (made["run_id"], made["attempt"]) == (attempt.run_id, attempt.number):
        spent.work_ns = made["work_ns"]
        spent.add_phases(made["phases_ns"])
        memory = _memory(made)
    row = make_row(
        attempt,
        name,
        stage,
        seed,
        spent,
        Output.from_json(made["output"]),
        "FINISHED",
        None,
        memory=memory,
    )
    return {**row, "artifact": made["artifact"], "quality": quality}


def reused_work(
    attempt: Attempt, name: str, stage: Any, seed: int, made: Record, quality: dict[str, Any]
) -> Row:
    """Return the row of work that another run did, where this one assesses what it made."""
    why = "the work alone, of another run; this one assessed what it made"
    unsaid = {**null(why).to_json(), "ci": None, "n": None, "items": None}
    spent, output = (
        Spent(made["work_ns"], phases_ns=made["phases_ns"]),
        Output.from_json(made["output"]),
    )
    usage = Usage.from_json(made["usage"]) if "usage" in made else usage_unread(NEVER)
    disturbance = (
        Disturbance.from_json(made["disturbance"])
        if "disturbance" in made
        else disturbance_unread(NEVER)
    )
    row = make_row(
        attempt,
        name,
        stage,
        seed,
        spent,
        output,
        "FINISHED",
        why,
        number=made["attempt"],
        reused=made["run_id"],
        memory=_memory(made),
        usage=usage,
        disturbance=disturbance,
    )
    return {**row, "quality": dict.fromkeys(quality, unsaid)}


def broken_row(
    attempt: Attempt,
    name: str,
    stage: Any,
    seed: int,
    window: OpenWindow | None,
    error: BaseException,
    made: Record | None = None,
) -> Row:
    """Return the row of a stage attempt that did not come to its end, with the hours it took all
    the same.
    """
    spent = Spent()
    if made is not None and (made["run_id"], made["attempt"]) == (attempt.run_id, attempt.number):
        spent.work_ns = made["work_ns"]
        spent.add_phases(made["phases_ns"])
    kept = isinstance(error, Preempted | BudgetSpent)
    if window is not None and kept:  # a checkpoint is on disk: the next attempt goes on from here
        spent.work_ns += window.elapsed_ns
        spent.add_phases(window.phases_ns)
    elif window is not None:
        spent.lost_ns = window.elapsed_ns
        # the last checkpoint is there to go on from
        if made is None and isinstance(error, KeyboardInterrupt):
            saved_ns = attempt.trace(name, seed, attempt.number).saved_ns
            spent.work_ns, spent.lost_as = sum(saved_ns.values()), "rollback"
            spent.lost_ns -= spent.work_ns
            spent.add_phases(saved_ns)
    status = "KILLED" if kept or isinstance(error, KeyboardInterrupt) else "FAILED"
    lost = {"steps_lost": measured(attempt.trace(name, seed, attempt.number).lost)}
    return make_row(
        attempt, name, stage, seed, spent, Output(counts=lost), status, str(error) or _unsaid(error)
    )


def _unsaid(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__


def identity(row: Row) -> tuple[Any, ...]:
    """Return what tells a row from all others of a run."""
    return row["arm"], row["seed"], row["attempt"], row["reused"]


def hours_in(row: Row, part: str) -> float:
    """Return a part of a row's device-hours; 0 where it is null."""
    return Value.from_json(row["ledger"]["device_hours"][part]).value or 0.0


def moved(row: Row, artifact: dict[str, Any], items: Path) -> Row:
    """Return a finished row with the paths that its files have now."""
    if row["artifact"] is None:
        return row
    quality = {
        key: (
            {**figure, "items": str(items.with_name(Path(figure["items"]).name))}
            if figure.get("items")
            else figure
        )
        for key, figure in row["quality"].items()
    }
    return {**row, "artifact": artifact, "quality": quality}


def blank(record: dict[str, Any], why: str) -> None:
    """Turn every value of a ledger into a null with one reason."""
    for name, value in record.items():
        if isinstance(value, dict) and "why_missing" in value:
            record[name] = null(why).to_json()
        elif isinstance(value, dict):
            blank(value, why)


def _recovery(output: Output) -> dict[str, Any]:
    """Return what a rung of recovery loses on validation; empty for other stages."""
    read = output.about.get("recovery")
    if read is None:
        return {}
    found = {
        name: null(LOST) if read[name] is None else measured(read[name]) for name in ("loss", "kl")
    }
    return {name: value.to_json() for name, value in found.items()}


def _quantization(output: Output) -> dict[str, Any] | None:
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


def _unchanged(stage: Any, output: Output) -> dict[str, str] | None:
    """Return which model a quantize stage left as it is, and why; null where it made one, and of
    other stages.
    """
    if stage.type != QuantizeStage.type or "quantization" in output.about:
        return None
    return {
        "as": stage.model,
        "why": output.about.get("search", {}).get("why") or "no rung holds the tolerance",
    }


def _memory(made: Record) -> dict[str, Value]:
    """Return what was read while an artifact was made; an older release read less."""
    never = null(NEVER).to_json()
    return {part: Value.from_json(made["memory"].get(part, never)) for part in MEMORY}


def _peak(attempt: Attempt, stage: Any, output: Output) -> Value:
    """Return the peak rate of one of this run's devices in the arithmetic a stage trains in."""
    if not hasattr(stage, "precision"):
        return null("this stage trains nothing")
    named = training_precision(stage, attempt.run)
    if named is Precision.auto and "precision" not in output.about:
        return null("no precision was chosen yet")
    chosen = output.about["precision"]["chosen"] if named is Precision.auto else named.value
    precision = chosen.partition("_")[0]  # bf16_pure, fp8_rowwise: of the same products
    return peak(
        device_name(attempt.device), precision, getattr(attempt.run.hardware.peak_tflops, precision)
    )
