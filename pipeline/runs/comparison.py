"""The comparison pass of a run: the recipe's pairs, read on quality, training, serving and
payback.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.compare import savings
from pipeline.compare.quality import combine_seeds, compare_items, compared_keys
from pipeline.compare.savings import Reading, Spend, Trained, combine_training, training_saving
from pipeline.config.arms import BEST_16_BIT, is_fallback
from pipeline.config.settings.quantization import SIXTEEN_BITS
from pipeline.config.settings.run import Comparison, Measure
from pipeline.data.documents import num_documents
from pipeline.evaluation.quality.assess import read_items
from pipeline.evaluation.serving.dtype import WORDS
from pipeline.evaluation.serving.fastest import said
from pipeline.evaluation.serving.measure import ServePass
from pipeline.evaluation.serving.tokens import OTHER_TOKENIZER, other_tokenizers
from pipeline.ledger.metrics import DIRECTION, PRIMARY, RELATIVE, TASK, UNIT, primary_key
from pipeline.ledger.shapes import (
    ComparedQuality,
    ComparisonBasis,
    Pair,
    Payback,
    ServingSaving,
    TrainingSaving,
)
from pipeline.ledger.values import Value, derive, null
from pipeline.runs.book import Rows
from pipeline.runs.charges import spends_of, tolerance
from pipeline.runs.rows import artifact_of, items_of
from pipeline.runs.running import Running
from pipeline.runs.serving_pass import read_serving
from pipeline.stages.base import CACHE, TEACHER
from pipeline.store.artifacts import MODEL


@dataclass(frozen=True, slots=True)
class _Seed:
    """What is compared for one seed."""

    seed: int
    rows: Rows
    spends: dict[str, Spend]


def compare(running: Running) -> None:
    """Compare the recipe's pairs. Serving is measured in a window of its own, or reused with what
    it took.
    """
    _say_what_lacks_16_bits(running)
    pairs = served_pairs(running)
    served = running.book.served = read_serving(running, pairs) if pairs else None
    if served is not None:
        running.book.notes += [f"serving: {each}" for each in served.dtype.get("said", [])]
        running.book.notes += [
            f"serving: {arm}: {said(probe)}"
            for arm, probes in served.decode.items()
            for probe in probes
        ]
        running.book.notes += [f"serving: {each}" for each in (served.draft or {}).get("said", [])]
    fill_serving(running, served)
    running.book.comparisons = compare_all(running, served)
    running.session.journal.write(
        "serving",
        rows=[
            {name: row[name] for name in ("arm", "seed", "attempt", "serving")}
            for row in running.book.rows
            if row["serving"]
        ],
    )
    running.session.journal.write("comparisons", comparisons=running.book.comparisons)


def served_pairs(running: Running) -> list[tuple[str, str]]:
    """Return the pairs that are read on serving or payback and have both artifacts (of the first
    seed).
    """
    rows = running.book.finished(running.session.seeds[0])
    pairs = [
        pair for pair in compared(running) if {Measure.serving, Measure.payback} & set(pair.on)
    ]
    return [(pair.arm, pair.base) for pair in pairs if pair.arm in rows and pair.base in rows]


def compared(running: Running) -> list[Comparison]:
    """Return the recipe's pairs; `best_16_bit` is the arm it stands for, and a pair without such an
    arm is left out.
    """
    found = [(pair, base_of(running, pair)) for pair in running.session.run.compare]
    return [replace(pair, base=base) for pair, base in found if base is not None]


def base_of(running: Running, pair: Comparison) -> str | None:
    """Return the arm that a pair is read against: of `best_16_bit`, the 16-bit form that suits this
    device best.
    """
    from pipeline.models.sixteen_bits import best_first

    if pair.base != BEST_16_BIT:
        return pair.base
    session, order = running.session, best_first(running.session.device)
    rows = running.book.finished(session.seeds[0])
    # By preference on this device; names decide ties.
    forms = [
        (order.index(fmt), name)
        for name, stage in session.stages.items()
        if name in rows
        and name != pair.arm
        and (fmt := stage.stored_format()) in order
        and _is_16_bit_form(running, name, pair.arm)
    ]
    return min(forms)[1] if forms else None


def _is_16_bit_form(running: Running, name: str, arm: str) -> bool:
    """Return whether an arm is, in 16 bits, what another one was quantized from."""
    stages = running.session.stages
    if name not in stages or stages[name].stored_format() not in SIXTEEN_BITS:
        return False
    return stages[name].reference() == stages[arm].reference()


def _say_what_lacks_16_bits(running: Running) -> None:
    lacking = [pair.arm for pair in running.session.run.compare if base_of(running, pair) is None]
    if lacking:
        running.book.notes.append(
            f"{', '.join(lacking)}: no arm has the same model in 16 bits here: read against fp32"
            " alone"
        )


def compare_all(running: Running, served: ServePass | None) -> list[Pair]:
    """Return one comparison per pair whose arms both have an artifact.

    Quality and training are compared seed by seed, arm and base of the same seed, and combined over
    seeds.
    """
    all_seeds = [
        _Seed(seed, running.book.finished(seed), spends_of(running, seed))
        for seed in running.session.seeds
    ]
    pairs = [
        pair
        for pair in compared(running)
        if all(pair.arm in each.rows and pair.base in each.rows for each in all_seeds)
    ]
    return [_one(running, pair, all_seeds, served) for pair in pairs]


def _one(
    running: Running, pair: Comparison, all_seeds: list[_Seed], served: ServePass | None
) -> Pair:
    serving = _serving(running, pair, served)
    payback = None
    if served is not None and serving is not None:
        payback = _payback(running, pair, all_seeds, served, serving)
    elif running.book.why_unserved is not None:
        payback = savings.payback(
            null(running.book.why_unserved),
            null(running.book.why_unserved),
            savings.no_serving_saving(running.book.why_unserved),
            unit=UNIT[running.session.run.task],
        )
    quality = _quality(running, pair, all_seeds)
    training = None
    if Measure.training in pair.on:
        training = combine_training([_training(running, pair, each) for each in all_seeds])
        decides = primary_key([quality], running.session.run.task)
        if decides is not None:
            # A saving is only one at equal quality, and test has the last word.
            training = savings.unless_worse(training, quality[decides])
    judged = None
    if served is not None and serving is not None and _is_unquantized_form(running, pair):
        judged = savings.speedup(serving, served.serving[pair.arm], served.serving[pair.base])
        # time that could not be compared is no time that was not saved
        if _loud(running, served) is not None:
            judged["no_speedup"] = False
    return {
        "arm": pair.arm,
        "base": pair.base,
        "on": [measure.value for measure in pair.on],
        "speedup": judged,
        "base_is": _base_is(running, pair),
        "quality": quality if Measure.quality in pair.on else {},
        "training": training,
        "serving": serving if Measure.serving in pair.on else None,
        "payback": payback if Measure.payback in pair.on else None,
    }


def _is_unquantized_form(running: Running, pair: Comparison) -> bool:
    """Whether the base is what the arm was quantized from, or that in 16 bits.

    What any other base costs says nothing of a format.
    """
    reference = running.session.stages[pair.arm].reference()
    return reference is not None and (
        reference == pair.base or _is_16_bit_form(running, pair.base, pair.arm)
    )


def _base_is(running: Running, pair: Comparison) -> str | None:
    """Return what the base of a pair is to its arm, which words of a report go by; else None."""
    stages, run = running.session.stages, running.session.run
    control = stages[pair.base].control(run) if pair.base in stages else None
    if control is not None and control.of == pair.arm:
        return f"{control.matches}_control"
    arm = stages[pair.arm]
    if arm.learns_from() == pair.base:
        return "teacher"
    if _is_unquantized_form(running, pair):
        return BEST_16_BIT if _is_best_16_bit(running, pair) else "source"
    return None


def without_speedup(running: Running) -> list[str]:
    """Return the quantized arms that save neither time nor memory at the declared load.

    An arm has to save against every form of its source that it is read against: fp32, and 16 bits.
    """
    useless = [
        pair["arm"]
        for pair in running.book.comparisons
        if pair["speedup"] and pair["speedup"]["no_speedup"]
    ]
    return list(dict.fromkeys(useless))


def _is_best_16_bit(running: Running, pair: Comparison) -> bool:
    return pair.base == base_of(running, replace(pair, base=BEST_16_BIT))


def _quality(
    running: Running, pair: Comparison, all_seeds: list[_Seed]
) -> dict[str, ComparedQuality]:
    """Compare the two arms on every quality that both have, document by document."""
    config, primary = running.session.run.quality, PRIMARY[running.session.run.task]
    items = [
        tuple(read_items(items_of(each.rows[arm], primary)) for arm in (pair.arm, pair.base))
        for each in all_seeds
    ]
    keys = compared_keys(*items[0])
    by_key = {
        key: [
            compare_items(
                key, ours, theirs, margin=config.margin, resamples=config.bootstrap, seed=each.seed
            )
            for each, (ours, theirs) in zip(all_seeds, items, strict=True)
        ]
        for key in keys
    }
    by_key |= {
        key: [_task(running, pair, each, key) for each in all_seeds]
        for key in _tasks_of(pair, all_seeds)
    }
    found = {
        key: combine_seeds(per_seed, is_share=key not in RELATIVE)
        for key, per_seed in by_key.items()
    }
    for key in keys:
        found[key]["available"] = num_documents(
            running.session.data.splits["test"], grouped=found[key].get("groups") is not None
        )
    return found


def _tasks_of(pair: Comparison, all_seeds: list[_Seed]) -> list[str]:
    """Return the quality keys of lm-eval tasks that arm and base have a figure of, for every
    seed.
    """
    sides = [each.rows[arm]["quality"] for each in all_seeds for arm in (pair.arm, pair.base)]
    return [
        key
        for key in sides[0]
        if key.startswith(TASK) and all(side.get(key, {}).get("items") for side in sides)
    ]


def _task(running: Running, pair: Comparison, each: _Seed, key: str) -> ComparedQuality:
    """Compare the two arms on a metric of an lm-eval task, document by document."""
    ours, theirs = (read_items(items_of(each.rows[arm], key)) for arm in (pair.arm, pair.base))
    config = running.session.run.quality
    return compare_items(
        key.rpartition("/")[2],
        ours,
        theirs,
        margin=config.margin,
        resamples=config.bootstrap,
        seed=each.seed,
    )


def _training(running: Running, pair: Comparison, each: _Seed) -> TrainingSaving:
    run = running.session.run
    arm, base = (_trained(running, name, each) for name in (pair.arm, pair.base))
    return training_saving(
        arm,
        base,
        each.spends,
        margin=run.quality.margin,
        lower_is_better=DIRECTION[PRIMARY[run.task]] < 0,
        # An arm's own training is never divided among others.
        teachers=_teachers(running) - {pair.arm, pair.base},
        shared_by=run.cost.teacher_shared_by,
        tolerance=tolerance(running),
    )


def _teachers(running: Running) -> set[str]:
    """Return the teachers, and caches of them, of all stages: several students may share one."""
    run = running.session.run
    return {
        arm
        for stage in running.session.stages.values()
        for role, arm in stage.inputs(run).items()
        if role in (TEACHER, CACHE)
    }


def basis(running: Running) -> ComparisonBasis:
    """Return what the comparisons of a run rest on, beside per-document values: with both they can
    be made again.
    """
    pairs = running.book.comparisons
    read = {side for pair in pairs if pair["training"] for side in (pair["arm"], pair["base"])}
    seeds = [
        _Seed(seed, running.book.finished(seed), spends_of(running, seed))
        for seed in running.session.seeds
    ]
    allowed, served = tolerance(running), running.book.served
    return {
        "seeds": [
            {
                "seed": each.seed,
                "spends": [spend.to_json() for spend in each.spends.values()],
                "trained": [_trained(running, arm, each).to_json() for arm in sorted(read)],
            }
            for each in seeds
        ],
        "teachers": sorted(_teachers(running)),
        "tolerance": {"most": allowed.most, "what": allowed.what, "is_shared": allowed.is_shared},
        "served": None if served is None else served.to_json(),
        "served_elsewhere_h": running.book.served_elsewhere_h,
    }


def _trained(running: Running, arm: str, each: _Seed) -> Trained:
    """Return how an arm's training went. Loading, preparing and checkpoints are charged to every
    point of its curve.
    """
    made = running.book.arms.get((arm, each.seed))
    curve = [] if made is None else made.output.curve
    if made is None or not curve:
        return Trained(arm=arm, final=None)
    last = curve[-1]
    steps = made.output.counts.get("steps", null("not counted")).value
    if steps is not None and last["step"] < steps:  # its last reading failed
        return Trained(arm=arm, final=None)
    # Hours outside of steps and evaluations: charged in full wherever the curve is cut.
    fixed_h = max(0.0, each.spends[arm].work_h - (last["seconds"] + last["eval_seconds"]) / 3600)
    readings = tuple(
        Reading(
            int(point["tokens"]),
            point["metric"],
            fixed_h + point["seconds"] / 3600,
            bool(point["constant"]),
        )
        for point in curve
    )
    return Trained(arm=arm, final=last["metric"], curve=readings)


def _serving(running: Running, pair: Comparison, served: ServePass | None) -> ServingSaving | None:
    key = (pair.arm, pair.base)
    if served is None and running.book.why_unserved is not None and Measure.serving in pair.on:
        return savings.no_serving_saving(running.book.why_unserved)
    if served is None or key not in served.seconds:
        return None
    rows = running.book.finished(running.session.seeds[0])
    if (
        running.session.gate is None
        and artifact_of(rows[pair.arm])["digest"] == artifact_of(rows[pair.base])["digest"]
    ):
        # what two readings differ by is noise
        reading = savings.no_serving_saving("both are the same artifact")
    elif _other_tokens(running, key, rows):
        reading = savings.no_serving_saving(OTHER_TOKENIZER)
    elif (why := _loud(running, served)) is not None:
        reading = savings.no_serving_saving(why)
    else:
        reading = served.saving(key)
    ways = dict.fromkeys(served.how[arm] for arm in key)
    dtypes = {
        side: _dtype_word(served.how[arm]) for side, arm in zip(("arm", "base"), key, strict=True)
    }
    return {**reading, "how": " against ".join(ways), "dtypes": dtypes}


def _dtype_word(how: str) -> str:
    """Return the dtype that an arm was served in, as settings name it."""
    word = how.partition(",")[0]
    return WORDS.get(word, word)


def _loud(running: Running, served: ServePass) -> str | None:
    """Return why times of a comparison pass are not compared (others took too much of the device),
    or None; a gate has its policy for that.
    """
    if running.session.gate is not None or "foreign_load" not in served.conditions:
        return None
    said = tolerance(running).too_much(Value.from_json(served.conditions["foreign_load"]))
    return (
        None
        if said is None
        else f"{said} while serving was measured; the same command measures it again"
    )


def _other_tokens(running: Running, arms: tuple[str, str], rows: Rows) -> bool:
    paths = (Path(artifact_of(rows[arm])["path"]) for arm in arms)
    with running.session.clock.phase("prepare"):
        return other_tokenizers(running.session.run.task, *paths)


def _payback(
    running: Running,
    pair: Comparison,
    all_seeds: list[_Seed],
    served: ServePass,
    serving: ServingSaving,
) -> Payback:
    """Return when serving has repaid what the arm took beyond its base (mean over seeds)."""
    extra = [savings.c_opt(pair.arm, pair.base, each.spends) for each in all_seeds]
    mean = derive(lambda *hours: float(np.mean(hours)), *extra)
    declared = running.session.run.serving
    return savings.payback(
        mean,
        served.per_unit(pair.base),
        serving,
        unit=UNIT[running.session.run.task],
        volume=declared.volume,
        rate=declared.rate,
    )


def fill_serving(running: Running, served: ServePass | None) -> None:
    """Put the serving figures on the rows they belong to, and say why the other rows have none."""
    first = running.session.seeds[0]
    for row in running.book.rows:
        if row["artifact"] is None or row["artifact"]["kind"] != MODEL:
            continue
        engine = running.session.engine.get(row["arm"]) if row["seed"] == first else None
        declared = (
            {name: value.to_json() for name, value in engine.figures.items()} if engine else {}
        )
        if served is None or row["arm"] not in served.serving:
            fallback = "a fallback is not served: the stage it belongs to is"
            unserved = (
                running.book.why_unserved or "the recipe does not compare this arm on serving"
            )
            why = fallback if is_fallback(row["arm"]) else unserved
            row["serving"] = {"device_s_per_1k_units": null(why).to_json(), **declared}
        elif row["seed"] != first:
            why = f"serving is measured on the artifacts of seed {first}"
            row["serving"] = {"device_s_per_1k_units": null(why).to_json()}
        else:
            row["serving"] = {**served.serving[row["arm"]], **declared}
