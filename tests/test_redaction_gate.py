"""One gate for every string that leaves the process: names and shapes of secrets, and a run full of
them.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import time
import traceback
import uuid
from dataclasses import fields, is_dataclass
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from here import here
from test_faults import SMALL

from pipeline.config.redaction import (
    REDACTED,
    Clean,
    clean_output,
    names_secret,
    redact,
    redact_json,
)
from pipeline.config.settings.run import Run
from pipeline.ledger.journal import Journal, read_events
from pipeline.store.artifacts import read_json, write_json, write_text

JWT = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=")
    for part in (b'{"alg":"HS256"}', b'{"sub":"1234"}', b"x" * 32)
)
SHAPES = {
    "Hugging Face": "hf_" + "AbCdEfGhIj" * 3,
    "GitHub": "ghp_" + "a1" * 18,
    "GitHub, fine": "github_pat_" + "11ABCDEFG0" * 4,
    "GitLab": "glpat-" + "x1Y2z3" * 4,
    "OpenAI": "sk-proj-" + "aB3dE6" * 6,
    "Anthropic": "sk-ant-api03-" + "aB3dE6" * 6,
    "AWS": "AKIA" + "ABCDEFGH12345678",
    "Google": "AIza" + "aB3_-" * 7,
    "Slack": "xoxb-" + "123456789012-abcdef",
    "Slack, user": "xoxp-" + "123456789012-abcdef",
    "JWT": JWT,
    "npm": "npm_" + "a1B2" * 9,
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA PRIVATE KEY-----",
}
SETTINGS = {
    "api_key=HIDE1234": "api_key=",
    "apiKey: HIDE1234": "apiKey:",
    "secret=HIDE1234": "secret=",
    "password: HIDE1234": "password:",
    "pwd=HIDE1234": "pwd=",
    "passphrase='two HIDE1234 words'": "passphrase=",
    "WANDB_API_KEY=HIDE1234": "WANDB_API_KEY=",
    "aws_secret_access_key = HIDE1234/x+y": "aws_secret_access_key",
    "token: HIDE1234": "token:",
    "hub-token=HIDE1234": "hub-token=",
    '{"access_token": "HIDE1234"}': "access_token",
    "Authorization: Bearer HIDE1234": "Authorization:",
    "authorization=Basic HIDE1234": "authorization=",
    'curl -H "Authorization: Bearer HIDE1234" x': "curl",
    "Bearer HIDE1234567890abcdef": "Bearer",
    "https://me:HIDE1234@host/x": "https://",
    "postgresql://u:p@HIDE1234@db/x": "postgresql://",
    "https://HIDE1234@github.com/a/b": "@github.com/a/b",
    "https://x.blob.core.windows.net/c?sv=1&sig=HIDE1234%2F&se=2": "&se=2",
    "https://s3/x?X-Amz-Credential=HIDE1234%2Fus&X-Amz-Signature=HIDE1234&y=1": "&y=1",
    "https://storage/x?X-Goog-Signature=HIDE1234&y=1": "&y=1",
    "https://maps/x?key=HIDE1234HIDE1234HIDE": "?key=",
    "DefaultEndpointsProtocol=https;AccountKey=HIDE1234==": "https;",
    "SharedAccessSignature=sr=HIDE1234": "SharedAccessSignature=",
    "Endpoint=sb://x/;SharedAccessKey=HIDE1234=": "sb://x/",
    "train.py --token HIDE1234 --steps 5": "--steps 5",
    "train.py --api-key 'HIDE1234 x' -v": "-v",
    "token=HIDE1234, token=HIDE1234": "token=",
    "a token=HIDE1234&b=HIDE1234"[:16]: "a token=",
}
PLAIN = [
    "tokens: 512",
    "target_tokens=3",
    "token_type_ids: [0, 1]",
    "pad_token: <pad>",
    "eos_token_id=2",
    "max_token=5",
    "seconds per token: 0.31",
    "bits_per_token=1.5",
    "the next token: the",
    "secretary: Ann",
    "tokenizer=byte",
    "monkey=5",
    "keys: a, b",
    "key=training.steps",
    "basic understanding of things",
    "bearer of news",
    "sk-learn",
    "task-classification-of-long-names",
    "risk-adjusted-return-on-capital-employed",
    "https://host:5000/a@b",
    "models:/name@champion",
    "abfss://container@account.dfs.core.windows.net/x",
    "sqlite:////tmp/mlflow.db",
    "hf_home/train.jsonl",
    "AKIA",
    "s3://bucket/prefix",
    "2026-11-28T12:00:00",
    "num_key_value_heads: 4",
    "signature: the function's",
    "key: value",
    "author: me",
    "authority=1",
    "the password is asked for",
    "stages.student.temperature=2",
    "--tokenizer byte --steps 5",
    "passed: 5",
    "seed=0,1,2",
    "x" * 40,
    "a" * 64,
]


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_are_known_by_their_shape(name: str) -> None:
    for text in (
        SHAPES[name],
        f"with {SHAPES[name]}, quickly",
        f"'{SHAPES[name]}'",
        f"a/{SHAPES[name]}/b",
    ):
        shown = redact(text)
        assert SHAPES[name] not in shown
        assert redact(shown) == shown == text.replace(SHAPES[name], REDACTED)


@pytest.mark.parametrize("text", SETTINGS)
def test_secrets_are_known_by_name_and_place(text: str) -> None:
    shown = redact(text)
    assert "HIDE" not in shown
    assert REDACTED in shown
    assert SETTINGS[text] in shown
    assert redact(shown) == shown


def test_words_digests_and_identifiers_stay() -> None:
    plain = [*PLAIN, *(str(uuid.UUID(int=number * 0x1234567890ABCDEF)) for number in range(50))]
    for number in range(200):
        content = str(number).encode()
        plain += [
            sha256(content).hexdigest(),
            sha1(content).hexdigest(),
            sha256(content).hexdigest()[:32],
            base64.b64encode(sha256(content).digest()).decode(),
        ]
    assert [text for text in plain if redact(text) != text] == []


def test_names_of_this_project_name_no_secret() -> None:
    from pipeline.ledger import metrics
    from pipeline.ledger.schema import RESULT_SCHEMA

    def keys(schema: Any) -> set[str]:
        if isinstance(schema, dict):
            return {
                *schema.get("properties", {}),
                *(key for item in schema.values() for key in keys(item)),
            }
        return {key for item in schema for key in keys(item)} if isinstance(schema, list) else set()

    names = {*keys(RESULT_SCHEMA), *metrics.BY_KEY}
    assert [name for name in names if names_secret(name)] == []


def test_what_the_environment_holds_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    monkeypatch.setenv("SHORT_SECRET", "cat")
    monkeypatch.setenv("PWD", "a/folder/here")
    monkeypatch.setenv("PASSWORD_STORE_DIR", "/home/me/store")
    assert redact("/home/me/store/a/folder/here") == "/home/me/store/a/folder/here"
    assert (
        redact("no correct horse battery in parallelism, cat")
        == f"no {REDACTED} in parallelism, cat"
    )


def test_writers_are_gates(tmp_path: Path) -> None:
    token = SHAPES["Hugging Face"]
    planted = {
        "a": [token, {"api_key": "x", "n": 1, token: 0.5, "pad_token": "<pad>"}],
        "path": "a\udcffb",
    }
    kept = {
        "a": [REDACTED, {"api_key": REDACTED, "n": 1, REDACTED: 0.5, "pad_token": "<pad>"}],
        "path": "a?b",
    }
    write_json(tmp_path / "x.json", planted)
    assert read_json(tmp_path / "x.json") == kept == redact_json(planted) == redact_json(kept)
    write_text(tmp_path / "x.md", f"the token: {token}\n")
    assert (tmp_path / "x.md").read_text() == f"the token: {REDACTED}\n"
    journal = Journal(tmp_path / "j.jsonl")
    journal.write("run_start", **planted)
    journal.close()
    (event,) = read_events(tmp_path / "j.jsonl")
    assert {"a": event["a"], "path": event["path"]} == kept


def test_what_is_printed_meanwhile_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with clean_output(), clean_output():
        print("token:", f"token: {SHAPES['GitHub']}", "é")
        sys.stdout.writelines(["a", "password=x\n"])
        try:
            raise RuntimeError(f"cannot open https://me:hunter2@host with {SHAPES['JWT']}")
        except RuntimeError:
            traceback.print_exc()
        assert isinstance(sys.stdout, Clean)
        sys.stdout.flush()
    assert sys.stdout is out
    out.seek(0)
    assert out.read() == f"token: token: {REDACTED} \\xe9\napassword={REDACTED}\n"
    assert "hunter2" not in err.getvalue()
    assert JWT not in err.getvalue()
    assert "RuntimeError: cannot open https://[redacted]@host" in err.getvalue()


LONG = [
    "x" * 2**20,
    "token=" * 2**17,
    "a-" * 2**19,
    "://" * 2**18,
    "token: " * 2**17,
    "eyJ" * 2**18,
    "-----BEGIN " * 2**16,
    "--a " * 2**18,
    '"' * 2**20,
    "@" * 2**20,
]


@pytest.mark.parametrize("word", LONG, ids=[word[:6] for word in LONG])
def test_a_megabyte_is_read_in_passing(word: str) -> None:
    started = time.process_time()
    redact(word)
    assert time.process_time() - started < 5


# -- a run in which every text is one -------------------------------------------------------------


def text_settings(owner: Any = None, prefix: str = "") -> list[str]:
    """Return every setting of text."""
    owner = owner or Run()
    hints, found = get_type_hints(type(owner)), []
    for item in fields(owner):
        value = getattr(owner, item.name)
        if is_dataclass(value):
            found += text_settings(value, f"{prefix}{item.name}.")
        elif str(hints[item.name]) in ("typing.Optional[str]", "<class 'str'>"):
            found.append(prefix + item.name)
    return found


FREE = {
    "model.name",
    "tracking.team",
    "tracking.cost_center",
    "tracking.purpose",
    "tracking.experiment",
}
"""What a baseline takes any text for; others are refused, and the refusal is looked at."""


def secret(number: int) -> str:
    return f"hf_{number:04d}PlantedForATest0000"


def test_no_planted_secret_is_found_anywhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, environment, paths, exceptions; then files, terminal, MLflow's store."""
    from pipeline.tracking.deliver import deliver

    settings = text_settings()
    assert set(settings) > FREE
    monkeypatch.chdir(root)
    monkeypatch.setenv("SOME_API_KEY", "planted-in-the-environment")
    said = ""
    # each refused elsewhere
    for key in ("data.path", "tracking.uri", "hardware.device", "cost.date", "candidate"):
        number = settings.index(key)
        done = here(
            root,
            "recipe=baseline",
            f"{key}={secret(number)}",
            "training.steps=-1",
            "tracking.mlflow=false",
        )
        assert done.returncode != 0
        said += done.stdout + done.stderr
    lines = "".join(
        json.dumps({"text": f"document {number} of a set that is long enough"}) + "\n"
        for number in range(60)
    )
    data = root / secret(900)
    data.mkdir()
    (data / "d.jsonl").write_text(lines)
    small = [each for each in SMALL if not each.startswith("tracking")]
    planted = [f"{key}={secret(number)}" for number, key in enumerate(settings) if key in FREE]
    run = [
        "recipe=baseline",
        *small,
        "training.steps=2",
        f"tracking.root={root}",
        f"data.path={data / 'd.jsonl'}",
        *planted[1:],
        "model.name=planted-in-the-environment",
        "tracking.mlflow=true",
    ]
    monkeypatch.setattr("pipeline.runs.opening.start_writer", lambda _: None)
    done = here(root, *run)
    assert done.returncode == 0, done.stderr
    said += done.stdout + done.stderr

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"cannot reach https://planted:hunter2@host with {secret(901)}")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.loop.train", fails, raising=False)
        patch.setattr("pipeline.runs.runner.StageRunner._work", fails)
        done = here(root, *run, "seed=1", "--debug")
    assert done.returncode == 1
    assert "RuntimeError: cannot reach" in done.stderr
    said += done.stdout + done.stderr
    for folder in (root / "runs").iterdir():
        assert deliver(folder) > 0
    needles = (b"PlantedForATest", b"planted-in-the-environment", b"planted:hunter2", b"hunter2@")
    files = [path for path in root.rglob("*") if path.is_file() and data not in path.parents]
    names = {path.name for path in files}
    assert {
        "result.json",
        "journal.jsonl",
        "report.md",
        "config.json",
        "run.json",
        "artifact.json",
        "mlflow.db",
    } <= names
    found = {
        (str(path.relative_to(root)), needle)
        for path in files
        for needle in needles
        if needle in path.read_bytes()
    }
    assert found == set()
    assert [needle for needle in needles if needle in said.encode()] == []
    assert REDACTED in said
