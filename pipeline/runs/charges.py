"""What every arm of a run is charged with, and what others may take of its device."""

from __future__ import annotations

from pathlib import Path

from pipeline.compare import savings
from pipeline.compare.savings import Spend
from pipeline.config.arms import BASE, STUDENT_INIT, is_fallback, stage_name
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.disturbance import mean
from pipeline.ledger.peaks import device_name
from pipeline.ledger.record import disturbance_of
from pipeline.ledger.shapes import ChargedOn, ChargeRecord, HoursPart, Row
from pipeline.ledger.values import Value
from pipeline.runs.past_cost import charge, past_spend
from pipeline.runs.rows import hours_in
from pipeline.runs.running import Running
from pipeline.stages.base import arms_read
from pipeline.store.artifacts import MODEL, Artifact, digest_given, facts_of

_CHARGED: tuple[HoursPart, ...] = ("work", "retry")


def spends_of(running: Running, seed: int) -> dict[str, Spend]:
    """Return what every arm's own stage took, with what each depends on, and what given models cost
    before.
    """
    paths, device = ({BASE: running.session.run.model.path}, device_name(running.session.device))
    spends = {arm: past_spend(arm, path, device) for arm, path in paths.items()}
    of_seed = [row for row in running.book.rows if row["seed"] == seed]
    for name, stage in running.session.stages.items():
        if stage.takes_release():  # the gate has what its chain took
            continue
        # a stage is charged with every fallback that was tried
        own = [row for row in of_seed if stage_name(row["arm"]) == name]
        work_h, retry_h = (sum(hours_in(row, part) for row in own) for part in _CHARGED)
        elsewhere = stage.made_elsewhere(name, running.session.run)
        for each in elsewhere:  # made at a cost that nobody noted down, or that its file tells
            spends[each.arm] = (
                past_spend(each.arm, each.path, device)
                if each.unknown is None
                else Spend(arm=each.arm, flops=0.0, existing=True, unknown=each.unknown)
            )
        spends[name] = Spend(
            arm=name,
            depends_on=(*arms_read(stage, running.session.run), *(each.arm for each in elsewhere)),
            work_h=work_h,
            retry_h=retry_h,
            flops=_flops(own),
            foreign_load=_foreign_load(own),
        )
    gate = running.session.gate
    return spends if gate is None else {**spends, **gate.spends()}


def note_charges(running: Running) -> None:
    """Write into the artifact.json of every model of this run what its chain took: a release gate
    compares that.
    """
    made = [
        (row, record)
        for row in running.book.rows
        if row["status"] == "FINISHED"
        and (record := row["artifact"]) is not None
        and record["kind"] == MODEL
    ]
    paths = {BASE: running.session.run.model.path, STUDENT_INIT: running.session.run.student.path}
    existing = {
        arm: digest_given(Path(path).expanduser())[0] if Path(path).expanduser().is_dir() else path
        for arm, path in paths.items()
        if path is not None
    }
    for row, record in made:
        stage = None if is_fallback(row["arm"]) else running.session.stages.get(row["arm"])
        if stage is None or stage.takes_release():
            continue
        artifact = Artifact.from_json(record)
        # Noted when it was made, or by an earlier run that made the same bytes.
        if "charge" in facts_of(artifact.path):
            continue
        where: ChargedOn = {
            "kind": device_of(running.session.device).kind,
            "name": device_name(running.session.device),
            "count": running.session.devices,
            "power_limit_w": running.session.placement.get("power_limit_w"),
        }
        facts = charge(row["arm"], spends_of(running, row["seed"]), existing)
        # One figure a seed: the gate reads from them how much such trainings vary.
        repeats = [
            charge(row["arm"], spends_of(running, seed), existing)["work_device_hours"]
            for seed in running.session.seeds
        ]
        noted: ChargeRecord = {
            "run_id": row["reused"] or running.session.run_id,
            "seed": row["seed"],
            "device": where,
            "tokens": row["ledger"]["counts"]["tokens"]["value"],
            **facts,
        }
        if len(repeats) > 1 and min(repeats) > 0:
            noted["seeds_device_hours"] = [*repeats]
        running.session.store.annotate(artifact, "charge", noted)


def _foreign_load(own: list[Row]) -> Value:
    """Return the share of the device that others took while a stage worked, over its attempts."""
    return mean(
        [
            (
                disturbance_of(row["ledger"]).work_foreign_load,
                row["ledger"]["device_hours"]["work"]["value"] or 0.0,
            )
            for row in own
        ]
    )


def _flops(own: list[Row]) -> float | None:
    """Return the FLOPs of a stage's work; quantizing is not counted in FLOPs."""
    made = [row for row in own if row["artifact"] is not None]
    return made[-1]["ledger"]["counts"]["model_flops"]["value"] if made else None


def tolerance(running: Running) -> savings.Tolerance:
    """Return what others may take of this run's device before a saving of time is not shown."""
    on_cpu = running.session.device.type == "cpu"
    return savings.Tolerance(
        running.session.run.ledger.max_foreign_load,
        "the cores" if on_cpu else "the device",
        is_shared=on_cpu,
    )
