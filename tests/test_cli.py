"""The command line as a user meets it: lists, refusals, exit codes, and nothing heavy imported for
any of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from few import few
from here import here

from pipeline.cli.main import main
from pipeline.cli.recipes import find_recipes
from pipeline.errors import LINE, DeviceLost, UserError


def run(
    *args: str, cwd: str | None = None, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-m", "pipeline", *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
    )


def test_alone_it_lists_the_recipes_with_their_questions() -> None:
    done = run()
    assert done.returncode == 0
    for name in ("baseline", "distill", "full", "mixed_precision", "quantize"):
        assert f"  {name} " in done.stdout
    assert "Is a distilled student worth it?" in done.stdout


REFUSED = {
    "recipe=": "recipe: is empty",
    "recipe=distil": "did you mean distill?",
    "training.steps=3": "recipe: none is named",
    "recip=distill": "recip: there is no such setting; did you mean recipe?",
    "recipe=distill training.stepz=3": (
        "training.stepz: there is no such setting; did you mean training.steps?"
    ),
    "recipe=distill training.steps=x": (
        "training.steps: 'x' is not a whole number; give a whole number"
    ),
    "recipe=distill training.steps=null": (
        "training.steps: null is no value for it; leave training.steps out"
    ),
    "recipe=distill data.path=": "data.path: is empty; give a place, or leave data.path out",
    "recipe=distill student.layers=2 student.path=/x": (
        "student.layers: does not go with student.path; give one"
    ),
    "recipe=distill training.steps=1 training.steps=abc": (
        "training.steps: 'abc' is not a whole number"
    ),
    "recipe=distill student.layers=9": "student.layers: 9 fits no model of 4 layers",
    "recipe=distill training.steps=0": (
        "stages.control_compute.match_compute: student takes no steps to match"
    ),
    "recipe=distill training.steps=-1": (
        "training.steps: -1 is out of range; give a number of at least 0"
    ),
    "recipe=distill precision=bf17": "precision: there is no 'bf17'; did you mean bf16?",
    "recipe=distill stages.student.tempratur=2": "did you mean stages.student.temperature?",
    "recipe=distill stages.student.teacher=control_steps": (
        "'control_steps' comes later in the recipe"
    ),
    "recipe=distill stages.student.teacher=nobody": "there is no stage 'nobody'",
    "recipe=distill data.path=/nowhere": "data.path: /nowhere does not exist",
    "recipe=distill task=sequence_classification": "use data=stdlib_labels",
    "recipe=distill training.steps=1,2": (
        "training.steps: has several values; add -m to run one job for each"
    ),
    "recipe=distill +x=1": "+x: a + adds a setting, and nothing reads added ones",
    "recipe=distill seeds=[1,1]": "seeds: [1, 1] is no list of different seeds",
    "recipe=distill cost.per_device_hour=2": "cost.source: a rate without its source",
    "recipe=distill training.batch_size=10 training.gradient_accumulation=3": (
        "3 does not divide batch_size 10"
    ),
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_is_one_line_and_exit_1(line: str, tmp_path: Path) -> None:
    done = here(tmp_path, *line.split())
    assert done.returncode == 1
    assert REFUSED[line] in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_flags_may_stand_anywhere_and_unknown_ones_are_one_line() -> None:
    args = ["recipe=baseline", "--cfg", "job", "training.steps=3"]
    assert "steps: 3" in run(*args).stdout
    assert "Usage: python -m pipeline" in run("recipe=baseline", "--help").stdout
    done = run("recipe=baseline", "--frob")
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "refused: --frob: there is no such flag; --help and --hydra-help list them",
    )


def test_what_cannot_be_parsed_exits_2() -> None:
    assert run("recipe=distill", "steps").returncode == 2
    assert run("recipe=distill", "--nonsense").returncode == 2


@pytest.mark.parametrize(
    ("line", "code"), [(["--help"], 0), (["recipe=nonesuch"], 1), (["recipe=distill", "data"], 2)]
)
def test_a_reader_that_has_left_changes_no_exit_code(line: list[str], code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        command = [sys.executable, "-m", "pipeline", *line]
        assert subprocess.run(command, stdout=nobody, stderr=nobody, check=False).returncode == code


def test_a_copied_recipe_works(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "# Is mine better?\ndefaults:\n  - /stage@stages.only: train\nprimary_arm: only\nstages:"
        " {only: {steps: 7}}\n"
    )
    done = run("--recipe-dir", str(tmp_path), "recipe=mine", "--cfg", "job", cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "question: Is mine better?" in done.stdout
    assert "steps: 7" in done.stdout


@pytest.mark.parametrize(
    "line", ["--help", "recipe=distill --cfg job", "recipe=distill training.steps=x"]
)
def test_nothing_heavy_is_imported(line: str) -> None:
    done = run(*line.split(), flags=("-X", "importtime"))
    imported = {
        row.rpartition("|")[2].strip().partition(".")[0]
        for row in done.stderr.splitlines()
        if "|" in row
    }
    assert "pipeline" in imported  # the listing was read
    assert imported.isdisjoint({"torch", "transformers", "mlflow", "bitsandbytes", "numpy"})


@pytest.mark.parametrize(
    "text",
    [
        "a$b",
        "modèle",
        "a'b",
        "a\\",
        "a\\'b",
        "a b",
        "models:/m@champion",
        "$(x) {y",
        "#x",
        "a=b",
        "C:\\m",
    ],
)
def test_a_reference_is_taken_as_it_is(text: str) -> None:
    taken: list[Any] = []
    args = ["recipe=release_check", f"candidate={text}", "baseline=x"]
    assert (
        main(
            args,
            started_ns=time.monotonic_ns(),
            execute=lambda run, *_: taken.append(run.candidate) or 0,
        )
        == 0
    )
    assert taken == [text]


@pytest.mark.parametrize(
    ("asked", "names"),
    few(
        [
            (
                "recipe=glob(distill*)",
                {name for name in find_recipes([]) if name.startswith("distill")},
            ),
            ("recipe='distill'", {"distill"}),
            ("recipe=baseline,distill", {"baseline", "distill"}),
        ],
        1,
    ),
)
def test_every_recipe_that_is_asked_for_is_found(
    asked: str, names: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline"])
    execute = lambda run, *_: taken.append(run.recipe) or 0
    assert main(["-m", asked], started_ns=time.monotonic_ns(), execute=execute) == 0
    assert set(taken) == names
    assert len(taken) == len(names)


def test_a_users_recipe_may_build_on_another(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "longer.yaml").write_text(
        "# @package _global_\n# Is longer better?\ndefaults: [baseline, _self_]\n"
        "training: {steps: 7}\n"
    )
    taken: list[Any] = []
    args = ["--recipe-dir", str(mine), "recipe=longer"]
    assert (
        main(args, started_ns=time.monotonic_ns(), execute=lambda run, *_: taken.append(run) or 0)
        == 0
    )
    assert (taken[0].training.steps, list(taken[0].stages)) == (7, ["baseline"])


def test_a_lost_device_ends_a_multirun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next job would be in the same process, which cannot use the device again."""
    monkeypatch.chdir(tmp_path)
    seeds: list[int] = []

    def execute(run: Any, *_: Any) -> int:
        seeds.append(run.seed)
        raise DeviceLost("stage baseline: the cuda device was lost")

    args = ["recipe=baseline", "hardware.device=cpu"]
    assert main(["-m", *args, "seed=0,1"], started_ns=0, execute=execute) == 1
    assert main(args, started_ns=0, execute=execute) == 1
    assert seeds == [0, 0]
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if "lost" in line] == [
        "failed: stage baseline: the cuda device was lost"
    ] * 2


