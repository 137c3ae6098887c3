"""The catalogue: every figure's key, unit, meaning, scope, direction and section. Units and methods
stand only here, and those of quality in `tasks/`.

A key is what MLflow shows (`compute/device_hours`); its last part is the key inside result.json.
`core` keys are never null on a FINISHED run that made a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from pipeline.ledger.shapes import HOURS, Figure, Figures, Row
from pipeline.tasks.table import QUALITIES, Task


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue.

    Attributes:
        direction: +1 where higher is better, -1 where lower is better, 0 where neither.
        scope: `row` (a stage attempt), `run`, or `comparison` (a pair of arms).
    """

    key: str
    unit: str
    scope: str
    direction: int
    meaning: str
    core: bool = False

    @property
    def section(self) -> str:
        """The part of the key before the slash: MLflow's chart section."""
        return self.key.rpartition("/")[0]

    @property
    def name(self) -> str:
        """The part of the key after the slash: the key in result.json."""
        return self.key.rpartition("/")[2]


PHASES = (
    "import",
    "prepare",
    "model_load",
    "compile",
    "data_wait",
    "h2d",
    "forward",
    "backward",
    "optimizer",
    "teacher",
    "comm_wait",
    "idle_rank",
    "capture",
    "calibrate",
    "search",
    "generate",
    "convert",
    "checkpoint",
    "eval",
    "log",
    "other",
)
"""Exclusive host phases; their self times sum to the wall time exactly."""

PRODUCTIVE = frozenset({"forward", "backward", "optimizer", "teacher", "generate", "h2d"})
WASTED = {
    "import": "import",
    "data_wait": "data_wait",
    "comm_wait": "comm_exposed",
    "other": "unattributed",
    "idle_rank": "idle_rank",
}
"""Phases that are waste, and the name of the cause. What is neither productive nor wasted is
support.
"""
WASTE_CAUSES = (*WASTED.values(), "rollback", "failed_attempt")

TRACED_SHARES = (
    ("busy", 1, "device computing, communicating or copying"),
    ("compute", 1, "device computing"),
    ("comm_exposed", -1, "communication that nothing hides"),
    ("copy_exposed", -1, "copies that nothing hides"),
    ("idle_host_wait", -1, "device idle before the host asked for more"),
    ("idle_launch_gap", -1, "device idle between the launch and its work"),
    ("idle_other", -1, "device idle, cause unknown"),
)
"""What traced steps say of the GPU, with the direction that is good; `idle_*` and the rest sum to
all of it.
"""

GPU_HOURS = ("allocated", "busy", "sm_active", "tensor_active")
"""Kinds of GPU-hours beside the attached ones."""

