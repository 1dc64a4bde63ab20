"""What Lanczos gives, shared by every backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tridiagonals:
    """Jacobi matrices of independent Lanczos runs, several for each matrix of a batch.

    Attributes:
        diagonal: Shape (matrices, probes, steps), float64. NaN where a matrix is not finite.
        off_diagonal: The same shape; entry j couples rows j and j + 1.
        taken: Steps before each run ended, at least 1, shape (matrices, probes), int32. Entries
            from ``taken`` on (for off_diagonal: from ``taken - 1`` on) mean nothing.
        first: The matrices of layer l are ``first[l]`` to ``first[l + 1]``, shape (layers + 1,).
        count: Number of eigenvalues that each matrix has, shape (matrices,).
        eps: Unit roundoff of the arithmetic that Lanczos ran in.
    """

    diagonal: Array
    off_diagonal: Array
    taken: NDArray[np.int32]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    eps: float
