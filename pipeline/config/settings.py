"""Every setting, its default and its range. Defaults live here once; YAML in `configs/` and
`recipes/` holds deltas.

`OmegaConf.to_object` turns a composed config into `Run`; nothing below `cli/main.py` sees a
DictConfig. Nothing here imports torch: a refusal must be quick.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from pipeline.errors import UserError
from pipeline.tasks.table import Task

# OmegaConf reads these annotations at run time, and knows Optional[X] but not the string "X | None"
# everywhere.
# ruff: noqa: UP045


MAX_SEED = 2**32 - 1  # what numpy's generators take as well as torch's
MAX_WHOLE = 2**63 - 1  # what a tensor's size, or a column of a store, can hold


class Precision(Enum):
    """Arithmetic of training. Master weights stay fp32 in all of them. `auto` tries those that the
    device can.
    """

    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"  # autocast: weights are rounded anew for every product
    bf16_pure = "bf16_pure"  # the model itself is kept in bf16, beside its master weights
    fp16 = "fp16"
    # wide layers in float8, the rest as in bf16 (`training/float8.py`)
    fp8_tensorwise = "fp8_tensorwise"
    fp8_rowwise = "fp8_rowwise"


class OptimizerKind(Enum):
    """AdamW, and what its two moments are kept in (`training/optimizer.py`)."""

    adamw = "adamw"
    adamw_8bit_bitsandbytes = "adamw_8bit_bitsandbytes"
    adamw_8bit_torchao = "adamw_8bit_torchao"


class Format(Enum):
    """Weight formats; `quantization/backend.py` says which library does which, `auto` searches
    them.

    The order is that of trials: sixteen bits come first, because what other formats save is read
    against them.
    """

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"
    nf4 = "nf4"
    nf4_double = "nf4_double"
    fp4 = "fp4"
    fp4_double = "fp4_double"
    int8_weight_only = "int8_weight_only"
    int8_dynamic = "int8_dynamic"
    int4_weight_only = "int4_weight_only"
    float8_weight_only = "float8_weight_only"
    float8_dynamic = "float8_dynamic"


SIXTEEN_BITS = (Format.bf16, Format.fp16)
"""Formats that take the whole model, and hold no library's layers."""


class Prefer(Enum):
    """What a search over formats saves."""

    time = "time"  # device-seconds to serve the declared load
    memory = "memory"  # bytes of weights


class Fallback(Enum):
    """What a quantize stage may try where its format loses too much (`stages/fallbacks.py`)."""

    format = "format"  # one that keeps more
    lora = "lora"  # adapters trained with fake quantization, then merged
    qat = "qat"  # quantization-aware distillation of all weights


class Schedule(Enum):
    """Learning-rate schedule after the warm-up."""

    cosine = "cosine"
    constant_then_decay = "constant_then_decay"


class Divergence(Enum):
    """How a student's distribution is compared with its teacher's (defined in
    `distillation/losses.py`).
    """

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    skewed_kl = "skewed_kl"
    skewed_reverse_kl = "skewed_reverse_kl"


class HeadKernel(Enum):
    """What computes the distillation head (defined in `distillation/kernels.py`)."""

    auto = "auto"
    torch = "torch"
    triton = "triton"
    liger = "liger"


class CaptureMethod(Enum):
    """What a teacher cache keeps of each distribution (defined in `distillation/sparse.py`)."""

    sample = "sample"
    top_k = "top_k"


class DataFormat(Enum):
    """What the rows of a data set are (`data/rows.py`, docs/data.md). `auto` tells by the names of
    the columns.
    """

    auto = "auto"
    text = "text"  # a text; with a label where the task is sequence_classification
    text_pair = "text_pair"  # two texts with a label
    prompt_completion = "prompt_completion"  # only the completion is learnt
    alpaca = "alpaca"  # instruction, input, output
    sharegpt = "sharegpt"  # turns of `from` and `value`
    messages = "messages"  # turns of `role` and `content`


