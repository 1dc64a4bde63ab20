"""A byte-level GPT of the usual plan: pre-norm blocks, learned positions, an untied head."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Causal self-attention and a perceptron, each behind its LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.up_norm = (nn.LayerNorm(width, bias=False) for _ in range(2))
        # One matrix each: a packed one would have one factor for all three.
        self.query, self.key, self.value, self.project = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        y = self.norm(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.up_norm(x))).square())


class GPT(nn.Module):
    """Predicts each byte from those before it.

    Args:
        width: Size of a hidden state, a multiple of 32 (the size of a head).
        depth: Number of blocks.
        tokens: Longest text, in bytes.
    """

    def __init__(self, width: int, depth: int, tokens: int) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(256, width)
        self.position_embedding = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # GPT-2: what is added to the residual stream shrinks with the number of summands.
                last = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(parameter, 0.0, 0.02 / (math.sqrt(2 * depth) if last else 1.0))

    def forward(self, ids: Tensor) -> Tensor:  # (batch, tokens) -> (batch, tokens, 256)
        x = self.byte_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))
