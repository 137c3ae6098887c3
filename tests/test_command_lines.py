"""Command lines as people type them: places with any name, other trainers' words, lists, numbers
beyond any machine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from here import here
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from pipeline.cli.arguments import OTHER_NAMES, PATHS, check_words, elsewhere, for_hydra, is_path
from pipeline.cli.main import main
from pipeline.config.settings.ranges import dotted_keys
from pipeline.config.settings.run import Run
from pipeline.errors import UserError

ODD_NAMES = [
    "a b [1].jsonl",
    "modèle.jsonl",
    "数据/训练.jsonl",
    "it's.jsonl",
    'say "hi".jsonl',
    "a,b.jsonl",
    "a=b.jsonl",
    "(x).jsonl",
    "{x}.jsonl",
    "a:b.jsonl",
    "a\\b.jsonl",
    "a\\'b.jsonl",
    "#x.jsonl",
    "a;b|c&d.jsonl",
    "$HOME.jsonl",
    "*.jsonl",
    "null.jsonl",
    "007",
    "1e3",
    "true",
    "[a]",
    "[a,b]",
    "a b ",
    "-x.jsonl",
    "choice(a,b)",
    "range(3)",
    "'half.jsonl",
    "ends in \\",
    "\U0001f600.jsonl",
    "a\tb.jsonl",
    "%20.jsonl",
    "~x.jsonl",
    "!x",
    "@x",
    "a`b`",
]


@pytest.fixture
def compose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Compose a command line; return its runs, or the line that refused it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline"])

    def compose(*args: str, code: int = 1) -> Any:
        taken: list[Any] = []
        got = main(list(args), started_ns=0, execute=lambda run, *_: taken.append(run) or 0)
        said = capsys.readouterr().err.strip()
        if taken:
            return taken
        assert got == code, said
        assert len(said.splitlines()) == 1, said
        return said.removeprefix("refused: ")

    return compose


def read(arg: str, *, sweeps: bool = False) -> Any:
    """Return what Hydra's own parser takes the value of an argument for."""
    (word,) = for_hydra([arg], sweeps=sweeps)
    override = OverridesParser.create().parse_override(word)
    assert not override.is_sweep_override()
    value = override.value()
    return value.text if isinstance(value, QuotedString) else value


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("sweeps", [False, True])
def test_a_place_has_the_name_that_was_typed(name: str, sweeps: bool) -> None:
    if sweeps and ("," in name or "(" in name):
        pytest.skip("commas and functions separate the jobs of a multirun")
    assert read(f"data.path=/x/{name}", sweeps=sweeps) == f"/x/{name}"
    if name[0] not in "~" and name != "null":
        assert read(f"candidate={name}", sweeps=sweeps) == name


def test_places_are_composed_as_typed(compose: Any, tmp_path: Path) -> None:
    for name in ("a b [1],(x)={y}.jsonl", "modèle 训练 'q'.jsonl"):
        (tmp_path / name).touch()
        (run,) = compose(
            "recipe=baseline",
            f"data.path={name}",
            f"tracking.root={name}/x",
            "model.name=two words, x?",
        )
        assert (run.data.path, run.tracking.root, run.model.name) == (
            name,
            f"{name}/x",
            "two words, x?",
        )


def test_every_setting_that_is_a_place_is_one() -> None:
    known = set(dotted_keys(Run))
    assert {key for key in PATHS if not key.startswith("hydra.")} <= known
    assert all(
        map(
            is_path,
            ("stages.student.completions", "stages.int8.calibration", "serving.results.student"),
        )
    )
    assert not any(map(is_path, ("stages.student.steps", "model.name", "quality.tasks")))
    for key in (
        "model.path",
        "tracking.root",
        "store.url",
        "candidate_items",
        "stages.x.completions",
    ):
        assert for_hydra([f"{key}=a b"], sweeps=False) == [f"{key}='a b'"]
    assert for_hydra(["data.path=null", "data.path=", "data.path='x'"], sweeps=False) == [
        "data.path=null",
        "data.path=",
        "data.path='x'",
    ]


