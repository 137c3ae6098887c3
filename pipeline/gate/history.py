"""A verdict among those before it: what verdict.json and the report say of a model's last
releases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from pipeline.compare.history import Figure, Finding, Judged, count_once, figure, findings
from pipeline.errors import UserError
from pipeline.ledger.metrics import RELATIVE
from pipeline.ledger.shapes import (
    CriterionRecord,
    FindingRecord,
    HistoryRecord,
    Judgement,
    ReleaseRecord,
    VerdictHistory,
)

LAST = 10


def history_of(
    verdict: Judgement, uri: str | None, *, model: str | None = None, last: int = LAST
) -> VerdictHistory:
    """Return the releases before a verdict and this one, with what they say of steps and drift.

    Args:
        verdict: As verdict.json holds it; MLflow may have had it already, or not yet.
        uri: Of the MLflow store; None where this run keeps out of it.
        model: Registered model that it is about, where neither side is a version of one yet
            (bootstrap).
        last: Releases to list; alarms read all there are.

    Returns:
        `model`, `releases` (the oldest first), `findings`, and `why` where the store has nothing.
        It never raises: a verdict does not depend on its history.
    """
    own, why = of_verdict(verdict), None
    own = replace(own, model=own.model or model)
    found: list[Judged] = []
    if own.model is None:
        why = "neither side names a registered model"
    elif uri is None:
        why = "this run keeps out of MLflow"
    else:
        from pipeline.tracking.registry import read_verdicts

        try:
            found = read_verdicts(uri, model=own.model)
        except UserError as error:
            why = str(error)
    # The store may have this verdict already.
    earlier = [each for each in found if each.run != own.run]
    return {"model": own.model, **as_json(count_once([*earlier, own]), last), "why": why}


def histories(found: Iterable[Judged], last: int = LAST) -> list[VerdictHistory]:
    """Return a history per model, by name; the one of verdicts that name no model comes last.

    Args:
        found: Verdicts as a store has them, those given again too.
        last: Releases to list of each; alarms read all there are.
    """
    groups: dict[str | None, list[Judged]] = {}
    for each in found:
        groups.setdefault(each.model, []).append(each)
    return [
        {"model": name, **as_json(count_once(groups[name]), last), "why": None}
        for name in sorted(groups, key=lambda name: (name is None, name or ""))
    ]


def as_json(answers: Sequence[Judged], last: int) -> HistoryRecord:
    """Return answers about one model in the form they have in verdict.json."""
    said: list[Finding] = findings(answers) if answers and answers[0].model is not None else []
    return {
        "releases": [ReleaseRecord(**asdict(each)) for each in answers[-last:]],
        "of": len(answers),
        "findings": [FindingRecord(**asdict(each)) for each in said],
    }


def of_verdict(verdict: Judgement) -> Judged:
    """Return what a history keeps of a verdict."""
    by_name = {each["name"]: each for each in verdict["criteria"]}
    primary, baseline, candidate = verdict["primary"], verdict["baseline"], verdict["candidate"]
    serving, quality = by_name.get("serving"), by_name.get(f"quality/{primary}")
    return Judged(
        created=verdict["created"],
        run=verdict["run_id"],
        # Releases of one model share the baseline's name; a candidate need not be registered.
        model=(baseline or {}).get("model") or candidate["model"],
        verdict=verdict["verdict"],
        key=verdict["key"],
        look=verdict["look"],
        candidate=candidate["digest"],
        baseline=None if baseline is None else baseline["digest"],
        version=candidate["version"],
        policy=verdict["policy"]["name"],
        policy_sha256=verdict["policy"]["sha256"],
        data=verdict["data"],
        device=verdict["device"]["name"],
        recorded=verdict.get("recorded"),
        quality_key=primary,
        serving=_figure(serving, relative=True, blocks=(serving or {}).get("n")),
        quality=_figure(quality, relative=primary in RELATIVE),
        margin=None if quality is None or quality["threshold"] is None else -quality["threshold"],
    )


def _figure(
    criterion: CriterionRecord | None, *, relative: bool, blocks: int | None = None
) -> Figure | None:
    if criterion is None or criterion["ci"] is None or criterion["outcome"] == "INVALID":
        return None
    if criterion["level"] is None:
        return None
    low, high = criterion["ci"]
    return figure(
        criterion["value"]["value"],
        low,
        high,
        level=criterion["level"],
        relative=relative,
        blocks=blocks,
    )
