"""The shapes of all that is written to disk or read back, as typed records.

`result.json`, the records of the store, the lines of a journal. The JSON Schemas in
`ledger/schema.py` and `ledger/records.py` check them at the door; here stands the same for type
checkers, and `tests/test_shapes.py` holds the two together.

A group whose members are all figures, and are named by a table (`COUNTS`, `MEMORY`), is `Figures`:
the table is the one place where its names stand.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, get_args

Ends: TypeAlias = list[float]
"""The two ends of an interval."""


class Figure(TypedDict):
    """A figure: null exactly where `why_missing` says why, and `provenance` is unavailable."""

    value: float | None
    provenance: str
    why_missing: str | None


class IntervalFigure(Figure):
    """A figure with its interval; null where there is none."""

    ci: Ends | None


Figures: TypeAlias = dict[str, Figure]
PhasesNs: TypeAlias = dict[str, int]
"""Nanoseconds by phase."""
Status: TypeAlias = Literal["FINISHED", "FAILED", "KILLED", "SKIPPED"]


# -- a row and its ledger -------------------------------------------------------------------------


class ArtifactRecord(TypedDict):
    """A folder that a stage left."""

    path: str
    kind: str
    digest: str
    bytes: int


class ControlRecord(TypedDict):
    """What a control is a control of."""

    of: str
    matches: str


class QuantizationRecord(TypedDict):
    """The format of what a stage made, and how much of the model is in it."""

    format: str
    layers: int
    share: Figure


Unchanged = TypedDict("Unchanged", {"as": str, "why": str})
"""Which model a stage left as it is though it was to change it, and why."""


class QualityFigure(IntervalFigure):
    """A quality: of `n` documents, whose values lie in `items`."""

    n: int | None
    items: str | None
    groups: NotRequired[int]
    slice: NotRequired[str]


Quality: TypeAlias = dict[str, QualityFigure]


class DeviceHours(TypedDict):
    """Hours of a row, by part."""

    attached: Figure
    work: Figure
    assess: Figure
    retry: Figure
    productive: Figure
    support: Figure
    wasted: Figure
    wasted_by: Figures


HoursPart: TypeAlias = Literal[
    "attached", "work", "assess", "retry", "productive", "support", "wasted"
]
HOURS: tuple[HoursPart, ...] = get_args(HoursPart)


class Money(TypedDict):
    """What hours cost, in `currency`."""

    amount: Figure
    currency: str | None
    facility_energy_j: NotRequired[Figure]


class _Counters(TypedDict):
    """What the counters of devices said of a window."""

    energy_integral_j: Figure
    power_w_mean: Figure
    busy: Figure
    sm_active: Figure
    tensor_active: Figure
    dram_active: Figure
    nvlink_bytes_per_s: Figure
    pcie_bytes_per_s: Figure
    memory_used_peak_bytes: Figure
    sm_clock_mhz_mean: Figure
    sm_clock_mhz_min: Figure
    temperature_c_max: Figure
    throttle_share: Figure
    foreign_load: Figure
    throttle_reasons: list[str]


class UsageRecord(_Counters):
    """What devices did in a window; see `gpu_usage.Usage`."""

    energy_j: Figure
    power_cap_share: Figure
    module_energy_j: Figure
    problems: list[str]


class Conditions(_Counters):
    """What a machine was like while a row's windows were open: all of `UsageRecord` but the energy,
    what disturbed them, and what metering itself took.
    """

    power_cap_share: NotRequired[Figure]
    module_energy_j: NotRequired[Figure]
    problems: list[str]
    meter_overhead: Figure
    truncated: bool
    work_foreign_load: NotRequired[Figure]
    assess_foreign_load: NotRequired[Figure]
    host_foreign_load: NotRequired[Figure]
    steal_share: NotRequired[Figure]
    cpu_throttle_share: NotRequired[Figure]


class GpuTimelineRecord(TypedDict):
    """What the device did: shares of traced steps, seconds by phase, traces."""

    traced_steps: Figure
    compute: Figure
    comm_exposed: Figure
    copy_exposed: Figure
    idle_host_wait: Figure
    idle_launch_gap: Figure
    idle_other: Figure
    busy: Figure
    phases_s: dict[str, float]
    traces: list[str]
    notes: list[str]


class RankTime(TypedDict):
    """What a rank did in work, or an assessment, that all share: self times by phase, and what of
    them no collective can be in, by which ranks are compared.
    """

    rank: int
    host: str
    phases_ns: PhasesNs
    local_ns: int


class Measurements(TypedDict):
    """A row's figures, before they are held against each other."""

    wall_s: Figure
    phases_ns: PhasesNs
    device_hours: DeviceHours
    gpu_hours: Figures
    energy_j: Figure
    counts: Figures
    memory: Figures
    cost: Money
    conditions: Conditions
    gpu_timeline: NotRequired[GpuTimelineRecord]
    ranks: NotRequired[list[RankTime]]
    assess_ranks: NotRequired[list[RankTime]]


class Checked(Measurements):
    """They, and what does not agree."""

    meter_valid: bool
    meter_problems: list[str]


class Identity(TypedDict, total=False):
    """Whose a row is, and what it was made from, as far as its run says."""

    team: str | None
    cost_center: str | None
    purpose: str | None
    model_name: str | None
    run: str
    recipe: str
    config: str
    commit: str | None
    data: str
    parent: str | None  # run whose command started this one


class GrantRecord(TypedDict):
    """What a scheduler gave a job; see `ledger.placement.Grant`."""

    scheduler: str
    job_id: str
    gpus: int | None


class Granted(TypedDict):
    """One start of a job, as the scheduler's accounting has it; see `ledger.allocated`.

    Without an answer, `why_missing` says why; `shared_with` names other runs in the job.
    """

    scheduler: str
    job_id: str
    attempts: list[int]
    state: str | None
    ended: bool
    elapsed_s: float | None
    gpus: int | None
    shared_with: list[str]
    why_missing: str | None


