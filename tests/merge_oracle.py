"""What merging is held against: its random numbers, one by one, and models to merge."""

import numpy as np

from tbfast.backends.philox import philox


def arrays(count, size=3000, dtype=np.float32, seed=0, changed=0.7):
    """A base and models that differ from it in some elements."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(size).astype(dtype)
    noise = 0.1 * rng.standard_normal((count, size))
    kept = rng.random((count, size)) >= changed
    return base, [
        np.where(k, base, base + n).astype(dtype) for k, n in zip(kept, noise, strict=True)
    ]


def drawn(stream, elements):
    """32-bit numbers of elements as merging defines them: one byte of 16 that a call of Philox
    gives, and three more from a call of the element's own."""
    k0, k1, c2, c3 = stream
    elements = np.asarray(elements, dtype=np.uint64)
    calls, place = elements // 16, elements % 16

    def words(counter, last):
        low, high = counter & 0xFFFFFFFF, counter >> np.uint64(32)
        return np.array(
            [philox((int(a), int(b), c2, last), (k0, k1)) for a, b in zip(low, high, strict=True)]
        )

    four = words(calls, c3)
    byte = four[np.arange(len(elements)), place // 4] >> (8 * (place % 4)) & 0xFF
    rest = words(elements, c3 | 1)[:, 0] >> 8
    return byte.astype(np.uint64) << np.uint64(24) | rest.astype(np.uint64)
