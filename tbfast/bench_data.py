"""Weights to time things on: of a spectrum that is known in closed form, or larger than the cache.

Known spectra make every check before a timing independent of any eigensolver.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def singular_values(rows: int, cols: int, moved: float = 0.0) -> Array:
    """Ascending: the bulk about as of Gaussian noise of this shape, above it a power law.

    The eigenvalues, their squares, have a tail of exponent 3. ``moved`` pulls them apart, the
    largest by this share of itself.
    """
    count, root = min(rows, cols), math.sqrt(min(rows, cols) / max(rows, cols))
    share = (np.arange(count) + 0.5) / count
    bulk = 1 - root + 2 * root * share  # from one edge of Marchenko and Pastur to the other
    found: Array = bulk * (1 - share) ** -0.25 * (1 + moved * share)
    return found


def known_layers(rows: int, cols: int, count: int, moved: float = 0.0) -> list[Tensor]:
    """Float32 matrices of these :func:`singular_values`, to rounding, with dense singular vectors.

    The same vectors whatever ``moved`` is. The layers are one matrix with its rows rotated, which
    keeps the spectrum.
    """
    generator = torch.Generator().manual_seed(rows * 65537 + cols)
    first, n = torch.zeros(rows, cols), min(rows, cols)
    first[range(n), range(n)] = torch.from_numpy(singular_values(rows, cols, moved)).float()
    for _ in range(2):
        first = _mixed(_mixed(first, generator).T, generator).T
    return [first.roll(layer, 0) for layer in range(count)]


def _mixed(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """The matrix times an orthogonal one: random signs, then a discrete Hartley transform."""
    length = matrix.shape[1]
    signs = 1.0 - 2 * torch.randint(2, (length,), generator=generator)
    wave: Tensor = torch.fft.fft(matrix * signs)
    return (wave.real - wave.imag) / math.sqrt(length)


def cold_bytes() -> int:
    """Memory that the last-level cache holds no useful part of: four times as large, or more."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        cache = int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        cache = 32 << 20
    return min(max(4 * cache, 256 << 20), 1 << 30)


@lru_cache(maxsize=1)
def cold_floats(size: int) -> Tensor:
    """Float32 noise of so many bytes in one piece, kept for the next caller."""
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).repeat(
        math.ceil(size / (4 << 20))
    )


def cold_layers(
    rows: int, cols: int, size: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """As many matrices as ``size`` bytes of float32 hold, at least one; end to end in memory."""
    count = max(1, size // (4 * rows * cols))
    floats = cold_floats(max(size, 4 * rows * cols))[: count * rows * cols]
    return list(floats.to(dtype).view(count, rows, cols).unbind())


def words(floats: Tensor) -> NDArray[np.uint64]:
    """The memory of a contiguous tensor as 64-bit words, what is left over dropped."""
    flat = floats.flatten().view(torch.uint8).numpy()
    return flat[: len(flat) // 8 * 8].view(np.uint64)


def minilm(checkpoint: Path) -> list[Tensor]:
    """The 37 matrices of MiniLM-L6 from its checkpoint, embeddings left out."""
    from safetensors.torch import load_file

    tensors = load_file(checkpoint)
    return [
        tensor.float()
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and "embeddings" not in name
    ]
