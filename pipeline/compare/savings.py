"""What one arm cost against another, whether that was a saving, and when it pays back. Arithmetic
only.

Words: the *chain* of an arm is every stage its artifact depends on, itself included, each once.
`C(arm)` is the work over its chain, spent now or reused; assessment, replayed steps and failed
attempts are not in it (luck with preemption is no merit of a recipe), and `all_in` shows it with
them. `C_opt(arm | base)` is the work the arm needed and the base did not, less the reverse: a
shared teacher cancels.

What an existing model cost in the past is unknown. Where both chains have it, it cancels; where
only one has it, the saving is null, and `new_spend_saving` says what was saved of what is spent
from here on. A model registered with what it cost cancels where both chains have it as well (that
the cost is known makes neither arm cheaper), and is charged where only one has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
from scipy import special

from pipeline.compare import statistics
from pipeline.ledger.shapes import (
    ComparedQuality,
    Figure,
    Figures,
    Payback,
    ServingSaving,
    Speedup,
    SpendRecord,
    TrainedRecord,
    TrainingSaving,
)
from pipeline.ledger.values import Provenance, Value, derive, estimated, null

SECONDS_PER_HOUR = 3600
ONE_RUN = "point estimate only: one run each"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """What one arm's own stage took.

    Attributes:
        arm: Its name.
        depends_on: Arms whose artifacts it reads directly.
        work_h: Device-hours from its start to its committed artifact, spent now or reused.
        retry_h: Device-hours of failed attempts and replayed steps.
        flops: Model FLOPs of the work; None where they were not counted.
        existing: True for a model that was there before: what it once cost is unknown. `work_h` is
            then what handling it took here, if anything.
        unknown: Why it is, as the null says it.
        registered: The run that a model which was there before is registered with: it cost
            `work_h`.
        foreign_load: Share of the device that others took while it worked; None where nobody was to
            read it.
    """

    arm: str
    depends_on: tuple[str, ...] = ()
    work_h: float = 0.0
    retry_h: float = 0.0
    flops: float | None = None
    existing: bool = False
    unknown: str = "existing model"
    registered: str | None = None
    foreign_load: Value | None = None

    def to_json(self) -> SpendRecord:
        """Return what `from_json` reads back."""
        load = self.foreign_load
        return {
            "arm": self.arm,
            "depends_on": list(self.depends_on),
            "work_h": self.work_h,
            "retry_h": self.retry_h,
            "flops": self.flops,
            "existing": self.existing,
            "unknown": self.unknown,
            "registered": self.registered,
            "foreign_load": None if load is None else load.to_json(),
        }

    @staticmethod
    def from_json(raw: SpendRecord) -> Spend:
        """Read back what `to_json` wrote."""
        load = raw["foreign_load"]
        return Spend(
            arm=raw["arm"],
            depends_on=tuple(raw["depends_on"]),
            work_h=raw["work_h"],
            retry_h=raw["retry_h"],
            flops=raw["flops"],
            existing=raw["existing"],
            unknown=raw["unknown"],
            registered=raw["registered"],
            foreign_load=None if load is None else Value.from_json(load),
        )


Spends = Mapping[str, Spend]


# -- chains ---------------------------------------------------------------------------------------


def chain(arm: str, spends: Spends) -> list[str]:
    """Return what `arm` depends on, itself last, each once and after all that it depends on."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            # Depth first: what an arm depends on stands before it.
            for needed in spends[name].depends_on:
                visit(needed)
            order.append(name)

    visit(arm)
    return order


def amortise(spends: Spends, arms: Collection[str], shared_by: int) -> dict[str, Spend]:
    """Return `spends` with the cost of `arms` (the teacher, its cache) divided among `shared_by`
    models.

    Figures made from it stand beside the full ones, never in their place.
    """

    def share(spend: Spend) -> Spend:
        flops = None if spend.flops is None else spend.flops / shared_by
        return replace(
            spend, work_h=spend.work_h / shared_by, retry_h=spend.retry_h / shared_by, flops=flops
        )

    return {name: share(spend) if name in arms else spend for name, spend in spends.items()}


