"""Spectra of weights: all eigenvalues of WᵀW, exact to what the fit needs.

The engine behind them (Gram matrix, precision policy, threads) is ``tbfast.backends.native``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.alpha import AlphaFit, fit_spectra
from tbfast.backends import get_backend
from tbfast.fitting import FitOptions
from tbfast.matrices import MEASURABLE, Kind, as_matrices, as_tensor, eigenvalue_scale
from tbfast.precision import zero_threshold

Method = Literal["auto", "exact", "sketch"]


@dataclass(frozen=True)
class Measurement:
    """What one look at a layer's spectrum gave.

    Attributes:
        fit: Row of the power-law fit.
        n_eigs: Number of eigenvalues, numerical zeros included.
        max_eigenvalue: Largest eigenvalue, the squared spectral norm.
        sum_eigenvalues: Their sum, the squared Frobenius norm.
        method: ``"exact"`` or ``"sketch"``.
    """

    fit: AlphaFit
    n_eigs: int
    max_eigenvalue: float
    sum_eigenvalues: float
    method: str


@overload
def eigenvalues(matrices: Tensor, *, backend: str = "auto") -> Tensor: ...
@overload
def eigenvalues(matrices: Sequence[Tensor], *, backend: str = "auto") -> list[Tensor]: ...
def eigenvalues(
    matrices: Tensor | Sequence[Tensor], *, backend: str = "auto"
) -> Tensor | list[Tensor]:
    """All eigenvalues of WᵀW (WᴴW) of a matrix, or of each matrix of a ragged list.

    Each eigenvalue is accurate to 1e-6 of itself, or to what a float64 singular value
    decomposition gives where it is smaller than 1e-10 of the largest.

    Args:
        matrices: Tensor (or array) of shape (rows, cols), or a list of these; float16, bfloat16,
            float32, float64, complex64 or complex128, any strides, any device. Not changed.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        float64 CPU tensor of shape (min(rows, cols),), ascending, non-negative; a list of these
        for a list. All NaN for a matrix with a NaN or infinite entry.

    Raises:
        ValueError: On an empty matrix or one without two dimensions.
        TypeError: On a dtype that is neither floating point nor complex.
    """
    single = isinstance(matrices, (Tensor, np.ndarray))
    items = [matrices] if single else list(matrices)
    stacks = [_checked(item, f"matrix {row}").unsqueeze(0) for row, item in enumerate(items)]
    found: list[Tensor] = get_backend(backend).eigenvalues(stacks)
    return found[0] if single else found


def measure(
    weights: Sequence[Tensor],
    kinds: Sequence[Kind],
    options: FitOptions,
    *,
    filter_zeros: float | None = None,
    method: Method = "auto",
    backend: str = "auto",
) -> list[Measurement]:
    """Spectra and fits of many parameters in one call: weights → spectra → alpha.

    Args:
        weights: Parameters of any device and floating-point or complex dtype; not changed.
        kinds: How each becomes matrices, see :mod:`tbfast.matrices`.
        options: The fit.
        filter_zeros: Absolute threshold under which eigenvalues are dropped (published: 1e-5);
            None drops what rounding alone could have made: ``precision.zero_threshold``.
        method: ``"exact"`` or ``"auto"``, which today are the same.
        backend: Name of a backend.

    Raises:
        ValueError: On an unknown method, or ``"sketch"``, which this version does not have.
    """
    check_method(method)
    engine = get_backend(backend)
    stacks = [as_matrices(weight, kind) for weight, kind in zip(weights, kinds, strict=True)]
    # An absolute threshold may lie anywhere: then every eigenvalue must be accurate.
    shares = [
        options.upper_share(_count(stack)) if filter_zeros is None else 1.0 for stack in stacks
    ]
    found = engine.eigenvalues(stacks, shares)
    spectra: list[NDArray[np.float64]] = [
        values.numpy() * eigenvalue_scale(kind) for values, kind in zip(found, kinds, strict=True)
    ]
    thresholds = [
        zero_threshold(stack, float(values.sum())) if filter_zeros is None else filter_zeros
        for values, stack in zip(spectra, stacks, strict=True)
    ]
    fits = fit_spectra(spectra, thresholds, options, backend=backend)
    return [
        Measurement(
            fit=fits.row(row),
            n_eigs=len(values),
            max_eigenvalue=float(values[-1]) if len(values) else 0.0,
            sum_eigenvalues=float(values.sum()),
            method="exact",
        )
        for row, values in enumerate(spectra)
    ]


def check_method(method: str) -> None:
    """Refuse an unknown ``method``, and the one that is not there yet."""
    if method == "sketch":
        raise ValueError(
            "method='sketch' needs the randomized engine, which this version does not have; "
            "use method='exact'"
        )
    if method not in ("auto", "exact"):
        raise ValueError(f"method must be one of auto, exact, sketch; got {method!r}")


def _count(stack: Tensor) -> int:
    return stack.shape[0] * min(stack.shape[1:])


def _checked(matrix: Any, label: str) -> Tensor:
    tensor = as_tensor(matrix, label)
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise ValueError(
            f"{label} must have shape (rows, cols), both above 0; got {tuple(tensor.shape)}"
        )
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise TypeError(f"{label} must be dense and hold values, but it is {kind}")
    if tensor.dtype not in MEASURABLE:
        raise TypeError(f"{label} must be floating point or complex, got {tensor.dtype}")
    return tensor.detach()
