"""The charts of a report, as data: each section shows one thing, and each chart has its table.

All of it is read from `Material`. What is not known leaves no mark, and the section says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from pipeline.config.arms import stage_name
from pipeline.errors import one_line
from pipeline.ledger.metrics import PHASES, PRODUCTIVE, RELATIVE, WASTED
from pipeline.ledger.numbers import count, duration, how_many, num_bytes, percent, significant
from pipeline.ledger.shapes import Pair, Result, Row
from pipeline.report import waste
from pipeline.report.blocks import (
    Bars,
    Block,
    Bullets,
    Curves,
    Figure,
    Interval,
    Intervals,
    Part,
    Point,
    Prose,
    Scatter,
    Series,
    Table,
)
from pipeline.report.material import Material
from pipeline.report.money import joules
from pipeline.report.phrases import (
    ARM_INTERVAL,
    PAIR_INTERVAL,
    answer,
    never_pays,
    rests_on,
    signed,
)
from pipeline.report.view import (
    NOT_RECORDED,
    SERVING_KEY,
    Value,
    arm_rows,
    chain,
    hours_word,
    is_finished,
    labels,
    primary_key,
    primary_of,
    quality_direction,
    seeds,
    straddles,
    unit,
    why_absent,
)

SMALL_SHARE = 0.02
"""Phases below this share of every stage are drawn as one."""
BAND_POINTS = 41
"""Of the payback band, on a logarithmic axis."""
AROUND = 100.0
"""Times the break-even, and a share of it, that the payback band reaches from and to."""


def label_of(material: Material, text: str) -> str:
    """Return a label, with its run's name where a report has several."""
    return f"{text}, {material.name}" if material.name else text


# -- comparisons against their margins ------------------------------------------------------------
def compared(materials: Sequence[Material]) -> list[Block]:
    """Return the intervals of every comparison: qualities on their margins, savings on zero."""
    blocks: list[Block] = []
    relative = list(_qualities(materials, in_points=False))
    absolute = list(_qualities(materials, in_points=True))
    for name, what, rows in (
        ("quality", "share of the base's", relative),
        ("quality-points", "percentage points", absolute),
    ):
        if rows:
            blocks.append(
                Figure(
                    name=f"intervals-{name}",
                    title="Quality of each arm against its base",
                    says="Right of zero the arm is better. Where the whole interval lies right of"
                    " the margin, the arm counts as no worse.",
                    chart=Intervals(axis=f"better by, {what}", rows=rows),
                    table=_interval_table(rows, margins=True),
                )
            )
    if savings := list(_savings(materials)):
        blocks.append(
            Figure(
                name="intervals-savings",
                title="Savings of each arm against its base",
                says="Right of zero the arm is cheaper. An interval that holds zero is undecided.",
                chart=Intervals(axis="cheaper by, share of the base's cost", rows=savings),
                table=_interval_table(savings, margins=False),
            )
        )
    return blocks


def _qualities(materials: Sequence[Material], *, in_points: bool) -> Iterator[Interval]:
    for material, pair in _pairs(materials):
        if "quality" not in pair["on"]:
            continue
        for key, quality in pair["quality"].items():
            if (key not in RELATIVE) is not in_points:
                continue
            words = "" if key == primary_of(pair) else f", {key.replace('_', ' ')}"
            yield Interval(
                label=label_of(material, f"{_pair_label(pair)}{words}"),
                value=quality["value"],
                ends=_ends(quality),
                margin=quality.get("margin"),
                shown=_shown(quality, lambda v, of=key: signed(of, v)),
                mood="" if quality["value"] is None else answer(quality),
            )


def _savings(materials: Sequence[Material]) -> Iterator[Interval]:
    for material, pair in _pairs(materials):
        for measure in ("training", "serving"):
            if measure not in pair["on"]:
                continue
            saving: Value = pair[measure] or {
                "value": None,
                "why_missing": why_absent(material.result, pair),
            }
            yield Interval(
                label=label_of(material, f"{_pair_label(pair)}, {measure}"),
                value=saving["value"],
                ends=_ends(saving),
                shown=_shown(saving, lambda v: percent(v, sign=True)),
                mood=_mood(saving),
            )