CATALOGUE: tuple[Metric, ...] = (
    # -- what was spent ---------------------------------------------------------------------------
    Metric(
        "compute/device_hours",
        "device-h",
        "row",
        -1,
        "work + assess + retry: elapsed hours x devices used",
        True,
    ),
    Metric(
        "compute/device_seconds",
        "device-s",
        "row",
        -1,
        "compute/device_hours in seconds: what short stages are read by",
        True,
    ),
    Metric(
        "compute/wall_s",
        "s",
        "row",
        -1,
        "elapsed seconds of the stage's windows: work, assess and retry",
        True,
    ),
    Metric(
        "compute/work_device_hours",
        "device-h",
        "row",
        -1,
        "start of stage to committed artifact",
        True,
    ),
    Metric(
        "compute/assess_device_hours",
        "device-h",
        "row",
        0,
        "scoring the artifact after reloading it",
        True,
    ),
    Metric(
        "compute/retry_device_hours",
        "device-h",
        "row",
        -1,
        "failed attempts and replayed steps",
        True,
    ),
    Metric(
        "compute/spent_device_hours",
        "device-h",
        "row",
        -1,
        "device_hours of this run; 0 where reused: sums to it",
    ),
    Metric(
        "compute/reused_device_hours",
        "device-h",
        "row",
        0,
        "work and assessment that another run spent; else 0",
    ),
    Metric(
        "compute/productive_device_hours",
        "device-h",
        "row",
        0,
        "forward, backward, optimizer, teacher, generate and h2d of steps that survived",
    ),
    Metric(
        "compute/support_device_hours",
        "device-h",
        "row",
        0,
        "neither productive nor wasted: loading, evaluation",
    ),
    Metric(
        "compute/wasted_device_hours",
        "device-h",
        "row",
        -1,
        "import, data_wait, comm_wait, other, and intervals lost to rollback or failure",
    ),
    *(
        Metric(
            f"compute/wasted_{cause}_device_hours",
            "device-h",
            "row",
            -1,
            f"the part of wasted that is {cause}",
        )
        for cause in WASTE_CAUSES
    ),
    Metric("compute/goodput", "1", "row", 1, "productive / attached of a training stage"),
    Metric("compute/gpu_hours", "GPU-h", "row", -1, "device_hours on GPUs (attached); null on CPU"),
    Metric(
        "compute/allocated_gpu_hours",
        "GPU-h",
        "row",
        -1,
        "what a scheduler held for the stage; null without one",
    ),
    Metric(
        "compute/busy_gpu_hours",
        "GPU-h",
        "row",
        -1,
        "gpu_hours in which any kernel ran; of traced steps alone, and so a lower bound, where"
        " nothing read it",
    ),
    Metric(
        "compute/sm_active_gpu_hours",
        "GPU-h",
        "row",
        -1,
        "gpu_hours x the mean share of SMs with a warp",
    ),
    Metric(
        "compute/tensor_active_gpu_hours",
        "GPU-h",
        "row",
        -1,
        "gpu_hours x the share in which tensor cores worked",
    ),
    Metric(
        "compute/energy_j",
        "J",
        "row",
        -1,
        "board energy of the stage's devices, from the NVML counter; where that counts a"
        " superchip's whole module, the GPU's power over time",
    ),
    Metric(
        "compute/energy_integral_j", "J", "row", -1, "board power over time: the check on energy_j"
    ),
    Metric(
        "compute/module_energy_j",
        "J",
        "row",
        -1,
        "energy of the module that a superchip's GPU shares with a CPU, both and memory together",
    ),
    Metric(
        "compute/power_w_mean",
        "W",
        "row",
        -1,
        "mean board power of all the stage's devices together",
    ),
    Metric(
        "compute/throttle_share",
        "1",
        "row",
        -1,
        "share of the time in which heat or hardware held clocks down; tag throttled_by has the"
        " reasons",
    ),
    Metric(
        "compute/power_cap_share",
        "1",
        "row",
        0,
        "share of the time at the power limit that the driver enforces, by its counter: many boards"
        " work there, it is no throttling",
    ),
    Metric(
        "compute/foreign_load",
        "1",
        "row",
        -1,
        "share of the device that others took: of a CPU's cores, by the kernel; of a GPU's time, by"
        " its library",
    ),
    Metric("compute/work_foreign_load", "1", "row", -1, "foreign_load while the stage worked"),
    Metric(
        "compute/assess_foreign_load",
        "1",
        "row",
        -1,
        "foreign_load while its artifact was assessed",
    ),
    Metric(
        "compute/host_foreign_load",
        "1",
        "row",
        -1,
        "share of the host's cores (of those that this run may use) that others took",
    ),
    Metric(
        "compute/steal_share",
        "1",
        "row",
        -1,
        "the part of it that a hypervisor gave to other machines",
    ),
    Metric(
        "compute/cpu_throttle_share",
        "1",
        "row",
        -1,
        "share of a control group's periods in which its quota of processor time was used up",
    ),
    Metric(
        "compute/dram_active", "1", "row", 1, "share of the time in which device memory moved data"
    ),
    Metric(
        "compute/nvlink_bytes_per_s",
        "B/s",
        "row",
        0,
        "NVLink traffic, both directions, mean of the devices",
    ),
    Metric(
        "compute/pcie_bytes_per_s",
        "B/s",
        "row",
        0,
        "PCIe traffic, both directions, mean of the devices",
    ),
    Metric(
        "compute/sm_clock_mhz_mean", "MHz", "row", 1, "clock of the SMs, mean over time and devices"
    ),
    Metric("compute/sm_clock_mhz_min", "MHz", "row", 1, "the lowest of them that was read"),
    Metric("compute/temperature_c_max", "deg C", "row", -1, "the hottest device at its hottest"),
    *(
        Metric(
            f"compute/traced_{name}_share", "1", "row", good, f"{text}, as a share of traced steps"
        )
        for name, good, text in TRACED_SHARES
    ),
    Metric("compute/steps", "steps", "row", 0, "optimizer steps of the artifact"),
    Metric(
        "compute/tokens", "tokens", "row", 0, "tokens read to make the artifact, padding excluded"
    ),
    Metric("compute/target_tokens", "tokens", "row", 0, "tokens of them that were to be predicted"),
    Metric(
        "compute/examples",
        "examples",
        "row",
        0,
        "sequences or examples the artifact was trained on",
    ),
    Metric(
        "compute/model_flops",
        "FLOP",
        "row",
        -1,
        "matmul FLOPs the method needs: as computed (padding too), heads on targets, a live"
        " teacher, no recompute",
    ),
    Metric(
        "compute/achieved_tflops", "TFLOP/s", "row", 1, "model_flops / seconds in steps / devices"
    ),
    Metric(
        "compute/peak_tflops",
        "TFLOP/s",
        "row",
        0,
        "dense peak of one device in the stage's arithmetic: its vendor's figure for the exact"
        " name, or declared",
    ),
    Metric("compute/mfu", "1", "row", 1, "achieved_tflops / peak_tflops"),
    Metric(
        "compute/active_parameter_share",
        "1",
        "row",
        0,
        "share of the model's parameters that a token uses: below 1 for a mixture of experts",
    ),
    Metric(
        "compute/distillation_share",
        "1",
        "row",
        0,
        "share of the loss that the teacher's signal contributes",
    ),
    Metric(
        "compute/distillation_gradient_share",
        "1",
        "row",
        0,
        "|g_d| / (|g_d| + |g_ce|): share of the gradient that it contributes, after the last step",
    ),
    Metric("compute/peak_bytes", "B", "row", -1, "in tensors on the device at most; null on CPU"),
    Metric(
        "compute/peak_reserved_bytes",
        "B",
        "row",
        -1,
        "held by torch's allocator on the device at most",
    ),
    Metric(
        "compute/memory_fragmentation",
        "1",
        "row",
        -1,
        "1 - peak allocated / peak reserved: share of what was held that tensors never filled",
    ),
    Metric(
        "compute/alloc_retries",
        "1",
        "row",
        -1,
        "allocations for which the allocator first had to give back",
    ),
    Metric("compute/ooms", "1", "row", -1, "allocations that failed"),
    Metric(
        "compute/memory_headroom_bytes",
        "B",
        "row",
        1,
        "device's memory - peak reserved; CUDA itself and other processes take their part of it",
    ),
    Metric("compute/device_memory_bytes", "B", "row", 0, "memory of one device"),
    Metric(
        "compute/nvml_peak_bytes",
        "B",
        "row",
        -1,
        "in use on the whole board at most, foreign processes included",
    ),
    Metric(
        "compute/host_peak_rss_bytes",
        "B",
        "row",
        -1,
        "resident memory of the process at most, from the stage's beginning on",
    ),
    Metric(
        "compute/run_device_seconds",
        "device-s",
        "run",
        -1,
        "compute/run_device_hours in seconds: what short runs are read by",
        True,
    ),
    Metric(
        "compute/device_seconds_sd",
        "device-s",
        "run",
        0,
        "standard deviation of compute/device_seconds over the seeds of the primary arm",
    ),
    Metric(
        "compute/arm_device_seconds",
        "device-s",
        "run",
        -1,
        "mean over its seeds, by arm: compute/arms/<arm>; with _sd, their spread",
    ),
    Metric(
        "compute/run_device_hours",
        "device-h",
        "run",
        -1,
        "all this run's processes were attached, until its figures were written",
        True,
    ),
    Metric(
        "compute/run_spent_device_hours",
        "device-h",
        "run",
        -1,
        "spent by this invocation and its attempts",
        True,
    ),
    Metric(
        "compute/run_reused_device_hours",
        "device-h",
        "run",
        0,
        "spent earlier on what this run reused",
        True,
    ),
    Metric(
        "compute/run_allocated_gpu_hours",
        "GPU-h",
        "run",
        -1,
        "what a scheduler held for the run's jobs, from grant to release; null without one",
    ),
    Metric(
        "compute/run_overhead_device_hours",
        "device-h",
        "run",
        -1,
        "in no window: start-up, composing, reports",
    ),
    Metric("compute/run_compare_device_hours", "device-h", "run", -1, "comparison pass"),
    Metric(
        "compute/run_overhead_wasted_device_hours",
        "device-h",
        "run",
        -1,
        "the part of overhead that is waste",
    ),
    Metric(
        "compute/run_compare_wasted_device_hours",
        "device-h",
        "run",
        -1,
        "the part of compare that is waste",
    ),
    *(
        Metric(
            f"compute/run_wasted_{cause}_device_hours",
            "device-h",
            "run",
            -1,
            f"the part of what was wasted outside of stages (overhead and compare) that is {cause}",
        )
        for cause in WASTED.values()
    ),
    Metric(
        "compute/run_compare_foreign_load",
        "1",
        "run",
        -1,
        "foreign_load during the comparison pass",
    ),
    Metric(
        "compute/run_compare_throttle_share",
        "1",
        "run",
        -1,
        "throttle_share during the comparison pass",
    ),
    Metric(
        "compute/per_converged_model_device_hours",
        "device-h",
        "run",
        -1,
        "all runs under one model.name until the first artifact at cost.converged_at, failures"
        " included",
    ),
    # -- what was expected of a run ---------------------------------------------------------------
    Metric(
        "forecast/device_hours",
        "device-h",
        "run",
        0,
        "what the run was expected to take before its first attempt; parts of which nothing was"
        " known left out",
    ),
    Metric("forecast/device_hours_low", "device-h", "run", 0, "lower end of its 90% interval"),
    Metric("forecast/device_hours_high", "device-h", "run", 0, "upper end of its 90% interval"),
    Metric(
        "forecast/actual_device_hours",
        "device-h",
        "run",
        0,
        "what the same parts took; null where the run did not finish or took a part over",
    ),
    # -- how good ---------------------------------------------------------------------------------
    Metric(
        "quality/primary",
        "see quality_key",
        "row",
        0,
        "on the test split: the quality that decides in the task, or where it is null what stands"
        " in for it",
        True,
    ),
    Metric(
        "quality/primary_sd",
        "see quality_key",
        "run",
        0,
        "standard deviation of quality/primary over the seeds of the primary arm",
    ),
    Metric(
        "quality/arm_primary",
        "see quality_key",
        "run",
        0,
        "mean over its seeds, by arm: quality/arms/<arm>; with _sd, their spread",
    ),
    *(
        Metric(f"quality/{key}", each.unit, "row", each.direction, each.meaning)
        for key, each in QUALITIES.items()
    ),
    Metric("quality/read_documents", "1", "row", 0, "share of the test documents that was read"),
    Metric("quality/read_bytes", "1", "row", 0, "share of their bytes that was read (causal_lm)"),
    Metric(
        "quality/read_tokens", "1", "row", 0, "share of their tokens that was read (classification)"
    ),
    Metric(
        "quality/cut_documents",
        "1",
        "row",
        0,
        "share of the documents read of which a part was not",
    ),
    Metric(
        "quality/worst_slice",
        "1",
        "row",
        -1,
        "loss of the class, or quarter of texts, that quantizing hurts most",
    ),
    Metric(
        "quality/task",
        "1",
        "row",
        1,
        "mean over its documents of an lm-eval task's metric: task/<task>/<metric>",
    ),
    Metric(
        "recovery/loss",
        "see quality_key",
        "row",
        -1,
        "what a fallback loses of the primary quality against its source on validation: of it, or"
        " in points",
    ),
    Metric("recovery/kl", "nat", "row", -1, "KL(source || fallback) a validation token or example"),
    # -- what it costs to run ---------------------------------------------------------------------
    Metric(
        "serving/device_s_per_1k_units",
        "device-s",
        "row",
        -1,
        "device-seconds per 1,000 units at the load",
    ),
    Metric(
        "serving/prefill_device_s_per_1k_tokens",
        "device-s",
        "row",
        -1,
        "the prompt's part, per 1,000 tokens in",
    ),
    Metric(
        "serving/decode_device_s_per_1k_tokens",
        "device-s",
        "row",
        -1,
        "the generation's part, per 1,000 new",
    ),
    Metric("serving/p50_s", "s", "row", -1, "median latency of one batch at the load"),
    Metric("serving/p95_s", "s", "row", -1, "95th percentile of it"),
    Metric(
        "serving/prefill_p50_s",
        "s",
        "row",
        -1,
        "median time to the first new token of a batch at the load",
    ),
    Metric("serving/prefill_p95_s", "s", "row", -1, "95th percentile of it"),
    Metric(
        "serving/token_p50_s",
        "s",
        "row",
        -1,
        "median over batches of the mean time of a further token",
    ),
    Metric("serving/token_p95_s", "s", "row", -1, "95th percentile of it"),
    Metric(
        "serving/dynamic_cache_device_s_per_1k_units",
        "device-s",
        "row",
        -1,
        "as device_s_per_1k_units, with a cache that grows, where the arm is served in another way",
    ),
    Metric(
        "serving/decode_probe_s",
        "s",
        "row",
        -1,
        "seconds of finding how tokens are written the fastest, compiling and capturing included;"
        " where serving.decode=auto times it",
    ),
    Metric(
        "serving/draft_acceptance",
        "1",
        "row",
        1,
        "share of the tokens that serving.draft proposed which the arm would have written too",
    ),
    Metric(
        "serving/draft_tokens_per_pass",
        "tokens",
        "row",
        1,
        "tokens written a forward pass of the arm, after the prompt; 1 without a draft",
    ),
    Metric(
        "serving/drafted_device_s_per_1k_units",
        "device-s",
        "row",
        -1,
        "device-seconds per 1,000 new tokens of the arm with its draft, one sequence at a time",
    ),
    Metric(
        "serving/undrafted_device_s_per_1k_units",
        "device-s",
        "row",
        -1,
        "the same without it, on the same prompts in turns",
    ),
    Metric(
        "serving/draft_saving",
        "1",
        "row",
        1,
        "1 - exp(mean ln(with the draft / without)) over prompts",
    ),
    Metric(
        "serving/draft_equal_share",
        "1",
        "row",
        1,
        "share of the prompts whose text with the draft is the arm's own, token for token",
    ),
    Metric(
        "serving/dtype_kl",
        "nats",
        "row",
        -1,
        "KL of the arm as it is served from the arm as it was assessed, mean "
        "per token or example of a few test documents; where the two dtypes differ",
    ),
    Metric(
        "serving/dtype_largest_logit_difference",
        "1",
        "row",
        -1,
        "largest difference of a logit between the two",
    ),
    Metric("serving/dtype_flips", "1", "row", -1, "first predictions that differ between the two"),
    Metric(
        "serving/units_per_joule", "1/J", "row", 1, "units per joule of the whole board at the load"
    ),
    Metric(
        "serving/peak_bytes",
        "B",
        "row",
        -1,
        "device memory allocated at most while serving; null on CPU",
    ),
    Metric("serving/weights_bytes", "B", "row", -1, "bytes of the loaded parameters and buffers"),
    # declared by `serving.results`, of a serving engine
    Metric(
        "serving/engine_output_tokens_per_s",
        "1/s",
        "row",
        1,
        "tokens out a second, as an engine's file says",
    ),
    Metric(
        "serving/engine_tokens_per_s",
        "1/s",
        "row",
        1,
        "tokens in and out a second, as an engine's file says",
    ),
    Metric(
        "serving/engine_requests_per_s",
        "1/s",
        "row",
        1,
        "requests a second, as an engine's file says",
    ),
    *(
        Metric(
            f"serving/engine_{name}_p{p}_s",
            "s",
            "row",
            -1,
            f"{p}th percentile of {what}, as an engine's file says",
        )
        for name, what, known in (
            ("ttft", "the time to a request's first token", (50, 95, 99)),
            ("tpot", "a request's mean time per further token", (50, 95, 99)),
            ("batch", "the time of a batch", (50, 99)),
        )
        for p in known
    ),
    Metric("serving/engine_requests", "1", "row", 0, "requests that these figures rest on"),
    Metric("serving/engine_tokens_in", "1", "row", 0, "their prompt tokens"),
    Metric("serving/engine_tokens_out", "1", "row", 0, "the tokens generated for them"),
    Metric("serving/engine_max_concurrency", "1", "row", 0, "of them at a time, at most"),
    Metric("serving/engine_request_rate", "1/s", "row", 0, "requests sent a second"),
    # -- whether it was worth it ------------------------------------------------------------------
    Metric(
        "savings/training",
        "1",
        "comparison",
        1,
        "1 - device-hours(arm) / device-hours(base) at equal quality; positive is cheaper",
    ),
    Metric(
        "savings/serving",
        "1",
        "comparison",
        1,
        "1 - exp(mean ln(arm/base)) over blocks of 4 readings",
    ),
    Metric(
        "savings/memory",
        "1",
        "comparison",
        1,
        "share of the source's serving memory that quantizing saves",
    ),
    Metric(
        "savings/quality_delta",
        "see quality_key",
        "comparison",
        1,
        "arm against base, so that higher is better",
    ),
    Metric(
        "savings/payback_units",
        "units",
        "comparison",
        -1,
        "C_opt / (the base's device-seconds per unit x serving saving)",
    ),
    Metric(
        "savings/c_opt_device_hours",
        "device-h",
        "comparison",
        -1,
        "work the arm needed and its base did not",
    ),
    # -- money ------------------------------------------------------------------------------------
    Metric(
        "cost/amount",
        "currency",
        "row",
        -1,
        "declared rate x allocated hours; attached ones, as a lower bound, without a grant",
    ),
    Metric(
        "cost/facility_energy_j",
        "J",
        "row",
        -1,
        "compute/energy_j x the declared PUE: what the facility drew; money only at a declared"
        " energy price",
    ),
    Metric(
        "cost/run_amount",
        "currency",
        "run",
        -1,
        "what the run cost: stages, comparison pass and overhead",
    ),
    Metric(
        "cost/per_converged_model",
        "currency",
        "run",
        -1,
        "what compute/per_converged_model_device_hours cost",
    ),
)

