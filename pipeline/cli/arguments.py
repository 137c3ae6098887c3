"""A command line's words as Hydra's grammar reads them, and what of it is not for a command line to
say.

A shell has taken its quotes away: `data.path='a b [1].jsonl'` arrives without them, and Hydra's
grammar takes blanks, brackets, commas and letters beyond ASCII for something else. What a setting
of text was given is text.
"""

from __future__ import annotations

import os.path
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from pipeline.cli.recipes import GROUPS, names_code
from pipeline.errors import Unparsable, UserError

PATHS = (
    "candidate",
    "baseline",
    "candidate_items",
    "baseline_items",
    "data.path",
    "data.hub",
    "model.path",
    "student.path",
    "tracking.root",
    "tracking.uri",
    "store.url",
    "serving.results",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
)
STAGE_PATHS = ("completions", "calibration")  # of any stage
OPEN = ("student.config", "policy.metrics")  # settings whose own keys are the user's
# names by names; `data/mappings.py` reads them
MAPPINGS = ("data.columns", "data.label_map", "data.splits")
HYDRA = ("hydra.verbose", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
"""What a command line may tell Hydra itself; the rest of it names classes, or writes settings in
clear.
"""
_SWEEP = re.compile(
    r"\A(?:choice|range|interval|glob|sort|shuffle|tag|extend_list|int|float|str|bool|json_str)\("
)

OTHER_NAMES = {
    key: tuple(names.split())
    for key, names in {
        "training.learning_rate": "lr learning_rate max_lr base_lr",
        "training.steps": (
            "steps max_steps num_steps train_steps num_train_steps total_steps iters "
            "max_iters max_train_steps iterations"
        ),
        "training.epochs": "epochs num_epochs num_train_epochs max_epochs n_epochs epoch",
        "training.batch_size": (
            "batch_size per_device_train_batch_size train_batch_size global_batch_size"
            " micro_batch_size bs batch"
        ),
        "quality.batch_size": "per_device_eval_batch_size eval_batch_size",
        "training.gradient_accumulation": (
            "gradient_accumulation gradient_accumulation_steps grad_accum accumulate_grad_batches"
            " accumulation_steps"
        ),
        "training.sequence_length": (
            "sequence_length max_length max_seq_length max_seq_len seq_len block_size "
            "cutoff_len model_max_length context_length seq_length"
        ),
        "training.weight_decay": "weight_decay wd",
        "training.warmup_fraction": (
            "warmup_fraction warmup_ratio warmup_steps num_warmup_steps warmup"
        ),
        "training.schedule": "schedule lr_scheduler_type lr_scheduler scheduler",
        "training.max_grad_norm": (
            "max_grad_norm clip_grad_norm grad_clip gradient_clip_val max_gradient_norm"
        ),
        "training.eval_every": (
            "eval_every eval_steps eval_interval val_check_interval evaluation_strategy"
            " eval_strategy"
        ),
        "training.checkpoint_every": "checkpoint_every save_steps save_interval save_strategy",
        "training.optimizer": "optimizer optim optimizer_type",
        "training.activation_checkpointing": "activation_checkpointing gradient_checkpointing",
        "training.compile": "compile torch_compile",
        "tracking.root": (
            "root output_dir out_dir save_dir logging_dir log_dir default_root_dir work_dir"
            " checkpoint_dir output"
        ),
        "tracking.mlflow": "mlflow report_to wandb use_wandb logger",
        "tracking.experiment": "experiment run_name project wandb_project experiment_name",
        "precision=fp16": "fp16 half",
        "precision=bf16": "bf16",
        "precision=tf32": "tf32",
        "precision": "dtype torch_dtype mixed_precision amp",
        "model.path": (
            "model_path model_name_or_path model_name pretrained_model_name_or_path "
            "base_model checkpoint pretrained model_id teacher teacher_model "
            "teacher_name_or_path"
        ),
        "student.path": "student_model student_name_or_path student_path",
        "student.layers": "student_layers num_student_layers",
        "data.path": (
            "data_path dataset_path train_file data_files train_data dataset_dir data_dir file path"
        ),
        "data.hub": "dataset dataset_name datasets hub",
        "data.subset": "subset dataset_config_name dataset_config",
        "data.max_documents": (
            "max_documents max_train_samples max_samples num_samples max_examples"
        ),
        "quality.max_documents": "max_eval_samples",
        "quality.margin": "margin tolerance",
        "hardware.devices": "devices num_gpus gpus nproc_per_node n_gpu num_devices ngpus",
        "hardware.device": "device accelerator no_cuda use_cpu",
        "hardware.num_threads": "num_threads threads",
        "budget.device_hours": "budget device_hours max_hours max_time",
        "seed": "random_seed data_seed manual_seed",
        "stages.student.temperature": "temperature kd_temperature distillation_temperature",
        "stages.student.ce_weight": (
            "ce_weight alpha kd_alpha alpha_ce distillation_alpha kd_weight"
        ),
        "recipe": "config experiment_config",
        "recipe=quantize": "load_in_8bit load_in_4bit quantization bits quant wbits",
    }.items()
}
"""By setting here, what other trainers call it (transformers, TRL, torchtune, nanoGPT, axolotl,
LLaMA-Factory).
"""


def elsewhere(word: str) -> str | None:
    """Return what a setting of other trainers is here, as a sentence, or None."""
    name = word.lstrip("-+~").partition("=")[0].rpartition(".")[2].replace("-", "_").lower()
    here = next((key for key, names in OTHER_NAMES.items() if name in names), None)
    if here is None or here == word.lstrip("-+~").partition("=")[0]:
        return None
    if here not in ("training.epochs",) or "epochs" in _fields_of("training"):
        return f"it is {here if '=' in here else here + '=...'} here"
    return "it is training.steps=... here: an epoch is (documents / training.batch_size) steps"


@cache
def _fields_of(group: str) -> frozenset[str]:
    from pipeline.config.settings.run import Run

    return frozenset(item.name for item in fields(getattr(Run(), group)))


# -- what is text ---------------------------------------------------------------------------------


@cache
def _types() -> dict[str, Any]:
    """Return the type of every setting of `Run` as its class declares it; `stages.*.NAME` are of
    stages.
    """
    from pipeline.config.settings.run import Run
    from pipeline.stages.table import STAGES

    found: dict[str, Any] = {}

    def walk(owner: Any, prefix: str) -> None:
        hints = get_type_hints(type(owner))
        for item in fields(owner):
            value = getattr(owner, item.name)
            if is_dataclass(value):
                walk(value, f"{prefix}{item.name}.")
            else:
                found[prefix + item.name] = hints[item.name]

    walk(Run(), "")
    for stage in STAGES.values():
        walk(stage(), "stages.*.")
    return found


def item_type(key: str) -> Any:
    """Return the type of a list's items (`int`); None where a setting takes no list."""
    hint = _types().get(re.sub(r"\Astages\.\w+\.", "stages.*.", key))
    lists = [each for each in (hint, *get_args(hint)) if get_origin(each) is list]
    return get_args(lists[0])[0] if lists else None


def _is_text(key: str) -> bool:
    """Tell whether a setting takes a text and no list."""
    hint = _types().get(key)
    return hint is str or (get_origin(hint) is Union and str in get_args(hint))


def as_list(key: str, items: str) -> str | None:
    """Return the word, quoted for the shell, that gives a list of `items`; None where they are none
    for it.
    """
    words, names = re.findall(r"[^\s,;]+", items), choices(key)
    if item_type(key) is not str:  # text may have blanks
        items = (
            ",".join(words)
            if all(word in names if names else word.isdecimal() for word in words)
            else ""
        )
    word = f"{key}=[{items}]"
    return shlex.quote(word if parses(word) else f"{key}=[{quoted(items)}]") if items else None


def choices(key: str) -> list[str]:
    """Return the names that the items of a list can have; none where they are numbers or text."""
    return list(getattr(item_type(key), "__members__", {}))


def is_path(key: str) -> bool:
    """Tell whether a setting names a place: what it is given is taken as it is."""
    stage = re.fullmatch(r"stages\.\w+\.(\w+)", key)
    return (
        key in PATHS
        or key.startswith("serving.results.")
        or bool(stage and stage.group(1) in STAGE_PATHS)
    )


def for_hydra(args: Sequence[str], *, sweeps: bool) -> list[str]:
    """Return flags and settings as Hydra's parser is to have them.

    Args:
        sweeps: Whether commas separate the jobs of a multirun.
    """
    return [arg if arg.startswith("-") else _for_hydra(arg, sweeps) for arg in args]


def _for_hydra(arg: str, sweeps: bool) -> str:
    key, equals, value = arg.partition("=")
    if not equals:
        return arg
    if key.startswith(tuple(f"{each}." for each in (*OPEN, *MAPPINGS))) or key in OPEN:
        return f"++{_readable(arg)}"
    if key in MAPPINGS and value.startswith("{"):  # keys such as "0" are beyond Hydra's grammar
        return f"{key}={quoted(value)}"
    if key in (*GROUPS, "recipe"):
        is_word = re.fullmatch(
            r"(?!(?:true|false|null|inf|nan)\Z)[A-Za-z_]\w*", value, re.IGNORECASE
        )
        return arg if is_word or re.search(r"[\[{(,'\"$]|\A\Z", value) else f"{key}={quoted(value)}"
    if is_path(key):
        return f"{key}={_place(value, arg, sweeps)}"
    is_text = _is_text(key)
    has_comma = is_text and not sweeps and "," in value and value[0] not in "'\"[{"
    return f"{key}={quoted(value)}" if has_comma else _readable(arg)


def _readable(arg: str) -> str:
    """Return a setting whose value the grammar reads; as text where it cannot, so that its type is
    what is refused.
    """
    key, _, value = arg.partition("=")
    as_text = f"{key}={quoted(value)}"
    return as_text if "${" not in value and not parses(arg) and parses(as_text) else arg


def _place(value: str, arg: str, sweeps: bool) -> str:
    if value in ("", "null") or (value[0] in "'\"{" and parses(arg)):
        return value
    if sweeps and ("," in value or _SWEEP.match(value)) and parses(arg):
        return value
    return quoted(os.path.expanduser(value) if value.startswith("~") else value)


def parses(arg: str) -> bool:
    """Tell whether Hydra's grammar reads a setting."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(arg)
    except (HydraException, ValueError, RecursionError):
        return False
    return True


def quoted(text: str) -> str:
    """Return `text` in Hydra's quotes, where backslashes count only before a quote: each is doubled
    there.
    """
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", escaped) + "'"


# -- what a command line does not say -------------------------------------------------------------


def check_words(settings: Sequence[str]) -> None:
    """Refuse settings that add, delete, name code, or reach into Hydra.

    Raises:
        UserError: Naming the setting.
    """
    _check_blanks(settings)
    for arg in settings:
        key = arg.partition("=")[0]
        bare = key.lstrip("+~")
        if key.startswith("~") and not re.fullmatch(r"~(stages|policy\.metrics)\.\w+", key):
            raise UserError(
                key,
                "a ~ deletes a setting, and only stages and metrics of a policy can be left out",
                f"give {bare} another value",
            )
        if bare in ("hydra", "hydra.searchpath") or bare.startswith(
            ("hydra.", "hydra/", "hydra@", "/hydra")
        ):
            if bare not in HYDRA or key.startswith("+"):
                raise UserError(
                    key,
                    "is not for a command line to say",
                    f"of Hydra's own, give {', '.join(HYDRA)}",
                )
        elif any(names_code(part) for part in re.split(r"[./@]", bare)):
            raise UserError(key, "names code, and settings are data", "leave it out")
        if key.startswith("+") and not bare.startswith("stage@"):
            said = elsewhere(bare)
            remedy = said or ("drop the +" if is_known(bare) else "leave it out")
            raise UserError(key, "a + adds a setting, and nothing reads added ones", remedy)


def is_known(key: str) -> bool:
    """Tell whether a setting of `Run`, or of some type of stage, has this name; a group's choice
    counts.
    """
    known = _types()
    return (
        key in (*known, *GROUPS, "recipe") or re.sub(r"\Astages\.\w+\.", "stages.*.", key) in known
    )


def _check_blanks(settings: Sequence[str]) -> None:
    """Refuse blanks in a setting's name and around its `=`, where the shell keeps them and where it
    cuts at them.

    Raises:
        Unparsable: With the setting as it is to be written.
    """
    for before, arg in zip(("", *settings), settings, strict=False):
        key, equals, value = arg.partition("=")
        if equals and re.search(r"\s", key):
            raise _blanks(arg, re.sub(r"\s", "", key), value)
        if equals and not key and value and "=" not in before and before:  # KEY =VALUE
            raise _blanks(f"{before} {arg}", before, value)
    for arg, *after in zip(settings, settings[1:], (*settings[2:], ""), strict=False):
        if after[0] == "=" and "=" not in arg:  # KEY = VALUE
            raise _blanks(f"{arg} = {after[1]}", arg, after[1])
        if arg.endswith("=") and "=" not in after[0] and not after[0].startswith("~"):  # KEY= VALUE
            raise _blanks(f"{arg} {after[0]}", arg[:-1], after[0])


def _blanks(given: str, key: str, value: str) -> Unparsable:
    key, value = key.lstrip("+~"), value.strip()
    remedy = elsewhere(key) or "write key=value, without blanks"
    if is_known(key) and value:
        remedy = f"remove the blanks: {shlex.quote(f'{key}={value}')}"
    return Unparsable(given, "has blanks in its name or around its =", remedy)