def _mood(saving: Value) -> str:
    if saving["value"] is None:
        return ""
    if straddles(saving) or saving.get("ci") is None:
        return "undecided"
    return "better" if saving["value"] > 0 else "worse"


def _interval_table(rows: Sequence[Interval], *, margins: bool) -> Table:
    share = lambda v: percent(v, sign=True)
    head = ("arm against base", "figure", PAIR_INTERVAL, *(["margin"] if margins else []), "answer")
    body = [
        [
            row.label,
            row.shown,
            "" if row.ends is None else f"{share(row.ends[0])} to {share(row.ends[1])}",
            *([] if not margins else ["" if row.margin is None else share(-row.margin)]),
            row.mood,
        ]
        for row in rows
    ]
    return Table(head, body)


# -- arms -----------------------------------------------------------------------------------------
def arms(materials: Sequence[Material]) -> list[Block]:
    """Return the quality of every arm with its interval."""
    rows = [
        Interval(
            label=label_of(material, name),
            value=quality["value"],
            ends=_ends(quality),
            shown=_shown(quality, lambda v: significant(v, 4)),
        )
        for material in materials
        for name, row in _finished(material.result)
        if (quality := row["quality"].get(primary_key(material.result))) is not None
    ]
    if not any(row.value is not None for row in rows):
        return []
    key = primary_key(materials[0].result)
    body = [[row.label, row.shown, "" if row.ends is None else _two(row.ends)] for row in rows]
    words = f"{key.replace('_', ' ')} on test ({quality_direction(key)})"
    return [
        Figure(
            name="arms",
            title="Quality of each arm",
            says=f"{words}, with the {ARM_INTERVAL} of each arm alone.",
            chart=Intervals(axis=words, rows=rows, zero=False),
            table=Table(("arm", words, ARM_INTERVAL), body),
        )
    ]


# -- quality against cost -------------------------------------------------------------------------
def trade_offs(
    materials: Sequence[Material], *, hours: bool = True, serving: bool = True
) -> list[Block]:
    """Return quality against what the arms took to make, and against what they cost to serve.

    Args:
        hours: Whether those of all can be compared; else that chart is left out.
        serving: Likewise.
    """
    word = hours_word(materials[0].result)
    what = unit(materials[0].result)
    made = _trade_off(
        materials,
        "quality-hours",
        f"Quality against {word}",
        f"{word} of all stages that led to the arm",
        lambda result, row: _made_in(result, row["arm"], row["seed"]),
    )
    served = _trade_off(
        materials,
        "quality-serving",
        "Quality against the cost of serving",
        f"device-seconds for 1,000 {what}s",
        lambda _, row: row["serving"].get(SERVING_KEY, {"value": None})["value"],
    )
    return [*(made if hours else []), *(served if serving else [])]


def _trade_off(
    materials: Sequence[Material],
    name: str,
    title: str,
    x_axis: str,
    cost: Callable[[Result, Row], float | None],
) -> list[Block]:
    key = primary_key(materials[0].result)
    places: list[tuple[Material, Row, Point]] = []
    for material in materials:
        for label, row in _finished(material.result):
            quality, x = row["quality"].get(key), cost(material.result, row)
            if quality is None or quality["value"] is None or x is None:
                continue
            point = Point(
                label=label_of(material, label), x=x, y=quality["value"], y_ends=_ends(quality)
            )
            places.append((material, row, point))
    if len(places) < 2:  # one point shows no trade
        return []
    lower = quality_direction(key).startswith("lower")
    joined = list(_alike(places))
    shown = [point for _, _, point in places]
    best = _unbeaten(shown, lower)
    y_axis = f"{key.replace('_', ' ')} ({quality_direction(key)})"
    says = (
        "Up is better, left is cheaper. Filled arms are beaten by no other in both;"
        " a dashed line joins arms whose quality the comparison cannot tell apart."
    )
    body = [
        [
            point.label,
            significant(point.x, 4),
            significant(point.y, 4),
            "yes" if number in best else "",
            ", ".join(shown[b if a == number else a].label for a, b in joined if number in (a, b)),
        ]
        for number, point in enumerate(shown)
    ]
    head = ("arm", x_axis, y_axis, "beaten by none", "quality not told apart from")
    chart = Scatter(
        x_axis=x_axis, y_axis=y_axis, points=shown, best=best, joined=joined, lower_is_better=lower
    )
    return [Figure(name=name, title=title, says=says, chart=chart, table=Table(head, body))]