def test_the_jobs_of_a_multirun_do_not_wait_for_mlflow_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a job waits after its figures are written is in nobody's hours; the next one's clock is
    running then.
    """
    done: list[Any] = []

    def waits() -> str:
        done.append("waited")
        return "MLflow: there"

    def execute(run: Any, _: str, since_ns: int, deliveries: list[Any]) -> int:
        done.append(run.seed)
        deliveries.append(waits)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline"])
    assert (
        main(["-m", "recipe=baseline", "seed=0,1"], started_ns=time.monotonic_ns(), execute=execute)
        == 0
    )
    assert done == [0, 1, "waited", "waited"]
    assert capsys.readouterr().out.count("MLflow: there") == 1


def test_what_a_crash_says_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def crash(*_: Any) -> int:
        raise RuntimeError("a path with \x1b[2J in it\nand a second line")

    assert main(["recipe=baseline"], started_ns=time.monotonic_ns(), execute=crash) == 1
    assert (
        capsys.readouterr().err
        == "crashed: RuntimeError: a path with in it and a second line (--debug shows where)\n"
    )


def test_a_refusal_is_one_harmless_line_whoever_prints_it() -> None:
    refusal = UserError("name", "a\x1b[2Jb\n\u202e is none", "give\x07 one")
    assert str(refusal) == "name: ab is none; give one"
    assert len(str(UserError("name", "x" * 10_000, "y"))) == LINE


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
@pytest.mark.faults
def test_a_signal_while_the_program_starts_ends_it_with_a_line_and_the_right_code(
    tmp_path: Path, number: int, code: int
) -> None:
    """The program is stopped at its first import of its own: the signal comes in the middle of
    that.
    """
    stops = f"import os, sys; os.kill(os.getpid(), {int(number)}); import time; time.sleep(60)"
    (tmp_path / "sitecustomize.py").write_text(f"""
import builtins
real = builtins.__import__
def stopping(name, *args, **more):
    if name == "pipeline.cli.main":
        builtins.__import__ = real
        {stops}
    return real(name, *args, **more)
