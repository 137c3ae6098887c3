"""Secrets that the environment holds, whatever its variables are called, and what may not be taken
for one.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from urllib.parse import quote

import pytest

from pipeline.config.redaction import REDACTED, names_secret, redact, redact_json

SECRET = [
    "PGPASSWORD",
    "MYSQL_PWD",
    "SSHPASS",
    "MQTT_PASS",
    "SMTP_PASSWD",
    "GPG_PASSPHRASE",
    "ELASTIC_KEY",
    "COHERE_KEY",
    "AZURE_PAT",
    "CI_JOB_TOKEN",
    "GITHUBTOKEN",
    "REDISCLI_AUTH",
    "NPM_AUTH",
    "SENTRY_DSN",
    "SVC_CREDENTIALS",
    "GCP_CREDS",
    "TWILIO_AUTH_TOKEN",
    "CLIENT_SECRET",
    "FLASK_SECRET",
    "APP_KEY",
    "MATTERMOST_WEBHOOK",
    "TEAMS_WEBHOOK_URL",
    "DB_PASS",
    "JENKINS_API_TOKEN",
    "DJANGO_SECRET_KEY",
    "SIGNING_KEY_2",
    "my_service_password",
    "WANDB_API_KEY",
    "ROOT_PASS_1",
]
NO_SECRET = [
    "PWD",
    "OLDPWD",
    "KEYBOARD",
    "XDG_SESSION_KEY",
    "TOKENIZERS_PARALLELISM",
    "SSH_AUTH_SOCK",
    "COMPASS",
    "BYPASS",
    "PUBLIC_KEY",
    "EOS_TOKEN",
    "MAX_TOKENS",
    "MONKEYPATCH",
    "PATH",
    "AUTHOR",
    "KEYMAP",
    "TOKENIZER",
    "PARTITION_KEY",
    "FORWARD_PASS",
    "PASSAGE",
    "HF_HOME",
    "MLFLOW_TRACKING_URI",
    "OMP_NUM_THREADS",
    "SECRETARY",
]


@pytest.mark.parametrize("name", SECRET)
def test_a_variable_is_known_by_its_parts_and_its_ending(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = secrets.token_urlsafe(12)
    monkeypatch.setenv(name, value)
    assert redact(f"the server said: {value}!") == f"the server said: {REDACTED}!"
    assert value not in json.dumps(redact_json({"why": [f"x{value}y"], value: 1}))


@pytest.mark.parametrize("name", NO_SECRET)
def test_other_variables_are_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = secrets.token_urlsafe(12)
    monkeypatch.setenv(name, value)
    assert redact(f"it is {value}") == f"it is {value}"


@pytest.mark.parametrize(
    "value",
    [
        "true",
        "false",
        "abcde",
        "password",
        "Default",
        "12345678",
        "/etc/ssl/certs/ca.pem",
        "~/.ssh/id",
        "./a/b",
        "postgres",
        "token",
        "quality",
    ],
)
def test_words_numbers_and_paths_do_not_shred_a_text(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANY_SECRET", value)
    text = f"an {value} is here, and {value}s"
    assert redact(text) == text


def test_a_short_word_is_marked_where_it_is_one_and_left_inside_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_PASS", "marble")
    assert redact("marble, marbles, 'marble'") == f"{REDACTED}, marbles, '{REDACTED}'"


def test_a_secret_that_begins_like_a_path_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANY_SECRET_KEY", "/q8Zt+uP1x==")
    assert redact("it is /q8Zt+uP1x==") == f"it is {REDACTED}"


def test_a_secret_is_found_as_json_and_urls_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    value = 'pä"ss\\wö/rd$7'
    monkeypatch.setenv("THEIR_PASS", value)
    for form in (
        value,
        json.dumps(value),
        json.dumps(value, ensure_ascii=False),
        quote(value, safe=""),
    ):
        assert "rd$7" not in redact(f"a {form} b")
        assert "rd%247" not in redact(f"a {form} b")


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("CACHE_LOCATION", "rediss://default:Zq81xx9@cache:6380/1", "Zq81xx9"),
        ("REDIS_URL", "redis://:onlyword77@h:6379", "onlyword77"),
        ("BROKER", "amqp://svc:4mqpW0rd@mq//", "4mqpW0rd"),
        ("ODBC", "Driver=x;Uid=me;Pwd=s3rv3r!;Database=d", "s3rv3r!"),
    ],
)
def test_what_a_login_holds_is_known_alone(
    name: str, value: str, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert hidden not in redact(f"cannot log in with {hidden}")
    assert hidden not in redact(f"{name}={value}")


@pytest.mark.parametrize(
    "text",
    [
        "https://hooks.slack.com/services/T1/B2/HIDE1234",
        "see https://hooks.slack.com/workflows/HIDE1234/x, then",
        "https://discord.com/api/webhooks/123/HIDE1234",
        "https://canary.discordapp.com/api/v9/webhooks/1/HIDE1234",
        "https://acme.webhook.office.com/webhookb2/HIDE1234@x/IncomingWebhook/y",
        "https://chat.acme.org/hooks/HIDE1234abcdefghij",
        "https://api.telegram.org/bot1:HIDE1234/sendMessage",
        "https://hooks.zapier.com/hooks/catch/1/HIDE1234/",
        "pass=HIDE1234",
        "passwd: HIDE1234",
        "user=a pass='HIDE1234 two'",
        "PGPASSWORD=HIDE1234 psql",
        "GH_PAT=HIDE1234",
        "OPENAI_KEY: HIDE1234",
        "DB_PASS=HIDE1234",
        "db_pass=HIDE1234",
        "--pass HIDE1234",
        '{"api_key": ["HIDE1234"]}',
        '{"api_key": {"a": ["HIDE1234", 5]}, "b": 1}',
        "{secret: [x, HIDE1234, {y: HIDE1234}]}",
        '{"password": "a\\"b HIDE1234"}',
        '"{\\"api_key\\": \\"HIDE1234\\"}"',
        '"{\\\\\\"token\\\\\\": \\\\\\"HIDE1234\\\\\\"}"',
        "credentials=[HIDE1234",
        "sent Basic aGlkZTpISURFMTIzNA== to it",
    ],
)
def test_secrets_in_text_are_marked(text: str) -> None:
    shown = redact(text)
    assert "HIDE1234" not in shown
    assert "ISURFMTIzNA" not in shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "monkeypatch: yes",
        "KEYBOARD=de",
        "TOKENIZERS_PARALLELISM=false",
        "XDG_SESSION_KEY=c2",
        "passes: 5",
        "passed=x",
        "pass: 5",
        "pass=true",
        "forward_pass: slow",
        "compass: north",
        "FOREIGN_KEY=documents",
        "MAX_TOKENS=512",
        "EOS_TOKEN=</s>",
        "author: me",
        "https://discord.com/channels/1",
        "https://example.org/hooks/short",
        "the test pass: all of it",
        "PWD=/tmp/x",
        "path: [a, b]",
        "{keys: [a, b]}",
        "https://slack.com/a/b",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_all_that_a_secret_name_holds_is_marked_and_counts_stay() -> None:
    held = {
        "token": {"value": "x", "more": [{"deep": "y"}], "count": 3},
        "pass": True,
        "pass_rate": "high",
        "credentials": [["a", "b"], {"user": "c"}],
        "keys": ["k"],
    }
    assert redact_json(held) == {
        "token": {"value": REDACTED, "more": [{"deep": REDACTED}], "count": 3},
        "pass": True,
        "pass_rate": "high",
        "credentials": [[REDACTED, REDACTED], {"user": REDACTED}],
        "keys": ["k"],
    }


def test_names_of_settings() -> None:
    assert all(
        map(names_secret, ("pass", "db.pass", "userPass", "PGPASSWORD", "smtp_passwd", "GH_PAT"))
    )
    assert not any(
        map(
            names_secret,
            ("pass_rate", "first_pass", "passes", "monkey", "sort_key", "XDG_SESSION_KEY"),
        )
    )


def test_a_large_environment_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        monkeypatch.setenv(f"VARIABLE_{number}", "x" * 500)
    started = time.process_time()
    for _ in range(500):
        redact("a line of output: 5")
    assert time.process_time() - started < 5
    assert os.environ["VARIABLE_1"]


def test_brackets_that_are_never_closed_are_read_in_passing() -> None:
    text = "secret: [" * 20_000
    started = time.process_time()
    redact(text)
    assert time.process_time() - started < 20
