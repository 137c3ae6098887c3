"""Recipes are data: no key, tag, alias or interpolation of a file runs code, reads the environment
or eats memory.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.arguments import check_words
from pipeline.cli.main import main
from pipeline.cli.recipes import (
    GROUPS,
    MAX_BYTES,
    Recipe,
    config_dir,
    find_recipes,
    names_code,
    read_recipe,
)
from pipeline.errors import UserError

PLAIN = "# Is it data?\ndefaults:\n  - /stage@stages.only: train\nprimary_arm: only\n"


@pytest.fixture
def compose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Compose a recipe of this text; return its run, or the line that refused it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline"])

    def compose(text: str, *more: str) -> Any:
        folder = tmp_path / "recipes"
        folder.mkdir(exist_ok=True)
        (folder / "mine.yaml").write_text(text)
        taken: list[Any] = []
        args = ["--recipe-dir", str(folder), "recipe=mine", *more]
        code = main(args, started_ns=0, execute=lambda run, *_: taken.append(run) or 0)
        said = capsys.readouterr().err.strip()
        assert "Traceback" not in said
        if taken:
            return taken[0]
        assert code == 1, said
        assert len(said.splitlines()) == 1, said
        return said.removeprefix("refused: ")

    return compose


EXPLOIT = """
hydra:
  callbacks:
    evil:
      _target_: os.system
      command: touch {marker}
