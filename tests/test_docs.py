"""README.md and docs/ tell the truth: commands are read from the pages and run, names of settings
exist, the reference is whole, and the site builds with every link leading somewhere.

By default a command of a recipe is composed and checked as far as a run is before its device is
touched; other commands run. `-m slow` runs recipes too, at toy size.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from few import few
from make_assess_models import LABELS, SHAPE, saved, tiny
from make_golden import COMMON, GIVEN, WITHOUT
from pages import NEEDS, PROGRAM, ROOT, SHELL, Command, blocks, code_spans, commands, files_of_pages

from pipeline.cli.commands import COMMANDS
from pipeline.cli.main import main
from pipeline.cli.recipes import find_recipes
from pipeline.config.settings.model import TinyShape
from pipeline.config.settings.run import Run
from pipeline.ledger.metrics import CATALOGUE
from pipeline.stages.table import STAGES
from pipeline.tasks.table import Task

sys.path.append(str(ROOT / "docs"))
reference = importlib.import_module("make_reference")

LEFT_TO_OTHERS = ("pip", "python", ".", "git", "make", "#SBATCH", "scontrol", "exit", "if")
"""First words of commands that are not ours; `check_other` says what is checked of them."""
Build = Callable[..., tuple[subprocess.CompletedProcess[str], Path]]
VERDICTS = {"release_check": (0, 3, 4, 5), "selftest": (0, 3, 5), "history": (0, 3)}
"""Exit codes of commands whose answer depends on the machine that a test runs on."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder with all that the pages' commands name: models, data, recipes, a metered run."""
    cwd = tmp_path_factory.mktemp("pages")
    deep = TinyShape(
        hidden_size=SHAPE.hidden_size,
        layers=4,
        heads=SHAPE.heads,
        intermediate_size=SHAPE.intermediate_size,
    )
    for name, task, shape in (
        ("my-model", Task.causal_lm, deep),
        ("my-student", Task.causal_lm, SHAPE),
        ("my-encoder", Task.sequence_classification, deep),
        ("my-small-encoder", Task.sequence_classification, SHAPE),
    ):
        saved(tiny(task, shape=shape), cwd / name)
    texts = [f"the {number} words of a text, {number * 7} in all" for number in range(60)]
    write_rows(cwd / "my.jsonl", [{"text": text, "author": text[4]} for text in texts])
    write_rows(cwd / "test.jsonl", [{"text": text} for text in texts])
    for name in ("corpus/train", "corpus/held_out", "corpus/test"):
        rows = [{"text": f"{name} {text}"} for text in texts]
        write_rows(cwd / f"{name}.jsonl", rows)
    answers = [{"asked": f"how many, {text}?", "answered": text[4:6]} for text in texts]
    write_rows(cwd / "qa.jsonl", answers)
    written = [{"prompt": f"more of {text}", "completion": " so on"} for text in texts]
    write_rows(cwd / "written.jsonl", written)
    labelled = [{"text": text, "label": LABELS[at % 3]} for at, text in enumerate(texts)]
    write_rows(cwd / "reviews/train.jsonl", labelled)
    stars = [f'"{row["text"]}",{row["label"]}' for row in labelled]
    (cwd / "reviews.csv").write_text("\n".join(["body,stars", *stars]))
    question = {"question": "What is the capital of Italy?", "choices": ["Rome", "Oslo"]}
    write_rows(cwd / "capitals.jsonl", [{**question, "answer": 0}])
    (cwd / "train.py").write_text("print('trained')\n")
    for name, text in files_of_pages().items():
        (cwd / name).parent.mkdir(parents=True, exist_ok=True)
        (cwd / name).write_text(text)
    (cwd / "mlruns").mkdir()
    shutil.copy(empty_store, cwd / "mlruns/mlflow.db")
    done = forked.run(cwd, "meter", "--no-mlflow", "--", sys.executable, "train.py")
    assert done.returncode == 0, done.stderr
    return cwd


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write a file of JSON lines, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- what is put in the place of what a test has not -----------------------------------------------