class Allocated(TypedDict):
    """What a scheduler held for a run, over all its attempts."""

    gpu_hours: Figure
    grants: list[Granted]


class Scheduler(TypedDict):
    """The same on a row; one of a metered command repeats the name."""

    name: str
    job_id: str
    gpus: int | None
    scheduler: NotRequired[str]


class ReportedDevices(TypedDict, total=False):
    """What the devices' own library tells of them; null what it does not."""

    uuids: list[str]
    device_names: list[str | None]
    driver: str | None
    cuda_driver: int | None
    mig: bool | None
    exclusive: str
    power_limit_w: list[float | None] | None  # of each device
    power_scope: str


class Placement(ReportedDevices, total=False):
    """Where a row was made, as far as that is known. Beside these stand the releases of the
    libraries that torch was built with, by the names that the device classes give them.
    """

    node: str
    count: int
    cores: int | None
    scheduler: Scheduler | None
    torch: str | None
    cuda: str | None


class LedgerRecord(Checked):
    """All of a row's ledger: whose it is, and where it was made, as far as that is known."""

    identity: Identity
    placement: Placement


class Row(TypedDict):
    """An attempt at a stage."""

    arm: str
    stage: str
    type: str
    seed: int
    attempt: int
    status: str
    why: str | None
    reused: str | None
    depends_on: list[str]
    inputs: NotRequired[dict[str, str]]
    makes: NotRequired[str]
    word: NotRequired[str | None]
    control: NotRequired[ControlRecord | None]
    artifact: ArtifactRecord | None
    ledger: LedgerRecord
    quality: Quality
    recovery: Figures
    quantization: NotRequired[QuantizationRecord | None]
    serving: Figures
    unchanged: NotRequired[Unchanged | None]


# -- comparisons ----------------------------------------------------------------------------------


class ComparedQuality(IntervalFigure):
    """A quality of an arm against its base's; see `compare.quality.compare_items`."""

    n: int
    margin: float
    answer: str
    items_to_decide: int | None
    groups: NotRequired[int | None]
    available: NotRequired[int | None]
    smallest_visible_damage: NotRequired[float]
    why_undecided: NotRequired[str]


class TrainingSaving(IntervalFigure):
    """What an arm's training saved; see `compare.savings.training_saving`."""

    c_arm: Figure
    c_base: Figure
    c_opt: Figure
    all_in_arm: Figure
    all_in_base: Figure
    new_spend_saving: Figure
    systems: Figure
    algorithmic: Figure
    bound: Figure
    amortised: NotRequired[Figure]
    less_others: NotRequired[Figure]
    rule: str


class WarmUpRecord(TypedDict, total=False):
    """Rounds of readings that were discarded before others were kept; empty where an older release
    said nothing of it.
    """

    rounds: int
    steady: bool


class ServingSaving(IntervalFigure):
    """What an arm's serving saves; see `compare.savings.serving_saving`."""

    blocks: int
    sd_log: NotRequired[float]
    how: NotRequired[str]
    dtypes: NotRequired[dict[str, str]]
    orders: NotRequired[list[str]]
    order_seed: NotRequired[int | None]
    warm_up: NotRequired[WarmUpRecord]
    disturbed: NotRequired[list[str]]


class MemorySaving(Figure):
    """The share of the base's memory that an arm saves."""

    of: str


class Speedup(TypedDict):
    """Whether a quantized arm saves time or memory."""

    saves_time: bool
    memory: MemorySaving
    no_speedup: bool


class Payback(Figure):
    """Units after which serving has repaid the extra spending."""

    unit: str
    p_net_positive: Figure
    replicas_saved: Figure


class Pair(TypedDict):
    """An arm read against its base."""

    arm: str
    base: str
    on: list[str]
    speedup: Speedup | None
    base_is: NotRequired[str | None]
    quality: dict[str, ComparedQuality]
    training: TrainingSaving | None
    serving: ServingSaving | None
    payback: Payback | None


class SpendRecord(TypedDict):
    """What an arm's own stage took; see `compare.savings.Spend`."""

    arm: str
    depends_on: list[str]
    work_h: float
    retry_h: float
    flops: float | None
    existing: bool
    unknown: str
    registered: str | None
    foreign_load: Figure | None


class ReadingRecord(TypedDict):
    """A validation reading; see `compare.savings.Reading`."""

    tokens: int
    metric: float | None
    device_hours: float
    is_constant: bool


class TrainedRecord(TypedDict):
    """How an arm's training went; see `compare.savings.Trained`."""

    arm: str
    final: float | None
    curve: list[ReadingRecord]


class ToleranceRecord(TypedDict):
    """What others may take of a device; see `compare.savings.Tolerance`."""

    most: float | None
    what: str
    is_shared: bool


class SeedBasis(TypedDict):
    """What the comparisons of a seed rest on."""

    seed: int
    spends: list[SpendRecord]
    trained: list[TrainedRecord]


# -- verdicts -------------------------------------------------------------------------------------


class CriterionRecord(TypedDict):
    """What a gate read one criterion as; see `compare.verdict.Criterion`."""

    name: str
    outcome: str
    gating: bool
    value: Figure
    ci: Ends | None
    level: float | None
    threshold: float | None
    unit: str
    n: int | None
    needed: int | None
    why: str | None
    groups: NotRequired[int | None]
    available: NotRequired[int | None]
    smallest_visible_damage: NotRequired[float | None]


class SideRecord(TypedDict):
    """A side of a gate."""

    reference: str
    digest: str
    path: str
    bytes: int
    model: str | None
    version: str | None
    url: str | None
    charge: ChargeRecord | None