class Shared(Enum):
    """What becomes of a document that stands in two splits."""

    drop = "drop"  # test keeps it; validation keeps what train has too
    refuse = "refuse"


class Conflicting(Enum):
    """What becomes of a text that has two labels in one split."""

    drop = "drop"  # every copy: nothing says which label is right
    keep_first = "keep_first"
    refuse = "refuse"


class Measure(Enum):
    """What a comparison of two arms is read on."""

    quality = "quality"
    training = "training"
    serving = "serving"
    payback = "payback"


def positive(default: Any) -> Any:
    """Declare a field that must be greater than zero (or null where its type allows it)."""
    return field(default=default, metadata={"above": 0})


def at_least_0(default: Any) -> Any:
    """Declare a field that must not be negative."""
    return field(default=default, metadata={"min": 0})


def fraction(default: Any) -> Any:
    """Declare a field in [0, 1]."""
    return field(default=default, metadata={"min": 0, "max": 1})


@dataclass(kw_only=True, slots=True)
class QatSettings:
    """A fallback's training, with fake quantization in the forward pass.

    Null inherits `training.*` and `precision`.
    """

    steps: Optional[int] = positive(None)
    learning_rate: float = positive(2e-5)  # Source: Liu et al. 2023, arXiv 2305.17888, section 3.1
    precision: Optional[Precision] = None
    # both distributions are divided by it before they are compared
    temperature: float = positive(1.0)
    ce_weight: float = fraction(0.0)  # of the hard labels; the rest is the unquantized model's


@dataclass(kw_only=True, slots=True)
class LoraSettings(QatSettings):
    """The same, of adapters."""

    learning_rate: float = positive(2e-4)  # Source: Dettmers et al. 2023, arXiv 2305.14314, table 9
    rank: int = positive(16)  # of the adapters
    alpha: float = positive(32.0)  # what the adapters add is scaled by alpha / rank


