"""The waste report: per stage a table of causes with device-hours, share, money, and the first
thing to try.

A cause is advised on only where its measured share of the stage reaches the threshold written
beside the remedy. Wasted causes come from the host timeline and from lost intervals, and add up to
the stage's `wasted`. Below them stand what is no waste but may be too much (evaluation,
checkpoints, compiling), and what the GPU did not do while the host was busy (from traced steps, as
a share of those steps): the same seconds seen from elsewhere, so they are not added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.errors import one_line
from pipeline.ledger.metrics import WASTE_CAUSES, WASTED
from pipeline.ledger.numbers import duration, percent, significant
from pipeline.ledger.shapes import Result, Row
from pipeline.report.text import NO_BREAK
from pipeline.report.view import labels

HOUR_NS = 3600 * 10**9
METERED = "metered"
"""Type of a stage that another program did: this pipeline's settings do not reach it."""
_SHOWN_SHARE = 0.001
"""Wasted causes below this share of their stage are left to the total."""
_TERMINAL_SHARE = 0.01
_TERMINAL_CAUSES = 5
_LEAST_UNATTRIBUTED_S = 1.0


@dataclass(frozen=True, slots=True)
class Remedy:
    """The first thing to try where a cause takes `threshold` of a stage or more.

    Attributes:
        here: For stages of this pipeline, by setting.
        elsewhere: For programs that were metered.
    """

    threshold: float
    here: str
    elsewhere: str


SHARED = "ranks wait for one another: take fewer, or larger batches"
"""The first thing to try where a stage's own ranks wait."""
REMEDIES: dict[str, Remedy] = {
    "import": Remedy(
        0.05,
        "make more arms in one run: a process imports once",
        "do more per process: it imports once",
    ),
    "data_wait": Remedy(
        0.05,
        "raise batch_size (training.* or the stage's own): fewer, larger batches",
        "raise num_workers of the data loader",
    ),
    "comm_exposed": Remedy(
        0.05,
        "another process was making the same: run one after the other",
        "accumulate gradients, or overlap the exchange with backward",
    ),
    "unattributed": Remedy(
        0.02,
        "a phase lacks its marker: please report it",
        'mark what the program does there: with pipeline.phase("...")',
    ),
    "rollback": Remedy(
        0.02,
        "checkpoint_every=auto, or a lower preempted_every_seconds: less to replay",
        "save checkpoints more often: less to replay",
    ),
    "failed_attempt": Remedy(
        0.0, "mend what failed: the row says why", "mend what failed: its log says why"
    ),
    "idle_rank": Remedy(0.05, "give every rank as much to do", "give every rank as much to do"),
    "eval": Remedy(
        0.15,
        "raise eval_every, or lower eval_documents (training.* or the stage's own)",
        "evaluate less often, or on fewer documents",
    ),
    "checkpoint": Remedy(
        0.10,
        "checkpoint_every=auto (training.* or the stage's own), or raise it",
        "save checkpoints less often",
    ),
    "compile": Remedy(
        0.10,
        "compile=never (training.* or the stage's own), or more steps for it",
        "compile less, or train longer on what is compiled",
    ),
    "idle_host_wait": Remedy(
        0.10,
        "raise batch_size (training.* or the stage's own): the GPU waits for the host",
        "larger batches: the GPU waits for the host",
    ),
    "idle_launch_gap": Remedy(
        0.10,
        "compile=always, or a larger batch_size (training.* or the stage's own)",
        "compile the model, capture graphs, or use larger batches",
    ),
    "copy_exposed": Remedy(
        0.05,
        "raise batch_size (training.* or the stage's own): fewer, larger copies",
        "pin host memory and copy ahead (non_blocking=True)",
    ),
    "throttled": Remedy(
        0.05,
        "see the throttle reasons: power or heat limits this device",
        "see the throttle reasons: power or heat limits this device",
    ),
}
_SUPPORT = ("eval", "checkpoint", "compile")
_OF_THE_GPU = ("idle_host_wait", "idle_launch_gap", "copy_exposed")


@dataclass(frozen=True, slots=True)
class Cause:
    """One line of the table.

    Attributes:
        kind: `wasted`, `support`, or `of traced steps` / `of samples` for what is seen on the
            device.
        device_hours: None where the cause is a share of traced steps only.
        share: Of the stage's attached time (of the traced steps, of the samples).
        money: At the declared rate; None where none is declared.
        advice: None below the threshold.
    """

    name: str
    kind: str
    share: float
    device_hours: float | None
    money: float | None
    advice: str | None
    # what the share is of; kinds that say so themselves have nothing here
    of: str = " of its stage"


def causes_are_known(row: Row) -> bool:
    """Tell whether a row's time was spent here and falls into classes; a metered program may report
    no phases.
    """
    hours = row["ledger"]["device_hours"]
    return (
        not row["reused"]
        and bool(hours["attached"]["value"])
        and hours["wasted"]["value"] is not None
    )