def c_total(arm: str, spends: Spends, *, cancelled: Collection[str] = ()) -> Value:
    """Return C(arm): device-hours of work over its chain, without the arms that cancel.

    Null where the chain holds an existing model.
    """
    return _over_chain(arm, spends, cancelled, lambda spend: spend.work_h)


def all_in(arm: str, spends: Spends, *, cancelled: Collection[str] = ()) -> Value:
    """Return C(arm) with failed attempts and replayed steps, in device-hours."""
    return _over_chain(arm, spends, cancelled, lambda spend: spend.work_h + spend.retry_h)


def counted(arm: str, spends: Spends, cancelled: Collection[str]) -> list[Spend]:
    """Return what a chain is charged with: a run that two of its models are registered with,
    once.
    """
    by_run = {
        _past(spends[name]): spends[name]
        # Reversed, so that of models registered with one run the first in the chain stays.
        for name in reversed(chain(arm, spends))
        if name not in cancelled
    }
    return list(reversed(by_run.values()))


def _past(spend: Spend) -> tuple[str, str]:
    """Return whose cost an arm's is: its own, or that of the run which it is registered with."""
    return ("arm", spend.arm) if spend.registered is None else ("run", spend.registered)


def _over_chain(
    arm: str, spends: Spends, cancelled: Collection[str], part: Callable[[Spend], float]
) -> Value:
    own = counted(arm, spends, cancelled)
    existing = [spend for spend in own if spend.existing]
    if existing:
        arms = {
            why: ", ".join(s.arm for s in existing if s.unknown == why)
            for why in (s.unknown for s in existing)
        }
        return null("; ".join(f"{why}: {names}" for why, names in arms.items()))
    # `fsum` is exact, so that the order of a chain changes no figure.
    return Value(math.fsum(part(spend) for spend in own), Provenance.DERIVED)


def c_opt(arm: str, base: str, spends: Spends) -> Value:
    """Return C_opt(arm | base): device-hours that the arm's chain needed and the base's did not,
    less the reverse.

    Null where an existing model is in one of the chains only.
    """
    of_arm, of_base = (_also(name, other, spends) for name, other in ((arm, base), (base, arm)))
    return derive(
        lambda extra, saved: extra - saved,
        c_total(arm, spends, cancelled=of_base),
        c_total(base, spends, cancelled=of_arm),
    )


def _also(arm: str, other: str, spends: Spends) -> set[str]:
    """Return the arms of either chain whose cost `arm`'s chain holds."""
    own = {_past(spends[name]) for name in chain(arm, spends)}
    return {
        name for name in (*chain(arm, spends), *chain(other, spends)) if _past(spends[name]) in own
    }


def shared_past(arm: str, base: str, spends: Spends) -> list[str]:
    """Return the models that were there before and whose past both chains hold: it cancels."""
    both = _also(arm, base, spends) & _also(base, arm, spends)
    names = dict.fromkeys((*chain(arm, spends), *chain(base, spends)))
    return [
        name
        for name in names
        if name in both and (spends[name].existing or spends[name].registered)
    ]


def registered_twice(arm: str, spends: Spends) -> dict[str, list[str]]:
    """Return the runs that several models of a chain are registered with, and these models."""
    by_run: dict[str, list[str]] = {}
    for name in chain(arm, spends):
        run = spends[name].registered
        if run is not None:
            by_run.setdefault(run, []).append(name)
    return {run: names for run, names in by_run.items() if len(names) > 1}


