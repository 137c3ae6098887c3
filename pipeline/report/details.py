"""What a report's answer rests on, section by section, each as blocks: tables, lists, texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from pipeline.compare import statistics
from pipeline.errors import one_line
from pipeline.evaluation.serving.engine import FIGURES as ENGINE_FIGURES
from pipeline.evaluation.serving.engine import LOAD as ENGINE_LOAD
from pipeline.ledger.attempted import UNMEASURED
from pipeline.ledger.metrics import BY_KEY, RELATIVE, TASK, TRACED_SHARES, catalogue_key
from pipeline.ledger.numbers import count, duration, num_bytes, percent, points, significant
from pipeline.ledger.shapes import Pair, Result, Row, Speedup
from pipeline.report import waste
from pipeline.report.blocks import Block, Bullets, Code, Prose, Table, Terms
from pipeline.report.disturbance import KEYS as DISTURBANCE_KEYS
from pipeline.report.disturbance import disturbance_table
from pipeline.report.money import CONVERGED_KEYS, held, joules, money, money_lines
from pipeline.report.phrases import ARM_INTERVAL, PAIR_INTERVAL, amount
from pipeline.report.reading import reading_lines
from pipeline.report.text import NO_BREAK
from pipeline.report.verdict import INDEPENDENT, counted_words, needed_words, unseen_words
from pipeline.report.view import (
    SERVING_KEY,
    Footnotes,
    Value,
    arm_rows,
    hours_of,
    hours_word,
    is_finished,
    labels,
    no_figure,
    on_gpu,
    primary_key,
    quality_direction,
    run_total,
    seeds,
    served_seed,
    status_word,
    straddles,
    unit,
    unit_of,
    what_happened,
    why_absent,
)
from pipeline.tasks.table import QUALITIES

Shown: TypeAlias = dict[str, None]
"""Catalogue keys of the figures that were shown so far, in order."""
Figure: TypeAlias = tuple[Value | None, Callable[[float], str]]
"""A value and the form it is shown in."""
_SMALL_SHARE = 0.005
"""Phases below this share of a stage's time are summed up as `rest`."""
_RELATIVE_WORDS = " and ".join(
    each.words for each in QUALITIES.values() if each.relative
).capitalize()
_HOW_TO_READ = (
    f"Positive is better or cheaper for the arm. {_RELATIVE_WORDS} differ by a share of the"
    " base's, the other qualities by percentage points; savings are shares of the base's cost."
    " Training saving = 1 - device-hours(arm) / device-hours(base), upstream stages included."
    " It is reported only if the arm matches the base within quality.margin. C is the work of all"
    " stages an artifact depends on, C_opt what the arm's took beyond those of its base."
    " Payback is C_opt /"
    " what a unit costs less to serve: the base's seconds x the serving saving. Each end of a"
    f" {PAIR_INTERVAL} is a one-sided {percent((1 + statistics.LEVEL) / 2)} bound."
)
_NOT_IN_ENVIRONMENT_TABLE = frozenset({"command", "notes"})


# -- sections -------------------------------------------------------------------------------------
def arms(result: Result, notes: Footnotes, shown: Shown) -> list[Block]:
    """Return the arms: what each took, how good it is, what it costs to serve."""
    key, rows = primary_key(result), arm_rows(result)
    if not rows:
        return [
            Prose(
                f"No stage was measured: the run ended {result['status']}:"
                f" {result['why'] or 'no reason'}."
            )
        ]
    use = (
        "compute/gpu_hours" if on_gpu(result) else "compute/device_hours",
        "compute/tokens",
        f"quality/{key}",
        f"serving/{SERVING_KEY}",
        "compute/run_device_hours",
        "compute/run_spent_device_hours",
        "compute/run_reused_device_hours",
    )
    shown.update(dict.fromkeys(use))
    head = (
        "arm",
        "status",
        f"{hours_word(result)} (as time)",
        "tokens",
        f"{key.replace('_', ' ')} ({quality_direction(key)}) [{ARM_INTERVAL}]",
        f"serving {BY_KEY[use[3]].unit} per 1k {unit(result)}s",
    )
    body = [
        _arm_cells(name, row, result, notes) for name, row in zip(labels(rows), rows, strict=True)
    ]
    more = _where_measured(rows, shown)
    head = (*head, *more)
    body = [
        [*cells, *(notes.show(*more[name](row)) for name in more)]
        for cells, row in zip(body, rows, strict=True)
    ]
    time = lambda hours: duration(3600 * hours)
    run = result["run"]
    spent = f"Spent {notes.show(run['spent'], time)}, reused {notes.show(run['reused'], time)}; "
    total = f"run total {run_total(result, notes)}.".replace(NO_BREAK, " ")
    converged = result["run"].get("per_converged_model")
    if converged is not None and converged["device_hours"]["value"] is not None:
        shown.update(dict.fromkeys(CONVERGED_KEYS))
    more_lines = [Prose(f"{text[0].upper()}{text[1:]}.") for text in money_lines(result)]
    return [Table(head, body), Prose(spent + total), *more_lines]


