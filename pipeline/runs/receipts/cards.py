"""A card in every model that a run made, from its receipt and the files that this is made of."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.compare.savings import Spend, chain
from pipeline.config.arms import BASE, STUDENT_INIT, stage_name
from pipeline.config.text_files import open_file
from pipeline.ledger.cost import cost_in, emissions_g
from pipeline.ledger.metrics import PRIMARY
from pipeline.ledger.shapes import ArtifactRecord, Figure, Receipt, Row
from pipeline.ledger.values import Provenance, Value, null
from pipeline.report.model_card import CardFacts, Step, model_card, seeds_said
from pipeline.runs.receipts.receipt import Kept
from pipeline.store.artifacts import CARD, MODEL, Artifact, Store, read_json
from pipeline.tasks.table import Task

MAX_HEADER = 2**27  # bytes of the header of a file of weights
SETTINGS = ("steps", "batch_size", "sequence_length", "learning_rate", "schedule", "optimizer")


def write_cards(kept: Kept, receipt: Receipt, sha256: str, store: Store) -> list[str]:
    """Write a card into every model that this run made, or that has none yet; return the arms whose
    artifact has a README.md of somebody else.
    """
    left: list[str] = []
    for row, record in _models(kept):
        artifact = Artifact.from_json(record)
        is_here = artifact.path.parent == store.root.resolve() / "artifacts"
        # the card of the run that made it says more than this one's, which took it over
        if not is_here or (row["reused"] is not None and (artifact.path / CARD).exists()):
            continue
        text = model_card(facts_of_card(kept, receipt, sha256, row, artifact))
        if not store.put_card(artifact, text):
            left.append(row["arm"])
    return left


def _models(kept: Kept) -> Iterator[tuple[Row, ArtifactRecord]]:
    if kept.result.get("is_release_check"):  # what is released was made elsewhere
        return
    for row in kept.result["rows"]:
        record = row["artifact"]
        if row["status"] == "FINISHED" and record is not None and record["kind"] == MODEL:
            yield row, record


def facts_of_card(
    kept: Kept, receipt: Receipt, sha256: str, row: Row, artifact: Artifact
) -> CardFacts:
    """Return what the card of a model says.

    Args:
        sha256: Of the receipt.
        row: That made it.
    """
    steps = [*_steps(kept, row)]
    settings: dict[str, Any] = kept.settings
    energy = _sum([each.energy_j for each in steps])
    config = read_json(artifact.path / "config.json")
    architectures = config.get("architectures") if isinstance(config, dict) else None
    quantization, device = row.get("quantization"), receipt["device"]
    return CardFacts(
        name=f"{settings['model']['name']} {row['arm']}",
        arm=row["arm"],
        seed=row["seed"],
        recipe=receipt["recipe"],
        run_id=receipt["run_id"],
        created=receipt["created"],
        release=receipt["release"],
        task=Task(receipt["task"]),
        architecture=str(architectures[0]) if architectures else None,
        parameters=parameters_in(artifact.path),
        format=None if quantization is None else quantization["format"],
        given=_given(kept, row),
        hub_model=_on_hub(settings["model"]["path"]),
        hub_data=_on_hub(settings["data"]["hub"]),
        data=receipt["data"],
        device=f"{device['count']} x {device['name']} ({device['kind']})",
        chain=steps,
        flops=_sum([each.flops for each in steps if _counts(each.flops)]),
        energy_j=energy,
        emissions_g=emissions_g(energy, cost_in(settings)),
        emissions_source=settings["cost"].get("co2_source"),
        settings=_training(settings, row),
        quality=row["quality"],
        limits=[*_limits(kept, receipt, row, energy)],
        digest=artifact.digest,
        receipt_sha256=sha256,
    )


def _chain(kept: Kept, row: Row) -> list[Spend]:
    """Return what the chain of a row's arm is made of, the arm last."""
    assert kept.basis is not None, "it was written before the receipt"
    raw = next(each for each in kept.basis["seeds"] if each["seed"] == row["seed"])
    spends = {each["arm"]: Spend.from_json(each) for each in raw["spends"]}
    return [spends[arm] for arm in chain(stage_name(row["arm"]), spends)]


