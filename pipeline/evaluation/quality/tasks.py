"""lm-eval tasks from local files (`quality.tasks`): what a model gets right, document by document.

A task is a YAML of lm-eval (github.com/EleutherAI/lm-evaluation-harness) whose data lie on this
machine. lm-eval builds the prompts, asks the model and scores; what is kept is each document's
score, so that arms are compared in pairs like on every other quality. Only what is a mean over
documents of scores between 0 and 1, higher being better, is a figure here (acc, acc_norm,
exact_match, ...); any other metric of a task is null with the reason.

A task file runs no code of its own: `!function` is refused, templates are rendered in Jinja's
sandbox, metrics are lm-eval's own (the `evaluate` library would run a script of that name). Nothing
is fetched: data from the hub are refused, and all of it runs offline. Before anything is trained a
task is run once, in full, on a model that answers nothing; a prompt that the model could only read
in part, which lm-eval would cut without a word, is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import os
import random
import re
import tempfile
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import yaml

from pipeline.config.settings.quality import QualityConfig
from pipeline.config.text_files import read_text_file
from pipeline.config.yaml_files import MAX_BYTES, check_growth
from pipeline.errors import StageFailed, UserError
from pipeline.ledger.devices.table import device_of
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import numpy as np

KEY = "quality.tasks"
READERS = ("json", "csv", "parquet", "text")  # of `datasets`: what reads local files
LOCAL = f"give dataset_path: {'|'.join(READERS)} and dataset_kwargs: {{data_files: ...}}"
A_TASK_FILE = "give a task file of lm-eval, with task: NAME (letters, digits, _, -, .)"
# lm-eval's own default, so that examples in prompts, and what is sampled, are those of its command
# line
SEED = 1234
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
CLOSE = 1e-9  # between lm-eval's figure and the mean of the documents' scores
# that lm-eval has a model write where a task does not say; Source: HFLM.max_gen_toks
NEW_TOKENS = 256
# what it takes for it
SAYS_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task as its file describes it.

    Attributes:
        name: The file's `task`.
        settings: What lm-eval is given; includes are merged, paths of data absolute.
        digest: Over the settings and the contents of the data files, wherever they lie; 32 hex
            characters.
    """

    name: str
    settings: dict[str, Any]
    digest: str


class TasksIdentity(TypedDict, total=False):
    """What tasks add to an assessment's key: their digests, and lm-eval's version."""

    tasks: list[str]
    lm_eval: str


