"""Proof that a saved model is the model that was made: bit-equal outputs after a reload in a fresh
process.

Bit equality and no tolerance: the known fault (NF4 saved after a forward on a CPU) moved logits by
as little as 0.008. The reference is the model in memory, run only after it was saved, because
running it is what spoils it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageFailed
from pipeline.models.load import positions
from pipeline.models.vocabulary import vocabulary_of
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pipeline.quantization.fresh_process import Arithmetic, Request

PROBE_TOKENS = 32
ANY_VOCABULARY = 128  # of models that read letters: ASCII
RESERVED = 2  # positions that RoBERTa's kin count and cannot use
PROGRAM = Path(__file__).with_name("fresh_process.py")
NO_MEMORY = ("MemoryError", "OutOfMemoryError", "DefaultCPUAllocator", "out of memory")
Probes = tuple[tuple[int, ...], ...]


class NoReload(RuntimeError):
    """What was saved cannot be loaded, or run, by its library: the format is none for this
    model.
    """


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model in memory answered to each probe.

    Attributes:
        probes: Token ids, one sequence each.
        digests: sha256 of the logits, one per probe.
        arithmetic: Thread count and matrix precision it was computed with.
    """

    probes: Probes
    digests: tuple[str, ...]
    arithmetic: Arithmetic


def auto_class(task: Task) -> Any:
    """Return the transformers class that loads a model for `task`."""
    import transformers

    return getattr(transformers, task.kind.auto_class)


def make_probes(
    vocabulary_size: int, max_tokens: int = PROBE_TOKENS, end: int | None = None
) -> Probes:
    """Return the fixed inputs, by ids of tokens: a sequence, the same again (a first forward may
    change weights), and a single token.

    A single token is its own case because kernels treat it as one (decoding).

    Args:
        vocabulary_size: Of the model's embedding.
        max_tokens: What the model can read.
        end: The end token, which each ends with and none holds elsewhere: some classifiers find it.
    """
    stride = 7919  # a prime, so that small and large ids both occur
    ids = [(stride * index + 1) % vocabulary_size for index in range(min(PROBE_TOKENS, max_tokens))]
    if end is not None and 0 <= end < vocabulary_size:
        ids = [
            *(token if token != end else (token + 1) % vocabulary_size for token in ids[:-1]),
            end,
        ]
    return tuple(ids), tuple(ids), tuple(ids[-1:])


def take_reference(model: PreTrainedModel) -> Reference:
    """Run `model` (in memory, already saved) on the probes."""
    from pipeline.quantization.fresh_process import forward_digests, read_arithmetic

    limit, end = (
        positions(model.config),
        getattr(model.config.get_text_config(), "eos_token_id", None),
    )
    room = PROBE_TOKENS if limit is None else max(1, limit - RESERVED)
    probes = make_probes(
        vocabulary_of(model) or ANY_VOCABULARY, room, end[0] if isinstance(end, list) else end
    )
    *longer, single = probes
    digests = forward_digests(model, longer)
    try:
        digests += forward_digests(model, [single])
    except Exception:
        if model.can_generate():  # it decodes token by token
            raise
        # a classifier that pools (Funnel, CANINE) takes no text of one token, in any format
        probes = tuple(longer)
    return Reference(probes, tuple(digests), read_arithmetic())


def check_bit_equal(
    folder: Path, task: Task, reference: Reference, *, device: torch.device | str
) -> None:
    """Load `folder` in one fresh process without this package, and compare its outputs with the
    reference's.

    Raises:
        NoReload: If it cannot be loaded or run there.
        StageFailed: If any output differs in any bit, or the process was killed or had no memory.
    """
    reloaded = _digests_of_fresh_process(
        folder, request_for(folder, task, reference, device=device)
    )
    for index, (expected, found) in enumerate(zip(reference.digests, reloaded, strict=True)):
        if expected != found:
            raise StageFailed(
                f"{folder} is not the model that was quantized: forward {index + 1} of"
                f" {len(reloaded)} differs after a reload in a fresh process (logits sha256"
                f" {expected[:12]} in memory, {found[:12]} reloaded)"
            )


def request_for(
    folder: Path, task: Task, reference: Reference, *, device: torch.device | str
) -> Request:
    """Return what `PROGRAM` is asked: the folder to load, and how to compute what `reference`
    holds.
    """
    return {
        "folder": str(folder.resolve()),
        "auto_class": task.kind.auto_class,
        "device": str(device),
        "probes": reference.probes,
        "arithmetic": reference.arithmetic,
    }


def _digests_of_fresh_process(folder: Path, request: Request) -> list[str]:
    # -P keeps this package's folder off the import path; -I would also drop a PYTHONPATH that torch
    # may come from.
    command = [sys.executable, "-P", "-W", "ignore", str(PROGRAM), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = next(
            (line for line in reversed(done.stderr.splitlines()) if line.strip()),
            f"exit {done.returncode}",
        )
        problem = f"{folder} cannot be loaded in a fresh process: {why.strip()}"
        # A negative code is a signal, such as the kernel's out-of-memory killer.
        of_the_machine = done.returncode < 0 or any(words in done.stderr for words in NO_MEMORY)
        raise StageFailed(problem) if of_the_machine else NoReload(problem)
    return json.loads(done.stdout.splitlines()[-1])
