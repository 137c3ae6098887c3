"""What others took of the processors: arithmetic on accounts by hand, and the kernel's own,
read.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quiet import Quiet

from pipeline.ledger import others
from pipeline.ledger.disturbance import Disturbance, mean, of_host
from pipeline.ledger.others import Accounts, Load, load_between, stolen, taken, throttled
from pipeline.ledger.values import measured, null


@pytest.fixture(autouse=True)
def true_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short windows are short here."""
    monkeypatch.setattr(others, "SHORTEST_S", 0.5)


def at(
    seconds: float, *, busy: float, own: float, steal: float = 0.0, cores: int = 2, **more: float
) -> Accounts:
    return Accounts(at_s=seconds, busy_s=busy, own_s=own, steal_s=steal, cores=cores, **more)


def test_what_others_took_is_all_less_our_own() -> None:
    """Ten seconds of two cores: we worked 10.4 s, all together 20 s, 2 s of which a hypervisor
    took.
    """
    load = load_between(at(100, busy=50, own=7), at(110, busy=70, own=17.4, steal=2.0))
    assert (load.taken, load.steal) == (pytest.approx(0.48), pytest.approx(0.1))
    assert taken([load]).value == pytest.approx(0.48)
    assert stolen([load]).value == pytest.approx(0.1)
    assert (
        throttled([load]).why_missing == "no quota of a control group limits this run's processors"
    )


@pytest.mark.parametrize(
    ("cores", "quota", "others_cores", "share"),
    [
        (2, None, 1.0, 0.5),
        (64, 2.0, 50.0, 0.0),
        (64, 2.0, 63.0, 0.5),
        (64, 2.0, 64.0, 1.0),
        (4, 8.0, 1.0, 0.25),
        (2, 0.5, 1.75, 0.5),
    ],
)
def test_others_take_from_us_what_they_leave_too_little_of(
    cores: int, quota: float | None, others_cores: float, share: float
) -> None:
    before = at(0, busy=0, own=0, cores=cores)
    after = at(10, busy=10 * others_cores, own=0, cores=cores, quota=quota)
    assert load_between(before, after).taken == pytest.approx(share)


def test_windows_add_up_by_their_length() -> None:
    loads = [
        Load(elapsed_s=9.0, taken=0.0, steal=0.0),
        Load(elapsed_s=1.0, taken=1.0, steal=0.5, throttled=0.5),
    ]
    assert taken(loads).value == pytest.approx(0.1)
    assert throttled(loads).value == pytest.approx(0.05)


def test_what_cannot_be_known_is_null_with_its_reason() -> None:
    assert taken([Load(elapsed_s=0.2)]).why_missing == "window shorter than 0.5 s"
    assert taken([]).why_missing == "no window was measured"
    assert taken([Load(elapsed_s=9.0, taken=0.1), Load(why="gone")]).why_missing == "gone"
    assert load_between("no /proc", at(1, busy=1, own=1)).why == "no /proc"
    assert load_between(at(1, busy=1, own=1), "no /proc").why == "no /proc"
    # a sandbox whose /proc/stat stands still
    frozen = load_between(at(0, busy=0, own=0), at(10, busy=0, own=9))
    assert frozen.why == "the kernel's accounts show less work than this run's own processes did"
    rounding = load_between(at(0, busy=0, own=0), at(10, busy=9.9, own=10))
    assert (rounding.why, rounding.taken) == (None, 0.0)


@pytest.mark.parametrize("error", [OSError, RuntimeError, ZeroDivisionError, KeyError])
def test_accounts_that_cannot_be_read_are_a_reason(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail() -> Accounts:
        raise error("no")

    monkeypatch.setattr(others, "accounts", fail)
    said = others.read()
    assert isinstance(said, str)
    assert said.startswith(f"the kernel's accounts cannot be read ({error.__name__}")
    assert others.Others().share().why_missing == said


BURN = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"


def test_a_child_in_a_session_of_its_own_is_ours_and_so_is_one_that_has_ended() -> None:
    """The writer to MLflow is such a child; what it works is never taken for others'."""
    tree = others._Tree()
    before = tree.worked_s()
    child = subprocess.Popen(
        [sys.executable, "-c", BURN.format(0.3) + "\ninput()"],
        start_new_session=True,
        stdin=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 30
        while (alive := tree.worked_s() - before) < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive >= 0.3
    finally:
        child.communicate(b"\n")
    assert 0.3 <= tree.worked_s() - before < alive + 1.0  # waited for: its time is counted once


def test_an_orphan_that_was_seen_is_still_ours() -> None:
    grandchild = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {BURN.format(0.5)!r}])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", grandchild + "input()"], stdin=subprocess.PIPE)
    tree = others._Tree()
    tree.worked_s()
    time.sleep(0.3)
    seen = tree.worked_s()
    known = set(tree.known)
    parent.communicate(b"\n")  # the grandchild has another parent from now on
    later = tree.worked_s()
    assert later >= seen
    assert len(known) >= 2
    assert all(tree.worked_s() >= later for _ in range(3))