@dataclass(kw_only=True, slots=True)
class TinyShape:
    """Shape of the embedded Llama-architecture model. Widths are multiples of 64, so that every
    backend takes them.
    """

    hidden_size: int = positive(192)  # width
    layers: int = positive(4)  # depth
    heads: int = positive(3)  # attention heads
    intermediate_size: int = positive(512)  # width of the feed-forward layers


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The artifact `base`: `path` (a Hugging Face folder or Hub name) or, without one, a model made
    from `shape`.
    """

    path: Optional[str] = None  # a folder or Hub name; null: a model made from `shape`
    revision: Optional[str] = None  # of a Hub name: a branch, tag or commit
    shape: TinyShape = field(default_factory=TinyShape)
    name: str = "model"  # the model_name under which costs add up over runs


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """The student's initial weights, by the first of these that is set: `path`, `config`, `layers`.

    `path` is a folder or Hub name. `config` overrides keys of the source arm's Hugging Face config;
    weights are random. `layers` copies layers of the source arm: `every_2` (every second), a count
    (evenly spread), or a list.
    """

    path: Optional[str] = None  # a folder or Hub name; null: made from the source arm
    revision: Optional[str] = None  # of a Hub name: a branch, tag or commit
    # not null: overrides are merged into it
    config: Optional[dict[str, Any]] = field(default_factory=dict)
    layers: Any = "every_2"  # copied from the source arm: every_2, a count, or a list such as [0,3]
    # the arm copied from; null: the teacher of the first distill stage, else base
    source: Optional[str] = None


REMOVED = {
    "data.text_field": "data.columns={text: NAME}",
    "data.label_field": "data.columns={label: NAME}",
    "data.messages_field": "data.columns={messages: NAME}",
    "stages.*.insist": "stages.*.allow_weak_teacher=true",
}
"""Settings of earlier releases, and what says the same now; `*` stands for a stage's name."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where documents come from: `path` (file or folder), else `hub` (a Hub dataset or a local
    one), else `name`.

    `splits`, `columns` and `label_map` are written `{a: b, c: d}`; keys may be quoted.
    """

    name: str = "stdlib"  # embedded: stdlib, stdlib_labels
    path: Optional[str] = None  # a file or folder; docs/data.md has the rules
    hub: Optional[str] = None  # org/name, or org/name@revision
    subset: Optional[str] = None  # a configuration of a Hub data set, or a sub-folder
    # {validation: validation_matched}: what the data calls a split
    splits: Any = field(default_factory=dict)
    # forces what rows are read as; auto: by their columns
    format: DataFormat = DataFormat.auto
    # {text: body, label: stars}: which column has which part
    columns: Any = field(default_factory=dict)
    # {neg: negative, 0: bad}: names of classes, by the data's
    label_map: Any = field(default_factory=dict)
    group_field: Optional[str] = None  # a column: documents that share its value are of one source
    shared_documents: Shared = Shared.drop  # documents that stand in two splits
    conflicting_labels: Conflicting = Conflicting.drop  # texts with two labels
    task: Task = Task.causal_lm  # what `task` defaults to
    max_documents: Optional[int] = positive(None)  # per split, the first by content hash
    vocabulary_size: int = field(default=1024, metadata={"min": 300})  # of the embedded tokenizer
    shuffle_labels: bool = False  # a control: quality must fall to chance


@dataclass(kw_only=True, slots=True)
class PeakConfig:
    """Dense peak rates of one device in TFLOP/s, where the table of known devices lacks them: what
    MFU divides by.
    """

    fp32: Optional[float] = positive(None)  # TFLOP/s, dense
    tf32: Optional[float] = positive(None)  # TFLOP/s, dense
    bf16: Optional[float] = positive(None)  # TFLOP/s, dense
    fp16: Optional[float] = positive(None)  # TFLOP/s, dense
    fp8: Optional[float] = positive(None)  # TFLOP/s, dense


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """What to run on."""

    # auto, cpu, cuda, cuda:1, ... ; auto takes the accelerator that torch finds
    device: str = "auto"
    devices: int = positive(1)  # of this run; this release drives one
    num_threads: Optional[int] = positive(None)  # CPU threads of torch; null leaves torch's choice
    # null: as the vendor states for this device, if known
    peak_tflops: PeakConfig = field(default_factory=PeakConfig)


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """One training loop serves every stage; these are its settings."""

    steps: int = at_least_0(100)  # optimizer steps; 0 uses the model as it is
    # passes over train; they then say how many steps there are
    epochs: Optional[float] = positive(None)
    batch_size: int = positive(16)  # sequences (or examples) of one optimizer step
    gradient_accumulation: int = positive(1)  # micro-batches that batch_size is cut into
    sequence_length: int = field(default=128, metadata={"min": 8})  # tokens
    learning_rate: float = positive(3e-3)  # its peak, after the warm-up
    weight_decay: float = at_least_0(0.1)  # of AdamW, on weights of two dimensions or more
    warmup_fraction: float = fraction(0.05)  # of the steps
    schedule: Schedule = Schedule.cosine  # of the learning rate, after the warm-up
    decay_fraction: float = fraction(0.2)  # of the steps, for constant_then_decay
    max_grad_norm: float = positive(1.0)  # gradients are clipped to it
    # steps between validation readings; null: a fifth of the steps
    eval_every: Optional[int] = positive(None)
    # validation documents a reading; null: 32 texts, or 256 examples
    eval_documents: Optional[int] = positive(None)
    checkpoint_every: Optional[int] = positive(None)  # steps; null: every checkpoint_seconds
    checkpoint_seconds: float = positive(60.0)  # between two checkpoints
    # loss over its own best average
    divergence_factor: float = field(default=4.0, metadata={"above": 1})
    compile: bool = False  # torch.compile
    optimizer: OptimizerKind = OptimizerKind.adamw  # what holds the two moments
    # backward computes each layer again, so that memory holds one at a time
    activation_checkpointing: bool = False
    # doubled until it is batch_size; null: that from the start
    start_batch_size: Optional[int] = positive(None)
    # likewise, of causal_lm
    start_sequence_length: Optional[int] = field(default=None, metadata={"min": 8})
    # of the steps, until all is full size
    growth_fraction: float = field(default=0.5, metadata={"above": 0, "max": 1})


@dataclass(kw_only=True, slots=True)
class QualityConfig:
    """How artifacts are assessed, and how much worse still counts as equal."""

    margin: float = fraction(0.01)  # relative for bits per byte, absolute for accuracies
    max_documents: Optional[int] = positive(None)  # of the test split, the first by content hash
    # causal_lm reads the head of longer ones
    max_bytes_per_document: Optional[int] = positive(None)
    batch_size: int = positive(16)  # documents scored at a time
    # tokens that a window reads; null: as in training
    sequence_length: Optional[int] = positive(None)
    # tokens predicted by a window after a document's first; null: all it reads
    stride: Optional[int] = positive(None)
    bootstrap: int = field(default=2000, metadata={"min": 200})  # resamples of an interval
    # files of lm-eval tasks with local data (causal_lm): also run
    tasks: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class ServingLoad:
    """The load at which serving is measured. A token is the unit of causal_lm, an example of
    classification.
    """

    prompt: int = positive(64)  # tokens in
    new: int = positive(32)  # tokens generated (causal_lm)
    batch: int = positive(8)  # sequences at a time


class Decode(Enum):
    """How tokens are written: with a key-value cache that grows, or one of fixed size whose step is
    captured as a CUDA graph, compiled before that, or neither. `auto`: graph on CUDA, else dynamic.
    """

    auto = "auto"
    dynamic = "dynamic"
    static = "static"
    graph = "graph"
    compile = "compile"


class ServingDtype(Enum):
    """The dtype in which artifacts that are stored in fp32 are served; others are served as they
    are stored.

    `auto`: the fastest that the device has, by a short probe (`evaluation/serving/dtype.py`).
    """

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class VllmCheck(Enum):
    """Which artifacts vLLM, where it is installed, loads and scores beside this project
    (`vllm_check.py`).
    """

    quantized = "quantized"
    every = "every"
    never = "never"


@dataclass(kw_only=True, slots=True)
class ServingConfig:
    """The comparison pass."""

    load: ServingLoad = field(default_factory=ServingLoad)
    batches: list[int] = field(default_factory=lambda: [1, 8, 32])  # also shown at these
    blocks: int = field(default=4, metadata={"min": 2})  # of arm, base, base, arm or the reverse
    decode: Decode = Decode.auto  # how tokens are written (causal_lm)
    dtype: ServingDtype = ServingDtype.auto  # of artifacts that are stored in fp32
    # of `vllm bench`: a file (of the primary arm), or files by arm; shown as declared
    results: Any = None
    # language models that vLLM, where installed, is to load and score too
    check_vllm: VllmCheck = VllmCheck.quantized
    # units to be served; payback's P(net > 0) is read at it
    volume: Optional[float] = positive(None)
    # units a second to be served; the replicas that the arm saves, at it
    rate: Optional[float] = positive(None)


class Direction(Enum):
    """Which way a quality improves, as a policy states it; it must be the catalogue's."""

    higher = "higher"
    lower = "lower"


