"""False answers of the release gate by simulation, through the functions that it ships: what
docs/statistics.md shows.

    python benchmarks/gate_simulation.py --simulations 2000

Every scenario makes readings whose truth is known and lets the gate judge them: `quality_criterion`
on items by document, `measure_interleaved` and `serving_criterion` with both looks on a simulated
machine, `training_criterion` on hours. The truth lies on the threshold, so that each PASS is false,
except where a scenario says `power`: there the arms are equal and PASS is right. A run that was
stopped goes on where it was (`--state`), as long as the statistics are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import RESULTS, save_result
from scipy import stats

from pipeline.compare import quality
from pipeline.compare.selftest import one_trial
from pipeline.compare.verdict import Outcome, Spread, moved, quality_criterion, training_criterion
from pipeline.config.settings.policy import PolicyConfig
from pipeline.config.settings.serving import ServingConfig, ServingLoad
from pipeline.evaluation.serving.measure import measure_interleaved
from pipeline.evaluation.serving.server import Reading
from pipeline.ledger.values import measured

Rng = np.random.Generator
Items = dict[str, np.ndarray]
Simulation = Callable[[Rng, int], Outcome]

MOST_FALSE, MOST_INVALID, LEAST_POWER = 0.06, 0.02, 0.8
POLICY = PolicyConfig(name="simulated", min_items=100, min_documents=100)
RESAMPLES = 300
GROUP_SIZE = 10
MOST_CLASSES = 20
DESIGNS = 400  # seeds of blocks that passes are drawn from; each is slow to find


@dataclass(frozen=True, slots=True)
class Scenario:
    """One question put to the gate.

    Attributes:
        kind: `false` (every PASS is false), `clean` (that, and nothing disturbs), `power` (every
            PASS is right).
        simulate: Returns what the gate said of one drawn release.
    """

    name: str
    kind: str
    simulate: Simulation


# -- qualities: documents, groups of documents, classes -------------------------------------------


def judged(key: str, sides: tuple[Items, Items], margin: float, seed: int) -> Any:
    """Return the criterion on two arms' items."""
    return quality_criterion(key, *sides, POLICY, margin=margin, resamples=RESAMPLES, seed=seed)


def bits(
    rng: Rng, groups: int, worse: float, *, size: int = GROUP_SIZE, shared: float = 0.03
) -> tuple[Items, Items]:
    """Return bits of documents in groups; the arm takes `worse` more, part of it alike within a
    group (sd `shared`).
    """
    n = groups * size
    num_bytes = np.exp(6 + 0.5 * rng.standard_normal(n))
    base = num_bytes * np.maximum(rng.normal(2.3, 0.3, n), 0.5)
    change = (
        worse
        + np.repeat(shared * rng.standard_normal(groups), size)
        + 0.03 * rng.standard_normal(n)
    )
    common: Items = {"digest": np.arange(n), "bytes": num_bytes}
    if size > 1:
        common["group"] = np.repeat(np.arange(groups), size)
    return {**common, "bits": base * (1 + change)}, {**common, "bits": base}


def answers(
    rng: Rng, groups: int, loss: float, churn: float, *, size: int = GROUP_SIZE, whole: float = 1.0
) -> tuple[Items, Items]:
    """Return right-or-wrong items in groups. `whole` of the changes take a group as a whole, the
    rest one item each.
    """
    n = groups * size
    lost, won = loss + churn / 2, churn / 2
    change = np.zeros(n, dtype=int)
    for share, drawn in ((whole, np.repeat(rng.random(groups), size)), (1 - whole, rng.random(n))):
        own = np.where(drawn < share * lost, -1, np.where(drawn < share * (lost + won), 1, 0))
        change = np.where(change == 0, own, change)
    right = rng.random(n) < 0.8
    common: Items = {"digest": np.arange(n), "label": np.ones(n, dtype=int)}
    if size > 1:
        common["group"] = np.repeat(np.arange(groups), size)
    sides = (np.where(change == 0, right, change == sign) for sign in (1, -1))
    made = [
        {**common, "prediction": each.astype(int), "correct": each.astype(int)} for each in sides
    ]
    return made[0], made[1]


