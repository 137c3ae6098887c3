"""What a capture does: a frozen teacher over the windows of a training, shard by shard, each shard
kept when whole.

A shard lies in the stage's checkpoint folder with a record of its checksum beside it. A capture
that was stopped resumes from the shards whose checksums hold; since chance is a function of (seed,
window) and windows always meet in the same batches, it ends with the same bytes. The teacher's head
is applied chunk by chunk: nothing of tokens x vocabulary exists beyond a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.settings.distillation import CaptureMethod
from pipeline.config.settings.precision import Precision
from pipeline.data.batches import IGNORE, num_tokens
from pipeline.data.padding import logits_of
from pipeline.data.tokenizer import tokenizer_digest
from pipeline.distillation.cache import (
    Windows,
    file_sha256,
    needed,
    packing_digest,
    place,
    shard_name,
    write_manifest,
    write_shard,
)
from pipeline.distillation.head import TILE_BYTES, Head
from pipeline.distillation.sparse import Codec, Columns, Dense, Sampled, TopK
from pipeline.distillation.transform import Transform, Unknown
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.numbers import how_many
from pipeline.ledger.records import SHARD, read_record
from pipeline.ledger.shapes import CacheFacts, CacheManifest, CacheShard, Shard
from pipeline.ledger.values import measured, null
from pipeline.models.load import load_model, load_tokenizer
from pipeline.stages.base import TEACHER
from pipeline.stages.context import Output
from pipeline.stages.settings import steps_of, training_precision
from pipeline.stages.step_flops import ModelFlops, StepFlops
from pipeline.stages.training import make_batches, read_encoded
from pipeline.store.artifacts import check_room, write_json
from pipeline.tasks.table import Task
from pipeline.training.objective import NOT_INPUTS, columns_of, full_logits_note
from pipeline.training.precision import arithmetic, compute_dtype, frozen, round_weights
from pipeline.training.ranks import agreed_stop
from pipeline.training.reading import (
    Documents,
    Examined,
    examine,
    full_logits,
    hidden_states,
    read_inputs,
)

if TYPE_CHECKING:
    from pipeline.config.settings.training import TrainingConfig
    from pipeline.stages.capture_settings import CaptureSettings
    from pipeline.stages.context import Context
    from pipeline.store.artifacts import Artifact

SHARD_TOKENS = 2**17  # of a shard: seconds of work for most teachers, 9 MB at most
# that a chunk takes per logit: fp32 logits and probabilities, fp64 cumulative ones, and one copy
LOGIT_BYTES = 24


@dataclass(frozen=True, slots=True)
class _Source:
    """The frozen teacher and what it reads."""

    model: Any
    task: Task
    precision: Precision
    device: torch.device
    examined: Examined | None  # how a language model is to be read
    windows: Windows
    codec: Codec
    seed: int
    flops: ModelFlops


@dataclass(slots=True)
class _Shard:
    """What was captured for some windows, before it is written."""

    rows: list[int] = field(default_factory=list)
    parts: list[Columns] = field(default_factory=list)
    tokens: int = 0  # captured: targets, or examples
    read: int = 0
    flops: float = 0.0


def run_capture(stage: CaptureSettings, inputs: Mapping[str, Artifact], ctx: Context) -> Output:
    """Capture as `stage` says and leave shards and manifest in `ctx.out`."""
    settings = stage.batches_like(ctx.run)
    assert settings is not None
    source, tokenizer = _open(stage, settings, inputs[TEACHER], ctx)
    settings.steps = steps_of(settings, source.windows.num_rows)
    with ctx.clock.phase("prepare"):
        rows = needed(source.windows, settings.steps, settings.batch_size)
        micro = settings.batch_size // settings.gradient_accumulation
        plan = list(_plan(rows, micro, settings.sequence_length))
    records = _all_shards(source, plan, micro, ctx)
    if not ctx.ranks.is_first:  # the first one seals them
        return Output()
    with ctx.clock.phase("checkpoint"):
        facts = _facts(source, settings, inputs[TEACHER], tokenizer, ctx.data.digest)
        # Hard links where the disk has them: shards are not written twice.
        for number in range(len(plan)):
            place(ctx.checkpoints / shard_name(number), ctx.out / shard_name(number))
        shards: list[CacheShard] = [
            {
                "sha256": record["sha256"],
                "windows": record["windows"],
                "tokens": record["tokens"],
                "bytes": record["bytes"],
            }
            for record in records
        ]
        manifest = write_manifest(ctx.out, facts, shards)
    output = _output(source, stage, records, manifest, ctx)
    if source.examined is None or not isinstance(source.examined.head, Unknown):
        return output
    tokens = micro * settings.sequence_length
    said = full_logits_note(source.model, source.examined.head, tokens, source.precision)
    return replace(output, notes=(*output.notes, f"{ctx.stage}: {said}"))


def _open(
    stage: CaptureSettings, settings: TrainingConfig, teacher: Artifact, ctx: Context
) -> tuple[_Source, Any]:
    """Load the teacher, and lay out what it is to read."""
    task = ctx.run.task
    with ctx.clock.phase("model_load"):
        model = load_model(teacher.path, task, device=ctx.device, labels=ctx.data.labels)
        model.requires_grad_(requires_grad=False)
        tokenizer = load_tokenizer(teacher.path)
    with ctx.clock.phase("prepare"):
        examined = None
        if task.kind.is_language:
            examined = examine(model, ctx.device, settings.attention)
        encoded, apart = (
            read_encoded(model, tokenizer, settings, ctx),
            examined is not None and not examined.packs,
        )
        windows = make_batches(model, tokenizer, encoded, settings, ctx, apart=apart)
        flops = ModelFlops.of(model, task, backward=False)
        codec = _codec(stage, model, examined, tokenizer, ctx)
    precision = frozen(training_precision(stage, ctx.run), ctx.device)
    round_weights(model, precision)
    return (
        _Source(model, task, precision, ctx.device, examined, windows, codec, ctx.seed, flops),
        tokenizer,
    )


def _codec(
    stage: CaptureSettings, model: Any, examined: Examined | None, tokenizer: Any, ctx: Context
) -> Codec:
    """Return what packs the distributions: over the tokens that the tokenizer has, not over a
    head's padding.
    """
    if examined is None:
        if stage.method is not CaptureMethod.sample or stage.draws is not None:
            ctx.say(
                f"{ctx.stage}: method, draws and k have no effect: all logits of the classes are"
                " kept"
            )
        return Dense(model.config.num_labels)
    vocabulary = min(max(tokenizer.get_vocab().values()) + 1, columns_of(model, examined.head))
    temperature = stage.captured(ctx.run)["temperature"]
    if stage.method is CaptureMethod.top_k:
        return TopK(min(stage.k or TopK.most(vocabulary), vocabulary), vocabulary, temperature)
    return Sampled(stage.draws or Sampled.most(vocabulary), vocabulary, temperature)


def _facts(
    source: _Source, settings: TrainingConfig, teacher: Artifact, tokenizer: Any, data: str
) -> CacheFacts:
    """Return what a cache is made from and with."""
    codec = source.codec
    return {
        "method": codec.method,
        "draws": codec.draws or None,
        "k": codec.k if isinstance(codec, TopK) else None,
        "temperature": None if isinstance(codec, Dense) else codec.temperature,
        "vocabulary": codec.vocabulary,
        "precision": source.precision.value,
        "seed": source.seed,
        "sequence_length": settings.sequence_length,
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "teacher": teacher.digest,
        "data": data,
        "tokenizer": tokenizer_digest(tokenizer),
        "packing": packing_digest(source.windows),
    }


def _plan(rows: np.ndarray, micro: int, sequence_length: int) -> Iterator[list[int]]:
    """Yield the windows of each shard: whole batches, so that a window always meets the same
    others.
    """
    # A multiple of the batch: rounding of a product depends on what is computed beside it.
    size = max(1, SHARD_TOKENS // (sequence_length * micro)) * micro
    for start in range(0, len(rows), size):
        yield rows[start : start + size].tolist()


# -- shards ---------------------------------------------------------------------------------------


def _all_shards(
    source: _Source, plan: Sequence[list[int]], micro: int, ctx: Context
) -> list[Shard]:
    """Capture the shards that are not there yet, in turns of one a rank; return the records of
    all, by number.

    Raises:
        Exception: What `ctx.should_stop` names, between two shards.
    """
    ranks = ctx.ranks
    ranks.assemble()
    found: dict[int, Shard] = ranks.told(_verified(ctx, len(plan)) if ranks.is_first else None)
    missing = [number for number in range(len(plan)) if number not in found]
    done = sum(len(rows) for number, rows in enumerate(plan) if number in found)
    tokens = sum(record["tokens"] for record in found.values())
    step = max((record["step"] for record in found.values()), default=0)
    with ctx.progress(ctx.stage, sum(map(len, plan))) as advance:
        for start in range(0, len(missing), ranks.size):
            turn = missing[start : start + ranks.size]
            made = None
            if ranks.rank < len(turn):
                number = turn[ranks.rank]
                own = step + 1 + ranks.rank
                made = _one_shard(source, plan[number], number, own, micro, ctx)
            step += len(turn)
            with ctx.clock.phase("comm_wait") if ranks.several else nullcontext():
                everyones = ranks.gathered(made)
                stop = agreed_stop(ctx.should_stop(), ranks)
            found |= {
                number: record
                for number, record in zip(turn, everyones, strict=False)
                if record is not None
            }
            done += sum(len(plan[number]) for number in turn)
            tokens += sum(found[number]["tokens"] for number in turn)
            advance(done, tokens)
            # With the last shard there is nothing left to resume.
            if stop is not None and len(found) < len(plan):
                raise stop(
                    f"stopped after {len(found)} of {len(plan)} shards; the same command resumes"
                    " from there"
                )
    return [found[number] for number in range(len(plan))]


def _verified(ctx: Context, num_shards: int) -> dict[int, Shard]:
    """Return the records of the shards of earlier attempts whose checksums hold, and say that they
    are resumed from.
    """
    found: dict[int, Shard] = {}
    with ctx.clock.phase("checkpoint"):
        ctx.checkpoints.mkdir(parents=True, exist_ok=True)
        # by a killed process: only one at a time makes an artifact
        for left in ctx.checkpoints.glob(".shard-*"):
            left.unlink()
        for number in range(num_shards):
            path = ctx.checkpoints / shard_name(number)
            record = read_record(_record(path), SHARD, so="its shard is captured anew")
            if record is None:
                continue
            if path.is_file() and file_sha256(path) == record["sha256"]:
                found[number] = record
            else:
                ctx.say(f"{ctx.stage}: {path.name} is damaged and captured anew")
    with ctx.clock.phase("log"):
        newest = max(found.values(), key=lambda record: record["step"], default=None)
        ctx.resumed(
            0 if newest is None else newest["step"], [] if newest is None else newest["history"]
        )
    return found


def _record(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _one_shard(
    source: _Source, rows: list[int], number: int, step: int, micro: int, ctx: Context
) -> Shard:
    """Capture one shard and commit it: the shard first, then the record that vouches for it."""
    before = ctx.clock.now_ns()
    with ctx.clock.phase("capture"):
        shard = _captured(source, rows, micro)
    capture_ns = ctx.clock.now_ns() - before
    with ctx.clock.phase("checkpoint"):
        size = sum(column.nbytes for part in shard.parts for column in part.values())
        check_room(ctx.checkpoints, 2 * size, "tracking.root")
        path = ctx.checkpoints / shard_name(number)
        contents = [source.windows.content(row) for row in rows]
        record: Shard = {
            "sha256": write_shard(path, rows, contents, shard.parts),
            "windows": len(rows),
            "tokens": shard.tokens,
            "read": shard.read,
            "bytes": path.stat().st_size,
            "flops": shard.flops,
            "capture_ns": capture_ns,
            "step": step,
            "history": ctx.history(step),
        }
        # After the shard: a shard without its record is captured anew.
        write_json(_record(path), record)
    with ctx.clock.phase("log"):
        ctx.checkpointed(step)
    return record


def _captured(source: _Source, rows: list[int], micro: int) -> _Shard:
    shard = _Shard(rows)
    with torch.inference_mode(), arithmetic(source.precision, source.device):
        for start in range(0, len(rows), micro):
            some = rows[start : start + micro]
            batch = source.windows.read(np.array(some))
            sizes = _predicted(batch["labels"])
            drawn = _drawn(source, batch, some, sizes)
            # Targets of all rows lie one after the other: each row's part is cut out.
            ends = np.cumsum(sizes)
            shard.parts += [
                source.codec.pack(
                    {name: column[end - size : end] for name, column in drawn.items()}
                )
                for size, end in zip(sizes, ends.tolist(), strict=True)
            ]
            shard.tokens += sum(sizes)
            shard.read += num_tokens(batch)
            count, length = batch["input_ids"].shape
            full = source.examined is not None and isinstance(source.examined.head, Unknown)
            shard.flops += source.flops.per_sequence.batch(
                count, length, count * length if full else sum(sizes)
            )
    return shard


def _predicted(labels: Tensor) -> list[int]:
    """Return how many targets each row has: its predicted tokens, or one class."""
    return (labels != IGNORE).reshape(len(labels), -1).sum(1).tolist()


def _drawn(source: _Source, batch: dict[str, Tensor], rows: list[int], sizes: list[int]) -> Columns:
    """Return what the codec keeps of the teacher's distributions on all targets of a batch, on the
    host.
    """
    keep = (batch["labels"].flatten() != IGNORE).nonzero().flatten().to(source.device)
    inputs = {
        name: tensor.to(source.device) for name, tensor in batch.items() if name not in NOT_INPUTS
    }
    chance = torch.from_numpy(_uniforms(source, rows, sizes)).to(source.device)
    if source.examined is None:
        logits = logits_of(source.model, inputs)[keep].float()
        chunks = [source.codec.of(logits, chance)]
    else:
        read, documents = (
            source.examined,
            Documents.of(inputs["position_ids"], batch["position_ids"]),
        )
        give = full_logits if isinstance(read.head, Unknown) else hidden_states
        told = documents.told(source.model, read, source.precision)
        given = give(source.model, read_inputs(inputs, read), told).flatten(0, 1)[keep]
        chunks = list(_by_chunks(source, read.head, given, chance))
    return {name: torch.cat([chunk[name] for chunk in chunks]).cpu().numpy() for name in chunks[0]}


def _uniforms(source: _Source, rows: list[int], sizes: list[int]) -> np.ndarray:
    """Return chance for every draw of a batch, (N, draws): a function of seed and window alone."""
    draws = source.codec.draws
    each = [
        # A generator for each window: neither order nor batch changes what is drawn.
        np.random.default_rng((source.seed, row)).random((size, draws))
        for row, size in zip(rows, sizes, strict=True)
    ]
    return np.concatenate(each)


def _by_chunks(
    source: _Source, head: Transform | Unknown, given: Tensor, chance: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Yield what is kept of each chunk of tokens; its logits are gone with it.

    Args:
        given: (N, H) hidden states, or (N, V) logits of a model whose head is unknown.
    """
    dtype, vocabulary = compute_dtype(source.precision), source.codec.vocabulary
    known = None if isinstance(head, Unknown) else Head.of(source.model, head).to(dtype)
    budget = device_of(source.device).chunk_bytes or TILE_BYTES
    rows = max(1, budget // (LOGIT_BYTES * columns_of(source.model, head)))
    with torch.autocast(source.device.type, enabled=False):
        # At least once, so that an empty batch still has columns.
        for start in range(0, max(len(given), 1), rows):
            part = slice(start, start + rows)
            logits = given[part].float() if known is None else known.logits(given[part].to(dtype))
            yield source.codec.of(logits[:, :vocabulary], chance[part])


def _output(
    source: _Source,
    stage: CaptureSettings,
    records: Sequence[Shard],
    manifest: CacheManifest,
    ctx: Context,
) -> Output:
    """Return the teacher's FLOPs, tokens and time; nothing was trained, so there are no steps."""
    flops = sum(record["flops"] or 0.0 for record in records)
    is_language = source.task.kind.is_language
    counts = {
        "tokens": measured(sum(record["read"] for record in records)),
        "target_tokens": (
            measured(manifest["tokens"]) if is_language else null("labels are learnt, not tokens")
        ),
    }
    kept = {
        "sample": how_many(manifest["draws"] or 0, "draw"),
        "top_k": f"the {manifest['k']} largest",
        "dense": "all logits",
    }
    what = how_many(manifest["tokens"], "predicted token" if is_language else "example")
    note = (
        f"{ctx.stage}: {what} of {how_many(manifest['windows'], 'window')},"
        f" {kept[manifest['method']]}, {manifest['bytes_per_token']:.1f} bytes each"
    )
    seconds = sum(record["capture_ns"] for record in records) / 1e9
    counted = StepFlops(
        source.flops.per_sequence, why=source.flops.why, why_no_rule=source.flops.why_no_rule
    )
    counts |= {
        "model_flops": counted.total(flops),
        "active_parameter_share": source.flops.active_share(source.model),
    }
    said = tuple(
        f"{ctx.stage}: {each}" for each in (source.flops.said(source.model),) if each is not None
    )
    return counted.add_to(
        Output(counts=counts, seconds_in_steps=seconds, notes=(note, *said)), flops
    )
