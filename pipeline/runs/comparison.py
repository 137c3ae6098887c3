"""The comparison pass of a run: the recipe's pairs, read on quality, training, serving and
payback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare import savings
from pipeline.compare.blocks import disturbances
from pipeline.compare.quality import combine_seeds, compare_items, compared_keys
from pipeline.compare.savings import Reading, Spend, Trained, combine_training, training_saving
from pipeline.compare.verdict import disturbed, moved
from pipeline.config.arms import BEST_16_BIT, is_rung, stage_name
from pipeline.config.settings import SIXTEEN_BITS, Comparison, Measure, ServingDtype, Task
from pipeline.data.encode import encode_all
from pipeline.distillation.cache import tokenizer_digest
from pipeline.evaluation.quality.assess import read_items
from pipeline.evaluation.serving.decoding import chosen
from pipeline.evaluation.serving.dtype import WORDS, choose_dtype
from pipeline.evaluation.serving.measure import ServePass, serve_pass
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.booking import device_hours
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.disturbance import mean
from pipeline.ledger.metrics import DIRECTION, PRIMARY, RELATIVE, TASK, UNIT, primary_key
from pipeline.ledger.record import disturbance_of
from pipeline.ledger.records import SERVED
from pipeline.ledger.values import Value, derive, null
from pipeline.models.load import load_tokenizer
from pipeline.runs.attempt import device_name, named
from pipeline.runs.past_cost import charge, past_spend
from pipeline.stages.capture import CaptureStage
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.release import BASELINE, CANDIDATE, ReleaseStage
from pipeline.stages.settings import BASE, STUDENT_INIT
from pipeline.store.artifacts import MODEL, Artifact, digest_given, facts_of, key_of, plain

if TYPE_CHECKING:
    from pipeline.runs.attempt import Attempt

PROMPT_DOCUMENTS = 64  # test documents that prompts are cut from
OTHER_TOKENIZER = "the two have other tokenizers: a token is not the same amount of text"
# settings that change nothing of what is measured
UNSERVED = ("volume", "rate", "results", "check_vllm")
Row = dict[str, Any]
Rows = dict[str, Row]
"""By arm, the row that made its artifact, for one seed."""


@dataclass(frozen=True, slots=True)
class _Seed:
    """What is compared for one seed."""

    seed: int
    rows: Rows
    spends: dict[str, Spend]


def compare(attempt: Attempt) -> None:
    """Compare the recipe's pairs. Serving is measured in a window of its own, or reused with what
    it took.
    """
    _say_what_lacks_16_bits(attempt)
    pairs = served_pairs(attempt)
    served = attempt.served = _tried(attempt, pairs) if pairs else None
    if served is not None:
        attempt.notes += [f"serving: {each}" for each in served.dtype.get("said", [])]
    fill_serving(attempt, served)
    attempt.comparisons = compare_all(attempt, served)
    attempt.journal.write(
        "serving",
        rows=[
            {name: row[name] for name in ("arm", "seed", "attempt", "serving")}
            for row in attempt.rows
            if row["serving"]
        ],
    )
    attempt.journal.write("comparisons", comparisons=attempt.comparisons)


def _tried(attempt: Attempt, pairs: list[tuple[str, str]]) -> ServePass | None:
    """Return what the comparison pass reads; None, with the reason kept, where it fails. A gate has
    to have it.
    """
    if attempt.gate is not None:
        return _served(attempt, pairs)

    def failed(why: str) -> None:
        attempt.why_unserved = unmeasured("serving", why)
        attempt.notes.append(attempt.why_unserved)

    return attempted(lambda: _served(attempt, pairs), failed)


def _served(attempt: Attempt, pairs: list[tuple[str, str]]) -> ServePass:
    rows = finished_rows(attempt, attempt.seeds[0])
    key = key_of(
        pairs=pairs,
        artifacts={arm: rows[arm]["artifact"]["digest"] for pair in pairs for arm in pair},
        serving={k: v for k, v in plain(attempt.run.serving).items() if k not in UNSERVED}
        | {"decode": chosen(attempt.run.serving.decode, attempt.device)},
        task=attempt.run.task,
        data=attempt.data.digest,
        **attempt.made_on(),
        **(
            {"look": attempt.gate.look, "energy": attempt.gate.policy.energy is not None}
            if attempt.gate
            else {}
        ),
    )
    with attempt.hold(key, "comparison pass"):
        record = attempt.store.recall("serving", key, SERVED)
        if record is None or not _holds(attempt, record):
            return _measured(attempt, pairs, key)
    if record["run_id"] != attempt.run_id:
        attempt.reused_h += device_hours(record["elapsed_ns"] * record.get("devices", 1))
    return ServePass.from_json(record["served"])


def _holds(attempt: Attempt, record: dict[str, Any]) -> bool:
    """Whether a pass that was measured before stands: where it was not disturbed, for a gate by its
    policy.

    A look is read once, whatever policies judge it: a gate that measured anew for each would find
    one that passes.
    """
    if record["run_id"] == attempt.run_id:
        return True
    if attempt.gate is None:  # what was disturbed is measured anew: its savings are not shown
        foreign = Value.from_json(
            record["served"]["conditions"].get("foreign_load", null("not recorded").to_json())
        )
        return tolerance(attempt).too_much(foreign) is None
    served, pair = ServePass.from_json(record["served"]), (CANDIDATE, BASELINE)
    if disturbed(attempt.gate.policy, device_name(attempt.device), served.conditions):
        return False
    if pair not in served.orders:  # of an older release
        return True
    return not moved(
        attempt.gate.policy, *served.seconds[pair], served.orders[pair], served.places[pair]
    )


def _measured(attempt: Attempt, pairs: list[tuple[str, str]], key: str) -> ServePass:
    attempt.check_budget()
    print("comparison pass: serving", flush=True)
    with (
        attempt.window("compare", None, -1) as window,
        named(attempt, "comparison pass", None, "compare"),
    ):
        served = serve(attempt, pairs, _order_seed(attempt, key))
    attempt.store.remember(
        "serving",
        key,
        {
            "run_id": attempt.run_id,
            "elapsed_ns": window.elapsed_ns,
            "devices": attempt.devices,
            "served": served.to_json(),
        },
    )
    return served


def _order_seed(attempt: Attempt, key: str) -> int:
    """Return a seed that another run, and another look, do not share."""
    return int(key_of(run=attempt.run_id, key=key)[:8], 16)


def served_pairs(attempt: Attempt) -> list[tuple[str, str]]:
    """Return the pairs that are read on serving or payback and have both artifacts (of the first
    seed).
    """
    rows = finished_rows(attempt, attempt.seeds[0])
    pairs = [
        pair for pair in compared(attempt) if {Measure.serving, Measure.payback} & set(pair.on)
    ]
    return [(pair.arm, pair.base) for pair in pairs if pair.arm in rows and pair.base in rows]


def compared(attempt: Attempt) -> list[Comparison]:
    """Return the recipe's pairs; `best_16_bit` is the arm it stands for, and a pair without such an
    arm is left out.
    """
    found = [(pair, base_of(attempt, pair)) for pair in attempt.run.compare]
    return [replace(pair, base=base) for pair, base in found if base is not None]


def base_of(attempt: Attempt, pair: Comparison) -> str | None:
    """Return the arm that a pair is read against: of `best_16_bit`, the 16-bit form that suits this
    device best.
    """
    from pipeline.models.sixteen_bits import best_first

    if pair.base != BEST_16_BIT:
        return pair.base
    rows, order = finished_rows(attempt, attempt.seeds[0]), best_first(attempt.device)
    forms = [
        (order.index(stage.format), name)
        for name, stage in attempt.run.stages.items()
        if name in rows and name != pair.arm and _is_16_bit_form(attempt, name, pair.arm)
    ]
    return min(forms)[1] if forms else None


def _is_16_bit_form(attempt: Attempt, name: str, arm: str) -> bool:
    """Whether an arm is, in 16 bits, what another one was quantized from."""
    stage, other = attempt.run.stages[name], attempt.run.stages[arm]
    both = isinstance(stage, QuantizeStage) and isinstance(other, QuantizeStage)
    return both and stage.format in SIXTEEN_BITS and stage.model == other.model


def _say_what_lacks_16_bits(attempt: Attempt) -> None:
    lacking = [pair.arm for pair in attempt.run.compare if base_of(attempt, pair) is None]
    if lacking:
        attempt.notes.append(
            f"{', '.join(lacking)}: no arm has the same model in 16 bits here: read against fp32"
            " alone"
        )


def finished_rows(attempt: Attempt, seed: int) -> Rows:
    """Return the rows of one seed that have an artifact, by arm."""
    return {
        row["arm"]: row
        for row in attempt.rows
        if row["seed"] == seed and row["artifact"] is not None
    }


def serve(attempt: Attempt, pairs: list[tuple[str, str]], order_seed: int) -> ServePass:
    """Measure the arms of `pairs` at the declared load, interleaved. What an artifact costs is the
    same for all seeds, so the first seed's are served. `order_seed` draws the orders of the blocks,
    and is recorded.
    """
    rows = finished_rows(attempt, attempt.seeds[0])
    folders = {arm: Path(rows[arm]["artifact"]["path"]) for pair in pairs for arm in pair}
    task = attempt.run.task
    with attempt.clock.phase("prepare"):
        # Prompts are the same numbers for every arm; those of the smallest vocabulary are tokens of
        # all.
        tokenizer = min(map(load_tokenizer, folders.values()), key=len)
        documents = attempt.data.splits["test"][:PROMPT_DOCUMENTS]
        encoded = encode_all(
            documents, tokenizer, task, max_length=max(512, attempt.run.serving.load.prompt)
        )
    prompts = [item.input_ids for item in encoded]
    choice = choose_dtype(
        _asked_dtype(attempt),
        folders,
        task=task,
        labels=attempt.data.labels,
        prompts=prompts,
        config=attempt.run.serving,
        device=attempt.device,
        clock=attempt.clock,
        check=attempt.check_budget,
    )
    served = serve_pass(
        folders,
        pairs,
        dtype=choice.dtype,
        task=task,
        labels=attempt.data.labels,
        prompts=prompts,
        config=attempt.run.serving,
        device=attempt.device,
        devices=attempt.devices,
        seed=0,
        clock=attempt.clock,
        sampler=attempt.sampler,
        check=attempt.check_budget,
        energy_of=pairs[0] if attempt.gate and attempt.run.policy.energy is not None else None,
        order_seed=order_seed,
    )
    for arm, drift in choice.drift.items():
        served.serving[arm] |= drift.figures()
    return replace(served, dtype=choice.to_json())


def _asked_dtype(attempt: Attempt) -> ServingDtype:
    """Return the setting; a gate's later look is served as the look before it was, because both are
    read together.
    """
    before = (
        None
        if attempt.gate is None or attempt.gate.earlier is None
        else attempt.gate.earlier.get("dtype")
    )
    return (
        attempt.run.serving.dtype
        if before is None or before["served"] is None
        else ServingDtype(before["served"])
    )


def compare_all(attempt: Attempt, served: ServePass | None) -> list[dict[str, Any]]:
    """Return one comparison per pair whose arms both have an artifact.

    Quality and training are compared seed by seed, arm and base of the same seed, and combined over
    seeds.
    """
    all_seeds = [
        _Seed(seed, finished_rows(attempt, seed), spends_of(attempt, seed))
        for seed in attempt.seeds
    ]
    pairs = [
        pair
        for pair in compared(attempt)
        if all(pair.arm in each.rows and pair.base in each.rows for each in all_seeds)
    ]
    return [_one(attempt, pair, all_seeds, served) for pair in pairs]


def spends_of(attempt: Attempt, seed: int) -> dict[str, Spend]:
    """Return what every arm's own stage took, with what each depends on, and what given models cost
    before.
    """
    paths, device = (
        {BASE: attempt.run.model.path, STUDENT_INIT: attempt.run.student.path},
        device_name(attempt.device),
    )
    spends = {arm: past_spend(arm, path, device) for arm, path in paths.items()}
    of_seed = [row for row in attempt.rows if row["seed"] == seed]
    for name, stage in attempt.run.stages.items():
        # a recovery is charged with every rung
        own = [row for row in of_seed if stage_name(row["arm"]) == name]
        hours = {
            part: sum(row["ledger"]["device_hours"][part]["value"] or 0.0 for row in own)
            for part in ("work", "retry")
        }
        starts_from = [STUDENT_INIT] if getattr(stage, "model", None) == STUDENT_INIT else []
        # some model wrote them, at a cost that nobody noted down
        if getattr(stage, "completions", None) is not None:
            written = f"{name}'s completions"
            spends[written] = Spend(
                arm=written, flops=0.0, existing=True, unknown="made by a model elsewhere"
            )
            starts_from.append(written)
        if isinstance(stage, ReleaseStage):
            continue
        spends[name] = Spend(
            arm=name,
            depends_on=(*stage.reads(attempt.run), *starts_from),
            work_h=hours["work"],
            retry_h=hours["retry"],
            flops=_flops(own),
            foreign_load=_foreign_load(own),
        )
    return spends if attempt.gate is None else {**spends, **attempt.gate.spends()}


def note_charges(attempt: Attempt) -> None:
    """Write into the artifact.json of every model of this run what its chain took: a release gate
    compares that.
    """
    made = [
        row
        for row in attempt.rows
        if row["status"] == "FINISHED" and (row["artifact"] or {}).get("kind") == MODEL
    ]
    paths = {BASE: attempt.run.model.path, STUDENT_INIT: attempt.run.student.path}
    existing = {
        arm: digest_given(Path(path).expanduser())[0] if Path(path).expanduser().is_dir() else path
        for arm, path in paths.items()
        if path is not None
    }
    for row in made:
        if (
            is_rung(row["arm"])
            or row["arm"] not in attempt.run.stages
            or row["type"] == ReleaseStage.type
        ):
            continue
        artifact = Artifact.from_json(row["artifact"])
        if "charge" in facts_of(artifact.path):
            continue
        where = {
            "kind": device_of(attempt.device).kind,
            "name": device_name(attempt.device),
            "count": attempt.devices,
            "power_limit_w": attempt.placement.get("power_limit_w"),
        }
        facts = charge(row["arm"], spends_of(attempt, row["seed"]), existing)
        repeats = [
            charge(row["arm"], spends_of(attempt, seed), existing)["work_device_hours"]
            for seed in attempt.seeds
        ]
        tokens = row["ledger"]["counts"]["tokens"]["value"]
        attempt.store.annotate(
            artifact,
            "charge",
            {
                "run_id": row["reused"] or attempt.run_id,
                "seed": row["seed"],
                "device": where,
                "tokens": tokens,
                **facts,
                **(
                    {"seeds_device_hours": repeats} if len(repeats) > 1 and min(repeats) > 0 else {}
                ),
            },
        )


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


def tolerance(attempt: Attempt) -> savings.Tolerance:
    """Return what others may take of this run's device before a saving of time is not shown."""
    on_cpu = attempt.device.type == "cpu"
    return savings.Tolerance(
        attempt.run.ledger.max_foreign_load,
        "the cores" if on_cpu else "the device",
        is_shared=on_cpu,
    )


