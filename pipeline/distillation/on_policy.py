"""On-policy distillation: the student writes, and its teacher says at every token what it would
have written.

What it writes is sampled from its own distribution, no token barred but those that its teacher does
not have, and is no label: the loss is the divergence alone, over the tokens that it wrote, its end
of text included and nothing after. No gradient passes through the sampling.
Source: Agarwal et al. 2024, arXiv 2306.13649, algorithm 1 (`share` is its lambda, drawn step by
step).

Shape legend: B rows, P tokens of the longest prompt, G written at most, T = P + G.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.data.batches import IGNORE


@dataclass(frozen=True, slots=True)
class Writing:
    """How a student writes.

    Attributes:
        length: Most tokens that are written after a prompt.
        temperature: Its logits are divided by it.
        vocabulary: Tokens that may be written: the first so many.
        ends: Tokens after which nothing follows.
        seed: Of what is drawn, together with the step.
    """

    length: int
    temperature: float
    vocabulary: int
    ends: Sequence[int]
    seed: int


Told = Callable[[Tensor], dict[str, Any]]
"""What a model's forward pass is given to tell padding from tokens, of their mask (B, T)."""


Written = tuple[Tensor, Tensor]
"""The tokens written, (B, G) int64, and how many of each row count, (B,)."""


@dataclass(frozen=True, slots=True)
class Split:
    """How several write the rows of a batch, each its own.

    Attributes:
        rows: Of this one.
        joined: What all wrote, by what this one did; in the order of the rows.
    """

    rows: slice
    joined: Callable[[Written], list[Written]]


def write(
    model: Any,
    prompts: Tensor,
    mask: Tensor,
    writing: Writing,
    step: int,
    told: Told | None = None,
    split: Split | None = None,
) -> dict[str, Tensor]:
    """Have `model` go on from prompts; return what it read and wrote as a batch, on the CPU.

    The same weights, prompts, seed and step write the same; torch's generators stay where they are.

    Args:
        model: A causal language model; it is in evaluation mode meanwhile.
        prompts: (B, P) token ids on its device, padded on the left.
        mask: (B, P): 1 where a prompt is.
        told: Of the rows that are written here; None: the mask itself.
        split: None: all rows are.

    Returns:
        `input_ids, position_ids, labels` (B, T) as packed windows have them, what a row leaves over
        as a document of its own; `sampled` (B,), the tokens written; `lengths` (B,), with the
        prompt's.
    """
    training = model.training
    model.eval()
    try:
        by = told or (lambda mask: {"attention_mask": mask})
        rows = slice(len(prompts)) if split is None else split.rows
        draw = _Draw(len(prompts), rows, writing, step, prompts.device)
        written, sampled = _sample(model, prompts[rows], mask[rows], writing, draw, by)
    finally:
        model.train(training)
    found = (written.cpu(), sampled.cpu())
    parts = [found] if split is None else split.joined(found)
    longest = max(part.shape[1] for part, _ in parts)  # some have ended sooner
    written = torch.cat([pad(part, (0, longest - part.shape[1])) for part, _ in parts])
    sampled = torch.cat([count for _, count in parts])
    return _as_batch(prompts.cpu(), mask.cpu().sum(-1), written, sampled)


class _Draw:
    """Draws one token a row, the same whoever writes the other rows.

    Source: `torch.multinomial` of one draw does the same: what is largest of the probabilities,
    each divided by an exponential variate.
    """

    def __init__(
        self, num_rows: int, rows: slice, writing: Writing, step: int, device: torch.device
    ) -> None:
        self._num_rows, self._rows = num_rows, rows
        # A generator of its own, from seed and step: a resumed run writes the same, and the
        # training's own draws are not moved.
        [state] = np.random.SeedSequence((writing.seed, step)).generate_state(1, np.uint64)
        self._generator = torch.Generator(device).manual_seed(int(state) >> 1)

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Return a token for each row, (B, 1), of their probabilities (B, V)."""
        all_rows = probabilities.new_empty(self._num_rows, probabilities.shape[1])
        noise = all_rows.exponential_(generator=self._generator)[self._rows]
        return (probabilities / noise).argmax(-1, keepdim=True)


@torch.no_grad()
def _sample(
    model: Any, ids: Tensor, mask: Tensor, writing: Writing, draw: _Draw, told: Told
) -> Written:
    # Without this a model makes logits of the whole prompt, (B, P, V), of which the last are used.
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    last_only: dict[str, int] = {"logits_to_keep": 1} if keeps else {}
    ends = torch.tensor(writing.ends, dtype=torch.long, device=ids.device)
    # Prompts are padded on the left: position 0 is the first real token.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    count = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    written: list[Tensor] = []
    # The key-value cache: after the first pass only the newest token is read.
    cache = None
    while len(written) < writing.length and not (written and bool(done.all())):
        said = model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **told(mask),
            **last_only,
        )
        logits = said.logits[:, -1, : writing.vocabulary].float() / writing.temperature  # (B, V)
        ids = draw(logits.softmax(-1))
        written.append(ids)
        # Before `done` is updated, so that the end of the text itself counts.
        count += ~done
        done |= torch.isin(ids[:, 0], ends)
        cache = said.past_key_values
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, -1), count


def _as_batch(
    prompts: Tensor, prompt_lengths: Tensor, written: Tensor, sampled: Tensor
) -> dict[str, Tensor]:
    width = prompts.shape[1] + written.shape[1]
    ids, positions = torch.zeros(2, len(prompts), width, dtype=torch.long).unbind()
    labels = torch.full_like(ids, IGNORE)
    for row, (asked, said) in enumerate(
        zip(prompt_lengths.tolist(), sampled.tolist(), strict=True)
    ):
        whole = torch.cat([prompts[row, len(prompts[row]) - asked :], written[row, :said]])
        # From left padding to right padding, as training batches have it.
        ids[row, : len(whole)] = whole
        # The label at a position is the next token. Prompts get none.
        labels[row, asked - 1 : len(whole) - 1] = whole[asked:]
        # Positions begin anew in the padding, which makes it a document of its own that nothing
        # else reads.
        positions[row] = torch.cat([torch.arange(len(whole)), torch.arange(width - len(whole))])
    lengths = prompt_lengths + sampled
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": labels,
        "sampled": sampled,
        "lengths": lengths,
    }
