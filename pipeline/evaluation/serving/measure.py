"""What artifacts cost to run at the declared load, read in turns so that a machine's drift cancels.

A unit is a generated token (causal_lm) or an example (classification). One reading serves one
batch: all prompts (prefill, which gives the first new token), then the further new tokens one at a
time from the key-value cache (decode). Device-seconds per 1,000 units are those of prefill and
decode together over batch x new tokens; apart, prefill counts per 1,000 prompt tokens and decode
per 1,000 tokens decoded (new - 1 of each sequence).

Two arms are compared in blocks of arm, base, base, arm or the reverse, by a recorded seed
(`compare/blocks.py`). A drift that is linear over a block adds the same to both, and what comes
back every few readings does not always meet the same arm. Readings taken before the machine is
steady are discarded (`_warm_until_steady`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.compare import savings
from pipeline.compare.blocks import disturbances, draw_design
from pipeline.config.settings.serving import Decode, ServingConfig, ServingLoad
from pipeline.errors import UserError
from pipeline.evaluation.quality.scoring import check_vocabulary
from pipeline.evaluation.serving.server import Reading, Server, load
from pipeline.ledger import gpu_usage
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.others import Others, stolen, taken, throttled
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import (
    DecodeProbe,
    DraftRecord,
    DtypeRecord,
    Figures,
    ServedPass,
    ServingSaving,
    WarmUpRecord,
)
from pipeline.ledger.values import Value, derive, measured, null
from pipeline.models.load import positions
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch

SHORTEST_S = 0.02
"""Seconds: a reading of less repeats its batch, so that one interruption does not decide it."""
MOST_REPEATS = 64
STEADY = 0.01
"""Largest change of readings, from two rounds to the next two, at which a machine counts as steady.
"""
MOST_ROUNDS = 12
"""Rounds after which reading begins, steady or not."""
ENERGY_S = gpu_usage.SHORTEST_S + 1.0
"""Seconds of back-to-back batches that joules are read over."""

Pair = tuple[str, str]


class Served(Protocol):
    """What is measured: a `Server`, or a test's stand-in."""

    @property
    def weights_bytes(self) -> int: ...

    def once(self, prompt_ids: np.ndarray, new: int) -> Reading: ...


