"""The loop to read first: stages -> rows -> comparisons -> result.

A run is opened (`opening.py`): everything that cannot be done is refused, and what earlier attempts
left is taken over. Then, for every seed and every stage of the recipe (`runner.py`):

    key -> reuse, or work inside a metered window -> commit the artifact
        -> assess it reloaded from disk, in a window of its own (`assessor.py`) -> row

Then one comparison pass (`comparison.py`), a verdict where the run is a release check
(`gate_ending.py`), and the result (`assemble.py`), which is written whatever the end was. Every
interval is in the journal before it is anywhere else (`timeline.py`).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from pipeline.config.settings.run import Run
from pipeline.errors import BudgetSpent, Exit, Preempted, StageFailed, UserError
from pipeline.gate.checks import is_gate
from pipeline.ledger.journal import heartbeat
from pipeline.ledger.phases import PhaseClock
from pipeline.report.github import refusals_reported
from pipeline.runs.following import follow, joined
from pipeline.runs.opening import open_run
from pipeline.runs.signals import is_listened_to, noted, on_stop_signal
from pipeline.store.artifacts import disk_full, says_full
from pipeline.training.ranks import Ranks


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
    with joined(run, clock) as ranks:
        if not ranks.is_first:
            return follow(run, ranks, clock)
        return _lead(run, ranks, clock, command, started_ns, deliveries)


def _lead(
    run: Run,
    ranks: Ranks,
    clock: PhaseClock,
    command: str,
    started_ns: int,
    deliveries: list[Callable[[], str]],
) -> int:
    """Run a recipe as the first, or the only, rank."""
    # Here, not at the top of the file: imports of torch and transformers take seconds, which belong
    # to the run.
    with clock.phase("import"):
        from pipeline.runs.assemble import finish
        from pipeline.runs.comparison import compare, without_speedup
        from pipeline.runs.gate_ending import exit_code, hold_gate
        from pipeline.runs.stages import run_stages
    with refusals_reported(is_gate(run)):
        running = open_run(run, clock, command=command, started_ns=started_ns, ranks=ranks)
    settled = running.session.run
    ranks.told((settled.parallel.mode, settled.precision.name))
    timeline, gate = running.timeline, running.session.gate
    # What the result says unless something below says better.
    status, why = "FAILED", "crashed"

    def measure() -> None:
        run_stages(running)
        compare(running)

    def ask(number: int) -> None:  # the training loop, between steps
        timeline.stop_signal = number

    with on_stop_signal(ask):  # until all is written
        try:
            with heartbeat(running.session.journal):
                # while something was imported, which took it for a failure of its own
                if noted() == signal.SIGINT:
                    raise KeyboardInterrupt
                timeline.stop_signal = timeline.stop_signal or noted()
                if gate is None:
                    measure()
                else:
                    hold_gate(running, gate, measure)
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
            full = disk_full(running.session.folder)
            why = str(full)
            raise full from problem
        finally:
            # In `finally`, so that a run that fails leaves its hours and its reason as well.
            delivery = finish(running, status, why)
            if delivery is not None:
                deliveries.append(delivery)
    if timeline.stop_signal is not None and is_listened_to(timeline.stop_signal):
        # came too late for this run; the multirun around it is to end
        signal.raise_signal(timeline.stop_signal)
    disagreeing = running.book.disagreeing
    if disagreeing:
        _say(
            f"vLLM disagrees: {', '.join(disagreeing)}: it reads another model from the same folder"
            " than the one that was assessed; serving.check_vllm=never leaves the check out"
        )
    if gate is not None and gate.verdict is not None:
        return exit_code(gate, disagreeing)
    # A gate has judged this by its policy; a recipe says it by its exit code.
    useless = without_speedup(running)
    if useless and not run.allow_no_speedup:
        _say(
            f"no_speedup: {', '.join(useless)}: neither time nor memory is saved at serving.load;"
            " allow_no_speedup=true ends such a run with exit code 0"
        )
        return Exit.FAIL
    return Exit.FAIL if disagreeing else Exit.DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr)