def _flops(own: list[Row]) -> float | None:
    """Return the FLOPs of a stage's work; quantizing is not counted in FLOPs."""
    made = [row for row in own if row["artifact"] is not None]
    return made[-1]["ledger"]["counts"]["model_flops"]["value"] if made else None


def _one(
    attempt: Attempt, pair: Comparison, all_seeds: list[_Seed], served: ServePass | None
) -> dict[str, Any]:
    serving = _serving(attempt, pair, served)
    payback = None
    if served is not None and serving is not None:
        payback = _payback(attempt, pair, all_seeds, served, serving)
    elif attempt.why_unserved is not None:
        payback = savings.payback(
            null(attempt.why_unserved),
            null(attempt.why_unserved),
            savings.no_serving_saving(attempt.why_unserved),
            unit=UNIT[attempt.run.task],
        )
    quality = _quality(attempt, pair, all_seeds)
    training = None
    if Measure.training in pair.on:
        training = combine_training([_training(attempt, pair, each) for each in all_seeds])
        decides = primary_key((PRIMARY[attempt.run.task],), [quality])
        if decides is not None:
            training = _unless_worse(training, quality[decides], pair)
    judged = None
    if served is not None and serving is not None and _is_unquantized_form(attempt, pair):
        judged = savings.speedup(serving, served.serving[pair.arm], served.serving[pair.base])
        # time that could not be compared is no time that was not saved
        if _loud(attempt, served) is not None:
            judged["no_speedup"] = False
    return {
        "arm": pair.arm,
        "base": pair.base,
        "on": [measure.value for measure in pair.on],
        "speedup": judged,
        "base_is": BEST_16_BIT if judged is not None and _is_best_16_bit(attempt, pair) else None,
        "quality": quality if Measure.quality in pair.on else {},
        "training": training,
        "serving": serving if Measure.serving in pair.on else None,
        "payback": payback if Measure.payback in pair.on else None,
    }


