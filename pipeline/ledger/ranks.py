"""From what the ranks of a metered program wrote to one host timeline in which every second stands
once.

A *life* is one process's report. Lives of one rank on one device that follow each other (restarts)
share a *lane*; lives that overlap have lanes of their own. R lanes of a device share its time, each
1/R of it, and a lane fills the whole of the command's life:

    before its first life, and between two    other: nobody says what was done
    a life                                    its own phases
    after its last life                       idle_rank until the last lane ends, then other

So a device's lanes sum to R times the elapsed time, and their R-th part closes to the nanosecond:
remainders are given to the largest fractions. Nothing is estimated, but for a life that outlasts
the command: it is cut in proportion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.ledger.foreign import RANKS
from pipeline.ledger.metrics import PHASES
from pipeline.ledger.numbers import how_many
from pipeline.ledger.phases import total
from pipeline.ledger.records import LIFE, read_record
from pipeline.ledger.shapes import LifeRecord
from pipeline.ledger.values import Value, declared, measured, null

IDLE = "idle_rank"
"""In a timeline, beside the phases: the time of ranks that ended before the last one."""
NOT_COUNTED = "the program did not count them"
_PHASES = frozenset(PHASES)
_SUMMED = {"tokens": "tokens", "examples": "examples", "model_flops": "flops"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What one process said of itself.

    Attributes:
        rank: Its RANK; 0 where it has none.
        device: UUID of its GPU; None where it opened none, or does not tell.
        start_ns: On the host's monotonic clock, which all processes of the host share.
        phases_ns: Self times; they sum to end - start exactly.
        ended: Whether it closed its books itself; else it was killed.
    """

    rank: int = 0
    local_rank: int | None = None
    world_size: int = 1
    device: str | None = None
    device_name: str | None = None
    start_ns: int
    end_ns: int
    phases_ns: Mapping[str, int]
    counts: Mapping[str, float] = field(default_factory=dict)
    ended: bool = True

    @property
    def elapsed_ns(self) -> int:
        """Its length in nanoseconds: the sum of its phases."""
        return self.end_ns - self.start_ns


def read_lives(folder: Path, host: str) -> tuple[list[Life], list[str]]:
    """Return the lives that the ranks of a run left, and what a reader must know of them."""
    contents = [
        read_record(path, LIFE, so="that rank is left out")
        for path in sorted((folder / RANKS).glob("*.json"))
    ]
    here = [content for content in contents if content is not None and content["host"] == host]
    found = [(content, _life(content)) for content in here]
    lives = [life for _, life in found if life is not None]
    notes: list[str] = []
    if elsewhere := len(contents) - len(here):
        notes.append(
            how_many(
                elsewhere,
                "rank reported from another host, or torn; it is left out: meter each node",
                "ranks reported from other hosts, or torn; they are left out: meter each node",
            )
        )
    if broken := len(found) - len(lives):
        notes.append(
            how_many(
                broken,
                "rank's phases do not sum to its life; it is left out",
                "ranks' phases do not sum to their life; they are left out",
            )
        )
    if killed := sum(not life.ended for life in lives):
        notes.append(
            how_many(
                killed,
                "rank ended without a last word: up to 2 s of it are booked as other",
                "ranks ended without a last word: up to 2 s of each are booked as other",
            )
        )
    return lives, notes


def _life(raw: LifeRecord) -> Life | None:
    phases = raw["phases_ns"]
    if not phases.keys() <= _PHASES or sum(phases.values()) != raw["end_ns"] - raw["start_ns"]:
        return None
    return Life(
        rank=raw["rank"] or 0,
        local_rank=raw["local_rank"],
        world_size=raw["world_size"] or 1,
        device=raw["device"],
        device_name=raw["device_name"],
        start_ns=raw["start_ns"],
        end_ns=raw["end_ns"],
        phases_ns=phases,
        counts=raw["counts"],
        ended=raw["ended"],
    )


def merge(
    lives: Iterable[Life], start_ns: int, end_ns: int, devices: Sequence[str]
) -> dict[str, int]:
    """Return the host timeline of a command in device-nanoseconds, by phase and `idle_rank`.

    Args:
        start_ns: When the command began.
        end_ns: When it ended.
        devices: What it ran on: UUIDs of GPUs in the order the command sees them, or one name for
            the CPU host.

    Returns:
        Times that sum to (end - start) x devices exactly.
    """
    inside = [cut for life in lives if (cut := _cut(life, start_ns, end_ns)) is not None]
    last_ns = max((life.end_ns for life in inside), default=start_ns)
    placed = [_on_device(inside, index, devices) for index in range(len(devices))]
    return total(*(_device(own, start_ns, end_ns, last_ns) for own in placed))


