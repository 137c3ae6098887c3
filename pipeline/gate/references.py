"""What `candidate` and `baseline` refer to: an artifact in the store, with where it came from and
what it cost.

A reference is a folder, `latest`, a run's id (ours or MLflow's), an artifact's digest,
`models:/NAME/3` or `models:/NAME@champion`. Whatever it is, what is compared is the artifact
itself, by its digest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compare.savings import Spend
from pipeline.errors import UserError
from pipeline.ledger.records import ENDED, parsed, read_record
from pipeline.ledger.shapes import ChargeRecord, SideRecord
from pipeline.ledger.values import Value
from pipeline.models.files import model_files
from pipeline.store.artifacts import MANIFEST, Artifact, Store, bring, digest_given, facts_of
from pipeline.tracking.deliver import store_uri

FORMS = "give a folder, a run's id, latest, models:/NAME/3 or models:/NAME@champion"
KEPT = ("ledger", "charge", "assessed", "arm", "run_id", "recipe", "quantization", "name")
MAX_REFERENCE = 4096  # characters, as of a path
_MODEL = re.compile(r"models:/([^/@:]+)(?:/([0-9]+)|@([A-Za-z][\w-]*))")
_HEX = re.compile(r"[0-9a-f]{32}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Release:
    """One side of a gate.

    Attributes:
        reference: As it was typed.
        artifact: In the store.
        model: Registered model, where the reference names one.
        version: Of it.
        url: Where other machines find the artifact, if they do.
        charge: What it cost, as its run or its registration says; empty where nothing tells.
    """

    reference: str
    artifact: Artifact
    model: str | None = None
    version: str | None = None
    url: str | None = None
    charge: ChargeRecord | None = None

    def spends(self, arm: str) -> dict[str, Spend]:
        """Return what its chain took, as one arm, and the models that were there before it, whose
        past is unknown.

        A chain's sum is one figure: what two chains share cancels in their difference.
        """
        charge = self.charge
        work_h = None if charge is None else charge["work_device_hours"]
        retry_h = None if charge is None else charge["retry_device_hours"]
        if charge is None or work_h is None or retry_h is None:
            why = "its ledger has no device-hours" if self.charge else "no ledger"
            return {arm: Spend(arm=arm, flops=None, existing=True, unknown=why)}
        before = [f"existing model {digest[:8]}" for digest in charge.get("existing", [])]
        own = Spend(
            arm=arm,
            depends_on=tuple(before),
            work_h=work_h,
            retry_h=retry_h,
            flops=charge["model_flops"],
        )
        return {arm: own, **{name: Spend(arm=name, flops=0.0, existing=True) for name in before}}

    def to_json(self) -> SideRecord:
        """Return the form it has in verdict.json."""
        return {
            "reference": self.reference,
            "digest": self.artifact.digest,
            "path": str(self.artifact.path),
            "bytes": self.artifact.num_bytes,
            "model": self.model,
            "version": self.version,
            "url": self.url,
            "charge": self.charge,
        }


@dataclass(frozen=True, slots=True)
class Places:
    """Where references are looked up.

    Attributes:
        root: Of this project's runs.
        uri: Of the MLflow store, as settings declare it; None: the default.
        url: Of the artifact store that other machines reach.
    """

    root: Path
    store: Store
    uri: str | None = None
    url: str | None = None

    @property
    def tracking(self) -> str:
        """The MLflow store."""
        return store_uri(self.root, self.uri)


def resolve(reference: str, key: str, places: Places) -> Release | None:
    """Return what a reference stands for; None where it names a model or alias that is not there
    (yet).

    Raises:
        UserError: If it is no reference, cannot be reached, or is not what its digest says.
    """
    if not reference.isprintable() or not reference.strip() or len(reference) > MAX_REFERENCE:
        shown = reference if len(reference) <= MAX_REFERENCE else f"{reference[:80]}..."
        raise UserError(key, f"{shown!r} is no reference", FORMS)
    try:
        return _resolve(reference, key, places)
    except OSError as error:  # a name too long for the disk, a folder that may not be read
        if error.strerror is None:
            raise
        raise UserError(
            key, f"{reference[:80]} cannot be read ({error.strerror})", FORMS
        ) from error


def _resolve(reference: str, key: str, places: Places) -> Release | None:
    if reference.startswith("models:"):
        return _registered(reference, key, places)
    # As MLflow writes it
    name = reference.removeprefix("runs:/")
    if name == "latest" or (
        _RUN.fullmatch(name) and (places.root / "runs" / name / "result.json").is_file()
    ):
        return _of_run(
            places.root / ("latest" if name == "latest" else f"runs/{name}"), reference, key, places
        )
    # MLflow's run ids have the form of our digests: `_by_number` tells them apart.
    if _HEX.fullmatch(name):
        return _by_number(name, reference, key, places)
    folder = Path(reference).expanduser()
    if (folder / "result.json").is_file():
        return _of_run(folder, reference, key, places)
    if folder.is_dir():
        return _release(reference, key, take(folder, key, places.store))
    raise UserError(key, f"there is no {reference}", FORMS)


def take(folder: Path, key: str, store: Store) -> Artifact:
    """Bring a model's files into the store, with what its artifact.json says of them.

    Raises:
        UserError: If it holds no whole and safe model, or other bytes than its artifact.json
            vouches for.
    """
    try:
        files = model_files(folder)
    except UserError as error:
        raise UserError(key, error.problem, error.remedy) from None
    # a charge of NaN is refused, not passed over
    manifest, _ = parsed(folder / MANIFEST, any_number=True)
    facts = (
        {name: manifest[name] for name in KEPT if name in manifest}
        if isinstance(manifest, dict)
        else {}
    )
    if isinstance(manifest, dict) and manifest.get("digest") != digest_given(folder)[0]:
        raise UserError(
            key,
            f"{folder} holds other bytes than its {MANIFEST} vouches for",
            "give it whole, as made",
        )
    _charge(facts, folder, key)
    with store.scratch() as out:
        for path in files:
            bring(path, out / path.name)
        artifact = store.commit(out, "model", facts)
    known = facts_of(artifact.path)
    # The same bytes may have been in the store before, without these facts.
    for topic, said in facts.items():
        if topic not in known:
            store.annotate(artifact, topic, said)
    return artifact


def _release(reference: str, key: str, artifact: Artifact, **more: Any) -> Release:
    facts = facts_of(artifact.path)
    return Release(reference, artifact, charge=_charge(facts, artifact.path, key), **more)


def _why_no_charge(charge: Mapping[str, Any]) -> str | None:
    """Return what is wrong with what an artifact is said to have cost, or None: its artifact.json
    is in no digest.
    """
    for name in ("work_device_hours", "retry_device_hours", "model_flops"):
        value = charge.get(name)
        if value is None and name in charge:  # not counted
            continue
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 <= value < math.inf
        ):
            return f"{name} is {value!r}"[:80]
    if not isinstance(charge.get("device", {}), dict):
        return "device is no object"
    load = charge.get(
        "foreign_load", {"value": None, "provenance": "unavailable", "why_missing": "not recorded"}
    )
    if not _is_share(load):
        return "foreign_load is no share"
    existing = charge.get("existing", [])
    if not isinstance(existing, list) or not all(isinstance(each, str) for each in existing):
        return "existing is no list of digests"
    return None


def _is_share(raw: Any) -> bool:
    """Tell whether something read back is a value in [0, 1], or a null with its reason."""
    try:
        value = Value.from_json(raw)
    except (AssertionError, KeyError, TypeError, ValueError):
        return False
    return value.value is None or 0 <= value.value <= 1


def _charge(facts: Mapping[str, Any], folder: Path, key: str) -> ChargeRecord | None:
    """Return what an artifact cost: as it was registered, or as the run that made it noted
    (`runs/past_cost.py`).

    Raises:
        UserError: If nothing can have cost that: artifact.json is in no digest.
    """
    charge = next(
        (facts[topic] for topic in ("ledger", "charge") if isinstance(facts.get(topic), dict)), None
    )
    wrong = _why_no_charge(charge) if charge else None
    if wrong is not None:
        problem = f"{folder / MANIFEST} has a charge that nothing can have cost: {wrong}"
        raise UserError(key, problem, "restore it, or give the folder without it")
    return charge or None


def _of_run(folder: Path, reference: str, key: str, places: Places) -> Release:
    """Return the primary artifact of a run of ours."""
    result = read_record(folder / "result.json", ENDED)
    if result is None:
        raise UserError(key, f"{reference} is no run that has ended", FORMS)
    arm = result.get("primary_arm")
    made = [
        artifact
        for row in result["rows"]
        if row["arm"] == arm and row["status"] == "FINISHED" and (artifact := row["artifact"])
    ]
    if not made:
        raise UserError(
            key,
            f"{reference} ended {result.get('status')} without {arm}",
            "give a run that made a model",
        )
    digest = made[0]["digest"]
    return _release(reference, key, _fetch(digest, key, places, path=made[0]["path"]))


def _by_number(name: str, reference: str, key: str, places: Places) -> Release:
    """Return an artifact by its digest, or the primary artifact of an MLflow run."""
    if (places.store.root / "artifacts" / name).is_dir():
        return _release(reference, key, _fetch(name, key, places))
    from pipeline.tracking.registry import run_artifact

    path, digest, _ = run_artifact(places.tracking, name, key=key)
    return _release(reference, key, _fetch(digest, key, places, path=str(path)))


def _registered(reference: str, key: str, places: Places) -> Release | None:
    from pipeline.tracking.registry import resolve_version

    parts = _MODEL.fullmatch(reference)
    if parts is None:
        raise UserError(
            key,
            f"{reference} names no version of a model",
            "give models:/NAME/3 or models:/NAME@champion",
        )
    name, number, alias = parts.groups()
    version = resolve_version(places.tracking, name, version=number, alias=alias, key=key)
    if version is None:
        return None
    artifact = _fetch(
        version.digest, key, places, path=version.path or None, url=version.url or None
    )
    return _release(
        reference, key, artifact, model=name, version=version.version, url=version.url or None
    )


def _fetch(
    digest: str, key: str, places: Places, *, path: str | None = None, url: str | None = None
) -> Artifact:
    """Return an artifact by its digest: from the store, from where it lay when it was made, or from
    afar.

    Raises:
        UserError: If none of them has it, or other bytes lie there.
    """
    from pipeline.store.remote import download

    if not _HEX.fullmatch(digest):
        raise UserError(key, f"{digest!r} is no digest", "register the artifact anew")
    own = places.store.root / "artifacts" / digest
    if own.is_dir():
        _verify(own, digest, key)
        return Artifact(own.resolve(), "model", digest, digest_given(own)[1])
    if path is not None and Path(path).is_dir():
        _verify(Path(path), digest, key)
        return take(Path(path), key, places.store)
    # without a login, which store.url may have
    noted = url.removesuffix(f"/{digest}") if url else None
    # Once each, where both are the same place.
    for place in dict.fromkeys(each for each in (places.url, noted) if each):
        try:
            return download(place, digest, places.store, key=key)
        except UserError:
            # The last place to ask: its refusal is the answer.
            if place == noted or noted is None:
                raise
    where = "" if path is None else f" (it was made at {path})"
    raise UserError(
        key,
        f"artifact {digest} is not on this machine{where}",
        "set store.url to where it was uploaded",
    )


def _verify(folder: Path, digest: str, key: str) -> None:
    if digest_given(folder)[0] != digest:
        raise UserError(
            key,
            f"{folder} holds other bytes than digest {digest}",
            "restore it, or give another one",
        )
