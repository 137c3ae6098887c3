"""Whether a receipt is true: every field of it, of the journal and of the per-document values is
changed in turn, and found.

A change is made as somebody makes it who knows the format: checksums and digests are made anew
where that is possible.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from few import few
from here import here
from test_run import TINY

from pipeline.cli.commands import verify as command
from pipeline.cli.commands.verify import main
from pipeline.errors import Preempted
from pipeline.ledger.journal import read_events
from pipeline.runs.receipts import verify as module
from pipeline.runs.receipts.receipt import result_digest, write_receipt
from pipeline.runs.receipts.recompute import made_again
from pipeline.runs.receipts.verify import read_receipt, verify
from pipeline.runs.timeline import Timeline

BASELINE = ["recipe=baseline", *TINY, "tracking.mlflow=false", "tracking.charts=false"]
WORK = "rows/student (seed 0, attempt 1)/ledger/device_hours/work"
BITS = "rows/student (seed 0, attempt 1)/quality/bits_per_byte"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def write(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record))


@pytest.fixture
def copied(receipted: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder alone: no store, no other run."""
    return Path(shutil.copytree(receipted, tmp_path / "elsewhere" / "run"))


def differing(folder: Path) -> dict[str, str]:
    path = folder / "receipt.json"
    return verify(path, read_receipt(path)).differing


# -- what is as it says ---------------------------------------------------------------------------


def test_a_run_in_its_place_is_equal(receipted: Path) -> None:
    found = verify(receipted / "receipt.json", read_receipt(receipted / "receipt.json"))
    assert (found.differing, found.missing, found.apart) == ({}, {}, {})
    figures = read(receipted / "receipt.json")["figures"]
    assert sorted([*found.again, *found.noted]) == sorted(figures)  # each in one of them
    assert len(found.whole) == 2
    # hours, qualities, comparisons and money are made again, not believed
    pair = "comparisons/student against teacher"
    for name in (
        *(f"run/device_hours/{part}" for part in ("total", "work", "assess", "compare")),
        *(f"{WORK.rpartition('/')[0]}/{part}" for part in ("attached", "productive", "wasted")),
        *("run/spent", "run/phases_device_ns", WORK, BITS, f"{pair}/quality/bits_per_byte"),
        *(f"{pair}/serving", f"{pair}/training/c_arm", f"{pair}/training/all_in_base"),
        "rows/student (seed 0, attempt 1)/ledger/cost/amount",
    ):
        assert name in found.again, name


def test_a_run_of_another_machine_verifies_from_its_folder_alone(
    receipted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(receipted, tmp_path / "there"))
    hidden = receipted.parents[1].with_name("gone")
    receipted.parents[1].rename(hidden)  # the run's store, and all else of it
    try:
        assert main([str(folder)]) == 0
    finally:
        hidden.rename(receipted.parents[1])
    out = capsys.readouterr().out
    assert out.endswith("EQUAL\n")
    assert "not checked: the artifact of student (seed 0): no store lies here" in out


@pytest.mark.slow
def test_a_reused_run_and_a_resumed_run_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*BASELINE, "training.steps=8", "training.checkpoint_every=2"]
    asked = [0]

    def stops_once(self: Timeline) -> type[Exception] | None:
        asked[0] += 1
        return Preempted if asked[0] == 5 else None

    monkeypatch.setattr(Timeline, "should_stop", stops_once)
    assert here(tmp_path, *settings).returncode == 75
    [folder] = (tmp_path / "mlruns/runs").iterdir()
    assert main([str(folder)]) == 1
    assert here(tmp_path, *settings).returncode == 0
    assert [event["e"] for event in read_events(folder / "journal.jsonl")].count("booked") == 2
    found = verify(folder / "receipt.json", read_receipt(folder / "receipt.json"))
    assert (found.differing, found.missing) == ({}, {})
    assert [row["attempt"] for row in read(folder / "result.json")["rows"]] == [1, 2]
    for number in (1, 2):  # work of both attempts, kept and lost
        name = f"rows/baseline (seed 0, attempt {number})/ledger/device_hours"
        assert {f"{name}/work", f"{name}/retry", f"{name}/attached"} <= {*found.again}
    assert "run/phases_device_ns" in found.again
    # another run that reuses all of it
    assert here(tmp_path, *settings).returncode == 0
    again = (tmp_path / "mlruns/latest").resolve()
    assert again != folder
    found = verify(again / "receipt.json", read_receipt(again / "receipt.json"))
    assert (found.differing, found.missing) == ({}, {})
    assert "run/reused" in found.again
    reused = f"rows/baseline (seed 0, attempt 2, of {folder.name})"
    assert f"{reused}/ledger/device_hours/work" in found.again  # by the other run's journal
    assert f"{reused}/quality/bits_per_byte" in found.again
    alone = Path(shutil.copytree(again, tmp_path / "there"))
    found = verify(alone / "receipt.json", read_receipt(alone / "receipt.json"))
    assert (found.differing, found.missing) == ({}, {})
    assert f"{reused}/ledger/device_hours/work" in found.noted
    assert f"{reused}/quality/bits_per_byte" in found.again


