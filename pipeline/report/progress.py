"""Progress of long work: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

EVERY_S = 10.0  # between plain lines


@contextmanager
def progress_bar(what: str, total: int) -> Generator[Callable[[int, int], None]]:
    """Give a function that is told (steps done, tokens done) and shows them with the rate and the
    time left.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    start = last = time.monotonic()
    console = Console()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, rate="")
            yield lambda step, tokens: bar.update(
                task,
                completed=step,
                rate=f"{tokens / max(time.monotonic() - start, 1e-9):,.0f} tok/s",
            )
        return

    def line(step: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY_S:
            last = now
            left = (now - start) / step * (total - step)
            print(
                f"{what}: step {step}/{total}, {tokens / (now - start):,.0f} tok/s, {left:.0f} s"
                " left",
                flush=True,
            )

    yield line
