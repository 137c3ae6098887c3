"""Does vLLM read the artifact that was assessed? Where it is installed it loads the folder and
scores a few documents.

vLLM has loaders and kernels of its own: a format may be refused there, or read as another model. In
a process of its own it finds log-probabilities of the tokens of a few test documents, and their
mean is set beside that of this project's scoring of the same reloaded folder. A check that cannot
run says why, and changes nothing else.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.data.documents import Document
from pipeline.data.encode import Encoded, encode_all
from pipeline.evaluation.quality.assess import choose_documents
from pipeline.evaluation.quality.scoring import score_causal
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.numbers import how_many
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import VllmRecord
from pipeline.models.load import load_config, load_model, load_tokenizer, positions, quantized_by
from pipeline.models.sixteen_bits import stored_dtype
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch

    from pipeline.evaluation.serving.vllm_process import Request

DOCUMENTS = 8
TOKENS = 512  # of each, at most
BYTES_OF_A_TOKEN = 16  # more of a document are not tokenized for each token that is read
TIMEOUT_S = 600.0  # to import vLLM, load a model and score; a minute is usual
# Nats a token. vLLM computes in 16 bits where this project scores unquantized weights in 32. On a
# small model trained for 150 steps that moved a token's log-probability by 0.013 (standard
# deviation), up or down, and the mean over 2,000 tokens by 0.0008 in bf16; scales of NF4 read one
# block off moved the mean by 0.15, a layer that was lost by 0.8.
TOLERANCE = 0.03
FREE_SHARE = 0.8  # of the memory that is free on the device, for vLLM
QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of the check.

    Attributes:
        outcome: `ran`: vLLM scored the documents; `failed`: it could not load or score the folder.
        why: Of what did not run, or failed.
        version: vLLM's; None where it is not installed.
        vllm: Mean log-likelihood a token as vLLM finds it, in nats.
        here: The same as this project scores it.
        agrees: Whether they lie within `tolerance` of each other.
    """

    outcome: Literal["ran", "failed", "not run here"]
    why: str | None = None
    version: str | None = None
    vllm: float | None = None
    here: float | None = None
    tolerance: float = TOLERANCE
    agrees: bool | None = None
    documents: int = 0
    tokens: int = 0

    def to_json(self) -> VllmRecord:
        """Return the form it has in artifact.json; what is not known is left out."""
        known: Any = {name: value for name, value in asdict(self).items() if value is not None}
        return known

    @staticmethod
    def from_json(raw: VllmRecord) -> Checked:
        """Read back what `to_json` wrote."""
        return Checked(**raw)

    def say(self) -> str:
        """Return the outcome in a line."""
        if self.outcome != "ran":
            return f"vLLM: {self.outcome} ({self.why})"
        assert self.vllm is not None
        assert self.here is not None
        verdict = "" if self.agrees else " DISAGREES:"
        return (
            f"vLLM: ran ({self.version}:{verdict} {self.vllm:.4f} nats a token, {self.here:.4f}"
            f" here, {self.vllm - self.here:+.4f} where {self.tolerance} is allowed;"
            f" {how_many(self.documents, 'document')})"
        )


def installed() -> str | None:
    """Return vLLM's version, or None where it cannot be found. It is not imported: that takes
    seconds and a device.
    """
    if importlib.util.find_spec("vllm") is None:
        return None
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def why_not(folder: Path, task: Task, device: torch.device) -> str | None:
    """Return why vLLM cannot read a folder here, or None where it is worth trying."""
    version = installed()
    if version is None:
        return "vLLM is not installed"
    if not task.kind.is_language:
        return f"it is compared on language models, not on {task.value}"
    own = device_of(device)
    if not own.for_vllm and not version.endswith("cpu"):  # builds for a CPU are 0.11.0+cpu
        return f"vLLM {version} needs CUDA, and this run is on {own.kind}"
    method = quantized_by(load_config(folder))
    if method is not None and not own.for_vllm:
        return f"vLLM takes {method} on CUDA alone"
    return None


