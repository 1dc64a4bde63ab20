"""One training run on few Darcy samples, and what is compared.

    tbfast compare examples/darcy/train.py

needs the data that ``python examples/fetch.py`` gets.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import Samples, load
from fno import FNO2d
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

BATCH = 8
DATA = Path("build/data/darcy")


def variants_of(size: int) -> dict[str, dict[str, Any] | None]:
    """What is compared at a number of training samples."""
    return {
        "plain": None,
        # Real matrices only, once an epoch; complex ones keep the base rate.
        "published": {
            "exclude": "spectral.*",
            "every": size // BATCH,
            "budget": None,
            "method": "exact",
            "rate_classes": None,
        },
        "every-step": {},
        "reverse": {"mapping": "reverse"},
        "fixed": {"fixed_from": "every-step"},
    }


rates = [8e-3, 1.6e-2, 3.2e-2]
seeds = range(3)
variants = variants_of(16)
# Every balanced matrix here is 24×24. The published rule leaves out layers under 50 eigenvalues,
# which would be all of them; the paper's own FNO runs lower that bound as well (to 12).
options = {"min_eigs": 24}


def train(
    make_optimizer: Callable[..., Optimizer],
    *,
    seed: int,
    rate: float,
    size: int = 16,
    steps: int = 200,
    data: Path = DATA,
) -> dict[str, float]:
    """Mean relative L2 errors of an operator, on samples it has not seen.

    The seed sets the initial weights, the samples and the batches: they are the same in every
    variant.

    Args:
        make_optimizer: ``make_optimizer(model, optimizer class, **its arguments)``.
        seed, rate: Of this run.
        size: Training samples.
        steps: Optimizer steps.
        data: Folder of the data.
    """
    split = load(data).split(size, seed)
    mean, std = split.train.u.mean(), split.train.u.std()
    torch.manual_seed(seed)
    model = FNO2d()
    optimizer = make_optimizer(model, torch.optim.Adam, lr=rate, weight_decay=1e-4)
    schedule = CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    queue: list[Tensor] = []
    for _ in range(steps):
        if not queue:  # a new epoch; an incomplete last batch is dropped
            shuffled = torch.randperm(size, generator=order)
            queue = list(shuffled[: size // BATCH * BATCH].split(BATCH))
        batch = split.train[queue.pop()]
        loss = relative_l2(model(batch.a) * std + mean, batch.u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def error(samples: Samples) -> float:
        parts = zip(samples.a.split(50), samples.u.split(50), strict=True)
        return float(torch.cat([relative_l2(model(a) * std + mean, u) for a, u in parts]).mean())

    return {"validation": error(split.validation), "test": error(split.test)}


def relative_l2(predicted: Tensor, true: Tensor) -> Tensor:
    """|predicted - true| / |true| of each sample, (samples,)."""
    return (predicted - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