def classes(
    rng: Rng,
    n: int,
    *,
    num_classes: int,
    rare: float,
    lost: float,
    where: str = "recall",
    right: float = 0.8,
    size: int = 1,
) -> tuple[Items, Items]:
    """Return classified items. The arm loses `lost` of the rare class (or calls others so), else it
    errs as the base.

    Both change 1% of their answers at random besides. In groups of `size` all items have the same
    class and fate.
    """
    share = np.array([rare, *[(1 - rare) / (num_classes - 1)] * (num_classes - 1)])
    groups = n // size
    n = groups * size
    each = lambda drawn: np.repeat(drawn, size)
    label = each(rng.choice(num_classes, groups, p=share))
    wrong = (label + each(rng.integers(1, num_classes, groups))) % num_classes
    base = np.where(rng.random(n) < right, label, wrong)
    arm = np.where(rng.random(n) < 0.01, np.where(base == label, wrong, label), base)
    base = np.where(rng.random(n) < 0.01, np.where(base == label, wrong, label), base)
    if where == "recall":
        arm = np.where(
            (label == 0) & (each(rng.random(groups)) < lost),
            each(rng.integers(1, num_classes, groups)),
            arm,
        )
    else:
        arm = np.where((label != 0) & (each(rng.random(groups)) < lost * rare), 0, arm)
    common: Items = {"digest": np.arange(n), "label": label}
    if size > 1:
        common["group"] = each(np.arange(groups))
    made = [
        {**common, "prediction": said, "correct": (said == label).astype(int)}
        for said in (arm, base)
    ]
    return made[0], made[1]


def true_loss(draw: Callable[[Rng, int], tuple[Items, Items]]) -> float:
    """Return the loss of macro F1 that items would show if there were 10 million of them."""
    rng, hits, both = (
        np.random.default_rng(5),
        np.zeros((2, MOST_CLASSES)),
        np.zeros((2, MOST_CLASSES)),
    )
    for _ in range(20):
        for side, items in enumerate(draw(rng, 500_000)):
            label, prediction = items["label"], items["prediction"]
            hits[side] += np.bincount(label[label == prediction], minlength=MOST_CLASSES)
            both[side] += np.bincount(label, minlength=MOST_CLASSES) + np.bincount(
                prediction, minlength=MOST_CLASSES
            )
    f1 = [
        float(np.mean(2 * hits[side][both[side] > 0] / both[side][both[side] > 0]))
        for side in (0, 1)
    ]
    return f1[1] - f1[0]


def macro_f1(n: int, **what: Any) -> Simulation:
    """Return a simulation of macro F1 on `n` items whose true loss is the margin."""
    draw = lambda rng, count: classes(rng, count, **what)
    margin: list[float] = []

    def simulate(rng: Rng, number: int) -> Outcome:
        if not margin:
            margin.append(true_loss(draw))
        return judged("macro_f1", draw(rng, n), margin[0], number).outcome

    return simulate


def at_margin(key: str, draw: Callable[[Rng], tuple[Items, Items]], margin: float) -> Simulation:
    """Return a simulation of items whose arm is worse by the margin."""
    return lambda rng, number: judged(key, draw(rng), margin, number).outcome


def as_planned(
    key: str, draw: Callable[[Rng, int], tuple[Items, Items]], pilot: int, margin: float
) -> Simulation:
    """Return a simulation of equal arms: a pilot is drawn, and where it decides nothing, as many
    items as it names.

    Pilots that decide, or look worse than the margin (they plan to show that), are drawn again.
    """

    def simulate(rng: Rng, number: int) -> Outcome:
        while True:
            first = judged(key, draw(rng, pilot), margin, number)
            if (
                first.outcome is Outcome.INCONCLUSIVE
                and first.needed
                and (first.value.value or 0.0) > -margin
            ):
                return judged(key, draw(rng, first.needed), margin, number).outcome

    return simulate


# -- serving: a machine with a mind of its own ----------------------------------------------------

Disturbance = Callable[[Rng], Callable[[int], float]]
"""Draws how much longer the t-th reading takes, as a logarithm."""


def every(period: int, size: float = 0.05) -> Disturbance:
    """Return one slow reading in every `period`, its place at random."""

    def drawn(rng: Rng) -> Callable[[int], float]:
        phase = int(rng.integers(period))
        return lambda t: size * ((t + phase) % period == 0)

    return drawn


def wave(period: float, size: float = 0.05) -> Disturbance:
    """Return readings that go up and down."""

    def drawn(rng: Rng) -> Callable[[int], float]:
        phase = rng.uniform(0, 2 * math.pi)
        return lambda t: size * math.sin(2 * math.pi * t / period + phase)

    return drawn


def exponential(size: float, readings: float) -> Disturbance:
    """Return a machine that settles (size > 0: it gets faster)."""
    return lambda rng: lambda t: size * math.exp(-t / readings)


def linear(slope: float) -> Disturbance:
    """Return a machine that gets slower all the time."""
    return lambda rng: lambda t: slope * t


