"""The conclusion: a verdict line, and one bullet an answer, whichever way the figures came out.

`headline.py` writes the verdict line. Each comparison is one answer: `Against BASE, ARM ...`, made
of what its figures say. A figure is a decided difference, a difference within the margin,
"undecided" with its interval, or "not measurable here" with the reason. The two controls of
distillation have sentences of their own, and the one with equal compute comes first. A saving below
zero reads "costs 12% more". Arms without an artifact and the number of seeds follow.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.arms import is_fallback, stage_name
from pipeline.errors import one_line
from pipeline.ledger.metrics import RELATIVE
from pipeline.ledger.numbers import count, duration, percent
from pipeline.ledger.shapes import Conclusion, Pair, Result, Row
from pipeline.report.headline import (
    figure_of,
    is_kept,
    is_null,
    reaches,
    share_of,
    stays_as_it_is,
    verdict_of,
)
from pipeline.report.phrases import (
    QUALITY_WORDS,
    amount,
    answer,
    compared_word,
    difference,
    evidence,
    interval,
    margin,
    memory_verbs,
    payback_verb,
    quality_verb,
    rests_on,
    serving_verb,
    signed,
    training_verb,
)
from pipeline.report.roles import CONTROLS, arm_name, arm_word, base_words, own_word, subject
from pipeline.report.verdict import release_conclusion
from pipeline.report.view import (
    NOT_RECORDED,
    Value,
    chain,
    device_words,
    finished_row,
    hours_of,
    primary_key,
    primary_of,
    seeds,
    unfinished,
    what_happened,
    why_missing,
)

_WHOLE = 0.9
"""Share of the parameters from which on a model is called quantized without saying how much of it
is.
"""


def conclude(result: Result) -> Conclusion:
    """Return the conclusion of a run."""
    if verdict := result.get("verdict"):
        said = release_conclusion(verdict)
        return {**said, "answers": [*said["answers"], *_end_of_run(result)]}
    if result.get("is_release_check"):
        return {"verdict": "No verdict was reached.", "answers": _end_of_run(result)}
    answers, explained = _compared(result)
    found = seeds(result)
    primary = result["primary_arm"]
    if found and not answers:
        answers = _cost_and_quality(result)
        explained = {primary} if why_missing(result, primary) else set[str]()
    counted = [] if not found else ["one seed" if len(found) == 1 else f"{len(found)} seeds"]
    answers = [*_kept(result), *answers, *_missing(result, explained), *counted]
    return {
        "verdict": verdict_of(result),
        "answers": [*(_sentence(result, text) for text in answers), *_end_of_run(result)],
    }


def _compared(result: Result) -> tuple[list[str], set[str]]:
    """Return an answer per comparison, and the arms whose absence the answers explain."""
    answers: list[str] = []
    explained: set[str] = set()
    pairs = [pair for pair in result["comparisons"] if not is_kept(result, pair["arm"])]
    for pair in sorted(pairs, key=lambda pair: pair.get("base_is") != "compute_control"):
        missing = {
            arm: why
            for arm in (pair["arm"], pair["base"])
            if (why := why_missing(result, arm)) is not None
        }
        if not missing:
            answers += _answer(result, pair)
        elif new := {arm: why for arm, why in missing.items() if arm not in explained}:
            reasons = ", ".join(f"{subject(result, arm)} {why}" for arm, why in new.items())
            answers.append(f"{_pair_words(result, pair)}: not measurable here: {reasons}")
            explained |= set(new)
    return answers, explained


def _kept(result: Result) -> list[str]:
    """Return an answer for each quantize stage that left its model as it is, in one seed or in
    all.
    """
    return [
        f"no format pays: {text}"
        for arm in dict.fromkeys(row["arm"] for row in result["rows"])
        if not is_fallback(arm)
        and not (arm == result["primary_arm"] and is_kept(result, arm))  # the verdict says so
        and (text := stays_as_it_is(result, arm))
    ]


def _answer(result: Result, pair: Pair) -> list[str]:
    """Return what one comparison says: against a control, the verbs of its arm, the nulls with
    their reasons. Nothing where it was to be read on nothing.
    """
    said = _control_sentence(result, pair)
    if verbs := _verbs(result, pair):
        who = f"{subject(result, pair['arm'])}{_in_part(result, pair)}"
        said.append(f"against {base_words(result, pair)}, {who} {_listed(verbs)}")
    context = "" if said else f"{_pair_words(result, pair)}: "
    by_reason: dict[str, list[str]] = {}
    for what, why in _nulls(pair):
        by_reason.setdefault(why, []).append(what)
    said += [
        f"{context}{_listed(what)} not measurable here: {why}" for why, what in by_reason.items()
    ]
    first, *more = said or [""]
    return [". ".join([first, *(f"{text[:1].upper()}{text[1:]}" for text in more)])] if said else []


def _verbs(result: Result, pair: Pair) -> list[str]:
    """Return the verb phrases of the arm; quality against a control has a clause of its own."""
    verbs: list[str] = []
    for measure in ("quality", "training", "serving", "payback"):
        figure = figure_of(pair, measure)
        if measure not in pair["on"] or figure is None or is_null(figure, measure):
            continue
        if measure == "quality" and not _shows_distillation(result, pair):
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
    chains = [chain(result, pair[side]) for side in ("arm", "base")]
    return [
        arm_word(result, arm)
        for arm in chains[0]
        if arm not in chains[1] and stage_name(arm) != pair["arm"]
    ]


def _nulls(pair: Pair) -> list[tuple[str, str]]:
    """Return (what, reason) of the figures this comparison was to be read on and could not be."""
    found: list[tuple[str, str]] = []
    for measure in ("quality", "training", "serving", "payback"):
        figure = figure_of(pair, measure)
        if measure in pair["on"] and is_null(figure, measure):
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
def _shows_distillation(result: Result, pair: Pair) -> bool:
    """Tell whether a base is a control of distillation alone: its arm is called by no word of its
    own stage, which would have changed something else as well.
    """
    return pair.get("base_is") in CONTROLS and not own_word(result, pair["arm"])


def _control_sentence(result: Result, pair: Pair) -> list[str]:
    """Return the sentence on quality against one of the two controls, or none for other bases and
    for nulls.
    """
    key, quality = primary_of(pair), figure_of(pair, "quality")
    if (
        not _shows_distillation(result, pair)
        or "quality" not in pair["on"]
        or key is None
        or is_null(quality, "quality")
    ):
        return []
    assert quality is not None
    if pair.get("base_is") == "compute_control":
        return [_against_compute(result, pair, key, quality)]
    return [_against_steps(result, pair, key, quality)]


def _against_compute(result: Result, pair: Pair, key: str, quality: Value) -> str:
    """Say what the same FLOPs would have bought.

    A difference is turned round to speak of the control; a figure in brackets stays as
    `comparisons` has it, and says that it is the student's.
    """
    given = share_of(result, pair, "model_flops", "the same FLOPs", "the FLOPs")
    start, student = (
        f"given {given} without a teacher (the control with equal compute)",
        f"the distilled {arm_word(result, pair['arm'])}",
    )
    whose = f"{subject(result, pair['arm'])}'s"
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
    tokens = share_of(result, pair, "tokens", "equal tokens", "the tokens")
    start = f"at {tokens} (the control with equal tokens)"
    if answer(quality) == "undecided":
        return f"{start} what distillation adds is undecided ({evidence(key, quality)})"
    if answer(quality) == "equal":
        said = f"{signed(key, quality['value'])}, {_spread(result, key, quality)}"
        return f"{start} distillation changes nothing beyond {margin(key, quality)} ({said})"
    verb = "adds" if quality["value"] > 0 else "costs"
    direction = f"{compared_word(key, quality['value'])} " if key in RELATIVE else ""
    said = f"{direction}{QUALITY_WORDS[key]}, {_spread(result, key, quality)}"
    return f"{start} distillation {verb} {amount(key, quality['value'])} ({said})"


def _spread(result: Result, key: str, quality: Value) -> str:
    """Return the interval of a comparison and what it is over: documents, or seeds where there are
    several.
    """
    num_seeds = len(seeds(result))
    over = f"{num_seeds} seeds" if num_seeds > 1 else rests_on(quality)
    return f"{interval(quality, in_points=key not in RELATIVE)} over {over}"


# -- no comparison, and what is missing -----------------------------------------------------------
def _cost_and_quality(result: Result) -> list[str]:
    """Return the quality and the cost of the primary arm, for recipes that compare nothing."""
    arm = result["primary_arm"]
    row = finished_row(result, arm)
    if row is None:
        return [f"{subject(result, arm)}: not measurable here: it {why_missing(result, arm)}"]
    return [*_quality_level(result, row), _cost(row, result)]


def _quality_level(result: Result, row: Row) -> list[str]:
    """Return the quality that an arm reaches, or why it is not known; nothing where the verdict
    line says it.
    """
    key = primary_key(result)
    quality = row["quality"].get(key)
    if quality is None or quality["value"] is None:
        why = one_line(quality["why_missing"]) if quality else NOT_RECORDED
        words = QUALITY_WORDS[key]
        return [f"{subject(result, row['arm'])} has no {words}: not measurable here: {why}"]
    said = f"{subject(result, row['arm'])} {reaches(key, quality)}"
    return [] if verdict_of(result).casefold() == f"{said}.".casefold() else [said]


def _cost(row: Row, result: Result) -> str:
    hours, tokens = _hours_of_all_attempts(row, result), row["ledger"]["counts"]["tokens"]["value"]
    if hours["value"] is None:
        return f"its cost: not measurable here: {one_line(hours['why_missing'])}"
    trained = f" and {count(tokens)} tokens of training" if tokens else ""
    when = f" in run {arm_name(row['reused'])}, now reused" if row["reused"] else ""
    return (
        f"it took {duration(3600 * hours['value'])} of device time on"
        f" {device_words(result)}{trained}{when}"
    )


def _hours_of_all_attempts(row: Row, result: Result) -> Value:
    """Return the hours of a row with those of the attempts before it, failed ones and fallbacks
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
        subject(result, row["arm"])
        + (f" of seed {row['seed']} " if many_seeds else " ")
        + what_happened(row)
        for row in rows
    ]


def _end_of_run(result: Result) -> list[str]:
    if result["status"] == "FINISHED":
        return []
    why = result["why"] or "no reason recorded"
    said = any(why == row["why"] for row in unfinished(result))
    return [f"The run ended {result['status']}" + ("." if said else f": {one_line(why)}.")]


# -- words ----------------------------------------------------------------------------------------
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
    return f"{subject(result, pair['arm'])} against {base_words(result, pair)}"


def _listed(phrases: Sequence[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _sentence(result: Result, text: str) -> str:
    """End a sentence, and raise its first letter unless an arm's name begins it."""
    names = {row["arm"] for row in result["rows"]} | {result["primary_arm"]}
    names |= {pair[side] for pair in result["comparisons"] for side in ("arm", "base")}
    is_name = any(text.startswith(arm_name(name)) for name in names)
    first = text[:1] if is_name else text[:1].upper()
    return first + text[1:] + ("" if text.endswith(".") else ".")