BY_KEY = {metric.key: metric for metric in CATALOGUE}
QUALITY_KEYS = tuple(
    metric.name
    for metric in CATALOGUE
    if metric.section == "quality"
    and metric.scope == "row"
    and metric.name not in ("primary", "task")
)
TASK = "task/"
"""What quality keys of lm-eval tasks begin with: `task/<task>/<metric>`. The catalogue has one row
for them all.
"""
TASK_KEY = r"^task/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$"
PRIMARY = {task: task.kind.primary for task in Task}
"""The quality that decides, by task."""
FALLBACK = {
    task.kind.primary: task.kind.stands_in for task in Task if task.kind.stands_in is not None
}
"""What decides where a primary quality is null: bits per byte are, under unknown tokens."""


def deciding(sides: Sequence[Mapping[str, float | None]], task: Task | None = None) -> str | None:
    """Return the quality that decides: the task's primary one, or what stands in for it.

    This is the one definition; whoever needs it calls this, or `primary_key`.

    Args:
        sides: What it is read from, arm by arm: values by quality key. Where any has the fallback
            and not the primary quality, all are read on the fallback, so that none is compared with
            another quality.
        task: None where it is not told: that of the first primary quality that is there.

    Returns:
        None where no side has any.
    """
    primary = tuple(PRIMARY.values()) if task is None else (PRIMARY[task],)
    stand_ins = (FALLBACK[key] for key in primary if key in FALLBACK)
    keys = (*primary, *stand_ins)
    first = next((key for key in keys if any(key in side for side in sides)), None)
    if first not in FALLBACK:
        return first
    stand_in = FALLBACK[first]
    lacks = lambda side: side.get(first) is None and side.get(stand_in) is not None
    return stand_in if any(lacks(side) for side in sides) else first


