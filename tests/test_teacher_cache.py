"""The teacher cache: captured in shards, resumed to the bit, and refused, each with a line of its
own, when it lies.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from make_assess_models import LABELS, byte_tokenizer, random_documents, saved, tiny

from pipeline.config.settings.distillation import CaptureMethod
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import TrainingConfig
from pipeline.data.batches import PackedBatches, PaddedBatches, num_tokens
from pipeline.data.padding import Padding
from pipeline.distillation.cache import (
    MANIFEST,
    TeacherCache,
    file_sha256,
    needed,
    seal_manifest,
    shard_name,
    write_shard,
)
from pipeline.distillation.head import Head
from pipeline.distillation.losses import Loss, Sparse
from pipeline.distillation.sparse import TOKEN_BYTES
from pipeline.errors import Preempted, UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.models.load import load_model
from pipeline.stages import capturing as capture_module
from pipeline.stages.capture import CaptureStage
from pipeline.stages.context import Context, Output
from pipeline.stages.distill import DistillStage
from pipeline.stages.teaching import IndexedBatches, _expected, open_cache
from pipeline.store.artifacts import Artifact, digest_folder, read_json
from pipeline.tasks.table import Task
from pipeline.training.objective import CachedTeacher, Objective, Teacher

CPU = torch.device("cpu")
LENGTHS = [9, 30, 5, 17, 40, 12, 25, 33, 8, 21] * 6
SETTINGS = {"steps": 5, "batch_size": 4, "sequence_length": 16}
KEY = "stages.student.cache"


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Encoded documents stand for the train split, whatever tokenizer encodes them."""
    given = random_documents(LENGTHS)
    monkeypatch.setattr("pipeline.stages.training.encode_all", lambda *_, **__: given)
    return given


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Artifact]:
    root = tmp_path_factory.mktemp("teachers")
    return {task: artifact(saved(tiny(task, seed=3), root / task.value)) for task in Task}


def artifact(folder: Path) -> Artifact:
    digest, size = digest_folder(folder)
    return Artifact(folder, "model", digest, size)


def make_run(
    task: Task = Task.causal_lm, training: dict[str, Any] | None = None, **capture: Any
) -> Run:
    stages = {"capture": CaptureStage(**capture), "student": DistillStage(cache="capture")}
    config = TrainingConfig(**{**SETTINGS, **(training or {})})
    return Run(
        task=task, training=config, stages=stages, precision=PrecisionConfig(name=Precision.fp32)
    )


def history_at(step: int) -> list[dict[str, Any]]:
    """Return what a shard's record says of where it was made."""
    return [{"run_id": "a", "attempt": 1, "step": step, "phases_ns": {"capture": 1}}]


def context(root: Path, run: Run, stage: str = "capture", **changes: Any) -> Context:
    out = root / "out"
    out.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def progress(*_: Any):
        yield lambda *_: None

    labels = LABELS if run.task is Task.sequence_classification else None
    given: dict[str, Any] = {
        "run": run,
        "stage": stage,
        "seed": 0,
        "device": CPU,
        "clock": PhaseClock(),
        "out": out,
        "data": SimpleNamespace(digest="d" * 32, labels=labels, splits={"train": []}),
        "checkpoints": root / "checkpoints",
        "like": None,
        "matched_flops": None,
        "points": lambda *_: None,
        "history": history_at,
        "checkpointed": lambda step: None,
        "resumed": lambda step, history: None,
        "should_stop": lambda: None,
        "progress": progress,
        "say": lambda text: None,
        **changes,
    }
    return Context(**given)


def capture(root: Path, run: Run, teacher: Artifact, **changes: Any) -> Output:
    return run.stages["capture"].run({"teacher": teacher}, context(root, run, **changes))


def windows_of(documents: list[Any], run: Run, seed: int = 0) -> PackedBatches:
    return PackedBatches(
        documents,
        sequence_length=run.training.sequence_length,
        batch_size=run.training.batch_size,
        seed=seed,
    )


@pytest.fixture
def made(tmp_path: Path, documents: list[Any], teachers: dict[Task, Artifact]) -> tuple[Path, Run]:
    run = make_run(draws=12)
    capture(tmp_path, run, teachers[Task.causal_lm])
    return tmp_path / "out", run


def open_checked(
    folder: Path, run: Run, documents: list[Any], teacher: Artifact, **changes: Any
) -> TeacherCache:
    """Open a cache as the student's stage does."""
    ctx = context(folder.parent, run, "student")
    windows = windows_of(documents, run)
    wanted = _expected(
        run.stages["student"], windows, changes.pop("tokenizer", byte_tokenizer()), teacher, ctx
    )
    cache = TeacherCache(folder, KEY)
    rows = needed(windows, run.training.steps, run.training.batch_size)
    cache.check({**wanted, **changes}, windows, rows)
    return cache


