"""A release's verdict in words: the one line that stands first everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.metrics import DIRECTION, RELATIVE, TASK
from pipeline.report.numbers import count
from pipeline.report.text import one_line

Verdict = Mapping[str, Any]
GAP = "  "


def verdict_line(verdict: Verdict) -> str:
    """Return the verdict in one line: what serving costs, what quality lost against its margin, when it pays back.

    Costs are changes (negative is cheaper); quality is positive where the candidate is better.
    """
    parts = [verdict["verdict"]]
    by_name = {each["name"]: each for each in verdict["criteria"]}
    if "serving" in by_name:
        parts.append(_serving(by_name["serving"], verdict))
    first = next((each for each in verdict["criteria"] if each["name"].startswith("quality/")), None)
    if first is not None:
        parts.append(_quality(first))
    if "payback" in by_name:
        parts.append(_payback(by_name["payback"], verdict))
    if verdict["why"]:
        parts.append(one_line(verdict["why"], 200))
    behind = [each["name"] for each in verdict["criteria"] if each["gating"] and each["outcome"] == verdict["verdict"]]
    if behind and verdict["verdict"] != "PASS":
        parts.append(f"by {', '.join(behind)}")
    parts.append(f"policy {one_line(verdict['policy']['name'], 40)}")
    return GAP.join(parts)


def _serving(criterion: Verdict, verdict: Verdict) -> str:
    device = "GPU-s" if verdict["device"]["kind"] != "cpu" else "device-s"
    what = f"{device}/1k {verdict['unit']}s"
    saving = criterion["value"]["v"]
    if saving is None:
        return f"{what} unknown"
    return f"{-100 * saving:+.1f}% {what}{_ends(criterion['ci'], turned=True)}"


def _quality(criterion: Verdict) -> str:
    key = criterion["name"].removeprefix("quality/")
    symbol, name = ("%" if key in RELATIVE else " pt"), key.replace("_", " ")
    if not key.startswith(TASK) and DIRECTION[key] < 0:
        name = f"quality ({name})"
    if criterion["value"]["v"] is None:
        return f"{name} unknown"
    delta, margin = 100 * criterion["value"]["v"], 100 * criterion["threshold"]
    return f"{name} {delta:+.1f}{symbol}{_ends(criterion['ci'])} vs margin {margin:.1f}"


def _ends(ci: list[float] | None, *, turned: bool = False) -> str:
    if ci is None:
        return ""
    low, high = (-ci[1], -ci[0]) if turned else ci
    return f" [{100 * low:+.1f}, {100 * high:+.1f}]"


def _payback(criterion: Verdict, verdict: Verdict) -> str:
    units = criterion["value"]["v"]
    if units is None:
        never = str(criterion["value"]["why_null"]).startswith("never")
        return "never pays back" if never else "payback unknown"
    return "pays back at once" if units == 0 else f"pays back after {count(units)} {verdict['unit']}s"
