"""y = A x for A = TᵀT, T the tall view of a matrix: the Triton kernels' only pass over weights.

    work item    a slice of rows of one matrix; slices depend on its shape alone
    panel        a few rows of the slice:  t = T[rows] x,  then  y += T[rows]ᵀ t
                 the second look at the rows finds them in the cache: memory is read once
    y            of each slice is written apart; whoever needs it adds the slices in order

Matrices of two bytes go through tensor cores, x and t in two parts each (16 or 22 bits). Matrices
whose rows or columns are contiguous and aligned are read by 16 bytes, others one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tbfast.backends.triton_numbers import load_single, multiply, power_of_two_single

# Columns of the table of entries, int64; an entry is a matrix and a group of start vectors.
ADDRESS = tl.constexpr(0)
ROWS = tl.constexpr(1)  # of the real tall view
COLS = tl.constexpr(2)
ROW_STRIDE = tl.constexpr(3)  # of the tall view, in elements
COL_STRIDE = tl.constexpr(4)
DTYPE = tl.constexpr(5)  # as in csrc/ragged.h
PATH = tl.constexpr(6)
CONJUGATE = tl.constexpr(7)  # -1 turns the sign of imaginary parts, 1 keeps it
ELEMENT = tl.constexpr(8)  # of the first random sign, see csrc/philox.h
NAME = tl.constexpr(9)  # CRC-32 of the layer's name
FIRST_PROBE = tl.constexpr(10)
PROBES = tl.constexpr(11)  # that are wanted, up to the group's size
BASIS = tl.constexpr(12)  # place of (steps, COLS, group) among the vectors
SUMS = tl.constexpr(13)  # of (COLS, group): A x
PARTIALS = tl.constexpr(14)  # of (slices, COLS, group)
SLICES = tl.constexpr(15)
SLICE_ROWS = tl.constexpr(16)
GIVEN = tl.constexpr(17)  # place of (probes, COLS) among the start vectors of the caller
RUN = tl.constexpr(18)  # number of its first run
FIRST_ITEM = tl.constexpr(19)
COUNT = tl.constexpr(20)  # of eigenvalues
ENTRY_COLUMNS = tl.constexpr(21)

# How weights are read.
ANY_LAYOUT = tl.constexpr(0)
ROWS_TOGETHER = tl.constexpr(1)
COLS_TOGETHER = tl.constexpr(2)

_HALF_UP = tl.constexpr(256.0)  # float16 holds numbers near 1 times this with 22 bits in two parts


@triton.jit
def any_offset(entry, r, k):
    """Where elements (r, k) of the real tall view lie, in real numbers, and their signs."""
    complex_bit = (tl.load(entry + DTYPE) >= 4).to(tl.int64)
    r, k = r.to(tl.int64), k.to(tl.int64)
    part = (r ^ k) & complex_bit
    place = (r >> complex_bit) * tl.load(entry + ROW_STRIDE)
    place += (k >> complex_bit) * tl.load(entry + COL_STRIDE)
    imaginary = tl.load(entry + CONJUGATE) * (2 * (r & 1) - 1)
    return (place << complex_bit) + part, tl.where(part == 1, imaginary, 1).to(tl.float32)


@triton.jit
def _tile(entry, W, stride, r, k, rows, cols, exponent, LAYOUT: tl.constexpr):
    """T[r, k], zero beyond its edges."""
    if LAYOUT == ROWS_TOGETHER:
        inside = (r < rows)[:, None] & (k < cols)[None, :]
        place = r.to(tl.int64)[:, None] * stride + k[None, :]
        w = tl.load(W + place, mask=inside, other=0.0)
    elif LAYOUT == COLS_TOGETHER:
        inside = (k < cols)[:, None] & (r < rows)[None, :]
        place = k.to(tl.int64)[:, None] * stride + r[None, :]
        w = tl.trans(tl.load(W + place, mask=inside, other=0.0))
    else:
        inside = (r < rows)[:, None] & (k < cols)[None, :]
        offset, sign = any_offset(entry, r[:, None], k[None, :])
        w = sign * load_single(W, offset, inside, tl.load(entry + DTYPE), exponent)
    return w


@triton.jit
def _slice(
    entry,
    W,
    stride,
    rows,
    cols,
    first,
    last,
    x,
    y,
    exponent,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """y = T[first:last]ᵀ T[first:last] x; x and y (cols, GROUP)."""
    p = tl.arange(0, GROUP)
    for top in range(first, last, BM):
        r = top + tl.arange(0, BM)
        t = tl.zeros((BM, GROUP), tl.float32)
        for left in range(0, cols, BK):
            k = left + tl.arange(0, BK)
            w = _tile(entry, W, stride, r, k, rows, cols, exponent, LAYOUT)
            near = tl.load(x + k[:, None] * GROUP + p[None, :], mask=(k < cols)[:, None], other=0.0)
            if w.dtype == tl.float16:
                near = near * _HALF_UP
            t = multiply(w, near, t, INTERPRETED)
        after = 1.0
        if W.dtype == tl.pointer_type(tl.float16):
            # t may be anywhere in the range of float32: brought near 1, by a power of two.
            largest = tl.max(tl.abs(t)).to(tl.int32, bitcast=True) >> 23
            bits = tl.minimum(tl.maximum(largest, 1), 253)
            t = t * power_of_two_single(127 - bits) * _HALF_UP
            after = power_of_two_single(bits - 127) / (_HALF_UP * _HALF_UP)
        for left in range(0, cols, BK):
            k = left + tl.arange(0, BK)
            w = _tile(entry, W, stride, r, k, rows, cols, exponent, LAYOUT)
            part = multiply(tl.trans(w), t, tl.zeros((BK, GROUP), tl.float32), INTERPRETED)
            place = y + k[:, None] * GROUP + p[None, :]
            inside = (k < cols)[:, None] & (p >= 0)[None, :]
            follows = (k < tl.where(top > first, cols, 0))[:, None] & (p >= 0)[None, :]
            before = tl.load(place, mask=follows, other=0.0)
            tl.store(place, before + part * after, mask=inside)
        tl.debug_barrier()


@triton.jit
def apply_item(
    entry,
    slice_index,
    step,
    exponent,
    vectors,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One slice of A q_step, of an entry whose weights count as 2^exponent times themselves."""
    rows = tl.load(entry + ROWS).to(tl.int32)
    cols = tl.load(entry + COLS).to(tl.int32)
    slice_rows = tl.multiple_of(tl.load(entry + SLICE_ROWS).to(tl.int32), BM)
    first = slice_index * slice_rows
    last = tl.minimum(rows, first + slice_rows)
    size = tl.load(entry + COLS) * GROUP
    x = vectors + tl.load(entry + BASIS) + step * size
    y = vectors + tl.load(entry + PARTIALS) + slice_index * size
    address = tl.load(entry + ADDRESS)
    dtype = tl.load(entry + DTYPE)
    path = tl.load(entry + PATH)
    if exponent != 0:  # scaling needs float32
        path = path * 0
    # Loads are of 16 bytes only where pointer, stride and bound are known to be multiples.
    bf16 = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)
    f16 = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16)
    f32 = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    if path == ROWS_TOGETHER:
        stride = tl.multiple_of(tl.load(entry + ROW_STRIDE), 8)
        width = tl.multiple_of(tl.load(entry + COLS).to(tl.int32), 8)
        if dtype == 0:
            _slice(entry, f16, stride, rows, width, first, last, x, y, exponent,
                   ROWS_TOGETHER, GROUP, BM, BK, INTERPRETED)  # fmt: skip
        elif dtype == 1:
            _slice(entry, bf16, stride, rows, width, first, last, x, y, exponent,
                   ROWS_TOGETHER, GROUP, BM, BK, INTERPRETED)  # fmt: skip
        else:
            _slice(entry, f32, stride, rows, width, first, last, x, y, exponent,
                   ROWS_TOGETHER, GROUP, BM, BK, INTERPRETED)  # fmt: skip
    elif path == COLS_TOGETHER:
        stride = tl.multiple_of(tl.load(entry + COL_STRIDE), 8)
        height = tl.multiple_of(tl.load(entry + ROWS).to(tl.int32), 8)
        if dtype == 0:
            _slice(entry, f16, stride, height, cols, first, last, x, y, exponent,
                   COLS_TOGETHER, GROUP, BM, BK, INTERPRETED)  # fmt: skip
        elif dtype == 1:
            _slice(entry, bf16, stride, height, cols, first, last, x, y, exponent,
                   COLS_TOGETHER, GROUP, BM, BK, INTERPRETED)  # fmt: skip
        else:
            _slice(entry, f32, stride, height, cols, first, last, x, y, exponent,
                   COLS_TOGETHER, GROUP, BM, BK, INTERPRETED)  # fmt: skip
    else:
        _slice(entry, address, 0, rows, cols, first, last, x, y, exponent,
               ANY_LAYOUT, GROUP, BM, BK // 2, INTERPRETED)  # fmt: skip
