"""GPT-2's shape as nanoGPT trains it, written from its published description.

What its step consists of: blocks of layer norm, attention and an MLP four times as wide, without
biases; learned positions; causal attention by `scaled_dot_product_attention` with no mask; a head
that shares the embedding's weights; cross-entropy over logits in full; fused AdamW that decays
matrices alone. precision.py compiles and times it beside this project's loop.

Shape legend: B rows, T tokens, C width, H heads, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and added to what it read."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mixed = nn.Linear(width, width, bias=False)
        self.wide = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        rows, length, width = x.shape
        split = self.qkv(self.norm_1(x)).view(rows, length, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # (B, H, T, C / H) each
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mixed(read.transpose(1, 2).reshape(rows, length, width))
        return x + self.narrow(F.gelu(self.wide(self.norm_2(x))))


class GPT(nn.Module):
    """The language model; called with tokens and targets, both (B, T), it gives the mean loss."""

    def __init__(self, vocabulary: int, length: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(heads, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # what ends a residual branch is smaller, as GPT-2 has it
                ends = name.endswith(("mixed.weight", "narrow.weight"))
                std = 0.02 / (2 * layers) ** 0.5 if ends else 0.02
                nn.init.normal_(parameter, std=std)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(at)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def optimizer_of(model: GPT, *, learning_rate: float) -> torch.optim.AdamW:
    """Return fused AdamW that decays matrices and embeddings, and nothing else."""
    every = list(model.parameters())
    groups = [
        {"params": [each for each in every if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in every if each.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