class PolicyRecord(TypedDict):
    """The policy that a verdict was reached by."""

    name: str
    sha256: str
    settings: dict[str, Any]


class DeviceRecord(TypedDict):
    """Devices of a run."""

    kind: str
    name: str
    count: int


class ServedIn(TypedDict):
    """The dtype that was asked for, and the one that fp32 artifacts were served in."""

    asked: str
    served: str | None


class Promotion(TypedDict):
    """What became of moving the champion."""

    done: bool
    model: str
    version: str | None
    url: str | None
    why: str | None


class EndRecord(TypedDict):
    """How a gate's run ended."""

    exit_code: int
    why: str | None


class ReleaseReading(TypedDict):
    """A release's reading with its interval; see `compare.history.Figure`."""

    value: float
    low: float
    high: float
    error: float
    relative: bool
    blocks: int | None


class ReleaseRecord(TypedDict):
    """One answer of the gate; see `compare.history.Judged`."""

    created: str
    run: str
    model: str | None
    verdict: str
    key: str
    look: int
    candidate: str
    baseline: str | None
    version: str | None
    policy: str
    policy_sha256: str
    data: str
    device: str
    recorded: str | None
    serving: ReleaseReading | None
    quality: ReleaseReading | None
    quality_key: str
    margin: float | None
    again: int
    ways: int


class FindingRecord(TypedDict):
    """What releases say of a step or a drift; see `compare.history.Finding`."""

    kind: str
    of: str
    alarm: bool
    value: float | None
    low: float | None
    high: float | None
    level: float | None
    margin: float | None
    releases: int
    since: str | None
    candidate: str
    shown: bool | None
    why: str | None


class HistoryRecord(TypedDict):
    """A verdict among those before it; see `gate.history`."""

    releases: list[ReleaseRecord]
    of: int
    findings: list[FindingRecord]


class VerdictHistory(HistoryRecord):
    """The same in verdict.json."""

    model: str | None
    why: str | None


class BlocksRecord(TypedDict):
    """How a look's blocks were ordered."""

    orders: list[str]
    places: list[list[int]] | None
    seed: int | None
    warm_up: WarmUpRecord


class Readings(TypedDict):
    """What looks have read, which the next one goes on from."""

    candidate_s: list[list[float]]
    baseline_s: list[list[float]]
    conditions: list[Figures]
    blocks: NotRequired[list[BlocksRecord]]
    candidate_j: NotRequired[list[list[float]]]
    baseline_j: NotRequired[list[list[float]]]


class Judgement(TypedDict):
    """A verdict and what it rests on."""

    schema: int
    line: str
    verdict: str
    exit_code: int
    why: str | None
    criteria: list[CriterionRecord]
    candidate: SideRecord
    baseline: SideRecord | None
    policy: PolicyRecord
    task: str
    primary: str
    unit: str
    data: str
    device: DeviceRecord
    key: str
    look: int
    looks: int
    run_id: str
    created: str
    recorded: NotRequired[str]
    dtype: NotRequired[ServedIn | None]


class Verdict(Judgement):
    """A verdict as the store records it."""

    readings: Readings


class ShownVerdict(Judgement):
    """A verdict as result.json has it."""

    promotion: Promotion | None
    history: VerdictHistory | None
    end: EndRecord


class VerdictFile(ShownVerdict):
    """verdict.json."""

    readings: Readings
    sha256: str


class NoVerdict(TypedDict):
    """verdict.json of a gate that came to none."""

    schema: int
    line: str
    verdict: None
    exit_code: int
    why: str | None
    criteria: list[CriterionRecord]
    run_id: str


# -- result.json ----------------------------------------------------------------------------------


class RunHours(TypedDict):
    """Device-hours of a run over all its attempts."""

    total: Figure
    work: Figure
    assess: Figure
    retry: Figure
    compare: Figure
    overhead: Figure


class OutsideNs(TypedDict):
    """Device-nanoseconds outside of stages, by phase."""

    overhead: PhasesNs
    compare: PhasesNs


class Rate(TypedDict):
    """What a device-hour costs, and who says so."""

    per_device_hour: float
    kind: str | None
    source: str | None
    date: str | None


class RunMoney(TypedDict):
    """What a run cost; see `ledger.run_cost`."""

    amount: Figure
    currency: str | None
    basis: str | None
    rate: Rate | None


class ConvergedRecord(TypedDict):
    """What a model took until it converged; see `ledger.converged`."""

    device_hours: Figure
    amount: Figure
    currency: str | None
    run: str | None


class RunTotals(TypedDict):
    """What a run came to."""

    attempts: int
    device_hours: RunHours
    phases_device_ns: OutsideNs
    compare_conditions: NotRequired[Figures]
    spent: Figure
    reused: Figure
    allocated: NotRequired[Allocated]
    cost: NotRequired[RunMoney]
    per_converged_model: NotRequired[ConvergedRecord]


class Conclusion(TypedDict):
    """What a report says in the end: one sentence, then a bullet for each answer."""

    verdict: str
    answers: list[str]


Environment = TypedDict(
    "Environment",
    {
        "command": str,
        "python": str,
        "platform": str,
        "cores": int | None,
        "torch": NotRequired[str | None],
        "transformers": NotRequired[str | None],
        "accelerate": NotRequired[str | None],
        "hydra-core": NotRequired[str | None],
        "safetensors": NotRequired[str | None],
        "numpy": NotRequired[str | None],
        "commit": str | None,
        "data": NotRequired[str],
        "data_digest": NotRequired[str],
        "notes": list[str],
    },
)
"""With what and how figures were made; a metered command has neither data nor libraries that are
known.
"""


