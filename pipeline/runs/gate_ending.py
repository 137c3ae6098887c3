"""A gate's end: the verdict recorded, the champion moved where it passed and that was asked for,
all of it written.

The order matters: a verdict is on disk before anything moves, so that a crash in between leaves the
old champion.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.compare.verdict import Outcome
from pipeline.config.redaction import redact_json
from pipeline.errors import Exit, exit_of, one_line
from pipeline.gate.opening import Gate, model_name
from pipeline.ledger.shapes import NoVerdict, ShownVerdict, Verdict, VerdictFile
from pipeline.report.github import tell_github
from pipeline.runs.running import Running
from pipeline.store.artifacts import write_json
from pipeline.store.verdicts import FILE, as_recorded, checksum, recall, record, without

if TYPE_CHECKING:
    from pipeline.gate.judge import Measured


def hold_gate(running: Running, gate: Gate, measure: Callable[[], Any]) -> None:
    """Come to a verdict, by measuring where none stands; record it, and move the champion where
    that was asked for.

    Args:
        measure: Makes the two arms, and compares them.
    """
    from pipeline.gate.judge import judge

    with running.timeline.hold(f"gate-{gate.key or running.session.run_id}", "gate"):
        # Under the lock: two runs that start together must not both take the first look.
        newest = recall(gate.places.store, gate.key) if gate.key else None
        if newest is not None and (gate.earlier is None or newest["look"] > gate.earlier["look"]):
            gate.earlier = newest  # another process was quicker
        stands = gate.recorded
        if stands is not None:
            verdict: Verdict = {
                **stands,
                "recorded": stands["run_id"],
                "run_id": running.session.run_id,
            }
            running.book.notes.append(
                f"the verdict of run {stands['run_id']} stands: look {stands['look']} of "
                f"{stands['looks']} decided, or none is left"
            )
        else:
            if gate.baseline is not None or running.session.run.bootstrap:
                measure()
            with running.session.clock.phase("log"):  # asks MLflow what self-tests recorded
                verdict = redact_json(
                    judge(_measured(running), gate)
                )  # before its checksum is taken
            # nothing was found out about the candidate
            if gate.key and verdict["verdict"] != Outcome.INVALID:
                record(gate.places.store, gate.key, verdict)
    gate.verdict = verdict
    running.session.journal.write("verdict", verdict=verdict, sha256=checksum(as_recorded(verdict)))
    note_history(running, gate)
    becomes_first = gate.baseline is None and running.session.run.bootstrap
    if becomes_first or (verdict["verdict"] == Outcome.PASS and running.session.run.promote):
        _promote(running, gate, verdict)
    elif gate.candidate.version is not None and running.session.run.tracking.mlflow:
        from pipeline.tracking.registry import resolve_version, tag_version

        side = gate.candidate
        version = resolve_version(gate.places.tracking, str(side.model), version=side.version)
        if version is not None:
            tag_version(gate.places.tracking, version, _tags(verdict))


def _measured(running: Running) -> Measured:
    from pipeline.gate.judge import Measured

    session, book = running.session, running.book
    return Measured(
        session.run,
        session.run_id,
        book.rows,
        book.served,
        session.data,
        session.device,
        session.devices,
        session.clock,
    )


def _promote(running: Running, gate: Gate, verdict: Verdict) -> None:
    """Have other machines reach the candidate, then make it the champion if the champion is still
    the baseline.
    """
    from pipeline.tracking.registry import Candidate, NotPromoted, promote

    name = model_name(gate, running.session.run)
    url = gate.candidate.url
    if (
        running.book.disagreeing
    ):  # who serves it would serve another model than the one that was judged
        why = f"vLLM reads another model from the folder of {', '.join(running.book.disagreeing)}"
        gate.promotion = {"done": False, "model": name, "version": None, "url": url, "why": why}
        print(f"not promoted: {why}", file=sys.stderr)
        return
    # Before the alias moves: who follows it must be able to fetch the artifact.
    if gate.places.url is not None and url is None:
        from pipeline.store.remote import upload

        with running.session.clock.phase("log"):
            url = upload(gate.candidate.artifact, gate.places.url)
    # The champion is replaced only if it is still the one that was compared.
    expected = None if gate.baseline is None else gate.baseline.version
    try:
        with running.session.clock.phase("log"):
            artifact = gate.candidate.artifact
            candidate = Candidate(artifact.digest, url or "", str(artifact.path))
            made = promote(gate.places.tracking, name, candidate, expected, _tags(verdict))
        gate.promotion = {
            "done": True,
            "model": name,
            "version": made.version,
            "url": url,
            "why": None,
        }
        print(f"{name} version {made.version} is champion", flush=True)
    except NotPromoted as error:
        gate.promotion = {
            "done": False,
            "model": name,
            "version": None,
            "url": url,
            "why": str(error),
        }
        print(f"not promoted: {error}", file=sys.stderr)


def note_history(running: Running, gate: Gate) -> None:
    """Set the verdict among those before it; it does not depend on them."""
    from pipeline.gate.history import history_of

    if gate.verdict is not None:
        uri = gate.places.tracking if running.session.run.tracking.mlflow else None
        with running.session.clock.phase("log"):
            named = (
                model_name(gate, running.session.run)
                if running.session.run.promote or running.session.run.bootstrap
                else None
            )
            gate.history = history_of(gate.verdict, uri, model=named)


def exit_code(gate: Gate, disagreeing: Sequence[str]) -> int:
    """Return what a gate ends with: its verdict's code, or 1 where a PASS could not be promoted as
    asked.

    Args:
        disagreeing: Arms that vLLM reads as another model: a PASS of one is a fail, whatever was
            asked for.
    """
    assert gate.verdict is not None
    lost = gate.promotion is not None and not gate.promotion["done"]
    if not lost and disagreeing and gate.verdict["exit_code"] == Exit.DONE:
        return Exit.FAIL
    return Exit.REFUSED if lost else gate.verdict["exit_code"]


def _tags(verdict: Verdict) -> dict[str, str]:
    said = {name: verdict[name] for name in ("verdict", "line", "key", "look", "run_id")}
    return {f"gate.{name}": str(value) for name, value in said.items()}


def shown_verdict(written: VerdictFile | NoVerdict | None) -> ShownVerdict | None:
    """Return the verdict as result.json holds it; None where there is none."""
    if written is None or written["verdict"] is None:
        return None
    return without(written, "readings", "sha256")


def ended(running: Running, status: str, why: str | None) -> VerdictFile | NoVerdict | None:
    """Return what verdict.json holds, whatever the end was; None where the run is no gate.

    Called while the exception that ended the run is on its way, where one did: it says more than
    `crashed`.
    """
    gate, error = running.session.gate, sys.exception()
    if gate is None:
        return None
    if status != "FINISHED" and why == "crashed" and error is not None:
        why = one_line(f"{type(error).__name__}: {error}")
    if gate.verdict is None:
        return {
            "schema": 2,
            "line": one_line(f"no verdict: the run ended {status}: {why}"),
            "verdict": None,
            "exit_code": int(exit_of(error)),
            "why": why,
            "criteria": [],
            "run_id": running.session.run_id,
        }
    ended_well = status == "FINISHED"  # it may have been killed while the champion was moved
    code = exit_code(gate, running.book.disagreeing) if ended_well else exit_of(error)
    return {
        **gate.verdict,
        "sha256": checksum(as_recorded(gate.verdict)),
        "promotion": gate.promotion,
        "history": gate.history,
        "end": {"exit_code": int(code), "why": why},
    }


def write_outputs(
    running: Running, written: VerdictFile | NoVerdict | None, report: str
) -> list[str]:
    """Write what a gate leaves beside the report (`ended` says what); return the files' names.

    Args:
        report: As Markdown, for the summary of a step of GitHub's.
    """
    if written is None:
        return []
    write_json(running.session.folder / FILE, written)
    tell_github(written, report, {"report": str(running.session.folder / "report.md")})
    return [FILE]
