"""What ranks other than the first do: they wait for what the first one tells them, and do their
share of the stages that are split.

They write nothing but their shards of a teacher's cache: no journal, no checkpoint, no artifact, no
line. What they would leave in a stage's folder is thrown away. A rank that fails by itself says why
and ends, which the first one finds out at its next step.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.settings.run import Run
from pipeline.data.load import load_dataset
from pipeline.errors import BudgetSpent, DeviceLost, Exit, Preempted, StageFailed, UserError
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.numbers import how_many
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import OutputRecord
from pipeline.runs.environment import commit
from pipeline.runs.preflight import choose_device
from pipeline.runs.signals import noted, on_stop_signal
from pipeline.stages.base import Stage
from pipeline.stages.context import Context, Output
from pipeline.store.artifacts import Artifact, key_of, plain
from pipeline.training.ranks import ALONE, RankLost, Ranks, join, place_in

if TYPE_CHECKING:
    from pipeline.data.documents import Dataset

ENDED_WITHIN_S = 600.0  # a rank that has nothing to wait for any more is ended by who started it


@dataclass(frozen=True, slots=True)
class Share:
    """A stage that all ranks work on.

    Attributes:
        stage: Its settings.
        checkpoints: Where the first rank keeps them; all see it.
    """

    name: str
    stage: Stage
    inputs: Mapping[str, Artifact]
    seed: int
    like: OutputRecord | None
    matched_flops: float | None
    checkpoints: Path


@contextmanager
def joined(run: Run, clock: PhaseClock) -> Generator[Ranks]:
    """Meet the other ranks, where there are any; part in the end.

    Raises:
        UserError: If they do not come, or were given other settings or other code.
    """
    place = place_in()
    if place is None:
        yield ALONE
        return
    with clock.phase("import"):
        import torch
    with clock.phase("comm_wait"):
        device = choose_device(run)
        if device.type == "cpu" and run.hardware.num_threads is None:
            # ranks of a host share its cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.on_host))
        backend = device_of(device).collectives
        ranks = join(place, backend=backend, timeout_seconds=run.parallel.timeout_seconds)
        _check_same(run, ranks)
    # Where the run fails, the others find out when this process ends: parting in order would wait
    # for a rank that is lost.
    yield ranks
    if ranks.is_first:
        ranks.told(None)
    ranks.leave()


def _check_same(run: Run, ranks: Ranks) -> None:
    """Refuse ranks that are about to do different things."""
    settings, code = key_of(run=plain(run)), commit()
    everywhere = ranks.gathered((settings, code))
    others = [rank for rank, each in enumerate(everywhere) if each != everywhere[0]]
    if not others:
        return
    what = "settings" if any(each[0] != settings for each in everywhere) else "code"
    named = ", ".join(map(str, others[:8]))
    problem = f"rank 0 and {how_many(len(others), 'rank')} ({named}) have different {what}"
    raise UserError("RANK", problem, "give every rank the same command and the same checkout")


def share_of(name: str, stage: Stage, inputs: Mapping[str, Artifact], ctx: Context) -> Share:
    """Return what the first rank tells the others of a stage."""
    like = None if ctx.like is None else ctx.like.to_json()
    return Share(name, stage, inputs, ctx.seed, like, ctx.matched_flops, ctx.checkpoints)


def follow(run: Run, ranks: Ranks, clock: PhaseClock) -> int:
    """Do what the first rank says until it says that the run has ended.

    Returns:
        The exit code: the first rank's is the run's.
    """
    signals: list[int] = []
    with on_stop_signal(signals.append):
        if (number := noted()) is not None:
            signals.append(number)
        try:
            data = load_dataset(run.data, run.task)
            device = choose_device(run)
            while True:
                task = ranks.told()
                if task is None:
                    return Exit.DONE
                with _as_the_first_one_sees_it():
                    _work(task, run, ranks, device, data, clock, signals)
        except RankLost:  # the first one has ended, or another rank has failed and said why
            _wait_for_the_end()
            return Exit.REFUSED
        # The outermost frame: whatever it was, the others must not wait for this rank. They find
        # out when its process ends.
        except BaseException as error:  # noqa: BLE001
            ranks.fail(error)
            return Exit.REFUSED


@contextmanager
def _as_the_first_one_sees_it() -> Generator[None]:
    """Pass over what ends a stage on all ranks at once: the first one decides what follows."""
    try:
        yield
    except DeviceLost:
        raise
    except (UserError, StageFailed, Preempted, BudgetSpent):
        pass


def _wait_for_the_end() -> None:
    """Give the first rank the time to say how the run ended: whoever started the ranks takes the
    exit code of the one that ends first.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(ENDED_WITHIN_S)


def _work(
    task: Share,
    run: Run,
    ranks: Ranks,
    device: Any,
    data: Dataset,
    clock: PhaseClock,
    signals: list[int],
) -> None:
    with tempfile.TemporaryDirectory() as out:
        context = Context(
            run=run,
            stage=task.name,
            seed=task.seed,
            device=device,
            data=data,
            clock=clock,
            out=Path(out),
            checkpoints=task.checkpoints,
            like=None if task.like is None else Output.from_json(task.like),
            matched_flops=task.matched_flops,
            points=lambda step, values: None,
            history=lambda step: [],
            checkpointed=lambda step: None,
            resumed=lambda step, history: None,
            should_stop=lambda: Preempted if signals else None,
            progress=lambda *_, **__: nullcontext(lambda *_: None),
            say=lambda _: None,
            ranks=ranks,
        )
        task.stage.run(task.inputs, context)
