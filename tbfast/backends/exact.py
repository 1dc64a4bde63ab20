"""Exact spectra: Gram matrix on the shorter side, values-only eigensolver, one layer per thread.

The Gram matrix squares the condition number, so its eigenvalues come with an absolute error of a
few eps * lambda_max. Each spectrum is computed in the cheapest of three ways, and the spectrum
found decides whether the next is needed:

1. float32, where the fit looks only at the upper part of the spectrum (``median``, ``tail``) and
   float32 is good enough for that part. The rank must be certain too, because numerical zeros
   shift the index of xmin: where float32 cannot tell, a Cholesky factorisation in float64 does.
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

import torch
from torch import Tensor

from tbfast.backends.threads import parallel_map
from tbfast.precision import (
    AVERAGED_TOLERANCE,
    CERTAINLY_POSITIVE,
    FULL_TOLERANCE,
    trusted_from,
    zero_threshold,
)

_EPS32 = torch.finfo(torch.float32).eps
_EPS64 = torch.finfo(torch.float64).eps
_PANEL = 1 << 21  # elements converted at a time: 16 MiB of float64
_BLOCKS = 4  # column blocks of a Gram product: 10 of 16 block products instead of all
_NARROW = 256  # columns below which the blocks cost more than they save
_SQUARE = 0.7  # short / long side above which a random spectrum reaches below float32's noise


@dataclass(frozen=True)
class _Chunk:
    """Some matrices of one stack: the unit of work."""

    stack: int
    matrices: Tensor  # (matrices, rows, cols) with rows >= cols
    whole: bool  # whether this is all of the stack

    @property
    def cost(self) -> float:
        count, rows, cols = self.matrices.shape
        return float(count) * cols * cols * (rows + 8 * cols)


# A way of computing: the eigenvalues of a chunk, pooled; None if it can tell that they will not do.
_Way = Callable[[_Chunk], "Tensor | None"]


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
    if light := [i for i, s in enumerate(stacks) if shares[i] < 1 and not _is_wide(s)]:
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
    chunks = [chunk for i in which for chunk in _chunks(i, stacks[i])]
    parts: dict[int, list[Tensor | None]] = {i: [] for i in which}
    for chunk, values in zip(chunks, parallel_map(way, chunks, lambda c: c.cost), strict=True):
        parts[chunk.stack].append(values)
    spectra = {}
    for i, pieces in parts.items():
        complete = [piece for piece in pieces if piece is not None]
        if len(complete) == len(pieces):
            pooled = torch.cat(complete) if len(complete) > 1 else complete[0]
            bad = not bool(torch.isfinite(pooled).all())
            spectra[i] = pooled.fill_(math.nan) if bad else pooled.clamp_(min=0).sort().values
    return spectra


def _chunks(i: int, stack: Tensor) -> list[_Chunk]:
    tall = stack.detach() if stack.shape[1] >= stack.shape[2] else stack.detach().mT
    size = max(1, _PANEL // max(1, tall[0].numel())) if tall.shape[2] < _NARROW else 1
    pieces = tall.split(size)
    return [_Chunk(i, piece, len(pieces) == 1) for piece in pieces]


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


def _float32_values(chunk: _Chunk) -> Tensor | None:
    exponent = _exponent(chunk.matrices)
    if exponent is None:
        return _no_values(chunk)
    count, rows, cols = chunk.matrices.shape
    # Nearly square matrices need the float64 Gram matrix anyway, for their rank.
    square = cols > _SQUARE * rows and chunk.whole and count == 1
    gram = _gram(chunk.matrices, exponent, torch.float64 if square else torch.float32)
    single = torch.complex64 if gram.is_complex() else torch.float32
    values = torch.linalg.eigvalsh(gram.to(single)).double()
    doubtful = values.amin() < CERTAINLY_POSITIVE * _EPS32 * values.amax()
    if doubtful and not (square and _has_full_rank(gram, chunk.matrices)):
        return None
    return _rescale(values.flatten(), exponent)


def _float64_values(chunk: _Chunk) -> Tensor | None:
    exponent = _exponent(chunk.matrices)
    if exponent is None:
        return _no_values(chunk)
    gram = _gram(chunk.matrices, exponent, torch.float64)
    return _rescale(torch.linalg.eigvalsh(gram).flatten(), exponent)


def _singular_values(chunk: _Chunk) -> Tensor:
    exponent = _exponent(chunk.matrices)
    if exponent is None:
        return _no_values(chunk)
    scaled = _converted(chunk.matrices, exponent, torch.float64)
    return _rescale(torch.linalg.svdvals(scaled).flatten().square(), exponent)


def _exponent(matrices: Tensor) -> int | None:
    """Power of two just above the largest entry, 0 for zeros; None if an entry is not finite."""
    largest = float(torch.linalg.vector_norm(matrices, math.inf))
    if not math.isfinite(largest):
        return None
    return max(-1000, min(1000, math.frexp(largest)[1]))


def _no_values(chunk: _Chunk) -> Tensor:
    count, _, cols = chunk.matrices.shape
    return torch.full((count * cols,), math.nan, dtype=torch.float64)


def _rescale(values: Tensor, exponent: int) -> Tensor:
    return values.mul_(2.0**exponent).mul_(2.0**exponent)


def _converted(matrices: Tensor, exponent: int, real: torch.dtype) -> Tensor:
    """A CPU copy times 2**-exponent: exact, and safe from overflow once squared."""
    dtype = torch.complex(torch.empty(0, dtype=real), torch.empty(0, dtype=real)).dtype
    return matrices.to("cpu", dtype if matrices.is_complex() else real, copy=True).mul_(
        2.0**-exponent
    )


def _gram(matrices: Tensor, exponent: int, real: torch.dtype) -> Tensor:
    """Lower triangle of WᴴW of matrices (count, rows, cols), scaled; the upper is undefined.

    Panels of rows keep the converted copy small; their size depends on the shape alone, so the
    order of summation, and the result to the bit, does not depend on threads.
    """
    count, rows, cols = matrices.shape
    height = max(1, _PANEL // (count * cols))
    edges = [cols * b // _BLOCKS for b in range(_BLOCKS + 1)] if cols >= _NARROW else [0, cols]
    gram: Tensor | None = None
    for top in range(0, rows, height):
        panel = _converted(matrices[:, top : top + height], exponent, real)
        if gram is None:
            gram = panel.new_zeros(count, cols, cols)
        for left, right in zip(edges, edges[1:], strict=False):
            gram[:, left:right, :right] += panel[:, :, left:right].mH @ panel[:, :, :right]
    assert gram is not None, "a stack has at least one row"
    return gram


def _has_full_rank(gram: Tensor, matrices: Tensor) -> bool:
    """Whether no eigenvalue is numerically zero: a Cholesky factorisation of gram - shift * I."""
    sum_eigenvalues = float(gram.diagonal(dim1=-2, dim2=-1).real.sum())
    shift = 4 * zero_threshold(matrices, sum_eigenvalues)  # 4: clear of the threshold itself
    gram.diagonal(dim1=-2, dim2=-1).sub_(shift)
    return bool(torch.linalg.cholesky_ex(gram).info.eq(0).all())