def test_home_is_home(compose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").touch()
    (run,) = compose("recipe=baseline", "data.path=~/x.jsonl")
    assert run.data.path == f"{tmp_path}/x.jsonl"


def test_text_is_text_where_the_grammar_cannot_read_it(compose: Any) -> None:
    (run,) = compose(
        "recipe=baseline", "tracking.purpose=what is it? (new, [1])", 'tracking.team=a, "b"'
    )
    assert (run.tracking.purpose, run.tracking.team) == ("what is it? (new, [1])", 'a, "b"')


def test_commas_still_sweep(compose: Any) -> None:
    runs = compose("-m", "recipe=baseline", "seed=0,1", "tracking.root=a,b")
    assert [(run.seed, run.tracking.root) for run in runs] == [
        (0, "a"),
        (0, "b"),
        (1, "a"),
        (1, "b"),
    ]


def test_a_shell_that_speaks_ascii_can_name_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What such a shell hands over has lone surrogates for bytes."""
    path = tmp_path / "modèle.jsonl"
    path.touch()
    as_given = str(path).encode().decode("ascii", "surrogateescape")
    done = here(tmp_path, "recipe=baseline", f"data.path={as_given}x")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    done.stderr.encode()


GROUPS = [
    "precision=16",
    "precision=true",
    "model=null",
    "training=5",
    "policy=-1",
    "recipe=2026",
    "recipe=1e5",
]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ([], "tiny"),
        (["model=h200_124m"], "llama-124m"),
        (["model.path=Qwen/Qwen2.5-1.5B"], "Qwen2.5-1.5B"),
        (["model.path=models/mine/"], "mine"),
        (["model.path=models/mine", "model.name=ours"], "ours"),
    ],
)
def test_costs_add_up_under_the_name_of_the_model_that_is_given(
    given: list[str], name: str, tmp_path: Path
) -> None:
    done = here(tmp_path, "recipe=baseline", *given, "--cfg", "job", "--resolve")
    assert yaml.safe_load(done.stdout)["model"]["name"] == name


@pytest.mark.parametrize("arg", GROUPS)
def test_a_choice_that_is_no_word_is_said_not_to_be_there(compose: Any, arg: str) -> None:
    key, _, value = arg.partition("=")
    args = [arg] if key == "recipe" else ["recipe=baseline", arg]
    assert compose(*args).startswith(f"{key}: there is no '{value}'; ")


@pytest.mark.parametrize("arg", ["model={a: 1}", "model=[a]", "data=[[a]]"])
def test_a_group_is_no_value(compose: Any, arg: str) -> None:
    line = compose("recipe=baseline", arg)
    assert line.startswith(f"{arg.partition('=')[0]}: ")
    assert "is no choice of" in line


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('seeds: "0,1"', "seeds: '0,1' is no list (in {}); give whole numbers in brackets: [1,8]"),
        (
            "compare: [null]",
            "compare: null is nothing that this list holds (in {}); give [] for none, or pairs:"
            " [{{arm: ..., base: ..., on: [...]}}]",
        ),
    ],
)
def test_a_list_of_a_recipe_that_is_none(
    compose: Any, tmp_path: Path, setting: str, said: str
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"# Q?\ndefaults: [baseline]\n{setting}\n")
    assert compose("--recipe-dir", str(tmp_path), "recipe=mine") == said.format(recipe)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["metre", "--", "x"], "meter"),
        (["charge-back"], "chargeback"),
        (["histroy", "--root", "x"], "history"),
        (["distil", "seed=1"], "recipe=distill"),
    ],
)
def test_a_command_that_is_misspelt(compose: Any, words: list[str], meant: str) -> None:
    said = compose(*words, code=2)
    assert said == (
        f"{words[0]}: is no command and no setting; did you mean python -m pipeline {meant}?"
    )


@pytest.mark.parametrize("word", ["x", "training.steps=3", "distill", "seed"])
def test_a_word_that_is_near_no_command(compose: Any, word: str) -> None:
    assert "is no command" not in compose(word, code=1 if "=" in word else 2)


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("seeds=0,1,2", "'seeds=[0,1,2]'"),
        ("seeds.0=3", "'seeds=[3]'"),
        ("seeds=5", "'seeds=[5]'"),
        ("serving.batches=1,8", "'serving.batches=[1,8]'"),
        ("quality.tasks=a.yaml", "'quality.tasks=[a.yaml]'"),
        ("compare=null", "'null' is no list; give [] for none, or pairs: [{arm: ..., base: ..."),
        ("compare=1", "'1' is no list; give [] for none, or pairs: ["),
        ("compare=[null]", "null is nothing that this list holds; give [] for none, or pairs: ["),
        ("compare=[x]", "'x' is nothing that this list holds; give [] for none, or pairs: ["),
        ("seeds=[null]", "null is nothing that this list holds; give whole numbers in brackets"),
        ("quality.tasks=null", "'null' is no list; give texts in brackets: [a,b]"),
    ],
)
def test_a_list_without_its_brackets(compose: Any, arg: str, said: str) -> None:
    line = compose("recipe=baseline", arg)
    assert line.startswith(arg.partition("=")[0] + ": ")
    assert said in line


@pytest.mark.parametrize(
    ("word", "here_it_is"),
    [
        ("lr=1e-4", "training.learning_rate="),
        ("learning_rate=1", "training.learning_rate="),
        ("max_steps=5", "training.steps="),
        ("output_dir=/x", "tracking.root="),
        ("fp16=true", "precision=fp16"),
        ("bf16=True", "precision=bf16"),
        ("per_device_train_batch_size=8", "training.batch_size="),
        ("gradient_accumulation_steps=2", "training.gradient_accumulation="),
        ("warmup_ratio=0.1", "training.warmup"),
        ("model_name_or_path=gpt2", "model.path="),
        ("training.lr=1", "training.learning_rate="),
        ("dataset_name=x", "data.hub="),
        ("+lr=1", "training.learning_rate="),
        ("epochs=3", "training."),
        ("num_train_epochs=3", "training."),
        ("LR=3", "training.learning_rate="),
    ],
)
def test_other_trainers_words_are_known(compose: Any, word: str, here_it_is: str) -> None:
    assert f"it is {here_it_is}" in (elsewhere(word) or "")
    assert elsewhere("--" + word.lstrip("+").replace("_", "-")) == elsewhere(word)
    if word in ("lr=1e-4", "training.lr=1", "+lr=1"):
        assert f"it is {here_it_is}" in compose("recipe=baseline", word)
    if word == "lr=1e-4":
        assert f"it is {here_it_is}" in compose("recipe=baseline", "--lr", "3", code=2)


def test_what_other_trainers_words_lead_to_is_there() -> None:
    known = {*dotted_keys(Run), "training.epochs"}
    leads = {key.partition("=")[0] for key in OTHER_NAMES if not key.startswith("stages.")}
    assert leads <= known
    words = [word for words in OTHER_NAMES.values() for word in words]
    assert len(words) == len(set(words))


BIG = {
    "9" * 20: "seed",
    "1" + "0" * 400: "training.learning_rate",
    "-" + "9" * 30: "training.steps",
    "1e400": "budget.device_hours",
    "9" * 5000: "serving.load.prompt",
    "nan": "quality.margin",
    "-inf": "policy.alpha",
    "1" + "0" * 20: "stages.baseline.steps",
    "1" + "0" * 30: "hardware.num_threads",
}


@pytest.mark.parametrize("number", BIG)
def test_numbers_beyond_any_machine_are_refused(compose: Any, number: str) -> None:
    assert compose("recipe=baseline", f"{BIG[number]}={number}").startswith(f"{BIG[number]}: ")


@pytest.mark.parametrize(
    "arg",
    [
        f"seeds=[{2**32}]",
        f"seeds=[0,{10**30}]",
        f"serving.batches=[{10**30}]",
        f"student.config={{a: [{10**30}]}}",
        "student.config={a: nan}",
    ],
)
def test_numbers_in_lists_too(compose: Any, arg: str) -> None:
    assert compose("recipe=distill", arg).startswith(arg.partition("=")[0])


def test_the_largest_seed_is_one(compose: Any) -> None:
    import numpy as np
    import torch

    (run,) = compose("recipe=baseline", f"seed={2**32 - 1}")
    torch.manual_seed(run.seed)
    np.random.seed(run.seed)
    assert "seed: " in compose("recipe=baseline", f"seed={2**32}")


@pytest.mark.parametrize("arg", ["~x", "~tracking", "~training.steps", "~", "~~", "~a=b"])
def test_nothing_is_deleted(arg: str) -> None:
    with pytest.raises(UserError, match="a ~ deletes a setting"):
        check_words([arg])


@pytest.mark.parametrize(
    "text", ["${nope}", "${model.name}", "${training.steps}", "${oc.env:NOPE}", "${a", "${oc.x:1}"]
)
def test_what_leads_nowhere_is_one_line(compose: Any, text: str) -> None:
    line = compose("recipe=baseline", f"training.steps={text}", code=2 if text == "${a" else 1)
    assert line.startswith("training.steps")
    assert "crashed" not in line


@pytest.mark.parametrize(
    "arg", ["model.path.x=3", "seed.x=1", "training.steps.0=1", "tracking.team.a.b=1"]
)
def test_a_setting_below_a_value_is_no_setting(compose: Any, arg: str) -> None:
    assert "has no settings of its own" in compose("recipe=baseline", arg)


@pytest.mark.parametrize(
    "arg",
    [
        f"data.path={'x' * 5000}",
        f"--recipe-dir={'x' * 5000}",
        "data.path=/dev/null/x",
        "data.path=a\0b",
        f"stages.baseline.steps={'9' * 5000}",
    ],
)
def test_places_that_no_disk_takes_are_one_line(compose: Any, arg: str) -> None:
    line = compose("recipe=baseline", arg)
    assert line.startswith(arg.partition("=")[0])
    assert "crashed" not in line


@pytest.mark.parametrize(
    "given",
    [
        ["recipe=distill", "stages.student=null"],
        ["recipe=release_check", "stages.candidate=null", "candidate=a", "baseline=b"],
        ["recipe=baseline", "stages.baseline=null", "~stages.baseline"],
    ],
)
def test_what_stands_among_the_stages_and_is_none_is_refused(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given, started_ns=0, execute=lambda *_: 0) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refused: stages.")


def test_a_stage_that_a_recipe_forgets_to_place_is_refused_with_the_line_to_add(
    tmp_path: Path,
) -> None:
    text = (
        "# Is it?\ndefaults:\n  - /stage@stages.x: train\nprimary_arm: x\nstages: {y: {steps: 7}}\n"
    )
    (tmp_path / "mine.yaml").write_text(text)
    done = here(tmp_path, "--recipe-dir", str(tmp_path), "recipe=mine")
    assert done.returncode == 1
    assert done.stderr.startswith("refused: stages.y: has no type; add /stage@stages.y: ")


@pytest.mark.parametrize("name", ["student-1", "лектор", "1st"])
def test_a_name_that_is_none_for_a_stage_says_what_is(tmp_path: Path, name: str) -> None:
    text = f"# Is it?\ndefaults:\n  - /stage@stages.{name}: train\nprimary_arm: x\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    done = here(tmp_path, "--recipe-dir", str(tmp_path), "recipe=mine")
    assert done.returncode == 1
    assert "is no name for a stage; use English letters" in done.stderr