# -- what it holds --------------------------------------------------------------------------------


def test_it_holds_what_the_teacher_says_on_the_windows_that_the_student_reads(
    made: tuple[Path, Run], documents: list[Any], teachers: dict[Task, Artifact]
) -> None:
    folder, run = made
    cache = open_checked(folder, run, documents, teachers[Task.causal_lm])
    windows, teacher = (
        windows_of(documents, run),
        load_model(teachers[Task.causal_lm].path, Task.causal_lm),
    )
    rows = [row for step in range(5) for row in windows.rows(step)]
    assert cache.manifest["windows"] == len(set(rows)) < windows.num_rows
    batch = windows.read(np.array(rows[:4]))
    with torch.no_grad():
        keep = batch["labels"] != -100
        logits = teacher(
            **{name: x for name, x in batch.items() if name != "labels"}, use_cache=False
        ).logits[keep]
    said = cache.target(rows[:4])
    assert isinstance(said, Sparse)
    p = torch.softmax(logits, -1)
    assert said.ids.shape == (keep.sum(), said.ids.shape[1])
    torch.testing.assert_close(said.entropy, torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.probabilities.sum(-1), torch.ones(len(p)))
    counts, expected_counts = said.probabilities * 12, 12 * p.gather(1, said.ids)
    assert ((counts - expected_counts).abs() < 2).all()
    assert cache.manifest["tokens"] == sum(
        int((windows.read(np.array([row]))["labels"] != -100).sum()) for row in {*rows}
    )