class Result(TypedDict):
    """result.json."""

    schema: int
    run_id: str
    recipe: str
    question: str
    status: str
    why: str | None
    primary_arm: str
    is_release_check: NotRequired[bool]
    conclusion: Conclusion
    device: DeviceRecord
    environment: Environment
    run: RunTotals
    rows: list[Row]
    comparisons: list[Pair]
    verdict: ShownVerdict | None
    forecast: NotRequired[ForecastRecord]


# -- forecasts ------------------------------------------------------------------------------------


class Expected(TypedDict):
    """A figure before it is known, with the ends of its 90% interval."""

    value: float
    low: float
    high: float


class ForecastPart(TypedDict):
    """A part of a run: what it is expected to take, and once it is over, what it took.

    `what` is work or assess (of an arm and a seed), compare, or overhead. `like` has a digest for
    each likeness to parts of other runs. Seconds are wall time; `actual_s` is null until the part
    is over, or where it was reused.
    """

    what: str
    arm: str | None
    seed: int | None
    like: dict[str, str]
    flops: float | None
    expected_s: Expected | None
    source: str
    actual_s: float | None


class ProbeRecord(TypedDict):
    """What the first steps of a stage took: seconds of a step, of an evaluation and of all around
    them; bytes on the device at most, null where torch does not count them.
    """

    step_s: float
    eval_s: float
    around_s: float
    peak_bytes: int | None


class ForecastTotal(TypedDict):
    """A figure of the whole run: what was expected, why it was not, and what it came to."""

    expected: Expected | None
    why_missing: str | None
    actual: float | None


class ForecastRecord(TypedDict):
    """forecast.json of a run. `totals` are `device_hours`, `memory_bytes` of one device,
    `host_bytes` of the process, `disk_bytes` and `energy_j`; `missing` are the parts that the hours
    leave out. `settings` is a digest of those that decide what is computed.
    """

    settings: str
    device: str
    devices: int
    parts: list[ForecastPart]
    missing: list[str]
    totals: dict[str, ForecastTotal]


# -- records of the store -------------------------------------------------------------------------


class RunState(TypedDict):
    """run.json: which run of its key this is, and how far it came."""

    key: str
    status: str
    attempt: int
    pid: NotRequired[int | None]
    spent_device_hours: NotRequired[float | None]
    jobs: NotRequired[list[str]]


class TracedSteps(TypedDict):
    """What a profiler saw of single steps: shares of their time, each step's classes in ns, the
    traces' files.
    """

    shares: Figures
    steps: list[dict[str, int]]
    traces: list[str]
    notes: list[str]


class StageTimeline(TypedDict, total=False):
    """The same with device seconds by host phase; empty where nothing was looked at."""

    shares: Figures
    steps: list[dict[str, int]]
    traces: list[str]
    notes: list[str]
    phases_s: dict[str, float]


class PrecisionTrial(TypedDict):
    """A precision that was tried; see `stages.precision_choice.Tried`."""

    precision: str
    time_ratio: float
    loss_apart: float | None
    ci: Ends | None
    rounds: int


class PrecisionChoice(TypedDict):
    """precision.json of a stage: what was chosen for it."""

    chosen: str
    said: list[str]
    trials: list[PrecisionTrial]
    loss_tolerance: NotRequired[float]
    not_tried: NotRequired[list[str]]


class HeadChoice(TypedDict):
    """head.json of a stage: which kernel computes its head, and in chunks of how many tokens; None:
    what the device's chunks hold.
    """

    kernel: str
    rows: int | None
    said: str | None


class FormatTrial(TypedDict):
    """A format that was tried; see `quantization.search.Trial`."""

    format: str
    exclude: list[str]
    loss: float | None
    kl: float | None
    time_ratio: float
    memory_ratio: float


class SearchRecord(TypedDict):
    """How a search for a format ended; see `quantization.search.Found`."""

    prefer: str
    tolerance: float
    why: str
    trials: list[FormatTrial]
    next: FormatTrial | None


class CalibrationRecord(TypedDict):
    """Which activations were looked at before a model was quantized."""

    smoothing: float
    source: str
    documents: int
    digest: NotRequired[str]


class QuantizedFacts(TypedDict):
    """What quantizing did to a model; see `quantization.backend.Quantized`."""

    format: str
    library: str
    quantized_layers: int
    kept_layers: list[str]
    rest_dtype: str
    parameters: int
    quantized_parameters: int
    quantized_share: NotRequired[float]  # an older release did not say
    bytes_before: int
    bytes_after: int
    logits_sha256: list[str]


class QuantizationFacts(QuantizedFacts):
    """The same in artifact.json."""

    calibration: CalibrationRecord | None


class RecoveryRecord(TypedDict):
    """What a fallback loses on validation; null where that is no number."""

    loss: float | None
    kl: float | None
    documents: int


class About(TypedDict, total=False):
    """What a stage found out, by topic, as it goes into artifact.json. A topic that its stage alone
    reads is typed there.
    """

    precision: PrecisionChoice
    compiling: CompileRecord
    overlapping: OverlapRecord
    checkpoints: CheckpointsRecord
    attention: AttentionRecord
    head: HeadChoice
    search: SearchRecord
    quantization: QuantizationFacts
    recovery: RecoveryRecord


class OutputRecord(TypedDict):
    """What a stage reported; see `stages.context.Output`."""

    counts: Figures
    curve: list[dict[str, float]]
    flops_per_step: float | None
    flops_by_rule: NotRequired[float | None]
    seconds_in_steps: float | None
    existing: bool
    gpu_timeline: StageTimeline
    about: About


class KnownArtifact(TypedDict):
    """keys/KEY.json, as far as any says."""

    artifact: NotRequired[ArtifactRecord | None]


