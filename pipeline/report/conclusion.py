"""The conclusion: one honest sentence, whichever way the figures came out.

Every comparison becomes a clause `against BASE, ARM ...`, made of what its figures say: a decided
difference, a difference within the margin, "undecided" with its interval, or "not measurable here"
with the reason. The two controls of distillation have clauses of their own, and `control_compute`
comes first. Nothing is claimed that is not in `comparisons`; a saving below zero is said as "costs
12% more".
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.arms import BEST_16_BIT, is_fallback, stage_name
from pipeline.errors import one_line
from pipeline.ledger.metrics import RELATIVE
from pipeline.ledger.numbers import count, duration, percent, significant
from pipeline.report.phrases import (
    ARM_INTERVAL,
    QUALITY_WORDS,
    amount,
    answer,
    difference,
    evidence,
    interval,
    margin,
    memory_verbs,
    never_pays,
    payback_verb,
    quality_verb,
    rests_on,
    serving_verb,
    signed,
    training_verb,
)
from pipeline.report.verdict import verdict_words
from pipeline.report.view import (
    NOT_RECORDED,
    Pair,
    Result,
    Row,
    Value,
    device_words,
    finished_row,
    hours_of,
    is_finished,
    primary_key,
    primary_of,
    role_word,
    seeds,
    unfinished,
    what_happened,
    why_missing,
)

_CONTROLS = {
    "compute_control": "the control with equal compute",
    "tokens_control": "the control with equal tokens",
}
"""What a base is to the arm that it is a control of, in words."""
_SAME = 0.05
"""FLOPs or tokens of a control this close to the student's (a fraction) are called equal; else the
ratio is said.
"""
_WHOLE = 0.9
"""Share of the parameters from which on a model is called quantized without saying how much of it
is.
"""
_NAME_LIMIT = 60
"""Characters of an arm's name in a sentence."""


def conclude(result: Result) -> str:
    """Return the conclusion: one sentence, and a second one naming what is missing where something
    is.
    """
    if result.get("verdict"):
        end = _end_of_run(result)
        return " ".join([verdict_words(result["verdict"]), *([_sentence(end)] if end else [])])
    if result.get("is_release_check"):
        return " ".join(
            _sentence(text) for text in ("no verdict was come to", _end_of_run(result)) if text
        )
    clauses, explained = _compared(result)
    found = seeds(result)
    if not found:
        clauses, explained = (
            ["no stage finished, so nothing can be said about cost or quality"],
            set[str](),
        )
    elif not clauses:
        primary = result["primary_arm"]
        clauses, explained = (
            _cost_and_quality(result),
            ({primary} if why_missing(result, primary) else set[str]()),
        )
    clauses = [*_kept(result), *clauses]
    if found:
        clauses.append("one seed" if len(found) == 1 else f"{len(found)} seeds")
    sentences = ["; ".join(clauses), "; ".join(_missing(result, explained)), _end_of_run(result)]
    return " ".join(_sentence(text) for text in sentences if text)


def _compared(result: Result) -> tuple[list[str], set[str]]:
    """Return the clauses of all comparisons, and the arms whose absence they explain."""
    clauses: list[str] = []
    explained: set[str] = set()
    preface = ""
    pairs = [pair for pair in result["comparisons"] if not _is_kept(result, pair["arm"])]
    for pair in sorted(pairs, key=lambda pair: pair.get("base_is") != "compute_control"):
        missing = {
            arm: why
            for arm in (pair["arm"], pair["base"])
            if (why := why_missing(result, arm)) is not None
        }
        if not missing:
            said = f"against {_base_words(result, pair)}, "
            clauses += _clauses(result, pair, "" if said == preface else said)
            preface = said if _verbs(result, pair) else ""
        elif new := {arm: why for arm, why in missing.items() if arm not in explained}:
            reasons = ", ".join(f"{_word(result, arm)} {why}" for arm, why in new.items())
            clauses.append(f"{_pair_words(result, pair)}: not measurable here: {reasons}")
            explained |= set(new)
            preface = ""
    return clauses, explained


def _kept(result: Result) -> list[str]:
    """Return a clause for each quantize stage that left its model as it is, in one seed or in
    all.
    """
    clauses: list[str] = []
    for arm in dict.fromkeys(row["arm"] for row in result["rows"] if not is_fallback(row["arm"])):
        kept = [row for row in _done(result, arm) if row.get("unchanged")]
        if kept:
            why, source = (
                one_line(kept[0]["unchanged"]["why"]),
                one_line(kept[0]["unchanged"]["as"], _NAME_LIMIT),
            )
            which = (
                ""
                if _is_kept(result, arm)
                else f" of seed {_listed([str(row['seed']) for row in kept])}"
            )
            clauses.append(
                f"no format pays: {_subject(result, arm)}{which} stays as"
                f" {_subject(result, source)} is ({why})"
            )
    return clauses


