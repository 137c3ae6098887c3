"""What a release check is refused for before any device is touched. Imports nothing heavy: a
refusal must be quick.
"""

from __future__ import annotations

import math
import os.path
from pathlib import Path

from pipeline.config.arms import BASELINE, CANDIDATE
from pipeline.config.settings.policy import Direction, MetricRule, PolicyConfig
from pipeline.config.settings.run import Run
from pipeline.errors import UserError
from pipeline.ledger.metrics import BY_KEY, DIRECTION, QUALITY_KEYS, TASK
from pipeline.stages.base import stages_of
from pipeline.tasks.table import Task

OF_TASK = {task: task.kind.in_policy() for task in Task}
"""Qualities that a policy can ask for, by task; those of lm-eval tasks beside them."""
ITEMS = {CANDIDATE: "candidate_items", BASELINE: "baseline_items"}


def is_gate(run: Run) -> bool:
    """Whether a run judges a release."""
    return any(stage.takes_release() for stage in stages_of(run).values())


def check_gate(run: Run) -> None:
    """Refuse a release check that cannot work, and settings of one elsewhere.

    Raises:
        UserError: Naming the setting.
    """
    given = {
        "candidate": run.candidate,
        "baseline": run.baseline,
        **{key: getattr(run, key) for key in ITEMS.values()},
        "promote": run.promote or None,
        "bootstrap": run.bootstrap or None,
    }
    if not is_gate(run):
        named = next((key for key, value in given.items() if value is not None), None)
        if named is not None:
            raise UserError(
                named, f"has no effect in recipe={run.recipe}", "it is for recipe=release_check"
            )
        return
    for key in (CANDIDATE, BASELINE):
        if not str(given[key] or "").strip():
            raise UserError(
                key, "is not given", f"give {key}=REF: a folder, a run's id, models:/NAME@champion"
            )
        if key not in run.stages:
            raise UserError(
                f"stages.{key}", "is missing", "place both: /stage@stages.candidate: release"
            )
    for key in ITEMS.values():
        # false where too long
        if given[key] is not None and not os.path.isfile(Path(str(given[key])).expanduser()):
            raise UserError(
                key, f"{given[key]} does not exist", "give a file of per-document values"
            )
    if run.seeds is not None:
        raise UserError("seeds", "has no effect here: a release is one artifact", "leave it out")
    check_policy(run)


def check_policy(run: Run) -> None:
    """Refuse a policy that names what is not measured, or asks for nothing.

    Raises:
        UserError: Naming the setting.
    """
    policy = run.policy
    for key, rule in policy.metrics.items():
        _check_metric(key, rule)
        if key.startswith(TASK) and run.task.kind.is_language and not run.quality.tasks:
            raise UserError(
                f"policy.metrics.{key}",
                "is not measured",
                "give its file: quality.tasks=[TASK.yaml]",
            )
    asked = (
        *gating_metrics(policy, run.task),
        policy.training,
        policy.serving,
        policy.memory,
        policy.energy,
        policy.payback_units,
    )
    if all(each is None for each in asked):
        raise UserError(
            "policy",
            f"{policy.name} asks for nothing in {run.task.value}",
            "name a metric or a saving",
        )
    # Both are part of the policy, and so of the key that looks are counted by.
    if run.serving.load != policy.load or run.serving.blocks != policy.blocks:
        raise UserError(
            "serving",
            "load and blocks are the policy's here",
            "set policy.load.* and policy.blocks",
        )
    if run.serving.dtype is not policy.dtype:
        raise UserError(
            "serving.dtype", "is the policy's here", f"set policy.dtype={run.serving.dtype.value}"
        )
    if policy.payback_units is not None and run.serving.volume is not None:
        raise UserError(
            "serving.volume", "the policy states the volume here", "set policy.payback_units"
        )


def _check_metric(key: str, rule: MetricRule) -> None:
    if f"quality/{key}" not in BY_KEY and not key.startswith(TASK):
        known = ", ".join(
            each for each in QUALITY_KEYS if any(each in keys for keys in OF_TASK.values())
        )
        raise UserError(
            f"policy.metrics.{key}",
            "there is no such metric",
            f"known: {known}, task/<task>/<metric>",
        )
    if not key.startswith(TASK) and not any(key in keys for keys in OF_TASK.values()):
        raise UserError(
            f"policy.metrics.{key}", "is not compared document by document", "name another metric"
        )
    if not (math.isfinite(rule.margin) and rule.margin >= 0):
        raise UserError(
            f"policy.metrics.{key}.margin",
            f"{rule.margin} is no margin",
            "give a number of at least 0",
        )
    # Metrics of lm-eval tasks are taken as "higher is better".
    way = 1 if key.startswith(TASK) else DIRECTION[key]
    if rule.direction is not None and (rule.direction is Direction.higher) != (way > 0):
        right = Direction.higher if way > 0 else Direction.lower
        raise UserError(
            f"policy.metrics.{key}.direction",
            f"{rule.direction.value} is better is wrong",
            f"say {right.value}",
        )


def gating_metrics(policy: PolicyConfig, task: Task) -> list[str]:
    """Return the qualities that a policy asks for in a task."""
    return [
        key
        for key in policy.metrics
        if key in OF_TASK[task] or (key.startswith(TASK) and task.kind.is_language)
    ]
