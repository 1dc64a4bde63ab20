"""The CUDA backend: every verb is one cooperative launch for all layers.

A plan and its device memory are made once for a batch and kept with it; a launch allocates nothing
and does not wait. The verbs wait for their results, because they return them; :class:`Refresh` does
not, and reads what earlier launches have left in pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast import _cuda as kernels
from tbfast.backends.cuda_plans import (
    SKETCH_COLUMNS,
    Planned,
    current_device,
    fit_table,
    planned_for,
    sketch_table,
    spectral_plan,
)
from tbfast.backends.cuda_refresh import Refresh
from tbfast.backends.exact_gpu import eigenvalues
from tbfast.backends.gpu_checks import check_length, planning, row_widths
from tbfast.batch import Batch
from tbfast.fitting import FitOptions, FitTable
from tbfast.sketching import SketchTable
from tbfast.tridiagonals import Tridiagonals

__all__ = [
    "Refresh",
    "dot",
    "drift",
    "eigenvalues",
    "fit",
    "gram_apply",
    "lanczos",
    "quadrature_fit",
    "rsvd",
]

_FLOAT_EPS = float(np.finfo(np.float32).eps)

_REAL_DTYPES = {
    torch.float64: torch.float64,
    torch.complex128: torch.complex128,
    torch.complex64: torch.complex64,
}


def gram_apply(batch: Batch, x: Sequence[Tensor]) -> list[Tensor]:
    """WᴴW x of every matrix in float32, each read once; see ``reference_lanczos.gram_apply``."""
    counts = {vectors.shape[1] for vectors in x}
    if len(counts) != 1:
        raise ValueError(f"all layers need the same number of vectors, got {sorted(counts)}")
    planned = spectral_plan(batch, counts.pop(), 1, FitOptions())
    given = _flat(x, batch.device)
    out = torch.empty_like(given)
    planned.launch(mode="product", given=given, out=out)
    parts = torch.split(out, [vectors.numel() for vectors in x])
    return [part.view(v.shape) for part, v in zip(parts, x, strict=True)]


def lanczos(
    batch: Batch,
    probes: int | Sequence[Tensor],
    steps: int,
    *,
    seed: int = 0,
    draw: int = 0,
) -> Tridiagonals:
    """Lanczos on every matrix in one launch, in float32; see ``reference_lanczos.lanczos``."""
    count = probes if isinstance(probes, int) else probes[0].shape[1]
    planned = spectral_plan(batch, count, steps, FitOptions())
    given = 0 if isinstance(probes, int) else _flat(probes, batch.device)
    planned.launch(mode="lanczos", given=given, seed=seed, draw=draw)
    matrices = len(batch.descriptors())
    plan, shape = planned.plan, (matrices, count, steps)
    stacks = batch.stacks()
    taken = planned.read(plan.taken, shape[:2], torch.int32)
    # Of a run that has ended, memory holds what was there before.
    left = taken[..., None] - np.arange(steps)
    return Tridiagonals(
        np.where(left > 0, planned.read(plan.diagonal, shape, torch.float64), 0),
        np.where(left > 1, planned.read(plan.off_diagonal, shape, torch.float64), 0),
        taken,
        first=np.cumsum([0, *map(len, stacks)]),
        count=np.repeat([min(s.shape[1:]) for s in stacks], [len(s) for s in stacks]),
        eps=_FLOAT_EPS,
    )


def fit(spectra: Sequence[NDArray[np.float64]], options: FitOptions) -> FitTable:
    """Fit all spectra in one launch; see ``reference_fit.fit``."""
    offsets = np.zeros(len(spectra) + 1, dtype=np.int64)
    np.cumsum([len(s) for s in spectra], out=offsets[1:])
    device = current_device()
    planned = Planned(kernels.FitPlan(offsets, **options.arguments()), device)
    values = torch.from_numpy(np.concatenate([*spectra, np.empty(0)])).to(device)
    results = torch.empty(len(spectra), 6, dtype=torch.float64, device=device)
    planned.launch(values=values, results=results)
    return fit_table(results.cpu().numpy())


def quadrature_fit(runs: Tridiagonals, options: FitOptions) -> SketchTable:
    """Fit all layers in one launch; see ``reference_slq.quadrature_fit``."""
    _, probes, steps = runs.diagonal.shape
    device = current_device()
    plan = kernels.QuadraturePlan(
        runs.first, runs.count, probes=probes, steps=steps, eps=runs.eps, **options.arguments()
    )
    planned = Planned(plan, device)
    on_device = [
        torch.from_numpy(np.ascontiguousarray(numbers)).to(device)
        for numbers in (runs.diagonal, runs.off_diagonal, runs.taken)
    ]
    results = torch.empty(len(runs.first) - 1, SKETCH_COLUMNS, dtype=torch.float64, device=device)
    planned.launch(
        diagonal=on_device[0], off_diagonal=on_device[1], taken=on_device[2], results=results
    )
    return sketch_table(results.cpu().numpy())


def rsvd(
    batch: Batch, rank: int, *, oversample: int, power_iters: int, seed: int
) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Factors of every matrix, in its precision; see ``reference_rsvd.rsvd``."""
    planned = planned_for(
        batch,
        "rsvd",
        (rank, oversample, power_iters),
        lambda described: kernels.RsvdPlan(
            described, rank=rank, oversample=oversample, power_iters=power_iters
        ),
    )
    plan = planned.plan
    with planning(plan.factors_bytes, batch.device):
        factors = torch.empty(plan.factors_bytes, dtype=torch.uint8, device=batch.device)
    matrices = [matrix for stack in batch.stacks() for matrix in stack]
    results = torch.empty(len(matrices), 3, dtype=torch.float64, device=batch.device)
    planned.launch(factors=factors, results=results, seed=seed)
    residuals = results[:, 0].tolist()
    found = []
    for matrix, offsets, residual in zip(matrices, plan.offsets.tolist(), residuals, strict=True):
        rows, cols = matrix.shape
        dtype = _REAL_DTYPES.get(matrix.dtype, torch.float32)
        shapes = [((rows, rank), dtype), ((rank,), torch.float64), ((rank, cols), dtype)]
        u, s, vh = (
            _part(factors, offset, shape, kind)
            for offset, (shape, kind) in zip(offsets, shapes, strict=True)
        )
        found.append((u, s, vh, residual))
    return found