def _is_kept(result: Result, arm: str) -> bool:
    """Whether an arm is its source in all seeds: what it and a form of that differ by is no
    quantization's doing.
    """
    done = _done(result, arm)
    return bool(done) and all(row.get("unchanged") for row in done)


def _done(result: Result, arm: str) -> list[Row]:
    return [row for row in result["rows"] if row["arm"] == arm and is_finished(row)]


def _clauses(result: Result, pair: Pair, preface: str) -> list[str]:
    """Return what one comparison says: a control's clause, the verbs of its arm, the nulls with
    their reasons.

    `preface` is `against BASE, `, or empty where the clause before speaks of the same base.
    """
    clauses = _control_clause(result, pair)
    if verbs := _verbs(result, pair):
        clauses.append(
            f"{preface}{_subject(result, pair['arm'])}{_in_part(result, pair)} {_listed(verbs)}"
        )
    context = f"{_subject(result, pair['arm'])}'s " if clauses else f"{_pair_words(result, pair)}: "
    by_reason: dict[str, list[str]] = {}
    for what, why in _nulls(pair):
        by_reason.setdefault(why, []).append(what)
    return clauses + [
        f"{context}{_listed(what)}: not measurable here: {why}" for why, what in by_reason.items()
    ]


def _figure(pair: Pair, measure: str) -> Value | None:
    """Return the figure that a comparison is read on for one of the measures of `on`."""
    if measure != "quality":
        return pair[measure]
    key = primary_of(pair)
    return None if key is None else pair["quality"][key]


def _is_null(figure: Value | None, measure: str) -> bool:
    if figure is None:
        return True
    return figure["value"] is None and not (measure == "payback" and never_pays(figure))


def _verbs(result: Result, pair: Pair) -> list[str]:
    """Return the verb phrases of the arm; quality against a control has a clause of its own."""
    verbs: list[str] = []
    for measure in ("quality", "training", "serving", "payback"):
        figure = _figure(pair, measure)
        if measure not in pair["on"] or figure is None or _is_null(figure, measure):
            continue
        if measure == "quality" and pair.get("base_is") not in _CONTROLS:
            verbs.append(quality_verb(primary_of(pair) or "", figure))
        elif measure == "training":
            verbs.append(training_verb(figure, _charged_too(result, pair)))
        elif measure == "serving":
            verbs.append(serving_verb(figure))
            verbs += memory_verbs(pair["speedup"])
        elif measure == "payback":
            verbs.append(payback_verb(figure, pair["serving"]))
    return verbs


def _charged_too(result: Result, pair: Pair) -> list[str]:
    """Return the other stages whose work is charged to the arm and not to its base, as a teacher's
    is.
    """
    chains = [_chain(result, pair[side]) for side in ("arm", "base")]
    return [
        _word(result, arm)
        for arm in chains[0]
        if arm not in chains[1] and stage_name(arm) != pair["arm"]
    ]


def _chain(result: Result, arm: str) -> list[str]:
    """Return the stages that led to an arm's artifact, each once, the arm last."""
    row = finished_row(result, arm)
    before = [
        each for needed in (row["depends_on"] if row else []) for each in _chain(result, needed)
    ]
    return list(dict.fromkeys([*before, *([arm] if row else [])]))


def _nulls(pair: Pair) -> list[tuple[str, str]]:
    """Return (what, reason) of the figures this comparison was to be read on and could not be."""
    found: list[tuple[str, str]] = []
    for measure in ("quality", "training", "serving", "payback"):
        figure = _figure(pair, measure)
        if measure in pair["on"] and _is_null(figure, measure):
            what = f"{measure} saving" if measure in ("training", "serving") else measure
            found.append(
                (
                    what,
                    (
                        NOT_RECORDED
                        if figure is None
                        else one_line(figure["why_missing"]) + _new_spend(figure)
                    ),
                )
            )
    return found


def _new_spend(figure: Value) -> str:
    """Return the saving that leaves an existing model uncharged, labelled so; it stands in for a
    null one.
    """
    saving = figure.get("new_spend_saving", {}).get("value")
    if saving is None:
        return ""
    return (
        f" (counting new spending alone it {'saves' if saving >= 0 else 'costs'}"
        f" {percent(abs(saving))}" + (")" if saving >= 0 else " more)")
    )


