"""Exact spectra where the weights are, with the libraries that torch brings for the device.

The Gram matrix of the shorter side and its eigenvalues, in float64, give every eigenvalue above
1e-10 of the largest to a millionth; where one that is needed lies below, the singular values in
float64 do. Matrices of one shape and type go in one batch, whoever owns them; a matrix that is not
finite makes the spectrum of its stack NaN. Also runs on CPU tensors, which is how it is tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tbfast.precision import AVERAGED_TOLERANCE, FULL_TOLERANCE, trusted_from

_EPS = torch.finfo(torch.float64).eps
_BATCH = (
    1 << 25
)  # elements converted to float64 at a time: 256 MiB, and as much for the Gram matrix
_ORDINARY = 500  # exponents of the largest entry whose squares float64 holds
_WIDE = (torch.float64, torch.complex128)


def eigenvalues(stacks: Sequence[Tensor], shares: Sequence[float] | None = None) -> list[Tensor]:
    """Eigenvalues of WᵀW of each stack of matrices, pooled and ascending.

    Waits for the device.

    Args:
        stacks: Tensors of shape (matrices, rows, cols), real or complex floating point, on any
            device.
        shares: For each stack, the share of its eigenvalues, counted from the largest, that must
            be accurate; the others only as far as to tell whether they are zero. None: all.

    Returns:
        For each stack a float64 CPU tensor of shape (matrices * min(rows, cols),), non-negative;
        all NaN if a weight is not finite.
    """
    shares = [1.0] * len(stacks) if shares is None else shares
    found = _compute(stacks, range(len(stacks)), squares=True)
    inexact = [i for i, values in found.items() if not _reaches(values, stacks[i], shares[i])]
    found |= _compute(stacks, inexact, squares=False)
    return [found[i] for i in range(len(stacks))]


def _compute(stacks: Sequence[Tensor], which: Sequence[int], squares: bool) -> dict[int, Tensor]:
    """Sorted spectra of the chosen stacks, from Gram matrices or from singular values."""
    groups: dict[object, list[int]] = {}
    for i in which:
        rows, cols = sorted(stacks[i].shape[1:], reverse=True)
        groups.setdefault((rows, cols, stacks[i].dtype, stacks[i].device), []).append(i)
    parts: dict[int, list[Tensor]] = {i: [] for i in which}
    for owners in groups.values():
        pairs = [(i, matrix) for i in owners for matrix in _tall(stacks[i])]
        size = max(1, _BATCH // pairs[0][1].numel())
        for start in range(0, len(pairs), size):
            batch = pairs[start : start + size]
            with _room(batch[0][1]):
                values = _spectra(torch.stack([matrix for _, matrix in batch]), squares).cpu()
            for (i, _), row in zip(batch, values, strict=True):
                parts[i].append(row)
    spectra = {}
    for i, rows_found in parts.items():
        pooled = torch.cat(rows_found) if rows_found else torch.empty(0, dtype=torch.float64)
        bad = not bool(torch.isfinite(pooled).all())
        spectra[i] = pooled.fill_(math.nan) if bad else pooled.clamp_(min=0).sort().values
    return spectra


@contextmanager
def _room(matrix: Tensor) -> Iterator[None]:
    """Words for running out of memory."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info(matrix.device)
        raise RuntimeError(
            f"the exact spectrum of a matrix of shape {tuple(matrix.shape)} does not fit on "
            f"{matrix.device}, where {free} bytes are free; use method='sketch' or backend='native'"
        ) from error


def _tall(stack: Tensor) -> Tensor:
    stack = stack.detach().resolve_conj()
    return stack if stack.shape[1] >= stack.shape[2] else stack.mT


def _spectra(matrices: Tensor, squares: bool) -> Tensor:
    """Eigenvalues (count, cols) of WᴴW, W of (count, rows, cols); NaN where W is not finite."""
    kind = torch.complex128 if matrices.is_complex() else torch.float64
    entries = torch.view_as_real(matrices) if matrices.is_complex() else matrices
    dims = tuple(range(1, entries.ndim))
    largest = torch.maximum(entries.amax(dims), -entries.amin(dims)).double()
    finite = torch.isfinite(largest)
    exponents = torch.frexp(largest).exponent.clamp(-1000, 1000).double()
    exponents = exponents.masked_fill((exponents.abs() <= _ORDINARY) | ~finite, 0)
    scale = torch.exp2(-exponents)[:, None, None]

    def wide(part: Tensor) -> Tensor:
        # LAPACK would return anything, or not return, where something is not finite.
        part = part.to(kind, copy=True).masked_fill_(~finite[:, None, None], 0)
        return part.mul_(scale)

    if squares:
        count, _, cols = matrices.shape
        gram = torch.zeros(count, cols, cols, dtype=kind, device=matrices.device)
        for panel in torch.split(matrices, max(1, _BATCH // (count * cols)), dim=1):
            rows = wide(panel)
            gram.baddbmm_(rows.mH, rows)
        values = torch.linalg.eigvalsh(gram)
    else:
        values = torch.linalg.svdvals(wide(matrices)).square()
    factors = torch.exp2(exponents)[:, None]  # squared in two steps, not to overflow
    rescaled: Tensor = values * factors * factors
    return rescaled.masked_fill(~finite[:, None], math.nan)


def _reaches(values: Tensor, stack: Tensor, share: float) -> bool:
    """Whether a Gram matrix gave the upper ``share`` of a spectrum to the tolerance."""
    n = len(values)
    if n == 0 or not math.isfinite(largest := float(values[-1])):
        return True
    if stack.dtype in _WIDE:
        share = 1.0  # the Gram matrix does not tell their zeros from the rest
    tolerance = FULL_TOLERANCE if share == 1 else AVERAGED_TOLERANCE
    lowest = float(values[min(n - 1, n - math.ceil(share * n))])
    return lowest >= trusted_from(largest, _EPS, tolerance)