def _is_unquantized_form(attempt: Attempt, pair: Comparison) -> bool:
    """Whether the base is what the arm was quantized from, or that in 16 bits.

    What any other base costs says nothing of a format.
    """
    stage = attempt.run.stages[pair.arm]
    return isinstance(stage, QuantizeStage) and (
        stage.model == pair.base or _is_16_bit_form(attempt, pair.base, pair.arm)
    )


def without_speedup(attempt: Attempt) -> list[str]:
    """Return the quantized arms that save neither time nor memory at the declared load.

    An arm has to save against every form of its source that it is read against: fp32, and 16 bits.
    """
    useless = [
        pair["arm"]
        for pair in attempt.comparisons
        if pair["speedup"] and pair["speedup"]["no_speedup"]
    ]
    return list(dict.fromkeys(useless))


def _is_best_16_bit(attempt: Attempt, pair: Comparison) -> bool:
    return pair.base == base_of(attempt, replace(pair, base=BEST_16_BIT))


def _quality(attempt: Attempt, pair: Comparison, all_seeds: list[_Seed]) -> dict[str, Any]:
    """Compare the two arms on every quality that both have, document by document."""
    config, primary = attempt.run.quality, PRIMARY[attempt.run.task]
    items = [
        tuple(
            read_items(Path(each.rows[arm]["quality"][primary]["items"]))
            for arm in (pair.arm, pair.base)
        )
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
        key: [_task(attempt, pair, each, key) for each in all_seeds]
        for key in _tasks_of(pair, all_seeds)
    }
    found = {
        key: combine_seeds(per_seed, is_share=key not in RELATIVE)
        for key, per_seed in by_key.items()
    }
    for key in keys:
        found[key]["available"] = available(attempt, grouped=found[key].get("groups") is not None)
    return found