def causes(row: Row) -> list[Cause]:
    """Return what a stage attempt lost and may save: wasted causes first, each kind with the
    largest first.
    """
    attached = row["ledger"]["device_hours"]["attached"]["value"]
    if attached is None or not causes_are_known(row):
        return []
    by_kind = (_wasted(row), _support(row, attached), _on_device(row))
    return [cause for kind in by_kind for cause in sorted(kind, key=lambda cause: -cause.share)]


def _reached(name: str, share: float, hours: float | None) -> bool:
    """Whether a cause is large enough to advise on; less than a second in no phase is what
    scheduling leaves.
    """
    is_small = name == "unattributed" and hours is not None and 3600 * hours < _LEAST_UNATTRIBUTED_S
    return share >= REMEDIES[name].threshold and not is_small


def first_thing(
    name: str, share: float, hours: float | None, *, is_metered: bool, has_ranks: bool
) -> str | None:
    """Return the first thing to try against a cause; None below the threshold.

    Args:
        share: Of the time that is looked at.
        hours: The same in device-hours, where they are known.
        is_metered: Whether another program did it.
        has_ranks: Whether several processes did.
    """
    if share <= 0 or not _reached(name, share, hours):
        return None
    if name == "comm_exposed" and has_ranks:
        return SHARED
    return REMEDIES[name].elsewhere if is_metered else REMEDIES[name].here


def _cause(row: Row, name: str, kind: str, share: float, hours: float | None) -> Cause:
    amount = row["ledger"]["cost"]["amount"]["value"]
    money = None if amount is None or hours is None else amount * share
    remedy_text = first_thing(
        name,
        share,
        hours,
        is_metered=row["type"] == METERED,
        has_ranks=any(row["ledger"].get(key) for key in ("ranks", "assess_ranks")),
    )
    of = (
        ""
        if kind.startswith("of ")
        else " of the command"
        if row["type"] == METERED
        else " of its stage"
    )
    return Cause(name, kind, share, hours, money, remedy_text, of)


def _wasted(row: Row) -> list[Cause]:
    hours = row["ledger"]["device_hours"]
    attached, by_cause = hours["attached"]["value"], hours["wasted_by"]
    found = {name: by_cause[name]["value"] for name in WASTE_CAUSES if name in by_cause}
    return [
        _cause(row, name, "wasted", lost / attached, lost)
        for name, lost in found.items()
        if lost and attached and lost / attached >= _SHOWN_SHARE
    ]


def _support(row: Row, attached: float) -> list[Cause]:
    """Return the support phases that are large enough to advise on.

    Assessment evaluates too, and is not to be saved on: it is taken off, so that the share is a
    lower bound.
    """
    ledger = row["ledger"]
    # what a stage without steps evaluates is its proof, not a reading on the way
    takes_steps = ledger["counts"]["goodput"]["value"] is not None or row["type"] == METERED
    if not takes_steps:
        return []
    total_ns = sum(ledger["phases_ns"].values())
    assessed_ns = (ledger["device_hours"]["assess"]["value"] or 0.0) / attached * total_ns
    shares = {
        name: ledger["phases_ns"].get(name, 0) / total_ns if total_ns else 0.0 for name in _SUPPORT
    }
    shares["eval"] = max(0.0, shares["eval"] - (assessed_ns / total_ns if total_ns else 0.0))
    found = (
        _cause(row, name, "support", share, share * attached) for name, share in shares.items()
    )
    return [cause for cause in found if cause.advice is not None]


def _on_device(row: Row) -> list[Cause]:
    """Return what traced steps and samples of the device show, where they exist."""
    timeline, conditions = (
        row["ledger"].get(name) or {} for name in ("gpu_timeline", "conditions")
    )
    shares = {name: timeline.get(name, {"value": None})["value"] for name in _OF_THE_GPU}
    seen = [
        _cause(row, name, "of traced steps", share, None) for name, share in shares.items() if share
    ]
    throttled = conditions.get("throttle_share", {"value": None})["value"]
    seen += [_cause(row, "throttled", "of samples", throttled, None)] if throttled else []
    return [cause for cause in seen if cause.advice is not None]


def advice(row: Row) -> list[str]:
    """Return the advice on a stage in short: `data_wait 31%: raise num_workers of the data
    loader`.
    """
    return [
        f"{cause.name} {percent(cause.share)}: {cause.advice}"
        for cause in causes(row)
        if cause.advice
    ]


