"""A model's releases one after another: is the newest a step down, and have small losses added up?
Arithmetic only.

Two questions that no single verdict answers:

- Step: is the newest reading below what earlier releases of this model read? Each reading is a
  release against the champion of its day (the first it met; one against itself is none). Earlier
  ones are weighted by their precision, and by how far releases lie apart beyond it (tau, Paule and
  Mandel); the newest is held against where another release of the same kind would read: a
  prediction interval, t with one degree of freedom less than there are earlier releases (than they
  count for, where some are far more precise: Kish). It takes three of them. No reading is left out
  for its verdict: without those that failed the rest would lie too high, and the next one look like
  a step.
- Drift: a margin forgives a small loss, and the next margin another one. What the promoted
  champions lost one after another is added up since the best of them. Alarm: the sum lies beyond
  the margin, and its bound excludes that nothing was lost. Any champion may turn out to be the best
  one, so every start is tested, at alpha over their number.

Both are alarms to look into, not verdicts: a gate of the newest against the best champion decides.

Simulated (tests/test_history.py, `-m slow`): a step alarm without a step in at most alpha of 2,000
histories, whether releases differ or not, whatever their precisions. A step of 3 standard errors
(of newest less earlier, both with what lies between releases) is found in 44 to 63% of histories
with 3 earlier releases, 77 to 82% with 6, 82 to 86% with 8, 83 to 87% with 10: with few of them
nobody knows how far releases lie apart, and no test that holds alpha can do much. A drift alarm
without a loss: in at most 5% of 4,000 chains; where each champion lost 0.4 of a margin (standard
error 0.3) it sounds in 60% of chains after 3, 78% after 5, 96% after 10.

Sources: Paule and Mandel (1982), J. Res. NBS 87:377-385; Higgins, Thompson and Spiegelhalter
(2009), J. R. Stat. Soc. A 172:137-159 (prediction interval); Hartung and Knapp (2001), Statist.
Med. 20:3875-3889 (t with k - 1 degrees); Kish (1965), Survey Sampling, section 11.7; D'Agostino,
Massaro and Sullivan (2003), Statist. Med. 22:169-186 (biocreep).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from pipeline.compare.statistics import normal_quantile, t_quantile
from pipeline.ledger.numbers import how_many

ALPHA = 0.05  # one-sided, of each alarm at each release
LEAST_EARLIER = 3  # releases, below which nothing is known of how far they lie apart
# standard error below which a reading counts as this precise: exact ones would take all the weight
SHARPEST = 1e-6
MEASURED = ("PASS", "FAIL", "INCONCLUSIVE")
Floats = npt.NDArray[np.float64]


# -- what was judged ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """A reading with its interval: positive is better.

    Attributes:
        error: Standard error in the unit that adds up (`added`).
        relative: A share of the other side's (savings, bits per byte): logarithms add up, shares do
            not.
        blocks: ABBA blocks that `error` rests on; None for qualities.
    """

    value: float
    low: float
    high: float
    error: float
    relative: bool
    blocks: int | None = None

    @property
    def added(self) -> float:
        """The reading in the unit that adds up over releases: -ln(1 - share) of a share."""
        return to_added(self.value) if self.relative else self.value


def to_added(share: float) -> float:
    """Return -ln(1 - share): shares of shares add up in it, and better is higher."""
    return -math.log1p(-share)


def from_added(added: float, *, relative: bool) -> float:
    """Return what `Figure.added` stands for, as readings are shown: a share where `relative`."""
    return -math.expm1(-added) if relative else added


def figure(
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    level: float,
    relative: bool,
    blocks: int | None = None,
) -> Figure | None:
    """Return a reading, its standard error read off its interval; None where there is no interval
    to read it off.
    """
    if (
        value is None
        or low is None
        or high is None
        or not all(map(math.isfinite, (value, low, high)))
    ):
        return None
    if (
        low > high
        or (relative and high >= 1)
        or not 0 < level < 1
        or (blocks is not None and blocks < 2)
    ):
        return None
    width = to_added(high) - to_added(low) if relative else high - low
    quantile = normal_quantile(level) if blocks is None else t_quantile(level, blocks - 1)
    return Figure(value, low, high, width / 2 / quantile, relative, blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One answer of the gate, as the history shows it.

    Attributes:
        created: UTC, ISO 8601.
        run: Of the pipeline.
        key: Of candidate, baseline, policy, data, evaluation and device; empty where there was no
            baseline.
        candidate: Digest; `baseline` too, None where there was none.
        version: Of the registered model, where the candidate is one.
        recorded: The run whose verdict was given again; None where it was reached here.
        quality_key: Of the primary quality.
        margin: Loss of it that still passes.
        again: How often it was given again.
        ways: How many keys the same pair was judged under: other policies, data or devices.
    """

    created: str
    run: str
    model: str | None
    verdict: str
    key: str
    look: int
    candidate: str
    baseline: str | None
    version: str | None = None
    policy: str = ""
    policy_sha256: str = ""
    data: str = ""
    device: str = ""
    recorded: str | None = None
    serving: Figure | None = None
    quality: Figure | None = None
    quality_key: str = ""
    margin: float | None = None
    again: int = 0
    ways: int = 1


