"""What a given model cost before (unknown, unless it was registered with a ledger), and what one
made here has cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.compare.savings import Spend, counted
from pipeline.ledger.records import REGISTERED, tell, why_damaged
from pipeline.ledger.shapes import ChainCharge, Registered
from pipeline.ledger.values import Value, derive, null
from pipeline.store.artifacts import MANIFEST, digest_given, read_json


def past_spend(arm: str, path: str | None, device: str) -> Spend:
    """Return what the model given as `arm` cost before this run.

    Args:
        path: A folder or Hub name; None: the model is made here, and cost nothing before.
        device: Exact name of the device of this run: device-hours of another model of device are
            never subtracted from its own.

    Returns:
        What it was registered with; else, and where that cannot be used, an existing model with the
        reason.
    """
    if path is None:
        return Spend(arm=arm, flops=0.0)
    folder = Path(path).expanduser()
    manifest = read_json(folder / MANIFEST) if folder.is_dir() else None
    registered = manifest.get("ledger") if isinstance(manifest, dict) else None
    if registered is not None and why_damaged(registered, REGISTERED) is not None:
        tell(
            folder / MANIFEST,
            str(why_damaged(registered, REGISTERED)),
            "what it says of a cost is not charged",
        )
        registered = None
    if not isinstance(manifest, dict) or registered is None:
        return Spend(arm=arm, flops=0.0, existing=True)
    why = _why_not_charged(folder, manifest.get("digest"), registered, device)
    if why is not None:
        return Spend(arm=arm, flops=0.0, existing=True, unknown=why)
    return Spend(
        arm=arm,
        work_h=registered["work_device_hours"],
        retry_h=registered["retry_device_hours"],
        flops=registered["model_flops"],
        registered=registered["run_id"],
    )


def _why_not_charged(
    folder: Path, digest: str | None, registered: Registered, device: str
) -> str | None:
    """Return why the hours that a model was registered with cannot be charged here, or None."""
    # No digest covers artifact.json: other weights may lie beside the cost of these.
    if digest_given(folder)[0] != digest:
        return "existing model, changed since it was registered"
    known = registered["device"]["name"]
    if known != device:
        return f"registered hours are of {known}, not of {device}"
    return None


def _most(loads: list[Value]) -> Value:
    """Return the largest of the shares that others took, as a value."""
    return derive(lambda *shares: max(shares), *loads) if loads else null("nothing was trained")


def charge(arm: str, spends: Mapping[str, Spend], existing: Mapping[str, str]) -> ChainCharge:
    """Return what an arm's chain took, as it travels with the artifact in artifact.json.

    Args:
        spends: Of every arm in the chain.
        existing: Digests of the models that were there before, by arm: what they once cost is
            unknown.

    Returns:
        `work_device_hours`, `retry_device_hours` and `model_flops` (null where a stage's were not
        counted) over the chain, `foreign_load`, what others took of the device at most while a
        stage of it worked (a value), and the digests of `existing` models in it.
    """
    own = counted(arm, spends, ())
    loads = [
        spend.foreign_load or null("not recorded")
        for spend in own
        if spend.work_h > 0 and not spend.existing
    ]
    flops = [spend.flops for spend in own if not spend.existing]
    return {
        "arm": arm,
        "work_device_hours": sum(spend.work_h for spend in own),
        "retry_device_hours": sum(spend.retry_h for spend in own),
        "model_flops": None if None in flops else sum(each for each in flops if each is not None),
        "foreign_load": _most(loads).to_json(),
        "existing": [existing.get(spend.arm, spend.arm) for spend in own if spend.existing],
    }