@dataclass(frozen=True, slots=True)
class ServePass:
    """What the comparison pass read.

    Attributes:
        serving: By arm and key, values as result.json holds them.
        seconds: By pair, seconds of one batch of arm and base: (blocks, 2) each, the two readings
            of every block.
        how: By arm, the arithmetic it was served in and the way tokens were written.
        conditions: What the machine was like meanwhile: values of `throttle_share` and
            `foreign_load`.
        joules: Of the one pair whose energy was asked for, joules per unit of arm and base as
            `seconds` has seconds.
        why_no_joules: Why they could not be read.
        dtype: In what artifacts were served that are stored in fp32, and why (`dtype.py`).
        orders: By pair, the order of each block: `ABBA` (arm first) or `BAAB`.
        places: By pair, of the four readings of each block: how many readings of any arm came
            before.
        order_seed: What orders, and readings discarded between blocks, were drawn with.
        warm_up: Rounds of readings that were discarded before, and whether the machine was steady
            then.
        decode: By arm, how the way that tokens are written was found, where that was timed.
        draft: Of the arm that was served with another as its draft, where one was asked for.
    """

    serving: dict[str, Figures]
    seconds: dict[Pair, tuple[np.ndarray, np.ndarray]]
    how: dict[str, str]
    conditions: Figures = field(default_factory=dict)
    joules: tuple[np.ndarray, np.ndarray] | None = None
    why_no_joules: str | None = None
    dtype: DtypeRecord = field(default_factory=DtypeRecord)
    orders: dict[Pair, list[str]] = field(default_factory=dict)
    places: dict[Pair, list[list[int]]] = field(default_factory=dict)
    order_seed: int | None = None
    warm_up: WarmUpRecord = field(default_factory=WarmUpRecord)
    decode: dict[str, list[DecodeProbe]] = field(default_factory=dict)
    draft: DraftRecord | None = None

    def saving(self, pair: Pair) -> ServingSaving:
        """Return what a pair's arm saves, with how its blocks were ordered, and what else than the
        two arms moved their readings.
        """
        reading = savings.serving_saving(*self.seconds[pair])
        if pair not in self.orders:
            return reading
        orders, places = self.orders[pair], self.places[pair]
        return {
            **reading,
            "orders": orders,
            "order_seed": self.order_seed,
            "warm_up": self.warm_up,
            "disturbed": disturbances(*self.seconds[pair], orders, places),
        }

    def per_unit(self, arm: str) -> Value:
        """Return the device-seconds that a unit takes."""
        per_1k = Value.from_json(self.serving[arm]["device_s_per_1k_units"])
        return derive(lambda seconds: seconds / 1000, per_1k)

    def to_json(self) -> ServedPass:
        """Return what `from_json` reads back."""
        seconds = [
            (*pair, arm.tolist(), base.tolist()) for pair, (arm, base) in self.seconds.items()
        ]
        joules = None if self.joules is None else [side.tolist() for side in self.joules]
        return {
            "serving": self.serving,
            "seconds": seconds,
            "how": self.how,
            "conditions": self.conditions,
            "joules": joules,
            "why_no_joules": self.why_no_joules,
            "dtype": self.dtype,
            "orders": [(*pair, order) for pair, order in self.orders.items()],
            "places": [(*pair, places) for pair, places in self.places.items()],
            "order_seed": self.order_seed,
            "warm_up": self.warm_up,
            "decode": self.decode,
            "draft": self.draft,
        }

    @staticmethod
    def from_json(raw: ServedPass) -> ServePass:
        """Read back what `to_json` wrote."""
        seconds = {
            (arm, base): (np.array(ours), np.array(theirs))
            for arm, base, ours, theirs in raw["seconds"]
        }
        joules = raw.get("joules")
        return ServePass(
            raw["serving"],
            seconds,
            raw["how"],
            raw.get("conditions", {}),
            None if joules is None else (np.array(joules[0]), np.array(joules[1])),
            raw.get("why_no_joules"),
            raw.get("dtype", {}),
            {(arm, base): order for arm, base, order in raw.get("orders", [])},
            {(arm, base): places for arm, base, places in raw.get("places", [])},
            raw.get("order_seed"),
            raw.get("warm_up", {}),
            raw.get("decode", {}),
            raw.get("draft"),
        )


def _nothing_to_check() -> None:
    """Let a pass continue: nobody wants it stopped."""