def count_once(found: Sequence[Judged]) -> list[Judged]:
    """Return each answer once, the oldest first: its last look, however often it was given again.

    An INVALID run does not count as an interim analysis: it stands only where nothing else was
    found out. A pair that was judged under several policies, data or devices has an answer each;
    `ways` says how many.
    """
    groups: dict[tuple[str, ...], list[Judged]] = {}
    for each in found:
        # Without a baseline there is no key: such answers are told apart by their verdict.
        groups.setdefault((each.key, each.candidate, "" if each.key else each.verdict), []).append(
            each
        )
    kept: list[Judged] = []
    for same in groups.values():
        # Verdicts that were given again are repetitions, unless the original is not in the history.
        own = [each for each in same if each.recorded is None] or same[:1]
        last = max(own, key=lambda each: (each.verdict != "INVALID", each.look, each.created))
        kept.append(replace(last, again=sum(each.recorded is not None for each in same)))
    keys: dict[tuple[str, str | None], set[str]] = {}
    for each in kept:
        keys.setdefault((each.candidate, each.baseline), set()).add(each.key)
    kept = [replace(each, ways=len(keys[each.candidate, each.baseline])) for each in kept]
    return sorted(kept, key=lambda each: (each.created, each.run))


# -- step -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """How far the newest reading lies from the earlier ones.

    Attributes:
        estimate: Newest less the weighted mean of the earlier ones, in the readings' unit.
        high: One-sided upper bound of a true difference at alpha; below 0 is an alarm.
        spread: Standard deviation between releases (tau) beyond their own errors.
        earlier: How many there were.
    """

    estimate: float
    high: float
    spread: float
    earlier: int

    @property
    def alarm(self) -> bool:
        """Whether the newest is a step down."""
        return self.high < 0


def step(
    values: npt.ArrayLike, errors: npt.ArrayLike, *, alpha: float = ALPHA, degrees: float = math.inf
) -> Step | None:
    """Hold the newest reading against the earlier ones; None where there are fewer than three of
    these.

    The newest is taken for no more precise than the earlier ones typically are: where these are too
    coarse to show how far releases lie apart, a precise newest one would be held against a spread
    that nobody has seen.

    Args:
        values: (k + 1,): oldest first, the newest last; in a unit that adds up.
        errors: (k + 1,): their standard errors.
        alpha: One-sided chance of an alarm without a step.
        degrees: Of freedom of the newest one's error, where that is its own.
    """
    y, variances = (
        np.asarray(values, dtype=np.float64),
        np.maximum(np.asarray(errors, np.float64), SHARPEST) ** 2,
    )
    assert y.shape == variances.shape, (y.shape, variances.shape)
    earlier, own = y[:-1], variances[:-1]
    if len(earlier) < LEAST_EARLIER:
        return None
    tau2 = between_variance(earlier, own)
    # Inverse variance: what a release varies by itself, and from release to release.
    weights = 1 / (own + tau2)
    mean = float(weights @ earlier / weights.sum())
    # Harmonic mean of the earlier variances
    typical = len(own) / np.sum(1 / own)
    # A prediction: spread of releases, the newest one's error, and that of the mean.
    variance = tau2 + max(float(variances[-1]), float(typical)) + 1 / weights.sum()
    estimate = float(y[-1]) - mean
    # Kish's effective number: a few very precise releases count for fewer than there are.
    counts_for = float(weights.sum() ** 2 / np.sum(weights**2))
    quantile = float(special.stdtrit(max(1.0, min(counts_for - 1, degrees)), 1 - alpha))
    high = estimate + quantile * math.sqrt(variance)
    return Step(estimate, high, math.sqrt(tau2), len(earlier))


def between_variance(values: Floats, variances: Floats) -> float:
    """Return the variance between releases beyond that of their readings (tau squared).

    It is where the weighted sum of squares is what it is on average, values less one; 0 where it is
    smaller already.

    Source: Paule and Mandel (1982), J. Res. NBS 87:377-385.
    """

    def excess(tau2: float) -> float:
        weights = 1 / (variances + tau2)
        mean = weights @ values / weights.sum()
        return float(weights @ (values - mean) ** 2) - (len(values) - 1)

    if excess(0.0) <= 0:
        return 0.0
    # The plain variance of the readings: the root lies below twice that.
    largest = float(np.sum((values - values.mean()) ** 2)) / (len(values) - 1)
    return float(optimize.brentq(excess, 0.0, 2 * largest))  # type: ignore[arg-type]


def pooled_errors(errors: npt.ArrayLike, blocks: npt.ArrayLike) -> tuple[Floats, float]:
    """Return the standard errors of means over few blocks, the spread of a block pooled over
    releases.

    Four blocks hardly tell their own spread; those of all releases on one device at one load do.
    The newest keeps its own where that is larger (a noisy day is no step), and then the degrees of
    freedom that it has: the second figure.
    """
    errors, blocks = np.asarray(errors, dtype=np.float64), np.asarray(blocks, dtype=np.float64)
    of_block = float(np.sum((blocks - 1) * blocks * errors**2) / np.sum(blocks - 1))
    pooled = np.sqrt(of_block / blocks)
    if errors[-1] <= pooled[-1]:
        return pooled, math.inf
    pooled[-1] = errors[-1]
    return pooled, float(blocks[-1] - 1)


# -- drift ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drift:
    """What the newest champion lost since the best one, in the unit that adds up.

    Attributes:
        best: Index of the best champion: 0 is what the chain begins with, i what the i-th change
            left.
        changes: From there to the newest.
        level: Two-sided, of the interval, so that all starts together hold alpha.
        shown: Whether the interval excludes a loss beyond the margin.
        alarm: The sum lies beyond the margin and the interval excludes that nothing was lost.
    """

    estimate: float
    low: float
    high: float
    best: int
    changes: int
    level: float
    shown: bool
    alarm: bool


def drift(
    values: npt.ArrayLike, errors: npt.ArrayLike, *, margin: float, alpha: float = ALPHA
) -> Drift | None:
    """Add up what champions lost one after another; None where the newest is the best of them, or
    there is none.

    Errors of different releases are taken as independent. Two in a row share the champion between
    them, which they read with opposite sign, so that on the same documents their sum is known
    better than this says.

    Args:
        values: (m,): each champion less the one before it, the oldest first; in a unit that adds
            up.
        errors: (m,): their standard errors.
        margin: Loss that one release may have, in that unit; positive.
        alpha: One-sided chance of an alarm where no champion lost anything.
    """
    y, variances = np.asarray(values, dtype=np.float64), np.asarray(errors, dtype=np.float64) ** 2
    assert y.shape == variances.shape, (y.shape, variances.shape)
    if not len(y):
        return None
    # From each champion to the newest: sums from the end of the chain.
    totals, half = (
        np.cumsum(y[::-1])[::-1],
        -float(special.ndtri(alpha / len(y))) * np.sqrt(np.cumsum(variances[::-1])[::-1]),
    )
    if totals.min() >= 0:
        return None
    alarms = (totals < -margin) & (totals + half < 0)
    best = int(np.argmin(np.where(alarms, totals, np.inf) if alarms.any() else totals))
    low, high = float(totals[best] - half[best]), float(totals[best] + half[best])
    return Drift(
        estimate=float(totals[best]),
        low=low,
        high=high,
        best=best,
        changes=len(y) - best,
        level=1 - 2 * alpha / len(y),
        shown=low > -margin,
        alarm=bool(alarms[best]),
    )


# -- of a model's history -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a question came to for a model, in the unit that readings are shown in.

    Attributes:
        kind: `step` or `drift`.
        of: `serving` or `quality/<key>`.
        value: A step: newest against the earlier ones; drift: accumulated change.
        low: None for a step, whose bound is one-sided.
        level: Of the interval; of a step's bound, one-sided.
        releases: Earlier ones that a step was read against; changes that drift adds up.
        since: Digest of the best champion; None for a step.
        why: Why nothing can be said; None where something is.
    """

    kind: str
    of: str
    alarm: bool = False
    value: float | None = None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    margin: float | None = None
    releases: int = 0
    since: str | None = None
    candidate: str = ""
    shown: bool | None = None
    why: str | None = None