def test_top_k_holds_the_largest_and_the_rest(
    tmp_path: Path, documents: list[Any], teachers: dict[Task, Artifact]
) -> None:
    run = make_run(method=CaptureMethod.top_k, k=5, temperature=2.0)
    run.stages["student"].temperature = 2.0
    capture(tmp_path, run, teachers[Task.causal_lm])
    cache = open_checked(tmp_path / "out", run, documents, teachers[Task.causal_lm])
    windows, teacher = (
        windows_of(documents, run),
        load_model(teachers[Task.causal_lm].path, Task.causal_lm),
    )
    rows = windows.rows(0)
    batch = windows.read(rows)
    with torch.no_grad():
        logits = teacher(
            **{name: x for name, x in batch.items() if name != "labels"}, use_cache=False
        ).logits[batch["labels"] != -100]
    said, top = cache.target(rows.tolist()), torch.softmax(logits / 2, -1).topk(5)
    assert isinstance(said, Sparse)
    assert said.residual is not None
    torch.testing.assert_close(said.probabilities, top.values, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(said.residual, 1 - top.values.sum(-1), rtol=1e-3, atol=1e-6)


def test_the_head_of_the_teacher_never_sees_more_than_a_chunk(
    tmp_path: Path,
    documents: list[Any],
    teachers: dict[Task, Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three tokens a chunk."""
    run = make_run(draws=12)
    capture(tmp_path / "whole", run, teachers[Task.causal_lm])
    monkeypatch.setattr(capture_module, "TILE_BYTES", 3 * capture_module.LOGIT_BYTES * 259)
    seen: list[int] = []
    products = Head.products
    monkeypatch.setattr(
        Head, "products", lambda head, h: (seen.append(len(h)), products(head, h))[1]
    )
    capture(tmp_path / "chunks", run, teachers[Task.causal_lm])
    assert max(seen) == 3
    one, other = (
        TeacherCache(tmp_path / name / "out", KEY).manifest for name in ("whole", "chunks")
    )
    assert one["tokens"] == other["tokens"]


def test_the_step_it_gives_is_the_live_teachers_on_average(
    tmp_path: Path, documents: list[Any], teachers: dict[Task, Artifact]
) -> None:
    """The sampled loss and gradient of a batch, over 8 seeds of draws, against the live
    teacher's.
    """
    student, live = tiny(Task.causal_lm), load_model(teachers[Task.causal_lm].path, Task.causal_lm)
    loss, clock = Loss(0.3), PhaseClock()
    run = make_run(draws=12, training={"steps": 100})  # all windows
    windows = windows_of(documents, run)
    batch = {**windows.batch(0), "windows": torch.from_numpy(windows.rows(0))}

    def step(teacher: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
        student.zero_grad()
        done = Objective(student, Task.causal_lm, Precision.fp32, CPU, clock, teacher)(batch)
        done.loss.backward()
        return done.loss.item(), torch.cat(
            [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        )

    value, gradient = step(Teacher(live, Precision.fp32, loss), windows.batch(0))
    values, gradients = [], []
    for seed in range(8):
        capture(tmp_path / str(seed), run, teachers[Task.causal_lm], seed=seed)
        cache = TeacherCache(tmp_path / str(seed) / "out", KEY)
        cache.check({}, windows, needed(windows, 100, 4))
        one, other = step(CachedTeacher(cache, loss), batch)
        values.append(one)
        gradients.append(other)
    each = torch.stack(gradients)
    spread = (each - each.mean(0)).norm(dim=1).mean()
    assert (each.mean(0) - gradient).norm() < 2 * spread / len(each) ** 0.5
    assert np.mean(values) == pytest.approx(value, abs=4 * np.std(values) / len(values) ** 0.5)


def test_classes_are_kept_whole_and_the_loss_is_the_live_teachers(
    tmp_path: Path, documents: list[Any], teachers: dict[Task, Artifact]
) -> None:
    task = Task.sequence_classification
    run = make_run(task)
    capture(tmp_path, run, teachers[task])
    manifest = read_json(tmp_path / "out" / MANIFEST)
    assert (manifest["method"], manifest["columns"]) == ("dense", {"logits": "float32"})
    padded = PaddedBatches(documents, batch_size=4, seed=0, padding=Padding(0))
    cache = TeacherCache(tmp_path / "out", KEY)
    wanted = _expected(
        run.stages["student"],
        padded,
        byte_tokenizer(),
        teachers[task],
        context(tmp_path, run, "student"),
    )
    cache.check(wanted, padded, needed(padded, 5, 4))
    student, live = tiny(task), load_model(teachers[task].path, task, labels=LABELS)
    loss, clock = Loss(0.3, temperature=2.0), PhaseClock()
    for step in range(5):
        cached = Objective(student, task, Precision.fp32, CPU, clock, CachedTeacher(cache, loss))
        ours = cached(IndexedBatches(padded, cache).batch(step))
        theirs = Objective(
            student, task, Precision.fp32, CPU, clock, Teacher(live, Precision.fp32, loss)
        )(padded.batch(step))
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-4)


def test_what_is_read_ahead_is_handed_over_once_and_read_only_then(
    tmp_path: Path, documents: Any, teachers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task.sequence_classification
    run = make_run(task)
    capture(tmp_path, run, teachers[task])
    padded, cache = (
        PaddedBatches(documents, batch_size=4, seed=0, padding=Padding(0)),
        TeacherCache(tmp_path / "out", KEY),
    )
    cache.check({}, padded, needed(padded, 5, 4))
    rows, reads = padded.rows(0).tolist(), []
    parts = TeacherCache._parts
    monkeypatch.setattr(
        TeacherCache, "_parts", lambda self, some: reads.append(list(some)) or parts(self, some)
    )
    plain = cache.target(rows)
    windows = IndexedBatches(padded, cache, num_micro=2).batch(0)["windows"]
    assert reads == [rows, rows[:2], rows[2:]]
    ahead = [cache.target(part.tolist()) for part in windows.chunk(2)]
    assert len(reads) == 3
    assert torch.equal(torch.cat(ahead), plain)
    cache.target(rows[:2])
    assert len(reads) == 4


# -- going on -------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "SHARD_TOKENS", 64)  # one batch of four windows


def test_a_stopped_capture_goes_on_from_what_verifies_and_ends_with_the_same_bytes(
    tmp_path: Path, documents: list[Any], teachers: dict[Task, Artifact], small_shards: None
) -> None:
    run, teacher = make_run(draws=12), teachers[Task.causal_lm]
    capture(tmp_path / "whole", run, teacher)
    whole = content(tmp_path / "whole" / "out")
    assert len(whole) >= 5  # shards and manifest
    asked, steps, resumed, said = [0], list[int](), list[Any](), list[str]()

    def stop_at_third() -> type[Exception] | None:
        asked[0] += 1
        return Preempted if asked[0] == 3 else None

    parts = tmp_path / "parts"
    with pytest.raises(Preempted, match=r"stopped after 3 of \d shards; the same command resumes"):
        capture(parts, run, teacher, should_stop=stop_at_third, checkpointed=steps.append)
    assert steps == [1, 2, 3]
    assert not list((parts / "out").iterdir())  # no manifest and no shard before all is there
    with (parts / "checkpoints" / shard_name(1)).open("r+b") as file:  # one is damaged meanwhile
        file.seek(400)
        file.write(b"\xff\xff\xff")
    (parts / "checkpoints" / f".{shard_name(3)}.torn").write_bytes(b"half")
    again: list[int] = []
    output = capture(
        parts,
        run,
        teacher,
        checkpointed=again.append,
        say=said.append,
        resumed=lambda step, history: resumed.append((step, history)),
    )
    assert resumed == [(3, history_at(3))]
    assert [note for note in said if "shard" in note] == [
        "capture: shard-00001.safetensors is damaged and captured anew"
    ]
    assert len(again) == len(whole) - 1 - 2  # of the shards, two were there
    assert content(parts / "out") == whole
    assert not list((parts / "checkpoints").glob(".shard-*"))
    full = capture(tmp_path / "third", run, teacher)
    assert output.counts["model_flops"] == full.counts["model_flops"]


def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else(
    tmp_path: Path, documents: list[Any], teachers: dict[Task, Artifact]
) -> None:
    run = make_run(draws=12, training={"steps": 100})  # all windows, whatever their order
    shards = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        capture(tmp_path / name, run, teachers[Task.causal_lm], seed=seed)
        shards[name] = (tmp_path / name / "out" / shard_name(0)).read_bytes()
    assert shards["a"] == shards["b"] != shards["c"]


def test_every_window_has_chance_of_its_own_in_whatever_batch_it_comes() -> None:
    source: Any = SimpleNamespace(seed=5, codec=SimpleNamespace(draws=12))
    together = capture_module._uniforms(source, [3, 9], [4, 4])
    assert np.array_equal(together[:4], capture_module._uniforms(source, [3], [4]))
    assert np.array_equal(together[4:], capture_module._uniforms(source, [9], [4]))
    assert not np.isin(together[:4], together[4:]).any()


def test_the_flops_are_those_of_one_forward_pass_over_the_windows(
    tmp_path: Path, documents: list[Any], teachers: dict[Task, Artifact]
) -> None:
    from pipeline.ledger.flops import count_flops

    run, clock = make_run(draws=12), PhaseClock()
    output = capture(tmp_path, run, teachers[Task.causal_lm], clock=clock)
    each = count_flops(tiny(Task.causal_lm), Task.causal_lm, backward=False)
    manifest = read_json(tmp_path / "out" / MANIFEST)
    by_hand = manifest["windows"] * each(16, 0) + manifest["tokens"] * each.predicted
    assert output.counts["model_flops"].value == pytest.approx(by_hand)
    assert set(output.counts) == {
        "model_flops",
        "tokens",
        "target_tokens",
        "active_parameter_share",
    }
    assert output.counts["target_tokens"].value == manifest["tokens"]
    windows = windows_of(documents, run)
    rows = needed(windows, run.training.steps, run.training.batch_size)
    assert output.counts["tokens"].value == num_tokens(windows.read(rows))
    assert output.seconds_in_steps == pytest.approx(clock.read_ns()["capture"] / 1e9, rel=0.2)


# -- what it is refused for -----------------------------------------------------------------------


def refused(folder: Path, run: Run, documents: list[Any], teacher: Artifact, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        open_checked(folder, run, documents, teacher, **changes)
    line = str(error.value)
    assert line.startswith(f"{KEY}: ")
    assert "\n" not in line
    return line


def test_a_cache_of_something_else_is_refused_by_name(
    made: tuple[Path, Run], documents: list[Any], teachers: dict[Task, Artifact], tmp_path: Path
) -> None:
    folder, run = made
    teacher = teachers[Task.causal_lm]
    open_checked(folder, run, documents, teacher)
    other = artifact(saved(tiny(Task.causal_lm, seed=4), tmp_path / "other"))
    assert "made with another teacher;" in refused(folder, run, documents, other)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    assert "made with another tokenizer;" in refused(
        folder, run, documents, teacher, tokenizer=tokenizer
    )
    assert "made with other data;" in refused(folder, run, documents, teacher, data="e" * 32)
    longer = make_run(draws=12, training={"sequence_length": 32})
    assert "(sequence_length 16, not 32)" in refused(folder, longer, documents, teacher)
    assert "another temperature (1.0, not 2.0)" in refused(
        folder, run, documents, teacher, temperature=2.0
    )
    assert "another method (sample, not top_k)" in refused(
        folder, run, documents, teacher, method="top_k"
    )
    assert "another number of draws (12, not 16)" in refused(
        folder, make_run(draws=16), documents, teacher
    )
    bf16 = make_run(draws=12, precision=Precision.bf16)
    assert "another precision (fp32, not bf16)" in refused(folder, bf16, documents, teacher)
    assert "packed into other windows" in refused(
        folder, run, [*documents[1:], documents[0]], teacher
    )
    more = make_run(draws=12, training={"steps": 6})
    assert "lacks 4 of the 24 windows" in refused(folder, more, documents, teacher)


def vouch(folder: Path) -> None:
    """Have the manifest vouch for what lies in the first shard."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    manifest["shards"][0]["sha256"] = file_sha256(folder / shard_name(0))
    seal_manifest(folder, manifest)


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change a shard's columns and have the manifest vouch for it."""
    from safetensors.numpy import load_file, save_file

    path = folder / shard_name(0)
    columns = {name: column.copy() for name, column in load_file(path).items()}
    change(columns)
    path.unlink()  # another name of the checkpoint's file
    save_file(columns, path)
    vouch(folder)


def test_a_damaged_cache_is_refused(
    made: tuple[Path, Run], documents: list[Any], teachers: dict[Task, Artifact]
) -> None:
    folder, run = made
    args = run, documents, teachers[Task.causal_lm]
    path = folder / shard_name(0)
    whole = path.read_bytes()
    for at in (len(whole) // 3, len(whole) - 1):
        path.unlink()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert (
            "shard-00000.safetensors of the cache is damaged: it does not have its checksum"
            in refused(folder, *args)
        )
    path.write_bytes(b"nothing that was ever captured")
    vouch(folder)
    assert "shard-00000.safetensors of the cache cannot be read" in refused(folder, *args)
    path.unlink()
    assert "shard-00000.safetensors of the cache is missing" in refused(folder, *args)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"draws": 12', '"draws": 13'))
    assert "manifest.json of the cache is damaged: it does not have its digest" in refused(
        folder, *args
    )
    (folder / MANIFEST).unlink()
    assert "has no manifest of format 1" in refused(folder, *args)


def test_a_student_of_fewer_tokens_is_refused(
    made: tuple[Path, Run], documents: list[Any], teachers: dict[Task, Artifact]
) -> None:
    folder, run = made
    ctx, stage = context(folder.parent, run, "student"), run.stages["student"]
    inputs = {
        "teacher": teachers[Task.causal_lm],
        "cache": Artifact(folder, "teacher_cache", "0" * 32, 1),
    }
    args = stage, inputs, windows_of(documents, run)
    assert open_cache(*args, 259, byte_tokenizer(), run.training, ctx).cache.vocabulary == 259
    with pytest.raises(
        UserError, match="the cache speaks of 259 tokens or classes, the student has 258"
    ):
        open_cache(*args, 258, byte_tokenizer(), run.training, ctx)


def test_shuffled_windows_are_refused_though_every_checksum_holds(
    made: tuple[Path, Run], documents: list[Any], teachers: dict[Task, Artifact]
) -> None:
    folder, run = made
    args = run, documents, teachers[Task.causal_lm]

    def turn(name: str) -> Callable[[dict[str, np.ndarray]], None]:
        return lambda columns: columns.update({name: np.roll(columns[name], 1, axis=0)})

    for name in ("windows", "digests", "entropy", "entries"):
        backup = copy.copy((folder / shard_name(0)).read_bytes())
        edit(folder, turn(name))
        assert "was captured for other tokens: it is shuffled" in refused(folder, *args)
        (folder / shard_name(0)).write_bytes(backup)
    edit(folder, lambda columns: None)
    open_checked(folder, *args)


# -- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sample", "top_k"])
@pytest.mark.parametrize("vocabulary", [1024, 50_257, 152_064])
def test_a_token_takes_at_most_72_bytes_on_disk_with_the_defaults(
    tmp_path: Path, vocabulary: int, method: str
) -> None:
    """Windows of the embedded recipe's length, from a teacher that knows nothing: no two draws fall
    together.
    """
    from pipeline.distillation.sparse import Sampled, TopK

    make: dict[str, Any] = {
        "sample": lambda: Sampled(Sampled.most(vocabulary), vocabulary, 1.0),
        "top_k": lambda: TopK(TopK.most(vocabulary), vocabulary, 1.0),
    }
    codec = make[method]()
    parts = []
    for window in range(4):
        chance = torch.from_numpy(np.random.default_rng(window).random((128, codec.draws)))
        drawn = codec.of(torch.zeros(128, vocabulary), chance)
        parts.append(codec.pack({name: part.numpy() for name, part in drawn.items()}))
    write_shard(tmp_path / "shard", range(4), [b""] * 4, parts)
    assert (tmp_path / "shard").stat().st_size / (4 * 128) <= TOKEN_BYTES
