"""Spectra of weights: all eigenvalues of WᵀW, or an estimate of how they are distributed.

``exact``: every eigenvalue, to what the fit needs. ``sketch``: stochastic Lanczos quadrature, a few
reads of the weights. The engine behind both is the backend for the device of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.alpha import AlphaFit, described, fit_spectra
from tbfast.backends import engine_for
from tbfast.batch import Batch
from tbfast.fitting import FitOptions
from tbfast.matrices import MEASURABLE, Kind, as_matrices, as_tensor, eigenvalue_scale
from tbfast.precision import zero_threshold
from tbfast.sketching import SketchOptions, SketchTable

Method = Literal["auto", "exact", "sketch"]
METHODS: tuple[Method, ...] = get_args(Method)

# Shorter side above which "auto" sketches. At 2048, 8 probes err by 1 % and take a thirtieth of the
# time of all eigenvalues; below, the error grows and the gain falls.
SKETCH_ABOVE = 2048


@dataclass(frozen=True)
class Measurement:
    """What one look at a layer's spectrum gave.

    Attributes:
        fit: Row of the power-law fit.
        n_eigs: Number of eigenvalues, numerical zeros included.
        max_eigenvalue: Largest eigenvalue, the squared spectral norm.
        sum_eigenvalues: Their sum, the squared Frobenius norm.
        method: ``"exact"`` or ``"sketch"``. Of a sketch, the largest eigenvalue is the largest Ritz
            value, which is never above it but for rounding, and the sum is estimated.
        sketch_error: Standard error of alpha against that of the exact spectrum; 0 if exact.
    """

    fit: AlphaFit
    n_eigs: int
    max_eigenvalue: float
    sum_eigenvalues: float
    method: str
    sketch_error: float = 0.0


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
        backend: ``"auto"``, ``"native"``, ``"reference"``, ``"cuda"`` or ``"triton"``. On a GPU,
            ``"auto"`` computes there, with the libraries that torch brings.

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
    found = _eigenvalues(stacks, [1.0] * len(stacks), backend)
    return found[0] if single else found


def measure(
    weights: Sequence[Tensor],
    kinds: Sequence[Kind],
    options: FitOptions,
    *,
    names: Sequence[str] | None = None,
    filter_zeros: float | None = None,
    method: Method = "auto",
    sketch: SketchOptions | None = None,
    backend: str = "auto",
) -> list[Measurement]:
    """Spectra and fits of many parameters in one call: weights → spectra → alpha.

    Args:
        weights: Parameters of any device and floating-point or complex dtype; not changed.
        kinds: How each becomes matrices, see :mod:`tbfast.matrices`.
        options: The fit.
        names: Of the parameters, for errors and the random numbers of a sketch; None numbers them.
        filter_zeros: Absolute threshold under which eigenvalues are dropped (published: 1e-5);
            None drops what rounding alone could have made: ``precision.zero_threshold``.
        method: ``"exact"``, ``"sketch"``, or ``"auto"``: exact, except for the median fit of
            matrices whose shorter side is above 2048. Matrices with no more eigenvalues than a
            sketch has steps are exact in any case: it could not be cheaper.
        sketch: Options of a sketch.
        backend: Name of a backend.

    Raises:
        ValueError: On an unknown method, or a sketch with ``filter_zeros``.
        TypeError: On a tensor that cannot be sketched; see :class:`tbfast.batch.Batch`.
    """
    names = [str(row) for row in range(len(weights))] if names is None else names
    layers = list(zip(names, weights, kinds, strict=True))
    sketch = sketch or SketchOptions()
    least = sketched_above(method, options, filter_zeros, sketch)
    sketched = [min(as_matrices(w, kind).shape[1:]) > least for _, w, kind in layers]
    exact = _exact(
        [x for x, s in zip(layers, sketched, strict=True) if not s], options, filter_zeros, backend
    )
    rough = _sketch(
        [x for x, s in zip(layers, sketched, strict=True) if s],
        options,
        sketch,
        backend,
    )
    found = {False: iter(exact), True: iter(rough)}
    return [next(found[s]) for s in sketched]


def _exact(
    layers: Sequence[tuple[str, Tensor, Kind]],
    options: FitOptions,
    filter_zeros: float | None,
    backend: str,
) -> list[Measurement]:
    stacks = [as_matrices(weight, kind) for _, weight, kind in layers]
    # An absolute threshold may lie anywhere: then every eigenvalue must be accurate.
    shares = [
        options.upper_share(_count(stack)) if filter_zeros is None else 1.0 for stack in stacks
    ]
    found = _eigenvalues(stacks, shares, backend)
    spectra: list[NDArray[np.float64]] = [
        values.numpy() * eigenvalue_scale(kind)
        for values, (_, _, kind) in zip(found, layers, strict=True)
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


def _eigenvalues(stacks: Sequence[Tensor], shares: Sequence[float], backend: str) -> list[Tensor]:
    """Of each stack, by the backend for the device on which it is."""
    found: dict[int, Tensor] = {}
    for device, rows in _by_device(stacks).items():
        engine, _ = engine_for(backend, device)
        values = engine.eigenvalues([stacks[row] for row in rows], [shares[row] for row in rows])
        found.update(zip(rows, values, strict=True))
    return [found[row] for row in range(len(stacks))]


def _sketch(
    layers: Sequence[tuple[str, Tensor, Kind]],
    options: FitOptions,
    sketch: SketchOptions,
    backend: str,
) -> list[Measurement]:
    found: dict[int, Measurement] = {}
    for device, rows in _by_device([weight for _, weight, _ in layers]).items():
        engine, place = engine_for(backend, device)
        weights = {layers[row][0]: layers[row][1].detach().to(place) for row in rows}
        batch = Batch(weights, [layers[row][2] for row in rows])
        runs = engine.lanczos(
            batch, sketch.probes, sketch.steps, seed=sketch.seed, draw=sketch.draw
        )
        counts = [_count(stack) for stack in batch.stacks()]
        table = engine.quadrature_fit(runs, options)
        found.update(zip(rows, sketched_measurements(batch.kinds, counts, table), strict=True))
    return [found[row] for row in range(len(layers))]


def sketched_measurements(
    kinds: Sequence[Kind], counts: Sequence[int], table: SketchTable
) -> list[Measurement]:
    """One measurement for each row of a table, in the unit of the layer's kind.

    Args:
        kinds: Of the layers.
        counts: Numbers of eigenvalues of the layers.
        table: Fits of their sketches.
    """
    fits = described(table.fits, table.n_zeros)
    found = []
    for row, (kind, count) in enumerate(zip(kinds, counts, strict=True)):
        scale, fit = eigenvalue_scale(kind), fits.row(row)
        found.append(
            Measurement(
                fit=replace(fit, xmin=fit.xmin * scale),
                n_eigs=count,
                max_eigenvalue=float(table.max_eigenvalue[row]) * scale,
                sum_eigenvalues=float(table.sum_eigenvalues[row]) * scale,
                method="sketch",
                sketch_error=float(table.sketch_error[row]),
            )
        )
    return found


def sketched_above(
    method: Method, options: FitOptions, filter_zeros: float | None, sketch: SketchOptions
) -> float:
    """Shorter side above which :func:`measure` sketches matrices; infinite if it never does.

    Raises:
        ValueError: On an unknown method, or a sketch with ``filter_zeros``.
    """
    check_method(method)
    if method == "sketch" and filter_zeros is not None:
        raise ValueError(
            "method='sketch' cannot drop eigenvalues below an absolute threshold, got "
            f"filter_zeros={filter_zeros!r}; leave it out, or use method='exact'"
        )
    if method == "sketch":
        return sketch.steps
    # Only the median fit rests on the bulk of the spectrum, which quadrature sees well.
    suits = options.kind == "median" and filter_zeros is None
    return SKETCH_ABOVE if method == "auto" and suits else math.inf


def check_method(method: str) -> None:
    """Refuse an unknown ``method``.

    Raises:
        ValueError: With the known ones.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Which of the tensors are on each device."""
    rows: dict[torch.device, list[int]] = {}
    for row, tensor in enumerate(tensors):
        rows.setdefault(tensor.device, []).append(row)
    return rows


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