class Sample(TypedDict):
    """What lm-eval keeps of a document under a filter; each metric's score stands beside these,
    under its name.
    """

    doc_id: int
    filter: str
    arguments: list[tuple[Any, ...]]
    resps: list[Any]
    doc_hash: str
    target_hash: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model is asked.

    Attributes:
        text: What it reads.
        num_new: Tokens that it may write after that; 0 where the text is scored.
    """

    text: str
    num_new: int


@dataclass(frozen=True, slots=True)
class TaskScores:
    """What a model did on a task.

    Attributes:
        name: The task.
        digest: str (D,): by document, its number in the split, its content and what the model was
            asked of it.
        responses: str (D,): by document, a digest of the model's answers: likelihoods, or what it
            wrote.
        scores: By metric, float64 (D,), between 0 and 1.
        left_out: By metric that is no such score, why.
    """

    name: str
    digest: np.ndarray
    responses: np.ndarray
    scores: dict[str, np.ndarray]
    left_out: dict[str, str]


# -- reading and refusing: without lm-eval --------------------------------------------------------


def check_tasks(config: QualityConfig, task: Task) -> None:
    """Refuse task files that cannot be run, before anything is loaded.

    Raises:
        UserError: Naming the file and what is wrong with it.
    """
    if not config.tasks:
        return
    if not task.kind.is_language:
        raise UserError(KEY, f"lm-eval tasks are not for {task.value}", "leave it out")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            KEY,
            "needs lm-eval, which is not installed",
            "pip install 'model-efficiency-pipeline[eval]'",
        )
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


def identity(config: QualityConfig) -> TasksIdentity:
    """Return what tasks add to an assessment's key: nothing without tasks, so that what was
    assessed stays so.
    """
    if not config.tasks:
        return {}
    return {"tasks": [each.digest for each in read_tasks(config)], "lm_eval": version("lm_eval")}


def _read_task(path: Path) -> TaskFile:
    settings = _with_includes(path)
    name = settings.get("task")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", name):
        problem = (
            f"{path} has no task"
            if name is None
            else f"{path}: task: {name!r} is no name of one task"
        )
        raise UserError(KEY, problem, A_TASK_FILE)
    _refuse_downloads(path, settings)
    kwargs = settings["dataset_kwargs"]
    files = _data_files(path, kwargs["data_files"])
    settings["dataset_kwargs"] = {**kwargs, "data_files": files}
    # Contents stand in for paths: the same task elsewhere has the same digest.
    contents = {split: [_content(file) for file in each] for split, each in files.items()}
    described = _in_order({**settings, "dataset_kwargs": {**kwargs, "data_files": contents}})
    digest = hashlib.sha256(json.dumps(described, default=str).encode()).hexdigest()[:32]
    return TaskFile(name, settings, digest)


def _in_order(value: Any) -> Any:
    """Return YAML's values with the keys of mappings, which may be of several types, in one
    order.
    """
    if isinstance(value, dict):
        return {
            key: _in_order(value[key])
            for key in sorted(value, key=lambda key: (type(key).__name__, str(key)))
        }
    return [_in_order(each) for each in value] if isinstance(value, list) else value


def _with_includes(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a file, over those of the files that it includes."""
    if path.resolve() in including:
        raise UserError(KEY, f"{path} includes itself", "take out that include")
    settings = _load_yaml(path)
    if not isinstance(settings, dict):
        raise UserError(KEY, f"{path} has no task", A_TASK_FILE)
    merged: dict[str, Any] = {}
    for each in _names(path, "include", settings.pop("include", [])):
        merged |= _with_includes(path.parent / each, (*including, path.resolve()))
    return merged | settings


def _names(path: Path, what: str, value: Any) -> list[str]:
    """Return one name, or several, as a list."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise UserError(
            KEY, f"{path}: {what}: {value!r} names no files", "give a file, or a list of files"
        )
    return names


def _load_yaml(path: Path) -> Any:
    remedy = "give task files of lm-eval: quality.tasks=[my_task.yaml]"
    if not path.exists():
        raise UserError(KEY, f"{path} does not exist", remedy)
    text = read_text_file(path, KEY, remedy, limit=MAX_BYTES)
    try:
        check_growth(path, text, KEY, remedy)
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        problem = f"{path}: {error.problem or 'a tag that is not known'}"
        raise UserError(
            KEY, problem, "a task file runs no code: use templates in place of !function"
        ) from None
    except yaml.YAMLError:
        raise UserError(KEY, f"{path} is no YAML", A_TASK_FILE) from None


def _refuse_downloads(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what would be fetched, and what would run code."""
    where, kwargs = settings.get("dataset_path"), settings.get("dataset_kwargs")
    if where not in READERS:
        raise UserError(
            KEY, f"{path} has dataset_path: {where}, which is not on this machine", LOCAL
        )
    if not isinstance(kwargs, dict) or not kwargs.get("data_files"):
        raise UserError(KEY, f"{path} names no data_files", LOCAL)
    if settings.get("unsafe_code"):
        raise UserError(
            KEY, f"{path} runs what the model writes (unsafe_code)", "leave that task out"
        )
    if settings.get("use_prompt"):
        raise UserError(
            KEY, f"{path} takes its prompt from elsewhere (use_prompt)", "give doc_to_text"
        )
    for each in _metrics(path, settings):
        if each.get("hf_evaluate"):
            problem = f"{path} has a metric with hf_evaluate, which is downloaded"
            raise UserError(KEY, problem, "use one of lm-eval's own")


