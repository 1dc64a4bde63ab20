"""The CPU backend: exact spectra by threads over layers, fits in C++."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tbfast import _native
from tbfast.backends.exact import eigenvalues
from tbfast.fitting import FIT_KINDS, MAX_ALPHA, FitOptions, FitTable

__all__ = ["eigenvalues", "fit"]


def fit(spectra: Sequence[NDArray[np.float64]], options: FitOptions) -> FitTable:
    """Fit all spectra in one threaded call; see ``reference.fit``."""
    offsets = np.zeros(len(spectra) + 1, dtype=np.int64)
    np.cumsum([len(s) for s in spectra], out=offsets[1:])
    alpha, xmin, ks, start, n_tail, reason = _native.fit(
        np.concatenate([*spectra, np.empty(0)]),
        offsets,
        kind=FIT_KINDS.index(options.kind),
        xmin_pos=options.xmin_pos,
        smooth=options.smooth,
        k=options.k,
        bins=options.bins,
        peak_compat=options.peak_compat,
        max_alpha=MAX_ALPHA,
        threads=_native.num_threads(),
    )
    return FitTable(alpha, xmin, ks, start, n_tail, reason)