# -- disturbance ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How much others may take of a device before times measured on it are not compared.

    Attributes:
        most: Share of a window, in [0, 1]; None: nobody looks.
        what: What others take, as a sentence says it: `the cores`, `the device`.
        is_shared: Whether what they took is lost to us, second for second: a CPU's cores.
            `less_others` is then shown.
    """

    most: float | None = None
    what: str = "the device"
    is_shared: bool = False

    def too_much(self, load: Value) -> str | None:
        """Return what others took, where it was more than that."""
        if self.most is None or load.value is None or load.value <= self.most:
            return None
        return f"others used {load.value:.0%} of {self.what}"


ANY_LOAD = Tolerance()


def measured_arms(arm: str, base: str, spends: Spends) -> list[Spend]:
    """Return the stages of both chains whose time a saving rests on: of work that was measured,
    each once.
    """
    cancelled = shared_past(arm, base, spends)
    own = {each.arm: each for side in (arm, base) for each in counted(side, spends, cancelled)}
    return [each for each in own.values() if each.work_h > 0 and not each.existing]


def disturbances(
    arm: str, base: str, spends: Spends, tolerance: Tolerance
) -> tuple[str | None, str | None]:
    """Return why the times of two chains cannot be compared, or None; and whose disturbance is
    unknown, or None.
    """
    if tolerance.most is None:
        return None, None
    own = [
        (each.arm, each.foreign_load or null("not recorded"))
        for each in measured_arms(arm, base, spends)
    ]
    loud = [
        f"{said} while {name} trained"
        for name, load in own
        if (said := tolerance.too_much(load)) is not None
    ]
    unknown = [f"{name} ({load.why_missing})" for name, load in own if load.value is None]
    return "; ".join(loud) or None, ", ".join(unknown) or None


def less_others(arm: str, base: str, spends: tuple[Spends, Spends], tolerance: Tolerance) -> Value:
    """Return the saving of device-time less what others took of it: an estimate, on shared cores
    only.
    """
    if not tolerance.is_shared:
        return null(f"what others take of {tolerance.what} is not lost to us second for second")
    loads = [
        each.foreign_load or null("not recorded") for each in measured_arms(arm, base, spends[0])
    ]
    cancelled = shared_past(arm, base, spends[0])
    ours = [{name: _undisturbed(each) for name, each in side.items()} for side in spends]
    c_arm, c_base = (
        c_total(n, s, cancelled=cancelled) for n, s in zip((arm, base), ours, strict=True)
    )
    missing = next((load for load in loads if load.value is None), None)
    saving = _share_saved(c_arm, c_base) if missing is None else missing
    return saving if saving.value is None else estimated(saving.value)


def _undisturbed(spend: Spend) -> Spend:
    share = 0.0 if spend.foreign_load is None else spend.foreign_load.value or 0.0
    return replace(spend, work_h=spend.work_h * (1 - share))


# -- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """One validation reading during training.

    Attributes:
        tokens: Trained on until then.
        metric: The validation metric.
        device_hours: The stage's until then, evaluation excluded.
        is_constant: True where it was taken at a constant learning rate: only then does this point
            on the curve stand for a run of that length.
    """

    tokens: int
    metric: float
    device_hours: float
    is_constant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """How one arm's training went.

    Attributes:
        arm: Its name in the spends.
        final: Its last validation metric; None without one.
        curve: Its readings in order, the last one at its end.
    """

    arm: str
    final: float | None
    curve: tuple[Reading, ...] = ()

    def to_json(self) -> TrainedRecord:
        """Return what `from_json` reads back: as far as it says, NaN and infinities are null."""
        return {
            "arm": self.arm,
            "final": _finite(self.final),
            "curve": [
                {
                    "tokens": each.tokens,
                    "metric": _finite(each.metric),
                    "device_hours": each.device_hours,
                    "is_constant": each.is_constant,
                }
                for each in self.curve
            ],
        }

    @staticmethod
    def from_json(raw: TrainedRecord) -> Trained:
        """Read back what `to_json` wrote."""
        readings = tuple(
            Reading(
                each["tokens"],
                math.nan if each["metric"] is None else each["metric"],
                each["device_hours"],
                each["is_constant"],
            )
            for each in raw["curve"]
        )
        return Trained(arm=raw["arm"], final=raw["final"], curve=readings)

    @property
    def constant(self) -> tuple[Reading, ...]:
        """Its readings at a constant learning rate."""
        return tuple(reading for reading in self.curve if reading.is_constant)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class _Target:
    """The validation metric at which both arms are compared."""

    q: float
    lower_is_better: bool

    def reached(self, metric: float) -> bool:
        return metric <= self.q if self.lower_is_better else metric >= self.q


@dataclass(frozen=True, slots=True)
class _Match:
    """The points of two arms' training that are compared.

    Attributes:
        rule: How they were found.
        spends: By side (arm, base), the spends with that side's own stage cut at its point.
        censored: Why the arm never got to Q, with `spends` at its end; None where it did.
    """

    rule: str
    spends: tuple[Spends, Spends]
    censored: str | None = None


def target_metric(final: float, margin: float, *, lower_is_better: bool) -> float:
    """Return Q: the base's final metric, worsened relatively (bits per byte) or absolutely
    (accuracies) by margin.
    """
    return final * (1 + margin) if lower_is_better else final - margin


def _first_held(trained: Trained, target: _Target) -> Reading | None:
    """Return the first of two consecutive readings at the target; one alone may be noise."""
    pairs = zip(trained.constant, trained.constant[1:], strict=False)
    return next(
        (one for one, two in pairs if target.reached(one.metric) and target.reached(two.metric)),
        None,
    )


def _cut_at(trained: Trained, reading: Reading, spends: Spends) -> Spends:
    """Return the spends as if the arm's own stage had ended at `reading`."""
    own = spends[trained.arm]
    # FLOPs are counted over the whole stage; they grow with the tokens.
    share = reading.tokens / trained.curve[-1].tokens
    flops = None if own.flops is None else own.flops * share
    return {**spends, own.arm: replace(own, work_h=reading.device_hours, flops=flops)}


