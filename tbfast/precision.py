"""How much of a spectrum a precision can be trusted with, and when an eigenvalue is zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Error of a small eigenvalue of a Gram matrix: this times eps * lambda_max. Measured at most 0.5
# below 0.05 lambda_max, in float32 and float64, for 96 to 768 columns of Gaussian, power-law,
# spiked and non-negative matrices. Large eigenvalues err by up to 45 eps of themselves, which is
# harmless. The alpha of the median fit errs by a tenth of this, relative to xmin, or less.
GRAM_ERROR = 0.5

# Relative errors of an eigenvalue that a fit may suffer. A fit of the upper part averages; a choice
# among candidates (ks, peak) may jump, so there the error must be small beside their differences.
AVERAGED_TOLERANCE = 5e-5
FULL_TOLERANCE = 1e-6

# A computed eigenvalue above this times eps * lambda_max is certainly not zero.
CERTAINLY_POSITIVE = 10.0

# An eigenvalue certified to be this times the threshold of zero is not zero, whatever the rounding
# of the norm that the threshold is made of.
RANK_MARGIN = 4.0

# A singular value is numerically zero when rounding the entries of W could have made it. Rounding
# perturbs W by a random matrix of norm eps / sqrt(12) * |W|_F * (1 / sqrt(M) + 1 / sqrt(N)) at
# most; 8 also covers weights that were themselves computed (a product of two factors, say).
_ZERO_FACTOR = 8.0


def trusted_from(largest: float, eps: float, tolerance: float) -> float:
    """Least eigenvalue that a Gram matrix of precision ``eps`` gives to a relative tolerance."""
    return GRAM_ERROR * eps * largest / tolerance


def zero_threshold(stack: Tensor, sum_eigenvalues: float) -> float:
    """Largest eigenvalue of WᵀW that the rounding of the weights alone can make.

    (8 eps |W|_F (1/sqrt(M) + 1/sqrt(N)))², eps that of float64 for float64 weights and that of
    float32 for float32 and narrower. Much sharper than max(M, N) eps lambda_max, which would call
    the smallest eigenvalues of every square random matrix zero and so shift the index of xmin.

    Args:
        stack: The matrices, shape (matrices, rows, cols); only shape and dtype are read.
        sum_eigenvalues: Sum of the eigenvalues of all of them, |W|_F² of the stack.
    """
    count, rows, cols = stack.shape
    wide = stack.dtype in (torch.float64, torch.complex128)
    eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    relative = _ZERO_FACTOR * eps * (1 / math.sqrt(rows) + 1 / math.sqrt(cols))
    return relative**2 * sum_eigenvalues / count
