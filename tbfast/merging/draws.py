"""The random numbers of merging: Philox keyed by seed, purpose and the tensor's name.

A number belongs to an element of a tensor and to nothing else, so files, shards, threads and the
order of tensors cannot change it. "v1" in the key freezes what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

Key = tuple[int, int, int, int]

_PERSON = b"tbfast.merge.v1"
_RANGE = 1 << 32
_SEEDS = 1 << 64


def key(seed: int, purpose: str, name: str) -> Key:
    """Four words for a stream of numbers; the lowest bit of the last is clear."""
    text = seed.to_bytes(8, "little") + purpose.encode() + b"\0" + name.encode()
    digest = hashlib.blake2b(text, digest_size=16, person=_PERSON).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return words[0], words[1], words[2], words[3] & ~1


def bounds(weights: Sequence[float]) -> list[int]:
    """Of each model the number below which a draw from 0 to 2³² - 1 takes it; the last is 2³².

    Exact for any weights: computed in rational numbers and rounded down.
    """
    shares = [Fraction(weight) for weight in weights]
    total = sum(shares)
    return [int(_RANGE * part / total) for part in accumulate(shares)]


def check_seed(seed: int) -> None:
    """Refuse what is no seed.

    Raises:
        ValueError: Of what it must be.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        raise ValueError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed!r}")