class Made(TypedDict):
    """keys/KEY.json: what a stage made, and what that took."""

    artifact: ArtifactRecord
    run_id: str
    attempt: int
    seed: int
    work_ns: int
    phases_ns: PhasesNs
    output: OutputRecord
    memory: Figures
    usage: NotRequired[UsageRecord]
    disturbance: NotRequired[Figures]
    ranks: NotRequired[list[RankTime]]
    beside: NotRequired[int]
    earlier: list[Row]


class VllmRecord(TypedDict):
    """What vLLM made of an artifact; see `evaluation.serving.vllm_check.Checked`."""

    outcome: Literal["ran", "failed", "not run here"]
    why: NotRequired[str]
    version: NotRequired[str]
    vllm: NotRequired[float]
    here: NotRequired[float]
    tolerance: NotRequired[float]
    agrees: NotRequired[bool]
    documents: NotRequired[int]
    tokens: NotRequired[int]


class Assessed(TypedDict):
    """assessments/KEY.json: how good an artifact is."""

    run_id: str
    items: str
    sha256: str | None
    rows: list[Row]
    vllm: NotRequired[VllmRecord]


class DtypeRecord(TypedDict, total=False):
    """In what arms were served that are stored in fp32; see `evaluation.serving.dtype.DtypeChoice`.
    Empty where an older release said nothing of it.
    """

    asked: str
    served: str | None
    trials: dict[str, list[float]]
    refused: list[str]
    said: list[str]


class DecodeProbe(TypedDict):
    """How tokens are written for one shape of prompts, where it was timed.

    Attributes:
        batch: Sequences at a time.
        chosen: The fastest, as `serving.decode` names it; `how` is what it runs.
        seconds: By way, of a batch, as it was read last.
        refused: Why others took no part.
        took_s: Of the whole probe, compiling and capturing included.
    """

    batch: int
    chosen: str
    how: str
    seconds: dict[str, float]
    refused: list[str]
    took_s: float


class DraftRecord(TypedDict):
    """An arm served with another one as its draft; see `evaluation.serving.drafting`.

    Attributes:
        draft: The arm that drafts; `of` is the one that verifies.
        tokens: That are drafted at a time.
        prompts: That both were read on; left out, as all that follows it, where nothing was read.
        how: How tokens were written with the draft; `how_without` without.
        saving: Share of the time without it that the draft saves, and the ends of its interval.
        why: Why nothing was read.
        said: What a report says of it.
    """

    draft: str
    of: str
    tokens: int
    prompts: NotRequired[int]
    how: NotRequired[str]
    how_without: NotRequired[str]
    saving: NotRequired[list[float]]
    why: str | None
    said: list[str]


class ServedPass(TypedDict):
    """A comparison pass; see `evaluation.serving.measure.ServePass`. Of pairs: arm, base, and what
    was read of them, an array in JSON.
    """

    serving: dict[str, Figures]
    seconds: list[tuple[str, str, list[Ends], list[Ends]]]
    how: dict[str, str]
    conditions: NotRequired[Figures]
    joules: NotRequired[list[list[Ends]] | None]
    why_no_joules: NotRequired[str | None]
    dtype: NotRequired[DtypeRecord]
    orders: NotRequired[list[tuple[str, str, list[str]]]]
    places: NotRequired[list[tuple[str, str, list[list[int]]]]]
    order_seed: NotRequired[int | None]
    warm_up: NotRequired[WarmUpRecord]
    decode: NotRequired[dict[str, list[DecodeProbe]]]
    draft: NotRequired[DraftRecord | None]


class Served(TypedDict):
    """serving/KEY.json: a comparison pass, and what it took."""

    run_id: str
    elapsed_ns: int
    served: ServedPass
    devices: NotRequired[int]


class ComparisonBasis(TypedDict):
    """evidence/compared.json of a run: what its comparisons rest on, beside per-document values."""

    seeds: list[SeedBasis]
    teachers: list[str]
    tolerance: ToleranceRecord
    served: ServedPass | None
    served_elsewhere_h: float


class JournalDigest(TypedDict):
    """The part of a journal that a receipt is of: its first bytes."""

    bytes: int
    sha256: str


class ReceiptDigests(TypedDict):
    """What a receipt is of, as SHA-256; `evidence` by name of file."""

    journal: JournalDigest
    result: str
    settings: str
    schema: str
    evidence: dict[str, str]


class ReceiptArtifact(TypedDict):
    """An artifact of a run, by the digest of its files."""

    arm: str
    seed: int
    kind: str
    digest: str
    bytes: int


class ReceiptData(TypedDict):
    """The data of a run: documents by split."""

    name: str
    digest: str
    splits: dict[str, int]


class Receipt(TypedDict):
    """receipt.json: what was measured, on what, and the digests of what that was made from."""

    schema: int
    run_id: str
    recipe: str
    question: str
    created: str
    release: str
    commit: str | None
    task: str
    primary_arm: str
    seeds: list[int]
    device: DeviceRecord
    data: ReceiptData
    digests: ReceiptDigests
    artifacts: list[ReceiptArtifact]
    figures: dict[str, dict[str, Any]]
    left_out: dict[str, str]


class HistoryEntry(TypedDict):
    """An attempt of any run that led to a checkpoint, up to its last one."""

    run_id: str
    attempt: int
    step: int
    phases_ns: PhasesNs
    beside: NotRequired[int]


class Progress(TypedDict):
    """extra.json of a checkpoint."""

    history: NotRequired[list[HistoryEntry]]


class CompileRecord(TypedDict):
    """Whether a training ran compiled, and why.

    Attributes:
        chosen: `compiled`, `captured` (compiled, and replayed as CUDA graphs) or `eager`; None: it
            ended before that was known.
        at_step: Steps taken before it was compiled; None: it was not tried.
        eager_s, compiled_s, captured_s: Seconds of a step, median of a few; None: not timed.
        compile_s: Seconds that compiling took.
        graphs: Compiled; `breaks`: places where one broke off; `recompiled`: for other shapes.
    """

    chosen: str | None
    why: str
    at_step: int | None
    eager_s: float | None
    compiled_s: float | None
    captured_s: float | None
    compile_s: float | None
    graphs: int
    breaks: int
    recompiled: int