def _on_one_schedule(arm: Trained, base: Trained) -> bool:
    """Tell whether points on both curves may be compared: constant rate, and read after the same
    tokens.
    """
    tokens = [[reading.tokens for reading in trained.constant] for trained in (arm, base)]
    overlap = min(len(tokens[0]), len(tokens[1]))
    return overlap >= 2 and tokens[0][:overlap] == tokens[1][:overlap]


def _match_on_curve(arm: Trained, base: Trained, target: _Target, spends: Spends) -> _Match | None:
    """Compare where each arm first holds Q; None where an arm does only at its end, or the base
    nowhere.
    """
    assert arm.final is not None
    base_reading, arm_reading = _first_held(base, target), _first_held(arm, target)
    # An arm that holds Q only at its end has no comparable point on its curve.
    if base_reading is None or (arm_reading is None and target.reached(arm.final)):
        return None
    rule = f"first of two consecutive evaluations at Q = {target.q:.4g}"
    at_base = _cut_at(base, base_reading, spends)
    if arm_reading is not None:
        return _Match(rule, (_cut_at(arm, arm_reading, spends), at_base))
    # The last comparable point: the arm would have needed more than it had spent there.
    last = arm.constant[-1]
    why = f"the arm did not hold Q = {target.q:.4g} within {last.tokens} tokens"
    return _Match(rule, (_cut_at(arm, last, spends), at_base), why)


def _match_at_end(arm: Trained, base: Trained, target: _Target, spends: Spends) -> _Match:
    assert arm.final is not None
    assert base.final is not None
    rule = (
        f"equal quality at the end: within margin of the base's {base.final:.4g}, Q ="
        f" {target.q:.4g}"
    )
    why = (
        None
        if target.reached(arm.final)
        else f"the arm ended at {arm.final:.4g} on validation, short of Q = {target.q:.4g}"
    )
    return _Match(rule, (spends, spends), why)


def training_saving(
    arm: Trained,
    base: Trained,
    spends: Spends,
    *,
    margin: float,
    lower_is_better: bool,
    teachers: Collection[str] = (),
    shared_by: int = 1,
    tolerance: Tolerance = ANY_LOAD,
) -> TrainingSaving:
    """Return the share of the base's training that the arm saved at equal quality; positive is
    cheaper.

    Where both curves were read after the same tokens in a constant-rate phase, the arms are
    compared where each first holds Q; otherwise at their ends, if the arm's end is at Q.

    Args:
        arm: How the arm's training went.
        base: How the base's went.
        spends: Of every arm in their chains.
        margin: How much worse than the base's final metric still counts as equal: relative where
            lower is better.
        lower_is_better: Of the validation metric.
        teachers: Arms whose cost is shared with other models.
        shared_by: Models that share it; above 1, the saving at that share stands as `amortised`
            beside the full one.
        tolerance: What others may have taken of the device. Beyond it every saving of time is null
            with that reason; `algorithmic`, which rests on FLOPs alone, and `less_others`, an
            estimate, stay.

    Returns:
        The form of `comparisons[].training`, and `bound`: where the arm is censored, the saving
        that it would stay below (it would have needed more than it spent).
    """
    for trained in (arm, base):
        if trained.final is None or not math.isfinite(trained.final):
            which = "the arm" if trained is arm else "the base"
            return _training_null(f"{which} has no validation reading", arm, base, spends)
    assert base.final is not None
    target = _Target(
        target_metric(base.final, margin, lower_is_better=lower_is_better), lower_is_better
    )
    on_curve = _match_on_curve(arm, base, target, spends) if _on_one_schedule(arm, base) else None
    match = on_curve or _match_at_end(arm, base, target, spends)
    figures = _saved(arm.arm, base.arm, match.spends)
    if shared_by > 1:
        shares = (
            amortise(match.spends[0], teachers, shared_by),
            amortise(match.spends[1], teachers, shared_by),
        )
        figures["amortised"] = _saved(arm.arm, base.arm, shares)["saving"]
    figures["bound"] = null("not censored")
    figures["less_others"] = less_others(arm.arm, base.arm, match.spends, tolerance)
    if match.censored is not None:
        figures = _censor(figures, match.censored)
    disturbed, unknown = disturbances(arm.arm, base.arm, spends, tolerance)
    if disturbed is not None:
        figures = _disturbed(figures, disturbed)
    rule = match.rule if unknown is None else f"{match.rule}; disturbance unknown: {unknown}"
    return _training_json(figures, rule, arm, base, spends)


