"""Curves of many runs pooled into spectra.

    grid         all points of a layer's curves, sorted: each point counts those below it, curve by
                 curve, so that a layer may have any number of curves; thinned out evenly above 1024
    masses       of each probe on the grid, the mean over the layer's matrices
    replicas     means over all probes, over all but one, and of the half quadratures
    quantiles    (i + 1/2) / n of a replica: a spectrum, ready to be fitted

The definition is reference_slq.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tbfast.backends.triton_numbers import count_below

GRID = 1024  # most points of a mean
_GRID = tl.constexpr(GRID)
_GRID_HALVINGS = tl.constexpr(11)


@triton.jit
def rank_points(
    curve, first_run, last_run, layer, steps, x, points, grid, grid_points,
    BLOCK: tl.constexpr, HALVINGS: tl.constexpr
):  # fmt: skip
    """Puts those points of a curve on the grid that belong there by their rank in the layer."""
    half = curve % 2
    width = 4 * steps + 1
    n = tl.load(points + curve)
    for left in range(0, n, BLOCK):
        own = left + tl.arange(0, BLOCK)
        v = tl.load(x + curve * width + own, mask=own < n, other=0.0)
        rank = own.to(tl.int64)
        whole = (n * 0).to(tl.int64)
        for run in range(first_run, last_run):
            other = 2 * run + half
            m = tl.load(points + other)
            whole += m
            # Equal points are ranked by the order of their curves.
            if other < curve:
                rank += count_below(x + other * width, m, v, 1.0, True, HALVINGS)
            elif other > curve:
                rank += count_below(x + other * width, m, v, 1.0, False, HALVINGS)
        step = tl.maximum(whole - 1, 1)
        place = (rank * (_GRID - 1) + step - 1) // step
        ranked = tl.where(whole > _GRID, place * step // (_GRID - 1), rank)
        place = tl.where(whole > _GRID, place, rank)
        mine = (own < n) & (ranked == rank)
        tl.store(grid + (2 * layer + half) * (_GRID + 1) + place, v, mask=mine)
        tl.store(grid_points + 2 * layer + half, tl.minimum(whole, _GRID))


@triton.jit
def _mass_at(g, x, mass, n, total, HALVINGS: tl.constexpr):
    """A curve's mass at each point; where it jumps, that of the upper end."""
    j = count_below(x, n, g, 1.0, True, HALVINGS) - 1
    low, high = tl.maximum(j, 0), tl.minimum(j + 1, n - 1)
    known = low < n
    x_low = tl.load(x + low, mask=known, other=0.0)
    gap = tl.load(x + high, mask=known, other=0.0) - x_low
    m_low = tl.load(mass + low, mask=known, other=0.0)
    m_high = tl.load(mass + high, mask=known, other=0.0)
    share = tl.where(gap > 0, (g - x_low) / tl.where(gap > 0, gap, 1.0), 0.0)
    inner = m_low + share * (m_high - m_low)
    last = tl.load(x + n - 1, mask=n > 0, other=0.0)
    found = tl.where(j < 0, 0.0, tl.where(g > last, total, inner))
    return tl.where(n > 0, found, 0.0)


@triton.jit
def masses(
    layer, half, probe, probes, first, last, counts, steps, x, mass, points, totals, grid,
    grid_points, out, BLOCK: tl.constexpr, HALVINGS: tl.constexpr
):  # fmt: skip
    """Mass of one probe on the grid; the point beyond its end has the total."""
    width = 4 * steps + 1
    grid += (2 * layer + half) * (_GRID + 1)
    n = tl.load(grid_points + 2 * layer + half)
    out += ((2 * layer + half) * probes + probe) * (_GRID + 1)
    eigenvalues = tl.load(counts + first)
    for matrix in range(first + 1, last):
        eigenvalues += tl.load(counts + matrix)
    total = (eigenvalues * 0).to(tl.float64)
    for left in range(0, n, BLOCK):
        i = left + tl.arange(0, BLOCK)
        g = tl.load(grid + i, mask=i < n, other=0.0)
        sum_ = tl.zeros((BLOCK,), tl.float64)
        total = (eigenvalues * 0).to(tl.float64)
        for matrix in range(first, last):
            curve = 2 * (matrix * probes + probe) + half
            share = tl.load(counts + matrix).to(tl.float64) / eigenvalues.to(tl.float64)
            all_ = tl.load(totals + curve)
            count = tl.load(points + curve)
            sum_ += share * _mass_at(
                g, x + curve * width, mass + curve * width, count, all_, HALVINGS
            )
            total += share * all_
        tl.store(out + i, sum_, mask=i < n)
    tl.store(out + n, total)


