"""Cumulative mass over ln(eigenvalue) of Lanczos runs, from their Gauss quadratures.

A curve is piecewise linear through the middles of the weights. Each interval is halved twice, at
the mean of a linear mass and of a linear ln(total - mass). Mass at numerical zero is left out; what
the lowest node holds of it is judged by a quadrature of half the steps. The definition is
reference_slq.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ZERO_EPS = tl.constexpr(2.0)
_ISOLATED = tl.constexpr(20.0)
_STILL_FALLING = tl.constexpr(0.5)
_WORTH_KEEPING = tl.constexpr(1e-6)  # share of the lowest weight


@triton.jit
def _middle(xa, a, xb, b, total):
    tail_a, tail_b = tl.maximum(total - a, 0.0), tl.maximum(total - b, 0.0)
    return (xa + xb) / 2, ((a + b) / 2 + total - tl.sqrt(tail_a * tail_b)) / 2


@triton.jit
def _curve(
    nodes, weights, size, coarse_node, coarse_weight, floor, x_out, mass_out, room,
    SB: tl.constexpr
):  # fmt: skip
    """Writes a curve; returns its number of points and its total. room: (2, SB + 1)."""
    i = tl.arange(0, SB)
    node = tl.load(nodes + i, mask=i < size, other=float("inf"))
    weight = tl.load(weights + i, mask=i < size, other=0.0)
    lost = tl.maximum(1, tl.sum((node <= floor).to(tl.int32)))
    lowest = tl.sum(tl.where(i < lost, weight, 0.0))
    first = tl.minimum(lost, size) - 1
    n0 = tl.maximum(tl.load(nodes + first), floor)
    n1 = tl.load(nodes + tl.minimum(first + 1, size - 1))
    sunk = n0 <= floor
    falls = sunk | (n0 < coarse_node * _STILL_FALLING)
    isolated = (first + 1 < size) & (n1 > n0 * _ISOLATED) & falls
    zeros = tl.where(
        sunk, lowest, tl.maximum(lowest - tl.maximum(coarse_weight - lowest, 0.0), 0.0)
    )
    zeros = tl.where(isolated, zeros, 0.0)
    rest = lowest - zeros
    moved = isolated & (rest > lowest * _WORTH_KEEPING)
    place = tl.minimum(n0 * lowest / tl.where(moved, rest, 1.0), tl.sqrt(tl.abs(n0 * n1)))
    node = tl.where(i == first, tl.where(moved, place, n0), node)
    weight = tl.where(i == first, tl.where(moved, rest, lowest), weight)
    first = tl.where(isolated & (moved == 0), first + 1, first)
    kept = (i >= first) & (i < size)
    weight = tl.where(kept, weight, 0.0)
    some = tl.load(nodes + size - 1) > floor
    total = tl.where(some, 1 - zeros, 0.0)
    # The points between which the curve is refined: one below the first node, then the nodes.
    x = tl.log(tl.where(kept, tl.where(some, node, 1.0), 1.0))
    mass = tl.cumsum(weight, axis=0) - weight / 2
    tl.store(room + i - first + 1, x, mask=kept)
    tl.store(room + SB + 2 + i - first, mass, mask=kept)
    tl.debug_barrier()
    intervals = size - first
    x0 = tl.load(room + 1)
    x1 = tl.load(room + tl.minimum(intervals, 2))
    tl.debug_barrier()
    tl.store(room, x0 - (x1 - x0) / 2)
    tl.store(room + SB + 1, x0 * 0)
    tl.debug_barrier()
    within = i < intervals
    xa = tl.load(room + i, mask=within, other=0.0)
    xb = tl.load(room + i + 1, mask=within, other=0.0)
    a = tl.load(room + SB + 1 + i, mask=within, other=0.0)
    b = tl.load(room + SB + 2 + i, mask=within, other=0.0)
    xm, m = _middle(xa, a, xb, b, total)
    xl, low = _middle(xa, a, xm, m, total)
    xh, high = _middle(xm, m, xb, b, total)
    tl.store(x_out + 4 * i, xa, mask=within)
    tl.store(x_out + 4 * i + 1, xl, mask=within)
    tl.store(x_out + 4 * i + 2, xm, mask=within)
    tl.store(x_out + 4 * i + 3, xh, mask=within)
    tl.store(x_out + 4 * i + 4, xb, mask=i == intervals - 1)
    tl.store(mass_out + 4 * i, a, mask=within)
    tl.store(mass_out + 4 * i + 1, low, mask=within)
    tl.store(mass_out + 4 * i + 2, m, mask=within)
    tl.store(mass_out + 4 * i + 3, high, mask=within)
    tl.store(mass_out + 4 * i + 4, b, mask=i == intervals - 1)
    tl.debug_barrier()
    return tl.where(some, 4 * intervals + 1, 0), total


@triton.jit
def curves_of_run(
    run, probes, steps, eps, nodes, weights, sizes, x, mass, points, totals, tops, room,
    SB: tl.constexpr
):  # fmt: skip
    """Both curves of a run; zero is measured by the largest node of its matrix."""
    first_run = run // probes * probes
    top = tl.load(nodes + 3 * first_run * steps + tl.load(sizes + 3 * first_run) - 1)
    for other in range(first_run + 1, first_run + probes):
        top = tl.maximum(top, tl.load(nodes + 3 * other * steps + tl.load(sizes + 3 * other) - 1))
    tl.store(tops + run, top)
    floor = top * eps * _ZERO_EPS
    width = 4 * steps + 1
    for half in range(2):
        rule = 3 * run + half
        curve = 2 * run + half
        count, total = _curve(
            nodes + rule * steps, weights + rule * steps, tl.load(sizes + rule),
            tl.load(nodes + (rule + 1) * steps), tl.load(weights + (rule + 1) * steps), floor,
            x + curve * width, mass + curve * width, room, SB,
        )  # fmt: skip
        tl.store(points + curve, count)
        tl.store(totals + curve, total)
