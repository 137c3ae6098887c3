"""What a draft saves its verifier: both served on the same prompts, with the draft and without.

A draft helps where one sequence at a time is written: a pass over a few tokens then takes hardly
longer than one over a single token. So prompts are served one by one, with the draft and without
in turns, each in the fastest way it has. Before that, every prompt's text with the draft is held
against the verifier's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare.statistics import mean_interval
from pipeline.config.arms import Draft
from pipeline.config.settings.serving import Decode, ServingConfig
from pipeline.errors import one_line
from pipeline.evaluation.serving.decoding import REASON, chosen
from pipeline.evaluation.serving.fastest import said
from pipeline.evaluation.serving.measure import draw_prompts
from pipeline.evaluation.serving.server import Server, load
from pipeline.evaluation.serving.speculative import (
    FixedReader,
    GrowingReader,
    Reader,
    Speculative,
    Written,
)
from pipeline.evaluation.serving.tokens import other_tokenizers
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.devices.table import device_of
from pipeline.ledger.numbers import percent, significant
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.shapes import DraftRecord, Figures
from pipeline.ledger.values import Value, derive, measured, null
from pipeline.models.load import load_config, positions
from pipeline.models.vocabulary import vocabulary_of
from pipeline.tasks.table import Task

if TYPE_CHECKING:
    import torch

LEAST_PROMPTS = 8  # that a draft is read on
ORDERS = ("ABBA", "BAAB")  # of with (A) and without (B), by turns: a linear drift cancels
FIGURES = (
    "draft_acceptance",
    "draft_tokens_per_pass",
    "drafted_device_s_per_1k_units",
    "undrafted_device_s_per_1k_units",
    "draft_saving",
    "draft_equal_share",
)


@dataclass(frozen=True, slots=True)
class Drafted:
    """What serving with a draft gave.

    Attributes:
        figures: Of the verifier's row, as result.json holds them.
        record: Of the pass.
    """

    figures: Figures
    record: DraftRecord


def not_drafted(draft: Draft, why: str) -> Drafted:
    """Return figures that are null, with the reason."""
    record: DraftRecord = {
        "draft": draft.arm,
        "of": draft.of,
        "tokens": draft.tokens,
        "why": why,
        "said": [f"{draft.of} was not served with {draft.arm} as its draft: {why}"],
    }
    return Drafted({name: null(why).to_json() for name in FIGURES}, record)


def draft_pass(
    draft: Draft,
    folders: Mapping[str, Path],
    *,
    task: Task,
    prompts: Sequence[np.ndarray],
    config: ServingConfig,
    device: torch.device,
    devices: int,
    clock: PhaseClock,
    dtype: torch.dtype | None = None,
    check: Callable[[], None] = lambda: None,
) -> Drafted:
    """Serve an arm one prompt at a time, with a draft and without.

    Args:
        draft: Which arm drafts for which.
        folders: Their artifacts, by arm.
        task: What both are for.
        prompts: Encoded documents that prompts are cut from.
        config: The load's prompt and new tokens, and how tokens are written without the draft.
        device: Where to serve.
        devices: Devices that a second of serving occupies.
        clock: Books model_load and generate, and is the clock of the readings.
        dtype: Of what is stored in fp32; None: fp32.
        check: Called between prompts; what it raises ends the pass.
    """
    load_at = config.load
    if load_at.new == 1:
        return not_drafted(draft, "one new token is prefill")
    if other_tokenizers(task, folders[draft.arm], folders[draft.of]):
        return not_drafted(
            draft,
            f"{draft.arm} has another tokenizer, so that what it drafts is other text: draft with a"
            f" model that has the tokenizer of {draft.of}",
        )
    limit = positions(load_config(folders[draft.arm]))
    if limit is not None and (longest := load_at.prompt + load_at.new) > limit:
        why = f"{draft.arm} has {limit} positions, prompt and answer are {longest} tokens"
        return not_drafted(draft, why)

    def loaded(arm: str) -> Server:
        return load(
            folders[arm],
            task,
            device,
            labels=None,
            now_ns=clock.now_ns,
            dtype=dtype,
            decode=config.decode,
        )

    with clock.phase("model_load"):
        verifier, other = loaded(draft.of), loaded(draft.arm)
    bench = _Bench(verifier, other, draft, load_at.new, config.decode, clock.now_ns)
    number = max(LEAST_PROMPTS, load_at.batch)
    ids = draw_prompts(prompts, number, load_at.prompt, (0, 0))
    with clock.phase("generate"):
        return attempted(
            lambda: _read(bench, ids, devices, check),
            lambda why: not_drafted(draft, unmeasured("serving with a draft", why)),
        )


@dataclass(slots=True)
class _Bench:
    """The two models, and how they write."""

    verifier: Server
    other: Server
    draft: Draft
    new: int
    decode: Decode
    now_ns: Callable[[], int]
    writer: Speculative | None = None

    def ids(self, prompt: np.ndarray) -> torch.Tensor:
        """Return a prompt (1, T) on the device."""
        import torch

        return torch.from_numpy(prompt.astype(np.int64)).to(self.verifier.device)

    def write(self, ids: torch.Tensor) -> Written:
        """Return the text after a prompt (1, T), with the draft."""
        import torch

        with torch.inference_mode():
            if self.writer is None:
                self.writer = self._writer(ids)
            return self.writer.write(ids, self.new)

    def seconds_with(self, ids: torch.Tensor) -> float:
        """Return the seconds of a text with the draft, its prompt on the device beforehand."""
        device = device_of(self.verifier.device)
        device.synchronise()
        start = self.now_ns()
        self.write(ids)
        device.synchronise()
        return (self.now_ns() - start) / 1e9

    def _writer(self, prompt: Any) -> Speculative:
        """Return what writes with the draft, which proposes only what both models know."""
        sizes = [vocabulary_of(each.model) for each in (self.verifier, self.other)]
        shared = min((size for size in sizes if size is not None), default=None)
        return Speculative(
            self._reader(self.verifier.model, sizes[0], prompt, (self.draft.tokens + 1,)),
            # it has read one token or two less than was written
            self._reader(self.other.model, shared, prompt, (1, 2)),
            self.draft.tokens,
        )

    def _reader(self, model: Any, limit: int | None, prompt: Any, widths: Sequence[int]) -> Reader:
        way = self._way(prompt)
        if way is Decode.dynamic:
            return GrowingReader(model, limit)
        # transformers' own mark of models with a static cache
        if not getattr(model, "_can_compile_fullgraph", False):
            return GrowingReader(model, limit, f"{type(model).__name__} has no static cache")
        captures = device_of(prompt.device).captures
        try:
            return FixedReader(
                model,
                limit,
                prompt,
                prompt.shape[1] + self.new,
                widths,
                compiled=way is Decode.compile,
                captured=captures and way is not Decode.static,
            )
        # Kernels refuse capture and compilation in their own ways.
        except Exception as error:  # noqa: BLE001
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            return GrowingReader(model, limit, f"not {way.value}: {one_line(first, REASON)}")

    def _way(self, prompt: torch.Tensor) -> Decode:
        """Return how tokens are written: where that was timed, as the verifier alone does."""
        probe = self.verifier.probes.get((*prompt.shape, self.new))
        if probe is not None and self.decode is Decode.auto:
            return Decode(probe["chosen"])
        return chosen(self.decode, prompt.device)


def _read(bench: _Bench, prompts: np.ndarray, devices: int, check: Callable[[], None]) -> Drafted:
    texts: list[Written] = []
    equal: list[bool] = []
    how = ""
    with_s, without_s = np.empty((len(prompts), 2)), np.empty((len(prompts), 2))
    for number in range(len(prompts)):
        check()
        prompt = prompts[number : number + 1]
        # Untimed: it makes what both ways need, and shows that they write the same.
        own, ids = bench.verifier.text(prompt, bench.new, bench.decode), bench.ids(prompt)
        written = bench.write(ids)
        texts.append(written)
        equal.append(bool((written.tokens == own).all()))
        order = ORDERS[number % 2]
        for place, letter in enumerate(order):
            nth = order[:place].count(letter)
            if letter == "A":
                with_s[number, nth] = bench.seconds_with(ids)
                continue
            reading = bench.verifier.once(prompt, bench.new, decode=bench.decode)
            without_s[number, nth], how = reading.total_s, reading.how
    assert bench.writer is not None
    found, saving = _figures(texts, equal, with_s, without_s, bench.new, devices)
    record: DraftRecord = {
        "draft": bench.draft.arm,
        "of": bench.draft.of,
        "tokens": bench.draft.tokens,
        "prompts": len(texts),
        "how": bench.writer.how,
        "how_without": how,
        "saving": saving,
        "why": None,
        "said": [],
    }
    probes = [f"{bench.draft.of} alone: {said(each)}" for each in bench.verifier.probes.values()]
    record["said"] = [_said(record, found, sum(equal)), *probes]
    return Drafted({name: value.to_json() for name, value in found.items()}, record)


def _figures(
    texts: Sequence[Written],
    equal: Sequence[bool],
    with_s: np.ndarray,
    without_s: np.ndarray,
    new: int,
    devices: int,
) -> tuple[dict[str, Value], list[float]]:
    """Return the figures, and the share of time saved with the ends of its interval.

    Args:
        texts: By prompt, `new` tokens each.
        equal: By prompt, whether its text is the verifier's own.
        with_s: Seconds (prompts, 2) with the draft; `without_s` without.
    """
    drafted, accepted, passes = (
        sum(getattr(each, name) for each in texts) for name in ("drafted", "accepted", "passes")
    )
    # A prompt is a block, so that the interval covers prompts.
    ratio = mean_interval(np.log(with_s).mean(axis=1) - np.log(without_s).mean(axis=1))
    saving = [1 - math.exp(each) for each in (ratio.estimate, ratio.high, ratio.low)]
    taken = [measured(float(each.mean())) for each in (with_s, without_s)]
    drafted_s, undrafted_s = (
        derive(lambda seconds: seconds * devices * 1000 / new, each) for each in taken
    )
    nothing = null("two new tokens leave none to draft")
    found = {
        "draft_acceptance": measured(accepted / drafted) if drafted else nothing,
        "draft_tokens_per_pass": measured(len(texts) * (new - 1) / passes),
        "drafted_device_s_per_1k_units": drafted_s,
        "undrafted_device_s_per_1k_units": undrafted_s,
        "draft_saving": derive(lambda *_: saving[0], *taken),
        "draft_equal_share": measured(sum(equal) / len(equal)),
    }
    return found, saving


def _said(record: DraftRecord, found: dict[str, Value], num_equal: int) -> str:
    """Return what a report says of it."""

    def shown(name: str, form: Callable[[float], str]) -> str:
        value = found[name].value
        return "unknown" if value is None else form(value)

    of, prompts = record["of"], record.get("prompts", 0)
    saved, low, high = (percent(each, sign=True) for each in record.get("saving", []))
    line = (
        f"{of} with {record['draft']} as its draft, {record['tokens']} tokens ahead, one sequence"
        f" at a time ({record.get('how')}; without it {record.get('how_without')}):"
        f" {shown('draft_acceptance', percent)} of what is drafted is accepted,"
        f" {shown('draft_tokens_per_pass', significant)} tokens a pass;"
        f" {shown('drafted_device_s_per_1k_units', significant)} device-s per 1,000 tokens with it,"
        f" {shown('undrafted_device_s_per_1k_units', significant)} without: time saved {saved}"
        f" ({low} to {high}); its text is that of {of} alone on {num_equal} of {prompts} prompts"
    )
    if num_equal < prompts:
        line += ", elsewhere a pass over several tokens rounds otherwise than one over a single one"
    return line
