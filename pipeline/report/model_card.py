"""The card of a model: the README.md in its artifact, with the metadata that the Hugging Face Hub
reads.

It says what its run found out, and what it does not know. Source of what is asked for: Regulation
(EU) 2024/1689, Annex XI, section 1, points 1 and 2; SPDX 3.0.1, AI profile, class AIPackage
(https://spdx.github.io/spdx-spec/v3.0.1/model/AI/Classes/AIPackage).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import one_line
from pipeline.ledger.numbers import count, how_many, significant
from pipeline.ledger.shapes import Quality, ReceiptData
from pipeline.ledger.values import Value
from pipeline.report.text import bullet, code_text, markdown_text
from pipeline.store.artifacts import CARD_MARK
from pipeline.tasks.table import Task

HUB_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
}
"""What the Hub calls the tasks that models of a class are for."""
NOT_SAID = (
    "intended and prohibited uses, acceptable use policy, licence, date and ways of release",
    "risks, bias, and behaviour outside of the test split",
)
"""What no run finds out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A stage of the chain that led to a model.

    Attributes:
        reads: The arms it read, by role.
        hours: Device-hours: work, and failed or replayed.
        spent_by: The run that spent them.
    """

    arm: str
    type: str
    reads: Mapping[str, str]
    hours: tuple[float, float]
    energy_j: Value
    flops: Value
    spent_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card says.

    Attributes:
        given: What was there before, in words, by arm: its own past is unknown, or declared.
        hub_model: The Hub's name of the model it began from; None: it lay in a folder, or was made.
        hub_data: The Hub's name of the data.
        architecture: The class of transformers.
        parameters: Numbers in its weights' files.
        flops: Of all training in the chain.
        energy_j: Of the chain, as its devices' counters said.
        emissions_g: CO2 equivalent.
        emissions_source: Who declared the intensity.
        limits: What was not measured, and what figures rest on.
        receipt_sha256: Of the receipt of its run.
    """

    name: str
    arm: str
    seed: int
    recipe: str
    run_id: str
    created: str
    release: str
    task: Task
    architecture: str | None
    parameters: int | None
    format: str | None
    given: Mapping[str, str]
    hub_model: str | None
    hub_data: str | None
    data: ReceiptData
    device: str
    chain: Sequence[Step]
    flops: Value
    energy_j: Value
    emissions_g: Value
    emissions_source: str | None
    settings: Mapping[str, Any]
    quality: Quality
    limits: Sequence[str]
    digest: str
    receipt_sha256: str

    @property
    def hours(self) -> tuple[float, float]:
        """Device-hours of the chain: work, and failed or replayed."""
        return sum(each.hours[0] for each in self.chain), sum(each.hours[1] for each in self.chain)


def model_card(facts: CardFacts) -> str:
    """Return the text of a card, its metadata first."""
    metadata = _metadata(facts).to_yaml()
    parts = [
        f"# {markdown_text(facts.name)}",
        _opening(facts),
        "## Lineage",
        _chain_table(facts),
        "\n".join(bullet(f"{arm}: {said}") for arm, said in facts.given.items()),
        "## Quality",
        _quality_table(facts),
        "## Compute, energy and what regulations ask for",
        _asked_table(facts),
        "## Limits",
        "\n".join(map(bullet, [*facts.limits, *(f"not found out here: {w}" for w in NOT_SAID)])),
        "## How to check this",
        _check(facts),
    ]
    text = "\n\n".join(part for part in parts if part)
    return f"{CARD_MARK}{metadata}\n---\n\n{text}\n"


def _metadata(facts: CardFacts) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    hub_task = HUB_TASKS.get(facts.task.kind.auto_class)
    results = [
        EvalResult(
            task_type=hub_task or facts.task.value,
            dataset_type=one_line(facts.hub_data or "private", 100),
            dataset_name=one_line(facts.data["name"], 100),
            dataset_split="test",
            dataset_revision=facts.data["digest"],
            metric_type=key,
            metric_value=figure["value"],
            metric_args={"confidence_interval_95": figure["ci"], "documents": figure["n"]},
        )
        for key, figure in facts.quality.items()
        if figure["value"] is not None and figure["ci"] is not None
    ]
    more: dict[str, Any] = {}
    if facts.emissions_g.value is not None:
        more["co2_eq_emissions"] = {
            "emissions": facts.emissions_g.value,
            "source": one_line(facts.emissions_source, 200),
            "training_type": "fine-tuning" if facts.given else "pre-training",
            "hardware_used": one_line(facts.device, 100),
        }
    if facts.hub_model is not None and facts.format is not None:
        more["base_model_relation"] = "quantized"
    return ModelCardData(
        model_name=one_line(facts.name, 100),
        base_model=None if facts.hub_model is None else one_line(facts.hub_model, 100),
        datasets=None if facts.hub_data is None else one_line(facts.hub_data, 100),
        library_name="transformers",
        pipeline_tag=hub_task,
        tags=["model-efficiency-pipeline", one_line(facts.recipe, 100)],
        eval_results=results or None,
        **more,
    )