@dataclass(kw_only=True, slots=True)
class MetricRule:
    """A quality that a release must keep: no worse than the champion by more than `margin`."""

    # relative for bits per byte, absolute for shares (0.01 is a point)
    margin: float = at_least_0(0.01)
    direction: Optional[Direction] = None  # null: the catalogue's


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """What `recipe=release_check` asks of a release; its hash is part of every verdict. Null:
    shown, and not asked for.

    Least savings are shares of the champion's cost; 0 asks for no dearer, -0.05 lets a release be
    5% dearer.
    """

    name: str = "custom"  # shown in the verdict
    # by quality key; those of another task are left out
    metrics: dict[str, MetricRule] = field(default_factory=dict)
    # least saving of C, the work of the chain
    training: Optional[float] = field(default=None, metadata={"max": 1})
    # least saving of device-seconds at `load`
    serving: Optional[float] = field(default=None, metadata={"max": 1})
    # least saving of peak memory at `load`
    memory: Optional[float] = field(default=None, metadata={"max": 1})
    # least saving of joules per unit at `load`
    energy: Optional[float] = field(default=None, metadata={"max": 1})
    # units after which the release must have paid for itself
    payback_units: Optional[float] = positive(None)
    load: ServingLoad = field(default_factory=ServingLoad)
    # of the sides that are stored in fp32; one for both, kept over the looks
    dtype: ServingDtype = ServingDtype.auto
    # of a false PASS, one-sided, per criterion
    alpha: float = field(default=0.05, metadata={"above": 0, "max": 0.25})
    blocks: int = field(default=4, metadata={"min": 2})  # of four readings, in one look
    # the second is taken where the first decides nothing
    looks: int = field(default=2, metadata={"min": 1, "max": 2})
    # right-or-wrong items; fewer decide nothing
    min_items: int = field(default=100, metadata={"min": 2})
    min_documents: int = field(default=400, metadata={"min": 2})  # documents of other qualities
    hardware: Optional[str] = None  # exact name of the device that serving is measured on
    # of the serving pass spent throttled; more is no measurement
    max_throttle_share: float = fraction(0.05)
    # of the machine used by others meanwhile; null: not looked at
    max_foreign_load: Optional[float] = fraction(0.1)
    # drift or period of the readings, relative; null: not tested
    max_disturbance: Optional[float] = fraction(0.01)


