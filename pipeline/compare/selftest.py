"""A gate that compares a model with itself: how often it answers falsely, and what it could tell.
Arithmetic only.

A/A: both sides are the same artifact and the least saving is 0, so the truth lies on the threshold.
- A serving criterion that says PASS claims a saving that is not there; one that says FAIL claims a
  loss. Both are false. Each is allowed with a chance of alpha over all interim analyses.
  INCONCLUSIVE is right.
- A quality criterion should say PASS, since the model is no worse than itself. FAIL is false.
- INVALID answers nothing. It says that the machine was disturbed, and is counted apart.

False answers in n trials are held against alpha by a binomial test (`TEST_ALPHA`, one-sided, for
PASS and FAIL each). With 20 trials and alpha 0.05, five of one kind are too many (chance 0.3%),
four are not (1.6%). The rule itself keeps a little less than alpha: 0.0304 a look is for normal
means, t intervals of 4 and then 8 blocks would come to 5.3% (simulated), and with the correction
for skewness they come to 4.3%.

The noise floor is the least saving that the gate would find here, with its blocks and looks, in 80%
of cases: from the spread of blocks around their trial's mean, by simulating the rule with normal
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import special

from pipeline.compare.statistics import (
    Interval,
    RunSpread,
    log_ratio_from_spread,
    look_alpha,
    mean_interval,
    own_spread,
    skewed_reach,
    t_quantile,
    wilson_interval,
)
from pipeline.compare.verdict import Outcome, invalid, serving_criterion
from pipeline.ledger.shapes import FalseRecord

# that a gate which keeps its alpha is called too often false, for each kind of answer
TEST_ALPHA = 0.01
POWER = 0.8
DRAWS = 20_000  # simulated trials: a share near 0.8 to 0.006 at two standard errors
CURVE = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the noise floor
Floats = npt.NDArray[np.float64]
Look = Callable[[], tuple[Floats, Floats, Sequence[str]]]
"""Measures the blocks of one look: seconds of arm and base, (blocks, 2) each, and what disturbed
them.
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """One A/A through the serving criterion and its looks.

    Attributes:
        log_ratios: (blocks,): ln(arm / base) of every block.
        looks: That were taken.
    """

    outcome: Outcome
    log_ratios: Floats
    looks: int
    why: str | None = None


def one_trial(look: Look, *, alpha: float, looks: int) -> Trial:
    """Judge a model against itself as the gate does: at least saving 0, the next look only where
    one decided nothing.

    Args:
        look: Measures one look's blocks.
        alpha: The policy's, one-sided.
        looks: The policy's.
    """
    arm, base = np.empty((0, 2)), np.empty((0, 2))
    reasons: list[str] = []
    for number in range(1, looks + 1):
        ours, theirs, disturbed = look()
        arm, base, reasons = (
            np.vstack([arm, ours]),
            np.vstack([base, theirs]),
            [*reasons, *disturbed],
        )
        read = serving_criterion(arm, base, minimum=0.0, alpha=look_alpha(alpha, looks))
        made = invalid(read, reasons)
        if made.outcome is not Outcome.INCONCLUSIVE or number == looks:
            return Trial(made.outcome, (np.log(arm) - np.log(base)).mean(axis=1), number, made.why)
    raise AssertionError("a policy has a look")


@dataclass(frozen=True, slots=True)
class FalseAnswers:
    """How many of n answers were false, against the chance that is allowed.

    Attributes:
        ci: Wilson's 90% interval of the share; None of no answers.
        chance: Of as many or more, if `allowed` is the chance of each.
        too_many: Whether that is below `TEST_ALPHA`.
    """

    count: int
    n: int
    allowed: float
    ci: tuple[float, float] | None
    chance: float

    @property
    def too_many(self) -> bool:
        """Whether a gate that keeps its alpha would hardly ever do so."""
        return self.chance < TEST_ALPHA

    def to_json(self) -> FalseRecord:
        """Return the form it has in selftest.json."""
        return {
            "count": self.count,
            "n": self.n,
            "allowed": self.allowed,
            "chance": self.chance,
            "ci": None if self.ci is None else list(self.ci),
            "too_many": self.too_many,
        }


def false_answers(count: int, n: int, allowed: float) -> FalseAnswers:
    """Hold false answers against the chance that is allowed; where none is, a single one is too
    many.
    """
    chance = (
        1.0 if count == 0 else 0.0 if allowed == 0 else float(special.bdtrc(count - 1, n, allowed))
    )
    return FalseAnswers(count, n, allowed, wilson_interval(count, n) if n else None, chance)


@dataclass(frozen=True, slots=True)
class Served:
    """What the trials came to.

    Attributes:
        sd_log: Standard deviation of a block's log-ratio around its trial's mean, pooled.
        copies: Mean log-ratio of the first loaded copy to the second, with its interval over
            trials; None of one trial.
        noise_floor: Least saving that is found with a chance of `POWER`; None where nothing could
            be judged.
        power: (saving, chance of PASS).
    """

    outcomes: dict[str, int]
    passes: FalseAnswers
    fails: FalseAnswers
    sd_log: float | None
    copies: Interval | None
    noise_floor: float | None
    power: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    @property
    def too_many(self) -> bool:
        """Whether there are more false answers than alpha allows."""
        return self.passes.too_many or self.fails.too_many