def _saved(arm: str, base: str, spends: tuple[Spends, Spends]) -> dict[str, Value]:
    """Return the saving, both costs, what new spending alone saved, and the systems and algorithmic
    parts.
    """
    cancelled = shared_past(arm, base, spends[0])
    c_arm, c_base = (
        c_total(n, s, cancelled=cancelled) for n, s in zip((arm, base), spends, strict=True)
    )
    f_arm, f_base = (_flops(n, s, cancelled) for n, s in zip((arm, base), spends, strict=True))
    saving = _share_saved(c_arm, c_base)
    return {
        "saving": saving,
        "c_arm": c_arm,
        "c_base": c_base,
        "new_spend_saving": (
            _new_spend_saving(arm, base, spends)
            if saving.value is None
            else null("the saving is known")
        ),
        # Device-hours per FLOP; with `algorithmic`, (1 - systems)(1 - algorithmic) = 1 - saving.
        "systems": _share_saved(_ratio(c_arm, f_arm), _ratio(c_base, f_base)),
        "algorithmic": _share_saved(f_arm, f_base),
    }


def _share_saved(of_arm: Value, of_base: Value) -> Value:
    """Return 1 - arm/base."""
    if of_base.value == 0:
        return null("the base cost nothing here")
    return derive(lambda a, b: 1 - a / b, of_arm, of_base)


def _ratio(hours: Value, flops: Value) -> Value:
    return (
        null("no FLOPs were needed")
        if flops.value == 0
        else derive(lambda h, f: h / f, hours, flops)
    )


def _flops(arm: str, spends: Spends, cancelled: Collection[str]) -> Value:
    """Return the FLOPs over the chain; null where those of a stage, or of an existing model, are
    unknown.
    """
    own = counted(arm, spends, cancelled)
    unknown = [spend.arm for spend in own if spend.flops is None]
    if unknown:
        return null(f"FLOPs not counted: {', '.join(unknown)}")
    total = _over_chain(arm, spends, cancelled, lambda spend: spend.flops or 0.0)
    return derive(lambda f: f, total)


def _new_spend_saving(arm: str, base: str, spends: tuple[Spends, Spends]) -> Value:
    """Return the saving with no existing model charged for its past."""
    uncharged = [
        {name: replace(spend, existing=False) for name, spend in side.items()} for side in spends
    ]
    return _share_saved(c_total(arm, uncharged[0]), c_total(base, uncharged[1]))


def _censor(figures: dict[str, Value], why: str) -> dict[str, Value]:
    """Make every saving null: at the point compared the arm is not as good. The saving there bounds
    it from above.
    """
    censored = null(f"censored: {why}")
    hidden = ("saving", "new_spend_saving", "systems", "algorithmic", "amortised", "less_others")
    return {name: censored if name in hidden else value for name, value in figures.items()} | {
        "bound": figures["saving"]
    }