def findings(answers: Sequence[Judged], *, alpha: float = ALPHA) -> list[Finding]:
    """Return what the newest release of one model says of steps and drift.

    Args:
        answers: Of one registered model, each once, the oldest first (`count_once`).
        alpha: One-sided, of each alarm.
    """
    measured = _measured(answers)
    if not measured:
        return []
    its_day: dict[str, str | None] = {}  # the champion that each candidate first met
    for each in measured:
        its_day.setdefault(each.candidate, each.baseline)
    releases = [each for each in measured if each.baseline == its_day[each.candidate]]
    newest = releases[-1]
    found = [_step("serving", [(each, each.serving) for each in releases], alpha)]
    if newest.quality_key:
        name, same = f"quality/{newest.quality_key}", newest.quality_key
        of_key = [(each, each.quality if each.quality_key == same else None) for each in releases]
        found += [_step(name, of_key, alpha), _drift(name, measured, alpha)]
    return found


def _measured(answers: Sequence[Judged]) -> list[Judged]:
    """Return the answers that have readings of two models; one against itself is no release."""
    return [
        each
        for each in answers
        if each.verdict in MEASURED and each.baseline not in (None, each.candidate)
    ]


def _step(name: str, read: Sequence[tuple[Judged, Figure | None]], alpha: float) -> Finding:
    """Hold the newest answer's reading against earlier ones under the same policy on the same
    device, one a pair.
    """
    newest, own = read[-1]
    finding = Finding(kind="step", of=name, candidate=newest.candidate, level=1 - alpha)
    if own is None:
        return replace(finding, why="the newest release has no interval")
    alike = (newest.policy_sha256, newest.device)
    same = {
        (each.candidate, each.baseline): reading
        for each, reading in read[:-1]
        if reading is not None and (each.policy_sha256, each.device) == alike
    }
    same.pop((newest.candidate, newest.baseline), None)
    readings = [*same.values(), own]
    errors, degrees = np.array([each.error for each in readings]), math.inf
    if all(each.blocks is not None for each in readings):
        errors, degrees = pooled_errors(errors, [each.blocks or 0 for each in readings])
    detected = step([each.added for each in readings], errors, alpha=alpha, degrees=degrees)
    if detected is None:
        why = (
            f"{how_many(len(same), 'earlier release')} under this policy on this device, and a step"
            f" takes {LEAST_EARLIER}"
        )
        return replace(finding, releases=len(same), why=why)
    shown = [from_added(each, relative=own.relative) for each in (detected.estimate, detected.high)]
    return replace(
        finding, alarm=detected.alarm, value=shown[0], high=shown[1], releases=detected.earlier
    )


