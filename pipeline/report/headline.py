"""The verdict line: one short sentence that answers the recipe's question for the primary arm.

It says what the arm costs against its base, at which quality, and whether plain training with the
same compute would have done as well. What is undecided, missing or not measurable is said to be.
"""

from __future__ import annotations

from pipeline.config.arms import BEST_16_BIT
from pipeline.errors import one_line
from pipeline.ledger.numbers import percent, significant, times
from pipeline.ledger.shapes import Pair, Result, Row
from pipeline.report.phrases import (
    ARM_INTERVAL,
    CHEAPER_AS_RATIO,
    QUALITY_WORDS,
    answer,
    difference,
    interval,
    never_pays,
)
from pipeline.report.roles import CONTROLS, arm_name, base_words, subject
from pipeline.report.view import (
    Value,
    finished_row,
    is_finished,
    primary_key,
    primary_of,
    seeds,
    straddles,
    why_missing,
)

_SAME = 0.05
"""FLOPs or tokens of a control this close to the student's (a fraction) are called equal; else the
ratio is said.
"""


def verdict_of(result: Result) -> str:
    """Return the answer for the primary arm of a run, whatever became of it."""
    arm = result["primary_arm"]
    if not seeds(result):
        return "No stage finished, so nothing can be said about cost or quality."
    if why := why_missing(result, arm):
        return f"The question is not answered: {subject(result, arm)} {why.partition(':')[0]}."
    if is_kept(result, arm):
        return f"No format pays: {stays_as_it_is(result, arm)}."
    pairs = [pair for pair in result["comparisons"] if pair["arm"] == arm and pair["on"]]
    there = [pair for pair in pairs if why_missing(result, pair["base"]) is None]
    if pairs and not there:
        return f"The question is not answered: {base_words(result, pairs[0])} is missing."
    said = _compared(result, pairs, there) if there else _level(result)
    return f"{said[:1].upper()}{said[1:]}." if said.startswith("the ") else f"{said}."


def _level(result: Result) -> str:
    """Return the quality that the primary arm reaches, where nothing was compared."""
    key, row = primary_key(result), finished_row(result, result["primary_arm"])
    quality = None if row is None else row["quality"].get(key)
    who = subject(result, result["primary_arm"])
    if quality is None or quality["value"] is None:
        return f"{who} is trained, but its {QUALITY_WORDS[key]} could not be measured"
    return f"{who} {reaches(key, quality)}"


def _compared(result: Result, pairs: list[Pair], there: list[Pair]) -> str:
    """Return cost and quality of the primary arm, and what the same compute would have bought.

    `there` are the pairs whose base has an artifact.
    """
    others = [pair for pair in there if pair.get("base_is") not in CONTROLS] or there
    cost = _cost_pair(others)
    quality = _quality_pair(others, cost)
    said = f"{subject(result, result['primary_arm'])} {_cost_and_quality(result, cost, quality)}"
    return said + next(
        (
            _same_compute(result, pair)
            for pair in pairs
            if pair.get("base_is") == "compute_control" and pair is not quality
        ),
        "",
    )


def _cost_pair(pairs: list[Pair]) -> tuple[Pair, str] | None:
    """Return the comparison that says what the arm costs, and in what: serving, else training.

    Where none could be measured it is the first that was to be read on one of them.
    """
    ordered = sorted(pairs, key=lambda pair: pair.get("base_is") != BEST_16_BIT)
    asked = [
        (pair, measure)
        for measure in ("serving", "training")
        for pair in ordered
        if measure in pair["on"]
    ]
    known = (each for each in asked if not is_null(figure_of(*each), each[1]))
    return next(known, asked[0] if asked else None)


def _quality_pair(pairs: list[Pair], cost: tuple[Pair, str] | None) -> Pair | None:
    """Return the comparison of quality that belongs to the one of cost: of the same base, or of the
    same model unquantized.
    """
    asked = [pair for pair in pairs if "quality" in pair["on"]]
    base = None if cost is None else cost[0]["base"]
    asked.sort(key=lambda pair: (pair["base"] != base, pair.get("base_is") != "source"))
    return asked[0] if asked else None


def _cost_and_quality(result: Result, cost: tuple[Pair, str] | None, quality: Pair | None) -> str:
    if cost is None:
        assert quality is not None, "a comparison is read on something"
        return _quality_alone(result, quality)
    pair, measure = cost
    said, figure = f"could not be compared in {measure} cost", figure_of(pair, measure)
    if figure is not None and not is_null(figure, measure):
        said = (_serves if measure == "serving" else _trains)(figure, base_words(result, pair))
    if quality is None:
        return said
    is_same = quality["base"] == pair["base"] or quality.get("base_is") == "source"
    than = "" if is_same else base_words(result, quality)
    return f"{said} {_at_quality(quality, than)}"