def here_instead(command: Command, cwd: Path) -> list[str]:
    """Return a command's words with what this machine has in the place of what it needs."""
    words = [re.sub(r"^(hardware\.devices)=\d+$", r"\1=2", word) for word in command.words]
    if command.needs == "hub":
        classifies = any("sequence_classification" in word for word in words)
        local = {
            "model.path": "my-encoder" if classifies else "my-model",
            "student.path": "my-small-encoder" if classifies else "my-student",
        }
        words = [
            f"{key}={local[key]}" if (key := word.partition("=")[0]) in local else word
            for word in words
        ]
        words = [re.sub(r"^data\.hub=.*", "data.path=my.jsonl", word) for word in words]
        words = [word for word in words if not word.startswith("model.revision=")]
    if command.needs == "gpu":
        words = [word for word in words if not word.startswith("hardware")]
        words += ["hardware.device=cpu"] if any("recipe=" in word for word in words) else []
    if command.needs == "server":
        store = f"sqlite:///{cwd}/server.db"
        words = [re.sub(r"http://127\.0\.0\.1:\d+", store, word) for word in words]
    return words


def at_toy_size(words: list[str]) -> list[str]:
    """Return a recipe's words with the sizes of golden runs in the place of its own."""
    recipe = next(word.partition("=")[2] for word in words if word.startswith("recipe="))
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    leave = list(WITHOUT.get(recipe, ()))
    leave += ["model.shape", "data.vocabulary_size"] if "model.path" in given else []
    leave += ["data.path"] if {"data.path", "data"} & given.keys() else []
    leave += ["training.steps"] if "training.epochs" in given else []
    leave += ["tracking"] if recipe == "release_check" or "tracking.uri" in given else []
    leave += [key for key, value in given.items() if key.endswith(".steps") and value == "0"]
    leave += [word.removeprefix("~") for word in given if word.startswith("~")]
    sizes = [*COMMON, *GIVEN.get(recipe, []), "seeds=[0]"]
    only_if_given = ("seeds", "stages.quantized")
    sizes = [
        size
        for size in sizes
        if not size.startswith(tuple(leave))
        and (
            not size.startswith(only_if_given)
            or (key := size.partition("=")[0]) in given
            or key.endswith(".steps")
        )
    ]
    untaught = "task" in given or given.get("stages.teacher.steps") == "0"
    if recipe == "distill" and untaught:  # in so few steps the teacher is no better
        sizes.append("stages.student.allow_weak_teacher=true")
    ours = {size.partition("=")[0] for size in sizes}
    return [word for word in words if word.partition("=")[0] not in ours] + sizes


def composed(words: list[str], cwd: Path) -> str:
    """Return what refuses a command of a recipe before a device is touched, or nothing."""
    said, nothing = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(nothing),
    ):
        code = main(words, started_ns=0, execute=lambda *_: 0)
    return said.getvalue() if code else ""


def refusal(command: Command, cwd: Path) -> str:
    """Return what is wrong with a command, or nothing."""
    words = here_instead(command, cwd)
    if not command.is_ours:
        return check_other(words)
    if not words or words[0] not in COMMANDS:
        return composed(words, cwd)
    if words[0] == "selftest":
        return selftest_refusal(words[1:], cwd)
    done = forked.run(cwd, *unmarked(words))
    expected = VERDICTS.get(words[0], (0,))
    nothing_yet = any(
        words[0] == name and said in done.stderr
        for name, said in (
            ("history", "no verdict names"),
            ("verify", "there is no such file"),
            ("verify", "--store: there is no folder"),
        )
    )
    return "" if done.returncode in expected or nothing_yet else done.stderr


def unmarked(words: list[str]) -> list[str]:
    """Return a command that needs no second: a meter without MLflow, and this Python."""
    if words[0] != "meter" or "--" not in words:
        return words
    at = words.index("--")
    return ["meter", "--no-mlflow", *words[1:at], "--", sys.executable, "train.py"]