def step(size: float) -> Disturbance:
    """Return a machine that gets slower at once, some time in the pass."""

    def drawn(rng: Rng) -> Callable[[int], float]:
        at = int(rng.integers(10, 45))
        return lambda t: size * (t >= at)

    return drawn


def bursts(share: float, size: float) -> Disturbance:
    """Return single slow readings at random."""
    return lambda rng: lambda t: size * (rng.random() < share)


class Machine:
    """Two servers of equal cost on one machine: the t-th reading takes a second, with noise and a
    disturbance.
    """

    weights_bytes = 1

    def __init__(self, rng: Rng, disturbance: Disturbance, noise: float = 0.01) -> None:
        self.rng, self.noise, self.longer, self.t = rng, noise, disturbance(rng), 0

    def once(self, prompt_ids: np.ndarray, new: int) -> Reading:
        took = math.exp(self.noise * self.rng.standard_normal() + self.longer(self.t))
        self.t += 1
        return Reading(took / 2, took / 2, units=1, working_bytes=None)


PROMPTS = [np.arange(64, dtype=np.int32)]


def serving(disturbance: Disturbance, *, blocks: int = 4, looks: int = 2) -> Simulation:
    """Return a simulation of equal arms with both looks and a least saving of 0."""
    config = ServingConfig(load=ServingLoad(prompt=4, new=1, batch=1), batches=[], blocks=blocks)

    def simulate(rng: Rng, number: int) -> Outcome:
        machine = Machine(rng, disturbance)

        def look() -> tuple[Any, Any, list[str]]:
            machine.t = int(rng.integers(100)) if machine.t else 0  # another look begins anywhere
            read = measure_interleaved(
                {"arm": machine, "base": machine},
                [("arm", "base")],
                config=config,
                prompts=PROMPTS,
                seed=0,
                order_seed=int(rng.integers(DESIGNS)),
            )
            sides = read.seconds["arm", "base"]
            return *sides, moved(
                POLICY, *sides, read.orders["arm", "base"], read.places["arm", "base"]
            )

        return one_trial(look, alpha=POLICY.alpha, looks=looks).outcome

    return simulate


# -- training: single runs ------------------------------------------------------------------------


def training(times: float, *, recorded: int = 5, own: int = 1) -> Simulation:
    """Return a simulation of equal trainings, the candidate's hours `times` as far spread as those
    recorded.
    """

    def simulate(rng: Rng, number: int) -> Outcome:
        sd = 0.05
        spread = Spread(
            float(np.std(sd * rng.standard_normal(recorded), ddof=1)), recorded, "simulated"
        )
        runs = np.exp(times * sd * rng.standard_normal(own))
        base = measured(float(np.exp(sd * rng.standard_normal())))
        return training_criterion(
            measured(float(runs[0])),
            base,
            spread,
            minimum=0.0,
            alpha=POLICY.alpha,
            arm_runs=runs.tolist(),
        ).outcome

    return simulate


# -- all of them ----------------------------------------------------------------------------------


