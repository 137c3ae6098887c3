"""The receipt of a run: what it says, what it is signed with, and that it stays true while the run
is delivered.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from here import here
from test_run import TINY

from pipeline.cli.commands.verify import main
from pipeline.errors import UserError
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.records import RECEIPT
from pipeline.runs import assemble
from pipeline.runs.jobs import _end_again, _with
from pipeline.runs.receipts import signature
from pipeline.runs.receipts.figures import figures_of
from pipeline.runs.receipts.receipt import make_receipt, read_kept, write_receipt
from pipeline.runs.receipts.signature import NAMESPACE, NotSigned, load_key, sign, signer_of
from pipeline.store.artifacts import digest_folder

BASELINE = ["recipe=baseline", *TINY, "tracking.mlflow=false", "tracking.charts=false"]
needs_ssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")


def receipt_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "receipt.json").read_text())


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def copied(receipted: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder alone: no store, no other run."""
    return Path(shutil.copytree(receipted, tmp_path / "elsewhere" / "run"))


def test_a_receipt_says_what_was_measured_on_what(receipted: Path) -> None:
    receipt, result = receipt_in(receipted), result_of(receipted)
    jsonschema.validate(receipt, {**RECEIPT, "$defs": {}})
    assert receipt["run_id"] == result["run_id"] == receipted.name
    assert receipt["data"]["digest"] == result["environment"]["data_digest"]
    assert {row["arm"] for row in receipt["artifacts"]} == {"teacher", "student"}
    by_arm = {each["arm"]: each["digest"] for each in receipt["artifacts"]}
    for row in result["rows"]:
        assert digest_folder(Path(row["artifact"]["path"]))[0] == by_arm[row["arm"]]
    student = next(row for row in result["rows"] if row["arm"] == "student")
    shown = receipt["figures"]["rows/student (seed 0, attempt 1)/quality/bits_per_byte"]
    assert shown["value"] == student["quality"]["bits_per_byte"]["value"]
    assert shown["ci"] == student["quality"]["bits_per_byte"]["ci"]
    # every figure that is not null stands in it, but for what may change after the end
    numbers = json.dumps(result["rows"]).count('"why_missing": null')
    assert sum(name.startswith("rows/") for name in receipt["figures"]) == numbers
    assert "receipt.json" in read_events(receipted / "journal.jsonl")[-1]["files"]


def test_a_receipt_is_made_of_the_files_alone_and_is_stable(copied: Path) -> None:
    before = (copied / "receipt.json").read_bytes()
    assert make_receipt(read_kept(copied)) == json.loads(before)
    assert write_receipt(copied) == before
    text = before.decode()
    assert str(copied.parent) not in text
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_evidence_takes_no_room_beside_the_store(receipted: Path) -> None:
    items = [each for each in (receipted / "evidence").iterdir() if each.suffix == ".jsonl"]
    assert len(items) == 2
    for each in items:
        kept = receipted.parents[1] / "store/assessments" / each.name
        assert each.samefile(kept)


