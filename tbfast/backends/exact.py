"""Exact spectra: Gram matrix on the shorter side, values-only eigensolver, one layer a thread.

The Gram matrix squares the condition number, so its eigenvalues come with an absolute error of a
few eps * lambda_max. Each spectrum is computed in the cheapest of three ways, and the spectrum
found decides whether the next is needed:

1. float32, where the fit looks only at the upper part of the spectrum (``median``, ``tail``) and
   float32 is good enough for that part. The rank must be certain too, because numerical zeros
   shift the index of xmin. The smallest eigenvalues of a nearly square matrix are below the noise
   of float32; that none is zero, the module ``rank`` then certifies from the weights themselves.
2. float64.
3. Singular values in float64, where a needed eigenvalue is too small beside lambda_max: badly
   conditioned and rank-deficient matrices.

Weights of float64 and complex128 start at 2. Weights on a device are copied to the CPU, layer by
layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tbfast import _native
from tbfast.backends.rank import least_singular_value_exceeds
from tbfast.backends.threads import parallel_map, settle
from tbfast.precision import (
    AVERAGED_TOLERANCE,
    CERTAINLY_POSITIVE,
    FULL_TOLERANCE,
    RANK_MARGIN,
    trusted_from,
    zero_threshold,
)

_EPS32 = torch.finfo(torch.float32).eps
_EPS64 = torch.finfo(torch.float64).eps
_PANEL = 1 << 21  # elements converted at a time: 16 MiB of float64
_BATCH = 1 << 14  # elements of a batch of small matrices: few enough that every thread gets one
_BLOCKS = 6  # column blocks of a Gram product: 21 of 36 block products instead of all
_CACHE_LINE = 64  # bytes
_SMALL = 256  # columns below which matrices are batched, and blocks and float32 gain nothing
# Columns from which MKL's solver is faster than ours, whose matrices then leave the cache.
_LAPACK_ABOVE = {
    torch.float32: 1600,
    torch.float64: 1200,
    torch.complex64: 0,
    torch.complex128: 64,
}
_ORDINARY = 20  # exponents of the largest entry that need no scaling, for squares in float32
_SLENDER = 0.7  # short / long side above which a random spectrum reaches down to float32's noise


@dataclass(frozen=True)
class _Batch:
    """Matrices of one shape, the unit of work, and the stack each belongs to."""

    matrices: Tensor  # (matrices, rows, cols) with rows >= cols
    owners: list[int]

    @property
    def cost(self) -> float:
        count, rows, cols = self.matrices.shape
        return float(count) * cols * cols * (rows + 8 * cols)


# A way of computing: eigenvalues (matrices, cols) of a batch; None if it can tell they won't do.
_Way = Callable[[Tensor], "Tensor | None"]


def eigenvalues(stacks: Sequence[Tensor], shares: Sequence[float] | None = None) -> list[Tensor]:
    """Eigenvalues of WᵀW of each stack of matrices, pooled and ascending.

    Args:
        stacks: Tensors of shape (matrices, rows, cols), real or complex floating point.
        shares: For each stack, the share of its eigenvalues, counted from the largest, that must
            be accurate; the others only as far as to tell whether they are zero. None: all.

    Returns:
        For each stack a float64 CPU tensor of shape (matrices * min(rows, cols),), non-negative;
        all NaN if a weight is not finite.
    """
    shares = [1.0] * len(stacks) if shares is None else shares
    found: dict[int, Tensor] = {}
    light = [i for i, stack in enumerate(stacks) if shares[i] < 1 and _suits_float32(stack)]
    for i, values in _compute(stacks, light, _float32_values).items():
        if _reaches(values, shares[i], _EPS32):
            found[i] = values
    rest = [i for i in range(len(stacks)) if i not in found]
    for i, values in _compute(stacks, rest, _float64_values).items():
        # For weights of float32 the float64 Gram matrix also tells zeros from the rest.
        if _reaches(values, 1.0 if _is_wide(stacks[i]) else shares[i], _EPS64):
            found[i] = values
    rest = [i for i in range(len(stacks)) if i not in found]
    found |= _compute(stacks, rest, _singular_values)
    return [found[i] for i in range(len(stacks))]


def _compute(stacks: Sequence[Tensor], which: Sequence[int], way: _Way) -> dict[int, Tensor]:
    """Pooled, sorted spectra of the chosen stacks; those that ``way`` gave up on are missing."""
    batches = _batches(stacks, which)
    settle([batch.matrices for batch in batches])
    results = parallel_map(lambda b: way(b.matrices), batches, lambda b: b.cost)
    parts: dict[int, list[Tensor]] = {i: [] for i in which}
    for batch, values in zip(batches, results, strict=True):
        if values is not None:
            for owner, row in zip(batch.owners, values, strict=True):
                parts[owner].append(row)
    spectra = {}
    for i, rows in parts.items():
        if rows:
            pooled = torch.cat(rows)
            bad = not bool(torch.isfinite(pooled).all())
            spectra[i] = pooled.fill_(math.nan) if bad else pooled.clamp_(min=0).sort().values
    return spectra


def _batches(stacks: Sequence[Tensor], which: Sequence[int]) -> list[_Batch]:
    """Each large matrix alone; small ones of one shape and dtype together, whoever owns them."""
    batches: list[_Batch] = []
    small: dict[object, list[tuple[int, Tensor]]] = {}
    for i in which:
        tall = stacks[i].detach()
        tall = tall if tall.shape[1] >= tall.shape[2] else tall.mT
        if tall.shape[2] >= _SMALL:
            batches += [_Batch(tall[j : j + 1], [i]) for j in range(len(tall))]
        else:
            small.setdefault((tall.shape[1:], tall.dtype, tall.device), []).append((i, tall))
    for group in small.values():
        matrices = torch.cat([tall for _, tall in group]) if len(group) > 1 else group[0][1]
        owners = [i for i, tall in group for _ in range(len(tall))]
        size = max(1, _BATCH // matrices[0].numel())
        for start in range(0, len(owners), size):
            batches.append(_Batch(matrices[start : start + size], owners[start : start + size]))
    return batches


def _suits_float32(stack: Tensor) -> bool:
    return not _is_wide(stack) and len(stack) == 1 and min(stack.shape[1:]) >= _SMALL


def _is_wide(stack: Tensor) -> bool:
    return stack.dtype in (torch.float64, torch.complex128)


def _reaches(values: Tensor, share: float, eps: float) -> bool:
    """Whether a Gram matrix of precision ``eps`` gave the upper ``share`` to the tolerance."""
    n = len(values)
    if n == 0 or not math.isfinite(largest := float(values[-1])):
        return True
    tolerance = FULL_TOLERANCE if share == 1 else AVERAGED_TOLERANCE
    lowest = float(values[min(n - 1, n - math.ceil(share * n))])
    return lowest >= trusted_from(largest, eps, tolerance)


def _float32_values(matrix: Tensor) -> Tensor | None:
    finite, exponents = _exponents(matrix)
    _, rows, cols = matrix.shape
    # Nearly square: the rank is in doubt, and if it is not full all else is in vain.
    nearly_square = cols > _SLENDER * rows
    floor = _rank_floor(finite, exponents) if nearly_square else 0.0
    if floor is None:
        return None
    values = _symmetric_eigenvalues(_gram(finite, exponents, torch.float32))
    if not nearly_square and values.amin() < CERTAINLY_POSITIVE * _EPS32 * values.amax():
        floor = _rank_floor(finite, exponents)
        if floor is None:
            return None
    return _rescaled(values.clamp_(min=floor), exponents)


def _rank_floor(matrix: Tensor, exponents: Tensor) -> float | None:
    """An eigenvalue that none is below, and above the numerical zeros; None if that is not sure.

    Found from the first ``cols`` rows: leaving out the others lowers every singular value.
    """
    _, rows, cols = matrix.shape
    squares = 0.0
    for top in range(0, rows, cols):
        block = _converted(matrix[:, top : top + cols], exponents, torch.float32)
        squares += float(torch.linalg.vector_norm(block)) ** 2
    least = RANK_MARGIN * zero_threshold(matrix, squares)
    square = _converted(matrix[:, :cols], exponents, torch.float32)[0]
    return least if least_singular_value_exceeds(square, math.sqrt(least)) else None


def _float64_values(matrices: Tensor) -> Tensor:
    finite, exponents = _exponents(matrices)
    return _rescaled(_symmetric_eigenvalues(_gram(finite, exponents, torch.float64)), exponents)


def _singular_values(matrices: Tensor) -> Tensor:
    finite, exponents = _exponents(matrices)
    scaled = _converted(finite, exponents, torch.float64)
    # One at a time: each is copied to memory of its own, see _padded.
    values = torch.stack([torch.linalg.svdvals(matrix) for matrix in scaled])
    return _rescaled(values.square(), exponents)


def _exponents(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices, and for each the power of two to divide it by, not to overflow when squared.

    That is 0 for ordinary sizes, else it is just above the largest entry. Where an entry is not
    finite it is NaN and the matrix is replaced by zeros: LAPACK would return zeros, or not return.
    """
    parts = torch.view_as_real(matrices.resolve_conj()) if matrices.is_complex() else matrices
    dims = tuple(range(1, parts.ndim))
    largest = torch.maximum(parts.amax(dims), -parts.amin(dims)).to("cpu", torch.float64)
    finite = torch.isfinite(largest)
    exponents = torch.frexp(largest).exponent.double().clamp_(-1000, 1000)
    exponents.masked_fill_(exponents.abs() <= _ORDINARY, 0)
    if not bool(finite.all()):
        exponents.masked_fill_(~finite, math.nan)
        matrices = matrices.cpu().masked_fill(~finite[:, None, None], 0)
    return matrices, exponents


