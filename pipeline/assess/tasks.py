"""lm-eval tasks from local files (`quality.tasks`): what a model gets right, document by document.

A task is a YAML of lm-eval (github.com/EleutherAI/lm-evaluation-harness) whose data lie on this machine. lm-eval builds
the prompts, asks the model and scores; what is kept is each document's score, so that arms are compared in pairs like on
every other quality. Only what is a mean over documents of scores between 0 and 1, higher being better, is a figure here
(acc, acc_norm, exact_match, ...); any other metric of a task is null with the reason.

A task file runs no code of its own (`!function` is refused) and nothing is fetched: data from the hub, and metrics that
the `evaluate` library would download, are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.config import QualityConfig, Task
from pipeline.errors import StageFailed, UserError

if TYPE_CHECKING:
    import numpy as np

KEY = "quality.tasks"
READERS = ("json", "csv", "parquet", "text")  # of `datasets`: what reads local files
LOCAL = f"give dataset_path: {'|'.join(READERS)} and dataset_kwargs: {{data_files: ...}}"
FEWSHOT_SEED = 1234  # lm-eval's own default, so that examples in prompts are those of its command line
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
CLOSE = 1e-9  # between lm-eval's figure and the mean of the documents' scores


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task as its file describes it.

    Attributes:
        name: The file's `task`.
        settings: What lm-eval is given; includes are merged, paths of data absolute.
        digest: Over the settings and the contents of the data files, wherever they lie; 32 hex characters.
    """

    name: str
    settings: dict[str, Any]
    digest: str


@dataclass(frozen=True, slots=True)
class TaskScores:
    """What a model did on a task.

    Attributes:
        name: The task.
        digest: str (D,): by document, its number in the split and its content.
        responses: str (D,): by document, a digest of the model's answers: likelihoods, or what it wrote.
        scores: By metric, float64 (D,), between 0 and 1.
        left_out: By metric that is no such score, why.
    """

    name: str
    digest: np.ndarray
    responses: np.ndarray
    scores: dict[str, np.ndarray]
    left_out: dict[str, str]


# -- reading and refusing: without lm-eval ------------------------------------------------------------------------------


def check_tasks(config: QualityConfig, task: Task) -> None:
    """Refuse task files that cannot be run, before anything is loaded.

    Raises:
        UserError: Naming the file and what is wrong with it.
    """
    if not config.tasks:
        return
    if task is not Task.causal_lm:
        raise UserError(KEY, f"lm-eval tasks are not for {task.value}", "leave it out")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(KEY, "needs lm-eval, which is not installed", "pip install 'model-efficiency-pipeline[eval]'")
    read_tasks(config)


