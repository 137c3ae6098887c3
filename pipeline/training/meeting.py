"""How ranks find one another, and know that the first one is still there.

Beside its groups, torch keeps a store of names and values that all ranks see. What is asked of it
here is never waited for without end: torch itself waits for a host that is gone until the kernel
gives its connection up, which may be never.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from pipeline.errors import UserError, one_line
from pipeline.ledger.numbers import how_many

Thing = TypeVar("Thing")
BEAT_S = 5.0  # between two signs of life of rank 0
LEAST_PATIENCE_S = 3 * BEAT_S
ANSWER_S = 10.0  # what an answer may take that needs nobody else
ALIVE, MET = "alive", "met"
ENDED = "ended"  # what nobody leaves: who waits for it waits for rank 0 to end
AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun keeps the store itself
NAMED = 8  # ranks, at most, that a line names


class FirstMissing(UserError):
    """Rank 0, which speaks for all, is not there."""


class FirstGone(RuntimeError):
    """Rank 0 gives no sign of life any more."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What ranks leave for one another to read.

    Attributes:
        store: Of torch.
        patience_s: Without a sign of life of rank 0, after which it counts as gone.
        within_s: That ranks have to come, at the start and to each training.
    """

    store: Any
    patience_s: float
    within_s: float = 600.0

    def put(self, name: str, text: str) -> None:
        """Leave a text, where the store can be reached."""
        with suppress(RuntimeError, TimeoutError):
            _within(ANSWER_S, lambda: self.store.set(name, text))

    def tell(self, name: str, thing: Any) -> None:
        """Leave a thing for others.

        Raises:
            RuntimeError: If the store cannot be reached.
        """
        content = pickle.dumps(thing)
        try:
            _within(ANSWER_S, lambda: self.store.set(name, content))
        except TimeoutError as error:
            raise RuntimeError(str(error)) from error

    def told(self, name: str) -> Any:
        """Return the thing that rank 0 leaves; wait for it as `await_first` does.

        Raises:
            FirstGone: If rank 0 is not there any more.
        """
        self.await_first(name)
        try:
            return self.taken(name)
        except RuntimeError as error:
            raise FirstGone(one_line(error, 120)) from error

    def taken(self, name: str) -> Any:
        """Return a thing that is there.

        Raises:
            RuntimeError: If the store cannot be reached.
        """
        try:
            return pickle.loads(_within(ANSWER_S, lambda: self.store.get(name)))
        except TimeoutError as error:
            raise RuntimeError(str(error)) from error

    def found(self, name: str) -> Any | None:
        """Return a thing that was left by `tell`; None where none was, or the store cannot be
        reached.
        """
        with suppress(RuntimeError, TimeoutError):
            if _within(ANSWER_S, lambda: self.store.check([name])):
                return self.taken(name)
        return None

    def get(self, name: str) -> str | None:
        """Return a text that was left; None where none was, or the store cannot be reached."""
        with suppress(RuntimeError, TimeoutError):
            if _within(ANSWER_S, lambda: self.store.check([name])):
                return _within(ANSWER_S, lambda: self.store.get(name)).decode()
        return None

    def all_left(self, names: Iterable[str], seconds: float) -> bool:
        """Return whether all of some texts are there within some seconds."""
        with suppress(RuntimeError, TimeoutError):
            limit = timedelta(seconds=seconds)
            _within(seconds + ANSWER_S, lambda: self.store.wait(list(names), limit))
            return True
        return False

    def await_first(self, name: str, *, patience_s: float | None = None) -> None:
        """Wait until rank 0 leaves a text, for as long as it is there.

        Args:
            patience_s: Without a sign of life of it; None: the usual.

        Raises:
            FirstGone: If it is not, any more.
        """
        patience_s = self.patience_s if patience_s is None else patience_s
        seen, since = self.get(ALIVE), time.monotonic()
        while not self._left(name, BEAT_S):
            now = self.get(ALIVE)
            if now is not None and now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > patience_s:
                raise FirstGone(f"rank 0 gave no sign of life for {patience_s:.0f} s")

    def await_the_end(self, *, patience_s: float | None = None) -> None:
        """Wait until rank 0 has ended: whoever started the ranks takes the exit code of the one
        that ends first.

        Args:
            patience_s: Without a sign of life of it; None: the usual.
        """
        with suppress(FirstGone):
            self.await_first(ENDED, patience_s=patience_s)

    def _left(self, name: str, seconds: float) -> bool:
        """Return whether a text is there, or comes within some seconds.

        Raises:
            FirstGone: If the process that keeps the store has ended.
        """
        import torch.distributed as dist

        try:
            _within(seconds + ANSWER_S, lambda: self.store.wait([name], timedelta(seconds=seconds)))
        except TimeoutError:
            return False
        except dist.DistStoreError:  # it came not
            return False
        except RuntimeError as error:
            raise FirstGone(one_line(error, 120)) from error
        return True

    def live(self, name: str = ALIVE) -> None:
        """Give signs of life, as rank 0 under the usual name, for as long as this process lasts."""
        own = self.store.clone()  # who waits by the other one holds it

        def beat() -> None:
            with suppress(RuntimeError):
                for number in range(2**62):
                    own.set(name, str(number))
                    time.sleep(BEAT_S)

        threading.Thread(target=beat, daemon=True, name="alive").start()


def meet(
    rank: int, size: int, *, within_s: float, patience_s: float, refusal: UserError | None
) -> Meeting:
    """Wait until all ranks are there.

    Args:
        within_s: Seconds that they have for it.
        refusal: Why this one cannot take part: all are told.

    Raises:
        UserError: If some did not come, with their numbers, or one of them cannot take part.
        FirstMissing: If rank 0 did not.
    """
    patience_s = max(patience_s, LEAST_PATIENCE_S)
    meeting = Meeting(_open_store(rank, size, within_s), patience_s, within_s)
    why = None if refusal is None else [refusal.key, refusal.problem, refusal.remedy]
    meeting.put(_here(rank), json.dumps([socket.gethostname(), why]))
    if rank == 0:
        error = refusal or _missing(meeting, size, within_s) or _refused(meeting, size)
        said = None if error is None else [error.key, error.problem, error.remedy]
        meeting.put(MET, json.dumps(said))
        if error is not None:
            raise error
        meeting.live()
        return meeting
    _await_met(meeting, within_s)
    return meeting


def where() -> str:
    """Return where ranks meet, as the environment says."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _here(rank: int) -> str:
    return f"here/{rank}"