def available(attempt: Attempt, *, grouped: bool) -> int:
    """Return how many documents, or groups of them, the test split has in all, assessed or not."""
    documents = attempt.data.splits["test"]
    if not grouped:
        return len(documents)
    return len(
        {
            ("group", each.group) if each.group is not None else ("own", each.digest)
            for each in documents
        }
    )


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


def _task(attempt: Attempt, pair: Comparison, each: _Seed, key: str) -> dict[str, Any]:
    """Compare the two arms on a metric of an lm-eval task, document by document."""
    ours, theirs = (
        read_items(Path(each.rows[arm]["quality"][key]["items"])) for arm in (pair.arm, pair.base)
    )
    config = attempt.run.quality
    return compare_items(
        key.rpartition("/")[2],
        ours,
        theirs,
        margin=config.margin,
        resamples=config.bootstrap,
        seed=each.seed,
    )


def _training(attempt: Attempt, pair: Comparison, each: _Seed) -> dict[str, Any]:
    run = attempt.run
    arm, base = (_trained(attempt, name, each) for name in (pair.arm, pair.base))
    teachers = {stage.teacher for stage in run.stages.values() if hasattr(stage, "teacher")}
    teachers |= {name for name, stage in run.stages.items() if isinstance(stage, CaptureStage)}
    return training_saving(
        arm,
        base,
        each.spends,
        margin=run.quality.margin,
        lower_is_better=DIRECTION[PRIMARY[run.task]] < 0,
        teachers=teachers - {pair.arm, pair.base},
        shared_by=run.cost.teacher_shared_by,
        tolerance=tolerance(attempt),
    )


