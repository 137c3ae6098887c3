"""What a search measures: a format quantized on trial, scored on validation and served beside the
unquantized model.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.config.settings.run import Run
from pipeline.data.documents import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.serving.measure import check_load, measure_interleaved
from pipeline.evaluation.serving.server import load
from pipeline.models.load import load_config
from pipeline.quantization.backend import (
    LIBRARIES,
    backend_of,
    named,
    plan_for,
    quantize,
    refuse_unsupported,
    refusing,
)
from pipeline.quantization.layers import Choice
from pipeline.quantization.search import Trial
from pipeline.quantization.yardstick import Yardstick
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch

    from pipeline.ledger.phases import PhaseClock

SENSITIVITY_DOCUMENTS = 8  # of these, one reading a layer
BLOCKS = 2  # blocks of serving a trial, one in each order


@dataclass(slots=True)
class Bench:
    """The unquantized model, in memory, and what trials are read on.

    Args:
        source: Its folder.
        key: The stage's `format` setting, as refusals name it.
    """

    source: Path
    run: Run
    data: Dataset
    device: torch.device
    choice: Choice
    key: str
    clock: PhaseClock
    folder: Path  # trials are written below it and removed
    sequence_length: int
    yard: Yardstick = field(init=False)

    def __post_init__(self) -> None:
        self.yard = Yardstick(self.source, self.run, self.data, self.device, self.sequence_length)

    def measure(self, fmt: Format, exclude: tuple[str, ...]) -> Trial:
        """Quantize, score and serve `fmt` with the layers `exclude` left as they are."""
        with self._quantized(fmt, exclude) as folder, self._refusing(fmt):
            loss, kl = self.yard.read(folder)
            time_ratio, memory_ratio = self._serve(folder)
        return Trial(fmt, exclude, loss, kl, time_ratio, memory_ratio)

    def sensitive(self, fmt: Format) -> Sequence[str]:
        """Return the layers that `fmt` quantizes, the one first that moves the model's predictions
        most.

        Sixteen bits take the whole model: there is nothing to mix.
        """
        if fmt in SIXTEEN_BITS:
            return ()
        with self._refusing(fmt):
            return self._ranked(fmt)

    def _refusing(self, fmt: Format) -> AbstractContextManager[None]:
        """Have what a trial's own code raises leave its format out of the search."""
        return refusing(named(self.yard.model.config), fmt, self.key)

    def _ranked(self, fmt: Format) -> Sequence[str]:
        yard = self.yard
        few = yard.validation[:SENSITIVITY_DOCUMENTS]
        with self._quantized(fmt, ()) as folder:
            quantized, patched = yard.load(folder), yard.load(self.source)
        # All three in one dtype, so that rounding of the rest is no part of the difference.
        dtype = quantized.dtype
        patched, plain = patched.to(dtype), yard.load(self.source).to(dtype)
        moved: dict[str, float] = {}
        for layer in plan_for(
            fmt, plain.config, self.run.task, key=self.key, choice=self.choice
        ).quantize:
            own = patched.get_submodule(layer.name)
            patched.set_submodule(layer.name, quantized.get_submodule(layer.name))
            moved[layer.name] = yard.score(patched, few, other=plain)[1]
            # Put back, so that each layer is read by itself.
            patched.set_submodule(layer.name, own)
        return sorted(moved, key=lambda name: -moved[name])

    @contextmanager
    def _quantized(self, fmt: Format, exclude: tuple[str, ...]) -> Generator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="trial."))
        try:
            choice = replace(self.choice, exclude=(*self.choice.exclude, *exclude))
            quantize(
                self.source,
                folder / "model",
                fmt,
                self.run.task,
                device=self.device,
                key=self.key,
                choice=choice,
                prove=False,
            )
            yield folder / "model"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _serve(self, folder: Path) -> tuple[float, float]:
        """Return the trial's seconds at the load, and its bytes of weights, over the unquantized
        model's.
        """
        config = replace(self.run.serving, blocks=BLOCKS, batches=[])
        servers = {
            arm: load(
                path,
                self.run.task,
                self.device,
                labels=self.data.labels,
                now_ns=self.clock.now_ns,
                decode=config.decode,
            )
            for arm, path in (("trial", folder), ("plain", self.source))
        }
        prompts = [each.input_ids for each in self.yard.validation]
        for server in servers.values():
            check_load(server, config.load, prompts)
        read = measure_interleaved(
            servers, [("trial", "plain")], config=config, prompts=prompts, seed=0
        )
        ours, theirs = read.seconds["trial", "plain"]
        # Geometric mean: a ratio and its inverse average to 1.
        ratio = float(np.exp(np.mean(np.log(ours / theirs))))
        return ratio, servers["trial"].weights_bytes / servers["plain"].weights_bytes


def able(
    candidates: Sequence[Format],
    source: Path,
    task: Task,
    *,
    device: torch.device,
    choice: Choice,
    key: str,
) -> tuple[list[Format], list[str]]:
    """Return the candidates that this device and this model's shapes can take, and why the others
    cannot.
    """
    config = load_config(source, key=key)
    found: list[Format] = []
    reasons: list[str] = []
    for fmt in candidates:
        try:
            if find_spec(LIBRARIES[fmt]) is None:
                raise UserError(key, f"{LIBRARIES[fmt]} is not installed", "install it")
            backend_of(fmt).refuse_device(fmt, device=device, key=key)
            refuse_unsupported(config, fmt, task, device=device, key=key, choice=choice)
            found.append(fmt)
        except UserError as error:
            reasons.append(f"{fmt.value}: {error.problem}")
    return found, reasons
