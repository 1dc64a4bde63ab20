"""The definition of ``rsvd``: a randomized singular value decomposition in float64.

Halko, Martinsson and Tropp, "Finding structure with randomness: probabilistic algorithms for
constructing approximate matrix decompositions", SIAM Review 53 (2011): algorithm 4.4 finds an
orthonormal basis Q of the range of a matrix A, algorithm 5.1 decomposes QᴴA.

The power iterations are shifted, which makes them worth more at no cost, as Feng, Yu, Xie and Tang
do ("Faster randomized SVD with dynamic shifts", arXiv:2404.09276). Our shifts make up a Chebyshev
polynomial T: q iterations multiply the part of A with the singular value σ by σ ∏ (σ² - (c_i s)²),
with the positive zeros c_i of T of degree 2 q + 1 and the smallest singular value s of QᴴA, which
is at most that of A with the same index. Up to a factor this is T(σ / s): of all odd polynomials of
this degree that are bounded by 1 below s the one that grows fastest above.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tbfast.backends.philox import Purpose, signs
from tbfast.batch import Batch

Factors = tuple[Tensor, Tensor, Tensor, float]

_DRAW = 8192  # columns of signs that one draw of the stream has
_STEP = 16  # sketches have whole vectors of columns: the last ones would cost nothing less
_SHIFTED = 1e-10  # of the largest: smaller squared singular values are too uncertain a shift


def rsvd(batch: Batch, rank: int, *, oversample: int, power_iters: int, seed: int) -> list[Factors]:
    """Factors of every matrix of a batch.

    Args:
        batch: Matrices whose shorter sides are ``rank`` or more.
        rank: Columns of U, 1 or more.
        oversample: Columns that the sketch has beyond them, rounded up so that it has a multiple
            of 16 in all, or as many as the shorter side.
        power_iters: How often A Aᴴ is applied to the sketch.
        seed: Of the random signs of the sketch, below 2^64. They depend on nothing else but the
            longer side of A, so that a matrix has the same factors in any company.

    Returns:
        For each matrix U (rows, rank), S (rank,), descending, and Vh (rank, cols), in float64 or
        complex128, and the residual |A - U S Vh|_F / |A|_F, 0 for A = 0. The residual is NaN, and
        the factors mean nothing, where an entry is not finite.
    """
    return [
        _factors(matrix, rank, oversample, power_iters, seed)
        for stack in batch.stacks()
        for matrix in stack
    ]


def _factors(matrix: Tensor, rank: int, oversample: int, power_iters: int, seed: int) -> Factors:
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh, residual = _factors(matrix.mH, rank, oversample, power_iters, seed)
        return vh.mH, s, u.mH, residual
    a = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    largest = float(a.abs().max())
    if not math.isfinite(largest):
        return a[:, :rank], a[0, :rank].abs(), a[:rank], math.nan
    a = a / (largest or 1.0)  # squares must neither overflow nor vanish
    columns = min(-(-(rank + oversample) // _STEP) * _STEP, len(a))
    q = _orthonormal(a @ _random_signs(a.shape[1], columns, seed).to(a.dtype))
    # With as many columns as A has rows the range is complete already.
    iterations = power_iters if columns < len(a) else 0
    for step in reversed(range(iterations)):
        q = _orthonormal(
            _power_step(a, q, math.cos((2 * step + 1) / (4 * iterations + 2) * math.pi))
        )
    w, s, vh = torch.linalg.svd(q.mH @ a, full_matrices=False)
    u, s, vh = q @ w[:, :rank], s[:rank], vh[:rank]
    residual = float(torch.linalg.norm(a - (u * s) @ vh))
    return u, s * largest, vh, residual / (float(torch.linalg.norm(a)) or 1.0)


def _power_step(a: Tensor, q: Tensor, root: float) -> Tensor:
    """(A Aᴴ - (root s)²) q with another basis, s the smallest singular value of Aᴴ q."""
    v, r = torch.linalg.qr(a.mH @ q)
    values = torch.linalg.svdvals(r)
    applied: Tensor = a @ v
    if values[-1] ** 2 > _SHIFTED * values[0] ** 2:
        shift = (root * values[-1]) ** 2
        applied -= shift * torch.linalg.solve_triangular(r, q, upper=True, left=False)
    return applied


def _random_signs(rows: int, columns: int, seed: int) -> Tensor:
    blocks = [
        signs(seed, 0, Purpose.SKETCH, draw, 0, rows, min(_DRAW, columns - draw * _DRAW))
        for draw in range(-(-columns // _DRAW))
    ]
    return torch.from_numpy(np.concatenate(blocks, axis=1))


def _orthonormal(y: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(y).Q
    return q
