"""lm-eval tasks on local files, beside lm-eval's own evaluation of the same model and in a run."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from here import here, result_in
from make_assess_models import byte_tokenizer, tiny
from reports import whole_report
from test_run import TINY

from pipeline.config.settings.quality import QualityConfig
from pipeline.errors import StageFailed, UserError
from pipeline.evaluation.quality.tasks import (
    SEED,
    Asked,
    TaskFile,
    _scores,
    check_lengths,
    check_tasks,
    identity,
    read_tasks,
    run_tasks,
    try_tasks,
)
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.tasks.table import Task

CHOICES = {
    "task": "capitals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "capitals.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "brier_score", "mcc")],
}
WRITES = {
    "task": "echo",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "echo.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 3, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "upper case", "filter": [{"function": "uppercase"}, {"function": "take_first"}]},
    ],
}
CITIES = ["Rome", "Oslo", "Lima", "Cairo", "Paris", "Quito", "Bern", "Dhaka"]


def questions(number: int = 24) -> list[dict[str, Any]]:
    """Return questions whose choices differ in length, so that acc_norm is another figure than
    acc.
    """
    return [
        {
            "question": f"what lies at {place}?",
            "answer": place % 3,
            "choices": [CITIES[(place + k * k) % 8] * (1 + (place + k) % 3) for k in range(3)],
        }
        for place in range(number)
    ]


def write(
    folder: Path, settings: dict[str, Any], rows: list[Any] | None = None, **changed: Any
) -> str:
    """Write a task file, and its data where there are `rows`; return its path."""
    settings = {**settings, **changed}
    if rows is not None:
        (folder / f"{settings['task']}.jsonl").write_text(
            "".join(f"{json.dumps(row)}\n" for row in rows)
        )
    path = folder / f"{settings['task']}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def config_of(*paths: str) -> QualityConfig:
    return QualityConfig(tasks=list(paths), batch_size=4, bootstrap=200)


# -- reading and refusing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (b"a: [", "is no YAML"),
        (b"- acc", "has no task"),
        (b"output_type: multiple_choice", "has no task"),
        (b"task: [one, two]", "is no name of one task"),
        (b"task: a/b", "is no name of one task"),
        (b"task: x\ndoc_to_text: !function utils.ask", "a task file runs no code"),
        (b"task: x\ninclude: x.yaml", "includes itself"),
        (b"task: x\ninclude: 3", "names no files"),
        (b"task: x\ninclude: gone.yaml", "gone.yaml does not exist"),
    ],
)
def test_what_is_no_task_file_is_refused(text: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=said) as refused:
        read_tasks(config_of(str(path)))
    assert refused.value.key == "quality.tasks"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dataset_path": "cais/mmlu"}, "dataset_path: cais/mmlu, which is not on this machine"),
        ({"dataset_path": None}, "dataset_path: None"),
        ({"dataset_kwargs": {}}, "names no data_files"),
        (
            {"dataset_kwargs": {"data_files": {"test": "https://example.org/x.json"}}},
            "there is no data file https",
        ),
        ({"dataset_kwargs": {"data_files": {"test": 3}}}, "data_files: 3 names no files"),
        ({"unsafe_code": True}, "runs what the model writes"),
        ({"use_prompt": "promptsource:x"}, "takes its prompt from elsewhere"),
        ({"metric_list": [{"metric": "bertscore", "hf_evaluate": True}]}, "which is downloaded"),
        ({"metric_list": ["acc"]}, "lists no metrics"),
    ],
)
def test_what_is_not_here_or_runs_code_is_refused_without_lm_eval(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        read_tasks(config_of(write(tmp_path, CHOICES, questions(), **changed)))


def test_names_stand_once_and_only_language_models_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, CHOICES, questions())
    check_tasks(config_of(path), Task.causal_lm)
    with pytest.raises(UserError, match="two files are named task: capitals"):
        read_tasks(config_of(path, path))
    with pytest.raises(UserError, match="not for sequence_classification"):
        check_tasks(config_of(path), Task.sequence_classification)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs lm-eval.*pip install 'model-efficiency-pipeline\[eval\]'"
    ):
        check_tasks(config_of(path), Task.causal_lm)
    check_tasks(QualityConfig(), Task.sequence_classification)  # nothing is asked for


def test_a_digest_follows_settings_and_data_and_not_where_they_lie(tmp_path: Path) -> None:
    near, there = tmp_path / "near", tmp_path / "there"
    near.mkdir()
    there.mkdir()

    def read(*args: Any, **changed: Any) -> TaskFile:
        return read_tasks(config_of(write(*args, **changed)))[0]

    first = read(near, CHOICES, questions(), metadata={1: "a", "b": 2})
    assert first.settings["dataset_kwargs"]["data_files"] == {
        "test": [str(near / "capitals.jsonl")]
    }
    assert read(there, CHOICES, questions(), metadata={"b": 2, 1: "a"}).digest == first.digest
    assert read(there, CHOICES, questions(23), metadata={1: "a", "b": 2}).digest != first.digest
    assert (
        read(near, CHOICES, metadata={1: "a", "b": 2}, doc_to_text="{{question}}").digest
        != first.digest
    )


def test_an_include_is_merged_under_the_file_and_counts_in_its_digest(tmp_path: Path) -> None:
    whole = read_tasks(config_of(write(tmp_path, CHOICES, questions())))[0]
    (tmp_path / "below.yaml").write_text(yaml.safe_dump({**CHOICES, "task": "other"}))
    (tmp_path / "mine.yaml").write_text("include: below.yaml\ntask: capitals\n")
    merged = read_tasks(config_of(str(tmp_path / "mine.yaml")))[0]
    assert (merged.name, merged.digest, merged.settings) == (
        "capitals",
        whole.digest,
        whole.settings,
    )
    (tmp_path / "below.yaml").write_text(yaml.safe_dump({**CHOICES, "num_fewshot": 1}))
    assert read_tasks(config_of(str(tmp_path / "mine.yaml")))[0].digest != whole.digest


def test_an_assessment_without_tasks_keeps_its_key(tmp_path: Path) -> None:
    assert identity(QualityConfig()) == {}
    path = write(tmp_path, CHOICES, questions())
    assert identity(config_of(path))["tasks"] == [read_tasks(config_of(path))[0].digest]


# -- tried before anything is trained -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"doc_to_text": "{{gone}}"}, "'gone' is undefined"),
        ({"doc_to_text": "{{question.__class__.__mro__}}"}, "access to attribute '__class__'"),
        ({"test_split": "validation"}, "lm-eval cannot run task capitals"),
        ({"output_type": "sings"}, "Got invalid output_type"),
        ({"num_fewshot": 99, "fewshot_split": "test"}, "lm-eval cannot run task capitals"),
        ({"metric_list": [{"metric": "script.py"}]}, "lm-eval has no metric 'script.py'"),
        (
            {"filter_list": [{"name": "x", "filter": [{"function": "custom", "filter_fn": "f"}]}]},
            "not callable",
        ),
        ({"doc_to_target": "{{answer + 7}}"}, "lm-eval cannot run task capitals"),
    ],
)
def test_what_lm_eval_cannot_run_is_refused_before_training(
    changed: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("raise SystemExit('a metric ran code')")
    with pytest.raises(UserError, match=said):
        try_tasks(config_of(write(tmp_path, CHOICES, questions(), **changed)))


def test_a_task_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lm-eval cannot run task capitals"):
        try_tasks(config_of(write(tmp_path, CHOICES, [])))


def test_what_would_be_cut_is_refused_at_the_token_that_is_too_many(tmp_path: Path) -> None:
    config = config_of(write(tmp_path, WRITES, [{"text": "ten bytes.", "answer": "x"}]))
    asked = try_tasks(config)
    assert asked == {"echo": [Asked("ten bytes.", 3)]}
    check_lengths(asked, byte_tokenizer(), 13)
    check_lengths(asked, byte_tokenizer(), None)
    with pytest.raises(UserError, match=r"task echo takes up to 13 tokens.* the model reads 12"):
        check_lengths(asked, byte_tokenizer(), 12)
    scored = {"capitals": [Asked("ten bytes.", 0)]}  # the last token is predicted and never read
    check_lengths(scored, byte_tokenizer(), 9)
    with pytest.raises(UserError, match="task capitals takes up to 9 tokens"):
        check_lengths(scored, byte_tokenizer(), 8)


# -- beside lm-eval itself ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, QualityConfig, dict[str, Any], Any]:
    """A tiny model, two tasks, what this project makes of them and what lm-eval's own entry point
    does.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    model, tokenizer = tiny(Task.causal_lm).eval(), byte_tokenizer()
    texts = [f"document {place}" for place in range(21)]
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    written = [
        model.generate(row, max_new_tokens=3, do_sample=False)[0, row.shape[1] :] for row in ids
    ]
    answers = [tokenizer.decode(each, skip_special_tokens=True) for each in written]
    rows = [
        {"text": text, "answer": answer if place % 3 else "something else"}
        for place, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
    shots = {"num_fewshot": 2, "fewshot_split": "test"}
    config = config_of(write(folder, CHOICES, questions(), **shots), write(folder, WRITES, rows))
    ours = {scores.name: scores for scores in run_tasks(model, tokenizer, config)}
    theirs = lm_eval.simple_evaluate(
        HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=4,
            softmax_dtype="float32",
        ),
        tasks=[each.settings for each in read_tasks(config)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    return model, config, ours, theirs


def test_figures_are_lm_evals_own(asked: Any) -> None:
    _, _, ours, theirs = asked
    found = theirs["results"]
    choices, wrote = ours["capitals"].scores, ours["echo"].scores
    assert set(choices) == {"acc", "acc_norm"}
    for metric, values in choices.items():
        assert values.mean() == pytest.approx(found["capitals"][f"{metric},none"], abs=1e-12)
    assert found["capitals"]["acc,none"] != found["capitals"]["acc_norm,none"]
    assert set(wrote) == {"exact_match.whole", "exact_match.upper_case"}
    assert wrote["exact_match.whole"].mean() == pytest.approx(
        found["echo"]["exact_match,whole"], abs=1e-12
    )
    assert wrote["exact_match.upper_case"].mean() == pytest.approx(
        found["echo"]["exact_match,upper case"], abs=1e-12
    )
    assert wrote["exact_match.whole"].mean() == pytest.approx(14 / 21)


def test_documents_stand_in_the_order_and_with_the_answers_of_lm_eval(asked: Any) -> None:
    _, _, ours, theirs = asked
    samples = sorted(theirs["samples"]["capitals"], key=lambda sample: sample["doc_id"])
    assert ours["capitals"].scores["acc"].tolist() == [sample["acc"] for sample in samples]
    assert [digest.split("-")[0] for digest in ours["capitals"].digest] == [
        str(place) for place in range(24)
    ]
    assert len(set(ours["capitals"].digest)) == 24
    again = _scores("capitals", theirs)
    assert again.responses.tolist() == ours["capitals"].responses.tolist()
    assert again.digest.tolist() == ours["capitals"].digest.tolist()


def test_a_metric_that_is_no_mean_of_scores_is_left_out_with_its_reason(asked: Any) -> None:
    _, _, ours, theirs = asked
    assert ours["capitals"].left_out == dict.fromkeys(
        ("brier_score", "mcc"), "lm-eval keeps no score between 0 and 1 of each document"
    )
    lower = {**theirs, "higher_is_better": {"capitals": {"acc": False, "acc_norm": None}}}
    why = "lower is better, or lm-eval does not say that higher is"
    found = _scores("capitals", lower)
    assert (found.scores, found.left_out["acc"], found.left_out["acc_norm"]) == ({}, why, why)
    medians = {
        **theirs,
        "results": {"capitals": {"acc,none": 0.123, "acc_stderr,none": "N/A", "alias": "capitals"}},
    }
    found = _scores("capitals", medians)
    assert found.left_out == {"acc": "lm-eval's figure is not the mean of the documents' scores"}


def test_arms_that_were_asked_otherwise_share_no_document(asked: Any, tmp_path: Path) -> None:
    model, _, ours, _ = asked
    config = config_of(write(tmp_path, CHOICES, questions()))  # no examples in the prompt
    (other,) = run_tasks(model, byte_tokenizer(), config)
    assert not set(other.digest) & set(ours["capitals"].digest)


def test_a_model_without_finite_likelihoods_fails_and_a_long_prompt_is_refused(
    asked: Any, tmp_path: Path
) -> None:
    import copy

    model, config, _, _ = asked
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(
        StageFailed, match="task capitals: an answer to document 0 has no finite likelihood"
    ):
        run_tasks(broken, byte_tokenizer(), config_of(config.tasks[0]))
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = 12
    with pytest.raises(UserError, match=r"task echo takes up to 14 tokens.* the model reads 12"):
        run_tasks(short, byte_tokenizer(), config_of(config.tasks[1]))
    short.config.max_position_embeddings = 3  # no room for what is to be written
    with pytest.raises(StageFailed, match="lm-eval cannot ask the model: Invalid configuration"):
        run_tasks(short, byte_tokenizer(), config_of(config.tasks[1]))


def test_nothing_of_the_process_is_changed_and_no_network_is_touched(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub
    import lm_eval.utils

    model, config, _, _ = asked
    sampled = {"until": ["\n\n"], "max_gen_toks": 3, "do_sample": True, "temperature": 1.0}
    path = write(
        tmp_path,
        WRITES,
        [{"text": f"no {place}", "answer": "x"} for place in range(6)],
        generation_kwargs=sampled,
    )

    def state() -> tuple[Any, ...]:
        _, keys, *rest = np.random.get_state()
        offline = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
        return (
            random.getstate(),
            keys.tolist(),
            rest,
            torch.get_rng_state().tolist(),
            dict(os.environ),
            offline,
            lm_eval.utils.env,
        )

    def refuse(*args: Any) -> None:
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = state()
    try_tasks(config)
    (first,) = run_tasks(model, byte_tokenizer(), config_of(path))
    assert state() == before
    torch.manual_seed(SEED + 1)
    (second,) = run_tasks(model, byte_tokenizer(), config_of(path))
    assert second.responses.tolist() == first.responses.tolist()  # what is sampled is seeded
    assert not [name for name in os.listdir(tmp_path) if name not in ("echo.yaml", "echo.jsonl")]


# -- in a run -------------------------------------------------------------------------------------

RECIPE = """# Does a longer training answer better?
defaults:
  - /stage@stages.short: train
  - /stage@stages.long: train

stages:
  short: {steps: 2}
  long: {steps: 4}
primary_arm: long
compare:
  - {arm: long, base: short, on: [quality]}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, Any]]:
    """A run of two arms with a task whose metric is left out beside those that are not."""
    cwd = tmp_path_factory.mktemp("run")
    (cwd / "own").mkdir()
    (cwd / "own/longer.yaml").write_text(RECIPE)
    write(cwd, CHOICES, questions())
    texts = [
        f"document {place}: {CITIES[place % 8]} lies beside {CITIES[place * 5 % 7]}"
        for place in range(300)
    ]
    (cwd / "texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    # the recipe's stages have their own
    settings = [each for each in TINY if not each.startswith("training.steps")]
    command = [
        "--recipe-dir",
        str(cwd / "own"),
        "recipe=longer",
        *settings,
        "data.path=texts.jsonl",
        "quality.tasks=[capitals.yaml]",
        "tracking.mlflow=false",
    ]
    done = here(cwd, *command)
    assert done.returncode == 0, done.stderr
    return cwd, command, result_in(cwd)


def test_a_run_has_the_tasks_figures_with_intervals_and_documents(ran: Any) -> None:
    _, _, result = ran
    jsonschema.validate(result, RESULT_SCHEMA)
    for row in result["rows"]:
        assert {"task/capitals/acc", "task/capitals/acc_norm", "bits_per_byte"} <= set(
            row["quality"]
        )
        figure = row["quality"]["task/capitals/acc"]
        kept = [json.loads(line) for line in Path(figure["items"]).read_text().splitlines()]
        assert figure["n"] == len(kept) == 24
        assert figure["value"] == pytest.approx(sum(each["acc"] for each in kept) / 24)
        assert figure["ci"][0] < figure["value"] < figure["ci"][1]
        assert row["quality"]["task/capitals/mcc"]["why_missing"].startswith(
            "lm-eval keeps no score"
        )
        assert sum(row["ledger"]["phases_ns"].values()) == pytest.approx(
            row["ledger"]["wall_s"]["value"] * 1e9, abs=1
        )
    (pair,) = result["comparisons"]
    ours, theirs = (
        {
            each["digest"]: each["acc"]
            for each in map(
                json.loads,
                Path(row["quality"]["task/capitals/acc"]["items"]).read_text().splitlines(),
            )
        }
        for row in reversed(result["rows"])
    )
    compared = pair["quality"]["task/capitals/acc"]
    assert compared["value"] == pytest.approx(sum(ours[name] - theirs[name] for name in ours) / 24)
    assert (compared["n"], compared["margin"]) == (24, 0.01)
    assert "task/capitals/mcc" not in pair["quality"]
    manifest = json.loads(Path(result["rows"][0]["artifact"]["path"], "artifact.json").read_text())
    assert manifest["assessed"]["quality"]["task/capitals/acc"]["n"] == 24


def test_the_report_shows_tasks_and_names_them_whole(ran: Any) -> None:
    cwd, _, result = ran
    report = whole_report(cwd / "mlruns/latest")
    section = report.partition("## lm-eval tasks")[2].partition("\n## ")[0].replace("\\", "")
    value = result["rows"][0]["quality"]["task/capitals/acc"]["value"]
    assert f"| short | capitals | acc | {value:.4g} [" in section
    assert "| long | capitals | acc_norm | " in section
    assert "| short | capitals | mcc | -" in section
    assert "capitals: acc" in report.partition("## Comparisons")[2].partition("\n## ")[0]
    assert "`quality/task`" in report


def test_the_same_again_is_reused_and_another_task_is_assessed_without_training(ran: Any) -> None:
    cwd, command, first = ran
    assert here(cwd, *command).returncode == 0
    again = result_in(cwd)
    assert {row["reused"] for row in again["rows"]} == {first["run_id"]}
    assert again["comparisons"] == first["comparisons"]
    spent = {part: value["value"] for part, value in again["run"]["device_hours"].items()}
    assert (spent["work"], spent["assess"]) == (0, 0)
    write(cwd, CHOICES, questions(23))
    assert here(cwd, *command).returncode == 0
    changed = result_in(cwd)
    assessed = [row for row in changed["rows"] if row["reused"] is None]
    assert [row["quality"]["task/capitals/acc"]["n"] for row in assessed] == [23, 23]
    spent = {part: value["value"] for part, value in changed["run"]["device_hours"].items()}
    assert spent["work"] == 0 < spent["assess"]
    shutil.rmtree(cwd / "mlruns/runs" / changed["run_id"])
    items = Path(assessed[0]["quality"]["task/capitals/acc"]["items"])
    items.write_text(items.read_text().replace('"acc": 0', '"acc": 1', 1))
    assert here(cwd, *command).returncode == 0  # what was tampered with is assessed anew
    mended = [
        row for row in result_in(cwd)["rows"] if row["arm"] == "short" and row["reused"] is None
    ]
    assert [row["quality"]["task/capitals/acc"]["value"] for row in mended] == [
        assessed[0]["quality"]["task/capitals/acc"]["value"]
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["quality.tasks=[gone.yaml]"], "refused: quality.tasks: gone.yaml does not exist"),
        (
            ["quality.tasks=[capitals.yaml]", "task=sequence_classification"],
            "not for sequence_classification",
        ),
        (
            ["quality.tasks=[long.yaml]"],
            "takes up to 2304 tokens, written ones included, and the model reads 2048",
        ),
    ],
)
def test_a_run_is_refused_before_anything_is_written(
    more: list[str], said: str, tmp_path: Path
) -> None:
    write(tmp_path, CHOICES, questions())
    write(
        tmp_path,
        WRITES,
        [{"text": "a b c", "answer": "x"}] * 2,
        task="long",
        dataset_kwargs={"data_files": {"test": "long.jsonl"}},
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 2299},
    )
    (tmp_path / "texts.jsonl").write_text(
        "".join(f"{json.dumps({'text': f'text {place}'})}\n" for place in range(90))
    )
    done = here(
        tmp_path, "recipe=baseline", *TINY, "data.path=texts.jsonl", "tracking.mlflow=false", *more
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("mlruns/runs/*"))
