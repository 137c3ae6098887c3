"""The dtype in which artifacts that are stored in fp32 are served: named, or the fastest that a
short probe finds.

They were assessed in fp32, as they are stored. Served in 16 bits they answer a little otherwise, so
that every such arm has, on a few documents, how far its predictions lie from those that were
assessed: KL, the largest difference of a logit, the share of first predictions that change. A dtype
in which they lie further than `MOST_KL` is not chosen. All such arms of a pass are served in one
dtype; what is stored in 16 bits, or quantized, is served as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare.statistics import mean_interval
from pipeline.config.settings.quantization import SIXTEEN_BITS, Format
from pipeline.config.settings.serving import ServingConfig, ServingDtype
from pipeline.data.padding import read_by
from pipeline.errors import UserError
from pipeline.evaluation.serving.decoding import chosen
from pipeline.evaluation.serving.measure import check_load, draw_prompts
from pipeline.evaluation.serving.server import load
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import DtypeRecord, Figures
from pipeline.ledger.values import measured
from pipeline.models.load import load_config, load_model, quantized_by
from pipeline.models.sixteen_bits import (
    best_first,
    has_units,
    stored_format,
    torch_dtype,
    units_said,
    why_not,
)
from pipeline.models.weights import weights_bytes
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch

KEY = "serving.dtype"
DOCUMENTS = 8  # that a dtype's predictions are read on
TOKENS = 128  # of each, at most, of a language model
ROUNDS = 4  # readings of each dtype, in turns
MOST_KL = 0.01  # nats a token or example
SHORTEST_S = 0.02  # a reading of less repeats its batch
WORDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Drift:
    """How far an arm in the dtype it is served in lies from the one it was assessed in.

    Attributes:
        kl: Mean KL of its predictions from the assessed ones, nats a token or example.
        largest: Largest absolute difference of a logit.
        flips: Share of first predictions that change.
        documents: That this was read on.
    """

    kl: float
    largest: float
    flips: float
    documents: int

    def figures(self) -> Figures:
        """Return them as serving figures of a row."""
        named = {
            "dtype_kl": self.kl,
            "dtype_largest_logit_difference": self.largest,
            "dtype_flips": self.flips,
        }
        return {name: measured(value).to_json() for name, value in named.items()}


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """What arms that are stored in fp32 are served in.

    Attributes:
        asked: The setting.
        served: `fp32`, `bf16` or `fp16`; None where no arm is stored in fp32.
        trials: By dtype, the time over fp32's with its 90% interval, of the arm that was tried.
        refused: Why others were not tried, or not chosen.
        drift: By arm, where they are served in another dtype than they were assessed in.
    """

    asked: ServingDtype
    served: Format | None
    is_plain: bool = True
    trials: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    tried_on: str | None = None
    refused: tuple[str, ...] = ()
    drift: dict[str, Drift] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype; None: fp32."""
        return None if self.served is None else torch_dtype(self.served)

    @property
    def name(self) -> str | None:
        """As the setting names it; None where no arm is stored in fp32."""
        if not self.is_plain:
            return None
        return "fp32" if self.served is None else self.served.value

    def to_json(self) -> DtypeRecord:
        """Return the form it has in the record of a pass."""
        return {
            "asked": self.asked.value,
            "served": self.name,
            "trials": {k: list(v) for k, v in self.trials.items()},
            "refused": list(self.refused),
            "said": self.say(),
        }

    def say(self) -> list[str]:
        """Return what a report says of it."""
        if not self.is_plain:
            return []
        tried = [
            f"{name} {ratio:.2f}x fp32's time ({low:.2f} to {high:.2f})"
            for name, (ratio, low, high) in self.trials.items()
        ]
        probe = f" by a probe on {self.tried_on}: {', '.join(tried)}" if tried else ""
        reasons = f"; {'; '.join(self.refused)}" if self.refused else ""
        how = (
            "as asked for"
            if self.asked is not ServingDtype.auto
            else f"the fastest here{probe}{reasons}"
        )
        said = [f"arms that are stored in fp32 are served in {self.name}, {how}"]
        said += [
            f"{arm} is assessed in fp32 and served in {self.name}: on {each.documents} test"
            f" documents KL {each.kl:.2g} nats, largest logit difference {each.largest:.2g},"
            f" {each.flips:.1%} of first predictions change"
            for arm, each in self.drift.items()
        ]
        return said


