"""junit.xml of a gate: one case per criterion, as CI systems show them.

JUnit knows passed, failure, error and skipped. A criterion that the policy asks for is a failure
where it is FAIL or INCONCLUSIVE (type says which: neither lets a release pass) and an error where
it is INVALID; one that is only shown is skipped unless it passes. Without a champion there is one
skipped case; after a crash, or where a champion could not be moved, an error says so. The time of
serving is that of all its readings; what is not timed by itself has 0.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from pipeline.errors import one_line
from pipeline.ledger.shapes import CriterionRecord, NoVerdict, VerdictFile
from pipeline.report.material import Material
from pipeline.report.verdict import criterion_words, end_code, shown_line, trouble

SUITE = "release_check"
_KINDS = {"FAIL": "failure", "INCONCLUSIVE": "failure", "INVALID": "error"}


def junit_report(material: Material) -> str | None:
    """Return a release check's verdict as JUnit XML; other runs judge nothing."""
    return None if material.verdict is None else junit(material.verdict)


def junit(verdict: VerdictFile | NoVerdict) -> str:
    """Return the file's content."""
    cases = [_case(each, verdict) for each in verdict["criteria"]] or [_whole(verdict)]
    problem = trouble(verdict)
    if problem is not None:
        cases.append(_error("end of the run", problem, verdict))
    counts = {
        kind: sum(case.find(kind) is not None for case in cases)
        for kind in ("failure", "error", "skipped")
    }
    suite = ET.Element(
        "testsuite",
        {
            "name": f"{SUITE}.{_of(verdict)}",
            "tests": str(len(cases)),
            "failures": str(counts["failure"]),
            "errors": str(counts["error"]),
            "skipped": str(counts["skipped"]),
            "time": _seconds(verdict),
            **({"timestamp": str(verdict["created"])[:19]} if "created" in verdict else {}),
        },
    )
    properties = ET.SubElement(suite, "properties")
    shown = {
        "line": shown_line(verdict),
        "verdict": one_line(verdict["verdict"]),
        "exit_code": str(end_code(verdict)),
        "run_id": one_line(verdict["run_id"]),
    }
    for name, value in shown.items():
        ET.SubElement(properties, "property", {"name": name, "value": value})
    suite.extend(cases)
    ET.SubElement(suite, "system-out").text = shown_line(verdict)
    whole = ET.Element("testsuites")
    whole.append(suite)
    ET.indent(whole)
    return ET.tostring(whole, encoding="unicode", xml_declaration=True) + "\n"


def _of(verdict: VerdictFile | NoVerdict) -> str:
    candidate = verdict.get("candidate") or {}
    model = (verdict.get("baseline") or {}).get("model") or candidate.get("model")
    return one_line(model or str(candidate.get("digest", "unknown"))[:12], 80)


def _case(criterion: CriterionRecord, verdict: VerdictFile | NoVerdict) -> ET.Element:
    case = _testcase(
        criterion["name"], verdict, _seconds(verdict) if criterion["name"] == "serving" else "0"
    )
    outcome, words = criterion["outcome"], criterion_words(criterion)
    if criterion["gating"] and outcome != "PASS":
        ET.SubElement(case, _KINDS[outcome], {"type": outcome, "message": words}).text = words
    elif outcome != "PASS":
        ET.SubElement(case, "skipped", {"message": f"not asked for by the policy: {words}"})
    ET.SubElement(case, "system-out").text = words
    return case


def _testcase(name: object, verdict: VerdictFile | NoVerdict, time: str = "0") -> ET.Element:
    return ET.Element(
        "testcase",
        {"classname": f"{SUITE}.{_of(verdict)}", "name": one_line(name, 120), "time": time},
    )


def _seconds(verdict: VerdictFile | NoVerdict) -> str:
    """Return the seconds of all serving readings, of both sides and looks."""
    readings = verdict.get("readings") or {}
    pairs = [pair for side in ("candidate_s", "baseline_s") for pair in readings.get(side, [])]
    return f"{sum(map(sum, pairs)):.3f}"


def _error(name: str, text: str, verdict: VerdictFile | NoVerdict) -> ET.Element:
    case = _testcase(name, verdict)
    ET.SubElement(case, "error", {"type": "crash", "message": text}).text = text
    return case


def _whole(verdict: VerdictFile | NoVerdict) -> ET.Element:
    """Return the one case of a gate that compared nothing."""
    if verdict["verdict"] is None:
        return _error("verdict", shown_line(verdict), verdict)
    case = _testcase("verdict", verdict)
    ET.SubElement(case, "skipped", {"message": shown_line(verdict)})
    return case
