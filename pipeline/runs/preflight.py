"""What is tried before anything is written: the device, the precisions, and whether models, data
and load fit.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.settings import (
    SIXTEEN_BITS,
    Decode,
    Format,
    Measure,
    Precision,
    Run,
    Rung,
    Task,
)
from pipeline.data.documents import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.quality.tasks import Asked, check_lengths
from pipeline.ledger.devices.table import device_of, open_device
from pipeline.ledger.phases import PhaseClock
from pipeline.models.heads import refuse_other_head
from pipeline.runs.base_model import base_artifact, is_remade
from pipeline.stages.quantize import QuantizeStage
from pipeline.stages.settings import (
    BASE,
    STUDENT_INIT,
    TrainingOverrides,
    student_source,
    training_precision,
    training_settings,
)
from pipeline.stages.train import TrainStage
from pipeline.store.artifacts import Store

SAMPLE = 64  # documents whose tokens are looked at; training and assessment look at all of theirs
SAMPLE_BYTES = 4096  # of each


def choose_device(run: Run) -> Any:
    """Return the device to run on, which is this thread's current one from then on.

    Raises:
        UserError: If there is no such device, or not as many as asked for.
    """
    wanted = run.hardware.device
    device = open_device(wanted)
    if device is None:
        raise UserError("hardware.device", f"there is no {wanted} here", "give auto or cpu")
    have = device.count()
    if run.hardware.devices > have:
        raise UserError(
            "hardware.devices", f"{run.hardware.devices} asked for, {have} there", f"give {have}"
        )
    if run.hardware.devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "hardware.devices", "one process drives one device in this release", "give 1"
        )
    device.make_current()
    return device.at


def check_precisions(run: Run, device: Any) -> None:
    """Refuse what this device cannot train in; an optional stage is skipped when its turn comes."""
    from pipeline.training.precision import why_not

    for name, stage in run.stages.items():
        if stage.optional:
            continue
        for key, named, precision in _precisions(name, stage, run):
            reason = why_not(precision, device)
            if reason is not None:
                raise UserError(
                    key if named else "precision",
                    reason,
                    "choose fp32 or bf16, or mark the stage optional: true",
                )


def _precisions(name: str, stage: Any, run: Run) -> Iterator[tuple[str, bool, Precision]]:
    """Yield what a stage trains in, its recovery included: the setting, whether that names it, and
    the precision.
    """
    if hasattr(stage, "precision"):
        yield (
            f"stages.{name}.precision",
            stage.precision is not None,
            training_precision(stage, run),
        )
    for rung in stage.recover if isinstance(stage, QuantizeStage) else ():
        if rung is not Rung.format:
            own = getattr(stage, rung.value)
            yield (
                f"stages.{name}.{rung.value}.precision",
                own.precision is not None,
                own.precision or run.precision.name,
            )


def check_heads(run: Run, device: Any) -> None:
    """Refuse a kernel of the distillation head that cannot run here.

    Raises:
        UserError: Naming the stage's setting.
    """
    from pipeline.distillation.kernels import why_not

    for name, stage in run.stages.items():
        reason = why_not(stage.head, device) if hasattr(stage, "head") else None
        if reason is not None:
            raise UserError(f"stages.{name}.head", reason, "leave it auto")


def check_decode(run: Run, device: Any) -> None:
    """Refuse CUDA graphs where there is no CUDA.

    Raises:
        UserError: Naming the setting.
    """
    if run.serving.decode is Decode.graph and not device_of(device).captures:
        raise UserError(
            "serving.decode",
            f"graph needs CUDA, this run is on {device.type}",
            "give auto or compile",
        )


def check_dtype(run: Run, device: Any) -> None:
    """Refuse a dtype of serving that this device cannot compute in.

    Raises:
        UserError: Naming the setting.
    """
    from pipeline.models.sixteen_bits import why_not

    if run.serving.dtype.value in (fmt.value for fmt in SIXTEEN_BITS):
        reason = why_not(Format(run.serving.dtype.value), device)
        if reason is not None:
            raise UserError("serving.dtype", reason, "give auto or fp32")


def check_formats(run: Run, device: Any) -> None:
    """Refuse a quantized format that this device cannot take; an optional stage is skipped when its
    turn comes.

    Raises:
        UserError: Naming the stage's setting.
    """
    from pipeline.quantization.backend import backend_of

    for name, stage in run.stages.items():
        if isinstance(stage, QuantizeStage) and not stage.optional:
            for key, fmt in _named_formats(name, stage):
                backend_of(fmt).refuse_device(fmt, device=device, key=key)


def _named_formats(name: str, stage: QuantizeStage) -> list[tuple[str, Format]]:
    """Return the formats that a stage names, with the setting that names each."""
    if stage.format is not Format.auto:
        return [(f"stages.{name}.format", stage.format)]
    return [(f"stages.{name}.candidates", fmt) for fmt in stage.candidates]


def check_calibration(run: Run, data: Dataset) -> None:
    """Refuse calibration documents that cannot be read or do not fit.

    Raises:
        UserError: Naming the stage's setting.
    """
    from pipeline.quantization.calibration import calibration_documents

    for name, stage in run.stages.items():
        if isinstance(stage, QuantizeStage) and stage.calibration is not None:
            calibration_documents(stage, run, data, f"stages.{name}.calibration")


def check_completions(run: Run, data: Dataset) -> None:
    """Refuse files of completions that cannot be read, or that hold what the student will be
    measured on.

    Raises:
        UserError: Naming the setting and the line.
    """
    from pipeline.data.completions import check_apart, read_completions

    for name, stage in run.stages.items():
        path = getattr(stage, "completions", None)
        if path is not None:
            key = f"stages.{name}.completions"
            check_apart(read_completions(path, run.data, key), data, key)


def check_tasks(run: Run, clock: PhaseClock) -> dict[str, list[Asked]]:
    """Refuse lm-eval tasks that lm-eval cannot run. Its import is overhead of the run: all arms use
    it alike.

    Returns:
        By task, what a model will be asked.

    Raises:
        UserError: Naming the task.
    """
    if not run.quality.tasks:
        return {}
    from pipeline.evaluation.quality.tasks import import_lm_eval, try_tasks

    with clock.phase("import"):
        import_lm_eval()
    with clock.phase("prepare"):
        return try_tasks(run.quality)


def check_models(
    run: Run,
    data: Dataset,
    store: Store,
    clock: PhaseClock,
    device: Any,
    asked: Mapping[str, list[Asked]],
) -> list[str]:
    """Refuse models that cannot read this data or serve this load; of their files, only the small
    ones are read.

    Args:
        asked: By lm-eval task, what a model will be asked.

    Returns:
        What a reader must know of the models.

    Raises:
        UserError: Naming the setting.
    """
    from pipeline.models.load import check_loads, load_config, load_tokenizer, positions

    base: str | Path = run.model.path or ""
    with clock.phase("prepare"):
        remade = not base or is_remade(Path(base).expanduser(), run.task)
    if remade:  # a moment's work, which the run finds done
        base = base_artifact(run, data, (run.seeds or [run.seed])[0], store, clock).path
    notes: list[str] = []
    with clock.phase("prepare"):
        revision = run.model.revision
        if run.model.path is not None and str(base) != run.model.path:
            notes += check_loads(run.model.path, run.task, labels=None, key="model.path")
        config, tokenizer = (
            load_config(base, revision=revision),
            load_tokenizer(base, revision=revision),
        )
        if run.student.path is not None:
            _refuse_quantized(load_config(run.student.path, key="student.path"), "student.path")
        if run.model.path is not None:
            if _is_changed(run):
                _refuse_quantized(config, "model.path")
            trained = all(steps > 0 for steps in _steps_from_base(run))
            if not trained:
                refuse_other_head(config, run.task, "model.path", run.model.path)
            notes += check_loads(
                str(base), run.task, labels=data.labels, key="model.path", new_head=trained
            )
        notes += _check_reads("model.path", config, tokenizer, run, data)
        notes += _check_lengths("model.path", config, run)
        check_lengths(asked, tokenizer, positions(config))
        student = _root(run, STUDENT_INIT)
        if student == BASE or (student is not None and run.student.path is not None):
            notes += _check_student(base, tokenizer, run, data, asked)
        _check_stacks(config, run)
        _check_quantizable(base, run, device)
    return list(dict.fromkeys(notes))


def _steps_from_base(run: Run) -> list[int]:
    """Return the steps of the stages that train the base; one that is taken as it is has 0."""
    from_base = [stage for stage in run.stages.values() if getattr(stage, "model", None) == BASE]
    return [
        training_settings(stage, run).steps
        for stage in from_base
        if isinstance(stage, TrainingOverrides)
    ]


def _is_changed(run: Run) -> bool:
    """Whether anything trains, cuts or quantizes the base, or learns from it; else it is only
    assessed and served.
    """
    taken = {
        name
        for name, stage in run.stages.items()
        if isinstance(stage, TrainStage)
        and training_settings(stage, run).steps == 0
        and stage.stack in (None, 1)
        and not stage.match_compute
    }
    return len(taken) < len(run.stages)


def _check_stacks(config: Any, run: Run) -> None:
    """Refuse layers that cannot be stacked, of what starts from the base; a student's are stacked
    at its turn.
    """
    from pipeline.models.layers import check_layers
    from pipeline.models.student import stacked

    for name, stage in run.stages.items():
        times = getattr(stage, "stack", None)
        if times not in (None, 1) and getattr(stage, "model", None) == BASE:
            check_layers(config, run.task, stacked(config, times), f"stages.{name}.stack")


def _refuse_quantized(config: Any, key: str) -> None:
    """Refuse weights that are stored in a quantized format: no stage trains, copies or quantizes
    those.
    """
    from pipeline.models.load import quantized_by

    method = quantized_by(config)
    if method is not None:
        raise UserError(
            key, f"the model is quantized already ({method})", "give the model it was made from"
        )


def check_releases(
    run: Run,
    data: Dataset,
    folders: dict[str, Path],
    clock: PhaseClock,
    asked: Mapping[str, list[Asked]],
) -> list[str]:
    """Refuse released artifacts that cannot read this data, or serve the policy's load.

    Returns:
        What a reader must know of them.

    Raises:
        UserError: Naming the reference.
    """
    from pipeline.models.load import check_loads, load_config, load_tokenizer, positions

    notes: list[str] = []
    with clock.phase("prepare"):
        for key, folder in folders.items():
            config, tokenizer = load_config(folder, key=key), load_tokenizer(folder, key=key)
            refuse_other_head(config, run.task, key, folder)
            notes += check_loads(str(folder), run.task, labels=data.labels, key=key)
            notes += _check_reads(key, config, tokenizer, run, data)
            notes += _check_lengths(key, config, run)
            check_lengths(asked, tokenizer, positions(config))
    return list(dict.fromkeys(notes))


def _check_quantizable(base: str | Path, run: Run, device: Any) -> None:
    """Refuse layers and patterns of what is quantized as the base's configuration has them; a
    student's at its turn.
    """
    from pipeline.models.load import (
        from_config,
        language_config,
        load_config,
        load_config_of_weights,
    )
    from pipeline.quantization.backend import why_not
    from pipeline.quantization.smoothing import check_smoothable

    stages = {
        name: stage
        for name, stage in run.stages.items()
        if isinstance(stage, QuantizeStage) and _is_base_shaped(stage.model, run)
    }
    if not stages:
        return
    local = Path(base).expanduser().is_dir()
    config = (
        load_config_of_weights(base, run.task, key="model.path")
        if local
        else load_config(base, revision=run.model.revision)
    )
    for name, stage in stages.items():
        for key, fmt in _named_formats(name, stage):
            if why_not(fmt, device) is None:
                _check_takes(stage, config, fmt, run, device, key)
        if stage.smoothing is not None:
            import torch

            with torch.device("meta"):
                check_smoothable(
                    from_config(language_config(config, run.task), run.task, None),
                    f"stages.{name}.smoothing",
                )


def _check_takes(
    stage: QuantizeStage, config: Any, fmt: Format, run: Run, device: Any, key: str
) -> None:
    """Refuse layers that a format cannot take; an optional stage is then skipped when its turn
    comes.
    """
    from pipeline.quantization.backend import refuse_unsupported

    try:
        refuse_unsupported(config, fmt, run.task, device=device, key=key, choice=stage.choice())
    except UserError as error:
        if not stage.optional or error.key != key:
            raise


def _is_base_shaped(arm: str, run: Run) -> bool:
    """Whether an arm has the layers of `base`: nothing on the way to it cuts, stacks or replaces
    them.
    """
    while arm != BASE:
        stage = run.stages.get(arm)
        if stage is None or getattr(stage, "stack", None) not in (None, 1):
            return False
        arm = stage.model
    return True


def _root(run: Run, name: str) -> str | None:
    """Return what an arm was made from in the beginning: `base`, `student_init`, or None where no
    stage wants it.
    """
    if name == STUDENT_INIT:
        if not any(getattr(stage, "model", None) == STUDENT_INIT for stage in run.stages.values()):
            return None
        name = student_source(run)
    while name not in (BASE, STUDENT_INIT):
        name = getattr(run.stages[name], "model", STUDENT_INIT)
    return name


def _check_student(
    base: str | Path, base_tokenizer: Any, run: Run, data: Dataset, asked: Mapping[str, list[Asked]]
) -> list[str]:
    """Refuse a student that cannot be made or taught; one that is cut from another student is seen
    at its turn.

    Returns:
        What a reader must know of it.
    """
    from pipeline.models.load import check_loads, load_tokenizer, positions
    from pipeline.models.student import student_config
    from pipeline.models.weights import check_finite
    from pipeline.training.objective import check_tokenizers

    given, notes = run.student.path, list[str]()
    config = student_config(run.student, base, run.task)
    tokenizer = base_tokenizer
    if given is not None:
        learners = [
            stage for stage in run.stages.values() if getattr(stage, "model", None) == STUDENT_INIT
        ]
        trained = all(_trains(stage, run) for stage in learners)
        if not trained:
            refuse_other_head(config, run.task, "student.path", given)
        notes += check_loads(
            given, run.task, labels=data.labels, key="student.path", new_head=trained
        )
        if (folder := Path(given).expanduser()).is_dir():  # it is loaded after the teacher's hours
            check_finite(folder, "student.path")
        tokenizer = load_tokenizer(given, revision=run.student.revision, key="student.path")
        taught = [stage.teacher for stage in run.stages.values() if hasattr(stage, "teacher")]
        if any(_root(run, teacher) == BASE for teacher in taught):
            check_tokenizers(tokenizer, base_tokenizer)
    key = (
        "student.path"
        if given is not None
        else "student.config"
        if run.student.config
        else "student.layers"
    )
    notes += _check_reads(key, config, tokenizer, run, data)
    notes += _check_lengths(key, config, run)
    check_lengths(asked, tokenizer, positions(config))
    return notes


def _trains(stage: Any, run: Run) -> bool:
    """Whether a stage takes steps; those that are computed are at least one."""
    return getattr(stage, "match_compute", False) or training_settings(stage, run).steps > 0


def _check_reads(key: str, config: Any, tokenizer: Any, run: Run, data: Dataset) -> list[str]:
    """Refuse a model whose tokenizer does not take the data, or gives tokens that it has no
    embedding for.

    All chats are rendered: what a template refuses would else be found after training. Tokens are
        looked at of the first documents.

    Returns:
        What the chat template does with the conversations; of train in the words that training says
        it with.
    """
    from pipeline.data.encode import check_chats, encode_all
    from pipeline.models.load import check_tokens, example_length

    length = example_length(config, run.task, run.training.sequence_length)
    said: list[str] = []
    for split, documents in data.splits.items():
        if run.task is Task.causal_lm:
            said += [
                f"{split} split: {note}"
                for note in check_chats(documents, tokenizer, split).notes()
            ]
        with refused_as(key):
            read = encode_all(
                documents[:SAMPLE],
                tokenizer,
                run.task,
                max_length=length,
                max_bytes=SAMPLE_BYTES,
                split=split,
            )
        largest = max((int(row.input_ids.max()) for row in read), default=0)
        # CANINE has none: it hashes characters
        size = getattr(config.get_text_config(), "vocab_size", None)
        if size is not None:
            check_tokens(largest, size, key)
    return said


@contextmanager
def refused_as(key: str) -> Generator[None]:
    """Have what is refused as `model.path`'s be refused by the setting that names this model."""
    try:
        yield
    except UserError as error:
        if error.key != "model.path":
            raise
        raise UserError(key, error.problem, error.remedy) from error