def read_tasks(config: QualityConfig) -> list[TaskFile]:
    """Return the tasks of `quality.tasks`.

    Raises:
        UserError: If a file is not to be read, is no task, or needs what is not on this machine.
    """
    found = [_read_task(Path(path).expanduser()) for path in config.tasks]
    names = [each.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(KEY, f"two files are named task: {twice}", "give each another name")
    return found


def identity(config: QualityConfig) -> dict[str, Any]:
    """Return what tasks add to an assessment's key: nothing without tasks, so that what was assessed stays so."""
    if not config.tasks:
        return {}
    return {"tasks": [each.digest for each in read_tasks(config)], "lm_eval": version("lm_eval")}


def _read_task(path: Path) -> TaskFile:
    settings = _with_includes(path)
    name = settings.get("task")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", name):
        problem = f"{path} has no task" if name is None else f"{path}: task: {name!r} is no name of one task"
        raise UserError(KEY, problem, "give a task file of lm-eval, with task: NAME (letters, digits, _, -, .)")
    _refuse_downloads(path, settings)
    kwargs = settings["dataset_kwargs"]
    files = _data_files(path, kwargs["data_files"])
    settings["dataset_kwargs"] = {**kwargs, "data_files": files}
    contents = {split: [_content(file) for file in each] for split, each in files.items()}
    described = {**settings, "dataset_kwargs": {**kwargs, "data_files": contents}}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return TaskFile(name, settings, digest)


def _with_includes(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a file, over those of the files that it includes."""
    if path.resolve() in including:
        raise UserError(KEY, f"{path} includes itself", "take out that include")
    settings = _load_yaml(path)
    if not isinstance(settings, dict):
        raise UserError(KEY, f"{path} has no task", "give a task file of lm-eval")
    below = settings.pop("include", [])
    merged: dict[str, Any] = {}
    for each in [below] if isinstance(below, str) else below:
        merged |= _with_includes(path.parent / each, (*including, path.resolve()))
    return merged | settings


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        problem = f"{path} cannot be read" if path.exists() else f"{path} does not exist"
        raise UserError(KEY, problem, "give task files of lm-eval: quality.tasks=[my_task.yaml]") from None
    except yaml.constructor.ConstructorError as error:
        problem = f"{path}: {error.problem or 'a tag that is not known'}"
        raise UserError(KEY, problem, "a task file runs no code: use templates in place of !function") from None
    except yaml.YAMLError:
        raise UserError(KEY, f"{path} is no YAML", "give a task file of lm-eval") from None


def _refuse_downloads(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what would be fetched, and what would run code."""
    where, kwargs = settings.get("dataset_path"), settings.get("dataset_kwargs")
    if where not in READERS:
        raise UserError(KEY, f"{path} has dataset_path: {where}, which is not on this machine", LOCAL)
    if not isinstance(kwargs, dict) or not kwargs.get("data_files"):
        raise UserError(KEY, f"{path} names no data_files", LOCAL)
    if settings.get("unsafe_code"):
        raise UserError(KEY, f"{path} runs what the model writes (unsafe_code)", "leave that task out")
    metrics = settings.get("metric_list") or []
    if any(isinstance(each, dict) and each.get("hf_evaluate") for each in metrics):
        raise UserError(KEY, f"{path} has a metric with hf_evaluate, which is downloaded", "use one of lm-eval's own")


def _data_files(path: Path, named: Any) -> dict[str, list[str]]:
    """Return the data files by split, absolute; relative ones lie beside the task file, else in the current folder."""
    by_split: dict[str, Any] = named if isinstance(named, dict) else {"train": named}
    found: dict[str, list[str]] = {}
    for split, files in by_split.items():
        found[str(split)] = []
        for file in [files] if isinstance(files, str) else files:
            near = [place for place in (path.parent / str(file), Path(str(file))) if place.is_file()]
            if not near:
                raise UserError(KEY, f"{path}: there is no data file {file}", "give a path beside the task file")
            found[str(split)].append(str(near[0].resolve()))
    return found


def _content(file: str) -> str:
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# -- running: with lm-eval ----------------------------------------------------------------------------------------------


def import_lm_eval() -> None:
    """Import lm-eval, which takes a second and more."""
    with _quietly():
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401


def try_tasks(config: QualityConfig) -> None:
    """Have lm-eval read the tasks and their data, and make every prompt's text once, before anything is trained.

    Raises:
        UserError: If it cannot.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from pyarrow import ArrowException

    # what templates, readers and lm-eval's own checks raise; UndefinedError is a TemplateError
    expected = (TemplateError, DatasetsError, ArrowException, ValueError, KeyError, TypeError, AttributeError,
                ArithmeticError, LookupError, AssertionError, NotImplementedError, OSError, RuntimeError)  # fmt: skip
    for each in read_tasks(config):
        try:
            with _quietly(), _loaded([each]) as loaded:
                task = loaded["tasks"][each.name]
                split = list(task.eval_docs)
                for doc in split:
                    task.doc_to_text(doc), task.doc_to_target(doc)
                    if task.OUTPUT_TYPE == "multiple_choice":
                        task.doc_to_choice(doc)
        except expected as error:
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(KEY, f"lm-eval cannot read task {each.name}: {why}", "see its task guide") from error
        if not split:
            raise UserError(KEY, f"task {each.name} has no document", "give data with documents")


def run_tasks(model: Any, tokenizer: Any, config: QualityConfig) -> list[TaskScores]:
    """Run the tasks of `quality.tasks` on a causal language model in memory.

    Log-probabilities are taken in fp32. The state of the process's random generators is left as it was.

    Raises:
        StageFailed: If an answer has no finite likelihood.
    """
    import torch

    tasks = read_tasks(config)
    with _quietly(), torch.random.fork_rng():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        asked: Any = HFLM(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=config.batch_size,
            softmax_dtype="float32",
        )  # fmt: skip
        with _loaded(tasks) as loaded:
            # not simple_evaluate, which spends a second on describing the machine that lm-eval runs on
            found: Any = lm_eval.evaluate(asked, loaded, bootstrap_iters=0, log_samples=True)
    return [_scores(each.name, found) for each in tasks]


@contextmanager
def _loaded(tasks: Sequence[TaskFile]) -> Generator[Any]:
    """Give lm-eval's tasks; what `datasets` makes of their files is gone afterwards."""
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as cache:
        specs: list[Any] = [
            {**each.settings, "dataset_kwargs": {**each.settings["dataset_kwargs"], "cache_dir": cache}}
            for each in tasks
        ]
        loaded: Any = TaskManager(include_defaults=False).load(specs)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        yield loaded


@contextmanager
def _quietly() -> Generator[None]:
    """Keep lm-eval from the network and from the terminal."""
    import datasets
    import huggingface_hub

    logger = logging.getLogger("lm_eval")
    level, had = logger.level, {name: os.environ.get(name) for name in OFFLINE}
    switches: list[tuple[Any, str]] = [  # what was imported before no longer reads the environment
        (datasets.config, "HF_HUB_OFFLINE"), (datasets.config, "HF_DATASETS_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
    ]  # fmt: skip
    before = [getattr(module, name) for module, name in switches]
    logger.setLevel(logging.ERROR)
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    for module, name in switches:
        setattr(module, name, True)
    try:
        # progress bars, which no setting turns off, go to stderr
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
        for name, value in had.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _scores(name: str, found: Mapping[str, Any]) -> TaskScores:
    import numpy as np

    samples: list[dict[str, Any]] = found["samples"][name]
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        by_filter.setdefault(sample["filter"], []).append(sample)
    scores: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    for metric, filtered, figure in _reported(found["results"][name]):
        key = re.sub(r"[^A-Za-z0-9_.-]", "_", metric if filtered == "none" else f"{metric}.{filtered}")
        values = [sample.get(metric) for sample in by_filter[filtered]]
        why = _why_no_score(values, figure, found["higher_is_better"][name].get(metric))
        if why is None:
            scores[key] = np.array(values, dtype=np.float64)
        else:
            left_out[key] = why
    first = next(iter(by_filter.values()))  # every filter has the same documents
    for sample in first:
        if _not_finite(sample["resps"]):
            raise StageFailed(f"task {name}: an answer to document {sample['doc_id']} has no finite likelihood")
    return TaskScores(
        name=name,
        digest=np.array([f"{sample['doc_id']}-{sample['doc_hash'][:32]}" for sample in first]),
        responses=np.array([_short_hash(sample["resps"]) for sample in first]),
        scores=scores,
        left_out=left_out,
    )


def _reported(results: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield metric, filter and figure of what lm-eval reports of a task."""
    for name, figure in results.items():
        metric, comma, filtered = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filtered, figure


def _why_no_score(values: Sequence[Any], figure: Any, higher_is_better: bool | None) -> str | None:
    """Return why values by document do not make a figure that arms can be compared on; None where they do."""
    import numpy as np

    if not all(isinstance(value, int | float | np.number) and 0 <= value <= 1 for value in values):
        return "lm-eval keeps no score between 0 and 1 of each document"
    if not abs(float(np.mean(values)) - float(figure)) <= CLOSE:
        return "lm-eval's figure is not the mean of the documents' scores"
    return None if higher_is_better else "lower is better, or lm-eval does not say that higher is"


def _not_finite(responses: Any) -> bool:
    """Whether a number anywhere in nested responses is not finite."""
    if isinstance(responses, list | tuple):
        return any(_not_finite(each) for each in responses)
    return isinstance(responses, float) and not abs(responses) < float("inf")


def _short_hash(responses: Any) -> str:
    return hashlib.sha256(json.dumps(responses, default=str).encode()).hexdigest()[:16]