def sum_up(
    trials: Sequence[Trial], signs: Sequence[int], *, alpha: float, blocks: int, looks: int
) -> Served:
    """Count false answers and find the noise floor.

    Args:
        trials: Those that are INVALID say nothing.
        signs: Of each trial, +1 where the first loaded copy was the candidate, -1 where the second
            was.
        alpha: The policy's.
        blocks: Of one look.
        looks: The policy's.
    """
    counts = {
        outcome.value: sum(trial.outcome is outcome for trial in trials) for outcome in Outcome
    }
    valid = [
        (trial, sign)
        for trial, sign in zip(trials, signs, strict=True)
        if trial.outcome is not Outcome.INVALID
    ]
    passes, fails = (
        false_answers(counts[each], len(valid), alpha) for each in (Outcome.PASS, Outcome.FAIL)
    )
    if not valid:
        return Served(counts, passes, fails, None, None, None)
    means = [sign * float(trial.log_ratios.mean()) for trial, sign in valid]
    around = [trial.log_ratios - trial.log_ratios.mean() for trial, _ in valid]
    degrees = sum(len(each) - 1 for each in around)
    sd_log = math.sqrt(math.fsum(float(each @ each) for each in around) / degrees)
    floor = noise_floor(sd_log, alpha=alpha, blocks=blocks, looks=looks)
    curve = [
        (each * floor, power(each * floor, sd_log, alpha=alpha, blocks=blocks, looks=looks))
        for each in CURVE
        if sd_log > 0 and each * floor < 1
    ]
    return Served(
        counts,
        passes,
        fails,
        sd_log,
        mean_interval(means) if len(means) > 1 else None,
        floor,
        curve,
    )


def power(saving: float, sd_log: float, *, alpha: float, blocks: int, looks: int) -> float:
    """Return the chance that a gate at least saving 0 says PASS of a true saving.

    Args:
        saving: Share of the base's cost, below 1.
        sd_log: Of a block's log-ratio, normal.
        alpha: Of all looks, one-sided.
        blocks: Of one look.
        looks: One or two.
    """
    if sd_log == 0:
        return float(saving > 0)
    return _found(
        -math.log1p(-saving) / sd_log,
        _draws(blocks * looks),
        alpha=alpha,
        blocks=blocks,
        looks=looks,
    )


def noise_floor(sd_log: float, *, alpha: float, blocks: int, looks: int) -> float:
    """Return the least saving, a share of the base's cost, found with a chance of `POWER`."""
    draws, low, high = _draws(blocks * looks), 0.0, 1.0
    while _found(high, draws, alpha=alpha, blocks=blocks, looks=looks) < POWER:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        if _found(middle, draws, alpha=alpha, blocks=blocks, looks=looks) < POWER:
            low = middle
        else:
            high = middle
    return -math.expm1(-high * sd_log)


def _draws(num_blocks: int) -> Floats:
    """Return standard normal blocks (draws, blocks), the same each time: a curve is then smooth."""
    return np.random.default_rng(0).standard_normal((DRAWS, num_blocks))


def _found(shift: float, draws: Floats, *, alpha: float, blocks: int, looks: int) -> float:
    """Return the share of trials that PASS where the truth is `shift` standard deviations of a
    block better than 0.
    """
    open_, passed = np.ones(len(draws), dtype=bool), np.zeros(len(draws), dtype=bool)
    for look in range(1, looks + 1):
        n = look * blocks
        seen = draws[:, :n] + shift
        around = seen - seen.mean(axis=1, keepdims=True)
        skewness = np.mean(around**3, axis=1) / np.mean(around**2, axis=1) ** 1.5
        t = seen.mean(axis=1) / (seen.std(axis=1, ddof=1) / math.sqrt(n))
        quantile = t_quantile(1 - 2 * look_alpha(alpha, looks), n - 1)
        better, worse = (
            t > skewed_reach(quantile, -skewness, n),
            -t > skewed_reach(quantile, skewness, n),
        )
        passed |= open_ & better
        open_ &= ~(better | worse)
    return float(passed.mean())


def training_spread(device_hours: Sequence[float]) -> float:
    """Return the standard deviation of ln(device-hours) over repeated runs of one training."""
    assert len(device_hours) >= 2, "one run has no spread"
    return float(np.log(np.asarray(device_hours, dtype=np.float64)).std(ddof=1))


def training_floor(sd_log: float, runs: int, *, alpha: float) -> float:
    """Return the least saving of C, one run each, whose bound excludes 0: what the criterion can
    tell at all.

    Of a candidate whose own spread nobody has seen (`statistics.own_spread`).
    """
    recorded = RunSpread(sd_log, runs - 1)
    of_arm, _ = own_spread(recorded, ())
    nothing = log_ratio_from_spread(
        1.0, 1.0, arm_spread=of_arm, base_spread=recorded, level=1 - 2 * alpha
    )
    return -math.expm1(-math.log1p(-nothing.low))
