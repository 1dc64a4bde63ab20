"""``quadrature_fit`` of the Triton backend: memory and launches."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.backends.triton_fit import fit_rows, fit_table
from tbfast.backends.triton_launch import (
    INTERPRETED,
    current_device,
    launch,
    launch_phases,
    programs,
)
from tbfast.backends.triton_pool import GRID
from tbfast.backends.triton_quadrature_kernels import quadrature_phases, sketch_errors
from tbfast.fitting import FitOptions, Reason
from tbfast.sketching import SketchTable
from tbfast.tridiagonals import Tridiagonals

_Array = NDArray[np.float64]

# Lanes, points of a grid, points of all of it, and eigenvalues that a program has at a time.
TILES = {"LANES": 512 if INTERPRETED else 128, "GB": 256, "MB": 2 * GRID, "QB": 256}
CHUNK = 4096 if INTERPRETED else 1024  # of a spectrum
_REPLICATE = 256  # most eigenvalues of the spectra that only the error is made of
_CHOICE = {"median": 1.0, "tail": 1.0, "ks": 2.5, "peak": 2.5}  # see reference_slq


def quadrature_fit(runs: Tridiagonals, options: FitOptions) -> SketchTable:
    """Fit all layers on the current GPU; see ``reference_slq.quadrature_fit``."""
    device = current_device()
    layers, probes = len(runs.first) - 1, runs.diagonal.shape[1]
    eigenvalues = (
        np.add.reduceat(np.append(runs.count, 0), runs.first[:-1]) if layers else runs.count
    )
    limits = eigenvalues if options.kind == "tail" else np.minimum(eigenvalues, _REPLICATE)
    replicas = probes + 3 if probes > 1 else 3
    bounds = np.repeat(limits[:, None], replicas, axis=1)
    bounds[:, 0] = eigenvalues
    bounds = bounds.flatten()
    starts = np.cumsum(bounds) - bounds
    finite, diagonal, off_diagonal, sizes, scales = _prepared(runs)
    spectra, row_sizes, tops = _spectra(
        runs, diagonal, off_diagonal, sizes, scales, limits, replicas, bounds, starts, device
    )
    found = fit_rows(spectra, starts, row_sizes, bounds, options)
    errors = torch.empty(layers, dtype=torch.float64, device=device)
    launch(
        sketch_errors,
        device,
        found,
        spectra,
        _on(device, starts),
        row_sizes,
        torch.tensor([_CHOICE[options.kind]], dtype=torch.float64, device=device),
        errors,
        layers,
        probes,
        replicas,
        PB=_power_of_two(probes),
        C=CHUNK,
    )
    fits = fit_table(found.view(layers, replicas, 6)[:, 0])
    n = row_sizes.view(layers, replicas)[:, 0].cpu().numpy()
    traces = runs.count * np.where(finite, diagonal[:, :, 0] * scales, 0).mean(axis=1)
    good = np.logical_and.reduceat(finite.all(axis=1), runs.first[:-1])
    fits.reason[~good] = Reason.NOT_FINITE
    nan = np.where(good, 0.0, np.nan)
    largest = np.maximum.reduceat(tops.cpu().numpy().max(axis=1), runs.first[:-1])
    return SketchTable(
        fits,
        np.where(good, eigenvalues - n, 0),
        np.maximum(largest, 0) + nan,
        np.add.reduceat(traces, runs.first[:-1]) + nan,
        errors.cpu().numpy(),
    )


def _prepared(
    runs: Tridiagonals,
) -> tuple[NDArray[np.bool_], _Array, _Array, NDArray[np.int32], _Array]:
    """Which runs are finite, their matrices scaled, their rules' sizes, and factors on the nodes.

    Entries beyond a run's end, and all of those that are not finite, become zero.
    """
    steps = runs.diagonal.shape[2]
    index = np.arange(steps)
    taken = runs.taken[..., None]
    diagonal = np.where(index < taken, runs.diagonal, 0)
    off_diagonal = np.where(index < taken - 1, runs.off_diagonal, 0)
    known: NDArray[np.float64] = np.stack([diagonal, off_diagonal])
    finite: NDArray[np.bool_] = np.all(np.isfinite(known), axis=(0, 3))
    diagonal, off_diagonal = (np.where(finite[..., None], a, 0) for a in (diagonal, off_diagonal))
    largest = np.maximum(np.abs(diagonal).max(axis=2), np.abs(off_diagonal).max(axis=2))
    exponent = np.frexp(largest)[1]
    diagonal, off_diagonal = (np.ldexp(a, -exponent[..., None]) for a in (diagonal, off_diagonal))
    # A run that ended by itself knows all that its start vector can tell.
    ended = (runs.taken < steps) | (runs.taken >= runs.count[:, None])
    shorter = [np.where(ended, runs.taken, np.maximum(1, runs.taken // part)) for part in (2, 4)]
    sizes = np.stack([runs.taken, *shorter], axis=-1).astype(np.int32)
    return finite, diagonal, off_diagonal, sizes, np.ldexp(1.0, exponent)


def _spectra(
    runs: Tridiagonals,
    diagonal: _Array,
    off_diagonal: _Array,
    sizes: NDArray[np.int32],
    scales: _Array,
    limits: NDArray[np.int64],
    replicas: int,
    bounds: NDArray[np.int64],
    starts: NDArray[np.int64],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spectra of all replicas end to end, their sizes, and the largest node of each matrix."""
    layers = len(runs.first) - 1
    matrices, probes, steps = runs.diagonal.shape
    count = -(-bounds // TILES["QB"])
    row = np.repeat(np.arange(len(bounds)), count)
    blocks = np.column_stack([row, np.arange(len(row)) - (np.cumsum(count) - count)[row]])
    width = 4 * steps + 1
    steps_block = _power_of_two(steps)
    room = max(3 * TILES["LANES"] * steps, 2 * (steps_block + 1), 2 * GRID)

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    tops = empty(matrices, probes)
    row_sizes = empty(len(bounds), dtype=torch.int64)
    values = empty(int(bounds.sum()) + 1)
    launch_phases(
        quadrature_phases,
        6,
        device,
        *(_on(device, a) for a in (diagonal, off_diagonal, sizes, scales)),
        torch.tensor([runs.eps], dtype=torch.float64, device=device),
        _on(device, runs.first),
        _on(device, np.repeat(np.arange(layers), np.diff(runs.first))),
        _on(device, runs.count),
        empty(matrices, probes, 3, steps),
        empty(matrices, probes, 3, steps),
        empty(matrices, probes, 2, width),
        empty(matrices, probes, 2, width),
        empty(matrices, probes, 2, dtype=torch.int32),
        empty(matrices, probes, 2),
        tops,
        empty(layers, 2, GRID + 1),
        torch.zeros((layers, 2), dtype=torch.int64, device=device),
        empty(layers, 2, probes, GRID + 1),
        empty(layers, replicas, GRID + 1),
        _on(device, limits),
        row_sizes,
        _on(device, starts),
        _on(device, blocks),
        values,
        empty(programs(device), room),
        room,
        layers,
        matrices * probes,
        probes,
        steps,
        replicas,
        len(blocks),
        SB=steps_block,
        HALVINGS=width.bit_length(),
        **TILES,
    )
    return values, row_sizes, tops


def _on(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