def _disturbed(figures: dict[str, Value], why: str) -> dict[str, Value]:
    """Make null what rests on times that others disturbed; a saving that is null for another reason
    keeps that.
    """
    of_time = ("saving", "new_spend_saving", "systems", "amortised", "bound")
    return {
        name: null(why) if name in of_time and value.value is not None else value
        for name, value in figures.items()
    }


def _training_json(
    figures: dict[str, Value], rule: str, arm: Trained, base: Trained, spends: Spends
) -> TrainingSaving:
    cancelled = shared_past(arm.arm, base.arm, spends)
    if cancelled:
        kinds = {name: "existing" if spends[name].existing else "registered" for name in cancelled}
        named = ", ".join(f"{name} ({kind} model)" for name, kind in kinds.items())
        rule = f"{rule}; {named} is in both chains and cancels"
    twice = {**registered_twice(arm.arm, spends), **registered_twice(base.arm, spends)}
    for run, names in twice.items():
        rule = f"{rule}; {', '.join(names)} are registered with one run ({run}), which counts once"
    more = {
        "c_opt": c_opt(arm.arm, base.arm, spends),
        "all_in_arm": all_in(arm.arm, spends, cancelled=cancelled),
        "all_in_base": all_in(base.arm, spends, cancelled=cancelled),
    }
    saving = figures.pop("saving").to_json()
    return TrainingSaving(
        value=saving["value"],
        provenance=saving["provenance"],
        why_missing=saving["why_missing"],
        ci=None,
        **{name: value.to_json() for name, value in {**figures, **more}.items()},
        rule=f"{rule}; {ONE_RUN}",
    )


def _training_null(why: str, arm: Trained, base: Trained, spends: Spends) -> TrainingSaving:
    figures = _saved(arm.arm, base.arm, (spends, spends)) | dict.fromkeys(
        ("saving", "new_spend_saving", "systems", "algorithmic", "bound", "less_others"), null(why)
    )
    return _training_json(figures, "none applies", arm, base, spends)


def unless_worse(training: TrainingSaving, quality: ComparedQuality) -> TrainingSaving:
    """Take a saving back where the arm is worse on test: equal on a sample of validation was not
    equal.

    Both readings are point estimates; what the interval on test leaves open is said in the rule.
    """
    if (training["value"] is None and training["algorithmic"]["value"] is None) or quality[
        "value"
    ] is None:
        return training
    if quality["value"] >= -quality["margin"]:
        open_still = quality["ci"] is None or quality["ci"][0] <= -quality["margin"]
        more = "; whether quality is equal on the test split is undecided" if open_still else ""
        return {**training, "rule": training["rule"] + more}
    shortfall = f"{-quality['value']:.3g} on the test split, margin {quality['margin']:g}"
    why = f"censored: the arm is worse than the base by {shortfall}"
    gone = null(why).to_json()
    hidden: TrainingSaving = {
        **training,
        "new_spend_saving": gone,
        "systems": gone,
        "algorithmic": gone,
    }
    if "amortised" in hidden:
        hidden["amortised"] = gone
    if "less_others" in hidden:
        hidden["less_others"] = gone
    if training["value"] is None:  # of time it had its reason before
        return hidden
    return {**hidden, **gone, "ci": None, "bound": Value.from_json(training).to_json()}


def combine_training(per_seed: Sequence[TrainingSaving]) -> TrainingSaving:
    """Return `training_saving` over seeds, with a t interval of the saving (seeds are the pairs).

    Savings are shown as 1 - exp(mean ln(arm/base)), costs as means. Ratios multiply, so that the
    mean of shares is biased: at a spread of 20% two equal arms seem to cost 2% more. Means of
    logarithms also keep (1 - systems)(1 - algorithmic) = 1 - saving. One seed is returned as it is.
    A figure that is null with one seed is null, with the reason. Where seeds are censored, `bound`
    is made of their bounds and the others' savings.
    """
    if len(per_seed) == 1:
        return {**per_seed[0]}
    saving = _mean_saving(per_seed)
    if saving.value is None:
        num_null = sum(result["value"] is None for result in per_seed)
        saving = null(f"{saving.why_missing} (in {num_null} of {len(per_seed)} seeds)")
    parts = [_figures_in(result) for result in per_seed]
    means = {
        name: (_mean_saving if name in _SAVINGS else _mean)(
            [each[name] for each in parts]
        ).to_json()
        for name in parts[0]
    }
    if saving.value is None:
        known: list[Figure] = [
            result if result["value"] is not None else result["bound"] for result in per_seed
        ]
        means["bound"] = (
            _mean_saving(known) if all(each["value"] is not None for each in known) else saving
        ).to_json()
        # there, new spending alone stands in for nothing
        if any(result["value"] is not None for result in per_seed):
            means["new_spend_saving"] = saving.to_json()
    ci = (
        None
        if saving.value is None
        else _ends_over_seeds([each["value"] for each in per_seed if each["value"] is not None])
    )
    rule = per_seed[0]["rule"].replace(
        ONE_RUN, f"mean of {len(per_seed)} seeds, the first one's Q shown"
    )
    whole = saving.to_json()
    return TrainingSaving(
        value=whole["value"],
        provenance=whole["provenance"],
        why_missing=whole["why_missing"],
        ci=ci,
        **means,
        rule=rule,
    )


