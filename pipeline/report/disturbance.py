"""What else used the machine while its figures were measured, by arm and for the comparison
pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.ledger.numbers import percent
from pipeline.ledger.shapes import Result
from pipeline.report.view import Footnotes, Value, arm_rows, labels

UNKNOWN = "disturbance unknown: "
_COLUMNS = (
    ("others, while it worked", "work_foreign_load"),
    ("others, while it was assessed", "assess_foreign_load"),
    ("stolen by the hypervisor", "steal_share"),
    ("CPU quota used up", "cpu_throttle_share"),
    ("device throttled", "throttle_share"),
    ("at its power limit", "power_cap_share"),
)
_ALWAYS = 2  # of these columns; the others stand where any arm has a figure
KEYS = tuple(f"compute/{key}" for _, key in _COLUMNS)


def disturbance_table(result: Result, notes: Footnotes) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return head and body: shares of each arm's windows; what could not be read has its reason
    below.
    """
    rows: list[tuple[str, Mapping[str, Any]]] = [
        (name, row["ledger"].get("conditions", {}))
        for name, row in zip(labels(arm_rows(result)), arm_rows(result), strict=True)
    ]
    compared = result["run"].get("compare_conditions")
    if compared is not None:
        rows.append(
            ("comparison pass", {**compared, "work_foreign_load": compared["foreign_load"]})
        )
    columns = [
        (head, key)
        for place, (head, key) in enumerate(_COLUMNS)
        if place < _ALWAYS or any(_known(conditions, key) for _, conditions in rows)
    ]
    body = [
        [name, *(_cell(conditions.get(key), notes) for _, key in columns)]
        for name, conditions in rows
    ]
    return ("arm", *(head for head, _ in columns)), body


def _known(conditions: Mapping[str, Any], key: str) -> bool:
    return key in conditions and conditions[key]["value"] is not None


def _cell(value: Value | None, notes: Footnotes) -> str:
    if value is None:  # a comparison pass assesses nothing; an earlier release read nothing
        return ""
    if value["value"] is None:
        return "-" + notes.mark(f"{UNKNOWN}{value['why_missing']}")
    return percent(value["value"])
