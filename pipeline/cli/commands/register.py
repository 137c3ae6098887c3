"""`python -m pipeline register path=MODEL ledger=RUN`: make a model trained elsewhere an artifact
with its cost.

MODEL is a Hugging Face folder (safetensors). RUN is what metered its training: a run's id, its
folder, or `latest`. The model's files go into the store, weights as hard links where the disk
allows, and `artifact.json` beside them says what was spent. A recipe that is then given that folder
as `model.path` charges those hours instead of an unknown past.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.redaction import clean_output
from pipeline.errors import Exit, Unparsable, UserError
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.records import CHARGED, ENDED, read_record
from pipeline.ledger.shapes import ChargedDevice, ChargedOn, ChargedRow, ChargeRecord, Figure
from pipeline.models.files import model_files
from pipeline.store.artifacts import Artifact, Store, bring, digest_folder, read_json, write_json

USAGE = "Usage: python -m pipeline register path=MODEL ledger=RUN [name=NAME] [root=mlruns]"
KEYS = ("path", "ledger", "name", "root")
METERED = "metered"


@dataclass(frozen=True, slots=True)
class Charge:
    """What a model cost, as a run's ledger tells it.

    Attributes:
        run_id: Of the run.
        arm: Whose artifact the model is.
        rows: Of all stages that led to it, failed attempts included.
        device: `{"kind", "name", "count"}` of the run.
    """

    run_id: str
    arm: str
    rows: tuple[ChargedRow, ...]
    device: ChargedDevice

    def to_json(self) -> ChargeRecord:
        """Return the form it has in artifact.json; a figure that any row lacks is null."""
        own = [row for row in self.rows if row["arm"] == self.arm and row["status"] == "FINISHED"]
        return {
            "run_id": self.run_id,
            "arm": self.arm,
            "device": ChargedOn(**self.device),
            "work_device_hours": _sum(row["ledger"]["device_hours"]["work"] for row in self.rows),
            "retry_device_hours": _sum(row["ledger"]["device_hours"]["retry"] for row in self.rows),
            "tokens": own[-1]["ledger"]["counts"]["tokens"]["value"],
            "model_flops": _sum(
                row["ledger"]["counts"]["model_flops"]
                for row in self.rows
                if row["status"] == "FINISHED"
            ),
            "energy_j": _sum(row["ledger"]["energy_j"] for row in self.rows),
        }


def _sum(figures: Iterable[Figure]) -> float | None:
    """Return a sum; null where any figure is."""
    values = [figure["value"] for figure in figures]
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else None


@clean_output()
def main(argv: list[str], _started_ns: int = 0) -> int:
    """Register one model; return 0, 1 where it was refused, 2 where the command line cannot be
    read.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE
    try:
        given = _read(argv)
        root = Path(given.get("root", "mlruns")).expanduser()
        artifact, charge = register(
            Path(given["path"]).expanduser(),
            find_run(root, given["ledger"]),
            root,
            name=given.get("name"),
        )
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED
    cost = charge.to_json()
    print(
        f"{artifact.path}\n{cost['work_device_hours']:.6g} device-hours of work,"
        f" {cost['retry_device_hours']:.6g} of retry, on {charge.device['name']} (run"
        f" {charge.run_id})\nuse it: model.path={artifact.path}"
    )
    return Exit.DONE


def register(
    folder: Path, run_dir: Path, root: Path, *, name: str | None = None
) -> tuple[Artifact, Charge]:
    """Commit a model with what its run spent; doing it again changes nothing.

    Raises:
        UserError: If the folder holds no safe and whole model, or the run made none.
    """
    files = model_files(folder)
    charge = read_charge(run_dir)
    store = Store(root / "store")
    with store.scratch() as out:
        for path in files:
            bring(path, out / path.name)
        _check_made(out, folder, charge)
        artifact = store.commit(out, "model", {"arm": name or charge.arm})
    _note(artifact, store, {} if name is None else {"name": name}, charge)
    if charge.rows[-1]["type"] == METERED:
        _show(run_dir, artifact)
    return artifact, charge


def _check_made(given: Path, folder: Path, charge: Charge) -> None:
    """Refuse a model that is not, byte for byte, what a recipe's run made; a metered command does
    not say what it made.

    Raises:
        UserError: If so.
    """
    made = charge.rows[-1]["artifact"]
    if (
        made is not None
        and charge.rows[-1]["type"] != METERED
        and digest_folder(given)[0] != made["digest"]
    ):
        raise UserError(
            "ledger",
            f"{charge.run_id} made another model than {folder}: {made['digest']}",
            "name the run that made it; meter what changed it since",
        )


