"""What is tried before anything is written: the device, the precisions, and whether models, data
and load fit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.arms import BASE, STUDENT_INIT
from pipeline.config.settings.precision import Precision
from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.config.settings.run import Measure, Run, scored_length
from pipeline.config.settings.serving import Decode
from pipeline.data.documents import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.quality.tasks import Asked, check_lengths
from pipeline.ledger.devices.device import Device
from pipeline.ledger.devices.table import device_of, open_device
from pipeline.ledger.numbers import how_many
from pipeline.ledger.phases import PhaseClock
from pipeline.models.heads import refuse_other_head
from pipeline.runs.base_model import base_artifact, is_remade
from pipeline.runs.fitting import check_memory, with_fitting_mode
from pipeline.stages.base import BeforeRun, stages_of, student_source
from pipeline.store.artifacts import Store
from pipeline.training.ranks import Place, place_in

SAMPLE = 64  # documents whose tokens are looked at; training and assessment look at all of theirs
SAMPLE_BYTES = 4096  # of each


def choose_device(run: Run) -> Any:
    """Return the device to run on, which is this thread's current one from then on.

    Raises:
        UserError: If there is no such device, or not as many as asked for.
    """
    wanted, place = run.hardware.device, place_in()
    device = open_device(wanted)
    if device is None:
        raise UserError("hardware.device", f"there is no {wanted} here", "give auto or cpu")
    if place is not None and device.numbered:
        device = _of_rank(wanted, device, place)
    device.make_current()
    return device.at


def _of_rank(wanted: str, device: Device, place: Place) -> Device:
    """Return the device of a rank: of those that its host has, the one of its number there.

    Raises:
        UserError: If one is named for all, or there are too few.
    """
    kind, _, number = wanted.partition(":")
    if number:
        problem = f"{wanted} is one device, and {place.on_host} ranks are on this host"
        raise UserError("hardware.device", problem, f"give {kind}")
    have = device.count()
    if place.on_host > have:
        problem = f"{place.on_host} ranks on this host, {how_many(have, 'device')} there"
        raise UserError("hardware.devices", problem, f"give {have}")
    found = open_device(f"{device.kind}:{place.local}")
    assert found is not None
    return found


def check_decode(run: Run, device: Any) -> None:
    """Refuse a way of writing tokens that this device does not have.

    Raises:
        UserError: Naming the setting.
    """
    decode, here = run.serving.decode, device_of(device)
    if decode is Decode.graph and not here.captures:
        raise UserError(
            "serving.decode",
            f"graph needs CUDA, this run is on {device.type}",
            "give auto or compile",
        )
    if decode is Decode.compile and (why := here.why_no_compile()) is not None:
        raise UserError("serving.decode", f"compile: {why}", "install it, or give auto")


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


def in_native_precision(run: Run, device: Any) -> tuple[Run, list[str]]:
    """Return the run with a precision in place of `native`: bf16 where the device has units for
    it, else fp32; and what is to be said of that.
    """
    from pipeline.models.sixteen_bits import slower_than_fp32, why_not

    if run.precision.name is not Precision.native:
        return run, []
    is_slow = why_not(Format.bf16, device) or slower_than_fp32(Format.bf16, device)
    chosen = Precision.fp32 if is_slow else Precision.bf16
    inherited = any(
        not each.is_own for stage in stages_of(run).values() for each in stage.precisions("", run)
    )
    why = f"precision=native is fp32: this {device.type} has no units for bf16"
    said = [why] if is_slow and inherited else []
    return in_precision(run, chosen), said


def in_precision(run: Run, precision: Precision) -> Run:
    """Return a run whose stages train in a precision, unless they name their own."""
    return replace(run, precision=replace(run.precision, name=precision))


def slow_precision(run: Run, device: Any) -> list[str]:
    """Return that training would be faster in fp32, where stages train in 16 bits because
    `precision` says so and this device has no units for them.
    """
    from pipeline.models.sixteen_bits import slower_than_fp32

    inherited = {
        each.precision.value.removesuffix("_pure")
        for name, stage in stages_of(run).items()
        for each in stage.precisions(f"stages.{name}", run)
        if each.trains and not each.is_own
    }
    formats = [fmt for fmt in SIXTEEN_BITS if fmt.value in inherited]
    return [
        f"{why}: precision=fp32 trains faster"
        for fmt in formats
        if (why := slower_than_fp32(fmt, device)) is not None
    ]


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
) -> tuple[list[str], BeforeRun]:
    """Refuse models that cannot read this data or serve this load; of their files, only the small
    ones are read.

    Args:
        asked: By lm-eval task, what a model will be asked.

    Returns:
        What a reader must know of the models, and what stages are told before the run.

    Raises:
        UserError: Naming the setting.
    """
    from pipeline.models.load import check_loads, load_config, load_tokenizer, positions

    base: str | Path = run.model.path or ""
    stages = stages_of(run)
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
            if not all(each.leaves_model(run) for each in stages.values()):
                _refuse_quantized(config, "model.path")
            # a head that fits another task is replaced where every stage that reads it trains
            from_base = [each for each in stages.values() if each.starts_from() == BASE]
            trained = all(each.trains(run) for each in from_base)
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
        known = BeforeRun(run, data, device, base, config)
        for name, stage in stages.items():
            stage.preflight(f"stages.{name}", known)
        known, said = with_fitting_mode(known)
        check_memory(known)
    return list(dict.fromkeys([*notes, *said])), known


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


def _root(run: Run, name: str) -> str | None:
    """Return what an arm was made from in the beginning: `base`, `student_init`, or None where no
    stage wants it.
    """
    stages = stages_of(run)
    if name == STUDENT_INIT:
        if not any(stage.starts_from() == STUDENT_INIT for stage in stages.values()):
            return None
        name = student_source(run)
    # Up the chain of starting points
    while name not in (BASE, STUDENT_INIT):
        name = stages[name].starts_from() or STUDENT_INIT
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
        stages = stages_of(run).values()
        trained = all(each.trains(run) for each in stages if each.starts_from() == STUDENT_INIT)
        if not trained:
            refuse_other_head(config, run.task, "student.path", given)
        notes += check_loads(
            given, run.task, labels=data.labels, key="student.path", new_head=trained
        )
        if (folder := Path(given).expanduser()).is_dir():  # it is loaded after the teacher's hours
            check_finite(folder, "student.path")
        tokenizer = load_tokenizer(given, revision=run.student.revision, key="student.path")
        taught = [teacher for each in stages if (teacher := each.learns_from()) is not None]
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
    # Every split: an unusual token may stand in one of them alone.
    for split, documents in data.splits.items():
        if run.task.kind.is_language:
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
    asked = 0 if run.task.kind.is_language else scored_length(run)
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
        answer = run.serving.load.new if run.task.kind.is_language else 0
        # a gate serves at its policy's load, and `serving.load` cannot be set there
        is_gate = any(stage.takes_release() for stage in stages_of(run).values())
        group = "policy" if is_gate else "serving"
        yield f"{group}.load.prompt", run.serving.load.prompt + answer
    if not run.task.kind.is_language:  # texts, cut where they are longer
        return
    if run.quality.sequence_length is not None:
        yield "quality.sequence_length", run.quality.sequence_length
    for name, stage in stages_of(run).items():
        yield from stage.lengths(f"stages.{name}", run)
