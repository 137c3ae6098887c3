"""The comparison pass of a run: the recipe's pairs, read on quality, training, serving and payback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.assess.quality import macro_f1, read_items
from pipeline.assess.serving import ServePass, serve_pass
from pipeline.compare.bootstrap import abba_saving, paired_bootstrap
from pipeline.compare.chains import Spend, all_in, c_opt, c_total, payback_units, saving
from pipeline.config import Comparison, Measure, Task
from pipeline.data.encode import encode_all
from pipeline.metrics import DIRECTION
from pipeline.models import load_tokenizer
from pipeline.values import Value, derive, estimated, measured, null

if TYPE_CHECKING:
    from pipeline.attempt import Attempt

MIN_DOCUMENTS = 20  # fewer decide nothing
PRIMARY = {Task.causal_lm: "bits_per_byte", Task.sequence_classification: "accuracy"}


def compare_all(attempt: Attempt) -> list[dict[str, Any]]:
    """Return one comparison per pair whose arms both have an artifact, for the first seed."""
    seed = (attempt.run.seeds or [attempt.run.seed])[0]
    rows = {row["arm"]: row for row in attempt.rows if row["seed"] == seed and row["status"] == "FINISHED"}
    pairs = [pair for pair in attempt.run.compare if pair.arm in rows and pair.base in rows]
    served = _serve(attempt, pairs, rows)
    _unserved(attempt)
    spends = _spends(attempt, seed)
    return [_one(attempt, pair, rows, spends, served, seed) for pair in pairs]


def _serve(attempt: Attempt, pairs: list[Comparison], rows: dict[str, dict[str, Any]]) -> ServePass | None:
    wanted = [(p.arm, p.base) for p in pairs if Measure.serving in p.on or Measure.payback in p.on]
    if not wanted:
        return None
    folders = {arm: Path(rows[arm]["artifact"]["path"]) for pair in wanted for arm in pair}
    with attempt.clock.phase("prepare"):
        tokenizer = load_tokenizer(next(iter(folders.values())))
        encoded = encode_all(attempt.data.splits["test"][:64], tokenizer, attempt.run.task, max_length=512)
    served = serve_pass(
        folders, wanted, task=attempt.run.task, labels=attempt.data.labels,
        prompts=[item.input_ids for item in encoded],
        config=attempt.run.serving, device=attempt.device, devices=1, seed=0, clock=attempt.clock,
    )  # fmt: skip
    for arm, figures in served.serving.items():
        rows[arm]["serving"] = figures
    return served


def _unserved(attempt: Attempt) -> None:
    """Say why arms that the recipe does not compare on serving have no serving figure."""
    for row in attempt.rows:
        if not row["serving"] and row["artifact"] is not None:
            row["serving"] = {
                "device_s_per_1k_units": null("the recipe does not compare this arm on serving").to_json()
            }


def _spends(attempt: Attempt, seed: int) -> dict[str, Spend]:
    spends: dict[str, Spend] = {}
    for name in attempt.run.stages:
        own = [row for row in attempt.rows if row["arm"] == name and row["seed"] == seed]
        hours = {
            part: sum(row["ledger"]["device_hours"][part]["v"] or 0.0 for row in own) for part in ("work", "retry")
        }
        flops = own[-1]["ledger"]["counts"]["model_flops"]["v"] if own else None
        from_given = name in attempt.existing and "base" in attempt.existing
        depends = own[-1]["depends_on"] if own else []
        spends[name] = Spend(tuple(depends), hours["work"], hours["retry"], flops, existing=from_given)
    return spends


def _one(
    attempt: Attempt, pair: Comparison, rows: dict[str, dict[str, Any]], spends: dict[str, Spend],
    served: ServePass | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    extra = c_opt(pair.arm, pair.base, spends)
    cost: Value | None = None
    serving: dict[str, Any] | None = None
    key = (pair.arm, pair.base)
    if served is not None and key in served.seconds:
        point, low, high = abba_saving(*served.seconds[key])
        serving = {**measured(point).to_json(), "ci": [low, high], "blocks": attempt.run.serving.blocks}
        cost = payback_units(extra, *(_per_unit(rows[arm]) for arm in (pair.base, pair.arm)))
    unit = "token" if attempt.run.task is Task.causal_lm else "example"
    return {
        "arm": pair.arm, "base": pair.base, "on": [measure.value for measure in pair.on],
        "quality": _quality(attempt, rows[pair.arm], rows[pair.base], seed) if Measure.quality in pair.on else {},
        "training": _training(attempt, pair, spends, seed) if Measure.training in pair.on else None,
        "serving": serving if Measure.serving in pair.on else None,
        "payback": None if cost is None or Measure.payback not in pair.on else {**cost.to_json(), "unit": unit},
    }  # fmt: skip


def _per_unit(row: dict[str, Any]) -> Value:
    return derive(lambda s: s / 1000, Value.from_json(row["serving"]["device_s_per_1k_units"]))


def _quality(attempt: Attempt, arm: dict[str, Any], base: dict[str, Any], seed: int) -> dict[str, Any]:
    primary = PRIMARY[attempt.run.task]
    ours, theirs = (read_items(Path(row["quality"][primary]["items"])) for row in (arm, base))
    assert (ours["digest"] == theirs["digest"]).all(), "both arms were assessed on the same documents"
    readings = {
        "bits_per_byte": lambda r: 1 - _ratio(ours, "bits", "bytes", r) / _ratio(theirs, "bits", "bytes", r),
        "next_token_accuracy": lambda r: _ratio(ours, "correct", "tokens", r) - _ratio(theirs, "correct", "tokens", r),
        "accuracy": lambda r: float(ours["correct"][r].mean() - theirs["correct"][r].mean()),
        "macro_f1": lambda r: macro_f1(_rows(ours, r)) - macro_f1(_rows(theirs, r)),
    }
    margin = attempt.run.quality.margin
    result: dict[str, Any] = {}
    for key in arm["quality"].keys() & base["quality"].keys() & readings.keys():
        count = len(ours["digest"])
        point, low, high = paired_bootstrap(readings[key], count, resamples=attempt.run.quality.bootstrap, seed=seed)
        result[key] = {**measured(point).to_json(), "ci": [low, high], "n": count, "margin": margin,
                       "answer": answer(low, high, margin, count)}  # fmt: skip
    return result


def answer(low: float, high: float, margin: float, count: int) -> str:
    """Return what a 90% interval of the arm's advantage says."""
    if count < MIN_DOCUMENTS:
        return "undecided"
    if low > 0:
        return "better"
    if low > -margin and high < margin:
        return "equal"
    return "worse" if high < 0 else "undecided"