def _metrics(path: Path | str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the file's list of metrics; without one, a task has those of its output_type."""
    metrics = settings.get("metric_list")
    if metrics is None:
        return []
    if not isinstance(metrics, list) or not all(
        isinstance(each, dict) and "metric" in each for each in metrics
    ):
        raise UserError(
            KEY, f"{path}: metric_list: {metrics!r} lists no metrics", "give [{metric: acc}]"
        )
    return metrics


def asked_metrics(config: QualityConfig) -> list[tuple[str, str]]:
    """Return the tasks and the metrics that their files name; `score` for one that has those of its
    output_type.
    """
    return [
        (task.name, re.sub(r"[^A-Za-z0-9_.-]", "_", str(each["metric"])))
        for task in read_tasks(config)
        for each in _metrics(task.name, task.settings) or [{"metric": "score"}]
    ]


def _data_files(path: Path, named: Any) -> dict[str, list[str]]:
    """Return the data files by split, absolute; relative ones lie beside the task file, else in the
    current folder.
    """
    by_split: dict[str, Any] = named if isinstance(named, dict) else {"train": named}
    found: dict[str, list[str]] = {}
    for split, files in by_split.items():
        found[str(split)] = []
        for file in _names(path, "data_files", files):
            near = [place for place in (path.parent / file, Path(file)) if place.is_file()]
            if not near:
                raise UserError(
                    KEY, f"{path}: there is no data file {file}", "give a path beside the task file"
                )
            found[str(split)].append(str(near[0].resolve()))
    return found


def _content(file: str) -> str:
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# -- running: with lm-eval ------------------------------------------------------------------------


def import_lm_eval() -> None:
    """Import lm-eval, which takes a second and more."""
    with _quietly():
        for name in ("lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.tasks"):
            importlib.import_module(name)


def try_tasks(config: QualityConfig) -> dict[str, list[Asked]]:
    """Run the tasks, before anything is trained, on a model that answers nothing: data, prompts,
    filters and metrics.

    Returns:
        By task, what a model will be asked.

    Raises:
        UserError: If lm-eval cannot do it.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from pyarrow import ArrowException

    # what templates, readers and lm-eval's own checks raise; UndefinedError is a TemplateError
    expected = (
        TemplateError,
        DatasetsError,
        ArrowException,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        LookupError,
        AssertionError,
        NotImplementedError,
        OSError,
        RuntimeError,
    )
    asked: dict[str, list[Asked]] = {}
    for each in read_tasks(config):
        _check_metrics(each)
        try:
            found = _evaluate(_silent_model(), [each])
            _scores(each.name, found)
        except expected as error:
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(
                KEY, f"lm-eval cannot run task {each.name}: {why}", "see its task guide"
            ) from error
        asked[each.name] = _asked(found["samples"][each.name])
    return asked


def run_tasks(model: Any, tokenizer: Any, config: QualityConfig) -> list[TaskScores]:
    """Run the tasks of `quality.tasks` on a causal language model in memory.

    Log-probabilities are taken in fp32. The state of the process's random generators is left as it
    was.

    Raises:
        UserError: If a prompt is longer than what the model reads.
        StageFailed: If lm-eval cannot ask this model, or an answer has no finite likelihood.
    """
    tasks = read_tasks(config)
    for each in tasks:
        _check_metrics(each)
    with _quietly():
        huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
        reader = huggingface.HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=config.batch_size,
            # As this project's own scores are.
            softmax_dtype="float32",
        )
    try:
        found = _evaluate(reader, tasks)
    except (ValueError, TypeError, AssertionError, LookupError) as error:
        raise StageFailed(
            f"lm-eval cannot ask the model: {str(error) or type(error).__name__}"
        ) from error
    check_lengths(
        {each.name: _asked(found["samples"][each.name]) for each in tasks},
        tokenizer,
        reader.max_length,
    )
    return [_scores(each.name, found) for each in tasks]


def check_lengths(asked: Mapping[str, Sequence[Asked]], tokenizer: Any, limit: int | None) -> None:
    """Refuse what a model that tells `limit` tokens of one sequence apart could only read in part.

    Raises:
        UserError: Naming the task.
    """
    for name, each in asked.items():
        long = [
            one for one in each if limit is not None and _num_tokens(one, tokenizer, limit) > limit
        ]
        if long:
            most = max(_num_tokens(one, tokenizer, 0) for one in long)
            problem = (
                f"task {name} takes up to {most} tokens, written ones included, and the model reads"
                f" {limit}"
            )
            raise UserError(KEY, problem, "shorten its documents, num_fewshot or max_gen_toks")


def _num_tokens(asked: Asked, tokenizer: Any, enough: int) -> int:
    """Return the tokens of a sequence; not counted where even one for every byte would be no more
    than `enough`.
    """
    bound = len(asked.text.encode()) + 2 + asked.num_new  # with what a tokenizer puts around a text
    if bound <= enough:
        return bound
    num_read = len(tokenizer(asked.text)["input_ids"])
    # the last one is predicted, not read
    return num_read + asked.num_new if asked.num_new else num_read - 1


def _asked(samples: Sequence[Sample]) -> list[Asked]:
    """Return what was asked, of each document once; texts that lm-eval itself reads in windows are
    left out.
    """
    by_document = {sample["doc_id"]: sample["arguments"] for sample in samples}
    return [
        _one_asked(*each)
        for arguments in by_document.values()
        for each in arguments
        if len(each) == 2
    ]


def _one_asked(context: str, more: str | Mapping[str, Any]) -> Asked:
    if isinstance(more, str):
        return Asked(context + more, 0)
    return Asked(
        context, next((int(more[name]) for name in SAYS_NEW_TOKENS if name in more), NEW_TOKENS)
    )


def _check_metrics(task: TaskFile) -> None:
    """Refuse metrics that lm-eval does not have: the `evaluate` library would look for a script of
    that name.
    """
    with _quietly():
        registry: Any = importlib.import_module("lm_eval.api.registry")
        importlib.import_module("lm_eval.api.metrics")
    for each in _metrics(task.name, task.settings):
        if each["metric"] not in registry.METRIC_REGISTRY:
            raise UserError(
                KEY,
                f"task {task.name}: lm-eval has no metric {each['metric']!r}",
                "use one of its own",
            )


def _silent_model() -> Any:
    """Return what lm-eval takes for a model: it finds nothing likely and writes nothing."""
    api: Any = importlib.import_module("lm_eval.api.model")

    class SilentModel(api.LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(-1.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [-1.0] * len(requests)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [""] * len(requests)

    return SilentModel()


def _evaluate(model: Any, tasks: Sequence[TaskFile]) -> Any:
    """Return what lm-eval finds: `results`, `samples`, `higher_is_better`, each by task."""
    with _quietly(), _seeded(getattr(model, "device", None)), _loaded(tasks) as loaded:
        evaluator: Any = importlib.import_module("lm_eval.evaluator")
        # not simple_evaluate, which spends a second on describing the machine that lm-eval runs on
        return evaluator.evaluate(model, loaded, bootstrap_iters=0, log_samples=True)


@contextmanager
def _loaded(tasks: Sequence[TaskFile]) -> Generator[Any]:
    """Give lm-eval's tasks; what `datasets` makes of their files is gone afterwards."""
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as cache:
        specs: list[Any] = [
            {
                **each.settings,
                "dataset_kwargs": {**each.settings["dataset_kwargs"], "cache_dir": cache},
            }
            for each in tasks
        ]
        loaded: Any = TaskManager(include_defaults=False).load(specs)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        yield loaded


@contextmanager
def _seeded(device: Any) -> Generator[None]:
    """Seed the random generators; afterwards they are as they were."""
    import numpy as np
    import torch

    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        known = isinstance(device, torch.device)
        with device_of(device if known else torch.device("cpu")).kept_generators():
            random.seed(SEED)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)