def scenarios() -> list[Scenario]:
    """Return every scenario, cheap ones first."""
    found: list[Scenario] = []
    add = lambda name, kind, simulate: found.append(Scenario(name, kind, simulate))
    for times, own in ((1.0, 1), (2.0, 1), (1.0, 3), (2.0, 3), (4.0, 3), (2.0, 5)):
        add(
            f"training: spread {times:g}x the recorded, {own} own runs",
            "false",
            training(times, own=own),
        )
    for groups in (100, 400):
        add(
            f"bits per byte: {groups} groups of 10",
            "false",
            at_margin("bits_per_byte", lambda rng, groups=groups: bits(rng, groups, 0.01), 0.01),
        )
        for whole, churn in ((1.0, 0.02), (1.0, 0.1), (0.5, 0.1), (0.0, 0.1)):
            draw = lambda rng, groups=groups, whole=whole, churn=churn: answers(
                rng, groups, 0.02, churn, whole=whole
            )
            add(
                f"accuracy: {groups} groups of 10, {churn:.0%} change, {whole:.0%} of it by groups",
                "false",
                at_margin("accuracy", draw, 0.02),
            )
    for n in (400, 1000, 4000):
        add(
            f"macro F1: 6 classes, one of 1% lost, {n} items",
            "false",
            macro_f1(n, num_classes=6, rare=0.01, lost=1.0),
        )
    for num_classes, lost, n in (
        (2, 0.15, 2000),
        (2, 0.15, 4000),
        (6, 0.15, 4000),
        (20, 1.0, 4000),
        (20, 0.3, 4000),
    ):
        add(
            f"macro F1: {num_classes} classes, {lost:.0%} of one of 1% lost, {n} items",
            "false",
            macro_f1(n, num_classes=num_classes, rare=0.01, lost=lost),
        )
    add(
        "macro F1: 6 classes, others called one of 2%, 4000 items",
        "false",
        macro_f1(4000, num_classes=6, rare=0.02, lost=0.5, where="precision"),
    )
    add(
        "macro F1: 400 groups of 10, 3 classes, 30% of one of 10% lost",
        "false",
        macro_f1(4000, num_classes=3, rare=0.1, lost=0.3, size=10),
    )
    equal = {
        "bits per byte": ("bits_per_byte", lambda rng, n: bits(rng, n, 0.0, size=1), 60, 0.01),
        "bits per byte in groups": (
            "bits_per_byte",
            lambda rng, n: bits(rng, n, 0.0, shared=0.08),
            100,
            0.01,
        ),
        "accuracy, 10% change": (
            "accuracy",
            lambda rng, n: answers(rng, n, 0.0, 0.1, size=1),
            200,
            0.02,
        ),
        "accuracy, 1% changes": (
            "accuracy",
            lambda rng, n: answers(rng, n, 0.0, 0.01, size=1),
            100,
            0.02,
        ),
        "accuracy in groups": (
            "accuracy",
            lambda rng, n: answers(rng, n, 0.0, 0.1, whole=0.5),
            100,
            0.02,
        ),
        "macro F1, 3 classes": (
            "macro_f1",
            lambda rng, n: classes(rng, n, num_classes=3, rare=0.1, lost=0.0),
            300,
            0.02,
        ),
        "macro F1, 6 classes, one of 2%": (
            "macro_f1",
            lambda rng, n: classes(rng, n, num_classes=6, rare=0.02, lost=0.0),
            500,
            0.02,
        ),
    }
    for name, (key, draw, pilot, margin) in equal.items():
        add(f"planned: {name}", "power", as_planned(key, draw, pilot, margin))
    add("serving: undisturbed", "clean", serving(lambda rng: lambda t: 0.0))
    add(
        "serving: undisturbed, 8 blocks, one look",
        "clean",
        serving(lambda rng: lambda t: 0.0, blocks=8, looks=1),
    )
    for period in (2, 3, 4, 6, 8):
        add(f"serving: every reading of {period} takes 5% longer", "false", serving(every(period)))
        add(
            f"serving: every reading of {period} takes 50% longer",
            "false",
            serving(every(period, 0.4)),
        )
        add(f"serving: a wave of {period} readings, 5%", "false", serving(wave(period)))
    add("serving: warms up linearly, 0.5% a reading", "false", serving(linear(0.005)))
    for readings in (3, 10, 30):
        add(
            f"serving: settles exponentially from 30%, {readings} readings",
            "false",
            serving(exponential(0.3, readings)),
        )
    add("serving: a step of 10%", "false", serving(step(0.1)))
    add("serving: bursts of 30% in one reading of ten", "false", serving(bursts(0.1, 0.3)))
    return found


def run(scenario: Scenario, simulations: int, seed: int) -> dict[str, Any]:
    """Return how often the gate said what, in shares of all simulations, with Wilson's 95% interval
    of PASS.
    """
    start = time.process_time()
    streams = np.random.SeedSequence(
        [seed, int(hashlib.sha256(scenario.name.encode()).hexdigest()[:8], 16)]
    )
    said = Counter(
        scenario.simulate(np.random.default_rng(stream), number).value
        for number, stream in enumerate(streams.spawn(simulations))
    )
    low, high = stats.binomtest(said["PASS"], simulations).proportion_ci(0.95, method="wilson")
    return {
        "name": scenario.name,
        "kind": scenario.kind,
        "simulations": simulations,
        "seed": seed,
        **said,
        "pass": said["PASS"] / simulations,
        "pass_ci95": [float(low), float(high)],
        "invalid": said["INVALID"] / simulations,
        "kept": kept(scenario.kind, said, simulations),
        "cpu_s": round(time.process_time() - start, 1),
    }


def kept(kind: str, said: Counter[str], simulations: int) -> bool:
    """Tell whether the promise of a kind of scenario was kept in this many simulations."""
    if kind == "power":
        return said["PASS"] / simulations >= LEAST_POWER
    invalid_enough = kind != "clean" or said["INVALID"] / simulations <= MOST_INVALID
    return said["PASS"] / simulations <= MOST_FALSE and invalid_enough


# -- macro F1 by items of the rarest class --------------------------------------------------------

FLOORS = (0, 5, 10, 15, 20, 25, 30, 40, 50)