def primary_key(sides: Sequence[Mapping[str, Figure]], task: Task | None = None) -> str | None:
    """Return the quality that decides, of figures by quality key, arm by arm; see `deciding`."""
    return deciding(
        [{key: figure["value"] for key, figure in side.items()} for side in sides], task
    )


UNIT = {task: task.kind.unit for task in Task}
"""What serving and payback count, by task."""
RELATIVE = frozenset(key for key, quality in QUALITIES.items() if quality.relative)
"""Quality whose comparison is a fraction of the base (1 - arm/base); that of the others is a plain
difference.
"""
DIRECTION = {metric.name: metric.direction for metric in CATALOGUE}


_MEMORY = {
    "compute/peak_bytes": "peak_allocated_bytes",
    "compute/peak_reserved_bytes": "peak_reserved_bytes",
    "compute/memory_fragmentation": "fragmentation",
    "compute/alloc_retries": "alloc_retries",
    "compute/ooms": "ooms",
    "compute/memory_headroom_bytes": "headroom_bytes",
    "compute/device_memory_bytes": "total_bytes",
    "compute/nvml_peak_bytes": "nvml_peak_bytes",
    "compute/host_peak_rss_bytes": "host_peak_rss_bytes",
}
"""Catalogue keys of the ledger's memory group, whose own keys need no prefix."""