class AttentionRecord(TypedDict):
    """What kept packed documents apart: `lengths`, `mask`, `positions` or `rows`.

    Attributes:
        teacher: None: there is no live one.
    """

    model: str
    teacher: str | None


class OverlapRecord(TypedDict):
    """Whether a teacher ran beside its student, and why.

    Attributes:
        chosen: None: it ended before that was known.
        apart_s, beside_s: Seconds of a step either way, median of a few; None: not timed.
    """

    chosen: bool | None
    why: str
    apart_s: float | None
    beside_s: float | None


class CheckpointsRecord(TypedDict):
    """Checkpoints of a training.

    Attributes:
        count: How many were written, in all attempts that led here.
        seconds: That the training waited for them, in total.
        every_s: Seconds between two, where that was computed from them.
    """

    count: int
    seconds: float
    every_s: float | None


class ProgressRecord(TypedDict):
    """How far a training came; see `training.loop.Progress`."""

    step: int
    examples: int
    tokens: int
    target_tokens: int
    flops: float
    own_flops: float
    step_ns: int
    eval_ns: int
    hard: float
    taught: float
    smooth: dict[str, float]
    best: dict[str, float]
    curve: list[dict[str, float]]
    compiling: NotRequired[CompileRecord]
    overlapping: NotRequired[OverlapRecord]
    checkpoints: NotRequired[CheckpointsRecord]


class TrainingState(TypedDict):
    """All of extra.json; `scaler` is what torch's own gives."""

    progress: ProgressRecord
    scaler: dict[str, Any]
    history: list[HistoryEntry]


class CheckpointManifest(TypedDict):
    """manifest.json of a checkpoint."""

    step: int
    format: NotRequired[int]
    sha256: dict[str, str]


class Shard(TypedDict):
    """Beside each shard of a capture."""

    sha256: str
    windows: int
    tokens: int
    read: int
    bytes: int
    flops: float | None
    capture_ns: int
    step: int
    history: list[HistoryEntry]


class LifeRecord(TypedDict):
    """What a rank of a metered command left."""

    host: str
    rank: int | None
    local_rank: int | None
    world_size: int | None
    device: str | None
    device_name: str | None
    start_ns: int
    end_ns: int
    phases_ns: PhasesNs
    counts: dict[str, float]
    ended: bool


# -- artifact.json --------------------------------------------------------------------------------


class ArtifactFacts(TypedDict):
    """What every artifact.json says; what a stage found out beside is free."""

    kind: str
    digest: str


class ChainCharge(TypedDict):
    """What the chain of an arm took in its run."""

    arm: str
    work_device_hours: float
    retry_device_hours: float
    model_flops: float | None
    foreign_load: Figure
    existing: list[str]


class ChargedOn(TypedDict, total=False):
    """The devices that a charge is of; `power_limit_w` of each."""

    kind: str
    name: str
    count: int
    power_limit_w: list[float | None] | None


class ChargeRecord(TypedDict):
    """What a model's chain took, as it travels with it in artifact.json (`charge`, `ledger`).

    A figure that was not counted is null. What else is known depends on the release that noted it.
    """

    work_device_hours: float | None
    retry_device_hours: float | None
    model_flops: float | None
    run_id: NotRequired[str]
    arm: NotRequired[str]
    seed: NotRequired[int]
    device: NotRequired[ChargedOn]
    tokens: NotRequired[float | None]
    energy_j: NotRequired[float | None]
    foreign_load: NotRequired[Figure]
    existing: NotRequired[list[str]]
    seeds_device_hours: NotRequired[list[object]]  # numbers, checked where they are read


class KnownQuality(TypedDict):
    """A quality in artifact.json."""

    value: float | None
    why_missing: str | None
    ci: Ends | None
    n: int | None


class AssessedFacts(TypedDict):
    """How good an artifact is, as artifact.json says (`assessed`)."""

    quality: dict[str, KnownQuality]
    data: str
    split: str
    margin: float
    device: str
    run_id: str


# -- lines of a journal that are read back --------------------------------------------------------


Kind: TypeAlias = Literal["work", "assess", "compare"]


class WindowRecord(TypedDict):
    """A stretch of an attempt; see `ledger.booking.Window`."""

    kind: Kind
    arm: str | None
    seed: int
    attempt: int
    start_ns: int
    end_ns: int
    kept_ns: int
    beside: NotRequired[int]


class Line(TypedDict):
    """What every line says: what happened, and when."""

    t: float
    mono_ns: int


RunEnvironment = TypedDict(
    "RunEnvironment",
    {"device": str, "data.digest": str, "mlflow.source.git.commit": str | None},
    total=False,
)
"""What a run's first line says of its surroundings, by the names of MLflow's tags; a metered
command has not been on a device yet.
"""


class Started(Line):
    """An attempt at a run began."""

    e: Literal["run_start"]
    attempt: int
    run_id: str
    recipe: str
    params: dict[str, Any]
    tags: dict[str, Any]
    environment: RunEnvironment
    started_ns: int
    devices: NotRequired[int]
    clock_ns: NotRequired[PhasesNs]
    grant: NotRequired[GrantRecord | None]


class StageStarted(Line):
    """A stage began to work."""

    e: Literal["stage_start"]
    arm: str
    stage: str
    type: str
    seed: int
    attempt: int
    params: dict[str, Any]
    depends_on: list[str]