@pytest.mark.slow
def test_a_release_check_is_equal(receipted: Path, tmp_path: Path) -> None:
    from test_gate import GATE

    rows = read(receipted / "result.json")["rows"]
    paths = {row["arm"]: row["artifact"]["path"] for row in rows}
    sides = [f"candidate={paths['student']}", f"baseline={paths['teacher']}"]
    done = here(tmp_path, *GATE, *sides, "tracking.mlflow=false")
    [folder] = (tmp_path / "mlruns/runs").iterdir()
    assert (folder / "receipt.json").is_file(), done.stderr
    found = verify(folder / "receipt.json", read_receipt(folder / "receipt.json"))
    assert (found.differing, found.missing) == ({}, {})
    assert "rows/candidate (seed 0, attempt 1)/quality/bits_per_byte" in found.again
    assert any(name.startswith("verdict/quality/") for name in found.noted)


# -- the receipt changed, each field in turn ------------------------------------------------------


def leaves(record: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield where each value of a record stands, and the value."""
    if isinstance(record, dict | list) and record:
        keys = record if isinstance(record, dict) else range(len(record))
        for key in keys:
            yield from leaves(record[key], (*at, key))
    else:
        yield at, record


def other(value: Any) -> Any:
    """Return another value of the same kind: digests stay digests."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value * 1.01 + 1 if isinstance(value, float) else value + 1
    if isinstance(value, str) and re.fullmatch("[0-9a-f]+", value):
        return ("1" if value[0] == "0" else "0") + value[1:]
    return f"{value}x" if isinstance(value, str) else ["x"]


def put(record: Any, at: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a record with another value at a place; `...` leaves it out."""
    record = json.loads(json.dumps(record))
    inside = record
    for key in at[:-1]:
        inside = inside[key]
    if value is ...:
        del inside[at[-1]]
    else:
        inside[at[-1]] = value
    return record


def test_a_change_of_any_field_is_found(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied / "receipt.json"
    receipt = read(path)
    # of the files, none of which changes, once
    kept = module.read_kept(copied)
    again = list(made_again(kept))
    monkeypatch.setattr(module, "read_kept", lambda _: kept)
    monkeypatch.setattr(module, "made_again", lambda _: iter(again))
    monkeypatch.setattr(module, "_artifacts", lambda *_: iter(()))
    assert main([str(path)]) == 0
    places = list(leaves(receipt))
    assert len(places) > 300
    unfound: list[Any] = []
    for at, value in places:
        for changed in (put(receipt, at, other(value)), put(receipt, at, ...)):
            write(path, changed)
            if main([str(path)]) not in (1, 3):
                unfound.append(at)
    assert unfound == []
    for name in ("figures", "digests", "left_out", "artifacts"):  # something that was not there
        more: Any = {**receipt[name], "x": "0" * 64} if name != "artifacts" else [{}]
        write(path, {**receipt, name: more})
        assert main([str(path)]) in (1, 3), name


def test_a_change_that_all_files_agree_on_is_found_by_what_they_come_from(copied: Path) -> None:
    """Whoever changes receipt and result alike meets journal and per-document values."""
    path, result = copied / "receipt.json", read(copied / "result.json")
    receipt = read(path)
    places = {name: row for row in result["rows"] for name in [row["arm"]]}
    for name, figure in {
        WORK: places["student"]["ledger"]["device_hours"]["work"],
        BITS: places["student"]["quality"]["bits_per_byte"],
        "run/device_hours/total": result["run"]["device_hours"]["total"],
        "rows/teacher (seed 0, attempt 1)/ledger/counts/steps": places["teacher"]["ledger"][
            "counts"
        ]["steps"],
        "comparisons/student against teacher/serving": result["comparisons"][0]["serving"],
    }.items():
        was = figure["value"]
        figure["value"] = was * 1.001 + 1e-6
        receipt["figures"][name]["value"] = figure["value"]
        receipt["digests"]["result"] = result_digest(result)
        write(copied / "result.json", result)
        write(path, receipt)
        assert f"figures/{name}" in differing(copied), name
        figure["value"] = receipt["figures"][name]["value"] = was


# -- the journal and the values changed -----------------------------------------------------------


def sealed(line: bytes) -> bytes:
    """Return a line of a journal with its checksum made anew."""
    body = re.sub(rb', "crc": "[0-9a-f]{8}"}$', b"", line)
    return b'%b, "crc": "%08x"}' % (body, zlib.crc32(body))


def in_window(line: bytes) -> bytes:
    """Have a window last a second longer."""
    return re.sub(
        rb'"(end_ns|kept_ns)": (\d+)', lambda m: b'"%b": %d' % (m[1], int(m[2]) + 10**9), line
    )


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a digit, checksum made anew": lambda ls: [
        sealed(in_window(line)) if b'"e": "window"' in line and b'"work"' in line else line
        for line in ls
    ],
    "a digit": lambda ls: [line.replace(b'"attempt": 1', b'"attempt": 2') for line in ls],
    "a letter": lambda ls: [line.replace(b"student", b"studend") for line in ls],
    "a line gone": lambda ls: [ls[0], *ls[2:]],
    "a line twice": lambda ls: [*ls[:4], ls[3], *ls[4:]],
    "two lines changed about": lambda ls: [ls[0], ls[2], ls[1], *ls[3:]],
    "a blank line": lambda ls: [ls[0], b"", *ls[1:]],
    "no line of its end": lambda ls: [line for line in ls if b'"booked"' not in line],
    "its second half gone": lambda ls: ls[: len(ls) // 2],
    "nothing left": lambda _: [],
    "bytes that are no text": lambda ls: [*ls[:2], b"\xff\xfe\x00", *ls[2:]],
    "an end of an hour later": lambda ls: [
        sealed(re.sub(rb'"end_ns": (\d+)', lambda m: b'"end_ns": %d' % (int(m[1]) + 10**12), line))
        if b'"booked"' in line
        else line
        for line in ls
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_journal_is_found(change: str, copied: Path) -> None:
    path = copied / "journal.jsonl"
    path.write_bytes(b"\n".join(CHANGES[change](path.read_bytes().split(b"\n"))))
    assert main([str(copied)]) == 3


@pytest.mark.parametrize("change", ["a digit, checksum made anew", "an end of an hour later"])
def test_hours_are_booked_again_where_the_digest_of_the_journal_was_made_anew(
    change: str, copied: Path
) -> None:
    path, receipt = copied / "journal.jsonl", read(copied / "receipt.json")
    path.write_bytes(b"\n".join(CHANGES[change](path.read_bytes().split(b"\n"))))
    journal = path.read_bytes()
    size = journal.index(b"\n", journal.index(b'"e": "booked"')) + 1
    digest = hashlib.sha256(journal[:size]).hexdigest()
    receipt["digests"]["journal"] = {"bytes": size, "sha256": digest}
    write(copied / "receipt.json", receipt)
    found = differing(copied)
    assert not [name for name in found if name.startswith("digests/")]
    assert "figures/run/device_hours/total" in found


ITEM_CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "a digit": lambda b: re.sub(rb'"bits": (\d)', lambda m: b'"bits": 9' + m[1], b, count=1),
    "a digest": lambda b: re.sub(rb'"digest": "(\w)', b'"digest": "z', b, count=1),
    "a line gone": lambda b: b.partition(b"\n")[2],
    "a line twice": lambda b: b.partition(b"\n")[0] + b"\n" + b,
    "the names of columns": lambda b: b.replace(b'"bits"', b'"bots"'),
    "white space": lambda b: b.replace(b": ", b":  ", 1),
    "a control character": lambda b: b"\x00" + b,
    "no text": lambda b: b"\xff" + b,
    "nothing left": lambda _: b"",
    "NaN": lambda b: re.sub(rb'"bits": [\d.]+', b'"bits": NaN', b, count=1),
}
SAME_VALUES = ("white space",)


@pytest.mark.parametrize("change", ITEM_CHANGES)
def test_changed_values_are_found_by_digest_and_by_figure(change: str, copied: Path) -> None:
    rows = read(copied / "result.json")["rows"]
    student = next(row for row in rows if row["arm"] == "student")
    path = copied / "evidence" / Path(student["quality"]["bits_per_byte"]["items"]).name
    changed = ITEM_CHANGES[change](path.read_bytes())
    assert changed != path.read_bytes()
    path.unlink()  # a link to the store's
    path.write_bytes(changed)
    assert f"digests/evidence/{path.name}" in differing(copied)
    receipt = read(copied / "receipt.json")
    receipt["digests"]["evidence"][path.name] = hashlib.sha256(changed).hexdigest()
    write(copied / "receipt.json", receipt)
    code = main([str(copied)])
    assert code == (0 if change in SAME_VALUES else 3)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *(("journal.jsonl", 4), ("result.json", 4), ("config.json", 4)),
        *(("evidence/compared.json", 4), ("evidence", 4), ("receipt.json", 1)),
    ],
)
def test_what_is_missing_is_said(
    name: str, code: int, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main([str(copied)]) == code
    said = capsys.readouterr()
    assert Path(name).name in said.out + said.err
    assert "\ndiffers: " not in said.out


def test_changed_settings_and_changed_ground_are_found(copied: Path) -> None:
    config = read(copied / "config.json")
    config["quality"]["margin"] = 0.5
    write(copied / "config.json", config)
    assert {"digests/settings"} <= {*differing(copied)}
    basis = read(copied / "evidence/compared.json")
    basis["seeds"][0]["spends"][1]["work_h"] *= 2
    write(copied / "evidence/compared.json", basis)
    found = differing(copied)
    assert "digests/evidence/compared.json" in found
    assert any(name.startswith("evidence/compared.json: work of") for name in found)


# -- artifacts and bad input ----------------------------------------------------------------------


def test_artifacts_are_hashed(
    receipted: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(receipted.parents[1] / "store", copied.parent / "store"))
    assert main([str(copied), "--store", str(store)]) == 0
    digest = json.loads((copied / "result.json").read_text())["rows"][0]["artifact"]["digest"]
    [weights] = [
        each for each in store.glob("artifacts/*/model.safetensors") if digest in str(each)
    ]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    assert main([str(copied), f"--store={store}"]) == 3
    assert "differs: the artifact of" in capsys.readouterr().out
    shutil.rmtree(weights.parent)
    assert main([str(copied), f"--store={store}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "RECEIPT: none is named"),
        (["a", "b"], 2, "RECEIPT: 2 are named"),
        (["a", "--sign", "k"], 2, "--sign: is no option of verify"),
        (["a", "--store"], 2, "--store: has no value"),
        (["a", "--all=1"], 2, "--all: takes no value"),
        (["nothing/receipt.json"], 1, "there is no such file"),
        (["{folder}", "--store", "gone"], 1, "--store: there is no folder gone"),
        (["{folder}", "--store", "{folder}"], 1, "is no store"),
        (["{folder}", "--signers", "gone"], 1, "--signers: gone cannot be read"),
        (["/dev/null"], 1, "it is a device, not a file"),
    ],
)
def test_what_cannot_be_verified_is_refused_in_a_line(
    words: list[str], code: int, said: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("{folder}", str(copied)) for word in words]
    assert main(given) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("refused: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 2}', "is of schema 2, and this release reads 1"),
        ('{"schema": 1}', "is no receipt"),
        ('{"schema": "2"}', "is no receipt"),
        ("[]", "is no receipt"),
        ("", "it is no JSON"),
        ("{" * 100_000, "it is no JSON"),
        ('{"schema": NaN}', "it is no JSON"),
    ],
)
def test_what_is_no_receipt_of_this_release_is_refused(
    text: str, said: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "receipt.json").write_text(text)
    assert main([str(copied)]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_names_with_markup_and_control_characters_are_shown_as_text(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<script>\x1b[2J\x1b]0;x\x07\r\n\u202e|`"
    receipt = read(copied / "receipt.json")
    receipt |= {"recipe": evil, "question": evil}
    receipt["figures"][evil] = {"value": evil}
    write(copied / "receipt.json", receipt)
    assert main([str(copied), "--all"]) == 3
    out = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", out)
    assert "<script>" in out


def test_lists_are_cut_and_said_to_be(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    receipt = read(copied / "receipt.json")
    for figure in receipt["figures"].values():
        figure["provenance"] = "declared"
    write(copied / "receipt.json", receipt)
    assert main([str(copied)]) == 3
    out = capsys.readouterr().out
    assert out.count("\ndiffers: figures/") == command.MOST
    assert "more (--all lists them)" in out
    assert write_receipt(copied)
    assert main([str(copied)]) == 0


@pytest.mark.parametrize(("options", "code"), few([(["-h"], 0), (["--help"], 0)], 1))
def test_help_is_there(options: list[str], code: int) -> None:
    assert main(options) == code
