"""The Triton kernel of ``fit``: power laws of many spectra at once, in float64.

    phase 0    each spectrum: logarithms; ``median`` and ``tail``: the exponent;
               ``ks`` and ``peak``: the sums that every candidate's exponent is made of
    phase 1    ``ks`` and ``peak``: blocks of candidates, each against the whole tail, by tiles
    phase 2    each spectrum: the best candidate, its distance, and why there is none

With L_i the sorted logarithms, S_i = sum over j > i of (L_j - L_i) is found from its neighbour,
S_i = S_{i+1} + (n - 1 - i) (L_{i+1} - L_i): sums of positive numbers, which do not cancel. The
definition is reference_fit.py.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tbfast.backends.triton_numbers import count_below, grid_barrier, is_finite
from tbfast.fitting import FIT_KINDS, Reason

_MEDIAN, _KS, _PEAK, _TAIL = (tl.constexpr(FIT_KINDS.index(k)) for k in FIT_KINDS)
_LN_10 = tl.constexpr(math.log(10))
_FITTED = tl.constexpr(int(Reason.FITTED))
_NO_EIGENVALUES = tl.constexpr(int(Reason.NO_EIGENVALUES))
_NOT_FINITE = tl.constexpr(int(Reason.NOT_FINITE))
_ALL_EQUAL = tl.constexpr(int(Reason.ALL_EQUAL))
_NO_CANDIDATE = tl.constexpr(int(Reason.NO_CANDIDATE))
_TOO_FEW = tl.constexpr(int(Reason.TOO_FEW))
_NOWHERE = tl.constexpr(1 << 62)

# Places of a result row: alpha, xmin, ks, start, n_tail, reason; while at work: alpha, first
# candidate, last candidate, start.
_RESULT = tl.constexpr(6)


@triton.jit
def _logarithms(values, logs, n, C: tl.constexpr):
    """Writes them; 1 if all values are finite."""
    finite = 1
    for left in range(0, n, C):
        i = left + tl.arange(0, C)
        v = tl.load(values + i, mask=i < n, other=1.0)
        tl.store(logs + i, tl.log(v), mask=i < n)
        finite = tl.minimum(finite, tl.min(is_finite(v).to(tl.int32)))
    tl.debug_barrier()
    return finite


@triton.jit
def _hill(logs, n, start, half_width, C: tl.constexpr):
    """alpha of the tail from ``start``, its ln xmin the mean over a window of ranks."""
    low = tl.maximum(start - half_width, 0)
    high = tl.minimum(start + half_width + 1, n)
    window = tl.zeros((C,), tl.float64)
    for left in range(low, high, C):
        i = left + tl.arange(0, C)
        window += tl.load(logs + i, mask=i < high, other=0.0)
    anchor = tl.sum(window) / (high - low).to(tl.float64)
    excess = tl.zeros((C,), tl.float64)
    for left in range(start, n, C):
        i = left + tl.arange(0, C)
        excess += tl.where(i < n, tl.load(logs + i, mask=i < n, other=0.0) - anchor, 0.0)
    total = tl.sum(excess)
    alpha = 1 + (n - start).to(tl.float64) / tl.where(total > 0, total, 1.0)
    return tl.where(total > 0, alpha, float("inf"))


@triton.jit
def _excesses(logs, excess, n, C: tl.constexpr):
    """Writes S_i of every i."""
    after = tl.sum(tl.zeros((C,), tl.float64))
    for block in range((n + C - 1) // C):
        i = n - (block + 1) * C + tl.arange(0, C)
        here = tl.load(logs + i, mask=i >= 0, other=0.0)
        above = tl.load(logs + i + 1, mask=(i >= 0) & (i + 1 < n), other=0.0)
        step = (n - 1 - i).to(tl.float64) * (above - here)
        step = tl.where((i >= 0) & (i + 1 < n), step, 0.0)
        tl.store(excess + i, tl.cumsum(step, reverse=True) + after, mask=i >= 0)
        after += tl.sum(step)


@triton.jit
def _near_peak(values, logs, n, options, BINS: tl.constexpr):
    """First and last + 1 of the candidates around the fullest bin of log10 x."""
    bins = tl.load(options + 3)
    low = tl.load(logs) / _LN_10
    high = tl.load(logs + n - 1) / _LN_10
    bin_ = tl.arange(0, BINS)
    edge = bin_.to(tl.float64) * ((high - low) / bins) + low
    # log10 x below the edge is ln x below it times ln 10, but for the last bit.
    below = count_below(logs, n, edge, _LN_10, False, 32)
    upper = (bin_ + 1).to(tl.float64) * ((high - low) / bins) + low
    following = count_below(logs, n, upper, _LN_10, False, 32)
    counts = tl.where(bin_ + 1 == bins.to(tl.int32), n, following) - below
    counts = tl.where(bin_ < bins.to(tl.int32), counts, -1)
    fullest = tl.min(tl.where(counts == tl.max(counts), bin_, BINS))
    peak = tl.exp((fullest.to(tl.float64) * ((high - low) / bins) + low) * _LN_10)
    lower = peak * 0.95
    lower = tl.where(tl.load(options + 4) != 0, tl.log(lower) / _LN_10, lower)
    first = count_below(values, n, lower, 1.0, False, 32)
    last = count_below(values, n, peak * 1.5, 1.0, True, 32)
    return tl.minimum(first, n - 1), tl.minimum(last, n - 1)


@triton.jit
def _prepare(
    values, logs, excess, n, options, result,
    KIND: tl.constexpr, BINS: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    finite = _logarithms(values, logs, n, C)
    size = n.to(tl.float64)
    alpha = size * 0 + float("nan")
    start, first, last = n * 0 - 1, n * 0, n * 0
    reason = tl.where(n == 0, _NO_EIGENVALUES, tl.where(finite == 0, _NOT_FINITE, _FITTED))
    if (KIND == _TAIL) & (reason == _FITTED):
        start = n - tl.load(options + 2).to(tl.int64)
        reason = tl.where(start < 0, _TOO_FEW, reason)
    if reason == _FITTED:
        if KIND == _MEDIAN:
            start = (size / tl.load(options)).to(tl.int64)
            alpha = _hill(logs, n, start, (tl.load(options + 1) * size).to(tl.int64), C)
        elif KIND == _TAIL:
            alpha = _hill(logs, n, start, 0, C)
        else:
            _excesses(logs, excess, n, C)
            last = n - 1
            if KIND == _PEAK:
                first, last = _near_peak(values, logs, n, options, BINS)
    tl.store(result, alpha)
    tl.store(result + 1, first.to(tl.float64))
    tl.store(result + 2, last.to(tl.float64))
    tl.store(result + 3, start.to(tl.float64))
    tl.store(result + 5, reason.to(tl.float64))


@triton.jit
def _distances(logs, n, i, alpha, first, JB: tl.constexpr):
    """max over j >= i of |1 - (x_j / x_i)^(1 - alpha) - (j - i) / (n - i)| for candidates i."""
    at = tl.load(logs + i, mask=i < n, other=0.0)
    size = tl.maximum(n - i, 1).to(tl.float64)
    worst = at * 0
    for left in range(first, n, JB):
        j = left + tl.arange(0, JB)
        tail = tl.load(logs + j, mask=j < n, other=0.0)[None, :] - at[:, None]
        inside = (j[None, :] >= i[:, None]) & (j < n)[None, :]
        power = tl.exp(tl.where(inside, (1 - alpha)[:, None] * tail, 0.0))
        rank = (j[None, :] - i[:, None]).to(tl.float64) / size[:, None]
        worst = tl.maximum(worst, tl.max(tl.where(inside, tl.abs(1 - power - rank), 0.0), axis=1))
    return worst


@triton.jit
def _best_of_block(
    logs, excess, n, result, block, out, CB: tl.constexpr, JB: tl.constexpr
):  # fmt: skip
    """The least distance of a block of candidates, and the first that has it."""
    i = block * CB + tl.arange(0, CB)
    first, last = tl.load(result + 1).to(tl.int64), tl.load(result + 2).to(tl.int64)
    mine = (i >= first) & (i < last)
    sum_ = tl.load(excess + i, mask=mine, other=0.0)
    alpha = 1 + (n - i).to(tl.float64) / tl.where(sum_ > 0, sum_, 1.0)
    mine = mine & (sum_ > 0) & (alpha > 1)
    distance = float("inf") + tl.zeros((CB,), tl.float64)
    if tl.max(mine.to(tl.int32)) == 1:
        found = _distances(logs, n, i, alpha, block * CB, JB)
        distance = tl.where(mine, found, float("inf"))
    least = tl.min(distance)
    tl.store(out, least)
    place = tl.min(tl.where((distance == least) & mine, i, _NOWHERE))
    tl.store(out + 1, place.to(tl.float64))


@triton.jit
def _conclude(
    values, logs, excess, n, options, result, blocks, n_blocks,
    KIND: tl.constexpr, C: tl.constexpr, JB: tl.constexpr
):  # fmt: skip
    alpha, start = tl.load(result), tl.load(result + 3).to(tl.int64)
    reason = tl.load(result + 5).to(tl.int32)
    tl.debug_barrier()  # all warps have read before one writes
    if (KIND == _KS) | (KIND == _PEAK):
        least = n.to(tl.float64) * 0 + float("inf")
        for block in range(n_blocks):
            distance = tl.load(blocks + 2 * block)
            better = (distance < least) & (reason == _FITTED)
            start = tl.where(better, tl.load(blocks + 2 * block + 1).to(tl.int64), start)
            least = tl.where(better, distance, least)
        reason = tl.where((reason == _FITTED) & (start < 0), _NO_CANDIDATE, reason)
        if reason == _FITTED:
            alpha = 1 + (n - start).to(tl.float64) / tl.load(excess + start)
    too_large = (reason == _FITTED) & (alpha > tl.load(options + 5))
    reason = tl.where(too_large, _ALL_EQUAL, reason)
    if reason == _FITTED:
        i = start + tl.zeros((1,), tl.int64)
        ks = tl.max(_distances(logs, n, i, alpha + tl.zeros((1,), tl.float64), start, C))
        tl.store(result, alpha)
        tl.store(result + 1, tl.load(values + start))
        tl.store(result + 2, ks)
        tl.store(result + 3, start.to(tl.float64))
        tl.store(result + 4, (n - start).to(tl.float64))
    else:
        for place in tl.static_range(3):
            tl.store(result + place, float("nan"))
        tl.store(result + 3, -1.0)
        tl.store(result + 4, 0.0)
    tl.store(result + 5, reason.to(tl.float64))


@triton.jit
def fit_phases(
    begin,
    end,
    counter,  # of the grid barrier; None where a launch is one phase
    values,  # float64, all spectra
    starts,  # (rows) int64: where each begins
    sizes,  # (rows) int64
    rows,
    blocks,  # (blocks, 2) int64: row, block of candidates
    first_block,  # (rows + 1) int64
    n_blocks,
    options,  # float64: xmin_pos, smooth, k, bins, peak_compat, largest alpha
    logs,  # as values
    excess,  # as values
    best,  # (blocks, 2) float64
    results,  # (rows, 6) float64: alpha, xmin, ks, start, n_tail, reason
    KIND: tl.constexpr,
    BINS: tl.constexpr,
    C: tl.constexpr,
    CB: tl.constexpr,
    JB: tl.constexpr,
):
    me, programs = tl.program_id(0), tl.num_programs(0)
    for phase in range(begin, end):
        if phase == 1:
            for b in range(me, n_blocks, programs):
                row = tl.load(blocks + 2 * b)
                at = tl.load(starts + row)
                result = results + row * _RESULT
                _best_of_block(
                    logs + at, excess + at, tl.load(sizes + row), result,
                    tl.load(blocks + 2 * b + 1), best + 2 * b, CB, JB,
                )  # fmt: skip
        else:
            for row in range(me, rows, programs):
                at = tl.load(starts + row)
                n = tl.load(sizes + row)
                result = results + row * _RESULT
                if phase == 0:
                    _prepare(values + at, logs + at, excess + at, n, options, result, KIND, BINS, C)
                else:
                    b = tl.load(first_block + row)
                    _conclude(
                        values + at, logs + at, excess + at, n, options, result, best + 2 * b,
                        tl.load(first_block + row + 1) - b, KIND, C, JB,
                    )  # fmt: skip
        if counter is not None:
            grid_barrier(counter)
