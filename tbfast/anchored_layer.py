"""The anchor of one layer: what is kept of its eigendecomposition, and of its rows.

For alpha's first-order change, its gradient as int8. For Lanczos quadrature, aligned probes
X = V s, V the eigenvectors and s random signs: each eigenvalue has the same weight in such a probe.
For the movement of the weights, copies of a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.alpha import fit_spectra
from tbfast.backends.philox import Purpose, philox, signs
from tbfast.fitting import FitOptions
from tbfast.matrices import Kind, eigenvalue_scale, real_rows
from tbfast.perturbation import alpha_gradient, decompose
from tbfast.precision import zero_threshold
from tbfast.tridiagonals import Tridiagonals

Array = NDArray[np.float64]

_KEPT_SHARE = 0.05  # of the rows: gives the movement to 3-6 %
_LEAST_KEPT = 8  # rows of a layer
_BREAKDOWN = 1e-13  # of the largest eigenvalue: below it a Lanczos vector is rounding
_ALIGNED_DRAW = (1 << 24) - 1  # the last of the draws for probes; fresh ones count from 0


class AnchoredLayer:
    """One layer while its anchor is taken."""

    def __init__(
        self, stack: Tensor, kind: Kind, rows: Tensor, options: FitOptions, backend: str
    ) -> None:
        self.stack = stack
        self.rows = rows  # to keep
        self.kept = (
            real_rows(stack[rows // stack.shape[1], rows % stack.shape[1]]).float().flatten()
        )
        matrices, n = len(stack), min(stack.shape[1:])
        self.parts = decompose(stack, options.upper_share(matrices * n))
        if self.parts is None:
            self.values = torch.full((matrices, n), math.nan, dtype=torch.float64)
            unit = 1.0
        else:
            self.values = self.parts.values
            unit = eigenvalue_scale(kind) / self.parts.factor**2
        pooled = self.values.flatten().sort().values
        threshold = zero_threshold(stack, float(pooled.sum()))
        fit = fit_spectra([pooled.numpy()], [threshold], options, backend=backend).row(0)
        self.fit = replace(fit, xmin=fit.xmin * unit)

    def keep_gradient(self, options: FitOptions) -> None:
        """|W| d alpha / d W, rounded to int8 by row; zeros where there is no alpha."""
        fit = self.fit
        if self.parts is None or fit.reason is not None:
            full = torch.zeros_like(real_rows(self.stack), dtype=torch.float64)
        else:
            gradient = alpha_gradient(self.parts, fit.alpha, fit.n_tail, fit.n_zeros, options)
            full = real_rows(gradient)
        self.scales = (full.abs().amax(1) / 127).float()
        divisor = self.scales.double().clamp_(min=torch.finfo(torch.float32).tiny)
        rounded = (full / divisor[:, None]).round_().clamp_(-127, 127)
        self.gradient = rounded.to(torch.int8).flatten()
        self.directions = full[self.rows].float().flatten()

    def keep_probes(self, probes: int, seed: int, key: int) -> None:
        """V s; for weights that are not finite the signs themselves."""
        matrices, n = self.values.shape
        drawn = signs(seed, key, Purpose.PROBE, _ALIGNED_DRAW, 0, matrices * n, probes)
        start = torch.from_numpy(drawn).view(matrices, n, probes)
        if self.parts is not None:
            # Complex V: x = V s in interleaved real form has the same weight, 1/n, on each pair of
            # equal eigenvalues.
            start = self.parts.vectors @ start.to(self.parts.vectors.dtype)
        self.probes = real_rows(start.mT).float().view(matrices, probes, -1)

    def freed(self) -> AnchoredLayer:
        """Itself, without the eigenvectors."""
        self.parts = None
        return self


def kept_rows(stack: Tensor, key: int, seed: int) -> Tensor:
    """Which of all rows of a stack to keep: evenly spread, from a random offset."""
    rows = stack.shape[0] * stack.shape[1]
    count = max(min(rows, _LEAST_KEPT), math.ceil(_KEPT_SHARE * rows))
    bits = philox((0, 0, Purpose.ROWS << 30, seed >> 32), (seed & 0xFFFFFFFF, key))
    offset = float(bits[0]) / 2**32
    return torch.from_numpy(((np.arange(count) + offset) * (rows / count)).astype(np.int64))


def flat(parts: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """One-dimensional tensors end to end, if any."""
    return torch.cat([torch.empty(0, dtype=dtype), *parts])


def aligned_runs(values: Sequence[Tensor], like: Tridiagonals) -> Tridiagonals:
    """The runs of aligned probes at the anchor itself.

    For A = V diag(lambda) Vᵀ Lanczos from V s runs as it does for diag(lambda) from s, or from
    ones: all probes give the same Jacobi matrix.

    Args:
        values: Eigenvalues of each layer's matrices, (matrices, n).
        like: Runs with as many probes and steps, in the same arithmetic.
    """
    spectra = [row.numpy() for stack in values for row in stack]
    shape = like.diagonal.shape
    diagonal, off_diagonal = np.zeros(shape), np.zeros(shape)
    taken = np.ones(shape[:2], dtype=np.int32)
    for i, spectrum in enumerate(spectra):
        a, b = _lanczos_of_diagonal(spectrum, shape[2])
        diagonal[i, :, : len(a)], off_diagonal[i, :, : len(b)], taken[i] = a, b, len(a)
    return replace(like, diagonal=diagonal, off_diagonal=off_diagonal, taken=taken)


def _lanczos_of_diagonal(values: Array, steps: int) -> tuple[list[float], list[float]]:
    a: list[float] = []
    b: list[float] = []
    basis = np.full((1, len(values)), 1 / math.sqrt(len(values)))
    for _ in range(min(steps, len(values))):
        w = values * basis[-1]
        a.append(float(basis[-1] @ w))
        for _ in range(2):  # reorthogonalise; twice is enough (Parlett)
            w = w - basis.T @ (basis @ w)
        b.append(float(np.linalg.norm(w)))
        if not b[-1] > _BREAKDOWN * values[-1]:
            break
        basis = np.concatenate([basis, (w / b[-1])[None]])
    return a, b[: len(a) - 1]