def _open_store(rank: int, size: int, within_s: float) -> Any:
    """Return torch's store, which rank 0 keeps where no launcher does."""
    import torch.distributed

    dist: Any = torch.distributed  # it does not say that it has these two

    by_agent = os.environ.get(AGENT) == "True"
    keeps = rank == 0 and not by_agent
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=within_s)
    try:
        # who connects to another program's port would wait for its answer
        store = _within(
            within_s + ANSWER_S,
            lambda: dist.TCPStore(
                host, port, size, keeps, limit, wait_for_workers=False, multi_tenant=True
            ),
        )
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise _unopened(keeps, port, within_s, error) from error
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"pipeline/{again}", store)


def _unopened(keeps: bool, port: int, within_s: float, error: Exception) -> UserError:
    """Return what to say where there is no store."""
    if keeps and "EADDRINUSE" in str(error):
        return UserError("MASTER_PORT", f"{port} is in use on this host", "give a free one")
    if keeps:
        problem = f"ranks cannot meet at {where()} ({one_line(error, 120)})"
        return UserError("MASTER_ADDR", problem, "name the host of rank 0, and a free port")
    problem = (
        f"rank 0 does not answer at {where()}, asked from {socket.gethostname()} for"
        f" {within_s:.0f} s (parallel.rendezvous_seconds)"
    )
    remedy = "check that rank 0 is started, and that its port can be reached from here"
    return FirstMissing("MASTER_ADDR", problem, remedy)


def _missing(meeting: Meeting, size: int, within_s: float) -> UserError | None:
    """Return what to say of ranks that did not come; None where all did."""
    names = [_here(rank) for rank in range(size)]
    if meeting.all_left(names, within_s):
        return None
    gone = [rank for rank, name in enumerate(names) if meeting.get(name) is None]
    if not gone:
        return None
    problem = (
        f"{size} ranks do not meet at {where()}: {ranks_named(gone)} did not come within"
        f" {within_s:.0f} s (parallel.rendezvous_seconds)"
    )
    return UserError("MASTER_ADDR", problem, "check that all are started, and reach that port")


def _refused(meeting: Meeting, size: int) -> UserError | None:
    """Return why a rank cannot take part; None where all can."""
    for rank in range(size):
        host, why = json.loads(meeting.get(_here(rank)) or "[null, null]")
        if why is not None:
            return UserError(why[0], f"{why[1]} (rank {rank} on {host})", why[2])
    return None


def _await_met(meeting: Meeting, within_s: float) -> None:
    """Wait until rank 0 has seen all ranks, or says why not."""
    until = time.monotonic() + within_s + ANSWER_S
    said = None
    with suppress(FirstGone):
        while said is None and time.monotonic() < until:
            if meeting._left(MET, BEAT_S):  # pyright: ignore[reportPrivateUsage]
                said = meeting.get(MET)
    if said is None:
        problem = f"rank 0 left {where()} before all ranks were there"
        raise UserError("MASTER_ADDR", problem, "see what it said")
    why = json.loads(said)
    if why is not None:
        meeting.await_the_end(patience_s=LEAST_PATIENCE_S)
        raise UserError(*why)


def ranks_named(ranks: Sequence[int]) -> str:
    """Return ranks as a line names them: some, and how many there are."""
    named = ", ".join(map(str, ranks[:NAMED]))
    if len(ranks) <= NAMED:
        return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
    return f"{how_many(len(ranks), 'rank')} ({named}, ...)"


def _within(seconds: float, ask: Callable[[], Thing]) -> Thing:
    """Return what a question to the store is answered.

    Raises:
        TimeoutError: If it was not by then; what was asked goes on being waited for.
    """
    answers: list[tuple[Any, BaseException | None]] = []

    def call() -> None:
        try:
            answers.append((ask(), None))
        except (RuntimeError, ValueError) as error:
            answers.append((None, error))

    thread = threading.Thread(target=call, daemon=True, name="asking")
    thread.start()
    thread.join(seconds)
    if not answers:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    [(answer, error)] = answers
    if error is not None:
        raise error
    return answer