def catalogue_key(key: str) -> str:
    """Return the key that stands for `key` in the catalogue: its own, or of an lm-eval task's the
    one of them all.
    """
    return "quality/task" if key.startswith(f"quality/{TASK}") else key


class MetricRecord(TypedDict):
    """A row of catalogue.json."""

    key: str
    unit: str
    scope: str
    direction: int
    meaning: str
    core: bool
    section: str
    name: str


def export() -> list[MetricRecord]:
    """Return the catalogue as plain data, for `catalogue.json` beside every result."""
    return [
        MetricRecord(**asdict(metric), section=metric.section, name=metric.name)
        for metric in CATALOGUE
    ]


def row_summary(row: Row) -> Figures:
    """Return a row's figures by catalogue key, each `{"value", "provenance", "why_missing"}`.

    What the row lacks is left out.
    """
    record = row["ledger"]
    hours, counts = record["device_hours"], record["counts"]
    traced: Mapping[str, Any] = record.get("gpu_timeline", {})
    found: Figures = {
        "compute/device_hours": hours["attached"],
        "compute/device_seconds": in_seconds(hours["attached"]),
        "compute/wall_s": record["wall_s"],
        **{f"compute/{part}_device_hours": hours[part] for part in HOURS if part != "attached"},
        **{
            f"compute/wasted_{cause}_device_hours": value
            for cause, value in hours["wasted_by"].items()
        },
        **_spent_or_reused(row),
        "compute/gpu_hours": record["gpu_hours"]["attached"],
        "compute/energy_j": record["energy_j"],
        **{f"compute/{kind}_gpu_hours": record["gpu_hours"][kind] for kind in GPU_HOURS},
        **_known("compute", record.get("conditions", {})),
        **_known("compute", counts),
        **{
            key: record["memory"][name] for key, name in _MEMORY.items() if name in record["memory"]
        },
        **{
            f"compute/traced_{name}_share": traced[name]
            for name, *_ in TRACED_SHARES
            if traced and record["gpu_hours"]["attached"]["value"]
        },
        **_known("cost", record["cost"]),
        **_qualities(row["quality"]),
        **{f"recovery/{name}": value for name, value in row["recovery"].items()},
        **_known("serving", row["serving"]),
    }
    key = primary_key([row["quality"]])
    return found if key is None else {**found, "quality/primary": row["quality"][key]}


