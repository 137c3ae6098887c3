"""`python -m pipeline verify RECEIPT`: whether the receipt of a run is true."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.options import read_options
from pipeline.config.redaction import clean_output
from pipeline.config.text_files import why_no_file
from pipeline.errors import Exit, Unparsable, UserError, one_line
from pipeline.ledger.numbers import agreed, how_many

if TYPE_CHECKING:
    from pipeline.runs.receipts.verify import Found

USAGE = """Usage: python -m pipeline verify RECEIPT [--store FOLDER] [--signers FILE]

RECEIPT is the receipt.json of a run, or the folder that it lies in. Its digests are held against
the files beside it. Every figure is made again: hours from the journal, quality from the
per-document values, comparisons from both. What an instrument read is held against the journal,
which noted it then. The folder may have been moved, and the store may be gone.

  --store FOLDER      the store of the run: the artifacts have to be there, and whole
  --signers FILE      an allowed_signers file of OpenSSH: receipt.json.sig has to be of one of them
  --all               list the figures that are equal, too

Exit codes: 0 equal, 3 differs, 4 nothing differs, but something that has to be there is missing,
1 refused (no receipt, one of a newer schema, a store without the artifacts), 2 command line not
parsable."""
OPTIONS, FLAGS = ("--store", "--signers"), ("--all",)
MOST = 20  # names of a kind that are listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says."""

    receipt: Path
    store: Path | None = None
    signers: Path | None = None
    lists_all: bool = False


@clean_output()
def main(argv: list[str], _started_ns: int = 0) -> int:
    """Verify one receipt; return the exit code."""
    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE)
        return Exit.DONE
    try:
        settings = read_settings(argv)
        from pipeline.runs.receipts.verify import read_receipt, verify

        receipt = read_receipt(settings.receipt)
        found = verify(settings.receipt, receipt, store=settings.store, signers=settings.signers)
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Exit.UNPARSABLE if isinstance(error, Unparsable) else Exit.REFUSED
    run = f"{receipt['recipe']}, run {receipt['run_id']}, {receipt['created']}"
    print(f"receipt of {one_line(run, 200)}")
    print("\n".join(lines_of(found, lists_all=settings.lists_all)))
    return code_of(found)


def read_settings(argv: Sequence[str]) -> Settings:
    """Return what a command line amounts to.

    Raises:
        UserError: Naming the option.
    """
    read = read_options(argv, "verify", OPTIONS, flags=FLAGS, takes_names=True)
    given, paths = read.values, read.names
    if len(paths) != 1:
        problem = "none is named" if not paths else f"{len(paths)} are named"
        raise Unparsable("RECEIPT", problem, "name one receipt.json")
    path = _place(paths[0])
    store = _folder(given["--store"]) if "--store" in given else None
    return Settings(
        receipt=path / "receipt.json" if path.is_dir() else path,
        store=store,
        signers=_signers(given["--signers"]) if "--signers" in given else None,
        lists_all="--all" in given,
    )


def _place(text: str) -> Path:
    """Return the path that a receipt is named by; a run's id or `latest` stands for its folder in
    mlruns.
    """
    path = Path(text).expanduser()
    for own in (Path("mlruns") / text, Path("mlruns/runs") / text):
        if not path.exists() and own.is_dir() and (own / "receipt.json").is_file():
            return own
    return path


def _folder(text: str) -> Path:
    folder = Path(text).expanduser()
    if not (folder / "artifacts").is_dir():
        shown = one_line(text, 200)
        problem = f"{shown} is no store" if folder.is_dir() else f"there is no folder {shown}"
        raise UserError("--store", problem, "name the one with artifacts/, as mlruns/store")
    return folder


def _signers(text: str) -> Path:
    path = Path(text).expanduser()
    why = why_no_file(path)
    if why is not None:
        problem = f"{one_line(text, 200)} {why}"
        raise UserError("--signers", problem, "give an allowed_signers file of OpenSSH")
    return path


def lines_of(found: Found, *, lists_all: bool) -> list[str]:
    """Return what became of a receipt, a line for each thing that is not equal."""
    lines = [
        f"equal: {how_many(len(found.again), 'figure')} made again,"
        f" {how_many(len(found.noted), 'reading')} as the journal noted them"
    ]
    lines += [f"equal: {one_line(name, 200)}" for name in found.whole]
    if lists_all:
        lines += [f"  {one_line(name, 200)}: made again" for name in found.again]
        lines += [f"  {one_line(name, 200)}: as the journal noted it" for name in found.noted]
    for kind, named in (
        ("differs", found.differing),
        ("cannot be checked", found.missing),
        ("not checked", found.apart),
    ):
        shown = list(named.items())[: None if lists_all else MOST]
        lines += [f"{kind}: {one_line(name, 200)}: {one_line(why)}" for name, why in shown]
        if len(shown) < len(named):
            lines.append(f"{kind}: {len(named) - len(shown)} more (--all lists them)")
    return [*lines, _verdict(found)]


def _verdict(found: Found) -> str:
    if found.differing:
        num = len(found.differing)
        return (
            f"DIFFERS: {how_many(num, 'thing')} {agreed(num, 'is', 'are')} not as the receipt says"
        )
    if found.missing:
        return "CANNOT BE CHECKED: nothing differs, but something is missing"
    return "EQUAL"


def code_of(found: Found) -> Exit:
    """Return the exit code for what became of a receipt."""
    if found.differing:
        return Exit.FAIL
    return Exit.INCONCLUSIVE if found.missing else Exit.DONE