def _made_in(result: Result, arm: str, seed: int) -> float | None:
    """Return the hours of work of all stages that led to an arm, its fallbacks' included; what an
    existing model took before is in none of them.
    """
    led = chain(result, arm)
    hours = [
        row["ledger"]["device_hours"]["work"]["value"]
        for row in result["rows"]
        if row["seed"] == seed and stage_name(row["arm"]) in led
    ]
    known = [each for each in hours if each is not None]
    return sum(known) if known else None


def _alike(places: Sequence[tuple[Material, Row, Point]]) -> Iterator[tuple[int, int]]:
    at = {
        (id(material), row["arm"], row["seed"]): number
        for number, (material, row, _) in enumerate(places)
    }
    for material in {id(material): material for material, _, _ in places}.values():
        for pair in material.result["comparisons"]:
            key = primary_of(pair)
            if key is None or not straddles(pair["quality"][key]):
                continue
            for seed in seeds(material.result):
                ends = [at.get((id(material), pair[side], seed)) for side in ("arm", "base")]
                if ends[0] is not None and ends[1] is not None:
                    yield ends[0], ends[1]


def _unbeaten(points_: Sequence[Point], lower: bool) -> list[int]:
    """Return the points that no other is as good as in both and better in one (Pareto)."""
    good = [(-each.x, -each.y if lower else each.y) for each in points_]
    beats = lambda a, b: a[0] >= b[0] and a[1] >= b[1] and a != b
    return [
        number for number, each in enumerate(good) if not any(beats(other, each) for other in good)
    ]


# -- where the hours went -------------------------------------------------------------------------
def hours(materials: Sequence[Material]) -> list[Block]:
    """Return the phases of every stage, and what was wasted with the first thing to try."""
    bars = [
        (label_of(material, name), row)
        for material in materials
        for name, row in zip(labels(material.result["rows"]), material.result["rows"], strict=True)
        if row["ledger"]["device_hours"]["attached"]["value"] and not row["reused"]
    ]
    if not bars:
        return []
    parts = list(_parts([row for _, row in bars]))
    time = lambda h: duration(3600 * h)
    totals = [row["ledger"]["device_hours"]["attached"]["value"] or 0.0 for _, row in bars]
    body = [
        [label, time(total), *(time(part.sizes[number]) for part in parts)]
        for number, ((label, _), total) in enumerate(zip(bars, totals, strict=True))
    ]
    word = hours_word(materials[0].result)
    figure = Figure(
        name="hours",
        title="Where the hours went",
        says=f"{word} of each stage by phase; hatched is waste.",
        chart=Bars(axis=word, labels=[label for label, _ in bars], parts=parts),
        table=Table(("stage", "all", *(part.name.replace("_", " ") for part in parts)), body),
    )
    tries = [
        label_of(material, line)
        for material in materials
        for line in waste.closing_lines(material.result)
    ]
    return [figure, *([Bullets([one_line(each.strip(), 300) for each in tries])] if tries else [])]