@contextmanager
def _quietly() -> Generator[None]:
    """Keep lm-eval from the network, from the terminal, and its templates from Python."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    of_datasets: Any = importlib.import_module("datasets.config")
    of_hub: Any = importlib.import_module("huggingface_hub.constants")
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    environment = dict(os.environ)
    # what was imported before no longer reads the environment
    switches: list[tuple[Any, str, Any]] = [
        (of_datasets, "HF_HUB_OFFLINE", True),
        (of_datasets, "HF_DATASETS_OFFLINE", True),
        (of_hub, "HF_HUB_OFFLINE", True),
    ]
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    logger.setLevel(logging.ERROR)
    before: list[tuple[Any, str, Any]] = []
    try:
        # progress bars, which no setting turns off, go to stderr
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            templates: Any = importlib.import_module("lm_eval.utils")
            # In place of lm-eval's own environment, which lets templates reach into Python.
            sandbox = SandboxedEnvironment(
                loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
            )
            sandbox.filters.update(templates.env.filters)
            for module, name, value in (*switches, (templates, "env", sandbox)):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, value)
            yield
    finally:
        logger.setLevel(level)
        # In reverse order, so that a name which was set twice gets its first value back.
        for module, name, value in reversed(before):
            setattr(module, name, value)
        for name in [name for name in os.environ if name not in environment]:
            del os.environ[name]
        os.environ.update(environment)


def _scores(name: str, found: Mapping[str, Any]) -> TaskScores:
    import numpy as np

    samples: list[Sample] = found["samples"][name]
    by_filter: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        by_filter.setdefault(sample["filter"], []).append(sample)
    scores: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    for metric, filtered, figure in _reported(found["results"][name]):
        key = re.sub(
            r"[^A-Za-z0-9_.-]", "_", metric if filtered == "none" else f"{metric}.{filtered}"
        )
        values = [sample.get(metric) for sample in by_filter[filtered]]
        why = _why_no_score(values, figure, found["higher_is_better"][name].get(metric))
        if why is None:
            scores[key] = np.array(values, dtype=np.float64)
        else:
            left_out[key] = why
    first = next(iter(by_filter.values()))  # every filter has the same documents
    for sample in first:
        if _not_finite(sample["resps"]):
            raise StageFailed(
                f"task {name}: an answer to document {sample['doc_id']} has no finite likelihood"
            )
    return TaskScores(
        name=name,
        digest=np.array([_digest(sample) for sample in first]),
        responses=np.array([_short_hash(sample["resps"]) for sample in first]),
        scores=scores,
        left_out=left_out,
    )


def _digest(sample: Sample) -> str:
    """Return what a document is paired by: arms that were asked otherwise are not compared."""
    content = [sample[name] for name in ("doc_hash", "target_hash", "arguments")]
    return f"{sample['doc_id']}-{_short_hash(content)}"


def _reported(results: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield metric, filter and figure of what lm-eval reports of a task."""
    for name, figure in results.items():
        metric, comma, filtered = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filtered, figure


def _why_no_score(values: Sequence[Any], figure: Any, higher_is_better: bool | None) -> str | None:
    """Return why values by document do not make a figure that arms can be compared on; None where
    they do.
    """
    import numpy as np

    if not all(isinstance(value, int | float | np.number) and 0 <= value <= 1 for value in values):
        return "lm-eval keeps no score between 0 and 1 of each document"
    # `not ... <=` also catches NaN.
    if not abs(float(np.mean(values)) - float(figure)) <= CLOSE:
        return "lm-eval's figure is not the mean of the documents' scores"
    return None if higher_is_better else "lower is better, or lm-eval does not say that higher is"


def _not_finite(responses: Any) -> bool:
    """Whether a number anywhere in nested responses is not finite."""
    if isinstance(responses, list | tuple):
        return any(_not_finite(each) for each in responses)
    return isinstance(responses, float) and not abs(responses) < float("inf")


def _short_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