def disturbance(result: Result, notes: Footnotes, shown: Shown) -> list[Block]:
    """Return what else used the machine."""
    head, body = disturbance_table(result, notes)
    if not body:
        return []
    shown.update(dict.fromkeys(DISTURBANCE_KEYS))
    return [Table(head, body)]


def _slice_words(worst: Value, by: Callable[[float], str]) -> str:
    return f"{worst['slice']}: {by(worst['value'])} worse (n = {worst['n']})"


def drift(result: Result, notes: Footnotes, shown: Shown) -> list[Block]:
    """Return what quantizing changed in a model, document by document."""
    rows = [row for row in arm_rows(result) if "kl_to_unquantized" in row["quality"]]
    if not rows:
        return []
    shown.update(
        dict.fromkeys(f"quality/{key}" for key in ("kl_to_unquantized", "flips", "worst_slice"))
    )
    head = (
        "arm",
        "of its parameters in the format",
        f"KL from the unquantized model, nats [{ARM_INTERVAL}]",
        f"changed first predictions [{ARM_INTERVAL}]",
        "worst slice",
    )
    body: list[list[str]] = []
    for name, row in zip(labels(rows), rows, strict=True):
        kl, flips = row["quality"]["kl_to_unquantized"], row["quality"]["flips"]
        by = percent if primary_key(result) in RELATIVE else points
        lost = _slice_words(row["quality"]["worst_slice"], by)
        made = row.get("quantization")
        share = "" if made is None else f"{notes.show(made['share'], percent)} in {made['format']}"
        body.append(
            [
                name,
                share,
                notes.show(kl, significant, "") + _bounds(kl, significant),
                notes.show(flips, percent, "") + _bounds(flips, percent),
                lost,
            ]
        )
    return [Table(head, body)]


def tasks(result: Result, notes: Footnotes, shown: Shown) -> list[Block]:
    """Return what the arms reach on lm-eval tasks, a row per arm and metric."""
    rows = [row for row in arm_rows(result) if any(key.startswith(TASK) for key in row["quality"])]
    if not rows:
        return []
    shown["quality/task"] = None
    form = lambda v: significant(v, 4)
    figures = [
        (label, *key.removeprefix(TASK).split("/"), value)
        for label, row in zip(labels(rows), rows, strict=True)
        for key, value in row["quality"].items()
        if key.startswith(TASK)
    ]
    body = [
        [label, task, metric, notes.show(value, form) + _bounds(value, form), str(value["n"] or "")]
        for label, task, metric, value in figures
    ]
    return [Table(("arm", "task", "metric", f"mean [{ARM_INTERVAL}]", "documents"), body)]


def recovery(result: Result, notes: Footnotes, shown: Shown) -> list[Block]:
    """Return what the fallbacks of a quantize stage brought."""
    rows = [row for row in arm_rows(result) if row["recovery"]]
    if not rows:
        return []
    shown.update(dict.fromkeys(("recovery/loss", "recovery/kl")))
    by = percent if primary_key(result) in RELATIVE else points
    body = [
        [
            name,
            notes.show(hours_of(row, result), lambda hours: duration(3600 * hours)),
            notes.show(row["recovery"]["loss"], by),
            notes.show(row["recovery"]["kl"], significant),
        ]
        for name, row in zip(labels(rows), rows, strict=True)
    ]
    head = ("fallback", hours_word(result), "lost on validation", "KL from its source, nats")
    return [Table(head, body)]