class Opened(Line):
    """A window was opened."""

    e: Literal["open"]
    kind: Kind
    arm: str | None
    seed: int
    attempt: int
    start_ns: int
    clock_ns: NotRequired[PhasesNs]


class ArmSeed(TypedDict):
    """An arm for one seed."""

    arm: str
    seed: int


class BesideLine(Line):
    """Stages began to work side by side; their windows are opened and closed when all have
    ended.
    """

    e: Literal["beside"]
    attempt: int
    start_ns: int
    ranks: int
    arms: list[ArmSeed]
    clock_ns: PhasesNs


class Closed(Line):
    """A window was closed."""

    e: Literal["window"]
    arm: str | None
    seed: int
    window: WindowRecord
    phases_ns: PhasesNs
    clock_ns: NotRequired[PhasesNs]


class RowLine(Line):
    """A row was added, or an earlier form of it replaced."""

    e: Literal["row"]
    row: Row


class Points(Line):
    """A step's readings."""

    e: Literal["points"]
    arm: str
    seed: int
    attempt: int
    step: int
    values: dict[str, float | None]


class Checkpointed(Line):
    """A checkpoint is on disk."""

    e: Literal["checkpoint"]
    arm: str
    seed: int
    attempt: int
    step: int
    phases_ns: PhasesNs


class Resumed(Line):
    """A stage goes on from a checkpoint, or from none."""

    e: Literal["resume"]
    arm: str
    seed: int
    attempt: int
    step: int
    history: list[HistoryEntry]


class Booked(Line):
    """What comes from here on is booked no more: the last reading of the clock, and of what release
    the run is.
    """

    e: Literal["booked"]
    attempt: int
    end_ns: int
    clock_ns: PhasesNs
    release: str
    schema: str  # digest of that of result.json


class Ended(Line):
    """An attempt at a run came to its end."""

    e: Literal["run_end"]
    status: str
    why: str | None
    primary_arm: str | None
    run: RunTotals
    forecast: NotRequired[ForecastTotal]  # of device-hours


class DevicesUsed(TypedDict):
    """The devices that a metered command appeared on."""

    kind: str
    name: str
    ids: list[str]


class DevicesSeen(Line):
    """A metered command appeared on devices."""

    e: Literal["devices"]
    used: DevicesUsed


class ProcessStarted(Line):
    """A metered command runs."""

    e: Literal["started"]
    pid: int


class OfAttempt(TypedDict):
    """Which attempt at a stage something is of."""

    arm: str
    seed: int
    attempt: int


class ServedRow(OfAttempt):
    """A row's serving figures, which come after it."""

    serving: Figures


class ServingLine(Line):
    """Serving was read."""

    e: Literal["serving"]
    rows: list[ServedRow]


class ComparisonsLine(Line):
    """Pairs were compared."""

    e: Literal["comparisons"]
    comparisons: list[Pair]


class VerdictLine(Line):
    """A gate came to a verdict."""

    e: Literal["verdict"]
    verdict: Verdict
    sha256: str


class SelftestLine(Line):
    """A self-test came to its end."""

    e: Literal["selftest"]
    tags: dict[str, str | int | None]
    values: Figures


class Beat(Line):
    """A process is alive, or a self-test has trained once more; nothing is read of either."""

    e: Literal["heartbeat", "repeat"]


class Dataset(TypedDict):
    """A split that was read."""

    name: str
    digest: str
    split: str
    num_documents: int


class FirstLine(Started):
    """`run_start` with what MLflow's writer reads of it."""

    experiment: str
    tracking_uri: str | None
    question: str
    datasets: list[Dataset]
    changed: NotRequired[list[str]]  # names of `params` that are not their defaults


class LastLine(Ended):
    """`run_end` with what MLflow's writer reads of it."""

    description: str
    files: list[str]


Event: TypeAlias = (
    FirstLine
    | StageStarted
    | Opened
    | BesideLine
    | Closed
    | RowLine
    | Points
    | Checkpointed
    | Resumed
    | Booked
    | LastLine
    | DevicesSeen
    | ProcessStarted
    | ServingLine
    | ComparisonsLine
    | VerdictLine
    | SelftestLine
    | Beat
)
"""A line of a journal, told apart by `e`."""


# -- what others read of runs ---------------------------------------------------------------------


class Moment(TypedDict):
    """The last line that was delivered."""

    e: str
    t: float


class ArmAttempt(TypedDict):
    """What MLflow has had of an attempt at an arm."""

    seed: int
    finished: bool
    core: dict[str, float | None]
    model: NotRequired[str | None]  # MLflow's id of it


class Delivered(TypedDict):
    """mlflow.json of a run: how far it was delivered."""

    offset: int
    last: Moment | None
    dead: NotRequired[bool]
    parent: NotRequired[str | None]
    ended: NotRequired[bool]
    children: NotRequired[dict[str, str]]
    arms: NotRequired[dict[str, dict[str, ArmAttempt]]]
    spans: NotRequired[list[list[int]]]
    noted: NotRequired[float | None]
    experiment: NotRequired[str | None]


class DeliveryState(TypedDict):
    """The same with nothing left out."""

    offset: int
    last: Moment | None
    dead: bool
    parent: str | None
    ended: bool
    children: dict[str, str]
    arms: dict[str, dict[str, ArmAttempt]]
    spans: list[list[int]]
    noted: float | None
    experiment: str | None


class StoredRun(TypedDict):
    """A run as MLflow holds it, by MLflow's id; `end_ms` is None while it runs."""

    id: str
    status: str
    start_ms: int
    end_ms: int | None
    active: bool
    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]


class NamedDevice(TypedDict):
    """A device by its name."""

    name: str


class Registered(TypedDict):
    """`ledger` of an artifact.json: what a registered model cost."""

    run_id: str
    device: NamedDevice
    work_device_hours: float | None
    retry_device_hours: float | None
    model_flops: float | None


