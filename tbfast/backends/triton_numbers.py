"""Words that the Triton kernels share: numbers in memory, random signs, products, the barrier.

A matrix is seen as real: a complex one as [[re, -im], [im, re]] with rows and columns interleaved.
"""

from __future__ import annotations

import triton
import triton.language as tl

PROBE_BITS = tl.constexpr(0)  # purposes of random bits, see csrc/philox.h
SKETCH_BITS = tl.constexpr(1)


@triton.jit
def power_of_two(exponent):
    """2^exponent in float64, for -1022 <= exponent <= 1023."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def power_of_two_single(exponent):
    """2^exponent in float32, for -126 <= exponent <= 127."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(size):
    """The exponent of a float64 power of two just above a size; -1022 for 0."""
    return ((size.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1022


@triton.jit
def is_finite(x):
    return x - x == 0


@triton.jit
def _load(address, offset, mask, TYPE: tl.constexpr):
    return tl.load(address.to(tl.pointer_type(TYPE)) + offset, mask=mask, other=0.0)


@triton.jit
def load_single(address, offset, mask, dtype, exponent):
    """Numbers of a type known only at run time, times 2^exponent, as float32.

    The parts of complex numbers are read as numbers of their own.
    """
    half = exponent // 2  # 2^exponent itself may lie outside float32
    first, second = power_of_two_single(half), power_of_two_single(exponent - half)
    if dtype == 0:
        v = _load(address, offset, mask, tl.float16).to(tl.float32) * first * second
    elif dtype == 1:
        v = _load(address, offset, mask, tl.bfloat16).to(tl.float32) * first * second
    elif (dtype == 2) | (dtype == 4):
        v = _load(address, offset, mask, tl.float32) * first * second
    else:
        v = (_load(address, offset, mask, tl.float64) * power_of_two(exponent)).to(tl.float32)
    return v


@triton.jit
def load_double(address, offset, mask, dtype):
    """The same as float64."""
    if dtype == 0:
        v = _load(address, offset, mask, tl.float16).to(tl.float32).to(tl.float64)
    elif dtype == 1:
        v = _load(address, offset, mask, tl.bfloat16).to(tl.float32).to(tl.float64)
    elif (dtype == 2) | (dtype == 4):
        v = _load(address, offset, mask, tl.float32).to(tl.float64)
    else:
        v = _load(address, offset, mask, tl.float64)
    return v


@triton.jit
def random_words(element, column, purpose, draw, seed_low, seed_high, name):
    """The word of Philox bits that holds a column's sign, for each element of a layer.

    Bit ``column % 32`` is that of the column; 1 stands for -1. See csrc/philox.h.
    """
    zero = (element * 0).to(tl.uint32)
    block = column // 128
    what = (purpose << 30) | (block << 24) | draw
    low = (element & 0xFFFFFFFF).to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    key = (name.to(tl.uint64) << 32) | seed_low.to(tl.uint64)
    a, b, c, d = tl.philox(
        key, low, high, zero + what.to(tl.uint32), zero + seed_high.to(tl.uint32)
    )
    word = column % 128 // 32
    return tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))


@triton.jit
def multiply(a, b, total, INTERPRETED: tl.constexpr):
    """total + a @ b for float32 b; a of two bytes meets b in two parts on the tensor cores."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="ieee")
    high = b.to(a.dtype)
    low = (b - high.to(tl.float32)).to(a.dtype)
    if INTERPRETED:  # where the product of bfloat16 numbers is one of their bits
        wide = a.to(tl.float32)
        total = tl.dot(wide, high.to(tl.float32), total, input_precision="ieee")
        return tl.dot(wide, low.to(tl.float32), total, input_precision="ieee")
    total = tl.dot(a, high, total)
    return tl.dot(a, low, total)


@triton.jit
def grid_barrier(counter):
    """Waits for all programs of a cooperative launch, and shows them what the others wrote.

    The first program brings the counter's highest bit to flip when the last arrives; the lower bits
    are 0 again then, so that the counter serves any number of barriers and launches.
    """
    tl.debug_barrier()
    others = tl.num_programs(0) - 1
    mine = tl.where(tl.program_id(0) == 0, -(1 << 31) - others, 1).to(tl.int32)
    before = tl.atomic_add(counter, mine, sem="acq_rel", scope="gpu")
    now = tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu")
    while (before ^ now) >= 0:
        now = tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu")
    tl.debug_barrier()


@triton.jit
def count_below(
    sorted_values, n, bound, unit, INCLUSIVE: tl.constexpr, HALVINGS: tl.constexpr
):  # fmt: skip
    """How many of n ascending float64 numbers, divided by ``unit``, are below each bound.

    INCLUSIVE counts those that are equal too; n must be below 2^HALVINGS.
    """
    low = (bound != bound).to(tl.int64) * 0
    high = low + n
    for _ in range(HALVINGS):
        # Nothing is read once an interval is empty.
        middle = (low + high) // 2
        open_ = low < high
        value = tl.load(sorted_values + middle, mask=open_, other=0.0) / unit
        if INCLUSIVE:  # noqa: SIM108 - chosen when compiled
            below = value <= bound
        else:
            below = value < bound
        rises = open_ & below
        low = tl.where(rises, middle + 1, low)
        high = tl.where(open_ & (rises == 0), middle, high)
    return low
