"""How much of the processors others took while something was measured on them, by the kernel's own
accounts.

Two readings of the accounts bound a stretch of time. What all processors worked in it, less what
this run's processes worked, is what others took; time that a hypervisor gave to other machines
(steal) is others', too. This process's own are its descendants, ended ones included, in whatever
session (the writer to MLflow has one of its own), and those that were once seen below it and whose
parent has ended since.

Where a container may use less than the machine has (a quota of its control group, an affinity),
what others took is what they left too little of: on 64 cores, of which 2 may be used, others that
keep 50 busy take nothing from us.
Source: proc(5), /proc/stat and /proc/pid/stat (in ticks of 10 ms); Linux, admin-guide/cgroup-v2,
cpu.max and cpu.stat.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from pipeline.ledger.attempted import attempted
from pipeline.ledger.values import Value, measured, null

SHORTEST_S = 0.5
"""Seconds; processor times of a shorter window are counted too coarsely (in ticks of 10 ms)."""
# that our own processes may have worked beyond what all processors did, by rounding
SLACK_S, SLACK = 0.2, 0.1
WORKING = ("user", "nice", "system", "irq", "softirq", "steal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounts:
    """The kernel's accounts at one moment; seconds add up over processors and since the machine's
    start.

    Attributes:
        at_s: Monotonic clock.
        busy_s: All processors that we may use, for anyone, with what a hypervisor took.
        steal_s: What it took.
        own_s: This run's processes.
        cores: Processors that we may use.
        quota: Cores' worth of time that our control group may use; None without a limit.
        periods: Of the control group's quota, so far.
        throttled: Of these, the ones in which the quota was used up.
    """

    at_s: float
    busy_s: float
    steal_s: float
    own_s: float
    cores: int
    quota: float | None = None
    periods: int = 0
    throttled: int = 0


class LoadRecord(TypedDict):
    """A load in a journal."""

    elapsed_s: float
    taken: float
    steal: float
    throttled: float | None
    why: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What others took of the processors in some time; plain numbers, that add up over windows.

    Attributes:
        elapsed_s: Its length.
        taken: Share of what we may use that others took, in [0, 1].
        steal: Share of the processors that a hypervisor took.
        throttled: Share of the periods in which our control group's quota was used up; None without
            a quota.
        why: Why nothing is known; None where it is.
    """

    elapsed_s: float = 0.0
    taken: float = 0.0
    steal: float = 0.0
    throttled: float | None = None
    why: str | None = None

    def to_json(self) -> LoadRecord:
        """Return it in plain JSON, for the journal."""
        return {
            "elapsed_s": self.elapsed_s,
            "taken": self.taken,
            "steal": self.steal,
            "throttled": self.throttled,
            "why": self.why,
        }


def load_between(before: Accounts | str, after: Accounts | str) -> Load:
    """Return what others took between two readings; a reading that failed is its reason."""
    if isinstance(before, str) or isinstance(after, str):
        return Load(why=before if isinstance(before, str) else str(after))
    elapsed_s = after.at_s - before.at_s
    if elapsed_s <= 0:
        return Load(why="no time passed")
    busy_s, own_s = after.busy_s - before.busy_s, max(0.0, after.own_s - before.own_s)
    # Impossible unless the accounts are of other processors than those that we ran on.
    if own_s > busy_s * (1 + SLACK) + SLACK_S:
        return Load(
            elapsed_s=elapsed_s,
            why="the kernel's accounts show less work than this run's own processes did",
        )
    periods = after.periods - before.periods
    return Load(
        elapsed_s=elapsed_s,
        taken=_taken(max(0.0, busy_s - own_s) / elapsed_s, after),
        steal=_share((after.steal_s - before.steal_s) / (elapsed_s * after.cores)),
        throttled=(after.throttled - before.throttled) / periods if periods > 0 else None,
    )


def _taken(others: float, accounts: Accounts) -> float:
    """Return the share of what we may use that is gone, where others keep `others` cores busy."""
    ours = accounts.cores if accounts.quota is None else min(accounts.quota, accounts.cores)
    # Others may use what our quota leaves without taking anything from us.
    return _share((others - (accounts.cores - ours)) / ours)


def _share(share: float) -> float:
    return min(1.0, max(0.0, share))


def taken(loads: Iterable[Load]) -> Value:
    """Return the share that others took over some windows together; null where one of them could
    not be read.
    """
    return _together(loads, "taken")


def stolen(loads: Iterable[Load]) -> Value:
    """Return the share of the processors that a hypervisor took over some windows together."""
    return _together(loads, "steal")


def throttled(loads: Iterable[Load]) -> Value:
    """Return the share of a quota's periods in which it was used up."""
    loads = list(loads)
    if loads and all(load.throttled is None and load.why is None for load in loads):
        return null("no quota of a control group limits this run's processors")
    return _together(loads, "throttled")


