"""The Triton kernels of ``quadrature_fit``: from Jacobi matrices to spectra, and alpha's error.

    phase 0    nodes and weights of all quadratures: lanes
    phase 1    two curves of each run
    phase 2    the grid of each layer: each curve puts its points in place
    phase 3    masses of each probe on the grid
    phase 4    replicas: means of probes
    phase 5    spectra of the replicas, in blocks

The spectra are fitted by ``fit_phases``, then ``sketch_errors`` joins the fits. The definition is
reference_slq.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tbfast.backends.triton_curves import curves_of_run
from tbfast.backends.triton_gauss import gauss_block
from tbfast.backends.triton_numbers import grid_barrier
from tbfast.backends.triton_pool import masses, quantiles, rank_points, replica

_PRIOR_FREEDOM = tl.constexpr(4.0)  # degrees of freedom that the known law of scatter is worth
_SLOPE_WINDOW = tl.constexpr(0.05)  # of the ranks, to either side of xmin
_FIT = tl.constexpr(6)  # numbers of a fit, see triton_fit


@triton.jit
def quadrature_phases(
    begin,
    end,
    counter,  # of the grid barrier; None where a launch is one phase
    diagonal,  # (runs, steps) float64, scaled to entries near 1
    off_diagonal,  # the same
    sizes,  # (runs, 3) int32: of the full, the half and the quarter quadrature
    scales,  # (runs) float64: factor on the nodes
    eps,  # (1) float64: unit roundoff of the arithmetic that Lanczos ran in
    first,  # (layers + 1) int64: the first matrix of each layer
    layer_of,  # (matrices) int64
    counts,  # (matrices) int64: eigenvalues
    nodes,  # (runs, 3, steps) float64
    weights,  # the same
    x,  # (runs, 2, 4 steps + 1) float64: curves
    mass,  # the same
    points,  # (runs, 2) int32
    totals,  # (runs, 2) float64
    tops,  # (runs) float64: largest node of the run's matrix
    grid,  # (layers, 2, GRID + 1) float64
    grid_points,  # (layers, 2) int64
    probe_masses,  # (layers, 2, probes, GRID + 1) float64
    means,  # (layers, replicas, GRID + 1) float64
    limits,  # (layers) int64: most eigenvalues of replicas 1 and on
    row_sizes,  # (layers, replicas) int64: eigenvalues of each spectrum
    row_starts,  # (layers, replicas) int64
    blocks,  # (blocks, 2) int64: row, block of its spectrum
    values,  # float64: all spectra
    room,  # (programs, room_size) float64
    room_size,
    layers,
    runs,
    probes,
    steps,
    replicas,
    n_blocks,
    LANES: tl.constexpr,
    SB: tl.constexpr,  # steps, rounded up to a power of two
    GB: tl.constexpr,  # points of a grid at a time
    MB: tl.constexpr,  # GRID + 1, rounded up
    QB: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    me, programs = tl.program_id(0), tl.num_programs(0)
    own_room = room + me.to(tl.int64) * room_size
    for phase in range(begin, end):
        if phase == 0:
            lanes = 3 * runs * steps
            for block in range(me, (lanes + LANES - 1) // LANES, programs):
                gauss_block(
                    block, diagonal, off_diagonal, sizes, scales, nodes, weights, lanes, steps,
                    own_room, LANES,
                )  # fmt: skip
        elif phase == 1:
            for run in range(me, runs, programs):
                curves_of_run(
                    run, probes, steps, tl.load(eps), nodes, weights, sizes, x, mass, points,
                    totals, tops, own_room, SB,
                )  # fmt: skip
        elif phase == 2:
            for curve in range(me, 2 * runs, programs):
                layer = tl.load(layer_of + curve // 2 // probes)
                first_run = tl.load(first + layer) * probes
                last_run = tl.load(first + layer + 1) * probes
                rank_points(
                    curve, first_run, last_run, layer, steps, x, points, grid, grid_points,
                    GB, HALVINGS,
                )  # fmt: skip
        elif phase == 3:
            for job in range(me, 2 * layers * probes, programs):
                layer = job // (2 * probes)
                masses(
                    layer, job // probes % 2, job % probes, probes, tl.load(first + layer),
                    tl.load(first + layer + 1), counts, steps, x, mass, points, totals, grid,
                    grid_points, probe_masses, GB, HALVINGS,
                )  # fmt: skip
        elif phase == 4:
            for row in range(me, layers * replicas, programs):
                layer = row // replicas
                matrix = tl.load(first + layer)
                eigenvalues = tl.load(counts + matrix)
                for other in range(matrix + 1, tl.load(first + layer + 1)):
                    eigenvalues += tl.load(counts + other)
                replica(
                    layer, row % replicas, replicas, probes, probe_masses, grid_points,
                    eigenvalues, tl.load(limits + layer), means, row_sizes,
                    own_room, MB,
                )  # fmt: skip
        else:
            for b in range(me, n_blocks, programs):
                quantiles(
                    tl.load(blocks + 2 * b), tl.load(blocks + 2 * b + 1), replicas, row_starts,
                    row_sizes, means, grid, grid_points, values, QB,
                )  # fmt: skip
        if counter is not None:
            grid_barrier(counter)


@triton.jit
def _excess(fits, row):
    """T = 1 / (alpha - 1), 0 where there is no fit."""
    alpha = tl.load(fits + row * _FIT)
    fitted = tl.load(fits + row * _FIT + 5) == 0
    return tl.where(fitted, 1 / (tl.where(fitted, alpha, 2.0) - 1), 0.0)


@triton.jit
def _influence(values, i, n, start, tail, spacing):
    """Of each eigenvalue on T."""
    at_start = tl.load(values + start)
    v = tl.load(values + i, mask=i < n, other=1.0)
    above = tl.log(v / at_start) * n.to(tl.float64) / tail.to(tl.float64)
    return tl.where(i < n, tl.where(i < start, spacing * n.to(tl.float64), above), 0.0)


@triton.jit
def _scatter(values, n, start, tail, spacing, C: tl.constexpr):
    """Variance of the influence over all eigenvalues."""
    total = tl.zeros((C,), tl.float64)
    for left in range(0, n, C):
        i = left + tl.arange(0, C)
        total += _influence(values, i, n, start, tail, spacing)
    mean = tl.sum(total) / n.to(tl.float64)
    square = tl.zeros((C,), tl.float64)
    for left in range(0, n, C):
        i = left + tl.arange(0, C)
        part = _influence(values, i, n, start, tail, spacing) - mean
        square += tl.where(i < n, part * part, 0.0)
    return tl.sum(square) / n.to(tl.float64)


@triton.jit(do_not_specialize=["probes"])  # 1 would be a constant without a dtype
def sketch_errors(
    fits,  # (layers, replicas, 6) float64: what fit_phases found
    values,
    row_starts,
    row_sizes,
    choice,  # (1) float64: factor for fits that choose among candidates
    out,  # (layers) float64: standard errors of alpha
    layers,
    probes,
    replicas,
    PB: tl.constexpr,  # probes, rounded up
    C: tl.constexpr,
):
    for layer in range(tl.program_id(0), layers, tl.num_programs(0)):
        row = layer * replicas
        error = tl.load(choice) * 0 + float("nan")
        if tl.load(fits + row * _FIT + 5) == 0:
            n = tl.load(row_sizes + row)
            spectrum = values + tl.load(row_starts + row)
            t = _excess(fits, row)
            truncation = (_excess(fits, row + replicas - 1) - _excess(fits, row + 1)) / t
            p = tl.arange(0, PB)
            left_out = p < tl.where(probes > 1, probes, 0)
            without = _excess(fits, row + 2 + tl.where(left_out, p, 0)) / t
            mean = tl.sum(tl.where(left_out, without, 0.0)) / probes.to(tl.float64)
            apart = tl.where(left_out, without - mean, 0.0)
            freedom = (probes - 1).to(tl.float64)
            jackknife = freedom * (tl.sum(apart * apart) / probes.to(tl.float64))
            start = tl.load(fits + row * _FIT + 3).to(tl.int64)
            tail = tl.load(fits + row * _FIT + 4).to(tl.int64)
            window = tl.maximum((n.to(tl.float64) * _SLOPE_WINDOW).to(tl.int64), 1)
            low, high = tl.maximum(start - window, 0), tl.minimum(start + window, n - 1)
            spacing = tl.log(tl.load(spectrum + high) / tl.load(spectrum + low))
            spacing = spacing / tl.maximum(high - low, 1).to(tl.float64)
            scatter = _scatter(spectrum, n, start, tail, spacing, C)
            prior = 2 / (n * probes).to(tl.float64) * scatter / (t * t)
            between = freedom * jackknife + prior * _PRIOR_FREEDOM
            between = between / (freedom + _PRIOR_FREEDOM)
            jitter = spacing / t
            relative = tl.sqrt(between + truncation * truncation + jitter * jitter)
            error = tl.load(choice) * relative / t
        tl.store(out + layer, error)
