"""A certificate, in float32, that a square matrix has full numerical rank.

With A = W and Gaussian probes B, solve A X = B through an LU factorisation and take the residual
R = B - A X. For the left and right singular vectors u, v of the least singular value s,
s vᵀX = uᵀ(B - R), hence

    s >= (|uᵀB| - |R|) / |X|        (Frobenius norms).

|uᵀB|² is a chi-square variable whatever u is, so this bounds s from below with a known probability
and without any assumption on the factorisation: its errors show in R. (Dixon, "Estimating extremal
eigenvalues and condition numbers of matrices", 1983, is the bound for one probe and exact solves.)
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_PROBES = 16
# |uᵀB|² is below 1/2 with probability 4e-10 (chi-square, 16 degrees of freedom: (1/4)^8 / 8!), or
# 1e-7 for a complex u, one of whose parts has at least half of its square.
_LEAST_PROJECTION = math.sqrt(0.5)


def least_singular_value_exceeds(square: Tensor, threshold: float) -> bool:
    """Whether it certainly does; False may also mean that this cannot tell.

    Tells if the least singular value is above about 6 thresholds and float32 resolves it.

    Args:
        square: CPU tensor of shape (n, n), float32 or complex64; not changed.
        threshold: On the scale of ``square``.
    """
    # The transpose of a row-major matrix is what LAPACK reads, and has the same singular values.
    matrix = square.mT
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    probes = _gaussian(len(matrix)).to(matrix.dtype)
    solution = torch.linalg.lu_solve(lu, pivots, probes)
    for refined in (False, True):
        residual = probes - matrix @ solution
        left = _LEAST_PROJECTION - float(torch.linalg.vector_norm(residual))
        if left > threshold * float(torch.linalg.vector_norm(solution)):  # false for NaN
            return True
        if not refined:
            solution += torch.linalg.lu_solve(lu, pivots, residual)
    return False


@lru_cache(maxsize=8)
def _gaussian(n: int) -> Tensor:
    """The same probes each time, shape (n, probes): a result must not depend on what ran before."""
    return torch.randn(n, _PROBES, generator=torch.Generator().manual_seed(n))
