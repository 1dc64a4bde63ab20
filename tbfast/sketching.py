"""Fits of spectra that were estimated, not computed; shared by every backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tbfast.fitting import FitTable


@dataclass(frozen=True)
class SketchOptions:
    """How a spectrum is estimated.

    Attributes:
        probes: Random start vectors for each matrix. The error falls with the root of it.
        steps: Lanczos steps, each one read of the weights. Trained weights need 20.
        seed: Of the start vectors, below 2^64.
        draw: Which of the draws of this seed, below 2^24: the optimizer step, in a training.
    """

    probes: int = 8
    steps: int = 20
    seed: int = 0
    draw: int = 0

    def __post_init__(self) -> None:
        limits = {"probes": (1, 8192), "steps": (1, 1000), "seed": (0, 2**64 - 1)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or int(value) != value or not least <= value <= most:
                raise ValueError(
                    f"{name} must be a whole number from {least} to {most}, got {value!r}"
                )


@dataclass
class SketchTable:
    """Fits of many estimated spectra, one row each.

    Attributes:
        fits: Of the eigenvalues that are not numerically zero.
        n_zeros: Estimated number of those that are.
        max_eigenvalue: Largest Ritz value; NaN where a run is not finite.
        sum_eigenvalues: Estimated trace; likewise.
        sketch_error: Standard error of alpha against that of the exact spectrum; NaN without fit.
    """

    fits: FitTable
    n_zeros: NDArray[np.int64]
    max_eigenvalue: NDArray[np.float64]
    sum_eigenvalues: NDArray[np.float64]
    sketch_error: NDArray[np.float64]
