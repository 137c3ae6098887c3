"""What a gate's readings come to: criteria, verdict, and what is written of them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare import savings
from pipeline.compare.blocks import ARM_FIRST
from pipeline.compare.quality import Items, compared_keys
from pipeline.compare.statistics import look_alpha
from pipeline.compare.verdict import (
    Criterion,
    Outcome,
    Spread,
    decide,
    disturbed,
    invalid,
    memory_criterion,
    moved,
    payback_criterion,
    quality_criterion,
    serving_criterion,
    training_criterion,
    unread,
)
from pipeline.config.arms import BASELINE, CANDIDATE, stage_name
from pipeline.config.settings.run import Run
from pipeline.data.documents import Dataset, num_documents
from pipeline.errors import Exit
from pipeline.evaluation.quality.assess import read_items
from pipeline.evaluation.quality.recorded import read_identity, values_digest
from pipeline.evaluation.serving.tokens import OTHER_TOKENIZER, other_tokenizers
from pipeline.gate.checks import gating_metrics
from pipeline.gate.opening import Gate
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.metrics import PRIMARY, TASK, UNIT, primary_key
from pipeline.ledger.numbers import percents_apart
from pipeline.ledger.peaks import device_name
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import (
    BlocksRecord,
    ChargedOn,
    Figures,
    ItemsNote,
    Quality,
    Readings,
    Row,
    ServedIn,
    Verdict,
)
from pipeline.ledger.values import Value, null
from pipeline.report.verdict import verdict_line
from pipeline.store.artifacts import plain
from pipeline.tasks.table import QUALITIES

if TYPE_CHECKING:
    from pipeline.evaluation.serving.measure import ServePass
    from pipeline.gate.references import Release

SCHEMA = 2
EXITS = {
    Outcome.PASS: Exit.DONE,
    Outcome.FAIL: Exit.FAIL,
    Outcome.INCONCLUSIVE: Exit.INCONCLUSIVE,
    Outcome.INVALID: Exit.INVALID,
    Outcome.NO_BASELINE: Exit.NO_BASELINE,
}
Rows = dict[str, Row]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a gate's run has measured.

    Attributes:
        run: The settings.
        rows: Of result.json.
        served: What the comparison pass read.
        device: The torch device, `devices` of them.
        clock: Of the run.
    """

    run: Run
    run_id: str
    rows: Sequence[Row]
    served: ServePass | None
    data: Dataset
    device: Any
    devices: int
    clock: PhaseClock


def judge(measured: Measured, gate: Gate) -> Verdict:
    """Return the verdict on what this run has read, with the readings that a second look goes on
    from.
    """
    if gate.baseline is None:
        made = measured.run.bootstrap
        why = "there is no champion" + (
            ": the candidate becomes it" if made else "; bootstrap=true makes it the first"
        )
        nothing: Any = {}  # was read
        return _verdict(measured, gate, Outcome.NO_BASELINE, [], why, nothing)
    rows = {
        stage_name(row["arm"]): row
        for row in measured.rows
        if row["status"] == "FINISHED" and row["artifact"]
    }
    readings = _readings(measured.served, gate)
    criteria = [*_quality(measured, gate, rows), *_costs(measured, gate, rows, readings)]
    return _verdict(measured, gate, decide(criteria), criteria, None, readings)


