"""Whether a receipt is true: its digests held against the files beside it, and every figure made
again, or found again in the journal, where it was noted when it was read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pipeline.config.text_files import read_bytes
from pipeline.errors import UserError, one_line
from pipeline.ledger.records import RECEIPT, RECEIPT_VERSION, parsed, why_damaged
from pipeline.ledger.run_cost import paid_for
from pipeline.ledger.shapes import Receipt
from pipeline.ledger.values import from_schema_1
from pipeline.runs.receipts.figures import Members, differs, journaled
from pipeline.runs.receipts.receipt import (
    FILE,
    Kept,
    NotThere,
    make_receipt,
    read_kept,
    schema_digest,
    why_none,
)
from pipeline.runs.receipts.recompute import made_again
from pipeline.runs.receipts.signature import NotSigned, fingerprint, principal_of, signer_of
from pipeline.store.artifacts import digest_folder

MAX_SIGNATURE = 2**16  # bytes
OTHERS = "rests on what is in no file of this run"


@dataclass(slots=True)
class Found:
    """What became of a receipt.

    Attributes:
        again: Figures that were made again, and are equal.
        noted: Figures that an instrument read, or that were counted: the journal has the same.
        whole: Artifacts whose bytes are those of their digests, and whose signature it is.
        differing: What is not as the receipt says, each with what was found.
        missing: What could not be checked for want of a file, each with the reason.
        apart: What no file of a run lets be checked, each with the reason.
    """

    again: list[str] = field(default_factory=list[str])
    noted: list[str] = field(default_factory=list[str])
    whole: list[str] = field(default_factory=list[str])
    differing: dict[str, str] = field(default_factory=dict[str, str])
    missing: dict[str, str] = field(default_factory=dict[str, str])
    apart: dict[str, str] = field(default_factory=dict[str, str])


def read_receipt(path: Path) -> Receipt:
    """Return a receipt.

    Raises:
        UserError: If there is none, it is damaged, or of a release to come.
    """
    remedy = f"name a {FILE}, or a folder that holds one"
    found, why = parsed(path)
    receipt: Any = found
    if why is not None:
        raise UserError("RECEIPT", f"{path}: {why}", remedy)
    if receipt is None:
        raise UserError("RECEIPT", f"{path}: {_why_no_receipt(path)}", remedy)
    version = receipt.get("schema") if isinstance(receipt, dict) else None
    if isinstance(version, int) and version > RECEIPT_VERSION:
        problem = f"{path} is of schema {version}, and this release reads {RECEIPT_VERSION}"
        raise UserError(
            "RECEIPT", problem, "verify it with the release that wrote it, or a newer one"
        )
    why = why_damaged(receipt, RECEIPT)
    if why is not None:
        raise UserError("RECEIPT", f"{path} is no receipt: {why}", remedy)
    return cast(Receipt, receipt)


def _why_no_receipt(path: Path) -> str:
    """Return why there is no receipt: what the result beside it says, where there is one."""
    result = from_schema_1(parsed(path.parent / "result.json")[0])
    try:
        why = why_none(result)
    except (TypeError, LookupError, AttributeError):  # no result of ours
        why = None
    return "there is no such file" if why is None else f"there is none: {why}"


def verify(
    path: Path, receipt: Receipt, *, store: Path | None = None, signers: Path | None = None
) -> Found:
    """Hold a receipt against the files of its folder, and against a store.

    Args:
        path: Of the receipt.
        store: Where the artifacts have to be; None: those that lie where they were made are looked
            at.
        signers: Who may have signed it; None: anybody, or nobody.

    Raises:
        UserError: If the store lacks an artifact, or `signers` cannot be read.
    """
    found = Found()
    _compare_signature(found, path, signers)
    try:
        kept = read_kept(path.parent)
    except NotThere as problem:
        name = problem.path.name
        (found.differing if problem.path.is_file() else found.missing)[name] = problem.why
        return found
    _compare_facts(found, receipt, make_receipt(kept))
    if receipt["digests"]["schema"] != schema_digest():
        found.apart["digests/schema"] = "this release has another schema of result.json"
    _compare_figures(found, receipt, kept)
    _compare_end(found, kept)
    for name, why in _artifacts(found, kept, store):
        found.apart[name] = why
    return found


def _compare_signature(found: Found, path: Path, signers: Path | None) -> None:
    """Hold the signature beside a receipt, where there is one or one is asked for, against it."""
    name, beside = "the signature", path.with_name(f"{path.name}.sig")
    try:
        signature = read_bytes(beside, limit=MAX_SIGNATURE).decode("ascii", "replace")
        public = signer_of(read_bytes(path), signature)
    except FileNotFoundError:
        if signers is not None:
            found.missing[name] = f"there is no {beside.name}"
        return
    except OSError as error:
        found.missing[name] = f"{beside.name} cannot be read ({error.strerror or error})"
        return
    except NotSigned as problem:
        found.differing[name] = f"{beside.name}: {problem}"
        return
    if signers is None:
        found.apart[name] = f"by key {fingerprint(public)}: --signers tells whose that is"
        return
    who = principal_of(public, signers)
    if who is None:
        found.differing[name] = f"by key {fingerprint(public)}, which {signers} does not allow"
    else:
        found.whole.append(f"{name}, by {who}")


def _compare_facts(found: Found, said: Receipt, files: Receipt) -> None:
    """Compare all that a receipt says with what the files beside it say."""
    for name, ours, theirs in _leaves(said, files, ""):
        if ours == theirs:
            continue
        if name.startswith("digests/evidence/") and theirs is None:
            found.missing[name] = f"{name.removeprefix('digests/')} is missing"
        else:
            found.differing[name] = f"{_shown(ours)} in the receipt, {_shown(theirs)} in the folder"


def _leaves(said: Any, files: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, and both values, of everything that one of two receipts says; a figure is one."""
    if name.count("/") and name.startswith("figures/"):
        yield name, said, files
    elif isinstance(said, Mapping) and isinstance(files, Mapping):
        for key in sorted({*said, *files}):
            below = f"{name}/{key}" if name else str(key)
            yield from _leaves(said.get(key), files.get(key), below)
    else:
        yield name, said, files


