"""What a gate tells GitHub Actions: the step's summary, its outputs, and one annotation.

Source: docs.github.com, "Workflow commands for GitHub Actions".
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.config.redaction import redact
from pipeline.errors import UserError, exit_of
from pipeline.ledger.shapes import NoVerdict, VerdictFile
from pipeline.report.text import markdown_text
from pipeline.report.verdict import end_code, shown_line, trouble

MOST_BYTES = 2**20  # of a step's summary
LEVELS = {0: "notice", 4: "warning", 6: "warning"}  # by exit code; all others are errors


def tell_github(
    verdict: VerdictFile | NoVerdict,
    report: str,
    files: Mapping[str, str],
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Write to the files that GitHub names, and print the annotation; elsewhere, nothing.

    What cannot be written is said once, and changes no exit code.

    Args:
        report: report.md.
        files: By name of an output, the path of a file.
    """
    if environ.get("GITHUB_ACTIONS") != "true":
        return
    _append(environ.get("GITHUB_STEP_SUMMARY"), summary(report), "GITHUB_STEP_SUMMARY")
    _append(environ.get("GITHUB_OUTPUT"), outputs(verdict, files), "GITHUB_OUTPUT")
    print(annotation(verdict), flush=True)


def tell_refusal(why: str, exit_code: int, environ: Mapping[str, str] = os.environ) -> None:
    """Say that a gate was refused before it had a folder to write to."""
    verdict: NoVerdict = {
        "schema": 2,
        "line": f"no verdict: {why}",
        "verdict": None,
        "exit_code": int(exit_code),
        "why": why,
        "criteria": [],
        "run_id": "",
    }
    tell_github(verdict, f"{markdown_text(verdict['line'])}\n", {"report": ""}, environ)


@contextmanager
def refusals_reported(is_gate: bool) -> Generator[None]:
    """Tell of what ends a gate here; one that has its folder tells of its end itself
    (`runs/gate_ending.py`).
    """
    try:
        yield
    except Exception as error:
        if is_gate:
            kind = "refused" if isinstance(error, UserError) else f"crashed: {type(error).__name__}"
            tell_refusal(f"{kind}: {error}", exit_of(error))
        raise


def summary(report: str) -> str:
    """Return the report, cut at a line's end where it is longer than a summary may be."""
    raw = report.encode()
    if len(raw) <= MOST_BYTES:
        return report
    kept = raw[: MOST_BYTES - 100]
    return (
        kept[: kept.rfind(b"\n") + 1].decode() + "\n*(cut here; the whole report is report.md)*\n"
    )


def outputs(verdict: VerdictFile | NoVerdict, files: Mapping[str, str]) -> str:
    """Return the step's outputs, each value between delimiters that nobody can guess, so that none
    ends early.
    """
    by_name = {each["name"]: each for each in verdict["criteria"]}
    saving = by_name["serving"]["value"]["value"] if "serving" in by_name else None
    values: dict[str, object] = {
        "verdict": verdict["verdict"] or "",
        "exit_code": end_code(verdict),
        "line": shown_line(verdict),
        "candidate_digest": (verdict.get("candidate") or {}).get("digest", ""),
        "baseline_digest": (verdict.get("baseline") or {}).get("digest", ""),
        "serving_saving": "" if saving is None else f"{saving:.6g}",
        "run_id": verdict["run_id"],
        **files,
    }
    lines: list[str] = []
    for name, value in values.items():
        mark = f"end_{secrets.token_hex(16)}"
        lines += [f"{name}<<{mark}", str(value), mark]
    return "\n".join(lines) + "\n"


def annotation(verdict: VerdictFile | NoVerdict) -> str:
    """Return the one line that GitHub shows beside the commit."""
    text = "  ".join(part for part in (trouble(verdict), shown_line(verdict)) if part)
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{LEVELS.get(end_code(verdict), 'error')} title=Release check::{text}"


def _append(path: str | None, text: str, name: str) -> None:
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(redact(text))
    except (OSError, ValueError) as error:  # a text that is no UTF-8: a path, perhaps
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        print(f"note: {name} cannot be written ({why})", file=sys.stderr)
