"""Progress of long work: a bar on a terminal with where the run stands below it, a plain line every
ten seconds elsewhere.

The rate is that of the last seconds. An average since the start would fall for minutes after a fast
phase has ended, and would show a rate where nothing moves at all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EVERY_S = 10.0
"""Seconds between plain lines."""
RECENT_S = 10.0
"""Seconds that a rate is of."""
SLOW_STEPS = 3
"""Times the recent step that a step may take before the work counts as stalled."""

Clock = Callable[[], float]
Shown = Callable[[int, int], None]
"""Takes (steps done, tokens done)."""


class About(Protocol):
    """What else is known while work goes on; each is asked anew whenever something is shown.

    It is asked by another thread, and fails in no way.
    """

    def of_stage(self) -> Sequence[str]:
        """Return what stands beside the steps: phase, loss, use of the device."""
        ...

    def of_run(self, left_s: float | None) -> Sequence[str]:
        """Return where the run stands.

        Args:
            left_s: Seconds that the steps still take; None: not known yet.
        """
        ...


class Nothing:
    """Nothing else is known."""

    def of_stage(self) -> Sequence[str]:
        """Return nothing."""
        return ()

    def of_run(self, left_s: float | None) -> Sequence[str]:
        """Return nothing."""
        return ()


NOTHING: About = Nothing()


class Progress:
    """Where work stands, in words.

    It begins with the first step that ends: what a resumed run had done before is no rate of now,
    and a first step compiles.
    """

    def __init__(self, what: str, total: int, clock: Clock = time.monotonic) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._started = clock()
        self._ends: deque[tuple[float, int, int]] = deque()  # (when, steps, tokens)

    def add(self, step: int, tokens: int) -> None:
        """Note that this many steps and tokens are done."""
        self._ends.append((self._clock(), step, tokens))
        # the window begins at the last step that ended before it, so that slow steps have a rate
        while len(self._ends) > 2 and self._ends[1][0] <= self._ends[-1][0] - RECENT_S:
            self._ends.popleft()

    def steps_per_s(self) -> float | None:
        """Return the rate of the last seconds; None before two steps have ended."""
        return self._per_s(1)

    def rate(self) -> str:
        """Return the tokens per second of the last seconds, or how long ago the last step was."""
        if (idle_s := self._stalled_s()) is not None:
            return f"no step for {idle_s:,.0f} s"
        tokens_per_s = self._per_s(2)
        return "" if tokens_per_s is None else f"{tokens_per_s:,.0f} tok/s"

    def left_s(self) -> float | None:
        """Return the seconds that the other steps take at the rate of the last ones; None before
        there is a rate, and while no step ends.
        """
        step, per_s = (self._ends[-1][1] if self._ends else 0), self.steps_per_s()
        return (self._total - step) / per_s if per_s and self._stalled_s() is None else None

    def _stalled_s(self) -> float | None:
        """Return how long ago the last step was, where that is long; else None."""
        idle_s = self._clock() - (self._ends[-1][0] if self._ends else self._started)
        steps_per_s = self.steps_per_s()
        step_s = 1 / steps_per_s if steps_per_s else 0.0
        return idle_s if idle_s > max(RECENT_S, SLOW_STEPS * step_s) else None

    def line(self, about: About = NOTHING) -> str:
        """Return all of it, for a log."""
        step, left_s = (self._ends[-1][1] if self._ends else 0), self.left_s()
        left = "" if left_s is None else f"{left_s:.0f} s left"
        parts = (f"{self._what}: step {step}/{self._total}", self.rate(), left, *about.of_stage())
        said = ", ".join(part for part in parts if part)
        run = ", ".join(about.of_run(left_s))
        return f"{said}; run: {run}" if run else said

    def _per_s(self, what: int) -> float | None:
        if len(self._ends) < 2:
            return None
        first, last = self._ends[0], self._ends[-1]
        return (last[what] - first[what]) / max(last[0] - first[0], 1e-9)


@contextmanager
def progress_bar(what: str, total: int, about: About = NOTHING) -> Generator[Shown]:
    """Give a function that takes (steps done, tokens done) and shows them with the rate and the
    time left.
    """
    from rich.console import Console

    console = Console()
    progress = Progress(what, total)
    shows = (
        _bar(progress, what, total, console, about)
        if console.is_terminal
        else _lines(progress, about=about)
    )
    with shows as shown:
        yield shown


@contextmanager
def _bar(
    progress: Progress, what: str, total: int, console: Console, about: About = NOTHING
) -> Generator[Shown]:
    from rich import progress as rich
    from rich.text import Text

    class Rate(rich.ProgressColumn):
        """Asked for at every refresh, so that a stall shows."""

        def render(self, task: rich.Task) -> Text:
            return Text(progress.rate(), no_wrap=True, overflow="ellipsis")

    class View(rich.Progress):
        """The bar, and below it what else is known, each line as wide as the terminal at most."""

        def get_renderables(self) -> Generator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for parts in (about.of_stage(), about.of_run(progress.left_s())):
                if parts:
                    line = Text(f"  {', '.join(parts)}", style="dim", no_wrap=True)
                    line.truncate(console.width, overflow="ellipsis")
                    yield line

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(bar_width=None), Rate())
    with View(
        *columns, rich.TimeRemainingColumn(), console=console, transient=True, expand=True
    ) as bar:
        task = bar.add_task(what, total=total)

        def shown(step: int, tokens: int) -> None:
            progress.add(step, tokens)
            bar.update(task, completed=step)

        yield shown


@contextmanager
def _lines(
    progress: Progress, every_s: float = EVERY_S, about: About = NOTHING
) -> Generator[Shown]:
    """Print a line now and then, whether steps end or not."""
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(every_s):
            print(progress.line(about), flush=True)

    shower = threading.Thread(target=show, name="progress", daemon=True)
    shower.start()
    try:
        yield progress.add
    finally:
        ended.set()
        shower.join()
