"""``fit`` of the Triton backend: all spectra in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.backends.triton_fit_kernels import fit_phases
from tbfast.backends.triton_launch import INTERPRETED, current_device, launch_phases
from tbfast.fitting import FIT_KINDS, MAX_ALPHA, FitOptions, FitTable

TILES = {"C": 4096, "CB": 256, "JB": 1024} if INTERPRETED else {"C": 512, "CB": 32, "JB": 32}


def fit(spectra: Sequence[NDArray[np.float64]], options: FitOptions) -> FitTable:
    """Fit all spectra on the current GPU; see ``reference_fit.fit``."""
    device = current_device()
    sizes = np.array([len(s) for s in spectra], dtype=np.int64)
    values = torch.from_numpy(np.concatenate([*spectra, np.zeros(1)])).to(device)
    starts = np.cumsum(sizes) - sizes
    return fit_table(fit_rows(values, starts, torch.from_numpy(sizes).to(device), sizes, options))


def fit_rows(
    values: Tensor,
    starts: NDArray[np.int64],
    sizes: Tensor,
    bounds: NDArray[np.int64],
    options: FitOptions,
) -> Tensor:
    """The fits of spectra that are on a device.

    Args:
        values: All spectra, float64.
        starts: Where each begins.
        sizes: How many values it has, int64, on the device.
        bounds: The most that it can have.
        options: The fit.

    Returns:
        Float64 (spectra, 6) on the device: alpha, xmin, ks, start, n_tail, reason.
    """
    device, rows = values.device, len(starts)
    searched = options.kind in ("ks", "peak")
    count = -(-bounds // TILES["CB"]) if searched else np.zeros_like(bounds)
    first = np.concatenate([[0], np.cumsum(count)])
    row = np.repeat(np.arange(rows), count)
    blocks = np.column_stack([row, np.arange(first[-1]) - first[row]])
    numbers = [
        options.xmin_pos,
        options.smooth,
        options.k,
        options.bins,
        options.peak_compat,
        MAX_ALPHA,
    ]
    results = torch.zeros((rows, 6), dtype=torch.float64, device=device)
    launch_phases(
        fit_phases,
        3,
        device,
        values,
        torch.from_numpy(starts).to(device),
        sizes,
        rows,
        torch.from_numpy(blocks).to(device),
        torch.from_numpy(first).to(device),
        len(blocks),
        torch.tensor(numbers, dtype=torch.float64, device=device),
        torch.empty_like(values),
        torch.empty_like(values),
        torch.empty((len(blocks), 2), dtype=torch.float64, device=device),
        results,
        KIND=FIT_KINDS.index(options.kind),
        BINS=1 << (options.bins - 1).bit_length() if options.kind == "peak" else 1,
        **TILES,
    )
    return results


def fit_table(results: Tensor) -> FitTable:
    """What :func:`fit_rows` found, as every backend returns it."""
    alpha, xmin, ks, start, n_tail, reason = results.cpu().numpy().T.copy()
    whole = (a.astype(np.int64) for a in (start, n_tail, reason))
    return FitTable(alpha, xmin, ks, *whole)
