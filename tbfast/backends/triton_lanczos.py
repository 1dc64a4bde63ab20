"""Lanczos on all matrices of a batch, in phases that all programs enter together.

    0          start vectors: random signs or given ones, normalised
    1          y = A q_0                                                  (work items)
    2 3 4      where the first products leave the range of float32, the weights are scaled by a
               power of two that their largest entry decides, and y is computed again
    5          alpha_0 = q_0 . y;  y is made orthogonal to q_0;  beta_0 = |y|;  q_1 = y / beta_0
    6 7 8 ...  product and orthogonalisation of step 1, of step 2, ...

A cooperative launch runs all phases with a grid barrier after each, other launches run one phase
each. Programs take entries and items in turn; each is the work of one program, in an order of its
own, so the grid changes no bit. The definition is reference_lanczos.py, the rules and constants
are those of csrc/cpu/lanczos.cpp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tbfast.backends import triton_apply as layout
from tbfast.backends.triton_apply import any_offset, apply_item
from tbfast.backends.triton_numbers import exponent_of, grid_barrier, is_finite, load_double
from tbfast.backends.triton_vectors import advance, finish, means, start

FIRST_PHASES = 4  # before the first step's orthogonalisation

_ADDRESS, _ROWS, _COLS, _DTYPE = layout.ADDRESS, layout.ROWS, layout.COLS, layout.DTYPE
_PROBES, _SLICES, _SLICE_ROWS = layout.PROBES, layout.SLICES, layout.SLICE_ROWS
_FIRST_ITEM, _WIDTH = layout.FIRST_ITEM, layout.ENTRY_COLUMNS

# Mean eigenvalues between these: squares of entries stay well inside the range of float32.
_SMALLEST_MEAN = tl.constexpr(1e-12)
_LARGEST_MEAN = tl.constexpr(1e12)
_MOST_EXPONENT = tl.constexpr(1000)


@triton.jit
def _leaves_range(entry, mean, GROUP: tl.constexpr):
    wanted = tl.arange(0, GROUP) < tl.load(entry + _PROBES)
    good = is_finite(mean) | (wanted == 0)
    largest = tl.max(tl.where(wanted & good, mean, 0.0))
    fits = (largest > _SMALLEST_MEAN) & (largest < _LARGEST_MEAN)
    return (tl.min(good.to(tl.int32)) == 0) | (fits == 0)


@triton.jit
def _extent(entry, slice_index, BM: tl.constexpr, BK: tl.constexpr):
    """The largest entry of a slice, infinite if one is not finite."""
    rows, cols = tl.load(entry + _ROWS), tl.load(entry + _COLS)
    first = slice_index * tl.load(entry + _SLICE_ROWS)
    last = tl.minimum(rows, first + tl.load(entry + _SLICE_ROWS))
    top = tl.max(tl.zeros((BK,), tl.float64))
    for row in range(first, last, BM):
        r = row + tl.arange(0, BM)
        for left in range(0, cols, BK):
            k = left + tl.arange(0, BK)
            inside = (r < last)[:, None] & (k < cols)[None, :]
            offset, _ = any_offset(entry, r[:, None], k[None, :])
            v = load_double(tl.load(entry + _ADDRESS), offset, inside, tl.load(entry + _DTYPE))
            size = tl.where(is_finite(v), tl.abs(v), float("inf"))
            top = tl.maximum(top, tl.max(tl.max(size, axis=1)))
    return top


@triton.jit
def _exponent(entry, tops):
    """Of the scale that an entry's weights need, from the extents of its slices."""
    top = tl.load(tops + tl.load(entry + _FIRST_ITEM))
    for slice_index in range(1, tl.load(entry + _SLICES).to(tl.int32)):
        top = tl.maximum(top, tl.load(tops + tl.load(entry + _FIRST_ITEM) + slice_index))
    exponent = tl.minimum(tl.maximum(-exponent_of(top), -_MOST_EXPONENT), _MOST_EXPONENT)
    return tl.where(is_finite(top) & (top > 0), exponent, 0).to(tl.int32)


@triton.jit(do_not_specialize=["begin", "end", "seed_low", "seed_high", "draw"])
def spectral_phases(
    begin,
    end,
    counter,  # of the grid barrier; None where a launch is one phase
    table,  # (entries, ENTRY_COLUMNS) int64
    items,  # (items, 2) int64: entry, slice
    n_entries,
    n_items,
    vectors,  # float32: what the plan laid out
    given,  # float32 start vectors; None for random signs
    out,  # float32 products; None for Lanczos
    going,  # (entries, GROUP) int32
    exponents,  # (entries) int32
    flagged,  # (entries) int32
    tops,  # (items) float64
    state,  # (entries, 2, GROUP) float64
    products,  # (entries, steps, GROUP) float64
    diagonal,  # (runs, steps) float64
    off_diagonal,  # (runs, steps) float64
    taken,  # (runs) int32
    steps,
    seed_low,
    seed_high,
    draw,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,  # elements of a vector at a time
    INTERPRETED: tl.constexpr,
):
    me, programs = tl.program_id(0), tl.num_programs(0)
    p = tl.arange(0, GROUP)
    for phase in range(begin, end):
        step = tl.maximum(phase - 4, 0) // 2
        if (phase == 1) | (phase == 3) | (phase == 4) | ((phase > 5) & (phase % 2 == 0)):
            for i in range(me, n_items, programs):
                e = tl.load(items + 2 * i)
                slice_index = tl.load(items + 2 * i + 1).to(tl.int32)
                entry = table + e * _WIDTH
                exponent = tl.load(exponents + e)
                wanted = tl.max(tl.load(going + e * GROUP + p)) != 0
                if (phase == 3) | (phase == 4):
                    wanted = tl.load(flagged + e) != 0
                if phase == 3:
                    if wanted:
                        tl.store(tops + i, _extent(entry, slice_index, BM, BK // 2))
                elif wanted:
                    if phase == 4:
                        exponent = _exponent(entry, tops)
                        tl.store(exponents + e, exponent)
                    apply_item(
                        entry, slice_index, step, exponent, vectors, GROUP, BM, BK, INTERPRETED
                    )
        else:
            for e in range(me, n_entries, programs):
                entry = table + e * _WIDTH
                mine = state + e * 2 * GROUP
                if phase == 0:
                    norm = start(
                        entry,
                        vectors,
                        given,
                        seed_low,
                        seed_high,
                        draw,
                        given is not None,
                        GROUP,
                        BV,
                    )
                    tl.store(mine + p, norm)
                    tl.store(going + e * GROUP + p, (p < tl.load(entry + _PROBES)).to(tl.int32))
                    tl.store(exponents + e, 0)
                    tl.store(flagged + e, 0)
                elif out is not None:
                    finish(entry, vectors, tl.load(mine + p), out, GROUP, BV)
                elif phase == 2:
                    mean = means(entry, vectors, 0, GROUP, BV)
                    tl.store(flagged + e, _leaves_range(entry, mean, GROUP).to(tl.int32))
                elif tl.max(tl.load(going + e * GROUP + p)) != 0:
                    advance(
                        entry, mine, going + e * GROUP, tl.load(exponents + e), step, steps,
                        vectors, products + e * steps * GROUP, diagonal, off_diagonal, taken,
                        GROUP, BV,
                    )  # fmt: skip
        if counter is not None:
            grid_barrier(counter)