def _unless_worse(
    training: dict[str, Any], quality: dict[str, Any], pair: Comparison
) -> dict[str, Any]:
    """Take a saving back where the arm is worse on test: equal on a sample of validation was not
    equal.

    Both readings are point estimates; what the interval on test leaves open is said in the rule.
    """
    if (training["value"] is None and training["algorithmic"]["value"] is None) or quality[
        "value"
    ] is None:
        return training
    if quality["value"] >= -quality["margin"]:
        open_still = quality["ci"] is None or quality["ci"][0] <= -quality["margin"]
        more = "; whether quality is equal on the test split is undecided" if open_still else ""
        return {**training, "rule": training["rule"] + more}
    shortfall = f"{-quality['value']:.3g} on the test split, margin {quality['margin']:g}"
    why = f"censored: {pair.arm} is worse than {pair.base} by {shortfall}"
    hidden = ("new_spend_saving", "systems", "algorithmic", "amortised", "less_others")
    gone = {name: null(why).to_json() for name in hidden if name in training}
    if training["value"] is None:  # of time it had its reason before
        return {**training, **gone}
    return {
        **training,
        **gone,
        **null(why).to_json(),
        "ci": None,
        "bound": Value.from_json(training).to_json(),
    }


def _trained(attempt: Attempt, arm: str, each: _Seed) -> Trained:
    """Return how an arm's training went. Loading, preparing and checkpoints are charged to every
    point of its curve.
    """
    curve = attempt.outputs[arm, each.seed].curve if (arm, each.seed) in attempt.outputs else []
    if not curve:
        return Trained(arm=arm, final=None)
    last = curve[-1]
    steps = attempt.outputs[arm, each.seed].counts.get("steps", null("not counted")).value
    if steps is not None and last["step"] < steps:  # its last reading failed
        return Trained(arm=arm, final=None)
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