def _arm_cells(name: str, row: Row, result: Result, notes: Footnotes) -> list[str]:
    time = lambda hours: duration(3600 * hours)
    hours = notes.show(hours_of(row, result), time)
    quality = row["quality"].get(primary_key(result))
    form, absent = lambda v: significant(v, 4), no_figure(row)
    level = notes.show(quality, form, absent) + _bounds(quality, form)
    return [
        name,
        status_word(row),
        _spent_and_reused(row, result, hours, notes),
        notes.show(row["ledger"]["counts"]["tokens"], count),
        level,
        notes.show(row["serving"].get(SERVING_KEY), significant, absent),
    ]


def _spent_and_reused(row: Row, result: Result, hours: str, notes: Footnotes) -> str:
    if row["reused"]:
        return f"spent 0, reused {hours}"
    if "work" not in row:
        return hours
    return (
        f"{hours}, reused {notes.show(hours_of(row['work'], result), lambda h: duration(3600 * h))}"
    )


def _where_measured(rows: Sequence[Row], shown: Shown) -> dict[str, Callable[[Row], Figure]]:
    """Return the columns, by head, that stand in the table where any row has a figure for them."""
    candidates: tuple[tuple[str, str, Callable[[Row], Figure]], ...] = (
        ("weights", "serving/weights_bytes", lambda row: (_weights(row), num_bytes)),
        ("energy", "compute/energy_j", lambda row: (row["ledger"]["energy_j"], joules)),
        (
            "facility energy",
            "cost/facility_energy_j",
            lambda row: (row["ledger"]["cost"].get("facility_energy_j"), joules),
        ),
        ("MFU", "compute/mfu", lambda row: (row["ledger"]["counts"]["mfu"], percent)),
        (
            "device memory",
            "compute/peak_reserved_bytes",
            lambda row: (_memory(row, "peak_reserved_bytes"), num_bytes),
        ),
        (
            "left of it",
            "compute/memory_headroom_bytes",
            lambda row: (_memory(row, "headroom_bytes"), num_bytes),
        ),
        ("cost", "cost/amount", _money),
    )
    found: dict[str, Callable[[Row], Figure]] = {}
    for head, key, read in candidates:
        if any((value := read(row)[0]) is not None and value["value"] is not None for row in rows):
            found[head] = read
            shown[key] = None
    return found


def _weights(row: Row) -> Value | None:
    """Return the bytes of the loaded weights; where serving was not measured, its null says why."""
    known, cost = (row["serving"].get(name) for name in ("weights_bytes", SERVING_KEY))
    if known is None and cost is None:
        return {"value": None, "provenance": "unavailable", "why_missing": no_figure(row)}
    return cost if known is None and cost is not None and cost["value"] is None else known


def _memory(row: Row, name: str) -> Value | None:
    return row["ledger"]["memory"].get(name)


def _money(row: Row) -> Figure:
    cost = row["ledger"]["cost"]
    return cost["amount"], lambda v: money(v, cost["currency"])


def _bounds(value: Value | None, form: Callable[[float], str]) -> str:
    interval = value.get("ci") if value else None
    return f" [{form(interval[0])}, {form(interval[1])}]" if interval else ""


def comparisons(result: Result, notes: Footnotes, shown: Shown) -> list[Block]:
    """Return every figure that arms are compared by."""
    body = [
        cells for pair in result["comparisons"] for cells in _pair_cells(result, pair, notes, shown)
    ]
    head = ("arm", "base", "read on", "figure", PAIR_INTERVAL, "n", "margin", "answer")
    return [Table(head, body), Prose(f"{_HOW_TO_READ} {_what_n_counts(result)}")] if body else []


def _what_n_counts(result: Result) -> str:
    num_seeds = len(seeds(result))
    if num_seeds < 2:
        return (
            f"n counts test documents, of serving blocks of four readings.{_independence(result)}"
        )
    served = served_seed(result)
    blocks = (
        ""
        if served is None
        else f"; serving is read on the artifacts of seed {served}, and its n counts blocks"
    )
    return (
        f"Each figure stands once for all {num_seeds} seeds: quality is their mean, a training"
        " saving is 1 - the geometric mean of arm/base, with intervals over seeds, and n counts the"
        f" seeds{blocks}."
    )