def _check_lengths(of: str, config: Any, run: Run) -> list[str]:
    """Refuse sequences that are longer than what a model can tell apart.

    Returns:
        What a reader must know: texts to classify are cut to that.
    """
    from pipeline.models.load import positions

    limit = positions(config)
    if limit is None:
        return []
    for key, length in _lengths(run):
        if length > limit:
            raise UserError(
                key,
                f"{length} tokens in one sequence, and the model has {limit} positions",
                "give less",
            )
    asked = (
        0
        if run.task is Task.causal_lm
        else run.quality.sequence_length or run.training.sequence_length
    )
    return (
        [f"texts are cut to {limit} tokens: {of} has no positions for more"]
        if asked > limit
        else []
    )


def _lengths(run: Run) -> Iterator[tuple[str, int]]:
    """Yield the sequences that will certainly be read, by the setting that says how long they
    are.
    """
    if any(
        measure in pair.on for pair in run.compare for measure in (Measure.serving, Measure.payback)
    ):
        answer = run.serving.load.new if run.task is Task.causal_lm else 0
        yield "serving.load.prompt", run.serving.load.prompt + answer
    if run.task is not Task.causal_lm:  # texts, cut where they are longer
        return
    if run.quality.sequence_length is not None:
        yield "quality.sequence_length", run.quality.sequence_length
    for name, stage in run.stages.items():
        if isinstance(stage, TrainingOverrides):
            settings = training_settings(stage, run)
            own = stage.sequence_length is not None
            if settings.steps > 0:
                key = f"stages.{name}.sequence_length" if own else "training.sequence_length"
                yield key, settings.sequence_length