def _serving(attempt: Attempt, pair: Comparison, served: ServePass | None) -> dict[str, Any] | None:
    key = (pair.arm, pair.base)
    if served is None and attempt.why_unserved is not None and Measure.serving in pair.on:
        return savings.no_serving_saving(attempt.why_unserved)
    if served is None or key not in served.seconds:
        return None
    rows = finished_rows(attempt, attempt.seeds[0])
    if (
        attempt.gate is None
        and rows[pair.arm]["artifact"]["digest"] == rows[pair.base]["artifact"]["digest"]
    ):
        # what two readings differ by is noise
        reading = savings.no_serving_saving(f"the same artifact as {pair.base}")
    elif other_tokenizers(attempt, *(Path(rows[arm]["artifact"]["path"]) for arm in key)):
        reading = savings.no_serving_saving(OTHER_TOKENIZER)
    elif (why := _loud(attempt, served)) is not None:
        reading = savings.no_serving_saving(why)
    else:
        reading = savings.serving_saving(*served.seconds[key]) | _order_of(served, key)
    ways = dict.fromkeys(served.how[arm] for arm in key)
    dtypes = {
        side: _dtype_word(served.how[arm]) for side, arm in zip(("arm", "base"), key, strict=True)
    }
    return {**reading, "how": " against ".join(ways), "dtypes": dtypes}