def _independence(result: Result) -> str:
    """Return what the intervals over documents assume, and which damage the documents are too few
    to show.
    """
    read = [
        value
        for pair in result["comparisons"]
        for value in pair["quality"].values()
        if value.get("ci")
    ]
    if not read:
        return ""
    unseen = max(read, key=lambda value: value.get("smallest_visible_damage") or 0.0)
    words = unseen_words(unseen)
    assumed = "" if any(value.get("groups") is not None for value in read) else f" {INDEPENDENT}"
    return assumed + (f" {words[:1].upper()}{words[1:]}." if words else "")


def _pair_cells(result: Result, pair: Pair, notes: Footnotes, shown: Shown) -> Iterable[list[str]]:
    """Yield a table row per figure that a comparison is read on."""
    start, absent = [one_line(pair["arm"]), one_line(pair["base"])], why_absent(result, pair)
    if "quality" in pair["on"]:
        shown["savings/quality_delta"] = None
        shown.update(dict.fromkeys(catalogue_key(f"quality/{key}") for key in pair["quality"]))
        yield from (
            [*start, *_quality_cells(key, value, notes)] for key, value in pair["quality"].items()
        )
        if not pair["quality"]:
            yield [*start, "quality", "-" + notes.mark(absent), "", "", "", ""]
    for measure in ("training", "serving"):
        if measure in pair["on"]:
            shown[f"savings/{measure}"] = None
            yield [
                *start,
                f"{measure} saving",
                *_saving_cells(pair[measure], notes, absent, len(seeds(result))),
            ]
            yield from ([*start, *cells] for cells in _parts_of_saving(pair[measure], notes, shown))
    if pair["speedup"]:
        shown["savings/memory"] = None
        yield [*start, *_speedup_cells(pair["speedup"], notes)]
    if "payback" in pair["on"]:
        shown["savings/payback_units"] = None
        yield [*start, "payback", *_payback_cells(pair["payback"], pair["serving"], notes, absent)]


def _speedup_cells(speedup: Speedup, notes: Footnotes) -> list[str]:
    what = f"memory saving ({speedup['memory']['of'].removesuffix('_bytes')})"
    answer = "no_speedup: saves neither time nor memory" if speedup["no_speedup"] else ""
    return [
        what,
        notes.show(speedup["memory"], lambda v: percent(v, sign=True)),
        "",
        "",
        "",
        answer,
    ]


def _quality_cells(key: str, value: Value, notes: Footnotes) -> list[str]:
    form = lambda v: percent(v, sign=True) if key in RELATIVE else f"{points(v, sign=True)} points"
    margin = amount(key, value["margin"]) if "margin" in value else "not stated"
    name = (
        key.removeprefix(TASK).replace("/", ": ") if key.startswith(TASK) else key.replace("_", " ")
    )
    figure = [name, notes.show(value, form), _bounds(value, form).strip()]
    needed = value.get("items_to_decide")
    more = f", about {needed_words(value, needed)}" if needed else ""
    more += " whether beyond the margin" if needed and value["answer"] == "worse" else ""
    more += f": {value['why_undecided']}" if value.get("why_undecided") else ""
    return [
        *figure,
        counted_words(value) if "n" in value else "",
        margin,
        value.get("answer", "") + more,
    ]


def _saving_cells(value: Value | None, notes: Footnotes, absent: str, num_seeds: int) -> list[str]:
    """Return a saving with its interval, and what that rests on: blocks, or seeds where there are
    several.
    """
    form = lambda v: percent(v, sign=True)
    n = value.get("blocks", num_seeds if num_seeds > 1 else "") if value and value.get("ci") else ""
    disturbed = "; ".join(value.get("disturbed", [])) if value else ""
    return [notes.show(value, form, absent), _bounds(value, form).strip(), str(n), "", disturbed]


_ONLY_IF_KNOWN = ("new_spend_saving", "bound", "amortised", "less_others")
"""Figures of a training saving that stand in for it, or beside it, in some cases only."""