def _together(loads: Iterable[Load], name: str) -> Value:
    loads = list(loads)
    why = next((load.why for load in loads if load.why is not None), None)
    elapsed_s = sum(load.elapsed_s for load in loads)
    if why is not None:
        return null(why)
    if elapsed_s < SHORTEST_S or not loads:
        return null(f"window shorter than {SHORTEST_S:g} s" if loads else "no window was measured")
    return measured(
        sum((getattr(load, name) or 0.0) * load.elapsed_s for load in loads) / elapsed_s
    )


def read() -> Accounts | str:
    """Return the accounts now, or why they cannot be read."""
    return attempted(accounts, lambda why: f"the kernel's accounts cannot be read ({why})")


class Others:
    """Counts from the moment it is made."""

    def __init__(self) -> None:
        self._start = read()

    def load(self) -> Load:
        """Return what others took since."""
        return load_between(self._start, read())

    def share(self) -> Value:
        """Return the share of the processors that others took since, in [0, 1]."""
        return taken([self.load()])


# -- reading --------------------------------------------------------------------------------------


def accounts() -> Accounts:
    """Return the kernel's accounts now. Tests put one of their own in its place."""
    import psutil

    usable = _usable()
    every = psutil.cpu_times(percpu=True)
    # All processors where none of those numbers is listed.
    mine = [each for number, each in enumerate(every) if number in usable] or every
    quota, periods, used_up = _quota()
    return Accounts(
        at_s=time.monotonic(),
        busy_s=sum(getattr(each, name, 0.0) for each in mine for name in WORKING),
        steal_s=sum(getattr(each, "steal", 0.0) for each in mine),
        own_s=_TREE.worked_s(),
        cores=len(mine),
        quota=quota,
        periods=periods,
        throttled=used_up,
    )


def _usable() -> set[int]:
    """Return the numbers of the processors that we may run on; elsewhere than on Linux all of
    them.
    """
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


@dataclass(slots=True)
class _Tree:
    """This process and all that it started; what they have worked only ever grows.

    Attributes:
        pid: Whose tree it is: a forked child begins its own.
        known: Processes seen below us, by number and time of start, with the seconds each had
            worked.
        worked: Seconds so far.
    """

    pid: int = -1
    known: dict[tuple[int, float], float] = field(default_factory=dict)
    worked: float = 0.0

    def worked_s(self) -> float:
        """Return the seconds that this process and its descendants, ended ones too, have worked."""
        import psutil

        if self.pid != os.getpid():
            self.pid, self.known, self.worked = os.getpid(), {}, 0.0
        me = psutil.Process()
        found: dict[tuple[int, float], float] = {}
        for process in (me, *me.children(recursive=True), *self._orphans()):
            try:  # user and system, and those of its children that it has waited for
                # A pid is given again; with its time of start it is unique.
                found[process.pid, process.create_time()] = sum(process.cpu_times()[:4])
            except psutil.Error:  # it has just ended: among its parent's children now
                continue
        before = sum(self.known.values())
        # A process that ended before its parent waited for it takes its seconds out of the sum for
        # a moment: never count backwards.
        self.worked += max(0.0, sum(found.values()) - before)
        self.known = found
        return self.worked

    def _orphans(self) -> list[Any]:
        """Return processes seen below us before that still run: the parent of some may have
        ended.
        """
        import psutil

        left: list[Any] = []
        for pid, created in self.known:
            try:
                process = psutil.Process(pid)
                if process.create_time() == created:
                    left.append(process)
            except psutil.Error:
                continue
        return left


_TREE = _Tree()


def _quota(
    root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")
) -> tuple[float | None, int, int]:
    """Return the cores that our control group may use (None: all), its periods, and those that used
    them up.
    """
    v2, v1 = _groups(root, proc)
    for folder in v2:
        limit = _words(folder / "cpu.max")
        if limit and limit[0] != "max":
            return float(limit[0]) / float(limit[1]), *_periods(folder)
    for folder in v1:
        limit, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if limit and period and float(limit[0]) > 0:
            return float(limit[0]) / float(period[0]), *_periods(folder)
    return None, 0, 0


def _groups(root: Path, proc: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders of our control group and those above it, innermost first, of both
    versions.
    """
    lines = proc.read_text().splitlines() if proc.is_file() else []
    paths = {
        controllers: path.strip("/")
        for _, controllers, path in (line.split(":", 2) for line in lines)
    }
    own = next((path for names, path in paths.items() if "cpu" in names.split(",")), "")
    above = lambda top, path: (
        [top / inner for inner in (path, *map(str, Path(path).parents))] if path else [top]
    )
    return above(root, paths.get("", "")), above(root / "cpu", own)


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.is_file() else []


def _periods(folder: Path) -> tuple[int, int]:
    words = _words(folder / "cpu.stat")
    found = dict(zip(words[::2], words[1::2], strict=False))
    return int(found.get("nr_periods", 0)), int(found.get("nr_throttled", 0))