def in_seconds(hours: Figure) -> Figure:
    """Return hours as seconds, with the provenance that they had."""
    value = hours["value"]
    return {**hours, "value": None if value is None else value * 3600}


def _known(section: str, group: Mapping[str, Any]) -> Figures:
    """Return what the catalogue has of a group, by its keys."""
    named = {f"{section}/{name}": value for name, value in group.items()}
    return {key: value for key, value in named.items() if key in BY_KEY}


def _qualities(quality: Mapping[str, Figure]) -> Figures:
    return {f"quality/{name}": value for name, value in quality.items()}


def _spent_or_reused(row: Row) -> Figures:
    """Return a row's hours as what this run spent or what it took over, so that sums over runs
    count them once.
    """
    hours = row["ledger"]["device_hours"]
    nothing: Figure = {"value": 0.0, "provenance": "derived", "why_missing": None}
    spent: Figure = hours["attached"]
    reused: Figure = nothing
    if row["reused"] and spent["value"] is not None:
        taken_h = (hours["work"]["value"] or 0.0) + (hours["assess"]["value"] or 0.0)
        spent, reused = nothing, {**hours["work"], "value": taken_h}
    elif spent["value"] is None:
        reused = spent
    return {"compute/spent_device_hours": spent, "compute/reused_device_hours": reused}