def serve_pass(
    artifacts: dict[str, Path],
    pairs: list[Pair],
    *,
    task: Task,
    labels: tuple[str, ...] | None,
    prompts: Sequence[np.ndarray],
    config: ServingConfig,
    device: torch.device | str,
    devices: int,
    seed: int,
    clock: PhaseClock,
    sampler: Sampler,
    dtype: torch.dtype | None = None,
    energy_of: Pair | None = None,
    check: Callable[[], None] = _nothing_to_check,
    order_seed: int = 0,
) -> ServePass:
    """Load artifacts side by side and measure them.

    Args:
        artifacts: Folders by arm; an arm in no pair is read as often as one in a pair.
        pairs: (arm, base) to be compared in blocks.
        task: What the models are for.
        labels: Class names.
        prompts: Encoded documents that prompts are cut from.
        config: Load, further batch sizes, blocks.
        device: Where to serve.
        devices: Devices that a second of serving occupies.
        seed: Of the prompts.
        clock: Books model_load and generate, and is the clock of the readings.
        sampler: Reads the devices' energy counters.
        dtype: Of artifacts that are stored in fp32; None: fp32.
        energy_of: The pair whose energy is read in blocks of the same orders.
        check: Called between blocks, outside of what is timed; what it raises ends the pass.
        order_seed: Of the blocks' orders.

    Raises:
        UserError: If an artifact cannot serve this load or these tokens.
    """
    with clock.phase("model_load"):
        servers = {
            arm: load(
                folder,
                task,
                device,
                labels=labels,
                now_ns=clock.now_ns,
                dtype=dtype,
                decode=config.decode,
            )
            for arm, folder in artifacts.items()
        }
    for server in servers.values():
        check_load(server, config.load, prompts)
    with clock.phase("generate"):
        others, start_ns = Others(), clock.now_ns()
        sampler.mark()
        read = measure_interleaved(
            servers,
            pairs,
            config=config,
            prompts=prompts,
            seed=seed,
            check=check,
            order_seed=order_seed,
        )
        sampler.mark()
        window = (start_ns, clock.now_ns())
        kind = str(device).partition(":")[0]
        conditions = machine_conditions(sampler, window, others, kind)
        ids = draw_prompts(prompts, config.load.batch, config.load.prompt, (seed, 0))
        if task.kind.is_language:
            _read_growing(servers, read.readings, ids, config.load)
        energy = _energy(servers, ids, config.load.new, sampler, clock)
        joules: tuple[np.ndarray, np.ndarray] | str | None = None
        if energy_of is not None:
            pair, order = energy_of, read.orders[energy_of]
            joules = attempted(
                lambda: _joules(servers, pair, ids, config, order, sampler, clock),
                lambda why: unmeasured("energy", why),
            )
    serving: dict[str, Figures] = {}
    how: dict[str, str] = {}
    probes: dict[str, list[DecodeProbe]] = {}
    for arm, server in servers.items():
        readings = read.readings[arm]
        found = figures(
            readings, server.weights_bytes, task=task, load=config.load, devices=devices
        )
        serving[arm] = found | {"units_per_joule": energy[arm].to_json()}
        if server.probes:
            probes[arm] = list(server.probes.values())
            took = measured(sum(each["took_s"] for each in probes[arm]))
            serving[arm]["decode_probe_s"] = took.to_json()
        how[arm] = ", ".join(word for word in (server.dtype, readings.at_load[0].how) if word)
    kept, why_not = (None, joules) if isinstance(joules, str) else (joules, None)
    return ServePass(
        serving,
        read.seconds,
        how,
        conditions,
        joules=kept,
        why_no_joules=why_not,
        orders=read.orders,
        places=read.places,
        order_seed=order_seed,
        warm_up=read.warm_up,
        decode=probes,
    )


def _energy(
    servers: Mapping[str, Server], ids: np.ndarray, new: int, sampler: Sampler, clock: PhaseClock
) -> dict[str, Value]:
    """Return every arm's units per joule at the load; a null with its reason where that fails."""
    return {
        arm: attempted(
            lambda server=server: _units_per_joule(server, ids, new, sampler, clock),
            lambda why: null(unmeasured("energy", why)),
        )
        for arm, server in servers.items()
    }


def machine_conditions(
    sampler: Sampler, window: tuple[int, int], others: Others, kind: str
) -> Figures:
    """Return what the machine was like: on a CPU what others took of its cores, on a GPU what its
    library says.

    A GPU that nothing reads (MIG, another vendor, a library that fails) has no figure: the CPU's is
    not its own.

    Args:
        kind: The device's type: `cpu`, `cuda`, ...
    """
    load = others.load()
    usage = sampler.usage(window)
    foreign = taken([load]) if kind == "cpu" else usage.foreign_load
    values = {
        "throttle_share": usage.throttle_share,
        "foreign_load": foreign,
        "host_foreign_load": taken([load]),
        "steal_share": stolen([load]),
        "cpu_throttle_share": throttled([load]),
    }
    return {name: value.to_json() for name, value in values.items()}


def _joules(
    servers: Mapping[str, Server],
    pair: Pair,
    ids: np.ndarray,
    config: ServingConfig,
    orders: Sequence[str],
    sampler: Sampler,
    clock: PhaseClock,
) -> tuple[np.ndarray, np.ndarray] | str:
    """Return joules per unit of arm and base in blocks, (blocks, 2) each, or why they cannot be
    read.
    """
    found = np.empty((2, config.blocks, 2))
    for block, order in enumerate(orders):
        for side, place in _places(order):
            units = _units_per_joule(servers[pair[side]], ids, config.load.new, sampler, clock)
            if units.value is None:
                return units.why_missing or "not read"
            found[side, block, place] = 1 / units.value
    return found[0], found[1]