def _parts_of_saving(value: Value | None, notes: Footnotes, shown: Shown) -> Iterable[list[str]]:
    """Yield what a training saving is made of, where the comparison tells."""
    share = lambda v: percent(v, sign=True)
    time = lambda hours: duration(3600 * hours)
    parts = (
        ("systems", "systems part", share),
        ("algorithmic", "algorithmic part", share),
        ("new_spend_saving", "saving in new spending only", share),
        ("less_others", "saving of device-time less what others took, estimated", share),
        ("bound", "saving it stays below", share),
        ("amortised", "saving with the teacher shared", share),
        ("c_arm", "C(arm)", time),
        ("c_base", "C(base)", time),
        ("c_opt", "C_opt", time),
    )
    for name, words, form in parts:
        if name == "less_others" and value and _is_as_read(value):
            continue
        if (
            value
            and name in value
            and not (name in _ONLY_IF_KNOWN and value[name]["value"] is None)
        ):
            shown.update({"savings/c_opt_device_hours": None} if name == "c_opt" else {})
            yield [f"training: {words}", notes.show(value[name], form), "", "", "", ""]
    if value and value.get("rule"):
        yield ["training: compared by", value["rule"], "", "", "", ""]


def _is_as_read(value: Value) -> bool:
    """Tell whether others took so little that the saving of time less theirs is the one that was
    read.
    """
    read, less = value["value"], value.get("less_others", {"value": None})["value"]
    return read is not None and less is not None and abs(read - less) < _SMALLEST_SHOWN


_SMALLEST_SHOWN = 0.0005  # a tenth of a per cent, rounded


def _payback_cells(
    value: Value | None, serving: Value | None, notes: Footnotes, absent: str
) -> list[str]:
    """Return the payback, and the chance that the arm pays at the declared volume where one was
    declared.
    """
    suffix = f" {value['unit']}s" if value else ""
    chance = value.get("p_net_positive") if value else None
    said = [f"P(net > 0) = {notes.show(chance, percent)}"] if chance else []
    replicas = value.get("replicas_saved") if value else None
    if replicas and replicas["value"] is not None:
        open_still = (
            ""
            if serving is None or not straddles(serving)
            else ", if the serving saving is what it seems"
        )
        said.append(f"{replicas['value']:.0f} replicas fewer at serving.rate{open_still}")
    return [notes.show(value, lambda v: count(v) + suffix, absent), "", "", "", "; ".join(said)]


_AT_LOAD: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("prefill", "prefill_device_s_per_1k_tokens", significant),
    ("decode", "decode_device_s_per_1k_tokens", significant),
    ("p50", "p50_s", duration),
    ("p95", "p95_s", duration),
    ("prefill p50", "prefill_p50_s", duration),
    ("p95", "prefill_p95_s", duration),
    ("token p50", "token_p50_s", duration),
    ("p95", "token_p95_s", duration),
    ("dynamic cache", f"dynamic_cache_{SERVING_KEY}", significant),
    ("with a draft", f"drafted_{SERVING_KEY}", significant),
    ("without", f"undrafted_{SERVING_KEY}", significant),
    ("accepted", "draft_acceptance", percent),
    ("units per joule", "units_per_joule", significant),
    ("device memory", "peak_bytes", num_bytes),
)
"""Serving figures at the declared load, with the heads of their columns."""


def serving(result: Result, notes: Footnotes, shown: Shown) -> list[Block]:
    """Return what stands behind the serving column of the arms, and how serving does at other batch
    sizes.
    """
    rows = [
        (name, row["serving"])
        for name, row in zip(labels(result["rows"]), result["rows"], strict=True)
    ]
    known = {
        key for _, serving in rows for key, value in serving.items() if value["value"] is not None
    }
    per_1k = lambda v: f"{significant(v)} ({count(1000 / v)})"
    columns = [(head, key, form) for head, key, form in _AT_LOAD if key in known]
    columns += [(f"batch {size}", _batch_key(size), per_1k) for size in _batch_sizes(known)]
    served = [
        (name, serving) for name, serving in rows if any(key in serving for _, key, _ in columns)
    ]
    if not served:
        return []
    shown.update({f"serving/{key}": None for _, key, _ in columns if f"serving/{key}" in BY_KEY})
    body = [
        [name, *(notes.show(serving.get(key), form) for _, key, form in columns)]
        for name, serving in served
    ]
    what = unit(result)
    legend = (
        f"batch N: device-seconds per 1,000 {what}s ({what}s per device-second in brackets) at that"
        " batch size; sizes other than the load's are read twice, and no saving rests on them. All"
        " else is at the declared load, prefill and decode in device-seconds per 1,000 tokens, p50"
        " and p95 of a batch, of its first token (prefill) and of its further ones."
    )
    if f"dynamic_cache_{SERVING_KEY}" in known:
        legend += f" Dynamic cache: device-seconds per 1,000 {what}s when served so, read twice."
    if f"drafted_{SERVING_KEY}" in known:
        legend += (
            f" With a draft, without: device-seconds per 1,000 {what}s, one sequence at a time, on"
            " the same prompts. Accepted: the share of drafted tokens that the arm would have"
            " written too."
        )
    ways = [
        f"{pair['arm']} against {pair['base']}: {how}"
        for pair in result["comparisons"]
        if pair["serving"] and (how := pair["serving"].get("how"))
    ]
    return [
        Table(("arm", *(head for head, _, _ in columns)), body),
        Prose(legend),
        *([Bullets(ways)] if ways else []),
    ]


