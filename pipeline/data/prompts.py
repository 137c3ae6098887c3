"""What a student is asked to go on from, as a pure function of (seed, step).

Of a chat, or of a prompt and its completion: all that precedes the last stretch to be predicted,
cut from the front.
Of plain text, which asks nothing: a stretch from a place in the document that the step draws.

Shape legend: B rows, P tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.batches import PackedBatches, shuffled_rows
from pipeline.data.encode import Encoded
from pipeline.errors import UserError

PROMPT_MASK = "prompt_mask"
"""Of a batch: there where it holds prompts, which a student has still to go on from."""


class Prompts:
    """Prompts of at most `longest` tokens, padded on the left.

    Args:
        encoded: Documents; those that nothing can be asked from are left out.
        longest: Tokens.

    Raises:
        UserError: If none is left.
    """

    def __init__(
        self, encoded: Sequence[Encoded], *, longest: int, batch_size: int, seed: int
    ) -> None:
        self._longest, self._seed = longest, seed
        self._asked = [found for item in encoded if (found := _asked_of(item)) is not None]
        if not self._asked:
            raise UserError(
                "data",
                "no document is long enough to be continued",
                "give documents of several tokens",
            )
        self._rows = shuffled_rows(len(self._asked), batch_size, seed)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `prompt_mask`, (B, P) int64."""
        draw = np.random.default_rng((self._seed, step, 1))
        rows = [self._cut(self._asked[row], draw) for row in self._rows(step)]
        width = max(map(len, rows))
        ids, mask = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(2))
        for at, row in enumerate(rows):
            ids[at, width - len(row) :] = row
            mask[at, width - len(row) :] = 1
        return {"input_ids": torch.from_numpy(ids), PROMPT_MASK: torch.from_numpy(mask)}

    def _cut(self, asked: _Asked, draw: np.random.Generator) -> np.ndarray:
        ids = asked.input_ids
        if asked.is_prompt:
            return ids[-self._longest :]
        if len(ids) <= self._longest:
            return ids[: (len(ids) + 1) // 2]
        place = draw.integers(len(ids) - self._longest + 1)
        return ids[place : place + self._longest]


class PartlySampled:
    """Batches of text, and in a share of the steps prompts instead; which, the seed says.

    Attributes:
        text: The batches of text alone.
    """

    def __init__(self, text: PackedBatches, prompts: Prompts, share: float, seed: int) -> None:
        self.text, self._prompts, self._share, self._seed = text, prompts, share, seed

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return what a step reads."""
        return (self._prompts if self.is_sampled(step) else self.text).batch(step)

    def is_sampled(self, step: int) -> bool:
        """Tell whether the student writes in this step."""
        return np.random.default_rng((self._seed, step, 2)).random() < self._share


@dataclass(frozen=True, slots=True)
class _Asked:
    """A document's tokens up to what its student is to write; `is_prompt`: they end where an answer
    begins.
    """

    input_ids: np.ndarray
    is_prompt: bool


def _asked_of(item: Encoded) -> _Asked | None:
    places = np.flatnonzero(item.targets)
    if not len(places):
        return None
    breaks = np.flatnonzero(np.diff(places) > 1)
    first = int(places[breaks[-1] + 1] if len(breaks) else places[0])  # of the last stretch
    if first > 1:
        return _Asked(item.input_ids[:first], is_prompt=True)
    whole = item.input_ids[:-1]  # the last token is its end
    return _Asked(whole, is_prompt=False) if len(whole) else None
