"""Secrets: marked by name, by shape and inside other values; never in what a run or Hydra leaves on
disk.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.redaction import (
    REDACTED,
    has_login,
    redact_override,
    redact_settings,
    redact_value,
    without_login,
)
from pipeline.config.settings.model import StudentConfig
from pipeline.config.settings.run import Run
from pipeline.store.artifacts import plain

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrSt"  # no real one


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("hub.token", "abc", REDACTED),
        ("a.api_key", "x", REDACTED),
        ("AWS_SECRET_ACCESS_KEY", "x", REDACTED),
        ("db.password", "x", REDACTED),
        ("tracking.uri", "https://me:pw@host/x", f"https://{REDACTED}@host/x"),
        ("tracking.uri", "postgresql://me:p@w@host/db", f"postgresql://{REDACTED}@host/db"),
        ("tracking.uri", "https://host/x?token=abc&y=1", f"https://host/x?token={REDACTED}&y=1"),
        ("purpose", f"with {TOKEN}, quickly", f"with {REDACTED}, quickly"),
        ("purpose", "ghp_" + "a" * 36, REDACTED),
        (
            "student.config",
            "{api_key: abc, hidden_size: 64}",
            f"{{api_key: {REDACTED}, hidden_size: 64}}",
        ),
        ("student.config", "{'hub_token': 'abc'}", f"{{'hub_token': {REDACTED}}}"),
    ],
)
def test_secrets_are_marked(key: str, value: str, shown: str) -> None:
    assert redact_value(key, value) == shown
    assert redact_override(f"{key}={value}") == f"{key}={shown}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.max_tokens", "5"),
        ("data.tokenizer", "byte"),
        ("model.path", "org/name"),
        ("data.path", "/data/a@b/train.jsonl"),
        ("tracking.uri", "sqlite:////tmp/mlflow.db"),
        ("question", "what is the key to it: tokens?"),
        ("data.path", "hf_home/train.jsonl"),
    ],
)
def test_what_is_no_secret_stays(key: str, value: str) -> None:
    assert redact_value(key, value) == value
    assert redact_override(f"{key}={value}") == f"{key}={value}"


def test_arguments_without_a_value_stay_unless_they_are_tokens() -> None:
    assert redact_override("-m") == "-m"
    assert redact_override(TOKEN) == REDACTED


def test_settings_are_marked_at_any_depth_and_keep_their_types() -> None:
    settings = {
        "a": {"secret": 5, "steps": 5, "list": [TOKEN, 1]},
        "token": None,
        "compile": True,
        "x": 0.5,
    }
    assert redact_settings(settings) == {
        "a": {"secret": REDACTED, "steps": 5, "list": [REDACTED, 1]},
        "token": None,
        "compile": True,
        "x": 0.5,
    }


def test_the_settings_of_a_run_hold_nothing_that_is_taken_for_a_secret() -> None:
    assert redact_settings(plain(Run())) == plain(Run())
    held = plain(Run(student=StudentConfig(config={"api_key": "abc"})))
    assert redact_settings(held)["student"]["config"] == {"api_key": REDACTED}


def test_logins_in_urls() -> None:
    assert has_login("postgresql://me:pw@host/db")
    assert not has_login("sqlite:////tmp/mlflow.db")
    assert not has_login("http://host:5000/a@b")
    assert without_login("https://me:p@w@host:5000/x") == "https://host:5000/x"
    assert without_login("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"


def test_hydra_leaves_no_secret_of_a_multirun_on_disk(tmp_path: Path) -> None:
    """Its own multirun.yaml holds the command line in clear; refused jobs are enough to have it
    written.
    """
    secrets = [f"tracking.purpose={TOKEN}", "student.config={api_key: hunter2}"]
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "-m",
        "recipe=baseline",
        "training.steps=-1,-2",
        *secrets,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("is out of range") == 2, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert [
        path for path in files if TOKEN in path.read_text() or "hunter2" in path.read_text()
    ] == []


def test_long_words_are_read_in_passing() -> None:
    """Answers of servers and hand-set tags may hold a megabyte without a blank."""
    for word in ("x" * 2**20, "token" * 2000, "a-" * 2**19):
        started = time.process_time()
        assert redact_value("", word) == word
        assert time.process_time() - started < 5
    assert redact_value("", f"{'x' * 5000}_token=abc") == f"{'x' * 5000}_token={REDACTED}"
    assert redact_value("", 'x"api_key": "abc"') == f'x"api_key": {REDACTED}'