def _note(artifact: Artifact, store: Store, named: dict[str, str], charge: Charge) -> None:
    """Write the ledger into the artifact's manifest, which its digest does not cover.

    Raises:
        UserError: If it is charged to another run already.
    """

    def noted(known: dict[str, Any]) -> dict[str, Any]:
        ledger = known.get("ledger")
        if isinstance(ledger, dict) and ledger.get("run_id") != charge.run_id:
            raise UserError(
                "ledger",
                f"this model is registered with run {ledger.get('run_id')}",
                f"name that run, or remove {artifact.path} first",
            )
        return {"name": charge.arm, **known, **named, "ledger": charge.to_json()}

    store.revise(artifact, noted)


# -- the run --------------------------------------------------------------------------------------


def find_run(root: Path, ledger: str) -> Path:
    """Return the folder of a run, given its id, its folder, or `latest`: the newest that finished.

    Raises:
        UserError: If there is none.
    """
    runs = root / "runs"
    if ledger == "latest":
        found = next(
            (folder for folder in sorted(runs.glob("*/"), reverse=True) if _finished(folder)), None
        )
        if found is None:
            raise UserError(
                "ledger", f"no run under {runs} has finished", "name one by its id or folder"
            )
        return found
    named = [
        folder
        for folder in (runs / ledger, Path(ledger).expanduser())
        if (folder / "result.json").is_file()
    ]
    if not named:
        raise UserError(
            "ledger",
            f"{ledger} is no run under {runs} that has ended",
            "give a run's id or its folder",
        )
    return named[0]


def _finished(folder: Path) -> bool:
    result = read_record(folder / "result.json", ENDED)
    return result is not None and result["status"] == "FINISHED"


def read_charge(run_dir: Path) -> Charge:
    """Return what a run spent on its primary artifact: the stages that led to it, with their failed
    attempts.

    Raises:
        UserError: If it did not finish, or made nothing.
    """
    result = read_record(run_dir / "result.json", CHARGED)
    if result is None:
        raise UserError(
            "ledger", f"{run_dir} has no result.json that is whole", "name a run that has ended"
        )
    arm = result["primary_arm"]
    own = [row for row in result["rows"] if row["arm"] == arm and _made(row)]
    if arm is None or not own:
        why = f": {said}" if (said := result.get("why")) else ""
        raise UserError(
            "ledger",
            f"{result['run_id']} ended {result['status']} without {arm}{why}",
            "name the run that made the model",
        )
    seed = own[0]["seed"]
    chain = set(_chain(result["rows"], arm, seed))
    rows = [row for row in result["rows"] if row["arm"] in chain and row["seed"] == seed]
    rows = [row for row in rows if row["status"] != "SKIPPED"]
    return Charge(
        result["run_id"],
        arm,
        tuple(sorted(rows, key=lambda row: row["arm"] == arm)),
        result["device"],
    )


def _made(row: ChargedRow) -> bool:
    return row["status"] == "FINISHED" and (row["artifact"] is not None or row["type"] == METERED)


def _chain(rows: list[ChargedRow], arm: str, seed: int) -> Iterator[str]:
    """Yield the stages that an arm depends on, itself included."""
    yield arm
    needed = {
        each
        for row in rows
        if (row["arm"], row["seed"]) == (arm, seed)
        for each in row["depends_on"]
    }
    for each in needed:
        yield from _chain(rows, each, seed)


def _show(run_dir: Path, artifact: Artifact) -> None:
    """Have the metered run show what it made: in result.json, and in MLflow with its next
    delivery.
    """
    result = read_json(run_dir / "result.json")
    assert isinstance(result, dict), "read_charge has read it"
    row = result["rows"][-1]
    if row["artifact"] == artifact.to_json():
        return
    row["artifact"] = artifact.to_json()
    write_json(run_dir / "result.json", result)
    ended = [event for event in read_events(run_dir / "journal.jsonl") if event["e"] == "run_end"][
        -1
    ]
    at = {"t": ended["t"], "mono_ns": ended["mono_ns"]}  # it did not end when it was registered
    journal = Journal(run_dir / "journal.jsonl")
    journal.write("row", row=row, **at)
    journal.write("run_end", **{name: value for name, value in ended.items() if name != "e"})
    journal.close()


def _read(argv: list[str]) -> dict[str, str]:
    """Return the arguments by key.

    Raises:
        UserError: If one is unknown or missing.
    """
    given: dict[str, str] = {}
    for arg in argv:
        key, equals, value = arg.partition("=")
        if not equals:
            raise Unparsable(arg, "cannot be parsed", "write key=value")
        if key not in KEYS or not value:
            problem = "is empty" if key in KEYS else "is no setting of register"
            raise UserError(key, problem, f"give {', '.join(f'{name}=' for name in KEYS)}")
        given[key] = value
    if not given.get("name", "").isprintable():
        raise UserError(
            "name",
            f"{given['name']!r} has characters that nobody sees",
            "use letters, digits, spaces",
        )
    for key in ("path", "ledger"):
        if key not in given:
            raise UserError(key, "is missing", USAGE.partition(": ")[2])
    return given