def check_vllm(
    folder: Path,
    *,
    documents: Sequence[Document],
    task: Task,
    sequence_length: int,
    device: torch.device,
    clock: PhaseClock,
    still: Callable[[], None] = lambda: None,
) -> Checked:
    """Have vLLM score a folder, beside this project.

    Args:
        documents: The test split; the first `DOCUMENTS` by content digest are read, their first
            tokens each.
        sequence_length: Tokens of a document, at most; `TOKENS` at most.
        clock: Books model_load, prepare and eval.
        still: Called every second; raises to give up.
    """
    unable = why_not(folder, task, device)
    if unable is not None:
        return Checked("not run here", unable, version=installed())
    with clock.phase("model_load"):
        model = load_model(folder, task, device=device, dtype=stored_dtype(folder, device))
        tokenizer = load_tokenizer(folder)
    with clock.phase("prepare"):
        limit = positions(model.config) or TOKENS + 1
        length = min(sequence_length, TOKENS, limit - 1)  # vLLM writes a token after them
        chosen = choose_documents(documents, None)[: 4 * DOCUMENTS]
        encoded = encode_all(
            chosen, tokenizer, task, max_length=length, max_bytes=BYTES_OF_A_TOKEN * length
        )
        read = [
            each for each in (_head(each, length) for each in encoded) if each.targets[1:].any()
        ][:DOCUMENTS]
    if not read:
        return Checked(
            "not run here", "no test document holds a token to predict", version=installed()
        )
    with clock.phase("eval"):
        scores = score_causal(
            model,
            read,
            sequence_length=length,
            batch_size=DOCUMENTS,
            device=device,
            pad_id=tokenizer.pad_token_id,
        )
        # Its memory is vLLM's from here on.
        del model
        found = _ask(folder, [each.input_ids.tolist() for each in read], device, still)
    tokens = int(scores.tokens.sum() + scores.ends.sum())
    asked = Checked("ran", version=installed(), documents=len(read), tokens=tokens)
    if isinstance(found, str):
        return replace(asked, outcome="failed", why=found)
    # Bits to nats; a log-likelihood is minus the cost.
    here = -float(scores.bits.sum() + scores.end_bits.sum()) * math.log(2) / tokens
    theirs = (
        sum(
            float(np.array(row)[each.targets[1:]].sum())
            for row, each in zip(found, read, strict=True)
        )
        / tokens
    )
    agrees = abs(theirs - here) <= TOLERANCE
    if not math.isfinite(theirs):
        return replace(asked, outcome="failed", why="log-probabilities are not finite", here=here)
    return replace(asked, vllm=theirs, here=here, agrees=agrees)


def _head(document: Encoded, length: int) -> Encoded:
    """Return the first tokens of a document; its bytes and label are not read."""
    ends = None if document.ends is None else document.ends[:length]
    return replace(
        document,
        input_ids=document.input_ids[:length],
        targets=document.targets[:length],
        ends=ends,
    )


def _ask(
    folder: Path, prompts: list[list[int]], device: torch.device, still: Callable[[], None]
) -> list[list[float]] | str:
    """Return the log-probabilities that vLLM finds in a process of its own, or why it found
    none.
    """
    program = Path(__file__).with_name("vllm_process.py")
    with tempfile.TemporaryDirectory() as scratch:
        answer, request, said = (
            Path(scratch) / name for name in ("answer.json", "request.json", "said")
        )
        asked: Request = {
            "folder": str(folder.resolve()),
            "prompts": prompts,
            "answer": str(answer),
            "more": _room(device),
        }
        request.write_text(json.dumps(asked))
        # no pipe: what vLLM starts may hold one open for longer than it lives itself
        with said.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", str(program), str(request)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, **QUIET, **device_of(device).alone_in_environment()},
                start_new_session=True,
            )
        try:
            in_time = _wait(process, still)
        finally:
            with suppress(ProcessLookupError):  # what it started, too: the group is its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not in_time:
            return f"no answer within {TIMEOUT_S:g} s"
        if process.returncode:
            lines = [
                line.strip()
                for line in said.read_text(errors="replace").splitlines()
                if line.strip()
            ]
            return lines[-1][:300] if lines else f"ended with {process.returncode}"
        return json.loads(answer.read_text()) if answer.exists() else "it ended without an answer"


def _wait(process: subprocess.Popen[bytes], still: Callable[[], None]) -> bool:
    """Return whether the process has ended in time."""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
            return True
        still()
    return False


def _room(device: torch.device) -> dict[str, Any]:
    """Return how much of the device vLLM may take: this process, and others, hold some of it."""
    own = device_of(device)
    if not own.for_vllm:
        return {}
    import gc

    gc.collect()
    own.release_memory()
    free, whole = own.free_bytes()
    return {"gpu_memory_utilization": round(FREE_SHARE * free / whole, 3)}