def _rows(items: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[rows] for name, array in items.items()}


def _ratio(items: dict[str, np.ndarray], top: str, bottom: str, rows: np.ndarray) -> float:
    return float(items[top][rows].sum() / items[bottom][rows].sum())


def _training(attempt: Attempt, pair: Comparison, spends: dict[str, Spend], seed: int) -> dict[str, Any]:
    """Read training savings at equal quality: the arm's final validation metric within the margin of the base's."""
    primary = PRIMARY[attempt.run.task]
    final = {arm: curve[-1]["metric"] for (arm, at), curve in attempt.curves.items() if at == seed and curve}
    value = saving(pair.arm, pair.base, spends)
    rule = "equal quality at the end; point estimate only: one run each"
    if pair.arm in final and pair.base in final:
        worse = _worse_by(final[pair.arm], final[pair.base], primary)
        if worse > attempt.run.quality.margin:
            value = null(
                f"censored: {pair.arm} ends {worse:.1%} worse than {pair.base} on validation, beyond the margin"
            )
    return {
        **value.to_json(), "ci": None, "rule": rule,
        "c_arm": c_total(pair.arm, spends).to_json(), "c_base": c_total(pair.base, spends).to_json(),
        "c_opt": c_opt(pair.arm, pair.base, spends).to_json(),
        "all_in_arm": all_in(pair.arm, spends).to_json(), "all_in_base": all_in(pair.base, spends).to_json(),
        **_split(value, spends[pair.arm], spends[pair.base]),
    }  # fmt: skip


def _worse_by(arm: float, base: float, key: str) -> float:
    """Return by how much the arm is worse: relative for bits per byte, absolute for accuracies."""
    return arm / base - 1 if DIRECTION[key] < 0 else base - arm


def _split(value: Value, arm: Spend, base: Spend) -> dict[str, Any]:
    """Split the saving of the two stages alone: (1 - systems)(1 - algorithmic) = 1 - C(arm)/C(base) of the stages."""
    if value.v is None or not (arm.flops and base.flops and arm.work_h and base.work_h):
        reason = null(value.why_null or "no FLOPs counted on one side").to_json()
        return {"systems": reason, "algorithmic": reason}
    algorithmic = derive(lambda a, b: 1 - a / b, estimated(arm.flops), estimated(base.flops))
    rate = derive(lambda a, b: 1 - a / b, estimated(arm.work_h / arm.flops), estimated(base.work_h / base.flops))
    return {"systems": rate.to_json(), "algorithmic": algorithmic.to_json()}