@dataclass(kw_only=True, slots=True)
class StoreConfig:
    """Where artifacts can be reached from other machines."""

    # a folder, or any fsspec URL (s3://bucket/prefix); artifacts lie there by digest
    url: Optional[str] = None


class CostKind(Enum):
    """Whose the devices are. What a cloud asks for a device-hour has its power in it; an owned
    device's may not.
    """

    rented = "rented"
    owned = "owned"


@dataclass(kw_only=True, slots=True)
class CostConfig:
    """Money is shown only where a rate is declared, with its currency, source and date. There are
    no defaults.
    """

    kind: Optional[CostKind] = None  # rented or owned devices
    # what the cloud asks, or what an owned device-hour is put at
    per_device_hour: Optional[float] = positive(None)
    currency: Optional[str] = None  # three letters: EUR
    source: Optional[str] = None  # a price list, a contract, the ledger of a data centre
    date: Optional[str] = None  # on which the source said so: 2026-11-23
    # facility energy over the devices' own
    pue: Optional[float] = field(default=None, metadata={"min": 1})
    # of owned devices whose rate leaves power out
    energy_price_per_kwh: Optional[float] = at_least_0(None)
    # quality/primary from which the model of this model.name has converged
    converged_at: Optional[float] = None
    # models that share the teacher's cost; the full figure stays beside it
    teacher_shared_by: int = positive(1)


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where the run's figures go. `MLFLOW_TRACKING_URI` wins over `uri`; null is SQLite under
    `root`.
    """

    root: str = "mlruns"  # the folder that holds everything a run leaves
    mlflow: bool = True  # false: journal and reports only
    uri: Optional[str] = None  # of an MLflow server or store; null: SQLite under `root`
    experiment: Optional[str] = None  # null: the recipe's name
    team: Optional[str] = None  # who pays, on every run and row
    cost_center: Optional[str] = None  # likewise
    purpose: Optional[str] = None  # likewise: what the run is for
    # refuse a run without these three; PIPELINE_REQUIRE_OWNER=1 does for all runs
    require_owner: bool = False


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """A ceiling on what this run may spend."""

    device_hours: Optional[float] = positive(
        None
    )  # a run that has spent them ends with exit code 7


@dataclass(kw_only=True, slots=True)
class LedgerConfig:
    """What is looked at beside time. Nothing here changes what is trained, so that it is in no
    key.
    """

    traced_steps: int = at_least_0(2)  # of each training, on a GPU; 0: none
    sample_seconds: float = positive(1.0)  # between two readings of a GPU's counters
    # of a window that others took; more: no saving of time is shown
    max_foreign_load: Optional[float] = fraction(0.1)


@dataclass(kw_only=True, slots=True)
class Comparison:
    """A pair of arms and what it is read on."""

    arm: str = "???"  # the stage that is judged
    base: str = "???"  # the stage, or best_16_bit, that it is judged against
    on: list[Measure] = field(default_factory=list)  # what it is judged on


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """How training computes; a stage may name another precision of its own."""

    name: Precision = Precision.bf16  # of every stage that names none of its own
    loss_scale: float = positive(65536.0)  # fp16's first loss scale
    # of layers that fp8 takes: below, casting costs more than it saves
    fp8_least_width: int = positive(1024)
    # of auto: how far, relatively, a loss may lie from fp32's
    loss_tolerance: float = positive(0.005)


@dataclass(kw_only=True, slots=True)
class Run:
    """One composed run: what a recipe and the overrides amount to."""

    recipe: str = ""  # its name
    question: str = ""  # what the recipe answers: its first comment line
    task: Task = Task.causal_lm  # what the model is for; follows from an embedded data set
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    candidate: Optional[str] = None  # recipe=release_check: what is to be released
    baseline: Optional[str] = None  # and what it is measured against
    # per-document values of another evaluation; null: assessed here
    candidate_items: Optional[str] = None
    baseline_items: Optional[str] = None  # likewise
    promote: bool = False  # a PASS moves the alias `champion`
    bootstrap: bool = False  # without a champion, the candidate becomes it
    # of initial weights, batches and draws
    seed: int = field(default=0, metadata={"min": 0, "max": MAX_SEED})
    seeds: Optional[list[int]] = None  # runs every arm once per seed; null: [seed]
    stages: dict[str, Any] = field(default_factory=dict)  # by name, in order
    compare: list[Comparison] = field(default_factory=list)  # pairs of arms
    # else a quantized arm that saves neither time nor memory ends the run with 3
    allow_no_speedup: bool = False
    primary_arm: str = ""  # the arm that the run is about: its figures stand on the MLflow run


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Refuse a number outside the range its field declares.

    Raises:
        UserError: Naming the full key, the value and the range.
    """
    for item in dataclasses.fields(settings):
        value, key = getattr(settings, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        _check_numbers(value, key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        low, high, above = (item.metadata.get(name) for name in ("min", "max", "above"))
        if above is not None and not value > above:
            raise UserError(key, f"{value} is out of range", f"give a number greater than {above}")
        if low is not None and not value >= low:
            raise UserError(key, f"{value} is out of range", f"give a number of at least {low}")
        if high is not None and not value <= high:
            raise UserError(key, f"{value} is out of range", f"give a number of at most {high}")


def _check_numbers(value: Any, key: str) -> None:
    """Refuse what no machine counts to, in lists and dictionaries too.

    Raises:
        UserError: Naming the full key.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            _check_numbers(item, f"{key}.{name}")
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item, key)
    elif isinstance(value, int) and abs(value) > MAX_WHOLE:
        raise UserError(
            key, f"a number of {len(str(abs(value)))} digits is out of range", "give one below 2^63"
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            key, f"{value} is no number to work with", "give a finite one, or leave it out"
        )


def dotted_keys(settings: Any, prefix: str = "") -> Iterator[str]:
    """Yield every setting below a settings class as `a.b.c`."""
    for item in dataclasses.fields(settings):
        yield f"{prefix}{item.name}"
        factory = item.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            yield from dotted_keys(factory, f"{prefix}{item.name}.")


def scored_length(run: Run) -> int:
    """Return the tokens of a window that is scored, where a document has as many."""
    return run.quality.sequence_length or run.training.sequence_length
