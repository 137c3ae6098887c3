"""Every --help against the code: options, defaults, exit codes and keys that it names are those
that are read.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from pipeline.cli.arguments import is_known
from pipeline.cli.commands import (
    COMMANDS,
    chargeback,
    history,
    meter,
    register,
    run_command,
    selftest,
    weekly,
)
from pipeline.cli.recipes import config_dir
from pipeline.compare.history import ALPHA, LEAST_EARLIER
from pipeline.config.settings.precision import Precision
from pipeline.errors import Exit, UserError
from pipeline.ledger.charges import OWNER
from pipeline.runs.metering import options
from pipeline.runs.selftest import Options
from pipeline.tasks.table import Task


def named(text: str) -> set[str]:
    """Return the options that a usage text names."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (chargeback.USAGE, chargeback.OPTIONS),
        (history.USAGE, (*history.OPTIONS, *history.FLAGS)),
        (weekly.USAGE, weekly.OPTIONS),
        (meter.HELP, (*options.VALUED, *options.FLAGS)),
    ],
)
def test_the_options_that_are_named_are_those_that_are_read(
    text: str, read: tuple[str, ...]
) -> None:
    assert named(text) == set(read)


@pytest.mark.parametrize("key", [*OWNER, "model"])
def test_every_key_of_a_chargeback_is_named_and_taken(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chargeback, "store_of", lambda *_: "sqlite:///x.db")
    settings = chargeback.read_settings(["--from", "2026-11-01", "--to", "2026-12-01", "--by", key])
    assert settings.by in OWNER
    (line,) = (line for line in chargeback.USAGE.splitlines() if "--by" in line)
    assert key in re.findall(r"\w+", line)


def test_what_the_first_help_says_a_chargeback_is_by_can_be_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chargeback, "store_of", lambda *_: "sqlite:///x.db")
    said = re.search(r"what runs cost, by (.+) or another key", cli.HELP)
    assert said is not None
    for key in said.group(1).split(", "):
        chargeback.read_settings(["--from", "2026-11-01", "--to", "2026-12-01", "--by", key])
    with pytest.raises(UserError, match="give team, cost_center, purpose, model_name, recipe"):
        chargeback.read_settings(["--from", "2026-11-01", "--to", "2026-12-01", "--by", "owner"])


def test_the_settings_and_choices_that_are_named_are_there() -> None:
    text = cli.HELP.partition("Settings to meet first")[2].partition("Flags:")[0]
    pairs = dict(re.findall(r"([a-z_]+(?:\.[a-z_]+)*)=(\S+)", text))
    assert len(pairs) > 15
    assert all(is_known(key) for key in pairs)
    assert set(pairs["task"].split("|")) == {task.value for task in Task}
    for name in pairs["precision"].split("|"):
        assert Precision(name)
        assert (config_dir() / "precision" / f"{name}.yaml").is_file()


def test_every_exit_code_is_named_once() -> None:
    text = cli.HELP.partition("Exit codes: ")[2]
    assert [int(code) for code in re.findall(r"(?:^|, |\n)(\d+) ", text)] == [
        int(code) for code in Exit
    ]


def test_every_flag_of_the_first_help_is_taken() -> None:
    text = cli.HELP.partition("Flags:")[2].partition("Beside it")[0]
    assert named(text) - {"--debug"} <= {*cli.HYDRA_FLAGS, *cli.FOLDERS}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (history.USAGE, f"(default: {history.Settings(uri='').last})"),
        (history.USAGE, f"({['zero', 'one', 'two', 'three'][LEAST_EARLIER]} or more"),
        (history.USAGE, f"alpha {ALPHA:.0%} for serving"),
        (chargeback.USAGE, f"{chargeback.Settings(start_s=0, end_s=1, uri='').by} (default)"),
        (chargeback.USAGE, f"(default: {chargeback.Settings(start_s=0, end_s=1, uri='').root})"),
        (meter.HELP, f"(default: {options.ROOT})"),
        (weekly.USAGE, f"default: {['six', 'seven'][weekly.DAYS - 6]} days before --to"),
        (weekly.USAGE, f"{OWNER[0]} (default)"),
        (selftest.USAGE, f"n={Options().trials} "),
        (selftest.USAGE, f"repeats={Options().repeats} "),
    ],
)
def test_the_defaults_that_are_named_are_those_that_hold(text: str, said: str) -> None:
    assert said in text


def test_what_a_self_test_and_a_registration_take_is_named() -> None:
    for name in (*selftest.OWN, "policy"):
        assert f"{name}=" in selftest.USAGE
    policies = re.search(r"policy=([\w|]+)", selftest.USAGE)
    assert policies is not None
    assert {path.stem for path in (config_dir() / "policy").glob("*.yaml")} == set(
        policies.group(1).split("|")
    )
    assert re.findall(r"(\w+)=", register.USAGE) == list(register.KEYS)


def test_help_prints_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    names = list(COMMANDS)
    assert len(names) == 12
    ends = [run_command([name, "--help"], started_ns=0) for name in names]
    assert ends == [Exit.DONE] * len(names)
    assert capsys.readouterr().out.count("Usage: python -m pipeline ") == len(names)
