"""Philox4x32-10 in NumPy: the random bits of csrc/philox.h, for the reference.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))  # golden ratio, sqrt(3) - 1
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_BLOCK = 128  # columns whose signs one counter gives


class Purpose(IntEnum):
    """What bits are drawn for; the numbers are those of csrc/philox.h."""

    PROBE = 0
    SKETCH = 1
    ROWS = 2


def philox(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """128 random bits for each counter.

    Args:
        counter: Words below 2^32, shape (..., 4).
        key: Words below 2^32, shape (..., 2); the leading dimensions broadcast.

    Returns:
        Array of the broadcast shape (..., 4).
    """
    # In 64 bits: the high half of a product is wanted too.
    c = list(np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0))
    k = list(np.moveaxis(np.asarray(key, dtype=np.uint64), -1, 0))
    for _ in range(_ROUNDS):
        p0, p1 = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [(p1 >> _HIGH) ^ c[1] ^ k[0], p1 & _LOW, (p0 >> _HIGH) ^ c[3] ^ k[1], p0 & _LOW]
        k = [(word + step) & _LOW for word, step in zip(k, _KEY_STEPS, strict=True)]
    return np.stack(np.broadcast_arrays(*c), axis=-1).astype(np.uint32)


def signs(
    seed: int,
    name: int,
    purpose: Purpose,
    draw: int,
    first_element: int,
    count: int,
    columns: int,
) -> NDArray[np.float64]:
    """Rademacher signs of ``count`` elements of a layer, as every backend draws them.

    Args:
        seed: Below 2^64.
        name: CRC-32 of the layer's name.
        purpose: What they are for.
        draw: Which of the draws for this purpose, below 2^24.
        first_element: Index of the matrix in its layer times its length, plus a place in it.
        count: Number of elements, the rows of the result.
        columns: Signs per element, at most 8192.

    Returns:
        Array (count, columns) of -1 and 1.
    """
    blocks = -(-columns // _BLOCK)
    element = np.uint64(first_element) + np.arange(count, dtype=np.uint64)[:, None]
    what = np.uint64(purpose << 30 | draw) | np.arange(blocks, dtype=np.uint64) << np.uint64(24)
    high = np.uint64(seed >> 32)
    words = np.broadcast_arrays(element & _LOW, element >> _HIGH, what, high)
    bits = philox(np.stack(words, axis=-1), (seed & 0xFFFFFFFF, name))
    # Little-endian words, then little-endian bits: column 32 w + b is bit b of word w.
    flat = np.unpackbits(bits.astype("<u4").reshape(count, -1).view(np.uint8), 1, bitorder="little")
    return np.where(flat[:, :columns], -1.0, 1.0)