def _serves(saving: Value, base: str) -> str:
    v, how = saving["value"], _how_known(saving)
    if straddles(saving):
        return f"is undecided in serving cost against {base}{how}"
    if v > 0:
        much = times(1 / (1 - v)) if v >= CHEAPER_AS_RATIO else percent(v)
        return f"serves {much} cheaper than {base}{how}"
    if v == 0:
        return f"costs as much to serve as {base}{how}"
    return (
        f"costs {percent(-v)} more to serve than {base}{how}"
        if v > -1
        else f"costs {times(1 - v)} as much to serve as {base}{how}"
    )


def _trains(saving: Value, base: str) -> str:
    v, how = saving["value"], _how_known(saving)
    if straddles(saving):
        return f"is undecided in training cost against {base}{how}"
    if v == 0:
        return f"needs as many device-hours as {base}{how}"
    if v <= -1:
        return f"needs {times(1 - v)} as many device-hours as {base}{how}"
    return f"needs {percent(abs(v))} {'fewer' if v > 0 else 'more'} device-hours than {base}{how}"


def _how_known(saving: Value) -> str:
    if saving.get("disturbed"):
        return " (read on a disturbed machine)"
    return "" if saving["ci"] is not None else " (point estimate)"


def _at_quality(pair: Pair, base: str) -> str:
    """Return the quality of an arm after its cost: `at equal quality`.

    `base` is empty where it is the base of the cost.
    """
    key, quality = primary_of(pair), figure_of(pair, "quality")
    if key is None or quality is None or is_null(quality, "quality"):
        return "with its quality not measurable here"
    if answer(quality) == "undecided":
        return "with its quality undecided" + (f" against {base}" if base else "")
    if answer(quality) == "equal":
        return "at equal quality" + (f" to {base}" if base else "")
    how = "better" if quality["value"] > 0 else "worse"
    _, _, size = difference(key, quality["value"]).partition(" ")
    return f"at {how} quality" + (f" than {base}" if base else "") + f" ({size})"


def _quality_alone(result: Result, pair: Pair) -> str:
    """Return the quality of an arm that is compared in nothing else."""
    key, quality, base = primary_of(pair), figure_of(pair, "quality"), base_words(result, pair)
    if key is None or quality is None or is_null(quality, "quality"):
        return f"could not be compared with {base}"
    if answer(quality) == "undecided":
        return f"is undecided in quality against {base}"
    if answer(quality) == "equal":
        return f"is as good as {base}"
    return f"{difference(key, quality['value'])} than {base}"


def _same_compute(result: Result, pair: Pair) -> str:
    """Return what plain training would have reached with the compute that the arm took."""
    compute = share_of(result, pair, "model_flops", "the same compute", "the compute")
    plain, quality = f"plain training with {compute}", figure_of(pair, "quality")
    if "quality" not in pair["on"] or quality is None or is_null(quality, "quality"):
        return f", but it could not be compared with {plain}"
    if answer(quality) == "undecided":
        return f", but whether {plain} does as well is undecided"
    if answer(quality) == "equal":
        return f", but {plain} does as well"
    return f", but {plain} does better" if quality["value"] < 0 else f", and {plain} does worse"


# -- figures that the verdict line and the answers share ------------------------------------------
def stays_as_it_is(result: Result, arm: str) -> str:
    """Say that a quantize stage left its model as it is, and why; empty where none did.

    Where that is so in some seeds only, they are named.
    """
    kept = [(row["seed"], said) for row in _done(result, arm) if (said := row.get("unchanged"))]
    if not kept:
        return ""
    why, source = one_line(kept[0][1]["why"]), kept[0][1]["as"]
    numbers = " and ".join(str(seed) for seed, _ in kept)
    which = "" if is_kept(result, arm) else f" of seed {numbers}"
    return f"{subject(result, arm)}{which} stays as {subject(result, source)} is ({why})"


def is_kept(result: Result, arm: str) -> bool:
    """Tell whether an arm is its source in all seeds, so that quantization changed nothing."""
    done = _done(result, arm)
    return bool(done) and all(row.get("unchanged") for row in done)


def _done(result: Result, arm: str) -> list[Row]:
    return [row for row in result["rows"] if row["arm"] == arm and is_finished(row)]


def figure_of(pair: Pair, measure: str) -> Value | None:
    """Return the figure that a comparison is read on for one of the measures of `on`."""
    if measure != "quality":
        return pair[measure]
    key = primary_of(pair)
    return None if key is None else pair["quality"][key]


def reaches(key: str, quality: Value) -> str:
    """Say which quality an arm reaches by itself, with its interval."""
    ends = [significant(bound, 4) for bound in quality["ci"] or ()]
    spread = f" ({ARM_INTERVAL} {ends[0]} to {ends[1]})" if ends else ""
    level = significant(quality["value"], 4)
    return f"reaches {level} {QUALITY_WORDS[key]}{spread} on the test split"


