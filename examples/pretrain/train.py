"""One pre-training run, and what is compared.

tbfast compare examples/pretrain/train.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from gpt import GPT
from text import read, windows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

TOKENS, BATCH = 64, 16

variants: dict[str, dict[str, Any] | None] = {
    "plain": None,
    # LLR: every 10 steps, each new factor reached in 5; from the random start on.
    "published": {
        "every": 10,
        "ramp": 5,
        "budget": None,
        "method": "exact",
        "rate_classes": None,
    },
    "every-step": {},
    # At a random start alpha is nothing but the shape of a matrix: no factors until it has left
    # the band of Gaussian noise.
    "start-later": {"start": "auto"},
    # Is it only that embeddings and head learn faster? All else at the base rate.
    "embeddings": {
        "mapping": "fixed",
        "factors": {"*_embedding.weight": 5.0, "head.weight": 5.0},
    },
    "reverse": {"mapping": "reverse"},
    "fixed": {"fixed_from": "every-step"},  # a constant per layer type
}
rates = [5e-4, 1e-3, 2e-3, 4e-3]
seeds = range(4)
options = {"preset": "llr"}


def train(
    make_optimizer: Callable[..., Optimizer],
    *,
    seed: int,
    rate: float,
    steps: int = 200,
    width: int = 96,
    depth: int = 3,
    held_out: int = 512,
) -> dict[str, float]:
    """Losses of a GPT trained from scratch, in nats per byte of files it has not seen.

    The seed sets the initial weights and the batches: they are the same in every variant.

    Args:
        make_optimizer: ``make_optimizer(model, optimizer class, **its arguments)``.
        seed, rate: Of this run.
        steps: Optimizer steps, of 16 texts of 64 bytes each.
        width, depth: Of the model.
        held_out: Texts of each of the two sets that it is evaluated on.
    """
    text = read()
    torch.manual_seed(seed)
    model = GPT(width, depth, TOKENS)
    optimizer = make_optimizer(
        model, torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _shape(step, steps))

    def loss_of(source: Tensor, starts: Tensor) -> Tensor:
        pieces = windows(source, starts, TOKENS + 1)
        return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())

    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text.train) - TOKENS, (BATCH,), generator=order)
        loss = loss_of(text.train, starts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def held_out_loss(source: Tensor) -> float:
        starts = torch.linspace(0, len(source) - TOKENS - 1, held_out).long()
        return sum(float(loss_of(source, s)) * len(s) for s in starts.split(64)) / held_out

    return {"validation": held_out_loss(text.validation), "test": held_out_loss(text.test)}


def _shape(step: int, steps: int) -> float:
    """The schedule: a twentieth of the steps rises, the rest falls along a cosine to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
