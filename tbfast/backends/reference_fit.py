"""The definition of ``fit``: four power-law fits.

Sources: Zhou et al., "Temperature Balancing, Layer-wise Weight Analysis, and Neural Network
Training", NeurIPS 2023 (median, peak); Clauset, Shalizi and Newman, "Power-law distributions in
empirical data", SIAM Review 51 (2009) (ks; equations 3.1 and 3.9); Hill, "A simple general
approach to inference about the tail of a distribution", Annals of Statistics 3 (1975) (tail).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tbfast.fitting import MAX_ALPHA, FitOptions, FitTable, Reason

Array = NDArray[np.float64]


def fit(spectra: Sequence[Array], options: FitOptions) -> FitTable:
    """Fit a power law to each spectrum (ascending, positive, zeros already dropped)."""
    table = FitTable.empty(len(spectra))
    for row, values in enumerate(spectra):
        if len(values) == 0:
            table.reason[row] = Reason.NO_EIGENVALUES
        elif not np.isfinite(values).all():
            table.reason[row] = Reason.NOT_FINITE
        else:
            _fit_one(np.log(values), values, options, table, row)
    return table


def _fit_one(logs: Array, values: Array, options: FitOptions, table: FitTable, row: int) -> None:
    n = len(logs)
    if options.kind == "median":
        start = int(n / options.xmin_pos)
        alpha = hill(logs, start, half_width=int(options.smooth * n))
        best = start
    elif options.kind == "tail":
        if options.k > n:
            table.reason[row] = Reason.TOO_FEW
            return
        best = n - options.k
        alpha = hill(logs, best)
    else:
        candidates = range(n - 1) if options.kind == "ks" else _near_peak(logs, values, options)
        scored = [
            (ks_distance(logs, i, a), i, a)
            for i in candidates
            if 1 < (a := hill(logs, i)) < math.inf
        ]
        if not scored:
            table.reason[row] = Reason.NO_CANDIDATE
            return
        _, best, alpha = min(scored, key=lambda c: (c[0], c[1]))
    if alpha > MAX_ALPHA:
        table.reason[row] = Reason.ALL_EQUAL
        return
    table.alpha[row] = alpha
    table.start[row] = best
    table.xmin[row] = values[best]
    table.n_tail[row] = n - best
    table.ks[row] = ks_distance(logs, best, alpha)


def hill(logs: Array, start: int, half_width: int = 0) -> float:
    """alpha = 1 + n / (sum_{j >= i} ln x_j - n ln x_i), i = ``start``, n = N - i.

    xmin is part of the sum (contributing 0) and counts in n. With ``half_width`` the term
    ln x_i is the mean over the ranks i - half_width .. i + half_width that exist.
    """
    n = len(logs) - start
    anchor = logs[max(0, start - half_width) : start + half_width + 1].mean()
    # Summed as differences: sum(logs) - n * anchor would cancel when the tail is narrow.
    excess = float((logs[start:] - anchor).sum())
    return 1 + n / excess if excess > 0 else math.inf


def ks_distance(logs: Array, start: int, alpha: float) -> float:
    """max_j |1 - (x_j / x_i)^(1 - alpha) - (j - i) / n|, the published one-sided distance."""
    tail = logs[start:] - logs[start]
    model = -np.expm1((1 - alpha) * tail)
    return float(np.abs(model - np.arange(len(tail)) / len(tail)).max())


def _near_peak(logs: Array, values: Array, options: FitOptions) -> list[int]:
    """Candidates within [0.95 p, 1.5 p], p the left edge of the fullest bin of log10 x."""
    log10 = logs / math.log(10)
    counts, edges = np.histogram(log10, bins=options.bins, range=(log10[0], log10[-1]))
    peak = 10 ** edges[int(np.argmax(counts))]
    # The published code compares the logarithm of the lower bound with x itself.
    low = math.log10(0.95 * peak) if options.peak_compat else 0.95 * peak
    return [i for i in range(len(values) - 1) if low <= values[i] <= 1.5 * peak]
