"""The CPU backend: exact spectra by threads over layers, fits in C++."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast import _native
from tbfast.backends.exact import eigenvalues
from tbfast.batch import Batch
from tbfast.fitting import FitOptions, FitTable
from tbfast.sketching import SketchTable
from tbfast.tridiagonals import Tridiagonals

__all__ = ["dot", "drift", "eigenvalues", "fit", "gram_apply", "lanczos", "quadrature_fit", "rsvd"]


def fit(spectra: Sequence[NDArray[np.float64]], options: FitOptions) -> FitTable:
    """Fit all spectra in one threaded call; see ``reference_fit.fit``."""
    offsets = np.zeros(len(spectra) + 1, dtype=np.int64)
    np.cumsum([len(s) for s in spectra], out=offsets[1:])
    alpha, xmin, ks, start, n_tail, reason = _native.fit(
        np.concatenate([*spectra, np.empty(0)]),
        offsets,
        **options.arguments(),
        threads=_native.num_threads(),
    )
    return FitTable(alpha, xmin, ks, start, n_tail, reason)


def dot(
    batch: Batch, values: Tensor, scales: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Re <G, W> and |W|² of each layer in one read of both; see ``reference.dot``."""
    inner, square = _native.dot(
        batch.table(), values.numpy(), scales.numpy(), threads=_native.num_threads()
    )
    return inner, square


def drift(
    batch: Batch, rows: Tensor, values: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """How far some rows of each layer have moved; see ``reference.drift``."""
    moved, along, size = _native.drift(
        batch.table(), rows.numpy(), values.numpy(), threads=_native.num_threads()
    )
    return moved, along, size


def gram_apply(batch: Batch, x: Sequence[Tensor]) -> list[Tensor]:
    """WᴴW x of every matrix in float32, each read once; see ``reference_lanczos.gram_apply``."""
    counts = {vectors.shape[1] for vectors in x}
    if len(counts) != 1:
        raise ValueError(f"all layers need the same number of vectors, got {sorted(counts)}")
    found = _native.gram_apply(
        batch.table(), _flat(x), probes=counts.pop(), threads=_native.num_threads()
    )
    ends = np.cumsum([vectors.numel() for vectors in x])
    parts = np.split(found, ends[:-1])
    return [torch.from_numpy(part).view(v.shape) for part, v in zip(parts, x, strict=True)]


def lanczos(
    batch: Batch,
    probes: int | Sequence[Tensor],
    steps: int,
    *,
    seed: int = 0,
    draw: int = 0,
) -> Tridiagonals:
    """Lanczos on every matrix in one call, in float32; see ``reference_lanczos.lanczos``."""
    diagonal, off_diagonal, taken, first, count, eps = _native.lanczos(
        batch.table(),
        probes=probes if isinstance(probes, int) else probes[0].shape[1],
        steps=steps,
        seed=seed,
        draw=draw,
        starts=None if isinstance(probes, int) else _flat(probes),
        threads=_native.num_threads(),
    )
    return Tridiagonals(diagonal, off_diagonal, taken, first, count, eps)


def rsvd(
    batch: Batch, rank: int, *, oversample: int, power_iters: int, seed: int
) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Factors of every matrix, in its precision; see ``reference_rsvd.rsvd``."""
    found = _native.rsvd(
        batch.table(),
        rank=rank,
        oversample=oversample,
        power_iters=power_iters,
        seed=seed,
        threads=_native.num_threads(),
    )
    return [(*map(torch.from_numpy, factors), error) for *factors, error in found]


def quadrature_fit(runs: Tridiagonals, options: FitOptions) -> SketchTable:
    """Fit all layers in one threaded call; see ``reference_slq.quadrature_fit``."""
    *fits, n_zeros, max_eigenvalue, sum_eigenvalues, sketch_error = _native.quadrature_fit(
        runs.diagonal,
        runs.off_diagonal,
        runs.taken,
        runs.first,
        runs.count,
        eps=runs.eps,
        **options.arguments(),
        threads=_native.num_threads(),
    )
    return SketchTable(FitTable(*fits), n_zeros, max_eigenvalue, sum_eigenvalues, sketch_error)


def _flat(tensors: Sequence[Tensor]) -> NDArray[np.float32]:
    return torch.cat([t.detach().float().flatten() for t in tensors]).numpy()