def is_null(figure: Value | None, measure: str) -> bool:
    if figure is None:
        return True
    return figure["value"] is None and not (measure == "payback" and never_pays(figure))


def share_of(result: Result, pair: Pair, name: str, same: str, other: str) -> str:
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
            if each is not None
            and each["artifact"] is not None
            and each["artifact"]["kind"] == "teacher_cache"
        ),
    ]
    counts = [each["ledger"]["counts"][name]["value"] for each in rows]
    known = [each for each in counts if each is not None]
    return sum(known) if len(known) == len(counts) else None


# -- the answer in a word, and in a number --------------------------------------------------------
GATE_MOODS = {"PASS": "good", "FAIL": "bad", "INVALID": "bad"}
"""Of a gate's verdicts; the others are undecided."""


def badge_of(result: Result) -> tuple[str, str]:
    """Return the answer in a word or two, and its mood: `good`, `bad` or `undecided`.

    The word follows from the same figures as the verdict line: cost and quality of the primary arm,
    and what plain training with the same compute does.
    """
    if verdict := result["verdict"]:
        return verdict["verdict"], GATE_MOODS.get(verdict["verdict"], "undecided")
    if result.get("is_release_check"):
        return "NO VERDICT", "bad"
    if result["status"] != "FINISHED":
        return result["status"], "bad"
    arm = result["primary_arm"]
    if not seeds(result) or why_missing(result, arm):
        return "NOT ANSWERED", "undecided"
    if is_kept(result, arm):
        return "DOES NOT PAY", "bad"
    there = _answered(result)
    if not there:
        return "MEASURED", "undecided"
    for pair in there:
        quality = figure_of(pair, "quality")
        if pair.get("base_is") != "compute_control" or quality is None:
            continue
        if quality["value"] is not None and answer(quality) in ("equal", "worse"):
            return "NO GAIN OVER PLAIN TRAINING", "bad"
    others = [pair for pair in there if pair.get("base_is") not in CONTROLS] or there
    cost = _cost_pair(others)
    return _word(None if cost is None else figure_of(*cost), _quality_pair(others, cost), cost)


def _word(
    figure: Value | None, quality: Pair | None, cost: tuple[Pair, str] | None
) -> tuple[str, str]:
    read = None if quality is None else figure_of(quality, "quality")
    good = None if read is None or read["value"] is None else answer(read)
    if cost is None:  # nothing but quality was compared
        words = {"better": ("BETTER", "good"), "equal": ("AS GOOD", "good")}
        words["worse"] = ("WORSE", "bad")
        return words.get(good or "", ("UNDECIDED", "undecided"))
    if figure is None or is_null(figure, cost[1]) or figure["value"] is None:
        return "NOT MEASURABLE", "undecided"
    if straddles(figure):
        return "UNDECIDED", "undecided"
    if figure["value"] <= 0:
        return "DOES NOT PAY", "bad"
    if good == "worse":
        return "CHEAPER, AND WORSE", "bad"
    if quality is not None and good not in ("better", "equal"):
        return "CHEAPER, QUALITY UNDECIDED", "undecided"
    if figure.get("ci") is None:
        return "CHEAPER, ONE READING", "undecided"
    return "PAYS", "good"


def _answered(result: Result) -> list[Pair]:
    """Return the comparisons of the primary arm whose base has an artifact."""
    return [
        pair
        for pair in result["comparisons"]
        if pair["arm"] == result["primary_arm"]
        and pair["on"]
        and why_missing(result, pair["base"]) is None
    ]


def number_of(result: Result) -> tuple[str, str, str]:
    """Return the one number of a run, its interval, and what it is: what the primary arm saves, or
    how good it is where nothing was compared. The number is `-` where it is not known.
    """
    there = _answered(result)
    others = [pair for pair in there if pair.get("base_is") not in CONTROLS] or there
    cost = _cost_pair(others)
    figure = None if cost is None else figure_of(*cost)
    if cost is not None and figure is not None and figure["value"] is not None:
        pair, measure = cost
        what = {"serving": "serving cost saved", "training": "training device-hours saved"}[measure]
        return (
            percent(figure["value"], sign=True),
            interval(figure) if figure.get("ci") else "one reading, no interval",
            f"{what} by {arm_name(pair['arm'])} against {arm_name(pair['base'])}",
        )
    key, row = primary_key(result), finished_row(result, result["primary_arm"])
    quality = None if row is None else row["quality"].get(key)
    what = f"{QUALITY_WORDS[key]} of {arm_name(result['primary_arm'])} on the test split"
    if quality is None or quality["value"] is None:
        return "-", "not known", what
    ends = quality.get("ci")
    spread = [significant(each, 4) for each in ends or ()]
    said = f"{ARM_INTERVAL} {spread[0]} to {spread[1]}" if spread else "no interval"
    return significant(quality["value"], 4), said, what
