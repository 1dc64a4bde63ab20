"""Gauss quadratures of many Jacobi matrices: nodes and weights, one lane for each, in float64.

    nodes      bisection: the signs of d_k - x - e_{k-1}² / q_{k-1} count the eigenvalues below x
    weights    the first component of the eigenvector, from the factorisation that meets itself at
               its largest one (Dhillon and Parlett, "Orthogonal eigenvectors and relative gaps",
               SIAM J. Matrix Anal. Appl. 25, 2003): going down gives D+, U_k = sum over j <= k of
               (z_j / z_k)² and T_k = (z_0 / z_k)²; going up gives D- and L_k = sum over j >= k;
               where |D+ + D- - (d - x)| is least, the weight is T / (U + L - 1)

A rule is a leading part of a run's matrix; matrices come scaled, entries near 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

_BISECTIONS = tl.constexpr(56)  # from an interval of width 6 to the rounding of numbers near 1
_ROUNDING = tl.constexpr(1e-16)
_NO_PIVOT = tl.constexpr(1e-120)
_LARGEST = tl.constexpr(1e280)


@triton.jit
def _guarded(q):
    return tl.where(tl.abs(q) < _NO_PIVOT, -_NO_PIVOT, q)


@triton.jit
def _nodes(d, e, i, size, steps):
    """The i-th eigenvalue of each lane's matrix; d, e: pointers (lanes,) to its first entries."""
    low = i.to(tl.float64) * 0 - 3.0
    high = low + 6.0
    for _ in range(_BISECTIONS):
        x = (low + high) / 2
        q = tl.load(d) - x
        below = (q < 0).to(tl.int32)
        for k in range(1, steps):
            inside = k < size
            coupling = tl.load(e + k - 1, mask=inside, other=0.0)
            q = tl.load(d + k, mask=inside, other=4.0) - x - coupling * coupling / _guarded(q)
            below += (inside & (q < 0)).to(tl.int32)
        low = tl.where(below > i, low, x)
        high = tl.where(below > i, x, high)
    x = (low + high) / 2
    return tl.where(tl.abs(x) < _ROUNDING, 0.0, x)


@triton.jit
def _weights(d, e, x, size, steps, room, BLOCK: tl.constexpr):
    """Of the nodes x. room: (3, steps, BLOCK) for this program."""
    lane = tl.arange(0, BLOCK)
    plus = tl.load(d) - x
    u = x * 0 + 1
    t = u
    tl.store(room + lane, plus)
    tl.store(room + steps * BLOCK + lane, u)
    tl.store(room + 2 * steps * BLOCK + lane, t)
    for k in range(1, steps):
        inside = k < size
        coupling = tl.load(e + k - 1, mask=inside, other=0.0)
        pivot = _guarded(plus)
        ratio = coupling / pivot
        square = ratio * ratio
        u = tl.minimum(1 + square * u, _LARGEST)
        t = tl.minimum(square * t, _LARGEST)
        plus = tl.load(d + k, mask=inside, other=4.0) - x - coupling * ratio
        tl.store(room + k * BLOCK + lane, plus)
        tl.store(room + (steps + k) * BLOCK + lane, u)
        tl.store(room + (2 * steps + k) * BLOCK + lane, t)
    minus = x * 0
    below = x * 0 + 1
    weight = x * 0
    least = x * 0 + _LARGEST
    for up in range(steps):
        k = steps - 1 - up
        inside = k < size
        coupled = k + 1 < size
        shifted = tl.load(d + k, mask=inside, other=4.0) - x
        ratio = tl.load(e + k, mask=coupled, other=0.0) / tl.where(coupled, _guarded(minus), 1.0)
        below = tl.minimum(1 + ratio * ratio * below, _LARGEST)
        coupling = tl.load(e + k, mask=coupled, other=0.0)
        minus = shifted - coupling * ratio
        gap = tl.abs(tl.load(room + k * BLOCK + lane) + minus - shifted)
        u = tl.load(room + (steps + k) * BLOCK + lane)
        t = tl.load(room + (2 * steps + k) * BLOCK + lane)
        better = inside & (gap < least)
        weight = tl.where(better, t / (u + below - 1), weight)
        least = tl.where(better, gap, least)
    return weight


@triton.jit
def gauss_block(
    block, diagonal, off_diagonal, sizes, scales, nodes, weights, lanes, steps, room,
    BLOCK: tl.constexpr
):  # fmt: skip
    """A block of lanes; lane (run, rule, index). See ``triton_curves`` for the arguments."""
    lane = tl.arange(0, BLOCK).to(tl.int64) + block * BLOCK
    real = lane < lanes
    lane = tl.where(real, lane, 0)
    rule = lane // steps
    i = (lane % steps).to(tl.int32)
    size = tl.load(sizes + rule)
    d, e = diagonal + rule // 3 * steps, off_diagonal + rule // 3 * steps
    x = _nodes(d, e, i, size, steps)
    weight = _weights(d, e, x, size, steps, room, BLOCK)
    used = real & (i < size)
    tl.store(nodes + lane, x * tl.load(scales + rule // 3), mask=used)
    tl.store(weights + lane, weight, mask=used)