def test_a_receipt_stays_true_when_sync_learns_what_was_held(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, events = result_of(copied), read_events(copied / "journal.jsonl")
    held: Any = {
        "gpu_hours": {"value": 2.0, "provenance": "measured", "why_missing": None},
        "grants": [],
    }
    totals = _with(result["run"], held, events)
    (copied / "result.json").write_text(json.dumps({**result, "run": totals}))
    # who changes the one alone is found
    assert main([str(copied)]) == 3
    assert "the journal's last line says something else" in capsys.readouterr().out
    _end_again(copied, events[-1], totals, "as before")
    assert main([str(copied)]) == 0
    assert "run/allocated" in receipt_in(copied)["left_out"]


@pytest.mark.parametrize("end", ["FAILED", "KILLED"])
def test_a_run_that_did_not_finish_leaves_none(
    end: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "receipt.json").unlink()
    result = {**result_of(copied), "status": end, "why": "no <b>room</b>\x1b[31m\nleft"}
    (copied / "result.json").write_text(json.dumps(result))
    assert main([str(copied)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"there is none: the run ended {end}: no <b>room</b> left" in said


def test_a_run_without_a_model_leaves_none(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "receipt.json").unlink()
    result = result_of(copied)
    for row in result["rows"]:
        row["artifact"] = None
    (copied / "result.json").write_text(json.dumps(result))
    assert main([str(copied)]) == 1
    assert "there is none: the run made no model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_that_crashes_ends_without_a_receipt_and_a_receipt_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: Any) -> Any:
        raise ZeroDivisionError("no time at all")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.runs.comparison.compare_all", crash)
        assert here(tmp_path, *BASELINE, "--debug").returncode == 1
    [failed] = (tmp_path / "mlruns/runs").iterdir()
    assert result_of(failed)["status"] == "FAILED"
    assert not (failed / "receipt.json").exists()
    assert main([str(failed)]) == 1
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "write_receipt", crash)
        done = here(tmp_path, *BASELINE)  # resumes, and finishes
    assert done.returncode == 0
    assert "receipt.json could not be written (ZeroDivisionError: no time at all)" in done.stderr
    assert "receipt.json" not in read_events(failed / "journal.jsonl")[-1]["files"]


def test_figures_have_names_that_are_told_apart() -> None:
    figure = {"value": 1.0, "provenance": "measured", "why_missing": None}
    row = {"arm": "a", "seed": 0, "attempt": 1, "reused": None, "x": figure}
    again = {**row, "reused": "run-1", "x": {**figure, "value": 2.0}}
    result: Any = {
        "run": {"phases_device_ns": {}, "cost": {"amount": figure}, "spent": figure},
        "rows": [row, again],
        "comparisons": [],
        "verdict": {"criteria": [{"name": "serving", "value": figure, "ci": None}]},
    }
    found = figures_of(result)
    assert list(found) == [
        "run/spent",
        "run/phases_device_ns",
        "rows/a (seed 0, attempt 1)/x",
        "rows/a (seed 0, attempt 1, of run-1)/x",
        "verdict/serving/value",
    ]


# -- signatures -----------------------------------------------------------------------------------


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path), "-C", "me"]
    subprocess.run(command, check=True)
    return path


def allowed(folder: Path, key: Path, before: str = "me@example.org") -> Path:
    path = folder / "allowed_signers"
    path.write_text(f"# who signs\n\n{before} {key.with_suffix('.pub').read_text()}")
    return path