def _dtype_word(how: str) -> str:
    """Return the dtype that an arm was served in, as settings name it."""
    word = how.partition(",")[0]
    return WORDS.get(word, word)


def _loud(attempt: Attempt, served: ServePass) -> str | None:
    """Return why a comparison pass compares no times, or None; a gate has its policy for that."""
    if attempt.gate is not None or "foreign_load" not in served.conditions:
        return None
    said = tolerance(attempt).too_much(Value.from_json(served.conditions["foreign_load"]))
    return (
        None
        if said is None
        else f"{said} while serving was measured; the same command measures it again"
    )


def other_tokenizers(attempt: Attempt, arm: Path, base: Path) -> bool:
    """Whether two language models read text as other tokens: seconds per token are then of other
    texts.
    """
    if attempt.run.task is not Task.causal_lm:  # an example is one, whatever its tokens
        return False
    with attempt.clock.phase("prepare"):
        ours, theirs = (tokenizer_digest(load_tokenizer(folder)) for folder in (arm, base))
    return ours != theirs


def _order_of(served: ServePass, pair: tuple[str, str]) -> dict[str, Any]:
    """Return how a pair's blocks were ordered, and what moved their readings beside the two
    arms.
    """
    if pair not in served.orders:
        return {}
    orders, places = served.orders[pair], served.places[pair]
    return {
        "orders": orders,
        "order_seed": served.order_seed,
        "warm_up": served.warm_up,
        "disturbed": disturbances(*served.seconds[pair], orders, places),
    }


def _payback(
    attempt: Attempt,
    pair: Comparison,
    all_seeds: list[_Seed],
    served: ServePass,
    serving: dict[str, Any],
) -> dict[str, Any]:
    """Return when serving has repaid what the arm took beyond its base (mean over seeds)."""
    extra = [savings.c_opt(pair.arm, pair.base, each.spends) for each in all_seeds]
    mean = derive(lambda *hours: float(np.mean(hours)), *extra)
    c_base = _per_unit(served.serving[pair.base])
    declared = attempt.run.serving
    return savings.payback(
        mean,
        c_base,
        serving,
        unit=UNIT[attempt.run.task],
        volume=declared.volume,
        rate=declared.rate,
    )


def _per_unit(figures: Mapping[str, Any]) -> Value:
    return derive(lambda seconds: seconds / 1000, Value.from_json(figures["device_s_per_1k_units"]))


def fill_serving(attempt: Attempt, served: ServePass | None) -> None:
    """Put the serving figures on the rows they belong to, and say why the other rows have none."""
    first = attempt.seeds[0]
    for row in attempt.rows:
        if row["artifact"] is None or row["artifact"]["kind"] != MODEL:
            continue
        engine = attempt.engine.get(row["arm"]) if row["seed"] == first else None
        declared = (
            {name: value.to_json() for name, value in engine.figures.items()} if engine else {}
        )
        if served is None or row["arm"] not in served.serving:
            rung = "a rung is not served: the stage it belongs to is"
            unserved = attempt.why_unserved or "the recipe does not compare this arm on serving"
            why = rung if is_rung(row["arm"]) else unserved
            row["serving"] = {"device_s_per_1k_units": null(why).to_json(), **declared}
        elif row["seed"] != first:
            why = f"serving is measured on the artifacts of seed {first}"
            row["serving"] = {"device_s_per_1k_units": null(why).to_json()}
        else:
            row["serving"] = {**served.serving[row["arm"]], **declared}
