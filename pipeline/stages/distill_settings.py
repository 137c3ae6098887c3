"""Settings of a distillation, and what a run asks of it; `distill.py` is the stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from pipeline.config.arms import STUDENT_INIT
from pipeline.config.settings.distillation import Divergence, HeadKernel
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.ranges import at_least_0, fraction, positive
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import Compile
from pipeline.errors import UserError
from pipeline.stages.base import (
    CACHE,
    TEACHER,
    BeforeRun,
    Elsewhere,
    Reference,
    Stage,
    Workload,
    config_of,
    is_base_shaped,
)
from pipeline.stages.capture_settings import CaptureSettings
from pipeline.stages.settings import (
    TrainingOverrides,
    check_classes,
    check_training,
    refuse_native,
    training_settings,
)

if TYPE_CHECKING:
    from pipeline.store.artifacts import Artifact

# ruff: noqa: UP045


MIXTURES = {Divergence.jsd: 0.5, Divergence.skewed_kl: 0.1, Divergence.skewed_reverse_kl: 0.1}
"""Divergences that mix both distributions, with the share they take where none is given."""


@dataclass(kw_only=True, slots=True)
class DistillSettings(TrainingOverrides):
    """Settings of a stage that trains on a teacher's predictions."""

    model: str = STUDENT_INIT  # starts from: student_init, base, or an earlier stage
    teacher: str = "teacher"  # base, or an earlier stage
    divergence: Divergence = Divergence.forward_kl  # between the teacher's and its predictions
    # jsd: beta, the teacher's share (null: 0.5); skewed_*: alpha (null: 0.1)
    mixture: Optional[float] = None
    temperature: float = positive(1.0)  # divides both models' logits
    ce_weight: float = fraction(0.5)  # weight of the hard labels; 1 - ce_weight is the teacher's
    # weight of the hidden-state loss; 0: no such loss
    hidden_weight: float = at_least_0(0.0)
    # which layers: null (evenly spread), last, or the teacher's layer for each of the student's
    layer_map: Any = None
    # weight of the attention-relation loss (MiniLMv2) on the student's last layer; 0: no such loss
    relation_weight: float = at_least_0(0.0)
    # relation heads; null: as many as the teacher's attention heads
    relation_heads: Optional[int] = positive(None)
    relation_layer: Optional[int] = at_least_0(None)  # the teacher's, from 0; null: its last
    # changes linearly to temperature; null: temperature from the start
    start_temperature: Optional[float] = positive(None)
    start_ce_weight: Optional[float] = fraction(None)  # likewise, to ce_weight
    # share of the steps after which both stay constant
    ramp_fraction: float = field(default=0.5, metadata={"above": 0, "max": 0.9})
    teacher_precision: Optional[Precision] = None  # null: as this stage trains
    # kernel of the loss; auto: on CUDA the fastest that agrees with the definition
    head: HeadKernel = HeadKernel.auto
    # share of the steps on text that the student generates
    on_policy: float = fraction(0.0)
    # tokens generated at most; null: half of sequence_length
    on_policy_length: Optional[int] = positive(None)
    on_policy_temperature: Optional[float] = positive(None)  # of generating; null: 1
    # a JSONL of texts that any model generated, read in place of train; no teacher is read
    completions: Optional[str] = None
    # an earlier capture stage; null: the teacher runs in every step
    cache: Optional[str] = None
    allow_weak_teacher: bool = (
        False  # train even with a teacher that is no better than the student's start
    )

    def references(self, run: Run) -> dict[str, Reference]:
        """Return the teacher and its cache, unless texts teach, and what the weights start from."""
        named = TrainingOverrides.references(self, run)
        if self.completions is not None:
            return named
        teacher = {TEACHER: Reference(self.teacher, TEACHER)}
        if self.cache is not None:
            kind = CaptureSettings.makes
            teacher[CACHE] = Reference(self.cache, CACHE, kind=kind, instead="null")
        return {**teacher, **named}

    def learns_from(self) -> str | None:
        """Return the teacher."""
        return self.teacher

    def made_elsewhere(self, name: str, run: Run) -> list[Elsewhere]:
        """Return the student's given weights, and completions: some model wrote them."""
        found = TrainingOverrides.made_elsewhere(self, name, run)
        if self.completions is not None:
            found.append(Elsewhere(f"{name}'s completions", unknown="made by a model elsewhere"))
        return found

    def no_effect(self, setting: str, run: Run) -> str | None:
        """Return why a setting of the teacher's signal has no effect."""
        if setting == "ramp_fraction" and (self.start_temperature, self.start_ce_weight) == (
            None,
            None,
        ):
            return "without start_temperature or start_ce_weight"
        of_a_teacher = ("divergence", "temperature", "ce_weight", "teacher", "allow_weak_teacher")
        if self.completions is not None and setting in of_a_teacher:
            return "with completions: no teacher's distribution is there"
        return TrainingOverrides.no_effect(self, setting, run)

    def files(self) -> dict[str, str]:
        """Return that of the completions."""
        return {} if self.completions is None else {"completions": self.completions}

    def key_settings(self, run: Run, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Return what decides the student: completions by their content."""
        from pipeline.data.completions import file_digest

        settings = TrainingOverrides.key_settings(self, run, inputs)
        settings.pop("allow_weak_teacher")
        if self.completions is not None:
            settings["completions"] = file_digest(self.completions)
        return settings

    def refuse_device(self, key: str, run: Run, device: Any) -> None:
        """Refuse a precision or a kernel of the head that cannot run here."""
        from pipeline.distillation.kernels import why_not

        TrainingOverrides.refuse_device(self, key, run, device)
        reason = why_not(self.head, device)
        if reason is not None:
            raise UserError(f"{key}.head", reason, "leave it auto")

    def preflight(self, key: str, known: BeforeRun) -> None:
        """Refuse completions that cannot be read, or that hold what the student is measured on, and
        a map of layers that fits no such models.
        """
        from pipeline.data.completions import check_apart, read_completions

        TrainingOverrides.preflight(self, key, known)
        self._check_layer_map(key, known)
        if self.completions is not None:
            name = f"{key}.completions"
            given = read_completions(self.completions, known.run.data, name)
            check_apart(given, known.data, name)

    def _check_layer_map(self, key: str, known: BeforeRun) -> None:
        """Refuse a map of layers where the layers of both models can be counted before they are
        made; else it is looked at when the stage's turn comes.
        """
        is_known = is_base_shaped(self.teacher, known.run)
        if not self.hidden_weight or self.layer_map is None or not is_known:
            return
        from pipeline.distillation.hidden import layer_pairs
        from pipeline.models.layers import layer_count

        trained = self.makes_config(known)
        if trained is not None:
            counts = layer_count(trained), layer_count(known.config)
            layer_pairs(self.layer_map, *counts, f"{key}.layer_map")

    def workload(self, name: str, known: BeforeRun) -> Workload | None:
        """Return its training, beside the teacher that it reads in every step."""
        own = TrainingOverrides.workload(self, name, known)
        if own is None:
            return None
        from pipeline.training.precision import frozen

        teacher = None
        if self.completions is None and self.cache is None:
            config = config_of(self.teacher, known)
            if config is None:
                return None
            precision = self.teacher_precision or own.precision
            teacher = (config, frozen(precision, known.device))
        return replace(own, teacher=teacher, writes=self.on_policy > 0)

    def trial(self, steps: int, run: Run) -> Stage | None:
        """Return itself with so few steps, whatever the teacher knows."""
        found = TrainingOverrides.trial(self, steps, run)
        return None if found is None else replace(found, allow_weak_teacher=True)

    def is_split(self, run: Run) -> bool:
        """Return whether there are steps to share."""
        return self.trains(run)

    def check(self, key: str, run: Run) -> None:
        """Refuse what this stage cannot do, before any device is touched.

        Raises:
            UserError: Naming the setting.
        """
        check_classes(key, run)
        check_training(self, key, run)
        self._check_inside(key, run)
        self._check_on_policy(key, run)
        self._check_completions(key, run)
        self._check_cache(key, run)
        self._check_head(key, run)
        refuse_native(self.teacher_precision, f"{key}.teacher_precision")
        if self.mixture is None:
            return
        if self.divergence not in MIXTURES:
            known = ", ".join(each.value for each in MIXTURES)
            raise UserError(
                f"{key}.mixture",
                f"{self.divergence.value} mixes nothing",
                f"drop it, or use {known}",
            )
        if not 0 < self.mixture < 1:
            raise UserError(
                f"{key}.mixture", f"{self.mixture} is out of range", "give a number between 0 and 1"
            )

    def _check_inside(self, key: str, run: Run) -> None:
        """Refuse what would have no effect, or cannot be read where there is no live teacher."""
        needs = {
            "layer_map": "hidden_weight",
            "relation_heads": "relation_weight",
            "relation_layer": "relation_weight",
        }
        for name, weight in needs.items():
            if getattr(self, name) is not None and not getattr(self, weight):
                raise UserError(
                    f"{key}.{name}", f"has no effect without {weight}", "give one, or leave it out"
                )
        for name in ("hidden_weight", "relation_weight"):
            if getattr(self, name) and (self.cache is not None or self.completions is not None):
                problem = (
                    "needs what a teacher computes inside, which neither a cache nor a text holds"
                )
                raise UserError(
                    f"{key}.{name}", problem, "train beside a live teacher, or leave it out"
                )
        if self.relation_weight and training_settings(self, run).compile is Compile.always:
            problem = "what a compiled model computes inside cannot be read"
            raise UserError(f"{key}.relation_weight", problem, "leave compile at auto")

    def _check_on_policy(self, key: str, run: Run) -> None:
        if not self.on_policy:
            for name in ("on_policy_length", "on_policy_temperature"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{key}.{name}",
                        "has no effect without on_policy",
                        "give one, or leave it out",
                    )
            return
        name, settings = f"{key}.on_policy", training_settings(self, run)
        if not run.task.kind.is_language:
            raise UserError(
                name,
                f"a {run.task.kind.word} writes nothing",
                "leave it out, or use task=causal_lm",
            )
        if self.cache is not None or self.completions is not None:
            problem = (
                "the teacher judges what only then is written, which neither a cache nor a text"
                " holds"
            )
            raise UserError(name, problem, "train beside a live teacher, or leave it out")
        if settings.compile is Compile.always:
            raise UserError(
                name, "writing would compile anew for every length", "leave compile at auto"
            )
        for other in ("start_batch_size", "start_sequence_length"):
            if getattr(settings, other) is not None:
                raise UserError(
                    f"{key}.{other}",
                    "is of steps that read text alone",
                    "leave it out, or on_policy: 0",
                )
        if (self.on_policy_length or 1) >= settings.sequence_length:
            problem = (
                f"{self.on_policy_length} leaves no prompt in sequence_length"
                f" {settings.sequence_length}"
            )
            raise UserError(f"{key}.on_policy_length", problem, "give less")

    def _check_completions(self, key: str, run: Run) -> None:
        if self.completions is None:
            return
        name = f"{key}.completions"
        if not run.task.kind.is_language:
            raise UserError(
                name,
                f"a {run.task.kind.word} completes nothing",
                "leave it out, or use task=causal_lm",
            )
        if self.cache is not None:
            raise UserError(name, "stands in for a teacher, and so does cache", "give one of them")
        for other in ("start_temperature", "start_ce_weight", "mixture", "teacher_precision"):
            if getattr(self, other) is not None:
                raise UserError(
                    f"{key}.{other}",
                    "has no effect without a teacher's distribution",
                    "leave it out",
                )
        if not Path(self.completions).expanduser().is_file():
            raise UserError(name, f"{self.completions} is not a file", "give a .jsonl file")

    def _check_head(self, key: str, run: Run) -> None:
        name = f"{key}.head"
        if self.head is HeadKernel.auto:
            return
        if not run.task.kind.is_language:
            raise UserError(
                name,
                "has no effect: the logits of a few classes need no fused head",
                "leave it auto",
            )
        if self.cache is not None and self.head is HeadKernel.liger:
            raise UserError(name, "Liger reads no cache", "use auto, torch or triton")
        if self.head is HeadKernel.liger and self.divergence in (
            Divergence.skewed_kl,
            Divergence.skewed_reverse_kl,
        ):
            raise UserError(
                name, f"Liger has no {self.divergence.value}", "use auto, or another divergence"
            )

    def _check_cache(self, key: str, run: Run) -> None:
        if self.cache is None:
            return
        stage = run.stages.get(self.cache)
        if not isinstance(stage, CaptureSettings):
            named = [name for name, each in run.stages.items() if isinstance(each, CaptureSettings)]
            remedy = (
                f"name one of {', '.join(named)}"
                if named
                else "place a stage of type capture before it"
            )
            raise UserError(f"{key}.cache", f"{self.cache!r} is no capture stage", remedy)
        if self.divergence is not Divergence.forward_kl:
            problem = (
                f"{self.divergence.value} needs the teacher's whole distribution, which a cache"
                " does not hold"
            )
            raise UserError(f"{key}.divergence", problem, "use forward_kl, or cache: null")
        if self.teacher_precision is not None:
            raise UserError(
                f"{key}.teacher_precision",
                "has no effect with a cache",
                f"set stages.{self.cache}.precision",
            )
        self._check_cached_schedule(key, run)
        if stage.teacher != self.teacher:
            raise UserError(
                f"{key}.cache",
                f"{self.cache} captures {stage.teacher}, not {self.teacher}",
                "name one teacher",
            )
        given = stage.temperature_in_force(run) if stage.like in run.stages else self.temperature
        if given != self.temperature:
            problem = f"{self.temperature:g} is not the temperature of {self.cache} ({given:g})"
            raise UserError(f"{key}.temperature", problem, "give both the same")

    def _check_cached_schedule(self, key: str, run: Run) -> None:
        settings = training_settings(self, run)
        for name in ("start_batch_size", "start_sequence_length"):
            if getattr(settings, name) is not None:
                problem = (
                    "a cache holds what a teacher said of windows of one length, in batches of one"
                    " size"
                )
                raise UserError(f"{key}.{name}", problem, "leave it out, or set cache: null")
        if self.start_temperature is not None:
            raise UserError(
                f"{key}.start_temperature",
                "a cache has one temperature",
                "leave it out, or cache: null",
            )