def selftest_refusal(words: list[str], cwd: Path) -> str:
    """Return what refuses the settings of a self-test, its release check's and its training's."""
    own = dict(word.partition("=")[::2] for word in words)
    model = own.pop("model")
    told = {name: own.pop(name, "") for name in ("n", "repeats", "root", "train")}
    given = [f"{key}={value}" for key, value in own.items()]
    gate = ["recipe=release_check", f"candidate={model}", f"baseline={model}", *given]
    return composed(gate, cwd) + (composed(told["train"].split(), cwd) if told["train"] else "")


def check_other(words: list[str]) -> str:
    """Return what is wrong with a command of another program, or nothing."""
    first, rest = words[0], words[1:]
    if first == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        return done.stderr
    if first == "bash" and rest[0].endswith(".sh"):
        script = ROOT / rest[0]
        source = script.read_text() if script.is_file() else ""
        missing = [word for word in rest[1:] if word.startswith("--") and word not in source]
        return "" if source and not missing else f"{rest[0]}: {missing or 'no such file'}"
    if first == "python" and rest[0].endswith(".py"):
        script = ROOT / rest[0]
        source = script.read_text() if script.is_file() else ""
        flags = [word.partition("=")[0] for word in rest[1:] if word.startswith("--")]
        missing = [flag for flag in flags if f'"{flag}"' not in source]
        return "" if source and not missing else f"{rest[0]}: {missing or 'no such file'}"
    is_known = first in LEFT_TO_OTHERS or re.fullmatch(r"\w+=.*", first)
    return "" if is_known else f"{first}: a command that no test looks at"


# -- the commands of the pages ---------------------------------------------------------------------

UNIQUE = list({(command.is_ours, command.words): command for command in commands()}.values())
RECIPES = [
    each
    for each in UNIQUE
    if each.words[:1] == ("selftest",)
    or (each.words[:1] != ("launch",) and any(word.startswith("recipe=") for word in each.words))
]


@pytest.fixture(autouse=True)
def _a_program_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline"])


@pytest.mark.parametrize(
    "command",
    [
        *(each for each in UNIQUE if each.page == "README.md"),
        *few([each for each in UNIQUE if each.page != "README.md"], 20),
    ],
    ids=str,
)
def test_a_command_of_a_page_is_accepted(command: Command, folder: Path) -> None:
    assert refusal(command, folder) == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=distill", "training.stepz=5"], "did you mean training.steps?"),
        (["recipe=distil"], "did you mean distill?"),
        (["recipe=distill", "data.path=no-such-file.jsonl"], "does not exist"),
        (["meter", "--nome", "x", "--", "python", "train.py"], "--nome"),
        (["selftest", "model=latest", "polici=smoke"], "polici"),
    ],
)
def test_a_command_with_a_typo_is_not(words: list[str], said: str, folder: Path) -> None:
    assert said in refusal(Command("a page", 1, "", True, tuple(words)), folder)


def test_commands_of_other_programs_are_looked_at() -> None:
    other = Command("a page", 1, "", False, ("make", "demoo"))
    assert "demoo" in refusal(other, ROOT)
    assert "no such file" in check_other(["python", "benchmarks/nothing.py"])
    assert check_other(["python", "benchmarks/startup.py", "--wrong"])
    assert check_other(["bash", "benchmarks/nothing.sh"])
    assert check_other(["bash", "benchmarks/on_gpu.sh", "--wrong"])
    assert "no test looks at" in check_other(["curl", "x"])


def test_no_command_hides_from_the_test() -> None:
    lines = [
        (block.page, line)
        for block in blocks()
        if block.language not in SHELL
        for line in block.text.splitlines()
        if line.startswith(" ".join(PROGRAM))
    ]
    assert lines == []
    assert {block.needs for block in blocks()} <= {"", *NEEDS}
    assert len(RECIPES) > 30, "the pages are read"