def champions(answers: Sequence[Judged]) -> list[Judged]:
    """Return the answers that led to the newest champion, the oldest first: each candidate is the
    next one's baseline.

    The newest candidate ends the chain where it has passed once (it is champion, or about to be);
    else its baseline does. Where a champion passed against an earlier one, too, that reading takes
    the place of what lies between.
    """
    measured = _measured(answers)
    if not measured:
        return []
    by_candidate: dict[str, Judged] = {}
    for each in measured:
        if each.verdict == "PASS":
            by_candidate[each.candidate] = each
    newest = measured[-1]
    digest = newest.candidate if newest.candidate in by_candidate else str(newest.baseline)
    chain: list[Judged] = []
    seen: set[str] = set()
    while digest in by_candidate and digest not in seen:
        seen.add(digest)
        chain.append(by_candidate[digest])
        digest = str(chain[-1].baseline)
    return chain[::-1]


def _drift(name: str, measured: Sequence[Judged], alpha: float) -> Finding:
    newest, chain = measured[-1], champions(measured)
    finding = Finding(kind="drift", of=name, candidate=newest.candidate, margin=newest.margin)
    if not chain or newest.margin is None:
        return replace(finding, why="no chain of champions leads here")
    readings: list[Figure] = []
    for each in reversed(chain):  # as far back as this quality was read
        if each.quality is None or each.quality_key != newest.quality_key:
            break
        readings.insert(0, each.quality)
    chain = chain[len(chain) - len(readings) :]
    if not readings:
        return replace(finding, why="the champion's own verdict has no interval")
    assert all(after.baseline == before.candidate for before, after in pairwise(chain))
    relative = readings[-1].relative
    # In the unit that adds up, as the readings are.
    margin = math.log1p(newest.margin) if relative else newest.margin
    detected = drift(
        [each.added for each in readings],
        [each.error for each in readings],
        margin=margin,
        alpha=alpha,
    )
    finding = replace(finding, candidate=chain[-1].candidate)
    if detected is None:
        return replace(finding, value=0.0, shown=True, since=chain[-1].candidate)
    value, low, high = (
        from_added(each, relative=relative)
        for each in (detected.estimate, detected.low, detected.high)
    )
    return replace(
        finding,
        alarm=detected.alarm,
        value=value,
        low=low,
        high=high,
        level=detected.level,
        releases=detected.changes,
        since=chain[detected.best].baseline,
        shown=detected.shown,
    )