def _parts(rows: Sequence[Row]) -> Iterator[Part]:
    """Yield phases by class, in the catalogue's order, then what whole intervals were lost to.

    Hours that were lost whole (`rollback`, `failed_attempt`) are taken from the phases in
    proportion: they passed in them.
    """
    attached = [row["ledger"]["device_hours"]["attached"]["value"] or 0.0 for row in rows]
    lost = [
        {
            cause: value["value"] or 0.0
            for cause, value in row["ledger"]["device_hours"]["wasted_by"].items()
            if cause not in WASTED.values()
        }
        for row in rows
    ]
    left = [total - sum(causes.values()) for total, causes in zip(attached, lost, strict=True)]
    shares = [_shares(row) for row in rows]
    named = [
        name
        for name in PHASES
        if any(share.get(name, 0.0) >= SMALL_SHARE for share in shares) or name in WASTED
    ]
    for kind in ("productive", "support", "wasted"):
        for name in named:
            sizes = [s.get(name, 0.0) * h for s, h in zip(shares, left, strict=True)]
            if _kind(name) == kind and any(sizes):
                yield Part(name=WASTED.get(name, name), sizes=sizes, kind=kind)
        if kind == "support":
            rest = [
                h * sum(v for name, v in s.items() if name not in named)
                for s, h in zip(shares, left, strict=True)
            ]
            if any(rest):
                yield Part(name="all else", sizes=rest, kind=kind)
    for cause in dict.fromkeys(name for causes in lost for name in causes):
        sizes = [causes.get(cause, 0.0) for causes in lost]
        if any(sizes):
            yield Part(name=cause, sizes=sizes, kind="wasted")


def _shares(row: Row) -> dict[str, float]:
    phases = row["ledger"]["phases_ns"]
    total = sum(phases.values())
    return {name: ns / total for name, ns in phases.items()} if total else {}


def _kind(phase: str) -> str:
    return "productive" if phase in PRODUCTIVE else "wasted" if phase in WASTED else "support"


# -- curves ---------------------------------------------------------------------------------------
def curves(materials: Sequence[Material]) -> list[Block]:
    """Return what was read during training, on one axis of device-hours."""
    blocks: list[Block] = []
    key = primary_key(materials[0].result).replace("_", " ")
    for name, title, axis in (
        ("validation", f"{key.capitalize()} on validation while training", f"{key} on validation"),
        ("loss", "Loss while training", "loss (each objective has its own scale)"),
    ):
        series = [
            Series(
                label=label_of(material, _curve_label(curve.arm, curve.seed, material)),
                x=[hours for hours, _ in curve.values[name]],
                y=[value for _, value in curve.values[name]],
            )
            for material in materials
            for curve in material.curves
            if curve.values.get(name)
        ]
        if not series:
            continue
        body = [
            [each.label, str(len(each.x)), duration(3600 * each.x[-1]), significant(each.y[-1], 4)]
            for each in series
        ]
        blocks.append(
            Figure(
                name=f"curve-{name}",
                title=title,
                says="Each stage over its own device-hours from its first step's start, evaluation"
                " and lost steps included.",
                chart=Curves(x_axis="device-hours of the stage", y_axis=axis, series=series),
                table=Table(("stage", "readings", "last one after", axis), body),
            )
        )
    return blocks


def _curve_label(arm: str, seed: int, material: Material) -> str:
    many = len({row["seed"] for row in material.result["rows"]}) > 1
    return one_line(arm, 60) + (f" s{seed}" if many else "")