def check_load(server: Server, load: ServingLoad, prompts: Sequence[np.ndarray]) -> None:
    """Refuse a load or prompts that a model cannot serve: too many tokens, or unknown ones.

    Raises:
        UserError: Naming the setting.
    """
    if not any(len(prompt) for prompt in prompts):
        raise UserError(
            "data", "no test document gives a prompt to serve", "give a test split with text"
        )
    check_vocabulary(server.model, prompts, 0)
    limit = positions(server.model.config)
    longest = load.prompt + (load.new if server.task.kind.is_language else 0)
    if limit is not None and longest > limit:
        raise UserError(
            "serving.load.prompt",
            f"{longest} tokens of prompt and answer, the model has {limit} positions",
            "give less",
        )


# -- readings -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Readings:
    """All readings of one arm.

    Attributes:
        at_load: Every batch served at the declared load.
        by_batch: Those at other batch sizes.
        growing: Those at the load with a cache that grows, where the arm is served in another way.
    """

    at_load: list[Reading] = field(default_factory=list)
    by_batch: dict[int, list[Reading]] = field(default_factory=dict)
    growing: list[Reading] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """What blocks of readings gave.

    Attributes:
        seconds: By pair, seconds of one batch of arm and base, (blocks, 2) each, in the order they
            were taken.
        readings: By arm, all its readings.
        orders: By pair, the order of each block.
        places: By pair, of the four readings of each block: how many readings of any arm came
            before.
        warm_up: `rounds` of readings that were discarded, and whether the machine was `steady`
            then.
    """

    seconds: dict[Pair, tuple[np.ndarray, np.ndarray]]
    readings: dict[str, Readings]
    orders: dict[Pair, list[str]]
    places: dict[Pair, list[list[int]]]
    warm_up: WarmUpRecord


def measure_interleaved(
    servers: Mapping[str, Served],
    pairs: Sequence[Pair],
    *,
    config: ServingConfig,
    prompts: Sequence[np.ndarray],
    seed: int,
    check: Callable[[], None] = _nothing_to_check,
    order_seed: int = 0,
) -> Interleaved:
    """Read pairs in blocks at the declared load, then all arms forth and back at the further batch
    sizes.

    The prompts of a block are the same for every arm; `check` is called between blocks and sizes.

    Args:
        servers: By arm.
        pairs: (arm, base).
        config: Load, further batch sizes, blocks.
        prompts: Encoded documents that prompts are cut from.
        seed: Of the prompts.
        check: What it raises ends the pass.
        order_seed: Of the blocks' orders (each pair has its own), and of how many readings are
            discarded between them.
    """
    load = config.load
    kept = {arm: Readings() for arm in servers}
    seconds = {pair: (np.empty((config.blocks, 2)), np.empty((config.blocks, 2))) for pair in pairs}
    alone = [arm for arm in servers if not any(arm in pair for pair in pairs)]
    design = draw_design(len(pairs), config.blocks, len(alone), order_seed)
    orders = {pair: list(each) for pair, each in zip(pairs, design.orders, strict=True)}
    places = {
        pair: [list(block) for block in each]
        for pair, each in zip(pairs, design.places, strict=True)
    }
    first = draw_prompts(prompts, load.batch, load.prompt, (seed, 0))
    repeats = {arm: _warm_up(server, first, load.new) for arm, server in servers.items()}
    warm_up = _warm_until_steady(servers, first, load.new, repeats, check)
    spare = itertools.cycle(servers.items())
    for block in range(config.blocks):
        check()
        for _ in range(design.gaps[block]):
            arm, server = next(spare)
            _serve(server, first, load.new, repeats[arm])
        # Other prompts in each block, so that intervals cover them as well.
        ids = draw_prompts(prompts, load.batch, load.prompt, (seed, block))

        def read(arm: str, ids: np.ndarray = ids) -> float:
            batch = _serve(servers[arm], ids, load.new, repeats[arm])
            kept[arm].at_load.extend(batch)
            return _seconds(batch)

        for pair, sides in seconds.items():
            for side, place in _places(orders[pair][block]):
                sides[side][block, place] = read(pair[side])
        # Forth and back, as pairs are: a linear drift cancels here, too.
        for arm in (*alone, *reversed(alone)):
            read(arm)
    for size in config.batches:
        check()
        _read_size(servers, kept, size, draw_prompts(prompts, size, load.prompt, (seed, 0)), load)
    return Interleaved(seconds, kept, orders, places, warm_up)


