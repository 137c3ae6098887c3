"""The loop to read first: stages -> rows -> comparisons -> result.

Per stage: key -> reuse, or run inside a meter window -> commit the artifact -> assess it reloaded
    from disk -> row. Then one comparison pass. Every interval lands in the journal before it lands
    anywhere else.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

from pipeline.config.arms import is_rung
from pipeline.config.settings import Format, Run
from pipeline.errors import BudgetSpent, Exit, Preempted, StageFailed, UserError
from pipeline.gate.checks import is_gate
from pipeline.ledger.journal import heartbeat
from pipeline.ledger.numbers import percents_apart
from pipeline.ledger.phases import PhaseClock
from pipeline.report.github import refusals_told
from pipeline.runs.attempt import Attempt
from pipeline.runs.opening import open_attempt
from pipeline.runs.signals import is_listened_to, noted, on_stop_signal
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.recover import (
    FormatRung,
    RecoveredStage,
    RecoverStage,
    found_format,
    rungs,
    sixteen_rungs,
)
from pipeline.stages.settings import BASE
from pipeline.store.artifacts import MODEL, DiskFull, disk_full, says_full


def execute(run: Run, *, command: str, started_ns: int, deliveries: list[Callable[[], str]]) -> int:
    """Run a composed recipe to its result.

    Args:
        command: The command line, for the report.
        started_ns: Monotonic time when the process began.
        deliveries: Takes what waits for MLflow, where the run is delivered: no hours of this run,
            which are written.

    Returns:
        The exit code.

    Raises:
        UserError, StageFailed, BudgetSpent, Preempted, KeyboardInterrupt: After the result was
        written.
    """
    clock = PhaseClock()
    with clock.phase("import"):
        from pipeline.runs.assemble import finish
        from pipeline.runs.comparison import compare, without_speedup
        from pipeline.runs.gate_ending import exit_code, hold_gate
    with refusals_told(is_gate(run)):
        attempt = open_attempt(run, clock, command=command, started_ns=started_ns)
    status, why = "FAILED", "crashed"

    def ask(number: int) -> None:  # the training loop, between steps
        attempt.stop_signal = number

    with on_stop_signal(ask):  # until all is written
        try:
            with heartbeat(attempt.journal):
                # while something was imported, which took it for a failure of its own
                if noted() == signal.SIGINT:
                    raise KeyboardInterrupt
                attempt.stop_signal = attempt.stop_signal or noted()
                if attempt.gate is None:
                    _all_stages(attempt)
                    compare(attempt)
                else:
                    hold_gate(
                        attempt, attempt.gate, lambda: (_all_stages(attempt), compare(attempt))
                    )
            status, why = "FINISHED", None
        except (Preempted, KeyboardInterrupt) as stop:
            status, why = "KILLED", str(stop) or "interrupted"
            raise
        except (UserError, StageFailed, BudgetSpent) as problem:
            why = str(problem)
            raise
        except OSError as problem:
            if not says_full(problem):
                raise
            full = disk_full(attempt.folder)
            why = str(full)
            raise full from problem
        finally:
            delivery = finish(attempt, status, why)
            if delivery is not None:
                deliveries.append(delivery)
    if attempt.stop_signal is not None and is_listened_to(attempt.stop_signal):
        # came too late for this run; the multirun around it is to end
        signal.raise_signal(attempt.stop_signal)
    if attempt.disagreeing:
        print(
            f"vLLM disagrees: {', '.join(attempt.disagreeing)}: it reads another model from the"
            " same folder than the one that was assessed; serving.check_vllm=never leaves the"
            " check out",
            file=sys.stderr,
        )
    if attempt.gate is not None and attempt.gate.verdict is not None:
        return exit_code(attempt.gate, attempt.disagreeing)
    useless = without_speedup(attempt)
    if useless and not run.allow_no_speedup:
        print(
            f"no_speedup: {', '.join(useless)}: neither time nor memory is saved at serving.load; "
            "allow_no_speedup=true ends such a run with exit code 0",
            file=sys.stderr,
        )
        return Exit.FAIL
    return Exit.FAIL if attempt.disagreeing else Exit.DONE


def _all_stages(attempt: Attempt) -> None:
    for seed in attempt.seeds:
        attempt.arms, attempt.items = {BASE: attempt.base(seed)} if attempt.gate is None else {}, {}
        for name, stage in attempt.run.stages.items():
            climbs = (
                isinstance(stage, QuantizeStage)
                and stage.recover
                and attempt.why_not(stage) is None
            )
            recovered = _climb(attempt, name, stage, seed) if climbs else stage
            if recovered is not None:
                _one_stage(attempt, name, recovered, seed)


def _climb(attempt: Attempt, name: str, stage: QuantizeStage, seed: int) -> RecoveredStage | None:
    """Bring a quantize stage's rungs to their rows, until one holds the tolerance; return what the
    stage comes to.

    A rung whose format turns out not to be one for this model has its row with the reason, and the
    next is tried.

    Returns:
        None where an optional stage has no rung that could be made: it is skipped.

    Raises:
        UserError, StageFailed: Why the first rung could not be made, where none could.
    """
    made, ahead, refused = list[str](), list(rungs(name, stage)), list[Exception]()
    not_here: dict[Format, str] = {}
    sixteen = _sixteen_bits(attempt, name, stage, seed, made)
    while ahead:
        arm, rung = ahead.pop(0)
        unable = attempt.why_unable(rung) if made and isinstance(rung, FormatRung) else None
        unable = not_here.get(rung.into.format) if isinstance(rung, RecoverStage) else unable
        if unable is not None:
            attempt.skip(arm, rung, seed, unable)
            continue
        failed = _one_stage(attempt, arm, rung, seed)
        if failed is not None and isinstance(rung, FormatRung):
            not_here[rung.format] = said(arm, failed)
        refused += [] if failed is None else [failed]
        if arm not in attempt.arms:  # skipped, with its reason
            continue
        made.append(arm)
        about = attempt.outputs[arm, seed].about
        if "recovery" in about:
            if _holds(attempt, arm, stage, seed):
                return RecoveredStage(model=stage.model, rungs=made, chosen=arm)
        # a search that found nothing: what came nearest is climbed from
        elif isinstance(rung, FormatRung):
            nearest = found_format(stage, about)
            ahead = [] if nearest is None else list(rungs(name, nearest))[1:]
    if not made and refused:
        if not stage.optional:
            raise refused[0]
        attempt.skip(name, stage, seed, said(name, refused[0]))
        return None
    return RecoveredStage(
        model=stage.model, rungs=made, chosen=sixteen, last_resort=sixteen is not None
    )


def _sixteen_bits(
    attempt: Attempt, name: str, stage: QuantizeStage, seed: int, made: list[str]
) -> str | None:
    """Make the first rung, 16 bits of the whole model, where the device has units; return it where
    it holds.
    """
    from pipeline.models.sixteen_bits import best_first, has_units

    best = best_first(attempt.device)[0]
    found = [(arm, rung) for arm, rung in sixteen_rungs(name, stage) if rung.format is best]
    if not found or not has_units(best, attempt.device):
        return None
    arm, rung = found[0]
    if _one_stage(attempt, arm, rung, seed) is not None:  # its row says why, and the ladder goes on
        return None
    made.append(arm)
    return arm if _holds(attempt, arm, stage, seed) else None


def _holds(attempt: Attempt, arm: str, stage: QuantizeStage, seed: int) -> bool:
    """Say what a rung loses on validation, and return whether that is allowed."""
    loss, allowed = attempt.outputs[arm, seed].about["recovery"]["loss"], stage.allowed(attempt.run)
    if loss is None:
        attempt.notes.append(f"{arm}: its loss on validation is no number")
        return False
    lost, most = percents_apart(loss, allowed)
    attempt.notes.append(f"{arm}: loses {lost} on validation where {most} is allowed")
    return loss <= allowed


def said(arm: str, error: Exception) -> str:
    """Return why a format is none for this model, without the setting and the stage that a refusal
    names.
    """
    return (
        error.problem if isinstance(error, UserError) else str(error).removeprefix(f"stage {arm}: ")
    )


def _one_stage(attempt: Attempt, name: str, stage: Any, seed: int) -> Exception | None:
    """Bring one stage to its artifact, its assessment and its row: each reused where it was done
    before.

    Returns:
        Why a format that may fail (`Attempt.may_fail`) did; its row has the reason too.
    """
    try:
        _to_its_row(attempt, name, stage, seed)
    except (UserError, StageFailed) as error:
        if isinstance(error, DiskFull) or not attempt.may_fail(name):
            raise
        attempt.notes.append(f"{name}: {said(name, error)}")
        return error
    return None


def _to_its_row(attempt: Attempt, name: str, stage: Any, seed: int) -> None:
    why_not = attempt.why_not(stage)
    if why_not is not None:
        attempt.skip(name, stage, seed, why_not)
        return
    inputs = {arm: attempt.arms[arm] for arm in stage.reads(attempt.run)}
    gone = next((arm for arm, artifact in inputs.items() if not artifact.path.is_dir()), None)
    if gone is not None:
        raise StageFailed(
            f"{inputs[gone].path}, the artifact of {gone}, is gone; the same command makes it again"
        )
    key = attempt.stage_key(name, stage, inputs, seed)
    with attempt.hold(key, name):  # another process may be at it: then find it done
        made = attempt.recall(key) or attempt.make(name, stage, inputs, seed, key)
        # a teacher cache has no quality; a rung is read as made
        if made["artifact"]["kind"] != MODEL or is_rung(name):
            attempt.keep(name, stage, made, seed)
            attempt.take(name, made, None, seed)
            return
        assessment_key = attempt.assessment_key(name, key, made, seed)
        assessed = attempt.recall_assessment(assessment_key, made)
        if assessed is None:
            assessed = attempt.assess(name, stage, made, seed, assessment_key)
        else:
            attempt.reuse(name, assessed, seed)
    attempt.take(name, made, assessed, seed)
