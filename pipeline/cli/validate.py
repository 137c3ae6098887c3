"""What a composed run is refused for before any device is touched: ranges, names, references,
files.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.config.arms import BASE, BEST_16_BIT, RESERVED
from pipeline.config.owner import OWNER, check_owner
from pipeline.config.redaction import has_login
from pipeline.config.settings.data import DataConfig
from pipeline.config.settings.hardware import ALL
from pipeline.config.settings.model import StudentConfig
from pipeline.config.settings.ranges import MAX_SEED, check_ranges
from pipeline.config.settings.run import Run, scored_length
from pipeline.config.settings.training import check_checkpoint_every
from pipeline.config.text_files import why_no_file
from pipeline.data.mappings import mapping, split_names
from pipeline.errors import UserError, one_line
from pipeline.evaluation.quality.tasks import check_tasks
from pipeline.evaluation.serving.engine import read_results
from pipeline.gate.checks import check_gate
from pipeline.ledger.cost import check_cost
from pipeline.ledger.devices.table import KINDS, is_device
from pipeline.models.load import check_local
from pipeline.stages.base import Stage, stages_of
from pipeline.stages.drafts import draft_of
from pipeline.stages.settings import refuse_native
from pipeline.stages.table import STAGES
from pipeline.store.artifacts import MODEL


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean X?` for the closest known word, else the known words, or where many are
    listed.
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(known)}" if len(known) <= 20 else "--cfg job lists them all"


def validate(run: Run) -> None:
    """Refuse a run that cannot work, and whose stages are stages (`check_types`).

    Raises:
        UserError: One line: the key, what is wrong with it, what would be right.
    """
    check_ranges(run)
    check_checkpoint_every(run.training.checkpoint_every, "training.checkpoint_every")
    if run.parallel.offload and not run.parallel.mode.shards:
        problem = f"has no effect with parallel.mode={run.parallel.mode.value}"
        raise UserError("parallel.offload", problem, "give parallel.mode=fsdp")
    _check_stages(run)
    _check_arms(run)
    _check_sources(run)
    _check_rest(run)


def check_types(run: Run) -> None:
    """Refuse what stands among the stages and is none: whoever asks a stage anything asks after
    this.

    Raises:
        UserError: Naming the stage.
    """
    for name, stage in run.stages.items():
        key = f"stages.{name}"
        if not isinstance(stage, Stage):
            raise UserError(
                key, "has no type", f"add /stage@{key}: {'|'.join(STAGES)} to the recipe's defaults"
            )


def _check_stages(run: Run) -> None:
    if not run.stages:
        raise UserError(
            "stages", "the recipe places none", "add defaults: [/stage@stages.NAME: train]"
        )
    earlier: list[str] = [BASE]
    for name, stage in stages_of(run).items():
        key = f"stages.{name}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", name) or name in RESERVED:
            raise UserError(
                key,
                "is no name for a stage",
                f"use letters, digits and _, not {' or '.join(RESERVED)}",
            )
        check_ranges(stage, f"{key}.")
        stage.check(key, run)
        _check_precisions(stage, key, run)
        _check_references(stage, key, run, earlier)
        earlier.append(name)


def _check_precisions(stage: Stage, key: str, run: Run) -> None:
    """Refuse `native` of a stage: it is decided once, for all that name none."""
    for each in stage.precisions(key, run):
        if each.is_own:
            refuse_native(each.precision, each.setting)


def _check_references(stage: Stage, key: str, run: Run, earlier: list[str]) -> None:
    """Refuse a stage that reads, or takes settings from, a stage that does not exist, comes later,
    or makes something else.
    """
    stages = stages_of(run)
    references = list(stage.references(run).values())
    for each in references:
        named = stages.get(each.arm)
        if each.reads and named is not None and named.makes != each.kind and each.kind == MODEL:
            problem = f"{each.arm!r} makes a {named.makes.replace('_', ' ')}, not a model"
            raise UserError(each.full_setting(key), problem, "name a stage that makes a model")
    for each in references:
        if each.arm in earlier or not each.comes_earlier:
            continue
        there = each.arm in run.stages
        problem = (
            f"{each.arm!r} comes later in the recipe"
            if there
            else f"there is no stage {each.arm!r}"
        )
        raise UserError(each.full_setting(key), problem, did_you_mean(each.arm, earlier))


def _check_arms(run: Run) -> None:
    arms = [name for name, stage in stages_of(run).items() if stage.makes == MODEL]
    if run.primary_arm not in arms:
        raise UserError(
            "primary_arm",
            f"there is no stage {run.primary_arm!r}",
            did_you_mean(run.primary_arm, arms),
        )
    for index, pair in enumerate(run.compare):
        for side in ("arm", "base"):
            arm = getattr(pair, side)
            if side == "base" and arm == BEST_16_BIT:
                _check_quantized(index, pair.arm, run)
            elif arm not in arms:
                raise UserError(
                    f"compare[{index}].{side}",
                    f"there is no stage {arm!r}",
                    did_you_mean(arm, arms),
                )
        if pair.arm == pair.base:
            raise UserError(
                f"compare[{index}]", f"{pair.arm!r} is compared with itself", "name two arms"
            )


def _check_quantized(index: int, arm: str, run: Run) -> None:
    """Refuse to read anything but a quantized model against 16-bit forms of its source."""
    stage = stages_of(run).get(arm)
    if stage is None or stage.reference() is None:
        problem = f"{BEST_16_BIT} is for what a quantize stage makes, and {arm!r} is none"
        raise UserError(f"compare[{index}].base", problem, "name an arm")


def _check_sources(run: Run) -> None:
    places = {
        "data.path": run.data.path,
        "data.hub": run.data.hub,
        "model.path": run.model.path,
        "student.path": run.student.path,
        "tracking.root": run.tracking.root,
    }
    for key, place in places.items():
        if place is not None and not place.strip():
            raise UserError(key, "is empty", f"give a place, or leave {key} out")
    if run.data.path is not None and not Path(run.data.path).expanduser().exists():
        raise UserError(
            "data.path", f"{run.data.path} does not exist", "give a file or a folder of splits"
        )
    _check_regular(run)
    if run.data.hub is not None and importlib.util.find_spec("datasets") is None:
        raise UserError("data.hub", "the library datasets is not installed", "pip install datasets")
    if run.data.path is not None and run.data.hub is not None:
        raise UserError("data.hub", "does not go with data.path", "give one of the two")
    beside = {
        "data.subset": (run.data.subset, "data.path or data.hub", run.data.path or run.data.hub),
        "model.revision": (run.model.revision, "model.path", run.model.path),
    }
    for key, (given, needs, place) in beside.items():
        if given is not None and place is None:
            raise UserError(
                key, f"has no effect without {needs}", f"give {needs}, or leave {key} out"
            )
    named = {
        "path": run.student.path is not None,
        "config": bool(run.student.config),
        "layers": run.student.layers != StudentConfig().layers,
    }
    if sum(named.values()) > 1:
        both = [f"student.{name}" for name, is_named in named.items() if is_named]
        raise UserError(both[1], f"does not go with {both[0]}", "give one of the two")
    for key, path in (("model.path", run.model.path), ("student.path", run.student.path)):
        if path is not None:
            check_local(path, key)
    embedded = run.data.path is None and run.data.hub is None
    _check_data(run.data, embedded=embedded)
    right = run.task.kind.embedded
    if embedded and run.data.name != right:
        raise UserError(
            "task", f"data={run.data.name} is not for {run.task.value}", f"use data={right}"
        )


def _check_regular(run: Run) -> None:
    """Refuse a place that nobody can read to its end: a pipe, a device.

    Raises:
        UserError: Naming the setting.
    """
    named = [("data.path", run.data.path)]
    for name, stage in stages_of(run).items():
        named += [(f"stages.{name}.{file}", path) for file, path in stage.files().items()]
    for key, given in named:
        place = None if given is None else Path(given).expanduser()
        if place is not None and place.exists() and not (place.is_dir() and key == "data.path"):
            why = why_no_file(place)
            if why is not None:
                raise UserError(key, f"{given} {why}", "give a file")


def _check_data(data: DataConfig, *, embedded: bool) -> None:
    """Read the settings of names by names, and refuse what says how to read files where none are
    read.
    """
    data.splits, data.columns, data.label_map = (
        mapping(getattr(data, name), f"data.{name}") for name in ("splits", "columns", "label_map")
    )
    split_names(data)
    default = DataConfig()
    for name in ("splits", "format", "columns", "label_map", "group_field"):
        if embedded and getattr(data, name) != getattr(default, name):
            raise UserError(
                f"data.{name}",
                "has no effect on the embedded data",
                f"give data.path, or leave data.{name} out",
            )


def _check_stride(run: Run) -> None:
    """Refuse a stride that would leave tokens out, or that nothing is read with."""
    stride, length = run.quality.stride, scored_length(run)
    if stride is None:
        return
    if not run.task.kind.is_language:
        raise UserError(
            "quality.stride", f"has no effect with task={run.task.value}", "leave it out"
        )
    if stride > length:
        problem = f"{stride} is longer than a window of {length} tokens"
        raise UserError(
            "quality.stride", problem, f"give at most {length}, or raise quality.sequence_length"
        )


def _check_rest(run: Run) -> None:
    check_gate(run)
    _check_stride(run)
    check_tasks(run.quality, run.task)
    if run.seeds is not None and (
        not run.seeds or len(set(run.seeds)) != len(run.seeds) or min(run.seeds) < 0
    ):
        raise UserError(
            "seeds", f"{run.seeds} is no list of different seeds", "give e.g. seeds=[0,1,2]"
        )
    if run.seeds is not None and max(run.seeds) > MAX_SEED:
        raise UserError(
            "seeds", f"{max(run.seeds)} is out of range", f"give numbers of at most {MAX_SEED}"
        )
    if run.tracking.uri is not None and has_login(run.tracking.uri):
        raise UserError(
            "tracking.uri",
            "holds a login, which would land in files that others read",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead",
        )
    check_cost(run.cost)
    check_owner(
        {name: getattr(run.tracking, name) for name in OWNER}, required=run.tracking.require_owner
    )
    wall, reserve = run.budget.wall_seconds, run.budget.wall_reserve_seconds
    if wall is not None and reserve >= wall:
        problem = f"{reserve:g} s are kept of {wall:g} s: nothing is left to run in"
        raise UserError("budget.wall_reserve_seconds", problem, "give a smaller number")
    devices = run.hardware.devices
    if devices != ALL and (
        isinstance(devices, bool) or not isinstance(devices, int) or devices < 1
    ):
        problem = f"{one_line(devices, 40)!r} is no number of devices"
        raise UserError("hardware.devices", problem, f"give 1, 2, ..., or {ALL}")
    if not is_device(run.hardware.device):
        raise UserError(
            "hardware.device",
            f"{run.hardware.device!r} is no device",
            f"give auto, {', '.join(KINDS)}, or one of several as cuda:1",
        )
    if any(batch < 1 for batch in run.serving.batches):
        raise UserError(
            "serving.batches", f"{run.serving.batches} has a batch below 1", "give e.g. [1,8,32]"
        )
    read_results(run)
    draft_of(run)