builtins.__import__ = stopping
""")
    there = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "pipeline", "recipe=baseline"]
    done = subprocess.run(
        command, env=there, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("module", "becomes"),
    [
        ("pipeline.cli.main", "raise ImportError('initialization failed')"),
        ("omegaconf", "raise ImportError('initialization failed')"),
        ("hydra.errors", "raise AttributeError('partially initialized module')"),
        ("pipeline.cli.validate", "raise SystemError('error return without exception set')"),
    ],
)
@pytest.mark.faults
def test_a_signal_that_an_import_takes_for_its_own_failure_is_that_signal(
    tmp_path: Path, number: int, code: int, module: str, becomes: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"""
import builtins, os, sys
real = builtins.__import__
def stopping(name, *args, **more):
    if name == {module!r}:
        builtins.__import__ = real
        try:
            os.kill(os.getpid(), {int(number)})
            import time; time.sleep(60)
        except BaseException:
            {becomes}
    return real(name, *args, **more)
builtins.__import__ = stopping
""")
    there = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "pipeline", "recipe=baseline", "hardware.device=cuda:99"]
    done = subprocess.run(
        command, env=there, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "status"),
    few([(signal.SIGTERM, 75, "KILLED"), (signal.SIGINT, 130, "KILLED")], 1),
)
@pytest.mark.faults
@pytest.mark.slow
def test_a_signal_that_an_import_swallows_stops_the_run_before_its_first_stage(
    tmp_path: Path, number: int, code: int, status: str
) -> None:
    """Libraries try what may not be there, and go on without it."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import builtins, os, sys
real = builtins.__import__
def stopping(name, *args, **more):
    if name == "torch":
        builtins.__import__ = real
        try:
            os.kill(os.getpid(), {int(number)})
            import time; time.sleep(60)
        except BaseException:
            pass
    return real(name, *args, **more)
builtins.__import__ = stopping
""")
    there = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "recipe=baseline",
        "hardware.device=cpu",
        "tracking.mlflow=false",
    ]
    done = subprocess.run(
        command, env=there, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    (found,) = (tmp_path / "mlruns/runs").glob("*/result.json")
    result = json.loads(found.read_text())
    assert result["status"] == status
    assert not any(row["status"] == "FINISHED" for row in result["rows"])


def recipes_in(folder: Path, **texts: str) -> None:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(f"# What for?\n{text}\n")


BUILT = "defaults:\n  - {}\n  - _self_\n"


@pytest.mark.parametrize("broken", ["a: [", "stages: 5\nexec: {_target_: os.system}", "compare: 3"])
def test_a_broken_recipe_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    """Nor one whose name holds its name, whose comment names it, or that is given it as a word."""
    recipes_in(
        tmp_path / "own",
        lang=broken,
        language=f"# like lang\n{BUILT.format('baseline')}",
        on_language=BUILT.format("language"),
        on_lang=BUILT.format("lang"),
    )
    (tmp_path / "own/gone.yaml").symlink_to(tmp_path / "nowhere")

    def code_of(recipe: str) -> int:
        args = ["--recipe-dir", str(tmp_path / "own"), f"recipe={recipe}", "tracking.purpose=lang"]
        return main(args, started_ns=0, execute=lambda *_: 0)

    for good in ("language", "on_language", "language.yaml"):
        assert code_of(good) == 0, (good, capsys.readouterr())
    capsys.readouterr()
    for bad in ("lang", "on_lang"):
        assert code_of(bad) == 1
        assert "lang.yaml" in capsys.readouterr().err
    assert code_of("langauge") == 1
    assert "there is no 'langauge'; did you mean language" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training:\n  eval_every: soon", "training.eval_every: 'soon' is not a whole number"),
        ("quality:\n  margin: wide", "quality.margin: 'wide' is not a number"),
        ("tracking:\n  mlflow: perhaps", "tracking.mlflow: 'perhaps' is not true or false"),
        (
            "serving:\n  load:\n    prompt: long",
            "serving.load.prompt: 'long' is not a whole number",
        ),
        (
            "stages:\n  baseline:\n    batch_size: big",
            "stages.baseline.batch_size: 'big' is not a whole number",
        ),
        ("serving:\n  batches: 3", "serving.batches: "),
        ("seed: [a]", "seed: "),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_a_wrong_type_in_a_recipe_names_key_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str, built: bool
) -> None:
    """Also where the file at fault is one that the named one builds on."""
    recipes_in(
        tmp_path / "own", first=BUILT.format("baseline") + text, second=BUILT.format("first")
    )
    name = "second" if built else "first"
    args = [
        "--recipe-dir",
        str(tmp_path / "own"),
        f"recipe={name}",
        "training.steps=3",
        "data.vocabulary_size=500",
    ]
    assert main(args, started_ns=0, execute=lambda *_: 0) == 1
    err = capsys.readouterr().err
    assert said in err
    assert f"{tmp_path}/own/first.yaml" in err