def _opening(facts: CardFacts) -> str:
    made = f"Arm `{code_text(facts.arm)}` (seed {facts.seed}) of recipe `{code_text(facts.recipe)}`"
    return f"{made}, run `{code_text(facts.run_id)}`, {markdown_text(facts.created)}."


def _chain_table(facts: CardFacts) -> str:
    head = ["stage", "type", "reads", "device-hours", "lost", "energy", "FLOPs", "spent by run"]
    body = [
        [
            each.arm,
            each.type,
            ", ".join(f"{role}: {arm}" for role, arm in each.reads.items()) or "nothing",
            significant(each.hours[0]),
            significant(each.hours[1]),
            _shown(each.energy_j, _joules),
            _shown(each.flops, count),
            each.spent_by,
        ]
        for each in facts.chain
    ]
    return _table(head, body)


def _quality_table(facts: CardFacts) -> str:
    body = [
        [
            key,
            "null" if figure["value"] is None else significant(figure["value"], 4),
            (figure["why_missing"] or "") if figure["value"] is None else _interval(figure["ci"]),
            str(figure["n"] or ""),
        ]
        for key, figure in facts.quality.items()
    ]
    return _table(["on the test split", "value", "95% interval", "documents"], body)


def _asked_table(facts: CardFacts) -> str:
    """Return the facts that Annex XI and SPDX ask for, each with where they do."""
    work, lost = facts.hours
    splits = ", ".join(f"{name} {number}" for name, number in facts.data["splits"].items())
    training = " -> ".join(f"{each.arm} ({each.type})" for each in facts.chain)
    settings = ", ".join(f"{name}={value}" for name, value in facts.settings.items())
    parameters = "unknown" if facts.parameters is None else count(facts.parameters)
    stored = "" if facts.format is None else f", stored as {facts.format}"
    rows = [
        ("type of model", f"{facts.architecture or 'unknown'}{stored}", "1(d)", "typeOfModel"),
        ("numbers in its weights", parameters, "1(d)", ""),
        ("input and output", facts.task.kind.word, "1(e)", "domain"),
        ("training process", training, "2(b)", "informationAboutTraining"),
        ("settings", settings, "2(b)", "hyperparameter"),
        (
            "data",
            f"{facts.data['name']}, digest {facts.data['digest']}, documents: {splits}; blanks and"
            " repeats dropped, no document in two splits",
            "2(c)",
            "modelDataPreprocessing",
        ),
        ("training compute", _shown(facts.flops, _flops), "2(d)", "informationAboutTraining"),
        (
            "training time",
            f"{significant(work)} device-hours, and {significant(lost)} lost",
            "2(d)",
            "informationAboutTraining",
        ),
        ("hardware", facts.device, "2(d)", "informationAboutTraining"),
        ("energy", _shown(facts.energy_j, _joules), "2(e)", "energyConsumption"),
        ("CO2 equivalent", _shown(facts.emissions_g, _grams), "", ""),
        ("evaluation", "see Quality", "", "metric"),
        ("limits", "see Limits", "", "limitation"),
    ]
    head = ["fact", "value", "EU AI Act, Annex XI, section 1", "SPDX 3.0.1, AIPackage"]
    return _table(head, rows)


def _check(facts: CardFacts) -> str:
    return "\n".join(
        [
            "All figures are of the receipt of the run, `receipt.json` in its folder, with SHA-256",
            f"`{facts.receipt_sha256}`. Whoever has that folder makes each of them again:",
            "",
            "```",
            f"python -m pipeline verify {code_text(facts.run_id)}/receipt.json",
            "```",
            "",
            f"The files of this model, without this card and artifact.json, have the digest"
            f" `{facts.digest}`. Release {markdown_text(facts.release)} of the pipeline.",
        ]
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *body]
    return "\n".join(
        "| " + " | ".join(cell if cell == "---" else markdown_text(cell) for cell in line) + " |"
        for line in lines
    )


def _shown(value: Value, form: Any) -> str:
    if value.value is None:
        return f"null: {value.why_missing}"
    return f"{form(value.value)} ({value.provenance})"


def _joules(value: float) -> str:
    return f"{significant(value / 3.6e6)} kWh"


def _grams(value: float) -> str:
    return f"{significant(value)} g"


def _flops(value: float) -> str:
    return f"{value:.3g} FLOPs"


def _interval(ends: Sequence[float] | None) -> str:
    return "none" if ends is None else f"{significant(ends[0], 4)} to {significant(ends[1], 4)}"


def seeds_said(seeds: Sequence[int]) -> str:
    """Return what the number of seeds means for figures."""
    if len(seeds) > 1:
        return f"made with {how_many(len(seeds), 'seed')}; this is one of them"
    return "made with one seed: another one may give other figures"
