"""What the shape of a matrix alone does to alpha, and two ways to take it out.

The median alpha of Gaussian noise grows with the aspect ratio of the matrix (2.13 for a square,
3.5 at 4:1, 11.3 at 64:1), whatever its scale and nearly whatever its size.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from torch import Tensor

from tbfast.matrices import Kind, as_matrices, count_eigenvalues

_NODES = 4096
# Three standard deviations of alpha over Gaussian matrices, in units of (alpha - 1) / side, over
# the square root of the number of pooled matrices: one is 3 to 4, measured over sides 50 to 512,
# ratios 1 to 64, xmin_pos 1.5 and 2, 1 or 9 matrices. The finite-size bias, at most 2, is inside.
_BAND = 12.0


@lru_cache(maxsize=4096)
def noise_alpha(ratio: float, xmin_pos: float = 2.0) -> float:
    """alpha of the median fit on Gaussian noise of a given aspect ratio, infinitely large.

    With the Marchenko-Pastur law mu of the eigenvalues and q its quantile 1 / xmin_pos,
    alpha = 1 + m / integral over x > q of ln(x / q) dmu, where m = mu(x > q) = 1 - 1 / xmin_pos.

    Args:
        ratio: Longer side over shorter side, at least 1.
        xmin_pos: As in the fit.

    Raises:
        ValueError: If ``ratio`` is below 1 or ``xmin_pos`` not above 1.
    """
    if not 1 <= ratio < math.inf:
        raise ValueError(f"ratio must be at least 1 (longer over shorter side), got {ratio!r}")
    if not 1 < xmin_pos < math.inf:
        raise ValueError(f"xmin_pos must be above 1, got {xmin_pos!r}")
    # x = 1 + y + 2 sqrt(y) cos(t) turns the density sqrt((b - x)(x - a)) / (2 pi y x) dx into
    # 2 sin(t)^2 / (pi x) dt, which is smooth and periodic: midpoints converge exponentially.
    y = 1 / ratio
    angle = (np.arange(_NODES) + 0.5) * math.pi / _NODES  # descending x
    x = (1 - math.sqrt(y)) ** 2 + 4 * math.sqrt(y) * np.cos(angle / 2) ** 2
    mass = 2 * np.sin(angle) ** 2 / (x * _NODES)
    tail = 1 - 1 / xmin_pos
    above = np.cumsum(mass)
    last = int(np.searchsorted(above, tail))  # the cell that holds the quantile
    inside = (tail - (above[last - 1] if last else 0.0)) / mass[last]
    edge = (last + inside) * math.pi / _NODES
    quantile = (1 - math.sqrt(y)) ** 2 + 4 * math.sqrt(y) * math.cos(edge / 2) ** 2
    excess = float((mass[:last] * np.log(x[:last] / quantile)).sum())
    excess += float(mass[last] * inside * math.log(x[last] / quantile)) / 2
    return 1 + tail / excess


def sides(shape: tuple[int, ...], kind: Kind) -> tuple[int, int]:
    """Rows and columns of the matrices that a parameter stands for."""
    if kind == "packed":
        return shape[0] // 3, shape[1]
    return (shape[1], shape[2]) if kind == "experts" else (shape[0], shape[1])


def aspect_ratio(shape: tuple[int, ...], kind: Kind) -> float:
    """Longer over shorter side of the matrices that a parameter stands for."""
    rows, cols = sides(shape, kind)
    return max(rows, cols) / min(rows, cols)


def is_noise(alpha: float, shape: tuple[int, ...], kind: Kind, xmin_pos: float) -> bool:
    """Whether the median alpha of a parameter is one that Gaussian noise of its shape has.

    The band is alpha_MP ± 12 (alpha_MP - 1) / (side * sqrt(matrices)), side the shorter side of
    the matrices: three standard deviations, 1.8 % of alpha at 768 by 768 and 21 % at 64 by 64.
    """
    side = min(sides(shape, kind))
    centre = noise_alpha(aspect_ratio(shape, kind), xmin_pos)
    matrices = count_eigenvalues(shape, kind) / side
    return abs(alpha - centre) <= _BAND * (centre - 1) / (side * math.sqrt(matrices))


def square_blocks(weight: Tensor, kind: Kind) -> Tensor:
    """Square sub-matrices of a parameter: alpha without the aspect ratio ("farms").

    Each (m, n) matrix with m >= n is cut into its floor(m / n) squares along the long side, from
    the first row on and without overlap; the m mod n rows that are left do not count. (FARMS,
    commit 8e07c3fb, takes windows of a fixed size that overlap, and so counts entries repeatedly.)

    Returns:
        Tensor of shape (matrices * floor(m / n), n, n), a stack of kind ``"experts"``; a view
        where there is one.
    """
    stack = as_matrices(weight, kind)
    if stack.shape[1] < stack.shape[2]:
        stack = stack.transpose(1, 2)
    side = stack.shape[2]
    squares = stack.shape[1] // side
    return stack[:, : squares * side].reshape(-1, side, side)