def _on_device(lives: list[Life], index: int, devices: Sequence[str]) -> list[Life]:
    """Return the lives that drive a device. A program of one rank drives all of them."""
    if len(devices) == 1:
        return lives
    return [life for life in lives if life.world_size == 1 or _place(life, devices) == index]


def _place(life: Life, devices: Sequence[str]) -> int | None:
    """Return the device of a life: the one it opened, else the one of its local rank."""
    if life.device in devices:
        return devices.index(life.device)
    local = life.rank if life.local_rank is None else life.local_rank
    return local if life.device is None and local < len(devices) else None


def _device(lives: list[Life], start_ns: int, end_ns: int, last_ns: int) -> dict[str, int]:
    elapsed_ns = end_ns - start_ns
    if not lives:
        return {"other": elapsed_ns}
    return apportion(
        total(*(_fill(lane, start_ns, end_ns, last_ns) for lane in lanes(lives))), elapsed_ns
    )


def lanes(lives: Iterable[Life]) -> list[list[Life]]:
    """Return lives in lanes, in each of which they follow each other: restarts of a rank share
    one.
    """
    found: list[list[Life]] = []
    for life in sorted(lives, key=lambda life: (life.rank, life.start_ns, life.end_ns)):
        own = (
            lane for lane in found if lane[0].rank == life.rank and lane[-1].end_ns <= life.start_ns
        )
        lane = next(own, None)
        if lane is None:
            found.append([life])
        else:
            lane.append(life)
    return found


def _fill(lane: list[Life], start_ns: int, end_ns: int, last_ns: int) -> dict[str, int]:
    """Return the times of a lane with what no life covers; they sum to the command's elapsed
    time.
    """
    # From this rank's end to that of the last one; what comes after is nobody's waiting.
    idle_ns = last_ns - lane[-1].end_ns
    unsaid_ns = end_ns - start_ns - idle_ns - sum(life.elapsed_ns for life in lane)
    return total(*(dict(life.phases_ns) for life in lane), {"other": unsaid_ns, IDLE: idle_ns})


def _cut(life: Life, start_ns: int, end_ns: int) -> Life | None:
    """Return the part of a life inside the command's; None where there is none. Its phases keep
    their shares.
    """
    if life.start_ns >= end_ns:  # it may be of no length, and would still be the last one to end
        return None
    first, last = max(life.start_ns, start_ns), min(life.end_ns, end_ns)
    if (first, last) == (life.start_ns, life.end_ns):
        return life
    if first >= last:
        return None
    phases_ns = apportion(life.phases_ns, last - first)
    return dataclasses.replace(life, start_ns=first, end_ns=last, phases_ns=phases_ns)


def apportion(parts: Mapping[str, int], whole: int) -> dict[str, int]:
    """Return `parts` (nanoseconds) scaled to sum to `whole` exactly; what rounding leaves goes to
    the largest fractions.
    """
    have = sum(parts.values())
    if have == 0:
        return {"other": whole} if whole else {}
    shares = {name: divmod(part * whole, have) for name, part in parts.items()}
    left = whole - sum(quotient for quotient, _ in shares.values())
    # Largest remainder method; names decide ties, so that the result is always the same.
    first = set(sorted(shares, key=lambda name: (-shares[name][1], name))[:left])
    scaled = {name: quotient + (name in first) for name, (quotient, _) in shares.items()}
    return {name: ns for name, ns in scaled.items() if ns}


def counts(lives: Iterable[Life]) -> dict[str, Value]:
    """Return what the program counted: tokens, examples and FLOPs as sums over ranks, the most
    steps of any rank; null where it counted nothing.
    """
    lives = list(lives)
    found = {name: _sum(lives, key) for name, key in _SUMMED.items()}
    if found["model_flops"].value is not None:
        found["model_flops"] = declared(found["model_flops"].value)  # the program's own statement
    # Over restarts a rank's steps add up; ranks take the same steps, so the most counts.
    steps: dict[int, float] = {}
    for life in lives:
        if "steps" in life.counts:
            steps[life.rank] = steps.get(life.rank, 0) + life.counts["steps"]
    found["steps"] = measured(max(steps.values())) if steps else null(NOT_COUNTED)
    return found


def _sum(lives: list[Life], key: str) -> Value:
    values = [life.counts[key] for life in lives if key in life.counts]
    return measured(sum(values)) if values else null(NOT_COUNTED)


def opened(lives: Iterable[Life]) -> dict[str, str | None]:
    """Return the GPUs that ranks opened, by UUID, with their names."""
    return {life.device: life.device_name for life in lives if life.device is not None}


def restarts(lives: Iterable[Life]) -> int:
    """Return how often ranks were started again: what they counted before may have been
    replayed.
    """
    return max((len(lane) - 1 for lane in lanes(lives)), default=0)