def test_a_forked_child_begins_its_own_tree() -> None:
    tree = others._Tree(pid=os.getpid() + 1, known={(1, 1.0): 1e9}, worked=1e9)
    assert tree.worked_s() < 1e6


def test_the_true_accounts_see_others_and_not_ourselves() -> None:
    """We burn a core for a while: no share of ours is taken by that."""
    import importlib

    true = importlib.reload(others)
    try:
        meter = true.Others()
        end = time.process_time() + 0.6
        while time.process_time() < end:
            pass
        load = meter.load()
        if load.why is None:  # a sandbox may have no accounts
            assert load.elapsed_s >= 0.5
            busy = true.accounts()
            assert busy.own_s >= 0.6
            assert 0 <= load.taken <= 1
            assert busy.cores <= (os.cpu_count() or 1)
    finally:
        true.accounts = Quiet()


def test_a_quota_is_read_in_both_versions_of_control_groups(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    root = tmp_path / "fs"
    (root / "jobs/7").mkdir(parents=True)
    proc.write_text("0::/jobs/7\n")
    (root / "jobs/cpu.max").write_text("150000 100000\n")
    (root / "jobs/7/cpu.max").write_text("max 100000\n")
    (root / "jobs/cpu.stat").write_text("usage_usec 5\nnr_periods 40\nnr_throttled 10\n")
    assert others._quota(root, proc) == (1.5, 40, 10)
    (root / "jobs/cpu.max").write_text("max 100000\n")
    assert others._quota(root, proc) == (None, 0, 0)
    proc.write_text("4:memory:/x\n3:cpu,cpuacct:/y\n0::/\n")
    (root / "cpu/y").mkdir(parents=True)
    (root / "cpu/y/cpu.cfs_quota_us").write_text("50000\n")
    (root / "cpu/y/cpu.cfs_period_us").write_text("100000\n")
    (root / "cpu/y/cpu.stat").write_text("nr_periods 4\nnr_throttled 1\nthrottled_time 9\n")
    assert others._quota(root, proc) == (0.5, 4, 1)
    (root / "cpu/y/cpu.cfs_quota_us").write_text("-1\n")
    assert others._quota(root, proc) == (None, 0, 0)
    assert others._quota(root / "nowhere", tmp_path / "nothing") == (None, 0, 0)


# -- of a row -------------------------------------------------------------------------------------


def test_work_and_assessment_stand_apart() -> None:
    work, assess = [Load(elapsed_s=30.0, taken=0.4, steal=0.1)], [Load(elapsed_s=10.0, taken=0.0)]
    found = of_host(work, assess)
    assert (
        found.foreign_load.value,
        found.work_foreign_load.value,
        found.assess_foreign_load.value,
    ) == (pytest.approx(0.3), 0.4, 0.0)
    assert found.host_foreign_load == found.foreign_load
    assert Disturbance.from_json(found.to_json()) == found
    older = {name: value for name, value in found.to_json().items() if name == "foreign_load"}
    assert (
        Disturbance.from_json(older).work_foreign_load.why_missing
        == "not recorded by the release that measured it"
    )


def test_the_mean_over_attempts_is_by_their_hours() -> None:
    assert mean(
        [(measured(0.2), 3.0), (measured(1.0), 1.0), (null("no work"), 0.0)]
    ).value == pytest.approx(0.4)
    assert mean([(measured(0.2), 3.0), (null("killed"), 1.0)]).why_missing == "killed"
    assert mean([]).why_missing == "no time was measured"