def _figures_in(saving: Mapping[str, Any]) -> Figures:
    """Return the figures beside a training saving itself, by name."""
    own = ("value", "provenance", "why_missing", "ci", "rule")
    return {name: part for name, part in saving.items() if name not in own}


_SAVINGS = frozenset({"new_spend_saving", "systems", "algorithmic", "bound", "amortised"})
"""Figures of `training_saving` that are shares of the base's, beside the saving itself."""


def _mean_saving(per_seed: Sequence[Figure]) -> Value:
    """Return 1 - exp(mean ln(1 - saving)); 1 where an arm cost nothing with some seed."""
    mean = _mean(
        [
            {**raw, "value": None if raw["value"] is None else _log_ratio(raw["value"])}
            for raw in per_seed
        ]
    )
    return mean if mean.value is None else Value(-math.expm1(mean.value), mean.provenance)


def _log_ratio(saving: float) -> float:
    """Return ln(arm/base)."""
    return math.log1p(-saving) if saving < 1 else -math.inf


def _ends_over_seeds(savings: Sequence[float]) -> list[float] | None:
    """Return the t interval of savings over seeds; None where an arm cost nothing, which has no
    logarithm.
    """
    logs = [_log_ratio(saving) for saving in savings]
    if not all(map(math.isfinite, logs)):
        return None
    mean = statistics.mean_interval(logs)
    # 1 - exp(x) falls as x rises: the ends change places.
    return [-math.expm1(mean.high), -math.expm1(mean.low)]


def _mean(per_seed: Sequence[Figure]) -> Value:
    values = [Value.from_json(raw) for raw in per_seed]
    return derive(lambda *readings: math.fsum(readings) / len(readings), *values)


# -- serving and payback --------------------------------------------------------------------------


def serving_saving(arm_seconds: npt.ArrayLike, base_seconds: npt.ArrayLike) -> ServingSaving:
    """Return the share of the base's serving time that the arm saves, with its interval over
    blocks.

    Args:
        arm_seconds: (blocks, 2): device-seconds of the two readings of each block.
        base_seconds: (blocks, 2): the base's.

    Returns:
        A value with `ci`, `blocks`, and `sd_log`: the standard deviation of a block's ln(arm/base).
    """
    saving = statistics.abba_saving(arm_seconds, base_seconds)
    value = Value(saving.estimate, Provenance.DERIVED)
    log_ratios = statistics.block_log_ratios(arm_seconds, base_seconds)
    return {
        **value.to_json(),
        "ci": [saving.low, saving.high],
        "blocks": len(log_ratios),
        "sd_log": float(log_ratios.std(ddof=1)),
    }


def no_serving_saving(why: str) -> ServingSaving:
    """Return what `serving_saving` does where there is nothing to compare, with the reason."""
    return {**null(why).to_json(), "ci": None, "blocks": 0}


LEAST_MEMORY = 0.05
"""Share of the base's memory from which on less of it counts as a saving: allocators round by a few
per cent.
"""


