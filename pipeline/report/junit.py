"""junit.xml of a gate: one case per criterion, as CI systems show them.

JUnit knows passed, failure, error and skipped. A criterion that the policy asks for is a failure where it is FAIL or
INCONCLUSIVE (type says which: neither lets a release pass) and an error where it is INVALID; one that is only shown is
skipped unless it passes. Without a champion there is one skipped case, after a crash one error.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from pipeline.report.text import one_line
from pipeline.report.verdict import criterion_words

SUITE = "release_check"
_KINDS = {"FAIL": "failure", "INCONCLUSIVE": "failure", "INVALID": "error"}


def junit(verdict: Mapping[str, Any]) -> str:
    """Return the file's content."""
    cases = [_case(each, verdict) for each in verdict["criteria"]] or [_whole(verdict)]
    counts = {kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error", "skipped")}
    suite = ET.Element("testsuite", {
        "name": f"{SUITE}.{_of(verdict)}", "tests": str(len(cases)), "failures": str(counts["failure"]),
        "errors": str(counts["error"]), "skipped": str(counts["skipped"]), "time": "0",
        "timestamp": str(verdict.get("created", ""))[:19],
    })  # fmt: skip
    properties = ET.SubElement(suite, "properties")
    for name in ("line", "verdict", "exit_code", "run_id"):
        ET.SubElement(properties, "property", {"name": name, "value": one_line(verdict[name])})
    suite.extend(cases)
    ET.SubElement(suite, "system-out").text = one_line(verdict["line"])
    whole = ET.Element("testsuites")
    whole.append(suite)
    ET.indent(whole)
    return ET.tostring(whole, encoding="unicode", xml_declaration=True) + "\n"


def _of(verdict: Mapping[str, Any]) -> str:
    candidate = verdict.get("candidate") or {}
    model = (verdict.get("baseline") or {}).get("model") or candidate.get("model")
    return one_line(model or str(candidate.get("digest", "unknown"))[:12], 80)


def _case(criterion: Mapping[str, Any], verdict: Mapping[str, Any]) -> ET.Element:
    case = ET.Element("testcase", {"classname": f"{SUITE}.{_of(verdict)}", "name": one_line(criterion["name"], 120),
                                   "time": "0"})  # fmt: skip
    outcome, words = criterion["outcome"], criterion_words(criterion)
    if criterion["gating"] and outcome != "PASS":
        ET.SubElement(case, _KINDS[outcome], {"type": outcome, "message": words}).text = words
    elif outcome != "PASS":
        ET.SubElement(case, "skipped", {"message": f"not asked for by the policy: {words}"})
    ET.SubElement(case, "system-out").text = words
    return case


def _whole(verdict: Mapping[str, Any]) -> ET.Element:
    """Return the one case of a gate that compared nothing."""
    case = ET.Element("testcase", {"classname": f"{SUITE}.{_of(verdict)}", "name": "verdict", "time": "0"})
    line = one_line(verdict["line"])
    if verdict["verdict"] == "NO_BASELINE":
        ET.SubElement(case, "skipped", {"message": line})
    else:
        ET.SubElement(case, "error", {"type": "crash", "message": line}).text = line
    return case