def is_plain(folder: Path) -> bool:
    """Whether an artifact is neither quantized nor stored in 16 bits."""
    config = load_config(folder)
    return quantized_by(config) is None and stored_format(config) is None


def choose_dtype(
    asked: ServingDtype,
    artifacts: Mapping[str, Path],
    *,
    task: Task,
    labels: tuple[str, ...] | None,
    prompts: Sequence[np.ndarray],
    config: ServingConfig,
    device: torch.device,
    clock: PhaseClock,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> DtypeChoice:
    """Return the dtype to serve what is stored in fp32 in, with how far that moves each arm.

    Args:
        artifacts: Folders by arm, all of the pass.
        prompts: Encoded test documents.
        config: The load that is tried.
        clock: Books `search`.
        seed: Of the prompts of the trial.
        check: Called between readings; what it raises ends the probe.

    Raises:
        UserError: If a dtype that was asked for is one that an arm does not run in.
    """
    plain = {arm: folder for arm, folder in artifacts.items() if is_plain(folder)}
    if not plain or asked is ServingDtype.fp32:
        return DtypeChoice(asked, None, is_plain=bool(plain))
    with clock.phase("search"):
        bench = _Bench(plain, task, labels, prompts, config, device, clock, seed, check)
        if asked is not ServingDtype.auto:
            return bench.named(Format(asked.value))
        return bench.fastest()


@dataclass(slots=True)
class _Bench:
    """The arms of a probe, and what they are read on."""

    plain: Mapping[str, Path]
    task: Task
    labels: tuple[str, ...] | None
    prompts: Sequence[np.ndarray]
    config: ServingConfig
    device: torch.device
    clock: PhaseClock
    seed: int
    check: Callable[[], None]

    def named(self, fmt: Format) -> DtypeChoice:
        drift = self._drift(fmt)
        if isinstance(drift, str):
            raise UserError(KEY, drift, "give fp32, or auto")
        return DtypeChoice(ServingDtype(fmt.value), fmt, drift=drift)

    def fastest(self) -> DtypeChoice:
        """Try the 16-bit dtypes that the device has units for; fp32 stays unless one is surely
        faster.
        """
        refused, drifts = list[str](), dict[Format, dict[str, Drift]]()
        for fmt in best_first(self.device):
            why = why_not(fmt, self.device)
            if why is None and not has_units(fmt, self.device):
                why = units_said(fmt, self.device)
            found = why or self._drift(fmt)
            if isinstance(found, str):
                refused.append(f"not {fmt.value}: {found}")
                continue
            far = next(
                (
                    f"{arm} lies {each.kl:.2g} nats from what was assessed, {MOST_KL} allowed"
                    for arm, each in found.items()
                    if not each.kl <= MOST_KL
                ),
                None,
            )
            if far is None:
                drifts[fmt] = found
            else:
                refused.append(f"not {fmt.value}: {far}")
        if not drifts:
            return DtypeChoice(ServingDtype.auto, None, refused=tuple(refused))
        # the dearest to serve decides
        arm = max(self.plain, key=lambda each: weights_bytes(self.plain[each]))
        trials = self._time(arm, list(drifts))
        # By the interval's end: 16 bits change answers, so they have to be surely faster.
        faster = {fmt: ratio for fmt, (ratio, _, high) in trials.items() if high < 1}
        best = min(faster, key=lambda fmt: faster[fmt], default=None)
        if best is None:
            refused.append("none is surely faster than fp32")
        return DtypeChoice(
            ServingDtype.auto,
            best,
            True,
            {fmt.value: each for fmt, each in trials.items()},
            arm,
            tuple(refused),
            {} if best is None else drifts[best],
        )

    def _drift(self, fmt: Format) -> dict[str, Drift] | str:
        """Return how far each arm moves in a dtype, or why one does not run in it."""
        import torch

        found: dict[str, Drift] = {}
        for arm, folder in self.plain.items():
            self.check()
            try:
                logits = [
                    self._logits(folder, dtype) for dtype in (torch.float32, torch_dtype(fmt))
                ]
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                words = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
                return f"{arm} does not run in it ({words})"
            found[arm] = drift_of(*logits)
            if not math.isfinite(found[arm].kl):
                return f"the outputs of {arm} are not finite in it"
        return found

    def _logits(self, folder: Path, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the logits of a few documents, (T, vocabulary) or (1, labels) each, in fp32 on the
        host.
        """
        import torch

        model: Any = load_model(
            folder, self.task, device=self.device, labels=self.labels, dtype=dtype
        )
        found: list[torch.Tensor] = []
        with torch.inference_mode():
            for ids in [prompt for prompt in self.prompts if len(prompt)][:DOCUMENTS]:
                kept = ids[:TOKENS] if self.task.kind.is_language else ids
                row = torch.from_numpy(kept.astype(np.int64))[None].to(self.device)
                given = {"input_ids": row, "attention_mask": torch.ones_like(row)}
                found.append(model(**read_by(model, given)).logits.float().cpu().flatten(0, -2))
        return found

    def _time(
        self, arm: str, formats: Sequence[Format]
    ) -> dict[Format, tuple[float, float, float]]:
        """Return each dtype's time at the load over fp32's, with its interval, read in turns."""
        load_at = self.config.load
        dtypes: dict[Format | None, Any] = {
            None: None,
            **{fmt: torch_dtype(fmt) for fmt in formats},
        }
        servers = {
            fmt: load(
                self.plain[arm],
                self.task,
                self.device,
                labels=self.labels,
                now_ns=self.clock.now_ns,
                dtype=dtype,
                decode=chosen(self.config.decode, self.device),
            )
            for fmt, dtype in dtypes.items()
        }
        check_load(servers[None], load_at, self.prompts)
        ids = draw_prompts(self.prompts, load_at.batch, load_at.prompt, (self.seed, 0))
        seconds: dict[Format | None, list[float]] = {fmt: [] for fmt in servers}
        repeats: dict[Format | None, int] = {}
        for fmt, server in servers.items():
            server.once(ids, load_at.new)  # chooses kernels
            repeats[fmt] = max(
                1, math.ceil(SHORTEST_S / max(1e-6, server.once(ids, load_at.new).total_s))
            )
        for number in range(ROUNDS):
            self.check()
            # In turns, forth and back: a drift meets all alike.
            for fmt in servers if number % 2 == 0 else reversed(servers):
                read = [
                    servers[fmt].once(ids, load_at.new).total_s
                    for _ in range(min(64, repeats[fmt]))
                ]
                seconds[fmt].append(float(np.mean(read)))
        return {fmt: _ratio(seconds[fmt], seconds[None]) for fmt in formats}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    interval = mean_interval(np.log(np.array(ours) / np.array(theirs)))
    return math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high)


def drift_of(assessed: Sequence[torch.Tensor], served: Sequence[torch.Tensor]) -> Drift:
    """Return how far predictions lie apart.

    Args:
        assessed: By document, logits (T, V) or (1, C).
        served: The same of the model in the dtype it is served in.
    """
    import torch

    before, after = torch.cat(list(assessed)), torch.cat(list(served))
    # fp64, because the difference of close log-probabilities is small.
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    flips = (before.argmax(-1) != after.argmax(-1)).double().mean()
    return Drift(float(kl), float((before - after).abs().max()), float(flips), len(assessed))


def dtypes_that(device: torch.device) -> list[str]:
    """Return the settings of `serving.dtype` that a device can take."""
    return ["auto", "fp32", *(fmt.value for fmt in SIXTEEN_BITS if why_not(fmt, device) is None)]