# -- the controls of distillation -----------------------------------------------------------------
def _control_clause(result: Result, pair: Pair) -> list[str]:
    """Return the clause on quality against one of the two controls, or none for other bases and for
    nulls.
    """
    key, quality = primary_of(pair), _figure(pair, "quality")
    if (
        pair.get("base_is") not in _CONTROLS
        or "quality" not in pair["on"]
        or key is None
        or _is_null(quality, "quality")
    ):
        return []
    assert quality is not None
    if pair["base_is"] == "compute_control":
        return [_against_compute(result, pair, key, quality)]
    return [_against_steps(result, pair, key, quality)]


def _against_compute(result: Result, pair: Pair, key: str, quality: Value) -> str:
    """Say what the same FLOPs would have bought.

    A difference is turned round to speak of the control; a figure in brackets stays as
    `comparisons` has it, and says that it is the student's.
    """
    given = _share(result, pair, "model_flops", "the same FLOPs", "the FLOPs")
    start, student = (
        f"given {given} without a teacher (the control with equal compute)",
        f"the distilled {_word(result, pair['arm'])}",
    )
    whose = f"{_subject(result, pair['arm'])}'s"
    if answer(quality) == "undecided":
        rests_on = f"{whose} {evidence(key, quality)}"
        return (
            f"{start}, whether the same model does better than {student} is undecided ({rests_on})"
        )
    if answer(quality) == "equal":
        ending = f"within {margin(key, quality)} ({whose} quality {signed(key, quality['value'])})"
        return f"{start}, the same model does as well as {student}, {ending}"
    rests_on = f"{whose} {signed(key, quality['value'])}, {_spread(result, key, quality)}"
    return (
        f"{start}, the same model {difference(key, turned(key, quality['value']))} than {student}"
        f" ({rests_on})"
    )


def turned(key: str, advantage: float) -> float:
    """Return the base's advantage over the arm from the arm's over the base.

    With `advantage` = 1 - arm/base, the base's is 1 - base/arm; plain differences change their
    sign.
    """
    return -advantage / (1 - advantage) if key in RELATIVE else -advantage


def _against_steps(result: Result, pair: Pair, key: str, quality: Value) -> str:
    start = (
        f"at {_share(result, pair, 'tokens', 'equal tokens', 'the tokens')} (the control with equal"
        " tokens)"
    )
    if answer(quality) == "undecided":
        return f"{start} what distillation adds is undecided ({evidence(key, quality)})"
    if answer(quality) == "equal":
        said = f"{signed(key, quality['value'])}, {_spread(result, key, quality)}"
        return f"{start} distillation changes nothing beyond {margin(key, quality)} ({said})"
    verb = "adds" if quality["value"] > 0 else "costs"
    direction = ("fewer " if quality["value"] > 0 else "more ") if key in RELATIVE else ""
    said = f"{direction}{QUALITY_WORDS[key]}, {_spread(result, key, quality)}"
    return f"{start} distillation {verb} {amount(key, quality['value'])} ({said})"


def _spread(result: Result, key: str, quality: Value) -> str:
    """Return the interval of a comparison and what it is over: documents, or seeds where there are
    several.
    """
    num_seeds = len(seeds(result))
    over = f"{num_seeds} seeds" if num_seeds > 1 else rests_on(quality)
    return f"{interval(quality, in_points=key not in RELATIVE)} over {over}"


def _share(result: Result, pair: Pair, name: str, same: str, other: str) -> str:
    """Return `same`, or how many times the arm's count the control was given where the two
    differ.
    """
    given, meant = (_counted(result, pair[side], name) for side in ("base", "arm"))
    if not given or not meant or abs(given / meant - 1) <= _SAME:
        return same
    return f"{significant(given / meant, 2)}x {other}"


def _counted(result: Result, arm: str, name: str) -> float | None:
    """Return a count of an arm's stage; its FLOPs with those of the capture that it reads, as a
    live teacher's are.
    """
    row = finished_row(result, arm)
    if row is None:
        return None
    read = (
        [finished_row(result, each) for each in row["depends_on"]] if name == "model_flops" else []
    )
    rows = [
        row,
        *(
            each
            for each in read
            if each is not None and (each["artifact"] or {}).get("kind") == "teacher_cache"
        ),
    ]
    counts = [each["ledger"]["counts"][name]["value"] for each in rows]
    return None if None in counts else sum(counts)


# -- no comparison, and what is missing -----------------------------------------------------------
def _cost_and_quality(result: Result) -> list[str]:
    """Return the quality and the cost of the primary arm, for recipes that compare nothing."""
    arm = result["primary_arm"]
    row = finished_row(result, arm)
    if row is None:
        return [f"{_subject(result, arm)}: not measurable here: it {why_missing(result, arm)}"]
    key = primary_key(result)
    return [
        f"{_subject(result, row['arm'])} {_quality_level(key, row['quality'].get(key))}",
        _cost(row, result),
    ]


