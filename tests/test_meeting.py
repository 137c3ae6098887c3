"""How ranks find one another, and find out that the first one is gone: each in one process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks_here import free_port

from pipeline.config.settings.run import Run
from pipeline.errors import Exit, Preempted, UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.runs import following
from pipeline.runs.following import SAME, _check_same, _check_shared, joined
from pipeline.store import locks
from pipeline.training import meeting as module
from pipeline.training import ranks as ranks_of_a_run
from pipeline.training.meeting import FirstGone, FirstMissing, Meeting, meet, ranks_named
from pipeline.training.ranks import Parted, Place, RankLost, Ranks


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Have ranks meet at a port that is free."""
    found = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    monkeypatch.delenv(module.AGENT, raising=False)
    monkeypatch.setattr(module, "LEAST_PATIENCE_S", 0.5)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    return found


def met(
    *ranks: int, size: int, within_s: float = 20.0, refusal: UserError | None = None
) -> dict[int, Any]:
    """Have some ranks meet; return what each found, or what it raised. The last has a refusal."""
    found: dict[int, Any] = {}

    def go(rank: int) -> None:
        own = refusal if rank == ranks[-1] else None
        try:
            found[rank] = meet(rank, size, within_s=within_s, patience_s=1.0, refusal=own)
        except UserError as error:
            found[rank] = error

    threads = [threading.Thread(target=go, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_ranks_that_all_come_meet(port: int) -> None:
    found = met(0, 1, 2, size=3)
    assert all(isinstance(each, Meeting) for each in found.values())
    found[0].tell("told/0", {"said": [1]})
    assert [found[rank].told("told/0") for rank in (1, 2)] == [{"said": [1]}] * 2
    found[2].put("failed", "why")
    assert [found[rank].get("failed") for rank in range(3)] == ["why"] * 3
    assert found[1].get("never told") is None
    # by its signs of life, rank 0 is there for longer than patience lasts
    late = threading.Timer(2.5, lambda: found[0].put("told/1", ""))
    late.start()
    found[1].await_first("told/1")


def test_who_did_not_come_is_named_by_all(port: int) -> None:
    found = met(0, 2, size=5, within_s=1.0)
    said = (
        f"MASTER_ADDR: 5 ranks do not meet at 127.0.0.1:{port}: ranks 1, 3, 4 did not come within"
        " 1 s (parallel.rendezvous_seconds); check that all are started, and reach that port"
    )
    assert [str(each) for each in found.values()] == [said, said]


def test_a_rank_that_cannot_take_part_is_named_with_its_host(port: int) -> None:
    refusal = UserError("hardware.device", "there is no cuda here", "give auto or cpu")
    found = met(0, 1, size=2, refusal=refusal)
    said = (
        f"hardware.device: there is no cuda here (rank 1 on {socket.gethostname()});"
        " give auto or cpu"
    )
    assert [str(each) for each in found.values()] == [said, said]


def test_a_port_in_use_is_said(port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        found = met(0, size=2, within_s=1.0)
    assert str(found[0]) == f"MASTER_PORT: {port} is in use on this host; give a free one"


@pytest.mark.parametrize("listens", [False, True])
def test_without_rank_0_others_end(
    listens: bool, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens, or another program does, which never answers."""
    monkeypatch.setattr(module, "ANSWER_S", 1.0)
    with socket.socket() as other:
        if listens:
            other.bind(("127.0.0.1", port))
            other.listen()
        found = met(1, size=2, within_s=1.0)
    assert isinstance(found[1], FirstMissing)
    assert str(found[1]).startswith(f"MASTER_ADDR: rank 0 does not answer at 127.0.0.1:{port}")


def test_a_first_rank_without_signs_of_life_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    meeting = Meeting(dist.HashStore(), patience_s=0.3)
    with pytest.raises(FirstGone, match="no sign of life"):
        meeting.await_first("told/0")


class Silent:
    """A store on a host that is gone: nothing is ever answered."""

    def wait(self, *_: Any) -> None:
        time.sleep(600)

    check = get = set = wait


def test_a_store_that_never_answers_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.1)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    meeting = Meeting(Silent(), patience_s=0.5)
    with pytest.raises(FirstGone):
        meeting.await_first("told/0")
    meeting.put("failed", "why")
    assert meeting.get("failed") is None
    meeting.await_the_end()


def test_ranks_are_named() -> None:
    assert [ranks_named(each) for each in ([3], [1, 2], range(9))] == [
        *("rank 3", "ranks 1, 2", "9 ranks (0, 1, 2, 3, 4, 5, 6, 7, ...)")
    ]


# -- how a run ends for others ---------------------------------------------------------------------


def test_others_end_as_the_first_one_does() -> None:
    store = dist.HashStore()
    first, second = (
        Ranks(Place(rank, 2), meeting=Meeting(store, patience_s=5.0)) for rank in range(2)
    )
    thread = threading.Thread(target=first.end, args=(Exit.PREEMPTED,))
    thread.start()
    with pytest.raises(Parted) as parted:
        second.told()
    thread.join()
    assert parted.value.code == 75
    assert isinstance(parted.value, RankLost)  # which ends its stage, optional or not


def test_a_rank_that_is_late_for_a_training_is_waited_for_unless_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks_of_a_run, "READY_ASKED_S", 0.2)
    store = dist.HashStore()
    first, second = (
        Ranks(Place(rank, 2), meeting=Meeting(store, 5.0, within_s=2.0)) for rank in range(2)
    )
    late = threading.Timer(0.7, second.assemble)
    late.start()
    first.assemble()
    late.join()
    with pytest.raises(RankLost, match="not all came to what they share within 2 s"):
        first.assemble()
    second.fail(MemoryError("no room"))
    with pytest.raises(RankLost, match="rank 1 failed: MemoryError: no room"):
        first.assemble()


class Told(Ranks):
    """Ranks that only note what they are told to end with."""

    said: list[int] = []  # noqa: RUF012 - one test uses it

    def end(self, code: int) -> None:
        self.said.append(code)


def test_a_run_that_ends_says_its_code_unless_a_rank_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "place_in", lambda: Place(0, 2))
    monkeypatch.setattr(following, "choose_device", lambda _: dist.torch.device("cpu"))
    monkeypatch.setattr(following, "join", lambda *_, **__: Told(Place(0, 2)))
    for name in ("_check_same", "_check_shared"):
        monkeypatch.setattr(following, name, lambda *_: None)
    run = Run()
    run.hardware.num_threads = 1
    for error in (Preempted("now"), UserError("a", "b", "c"), RankLost("gone")):
        with pytest.raises(type(error)), joined(run, PhaseClock()):
            raise error
    assert Told.said == [75, 1]


# -- ranks that are about to do different things ---------------------------------------------------


class Others(Ranks):
    """This process as rank 0, and what the others answer."""

    answers: list[Any] = []  # noqa: RUF012 - set by each test

    def gathered(self, thing: Any) -> list[Any]:
        return [thing, *(answer(thing) for answer in self.answers)]

    def told(self, thing: Any = None) -> Any:
        return thing


@pytest.fixture
def others() -> Generator[type[Others]]:
    yield Others
    Others.answers = []


@pytest.mark.parametrize("what", SAME)
def test_ranks_with_other_settings_code_or_libraries_are_named(
    what: str, others: type[Others]
) -> None:
    same = lambda own: own
    others.answers = [same, lambda own: {**own, what: "other"}, same]
    with pytest.raises(UserError) as error:
        _check_same(Run(), Others(Place(0, 4)))
    which = " (settings)" if what == "settings" else ""  # which of them
    assert str(error.value) == (
        f"RANK: rank 0 and rank 2 have different {what}{which}; give every rank the same"
        f" {SAME[what]}"
    )
    others.answers = [same, same, same]
    _check_same(Run(), Others(Place(0, 4)))


def shared(root: Path, others: type[Others], found: Any) -> None:
    run = Run()
    run.tracking.root = str(root)
    others.answers = [lambda own: (True, "b"), lambda own: (found, "c")]
    _check_shared(run, Others(Place(0, 3)))


def test_a_folder_that_a_rank_does_not_see_is_refused(tmp_path: Path, others: type[Others]) -> None:
    root = tmp_path / "mlruns"
    shared(root, others, True)
    with pytest.raises(UserError, match="rank 2 on c cannot see; give a folder") as error:
        shared(root, others, None)
    assert str(error.value).startswith("tracking.root: what rank 0 on ")
    with pytest.raises(UserError, match="a lock that rank 0 holds keeps rank 2 not off"):
        shared(root, others, False)
    assert list(tmp_path.iterdir()) == []


def test_what_another_rank_leaves_is_found_or_not(tmp_path: Path) -> None:
    found = lambda name: following._found(tmp_path / name, 0.2)
    assert found("missing") is None
    (tmp_path / "free").touch()
    assert found("free") is False
    with (tmp_path / "held").open("wb") as file:
        assert not locks.is_held(file)
        assert found("held") is True