@needs_ssh
def test_ssh_keygen_takes_our_signature_and_we_take_its(tmp_path: Path) -> None:
    key, file = make_key(tmp_path / "key"), tmp_path / "receipt.json"
    file.write_bytes(b'{"a": 1}\n' * 1000)
    ours = sign(file.read_bytes(), load_key(key, "k"))
    signed = tmp_path / "ours.sig"
    signed.write_text(ours)
    verify = ["ssh-keygen", "-Y", "verify", "-f", str(allowed(tmp_path, key)), "-n", NAMESPACE]
    command = [*verify, "-I", "me@example.org", "-s", str(signed)]
    done = subprocess.run(command, input=file.read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(command, input=b"another", capture_output=True)
    assert done.returncode != 0
    command = ["ssh-keygen", "-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(file)]
    subprocess.run(command, check=True, capture_output=True)
    theirs = (tmp_path / "receipt.json.sig").read_text()
    assert theirs == ours  # ed25519 draws nothing
    public = signer_of(file.read_bytes(), theirs)
    shown = subprocess.run(["ssh-keygen", "-lf", str(key)], capture_output=True, text=True).stdout
    assert signature.fingerprint(public) == shown.split()[1]


@needs_ssh
@pytest.mark.parametrize(
    ("before", "who"),
    [
        ("me@example.org", "me@example.org"),
        (f'me@example.org namespaces="git,{NAMESPACE}"', "me@example.org"),
        ('me@example.org namespaces="receipt@*"', "me@example.org"),
        ('me@example.org namespaces="git"', None),
        ("me@example.org cert-authority", None),
        ('me@example.org valid-before="20200101"', None),
        ("# me@example.org", None),
    ],
)
def test_who_may_sign_is_read_as_ssh_keygen_reads_it(
    before: str, who: str | None, tmp_path: Path
) -> None:
    key, content = make_key(tmp_path / "key"), b"receipt"
    file = allowed(tmp_path, key, before)
    armored = sign(content, load_key(key, "k"))
    assert signature.principal_of(signer_of(content, armored), file) == who
    (tmp_path / "sig").write_text(armored)
    verify = ["ssh-keygen", "-Y", "verify", "-f", str(file), "-n", NAMESPACE]
    command = [*verify, "-I", "me@example.org", "-s", str(tmp_path / "sig")]
    done = subprocess.run(command, input=content, capture_output=True)
    assert (done.returncode == 0) == (who is not None)


@needs_ssh
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("BEGIN SSH", "BEGIN PGP"),
        lambda text: text[: len(text) // 2] + text[-35:],
        lambda text: text.replace("U1NI", "U1NJ"),
        lambda _: "",
        lambda _: "-----BEGIN SSH SIGNATURE-----\n!!!\n-----END SSH SIGNATURE-----",
        lambda _: "-----BEGIN SSH SIGNATURE-----\nU1NIU0lHAAAAAQ==\n-----END SSH SIGNATURE-----",
    ],
)
def test_what_is_no_signature_is_said(change: Callable[[str], str], tmp_path: Path) -> None:
    armored = sign(b"receipt", load_key(make_key(tmp_path / "key"), "k"))
    with pytest.raises(NotSigned):
        signer_of(b"receipt", change(armored))
    with pytest.raises(NotSigned, match="namespace 'git'"):
        signer_of(b"receipt", sign(b"receipt", load_key(tmp_path / "key", "k"), "git"))
    with pytest.raises(NotSigned, match="not of this receipt"):
        signer_of(b"another", armored)


@needs_ssh
def test_keys_that_cannot_sign_are_refused_in_a_line(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    for path, why in {
        make_key(tmp_path / "locked", passphrase="secret"): "has a passphrase",
        make_key(tmp_path / "rsa", "rsa"): "is a key of another kind",
        key.with_suffix(".pub"): "is no private key of OpenSSH",
        tmp_path / "none": "No such file or directory",
        tmp_path: "is a folder, not a file",
    }.items():
        with pytest.raises(UserError, match=why) as refused:
            load_key(path, "tracking.sign_with")
        assert str(refused.value).startswith("tracking.sign_with: ")


@needs_ssh
@pytest.mark.slow
def test_a_run_signs_its_receipt(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    done = here(tmp_path, *BASELINE, f"tracking.sign_with={key}")
    assert done.returncode == 0, done.stderr
    folder = (tmp_path / "mlruns/latest").resolve()
    assert "receipt.json.sig" in read_events(folder / "journal.jsonl")[-1]["files"]
    assert main([str(folder), "--signers", str(allowed(tmp_path, key))]) == 0


def test_a_key_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = here(tmp_path, *BASELINE, f"tracking.sign_with={tmp_path / 'none'}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "tracking.sign_with" in done.stderr
    assert not (tmp_path / "mlruns").exists()


@needs_ssh
def test_whoever_changes_what_is_signed_is_found(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, key, other = copied, make_key(tmp_path / "key"), make_key(tmp_path / "other")
    armored = sign((folder / "receipt.json").read_bytes(), load_key(key, "k"))
    (folder / "receipt.json.sig").write_text(armored)
    signers = allowed(tmp_path, key)
    assert main([str(folder), "--signers", str(signers)]) == 0
    assert "the signature, by me@example.org" in capsys.readouterr().out
    assert main([str(folder)]) == 0
    assert "--signers tells whose that is" in capsys.readouterr().out
    assert main([str(folder), "--signers", str(allowed(tmp_path, other))]) == 3
    assert "does not allow" in capsys.readouterr().out
    # a change that all files agree on: figures alone do not find it
    result = result_of(folder)
    result["question"] = "another"
    (folder / "result.json").write_text(json.dumps(result))
    write_receipt(folder)
    assert main([str(folder)]) == 3
    assert "receipt.json.sig: it is not of this receipt" in capsys.readouterr().out
    (folder / "receipt.json.sig").unlink()
    assert main([str(folder)]) == 0
    assert main([str(folder), "--signers", str(signers)]) == 4
    assert main([str(folder), "--signers", str(tmp_path / "no")]) == 1
    assert "--signers: " in capsys.readouterr().err


def test_the_journal_says_when_nothing_is_booked_any_more(receipted: Path) -> None:
    events = read_events(receipted / "journal.jsonl")
    assert [event["e"] for event in events[-2:]] == ["booked", "run_end"]
    start, booked = events[0]["started_ns"], events[-2]["end_ns"]
    total = result_of(receipted)["run"]["device_hours"]["total"]["value"]
    assert total == pytest.approx((booked - start) / 3600e9, rel=1e-12)


def test_a_line_after_the_end_changes_no_receipt(copied: Path) -> None:
    journal = Journal(copied / "journal.jsonl")
    journal.write("heartbeat")
    journal.close()
    assert main([str(copied)]) == 0