def engine(result: Result, notes: Footnotes, shown: Shown) -> list[Block]:
    """Return what files of a serving engine say, apart from all that was measured."""
    rows = [
        (name, row["serving"])
        for name, row in zip(labels(result["rows"]), result["rows"], strict=True)
    ]
    rows = [
        (name, serving) for name, serving in rows if any(key in serving for key in ENGINE_FIGURES)
    ]
    columns = [
        key for key in (*ENGINE_FIGURES, *ENGINE_LOAD) if any(key in serving for _, serving in rows)
    ]
    if not rows:
        return []
    shown.update({f"serving/{key}": None for key in columns})
    # written with their unit
    in_seconds = {key: BY_KEY[f"serving/{key}"].unit == "s" for key in columns}
    heads = [
        key.removeprefix("engine_").removesuffix("_s" if in_seconds[key] else "").replace("_", " ")
        for key in columns
    ]
    forms = [duration if in_seconds[key] else count for key in columns]
    body = [
        [
            name,
            *(notes.show(serving.get(key), form) for key, form in zip(columns, forms, strict=True)),
        ]
        for name, serving in rows
    ]
    legend = (
        "As the files of serving.results say (see Notes). Nothing of it was measured here; no"
        " saving rests on it."
    )
    return [Table(("arm", *heads), body), Prose(legend)]


def _batch_key(size: int) -> str:
    return f"batch_{size}_{SERVING_KEY}"


def _batch_sizes(keys: Iterable[str]) -> list[int]:
    """Return the batch sizes that serving figures speak of, smallest first."""
    sizes = (key.removeprefix("batch_").removesuffix(f"_{SERVING_KEY}") for key in keys)
    return sorted(int(size) for size in sizes if size.isdecimal())


def times(result: Result, notes: Footnotes, shown: Shown) -> list[Block]:
    """Return the stages' time by class and by phase."""
    rows = [
        (name, row)
        for name, row in zip(labels(result["rows"]), result["rows"], strict=True)
        if _ran(row)
    ]
    if not rows:
        return []
    names = ("productive", "support", "wasted")
    shown.update(dict.fromkeys(f"compute/{name}_device_hours" for name in names))
    body = [
        [
            name,
            *(_share_of_attached(row, part, notes) for part in names),
            _causes(row, notes),
            _phases(row),
        ]
        for name, row in rows
    ]
    return [Table(("stage", *names, "wasted by", "phases"), body)]


def traced(result: Result, _notes: Footnotes, shown: Shown) -> list[Block]:
    """Return the GPU timeline: shares of the steps that were traced, and where the traces lie."""
    names = [name for name, *_ in TRACED_SHARES]
    body: list[list[str]] = []
    for label, row in zip(labels(result["rows"]), result["rows"], strict=True):
        timeline = row["ledger"].get("gpu_timeline")
        if timeline and timeline["busy"]["value"] is not None:
            steps = f"{timeline['traced_steps']['value']:.0f}"
            body.append([label, steps, *(percent(timeline[name]["value"]) for name in names)])
    if not body:
        return []
    shown.update({f"compute/traced_{name}_share": None for name in names})
    text = "Traces lie in the run's folder under traces/ and open in ui.perfetto.dev."
    head = ("stage", "steps", *(name.replace("_", " ") for name in names))
    return [Table(head, body), Prose(text)]