def _rescaled(values: Tensor, exponents: Tensor) -> Tensor:
    factors = torch.exp2(exponents)[:, None]  # squared in two steps, not to overflow
    return values.mul_(factors).mul_(factors)


def _converted(matrices: Tensor, exponents: Tensor, real: torch.dtype) -> Tensor:
    """On the CPU, times 2**-exponent, which is exact; the matrices themselves where that is all."""
    converted = matrices.to("cpu", _kind(matrices, real))
    if not bool(exponents.any()):
        # Copied to a cache line where a weight of that dtype is a slice of a buffer, see _padded.
        return converted.clone() if converted.data_ptr() % _CACHE_LINE else converted
    return converted * torch.exp2(exponents.nan_to_num(0).neg())[:, None, None].to(real)


def _kind(matrices: Tensor, real: torch.dtype) -> torch.dtype:
    """The real or complex dtype of that precision."""
    return torch.promote_types(real, torch.complex64) if matrices.is_complex() else real


def _gram(matrices: Tensor, exponents: Tensor, real: torch.dtype) -> Tensor:
    """Upper triangle of WᴴW of matrices (count, rows, cols), scaled; the lower is undefined.

    Panels of rows keep the converted copy small; their size depends on the shape alone, so the
    order of summation, and the result to the bit, does not depend on threads.
    """
    count, rows, cols = matrices.shape
    if cols < _SMALL:
        panel = _padded(_converted(matrices, exponents, real))
        return (panel.mH @ panel)[:, :cols, :cols].contiguous()
    edges = [cols * b // _BLOCKS for b in range(_BLOCKS + 1)]
    height = max(1, _PANEL // cols)
    gram = torch.empty(count, cols, cols, dtype=_kind(matrices, real))
    for top in range(0, rows, height):
        panel = _converted(matrices[:, top : top + height], exponents, real)
        for left, right in pairwise(edges):
            # With beta 0 what the memory held before is ignored.
            gram[:, left:right, left:].baddbmm_(
                panel[:, :, left:right].mH, panel[:, :, left:], beta=0 if top == 0 else 1
            )
    return gram


def _padded(matrices: Tensor) -> Tensor:
    """A copy with columns of zeros, so that every matrix of the batch begins on a cache line.

    MKL's kernels add in another order where a matrix or its result does not: without this the
    bits of a small layer would depend on its place in the batch (seen on an AMD EPYC).
    """
    count, rows, cols = matrices.shape
    line = _CACHE_LINE // matrices.element_size()
    copy = matrices.new_zeros(count, rows, -(-cols // line) * line)
    copy[:, :, :cols] = matrices
    return copy


def _symmetric_eigenvalues(gram: Tensor) -> Tensor:
    """Eigenvalues (count, cols) in float64 of Hermitian matrices given by their upper triangles."""
    if gram.shape[1] > _LAPACK_ABOVE[gram.dtype]:
        values: Tensor = torch.linalg.eigvalsh(gram, UPLO="U")
        return values.double()
    solve = _native.hermitian_eigenvalues if gram.is_complex() else _native.symmetric_eigenvalues
    return torch.from_numpy(solve(gram.numpy()))