@pytest.mark.parametrize(
    "block", [block for block in blocks() if block.needs == "scheduler"], ids=lambda each: each.page
)
def test_a_job_file_is_shell(block: object) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def released(folder: Path) -> str:
    """The run whose model is the first champion: what `latest` is, before other commands run."""
    done = forked.run(folder, *at_toy_size(["recipe=baseline", "tracking.uri=null"]))
    assert done.returncode == 0, done.stderr
    run_id = (folder / "mlruns/latest").resolve().name
    first = [f"candidate={run_id}", "baseline=models:/student@champion", "bootstrap=true"]
    done = forked.run(folder, *at_toy_size(["recipe=release_check", *first, "promote=true"]))
    assert done.returncode == 0, done.stderr
    return run_id


@pytest.mark.slow
@pytest.mark.parametrize("command", RECIPES, ids=str)
def test_a_recipe_of_a_page_runs(command: Command, folder: Path, released: str) -> None:
    words = here_instead(command, folder)
    words = [re.sub(r"^(candidate|model)=latest$", rf"\1={released}", word) for word in words]
    words = [
        re.sub(r"^candidate=models:/student/\d+$", "candidate=models:/student/1", word)
        for word in words
    ]
    if words[0] == "selftest":
        toy = " ".join(size for size in at_toy_size(["recipe=baseline"]) if size != "tracking=off")
        words = [f"train={toy}" if word.startswith("train=") else word for word in words]
        words += ["n=3", "policy.load.new=2", "policy.blocks=2"]
    else:
        words = at_toy_size(words)
    done = forked.run(folder, *words, timeout=500)
    recipe = next((word.partition("=")[2] for word in words if word.startswith("recipe=")), "")
    assert done.returncode in VERDICTS.get(recipe or words[0], (0,)), done.stdout + done.stderr


# -- names, reference, site ------------------------------------------------------------------------


def known_keys() -> set[str]:
    """Return every setting; a stage's are `stages.NAME.x`."""
    found = {setting.key for setting in reference.settings_of(Run)}
    for stage in STAGES.values():
        found |= {setting.key for setting in reference.settings_of(stage, "stages.NAME.")}
    return found


def is_known(key: str, known: set[str]) -> bool:
    """Return whether a setting exists; `training.*` and `serving.load` name those below them."""
    key = re.sub(r"^stages\.\w+", "stages.NAME", key).removesuffix("*").rstrip(".")
    parts = key.split(".")
    by_name = [".".join([*parts[:at], "KEY", *parts[at + 1 :]]) for at in range(len(parts))]
    return any(
        each in known or any(other.startswith(f"{each}.") for other in known)
        for each in (key, *by_name)
    )


def test_settings_that_pages_name_exist() -> None:
    known = known_keys()
    groups = {key.partition(".")[0] for key in known}
    named = [
        (page, found[1])
        for page, span in code_spans()
        if (found := re.fullmatch(r"~?([a-z_]+(?:\.[\w*]+)+\.?)(?:=.*)?", span))
        and found[1].partition(".")[0] in groups
        and not span.endswith(".jsonl")
    ]
    assert len(named) > 50, "the pages are read"
    assert [each for each in named if not is_known(each[1], known)] == []
    assert not is_known("training.stepz", known)
    assert not is_known("stages.student.tempratur", known)


def test_recipes_and_commands_that_pages_name_exist() -> None:
    recipes = {*find_recipes([]), "NAME", "short", ""}
    wrong = [
        (page, span)
        for page, span in code_spans()
        for name in re.findall(r"\brecipe=([\w]*)", span)
        if name not in recipes
    ]
    wrong += [
        (page, span)
        for page, span in code_spans()
        if (found := re.match(r"python -m pipeline ([a-z]+)(?: |$)", span))
        and found[1] not in COMMANDS
    ]
    assert wrong == []


