"""What the reports read from result.json: statuses, labels, the primary quality, and the reasons of
nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired

from pipeline.config.arms import BASE, is_fallback
from pipeline.errors import one_line
from pipeline.ledger.devices.table import is_gpu
from pipeline.ledger.metrics import BY_KEY, PRIMARY, UNIT
from pipeline.ledger.metrics import primary_key as deciding_key
from pipeline.ledger.numbers import in_unit, significant, time_unit
from pipeline.ledger.shapes import Pair, Result, Row
from pipeline.report.text import NO_BREAK
from pipeline.tasks.table import Task

Value = Mapping[str, Any]
"""A figure with what stands beside it, which differs: an interval, a margin, a unit."""


class ArmRow(Row):
    """A row as a table of arms shows it: `work` is that of another run which it assessed."""

    work: NotRequired[Row]


SERVING_KEY = "device_s_per_1k_units"
NOT_RECORDED = "not recorded"
NO_MODEL = "a teacher cache is no model: it has no quality and serves nothing"
FALLBACK_ROW = "a fallback is scored on validation only; the stage it belongs to is assessed"
_STATUS = {"FINISHED": "done", "SKIPPED": "skipped"}


class Footnotes:
    """Numbers the reasons of nulls; a reason that comes again keeps its number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, why: object) -> str:
        """Return the mark `[n]` of a reason."""
        return f"[{self._numbers.setdefault(one_line(why), len(self._numbers) + 1)}]"

    def show(
        self, value: Value | None, form: Callable[[float], str], absent: str = NOT_RECORDED
    ) -> str:
        """Return a figure in its form, or `-` with the mark of why it is null (`absent` where it is
        not even that).
        """
        if value is None:
            return "-" + self.mark(absent)
        return (
            form(value["value"])
            if value["value"] is not None
            else "-" + self.mark(value["why_missing"])
        )

    def reasons(self) -> list[tuple[str, str]]:
        """Return every mark and its reason, in order."""
        return [(f"[{number}]", why) for why, number in self._numbers.items()]


def is_finished(row: Row) -> bool:
    """Tell whether this row has the stage's artifact; work of another run that this one assessed
    stands beside it.
    """
    return row["status"] == "FINISHED" and row["artifact"] is not None


def no_figure(row: Row) -> str:
    """Say why a row has no quality and no serving figures at all."""
    if row["artifact"] is not None and row["artifact"]["kind"] == "teacher_cache":
        return NO_MODEL
    if row["artifact"] is not None and is_fallback(row["arm"]):
        return FALLBACK_ROW
    return row["why"] or NOT_RECORDED


def arm_rows(result: Result) -> list[ArmRow]:
    """Return the rows that a table of arms shows: work of another run stands with the row that
    assessed it here.

    Such a row has the work's one as `work`; result.json keeps them apart, for each has hours of its
    own.
    """
    reused = {
        (row["arm"], row["seed"]): row
        for row in result["rows"]
        if row["reused"] and _is_work_alone(row)
    }
    joined = {(row["arm"], row["seed"]) for row in result["rows"] if is_finished(row)} & set(reused)
    rows = (
        row
        for row in result["rows"]
        if (row["arm"], row["seed"]) not in joined or not _is_work_alone(row)
    )
    return [
        (
            {**row, "work": reused[row["arm"], row["seed"]]}
            if is_finished(row) and (row["arm"], row["seed"]) in joined
            else {**row}
        )
        for row in rows
    ]


def _is_work_alone(row: Row) -> bool:
    return row["status"] == "FINISHED" and row["artifact"] is None


def status_word(row: Row | ArmRow) -> str:
    """Return `done`, `reused`, `assessed` (the work is another run's), `skipped`, `FAILED` or
    `KILLED`.
    """
    word: str = "assessed" if "work" in row else row["status"]
    return "reused" if word == "FINISHED" and row["reused"] else _STATUS.get(word, word)


def finished_row(result: Result, arm: str) -> Row | None:
    """Return the newest finished row of an arm."""
    rows = [row for row in result["rows"] if row["arm"] == arm and is_finished(row)]
    return rows[-1] if rows else None


def chain(result: Result, arm: str) -> list[str]:
    """Return the stages that led to an arm's artifact, each once, the arm last."""
    row = finished_row(result, arm)
    before = [
        each for needed in (row["depends_on"] if row else []) for each in chain(result, needed)
    ]
    return list(dict.fromkeys([*before, *([arm] if row else [])]))


def unfinished(result: Result) -> list[Row]:
    """Return the last row of every arm and seed that never got an artifact."""
    last = {(row["arm"], row["seed"]): row for row in result["rows"] if not is_finished(row)}
    done = {(row["arm"], row["seed"]) for row in result["rows"] if is_finished(row)}
    return [row for key, row in last.items() if key not in done]


def what_happened(row: Row) -> str:
    """Say why a row has no artifact: `skipped: no CUDA device`."""
    words = {
        "SKIPPED": "was skipped",
        "FAILED": "FAILED",
        "KILLED": "was killed",
        "FINISHED": "was reused",
    }
    word = words[row["status"]]
    return f"{word}: {one_line(row['why'] or 'no reason recorded')}"