def waste_table(result: Result, _notes: Footnotes, shown: Shown) -> list[Block]:
    """Return all waste by cause, each with the first thing to try."""
    body = waste.table_body(result)
    shown.update({"compute/wasted_device_hours": None} if body else {})
    return [Table(waste.HEAD, body)] if body else []


def _ran(row: Row) -> bool:
    return row["ledger"]["device_hours"]["attached"]["value"] is not None


def _share_of_attached(row: Row, part: str, notes: Footnotes) -> str:
    hours = row["ledger"]["device_hours"]
    attached = hours["attached"]["value"]
    return notes.show(hours[part], lambda v: percent(v / attached) if attached else "0%")


def _causes(row: Row, notes: Footnotes) -> str:
    hours = row["ledger"]["device_hours"]
    time = lambda v: duration(3600 * v)
    parts = [
        f"{cause} {notes.show(value, time)}"
        for cause, value in hours["wasted_by"].items()
        if value["value"] != 0
    ]
    return ", ".join(parts) or "nothing"


def _phases(row: Row) -> str:
    """Return the phases by share of the stage's time, largest first."""
    phases = row["ledger"]["phases_ns"]
    total = sum(phases.values())
    if not total:
        return "no phase recorded"
    shares = sorted(((ns / total, name) for name, ns in phases.items()), reverse=True)
    rest = sum(share for share, _ in shares if share < _SMALL_SHARE)
    large = [f"{name} {percent(share)}" for share, name in shares if share >= _SMALL_SHARE]
    return ", ".join(large + ([f"rest {percent(rest)}"] if rest else []))


def _failed(part: Any) -> list[str]:
    """Return the reasons of nulls that measuring failed to give, each once, wherever they stand in
    plain JSON.
    """
    if not isinstance(part, dict):
        return []
    held: dict[str, Any] = part
    why = held.get("why_missing")
    own = [why] if isinstance(why, str) and UNMEASURED in why else []
    return list(
        dict.fromkeys([*own, *(each for value in held.values() for each in _failed(value))])
    )


def remarks(result: Result) -> list[Block]:
    """Return what was noticed, and what could not be measured."""
    lines = [f"{result['status']}: {result['why']}"] if result["why"] else []
    for name, row in zip(labels(result["rows"]), result["rows"], strict=True):
        if not is_finished(row):
            lines.append(f"{name} {what_happened(row)}")
        elif row["reused"]:
            lines.append(f"{name} reused from run {row['reused']}: spent 0 here")
        lines += [
            f"{name}: the meter says {problem}" for problem in row["ledger"]["meter_problems"]
        ]
        lines += [
            f"{name}: {why}"
            for why in _failed({part: row[part] for part in ("ledger", "quality", "serving")})
        ]
        if not row["ledger"]["meter_valid"]:
            lines.append(f"{name}: its figures do not reconcile, so no comparison can rest on them")
    lines += [f"comparison pass: {why}" for why in _failed(result["run"].get("compare_conditions"))]
    lines += reading_lines(result)
    kept = held(result["run"].get("allocated"))
    lines += [] if kept is None else [kept]
    attempts = result["run"]["attempts"]
    lines += [f"the run took {attempts} attempts"] if attempts > 1 else []
    lines += result["environment"]["notes"]
    return [Bullets(list(dict.fromkeys(lines)))] if lines else []


def environment(result: Result) -> list[Block]:
    """Return with what, and on what, the figures were made."""
    device = result["device"]
    lines = {"device": f"{device['count']} x {device['name']} ({device['kind']})"}
    for key, value in result["environment"].items():
        if key not in _NOT_IN_ENVIRONMENT_TABLE and value is not None:
            lines[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return [Table(("what", "value"), [[key, value] for key, value in lines.items()])]


def definitions(shown: Iterable[str]) -> list[Block]:
    """Return what the figures that were shown mean."""
    items = [(key, unit_of(key), BY_KEY[key].meaning) for key in shown]
    return [Terms(items)] if items else []


def reproduce(result: Result) -> list[Block]:
    """Return the command that the run was started by."""
    return command_block(result["environment"].get("command"))


def command_block(command: str | None) -> list[Block]:
    """Return a command to copy."""
    return [Code(one_line(command, 2000))] if command else []