@triton.jit
def _rising(values, mine, DOUBLINGS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of a vector up to each place; ``mine``: memory for it."""
    i = tl.arange(0, BLOCK)
    for doubling in tl.static_range(DOUBLINGS):
        tl.store(mine + i, values)
        tl.debug_barrier()
        before = tl.load(mine + i - (1 << doubling), mask=i >= (1 << doubling), other=0.0)
        values = tl.maximum(values, before)
        tl.debug_barrier()
    return values


@triton.jit
def replica(
    layer, replica, replicas, probes, masses, grid_points, eigenvalues, limit, means, sizes,
    room, BLOCK: tl.constexpr
):  # fmt: skip
    """A mean of probes: of all (replicas 0 and 1), of all but one, of the half quadratures (last).

    Replica 0 is the estimate, with as many eigenvalues as are not zero; the others make its error.
    """
    half = tl.where(replica == replicas - 1, 1, 0)
    without = tl.where(half == 1, -1, replica - 2)
    n = tl.load(grid_points + 2 * layer + half)
    whole = tl.load(grid_points + 2 * layer)
    i = tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float64)
    for probe in range(probes):
        place = masses + ((2 * layer + half) * probes + probe) * (_GRID + 1) + i
        part = tl.load(place, mask=i <= n, other=0.0)
        mean += tl.where(probe == without, 0.0, part)
    mean = mean / tl.where(without >= 0, probes - 1, probes).to(tl.float64)
    total = tl.sum(tl.where(i == n, mean, 0.0))
    mean = _rising(tl.where(i <= n, mean, 0.0), room, _GRID_HALVINGS, BLOCK)
    tl.store(means + (layer * replicas + replica) * (_GRID + 1) + i, mean, mask=i <= n)
    if replica == 0:
        # Rounded to even, as everywhere: adding 2^52 leaves no fractions.
        all_ = eigenvalues.to(tl.float64)
        half_even = (all_ * (1 - total) + 4503599627370496.0) - 4503599627370496.0
        size = tl.maximum((all_ - half_even).to(tl.int64), 1)
        size = tl.where((total > 0) & (whole > 0), size, 0)
        for other in range(replicas):
            mine = tl.where(other == 0, size, tl.minimum(size, limit))
            tl.store(sizes + layer * replicas + other, mine)


@triton.jit
def quantiles(
    row, block, replicas, starts, sizes, means, grid, grid_points, values, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of the eigenvalues at the quantiles (i + 1/2) / n of a mean."""
    layer, replica = row // replicas, row % replicas
    half = tl.where(replica == replicas - 1, 1, 0)
    n = tl.load(sizes + row)
    points = tl.load(grid_points + 2 * layer + half)
    mass = means + row * (_GRID + 1)
    grid += (2 * layer + half) * (_GRID + 1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(points > 0, n, 0)
    wanted = (i.to(tl.float64) + 0.5) / tl.maximum(n, 1).to(tl.float64) * tl.load(mass + points)
    j = count_below(mass, points + 1, wanted, 1.0, True, _GRID_HALVINGS) - 1
    low, high = tl.maximum(j, 0), tl.minimum(j + 1, points)
    m_low = tl.load(mass + low, mask=inside, other=0.0)
    rise = tl.load(mass + high, mask=inside, other=0.0) - m_low
    # The last point of the grid stands twice.
    x_low = tl.load(grid + tl.minimum(low, points - 1), mask=inside, other=0.0)
    x_high = tl.load(grid + tl.minimum(high, points - 1), mask=inside, other=0.0)
    up = (j >= 0) & (rise > 0)
    share = tl.where(up, (wanted - m_low) / tl.where(up, rise, 1.0), 0.0)
    # Half a run may find nothing but zeros.
    x = tl.where(points > 0, x_low + share * (x_high - x_low), 0.0)
    tl.store(values + tl.load(starts + row) + i, tl.exp(x), mask=i < n)