def _steps(kept: Kept, row: Row) -> Iterator[Step]:
    """Yield the stages that led to a model, each with all attempts at it."""
    for spend in _chain(kept, row):
        own = [
            each
            for each in kept.result["rows"]
            if stage_name(each["arm"]) == spend.arm and each["seed"] == row["seed"]
        ]
        if not own:
            continue
        made = own[-1]
        yield Step(
            arm=spend.arm,
            type=made["type"],
            reads=made.get("inputs", {}),
            hours=(spend.work_h, spend.retry_h),
            energy_j=_sum([Value.from_json(each["ledger"]["energy_j"]) for each in own]),
            flops=Value.from_json(made["ledger"]["counts"]["model_flops"]),
            spent_by=made["reused"] or kept.result["run_id"],
        )


def _given(kept: Kept, row: Row) -> dict[str, str]:
    """Return what a chain began with, in words, by arm; folders of a machine are not named."""
    paths = {BASE: kept.settings["model"]["path"], STUDENT_INIT: kept.settings["student"]["path"]}
    found: dict[str, str] = {}
    for spend in _chain(kept, row):
        path = paths.get(spend.arm)
        if path is None:
            continue
        name = _on_hub(path)
        what = "a model in a folder" if name is None else f"{name} of the Hugging Face Hub"
        if spend.registered is not None:
            found[spend.arm] = f"{what}, registered with what run {spend.registered} spent"
        elif spend.existing:
            found[spend.arm] = f"{what}; what it cost before is unknown ({spend.unknown})"
    return found


def _on_hub(name: str | None) -> str | None:
    """Return a name of the Hub without its revision; None where it is a path, or nothing."""
    if name is None or name.count("/") != 1 or name[0] in "./~" or Path(name).exists():
        return None
    return name.partition("@")[0]


def _training(settings: dict[str, Any], row: Row) -> dict[str, Any]:
    """Return the settings that an arm was trained with: the stage's own, else those of training."""
    own = settings["stages"].get(stage_name(row["arm"])) or {}
    common = settings["training"]
    if "steps" not in own:  # it trains nothing
        return {}
    found = {name: own.get(name) or common.get(name) for name in SETTINGS}
    return {name: value for name, value in found.items() if value is not None}


def _limits(kept: Kept, receipt: Receipt, row: Row, energy: Value) -> Iterator[str]:
    """Yield what was not measured, and what figures rest on."""
    data = kept.settings["data"]
    if data["path"] is None and data["hub"] is None:
        yield (
            "trained and scored on the embedded demonstration data, source code of Python: it shows"
            " that the pipeline works, and is of no other use"
        )
    yield seeds_said(receipt["seeds"])
    primary = PRIMARY[Task(receipt["task"])]
    for key, figure in row["quality"].items():
        if figure["value"] is None:
            yield f"{key} is not known: {figure['why_missing']}"
    read = row["quality"].get("read_documents")
    if read is not None and (read["value"] or 1.0) < 1:
        yield f"scored on {read['value']:.0%} of the documents of the test split"
    cut = row["quality"].get("cut_documents")
    if cut is not None and cut["value"]:
        yield f"of {cut['value']:.0%} of the documents the head alone was read"
    if primary in row["quality"] and "groups" not in row["quality"][primary]:
        yield "intervals take documents as independent of one another"
    if energy.value is None:
        yield f"energy is not known: {energy.why_missing}; hours and FLOPs stand instead"
    served: Figure | None = row["serving"].get("device_s_per_1k_units")
    if served is not None and served["value"] is None:
        yield f"what serving costs is not known: {served['why_missing']}"


def _counts(value: Value) -> bool:
    """Whether FLOPs of a stage are known, or should be: one that trains nothing has none."""
    return value.value is not None or "trains nothing" not in (value.why_missing or "")


def _sum(values: Sequence[Value]) -> Value:
    """Return a sum; null with the first reason where a part is."""
    missing = next((each for each in values if each.value is None), None)
    if missing is not None:
        return missing
    if not values:
        return null("nothing was trained")
    worst = max((each.provenance for each in values), key=[*Provenance].index)
    return Value(math.fsum(each.value or 0.0 for each in values), worst)


def parameters_in(folder: Path) -> int | None:
    """Return how many numbers the files of weights in a folder hold, read off their headers; None
    where one cannot be read.

    Source: https://github.com/huggingface/safetensors, README, "Format".
    """
    total, files = 0, sorted(folder.glob("*.safetensors"))
    try:
        for path in files:
            with open_file(path) as file:
                (size,) = struct.unpack("<Q", file.read(8))
                if size > MAX_HEADER:
                    return None
                header = json.loads(file.read(size))
            shapes = (each["shape"] for name, each in header.items() if name != "__metadata__")
            total += sum(math.prod(shape) for shape in shapes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return None
    return total if files else None
