"""Progress shows the rate of the last seconds, never an average that falls or stands still."""

from __future__ import annotations

import io
import re
import threading
from typing import Any

import pytest
from rich.console import Console

from pipeline.report.progress import RECENT_S, Progress, _bar, _lines, progress_bar


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(progress: Progress, clock: Clock, first: int, last: int, each_s: float) -> None:
    """Take steps of 100 tokens."""
    for step in range(first, last + 1):
        clock.now += each_s
        progress.add(step, 100 * step)


def test_slow_steps_after_fast_ones_show_their_own_rate_within_the_window() -> None:
    clock = Clock()
    progress = Progress("student", 2000, clock)
    steps(progress, clock, 1, 1000, each_s=0.1)
    assert progress.rate() == "1,000 tok/s"
    steps(progress, clock, 1001, 1000 + int(RECENT_S / 2), each_s=2.0)
    assert progress.rate() == "50 tok/s"  # an average since the start would say 955
    assert progress.line() == "student: step 1005/2000, 50 tok/s, 1990 s left"


def test_a_stall_shows_how_long_ago_the_last_step_was() -> None:
    clock = Clock()
    progress = Progress("student", 2000, clock)
    steps(progress, clock, 1, 100, each_s=0.1)
    clock.now += RECENT_S - 1
    assert progress.rate() == "1,000 tok/s"
    clock.now += 2
    assert progress.rate() == "no step for 11 s"
    clock.now += 100
    assert progress.line().startswith("student: step 100/2000, no step for 111 s")
    steps(progress, clock, 101, 101, each_s=0.1)
    assert progress.rate() == "1 tok/s"  # 100 tokens in the last 111 s
    steps(progress, clock, 102, 202, each_s=0.1)
    assert progress.rate() == "1,000 tok/s"


def test_steps_that_are_slower_than_the_window_are_no_stall() -> None:
    clock = Clock()
    progress = Progress("student", 20, clock)
    steps(progress, clock, 1, 3, each_s=2 * RECENT_S)
    assert progress.rate() == "5 tok/s"
    clock.now += 2.5 * RECENT_S
    assert progress.rate() == "5 tok/s"
    clock.now += 4 * RECENT_S
    assert progress.rate() == "no step for 65 s"


def test_what_was_done_before_a_resumed_run_is_no_rate() -> None:
    clock = Clock()
    progress = Progress("student", 2000, clock)
    assert progress.line() == "student: step 0/2000"
    steps(progress, clock, 1000, 1000, each_s=1.0)
    assert progress.line() == "student: step 1000/2000"
    steps(progress, clock, 1001, 1001, each_s=1.0)
    assert progress.rate() == "100 tok/s"


def test_a_run_without_a_single_step_says_for_how_long() -> None:
    clock = Clock()
    progress = Progress("student", 2000, clock)
    clock.now += 42
    assert progress.line() == "student: step 0/2000, no step for 42 s"


def test_lines_are_printed_while_no_step_ends(capsys: pytest.CaptureFixture[str]) -> None:
    clock, printed = Clock(), threading.Event()
    progress = Progress("student", 2000, clock)
    line = progress.line

    def asked(*about: Any) -> str:
        printed.set()
        return line(*about)

    progress.line = asked  # type: ignore[method-assign]
    clock.now += 42
    with _lines(progress, every_s=0.001):
        assert printed.wait(30)
    assert "student: step 0/2000, no step for 42 s\n" in capsys.readouterr().out


def test_a_bar_shows_the_rate_of_the_last_seconds() -> None:
    clock, console = Clock(), Console(force_terminal=True, width=100, record=True)
    progress = Progress("student", 20, clock)
    with _bar(progress, "student", 20, console) as shown:
        for step in (1, 2, 3):
            clock.now += 1.0
            shown(step, 100 * step)
    assert "student" in console.export_text()
    assert progress.rate() == "100 tok/s"


def test_a_short_stage_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("student", 2) as shown:
        shown(1, 10)
    assert capsys.readouterr().out == ""


class Known:
    """What else a run knows."""

    def of_stage(self) -> list[str]:
        return ["loss 2.31", "forward", "cpu 93% busy"]

    def of_run(self, left_s: float | None) -> list[str]:
        later = [] if left_s is None else [f"{left_s + 60:.0f} s left"]
        return ["2.10 min spent", "forecast 3.0 min to 3.9 min", "21% of the budget", *later]


def test_a_line_says_where_stage_and_run_stand() -> None:
    clock = Clock()
    progress = Progress("student", 200, clock)
    assert progress.line(Known()) == (
        "student: step 0/200, loss 2.31, forward, cpu 93% busy; run: 2.10 min spent,"
        " forecast 3.0 min to 3.9 min, 21% of the budget"
    )
    steps(progress, clock, 1, 100, each_s=0.1)
    assert progress.line(Known()) == (
        "student: step 100/200, 1,000 tok/s, 10 s left, loss 2.31, forward, cpu 93% busy;"
        " run: 2.10 min spent, forecast 3.0 min to 3.9 min, 21% of the budget, 70 s left"
    )


@pytest.mark.parametrize("width", [80, 40])
def test_a_terminal_shows_it_below_the_bar_and_no_wider(width: int) -> None:
    file = io.StringIO()
    console = Console(force_terminal=True, width=width, height=20, file=file)
    clock = Clock()
    progress = Progress("student", 200, clock)
    with _bar(progress, "student", 200, console, Known()) as shown:
        shown(1, 100)
        shown(2, 200)
    # a line is what is written between two moves of the cursor
    lines = re.split(r"\n|\x1b\[[0-9]*[AK]|\r", file.getvalue())
    plain = [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", line) for line in lines]
    assert any("loss 2.31, forward" in line for line in plain)
    assert any("2.10 min spent" in line for line in plain)
    assert max(map(len, plain)) == width


def test_colours_are_left_out_where_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    console = Console(force_terminal=True, width=80, file=file)
    with _bar(Progress("student", 2), "student", 2, console, Known()) as shown:
        shown(1, 100)
    coloured = r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7])(?:;[0-9;]*)?m"
    assert "loss 2.31" in file.getvalue()
    assert not re.search(coloured, file.getvalue())