def _quality_level(key: str, quality: Value | None) -> str:
    words = QUALITY_WORDS[key]
    if quality is None or quality["value"] is None:
        return (
            f"has no {words}: not measurable here:"
            f" {one_line(quality['why_missing']) if quality else NOT_RECORDED}"
        )
    bounds = quality["ci"]
    ends = (
        f" ({ARM_INTERVAL} {significant(bounds[0], 4)} to {significant(bounds[1], 4)})"
        if bounds
        else ""
    )
    return f"reaches {significant(quality['value'], 4)} {words}{ends} on the test split"


def _cost(row: Row, result: Result) -> str:
    hours, tokens = _hours_of_all_attempts(row, result), row["ledger"]["counts"]["tokens"]["value"]
    if hours["value"] is None:
        return f"its cost: not measurable here: {one_line(hours['why_missing'])}"
    trained = f" and {count(tokens)} tokens of training" if tokens else ""
    when = f" in run {one_line(row['reused'], _NAME_LIMIT)}, now reused" if row["reused"] else ""
    return (
        f"it took {duration(3600 * hours['value'])} of device time on"
        f" {device_words(result)}{trained}{when}"
    )


def _hours_of_all_attempts(row: Row, result: Result) -> Value:
    """Return the hours of a row with those of the attempts before it, failed ones and rungs
    included.
    """
    same = (other for other in result["rows"] if other["seed"] == row["seed"])
    own = [other for other in same if stage_name(other["arm"]) == row["arm"]]
    hours = [hours_of(other, result) for other in own]
    unknown = next((each for each in hours if each["value"] is None), None)
    return unknown or {**hours[0], "value": sum(each["value"] for each in hours)}


def _missing(result: Result, explained: set[str]) -> list[str]:
    """Name the arms without an artifact that no clause has explained."""
    many_seeds = len({row["seed"] for row in result["rows"]}) > 1
    rows = [row for row in unfinished(result) if row["arm"] not in explained]
    return [
        _word(result, row["arm"])
        + (f" of seed {row['seed']} " if many_seeds else " ")
        + what_happened(row)
        for row in rows
    ]


def _end_of_run(result: Result) -> str:
    if result["status"] == "FINISHED":
        return ""
    why = result["why"] or "no reason recorded"
    said = any(why == row["why"] for row in unfinished(result))
    return f"the run ended {result['status']}" + ("" if said else f": {one_line(why)}")


# -- words ----------------------------------------------------------------------------------------
def _word(result: Result, arm: str) -> str:
    """Return the word for an arm's role where it is alone in it, else its name."""
    return role_word(result, arm) or one_line(arm, _NAME_LIMIT)


def _subject(result: Result, arm: str) -> str:
    role = role_word(result, arm)
    return one_line(arm, _NAME_LIMIT) if role is None else f"the {role}"


def _base_words(result: Result, pair: Pair) -> str:
    is_what = pair.get("base_is")
    if is_what in _CONTROLS:
        return _CONTROLS[is_what]
    if is_what == "teacher":
        return "its teacher"
    base = _subject(result, pair["base"])
    if is_what == BEST_16_BIT and pair["speedup"]:
        return f"{base} (the best 16-bit form of the same model here)"
    dtypes = (pair["serving"] or {}).get("dtypes")
    return base + (f" (served in {dtypes['base']})" if pair["speedup"] and dtypes else "")


def _in_part(result: Result, pair: Pair) -> str:
    """Return how much of an arm's parameters is in its format, where that is not nearly all of
    them.
    """
    row = finished_row(result, pair["arm"])
    made = None if row is None else row.get("quantization")
    if made is None or made["share"]["value"] is None or made["share"]["value"] >= _WHOLE:
        return ""
    return f" ({percent(made['share']['value'])} of its parameters in {made['format']})"


def _pair_words(result: Result, pair: Pair) -> str:
    return f"{_word(result, pair['arm'])} against {_word(result, pair['base'])}"


def _listed(phrases: Sequence[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _sentence(text: str) -> str:
    """End a sentence, and raise its first letter unless an arm's name begins it."""
    begins_with_word = text.startswith(
        ("the ", "given ", "at ", "against ", "no stage ", "no verdict ", "no format ")
    )
    return (text[:1].upper() + text[1:] if begins_with_word else text) + (
        "" if text.endswith(".") else "."
    )