class MadeBy(TypedDict):
    """Who made an artifact."""

    arm: str
    status: str
    artifact: ArtifactRecord | None


class EndedResult(TypedDict):
    """result.json, as far as a reference to a run reads it."""

    status: str
    rows: list[MadeBy]
    why: NotRequired[str | None]
    primary_arm: NotRequired[str | None]


class ChargedHours(TypedDict):
    """Device-hours that a registration reads."""

    work: Figure
    retry: Figure


class ChargedCounts(TypedDict):
    """Counts that a registration reads."""

    tokens: Figure
    model_flops: Figure


class ChargedLedger(TypedDict):
    """A ledger, as far as a registration reads it."""

    device_hours: ChargedHours
    energy_j: Figure
    counts: ChargedCounts


class ChargedRow(MadeBy):
    """A row, as far as a registration reads it."""

    type: str
    seed: int
    depends_on: list[str]
    ledger: ChargedLedger


class ChargedDevice(NamedDevice):
    """The devices of a run, as far as a registration reads them."""

    kind: str


class ChargedResult(TypedDict):
    """result.json, as far as a registration reads it."""

    run_id: str
    status: str
    primary_arm: str | None
    device: ChargedDevice
    rows: list[ChargedRow]
    why: NotRequired[str | None]


class RunStarted(TypedDict):
    """The first line of a run's journal, as far as other runs read it."""

    run_id: str
    recipe: str
    params: dict[str, Any]
    tags: dict[str, Any]
    environment: RunEnvironment


class MeteredParams(TypedDict):
    """Settings of a metered command, as far as they are read back."""

    command: str


class CostRecord(TypedDict, total=False):
    """The rates that a metered command was given; see `config.settings.cost.CostConfig`."""

    kind: None  # the meter does not ask whose the devices are
    per_device_hour: float | None
    currency: str | None
    source: str | None
    date: str | None
    pue: float | None
    energy_price_per_kwh: float | None
    co2_g_per_kwh: float | None
    co2_source: str | None
    converged_at: float | None
    teacher_shared_by: int


class Metered(TypedDict):
    """The first line of a metered command's journal, beside what every run's says."""

    run_id: str
    started_ns: int
    name: str
    node: str
    identity: Identity
    params: MeteredParams
    cost: CostRecord
    grant: NotRequired[GrantRecord | None]


class MeteredStart(Metered):
    """All of it."""

    attempt: int
    devices: int
    recipe: str
    question: str
    experiment: str
    tracking_uri: str | None
    tags: dict[str, str]
    datasets: list[Dataset]
    environment: RunEnvironment


# -- beside the records of runs -------------------------------------------------------------------


class ItemsNote(TypedDict):
    """NAME.about.json: what the per-document values in NAME.jsonl were read on."""

    schema: NotRequired[int]
    data: str
    split: str
    evaluation: str
    artifact: NotRequired[str]


class CacheFacts(TypedDict):
    """What a teacher cache was made from and with."""

    method: str
    draws: int | None
    k: int | None
    temperature: float | None
    vocabulary: int
    precision: str
    seed: int
    sequence_length: int
    batch_size: int
    steps: int
    teacher: str
    data: str
    tokenizer: str
    packing: str


class CacheShard(TypedDict):
    """A shard of a teacher cache."""

    sha256: str
    windows: int
    tokens: int
    bytes: int


class CacheManifest(CacheFacts):
    """manifest.json of a teacher cache."""

    format: int
    versions: dict[str, str]
    columns: dict[str, str]
    windows: int
    tokens: int
    bytes: int
    bytes_per_token: float
    shards: list[CacheShard]


# -- selftest.json --------------------------------------------------------------------------------


class FalseRecord(TypedDict):
    """How many answers were false; see `compare.selftest.FalseAnswers`."""

    count: int
    n: int
    allowed: float
    chance: float
    ci: Ends | None
    too_many: bool


class TestedModel(TypedDict):
    """The model that was held against itself."""

    reference: str
    digest: str
    name: str | None
    version: str | None


class TestedPolicy(TypedDict):
    """The policy that was tested; `load` is its setting."""

    name: str
    sha256: str
    alpha: float
    blocks: int
    looks: int
    load: dict[str, int]


class TestedDtype(TypedDict):
    """What was asked for, and in what an artifact that is stored in fp32 was served."""

    asked: str | None
    served: str | None


class TrialRecord(TypedDict):
    """A trial; see `compare.selftest.Trial`."""

    outcome: str
    looks: int
    why: str | None
    log_ratios: list[float]


class TestedServing(TypedDict):
    """What trials came to; see `compare.selftest.Served`."""

    outcomes: dict[str, int]
    false_pass: FalseRecord
    false_fail: FalseRecord
    sd_log: float | None
    copies: list[float] | None
    noise_floor: float | None
    power: list[list[float]]
    trials: list[TrialRecord]


class TestedReading(TypedDict):
    """What a quality criterion said of a model against itself."""

    outcome: str
    value: float | None
    n: int | None
    why: str | None


class TestedQuality(TypedDict):
    """All of them, by quality, and how many were false."""

    false: FalseRecord
    read: dict[str, TestedReading]


class TestedTraining(TypedDict):
    """What repeated trainings came to."""

    device_hours: list[float]
    sd_log: float
    runs: int
    device: ChargedOn
    floor: float


class SelftestRecord(TypedDict):
    """selftest.json."""

    schema: int
    run_id: str
    exit_code: int
    too_many: bool
    model: TestedModel
    policy: TestedPolicy
    device: DeviceRecord
    data: str
    dtype: TestedDtype
    serving: TestedServing
    quality: TestedQuality
    training: TestedTraining | None
    device_hours: float
    created: str