def dot(
    batch: Batch, values: Tensor, scales: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Re <G, W> and |W|² of each layer in one read of both; see ``reference.dot``."""
    described = batch.descriptors()
    check_length("values", values, int((described[:, 1] * row_widths(described)).sum()))
    check_length("scales", scales, int(described[:, 1].sum()))
    planned = planned_for(
        batch, "dot", (), lambda described: kernels.DotPlan(described, len(batch))
    )
    values, scales = _there(batch, values, torch.int8), _there(batch, scales, torch.float32)
    results = torch.empty(len(batch), 2, dtype=torch.float64, device=batch.device)
    planned.launch(values=values, scales=scales, results=results)
    inner, square = results.cpu().numpy().T.copy()
    return inner, square


def drift(
    batch: Batch, rows: Tensor, values: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """How far some rows of each layer have moved; see ``reference.drift``."""
    described = batch.descriptors()
    planned = planned_for(
        batch,
        "drift",
        (_Unchanged(rows),),
        lambda described: kernels.DriftPlan(described, len(batch), rows.cpu().numpy()),
    )
    ends = np.cumsum(described[:, 1])
    matrices = np.searchsorted(ends, rows.cpu().numpy(), side="right")
    check_length("values", values, int(row_widths(described)[matrices].sum()))
    values = _there(batch, values, torch.float32)
    results = torch.empty(len(batch), 3, dtype=torch.float64, device=batch.device)
    planned.launch(values=values, results=results)
    moved, along, size = results.cpu().numpy().T.copy()
    return moved, along, size


class _Unchanged:
    """Equal to itself for as long as nobody writes to the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Unchanged):
            return NotImplemented
        return self._tensor is other._tensor and self._version == other._version

    __hash__ = None  # type: ignore[assignment]


def _there(batch: Batch, values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(batch.device, dtype).contiguous()


def _part(memory: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[offset : offset + size].view(dtype).view(shape)


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([t.detach().to(device, torch.float32).flatten() for t in tensors])