def floor_settings() -> list[dict[str, Any]]:
    """Return what is simulated to find the floor: classes, what is lost of the one of 1%, and how
    many items it has.
    """
    kinds = ((1.0, "recall"), (0.15, "recall"), (0.3, "precision"))
    return [
        {"num_classes": num_classes, "lost": lost, "where": where, "expected": expected}
        for num_classes in (2, 6, 20)
        for lost, where in kinds
        for expected in (12, 20, 30)
    ]


def by_floor(what: dict[str, Any], simulations: int, seed: int) -> dict[str, Any]:
    """Return false PASS of macro F1, as shares of all simulations, if the floor were each of
    `FLOORS`.
    """
    start, shipped = time.process_time(), quality.MIN_CLASS_ITEMS
    more = {name: what[name] for name in ("num_classes", "lost", "where")}
    draw = lambda rng, n: classes(rng, n, rare=0.01, **more)
    margin, read = true_loss(draw), np.empty((simulations, 2))
    quality.MIN_CLASS_ITEMS = 0
    try:
        for number in range(simulations):
            sides = draw(
                np.random.default_rng([seed, number, what["expected"], what["num_classes"]]),
                what["expected"] * 100,
            )
            passed = judged("macro_f1", sides, margin, number).outcome is Outcome.PASS
            read[number] = np.count_nonzero(sides[0]["label"] == 0), passed
    finally:
        quality.MIN_CLASS_ITEMS = shipped
    false = {str(floor): float(np.mean(read[:, 1] * (read[:, 0] >= floor))) for floor in FLOORS}
    return {
        "name": floor_name(what),
        "kind": "floor",
        "simulations": simulations,
        "seed": seed,
        "margin": round(margin, 4),
        "false_pass": false,
        "kept": false[str(shipped)] <= MOST_FALSE,
        "cpu_s": round(time.process_time() - start, 1),
    }


def floor_name(what: dict[str, Any]) -> str:
    """Return the name of a setting of the floor's simulation."""
    return (
        f"floor: {what['num_classes']} classes, {what['lost']:.0%} lost in {what['where']} of one"
        f" of 1%, {what['expected']} items of it"
    )


def digest() -> str:
    """Return what decides the answers: this script and the statistics."""
    package = Path(quality.__file__).parent
    paths = [
        Path(__file__),
        *sorted(package.glob("*.py")),
        package.parent / "assess" / "serving.py",
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="scenarios whose name holds this")
    parser.add_argument("--state", type=Path, default=RESULTS / "gate_simulation.partial.jsonl")
    args = parser.parse_args()
    mark = {"digest": digest(), "simulations": args.simulations, "seed": args.seed}
    lines = args.state.read_text().splitlines() if args.state.is_file() else []
    done = {each["name"]: each for each in map(json.loads, lines) if each["mark"] == mark}
    work: dict[str, Callable[[], dict[str, Any]]] = {
        each.name: lambda each=each: run(each, args.simulations, args.seed) for each in scenarios()
    } | {
        floor_name(what): lambda what=what: by_floor(what, args.simulations, args.seed)
        for what in floor_settings()
    }
    chosen = {name: simulate for name, simulate in work.items() if args.only in name}
    for name, simulate in chosen.items():
        if name not in done:
            done[name] = simulate()
            with args.state.open("a") as file:
                file.write(json.dumps({**done[name], "mark": mark}) + "\n")
        print(line(done[name]), flush=True)
    found = [{key: value for key, value in done[name].items() if key != "mark"} for name in chosen]
    print(f"{sum(each['kept'] for each in found)} of {len(found)} kept")
    if not args.only:
        save_result(
            "gate_simulation",
            {"scenarios": found, "resamples": RESAMPLES},
            "\n".join(map(line, found)),
        )
        args.state.unlink(missing_ok=True)


def line(read: dict[str, Any]) -> str:
    """Return a scenario's result in a line."""
    answer = "kept" if read["kept"] else "BROKEN"
    if read["kind"] == "floor":
        false = ", ".join(f"{floor}: {share:.1%}" for floor, share in read["false_pass"].items())
        return (
            f"{read['name']}: false PASS by floor {false}, n {read['simulations']}, {answer},"
            f" {read['cpu_s']} s"
        )
    ends = ", ".join(f"{end:.1%}" for end in read["pass_ci95"])
    return (
        f"{read['name']}: PASS {read['pass']:.1%} [{ends}] ({read['kind']}), INVALID"
        f" {read['invalid']:.1%}, n {read['simulations']}, {answer}, {read['cpu_s']} s"
    )


if __name__ == "__main__":
    main()