"""


@pytest.mark.parametrize("flags", [(), ("-m",), ("--multirun", "seed=0,1"), ("--cfg", "job")])
def test_a_callback_in_a_recipe_is_refused_and_not_run(
    compose: Any, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    marker = tmp_path / "ran"
    line = compose(PLAIN + EXPLOIT.format(marker=marker), *flags)
    assert line.startswith("recipe: ")
    assert "recipes/mine.yaml: hydra: names code, and a recipe is data" in line
    assert not marker.exists()


def refused(folder: Path, text: str) -> str:
    """Return the line that refuses a recipe of this text."""
    path = folder / "mine.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_recipe(Recipe("mine", path, "?"))
    assert caught.value.key == "recipe"
    return str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        "student: {config: {_target_: os.system}}",
        "student: {config: {deep: [{deeper: {_partial_: true}}]}}",
        "student: {config: {auto_map: {AutoModel: evil.Model}}}",
        "student: {config: {trust_remote_code: true}}",
        "stages: {only: {_target_: os.system}}",
        "serving: {results: {_args_: [x], _recursive_: true, _convert_: all}}",
        "compare: [{arm: only, _target_: os.system}]",
        "model: &a {shape: {_target_: os.system}}",
        "student: {config: {<<: {_target_: os.system}}}",
        "model: &m {_target_: os.system}\nstudent: {config: {<<: *m}}",
        "_target_: os.system",
        "hydra/launcher: joblib",
        "hydra: {searchpath: ['file:///tmp']}",
    ],
)
def test_what_names_code_is_refused_at_any_depth(tmp_path: Path, settings: str) -> None:
    line = refused(tmp_path, f"{PLAIN}{settings}\n")
    assert "mine.yaml: " in line
    assert "names code, and a recipe is data" in line or "there is no such setting" in line


@pytest.mark.parametrize(
    "choice",
    [
        "/hydra/launcher: joblib",
        "override /hydra/launcher: joblib",
        "override hydra/sweeper: x",
        "/hydra: x",
        "/stage@hydra.callbacks.evil: train",
        "/stage@_global_: train",
        "/model@hydra.run: tiny",
        "optional /env: x",
        "/model: ../../etc",
        "/model: ${oc.env:HOME}",
        "/stage@stages.x: os",
        "'/stage@stages.${x}': train",
        "/model: [tiny, 3]",
        "../model: tiny",
    ],
)
def test_defaults_choose_from_what_ships_alone(tmp_path: Path, choice: str) -> None:
    line = refused(
        tmp_path,
        f"# Q\ndefaults:\n  - /stage@stages.only: train\n  - {choice}\nprimary_arm: only\n",
    )
    assert "mine.yaml: defaults" in line, line


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "${oc.env:HOME}",
            (
                "wants the environment variable HOME, and a recipe reads none; pass it on the"
                " command line"
            ),
        ),
        ("a/${oc.env:SECRET,none}/b", "wants the environment variable SECRET"),
        ("${env:USER}", "wants the environment variable USER"),
        ("${oc.decode:'[1]'}", "computes a value"),
        ("${oc.create:{a: 1}}", "computes a value"),
        ("${oc.select:model.name}", "computes a value"),
        ("${hydra.job.name}", "computes a value"),
        ("${hydra:runtime.cwd}", "computes a value"),
        ("${python.eval:1}", "computes a value"),
        ("${model.${data.name}}", "computes a value"),
        ("${", "is not valid YAML"),
        ("fine ${model.name} and ${oc.env:HOME}", "wants the environment variable HOME"),
    ],
)
@pytest.mark.parametrize(
    "where", ['tracking: {{team: "{}"}}', 'student: {{config: {{a: [["{}"]]}}}}']
)
def test_a_file_reads_nothing_but_other_settings(
    tmp_path: Path, value: str, said: str, where: str
) -> None:
    assert said in refused(tmp_path, f"{PLAIN}{where.format(value)}\n")


def test_what_a_command_line_reads_is_the_users_own(
    compose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TEAM", "red")
    assert compose(PLAIN, "tracking.team=${oc.env:MY_TEAM}").tracking.team == "red"
    line = compose(PLAIN, "tracking.team=${oc.env:NO_SUCH_THING}")
    assert line.startswith("tracking.team: there is no environment variable NO_SUCH_THING; set it")


def test_a_recipe_may_refer_to_its_own_settings(compose: Any) -> None:
    run = compose(PLAIN + "model: {name: '${data.name}'}\ntracking: {team: '${model.name} team'}\n")
    assert (run.model.name, run.tracking.team) == ("stdlib", "stdlib team")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n"
            for n in range(9)
        ),
        "a: &a [*a]\n",
        "a: &a {b: {c: *a}}\n",
        "a: " + "[" * 5000 + "]" * 5000 + "\n",
        "a: " + "{b: " * 500 + "1" + "}" * 500 + "\n",
        "a: [" + "1, " * 30_000 + "1]\n",
        "a: !!python/object/apply:os.system ['true']\n",
        "a: !!python/name:os.system\n",
        "a: !!binary aGVsbG8=\n",
        "a: !mine {b: 1}\n",
        "a: " + "x" * (MAX_BYTES + 1),
        "a: 2026-11-01\n",
        "? [a, b]\n: c\n",
        "a: {1: 2, 1: 3}\n",
        "\x00",
        "a: \udcff",
        "- a\n- b\n",
        "just a word",
        "",
        "compare: 5\n",
        "defaults: 5\n",
        "defaults: [[a]]\n",
        "defaults: [{}]\n",
        "defaults: [5]\n",
        "defaults: [{a: b, c: d}]\n",
        "a: {b: *nobody}\n",
        "a: 1\na: 2\n",
        "%YAML 9.9\n---\na: 1\n",
        "--- 1\n--- 2\n",
    ],
)
def test_no_file_is_met_with_a_traceback(tmp_path: Path, text: str) -> None:
    assert "mine.yaml" in refused(tmp_path, text)


@pytest.mark.parametrize(
    "settings", ["stages: 5", "training: 5", "training: {steps: {a: 1}}", "defaults: [{a: 5}]"]
)
def test_settings_of_another_kind_are_one_line(compose: Any, settings: str) -> None:
    assert compose(f"# Q\nprimary_arm: x\n{settings}\n")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device", "broken link"])
def test_what_is_no_file_is_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/nowhere" if kind == "broken link" else "/dev/zero")
    assert (
        main(
            ["--recipe-dir", ".", "recipe=mine"],
            started_ns=0,
            execute=lambda *_: pytest.fail("composed"),
        )
        == 1
    )
    said = capsys.readouterr().err
    assert re.match(r"refused: recipe: mine\.yaml[: ]", said), said
    assert main(["--recipe-dir", "."], started_ns=0) == 0  # the others are listed


def test_every_recipe_that_ships_is_data() -> None:
    for recipe in find_recipes([]).values():
        assert read_recipe(recipe)["question"] == recipe.question


def test_names_of_code_are_told_from_names_of_settings() -> None:
    assert all(map(names_code, ("_target_", "a._partial_", "_x_", "hydra", "auto_map")))
    assert not any(
        map(names_code, ("_self_", "steps", "_", "__", "target", "pad_token_id", "a.b", 5))
    )


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arg",
    [
        "hydra.callbacks.x._target_=os.system",
        "+hydra.callbacks.x={_target_: os.system}",
        "hydra/launcher=joblib",
        "++hydra.launcher._target_=os.system",
        "hydra.searchpath=[file:///tmp]",
        "hydra.job_logging=x",
        "hydra=5",
        "hydra/job_logging=none",
        "hydra.output_subdir=.hydra",
        "hydra.job.env_set={A: 1}",
        "hydra.mode=MULTIRUN",
        "~hydra.callbacks",
        "hydra.sweeper._target_=os.system",
        "+hydra/callbacks=x",
        "hydra@x=y",
        "student.config._target_=os.system",
        "stages.only._target_=x",
        "model._target_=x",
        "serving.auto_map=x",
    ],
)
def test_a_command_line_names_no_code_either(arg: str) -> None:
    with pytest.raises(UserError, match=r"names code|is not for a command line to say|a ~ deletes"):
        check_words([arg])


@pytest.mark.parametrize(
    "arg", ["student.config={a: [{_target_: os.system}]}", "serving.results={auto_map: x}"]
)
@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_values_of_a_command_line_name_no_code(
    compose: Any, arg: str, flags: tuple[str, ...]
) -> None:
    assert "names code, and settings are data" in compose(PLAIN, *flags, arg)


def test_what_hydra_may_be_told(compose: Any) -> None:
    told = ["hydra.verbose=true", "hydra.run.dir=a b", "hydra.sweep.dir=x", "hydra.sweep.subdir=y"]
    assert compose(PLAIN, *told).recipe == "mine"


@pytest.mark.parametrize(
    "flag", ["--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun"]
)
def test_flags_that_bring_other_settings_are_refused(
    compose: Any, flag: str, tmp_path: Path
) -> None:
    assert f"{flag}: is not for use here" in compose(PLAIN, flag, str(tmp_path))


def test_choices_of_ones_own_are_data_too(compose: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "training").mkdir(parents=True)
    choice = folder / "training" / "long.yaml"
    choice.write_text("steps: 77\n")
    assert compose(PLAIN, "--config-dir", str(folder), "training=long").training.steps == 77
    for text, said in (
        ("_target_: os.system\n", "names code"),
        ("stepz: 1\n", "did you mean steps?"),
        ("steps: ${oc.env:HOME}\n", "wants the environment variable HOME"),
        ("hydra: {}\n", "names code"),
    ):
        choice.write_text(text)
        assert said in compose(PLAIN, "--config-dir", str(folder), "training=long")
    choice.rename(folder / "training" / "small.yaml")
    assert "hides the small that ships" in compose(PLAIN, f"--config-dir={folder}")
    (folder / "training" / "small.yaml").rename(folder / "config.yaml")
    assert "is of no group; put it into one of model" in compose(PLAIN, "-cd", str(folder))
    (folder / "config.yaml").unlink()
    (folder / "hydra" / "launcher").mkdir(parents=True)
    (folder / "hydra" / "launcher" / "evil.yaml").write_text("_target_: os.system\n")
    assert "is of no group" in compose(PLAIN, "-cd", str(folder))


def test_groups_and_folders_are_the_same() -> None:
    assert sorted(GROUPS) == sorted(path.name for path in config_dir().iterdir() if path.is_dir())