def _compare_figures(found: Found, receipt: Receipt, kept: Kept) -> None:
    """Compare every figure with what its sources give, else with what the journal noted."""
    notes, reasons = journaled(kept.events), dict[str, str]()
    again: dict[str, Members] = {}
    for name, members in made_again(kept):
        if isinstance(members, str):
            reasons[name] = members
        elif "said" in members:  # between two files, of no figure of the receipt
            if differs(members["said"], members["value"]):
                rows = f"{members['value']:.9g} by the rows"
                found.differing[name] = f"{members['said']:.9g} there, {rows}"
        else:
            again[name] = members
    for name, said in receipt["figures"].items():
        why = _why_missing(name, reasons)
        if name in again:
            _compare(found, name, said, again[name], found.again)
        elif why is not None:
            found.missing[name] = why
        elif name in notes:
            _compare(found, name, said, notes[name], found.noted)
        else:
            found.apart[name] = OTHERS


def _why_missing(name: str, reasons: Mapping[str, str]) -> str | None:
    return next(
        (why for of, why in reasons.items() if name == of or name.startswith(f"{of}/")), None
    )


def _compare(found: Found, name: str, said: Members, other: Members, equal: list[str]) -> None:
    wrong = [key for key in other if key not in said or differs(said[key], other[key])]
    if not wrong:
        equal.append(name)
        return
    key = wrong[0]
    shown = f"{key} {_shown(said.get(key))} in the receipt, {_shown(other[key])} by its sources"
    found.differing[f"figures/{name}"] = shown


def _compare_end(found: Found, kept: Kept) -> None:
    """Compare what may change after the end: the journal's last line says it, too."""
    ends = [event["run"] for event in kept.after if event["e"] == "run_end"]
    if not ends:
        found.apart["the end of the run"] = "the journal has no line of it"
        return
    if ends[-1] != kept.result["run"]:
        found.differing["result.json: run"] = "the journal's last line says something else"
    paid = kept.result["run"].get("cost")
    if paid is not None and paid["rate"] is not None:
        again = paid_for(paid, kept.events, kept.result["run"])
        if differs(again["amount"], paid["amount"]):
            found.differing["result.json: run/cost"] = "hours and rate come to something else"


def _artifacts(found: Found, kept: Kept, store: Path | None) -> Iterator[tuple[str, str]]:
    """Compare the bytes of artifacts with their digests; yield what is not looked at, with why.

    Raises:
        UserError: If the store that was named does not hold them.
    """
    beside = kept.folder.parent.parent / "store"
    for row in kept.result["rows"]:
        artifact = row["artifact"]
        if artifact is None or row["status"] != "FINISHED":
            continue
        name = f"the artifact of {row['arm']} (seed {row['seed']})"
        here = (store or beside) / "artifacts" / artifact["digest"]
        places = [here] if store is not None else [here, Path(artifact["path"])]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None and store is not None:
            problem = f"{store} does not hold {name}, {artifact['digest']}"
            raise UserError("--store", problem, "name the store of the run, or leave it out")
        if folder is not None:
            _compare_artifact(found, name, folder, artifact["digest"])
        elif beside.is_dir():
            found.missing[name] = f"the store does not hold {artifact['digest']}"
        else:
            yield name, "no store lies here: --store names it"


def _compare_artifact(found: Found, name: str, folder: Path, digest: str) -> None:
    try:
        bytes_of = digest_folder(folder)[0]
    except OSError as error:
        found.missing[name] = f"it cannot be read: {error.strerror}"
        return
    if bytes_of == digest:
        found.whole.append(name)
    else:
        found.differing[name] = f"{digest} in the receipt, {bytes_of} by its files"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping) and "value" in value:
        value = value["value"]
    return one_line(value, 80)