def _places(order: str) -> list[tuple[int, int]]:
    """Return (side, place among its two readings) of each reading of a block: side 0 is the arm."""
    sides = ["AB".index(letter) for letter in order]
    return [(side, sides[:at].count(side)) for at, side in enumerate(sides)]


def _seconds(batch: Sequence[Reading]) -> float:
    return float(np.mean([reading.total_s for reading in batch]))


def _warm_until_steady(
    servers: Mapping[str, Served],
    ids: np.ndarray,
    new: int,
    repeats: Mapping[str, int],
    check: Callable[[], None],
) -> WarmUpRecord:
    """Read all arms in turns, keeping nothing, until they are steady or `MOST_ROUNDS` are over.

    Steady: the readings of the last two rounds lie within `STEADY` of the two before, as the mean
    log-ratio over arms.
    """
    logs: list[float] = []
    while len(logs) < MOST_ROUNDS:
        check()
        read = [_seconds(_serve(server, ids, new, repeats[arm])) for arm, server in servers.items()]
        # `tiny` guards a clock that did not tick.
        logs.append(float(np.mean(np.log(np.maximum(read, np.finfo(float).tiny)))))
        if len(logs) >= 4 and abs(sum(logs[-2:]) - sum(logs[-4:-2])) <= 2 * STEADY:
            return {"rounds": len(logs), "steady": True}
    return {"rounds": len(logs), "steady": False}


def _read_size(
    servers: Mapping[str, Served],
    kept: dict[str, Readings],
    size: int,
    ids: np.ndarray,
    load: ServingLoad,
) -> None:
    """Read every arm twice at another batch size; the declared one has been read."""
    if size == load.batch:
        for readings in kept.values():
            readings.by_batch[size] = readings.at_load
        return
    repeats = {arm: _warm_up(server, ids, load.new) for arm, server in servers.items()}
    # Forth and back, so that a drift meets all alike.
    for arm in (*servers, *reversed(list(servers))):
        kept[arm].by_batch.setdefault(size, []).extend(
            _serve(servers[arm], ids, load.new, repeats[arm])
        )


def _read_growing(
    servers: Mapping[str, Server], kept: dict[str, Readings], ids: np.ndarray, load: ServingLoad
) -> None:
    """Read twice, with a cache that grows, every arm that is served in another way: what that way
    brings is shown.
    """
    others = [arm for arm in servers if not kept[arm].at_load[0].how.startswith("dynamic")]
    for arm in others:
        # Not kept: it makes the decoder and warms it up.
        servers[arm].once(ids, load.new, decode=Decode.dynamic)
    for arm in (*others, *reversed(others)):
        kept[arm].growing.append(servers[arm].once(ids, load.new, decode=Decode.dynamic))


def _units_per_joule(
    server: Server, ids: np.ndarray, new: int, sampler: Sampler, clock: PhaseClock
) -> Value:
    """Return units per joule of the devices, serving batch after batch for as long as their
    counters need.
    """
    if sampler.reader.why is not None:
        return null(sampler.reader.why)
    server.once(ids, new)
    start, units = clock.now_ns(), 0
    sampler.mark()
    # Energy counters move in steps: a shorter window would read mostly rounding.
    while clock.now_ns() - start < ENERGY_S * 1e9:
        units += server.once(ids, new).units
    sampler.mark()
    usage = sampler.usage((start, clock.now_ns()))
    if usage.foreign_load.value:
        return null("other processes were on the device")
    if usage.problems:
        return null("; ".join(usage.problems))
    return derive(lambda joules: units / joules, usage.energy_j)


