"""Tail exponents of spectra: the public fit.

alpha = 1 + n / (sum_{j >= i} ln lambda_j - n ln lambda_i), eigenvalues ascending, n = N - i:
the maximum-likelihood (Hill) exponent of the tail that begins at xmin = lambda_i. The four fits
differ in how i is chosen; ``tbfast.backends.reference`` is the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tbfast.backends import get_backend
from tbfast.fitting import FitKind, FitOptions, FitTable, Reason

Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class AlphaFit:
    """A power-law fit, or many: floats for one spectrum, arrays of shape (spectra,) for a list.

    Attributes:
        alpha: Tail exponent; NaN where there is none.
        xmin: Smallest eigenvalue of the tail, in the unit of the eigenvalues.
        n_tail: Number of eigenvalues in the tail, xmin included.
        ks: Kolmogorov-Smirnov distance between tail and fit.
        alpha_error: Standard error of alpha, (alpha - 1) / sqrt(n_tail): that of independent
            draws from a power law (Clauset et al. 2009, equation 3.2).
        n_zeros: Eigenvalues dropped before the fit as numerically zero.
        reason: Why alpha is NaN, None when fitted (a list of these for a list of spectra).
    """

    alpha: Any
    xmin: Any
    n_tail: Any
    ks: Any
    alpha_error: Any
    n_zeros: Any
    reason: Any

    def row(self, index: int) -> AlphaFit:
        """The fit of one spectrum, as Python numbers."""
        return AlphaFit(
            alpha=float(self.alpha[index]),
            xmin=float(self.xmin[index]),
            n_tail=int(self.n_tail[index]),
            ks=float(self.ks[index]),
            alpha_error=float(self.alpha_error[index]),
            n_zeros=int(self.n_zeros[index]),
            reason=self.reason[index],
        )


def fit_alpha(
    eigenvalues: ArrayLike | Sequence[ArrayLike],
    fit: FitKind = "median",
    *,
    filter_zeros: float | None = None,
    backend: str = "auto",
    **options: Any,
) -> AlphaFit:
    """Fit a power law to the tail of one spectrum or of a ragged list of them.

    Args:
        eigenvalues: One 1-D array or tensor of non-negative eigenvalues in any order, or a list
            of such; not changed. Computed in float64.
        fit: How xmin is chosen. ``"median"``: the eigenvalue at index ``int(N / xmin_pos)``
            (TempBalance). ``"ks"``: the one that minimises the Kolmogorov-Smirnov distance
            (Clauset et al.; WeightWatcher). ``"peak"``: the same among the eigenvalues near the
            peak of their log histogram. ``"tail"``: the k-th largest (Hill).
        filter_zeros: Eigenvalues at or below this are dropped (published: 1e-5). None drops
            those at or below N * 2.2e-16 * the largest, which float64 cannot tell from zero.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.
        **options: ``xmin_pos=2.0``, ``smooth=0.0``, ``k=64``, ``bins=100``,
            ``peak_compat=False``; see :class:`tbfast.fitting.FitOptions`.

    Returns:
        :class:`AlphaFit`; ``alpha`` is NaN, with a reason, for spectra that cannot be fitted.

    Raises:
        ValueError: On an empty or negative spectrum, a wrong shape or an unknown option.
    """
    chosen = fit_options(fit, options)
    single = _is_single(eigenvalues)
    raw: list[Any] = [eigenvalues] if single else list(eigenvalues)  # type: ignore[arg-type]
    spectra = [_spectrum(values, row) for row, values in enumerate(raw)]
    thresholds = [
        filter_zeros if filter_zeros is not None else len(s) * _EPS * (s[-1] if len(s) else 0.0)
        for s in spectra
    ]
    fits = fit_spectra(spectra, thresholds, chosen, backend=backend)
    return fits.row(0) if single else fits


def fit_options(fit: FitKind, options: dict[str, Any]) -> FitOptions:
    """Checked options of a fit.

    Raises:
        ValueError: On an unknown option or a value out of range.
    """
    known = set(FitOptions.__dataclass_fields__) - {"kind"}
    if unknown := set(options) - known:
        raise ValueError(
            f"unknown fit option {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}"
        )
    return FitOptions(fit, **options)


def fit_spectra(
    spectra: Sequence[Array], thresholds: Sequence[float], options: FitOptions, *, backend: str
) -> AlphaFit:
    """Fit many spectra in one call of the backend.

    Args:
        spectra: Ascending float64 arrays; may hold NaN, which gives a fit without alpha.
        thresholds: For each spectrum, eigenvalues at or below this are zeros.
        options: The fit.
        backend: Name of a backend.

    Returns:
        :class:`AlphaFit` of arrays of shape (spectra,).
    """
    dropped = [
        int(np.searchsorted(s, threshold, side="right")) if np.isfinite(threshold) else 0
        for s, threshold in zip(spectra, thresholds, strict=True)
    ]
    kept = [s[zeros:] for s, zeros in zip(spectra, dropped, strict=True)]
    table: FitTable = get_backend(backend).fit(kept, options)
    return described(table, np.array(dropped, dtype=np.int64))


def described(table: FitTable, n_zeros: NDArray[np.int64]) -> AlphaFit:
    """The fits of a backend with their statistical errors and reasons in words."""
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha_error = (table.alpha - 1) / np.sqrt(table.n_tail)
    return AlphaFit(
        alpha=table.alpha,
        xmin=table.xmin,
        n_tail=table.n_tail,
        ks=table.ks,
        alpha_error=alpha_error,
        n_zeros=n_zeros,
        reason=[Reason(code).text for code in table.reason],
    )


def _is_single(eigenvalues: Any) -> bool:
    if isinstance(eigenvalues, (list, tuple)):
        return all(np.ndim(item) == 0 for item in eigenvalues)
    return bool(np.ndim(eigenvalues) == 1)


def _spectrum(values: ArrayLike, row: int) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values if values.is_complex() else values.double()).numpy()
    if np.iscomplexobj(values):
        raise TypeError(f"eigenvalues[{row}] must be real, got complex numbers")
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"eigenvalues[{row}] must have shape (n,), got {array.shape}")
    if array.size == 0:
        raise ValueError(f"eigenvalues[{row}] is empty")
    array = np.sort(array)  # NaN sorts last
    # The rounding of a symmetric eigensolver may leave a zero slightly negative.
    if array[0] < -1e-5 * abs(array[-1]):
        raise ValueError(f"eigenvalues[{row}] must not be negative, got {array[0]:.3g}")
    return array
