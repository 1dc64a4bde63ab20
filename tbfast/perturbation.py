"""How alpha changes when the weights change a little: eigenvectors and the gradient of alpha.

With T = sum_j c_j ln(lambda_j), alpha = 1 + 1/T. The weights c are 1/n on the n eigenvalues of the
tail minus a point mass at xmin. As d lambda_j = 2 Re <A v_j v_jᴴ, dA>, first-order perturbation
theory gives d alpha / d A = -(alpha - 1)² A V diag(2 c / lambda) Vᴴ. The weights c sum to zero:
scaling A changes nothing, and <d alpha / d A, A> = 0.

A single eigenvalue moves erratically, pushed about by its neighbours, and first order holds only
for moves smaller than their distance. So the point mass is spread over neighbouring ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.fitting import FitOptions
from tbfast.precision import AVERAGED_TOLERANCE, FULL_TOLERANCE, trusted_from

Array = NDArray[np.float64]

# The point mass at xmin is spread over N / 32 ranks to either side; of a short tail (fit="tail")
# over no more than an eighth.
_SPREAD = 32
_TAIL_SPREAD = 8
_EPS = torch.finfo(torch.float64).eps


class Decomposition(NamedTuple):
    """Eigenvalues and eigenvectors of AᴴA for a stack of matrices A.

    Attributes:
        tall: A = W, or Wᴴ where W is wide, times ``factor``: float64 or complex128
            (matrices, rows, cols).
        values: Eigenvalues, ascending, float64 (matrices, cols).
        vectors: Eigenvectors as columns, (matrices, cols, cols).
        factor: A power of two that keeps squares from overflowing.
        is_wide: Whether A is Wᴴ.
    """

    tall: Tensor
    values: Tensor
    vectors: Tensor
    factor: float
    is_wide: bool


def decompose(stack: Tensor, share: float) -> Decomposition | None:
    """Eigendecomposition of a stack of weights in float64.

    Through the Gram matrix, or by singular values where it could not tell zeros from the rest or
    its eigenvalues would be too inaccurate: the rule of ``backends.exact``.

    Args:
        stack: (matrices, rows, cols), real or complex; not changed.
        share: Share of the eigenvalues, counted from the largest, that must be accurate.

    Returns:
        None if a weight is not finite.
    """
    stack = stack.detach().cpu()
    largest = float(torch.linalg.vector_norm(stack, math.inf))
    if not math.isfinite(largest):
        return None
    factor = 2.0 ** -max(-1000, min(1000, math.frexp(largest)[1]))
    wide = stack.to(torch.complex128 if stack.is_complex() else torch.float64) * factor
    is_wide = wide.shape[1] < wide.shape[2]
    tall = wide.mH if is_wide else wide
    values, vectors = torch.linalg.eigh(tall.mH @ tall)
    exact = stack.dtype in (torch.float64, torch.complex128)
    share, tolerance = (1.0, FULL_TOLERANCE) if exact else (share, AVERAGED_TOLERANCE)
    pooled = values.flatten().sort().values
    lowest = float(pooled[min(len(pooled) - 1, len(pooled) - math.ceil(share * len(pooled)))])
    if lowest < trusted_from(float(pooled[-1]), _EPS, tolerance):
        _, sigma, adjoint = torch.linalg.svd(tall, full_matrices=False)
        values, vectors = sigma.square().flip(-1), adjoint.mH.flip(-1)
    return Decomposition(tall, values.clamp_(min=0), vectors, factor, is_wide)


def tail_weights(n: int, n_tail: int, options: FitOptions) -> Array:
    """The weights c: T = sum_j c_j ln(lambda_j) over n ascending eigenvalues, to first order.

    The point mass at xmin is the fit's own where the fit is smoothed, else Epanechnikov's kernel.
    """
    weights = np.zeros(n)
    start = n - n_tail
    weights[start:] = 1 / n_tail
    distance = np.abs(np.arange(n) - start)
    if options.kind == "median" and int(options.smooth * n) > 0:
        kernel = (distance <= int(options.smooth * n)).astype(np.float64)
    else:
        half_width = min(n // _SPREAD, n_tail // _TAIL_SPREAD)
        kernel = np.maximum(0.0, 1 - (distance / (half_width + 1)) ** 2)
    weights -= kernel / kernel.sum()
    return weights


def alpha_gradient(
    parts: Decomposition, alpha: float, n_tail: int, n_zeros: int, options: FitOptions
) -> Tensor:
    """|W| d alpha / d W, the gradient for weights of norm 1, (matrices, rows, cols) like W.

    Args:
        parts: The eigendecomposition.
        alpha: The fitted exponent.
        n_tail: Number of eigenvalues in its tail.
        n_zeros: How many of the smallest eigenvalues the fit dropped as zeros.
        options: The fit.
    """
    flat = parts.values.flatten()
    order = flat.argsort()[n_zeros:]
    weights = torch.from_numpy(tail_weights(len(order), n_tail, options))
    coefficients = torch.zeros_like(flat)
    coefficients[order] = 2 * weights / flat[order]
    scale = -((alpha - 1) ** 2) * math.sqrt(float(flat.sum()))
    middle = (
        parts.vectors * (scale * coefficients.view_as(parts.values))[:, None, :]
    ) @ parts.vectors.mH
    gradient = parts.tall @ middle
    return gradient.mH if parts.is_wide else gradient
