"""What happens to the vectors of Lanczos runs between two products, in the Triton kernels.

    start      q_0 = random signs or given vectors, normalised
    advance    w = y summed over slices;  alpha_j = q_j . w;  w -= alpha_j q_j + beta_{j-1} q_{j-1}
               w is made orthogonal to all q_i once more;  beta_j = |w|;  q_{j+1} = w / beta_j
               a run ends where beta_j is rounding: an invariant subspace is found

One program has all runs of an entry; their vectors are (length, GROUP). Tiles are summed in
float32, tiles of a vector in float64. Rules and constants are those of csrc/cpu/lanczos.cpp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tbfast.backends import triton_apply as layout
from tbfast.backends.triton_numbers import PROBE_BITS, is_finite, power_of_two, random_words

_COLS, _DTYPE, _ELEMENT, _NAME = layout.COLS, layout.DTYPE, layout.ELEMENT, layout.NAME
_FIRST_PROBE, _PROBES = layout.FIRST_PROBE, layout.PROBES
_BASIS, _SUMS, _PARTIALS = layout.BASIS, layout.SUMS, layout.PARTIALS
_SLICES, _GIVEN, _RUN, _COUNT = layout.SLICES, layout.GIVEN, layout.RUN, layout.COUNT

# Below this, relative to the norm of A, what is left of a new vector is rounding.
_INVARIANT = tl.constexpr(10 * 2.0**-23)


@triton.jit
def start(
    entry, vectors, given, seed_low, seed_high, draw, HAS_GIVEN: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """q_0, normalised; returns the norms that the vectors had, (GROUP,)."""
    cols = tl.load(entry + _COLS)
    wanted = tl.load(entry + _PROBES)
    first = tl.load(entry + _FIRST_PROBE)
    p = tl.arange(0, GROUP)
    q = vectors + tl.load(entry + _BASIS)
    square = tl.zeros((GROUP,), tl.float64)
    for left in range(0, cols, BK):
        k = left + tl.arange(0, BK)
        inside = (k < cols)[:, None] & (p < wanted)[None, :]
        if HAS_GIVEN:
            place = given + tl.load(entry + _GIVEN) + p[None, :] * cols + k[:, None]
            v = tl.load(place, mask=inside, other=0.0)
        else:
            element = tl.load(entry + _ELEMENT) + k
            words = random_words(
                element, first, PROBE_BITS, draw, seed_low, seed_high, tl.load(entry + _NAME)
            )
            bit = (words[:, None] >> (first % 32 + p)[None, :].to(tl.uint32)) & 1
            v = tl.where(inside, 1.0 - 2.0 * bit.to(tl.float32), 0.0)
        tl.store(
            q + k[:, None] * GROUP + p[None, :], v, mask=(k < cols)[:, None] & (p >= 0)[None, :]
        )
        square += tl.sum(v * v, axis=0).to(tl.float64)
    norm = tl.sqrt(square)
    factor = 1 / tl.where(norm > 0, norm, 1.0)
    tl.debug_barrier()
    for left in range(0, cols, BK):
        k = left + tl.arange(0, BK)
        place = q + k[:, None] * GROUP + p[None, :]
        inside = (k < cols)[:, None] & (p >= 0)[None, :]
        v = tl.load(place, mask=inside, other=0.0)
        tl.store(place, (v.to(tl.float64) * factor[None, :]).to(tl.float32), mask=inside)
    return norm


@triton.jit
def _add_slices(entry, vectors, k, cols, GROUP: tl.constexpr):
    """y[k] of all slices, in order: (BK, GROUP)."""
    p = tl.arange(0, GROUP)
    place = vectors + tl.load(entry + _PARTIALS) + k[:, None] * GROUP + p[None, :]
    inside = (k < cols)[:, None] & (p >= 0)[None, :]
    y = tl.load(place, mask=inside, other=0.0)
    for slice_index in range(1, tl.load(entry + _SLICES).to(tl.int32)):
        y += tl.load(place + slice_index * cols * GROUP, mask=inside, other=0.0)
    return y


@triton.jit
def means(entry, vectors, step, GROUP: tl.constexpr, BK: tl.constexpr):
    """q_step . y, and y written in one piece."""
    cols = tl.load(entry + _COLS)
    p = tl.arange(0, GROUP)
    q = vectors + tl.load(entry + _BASIS) + step * cols * GROUP
    w = vectors + tl.load(entry + _SUMS)
    mean = tl.zeros((GROUP,), tl.float64)
    for left in range(0, cols, BK):
        k = left + tl.arange(0, BK)
        inside = (k < cols)[:, None] & (p >= 0)[None, :]
        y = _add_slices(entry, vectors, k, cols, GROUP)
        tl.store(w + k[:, None] * GROUP + p[None, :], y, mask=inside)
        near = tl.load(q + k[:, None] * GROUP + p[None, :], mask=inside, other=0.0)
        mean += tl.sum(near * y, axis=0).to(tl.float64)
    return mean


@triton.jit
def _turned(q, k, inside, turned, GROUP: tl.constexpr):
    """A basis vector; or, complex with (re, im) interleaved, i times it."""
    p = tl.arange(0, GROUP)
    place = q + (k ^ turned)[:, None] * GROUP + p[None, :]
    sign = tl.where((turned == 1) & (k % 2 == 0), -1.0, 1.0)
    return tl.load(place, mask=inside, other=0.0) * sign[:, None].to(tl.float32)


@triton.jit
def _project_out(
    entry, vectors, products, count, turned, GROUP: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """w -= q_i (q_i . w), i < count, by classical Gram-Schmidt."""
    cols = tl.load(entry + _COLS)
    p = tl.arange(0, GROUP)
    basis = vectors + tl.load(entry + _BASIS)
    w = vectors + tl.load(entry + _SUMS)
    for i in range(count):
        product = tl.zeros((GROUP,), tl.float64)
        for left in range(0, cols, BK):
            k = left + tl.arange(0, BK)
            inside = (k < cols)[:, None] & (p >= 0)[None, :]
            q = _turned(basis + i * cols * GROUP, k, inside, turned, GROUP)
            v = tl.load(w + k[:, None] * GROUP + p[None, :], mask=inside, other=0.0)
            product += tl.sum(q * v, axis=0).to(tl.float64)
        tl.store(products + i * GROUP + p, product)
    tl.debug_barrier()
    for left in range(0, cols, BK):
        k = left + tl.arange(0, BK)
        inside = (k < cols)[:, None] & (p >= 0)[None, :]
        v = tl.load(w + k[:, None] * GROUP + p[None, :], mask=inside, other=0.0)
        for i in range(count):
            q = _turned(basis + i * cols * GROUP, k, inside, turned, GROUP)
            v -= tl.load(products + i * GROUP + p).to(tl.float32)[None, :] * q
        tl.store(w + k[:, None] * GROUP + p[None, :], v, mask=inside)
    tl.debug_barrier()


@triton.jit
def advance(
    entry, state, going, exponent, step, steps, vectors, products, diagonal, off_diagonal, taken,
    GROUP: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Makes q_{step+1} of y = A q_step, for the runs of an entry that are going.

    state: (2, GROUP): the last beta, and the largest of |alpha| + beta so far
    """
    p = tl.arange(0, GROUP)
    on = tl.load(going + p) != 0
    alpha = means(entry, vectors, step, GROUP, BK)
    alpha = tl.where(is_finite(alpha), alpha, float("nan"))
    run = tl.load(entry + _RUN) + p
    unscale = power_of_two(-exponent)
    tl.store(diagonal + run * steps + step, alpha * unscale * unscale, mask=on)
    tl.store(taken + run, step + 1, mask=on)
    last = (step + 1 == steps) | (step + 1 == tl.load(entry + _COUNT))
    if last:
        tl.store(going + p, tl.zeros((GROUP,), tl.int32))
    else:
        cols = tl.load(entry + _COLS)
        w = vectors + tl.load(entry + _SUMS)
        q = vectors + tl.load(entry + _BASIS) + step * cols * GROUP
        # At the first step there is neither a beta nor a vector before.
        beta = tl.load(state + p, mask=p < GROUP * step, other=0.0)
        largest = tl.load(state + GROUP + p, mask=p < GROUP * step, other=0.0)
        tl.debug_barrier()
        for left in range(0, cols, BK):
            k = left + tl.arange(0, BK)
            place = k[:, None] * GROUP + p[None, :]
            inside = (k < cols)[:, None] & (p >= 0)[None, :]
            v = tl.load(w + place, mask=inside, other=0.0)
            v -= alpha.to(tl.float32)[None, :] * tl.load(q + place, mask=inside, other=0.0)
            earlier = (k < cols * step)[:, None] & inside
            before = tl.load(q - cols * GROUP + place, mask=earlier, other=0.0)
            tl.store(w + place, v - beta.to(tl.float32)[None, :] * before, mask=inside)
        tl.debug_barrier()
        _project_out(entry, vectors, products, step + 1, 0, GROUP, BK)
        if tl.load(entry + _DTYPE) >= 4:
            # Every eigenvalue has a second eigenvector, i times the first: rounding must not let
            # it in.
            _project_out(entry, vectors, products, step + 1, 1, GROUP, BK)
        square = tl.zeros((GROUP,), tl.float64)
        for left in range(0, cols, BK):
            k = left + tl.arange(0, BK)
            inside = (k < cols)[:, None] & (p >= 0)[None, :]
            v = tl.load(w + k[:, None] * GROUP + p[None, :], mask=inside, other=0.0)
            square += tl.sum(v * v, axis=0).to(tl.float64)
        norm = tl.sqrt(square)
        largest = tl.maximum(largest, tl.abs(alpha) + beta)
        on = on & (norm > _INVARIANT * largest)
        factor = 1 / tl.where(on, norm, 1.0)
        for left in range(0, cols, BK):
            k = left + tl.arange(0, BK)
            place = k[:, None] * GROUP + p[None, :]
            inside = (k < cols)[:, None] & (p >= 0)[None, :]
            v = tl.load(w + place, mask=inside, other=0.0).to(tl.float64) * factor[None, :]
            v = tl.where(on[None, :], v, 0.0).to(tl.float32)
            tl.store(q + cols * GROUP + place, v, mask=inside)
        tl.store(off_diagonal + run * steps + step, norm * unscale * unscale, mask=on)
        tl.store(state + p, norm)
        tl.store(state + GROUP + p, largest)
        tl.store(going + p, on.to(tl.int32))


@triton.jit
def finish(entry, vectors, norm, out, GROUP: tl.constexpr, BK: tl.constexpr):
    """A x of the vectors as they were before they were normalised."""
    cols = tl.load(entry + _COLS)
    p = tl.arange(0, GROUP)
    for left in range(0, cols, BK):
        k = left + tl.arange(0, BK)
        y = _add_slices(entry, vectors, k, cols, GROUP)
        place = out + tl.load(entry + _GIVEN) + p[None, :] * cols + k[:, None]
        inside = (k < cols)[:, None] & (p < tl.load(entry + _PROBES))[None, :]
        tl.store(place, (y.to(tl.float64) * norm[None, :]).to(tl.float32), mask=inside)