def _serve(server: Served, ids: np.ndarray, new: int, repeats: int) -> list[Reading]:
    return [server.once(ids, new) for _ in range(repeats)]


def _warm_up(server: Served, ids: np.ndarray, new: int) -> int:
    """Serve twice without keeping it; return how many batches make a reading of `SHORTEST_S`."""
    server.once(ids, new)
    elapsed_s = server.once(ids, new).total_s
    return (
        MOST_REPEATS
        if elapsed_s * MOST_REPEATS <= SHORTEST_S
        else math.ceil(SHORTEST_S / elapsed_s)
    )


def draw_prompts(
    prompts: Sequence[np.ndarray], batch: int, length: int, seed: int | tuple[int, ...]
) -> np.ndarray:
    """Return token ids (batch, length) cut at random places from documents laid end to end
    (repeated if too short).
    """
    whole = np.concatenate(list(prompts))
    whole = np.tile(whole, math.ceil(length / len(whole)))
    starts = np.random.default_rng(seed).integers(0, len(whole) - length + 1, batch)
    return np.stack([whole[start : start + length] for start in starts])


# -- figures --------------------------------------------------------------------------------------


def figures(
    readings: Readings, weights_bytes: int, *, task: Task, load: ServingLoad, devices: int
) -> Figures:
    """Return the serving figures of one arm as result.json holds them (the catalogue says what they
    mean).
    """
    # The first new token comes from the prefill.
    num_decoded = load.batch * (load.new - 1) if task.kind.is_language else 0
    why = (
        "one new token is prefill"
        if task.kind.is_language
        else f"a {task.kind.word} generates nothing"
    )
    prefill_s = [reading.prefill_s for reading in readings.at_load]
    decode_s = [reading.decode_s for reading in readings.at_load]
    values = {
        "device_s_per_1k_units": _per_1k_units(readings.at_load, devices),
        "prefill_device_s_per_1k_tokens": _per_1k(prefill_s, load.batch * load.prompt, devices),
        "decode_device_s_per_1k_tokens": (
            _per_1k(decode_s, num_decoded, devices) if num_decoded else null(why)
        ),
        **_percentiles("", [reading.total_s for reading in readings.at_load]),
        **_percentiles("prefill_", prefill_s),
        **(
            _percentiles("token_", [each / (load.new - 1) for each in decode_s])
            if num_decoded
            else {"token_p50_s": null(why), "token_p95_s": null(why)}
        ),
        "peak_bytes": _peak_bytes(readings.at_load, weights_bytes),
        "weights_bytes": measured(weights_bytes),
        **{
            f"batch_{size}_device_s_per_1k_units": _per_1k_units(own, devices)
            for size, own in readings.by_batch.items()
        },
    }
    if readings.growing:
        values["dynamic_cache_device_s_per_1k_units"] = _per_1k_units(readings.growing, devices)
    return {name: value.to_json() for name, value in values.items()}


def _percentiles(prefix: str, seconds: Sequence[float]) -> dict[str, Value]:
    return {f"{prefix}p{p}_s": measured(float(np.quantile(seconds, p / 100))) for p in (50, 95)}


def _per_1k_units(readings: Sequence[Reading], devices: int) -> Value:
    return _per_1k((reading.total_s for reading in readings), readings[0].units, devices)


def _per_1k(seconds: Iterable[float], count: int, devices: int) -> Value:
    """Return device-seconds per 1,000 of what every reading has `count` of."""
    return derive(lambda s: s * devices * 1000 / count, measured(float(np.mean(list(seconds)))))


def _peak_bytes(readings: Sequence[Reading], weights_bytes: int) -> Value:
    """Return the weights and what serving allocated above them: other arms are loaded at the same
    time.
    """
    working = [reading.working_bytes for reading in readings if reading.working_bytes is not None]
    if not working:
        return null("a CPU has no device memory to count")
    return derive(lambda above: weights_bytes + above, measured(max(working)))