def speedup(serving: ServingSaving, arm: Figures, base: Figures) -> Speedup:
    """Return whether a quantized artifact saves time or memory at the declared load against what it
    was made from.

    Time is saved where the whole interval of the serving saving is above zero; memory where
    `LEAST_MEMORY` of the base's peak (or, where a device does not count that, of its weights) is.

    Args:
        serving: The serving saving, as `serving_saving` returns it.
        arm: The arm's serving figures, as result.json holds them.
        base: The base's.

    Returns:
        `saves_time`, `memory` (the share saved, a value), and `no_speedup`: neither is saved.
    """
    saves_time = serving["value"] is not None and serving["ci"] is not None and serving["ci"][0] > 0
    # One kind of figure for both sides: a peak is never compared with weights.
    counted = arm["peak_bytes"]["value"] is not None and base["peak_bytes"]["value"] is not None
    name = "peak_bytes" if counted else "weights_bytes"
    memory = derive(
        lambda ours, theirs: 1 - ours / theirs,
        *(Value.from_json(side[name]) for side in (arm, base)),
    )
    saves_memory = memory.value is not None and memory.value >= LEAST_MEMORY
    return {
        "saves_time": saves_time,
        "memory": {**memory.to_json(), "of": name},
        "no_speedup": not (saves_time or saves_memory),
    }


def payback(
    c_opt: Value,
    c_base: Value,
    serving: ServingSaving,
    *,
    unit: str,
    volume: float | None = None,
    rate: float | None = None,
) -> Payback:
    """Return the units after which serving has repaid the extra spending: C_opt / (c_base - c_arm).

    What a unit costs less, c_base - c_arm, is the base's cost times the saving as it is reported,
    so that both always have the same sign. The difference of the arms' means may have the other
    one: a reading that was held up moves a mean more than it moves the mean log-ratio.

    Args:
        c_opt: C_opt(arm | base), device-hours.
        c_base: What the base takes to serve one unit, device-seconds.
        serving: The serving saving, as `serving_saving` returns it.
        unit: `token` or `example`.
        volume: Units declared to be served.
        rate: Units a second declared to be served.

    Returns:
        A value with `unit`; `p_net_positive`: the probability that serving `volume` units saves
        more than c_opt, given how uncertain the serving saving is (c_opt, from one run, is taken as
        it is); and `replicas_saved`: how many devices fewer, each fully busy and counted whole,
        serve `rate`.
    """
    saving = Value.from_json(serving)
    if saving.value is not None and saving.value <= 0:
        # Known before C_opt is: no volume pays back where serving costs as much or more.
        units = null("never: not cheaper")
    else:
        units = derive(
            # 0 where the arm was cheaper to make as well
            lambda o, c, s: max(0.0, SECONDS_PER_HOUR * o / (c * s)),
            c_opt,
            c_base,
            saving,
        )
    return {
        **units.to_json(),
        "unit": unit,
        "p_net_positive": _p_net_positive(c_opt, c_base, serving, volume).to_json(),
        "replicas_saved": _replicas_saved(c_base, saving, rate).to_json(),
    }


def _replicas_saved(c_base: Value, saving: Value, rate: float | None) -> Value:
    if rate is None:
        return null("serving.rate is not declared")
    return derive(lambda c, s: math.ceil(rate * c) - math.ceil(rate * c * (1 - s)), c_base, saving)


def _p_net_positive(
    c_opt: Value, c_base: Value, serving: ServingSaving, volume: float | None
) -> Value:
    """Return P(volume x c_base x saving > c_opt): r = ln(1 - saving) is t-distributed about its
    estimate.
    """
    if volume is None:
        return null("serving.volume is not declared")
    if c_opt.value is None or c_base.value is None:
        return null(c_opt.why_missing or c_base.why_missing or "")
    if serving["value"] is None:
        return null(serving["why_missing"] or "")
    # the saving at which nothing is left over
    needed = SECONDS_PER_HOUR * c_opt.value / (volume * c_base.value)
    # Serving would have to cost nothing or less.
    if needed >= 1:
        return estimated(0.0)
    assert "sd_log" in serving, "what was compared has its spread"
    degrees, error = serving["blocks"] - 1, serving["sd_log"] / math.sqrt(serving["blocks"])
    # In ln(arm/base), where the saving's estimate is t-distributed.
    distance = math.log1p(-needed) - math.log1p(-serving["value"])
    if error == 0:
        return estimated(float(distance > 0))
    return estimated(float(special.stdtr(degrees, distance / error)))