def why_missing(result: Result, arm: str) -> str | None:
    """Say why an arm has no artifact; None where it has one. `base` is the given model and always
    there.
    """
    if arm == BASE or finished_row(result, arm) is not None:
        return None
    return next(
        (what_happened(row) for row in reversed(result["rows"]) if row["arm"] == arm), "did not run"
    )


def why_absent(result: Result, pair: Pair) -> str:
    """Say why a comparison lacks a figure: an arm without an artifact, where there is one."""
    missing = ((arm, why_missing(result, arm)) for arm in (pair["arm"], pair["base"]))
    return next(
        (f"{one_line(arm, 60)} {why}" for arm, why in missing if why is not None), NOT_RECORDED
    )


def seeds(result: Result) -> list[int]:
    """Return the seeds of the finished rows."""
    return sorted({row["seed"] for row in result["rows"] if is_finished(row)})


def served_seed(result: Result) -> int | None:
    """Return the seed whose artifacts serving was read on."""
    known = (
        row
        for row in result["rows"]
        if row["serving"].get(SERVING_KEY, {}).get("value") is not None
    )
    return next((row["seed"] for row in known), None)


def labels(rows: Sequence[Row]) -> list[str]:
    """Return a name per row: the arm, with seed, run and attempt only where they tell rows
    apart.
    """
    many_seeds = len({row["seed"] for row in rows}) > 1
    runs: dict[tuple[str, int], set[str | None]] = {}
    tries: dict[tuple[str, int, str | None], set[int]] = {}
    for row in rows:
        arm, seed, run = row["arm"], row["seed"], row["reused"]
        runs.setdefault((arm, seed), set()).add(run)
        tries.setdefault((arm, seed, run), set()).add(row["attempt"])
    return [
        one_line(row["arm"])
        + (f" s{row['seed']}" if many_seeds else "")
        + (" earlier" if row["reused"] and len(runs[row["arm"], row["seed"]]) > 1 else "")
        + (f" #{row['attempt']}" if len(tries[row["arm"], row["seed"], row["reused"]]) > 1 else "")
        for row in rows
    ]


def primary_key(result: Result) -> str:
    """Return the quality that decides; that of the first task where no row carries any."""
    carried = [row["quality"] for row in result["rows"]]
    return deciding_key(carried) or next(iter(PRIMARY.values()))


def primary_of(pair: Pair) -> str | None:
    """Return the key of the quality that a comparison is read on."""
    return deciding_key([pair["quality"]])


def quality_direction(key: str) -> str:
    """Return `lower better` or `higher better`."""
    return "higher better" if BY_KEY[f"quality/{key}"].direction > 0 else "lower better"


def unit(result: Result) -> str:
    """Return what serving and payback count: `token` or `example`."""
    stated = next(
        (pair["payback"]["unit"] for pair in result["comparisons"] if pair["payback"]), None
    )
    key, (first, *_) = primary_key(result), Task
    task = next((task for task in Task if key in (task.kind.primary, task.kind.stands_in)), first)
    return stated or UNIT[task]


def on_gpu(result: Result) -> bool:
    """Tell whether device-hours of this run are GPU-hours."""
    return is_gpu(result["device"]["kind"])


def device_words(result: Result) -> str:
    """Return the devices in words: `1 CPU host`, `8 x NVIDIA H200`."""
    device = result["device"]
    name = "CPU host" if device["kind"] == "cpu" else one_line(device["name"], 60)
    return f"{device['count']} {name}" if device["kind"] == "cpu" else f"{device['count']} x {name}"


def hours_word(result: Result) -> str:
    """Return `GPU-hours` or `device-hours`: GPU-hours are the name on GPUs only."""
    return "GPU-hours" if on_gpu(result) else "device-hours"


def hours_of(row: Row, result: Result) -> Value:
    """Return the attached hours of a row: GPU-hours on GPUs, else device-hours."""
    ledger = row["ledger"]
    return ledger["gpu_hours"]["attached"] if on_gpu(result) else ledger["device_hours"]["attached"]


def straddles(value: Value) -> bool:
    """Tell whether a saving's interval holds both signs."""
    interval = value.get("ci")
    return interval is not None and interval[0] <= 0 <= interval[1]


def run_total(result: Result, notes: Footnotes) -> str:
    """Return `90.0 min = work 71.0 + ... + overhead 3.0`, all in one unit so that the sum can be
    checked by eye.
    """
    hours = result["run"]["device_hours"]
    total_s = 3600 * (hours["total"]["value"] or 0.0)
    per_unit, symbol = time_unit(total_s)
    decimals = len(significant(total_s / per_unit).partition(".")[2])
    form = lambda h: in_unit(3600 * h, per_unit, decimals)
    parts = [
        f"{name}{NO_BREAK}{notes.show(hours[name], form)}"
        for name in ("work", "assess", "retry", "compare", "overhead")
    ]
    return f"{notes.show(hours['total'], form)}{NO_BREAK}{symbol} = {' + '.join(parts)}"


def unit_of(key: str) -> str:
    """Return the unit of a figure of the catalogue, in words where it has none."""
    unit = BY_KEY[key].unit
    return "no unit" if unit == "1" else unit