def outside(result: Result) -> list[tuple[str, Cause]]:
    """Return what was wasted outside of stages, as shares of the run; advised on only where a stage
    ran at all.
    """
    run = result["run"]
    total = run["device_hours"]["total"]["value"]
    ran = any(not row["reused"] for row in result["rows"])
    found: list[tuple[str, Cause]] = []
    for name, part in (("outside stages", "overhead"), ("comparison pass", "compare")):
        for phase, cause in WASTED.items():
            hours = run["phases_device_ns"][part].get(phase, 0) / HOUR_NS
            if total and hours / total >= _SHOWN_SHARE:
                remedy, share, rate = REMEDIES[cause], hours / total, _rate(result)
                remedy_text = remedy.here if ran and _reached(cause, share, hours) else None
                money = None if rate is None else rate * hours
                found.append(
                    (name, Cause(cause, "wasted", share, hours, money, remedy_text, " of the run"))
                )
    return found


def _rate(result: Result) -> float | None:
    """Return the price of a device-hour that is declared, else what this run's own rows were
    charged with.
    """
    declared = (result["run"].get("cost") or {}).get("rate")
    if declared is not None:
        return declared["per_device_hour"]
    own = (row for row in result["rows"] if not row["reused"])
    paid = ((row["ledger"]["cost"]["amount"]["value"], _hours(row, "attached")) for row in own)
    return next((amount / hours for amount, hours in paid if amount is not None and hours), None)


def total(result: Result) -> Cause | None:
    """Return all that this run wasted, as a share of what it spent; None where a stage does not
    tell.
    """
    run = result["run"]
    own = [row for row in result["rows"] if not row["reused"] and _hours(row, "attached")]
    spent = run["device_hours"]["total"]["value"]
    if not spent or not all(causes_are_known(row) for row in own):
        return None
    parts = (run["phases_device_ns"]["overhead"], run["phases_device_ns"]["compare"])
    wasted = sum(_hours(row, "wasted") for row in own)
    wasted += sum(phases.get(phase, 0) for phases in parts for phase in WASTED) / HOUR_NS
    rate = _rate(result)
    return Cause(
        "all of it",
        "wasted",
        wasted / spent,
        wasted,
        None if rate is None else rate * wasted,
        None,
        " of the run",
    )


def closing_lines(result: Result) -> list[str]:
    """Return the waste of what this invocation spent, for below the closing table."""
    whole = total(result)
    if whole is None or not result["rows"]:
        return []
    found = [
        (name, cause)
        for name, cause in _all_causes(result)
        if cause.advice or (cause.kind == "wasted" and cause.share >= _TERMINAL_SHARE)
    ]
    spent = result["run"]["device_hours"]["total"]["value"]
    lost, taken = (duration(3600 * hours) for hours in (whole.device_hours or 0.0, spent or 0.0))
    first = f"wasted {percent(whole.share)} of this run ({lost} of {taken})"
    shown = sorted(found, key=lambda each: -(each[1].device_hours or 0.0))[:_TERMINAL_CAUSES]
    wasted = [each for each in shown if each[1].kind == "wasted"]
    others = [each for each in shown if each[1].kind != "wasted"]
    return [
        first + (":" if wasted else ""),
        *(f"  {name}: {_in_words(cause)}" for name, cause in wasted),
        *(["also large, and no waste:"] if others else []),
        *(f"  {name}: {_in_words(cause)}" for name, cause in others),
    ]


def _hours(row: Row, part: str) -> float:
    return row["ledger"]["device_hours"][part]["value"] or 0.0


def _all_causes(result: Result) -> Iterable[tuple[str, Cause]]:
    for name, row in zip(labels(result["rows"]), result["rows"], strict=True):
        yield from ((one_line(name, 32), cause) for cause in causes(row))
    yield from outside(result)


def _in_words(cause: Cause) -> str:
    taken = "" if cause.device_hours is None else f" ({duration(3600 * cause.device_hours)})"
    kind = f"{NO_BREAK}{cause.kind}" if cause.kind.startswith("of ") else ""
    return f"{cause.name} {percent(cause.share)}{cause.of}{kind}{taken}" + (
        f": {cause.advice}" if cause.advice else ""
    )


# -- report.md ------------------------------------------------------------------------------------
HEAD = ("stage", "cause", "kind", "time", "share", "cost", "first thing to try")


def table_body(result: Result) -> list[list[str]]:
    """Return the table's cells: a line per cause, and one that sums up all waste of the run."""
    whole = total(result)
    if not result["rows"]:
        return []
    declared = (result["run"].get("cost") or {}).get("currency")
    currency = declared or next(
        (name for row in result["rows"] if (name := row["ledger"]["cost"]["currency"])), ""
    )
    body = [[name, *_cells(cause, currency)] for name, cause in _all_causes(result)]
    return [*body, *([["the run", *_cells(whole, currency)]] if whole is not None else [])]


def _cells(cause: Cause, currency: str) -> list[str]:
    taken = "" if cause.device_hours is None else duration(3600 * cause.device_hours)
    money = "" if cause.money is None else f"{significant(cause.money)} {currency}".strip()
    return [
        cause.name,
        cause.kind,
        taken,
        percent(cause.share) + cause.of,
        money,
        cause.advice or "",
    ]
