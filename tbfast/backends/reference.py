"""The definition of every verb: float64, no fast paths, one step per equation.

The spectra and the inner products are here, the rest by subject: ``reference_fit`` (power laws),
``reference_lanczos``, ``reference_slq`` (from Lanczos to alpha) and ``reference_rsvd``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.backends.reference_fit import fit
from tbfast.backends.reference_lanczos import gram_apply, lanczos
from tbfast.backends.reference_rsvd import rsvd
from tbfast.backends.reference_slq import quadrature_fit
from tbfast.batch import Batch
from tbfast.matrices import real_rows

__all__ = ["dot", "drift", "eigenvalues", "fit", "gram_apply", "lanczos", "quadrature_fit", "rsvd"]

Array = NDArray[np.float64]


def eigenvalues(stacks: Sequence[Tensor], shares: Sequence[float] | None = None) -> list[Tensor]:
    """Eigenvalues of WᵀW of each stack of matrices, pooled and ascending.

    Args:
        stacks: Tensors of shape (matrices, rows, cols), real or complex floating point.
        shares: Ignored here: every eigenvalue is accurate. See ``exact.eigenvalues``.

    Returns:
        For each stack a float64 CPU tensor of shape (matrices * min(rows, cols),): squared
        singular values, exact zeros included; all NaN if a weight is not finite.
    """
    del shares
    spectra = []
    for stack in stacks:
        wide = stack.detach().cpu().to(torch.complex128 if stack.is_complex() else torch.float64)
        if not torch.isfinite(torch.view_as_real(wide) if wide.is_complex() else wide).all():
            count = stack.shape[0] * min(stack.shape[1:])
            spectra.append(torch.full((count,), math.nan, dtype=torch.float64))
            continue
        sigma = torch.linalg.svdvals(wide)
        spectra.append(sigma.flatten().square().sort().values)
    return spectra


def dot(batch: Batch, values: Tensor, scales: Tensor) -> tuple[Array, Array]:
    """Re <G, W> and |W|² of each layer, sums over its matrices.

    Args:
        batch: The weights W.
        values: G in the order and orientation of ``batch.stacks()``, end to end: int8, as many as
            the weights have elements, twice as many for complex ones, (re, im) interleaved.
        scales: float32, one for each row of each matrix, end to end; G = scale * value.

    Returns:
        Two arrays (layers,); NaN or infinite for a layer with a weight that is not finite.
    """
    inner, square = np.zeros(len(batch)), np.zeros(len(batch))
    row = element = 0
    for layer, stack in enumerate(batch.stacks()):
        real = real_rows(stack.detach()).double()
        scale = scales[row : row + len(real)].double()
        gradient = values[element : element + real.numel()].double().view_as(real)
        inner[layer] = float((real * gradient * scale[:, None]).sum())
        square[layer] = float(real.square().sum())
        row, element = row + len(real), element + real.numel()
    return inner, square


def drift(batch: Batch, rows: Tensor, values: Tensor) -> tuple[Array, Array, Array]:
    """How far some rows of each layer have moved from W₀.

    Args:
        batch: The weights W.
        rows: int64, ascending: which rows, counted over all matrices of ``batch.stacks()``.
        values: Those rows of W₀, end to end: float32, (re, im) interleaved where complex.

    Returns:
        Three arrays (layers,): |W - W₀|², <W - W₀, W₀> and |W₀|² over those rows. The first two are
        NaN or infinite for a layer with a weight there that is not finite.
    """
    sums = np.zeros((3, len(batch)))
    first = element = 0
    for layer, stack in enumerate(batch.stacks()):
        real = real_rows(stack.detach()).double()
        mine = rows[(rows >= first) & (rows < first + len(real))] - first
        now = real[mine]
        before = values[element : element + now.numel()].double().view_as(now)
        step = now - before
        sums[:, layer] = [float(s.sum()) for s in (step * step, step * before, before * before)]
        first, element = first + len(real), element + now.numel()
    return sums[0], sums[1], sums[2]