# -- payback --------------------------------------------------------------------------------------
def payback(materials: Sequence[Material]) -> list[Block]:
    """Return what serving earns back of what an arm took to make, by the units served."""
    blocks: list[Block] = []
    for material, pair in _pairs(materials):
        if "payback" not in pair["on"] or pair["payback"] is None:
            continue
        figure = pair["payback"]
        who = label_of(material, _pair_label(pair))
        if figure["value"] is None:
            blocks.append(Prose(f"{who}: {one_line(figure['why_missing'] or NOT_RECORDED, 300)}."))
            continue
        band = _band(material.result, pair)
        if band is None:
            blocks.append(Prose(f"{who}: pays back from the first {figure['unit']}."))
            continue
        what = f"{figure['unit']}s"
        form = lambda v: "0" if v == 0 else f"{'-' if v < 0 else ''}{duration(3600 * abs(v))}"
        shown = band.x[:: (BAND_POINTS - 1) // 4], range(0, BAND_POINTS, (BAND_POINTS - 1) // 4)
        assert band.low is not None
        assert band.high is not None
        body = [
            [count(x), form(band.low[at]), form(band.y[at]), form(band.high[at])]
            for x, at in zip(*shown, strict=True)
        ]
        blocks.append(
            Figure(
                name=f"payback-{len(blocks)}",
                title=f"When {who} has paid for itself",
                says=f"Device-hours earned back by serving, less what the arm took to make: the"
                f" break-even is at {count(figure['value'])} {what}, the band is the"
                f" {PAIR_INTERVAL} of the serving saving.",
                chart=Curves(
                    x_axis=f"{what} served",
                    y_axis="device-hours, net",
                    series=[band],
                    log_x=True,
                    level=0.0,
                ),
                table=Table((f"{what} served", "at worst", "expected", "at best"), body),
            )
        )
    return blocks


def _band(result: Result, pair: Pair) -> Series | None:
    """Return net device-hours by units served; None where nothing has to be paid back.

    Source: payback = 3600 C_opt / (c_base x saving), so that C_opt follows from it.
    """
    units, serving = (pair["payback"] or {"value": None})["value"], pair["serving"]
    row = next(
        (
            row
            for row in result["rows"]
            if row["arm"] == pair["base"]
            and row["serving"].get(SERVING_KEY, {"value": None})["value"] is not None
        ),
        None,
    )
    if not units or serving is None or not serving["value"] or row is None:
        return None
    per_unit_s = (row["serving"][SERVING_KEY]["value"] or 0.0) / 1000
    spent_h = units * per_unit_s * serving["value"] / 3600
    low, high = serving.get("ci") or (serving["value"], serving["value"])
    x = [units * AROUND ** (2 * n / (BAND_POINTS - 1) - 1) for n in range(BAND_POINTS)]
    net = lambda saving: [n * per_unit_s * saving / 3600 - spent_h for n in x]
    return Series(
        label=_pair_label(pair), x=x, y=net(serving["value"]), low=net(low), high=net(high)
    )


# -- memory and energy ----------------------------------------------------------------------------
def over_time(materials: Sequence[Material]) -> list[Block]:
    """Return what each stage held of memory and drew of energy, along the run's time."""
    blocks: list[Block] = []
    memory = [each for material in materials if (each := _memory(material)) is not None]
    if memory:
        where = "device" if memory[0][1] == "peak_reserved_bytes" else "process"
        body = [line for _, _, lines in memory for line in lines]
        blocks.append(
            Figure(
                name="memory",
                title="Memory over time",
                says=f"The most that each stage held of the {where}'s memory, while it was at work"
                " or scored.",
                chart=Curves(
                    x_axis="hours since the run began",
                    y_axis="GiB",
                    series=[series for series, _, _ in memory],
                ),
                table=Table(("stage", "began after", "ended after", "at most"), body),
            )
        )
    energy = [each for material in materials if (each := _energy(material)) is not None]
    if energy:
        blocks.append(
            Figure(
                name="energy",
                title="Energy over time",
                says="Energy that the stages drew, added up as each ended.",
                chart=Curves(
                    x_axis="hours since the run began",
                    y_axis="kJ",
                    series=[series for series, _ in energy],
                ),
                table=Table(
                    ("stage", "ended after", "drew"), [r for _, rows in energy for r in rows]
                ),
            )
        )
    return blocks


def _own(material: Material) -> Iterator[tuple[str, Row, list[tuple[float, float]]]]:
    """Yield the rows that this run worked on, with the hours of their windows."""
    for name, row in zip(labels(material.result["rows"]), material.result["rows"], strict=True):
        own = [
            (each.start_h, each.end_h)
            for each in material.stretches
            if each.arm == row["arm"] and each.seed == row["seed"]
        ]
        if own and not row["reused"]:
            yield label_of(material, name), row, own


def _memory(material: Material) -> tuple[Series, str, list[list[str]]] | None:
    for key in ("peak_reserved_bytes", "host_peak_rss_bytes"):
        x: list[float] = []
        y: list[float] = []
        body: list[list[str]] = []
        for name, row, own in sorted(_own(material), key=lambda each: each[2][0]):
            held = row["ledger"]["memory"].get(key, {"value": None})["value"]
            if held is None:
                continue
            for start_h, end_h in own:
                x += [start_h, end_h, end_h]
                y += [held / 2**30, held / 2**30, float("nan")]  # nothing joins two windows
            at = [duration(3600 * each) for each in (own[0][0], own[-1][1])]
            body.append([name, *at, num_bytes(held)])
        if body:
            return Series(label=material.name or "stages", x=x, y=y), key, body
    return None


def _energy(material: Material) -> tuple[Series, list[list[str]]] | None:
    drawn = [
        (own[-1][1], name, joules_)
        for name, row, own in _own(material)
        if (joules_ := row["ledger"]["energy_j"]["value"]) is not None
    ]
    if not drawn:
        return None
    drawn.sort()
    x, y = [0.0], [0.0]
    for at, _, each in drawn:
        x.append(at)
        y.append(y[-1] + each / 1000)
    body = [[name, duration(3600 * at), joules(each)] for at, name, each in drawn]
    return Series(label=material.name or "stages", x=x, y=y, steps=True), body


# -- what would change the answer -----------------------------------------------------------------
def open_questions(result: Result) -> list[str]:
    """Return what would change the verdict: more items, more seeds, another volume."""
    said: list[str] = []
    for pair in result["comparisons"]:
        who = _pair_label(pair)
        key = primary_of(pair)
        quality = pair["quality"].get(key) if key else None
        if quality is not None and quality["value"] is not None and answer(quality) == "undecided":
            needed = quality.get("items_to_decide")
            more = (
                f"about {count(needed)} instead of {rests_on(quality)} might decide it"
                if needed
                else "more test documents or seeds might decide it"
            )
            said.append(f"Items: the quality of {who} is undecided; {more}.")
        saving = pair["training"]
        if saving is not None and saving["value"] is not None and "training" in pair["on"]:
            if saving["ci"] is None:
                said.append(
                    f"Seeds: the training saving of {who} is one run's; seeds=[0,1,2] gives it an"
                    " interval."
                )
            elif straddles(saving):
                said.append(
                    f"Seeds: the training saving of {who} is undecided over"
                    f" {how_many(len(seeds(result)), 'seed')}; more of them narrow it."
                )
        serving = pair["serving"]
        if serving is not None and serving["value"] is not None and straddles(serving):
            said.append(f"Serving: the saving of {who} is undecided; more blocks narrow it.")
        figure = pair["payback"]
        if figure is not None and figure["value"]:
            said.append(
                f"Volume: below {count(figure['value'])} {figure['unit']}s, {who} has not paid for"
                " itself."
            )
        elif figure is not None and figure["value"] is None and never_pays(figure):
            said.append(f"Volume: at none does {who} pay back, as it is no cheaper to serve.")
    return said


# -- words ----------------------------------------------------------------------------------------
def _pairs(materials: Iterable[Material]) -> Iterator[tuple[Material, Pair]]:
    for material in materials:
        for pair in material.result["comparisons"]:
            yield material, pair


def _pair_label(pair: Pair) -> str:
    return f"{one_line(pair['arm'], 60)} against {one_line(pair['base'], 60)}"


def _finished(result: Result) -> Iterator[tuple[str, Row]]:
    rows = arm_rows(result)
    for name, row in zip(labels(rows), rows, strict=True):
        if is_finished(row):
            yield name, row


def _ends(value: Value) -> tuple[float, float] | None:
    ends = value.get("ci")
    return None if ends is None else (ends[0], ends[1])


def _two(ends: tuple[float, float]) -> str:
    return " to ".join(significant(each, 4) for each in ends)


def _shown(value: Value, form: Callable[[float], str]) -> str:
    if value["value"] is None:
        return f"not known: {one_line(value['why_missing'] or NOT_RECORDED, 200)}"
    return form(value["value"])