def _verdict(
    measured: Measured,
    gate: Gate,
    outcome: Outcome,
    criteria: list[Criterion],
    why: str | None,
    readings: Readings,
) -> Verdict:
    task = measured.run.task
    # Making the first champion was asked for, so it ends well.
    first = measured.run.bootstrap and gate.baseline is None
    verdict: Verdict = {
        "schema": SCHEMA,
        "line": "",
        "verdict": outcome.value,
        "exit_code": int(Exit.DONE if first else EXITS[outcome]),
        "why": why,
        "criteria": [each.to_json() for each in criteria],
        "candidate": gate.candidate.to_json(),
        "baseline": None if gate.baseline is None else gate.baseline.to_json(),
        "policy": {
            "name": gate.policy.name,
            "sha256": gate.policy_key,
            "settings": plain(gate.policy),
        },
        "task": task.value,
        "primary": _primary(measured),
        "unit": UNIT[task],
        "data": measured.data.digest,
        "device": {
            "kind": device_of(measured.device).kind,
            "name": device_name(measured.device),
            "count": measured.devices,
        },
        "dtype": _dtype(measured.served),
        "key": gate.key,
        "look": gate.look,
        "looks": gate.policy.looks,
        "readings": readings,
        "run_id": measured.run_id,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    verdict["line"] = verdict_line(verdict)
    return verdict


def _dtype(served: ServePass | None) -> ServedIn | None:
    """Return what sides that are stored in fp32 were served in; null where nothing was served."""
    asked = None if served is None else served.dtype.get("asked")
    if served is None or asked is None:
        return None
    return {"asked": asked, "served": served.dtype.get("served")}


def _primary(measured: Measured) -> str:
    """Return the quality that a history keeps of a verdict."""
    sides = [row["quality"] for row in measured.rows if row["status"] == "FINISHED"]
    return primary_key(sides, measured.run.task) or PRIMARY[measured.run.task]


# -- readings -------------------------------------------------------------------------------------


def _readings(served: ServePass | None, gate: Gate) -> Readings:
    """Return this look's readings after those of the look before, and what the machine was like
    meanwhile.
    """
    assert served is not None, "a gate serves its two arms"
    before = None if gate.earlier is None else gate.earlier["readings"]
    arm, base = (side.tolist() for side in served.seconds[CANDIDATE, BASELINE])
    joined: Readings = {
        # A second look reads all blocks, its own and those of the first.
        "candidate_s": [*([] if before is None else before["candidate_s"]), *arm],
        "baseline_s": [*([] if before is None else before["baseline_s"]), *base],
        "conditions": [*([] if before is None else before["conditions"]), served.conditions],
        "blocks": [*([] if before is None else _blocks_before(before)), _blocks(served)],
    }
    if served.joules is not None:
        ours, theirs = (side.tolist() for side in served.joules)
        joined["candidate_j"] = [*({} if before is None else before).get("candidate_j", []), *ours]
        joined["baseline_j"] = [*({} if before is None else before).get("baseline_j", []), *theirs]
    return joined


def _blocks(served: ServePass) -> BlocksRecord:
    """Return how a look's blocks were ordered, and what was discarded before them."""
    pair = CANDIDATE, BASELINE
    return {
        "orders": served.orders[pair],
        "places": served.places[pair],
        "seed": served.order_seed,
        "warm_up": served.warm_up,
    }


def _blocks_before(before: Readings) -> list[BlocksRecord]:
    """Return the blocks of the look before; one that recorded no orders read the candidate first in
    every block.
    """
    if "blocks" in before:
        return before["blocks"]
    return [
        {
            "orders": [ARM_FIRST] * len(before["candidate_s"]),
            "places": None,
            "seed": None,
            "warm_up": {},
        }
    ]


def _moved(gate: Gate, readings: Readings) -> list[str]:
    """Return what moved the readings of any look beside candidate and baseline."""
    found, start = list[str](), 0
    for number, look in enumerate(readings.get("blocks", []), start=1):
        # Each look is tested by itself: between looks the machine may have changed.
        blocks = slice(start, start := start + len(look["orders"]))
        sides = readings["candidate_s"][blocks], readings["baseline_s"][blocks]
        found += [
            f"look {number}: {reason}"
            for reason in moved(gate.policy, *sides, look["orders"], look["places"])
        ]
    return found


# -- quality --------------------------------------------------------------------------------------


def _quality(measured: Measured, gate: Gate, rows: Rows) -> list[Criterion]:
    """Return a criterion per quality: first what the policy asks for, then what else both sides
    carry.
    """
    run, asked = measured.run, gating_metrics(gate.policy, measured.run.task)
    test = measured.data.splits["test"]
    main = PRIMARY[run.task]
    sides = {arm: rows[arm]["quality"] for arm in (CANDIDATE, BASELINE)}
    reasons = _other_evaluation(measured, gate, sides)
    read = cache(read_items)  # a file is read once, however many qualities are compared on it
    also = (
        []
        if reasons
        else [
            key
            for key in compared_keys(*(_items(sides[arm], main, read) or {} for arm in sides))
            if key not in asked and (key not in QUALITIES or QUALITIES[key].in_policy)
        ]
    )
    found: list[Criterion] = []
    for key in (*asked, *also):
        margin = gate.policy.metrics[key].margin if key in asked else run.quality.margin
        arm, base = (
            _items(sides[side], key if key.startswith(TASK) else main, read)
            for side in (CANDIDATE, BASELINE)
        )
        if arm is None or base is None:
            lacks = CANDIDATE if arm is None else BASELINE
            made = unread(f"quality/{key}", f"the {lacks} has no {key}", -margin)
        else:
            made = quality_criterion(
                key, arm, base, gate.policy, margin=margin, resamples=run.quality.bootstrap
            )
            if not key.startswith(TASK) and not (run.candidate_items and run.baseline_items):
                # How many documents there are, for the advice to take more of them.
                made = replace(made, available=num_documents(test, grouped=made.groups is not None))
        found.append(replace(invalid(made, reasons), gating=key in asked))
    return found


def _items(quality: Quality, key: str, read: Callable[[Path], Items]) -> Items | None:
    path = (quality.get(key) or {}).get("items")
    return None if path is None else read(Path(path))


def _identity(quality: Quality) -> ItemsNote | None:
    """Return what an arm's values were read on, as the note beside them says."""
    paths = [
        items
        for key, each in quality.items()
        if (items := each.get("items")) and not key.startswith(TASK)
    ]
    return read_identity(Path(paths[0])) if paths else None


def _other_evaluation(measured: Measured, gate: Gate, sides: Mapping[str, Quality]) -> list[str]:
    """Return why the two evaluations are not of the same documents, read in the same way, of these
    two artifacts.
    """
    known = {arm: _identity(quality) for arm, quality in sides.items()}
    ours, theirs = known[CANDIDATE], known[BASELINE]
    if ours is None or theirs is None:
        return [
            f"nothing says which data the {arm}'s values were read on"
            for arm, said in known.items()
            if said is None
        ]
    reasons = [
        f"other {what}: {ours[name]} against {theirs[name]}"
        for name, what in (
            ("data", "data"),
            ("split", "split"),
            ("evaluation", "evaluation settings"),
        )
        if ours[name] != theirs[name]
    ]
    of = {CANDIDATE: ours.get("artifact"), BASELINE: theirs.get("artifact")}
    for arm, release in gate.releases().items():
        if of[arm] not in (None, release.artifact.digest):
            reasons.append(
                f"the {arm}'s values are of artifact {of[arm]}, not of {release.artifact.digest}"
            )
    digests = {release.artifact.digest for release in gate.releases().values()}
    if None in of.values() and len(digests) == 2 and _same_values(measured.run):
        reasons.append(
            "both sides have the same values, and no note says whose they are (artifact)"
        )
    return reasons


def _same_values(run: Run) -> bool:
    """Whether the same recorded values stand in for both sides' assessments."""
    given = [
        values_digest(Path(path).expanduser())
        for path in (run.candidate_items, run.baseline_items)
        if path
    ]
    return len(given) == 2 and given[0] == given[1]


# -- compute --------------------------------------------------------------------------------------


def _costs(measured: Measured, gate: Gate, rows: Rows, readings: Readings) -> list[Criterion]:
    policy, serving = gate.policy, {arm: rows[arm]["serving"] for arm in (CANDIDATE, BASELINE)}
    # Spent over all planned looks, whether the second one is taken or not.
    alpha = look_alpha(policy.alpha, policy.looks)
    reasons = [
        *_disturbed(measured, gate, readings),
        *_moved(gate, readings),
        *_other_tokenizers(measured, gate),
    ]
    served = serving_criterion(
        readings["candidate_s"], readings["baseline_s"], minimum=policy.serving, alpha=alpha
    )
    figures = [
        (_value(serving[arm], "peak_bytes"), _value(serving[arm], "weights_bytes"))
        for arm in serving
    ]
    # Peak memory on both sides, or weights on both.
    counted = all(peak.value is not None for peak, _ in figures)
    memory = memory_criterion(
        *(each[0 if counted else 1] for each in figures),
        of="peak_bytes" if counted else "weights_bytes",
        minimum=policy.memory,
    )
    if policy.energy is None:
        energy: list[Criterion] = []
    elif "candidate_j" in readings and "baseline_j" in readings:
        energy = [
            serving_criterion(
                readings["candidate_j"],
                readings["baseline_j"],
                minimum=policy.energy,
                alpha=alpha,
                name="energy",
            )
        ]
    else:
        energy = [unread("energy", measured.served.why_no_joules or "not read", policy.energy)]  # type: ignore[union-attr]
    return [
        _kept(gate, invalid(served, reasons)),
        memory,
        *(
            # A reading that is missing keeps its own reason.
            _kept(gate, invalid(each, reasons) if each.value.value is not None else each)
            for each in energy
        ),
        _training(measured, gate),
        invalid(
            _payback(measured, gate, readings, serving),
            reasons if policy.payback_units is not None else [],
        ),
    ]


def _kept(gate: Gate, criterion: Criterion) -> Criterion:
    """Return what the look before decided of a criterion, where it did: it is not asked again."""
    earlier = (
        {} if gate.earlier is None else {each["name"]: each for each in gate.earlier["criteria"]}
    )
    said = earlier.get(criterion.name)
    if said is None or said["outcome"] not in (Outcome.PASS, Outcome.FAIL):
        return criterion
    return replace(
        criterion,
        outcome=Outcome(said["outcome"]),
        value=Value.from_json(said["value"]),
        ci=None if said["ci"] is None else (said["ci"][0], said["ci"][1]),
        n=said["n"],
        why="decided at the look before",
    )


def _value(figures: Figures, name: str) -> Value:
    return Value.from_json(figures[name]) if name in figures else null(f"no {name}")


def _disturbed(measured: Measured, gate: Gate, readings: Readings) -> list[str]:
    """Return what made any look's serving pass no measurement."""
    here = device_name(measured.device)
    before = None if gate.earlier is None else gate.earlier.get("dtype")
    now = _dtype(measured.served)
    if before is not None and now is not None and before["served"] != now["served"]:
        return [f"served in {now['served']}, and at the look before in {before['served']}"]
    return [
        f"look {number}: {reason}"
        for number, conditions in enumerate(readings["conditions"], start=1)
        for reason in disturbed(gate.policy, here, conditions)
    ]


def _other_tokenizers(measured: Measured, gate: Gate) -> list[str]:
    """Return why seconds and joules per token of the two say nothing of each other."""
    candidate, baseline = (release.artifact.path for release in gate.releases().values())
    with measured.clock.phase("prepare"):
        differ = other_tokenizers(measured.run.task, candidate, baseline)
    return [OTHER_TOKENIZER] if differ else []


def _training(measured: Measured, gate: Gate) -> Criterion:
    policy = gate.policy
    arm_runs, base_runs = (_own_runs(side) for side in (gate.candidate, gate.baseline))
    made = training_criterion(
        *_chains(gate),
        _spread(measured, gate),
        minimum=policy.training,
        alpha=policy.alpha,
        arm_runs=arm_runs,
        base_runs=base_runs,
    )
    loud, unknown = _disturbed_training(gate)
    if unknown:
        made = replace(made, why="; ".join([*([made.why] if made.why else []), *unknown]))
    return invalid(made, [*_other_hardware(gate), *loud] if made.value.value is not None else [])


def _disturbed_training(gate: Gate) -> tuple[list[str], list[str]]:
    """Return what others took while either side trained, where the policy allows less, and of which
    it is unknown.
    """
    limit = gate.policy.max_foreign_load
    loud, unknown = list[str](), list[str]()
    for name, release in gate.releases().items():
        if limit is None or not release.charge:
            continue
        load = Value.from_json(release.charge.get("foreign_load") or null("not recorded").to_json())
        if load.value is None:
            unknown.append(f"disturbance unknown while the {name} trained ({load.why_missing})")
        elif load.value > limit:
            share, most = percents_apart(load.value, limit)
            loud.append(
                f"others used {share} of the device while the {name} trained, {most} allowed"
            )
    return loud, unknown


def _own_runs(side: Release | None) -> list[float]:
    """Return device-hours of a side's training with every seed of its run, where there were
    several.
    """
    charge = None if side is None else side.charge
    hours = [] if charge is None else charge.get("seeds_device_hours", [])
    return [
        float(each)
        for each in hours
        if isinstance(each, int | float) and math.isfinite(each) and each > 0
    ]


def _chains(gate: Gate) -> tuple[Value, Value]:
    """Return C of candidate and baseline; a model that was there before both cancels."""
    spends = gate.spends()
    cancelled = savings.shared_past(CANDIDATE, BASELINE, spends)
    arm, base = (
        savings.c_total(side, spends, cancelled=cancelled) for side in (CANDIDATE, BASELINE)
    )
    # A share of nothing is no saving.
    return arm, base if base.value != 0 else null("the baseline cost nothing")


def _other_hardware(gate: Gate) -> list[str]:
    ours, theirs = (
        _trained_on(side) for side in (gate.candidate, gate.baseline) if side is not None
    )
    named = (("name", "trained on"), ("count", "devices"), ("power_limit_w", "power limit"))
    return [
        f"{what} {ours.get(name)} against {theirs.get(name)}"
        for name, what in named
        if ours.get(name) != theirs.get(name)
    ]


def _trained_on(side: Release) -> ChargedOn:
    """Return the devices that a side was trained on, as its charge names them."""
    return {} if side.charge is None else side.charge.get("device", {})


def _spread(measured: Measured, gate: Gate) -> Spread | None:
    """Return how far repeated trainings on the candidate's device lie apart, as self-tests have
    recorded it.
    """
    device = _trained_on(gate.candidate)
    name, count = device.get("name"), device.get("count")
    if name is None or count is None or not measured.run.tracking.mlflow:
        return None
    from pipeline.tracking.registry import find_spread

    return find_spread(gate.places.tracking, name, count)


def _payback(
    measured: Measured, gate: Gate, readings: Readings, serving: Mapping[str, Figures]
) -> Criterion:
    policy, here = gate.policy, device_name(measured.device)
    c_opt = savings.c_opt(CANDIDATE, BASELINE, gate.spends())
    trained_on = _trained_on(gate.candidate).get("name")
    if c_opt.value is not None and trained_on != here:
        c_opt = null(f"trained on {trained_on}, served on {here}: their hours are never subtracted")
    saving = savings.serving_saving(
        np.array(readings["candidate_s"]), np.array(readings["baseline_s"])
    )
    per_unit = Value.from_json(serving[BASELINE]["device_s_per_1k_units"])
    c_base = (
        null(per_unit.why_missing or "")
        if per_unit.value is None
        # Per 1,000 units to per unit
        else Value(per_unit.value / 1000, per_unit.provenance)
    )
    paid = savings.payback(
        c_opt, c_base, saving, unit=UNIT[measured.run.task], volume=policy.payback_units
    )
    return payback_criterion(paid, within=policy.payback_units, alpha=policy.alpha)