def test_the_readme_lists_every_recipe() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in find_recipes([]) if f"| `{name}` |" not in text] == []


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_reference_names_every_setting_with_its_meaning() -> None:
    page = reference.settings_page()
    assert [key for key in known_keys() if f"| `{key}` |" not in page] == []
    unexplained = [
        setting.key
        for cls, prefix in [(Run, ""), *((stage, "stages.NAME.") for stage in STAGES.values())]
        for setting in reference.settings_of(cls, prefix)
        if not setting.meaning
    ]
    assert unexplained == []


def test_the_reference_has_types_defaults_and_ranges() -> None:
    found = {setting.key: setting for setting in reference.settings_of(Run)}
    fraction = found["training.warmup_fraction"]
    assert (fraction.type, fraction.default) == ("number", "`0.05`")
    assert (fraction.range, fraction.meaning) == ("at least 0, at most 1", "of the steps")
    assert found["training.epochs"].type == "number, or null"
    assert found["training.epochs"].default == "null"
    assert found["promote"].default == "false"
    assert found["seed"].default == "`0`"
    assert found["serving.blocks"].range == "at least 2"
    assert "steps between validation readings" in found["training.eval_every"].meaning
    assert "policy.metrics.KEY.margin" in found


def test_the_reference_names_every_figure() -> None:
    page = reference.metrics_page()
    assert [metric.key for metric in CATALOGUE if f"| `{metric.key}` |" not in page] == []
    assert [metric.key for metric in CATALOGUE if not metric.unit or not metric.meaning] == []


def test_the_reference_names_every_command_and_exit_code() -> None:
    page = reference.commands_page()
    assert [name for name in COMMANDS if f"## {name}\n" not in page] == []
    assert [code for code in reference.Exit if f"| {int(code)} |" not in page] == []
    assert set(reference.EXITS) == set(reference.Exit)


def test_the_glossary_defines_the_terms_that_reports_use() -> None:
    text = (ROOT / "docs/glossary.md").read_text()
    terms = "ABBA block, Arm, Artifact, Censored, Control, Device-hour, Ledger, Payback, Recipe"
    missing = [term for term in f"{terms}, Stage, Unit".split(", ") if f"### {term}\n" not in text]
    assert missing == []
    assert "### Look (interim analysis)\n" in text


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build the site from a copy of the project's pages, with text added to one of them."""
    pytest.importorskip("mkdocs")

    def build(page: str = "", text: str = "") -> tuple[subprocess.CompletedProcess[str], Path]:
        cwd = tmp_path_factory.mktemp("site")
        shutil.copytree(ROOT / "docs", cwd / "docs", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("mkdocs.yml", *reference.FROM_ROOT, "recipes", "configs", "pipeline"):
            (cwd / name).symlink_to(ROOT / name)
        if page:
            path = cwd / "docs" / page
            path.write_text((path.read_text() if path.exists() else "") + text)
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict"],
            cwd=cwd,
            env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done, cwd / "site"

    return build


def test_the_site_builds_and_every_link_leads_somewhere(build: Build) -> None:
    done, site = build()
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stderr
    for name in ("index", "reference/settings/index", "reference/metrics/index", "faq/index"):
        assert (site / f"{name}.html").is_file()
    assert not list(site.rglob("*.py"))
    faq = (site / "faq/index.html").read_text()
    first = re.search(r"<h2[^>]*>([^<]*)", faq)
    assert first is not None
    assert "run any faster after I compress it" in first[1]


@pytest.mark.slow
def test_a_link_to_nowhere_or_a_page_outside_of_the_navigation_is_an_error(build: Build) -> None:
    done, _ = build("stray.md", "# Stray\n[x](nowhere.md) [y](choose.md#nowhere)\n")
    assert done.returncode != 0
    for said in (
        'not included in the "nav"',
        "a link 'nowhere.md'",
        "not contain an anchor '#nowhere'",
    ):
        assert said in done.stderr


def test_links_of_the_readme_lead_to_files() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)(#[^)]*)?\)", text)
    assert len(links) > 15
    assert [path for path, _ in links if not (ROOT / path).exists()] == []
