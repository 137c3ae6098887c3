"""A teacher's distributions in a few bytes a token: how they are drawn, packed, and read back.

`sample` draws tokens from the teacher's distribution with replacement and merges repeats into
counts; count / draws is an unbiased estimate of each probability. The draws are stratified: one
from each of `draws` equal slices of the cumulative distribution, so that the estimate stays
unbiased and its variance is never above that of independent draws (a token of probability p is
drawn `draws * p` times, give or take less than 2). The entropy is kept beside them, from
all of the distribution: with it the reported divergence is unbiased, too.

`top_k` keeps the k largest probabilities and the mass of the rest as one bucket: no noise, and a
bias that no number of steps averages out (see `losses.py`).

`dense` keeps all logits: for classes, of which there are few.

    method  column         dtype    a token takes
    sample  entries        uint8    2, 3 or 4 bytes an entry: id * 64 + count - 1, little endian
            sizes          uint8    entries of the token
            entropy        float32  nats, at the temperature
    top_k   ids            uint8    2, 3 or 4 bytes an entry, little endian, most probable first
            probabilities  float16  at the temperature
            residual       float32
    dense   logits         float32  a number a class

Source: Anshumann et al. 2025, arXiv 2503.16870 (sampled against top-k); Cochran, Sampling
Techniques, 1977, section 5 (stratified sampling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.distillation.losses import Sparse

TOKEN_BYTES = 72  # what a token may take on average: the figure to keep
# of them, for what a window (36 bytes) and a file take: number, digest, starts; header
SPARE_BYTES = 2
MOST_DRAWS = 64  # counts have 6 bits
COUNT_BITS = 6
SCALAR_BYTES = 4  # entropy or residual, float32

Columns = dict[str, np.ndarray]


def entry_bytes(vocabulary: int, bits: int) -> int:
    """Return the whole bytes that hold a token's number and `bits` more, 2 at least."""
    return max(2, -(-((vocabulary - 1).bit_length() + bits) // 8))


@dataclass(frozen=True, slots=True)
class Sampled:
    """Stratified draws with replacement, repeats merged.

    Attributes:
        draws: A token's, 1 to 64.
        vocabulary: Tokens to draw from.
        temperature: Of the teacher's distribution.
    """

    draws: int
    vocabulary: int
    temperature: float

    method: ClassVar[str] = "sample"

    @staticmethod
    def most(vocabulary: int) -> int:
        """Return the draws that fit into 72 bytes a token though no two of them fall together."""
        room = TOKEN_BYTES - SPARE_BYTES - SCALAR_BYTES - 1
        return min(MOST_DRAWS, room // entry_bytes(vocabulary, COUNT_BITS))

    def of(self, logits: Tensor, uniforms: Tensor) -> dict[str, Tensor]:
        """Return `ids` (N, draws) int32, ascending, and `entropy` (N,) fp32, nats.

        Args:
            logits: (N, V), fp32 or wider.
            uniforms: (N, draws) float64 in [0, 1), the random numbers of the draws.
        """
        log_p = torch.log_softmax(logits / self.temperature, -1)
        p = log_p.exp()
        # in fp32 the sum of a large vocabulary would drift
        cumulative = p.cumsum(-1, dtype=torch.float64)
        slices = torch.arange(self.draws, device=p.device, dtype=torch.float64)
        # One point in each slice. The last cumulative value is 1 only up to rounding.
        points = (slices + uniforms) / self.draws * cumulative[:, -1:]
        # `right=True`: a token of probability 0 is never drawn.
        ids = torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1)
        return {"ids": ids.to(torch.int32), "entropy": torch.special.entr(p).sum(-1)}

    def pack(self, drawn: Columns) -> Columns:
        """Return the columns of a window's tokens from what `of` drew for them."""
        # ascending: repeats stand beside each other, and a row begins with a first
        ids = drawn["ids"]
        first = np.ones(ids.shape, dtype=bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        # Every row begins with a first, so runs never cross from one token's draws to the next's.
        places = np.flatnonzero(first)
        counts = np.diff(places, append=ids.size)
        # Counts go from 1 to 64, so count - 1 fits into 6 bits.
        entries = (ids.reshape(-1)[places].astype(np.uint32) << COUNT_BITS) | (counts - 1).astype(
            np.uint32
        )
        return {
            "entries": _to_bytes(entries, entry_bytes(self.vocabulary, COUNT_BITS)),
            "sizes": first.sum(1).astype(np.uint8),
            "entropy": drawn["entropy"].astype(np.float32),
        }

    def unpack(self, columns: Columns) -> Sparse:
        """Return the tokens' estimated distributions, padded to the longest."""
        sizes = columns["sizes"].astype(np.int64)
        entries = _from_bytes(columns["entries"])
        # (N, K) bool: which places of the padded table hold an entry
        there = np.arange(sizes.max(initial=1)) < sizes[:, None]
        ids, shares = np.zeros(there.shape, dtype=np.int64), np.zeros(there.shape, dtype=np.float32)
        ids[there] = entries >> COUNT_BITS
        shares[there] = ((entries & (2**COUNT_BITS - 1)) + 1) / self.draws
        return Sparse(
            torch.from_numpy(ids),
            torch.from_numpy(shares),
            torch.from_numpy(columns["entropy"].copy()),
        )


@dataclass(frozen=True, slots=True)
class TopK:
    """The k largest probabilities, and the mass of the rest.

    Attributes:
        k: Entries of a token.
        vocabulary: Tokens to choose from.
        temperature: Of the teacher's distribution.
    """

    k: int
    vocabulary: int
    temperature: float

    method: ClassVar[str] = "top_k"
    draws: ClassVar[int] = 0

    @staticmethod
    def most(vocabulary: int) -> int:
        """Return the entries that fit into 72 bytes a token."""
        room = TOKEN_BYTES - SPARE_BYTES - SCALAR_BYTES
        return min(vocabulary, room // (entry_bytes(vocabulary, 0) + 2))

    def of(self, logits: Tensor, uniforms: Tensor) -> dict[str, Tensor]:
        """Return `ids` (N, k) int32, `probabilities` (N, k) and `residual` (N,); no random number
        is used.
        """
        p = torch.softmax(logits / self.temperature, -1)
        top = p.topk(self.k, -1)
        residual = p.scatter(1, top.indices, 0.0).sum(-1)  # 1 - sum(top) would cancel
        return {
            "ids": top.indices.to(torch.int32),
            "probabilities": top.values,
            "residual": residual,
        }

    def pack(self, drawn: Columns) -> Columns:
        """Return the columns of a window's tokens from what `of` found for them."""
        ids = drawn["ids"].reshape(-1).astype(np.uint32)
        return {
            "ids": _to_bytes(ids, entry_bytes(self.vocabulary, 0)),
            "probabilities": drawn["probabilities"].reshape(-1).astype(np.float16),
            "residual": drawn["residual"].astype(np.float32),
        }

    def unpack(self, columns: Columns) -> Sparse:
        """Return the tokens' distributions; what rounding to 16 bits took is given back, so that
        they sum to 1.
        """
        ids = torch.from_numpy(_from_bytes(columns["ids"]).astype(np.int64).reshape(-1, self.k))
        p = torch.from_numpy(columns["probabilities"].astype(np.float32).reshape(-1, self.k))
        residual = torch.from_numpy(columns["residual"].copy())
        # Otherwise the gradient q - p would not sum to 0 over the tokens.
        p = p * ((1 - residual) / p.sum(-1).clamp_min(torch.finfo(p.dtype).tiny))[:, None]
        entropy = torch.special.entr(p).sum(-1) + torch.special.entr(residual)
        return Sparse(ids, p, entropy, residual)


@dataclass(frozen=True, slots=True)
class Dense:
    """All logits of few classes. The temperature is the loss's.

    Attributes:
        vocabulary: Classes.
    """

    vocabulary: int

    method: ClassVar[str] = "dense"
    draws: ClassVar[int] = 0

    def of(self, logits: Tensor, uniforms: Tensor) -> dict[str, Tensor]:
        """Return `logits` (N, C)."""
        return {"logits": logits}

    def pack(self, drawn: Columns) -> Columns:
        """Return the column of the examples: `logits` (N, C), float32."""
        return {"logits": drawn["logits"].astype(np.float32)}

    def unpack(self, columns: Columns) -> Tensor:
        """Return the logits (N, C), fp32."""
        return torch.from_numpy(columns["logits"].copy())


Codec = Sampled | TopK | Dense


def _to_bytes(numbers: np.ndarray, width: int) -> np.ndarray:
    """Return uint8 (len, width): the lowest bytes of uint32 numbers, lowest first."""
    return np.ascontiguousarray(numbers.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width])


def _from_bytes(packed: np.ndarray) -> np.ndarray:
    """Return the uint32 numbers of `_to_bytes`."""
    whole = np.zeros((len(packed), 4), dtype=np.uint8)
    whole[:, : packed.shape[1]] = packed
    return whole.view("<u4").reshape(-1)
