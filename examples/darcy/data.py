"""Darcy flow, as shipped in the neuraloperator 0.3.0 wheel, split by seed.

a(x, y) is a binary permeability, u(x, y) the pressure that solves -div(a grad u) = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """What one run sees: its training subset, then samples that it does not train on."""

    train: Samples
    validation: Samples
    test: Samples


@dataclass(frozen=True)
class Samples:
    """Coefficient fields and their solutions, both (samples, x, y), float32."""

    a: Tensor
    u: Tensor

    def __len__(self) -> int:
        return len(self.a)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        return Samples(self.a[index], self.u[index])

    @property
    def largest_size(self) -> int:
        """Largest training set that leaves validation and test untouched."""
        return len(self) // 5

    def split(self, size: int, seed: int) -> Split:
        """The seed's permutation of the samples: 20 % for training, of which the first ``size``
        are taken, so that small sets are part of large ones; 10 % validation; 35 % test."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        start, middle, end = (int(len(order) * share) for share in (0.2, 0.3, 0.65))
        return Split(self[order[:size]], self[order[start:middle]], self[order[middle:end]])


@lru_cache(maxsize=1)
def load(folder: Path) -> Samples:
    """The samples of a folder; raises FileNotFoundError with the remedy."""
    path = folder / "darcy_train_16.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; get it with: python examples/fetch.py")
    held = torch.load(path, weights_only=True)
    return Samples(held["x"].float(), held["y"].float())
